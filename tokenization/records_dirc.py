"""Reading of DIRC records in whatever form they come: a list of dicts, a dict of columns, or one dict.

A record is one charged track under the names of the FM4DIRC data files (arXiv 2505.08736): P [GeV/c], Theta and Phi
[degrees], PDG (or PID), NHits, and the hit lists pmtID, pixelID, channel, leadTime [ns], x, y [mm].
"""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np

HIT_FIELDS = ("pmtID", "pixelID", "leadTime")
_NUMBERS = (int, float, np.integer, np.floating, type(None))


def rows_to_columns(rows: Any) -> tuple[dict[str, Sequence], int, bool]:
    """Brings records into columns.

    Args:
        rows: a list of record dicts, a dict of columns (as `datasets.map(batched=True)` passes), or one record dict.

    Returns:
        (columns, number of rows, whether `rows` was one record). Of a list of records, every field that the first
        record has must be in all.

    Raises:
        ValueError: `rows` is none of these, columns differ in length, or a record lacks a field.
    """
    if isinstance(rows, Mapping):
        columns = {name: rows[name] for name in rows}
        if not columns:
            raise ValueError("rows: an empty dict holds no track; expected a record, a dict of columns or a list")
        if _is_record(columns):
            return {name: [value] for name, value in columns.items()}, 1, True
        lengths = {}
        for name, values in columns.items():
            try:
                lengths[name] = len(values)
            except TypeError:
                raise ValueError(f"column {name}: expected one value per row, got {short_repr(values)}") from None
        first, count = next(iter(lengths.items()))
        for name, length in lengths.items():
            if length != count:
                raise ValueError(f"columns differ in length: {first} has {count} rows, {name} has {length}")
        return columns, count, False
    if isinstance(rows, (str, bytes)) or not hasattr(rows, "__iter__"):
        raise ValueError(
            f"rows: expected a record dict, a list of records or a dict of columns, got {type(rows).__name__}"
        )
    rows = list(rows)
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise ValueError(f"row {index}: expected a record dict, got {type(row).__name__}")
    columns = {}
    for name in rows[0] if rows else ():
        try:
            columns[name] = [row[name] for row in rows]
        except KeyError:
            index = next(i for i, row in enumerate(rows) if name not in row)
            raise ValueError(f"row {index}: field {name} is missing (row 0 has it)") from None
    for index, row in enumerate(rows):
        if len(row) != len(columns):
            name = next(name for name in row if name not in columns)
            if name in (*HIT_FIELDS, "P", "Theta", "Phi", "PDG", "PID", "NHits", "is_noise"):
                raise ValueError(f"row 0: field {name} is missing (row {index} has it)")
    return columns, len(rows), False


def _is_record(columns: Mapping) -> bool:
    for name in ("P", "Theta", "Phi", "NHits", "PDG", "PID"):
        if name in columns:
            return np.ndim(columns[name]) == 0
    for name in HIT_FIELDS:
        if name in columns:
            values = columns[name]
            return len(values) == 0 or np.ndim(values[0]) == 0
    return all(np.ndim(value) == 0 for value in columns.values() if not isinstance(value, (list, tuple)))


def short_repr(value: Any, width: int = 60) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= width else text[: width - 3] + "..."


