"""CMHCA-DIRC models: sizes, loading, equivalences, losses, experts, learning, bad input. Small configurations."""

import json
import math
from unittest import mock

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DynamicCache,
    StaticCache,
    Trainer,
    TrainingArguments,
)

from hepzoo.modeling.configuration_cmhca_dirc import CMHCADircConfig
from hepzoo.modeling.modeling_cmhca_dirc import (
    CMHCADircForCausalLM,
    CMHCADircForSequenceClassification,
    CMHCADircForTokenClassification,
    CMHCADircModel,
    CMHCADircMoE,
    average_experts,
    focal_loss,
    load_balance_loss,
)

TINY = {
    "vocab_size": 131,
    "time_vocab_size": 83,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
    "time_regression_size": 24,
}
# GlueX: three kinematic quantities, dropout before the classifier head
GLUEX = {
    "conditioning_names": ("P", "Theta", "Phi"),
    "conditioning_ranges": ((0.95, 6.5), (0.90, 11.63), (-176.0, 175.5)),
    "classifier_dropout": 0.2,
    "num_experts": 4,
}
GENERATORS = {
    "dense": {},
    "moe": {"num_experts": 4},
    "regression": {"time_prediction": "regression"},
    "gluex": GLUEX,
    "uneven": {"num_attention_heads": [2, 4, 8], "attention_dropout": [0.0, 0.1, 0.2], "qk_norm": False},
}
EVERY_MODEL = {
    **{name: (CMHCADircForCausalLM, settings) for name, settings in GENERATORS.items()},
    "base": (CMHCADircModel, {}),
    "classifier": (CMHCADircForSequenceClassification, {}),
    "filter": (CMHCADircForTokenClassification, {}),
    "regression_classifier": (CMHCADircForSequenceClassification, {"time_prediction": "regression"}),
}
HITS = (5, 9, 3, 12)


def tiny_config(**settings) -> CMHCADircConfig:
    return CMHCADircConfig(**{**TINY, **settings})


def make_model(name: str, seed: int = 0, **settings):
    torch.manual_seed(seed)
    model_class, variant = EVERY_MODEL[name]
    return model_class(tiny_config(**{**variant, **settings})).eval()


def make_batch(model, hits=HITS, seed: int = 0, left: bool = False, labels: bool = True) -> dict:
    """Random tracks of the given numbers of hits, padded to the longest, with the labels that suit the model."""
    config = model.config
    generator = torch.Generator().manual_seed(seed)
    slots, batch = config.num_conditioning_tokens, len(hits)
    length = slots + max(hits) + 2
    input_ids = torch.tensor(config.stream_pad_token_ids).expand(batch, length, -1).clone()
    attention_mask = torch.zeros(batch, length, dtype=torch.long)
    targets = torch.full_like(input_ids, -100)
    times = torch.zeros(batch, length)
    noise = torch.full((batch, length), -100)
    for row, count in enumerate(hits):
        start = length - (slots + count + 2) if left else 0
        first, end = start + slots + 1, start + slots + count + 1
        attention_mask[row, start : end + 1] = 1
        input_ids[row, start:first] = 0
        for stream, size in enumerate(config.stream_vocab_sizes):
            input_ids[row, first:end, stream] = torch.randint(1, size - 2, (count,), generator=generator)
            input_ids[row, end, stream] = size - 2
        targets[row, first : end + 1] = input_ids[row, first : end + 1]
        times[row, first:end] = torch.rand(count, generator=generator).sort().values
        noise[row, first:end] = torch.randint(0, 2, (count,), generator=generator)
    low, high = torch.tensor(config.conditioning_ranges).T
    inputs = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "kinematics": low + (high - low) * torch.rand(batch, slots, generator=generator),
    }
    if config.num_experts > 0:
        inputs["class_ids"] = torch.arange(batch) % 2
    if config.time_prediction == "regression":
        inputs["times"] = times
    if labels and isinstance(model, CMHCADircForCausalLM):
        inputs["labels"] = targets
    elif labels and isinstance(model, CMHCADircForSequenceClassification):
        inputs["labels"] = torch.arange(batch) % 2
    elif labels and isinstance(model, CMHCADircForTokenClassification):
        inputs["labels"] = noise
    if left:
        inputs["position_ids"] = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    return inputs


def select(inputs: dict, rows) -> dict:
    return {name: value[rows] for name, value in inputs.items()}


def gradients_of(model, inputs: dict) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def main_output(model, inputs: dict) -> torch.Tensor:
    """What the model predicts, joined along the last axis."""
    outputs = model(**inputs)
    if isinstance(model, CMHCADircModel):
        return outputs.last_hidden_state
    if not isinstance(model, CMHCADircForCausalLM):
        return outputs.logits
    parts = list(outputs.logits)
    if outputs.predicted_times is not None:
        parts.append(outputs.predicted_times.unsqueeze(-1))
    return torch.cat(parts, dim=-1)


# --- sizes and configuration ---


@pytest.mark.parametrize(
    "model_class, settings, expected",
    [
        (CMHCADircForCausalLM, {}, 7_900_457),
        (CMHCADircForCausalLM, {"num_experts": 2}, 8_690_735),
        (CMHCADircForCausalLM, {"num_experts": 4}, 10_269_749),
        (CMHCADircForSequenceClassification, {}, 4_798_980),
        (CMHCADircForTokenClassification, {}, 4_798_724),
        (CMHCADircForCausalLM, {"time_prediction": "regression"}, 4_961_543),
    ],
)
def test_published_parameter_counts(model_class, settings, expected):
    with torch.device("meta"):
        model = model_class(CMHCADircConfig(**settings))
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


