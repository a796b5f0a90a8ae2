"""
Pre-train FM4NPP (arXiv:2508.14087) on TPC events: for every point, where its nearest neighbours of larger radius are.

Events are rows of E [ADC counts], x, y, z [cm]; no labels are needed. The output folder holds model and feature
extractor; `run_tracking.py` and `run_token_classification.py` start from it.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForPreTraining, TrainerCallback, TrainingArguments, set_seed
from transformers.utils import logging

import hepzoo  # noqa: F401 - registers the families
from hepzoo.training.common import (
    ModelArguments,
    PhysicsTrainer,
    describe_data,
    find_last_checkpoint,
    finish,
    load_model,
    make_parser,
    optimizer_arguments,
    parse_arguments,
    prepare_run,
    run_script,
)
from hepzoo.training.data import DataTrainingArguments, InputError, load_raw_datasets
from hepzoo.training.tpc_data import (
    POINT_COLUMNS,
    SHORTEST_WINDOW,
    TpcArguments,
    TpcCollator,
    load_feature_extractor,
    load_tpc_config,
    prepare_events,
)

logger = logging.get_logger("hepzoo.training.run_npp_pretraining")

EXAMPLES = """
examples:
  the published settings for the smallest model of the paper
    accelerate launch training/run_npp_pretraining.py training/configs/fm4npp.yaml --paper_size m1 \\
        --train_file data/tpc/unlabeled --validation_file data/tpc/validation --output_dir runs/npp

  a small one on the CPU, no CUDA package needed; bin edges from 500 of the events
    accelerate launch training/run_npp_pretraining.py training/configs/fm4npp_small.yaml \\
        --train_file data/tpc/unlabeled --validation_file data/tpc/validation --bin_edges_events 500 \\
        --output_dir runs/npp

  from a stream of Parquet shards
    accelerate launch training/run_npp_pretraining.py training/configs/fm4npp.yaml --streaming --max_steps 50000 \\
        --train_file "data/tpc/unlabeled/*.parquet" --feature_extractor_overrides bin_edges=edges.json \\
        --output_dir runs/npp

  windows of 512 points (published as chunk_training)
    accelerate launch training/run_npp_pretraining.py training/configs/fm4npp.yaml --paper_size m1 --window 512 \\
        --train_file data/tpc/unlabeled --feature_extractor_name extractor --output_dir runs/npp

  continue an interrupted run: the same command again
