"""Classification of points as an `evaluate` metric: `evaluate.load("<this file>")` or `PointClassification()`.

Precision and recall per class and their means over classes (macro), and accuracy: particle identification and noise
tagging of the points of a detector.
"""

import datasets
import evaluate
import numpy as np

from hepzoo.evaluation.tracking import confusion_matrix, point_classification

_DESCRIPTION = """\
Precision and recall of every class, their means over the classes (macro), and the accuracy.
"""

_INPUTS = """
Args:
    predictions (list of int): class of every point.
    references (list of int): true class; points with `ignore_index` are left out.
    num_classes (int): default: one more than the largest class that occurs.
    names (list of str): of the classes, default their numbers.
    ignore_index (int): default -100.
Returns:
    accuracy, macro_precision, macro_recall (means over classes that occur among predictions or references; a ratio
    without a denominator counts as 0), precision_<name>, recall_<name> for every class.
"""

_CITATION = """\
arXiv 2508.14087
"""


class PointClassification(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions, references, num_classes=None, names=None, ignore_index=-100) -> dict[str, float]:
        predictions, references = np.asarray(predictions), np.asarray(references)
        keep = references != ignore_index
        predictions, references = predictions[keep], references[keep]
        if num_classes is None:
            largest = max(predictions.max(initial=0), references.max(initial=0))
            num_classes = int(largest) + 1 if names is None else len(names)
        found = point_classification(confusion_matrix(references, predictions, num_classes), names)
        classes = found.pop("classes")
        for row in classes:
            found |= {f"precision_{row['class']}": row["precision"], f"recall_{row['class']}": row["recall"]}
        return found
