"""Published shower files: reading of every layout, writing, conversion to Parquet, and malformed files."""

from collections import Counter

import numpy as np
import pytest
from datasets import load_dataset

from hepzoo.data_scripts import convert_showers, showers_hdf5
from hepzoo.data_scripts.convert_showers import convert_files
from hepzoo.data_scripts.hdf5_files import UnreadableFileError
from hepzoo.data_scripts.showers_hdf5 import (
    LAYOUTS,
    ReadOptions,
    count_showers,
    detect_layout,
    read_showers_hdf5,
    write_showers_hdf5,
)

h5py = pytest.importorskip("h5py")

HITS = ("x", "y", "z", "energy")
SIZE = 7


def make_showers(size=SIZE, seed=0):
    """Records with unique cells, ordered by layer, x, y (the order of a dense array); the third one is empty."""
    rng = np.random.default_rng(seed)
    showers = []
    for row in range(size):
        count = 0 if row == 2 else int(rng.integers(5, 30))
        cells = np.sort(rng.choice(27000, count, replace=False))
        z, x, y = np.unravel_index(cells, (30, 30, 30))
        energy = rng.uniform(0.2, 50, count).astype(np.float32)
        record = {"incident_energy": np.float32(10 + 5 * row), "x": x, "y": y, "z": z, "energy": energy}
        showers.append(record)
    return showers


def write_getting_high(path, showers):
    layers = np.zeros((len(showers), 30, 30, 30))
    for row, shower in enumerate(showers):
        layers[row, shower["z"], shower["x"], shower["y"]] = shower["energy"]
    with h5py.File(path, "w") as file:
        file["30x30/layers"] = layers
        file["30x30/energy"] = np.array([[shower["incident_energy"]] for shower in showers])


def write_events(path, showers, places=40):
    events = np.zeros((len(showers), 5, places), np.float32)
    for row, shower in enumerate(showers):
        count = len(shower["x"])
        for k, name in enumerate(("x", "z", "y", "energy")):
            events[row, k, places - count :] = shower[name]
    with h5py.File(path, "w") as file:
        file["events"] = events
        file["n_points"] = np.array([len(shower["x"]) for shower in showers])
        file["energy"] = np.array([[shower["incident_energy"]] for shower in showers])


def write_arrays(path, showers, places=40):
    with h5py.File(path, "w") as file:
        for name in HITS:
            values = np.zeros((len(showers), places), np.float32)
            for row, shower in enumerate(showers):
                values[row, : len(shower[name])] = shower[name]
            file[name] = values
        file["genE"] = np.array([shower["incident_energy"] for shower in showers])


WRITERS = {
    "getting_high": write_getting_high,
    "padded": lambda path, showers: write_showers_hdf5(path, showers, "padded", pad_length=40),
    "showerdata": lambda path, showers: write_showers_hdf5(path, showers, "showerdata"),
    "events": write_events,
    "arrays": write_arrays,
}


