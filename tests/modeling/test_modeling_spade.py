"""SPADE: configuration, loading, equivalences, losses written out, generation with its own stop, bad input."""

import json
import math

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import logsumexp
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    PreTrainedConfig,
    StaticCache,
    StoppingCriteria,
    Trainer,
    TrainingArguments,
)

from hepzoo.modeling.configuration_spade import SpadeConfig
from hepzoo.modeling.generation_multistream import JointLogitsProcessor, StreamLogitsProcessor
from hepzoo.modeling.modeling_spade import (
    OccupiedCellLogitsProcessor,
    SpadeForCausalLM,
    SpadeModel,
    SpadeRMSNorm,
    SpadeRotaryEmbedding,
    SpadeStopHead,
    apply_rotary,
    layer_monotonic_processor,
    mixture_nll,
    mixture_scales,
)
from hepzoo.tokenization.tokenization_spade import SpadeTokenizer

NBINS = (5, 6, 7)
TINY = {
    "nbins": NBINS,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "axis_embedding_size": 12,
    "feature_size": 8,
    "energy_head_size": 24,
    "mixture_components": 3,
    "max_num_hits": 40,
    "stop_embedding_size": 6,
    "stop_hidden_size": 20,
}
VARIANTS = {
    "split": {},
    "combined": {"axis_mode": "combined"},
    "rms": {"use_rms_norm": True},
    "parallel": {"parallel_residual": True},
    "full_heads": {"num_key_value_heads": 4},
    "two_key_heads": {"num_key_value_heads": 2, "rope_pairing": "published"},
    "conditioned": {"condition_register": True, "num_registers": 3},
    "no_registers": {"num_registers": 0},
    "monotonic": {"layer_monotonic": True},
    "combined_monotonic": {"axis_mode": "combined", "layer_monotonic": True, "num_registers": 1},
    "no_stop": {"use_stop_head": False},
    "plain_stop": {"stop_use_position": False, "stop_use_counter": False, "stop_num_layers": 1},
    "energy_beside_y": {"energy_delay": 2},
    "far_delays": {"stream_delays": [0, 2, 4], "energy_delay": 7},
}
HITS = (5, 9, 2, 12)
EACH_VARIANT = pytest.mark.parametrize("name", VARIANTS)
MODES = pytest.mark.parametrize("name", ["split", "combined"])
ENERGIES = [20.0, 50.0, 90.0, 35.0]


def tiny_config(**settings) -> SpadeConfig:
    return SpadeConfig(**{**TINY, **settings})


def make_model(name: str = "split", seed: int = 0, **settings) -> SpadeForCausalLM:
    torch.manual_seed(seed)
    return SpadeForCausalLM(tiny_config(**{**VARIANTS[name], **settings})).eval()


