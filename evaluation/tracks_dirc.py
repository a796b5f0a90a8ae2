"""Flat, validated arrays of DIRC tracks: what every observable and plot of this room works on.

Rows come as a list of records, one record, a dict of columns (lists or arrays), a `datasets.Dataset`, or a
pyarrow table; files as Parquet. The record is documented in `hepzoo.data_scripts.dirc_schema`: P [GeV/c],
Theta and Phi [deg], PDG (or PID), NHits, and per hit pmtID, pixelID, leadTime [ns], x, y [mm].
"""

import glob
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from hepzoo.tokenization.geometry_dirc import DircGeometry

SPECIES = {"pion": 211, "kaon": 321}
_HIT_COLUMNS = ("pmtID", "pixelID", "leadTime", "x", "y")
_REQUIRED = ("P", "Theta", "pmtID", "pixelID", "leadTime")
_OPTIONAL = ("Phi", "PDG", "PID", "x", "y", "NHits")


@dataclass(frozen=True)
class DircTracks:
    """Tracks in flat arrays. `n` tracks, `h` hits in total; hits of track `i` are `offsets[i]:offsets[i + 1]`.

    Attributes:
        momentum (`np.ndarray` of shape `(n,)`): momentum, GeV/c.
        theta (`np.ndarray` of shape `(n,)`): polar angle, degrees.
        phi (`np.ndarray` of shape `(n,)`): azimuth, degrees (0 where the rows have none).
        pdg (`np.ndarray` of shape `(n,)`): PDG code, 0 where the rows have none.
        offsets (`np.ndarray` of shape `(n + 1,)`): first hit of every track, and the total.
        pmt, pixel (`np.ndarray` of shape `(h,)`): sensor and pixel number.
        x, y (`np.ndarray` of shape `(h,)`): pixel centre, mm.
        time (`np.ndarray` of shape `(h,)`): arrival time, ns.
    """

    momentum: np.ndarray
    theta: np.ndarray
    phi: np.ndarray
    pdg: np.ndarray
    offsets: np.ndarray
    pmt: np.ndarray
    pixel: np.ndarray
    x: np.ndarray
    y: np.ndarray
    time: np.ndarray

    def __len__(self) -> int:
        return len(self.momentum)

    @property
    def num_hits(self) -> np.ndarray:
        """Photons of every track, shape `(n,)`."""
        return np.diff(self.offsets)

    @property
    def hits(self) -> np.ndarray:
        """All hits as `(h, 3)` float64: x [mm], y [mm], time [ns]."""
        return np.stack([self.x, self.y, self.time], axis=1)

    def select(self, which: np.ndarray) -> "DircTracks":
        """The tracks of a boolean mask of shape `(n,)` or of an array of track numbers, in that order."""
        which = np.asarray(which)
        index = np.flatnonzero(which) if which.dtype == bool else which.astype(np.int64)
        counts = self.num_hits[index]
        offsets = np.concatenate([[0], np.cumsum(counts)])
        hit_index = np.arange(offsets[-1]) + np.repeat(self.offsets[index] - offsets[:-1], counts)
        per_hit = {"pmt", "pixel", "x", "y", "time"}
        changed = {
            f.name: getattr(self, f.name)[hit_index if f.name in per_hit else index]
            for f in fields(self)
            if f.name != "offsets"
        }
        return replace(self, offsets=offsets, **changed)

    def species(self, name: str) -> "DircTracks":
        """The tracks of one species, `"pion"` or `"kaon"`, both charges."""
        if name not in SPECIES:
            raise ValueError(f"species must be one of {', '.join(SPECIES)}, got {name!r}")
        return self.select(np.abs(self.pdg) == SPECIES[name])

    def at(
        self,
        momentum: tuple[float, float] | float | None = None,
        theta: tuple[float, float] | float | None = None,
        tolerance: float = 1e-3,
    ) -> "DircTracks":
        """The tracks within closed ranges of momentum [GeV/c], theta [deg]; one number = that value +- `tolerance`."""
        mask = np.ones(len(self), bool)
        for values, wanted in ((self.momentum, momentum), (self.theta, theta)):
            if wanted is None:
                continue
            low, high = wanted if isinstance(wanted, tuple) else (wanted - tolerance, wanted + tolerance)
            mask &= (values >= low) & (values <= high)
        return self.select(mask)

    @staticmethod
    def concatenate(parts: Sequence["DircTracks"]) -> "DircTracks":
        """All tracks of several sets, in order."""
        if not parts:
            raise ValueError("no tracks to concatenate: the list of parts is empty")
        joined = {
            f.name: np.concatenate([getattr(p, f.name) for p in parts])
            for f in fields(DircTracks)
            if f.name != "offsets"
        }
        counts = np.concatenate([p.num_hits for p in parts])
        return DircTracks(offsets=np.concatenate([[0], np.cumsum(counts)]), **joined)


