"""Converters of published jet files: JetClass, AspenOpenJets, top tagging, JetNet; malformed files."""

import pickle
import sys
from collections import Counter

import numpy as np
import pytest
from datasets import load_dataset

from hepzoo.data_scripts import convert_aspenopenjets, convert_jetclass, convert_toptagging
from hepzoo.data_scripts.convert_aspenopenjets import (
    ASPEN_FEATURES,
    CANDIDATE_COLUMNS,
    KINEMATIC_COLUMNS,
    TAGGING_COLUMNS,
    describe_aspenopenjets,
    read_aspenopenjets,
)
from hepzoo.data_scripts.convert_jetclass import describe_jetclass, read_jetclass
from hepzoo.data_scripts.convert_toptagging import describe_jets, jetnet_type, read_jets
from hepzoo.data_scripts.hdf5_files import UnreadableFileError
from hepzoo.data_scripts.jet_files import convert_files
from hepzoo.data_scripts.jets_schema import JETS_FEATURES, LABEL_COLUMNS, PARTICLE_FLAGS, REQUIRED_COLUMNS

h5py = pytest.importorskip("h5py")

SIZE = 8


def make_jets(size=SIZE, seed=0, lowest=3):
    """Lengths, and px, py, pz, energy of all constituents (float32, massless)."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(lowest, 12, size)
    total = lengths.sum()
    pt, eta, phi = rng.exponential(20, total) + 1, rng.normal(0, 0.3, total), rng.normal(0, 0.3, total)
    momenta = np.stack([pt * np.cos(phi), pt * np.sin(phi), pt * np.sinh(eta), pt * np.cosh(eta)], axis=1)
    return lengths, momenta.astype(np.float32)


def padded(lengths, values, places=15):
    out = np.zeros((len(lengths), places, values.shape[1]), values.dtype)
    out[np.arange(places) < lengths[:, None]] = values
    return out


def converted(output, split="train"):
    return load_dataset("parquet", data_files=f"{output}/{split}-*.parquet", split="train").with_format("numpy")


def assert_momenta(data, lengths, momenta, rtol=0.0):
    ends = np.cumsum(lengths)[:-1]
    for index, name in enumerate(REQUIRED_COLUMNS):
        for found, expected in zip(data[name], np.split(momenta[:, index], ends), strict=True):
            assert np.allclose(found, expected, rtol=rtol, atol=0 if rtol == 0 else 1e-5), name


def total_momentum(lengths, momenta):
    return np.array([row.sum(axis=0) for row in np.split(momenta.astype(float), np.cumsum(lengths)[:-1])])


# ROOT


def write_tree(path, columns, tree="tree"):
    uproot = pytest.importorskip("uproot")
    with uproot.recreate(path) as file:
        types = {name: getattr(values, "dtype", None) or values.type for name, values in columns.items()}
        file.mktree(tree, types).extend(columns)


def write_root(path, size=SIZE, seed=0, drop=(), change=None, tree="tree"):
    """A file with the branches of JetClass; returns lengths, momenta and the jet columns."""
    ak = pytest.importorskip("awkward")
    rng = np.random.default_rng(seed)
    lengths, momenta = make_jets(size, seed)
    particles = dict(zip((name.removeprefix("part_") for name in REQUIRED_COLUMNS), momenta.T, strict=True))
    jets = {}
    for name, feature in JETS_FEATURES.items():
        if name in REQUIRED_COLUMNS:
            continue
        if name.startswith("part_"):
            kind = feature.feature.dtype
            particles[name.removeprefix("part_")] = rng.integers(0, 2, lengths.sum()).astype(kind)
        elif name.startswith("label_"):
            jets[name] = np.array([row % 10 == LABEL_COLUMNS.index(name) for row in range(size)]).astype(feature.dtype)
        else:
            jets[name] = rng.uniform(1, 2, size).astype(feature.dtype)
    if change:
        change(particles, jets)
    part = ak.zip({name: ak.unflatten(v, lengths) for name, v in particles.items() if f"part_{name}" not in drop})
    write_tree(path, {"part": part, **{name: values for name, values in jets.items() if name not in drop}}, tree)
    return lengths, momenta, jets


def jetclass(paths, output, **options):
    return convert_files(paths, output, describe_jetclass, read_jetclass, **options)


def test_jetclass(tmp_path):
    lengths, momenta, jets = write_root(tmp_path / "a.root")
    more, more_momenta, _ = write_root(tmp_path / "b.root", size=5, seed=1)
    lines = []
    jetclass([tmp_path / "a.root", tmp_path / "b.root"], tmp_path / "out", rows_per_shard=6, report=lines.append)
    data = converted(tmp_path / "out")
    assert data.features == JETS_FEATURES and len(data) == SIZE + 5
    assert len(list((tmp_path / "out").glob("train-*.parquet"))) == 3
    assert_momenta(data, np.concatenate([lengths, more]), np.concatenate([momenta, more_momenta]))
    for name, values in jets.items():
        assert np.array_equal(np.array(data[name])[:SIZE], values), name
    assert f"{SIZE} jets, {lengths.sum()} constituents" in lines[0] and "not converted: npart" in lines[0]


def test_jetclass_blocks_join_without_seams(tmp_path):
    write_root(tmp_path / "a.root", size=23)
    whole = next(read_jetclass(tmp_path / "a.root"))
    blocks = list(read_jetclass(tmp_path / "a.root", block_jets=5))
    assert [len(block.lengths) for block in blocks] == [5, 5, 5, 5, 3]
    for name, values in whole.particles.items():
        assert np.array_equal(np.concatenate([block.particles[name] for block in blocks]), values), name
    for name, values in whole.jets.items():
        assert np.array_equal(np.concatenate([block.jets[name] for block in blocks]), values), name


def test_jetclass_with_four_momenta_alone(tmp_path):
    drop = [name for name in JETS_FEATURES if name not in REQUIRED_COLUMNS]
    lengths, momenta, _ = write_root(tmp_path / "a.root", drop=drop)
    jetclass([tmp_path / "a.root"], tmp_path / "out")
    data = converted(tmp_path / "out")
    assert data.column_names == list(REQUIRED_COLUMNS)
    assert_momenta(data, lengths, momenta)


def test_jetclass_command_line(tmp_path, capsys):
    write_root(tmp_path / "a.root", tree="jets")
    arguments = [str(tmp_path / "a.root"), "--output", str(tmp_path / "out"), "--split", "validation"]
    assert convert_jetclass.main(arguments) == 2
    assert "TTree tree is missing; the file holds jets" in capsys.readouterr().err
    assert convert_jetclass.main([*arguments, "--tree", "jets"]) == 0
    assert "1 file(s)" in capsys.readouterr().out
    assert len(converted(tmp_path / "out", "validation")) == SIZE


def set_value(name, row, value):
    def change(particles, jets):
        target = particles if name in particles else jets
        target[name] = target[name].copy()
        target[name][row] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_value("px", 0, np.nan), "jet 0, constituent 0: part_px = nan, expected a finite momentum in GeV"),
        (set_value("pz", -1, np.inf), f"jet {SIZE - 1}, constituent .*: part_pz = inf"),
        (set_value("energy", 1, -2.0), "jet 0, constituent 1: part_energy = -2, expected an energy of at least 0"),
        (set_value("label_QCD", 3, 1.0), "jet 3: labels .* expected one 1 and nine 0"),
        (set_value("label_Tbl", 9 % SIZE, 7), "jet 1: labels"),
        (set_value("label_QCD", 0, np.nan), "jet 0: labels"),
    ],
)
def test_hostile_jetclass_values(tmp_path, change, message):
    write_root(tmp_path / "a.root", change=change)
    # Impossible values are no damage: they are an error with skip_corrupt too.
    for skip in (False, True):
        with pytest.raises(ValueError, match=f"a.root: {message}"):
            jetclass([tmp_path / "a.root"], tmp_path / "out", skip_corrupt=skip)
    assert not (tmp_path / "out").exists()


def test_values_that_are_not_finite_elsewhere_are_kept_and_counted(tmp_path):
    write_root(tmp_path / "a.root", change=set_value("d0val", 0, np.nan))
    lines = []
    jetclass([tmp_path / "a.root"], tmp_path / "out", report=lines.append)
    assert "1 values that are not finite, kept" in lines[0]
    assert np.isnan(converted(tmp_path / "out")["part_d0val"][0][0])


def test_hostile_jetclass_branches(tmp_path):
    write_root(tmp_path / "a.root", drop=["part_py"])
    with pytest.raises(ValueError, match="branch part_py is missing"):
        jetclass([tmp_path / "a.root"], tmp_path / "out")
    write_root(tmp_path / "b.root", drop=["jet_tau1"])
    write_root(tmp_path / "c.root")
    with pytest.raises(ValueError, match="c.root: has column jet_tau1, unlike .*b.root"):
        jetclass([tmp_path / "b.root", tmp_path / "c.root"], tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("part_pz", [[1.0], [3.0]], "jet 0: part_pz has 1 constituents, part_px has 2; expected equal"),
        ("part_pz", [1.0, 3.0], "branch part_pz must hold a list of numbers per jet"),
        ("jet_pt", [[1.0, 2.0], [3.0]], "branch jet_pt must hold one number per jet"),
    ],
)
def test_hostile_jetclass_shapes(tmp_path, name, values, message):
    ak = pytest.importorskip("awkward")
    columns = dict.fromkeys(REQUIRED_COLUMNS, ak.Array([[1.0, 2.0], [3.0]]))
    write_tree(tmp_path / "a.root", columns | {name: ak.Array(values) if np.ndim(values[0]) else np.array(values)})
    with pytest.raises(ValueError, match=message):
        jetclass([tmp_path / "a.root"], tmp_path / "out")


def test_hostile_truncated_root_files(tmp_path):
    lengths, _, _ = write_root(tmp_path / "good.root")
    content = (tmp_path / "good.root").read_bytes()
    bad = tmp_path / "bad.root"
    for size in (0, 3, 100, len(content) // 2, len(content) - 400):
        bad.write_bytes(content[:size])
        with pytest.raises(UnreadableFileError, match="bad.root: not a readable ROOT file, truncated or damaged"):
            jetclass([bad], tmp_path / "out")
    lines = []
    jetclass([bad, tmp_path / "good.root"], tmp_path / "out", skip_corrupt=True, report=lines.append)
    assert lines[0].startswith(f"skipped: {bad}: not a readable ROOT file") and lines[-1] == "1 of 2 files skipped"
    assert len(converted(tmp_path / "out")) == len(lengths)
    with pytest.raises(ValueError, match="none of the files could be read"):
        jetclass([bad], tmp_path / "none", skip_corrupt=True)
    with pytest.raises(ValueError, match="missing.root: no such file"):
        jetclass([tmp_path / "missing.root"], tmp_path / "none", skip_corrupt=True)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("seed", range(25))
def test_hostile_root_bytes(tmp_path, seed):
    write_root(tmp_path / "a.root")
    content = bytearray((tmp_path / "a.root").read_bytes())
    rng = np.random.default_rng(seed)
    start = int(rng.integers(0, len(content) - 64))
    content[start : start + 64] = rng.integers(0, 256, 64, dtype=np.uint8).tobytes()
    (tmp_path / "a.root").write_bytes(content)
    # Damage in unused bytes can go unnoticed; anything else must be one clear error.
    try:
        jetclass([tmp_path / "a.root"], tmp_path / "out")
    except ValueError as error:
        assert "a.root" in str(error) and "\n" not in str(error)
        assert not (tmp_path / "out").exists()


def test_missing_uproot_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uproot", None)
    assert convert_jetclass.main([str(tmp_path / "a.root"), "--output", str(tmp_path / "out")]) == 2
    assert 'pip install "hepzoo[data]"' in capsys.readouterr().err


# AspenOpenJets


def write_aspen(path, size=SIZE, change=None, drop=()):
    lengths, momenta = make_jets(size, lowest=1)
    rng = np.random.default_rng(4)
    total = lengths.sum()
    rest = np.zeros((total, 7), np.float32)
    rest[:, :4] = rng.normal(0, 0.1, (total, 4))
    rest[:, 5] = np.resize([211, -211, 130, 22, -11, 13, 1, 2, 0], total)
    rest[:, 4] = np.isin(rest[:, 5], (211, 13)).astype(int) - np.isin(rest[:, 5], (-211, 11))
    rest[:, 6] = rng.uniform(0, 1, total)
    data = {
        "PFCands": padded(lengths, np.concatenate([momenta, rest], axis=1)),
        "jet_kinematics": rng.uniform(0, 2, (size, 4)).astype(np.float32),
        "jet_tagging": rng.uniform(0, 1, (size, 13)).astype(np.float32),
        "event_info": rng.integers(1, 2**31, (size, 3)),
    }
    data["jet_tagging"][:, 0] = lengths
    data["jet_tagging"][0, 0] += 3
    if change:
        change(data)
    with h5py.File(path, "w") as file:
        for name, values in data.items():
            if name not in drop:
                file[name] = values
    return lengths, momenta, rest, data


def aspen(paths, output, **options):
    return convert_files(paths, output, describe_aspenopenjets, read_aspenopenjets, **options)


def test_aspenopenjets(tmp_path):
    lengths, momenta, rest, raw = write_aspen(tmp_path / "a.h5")
    lines = []
    aspen([tmp_path / "a.h5"], tmp_path / "out", report=lines.append)
    data = converted(tmp_path / "out")
    assert data.features == ASPEN_FEATURES and not set(LABEL_COLUMNS) & set(data.column_names)
    assert_momenta(data, lengths, momenta)
    assert len(CANDIDATE_COLUMNS) == 11 and len(TAGGING_COLUMNS) == 13
    assert np.allclose(np.concatenate(data["part_d0val"]), rest[:, 0] * 10)  # cm -> mm
    assert np.array_equal(np.concatenate(data["part_pdgId"]), rest[:, 5].astype(int))
    assert np.array_equal(np.concatenate(data["part_puppi_weight"]), rest[:, 6])
    flags = np.stack([np.concatenate(data[name]) for name in PARTICLE_FLAGS], axis=1)
    expected = {211: 0, -211: 0, 130: 1, 22: 2, -11: 3, 13: 4, 1: 1, 2: 2}
    for code, row in zip(rest[:, 5].astype(int), flags, strict=True):
        assert row.tolist() == [int(expected.get(code) == index) for index in range(5)]
    for index, name in enumerate(KINEMATIC_COLUMNS):
        assert np.array_equal(np.array(data[name]), raw["jet_kinematics"][:, index])
    assert np.array_equal(np.array(data["event"]), raw["event_info"][:, 2])
    assert np.array_equal(np.array(data["jet_tau4"]), raw["jet_tagging"][:, 4])
    assert np.array_equal(np.array(data["jet_particleNet_mass"]), raw["jet_tagging"][:, 12])
    assert "1 jets with more constituents than stored" in lines[0]
    assert f"{(rest[:, 5] == 0).sum()} constituents of unknown type" in lines[0]
    # Angles are those to the stored axis.
    eta = np.arcsinh(momenta[:, 2] / np.hypot(momenta[:, 0], momenta[:, 1]))
    axis = np.repeat(raw["jet_kinematics"][:, 1], lengths)
    assert np.allclose(np.concatenate(data["part_deta"]), eta - axis, atol=1e-5)


def test_aspenopenjets_unit_and_command_line(tmp_path, capsys):
    _, _, rest, _ = write_aspen(tmp_path / "a.h5")
    arguments = [str(tmp_path / "a.h5"), "--output", str(tmp_path / "out")]
    assert convert_aspenopenjets.main([*arguments, "--length_unit", "mm"]) == 0
    assert np.allclose(np.concatenate(converted(tmp_path / "out")["part_d0val"]), rest[:, 0])
    assert convert_aspenopenjets.main(arguments) == 2
    assert "already holds split" in capsys.readouterr().err
    with pytest.raises(ValueError, match="length_unit must be cm or mm"):
        next(read_aspenopenjets(tmp_path / "a.h5", length_unit="m"))


def set_entry(name, place, value):
    def change(data):
        data[name][place] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_entry("PFCands", (2, 0, 1), np.nan), "jet 2, constituent 0: part_py = nan"),
        (set_entry("PFCands", (1, 0, 3), -1.0), "jet 1, constituent 0: part_energy = -1"),
        (set_entry("PFCands", (3, 14, 0), 5.0), "jet 3, place 14: energy = 0 with momentum .5.0, 0.0, 0.0."),
        (set_entry("PFCands", (0, 0, 9), 22.5), "column part_pdgId: 22.5 does not fit int32"),
        (lambda data: data.update(jet_tagging=data["jet_tagging"][:, :12]), "jet_tagging must be numbers .N, 13."),
        (lambda data: data.update(PFCands=data["PFCands"][..., :10]), "PFCands must be numbers .N, P, 11."),
        (lambda data: data.update(event_info=data["event_info"][:-1]), "event_info has shape .* expected 8 rows"),
    ],
)
def test_hostile_aspenopenjets(tmp_path, change, message):
    write_aspen(tmp_path / "a.h5", change=change)
    with pytest.raises(ValueError, match=f"a.h5: {message}"):
        aspen([tmp_path / "a.h5"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_hostile_hdf5_files(tmp_path):
    write_aspen(tmp_path / "good.h5")
    content = (tmp_path / "good.h5").read_bytes()
    bad = tmp_path / "bad.h5"
    for size in (0, 50, len(content) // 2):
        bad.write_bytes(content[:size])
        with pytest.raises(UnreadableFileError, match="bad.h5: not a readable HDF5 file, truncated or damaged"):
            aspen([bad], tmp_path / "out")
    lines = []
    aspen([tmp_path / "good.h5", bad], tmp_path / "out", skip_corrupt=True, report=lines.append)
    assert lines[0].startswith("skipped: ") and lines[-1] == "1 of 2 files skipped"
    write_aspen(tmp_path / "part.h5", drop=["jet_tagging"])
    with pytest.raises(ValueError, match="dataset jet_tagging is missing; the file holds PFCands, event_info"):
        aspen([tmp_path / "part.h5"], tmp_path / "out2")
    with h5py.File(tmp_path / "part.h5", "a") as file:
        file["jet_tagging"] = h5py.ExternalLink("good.h5", "jet_tagging")
    with pytest.raises(ValueError, match="jet_tagging takes its values from other files"):
        aspen([tmp_path / "part.h5"], tmp_path / "out2")


def test_hostile_damage_in_the_middle(tmp_path):
    """Chunks with a checksum: the jets in front of the damaged one are kept on request, and only then."""
    size = 12000
    write_aspen(tmp_path / "good.h5", size=size)
    with h5py.File(tmp_path / "good.h5") as file, h5py.File(tmp_path / "bad.h5", "w") as out:
        for name in ("jet_kinematics", "jet_tagging", "event_info"):
            out[name] = file[name][...]
        candidates = out.create_dataset("PFCands", data=file["PFCands"][...], chunks=(1000, 15, 11), fletcher32=True)
        offset = candidates.id.get_chunk_info(11).byte_offset
    with open(tmp_path / "bad.h5", "r+b") as raw:
        raw.seek(offset + 100)
        raw.write(b"\x55" * 64)
    with pytest.raises(UnreadableFileError, match="bad.h5"):
        aspen([tmp_path / "bad.h5"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Top tagging


def frame_columns(places):
    return [f"{name}_{i}" for i in range(places) for name in ("E", "PX", "PY", "PZ")]


def write_frame(path, layout, lengths, momenta, signal, places=15, names=None, extra=True):
    """What pandas writes with format="table" or "fixed", of a frame of the reference data."""
    names = frame_columns(places) if names is None else names
    floats = padded(lengths, momenta[:, [3, 0, 1, 2]], places).reshape(len(lengths), -1)
    if extra:
        names = [*names, "truthE", "truthPX", "truthPY", "truthPZ"]
        truth = np.tile(np.float32([700, 300, 400, 100]), (len(lengths), 1)) * np.asarray(signal)[:, None]
        floats = np.concatenate([floats, truth], axis=1, dtype=np.float32)
    integers = np.stack([np.full(len(lengths), 2), signal], axis=1)
    blocks = ((names, floats), (["ttv", "is_signal_new"], integers))
    with h5py.File(path, "w") as file:
        group = file.create_group("table")
        if layout == "table":
            kinds = [("index", "i8")]
            kinds += [(f"values_block_{k}", v.dtype, (v.shape[1],)) for k, (_, v) in enumerate(blocks)]
            rows = np.zeros(len(lengths), dtype=kinds)
            for k, (_, values) in enumerate(blocks):
                rows[f"values_block_{k}"] = values
            table = group.create_dataset("table", data=rows, compression="gzip", chunks=(4,))
            for k, (columns, _) in enumerate(blocks):
                table.attrs[f"values_block_{k}_kind"] = np.bytes_(pickle.dumps(columns, protocol=0))
            table.attrs["index_kind"] = np.bytes_(b"integer")
        else:
            group.attrs["nblocks"] = 2
            for k, (columns, values) in enumerate(blocks):
                group[f"block{k}_items"] = np.array(columns, dtype="S")
                group[f"block{k}_values"] = values


def toptagging(paths, output, **options):
    return convert_files(paths, output, describe_jets, read_jets, **options)


@pytest.mark.parametrize("layout", ["table", "fixed"])
def test_toptagging(tmp_path, layout):
    lengths, momenta = make_jets()
    signal = np.arange(SIZE) % 2
    write_frame(tmp_path / "a.h5", layout, lengths, momenta, signal)
    toptagging([tmp_path / "a.h5"], tmp_path / "out")
    data = converted(tmp_path / "out")
    assert_momenta(data, lengths, momenta)
    labels = np.stack([np.array(data[name]).astype(int) for name in LABEL_COLUMNS], axis=1)
    assert labels.sum(axis=1).tolist() == [1] * SIZE
    assert np.array_equal(labels[:, LABEL_COLUMNS.index("label_Tbqq")], signal)
    total = total_momentum(lengths, momenta)
    assert np.allclose(data["jet_pt"], np.hypot(total[:, 0], total[:, 1]), rtol=1e-6)
    assert np.allclose(data["jet_energy"], total[:, 3], rtol=1e-6)
    assert np.array_equal(np.array(data["jet_nparticles"]), lengths)
    assert np.array_equal(np.array(data["aux_genpart_pt"]), 500.0 * signal)
    assert set(np.array(data["ttv"])) == {2}


def test_toptagging_without_truth_and_with_an_empty_jet(tmp_path):
    lengths, momenta = make_jets()
    momenta, lengths[3] = np.delete(momenta, np.s_[lengths[:3].sum() : lengths[:4].sum()], axis=0), 0
    write_frame(tmp_path / "a.h5", "fixed", lengths, momenta, np.zeros(SIZE, int), extra=False)
    lines = []
    toptagging([tmp_path / "a.h5"], tmp_path / "out", report=lines.append)
    data = converted(tmp_path / "out")
    assert "aux_genpart_pt" not in data.column_names and "1 jets without a constituent" in lines[0]
    assert len(data[3]["part_px"]) == 0 and data[3]["jet_pt"] == 0


def test_hostile_toptagging_values(tmp_path):
    lengths, momenta = make_jets()
    signal = np.arange(SIZE) % 2
    signal[5] = 3
    write_frame(tmp_path / "a.h5", "table", lengths, momenta, signal, extra=False)
    with pytest.raises(ValueError, match="a.h5: jet 5: is_signal_new = 3, expected 0 or 1"):
        toptagging([tmp_path / "a.h5"], tmp_path / "out")
    momenta[0, 3] = np.nan
    write_frame(tmp_path / "a.h5", "table", lengths, momenta, signal % 2)
    with pytest.raises(ValueError, match="jet 0, constituent 0: part_energy = nan"):
        toptagging([tmp_path / "a.h5"], tmp_path / "out")


def test_hostile_toptagging_columns(tmp_path):
    lengths, momenta = make_jets()
    signal = np.zeros(SIZE, int)
    names = [name.replace("PY_3", "PY_x") for name in frame_columns(15)]
    write_frame(tmp_path / "a.h5", "table", lengths, momenta, signal, names=names)
    with pytest.raises(ValueError, match="column PY_3 is missing"):
        toptagging([tmp_path / "a.h5"], tmp_path / "out")
    write_frame(tmp_path / "a.h5", "table", lengths, momenta, signal, names=frame_columns(14))
    with pytest.raises(ValueError, match="for 60 columns"):
        toptagging([tmp_path / "a.h5"], tmp_path / "out")
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file.create_group("table")
    with pytest.raises(ValueError, match="table is not a DataFrame that pandas wrote"):
        toptagging([tmp_path / "b.h5"], tmp_path / "out")
    with h5py.File(tmp_path / "c.h5", "w") as file:
        file["jets"] = np.zeros(3)
    with pytest.raises(ValueError, match="pandas table under the key table, or particle_features; found jets"):
        toptagging([tmp_path / "c.h5"], tmp_path / "out")


class _Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (open, (str(self.marker), "w"))


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_hostile_pickled_column_names_are_not_executed(tmp_path, protocol):
    lengths, momenta = make_jets()
    write_frame(tmp_path / "a.h5", "table", lengths, momenta, np.zeros(SIZE, int))
    with h5py.File(tmp_path / "a.h5", "a") as file:
        content = pickle.dumps([_Evil(tmp_path / "executed")], protocol=protocol)
        file["table/table"].attrs["values_block_0_kind"] = np.void(content)
    with pytest.raises(ValueError, match="column names must be a pickled list of strings"):
        toptagging([tmp_path / "a.h5"], tmp_path / "out")
    assert not (tmp_path / "executed").exists()


def test_unknown_compression_is_named(tmp_path, monkeypatch):
    lengths, momenta = make_jets()
    write_frame(tmp_path / "a.h5", "table", lengths, momenta, np.zeros(SIZE, int))
    monkeypatch.setattr(h5py.h5z, "filter_avail", lambda code: False)
    monkeypatch.setitem(sys.modules, "hdf5plugin", None)
    with pytest.raises(ValueError, match="compressed by HDF5 filter .*pip install hdf5plugin"):
        toptagging([tmp_path / "a.h5"], tmp_path / "out")


# JetNet


def write_jetnet(path, change=None, mask=True):
    rng = np.random.default_rng(5)
    lengths = rng.integers(2, 9, SIZE)
    values = rng.uniform(-0.3, 0.3, (lengths.sum(), 4)).astype(np.float32)
    values[:, 2], values[:, 3] = np.abs(values[:, 2]) + 1e-3, 1
    particles = padded(lengths, values, 10)
    jets = np.stack([rng.uniform(800, 1200, SIZE), rng.normal(0, 1, SIZE), rng.uniform(20, 200, SIZE), lengths], axis=1)
    data = {"particle_features": particles if mask else particles[..., :3], "jet_features": jets.astype(np.float32)}
    if change:
        change(data)
    with h5py.File(path, "w") as file:
        for name, content in data.items():
            file[name] = content
    return lengths, values, data["jet_features"]


@pytest.mark.parametrize("mask", [True, False])
def test_jetnet(tmp_path, mask):
    lengths, values, jets = write_jetnet(tmp_path / "t.hdf5", mask=mask)
    lines = []
    toptagging([tmp_path / "t.hdf5"], tmp_path / "out", report=lines.append)
    data = converted(tmp_path / "out")
    jet = np.repeat(np.arange(SIZE), lengths)
    px, py, pz, energy = (np.concatenate(data[name]).astype(float) for name in REQUIRED_COLUMNS)
    pt = np.hypot(px, py)
    assert np.allclose(pt / jets[jet, 0], values[:, 2], rtol=1e-5)
    assert np.allclose(np.arcsinh(pz / pt) - jets[jet, 1], values[:, 0], atol=1e-5)
    assert np.allclose(np.arctan2(py, px), values[:, 1], atol=1e-6)
    assert np.allclose(energy**2, pt**2 + pz**2, rtol=1e-5)
    assert np.allclose(np.concatenate(data["part_dphi"]), values[:, 1], atol=1e-5)
    assert np.all(np.array(data["label_Tbqq"]) == 1) and set(data["jet_type"]) == {"t"}
    assert np.allclose(data["jet_mass"], jets[:, 2]) and np.allclose(data["jet_nparticles"], lengths)
    assert "another number" not in lines[0]


def test_jetnet_types(tmp_path, capsys):
    assert [jetnet_type(name) for name in ("g.hdf5", "data/q30.hdf5", "W150.h5")] == ["g", "q", "w"]
    write_jetnet(tmp_path / "tops.hdf5", change=set_entry("jet_features", (0, 3), 99))
    arguments = [str(tmp_path / "tops.hdf5"), "--output", str(tmp_path / "out")]
    assert convert_toptagging.main(arguments) == 2
    assert "the name tells no jet type" in capsys.readouterr().err
    assert convert_toptagging.main([*arguments, "--jet_type", "g"]) == 0
    assert "1 jets with another number of particles than stored" in capsys.readouterr().out
    assert set(np.array(converted(tmp_path / "out")["label_QCD"])) == {1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_entry("particle_features", (1, 0, 3), 0.5), "jet 1, place 0: mask = 0.5, expected 0 or 1"),
        (set_entry("particle_features", (2, 1, 2), -0.1), "jet 2, place 1: ptrel = -0.1, expected at least 0"),
        (set_entry("particle_features", (2, 1, 2), np.nan), "jet 2, place 1: ptrel = nan"),
        (set_entry("particle_features", (3, 0, 0), np.nan), "jet 3, constituent 0: part_pz = nan"),
        (set_entry("jet_features", (4, 0), -5.0), "jet 4: pt = -5, expected a finite number of at least 0 GeV"),
        (set_entry("jet_features", (4, 1), np.inf), "jet 4: eta = inf, expected a finite number"),
        (lambda data: data.update(jet_features=data["jet_features"][:, :2]), "jet_features must be numbers .N, 4."),
        (lambda data: data.update(particle_features=np.zeros((SIZE, 3))), "particle_features must be numbers"),
    ],
)
def test_hostile_jetnet(tmp_path, change, message):
    write_jetnet(tmp_path / "z.hdf5", change=change)
    with pytest.raises(ValueError, match=f"z.hdf5: {message}"):
        toptagging([tmp_path / "z.hdf5"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "root"}, "layout must be auto or one of toptagging, jetnet"),
        ({"jet_type": "h"}, "jet_type must be one of g, q, t, w, z"),
        ({"layout": "toptagging"}, "no pandas table under the key table"),
    ],
)
def test_hostile_options(tmp_path, options, message):
    write_jetnet(tmp_path / "g.hdf5")
    with pytest.raises(ValueError, match=message):
        next(read_jets(tmp_path / "g.hdf5", Counter(), **options))