def test_config_has_exactly_the_documented_keys():
    """Unknown names become attributes silently, so a typo would show up as a new key."""
    own = {
        *TINY,
        *("hidden_act", "attention_dropout", "qk_norm", "layer_norm_eps", "conditioning_names", "conditioning_ranges"),
        *("time_prediction", "num_experts", "num_classes", "router_aux_loss_coef", "is_causal", "use_cls_token"),
        *("classifier_dropout", "focal_loss_alpha", "focal_loss_gamma", "embedding_initializer_range", "use_cache"),
        "stream_delays",
        *("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"),
    }
    assert own <= set(CMHCADircConfig.__annotations__) | {"tie_word_embeddings"}
    written = json.loads(CMHCADircConfig().to_json_string(use_diff=False))
    assert own <= set(written)
    from transformers import PreTrainedConfig

    inherited = set(json.loads(PreTrainedConfig().to_json_string(use_diff=False)))
    assert set(written) - inherited - own == {"model_type"} - inherited


@pytest.mark.parametrize("name", GENERATORS)
def test_config_round_trip(name, tmp_path):
    config = tiny_config(**GENERATORS[name])
    config.save_pretrained(tmp_path)
    loaded = CMHCADircConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    for attribute in ("num_streams", "stream_vocab_sizes", "stream_eos_token_ids", "stream_pad_token_ids"):
        assert getattr(loaded, attribute) == getattr(config, attribute)
    assert [loaded.heads_of_layer(i) for i in range(3)] == [config.heads_of_layer(i) for i in range(3)]


def test_config_defaults_are_the_published_model():
    config = CMHCADircConfig()
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, 6145, 6146)
    assert config.stream_eos_token_ids == (6145, 5921) and config.stream_pad_token_ids == (6146, 5922)
    assert config.num_labels == 1 and config.num_conditioning_tokens == 2
    assert CMHCADircConfig(num_labels=3).num_labels == 3


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"num_attention_heads": [4, 4]}, ["num_attention_heads", "2", "3"]),
        ({"attention_dropout": [0.1]}, ["attention_dropout", "1", "3"]),
        ({"num_attention_heads": 5}, ["hidden_size", "32", "5"]),
        ({"num_attention_heads": 0}, ["num_attention_heads", "0"]),
        ({"num_attention_heads": [4, -4, 4]}, ["num_attention_heads", "-4"]),
        ({"conditioning_ranges": ((0.5, 10.0),)}, ["conditioning_ranges", "1", "P"]),
        ({"conditioning_ranges": ((10.0, 0.5), (25.0, 160.0))}, ["conditioning_ranges", "P", "10.0"]),
        ({"conditioning_ranges": (1, 2)}, ["conditioning_ranges", "P", "1"]),
        ({"conditioning_ranges": ((math.nan, 10.0), (25.0, 160.0))}, ["conditioning_ranges", "P", "nan"]),
        ({"time_prediction": "digital"}, ["time_prediction", "digital"]),
        ({"num_experts": 3}, ["num_experts", "3", "2"]),
        ({"num_experts": -2}, ["num_experts", "-2"]),
        ({"num_experts": 2, "num_classes": 0}, ["num_classes", "0"]),
        ({"vocab_size": 3}, ["vocab_size", "3"]),
        ({"max_position_embeddings": 0}, ["max_position_embeddings", "0"]),
        ({"attention_dropout": 1.5}, ["attention_dropout", "1.5"]),
        ({"hidden_size": "32"}, ["hidden_size", "32"]),
    ],
)
def test_hostile_config_is_refused_by_name(settings, words):
    with pytest.raises(Exception) as error:
        tiny_config(**settings)
    assert "Error" in type(error.value).__name__
    assert not isinstance(error.value, ZeroDivisionError) and "cannot unpack" not in str(error.value)
    for word in words:
        assert word in str(error.value), error.value


# --- loading and initialisation ---


@pytest.mark.parametrize("name", EVERY_MODEL)
def test_save_load_round_trip(name, tmp_path):
    model = make_model(name)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[key]), key
    inputs = make_batch(model, labels=False)
    assert torch.equal(main_output(model, inputs), main_output(loaded.eval(), inputs))


def assert_published_distribution(model, fresh=lambda name: True):
    """Every fresh parameter: U(-1/sqrt(fan_in), 1/sqrt(fan_in)), N(0, 1) tables, norms 1/0, scales sqrt(head size)."""
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
                # n numbers from U(-b, b) stay below 0.8 b with probability 0.8^n
                assert tensor.numel() < 100 or tensor.abs().max() > 0.8 * bound, full_name
                if tensor.numel() >= 500:
                    assert tensor.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.15), full_name
                    assert abs(tensor.mean().item()) < 0.15 * bound, full_name
            elif isinstance(module, nn.Embedding) or name == "cls_token":
                # five standard errors of the standard deviation
                tolerance = 5 / math.sqrt(2 * tensor.numel())
                assert tensor.std().item() == pytest.approx(1.0, abs=tolerance), full_name
            elif isinstance(module, nn.LayerNorm):
                assert torch.equal(tensor, torch.full_like(tensor, 1.0 if name == "weight" else 0.0)), full_name
            elif name == "logit_scale":
                assert tensor.shape == () and tensor.item() == pytest.approx(math.sqrt(module.head_dim)), full_name
            else:
                pytest.fail(f"{full_name} is of a kind that this test does not know")
    assert seen == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("name", EVERY_MODEL)
def test_fresh_parameters_have_the_published_distribution(name):
    assert_published_distribution(make_model(name))


@pytest.mark.parametrize("name", EVERY_MODEL)
def test_missing_parameters_are_initialised_after_loading_from_meta(name):
    model = make_model(name)
    prefix = "" if name == "base" else "model."
    kept_name = f"{prefix}layers.1.mlp_norm.weight"
    kept = torch.full((32,), 7.0)
    # garbage in fresh memory would show as a constant or as huge values
    loaded = type(model).from_pretrained(None, config=model.config, state_dict={kept_name: kept})
    assert torch.equal(loaded.get_parameter(kept_name), kept)
    assert_published_distribution(loaded, fresh=lambda full_name: full_name != kept_name)
    assert main_output(loaded.eval(), make_batch(loaded, labels=False)).isfinite().all()
    # two independent tables are not one and the same
    embeddings = loaded.embeddings if name == "base" else loaded.model.embeddings
    assert not torch.equal(embeddings.space_position.weight, embeddings.time_position.weight)


