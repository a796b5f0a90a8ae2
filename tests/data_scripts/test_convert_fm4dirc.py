import io
import os
import pickle
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from hepzoo.data_scripts import convert_fm4dirc
from hepzoo.data_scripts.convert_fm4dirc import (
    convert_files,
    convert_records,
    load_fm4dirc,
    main,
    species_from_name,
    write_fm4dirc_pickle,
)
from hepzoo.tokenization.geometry_dirc import DircGeometry


def make_records(count=5, seed=0, **changes):
    rng = np.random.default_rng(seed)
    records = []
    for _ in range(count):
        n = int(rng.integers(6, 40))
        records.append(
            {
                "P": float(rng.uniform(1, 10)),
                "Theta": float(rng.uniform(26, 159)),
                "Phi": 0.0,
                "NHits": n,
                "pmtID": rng.integers(0, 24, n),
                "pixelID": rng.integers(0, 256, n),
                "leadTime": rng.uniform(10, 150, n),
                "PDG": 211,
                **changes,
            }
        )
    return records


def dump(path, content, protocol=4):
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


def save_npy(path, records):
    with path.open("wb") as file:
        np.save(file, records, allow_pickle=True)
    return path


def assert_same_records(loaded, records):
    assert len(loaded) == len(records)
    for ours, original in zip(loaded, records, strict=True):
        assert ours.keys() == original.keys()
        for name, value in original.items():
            np.testing.assert_array_equal(ours[name], value)
            if isinstance(value, np.ndarray):
                assert ours[name].dtype == value.dtype.newbyteorder("=")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_load_reads_every_pickle_protocol(tmp_path, protocol):
    records = make_records()
    for record in records:
        record["P"] = np.float32(record["P"])
        record["leadTime"] = record["leadTime"].astype(">f4")
        record["pmtID"] = record["pmtID"].astype(np.int16)
    assert_same_records(load_fm4dirc(dump(tmp_path / "Pions.pkl", records, protocol)), records)


def test_load_reads_numpy_save(tmp_path):
    records = make_records()
    assert_same_records(load_fm4dirc(save_npy(tmp_path / "Pions.npy", records)), records)


def test_load_reads_module_names_of_numpy_1_and_2(tmp_path):
    records = make_records()
    content = pickle.dumps(records, protocol=2)
    new, old = b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"
    assert new in content or old in content
    for name, wanted in (("new", new), ("old", old)):
        path = tmp_path / f"Pions_{name}.pkl"
        path.write_bytes(content.replace(new, wanted).replace(old, wanted))
        assert_same_records(load_fm4dirc(path), records)


def test_load_keeps_fortran_order(tmp_path):
    matrix = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    path = dump(tmp_path / "x.pkl", [{"a": matrix}])
    np.testing.assert_array_equal(load_fm4dirc(path)[0]["a"], matrix)


def test_species_from_name():
    assert species_from_name("/data/Pions_train.pkl") == 211
    assert species_from_name("Kaons_6GeV.pkl") == 321
    assert species_from_name("/Pions/tracks.pkl") is None
    assert species_from_name("Pions_and_Kaons.pkl") is None


def test_convert_files(tmp_path, capsys):
    pions = make_records(7, seed=1)
    for record in pions:
        del record["PDG"]
    kaons = make_records(4, seed=2, PDG=-321)
    kaons[1]["leadTime"] = kaons[1]["leadTime"].copy()
    kaons[1]["leadTime"][3] = 158.0
    kaons[2]["PID"] = -321
    files = [dump(tmp_path / "Pions.pkl", pions), save_npy(tmp_path / "Kaons.npy", kaons)]
    output = tmp_path / "out"
    assert main([*map(str, files), "--output", str(output), "--rows_per_shard", "6"]) == 0
    text = capsys.readouterr().out
    assert "7 tracks read, 7 inside the fiducial cut, 7 written" in text
    assert "4 tracks read, 3 inside the fiducial cut, 4 written" in text
    table = pq.read_table(output).to_pydict()
    assert sorted(path.name for path in output.iterdir()) == [f"train-0000{i}-of-00002.parquet" for i in range(2)]
    assert table["PDG"] == [211] * 7 + [-321] * 4
    geometry = DircGeometry()
    for i, record in enumerate([*pions, *kaons]):
        np.testing.assert_array_equal(table["pmtID"][i], record["pmtID"])
        np.testing.assert_array_equal(table["channel"][i], record["pmtID"] * 256 + record["pixelID"])
        np.testing.assert_array_equal(np.float32(table["leadTime"][i]), record["leadTime"].astype(np.float32))
        np.testing.assert_array_equal(
            np.float32(table["x"][i]),
            geometry.pixel_center(record["pmtID"], record["pixelID"])[0].astype(np.float32),
        )

    cut = tmp_path / "cut"
    assert main([*map(str, files), "--output", str(cut), "--fiducial-cut"]) == 0
    assert pq.read_table(cut).num_rows == 10


