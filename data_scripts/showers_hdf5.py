"""Reading and writing the HDF5 files in which calorimeter showers are published.

| layout | content |
|---|---|
| getting_high | group (`30x30`) of `energy` [N,1] in GeV and dense `layers` [N, layer, x, y] in MeV (2005.05334) |
| padded | `showers` [N, P, 4] = x, y, z, energy in MeV, energy 0 in padding, and `incident_energies` or `genE` |
| showerdata | the files of the package showerdata: variable-length `showers` = x, y in mm, layer, energy in GeV |
| events | `events` [N, 5, P] = x, layer, y, energy, unused, hits at the end; `n_points` [N] and `energy` [N] |
| arrays | `x`, `y`, `z`, `energy` [N, P] and `incident_energy` or `genE` |

Files are read in blocks of bounded memory. h5py is in the extra `data`.
"""

import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hepzoo.data_scripts.hdf5_files import check_values_are_here, import_h5py, opened_hdf5
from hepzoo.tokenization.records_spade import FIELDS, HIT_FIELDS, shower_columns

LAYOUTS = ("getting_high", "padded", "showerdata", "events", "arrays")
WRITTEN_LAYOUTS = ("showerdata", "padded")
INCIDENT_NAMES = ("incident_energies", "incident_energy", "genE")
BLOCK_BYTES = 32 * 2**20
MAX_ROW_BYTES = 256 * 2**20
MAX_GRID = 2**15 - 1  # cell indices are int16
FLOAT32_MAX = float(np.finfo(np.float32).max)
_SHOWERDATA_VERSION = "0.7.0"  # the release whose layout is written


@dataclass(frozen=True)
class ReadOptions:
    """How the content of a file is understood.

    Attributes:
        grid: cells in x and y, and layers. Not used by getting_high, whose dense array says it.
        cut: hits are kept if their energy is above it, MeV; None is 0.1 for getting_high and 0 for the others.
        coordinates: "cells" or "mm" for x and y; None is "mm" for showerdata and "cells" for the others.
        cell_size: mm, where coordinates are in mm: cell = floor(mm / cell_size) + origin.
        origin: cell whose lower edge is at 0 mm, in x and y; None is half the grid.
        energy_unit: "MeV" or "GeV" of the hits; None is "GeV" for showerdata and "MeV" for the others.
        incident_energy: GeV, of all showers of a file that holds no incident energies.
        merge_duplicates: adds up hits of the same cell; otherwise they stay as they are, counted.
        drop_outside: leaves out hits outside the grid, counted; otherwise they are an error.
    """

    grid: tuple[int, int, int] = (30, 30, 30)
    cut: float | None = None
    coordinates: str | None = None
    cell_size: float = 5.0
    origin: tuple[int, int] | None = None
    energy_unit: str | None = None
    incident_energy: float | None = None
    merge_duplicates: bool = False
    drop_outside: bool = False

    def __post_init__(self):
        if len(self.grid) != 3 or not all(1 <= n <= MAX_GRID for n in self.grid):
            raise ValueError(f"grid must be three integers NX,NY,NZ in 1..{MAX_GRID}, got {self.grid!r:.80}")
        if self.cut is not None and not 0 <= self.cut < np.inf:
            raise ValueError(f"cut must be an energy in MeV of at least 0, got {self.cut}")
        if self.coordinates not in (None, "cells", "mm"):
            raise ValueError(f"coordinates must be cells or mm, got {self.coordinates!r}")
        if self.energy_unit not in (None, "MeV", "GeV"):
            raise ValueError(f"energy_unit must be MeV or GeV, got {self.energy_unit!r}")
        if not 0 < self.cell_size < np.inf:
            raise ValueError(f"cell_size must be a positive length in mm, got {self.cell_size}")
        if self.incident_energy is not None and not 0 < self.incident_energy <= FLOAT32_MAX:
            raise ValueError(f"incident_energy must be a positive number of GeV, got {self.incident_energy}")


# ---------------------------------------------------------------------------------------------------------------------
# Layouts
# ---------------------------------------------------------------------------------------------------------------------


