"""
Features of the constituents of jets: reading, deriving them from four-momenta, and their transforms to what networks
see (arXiv:2403.05618).

Units: GeV, GeV/c, GeV/c^2; angles in rad.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from numbers import Real
from typing import Any

import numpy as np

from .records_dirc import short_repr

FOUR_MOMENTUM = ("part_px", "part_py", "part_pz", "part_energy")
KINEMATICS = ("part_pt", "part_etarel", "part_phirel")
SIGNED_LOG_OFFSET = 1e-5


def signed_log(values: np.ndarray) -> np.ndarray:
    """sign(x) ln(1 + |x| + 1e-5)."""
    return np.sign(values) * np.log1p(np.abs(values) + SIGNED_LOG_OFFSET)


def signed_exp(values: np.ndarray) -> np.ndarray:
    """Inverse of `signed_log` for |x| > 0."""
    return np.sign(values) * (np.expm1(np.abs(values)) - SIGNED_LOG_OFFSET)


# name -> (function, inverse)
FUNCTIONS: dict[str, tuple[Callable, Callable]] = {
    "log": (np.log, np.exp),
    "log10": (np.log10, lambda values: np.power(10.0, values)),
    "log1p": (np.log1p, np.expm1),
    "exp": (np.exp, np.log),
    "sqrt": (np.sqrt, np.square),
    "square": (np.square, np.sqrt),
    "tanh": (np.tanh, np.arctanh),
    "arctanh": (np.arctanh, np.tanh),
    "signed_log": (signed_log, signed_exp),
}


@dataclass(frozen=True)
class JetFeature:
    """
    One input channel and its transform: (clip_output of) (bin(function(clip_input(x))) - subtract) * multiply.

    Args:
        name: column, or a quantity that `constituent_features` derives.
        function: key of `FUNCTIONS`.
        larger_than, smaller_than: constituents outside these strict limits of the value itself are removed.
        clip_input, clip_output: (lowest, highest) of the value itself and of the transformed value, `None` for no
            limit; not invertible.
        binning: (first edge, last edge, number of edges); values are replaced by the centres of equal bins.
        subtract, multiply: shift and factor.
    """

    name: str
    function: str | None = None
    larger_than: float | None = None
    smaller_than: float | None = None
    clip_input: tuple[float | None, float | None] | None = None
    binning: tuple[float, float, int] | None = None
    subtract: float = 0.0
    multiply: float = 1.0
    clip_output: tuple[float | None, float | None] | None = None

    def transform(self, values: np.ndarray) -> np.ndarray:
        """Model values, float64, of any shape; not finite where the function is not defined."""
        values = _clipped(np.asarray(values, dtype=np.float64), self.clip_input)
        with np.errstate(all="ignore"):
            if self.function is not None:
                values = FUNCTIONS[self.function][0](values)
            if self.binning is not None:
                low, high, num_edges = self.binning
                edges = np.linspace(low, high, num_edges)
                index = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, num_edges - 2)
                values = np.where(np.isfinite(values), (edges[index] + edges[index + 1]) / 2, values)
            return _clipped((values - self.subtract) * self.multiply, self.clip_output)

    def inverse(self, values: np.ndarray) -> np.ndarray:
        """Physical values, float64, of model values."""
        values = np.asarray(values, dtype=np.float64) / self.multiply + self.subtract
        with np.errstate(all="ignore"):
            return values if self.function is None else FUNCTIONS[self.function][1](values)

    def passes(self, values: np.ndarray) -> np.ndarray:
        """Which values are inside the strict limits."""
        inside = np.ones(np.shape(values), dtype=bool)
        if self.larger_than is not None:
            inside &= values > self.larger_than
        if self.smaller_than is not None:
            inside &= values < self.smaller_than
        return inside

    def settings(self) -> dict[str, Any]:
        """The name and what differs from the defaults, as plain JSON values; an entry for `make_features`."""
        defaults = asdict(JetFeature(""))
        changed = {name: value for name, value in asdict(self).items() if value != defaults[name]}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in changed.items()}


def _clipped(values: np.ndarray, limits: tuple[float | None, float | None] | None) -> np.ndarray:
    return values if limits is None or limits == (None, None) else np.clip(values, *limits)


# the transforms of OmniJet-alpha, arXiv:2403.05618
DEFAULT_FEATURES: dict[str, dict[str, Any]] = {
    "part_pt": {"function": "log", "subtract": 1.8},
    "part_etarel": {"multiply": 3.0, "larger_than": -0.8, "smaller_than": 0.8},
    "part_phirel": {"multiply": 3.0, "larger_than": -0.8, "smaller_than": 0.8},
}


def make_features(settings: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None) -> tuple[JetFeature, ...]:
    """
    The input channels, in order, from a mapping of feature names to arguments of `JetFeature`, or a list of such
    arguments that have a `name`; by default those of OmniJet-alpha.

    Raises:
        ValueError: naming the feature, the setting and what was expected.
    """
    settings = DEFAULT_FEATURES if settings is None else settings
    if isinstance(settings, Sequence) and all(isinstance(entry, Mapping) and "name" in entry for entry in settings):
        names = [entry["name"] for entry in settings]
        for name in names:
            if not isinstance(name, str):
                raise ValueError(f"features: the name of a feature must be text, got {short_repr(name)}")
        if len(set(names)) != len(names):
            raise ValueError(f"features must differ in name, got {short_repr(names)}")
        settings = {entry["name"]: {key: value for key, value in entry.items() if key != "name"} for entry in settings}
    if not isinstance(settings, Mapping) or not settings:
        raise ValueError(f"features must map feature names to settings, got {short_repr(settings)}")
    return tuple(_make_feature(name, values) for name, values in settings.items())


def _make_feature(name: Any, settings: Any) -> JetFeature:
    if not isinstance(name, str) or not isinstance(settings, (Mapping, type(None))):
        raise ValueError(f"features: {name!r} must have a mapping of settings, got {short_repr(settings)}")
    settings = dict(settings or {})

    def fail(key: str, expected: str):
        raise ValueError(f"features.{name}.{key} must be {expected}, got {short_repr(settings[key])}")

    def is_number(value: Any) -> bool:
        return isinstance(value, Real) and not isinstance(value, bool) and np.isfinite(value)

    unknown = sorted(set(map(str, settings)) - set(JetFeature.__dataclass_fields__) | ({"name"} & set(settings)))
    if unknown:
        known = ", ".join(field for field in JetFeature.__dataclass_fields__ if field != "name")
        raise ValueError(f"features.{name} has the unknown setting {unknown[0]!r}, expected {known}")
    function = settings.get("function")
    if function is not None and not (isinstance(function, str) and function in FUNCTIONS):
        fail("function", f"one of {', '.join(FUNCTIONS)}")
    for key in ("subtract", "multiply", "larger_than", "smaller_than"):
        optional = key.endswith("_than")
        if key in settings and not (is_number(settings[key]) or optional and settings[key] is None):
            fail(key, "a finite number")
    if settings.get("multiply") == 0:
        fail("multiply", "a number other than 0")
    low, high = settings.get("larger_than"), settings.get("smaller_than")
    if low is not None and high is not None and not low < high:
        fail("smaller_than", f"more than larger_than, which is {low}")
    for key in ("clip_input", "clip_output"):
        limits = settings.get(key)
        if limits is None:
            continue
        if not isinstance(limits, Sequence) or len(limits) != 2 or not all(v is None or is_number(v) for v in limits):
            fail(key, "(lowest, highest), each a number or None")
        if None not in limits and not limits[0] <= limits[1]:
            fail(key, "(lowest, highest), the lowest first")
        settings[key] = tuple(limits)
    binning = settings.get("binning")
    if binning is not None:
        if not isinstance(binning, Sequence) or len(binning) != 3 or not all(map(is_number, binning)):
            fail("binning", "(first edge, last edge, number of edges)")
        low, high, num_edges = binning
        if not low < high or num_edges != int(num_edges) or num_edges < 2:
            fail("binning", "(first edge, last edge, number of edges) with at least 2 rising edges")
        settings["binning"] = (float(low), float(high), int(num_edges))
    return JetFeature(name, **settings)


def transform(features: Sequence[JetFeature], values: np.ndarray) -> np.ndarray:
    """Model values (..., features), float64, of physical values (..., features)."""
    return np.stack([feature.transform(values[..., k]) for k, feature in enumerate(features)], axis=-1)


def inverse_transform(features: Sequence[JetFeature], values: np.ndarray) -> np.ndarray:
    """Physical values (..., features), float64, of model values (..., features)."""
    return np.stack([feature.inverse(values[..., k]) for k, feature in enumerate(features)], axis=-1)


# ---------------------------------------------------------------------------------------------------------------------
# Four-momenta. Constituents of all jets lie end to end; `lengths` (jets,) tells where a jet ends.
# ---------------------------------------------------------------------------------------------------------------------


def wrap_phi(phi: np.ndarray) -> np.ndarray:
    """Angle in (-pi, pi]."""
    return np.pi - np.mod(np.pi - phi, 2 * np.pi)


def sum_jets(values: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Sums (jets, ...) over the constituents (all, ...) of each jet; 0 for jets without."""
    owner = np.repeat(np.arange(len(lengths)), lengths)
    sums = np.zeros((len(lengths), *values.shape[1:]))
    np.add.at(sums, owner, values)
    return sums


