import copy
import os
import pickle
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DataCollatorWithPadding

from hepzoo.tokenization.tokenization_spade import SORTINGS, SpadeTokenizer

MODES = ["split", "combined"]
GRIDS = [(30, 30, 30), (60, 60, 30), (120, 120, 30), (6, 5, 7)]


@pytest.fixture(scope="module", params=MODES)
def tokenizer(request):
    return SpadeTokenizer(axis_mode=request.param)


def make_showers(count=8, seed=0, low=1, high=60, nbins=(30, 30, 30)):
    rng = np.random.default_rng(seed)
    showers = []
    for n in rng.integers(low, high, count):
        cells = {name: rng.integers(0, size, n).astype(np.int16) for name, size in zip("xyz", nbins, strict=True)}
        showers.append(
            {
                "incident_energy": np.float32(rng.uniform(10, 100)),
                **cells,
                "energy": rng.lognormal(-1, 1.5, n).astype(np.float32),
                "impact_x_cm": 0.1,
            }
        )
    return showers


def in_order(shower):
    """Layers front to back, inside a layer by falling energy, as a sort by one key at a time."""
    order = sorted(range(len(shower["z"])), key=lambda i: -shower["energy"][i])
    return sorted(order, key=lambda i: shower["z"][i])


def assert_same(columns, showers, order=in_order):
    assert columns["num_hits"].tolist() == [len(shower["x"]) for shower in showers]
    for row, shower in enumerate(showers):
        hits = order(shower)
        for name in "xyz":
            assert columns[name][row].dtype == np.int16
            np.testing.assert_array_equal(columns[name][row], shower[name][hits])
        assert columns["energy"][row].dtype == np.float32
        # float32 of the logarithm: a few units in the last place
        np.testing.assert_allclose(columns["energy"][row], shower["energy"][hits], rtol=2e-6)


# --- encoding ------------------------------------------------------------------------------------------------------


def test_sequence_layout():
    shower = {"incident_energy": 50.0, "x": [3, 4], "y": [1, 2], "z": [2, 0], "energy": [1.0, np.exp(-1.5)]}
    missing, split = 31, SpadeTokenizer()
    encoding = split(shower)
    assert encoding["input_ids"].T.tolist() == [
        [missing] * 4 + [5, 4] + [missing] * 2,
        [missing] * 5 + [3, 2] + [missing],
        [missing] * 3 + [1, 3] + [missing] * 3,
    ]
    np.testing.assert_allclose(encoding["hit_energy"], [0] * 6 + [0, 0.91 * 1.5], atol=1e-6)
    assert encoding["attention_mask"].tolist() == [1] * 8
    assert encoding["incident_energy"] == np.float32(50) and encoding["incident_energy"].dtype == np.float32
    assert {name: values.dtype.name for name, values in encoding.items() if name != "incident_energy"} == {
        "input_ids": "int64",
        "attention_mask": "int64",
        "hit_energy": "float32",
    }
    combined = SpadeTokenizer(nbins=(6, 5, 7), axis_mode="combined", num_registers=1)
    encoding = combined(shower)
    last = 6 * 5 * 7 + 1
    assert encoding["input_ids"].tolist() == [[last], [last], [1 + 4 + 6 * 2], [1 + 3 + 6 + 30 * 2], [last]]
    np.testing.assert_allclose(encoding["hit_energy"], [0, 0, 0, 0, 0.91 * 1.5], atol=1e-6)


@pytest.mark.parametrize("nbins", GRIDS)
def test_vocabularies(nbins):
    split, combined = (SpadeTokenizer(nbins=nbins, axis_mode=mode) for mode in MODES)
    assert split.stream_vocab_sizes == [n + 2 for n in nbins] and split.missing_token_ids == [n + 1 for n in nbins]
    assert combined.stream_vocab_sizes == [int(np.prod(nbins)) + 2]
    corner = np.array([np.zeros(3, dtype=int), np.array(nbins) - 1])
    for tokenizer in (split, combined):
        assert tokenizer.pad_token_id == 0 and tokenizer.vocab_size == max(tokenizer.stream_vocab_sizes)
        assert len(tokenizer) == tokenizer.vocab_size == len(tokenizer.get_vocab())
        tokens = tokenizer.cells_to_tokens(corner)
        assert (tokens[0] == 1).all() and tokens[1].tolist() == [n - 1 for n in tokenizer.missing_token_ids]
        np.testing.assert_array_equal(tokenizer.tokens_to_cells(tokens), corner)
        for index in (0, 1, tokenizer.vocab_size - 1):
            assert tokenizer.convert_tokens_to_ids(tokenizer.convert_ids_to_tokens(index)) == index


