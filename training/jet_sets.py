"""Jets as sets of particles for the training scripts: feature extractor, batches extracted on the way, trainer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoFeatureExtractor, PreTrainedConfig
from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.utils import logging

from hepzoo.tokenization.jet_features import FOUR_MOMENTUM
from hepzoo.training.callbacks import EMACallback, LossParts
from hepzoo.training.common import ModelArguments, PhysicsTrainer, describe_data, optimizer_arguments
from hepzoo.training.data import InputError, RawDatasets, find_files, parse_assignments
from hepzoo.training.lion import NEW_LAYERS, Lion, parameter_groups
from hepzoo.training.tpc_data import renumber_row

logger = logging.get_logger(__name__)

MODEL_TYPES = ("omnilearned", "epic_fm")
EVALUATION_SEED = 9999  # of the noise in validation, as published for the EPiC flow


@dataclass
class JetSetArguments:
    """Models of sets of particles: size, feature extractor, averaged weights, fine-tuning."""

    paper_size: str | None = field(
        default=None,
        metadata={"help": "omnilearned from scratch: size by the paper's name, micro, small, medium or large."},
    )
    feature_extractor_name: str | None = field(
        default=None,
        metadata={"help": "Feature extractor folder or Hub name. Default: that of the model, else a new one."},
    )
    feature_extractor_overrides: str | None = field(
        default=None,
        metadata={
            "help": "Arguments of the feature extractor, name=value,... or JSON, for example "
            "condition_names=[jet_pt,jet_eta,jet_nparticles]."
        },
    )
    fit_jets: int = field(
        default=20_000,
        metadata={"help": "Training jets that a new feature extractor takes its statistics and densities from."},
    )
    ema_decay: float | None = field(
        default=None,
        metadata={"help": "Keep averaged weights with this decay (published 0.999) in the sub-folder ema."},
    )
    head_lr_factor: float = field(
        default=1.0,
        metadata={"help": "Learning rate of layers that the checkpoint does not have, over that of the others."},
    )


# ---------------------------------------------------------------------------------------------------------------------
# Configuration, feature extractor, model
# ---------------------------------------------------------------------------------------------------------------------


def load_set_config(model_args: ModelArguments, set_args: JetSetArguments, default: str) -> PreTrainedConfig:
    """
    Configuration of the model to train: of a checkpoint, of a file, or from scratch (family `default`).

    Raises:
        InputError: it cannot be read, is of another family, or options exclude each other.
    """
    for option in ("tokenizer_name", "tokenizer_overrides"):
        if getattr(model_args, option) is not None:
            raise InputError(f"--{option}: these models have a feature extractor, set --feature_extractor_name")
    overrides = parse_assignments(model_args.config_overrides, "config_overrides")
    source = next((n for n in ("model_name_or_path", "config_name") if getattr(model_args, n)), "model_type")
    name = getattr(model_args, source) or default
    if set_args.paper_size is not None and source != "model_type":
        raise InputError(f"--paper_size: --{source} has a size already")
    try:
        if source != "model_type":
            config = AutoConfig.from_pretrained(name, **model_args.hub_kwargs(), **overrides)
        elif set_args.paper_size is None:
            config = AutoConfig.for_model(name, **overrides)
        else:
            config = type(AutoConfig.for_model(name)).from_paper_size(set_args.paper_size, **overrides)
    except (ValueError, OSError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        raise InputError(f"--{source} {name}: {' '.join(str(error).split())}") from error
    unknown = sorted(set(overrides) - set(type(config)().to_dict()) - {"num_labels"})
    if unknown:
        raise InputError(f"--config_overrides: {type(config).__name__} has no {unknown[0]}")
    if config.model_type not in MODEL_TYPES:
        expected = " or ".join(MODEL_TYPES)
        raise InputError(f"--{source} {name}: model type {config.model_type!r} cannot be trained here, not {expected}")
    return config


def load_set_extractor(
    model_args: ModelArguments, set_args: JetSetArguments, config: PreTrainedConfig, train: Any, **defaults: Any
) -> Any:
    """
    `--feature_extractor_name`, else the extractor saved with the model, else a new one that fits `config`.

    What it does not know yet (statistics, density of conditions) is taken from training jets.

    Args:
        train: training jets (`datasets.Dataset` or a stream), or `None`.
        defaults: arguments, weaker than `--feature_extractor_overrides`.

    Raises:
        InputError: it cannot be loaded or made.
    """
    overrides = parse_assignments(set_args.feature_extractor_overrides, "feature_extractor_overrides")
    overrides = {**defaults, **overrides}
    name = set_args.feature_extractor_name or model_args.model_name_or_path
    try:
        if name is not None:
            extractor = changed_extractor(
                AutoFeatureExtractor.from_pretrained(name, **model_args.hub_kwargs()), overrides
            )
        else:
            kind = FEATURE_EXTRACTOR_MAPPING[type(config)]
            check_settings(kind(), overrides)
            extractor = getattr(kind, "from_model_config", lambda config, **kwargs: kind(**kwargs))(config, **overrides)
        if extractor.density is None and train is not None and set_args.fit_jets > 0:
            fit_extractor(extractor, train, set_args.fit_jets)
    except InputError:
        raise
    except (ValueError, OSError, TypeError, KeyError) as error:
        raise InputError(f"feature extractor: {' '.join(str(error).split())}") from error
    return extractor


def changed_extractor(extractor: Any, changes: Mapping[str, Any]) -> Any:
    """A copy with other arguments; what they were fitted to goes with the conditions and classes."""
    settings = {k: v for k, v in extractor.to_dict().items() if k != "feature_extractor_type"}
    if all(settings.get(name) == value for name, value in changes.items()):
        return extractor
    fitted = {name: None for name in ("condition_means", "condition_stds") if "condition_names" in changes}
    check_settings(extractor, changes)
    changed = type(extractor)(**{**settings, **fitted, **changes})
    same = all(getattr(changed, name) == getattr(extractor, name) for name in ("label_names", "condition_names"))
    if same:
        changed.density = extractor.density
    return changed


def check_settings(extractor: Any, changes: Mapping[str, Any]):
    """Raise InputError for arguments that the extractor does not have; it would keep them in silence."""
    unknown = sorted(set(changes) - set(extractor.to_dict()))
    if unknown:
        raise InputError(f"--feature_extractor_overrides: {type(extractor).__name__} has no {unknown[0]}")


def fit_extractor(extractor: Any, train: Any, num_jets: int):
    """Statistics and densities from `num_jets` jets, of a `Dataset` chosen at random."""
    columns = wanted_columns(extractor, column_names(train))
    if isinstance(train, torch.utils.data.IterableDataset):
        rows = list(train.take(num_jets))
        jets = {name: [row[name] for row in rows] for name in columns}
    else:
        chosen = np.random.default_rng(0).permutation(len(train))[:num_jets]
        jets = train.select_columns(columns).select(np.sort(chosen)).to_dict()
    extractor.fit(jets)
    logger.info(f"feature extractor fitted to {min(num_jets, len(next(iter(jets.values()))))} jets")


def model_settings(extractor: Any) -> dict[str, Any]:
    """Configuration values that follow from the feature extractor."""
    if hasattr(extractor, "model_settings"):
        return extractor.model_settings()
    return {
        "num_features": len(extractor.feature_names),
        "num_classes": len(extractor.label_names),
        "condition_names": extractor.condition_names,
        "max_num_particles": extractor.max_num_particles,
    }


def load_set_model(
    model_class: type, model_args: ModelArguments, config: PreTrainedConfig, new_layers: tuple[str, ...] = ()
) -> Any:
    """
    The model, with fresh weights unless `--model_name_or_path` is given; then `new_layers` (beginnings of names), and
    what the checkpoint has not or in another size, start from scratch, and are listed in the log.

    Raises:
        InputError: it cannot be loaded.
    """
    kwargs: dict[str, Any] = {}
    if model_args.attn_implementation is not None:
        kwargs["attn_implementation"] = model_args.attn_implementation
    dtype = getattr(torch, model_args.dtype or "float32", None)
    if not isinstance(dtype, torch.dtype):
        raise InputError(f"--dtype {model_args.dtype}: expected float32, bfloat16 or float16")
    try:
        fresh = model_class._from_config(config, dtype=dtype, **kwargs)
        if model_args.model_name_or_path is None:
            return fresh
        hub = {name: value for name, value in model_args.hub_kwargs().items() if name != "trust_remote_code"}
        model, info = model_class.from_pretrained(
            model_args.model_name_or_path,
            config=config,
            dtype=dtype,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **hub,
            **kwargs,
        )
    except (ValueError, OSError, RuntimeError, StrictDataclassError) as error:
        raise InputError(f"cannot make the {config.model_type} model: {' '.join(str(error).split())}") from error
    new = set(info["missing_keys"]) | {key[0] for key in info["mismatched_keys"]}
    if new_layers:
        with torch.no_grad():
            stored = model.state_dict()
            for name, values in fresh.state_dict().items():
                if name.startswith(new_layers):
                    stored[name].copy_(values)
                    new.add(name)
    unused = sorted(info["unexpected_keys"])
    for what, names in (("start from scratch", sorted(new)), ("are not used", unused)):
        if names:
            modules = sorted({name.rsplit(".", 1)[0] for name in names})
            logger.warning(f"{model_args.model_name_or_path}: {len(names)} weights {what}: {', '.join(modules)}")
    model.new_weights = tuple(sorted(new))
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Jets
# ---------------------------------------------------------------------------------------------------------------------


def wanted_columns(extractor: Any, available: Sequence[str]) -> list[str]:
    """
    Which of the `available` columns the extractor reads.

    Raises:
        InputError: one that it cannot do without is missing.
    """
    optional = ["jet_pt", "jet_eta", "jet_phi", "jet_energy", "jet_sdmass", "part_dphi", *extractor.label_names]
    features = [name for name in getattr(extractor, "feature_names", ()) if name not in ("part_etarel", "part_ptrel")]
    needed = [*FOUR_MOMENTUM, *(name for name in features if name not in ("part_dphi", "part_energyrel"))]
    if getattr(extractor, "use_particle_ids", False):
        needed += [name for name in available if name == "part_charge" or name.startswith("part_is")]
    if getattr(extractor, "use_additional_features", False):
        needed += ["part_d0val", "part_d0err", "part_dzval", "part_dzerr"]
    missing = [name for name in needed if name not in available]
    if missing:
        raise InputError(f"column {missing[0]} is missing, the data have {', '.join(sorted(available))}")
    return [*needed, *(name for name in optional if name in available)]


def column_names(dataset: Any) -> list[str]:
    """Columns of a `Dataset` or of a stream, which may not know them before it is read."""
    return dataset.column_names or list(next(iter(dataset)))


class NumberedRows(torch.utils.data.Dataset):
    """
    Rows of a `datasets.Dataset` with their number as `row`. (A column of numbers would make `datasets` copy all rows
    of a sample that was drawn from a file.)
    """

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.dataset[index], "row": index}

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        columns = self.dataset[indices]
        return [dict(zip(columns, values), row=row) for row, values in zip(indices, zip(*columns.values()))]

    def lengths(self) -> list[int]:
        """Constituents of every jet."""
        momenta = self.dataset.select_columns([FOUR_MOMENTUM[0]]).with_format("arrow")
        return [n for batch in momenta.iter(10_000) for n in pc.list_value_length(batch[FOUR_MOMENTUM[0]]).to_pylist()]


class LikeLengthSampler(LengthGroupedSampler):
    """
    Batches of jets of about the same multiplicity, hence of little padding, in random order. (Those of
    `LengthGroupedSampler` come by falling multiplicity, 50 at a time, which the weights would follow.)
    """

    def __iter__(self):
        indices = torch.tensor(list(super().__iter__()))
        batches = list(indices.split(self.batch_size))
        # the last one may be smaller: all others have to stay whole
        order = torch.randperm(len(indices) // self.batch_size).tolist()
        order += range(len(order), len(batches))
        return iter(torch.cat([batches[k] for k in order]).tolist())


def prepare_jets(raw: RawDatasets, extractor: Any):
    """Keeps the columns that the extractor reads, in place, and numbers the rows; lists become arrays."""
    for split in ("train", "validation", "test"):
        dataset = getattr(raw, split)
        if dataset is None:
            continue
        dataset = dataset.select_columns(wanted_columns(extractor, column_names(dataset)))
        if isinstance(dataset, torch.utils.data.IterableDataset):
            dataset = dataset.map(lambda record, index: {"row": index}, with_indices=True).with_format("numpy")
        else:
            dataset = NumberedRows(dataset.with_format("numpy"))
        setattr(raw, split, dataset)


@dataclass
class JetCollator:
    """
    Jets to a padded batch of model inputs, extracted on the way; class ids become `labels` for the models that take
    them so.

    Args:
        name: what the jets are called in errors.
    """

    extractor: Any
    name: str = "data"
    pad_to_multiple_of: int | None = None
    return_class_ids: bool = True

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        try:
            encoded = self.extractor(features, padding=False, return_class_ids=self.return_class_ids)
            batch = self.extractor.pad(
                encoded, return_tensors="pt", pad_to_multiple_of=self.pad_to_multiple_of, padding=True
            )
        except ValueError as error:
            rows = [int(feature["row"]) for feature in features]
            raise InputError(f"{self.name}: {renumber_row(error, rows)}") from error
        return renamed(batch, self.extractor)


def renamed(batch: Mapping[str, Any], extractor: Any) -> dict[str, Any]:
    """Class ids under the name that the model has for them."""
    name = "class_ids" if "class_ids" in extractor.model_input_names and not is_omnilearned(extractor) else "labels"
    return {name if key == "class_ids" else key: value for key, value in batch.items()}


def is_omnilearned(extractor: Any) -> bool:
    return hasattr(extractor, "use_particle_ids")


class JetSetTrainer(PhysicsTrainer):
    """
    `PhysicsTrainer` with the optimizer Lion and its groups of parameters, the same noise in every validation, and, with
    `--train_sampling_strategy group_by_length`, batches of jets of like multiplicity.

    `lion` holds arguments of `Lion`, or is `None` for `--optim`; layers whose names begin with one of `new_layers`
    learn at `head_lr_factor` times the rate.
    """

    lion: dict[str, Any] | None = None
    new_layers: tuple[str, ...] = NEW_LAYERS
    head_lr_factor: float = 1.0

    def _get_train_sampler(self, train_dataset=None):
        jets = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy == "group_by_length" and isinstance(jets, NumberedRows):
            return LikeLengthSampler(self.args.train_batch_size, lengths=jets.lengths())
        return super()._get_train_sampler(train_dataset)

    def _get_eval_sampler(self, eval_dataset):
        return torch.utils.data.SequentialSampler(eval_dataset)

    def create_optimizer(self, model=None):
        if self.optimizer is not None or (self.lion is None and self.head_lr_factor == 1):
            return super().create_optimizer(model)
        args = self.args
        groups = parameter_groups(
            self.model, args.learning_rate, args.weight_decay, self.new_layers, self.head_lr_factor
        )
        if self.lion is not None:
            self.optimizer = Lion(groups, lr=args.learning_rate, **self.lion)
        else:
            kind, kwargs = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(args, self.model)
            self.optimizer = kind(groups, **kwargs)
        return self.optimizer

    def evaluate(self, *args, **kwargs):
        with torch.random.fork_rng():
            torch.manual_seed(EVALUATION_SEED)
            return super().evaluate(*args, **kwargs)


def make_set_trainer(
    model: Any,
    extractor: Any,
    raw: RawDatasets,
    model_args: ModelArguments,
    set_args: JetSetArguments,
    data_args: Any,
    training_args: Any,
    checkpoint: str | None,
    script: str,
    auto_class: str,
    **kwargs: Any,
) -> JetSetTrainer:
    """
    The trainer of a model of sets, with what its model card says.

    Args:
        checkpoint: that the run resumes from.
        script, auto_class: names for the card: what trains, and what loads the model.
        kwargs: of `Trainer`.
    """
    callbacks: list[Any] = [LossParts()]
    if set_args.ema_decay is not None:
        try:
            callbacks.append(EMACallback(set_args.ema_decay, resume_from=checkpoint))
        except ValueError as error:
            raise InputError(f"--ema_decay: {error}") from None
    optimizer = optimizer_arguments(model_args, training_args)
    is_lion = optimizer is not None and optimizer[0] is Lion
    trainer = JetSetTrainer(
        model=model,
        args=training_args,
        train_dataset=raw.train,
        eval_dataset=raw.validation,
        processing_class=extractor,
        data_collator=JetCollator(extractor, "training data", data_args.pad_to_multiple_of),
        callbacks=callbacks,
        optimizer_cls_and_kwargs=None if is_lion else optimizer,
        **kwargs,
    )
    # the loss needs no labels by that name
    trainer.can_return_loss = True
    trainer.evaluation_collator = JetCollator(extractor, "validation data")
    if is_lion:
        trainer.lion = {"betas": optimizer[1]["betas"]}
    trainer.head_lr_factor = set_args.head_lr_factor
    trainer.new_layers = getattr(model, "new_weights", ()) or NEW_LAYERS
    trainer.card = {
        "script": script,
        "auto_class": auto_class,
        "processor_class": "AutoFeatureExtractor",
        "data": describe_data(data_args),
        "datasets": data_args.dataset_name,
    }
    return trainer


def read_jet_files(patterns: list[str] | str, option: str, extractor: Any) -> dict[str, list]:
    """
    Columns of Parquet files that the extractor reads.

    Raises:
        ValueError: naming option, file and column.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, list] = {}
    for path in find_files(patterns, option):
        try:
            names = pq.read_schema(path).names
            wanted = wanted_columns(extractor, names)
            table = pq.read_table(path, columns=wanted)
        except InputError as error:
            raise InputError(f"--{option}: {path}: {error}") from None
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"--{option}: {path}: {str(error).splitlines()[0]}") from None
        if columns and set(columns) != set(wanted):
            odd = sorted(set(wanted) ^ set(columns))[0]
            raise InputError(f"--{option}: {path}: column {odd} is not in all files")
        for name in wanted:
            columns.setdefault(name, []).extend(table[name].to_pylist())
    return columns
