"""Feature extraction of FM4NPP against the reference's data path; the outputs of the models are compared elsewhere."""

import numpy as np
import pytest
import torch
from transformers import AutoFeatureExtractor

import hepzoo
from hepzoo import Fm4nppFeatureExtractor
from tests.golden_sets import GoldenSet


@pytest.fixture(params=["fm4npp_mamba1", "fm4npp_mamba2"])
def golden(request) -> GoldenSet:
    return GoldenSet(request.param)


@pytest.fixture
def extractor(golden, tmp_path) -> Fm4nppFeatureExtractor:
    """As `AutoFeatureExtractor` loads it from a saved model folder."""
    config = golden.config
    edges = {name: golden.inputs[f"bin_edges_{name}"].tolist() for name in ("eta", "phi", "radius")}
    assert [len(values) - 1 for values in edges.values()] == config["n_bins"]
    Fm4nppFeatureExtractor(
        bin_edges=edges,
        order=config["order"],
        num_neighbors=config["klen"],
        padding_value=config["pad_value"],
        energy_mean=config["E_mean"],
        energy_std=config["E_std"],
        eta_limits=config["eta_lim"],
        phi_limits=config["phi_lim"],
        radius_limits=config["r_lim"],
    ).save_pretrained(tmp_path)
    hepzoo.Fm4nppConfig().save_pretrained(tmp_path)
    loaded = AutoFeatureExtractor.from_pretrained(tmp_path)
    assert type(loaded) is Fm4nppFeatureExtractor
    return loaded


def raw_events(golden: GoldenSet) -> list[dict]:
    rows = []
    for event in range(len(golden.inputs["lengths"])):
        points = golden.inputs[f"raw_event{event}"].numpy()
        labels = {"track_id": "track_ids", "pid": "pid", "noise": "noise"}
        row = dict(zip("Exyz", points.T, strict=True))
        row |= {name: golden.inputs[f"raw_{stem}{event}"].numpy() for name, stem in labels.items()}
        rows.append(row)
    return rows


def test_golden_fm4npp_batch_is_that_of_the_reference(golden, extractor):
    rows = raw_events(golden)
    batch = extractor(rows, return_tensors="pt")
    inputs = golden.inputs
    torch.testing.assert_close(batch["points"], inputs["points"], rtol=1e-6, atol=5e-7)
    torch.testing.assert_close(batch["neighbor_labels"], inputs["knn_targets"], rtol=1e-6, atol=5e-7)
    assert torch.equal(batch["track_labels"], inputs["track_ids"])
    assert torch.equal(batch["attention_mask"].sum(dim=1), inputs["lengths"])
    assert torch.equal(batch["attention_mask"].bool(), inputs["points"][..., 0] != golden.config["pad_value"])
    for event, length in enumerate(inputs["lengths"].tolist()):
        order = inputs[f"sequence_order{event}"]
        assert torch.equal(batch["order"][event, :length], order)
        assert (batch["order"][event, length:] == -100).all()
        for name in ("pid", "noise"):
            assert torch.equal(batch[f"{name}_labels"][event, :length], inputs[f"raw_{name}{event}"][order])


def test_golden_fm4npp_every_step_is_that_of_the_reference(golden, extractor):
    """Normalisation in file order, sorting by r, bins, and cells."""
    batch = extractor(raw_events(golden), return_tensors="np")
    for event, length in enumerate(golden.inputs["lengths"].tolist()):
        normalized = golden.inputs[f"normalized{event}"].numpy()
        (in_file_order,) = extractor.restore_order([batch["points"][event]], [batch["order"][event]])
        np.testing.assert_allclose(in_file_order, normalized, rtol=1e-6, atol=5e-7)
        by_radius = np.argsort(in_file_order[:, 3], kind="stable")
        assert np.array_equal(by_radius, golden.inputs[f"r_order{event}"].numpy())
        points = in_file_order[by_radius]
        assert np.array_equal(extractor.buckets(points), golden.inputs[f"voxel{event}"].numpy())
        assert np.array_equal(extractor.cells(points), golden.inputs[f"group{event}"].numpy())
        assert len(points) == length


def test_golden_fm4npp_inverse_gives_the_raw_points(golden, extractor):
    rows = raw_events(golden)
    batch = extractor(rows, return_tensors="pt")
    columns = extractor.inverse_transform(batch["points"], batch["attention_mask"], batch["order"])
    for event, row in enumerate(rows):
        for name in "Exyz":
            np.testing.assert_allclose(columns[name][event], row[name], rtol=1e-5, atol=1e-3)


def test_golden_fm4npp_set_is_complete(golden):
    """Every tensor of the data path is there for the tests above."""
    per_event = ("raw_event", "raw_track_ids", "raw_pid", "raw_noise", "normalized", "r_order", "sequence_order")
    per_event += ("voxel", "group")
    known = {"bin_edges_eta", "bin_edges_phi", "bin_edges_radius", "points", "knn_targets", "track_ids", "lengths"}
    known |= {f"{name}{event}" for name in per_event for event in range(len(golden.inputs["lengths"]))}
    assert known <= set(golden.inputs)
