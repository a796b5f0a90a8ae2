"""Parameter names and configuration of the SPADE reference (arXiv:2606.11304) to ours."""

import re
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from .configuration_spade import SpadeConfig
from .conversion_common import check_matrices, find_number, find_setting

AXES = ("x", "y", "z")


def _axes(pattern: str, name: str) -> tuple[tuple[str, str], ...]:
    """One pattern per axis, with the axis as its index here."""
    return tuple((pattern.replace("AXIS", axis), name.replace("AXIS", str(i))) for i, axis in enumerate(AXES))


_WB = r"\.(weight|bias)"
# name in the reference -> name here, tried in this order
KEY_PATTERNS = (
    (r"model\.register_embeddings", "model.embeddings.registers"),
    *_axes(r"model\.per_axis_embed\.embeddings\.AXIS\.weight", "model.embeddings.tokens.AXIS.weight"),
    *_axes(r"model\.per_axis_embed\.norms\.AXIS" + _WB, r"model.embeddings.norms.AXIS.\1"),
    (r"model\.token_embedding\.weight", "model.embeddings.tokens.0.weight"),
    (r"model\.(?:axis_concat_proj|token_feature_proj)" + _WB, r"model.embeddings.projection.\1"),
    (r"model\.hit_energy_feature_proj\.0" + _WB, r"model.embeddings.hit_energy.fc1.\1"),
    (r"model\.hit_energy_feature_proj\.2" + _WB, r"model.embeddings.hit_energy.fc2.\1"),
    (r"model\.incident_energy_feature_proj\.0" + _WB, r"model.embeddings.incident_energy.fc1.\1"),
    (r"model\.incident_energy_feature_proj\.2" + _WB, r"model.embeddings.incident_energy.fc2.\1"),
    (r"model\.register_\w*incident\w*\.0" + _WB, r"model.embeddings.register_condition.fc1.\1"),
    (r"model\.register_\w*incident\w*\.2" + _WB, r"model.embeddings.register_condition.fc2.\1"),
    (r"model\.core\.decoder\.layers\.(\d+)\.norm1" + _WB, r"model.layers.\1.attention_norm.\2"),
    (r"model\.core\.decoder\.layers\.(\d+)\.norm2" + _WB, r"model.layers.\1.mlp_norm.\2"),
    (r"model\.core\.decoder\.layers\.(\d+)\.attn\.([qkvo]_proj)\.weight", r"model.layers.\1.self_attn.\2.weight"),
    (r"model\.core\.decoder\.layers\.(\d+)\.ffn\.w1" + _WB, r"model.layers.\1.mlp.gate_proj.\2"),
    (r"model\.core\.decoder\.layers\.(\d+)\.ffn\.w2" + _WB, r"model.layers.\1.mlp.up_proj.\2"),
    (r"model\.core\.decoder\.layers\.(\d+)\.ffn\.w3" + _WB, r"model.layers.\1.mlp.down_proj.\2"),
    (r"model\.core\.decoder\.final_norm" + _WB, r"model.norm.\1"),
    *_axes(r"model\.axis_token_heads\.AXIS\.proj" + _WB, r"token_heads.AXIS.\1"),
    (r"model\.token_head\.proj" + _WB, r"token_heads.0.\1"),
    (r"model\.mog_head\.mlp\.0" + _WB, r"energy_head.fc1.\1"),
    (r"model\.mog_head\.mlp\.2" + _WB, r"energy_head.fc2.\1"),
    (r"model\.mog_head\.logit_head" + _WB, r"energy_head.logits.\1"),
    (r"model\.mog_head\.mean_head" + _WB, r"energy_head.means.\1"),
    (r"model\.mog_head\.log_scale_head" + _WB, r"energy_head.log_scales.\1"),
    *_axes(r"physics_stop_model\.AXIS_embedding\.weight", "stop_head.tokens.AXIS.weight"),
    (r"physics_stop_model\.hit_energy_projection" + _WB, r"stop_head.hit_energy.\1"),
    (r"physics_stop_model\.incident_energy_projection" + _WB, r"stop_head.incident_energy.\1"),
    (r"physics_stop_model\.position_projection" + _WB, r"stop_head.position.\1"),
    (r"physics_stop_model\.hit_counter_projection" + _WB, r"stop_head.counter.\1"),
    (r"physics_stop_model\.classifier\.(\d+)" + _WB, r"stop_head.classifier.\1.\2"),
)

# options of the reference that no published configuration has on
UNSUPPORTED = (
    "hierarchical_conditioning",
    "use_n_hits_register",
    "use_n_hits_feature",
    "use_energy_tokenization",
    "use_spatial_axis_sinusoid",
    "attention_window",
    "physics_stop_use_energy_sum",
    "physics_stop_use_history",
    "physics_stop_hit_counter_log_scale",
)