@pytest.mark.parametrize("side", ["right", "left"])
def test_padded_batches(tokenizer, side):
    showers = make_showers()
    batch = tokenizer(showers, padding=True, padding_side=side, return_tensors="pt")
    ragged = tokenizer(showers)
    longest = max(len(shower["x"]) for shower in showers)
    width = tokenizer.num_positions(longest)
    assert width == 3 + longest + tokenizer.max_delay
    assert batch["input_ids"].shape == (len(showers), width, tokenizer.num_streams)
    for row, ids in enumerate(ragged["input_ids"]):
        real = batch["attention_mask"][row].bool()
        assert real[0 if side == "right" else -1] and int(real.sum()) == len(ids)
        np.testing.assert_array_equal(batch["input_ids"][row][real], ids)
        np.testing.assert_array_equal(batch["hit_energy"][row][real], ragged["hit_energy"][row])
        assert not batch["input_ids"][row][~real].any() and not batch["hit_energy"][row][~real].any()
    features = [{name: ragged[name][row] for name in ragged} for row in range(len(showers))]
    padded = tokenizer.pad(features, padding_side=side, return_tensors="pt")
    for name, values in batch.items():
        assert padded[name].dtype == values.dtype and torch.equal(padded[name], values), name
    fixed = tokenizer(showers, padding="max_length", max_length=100)
    assert fixed["input_ids"].shape[1] == tokenizer.num_positions(100)
    assert (
        tokenizer.pad(features, padding="max_length", max_length=100)["hit_energy"].shape == fixed["hit_energy"].shape
    )
    assert tokenizer(showers, padding=True, pad_to_multiple_of=64)["input_ids"].shape[1] % 64 == 0


def test_every_form_of_rows_gives_the_same(tokenizer):
    showers = make_showers()
    expected = tokenizer(showers, padding=True, return_tensors="np")
    lists = [{k: v.tolist() if isinstance(v, np.ndarray) else float(v) for k, v in row.items()} for row in showers]
    columns = {name: [row[name] for row in lists] for name in lists[0]}
    width = max(len(row["x"]) for row in showers) + 3
    array = np.zeros((len(showers), width, 4), dtype=np.float32)
    for row, shower in zip(array, showers, strict=True):
        # Padding first, and a hole: zero energy marks what is no hit, in any cell.
        place = np.r_[1, 3 : len(shower["x"]) + 2]
        row[:, :3] = 1000
        row[place] = np.stack([shower[name] for name in ("x", "y", "z", "energy")], axis=-1)
    incident = np.array([row["incident_energy"] for row in showers])
    forms = [lists, columns, {"showers": array, "incident_energy": incident}]
    forms.append({"showers": torch.from_numpy(array), "incident_energy": torch.from_numpy(incident)})
    forms.append(iter(lists))
    for rows in forms:
        ours = tokenizer(rows, padding=True, return_tensors="np")
        for name, values in expected.items():
            np.testing.assert_array_equal(ours[name], values)
    for single in (lists[2], {"showers": array[2], "incident_energy": incident[2]}):
        one = tokenizer(single)
        np.testing.assert_array_equal(one["input_ids"], tokenizer(showers)["input_ids"][2])
    assert tokenizer([], padding=True)["input_ids"].shape[0] == 0
    assert tokenizer([])["input_ids"] == []


def test_sorting_modes():
    shower = {
        "incident_energy": 20.0,
        "x": np.array([5, 14, 2, 0, 15, 9]),
        "y": np.array([5, 15, 8, 0, 14, 9]),
        "z": np.array([2, 1, 2, 0, 1, 2]),
        "energy": np.array([1.0, 2.0, 3.0, 0.5, 2.0, 0.1]),
    }
    expected = {
        "layer_energy": [3, 1, 4, 2, 0, 5],
        "layer_desc_energy": [2, 0, 5, 1, 4, 3],
        "layer_x": [3, 1, 4, 2, 0, 5],
        "layer": [3, 1, 4, 0, 2, 5],
        "energy": [2, 1, 4, 0, 3, 5],
        "radius_from_ip": [1, 4, 5, 0, 2, 3],
        "layer_radius_from_ip": [3, 1, 4, 5, 0, 2],
        "none": [0, 1, 2, 3, 4, 5],
    }
    for sorting, order in expected.items():
        tokenizer = SpadeTokenizer(sorting=sorting)
        encoding = tokenizer(shower)
        decoded = tokenizer.decode(encoding["input_ids"], encoding["hit_energy"])
        for name in "xyz":
            assert decoded[name].tolist() == shower[name][order].tolist(), sorting
    assert set(SORTINGS) - set(expected) == {"random", "layer_random"}