def test_generated_records_with_pid_are_read():
    records = make_records(2)
    for record in records:
        record["PID"] = record.pop("PDG")
    records[1]["PID"] = -1
    assert convert_records(records, default_pdg=321)["PDG"] == [211, 321]


def test_drop_invalid_counts_reasons(tmp_path):
    records = make_records(6)
    records[1]["NHits"] += 1
    records[3]["pmtID"] = records[3]["pmtID"] + 24
    records[4]["leadTime"] = records[4]["leadTime"][:-1]
    reasons = Counter()
    columns = convert_records(records, on_invalid="drop", reasons=reasons)
    assert len(columns["P"]) == 3
    assert reasons == {"NHits": 1, "pmtID": 1, "unequal_lengths": 1}
    lines = []
    convert_files([dump(tmp_path / "Pions.pkl", records)], tmp_path / "out", on_invalid="drop", report=lines.append)
    assert "3 written" in lines[0] and "NHits 1" in lines[0] and "pmtID 1" in lines[0]


def test_unknown_fields_are_reported(tmp_path):
    lines = []
    convert_files([dump(tmp_path / "Pions.pkl", make_records(2, extra=1.0))], tmp_path / "out", report=lines.append)
    assert "extra (2 tracks)" in lines[-1]


def test_pickle_output_round_trip(tmp_path):
    records = make_records(5, PDG=-321)
    columns = convert_records(records)
    path = tmp_path / "new" / "Kaons.pkl"
    assert write_fm4dirc_pickle(columns, path) == 5
    assert [p.name for p in path.parent.iterdir()] == ["Kaons.pkl"]
    with path.open("rb") as file:  # our own file
        plain = pickle.load(file)
    assert type(plain) is list and type(plain[0]) is dict
    for record, original in zip(plain, records, strict=True):
        assert record["PID"] == record["PDG"] == -321
        assert type(record["NHits"]) is int and record["NHits"] == len(record["x"])
        np.testing.assert_array_equal(record["pixelID"], original["pixelID"])
    again = convert_records(load_fm4dirc(path))
    for name in columns:
        for ours, first in zip(again[name], columns[name], strict=True):
            np.testing.assert_array_equal(np.float32(ours), np.float32(first))
    # Also readable the way FM4DIRC does, by numpy's load.
    assert len(np.load(path, allow_pickle=True)) == 5