def convert_config(reference_config: dict[str, Any], state_dict: dict[str, torch.Tensor]) -> SpadeConfig:
    """
    Configuration of a *converted* state dict, with the published rotary pairing, loss masks and stop inputs. Sizes come
    from the shapes; the reference's YAML adds what shapes do not tell and must not contradict them.

    Raises:
        ValueError: naming the option that is not supported, the setting that disagrees with the checkpoint, or the
            parameter that is missing.
    """

    def find(*names: str) -> Any:
        return find_setting(reference_config, *names)

    for name in UNSUPPORTED:
        if find(name) not in (None, False, 0):
            raise ValueError(f"configuration says {name} = {find(name)}, which is not supported")
    needed = (
        "model.embeddings.projection.weight",
        "model.embeddings.tokens.0.weight",
        "model.embeddings.hit_energy.fc1.weight",
        "model.layers.0.self_attn.k_proj.weight",
        "model.layers.0.mlp.gate_proj.weight",
        "energy_head.fc1.weight",
        "energy_head.means.weight",
    )
    missing = [name for name in needed if name not in state_dict]
    if missing:
        raise ValueError(f"checkpoint lacks parameters: {', '.join(missing)}")
    check_matrices(state_dict, *needed)

    def rows(name: str) -> int:
        return state_dict[name].shape[0]

    is_split = "model.embeddings.tokens.1.weight" in state_dict
    has_stop = "stop_head.classifier.0.weight" in state_dict
    tables = [f"model.embeddings.tokens.{i}.weight" for i in range(3)] if is_split else None
    if tables is None and has_stop:
        tables = [f"stop_head.tokens.{i}.weight" for i in range(3)]
    if tables is not None:
        missing = [name for name in tables if name not in state_dict]
        if missing:
            raise ValueError(f"checkpoint lacks parameters: {', '.join(missing)}")
        nbins = [rows(name) - 2 for name in tables]
    else:
        nbins = [find(f"nbins_{axis}") for axis in AXES]
    for axis, cells in zip(AXES, nbins):
        value = find(f"nbins_{axis}")
        if cells is None:
            raise ValueError(f"the checkpoint does not tell the grid, and the configuration has no nbins_{axis}")
        if value is not None and value != cells:
            raise ValueError(f"configuration says nbins_{axis} = {value}, but the checkpoint has {cells}")

    layers = {int(match.group(1)) for name in state_dict if (match := re.match(r"model\.layers\.(\d+)\.", name))}
    if layers != set(range(len(layers))):
        raise ValueError(f"checkpoint has the blocks {sorted(layers)}, expected 0 to {len(layers) - 1}")
    hidden_size = rows("model.embeddings.projection.weight")
    num_heads = find("num_heads") or SpadeConfig().num_attention_heads
    if not isinstance(num_heads, int) or num_heads < 1 or hidden_size % num_heads:
        raise ValueError(
            f"configuration says num_heads = {num_heads!r}, but the checkpoint has a width of {hidden_size}"
        )
    head_dim = hidden_size // num_heads
    key_size = rows("model.layers.0.self_attn.k_proj.weight")
    if key_size % head_dim:
        raise ValueError(f"keys of {key_size} components do not consist of heads of {head_dim}")
    mode = find("axis_mode")
    if mode is not None and mode != ("split" if is_split else "combined"):
        raise ValueError(f"configuration says axis_mode = {mode!r}, but the checkpoint is of the other kind")
    checks = {
        "embedding_dim": hidden_size,
        "num_layers": len(layers),
        "mog_components": rows("energy_head.means.weight"),
    }
    for name, value in checks.items():
        if find(name) is not None and find(name) != value:
            raise ValueError(f"configuration says {name} = {find(name)}, but the checkpoint has {value}")

    registers = state_dict.get("model.embeddings.registers")
    settings: dict[str, Any] = {
        "nbins": nbins,
        "axis_mode": "split" if is_split else "combined",
        "hidden_size": hidden_size,
        "num_hidden_layers": len(layers),
        "num_attention_heads": num_heads,
        "num_key_value_heads": key_size // head_dim,
        "intermediate_size": rows("model.layers.0.mlp.gate_proj.weight"),
        "use_rms_norm": "model.layers.0.attention_norm.bias" not in state_dict,
        "parallel_residual": bool(find("use_parallel_residual")),
        "feature_size": rows("model.embeddings.hit_energy.fc1.weight"),
        "num_registers": 0 if registers is None else registers.shape[0],
        "condition_register": "model.embeddings.register_condition.fc1.weight" in state_dict,
        "mixture_components": rows("energy_head.means.weight"),
        "energy_head_size": rows("energy_head.fc1.weight"),
        "rope_pairing": "published",
        "loss_over_prefix": True,
        "layer_monotonic": bool(find("use_z_causal_mask")),
        "use_stop_head": has_stop,
        "stop_energy_scale": 1.0,
        "stop_counter_scale": 1.0,
    }
    if is_split:
        settings["axis_embedding_size"] = state_dict["model.embeddings.tokens.0.weight"].shape[1]
    if has_stop:
        linears = [name for name in state_dict if re.fullmatch(r"stop_head\.classifier\.\d+\.weight", name)]
        settings["stop_num_layers"] = len(linears) - 1
        settings["stop_hidden_size"] = rows("stop_head.classifier.0.weight")
        settings["stop_embedding_size"] = state_dict["stop_head.tokens.0.weight"].shape[1]
        settings["stop_use_position"] = "stop_head.position.weight" in state_dict
        settings["stop_use_counter"] = "stop_head.counter.weight" in state_dict
    incident = find("incident_energy")
    if isinstance(incident, dict):
        if incident.get("func") is not None:
            raise ValueError(f"configuration says incident_energy.func = {incident['func']!r}, which is not supported")
        settings["incident_energy_offset"] = find_number(incident, "subtract_by")
        settings["incident_energy_scale"] = find_number(incident, "multiply_by")
    for name, sources in {
        "energy_noise": ("energy_noise_rel_std",),
        "energy_min": ("energy_sample_min",),
        "energy_max": ("energy_sample_max",),
        "energy_loss_weight": ("energy_loss_weight",),
        "attention_dropout": ("attn_dropout",),
        "hidden_dropout": ("dropout",),
        "max_num_hits": ("pad_length",),
        "stop_dropout": ("physics_stop_dropout_p",),
        "stop_pos_weight": ("physics_stop_pos_weight",),
        "stop_loss_weight": ("physics_stop_loss_weight",),
    }.items():
        value = find_number(reference_config, *sources)
        if value is not None:
            settings[name] = int(value) if name == "max_num_hits" else value
    try:
        return SpadeConfig(**{name: value for name, value in settings.items() if value is not None})
    except StrictDataclassError as error:
        raise ValueError(str(error.__cause__ or error)) from None


