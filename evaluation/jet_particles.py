"""Particle types, charges and impact parameters of the constituents of jets, by jet class.

Generators such as the EPiC flow (arXiv:2312.00123) make them beside the kinematics. Impact parameters are those of
charged constituents: neutral ones leave no track, whatever numbers a file or a model has for them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from hepzoo.evaluation.distances import wasserstein
from hepzoo.evaluation.jets import CLASSES, Jets, read_jets
from hepzoo.evaluation.tracks_dirc import expand_paths

# column -> what it is
TYPES = {
    "part_isChargedHadron": "charged hadron",
    "part_isNeutralHadron": "neutral hadron",
    "part_isPhoton": "photon",
    "part_isElectron": "electron",
    "part_isMuon": "muon",
}
CHARGED = ("part_isChargedHadron", "part_isElectron", "part_isMuon")
TRACKS = ("part_d0val", "part_d0err", "part_dzval", "part_dzerr")
COLUMNS = ("part_charge", *TYPES, *TRACKS)
# name -> (what it is, unit)
IMPACT_PARAMETERS = {
    "d0": ("d0 of charged", "mm"),
    "d0err": ("error of d0", "mm"),
    "d0_significance": ("d0 / error", ""),
    "dz": ("dz of charged", "mm"),
    "dzerr": ("error of dz", "mm"),
    "dz_significance": ("dz / error", ""),
}
DISPLACED = 3  # d0 / error of a displaced track


def known_columns(*samples: Sequence[str | Path]) -> list[str]:
    """Those of `COLUMNS` that every file of all samples has."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    known = list(COLUMNS)
    for path in (path for sample in samples for path in expand_paths(sample)):
        try:
            names = pq.read_schema(path).names
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]})") from None
        known = [name for name in known if name in names]
    return known


def read_particle_jets(
    paths: Sequence[str | Path],
    columns: Sequence[str],
    classes: Sequence[str] | None = None,
    max_jets: int | None = None,
) -> Jets:
    """Jets with the given columns, checked, and the `IMPACT_PARAMETERS` that follow from them as `features`.

    Raises:
        ValueError: flags other than exactly one of five per constituent, or what `as_jets` refuses.
    """
    jets = read_jets(paths, classes, max_jets, columns)
    features = dict(jets.features)
    flags = [name for name in TYPES if name in features]
    if len(flags) == len(TYPES):
        total = np.zeros(len(jets.pt))
        for name in flags:
            _refuse(jets, name, (features[name] != 0) & (features[name] != 1), "0 or 1")
            total += features[name]
        bad = np.flatnonzero(total > 1)
        if len(bad):
            where = f"jet {jets.owner[bad[0]]}, constituent {bad[0] - jets.offsets[jets.owner[bad[0]]]}"
            raise ValueError(f"{where}: {total[bad[0]]:g} of the flags part_is* are 1, expected at most one")
    return replace(jets, features=features | _impact_parameters(features))


def _refuse(jets: Jets, name: str, wrong: np.ndarray, expected: str) -> None:
    bad = np.flatnonzero(wrong)
    if len(bad):
        jet = jets.owner[bad[0]]
        where = f"jet {jet}: {name}[{bad[0] - jets.offsets[jet]}]"
        raise ValueError(f"{where} is {jets.features[name][bad[0]]:g}, expected {expected}")


