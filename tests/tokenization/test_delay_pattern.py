import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hepzoo.tokenization.delay_pattern import delay_streams, undelay_streams
from hepzoo.tokenization.tokenization_cmhca_dirc import CMHCADircTokenizer

BOS, END = 90, 91


def test_published_example():
    """The table of SPADE: two hits A, B; z 0, x 1, y 2, energy 3 behind one beginning-of-sequence position."""
    tokens = np.array([[10, 20, 30], [11, 21, 31]])
    ids, totals = delay_streams(tokens, [2], (0, 1, 2), BOS, END, num_slots=0, max_delay=3)
    assert totals.tolist() == [6]
    assert ids.T.tolist() == [
        [BOS, 10, 11, END, END, END],
        [BOS, BOS, 20, 21, END, END],
        [BOS, BOS, BOS, 30, 31, END],
    ]
    energy, totals = delay_streams(np.float32([[1.5], [2.5]]), [2], (3,), 0.0, 0.0, num_slots=0, max_delay=3)
    assert totals.tolist() == [6] and energy.dtype == np.float32
    assert energy[:, 0].tolist() == [0, 0, 0, 0, 1.5, 2.5]


def test_zero_delay_is_the_plain_sequence():
    tokens = np.array([[1, 5], [2, 6], [3, 7]])
    ids, totals = delay_streams(tokens, [1, 0, 2], (0, 0), (BOS, BOS + 5), (END, END + 5), num_slots=1, num_end=1)
    assert totals.tolist() == [4, 3, 5]
    assert ids[:, 0].tolist() == [BOS, BOS, 1, END, BOS, BOS, END, BOS, BOS, 2, 3, END]
    assert ids[:, 1].tolist() == [95, 95, 5, 96, 95, 95, 96, 95, 95, 6, 7, 96]


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_undelay_inverts_delay(data):
    lengths = np.array(data.draw(st.lists(st.integers(0, 6), max_size=5)), dtype=np.int64)
    delays = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=4))
    slots, num_end, extra = (data.draw(st.integers(0, 2)) for _ in range(3))
    count = int(lengths.sum())
    tokens = np.arange(1, count * len(delays) + 1).reshape(count, len(delays))
    ids, totals = delay_streams(tokens, lengths, delays, -1, -2, slots, num_end=num_end, max_delay=max(delays) + extra)
    assert totals.tolist() == [slots + 1 + n + max(delays) + extra + num_end for n in lengths]
    values, complete = undelay_streams(ids, totals, delays, ids > 0)
    np.testing.assert_array_equal(values[complete], tokens)
    # Hit i of a row stands right behind slots and beginning, whatever the delays.
    place = np.arange(len(ids)) - np.repeat(np.cumsum(totals) - totals, totals)
    expected = [slots + 1 + i for n in lengths for i in range(n)]
    assert place[complete].tolist() == expected


def test_incomplete_hits_and_the_next_row():
    """A hit whose last stream is cut off is incomplete; the next row's entries do not fill it."""
    tokens = np.array([[1, 5], [2, 6], [3, 7]])
    ids, totals = delay_streams(tokens, [2, 1], (0, 1), 0, 0, num_slots=0)
    cut = np.delete(ids, 3, axis=0)
    values, complete = undelay_streams(cut, totals - [1, 0], (0, 1), cut > 0)
    assert values[complete].tolist() == [[1, 5], [3, 7]]


# --- a two-feature model as a configuration: DIRC hits, pixel first, then the time of the same pixel ----------------


def make_tracks(count=6, seed=0):
    rng = np.random.default_rng(seed)
    tracks = []
    for n in rng.integers(1, 30, count):
        times = rng.uniform(9, 157, n)
        tracks.append(
            {
                "P": 6.0,
                "Theta": 30.0,
                "NHits": int(n),
                "pmtID": rng.integers(0, 24, n),
                "pixelID": rng.integers(0, 256, n),
                "leadTime": times,
            }
        )
    return tracks


