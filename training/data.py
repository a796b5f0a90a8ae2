"""Loading, tokenising and batching of physics records for the training scripts; the same for every family."""

import glob
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase, TrainingArguments
from transformers.utils import logging

logger = logging.get_logger(__name__)

IGNORE_INDEX = -100
BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".json": "json", ".jsonl": "json"}


class InputError(ValueError):
    """Wrong input of the user; the scripts print its one line instead of a traceback."""


@dataclass
class DataTrainingArguments:
    """Which records to train on and how to read them."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "Dataset on the Hub or local dataset folder; splits train, validation, test."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of that dataset."})
    train_file: list[str] | None = field(
        default=None,
        metadata={"help": "Training records: files, folders or glob patterns (Parquet, Arrow, JSON), one or several."},
    )
    validation_file: list[str] | None = field(default=None, metadata={"help": "Validation records, as --train_file."})
    test_file: list[str] | None = field(
        default=None, metadata={"help": "Records to predict with --do_predict, as --train_file."}
    )
    validation_split_percentage: float = field(
        default=5.0, metadata={"help": "Share of the training records to hold out if there is no validation set."}
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "Read the training records as an endless shuffled stream; needs --max_steps."},
    )
    shuffle_buffer_size: int = field(default=10_000, metadata={"help": "Records in the shuffle buffer of a stream."})
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Use only so many training records: a random sample, of a stream the first."}
    )
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only so many validation records."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Predict only so many records."})
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes for tokenising."})
    preprocessing_batch_size: int = field(default=1000, metadata={"help": "Records tokenised at once."})
    overwrite_cache: bool = field(default=False, metadata={"help": "Tokenise again even if a cached result exists."})
    tokenizer_kwargs: str | None = field(
        default=None,
        metadata={
            "help": "Arguments of every tokenizer call, as name=value,... or JSON; for example "
            "on_invalid=drop_tracks,truncation=true."
        },
    )
    pad_to_multiple_of: int | None = field(
        default=None, metadata={"help": "Round batch lengths up, for example 64 with --torch_compile."}
    )
    pad_to_max_length: bool = field(default=False, metadata={"help": "Pad every batch to the longest length."})


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def parse_assignments(text: str | Mapping | None, option: str) -> dict[str, Any]:
    """`name=value,...`, a JSON object or a mapping to a dict; values are read as YAML (numbers, true, lists, null).

    Raises:
        InputError: `text` is none of these; names `option`.
    """
    import yaml

    if text is None:
        return {}
    if isinstance(text, Mapping):
        return dict(text)
    try:
        if text.lstrip().startswith("{"):
            return dict(yaml.safe_load(text))
        # commas inside brackets belong to the value
        pairs = [part for part in re.split(r",(?![^\[(]*[\])])", text) if part.strip()]
        values = dict(pair.split("=", 1) for pair in pairs)
        return {name.strip(): _scalar(yaml.safe_load(value)) for name, value in values.items()}
    except (ValueError, TypeError, yaml.YAMLError):
        raise InputError(f"--{option}: expected name=value,... or a JSON object, got {text!r}") from None


def _scalar(value: Any) -> Any:
    # YAML 1.1 takes 1e-3 for a string
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        return float(value)
    return value


def find_files(patterns: list[str] | str, option: str, split: str | None = None) -> list[str]:
    """
    Files, folders and glob patterns to a sorted list of data files.

    Args:
        split: in a folder that has files `<split>-*`, only these are taken.

    Raises:
        InputError: something does not exist, or has no supported format; names `option`.
    """
    files = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        path = Path(pattern)
        if path.is_dir():
            found = sorted(str(file) for file in path.rglob("*") if file.suffix in BUILDERS and file.is_file())
            of_split = [file for file in found if split is not None and Path(file).name.startswith(f"{split}-")]
            found = of_split or found
            if not found:
                raise InputError(f"--{option}: folder {pattern} has no {', '.join(BUILDERS)} file")
        elif path.is_file():
            found = [str(path)]
        else:
            found = sorted(file for file in glob.glob(pattern, recursive=True) if Path(file).is_file())
            if not found:
                raise InputError(f"--{option}: no file {pattern}")
        files += found
    formats = {BUILDERS.get(Path(file).suffix) for file in files}
    if len(formats) != 1 or None in formats:
        odd = next((file for file in files if Path(file).suffix not in BUILDERS), files[0])
        raise InputError(f"--{option}: {odd}: expected files of one format out of {', '.join(BUILDERS)}")
    return files


def load_split(
    data_args: DataTrainingArguments,
    split: str,
    option: str,
    model_args: Any = None,
    streaming: bool = False,
    columns: Sequence[str] | None = None,
) -> Any:
    """
    One split as `datasets.Dataset` or, streaming, `datasets.IterableDataset`; None if the arguments name none.

    Args:
        columns: of Parquet files, read only these; the files may differ in others.

    Raises:
        InputError: the data cannot be found or read.
    """
    import datasets

    files = getattr(data_args, option)
    common = {"streaming": streaming, "cache_dir": getattr(model_args, "cache_dir", None)}
    if files is not None:
        files = find_files(files, option, split)
        where = f"--{option}"
        load = {"path": BUILDERS[Path(files[0]).suffix], "data_files": files, "split": "train"}
        if columns is not None and load["path"] == "parquet":
            load["columns"] = list(columns)
    elif data_args.dataset_name is not None:
        where = f"--dataset_name {data_args.dataset_name}"
        load = {
            "path": data_args.dataset_name,
            "name": data_args.dataset_config_name,
            "split": split,
            "token": getattr(model_args, "token", None),
            "revision": None,
        }
        try:
            names = datasets.get_dataset_split_names(
                data_args.dataset_name, data_args.dataset_config_name, token=load["token"]
            )
        except Exception as error:
            raise InputError(f"{where}: {_first_line(error)}") from error
        if split not in names:
            return None
    else:
        return None
    try:
        dataset = datasets.load_dataset(**load, **common)
        if streaming:
            first = next(iter(dataset), None)
            if first is None:
                raise InputError(f"{where}: the {split} data has no rows")
    except InputError:
        raise
    except Exception as error:  # pyarrow, json and the network have exceptions of their own
        raise InputError(f"{where}: cannot read the {split} data: {_first_line(error)}") from error
    if not streaming and len(dataset) == 0:
        raise InputError(f"{where}: the {split} data has no rows")
    return dataset


def _first_line(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


@dataclass
class RawDatasets:
    train: Any = None
    validation: Any = None
    test: Any = None


def load_raw_datasets(
    data_args: DataTrainingArguments,
    training_args: TrainingArguments,
    model_args: Any = None,
    columns: Sequence[str] | None = None,
    repeat: bool = True,
) -> RawDatasets:
    """
    The record datasets that the run needs.

    The training data is a stream if asked for. Validation and test data never are: ranks that evaluate must have
    the same number of batches.

    Args:
        columns: see `load_split`.
        repeat: make the stream endless. Not before rows are dropped: a pass without any left would never end.

    Raises:
        InputError: data is missing or unreadable.
    """
    raw = RawDatasets()
    seed = training_args.data_seed if training_args.data_seed is not None else training_args.seed
    if training_args.do_train:
        if data_args.streaming and training_args.max_steps <= 0:
            raise InputError("--streaming: a stream has no end, set --max_steps")
        raw.train = load_split(data_args, "train", "train_file", model_args, data_args.streaming, columns)
        if raw.train is None:
            raise InputError("--do_train: no training data, set --train_file or a --dataset_name with a train split")
    if training_args.do_eval or training_args.eval_strategy != "no":
        raw.validation = load_split(data_args, "validation", "validation_file", model_args, columns=columns)
        if raw.validation is None:
            if raw.train is None or data_args.streaming:
                reason = "a stream is not split" if data_args.streaming else "no data"
                raise InputError(f"--do_eval: {reason}, set --validation_file")
            size = round(len(raw.train) * data_args.validation_split_percentage / 100)
            if not 0 < size < len(raw.train):
                raise InputError(
                    f"--validation_split_percentage: {data_args.validation_split_percentage:g} % of "
                    f"{len(raw.train)} training rows are {size} rows, expected at least 1 and not all"
                )
            parts = raw.train.train_test_split(test_size=size, seed=seed)
            raw.train, raw.validation = parts["train"], parts["test"]
    if training_args.do_predict:
        raw.test = load_split(data_args, "test", "test_file", model_args, columns=columns)
        if raw.test is None:
            raise InputError("--do_predict: no data, set --test_file or a --dataset_name with a test split")
    for name, limit in (
        ("train", data_args.max_train_samples),
        ("validation", data_args.max_eval_samples),
        ("test", data_args.max_predict_samples),
    ):
        dataset = getattr(raw, name)
        if dataset is not None and limit is not None:
            if limit < 1:
                raise InputError(f"max samples of the {name} data is {limit}, expected at least 1")
            if isinstance(dataset, torch.utils.data.IterableDataset):
                dataset = dataset.take(limit)
            elif limit < len(dataset):
                # files are often sorted by species or energy: the first rows would not be a fair sample
                chosen = np.random.default_rng(seed).choice(len(dataset), size=limit, replace=False)
                dataset = dataset.select(np.sort(chosen))
            setattr(raw, name, dataset)
    if data_args.streaming and raw.train is not None:
        if repeat:
            raw.train = endless(raw.train, data_args, training_args)
        # Every rank reads its own shards; batches of different length cannot be dispatched from rank 0.
        if training_args.accelerator_config.dispatch_batches is None:
            training_args.accelerator_config.dispatch_batches = False
    return raw


def endless(stream: Any, data_args: DataTrainingArguments, training_args: TrainingArguments) -> Any:
    """
    The stream, repeated and shuffled: in this order, so that every pass has its own; endless, so that ranks with fewer
    or smaller shards keep step with the others.
    """
    seed = training_args.data_seed if training_args.data_seed is not None else training_args.seed
    return stream.repeat(None).shuffle(seed=seed, buffer_size=data_args.shuffle_buffer_size)


# ---------------------------------------------------------------------------------------------------------------------
# Tokenising
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Encoder:
    """
    The function for `datasets.map(batched=True, with_indices=True)`: records to model inputs.

    Args:
        name: what the rows are called in errors ("train data").
        tokenizer_kwargs: arguments of the tokenizer call.
        keep: record columns that are passed through.
        prepare: applied to the columns before the tokenizer.
    """

    tokenizer: PreTrainedTokenizerBase
    name: str
    tokenizer_kwargs: dict[str, Any] = field(default_factory=dict)
    keep: tuple[str, ...] = ()
    prepare: Callable[[dict, list[int]], dict] | None = None

    def __call__(self, columns: Mapping, indices: list[int]) -> dict[str, Any]:
        columns = dict(columns)
        try:
            if self.prepare is not None:
                columns = self.prepare(columns, indices)
            kwargs = dict(self.tokenizer_kwargs)
            if self.keep:
                kwargs["return_row_index"] = True
            encoded = dict(self.tokenizer(columns, **kwargs))
        except (ValueError, TypeError) as error:
            # the tokenizer counts the rows of this batch
            line = re.sub(r"\brow (\d+)", lambda match: f"row {indices[int(match[1])]}", str(error), count=1)
            raise InputError(f"{self.name}: {line}") from error
        if self.keep:
            rows = np.asarray(encoded.pop("row_index"))
            encoded.update({name: [columns[name][row] for row in rows] for name in self.keep})
            encoded["row_index"] = [indices[row] for row in rows]
        return encoded


def describe_dropped(reasons: Mapping[str, int]) -> str:
    """Counts by reason, in brackets; nothing if there are none."""
    return f" ({', '.join(f'{reason} x {number}' for reason, number in reasons.items())})" if reasons else ""


@dataclass
class StreamEncoder:
    """
    An `Encoder` for the passes of an endless stream, which ends one that has no usable row: it would be read forever.

    The rows of every pass count from 0 (in a process that reads a part of the files, those of its part).
    """

    encoder: Encoder
    rows: int = 0
    kept: int = 0
    dropped_before: Counter = field(default_factory=Counter)

    def __call__(self, columns: Mapping, indices: list[int]) -> dict[str, Any]:
        dropped = Counter(getattr(self.encoder.tokenizer, "dropped", ()))
        if indices[0] == 0:
            if self.rows and not self.kept:
                raise InputError(
                    f"{self.encoder.name}: all {self.rows} rows of a pass over the stream were dropped as invalid"
                    f"{describe_dropped(dropped - self.dropped_before)}"
                )
            self.rows, self.kept, self.dropped_before = 0, 0, dropped
        encoded = self.encoder(columns, indices)
        self.rows += len(indices)
        self.kept += len(next(iter(encoded.values())))
        return encoded


def encode_dataset(
    dataset: Any, encoder: Encoder, data_args: DataTrainingArguments, training_args: TrainingArguments
) -> Any:
    """
    Tokenised dataset: cached on disk, or, of a stream, endless and tokenised on the way.

    Raises:
        InputError: a row cannot be tokenised (a stream raises it when it gets there), or none is left.
    """
    arguments: dict[str, Any] = {
        "batched": True,
        "with_indices": True,
        "batch_size": data_args.preprocessing_batch_size,
        # a stream may not know its columns before it is read
        "remove_columns": dataset.column_names or list(next(iter(dataset))),
    }
    if hasattr(type(encoder.tokenizer), "vqvae") and encoder.tokenizer_kwargs.get("return_input_ids", True):
        # loaded now, its weights enter the fingerprint of the cache: the same folder may hold another network later
        try:
            _ = encoder.tokenizer.vqvae
        except ValueError as error:
            raise InputError(str(error)) from error
    if isinstance(dataset, torch.utils.data.IterableDataset):
        return endless(dataset.map(StreamEncoder(encoder), **arguments), data_args, training_args)
    dropped_before = Counter(getattr(encoder.tokenizer, "dropped", ()))
    with training_args.main_process_first(desc=f"tokenising the {encoder.name}"):
        encoded = dataset.map(
            encoder,
            num_proc=data_args.preprocessing_num_workers,
            load_from_cache_file=not data_args.overwrite_cache,
            desc=f"Tokenising the {encoder.name}",
            **arguments,
        )
    dropped = len(dataset) - len(encoded)
    if dropped:
        logger.warning(f"{encoder.name}: {dropped} of {len(dataset)} rows dropped as invalid")
    if len(encoded) == 0:
        reasons = Counter(getattr(encoder.tokenizer, "dropped", ())) - dropped_before
        raise InputError(f"{encoder.name}: all {len(dataset)} rows were dropped as invalid{describe_dropped(reasons)}")
    return encoded


# ---------------------------------------------------------------------------------------------------------------------
# Batching
# ---------------------------------------------------------------------------------------------------------------------


def causal_labels(
    input_ids: torch.LongTensor, attention_mask: torch.LongTensor, prefix_length: int = 1
) -> torch.LongTensor:
    """
    Labels for next-token prediction, at their own position: the ids, -100 at padding (of either side) and at the first
    `prefix_length` real positions, which are never predicted.

    Args:
        input_ids: (batch, length) or (batch, length, streams). attention_mask: (batch, length), 1 = real.
    """
    rank = attention_mask.cumsum(dim=1)
    never = (attention_mask == 0) | (rank <= prefix_length)
    return input_ids.masked_fill(never if input_ids.ndim == 2 else never.unsqueeze(-1), IGNORE_INDEX)


@dataclass
class PaddingCollator:
    """
    Pads tokenised records to one batch of tensors by `tokenizer.pad`.

    Args:
        rename: keys to rename, for example `{"class_ids": "labels"}`.
        drop: keys to leave out.
    """

    tokenizer: PreTrainedTokenizerBase
    pad_to_multiple_of: int | None = None
    pad_to_max_length: bool = False
    rename: dict[str, str] = field(default_factory=dict)
    drop: tuple[str, ...] = ()

    def __call__(self, features: list[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        if self.rename or self.drop:
            features = [
                {self.rename.get(name, name): value for name, value in feature.items() if name not in self.drop}
                for feature in features
            ]
        batch = self.tokenizer.pad(
            features,
            padding="max_length" if self.pad_to_max_length else "longest",
            pad_to_multiple_of=self.pad_to_multiple_of,
            return_tensors="pt",
        )
        batch = dict(batch)
        if self.tokenizer.padding_side == "left" and "position_ids" not in batch:
            batch["position_ids"] = (batch["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
        return batch


@dataclass
class DataCollatorForCausalPhysics(PaddingCollator):
    """
    Pads and adds `labels` for next-token prediction unless the tokenizer gave them.

    Positions in front of the first target (conditioning slots, start of sequence) are counted by
    `tokenizer.prefix_length`, 1 if the tokenizer has no such attribute. `tokenizer.untrained_token_ids`, one per
    stream, are no targets (what a delayed stream holds before and after its hits).
    """

    def __call__(self, features: list[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        batch = super().__call__(features)
        if "labels" not in batch:
            prefix_length = getattr(self.tokenizer, "prefix_length", 1)
            batch["labels"] = causal_labels(batch["input_ids"], batch["attention_mask"], prefix_length)
            untrained = getattr(self.tokenizer, "untrained_token_ids", None)
            if untrained is not None:
                is_untrained = batch["input_ids"] == torch.tensor(untrained)
                batch["labels"] = batch["labels"].masked_fill(is_untrained, IGNORE_INDEX)
        return batch


# ---------------------------------------------------------------------------------------------------------------------
# Heads: track labels and noise labels
# ---------------------------------------------------------------------------------------------------------------------


def scalar_columns(dataset: Any) -> tuple[str, ...]:
    """Columns of a record dataset with one number or text per row (momentum, angle, PDG code ...)."""
    from datasets import Value

    return tuple(name for name, feature in dataset.features.items() if isinstance(feature, Value))


@dataclass
class DarkNoise:
    """
    Adds dark counts to DIRC records and labels them (`is_noise`), as arXiv:2505.08736 makes the training data of its
    noise filter.

    The paper draws noise in [0, 100) ns and loses what is before the first time bin; here it is drawn in the part of
    the window that the tokenizer can hold, which is the same at these rates.

    Args:
        tokenizer: gives geometry and time range.
        scale: factor on the dark rate of 28 kHz per PMT.
        window: of the noise, ns.
        seed: together with the numbers given to the call, seeds the draws.
    """

    tokenizer: PreTrainedTokenizerBase
    scale: float = 100.0
    window: tuple[float, float] = (0.0, 100.0)
    seed: int = 0

    def __post_init__(self):
        start = max(self.window[0], self.tokenizer.time_min)
        stop = min(self.window[1], self.tokenizer.time_max)
        if not start < stop:
            raise InputError(
                f"the noise window {self.window[0]:g} to {self.window[1]:g} ns is outside the times of the tokenizer, "
                f"{self.tokenizer.time_min:g} to {self.tokenizer.time_max:g} ns"
            )
        if not self.scale >= 0:
            raise InputError(f"the noise scale is {self.scale}, expected at least 0")
        self.window = (start, stop)

    def __call__(self, rows: Any, *numbers: int) -> Any:
        """`rows` in their form, with noise; the same `numbers` give the same noise."""
        from hepzoo.tokenization.noise_dirc import add_dark_noise

        start, stop = self.window
        return add_dark_noise(
            rows,
            geometry=self.tokenizer.detector,
            rng=np.random.default_rng([self.seed, *numbers]),
            scale=self.scale,
            window_start_ns=start,
            window_ns=stop - start,
        )


@dataclass
class DarkNoiseCollator:
    """
    Records to a batch of the noise filter, with fresh noise in every pass over the data.

    The noise depends on seed, rank, pass and the first row of the batch only, so that a resumed run draws what the
    uninterrupted one would have.

    Args:
        noise: `None` leaves the records as they are (they have `is_noise`).
        row_column: column with the number of the row.
    """

    tokenizer: PreTrainedTokenizerBase
    noise: DarkNoise | None
    tokenizer_kwargs: dict[str, Any] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None
    pad_to_max_length: bool = False
    rank: int = 0
    row_column: str = "row"
    name: str = "training data"

    def __post_init__(self):
        # shared with the worker processes of a data loader
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        self.epoch.fill_(epoch)

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        rows = [feature[self.row_column] for feature in features]
        records = [{name: value for name, value in feature.items() if name != self.row_column} for feature in features]
        try:
            if self.noise is not None:
                records = self.noise(records, self.rank, int(self.epoch), rows[0])
            batch = self.tokenizer(
                records,
                padding="max_length" if self.pad_to_max_length else "longest",
                pad_to_multiple_of=self.pad_to_multiple_of,
                return_tensors="pt",
                return_hit_labels=True,
                return_class_ids=False,
                **self.tokenizer_kwargs,
            )
        except (ValueError, TypeError) as error:
            line = re.sub(r"\brow (\d+)", lambda match: f"row {rows[int(match[1])]}", str(error), count=1)
            raise InputError(f"{self.name}: {line}") from error
        return dict(batch)
