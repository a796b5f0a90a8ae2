import copy
import json
import os
import pickle
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorWithPadding

from hepzoo.tokenization.geometry_dirc import DircGeometry
from hepzoo.tokenization.noise_dirc import add_dark_noise
from hepzoo.tokenization.records_dirc import fiducial_cut
from hepzoo.tokenization.tokenization_cmhca_dirc import CMHCADircTokenizer

SPACE_EOS, SPACE_PAD, TIME_EOS, TIME_PAD = 6145, 6146, 5921, 5922


@pytest.fixture(scope="module")
def tokenizer():
    return CMHCADircTokenizer()


def make_records(count=8, seed=0, low=1, high=60):
    rng = np.random.default_rng(seed)
    records = []
    for i in range(count):
        n = int(rng.integers(low, high))
        records.append(
            {
                "P": float(rng.uniform(1, 10)),
                "Theta": float(rng.uniform(25, 160)),
                "Phi": 0.0,
                "PDG": [211, -211, 321, -321][i % 4],
                "NHits": n,
                "pmtID": rng.integers(0, 24, n).astype(np.int16),
                "pixelID": rng.integers(0, 256, n).astype(np.int16),
                "leadTime": rng.uniform(9, 157, n).astype(np.float32),
            }
        )
    return records


def to_columns(records):
    return {name: [record[name] for record in records] for name in records[0]}


def to_lists(records):
    return [{k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in record.items()} for record in records]


# --- encoding ------------------------------------------------------------------------------------------------------


def test_sequence_layout(tokenizer):
    record = {
        "P": 6,
        "Theta": 30.0,
        "NHits": 3,
        "pmtID": [0, 23, 1],
        "pixelID": [0, 255, 2],
        "leadTime": [9, 20, 15.01],
    }
    encoding = tokenizer({**record, "PDG": -321})
    np.testing.assert_array_equal(
        encoding["input_ids"],
        [[0, 0], [0, 0], [0, 0], [1, 1], [259, 241], [6144, 440], [SPACE_EOS, TIME_EOS]],
    )
    np.testing.assert_array_equal(encoding["attention_mask"], np.ones(7))
    np.testing.assert_array_equal(encoding["kinematics"], np.float32([6, 30]))
    assert encoding["kinematics"].dtype == np.float32 and encoding["class_ids"] == 1
    assert "class_ids" not in tokenizer(record)
    assert tokenizer({**record, "PID": 211})["class_ids"] == 0
    assert tokenizer({**record, "PDG": -1}, return_class_ids=False).keys() == tokenizer(record).keys()
    np.testing.assert_array_equal(tokenizer.encode(record), encoding["input_ids"])


def test_padded_batches(tokenizer):
    records = make_records()
    longest = max(record["NHits"] for record in records) + 4
    encoding = tokenizer(records, padding=True, return_tensors="pt")
    assert encoding["input_ids"].shape == (8, longest, 2) and encoding["input_ids"].dtype == torch.int64
    assert encoding["kinematics"].dtype == torch.float32 and encoding["class_ids"].tolist() == [0, 0, 1, 1] * 2
    for ids, mask, record in zip(encoding["input_ids"], encoding["attention_mask"], records, strict=True):
        n = record["NHits"]
        assert mask.sum() == n + 4 and mask[: n + 4].all()
        assert (ids[n + 4 :] == torch.tensor([SPACE_PAD, TIME_PAD])).all()
        assert ids[n + 3].tolist() == [SPACE_EOS, TIME_EOS]
        assert torch.equal(ids[3 : n + 3, 1], ids[3 : n + 3, 1].sort().values)
    wide = tokenizer(records, padding="max_length")
    assert wide["input_ids"].shape == (8, 252, 2)
    assert tokenizer(records, padding="max_length", max_length=70)["input_ids"].shape == (8, 72, 2)
    assert tokenizer(records, padding=True, pad_to_multiple_of=16)["input_ids"].shape[1] % 16 == 0
    left = tokenizer(records, padding=True, padding_side="left")
    for a, b, mask in zip(left["input_ids"], encoding["input_ids"], left["attention_mask"], strict=True):
        np.testing.assert_array_equal(a[mask == 1], b[: mask.sum()])
        assert (a[mask == 0] == [SPACE_PAD, TIME_PAD]).all()


def test_every_form_of_rows_gives_the_same(tokenizer):
    records = make_records()
    expected = tokenizer(records)
    tensors = [{k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in r.items()} for r in records]
    same_length = {k: np.stack([v[0]] * 3) for k, v in to_columns(records).items()}
    for rows in (to_columns(records), to_lists(records), to_columns(to_lists(records)), tensors, iter(records)):
        encoding = tokenizer(rows)
        assert list(encoding) == list(expected)
        for name in expected:
            for a, b in zip(encoding[name], expected[name], strict=True):
                np.testing.assert_array_equal(a, b)
    for ids in tokenizer(same_length)["input_ids"]:
        np.testing.assert_array_equal(ids, expected["input_ids"][0])
    for index, record in enumerate(records):
        np.testing.assert_array_equal(tokenizer(record)["input_ids"], expected["input_ids"][index])
    assert tokenizer(records[0], return_tensors="np")["input_ids"].shape == (1, records[0]["NHits"] + 4, 2)
    for empty in ([], {name: [] for name in records[0]}):
        assert tokenizer(empty)["input_ids"] == []
        assert tokenizer(empty, padding=True)["input_ids"].shape == (0, 0, 2)


