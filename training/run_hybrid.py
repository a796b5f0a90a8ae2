"""
Pre-train the hybrid of arXiv:2512.04149: next tokens, masked tokens and classes of jets from continuous constituents.

The output folder is a model folder and a tokenizer folder: `hepzoo generate jets --model FOLDER` reads it. Without the
label columns of the tokenizer in the data there is no class loss.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import AutoModelForPreTraining, TrainerCallback, TrainingArguments, set_seed
from transformers.utils import logging

import hepzoo  # noqa: F401 - registers the families
from hepzoo.tokenization.tokenization_omnijet import OmniJetTokenizer
from hepzoo.training.callbacks import _sum_over_ranks
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
    IGNORE_INDEX,
    DataTrainingArguments,
    Encoder,
    InputError,
    PaddingCollator,
    encode_dataset,
    load_raw_datasets,
    parse_assignments,
)

logger = logging.get_logger("hepzoo.training.run_hybrid")

EXAMPLES = """
examples:
  the published sizes and optimizer
    accelerate launch training/run_hybrid.py training/configs/omnijet_hybrid.yaml --tokenizer_name runs/tokenizer \\
        --train_file data/train --validation_file data/validation --output_dir runs/hybrid

  a small one on the CPU
    accelerate launch training/run_hybrid.py training/configs/omnijet_hybrid_small.yaml \\
        --tokenizer_name runs/tokenizer --train_file QCD.parquet Tbqq.parquet --output_dir runs/hybrid

  next tokens alone: --config_overrides masked_loss_weight=0,class_loss_weight=0