def _impact_parameters(features: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """NaN where a constituent has none: neutral ones, and significances without an error."""
    if "part_charge" in features:
        charged = np.rint(features["part_charge"]) != 0
    elif all(name in features for name in CHARGED):
        charged = np.any([features[name] == 1 for name in CHARGED], axis=0)
    else:
        return {}
    found = {}
    for name in ("d0", "dz"):
        value, error = features.get(f"part_{name}val"), features.get(f"part_{name}err")
        if value is None:
            continue
        found[name] = np.where(charged, value, np.nan)
        if error is not None:
            found[f"{name}err"] = np.where(charged, error, np.nan)
            significance = np.full(len(value), np.nan)
            found[f"{name}_significance"] = np.divide(value, error, out=significance, where=charged & (error > 0))
    return found


def particle_features(jets: Jets) -> np.ndarray:
    """What the constituents of every jet are, for a classifier; shape `(n, k)`, k = 0 without such columns.

    Shares of every particle type in the constituents and in the pT, pT-weighted charge, share of charges of another
    type; of |d0| / error and |dz| / error of the charged constituents mean, largest and share above 3; mean errors.
    NaN where a jet has no charged constituent.
    """
    features, owner, size = jets.features, jets.owner, len(jets)

    def mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
        total = np.bincount(owner, weights, size)
        return np.divide(np.bincount(owner, values * weights, size), total, np.full(size, np.nan), where=total > 0)

    ones = np.ones(len(jets.pt))
    columns = [mean(features[flag], weights) for flag in TYPES if flag in features for weights in (ones, jets.pt)]
    if "part_charge" in features:
        columns.append(mean(np.rint(features["part_charge"]), jets.pt))
        if all(flag in features for flag in TYPES):
            columns.append(mean(wrong_charges(features), ones))
    for name in ("d0_significance", "dz_significance", "d0err", "dzerr"):
        if name not in features:
            continue
        known = np.isfinite(features[name])
        values = np.where(known, np.abs(features[name]), 0.0)
        columns.append(mean(values, known))
        if name.endswith("significance"):
            largest = np.zeros(size)
            np.maximum.at(largest, owner, values)
            columns += [np.where(np.isnan(columns[-1]), np.nan, largest), mean(values > DISPLACED, known)]
    return np.column_stack(columns) if columns else np.zeros((size, 0))


def wrong_charges(features: Mapping[str, np.ndarray]) -> np.ndarray:
    """Mask of the constituents whose charge is not that of their type: 0 of photons and neutral hadrons, else +-1."""
    is_charged = np.any([features[flag] == 1 for flag in CHARGED], axis=0)
    return (np.abs(np.rint(features["part_charge"])) != 1) == is_charged


def by_class(real: Jets, generated: Jets) -> dict[str, tuple[Jets, Jets]]:
    """Both samples as a whole ("all"), and each class that both have jets of, if there is more than one."""
    found = {"all": (real, generated)}
    numbers = [n for n in range(len(CLASSES)) if (real.label == n).any() and (generated.label == n).any()]
    if len(numbers) > 1:
        found |= {CLASSES[n]: (real.select(real.label == n), generated.select(generated.label == n)) for n in numbers}
    return found


def _share(jets: Jets, chosen: np.ndarray) -> tuple[float, float]:
    """Share of the constituents in a mask, and its error from the spread between jets."""
    counts, total = np.bincount(jets.owner[chosen], minlength=len(jets)), jets.multiplicity
    if not total.sum():
        return float("nan"), float("nan")
    share = counts.sum() / total.sum()
    return float(share), float(np.sqrt(((counts - share * total) ** 2).sum()) / total.sum())


def type_shares(samples: dict[str, tuple[Jets, Jets]]) -> list[dict[str, Any]]:
    """Shares of particle types among the constituents, by class.

    Also "charge of another type": the share of constituents whose charge is not that of their type (0 for photons and
    neutral hadrons, +-1 for the others).

    Args:
        samples: of `by_class`.

    Returns:
        Rows of `class`, `what`, `real`, `real_error`, `generated`, `generated_error`, `pull` (difference over its
        error). Empty if there are no flags.
    """
    rows = []
    for name, pair in samples.items():
        if not all(flag in jets.features for jets in pair for flag in TYPES):
            return []
        masks = {title: [jets.features[flag] == 1 for jets in pair] for flag, title in TYPES.items()}
        if all("part_charge" in jets.features for jets in pair):
            masks["charge of another type"] = [wrong_charges(jets.features) for jets in pair]
        for title, (first, second) in masks.items():
            real, real_error = _share(pair[0], first)
            generated, generated_error = _share(pair[1], second)
            error = np.hypot(real_error, generated_error)
            rows.append(
                {
                    "class": name,
                    "what": title,
                    "real": real,
                    "real_error": real_error,
                    "generated": generated,
                    "generated_error": generated_error,
                    "pull": float((generated - real) / error) if error > 0 else float("nan"),
                }
            )
    return rows


def impact_parameters(samples: dict[str, tuple[Jets, Jets]]) -> list[dict[str, Any]]:
    """Median size, share of displaced tracks and W1 of the impact parameters of charged constituents, by class.

    Args:
        samples: of `by_class`.

    Returns:
        Rows of `class`, `what`, `unit`, `real`, `generated` (median size; for "displaced tracks" the share with a d0
        more than 3 times its error), `w1`. Empty if there are none.
    """
    rows = []
    for name, pair in samples.items():
        for key, (title, unit) in IMPACT_PARAMETERS.items():
            if not all(key in jets.features for jets in pair):
                continue
            values = [jets.features[key][np.isfinite(jets.features[key])] for jets in pair]
            if not all(map(len, values)):
                continue
            about = {"class": name, "unit": unit}
            medians = {which: float(np.median(np.abs(v))) for which, v in zip(("real", "generated"), values)}
            rows.append(about | {"what": f"median size of {title}"} | medians | {"w1": wasserstein(*values)})
            if key == "d0_significance":
                shares = {which: float(np.mean(np.abs(v) > DISPLACED)) for which, v in zip(medians, values)}
                rows.append(about | {"what": f"displaced tracks, d0 above {DISPLACED} errors"} | shares | {"w1": None})
    return rows