def read_all(path, layout="auto", options=None, counts=None):
    rows = []
    for columns in read_showers_hdf5(path, layout, options, counts):
        rows += [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return rows


def assert_equal_showers(found, expected, rtol=0.0):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert float(a["incident_energy"]) == float(b["incident_energy"])
        for name in "xyz":
            assert np.array_equal(a[name], b[name]), name
        assert np.allclose(a["energy"], b["energy"], rtol=rtol, atol=0)


# Reading and writing


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("block_bytes", [showers_hdf5.BLOCK_BYTES, 1])
def test_every_layout_gives_the_same_showers(tmp_path, monkeypatch, layout, block_bytes):
    monkeypatch.setattr(showers_hdf5, "BLOCK_BYTES", block_bytes)  # 1: one shower per block
    showers = make_showers()
    path = tmp_path / "showers.h5"
    WRITERS[layout](path, showers)
    assert detect_layout(path) == layout
    assert count_showers(path) == SIZE
    counts = Counter()
    found = read_all(path, counts=counts)
    # GeV and back costs one rounding.
    assert_equal_showers(found, showers, rtol=2e-7 if layout == "showerdata" else 0)
    assert found[0]["x"].dtype == np.int16 and found[0]["energy"].dtype == np.float32
    assert counts["showers"] == SIZE and counts["empty"] == 1
    assert counts["hits"] == sum(len(shower["x"]) for shower in showers)
    assert not counts["outside"] and not counts["duplicates"] and not counts["below_cut"]


def test_getting_high_axes_and_cut(tmp_path):
    layers = np.zeros((1, 30, 32, 28), np.float32)
    layers[0, 20, 31, 3] = 5.0
    layers[0, 2, 7, 27] = 0.05
    path = tmp_path / "dense.hdf5"
    with h5py.File(path, "w") as file:
        file["30x30/layers"], file["30x30/energy"] = layers, np.array([[50.0]])
    counts = Counter()
    (row,) = read_all(path, counts=counts)
    assert [row[name].tolist() for name in HITS] == [[31], [3], [20], [5.0]]
    assert counts["below_cut"] == 1
    (row,) = read_all(path, options=ReadOptions(cut=0.01))
    assert row["z"].tolist() == [2, 20]


def test_showerdata_layout(tmp_path):
    path = tmp_path / "showers.h5"
    record = {"incident_energy": 50.0, "x": [0, 15, 29], "y": [14, 15, 0], "z": [0, 3, 29], "energy": [1.0, 2.0, 4.0]}
    assert write_showers_hdf5(path, record) == 1
    with h5py.File(path) as file:
        assert file["shape"][...].tolist() == [1, 3, 4]
        points = file["showers"][0].reshape(-1, 4)
        assert points[:, 0].tolist() == [-72.5, 2.5, 72.5] and points[:, 1].tolist() == [-2.5, 2.5, -72.5]
        assert points[:, 2].tolist() == [0, 3, 29] and points[:, 3] == pytest.approx([1e-3, 2e-3, 4e-3])
        assert file["energies"].shape == (1, 1) and file["directions"][0].tolist() == [0, 0, 1]
        assert file["pdg"][...].tolist() == [22] and file["num_points"][...].tolist() == [3]
        assert [file[name].dtype.str[1:] for name in ("energies", "directions", "pdg")] == ["f4", "f4", "i4"]
        assert "showerdata_version" in file.attrs


def test_rows_of_equal_length_stay_variable_length(tmp_path):
    path = tmp_path / "equal.h5"
    record = {"incident_energy": 50.0, "x": [1, 2], "y": [3, 4], "z": [5, 6], "energy": [1.0, 2.0]}
    write_showers_hdf5(path, [record] * 4)
    assert [row["y"].tolist() for row in read_all(path)] == [[3, 4]] * 4
    write_showers_hdf5(tmp_path / "none.h5", [])
    assert read_all(tmp_path / "none.h5") == [] and count_showers(tmp_path / "none.h5") == 0


def test_own_cell_size_and_origin(tmp_path):
    path = tmp_path / "fine.h5"
    record = {"incident_energy": 50.0, "x": [0, 59], "y": [30, 29], "z": [0, 1], "energy": [1.0, 2.0]}
    write_showers_hdf5(path, record, cell_size=2.5, origin=(30, 30))
    (row,) = read_all(path, options=ReadOptions(grid=(60, 60, 30), cell_size=2.5))
    assert row["x"].tolist() == [0, 59] and row["y"].tolist() == [30, 29]
    (row,) = read_all(path, options=ReadOptions(cell_size=5.0))
    assert row["x"].tolist() == [0, 29] and row["y"].tolist() == [15, 14]


def test_five_columns_and_zero_energies(tmp_path):
    path = tmp_path / "time.h5"
    points = np.array([[2.5, -2.5, 4, 2e-3, 9.0], [0, 0, 5, 0.0, 9.0], [-0.1, 0, 6, 1e-3, 9.0]], np.float32)
    write_vlen(path, [points.reshape(-1)], [3], [1, 3, 5])
    (row,) = read_all(path)
    assert row["x"].tolist() == [15, 14] and row["y"].tolist() == [14, 15] and row["z"].tolist() == [4, 6]


def test_duplicates_are_counted_and_merged_on_request(tmp_path):
    path = tmp_path / "twice.h5"
    record = {"incident_energy": 50.0, "x": [4, 1, 4], "y": [5, 1, 5], "z": [6, 1, 6], "energy": [1.0, 8.0, 2.0]}
    write_showers_hdf5(path, [record, record], "padded")
    counts = Counter()
    assert [row["energy"].tolist() for row in read_all(path, counts=counts)] == [[1, 8, 2]] * 2
    assert counts["duplicates"] == 2
    counts = Counter()
    for row in read_all(path, options=ReadOptions(merge_duplicates=True), counts=counts):
        assert row["x"].tolist() == [4, 1] and row["energy"].tolist() == [3, 8]
    assert counts["duplicates"] == 2 and counts["hits"] == 4


def test_hits_outside_are_dropped_on_request(tmp_path):
    path = tmp_path / "wide.h5"
    record = {"incident_energy": 50.0, "x": [4, 31], "y": [5, 1], "z": [6, 1], "energy": [1.0, 8.0]}
    write_showers_hdf5(path, record)
    with pytest.raises(ValueError, match=r"shower 0, hit 1: x = 82.5, expected a place in -75..75 mm"):
        read_all(path)
    counts = Counter()
    (row,) = read_all(path, options=ReadOptions(drop_outside=True), counts=counts)
    assert row["x"].tolist() == [4] and counts["outside"] == 1


def test_incident_energy_for_files_without(tmp_path):
    path = tmp_path / "omnijet.h5"
    with h5py.File(path, "w") as file:
        file["showers"] = np.array([[[1, 2, 3, 4.0], [0, 0, 0, 0]]], np.float32)
    with pytest.raises(ValueError, match="no incident energies .* --incident_energy"):
        read_all(path)
    (row,) = read_all(path, options=ReadOptions(incident_energy=50.0))
    assert row["incident_energy"] == 50 and row["energy"].tolist() == [4]


def test_writing_replaces_only_on_request(tmp_path):
    path = tmp_path / "new" / "showers.h5"
    write_showers_hdf5(path, make_showers())
    before = path.read_bytes()
    with pytest.raises(ValueError, match="exists already"):
        write_showers_hdf5(path, make_showers(seed=1))
    assert path.read_bytes() == before
    write_showers_hdf5(path, make_showers(seed=1), overwrite=True)
    assert_equal_showers(read_all(path), make_showers(seed=1), rtol=2e-7)
    assert [p.name for p in path.parent.iterdir()] == ["showers.h5"]


# Conversion


def test_command_line_converts_files_of_any_layout(tmp_path, capsys):
    paths = []
    for layout, writer in WRITERS.items():
        paths.append(str(tmp_path / f"{layout}.h5"))
        writer(paths[-1], make_showers(seed=len(paths)))
    output = tmp_path / "out"
    arguments = [*paths, "--output", str(output), "--split", "val", "--rows_per_shard", "10"]
    assert convert_showers.main(arguments) == 0
    report = capsys.readouterr().out
    assert report.count(f"{SIZE} showers") == 5 and "layout getting_high" in report and "4 file(s)" in report
    rows = list(load_dataset("parquet", data_files=str(output / "val-*.parquet"), streaming=True)["train"])
    expected = [shower for seed in range(1, 6) for shower in make_showers(seed=seed)]
    assert_equal_showers(rows, expected, rtol=2e-7)
    assert convert_showers.main(arguments) == 2  # never over an existing split


def test_skip_corrupt(tmp_path):
    good, bad = tmp_path / "good.h5", tmp_path / "bad.h5"
    write_showers_hdf5(good, make_showers(), "padded")
    bad.write_bytes(good.read_bytes()[:900])
    with pytest.raises(UnreadableFileError, match="bad.h5: not a readable HDF5 file"):
        convert_files([good, bad], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    lines = []
    convert_files([bad, good], tmp_path / "out", skip_corrupt=True, report=lines.append)
    assert "skipped" in lines[0] and "bad.h5" in lines[0] and lines[-1] == "1 of 2 files skipped"
    assert len(load_dataset("parquet", data_files=str(tmp_path / "out" / "*.parquet"))["train"]) == SIZE
    with pytest.raises(ValueError, match="none of the files could be read"):
        convert_files([bad], tmp_path / "none", skip_corrupt=True)
    assert not (tmp_path / "none").exists()


# Malformed input


def write_vlen(path, rows, num_points, shape, energies=None):
    with h5py.File(path, "w") as file:
        showers = file.create_dataset("showers", (len(rows),), dtype=h5py.vlen_dtype(np.float32))
        for index, row in enumerate(rows):
            showers[index] = row
        file["energies"] = np.full((len(rows), 1), 50.0) if energies is None else energies
        file["num_points"], file["shape"] = np.array(num_points), np.array(shape)


def hostile_padded(path, change=None, showers=None, energies=(50.0, 60.0), name="incident_energies"):
    points = np.zeros((2, 4, 4), np.float32)
    points[:, :2] = [[1, 2, 3, 4.0], [5, 6, 7, 8.0]]
    for place, value in (change or {}).items():
        points[place] = value
    with h5py.File(path, "w") as file:
        file["showers"] = points if showers is None else showers
        file[name] = np.asarray(energies)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"change": {(1, 1, 3): -1.0}}, "shower 1, hit 1: energy = -1, expected an energy in MeV of at least 0"),
        ({"change": {(1, 0, 3): np.nan}}, "shower 1, hit 0: energy = nan"),
        ({"change": {(0, 1, 3): np.inf}}, "shower 0, hit 1: energy = inf"),
        ({"change": {(0, 1, 0): 30}}, "shower 0, hit 1: x = 30, expected an integer in 0..29"),
        ({"change": {(0, 1, 1): -1}}, "hit 1: y = -1, expected an integer in 0..29"),
        ({"change": {(0, 1, 2): 1.5}}, "hit 1: z = 1.5, expected an integer"),
        ({"change": {(0, 1, 2): np.nan}}, "hit 1: z = nan, expected an integer"),
        ({"change": {(0, 1, 0): 1e30}}, "x = 1e[+]30, expected an integer in 0..29"),
        ({"energies": (50.0, -1.0)}, "shower 1: incident energy = -1 GeV, expected a positive number"),
        ({"energies": (np.nan, 1.0)}, "shower 0: incident energy = nan GeV"),
        ({"energies": (50.0,)}, r"incident_energies has shape \(1,\); expected \(2,\) or \(2, 1\)"),
        ({"energies": (b"a", b"b")}, "incident_energies must be numbers"),
        ({"name": "energies"}, "no incident energies"),
        ({"showers": np.zeros((2, 4, 5))}, r"expected \(N, P, 4\)"),
        ({"showers": np.zeros((2, 4))}, "showers must be numbers in 3 dimensions"),
        ({"showers": np.zeros((2, 4, 4), complex)}, "showers must be numbers in 3 dimensions"),
        ({"showers": np.zeros((2, 4, 4), "S3")}, "showers must be numbers in 3 dimensions"),
    ],
)
def test_hostile_padded_files(tmp_path, arguments, message):
    path = tmp_path / "bad.h5"
    hostile_padded(path, **arguments)
    with pytest.raises(ValueError, match=message) as error:
        convert_files([path], tmp_path / "out")
    assert "bad.h5" in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("rows", "num_points", "shape", "message"),
    [
        ([np.ones(7)], [2], [1, 2, 4], "shower 0: 7 values, expected num_points = 2 times 4 columns"),
        ([np.ones(8)], [1], [1, 2, 4], "shower 0: 8 values, expected num_points = 1 times 4"),
        ([np.ones(8)], [2], [1, 2, 3], r"shape is \[1, 2, 3\]; expected \[1, P, 4 or 5\]"),
        ([np.ones(8)], [2], [2, 2, 4], r"shape is \[2, 2, 4\]"),
        ([np.ones(8)], [2], [1, -1, 4], r"shape is \[1, -1, 4\]"),
        ([np.ones(8)], [2], [1, 2], r"shape is \[1, 2\]"),
        ([np.ones(8)], [2, 2], [1, 2, 4], r"num_points has shape \(2,\); expected \(1,\)"),
        ([np.array([0, 0, 1, -1.0])], [1], [1, 1, 4], "energy = -1, expected an energy in GeV"),
        ([np.array([np.nan, 0, 1, 1.0])], [1], [1, 1, 4], "x = nan, expected a finite length in mm"),
        ([np.array([0, 0, 40, 1.0])], [1], [1, 1, 4], "z = 40, expected an integer in 0..29"),
    ],
)
def test_hostile_showerdata_files(tmp_path, rows, num_points, shape, message):
    path = tmp_path / "bad.h5"
    write_vlen(path, rows, num_points, shape)
    with pytest.raises(ValueError, match=message):
        read_all(path)


