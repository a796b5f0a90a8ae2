"""Jets to the inputs of OmniLearned and back: kinematics, types, impact parameters, conditions; malformed jets."""

import json

import numpy as np
import pytest
from transformers import AutoFeatureExtractor

import hepzoo  # noqa: F401
from hepzoo.evaluation.jets import as_jets
from hepzoo.modeling.configuration_omnilearned import OmniLearnedConfig
from hepzoo.tokenization.feature_extraction_omnilearned import FLAGS, PDG_CODES, OmniLearnedFeatureExtractor
from hepzoo.tokenization.jet_features import momentum_features, wrap_phi
from hepzoo.tokenization.jet_sets import LABEL_NAMES

CONDITIONS = ["jet_pt", "jet_eta", "jet_nparticles"]
KINDS = [(-211, "part_isChargedHadron", -1), (211, "part_isChargedHadron", 1), (130, "part_isNeutralHadron", 0)]
KINDS += [(22, "part_isPhoton", 0), (11, "part_isElectron", -1), (-11, "part_isElectron", 1)]
KINDS += [(13, "part_isMuon", -1), (-13, "part_isMuon", 1)]


def make_jets(count=20, seed=0) -> dict[str, list]:
    """Jets of 3 to 12 massless constituents of all types about random axes, by falling pT; QCD and Tbqq in turn."""
    rng = np.random.default_rng(seed)
    rows = []
    for row in range(count):
        size = int(rng.integers(3, 13))
        pt = np.sort(rng.lognormal(3, 1, size))[::-1]
        eta, phi = rng.uniform(-2, 2) + rng.normal(0, 0.2, size), rng.uniform(-3, 3) + rng.normal(0, 0.2, size)
        kinds = [KINDS[k] for k in rng.integers(len(KINDS), size=size)]
        charged = np.array([kind[2] != 0 for kind in kinds])
        px, py, pz, energy = pt * np.cos(phi), pt * np.sin(phi), pt * np.sinh(eta), pt * np.cosh(eta)
        values = {"part_px": px, "part_py": py, "part_pz": pz, "part_energy": energy}
        values |= {"part_d0val": rng.normal(0, 1, size) * charged, "part_d0err": 0.1 * charged}
        values |= {"part_dzval": rng.normal(0, 1, size) * charged, "part_dzerr": 0.2 * charged}
        values["part_charge"] = np.array([float(kind[2]) for kind in kinds])
        values |= {name: np.array([int(kind[1] == name) for kind in kinds]) for name in FLAGS}
        jet = {name: array.tolist() for name, array in values.items()}
        jet |= dict.fromkeys(LABEL_NAMES, 0)
        jet |= {"label_QCD": float(row % 2 == 0), "label_Tbqq": row % 2, "types": [kind[0] for kind in kinds]}
        rows.append(jet)
    return {name: [row[name] for row in rows] for name in rows[0]}


def test_features_are_those_of_the_paper():
    rows = make_jets()
    extractor = OmniLearnedFeatureExtractor(
        use_particle_ids=True, use_additional_features=True, condition_names=CONDITIONS
    )
    batch = extractor(rows, return_tensors="np")
    assert batch["particles"].dtype == np.float32 and batch["particle_ids"].dtype == np.int64
    for row in range(20):
        momenta = np.column_stack([rows[name][row] for name in ("part_px", "part_py", "part_pz", "part_energy")])
        parts, jet = momentum_features(momenta), momentum_features(momenta.sum(axis=0))
        size = len(momenta)
        assert batch["attention_mask"][row].tolist() == [1] * size + [0] * (batch["particles"].shape[1] - size)
        expected = [parts["eta"] - jet["eta"], wrap_phi(parts["phi"] - jet["phi"])]
        expected += [np.log(parts["pt"]), np.log(parts["energy"])]
        np.testing.assert_allclose(batch["particles"][row, :size], np.stack(expected, axis=-1), atol=2e-6)
        codes = np.array([0, *PDG_CODES])[batch["particle_ids"][row, :size]]
        assert codes.tolist() == rows["types"][row]
        additional = batch["additional_features"][row, :size].T
        np.testing.assert_allclose(additional[0], np.tanh(rows["part_d0val"][row]), atol=1e-6)
        np.testing.assert_allclose(additional[1], rows["part_d0err"][row], atol=1e-6)
        np.testing.assert_allclose(additional[3], rows["part_dzerr"][row], atol=1e-6)
        np.testing.assert_allclose(batch["conditions"][row], [jet["pt"] / 1000, jet["eta"], size / 100], rtol=1e-5)
    assert not batch["particles"][batch["attention_mask"] == 0].any()
    assert sorted(PDG_CODES) == list(PDG_CODES)
    assert batch["class_ids"].tolist() == [0, 8] * 10