def test_equal_times_keep_their_order(tokenizer):
    pixels = np.arange(100)
    record = {"P": 5, "Theta": 90, "pmtID": [3] * 100, "pixelID": pixels, "leadTime": np.full(100, 50.0)}
    np.testing.assert_array_equal(tokenizer(record)["input_ids"][3:-1, 0], 3 * 256 + pixels + 1)


def test_range_ends(tokenizer):
    record = {"P": 10.0, "Theta": 160.0, "pmtID": [0, 0], "pixelID": [0, 0], "leadTime": [9.0, np.float32(156.99999)]}
    ids = tokenizer(record)["input_ids"]
    assert ids[3:-1, 1].tolist() == [1, 5920]
    tokenizer({**record, "P": 0.5, "Theta": np.float32(25)})
    # A float32 column rounds 0.95 to a smaller number.
    other = CMHCADircTokenizer(conditioning_ranges=((0.95, 6.5), (25, 160)))
    other({**record, "P": np.float32(0.95)})
    with pytest.raises(ValueError, match=r"P = 0.9499 is outside \[0.95, 6.5\]"):
        other({**record, "P": 0.9499})


def test_truncation_keeps_the_earliest(tokenizer):
    record = make_records(1, low=300, high=301)[0]
    ids = tokenizer(record, truncation=True)["input_ids"]
    assert ids.shape == (252, 2) and ids[-1].tolist() == [SPACE_EOS, TIME_EOS]
    order = np.argsort(record["leadTime"], kind="stable")[:248]
    np.testing.assert_array_equal(ids[3:-1, 0], (record["pmtID"].astype(int) * 256 + record["pixelID"] + 1)[order])
    # 248 hits fit: SOS + 248 + EOS = 250.
    full = {k: v[:248] if isinstance(v, np.ndarray) else v for k, v in record.items()}
    assert tokenizer({**full, "NHits": 248})["input_ids"].shape == (252, 2)
    tokenizer.dropped.clear()
    short = tokenizer(make_records(), truncation=True, max_length=10, padding=True)
    assert short["input_ids"].shape[1] == 12 and tokenizer.dropped["hit:truncated"] > 0


def test_hit_labels(tokenizer):
    records = add_dark_noise(make_records(20), rng=0, scale=100.0)
    encoding = tokenizer(records, padding=True, return_hit_labels=True, on_invalid="drop_hits")
    labels, mask = encoding["labels"], encoding["attention_mask"]
    assert labels.shape == mask.shape
    hits = (encoding["input_ids"][..., 0] > 0) & (encoding["input_ids"][..., 0] < SPACE_EOS)
    assert set(np.unique(labels[hits])) == {0, 1} and (labels[~hits] == -100).all()
    for row, record in zip(labels, records, strict=True):
        kept = (record["leadTime"] >= 9) & (record["leadTime"] < 157)
        order = np.argsort(record["leadTime"][kept], kind="stable")
        np.testing.assert_array_equal(row[row >= 0], record["is_noise"][kept][order])


# --- invalid input ---------------------------------------------------------------------------------------------------


def spoil(record, **changes):
    return {**record, **changes}


def with_value(record, name, position, value):
    values = record[name].astype(np.float64)
    values[position] = value
    return {**record, name: values}