def test_hostile_getting_high_files(tmp_path):
    path = tmp_path / "bad.h5"
    showers = make_showers()
    for value, message in ((-2.0, "energy = -2"), (np.nan, "energy = nan")):
        write_getting_high(path, showers)
        with h5py.File(path, "a") as file:
            file["30x30/layers"][4, 3, 2, 1] = value
        with pytest.raises(ValueError, match=rf"shower 4, hit \d+ \(layer 3, x 2, y 1\): {message}"):
            read_all(path)
    with h5py.File(path, "w") as file:
        file["30x30/layers"], file["30x30/energy"] = np.zeros((2, 30, 30)), np.ones((2, 1))
    with pytest.raises(ValueError, match="layers must be numbers in 4 dimensions"):
        read_all(path)
    with h5py.File(path, "w") as file:
        for name in ("a", "b"):
            file[f"{name}/layers"], file[f"{name}/energy"] = np.zeros((2, 3, 3, 3)), np.ones(2)
    with pytest.raises(ValueError, match="no known shower layout"):
        read_all(path)
    with pytest.raises(ValueError, match="expected one group with energy and layers, found 2"):
        read_all(path, "getting_high")


def test_hostile_events_files(tmp_path):
    path = tmp_path / "bad.h5"
    for change, message in (
        (("events", (0, 3, 0), 1.0), "shower 0: a hit at place 0, expected hits in the last n_points"),
        (("n_points", 1, 41), "shower 1: n_points = 41, expected 0..40"),
        (("n_points", 1, -1), "shower 1: n_points = -1"),
    ):
        write_events(path, make_showers())
        with h5py.File(path, "a") as file:
            file[change[0]][change[1]] = change[2]
        with pytest.raises(ValueError, match=message):
            read_all(path)
    with h5py.File(path, "w") as file:
        file["events"] = np.zeros((2, 5, 3))
        file["energy"] = np.ones(2)
    with pytest.raises(ValueError, match="dataset n_points is missing"):
        read_all(path)