def test_rows_in_every_form_are_the_same():
    rows = make_jets(6)
    extractor = OmniLearnedFeatureExtractor(use_particle_ids=True, condition_names=["jet_nparticles"])
    whole = extractor(rows, return_tensors="np")
    records = [{name: values[row] for name, values in rows.items()} for row in range(6)]
    arrays = {name: [np.asarray(value) for value in values] for name, values in rows.items()}
    for other in (extractor(records, return_tensors="np"), extractor(arrays, return_tensors="np")):
        for name, values in whole.items():
            np.testing.assert_array_equal(values, other[name])
    single = extractor(records[2], return_tensors="np")
    np.testing.assert_array_equal(single["particles"][0], whole["particles"][2, : single["particles"].shape[1]])
    ragged = extractor(rows, padding=False)
    for name, values in extractor.pad(ragged, return_tensors="np").items():
        np.testing.assert_array_equal(values, whole[name])
    one_by_one = [{name: ragged[name][row] for name in ragged} for row in range(6)]
    padded = extractor.pad(one_by_one, pad_to_multiple_of=16, return_tensors="np")
    assert padded["particles"].shape[1] == 16 and padded["particle_ids"].shape == (6, 16)
    assert extractor(rows, padding="max_length", return_tensors="np")["particles"].shape[1] == 150


def test_decoding_gives_the_jets_back():
    rows = make_jets()
    extractor = OmniLearnedFeatureExtractor(
        use_particle_ids=True, use_additional_features=True, condition_names=CONDITIONS
    ).fit(rows, bandwidth_factor=0.0)
    batch = extractor(rows, return_tensors="pt")
    momenta = np.array([[sum(rows[name][row]) for name in ("part_px", "part_py")] for row in range(20)])
    phi = np.arctan2(momenta[:, 1], momenta[:, 0])
    about = {name: batch[name] for name in ("conditions", "particle_ids", "additional_features")}
    jets = extractor.batch_decode(
        batch["particles"], batch["attention_mask"], labels=batch["class_ids"], jet_phi=phi, **about
    )
    for name in ("part_px", "part_py", "part_pz", "part_energy", "part_d0val", "part_dzerr", "part_charge", *FLAGS):
        for found, expected in zip(jets[name], rows[name], strict=True):
            np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4, err_msg=name)
    assert jets["label_Tbqq"].tolist() == rows["label_Tbqq"] and jets["row_index"].tolist() == list(range(20))
    # the next room reads them
    read = as_jets({name: jets[name] for name in ("part_px", "part_py", "part_pz", "part_energy", *LABEL_NAMES)})
    assert read.label.tolist() == [0, 8] * 10 and read.multiplicity.sum() == batch["attention_mask"].sum()
    few = extractor.batch_decode(batch["particles"], batch["attention_mask"], min_num_particles=8)
    assert few["row_index"].tolist() == np.flatnonzero(batch["attention_mask"].sum(dim=1) >= 8).tolist()