@pytest.mark.parametrize(
    "head_class, auto_class",
    [
        (CMHCADircForSequenceClassification, AutoModelForSequenceClassification),
        (CMHCADircForTokenClassification, AutoModelForTokenClassification),
    ],
)
@pytest.mark.parametrize("name", ["dense", "moe", "regression"])
@pytest.mark.parametrize("how", ["class", "auto", "own_config"])
def test_fine_tuning_starts_from_every_generator(head_class, auto_class, name, how, tmp_path):
    import hepzoo  # noqa: F401  registers the Auto classes

    generator = make_model(name)
    generator.save_pretrained(tmp_path)
    arguments = {"output_loading_info": True, "num_labels": 3}
    if how == "own_config":
        config = CMHCADircConfig.from_pretrained(tmp_path, num_labels=3)
        arguments = {"output_loading_info": True, "config": config}
    loader = auto_class if how == "auto" else head_class
    model, info = loader.from_pretrained(tmp_path, **arguments)
    assert type(model) is head_class and model.config.num_experts == 0
    assert model.classifier.weight.shape == (3, 32)
    assert not model.config.is_causal
    taken = {key: value for key, value in average_experts(generator.state_dict()).items() if key.startswith("model.")}
    state = model.state_dict()
    for key, tensor in taken.items():
        assert torch.equal(state[key], tensor), key
    assert set(info["missing_keys"]) == set(state) - set(taken)
    assert_published_distribution(model, fresh=lambda full_name: full_name not in taken)
    # and it saves and opens as what it is
    model.save_pretrained(tmp_path / "head")
    reloaded, info = loader.from_pretrained(tmp_path / "head", output_loading_info=True)
    assert not any(info.values())
    inputs = make_batch(model, labels=False)
    assert torch.equal(model.eval()(**inputs).logits, reloaded.eval()(**inputs).logits)


def test_fine_tuning_with_a_dense_config_averages_the_experts_of_the_checkpoint(tmp_path):
    """The checkpoint, not the caller's configuration, knows whether it has experts: nothing may start at random."""
    make_model("moe").save_pretrained(tmp_path)
    _, info = CMHCADircForSequenceClassification.from_pretrained(
        tmp_path, config=tiny_config(num_labels=2), output_loading_info=True
    )
    assert set(info["missing_keys"]) == {"model.cls_token", "classifier.weight", "classifier.bias"}


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_fine_tuning_passes_on_dtype_and_attention(name, tmp_path):
    make_model(name).save_pretrained(tmp_path)
    model = CMHCADircForSequenceClassification.from_pretrained(
        tmp_path, dtype=torch.bfloat16, attn_implementation="eager"
    )
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.config._attn_implementation == "eager"


# --- equivalences ---


