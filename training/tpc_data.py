"""TPC events for the training scripts: feature extractor, lengths, and batches extracted on the way."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoFeatureExtractor, PreTrainedConfig, TrainingArguments
from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING
from transformers.utils import logging

from hepzoo.training.common import ModelArguments
from hepzoo.training.data import DataTrainingArguments, InputError, RawDatasets, endless, parse_assignments

logger = logging.get_logger(__name__)

POINT_COLUMNS = ("E", "x", "y", "z")
# what is learned -> (column of the events, labels of the feature extractor, argument of the model), one or several
TARGETS = {
    "neighbors": ((None, "neighbor_labels", "neighbor_labels"),),
    "tracks": (("track_id", "track_labels", "track_labels"),),
    "joint": (
        ("track_id", "track_labels", "track_labels"),
        ("pid", "pid_labels", "true_pid"),
        ("noise", "noise_labels", "true_noise"),
    ),
    "pid": (("pid", "pid_labels", "labels"),),
    "noise": (("noise", "noise_labels", "labels"),),
}
# shorter remainders of an event are no window
SHORTEST_WINDOW = 50


@dataclass
class TpcArguments:
    """The model's size by the paper's name, and the feature extractor."""

    paper_size: str | None = field(
        default=None,
        metadata={"help": "From scratch: size by the paper's name, m1 (0.34 million) to m6 (188 million)."},
    )
    feature_extractor_name: str | None = field(
        default=None,
        metadata={"help": "Feature extractor folder or Hub name. Default: that of the model, else a new one."},
    )
    feature_extractor_overrides: str | None = field(
        default=None,
        metadata={
            "help": "Arguments of the feature extractor, name=value,... or JSON: order=hilbert,bin_edges=edges.json."
        },
    )
    bin_edges_events: int | None = field(
        default=None,
        metadata={
            "help": "Compute the bin edges of the raster orders from so many training events, of a new extractor."
        },
    )
    drop_long_events: bool = field(
        default=False,
        metadata={"help": "Leave out events with more points than the extractor's max_points, counted, not an error."},
    )


# ---------------------------------------------------------------------------------------------------------------------
# Configuration and feature extractor
# ---------------------------------------------------------------------------------------------------------------------


def load_tpc_config(model_args: ModelArguments, tpc_args: TpcArguments) -> PreTrainedConfig:
    """
    Configuration of the model to train: of a checkpoint, of a file, or from scratch (family fm4npp by default).

    Raises:
        InputError: it cannot be read, or options exclude each other.
    """
    for option in ("tokenizer_name", "tokenizer_overrides"):
        if getattr(model_args, option) is not None:
            raise InputError(f"--{option}: these models have a feature extractor, set --feature_extractor_name")
    overrides = parse_assignments(model_args.config_overrides, "config_overrides")
    source = next((n for n in ("model_name_or_path", "config_name") if getattr(model_args, n)), "model_type")
    name = getattr(model_args, source) or "fm4npp"
    try:
        if source != "model_type":
            config = AutoConfig.from_pretrained(name, **model_args.hub_kwargs(), **overrides)
        elif tpc_args.paper_size is None:
            config = AutoConfig.for_model(name, **overrides)
        else:
            config = type(AutoConfig.for_model(name)).from_paper_size(tpc_args.paper_size, **overrides)
    except (ValueError, OSError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        raise InputError(f"--{source} {name}: {' '.join(str(error).split())}") from error
    # the settings of a first training, from a file, may be those of its continuation
    if source != "model_type" and tpc_args.paper_size not in (None, getattr(config, "paper_size", None)):
        raise InputError(f"--paper_size: --{source} has a size already")
    unknown = sorted(set(overrides) - set(type(config)().to_dict()))
    if unknown:
        raise InputError(f"--config_overrides: {type(config).__name__} has no {unknown[0]}")
    if type(config) not in FEATURE_EXTRACTOR_MAPPING:
        raise InputError(f"--{source} {name}: model type {config.model_type!r} does not read TPC events")
    return config


def load_feature_extractor(
    model_args: ModelArguments, tpc_args: TpcArguments, config: PreTrainedConfig, events: Any = None
) -> Any:
    """
    `--feature_extractor_name`, else the extractor saved with the model, else a new one that fits `config`.

    Args:
        events: training data, for `--bin_edges_events`.

    Raises:
        InputError: it cannot be loaded or made, has no bin edges and needs some, or does not fit the model.
    """
    overrides = parse_assignments(tpc_args.feature_extractor_overrides, "feature_extractor_overrides")
    name = tpc_args.feature_extractor_name or model_args.model_name_or_path
    try:
        if name is not None:
            extractor = AutoFeatureExtractor.from_pretrained(name, **model_args.hub_kwargs(), **overrides)
        else:
            kind = FEATURE_EXTRACTOR_MAPPING[type(config)]
            extractor = kind(**{"num_neighbors": config.num_neighbors, **overrides})
        if tpc_args.bin_edges_events is not None:
            if name is not None:
                raise InputError(f"--bin_edges_events: the bin edges are those of {name}")
            if events is None or tpc_args.bin_edges_events < 1:
                raise InputError("--bin_edges_events: expected at least 1, and training data to compute them from")
            rows = [dict(event) for event in events.take(tpc_args.bin_edges_events)]
            extractor.compute_bin_edges(rows)
            logger.info(f"bin edges from {len(rows)} training events")
        # says how to make the edges, if the order needs some
        extractor({column: [[50.0]] for column in POINT_COLUMNS}, return_neighbor_labels=False)
    except InputError:
        raise
    except (ValueError, OSError, TypeError, KeyError) as error:
        raise InputError(f"feature extractor: {' '.join(str(error).split())}") from error
    if extractor.num_neighbors != config.num_neighbors:
        raise InputError(
            f"the feature extractor does not fit the model: num_neighbors is {extractor.num_neighbors}, the model has "
            f"{config.num_neighbors}"
        )
    return extractor


# ---------------------------------------------------------------------------------------------------------------------
# Events
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class ShortEvents:
    """
    Filter of a stream: whether an event has at most `max_points` points. Ends a pass that has no such event: an endless
    stream would be read forever.
    """

    max_points: int
    events: int = 0
    kept: int = 0

    def __call__(self, record: Mapping[str, Any]) -> bool:
        if record["row"] == 0:
            if self.events and not self.kept:
                raise InputError(f"no event of {self.events} in the stream has at most {self.max_points} points")
            self.events = self.kept = 0
        is_short = len(record["E"]) <= self.max_points
        self.events += 1
        self.kept += is_short
        return is_short


def prepare_events(
    raw: RawDatasets,
    target: str,
    extractor: Any,
    data_args: DataTrainingArguments,
    training_args: TrainingArguments,
    drop_long: bool = False,
) -> None:
    """
    Keeps the columns that `target` needs, in place, and adds `row`, and `num_points` for
    `--train_sampling_strategy group_by_length`. Lists become arrays, a stream to train on becomes endless.

    Args:
        target: of `TARGETS`.
        drop_long: leave out events of more than `extractor.max_points` points.

    Raises:
        InputError: a column is missing, or no event is left.
    """
    needed = [*POINT_COLUMNS, *(column for column, _, _ in TARGETS[target] if column is not None)]
    for split in ("train", "validation"):
        dataset = getattr(raw, split)
        if dataset is None:
            continue
        available = dataset.column_names or list(next(iter(dataset)))
        missing = [name for name in needed if name not in available]
        if missing:
            raise InputError(f"{split} data: column {missing[0]!r} is missing (found: {', '.join(available)})")
        dataset = dataset.select_columns(needed)
        if isinstance(dataset, torch.utils.data.IterableDataset):
            dataset = dataset.map(lambda record, index: {"row": index}, with_indices=True)
            if drop_long:
                dataset = dataset.filter(ShortEvents(extractor.max_points))
            if split == "train":
                dataset = endless(dataset, data_args, training_args)
        else:
            lengths = _num_points(dataset)
            dataset = dataset.add_column("row", np.arange(len(dataset))).add_column("num_points", lengths)
            long = lengths > extractor.max_points
            if drop_long and long.any():
                logger.warning(
                    f"{split} data: {long.sum()} of {len(dataset)} events have more than {extractor.max_points} points "
                    "and are left out"
                )
                dataset = dataset.select(np.flatnonzero(~long))
            if len(dataset) == 0:
                raise InputError(f"{split} data: no event has at most {extractor.max_points} points")
        setattr(raw, split, dataset.with_format("numpy"))


def _num_points(dataset: Any) -> np.ndarray:
    """Points of every event, int64 (events,); only one column is read."""
    import pyarrow.compute as pc

    energies = dataset.select_columns(["E"]).with_format("arrow")
    lengths = [pc.list_value_length(table["E"]).to_numpy() for table in energies.iter(batch_size=1000)]
    return np.concatenate(lengths).astype(np.int64)


def renumber_row(error: Exception, rows: Sequence[int]) -> str:
    """The message of an error that counts the rows of a batch, with the numbers `rows` that these have in the data."""
    return re.sub(r"\brow (\d+)", lambda match: f"row {rows[int(match[1])]}", str(error), count=1)


@dataclass
class TpcCollator:
    """
    Events to a padded batch of `points`, `attention_mask` and the labels of `target`, extracted on the way.

    Args:
        extractor: `Fm4nppFeatureExtractor`.
        target: of `TARGETS`.
        name: what the events are called in errors.
        pad_to_multiple_of: rounds lengths up, for example with `--torch_compile`.
        window (`int`, *optional*): most points of a sequence (published as `chunk_training`). Of a longer event one
            window is drawn, or all are taken, one after the other, with `all_windows`. Labels are those of the whole
            event: a neighbour may lie outside of the window.
    """

    extractor: Any
    target: str
    name: str = "data"
    pad_to_multiple_of: int | None = None
    window: int | None = None
    all_windows: bool = False

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        try:
            encoded = self.extractor(features, padding=False, return_neighbor_labels=self.target == "neighbors")
        except ValueError as error:
            rows = [int(feature["row"]) for feature in features]
            raise InputError(f"{self.name}: {renumber_row(error, rows)}") from error
        if self.window is not None:
            spans = [self.windows(len(points)) for points in encoded["points"]]
            encoded = {
                name: [value[span] for value, cuts in zip(values, spans, strict=True) for span in cuts]
                for name, values in encoded.items()
            }
        padded = self.extractor.pad(encoded, pad_to_multiple_of=self.pad_to_multiple_of, return_tensors="pt")
        labels = {argument: padded[name] for _, name, argument in TARGETS[self.target]}
        return {"points": padded["points"], "attention_mask": padded["attention_mask"], **labels}

    def windows(self, length: int) -> list[slice]:
        """What is taken of an event of `length` points: a window that starts anywhere, or all windows in a row."""
        if length <= self.window:
            return [slice(0, length)]
        if self.all_windows:
            starts = range(0, length, self.window)
            return [slice(start, start + self.window) for start in starts if length - start > SHORTEST_WINDOW]
        start = int(torch.randint(max(length - SHORTEST_WINDOW, 0) + 1, ()))
        return [slice(start, start + self.window)]