HOSTILE = {
    "pmt too large": (lambda r: with_value(r, "pmtID", 2, 24), r"row 1: pmtID\[2\] = 24 is not an integer in 0..23"),
    "pmt negative": (lambda r: with_value(r, "pmtID", 0, -1), r"row 1: pmtID\[0\] = -1 is not an integer in 0..23"),
    "pmt fraction": (lambda r: with_value(r, "pmtID", 0, 1.5), r"row 1: pmtID\[0\] = 1.5 is not an integer"),
    "pixel too large": (lambda r: with_value(r, "pixelID", 3, 256), r"row 1: pixelID\[3\] = 256 .* in 0..255"),
    "pixel huge": (lambda r: with_value(r, "pixelID", 3, 1e300), r"row 1: pixelID\[3\] = 1e\+300"),
    "pixel nan": (lambda r: with_value(r, "pixelID", 3, np.nan), r"row 1: pixelID\[3\] = nan"),
    "time nan": (lambda r: with_value(r, "leadTime", 1, np.nan), r"row 1: leadTime\[1\] = nan ns .*\[9, 157\)"),
    "time inf": (lambda r: with_value(r, "leadTime", 1, np.inf), r"row 1: leadTime\[1\] = inf ns is outside"),
    "time early": (lambda r: with_value(r, "leadTime", 1, 8.9999), r"row 1: leadTime\[1\] = 8.9999 ns is outside"),
    "time late": (lambda r: with_value(r, "leadTime", 1, 157.0), r"row 1: leadTime\[1\] = 157 ns is outside"),
    "momentum nan": (lambda r: spoil(r, P=float("nan")), r"row 1: P = nan is outside \[0.5, 10\]"),
    "momentum null": (lambda r: spoil(r, P=None), r"row 1: P = nan is outside \[0.5, 10\]"),
    "momentum": (lambda r: spoil(r, P=10.1), r"row 1: P = 10.1 is outside \[0.5, 10\]"),
    "theta": (lambda r: spoil(r, Theta=24.9), r"row 1: Theta = 24.9 is outside \[25, 160\]"),
    "pdg": (lambda r: spoil(r, PDG=11), r"row 1: PDG = 11 is not a known class; expected \+-211 or \+-321"),
    "nhits": (lambda r: spoil(r, NHits=3), r"row 1: NHits = 3 but the hit lists have \d+ entries"),
    "empty": (
        lambda r: spoil(r, NHits=0, pmtID=[], pixelID=[], leadTime=[]),
        "row 1: the track has 0 hits; expected at least 1",
    ),
    "unequal": (lambda r: spoil(r, pixelID=r["pixelID"][:-1]), r"row 1: hit lists differ in length: pmtID \d+, pixel"),
    "too many": (
        lambda r: spoil(r, NHits=249, **{n: np.resize(r[n], 249) for n in ("pmtID", "pixelID", "leadTime")}),
        "row 1: 249 hits with SOS and EOS are 251 tokens; expected at most 250",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_values_raise_one_line(tokenizer, case):
    change, message = HOSTILE[case]
    records = make_records(3, low=10)
    records[1] = change(records[1])
    for rows in (records, to_lists(records), to_columns(to_lists(records))):
        with pytest.raises(ValueError, match=message) as error:
            tokenizer(rows)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_tracks_are_dropped_on_request(case):
    tokenizer = CMHCADircTokenizer()
    records = make_records(3, low=10)
    expected = tokenizer([records[0], records[2]], padding=True)
    records[1] = HOSTILE[case][0](records[1])
    encoding = tokenizer(records, padding=True, on_invalid="drop_tracks", return_row_index=True)
    assert encoding.pop("row_index").tolist() == [0, 2]
    for name in expected:
        np.testing.assert_array_equal(encoding[name], expected[name])
    assert sum(tokenizer.dropped.values()) == 1 and next(iter(tokenizer.dropped)).startswith("track:")
    with pytest.raises(ValueError, match="the record was dropped: track:"):
        tokenizer(records[1], on_invalid="drop_tracks")


def test_hostile_hits_are_dropped_on_request(tokenizer):
    tokenizer.dropped.clear()
    clean = make_records(4, low=10)
    dirty = [dict(record) for record in clean]
    junk = {"pmtID": [24, 0, 0, -1], "pixelID": [0, 256, 0, 0], "leadTime": [20.0, 20.0, np.nan, 500.0]}
    for name, values in junk.items():
        dirty[1][name] = np.concatenate([values[:2], clean[1][name], values[2:]])
    encoding = tokenizer(dirty, on_invalid="drop_hits", check_nhits=False)
    for a, b in zip(encoding["input_ids"], tokenizer(clean)["input_ids"], strict=True):
        np.testing.assert_array_equal(a, b)
    assert tokenizer.dropped == {"hit:pmtID": 2, "hit:pixelID": 1, "hit:leadTime": 1}
    tokenizer(dirty, on_invalid="drop_hits")
    assert tokenizer.dropped["repaired:NHits"] == 1
    for case in ("momentum", "pdg", "unequal", "empty", "too many"):
        records = make_records(3, low=10)
        records[1] = HOSTILE[case][0](records[1])
        with pytest.raises(ValueError, match="row 1"):
            tokenizer(records, on_invalid="drop_hits")
    lost = {**clean[0], "leadTime": np.full(clean[0]["NHits"], 1.0)}
    with pytest.raises(ValueError, match=r"row 0: all \d+ hits are invalid"):
        tokenizer([lost], on_invalid="drop_hits")


def test_hostile_values_never_become_special_tokens(tokenizer):
    rng = np.random.default_rng(3)
    extremes = np.array([-np.inf, -1e30, -1, 0, 8.99, 9, 156.999, 157, 157.1, 1e9, np.inf, np.nan, 6145, 255, 23])
    for _ in range(50):
        n = int(rng.integers(1, 30))
        record = {"P": 5.0, "Theta": 60.0, **{k: rng.choice(extremes, n) for k in ("pmtID", "pixelID", "leadTime")}}
        for name, good in (("pmtID", 3), ("pixelID", 4), ("leadTime", 50.0)):
            record[name][0] = good
        ids = tokenizer(record, on_invalid="drop_hits")["input_ids"][3:-1]
        assert len(ids) >= 1
        assert ids[:, 0].min() >= 1 and ids[:, 0].max() <= 6144
        assert ids[:, 1].min() >= 1 and ids[:, 1].max() <= 5920


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("a track", "expected a record dict, a list of records or a dict of columns, got str"),
        (5, "got int"),
        (None, "got NoneType"),
        ([1, 2], "row 0: expected a record dict, got int"),
        ({}, "empty dict"),
        ({"P": [1.0, 2.0], "Theta": [30.0]}, "columns differ in length: P has 2 rows, Theta has 1"),
        ({"P": [1.0], "leadTime": 3.0}, "column leadTime: expected one value per row"),
        ([{"P": 1.0}, {"Theta": 1.0}], "row 1: field P is missing"),
        ([{"P": 1.0}, {"P": 1.0, "NHits": 1}], "row 0: field NHits is missing"),
    ],
)
def test_hostile_rows(tokenizer, rows, message):
    with pytest.raises(ValueError, match=message):
        tokenizer(rows)


