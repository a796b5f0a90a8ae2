"""Calorimeter showers as flat, validated arrays, and their observables.

A shower is a record of `incident_energy` [GeV] and, per hit, the cell indices `x`, `y`, `z` (z = layer, 0 = front) and
the `energy` [MeV]; further columns are ignored. Rows come as a list of records, one record, a dict of columns (lists
or arrays), a `datasets.Dataset` or a pyarrow table; files as Parquet. Files are read in batches, and `observe_files`
keeps only what is computed per shower, so the number of hits does not limit the size of a sample.

The definitions are those of arXiv:2005.05334 (observables, cut at half a MIP, correlations) and arXiv:2606.11304.
Lengths are in cells and layers, counted from 0, so that the centre of a grid of 30 cells is 14.5.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from hepzoo.evaluation.tracks_dirc import expand_paths

GRID = (30, 30, 30)  # cells in x, cells in y, layers
CUT = 0.1  # MeV, half a MIP
MIP = 0.2  # MeV, most probable energy of a minimum-ionising particle in 0.525 mm of silicon
START_THRESHOLD = 0.4  # MeV in one layer: two MIPs, as of the electron and the positron of a converted photon

# name -> (what it is, unit)
OBSERVABLES = {
    "visible_energy": ("visible energy", "MeV"),
    "energy_ratio": ("visible / incident energy", ""),
    "num_hits": ("number of hits", ""),
    "mean_hit_energy": ("mean cell energy", "MeV"),
    "max_fraction": ("hottest cell / visible energy", ""),
    "cog_x": ("centre of gravity x", "cells"),
    "cog_y": ("centre of gravity y", "cells"),
    "cog_z": ("centre of gravity z", "layers"),
    "width_x": ("width x", "cells"),
    "width_y": ("width y", "cells"),
    "width_z": ("width z", "layers"),
    "width_r": ("width r", "cells"),
    "r50": ("radius of 50 % of the energy", "cells"),
    "r90": ("radius of 90 % of the energy", "cells"),
    "start_layer": ("start layer", "layers"),
    "hottest_layer": ("layer of the hottest cell", "layers"),
    "front_fraction": ("energy in the first third of the layers", ""),
    "middle_fraction": ("energy in the second third", ""),
    "back_fraction": ("energy in the last third", ""),
    "duplicates": ("hits in an already hit cell", ""),
}
PROFILES = {
    "energy_per_layer": ("energy per layer", "layers"),
    "hits_per_layer": ("hits per layer", "layers"),
    "radial_profile": ("radial energy profile", "cells"),
    "cell_energy": ("cell energy spectrum", "log10 MeV"),
}
CORRELATED = (
    "cog_x", "cog_y", "cog_z", "moment_x", "moment_y", "moment_z", "visible_energy", "incident_energy", "num_hits",
    "front_fraction", "middle_fraction", "back_fraction",
)  # fmt: skip
_HITS = ("x", "y", "z", "energy")


@dataclass(frozen=True)
class Showers:
    """Showers in flat arrays. `n` showers, `h` hits in total; hits of shower `i` are `offsets[i]:offsets[i + 1]`.

    Attributes:
        incident_energy (`np.ndarray` of shape `(n,)`): energy of the incident particle, GeV.
        offsets (`np.ndarray` of shape `(n + 1,)`): first hit of every shower, and the total.
        x, y, z (`np.ndarray` of shape `(h,)`): cell indices, z = layer.
        energy (`np.ndarray` of shape `(h,)`): cell energy, MeV.
        grid (`tuple[int, int, int]`): number of cells in x, of cells in y, and of layers.
    """

    incident_energy: np.ndarray
    offsets: np.ndarray
    x: np.ndarray
    y: np.ndarray
    z: np.ndarray
    energy: np.ndarray
    grid: tuple[int, int, int] = GRID

    def __len__(self) -> int:
        return len(self.incident_energy)

    @property
    def num_hits(self) -> np.ndarray:
        """Hits of every shower, shape `(n,)`."""
        return np.diff(self.offsets)

    @cached_property
    def owner(self) -> np.ndarray:
        """Number of the shower of every hit, shape `(h,)`."""
        return np.repeat(np.arange(len(self)), self.num_hits)

    def total(self, values: np.ndarray) -> np.ndarray:
        """Sum of a per-hit quantity over every shower, shape `(n,)`."""
        return np.bincount(self.owner, values, len(self))

    def select(self, which: np.ndarray) -> "Showers":
        """The showers of a boolean mask of shape `(n,)` or of an array of shower numbers, in that order."""
        which = np.asarray(which)
        index = np.flatnonzero(which) if which.dtype == bool else which.astype(np.int64)
        counts = self.num_hits[index]
        offsets = np.concatenate([[0], np.cumsum(counts)])
        hits = np.arange(offsets[-1]) + np.repeat(self.offsets[index] - offsets[:-1], counts)
        return replace(
            self,
            incident_energy=self.incident_energy[index],
            offsets=offsets,
            **{name: getattr(self, name)[hits] for name in _HITS},
        )

    def above(self, cut: float) -> "Showers":
        """The same showers with only the hits of more than `cut` MeV; showers may become empty."""
        keep = self.energy > cut
        offsets = np.concatenate([[0], np.cumsum(np.bincount(self.owner[keep], minlength=len(self)))])
        return replace(self, offsets=offsets, **{name: getattr(self, name)[keep] for name in _HITS})

    @staticmethod
    def concatenate(parts: Sequence["Showers"]) -> "Showers":
        """All showers of several sets of the same grid, in order."""
        if not parts:
            raise ValueError("no showers to concatenate: the list of parts is empty")
        if any(part.grid != parts[0].grid for part in parts):
            raise ValueError(f"showers of different grids: {sorted({part.grid for part in parts})}")
        offsets = np.concatenate([[0], np.cumsum(np.concatenate([part.num_hits for part in parts]))])
        joined = {name: np.concatenate([getattr(p, name) for p in parts]) for name in ("incident_energy", *_HITS)}
        return Showers(offsets=offsets, grid=parts[0].grid, **joined)


def _columns(rows: Any) -> dict[str, Any]:
    """Columns of any accepted kind of rows, not yet checked."""
    if hasattr(rows, "with_format") and hasattr(rows, "column_names"):  # datasets.Dataset
        rows = rows.with_format("arrow")[:]
    if hasattr(rows, "column_names") and hasattr(rows, "column"):  # pyarrow.Table
        return {name: rows.column(name) for name in rows.column_names}
    if isinstance(rows, Mapping):
        if np.ndim(rows.get("incident_energy", [])) == 0:
            rows = {name: [value] for name, value in rows.items()}
        return dict(rows)
    if isinstance(rows, (str, bytes)) or not isinstance(rows, Iterable):
        raise ValueError(f"expected records, a dict of columns or a data set, got {type(rows).__name__}")
    rows = list(rows)
    for i, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise ValueError(f"row {i}: expected a record, got {type(row).__name__}")
        missing = [name for name in ("incident_energy", *_HITS) if name not in row]
        if missing:
            raise ValueError(f"row {i}: column {missing[0]!r} is missing")
    return {name: [row[name] for row in rows] for name in ("incident_energy", *_HITS)}


def _flat(column: Any, name: str, first_row: int) -> tuple[np.ndarray, np.ndarray]:
    """Flat values and counts of a column of lists (pyarrow, 2-d array, or lists of numbers)."""
    if hasattr(column, "combine_chunks"):
        import pyarrow as pa

        array = column.combine_chunks()
        if not (pa.types.is_list(array.type) or pa.types.is_large_list(array.type)):
            raise ValueError(f"column {name!r} holds {array.type}, expected a list of numbers per row")
        if array.null_count:
            row = int(np.flatnonzero(array.is_null().to_numpy(zero_copy_only=False))[0])
            raise ValueError(f"row {first_row + row}: {name} is null, expected a list of numbers")
        counts = array.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
        flat = array.flatten().to_numpy(zero_copy_only=False)
    else:
        parts = [_array(value, f"row {first_row + i}: {name}") for i, value in enumerate(column)]
        counts = np.array([len(part) for part in parts], dtype=np.int64)
        filled = [part for part in parts if len(part)]
        flat = np.concatenate(filled) if filled else np.zeros(0)
    if len(flat) and flat.dtype.kind not in "iuf":
        raise ValueError(f"column {name!r} holds {flat.dtype}, expected numbers")
    return flat, counts


def _array(value: Any, where: str) -> np.ndarray:
    try:
        array = np.asarray(value)
    except ValueError:
        array = None
    if array is None or array.ndim != 1 or (len(array) and array.dtype.kind not in "iuf"):
        raise ValueError(f"{where} must be a list of numbers, got {type(value).__name__} {str(value)[:40]}")
    return array


def _incident(column: Any, first_row: int) -> np.ndarray:
    if hasattr(column, "combine_chunks"):
        import pyarrow as pa

        # numpy before 2.4 takes a list of one number for a number
        if pa.types.is_nested(column.type):
            raise ValueError(f"column 'incident_energy' holds {column.type}, expected one number per row")
        column = column.combine_chunks().to_numpy(zero_copy_only=False)
    try:
        values = np.asarray(column, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError("column 'incident_energy': expected one number per row") from None
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim != 1:
        raise ValueError(f"column 'incident_energy': expected one number per row, got shape {values.shape}")
    bad = np.flatnonzero(~(np.isfinite(values) & (values > 0)))
    if len(bad):
        raise ValueError(
            f"row {first_row + bad[0]}: incident_energy is {values[bad[0]]}, expected a positive number of GeV"
        )
    return values


def as_showers(rows: Any, grid: tuple[int, int, int] = GRID, first_row: int = 0) -> Showers:
    """Checks rows and lays them out flat.

    Args:
        rows: list of records, one record, dict of columns, `datasets.Dataset`, pyarrow table, or `Showers`.
        grid (`tuple[int, int, int]`): number of cells in x, of cells in y, and of layers.
        first_row (`int`): number of the first row in error messages.

    Raises:
        ValueError: a column is missing, lists of one row differ in length, a cell is not an integer inside the grid,
            an energy is negative or not finite, an incident energy is not positive. The message names row and field.
    """
    if isinstance(rows, Showers):
        return rows
    columns = _columns(rows)
    missing = [name for name in ("incident_energy", *_HITS) if name not in columns]
    if missing:
        raise ValueError(
            f"column {missing[0]!r} is missing; a shower needs incident_energy, x, y, z, energy (found: "
            f"{', '.join(map(str, columns)) or 'nothing'})"
        )
    incident = _incident(columns["incident_energy"], first_row)
    counts = None
    hits: dict[str, np.ndarray] = {}
    for name in _HITS:
        hits[name], lengths = _flat(columns[name], name, first_row)
        if len(lengths) != len(incident):
            raise ValueError(f"column {name!r} has {len(lengths)} rows, 'incident_energy' has {len(incident)}")
        counts = lengths if counts is None else counts
        bad = np.flatnonzero(lengths != counts)
        if len(bad):
            raise ValueError(
                f"row {first_row + bad[0]}: {name} has {lengths[bad[0]]} hits, x has {counts[bad[0]]}: expected "
                "equal lengths"
            )
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    def refuse(name: str, wrong: np.ndarray, expected: str) -> None:
        bad = np.flatnonzero(wrong)
        if len(bad):
            row = int(np.searchsorted(offsets, bad[0], side="right")) - 1
            where = f"row {first_row + row}: {name}[{bad[0] - offsets[row]}]"
            raise ValueError(f"{where} is {hits[name][bad[0]]}, expected {expected}")

    for name, size in zip("xyz", grid, strict=True):
        values = hits[name]
        refuse(name, ~((values >= 0) & (values < size)) | (values != np.floor(values)), f"an integer in 0..{size - 1}")
        hits[name] = values.astype(np.int32)
    refuse("energy", ~(np.isfinite(hits["energy"]) & (hits["energy"] >= 0)), "a number of MeV that is not negative")
    hits["energy"] = hits["energy"].astype(np.float64)
    return Showers(incident, offsets, grid=tuple(grid), **hits)


def iter_showers(
    paths: str | Path | Iterable[str | Path],
    grid: tuple[int, int, int] = GRID,
    energy_range: tuple[float, float] | None = None,
    max_showers: int | None = None,
    batch_size: int = 2000,
) -> Iterator[Showers]:
    """Showers of Parquet files, folders or glob patterns in batches.

    Args:
        energy_range (`tuple[float, float]`, *optional*): closed range of the incident energy, GeV.
        max_showers (`int`, *optional*): stop after so many showers (of the range) in all.
        batch_size (`int`): most showers at a time.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    left = max_showers
    for path in expand_paths(paths):
        row = 0
        try:
            file = pq.ParquetFile(path)
            wanted = [name for name in ("incident_energy", *_HITS) if name in file.schema_arrow.names]
            for batch in file.iter_batches(batch_size, columns=wanted):
                showers = as_showers(pa.Table.from_batches([batch]), grid, first_row=row)
                row += len(showers)
                if energy_range is not None:
                    energy = showers.incident_energy
                    showers = showers.select((energy >= energy_range[0]) & (energy <= energy_range[1]))
                if left is not None:
                    showers = showers.select(np.arange(min(left, len(showers))))
                    left -= len(showers)
                if len(showers):
                    yield showers
                if left == 0:
                    return
        except (pa.ArrowException, OSError) as err:
            raise ValueError(f"{path}: not a readable Parquet file ({(str(err).splitlines() or [err])[0]})") from None
        except ValueError as err:
            raise ValueError(f"{path}: {err}") from None