def _dataset(group, name: str, path, ndim: int | tuple[int, ...], kinds: str = "iuf"):
    """The dataset `name`, checked: its values are in this file, numbers, and of the expected dimensions."""
    h5py = import_h5py()
    if name not in group:
        raise ValueError(f"{path}: dataset {name} is missing")
    data = group[name]
    if not isinstance(data, h5py.Dataset):
        raise ValueError(f"{path}: {name} must be a dataset, found {type(data).__name__.lower()}")
    check_values_are_here(data, name, group, path)
    expected = (ndim,) if isinstance(ndim, int) else ndim
    if data.ndim not in expected or _dtype(data, path).kind not in kinds:
        wanted = " or ".join(map(str, expected))
        raise ValueError(
            f"{path}: {name} must be numbers in {wanted} dimensions, found {data.dtype} of shape {data.shape}"
        )
    return data


def _dtype(data, path) -> np.dtype:
    try:
        return data.dtype
    except (TypeError, ValueError):
        raise ValueError(f"{path}: {data.name} has a type that numpy does not know; expected numbers") from None


def _getting_high_groups(file) -> list[str]:
    h5py = import_h5py()
    return [
        name
        for name in file
        if isinstance(file.get(name, getlink=True), h5py.HardLink)
        and isinstance(file[name], h5py.Group)
        and {"energy", "layers"} <= set(file[name])
    ]


def detect_layout(path: str | os.PathLike) -> str:
    """The layout of a file, one of `LAYOUTS`.

    Raises:
        ValueError: it has none of them; the line lists what the file holds.
    """
    h5py = import_h5py()
    with opened_hdf5(path) as file:
        names = set(file)
        if "showers" in names:
            showers = file.get("showers")
            vlen = isinstance(showers, h5py.Dataset) and h5py.check_vlen_dtype(_dtype(showers, path)) is not None
            return "showerdata" if vlen else "padded"
        if "events" in names:
            return "events"
        if {"x", "y", "z", "energy"} <= names:
            return "arrays"
        if len(_getting_high_groups(file)) == 1:
            return "getting_high"
        content = ", ".join(sorted(names))[:100] or "nothing"
        raise ValueError(f"{path}: no known shower layout ({', '.join(LAYOUTS)}); the file holds {content!r}")


def read_showers_hdf5(
    path: str | os.PathLike,
    layout: str = "auto",
    options: ReadOptions | None = None,
    counts: Counter | None = None,
) -> Iterator[dict[str, Any]]:
    """Reads a file as a stream of column dicts of the shower record (showers_schema.py).

    Args:
        path: the file.
        layout: "auto" or one of `LAYOUTS`.
        options: default `ReadOptions()`.
        counts: increased by "showers", "hits", "below_cut" (hits with energy in 0 < E <= cut), "duplicates" (hits in
            a cell that an earlier hit of the shower has), "outside" (dropped), "empty" (showers without a hit).

    Yields:
        incident_energy (float32 array) and lists of arrays x, y, z (int16), energy (MeV, float32), hits in the order
        of the file.

    Raises:
        UnreadableFileError: the file is truncated, damaged or not HDF5.
        ValueError: shapes or values that do not fit; the line names file, shower, field and value.
    """
    options = options or ReadOptions()
    if layout not in ("auto", *LAYOUTS):
        raise ValueError(f"layout must be auto or one of {', '.join(LAYOUTS)}, got {layout!r}")
    layout = detect_layout(path) if layout == "auto" else layout
    with opened_hdf5(path) as file:
        for first, block in _READERS[layout](file, path, options):
            yield _finish(block, first, path, layout, options, counts if counts is not None else Counter())


def count_showers(path: str | os.PathLike, layout: str = "auto") -> int:
    """Number of showers in a file, from its shapes alone."""
    layout = detect_layout(path) if layout == "auto" else layout
    with opened_hdf5(path) as file:
        if layout == "getting_high":
            return len(_dataset(*_getting_high(file, path), path, 4))
        if layout == "showerdata":
            return len(_dataset(file, "showers", path, 1, "O"))
        name, ndim = {"padded": ("showers", 3), "events": ("events", 3), "arrays": ("energy", 2)}[layout]
        return len(_dataset(file, name, path, ndim))