@pytest.mark.parametrize("name", ["P", "Theta", "pmtID", "pixelID", "leadTime"])
def test_hostile_missing_columns(tokenizer, name):
    records = make_records(2)
    for record in records:
        del record[name]
    for rows in (records, to_columns(records)):
        with pytest.raises(ValueError, match=f"column {name} is missing; the rows have"):
            tokenizer(rows)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pmtID": "abc"}, "row 0: pmtID must be a flat list of numbers, got 'abc'"),
        ({"pmtID": None}, "row 0: pmtID must be a flat list of numbers, got None"),
        ({"pmtID": [1, "2"]}, r"row 0: pmtID\[1\] must be a number, got '2'"),
        ({"pmtID": [1, True]}, r"row 0: pmtID\[1\] must be a number, got True"),
        ({"pmtID": [1, [2]]}, r"row 0: pmtID\[1\] must be a number, got \[2\]"),
        ({"pmtID": np.zeros((2, 2))}, "row 0: pmtID must be a flat list"),
        ({"leadTime": [1, None]}, r"row 0: leadTime\[0\] = 1 ns is outside"),
        ({"leadTime": [10, None]}, r"row 0: leadTime\[1\] = nan ns is outside"),
        ({"leadTime": [10, 10**400]}, r"row 0: leadTime\[1\] is too large"),
        ({"P": "fast"}, "row 0: P must be a number, got 'fast'"),
        ({"P": 10**400}, "row 0: P is too large"),
    ],
)
def test_hostile_types(tokenizer, changes, message):
    record = {"P": 5.0, "Theta": 60.0, "pmtID": [1, 2], "pixelID": [1, 2], "leadTime": [10.0, 20.0], **changes}
    with pytest.raises(ValueError, match=message):
        tokenizer([record])


def test_hostile_arguments(tokenizer):
    records = make_records(3)
    for arguments, message in (
        ({"padding": "wide"}, "padding must be"),
        ({"on_invalid": "ignore"}, "on_invalid must be"),
        ({"max_length": 2}, "max_length must be an integer of at least 3, got 2"),
        ({"max_length": 20.5}, "max_length must be an integer of at least 3, got 20.5"),
        ({"padding_side": "top"}, "padding_side must be"),
        ({"pad_to_multiple_of": 0, "padding": True}, "pad_to_multiple_of must be"),
        ({"return_tensors": "tf", "padding": True}, "return_tensors must be"),
        ({"return_tensors": "pt"}, "set padding=True"),
        ({"text_pair": "x"}, "unknown argument 'text_pair'"),
        ({"return_hit_labels": True}, "column is_noise is missing"),
    ):
        with pytest.raises(ValueError, match=message):
            tokenizer(records, **arguments)
    del records[0]["PDG"], records[1]["PDG"], records[2]["PDG"]
    with pytest.raises(ValueError, match="column PDG is missing"):
        tokenizer(records, return_class_ids=True)
    with pytest.raises(ValueError, match="encodes tracks, not text"):
        tokenizer.tokenize("some words")


def test_hostile_configurations():
    for arguments, message in (
        ({"time_min": 157.0}, "time_min < time_max"),
        ({"time_max": float("nan")}, "time_min < time_max"),
        ({"time_resolution": 0.0}, "time_resolution must be positive"),
        ({"time_vocab_size": 5922}, "time_vocab_size must be at least 5923"),
        ({"space_vocab_size": 6146}, "space_vocab_size must be at least 6147"),
        ({"conditioning_names": ("P",)}, "conditioning_names has 1 entries, conditioning_ranges has 2"),
        ({"conditioning_ranges": ((1, 1), (25, 160))}, "P needs min < max"),
        ({"class_pdg": (211, -211)}, "must not repeat"),
        ({"time_encoding": "fourier"}, "time_encoding must be"),
        ({"geometry": {"pmts": 3}}, "unknown field 'pmts'"),
        ({"geometry": 5}, "geometry must be a dict of its fields, got 5"),
        ({"time_min": "early"}, "time_min must be a number of ns, got 'early'"),
        ({"time_resolution": 1e-300}, "time_vocab_size must be at least 148"),
        ({"space_vocab_size": 6147.7}, "space_vocab_size must be an integer"),
        ({"space_vocab_size": 10**12}, r"space_vocab_size must be an integer in 1\.\.16777216"),
        ({"time_vocab_size": 10**12}, r"time_vocab_size must be an integer in 1\.\.16777216"),
        ({"conditioning_ranges": (5, 10)}, "conditioning_ranges must be a list of pairs"),
        ({"conditioning_ranges": ((0, np.inf), (25, 160))}, "P needs min < max, got"),
        ({"conditioning_names": ("P", "P")}, "conditioning_names must be a list of different names"),
        ({"class_pdg": 211}, "class_pdg must be a list of integers, got 211"),
        ({"class_pdg": (211.5, 321)}, "class_pdg must be an integer"),
        ({"stream_delays": 3}, "stream_delays must be a list of integers, got 3"),
        ({"stream_delays": (0, 300)}, "model_max_length must be an integer of at least 303, got 250"),
        ({"model_max_length": 0}, "model_max_length must be an integer of at least 3, got 0"),
        ({"model_max_length": "long"}, "model_max_length must be an integer of at least 3, got 'long'"),
    ):
        with pytest.raises(ValueError, match=message):
            CMHCADircTokenizer(**arguments)