def to_numpy(value: Any) -> np.ndarray:
    """numpy view of an array, a list, or a torch tensor on any device."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
    return np.asarray(value)


def scalar_column(columns: Mapping, name: str, count: int) -> np.ndarray:
    """One number per row as float64 (count,); null becomes NaN.

    Raises:
        ValueError: the column is missing, or a value is not a number.
    """
    if name not in columns:
        raise ValueError(f"column {name} is missing; the rows have {', '.join(sorted(map(str, columns))) or 'none'}")
    values = columns[name]
    array = to_numpy(values) if hasattr(values, "dtype") else None
    if array is not None and array.dtype.kind in "iuf" and array.shape == (count,):
        return array.astype(np.float64)
    result = np.empty(count, dtype=np.float64)
    for index, value in enumerate(values):
        if hasattr(value, "item") and np.ndim(value) == 0:
            value = value.item()
        if isinstance(value, bool) or not isinstance(value, _NUMBERS):
            raise ValueError(f"row {index}: {name} must be a number, got {short_repr(value)}")
        try:
            result[index] = np.nan if value is None else value
        except OverflowError:
            raise ValueError(f"row {index}: {name} is too large for a number, got {short_repr(value)}") from None
    return result


def list_column(columns: Mapping, name: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The lists of all rows end to end.

    Returns:
        (values float64 (total,), lengths int64 (count,)). Null entries become NaN.

    Raises:
        ValueError: the column is missing, or a row is not a flat list of numbers.
    """
    if name not in columns:
        raise ValueError(f"column {name} is missing; the rows have {', '.join(sorted(map(str, columns))) or 'none'}")
    values = columns[name]
    if isinstance(values, np.ndarray) and values.ndim == 2 and values.dtype.kind in "iuf":
        return values.astype(np.float64).ravel(), np.full(count, values.shape[1], dtype=np.int64)
    values = list(values)
    if all(type(row) is list or type(row) is tuple for row in values):
        lengths = np.fromiter(map(len, values), dtype=np.int64, count=count)
        kinds = set(map(type, chain.from_iterable(values)))
        if kinds <= {int, float}:
            try:
                return np.fromiter(chain.from_iterable(values), dtype=np.float64, count=int(lengths.sum())), lengths
            except OverflowError:
                pass
    arrays = []
    for index, row in enumerate(values):
        if hasattr(row, "dtype"):
            array = to_numpy(row)
            if array.ndim == 1 and array.dtype.kind in "iuf":
                arrays.append(array)
                continue
            if array.ndim == 1 and array.dtype == object:
                row = list(array)
        if not isinstance(row, (list, tuple)):
            raise ValueError(f"row {index}: {name} must be a flat list of numbers, got {short_repr(row)}")
        array = np.empty(len(row), dtype=np.float64)
        for position, value in enumerate(row):
            if isinstance(value, bool) or not isinstance(value, _NUMBERS):
                raise ValueError(f"row {index}: {name}[{position}] must be a number, got {short_repr(value)}")
            try:
                array[position] = np.nan if value is None else value
            except OverflowError:
                raise ValueError(f"row {index}: {name}[{position}] is too large, got {short_repr(value)}") from None
        arrays.append(array)
    lengths = np.fromiter(map(len, arrays), dtype=np.int64, count=count)
    # float64 holds every id and every float32 time exactly.
    flat = np.concatenate(arrays, dtype=np.float64, casting="unsafe") if arrays else np.empty(0)
    return flat, lengths


def pdg_column(columns: Mapping) -> str | None:
    """Name of the column with the PDG code (`PDG`, or `PID` as generated FM4DIRC records call it), None if absent."""
    return next((name for name in ("PDG", "PID") if name in columns), None)


def _segment_extremes(flat: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Minimum and maximum per row; NaN for empty rows and for rows with a NaN."""
    low = np.full(len(lengths), np.nan)
    high = np.full(len(lengths), np.nan)
    filled = lengths > 0
    if filled.any():
        starts = (np.cumsum(lengths) - lengths)[filled]
        low[filled] = np.minimum.reduceat(flat, starts)
        high[filled] = np.maximum.reduceat(flat, starts)
    return low, high


def fiducial_cut(
    rows: Any,
    p_range: tuple[float, float] = (0.5, 10.0),
    theta_range: tuple[float, float] = (25.0, 160.0),
    hits_range: tuple[float, float] = (5, 250),
    time_range: tuple[float, float] = (9.0, 157.0),
) -> np.ndarray:
    """The track selection of FM4DIRC's data sets (arXiv 2505.08736). Every bound is strict.

    Args:
        rows: records (list, dict of columns, or one record).
        p_range: momentum, GeV/c.
        theta_range: polar angle, degrees.
        hits_range: number of hits; the recorded `NHits` counts, and the list length only where there is none.
        time_range: bounds on the earliest and on the latest `leadTime` of the track, ns.

    Returns:
        `np.ndarray` of bool, shape (number of rows,): True = keep. NaN anywhere and empty tracks are False.
    """
    columns, count, _ = rows_to_columns(rows)
    if not count:
        return np.zeros(0, dtype=bool)
    momentum = scalar_column(columns, "P", count)
    theta = scalar_column(columns, "Theta", count)
    times, lengths = list_column(columns, "leadTime", count)
    hits = scalar_column(columns, "NHits", count) if "NHits" in columns else lengths
    earliest, latest = _segment_extremes(times, lengths)
    keep = (momentum > p_range[0]) & (momentum < p_range[1])
    keep &= (theta > theta_range[0]) & (theta < theta_range[1])
    keep &= (hits > hits_range[0]) & (hits < hits_range[1])
    return keep & (earliest > time_range[0]) & (latest < time_range[1])
