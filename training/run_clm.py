"""
Train a generator: next-token prediction on physics records, for every model family of hepzoo.

Nothing here knows a detector. The family comes from the configuration, and its tokenizer turns records into tokens.
"""

import transformers
from transformers import AutoModelForCausalLM, TrainingArguments, set_seed
from transformers.utils import logging

import hepzoo  # noqa: F401 - registers the families
from hepzoo.training.callbacks import LossMonitor
from hepzoo.training.common import (
    ModelArguments,
    PhysicsTrainer,
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
)
from hepzoo.training.data import (
    DataCollatorForCausalPhysics,
    DataTrainingArguments,
    Encoder,
    encode_dataset,
    load_raw_datasets,
    parse_assignments,
)

logger = logging.get_logger("hepzoo.training.run_clm")

EXAMPLES = """
examples:
  from scratch, with the published settings, on every GPU of the machine
    accelerate launch training/run_clm.py training/configs/cmhca_dirc.yaml \\
        --train_file data/train --validation_file data/validation --output_dir runs/dirc

  a small model on the CPU
    accelerate launch training/run_clm.py training/configs/cmhca_dirc_small.yaml \\
        --train_file data/pions.parquet data/kaons.parquet --output_dir runs/small

  options as flags, from a stream of Parquet shards
    accelerate launch training/run_clm.py --model_type cmhca_dirc \\
        --config_overrides hidden_size=128,num_hidden_layers=2,num_attention_heads=4,intermediate_size=256 \\
        --train_file "data/train-*.parquet" --streaming --max_steps 10000 --do_train \\
        --validation_file data/validation.parquet --do_eval --output_dir runs/stream

  continue an interrupted run: the same command again
  fine-tune a checkpoint: --model_name_or_path FOLDER
"""


def build_parser() -> transformers.HfArgumentParser:
    return make_parser(
        (ModelArguments, DataTrainingArguments, TrainingArguments),
        description="Train a generator on physics records. Options are flags or come from a JSON or YAML file given "
        "as the first argument, which flags override.",
        epilog=EXAMPLES,
    )


def main(argv: list[str] | None = None) -> int:
    """Trains and evaluates; returns the exit status."""
    model_args, data_args, training_args = parse_arguments(build_parser(), argv)
    prepare_run(training_args)
    set_seed(training_args.seed)
    checkpoint = find_last_checkpoint(training_args) if training_args.do_train else None

    config, tokenizer = load_config_and_tokenizer(model_args)
    raw = load_raw_datasets(data_args, training_args, model_args, repeat=False)
    tokenizer_kwargs = parse_assignments(data_args.tokenizer_kwargs, "tokenizer_kwargs")
    train_dataset, eval_dataset = (
        encode_dataset(dataset, Encoder(tokenizer, name, tokenizer_kwargs), data_args, training_args)
        if dataset is not None
        else None
        for dataset, name in ((raw.train, "training data"), (raw.validation, "validation data"))
    )
    model = load_model(AutoModelForCausalLM, model_args, config)
    logger.info(f"{type(model).__name__}: {model.num_parameters():,} parameters")

    trainer = PhysicsTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        data_collator=DataCollatorForCausalPhysics(
            tokenizer, data_args.pad_to_multiple_of, data_args.pad_to_max_length
        ),
        callbacks=[LossMonitor()],
        optimizer_cls_and_kwargs=optimizer_arguments(model_args, training_args),
    )
    trainer.card = {
        "script": "run_clm.py",
        "auto_class": "AutoModelForCausalLM",
        "data": describe_data(data_args),
        "datasets": data_args.dataset_name,
    }

    train_and_evaluate(trainer, checkpoint)
    finish(trainer, training_args)
    return 0


if __name__ == "__main__":
    run_script(main, "run_clm.py")