def test_hostile_separate_arrays(tmp_path):
    path = tmp_path / "bad.h5"
    with h5py.File(path, "w") as file:
        for name, places in zip(HITS, (3, 3, 4, 3), strict=True):
            file[name] = np.ones((2, places))
        file["genE"] = np.ones(2)
    with pytest.raises(ValueError, match=r"z has shape \(2, 4\), energy \(2, 3\); expected equal shapes"):
        read_all(path)


def test_hostile_damaged_files(tmp_path):
    """Cut or (padded) overwritten anywhere, a file gives showers or one ValueError."""
    good, bad = tmp_path / "good.h5", tmp_path / "bad.h5"
    rng = np.random.default_rng(0)
    for layout in ("showerdata", "padded"):
        write_showers_hdf5(good, make_showers(), layout, overwrite=True)
        content = good.read_bytes()
        damaged = [content[: int(length)] for length in np.linspace(0, len(content) - 1, 40)]
        # Overwritten lengths of variable-length data can keep the HDF5 library busy for a minute.
        for _ in range(60 if layout == "padded" else 0):
            values = bytearray(content)
            for place in rng.integers(0, len(values), 20):
                values[place] = rng.integers(256)
            damaged.append(bytes(values))
        for values in damaged:
            bad.write_bytes(values)
            try:
                read_all(bad)
            except ValueError as error:
                assert "\n" not in str(error) and "bad.h5" in str(error)


