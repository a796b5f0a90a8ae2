"""The JetNet metrics as an `evaluate` metric: `evaluate.load("<this file>")` or `JetNetMetrics()`."""

import datasets
import evaluate
import numpy as np

from hepzoo.evaluation.jetnet import jetnet_metrics

_DESCRIPTION = """\
Distances of generated and real jets as in JetNet: Wasserstein-1 of jet mass (W1-M), of the features of constituents
(W1-P) and of energy flow polynomials (W1-EFP), coverage and minimum matching distance by the energy mover's distance.
"""

_INPUTS = """
Args:
    predictions (list of list of list of float): of every jet, real and generated, its constituents (eta, phi, pT)
        relative to the jet axis; no padding.
    references (list of int): 1 real, 0 generated (the samples may differ in size).
    divide_pt (bool): divide the pT by that of the jet, default True.
    num_jets (int): of every draw, default the smaller sample, at most 50000.
    draws (int): of the Wasserstein distances, default 5.
    emd_jets, emd_draws (int): jets and draws of coverage and MMD, default 0 (without) and 10.
    seed (int): default 0.
Returns:
    w1m, w1p, w1p_eta, w1p_phi, w1p_pt, w1efp, coverage, mmd, each with _std over the draws.
"""

_CITATION = """\
arXiv:2106.11535, arXiv:2211.10295
"""


class JetNetMetrics(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        jet = datasets.Sequence(datasets.Sequence(datasets.Value("float64")))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": jet, "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions, references, **options) -> dict[str, float]:
        labels = np.asarray(references)
        bad = np.flatnonzero((labels != 0) & (labels != 1))
        if len(bad):
            raise ValueError(f"reference {bad[0]} is {labels[bad[0]]}, expected 1 (real) or 0 (generated)")
        samples = []
        for wanted in (1, 0):
            chosen = np.flatnonzero(labels == wanted)
            jets = [_constituents(predictions[row], row) for row in chosen]
            samples.append(
                {
                    "part_pt": [jet[:, 2] for jet in jets],
                    "part_etarel": [jet[:, 0] for jet in jets],
                    "part_phirel": [jet[:, 1] for jet in jets],
                }
            )
        return jetnet_metrics(*samples, **options)


def _constituents(jet, row: int) -> np.ndarray:
    if any(len(particle) != 3 for particle in jet):
        raise ValueError(f"jet {row}: expected constituents of 3 numbers, eta, phi and pT")
    return np.asarray(jet, dtype=np.float64).reshape(-1, 3)
