"""ROC scans, rejection and filter metrics against scikit-learn and hand-made cases."""

import numpy as np
import pytest
from sklearn import metrics

from hepzoo.evaluation.roc import (
    accuracy,
    auc_score,
    filter_metrics,
    filter_scan,
    precision_recall_curve,
    rejection_at_efficiency,
    roc_scan,
    summarize_runs,
)


@pytest.fixture
def sample():
    rng = np.random.default_rng(0)
    return rng.normal(1, 1, 700), rng.normal(-1, 1, 900)


def labelled(positives, negatives):
    return np.concatenate([positives, negatives]), np.r_[np.ones(len(positives)), np.zeros(len(negatives))].astype(int)


def test_auc_agrees_with_scikit_learn(sample):
    scores, labels = labelled(*sample)
    wanted = metrics.roc_auc_score(labels, scores)
    assert auc_score(*sample) == pytest.approx(wanted, abs=1e-12)
    assert roc_scan(*sample).auc == pytest.approx(wanted, abs=2e-3)
    rounded = np.round(scores)  # many ties
    assert auc_score(rounded[labels == 1], rounded[labels == 0]) == pytest.approx(
        metrics.roc_auc_score(labels, rounded), abs=1e-12
    )


def test_scan_counts_by_hand():
    scan = roc_scan([1.0, 3.0], [0.0, 2.0], np.array([-1.0, 1.0, 2.5, 4.0]))
    assert scan.efficiency.tolist() == [1, 0.5, 0.5, 0]
    assert scan.rejection.tolist() == [0, 0.5, 1, 1]


def test_accuracy(sample):
    assert accuracy(*sample) == pytest.approx(0.84, abs=0.03)
    assert accuracy([0.0], [0.0]) == 0.5


def test_rejection_at_efficiency(sample):
    for efficiency in (0.3, 0.5, 0.9, 1.0):
        found = rejection_at_efficiency(*sample, efficiency)
        assert found["efficiency"] >= efficiency
        assert found["efficiency"] - 1 / len(sample[0]) < efficiency  # the largest threshold that reaches it
        assert found["rejection"] == pytest.approx(1 / np.mean(sample[1] >= found["threshold"]))
    assert rejection_at_efficiency([1.0, 2.0], [-1.0], 0.5)["rejection"] == np.inf


def test_filter_metrics_agree_with_scikit_learn():
    rng = np.random.default_rng(1)
    labels = (rng.random(3000) < 0.1).astype(int)
    probabilities = np.clip(rng.normal(0.3 + 0.4 * labels, 0.15), 0, 1)
    found = filter_metrics(probabilities, labels)
    guess = np.round(probabilities)
    assert found["precision"] == pytest.approx(metrics.precision_score(labels, guess))
    assert found["recall"] == pytest.approx(metrics.recall_score(labels, guess))
    assert found["f1"] == pytest.approx(metrics.f1_score(labels, guess))
    assert found["average_precision"] == pytest.approx(metrics.average_precision_score(labels, probabilities))
    assert found["auc"] == pytest.approx(metrics.roc_auc_score(labels, probabilities), abs=0.01)
    assert found["signal_retention"] == pytest.approx(np.mean(guess[labels == 0] == 0))
    recall, precision = found["pr_curve"]
    assert (recall[0], precision[0]) == (1, 0) and (recall[-1], precision[-1]) == (0, 1)
    assert (np.diff(recall) <= 0).all()
    assert found["pr_curve"].shape == (2, 102)


def test_perfect_and_useless_filters():
    labels = np.array([0, 0, 1, 1])
    perfect = filter_metrics([0.0, 0.1, 0.9, 1.0], labels)
    assert all(perfect[k] == 1 for k in ("precision", "recall", "f1", "average_precision", "signal_retention"))
    nothing = filter_metrics([0.1, 0.1, 0.1, 0.1], labels)
    assert nothing["precision"] == nothing["f1"] == 0 and nothing["signal_retention"] == 1


def test_thresholds_are_inclusive():
    curve = precision_recall_curve([0.5, 0.25], [1, 0], num=4)  # thresholds 0, 1/4, 1/2, 3/4
    assert curve["recall"].tolist() == [1, 1, 1, 0]
    assert curve["precision"].tolist() == [0.5, 0.5, 1, 0]
    scan = filter_scan([1.0, 0.0], [1, 0], num=3)
    assert scan["noise_rejection"].tolist() == [1, 1, 1]
    assert scan["signal_retention"].tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("probabilities", "labels", "message"),
    [
        ([0.1, 1.5], [0, 1], r"probability 1 is 1.5, expected a number in \[0, 1\]"),
        ([0.1, np.nan], [0, 1], "probability 1 is nan"),
        ([0.1, 0.2], [0, 2], "label 1 is 2"),
        ([0.1, 0.2], [0, 0], "no positive scores"),
        ([0.1, 0.2], [1, 1], "no negative scores"),
        ([0.1, 0.2, 0.3], [1, 0], "differ in length"),
    ],
)
def test_hostile_filter_input(probabilities, labels, message):
    with pytest.raises(ValueError, match=message):
        filter_metrics(probabilities, labels)


def test_hostile_scores():
    with pytest.raises(ValueError, match="positive score 1 is NaN"):
        auc_score([1.0, np.nan], [0.0])
    with pytest.raises(ValueError, match="no negative scores"):
        roc_scan([1.0], [])
    with pytest.raises(ValueError, match="efficiency must be"):
        rejection_at_efficiency([1.0], [0.0], 1.5)


def test_summary_of_runs():
    rng = np.random.default_rng(2)
    labels = (rng.random(500) < 0.2).astype(int)
    runs = [filter_metrics(np.clip(rng.normal(0.3 + 0.4 * labels, 0.2), 0, 1), labels) for _ in range(20)]
    found = summarize_runs(runs)
    assert "pr_curve" not in found and found["auc"]["runs"] == 20
    values = [run["auc"] for run in runs]
    assert found["auc"]["mean"] == pytest.approx(np.mean(values))
    assert min(values) <= found["auc"]["low"] < found["auc"]["mean"] < found["auc"]["high"] <= max(values)


def test_hostile_runs():
    with pytest.raises(ValueError, match="no runs"):
        summarize_runs([])
    with pytest.raises(ValueError, match="run 1 has no figure 'auc'"):
        summarize_runs([{"auc": 1.0}, {}])
