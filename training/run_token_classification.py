"""
Train a classifier of single hits or points, from scratch or from a pre-trained model.

By default a filter of dark noise among Cherenkov photons. Records with a list `is_noise` bring their labels. Others get
dark noise, drawn anew in every pass over the training data and once for validation and test (arXiv:2505.08736).

With `--target pid` or `--target noise`, the particles or the noise of the points of TPC events (arXiv:2508.14087).
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForTokenClassification, EvalPrediction, TrainingArguments, set_seed
from transformers.utils import logging

import hepzoo  # noqa: F401 - registers the families
from hepzoo.training.callbacks import SetCollatorEpoch
from hepzoo.training.common import (
    ModelArguments,
    PhysicsTrainer,
    binary_scores,
    describe_data,
    find_last_checkpoint,
    finish,
    load_config_and_tokenizer,
    load_model,
    make_parser,
    optimizer_arguments,
    parse_arguments,
    prepare_run,
    run_script,
    train_and_evaluate,
    write_parquet,
)
from hepzoo.training.data import (
    DarkNoise,
    DarkNoiseCollator,
    DataTrainingArguments,
    InputError,
    load_raw_datasets,
    parse_assignments,
)
from hepzoo.training.tpc_data import TpcArguments
from hepzoo.training.tpc_heads import CacheArguments, train_point_head

logger = logging.get_logger("hepzoo.training.run_token_classification")

EXAMPLES = """
examples:
  from scratch, noise as in the publication (8 to 10 % of the hits)
    accelerate launch training/run_token_classification.py --model_type cmhca_dirc \\
        --train_file data/train --do_train --validation_file data/validation --do_eval \\
        --optimizer radam --learning_rate 1e-3 --per_device_train_batch_size 512 --max_grad_norm 0 \\
        --output_dir runs/filter

  fine-tune a generator, and write the records with one logit per hit to runs/filter/predictions.parquet
    accelerate launch training/run_token_classification.py --model_name_or_path runs/dirc \\
        --train_file data/train --do_train --test_file data/test --do_predict --output_dir runs/filter

  particles of the points of TPC events, with a frozen pre-trained backbone
    accelerate launch training/run_token_classification.py training/configs/fm4npp_points_small.yaml --target pid \\
        --model_name_or_path runs/npp --freeze_backbone --cache_block_outputs 4 \\
        --train_file data/tpc/train --validation_file data/tpc/validation --output_dir runs/pid
"""


@dataclass
class TargetArguments:
    """What to learn of TPC events."""

    target: str | None = field(
        default=None,
        metadata={
            "help": "TPC events: what to learn of their points, the particle or whether it is noise. Default: a filter "
            "of DIRC hits.",
            "choices": ["pid", "noise"],
        },
    )


@dataclass
class NoiseArguments:
    """The noise, and how the filter is trained."""

    noise_scale: float | None = field(
        default=None,
        metadata={
            "help": "Factor on the dark rate of 28 kHz per PMT. Default: 100, or no added noise if the records have "
            "is_noise."
        },
    )
    noise_window: list[float] = field(
        default_factory=lambda: [0.0, 100.0], metadata={"help": "Time window of the noise, ns."}
    )
    freeze_backbone: bool = field(
        default=False, metadata={"help": "Train only what the generator does not have: the head."}
    )


def build_parser() -> transformers.HfArgumentParser:
    return make_parser(
        (
            ModelArguments,
            DataTrainingArguments,
            NoiseArguments,
            TargetArguments,
            TpcArguments,
            CacheArguments,
            TrainingArguments,
        ),
        description="Train a classifier of hits or points. Options are flags or come from a JSON or YAML file given as "
        "the first argument, which flags override.",
        epilog=EXAMPLES,
    )


def filter_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """
    Over all hits: area under the ROC curve, average precision, and at probability 0.5 precision, recall (= noise
    rejection) and the share of photons that are kept.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    labels = np.asarray(prediction.label_ids)
    is_hit = labels != -100
    scores, labels = binary_scores(np.asarray(prediction.predictions))[is_hit], labels[is_hit]
    called = scores > 0
    metrics = {"accuracy": float(np.mean(called == labels)), "noise_fraction": float(labels.mean())}
    if len(np.unique(labels)) < 2:
        logger.warning("all hits are of one kind: no area under the curve")
        return metrics
    true_noise = float(np.sum(called & (labels == 1)))
    metrics["auc"] = float(roc_auc_score(labels, scores))
    metrics["average_precision"] = float(average_precision_score(labels, scores))
    metrics["precision"] = true_noise / max(float(called.sum()), 1.0)
    metrics["recall"] = true_noise / float(labels.sum())
    metrics["signal_retention"] = float(np.mean(~called[labels == 0]))
    return metrics


def make_noise(noise_args: NoiseArguments, tokenizer: Any, dataset: Any, seed: int) -> DarkNoise | None:
    """The noise to add to `dataset`; `None` if its records are labelled already and no noise was asked for."""
    if len(noise_args.noise_window) != 2:
        raise InputError(f"--noise_window: expected 2 times, got {len(noise_args.noise_window)}")
    scale = noise_args.noise_scale
    if scale is None:
        if "is_noise" in (dataset.column_names or next(iter(dataset))):
            return None
        scale = 100.0
    if not hasattr(tokenizer, "detector"):
        raise InputError(f"{type(tokenizer).__name__} has no detector to draw noise for: the records need is_noise")
    return DarkNoise(tokenizer, scale, tuple(noise_args.noise_window), seed)


