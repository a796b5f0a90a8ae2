"""The TPC simulator. Its helices and detector need numpy alone; the events need Pythia."""

import sys

import numpy as np
import pytest
from datasets import load_dataset

from hepzoo.data_scripts import simulate_tpc as module
from hepzoo.data_scripts.simulate_tpc import LAYER_RADII, helix_crossings, ionisation, iter_events, main
from hepzoo.data_scripts.simulate_tpc import simulate_tpc as simulate
from hepzoo.data_scripts.tpc_schema import TPC_FEATURES, pid_class

EVENTS = 60


@pytest.fixture(scope="module")
def generator():
    pytest.importorskip("pythia8mc")


@pytest.fixture(scope="module")
def sample(generator):
    return simulate(EVENTS, seed=3)


def stepped(position, momentum, charge, max_length, step=0.01):
    """Path lengths at which a numerically integrated particle crosses each layer."""
    crossings, length, before = [[] for _ in LAYER_RADII], 0.0, np.hypot(*position[:2]) > LAYER_RADII
    position, momentum = position.astype(float), momentum.astype(float)
    size = np.linalg.norm(momentum)
    while length < max_length:
        # Lorentz force: dp/ds = 0.0029979 q u x B per cm, with B along z; half-way step
        def turn(p, h):
            angle = -charge * module._CURVATURE * h / size
            c, s = np.cos(angle), np.sin(angle)
            return np.array([c * p[0] - s * p[1], s * p[0] + c * p[1], p[2]])

        position = position + turn(momentum, step / 2) / size * step
        momentum = turn(momentum, step)
        length += step
        outside = np.hypot(*position[:2]) > LAYER_RADII
        for layer in np.flatnonzero(outside != before):
            crossings[layer].append(length)
        before = outside
    return crossings


# Helices


@pytest.mark.parametrize("charge", [1, -1])
@pytest.mark.parametrize("pt", [0.08, 0.3])
def test_helices_follow_the_lorentz_force(charge, pt):
    """Both crossings of a curling particle, against numerical integration."""
    position, momentum = np.array([1.0, -2.0, 5.0]), np.array([pt * 0.6, pt * 0.8, 0.1 * pt])
    found = helix_crossings(position[None], momentum[None], np.array([charge]), 2, 220.0)
    assert len(found["layer"])
    for layer, expected in enumerate(stepped(position, momentum, charge, 219.0)):
        lengths = found["length"][(found["layer"] == layer) & (found["length"] < 219)]
        np.testing.assert_allclose(lengths, expected[: len(lengths)], atol=0.03)
        # what has left the chamber does not come back
        assert len(lengths) == len(expected) or (pt == 0.3 and len(lengths) == 1)
    if pt == 0.3:  # leaves the chamber: one crossing per layer, in order
        assert found["layer"].tolist() == list(range(48))
    else:  # radius 19 cm: comes back, twice
        assert found["layer"].max() < 25 and np.count_nonzero(found["layer"] == 0) == 4


def test_crossings_lie_on_helix_and_layer():
    rng = np.random.default_rng(0)
    count = 200
    position = rng.uniform(-5, 5, (count, 3))
    momentum = rng.normal(0, 0.3, (count, 3))
    charge = rng.choice([-1, 1], count)
    found = helix_crossings(position, momentum, charge, 3, 900.0)
    owner, (x, y, z) = found["particle"], found["position"].T
    np.testing.assert_allclose(np.hypot(x, y), LAYER_RADII[found["layer"]], atol=1e-6)
    pt = np.hypot(momentum[:, 0], momentum[:, 1])
    radius = pt / (0.00299792458 * 1.4)
    centre = position[:, :2] + (charge * radius / pt)[:, None] * np.stack([momentum[:, 1], -momentum[:, 0]], axis=1)
    np.testing.assert_allclose(np.hypot(*(found["position"][:, :2] - centre[owner]).T), radius[owner], atol=1e-5)
    total = np.sqrt((momentum**2).sum(axis=1))
    np.testing.assert_allclose(z, position[owner, 2] + found["length"] * (momentum[:, 2] / total)[owner], atol=1e-6)
    assert (np.abs(z) < module.HALF_LENGTH).all() and (found["length"] <= 900).all()
    assert (np.abs(found["cosine"]) <= 1 + 1e-9).all()
    same = owner[1:] == owner[:-1]
    assert (np.diff(owner) >= 0).all() and (np.diff(found["length"])[same] > 0).all()


