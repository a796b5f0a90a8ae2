"""
Post-processing of generated showers: the energy-sum filter, merging of duplicate cells, the MIP cut.

The filter is that of SPADE (arXiv:2606.11304): a shower whose visible energy is below `s (a E^b + c)`, the lower
envelope of the training sample, was stopped too early and is generated again.

Showers come in any form that `shower_columns` reads and are returned as a dict of columns: `incident_energy` [GeV],
float32 (showers,), and the lists of arrays `x`, `y`, `z` (int16) and `energy` [MeV] (float32).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np

from hepzoo.tokenization.batching import split_rows
from hepzoo.tokenization.records_spade import FIELDS, HIT_FIELDS, shower_columns

MIP_CUT = 0.1  # MeV, half of what a minimum-ionising particle leaves in 0.5 mm of silicon
MIN_ENERGY = 1e-3  # GeV, the envelope is not extrapolated below
_SHOWERS_PER_BIN = 100
_MAX_BINS = 30
_ITERATIONS = 20

Columns = dict[str, Any]


# ---------------------------------------------------------------------------------------------------------------------
# Columns
# ---------------------------------------------------------------------------------------------------------------------


def _flatten(rows: Any) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Incident energies (showers,), hits of each shower (showers,), and x, y, z, energy of all hits, end to end."""
    columns, count, _ = shower_columns(rows)
    incident = np.asarray(columns["incident_energy"], dtype=np.float32)
    if incident.shape != (count,):
        raise ValueError(f"incident_energy must be one number per shower, got shape {incident.shape} of {count} rows")
    flat = {}
    lengths = np.zeros(count, dtype=np.int64)
    for name in HIT_FIELDS:
        own = np.fromiter(map(len, columns[name]), dtype=np.int64, count=count)
        if name != "x" and (own != lengths).any():
            row = int(np.argmax(own != lengths))
            raise ValueError(f"row {row}: {name} has {own[row]} hits, x has {lengths[row]}; expected equal")
        lengths = own
        dtype = np.dtype(np.float32 if name == "energy" else np.int16)
        values = np.concatenate([np.empty(0, dtype), *columns[name]])
        if dtype.kind == "i" and values.dtype != dtype:
            wrong = ~((values >= 0) & (values <= np.iinfo(dtype).max) & (values == np.floor(values)))
            if wrong.any():
                hit = int(np.argmax(wrong))
                row = int(np.searchsorted(np.cumsum(lengths), hit, side="right"))
                raise ValueError(f"row {row}: {name} = {values[hit]:g}, expected a cell index")
        flat[name] = values.astype(dtype, copy=False)
    return incident, lengths, flat


def _columns(incident: np.ndarray, lengths: np.ndarray, flat: dict[str, np.ndarray]) -> Columns:
    return {"incident_energy": incident, **{name: split_rows(flat[name], lengths) for name in HIT_FIELDS}}


def _select_hits(incident, owner, flat, hits) -> Columns:
    """The given hits only; showers without any stay, empty."""
    lengths = np.bincount(owner[hits], minlength=len(incident))
    return _columns(incident, lengths, {name: values[hits] for name, values in flat.items()})


def energy_sums(rows: Any) -> np.ndarray:
    """Visible energy of each shower, MeV, float64 (showers,)."""
    incident, lengths, flat = _flatten(rows)
    return np.bincount(np.repeat(np.arange(len(incident)), lengths), flat["energy"], minlength=len(incident))


# ---------------------------------------------------------------------------------------------------------------------
# Cells
# ---------------------------------------------------------------------------------------------------------------------


def merge_duplicate_cells(rows: Any) -> tuple[Columns, int]:
    """
    Adds up hits of the same cell of a shower; the sum stands in the place of the first of them.

    Returns:
        The columns, and the number of hits that were added to an earlier one.
    """
    incident, lengths, flat = _flatten(rows)
    owner = np.repeat(np.arange(len(incident)), lengths)
    key = owner
    for name in "xyz":
        key = key * (int(flat[name].max(initial=0)) + 1) + flat[name]
    _, first, cell = np.unique(key, return_index=True, return_inverse=True)
    order = np.argsort(first)
    flat["energy"] = flat["energy"].copy()
    flat["energy"][first] = np.bincount(cell, flat["energy"], minlength=len(first))
    return _select_hits(incident, owner, flat, first[order]), len(key) - len(first)