def test_hostile_files_that_are_not_hdf5(tmp_path):
    text = tmp_path / "text.h5"
    text.write_text("not HDF5")
    with pytest.raises(UnreadableFileError, match="text.h5: not a readable HDF5 file"):
        read_all(text)
    with pytest.raises(ValueError, match="nowhere.h5: no such file"):
        read_all(tmp_path / "nowhere.h5")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["weights"] = np.ones(3)
    with pytest.raises(ValueError, match="no known shower layout .* the file holds 'weights'"):
        read_all(tmp_path / "other.h5")


def test_hostile_links_and_foreign_data(tmp_path):
    other, path = tmp_path / "other.h5", tmp_path / "bad.h5"
    hostile_padded(other)
    with h5py.File(path, "w") as file:
        file["showers"] = h5py.ExternalLink("other.h5", "showers")
        file["incident_energies"] = np.ones(2)
    with pytest.raises(ValueError, match="showers takes its values from other files"):
        read_all(path)
    layout = h5py.VirtualLayout((2, 4, 4), np.float32)
    layout[:] = h5py.VirtualSource("nowhere.h5", "showers", (2, 4, 4))
    with h5py.File(path, "w") as file:
        file.create_virtual_dataset("showers", layout)
        file["incident_energies"] = np.ones(2)
    with pytest.raises(ValueError, match="showers takes its values from other files"):
        read_all(path)