@pytest.mark.parametrize("sorting", ["random", "layer_random"])
def test_random_sorting_is_reproducible(sorting):
    showers = make_showers(low=30)
    first, second, other = (SpadeTokenizer(sorting=sorting, seed=seed) for seed in (3, 3, 4))
    a, b = first(showers), second(showers)
    for name in ("input_ids", "hit_energy"):
        assert all(np.array_equal(x, y) for x, y in zip(a[name], b[name], strict=True))
    assert any(not np.array_equal(x, y) for x, y in zip(a["input_ids"], other(showers)["input_ids"], strict=True))
    assert any(not np.array_equal(x, y) for x, y in zip(a["input_ids"], first(showers)["input_ids"], strict=True))
    decoded = first.batch_decode(a["input_ids"], a["hit_energy"])
    for row, shower in enumerate(showers):
        assert sorted(decoded["x"][row]) == sorted(shower["x"])
        if sorting == "layer_random":
            assert decoded["z"][row].tolist() == sorted(shower["z"])
    # Drawn numbers must not change what datasets takes as the identity of the tokenizer.
    assert pickle.dumps(first) == pickle.dumps(SpadeTokenizer(sorting=sorting, seed=3))


def test_threshold_and_zero_energies(tokenizer):
    chosen = SpadeTokenizer(axis_mode=tokenizer.axis_mode, energy_threshold=0.1)
    shower = {"incident_energy": 20, "x": [1, 2, 3, 4], "y": [0] * 4, "z": [0] * 4, "energy": [0.0, 0.05, 0.1, 0.2]}
    encoding = chosen(shower)
    assert chosen.decode(encoding["input_ids"], encoding["hit_energy"])["x"].tolist() == [4]
    # A hit at the threshold, as float32 holds it, is none. What is 0 is padding and not counted.
    assert chosen.dropped == {"hit:below_threshold": 2}
    encoding = tokenizer(shower)
    assert tokenizer.decode(encoding["input_ids"], encoding["hit_energy"])["x"].tolist() == [4, 3, 2]
    assert not tokenizer.dropped


def test_truncation_keeps_the_first_in_sorting_order(tokenizer):
    chosen = SpadeTokenizer(axis_mode=tokenizer.axis_mode)
    showers = make_showers(low=12, high=40)
    encoding = chosen(showers, truncation=True, max_length=12)
    assert chosen.dropped["hit:truncated"] == sum(len(shower["x"]) - 12 for shower in showers)
    decoded = chosen.batch_decode(encoding["input_ids"], encoding["hit_energy"])
    for row, shower in enumerate(showers):
        np.testing.assert_array_equal(decoded["x"][row], shower["x"][in_order(shower)][:12])


def test_legacy_truncation_cuts_the_streams():
    """Published behaviour: at most L positions, so that the last hits lack y, x and energy."""
    shower = make_showers(1, low=30, high=31)[0]
    tokenizer = SpadeTokenizer(legacy_pad_length=20)
    encoding = tokenizer(shower, padding="max_length")
    assert encoding["input_ids"].shape == (22, 3) and tokenizer.num_positions(30) == 22
    np.testing.assert_array_equal(encoding["input_ids"][3:, 2], shower["z"][in_order(shower)][:19] + 1)
    assert tokenizer.dropped == {"hit:truncated": 10}
    decoded = tokenizer.decode(encoding["input_ids"], encoding["hit_energy"])
    np.testing.assert_array_equal(decoded["x"], shower["x"][in_order(shower)][:16])


