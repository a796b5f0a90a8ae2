"""Delayed streams with the other family: DIRC hits as a pixel, and its time one position later."""

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import LogitsProcessor

from hepzoo.modeling.configuration_cmhca_dirc import CMHCADircConfig
from hepzoo.modeling.generation_multistream import NEVER, StreamLogitsProcessor, StreamState
from hepzoo.modeling.modeling_cmhca_dirc import CMHCADircForCausalLM
from hepzoo.tokenization.tokenization_cmhca_dirc import CMHCADircTokenizer

# one module of 30 pixels and 30 time bins of 1 ns
PIXELS, BINS = 30, 30
GEOMETRY = {"pmt_rows": 1, "pmt_columns": 1, "pixel_rows": 5, "pixel_columns": 6}
SPACE, TIME, SLOTS = PIXELS + 3, BINS + 3, 2
EOS, PAD = (SPACE - 2, TIME - 2), (SPACE - 1, TIME - 1)
PROMPT = SLOTS + 1
KINEMATICS = torch.tensor([[6.0, 30.0], [3.0, 90.0], [9.0, 150.0], [4.0, 60.0]])
DELAYS = pytest.mark.parametrize("delays", [(0, 1), (1, 0), (0, 3)])


def make_tokenizer(delays) -> CMHCADircTokenizer:
    return CMHCADircTokenizer(
        geometry=GEOMETRY, time_min=0.0, time_max=float(BINS), time_resolution=1.0, time_vocab_size=TIME,
        model_max_length=40, stream_delays=delays,
    )  # fmt: skip


def make_model(delays, seed: int = 0, **settings) -> CMHCADircForCausalLM:
    torch.manual_seed(seed)
    config = CMHCADircConfig(
        **{
            "vocab_size": SPACE,
            "time_vocab_size": TIME,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 64,
            "max_position_embeddings": 40,
            "stream_delays": delays,
            **settings,
        }
    )
    model = CMHCADircForCausalLM(config).eval()
    with torch.no_grad():
        # untrained heads are almost flat
        model.space_head.weight *= 4
        model.time_head.weight *= 4
    return model


def generate(model, seed: int = 0, kinematics=KINEMATICS, **kwargs):
    torch.manual_seed(seed)
    return model.generate(kinematics=kinematics, return_dict_in_generate=True, **kwargs)


def toy_time(channel: np.ndarray) -> np.ndarray:
    """The time bin that belongs to a pixel."""
    return (7 * channel + 3) % BINS


def toy_tracks(count: int, seed: int = 0, hits: tuple[int, int] = (6, 7)) -> list[dict]:
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        channel = rng.choice(PIXELS, size=rng.integers(*hits), replace=False)
        channel = channel[np.argsort(toy_time(channel))]
        rows.append(
            {
                "P": 6.0,
                "Theta": 30.0,
                "PDG": 211,
                "NHits": len(channel),
                "pmtID": np.zeros(len(channel), dtype=int),
                "pixelID": channel,
                "leadTime": toy_time(channel) + 0.5,
            }
        )
    return rows


# --- what the delay is for ---


def share_of_matching_hits(delays, steps: int = 160) -> tuple[float, int]:
    """Trains on tracks whose times are functions of the pixels; the share of generated hits that obey the relation."""
    tokenizer, model = make_tokenizer(delays), make_model(delays).train()
    rows = toy_tracks(512)
    batch = tokenizer(rows, padding=True, return_tensors="pt")
    batch.pop("class_ids")
    if "labels" not in batch:
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"][..., None] == 0, -100)
        batch["labels"][:, :PROMPT] = -100
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        chosen = torch.randint(0, len(rows), (48,), generator=generator)
        model(**{name: values[chosen] for name, values in batch.items()}).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.manual_seed(2)
    ids = model.eval().generate(kinematics=KINEMATICS[:1].expand(200, -1), max_new_tokens=12)
    columns = tokenizer.batch_decode(ids)
    channel, time = np.concatenate(columns["channel"]), np.concatenate(columns["leadTime"])
    return float((toy_time(channel) == np.floor(time)).mean()), len(channel)