def _row_blocks(size: int, row_bytes: int, path) -> Iterator[slice]:
    if row_bytes > MAX_ROW_BYTES:
        raise ValueError(f"{path}: one shower takes {row_bytes / 2**20:.0f} MiB; expected at most 256 MiB")
    step = max(1, BLOCK_BYTES // max(row_bytes, 1024))
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))


def _incident(group, path, size: int, options: ReadOptions, names: tuple[str, ...]):
    """Incident energies, as a dataset of [N] or [N,1], or None where `options` gives the value."""
    found = [name for name in names if name in group]
    if found and options.incident_energy is not None:
        raise ValueError(f"{path}: holds incident energies ({found[0]}); incident_energy is for files without them")
    if not found:
        if options.incident_energy is None:
            raise ValueError(
                f"{path}: no incident energies ({', '.join(names)}); give their value in GeV with --incident_energy"
            )
        return None
    data = _dataset(group, found[0], path, (1, 2))
    if data.shape not in ((size,), (size, 1)):
        raise ValueError(f"{path}: {found[0]} has shape {data.shape}; expected ({size},) or ({size}, 1)")
    return data


def _energies(data, rows: slice, options: ReadOptions) -> np.ndarray:
    if data is None:
        return np.full(rows.stop - rows.start, options.incident_energy)
    return data[rows].reshape(-1).astype(np.float64)


def _getting_high(file, path):
    groups = _getting_high_groups(file)
    if len(groups) != 1:
        raise ValueError(f"{path}: expected one group with energy and layers, found {len(groups)}")
    return file[groups[0]], "layers"


def _read_getting_high(file, path, options: ReadOptions):
    group, name = _getting_high(file, path)
    layers = _dataset(group, name, path, 4)
    size = len(layers)
    if max(layers.shape[1:]) > MAX_GRID:
        raise ValueError(f"{path}: layers has shape {layers.shape}; expected at most {MAX_GRID} cells per axis")
    incident = _incident(group, path, size, options, ("energy",))
    for rows in _row_blocks(size, layers.dtype.itemsize * int(np.prod(layers.shape[1:])), path):
        dense = layers[rows]
        # The order of the axes is shower, layer, x, y. NaN is kept here, to be named below.
        shower, z, x, y = np.nonzero(dense)
        energy = dense[shower, z, x, y]
        yield rows.start, (_energies(incident, rows, options), shower, x, y, z, energy)


def _read_padded(file, path, options: ReadOptions):
    showers = _dataset(file, "showers", path, 3)
    size, columns = len(showers), showers.shape[2]
    if columns != 4:
        raise ValueError(f"{path}: showers has shape {showers.shape}; expected (N, P, 4) with x, y, z, energy")
    incident = _incident(file, path, size, options, INCIDENT_NAMES)
    for rows in _row_blocks(size, showers.dtype.itemsize * int(np.prod(showers.shape[1:])), path):
        points = showers[rows]
        shower, place = np.nonzero(points[..., 3])
        yield rows.start, (_energies(incident, rows, options), shower, *points[shower, place].T)


def _read_events(file, path, options: ReadOptions):
    events = _dataset(file, "events", path, 3)
    size, fields, length = events.shape
    if fields not in (4, 5):
        raise ValueError(f"{path}: events has shape {events.shape}; expected (N, 5, P)")
    incident = _incident(file, path, size, options, ("energy", *INCIDENT_NAMES))
    points = _dataset(file, "n_points", path, (1, 2), "iuf")
    if points.shape not in ((size,), (size, 1)):
        raise ValueError(f"{path}: n_points has shape {points.shape}; expected ({size},)")
    for rows in _row_blocks(size, events.dtype.itemsize * int(np.prod(events.shape[1:])), path):
        block = events[rows]
        number = points[rows].reshape(-1)
        bad = np.flatnonzero(~((number >= 0) & (number <= length)))
        if bad.size:
            raise ValueError(f"{path}: shower {rows.start + bad[0]}: n_points = {number[bad[0]]}, expected 0..{length}")
        shower, place = np.nonzero(block[:, 3])
        early = np.flatnonzero(place < length - number[shower])
        if early.size:
            raise ValueError(
                f"{path}: shower {rows.start + shower[early[0]]}: a hit at place {place[early[0]]}, expected hits in "
                f"the last n_points = {number[shower[early[0]]]} of {length} places"
            )
        x, z, y, energy = block[shower, :4, place].T
        yield rows.start, (_energies(incident, rows, options), shower, x, y, z, energy)