def _columns(rows: Any) -> dict[str, Any]:
    """Columns of any accepted kind of rows, not yet checked."""
    if hasattr(rows, "with_format") and hasattr(rows, "column_names"):  # datasets.Dataset
        rows = rows.with_format("arrow")[:]
    if hasattr(rows, "column_names") and hasattr(rows, "column"):  # pyarrow.Table
        return {name: rows.column(name) for name in rows.column_names}
    if isinstance(rows, Mapping):
        columns = dict(rows)
        if "P" in columns and np.ndim(columns["P"]) == 0:
            return {name: [value] for name, value in columns.items()}
        return columns
    rows = list(rows)
    if not rows:
        raise ValueError("no tracks: the list of rows is empty")
    names = [name for name in (*_REQUIRED, *_OPTIONAL) if name in rows[0]]
    for i, row in enumerate(rows):
        missing = [name for name in names if name not in row]
        if missing:
            raise ValueError(f"row {i}: column {missing[0]!r} is missing (row 0 has it)")
    return {name: [row[name] for row in rows] for name in names}


def _scalars(column: Any, name: str) -> np.ndarray:
    if hasattr(column, "combine_chunks"):
        column = column.combine_chunks().to_numpy(zero_copy_only=False)
    try:
        values = np.asarray(column, dtype=np.float64)
    except (TypeError, ValueError) as err:
        raise ValueError(f"column {name!r}: expected one number per row ({err})") from None
    if values.ndim != 1:
        raise ValueError(f"column {name!r}: expected one number per row, got an array of shape {values.shape}")
    return values


