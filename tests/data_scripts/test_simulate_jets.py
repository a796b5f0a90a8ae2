"""The jet simulator. Its detector and truth need numpy alone; the events need Pythia and fastjet."""

import sys

import numpy as np
import pytest
from datasets import Features, Value, load_dataset

from hepzoo.data_scripts import simulate_jets
from hepzoo.data_scripts.jets_schema import (
    CLASSES,
    JETS_FEATURES,
    LABEL_COLUMNS,
    PARTICLE_FLAGS,
    REQUIRED_COLUMNS,
    jet_features,
    label_values,
)
from hepzoo.data_scripts.simulate_jets import detect, iter_jets, parse_classes, truth_match
from hepzoo.data_scripts.simulate_jets import simulate_jets as simulate

CODES = {
    "QCD": {50},
    "Hbb": {41},
    "Hcc": {42},
    "Hgg": {44},
    "H4q": {45},
    "Hqql": {46},
    "Zqq": {31, 32, 33},
    "Wqq": {21, 22},
    "Tbqq": {11, 12},
    "Tbl": {15, 16},
}
RESONANCE = {"H": 25, "Z": 23, "W": 24, "T": 6}
JETS = 12


@pytest.fixture(scope="module")
def generator():
    pytest.importorskip("pythia8mc")
    pytest.importorskip("fastjet")


@pytest.fixture(scope="module")
def sample(generator):
    return simulate(JETS, ["QCD", "Tbqq"], seed=3)


@pytest.fixture
def small_batches(generator, monkeypatch):
    monkeypatch.setattr(simulate_jets, "BATCH_EVENTS", 10)


def of_class(columns, name):
    rows = np.flatnonzero(columns[f"label_{name}"])
    return {key: [values[row] for row in rows] for key, values in columns.items()}


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        for a, b in zip(first[name], second[name], strict=True):
            assert np.array_equal(a, b), name


# Schema


def test_features_of_a_subset():
    assert list(jet_features(JETS_FEATURES)) == list(JETS_FEATURES)
    features = jet_features(["jet_pt", *REQUIRED_COLUMNS], Features({"run": Value("int64")}))
    assert list(features) == [*REQUIRED_COLUMNS, "jet_pt", "run"]
    assert [name for name, value in label_values("H4q").items() if value] == ["label_H4q"]
    assert tuple(label_values("QCD")) == LABEL_COLUMNS
    assert tuple(CODES) == CLASSES and set(simulate_jets.CLASS_SETTINGS) == set(CLASSES)


@pytest.mark.parametrize(
    ("columns", "extra", "message"),
    [
        (REQUIRED_COLUMNS[1:], None, "part_px is missing"),
        ((*REQUIRED_COLUMNS, "pt"), None, "pt is not a jet column"),
        (REQUIRED_COLUMNS, Features({"jet_pt": Value("float32")}), "jet_pt is a jet column already"),
    ],
)
def test_hostile_columns(columns, extra, message):
    with pytest.raises(ValueError, match=message):
        jet_features(columns, extra)


def test_hostile_class():
    with pytest.raises(ValueError, match="class must be one of QCD, .* got 'Top'"):
        label_values("Top")


# Detector


def particles(pid, pt, eta, phi=0.0, mass=0.0, vertex=(0.0, 0.0, 0.0), event=None):
    pid, pt, eta, phi, mass = np.broadcast_arrays(np.atleast_1d(pid), pt, eta, phi, mass)
    momentum = np.stack([pt * np.cos(phi), pt * np.sin(phi), pt * np.sinh(eta), np.zeros(len(pid))])
    momentum[3] = np.sqrt(np.sum(momentum[:3] ** 2, axis=0) + mass**2)
    event = np.zeros(len(pid), dtype=int) if event is None else np.asarray(event)
    return event, pid, momentum, np.tile(np.array(vertex)[:, None], len(pid))


def seen(*arguments, seed=0, **options):
    return detect(*particles(*arguments, **options), np.random.default_rng(seed))


def test_what_leaves_no_signal():
    # Neutrinos, soft tracks, the forward direction, the beam line, soft deposits.
    for pid, pt, eta in ((12, 50, 0), (-14, 50, 0), (211, 0.7, 0), (22, 50, 3.3), (22, 0.5, 0), (130, 1e-3, 0)):
        assert not len(seen(pid, pt, eta)["px"]), pid
    beam = particles(2112, 0.0, 0.0)
    beam[2][:, 0] = 0, 0, 6500, 6500
    assert not len(detect(*beam, np.random.default_rng(0))["px"])


