"""Pion/kaon separation power from log-likelihood differences or classifier logits.

Two Gaussians A exp(-(x - mu)^2 / (2 s^2)) are fitted (least squares, unweighted, A >= 0, s >= 1e-9) to histograms of
the kaon and pion scores, as in arXiv 2505.08736:

    separation = |mu_K - mu_pi| / ((s_K + s_pi) / 2)
    error^2    = (2 e_muK / S)^2 + (2 e_mupi / S)^2 + (2 D e_sK / S^2)^2 + (2 D e_spi / S^2)^2
    S = s_K + s_pi,  D = mu_K - mu_pi,  e = fit errors
"""

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

# Histogram edges of the published analysis, by momentum in GeV/c; other momenta take those of the nearest.
_EDGES = {3.0: (-50.0, 50.0, 400), 6.0: (-10.0, 10.0, 200), 9.0: (-5.0, 5.0, 200)}
MIN_SCORES = 10


class GaussianFit(NamedTuple):
    """A Gaussian fitted to a histogram; `*_error` are the fit's one-sigma errors."""

    amplitude: float
    mean: float
    sigma: float
    mean_error: float
    sigma_error: float


class SeparationResult(NamedTuple):
    """Separation power in standard deviations.

    Attributes:
        separation, error: from the Gaussian fits; see the module for the formulas.
        kaon, pion: the fits.
        moments: the same quantity from sample means and standard deviations.
        outside: fraction of the finite scores that lie outside the histogram (the fit does not see them).
    """

    separation: float
    error: float
    kaon: GaussianFit
    pion: GaussianFit
    moments: float
    outside: float

    def as_array(self) -> np.ndarray:
        """`(8,)`: amplitude, mean, sigma of the kaons; the same of the pions; separation; its error."""
        return np.array([*self.kaon[:3], *self.pion[:3], self.separation, self.error])


def kde_edges(momentum: float) -> np.ndarray:
    """Histogram edges of the published log-likelihood-difference analysis for a momentum in GeV/c.

    200 edges in [-10, 10] at 6, 200 in [-5, 5] at 9, 400 in [-50, 50] at 3; the nearest of these elsewhere.
    """
    if not np.isfinite(momentum):
        raise ValueError(f"momentum must be a finite number of GeV/c, got {momentum}")
    return np.linspace(*_EDGES[min(_EDGES, key=lambda p: abs(p - momentum))])


def classifier_edges() -> np.ndarray:
    """Histogram edges of the published classifier analysis: 400 edges in [-20, 20] (raw logits)."""
    return np.linspace(-20.0, 20.0, 400)


def auto_edges(*samples: np.ndarray, width: float = 6.0, max_bins: int = 200) -> np.ndarray:
    """Edges around the bulk of the samples: median +- `width` robust standard deviations.

    The bins are about a fifth of the smallest robust standard deviation wide, at most `max_bins` and never so many
    that the smallest sample has fewer than 8 entries per populated bin, roughly.
    """
    low, high, narrowest, fewest = np.inf, -np.inf, np.inf, np.inf
    for sample in samples:
        sample = np.asarray(sample, dtype=np.float64)
        sample = sample[np.isfinite(sample)]
        if not len(sample):
            raise ValueError("no finite score to choose histogram edges from")
        q16, median, q84 = np.quantile(sample, [0.1587, 0.5, 0.8413])
        sigma = max((q84 - q16) / 2, 1e-6 * max(abs(median), 1.0))
        low, high = min(low, median - width * sigma), max(high, median + width * sigma)
        narrowest, fewest = min(narrowest, sigma), min(fewest, len(sample))
    per_sigma = np.clip(fewest / 32, 2, 5)
    bins = int(np.clip(np.ceil((high - low) / narrowest * per_sigma), 10, max_bins))
    return np.linspace(low, high, bins + 1)


def _scores(values: Any, name: str) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64).ravel()
    if not len(values):
        raise ValueError(f"{name} is empty: at least {MIN_SCORES} scores are needed")
    if np.isnan(values).any():
        row = int(np.flatnonzero(np.isnan(values))[0])
        raise ValueError(f"{name}: score {row} is NaN ({int(np.isnan(values).sum())} of {len(values)} are)")
    finite = values[np.isfinite(values)]
    if len(finite) < MIN_SCORES:
        raise ValueError(f"{name} has {len(finite)} finite scores, at least {MIN_SCORES} are needed")
    return finite


def _gaussian(x: np.ndarray, amplitude: float, mean: float, sigma: float) -> np.ndarray:
    return amplitude * np.exp(-((x - mean) ** 2) / (2 * sigma**2))