@pytest.mark.parametrize("delays", [(0, 1), (1, 0), (0, 3), (2, 2)])
@pytest.mark.parametrize("side", ["right", "left"])
def test_delayed_dirc_decodes_to_the_same_hits(delays, side):
    tracks = make_tracks()
    plain = CMHCADircTokenizer(padding_side=side)
    delayed = CMHCADircTokenizer(padding_side=side, stream_delays=delays)
    expected = plain.batch_decode(plain(tracks, padding=True)["input_ids"])
    batch = delayed(tracks, padding=True, return_tensors="pt")
    assert batch["input_ids"].shape[1] == max(t["NHits"] for t in tracks) + 4 + max(delays)
    slots = delayed.num_conditioning_tokens
    ragged = [ids[slots:] for ids in delayed(tracks)["input_ids"]]
    for sequences in (batch["input_ids"], ragged):
        decoded = delayed.batch_decode(sequences)
        assert set(decoded) == set(expected)
        for name in ("pmtID", "pixelID", "leadTime"):
            for ours, theirs in zip(decoded[name], expected[name], strict=True):
                np.testing.assert_array_equal(ours, theirs)


def test_delayed_dirc_labels():
    """Targets are the hits and one EOS per stream; what only fills the pattern is ignored."""
    track = {"P": 6.0, "Theta": 30.0, "pmtID": [0, 0], "pixelID": [4, 5], "leadTime": [9.01, 9.03]}
    tokenizer = CMHCADircTokenizer(stream_delays=(0, 1))
    seos, teos = tokenizer.space_eos_token_id, tokenizer.time_eos_token_id
    encoding = tokenizer(track)
    assert encoding["input_ids"].T.tolist() == [[0, 0, 0, 5, 6, seos, seos], [0, 0, 0, 0, 1, 2, teos]]
    assert encoding["labels"].T.tolist() == [[-100] * 3 + [5, 6, seos, -100], [-100] * 4 + [1, 2, teos]]
    padded = tokenizer.pad([encoding, tokenizer({**track, "pmtID": [0], "pixelID": [4], "leadTime": [9.01]})])
    assert padded["labels"].shape == padded["input_ids"].shape == (2, 7, 2)
    assert padded["labels"][1].T.tolist() == [[-100] * 3 + [5, seos, -100, -100], [-100] * 4 + [1, teos, -100]]
    np.testing.assert_array_equal(
        padded["labels"],
        tokenizer([track, {**track, "pmtID": [0], "pixelID": [4], "leadTime": [9.01]}], padding=True)["labels"],
    )
    assert "labels" not in CMHCADircTokenizer()(track)


def test_delayed_dirc_is_saved_and_limits_length(tmp_path):
    tokenizer = CMHCADircTokenizer(stream_delays=(0, 1), model_max_length=10)
    tokenizer.save_pretrained(tmp_path)
    loaded = CMHCADircTokenizer.from_pretrained(tmp_path)
    assert loaded.stream_delays == [0, 1]
    track = make_tracks(1, seed=3)[0]
    with pytest.raises(ValueError, match=f"{track['NHits'] + 3} tokens; expected at most 10"):
        loaded(track)
    encoding = loaded(track, truncation=True)
    assert len(encoding["input_ids"]) == 10 + loaded.num_conditioning_tokens
    assert len(loaded.decode(encoding["input_ids"])["pmtID"]) == 7


@pytest.mark.parametrize(
    "arguments",
    [
        {"stream_delays": (0,)},
        {"stream_delays": (0, -1)},
        {"stream_delays": (0, 0.5)},
        {"stream_delays": (0, 1), "time_encoding": "regression"},
    ],
)
def test_hostile_delays(arguments):
    with pytest.raises(ValueError, match="stream_delays"):
        CMHCADircTokenizer(**arguments)


def test_hostile_hit_labels_with_delays():
    track = {**make_tracks(1)[0], "is_noise": [0] * make_tracks(1)[0]["NHits"]}
    with pytest.raises(ValueError, match="return_hit_labels needs stream_delays 0"):
        CMHCADircTokenizer(stream_delays=(0, 1))(track, return_hit_labels=True)