def read_showers(
    paths: str | Path | Iterable[str | Path],
    grid: tuple[int, int, int] = GRID,
    energy_range: tuple[float, float] | None = None,
    max_showers: int | None = None,
) -> Showers:
    """All showers of Parquet files, folders or glob patterns (arguments of `iter_showers`)."""
    parts = list(iter_showers(paths, grid, energy_range, max_showers))
    if not parts:
        raise ValueError(_nothing(paths, energy_range))
    return Showers.concatenate(parts)


def _nothing(paths: Any, energy_range: tuple[float, float] | None) -> str:
    names = str(paths) if isinstance(paths, (str, Path)) else ", ".join(map(str, paths))
    between = "" if energy_range is None else f" with {energy_range[0]:g} to {energy_range[1]:g} GeV"
    return f"{names}: no showers{between}"


# ---- observables of every shower, shape (n,) or (n, bins); `above` takes the hits below a cut away beforehand


def visible_energy(showers: Showers) -> np.ndarray:
    """Sum of the cell energies, MeV, shape `(n,)`."""
    return showers.total(showers.energy)


def _safe(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """The ratio, NaN where the denominator is 0."""
    return np.divide(numerator, denominator, out=np.full(len(numerator), np.nan), where=denominator > 0)


def center_of_gravity(showers: Showers) -> np.ndarray:
    """Energy-weighted mean cell index, shape `(n, 3)`: x, y, z; NaN for showers without energy."""
    total = visible_energy(showers)
    return np.stack([_safe(showers.total(showers.energy * getattr(showers, a)), total) for a in "xyz"], axis=1)


def central_moments(showers: Showers) -> np.ndarray:
    """Energy-weighted variances about the centre of gravity, shape `(n, 4)`: x, y, z, and r^2 = x^2 + y^2."""
    total, cog = visible_energy(showers), center_of_gravity(showers)
    squares = [(getattr(showers, a) - cog[showers.owner, i]) ** 2 for i, a in enumerate("xyz")]
    moments = [_safe(showers.total(showers.energy * square), total) for square in squares]
    return np.stack([*moments, moments[0] + moments[1]], axis=1)


def energy_per_layer(showers: Showers) -> np.ndarray:
    """Energy in every layer, MeV, shape `(n, layers)`."""
    return _binned(showers, showers.z, showers.grid[2], showers.energy)


def hits_per_layer(showers: Showers) -> np.ndarray:
    """Number of hits in every layer, shape `(n, layers)`."""
    return _binned(showers, showers.z, showers.grid[2])


def _binned(showers: Showers, bins: np.ndarray, number: int, weights: np.ndarray | None = None) -> np.ndarray:
    """Sum over the hits of every shower and bin, shape `(n, number)`."""
    flat = np.bincount(showers.owner * number + bins, weights, len(showers) * number)
    return flat.reshape(len(showers), number)


def radial_edges(grid: tuple[int, int, int] = GRID) -> np.ndarray:
    """24 rings of one cell as in arXiv:2005.05334; more where the corners of the grid are farther out."""
    corner = int(np.ceil(np.hypot((grid[0] - 1) / 2, (grid[1] - 1) / 2))) + 1
    return np.arange(max(24, corner) + 1.0)


def radial_profile(showers: Showers, center: tuple[float, float] | None = None) -> np.ndarray:
    """Energy in rings of one cell about a point, MeV, shape `(n, len(radial_edges(grid)) - 1)`.

    Args:
        center (`tuple[float, float]`, *optional*): x and y of the axis in cell units; default: centre of the grid.
            Energy farther out than the last ring is in the last ring.
    """
    x, y = ((showers.grid[0] - 1) / 2, (showers.grid[1] - 1) / 2) if center is None else center
    rings = len(radial_edges(showers.grid)) - 1
    radius = np.hypot(showers.x - x, showers.y - y)
    return _binned(showers, np.minimum(radius.astype(np.int64), rings - 1), rings, showers.energy)


def cell_energy_edges(highest: float = 30.0) -> np.ndarray:
    """70 logarithmic bins of 0.01 to 30 MeV, continued with the same width until `highest` MeV is inside."""
    width = np.log(30 / 0.01) / 70
    extra = max(int(np.ceil(np.log(highest / 30) / width)), 0) if highest > 30 else 0
    return 0.01 * np.exp(width * np.arange(71 + extra))


def cell_energy_spectrum(showers: Showers, edges: np.ndarray) -> np.ndarray:
    """Number of hits in bins of energy, shape `(n, len(edges) - 1)`; hits outside the edges are in the end bins."""
    bins = np.clip(np.searchsorted(edges, showers.energy, side="right") - 1, 0, len(edges) - 2)
    return _binned(showers, bins, len(edges) - 1)


def start_layer(showers: Showers, threshold: float = START_THRESHOLD) -> np.ndarray:
    """First layer with more than `threshold` MeV (default two MIPs), shape `(n,)`; NaN where there is none."""
    over = energy_per_layer(showers) > threshold
    return np.where(over.any(axis=1), over.argmax(axis=1), np.nan)


def _segment(reduce: np.ufunc, showers: Showers, values: np.ndarray) -> np.ndarray:
    """`np.maximum` or `np.minimum` of a per-hit quantity over every shower, NaN for empty showers."""
    result, some = np.full(len(showers), np.nan), showers.num_hits > 0
    if some.any():
        result[some] = reduce.reduceat(values, showers.offsets[:-1][some])
    return result


def hottest_hit(showers: Showers) -> tuple[np.ndarray, np.ndarray]:
    """Energy [MeV] and layer of the cell with the most energy (the front one of equals), NaN for empty showers."""
    energy = _segment(np.maximum, showers, showers.energy)
    hottest = showers.energy == energy[showers.owner]
    return energy, _segment(np.minimum, showers, np.where(hottest, showers.z, showers.grid[2]))


def containment_radius(showers: Showers, fractions: Sequence[float] = (0.5, 0.9)) -> np.ndarray:
    """Smallest distance to the centre of gravity in x, y that contains a fraction of the energy, in cells.

    Shape `(n, len(fractions))`; it is the distance of one of the hits. NaN for showers without energy.
    """
    cog = center_of_gravity(showers)[showers.owner]
    radius = np.hypot(showers.x - cog[:, 0], showers.y - cog[:, 1])
    order = np.lexsort((radius, showers.owner))
    radius, running = radius[order], np.cumsum(showers.energy[order])
    before = np.concatenate([[0.0], running])[showers.offsets[:-1]]
    total = visible_energy(showers)
    found = np.full((len(showers), len(fractions)), np.nan)
    some = total > 0
    for column, fraction in enumerate(fractions):
        # a relative 1e-9: sums that reach the fraction exactly must not miss it by rounding
        wanted = before[some] + fraction * total[some] * (1 - 1e-9)
        at = np.searchsorted(running, wanted)
        found[some, column] = radius[np.clip(at, showers.offsets[:-1][some], showers.offsets[1:][some] - 1)]
    return found


def duplicate_share(showers: Showers) -> np.ndarray:
    """Share of hits in a cell that an earlier hit of the shower has, shape `(n,)`; NaN for empty showers."""
    nx, ny, nz = showers.grid
    cell = np.sort(((showers.owner * nx + showers.x) * ny + showers.y) * nz + showers.z)
    again = cell[1:][cell[1:] == cell[:-1]] // (nx * ny * nz)
    return _safe(np.bincount(again, minlength=len(showers)).astype(float), showers.num_hits)


# ---- all observables of a sample


@dataclass(frozen=True)
class ShowerObservables:
    """What is known per shower of a sample of `n` showers.

    Attributes:
        incident_energy (`np.ndarray` of shape `(n,)`): GeV.
        scalars (`dict[str, np.ndarray]`): the `OBSERVABLES`, shape `(n,)`; NaN where a shower has none.
        profiles (`dict[str, np.ndarray]`): the `PROFILES`, shape `(n, bins)`, and `all_cell_energy`, the cell energy
            spectrum of all hits.
        edges (`dict[str, np.ndarray]`): bin edges of every profile, shape `(bins + 1,)`; layers have edges at halves.
        cut (`float`): MeV; hits at or below it count in `all_cell_energy` only.
    """

    incident_energy: np.ndarray
    scalars: dict[str, np.ndarray]
    profiles: dict[str, np.ndarray]
    edges: dict[str, np.ndarray]
    cut: float = CUT

    def __len__(self) -> int:
        return len(self.incident_energy)

    def select(self, which: np.ndarray) -> "ShowerObservables":
        """The showers of a mask or of an array of shower numbers."""
        return replace(
            self,
            incident_energy=self.incident_energy[which],
            scalars={name: values[which] for name, values in self.scalars.items()},
            profiles={name: values[which] for name, values in self.profiles.items()},
        )

    def correlations(self, max_showers: int = 30_000) -> np.ndarray:
        """Pearson correlation matrix of the quantities `CORRELATED`, NaN where one does not vary.

        Of the first `max_showers` showers for which all are defined; `moment_a` is the square of `width_a`.
        """
        known = {name: self.scalars[name] for name in CORRELATED if name in self.scalars}
        known |= {f"moment_{axis}": self.scalars[f"width_{axis}"] ** 2 for axis in "xyz"}
        known["incident_energy"] = self.incident_energy
        table = np.stack([known[name] for name in CORRELATED])
        table = table[:, np.isfinite(table).all(axis=0)][:, :max_showers]
        size = len(CORRELATED)
        if table.shape[1] < 3:
            return np.full((size, size), np.nan)
        centered = table - table.mean(axis=1, keepdims=True)
        spread = centered.std(axis=1)
        constant = spread <= 1e-9 * np.abs(table).max(axis=1)  # rounding alone makes the spread of equal values
        centered /= np.where(constant, np.nan, spread)[:, None]
        return centered @ centered.T / table.shape[1]

    @staticmethod
    def concatenate(parts: Sequence["ShowerObservables"]) -> "ShowerObservables":
        """All showers of several sets with the same edges, in order."""
        first = parts[0]
        joined = {
            f.name: {key: np.concatenate([getattr(p, f.name)[key] for p in parts]) for key in getattr(first, f.name)}
            for f in fields(first)
            if f.name in ("scalars", "profiles")
        }
        return replace(first, incident_energy=np.concatenate([p.incident_energy for p in parts]), **joined)


def observe(
    rows: Any,
    cut: float = CUT,
    start_threshold: float = START_THRESHOLD,
    grid: tuple[int, int, int] = GRID,
    center: tuple[float, float] | None = None,
) -> ShowerObservables:
    """All observables of showers.

    Args:
        rows: as `as_showers` takes them.
        cut (`float`): MeV; hits at or below it do not count (but in `all_cell_energy`).
        start_threshold (`float`): energy of the `start_layer`, MeV.
        grid (`tuple[int, int, int]`): number of cells in x, in y, and of layers.
        center (`tuple[float, float]`, *optional*): axis of the radial profile, see `radial_profile`.

    Returns:
        `ShowerObservables`: cell energies above 300 MeV are in the last bin of the spectrum.
    """
    everything = as_showers(rows, grid)
    showers = everything.above(cut)
    total, hits = visible_energy(showers), showers.num_hits.astype(float)
    cog, moments, layers = center_of_gravity(showers), central_moments(showers), energy_per_layer(showers)
    radii, (hottest, hottest_layer) = containment_radius(showers), hottest_hit(showers)
    scalars = {
        "visible_energy": total,
        "energy_ratio": total / (1000 * showers.incident_energy),
        "num_hits": hits,
        "mean_hit_energy": _safe(total, hits),
        "max_fraction": _safe(hottest, total),
        **{f"cog_{axis}": cog[:, i] for i, axis in enumerate("xyz")},
        **{f"width_{axis}": np.sqrt(moments[:, i]) for i, axis in enumerate("xyzr")},
        "r50": radii[:, 0],
        "r90": radii[:, 1],
        "start_layer": start_layer(showers, start_threshold),
        "hottest_layer": hottest_layer,
    }
    thirds = np.array_split(layers, 3, axis=1)
    for name, part in zip(("front_fraction", "middle_fraction", "back_fraction"), thirds, strict=True):
        scalars[name] = _safe(part.sum(axis=1), total)
    scalars["duplicates"] = duplicate_share(showers)
    energy_edges = cell_energy_edges(300.0)
    layer_edges = np.arange(showers.grid[2] + 1) - 0.5
    profiles = {
        "energy_per_layer": layers,
        "hits_per_layer": hits_per_layer(showers),
        "radial_profile": radial_profile(showers, center),
        "cell_energy": cell_energy_spectrum(showers, energy_edges),
        "all_cell_energy": cell_energy_spectrum(everything, energy_edges),
    }
    edges = {
        "energy_per_layer": layer_edges,
        "hits_per_layer": layer_edges,
        "radial_profile": radial_edges(showers.grid),
        "cell_energy": energy_edges,
        "all_cell_energy": energy_edges,
    }
    return ShowerObservables(showers.incident_energy, scalars, profiles, edges, cut)


def observe_files(
    paths: str | Path | Iterable[str | Path],
    cut: float = CUT,
    start_threshold: float = START_THRESHOLD,
    grid: tuple[int, int, int] = GRID,
    center: tuple[float, float] | None = None,
    energy_range: tuple[float, float] | None = None,
    max_showers: int | None = None,
) -> ShowerObservables:
    """`observe` of Parquet files, folders or patterns, batch by batch (arguments of `observe` and `iter_showers`)."""
    from tqdm import tqdm

    batches = iter_showers(paths, grid, energy_range, max_showers)
    bar = tqdm(unit=" showers", disable=not sys.stderr.isatty(), leave=False)
    parts = []
    with bar:
        for showers in batches:
            parts.append(observe(showers, cut, start_threshold, grid, center))
            bar.update(len(showers))
    if not parts:
        raise ValueError(_nothing(paths, energy_range))
    return ShowerObservables.concatenate(parts)


# ---- energy response


def narrowest_interval(values: np.ndarray, fraction: float = 0.9) -> tuple[float, float]:
    """Mean and root mean square of the narrowest interval that holds a fraction of the values.

    For a Gaussian of width s and a fraction of 0.9 the second figure is 0.79 s.
    """
    values = np.asarray(values, dtype=np.float64).ravel()
    if not len(values) or not np.isfinite(values).all():
        raise ValueError(f"expected at least one value, all finite, got {len(values)} values")
    mean, spread = _narrowest(values[None], fraction)
    return float(mean[0]), float(spread[0])


def _narrowest(samples: np.ndarray, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Of every row of `samples` (k, n)."""
    samples = np.sort(samples, axis=1)
    size = samples.shape[1]
    inside = max(int(np.ceil(fraction * size - 1e-9)), 1)
    start = np.argmin(samples[:, inside - 1 :] - samples[:, : size - inside + 1], axis=1)
    kept = np.take_along_axis(samples, start[:, None] + np.arange(inside), axis=1)
    return kept.mean(axis=1), kept.std(axis=1)


def energy_bins(incident_energy: np.ndarray) -> np.ndarray:
    """At most 10 bins of a round width over the incident energies; one bin for a single energy."""
    low, high = float(np.min(incident_energy)), float(np.max(incident_energy))
    if high - low < 1e-3 * high:
        return np.array([low - 0.5, high + 0.5])
    power = 10.0 ** np.floor(np.log10(high - low) - 1)
    for width in (power, 2 * power, 5 * power, 10 * power, 20 * power):
        edges = width * np.arange(np.floor(low / width + 1e-3), np.ceil(high / width - 1e-3) + 1)
        if len(edges) <= 11:
            break
    return edges


def energy_response(
    observables: ShowerObservables, edges: np.ndarray, min_showers: int = 20, resamples: int = 100, seed: int = 0
) -> list[dict[str, Any]]:
    """Response and resolution in bins of the incident energy.

    Within a bin the ratio of visible to incident energy is used, so that the width of the bin does not count.

    Args:
        edges (`np.ndarray`): bin edges, GeV; the last bin includes its upper edge.
        min_showers (`int`): bins with fewer showers have NaN figures.
        resamples (`int`): bootstrap samples of the errors.

    Returns:
        One row per bin: `low`, `high`, `energy` (mean, GeV), `showers`, `response` (mean of the narrowest 90 % of
        visible / incident energy), `resolution` (rms of these / their mean), and both errors.
    """
    edges = np.asarray(edges, dtype=np.float64)
    rng = np.random.default_rng(seed)
    which = np.searchsorted(edges, observables.incident_energy, side="right") - 1
    which[observables.incident_energy == edges[-1]] = len(edges) - 2
    rows = []
    for number, (low, high) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
        inside = which == number
        ratio = observables.scalars["energy_ratio"][inside]
        row: dict[str, Any] = {"low": float(low), "high": float(high), "showers": int(inside.sum())}
        figures = dict.fromkeys(("energy", "response", "response_error", "resolution", "resolution_error"), np.nan)
        if len(ratio):
            figures["energy"] = float(observables.incident_energy[inside].mean())
        if len(ratio) >= max(min_showers, 2) and ratio.any():
            mean, spread = narrowest_interval(ratio)
            means, spreads = _narrowest(rng.choice(ratio, (resamples, len(ratio))), 0.9)
            figures |= {"response": mean, "resolution": spread / mean}
            figures |= {"response_error": float(means.std()), "resolution_error": float((spreads / means).std())}
        rows.append(row | figures)
    return rows