def convert_generation_settings(reference_config: dict[str, Any]) -> dict[str, Any]:
    """Sampling, stop and post-processing of the reference's configuration as settings of `generation_config`."""
    sampling = find_setting(reference_config, "sampling") or {}
    if not isinstance(sampling, dict):
        raise ValueError(f"configuration says sampling = {sampling!r}, expected a mapping")
    sources = [sampling, reference_config]

    def number(*names: str) -> float | None:
        return next((value for source in sources if (value := find_number(source, *names)) is not None), None)

    threshold = number("stop_probability_threshold")
    settings: dict[str, Any] = {
        "stop_published": True,
        "stop_sampling": False,
        "stop_threshold": 0.5 if threshold is None else threshold,
        "temperature": number("temperature"),
        "top_k": int(number("top_k") or 0),
        "top_p": number("top_p"),
        "energy_temperature": number("energy_temperature"),
        "stop_min_hits": 16 if number("physics_stop_min_hits") is None else int(number("physics_stop_min_hits")),
        "stop_votes": int(number("stop_consecutive_required") or 1),
    }
    max_length = number("max_len") or find_number(reference_config, "pad_length")
    if max_length is not None:
        settings["max_new_tokens"] = int(max_length) - 1
    temperatures = find_setting(sampling, "axis_temperatures")
    if isinstance(temperatures, dict) and temperatures:
        settings["stream_overrides"] = {
            str(AXES.index(axis)): {"temperature": float(value)} for axis, value in temperatures.items()
        }
    if find_setting(sampling, "enable_energy_sum_filter"):
        curve = {name: find_number(sampling, f"energy_sum_power_{name}") for name in ("a", "b", "c")}
        missing = [name for name, value in curve.items() if value is None]
        if missing:
            raise ValueError(f"the energy-sum filter is on, but the configuration has no energy_sum_power_{missing[0]}")
        safety = find_number(sampling, "energy_sum_safety_factor")
        retries = find_number(sampling, "energy_sum_max_retries")
        settings["energy_sum_filter"] = {
            **curve,
            "safety_factor": 0.9 if safety is None else safety,
            "max_retries": 2 if retries is None else int(retries),
        }
    return {name: value for name, value in settings.items() if value is not None}


def convert_energy_transform(reference_config: dict[str, Any]) -> dict[str, Any]:
    """The transform of the hit energies, as `SpadeTokenizer` takes it."""
    features = find_setting(reference_config, "features", "feature_dict") or reference_config
    energy = features.get("energy") if isinstance(features, dict) else None
    if not isinstance(energy, dict):
        return {"log": True, "subtract": -1.5, "multiply": 0.91}
    function = energy.get("func")
    if function is not None and str(function).split(".")[-1] not in ("log", "ln"):
        raise ValueError(f"configuration says energy.func = {function!r}, expected a natural logarithm")
    values = {"subtract": find_number(energy, "subtract_by"), "multiply": find_number(energy, "multiply_by")}
    return {"log": function is not None, "subtract": values["subtract"] or 0.0, "multiply": values["multiply"] or 1.0}
