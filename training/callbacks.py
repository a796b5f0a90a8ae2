"""Callbacks of the training scripts."""

import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

EMA_FOLDER = "ema"


class LossMonitor(TrainerCallback):
    """
    Adds to the logs of `Trainer`: the loss of each token stream, validation perplexities, and the speed of training.

    A multi-stream model returns `stream_losses`, a tuple of scalars that are divided, like its loss, by the number of
    targets per stream. Logged are `loss_<stream>` in training, `eval_loss_<stream>` and `eval_perplexity_<stream>` in
    validation (averages over all targets), and `eval_perplexity`, that of all streams together, that is per hit.
    Streams are named by `config.stream_names`, else numbered. Other parts of the loss that the model returns as
    `<part>_loss` (energy, stop, load balance) are logged as `loss_<part>` and `eval_loss_<part>`.

    `train_tokens_per_second`, at the end, counts positions that are not padding, on all ranks.
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
        self.train_sums: dict[str, Any] = {}
        self.train_step = 0

    def _reset_validation(self):
        self.eval_sums: dict[str, Any] = {}
        self.eval_targets: dict[str, Any] = {}

    def on_init_end(self, args, state, control, model=None, **kwargs):
        self.model = model
        self.stream_names = tuple(getattr(model.config, "stream_names", ()))
        self.hook = model.register_forward_hook(self._after_forward, with_kwargs=True)

    def on_train_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()
        self.tokens = 0
        self._reset_training()
        self.train_step = state.global_step

    @torch.no_grad()
    def _after_forward(self, model, args, kwargs, output):
        labels = kwargs.get("labels")
        if labels is None:
            return
        if model.training:
            mask = kwargs.get("attention_mask")
            self.tokens += mask.sum() if mask is not None else labels.shape[0] * labels.shape[1]
        losses = self._parts(output)
        if model.training:
            # the micro-batches of a step add up, because all are divided by the number of targets of the step
            for name, loss in losses.items():
                self.train_sums[name] = self.train_sums.get(name, 0.0) + loss
            return
        items = kwargs.get("num_items_in_batch")
        num_streams = labels.shape[-1]
        for index, (name, loss) in enumerate(losses.items()):
            # parts that are no stream have as many targets as a stream
            targets = (labels[..., min(index, num_streams - 1)] != -100).sum()
            divisor = targets if items is None else items / num_streams
            self.eval_sums[name] = self.eval_sums.get(name, 0.0) + loss * divisor
            self.eval_targets[name] = self.eval_targets.get(name, 0) + targets

    def _parts(self, output) -> dict[str, torch.Tensor]:
        """The losses of the streams, then the other parts of the loss, by name."""
        if not hasattr(output, "get") or output.get("stream_losses") is None:
            return {}
        parts = {self._name(stream): loss for stream, loss in enumerate(output["stream_losses"])}
        others = {name.removesuffix("_loss"): loss for name, loss in output.items() if name.endswith("_loss")}
        return {name: loss.detach().float() for name, loss in {**parts, **others}.items()}

    def _name(self, stream: int) -> str:
        return self.stream_names[stream] if stream < len(self.stream_names) else str(stream)

    def _stream_keys(self) -> set[str]:
        return {*self.stream_names, *(name for name in self.eval_sums if name.isdigit())}

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs is None:
            return
        extra = {}
        if "loss" in logs and self.train_sums:
            steps = max(state.global_step - self.train_step, 1)
            sums = _sum_over_ranks(self.train_sums.values())
            extra = {f"loss_{name}": total / steps for name, total in zip(self.train_sums, sums, strict=True)}
            self._reset_training()
            self.train_step = state.global_step
        elif "train_runtime" in logs:
            (tokens,) = _sum_over_ranks([self.tokens])
            elapsed = time.perf_counter() - self.started
            extra = {"train_tokens_per_second": round(tokens / max(elapsed, 1e-9), 1)}
        elif "eval_loss" in logs:
            if self.eval_sums:
                sums = _sum_over_ranks(self.eval_sums.values())
                targets = _sum_over_ranks(self.eval_targets.values())
                means = dict(zip(self.eval_sums, (s / max(n, 1) for s, n in zip(sums, targets)), strict=True))
                extra = {f"eval_loss_{name}": mean for name, mean in means.items()}
                of_streams = {name: mean for name, mean in means.items() if name in self._stream_keys()}
                extra.update({f"eval_perplexity_{name}": _exp(mean) for name, mean in of_streams.items()})
                extra["eval_perplexity"] = _exp(sum(of_streams.values()))
                self._reset_validation()
            else:
                extra["eval_perplexity"] = _exp(logs["eval_loss"])
        # the same dict becomes the metrics that `train` and `evaluate` return
        logs.update(extra)
        if extra and state.log_history:
            state.log_history[-1].update(extra)


class EMACallback(TrainerCallback):
    """
    Keeps an exponential moving average of the weights, a = decay a + (1 - decay) w after every step.

    The averaged model is written to the folder `ema` of every checkpoint and, at the end, of the output folder: a whole
    model in safetensors, that `from_pretrained(folder, subfolder="ema")` loads. Training goes on with the weights
    themselves. Averages are kept and written in float32. Not for sharded parameters (FSDP, ZeRO 3).

    Args:
        decay (`float`): 0.999 as published for OmniLearned and the EPiC flow.
        resume_from (`str`): checkpoint that a resumed run starts from; its averages go on.

    Raises:
        ValueError: the decay is not from 0 to 1, or the checkpoint has no averages that fit.
    """

    def __init__(self, decay: float = 0.999, resume_from: str | Path | None = None):
        if not 0 <= decay < 1:
            raise ValueError(f"decay of the averaged weights is {decay}, expected 0 <= decay < 1")
        self.decay = decay
        self.resume_from = resume_from
        self.averages: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def on_train_begin(self, args, state, control, model=None, **kwargs):
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.averages = {name: p.detach().float().clone() for name, p in trained.items()}
        if self.resume_from is None:
            return
        from safetensors.torch import load_file

        path = Path(self.resume_from) / EMA_FOLDER / "model.safetensors"
        if not path.is_file():
            raise ValueError(f"{path} is missing: the run that is resumed kept no averaged weights")
        stored = load_file(path)
        for name, average in self.averages.items():
            if name not in stored or stored[name].shape != average.shape:
                raise ValueError(f"{path}: no weights {name} of shape {tuple(average.shape)}")
            average.copy_(stored[name])

    @torch.no_grad()
    def on_step_end(self, args, state, control, model=None, **kwargs):
        names = list(self.averages)
        parameters = dict(model.named_parameters())
        weights = [parameters[name].detach().float() for name in names]
        torch._foreach_lerp_([self.averages[name] for name in names], weights, 1 - self.decay)

    def on_save(self, args, state, control, model=None, processing_class=None, **kwargs):
        if state.is_world_process_zero:
            self.save(model, Path(args.output_dir) / f"checkpoint-{state.global_step}", processing_class)

    def on_train_end(self, args, state, control, model=None, processing_class=None, **kwargs):
        if state.is_world_process_zero:
            self.save(model, Path(args.output_dir), processing_class)

    def save(self, model: Any, folder: Path, processing_class: Any = None) -> Path:
        """The averaged model, with what prepares its inputs, in the folder `ema` of `folder`."""
        model = getattr(model, "module", model)
        target = folder / EMA_FOLDER
        model.save_pretrained(target, state_dict={**model.state_dict(), **self.averages})
        if processing_class is not None:
            processing_class.save_pretrained(target)
        return target


class LossParts(TrainerCallback):
    """
    Adds the parts of the loss to the logs of `Trainer`: a model returns them as `<part>_loss`; they are logged as
    `loss_<part>` in training and `eval_loss_<part>` in validation, means over the batches that have the part.
    """

    def __init__(self):
        self.parts: dict[bool, dict[str, list]] = {True: {}, False: {}}

    def on_init_end(self, args, state, control, model=None, **kwargs):
        model.register_forward_hook(self._after_forward)

    @torch.no_grad()
    def _after_forward(self, model, args, output):
        if not hasattr(output, "items"):
            return
        sums = self.parts[model.training]
        for name, loss in output.items():
            if name.endswith("_loss") and loss is not None:
                total = sums.setdefault(name.removesuffix("_loss"), [0.0, 0])
                total[0] = total[0] + loss.detach().float()
                total[1] += 1

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs is None or not {"loss", "eval_loss"} & set(logs):
            return
        is_training = "loss" in logs
        sums = self.parts[is_training]
        totals = _sum_over_ranks([value for pair in sums.values() for value in pair]) if sums else []
        prefix = "loss_" if is_training else "eval_loss_"
        extra = {f"{prefix}{name}": totals[2 * k] / totals[2 * k + 1] for k, name in enumerate(sums)}
        self.parts[is_training] = {}
        # the same dict becomes the metrics that `evaluate` returns
        logs.update(extra)
        if state.log_history:
            state.log_history[-1].update(extra)


class SetCollatorEpoch(TrainerCallback):
    """Tells a collator with a method `set_epoch` which pass over the data begins."""

    def __init__(self, collator: Any):
        self.collator = collator

    def on_epoch_begin(self, args, state, control, **kwargs):
        # whole at the beginning of a pass; the fraction of a resumed one is cut
        self.collator.set_epoch(int(state.epoch or 0))


def _sum_over_ranks(values: Iterable[Any]) -> list[float]:
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