def _read_arrays(file, path, options: ReadOptions):
    data = {name: _dataset(file, name, path, 2) for name in ("x", "y", "z", "energy")}
    shape = data["energy"].shape
    for name, values in data.items():
        if values.shape != shape:
            raise ValueError(f"{path}: {name} has shape {values.shape}, energy {shape}; expected equal shapes")
    incident = _incident(file, path, shape[0], options, INCIDENT_NAMES)
    for rows in _row_blocks(shape[0], sum(values.dtype.itemsize for values in data.values()) * shape[1], path):
        energy = data["energy"][rows]
        shower, place = np.nonzero(energy)
        x, y, z = (data[name][rows][shower, place] for name in "xyz")
        yield rows.start, (_energies(incident, rows, options), shower, x, y, z, energy[shower, place])


def _read_showerdata(file, path, options: ReadOptions):
    h5py = import_h5py()
    showers = _dataset(file, "showers", path, 1, "O")
    base = h5py.check_vlen_dtype(showers.dtype)
    if base is None or np.dtype(base).kind not in "iuf":
        raise ValueError(f"{path}: showers must be variable-length lists of numbers, found {showers.dtype}")
    size = len(showers)
    shape = _dataset(file, "shape", path, 1, "iu")[...].tolist()
    if len(shape) != 3 or shape[0] != size or shape[2] not in (4, 5) or not 0 <= shape[1] <= MAX_ROW_BYTES // 20:
        raise ValueError(f"{path}: shape is {shape}; expected [{size}, P, 4 or 5]")
    incident = _incident(file, path, size, options, ("energies",))
    points = _dataset(file, "num_points", path, 1, "iu")
    if points.shape != (size,):
        raise ValueError(f"{path}: num_points has shape {points.shape}; expected ({size},)")
    for rows in _row_blocks(size, shape[1] * shape[2] * 4, path):
        values = showers[rows]
        lengths = np.fromiter(map(len, values), dtype=np.int64, count=len(values))
        number = points[rows].astype(np.int64)
        bad = np.flatnonzero(lengths != number * shape[2])
        if bad.size:
            raise ValueError(
                f"{path}: shower {rows.start + bad[0]}: {lengths[bad[0]]} values, expected num_points = "
                f"{number[bad[0]]} times {shape[2]} columns"
            )
        flat = np.concatenate([*values, np.empty(0, np.float32)]).reshape(-1, shape[2])
        shower = np.repeat(np.arange(len(values)), number)
        keep = flat[:, 3] != 0
        yield rows.start, (_energies(incident, rows, options), shower[keep], *flat[keep, :4].T)


_READERS = {
    "getting_high": _read_getting_high,
    "padded": _read_padded,
    "showerdata": _read_showerdata,
    "events": _read_events,
    "arrays": _read_arrays,
}