def test_particles_are_cut_as_published_and_counted():
    rows = make_jets(1)
    far = {"part_px": 2.0, "part_py": 0.0, "part_pz": 2.0 * np.sinh(5), "part_energy": 2.0 * np.cosh(5)}
    soft = {"part_px": 0.5, "part_py": 0.0, "part_pz": 0.0, "part_energy": 0.4}
    none = dict.fromkeys(far, 0.0)
    for particle in (far, soft, none):
        for name, value in particle.items():
            rows[name][0].append(value)
    rows |= {"jet_eta": [0.0], "jet_phi": [0.0]}
    size = len(rows["part_px"][0])
    for axis, name in (("jet_eta", "eta"), ("jet_phi", "phi")):
        momenta = np.column_stack([rows[name][0] for name in ("part_px", "part_py", "part_pz", "part_energy")])
        rows[axis] = [float(momentum_features(momenta[: size - 3].sum(axis=0))[name])]
    plain = OmniLearnedFeatureExtractor()
    assert plain(rows, return_tensors="np")["particles"].shape[1] == size - 1
    assert plain.dropped["zero_pt"] == 1 and plain.dropped["clip_inputs"] == 0
    clipped = OmniLearnedFeatureExtractor(clip_inputs=True)
    found = clipped(rows, return_tensors="np")["particles"][0]
    assert clipped.dropped["clip_inputs"] >= 2 and np.hypot(found[:, 0], found[:, 1]).max() < 0.8
    assert found[:, 2].min() > 0 and (found[:, 3] >= found[:, 2]).all()
    first = OmniLearnedFeatureExtractor(max_num_particles=2)
    assert first(rows)["particles"].shape[1] == 2 and first.dropped["max_num_particles"] == size - 2


def test_fit_standardises_and_draws_like_the_training_set():
    rows = make_jets(200)
    extractor = OmniLearnedFeatureExtractor(condition_names=CONDITIONS).fit(rows, bandwidth_factor=0.0)
    conditions = extractor(rows, return_tensors="np")["conditions"]
    np.testing.assert_allclose(conditions[:, :2].mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(conditions[:, :2].std(axis=0), 1, atol=1e-5)
    drawn = extractor.sample_conditions([8] * 50, seed=3)
    of_tops = conditions[1::2]
    distances = np.abs(drawn["conditions"][:, None] - of_tops).max(axis=2).min(axis=1)
    assert distances.max() < 1e-4, "with no bandwidth the jets themselves come"
    np.testing.assert_allclose(drawn["num_particles"] / 100, drawn["conditions"][:, 2], atol=1e-6)
    assert (drawn["labels"] == 8).all()
    encoded = extractor.encode_conditions(jet_pt=[500.0], jet_eta=[0.5], jet_nparticles=[40])
    assert encoded[0, 2] == pytest.approx(0.4)
    again = extractor.physical_conditions(encoded, 1)
    assert [float(again[name][0]) for name in CONDITIONS] == pytest.approx([500, 0.5, 40], rel=1e-5)


def test_saved_extractor_is_the_same(tmp_path):
    rows = make_jets(50)
    extractor = OmniLearnedFeatureExtractor(use_particle_ids=True, condition_names=CONDITIONS, max_num_particles=7)
    extractor.fit(rows).save_pretrained(tmp_path)
    again = AutoFeatureExtractor.from_pretrained(tmp_path)
    assert type(again) is OmniLearnedFeatureExtractor and again.to_dict() == extractor.to_dict()
    assert again.density.counts.tolist() == [25, 0, 0, 0, 0, 0, 0, 0, 25, 0]
    for name, values in extractor(rows, return_tensors="np").items():
        np.testing.assert_array_equal(values, again(rows, return_tensors="np")[name])
    for name, values in extractor.sample_conditions([0, 8, 0], seed=1).items():
        np.testing.assert_array_equal(values, again.sample_conditions([0, 8, 0], seed=1)[name])
    stored = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert stored["condition_names"] == CONDITIONS and "_density" not in stored


def test_extractor_fits_the_model():
    config = OmniLearnedConfig(num_particle_types=9, num_additional_features=4)
    extractor = OmniLearnedFeatureExtractor.from_model_config(config, label_names=LABEL_NAMES[:2])
    settings = OmniLearnedConfig(**extractor.model_settings())
    assert settings.num_labels == 2 and settings.id2label == {0: "label_QCD", 1: "label_Hbb"}
    assert (settings.num_particle_types, settings.num_additional_features, settings.num_conditions) == (9, 4, 0)
    with pytest.raises(ValueError, match="`num_additional_features` of the model is 17"):
        OmniLearnedFeatureExtractor.from_model_config(OmniLearnedConfig(num_additional_features=17))


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"condition_names": ["jet_mass"]}, "jet_mass"),
        ({"condition_names": ["jet_nparticles", "jet_pt"]}, "at the end"),
        ({"condition_names": ["jet_pt", "jet_pt"]}, "different"),
        ({"condition_names": ["jet_pt"], "condition_stds": [0.0]}, "above 0"),
        ({"condition_names": ["jet_pt"], "condition_means": [float("nan")]}, "condition_means"),
        ({"max_num_particles": 0}, "max_num_particles"),
    ],
)
def test_hostile_settings(settings, expected):
    with pytest.raises(ValueError, match=expected):
        OmniLearnedFeatureExtractor(**settings)


