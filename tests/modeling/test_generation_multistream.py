"""Stock `generate()` with two streams: decoding, stopping, processors, caches, samplers, bad requests."""

import logging

import pytest
import torch
from scipy.stats import chisquare
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StaticCache,
    StoppingCriteria,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hepzoo.modeling.configuration_cmhca_dirc import CMHCADircConfig
from hepzoo.modeling.generation_multistream import (
    ExponentialTemperatureLogitsProcessor,
    ForbiddenTokensLogitsProcessor,
    GenerateMultiStreamOutput,
    JointLogitsProcessor,
    LinearTemperatureLogitsProcessor,
    MonotonicLogitsProcessor,
    MultiStreamEosCriteria,
    NucleusLogitsWarper,
    StreamLogitsProcessor,
    sample_from_nucleus,
    sample_from_scores,
)
from hepzoo.modeling.modeling_cmhca_dirc import CMHCADircForCausalLM

SPACE, TIME, SLOTS, POSITIONS = 131, 83, 2, 24
EOS, PAD = (SPACE - 2, TIME - 2), (SPACE - 1, TIME - 1)
PROMPT = SLOTS + 1
KINEMATICS = torch.tensor([[6.0, 30.0], [3.0, 90.0], [9.0, 150.0]])


def make_model(seed: int = 0, **settings) -> CMHCADircForCausalLM:
    torch.manual_seed(seed)
    config = CMHCADircConfig(
        **{
            "vocab_size": SPACE,
            "time_vocab_size": TIME,
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "max_position_embeddings": POSITIONS,
            "time_regression_size": 24,
            **settings,
        }
    )
    model = CMHCADircForCausalLM(config).eval()
    with torch.no_grad():
        # untrained heads are almost flat: make them opinionated, so that greedy and sampled tracks differ between rows
        for head in (model.space_head, model.time_head):
            if isinstance(head, torch.nn.Linear):
                head.weight *= 4
    return model


@pytest.fixture(scope="module")
def model():
    return make_model()


def generate(model, seed: int = 0, kinematics=KINEMATICS, **kwargs):
    torch.manual_seed(seed)
    return model.generate(kinematics=kinematics, **kwargs)


def endless(model, steps: int, **kwargs):
    """Without end of sequence, so that all rows have the same length."""
    return generate(model, max_new_tokens=steps, eos_token_id=None, **kwargs)


class ForceIds(LogitsProcessor):
    """Ends row r in one stream at step `steps[r]`, never earlier; -1 never."""

    def __init__(self, eos: int, steps: list[int], prompt_length: int = PROMPT):
        self.eos, self.steps, self.prompt_length = eos, steps, prompt_length

    def __call__(self, input_ids, scores):
        step = input_ids.shape[1] - self.prompt_length
        scores = scores.clone()
        for row, last in enumerate(self.steps):
            if step == last:
                scores[row] = -torch.inf
                scores[row, self.eos] = 0.0
            else:
                scores[row, self.eos] = -torch.inf
        return scores


def ending_at(space: list[int], time: list[int]) -> list[LogitsProcessor]:
    return [
        StreamLogitsProcessor(0, ForceIds(EOS[0], space)),
        StreamLogitsProcessor(1, ForceIds(EOS[1], time)),
    ]


# --- the loop ---


def manual_greedy(model, steps: int, kinematics=KINEMATICS) -> torch.Tensor:
    """The definition: feed everything, take the best id of each stream, stop at nothing."""
    ids = torch.zeros(len(kinematics), PROMPT, 2, dtype=torch.long)
    for _ in range(steps):
        with torch.no_grad():
            logits = model(ids, kinematics=kinematics, use_cache=False).logits
        ids = torch.cat([ids, torch.stack([stream[:, -1].argmax(-1) for stream in logits], -1)[:, None]], dim=1)
    return ids


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"use_cache": False},
        {"cache_implementation": "dynamic"},
        {"cache_implementation": "static", "disable_compile": True},
        {"past_key_values": "empty"},
        {"past_key_values": "from_config"},
        {"past_key_values": "static"},
    ],
    ids=str,
)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_greedy_is_the_same_with_every_cache(model, kwargs, implementation):
    model.set_attn_implementation(implementation)
    caches = {
        "empty": lambda: DynamicCache(),
        "from_config": lambda: DynamicCache(config=model.config),
        "static": lambda: StaticCache(config=model.config, max_cache_len=PROMPT + 20),
    }
    if "past_key_values" in kwargs:
        kwargs = {**kwargs, "past_key_values": caches[kwargs["past_key_values"]]()}
    if isinstance(kwargs.get("past_key_values"), StaticCache):
        kwargs["disable_compile"] = True
    assert torch.equal(endless(model, 20, do_sample=False, **kwargs), manual_greedy(model, 20))
    model.set_attn_implementation("sdpa")


@pytest.mark.parametrize("settings", [{"num_experts": 4}, {"num_attention_heads": [2, 4, 8]}], ids=str)
def test_greedy_of_other_architectures(settings):
    model = make_model(**settings)
    kwargs = {"class_ids": torch.tensor([0, 1, 1])} if "num_experts" in settings else {}
    outputs = [endless(model, 12, do_sample=False, use_cache=use_cache, **kwargs) for use_cache in (True, False)]
    assert torch.equal(*outputs)
    if kwargs:
        other = endless(model, 12, do_sample=False, class_ids=torch.tensor([0, 0, 1]))
        assert torch.equal(other[0], outputs[0][0]) and not torch.equal(other[1], outputs[0][1])


