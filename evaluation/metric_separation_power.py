"""Pion/kaon separation power as an `evaluate` metric: `evaluate.load("<this file>")` or `SeparationPower()`."""

import datasets
import evaluate
import numpy as np

from hepzoo.evaluation.separation import separation_power

_DESCRIPTION = """\
Separation power of two species in standard deviations: |mu_K - mu_pi| / ((s_K + s_pi) / 2) of Gaussians fitted to the
histograms of a score (log-likelihood difference or logit), with its error.
"""

_INPUTS = """
Args:
    predictions (list of float): score of every track, positive = kaon-like.
    references (list of int): 1 kaon, 0 pion.
    edges: "auto" (default), "classifier", a momentum in GeV/c (published edges of the log-likelihood analysis), or a
        list of histogram edges.
    signed (bool): keep the sign of mu_K - mu_pi.
Returns:
    separation, separation_error, separation_moments, and the fitted mean and sigma of both species.
"""

_CITATION = """\
arXiv 2505.08736
"""


class SeparationPower(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions, references, edges="auto", signed=False) -> dict[str, float]:
        scores, labels = np.asarray(predictions, dtype=np.float64), np.asarray(references)
        bad = np.flatnonzero((labels != 0) & (labels != 1))
        if len(bad):
            raise ValueError(f"reference {bad[0]} is {labels[bad[0]]}, expected 1 (kaon) or 0 (pion)")
        result = separation_power(scores[labels == 1], scores[labels == 0], edges=edges, signed=signed)
        return {
            "separation": result.separation,
            "separation_error": result.error,
            "separation_moments": result.moments,
            "kaon_mean": result.kaon.mean,
            "kaon_sigma": result.kaon.sigma,
            "pion_mean": result.pion.mean,
            "pion_sigma": result.pion.sigma,
        }
