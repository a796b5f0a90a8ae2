"""Features of the EPiC flow: jets to standardised constituents and back, conditions, malformed input."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from transformers import AutoFeatureExtractor

from hepzoo import EpicFMFeatureExtractor
from hepzoo.data_scripts.jets_schema import JETS_FEATURES, LABEL_COLUMNS, PARTICLE_FLAGS, label_values
from hepzoo.tokenization.condition_density import JetConditionDensity
from hepzoo.tokenization.jet_features import four_momenta, momentum_features, wrap_phi

CLASSES = ("QCD", "Tbqq", "Hbb")


def make_jets(count=30, seed=0, max_num_particles=20, first_pdg=None):
    """Jets of massless constituents, as rows of JetClass; every constituent has one type and the charge of it."""
    rng = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        size = int(rng.integers(1, max_num_particles + 1))
        pt, eta, phi = rng.uniform(500, 1000), rng.uniform(-1.5, 1.5), rng.uniform(-np.pi, np.pi)
        share = np.sort(rng.dirichlet(np.ones(size)))[::-1] + 1e-3
        etarel, dphi = rng.normal(0, 0.2, size), rng.normal(0, 0.2, size)
        momenta = four_momenta(share * pt, etarel + eta, wrap_phi(dphi + phi))
        kind = rng.integers(5, size=size)
        charge = np.where(np.isin(kind, (0, 3, 4)), rng.choice([-1, 1], size), 0)
        row = {name: momenta[:, k].tolist() for k, name in enumerate(("part_px", "part_py", "part_pz", "part_energy"))}
        row |= {"part_deta": (etarel * np.sign(eta)).tolist(), "part_dphi": dphi.tolist()}
        for name in ("part_d0val", "part_d0err", "part_dzval", "part_dzerr"):
            row[name] = np.where(charge != 0, rng.normal(0, 0.1, size) ** (2 if "err" in name else 1), 0).tolist()
        row["part_charge"] = charge.astype(float).tolist()
        row |= {name: (kind == k).astype(int).tolist() for k, name in enumerate(PARTICLE_FLAGS)}
        row |= label_values(CLASSES[index % 3])
        row |= {"jet_pt": pt, "jet_eta": eta, "jet_phi": phi, "jet_energy": float(momenta[:, 3].sum())}
        rows.append(row)
    return rows


def test_features_are_those_of_the_paper():
    rows = make_jets()
    extractor = EpicFMFeatureExtractor()
    batch = extractor(rows, return_tensors="pt")
    assert list(batch) == ["particles", "attention_mask", "class_ids", "conditions"]
    assert batch["particles"].dtype == torch.float32 and batch["particles"].shape[-1] == 13
    assert batch["attention_mask"].sum(1).tolist() == [len(row["part_px"]) for row in rows]
    assert batch["class_ids"].tolist() == [(0, 8, 1)[i % 3] for i in range(30)]
    # raw GeV and eta, as published
    expected = [[row["jet_pt"], row["jet_eta"]] for row in rows]
    torch.testing.assert_close(batch["conditions"], torch.tensor(expected), rtol=1e-6, atol=1e-6)
    for row, particles, mask in zip(rows, batch["particles"], batch["attention_mask"]):
        size = int(mask.sum())
        parts = momentum_features(np.stack([row[f"part_{name}"] for name in ("px", "py", "pz", "energy")], axis=-1))
        columns = {
            "part_etarel": parts["eta"] - row["jet_eta"],  # not part_deta, which has the sign of the jet's eta
            "part_ptrel": parts["pt"] / row["jet_pt"],
        }
        for k, name in enumerate(extractor.feature_names):
            values = np.asarray(columns.get(name, row.get(name)), dtype=np.float64)
            standardised = 5 * (values - extractor.means[k]) / extractor.stds[k]
            np.testing.assert_allclose(particles[:size, k], standardised, rtol=1e-5, atol=1e-5, err_msg=name)
        assert (particles[size:] == 0).all()


def test_rows_in_every_form_are_the_same():
    rows = make_jets(4)
    extractor = EpicFMFeatureExtractor()
    expected = extractor(rows, return_tensors="np")
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    arrays = {
        name: [np.asarray(value, dtype=np.float32) for value in values] if name.startswith("part") else values
        for name, values in columns.items()
    }
    for other in (columns, arrays):
        found = extractor(other, return_tensors="np")
        for name, values in expected.items():
            np.testing.assert_allclose(found[name], values, rtol=1e-4, atol=1e-3)
    single = extractor(rows[2], return_tensors="np")
    np.testing.assert_array_equal(single["particles"][0], expected["particles"][2][: single["particles"].shape[1]])
    # unpadded lists, padded later by a collator
    lists = extractor(rows, padding=False)
    assert [len(jet) for jet in lists["particles"]] == expected["attention_mask"].sum(1).tolist()
    features = [{name: lists[name][index] for name in lists} for index in range(4)]
    for padded in (extractor.pad(features, return_tensors="np"), extractor.pad(dict(lists), return_tensors="np")):
        for name, values in expected.items():
            np.testing.assert_array_equal(padded[name], values)
    wide = extractor(rows, padding="max_length", return_tensors="np")
    assert wide["particles"].shape == (4, 128, 13)
    unlabelled = [{name: value for name, value in row.items() if name not in LABEL_COLUMNS} for row in rows]
    assert "class_ids" not in extractor(unlabelled, return_class_ids=False)


def test_jet_columns_follow_from_the_constituents():
    rows = make_jets(5)
    for row in rows:
        parts = np.stack([row[f"part_{name}"] for name in ("px", "py", "pz", "energy")], axis=-1)
        sums = momentum_features(parts.sum(axis=0))
        row.update(jet_pt=float(sums["pt"]), jet_eta=float(sums["eta"]), jet_phi=float(sums["phi"]))
        row["part_dphi"] = wrap_phi(momentum_features(parts)["phi"] - sums["phi"]).tolist()
    expected = EpicFMFeatureExtractor()(rows, return_tensors="np")
    bare = [{k: v for k, v in row.items() if not k.startswith("jet_") and k != "part_dphi"} for row in rows]
    found = EpicFMFeatureExtractor()(bare, return_tensors="np")
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-4)


def test_constituents_are_cut_as_published_and_counted():
    (row,) = make_jets(1, seed=3, max_num_particles=1)
    far = four_momenta(np.array([50.0, 40.0, 30.0]), row["jet_eta"] + np.array([0.5, 1.5, -0.9]), np.zeros(3))
    for k, name in enumerate(("part_px", "part_py", "part_pz", "part_energy")):
        row[name] = [*far[:, k].tolist(), 0.0]
    for name in row:
        if name.startswith("part_") and len(row[name]) == 1:
            row[name] = row[name] * 4
    extractor = EpicFMFeatureExtractor()
    batch = extractor(row, return_tensors="np")
    etarel = batch["particles"][0, :, 0] * extractor.stds[0] / 5 + extractor.means[0]
    np.testing.assert_allclose(etarel, [0.5, -0.9], atol=1e-5)
    assert +extractor.dropped == {"max_abs_etarel": 1, "zero_pt": 1}
    # the first ones are taken before the cut
    extractor = EpicFMFeatureExtractor(max_num_particles=2)
    assert extractor(row, return_tensors="np")["particles"].shape == (1, 1, 13)
    assert +extractor.dropped == {"max_num_particles": 2, "max_abs_etarel": 1}


def test_decoding_gives_the_jets_back():
    rows = make_jets(seed=5)
    extractor = EpicFMFeatureExtractor(feature_ranges={"part_ptrel": [1e-5, 2.0]})
    batch = extractor(rows, return_tensors="pt")
    jets = extractor.batch_decode(
        batch["particles"],
        batch["attention_mask"],
        labels=batch["class_ids"],
        conditions=batch["conditions"],
        jet_phi=[row["jet_phi"] for row in rows],
    )
    assert set(jets) - {"row_index", "part_etarel", "part_ptrel"} <= set(JETS_FEATURES)
    assert jets["row_index"].tolist() == list(range(30))
    for index, row in enumerate(rows):
        order = np.argsort(-np.hypot(row["part_px"], row["part_py"]), kind="stable")
        for name in ("part_px", "part_py", "part_pz", "part_energy", "part_deta", "part_dphi", "part_d0val"):
            expected = np.asarray(row[name])[order]
            np.testing.assert_allclose(jets[name][index], expected, rtol=2e-4, atol=2e-3, err_msg=name)
        for name in (*PARTICLE_FLAGS, "part_charge"):
            assert jets[name][index].tolist() == np.asarray(row[name])[order].tolist()
        for name in ("jet_pt", "jet_eta", "jet_phi"):
            assert jets[name][index] == pytest.approx(row[name], rel=1e-5)
        assert [jets[name][index] for name in LABEL_COLUMNS] == [row[name] for name in LABEL_COLUMNS]
    # ... which are read again
    again = extractor({name: jets[name] for name in jets if name in JETS_FEATURES}, return_tensors="pt")
    assert torch.equal(again["attention_mask"], batch["attention_mask"])


def test_postprocessing_of_what_a_network_makes():
    extractor = EpicFMFeatureExtractor(feature_ranges={"part_ptrel": [0.01, 0.5]})
    rng = np.random.default_rng(1)
    mask = np.arange(6) < np.array([6, 2, 3])[:, None]
    particles = rng.normal(0, 5, (3, 6, 13)).astype(np.float32)
    physical = extractor.denormalise(particles, mask)
    np.testing.assert_allclose(
        physical[mask], (particles[mask] / 5) * extractor.stds + extractor.means, rtol=1e-5, atol=1e-5
    )
    processed = extractor.postprocess(physical, mask)
    assert (processed[~mask] == 0).all()
    ptrel, flags, charge = processed[mask][:, 2], processed[mask][:, 8:], processed[mask][:, 7]
    assert ptrel.min() == np.float32(0.01) and ptrel.max() <= 0.5
    assert (flags.sum(axis=1) == 1).all() and (flags.argmax(1) == physical[mask][:, 8:].argmax(1)).all()
    np.testing.assert_array_equal(charge, np.rint(physical[mask][:, 7]))
    np.testing.assert_array_equal(processed[mask][:, :2], physical[mask][:, :2])
    conditions = extractor.encode_conditions(jet_pt=[600.0] * 3, jet_eta=[0.1, -0.2, 0.3])
    jets = extractor.batch_decode(particles, mask, conditions=conditions, min_num_particles=3)
    assert jets["row_index"].tolist() == [0, 2] and jets["jet_nparticles"].tolist() == [6, 3]
    assert jets["jet_eta"].tolist() == pytest.approx([0.1, 0.3])
    # massless, by falling pT, deta with the sign of the jet's eta
    for index in range(2):
        px, py, pz, energy = (jets[f"part_{name}"][index] for name in ("px", "py", "pz", "energy"))
        np.testing.assert_allclose(energy, np.sqrt(px**2 + py**2 + pz**2), rtol=1e-5)
        assert (np.diff(np.hypot(px, py)) <= 1e-3).all()
    raw = extractor.batch_decode(particles, mask, postprocess=False)
    assert "part_px" not in raw
    kept = np.sort(np.concatenate(raw["part_charge"]))
    np.testing.assert_allclose(kept, np.sort(physical[mask][:, 7]), rtol=1e-6)


def test_fit_standardises_and_draws_like_the_training_set():
    rows = make_jets(600, seed=7)
    extractor = EpicFMFeatureExtractor()
    assert extractor.fit(rows) is extractor
    batch = extractor(rows, return_tensors="np")
    flat = batch["particles"][batch["attention_mask"] == 1]
    np.testing.assert_allclose(flat.mean(axis=0), 0, atol=1e-3)
    np.testing.assert_allclose(flat.std(axis=0), 5, rtol=1e-3)
    np.testing.assert_allclose(batch["conditions"].mean(axis=0), 0, atol=1e-3)
    np.testing.assert_allclose(batch["conditions"].std(axis=0), 1, rtol=1e-3)
    class_ids = np.repeat([0, 8, 1], 2000)
    request = extractor.sample_conditions(class_ids, seed=1, return_tensors="pt")
    assert torch.equal(request["labels"], torch.from_numpy(class_ids))
    again = extractor.sample_conditions(class_ids, seed=1, return_tensors="pt")
    for name in request:
        assert torch.equal(request[name], again[name])
    counts = np.array([len(row["part_px"]) for row in rows])
    assert request["num_particles"].min() >= 1 and request["num_particles"].max() <= counts.max()
    assert request["num_particles"].double().mean() == pytest.approx(counts.mean(), rel=0.05)
    physical = request["conditions"].numpy() * extractor.condition_stds + extractor.condition_means
    assert physical[:, 0].min() >= 499.9 and physical[:, 0].max() <= 1000.1
    assert physical[:, 0].mean() == pytest.approx(np.mean([row["jet_pt"] for row in rows]), rel=0.02)
    raw = EpicFMFeatureExtractor().fit(rows, standardise_conditions=False)
    assert raw.condition_means == [0, 0] and raw.condition_stds == [1, 1]


def test_a_type_of_particle_that_is_never_there():
    rows = make_jets(20)
    for row in rows:
        row["part_isMuon"] = [0] * len(row["part_px"])
    extractor = EpicFMFeatureExtractor().fit(rows)
    assert extractor.stds[-1] == 1.0
    assert np.isfinite(extractor(rows, return_tensors="np")["particles"]).all()


def test_saved_extractor_is_the_same(tmp_path):
    rows = make_jets(50)
    fitted = EpicFMFeatureExtractor(max_num_particles=30).fit(rows)
    plain = EpicFMFeatureExtractor(
        ["part_etarel", "part_dphi", "part_ptrel"], label_names=[], condition_names=["jet_nparticles", "jet_energy"]
    )
    for name, extractor in (("fitted", fitted), ("plain", plain)):
        extractor.save_pretrained(tmp_path / name)
        for loaded in (
            EpicFMFeatureExtractor.from_pretrained(tmp_path / name),
            AutoFeatureExtractor.from_pretrained(tmp_path / name),
            EpicFMFeatureExtractor.from_pretrained(tmp_path, subfolder=name),
        ):
            expected, found = extractor(rows, return_tensors="np"), loaded(rows, return_tensors="np")
            for key in expected:
                np.testing.assert_array_equal(found[key], expected[key])
            assert loaded.to_dict() == {**extractor.to_dict(), **loaded.to_dict()}
    loaded = EpicFMFeatureExtractor.from_pretrained(tmp_path / "fitted")
    for key, values in fitted.sample_conditions([0, 8, 8], seed=3).items():
        np.testing.assert_array_equal(loaded.sample_conditions([0, 8, 8], seed=3)[key], values)
    assert not (tmp_path / "plain" / "condition_density.safetensors").exists()
    settings = json.loads((tmp_path / "fitted" / "preprocessor_config.json").read_text())
    assert not [name for name in settings if name.startswith("_") and name != "_processor_class"]
    # a folder that had a density and is written anew without one has none
    EpicFMFeatureExtractor().save_pretrained(tmp_path / "fitted")
    assert EpicFMFeatureExtractor.from_pretrained(tmp_path / "fitted").density is None


# ---------------------------------------------------------------------------------------------------------------------
# Density
# ---------------------------------------------------------------------------------------------------------------------


def test_density_is_a_kernel_estimate():
    """Against the analytic moments: mean of the points, variance of the points plus that of the kernel."""
    rng = np.random.default_rng(0)
    counts = np.rint(rng.normal(60, 8, 5000)).astype(int)
    conditions = np.stack([rng.normal(700, 30, 5000), 0.4 * (counts - 60) / 8 + rng.normal(0, 0.3, 5000)], axis=-1)
    density = JetConditionDensity.fit(counts, conditions, bandwidth_factor=1.0)
    scott = 5000 ** (-1 / 7)
    np.testing.assert_allclose(density.bandwidths[0, 1:], scott * conditions.std(axis=0), rtol=1e-5)
    numbers, drawn = density.sample(np.zeros(40000, dtype=int), np.random.default_rng(1))
    assert numbers.dtype == np.int64
    assert drawn[:, 0].mean() == pytest.approx(conditions[:, 0].mean(), abs=1)
    assert drawn[:, 0].std() == pytest.approx(conditions[:, 0].std() * math.sqrt(1 + scott**2), rel=0.02)
    # correlations survive
    expected = np.corrcoef(counts, conditions[:, 1])[0, 1] / (1 + scott**2)
    assert np.corrcoef(numbers, drawn[:, 1])[0, 1] == pytest.approx(expected, abs=0.02)


def test_density_keeps_edges_sharp_and_classes_apart():
    rng = np.random.default_rng(0)
    pt = np.concatenate([rng.uniform(500, 1000, 3000), rng.uniform(200, 300, 10)])
    counts = np.concatenate([rng.integers(1, 4, 3000), np.full(10, 100)])
    class_ids = np.repeat([2, 0], [3000, 10])
    density = JetConditionDensity.fit(counts, pt[:, None], class_ids, num_classes=3, max_points=1000)
    assert density.counts.tolist() == [10, 0, 1000]
    numbers, drawn = density.sample(np.full(20000, 2), np.random.default_rng(0))
    assert drawn.min() >= 499.9 and drawn.max() <= 1000.1
    # neither a spike nor a hole at the edge
    edge, inside = ((drawn > low) & (drawn < low + 10) for low in (500, 700))
    assert edge.mean() == pytest.approx(inside.mean(), rel=0.35)
    assert set(numbers) == {1, 2, 3} and all(0.2 < (numbers == n).mean() < 0.45 for n in (1, 2, 3))
    numbers, drawn = density.sample(np.zeros(100, dtype=int), np.random.default_rng(0))
    assert (numbers == 100).all() and drawn.max() <= 300.1
    exact = JetConditionDensity.fit(counts, pt[:, None], class_ids, num_classes=3, bandwidth_factor=0)
    _, drawn = exact.sample(np.full(50, 2), np.random.default_rng(0))
    assert np.isin(drawn[:, 0], pt.astype(np.float32)).all()


def test_hostile_densities(tmp_path):
    density = JetConditionDensity.fit([3, 4], np.ones((2, 1)), [0, 0], num_classes=2)
    rng = np.random.default_rng(0)
    for class_id in (1, 2, -1):
        with pytest.raises(ValueError, match=f"row 1: class {class_id} is not in the density, expected one of 0"):
            density.sample([0, class_id], rng)
    for arguments, expected in (
        (([3, 0], np.ones((2, 1))), "row 1: .*expected 1 or more"),
        (([3, 4], np.array([[1.0], [np.nan]])), "row 1: .*finite"),
        (([3, 4], np.ones((2, 1)), [0, 5]), "class_ids must be 2 integers in 0..0"),
    ):
        with pytest.raises(ValueError, match=expected):
            JetConditionDensity.fit(*arguments)
    with pytest.raises(ValueError, match="bandwidth_factor is -1"):
        JetConditionDensity.fit([3], np.ones((1, 1)), bandwidth_factor=-1)
    path = tmp_path / "density.safetensors"
    path.write_bytes(b"nothing of that kind")
    with pytest.raises(ValueError, match="not a condition density"):
        JetConditionDensity.load(path)
    broken = copy.copy(density)
    broken.bandwidths = np.full_like(density.bandwidths, np.nan)
    broken.save(path)
    with pytest.raises(ValueError, match="bandwidths is not finite"):
        JetConditionDensity.load(path)
    broken.bandwidths = density.bandwidths[:, :1]
    broken.save(path)
    with pytest.raises(ValueError, match="bandwidths has shape"):
        JetConditionDensity.load(path)


# ---------------------------------------------------------------------------------------------------------------------
# Malformed input
# ---------------------------------------------------------------------------------------------------------------------

HOSTILE_SETTINGS = [
    ({"feature_names": ["part_ptrel"]}, "feature_names is ['part_ptrel']"),
    ({"feature_names": ["part_etarel", "part_dphi", "part_ptrel", "part_mass"]}, "no published ones of part_mass"),
    ({"means": [0.0]}, "means is [0.0], expected 13 finite numbers"),
    ({"stds": [1.0] * 12 + [0.0]}, "expected 13 finite numbers above 0"),
    ({"means": [math.nan] * 13}, "means is [nan"),
    ({"means": "0"}, "means is ['0']"),
    ({"scale": 0.0}, "scale is [0.0]"),
    ({"condition_names": ["jet_mass"]}, "condition_names has 'jet_mass'"),
    ({"condition_stds": [1.0]}, "condition_stds is [1.0], expected 2"),
    ({"max_num_particles": 0}, "max_num_particles must be an integer of at least 1"),
    ({"feature_ranges": {"part_ptrel": [1.0, 0.0]}}, "feature_ranges.part_ptrel is [1.0, 0.0]"),
    ({"feature_ranges": {"part_charge": [-1, 1]}}, "feature_ranges.part_charge"),
]


@pytest.mark.parametrize(("settings", "expected"), HOSTILE_SETTINGS)
def test_hostile_settings(settings, expected):
    with pytest.raises(ValueError) as error:
        EpicFMFeatureExtractor(**settings)
    assert expected in str(error.value) and "\n" not in str(error.value)


def with_value(name, value):
    def change(rows):
        rows[1][name] = value(rows[1][name]) if callable(value) else value

    return change


def without(name):
    def change(rows):
        for row in rows:
            del row[name]

    return change


HOSTILE_ROWS = [
    (with_value("part_px", lambda x: [math.nan, *x[1:]]), "row 1: part_px[0] = nan is not a finite number"),
    (with_value("part_d0val", lambda x: [*x[:-1], math.inf]), "part_d0val"),
    (with_value("part_d0val", lambda x: x[:-1]), "row 1: part_d0val has"),
    (with_value("part_charge", lambda x: ["a", *x[1:]]), "row 1: part_charge[0] must be a number"),
    (with_value("part_px", lambda x: [0.0] * len(x)), None),
    (with_value("jet_pt", 0.0), "row 1: jet_pt = 0, expected a number above 0"),
    (with_value("jet_eta", math.nan), "row 1: jet_eta = nan is not a finite number"),
    (with_value("jet_eta", None), "row 1: jet_eta = nan"),
    (with_value("label_QCD", 1), "row 1: not exactly one of label_QCD"),
    (lambda rows: [row.pop(name) for row in rows for name in LABEL_COLUMNS], "column label_QCD is missing"),
    (without("part_energy"), "part_energy"),
    (without("part_isMuon"), "part_isMuon"),
    (
        lambda rows: rows[1].update({name: [] for name in rows[1] if name.startswith("part_")}),
        "row 1: none of 0 constituents is left, expected at least 1",
    ),
    (with_value("jet_eta", 9.0), "constituents is left, expected at least 1"),
]


@pytest.mark.parametrize(("change", "expected"), HOSTILE_ROWS)
def test_hostile_rows(change, expected):
    rows = make_jets(3, seed=2)
    change(rows)
    extractor = EpicFMFeatureExtractor()
    if expected is None:
        assert np.isfinite(extractor(rows, return_tensors="np")["particles"]).all()
        return
    with pytest.raises(ValueError) as error:
        extractor(rows)
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_hostile_requests_and_particles():
    extractor = EpicFMFeatureExtractor()
    with pytest.raises(ValueError, match="has no density of conditions"):
        extractor.sample_conditions([0])
    extractor.fit(make_jets(30))
    with pytest.raises(ValueError, match="row 1: class 5 is not in the density, expected one of 0, 1, 8"):
        extractor.sample_conditions([0, 5])
    with pytest.raises(ValueError, match="class_ids must be integers"):
        extractor.sample_conditions([0.5])
    with pytest.raises(ValueError, match="density is of"):
        extractor.density = JetConditionDensity.fit([3, 4], np.ones((2, 1)))
    with pytest.raises(ValueError, match="condition jet_eta is missing or unknown"):
        extractor.encode_conditions(jet_pt=[1.0])
    with pytest.raises(ValueError, match="row 0: jet_pt = nan"):
        extractor.encode_conditions(jet_pt=[math.nan], jet_eta=[0.0])
    particles, mask = np.zeros((2, 4, 13)), np.ones((2, 4))
    particles[1, 2, 3] = np.nan
    with pytest.raises(ValueError, match="row 1, slot 2: .*expected finite features"):
        extractor.batch_decode(particles, mask)
    particles[1, 2, 3] = 0
    for arguments, expected in (
        ({"attention_mask": None}, "attention_mask is missing"),
        ({"attention_mask": mask[:, :3]}, "particles have shape"),
        ({"particles": particles[..., :5]}, "particles have shape"),
        ({"conditions": np.zeros((2, 3))}, "conditions have shape"),
        ({"labels": np.zeros(3)}, "labels have shape"),
        ({"labels": np.array([0, 10])}, "row 1: label 10, expected 0 to 9"),
        ({"particles": np.full((2, 4, 13), 1e4), "conditions": np.ones((2, 2))}, "row 0: part_etarel = .*below 50"),
        ({"min_num_particles": -1}, "min_num_particles must be"),
    ):
        with pytest.raises(ValueError, match=expected):
            extractor.batch_decode(**{"particles": particles, "attention_mask": mask, **arguments})
    with pytest.raises(ValueError, match="no jets to fit to"):
        EpicFMFeatureExtractor().fit([])
    with pytest.raises(ValueError, match="pad: particles is missing"):
        extractor.pad([{"conditions": [1.0, 2.0]}])
    with pytest.raises(ValueError, match="row 0: 5 constituents, expected at most 4"):
        EpicFMFeatureExtractor(max_num_particles=4).pad([{"particles": np.zeros((5, 13))}], padding="max_length")
