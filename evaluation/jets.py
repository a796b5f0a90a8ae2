"""Jets as flat, validated arrays of their constituents, and their observables.

A jet is a record of lists over its constituents: `part_px`, `part_py`, `part_pz`, `part_energy` [GeV] as in JetClass,
or `part_pt` [GeV], `part_eta`, `part_phi`, or `part_pt`, `part_etarel`, `part_phirel` relative to a jet axis, the last
two with `part_mass` [GeV] if it is not 0. `label_*` columns of JetClass give the class; further columns are ignored.
Rows come as a list of records, one record, a dict of columns (lists or arrays), a `datasets.Dataset` or a pyarrow
table; files as Parquet. Files are read in batches.

The definitions are those of arXiv:2403.05618 and arXiv:2412.10504: constituents are massless unless their mass is kept,
coordinates are relative to the sum of the constituents, substructure as in `hepzoo.evaluation.jet_substructure`.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from hepzoo.evaluation.jet_substructure import R, substructure, wrap_phi
from hepzoo.evaluation.showers import _flat
from hepzoo.evaluation.tracks_dirc import expand_paths

CLASSES = ("QCD", "Hbb", "Hcc", "Hgg", "H4q", "Hqql", "Zqq", "Wqq", "Tbqq", "Tbl")  # in the order of their labels
CARTESIAN = ("part_px", "part_py", "part_pz", "part_energy")
ABSOLUTE = ("part_pt", "part_eta", "part_phi")
RELATIVE = ("part_pt", "part_etarel", "part_phirel")
MASS = "part_mass"
LABELS = tuple(f"label_{name}" for name in CLASSES)
MIN_CONSTITUENTS = 3  # of jets whose substructure is defined

# name -> (what it is, unit)
OBSERVABLES = {
    "jet_pt": ("jet pT", "GeV"),
    "jet_mass": ("jet mass", "GeV"),
    "jet_eta": ("jet eta", ""),
    "jet_phi": ("jet phi", "rad"),
    "multiplicity": ("number of constituents", ""),
    "tau1": ("tau1", ""),
    "tau2": ("tau2", ""),
    "tau3": ("tau3", ""),
    "tau21": ("tau2 / tau1", ""),
    "tau32": ("tau3 / tau2", ""),
    "d2": ("D2", ""),
}
# of every constituent, weight 1 each
CONSTITUENTS = {
    "part_pt": ("constituent pT", "GeV"),
    "part_etarel": ("constituent eta - jet eta", ""),
    "part_phirel": ("constituent phi - jet phi", "rad"),
    "part_ptrel": ("constituent pT / jet pT", ""),
}


@dataclass(frozen=True)
class Jets:
    """Jets in flat arrays. `n` jets, `c` constituents in total; those of jet `i` are `offsets[i]:offsets[i + 1]`.

    Attributes:
        offsets (`np.ndarray` of shape `(n + 1,)`): first constituent of every jet, and the total.
        pt, eta, phi, mass (`np.ndarray` of shape `(c,)`): of the constituents, float64; GeV.
        label (`np.ndarray` of shape `(n,)`): number of the class in `CLASSES`, -1 where it is not known.
        relative (`bool`): eta and phi are relative to the axis of their jet, whose own are not known.
        features (`dict[str, np.ndarray]`): further columns of the constituents, `(c,)` each.
    """

    offsets: np.ndarray
    pt: np.ndarray
    eta: np.ndarray
    phi: np.ndarray
    mass: np.ndarray
    label: np.ndarray
    relative: bool = False
    features: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.label)

    @property
    def multiplicity(self) -> np.ndarray:
        """Constituents of every jet, shape `(n,)`."""
        return np.diff(self.offsets)

    @cached_property
    def owner(self) -> np.ndarray:
        """Number of the jet of every constituent, shape `(c,)`."""
        return np.repeat(np.arange(len(self)), self.multiplicity)

    def _constituents(self, which: np.ndarray) -> dict[str, Any]:
        parts: dict[str, Any] = {name: getattr(self, name)[which] for name in ("pt", "eta", "phi", "mass")}
        return parts | {"features": {name: values[which] for name, values in self.features.items()}}

    def massless(self) -> "Jets":
        """The same with constituents of no mass; pt, eta and phi stay."""
        return replace(self, mass=np.zeros_like(self.mass))

    def keep(self, which: np.ndarray) -> "Jets":
        """All jets, with only the constituents of a mask of shape `(c,)`; jets may become empty."""
        counts = np.bincount(self.owner[which], minlength=len(self))
        return replace(self, offsets=_offsets(counts), **self._constituents(which))

    def select(self, which: np.ndarray) -> "Jets":
        """The jets of a boolean mask of shape `(n,)` or of an array of jet numbers, in that order."""
        index, at, offsets = _take(self.offsets, which)
        return replace(self, offsets=offsets, label=self.label[index], **self._constituents(at))

    @cached_property
    def momentum(self) -> np.ndarray:
        """Four-momenta of the jets (sums of their constituents), shape `(n, 4)`: px, py, pz, E; GeV."""
        px, py, pz = self.pt * np.cos(self.phi), self.pt * np.sin(self.phi), self.pt * np.sinh(self.eta)
        energy = np.sqrt(self.mass**2 + (self.pt * np.cosh(self.eta)) ** 2)
        return np.stack([np.bincount(self.owner, p, len(self)) for p in (px, py, pz, energy)], axis=1)

    @cached_property
    def axes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """pT [GeV], pseudorapidity and phi of the jets, shape `(n,)` each; 0, NaN and NaN without constituents."""
        px, py, pz, _ = self.momentum.T
        pt, some = np.hypot(px, py), self.multiplicity > 0
        eta = np.full(len(self), np.nan)
        np.divide(pz, pt, out=eta, where=some & (pt > 0))
        return pt, np.arcsinh(eta), np.where(some, np.arctan2(py, px), np.nan)

    def masses(self) -> np.ndarray:
        """Jet masses, GeV, shape `(n,)`; NaN without constituents."""
        px, py, pz, energy = self.momentum.T
        squared = energy**2 - px**2 - py**2 - pz**2
        return np.where(self.multiplicity > 0, np.sqrt(np.maximum(squared, 0.0)), np.nan)

    def centered(self) -> "Jets":
        """The same with eta and phi relative to the sum of the constituents."""
        _, eta, phi = self.axes
        shifted = {"eta": self.eta - eta[self.owner], "phi": wrap_phi(self.phi - phi[self.owner])}
        return replace(self, relative=True, **shifted)

    def cut(self, max_relative: float | None = None, max_constituents: int | None = None) -> "Jets":
        """The same as a tokenizer sees them; jets may become empty.

        Args:
            max_relative (`float`, *optional*): keep constituents closer than this to the jet axis, the sum of all, in
                eta and in phi; published 0.8. Coordinates that are relative already are taken as they are.
            max_constituents (`int`, *optional*): then keep the first ones in the order of the rows; published 128.
        """
        jets = self
        if max_relative is not None:
            around = jets if jets.relative else jets.centered()
            jets = jets.keep((np.abs(around.eta) < max_relative) & (np.abs(around.phi) < max_relative))
        if max_constituents is not None:
            jets = jets.keep(np.arange(len(jets.pt)) - jets.offsets[:-1][jets.owner] < max_constituents)
        return jets

    def padded(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """pt, eta, phi, mask of shape `(n, most constituents)`, padded with 0."""
        mask = np.arange(self.multiplicity.max(initial=0)) < self.multiplicity[:, None]
        found = []
        for values in (self.pt, self.eta, self.phi):
            found.append(np.zeros(mask.shape))
            found[-1][mask] = values
        return *found, mask

    @staticmethod
    def concatenate(parts: Sequence["Jets"]) -> "Jets":
        """All jets of several sets, in order."""
        if not parts:
            raise ValueError("no jets to concatenate: the list of parts is empty")
        if any(part.relative != parts[0].relative for part in parts):
            raise ValueError("some jets have coordinates relative to the jet axis, others do not: expected one kind")
        if any(set(part.features) != set(parts[0].features) for part in parts):
            raise ValueError("some jets have other features of the constituents than others: expected the same")
        joined = {name: np.concatenate([getattr(p, name) for p in parts]) for name in ("pt", "eta", "phi", "mass")}
        features = {name: np.concatenate([p.features[name] for p in parts]) for name in parts[0].features}
        return Jets(
            offsets=_offsets(np.concatenate([part.multiplicity for part in parts])),
            label=np.concatenate([part.label for part in parts]),
            relative=parts[0].relative,
            features=features,
            **joined,
        )


def _offsets(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def _take(offsets: np.ndarray, which: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Numbers of the chosen lists, positions of all their entries, and their new offsets."""
    which = np.asarray(which)
    index = np.flatnonzero(which) if which.dtype == bool else which.astype(np.int64)
    counts = np.diff(offsets)[index]
    new = _offsets(counts)
    return index, np.arange(new[-1]) + np.repeat(offsets[index] - new[:-1], counts), new