def test_straight_tracks_and_stops():
    """A stiff radial track crosses every layer at right angles once; what leaves in z is lost."""
    momentum = np.array([[100.0, 0, 0], [0, 100.0, 300.0], [0, 0.05, 0.001]])
    found = helix_crossings(np.zeros((3, 3)), momentum, np.ones(3), 3, 900.0)
    first = found["particle"] == 0
    assert found["layer"][first].tolist() == list(range(48))
    np.testing.assert_allclose(found["cosine"][first], 1, atol=1e-3)
    np.testing.assert_allclose(found["length"][first], LAYER_RADII, rtol=1e-3)
    second = found["particle"] == 1
    assert found["position"][second, 2].max() < module.HALF_LENGTH
    assert LAYER_RADII[found["layer"][second]].max() < 105 / 3 + 0.1
    assert not (found["particle"] == 2).any()  # turns round in front of the chamber
    empty = helix_crossings(np.zeros((0, 3)), np.zeros((0, 3)), np.zeros(0), 3, 900.0)
    assert all(len(values) == 0 for values in empty.values())


def test_geometry_and_ionisation():
    assert len(LAYER_RADII) == len(module.ROW_HEIGHTS) == 48
    assert LAYER_RADII[[0, -1]].tolist() == [31.372, 75.385] and (np.diff(LAYER_RADII) > 0).all()
    assert sum(thickness for _, thickness in module._CYLINDERS) == pytest.approx(0.082)
    loss = ionisation(np.array([0.3, 1.0, 3.5, 10.0, 1e4]))
    assert loss[0] > loss[1] > loss[2] and loss[2] < loss[3] < loss[4] == 1.6
    assert loss[2] == pytest.approx(1)


def test_photons_convert_at_the_rate_of_the_material():
    rng = np.random.default_rng(0)
    count = 40_000
    momentum = np.tile([0.3, 0.4, 0.0], (count, 1))
    electrons = module._convert_photons(np.arange(count), momentum, np.zeros((count, 3)), rng)
    pairs = len(electrons["event"]) / 2
    assert pairs / count == pytest.approx(1 - np.exp(-7 / 9 * 0.082), rel=0.05)
    assert sorted(set(electrons["pdg"].tolist())) == [-11, 11]
    per_event = np.zeros((count, 3))
    np.add.at(per_event, electrons["event"], electrons["momentum"])
    converted = np.unique(electrons["event"])
    np.testing.assert_allclose(per_event[converted], momentum[converted], rtol=0.02)
    radius = np.hypot(electrons["position"][:, 0], electrons["position"][:, 1])
    assert {round(value, 6) for value in radius} == {radius for radius, _ in module._CYLINDERS}


# Events


def test_columns_and_labels_are_consistent(sample):
    assert list(sample) == list(TPC_FEATURES) and {len(rows) for rows in sample.values()} == {EVENTS}
    for event in range(EVENTS):
        row = {name: rows[event] for name, rows in sample.items()}
        assert {len(row[name]) for name in ("E", "x", "y", "z", "track_id", "pid", "noise")} == {len(row["E"])}
        assert len(row["E"]) >= 20
        assert row["truth_track_id"].tolist() == list(range(1, len(row["truth_pt"]) + 1))
        assert (row["noise"] == (row["track_id"] == 0)).all()
        counts = np.bincount(row["track_id"], minlength=len(row["truth_pt"]) + 1)
        assert counts[1:].tolist() == row["truth_num_points"].tolist() and counts[1:].min(initial=1) >= 1
        on_track = row["track_id"] > 0
        assert (row["pid"][on_track] == pid_class(row["truth_pdg"])[row["track_id"][on_track] - 1]).all()
        assert (row["truth_pt"] >= 0.06).all() and set(np.abs(row["truth_charge"]).tolist()) <= {1}
        momentum = row["truth_pt"] * np.cosh(row["truth_eta"])
        assert (row["truth_energy"] > momentum * (1 - 1e-6)).all()
        # not sorted by track
        assert len(row["E"]) < 100 or (np.diff(row["track_id"]) < 0).mean() > 0.1