def random_hits(config: SpadeConfig, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Cells (count, 3), layers in order, and transformed energies (count,)."""
    cells = torch.stack([torch.randint(0, bins, (count,), generator=generator) for bins in config.nbins], dim=-1)
    return cells[cells[:, 2].sort(stable=True).indices], torch.randn(count, generator=generator)


def stream_ids(config: SpadeConfig, cells: torch.Tensor) -> torch.Tensor:
    if config.axis_mode == "split":
        return cells + 1
    nx, ny, _ = config.nbins
    return (1 + cells[:, 0] + nx * cells[:, 1] + nx * ny * cells[:, 2]).unsqueeze(-1)


def make_batch(model, hits=HITS, seed: int = 0, labels: bool = True, extra: int = 0) -> dict:
    """Showers of the given numbers of hits, written position by position; `extra` more columns of padding."""
    config = model.config
    generator = torch.Generator().manual_seed(seed)
    begin = config.num_registers + 1
    length = begin + max(hits) + config.max_stream_delay + extra
    input_ids = torch.zeros(len(hits), length, config.num_streams, dtype=torch.long)
    targets = torch.full_like(input_ids, -100)
    attention_mask = torch.zeros(len(hits), length, dtype=torch.long)
    hit_energy = torch.zeros(len(hits), length)
    for row, count in enumerate(hits):
        cells, energies = random_hits(config, count, generator)
        total = begin + count + config.max_stream_delay
        attention_mask[row, :total] = 1
        input_ids[row, :total] = torch.tensor(config.stream_missing_token_ids)
        for hit in range(count):
            for stream, delay in enumerate(config.stream_delays):
                value = stream_ids(config, cells)[hit, stream]
                input_ids[row, begin + delay + hit, stream] = value
                targets[row, begin + delay + hit, stream] = value
            hit_energy[row, begin + config.energy_delay + hit] = energies[hit]
    inputs = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "hit_energy": hit_energy,
        "incident_energy": 10 + 90 * torch.rand(len(hits), generator=generator),
    }
    return {**inputs, "labels": targets} if labels else inputs


def select(inputs: dict, rows) -> dict:
    return {name: value[rows] for name, value in inputs.items()}


def quiet_training(model):
    """Training mode without any noise."""
    model.config.energy_noise = 0.0
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def gradients_of(model, inputs: dict) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def everything(outputs) -> torch.Tensor:
    """All predictions, joined along the last axis."""
    return torch.cat([*outputs.logits, *outputs.energy_mixture], dim=-1)


# --- configuration ---


def test_config_has_exactly_the_documented_keys():
    """Unknown names become attributes silently, so a typo would show up as a new key."""
    own = {
        *TINY,
        *("axis_mode", "num_key_value_heads", "hidden_act", "use_rms_norm", "parallel_residual", "layer_norm_eps"),
        *("rms_norm_eps", "attention_dropout", "hidden_dropout", "rope_theta", "rope_pairing", "num_registers"),
        *("condition_register", "energy_noise", "energy_min", "energy_max", "log_scale_min", "log_scale_max"),
        *("incident_energy_offset", "incident_energy_scale", "energy_loss_weight", "loss_over_prefix"),
        *("layer_monotonic", "stream_delays", "energy_delay", "use_stop_head", "stop_num_layers", "stop_dropout"),
        *("stop_use_position", "stop_use_counter", "stop_energy_scale", "stop_counter_scale", "stop_pos_weight"),
        *("stop_loss_weight", "embedding_initializer_range", "use_cache", "tie_word_embeddings"),
        *("bos_token_id", "eos_token_id", "pad_token_id"),
    }
    written = json.loads(SpadeConfig().to_json_string(use_diff=False))
    inherited = set(json.loads(PreTrainedConfig().to_json_string(use_diff=False)))
    assert own <= set(written)
    assert set(written) - inherited - own == {"model_type"} - inherited


def test_config_defaults_are_the_published_model():
    config = SpadeConfig()
    assert config.stream_names == ("x", "y", "z") and config.stream_delays == [1, 2, 0] and config.energy_delay == 3
    assert config.stream_vocab_sizes == (32, 32, 32) and config.stream_missing_token_ids == (31, 31, 31)
    assert config.max_stream_delay == 3 and config.num_conditioning_tokens == 2 and config.vocab_size == 32
    combined = SpadeConfig(axis_mode="combined")
    assert combined.stream_delays == [0] and combined.energy_delay == 1 and combined.vocab_size == 27_002
    with torch.device("meta"):
        model = SpadeForCausalLM(config)
    # decoder and stop network, counted from the shapes of the published checkpoint
    assert sum(parameter.numel() for parameter in model.parameters()) == 2_953_036 + 32_769


@EACH_VARIANT
def test_config_round_trip(name, tmp_path):
    config = tiny_config(**VARIANTS[name])
    config.save_pretrained(tmp_path)
    loaded = SpadeConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    for attribute in ("num_streams", "stream_vocab_sizes", "stream_missing_token_ids", "max_stream_delay", "head_dim"):
        assert getattr(loaded, attribute) == getattr(config, attribute)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"axis_mode": "joint"}, ["axis_mode", "joint", "split"]),
        ({"rope_pairing": "other"}, ["rope_pairing", "other", "half"]),
        ({"nbins": (5, 6)}, ["nbins", "[5, 6]"]),
        ({"nbins": (5, 0, 6)}, ["nbins", "[5, 0, 6]"]),
        ({"nbins": (5, 6, 7.5)}, ["nbins"]),
        *[
            ({name: least - 1}, [name, str(least - 1), f"at least {least}"])
            for name, least in (
                *[(size, 1) for size in ("hidden_size", "num_hidden_layers", "num_attention_heads")],
                *[(size, 1) for size in ("num_key_value_heads", "intermediate_size", "axis_embedding_size")],
                *[(size, 1) for size in ("feature_size", "mixture_components", "energy_head_size")],
                *[(size, 1) for size in ("stop_embedding_size", "stop_hidden_size", "stop_num_layers")],
                *[("num_registers", 0), ("max_num_hits", 2), ("energy_noise", 0), ("stop_pos_weight", 0)],
            )
        ],
        ({"hidden_size": 30}, ["hidden_size", "30", "num_attention_heads", "4"]),
        ({"hidden_size": 12}, ["hidden_size", "12", "num_attention_heads", "4"]),
        ({"num_key_value_heads": 3}, ["num_attention_heads", "4", "num_key_value_heads", "3"]),
        ({"num_key_value_heads": 8}, ["num_attention_heads", "4", "num_key_value_heads", "8"]),
        ({"condition_register": True, "num_registers": 0}, ["condition_register"]),
        ({"stream_delays": [1, 2]}, ["stream_delays", "[1, 2]", "3 delays"]),
        ({"stream_delays": [1, 2, 1]}, ["stream_delays", "[1, 2, 1]", "smallest 0"]),
        ({"stream_delays": [1, -1, 0]}, ["stream_delays", "[1, -1, 0]"]),
        ({"axis_mode": "combined", "stream_delays": [1]}, ["stream_delays", "[1]"]),
        ({"energy_delay": 1}, ["energy_delay", "1", "2"]),
        ({"energy_min": 3.0, "energy_max": 2.0}, ["energy_min", "3.0", "energy_max", "2.0"]),
        ({"log_scale_min": 5.0}, ["log_scale_min", "5.0", "log_scale_max", "4.0"]),
        ({"hidden_dropout": 1.5}, ["hidden_dropout", "1.5"]),
        ({"attention_dropout": -0.1}, ["attention_dropout", "-0.1"]),
        ({"stop_dropout": 1.0}, ["stop_dropout", "1.0"]),
        ({"hidden_size": "32"}, ["hidden_size", "32"]),
    ],
    ids=str,
)
def test_hostile_config_is_refused_by_name(settings, words):
    with pytest.raises(Exception) as error:
        tiny_config(**settings)
    assert "Error" in type(error.value).__name__ and not isinstance(error.value, ZeroDivisionError)
    for word in words:
        assert word in str(error.value), error.value


# --- loading and initialisation ---


@EACH_VARIANT
def test_save_load_round_trip(name, tmp_path):
    model = make_model(name)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is SpadeForCausalLM and not any(info.values()), info
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[key]), key
    inputs = make_batch(model, labels=False)
    with torch.no_grad():
        assert torch.equal(everything(model(**inputs)), everything(loaded.eval()(**inputs)))
        base = AutoModel.from_pretrained(tmp_path).eval()
        assert type(base) is SpadeModel
        assert torch.equal(base(**inputs).last_hidden_state, model.model(**inputs).last_hidden_state)


def assert_published_distribution(model, fresh=lambda name: True):
    """Every fresh parameter: U(-1/sqrt(fan_in), 1/sqrt(fan_in)), tables and registers N(0, 1), norms 1 and 0."""
    seen = set()
    for module_name, module in model.named_modules():
        for name, tensor in module.named_parameters(recurse=False):
            full_name = f"{module_name}.{name}".lstrip(".")
            seen.add(full_name)
            assert tensor.device.type == "cpu" and tensor.isfinite().all(), full_name
            if not fresh(full_name):
                continue
            if isinstance(module, nn.Linear):
                bound = 1 / math.sqrt(module.in_features)
                assert tensor.abs().max() <= bound, full_name
                assert tensor.numel() < 100 or tensor.abs().max() > 0.8 * bound, full_name
                if tensor.numel() >= 500:
                    assert tensor.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.15), full_name
            elif isinstance(module, nn.Embedding) or name == "registers":
                if module_name.endswith("tokens.0") and getattr(module, "padding_idx", None) == 0:
                    assert not tensor[0].any(), full_name
                values = tensor[1:] if getattr(module, "padding_idx", None) == 0 else tensor
                tolerance = 5 / math.sqrt(2 * max(values.numel(), 2))
                assert values.numel() == 0 or values.std().item() == pytest.approx(1.0, abs=tolerance), full_name
            elif isinstance(module, (nn.LayerNorm, SpadeRMSNorm)):
                assert torch.equal(tensor, torch.full_like(tensor, 1.0 if name == "weight" else 0.0)), full_name
            else:
                pytest.fail(f"{full_name} is of a kind that this test does not know")
    assert seen == {name for name, _ in model.named_parameters()}


@EACH_VARIANT
def test_fresh_parameters_have_the_published_distribution(name):
    assert_published_distribution(make_model(name))


@pytest.mark.parametrize("name", ["split", "combined", "rms", "conditioned", "no_registers"])
def test_missing_parameters_are_initialised_after_loading_from_meta(name):
    model = make_model(name)
    kept_name, kept = "model.layers.1.mlp_norm.weight", torch.full((32,), 7.0)
    loaded = SpadeForCausalLM.from_pretrained(None, config=model.config, state_dict={kept_name: kept}).eval()
    assert torch.equal(loaded.get_parameter(kept_name), kept)
    assert_published_distribution(loaded, fresh=lambda full_name: full_name != kept_name)
    assert everything(loaded(**make_batch(loaded, labels=False))).isfinite().all()


def test_embeddings_get_and_set():
    model = make_model()
    assert model.get_input_embeddings() is model.model.embeddings.tokens[0]
    assert model.get_output_embeddings() is model.token_heads[0]
    with pytest.raises(NotImplementedError, match="nbins"):
        model.resize_token_embeddings(100)


# --- equivalences ---


@EACH_VARIANT
def test_sdpa_equals_eager(name):
    inputs = None
    results = []
    for implementation in ("eager", "sdpa"):
        model = quiet_training(make_model(name))
        model.set_attn_implementation(implementation)
        inputs = make_batch(model) if inputs is None else inputs
        gradients = gradients_of(model, inputs)
        with torch.no_grad():
            results.append((everything(model.eval()(**inputs))[inputs["attention_mask"] == 1], gradients))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-5)
    assert results[0][1].keys() == results[1][1].keys()
    for key, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][key], gradient, rtol=1e-3, atol=1e-4, msg=key)


@EACH_VARIANT
def test_every_parameter_gets_a_gradient(name):
    model = make_model(name).train()
    gradients = gradients_of(model, make_batch(model, hits=(9, 12, 15)))
    # in parallel one norm serves both parts of a layer
    unused = {key for key, _ in model.named_parameters() if model.config.parallel_residual and "mlp_norm" in key}
    unused |= {key for key, parameter in model.named_parameters() if parameter.numel() == 0}
    assert {key for key, _ in model.named_parameters()} - set(gradients) == unused
    for key, gradient in gradients.items():
        assert gradient.isfinite().all() and gradient.any(), key


@EACH_VARIANT
def test_gradient_checkpointing_gives_the_same_gradients(name):
    plain, checkpointed = quiet_training(make_model(name)), quiet_training(make_model(name))
    checkpointed.gradient_checkpointing_enable()
    inputs = make_batch(plain)
    expected = gradients_of(plain, inputs)
    for key, gradient in gradients_of(checkpointed, inputs).items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-4, atol=1e-6, msg=key)


@EACH_VARIANT
def test_bfloat16_forward_and_backward(name):
    model = make_model(name).to(torch.bfloat16).train()
    inputs = make_batch(model)
    gradients = gradients_of(model, inputs)
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    full = make_model(name)
    with torch.no_grad():
        losses = [float(each(**inputs).loss) for each in (model.eval(), full)]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


@pytest.mark.parametrize("name", ["monotonic", "combined_monotonic", "split"])
def test_float16_forward(name):
    """The mask of earlier layers must fit the number format."""
    half, full = make_model(name).to(torch.float16), make_model(name)
    inputs = make_batch(full)
    with torch.no_grad():
        outputs, expected = half(**inputs), full(**inputs)
    assert float(outputs.loss) == pytest.approx(float(expected.loss), rel=0.02)


@pytest.mark.parametrize("name", ["split", "combined"])
def test_bfloat16_autocast_is_close(name):
    model = make_model(name)
    inputs = make_batch(model)
    with torch.no_grad():
        expected = float(model(**inputs).loss)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual = float(model(**inputs).loss)
    assert actual == pytest.approx(expected, rel=0.03)


@EACH_VARIANT
def test_the_future_is_invisible(name):
    model = make_model(name)
    inputs = make_batch(model, hits=(12,), labels=False)
    cut = model.config.num_registers + 7
    changed = {key: value.clone() for key, value in inputs.items()}
    changed["input_ids"][:, cut:] = 1
    changed["hit_energy"][:, cut:] += 3.0
    with torch.no_grad():
        one, other = everything(model(**inputs)), everything(model(**changed))
    assert torch.equal(one[:, :cut], other[:, :cut]) and not torch.equal(one[:, cut], other[:, cut])


@EACH_VARIANT
def test_what_stands_in_the_slots_does_not_matter(name):
    model = make_model(name)
    inputs = make_batch(model, labels=False)
    changed = {key: value.clone() for key, value in inputs.items()}
    slots = model.config.num_registers
    changed["input_ids"][:, :slots] = 1
    changed["hit_energy"][:, :slots] = 5.0
    with torch.no_grad():
        one, other = everything(model(**inputs)), everything(model(**changed))
    assert torch.equal(one[:, slots:], other[:, slots:])


def test_register_condition_adds_the_incident_energy():
    model = make_model("conditioned")
    inputs = make_batch(model, labels=False)
    embeddings = model.model.embeddings
    position_ids = torch.arange(inputs["input_ids"].shape[1])[None]
    with torch.no_grad():
        states = embeddings(inputs["input_ids"], position_ids, inputs["hit_energy"], inputs["incident_energy"])
        scaled = (inputs["incident_energy"] - 50) * 0.043
        condition = embeddings.register_condition(scaled)
    torch.testing.assert_close(states[:, 0], embeddings.registers[0] + condition)
    assert torch.equal(states[:, 1:3], embeddings.registers[1:].expand(len(states), -1, -1))


@pytest.mark.parametrize("chunks", [[5, 7, 3], [1] * 15])
@EACH_VARIANT
def test_cached_steps_equal_one_pass(name, chunks):
    model = make_model(name)
    inputs = make_batch(model, hits=(12, 12), labels=False)
    inputs.pop("attention_mask")
    total = sum(chunks)
    caches = [DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=total)]
    with torch.no_grad():
        expected = everything(model(**inputs, use_cache=False))[:, :total]
        for cache in caches:
            parts, start = [], 0
            for chunk in chunks:
                window = {key: inputs[key][:, start : start + chunk] for key in ("input_ids", "hit_energy")}
                outputs = model(
                    **window, incident_energy=inputs["incident_energy"], past_key_values=cache, use_cache=True,
                    position_ids=torch.arange(start, start + chunk)[None],
                )  # fmt: skip
                parts.append(everything(outputs))
                start += chunk
            torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-4, atol=1e-5)


def test_outputs_of_all_kinds():
    model = make_model(attn_implementation="eager")
    inputs = make_batch(model, labels=False)
    length = inputs["input_ids"].shape[1]
    with torch.no_grad():
        outputs = model(**inputs, output_hidden_states=True, output_attentions=True)
        assert len(outputs.hidden_states) == 3 and len(outputs.attentions) == 2
        assert outputs.attentions[0].shape == (4, 4, length, length)
        base = model.model(**inputs)
        assert torch.equal(outputs.hidden_states[-1], base.last_hidden_state)
        as_tuple = model(**inputs, return_dict=False)
        assert torch.equal(as_tuple[0][0], outputs.logits[0])
        for keep in (3, torch.tensor([1, 4])):
            kept = model(**inputs, logits_to_keep=keep)
            rows = slice(-3, None) if keep is not None and isinstance(keep, int) else keep
            torch.testing.assert_close(everything(kept), everything(outputs)[:, rows])
        model.config.return_dict = False
        assert torch.equal(model(**inputs)[0][0], outputs.logits[0])


# --- rotary embedding ---


def rotated_scores(pairing: str, shift: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of random queries and keys at 12 positions behind `shift`, and the norms of the rotated queries."""
    config = tiny_config(rope_pairing=pairing, hidden_size=64)
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 4, 12, 16, generator=generator, dtype=torch.float64)
    rotary = SpadeRotaryEmbedding(config)
    factors = (*rotary(torch.arange(shift, shift + 12)[None], torch.float64), rotary.partner)
    query, key = apply_rotary(query, *factors), apply_rotary(key, *factors)
    return query @ key.transpose(-1, -2), query.norm(dim=-1)


