"""Conversion of OmniLearned HDF5 files; the features of the published layout have to come back from the columns."""

from collections import Counter

import numpy as np
import pytest
from datasets import load_dataset

from hepzoo.data_scripts import convert_omnilearned
from hepzoo.data_scripts.convert_omnilearned import describe_omnilearned, massless_axis, read_omnilearned
from hepzoo.tokenization.feature_extraction_omnilearned import OmniLearnedFeatureExtractor

h5py = pytest.importorskip("h5py")

JETS, SLOTS = 40, 12


def made_jets(types=False, further=0, seed=0):
    """Arrays of a file: massless constituents by falling pT about axes that are known; also these axes."""
    rng = np.random.default_rng(seed)
    axis = rng.uniform(-1.8, 1.8, JETS)
    data = np.zeros((JETS, SLOTS, 4 + types + further), dtype=np.float32)
    data[..., :2] = rng.normal(scale=0.2, size=(JETS, SLOTS, 2))
    data[..., 2] = np.sort(rng.uniform(0.5, 5, (JETS, SLOTS)), axis=1)[:, ::-1]
    data[..., 3] = data[..., 2] + np.log(np.cosh(data[..., 0] + axis[:, None]))
    if types:
        data[..., 4] = rng.integers(1, 9, (JETS, SLOTS))
    if further:
        data[..., 4 + types :] = rng.uniform(-0.9, 0.9, (JETS, SLOTS, further))
    lengths = rng.integers(3, SLOTS + 1, JETS)
    data[np.arange(SLOTS) >= lengths[:, None]] = 0
    return data, lengths, axis


def write(path, data, labels=None, **more):
    with h5py.File(path, "w") as file:
        file["data"] = data
        file["pid"] = np.arange(len(data)) % 2 if labels is None else labels
        for name, values in more.items():
            file["global" if name == "conditions" else name] = values
    return path


def convert(path, output, *options):
    assert convert_omnilearned.main([str(path), "--output", str(output), *options]) == 0
    return load_dataset("parquet", data_files=f"{output}/train-*.parquet", split="train")


