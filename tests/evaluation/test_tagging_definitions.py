"""The figures of top tagging agree with the published definition on a sample of the size of the test set."""

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, roc_auc_score, roc_curve

from hepzoo.evaluation.metric_tagging import tagging_metrics


@pytest.fixture(scope="module")
def tops():
    """404 000 jets with probabilities as good as those of the best taggers: AUC near 0.985."""
    rng = np.random.default_rng(0)
    labels = np.arange(404_000) % 2
    logits = rng.normal(0, 1.5, len(labels)) + np.where(labels == 1, 2.3, -2.3)
    probability = 1 / (1 + np.exp(-logits))
    return np.stack([1 - probability, probability], axis=1), labels


def test_rejection_at_the_first_point_above_the_efficiency(tops):
    probabilities, labels = tops
    found = tagging_metrics(probabilities, labels)
    assert found["accuracy"] == pytest.approx(accuracy_score(labels, probabilities.argmax(axis=1)))
    assert found["auc"] == pytest.approx(roc_auc_score(labels, probabilities[:, 1]), abs=1e-9)
    background, signal, _ = roc_curve(labels, probabilities[:, 1])
    for efficiency in (0.3, 0.5):
        published = 1 / background[np.argmax(signal > efficiency)]
        # one jet of background more or less
        passing = len(labels) / 2 / published
        assert found[f"rejection_at_{efficiency:g}"] == pytest.approx(published, rel=1.5 / passing)


def test_score_of_models_with_more_classes(tops):
    """Of ten classes of which two are used, the share of the signal in the two counts, whatever the others have."""
    probabilities, labels = tops
    rest = np.random.default_rng(1).uniform(0, 0.2, (len(labels), 1))
    ten = np.concatenate([probabilities * (1 - rest), rest / 8 * np.ones((1, 8))], axis=1)
    names = ["QCD", "top", *map(str, range(8))]
    found = tagging_metrics(ten[:20_000], labels[:20_000], names=names)
    two = tagging_metrics(probabilities[:20_000], labels[:20_000])
    for figure in ("auc", "rejection_at_0.3", "rejection_at_0.5"):
        assert found[f"{figure}_top"] == pytest.approx(two[figure], rel=1e-6)