def test_only_with_a_delay_the_time_of_a_hit_knows_its_pixel():
    delayed, number = share_of_matching_hits((0, 1))
    assert number > 600 and delayed > 0.8, delayed
    together, number = share_of_matching_hits((0, 0))
    assert number > 600 and together < 0.4, together


# --- tokens and labels ---


@DELAYS
def test_decoding_gives_the_tracks_back(delays):
    tokenizer = make_tokenizer(delays)
    rows = toy_tracks(20, hits=(1, 12))
    for side in ("right", "left"):
        batch = tokenizer(rows, padding=True, padding_side=side, return_tensors="np")
        columns = tokenizer.batch_decode(batch["input_ids"], kinematics=batch["kinematics"])
        for row, channel, time in zip(rows, columns["channel"], columns["leadTime"], strict=True):
            np.testing.assert_array_equal(channel, row["pixelID"])
            np.testing.assert_allclose(time, row["leadTime"], atol=1e-4)


@DELAYS
def test_labels_are_the_hits_and_one_end_per_stream(delays):
    tokenizer, model = make_tokenizer(delays), make_model(delays)
    rows = toy_tracks(6, hits=(1, 12))
    batch = tokenizer(rows, padding=True, return_tensors="pt")
    for row, track in enumerate(rows):
        length = int(batch["attention_mask"][row].sum())
        assert length == PROMPT + track["NHits"] + 1 + max(delays)
        for stream, delay in enumerate(delays):
            ids, labels = batch["input_ids"][row, :, stream], batch["labels"][row, :, stream]
            first, end = PROMPT + delay, PROMPT + delay + track["NHits"]
            assert labels.ne(-100).nonzero().flatten().tolist() == list(range(first, end + 1))
            assert torch.equal(labels[first : end + 1], ids[first : end + 1]) and ids[end] == EOS[stream]
            assert not ids[:first].any() and (ids[end:length] == EOS[stream]).all()
            assert (ids[length:] == PAD[stream]).all()
    batch.pop("class_ids")
    with torch.no_grad():
        outputs = model(**batch)
    for stream, loss in enumerate(outputs.stream_losses):
        log_probs = outputs.logits[stream].log_softmax(-1)
        terms = [
            -log_probs[row, position - 1, batch["labels"][row, position, stream]]
            for row, position in (batch["labels"][..., stream] != -100).nonzero().tolist()
        ]
        torch.testing.assert_close(loss, torch.stack(terms).mean())


# --- generation ---


def manual_greedy(model, delays, steps: int) -> torch.Tensor:
    """The definition, stopping at nothing."""
    ids = torch.zeros(len(KINEMATICS), PROMPT, 2, dtype=torch.long)
    for step in range(steps):
        with torch.no_grad():
            logits = model(ids, kinematics=KINEMATICS, use_cache=False).logits
        chosen = torch.stack([stream[:, -1].argmax(-1) for stream in logits], -1)
        chosen[:, [k for k, delay in enumerate(delays) if step < delay]] = 0
        ids = torch.cat([ids, chosen[:, None]], dim=1)
    return ids