# --- pad -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
def test_pad_equals_padding_at_encoding(side):
    tokenizer = CMHCADircTokenizer(padding_side=side)
    records = make_records()
    ragged = tokenizer(records)
    features = [{name: ragged[name][i] for name in ragged} for i in range(len(records))]
    plain = [{k: v.tolist() for k, v in feature.items()} for feature in features]
    expected = tokenizer(records, padding=True, return_tensors="pt")
    for batch in (features, plain, ragged, {k: list(v) for k, v in ragged.items()}):
        padded = tokenizer.pad(batch, return_tensors="pt")
        assert list(padded) == list(expected)
        for name in expected:
            assert padded[name].dtype == expected[name].dtype and torch.equal(padded[name], expected[name])
    collated = DataCollatorWithPadding(tokenizer, padding="max_length", max_length=100)(plain)
    assert collated["input_ids"].shape == (8, 102, 2) and collated["kinematics"].dtype == torch.float32
    for feature in plain:
        del feature["attention_mask"]
    assert torch.equal(tokenizer.pad(plain, return_tensors="pt")["attention_mask"], expected["attention_mask"])
    assert tokenizer.pad(features, pad_to_multiple_of=8)["input_ids"].shape[1] % 8 == 0
    again = tokenizer.pad(tokenizer(records, padding=True))
    np.testing.assert_array_equal(again["attention_mask"], expected["attention_mask"])


def test_pad_labels(tokenizer):
    ragged = tokenizer(make_records(3), return_class_ids=False)
    for shape in ((), (2,)):
        features = [
            {"input_ids": ids, "labels": np.ones((len(ids), *shape), dtype=int), "weight": 0.5}
            for ids in ragged["input_ids"]
        ]
        padded = tokenizer.pad(features)
        assert padded["labels"].shape == padded["attention_mask"].shape + shape
        assert (padded["labels"][padded["attention_mask"] == 0] == -100).all()
        assert padded["weight"].dtype == np.float32
    per_track = [{"input_ids": ids, "labels": i} for i, ids in enumerate(ragged["input_ids"])]
    assert tokenizer.pad(per_track)["labels"].tolist() == [0, 1, 2]


def test_hostile_features(tokenizer):
    ids = np.zeros((5, 2), dtype=int)
    for features, message in (
        ([{"kinematics": [1, 2]}], "input_ids is missing"),
        ([{"input_ids": np.zeros(5, dtype=int)}], r"feature 0: input_ids must be integers of shape \(length, 2\)"),
        ([{"input_ids": np.zeros((5, 3), dtype=int)}], "feature 0: input_ids"),
        ([{"input_ids": np.zeros((5, 2))}], "got float64"),
        ([{"input_ids": ids}, {"input_ids": ids, "class_ids": 1}], "feature 1: key class_ids"),
        ([{"input_ids": ids, "attention_mask": [1]}], r"feature 0: attention_mask has shape \(1,\), expected \(5,\)"),
        ([{"input_ids": ids, "kinematics": [1, 2]}, {"input_ids": ids, "kinematics": [1]}], "feature 1: kinematics"),
    ):
        with pytest.raises(ValueError, match=message):
            tokenizer.pad(features)
    with pytest.raises(ValueError, match="feature 0: 5 positions, slots included; expected at most 4"):
        tokenizer.pad([{"input_ids": ids}], padding="max_length", max_length=2)
    with pytest.raises(ValueError, match="padding=False needs equal lengths"):
        tokenizer.pad([{"input_ids": ids}, {"input_ids": ids[:3]}], padding=False)


def test_datasets_map_and_fingerprint(tokenizer, tmp_path):
    records = make_records(30)
    for record in records:
        record["pmtID"] = record["pmtID"].astype(int)
        record["pixelID"] = record["pixelID"].astype(int)
    data = Dataset.from_list(to_lists(records))
    data.save_to_disk(tmp_path / "data")
    data = Dataset.load_from_disk(tmp_path / "data")
    encoded = data.map(tokenizer, batched=True, batch_size=7, remove_columns=data.column_names)
    expected = tokenizer(records, padding=True, return_tensors="pt")
    batch = DataCollatorWithPadding(tokenizer)([encoded[i] for i in range(30)])
    for name in expected:
        assert torch.equal(batch[name], expected[name])
    for form in ("numpy", "torch"):
        formatted = data.with_format(form).map(tokenizer, batched=True, remove_columns=data.column_names)
        np.testing.assert_array_equal(np.asarray(formatted.with_format(None)[3]["input_ids"]), encoded[3]["input_ids"])
    # Counts must not change what datasets takes as the identity of the tokenizer.
    before = pickle.dumps(copy.deepcopy(tokenizer))
    tokenizer.dropped["hit:leadTime"] += 1
    assert pickle.dumps(copy.deepcopy(tokenizer)) == before
    tokenizer.dropped.clear()


# --- decoding ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["numpy", "torch", "ragged", "lists"])
def test_decode_inverts_encode(tokenizer, form):
    records = make_records(20)
    encoding = tokenizer(records, padding=True)
    ids = encoding["input_ids"]
    ids = {
        "numpy": lambda: ids,
        "torch": lambda: torch.from_numpy(ids),
        "ragged": lambda: tokenizer(records)["input_ids"],
        "lists": lambda: ids.tolist(),
    }[form]()
    columns = tokenizer.batch_decode(ids, kinematics=encoding["kinematics"], class_ids=encoding["class_ids"])
    assert columns["row_index"].tolist() == list(range(20))
    assert columns["PDG"].tolist() == [abs(record["PDG"]) for record in records]
    for i, record in enumerate(records):
        order = np.argsort(record["leadTime"], kind="stable")
        for name in ("pmtID", "pixelID"):
            np.testing.assert_array_equal(columns[name][i], record[name][order])
            assert columns[name][i].dtype == np.int16
        np.testing.assert_array_equal(columns["channel"][i], (record["pmtID"] * 256 + record["pixelID"])[order])
        assert np.abs(columns["leadTime"][i] - record["leadTime"][order]).max() <= 0.0125 + 1e-5
        assert columns["NHits"][i] == record["NHits"] and columns["P"][i] == np.float32(record["P"])
    again = tokenizer(columns, padding=True)
    for name in encoding:
        np.testing.assert_array_equal(again[name], encoding[name])