def test_half_rotation_is_orthogonal_and_relative():
    scores, norms = rotated_scores("half", 0)
    shifted, shifted_norms = rotated_scores("half", 37)
    torch.testing.assert_close(scores, shifted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(norms, shifted_norms, rtol=1e-5, atol=1e-5)
    # position 0 does nothing
    rotary = SpadeRotaryEmbedding(tiny_config())
    states = torch.randn(1, 1, 1, 8)
    assert torch.equal(apply_rotary(states, *rotary(torch.zeros(1, 1), torch.float32), rotary.partner), states)


def test_half_rotation_turns_pairs_by_the_published_angles():
    rotary = SpadeRotaryEmbedding(tiny_config())
    states = torch.randn(1, 1, 5, 8)
    rotated = apply_rotary(states, *rotary(torch.arange(5)[None], torch.float32), rotary.partner)
    for position in range(5):
        for pair in range(4):
            angle = position * 10000.0 ** (-2 * pair / 8)
            a, b = states[0, 0, position, pair], states[0, 0, position, pair + 4]
            expected = torch.stack(
                [a * math.cos(angle) - b * math.sin(angle), b * math.cos(angle) + a * math.sin(angle)]
            )
            torch.testing.assert_close(rotated[0, 0, position, [pair, pair + 4]], expected)


def test_published_rotation_is_neither():
    scores, norms = rotated_scores("published", 0)
    shifted, shifted_norms = rotated_scores("published", 37)
    assert (scores - shifted).abs().max() > 0.5 and (norms - shifted_norms).abs().max() > 0.1


# --- losses ---


def sum_of_losses(model, inputs: dict, prefix: bool = False) -> dict[str, float]:
    """The losses from their definitions, hit by hit, in float64 numpy."""
    config = model.config
    with torch.no_grad():
        outputs = model(**{**inputs, "labels": None})
    logits = [values.double().numpy() for values in outputs.logits]
    mixture = [values.double().numpy() for values in outputs.energy_mixture]
    ids, energy = inputs["input_ids"].numpy(), inputs["hit_energy"].double().numpy()
    begin = config.num_registers + 1
    streams, energies, stops = [[] for _ in logits], [], []
    for row in range(len(ids)):
        total = int(inputs["attention_mask"][row].sum())
        count = total - begin - config.max_stream_delay
        for stream, delay in enumerate(config.stream_delays):
            positions = list(range(begin + delay, begin + delay + count))
            if prefix and config.axis_mode == "combined":
                positions.append(begin + count)
            for position in positions:
                scores = logits[stream][row, position - 1]
                streams[stream].append(logsumexp(scores) - scores[ids[row, position, stream]])
        first = begin if prefix else begin + config.energy_delay
        for position in range(first, total):
            weights, means, log_scales = (values[row, position - 1] for values in mixture)
            scales = np.log1p(np.exp(log_scales)) + 1e-4
            densities = stats.norm(means, scales).logpdf(energy[row, position])
            energies.append(-logsumexp(weights - logsumexp(weights) + densities))
        if model.stop_head is None:
            continue
        for hit in range(count):
            if config.axis_mode == "split":
                cell = torch.tensor([ids[row, begin + delay + hit, k] for k, delay in enumerate(config.stream_delays)])
            else:
                nx, ny, _ = config.nbins
                token = int(ids[row, begin + hit, 0]) - 1
                cell = torch.tensor([token % nx, token // nx % ny, token // (nx * ny)]) + 1
            with torch.no_grad():
                logit = model.stop_head(
                    cell, inputs["hit_energy"][row, begin + config.energy_delay + hit], inputs["incident_energy"][row],
                    torch.tensor(hit),
                ).item()  # fmt: skip
            is_last = hit == count - 1
            stops.append((logit, is_last))
    losses = {f"stream{stream}": np.mean(values) for stream, values in enumerate(streams)}
    losses["energy"] = np.mean(energies)
    if stops:
        weight = config.stop_pos_weight or sum(not last for _, last in stops) / sum(last for _, last in stops)
        losses["stop"] = np.mean([weight * np.logaddexp(0, -x) if last else np.logaddexp(0, x) for x, last in stops])
    return losses


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "name, settings",
    [
        *[(name, {}) for name in VARIANTS],
        ("split", {"stop_pos_weight": 0.0, "stop_loss_weight": 0.3, "energy_loss_weight": 0.7}),
        ("split", {"loss_over_prefix": True}),
        ("combined", {"loss_over_prefix": True}),
    ],
    ids=str,
)
def test_losses_equal_their_definition(name, settings, training):
    model = make_model(name, **settings)
    inputs = make_batch(model, extra=3)
    expected = sum_of_losses(model, inputs, prefix=settings.get("loss_over_prefix", False))
    if training:
        quiet_training(model)
    outputs = model(**inputs)
    assert (outputs.logits is None) == training
    for stream, loss in enumerate(outputs.stream_losses):
        assert loss.item() == pytest.approx(expected[f"stream{stream}"], rel=1e-4)
    assert outputs.energy_loss.item() == pytest.approx(expected["energy"], rel=1e-4)
    config = model.config
    total = sum(outputs.stream_losses) + config.energy_loss_weight * outputs.energy_loss
    if model.stop_head is None:
        assert outputs.stop_loss is None
    else:
        assert outputs.stop_loss.item() == pytest.approx(expected["stop"], rel=1e-3)
        total = total + config.stop_loss_weight * outputs.stop_loss
    torch.testing.assert_close(outputs.loss, total)


def test_mixture_likelihood_equals_scipy_and_integrates_to_one():
    generator = torch.Generator().manual_seed(3)
    mixture = tuple(torch.randn(6, 3, generator=generator) for _ in range(3))
    grid = torch.linspace(-25, 25, 20_001)
    losses = mixture_nll(tuple(values.unsqueeze(1) for values in mixture), grid.expand(6, -1))
    weights = torch.softmax(mixture[0].double(), -1).numpy()
    scales = np.log1p(np.exp(mixture[2].double().numpy())) + 1e-4
    np.testing.assert_allclose(mixture_scales(mixture[2]), scales, rtol=1e-5)
    densities = sum(
        weights[:, k, None] * stats.norm.pdf(grid.numpy(), mixture[1][:, k, None], scales[:, k, None]) for k in range(3)
    )
    np.testing.assert_allclose(losses.neg().exp(), densities, rtol=1e-3, atol=1e-7)
    np.testing.assert_allclose(np.trapezoid(densities, grid.numpy()), 1, rtol=1e-3)


def test_mixture_likelihood_of_a_far_energy_is_finite():
    mixture = (torch.zeros(1, 2), torch.zeros(1, 2), torch.full((1, 2), -4.0, requires_grad=True))
    loss = mixture_nll(mixture, torch.tensor([20.0]))
    loss.sum().backward()
    assert loss.isfinite().all() and mixture[2].grad.isfinite().all()


@EACH_VARIANT
def test_right_padding_changes_neither_losses_nor_gradients(name):
    model = quiet_training(make_model(name))
    narrow, wide = make_batch(model), make_batch(model, extra=9)
    one, other = model(**narrow), model(**wide)
    for loss, wider in zip((*one.stream_losses, one.energy_loss), (*other.stream_losses, other.energy_loss)):
        torch.testing.assert_close(loss, wider)
    gradients = gradients_of(model, narrow)
    for key, gradient in gradients_of(model, wide).items():
        torch.testing.assert_close(gradient, gradients[key], rtol=1e-4, atol=1e-5, msg=key)
    # and one shower among others predicts what it predicts alone
    with torch.no_grad():
        model.eval()
        alone = {key: value[2:3, :13] if value.ndim > 1 else value[2:3] for key, value in narrow.items()}
        length = int(narrow["attention_mask"][2].sum())
        torch.testing.assert_close(
            everything(model(**narrow))[2, : min(length, 13)], everything(model(**alone))[0, : min(length, 13)],
            rtol=1e-4, atol=1e-5,
        )  # fmt: skip


def test_without_a_mask_all_positions_count():
    model = make_model()
    inputs = make_batch(model, hits=(7, 7))
    with torch.no_grad():
        expected = model(**inputs).loss
        inputs.pop("attention_mask")
        torch.testing.assert_close(model(**inputs).loss, expected)


def test_labels_that_are_left_out_do_not_count():
    model = make_model()
    inputs = make_batch(model)
    full = [loss.item() for loss in model(**inputs).stream_losses]
    inputs["labels"][1:, :, 0] = -100
    losses = model(**inputs).stream_losses
    expected = sum_of_losses(model, {**select(inputs, slice(0, 1))})
    assert losses[0].item() == pytest.approx(expected["stream0"], rel=1e-4)
    assert losses[1].item() == pytest.approx(full[1]) and losses[2].item() == pytest.approx(full[2])


@pytest.mark.parametrize("name", ["split", "combined", "monotonic", "no_stop"])
def test_accumulated_gradients_equal_one_big_batch(name):
    """Showers of different length: a mean of means would weigh the hits of small showers more."""
    model = quiet_training(make_model(name))
    inputs = make_batch(model, hits=(3, 14, 6, 20, 2, 9, 1, 4))
    num_items = (inputs["labels"] != -100).sum()
    whole = gradients_of(model, {**inputs, "num_items_in_batch": num_items})
    model.zero_grad()
    for start in range(0, 8, 2):
        model(**select(inputs, slice(start, start + 2)), num_items_in_batch=num_items).loss.backward()
    for key, gradient in whole.items():
        torch.testing.assert_close(model.get_parameter(key).grad, gradient, rtol=1e-3, atol=1e-4, msg=key)
    # and with the divisors of its own batch the loss is the plain one
    for key, gradient in gradients_of(model, inputs).items():
        torch.testing.assert_close(gradient, whole[key], rtol=1e-3, atol=1e-4, msg=key)


class Showers(torch.utils.data.Dataset):
    def __init__(self, inputs: dict):
        self.inputs = inputs

    def __len__(self):
        return len(self.inputs["input_ids"])

    def __getitem__(self, index):
        return select(self.inputs, index)


def test_trainer_accumulation_equals_one_big_batch(tmp_path):
    inputs = make_batch(make_model(), hits=(3, 14, 6, 20, 2, 9, 1, 4) * 2)
    results, losses = [], []
    for micro_batch, accumulation in ((8, 1), (2, 4)):
        model = make_model(stop_dropout=0.0, energy_noise=0.0, stop_pos_weight=5.0)
        arguments = TrainingArguments(
            output_dir=str(tmp_path / str(micro_batch)),
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=accumulation,
            max_steps=2,
            learning_rate=0.02,
            lr_scheduler_type="constant",
            optim="sgd",
            max_grad_norm=0.0,
            train_sampling_strategy="sequential",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=Showers(inputs))
        trainer.train()
        results.append(model.state_dict())
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    for key, tensor in results[0].items():
        torch.testing.assert_close(results[1][key], tensor, rtol=1e-3, atol=1e-4, msg=key)
    assert losses[0][1] != losses[0][0]


def test_energy_noise_acts_in_training_only():
    model = make_model(stop_dropout=0.0, energy_noise=1.0)
    inputs = make_batch(model)
    assert torch.equal(model(**inputs).loss, model(**inputs).loss)
    model.train()
    one, other = model(**inputs), model(**inputs)
    assert not torch.equal(one.energy_loss, other.energy_loss)
    # what the network shall predict stays clean: the stop network and the targets see no noise
    assert torch.equal(one.stop_loss, other.stop_loss)
    model.config.energy_noise = 0.0
    assert torch.equal(model(**inputs).loss, model(**inputs).loss)


def test_energies_outside_the_range_are_fed_at_its_edge():
    model = make_model(energy_min=-2.0, energy_max=2.0)
    inputs = make_batch(model, labels=False)
    far, edge = inputs["hit_energy"].clone(), inputs["hit_energy"].clone()
    far[:, 9], edge[:, 9] = 50.0, 2.0
    with torch.no_grad():
        one = everything(model(**{**inputs, "hit_energy": far}))
        assert torch.equal(one, everything(model(**{**inputs, "hit_energy": edge})))


@MODES
def test_undelay_returns_the_hits(name):
    model = make_model(name)
    inputs = make_batch(model, extra=2)
    cells, energies, num_hits = model.undelay(inputs["input_ids"], inputs["hit_energy"], inputs["attention_mask"])
    assert num_hits.tolist() == list(HITS)
    generator = torch.Generator().manual_seed(0)
    for row, count in enumerate(HITS):
        expected, expected_energies = random_hits(model.config, count, generator)
        assert torch.equal(cells[row, :count], expected + 1)
        assert torch.equal(energies[row, :count], expected_energies)


@pytest.mark.parametrize("name", ["split", "combined", "monotonic", "parallel"])
def test_a_few_steps_of_training_lower_every_loss(name):
    model = make_model(name, energy_noise=0.0, stop_pos_weight=10.0).train()
    inputs = make_batch(model, hits=(4, 6, 5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    history = []
    for _ in range(25):
        outputs = model(**inputs)
        outputs.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append([*(loss.item() for loss in outputs.stream_losses), outputs.energy_loss.item()])
    assert all(last < 0.7 * first for first, last in zip(history[0], history[-1])), (history[0], history[-1])


@MODES
def test_an_overfitted_model_reproduces_its_showers(name):
    """The streams of three showers from nothing but their incident energies, and the stop at their last hits."""
    model = make_model(name, stop_dropout=0.0, energy_noise=0.0, stop_pos_weight=5.0)
    inputs = make_batch(quiet_training(model), hits=(4, 6, 5))
    inputs["incident_energy"] = torch.tensor([10.0, 50.0, 90.0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(150):
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    hits = torch.tensor([4, 6, 5])
    output = generate(model, incident_energy=inputs["incident_energy"], do_sample=False, num_hits=hits)
    assert torch.equal(output.num_hits, hits)
    cells, energies, _ = model.undelay(inputs["input_ids"], inputs["hit_energy"], inputs["attention_mask"])
    index = torch.arange(cells.shape[1]).expand(cells.shape[:2])
    with torch.no_grad():
        stops = model.stop_head(cells, energies, inputs["incident_energy"][:, None].expand_as(index), index) > 0
    assert torch.equal(stops & (index < hits[:, None]), index == hits[:, None] - 1)
    for row, count in enumerate((4, 6, 5)):
        # in training the last positions see that the layers have ended, here the stop is not known yet
        known = model.config.num_registers + 1 + count
        assert torch.equal(output.sequences[row, :known], inputs["input_ids"][row, :known])


@pytest.mark.parametrize("name", ["split", "combined", "conditioned", "no_registers", "far_delays"])
def test_generated_showers_are_what_the_tokenizer_would_write(name):
    model = opinionated(name)
    config = model.config
    tokenizer = SpadeTokenizer(
        nbins=config.nbins, axis_mode=config.axis_mode, num_registers=config.num_registers, sorting="none",
        stream_delays=config.stream_delays, energy_delay=config.energy_delay,
    )  # fmt: skip
    # one hit in four is the last
    constant_stop(model, math.log(1000 / 3))
    output = generate(model, incident_energy=ENERGIES * 3, seed=4)
    assert output.num_hits.max() < config.max_num_hits
    rows = tokenizer.batch_decode(output, incident_energy=np.array(ENERGIES * 3))
    assert rows["num_hits"].tolist() == output.num_hits.tolist() and len(set(output.num_hits.tolist())) > 2
    batch = tokenizer(rows, padding=True, return_tensors="pt")
    assert torch.equal(batch["input_ids"], output.sequences)
    torch.testing.assert_close(batch["hit_energy"], output.continuous["hit_energy"], rtol=1e-4, atol=1e-4)


def test_a_batch_without_a_complete_hit_has_finite_losses():
    model = quiet_training(make_model())
    inputs = make_batch(model, hits=(3, 3))
    short = {key: value[:, :4] if value.ndim > 1 else value for key, value in inputs.items()}
    outputs = model(**short)
    outputs.loss.backward()
    assert outputs.loss.isfinite() and outputs.energy_loss.item() == 0


# --- bad input of forward ---


@pytest.mark.parametrize(
    "name, changes, words",
    [
        ("split", {"hit_energy": None}, ["hit_energy", "missing"]),
        ("split", {"incident_energy": None}, ["incident_energy", "missing", "GeV"]),
        ("split", {"hit_energy": torch.zeros(4, 3)}, ["hit_energy", "(4, 3)", "(4, 18)"]),
        ("split", {"hit_energy": torch.zeros(4, 18, 1)}, ["hit_energy", "(4, 18, 1)"]),
        ("split", {"incident_energy": torch.ones(3)}, ["incident_energy", "(3,)", "(4,)"]),
        ("split", {"incident_energy": torch.ones(4, 1)}, ["incident_energy", "(4, 1)", "(4,)"]),
        ("split", {"incident_energy": torch.tensor(50.0)}, ["incident_energy", "()"]),
        ("split", {"incident_energy": [50.0] * 4}, ["incident_energy", "list"]),
        ("split", {"input_ids": torch.zeros(4, 18, dtype=torch.long)}, ["input_ids", "(4, 18)", "3)"]),
        ("split", {"input_ids": torch.zeros(4, 18, 1, dtype=torch.long)}, ["input_ids", "(4, 18, 1)", "3)"]),
        ("combined", {"input_ids": torch.zeros(4, 18, 3, dtype=torch.long)}, ["input_ids", "(4, 18, 3)", "1)"]),
        ("split", {"labels": torch.zeros(4, 18, dtype=torch.long)}, ["labels", "(4, 18)"]),
        ("split", {"attention_mask": torch.zeros(4, 18).index_fill(1, torch.arange(5, 18), 1)}, ["padding", "labels"]),
    ],
)
def test_hostile_inputs_are_one_clear_line(name, changes, words):
    model = make_model(name)
    inputs = {**make_batch(model), **changes}
    with pytest.raises(ValueError) as error:
        model(**{key: value for key, value in inputs.items() if value is not None})
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


# --- generation: the loop ---


def generate(model, seed: int = 0, incident_energy=ENERGIES, **kwargs):
    torch.manual_seed(seed)
    return model.generate(incident_energy=incident_energy, **kwargs)


def endless(model, steps: int, **kwargs):
    """Without a stop, so that all rows have the same length."""
    return generate(model, max_new_tokens=steps, stop_threshold=2.0, stop_sampling=False, **kwargs)


def opinionated(name: str = "split", seed: int = 0, **settings) -> SpadeForCausalLM:
    """Untrained heads are almost flat: larger ones make rows differ."""
    model = make_model(name, seed, **settings)
    with torch.no_grad():
        for head in (*model.token_heads, model.energy_head.means):
            head.weight *= 4
    return model


def manual_greedy(model, steps: int, ids=None, energy=None, incident_energy=ENERGIES):
    """The definition: feed everything, take the best cell of each stream and the mean of the likeliest Gaussian."""
    config = model.config
    missing = torch.tensor(config.stream_missing_token_ids)
    begin = config.num_registers + 1
    if ids is None:
        ids = missing.repeat(len(incident_energy), begin, 1)
        energy = torch.zeros(ids.shape[:2])
    for _ in range(steps):
        with torch.no_grad():
            outputs = model(
                ids, hit_energy=energy, incident_energy=torch.tensor(incident_energy), use_cache=False
            )  # fmt: skip
        position = ids.shape[1] - begin
        step = missing.repeat(len(ids), 1)
        for stream, delay in enumerate(config.stream_delays):
            if position >= delay:
                step[:, stream] = outputs.logits[stream][:, -1, 1 : missing[stream]].argmax(-1) + 1
        weights, means, _ = (values[:, -1] for values in outputs.energy_mixture)
        value = means.gather(-1, weights.argmax(-1, keepdim=True)).squeeze(-1)
        value = value.clamp(config.energy_min, config.energy_max) * (position >= config.energy_delay)
        ids, energy = torch.cat([ids, step[:, None]], dim=1), torch.cat([energy, value[:, None]], dim=1)
    return ids, energy


HOW = {
    "decoder": {},
    "no_cache": {"use_cache": False},
    "dynamic": {"cache_implementation": "dynamic"},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "given": {"past_key_values": "empty"},
    "through_forward": {"output_hidden_states": True},
}


@pytest.mark.parametrize(
    "name, how", [(name, how) for name in VARIANTS for how in HOW if name in ("split", "combined") or how == "decoder"]
)
def test_greedy_is_the_same_with_every_cache(name, how, monkeypatch):
    model = opinionated(name)
    kwargs = dict(HOW[how])
    if how == "given":
        kwargs["past_key_values"] = DynamicCache(config=model.config)
    used = []
    make_decoder = type(model).make_decoder
    monkeypatch.setattr(type(model), "make_decoder", lambda *args, **kw: used.append(1) or make_decoder(*args, **kw))
    ids, energy = manual_greedy(model, 14)
    output = endless(model, 14, do_sample=False, **kwargs)
    assert torch.equal(output.sequences, ids)
    torch.testing.assert_close(output.continuous["hit_energy"], energy, rtol=1e-3, atol=1e-4)
    # the short cut is taken where it should be, and only there
    assert bool(used) == (how in ("decoder", "dynamic", "given"))
    assert output.num_hits.tolist() == [14 - model.config.max_stream_delay] * 4
    assert len({tuple(row.flatten().tolist()) for row in ids}) > 1


@pytest.mark.parametrize("name", ["split", "combined", "monotonic", "two_key_heads"])
def test_sampling_is_the_same_with_every_cache(name):
    model = opinionated(name)
    outputs = [endless(model, 16, seed=5, top_p=0.95, **HOW[how]) for how in ("decoder", "no_cache", "static")]
    for output in outputs[1:]:
        assert torch.equal(output.sequences, outputs[0].sequences)
        torch.testing.assert_close(
            output.continuous["hit_energy"], outputs[0].continuous["hit_energy"], rtol=1e-3, atol=1e-3
        )


def test_eager_attention_generates_the_same():
    model = opinionated()
    expected = endless(model, 12, do_sample=False)
    model.set_attn_implementation("eager")
    assert torch.equal(endless(model, 12, do_sample=False).sequences, expected.sequences)


def test_bfloat16_generation():
    model = opinionated().to(torch.bfloat16)
    for kwargs in ({}, {"use_cache": False}):
        output = generate(model, num_hits=8, **kwargs)
        assert output.num_hits.tolist() == [8] * 4 and output.continuous["hit_energy"].dtype == torch.float32
        assert output.continuous["hit_energy"].isfinite().all()


def test_defaults_are_the_learned_distribution():
    config = make_model().generation_config
    assert config.do_sample and config.top_k == 0 and config.top_p == 1.0 and config.temperature == 1.0
    assert config.stop_sampling and config.max_new_tokens == 40 + 3 and config.energy_temperature == 1.0
    output = generate(make_model(), stop_threshold=2.0, stop_sampling=False)
    assert output.num_hits.tolist() == [40] * 4


def test_seeds_reproduce():
    model = opinionated()
    one, same, other = (generate(model, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.sequences, same.sequences) and torch.equal(one.num_hits, same.num_hits)
    assert torch.equal(one.continuous["hit_energy"], same.continuous["hit_energy"])
    assert one.sequences.shape != other.sequences.shape or not torch.equal(one.sequences, other.sequences)


def test_num_return_sequences():
    model = opinionated()
    output = generate(model, num_return_sequences=3, num_hits=[3, 5, 7, 9])
    assert output.num_hits.tolist() == [3, 3, 3, 5, 5, 5, 7, 7, 7, 9, 9, 9]
    assert not torch.equal(output.sequences[9], output.sequences[10])
    repeated = np.repeat(ENERGIES, 3).tolist()
    same = generate(model, incident_energy=repeated, num_hits=np.repeat([3, 5, 7, 9], 3))
    assert torch.equal(output.sequences, same.sequences)


@pytest.mark.parametrize("incident_energy", [50.0, [50.0], np.array([50.0]), torch.tensor([50], dtype=torch.int64)])
def test_incident_energy_of_any_kind(incident_energy):
    model = opinionated()
    expected = generate(model, incident_energy=torch.tensor([50.0]), num_hits=4)
    assert torch.equal(generate(model, incident_energy=incident_energy, num_hits=4).sequences, expected.sequences)


def check_layout(model, output):
    """Rows as the tokenizer writes showers of that number of hits."""
    config = model.config
    begin = config.num_registers + 1
    missing = torch.tensor(config.stream_missing_token_ids)
    ids, energy = output.sequences, output.continuous["hit_energy"]
    for row, count in enumerate(output.num_hits.tolist()):
        total = begin + count + config.max_stream_delay
        assert total <= ids.shape[1]
        assert not ids[row, total:].any() and not energy[row, total:].any()
        for stream, delay in enumerate(config.stream_delays):
            values = ids[row, :, stream]
            hits = slice(begin + delay, begin + delay + count)
            assert ((values[hits] >= 1) & (values[hits] <= config.stream_num_cells[stream])).all()
            assert (values[: begin + delay] == missing[stream]).all()
            assert (values[begin + delay + count : total] == missing[stream]).all()
        assert not energy[row, : begin + config.energy_delay].any()
        assert energy[row, begin + config.energy_delay : begin + config.energy_delay + count].all()
    assert ids.shape[1] == begin + int(output.num_hits.max()) + config.max_stream_delay


@EACH_VARIANT
def test_exact_numbers_of_hits(name):
    model = opinionated(name)
    output = generate(model, num_hits=[1, 13, 40, 6])
    assert output.num_hits.tolist() == [1, 13, 40, 6]
    check_layout(model, output)
    assert generate(model, num_hits=5).num_hits.tolist() == [5] * 4


@pytest.mark.parametrize(
    "name, drop, how",
    [(name, True, "decoder") for name in VARIANTS]
    + [(name, drop, "no_cache") for name in ("split", "combined") for drop in (True, False)],
)
def test_rows_of_different_length_equal_rows_generated_alone(name, drop, how):
    model = opinionated(name)
    numbers = [4, 11, 1, 7, 15, 2, 9, 3]
    energies = np.linspace(12, 95, 8).tolist()
    together = generate(
        model, incident_energy=energies, num_hits=numbers, do_sample=False, drop_finished_rows=drop, **HOW[how]
    )
    check_layout(model, together)
    for row, (count, energy) in enumerate(zip(numbers, energies)):
        alone = generate(model, incident_energy=energy, num_hits=count, do_sample=False)
        length = alone.sequences.shape[1]
        assert torch.equal(together.sequences[row, :length], alone.sequences[0])
        torch.testing.assert_close(
            together.continuous["hit_energy"][row, :length], alone.continuous["hit_energy"][0], rtol=1e-3, atol=1e-4
        )


def test_finished_rows_leave_the_batch():
    model = opinionated()
    sizes = []
    handle = model.stop_head.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    generate(model, incident_energy=[50.0] * 8, seed=3, stop_min_hits=2)
    handle.remove()
    widths = []
    original = model._choose_next

    def choose(input_ids, *args):
        widths.append(len(input_ids))
        return original(input_ids, *args)

    model._choose_next = choose
    output = generate(model, incident_energy=[50.0] * 8, num_hits=[2, 2, 2, 2, 2, 2, 20, 20])
    assert widths[0] == 8 and widths[-1] == 2 and output.past_key_values is None
    widths.clear()
    output = generate(model, incident_energy=[50.0] * 8, num_hits=[2] * 6 + [20] * 2, drop_finished_rows=False)
    assert set(widths) == {8} and output.past_key_values is not None


# --- prompts ---


@pytest.mark.parametrize("name", ["split", "combined", "monotonic", "no_registers", "far_delays"])
@pytest.mark.parametrize("how", ["decoder", "no_cache", "static"])
def test_prompts_with_hits_continue(name, how):
    model = opinionated(name)
    ids, energy = manual_greedy(model, 16)
    cut = model.config.num_registers + 7
    output = endless(model, ids.shape[1] - cut, inputs=ids[:, :cut], hit_energy=energy[:, :cut], do_sample=False,
                     **HOW[how])  # fmt: skip
    assert torch.equal(output.sequences, ids)
    torch.testing.assert_close(output.continuous["hit_energy"], energy, rtol=1e-3, atol=1e-4)
    # the hits of the prompt count
    output = generate(model, inputs=ids[:, :cut], hit_energy=energy[:, :cut], num_hits=8, do_sample=False, **HOW[how])
    assert output.num_hits.tolist() == [8] * 4
    check_layout(model, output)


@pytest.mark.parametrize("name", ["split", "combined", "monotonic", "no_registers"])
@pytest.mark.parametrize("how", ["decoder", "no_cache", "static"])
def test_left_padded_prompts_continue_as_alone(name, how):
    model = opinionated(name)
    ids, energy = manual_greedy(model, 16)
    begin = model.config.num_registers + 1
    lengths = [begin + 9, begin, begin + 2, begin + 6]
    longest = max(lengths)
    prompts, energies = torch.zeros(4, longest, ids.shape[2], dtype=torch.long), torch.zeros(4, longest)
    for row, length in enumerate(lengths):
        prompts[row, longest - length :], energies[row, longest - length :] = ids[row, :length], energy[row, :length]
    mask = (torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]).long()
    for extra in ({}, {"attention_mask": mask}):
        output = endless(model, 7, inputs=prompts, hit_energy=energies, do_sample=False, **extra, **HOW[how])
        for row, length in enumerate(lengths):
            assert torch.equal(output.sequences[row, longest - length :], ids[row, : length + 7])
            torch.testing.assert_close(
                output.continuous["hit_energy"][row, longest - length :],
                energy[row, : length + 7],
                rtol=1e-3,
                atol=1e-4,
            )
        assert output.num_hits.tolist() == [
            max(length + 7 - begin - model.config.max_stream_delay, 0) for length in lengths
        ]
    # with an end: the same as without padding
    output = generate(model, inputs=prompts, hit_energy=energies, num_hits=[11, 5, 6, 8], do_sample=False, **HOW[how])
    assert output.num_hits.tolist() == [11, 5, 6, 8]
    for row, count in enumerate((11, 5, 6, 8)):
        alone = generate(model, incident_energy=ENERGIES[row], num_hits=count, do_sample=False)
        start = longest - lengths[row]
        assert torch.equal(output.sequences[row, start : start + alone.sequences.shape[1]], alone.sequences[0])
        assert not output.sequences[row, start + alone.sequences.shape[1] :].any()


def test_continuation_from_a_returned_cache():
    model = opinionated()
    whole = endless(model, 15, do_sample=False)
    first = endless(model, 6, do_sample=False)
    second = endless(
        model, 9, inputs=first.sequences, hit_energy=first.continuous["hit_energy"],
        past_key_values=first.past_key_values, do_sample=False,
    )  # fmt: skip
    assert torch.equal(second.sequences, whole.sequences)


# --- the stop ---


def constant_stop(model, logit: float):
    """A stop network that always gives the same logit."""
    with torch.no_grad():
        last = model.stop_head.classifier[-1]
        last.weight.zero_()
        last.bias.fill_(logit)
    return model


class StopAt(nn.Module):
    """In place of the stop network: yes at hits of the given numbers, one list per incident energy."""

    def __init__(self, hits: dict[float, list[int]]):
        super().__init__()
        self.hits, self.asked = hits, []

    def forward(self, cells, hit_energy, incident_energy, hit_index):
        assert cells.shape == (*hit_energy.shape, 3) and (cells >= 0).all()
        self.asked.append(hit_index.tolist())
        answers = [index in self.hits[energy] for energy, index in zip(incident_energy.tolist(), hit_index.tolist())]
        return torch.where(torch.tensor(answers), 20.0, -20.0)


def stop_at(name: str, hits: list[list[int]], **settings) -> SpadeForCausalLM:
    model = opinionated(name, **settings)
    model.stop_head = StopAt(dict(zip(ENERGIES, hits)))
    return model


@pytest.mark.parametrize("drop", [True, False])
@pytest.mark.parametrize("do_sample", [True, False])
@pytest.mark.parametrize("name", ["split", "combined", "far_delays", "energy_beside_y", "no_registers"])
def test_a_shower_ends_with_the_hit_that_the_stop_network_says(name, do_sample, drop):
    model = stop_at(name, [[0], [7], [19, 20], [3, 4]])
    output = generate(model, do_sample=do_sample, stop_sampling=False, drop_finished_rows=drop)
    assert output.num_hits.tolist() == [1, 8, 20, 4]
    check_layout(model, output)
    # asked once about every hit, from the first one on
    assert [max(asked) for asked in model.stop_head.asked] == list(range(len(model.stop_head.asked)))


def test_votes_must_follow_each_other():
    model = stop_at("split", [[2, 4, 5], [2, 3, 4], [1, 3, 5, 7, 9, 11, 12], [0]])
    output = generate(model, stop_votes=2, stop_sampling=False, max_new_tokens=23)
    assert output.num_hits.tolist() == [6, 4, 13, 20]
    output = generate(model, stop_votes=3, stop_sampling=False, max_new_tokens=23)
    assert output.num_hits.tolist() == [20, 5, 20, 20]


def test_least_number_of_hits():
    model = stop_at("split", [[2, 9], [5, 6], [16, 17], [0, 1, 2, 3, 4, 5, 6]])
    output = generate(model, stop_min_hits=6, stop_sampling=False)
    # the index of the hit from which on the network is asked
    assert output.num_hits.tolist() == [10, 7, 17, 7]


@pytest.mark.parametrize("threshold, stops", [(0.5, True), (0.74, True), (0.76, False), (1.0, False)])
def test_threshold_is_a_probability(threshold, stops):
    model = constant_stop(opinionated(), math.log(3.0))
    output = generate(model, do_sample=False, stop_threshold=threshold)
    assert output.num_hits.tolist() == [1 if stops else 40] * 4


@pytest.mark.parametrize("name", ["split", "combined", "far_delays"])
def test_the_stop_network_sees_each_hit_as_in_training(name):
    model = opinionated(name)
    seen = []
    hook = model.stop_head.register_forward_hook(
        lambda module, args, output: seen.append((*(value.clone() for value in args), output.clone()))
    )
    output = endless(model, 15, do_sample=False)
    hook.remove()
    cells, energies, num_hits = model.undelay(
        output.sequences, output.continuous["hit_energy"], torch.ones(output.sequences.shape[:2])
    )
    assert len(seen) == int(num_hits[0])
    for hit, (cell, energy, incident, index, _) in enumerate(seen):
        assert torch.equal(cell, cells[:, hit]) and torch.equal(energy, energies[:, hit])
        assert incident.tolist() == ENERGIES and index.tolist() == [hit] * 4
    expected = model.stop_head(
        cells,
        energies,
        torch.tensor(ENERGIES)[:, None].expand(energies.shape),
        torch.arange(len(seen)).expand(energies.shape),
    )
    torch.testing.assert_close(torch.stack([part[-1] for part in seen], dim=1), expected)


@pytest.mark.parametrize("weight, probability", [(1000.0, 0.2), (1.0, 0.2), (30.0, 0.5)])
def test_drawn_ends_are_calibrated(weight, probability):
    """Constant odds per hit give geometric numbers of hits, whatever the weight of the positives in training."""
    model = make_model(stop_pos_weight=weight, max_num_hits=60)
    # where training would lead: the minimum of the weighted cross entropy
    constant_stop(model, math.log(weight * probability / (1 - probability)))
    numbers = generate(model, incident_energy=[50.0] * 3000, seed=11).num_hits.numpy()
    bins = np.arange(1, 13)
    observed = [(numbers == k).sum() for k in bins] + [(numbers > 12).sum()]
    expected = [*stats.geom.pmf(bins, probability), stats.geom.sf(12, probability)]
    keep = np.array(expected) * 3000 > 5
    observed, expected = np.array(observed)[keep], np.array(expected)[keep]
    assert stats.chisquare(observed, expected / expected.sum() * observed.sum()).pvalue > 1e-3


def test_the_minimum_of_the_weighted_loss_is_where_sampling_expects_it():
    head = SpadeStopHead(tiny_config(stop_pos_weight=50.0))
    logit = torch.zeros((), requires_grad=True)
    num_hits = torch.tensor([4, 10, 2])
    optimizer = torch.optim.LBFGS([logit], max_iter=50)

    def closure():
        optimizer.zero_grad()
        loss = head.loss(logit.expand(3, 10), num_hits)
        loss.backward()
        return loss

    optimizer.step(closure)
    probability = 3 / 16
    assert logit.item() - math.log(50.0) == pytest.approx(math.log(probability / (1 - probability)), abs=1e-3)


def test_without_a_fixed_weight_the_threshold_decides():
    model = constant_stop(opinionated(stop_pos_weight=0.0), 1.0)
    assert generate(model).num_hits.tolist() == [40] * 4
    assert generate(model, stop_threshold=0.7).num_hits.tolist() == [1] * 4


@pytest.mark.parametrize("name, surplus, offset", [("split", 5, 4), ("combined", 3, 2)])
def test_published_stop_keeps_what_was_begun(name, surplus, offset):
    """One position later, with more hits: after a yes about hit i, i + 5 hits in split mode and i + 3 combined."""
    model = opinionated(name)
    asked = []

    class YesAtTheFourth(nn.Module):
        def forward(self, cells, hit_energy, incident_energy, hit_index):
            asked.append(hit_index[0].item())
            return torch.full_like(hit_energy, 20.0 if len(asked) == 4 else -20.0)

    model.stop_head = YesAtTheFourth()
    output = generate(model, do_sample=False, stop_published=True)
    assert asked == [offset, offset + 1, offset + 2, offset + 3]
    assert output.num_hits.tolist() == [3 + surplus] * 4
    begin = model.config.num_registers + 1
    for stream, delay in enumerate(model.config.stream_delays):
        values = output.sequences[:, begin + delay :, stream]
        is_cell = (values >= 1) & (values <= model.config.stream_num_cells[stream])
        assert torch.equal(is_cell, (torch.arange(values.shape[1]) < 3 + surplus).expand(4, -1))


def test_model_without_a_stop_network_runs_to_the_end():
    model = opinionated("no_stop")
    assert generate(model).num_hits.tolist() == [40] * 4
    assert generate(model, num_hits=3).num_hits.tolist() == [3] * 4


def test_untrimmed_sequences_hold_what_was_begun():
    model = opinionated("split")
    trimmed, whole = (generate(model, num_hits=6, do_sample=False, trim_sequences=trim) for trim in (True, False))
    assert torch.equal(trimmed.num_hits, whole.num_hits) and torch.equal(trimmed.sequences, whole.sequences)
    # published: z of further hits is drawn before the stop is known
    model = stop_at("split", [[4], [5], [6], [9]])
    trimmed, whole = (
        generate(model, do_sample=False, stop_published=True, trim_sequences=trim) for trim in (True, False)
    )
    assert torch.equal(trimmed.num_hits, whole.num_hits) and trimmed.sequences.shape == whole.sequences.shape


@pytest.mark.parametrize("steps, hits", [(1, 0), (3, 0), (4, 1), (10, 7)])
def test_too_few_steps_for_a_hit(steps, hits):
    output = endless(opinionated(), steps)
    assert output.num_hits.tolist() == [hits] * 4 and output.sequences.shape[1] == 3 + steps


# --- energies ---


def constant_energy(model, weights, means, scales):
    """An energy head that gives the same mixture everywhere; `scales` are standard deviations."""
    with torch.no_grad():
        for layer in (model.energy_head.logits, model.energy_head.means, model.energy_head.log_scales):
            layer.weight.zero_()
        model.energy_head.logits.bias.copy_(torch.tensor(weights).log())
        model.energy_head.means.bias.copy_(torch.tensor(means))
        model.energy_head.log_scales.bias.copy_(torch.expm1(torch.tensor(scales, dtype=torch.float64) - 1e-4).log())
    return model


def drawn_energies(output, model) -> np.ndarray:
    begin = model.config.num_registers + 1 + model.config.energy_delay
    return output.continuous["hit_energy"][:, begin:].flatten().numpy()


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_energies_follow_the_mixture(temperature):
    weights, means, scales = [0.6, 0.3, 0.1], [-1.0, 2.0, 6.0], [0.5, 0.2, 1.5]
    model = constant_energy(make_model(), weights, means, scales)
    output = endless(model, 13, incident_energy=[50.0] * 400, energy_temperature=temperature)
    values = drawn_energies(output, model)
    assert len(values) == 4000
    tempered = np.array(weights) ** (1 / temperature)
    tempered /= tempered.sum()

    def cdf(x):
        return sum(w * stats.norm.cdf(x, m, s) for w, m, s in zip(tempered, means, scales))

    assert stats.kstest(values, cdf).pvalue > 1e-3
    if temperature != 1:
        assert stats.kstest(
            values, lambda x: sum(w * stats.norm.cdf(x, m, s) for w, m, s in zip(weights, means, scales))
        ).pvalue < 1e-6  # fmt: skip


def test_drawn_energies_are_independent_of_each_other():
    model = constant_energy(make_model(), [0.5, 0.3, 0.2], [0.0, 1.0, 3.0], [1.0, 1.0, 1.0])
    output = endless(model, 23, incident_energy=[50.0] * 300)
    values = output.continuous["hit_energy"][:, 6:]
    assert abs(stats.pearsonr(values[:, :-1].flatten(), values[:, 1:].flatten()).statistic) < 0.06


def test_energies_are_kept_in_their_range():
    model = constant_energy(make_model(energy_min=-0.5, energy_max=1.0), [0.4, 0.3, 0.3], [-5.0, 0.0, 5.0], [0.5] * 3)
    values = drawn_energies(endless(model, 13, incident_energy=[50.0] * 20), model)
    assert values.min() == -0.5 and values.max() == 1.0 and ((values > -0.5) & (values < 1.0)).any()
    assert set(drawn_energies(endless(model, 6, do_sample=False), model)) == {-0.5}


# --- warpers, processors, criteria ---


def steps_of(model, steps: int = 6, **kwargs):
    output = endless(model, steps, output_scores=True, output_logits=True, **kwargs)
    return output, output.scores, output.logits


def test_temperature_of_single_streams():
    config = GenerationConfig(
        do_sample=True, top_k=0, temperature=1.0, max_new_tokens=6, return_dict_in_generate=True, output_scores=True,
        output_logits=True, stream_overrides={"0": {"temperature": 0.5}, "2": {"temperature": 2.0, "top_k": 3}},
    )  # fmt: skip
    output = generate(opinionated(), generation_config=config)
    for scores, logits in zip(output.scores, output.logits):
        for stream, temperature in enumerate((0.5, 1.0, 2.0)):
            drawn = scores[stream].isfinite()
            torch.testing.assert_close(scores[stream][drawn], (logits[stream] / temperature)[drawn])
        assert (scores[2].isfinite().sum(-1) == 3).all()


def test_scores_logits_and_hidden_states():
    model = opinionated()
    plain = endless(model, 6, temperature=0.7)
    output, scores, logits = steps_of(model, temperature=0.7, output_hidden_states=True)
    assert torch.equal(plain.sequences, output.sequences) and len(scores) == len(logits) == 6
    assert len(output.hidden_states) == 6
    with torch.no_grad():
        expected = model(
            output.sequences[:, :-1],
            hit_energy=output.continuous["hit_energy"][:, :-1],
            incident_energy=torch.tensor(ENERGIES),
        ).logits
    for stream, cells in enumerate(NBINS):
        actual = torch.stack([step[stream] for step in logits], dim=1)
        torch.testing.assert_close(actual, expected[stream][:, 2:], rtol=1e-4, atol=1e-4)
        for step in scores:
            # pad and MISSING are no cells
            assert step[stream].isfinite().nonzero()[:, 1].unique().tolist() == list(range(1, cells + 1))


def test_streamer_gets_every_position():
    class Collector:
        def __init__(self):
            self.pieces, self.ended = [], False

        def put(self, value):
            self.pieces.append(value)

        def end(self):
            self.ended = True

    streamer = Collector()
    output = generate(opinionated(), num_hits=[2, 9, 4, 6], streamer=streamer)
    assert streamer.ended and streamer.pieces[0].shape == (4, 3, 3)
    assert torch.equal(torch.stack(streamer.pieces[1:], dim=1), output.sequences[:, 3:])


class Spy(LogitsProcessor):
    def __init__(self):
        self.batches = []

    def __call__(self, input_ids, scores):
        assert input_ids.ndim == 2 and len(input_ids) == len(scores)
        self.batches.append(len(scores))
        return scores


def test_a_foreign_processor_keeps_its_rows():
    spy = Spy()
    output = generate(opinionated(), num_hits=[1, 2, 3, 20], logits_processor=[StreamLogitsProcessor(1, spy)])
    assert set(spy.batches) == {4} and output.num_hits.tolist() == [1, 2, 3, 20]
    spy.batches, spy.keeps_rows = [], False
    generate(opinionated(), num_hits=[1, 2, 3, 20], logits_processor=[spy])
    assert min(spy.batches) == 1


@pytest.mark.parametrize("keeps_rows", [True, False])
def test_a_joint_processor_says_whether_it_keeps_its_rows(keeps_rows):
    batches = []

    class Joint(JointLogitsProcessor):
        def __call__(self, input_ids, scores):
            batches.append(len(input_ids))
            return scores

    Joint.keeps_rows = keeps_rows
    generate(opinionated(), num_hits=[1, 2, 3, 20], logits_processor=[Joint()])
    assert (min(batches) == 4) == keeps_rows


def test_allowed_tokens_are_asked_for_with_the_number_of_the_row():
    """The stock constraint by row must not be given the numbers of a batch that has shrunk."""

    def allowed(row, ids):
        return [row + 1]

    output = generate(opinionated(), num_hits=[1, 2, 3, 20], prefix_allowed_tokens_fn=allowed)
    begin = 3
    for row, count in enumerate((1, 2, 3, 20)):
        for stream, delay in enumerate((1, 2, 0)):
            assert (output.sequences[row, begin + delay : begin + delay + count, stream] == row + 1).all()


class EndRow(StoppingCriteria):
    """Ends one row when the sequence has so many positions."""

    def __init__(self, row: int, length: int):
        self.row, self.length = row, length

    def __call__(self, input_ids, scores, **kwargs):
        assert input_ids.ndim == 3 and len(input_ids) == 4
        done = torch.zeros(len(input_ids), dtype=torch.bool)
        done[self.row] = input_ids.shape[1] >= self.length
        return done


def test_a_criterion_from_elsewhere_ends_a_row():
    model = opinionated()
    alone = endless(model, 6, incident_energy=ENERGIES[1], do_sample=False)
    output = endless(model, 12, stopping_criteria=[EndRow(1, 9)], do_sample=False)
    assert not output.sequences[1, 9:].any() and not output.continuous["hit_energy"][1, 9:].any()
    # 9 positions: 2 registers, BOS, 3 of delay, 3 hits
    assert output.num_hits.tolist() == [9, 3, 9, 9]
    assert torch.equal(output.sequences[1, :9], alone.sequences[0])


def test_inside_training_then_backward():
    """What `generate` returns can be trained on: nothing of it is left in inference mode."""
    model = opinionated().train()
    output = generate(model, num_hits=[3, 5, 2, 7])
    assert model.training
    for tensor in (output.sequences, output.num_hits, output.continuous["hit_energy"]):
        assert not tensor.is_inference()
    inputs = {
        "input_ids": output.sequences,
        "hit_energy": output.continuous["hit_energy"],
        "incident_energy": torch.tensor(ENERGIES),
        "attention_mask": (output.sequences != 0).any(-1).long(),
    }
    labels = output.sequences.masked_fill(output.sequences == torch.tensor(model.config.stream_missing_token_ids), -100)
    loss = model(**inputs, labels=labels.masked_fill(output.sequences == 0, -100)).loss
    loss.backward()
    assert loss.isfinite() and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 1e-3 * parameter.grad
    assert torch.equal(endless(model.eval(), 10, do_sample=False).sequences, manual_greedy(model, 10)[0])


def hits_of(model, output) -> list[list[tuple[int, ...]]]:
    cells, _, _ = model.undelay(
        output.sequences, output.continuous["hit_energy"], torch.ones(output.sequences.shape[:2])
    )
    return [
        [tuple(cell) for cell in row[:count].tolist()] for row, count in zip(cells, output.num_hits.tolist())
    ]  # fmt: skip


CROWDED = {"nbins": (2, 3, 4), "max_num_hits": 24}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("do_sample", [True, False])
@pytest.mark.parametrize("name", ["split", "combined", "far_delays", "energy_beside_y"])
def test_no_cell_is_hit_twice(name, do_sample, seed):
    """A grid that is almost filled."""
    model = opinionated(name, seed, **CROWDED)
    processor = OccupiedCellLogitsProcessor(model.config)
    numbers = [23, 20, 3, 22]
    output = generate(model, seed, num_hits=numbers, do_sample=do_sample, logits_processor=[processor])
    for row, hits in enumerate(hits_of(model, output)):
        assert len(hits) == numbers[row] == len(set(hits))
    free = generate(model, seed, num_hits=numbers, do_sample=do_sample)
    assert any(len(hits) > len(set(hits)) for hits in hits_of(model, free))


def test_no_cell_is_hit_twice_behind_left_padded_prompts():
    model = opinionated(**CROWDED)
    processor = OccupiedCellLogitsProcessor(model.config)
    ids = generate(model, num_hits=15, logits_processor=[processor])
    prompts = torch.zeros(4, 12, 3, dtype=torch.long)
    energies = torch.zeros(4, 12)
    for row, length in enumerate((12, 3, 7, 9)):
        prompts[row, 12 - length :] = ids.sequences[row, :length]
        energies[row, 12 - length :] = ids.continuous["hit_energy"][row, :length]
    output = generate(model, inputs=prompts, hit_energy=energies, num_hits=20, logits_processor=[processor])
    begin = [12 - length + 3 for length in (12, 3, 7, 9)]
    for row in range(4):
        cells = torch.stack(
            [output.sequences[row, begin[row] + delay :, k][:20] for k, delay in enumerate((1, 2, 0))], dim=-1
        )
        assert len({tuple(cell) for cell in cells.tolist()}) == 20


def test_free_cells_keep_their_scores():
    """The processor removes what is occupied and nothing else: against a count by hand."""
    model = opinionated(**CROWDED)
    processor = OccupiedCellLogitsProcessor(model.config)
    output = generate(model, num_hits=20, logits_processor=[processor])
    ids = output.sequences
    for position in range(3, 20):
        scores = tuple(torch.zeros(4, cells + 2) for cells in model.config.nbins)
        processed = processor(ids[:, :position], scores)
        for row in range(4):
            columns = {k: ids[row, 3 + delay :, k].tolist() for k, delay in enumerate((1, 2, 0))}
            for stream, delay, known in ((2, 0, ()), (0, 1, (2,)), (1, 2, (2, 0))):
                count = position - 3 - delay
                if count < 0:
                    assert not processed[stream][row].any()
                    continue
                capacity = {2: 2 * 3, 0: 3, 1: 1}[stream]
                for cell in range(1, model.config.nbins[stream] + 1):
                    used = sum(
                        columns[stream][hit] == cell and all(columns[k][hit] == columns[k][count] for k in known)
                        for hit in range(count)
                    )
                    assert processed[stream][row, cell].isinf().item() == (used >= capacity)


@pytest.mark.parametrize("name", ["split", "combined"])
@pytest.mark.parametrize("how", ["processor", "model"])
def test_layers_never_go_back(name, how):
    model = opinionated(name, layer_monotonic=how == "model")
    processors = [layer_monotonic_processor(model.config)] if how == "processor" else []

    def goes_back(output):
        return any(later[2] < former[2] for hits in hits_of(model, output) for former, later in zip(hits, hits[1:]))

    for seed in range(5):
        output = generate(model, seed, num_hits=15, logits_processor=processors, temperature=2.0)
        assert not goes_back(output)
    assert any(goes_back(generate(make_model(name), seed, num_hits=15)) for seed in range(5))


def test_layer_mask_is_the_processor():
    """The same layers are possible with the option of the model and with the processor."""
    for name in ("split", "combined"):
        model = opinionated(name, layer_monotonic=True)
        _, scores, logits = steps_of(model, 10, logits_processor=[layer_monotonic_processor(model.config)])
        for step_scores, step_logits in zip(scores, logits):
            stream = -1
            cells = slice(1, model.config.stream_num_cells[stream] + 1)
            assert torch.equal(step_scores[stream][:, cells].isinf(), step_logits[stream][:, cells] < -1e8)


def test_generation_settings_are_saved_with_the_model(tmp_path):
    model = opinionated()
    model.generation_config.update(stop_min_hits=4, energy_temperature=0.5, stop_sampling=False, stop_threshold=0.3)
    model.save_pretrained(tmp_path)
    loaded = SpadeForCausalLM.from_pretrained(tmp_path).eval()
    for name in ("stop_min_hits", "energy_temperature", "stop_sampling", "stop_threshold", "max_new_tokens"):
        assert getattr(loaded.generation_config, name) == getattr(model.generation_config, name)
    one, other = generate(model), generate(loaded)
    assert torch.equal(one.sequences, other.sequences)


# --- bad requests ---


@pytest.mark.parametrize(
    "kwargs, words",
    [
        ({"incident_energy": None}, ["incident_energy", "missing"]),
        ({"incident_energy": []}, ["incident_energy", "empty"]),
        ({"incident_energy": [10.0, math.nan]}, ["incident_energy", "row 1", "nan"]),
        ({"incident_energy": [10.0, 20.0, -5.0]}, ["incident_energy", "row 2", "-5.0"]),
        ({"incident_energy": 0.0}, ["incident_energy", "row 0", "0.0"]),
        ({"incident_energy": math.inf}, ["incident_energy", "inf"]),
        ({"num_hits": 0}, ["num_hits", "0", "40"]),
        ({"num_hits": 41}, ["num_hits", "41", "40"]),
        ({"num_hits": [3, 4, -1, 5]}, ["num_hits", "-1"]),
        ({"num_hits": 4.0}, ["num_hits", "4.0", "integers"]),
        ({"num_hits": True}, ["num_hits", "integers"]),
        ({"num_hits": [3, 4]}, ["num_hits", "2", "4"]),
        ({"energy_temprature": 2.0}, ["energy_temprature"]),
        ({"kinematics": torch.ones(4, 2)}, ["kinematics"]),
        ({"energy_temperature": 0.0}, ["energy_temperature", "0.0"]),
        ({"energy_temperature": -1.0}, ["energy_temperature", "-1.0"]),
        ({"inputs": torch.full((4, 3), 6)}, ["input_ids", "(4, 3)"]),
        ({"inputs": torch.full((4, 3, 1), 6)}, ["input_ids", "(4, 3, 1)"]),
        ({"inputs": torch.full((4, 6, 3), 3)}, ["hit_energy", "missing"]),
        ({"inputs": torch.full((4, 6, 3), 3), "hit_energy": torch.zeros(4, 5)}, ["hit_energy", "(4, 5)", "(4, 6)"]),
        ({"inputs": torch.full((3, 3, 3), 3)}, ["incident_energy", "(4,)", "(3,)"]),
        (
            {"inputs": torch.tensor([[[6, 7, 8]] * 3 + [[0, 0, 0]]] * 4), "hit_energy": torch.zeros(4, 4)},
            ["row 0", "pad"],
        ),
        (
            {"inputs": torch.full((4, 12, 3), 3), "hit_energy": torch.zeros(4, 12), "num_hits": 4},
            ["num_hits", "4", "prompt"],
        ),
        ({"num_beams": 3}, ["generation mode"]),
    ],
    ids=str,
)  # fmt: skip
def test_hostile_requests_are_one_clear_line(kwargs, words):
    model = opinionated()
    with pytest.raises(ValueError) as error:
        generate(model, **{"max_new_tokens": 6, **kwargs})
    for word in words:
        assert word in str(error.value), error.value


def test_hostile_occupied_cells_with_streams_side_by_side():
    """Axes that are drawn in one step cannot know of each other."""
    config = tiny_config(stream_delays=[0, 1, 0], energy_delay=2)
    with pytest.raises(ValueError, match="stream_delays"):
        OccupiedCellLogitsProcessor(config)


def test_hostile_more_hits_than_cells():
    model = opinionated(nbins=(1, 2, 2))
    processor = OccupiedCellLogitsProcessor(model.config)
    for do_sample in (True, False):
        with pytest.raises(ValueError, match="no token is possible"):
            generate(model, num_hits=5, do_sample=do_sample, logits_processor=[processor])


def test_packed_rows_are_the_padded_batch(monkeypatch):
    """Training on a CPU leaves the padding out; losses and gradients are those of the padded batch."""
    packed = []
    original = SpadeModel._packs_rows

    def losses_and_gradients(packs: bool):
        torch.manual_seed(0)
        model = SpadeForCausalLM(SpadeConfig(**{**TINY, "energy_noise": 0.0, "stop_dropout": 0.0})).train()
        monkeypatch.setattr(
            SpadeModel,
            "_packs_rows",
            lambda *args, **kwargs: packed.append(original(*args, **kwargs)) or (packs and packed[-1]),
        )
        outputs = model(**make_batch(model, hits=[3, 9, 1, 14]), use_cache=False)
        outputs.loss.backward()
        return outputs.loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    loss, gradients = losses_and_gradients(True)
    padded_loss, padded_gradients = losses_and_gradients(False)
    assert packed == [True, True]
    torch.testing.assert_close(loss, padded_loss)
    assert gradients.keys() == padded_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, padded_gradients[name], rtol=1e-4, atol=1e-5, msg=name)
