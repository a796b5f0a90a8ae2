"""TPCpp-10M files to Parquet: layouts, restart, bin edges from the result, malformed files."""

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset

from hepzoo.data_scripts import convert_tpcpp10m, tpc_bin_edges
from hepzoo.data_scripts.convert_tpcpp10m import convert_split, find_shards, find_splits, main
from hepzoo.data_scripts.tpc_schema import LABEL_COLUMNS, POINT_COLUMNS, TPC_FEATURES, pid_class, tpc_features
from hepzoo.tokenization.feature_extraction_fm4npp import Fm4nppFeatureExtractor

SIZES = (3, 1, 7)


def shard_arrays(sizes=SIZES, seed=0) -> dict[str, dict[str, np.ndarray]]:
    """The files of one shard: stem -> arrays."""
    rng = np.random.default_rng(seed)
    total = sum(sizes)
    r, phi = rng.uniform(31.4, 75.3, total), rng.uniform(-np.pi, np.pi, total)
    data = np.stack(
        [rng.integers(5, 900, total), r * np.cos(phi), r * np.sin(phi), rng.uniform(-90, 90, total)], axis=1
    )
    event = np.repeat(np.arange(len(sizes)), 2)[::-1]  # not in order
    return {
        "spacepoints": {"data": data.astype(np.float32), "size": np.array(sizes)},
        "track_ids": {"data": rng.integers(0, 3, total)},
        "pid_labels": {"data": rng.integers(0, 5, total)},
        "noise_tags": {"data": rng.integers(0, 2, total).astype(bool)},
        "truth_tracks": {
            "event": event,
            "track_id": np.arange(len(event)) % 2 + 1,
            "pdg": np.full(len(event), -211),
            "kin": np.tile(np.array([3, 4, 1, 0.1, 0.2, 0.3, -1, 5.1], dtype=np.float32), (len(event), 1)),
            "n_points": np.full(len(event), 2),
        },
    }


def write(folder, arrays, number="", without=()):
    folder.mkdir(parents=True, exist_ok=True)
    for stem, content in arrays.items():
        if stem not in without:
            np.savez_compressed(folder / f"{stem}{number}.npz", **content)


def read(path) -> list[dict]:
    return list(load_dataset("parquet", data_files=str(path), split="train", streaming=True))


def test_schema():
    assert list(tpc_features(TPC_FEATURES)) == list(TPC_FEATURES)
    assert list(tpc_features(["noise", *POINT_COLUMNS])) == ["E", "x", "y", "z", "noise"]
    assert pid_class(np.array([[211, -321, 2212], [-11, 22, 13]])).tolist() == [[1, 2, 3], [4, 0, 0]]
    with pytest.raises(ValueError, match="column z is missing"):
        tpc_features("Exy")
    with pytest.raises(ValueError, match="charge is not a TPC column"):
        tpc_features(["charge", *POINT_COLUMNS])


def test_rows_are_the_events_of_the_files(tmp_path):
    """Two shards with labels and truth: every value at its place, types as stated, read as a stream."""
    shards = [shard_arrays(seed=seed) for seed in (1, 2)]
    for index, arrays in enumerate(shards):
        write(tmp_path / "labeled" / "train", arrays, f"_{index:03d}")
    assert main([str(tmp_path), "--output", str(tmp_path / "out")]) == 0
    paths = sorted((tmp_path / "out" / "train").iterdir())
    assert [path.name for path in paths] == ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
    for path, arrays in zip(paths, shards, strict=True):
        rows = read(path)
        assert len(rows) == len(SIZES) and list(rows[0]) == list(TPC_FEATURES)
        ends = np.cumsum(SIZES)
        for index, row in enumerate(rows):
            event = slice(ends[index] - SIZES[index], ends[index])
            points = arrays["spacepoints"]["data"][event]
            for name, values in zip("Exyz", points.T, strict=True):
                assert np.array_equal(np.float32(row[name]), values)
            for name, stem in (("track_id", "track_ids"), ("pid", "pid_labels"), ("noise", "noise_tags")):
                assert row[name] == arrays[stem]["data"][event].astype(int).tolist()
            assert row["truth_track_id"] == [1, 2] and row["truth_charge"] == [-1, -1]
            assert row["truth_pdg"] == [-211, -211] and row["truth_num_points"] == [2, 2]
            np.testing.assert_allclose(row["truth_pt"], 5)
            np.testing.assert_allclose(row["truth_eta"], np.arcsinh(0.2), rtol=1e-6)
            np.testing.assert_allclose(row["truth_phi"], np.arctan2(4, 3), rtol=1e-6)
            assert np.allclose([row[f"truth_v{axis}"][0] for axis in "xyz"], [0.1, 0.2, 0.3])
    assert pq.read_schema(paths[0]).field("noise").type.value_type == "int8"


