"""The published quantile-KL divergences as an `evaluate` metric: `evaluate.load("<this file>")` or `QuantileKL()`."""

import datasets
import evaluate
import numpy as np

from hepzoo.evaluation.distances import quantile_kl
from hepzoo.evaluation.evaluate_jets import published_quantile_kl

_DESCRIPTION = """\
Kullback-Leibler divergence KL(real || generated) of an observable in bins of quantiles of the real events, as two
publications define it, and with finite values for all samples.
"""

_INPUTS = """
Args:
    predictions (list of float): the observable of every event, real and generated.
    references (list of int): 1 real, 0 generated (the samples may differ in size).
    bins (int): edges of "alpha", bins of the others; default 50.
Returns:
    quantile_kl_alpha (arXiv:2403.05618: bins - 1 bins inside the quantiles 0.001 and 0.999), quantile_kl_ntp
    (arXiv:2501.05534, arXiv:2512.04149: open outer bins, infinite where a bin has no generated value), quantile_kl
    (open outer bins, half an entry added to every one) [nats].
"""

_CITATION = """\
arXiv:2403.05618, arXiv:2501.05534, arXiv:2512.04149
"""


class QuantileKL(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions, references, bins=50) -> dict[str, float]:
        values, labels = np.asarray(predictions, dtype=np.float64), np.asarray(references)
        bad = np.flatnonzero((labels != 0) & (labels != 1))
        if len(bad):
            raise ValueError(f"reference {bad[0]} is {labels[bad[0]]}, expected 1 (real) or 0 (generated)")
        real, generated = values[labels == 1], values[labels == 0]
        return {
            "quantile_kl_alpha": published_quantile_kl(real, generated, bins, "alpha"),
            "quantile_kl_ntp": published_quantile_kl(real, generated, bins, "ntp"),
            "quantile_kl": quantile_kl(real, generated, bins),
        }