@pytest.mark.parametrize("name", EVERY_MODEL)
def test_sdpa_equals_eager(name):
    model = make_model(name, attention_dropout=0.0)
    inputs = make_batch(model, labels=False)
    valid = inputs["attention_mask"].bool()
    outputs = {}
    for implementation in ("eager", "sdpa"):
        for dtype in (torch.float32, torch.bfloat16):
            model.set_attn_implementation(implementation)
            with torch.no_grad():
                output = main_output(model.to(dtype), inputs).float()
            outputs[implementation, dtype] = output[:, -valid.shape[1] :][valid] if output.ndim == 3 else output
        model = make_model(name, attention_dropout=0.0)
    torch.testing.assert_close(outputs["eager", torch.float32], outputs["sdpa", torch.float32], rtol=1e-4, atol=2e-5)
    scale = outputs["eager", torch.float32].square().mean().sqrt()
    for implementation in ("eager", "sdpa"):
        difference = outputs[implementation, torch.bfloat16] - outputs["eager", torch.float32]
        assert difference.square().mean().sqrt() < 0.05 * scale


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("name", EVERY_MODEL)
def test_padding_changes_nothing(name, left, implementation):
    model = make_model(name, attention_dropout=0.0)
    model.set_attn_implementation(implementation)
    padded = make_batch(model, left=left, labels=False)
    with torch.no_grad():
        together = main_output(model, padded)
    assert together.isfinite().all()
    extra = together.shape[1] - padded["input_ids"].shape[1] if together.ndim == 3 else 0
    for row in range(len(HITS)):
        kept = padded["attention_mask"][row].bool()
        alone = select(padded, slice(row, row + 1))
        for key in ("input_ids", "times"):
            if key in alone:
                alone[key] = alone[key][:, kept]
        alone.pop("attention_mask")
        alone.pop("position_ids", None)
        if extra or together.ndim == 2:
            # the model has a cls token before the slots
            alone["attention_mask"] = torch.ones(1, int(kept.sum()), dtype=torch.long)
        with torch.no_grad():
            expected = main_output(model, alone)[0]
        actual = together[row] if together.ndim == 2 else together[row, extra:][kept]
        torch.testing.assert_close(actual, expected[extra:] if together.ndim == 3 else expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", GENERATORS)
def test_the_future_is_invisible(name):
    model = make_model(name)
    inputs = make_batch(model, hits=(12, 12), labels=False)
    changed = {key: value.clone() for key, value in inputs.items()}
    position = 8
    changed["input_ids"][:, position:] = changed["input_ids"][:, position:].flip(1)
    if "times" in changed:
        changed["times"][:, position:] = changed["times"][:, position:].flip(1)
    with torch.no_grad():
        before, after = main_output(model, inputs), main_output(model, changed)
    torch.testing.assert_close(before[:, :position], after[:, :position])
    assert not torch.allclose(before[:, position:], after[:, position:])


@pytest.mark.parametrize("name", ["classifier", "filter"])
def test_encoders_see_the_whole_track(name):
    model = make_model(name)
    inputs = make_batch(model, hits=(12, 12), labels=False)
    changed = {key: value.clone() for key, value in inputs.items()}
    changed["input_ids"][:, 10, 0] = changed["input_ids"][:, 10, 0] % 100 + 5
    with torch.no_grad():
        difference = (main_output(model, inputs) - main_output(model, changed)).abs()
    # every position, also those before the change
    assert (difference.flatten(1).amax(1) > 0).all()
    if name == "filter":
        assert (difference[:, :10] > 0).all()


def test_times_enter_as_queries_of_the_first_block_only():
    """Keys and values come from the pixels: a time acts on its own position, and on later ones through block 1."""
    model = make_model("dense", num_hidden_layers=1)
    inputs = make_batch(model, hits=(8,), labels=False)
    changed = {key: value.clone() for key, value in inputs.items()}
    changed["input_ids"][0, 5, 1] = changed["input_ids"][0, 5, 1] % 70 + 3
    with torch.no_grad():
        differs = (main_output(model, inputs) != main_output(model, changed)).any(-1)[0]
    assert differs.nonzero().flatten().tolist() == [5]


@pytest.mark.parametrize("name", ["dense", "classifier"])
def test_ids_in_the_slots_do_not_matter_but_kinematics_do(name):
    model = make_model(name)
    inputs = make_batch(model, labels=False)
    other = {key: value.clone() for key, value in inputs.items()}
    other["input_ids"][:, :2] = 17
    with torch.no_grad():
        expected = main_output(model, inputs)
        assert torch.equal(expected, main_output(model, other))
        for quantity in range(2):
            other["kinematics"] = inputs["kinematics"].clone()
            other["kinematics"][:, quantity] *= 1.1
            assert not torch.allclose(expected, main_output(model, other))


def test_kinematics_are_scaled_to_minus_one_to_one():
    model = make_model("gluex").model
    low, high = torch.tensor(model.config.conditioning_ranges).T
    for physical, scaled in ((low, -1.0), (high, 1.0), ((low + high) / 2, 0.0)):
        vectors = model.embeddings.embed_kinematics(physical[None])
        for index, linear in enumerate(model.embeddings.conditioning):
            expected = linear(torch.tensor([[scaled]]))
            torch.testing.assert_close(vectors[:, index], expected, rtol=1e-4, atol=1e-6)


def test_qk_norm_ignores_the_length_of_queries_and_keys():
    model = make_model("dense")
    inputs = make_batch(model, labels=False)
    with torch.no_grad():
        expected = main_output(model, inputs)
        for layer in model.model.layers:
            layer.attention.q_proj.weight *= 3
            layer.attention.k_proj.weight *= 0.2
        torch.testing.assert_close(main_output(model, inputs), expected, rtol=1e-4, atol=1e-5)
        model.model.layers[1].attention.logit_scale *= 2
        assert not torch.allclose(main_output(model, inputs), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunks", [[3] + [1] * 9, [5, 4, 3], [1] * 12])
@pytest.mark.parametrize("name", GENERATORS)
def test_cached_steps_equal_one_pass(name, chunks):
    model = make_model(name)
    inputs = make_batch(model, hits=(8, 8), labels=False)
    inputs.pop("attention_mask")
    config = model.config
    length = inputs["input_ids"].shape[1]
    chunks = [*chunks, length - sum(chunks)] if sum(chunks) < length else chunks
    with torch.no_grad():
        expected = main_output(model, {**inputs, "use_cache": False})
        caches = {"given": DynamicCache(), "from_config": DynamicCache(config=config), "own": None}
        caches["static"] = StaticCache(config=config, max_cache_len=length)
        if len(set(config.num_attention_heads if isinstance(config.num_attention_heads, list) else [0])) > 1:
            # one shape for all blocks there
            caches.pop("static")
        for kind, cache in caches.items():
            start, parts = 0, []
            for size in chunks:
                rows = slice(start, start + size)
                step = {"kinematics": inputs["kinematics"], "past_key_values": cache, "use_cache": True}
                step |= {key: inputs[key] for key in ("class_ids",) if key in inputs}
                step |= {key: inputs[key][:, rows] for key in ("input_ids", "times") if key in inputs}
                if start >= config.num_conditioning_tokens and kind == "own":
                    step.pop("kinematics")
                outputs = model(**step)
                cache = outputs.past_key_values
                parts.append(torch.cat(outputs.logits, dim=-1))
                start += size
            actual = torch.cat(parts, dim=1)
            torch.testing.assert_close(actual, expected[..., : actual.shape[-1]], rtol=1e-4, atol=2e-5, msg=kind)


def test_logits_to_keep():
    model = make_model("dense")
    inputs = make_batch(model, labels=False)
    with torch.no_grad():
        everything = model(**inputs).logits
        last = model(**inputs, logits_to_keep=1).logits
        chosen = model(**inputs, logits_to_keep=torch.tensor([2, 5])).logits
    for stream in range(2):
        torch.testing.assert_close(last[stream], everything[stream][:, -1:])
        torch.testing.assert_close(chosen[stream], everything[stream][:, [2, 5]])


@pytest.mark.parametrize("name", [name for name in EVERY_MODEL if name != "base"])
def test_gradient_checkpointing_gives_the_same_gradients(name):
    model = make_model(name, attention_dropout=0.0, classifier_dropout=0.0).train()
    inputs = make_batch(model)
    expected = gradients_of(model, inputs)
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    for key, gradient in gradients_of(model, inputs).items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-5, atol=1e-7, msg=key)


@pytest.mark.parametrize("name", EVERY_MODEL)
def test_every_parameter_gets_a_gradient(name):
    if name == "base":
        pytest.skip("has no loss")
    model = make_model(name).train()
    if name == "regression":
        nn.init.ones_(model.time_head.output_proj.bias)  # the last ReLU may start dead
    for key, gradient in gradients_of(model, make_batch(model)).items():
        assert gradient.isfinite().all() and gradient.any(), key


@pytest.mark.parametrize("name", EVERY_MODEL)
def test_hidden_states_and_attentions(name):
    model = make_model(name)
    model.set_attn_implementation("eager")
    inputs = make_batch(model, labels=False)
    with torch.no_grad():
        outputs = model(**inputs, output_hidden_states=True, output_attentions=True)
        bare = getattr(model, "model", model)
        base = bare(**inputs)
    length = base.last_hidden_state.shape[1]
    assert len(outputs.hidden_states) == 4 and len(outputs.attentions) == 3
    assert all(states.shape == (len(HITS), length, 32) for states in outputs.hidden_states)
    torch.testing.assert_close(outputs.hidden_states[-1], base.last_hidden_state)
    # the first ones are the pixels' stream that enters block 0
    hits = inputs["input_ids"][0, model.config.num_conditioning_tokens :, 0]
    expected = bare.embeddings.space(hits) + bare.embeddings.space_position(torch.arange(len(hits)))
    torch.testing.assert_close(outputs.hidden_states[0][0, -len(hits) :], expected)
    mask = nn.functional.pad(inputs["attention_mask"], (length - inputs["attention_mask"].shape[1], 0), value=1)
    for layer_idx, weights in enumerate(outputs.attentions):
        assert weights.shape == (len(HITS), model.config.heads_of_layer(layer_idx), length, length)
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
        assert not weights.masked_fill(mask[:, None, None].bool(), 0).any()
        if model.config.is_causal:
            assert not weights.triu(1).any()
        else:
            assert (weights[0] > 0).all(-1).any() or mask[0].min() == 0


@pytest.mark.parametrize("name", EVERY_MODEL)
def test_tuple_output(name):
    model = make_model(name)
    inputs = make_batch(model)
    with torch.no_grad():
        named, plain = model(**inputs), model(**inputs, return_dict=False)
    assert isinstance(plain, tuple) and len(plain) == len(named.to_tuple())

    def compare(one, two):
        if isinstance(one, torch.Tensor):
            assert torch.equal(one, two)
        elif isinstance(one, tuple):
            assert len(one) == len(two)
            for left, right in zip(one, two):
                compare(left, right)

    compare(plain, named.to_tuple())
    # `config.return_dict` concerns the caller, not the model inside
    model.config.return_dict = False
    with torch.no_grad():
        compare(model(**inputs), plain)


def test_embeddings_get_and_set():
    model = make_model("dense")
    assert model.get_input_embeddings() is model.model.embeddings.space
    assert model.get_output_embeddings() is model.space_head
    table, head = nn.Embedding(131, 32), nn.Linear(32, 131)
    model.set_input_embeddings(table)
    model.set_output_embeddings(head)
    assert model.model.embeddings.space is table and model.space_head is head
    # nothing is tied
    assert model.get_input_embeddings().weight is not model.get_output_embeddings().weight


def test_hostile_resized_vocabulary_keeps_end_of_sequence():
    """EOS and pad are the last two ids: more rows must not silently make other rows the end of a sequence."""
    model = make_model("dense")
    before = model.config.stream_eos_token_ids
    try:
        model.resize_token_embeddings(140, mean_resizing=False)
    except (NotImplementedError, ValueError) as error:
        assert "vocab_size" in str(error)
        assert model.config.vocab_size == 131
    else:
        assert model.config.stream_eos_token_ids == before
        assert model.config.eos_token_id == before[0]


@pytest.mark.parametrize("name", EVERY_MODEL)
def test_bfloat16_forward_and_backward(name):
    model = make_model(name).to(torch.bfloat16).train()
    outputs = model(**make_batch(model))
    if name == "base":
        assert outputs.last_hidden_state.dtype == torch.bfloat16
        return
    outputs.loss.backward()
    assert outputs.loss.isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("name", [name for name in EVERY_MODEL if name != "base"])
def test_bfloat16_autocast_is_close(name):
    model = make_model(name, attention_dropout=0.0, classifier_dropout=0.0).train()
    inputs = make_batch(model)
    expected = model(**inputs).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**inputs).loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=2e-2)
    loss.backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())