def test_defaults_are_the_learned_distribution(model):
    config = model.generation_config
    assert config.do_sample and config.top_k == 0 and config.top_p == 1.0 and config.temperature == 1.0
    assert config.max_new_tokens == POSITIONS
    ids = endless(model, POSITIONS)
    assert ids.shape == (3, PROMPT + POSITIONS, 2) and ids.dtype == torch.long
    assert not ids[:, :PROMPT].any()
    for stream, size in enumerate((SPACE, TIME)):
        assert ids[..., stream].max() < size


def test_default_request_raises_no_length_warning(model, caplog):
    """The slots and the last, never fed, id do not count as positions."""
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        fresh = make_model(max_position_embeddings=POSITIONS - 1)
        endless(fresh, POSITIONS - 1)
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert "maximum length" not in caplog.text


def test_distribution_of_the_first_hit(model):
    with torch.no_grad():
        logits = model(torch.zeros(1, PROMPT, 2, dtype=torch.long), kinematics=KINEMATICS[:1]).logits
    ids = generate(model, kinematics=KINEMATICS[:1].expand(20_000, -1), max_new_tokens=1)[:, -1]
    # a row that ended in one stream carries EOS in both: look at the others
    kept = (ids != torch.tensor(EOS)).all(-1)
    joint = torch.ones(())
    for stream in range(2):
        probs = logits[stream][0, -1].softmax(-1)
        joint = joint * (1 - probs[EOS[stream]])
        probs[EOS[stream]] = 0
        observed = torch.bincount(ids[kept, stream], minlength=len(probs)).double()
        check_distribution(observed, probs)
    assert kept.double().mean().item() == pytest.approx(joint.item(), abs=5 * 0.5 / 20_000**0.5)


def test_seeds_reproduce(model):
    kwargs = {"max_new_tokens": 15, "top_p": 0.9}
    first = generate(model, seed=1, **kwargs)
    assert torch.equal(first, generate(model, seed=1, **kwargs))
    assert not torch.equal(first, generate(model, seed=2, **kwargs))


def test_sampling_is_the_same_with_and_without_cache(model):
    kwargs = {"max_new_tokens": 20, "temperature": 1.05, "top_p": 0.995}
    outputs = [generate(model, seed=5, use_cache=use_cache, **kwargs) for use_cache in (True, False)]
    assert torch.equal(*outputs)


def test_bfloat16(model):
    half = make_model().to(torch.bfloat16)
    output = endless(half, 10, do_sample=True, top_p=0.9, return_dict_in_generate=True, output_scores=True)
    assert output.sequences.shape == (3, PROMPT + 10, 2)
    assert all(scores.dtype == torch.float32 for step in output.scores for scores in step)


# --- ends ---


def test_rows_stop_on_their_own_and_are_padded_with_both_pads(model):
    processors = ending_at(space=[2, 6, 99], time=[99, 99, 4])
    ids = generate(model, max_new_tokens=15, logits_processor=processors)
    # the longest row decides the length
    assert ids.shape[1] == PROMPT + 7
    for row, last in enumerate((2, 6, 4)):
        end = PROMPT + last
        assert tuple(ids[row, end].tolist()) == EOS
        assert (ids[row, end + 1 :] == torch.tensor(PAD)).all()
        assert not (ids[row, :end] == torch.tensor(EOS)).any()


def test_ended_rows_do_not_disturb_the_others(model):
    alone = generate(model, do_sample=False, max_new_tokens=15, logits_processor=ending_at([99] * 3, [99] * 3))
    ids = generate(model, do_sample=False, max_new_tokens=15, logits_processor=ending_at([1, 99, 3], [99] * 3))
    assert torch.equal(ids[1], alone[1])
    assert torch.equal(ids[2, : PROMPT + 3], alone[2, : PROMPT + 3])


def test_an_end_id_of_the_other_stream_is_an_ordinary_id(model):
    """81 ends the times, but is a pixel."""
    force = StreamLogitsProcessor(0, ForceIds(EOS[1], [3, 3, 3]))
    never = ending_at([99] * 3, [99] * 3)
    ids = generate(model, max_new_tokens=8, logits_processor=[force, *never])
    assert (ids[:, PROMPT + 3, 0] == EOS[1]).all() and ids.shape[1] == PROMPT + 8
    assert not (ids == torch.tensor(PAD)).all(-1).any()


@pytest.mark.parametrize("mode, expected", [("any", [True, True, True, False]), ("all", [True, False, False, False])])
def test_end_criterion(mode, expected):
    last = torch.tensor([list(EOS), [EOS[0], 3], [3, EOS[1]], [EOS[1], EOS[0] % TIME]])
    criterion = MultiStreamEosCriteria(torch.tensor(EOS), mode)
    ids = torch.cat([torch.tensor(EOS).expand(4, 1, 2), last[:, None]], dim=1)
    assert criterion(ids, None).tolist() == expected


def test_end_of_sequence_switched_off(model):
    processors = [StreamLogitsProcessor(0, ForceIds(EOS[0], [2, 2, 2]))]
    ids = endless(model, 6, logits_processor=processors)
    assert ids.shape[1] == PROMPT + 6
    assert not (ids[:, PROMPT + 3 :] == torch.tensor(PAD)).all(-1).all()


def test_min_new_tokens_holds_in_both_streams(model):
    with torch.no_grad():
        eager = make_model()
        eager.space_head.bias[EOS[0]] = 20.0
        eager.time_head.bias[EOS[1]] = 20.0
    assert generate(eager, max_new_tokens=12, do_sample=False).shape[1] == PROMPT + 1
    ids = generate(eager, max_new_tokens=12, min_new_tokens=5, do_sample=False)
    assert ids.shape[1] == PROMPT + 6
    assert not (ids[:, PROMPT:-1] == torch.tensor(EOS)).any()
    assert (ids[:, -1] == torch.tensor(EOS)).all()


