import os

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import Array2D, Features, List, Value, load_dataset

from hepzoo.data_scripts.dirc_schema import DIRC_FEATURES, DIRC_NOISE_FEATURES, columns_to_records
from hepzoo.data_scripts.shards import ShardWriter

FEATURES = Features({"P": Value("float32"), "n": Value("int16"), "t": List(Value("float32")), "c": List(Value("int8"))})


def make_columns(count, seed=0, start=0):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, 5, count)
    return {
        "P": rng.uniform(0, 1, count).astype(np.float32),
        "n": np.arange(start, start + count),
        "t": [rng.uniform(0, 1, k).astype(np.float32) for k in sizes],
        "c": [rng.integers(0, 100, k).tolist() for k in sizes],
    }


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_shards_hold_the_rows_in_order(tmp_path):
    folder = tmp_path / "a" / "b"
    with ShardWriter(folder, FEATURES, split="train", rows_per_shard=40, row_group_size=16) as writer:
        assert writer.write(make_columns(33)) == 33
        assert writer.write(columns_to_records(make_columns(60, seed=1, start=33))) == 60
        assert writer.write({**make_columns(1), "P": 0.5, "n": 93, "t": [1.0, 2.0], "c": []}) == 1
        assert writer.write({name: [] for name in FEATURES}) == 0
        assert not [name for name in names(folder) if name.endswith("parquet")]
    assert names(folder) == [f"train-0000{i}-of-00003.parquet" for i in range(3)]
    assert [path.name for path in writer.paths] == names(folder) and writer.num_rows == 94
    assert [pq.ParquetFile(path).metadata.num_rows for path in writer.paths] == [40, 40, 14]
    assert pq.ParquetFile(writer.paths[0]).metadata.num_row_groups == 3

    stream = load_dataset("parquet", data_files=str(folder / "train-*.parquet"), split="train", streaming=True)
    assert stream.features == FEATURES
    rows = list(stream)
    assert [row["n"] for row in rows] == list(range(94))
    first, second = make_columns(33), make_columns(60, seed=1)
    for row, t, c in zip(rows, [*first["t"], *second["t"]], [*first["c"], *second["c"]], strict=False):
        np.testing.assert_array_equal(np.float32(row["t"]), t)
        assert row["c"] == c
    assert rows[-1]["t"] == [1.0, 2.0] and rows[-1]["c"] == []


def test_features_of_the_records_round_trip(tmp_path):
    assert DIRC_NOISE_FEATURES["is_noise"] == List(Value("int8"))
    record = {name: [1, 2] if isinstance(feature, List) else 3 for name, feature in DIRC_NOISE_FEATURES.items()}
    with ShardWriter(tmp_path, DIRC_NOISE_FEATURES, split="test") as writer:
        writer.write(record)
    data = load_dataset("parquet", data_files=str(writer.paths[0]), split="train", streaming=True)
    assert data.features == DIRC_NOISE_FEATURES
    assert next(iter(data)) == record
    assert set(DIRC_FEATURES) < set(DIRC_NOISE_FEATURES)


def test_other_feature_types_are_written(tmp_path):
    features = Features({"name": Value("string"), "image": Array2D((2, 3), "float32"), "v": List(List(Value("int32")))})
    rows = [{"name": f"e{i}", "image": np.full((2, 3), i), "v": [[i], [i, i]]} for i in range(5)]
    with ShardWriter(tmp_path, features, rows_per_shard=2) as writer:
        writer.write(rows[:3])
        writer.write(rows[3:])
    data = load_dataset("parquet", data_files=str(tmp_path / "train-*.parquet"), split="train", streaming=True)
    assert [row["name"] for row in data] == ["e0", "e1", "e2", "e3", "e4"]
    assert np.asarray(next(iter(data))["image"]).shape == (2, 3)


def test_an_empty_split_keeps_its_schema(tmp_path):
    with ShardWriter(tmp_path, FEATURES):
        pass
    assert names(tmp_path) == ["train-00000-of-00001.parquet"]
    assert pq.read_table(tmp_path / "train-00000-of-00001.parquet").schema.names == list(FEATURES)