@pytest.mark.parametrize("name", EVERY_MODEL)
def test_deterministic(name):
    inputs = make_batch(make_model(name), labels=False)
    with torch.no_grad():
        assert torch.equal(main_output(make_model(name), inputs), main_output(make_model(name), inputs))


def test_dropout_per_block_acts_in_training_only():
    inputs = make_batch(make_model("dense"), labels=False)
    with torch.no_grad():
        plain = make_model("dense")
        only_last = make_model("dense", attention_dropout=[0.0, 0.0, 0.5])
        torch.testing.assert_close(main_output(plain, inputs), main_output(only_last, inputs))
        hidden = [
            model.train().model(**inputs, output_hidden_states=True).hidden_states for model in (plain, only_last)
        ]
    torch.testing.assert_close(hidden[0][2], hidden[1][2])
    assert not torch.allclose(hidden[0][3], hidden[1][3])


# --- losses of the generator ---


def reference_losses(model, inputs: dict) -> tuple[torch.Tensor, ...]:
    """Mean cross entropy per stream, written the plain way."""
    with torch.no_grad():
        logits = model(**{key: value for key, value in inputs.items() if key != "labels"}).logits
    return tuple(
        nn.functional.cross_entropy(stream[:, :-1].flatten(0, 1), inputs["labels"][:, 1:, index].flatten())
        for index, stream in enumerate(logits)
    )


@pytest.mark.parametrize("name", ["dense", "moe", "gluex"])
@pytest.mark.parametrize("training", [False, True])
def test_loss_is_the_sum_of_the_mean_cross_entropies(name, training):
    model = make_model(name)
    inputs = make_batch(model)
    expected = reference_losses(model, inputs)
    outputs = model.train(training)(**inputs)
    for actual, reference in zip(outputs.stream_losses, expected):
        torch.testing.assert_close(actual, reference)
    auxiliary = outputs.aux_loss if outputs.aux_loss is not None else 0.0
    assert (outputs.aux_loss is not None) == (training and name != "dense")
    torch.testing.assert_close(outputs.loss, sum(expected) + auxiliary)
    assert (outputs.logits is None) == training