def _wanted(names: Iterable[str]) -> tuple[str, ...]:
    """The constituent columns to use of those that there are."""
    names = set(names)
    for kind in (CARTESIAN, ABSOLUTE, RELATIVE):
        if names.issuperset(kind):
            return (*kind, MASS) if kind != CARTESIAN and MASS in names else kind
    raise ValueError(
        f"no constituents: a jet needs {', '.join(CARTESIAN)} or {', '.join(ABSOLUTE)} or {', '.join(RELATIVE)} "
        f"(found: {', '.join(sorted(map(str, names))) or 'nothing'})"
    )


def _columns(rows: Any, features: Sequence[str] = ()) -> dict[str, Any]:
    """Columns of any accepted kind of rows, not yet checked."""
    if hasattr(rows, "with_format") and hasattr(rows, "column_names"):  # datasets.Dataset
        rows = rows.with_format("arrow")[:]
    if hasattr(rows, "column_names") and hasattr(rows, "column"):  # pyarrow.Table
        return {name: rows.column(name) for name in rows.column_names}
    if isinstance(rows, Mapping):
        names = _wanted(rows)
        # one record holds lists of numbers, a dict of columns lists of lists
        if all(np.ndim(v) == 0 for v in rows[names[0]]) and not hasattr(rows[names[0]], "combine_chunks"):
            labels = {name: [value] for name, value in rows.items() if name in LABELS}
            if len(rows[names[0]]) or all(np.ndim(value[0]) == 0 for value in labels.values()):
                return {name: [rows[name]] for name in (*names, *features) if name in rows} | labels
        return dict(rows)
    if isinstance(rows, (str, bytes)) or not isinstance(rows, Iterable):
        raise ValueError(f"expected records, a dict of columns or a data set, got {type(rows).__name__}")
    rows = list(rows)
    for i, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise ValueError(f"row {i}: expected a record, got {type(row).__name__}")
    names = _wanted(rows[0]) if rows else CARTESIAN
    names += tuple(name for name in (*features, *LABELS) if rows and name in rows[0])
    for i, row in enumerate(rows):
        missing = [name for name in names if name not in row]
        if missing:
            raise ValueError(f"row {i}: column {missing[0]!r} is missing (row 0 has it)")
    return {name: [row[name] for row in rows] for name in names}