def test_a_split_is_not_overwritten_unless_asked(tmp_path):
    with ShardWriter(tmp_path, FEATURES, rows_per_shard=10) as writer:
        writer.write(make_columns(25))
    with pytest.raises(ValueError, match="already holds split 'train'"), ShardWriter(tmp_path, FEATURES):
        pass
    with ShardWriter(tmp_path, FEATURES, split="test") as writer:
        writer.write(make_columns(2))
    with ShardWriter(tmp_path, FEATURES, rows_per_shard=10, overwrite=True) as writer:
        writer.write(make_columns(12, start=100))
    assert names(tmp_path) == [
        "test-00000-of-00001.parquet",
        "train-00000-of-00002.parquet",
        "train-00001-of-00002.parquet",
    ]
    assert pq.read_table(writer.paths[0])["n"][0].as_py() == 100


def test_hostile_exception_leaves_nothing(tmp_path):
    folder = tmp_path / "new"
    with pytest.raises(RuntimeError), ShardWriter(folder, FEATURES, rows_per_shard=5) as writer:
        writer.write(make_columns(12))
        raise RuntimeError
    assert not folder.exists()
    with ShardWriter(folder, FEATURES) as writer:
        writer.write(make_columns(3))
    before = (folder / "train-00000-of-00001.parquet").read_bytes()
    with pytest.raises(KeyboardInterrupt), ShardWriter(folder, FEATURES, overwrite=True, rows_per_shard=1) as writer:
        writer.write(make_columns(4, seed=3))
        raise KeyboardInterrupt
    assert names(folder) == ["train-00000-of-00001.parquet"]
    assert (folder / "train-00000-of-00001.parquet").read_bytes() == before


def test_hostile_failing_rename_restores_the_old_split(tmp_path, monkeypatch):
    with ShardWriter(tmp_path, FEATURES, rows_per_shard=2) as writer:
        writer.write(make_columns(4))
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    replace = os.replace

    def failing(source, target):
        if str(target).endswith("00002-of-00003.parquet"):
            raise OSError("disk full")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with (
        pytest.raises(OSError, match="disk full"),
        ShardWriter(tmp_path, FEATURES, overwrite=True, rows_per_shard=2) as w,
    ):
        w.write(make_columns(6))
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": [1, 2, 40000]}, "column n: 40000 does not fit int16"),
        ({"n": [1, 2, 0.5]}, "column n: 0.5 does not fit int16"),
        ({"n": [1, 2, float("nan")]}, "column n: nan does not fit int16"),
        ({"n": [1, 2, None]}, "column n"),
        ({"P": [1.0, 1e39, 2.0]}, r"column P: 1e\+39 is too large for float32"),
        ({"n": [1, 2, "x"]}, "column n"),
        ({"n": [1, 2]}, "columns differ in length: P has 3 rows, n has 2"),
        ({"c": [[1], [2], [300]]}, "column c: 300 does not fit int8"),
        ({"c": [[1], [2], 3]}, "row 2: column c must be a flat list"),
        ({"c": [[1], [2], None]}, "row 2: column c must be a flat list"),
        ({"t": [[1.0], [[2.0]], []]}, "row 1: column t must be a flat list"),
        ({"t": [["a"], [], []]}, "row 0: column t must be a flat list"),
        ({"extra": [1, 2, 3]}, "column extra is not in the features"),
    ],
)
def test_hostile_rows_are_refused_by_one_line(tmp_path, change, message):
    columns = {**make_columns(3), **change}
    with pytest.raises(ValueError, match=message) as error, ShardWriter(tmp_path / "d", FEATURES) as writer:
        writer.write(columns)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "d").exists()


def test_hostile_records_and_arguments(tmp_path):
    with ShardWriter(tmp_path / "d", FEATURES) as writer:
        records = columns_to_records(make_columns(3))
        del records[1]["t"]
        with pytest.raises(ValueError, match="row 1: column t is missing"):
            writer.write(records)
        with pytest.raises(ValueError, match="row 0: expected a record dict"):
            writer.write([5])
    with pytest.raises(ValueError, match="closed"):
        writer.write(make_columns(1))
    for split in ("../x", "", "a-b", "a/b"):
        with pytest.raises(ValueError, match="split"):
            ShardWriter(tmp_path, FEATURES, split=split)
    for bad in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match="rows_per_shard"):
            ShardWriter(tmp_path, FEATURES, rows_per_shard=bad)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"), ShardWriter(tmp_path / "file", FEATURES):
        pass
