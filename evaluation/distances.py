"""Distances of two samples, and of real and generated tracks, each beside the same between halves of the real ones.

A distance means little without the one that statistics alone gives. So every figure comes with a `floor`: the real
tracks are split at random into two parts (the second one not larger than the generated sample) and the same
distance is taken between them, averaged over several splits. Whole tracks are split, never photons of one track.
A distance near its floor cannot be told from statistical noise.

Quantities and sources: photon yield, arrival time, x and y of the photons, the hit pattern over the pixels, and
the ratio RMS of arXiv 2505.08736.
"""

from pathlib import Path
from typing import Any

import numpy as np

from hepzoo.evaluation.tables import format_table, write_table
from hepzoo.evaluation.tracks_dirc import SPECIES, DircTracks, as_tracks
from hepzoo.tokenization.geometry_dirc import DircGeometry

TIME_EDGES = np.arange(9.0, 157.25, 0.5)  # ns, the binning of the published time spectra
TABLE_COLUMNS = {
    "species": "species",
    "quantity": "quantity",
    "distance": "distance",
    "unit": "unit",
    "value": "value",
    "floor": "floor",
    "floor_spread": "+-",
    "over_floor": "value/floor",
}


def wasserstein(real: np.ndarray, generated: np.ndarray) -> float:
    """Wasserstein-1 distance of two samples, in their unit."""
    from scipy.stats import wasserstein_distance

    real, generated = _sample(real, "real"), _sample(generated, "generated")
    return float(wasserstein_distance(real, generated))


def total_variation(real_counts: np.ndarray, generated_counts: np.ndarray) -> float:
    """Half the summed absolute difference of two normalised count arrays: 0 equal, 1 disjoint."""
    real, generated = _counts(real_counts, generated_counts)
    return float(0.5 * np.abs(real / real.sum() - generated / generated.sum()).sum())


def chi2_per_bin(real_counts: np.ndarray, generated_counts: np.ndarray) -> float:
    """Two-sample chi2 of count arrays of different totals, per degree of freedom; about 1 for equal parents.

    chi2 = sum (sqrt(M/N) n_i - sqrt(N/M) m_i)^2 / (n_i + m_i) over bins with entries, N and M the totals.
    """
    real, generated = _counts(real_counts, generated_counts)
    filled = real + generated > 0
    scale = np.sqrt(generated.sum() / real.sum())
    chi2 = ((scale * real - generated / scale)[filled] ** 2 / (real + generated)[filled]).sum()
    return float(chi2 / max(filled.sum() - 1, 1))


def ratio_rms(real_counts: np.ndarray, generated_counts: np.ndarray) -> float:
    """sqrt(mean_w((r - 1)^2)) / sqrt(number of bins), r = generated / real density, weights w = real density.

    Bins without real entries have weight 0 and count neither in the mean nor in the number of bins.
    """
    real, generated = _counts(real_counts, generated_counts)
    filled = real > 0
    weight = real[filled] / real.sum()
    ratio = (generated[filled] / generated.sum()) / weight
    return float(np.sqrt(np.average((ratio - 1) ** 2, weights=weight)) / np.sqrt(filled.sum()))


def histogram_wasserstein(real_counts: np.ndarray, generated_counts: np.ndarray, edges: np.ndarray) -> float:
    """Wasserstein-1 distance of two histograms, in the unit of the edges, with the entries at the bin centres."""
    real, generated = _counts(real_counts, generated_counts)
    centers = (np.asarray(edges)[:-1] + np.asarray(edges)[1:]) / 2
    if len(centers) != len(real):
        raise ValueError(f"{len(edges)} edges for {len(real)} bins, expected {len(real) + 1}")
    difference = np.cumsum(real / real.sum() - generated / generated.sum())
    return float((np.abs(difference[:-1]) * np.diff(centers)).sum())