def test_ignored_targets_do_not_count():
    model = make_model("dense")
    inputs = make_batch(model)
    inputs["labels"][1] = -100
    inputs["labels"][2, 4:, 1] = -100
    for actual, expected in zip(model(**inputs).stream_losses, reference_losses(model, inputs)):
        torch.testing.assert_close(actual, expected)
    inputs["labels"][:] = -100
    outputs = model.train()(**inputs)
    assert outputs.loss.item() == 0
    outputs.loss.backward()
    assert not any(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize("name", ["dense", "regression"])
def test_shift_labels_replace_labels(name):
    model = make_model(name)
    inputs = make_batch(model)
    expected = model(**inputs)
    labels = inputs.pop("labels")
    shifted = nn.functional.pad(labels[:, 1:], (0, 0, 0, 1), value=-100)
    outputs = model(**inputs, shift_labels=shifted)
    torch.testing.assert_close(outputs.loss, expected.loss)
    outputs = model(**inputs, shift_labels=shifted, labels=torch.zeros_like(labels))
    torch.testing.assert_close(outputs.loss, expected.loss)


@pytest.mark.parametrize("name", ["dense", "regression", "filter", "classifier"])
def test_accumulated_gradients_equal_one_big_batch(name):
    """Tracks of different length: a mean of means would weigh the targets of short tracks more."""
    model = make_model(name).train()
    hits = (3, 14, 6, 20, 2, 9, 1, 4)
    inputs = make_batch(model, hits=hits)
    num_items = (inputs["labels"] != -100).sum()
    whole = gradients_of(model, {**inputs, "num_items_in_batch": num_items})
    model.zero_grad()
    for rows in (slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 8)):
        model(**select(inputs, rows), num_items_in_batch=num_items).loss.backward()
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, whole[key], rtol=1e-4, atol=1e-6, msg=key)
    if name != "regression":
        # and with the divisor of its own batch the loss is the plain one
        for key, gradient in gradients_of(model, inputs).items():
            torch.testing.assert_close(gradient, whole[key], rtol=1e-4, atol=1e-6, msg=key)


def test_accumulated_load_balance_weighs_as_in_one_big_batch():
    """The load-balance loss is a mean: added up over four micro-batches it must not count four times."""
    model = make_model("moe", router_aux_loss_coef=1.0).train()
    inputs = make_batch(model, hits=(9, 10, 11, 9, 10, 11, 10, 10))
    num_items = (inputs["labels"] != -100).sum()

    def router_gradients(batches):
        model.zero_grad()
        for batch in batches:
            outputs = model(**batch, num_items_in_batch=num_items)
            (outputs.loss - sum(outputs.stream_losses)).backward()
        return torch.cat([layer.mlp.router.weight.grad.flatten() for layer in model.model.layers])

    whole = router_gradients([inputs])
    parts = router_gradients([select(inputs, slice(start, start + 2)) for start in range(0, 8, 2)])
    assert (parts - whole).norm() < 0.1 * whole.norm(), f"ratio of the norms {(parts.norm() / whole.norm()).item():.2f}"


class Tracks(torch.utils.data.Dataset):
    def __init__(self, rows: list[dict]):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


@pytest.mark.parametrize("name", ["dense", "classifier", "filter"])
def test_trainer_accumulation_equals_one_big_batch(name, tmp_path):
    reference = make_model(name)
    hits = (3, 14, 6, 20, 2, 9, 1, 4) * 2
    inputs = make_batch(reference, hits=hits)
    lengths = inputs["attention_mask"].sum(1)
    rows = [select(inputs, row) for row in range(len(hits))]

    def collate(batch):
        longest = max(int(row["attention_mask"].sum()) for row in batch)
        stacked = {key: torch.stack([row[key] for row in batch]) for key in batch[0]}
        return {
            key: value[:, :longest] if value.ndim > 1 and key != "kinematics" else value
            for key, value in stacked.items()
        }

    assert lengths.unique().numel() > 4
    results, losses = [], []
    for micro_batch, accumulation in ((8, 1), (2, 4)):
        model = make_model(name)
        arguments = TrainingArguments(
            output_dir=str(tmp_path / str(micro_batch)),
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=accumulation,
            max_steps=2,
            learning_rate=0.1,
            lr_scheduler_type="constant",
            optim="sgd",
            max_grad_norm=0.0,
            train_sampling_strategy="sequential",
            remove_unused_columns=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=Tracks(rows), data_collator=collate)
        trainer.train()
        results.append(model.state_dict())
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    moved = 0.0
    for key, tensor in results[0].items():
        torch.testing.assert_close(results[1][key], tensor, rtol=1e-4, atol=1e-5, msg=key)
        moved = max(moved, (tensor - reference.state_dict()[key]).abs().max().item())
    assert moved > 1e-3


# --- experts ---


def test_experts_of_another_class_are_not_touched():
    model = make_model("moe").train()
    inputs = make_batch(model)
    inputs["class_ids"] = torch.zeros(len(HITS), dtype=torch.long)
    gradients = gradients_of(model, inputs)  # fails if a gradient is None: distributed training needs every one
    for key, gradient in gradients.items():
        if ".mlp.experts." in key:
            own = int(key.split(".experts.")[1].split(".")[0]) < 2
            assert bool(gradient.any()) == own, key
        if ".mlp.router." in key:
            assert gradient[:2].any() and not gradient[2:].any(), key


def test_each_track_is_served_by_its_own_class():
    model = make_model("moe")
    inputs = make_batch(model, labels=False)
    with torch.no_grad():
        mixed = main_output(model, inputs)
        probabilities = model(**inputs).router_probs
        for class_id in (0, 1):
            rows = inputs["class_ids"] == class_id
            own = slice(2 * class_id, 2 * class_id + 2)
            for weights in probabilities:
                torch.testing.assert_close(weights[rows].sum(-1), torch.ones_like(weights[rows][..., 0]))
                torch.testing.assert_close(weights[rows][..., own].sum(-1), torch.ones_like(weights[rows][..., 0]))
            same = main_output(model, {**inputs, "class_ids": torch.full_like(inputs["class_ids"], class_id)})
            torch.testing.assert_close(mixed[rows], same[rows])
            assert not torch.allclose(mixed[~rows], same[~rows])