def _finish(block, first: int, path, layout: str, options: ReadOptions, counts: Counter) -> dict[str, Any]:
    """Units, checks, cut and duplicates of one block; `first` is the number of its first shower."""
    incident, shower, x, y, z, energy = block
    size = len(incident)
    bad = np.flatnonzero(~((incident > 0) & (incident <= FLOAT32_MAX)))
    if bad.size:
        raise ValueError(
            f"{path}: shower {first + bad[0]}: incident energy = {incident[bad[0]]:g} GeV, expected a positive number"
        )

    def refuse(wrong, name, values, expected):
        hit = np.flatnonzero(wrong)
        if hit.size:
            number = hit[0] - np.searchsorted(shower, shower[hit[0]])
            place = f"shower {first + shower[hit[0]]}, hit {number}"
            if layout == "getting_high":
                place += f" (layer {z[hit[0]]}, x {x[hit[0]]}, y {y[hit[0]]})"
            raise ValueError(f"{path}: {place}: {name} = {values[hit[0]]:g}, expected {expected}")

    energy = energy.astype(np.float64)
    unit = options.energy_unit or ("GeV" if layout == "showerdata" else "MeV")
    refuse(~((energy >= 0) & (energy <= FLOAT32_MAX / 1000)), "energy", energy, f"an energy in {unit} of at least 0")
    energy = (energy * (1000 if unit == "GeV" else 1)).astype(np.float32)

    # Coordinates of all hits are checked before the cut: damage shows there too.
    in_mm = (options.coordinates or ("mm" if layout == "showerdata" else "cells")) == "mm" and layout != "getting_high"
    grid = options.grid
    inside = np.ones(len(shower), dtype=bool)
    cells = []
    for axis, (name, values) in enumerate(zip("xyz", (x, y, z), strict=True)):
        if layout == "getting_high":
            cells.append(values)
            continue
        values = values.astype(np.float64)
        if in_mm and name != "z":
            refuse(~np.isfinite(values), name, values, "a finite length in mm")
            origin = grid[axis] // 2 if options.origin is None else options.origin[axis]
            cell = np.floor(values / options.cell_size) + origin
            expected = f"a place in {-origin * options.cell_size:g}..{(grid[axis] - origin) * options.cell_size:g} mm"
        else:
            cell, expected = values, f"an integer in 0..{grid[axis] - 1}"
            refuse(~np.isfinite(values) | (values != np.floor(values)), name, values, expected)
        fits = (cell >= 0) & (cell < grid[axis])
        if not options.drop_outside:
            refuse(~fits, name, values, expected)
        inside &= fits
        cells.append(cell)
    counts["outside"] += int((~inside).sum())

    cut = options.cut if options.cut is not None else (0.1 if layout == "getting_high" else 0.0)
    keep = inside & (energy > np.float32(cut))
    counts["below_cut"] += int((inside & ~keep).sum())
    shower, energy = shower[keep], energy[keep]
    x, y, z = (cell[keep].astype(np.int16) for cell in cells)
    if layout != "getting_high":
        shower, x, y, z, energy = _duplicates(shower, x, y, z, energy, options.merge_duplicates, counts)

    lengths = np.bincount(shower, minlength=size)
    counts["showers"] += size
    counts["hits"] += len(shower)
    counts["empty"] += int((lengths == 0).sum())
    ends = np.cumsum(lengths)[:-1]
    columns: dict[str, Any] = {"incident_energy": incident.astype(np.float32)}
    columns |= {name: np.split(values, ends) for name, values in zip("xyz", (x, y, z), strict=True)}
    return columns | {"energy": np.split(energy, ends)}


def _duplicates(shower, x, y, z, energy, merge: bool, counts: Counter):
    """Counts hits in a cell that an earlier hit of the shower has; with `merge`, adds their energy to that one."""
    key = ((shower * MAX_GRID + z) * MAX_GRID + x) * MAX_GRID + y
    cells, first, inverse = np.unique(key, return_index=True, return_inverse=True)
    counts["duplicates"] += len(key) - len(cells)
    if not merge or len(cells) == len(key):
        return shower, x, y, z, energy
    total = np.bincount(inverse, energy, minlength=len(cells)).astype(np.float32)
    order = np.argsort(first)
    first = first[order]
    return shower[first], x[first], y[first], z[first], total[order]


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


def _row_columns(rows: Any) -> dict[str, list]:
    """`rows` (list of records, dict of columns or one record) -> checked columns; arrays of float64 inside."""
    columns, size, _ = shower_columns(rows)
    checked: dict[str, list] = {name: [] for name in FIELDS}
    for index in range(size):
        for name in FIELDS:
            try:
                values = np.asarray(columns[name][index], dtype=np.float64)
            except (TypeError, ValueError):
                raise ValueError(f"row {index}: {name} must be numbers, got {columns[name][index]!r:.60}") from None
            wanted = 0 if name == "incident_energy" else 1
            if values.ndim != wanted:
                raise ValueError(
                    f"row {index}: {name} must be a {'flat list' if wanted else 'number'}, got shape {values.shape}"
                )
            if wanted and len(values) != len(checked["x"][index] if name != "x" else values):
                raise ValueError(
                    f"row {index}: {name} has {len(values)} hits, x has {len(checked['x'][index])}; expected equal"
                )
            good = (values > 0) & (values <= FLOAT32_MAX)
            if name in "xyz":
                good = (values >= 0) & (values <= MAX_GRID) & (values == np.floor(values))
            if not good.all():
                value = values.reshape(-1)[np.argmin(good.reshape(-1))]
                expected = "a cell index" if name in "xyz" else "a positive number"
                raise ValueError(f"row {index}: {name} = {value:g}, expected {expected}")
            checked[name].append(values)
    return checked