def changed(name, value, row=1, position=None):
    def change(rows):
        if position is None:
            rows[name][row] = value
        else:
            rows[name][row][position] = value

    return change


def without(*names):
    return lambda rows: [rows.pop(name) for name in names]


@pytest.mark.parametrize(
    "change, expected",
    [
        (changed("part_px", float("nan"), position=2), r"row 1: part_px\[2\] = nan"),
        (changed("part_energy", 0.0, position=0), r"row 1: part_energy\[0\] = 0, expected a number above 0"),
        (changed("part_energy", -1e9, position=0), "row 1: jet_energy = "),
        (changed("part_px", [1.0]), "row 1: part_py has .* constituents, part_px has 1"),
        (changed("part_charge", 2.0, position=0), r"row 1: part_charge\[0\] = 2 does not go with"),
        (changed("part_isMuon", 3, position=0), "row 1: constituent 0: not exactly one of"),
        (changed("part_d0err", float("inf"), position=1), r"row 1: part_d0err\[1\] = inf"),
        (changed("label_Hbb", 1), "row 1: not exactly one of"),
        (changed("label_QCD", 0.5), "row 1: not exactly one of"),
        (without(*LABEL_NAMES), "column label_QCD is missing"),
        (without("part_dzval"), "part_dzval"),
        (without("part_pz"), "part_pz"),
    ],
)
def test_hostile_rows(change, expected):
    rows = make_jets(3)
    change(rows)
    extractor = OmniLearnedFeatureExtractor(use_particle_ids=True, use_additional_features=True)
    with pytest.raises(ValueError, match=expected):
        extractor(rows)


def test_hostile_empty_jets_requests_and_particles():
    rows = make_jets(3)
    for name in ("part_px", "part_py", "part_pz", "part_energy"):
        rows[name][2] = []
    extractor = OmniLearnedFeatureExtractor(condition_names=["jet_pt"])
    with pytest.raises(ValueError, match="row 2: none of 0 constituents is left"):
        extractor(rows)
    with pytest.raises(ValueError, match="no density"):
        extractor.sample_conditions([0])
    with pytest.raises(ValueError, match="condition jet_eta is missing or unknown"):
        extractor.encode_conditions(jet_pt=[1.0], jet_eta=[0.0])
    extractor.fit(make_jets(10))
    with pytest.raises(ValueError, match="class 3 is not in the density"):
        extractor.sample_conditions([0, 3])
    particles, mask = np.zeros((2, 3, 4)), np.ones((2, 3))
    with pytest.raises(ValueError, match="attention_mask is missing"):
        extractor.batch_decode(particles)
    with pytest.raises(ValueError, match=r"\(2, 3, 5\)"):
        extractor.batch_decode(np.zeros((2, 3, 5)), mask)
    with pytest.raises(ValueError, match="labels have shape"):
        extractor.batch_decode(particles, mask, labels=[0])
    with pytest.raises(ValueError, match="jet_phi must be a finite number"):
        extractor.batch_decode(particles, mask, jet_phi=[0.0, float("nan")])
    with pytest.raises(ValueError, match="particle_ids has 0 to 0"):
        extractor.batch_decode(particles, mask, particle_ids=np.zeros((2, 3), dtype=int))
    for value in (np.nan, 100.0):
        particles[1, 2, 2] = value
        with pytest.raises(ValueError, match="row 1, slot 2"):
            extractor.batch_decode(particles, mask)