def _labels(columns: Mapping[str, Any], jets: int, first_row: int) -> np.ndarray:
    """Number of the class of every jet, -1 where there are no label columns or all are 0."""
    label, found = np.full(jets, -1, dtype=np.int64), np.zeros(jets, dtype=np.int64)
    for number, name in enumerate(LABELS):
        if name not in columns:
            continue
        column = columns[name]
        if hasattr(column, "combine_chunks"):
            column = column.combine_chunks().to_numpy(zero_copy_only=False)
        values = np.asarray(column)
        if values.shape != (jets,) or values.dtype.kind not in "biuf":
            raise ValueError(f"column {name!r}: expected one number per jet, got {values.dtype} of {values.shape}")
        bad = np.flatnonzero((values != 0) & (values != 1))
        if len(bad):
            raise ValueError(f"row {first_row + bad[0]}: {name} is {values[bad[0]]}, expected 0 or 1")
        label[values == 1] = number
        found += values == 1
    bad = np.flatnonzero(found > 1)
    if len(bad):
        raise ValueError(f"row {first_row + bad[0]}: {found[bad[0]]} of the label columns are 1, expected one")
    return label


def as_jets(rows: Any, first_row: int = 0, features: Sequence[str] = ()) -> Jets:
    """Checks rows and lays them out flat.

    Args:
        rows: list of records, one record, dict of columns, `datasets.Dataset`, pyarrow table, or `Jets`.
        first_row (`int`): number of the first row in error messages.
        features: further columns of lists over the constituents, for `Jets.features`.

    Raises:
        ValueError: columns are missing, lists of one row differ in length, a value is not finite, a constituent has no
            pT (padding must be removed), an energy less than its momentum, or more than one class. The message names
            row and field.
    """
    if isinstance(rows, Jets):
        return rows
    columns = _columns(rows, features)
    names = _wanted(columns)
    missing = [name for name in features if name not in columns]
    if missing:
        raise ValueError(f"column {missing[0]!r} is missing")
    flat, counts = {}, None
    for name in (*names, *features):
        values, lengths = _flat(columns[name], name, first_row)
        counts = lengths if counts is None else counts
        if len(lengths) != len(counts):
            raise ValueError(f"column {name!r} has {len(lengths)} rows, {names[0]!r} has {len(counts)}")
        bad = np.flatnonzero(lengths != counts)
        if len(bad):
            row = bad[0]
            raise ValueError(
                f"row {first_row + row}: {name} has {lengths[row]} constituents, {names[0]} has {counts[row]}: "
                "expected equal lengths"
            )
        flat[name] = values.astype(np.float64)
    offsets = _offsets(counts)

    def refuse(name: str, wrong: np.ndarray, values: np.ndarray, expected: str) -> None:
        bad = np.flatnonzero(wrong)
        if len(bad):
            row = int(np.searchsorted(offsets, bad[0], side="right")) - 1
            where = f"row {first_row + row}: {name}[{bad[0] - offsets[row]}]"
            raise ValueError(f"{where} is {values[bad[0]]:g}, expected {expected}")

    for name, values in flat.items():
        refuse(name, ~np.isfinite(values), values, "a finite number")
    positive = "a positive number of GeV (remove padding)"
    label = _labels(columns, len(counts), first_row)
    extra = {name: flat[name] for name in features}
    if names[0] == CARTESIAN[0]:
        px, py, pz, energy = (flat[name] for name in names)
        pt = np.hypot(px, py)
        refuse("pT of part_px, part_py", pt <= 0, pt, positive)
        momentum = np.hypot(pt, pz)
        # stored in float32: energies of massless constituents may be below the momentum by rounding
        refuse("part_energy", energy < momentum * (1 - 1e-5), energy, "at least the momentum")
        mass = np.sqrt(np.maximum((energy - momentum) * (energy + momentum), 0.0))
        return Jets(offsets, pt, np.arcsinh(pz / pt), np.arctan2(py, px), mass, label, features=extra)
    pt, eta, phi = (flat[name] for name in names[:3])
    mass = flat.get(MASS, np.zeros_like(pt))
    refuse("part_pt", pt <= 0, pt, positive)
    refuse(names[1], np.abs(eta) > 20, eta, "a pseudorapidity of at most 20 in size")
    refuse(MASS, mass < 0, mass, "a number of GeV that is not negative")
    return Jets(offsets, pt, eta, wrap_phi(phi), mass, label, names[1] == RELATIVE[1], extra)