# --- decoding ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nbins", GRIDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("side", ["right", "left"])
def test_decode_inverts_encode(nbins, mode, side):
    tokenizer = SpadeTokenizer(nbins=nbins, axis_mode=mode, padding_side=side)
    showers = make_showers(nbins=nbins)
    incident = np.array([shower["incident_energy"] for shower in showers])
    for padding in (True, "max_length", False):
        batch = tokenizer(showers, padding=padding)
        columns = tokenizer.batch_decode(batch["input_ids"], batch["hit_energy"], batch["incident_energy"])
        assert_same(columns, showers)
        np.testing.assert_array_equal(columns["incident_energy"], incident)
        assert columns["row_index"].tolist() == list(range(len(showers)))
    again = tokenizer(columns, padding=True)
    np.testing.assert_array_equal(again["input_ids"], tokenizer(showers, padding=True)["input_ids"])


@settings(max_examples=60, deadline=None)
@given(
    hits=st.lists(
        st.tuples(
            st.integers(0, 5),
            st.integers(0, 4),
            st.integers(0, 6),
            st.floats(2.0**-100, 2.0**100, width=32),
        ),
        min_size=1,
        max_size=12,
    ),
    mode=st.sampled_from(MODES),
    registers=st.integers(0, 3),
    delays=st.lists(st.integers(0, 4), min_size=4, max_size=4),
)
def test_round_trip_of_any_shower(hits, mode, registers, delays):
    streams = delays[:3] if mode == "split" else delays[:1]
    tokenizer = SpadeTokenizer(
        nbins=(6, 5, 7), axis_mode=mode, num_registers=registers, stream_delays=streams, energy_delay=delays[3]
    )
    columns = [np.array(values) for values in zip(*hits, strict=True)]
    shower = {"incident_energy": 1.0, **dict(zip(("x", "y", "z", "energy"), columns, strict=True))}
    encoding = tokenizer(shower)
    assert encoding["input_ids"].shape[0] == registers + 1 + len(hits) + max(*streams, delays[3])
    decoded = tokenizer.decode(encoding["input_ids"], encoding["hit_energy"], incident_energy=1.0)
    order = in_order(shower)
    for name in "xyz":
        assert decoded[name].tolist() == shower[name][order].tolist()
    np.testing.assert_allclose(decoded["energy"], shower["energy"][order], rtol=1e-5)


@pytest.mark.parametrize(
    "transform", [{"log": False, "subtract": 2.0, "multiply": 0.5}, {"log": True, "subtract": 0, "multiply": 1}]
)
def test_energy_transforms(transform, tmp_path):
    SpadeTokenizer(energy_transform=transform).save_pretrained(tmp_path)
    tokenizer = SpadeTokenizer.from_pretrained(tmp_path)
    energy = np.array([0.1, 3.0, 40.0])
    values = np.log(energy) if transform["log"] else energy
    np.testing.assert_allclose(
        tokenizer.transform_energy(energy), (values - transform["subtract"]) * transform["multiply"]
    )
    np.testing.assert_allclose(tokenizer.inverse_transform_energy(tokenizer.transform_energy(energy)), energy)


def test_generated_output_and_number_of_hits(tokenizer):
    showers = make_showers(low=5)
    batch = tokenizer(showers, padding=True, return_tensors="pt")
    limit = torch.tensor([0, 3, 500, 1, 2, 3, 4, 5])
    output = SimpleNamespace(
        sequences=batch["input_ids"], continuous={"hit_energy": batch["hit_energy"]}, num_hits=limit
    )
    columns = tokenizer.batch_decode(output, incident_energy=50.0)
    lengths = [len(shower["x"]) for shower in showers]
    assert columns["num_hits"].tolist() == [min(n, int(k)) for n, k in zip(lengths, limit, strict=True)]
    for row, shower in enumerate(showers):
        np.testing.assert_array_equal(columns["z"][row], shower["z"][in_order(shower)][: limit[row]])
    assert columns["incident_energy"].tolist() == [50.0] * len(showers)
    output.num_hits = None
    assert tokenizer.batch_decode(output)["num_hits"].tolist() == lengths
    # one sequence
    record = tokenizer.decode(batch["input_ids"][1], batch["hit_energy"][1], num_hits=3, incident_energy=20.0)
    assert record["num_hits"] == 3 == len(record["x"]) and record["incident_energy"] == 20.0
    assert tokenizer.decode(batch["input_ids"], batch["hit_energy"])["num_hits"].tolist() == lengths