@pytest.mark.parametrize("experts, classes", [(4, 2), (2, 2), (6, 3), (4, 1)])
def test_compiled_path_of_the_experts_equals_the_eager_one(experts, classes):
    torch.manual_seed(0)
    layer = CMHCADircMoE(tiny_config(num_experts=experts, num_classes=classes))
    states = torch.randn(5, 7, 32, requires_grad=True)
    class_ids = torch.tensor([0, classes - 1, 0, 0, classes - 1])
    results = []
    for compiling in (False, True):
        layer.zero_grad()
        with mock.patch("torch.compiler.is_compiling", return_value=compiling):
            output, weights = layer(states, class_ids)
        gradients = torch.autograd.grad(output.square().sum(), [states, *layer.parameters()])
        results.append((output, weights, *gradients))
    for eager, compiled in zip(*results):
        torch.testing.assert_close(eager, compiled, rtol=1e-5, atol=1e-5)


def test_experts_equal_the_written_out_mixture():
    torch.manual_seed(0)
    layer = CMHCADircMoE(tiny_config(num_experts=4))
    states, class_ids = torch.randn(2, 3, 32), torch.tensor([1, 0])
    with torch.no_grad():
        output, _ = layer(states, class_ids)
        for row, class_id in enumerate(class_ids.tolist()):
            own = [2 * class_id, 2 * class_id + 1]
            weights = layer.router(states[row])[:, own].softmax(-1)
            expected = sum(weights[:, i, None] * layer.experts[e](states[row]) for i, e in enumerate(own))
            torch.testing.assert_close(output[row], expected)


def test_one_expert_per_class_is_a_dense_model_per_class():
    model = make_model("moe", num_experts=2).train()
    outputs = model(**make_batch(model))
    assert outputs.aux_loss.item() == 0
    assert all(((probs == 0) | (probs == 1)).all() for probs in outputs.router_probs)


def test_load_balance_loss():
    # two experts per class: weights (0.75, 0.25) miss (0.5, 0.5) by 2 * 0.25^2
    probs = torch.tensor([[[0.75, 0.25, 0.0, 0.0]] * 3, [[0.0, 0.0, 0.5, 0.5]] * 3])
    class_ids = torch.tensor([0, 1])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    loss = load_balance_loss((probs, probs), class_ids, mask, num_classes=2)
    assert loss.item() == pytest.approx(2 * (2 * 0.125) / 5)
    assert load_balance_loss((probs,), class_ids, None, num_classes=2).item() == pytest.approx(3 * 0.125 / 6)


def test_load_balance_coefficient():
    losses = []
    for coefficient in (0.0, 1.0, 3.0):
        model = make_model("moe", router_aux_loss_coef=coefficient).train()
        outputs = model(**make_batch(model))
        torch.testing.assert_close(outputs.loss, sum(outputs.stream_losses) + coefficient * outputs.aux_loss)
        losses.append(outputs.loss.item())
    assert losses[0] < losses[1] < losses[2]


# --- classifier and filter ---


def test_classifier_loss():
    model = make_model("classifier")
    inputs = make_batch(model)
    outputs = model(**inputs)
    assert outputs.logits.shape == (len(HITS), 1)
    p = outputs.logits[:, 0].sigmoid()
    expected = -torch.where(inputs["labels"] == 1, p, 1 - p).log().mean()
    torch.testing.assert_close(outputs.loss, expected)
    several = make_model("classifier", num_labels=3)
    inputs["labels"] = torch.tensor([0, 2, 1, 2])
    outputs = several(**inputs)
    assert outputs.logits.shape == (len(HITS), 3)
    torch.testing.assert_close(outputs.loss, nn.functional.cross_entropy(outputs.logits, inputs["labels"]))


def test_filter_loss_counts_hits_only():
    model = make_model("filter")
    inputs = make_batch(model)
    outputs = model(**inputs)
    assert outputs.logits.shape == (*inputs["attention_mask"].shape, 1)
    is_hit = inputs["labels"] != -100
    assert is_hit.sum() == sum(HITS)
    z, y = outputs.logits[..., 0][is_hit], inputs["labels"][is_hit]
    p = z.sigmoid()
    expected = torch.where(y == 1, 0.75 * (1 - p) ** 2 * -p.log(), 0.25 * p**2 * -(1 - p).log()).mean()
    torch.testing.assert_close(outputs.loss, expected)
    inputs["labels"][:] = -100
    assert model(**inputs).loss.item() == 0


def test_focal_loss_limits():
    logits = torch.tensor([-40.0, 0.0, 40.0])
    for target in (0.0, 1.0):
        targets = torch.full_like(logits, target)
        # without focus and evenly weighted: half the binary cross entropy
        plain = nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        torch.testing.assert_close(focal_loss(logits, targets, 0.5, 0.0), plain / 2)
        assert focal_loss(logits, targets, 0.75, 2.0).isfinite().all()


# --- regressed times ---


def test_regressed_times_enter_the_loss_at_hits_only():
    model = make_model("regression")
    nn.init.ones_(model.time_head.output_proj.bias)
    inputs = make_batch(model)
    outputs = model(**inputs)
    assert outputs.predicted_times.shape == inputs["attention_mask"].shape
    assert (outputs.predicted_times >= 0).all() and len(outputs.logits) == 1
    start = model.config.num_conditioning_tokens + 1
    errors = [
        outputs.predicted_times[row, start + hit - 1] - inputs["times"][row, start + hit]
        for row, count in enumerate(HITS)
        for hit in range(count)
    ]
    errors = torch.stack(errors).abs()
    expected = torch.where(errors < 1, 0.5 * errors**2, errors - 0.5).mean()
    torch.testing.assert_close(outputs.stream_losses[1], expected)
    torch.testing.assert_close(outputs.loss, sum(outputs.stream_losses))
    # times of padding and of EOS are no targets
    polluted = inputs["times"].clone()
    for row, count in enumerate(HITS):
        polluted[row, start + count :] = 99.0
    torch.testing.assert_close(model(**{**inputs, "times": polluted}).loss, outputs.loss)


# --- learning ---


