"""The parametrised shower simulator, and what of the Geant4 engine can be tested without its data sets."""

import os

import numpy as np
import pytest
from datasets import Features, Value, load_dataset

from hepzoo.data_scripts import geant4_showers, simulate_showers
from hepzoo.data_scripts.shower_profiles import (
    EcalGeometry,
    ShowerConstants,
    longitudinal_parameters,
    longitudinal_profile,
    radial_parameters,
)
from hepzoo.data_scripts.showers_schema import SHOWER_FEATURES, SIMULATION_COLUMNS, shower_features
from hepzoo.data_scripts.simulate_showers import cell_hits, iter_showers, parse_grid, parse_range
from hepzoo.data_scripts.simulate_showers import simulate_showers as simulate

HITS = ("x", "y", "z", "energy")


@pytest.fixture(scope="module")
def sample():
    return simulate(600, (10.0, 100.0), seed=3)


def flat(columns, name):
    return np.concatenate(columns[name])


def visible(columns):
    return np.array([row.sum() for row in columns["energy"]])


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        for a, b in zip(first[name], second[name], strict=True):
            assert np.array_equal(a, b), name


# Records


def test_record(sample):
    assert sample.keys() == shower_features(SIMULATION_COLUMNS).keys()
    for name in HITS:
        assert {row.dtype for row in sample[name]} == {np.dtype(SHOWER_FEATURES[name].feature.dtype)}
    for name in "xyz":
        assert flat(sample, name).min() >= 0 and flat(sample, name).max() <= 29
    assert flat(sample, "energy").min() > 0.1
    incident = sample["incident_energy"]
    assert incident.dtype == np.float32 and incident.min() >= 10 and incident.max() <= 100
    assert incident.std() == pytest.approx(90 / np.sqrt(12), rel=0.08)
    for name in ("impact_x_cm", "impact_y_cm"):
        assert np.abs(sample[name]).max() <= 0.25 and sample[name].std() == pytest.approx(0.5 / np.sqrt(12), rel=0.1)


def test_hits_are_ordered_and_cells_are_unique(sample):
    for x, y, z, energy in zip(*(sample[name] for name in HITS), strict=True):
        assert np.all(np.diff(z) >= 0)
        assert np.all(np.diff(energy)[np.diff(z) == 0] <= 0)
        assert len({*zip(x.tolist(), y.tolist(), z.tolist(), strict=True)}) == len(x)


def test_sum_and_cells_before_the_cut(sample):
    assert np.all(sample["sum_before_cut_mev"] >= visible(sample) * (1 - 1e-5))
    assert np.all(sample["n_cells_before_cut"] >= [len(row) for row in sample["x"]])
    everything = simulate(100, 20.0, seed=1, grid=(80, 80, 30), cut=0.0)
    assert np.allclose(visible(everything), everything["sum_before_cut_mev"], rtol=1e-5)
    assert everything["n_cells_before_cut"].tolist() == [len(row) for row in everything["x"]]


# Physics. The numbers are those of Geant4 showers in the same geometry (docs/simulate_showers.md).


def test_response_hits_and_depth(sample):
    incident, energy = sample["incident_energy"], visible(sample)
    hits = np.array([len(row) for row in sample["x"]])
    assert np.mean(energy / incident) == pytest.approx(21.9, rel=0.06)  # MeV/GeV
    assert hits.mean() * 55 / incident.mean() == pytest.approx(745, rel=0.1)
    depth = np.array([np.average(z, weights=e) for z, e in zip(sample["z"], sample["energy"], strict=True)])
    assert depth.mean() == pytest.approx(15.1, abs=0.5)
    # The maximum moves with ln E.
    low, high = incident < 25, incident > 75
    assert 0.8 < depth[high].mean() - depth[low].mean() < 2.5


def test_layer_profile(sample):
    profile = np.bincount(flat(sample, "z"), flat(sample, "energy"), 30) / sample["incident_energy"].sum()
    assert 12 <= np.argmax(profile) <= 18
    assert profile[15] == pytest.approx(1.5, rel=0.12)
    assert profile[:3].sum() < 0.1 and profile[28:].sum() < 0.35


def test_radial_profile(sample):
    radius = np.hypot(flat(sample, "x") - 14.5, flat(sample, "y") - 14.5) * 5
    energy = flat(sample, "energy")
    inside = [energy[radius < r].sum() / energy.sum() for r in (10, 20, 50)]
    assert np.all(np.diff(inside) > 0) and 0.5 < inside[0] < 0.85 and inside[2] > 0.9
    x, y = (np.average(flat(sample, name), weights=energy) for name in "xy")
    assert x == pytest.approx(14.5, abs=0.1) and y == pytest.approx(14.5, abs=0.1)


def test_resolution_improves_with_energy():
    # With the weight 2 behind the thicker plates, fluctuations of the depth cancel.
    widths = []
    for energy in (15.0, 90.0):
        columns = simulate(300, energy, seed=5)
        weighted = [np.sum(e * np.where(z >= 21, 2, 1)) for z, e in zip(columns["z"], columns["energy"], strict=True)]
        widths.append(np.std(weighted) / np.mean(weighted))
    assert 0.03 < widths[0] < 0.08 and 0.01 < widths[1] < 0.04


