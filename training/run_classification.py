"""
Train a classifier of whole tracks or jets, for example pions against kaons: from scratch or from a generator.

Labels are the `class_ids` that the tokenizer reads from the PDG codes of tracks, or from the one-hot columns of jets.
From a generator with experts the experts are averaged (arXiv:2505.08736).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from transformers import AutoModelForSequenceClassification, EvalPrediction, TrainingArguments, set_seed
from transformers.utils import logging

import hepzoo  # noqa: F401 - registers the families
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
    DataTrainingArguments,
    Encoder,
    InputError,
    PaddingCollator,
    encode_dataset,
    load_raw_datasets,
    parse_assignments,
    scalar_columns,
)
from hepzoo.training.jet_set_classification import reads_sets, train_set_classifier
from hepzoo.training.jet_sets import JetSetArguments

logger = logging.get_logger("hepzoo.training.run_classification")

EXAMPLES = """
examples:
  from scratch
    accelerate launch training/run_classification.py training/configs/cmhca_dirc_classifier.yaml \\
        --train_file pions.parquet kaons.parquet --output_dir runs/pid

  fine-tune a generator, and write the logits of a test set to runs/pid/predictions.parquet
    accelerate launch training/run_classification.py --model_name_or_path runs/dirc \\
        --train_file train/ --do_train --validation_file validation.parquet --do_eval \\
        --test_file test.parquet --do_predict --learning_rate 1e-3 --optimizer radam --output_dir runs/pid

  train the head only: --freeze_backbone

  tops against QCD jets (class 1 against class 0), from a generator of jets
    accelerate launch training/run_classification.py training/configs/omnijet_classifier.yaml \\
        --model_name_or_path runs/jets --train_file data/train --validation_file data/validation --output_dir runs/top

  the same with OmniLearned, from a pre-trained model (run_pretraining.py)
    accelerate launch training/run_classification.py training/configs/omnilearned_classifier.yaml \\
        --model_name_or_path runs/pretrained --train_file data/train --validation_file data/validation \\
        --output_dir runs/top
"""


@dataclass
class HeadArguments:
    """How the classifier is trained."""

    freeze_backbone: bool = field(
        default=False, metadata={"help": "Train only what the generator does not have: the head and the cls token."}
    )
    classes: list[str] | None = field(
        default=None,
        metadata={
            "help": "Jets: label columns of the classes to tell apart, in the order of the outputs, for example "
            "label_QCD label_Tbqq. Default: those of the checkpoint, else all that the tokenizer knows."
        },
    )


@dataclass
class ClassEncoder(Encoder):
    """
    As `Encoder`, with the classes renumbered.

    Args:
        class_names: of the classes to tell apart, in the order of the outputs; `None` leaves the numbers as they are.
    """

    class_names: list[str] | None = None

    def __post_init__(self):
        if self.class_names is not None:
            # a tokenizer may drop rows: errors name those of the data
            self.tokenizer_kwargs = {**self.tokenizer_kwargs, "return_row_index": True}

    def __call__(self, columns: Mapping, indices: list[int]) -> dict[str, Any]:
        encoded = super().__call__(columns, indices)
        if self.class_names is None or "class_ids" not in encoded:
            return encoded
        rows = encoded["row_index"] if self.keep else [indices[row] for row in encoded.pop("row_index")]
        names = [self.tokenizer.label_names[number] for number in encoded["class_ids"]]
        for row, name in zip(rows, names, strict=True):
            if name not in self.class_names:
                raise InputError(f"{self.name}: row {row}: class {name}, expected one of {', '.join(self.class_names)}")
        encoded["class_ids"] = [self.class_names.index(name) for name in names]
        return encoded


def build_parser() -> transformers.HfArgumentParser:
    return make_parser(
        (ModelArguments, DataTrainingArguments, HeadArguments, JetSetArguments, TrainingArguments),
        description="Train a classifier of tracks or jets. Options are flags or come from a JSON or YAML file given as "
        "the first argument, which flags override.",
        epilog=EXAMPLES,
    )


def choose_classes(wanted: list[str] | None, tokenizer: Any, config: Any) -> list[str] | None:
    """
    Names of the classes of a tokenizer that has several (`label_names`): those `wanted`, else those of the checkpoint,
    else all. `None` for other tokenizers, whose class ids are the labels.

    Raises:
        InputError: a name is unknown or twice, or there is but one.
    """
    known = getattr(tokenizer, "label_names", None)
    if known is None:
        if wanted is not None:
            raise InputError(f"--classes: {type(tokenizer).__name__} has no named classes")
        return None
    if wanted is None:
        stored = [config.id2label[number] for number in sorted(config.id2label)]
        return stored if set(stored) <= set(known) else list(known)
    for name in wanted:
        if name not in known:
            raise InputError(f"--classes: unknown class {name!r}, expected some of {', '.join(known)}")
    if len(wanted) < 2 or len(set(wanted)) < len(wanted):
        raise InputError(f"--classes: expected at least two different classes, got {' '.join(wanted)}")
    return wanted


def rejection_at_efficiency(scores: np.ndarray, labels: np.ndarray, efficiency: float) -> float:
    """
    Share of class 0 that is rejected by the cut which keeps at least `efficiency` of class 1, TN / (TN + FP).

    Args:
        scores: (rows,), larger for class 1. labels: (rows,) 0 or 1.
    """
    signal = np.sort(scores[labels == 1])[::-1]
    cut = signal[int(np.ceil(efficiency * len(signal))) - 1]
    return float(np.mean(scores[labels == 0] < cut))


def classification_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy; for two classes also area under the ROC curve and rejection at 30, 50 and 90 % efficiency."""
    from sklearn.metrics import roc_auc_score

    logits, labels = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
    if logits.shape[1] > 2:
        return {"accuracy": float(np.mean(logits.argmax(axis=1) == labels))}
    scores = binary_scores(logits)
    metrics = {"accuracy": float(np.mean((scores > 0) == labels))}
    if len(np.unique(labels)) < 2:
        logger.warning("all rows are of one class: no area under the curve")
        return metrics
    metrics["auc"] = float(roc_auc_score(labels, scores))
    for percent in (30, 50, 90):
        metrics[f"rejection_at_{percent}"] = rejection_at_efficiency(scores, labels, percent / 100)
    return metrics