def test_hostile_sizes(tmp_path):
    path = tmp_path / "huge.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("showers", (2, 10**9, 4), np.float32, chunks=(1, 1000, 4))
        file["incident_energies"] = np.ones(2)
    with pytest.raises(ValueError, match="one shower takes 15259 MiB; expected at most 256 MiB"):
        read_all(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": (30, 30)}, "grid must be three integers"),
        ({"grid": (30, 30, 10**6)}, "grid must be three integers NX,NY,NZ in 1..32767"),
        ({"cut": -1.0}, "cut must be an energy"),
        ({"cell_size": 0.0}, "cell_size must be a positive length"),
        ({"coordinates": "cm"}, "coordinates must be cells or mm"),
        ({"energy_unit": "keV"}, "energy_unit must be MeV or GeV"),
        ({"incident_energy": float("nan")}, "incident_energy must be a positive number of GeV, got nan"),
    ],
)
def test_hostile_options(options, message):
    with pytest.raises(ValueError, match=message):
        ReadOptions(**options)


def test_hostile_incident_energy_beside_those_of_the_file(tmp_path):
    hostile_padded(tmp_path / "full.h5")
    with pytest.raises(ValueError, match="holds incident energies .* is for files without them"):
        read_all(tmp_path / "full.h5", options=ReadOptions(incident_energy=50.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"energy": [1.0, -2.0]}, "row 0: energy = -2, expected a positive number"),
        ({"energy": [1.0, float("nan")]}, "row 0: energy = nan"),
        ({"energy": [1.0]}, "row 0: energy has 1 hits, x has 2"),
        ({"x": [1, 2.5]}, "row 0: x = 2.5, expected a cell index"),
        ({"z": [1, -1]}, "row 0: z = -1, expected a cell index"),
        ({"y": [[1, 2]]}, "row 0: y must be a flat list"),
        ({"y": ["a", "b"]}, "row 0: y must be numbers"),
        ({"incident_energy": 0.0}, "row 0: incident_energy = 0, expected a positive number"),
    ],
)
def test_hostile_rows_to_write(tmp_path, change, message):
    record = {"incident_energy": 50.0, "x": [1, 2], "y": [3, 4], "z": [5, 6], "energy": [1.0, 2.0]}
    path = tmp_path / "out.h5"
    with pytest.raises(ValueError, match=message):
        write_showers_hdf5(path, [{**record, **change}])
    assert not any(tmp_path.iterdir())


def test_hostile_writing(tmp_path):
    record = {"incident_energy": 50.0, "x": [1, 2], "y": [3, 4], "z": [5, 6], "energy": [1.0, 2.0]}
    with pytest.raises(ValueError, match="layout must be one of showerdata, padded, got 'root'"):
        write_showers_hdf5(tmp_path / "a.h5", record, "root")
    with pytest.raises(ValueError, match="row 0: 2 hits, expected at most pad_length = 1"):
        write_showers_hdf5(tmp_path / "a.h5", record, "padded", pad_length=1)
    with pytest.raises(ValueError, match="field energy is missing"):
        write_showers_hdf5(tmp_path / "a.h5", [{name: record[name] for name in record if name != "energy"}])
    assert not any(tmp_path.iterdir())
