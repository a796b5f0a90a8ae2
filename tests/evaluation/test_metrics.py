"""The `evaluate` modules: as classes, and loaded from their files without a network."""

from pathlib import Path

import evaluate
import numpy as np
import pytest

import hepzoo.evaluation
from hepzoo.evaluation.metric_noise_filter import NoiseFilter
from hepzoo.evaluation.metric_roc_rejection import RocRejection
from hepzoo.evaluation.metric_separation_power import SeparationPower
from hepzoo.evaluation.roc import auc_score, filter_metrics
from hepzoo.evaluation.separation import separation_power

FOLDER = Path(hepzoo.evaluation.__file__).parent


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    import socket

    def refuse(*_, **__):
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def sample():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 2000)
    return rng.normal(3.0 * labels - 1.5, 1.0), labels


@pytest.mark.parametrize("by", ["class", "file"])
def test_separation_power(by, sample, tmp_path):
    metric = SeparationPower() if by == "class" else load("separation_power", tmp_path)
    scores, labels = sample
    wanted = separation_power(scores[labels == 1], scores[labels == 0])
    found = metric.compute(predictions=scores, references=labels)
    assert found["separation"] == pytest.approx(wanted.separation) and found["separation"] > 2.7
    assert found["separation_error"] == pytest.approx(wanted.error)
    fixed = metric.compute(predictions=scores, references=labels, edges="classifier", signed=True)
    assert fixed["separation"] == pytest.approx(3.0, abs=0.3)


@pytest.mark.parametrize("by", ["class", "file"])
def test_roc_rejection(by, sample, tmp_path):
    metric = RocRejection() if by == "class" else load("roc_rejection", tmp_path)
    scores, labels = sample
    metric.add_batch(predictions=scores[:1000], references=labels[:1000])
    metric.add_batch(predictions=scores[1000:], references=labels[1000:])
    found = metric.compute(efficiencies=[0.9])
    assert found["auc"] == pytest.approx(auc_score(scores[labels == 1], scores[labels == 0]))
    assert set(found) == {"auc", "accuracy", "rejection_at_0.9"}
    assert found["rejection_at_0.9"] > 10


@pytest.mark.parametrize("by", ["class", "file"])
def test_noise_filter(by, sample, tmp_path):
    metric = NoiseFilter() if by == "class" else load("noise_filter", tmp_path)
    scores, labels = sample
    probabilities = 1 / (1 + np.exp(-scores))
    masked = np.where(np.arange(2000) < 5, -100, labels)
    found = metric.compute(predictions=probabilities, references=masked)
    wanted = filter_metrics(probabilities[5:], labels[5:])
    assert found == pytest.approx({k: v for k, v in wanted.items() if np.ndim(v) == 0})


def load(name: str, cache: Path):
    return evaluate.load(str(FOLDER / f"metric_{name}.py"), cache_dir=str(cache), experiment_id=name)


def test_hostile_metric_input(sample):
    scores, labels = sample
    with pytest.raises(ValueError, match="reference 0 is 2"):
        SeparationPower().compute(predictions=scores, references=np.full(2000, 2))
    with pytest.raises(ValueError, match="no background|no negative"):
        RocRejection().compute(predictions=scores, references=np.ones(2000, int))
    with pytest.raises(ValueError, match="expected a number in"):
        NoiseFilter().compute(predictions=scores, references=labels)