def check_mip_cut(cut: Any):
    """Raises `ValueError` if `cut` is no energy in MeV."""
    if isinstance(cut, bool) or not isinstance(cut, Real) or not 0 <= cut < np.inf:
        raise ValueError(f"mip_cut is {cut!r}, expected an energy in MeV, at least 0")


def apply_mip_cut(rows: Any, cut: float = MIP_CUT) -> tuple[Columns, int]:
    """
    Keeps the hits with more than `cut` MeV.

    Returns:
        The columns, and the number of hits removed. Showers may become empty.

    Raises:
        ValueError: `cut` is no energy.
    """
    check_mip_cut(cut)
    incident, lengths, flat = _flatten(rows)
    keep = flat["energy"] > np.float32(cut)
    owner = np.repeat(np.arange(len(incident)), lengths)
    return _select_hits(incident, owner, flat, keep), int(len(keep) - keep.sum())


# ---------------------------------------------------------------------------------------------------------------------
# Energy sum
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EnergySumFilter:
    """
    Lower envelope of the visible energy: a shower is too low if E_sum / MeV < safety_factor (a (E / GeV)^b + c).

    Args:
        a, b, c: of the envelope. safety_factor: lowers it.
        max_retries: how often a shower is generated again.
    """

    a: float
    b: float
    c: float
    safety_factor: float = 0.9
    max_retries: int = 2

    def __post_init__(self):
        for name in ("a", "b", "c", "safety_factor"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Real) or not np.isfinite(value):
                raise ValueError(f"energy_sum_filter: {name} is {value!r}, expected a finite number")
        if self.safety_factor <= 0:
            raise ValueError(f"energy_sum_filter: safety_factor is {self.safety_factor!r}, expected a number above 0")
        if isinstance(self.max_retries, bool) or not isinstance(self.max_retries, int) or self.max_retries < 0:
            raise ValueError(f"energy_sum_filter: max_retries is {self.max_retries!r}, expected an integer from 0")

    @classmethod
    def from_settings(cls, settings: Mapping) -> "EnergySumFilter":
        """From the dict that `generation_config.json` holds.

        Raises:
            ValueError: it is no dict of a, b, c and possibly safety_factor and max_retries.
        """
        known = list(cls.__dataclass_fields__)
        if not isinstance(settings, Mapping) or not {"a", "b", "c"} <= set(settings) <= set(known):
            raise ValueError(f"energy_sum_filter is {settings!r}, expected a dict of {', '.join(known)}")
        return cls(**settings)

    def lowest_sum(self, incident_energy: Any) -> np.ndarray:
        """Smallest accepted visible energy, MeV, of incident energies in GeV, any shape."""
        energy = np.maximum(np.asarray(incident_energy, dtype=np.float64), MIN_ENERGY)
        return self.safety_factor * (self.a * energy**self.b + self.c)

    def is_too_low(self, rows: Any) -> np.ndarray:
        """bool (showers,)."""
        return energy_sums(rows) < self.lowest_sum(shower_columns(rows)[0]["incident_energy"])