def write_showers_hdf5(
    path: str | os.PathLike,
    rows: Any,
    layout: str = "showerdata",
    cell_size: float = 5.0,
    origin: tuple[int, int] = (15, 15),
    pdg: int = 22,
    pad_length: int | None = None,
    overwrite: bool = False,
) -> int:
    """Writes showers as HDF5; the file appears only when complete.

    Args:
        path: the file.
        rows: list of records, dict of columns, or one record: incident_energy (GeV), x, y, z (cells), energy (MeV).
        layout: "showerdata" (x, y of cell centres in mm, energy in GeV; opened by the package showerdata) or "padded"
            (cells, MeV).
        cell_size, origin: showerdata only; mm = (cell - origin + 1/2) * cell_size.
        pdg: incident particle, showerdata only.
        pad_length: places per shower, padded only; default the largest number of hits.
        overwrite: replaces an existing file instead of refusing.

    Returns:
        `int`: number of showers.

    Raises:
        ValueError: a row is malformed, has more than `pad_length` hits, or the file exists.
    """
    h5py = import_h5py()
    if layout not in WRITTEN_LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(WRITTEN_LAYOUTS)}, got {layout!r}")
    if not 0 < cell_size < np.inf:
        raise ValueError(f"cell_size must be a positive length in mm, got {cell_size}")
    path = Path(path)
    if path.exists() and not overwrite:
        raise ValueError(f"{path} exists already; choose another name, or overwrite")
    columns = _row_columns(rows)
    size = len(columns["x"])
    lengths = np.array([len(values) for values in columns["x"]], dtype=np.int32)
    longest = int(lengths.max(initial=0))
    if pad_length is not None and longest > pad_length:
        row = int(np.argmax(lengths > pad_length))
        raise ValueError(f"row {row}: {lengths[row]} hits, expected at most pad_length = {pad_length}")
    incident = np.asarray(columns["incident_energy"], dtype=np.float32).reshape(-1)
    if layout == "showerdata":
        for axis, name in enumerate("xy"):
            columns[name] = [(values - origin[axis] + 0.5) * cell_size for values in columns[name]]
        columns["energy"] = [values / 1000 for values in columns["energy"]]
    points = (np.stack(row, axis=1).astype(np.float32) for row in zip(*(columns[name] for name in HIT_FIELDS)))

    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    os.close(handle)
    try:
        with h5py.File(temporary, "w") as file:
            if layout == "showerdata":
                showers = file.create_dataset("showers", (size,), dtype=h5py.vlen_dtype(np.dtype("float32")))
                # One by one: h5py takes several lists of equal length for an array.
                for index, values in enumerate(points):
                    showers[index] = values.reshape(-1)
                file["energies"] = incident[:, None]
                file["directions"] = np.tile(np.float32([0, 0, 1]), (size, 1))
                file["pdg"] = np.full(size, pdg, dtype=np.int32)
                file["shower_ids"] = np.arange(size, dtype=np.int32)
                file["shape"] = np.array([size, longest, 4], dtype=np.int32)
                file["num_points"] = lengths
                file.attrs["showerdata_version"] = _SHOWERDATA_VERSION
            else:
                width = longest if pad_length is None else pad_length
                options = {"compression": "gzip", "chunks": (1, width, 4)} if size and width else {}
                showers = file.create_dataset("showers", (size, width, 4), dtype=np.float32, **options)
                for index, values in enumerate(points):
                    padded = np.zeros((width, 4), dtype=np.float32)
                    padded[: len(values)] = values
                    showers[index] = padded
                file["incident_energies"] = incident
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return size