"""


@dataclass
class PretrainingArguments:
    """Sequences, and how the output layer starts."""

    window: int | None = field(
        default=None,
        metadata={
            "help": "Train on windows of at most so many points, one per event and pass; validation takes all windows "
            "of an event. Default: whole events."
        },
    )
    fit_output_events: int | None = field(
        default=None,
        metadata={
            "help": "From scratch: start the output layer at the least-squares prediction from what the new backbone "
            "makes of so many training events (64 are enough), instead of at random."
        },
    )


@torch.no_grad()
def fit_output_layer(
    model: Any, collator: TpcCollator, events: list[dict[str, Any]], batch_size: int = 8, ridge: float = 1e-6
) -> None:
    """
    Sets the output layer of `Fm4nppForPreTraining` to the least-squares prediction from the hidden states of `events`.

    The encoded positions, sines of ten octaves, are so nearly degenerate (the condition number of their covariance is
    above 1e14) that gradient descent needs thousands of steps for what one linear system gives.

    Args:
        ridge: added to the squares of the hidden states, whose mean is near 1.
    """
    size, shift = model.config.hidden_size + 1, model.config.label_shift
    squares = torch.zeros(size, size, dtype=torch.float64)
    products = torch.zeros(size, 3 * model.config.num_neighbors, dtype=torch.float64)
    was_training = model.training
    model.eval()
    for start in range(0, len(events), batch_size):
        batch = collator(events[start : start + batch_size])
        inputs = {name: batch[name].to(model.device) for name in ("points", "attention_mask")}
        hidden_states = model.model(**inputs, use_cache=False).last_hidden_state.double().cpu()
        labels = batch["neighbor_labels"][:, shift:].double()
        # points with all of their neighbours
        is_full = (labels != -100).all(dim=-1)
        states = hidden_states[:, : labels.shape[1]][is_full]
        states = torch.cat([states, torch.ones(len(states), 1, dtype=torch.float64)], dim=1)
        squares += states.T @ states
        products += states.T @ labels[is_full]
    model.train(was_training)
    # the last of the squares counts the points
    count = squares[-1, -1]
    if count == 0:
        raise InputError(f"--fit_output_events: no point has {model.config.num_neighbors} neighbours")
    solution = torch.linalg.solve(squares / count + ridge * torch.eye(size, dtype=torch.float64), products / count)
    head = model.neighbor_head
    head.weight.copy_(solution[:-1].T)
    head.bias.copy_(solution[-1])


class NeighborMonitor(TrainerCallback):
    """
    Adds to the validation logs of `Trainer`: squared errors per number over the whole set, in normalised coordinates.

    Logged are `eval_mse` (`eval_loss` is a mean of the means of batches), `eval_mse_nearest` of the nearest neighbour
    only, and what can be had without a model: `eval_mse_copy`, all neighbours where the point is, and
    `eval_mse_constant`, all where they are on average.
    """

    def __init__(self):
        self.sums: torch.Tensor | None = None

    def on_init_end(self, args, state, control, model=None, **kwargs):
        model.register_forward_hook(self._after_forward, with_kwargs=True)

    @torch.no_grad()
    def _after_forward(self, model, args, kwargs, output):
        labels = kwargs.get("neighbor_labels")
        if labels is None or model.training:
            return
        # with a shift a point predicts the neighbours of a later one
        shift = model.config.label_shift
        length = labels.shape[1] - shift
        targets = labels[:, shift:].unflatten(-1, (-1, 3)).double()
        predictions = output.predictions[:, :length].unflatten(-1, (-1, 3)).double()
        own = kwargs["points"][:, shift:, None, 1:].double()
        is_target = (targets != -100).double()
        errors = (predictions - targets).square() * is_target
        sums = [
            is_target.sum(),
            errors.sum(),
            ((own - targets).square() * is_target).sum(),
            is_target[..., 0, :].sum(),
            errors[..., 0, :].sum(),
            *(targets * is_target).sum(dim=(0, 1, 2)),
            *(targets.square() * is_target).sum(dim=(0, 1, 2)),
        ]
        sums = torch.stack(sums)
        self.sums = sums if self.sums is None else self.sums + sums

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs is None or "eval_loss" not in logs or self.sums is None:
            return
        total = self.sums
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(total)
        count, errors, copied, count_nearest, nearest, *moments = total.tolist()
        per_axis = count / 3
        spread = sum(square / per_axis - (mean / per_axis) ** 2 for mean, square in zip(moments[:3], moments[3:]))
        extra = {
            "eval_mse": errors / count,
            "eval_mse_nearest": nearest / count_nearest,
            "eval_mse_copy": copied / count,
            "eval_mse_constant": spread / 3,
        }
        self.sums = None
        # the same dict becomes the metrics that `evaluate` returns
        logs.update(extra)
        if state.log_history:
            state.log_history[-1].update(extra)


def build_parser() -> transformers.HfArgumentParser:
    return make_parser(
        (ModelArguments, TpcArguments, PretrainingArguments, DataTrainingArguments, TrainingArguments),
        description="Pre-train FM4NPP on TPC events. Options are flags or come from a JSON or YAML file given as the "
        "first argument, which flags override.",
        epilog=EXAMPLES,
    )


def main(argv: list[str] | None = None) -> int:
    """Trains and evaluates; returns the exit status."""
    model_args, tpc_args, pretraining_args, data_args, training_args = parse_arguments(build_parser(), argv)
    for name, least in (("window", SHORTEST_WINDOW), ("fit_output_events", 1)):
        value = getattr(pretraining_args, name)
        if value is not None and value < least:
            raise InputError(f"--{name}: is {value}, expected at least {least}")
    if pretraining_args.fit_output_events is not None and model_args.model_name_or_path is not None:
        raise InputError("--fit_output_events: the output layer of --model_name_or_path is trained already")
    training_args.label_names = ["neighbor_labels"]
    training_args.length_column_name = "num_points"
    # batches are made from whole events
    training_args.remove_unused_columns = False
    prepare_run(training_args)
    set_seed(training_args.seed)
    checkpoint = find_last_checkpoint(training_args) if training_args.do_train else None

    config = load_tpc_config(model_args, tpc_args)
    raw = load_raw_datasets(data_args, training_args, model_args, columns=POINT_COLUMNS, repeat=False)
    extractor = load_feature_extractor(model_args, tpc_args, config, raw.train)
    prepare_events(raw, "neighbors", extractor, data_args, training_args, tpc_args.drop_long_events)
    model = load_model(AutoModelForPreTraining, model_args, config)
    logger.info(
        f"{type(model).__name__}: {model.num_parameters():,} parameters, "
        f"{model.num_parameters(only_trainable=True):,} of them trained"
    )

    window = pretraining_args.window
    if pretraining_args.fit_output_events is not None and training_args.do_train:
        events = list(raw.train.take(pretraining_args.fit_output_events))
        fit_output_layer(model, TpcCollator(extractor, "neighbors", "training data"), events)
        logger.info(f"output layer from {len(events)} training events")

    trainer = PhysicsTrainer(
        model=model,
        args=training_args,
        train_dataset=raw.train,
        eval_dataset=raw.validation,
        processing_class=extractor,
        data_collator=TpcCollator(extractor, "neighbors", "training data", data_args.pad_to_multiple_of, window),
        callbacks=[NeighborMonitor()],
        optimizer_cls_and_kwargs=optimizer_arguments(model_args, training_args),
    )
    trainer.evaluation_collator = TpcCollator(
        extractor, "neighbors", "validation data", window=window, all_windows=True
    )
    trainer.card = {
        "script": "run_npp_pretraining.py",
        "auto_class": "AutoModelForPreTraining",
        "processor_class": "AutoFeatureExtractor",
        "data": describe_data(data_args),
        "datasets": data_args.dataset_name,
    }

    if training_args.do_train:
        metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
        trainer.save_model()
        if not data_args.streaming:
            metrics["train_samples"] = trainer.card["train_samples"] = len(raw.train)
            metrics["train_points"] = int(np.sum(raw.train["num_points"]))
        trainer.log_metrics("train", metrics)
        trainer.save_metrics("train", metrics)
        trainer.save_state()
    if training_args.do_eval:
        metrics = trainer.evaluate()
        metrics["eval_samples"] = len(raw.validation)
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
        trainer.card["metrics"] = metrics
    finish(trainer, training_args)
    return 0


if __name__ == "__main__":
    run_script(main, "run_npp_pretraining.py")