@pytest.mark.parametrize("name", ["dense", "moe", "regression", "gluex", "classifier", "filter"])
def test_ten_steps_of_training_lower_the_loss(name):
    model = make_model(name, seed=1, attention_dropout=0.0, classifier_dropout=0.0, router_aux_loss_coef=0.1).train()
    if name == "regression":
        nn.init.ones_(model.time_head.output_proj.bias)
    inputs = make_batch(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses, time_losses = [], []
    for _ in range(11):
        outputs = model(**inputs)
        losses.append(outputs.loss.item())
        if name == "regression":
            time_losses.append(outputs.stream_losses[1].item())
        optimizer.zero_grad()
        outputs.loss.backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0], losses
    if time_losses:
        assert time_losses[-1] < 0.5 * time_losses[0], time_losses


@pytest.mark.parametrize("name", ["dense", "moe", "regression"])
def test_an_overfitted_generator_reproduces_its_tracks(name):
    model = make_model(name, router_aux_loss_coef=0.0).train()
    inputs = make_batch(model)
    if name == "regression":
        nn.init.ones_(model.time_head.output_proj.bias)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
    model.eval()
    conditions = {key: inputs[key] for key in ("kinematics", "class_ids") if key in inputs}
    outputs = model.generate(**conditions, do_sample=False, max_new_tokens=20, return_dict_in_generate=True)
    sequences = outputs.sequences
    assert sequences.shape[1] == inputs["input_ids"].shape[1]
    assert torch.equal(sequences, inputs["input_ids"])
    if name == "regression":
        start = model.config.num_conditioning_tokens + 1
        for row, count in enumerate(HITS):
            generated = outputs.continuous["times"][row, start : start + count]
            torch.testing.assert_close(generated, inputs["times"][row, start : start + count], rtol=0, atol=0.15)


# --- bad input ---


def bad(name: str, **changes):
    """Inputs of a model with some replaced; a value `None` removes one."""
    model = make_model(name)
    inputs = {**make_batch(model, labels=False), **changes}
    return model, {key: value for key, value in inputs.items() if value is not None}


@pytest.mark.parametrize(
    "name, changes, words",
    [
        ("dense", {"kinematics": None}, ["kinematics", "P, Theta"]),
        ("classifier", {"kinematics": None}, ["kinematics", "P, Theta"]),
        ("dense", {"kinematics": torch.ones(4, 3)}, ["kinematics", "(4, 3)", "(4, 2)"]),
        ("dense", {"kinematics": torch.ones(3, 2)}, ["kinematics", "(3, 2)", "(4, 2)"]),
        ("dense", {"kinematics": torch.ones(2)}, ["kinematics", "(2,)"]),
        ("dense", {"kinematics": [[6.0, 30.0]] * 4}, ["kinematics", "list"]),
        ("gluex", {"kinematics": torch.ones(4, 2)}, ["kinematics", "(4, 3)", "Phi"]),
        ("dense", {"input_ids": torch.zeros(4, 17, dtype=torch.long)}, ["input_ids", "(4, 17)", "2)"]),
        ("dense", {"input_ids": torch.zeros(4, 17, 1, dtype=torch.long)}, ["input_ids", "(4, 17, 1)", "2)"]),
        ("regression", {"input_ids": torch.zeros(4, 17, 2, dtype=torch.long)}, ["input_ids", "(4, 17, 2)", "1)"]),
        (
            "dense",
            {"input_ids": torch.zeros(4, 35, 2, dtype=torch.long), "attention_mask": None},
            ["input_ids", "35", "34", "max_position_embeddings"],
        ),
        ("moe", {"class_ids": None}, ["class_ids"]),
        ("moe", {"class_ids": torch.tensor([0, 1, 2, 0])}, ["class_ids", "2"]),
        ("moe", {"class_ids": torch.tensor([0, -1, 1, 0])}, ["class_ids", "-1"]),
        ("moe", {"class_ids": torch.tensor([211, 321, 211, 321])}, ["class_ids", "211"]),
        ("moe", {"class_ids": torch.tensor([1])}, ["class_ids", "(1,)", "(4,)"]),
        ("moe", {"class_ids": torch.zeros(4, 1, dtype=torch.long)}, ["class_ids", "(4, 1)", "(4,)"]),
        ("regression", {"times": None}, ["times"]),
        ("regression", {"times": torch.zeros(4, 9)}, ["times", "(4, 9)", "(4, 16)"]),
    ],
)
def test_hostile_inputs_are_one_clear_line(name, changes, words):
    model, inputs = bad(name, **changes)
    with pytest.raises(ValueError) as error:
        model(**inputs)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize(
    "name, changes, words",
    [
        ("dense", {"kinematics": torch.ones(5, 2)}, ["kinematics", "(5, 2)"]),
        ("moe", {"class_ids": None}, ["class_ids"]),
        ("moe", {"class_ids": torch.tensor([1])}, ["class_ids", "(1,)"]),
    ],
)
def test_hostile_inputs_beside_a_cache(name, changes, words):
    """A cache given by the caller, here an empty one, is no reason to look away."""
    model, inputs = bad(name, **changes)
    with pytest.raises(ValueError) as error:
        model(**inputs, past_key_values=DynamicCache(config=model.config))
    assert all(word in str(error.value) for word in words)


def test_hostile_labels_of_one_stream():
    model = make_model("dense")
    inputs = make_batch(model)
    inputs["labels"] = inputs["labels"][..., 0]
    with pytest.raises(ValueError, match="labels"):
        model(**inputs)


def test_hostile_continuation_beyond_the_last_position():
    model = make_model("dense")
    inputs = make_batch(model, hits=(30,), labels=False)
    inputs.pop("attention_mask")
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
    with pytest.raises((ValueError, IndexError)):
        model(input_ids=inputs["input_ids"][:, :4], kinematics=inputs["kinematics"], past_key_values=cache)


@pytest.mark.parametrize("model_class", [CMHCADircForSequenceClassification, CMHCADircForTokenClassification])
def test_hostile_encoder_with_experts(model_class):
    with pytest.raises(ValueError, match="num_experts"):
        model_class(tiny_config(num_experts=4))


def test_classes_leave_the_callers_config_alone():
    config = tiny_config()
    before = config.to_dict()
    CMHCADircForSequenceClassification(config)
    CMHCADircForTokenClassification(config)
    assert config.to_dict() == before and config.is_causal and not config.use_cls_token