"""


@dataclass
class HybridArguments:
    original_features: bool = field(
        default=False,
        metadata={"help": "Read the constituents themselves, not what their tokens decode to, which generation reads."},
    )


@dataclass
class HybridCollator(PaddingCollator):
    """
    Encoded jets to a batch of the hybrid: positions are the start and the constituents, at most `max_positions`, and
    each has the ids of itself and of what follows, in the end the stop, as targets.

    Args:
        decode: read what the codes decode to.
    """

    max_positions: int = 128
    decode: bool = True

    def __call__(self, features: list[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        batch = super().__call__(features)
        ids = batch.pop("input_ids")[:, : self.max_positions + 1]
        # what has a follower: everything but the stop
        is_real = batch["attention_mask"][:, 1 : self.max_positions + 1]
        particles = batch["particle_features"][:, : is_real.shape[1]]
        if self.decode:
            vqvae = self.tokenizer.vqvae
            is_code = is_real[:, 1:].bool()
            codes = (ids[:, 1:-1] - 1).where(is_code, 0)
            with torch.inference_mode():
                decoded = vqvae.decode(codes.to(vqvae.device), is_code.to(vqvae.device)).to("cpu", particles.dtype)
            particles = torch.nn.functional.pad(decoded, (0, 0, 1, 0))
        hidden = is_real == 0
        batch |= {
            "particle_features": particles.masked_fill(hidden.unsqueeze(-1), 0.0),
            "attention_mask": is_real,
            "generation_labels": ids[:, 1:].masked_fill(hidden, IGNORE_INDEX),
            "masked_labels": ids[:, :-1].masked_fill(hidden, IGNORE_INDEX),
        }
        return batch


class HybridMonitor(TrainerCallback):
    """Adds the parts of the loss to the logs of `Trainer`: `loss_<part>`, `eval_loss_<part>`; means over jets."""

    def __init__(self):
        self.sums: dict[str, Any] = {}

    def on_init_end(self, args, state, control, model=None, **kwargs):
        model.register_forward_hook(self._after_forward, with_kwargs=True)

    @torch.no_grad()
    def _after_forward(self, model, args, kwargs, output):
        kind = "" if model.training else "eval_"
        jets = len(kwargs["particle_features"])
        for part in ("generation", "masked", "class"):
            loss = output.get(f"{part}_loss")
            if loss is not None:
                total, number = self.sums.get(f"{kind}loss_{part}", (0.0, 0))
                self.sums[f"{kind}loss_{part}"] = (total + jets * loss.double(), number + jets)

    def on_log(self, args, state, control, logs=None, **kwargs):
        kind = next((kind for kind in ("", "eval_") if f"{kind}loss" in (logs or {})), None)
        names = [name for name in self.sums if kind is not None and name.startswith(f"{kind}loss")]
        if not names:
            return
        totals = _sum_over_ranks(value for name in names for value in self.sums.pop(name))
        extra = {name: total / number for name, total, number in zip(names, totals[::2], totals[1::2], strict=True)}
        # the same dict becomes the metrics that `train` and `evaluate` return
        logs.update(extra)
        if state.log_history:
            state.log_history[-1].update(extra)


def build_parser() -> transformers.HfArgumentParser:
    return make_parser(
        (ModelArguments, HybridArguments, DataTrainingArguments, TrainingArguments),
        description="Pre-train the hybrid on jets. Options are flags or come from a JSON or YAML file given as the "
        "first argument, which flags override.",
        epilog=EXAMPLES,
    )


def main(argv: list[str] | None = None) -> int:
    """Trains and evaluates; returns the exit status."""
    model_args, hybrid_args, data_args, training_args = parse_arguments(build_parser(), argv)
    # the collator, not Trainer, decides what is left out
    training_args.remove_unused_columns = False
    training_args.label_names = ["generation_labels"]
    prepare_run(training_args)
    set_seed(training_args.seed)
    checkpoint = find_last_checkpoint(training_args) if training_args.do_train else None

    fresh = {}
    if not (model_args.model_name_or_path or model_args.config_name):
        model_args.model_type = model_args.model_type or "omnijet"
        fresh = {"architecture": "hybrid"} if model_args.model_type == "omnijet" else {}
    config, tokenizer = load_config_and_tokenizer(model_args, **fresh)
    if config.model_type != "omnijet" or config.architecture != "hybrid":
        kind = f"{config.model_type} of architecture {getattr(config, 'architecture', None)!r}"
        raise InputError(f"the model is an {kind}, expected omnijet of architecture 'hybrid'")
    if not isinstance(tokenizer, OmniJetTokenizer):
        raise InputError(f"the tokenizer is a {type(tokenizer).__name__}, expected an OmniJetTokenizer")
    if config.num_jet_features:
        raise InputError("--config_overrides: num_jet_features must be 0, the tokenizer has no features of whole jets")
    changes: dict[str, Any] = {}
    if model_args.model_name_or_path is None:
        changes["num_features"] = len(tokenizer.feature_names)
        changes["id2label"] = dict(enumerate(tokenizer.label_names))
        changes["label2id"] = {name: number for number, name in enumerate(tokenizer.label_names)}
    elif config.num_features != len(tokenizer.feature_names):
        raise InputError(
            f"the tokenizer does not fit the model: {len(tokenizer.feature_names)} features, the model reads "
            f"{config.num_features}"
        )

    raw = load_raw_datasets(data_args, training_args, model_args, repeat=False)
    tokenizer_kwargs = parse_assignments(data_args.tokenizer_kwargs, "tokenizer_kwargs")
    tokenizer_kwargs.update(return_particle_features=True)
    train_dataset, eval_dataset = (
        encode_dataset(dataset, Encoder(tokenizer, name, tokenizer_kwargs), data_args, training_args)
        if dataset is not None
        else None
        for dataset, name in ((raw.train, "training data"), (raw.validation, "validation data"))
    )
    model = load_model(AutoModelForPreTraining, model_args, config, **changes)
    logger.info(f"{type(model).__name__}: {model.num_parameters():,} parameters")

    trainer = PhysicsTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        data_collator=HybridCollator(
            tokenizer,
            data_args.pad_to_multiple_of,
            data_args.pad_to_max_length,
            rename={"class_ids": "labels"},
            max_positions=model.config.max_position_embeddings,
            decode=not hybrid_args.original_features,
        ),
        callbacks=[HybridMonitor()],
        optimizer_cls_and_kwargs=optimizer_arguments(model_args, training_args),
    )
    trainer.card = {
        "script": "run_hybrid.py",
        "auto_class": "AutoModelForPreTraining",
        "data": describe_data(data_args),
        "datasets": data_args.dataset_name,
    }
    train_and_evaluate(trainer, checkpoint)
    finish(trainer, training_args)
    return 0


if __name__ == "__main__":
    run_script(main, "run_hybrid.py")
