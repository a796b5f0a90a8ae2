"""Classifiers of jets that read sets of particles (OmniLearned), from scratch or from a pre-trained model."""

from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoConfig, TrainingArguments, set_seed
from transformers.utils import logging

from hepzoo.training.common import (
    ModelArguments,
    binary_scores,
    find_last_checkpoint,
    finish,
    prepare_run,
    train_and_evaluate,
    write_parquet,
)
from hepzoo.training.data import DataTrainingArguments, InputError, load_raw_datasets, scalar_columns
from hepzoo.training.jet_sets import (
    JetCollator,
    JetSetArguments,
    load_set_config,
    load_set_extractor,
    load_set_model,
    make_set_trainer,
    model_settings,
    prepare_jets,
)

logger = logging.get_logger(__name__)


def reads_sets(model_args: ModelArguments) -> bool:
    """Whether the model of the options is of a family of sets; a checkpoint that cannot be read is none."""
    name = model_args.model_name_or_path or model_args.config_name
    if name is None:
        return model_args.model_type == "omnilearned"
    try:
        return AutoConfig.from_pretrained(name, **model_args.hub_kwargs()).model_type == "omnilearned"
    except (ValueError, OSError):
        return False


def train_set_classifier(
    classes: list[str] | None,
    freeze_backbone: bool,
    model_args: ModelArguments,
    set_args: JetSetArguments,
    data_args: DataTrainingArguments,
    training_args: TrainingArguments,
    compute_metrics: Any,
) -> int:
    """
    Trains, evaluates, predicts; returns the exit status.

    As published, the last layer always starts from scratch; layers that the checkpoint does not have learn at
    `--head_lr_factor` times the rate.

    Args:
        classes: label columns, in the order of the outputs; by default those of the extractor.

    Raises:
        InputError: data, model or options do not fit.
    """
    from hepzoo.modeling.modeling_omnilearned import OmniLearnedForSequenceClassification

    if data_args.tokenizer_kwargs is not None:
        raise InputError("--tokenizer_kwargs: this model has a feature extractor, set --feature_extractor_overrides")
    training_args.remove_unused_columns = False
    prepare_run(training_args)
    set_seed(training_args.seed)
    checkpoint = find_last_checkpoint(training_args) if training_args.do_train else None

    config = load_set_config(model_args, set_args, "omnilearned")
    if classes is not None and (len(classes) < 2 or len(set(classes)) < len(classes)):
        raise InputError(f"--classes: expected at least two different classes, got {' '.join(classes)}")
    raw = load_raw_datasets(data_args, training_args, model_args)
    defaults = {} if classes is None else {"label_names": list(classes)}
    extractor = load_set_extractor(model_args, set_args, config, None, **defaults)
    is_classifier = config.architectures == [OmniLearnedForSequenceClassification.__name__]
    known = [config.id2label[number] for number in sorted(config.id2label)]
    config.update({**model_settings(extractor), "use_time": False})
    kept = scalar_columns(raw.test) if raw.test is not None else ()
    columns = {name: raw.test[name] for name in kept}
    prepare_jets(raw, extractor)
    # a classifier that goes on with the same classes, or only predicts, keeps its last layer
    new_layers = () if is_classifier and known == extractor.label_names else ("classifier.out.",)
    model = load_set_model(OmniLearnedForSequenceClassification, model_args, config, new_layers)
    if freeze_backbone:
        if model_args.model_name_or_path is None:
            raise InputError("--freeze_backbone: fresh weights need training, set --model_name_or_path")
        model.model.requires_grad_(False)
    logger.info(
        f"{type(model).__name__}: {model.num_parameters():,} parameters, "
        f"{model.num_parameters(only_trainable=True):,} of them trained"
    )

    trainer = make_set_trainer(
        model,
        extractor,
        raw,
        model_args,
        set_args,
        data_args,
        training_args,
        checkpoint,
        script="run_classification.py",
        auto_class="AutoModelForSequenceClassification",
        compute_metrics=compute_metrics,
    )
    train_and_evaluate(trainer, checkpoint)
    if training_args.do_predict:
        has_labels = any(name in kept for name in extractor.label_names)
        trainer.evaluation_collator = JetCollator(extractor, "test data", return_class_ids=has_labels)
        output = trainer.predict(raw.test)
        trainer.log_metrics("test", output.metrics)
        trainer.save_metrics("test", output.metrics)
        if trainer.is_world_process_zero():
            columns["row_index"] = np.arange(len(raw.test))
            if output.label_ids is not None:
                columns["label"] = output.label_ids
            logits = output.predictions
            columns["logit"] = binary_scores(logits) if logits.shape[1] <= 2 else list(logits)
            path = write_parquet(columns, Path(training_args.output_dir, "predictions.parquet"))
            logger.info(f"{len(logits)} predictions in {path}")
    finish(trainer, training_args)
    return 0