def test_every_spelling_of_the_splits_is_found(tmp_path):
    arrays = shard_arrays()
    labels = {"truth_tracks", "track_ids", "pid_labels", "noise_tags"}
    write(tmp_path / "new" / "unlabeled", arrays, "_000", without=labels)
    write(tmp_path / "new" / "labeled" / "val", arrays)
    write(tmp_path / "new" / "labeled" / "test", arrays)
    assert list(find_splits(tmp_path / "new")) == ["unlabeled", "validation", "test"]
    older = {**arrays, "particle_ids": arrays["pid_labels"]}
    write(tmp_path / "old" / "labeled_val", older, without=("pid_labels", "truth_tracks"))
    write(tmp_path / "old" / "labeled_train", older, without=("pid_labels", "truth_tracks"))
    assert list(find_splits(tmp_path / "old")) == ["train", "validation"]
    assert list(find_splits(tmp_path / "old" / "labeled_val")) == ["validation"]
    assert main([str(tmp_path / "new"), "--output", str(tmp_path / "a"), "--split", "unlabeled"]) == 0
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["unlabeled"]
    assert list(read(tmp_path / "a" / "unlabeled" / "*")[0]) == ["E", "x", "y", "z"]
    assert main([str(tmp_path / "old" / "labeled_val"), "--output", str(tmp_path / "c"), "--split", "mine"]) == 0
    assert [path.name for path in (tmp_path / "c" / "mine").iterdir()] == ["mine-00000-of-00001.parquet"]
    assert main([str(tmp_path / "old"), "--output", str(tmp_path / "b")]) == 0
    assert list(read(tmp_path / "b" / "validation" / "*")[0]) == [*POINT_COLUMNS, *LABEL_COLUMNS]


def test_shards_come_in_the_order_of_their_numbers(tmp_path):
    for number in (10, 2, 1):
        write(tmp_path, shard_arrays(), f"_{number}", without=("truth_tracks",))
    assert [shard.points.name for shard in find_shards(tmp_path)] == [f"spacepoints_{n}.npz" for n in (1, 2, 10)]