def iter_jets(
    paths: str | Path | Iterable[str | Path],
    classes: Sequence[str] | None = None,
    max_jets: int | None = None,
    batch_size: int = 5000,
    features: Sequence[str] = (),
) -> Iterator[Jets]:
    """Jets of Parquet files, folders or glob patterns in batches.

    Args:
        classes (*optional*): only these of `CLASSES`.
        max_jets (`int`, *optional*): stop after so many jets (of the classes) in all.
        batch_size (`int`): most jets at a time.
        features: as for `as_jets`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    wanted_labels = _class_numbers(classes)
    left = max_jets
    for path in expand_paths(paths):
        row = 0
        try:
            file = pq.ParquetFile(path)
            names = file.schema_arrow.names
            wanted = [*_wanted(names), *(name for name in (*features, *LABELS) if name in names)]
            for batch in file.iter_batches(batch_size, columns=wanted):
                jets = as_jets(pa.Table.from_batches([batch]), row, features)
                row += len(jets)
                if wanted_labels is not None:
                    jets = jets.select(np.isin(jets.label, wanted_labels))
                if left is not None:
                    jets = jets.select(np.arange(min(left, len(jets))))
                    left -= len(jets)
                if len(jets):
                    yield jets
                if left == 0:
                    return
        except (pa.ArrowException, OSError) as err:
            raise ValueError(f"{path}: not a readable Parquet file ({(str(err).splitlines() or [err])[0]})") from None
        except ValueError as err:
            raise ValueError(f"{path}: {err}") from None


def _class_numbers(classes: Sequence[str] | None) -> list[int] | None:
    if classes is None:
        return None
    unknown = [name for name in classes if name not in CLASSES]
    if unknown:
        raise ValueError(f"unknown jet class {unknown[0]!r}, expected some of {', '.join(CLASSES)}")
    return [CLASSES.index(name) for name in classes]


def read_jets(
    paths: str | Path | Iterable[str | Path],
    classes: Sequence[str] | None = None,
    max_jets: int | None = None,
    features: Sequence[str] = (),
) -> Jets:
    """All jets of Parquet files, folders or glob patterns (arguments of `iter_jets`)."""
    parts = list(iter_jets(paths, classes, max_jets, features=features))
    if not parts:
        names = str(paths) if isinstance(paths, (str, Path)) else ", ".join(map(str, paths))
        raise ValueError(f"{names}: no jets" + (f" of the classes {', '.join(classes)}" if classes else ""))
    return Jets.concatenate(parts)


# ---- observables


@dataclass(frozen=True)
class JetObservables:
    """What is known of a sample of `n` jets with `c` constituents.

    Attributes:
        scalars (`dict[str, np.ndarray]`): the `OBSERVABLES`, shape `(n,)`; NaN where a jet has none.
        constituents (`dict[str, np.ndarray]`): the `CONSTITUENTS` and the features of the jets, shape `(c,)`; NaN where
            a constituent has none.
        offsets (`np.ndarray` of shape `(n + 1,)`): first constituent of every jet, and the total.
        label (`np.ndarray` of shape `(n,)`): see `Jets`.
    """

    scalars: dict[str, np.ndarray]
    constituents: dict[str, np.ndarray]
    offsets: np.ndarray
    label: np.ndarray

    def __len__(self) -> int:
        return len(self.label)

    def values(self, name: str) -> np.ndarray:
        """All defined values of an observable, of jets or of constituents."""
        values = self.constituents[name] if name in self.constituents else self.scalars[name]
        return values[np.isfinite(values)]

    def select(self, which: np.ndarray) -> "JetObservables":
        """The jets of a boolean mask or of an array of jet numbers."""
        index, at, offsets = _take(self.offsets, which)
        return JetObservables(
            {name: values[index] for name, values in self.scalars.items()},
            {name: values[at] for name, values in self.constituents.items()},
            offsets,
            self.label[index],
        )


def observe(
    rows: Any,
    keep_mass: bool = False,
    recombination: str = "E",
    pseudorapidity: bool = False,
    radius: float = R,
    beta: float = 1.0,
) -> JetObservables:
    """All observables of jets.

    Args:
        rows: as `as_jets` takes them.
        keep_mass (`bool`): jets are sums of the constituents with their masses. Default: of massless ones, as
            generators of tokens make them. Substructure is of massless constituents anyway.
        recombination (`str`): of the axes of tau_N, "E" or "WTA_pt".
        pseudorapidity (`bool`): published tau_N, see `n_subjettiness`.
        radius, beta (`float`): of tau_N and D2.

    Returns:
        `JetObservables`. Jets of fewer than 3 constituents have no substructure, empty ones no mass, eta and phi, and
        jets in relative coordinates neither eta nor phi.
    """
    from tqdm import tqdm

    jets = as_jets(rows)
    # about the axis with masses, as tokenizers do; and relative coordinates stay what the tokenizer made of them
    centered = jets if jets.relative else jets.centered()
    if not keep_mass:
        jets, centered = jets.massless(), centered.massless()
    pt, eta, phi = jets.axes
    unknown = np.full(len(jets), np.nan)
    scalars = {
        "jet_pt": np.where(jets.multiplicity > 0, pt, np.nan),
        "jet_mass": jets.masses(),
        "jet_eta": unknown if jets.relative else eta,
        "jet_phi": unknown if jets.relative else phi,
        "multiplicity": jets.multiplicity.astype(float),
    }
    large = np.flatnonzero(jets.multiplicity >= MIN_CONSTITUENTS)
    scalars |= {name: np.full(len(jets), np.nan) for name in ("tau1", "tau2", "tau3", "tau21", "tau32", "d2")}
    options = {"radius": radius, "beta": beta, "recombination": recombination, "pseudorapidity": pseudorapidity}
    with tqdm(total=len(large), unit=" jets", disable=not sys.stderr.isatty(), leave=False) as bar:
        for start in range(0, len(large), 5000):  # bounds the memory of the padded arrays
            chunk = large[start : start + 5000]
            for name, values in substructure(*centered.select(chunk).padded(), **options).items():
                scalars[name][chunk] = values
            bar.update(len(chunk))
    constituents = {
        "part_pt": jets.pt,
        "part_etarel": centered.eta,
        "part_phirel": centered.phi,
        "part_ptrel": jets.pt / pt[jets.owner],
        **jets.features,
    }
    return JetObservables(scalars, constituents, jets.offsets, jets.label)


def observe_files(
    paths: str | Path | Iterable[str | Path],
    classes: Sequence[str] | None = None,
    max_jets: int | None = None,
    max_relative: float | None = None,
    max_constituents: int | None = None,
    **options: Any,
) -> JetObservables:
    """`observe` of Parquet files, folders or patterns (arguments of `read_jets`, `Jets.cut` and `observe`)."""
    return observe(read_jets(paths, classes, max_jets).cut(max_relative, max_constituents), **options)