def test_every_bin_survives_decoding_and_encoding(tokenizer):
    bins = np.arange(1, 5921)
    for rng in (None, np.random.default_rng(0)):
        ids = np.stack([np.ones_like(bins), bins], axis=-1)[None]
        times = tokenizer.batch_decode(ids, rng=rng)["leadTime"][0]
        assert times.min() >= 9 and times.max() < 157
        again = tokenizer.times_to_tokens(times)
        if rng is None:
            np.testing.assert_array_equal(again, bins)
        else:
            # float32 can move a time drawn next to an edge across it.
            assert np.mean(again != bins) < 0.01 and np.abs(again - bins).max() <= 1
            centres = tokenizer.tokens_to_times(bins)
            assert np.abs(times - centres).max() <= 0.0125 + 1e-5 and (times - centres).std() > 0.006
    late = CMHCADircTokenizer(legacy_time_decoding=True)
    np.testing.assert_allclose(late.tokens_to_times(bins[:-1]), tokenizer.tokens_to_times(bins[:-1]) + 0.025, atol=1e-9)
    assert late.tokens_to_times(5920) == 157.0
    assert late.batch_decode(ids)["leadTime"][0].max() == 157.0


def test_decode_ignores_positions_with_a_special_token(tokenizer):
    ids = np.array([[0, 0], [5, 7], [0, 7], [5, 0], [SPACE_EOS, 7], [5, TIME_EOS], [6, 8], [SPACE_PAD, TIME_PAD]])
    record = tokenizer.decode(ids, kinematics=[6.0, 30.0], pdg=-321)
    assert record["NHits"] == 2 and record["channel"].tolist() == [4, 5]
    assert (record["P"], record["Theta"], record["Phi"], record["PDG"]) == (6.0, 30.0, 0.0, -321)
    assert tokenizer.decode(ids.tolist(), skip_special_tokens=True)["NHits"] == 2
    unknown = tokenizer.decode(ids)
    assert np.isnan(unknown["P"]) and unknown["PDG"] == -1
    many = tokenizer.batch_decode([ids, ids[:2], ids[:1]], min_hits=1, max_hits=1)
    assert many["row_index"].tolist() == [1] and many["NHits"].tolist() == [1]
    assert tokenizer.batch_decode([ids[:1]])["NHits"].tolist() == [0]
    assert tokenizer.batch_decode([])["NHits"].tolist() == []


def test_hostile_ids(tokenizer):
    good = np.array([[5, 7]])
    for ids, arguments, message in (
        ([[[6147, 1]]], {}, "row 0: space id 6147 is outside 0..6146"),
        ([good, [[1, 5923]]], {}, "row 1: time id 5923 is outside 0..5922"),
        ([[[-1, 1]]], {}, "row 0: space id -1"),
        (np.zeros((3, 4)), {}, r"ids must have shape \(batch, length, 2\), got \(3, 4\)"),
        ([[[0.5, 1.0]]], {}, "row 0: ids must be integers"),
        ([good], {"kinematics": np.zeros((2, 2))}, r"kinematics must have shape \(1, 2\) or \(2,\)"),
        ([good], {"pdg": [211, 211]}, "pdg must be one integer or 1 of them"),
        ([good], {"class_ids": [2]}, "class_ids must be in 0..1"),
        ([good], {"class_ids": [0.5]}, "class_ids must be one integer or 1 of them, got float64"),
        ([good], {"class_ids": [0, 1]}, "class_ids must be one integer or 1 of them"),
        ([good], {"kinematic": [6.0, 30.0]}, "unknown argument 'kinematic'"),
        ([good], {"class_ids": [1], "pdg": 211}, "either pdg or class_ids"),
        ([good], {"times": [[1.0]]}, "times belongs to time_encoding='regression'"),
    ):
        with pytest.raises(ValueError, match=message):
            tokenizer.batch_decode(ids, **arguments)
    with pytest.raises(ValueError, match="number of hits outside"):
        tokenizer.decode(good, min_hits=2)


# --- variants --------------------------------------------------------------------------------------------------------


