"""
Pre-train OmniLearned (arXiv:2510.24066) on jets with any weighted sum of objectives: classes of jets, flow matching,
masked particles (arXiv:2606.14870).

The output folder holds model and feature extractor; `run_classification.py` and `run_flow_matching.py` start from it.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
import transformers
from transformers import TrainingArguments, set_seed
from transformers.utils import logging

import hepzoo  # noqa: F401 - registers the families
from hepzoo.training.common import (
    ModelArguments,
    find_last_checkpoint,
    finish,
    make_parser,
    parse_arguments,
    prepare_run,
    run_script,
    train_and_evaluate,
)
from hepzoo.training.data import DataTrainingArguments, InputError, load_raw_datasets
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

logger = logging.get_logger("hepzoo.training.run_pretraining")

EXAMPLES = """
examples:
  all three objectives, the published settings of the micro network
    accelerate launch training/run_pretraining.py training/configs/omnilearned_pretraining.yaml \\
        --train_file data/jets/train --validation_file data/jets/validation --output_dir runs/pretrained

  a small one on the CPU
    accelerate launch training/run_pretraining.py training/configs/omnilearned_pretraining_small.yaml \\
        --train_file QCD.parquet Tbqq.parquet Wqq.parquet --output_dir runs/pretrained

  masked particles count twice, no flow; no particle types and impact parameters
    ... --objectives classification masked --objective_weights 1 2 \\
        --feature_extractor_overrides use_particle_ids=false,use_additional_features=false

  continue an interrupted run: the same command again
"""

MEDIAN_JETS = 1000  # that the head for masked particles takes its start from
WEIGHTS = {
    "classification": "classification_loss_weight",
    "generation": "generation_loss_weight",
    "masked": "masked_loss_weight",
}


@dataclass
class ObjectiveArguments:
    """What is learned."""

    objectives: list[str] | None = field(
        default=None,
        metadata={"help": "Some of classification, generation, masked. Default: those of the model, from scratch all."},
    )
    objective_weights: list[float] | None = field(
        default=None, metadata={"help": "Weights of the losses of --objectives, in their order. Default: 1 each."}
    )
    start_at_medians: bool = field(
        default=True,
        metadata={
            "help": "A fresh head for masked particles starts at the medians of their features, not, as published, at "
            "random: with Lion and few steps the whole network saturates on the way from there."
        },
    )


def build_parser() -> transformers.HfArgumentParser:
    return make_parser(
        (ModelArguments, JetSetArguments, ObjectiveArguments, DataTrainingArguments, TrainingArguments),
        description="Pre-train OmniLearned on jets. Options are flags or come from a JSON or YAML file given as the "
        "first argument, which flags override.",
        epilog=EXAMPLES,
    )


def objective_settings(arguments: ObjectiveArguments) -> dict:
    """
    Configuration values of the options.

    Raises:
        InputError: an unknown objective, or not one weight for each.
    """
    objectives, weights = arguments.objectives, arguments.objective_weights
    if objectives is None:
        if weights is not None:
            raise InputError("--objective_weights: needs --objectives")
        return {}
    for name in objectives:
        if name not in WEIGHTS or objectives.count(name) > 1:
            raise InputError(f"--objectives: {name!r}, expected different ones of {', '.join(WEIGHTS)}")
    if weights is None:
        weights = [1.0] * len(objectives)
    if len(weights) != len(objectives) or not all(weight >= 0 for weight in weights):
        raise InputError(f"--objective_weights: {weights}, expected {len(objectives)} numbers of at least 0")
    settings = {WEIGHTS[name]: weight for name, weight in zip(objectives, weights)}
    return {"objectives": list(objectives), "use_time": "generation" in objectives, **settings}


def start_at_medians(model, extractor, train):
    """Start the head for masked particles at the medians of jets of `train`, numbered rows or a stream."""
    if isinstance(train, torch.utils.data.IterableDataset):
        rows = list(train.take(MEDIAN_JETS))
    else:
        rows = [train[int(k)] for k in np.random.default_rng(0).permutation(len(train))[:MEDIAN_JETS]]
    batch = JetCollator(extractor, "training data")(rows)
    model.start_at_medians(batch["particles"], batch["attention_mask"])


def main(argv: list[str] | None = None) -> int:
    """Trains and evaluates; returns the exit status."""
    from hepzoo.modeling.modeling_omnilearned import OmniLearnedForPreTraining

    model_args, set_args, objective_args, data_args, training_args = parse_arguments(build_parser(), argv)
    # the noise is drawn in the model: only the loss is compared
    training_args.prediction_loss_only = True
    training_args.label_names = []
    training_args.remove_unused_columns = False
    settings = objective_settings(objective_args)
    prepare_run(training_args)
    set_seed(training_args.seed)
    checkpoint = find_last_checkpoint(training_args) if training_args.do_train else None

    config = load_set_config(model_args, set_args, "omnilearned")
    if config.model_type != "omnilearned":
        raise InputError(f"model type {config.model_type!r} has one objective: use run_flow_matching.py")
    raw = load_raw_datasets(data_args, training_args, model_args)
    from_scratch = model_args.model_name_or_path is None
    defaults = {"use_particle_ids": True, "use_additional_features": True} if from_scratch else {}
    extractor = load_set_extractor(model_args, set_args, config, raw.train, **defaults)
    if from_scratch and not settings:
        settings = {"use_time": "generation" in config.objectives}
    config.update({**model_settings(extractor), **settings})
    prepare_jets(raw, extractor)
    model = load_set_model(OmniLearnedForPreTraining, model_args, config)
    logger.info(f"{type(model).__name__}: {model.num_parameters():,} parameters, {', '.join(config.objectives)}")
    predicts_features = "masked" in config.objectives and config.codebook_size == 0
    is_fresh = checkpoint is None and (from_scratch or "masked_head.out.weight" in model.new_weights)
    if objective_args.start_at_medians and predicts_features and is_fresh and raw.train is not None:
        start_at_medians(model, extractor, raw.train)

    trainer = make_set_trainer(
        model,
        extractor,
        raw,
        model_args,
        set_args,
        data_args,
        training_args,
        checkpoint,
        script="run_pretraining.py",
        auto_class="AutoModelForPreTraining",
    )
    train_and_evaluate(trainer, checkpoint)
    finish(trainer, training_args)
    return 0


if __name__ == "__main__":
    run_script(main, "run_pretraining.py")
