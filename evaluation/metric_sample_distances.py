"""Distances of an observable in two samples as an `evaluate` metric: `evaluate.load("<this file>")` or the class."""

import datasets
import evaluate
import numpy as np

from hepzoo.evaluation.distances import quantile_kl, wasserstein

_DESCRIPTION = """\
Wasserstein-1 distance of an observable in generated and real events, in its unit and divided by the standard deviation
of the real ones, and the Kullback-Leibler divergence in bins that hold equal parts of the real sample.
"""

_INPUTS = """
Args:
    predictions (list of float): the observable of every event, real and generated.
    references (list of int): 1 real, 0 generated (the samples may differ in size).
    bins (int): quantile bins of the divergence, default 30.
Returns:
    wasserstein, wasserstein_standardised (NaN where the real values are all equal), quantile_kl [nats].
"""

_CITATION = """\
arXiv:2606.11304
"""


class SampleDistances(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions, references, bins=30) -> dict[str, float]:
        values, labels = np.asarray(predictions, dtype=np.float64), np.asarray(references)
        bad = np.flatnonzero((labels != 0) & (labels != 1))
        if len(bad):
            raise ValueError(f"reference {bad[0]} is {labels[bad[0]]}, expected 1 (real) or 0 (generated)")
        real, generated = values[labels == 1], values[labels == 0]
        distance = wasserstein(real, generated)
        spread = float(real.std())
        return {
            "wasserstein": distance,
            "wasserstein_standardised": distance / spread if spread > 0 else float("nan"),
            "quantile_kl": quantile_kl(real, generated, bins),
        }