def fit_gaussian(values: np.ndarray, edges: np.ndarray, name: str = "scores") -> GaussianFit:
    """Least-squares fit of a Gaussian to the histogram of the finite values.

    Raises:
        ValueError: too few values, NaN, all values outside the edges or in one bin, or a fit that does not converge.
    """
    from scipy.optimize import OptimizeWarning, curve_fit

    values = _scores(values, name)
    edges = np.asarray(edges, dtype=np.float64)
    if edges.ndim != 1 or len(edges) < 5 or not (np.diff(edges) > 0).all():
        raise ValueError("edges must be at least 5 rising numbers")
    counts, _ = np.histogram(values, edges)
    span = f"[{edges[0]:g}, {edges[-1]:g}]"
    if not counts.any():
        raise ValueError(f"{name}: no score inside the histogram range {span} (median score {np.median(values):.4g})")
    if np.count_nonzero(counts) < 3:
        raise ValueError(
            f"{name}: the Gaussian fit in {span} failed (all scores lie in {np.count_nonzero(counts)} bins)"
        )
    centers = (edges[:-1] + edges[1:]) / 2
    inside = values[(values >= edges[0]) & (values <= edges[-1])]
    near_peak = (float(counts.max()), float(np.median(inside)), max(float(inside.std()), np.diff(edges).min()))
    # The start of the published analysis leads to the same minimum, but needs up to a thousand times more steps.
    published = (1.0, float(values.mean()), max(float(values.std()), 1e-6))
    problem = ""
    for guess in (near_peak, published):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", OptimizeWarning)
                best, covariance = curve_fit(
                    _gaussian, centers, counts, p0=guess, bounds=([0, -np.inf, 1e-9], np.inf), maxfev=20_000
                )
        except (RuntimeError, ValueError, OptimizeWarning) as err:
            problem = str(err).splitlines()[0]
            continue
        errors = np.sqrt(np.diag(covariance))
        if best[0] > 0 and np.isfinite(errors).all():
            return GaussianFit(*map(float, best), float(errors[1]), float(errors[2]))
        problem = "the errors are not finite"
    raise ValueError(f"{name}: the Gaussian fit in {span} failed ({problem})")


def separation_from_moments(scores_kaon: np.ndarray, scores_pion: np.ndarray) -> float:
    """|mean_K - mean_pi| / ((std_K + std_pi) / 2) of the finite scores, without a fit."""
    kaon, pion = _scores(scores_kaon, "kaon scores"), _scores(scores_pion, "pion scores")
    spread = (kaon.std() + pion.std()) / 2
    if spread == 0:
        raise ValueError("all scores of each species are equal: the separation is undefined")
    return float(abs(kaon.mean() - pion.mean()) / spread)


def separation_power(
    dll_kaon: np.ndarray,
    dll_pion: np.ndarray,
    edges: np.ndarray | str | float = "auto",
    signed: bool = False,
) -> SeparationResult:
    """Separation power from Gaussian fits to the score histograms.

    Args:
        dll_kaon, dll_pion (`np.ndarray`): DLL = LL_kaon - LL_pion, or logits, of true kaons and true pions. Infinite
            scores are left out of the fits and of the moments; NaN is an error.
        edges: histogram edges; a number = the published edges for that momentum in GeV/c (`kde_edges`);
            `"classifier"` = `classifier_edges()`; `"auto"` = `auto_edges`.
        signed (`bool`): keep the sign of mu_K - mu_pi, as the published classifier analysis does.

    Raises:
        ValueError: empty input, NaN, or a fit that fails.
    """
    if isinstance(edges, str):
        if edges not in ("auto", "classifier"):
            raise ValueError(f"edges must be an array, a momentum in GeV/c, 'auto' or 'classifier', got {edges!r}")
        edges = (
            classifier_edges()
            if edges == "classifier"
            else auto_edges(_scores(dll_kaon, "kaon scores"), _scores(dll_pion, "pion scores"))
        )
    elif np.ndim(edges) == 0:
        edges = kde_edges(float(edges))
    edges = np.asarray(edges, dtype=np.float64)
    kaon = fit_gaussian(dll_kaon, edges, "kaon scores")
    pion = fit_gaussian(dll_pion, edges, "pion scores")
    both = kaon.sigma + pion.sigma
    apart = kaon.mean - pion.mean
    error = np.sqrt(
        (2 * kaon.mean_error / both) ** 2
        + (2 * pion.mean_error / both) ** 2
        + (2 * apart * kaon.sigma_error / both**2) ** 2
        + (2 * apart * pion.sigma_error / both**2) ** 2
    )
    scores = np.concatenate([_scores(dll_kaon, "kaon scores"), _scores(dll_pion, "pion scores")])
    outside = float(np.mean((scores < edges[0]) | (scores > edges[-1])))
    try:
        moments = separation_from_moments(dll_kaon, dll_pion)
    except ValueError:
        moments = float("nan")
    separation = apart / (both / 2)
    return SeparationResult(
        float(separation if signed else abs(separation)), float(error), kaon, pion, moments, outside
    )