def test_tracks():
    size = 20000
    out = seen(np.full(size, 211), 20.0, 1.0, phi=2.0, mass=0.1396)
    tracks = out["kind"] == simulate_jets.CHARGED_HADRON
    assert tracks.sum() == pytest.approx(0.95 * size, rel=0.01)
    assert np.all(out["charge"][tracks] == 1) and np.all(out["charge"][~tracks] == 0)
    pt = np.hypot(out["px"], out["py"])[tracks]
    assert pt.mean() == pytest.approx(20, rel=1e-3)
    assert pt.std() / 20 == pytest.approx(np.hypot(0.015, 1.5e-4 * 20), rel=0.03)
    eta = np.arcsinh(out["pz"][tracks] / pt)
    assert eta.std() == pytest.approx(3e-4, rel=0.03) and eta.mean() == pytest.approx(1, abs=1e-5)
    mass_squared = out["energy"][tracks] ** 2 - pt**2 - out["pz"][tracks] ** 2
    assert np.allclose(mass_squared, 0.1396**2, atol=1e-6)
    assert out["d0val"][tracks].std() == pytest.approx(np.hypot(0.020, 0.003), rel=0.03)
    assert out["dzval"][tracks].std() == pytest.approx(np.hypot(0.040, 0.006), rel=0.03)


def test_impact_parameters_of_a_displaced_track():
    # Along x, produced at y = 2 mm: passes the beam line at a distance of 2 mm, on the left.
    out = seen(-13, 50.0, 0.5, phi=0.0, mass=0.1057, vertex=(3.0, 2.0, 7.0))
    assert out["kind"].tolist() == [simulate_jets.MUON] and out["charge"].tolist() == [1]
    assert out["d0val"][0] == pytest.approx(-2.0, abs=0.15)
    assert out["dzval"][0] == pytest.approx(7 - 3 * np.sinh(0.5), abs=0.25)


def test_calorimeter_cells_merge():
    # Two photons of one cell across phi = 0 do not merge, two inside a cell do.
    together = seen([22, 22], [30.0, 10.0], [0.011, 0.015], phi=[0.011, 0.015])
    assert len(together["px"]) == 1
    assert np.hypot(together["px"], together["py"])[0] == pytest.approx(40, rel=0.1)
    assert np.arcsinh(together["pz"] / 40)[0] == pytest.approx(0.012, abs=0.002)
    assert len(seen([22, 22], 30.0, 0.011, phi=[0.011, -0.011])["px"]) == 2
    assert len(seen([22, 22], 30.0, 0.011, phi=0.011, event=[0, 1])["px"]) == 2
    # At phi = pi the mean azimuth stays there.
    turn = seen([22, 22], 30.0, 0.011, phi=[np.pi - 1e-4, np.pi - 2e-4])
    assert len(turn["px"]) == 1 and abs(np.arctan2(turn["py"], turn["px"])[0]) == pytest.approx(np.pi, abs=1e-3)


def test_calorimeter_resolution():
    size = 3000
    for pid, constant, stochastic in ((22, 0.007, 0.07), (130, 0.05, 1.0)):
        out = seen(np.full(size, pid), 50.0, 0.3, event=np.arange(size))
        energy = 50 * np.cosh(0.3)
        assert out["energy"].mean() == pytest.approx(energy, rel=0.01)
        assert out["energy"].std() == pytest.approx(np.hypot(constant * energy, stochastic * energy**0.5), rel=0.06)
        assert np.allclose(out["px"] ** 2 + out["py"] ** 2 + out["pz"] ** 2, out["energy"] ** 2)
        assert set(out["kind"]) == {simulate_jets.PHOTON if pid == 22 else simulate_jets.NEUTRAL_HADRON}


def test_detected_particles_are_ordered_by_event():
    rng = np.random.default_rng(1)
    size = 500
    event = np.sort(rng.integers(0, 20, size))
    out = seen(
        rng.choice([22, 211, -321, 130, 11, 13], size), rng.exponential(5, size), rng.normal(0, 1.5, size), event=event
    )
    assert np.all(np.diff(out["event"]) >= 0) and set(out["event"]) <= set(event)


# Truth


@pytest.mark.parametrize(
    ("name", "products", "code"),
    [
        ("QCD", [], 50),
        ("Tbqq", [5, 4, -3], 11),
        ("Tbqq", [-5, 1, -2], 12),
        ("Tbl", [5, -11], 15),
        ("Tbl", [-5, 13], 16),
        ("Wqq", [-4, 3], 21),
        ("Wqq", [2, -1], 22),
        ("Zqq", [5, -5], 31),
        ("Zqq", [-4, 4], 32),
        ("Zqq", [1, -1], 33),
        ("Hgg", [21, 21], 44),
        ("Hqql", [1, -2, 13], 46),
    ],
)
def test_truth_codes(name, products, code):
    assert truth_match(name, np.array(products)) == code