def test_script_runs_from_the_repository(tmp_path):
    script = Path(convert_fm4dirc.__file__)
    path = dump(tmp_path / "Pions.pkl", make_records(2))
    run = subprocess.run(
        [sys.executable, str(script), str(path), "--output", str(tmp_path / "out")], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert "2 written" in run.stdout


# --- hostile files -----------------------------------------------------------------------------------------------


class Payload:
    """Pickles to a call of `function(*arguments)`."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def hostile_contents(marker):
    command = f"touch {marker}"
    call = Payload(os.system, command)
    bad = make_records(1)[0]
    cases = {
        "os.system": call,
        "in a list": [call],
        "in a record": [{**bad, "P": call}],
        "in an array": [{**bad, "pmtID": np.array([call], dtype=object)}],
        "second record": [bad, {**bad, "extra": {"deep": (call,)}}],
        "eval": Payload(eval, f"__import__('os').system({command!r})"),
        "exec": Payload(exec, f"import os; os.system({command!r})"),
        "getattr": Payload(getattr, Payload(__import__, "os"), "system"),
        "import": Payload(__import__, "os"),
        "open": Payload(open, str(marker), "w"),
        "Popen": Payload(subprocess.Popen, ["touch", str(marker)]),
        "numpy load": Payload(np.load, str(marker)),
        "numpy memmap": Payload(np.memmap, str(marker), "u1", "w+", 0, (4,)),
    }
    return cases


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("case", sorted(hostile_contents("x")))
def test_hostile_pickles_are_refused_and_not_run(tmp_path, case, protocol):
    marker = tmp_path / "executed"
    path = dump(tmp_path / "Pions.pkl", hostile_contents(marker)[case], protocol)
    with pytest.raises(ValueError, match="which is refused and was not run") as error:
        load_fm4dirc(path)
    assert "\n" not in str(error.value)
    assert not marker.exists()


def test_hostile_npy_is_refused_and_not_run(tmp_path):
    marker = tmp_path / "executed"
    content = np.empty(1, dtype=object)
    content[0] = {"P": Payload(os.system, f"touch {marker}")}
    with pytest.raises(ValueError, match="refused and was not run"):
        load_fm4dirc(save_npy(tmp_path / "Pions.npy", content))
    assert not marker.exists()


def test_hostile_names_that_lead_out_of_an_allowed_module(tmp_path):
    marker = tmp_path / "executed"
    for module, name in (
        ("numpy", "ndarray.__class__"),
        ("numpy._core.multiarray", "_reconstruct.__globals__"),
        ("builtins", "list.__subclasses__"),
        ("posix\x1b[31m", "system"),
    ):
        stream = b"\x80\x04" + b"".join(
            b"\x8c" + bytes([len(part.encode())]) + part.encode() for part in (module, name)
        )
        path = tmp_path / "Pions.pkl"
        path.write_bytes(stream + b"\x93.")
        with pytest.raises(ValueError, match="refused") as error:
            load_fm4dirc(path)
        assert str(error.value).isprintable()
    assert not marker.exists()


def test_hostile_state_cannot_change_the_reader(tmp_path):
    before = dict(convert_fm4dirc._GLOBALS)
    # GLOBAL numpy.ndarray, then BUILD with a state: on a class this would set attributes.
    for state in ({"_function": None}, (None, {"_function": 1})):
        path = tmp_path / "Pions.pkl"
        path.write_bytes(b"cnumpy\nndarray\n" + pickle.dumps(state, protocol=0)[:-1] + b"b.")
        with pytest.raises(ValueError, match="change a function"):
            load_fm4dirc(path)
    assert before == convert_fm4dirc._GLOBALS
    records = make_records(1)
    assert_same_records(load_fm4dirc(dump(tmp_path / "ok.pkl", records)), records)


def test_hostile_truncated_files(tmp_path):
    content = pickle.dumps(make_records(3), protocol=4)
    path = tmp_path / "Pions.pkl"
    for length in [*range(0, 60), *range(60, len(content), 97), len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(ValueError) as error:
            load_fm4dirc(path)
        assert "\n" not in str(error.value) and str(path) in str(error.value)
    content = save_npy(path, make_records(2)).read_bytes()
    for length in (6, 7, 9, 30, 100, 127, 130, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError):
            load_fm4dirc(path)


def test_hostile_random_bytes(tmp_path):
    rng = np.random.default_rng(5)
    good = bytearray(pickle.dumps(make_records(2), protocol=4))
    path = tmp_path / "Pions.pkl"
    for _ in range(300):
        damaged = bytearray(good)
        for position in rng.integers(0, len(good), 4):
            damaged[position] = rng.integers(32, 127)
        path.write_bytes(damaged)
        try:
            columns = convert_records(load_fm4dirc(path), default_pdg=211)
        except ValueError as error:
            assert "\n" not in str(error)
        else:
            assert all(pmt.min(initial=0) >= 0 and pmt.max(initial=0) < 24 for pmt in columns["pmtID"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"P": 1.0}, "expected a list of tracks, found dict"),
        (5, "expected a list of tracks, found int"),
        (np.arange(3.0), "expected a list of tracks, found ndarray"),
        ([1, 2], "row 0: expected a dict per track, found int"),
        ([{1: 2}], "row 0: field names must be strings"),
        ([{"P": np.array([1, None], dtype=object)}], "row 0: P is an object array"),
        ([{"P": np.zeros(2, dtype=[("a", "f4")])}], "dtype .* is not allowed"),
        ([{"P": np.array(["a"])}], "dtype .* is not allowed"),
        ([{"P": np.array(["2020-01-01"], dtype="M8[D]")}], "dtype .* is not allowed"),
    ],
)
def test_hostile_wrong_types(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        load_fm4dirc(dump(tmp_path / "Pions.pkl", content))


def test_hostile_shapes_and_allocations(tmp_path):
    array = pickle.dumps([{"P": np.arange(4, dtype=np.uint8)}], protocol=2)
    assert array.count(b"K\x04\x85") == 1
    path = tmp_path / "Pions.pkl"
    path.write_bytes(array.replace(b"K\x04\x85", b"J\xff\xff\xff\x7f\x85"))
    with pytest.raises(ValueError, match="shape does not fit"):
        load_fm4dirc(path)
    path.write_bytes(b"cbuiltins\nbytearray\n(J\xff\xff\xff\x7ftR.")
    with pytest.raises(ValueError, match="malformed bytes"):
        load_fm4dirc(path)
    for stream in (b"]r\xff\xff\xff\x7f.", b"]p999999999999\n.", b"]p" + b"9" * 10000 + b"\n."):
        path.write_bytes(stream)
        with pytest.raises(ValueError, match="memo index"):
            load_fm4dirc(path)
    for stream in (b"\x8e" + b"\xff" * 7 + b"\x0f.", b"\x96" + b"\xff" * 5 + b"\x00\x00\x00.", b"T\xff\xff\xff\x7f."):
        path.write_bytes(stream)
        with pytest.raises(ValueError, match="truncated"):
            load_fm4dirc(path)
    path.write_bytes(b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**31) + b"x")
    with pytest.raises(ValueError, match="header"):
        load_fm4dirc(path)
    # Nested lists that double at every level: cheap to hold, endless to print.
    level = []
    for _ in range(60):
        level = [level, level]
    record = {**make_records(1)[0], "pmtID": level, "P": level}
    with pytest.raises(ValueError, match="pmtID must be a flat array of numbers"):
        convert_records(load_fm4dirc(dump(path, [record])))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"NHits": 3}, "row 1: NHits = 3 but the hit arrays have"),
        ({"NHits": "six"}, "row 1: NHits must be a number, got 'six'"),
        ({"P": float("nan")}, "row 1: P = nan, expected a finite number"),
        ({"P": None}, "row 1: P must be a number, got None"),
        ({"P": np.zeros(3)}, "row 1: P must be a number, got an array"),
        ({"Theta": 10**400}, "row 1: Theta must be a number, got a value of type int"),
        ({"PDG": 11}, "row 1: PDG = 11, expected"),
        ({"PDG": -1}, "file name says neither"),
        ({"pmtID": np.array([24])}, r"row 1: pmtID\[0\] = 24, expected an integer in 0..23"),
        ({"pmtID": np.array([0.5])}, r"row 1: pmtID\[0\] = 0.5"),
        ({"pixelID": [-1]}, r"row 1: pixelID\[0\] = -1, expected an integer in 0..255"),
        ({"pixelID": [2**70]}, "row 1: pixelID must be a flat array"),
        ({"pixelID": np.zeros((2, 2))}, "row 1: pixelID must be a flat array of numbers"),
        ({"leadTime": [1.0, float("inf")]}, r"row 1: leadTime\[1\] = inf, expected a finite time"),
        ({"leadTime": [1e39]}, r"row 1: leadTime\[0\] = 1e\+39, expected a finite time"),
        ({"leadTime": ["a"]}, "row 1: leadTime must be a flat array"),
        ({"leadTime": np.array([20.0])}, "row 1: hit arrays differ in length"),
    ],
)
def test_hostile_records_give_one_line_and_no_files(tmp_path, capsys, changes, message):
    records = make_records(3)
    records[1].update(changes)
    path = dump(tmp_path / "tracks.pkl", records)
    with pytest.raises(ValueError, match=message) as error:
        convert_records(load_fm4dirc(path), place=str(path))
    assert "\n" not in str(error.value)
    output = tmp_path / "out"
    assert main([str(path), "--output", str(output), "--rows_per_shard", "1"]) == 2
    captured = capsys.readouterr()
    assert captured.err.strip().count("\n") == 0
    assert not output.exists()


def test_hostile_missing_field_and_missing_file(tmp_path, capsys):
    record = make_records(1)[0]
    del record["leadTime"]
    with pytest.raises(ValueError, match="row 0: field leadTime is missing"):
        convert_records([record])
    assert main([str(tmp_path / "no.pkl"), "--output", str(tmp_path / "out")]) == 2
    assert "no.pkl" in capsys.readouterr().err


def test_hostile_pickle_output_leaves_nothing_behind(tmp_path):
    records = make_records(2)
    del records[1]["P"]
    with pytest.raises(ValueError, match="P"):
        write_fm4dirc_pickle(records, tmp_path / "Pions.pkl")
    records = make_records(1, pmtID=["a"])
    with pytest.raises(ValueError):
        write_fm4dirc_pickle(records, tmp_path / "Pions.pkl")
    assert not any(tmp_path.iterdir())


def test_hostile_persistent_ids(tmp_path):
    class Writer(pickle.Pickler):
        def persistent_id(self, obj):
            return "reference" if obj == "secret" else None

    stream = io.BytesIO()
    Writer(stream, protocol=4).dump([{"P": "secret"}])
    path = tmp_path / "Pions.pkl"
    path.write_bytes(stream.getvalue())
    with pytest.raises(ValueError, match="not a readable list"):
        load_fm4dirc(path)