def test_custom_stopping_criteria(model):
    class ThreeHitsInRowOne(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            assert input_ids.ndim == 3
            done = torch.zeros(input_ids.shape[0], dtype=torch.bool)
            done[1] = input_ids.shape[1] >= PROMPT + 3
            return done

    processors = ending_at([99] * 3, [99] * 3)
    ids = generate(model, max_new_tokens=8, logits_processor=processors, stopping_criteria=[ThreeHitsInRowOne()])
    assert (ids[1, PROMPT + 3 :] == torch.tensor(PAD)).all()
    assert not (ids[[0, 2]] == torch.tensor(PAD)).all(-1).any()


# --- outputs ---


def test_num_return_sequences(model):
    ids = endless(model, 10, num_return_sequences=2, do_sample=True)
    assert ids.shape == (6, PROMPT + 10, 2) and not torch.equal(ids[0], ids[1])
    kinematics = KINEMATICS.repeat_interleave(2, dim=0)
    torch.manual_seed(0)
    assert torch.equal(ids, model.generate(kinematics=kinematics, max_new_tokens=10, eos_token_id=None))
    experts = make_model(num_experts=2)
    ids = endless(experts, 4, num_return_sequences=2, class_ids=torch.tensor([0, 1, 0]))
    assert ids.shape == (6, PROMPT + 4, 2)


def test_dictionary_with_scores_and_logits(model):
    plain = endless(model, 5, temperature=0.7, do_sample=True)
    output = endless(
        model,
        5,
        temperature=0.7,
        do_sample=True,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        output_hidden_states=True,
    )
    assert isinstance(output, GenerateMultiStreamOutput)
    assert torch.equal(output.sequences, plain)
    assert len(output.scores) == len(output.logits) == len(output.hidden_states) == 5
    for scores, logits in zip(output.scores, output.logits):
        assert [stream.shape for stream in scores] == [(3, SPACE), (3, TIME)]
        for one, other in zip(scores, logits):
            torch.testing.assert_close(one, other / 0.7)
    with torch.no_grad():
        expected = model(output.sequences[:, :-1], kinematics=KINEMATICS).logits
    for stream in range(2):
        actual = torch.stack([step[stream] for step in output.logits], dim=1)
        torch.testing.assert_close(actual, expected[stream][:, PROMPT - 1 :], rtol=1e-4, atol=1e-4)
    assert output.continuous is None
    assert len(output.hidden_states[0]) == 4 and output.hidden_states[1][0].shape == (3, 1, 32)


def test_attentions_of_every_step(model):
    model.set_attn_implementation("eager")
    output = endless(model, 4, return_dict_in_generate=True, output_attentions=True)
    model.set_attn_implementation("sdpa")
    assert len(output.attentions) == 4
    for step, layers in enumerate(output.attentions):
        queries = PROMPT if step == 0 else 1
        assert [weights.shape for weights in layers] == [(3, 4, queries, PROMPT + step)] * 3


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_scores_of_the_drawn_ids_are_finite(model, top_p):
    """Also with a nucleus, which is cut in place of the draw only when scores are not asked for."""
    kwargs = {"do_sample": True, "top_p": top_p, "return_dict_in_generate": True}
    output = endless(model, 8, output_scores=True, **kwargs)
    for step, scores in enumerate(output.scores):
        for stream in range(2):
            drawn = scores[stream].gather(-1, output.sequences[:, PROMPT + step, stream, None])
            assert drawn.isfinite().all()
            assert scores[stream].isinf().any() == (top_p < 1)


def test_streamer_gets_rows_of_all_streams(model):
    class Collector:
        def __init__(self):
            self.pieces, self.ended = [], False

        def put(self, value):
            self.pieces.append(value)

        def end(self):
            self.ended = True

    streamer = Collector()
    ids = endless(model, 5, streamer=streamer)
    assert streamer.ended
    assert streamer.pieces[0].shape == (3, PROMPT, 2)
    assert [piece.shape for piece in streamer.pieces[1:]] == [(3, 2)] * 5
    assert torch.equal(torch.stack(streamer.pieces[1:], dim=1), ids[:, PROMPT:])


# --- prompts and continuation ---


def test_left_padded_prompts_equal_separate_runs(model):
    tracks = manual_greedy(model, 8)
    lengths = [PROMPT + 8, PROMPT + 2, PROMPT]
    longest = max(lengths)
    prompts = torch.tensor(PAD).expand(3, longest, 2).clone()
    for row, length in enumerate(lengths):
        prompts[row, longest - length :] = tracks[row, :length]
    mask = (torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]).long()
    expected = [
        model.generate(
            tracks[row : row + 1, :length],
            kinematics=KINEMATICS[row : row + 1],
            do_sample=False,
            max_new_tokens=6,
            eos_token_id=None,
        )[:, length:]
        for row, length in enumerate(lengths)
    ]
    for kwargs in ({}, {"attention_mask": mask}, {"use_cache": False}):
        ids = endless(model, 6, input_ids=prompts, do_sample=False, **kwargs)
        assert torch.equal(ids[:, longest:], torch.cat(expected)), kwargs
    static = {"cache_implementation": "static", "disable_compile": True}
    ids = endless(model, 6, input_ids=prompts, do_sample=False, **static)
    assert torch.equal(ids[:, longest:], torch.cat(expected))


