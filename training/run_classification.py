"""
Train a classifier of whole tracks, for example pions against kaons: from scratch or from a generator.

Labels are the `class_ids` that the tokenizer reads from the PDG codes. From a generator with experts the experts are
averaged (arXiv:2505.08736).
"""

from dataclasses import dataclass, field
from pathlib import Path

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
    write_parquet,
)
from hepzoo.training.data import (
    DataTrainingArguments,
    Encoder,
    PaddingCollator,
    encode_dataset,
    load_raw_datasets,
    parse_assignments,
    scalar_columns,
)

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
"""


@dataclass
class HeadArguments:
    """How the classifier is trained."""

    freeze_backbone: bool = field(
        default=False, metadata={"help": "Train only what the generator does not have: the head and the cls token."}
    )


def build_parser() -> transformers.HfArgumentParser:
    return make_parser(
        (ModelArguments, DataTrainingArguments, HeadArguments, TrainingArguments),
        description="Train a classifier of tracks. Options are flags or come from a JSON or YAML file given as the "
        "first argument, which flags override.",
        epilog=EXAMPLES,
    )


def rejection_at_efficiency(scores: np.ndarray, labels: np.ndarray, efficiency: float) -> float:
    """
    Share of class 0 that is rejected by the cut which keeps at least `efficiency` of class 1, TN / (TN + FP).

    Args:
        scores: (tracks,), larger for class 1. labels: (tracks,) 0 or 1.
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
        logger.warning("all tracks are of one class: no area under the curve")
        return metrics
    metrics["auc"] = float(roc_auc_score(labels, scores))
    for percent in (30, 50, 90):
        metrics[f"rejection_at_{percent}"] = rejection_at_efficiency(scores, labels, percent / 100)
    return metrics


def main(argv: list[str] | None = None) -> int:
    """Trains, evaluates, predicts; returns the exit status."""
    model_args, data_args, head_args, training_args = parse_arguments(build_parser(), argv)
    prepare_run(training_args)
    # the collator, not Trainer, decides what is left out
    training_args.remove_unused_columns = False
    set_seed(training_args.seed)
    checkpoint = find_last_checkpoint(training_args) if training_args.do_train else None

    config, tokenizer = load_config_and_tokenizer(model_args)
    raw = load_raw_datasets(data_args, training_args, model_args)
    tokenizer_kwargs = parse_assignments(data_args.tokenizer_kwargs, "tokenizer_kwargs")
    labelled = {**tokenizer_kwargs, "return_class_ids": True}
    encoded = {}
    for name, dataset in (("training data", raw.train), ("validation data", raw.validation)):
        if dataset is not None:
            encoder = Encoder(tokenizer, name, labelled)
            encoded[name] = encode_dataset(dataset, encoder, data_args, training_args)
    model = load_model(AutoModelForSequenceClassification, model_args, config, head_args.freeze_backbone)
    logger.info(
        f"{type(model).__name__}: {model.num_parameters():,} parameters, "
        f"{model.num_parameters(only_trainable=True):,} of them trained"
    )

    kept = scalar_columns(raw.test) if raw.test is not None else ()
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

    if training_args.do_train:
        metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
        trainer.save_model()
        if not data_args.streaming:
            metrics["train_samples"] = trainer.card["train_samples"] = len(encoded["training data"])
        trainer.log_metrics("train", metrics)
        trainer.save_metrics("train", metrics)
        trainer.save_state()
    if training_args.do_eval:
        metrics = trainer.evaluate()
        metrics["eval_samples"] = len(encoded["validation data"])
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
        trainer.card["metrics"] = metrics
    if training_args.do_predict:
        encoder = Encoder(tokenizer, "test data", tokenizer_kwargs, keep=kept)
        test = encode_dataset(raw.test, encoder, data_args, training_args)
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
