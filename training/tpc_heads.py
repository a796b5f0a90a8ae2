"""Training of heads on the block outputs of a backbone for TPC events, which is frozen or trained with the head."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import TrainingArguments, set_seed
from transformers.utils import logging

from hepzoo.training.common import (
    ModelArguments,
    PhysicsTrainer,
    describe_data,
    find_last_checkpoint,
    finish,
    load_model,
    optimizer_arguments,
    prepare_run,
    train_and_evaluate,
)
from hepzoo.training.data import DataTrainingArguments, InputError, load_raw_datasets, parse_assignments
from hepzoo.training.tpc_data import (
    TARGETS,
    TpcArguments,
    TpcCollator,
    load_feature_extractor,
    load_tpc_config,
    prepare_events,
)

logger = logging.get_logger(__name__)


@dataclass
class CacheArguments:
    """Whether the outputs of a frozen backbone are kept."""

    cache_block_outputs: float | None = field(
        default=None,
        metadata={
            "help": "Keep block outputs of the frozen backbone in memory, up to so many GB (float32; for an event of "
            "850 points m1 needs 2.6 MB, m3 10 MB): from the second pass on, kept events need the head only."
        },
    )


class BlockOutputCache:
    """
    Collator that adds the `block_outputs` of a frozen backbone, computed once per event and kept in memory.

    Args:
        collator (`TpcCollator`): makes the batches.
        model: head model with the frozen backbone in `model.model`.
        gigabytes: most memory to use; events beyond are computed every time.
    """

    def __init__(self, collator: TpcCollator, model: torch.nn.Module, gigabytes: float):
        self.collator = collator
        self.model = model
        self.bytes_left = gigabytes * 1e9
        self.kept: dict[int, torch.Tensor] = {}

    @torch.no_grad()
    def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = self.collator(features)
        rows = [int(feature["row"]) for feature in features]
        new = [index for index, row in enumerate(rows) if row not in self.kept]
        found = {row: self.kept[row] for row in rows if row in self.kept}
        if new:
            mask = batch["attention_mask"][new]
            length = int(mask.sum(dim=1).max())
            device = self.model.device
            outputs = self.model.model(
                batch["points"][new, :length].to(device), attention_mask=mask[:, :length].to(device), use_cache=False
            ).block_outputs
            stacked = torch.stack(outputs, dim=1).cpu()
            for index, output in zip(new, stacked, strict=True):
                output = output[:, : int(batch["attention_mask"][index].sum())].clone()
                found[rows[index]] = output
                if self.bytes_left >= output.nbytes:
                    self.bytes_left -= output.nbytes
                    self.kept[rows[index]] = output
        first = found[rows[0]]
        batch["block_outputs"] = first.new_zeros(
            (len(first), *batch["attention_mask"].shape, first.shape[-1]), dtype=self.model.dtype
        )
        for index, row in enumerate(rows):
            batch["block_outputs"][:, index, : found[row].shape[1]] = found[row]
        return batch


def train_head(
    auto_class: Any,
    target: str,
    script: str,
    freeze_backbone: bool,
    model_args: ModelArguments,
    tpc_args: TpcArguments,
    cache_args: CacheArguments,
    data_args: DataTrainingArguments,
    training_args: TrainingArguments,
    compute_metrics: Callable,
    reduce_logits: Callable[[Any, Any], Callable],
    **changes: Any,
) -> int:
    """
    What the scripts for heads do: train, evaluate, save.

    Args:
        auto_class: of the model.
        target: of `hepzoo.training.tpc_data.TARGETS`.
        freeze_backbone: train the head only.
        compute_metrics: of `Trainer`.
        reduce_logits: takes the model, returns `preprocess_logits_for_metrics` of `Trainer`.
        changes: configuration values.

    Returns:
        the exit status.
    """
    if training_args.do_predict:
        raise InputError("--do_predict: training/find_tracks.py writes predictions")
    if cache_args.cache_block_outputs is not None:
        if not freeze_backbone:
            raise InputError("--cache_block_outputs: a backbone that is trained has no outputs to keep")
        if data_args.streaming or training_args.dataloader_num_workers:
            raise InputError("--cache_block_outputs: not with --streaming or --dataloader_num_workers")
    training_args.length_column_name = "num_points"
    # batches are made from whole events
    training_args.remove_unused_columns = False
    prepare_run(training_args)
    set_seed(training_args.seed)
    checkpoint = find_last_checkpoint(training_args) if training_args.do_train else None

    overrides = parse_assignments(model_args.config_overrides, "config_overrides")
    model_args.config_overrides = {**overrides, **changes, "freeze_backbone": freeze_backbone}
    config = load_tpc_config(model_args, tpc_args)
    target = "joint" if target == "tracks" and config.joint_head else target
    training_args.label_names = [argument for _, _, argument in TARGETS[target]]
    raw = load_raw_datasets(data_args, training_args, model_args, repeat=False)
    extractor = load_feature_extractor(model_args, tpc_args, config, raw.train)
    prepare_events(raw, target, extractor, data_args, training_args, tpc_args.drop_long_events)
    model = load_model(auto_class, model_args, config)
    if freeze_backbone and model_args.model_name_or_path is None:
        logger.warning("the frozen backbone has random weights, set --model_name_or_path for a pre-trained one")
    logger.info(
        f"{type(model).__name__}: {model.num_parameters():,} parameters, "
        f"{model.num_parameters(only_trainable=True):,} of them trained"
    )

    def collator(name: str) -> Callable:
        plain = TpcCollator(extractor, target, name, data_args.pad_to_multiple_of)
        if cache_args.cache_block_outputs is None:
            return plain
        return BlockOutputCache(plain, model, cache_args.cache_block_outputs)

    trainer = PhysicsTrainer(
        model=model,
        args=training_args,
        train_dataset=raw.train,
        eval_dataset=raw.validation,
        processing_class=extractor,
        data_collator=collator("training data"),
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=reduce_logits(model),
        optimizer_cls_and_kwargs=optimizer_arguments(model_args, training_args),
    )
    trainer.evaluation_collator = collator("validation data")
    trainer.card = {
        "script": script,
        "auto_class": auto_class.__name__,
        "processor_class": "AutoFeatureExtractor",
        "data": describe_data(data_args),
        "datasets": data_args.dataset_name,
    }

    train_and_evaluate(trainer, checkpoint)
    finish(trainer, training_args)
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# Classes of points
# ---------------------------------------------------------------------------------------------------------------------


def point_metrics(prediction: Any) -> dict[str, float]:
    """Accuracy and macro precision and recall of classes (events, length), over all points with a label."""
    from hepzoo.evaluation.tracking import confusion_matrix, point_classification

    labels, predictions = np.asarray(prediction.label_ids), np.asarray(prediction.predictions)
    is_point = labels != -100
    if not is_point.any():
        raise ValueError("validation: no point of any event has a label, expected some")
    labels, predictions = labels[is_point], predictions[is_point]
    found = point_classification(confusion_matrix(labels, predictions, int(max(labels.max(), predictions.max())) + 1))
    recalls = {f"recall_{row['class']}": row["recall"] for row in found.pop("classes")}
    return {**found, **recalls}


def train_point_head(
    target: str,
    freeze_backbone: bool,
    model_args: ModelArguments,
    tpc_args: TpcArguments,
    cache_args: CacheArguments,
    data_args: DataTrainingArguments,
    training_args: TrainingArguments,
) -> int:
    """Trains particle identification (`target` "pid") or noise tagging ("noise") of points; returns the exit status."""
    from transformers import AutoModelForTokenClassification

    from hepzoo.evaluation.tracking import NOISE_NAMES, PID_NAMES

    names = {"pid": PID_NAMES, "noise": NOISE_NAMES}[target]
    return train_head(
        AutoModelForTokenClassification,
        target,
        "run_token_classification.py",
        freeze_backbone,
        model_args,
        tpc_args,
        cache_args,
        data_args,
        training_args,
        point_metrics,
        lambda model: lambda logits, labels: logits.argmax(dim=-1),
        id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
    )