def test_decode_leaves_out_incomplete_hits():
    tokenizer = SpadeTokenizer()
    shower = make_showers(1, low=6, high=7)[0]
    encoding = tokenizer(shower)
    ids, energy, order = encoding["input_ids"].copy(), encoding["hit_energy"], in_order(shower)
    # y of hit 2 MISSING; the sequence ends before the energy of hit 5; before that of hit 4 with PAD behind
    ids[tokenizer.prefix_length + 2 + 2, 1] = 31
    assert tokenizer.decode(ids, energy)["x"].tolist() == shower["x"][np.delete(order, 2)].tolist()
    assert tokenizer.decode(ids, energy, num_hits=4)["x"].tolist() == shower["x"][np.delete(order, 2)][:3].tolist()
    assert tokenizer.decode(ids[:-1], energy[:-1])["num_hits"] == 4
    ids[-2:] = 0
    assert tokenizer.decode(ids, energy)["num_hits"] == 3
    assert tokenizer.decode(np.zeros((5, 3), dtype=int), np.zeros(5))["num_hits"] == 0


# --- configuration, saving, datasets -------------------------------------------------------------------------------


def test_from_model_config():
    config = SimpleNamespace(
        nbins=[6, 5, 7], axis_mode="combined", num_registers=1, max_num_hits=40, stream_delays=None, energy_delay=None
    )
    tokenizer = SpadeTokenizer.from_model_config(config, sorting="energy")
    assert (tokenizer.nbins, tokenizer.axis_mode, tokenizer.num_registers) == ([6, 5, 7], "combined", 1)
    assert (tokenizer.model_max_length, tokenizer.stream_delays, tokenizer.energy_delay) == (40, [0], 1)
    assert tokenizer.sorting == "energy"
    assert SpadeTokenizer.from_model_config(config, axis_mode="split").stream_delays == [1, 2, 0]