def main(argv: list[str] | None = None) -> int:
    """Trains, evaluates, predicts; returns the exit status."""
    model_args, data_args, head_args, set_args, training_args = parse_arguments(build_parser(), argv)
    if reads_sets(model_args):
        return train_set_classifier(
            head_args.classes,
            head_args.freeze_backbone,
            model_args,
            set_args,
            data_args,
            training_args,
            classification_metrics,
        )
    if set_args != JetSetArguments():
        name = next(name for name, value in vars(JetSetArguments()).items() if getattr(set_args, name) != value)
        raise InputError(f"--{name}: only for models of sets of particles (omnilearned)")
    prepare_run(training_args)
    # the collator, not Trainer, decides what is left out
    training_args.remove_unused_columns = False
    set_seed(training_args.seed)
    checkpoint = find_last_checkpoint(training_args) if training_args.do_train else None

    config, tokenizer = load_config_and_tokenizer(model_args)
    raw = load_raw_datasets(data_args, training_args, model_args, repeat=False)
    tokenizer_kwargs = parse_assignments(data_args.tokenizer_kwargs, "tokenizer_kwargs")
    labelled = {**tokenizer_kwargs, "return_class_ids": True}
    class_names = choose_classes(head_args.classes, tokenizer, config)
    encoded = {}
    for name, dataset in (("training data", raw.train), ("validation data", raw.validation)):
        if dataset is not None:
            encoder = ClassEncoder(tokenizer, name, labelled, class_names=class_names)
            encoded[name] = encode_dataset(dataset, encoder, data_args, training_args)
    kept = scalar_columns(raw.test) if raw.test is not None else ()
    if raw.test is not None:
        encoder = ClassEncoder(tokenizer, "test data", tokenizer_kwargs, keep=kept, class_names=class_names)
        encoded["test data"] = encode_dataset(raw.test, encoder, data_args, training_args)
    labels = {}
    if class_names is not None:
        labels["id2label"] = dict(enumerate(class_names))
        labels["label2id"] = {name: number for number, name in enumerate(class_names)}
    model = load_model(AutoModelForSequenceClassification, model_args, config, head_args.freeze_backbone, **labels)
    logger.info(
        f"{type(model).__name__}: {model.num_parameters():,} parameters, "
        f"{model.num_parameters(only_trainable=True):,} of them trained"
    )

    trainer = PhysicsTrainer(
        model=model,
        args=training_args,
        train_dataset=encoded.get("training data"),
        eval_dataset=encoded.get("validation data"),
        processing_class=tokenizer,
        data_collator=PaddingCollator(
            tokenizer,
            data_args.pad_to_multiple_of,
            data_args.pad_to_max_length,
            rename={"class_ids": "labels"},
            drop=(*kept, "row_index"),
        ),
        compute_metrics=classification_metrics,
        optimizer_cls_and_kwargs=optimizer_arguments(model_args, training_args),
    )
    trainer.card = {
        "script": "run_classification.py",
        "auto_class": "AutoModelForSequenceClassification",
        "data": describe_data(data_args),
        "datasets": data_args.dataset_name,
    }

    train_and_evaluate(trainer, checkpoint)
    if training_args.do_predict:
        test = encoded["test data"]
        output = trainer.predict(test)
        trainer.log_metrics("test", output.metrics)
        trainer.save_metrics("test", output.metrics)
        if trainer.is_world_process_zero():
            columns = {name: test[name] for name in (*kept, "row_index")}
            if output.label_ids is not None:
                columns["label"] = output.label_ids
            logits = output.predictions
            columns["logit"] = binary_scores(logits) if logits.shape[1] <= 2 else list(logits)
            path = write_parquet(columns, Path(training_args.output_dir, "predictions.parquet"))
            logger.info(f"{len(logits)} predictions in {path}")
    finish(trainer, training_args)
    return 0


if __name__ == "__main__":
    run_script(main, "run_classification.py")