def test_decay_products_pass_through_copies():
    # system, top, copy of the top, W, b, copy of the W with a photon, quarks
    pid = np.array([90, 6, 6, 24, 5, 24, 22, 2, -1])
    first = np.array([0, 2, 3, 5, 0, 7, 0, 0, 0])
    second = np.array([0, 2, 4, 6, 0, 8, 0, 0, 0])
    offsets = np.array([0, 9, 18])
    pids, daughters = np.tile(pid, 2), [np.tile(first, 2), np.tile(second, 2)]
    assert simulate_jets._last_copies(pids, daughters, offsets, 6) == [2, 11]
    assert simulate_jets._decay_products(11, pids, daughters, 9) == [16, 17, 13]


# Jets


def test_record(sample):
    assert list(sample) == list(JETS_FEATURES)
    assert len(sample["jet_pt"]) == 2 * JETS
    for name, feature in JETS_FEATURES.items():
        if name.startswith("part_"):
            assert {row.dtype for row in sample[name]} == {np.dtype(feature.feature.dtype)}, name
            assert [len(row) for row in sample[name]] == sample["jet_nparticles"].tolist(), name
        else:
            assert sample[name].dtype == np.dtype(feature.dtype), name
    assert np.sum([sample[name].astype(int) for name in LABEL_COLUMNS], axis=0).tolist() == [1] * 2 * JETS
    assert sample["label_QCD"].sum() == JETS and sample["label_Tbqq"].sum() == JETS
    # Shuffled, not class after class.
    assert 0 < sample["label_QCD"][:JETS].sum() < JETS


def test_selection_and_jet_momenta(sample):
    assert np.all((sample["jet_pt"] >= 500) & (sample["jet_pt"] < 1000) & (np.abs(sample["jet_eta"]) < 2))
    assert sample["jet_nparticles"].min() >= 4
    for row in range(2 * JETS):
        px, py, pz, energy = (sample[name][row].astype(float) for name in REQUIRED_COLUMNS)
        pt, eta, phi = np.hypot(px, py), np.arcsinh(pz / np.hypot(px, py)), np.arctan2(py, px)
        assert np.all(np.diff(pt) <= 1e-4)
        assert np.hypot(px.sum(), py.sum()) == pytest.approx(sample["jet_pt"][row], rel=1e-5)
        assert energy.sum() == pytest.approx(sample["jet_energy"][row], rel=1e-5)
        sign = 1 if sample["jet_eta"][row] > 0 else -1
        assert np.allclose(sample["part_deta"][row], sign * (eta - sample["jet_eta"][row]), atol=1e-5)
        dphi = sample["part_dphi"][row].astype(float)
        assert np.allclose(np.cos(dphi), np.cos(phi - sample["jet_phi"][row]), atol=1e-5)
        assert np.hypot(sample["part_deta"][row], dphi).max() < 1.2
        mass = np.sqrt(max(energy.sum() ** 2 - px.sum() ** 2 - py.sum() ** 2 - pz.sum() ** 2, 0))
        assert 0 <= sample["jet_sdmass"][row] <= mass + 0.01


def test_constituents(sample):
    flags = np.sum([np.concatenate(sample[name]) for name in PARTICLE_FLAGS], axis=0)
    assert set(flags) == {1}
    charge = np.concatenate(sample["part_charge"])
    neutral = (np.concatenate(sample["part_isPhoton"]) + np.concatenate(sample["part_isNeutralHadron"])) == 1
    assert np.array_equal(charge == 0, neutral)
    for name in ("part_d0val", "part_d0err", "part_dzval", "part_dzerr"):
        assert np.array_equal(np.concatenate(sample[name]) == 0, neutral), name
    charged_fraction = 1 - neutral.mean()
    assert 0.4 < charged_fraction < 0.7


def test_substructure_falls_with_the_number_of_axes(sample):
    taus = np.stack([sample[f"jet_tau{n}"] for n in (1, 2, 3, 4)])
    assert np.all(np.diff(taus, axis=0) <= 1e-6) and taus.min() > 0 and taus.max() < 1


def test_top_jets_have_the_mass_of_the_top(sample):
    tops, qcd = of_class(sample, "Tbqq"), of_class(sample, "QCD")
    assert set(tops["aux_truth_match"]) <= CODES["Tbqq"] and set(np.abs(tops["aux_genpart_pid"])) == {6}
    assert set(qcd["aux_truth_match"]) == {50} and set(qcd["aux_genpart_pt"]) == {0}
    assert 145 < np.median(tops["jet_sdmass"]) < 195 and np.median(qcd["jet_sdmass"]) < 100
    ratio = np.array(tops["aux_genpart_pt"]) / np.array(tops["jet_pt"])
    assert 0.8 < np.median(ratio) < 1.2
    eta, phi = (np.array(tops[f"aux_genpart_{n}"]) - np.array(tops[f"jet_{n}"]) for n in ("eta", "phi"))
    assert np.median(np.hypot(eta, (phi + np.pi) % (2 * np.pi) - np.pi)) < 0.1


