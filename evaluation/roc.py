"""Efficiency, rejection and precision of binary scores: kaon identification and noise filtering.

Threshold scans follow arXiv 2505.08736: kaon efficiency TP/(TP+FN), pion rejection TN/(TN+FP), and for the filter
(positive = noise) signal retention TN/(TN+FP), noise rejection TP/(TP+FN), precision and recall.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np


class RocScan(NamedTuple):
    """Efficiency of the positives, rejection of the negatives at rising thresholds (accepted: score > threshold)."""

    thresholds: np.ndarray
    efficiency: np.ndarray
    rejection: np.ndarray

    @property
    def auc(self) -> float:
        """Area of rejection versus efficiency (trapezoids)."""
        return _area(self.rejection, self.efficiency)


def _area(y: np.ndarray, x: np.ndarray) -> float:
    """Trapezoid area of y over x, whichever way x runs."""
    return float(abs(np.sum(np.diff(x) * (y[1:] + y[:-1]) / 2)))


def _two_classes(positives: Any, negatives: Any) -> tuple[np.ndarray, np.ndarray]:
    arrays = []
    for values, name in ((positives, "positive"), (negatives, "negative")):
        values = np.asarray(values, dtype=np.float64).ravel()
        if not len(values):
            raise ValueError(f"no {name} scores: both classes need at least one")
        if np.isnan(values).any():
            row = int(np.flatnonzero(np.isnan(values))[0])
            raise ValueError(f"{name} score {row} is NaN, expected a number")
        arrays.append(values)
    return arrays[0], arrays[1]


def _split(scores: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    scores, labels = np.asarray(scores, dtype=np.float64).ravel(), np.asarray(labels).ravel()
    if scores.shape != labels.shape:
        raise ValueError(f"scores and labels differ in length: {len(scores)} and {len(labels)}")
    bad = np.flatnonzero((labels != 0) & (labels != 1))
    if len(bad):
        raise ValueError(f"label {bad[0]} is {labels[bad[0]]}, expected 0 or 1")
    return _two_classes(scores[labels == 1], scores[labels == 0])


def _above(values: np.ndarray, thresholds: np.ndarray, inclusive: bool) -> np.ndarray:
    """Number of values above (or at) each threshold."""
    ordered = np.sort(values)
    return len(ordered) - np.searchsorted(ordered, thresholds, side="left" if inclusive else "right")


def roc_scan(
    positives: np.ndarray,
    negatives: np.ndarray,
    thresholds: np.ndarray | tuple[float, float, int] = (-40.0, 40.0, 20000),
) -> RocScan:
    """Efficiency and rejection at given thresholds.

    Args:
        positives, negatives (`np.ndarray`): scores of true kaons and true pions.
        thresholds: rising values, or (low, high, number). Default: the published scan.
    """
    positives, negatives = _two_classes(positives, negatives)
    if isinstance(thresholds, tuple) and len(thresholds) == 3:
        thresholds = np.linspace(thresholds[0], thresholds[1], int(thresholds[2]))
    thresholds = np.asarray(thresholds, dtype=np.float64)
    efficiency = _above(positives, thresholds, inclusive=False) / len(positives)
    rejection = 1 - _above(negatives, thresholds, inclusive=False) / len(negatives)
    return RocScan(thresholds, efficiency, rejection)


def auc_score(positives: np.ndarray, negatives: np.ndarray) -> float:
    """Area under the ROC curve = probability that a positive scores above a negative, ties counting one half."""
    from scipy.stats import rankdata

    positives, negatives = _two_classes(positives, negatives)
    n, m = len(positives), len(negatives)
    ranks = rankdata(np.concatenate([positives, negatives]))
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))


def accuracy(positives: np.ndarray, negatives: np.ndarray, threshold: float = 0.0) -> float:
    """Fraction of scores on their own side of the threshold (0 for logits and DLL, 0.5 for probabilities)."""
    positives, negatives = _two_classes(positives, negatives)
    right = np.sum(positives > threshold) + np.sum(negatives <= threshold)
    return float(right / (len(positives) + len(negatives)))


def rejection_at_efficiency(positives: np.ndarray, negatives: np.ndarray, efficiency: float = 0.9) -> dict[str, float]:
    """Background rejection 1/eps_background at a wanted signal efficiency.

    The threshold is the largest at which at least that fraction of the positives passes (score >= threshold).

    Returns:
        `threshold`, `efficiency` (reached), `rejection` (1/eps; infinite when no negative passes), `rejection_error`
        (binomial; infinite then too), `passing` (number of negatives that pass).
    """
    if not 0 < efficiency <= 1:
        raise ValueError(f"efficiency must be in (0, 1], got {efficiency}")
    positives, negatives = _two_classes(positives, negatives)
    ordered = np.sort(positives)[::-1]
    threshold = ordered[max(int(np.ceil(efficiency * len(ordered) - 1e-9)), 1) - 1]
    passing = int(np.sum(negatives >= threshold))
    eps = passing / len(negatives)
    rejection = 1 / eps if passing else float("inf")
    relative = np.sqrt((1 - eps) / passing) if passing else float("inf")
    return {
        "threshold": float(threshold),
        "efficiency": float(np.mean(positives >= threshold)),
        "rejection": float(rejection),
        "rejection_error": float(rejection * relative),
        "passing": passing,
    }


def precision_recall_curve(probabilities: np.ndarray, labels: np.ndarray, num: int = 100) -> dict[str, np.ndarray]:
    """Precision and recall at `num` thresholds linspace(0, 1, endpoint excluded), accepted: probability >= threshold.

    Where nothing is accepted the precision is 0, as in the published analysis; the curve of `filter_metrics` ends
    at (recall 0, precision 1) by definition.
    """
    positives, negatives = _split(probabilities, labels)
    thresholds = np.linspace(0, 1, num, endpoint=False)
    hit, false = _above(positives, thresholds, True), _above(negatives, thresholds, True)
    precision = np.divide(hit, hit + false, out=np.zeros(num), where=hit + false > 0)
    return {"thresholds": thresholds, "precision": precision, "recall": hit / len(positives)}


def filter_scan(probabilities: np.ndarray, labels: np.ndarray, num: int = 100) -> dict[str, Any]:
    """Signal retention and noise rejection at `num` thresholds linspace(0, 1), and the area of one over the other."""
    positives, negatives = _split(probabilities, labels)
    thresholds = np.linspace(0, 1, num)
    rejection = _above(positives, thresholds, True) / len(positives)
    retention = 1 - _above(negatives, thresholds, True) / len(negatives)
    return {
        "thresholds": thresholds,
        "signal_retention": retention,
        "noise_rejection": rejection,
        "area": _area(rejection, retention),
    }


def filter_metrics(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """All figures of merit of a noise filter.

    Args:
        probabilities (`np.ndarray` of shape `(h,)`): probability of every hit to be noise, in [0, 1].
        labels (`np.ndarray` of shape `(h,)`): 1 noise, 0 signal.

    Returns:
        `precision`, `recall`, `f1` at 0.5 (probabilities rounded half to even, so exactly 0.5 counts as signal),
        `signal_retention` and `noise_rejection` there, `average_precision` (step-wise over all thresholds),
        `auc` (area of noise rejection over signal retention, 100 thresholds), `pr_area` (trapezoids under the
        precision-recall curve of 100 thresholds with its end points), and the arrays
        `pr_curve` = (recall, precision) from (1, 0) to (0, 1) and `retention_curve` = (signal retention, noise
        rejection).
    """
    probabilities = np.asarray(probabilities, dtype=np.float64).ravel()
    outside = np.flatnonzero(~((probabilities >= 0) & (probabilities <= 1)))
    if len(outside):
        raise ValueError(f"probability {outside[0]} is {probabilities[outside[0]]}, expected a number in [0, 1]")
    positives, negatives = _split(probabilities, labels)
    found, false = int(np.sum(np.round(positives) == 1)), int(np.sum(np.round(negatives) == 1))
    precision = found / (found + false) if found + false else 0.0
    recall = found / len(positives)
    curve = precision_recall_curve(probabilities, labels)
    scan = filter_scan(probabilities, labels)
    recalls = np.concatenate([[1.0], curve["recall"], [0.0]])
    precisions = np.concatenate([[0.0], curve["precision"], [1.0]])
    return {
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if precision + recall else 0.0,
        "signal_retention": 1 - false / len(negatives),
        "noise_rejection": recall,
        "average_precision": average_precision(positives, negatives),
        "auc": scan["area"],
        "pr_area": _area(precisions, recalls),
        "pr_curve": np.stack([recalls, precisions]),
        "retention_curve": np.stack([scan["signal_retention"], scan["noise_rejection"]]),
    }


def average_precision(positives: np.ndarray, negatives: np.ndarray) -> float:
    """sum_k (R_k - R_{k-1}) P_k over all distinct thresholds, highest first."""
    from sklearn.metrics import average_precision_score

    positives, negatives = _two_classes(positives, negatives)
    labels = np.concatenate([np.ones(len(positives)), np.zeros(len(negatives))])
    return float(average_precision_score(labels, np.concatenate([positives, negatives])))


def summarize_runs(runs: Sequence[Mapping[str, float]], level: float = 0.99) -> dict[str, dict[str, float]]:
    """Mean and central interval of repeated measurements, for instance of a filter with the noise drawn anew 50 times.

    Args:
        runs: one mapping of scalar figures per run, for instance of `filter_metrics` (arrays in it are left out).
        level (`float`): probability of the interval; 0.99 gives the 0.5 % and 99.5 % quantiles.

    Returns:
        figure -> `mean`, `low`, `high`, `runs`.
    """
    if not runs:
        raise ValueError("no runs to summarize")
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), got {level}")
    found = {}
    for name, first in runs[0].items():
        if np.ndim(first):
            continue
        missing = [i for i, run in enumerate(runs) if name not in run]
        if missing:
            raise ValueError(f"run {missing[0]} has no figure {name!r} (run 0 has it)")
        values = np.array([run[name] for run in runs], dtype=np.float64)
        low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
        found[name] = {"mean": float(values.mean()), "low": float(low), "high": float(high), "runs": len(runs)}
    return found
