"""Figures of merit of a noise filter as an `evaluate` metric: `evaluate.load("<this file>")` or `NoiseFilter()`."""

import datasets
import evaluate
import numpy as np

from hepzoo.evaluation.roc import filter_metrics

_DESCRIPTION = """\
Precision, recall and F1 at 0.5, signal retention and noise rejection, average precision, and the areas under the
rejection-retention and precision-recall curves, of the per-hit noise probability of a filter.
"""

_INPUTS = """
Args:
    predictions (list of float): probability of every hit to be noise, in [0, 1].
    references (list of int): 1 noise, 0 signal; hits with `ignore_index` are left out.
    ignore_index (int): default -100.
Returns:
    precision, recall, f1, signal_retention, noise_rejection, average_precision, auc, pr_area.
"""

_CITATION = """\
arXiv 2505.08736
"""


class NoiseFilter(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions, references, ignore_index=-100) -> dict[str, float]:
        probabilities, labels = np.asarray(predictions, dtype=np.float64), np.asarray(references)
        valid = labels != ignore_index
        found = filter_metrics(probabilities[valid], labels[valid])
        return {name: float(value) for name, value in found.items() if np.ndim(value) == 0}
