"""Real-or-generated classifier test as an `evaluate` metric: `evaluate.load("<this file>")` or `ClassifierAUC()`."""

import datasets
import evaluate
import numpy as np

from hepzoo.evaluation.distances import two_sample_auc

_DESCRIPTION = """\
Area under the ROC curve of boosted trees that are trained to tell generated from real events by their features,
five-fold cross-validated: 0.5 where they cannot be told apart, 1 where they always can.
"""

_INPUTS = """
Args:
    predictions (list of list of float): features of every event, real and generated; NaN is allowed.
    references (list of int): 1 real, 0 generated; at least 20 of each, and about as many of one as of the other.
    seed (int): of the folds and the trees, default 0.
Returns:
    auc, auc_error (spread of the folds / sqrt(5)).
"""

_CITATION = """\
arXiv:2106.05285
"""


class ClassifierAUC(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Sequence(datasets.Value("float64")), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions, references, seed=0) -> dict[str, float]:
        labels = np.asarray(references)
        bad = np.flatnonzero((labels != 0) & (labels != 1))
        if len(bad):
            raise ValueError(f"reference {bad[0]} is {labels[bad[0]]}, expected 1 (real) or 0 (generated)")
        lengths = np.array([len(row) for row in predictions])
        bad = np.flatnonzero((lengths != lengths[0]) | (lengths == 0))
        if len(bad):
            raise ValueError(
                f"prediction {bad[0]} has {lengths[bad[0]]} features, expected {lengths[0]} and at least 1"
            )
        features = np.asarray(predictions, dtype=np.float64)
        auc, error = two_sample_auc(features[labels == 1], features[labels == 0], seed=seed)
        return {"auc": auc, "auc_error": error}
