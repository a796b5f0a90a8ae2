"""AUC, accuracy and rejection at given efficiencies as an `evaluate` metric: `evaluate.load("<this file>")`."""

import datasets
import evaluate
import numpy as np

from hepzoo.evaluation.roc import accuracy, auc_score, rejection_at_efficiency

_DESCRIPTION = """\
Area under the ROC curve, accuracy, and background rejection 1/eps_background at given signal efficiencies.
"""

_INPUTS = """
Args:
    predictions (list of float): score of every track, higher = signal-like.
    references (list of int): 1 signal (kaon), 0 background (pion).
    efficiencies (list of float): signal efficiencies, default 0.5, 0.8, 0.9, 0.95.
    threshold (float): of the accuracy; 0 for logits (default), 0.5 for probabilities.
Returns:
    auc, accuracy, and rejection_at_<e> for every efficiency (infinite when no background passes).
"""

_CITATION = """\
arXiv 2505.08736
"""


class RocRejection(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions, references, efficiencies=(0.5, 0.8, 0.9, 0.95), threshold=0.0) -> dict[str, float]:
        scores, labels = np.asarray(predictions, dtype=np.float64), np.asarray(references)
        bad = np.flatnonzero((labels != 0) & (labels != 1))
        if len(bad):
            raise ValueError(f"reference {bad[0]} is {labels[bad[0]]}, expected 1 (signal) or 0 (background)")
        signal, background = scores[labels == 1], scores[labels == 0]
        found = {
            "auc": auc_score(signal, background),
            "accuracy": accuracy(signal, background, threshold),
        }
        for efficiency in efficiencies:
            key = f"rejection_at_{efficiency:g}"
            found[key] = rejection_at_efficiency(signal, background, efficiency)["rejection"]
        return found
