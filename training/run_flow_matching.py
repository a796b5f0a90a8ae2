"""
Train a flow-matching generator of jets: OmniLearned (arXiv:2510.24066) or the EPiC flow (arXiv:2312.00123), from
scratch or from a pre-trained model.

The output folder holds model and feature extractor with the density of the conditions that `hepzoo generate flow-jets`
draws from; with `--ema_decay` averaged weights in its sub-folder `ema`.
"""

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
from hepzoo.training.data import DataTrainingArguments, load_raw_datasets, parse_assignments
from hepzoo.training.jet_sets import (
    JetSetArguments,
    load_set_config,
    load_set_extractor,
    load_set_model,
    make_set_trainer,
    model_settings,
    prepare_jets,
)

logger = logging.get_logger("hepzoo.training.run_flow_matching")

EXAMPLES = """
examples:
  EPiC flow with the published settings
    accelerate launch training/run_flow_matching.py training/configs/epic_fm.yaml \\
        --train_file data/jets/train --validation_file data/jets/validation --output_dir runs/epic

  a small one on the CPU
    accelerate launch training/run_flow_matching.py training/configs/epic_fm_small.yaml \\
        --train_file QCD.parquet Tbqq.parquet --output_dir runs/epic

  OmniLearned, fine-tuned for generation from a pre-trained model
    accelerate launch training/run_flow_matching.py training/configs/omnilearned_generation.yaml \\
        --model_name_or_path runs/pretrained --train_file data/jets/train --output_dir runs/generator

  continue an interrupted run: the same command again
"""
# of a new OmniLearned generator, and of one that is made from a model without conditions
OMNILEARNED_CONDITIONS = ["jet_pt", "jet_eta", "jet_nparticles"]


def build_parser() -> transformers.HfArgumentParser:
    return make_parser(
        (ModelArguments, JetSetArguments, DataTrainingArguments, TrainingArguments),
        description="Train a flow-matching generator of jets. Options are flags or come from a JSON or YAML file given "
        "as the first argument, which flags override.",
        epilog=EXAMPLES,
    )


def main(argv: list[str] | None = None) -> int:
    """Trains and evaluates; returns the exit status."""
    from hepzoo.modeling.modeling_epic_fm import EpicFMForGeneration
    from hepzoo.modeling.modeling_omnilearned import OmniLearnedForGeneration

    model_args, set_args, data_args, training_args = parse_arguments(build_parser(), argv)
    # the noise is drawn in the model: only the loss is compared
    training_args.prediction_loss_only = True
    training_args.label_names = []
    training_args.remove_unused_columns = False
    prepare_run(training_args)
    set_seed(training_args.seed)
    checkpoint = find_last_checkpoint(training_args) if training_args.do_train else None

    config = load_set_config(model_args, set_args, "epic_fm")
    is_omnilearned = config.model_type == "omnilearned"
    raw = load_raw_datasets(data_args, training_args, model_args)
    defaults = {}
    if is_omnilearned and config.num_conditions == 0:
        # what cannot be generated is no input
        defaults = {
            "condition_names": OMNILEARNED_CONDITIONS,
            "use_particle_ids": False,
            "use_additional_features": False,
        }
    extractor = load_set_extractor(model_args, set_args, config, raw.train, **defaults)
    overrides = parse_assignments(model_args.config_overrides, "config_overrides")
    config.update({**model_settings(extractor), **({"use_time": True} if is_omnilearned else {}), **overrides})
    prepare_jets(raw, extractor)
    model_class = OmniLearnedForGeneration if is_omnilearned else EpicFMForGeneration
    # published: the last layer always starts from scratch
    new_layers = ("generator.out.",) if is_omnilearned and config.architectures != [model_class.__name__] else ()
    model = load_set_model(model_class, model_args, config, new_layers)
    logger.info(f"{type(model).__name__}: {model.num_parameters():,} parameters")

    trainer = make_set_trainer(
        model,
        extractor,
        raw,
        model_args,
        set_args,
        data_args,
        training_args,
        checkpoint,
        script="run_flow_matching.py",
        auto_class="AutoModelForPreTraining",
    )
    train_and_evaluate(trainer, checkpoint)
    finish(trainer, training_args)
    return 0


if __name__ == "__main__":
    run_script(main, "run_flow_matching.py")