def separation_table(
    rows: Any,
    scores: np.ndarray,
    momentum_bins: Sequence[float] | None = None,
    theta_bins: Sequence[float] | None = None,
    edges: np.ndarray | str | float = "auto",
    min_tracks: int = 50,
) -> list[dict[str, Any]]:
    """Separation power, area under the ROC curve and accuracy in bins of momentum and polar angle.

    Args:
        rows: tracks as `hepzoo.evaluation.tracks_dirc.as_tracks` takes them, or any dict with the columns P, Theta
            and PDG (or PID).
        scores (`np.ndarray` of shape `(n,)`): DLL or logit of every row, positive = kaon-like; NaN is an error.
        momentum_bins [GeV/c], theta_bins [deg]: bin edges (last bin closed), or `None`: each different value, rounded
            to 1e-3, is its own bin where there are at most 60, one bin for all else.
        edges: see `separation_power`; `"momentum"` takes the published edges of the bin's mean momentum.
        min_tracks (`int`): bins in which one species has fewer tracks get no figure, only a note.

    Returns:
        One dict per populated bin: momentum and theta range and mean, number of kaons and pions, `separation`,
        `error`, `moments`, `auc`, `accuracy` (score > 0), and `note`, which says why a figure is missing.
    """
    from hepzoo.evaluation.roc import auc_score

    momentum, theta, pdg = _kinematics(rows)
    scores = np.asarray(scores, dtype=np.float64)
    if scores.shape != momentum.shape:
        raise ValueError(f"scores must have one number per row, shape {momentum.shape}; got {scores.shape}")
    if np.isnan(scores).any():
        row = int(np.flatnonzero(np.isnan(scores))[0])
        raise ValueError(f"row {row}: the score is NaN, expected a number ({int(np.isnan(scores).sum())} rows)")
    kaon, pion = np.abs(pdg) == 321, np.abs(pdg) == 211
    other = np.flatnonzero(~(kaon | pion))
    if len(other):
        raise ValueError(f"row {other[0]}: PDG is {pdg[other[0]]}, expected +-211 or +-321")
    table = []
    for p_low, p_high, p_in in _bins(momentum, momentum_bins, "momentum_bins"):
        for t_low, t_high, t_in in _bins(theta, theta_bins, "theta_bins"):
            inside = p_in & t_in
            if not inside.any():
                continue
            k, p = scores[inside & kaon], scores[inside & pion]
            row: dict[str, Any] = {
                "momentum_low": p_low,
                "momentum_high": p_high,
                "momentum": float(momentum[inside].mean()),
                "theta_low": t_low,
                "theta_high": t_high,
                "theta": float(theta[inside].mean()),
                "kaons": len(k),
                "pions": len(p),
            }
            row |= dict.fromkeys(("separation", "error", "moments", "auc", "accuracy"), float("nan")) | {"note": ""}
            if min(len(k), len(p)) < max(min_tracks, 1):
                row["note"] = f"fewer than {min_tracks} tracks of a species"
            else:
                row["auc"] = auc_score(k, p)
                row["accuracy"] = float((np.sum(k > 0) + np.sum(p <= 0)) / (len(k) + len(p)))
                try:
                    row["moments"] = separation_from_moments(k, p)
                    wanted = row["momentum"] if isinstance(edges, str) and edges == "momentum" else edges
                    result = separation_power(k, p, edges=wanted)
                    row["separation"], row["error"] = result.separation, result.error
                    if result.outside > 0.01:
                        row["note"] = f"{100 * result.outside:.0f} % of the scores outside the histogram"
                except ValueError as err:
                    row["note"] = str(err)
            table.append(row)
    return table


def _kinematics(rows: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if isinstance(rows, dict) and not {"pmtID", "pixelID", "leadTime"} & set(rows):
        code = "PDG" if "PDG" in rows else "PID"
        missing = [name for name in ("P", "Theta", code) if name not in rows]
        if missing:
            raise ValueError(f"column {missing[0]!r} is missing; needed: P, Theta, PDG")
        arrays = [np.asarray(rows[name], dtype=np.float64).ravel() for name in ("P", "Theta", code)]
        if len({len(a) for a in arrays}) != 1:
            raise ValueError(f"columns P, Theta, {code} differ in length: {[len(a) for a in arrays]}")
        return arrays[0], arrays[1], arrays[2].astype(np.int64)
    from hepzoo.evaluation.tracks_dirc import as_tracks

    tracks = as_tracks(rows)
    return tracks.momentum, tracks.theta, tracks.pdg


def _bins(values: np.ndarray, edges: Sequence[float] | None, name: str) -> list[tuple[float, float, np.ndarray]]:
    if edges is None:
        rounded = np.round(values, 3)
        points = np.unique(rounded)
        if len(points) > 60:
            return [(float(values.min()), float(values.max()), np.ones(len(values), bool))]
        return [(float(p), float(p), rounded == p) for p in points]
    edges = np.asarray(edges, dtype=np.float64)
    if edges.ndim != 1 or len(edges) < 2 or not (np.diff(edges) > 0).all():
        raise ValueError(f"{name} must be at least two rising numbers, got {edges.tolist()}")
    bins = []
    for i, (low, high) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
        last = i == len(edges) - 2
        inside = (values >= low) & ((values <= high) if last else (values < high))
        bins.append((float(low), float(high), inside))
    return bins