def test_save_and_load(tmp_path):
    tokenizer = SpadeTokenizer(nbins=(6, 5, 7), sorting="layer_x", energy_threshold=0.1, legacy_pad_length=30)
    tokenizer.save_pretrained(tmp_path)
    loaded = SpadeTokenizer.from_pretrained(tmp_path)
    for name in ("nbins", "stream_delays", "energy_delay", "energy_transform", "sorting", "energy_threshold"):
        assert getattr(loaded, name) == getattr(tokenizer, name), name
    assert loaded.legacy_pad_length == 30 and loaded.model_max_length == 1700
    showers = make_showers(nbins=(6, 5, 7))
    for ours, theirs in zip(loaded(showers)["input_ids"], tokenizer(showers)["input_ids"], strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_remote_code_without_the_package(tmp_path):
    """The saved folder carries the tokenizer's code and loads where hepzoo cannot be imported."""
    SpadeTokenizer(nbins=(6, 5, 7)).save_pretrained(tmp_path / "saved")
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
        print(tokenizer({"incident_energy": 9, "x": [0], "y": [1], "z": [2], "energy": [1]})["input_ids"].tolist())
        assert "hepzoo" not in sys.modules
    """
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(load)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    missing = [7, 6, 8]
    expected = [missing] * 3 + [[7, 6, 3], [1, 6, 8], [7, 2, 8], missing]
    assert run.stdout.strip() == str(expected)


def test_datasets_map_and_fingerprint(tokenizer, tmp_path):
    showers = make_showers(20)
    rows = [{k: v.tolist() if isinstance(v, np.ndarray) else float(v) for k, v in row.items()} for row in showers]
    data = Dataset.from_list(rows)
    data.save_to_disk(tmp_path / "data")
    data = Dataset.load_from_disk(tmp_path / "data")
    encoded = data.map(tokenizer, batched=True, batch_size=7, remove_columns=data.column_names)
    expected = tokenizer(showers, padding=True, return_tensors="pt")
    batch = DataCollatorWithPadding(tokenizer)([encoded[i] for i in range(20)])
    for name in expected:
        torch.testing.assert_close(batch[name], expected[name], rtol=0, atol=0)
    single = data.map(tokenizer, remove_columns=data.column_names)
    assert single[3] == encoded[3]
    for form in ("numpy", "torch"):
        formatted = data.with_format(form).map(tokenizer, batched=True, remove_columns=data.column_names)
        assert formatted.with_format(None)[3] == encoded[3]
    before = pickle.dumps(copy.deepcopy(tokenizer))
    tokenizer.dropped["hit:energy"] += 1
    assert pickle.dumps(copy.deepcopy(tokenizer)) == before
    tokenizer.dropped.clear()


# --- malformed input -----------------------------------------------------------------------------------------------

GOOD = {"incident_energy": 50.0, "x": [1, 2, 3], "y": [1, 2, 3], "z": [1, 2, 3], "energy": [1.0, 2.0, 3.0]}
# (changed fields, what the line says, reason, whether dropping hits repairs it)
HOSTILE = [
    ({"x": [1, 30, 3]}, r"row 1: x\[1\] = 30 is not an integer in 0\.\.29", "x", True),
    ({"y": [1, 2, -1]}, r"row 1: y\[2\] = -1 is not an integer in 0\.\.29", "y", True),
    ({"z": [1.5, 2, 3]}, r"row 1: z\[0\] = 1\.5 is not an integer", "z", True),
    ({"z": [1, None, 3]}, r"row 1: z\[1\] = nan is not an integer", "z", True),
    ({"x": [1, 2**70, 3]}, r"row 1: x\[1\] = 1\.18\d+e\+21 is not an integer", "x", True),
    ({"energy": [1.0, -0.5, 3.0]}, r"row 1: energy\[1\] = -0\.5 is not an energy in MeV", "energy", True),
    ({"energy": [float("nan"), 2.0, 3.0]}, r"row 1: energy\[0\] = nan is not an energy", "energy", True),
    ({"energy": [1.0, 2.0, float("inf")]}, r"row 1: energy\[2\] = inf is not an energy", "energy", True),
    ({"energy": [1.0, 2.0, 1e300]}, r"row 1: energy\[2\] = 1e\+300 is not an energy", "energy", True),
    ({"energy": [1.0, -1e-300, 3.0]}, r"row 1: energy\[1\] = -1e-300 is not an energy", "energy", True),
    ({"energy": [0.0, 0.0, 0.0]}, r"row 1: none of 3 hits is valid; expected at least 1", "no_hits", False),
    ({"x": [], "y": [], "z": [], "energy": []}, r"row 1: none of 0 hits is valid", "no_hits", False),
    ({"x": [1, 2]}, r"row 1: hit lists differ in length: x 2, y 3, z 3, energy 3", "unequal_lengths", False),
    ({"incident_energy": 0.0}, r"row 1: incident_energy = 0 is not a positive energy in GeV", "incident_energy", False),
    ({"incident_energy": -5.0}, r"row 1: incident_energy = -5 is not", "incident_energy", False),
    ({"incident_energy": None}, r"row 1: incident_energy = nan is not", "incident_energy", False),
    ({"incident_energy": float("inf")}, r"row 1: incident_energy = inf is not", "incident_energy", False),
]


@pytest.mark.parametrize("changes, message, reason, repairable", HOSTILE)
@pytest.mark.parametrize("mode", MODES)
def test_hostile_values(mode, changes, message, reason, repairable):
    tokenizer = SpadeTokenizer(axis_mode=mode)
    rows = [GOOD, {**GOOD, **changes}, GOOD]
    with pytest.raises(ValueError, match=message) as error:
        tokenizer(rows)
    assert "\n" not in str(error.value)
    assert not tokenizer.dropped
    if repairable:
        encoding = tokenizer(rows, on_invalid="drop_hits")
        assert [len(ids) for ids in encoding["input_ids"]] == [tokenizer.num_positions(n) for n in (3, 2, 3)]
        assert tokenizer.dropped == {f"hit:{reason}": 1}
        tokenizer.dropped.clear()
    else:
        with pytest.raises(ValueError, match=message):
            tokenizer(rows, on_invalid="drop_hits")
    encoding = tokenizer(rows, on_invalid="drop_showers", return_row_index=True, padding=True, return_tensors="np")
    assert encoding["row_index"].tolist() == [0, 2]
    assert len(encoding["input_ids"]) == len(encoding["incident_energy"]) == 2
    assert tokenizer.dropped == {f"shower:{reason}": 1}
    with pytest.raises(ValueError, match="the record was dropped: shower:" + reason):
        tokenizer({**GOOD, **changes}, on_invalid="drop_showers")


def test_hostile_long_showers(tokenizer):
    showers = make_showers(5, low=10, high=20)
    longest = max(len(shower["x"]) for shower in showers)
    first = next(i for i, shower in enumerate(showers) if len(shower["x"]) == longest)
    with pytest.raises(ValueError, match=rf"row {first}: {longest} hits; expected at most {longest - 1}"):
        tokenizer(showers, max_length=longest - 1)
    chosen = SpadeTokenizer(axis_mode=tokenizer.axis_mode, model_max_length=longest - 1)
    assert len(chosen(showers, on_invalid="drop_showers")["input_ids"]) < 5
    assert chosen.dropped["shower:too_many_hits"] == sum(len(shower["x"]) == longest for shower in showers)


@pytest.mark.parametrize("name", list(GOOD))
def test_hostile_missing_fields(tokenizer, name):
    record = {key: value for key, value in GOOD.items() if key != name}
    for rows in (record, [GOOD, record], {key: [value] for key, value in record.items()}):
        with pytest.raises(ValueError, match=f"field {name} is missing"):
            tokenizer(rows)


@pytest.mark.parametrize(
    "rows, message",
    [
        ("shower", "expected a record dict, a list of records or a dict of columns, got str"),
        (5, "got int"),
        ([GOOD, 3], "row 1: expected a record dict, got int"),
        ({**GOOD, "x": 5}, r"row 0: x must be a flat list of numbers, got 5"),
        ({**GOOD, "x": "abc"}, r"row 0: x must be a flat list of numbers"),
        ({**GOOD, "x": ["a", 1, 2]}, r"row 0: x\[0\] must be a number, got 'a'"),
        ({**GOOD, "energy": [True, 1.0, 2.0]}, r"row 0: energy\[0\] must be a number, got True"),
        ({**GOOD, "incident_energy": "50"}, "incident_energy must be a number, got '50'"),
        ({**{k: [v] for k, v in GOOD.items()}, "y": [[1], [2]]}, "incident_energy has 1 rows, y has 2"),
        ({**{k: [v] for k, v in GOOD.items()}, "y": 3}, "column y: expected one list per row, got 3"),
        ({"showers": np.zeros((2, 3)), "incident_energy": [1.0, 2.0]}, "showers must be numbers of shape"),
        ({"showers": np.ones((2, 3, 4)), "incident_energy": 1.0}, "need one incident_energy per shower"),
        ({"showers": np.ones((2, 3, 4)), "incident_energy": [1.0]}, "incident_energy has 1 rows, x has 2"),
        ({"showers": np.ones((2, 3, 4))}, "field incident_energy is missing"),
    ],
)
def test_hostile_rows(tokenizer, rows, message):
    with pytest.raises(ValueError, match=message) as error:
        tokenizer(rows)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"on_invalid": "ignore"}, "on_invalid must be"),
        ({"padding": "some"}, "padding must be"),
        ({"padding_side": "top"}, "padding_side must be"),
        ({"max_length": 0}, "max_length must be an integer of at least 1, got 0"),
        ({"pad_to_multiple_of": 0, "padding": True}, "pad_to_multiple_of must be"),
        ({"return_tensors": "tf", "padding": True}, "return_tensors must be 'np' or 'pt'"),
        ({"text_pair": "x"}, "unknown argument 'text_pair'"),
    ],
)
def test_hostile_arguments(tokenizer, arguments, message):
    with pytest.raises(ValueError, match=message):
        tokenizer(GOOD, **arguments)
    with pytest.raises(ValueError, match="rows differ in length; set padding=True"):
        tokenizer([GOOD, {**GOOD, "x": [1], "y": [1], "z": [1], "energy": [1.0]}], return_tensors="pt")
    with pytest.raises(ValueError, match="encodes showers, not text"):
        tokenizer.tokenize("a shower")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"nbins": (30, 30)}, "nbins must have one entry for each of x, y, z"),
        ({"nbins": (30, 0, 30)}, r"nbins must be an integer in 1\.\.32767, got 0"),
        ({"nbins": (30, 30.5, 30)}, "nbins must be an integer"),
        ({"nbins": (30, 30, 40000)}, "nbins must be an integer"),
        ({"nbins": 30}, "nbins must be a list of integers, got 30"),
        ({"nbins": (30000, 30000, 3), "axis_mode": "combined"}, "2,700,000,000 cells, too many for one vocabulary"),
        ({"axis_mode": "both"}, "axis_mode must be 'split' or 'combined'"),
        ({"num_registers": -1}, "num_registers must be an integer of at least 0"),
        ({"sorting": "size"}, "sorting must be one of layer_energy"),
        ({"energy_threshold": -1}, "energy_threshold must be 0 or a positive energy"),
        ({"energy_threshold": float("nan")}, "energy_threshold must be"),
        ({"energy_threshold": "a"}, "energy_threshold must be"),
        ({"stream_delays": (1, 2)}, "stream_delays must have one entry for each of x, y, z"),
        ({"stream_delays": (1, -2, 0)}, "stream_delays must be an integer of at least 0"),
        ({"energy_delay": True}, "energy_delay must be an integer"),
        ({"legacy_pad_length": 0}, "legacy_pad_length must be"),
        ({"model_max_length": 0}, "model_max_length must be"),
        ({"energy_transform": {"log": True}}, "energy_transform must have log"),
        ({"energy_transform": "ln"}, "energy_transform must have log"),
        ({"energy_transform": {"log": 1, "subtract": 0, "multiply": 1}}, "energy_transform must have log"),
        ({"energy_transform": {"log": True, "subtract": 0, "multiply": 0}}, "energy_transform: multiply must be"),
        ({"energy_transform": {"log": True, "subtract": "a", "multiply": 1}}, "energy_transform: subtract must be"),
    ],
)
def test_hostile_configurations(arguments, message):
    with pytest.raises(ValueError, match=message):
        SpadeTokenizer(**arguments)


def test_hostile_sequences():
    tokenizer = SpadeTokenizer()
    encoding = tokenizer([GOOD, GOOD], padding=True)
    ids, energy = encoding["input_ids"], encoding["hit_energy"]
    bad_id, bad_energy = ids.copy(), energy.copy()
    bad_id[1, 4, 2] = 32
    bad_energy[1, tokenizer.prefix_length + 3 + 1] = np.nan
    huge = np.where(energy > 0, np.float32(500), energy)
    for arguments, message in (
        ((ids,), "needs hit_energy"),
        ((bad_id, energy), r"row 1: z id 32 is outside 0\.\.31"),
        ((ids[..., :2], energy), "row 0: ids must be integers of shape"),
        ((ids[0], energy), "ids must have shape"),
        ((ids.astype(float), energy), "ids must be integers"),
        ((ids, energy[:1]), "hit_energy must have shape"),
        ((ids, energy[:, :-1]), "hit_energy and ids differ in length"),
        ((ids, bad_energy), r"row 1: hit_energy of hit 1 = nan is not the transform of a finite energy"),
        ((ids, huge), r"row 0: hit_energy of hit 0 = 500 is not the transform"),
        ((ids, energy, [1.0, 2.0, 3.0]), "incident_energy must be one number or 2 of them"),
        ((ids, energy, 1.0, [1]), "num_hits must be 2 integers"),
        ((ids, energy, 1.0, [1.5, 2.0]), "num_hits must be 2 integers"),
    ):
        with pytest.raises(ValueError, match=message):
            tokenizer.batch_decode(*arguments)
    with pytest.raises(ValueError, match="unknown argument 'incidentenergy'"):
        tokenizer.batch_decode(ids, energy, incidentenergy=1.0)


def test_hostile_features(tokenizer):
    good = dict(tokenizer(GOOD))
    for features, message in (
        ([good, {k: v for k, v in good.items() if k != "hit_energy"}], "feature 1: key hit_energy is not in all"),
        ([{k: v for k, v in good.items() if k != "input_ids"}], "input_ids is missing"),
        ([{**good, "hit_energy": good["hit_energy"][:-1]}], "feature 0: hit_energy has shape"),
        ([{**good, "input_ids": good["input_ids"][..., None]}], "feature 0: input_ids must be integers"),
    ):
        with pytest.raises(ValueError, match=message):
            tokenizer.pad(features)
    with pytest.raises(ValueError, match="positions, slots included; expected at most"):
        tokenizer.pad([good], padding="max_length", max_length=2)
    unmasked = tokenizer.pad([{k: v for k, v in good.items() if k != "attention_mask"}])
    np.testing.assert_array_equal(unmasked["attention_mask"][0], good["attention_mask"])


def test_hostile_energies_between_float32_and_zero(tokenizer):
    """What float32 records cannot hold is no hit, and counted."""
    chosen = SpadeTokenizer(axis_mode=tokenizer.axis_mode)
    encoding = chosen({**GOOD, "energy": [1.0, 1e-300, 3.0]})
    assert chosen.decode(encoding["input_ids"], encoding["hit_energy"])["num_hits"] == 2
    assert chosen.dropped == {"hit:below_threshold": 1}