def test_statistics_are_close_to_the_published_data(sample):
    """Loose bounds, 60 events; the targets are those of the TPCpp-10M repository and of its toy copy."""
    numbers = np.array([len(values) for values in sample["E"]])
    flat = {name: np.concatenate(rows) for name, rows in sample.items()}
    assert 600 < numbers.mean() < 1150  # 834
    assert 11 < np.mean([len(np.unique(ids)) for ids in sample["track_id"]]) < 21  # 15.4
    assert 225 < flat["E"].mean() < 280 and 230 < flat["E"].std() < 340  # 253, 269
    assert (flat["E"] == np.rint(flat["E"])).all() and flat["E"].min() >= 5 and flat["E"].max() <= 6000
    assert 0.24 < flat["noise"].mean() < 0.40  # 0.32
    fractions = np.bincount(flat["pid"], minlength=5) / len(flat["pid"])
    targets = np.array([0.015, 0.547, 0.046, 0.025, 0.367])
    assert (np.abs(fractions - targets) < [0.02, 0.1, 0.03, 0.02, 0.1]).all()
    radius = np.hypot(flat["x"], flat["y"])
    assert 31.3715 < radius.min() < 31.373 and 75.384 < radius.max() < 75.3855
    assert np.abs(flat["z"]).max() < 106


def test_the_seed_alone_decides(generator, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_EVENTS", 4)
    first, again, other = simulate(6, seed=5), simulate(10, seed=5), simulate(6, seed=6)
    assert all(np.array_equal(a, b) for name in first for a, b in zip(first[name], again[name][:6], strict=True))
    assert not np.array_equal(first["E"][0], other["E"][0])
    assert len(again["E"]) == 10


def test_processes_do_not_change_the_events(generator, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_EVENTS", 5)
    one, two = (list(iter_events(8, 1, processes)) for processes in (1, 2))
    assert [len(part["E"]) for part in one] == [5, 3]
    for a, b in zip(one, two, strict=True):
        assert all(np.array_equal(x, y) for name in a for x, y in zip(a[name], b[name], strict=True))


def test_command_writes_rows_that_stream(generator, tmp_path, capsys):
    assert main(["--output", str(tmp_path), "--n_events", "5", "--seed", "2"]) == 0
    assert "5 events" in capsys.readouterr().out
    rows = list(load_dataset("parquet", data_files=f"{tmp_path}/train-*.parquet", split="train", streaming=True))
    expected = simulate(5, seed=2)
    assert [row["E"] for row in rows] == [values.tolist() for values in expected["E"]]
    assert main(["--output", str(tmp_path), "--n_events", "2", "--split", "plain", "--unlabeled"]) == 0
    rows = list(load_dataset("parquet", data_files=f"{tmp_path}/plain-*.parquet", split="train", streaming=True))
    assert list(rows[0]) == ["E", "x", "y", "z"]


# Malformed input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "num_events must be an integer of at least 1, got 0"),
        ((2.5,), "num_events must be an integer"),
        ((1, -1), "seed must be an integer of at least 0, got -1"),
        ((1, 0, True), "processes must be an integer of at least 1, got True"),
    ],
)
def test_hostile_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        iter_events(*arguments)


def test_hostile_command_line(tmp_path, capsys):
    assert main(["--output", str(tmp_path / "a"), "--n_events", "0"]) == 2
    assert capsys.readouterr().err == "error: num_events must be an integer of at least 1, got 0\n"
    assert not (tmp_path / "a").exists()


def test_hostile_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pythia8mc", None)
    with pytest.raises(ValueError, match=r'pip install "hepzoo\[sim\]"'):
        iter_events(1)