def _lists(column: Any, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Flat values and counts of a column of lists."""
    if hasattr(column, "combine_chunks"):
        array = column.combine_chunks()
        if array.null_count:
            row = int(np.flatnonzero(array.is_null().to_numpy(zero_copy_only=False))[0])
            raise ValueError(f"row {row}: {name!r} is null, expected a list")
        counts = array.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
        return array.flatten().to_numpy(zero_copy_only=False), counts
    parts = [np.asarray(value) for value in column]
    for i, part in enumerate(parts):
        if part.ndim != 1:
            raise ValueError(f"row {i}: {name!r} must be a list of numbers, got shape {part.shape}")
    counts = np.array([len(part) for part in parts], dtype=np.int64)
    filled = [part for part in parts if len(part)]
    flat = np.concatenate(filled) if filled else np.zeros(0)
    if flat.dtype.kind not in "iuf":
        raise ValueError(f"column {name!r}: expected numbers, got {flat.dtype}")
    return flat, counts


def _row_of(hit: int, offsets: np.ndarray) -> int:
    return int(np.searchsorted(offsets, hit, side="right") - 1)


def as_tracks(rows: Any, geometry: DircGeometry | None = None) -> DircTracks:
    """Checks rows and lays them out flat.

    Args:
        rows: list of records, one record, dict of columns, `datasets.Dataset`, pyarrow table, or `DircTracks`.
        geometry (`DircGeometry`, *optional*): sensor plane, to check sensor and pixel numbers and to compute x and y
            where the rows have none. Default: the hpDIRC.

    Raises:
        ValueError: a column is missing, lists of one row differ in length, `NHits` disagrees with the lists, a time
            or a coordinate is not finite, or a sensor or pixel number is out of range. The message names the row.
    """
    if isinstance(rows, DircTracks):
        return rows
    geometry = DircGeometry() if geometry is None else geometry
    columns = _columns(rows)
    missing = [name for name in _REQUIRED if name not in columns]
    if missing:
        raise ValueError(
            f"column {missing[0]!r} is missing; a DIRC track needs {', '.join(_REQUIRED)} (found: "
            f"{', '.join(map(str, columns)) or 'nothing'})"
        )
    scalars = {name: _scalars(columns[name], name) for name in ("P", "Theta")}
    n = len(scalars["P"])
    if n == 0:
        raise ValueError("no tracks: the rows are empty")
    for name in ("Phi", "PDG", "PID", "NHits"):
        if name in columns:
            scalars[name] = _scalars(columns[name], name)
    for name, values in scalars.items():
        if len(values) != n:
            raise ValueError(f"column {name!r} has {len(values)} rows, column 'P' has {n}")
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            raise ValueError(f"row {bad[0]}: {name} is {values[bad[0]]}, expected a finite number")
    lists, counts = {}, None
    for name in _HIT_COLUMNS:
        if name not in columns:
            continue
        lists[name], lengths = _lists(columns[name], name)
        if len(lengths) != n:
            raise ValueError(f"column {name!r} has {len(lengths)} rows, column 'P' has {n}")
        if counts is None:
            counts = lengths
        bad = np.flatnonzero(lengths != counts)
        if len(bad):
            raise ValueError(
                f"row {bad[0]}: {name} has {lengths[bad[0]]} hits, pmtID has {counts[bad[0]]}: expected equal lengths"
            )
    if "NHits" in scalars:
        bad = np.flatnonzero(scalars["NHits"] != counts)
        if len(bad):
            raise ValueError(
                f"row {bad[0]}: NHits is {scalars['NHits'][bad[0]]:g}, the lists hold {counts[bad[0]]} hits"
            )
    offsets = np.concatenate([[0], np.cumsum(counts)])
    for name, size in (("pmtID", geometry.num_pmts * geometry.num_boxes), ("pixelID", geometry.pixels_per_pmt)):
        values = lists[name]
        wrong = ~((values >= 0) & (values < size))
        if values.dtype.kind == "f":
            wrong |= values != np.floor(values)
        bad = np.flatnonzero(wrong)
        if len(bad):
            raise ValueError(
                f"row {_row_of(bad[0], offsets)}: {name} is {values[bad[0]]}, expected an integer in 0..{size - 1}"
            )
        lists[name] = values.astype(np.int64)
    lists["pmtID"] = lists["pmtID"] % geometry.num_pmts  # further readout boxes are folded onto the first
    if "x" not in lists or "y" not in lists:
        lists["x"], lists["y"] = geometry.pixel_center(lists["pmtID"], lists["pixelID"])
    for name in ("leadTime", "x", "y"):
        values = np.asarray(lists[name], dtype=np.float64)
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            unit = "ns" if name == "leadTime" else "mm"
            raise ValueError(
                f"row {_row_of(bad[0], offsets)}: {name} is {values[bad[0]]}, expected a finite number of {unit}"
            )
        lists[name] = values
    pdg = scalars["PDG"] if "PDG" in scalars else scalars.get("PID", np.zeros(n))
    return DircTracks(
        momentum=scalars["P"],
        theta=scalars["Theta"],
        phi=scalars.get("Phi", np.zeros(n)),
        pdg=pdg.astype(np.int64),
        offsets=offsets,
        pmt=lists["pmtID"],
        pixel=lists["pixelID"],
        x=lists["x"],
        y=lists["y"],
        time=lists["leadTime"],
    )


def expand_paths(paths: str | Path | Iterable[str | Path]) -> list[Path]:
    """Parquet files named by files, folders (searched recursively) and glob patterns, sorted, each once."""
    found: list[Path] = []
    for item in [paths] if isinstance(paths, (str, Path)) else list(paths):
        path = Path(item)
        if path.is_dir():
            files = sorted(path.rglob("*.parquet"))
        elif path.is_file():
            files = [path]
        else:
            files = sorted(Path(name) for name in glob.glob(str(item), recursive=True) if Path(name).is_file())
        if not files:
            raise ValueError(f"no Parquet file found at {str(item)!r}")
        found += files
    return list(dict.fromkeys(found))


def read_tracks(
    paths: str | Path | Iterable[str | Path],
    geometry: DircGeometry | None = None,
    max_tracks: int | None = None,
) -> DircTracks:
    """Reads tracks from Parquet files, folders or glob patterns (`PID` is accepted for `PDG`).

    Args:
        paths: files, folders or patterns.
        geometry (`DircGeometry`, *optional*): see `as_tracks`.
        max_tracks (`int`, *optional*): stop after that many tracks of every file (a file often holds one species).
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    parts = []
    for path in expand_paths(paths):
        try:
            file = pq.ParquetFile(path)
            wanted = [name for name in (*_REQUIRED, *_OPTIONAL) if name in file.schema_arrow.names]
            groups, rows = [], 0
            for number in range(file.num_row_groups):
                if max_tracks is not None and rows >= max_tracks:
                    break
                groups.append(number)
                rows += file.metadata.row_group(number).num_rows
            table = file.read_row_groups(groups, columns=wanted)
        except (pa.ArrowException, OSError) as err:
            first = str(err).strip().splitlines()
            raise ValueError(f"{path}: not a readable Parquet file ({first[0] if first else err})") from None
        if max_tracks is not None:
            table = table.slice(0, max_tracks)
        try:
            parts.append(as_tracks(table, geometry))
        except ValueError as err:
            raise ValueError(f"{path}: {err}") from None
    return DircTracks.concatenate(parts)