@pytest.mark.parametrize("with_kinematics", [True, False])
def test_continuation_from_a_returned_cache(model, with_kinematics):
    whole = endless(model, 14, do_sample=False)
    first = endless(model, 6, do_sample=False, return_dict_in_generate=True)
    assert first.past_key_values.get_seq_length() == PROMPT + 5
    second = model.generate(
        first.sequences,
        past_key_values=first.past_key_values,
        kinematics=KINEMATICS if with_kinematics else None,
        do_sample=False,
        max_new_tokens=8,
        eos_token_id=None,
    )
    assert torch.equal(second, whole)


def test_continuation_outside_inference_mode(model):
    whole = endless(model, 14, do_sample=False)
    with torch.inference_mode():
        first = endless(model, 6, do_sample=False, return_dict_in_generate=True)
    second = model.generate(
        first.sequences.clone(), past_key_values=first.past_key_values, kinematics=KINEMATICS, do_sample=False,
        max_new_tokens=8, eos_token_id=None,
    )  # fmt: skip
    assert torch.equal(second, whole)


def test_forward_cache_is_continued(model):
    whole = manual_greedy(model, 10)
    with torch.no_grad():
        cache = model(whole[:, : PROMPT + 4], kinematics=KINEMATICS, use_cache=True).past_key_values
    ids = endless(model, 5, input_ids=whole[:, : PROMPT + 5], past_key_values=cache, do_sample=False)
    assert torch.equal(ids, whole)


@pytest.mark.parametrize("context_length", [1, 4, POSITIONS])
def test_context_length(model, context_length):
    """Kinematics and the last tokens, positions restarting at 0; tracks may then be longer than the tables."""
    steps = POSITIONS + 6
    ids = torch.zeros(3, PROMPT, 2, dtype=torch.long)
    for _ in range(steps):
        window = torch.cat([ids[:, :SLOTS], ids[:, SLOTS:][:, -context_length:]], dim=1)
        with torch.no_grad():
            logits = model(window, kinematics=KINEMATICS, use_cache=False).logits
        ids = torch.cat([ids, torch.stack([stream[:, -1].argmax(-1) for stream in logits], -1)[:, None]], dim=1)
    actual = endless(model, steps, do_sample=False, context_length=context_length)
    assert torch.equal(actual, ids)


def test_generation_config_is_saved_with_the_model(model, tmp_path):
    fresh = make_model()
    fresh.generation_config.update(top_p=0.5, max_new_tokens=7)
    fresh.generation_config.stream_overrides = {"1": {"top_k": 1}}
    fresh.save_pretrained(tmp_path)
    loaded = CMHCADircForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.generation_config.top_p == 0.5 and loaded.generation_config.top_k == 0
    assert loaded.generation_config.stream_overrides == {"1": {"top_k": 1}}
    assert torch.equal(generate(loaded), generate(fresh))
    assert generate(loaded, eos_token_id=None).shape[1] == PROMPT + 7


# --- warpers and processors ---


def steps_of(model, steps: int = 6, **kwargs):
    output = endless(model, steps, return_dict_in_generate=True, output_scores=True, output_logits=True, **kwargs)
    return output.sequences, output.scores, output.logits