def test_regression_times():
    tokenizer = CMHCADircTokenizer(time_encoding="regression")
    assert tokenizer.num_streams == 1
    records = make_records(4)
    encoding = tokenizer(records, padding=True, return_tensors="pt")
    categorical = CMHCADircTokenizer()(records, padding=True, return_tensors="pt")
    assert torch.equal(encoding["input_ids"], categorical["input_ids"][..., :1])
    assert encoding["times"].dtype == torch.float32 and encoding["times"].shape == encoding["attention_mask"].shape
    ids, times = encoding["input_ids"][..., 0], encoding["times"]
    hits = (ids > 0) & (ids < SPACE_EOS)
    assert (times[~hits] == 0).all() and (times[hits] >= 0).all() and (times[hits] < 1).all()
    columns = tokenizer.batch_decode(encoding["input_ids"], times=times, kinematics=encoding["kinematics"])
    for i, record in enumerate(records):
        np.testing.assert_allclose(columns["leadTime"][i], np.sort(record["leadTime"]), atol=2e-5)
    single = tokenizer.decode(encoding["input_ids"][1], times=times[1])
    np.testing.assert_array_equal(single["leadTime"], columns["leadTime"][1])
    ragged = tokenizer(records)
    padded = tokenizer.pad(ragged, return_tensors="pt")
    assert torch.equal(padded["times"], times) and torch.equal(padded["input_ids"], encoding["input_ids"])

    legacy = CMHCADircTokenizer(time_encoding="regression", legacy_time_sentinels=True)
    times = legacy.pad(legacy(records))["times"]
    assert (times[encoding["attention_mask"].numpy() == 0] == 5922.0).all()
    assert (times[ids.numpy() == SPACE_EOS] == 5921.0).all()
    with pytest.raises(ValueError, match="needs times"):
        tokenizer.batch_decode(encoding["input_ids"])
    with pytest.raises(ValueError, match="row 0: times has a value that is not finite"):
        tokenizer.batch_decode([[[1]]], times=[[float("nan")]])


def make_gluex():
    """The GlueX DIRC (arXiv 2604.24775): 90 of 108 PMTs of 64 pixels, two boxes, azimuth as third condition."""
    return CMHCADircTokenizer(
        geometry={
            "pmt_rows": 6,
            "pmt_columns": 18,
            "pixel_rows": 8,
            "pixel_columns": 8,
            "num_boxes": 2,
            "inactive_pmts": [*range(11), *range(90, 97)],
        },
        time_min=20.5,
        time_max=350.0,
        time_resolution=0.06,
        time_vocab_size=5497,
        conditioning_names=("P", "Theta", "Phi"),
        conditioning_ranges=((0.95, 6.5), (0.90, 11.63), (-176.0, 175.5)),
        model_max_length=180,
    )


def test_gluex_by_configuration_alone(tmp_path):
    tokenizer = make_gluex()
    assert (tokenizer.vocab_size, tokenizer.eos_token_id, tokenizer.pad_token_id) == (5763, 5761, 5762)
    assert (tokenizer.time_eos_token_id, tokenizer.time_pad_token_id) == (5495, 5496)
    assert (tokenizer.num_conditioning_tokens, tokenizer.prefix_length) == (3, 4)
    pmt = np.concatenate([np.arange(11, 90), np.arange(97, 108)])
    pixel = np.arange(len(pmt)) % 64
    token = pmt * 64 + pixel + 1 - 11 * 64
    token = np.where(token > 79 * 64, token - 7 * 64, token)
    np.testing.assert_array_equal(tokenizer.pixels_to_tokens(pmt, pixel), token)
    np.testing.assert_array_equal(tokenizer.pixels_to_tokens(pmt + 108, pixel), token)
    np.testing.assert_array_equal(np.stack(tokenizer.tokens_to_pixels(token)), np.stack([pmt, pixel]))

    rng = np.random.default_rng(0)
    times = np.sort(rng.uniform(20.5, 350, 90))
    record = {
        "P": 3.0,
        "Theta": 5.0,
        "Phi": -170.0,
        "PDG": 321,
        "pmtID": pmt + 108,
        "pixelID": pixel,
        "leadTime": times,
    }
    encoding = tokenizer(record)
    ids = encoding["input_ids"]
    assert ids.shape == (95, 2) and not ids[:4].any() and ids[-1].tolist() == [5761, 5495]
    np.testing.assert_array_equal(ids[4:-1, 0], token)
    np.testing.assert_array_equal(encoding["kinematics"], np.float32([3, 5, -170]))
    assert ids[4:-1, 1].max() <= tokenizer.num_time_bins
    decoded = tokenizer.decode(ids, kinematics=encoding["kinematics"], pdg=321)
    np.testing.assert_array_equal(decoded["pmtID"], pmt)
    assert np.abs(decoded["leadTime"] - times).max() <= 0.03 + 1e-4 and decoded["Phi"] == -170.0
    # Unused time ids are no times.
    unused = ids.copy()
    unused[4, 1] = tokenizer.num_time_bins + 1
    assert tokenizer.decode(unused)["NHits"] == 89
    late = tokenizer({**record, "leadTime": np.full(90, 349.99999)})["input_ids"]
    assert late[4:-1, 1].max() == tokenizer.num_time_bins

    for changes, message in (
        ({"pmtID": np.full(90, 5)}, r"pmtID\[0\] = 5 is an inactive PMT"),
        ({"pmtID": np.full(90, 108 + 90)}, r"pmtID\[0\] = 198 is an inactive PMT"),
        ({"pmtID": np.full(90, 216)}, r"pmtID\[0\] = 216 is not an integer in 0..215"),
        ({"Phi": 176.0}, r"Phi = 176 is outside \[-176, 175.5\]"),
    ):
        with pytest.raises(ValueError, match=message):
            tokenizer({**record, **changes})
    tokenizer.save_pretrained(tmp_path)
    again = CMHCADircTokenizer.from_pretrained(tmp_path)
    np.testing.assert_array_equal(again(record)["input_ids"], ids)
    assert again.detector == tokenizer.detector and again.model_max_length == 180


