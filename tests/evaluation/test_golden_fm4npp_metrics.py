"""Golden vectors `fm4npp_tracking`: the metrics of the reference's assignments and logits."""

import numpy as np
import torch

from hepzoo.evaluation.metric_point_classification import PointClassification
from hepzoo.evaluation.metric_tracking_ari import TrackingARI
from hepzoo.evaluation.tracking import adjusted_rand_index, contingency
from tests.golden_sets import GoldenSet


def test_golden_fm4npp_metrics_rand_index():
    golden = GoldenSet("fm4npp_tracking")
    valid = golden.inputs["mask"].numpy() == 1
    true, events = golden.inputs["track_ids"].numpy(), len(valid)
    rows, means = [], []
    for option in (1, 2):
        found = golden.outputs[f"track.assign_option{option}"].numpy()
        table = contingency(np.nonzero(valid)[0], true[valid], found[valid], events)
        rows.append(adjusted_rand_index(table)[0])
        ignored = np.where(valid, true, -100)
        means.append(TrackingARI().compute(predictions=list(found), references=list(ignored))["ari"])
    golden.compare("track.ari", torch.from_numpy(np.stack(rows)))
    np.testing.assert_allclose(means, np.mean(rows, axis=1))


def test_golden_fm4npp_metrics_points():
    golden = GoldenSet("fm4npp_tracking")
    valid = golden.inputs["mask"].numpy() == 1
    for name in ("pid", "noise"):
        predictions = golden.outputs[f"{name}.logits"].numpy().argmax(axis=-1)
        references = np.where(valid, golden.inputs[name].numpy(), -100)
        found = PointClassification().compute(
            predictions=predictions.reshape(-1),
            references=references.reshape(-1),
            num_classes=golden.outputs[f"{name}.logits"].shape[-1],
        )
        figures = [found[key] for key in ("macro_precision", "macro_recall", "accuracy")]
        golden.compare(f"{name}.metrics", torch.tensor(figures))
