"""Jet tagging as an `evaluate` metric: `evaluate.load("<this file>")` or `Tagging()`.

Accuracy, and per signal class AUC and background rejection of the score p_s / (p_s + p_background), on jets of that
class and of the background only.
"""

from collections.abc import Sequence

import datasets
import evaluate
import numpy as np

from hepzoo.evaluation.roc import auc_score

_DESCRIPTION = """\
Accuracy of the most probable class, and for every signal class the area under the ROC curve and the background
rejection 1/eps_background at given signal efficiencies, against one background class.
"""

_INPUTS = """
Args:
    predictions (list of list of float): probabilities of the classes of every jet; logits if `logits`.
    references (list of int): number of the class of every jet.
    background (int): number of the background class, default 0 (QCD).
    efficiencies (list of float): signal efficiencies of the rejections, default 0.3 and 0.5.
    names (list of str): of the classes, default their numbers.
    logits (bool): the predictions are logits, default False.
Returns:
    accuracy; with two classes auc, rejection_at_<e>; with more auc_<name>, rejection_at_<e>_<name> for every signal
    class that has jets (infinite when no background passes).
"""

_CITATION = """\
arXiv:2403.05618
"""


def percentile_rejection(signal: np.ndarray, background: np.ndarray, efficiency: float) -> tuple[float, float]:
    """Background rejection 1/eps_background and cut, as published: the cut is the (1 - efficiency) percentile of the
    signal scores, between scores where need be, and a jet passes above it.

    `hepzoo.evaluation.roc.rejection_at_efficiency` cuts at a score; the two agree for large samples.
    """
    if not 0 < efficiency <= 1:
        raise ValueError(f"efficiency must be in (0, 1], got {efficiency}")
    cut = float(np.percentile(signal, 100 * (1 - efficiency)))
    passing = np.mean(np.asarray(background) > cut)
    return float(1 / passing) if passing else float("inf"), cut


def tagging_metrics(
    probabilities: np.ndarray,
    labels: np.ndarray,
    background: int = 0,
    efficiencies: Sequence[float] = (0.3, 0.5),
    names: Sequence[str] | None = None,
) -> dict[str, float]:
    """The figures of the module.

    Args:
        probabilities (`np.ndarray` of shape `(jets, classes)`): not negative.
        labels (`np.ndarray` of shape `(jets,)`): class numbers.
        background (`int`): number of the background class.
        names (*optional*): of the classes.

    Raises:
        ValueError: a probability is negative or not finite (no score is left out silently), a label is no class, or
            there are no jets of the background or of any signal class.
    """
    probabilities, labels = np.asarray(probabilities, dtype=np.float64), np.asarray(labels)
    if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1] or probabilities.shape[1] < 2:
        raise ValueError(
            f"expected probabilities (jets, classes) and labels (jets,), got {probabilities.shape} and {labels.shape}"
        )
    classes = probabilities.shape[1]
    wrong = np.argwhere(~(np.isfinite(probabilities) & (probabilities >= 0)))
    if len(wrong):
        jet, number = wrong[0]
        value = probabilities[jet, number]
        raise ValueError(f"jet {jet}: probability of class {number} is {value}, expected a finite one, at least 0")
    bad = np.flatnonzero((labels < 0) | (labels >= classes) | (labels != np.floor(labels)))
    if len(bad):
        raise ValueError(f"jet {bad[0]}: label {labels[bad[0]]}, expected a class of 0..{classes - 1}")
    if not 0 <= background < classes:
        raise ValueError(f"background class {background}, expected one of 0..{classes - 1}")
    names = [str(i) for i in range(classes)] if names is None else list(names)
    if len(names) != classes:
        raise ValueError(f"{len(names)} names for {classes} classes")
    signals = [s for s in range(classes) if s != background and (labels == s).any()]
    if not signals or not (labels == background).any():
        raise ValueError(f"jets of classes {sorted(set(labels.tolist()))} only, expected background and signal")
    found = {"accuracy": float(np.mean(probabilities.argmax(axis=1) == labels))}
    for s in signals:
        total = probabilities[:, s] + probabilities[:, background]
        # a jet that is neither for sure has no preference
        score = np.divide(probabilities[:, s], total, out=np.full(len(total), 0.5), where=total > 0)
        signal, other = score[labels == s], score[labels == background]
        ending = "" if classes == 2 else f"_{names[s]}"
        found[f"auc{ending}"] = auc_score(signal, other)
        for efficiency in efficiencies:
            found[f"rejection_at_{efficiency:g}{ending}"] = percentile_rejection(signal, other, efficiency)[0]
    return found


class Tagging(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Sequence(datasets.Value("float64")), "references": datasets.Value("int64")}
            ),
        )

    def _compute(
        self, predictions, references, background=0, efficiencies=(0.3, 0.5), names=None, logits=False
    ) -> dict[str, float]:
        probabilities = np.asarray(predictions, dtype=np.float64)
        if logits:
            from scipy.special import softmax

            probabilities = softmax(probabilities, axis=1)
        return tagging_metrics(probabilities, np.asarray(references), background, efficiencies, names)