def refused(capsys, path, output, *options):
    """The error line of a conversion that fails and leaves nothing."""
    assert convert_omnilearned.main([str(path), "--output", str(output), *options]) == 2
    assert not output.exists()
    lines = capsys.readouterr().err.strip().splitlines()
    lines = [line for line in lines if line.startswith("error")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("types, further", [(False, 0), (True, 0), (False, 4), (True, 4)])
def test_network_inputs_come_back(tmp_path, types, further):
    data, lengths, axis = made_jets(types, further)
    rows = convert(write(tmp_path / "a.h5", data), tmp_path / "out", "--classes", "QCD", "Tbqq")
    extractor = OmniLearnedFeatureExtractor(
        ["label_QCD", "label_Tbqq"], use_particle_ids=types, use_additional_features=further == 4
    )
    found = extractor(rows.to_dict(), padding=True)
    np.testing.assert_array_equal(found["attention_mask"].sum(axis=1), lengths)
    width = lengths.max()
    np.testing.assert_allclose(found["particles"], data[:, :width, :4], atol=2e-6)
    np.testing.assert_array_equal(found["class_ids"], np.arange(JETS) % 2)
    if types:
        np.testing.assert_array_equal(found["particle_ids"], data[:, :width, 4])
    if further:
        np.testing.assert_allclose(found["additional_features"], data[:, :width, -4:], atol=2e-6)
    # the axis is not in the file, but follows from massless constituents
    np.testing.assert_allclose(rows["jet_eta"], axis, atol=1e-3)
    np.testing.assert_allclose(rows["jet_phi"], 0)
    np.testing.assert_array_equal(rows["jet_nparticles"], lengths)
    mass2 = np.square(rows[0]["part_energy"]) - sum(np.square(rows[0][f"part_p{k}"]) for k in "xyz")
    assert np.all(np.abs(mass2) < 1e-3 * np.square(rows[0]["part_energy"]))


def test_axis_of_massive_constituents():
    rng = np.random.default_rng(1)
    jet = np.repeat(np.arange(50), 30)
    axis = rng.choice([-1, 1], 50) * rng.uniform(0.4, 2, 50)
    delta, pt = rng.normal(scale=0.2, size=1500), rng.exponential(20, 1500) + 1
    energy = np.sqrt((pt * np.cosh(axis[jet] + delta)) ** 2 + 0.14**2)
    np.testing.assert_allclose(massless_axis(delta, pt, energy, jet, 51)[:50], axis, atol=2e-3)
    assert massless_axis(delta, pt, energy, jet, 51)[50] == 0


def test_conditions_and_given_axis(tmp_path):
    data, lengths, axis = made_jets()
    conditions = np.stack([axis, np.linspace(0, 1, JETS), lengths / 100], axis=1).astype(np.float32)
    path = write(tmp_path / "a.h5", data, conditions=conditions)
    rows = convert(path, tmp_path / "plain")
    np.testing.assert_array_equal(np.stack([rows[f"jet_condition_{k}"] for k in range(3)], axis=1), conditions)
    np.testing.assert_array_equal(rows["jet_label"], np.arange(JETS) % 2)
    assert "label_QCD" not in rows.column_names
    names = ("jet_eta", "jet_sdmass", "jet_hundreds")
    rows = convert(path, tmp_path / "named", "--condition_names", *names)
    np.testing.assert_array_equal(np.stack([rows[name] for name in names], axis=1), conditions)


def test_targets_of_constituents_and_regression(tmp_path):
    data, lengths, _ = made_jets(further=3)
    rng = np.random.default_rng(2)
    labels = np.where(data[..., 2] != 0, rng.integers(0, 5, (JETS, SLOTS)), -1)
    path = write(tmp_path / "a.h5", data[:, ::-1], data_pid=labels[:, ::-1])
    rows = convert(path, tmp_path / "out", "--particle_types", "no")
    # padding in front, rising pT: sorted
    for k in range(JETS):
        np.testing.assert_array_equal(rows[k]["part_label"], labels[k, : lengths[k]])
        np.testing.assert_array_equal(rows[k]["part_feature_2"], data[k, : lengths[k], 6])
    values = rng.normal(size=(JETS, SLOTS, 2)).astype(np.float32)
    targets = rng.normal(size=(JETS, 2)).astype(np.float32)
    path = write(tmp_path / "b.h5", data[..., :4], labels=targets, data_pid=values)
    rows = convert(path, tmp_path / "values")
    np.testing.assert_array_equal(rows["jet_target_1"], targets[:, 1])
    np.testing.assert_array_equal(rows[3]["part_target_1"], values[3, : lengths[3], 1])
    assert "jet_label" not in rows.column_names


def test_shift_shards_and_blocks(tmp_path, monkeypatch, capsys):
    data, lengths, _ = made_jets()
    data[0, lengths[0] - 1, 2] = 0  # a particle of 1 GeV, which the published rule takes for padding
    path = write(tmp_path / "a.h5", data, labels=np.arange(JETS) % 3 + 200, extra=np.zeros(3))
    monkeypatch.setattr("hepzoo.data_scripts.jet_files.BLOCK_BYTES", 7 * 1024)  # 7 jets a block
    assert len(list(read_omnilearned(path, label_shift=200))) == 6
    rows = convert(
        path, tmp_path / "out", "--label_shift", "200", "--rows_per_shard", "15", "--classes", "QCD", "QCD", "Wqq"
    )
    report = capsys.readouterr().out
    assert "1 slots with ln pT = 0 that hold something" in report and "not converted: extra" in report
    assert len(list((tmp_path / "out").glob("*.parquet"))) == 3
    np.testing.assert_array_equal(rows["jet_label"], np.arange(JETS) % 3)
    np.testing.assert_array_equal(rows["label_QCD"], np.arange(JETS) % 3 < 2)
    np.testing.assert_array_equal(rows["label_Wqq"], np.arange(JETS) % 3 == 2)
    assert len(rows[0]["part_px"]) == lengths[0] - 1


def test_empty_jets_and_impact_parameters_beyond_tanh(tmp_path):
    data, _, _ = made_jets(further=4)
    data[5] = 0
    data[6, 0, 4] = 1.0
    counts = Counter()
    path = write(tmp_path / "a.h5", data)
    (block,) = read_omnilearned(path, counts)
    assert counts["impact parameters beyond the range of tanh, cut"] == 1
    assert block.lengths[5] == 0 and all(np.isfinite(values).all() for values in block.particles.values())
    assert describe_omnilearned(path).num_jets == JETS


def test_hostile_files(tmp_path, capsys):
    data, _, _ = made_jets()
    output = tmp_path / "out"
    for changes, options, message in (
        ({"data": data[..., :3]}, (), "data must be numbers (N, P, 4 or more)"),
        ({"data": data.astype("S4")}, (), "data must be numbers"),
        ({"data": np.zeros((JETS, SLOTS, 7))}, (), "data have 7 features; with --particle_types"),
        ({}, ("--particle_types", "yes"), "expected at least 5 with --particle_types yes"),
        ({"labels": np.zeros(JETS + 1)}, (), f"expected {JETS} rows"),
        ({"labels": np.array([b"a"] * JETS)}, (), "pid must be one number per jet"),
        ({"labels": np.arange(JETS)}, ("--classes", "QCD", "Tbqq"), "jet 2: pid = 2, expected up to 1, at least 0"),
        ({"labels": np.full(JETS, 0.5)}, ("--classes", "QCD"), "jet 0: pid = 0.5"),
        ({}, ("--label_shift", "1"), "jet 0: pid = 0, expected an integer, at least 1"),
        ({"conditions": np.zeros((JETS, 2, 2))}, (), "global must be numbers (N, C)"),
        ({"conditions": np.zeros((JETS, 2))}, ("--condition_names", "jet_a"), "global has 2 conditions"),
        ({"data_pid": np.zeros((JETS, SLOTS + 1))}, (), "data_pid must be numbers"),
        ({}, ("--classes", "QCD", "quark"), "class must be one of"),
        ({}, ("--condition_names", "jet_pt"), "condition 'jet_pt' follows from the constituents"),
        ({}, ("--condition_names", "pt"), "condition 'pt': expected different names"),
    ):
        arrays = {"data": data, **changes}
        line = refused(capsys, write(tmp_path / "a.h5", **arrays), output, *options)
        assert message in line, line


def test_hostile_values(tmp_path, capsys):
    data, _, _ = made_jets(types=True)
    for jet, place, column, value, message in (
        (3, 1, 0, np.nan, "jet 3, place 1: column 0 of data = nan, expected a finite number"),
        (3, 1, 3, np.inf, "jet 3, place 1: column 3 of data = inf"),
        (4, 0, 4, 0, "jet 4, place 0: type = 0, expected 1 to 8"),
        (4, 0, 4, 2.5, "jet 4, place 0: type = 2.5"),
        (2, 0, 2, 300, "jet 2, constituent 0: part_px = "),
    ):
        broken = data.copy()
        broken[jet, place, column] = value
        line = refused(capsys, write(tmp_path / "a.h5", broken), tmp_path / "out")
        assert message in line, line
    (tmp_path / "b.h5").write_bytes((tmp_path / "a.h5").read_bytes()[:3000])
    assert "truncated or damaged" in refused(capsys, tmp_path / "b.h5", tmp_path / "out")
    assert "no such file" in refused(capsys, tmp_path / "none.h5", tmp_path / "out")