def test_finer_cells_see_the_same_showers():
    coarse = simulate(100, 50.0, seed=9, cut=0.0)
    fine = simulate(100, 50.0, seed=9, cut=0.0, grid=(60, 60, 30), cell_size=2.5)
    assert np.allclose(visible(coarse), visible(fine), rtol=1e-4)
    assert np.array_equal(coarse["sum_before_cut_mev"].round(0), fine["sum_before_cut_mev"].round(0))
    assert sum(map(len, fine["x"])) > 1.3 * sum(map(len, coarse["x"]))
    shower, cells = fine["x"][0] // 2, coarse["x"][0]
    assert set(shower.tolist()) == set(cells.tolist())


def test_longitudinal_profile_is_normalised():
    rng = np.random.default_rng(0)
    alpha, maximum = longitudinal_parameters(np.geomspace(0.5, 500, 6), ShowerConstants(), rng)
    depth = np.linspace(-5, 200, 200_001)
    profile = longitudinal_profile(depth[:, None], alpha, maximum)
    assert np.all(profile[depth <= 0] == 0)
    assert profile.sum(axis=0) * (depth[1] - depth[0]) == pytest.approx(np.ones(6), rel=1e-3)
    assert depth[np.argmax(profile, axis=0)] == pytest.approx(maximum, abs=0.01)


def test_radial_parameters_widen_with_depth():
    core, tail, weight = radial_parameters(20.0, np.array([0.1, 0.5, 1.0, 2.0, 3.0]), ShowerConstants())
    assert np.all(np.diff(core) > 0) and np.all(tail[:4] > core[:4])
    assert np.all((weight >= 0) & (weight <= 1)) and weight[-1] < weight[1]


def test_geometry():
    geometry = EcalGeometry()
    assert geometry.num_layers == 30
    assert geometry.exit_depth[-1] == pytest.approx(22.9, abs=0.1)
    # Narrow and wide gaps alternate.
    assert geometry.gap_behind[:3] == pytest.approx([0.495, 6.725, 0.495], abs=0.02)


def test_cells_at_the_edges():
    geometry = EcalGeometry()
    x = np.array([-75.0, 74.99, 75.0, -75.01, 0.0, 0.0, 199.0, 201.0])
    shower, layer = np.zeros(8, np.int64), np.full(8, 7)
    columns = cell_hits(shower, layer, x, np.zeros(8), np.ones(8), 2, (30, 30, 30), 5.0, 0.1, geometry)
    assert sorted(columns["x"][0].tolist()) == [0, 15, 29]
    assert columns["energy"][0].tolist() == [2, 1, 1]  # the two deposits of one cell add up
    assert columns["x"][1].size == 0
    assert columns["sum_before_cut_mev"].tolist() == [7, 0]  # beside the sheet nothing is seen
    assert columns["n_cells_before_cut"].tolist() == [6, 0]


# Random numbers


def test_seed_and_chunks():
    head = simulate(100, seed=5)
    assert_same(simulate(100, seed=5), head)
    assert not np.array_equal(simulate(100, seed=6)["incident_energy"], head["incident_energy"])
    streamed = list(iter_showers(230, seed=5))
    assert [len(chunk["x"]) for chunk in streamed] == [100, 100, 30]
    assert_same(streamed[0], head)
    # A fixed energy leaves the impact points as they are.
    assert np.array_equal(simulate(100, 50.0, seed=5)["impact_x_cm"], head["impact_x_cm"])


def test_processes_do_not_change_the_showers():
    energies = np.linspace(10, 30, 120)
    one = list(iter_showers(120, energies, seed=5))
    two = list(iter_showers(120, energies, seed=5, processes=2))
    for a, b in zip(one, two, strict=True):
        assert_same(a, b)
    assert np.concatenate([chunk["incident_energy"] for chunk in two]) == pytest.approx(energies)


# Command line and schema


def test_command_line_writes_shards(tmp_path, capsys):
    arguments = ["--output", str(tmp_path), "--n_showers", "120", "--energy", "20", "--seed", "3", "--split", "test"]
    arguments += ["--grid", "60,60,30", "--cell_size", "2.5", "--rows_per_shard", "50"]
    assert simulate_showers.main(arguments) == 0
    assert "120 showers" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"test-0000{i}-of-00003.parquet" for i in range(3)]
    rows = list(load_dataset("parquet", data_files=str(tmp_path / "test-*.parquet"), streaming=True)["train"])
    assert len(rows) == 120
    assert all(row["incident_energy"] == 20 and len(row["x"]) == len(row["energy"]) for row in rows)
    assert max(max(row["x"]) for row in rows) > 30
    assert simulate_showers.main(arguments) == 2  # never over an existing split


def test_schema_takes_further_columns():
    features = shower_features(Features({"note": Value("string")}))
    assert list(features) == [*SHOWER_FEATURES, "note"]
    with pytest.raises(ValueError, match="column energy is a shower column already"):
        shower_features(Features({"energy": Value("float32")}))