def quantile_kl(real: np.ndarray, generated: np.ndarray, bins: int = 30) -> float:
    """Kullback-Leibler divergence of two samples in bins that hold equal parts of the real sample, in nats.

    KL = sum_b p_b ln(p_b / q_b), p_b and q_b the fractions of real and generated values in bin b. The bin edges are
    the `bins` quantiles of the real sample (fewer where values repeat), the outer bins are open. Every bin gets half
    an entry of both samples beforehand, which keeps the divergence finite. Equal parents give on average about
    (bins - 1) / 2 * (1 / len(real) + 1 / len(generated)).
    """
    if bins < 2:
        raise ValueError(f"bins must be at least 2, got {bins}")
    real, generated = _sample(real, "real"), _sample(generated, "generated")
    edges = np.unique(np.quantile(real, np.arange(1, bins) / bins))
    counts = [np.bincount(np.searchsorted(edges, v), minlength=len(edges) + 1) for v in (real, generated)]
    filled = counts[0] + counts[1] > 0  # an outer bin is empty in both where the values of all are the same
    p, q = ((c[filled] + 0.5) / (c[filled] + 0.5).sum() for c in counts)
    return float((p * np.log(p / q)).sum())


def two_sample_auc(real: np.ndarray, generated: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """How well boosted trees tell generated from real rows of features, five-fold cross-validated.

    Args:
        real, generated (`np.ndarray` of shapes `(n, k)` and `(m, k)`): features; NaN is allowed. At least 20 rows
            each; n and m should be alike.
        seed (`int`): of the folds and of the trees.

    Returns:
        Area under the ROC curve of all held-out scores (0.5 = indistinguishable, 1 = told apart), and its error: the
        spread of the five folds / sqrt(5).
    """
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    from hepzoo.evaluation.roc import auc_score

    features, y = np.concatenate([real, generated]), np.repeat([0, 1], [len(real), len(generated)])
    if min(len(real), len(generated)) < 20:
        raise ValueError(
            f"the classifier test needs at least 20 rows of each sample, got {len(real)} and {len(generated)}"
        )
    model = HistGradientBoostingClassifier(max_iter=100, max_leaf_nodes=15, early_stopping=False, random_state=seed)
    folds = list(StratifiedKFold(5, shuffle=True, random_state=seed).split(features, y))
    score = cross_val_predict(model, features, y, cv=folds, method="predict_proba")[:, 1]
    each = [auc_score(score[test][y[test] == 1], score[test][y[test] == 0]) for _, test in folds]
    return auc_score(score[y == 1], score[y == 0]), float(np.std(each, ddof=1) / np.sqrt(5))


def _sample(values: np.ndarray, name: str) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64).ravel()
    if not len(values):
        raise ValueError(f"the {name} sample is empty")
    if not np.isfinite(values).all():
        row = int(np.flatnonzero(~np.isfinite(values))[0])
        raise ValueError(f"the {name} sample: value {row} is {values[row]}, expected a finite number")
    return values


