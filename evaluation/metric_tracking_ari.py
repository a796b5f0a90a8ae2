"""Adjusted Rand index of track finding as an `evaluate` metric: `evaluate.load("<this file>")` or `TrackingARI()`."""

import datasets
import evaluate
import numpy as np

from hepzoo.evaluation.tracking import adjusted_rand_index, contingency

_DESCRIPTION = """\
Adjusted Rand index between the true and the found tracks of points, as the mean over events and of all points pooled
(tracks of different events being different). 1: the same partition, 0: as good as chance.
"""

_INPUTS = """
Args:
    predictions (list of list of int): found track of every point of every event; -1 (no track) is one cluster.
    references (list of list of int): true track of every point; points with `ignore_index` are left out.
    ignore_index (int): default -100.
Returns:
    ari: mean over events, the published figure. ari_pooled: of all points. events: how many.
"""

_CITATION = """\
arXiv 2508.14087; L. Hubert and P. Arabie, J. Classification 2 (1985) 193
"""


def flatten_events(predictions, references, ignore_index: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Event, true and found track of every point, shape `(p,)`, without those of `ignore_index`.

    Raises:
        ValueError: an event has lists of different lengths; names it.
    """
    lengths = [len(event) for event in references]
    for number, (found, true) in enumerate(zip(predictions, lengths, strict=True)):
        if len(found) != true:
            raise ValueError(f"event {number}: {len(found)} predictions for {true} references")
    event = np.repeat(np.arange(len(lengths)), lengths)
    true, found = (
        np.concatenate([np.asarray(part, np.int64) for part in parts] or [np.zeros(0, np.int64)])
        for parts in (references, predictions)
    )
    keep = np.ones(len(true), bool) if ignore_index is None else true != ignore_index
    if not keep.any():
        raise ValueError(f"no points: {len(lengths)} events, every reference is {ignore_index} or there is none")
    return event[keep], true[keep], found[keep]


class TrackingARI(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("int64")),
                    "references": datasets.Sequence(datasets.Value("int64")),
                }
            ),
        )

    def _compute(self, predictions, references, ignore_index=-100) -> dict[str, float]:
        event, true, found = flatten_events(predictions, references, ignore_index)
        per_event, pooled = adjusted_rand_index(contingency(event, true, found, len(references)))
        known = per_event[~np.isnan(per_event)]
        return {"ari": float(known.mean()), "ari_pooled": pooled, "events": len(known)}