def momentum_features(momenta: np.ndarray) -> dict[str, np.ndarray]:
    """pt, eta, phi, energy and mass of four-momenta (..., 4) = (px, py, pz, E); eta = 0 without momentum."""
    px, py, pz, energy = np.moveaxis(np.asarray(momenta, dtype=np.float64), -1, 0)
    pt = np.hypot(px, py)
    with np.errstate(divide="ignore", invalid="ignore"):
        eta = np.where(pz == 0, 0.0, np.arcsinh(pz / pt))
    squared = energy**2 - px**2 - py**2 - pz**2
    return {
        "pt": pt,
        "eta": eta,
        "phi": np.arctan2(py, px),
        "energy": energy,
        "mass": np.sqrt(np.maximum(squared, 0.0)),
    }


def four_momenta(pt: np.ndarray, eta: np.ndarray, phi: np.ndarray, mass: np.ndarray | float = 0.0) -> np.ndarray:
    """(px, py, pz, E), (..., 4), float64."""
    pz = pt * np.sinh(eta)
    energy = np.sqrt((pt * np.cosh(eta)) ** 2 + np.square(mass))
    return np.stack([pt * np.cos(phi), pt * np.sin(phi), pz, energy], axis=-1)


DERIVED_FEATURES = (
    "part_pt",
    "part_eta",
    "part_phi",
    "part_mass",
    "part_ptrel",
    "part_erel",
    "part_etarel",
    "part_phirel",
    "part_deltaR",
)