def test_range_and_grid_texts():
    assert parse_range("50") == 50.0 and parse_range("10-100") == (10.0, 100.0)
    assert parse_grid("60,60,30") == (60, 60, 30)


# Geant4: what happens without it, and how its data are found


def test_geant4_data_sets(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert geant4_showers.find_data_sets({}) == dict.fromkeys(geant4_showers.DATA_SETS)
    for folder in geant4_showers.DATA_SETS.values():
        (tmp_path / "data" / f"{folder}1.0").mkdir(parents=True)
    found = geant4_showers.find_data_sets({"GEANT4_DATA_DIR": str(tmp_path / "data")})
    assert found["G4LEVELGAMMADATA"] == tmp_path / "data" / "PhotonEvaporation1.0" and all(found.values())
    found = geant4_showers.find_data_sets(
        {"GEANT4_DATA_DIR": str(tmp_path / "data"), "G4LEDATA": str(tmp_path / "nowhere")}
    )
    assert [name for name, folder in found.items() if folder is None] == ["G4LEDATA"]


def test_hostile_geant4_without_its_package_or_data(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    for variable in [name for name in os.environ if name.startswith(("G4", "GEANT4"))]:
        monkeypatch.delenv(variable)
    monkeypatch.setattr(geant4_showers.importlib.util, "find_spec", lambda name: None)
    output = tmp_path / "out"
    arguments = ["--output", str(output), "--n_showers", "5", "--engine", "geant4"]
    assert simulate_showers.main(arguments) == 2
    assert 'pip install "hepzoo[sim]"' in capsys.readouterr().err
    monkeypatch.setattr(geant4_showers.importlib.util, "find_spec", lambda name: object())
    assert simulate_showers.main(arguments) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "G4LEDATA (G4EMLOW)" in message and "GEANT4_DATA_DIR" in message
    assert not output.exists()


# Malformed input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_showers": 0}, "num_showers must be an integer of at least 1, got 0"),
        ({"num_showers": 2.5}, "num_showers must be an integer"),
        ({"seed": -1}, "seed must be an integer of at least 0"),
        ({"energy": 0.5}, "energy must be in 1..1000 GeV, got 0.5"),
        ({"energy": float("nan")}, "energy must be in .* got nan"),
        ({"energy": (50.0, 10.0)}, "low <= high"),
        ({"energy": (1.0, 2.0, 3.0)}, r"must be \(low, high\)"),
        ({"energy": [10.0, 1e9, 20.0]}, "energy of shower 1 must be"),
        ({"energy": [10.0, 20.0]}, "energy must be one number or 3"),
        ({"energy": "many"}, "energy must be numbers"),
        ({"grid": (30, 30)}, "grid must be three integers"),
        ({"grid": (30, 30, 31)}, "grid has 31 layers; the calorimeter has 30"),
        ({"grid": (0, 30, 30)}, "grid: 0 cells"),
        ({"grid": (30, 100, 30)}, "100 cells of 5 mm in y; expected 1 or more cells inside the 400 mm"),
        ({"cell_size": 0.0}, "cell_size must be a positive length"),
        ({"cut": -0.1}, "cut must be an energy in MeV of at least 0"),
        ({"engine": "toy"}, "engine must be one of parametrised, geant4"),
    ],
)
def test_hostile_arguments(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        simulate(**{"num_showers": 3, **arguments})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (EcalGeometry, {"silicon": -1.0}, "silicon must be a positive length"),
        (EcalGeometry, {"silicon": 2.0}, "the tungsten in front of layer 21 does not fit"),
        (EcalGeometry, {"tungsten": (0.0, 2.1)}, "one entry per layer"),
        (EcalGeometry, {"tungsten": (0.0, float("nan"), *[2.1] * 28)}, "tungsten must be lengths"),
        (ShowerConstants, {"crossing_rate": -1.0}, "crossing_rate must be a finite number of at least 0"),
        (ShowerConstants, {"mip_mode": float("nan")}, "mip_mode must be a finite number"),
        (ShowerConstants, {"shift_log_depth": float("inf")}, "shift_log_depth must be a finite number"),
    ],
)
def test_hostile_constants(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**options)


@pytest.mark.parametrize(
    "extra", [["--n_showers", "0"], ["--seed", "-4"], ["--energy", "0.1"], ["--split", "../up"], ["--grid", "9,9,9"]]
)
def test_hostile_command_line_leaves_nothing(tmp_path, capsys, extra):
    output = tmp_path / "out"
    assert simulate_showers.main(["--output", str(output), "--n_showers", "10", *extra]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("error: ")
    assert not output.exists() and not (tmp_path / "up").exists()


@pytest.mark.parametrize("option", ["--energy=a", "--energy=1-2-3", "--energy=", "--grid=30", "--grid=1,2,x"])
def test_hostile_texts(option):
    with pytest.raises(SystemExit) as exit:
        simulate_showers.build_parser().parse_args(["--output", "x", option])
    assert exit.value.code == 2