@pytest.mark.parametrize(
    "kwargs", [{}, {"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}], ids=str
)
@DELAYS
def test_greedy_is_the_definition(delays, kwargs):
    model = make_model(delays)
    output = generate(model, max_new_tokens=20, eos_token_id=None, do_sample=False, **kwargs)
    assert torch.equal(output.sequences, manual_greedy(model, delays, 20))
    assert output.num_hits.tolist() == [20 - max(delays)] * 4


@DELAYS
def test_left_padded_prompts_equal_separate_runs(delays):
    model = make_model(delays)
    ids = manual_greedy(model, delays, 16)
    lengths = [PROMPT + 8, PROMPT, PROMPT + 1, PROMPT + 5]
    longest = max(lengths)
    prompts = torch.tensor(PAD).repeat(4, longest, 1)
    for row, length in enumerate(lengths):
        prompts[row, longest - length :] = ids[row, :length]
    output = generate(model, inputs=prompts, max_new_tokens=8, eos_token_id=None, do_sample=False)
    for row, length in enumerate(lengths):
        assert torch.equal(output.sequences[row, longest - length :], ids[row, : length + 8])
    assert output.num_hits.tolist() == [length + 8 - PROMPT - max(delays) for length in lengths]


class EndAt(LogitsProcessor):
    """Draws the end of the stream for hit `hits[row]`, and never before."""

    def __init__(self, eos: int, delay: int, hits: list[int]):
        self.eos, self.delay, self.hits = eos, delay, hits

    def __call__(self, input_ids, scores):
        hit = input_ids.shape[1] - PROMPT - self.delay
        scores = scores.clone()
        for row, last in enumerate(self.hits):
            if hit == last:
                scores[row] = -torch.inf
            scores[row, self.eos] = 0.0 if hit == last else -torch.inf
        return scores


def ending_at(delays, space: list[int], time: list[int]) -> list[LogitsProcessor]:
    return [
        StreamLogitsProcessor(0, EndAt(EOS[0], delays[0], space)),
        StreamLogitsProcessor(1, EndAt(EOS[1], delays[1], time)),
    ]


@pytest.mark.parametrize("do_sample", [True, False])
@DELAYS
def test_a_row_ends_where_either_stream_ends(delays, do_sample):
    space, time = [5, 99, 0, 3], [99, 2, 99, 8]
    model, tokenizer = make_model(delays), make_tokenizer(delays)
    output = generate(
        model, do_sample=do_sample, max_new_tokens=20, logits_processor=ending_at(delays, space, time)
    )  # fmt: skip
    assert output.num_hits.tolist() == [5, 2, 0, 3]
    for row, count in enumerate((5, 2, 0, 3)):
        # at the hit that ends: what was drawn ahead of the end stays, and ends one hit later or more
        ids = output.sequences[row]
        ended = [int((ids[:, stream] == EOS[stream]).nonzero()[0, 0]) - PROMPT - delays[stream] for stream in range(2)]
        assert min(ended) == count
        length = PROMPT + count + max(delays) + 1
        assert (ids[length - 1] == torch.tensor(EOS)).all()
        assert (ids[length:] == torch.tensor(PAD)).all()
    columns = tokenizer.batch_decode(output.sequences)
    # ids 0 and pads that an untrained model draws are no hits
    for row, count in enumerate(columns["NHits"]):
        ids = output.sequences[row]
        hits = [
            [ids[PROMPT + delay + hit, stream].item() for stream, delay in enumerate(delays)]
            for hit in range(int(output.num_hits[row]))
        ]
        assert count == sum(0 < pixel <= PIXELS and 0 < bin_ <= BINS for pixel, bin_ in hits)


@DELAYS
def test_rows_of_different_length_equal_rows_alone(delays):
    model = make_model(delays)
    # an end that comes early enough on its own
    with torch.no_grad():
        model.space_head.bias[EOS[0]] += 2.0
    kinematics = torch.stack([torch.linspace(1, 9, 12), torch.linspace(30, 150, 12)], dim=-1)
    for drop in (True, False):
        together = generate(model, 3, kinematics, do_sample=False, max_new_tokens=25, drop_finished_rows=drop)
        for row in range(12):
            alone = generate(model, 3, kinematics[row : row + 1], do_sample=False, max_new_tokens=25)
            length = alone.sequences.shape[1]
            assert torch.equal(together.sequences[row, :length], alone.sequences[0])
            assert (together.sequences[row, length:] == torch.tensor(PAD)).all()
            assert together.num_hits[row] == alone.num_hits[0]


def test_an_incomplete_hit_is_not_decoded():
    delays = (0, 3)
    model, tokenizer = make_model(delays), make_tokenizer(delays)
    never = ending_at(delays, [99] * 4, [99] * 4)
    output = generate(model, max_new_tokens=9, logits_processor=never)
    assert output.num_hits.tolist() == [6] * 4
    assert all(count <= 6 for count in tokenizer.batch_decode(output.sequences)["NHits"])
    output = generate(model, max_new_tokens=2, logits_processor=never)
    assert output.num_hits.tolist() == [0] * 4 and tokenizer.batch_decode(output.sequences)["NHits"].tolist() == [0] * 4


def test_without_delay_nothing_is_counted():
    output = generate(make_model((0, 0)), max_new_tokens=5)
    assert output.num_hits is None


# --- the pattern itself ---


@pytest.mark.parametrize("seed", range(20))
def test_streams_of_random_delays(seed):
    """What `apply_delays` writes, step by step, is the pattern written at once."""
    rng = np.random.default_rng(seed)
    delays = tuple(int(d) for d in rng.permutation([0, int(rng.integers(1, 5))]))
    config = make_model(delays).config
    ends = rng.integers(0, 8, size=5)
    state = StreamState(config, torch.zeros(5, PROMPT, 2, dtype=torch.long))
    eos = torch.tensor(EOS)
    steps = 8 + max(delays) + 2
    written = []
    ending_stream = rng.integers(0, 2, size=5)
    for length in range(PROMPT, PROMPT + steps):
        drawn = torch.from_numpy(rng.integers(1, 20, size=(5, 2)))
        for row in range(5):
            stream = ending_stream[row]
            if length - PROMPT - delays[stream] == ends[row]:
                drawn[row, stream] = EOS[stream]
        written.append(state.apply_delays(drawn, length, eos))
    written = torch.stack(written, dim=1)
    assert state.end.tolist() == ends.tolist()
    for row in range(5):
        for stream, delay in enumerate(delays):
            values = written[row, :, stream]
            assert not values[:delay].any()
            # the stream that did not draw the end may be ahead of it
            ahead = max(delays[ending_stream[row]] - delay, 0) if stream != ending_stream[row] else 0
            hits = values[delay : delay + ends[row]]
            assert ((hits >= 1) & (hits < 20)).all()
            assert (values[delay + ends[row] + ahead :] == EOS[stream]).all()


def test_state_of_selected_rows():
    config = make_model((0, 1)).config
    state = StreamState(config, torch.zeros(3, PROMPT, 2, dtype=torch.long), num_hits=torch.tensor([4, 5, 6]))
    chosen = state.select(torch.tensor([False, True, True]))
    assert chosen.end.tolist() == [5, 6] and state.end.tolist() == [4, 5, 6]
    chosen.end[0] = NEVER
    assert state.end.tolist() == [4, 5, 6]
    assert chosen.num_hits(PROMPT + 4).tolist() == [3, 3] and chosen.num_hits(PROMPT).tolist() == [0, 0]


# --- bad input ---


@pytest.mark.parametrize("delays", [(1, 1), (0, 1, 2), (0,), (-1, 0), (0, -1)])
def test_hostile_delays_of_the_config(delays):
    with pytest.raises(StrictDataclassClassValidationError, match="stream_delays"):
        CMHCADircConfig(stream_delays=delays)


def test_hostile_delays_of_a_regressed_time():
    with pytest.raises(StrictDataclassClassValidationError, match="stream_delays"):
        CMHCADircConfig(stream_delays=(0, 1), time_prediction="regression")


def test_hostile_number_of_hits_below_that_of_the_prompt():
    config = make_model((0, 1)).config
    prompt = torch.full((2, PROMPT + 4, 2), 3)
    # 4 pixels, 3 times: the fourth time is still to come
    StreamState(config, prompt, num_hits=torch.tensor([4, 5]))
    with pytest.raises(ValueError, match="row 1 is 3"):
        StreamState(config, prompt, num_hits=torch.tensor([4, 3]))
    # behind the end of a track there may be ends
    prompt[1, PROMPT + 3, 0] = EOS[0]
    StreamState(config, prompt, num_hits=torch.tensor([4, 3]))
