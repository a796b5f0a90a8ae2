"""Callbacks of the training scripts."""

import math
import time
from typing import Any

import torch
from transformers import TrainerCallback


class LossMonitor(TrainerCallback):
    """
    Adds to the logs of `Trainer`: the loss of each token stream, validation perplexities, and the training speed.

    A multi-stream model returns `stream_losses`, a tuple of scalars that sum to its loss and that are divided, like
    its loss, by the number of targets per stream. Logged are `loss_<stream>` in training, `eval_loss_<stream>` and
    `eval_perplexity_<stream>` in validation (averages over all targets), and `eval_perplexity`, that of all streams
    together, that is per hit. Streams are named by `config.stream_names`, else numbered.

    `tokens_per_second()` counts positions that are not padding, on all ranks.
    """

    def __init__(self):
        self.stream_names: tuple[str, ...] = ()
        self.hook = None
        self.model = None
        self.tokens: Any = 0
        self.started: float | None = None
        self._reset_training()
        self._reset_validation()

    def _reset_training(self):
        self.train_sums: list[Any] | None = None
        self.train_step = 0

    def _reset_validation(self):
        self.eval_sums: list[Any] | None = None
        self.eval_targets: list[Any] | None = None

    def on_init_end(self, args, state, control, model=None, **kwargs):
        self.model = model
        self.stream_names = tuple(getattr(model.config, "stream_names", ()))
        self.hook = model.register_forward_hook(self._after_forward, with_kwargs=True)

    def on_train_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()
        self.tokens = 0
        self._reset_training()
        self.train_step = state.global_step

    def on_train_end(self, args, state, control, **kwargs):
        self.elapsed = time.perf_counter() - self.started

    @torch.no_grad()
    def _after_forward(self, model, args, kwargs, output):
        labels = kwargs.get("labels")
        if labels is None:
            return
        if model.training:
            mask = kwargs.get("attention_mask")
            self.tokens += mask.sum() if mask is not None else labels.shape[0] * labels.shape[1]
        losses = output.get("stream_losses") if hasattr(output, "get") else None
        if losses is None:
            return
        losses = [loss.detach().float() for loss in losses]
        if model.training:
            # the micro-batches of a step add up, because all are divided by the number of targets of the step
            old = self.train_sums or [0.0] * len(losses)
            self.train_sums = [total + loss for total, loss in zip(old, losses, strict=True)]
            return
        targets = [(labels[..., stream] != -100).sum() for stream in range(labels.shape[-1])]
        targets = (targets * len(losses))[: len(losses)]
        items = kwargs.get("num_items_in_batch")
        divisors = targets if items is None else [items / labels.shape[-1]] * len(losses)
        old = self.eval_sums or [0.0] * len(losses)
        self.eval_sums = [total + loss * divisor for total, loss, divisor in zip(old, losses, divisors, strict=True)]
        old = self.eval_targets or [0] * len(losses)
        self.eval_targets = [total + number for total, number in zip(old, targets, strict=True)]

    def _name(self, stream: int) -> str:
        return self.stream_names[stream] if stream < len(self.stream_names) else str(stream)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs is None:
            return
        extra = {}
        if "loss" in logs and self.train_sums is not None:
            steps = max(state.global_step - self.train_step, 1)
            sums = _sum_over_ranks(self.train_sums)
            extra = {f"loss_{self._name(stream)}": total / steps for stream, total in enumerate(sums)}
            self._reset_training()
            self.train_step = state.global_step
        elif "eval_loss" in logs:
            if self.eval_sums is not None:
                sums, targets = _sum_over_ranks(self.eval_sums), _sum_over_ranks(self.eval_targets)
                means = [total / max(number, 1) for total, number in zip(sums, targets, strict=True)]
                for stream, mean in enumerate(means):
                    extra[f"eval_loss_{self._name(stream)}"] = mean
                    extra[f"eval_perplexity_{self._name(stream)}"] = _exp(mean)
                extra["eval_perplexity"] = _exp(sum(means))
                self._reset_validation()
            else:
                extra["eval_perplexity"] = _exp(logs["eval_loss"])
        # the same dict becomes the metrics that `evaluate` returns
        logs.update(extra)
        if extra and state.log_history:
            state.log_history[-1].update(extra)

    def tokens_per_second(self) -> float:
        """Real positions per second of the last training, all ranks together."""
        (tokens,) = _sum_over_ranks([self.tokens])
        return tokens / max(self.elapsed, 1e-9)


class SetCollatorEpoch(TrainerCallback):
    """Tells a collator with a method `set_epoch` which pass over the data begins."""

    def __init__(self, collator: Any):
        self.collator = collator

    def on_epoch_begin(self, args, state, control, **kwargs):
        # whole at the beginning of a pass; the fraction of a resumed one is cut
        self.collator.set_epoch(int(state.epoch or 0))


def _sum_over_ranks(values: list[Any]) -> list[float]:
    values = [torch.as_tensor(value, dtype=torch.float64) for value in values]
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value.item() for value in values]
    # float64 is exact for counts; MPS, which lacks it, has no process groups
    total = torch.stack([value.reshape(()) for value in values])
    if torch.distributed.get_backend() == "nccl":
        total = total.cuda()
    torch.distributed.all_reduce(total)
    return total.tolist()


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