@pytest.mark.parametrize(
    ("low", "high", "step"), [(0.0, 1.0, 0.1), (9, 157, 0.05), (-3.0, 7.0, 0.3), (20.5, 350, 0.06)]
)
def test_time_bins_of_any_range(low, high, step):
    tokenizer = CMHCADircTokenizer(time_min=low, time_max=high, time_resolution=step, time_vocab_size=9000)
    edges = tokenizer.time_edges
    assert edges[0] == low and edges[-1] > high - 1e-9 and edges[-2] < high
    times = np.concatenate([np.linspace(low, high, 5001)[:-1], [np.nextafter(high, low)]])
    record = {"P": 5.0, "Theta": 60.0, "pmtID": times * 0, "pixelID": times * 0, "leadTime": times}
    tokens = tokenizer(record, truncation=True, max_length=10_000)["input_ids"][3:-1, 1]
    assert tokens.min() == 1 and tokens.max() == tokenizer.num_time_bins and (np.diff(tokens) >= 0).all()


# --- saving ----------------------------------------------------------------------------------------------------------


def test_save_and_load(tmp_path):
    tokenizer = CMHCADircTokenizer(legacy_time_decoding=True, padding_side="left", model_max_length=100)
    tokenizer.dropped["hit:leadTime"] += 1
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert DircGeometry.from_dict(config["geometry"]) == DircGeometry()
    assert config["conditioning_ranges"] == [[0.5, 10.0], [25.0, 160.0]]
    again = CMHCADircTokenizer.from_pretrained(tmp_path)
    assert (again.padding_side, again.model_max_length, again.legacy_time_decoding) == ("left", 100, True)
    assert (again.bos_token_id, again.eos_token_id, again.pad_token_id) == (0, SPACE_EOS, SPACE_PAD)
    assert len(again) == again.vocab_size == 6147 and not again.dropped
    assert again.get_vocab() == tokenizer.get_vocab() and len(again.get_vocab()) == 6147
    assert again.convert_ids_to_tokens([0, 1, 6144, 6145]) == ["<sos>", "0:0", "23:255", "<eos>"]
    records = make_records()
    for name, values in tokenizer(records, padding=True).items():
        np.testing.assert_array_equal(again(records, padding=True)[name], values)
    again.save_pretrained(tmp_path / "again")
    second = json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())
    # The library itself notes how a tokenizer was loaded.
    assert {name: value for name, value in second.items() if name in config} == config
    assert set(second) - set(config) <= {"is_local", "local_files_only"}


def test_remote_code_without_the_package(tmp_path):
    """The saved folder carries the tokenizer's code and loads where hepzoo cannot be imported."""
    save = """
        from hepzoo.tokenization.tokenization_cmhca_dirc import CMHCADircTokenizer
        CMHCADircTokenizer.register_for_auto_class("AutoTokenizer")
        CMHCADircTokenizer(time_max=150.0).save_pretrained("saved")
    """
    load = """
        import sys
        class Blocker:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] == "hepzoo":
                    raise ModuleNotFoundError(name)
        sys.meta_path.insert(0, Blocker())
        from transformers import AutoTokenizer
        tokenizer = AutoTokenizer.from_pretrained("saved", trust_remote_code=True)
        assert type(tokenizer).__module__.startswith("transformers_modules"), type(tokenizer)
        assert tokenizer.time_max == 150.0
        record = {"P": 6, "Theta": 30, "pmtID": [2], "pixelID": [5], "leadTime": [20.01]}
        print(tokenizer(record)["input_ids"].tolist())
        assert "hepzoo" not in sys.modules
    """
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    for code in (save, load):
        run = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stderr
    saved = {path.name for path in (tmp_path / "saved").iterdir()}
    assert {"tokenization_cmhca_dirc.py", "geometry_dirc.py", "tokenizer_config.json"} <= saved
    assert run.stdout.strip() == "[[0, 0], [0, 0], [0, 0], [518, 441], [6145, 5921]]"


# --- fiducial cut --------------------------------------------------------------------------------------------------


def test_fiducial_cut():
    base = {"P": 5.0, "Theta": 60.0, "NHits": 6, "leadTime": np.linspace(10, 150, 6)}
    cases = [
        ({}, True),
        ({"P": 0.5}, False),
        ({"P": 10.0}, False),
        ({"P": 9.999}, True),
        ({"P": float("nan")}, False),
        ({"Theta": 25.0}, False),
        ({"Theta": 160.0}, False),
        ({"NHits": 5}, False),
        ({"NHits": 250}, False),
        ({"NHits": 249}, True),
        ({"leadTime": np.array([9.0, 20])}, False),
        ({"leadTime": np.array([9.0001, 156.9999])}, True),
        ({"leadTime": np.array([20, 157.0])}, False),
        ({"leadTime": np.array([20, np.nan])}, False),
        ({"leadTime": np.array([])}, False),
    ]
    rows = [{**base, **changes} for changes, _ in cases]
    expected = [keep for _, keep in cases]
    assert fiducial_cut(rows).tolist() == expected
    assert fiducial_cut(to_columns(rows)).tolist() == expected
    assert fiducial_cut(rows[0]).tolist() == [True]
    assert fiducial_cut(rows[0], time_range=(11.0, 157.0)).tolist() == [False]
    assert fiducial_cut({**base, "NHits": None}).tolist() == [False]
    del rows[0]["NHits"]
    assert fiducial_cut(rows[0]).tolist() == [True]
    assert fiducial_cut([]).shape == (0,)
