"""`hepzoo convert spade`: Lightning checkpoints and configurations in the published layout (arXiv:2606.11304)."""

import copy
import functools
import json
import sys

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hepzoo.conversion import main as convert
from hepzoo.modeling.configuration_spade import SpadeConfig
from hepzoo.modeling.modeling_spade import SpadeForCausalLM
from hepzoo.tokenization.tokenization_spade import SpadeTokenizer
from tests import lightning_checkpoints
from tests.golden_sets import DEFAULT_FOLDER

# as the published code trains: what a converted checkpoint must say
PUBLISHED = {
    "rope_pairing": "published",
    "loss_over_prefix": True,
    "stop_energy_scale": 1.0,
    "stop_counter_scale": 1.0,
}
TINY = {
    "nbins": [5, 4, 6],
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "axis_embedding_size": 8,
    "mixture_components": 3,
    "energy_head_size": 12,
    "stop_hidden_size": 20,
    "max_num_hits": 30,
    "num_registers": 2,
    "incident_energy_offset": 40.0,
    "incident_energy_scale": 0.05,
}
MODES = pytest.mark.parametrize("mode", ["split", "combined"])
SHOWERS = {
    "incident_energy": [20.0, 80.0],
    "x": [[0, 4, 2], [1]],
    "y": [[3, 0, 2], [1]],
    "z": [[0, 1, 5], [2]],
    "energy": [[0.5, 2.0, 10.0], [0.25]],
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Several threads on tensors this small only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints of the reference, made from our models: names written down from the published models, not from our table
# ---------------------------------------------------------------------------------------------------------------------


def reference_name(name: str, mode: str) -> str:
    head, _, end = name.rpartition(".")
    parts = name.split(".")
    axis = "xyz"[int(parts[-2])] if len(parts) > 1 and parts[-2].isdigit() and parts[-2] in "012" else None
    if name == "model.embeddings.registers":
        return "model.register_embeddings"
    if name.startswith("stop_head.tokens."):
        return f"physics_stop_model.{axis}_embedding.weight"
    if name.startswith("stop_head.classifier."):
        return name.replace("stop_head", "physics_stop_model")
    if name.startswith("stop_head."):
        short = {"counter": "hit_counter"}.get(parts[1], parts[1])
        return f"physics_stop_model.{short}_projection.{end}"
    if name.startswith("model.embeddings.tokens."):
        return f"model.per_axis_embed.embeddings.{axis}.weight" if mode == "split" else "model.token_embedding.weight"
    if name.startswith("model.embeddings.norms."):
        return f"model.per_axis_embed.norms.{axis}.{end}"
    if name.startswith("model.embeddings.projection."):
        return f"model.{'axis_concat_proj' if mode == 'split' else 'token_feature_proj'}.{end}"
    if name.startswith("token_heads."):
        return f"model.axis_token_heads.{axis}.proj.{end}" if mode == "split" else f"model.token_head.proj.{end}"
    if name.startswith("model.embeddings."):
        return f"model.{parts[2]}_feature_proj.{'0' if parts[3] == 'fc1' else '2'}.{end}"
    if name.startswith("energy_head."):
        new = {"fc1": "mlp.0", "fc2": "mlp.2", "logits": "logit_head", "means": "mean_head"}
        return f"model.mog_head.{new.get(parts[1], 'log_scale_head')}.{end}"
    if name.startswith("model.norm."):
        return f"model.core.decoder.final_norm.{end}"
    assert name.startswith("model.layers."), name
    for ours, theirs in (
        ("model.layers.", "model.core.decoder.layers."),
        ("attention_norm", "norm1"),
        ("mlp_norm", "norm2"),
        ("self_attn", "attn"),
        ("mlp.gate_proj", "ffn.w1"),
        ("mlp.up_proj", "ffn.w2"),
        ("mlp.down_proj", "ffn.w3"),
    ):
        name = name.replace(ours, theirs)
    return name


def build(mode: str, **changes) -> SpadeForCausalLM:
    torch.manual_seed(3)
    model = SpadeForCausalLM(SpadeConfig(**{**TINY, **PUBLISHED, "axis_mode": mode, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def reference_state_dict(model) -> dict[str, torch.Tensor]:
    mode = model.config.axis_mode
    state_dict = {reference_name(name, mode): tensor.clone() for name, tensor in model.state_dict().items()}
    assert len(state_dict) == len(model.state_dict())
    return state_dict


def published_config(model) -> dict:
    """In the layout of the published `config.yaml`."""
    config = model.config
    nx, ny, nz = config.nbins
    return {
        "seed": 44,
        "model": {
            "transformer": {
                "embedding_dim": config.hidden_size,
                "num_layers": config.num_hidden_layers,
                "num_heads": config.num_attention_heads,
                "dropout": 0.0,
                "attn_dropout": 0.0,
                "use_rope": True,
                "use_multi_query_attention": True,
                "attention_window": None,
                "use_parallel_residual": False,
            },
            "n_registers": config.num_registers,
            "mog_components": config.mixture_components,
            "use_mog_energy": True,
            "energy_noise_rel_std": 0.05,
            "energy_sample_min": -15.0,
            "energy_sample_max": 15.0,
            "hierarchical_conditioning": False,
            "use_n_hits_feature": False,
            "use_z_causal_mask": False,
            "use_physics_stop": config.use_stop_head,
            "physics_stop_pos_weight": 1000,
            "physics_stop_dropout_p": 0.2,
            "physics_stop_min_hits": 16,
        },
        "dataset": {
            "axis_mode": config.axis_mode,
            "nbins_x": nx,
            "nbins_y": ny,
            "nbins_z": nz,
            "pad_length": config.max_num_hits,
            "energy_threshold": 0.0,
            "features": {
                "energy": {"func": "np.log", "inv_func": "np.exp", "subtract_by": -1.5, "multiply_by": 0.91},
                "incident_energy": {"func": None, "inv_func": None, "subtract_by": 40.0, "multiply_by": 0.05},
            },
        },
        "trainer": {
            "max_steps": 500000,
            "generative_eval": {
                "incident_energy": [10.0, 100.0],
                "sampling": {
                    "temperature": 0.95,
                    "top_k": None,
                    "top_p": 0.9,
                    "energy_temperature": 1.1,
                    "axis_temperatures": {"z": 1.2, "x": 0.8},
                    "max_len": config.max_num_hits,
                    "min_len": 0,
                    "stop_source": "physics_stop",
                    "stop_probability_threshold": 0.97,
                    "stop_consecutive_required": 2,
                    "physics_stop_min_hits": 5,
                    "enable_energy_sum_filter": True,
                    "energy_sum_power_a": 21.5,
                    "energy_sum_power_b": 0.99,
                    "energy_sum_power_c": -3.0,
                    "energy_sum_safety_factor": 0.85,
                    "energy_sum_max_retries": 3,
                },
            },
        },
    }


run_conversion = functools.partial(lightning_checkpoints.run_conversion, "spade")
assert_refused = functools.partial(lightning_checkpoints.assert_refused, "spade")


def outputs_of(model, batch):
    with torch.no_grad():
        outputs = model(**batch, labels=batch["input_ids"])
    losses = [outputs.loss, *outputs.stream_losses, outputs.energy_loss]
    return [*outputs.logits, *outputs.energy_mixture, *losses, *filter(torch.is_tensor, [outputs.stop_loss])]


def assert_same_model(output, model) -> SpadeForCausalLM:
    loaded, info = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not any(info.values()), info
    assert type(loaded) is SpadeForCausalLM
    batch = SpadeTokenizer.from_model_config(model.config)(SHOWERS, padding=True, return_tensors="pt")
    for expected, actual in zip(outputs_of(model, batch), outputs_of(loaded.eval(), batch), strict=True):
        assert torch.equal(expected, actual)
    return loaded


# ---------------------------------------------------------------------------------------------------------------------
# What converts
# ---------------------------------------------------------------------------------------------------------------------


@MODES
@pytest.mark.parametrize("protocol", [2, 4])
def test_lightning_checkpoint_to_an_equal_model(mode, protocol, tmp_path):
    model = build(mode)
    loaded = assert_same_model(
        run_conversion(tmp_path, reference_state_dict(model), published_config(model), protocol), model
    )
    for name, value in {**TINY, **PUBLISHED, "energy_noise": 0.05, "energy_min": -15.0, "energy_max": 15.0}.items():
        actual = getattr(loaded.config, name)
        if name == "axis_embedding_size" and mode == "combined":
            continue
        assert (list(actual) if name == "nbins" else actual) == value, name
    assert not [name for name in sys.modules if name.partition(".")[0].endswith("_gone")]


@MODES
def test_settings_of_generation(mode, tmp_path):
    model = build(mode)
    output = run_conversion(tmp_path, reference_state_dict(model), published_config(model))
    stored = json.loads((output / "generation_config.json").read_text())
    expected = {
        "do_sample": True,
        "temperature": 0.95,
        "top_k": 0,
        "top_p": 0.9,
        "energy_temperature": 1.1,
        "max_new_tokens": TINY["max_num_hits"] - 1,
        "stop_published": True,
        "stop_sampling": False,
        "stop_threshold": 0.97,
        "stop_votes": 2,
        "stop_min_hits": 5,
        "energy_sum_filter": {"a": 21.5, "b": 0.99, "c": -3.0, "safety_factor": 0.85, "max_retries": 3},
    }
    if mode == "split":
        expected["stream_overrides"] = {"2": {"temperature": 1.2}, "0": {"temperature": 0.8}}
    assert {name: stored.get(name) for name in expected} == expected
    assert ("stream_overrides" in stored) is (mode == "split")

    # what is stored is what `generate` does
    loaded = AutoModelForCausalLM.from_pretrained(output).eval()
    kwargs = {"incident_energy": [15.0, 90.0, 50.0]}
    torch.manual_seed(5)
    generated = loaded.generate(**kwargs)
    for name, value in expected.items():
        setattr(model.generation_config, name, value)
    torch.manual_seed(5)
    assert torch.equal(generated.sequences, model.generate(**kwargs).sequences)


def test_settings_of_generation_if_the_configuration_is_silent(tmp_path):
    model = build("split")
    config = published_config(model)
    config["trainer"]["generative_eval"]["sampling"] = {"enable_energy_sum_filter": False, "energy_sum_power_a": 1.0}
    output = run_conversion(tmp_path, reference_state_dict(model), config)
    stored = json.loads((output / "generation_config.json").read_text())
    expected = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "energy_temperature": 1.0, "stop_threshold": 0.5}
    expected |= {"stop_votes": 1, "stop_min_hits": 16, "max_new_tokens": 29, "stop_published": True}
    assert {name: stored[name] for name in expected} == expected
    assert "energy_sum_filter" not in stored and "stream_overrides" not in stored


@MODES
def test_the_tokenizer_that_fits_is_saved(mode, tmp_path):
    model = build(mode)
    config = published_config(model)
    config["dataset"]["features"]["energy"] |= {"subtract_by": -2.0, "multiply_by": 0.5}
    config["dataset"]["energy_threshold"] = 0.125
    output = run_conversion(tmp_path, reference_state_dict(model), config)
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert type(tokenizer) is SpadeTokenizer
    assert (tokenizer.axis_mode, tokenizer.nbins) == (mode, TINY["nbins"])
    assert (tokenizer.num_registers, tokenizer.legacy_pad_length) == (2, 30)
    assert tokenizer.energy_threshold == 0.125
    assert dict(tokenizer.energy_transform) == {"log": True, "subtract": -2.0, "multiply": 0.5}
    encoded = tokenizer(SHOWERS, padding=True, return_tensors="pt")
    first = 3 + tokenizer.energy_delay
    assert encoded["hit_energy"][0, first].item() == pytest.approx((np.log(0.5) + 2.0) * 0.5, rel=1e-6)
    with torch.no_grad():
        model(**encoded)


@MODES
def test_without_stop_network(mode, tmp_path):
    model = build(mode, use_stop_head=False)
    config = published_config(model)
    loaded = assert_same_model(run_conversion(tmp_path, reference_state_dict(model), config), model)
    assert loaded.config.use_stop_head is False
    generated = loaded.generate(incident_energy=[20.0, 30.0], num_hits=[4, 7])
    assert generated.num_hits.tolist() == [4, 7]


def test_architectures_off_the_published_one(tmp_path):
    """Norms without bias, ordinary attention, other sizes of the stop network: the shapes tell."""
    model = build("split", use_rms_norm=True, num_key_value_heads=2, stop_num_layers=1, num_registers=3)
    output = run_conversion(tmp_path, reference_state_dict(model), published_config(model))
    loaded = assert_same_model(output, model)
    assert (loaded.config.use_rms_norm, loaded.config.num_key_value_heads, loaded.config.num_registers) == (True, 2, 3)


@MODES
def test_golden_folder_converts_as_it_is(mode, tmp_path, capsys):
    golden = DEFAULT_FOLDER / "spade" / mode
    arguments = ["--checkpoint", str(golden / "state_dict.safetensors"), "--config", str(golden / "config.json")]
    output = tmp_path / "spade"
    assert convert(["spade", *arguments, "--output", str(output)]) == 0
    settings = json.loads((golden / "config.json").read_text())
    assert f"SpadeForCausalLM, {settings['n_parameters']:,} parameters" in capsys.readouterr().out
    stored = json.loads((output / "generation_config.json").read_text())
    sampling = settings["sampling"]
    assert stored["stop_threshold"] == sampling["stop_probability_threshold"]
    assert stored["stop_min_hits"] == sampling["physics_stop_min_hits"]
    assert stored["max_new_tokens"] == sampling["max_len"] - 1
    dataset = settings["dataset"]
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert tokenizer.nbins == [dataset[f"nbins_{axis}"] for axis in "xyz"]
    assert tokenizer.legacy_pad_length == dataset["pad_length"]
    assert {"modeling_spade.py", "tokenization_spade.py"} <= {path.name for path in output.iterdir()}


# ---------------------------------------------------------------------------------------------------------------------
# What does not fit: one line with all problems
# ---------------------------------------------------------------------------------------------------------------------


@MODES
def test_hostile_unknown_parameters_are_listed(mode, tmp_path):
    """Metrics, averages of the weights and options that are off."""
    model = build(mode)
    unknown = {
        "ema_model.core.decoder.final_norm.weight": torch.ones(16),
        "val_metric.total": torch.tensor(3.0),
        "model.hierarchical_axis_projections.x.weight": torch.ones(16, 16),
        "model.core.decoder.layers.0.attn.q_proj.bias": torch.ones(16),
    }
    assert_refused(
        tmp_path, reference_state_dict(model) | unknown, published_config(model), "unknown", "model.ckpt", *unknown
    )


@MODES
def test_hostile_missing_and_misshapen_parameters_are_listed(mode, tmp_path):
    model = build(mode)
    weights = reference_state_dict(model)
    for name in ("core.decoder.layers.1.ffn.w2.bias", "core.decoder.final_norm.weight", "mog_head.mean_head.bias"):
        del weights[f"model.{name}"]
    del weights["physics_stop_model.classifier.3.bias"]
    weights["model.core.decoder.layers.1.attn.o_proj.weight"] = torch.zeros(16, 8)
    weights["physics_stop_model.hit_energy_projection.weight"] = torch.zeros(16)
    assert_refused(
        tmp_path,
        weights,
        published_config(model),
        "missing model.layers.1.mlp.up_proj.bias",
        "missing model.norm.weight",
        "missing energy_head.means.bias",
        "missing stop_head.classifier.3.bias",
        "model.layers.1.self_attn.o_proj.weight has shape (16, 8), expected (16, 16)",
        "stop_head.hit_energy.weight has shape (16,), expected (16, 1)",
        "model.ckpt",
    )


@MODES
@pytest.mark.parametrize("change", ["missing", (), (16,), (2, 3, 4), (0,), (0, 0), (1, 1)])
def test_hostile_parameters_that_give_sizes(mode, change, tmp_path):
    model = build(mode)
    whole = reference_state_dict(model)
    names = [
        name
        for name in whole
        if name.endswith(("embedding.weight", "embeddings.y.weight", "concat_proj.weight", "token_feature_proj.weight"))
        or name in ("model.mog_head.mean_head.weight", "model.mog_head.mlp.0.weight", "model.register_embeddings")
        or name in ("physics_stop_model.classifier.0.weight", "model.hit_energy_feature_proj.0.weight")
        or name.endswith(("layers.0.attn.k_proj.weight", "layers.0.ffn.w1.weight"))
    ]
    assert len(names) > 9
    for name in names:
        weights = dict(whole)
        if change == "missing":
            del weights[name]
        else:
            weights[name] = torch.zeros(change)
        assert_refused(tmp_path, weights, published_config(model), "model.ckpt")


def test_hostile_layers_are_refused_before_anything_is_built(tmp_path):
    model = build("split")
    weights = reference_state_dict(model) | {"model.core.decoder.layers.100000000.norm1.weight": torch.ones(16)}
    assert_refused(tmp_path, weights, published_config(model), "100000000", "blocks")
    weights = reference_state_dict(model) | {"physics_stop_model.classifier.999999.weight": torch.ones(1, 20)}
    assert_refused(tmp_path, weights, published_config(model), "stop_head.classifier.")


def changed(config: dict, path: str, value) -> dict:
    """The configuration with one setting changed, or without it (`...`)."""
    config = copy.deepcopy(config)
    level = config
    *folders, name = path.split("/")
    for folder in folders:
        level = level[folder]
    if value is ...:
        del level[name]
    else:
        level[name] = value
    return config


SAMPLING = "trainer/generative_eval/sampling"
HOSTILE_SETTINGS = [
    # options that are not supported
    ("model/hierarchical_conditioning", True, "hierarchical_conditioning = True"),
    ("model/use_n_hits_feature", True, "use_n_hits_feature"),
    ("model/use_energy_tokenization", True, "use_energy_tokenization"),
    ("model/transformer/attention_window", 64, "attention_window = 64"),
    ("model/use_spatial_axis_sinusoid", "yes", "use_spatial_axis_sinusoid = 'yes'"),
    ("model/physics_stop_use_history", True, "physics_stop_use_history"),
    ("model/transformer/use_rope", False, "use_rope = False"),
    ("model/use_mog_energy", False, "use_mog_energy = False"),
    ("dataset/features/energy/func", "np.sqrt", "'np.sqrt', expected a natural logarithm"),
    ("dataset/features/incident_energy/func", "np.log", "incident_energy.func = 'np.log'"),
    (f"{SAMPLING}/stop_source", "n_hits", "stop_source = 'n_hits'"),
    # against the shapes
    ("model/transformer/embedding_dim", 32, "embedding_dim = 32, but the checkpoint has 16"),
    ("model/transformer/num_layers", 3, "num_layers = 3, but the checkpoint has 2"),
    ("model/transformer/num_heads", 3, "num_heads = 3"),
    ("model/n_registers", 4, "n_registers = 4, but the checkpoint has 2"),
    ("model/mog_components", 5, "mog_components = 5, but the checkpoint has 3"),
    ("dataset/nbins_y", 30, "nbins_y = 30, but the checkpoint has 4"),
    # wrong types and values
    ("dataset/nbins_x", "five", "nbins_x = 'five'"),
    ("dataset/nbins_x", [5], "nbins_x = [5]"),
    ("dataset/axis_mode", "both", "axis_mode = 'both'"),
    ("dataset/pad_length", "long", "pad_length = 'long', expected a finite number"),
    ("dataset/pad_length", 0, "pad_length = 0, expected an integer from 2"),
    ("dataset/pad_length", 30.5, "pad_length = 30.5, expected an integer"),
    ("dataset/energy_threshold", -1.0, "energy_threshold"),
    ("dataset/features/energy/multiply_by", 0.0, "multiply"),
    ("dataset/features/energy/subtract_by", "a", "subtract_by = 'a'"),
    ("dataset/features/incident_energy/multiply_by", [1], "multiply_by = [1]"),
    ("model/transformer/num_heads", "two", "num_heads = 'two'"),
    ("model/transformer/num_heads", 0, "num_heads"),
    ("model/transformer/attn_dropout", True, "attn_dropout = True"),
    ("model/energy_noise_rel_std", float("nan"), "energy_noise_rel_std = nan"),
    ("trainer/generative_eval/sampling", [1, 2], "sampling = [1, 2]"),
    (f"{SAMPLING}/temperature", 0.0, "temperature = 0, expected a number above 0"),
    (f"{SAMPLING}/temperature", "hot", "temperature = 'hot'"),
    (f"{SAMPLING}/energy_temperature", -1, "energy_temperature = -1"),
    (f"{SAMPLING}/top_p", 1.5, "top_p = 1.5"),
    (f"{SAMPLING}/top_k", 2.5, "top_k = 2.5"),
    (f"{SAMPLING}/max_len", 1, "max_len = 1"),
    (f"{SAMPLING}/stop_consecutive_required", 0, "stop_consecutive_required = 0"),
    (f"{SAMPLING}/physics_stop_min_hits", -4, "physics_stop_min_hits = -4"),
    (f"{SAMPLING}/stop_probability_threshold", "high", "stop_probability_threshold = 'high'"),
    (f"{SAMPLING}/axis_temperatures", {"t": 1.0}, "axis_temperatures"),
    (f"{SAMPLING}/axis_temperatures", [1.0], "axis_temperatures"),
    (f"{SAMPLING}/axis_temperatures", {"x": "hot"}, "x = 'hot'"),
    (f"{SAMPLING}/energy_sum_power_b", ..., "no energy_sum_power_b"),
    (f"{SAMPLING}/energy_sum_power_c", "c", "energy_sum_power_c = 'c'"),
    (f"{SAMPLING}/energy_sum_safety_factor", 0.0, "energy_sum_safety_factor = 0"),
    (f"{SAMPLING}/energy_sum_max_retries", -1, "energy_sum_max_retries = -1"),
]


@pytest.mark.parametrize(("path", "value", "expected"), HOSTILE_SETTINGS)
def test_hostile_values_in_the_configuration(path, value, expected, tmp_path):
    model = build("split")
    config = changed(published_config(model), path, value)
    assert_refused(tmp_path, reference_state_dict(model), config, expected)


def test_hostile_configuration_of_the_other_mode(tmp_path):
    for mode, other in (("split", "combined"), ("combined", "split")):
        model = build(mode)
        config = changed(published_config(model), "dataset/axis_mode", other)
        assert_refused(tmp_path, reference_state_dict(model), config, f"axis_mode = '{other}'")


def test_hostile_stop_network_that_is_promised_and_absent(tmp_path):
    model = build("split")
    weights = {name: value for name, value in reference_state_dict(model).items() if "physics_stop" not in name}
    assert_refused(tmp_path, weights, published_config(model), "use_physics_stop", "no stop network")
    # a part of it is not none of it
    weights["physics_stop_model.position_projection.bias"] = torch.zeros(16)
    assert_refused(tmp_path, weights, published_config(model), "stop_head.classifier.0.weight")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (..., "no nbins_x"),
        ("5", "nbins_x is '5'"),
        (5.5, "nbins_x is 5.5"),
        (True, "nbins_x is True"),
        (0, "nbins_x is 0"),
        (-5, "nbins_x is -5"),
        (10**9, "the checkpoint has 122 tokens"),
        (6, "the checkpoint has 122 tokens, expected 146 for 6 x 4 x 6 cells"),
    ],
)
def test_hostile_grid_that_only_the_configuration_tells(value, expected, tmp_path):
    """The vocabulary of whole cells and no stop network: refused before a network of that grid is built."""
    model = build("combined", use_stop_head=False)
    config = changed(published_config(model), "dataset/nbins_x", value)
    assert_refused(tmp_path, reference_state_dict(model), config, expected)


def test_hostile_vocabulary_that_is_not_that_of_the_grid(tmp_path):
    model = build("combined")
    weights = reference_state_dict(model)
    weights["model.token_embedding.weight"] = torch.zeros(100, 16)
    assert_refused(tmp_path, weights, published_config(model), "has 100 tokens, expected 122 for 5 x 4 x 6 cells")


def test_sizes_come_from_the_shapes_if_the_configuration_is_silent(tmp_path):
    model = build("split", num_attention_heads=8, incident_energy_offset=50.0, incident_energy_scale=0.043)
    output = run_conversion(tmp_path, reference_state_dict(model), {"dataset": {"pad_length": 30}})
    assert_same_model(output, model)