def constituent_features(momenta: np.ndarray, lengths: np.ndarray) -> dict[str, np.ndarray]:
    """
    `DERIVED_FEATURES` (all constituents,) of four-momenta (all constituents, 4). "rel" is relative to the sum of the
    constituents of the jet: fractions of pt and energy, differences of eta and phi without any change of sign.
    """
    parts = momentum_features(momenta)
    jets = {name: np.repeat(values, lengths) for name, values in momentum_features(sum_jets(momenta, lengths)).items()}
    with np.errstate(divide="ignore", invalid="ignore"):
        etarel, phirel = parts["eta"] - jets["eta"], wrap_phi(parts["phi"] - jets["phi"])
        ptrel, erel = parts["pt"] / jets["pt"], parts["energy"] / jets["energy"]
    return {
        "part_pt": parts["pt"],
        "part_eta": parts["eta"],
        "part_phi": parts["phi"],
        "part_mass": parts["mass"],
        "part_ptrel": ptrel,
        "part_erel": erel,
        "part_etarel": etarel,
        "part_phirel": phirel,
        "part_deltaR": np.hypot(etarel, phirel),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Reading of rows
# ---------------------------------------------------------------------------------------------------------------------


def source_fields(name: str, available: Mapping) -> tuple[str, ...]:
    """Columns that the feature `name` is read from: its own, or the four-momentum that it follows from."""
    if name not in available and name in DERIVED_FEATURES and all(field in available for field in FOUR_MOMENTUM):
        return FOUR_MOMENTUM
    return (name,)


def jet_columns(rows: Any, features: Sequence[str]) -> tuple[dict[str, Sequence], int, bool]:
    """Brings jets into columns.

    Args:
        rows: a list of record dicts; a dict of columns (as `datasets.map(batched=True)` passes); or one record dict.
        features: names of the constituent features that will be read.

    Returns:
        (columns, number of jets, whether `rows` was one record). Of a list of records, the columns that the first one
        has.

    Raises:
        ValueError: `rows` is none of these, columns differ in length, or a field is missing.
    """
    if isinstance(rows, Mapping):
        first = rows[_required_fields(rows, features, "the rows have")[0]]
        if isinstance(first, (str, bytes)) or not hasattr(first, "__len__"):
            raise ValueError(f"expected lists of constituents, got {short_repr(first)}")
        if len(first) and np.ndim(first[0]) == 0:
            return {name: [value] for name, value in rows.items()}, 1, True
        columns = dict(rows.items())
        for name, values in columns.items():
            if not hasattr(values, "__len__") or isinstance(values, (str, bytes)):
                raise ValueError(f"column {name}: expected one value per row, got {short_repr(values)}")
            if len(values) != len(first):
                raise ValueError(f"columns differ in length: {len(first)} rows, but {name} has {len(values)}")
        return columns, len(first), False
    if isinstance(rows, (str, bytes)) or not hasattr(rows, "__iter__"):
        raise ValueError(
            f"rows: expected a record dict, a list of records or a dict of columns, got {type(rows).__name__}"
        )
    rows = list(rows)
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise ValueError(f"row {index}: expected a record dict, got {type(row).__name__}")
        _required_fields(row, features, f"row {index} has")
        missing = sorted(map(str, set(rows[0]) - set(row)))
        if missing:
            raise ValueError(f"row {index}: field {missing[0]} is missing (row 0 has it)")
    if not rows:
        return {name: [] for name in features}, 0, False
    return {name: [row[name] for row in rows] for name in rows[0]}, len(rows), False


def _required_fields(available: Mapping, features: Sequence[str], where: str) -> list[str]:
    names = [field for name in features for field in source_fields(name, available)]
    for name in names:
        if name not in available:
            known = f" (or {', '.join(FOUR_MOMENTUM)})" if name in DERIVED_FEATURES else ""
            fields = ", ".join(sorted(map(str, available))) or "none"
            raise ValueError(f"field {name}{known} is missing; {where} {fields}")
    return names
