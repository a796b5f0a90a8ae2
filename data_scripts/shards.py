"""Sharded Parquet, written so that either a whole split appears or nothing."""

import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, List, Value


class ShardWriter:
    """Writes rows to `<directory>/<split>-00000-of-000NN.parquet`, the layout `datasets` and the Hub expect.

    Used as a context manager. Memory stays at about one shard. The files take their names when the block ends; if it
    ends by an exception, nothing is left behind. Read them with
    `load_dataset("parquet", data_files=f"{directory}/{split}-*.parquet", streaming=True)`.

    Args:
        directory: created if needed.
        features: `datasets.Features`; the rows must have exactly these columns.
        split: first part of the file names.
        rows_per_shard: rows of each file but the last.
        row_group_size: rows of a Parquet row group, the unit of streaming.
        overwrite: replaces files of the same split instead of refusing.

    Raises:
        ValueError: the split exists already, or rows do not fit the features.

    Example:
        >>> with ShardWriter("data", DIRC_FEATURES, split="train") as writer:
        ...     writer.write(records)
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        features: Features,
        split: str = "train",
        rows_per_shard: int = 5000,
        row_group_size: int = 1000,
        overwrite: bool = False,
    ):
        if not re.fullmatch(r"\w[\w.]*", split):
            raise ValueError(f"split must be a plain name of letters, digits, '_' and '.', got {split!r}")
        for name, value in (("rows_per_shard", rows_per_shard), ("row_group_size", row_group_size)):
            if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        self.directory = Path(directory)
        self.features = features
        self.split = split
        self.rows_per_shard = int(rows_per_shard)
        self.row_group_size = int(row_group_size)
        self.overwrite = overwrite
        self.num_rows = 0
        self.paths: list[Path] = []
        self._schema = features.arrow_schema
        self._buffer: list[pa.Table] = []
        self._buffered = 0
        self._temporary: Path | None = None
        self._parts: list[Path] = []

    def __enter__(self) -> "ShardWriter":
        if self.directory.exists() and not self.directory.is_dir():
            raise ValueError(f"{self.directory} is a file; expected a directory for the shards")
        existing = self._existing()
        if existing and not self.overwrite:
            raise ValueError(
                f"{self.directory} already holds split {self.split!r} ({existing[0].name}); "
                "choose another directory or split, or overwrite"
            )
        self._made_directory = not self.directory.exists()
        self.directory.mkdir(parents=True, exist_ok=True)
        # A hidden folder: data files in it are not picked up by load_dataset.
        self._temporary = Path(tempfile.mkdtemp(prefix=f".{self.split}-", dir=self.directory))
        return self

    def __exit__(self, kind, error, trace):
        try:
            if kind is None:
                self._finish()
        finally:
            shutil.rmtree(self._temporary, ignore_errors=True)
            if not self.paths and self._made_directory and not any(self.directory.iterdir()):
                self.directory.rmdir()

    def write(self, rows: Any) -> int:
        """Adds rows.

        Args:
            rows: list of record dicts, dict of columns (one list or array per feature), or one record dict.

        Returns:
            `int`: how many rows were added.

        Raises:
            ValueError: a column is missing or unknown, lengths differ, or a value does not fit its type.
        """
        if self._temporary is None or not self._temporary.exists():
            raise ValueError("ShardWriter is closed; write inside its `with` block")
        columns = self._columns(rows)
        arrays, count = [], None
        for name, feature in self.features.items():
            array = _to_arrow(columns[name], feature, name)
            count = len(array) if count is None else count
            if len(array) != count:
                first = next(iter(self.features))
                raise ValueError(f"columns differ in length: {first} has {count} rows, {name} has {len(array)}")
            arrays.append(array)
        if count:
            self._buffer.append(pa.Table.from_arrays(arrays, schema=self._schema))
            self._buffered += count
            self.num_rows += count
        while self._buffered >= self.rows_per_shard:
            self._flush(self.rows_per_shard)
        return count or 0

    def _columns(self, rows: Any) -> Mapping:
        if isinstance(rows, Mapping):
            first = next(iter(self.features))
            if first in rows and _is_one_value(rows[first], self.features[first]):
                rows = {name: [value] for name, value in rows.items()}
            columns = rows
        else:
            rows = list(rows)
            for index, row in enumerate(rows):
                if not isinstance(row, Mapping):
                    raise ValueError(f"row {index}: expected a record dict, got {type(row).__name__}")
                self._check_names(row, f"row {index}: ")
            columns = {name: [row[name] for row in rows] for name in self.features}
        self._check_names(columns, "")
        return columns

    def _check_names(self, found: Mapping, place: str):
        if found.keys() == self.features.keys():
            return
        for name in self.features:
            if name not in found:
                raise ValueError(f"{place}column {name} is missing; expected {', '.join(self.features)}")
        unknown = next(name for name in found if name not in self.features)
        raise ValueError(f"{place}column {unknown} is not in the features; expected {', '.join(self.features)}")

    def _flush(self, size: int):
        table = pa.concat_tables(self._buffer)
        path = self._temporary / f"part-{len(self._parts):05d}.parquet"
        pq.write_table(table.slice(0, size), path, row_group_size=self.row_group_size, compression="zstd")
        self._parts.append(path)
        rest = table.slice(size)
        self._buffered = rest.num_rows
        # A copy, so that the written rows are freed.
        self._buffer = [pa.Table.from_batches(rest.to_batches(), schema=self._schema)] if rest.num_rows else []

    def _existing(self) -> list[Path]:
        pattern = re.compile(rf"{re.escape(self.split)}-\d{{5,}}-of-\d{{5,}}\.parquet")
        if not self.directory.is_dir():
            return []
        return sorted(path for path in self.directory.iterdir() if pattern.fullmatch(path.name))

    def _finish(self):
        # An empty split still gets one file, so that its schema can be read.
        if self._buffered or not self._parts:
            self._buffer = self._buffer or [self._schema.empty_table()]
            self._flush(max(self._buffered, 1))
        existing = self._existing()
        if existing and not self.overwrite:
            raise ValueError(f"{self.directory}: {existing[0].name} appeared while this split was being written")
        # Old shards step aside first: a mixture of old and new files would read as one split.
        aside = self._temporary / "replaced"
        aside.mkdir()
        moved, named = [], []
        try:
            for path in existing:
                os.replace(path, aside / path.name)
                moved.append(path)
            for index, part in enumerate(self._parts):
                final = self.directory / f"{self.split}-{index:05d}-of-{len(self._parts):05d}.parquet"
                os.replace(part, final)
                named.append(final)
        except BaseException:
            for path in named:
                path.unlink(missing_ok=True)
            for path in moved:
                os.replace(aside / path.name, path)
            raise
        self.paths = named


def _is_one_value(value: Any, feature: Any) -> bool:
    """Whether `value` is the entry of one row rather than a column."""
    if isinstance(feature, Value):
        return isinstance(value, (str, bytes)) or np.ndim(value) == 0
    if isinstance(feature, List) and isinstance(feature.feature, Value):
        return len(value) > 0 and np.ndim(value[0]) == 0
    return False


def _to_arrow(values: Any, feature: Any, name: str) -> pa.Array:
    """A column as arrow array of the feature's type; integers are never wrapped or rounded."""
    try:
        if isinstance(feature, Value) and _is_numeric(feature):
            return _numbers(np.asarray(values), feature, name)
        if isinstance(feature, List) and isinstance(feature.feature, Value) and _is_numeric(feature.feature):
            if isinstance(values, np.ndarray) and values.ndim == 2:
                lengths = np.full(len(values), values.shape[1])
                flat = values.ravel()
            else:
                arrays = [np.asarray(row) for row in values]
                for index, array in enumerate(arrays):
                    if array.ndim != 1 or (array.size and array.dtype.kind not in "iufb"):
                        raise ValueError(f"row {index}: column {name} must be a flat list of numbers")
                lengths = np.fromiter(map(len, arrays), dtype=np.int64, count=len(arrays))
                arrays = [array for array in arrays if array.size]
                flat = np.concatenate(arrays) if arrays else np.empty(0, dtype=np.int64)
            offsets = np.concatenate([[0], np.cumsum(lengths)])
            if offsets[-1] > np.iinfo(np.int32).max:
                raise ValueError(f"column {name}: {offsets[-1]} list entries at once; write fewer rows at a time")
            flat = _numbers(flat, feature.feature, name)
            return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), flat, type=pa.list_(flat.type))
        part = Dataset.from_dict({name: list(values)}, features=Features({name: feature})).data.column(0)
        return part.combine_chunks() if part.num_chunks != 1 else part.chunk(0)
    except (pa.ArrowInvalid, pa.ArrowTypeError, TypeError, OverflowError) as error:
        raise ValueError(f"column {name} does not fit {feature}: {str(error).splitlines()[0]}") from None


def _is_numeric(value: Value) -> bool:
    return value.dtype.startswith(("int", "uint", "float")) and value.dtype != "float16"


def _numbers(array: np.ndarray, value: Value, name: str) -> pa.Array:
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iufb"):
        raise ValueError(f"column {name} must be numbers for {value.dtype}, got dtype {array.dtype} {array.shape}")
    target = np.dtype(value.dtype)
    if target.kind in "iu" and array.size:
        limits = np.iinfo(target)
        bad = ~((array >= limits.min) & (array <= limits.max))
        if array.dtype.kind == "f":
            bad |= array != np.floor(array)
        if bad.any():
            raise ValueError(
                f"column {name}: {array[bad][0]} does not fit {value.dtype}, integers {limits.min}..{limits.max}"
            )
    if target == np.float32 and array.dtype.kind == "f" and array.dtype.itemsize > 4:
        # Infinities may be stored, but must not be made by rounding.
        bad = np.isfinite(array) & (np.abs(array) > np.finfo(np.float32).max)
        if bad.any():
            raise ValueError(f"column {name}: {array[bad][0]:g} is too large for float32")
    return pa.array(array.astype(target, copy=False))