def _counts(real: np.ndarray, generated: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    real, generated = np.asarray(real, dtype=np.float64).ravel(), np.asarray(generated, dtype=np.float64).ravel()
    if real.shape != generated.shape:
        raise ValueError(f"count arrays differ in length: {len(real)} and {len(generated)}")
    for counts, name in ((real, "real"), (generated, "generated")):
        if not np.isfinite(counts).all() or (counts < 0).any():
            raise ValueError(f"{name} counts must be finite and not negative")
        if not counts.sum() > 0:
            raise ValueError(f"the {name} histogram is empty")
    return real, generated


def pixel_counts(tracks: DircTracks, geometry: DircGeometry | None = None) -> np.ndarray:
    """Hits per channel (`pmt * pixels_per_pmt + pixel`), shape `(num_channels,)`."""
    geometry = DircGeometry() if geometry is None else geometry
    return np.bincount(geometry.channel(tracks.pmt, tracks.pixel), minlength=geometry.num_channels)


def _per_track_mean(tracks: DircTracks, values: np.ndarray) -> np.ndarray:
    return np.add.reduceat(values, tracks.offsets[:-1]) / tracks.num_hits


def summary_features(tracks: DircTracks) -> np.ndarray:
    """Per-track features of the classifier test, shape `(n, 12)`.

    Momentum, theta, yield; mean and standard deviation of time, x and y; earliest and latest time; and the number of
    different pixels. Tracks without hits give zeros for all but the first three.
    """
    some = tracks.num_hits > 0
    features = np.zeros((len(tracks), 12))
    features[:, :3] = np.stack([tracks.momentum, tracks.theta, tracks.num_hits], axis=1)
    if not some.any():
        return features
    full = tracks.select(some)
    starts = full.offsets[:-1]
    columns = []
    for values in (full.time, full.x, full.y):
        mean = _per_track_mean(full, values)
        spread = _per_track_mean(full, (values - np.repeat(mean, full.num_hits)) ** 2)
        columns += [mean, np.sqrt(spread)]
    columns += [np.minimum.reduceat(full.time, starts), np.maximum.reduceat(full.time, starts)]
    owner = np.repeat(np.arange(len(full)), full.num_hits)
    pairs = np.unique(np.stack([owner, full.pmt * (full.pixel.max() + 1) + full.pixel]), axis=1)
    columns.append(np.bincount(pairs[0], minlength=len(full)))
    features[some, 3:] = np.stack(columns, axis=1)
    return features


def classifier_auc(real: DircTracks, generated: DircTracks, seed: int = 0, max_tracks: int = 5000) -> float:
    """Area under the ROC curve of boosted trees that tell generated from real tracks, five-fold cross-validated.

    0.5: indistinguishable by the `summary_features`. Both samples are cut to the same size, at most `max_tracks`.
    """
    rng = np.random.default_rng(seed)
    size = min(len(real), len(generated), max_tracks)
    if size < 20:
        raise ValueError(f"the classifier test needs at least 20 tracks of each sample, got {size}")
    features = [summary_features(tracks.select(rng.permutation(len(tracks))[:size])) for tracks in (real, generated)]
    return two_sample_auc(*features, seed=seed)[0]


def track_distances(
    real: DircTracks,
    generated: DircTracks,
    geometry: DircGeometry | None = None,
    time_edges: np.ndarray = TIME_EDGES,
) -> dict[tuple[str, str, str], float]:
    """All distances of two sets of tracks: {(quantity, distance, unit): value}.

    Wasserstein-1 of momentum, theta, photon yield, time, x and y, in their unit and divided by the standard
    deviation of the real sample ("rel. to std"; left out where that is 0); total variation and chi2 per bin over the
    pixels; ratio RMS over pixel columns (x), rows (y) and time bins.
    """
    geometry = DircGeometry() if geometry is None else geometry
    found: dict[tuple[str, str, str], float] = {}
    samples = {
        "momentum": ("GeV/c", real.momentum, generated.momentum),
        "theta": ("deg", real.theta, generated.theta),
        "photon yield": ("photons", real.num_hits, generated.num_hits),
        "time": ("ns", real.time, generated.time),
        "x": ("mm", real.x, generated.x),
        "y": ("mm", real.y, generated.y),
    }
    for name, (unit, a, b) in samples.items():
        value, spread = wasserstein(a, b), float(np.std(a))
        found[name, "Wasserstein-1", unit] = value
        if spread > 1e-9:
            found[name, "Wasserstein-1", "rel. to std"] = value / spread
    a, b = pixel_counts(real, geometry), pixel_counts(generated, geometry)
    found["hit pattern", "total variation", "0..1"] = total_variation(a, b)
    found["hit pattern", "chi2 / bins", "1"] = chi2_per_bin(a, b)
    for name, edges in (("x", geometry.x_edges), ("y", geometry.y_edges), ("time", np.asarray(time_edges))):
        counts = [np.histogram(getattr(tracks, name), edges)[0] for tracks in (real, generated)]
        found[name, "ratio RMS", "1"] = ratio_rms(*counts)
    return found


def compare_tracks(
    real: Any,
    generated: Any,
    geometry: DircGeometry | None = None,
    splits: int = 3,
    classifier: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Real against generated tracks, per species, with the statistical floor of every figure.

    Args:
        real, generated: rows as `hepzoo.evaluation.tracks_dirc.as_tracks` takes them. Momentum and theta should be
            distributed alike in both (their own distances show whether they are).
        geometry (`DircGeometry`, *optional*): sensor plane; default the hpDIRC.
        splits (`int`): random splits of the real tracks that the floor is averaged over.
        classifier (`bool`): add the area under the ROC curve of a classifier on per-track features.
        seed (`int`): of the splits and of the classifier.

    Returns:
        `{"species": {name: {"real": summary, "generated": summary, "distances": [row, ...]}}}`; a row has
        `quantity`, `distance`, `unit`, `value`, `floor`, `floor_spread` (standard deviation over the splits) and
        `over_floor`. Pass it to `table_rows`, `format_report` or `save_report`.

    Raises:
        ValueError: a species is in one sample only, or has fewer than 4 tracks or no hits.
    """
    if splits < 1:
        raise ValueError(f"splits must be at least 1, got {splits}")
    real, generated = as_tracks(real, geometry), as_tracks(generated, geometry)
    report: dict[str, Any] = {"seed": seed, "splits": splits, "species": {}}
    for name, a, b in _by_species(real, generated):
        for tracks, which in ((a, "real"), (b, "generated")):
            if len(tracks) < 4 or not tracks.offsets[-1]:
                raise ValueError(f"{name}: {len(tracks)} {which} tracks with hits, at least 4 are needed")
        rng = np.random.default_rng(seed)
        values = track_distances(a, b, geometry)
        if classifier:
            values["tracks", "classifier AUC", "0.5..1"] = classifier_auc(a, b, seed)
        floors = []
        for _ in range(splits):
            order = rng.permutation(len(a))
            half = len(a) // 2
            first, second = a.select(order[half:]), a.select(order[: min(half, len(b))])
            floors.append(track_distances(first, second, geometry))
            if classifier and len(floors) == 1:  # one is enough: it takes most of the time
                floors[-1]["tracks", "classifier AUC", "0.5..1"] = classifier_auc(first, second, seed)
        rows = []
        for key, value in values.items():
            known = [f[key] for f in floors if key in f]
            floor = float(np.mean(known)) if known else float("nan")
            rows.append(
                dict(zip(("quantity", "distance", "unit"), key, strict=True))
                | {
                    "value": value,
                    "floor": floor,
                    "floor_spread": float(np.std(known)) if len(known) > 1 else float("nan"),
                    "over_floor": value / floor if floor > 0 and key[1] != "classifier AUC" else float("nan"),
                }
            )
        report["species"][name] = {"real": _summary(a), "generated": _summary(b), "distances": rows}
    return report


def _by_species(real: DircTracks, generated: DircTracks) -> list[tuple[str, DircTracks, DircTracks]]:
    codes = {abs(int(code)) for code in np.unique(np.concatenate([real.pdg, generated.pdg]))}
    if codes == {0}:
        return [("all", real, generated)]
    unknown = codes - set(SPECIES.values())
    if unknown:
        raise ValueError(f"PDG code {min(unknown)}: expected +-211 (pion) or +-321 (kaon)")
    found = []
    for name, code in SPECIES.items():
        if code in codes:
            a, b = real.species(name), generated.species(name)
            if not len(a) or not len(b):
                raise ValueError(f"{name}s are in the {'generated' if len(b) else 'real'} tracks only")
            found.append((name, a, b))
    return found


def _summary(tracks: DircTracks) -> dict[str, float]:
    return {
        "tracks": len(tracks),
        "photons": int(tracks.offsets[-1]),
        "mean_yield": float(tracks.num_hits.mean()),
        "std_yield": float(tracks.num_hits.std()),
        "mean_time": float(tracks.time.mean()),
        "momentum_range": [float(tracks.momentum.min()), float(tracks.momentum.max())],
        "theta_range": [float(tracks.theta.min()), float(tracks.theta.max())],
    }


def table_rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The distances of a `compare_tracks` report as one flat list of rows with a `species` column."""
    return [{"species": name} | row for name, part in report["species"].items() for row in part["distances"]]


def format_report(report: dict[str, Any]) -> str:
    """The report as text: sample sizes, the aligned table, and how to read it."""
    lines = []
    for name, part in report["species"].items():
        for which in ("real", "generated"):
            s = part[which]
            lines.append(
                f"{name}s, {which}: {s['tracks']} tracks, {s['photons']} photons, "
                f"{s['mean_yield']:.2f} +- {s['std_yield']:.2f} per track, mean time {s['mean_time']:.2f} ns, "
                f"P {s['momentum_range'][0]:g}-{s['momentum_range'][1]:g} GeV/c, "
                f"theta {s['theta_range'][0]:g}-{s['theta_range'][1]:g} deg"
            )
    lines += ["", format_table(table_rows(report), TABLE_COLUMNS, digits=3), ""]
    lines.append(
        "floor: the same distance between two disjoint parts of the real tracks (mean and spread of "
        f"{report['splits']} random splits); value/floor near 1 = no difference beyond statistics."
    )
    return "\n".join(lines)


def save_report(report: dict[str, Any], path: str | Path) -> Path:
    """Saves a report: `.json` in full, `.csv` the table."""
    return write_table(path, table_rows(report), report)
