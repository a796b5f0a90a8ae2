"""Efficiency of track finding as an `evaluate` metric: `evaluate.load("<this file>")` or `TrackingEfficiency()`."""

import datasets
import evaluate
import numpy as np

from hepzoo.evaluation.metric_tracking_ari import flatten_events
from hepzoo.evaluation.tracking import NOISE_ID, contingency, match_tracks

_DESCRIPTION = """\
Track finding efficiency, purity and fake rate. A true track is found if a found one shares at least 4 points with it,
more than half of the true and more than half of the found track. Efficiency is over true tracks of at least 3 points,
purity (mean share of points from the track that most come from) and fake rate are over found tracks that have at least
4 points from there.
"""

_INPUTS = """
Args:
    predictions (list of list of int): found track of every point of every event, -1 for none.
    references (list of list of int): true track of every point; points with `ignore_index` are left out.
    noise_id (int): true id of points that belong to no track, default 0; None if there is no such id.
    published (bool): count as the published evaluation does, default False: unassigned points are a found track.
    ignore_index (int): default -100.
Returns:
    efficiency, purity, fake_rate, true_tracks, found_tracks, noise_tracks (found tracks mostly of noise; included in
    found_tracks and fake_rate).
"""

_CITATION = """\
arXiv 2508.14087
"""


class TrackingEfficiency(evaluate.Metric):
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

    def _compute(
        self, predictions, references, noise_id=NOISE_ID, published=False, ignore_index=-100
    ) -> dict[str, float]:
        event, true, found = flatten_events(predictions, references, ignore_index)
        matches = match_tracks(contingency(event, true, found, len(references)), noise_id, published)
        tracks = len(matches.found_id)
        return {
            "efficiency": float(np.mean(matches.true_found)) if len(matches.true_id) else float("nan"),
            "purity": float(np.mean(matches.found_purity)) if tracks else float("nan"),
            "fake_rate": float(np.mean(~matches.found_passes)) if tracks else float("nan"),
            "true_tracks": len(matches.true_id),
            "found_tracks": tracks,
            "noise_tracks": int(matches.found_is_noise.sum()),
        }