def fit_energy_sum_filter(
    rows: Any, quantile: float = 0.01, safety_factor: float = 0.9, max_retries: int = 2
) -> EnergySumFilter:
    """
    The envelope a E^b + c of a training sample. How the published a, b, c were found is not known; this fit is ours.

    The sample is divided into bins of incident energy with equally many showers (at least 100). A bin gives one point:
    the `quantile` of E_sum / E times the median of E. (The ratio, because E_sum itself varies inside a bin.) The curve
    minimises the sum of the absolute relative deviations from the points, so that single bad bins do not matter: for
    every b from 0.5 to 1.5 in steps of 0.01, a and c come from iteratively reweighted least squares.

    Args:
        rows: the training sample.
        quantile: share of the sample below the curve, before the safety factor. Those showers are real: the filter
            takes what lies below `safety_factor` times the curve from the generated sample too.

    Raises:
        ValueError: fewer than 300 showers, their energies are not spread, or a value is out of range.
    """
    if not 0 < quantile < 1:
        raise ValueError(f"quantile is {quantile}, expected a number between 0 and 1")
    energy = np.asarray(shower_columns(rows)[0]["incident_energy"], dtype=np.float64)
    sums = energy_sums(rows)
    wrong = ~(np.isfinite(energy) & (energy > 0) & np.isfinite(sums))
    if wrong.any():
        row = int(np.argmax(wrong))
        raise ValueError(
            f"row {row}: incident_energy {energy[row]:g} GeV with {sums[row]:g} MeV in all hits, expected a positive "
            "and a finite energy"
        )
    if len(energy) < 3 * _SHOWERS_PER_BIN:
        raise ValueError(f"{len(energy)} showers, expected at least {3 * _SHOWERS_PER_BIN} to fit an envelope")
    groups = np.array_split(np.argsort(energy, kind="stable"), min(len(energy) // _SHOWERS_PER_BIN, _MAX_BINS))
    centers = np.array([np.median(energy[group]) for group in groups])
    lows = centers * np.array([np.quantile(sums[group] / energy[group], quantile) for group in groups])
    if centers[-1] < 1.5 * centers[0]:
        raise ValueError(
            f"energies from {energy.min():g} to {energy.max():g} GeV, expected a wider range to fit an envelope"
        )
    if (lows <= 0).any():
        center = centers[np.argmax(lows <= 0)]
        raise ValueError(f"{quantile:.3g} of the showers near {center:.3g} GeV are empty, expected visible energy")

    exponents = np.arange(50, 151) / 100
    # a scale in the middle of the range, so that a and c are of the same size
    scale = np.median(centers)
    powers = (centers / scale) ** exponents[:, None] / lows  # (exponents, points), relative to the points
    ones = np.broadcast_to(1 / lows, powers.shape)
    weights = np.ones_like(powers)
    for _ in range(_ITERATIONS):
        # normal equations of 1 = a powers + c ones
        pp, po, oo = ((weights * u * v).sum(axis=1) for u, v in ((powers, powers), (powers, ones), (ones, ones)))
        p1, o1 = (weights * powers).sum(axis=1), (weights * ones).sum(axis=1)
        determinant = pp * oo - po**2
        a, c = (p1 * oo - o1 * po) / determinant, (o1 * pp - p1 * po) / determinant
        deviations = np.abs(a[:, None] * powers + c[:, None] * ones - 1)
        weights = 1 / np.maximum(deviations, 1e-4)
    best = int(np.argmin(deviations.sum(axis=1)))
    b = float(exponents[best])
    return EnergySumFilter(float(a[best] / scale**b), b, float(c[best]), safety_factor, max_retries)


def regenerate_low_showers(
    rows: Any, energy_filter: EnergySumFilter, generate: Callable[[np.ndarray], Any]
) -> tuple[Columns, int, int]:
    """
    Replaces showers below the envelope by new ones of the same incident energy, at most `max_retries` times.

    Args:
        generate: takes incident energies in GeV, (n,), and returns n showers in this order.

    Returns:
        The columns in the order of `rows`, the number of showers that were generated again (a shower counts as often
        as it was), and the number of those that are still too low and were kept.
    """
    incident, lengths, flat = _flatten(rows)
    columns = _columns(incident, lengths, flat)
    low = np.flatnonzero(energy_filter.is_too_low(columns))
    retried = 0
    for _ in range(energy_filter.max_retries):
        if len(low) == 0:
            break
        retried += len(low)
        new = generate(incident[low])
        for name in HIT_FIELDS:
            for index, values in zip(low, new[name], strict=True):
                columns[name][index] = values
        low = low[energy_filter.is_too_low({name: new[name] for name in FIELDS})]
    return columns, retried, len(low)