def test_substructure_of_a_known_jet(generator):
    # Two equal prongs 0.4 apart, and a soft one that soft drop removes.
    eta, phi, pt = np.array([0.2, -0.2, 0.0, 0.2]), np.array([0.0, 0.0, 0.5, 1e-3]), np.array([100.0, 100.0, 4.0, 1.0])
    momenta = (pt * np.cos(phi), pt * np.sin(phi), pt * np.sinh(eta), pt * np.cosh(eta))
    out = simulate_jets._substructure(*momenta, np.array([4]))
    kept = [0, 1, 3]
    mass = np.sqrt(momenta[3][kept].sum() ** 2 - sum(values[kept].sum() ** 2 for values in momenta[:3]))
    assert out["jet_sdmass"][0] == pytest.approx(mass, rel=1e-6)
    assert out["jet_tau3"][0] == pytest.approx(1e-3 / (205 * 0.8), rel=1e-6)
    assert out["jet_tau4"][0] == pytest.approx(0, abs=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
def test_every_class(small_batches, name):
    columns = simulate(4, [name], seed=11)
    assert set(columns["aux_truth_match"]) <= CODES[name]
    assert columns[f"label_{name}"].tolist() == [1] * 4
    if name != "QCD":
        assert set(np.abs(columns["aux_genpart_pid"])) == {RESONANCE[name[0]]}


# Random numbers


def test_jets_do_not_depend_on_processes_or_on_other_classes(sample):
    (parallel,) = iter_jets(JETS, ["QCD", "Tbqq"], seed=3, processes=2)
    assert_same(parallel, sample)
    alone = simulate(JETS, ["Tbqq"], seed=3)
    mixed = of_class(sample, "Tbqq")
    order, mixed_order = np.argsort(alone["jet_pt"]), np.argsort(mixed["jet_pt"])
    assert np.array_equal(np.array(alone["jet_pt"])[order], np.array(mixed["jet_pt"])[mixed_order])


def test_a_longer_run_starts_with_the_same_rounds(small_batches, monkeypatch):
    monkeypatch.setattr(simulate_jets, "CHUNK_JETS", 4)
    rounds = list(iter_jets(6, ["QCD"], seed=8))
    assert [len(columns["jet_pt"]) for columns in rounds] == [4, 2]
    assert_same(rounds[0], simulate(4, ["QCD"], seed=8))
    assert not np.array_equal(rounds[0]["jet_pt"][:2], rounds[1]["jet_pt"])
    assert not np.array_equal(simulate(4, ["QCD"], seed=9)["jet_pt"], rounds[0]["jet_pt"])


# Command line


def test_command_line(small_batches, tmp_path, capsys):
    arguments = ["--output", str(tmp_path / "jets"), "--classes", "QCD", "--n_jets", "5", "--seed", "3"]
    assert simulate_jets.main(arguments) == 0
    assert "5 jets" in capsys.readouterr().out
    data = load_dataset("parquet", data_files=str(tmp_path / "jets/train-*.parquet"), split="train")
    assert data.features == JETS_FEATURES and len(data) == 5
    assert simulate_jets.main(arguments) == 2
    assert "already holds split" in capsys.readouterr().err
    assert simulate_jets.main([*arguments, "--overwrite", "--n_jets", "2"]) == 0


def test_class_lists():
    assert parse_classes("QCD,Tbqq") == ["QCD", "Tbqq"]
    assert parse_classes("all") == list(simulate_jets.CLASS_SETTINGS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_jets": 0}, "num_jets must be an integer of at least 1"),
        ({"num_jets": True}, "num_jets must be an integer"),
        ({"num_jets": 1, "seed": -1}, "seed must be an integer of at least 0"),
        ({"num_jets": 1, "classes": ["top"]}, "class must be one of QCD.*got 'top'"),
        ({"num_jets": 1, "classes": ["QCD", "QCD"]}, "classes must differ"),
        ({"num_jets": 1, "classes": "QCD"}, "classes must be a list"),
        ({"num_jets": 1, "classes": []}, "classes must be a list"),
    ],
)
def test_hostile_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        simulate(**arguments)


def test_hostile_command_line(tmp_path, capsys):
    with pytest.raises(SystemExit):
        simulate_jets.main(["--output", str(tmp_path), "--classes", "QCD,top"])
    assert "got 'top'" in capsys.readouterr().err
    assert simulate_jets.main(["--output", str(tmp_path / "x"), "--n_jets", "-3"]) == 2
    assert capsys.readouterr().err == "error: num_jets must be an integer of at least 1, got -3\n"
    assert not (tmp_path / "x").exists()


def test_missing_packages_are_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "pythia8mc", None)
    assert simulate_jets.main(["--output", str(tmp_path / "x")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and 'pip install "hepzoo[sim]"' in error
