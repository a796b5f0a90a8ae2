"""
Train the VQ-VAE of OmniJet (arXiv:2403.05618), which gives every constituent of a jet or shower its token.

The output folder is a model folder and a tokenizer folder: `--tokenizer_name FOLDER` of `run_clm.py` reads it.
"""

import math

import torch
import transformers
from transformers import AutoModel, TrainerCallback, TrainingArguments, set_seed
from transformers.utils import logging

import hepzoo  # noqa: F401 - registers the families
from hepzoo.tokenization.tokenization_omnijet import OmniJetTokenizer
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
    DataTrainingArguments,
    Encoder,
    InputError,
    PaddingCollator,
    encode_dataset,
    load_raw_datasets,
    parse_assignments,
)

logger = logging.get_logger("hepzoo.training.run_vqvae")

EXAMPLES = """
examples:
  the published tokenizer of jets
    accelerate launch training/run_vqvae.py training/configs/omnijet_vqvae.yaml \\
        --train_file data/train --validation_file data/validation --output_dir runs/tokenizer

  a small one on the CPU
    accelerate launch training/run_vqvae.py training/configs/omnijet_vqvae_small.yaml \\
        --train_file QCD.parquet Tbqq.parquet --output_dir runs/tokenizer

  other features: --tokenizer_overrides '{"features": {"part_pt": {"function": "log"}, ...}}'
  continue an interrupted run: the same command again
"""


class TokenMonitor(TrainerCallback):
    """
    Adds to the logs of `Trainer`: the two losses, and how the whole validation set uses the codebook.

    Logged are `loss_reconstruction` and `loss_vq` in training; `eval_reconstruction_loss` (weighted by constituents),
    `eval_perplexity` (exp of the entropy of the codes) and `eval_codebook_usage` (fraction that occurs) in validation.
    """

    def __init__(self, codebook_size: int):
        self.codebook_size = codebook_size
        self._reset_training()
        self._reset_validation()

    def _reset_training(self):
        self.train_sums, self.train_batches = 0.0, 0

    def _reset_validation(self):
        self.eval_sum, self.counts = 0.0, 0

    def on_init_end(self, args, state, control, model=None, **kwargs):
        model.register_forward_hook(self._after_forward, with_kwargs=True)

    @torch.no_grad()
    def _after_forward(self, model, args, kwargs, output):
        if output.loss is None:
            return
        if model.training:
            self.train_sums = self.train_sums + torch.stack([output.reconstruction_loss, output.vq_loss]).double()
            self.train_batches += 1
            return
        codes = output.codes
        mask = kwargs.get("attention_mask")
        codes = codes.flatten() if mask is None else codes[mask.bool()]
        self.counts = self.counts + torch.bincount(codes, minlength=self.codebook_size)
        self.eval_sum = self.eval_sum + output.reconstruction_loss.double() * len(codes)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs is None:
            return
        extra = {}
        if "loss" in logs and self.train_batches:
            reconstruction, vq = (self.train_sums / self.train_batches).tolist()
            extra = {"loss_reconstruction": reconstruction, "loss_vq": vq}
            self._reset_training()
        elif "eval_loss" in logs and torch.is_tensor(self.counts):
            counts, total = self.counts.double(), self.eval_sum
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(counts)
                torch.distributed.all_reduce(total)
            entropy = torch.special.entr(counts / counts.sum()).sum().item()
            extra = {
                "eval_reconstruction_loss": (total / counts.sum()).item(),
                "eval_perplexity": math.exp(entropy),
                "eval_codebook_usage": (counts > 0).double().mean().item(),
            }
            self._reset_validation()
        # the same dict becomes the metrics that `evaluate` returns
        logs.update(extra)
        if extra and state.log_history:
            state.log_history[-1].update(extra)


def build_parser() -> transformers.HfArgumentParser:
    return make_parser(
        (ModelArguments, DataTrainingArguments, TrainingArguments),
        description="Train the VQ-VAE of a jet tokenizer. Options are flags or come from a JSON or YAML file given as "
        "the first argument, which flags override.",
        epilog=EXAMPLES,
    )


def main(argv: list[str] | None = None) -> int:
    """Trains and evaluates; returns the exit status."""
    model_args, data_args, training_args = parse_arguments(build_parser(), argv)
    # the features are their own targets: Trainer must not wait for labels to compute a validation loss
    training_args.label_names = []
    prepare_run(training_args)
    set_seed(training_args.seed)
    checkpoint = find_last_checkpoint(training_args) if training_args.do_train else None

    if not (model_args.model_name_or_path or model_args.config_name):
        model_args.model_type = model_args.model_type or "omnijet_vqvae"
    config, tokenizer = load_config_and_tokenizer(model_args, default_tokenizer=OmniJetTokenizer)
    if config.model_type != "omnijet_vqvae":
        raise InputError(f"model type {config.model_type!r} is no VQ-VAE, expected 'omnijet_vqvae'")
    if not isinstance(tokenizer, OmniJetTokenizer):
        raise InputError(f"the tokenizer is a {type(tokenizer).__name__}, expected an OmniJetTokenizer")
    if config.num_jet_features:
        raise InputError("--config_overrides: num_jet_features must be 0, the tokenizer has no features of whole jets")
    if model_args.model_name_or_path is None:
        wanted = parse_assignments(model_args.config_overrides, "config_overrides").get("num_features")
        config.num_features = len(tokenizer.feature_names) if wanted is None else wanted

    raw = load_raw_datasets(data_args, training_args, model_args, repeat=False)
    tokenizer_kwargs = parse_assignments(data_args.tokenizer_kwargs, "tokenizer_kwargs")
    tokenizer_kwargs.update(return_input_ids=False, return_class_ids=False)
    train_dataset, eval_dataset = (
        encode_dataset(dataset, Encoder(tokenizer, name, tokenizer_kwargs), data_args, training_args)
        if dataset is not None
        else None
        for dataset, name in ((raw.train, "training data"), (raw.validation, "validation data"))
    )
    model = load_model(AutoModel, model_args, config)
    try:
        # saved with the tokenizer, at every checkpoint
        tokenizer.vqvae = model
    except ValueError as error:
        raise InputError(f"the tokenizer does not fit the model: {error}") from None
    logger.info(f"{type(model).__name__}: {model.num_parameters():,} parameters")

    trainer = PhysicsTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        data_collator=PaddingCollator(tokenizer, data_args.pad_to_multiple_of, data_args.pad_to_max_length),
        callbacks=[TokenMonitor(config.codebook_size)],
        optimizer_cls_and_kwargs=optimizer_arguments(model_args, training_args),
    )
    trainer.card = {
        "script": "run_vqvae.py",
        "auto_class": "AutoModel",
        "data": describe_data(data_args),
        "datasets": data_args.dataset_name,
    }

    train_and_evaluate(trainer, checkpoint)
    finish(trainer, training_args)
    return 0


if __name__ == "__main__":
    run_script(main, "run_vqvae.py")