@pytest.mark.parametrize(
    "kwargs, check",
    [
        ({"temperature": 0.5}, lambda scores, logits: torch.testing.assert_close(scores, logits / 0.5)),
        ({"top_k": 7}, lambda scores, logits: (scores.isfinite().sum(-1) == 7).all()),
        ({"top_k": 1}, lambda scores, logits: (scores.argmax(-1) == logits.argmax(-1)).all()),
        ({"min_p": 0.2}, lambda scores, logits: torch.equal(
            scores.isfinite(), logits.softmax(-1) >= 0.2 * logits.softmax(-1).amax(-1, keepdim=True))),
        ({"top_p": 0.8}, lambda scores, logits: torch.equal(scores, TopPLogitsWarper(0.8)(None, logits))),
        ({"top_p": 0.8, "temperature": 2.0}, lambda scores, logits: torch.equal(
            scores, TopPLogitsWarper(0.8)(None, logits / 2.0))),
        ({"top_p": 0.8, "min_p": 0.05}, lambda scores, logits: (
            scores.softmax(-1).amin(-1) >= 0).all()),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "check",
)  # fmt: skip
def test_generation_config_reaches_both_streams(model, kwargs, check):
    _, scores, logits = steps_of(model, do_sample=True, **kwargs)
    for step_scores, step_logits in zip(scores, logits):
        for stream in range(2):
            result = check(step_scores[stream], step_logits[stream])
            assert result is None or bool(result)


@pytest.mark.parametrize("key", ["0", "1"])
def test_stream_overrides(model, key):
    config = GenerationConfig(do_sample=True, top_k=0, stream_overrides={key: {"top_k": 3}})
    _, scores, _ = steps_of(model, generation_config=config)
    for step in scores:
        for stream in range(2):
            assert (step[stream].isfinite().sum(-1) == (3 if str(stream) == key else step[stream].shape[-1])).all()


@pytest.mark.parametrize(
    "overrides, word",
    [({"2": {"top_k": 3}}, "2"), ({"time": {"top_k": 3}}, "time"), ({"1": {"topk": 3}}, "topk")],
    ids=str,
)
def test_hostile_stream_overrides_are_not_ignored(overrides, word):
    model = make_model()
    model.generation_config.stream_overrides = overrides
    with pytest.raises(ValueError, match=word):
        endless(model, 2)


def test_stream_overrides_by_number(model):
    """`{1: ...}` is natural in Python; JSON makes "1" of it."""
    fresh = make_model()
    fresh.generation_config.stream_overrides = {1: {"top_k": 3}}
    _, scores, _ = steps_of(fresh, do_sample=True)
    assert all((step[1].isfinite().sum(-1) == 3).all() for step in scores)


def test_a_plain_processor_acts_on_every_stream_and_a_wrapped_one_on_its_own(model):
    _, scores, _ = steps_of(model, logits_processor=[TopKLogitsWarper(4)])
    assert all((stream.isfinite().sum(-1) == 4).all() for step in scores for stream in step)
    wrapped = LogitsProcessorList([StreamLogitsProcessor(1, TopKLogitsWarper(4))])
    _, scores, logits = steps_of(model, logits_processor=wrapped)
    for step_scores, step_logits in zip(scores, logits):
        assert torch.equal(step_scores[0], step_logits[0])
        assert (step_scores[1].isfinite().sum(-1) == 4).all()


def test_a_stream_processor_sees_the_ids_of_its_stream(model):
    seen = []

    class Spy(LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen.append((input_ids, scores.shape[-1]))
            return scores

    ids = endless(model, 3, logits_processor=[StreamLogitsProcessor(1, Spy())])
    assert len(seen) == 3
    for step, (seen_ids, size) in enumerate(seen):
        assert size == TIME and torch.equal(seen_ids, ids[:, : PROMPT + step, 1])


def test_joint_processor_sees_all_streams_and_runs_first(model):
    calls = []

    class SameParity(JointLogitsProcessor):
        """The time id is even exactly if the last pixel id was."""

        def __call__(self, input_ids, scores):
            assert input_ids.shape[2] == 2 and [stream.shape[-1] for stream in scores] == [SPACE, TIME]
            assert all(stream.isfinite().all() for stream in scores)
            calls.append(input_ids.shape[1])
            odd = (torch.arange(TIME) % 2)[None] != input_ids[:, -1, :1] % 2
            return scores[0], scores[1].masked_fill(odd, -torch.inf)

    ids = endless(model, 8, top_k=5, do_sample=True, logits_processor=[TopKLogitsWarper(40), SameParity()])
    assert calls == list(range(PROMPT, PROMPT + 8))
    assert torch.equal(ids[:, PROMPT:, 1] % 2, ids[:, PROMPT - 1 : -1, 0] % 2)


def test_hostile_joint_processor_without_a_call():
    with pytest.raises(NotImplementedError, match="Nothing"):
        type("Nothing", (JointLogitsProcessor,), {})()(None, ())


def test_dead_pixels_and_special_tokens_are_never_drawn():
    model = make_model()
    dead = [5, 17, 100]
    with torch.no_grad():
        # what is forbidden is what the model wants most
        model.space_head.bias[[0, PAD[0], *dead]] += 8.0
        model.time_head.bias[[0, PAD[1]]] += 8.0
    processors = [
        StreamLogitsProcessor(0, ForbiddenTokensLogitsProcessor([0, PAD[0], *dead])),
        StreamLogitsProcessor(1, ForbiddenTokensLogitsProcessor(torch.tensor([0, PAD[1]]))),
    ]
    kinematics = KINEMATICS.repeat(40, 1)
    free = endless(model, 15, kinematics=kinematics)[:, PROMPT:]
    assert torch.isin(free[..., 0], torch.tensor(dead)).any() and (free[..., 1] == 0).any()
    for kwargs in ({}, {"top_p": 0.9}, {"do_sample": False}, {"temperature": 3.0}):
        ids = endless(model, 15, kinematics=kinematics, logits_processor=processors, **kwargs)[:, PROMPT:]
        assert not torch.isin(ids[..., 0], torch.tensor([0, PAD[0], *dead])).any()
        assert not torch.isin(ids[..., 1], torch.tensor([0, PAD[1]])).any()


def test_monotonic_times(model):
    monotonic = StreamLogitsProcessor(1, MonotonicLogitsProcessor(1, TIME - 3))
    forbidden = StreamLogitsProcessor(1, ForbiddenTokensLogitsProcessor([0, PAD[1]]))
    ids = generate(model, kinematics=KINEMATICS.repeat(20, 1), logits_processor=[monotonic, forbidden])
    unordered = generate(model, kinematics=KINEMATICS.repeat(20, 1), logits_processor=[forbidden])

    def decreases(ids):
        times = ids[:, PROMPT:, 1]
        ordinary = times < EOS[1]
        return ((times[:, 1:] < times[:, :-1]) & ordinary[:, 1:] & ordinary[:, :-1]).any().item()

    assert not decreases(ids) and decreases(unordered)
    # equal times stay possible, and so does the end after the last bin
    scores = MonotonicLogitsProcessor(1, TIME - 3)(torch.tensor([[0, 40]]), torch.zeros(1, TIME))
    assert scores.isfinite().nonzero()[:, 1].tolist() == [0, *range(40, TIME)]
    scores = MonotonicLogitsProcessor(1, TIME - 3)(torch.tensor([[7, 0]]), torch.zeros(1, TIME))
    assert scores.isfinite().all()


@pytest.mark.parametrize(
    "processor, expected",
    [
        (ExponentialTemperatureLogitsProcessor(PROMPT, 10), lambda s: 0.95 + 0.1 * 100 ** (-s / 10)),
        (ExponentialTemperatureLogitsProcessor(PROMPT, 5, 2.0, 0.5), lambda s: 0.5 + 1.5 * 100 ** (-s / 5)),
        (LinearTemperatureLogitsProcessor(PROMPT, 10, 0.75), lambda s: max(1 - s / 10, 0.75)),
    ],
)
def test_dynamic_temperature(model, processor, expected):
    _, scores, logits = steps_of(model, logits_processor=[processor])
    for step, (step_scores, step_logits) in enumerate(zip(scores, logits)):
        for stream in range(2):
            torch.testing.assert_close(step_scores[stream], step_logits[stream] / expected(step))


def test_repetition_penalty_uses_the_ids_of_each_stream(model):
    sequences, scores, logits = steps_of(model, do_sample=False, repetition_penalty=2.0)
    for step, (step_scores, step_logits) in enumerate(zip(scores, logits)):
        for stream in range(2):
            changed = (step_scores[stream] != step_logits[stream]).nonzero()
            for row, token in changed.tolist():
                assert token in sequences[row, : PROMPT + step, stream]


# --- regressed times ---


def test_regression_returns_the_times():
    model = make_model(time_prediction="regression")
    torch.nn.init.ones_(model.time_head.output_proj.bias)
    outputs = [
        endless(model, 8, do_sample=False, return_dict_in_generate=True, use_cache=use_cache)
        for use_cache in (True, False)
    ]
    sequences, times = outputs[0].sequences, outputs[0].continuous["times"]
    assert sequences.shape == (3, PROMPT + 8, 1) and times.shape == (3, PROMPT + 8)
    assert torch.equal(sequences, outputs[1].sequences)
    torch.testing.assert_close(times, outputs[1].continuous["times"])
    assert not times[:, :PROMPT].any() and (times[:, PROMPT:] > 0).all()
    with torch.no_grad():
        forward = model(sequences, kinematics=KINEMATICS, times=times)
    torch.testing.assert_close(times[:, PROMPT:], forward.predicted_times[:, PROMPT - 1 : -1], rtol=1e-4, atol=1e-5)
    assert torch.equal(sequences[:, PROMPT:, 0], forward.logits[0][:, PROMPT - 1 : -1].argmax(-1))
    # several tracks per row of kinematics, a window, and a continuation
    many = endless(model, 4, num_return_sequences=2, do_sample=True, return_dict_in_generate=True)
    assert many.continuous["times"].shape == (6, PROMPT + 4)
    windowed = endless(model, POSITIONS + 3, context_length=5, return_dict_in_generate=True)
    assert windowed.continuous["times"].shape == windowed.sequences.shape[:2]
    continued = model.generate(
        sequences[:, : PROMPT + 3], kinematics=KINEMATICS, times=times[:, : PROMPT + 3], do_sample=False,
        max_new_tokens=5, eos_token_id=None, return_dict_in_generate=True,
    )  # fmt: skip
    assert torch.equal(continued.sequences, sequences)
    torch.testing.assert_close(continued.continuous["times"], times)


def test_hostile_regression_prompt_without_its_times():
    """Hits whose times are unknown must not count as hits at time 0."""
    model = make_model(time_prediction="regression")
    prompt = torch.tensor([[[0]] * PROMPT + [[5], [6]]] * 3)
    with pytest.raises(ValueError, match="times"):
        endless(model, 3, input_ids=prompt)


# --- the nucleus ---


def random_scores(kind: str, dtype, seed: int, rows: int = 8, vocab: int = 6147) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scores = (
        torch.randn(rows, vocab, generator=generator, dtype=torch.float64)
        * torch.tensor([0.01, 0.1, 1.0, 2.0, 4.0, 8.0, 20.0, 100.0], dtype=torch.float64)[:rows, None]
    )
    if kind == "ties":
        scores = (scores * 2).round() / 2
    elif kind == "masked":
        scores[torch.rand(scores.shape, generator=generator) < 0.7] = -torch.inf
        scores[0, 1:] = -torch.inf
        scores[0, 0] = 0.0
        scores[1, 3:] = -torch.inf
    elif kind == "signed_zeros":
        scores = torch.where(torch.rand(scores.shape, generator=generator) < 0.5, -0.0, 0.0).double()
        scores[:, ::3] = 1.0
    return scores.to(dtype)


@pytest.mark.parametrize("min_tokens_to_keep", [1, 5])
@pytest.mark.parametrize("top_p", [0.0, 1e-6, 0.3, 0.5, 0.9, 0.995, 0.999999, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["plain", "ties", "masked", "signed_zeros"])
def test_nucleus_equals_the_stock_warper_exactly(kind, dtype, top_p, min_tokens_to_keep):
    ours = NucleusLogitsWarper(top_p, min_tokens_to_keep=min_tokens_to_keep)
    stock = TopPLogitsWarper(top_p, min_tokens_to_keep=min_tokens_to_keep)
    for seed in range(2):
        scores = random_scores(kind, dtype, seed)
        before = scores.clone()
        actual, expected = ours(None, scores), stock(None, scores)
        assert torch.equal(scores, before)
        if kind in ("plain", "masked"):
            assert torch.equal(actual, expected)
            continue
        # the stock warper's sort is not stable: which of several equal tokens it removes is open, how many is not
        assert torch.equal(actual.sort(-1).values, expected.sort(-1).values)
        for row in range(len(scores)):
            kept = actual[row].isfinite()
            edge = scores[row][kept].min()
            assert torch.equal(kept & (scores[row] != edge), expected[row].isfinite() & (scores[row] != edge))


def test_nucleus_of_stable_sort_with_ties_at_the_boundary():
    scores = torch.tensor([[1.0, 0.0, 1.0, 0.0, 0.0, 2.0]])
    for top_p in torch.linspace(0, 1, 101).tolist():
        ascending, order = scores.sort(dim=-1, stable=True)
        remove = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        remove[:, -1] = False
        expected = scores.masked_fill(torch.zeros_like(remove).scatter(1, order, remove), -torch.inf)
        assert torch.equal(NucleusLogitsWarper(top_p)(None, scores), expected), top_p


def test_nucleus_keeps_its_filter_value_and_half_precision():
    scores = random_scores("plain", torch.bfloat16, 0)
    assert torch.equal(
        NucleusLogitsWarper(0.8).__call__(None, scores).sort(-1).values,
        TopPLogitsWarper(0.8)(None, scores).sort(-1).values,
    )
    scores = random_scores("plain", torch.float32, 0)
    assert torch.equal(
        NucleusLogitsWarper(0.8, filter_value=-1e4)(None, scores),
        TopPLogitsWarper(0.8, filter_value=-1e4)(None, scores),
    )


@pytest.mark.parametrize("top_p, keep", [(-0.1, 1), (1.1, 1), (float("nan"), 1), (0.9, 0), (0.9, 1.5)])
def test_hostile_nucleus_parameters(top_p, keep):
    with pytest.raises(ValueError):
        NucleusLogitsWarper(top_p, min_tokens_to_keep=keep)


def check_distribution(observed: torch.Tensor, probs: torch.Tensor):
    """Chi-square of counts against probabilities, rare tokens pooled; impossible ones never."""
    assert not observed[probs == 0].any()
    draws = observed.sum()
    expected = probs.double() / probs.double().sum() * draws
    common = expected >= 10
    pooled = [torch.stack([values[common].sum() * 0 + values[~common].sum()]) for values in (observed, expected)]
    observed, expected = (torch.cat([values[common], pool]) for values, pool in zip((observed, expected), pooled))
    if expected[-1] < 10:
        observed, expected = observed[:-1], expected[:-1]
    if len(expected) > 1:
        assert chisquare(observed.numpy(), (expected * observed.sum() / expected.sum()).numpy()).pvalue > 1e-4


@pytest.mark.parametrize("kind", ["plain", "ties", "masked"])
@pytest.mark.parametrize("top_p", [0.0, 0.5, 0.9, 0.995, 1.0])
def test_draws_from_the_nucleus(top_p, kind):
    torch.manual_seed(0)
    nucleus = NucleusLogitsWarper(top_p)
    for row in (2, 4):
        scores = random_scores(kind, torch.float32, row, vocab=300)[row : row + 1]
        cut = nucleus(None, scores)
        ids = sample_from_nucleus(scores.expand(15_000, -1), nucleus)
        assert ids.shape == (15_000,) and ids.dtype == torch.long
        check_distribution(torch.bincount(ids, minlength=300).double(), cut.softmax(-1)[0])


def test_draws_from_the_nucleus_respect_min_tokens_to_keep():
    torch.manual_seed(0)
    scores = torch.log(torch.tensor([[0.9, 0.06, 0.03, 0.01]]))
    nucleus = NucleusLogitsWarper(0.1, min_tokens_to_keep=3)
    ids = sample_from_nucleus(scores.expand(20_000, -1), nucleus)
    check_distribution(torch.bincount(ids, minlength=4).double(), torch.tensor([0.9, 0.06, 0.03, 0.0]))


@pytest.mark.parametrize("kind", ["plain", "ties", "masked"])
def test_draws_from_scores(kind):
    torch.manual_seed(0)
    for row in (2, 4):
        scores = random_scores(kind, torch.float32, row, vocab=300)[row : row + 1]
        ids = sample_from_scores(scores.expand(15_000, -1))
        check_distribution(torch.bincount(ids, minlength=300).double(), scores.softmax(-1)[0])


@pytest.mark.parametrize("uniform", [0.0, 0.25, 0.5, 1 - 2**-24])
def test_extreme_random_numbers_draw_possible_tokens(monkeypatch, uniform):
    """The ends of the unit interval, and exactly on a boundary between tokens."""
    scores = torch.log(torch.tensor([[0.0, 0.25, 0.0, 0.25, 0.5, 0.0], [0.0, 0.0, 0.0, 1.0, 0.0, 0.0]]))
    monkeypatch.setattr(torch, "rand", lambda shape, **kwargs: torch.full(shape, uniform, dtype=kwargs["dtype"]))
    expected = {0.0: 4, 0.25: 4, 0.5: 3, 1 - 2**-24: 1}[uniform]
    assert sample_from_scores(scores).tolist() == [expected, 3]


@pytest.mark.parametrize("draw", [sample_from_scores, lambda s: sample_from_nucleus(s, NucleusLogitsWarper(0.9))])
@pytest.mark.parametrize("bad", ["nan", "inf", "impossible"])
def test_hostile_scores_name_the_row(draw, bad):
    scores = torch.randn(4, 20)
    if bad == "impossible":
        scores[2] = -torch.inf
    else:
        scores[2, 3] = float(bad)
    with pytest.raises(ValueError, match="row 2"):
        draw(scores)


# --- bad requests ---


@pytest.mark.parametrize("kwargs", [{"num_beams": 2, "do_sample": False}, {"num_beams": 2, "do_sample": True}])
def test_hostile_beam_search_is_refused_by_name(model, kwargs):
    with pytest.raises(ValueError, match=r"(?i)beam"):
        generate(model, **kwargs)


def test_hostile_request_beyond_the_last_position(model):
    with pytest.raises(ValueError, match=rf"{PROMPT + POSITIONS + 1}.*{PROMPT + POSITIONS}.*max_new_tokens"):
        generate(model, max_new_tokens=POSITIONS + 1)


@pytest.mark.parametrize("kwargs", [{}, {"use_cache": False}, {"num_return_sequences": 2}])
def test_hostile_missing_kinematics(model, kwargs):
    """Without them the slots would be read as SOS ids: tracks of no particle at all."""
    with pytest.raises(ValueError, match="kinematics.*P, Theta"):
        model.generate(max_new_tokens=3, **kwargs)
    with pytest.raises(ValueError, match="kinematics.*P, Theta"):
        model.generate(torch.zeros(2, PROMPT, 2, dtype=torch.long), max_new_tokens=3, **kwargs)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_hostile_missing_kinematics_with_an_empty_cache(model, kind):
    cache = DynamicCache() if kind == "dynamic" else StaticCache(config=model.config, max_cache_len=PROMPT + 3)
    with pytest.raises(ValueError, match="kinematics.*P, Theta"):
        model.generate(past_key_values=cache, max_new_tokens=3, disable_compile=True)


@pytest.mark.parametrize("class_ids", [None, torch.tensor([7, 7, 7])], ids=["missing", "unknown"])
def test_hostile_class_ids_of_a_continuation(class_ids):
    """Kinematics are in the cache, the class is not: every step needs it."""
    experts = make_model(num_experts=4)
    first = endless(experts, 3, class_ids=torch.tensor([0, 1, 1]), return_dict_in_generate=True)
    with pytest.raises(ValueError, match="class_ids"):
        experts.generate(first.sequences, class_ids=class_ids, past_key_values=first.past_key_values, max_new_tokens=3)


@pytest.mark.parametrize(
    "kinematics",
    [torch.ones(2), torch.ones(2, 3), torch.ones(2, 1, 2), [6.0, 30.0, 0.0]],
    ids=["flat", "three", "deep", "list of three"],
)
def test_hostile_kinematics(model, kinematics):
    with pytest.raises(ValueError, match="kinematics"):
        model.generate(kinematics=kinematics, max_new_tokens=3)


@pytest.mark.parametrize("kinematics", [(6.0, 30.0), [[6.0, 30.0]]], ids=["one track", "rows"])
def test_kinematics_as_a_sequence(model, kinematics):
    ids = model.generate(kinematics=kinematics, do_sample=False)
    assert torch.equal(ids, model.generate(kinematics=torch.tensor([[6.0, 30.0]]), do_sample=False))


@pytest.mark.parametrize("do_sample", [True, False])
def test_hostile_kinematics_not_a_number(model, do_sample):
    kinematics = KINEMATICS.clone()
    kinematics[1, 0] = torch.nan
    with pytest.raises(ValueError, match="row 1"):
        generate(model, kinematics=kinematics, max_new_tokens=3, do_sample=do_sample)


def test_hostile_prompt_and_kinematics_of_different_batches(model):
    with pytest.raises(ValueError, match=r"kinematics.*\(3, 2\).*\(2, 2\)"):
        model.generate(torch.zeros(2, PROMPT, 2, dtype=torch.long), kinematics=KINEMATICS, max_new_tokens=3)


@pytest.mark.parametrize("shape", [(3, PROMPT), (3, PROMPT, 1), (3, PROMPT, 3)])
def test_hostile_prompt_shape(model, shape):
    with pytest.raises(ValueError, match="input_ids"):
        generate(model, input_ids=torch.zeros(shape, dtype=torch.long), max_new_tokens=3)


@pytest.mark.parametrize("class_ids", [None, torch.tensor([0, 1, 2]), torch.tensor([211, 321, 211]), torch.tensor([1])])
def test_hostile_class_ids(class_ids):
    with pytest.raises(ValueError, match="class_ids"):
        generate(make_model(num_experts=4), class_ids=class_ids, max_new_tokens=3)


@pytest.mark.parametrize("context_length", [0, -3])
def test_hostile_context_length(model, context_length):
    with pytest.raises(ValueError, match="context_length"):
        generate(model, context_length=context_length, max_new_tokens=3)


def test_hostile_context_length_beyond_the_tables(model):
    with pytest.raises(ValueError, match="context_length"):
        endless(model, 3, context_length=POSITIONS + 1)


def test_hostile_context_length_of_padded_prompts(model):
    prompts = torch.zeros(3, PROMPT + 1, 2, dtype=torch.long)
    prompts[0, 0] = torch.tensor(PAD)
    with pytest.raises(ValueError, match="context_length"):
        endless(model, 3, context_length=2, input_ids=prompts)


def test_hostile_right_padded_prompts(model):
    """The next hit would be predicted from a pad."""
    prompts = torch.zeros(3, PROMPT + 1, 2, dtype=torch.long)
    prompts[0, -1] = torch.tensor(PAD)
    with pytest.raises(ValueError, match="pad"):
        endless(model, 3, input_ids=prompts)


def test_hostile_argument_typo(model):
    with pytest.raises(ValueError, match="kinematic_values"):
        model.generate(kinematic_values=KINEMATICS)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: ForbiddenTokensLogitsProcessor([3, -1]), ["-1"]),
        (lambda: ForbiddenTokensLogitsProcessor([TIME])(None, torch.zeros(1, TIME)), [str(TIME)]),
        (lambda: MonotonicLogitsProcessor(5, 4), ["5", "4"]),
        (lambda: ExponentialTemperatureLogitsProcessor(3, 0), ["0"]),
        (lambda: ExponentialTemperatureLogitsProcessor(3, 10, final=-1.0), ["-1.0"]),
        (lambda: LinearTemperatureLogitsProcessor(3, 10, floor=0.0), ["0.0"]),
    ],
)
def test_hostile_processor_parameters(make, words):
    with pytest.raises((ValueError, IndexError)) as error:
        make()
    assert all(word in str(error.value) for word in words)