def test_pdg_codes_become_classes_on_request(tmp_path, capsys):
    arrays = shard_arrays()
    arrays["pid_labels"]["data"] = np.resize([211, -321, 2212, 11, 13], sum(SIZES))
    write(tmp_path / "train", arrays)
    assert main([str(tmp_path / "train"), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "pid_labels.npz: event 0, point 0: pid = 211; expected 0..4 (PDG codes: use --pid_from_pdg)" in error
    assert main([str(tmp_path / "train"), "--output", str(tmp_path / "out"), "--pid_from_pdg"]) == 0
    assert read(tmp_path / "out" / "train" / "*")[0]["pid"] == [1, 2, 3]


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    """The shard that failed leaves nothing; the finished one is not read again."""
    for index in range(3):
        write(tmp_path / "train", shard_arrays(seed=index), f"_{index:03d}")
    out, convert, seen = tmp_path / "out", convert_tpcpp10m._convert_shard, []

    def fail_once(shard, *rest):
        seen.append(shard.points.name)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return convert(shard, *rest)

    monkeypatch.setattr(convert_tpcpp10m, "_convert_shard", fail_once)
    with pytest.raises(KeyboardInterrupt):
        convert_split(tmp_path / "train", out, "train")
    assert [path.name for path in out.iterdir()] == ["train-00000-of-00003.parquet"]
    lines = []
    paths = convert_split(tmp_path / "train", out, "train", report=lines.append)
    assert seen == [f"spacepoints_{n}.npz" for n in ("000", "001", "001", "002")]
    assert len(paths) == 3 and lines[0] == "train-00000-of-00003.parquet: kept, 3 events"
    convert_split(tmp_path / "train", out, "train", overwrite=True)
    assert seen[4:] == ["spacepoints_000.npz", "spacepoints_001.npz", "spacepoints_002.npz"]


def test_a_file_is_written_in_groups_of_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(convert_tpcpp10m, "ROW_GROUP_SIZE", 2)
    write(tmp_path / "train", shard_arrays((2, 0, 3, 4, 1)))
    (path,) = convert_split(tmp_path / "train", tmp_path / "out", "train", drop_empty=True)
    file = pq.ParquetFile(path)
    assert [file.metadata.row_group(k).num_rows for k in range(file.num_row_groups)] == [1, 2, 1]
    assert [len(row["E"]) for row in read(path)] == [2, 3, 4, 1]
    assert [len(row["truth_pt"]) for row in read(path)] == [2, 2, 2, 2]


def test_bin_edges_of_converted_events(tmp_path, capsys):
    write(
        tmp_path / "unlabeled",
        shard_arrays((300, 400)),
        "_000",
        without=("track_ids", "pid_labels", "noise_tags", "truth_tracks"),
    )
    assert main([str(tmp_path / "unlabeled"), "--output", str(tmp_path / "out")]) == 0
    files = [str(path) for path in (tmp_path / "out" / "unlabeled").iterdir()]
    arguments = [*files, "--output", str(tmp_path / "extractor"), "--n_bins", "4,4,3", "--num_neighbors", "5"]
    assert tpc_bin_edges.main(arguments) == 0
    assert "2 events, 700 points" in capsys.readouterr().out
    extractor = Fm4nppFeatureExtractor.from_pretrained(tmp_path / "extractor")
    assert [len(extractor.bin_edges[name]) for name in ("eta", "phi", "radius")] == [5, 5, 4]
    assert extractor(read(files[0]))["neighbor_labels"].shape == (2, 400, 15)
    assert tpc_bin_edges.main([*arguments, "--max_events", "1"]) == 0
    assert "1 events, 300 points" in capsys.readouterr().out


# --- malformed input -------------------------------------------------------------------------------------------------


def test_hostile_arrays_are_named_by_event(tmp_path):
    def with_(stem, key, value):
        arrays = shard_arrays()
        arrays[stem][key] = value(arrays[stem][key])
        return arrays

    def put(index, value):
        def changed(array):
            array = array.copy()
            array[index] = value
            return array

        return changed

    cases = [
        (with_("spacepoints", "data", put((4, 2), np.nan)), r"event 2, point 0: y = nan; expected a finite number"),
        (with_("spacepoints", "data", lambda a: a[:, :3]), r"data must be numbers of shape \(points, 4\)"),
        (with_("spacepoints", "data", lambda a: a[:-1]), "size adds up to 11 points, but data has 10"),
        (
            with_("spacepoints", "data", lambda a: put((4, 2), 1e300)(a.astype(np.float64))),
            r"event 2, point 0: y = 1e\+300; expected a finite number of float32",
        ),
        (with_("spacepoints", "size", lambda a: put(1, 2**64 - 1)(a.astype(np.uint64))), "event 1: size is 1844674407"),
        (with_("spacepoints", "size", lambda a: a * 1.0), "size must be non-negative integers"),
        (with_("spacepoints", "size", put(0, -3)), "size must be non-negative integers"),
        (
            with_("track_ids", "data", lambda a: a[:-1]),
            r"track_ids.npz: data must be integers or flags of shape \(11,\)",
        ),
        (with_("track_ids", "data", lambda a: a + 0.5), "track_ids.npz: data must be integers"),
        (with_("noise_tags", "data", lambda a: a + 1), "noise = 2; expected 0..1"),
        (with_("pid_labels", "data", put(3, -1)), "event 1, point 0: pid = -1; expected 0..4"),
        (with_("truth_tracks", "event", put(0, 9)), r"truth_tracks.npz: event 0\.\.9; expected 0\.\.2"),
        (with_("truth_tracks", "kin", lambda a: a[:, :7]), r"kin must be finite numbers of shape \(6, 8\)"),
        (with_("truth_tracks", "kin", put((0, 0), np.inf)), "kin must be finite numbers"),
        (with_("truth_tracks", "event", lambda a: a[0]), "event must be integers of shape"),
        (with_("truth_tracks", "pdg", put(2, 2**40)), "pdg of track 2 is 1099511627776; expected integers of -214748"),
        (
            with_("truth_tracks", "kin", put((1, 6), 300)),
            "charge in kin of track 1 is 300.0; expected integers",
        ),
        (with_("truth_tracks", "pdg", lambda a: a[:3]), r"pdg must be integers of shape \(6,\)"),
        (shard_arrays((3, 0, 2)), "spacepoints.npz: event 1 has no points; expected at least 1"),
    ]
    for index, (arrays, message) in enumerate(cases):
        folder = tmp_path / str(index)
        write(folder, arrays)
        with pytest.raises(ValueError, match=message) as caught:
            convert_split(folder, folder / "out", "train")
        assert "\n" not in str(caught.value)
        assert not list((folder / "out").iterdir())


def test_hostile_files_are_named_and_skipped_on_request(tmp_path, capsys):
    """A truncated archive, text, a single array, a pickle, an archive without the key."""
    folder = tmp_path / "train"
    for index in range(7):
        write(folder, shard_arrays(seed=index), f"_{index:03d}", without=("truth_tracks",))
    whole = (folder / "spacepoints_001.npz").read_bytes()
    (folder / "spacepoints_001.npz").write_bytes(whole[: len(whole) // 2])
    (folder / "track_ids_002.npz").write_bytes(b"no archive")
    with open(folder / "spacepoints_003.npz", "wb") as file:
        np.save(file, np.zeros((3, 4)))
    np.savez(folder / "noise_tags_004.npz", data=np.array([{"a": 1}], dtype=object))
    np.savez(folder / "pid_labels_005.npz", labels=np.zeros(3))
    damaged = bytearray(whole)
    damaged[len(whole) // 3] ^= 0xFF
    (folder / "spacepoints_006.npz").write_bytes(bytes(damaged))
    assert main([str(folder), "--output", str(tmp_path / "out")]) == 2
    assert "spacepoints_001.npz: damaged or not an npz archive" in capsys.readouterr().err
    assert main([str(folder), "--output", str(tmp_path / "out"), "--skip_corrupt"]) == 0
    output = capsys.readouterr().out
    for text in (
        "skipped: ",
        "track_ids_002.npz: damaged",
        "spacepoints_003.npz: one array, not an npz archive",
        "noise_tags_004.npz: damaged or not an npz archive (Object arrays cannot be loaded",
        "pid_labels_005.npz: no array 'data'; there are labels",
        "spacepoints_006.npz: damaged",
        "6 of 7 shards skipped",
    ):
        assert text in output
    assert [path.name for path in (tmp_path / "out" / "train").iterdir()] == ["train-00000-of-00007.parquet"]


def test_hostile_folders_are_named(tmp_path, capsys):
    def error(*arguments) -> str:
        assert main([*map(str, arguments), "--output", str(tmp_path / "out")]) == 2
        text = capsys.readouterr().err
        assert text.startswith("error: ") and text.count("\n") == 1
        return text

    assert "is not a folder" in error(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    assert "no spacepoints*.npz" in error(tmp_path / "empty")
    arrays = shard_arrays()
    write(tmp_path / "twice" / "labeled" / "val", arrays)
    write(tmp_path / "twice" / "labeled" / "validation", arrays)
    assert "split validation is there twice" in error(tmp_path / "twice")
    write(tmp_path / "train", arrays, "_000")
    assert "no split 'test'; there are train" in error(tmp_path, "--split", "test")
    assert "split must be a plain name" in error(tmp_path / "train", "--split", "my-events")
    np.savez(tmp_path / "train" / "track_ids_001.npz", data=np.zeros(3))
    assert "track_ids_001.npz: there is no spacepoints_001.npz beside it" in error(tmp_path / "train")
    (tmp_path / "train" / "track_ids_001.npz").unlink()
    write(tmp_path / "train", arrays, "_001", without=("noise_tags",))
    assert "spacepoints_001.npz: no noise file for it, though there is noise_tags_000.npz" in error(tmp_path / "train")
    np.savez(tmp_path / "train" / "noise_tags_001.npz", **arrays["noise_tags"])
    np.savez(tmp_path / "train" / "particle_ids_000.npz", **arrays["pid_labels"])
    assert "both pid_labels and particle_ids files" in error(tmp_path / "train")
    assert not (tmp_path / "out" / "train").exists()


def test_hostile_results_of_another_run_are_not_mixed_in(tmp_path):
    folder, out = tmp_path / "train", tmp_path / "out"
    write(folder, shard_arrays(), "_000")
    convert_split(folder, out, "train")
    write(folder, shard_arrays((2, 2)), "_000")
    with pytest.raises(ValueError, match="has 3 events, but .*spacepoints_000.npz has 2; convert it again: overwrite"):
        convert_split(folder, out, "train")
    (out / "train-00000-of-00001.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="cannot be read"):
        convert_split(folder, out, "train")
    convert_split(folder, out, "train", overwrite=True)
    write(folder, shard_arrays(), "_001")
    with pytest.raises(ValueError, match="not one of the 2 shards of train; remove it first"):
        convert_split(folder, out, "train")
    with pytest.raises(ValueError, match="split must be a plain name"):
        convert_split(folder, out, "../train")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file; expected a directory"):
        convert_split(folder, tmp_path / "file", "train")


def test_hostile_input_of_bin_edges(tmp_path, capsys):
    def error(*arguments) -> str:
        assert tpc_bin_edges.main([*map(str, arguments), "--output", str(tmp_path / "extractor")]) == 2
        return capsys.readouterr().err

    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    assert "a.parquet is not a Parquet file" in error(tmp_path / "a.parquet")
    assert "No such file" in error(tmp_path / "b.parquet")
    pq.write_table(tpc_features("Exyz").arrow_schema.empty_table(), tmp_path / "c.parquet")
    assert "the files hold no events" in error(tmp_path / "c.parquet")
    pq.write_table(tpc_features("Exyz").arrow_schema.empty_table().drop_columns("z"), tmp_path / "d.parquet")
    assert "d.parquet: column z is missing; there are E, x, y" in error(tmp_path / "d.parquet")
    assert "--max_events must be at least 1" in error(tmp_path / "c.parquet", "--max_events", "0")
    assert "order must be one of EPR" in error(tmp_path / "c.parquet", "--order", "ABC")
    with pytest.raises(SystemExit):
        error(tmp_path / "c.parquet", "--n_bins", "8,8")
    assert "expected three numbers such as 8,8,6" in capsys.readouterr().err
    assert not (tmp_path / "extractor").exists()