def number_rows(dataset: Any) -> Any:
    """Adds the column `row` to a dataset or a stream; leaves out what the noise computes itself."""
    unneeded = [name for name in ("x", "y", "channel") if name in (dataset.column_names or next(iter(dataset)))]
    dataset = dataset.remove_columns(unneeded)
    if not isinstance(dataset, torch.utils.data.IterableDataset):
        return dataset.add_column("row", np.arange(len(dataset)))
    return dataset.map(lambda record, index: {"row": index}, with_indices=True)


def with_fixed_noise(dataset: Any, noise: DarkNoise | None, stage: int, training_args: TrainingArguments) -> Any:
    """Records with the noise of validation (`stage` 1) or test (2), independent of batch size and ranks."""
    if noise is None:
        return dataset
    with training_args.main_process_first(desc="adding noise"):
        try:
            # passes over the training data count from 0 upwards in another seed sequence (three numbers)
            return dataset.map(
                lambda columns, indices: noise(columns, 2**31 + stage, indices[0]),
                batched=True,
                batch_size=1000,
                with_indices=True,
                desc="Adding noise",
            )
        except ValueError as error:
            raise InputError(f"{('training', 'validation', 'test')[stage]} data: {error}") from error


def logits_per_record(records: Any, logits: np.ndarray, labels: np.ndarray) -> list[np.ndarray]:
    """
    Scores (tracks, length), in the time order of the tokenizer, to one list per record in its own order of hits; NaN
    at hits beyond the model's length.
    """
    result = []
    for times, track_logits, track_labels in zip(records["leadTime"], logits, labels, strict=True):
        order = np.argsort(np.asarray(times, dtype=np.float64), kind="stable")
        scores = track_logits[track_labels != -100]
        column = np.full(len(times), np.nan, dtype=np.float32)
        column[order[: len(scores)]] = scores
        result.append(column)
    return result


def main(argv: list[str] | None = None) -> int:
    """Trains, evaluates, predicts; returns the exit status."""
    model_args, data_args, noise_args, target_args, tpc_args, cache_args, training_args = parse_arguments(
        build_parser(), argv
    )
    if target_args.target is not None:
        return train_point_head(
            target_args.target,
            noise_args.freeze_backbone,
            model_args,
            tpc_args,
            cache_args,
            data_args,
            training_args,
        )
    for arguments, default in ((tpc_args, TpcArguments()), (cache_args, CacheArguments())):
        if arguments != default:
            name = next(n for n, value in vars(arguments).items() if value != getattr(default, n))
            raise InputError(f"--{name}: only with --target, for TPC events")
    prepare_run(training_args)
    # batches are made from whole records
    training_args.remove_unused_columns = False
    set_seed(training_args.seed)
    checkpoint = find_last_checkpoint(training_args) if training_args.do_train else None

    config, tokenizer = load_config_and_tokenizer(model_args)
    raw = load_raw_datasets(data_args, training_args, model_args)
    tokenizer_kwargs = {"truncation": True, **parse_assignments(data_args.tokenizer_kwargs, "tokenizer_kwargs")}
    if tokenizer_kwargs.get("on_invalid", "error") != "error":
        raise InputError("--tokenizer_kwargs on_invalid: every hit has a label, nothing can be dropped")

    def collator(noise: DarkNoise | None, name: str) -> DarkNoiseCollator:
        return DarkNoiseCollator(
            tokenizer,
            noise,
            tokenizer_kwargs,
            data_args.pad_to_multiple_of,
            data_args.pad_to_max_length,
            rank=training_args.process_index,
            name=name,
        )

    first = next(dataset for dataset in (raw.train, raw.validation, raw.test) if dataset is not None)
    noise = make_noise(noise_args, tokenizer, first, training_args.seed)
    fixed = {
        stage: with_fixed_noise(dataset, noise, stage, training_args)
        for stage, dataset in ((1, raw.validation), (2, raw.test))
        if dataset is not None
    }
    model = load_model(AutoModelForTokenClassification, model_args, config, noise_args.freeze_backbone)
    logger.info(f"{type(model).__name__}: {model.num_parameters():,} parameters")

    training_collator = collator(noise, "training data")
    trainer = PhysicsTrainer(
        model=model,
        args=training_args,
        train_dataset=number_rows(raw.train) if raw.train is not None else None,
        eval_dataset=number_rows(fixed[1]) if 1 in fixed else None,
        processing_class=tokenizer,
        data_collator=training_collator,
        compute_metrics=filter_metrics,
        callbacks=[SetCollatorEpoch(training_collator)],
        optimizer_cls_and_kwargs=optimizer_arguments(model_args, training_args),
    )
    trainer.evaluation_collator = collator(None, "validation or test data")
    trainer.card = {
        "script": "run_token_classification.py",
        "auto_class": "AutoModelForTokenClassification",
        "data": describe_data(data_args),
        "datasets": data_args.dataset_name,
    }

    train_and_evaluate(trainer, checkpoint)
    if training_args.do_predict:
        records = fixed[2]
        output = trainer.predict(number_rows(records))
        trainer.log_metrics("test", output.metrics)
        trainer.save_metrics("test", output.metrics)
        if trainer.is_world_process_zero():
            scores = logits_per_record(records, binary_scores(output.predictions), output.label_ids)
            columns = {name: records[name] for name in records.column_names}
            path = write_parquet(
                {**columns, "noise_logit": scores}, Path(training_args.output_dir, "predictions.parquet")
            )
            logger.info(f"{len(scores)} records with a logit per hit in {path}")
    finish(trainer, training_args)
    return 0


if __name__ == "__main__":
    run_script(main, "run_token_classification.py")
