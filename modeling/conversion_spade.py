"""Parameter names and configuration of the SPADE reference (arXiv:2606.11304) to ours."""

import math
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
# options of the reference that every published configuration has on, and that parameters do not tell
REQUIRED = ("use_rope", "use_mog_energy", "use_hit_energy_feature", "use_incident_energy_feature")


def _find_integer(reference_config: dict[str, Any], name: str, least: int) -> int | None:
    value = find_number(reference_config, name)
    if value is not None and (value != int(value) or value < least):
        raise ValueError(f"configuration says {name} = {value:g}, expected an integer from {least}")
    return None if value is None else int(value)


def _find_transform(reference_config: dict[str, Any], feature: str) -> dict[str, Any] | None:
    """
    The transform of a feature, (func(value) - subtract_by) * multiply_by, at any depth; other settings may have the
    name of the feature too.
    """
    queue, seen = [reference_config], {id(reference_config)}
    while queue:
        level = queue.pop(0)
        transform = level.get(feature)
        if isinstance(transform, dict) and {"func", "subtract_by", "multiply_by"} & set(transform):
            return transform
        for value in level.values():
            if isinstance(value, dict) and id(value) not in seen:
                seen.add(id(value))
                queue.append(value)
    return None


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
            raise ValueError(f"configuration says {name} = {find(name)!r}, which is not supported")
    for name in REQUIRED:
        if find(name) not in (None, True):
            raise ValueError(f"configuration says {name} = {find(name)!r}, which is not supported")
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
    has_stop = any(name.startswith("stop_head.") for name in state_dict)
    if find("use_physics_stop") and not has_stop:
        raise ValueError("configuration says use_physics_stop = True, but the checkpoint has no stop network")
    tables = [f"model.embeddings.tokens.{i}.weight" for i in range(3)] if is_split else []
    stop_tables = [f"stop_head.tokens.{i}.weight" for i in range(3)] if has_stop else []
    needed = [*tables, *stop_tables, *(["stop_head.classifier.0.weight"] if has_stop else [])]
    missing = [name for name in needed if name not in state_dict]
    if missing:
        raise ValueError(f"checkpoint lacks parameters: {', '.join(missing)}")
    check_matrices(state_dict, *needed)
    if tables or stop_tables:
        nbins = [rows(name) - 2 for name in tables or stop_tables]
    else:
        nbins = [find(f"nbins_{axis}") for axis in AXES]
    for axis, cells in zip(AXES, nbins):
        value = find(f"nbins_{axis}")
        if cells is None:
            raise ValueError(f"the checkpoint does not tell the grid, and the configuration has no nbins_{axis}")
        if value is not None and value != cells:
            raise ValueError(f"configuration says nbins_{axis} = {value!r}, but the checkpoint has {cells}")
        if isinstance(cells, bool) or not isinstance(cells, int) or cells < 1:
            raise ValueError(f"nbins_{axis} is {cells!r}, expected a number of cells")
    num_tokens = rows("model.embeddings.tokens.0.weight")
    if not is_split and num_tokens != math.prod(nbins) + 2:
        raise ValueError(
            f"the checkpoint has {num_tokens} tokens, expected {math.prod(nbins) + 2} for {nbins[0]} x {nbins[1]} x "
            f"{nbins[2]} cells"
        )

    layers = {int(match.group(1)) for name in state_dict if (match := re.match(r"model\.layers\.(\d+)\.", name))}
    if layers != set(range(len(layers))):
        raise ValueError(f"checkpoint has the blocks {sorted(layers)}, expected 0 to {len(layers) - 1}")
    hidden_size = rows("model.embeddings.projection.weight")
    num_heads = SpadeConfig.num_attention_heads if find("num_heads") is None else find("num_heads")
    if isinstance(num_heads, bool) or not isinstance(num_heads, int) or num_heads < 1 or hidden_size % num_heads:
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
    registers = state_dict.get("model.embeddings.registers")
    if registers is not None:
        check_matrices(state_dict, "model.embeddings.registers")
    num_registers = 0 if registers is None else len(registers)
    checks = {
        "embedding_dim": hidden_size,
        "num_layers": len(layers),
        "mog_components": rows("energy_head.means.weight"),
        "n_registers": num_registers,
    }
    for name, value in checks.items():
        if find(name) is not None and find(name) != value:
            raise ValueError(f"configuration says {name} = {find(name)!r}, but the checkpoint has {value}")

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
        "num_registers": num_registers,
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
    incident = _find_transform(reference_config, "incident_energy")
    if incident is not None:
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
        "stop_dropout": ("physics_stop_dropout_p",),
        "stop_pos_weight": ("physics_stop_pos_weight",),
        "stop_loss_weight": ("physics_stop_loss_weight",),
    }.items():
        value = find_number(reference_config, *sources)
        if value is not None:
            settings[name] = value
    settings["max_num_hits"] = _find_integer(reference_config, "pad_length", 2)
    try:
        return SpadeConfig(**{name: value for name, value in settings.items() if value is not None})
    except StrictDataclassError as error:
        raise ValueError(str(error.__cause__ or error)) from None


def convert_generation_settings(reference_config: dict[str, Any], config: SpadeConfig) -> dict[str, Any]:
    """
    Sampling, stop and post-processing of the reference's configuration as settings of `generation_config`.

    Args:
        config: of the converted model.

    Raises:
        ValueError: naming the setting that has no sense.
    """
    sampling = find_setting(reference_config, "sampling") or {}
    if not isinstance(sampling, dict):
        raise ValueError(f"configuration says sampling = {sampling!r}, expected a mapping")
    source = find_setting(reference_config, "stop_source")
    if source not in (None, "physics_stop"):
        raise ValueError(f"configuration says stop_source = {source!r}, expected 'physics_stop'")

    def positive(settings: dict[str, Any], name: str) -> float | None:
        value = find_number(settings, name)
        if value is not None and value <= 0:
            raise ValueError(f"configuration says {name} = {value:g}, expected a number above 0")
        return value

    def stop_setting(name: str, least: int) -> int | None:
        """From the sampling, or from the options of the model."""
        value = _find_integer(sampling, name, least)
        return _find_integer(reference_config, name, least) if value is None else value

    threshold = find_number(sampling, "stop_probability_threshold")
    min_hits = stop_setting("physics_stop_min_hits", 0)
    max_length = _find_integer(sampling, "max_len", 2) or config.max_num_hits
    settings: dict[str, Any] = {
        "stop_published": True,
        "stop_sampling": False,
        "stop_threshold": 0.5 if threshold is None else threshold,
        "stop_min_hits": 16 if min_hits is None else min_hits,
        "stop_votes": stop_setting("stop_consecutive_required", 1) or 1,
        "temperature": positive(sampling, "temperature"),
        "top_k": _find_integer(sampling, "top_k", 0) or 0,
        "top_p": positive(sampling, "top_p"),
        "energy_temperature": positive(sampling, "energy_temperature"),
        "max_new_tokens": max_length - 1,
    }
    if settings["top_p"] is not None and settings["top_p"] > 1:
        raise ValueError(f"configuration says top_p = {settings['top_p']:g}, expected a number from 0 to 1")
    temperatures = find_setting(sampling, "axis_temperatures")
    if temperatures:
        if not isinstance(temperatures, dict) or not set(temperatures) <= set(AXES):
            raise ValueError(f"configuration says axis_temperatures = {temperatures!r}, expected some of x, y, z")
        overrides = {str(AXES.index(axis)): positive(temperatures, axis) for axis in temperatures}
        # a vocabulary of whole cells has no axes, there the reference passes over them
        if config.axis_mode == "split":
            settings["stream_overrides"] = {
                stream: {"temperature": value} for stream, value in overrides.items() if value is not None
            }
    if find_setting(sampling, "enable_energy_sum_filter"):
        curve = {name: find_number(sampling, f"energy_sum_power_{name}") for name in ("a", "b", "c")}
        missing = [name for name, value in curve.items() if value is None]
        if missing:
            raise ValueError(f"the energy-sum filter is on, but the configuration has no energy_sum_power_{missing[0]}")
        retries = _find_integer(sampling, "energy_sum_max_retries", 0)
        settings["energy_sum_filter"] = {
            **curve,
            "safety_factor": positive(sampling, "energy_sum_safety_factor") or 0.9,
            "max_retries": 2 if retries is None else retries,
        }
    return {name: value for name, value in settings.items() if value is not None}


def convert_energy_transform(reference_config: dict[str, Any]) -> dict[str, Any]:
    """The transform of the hit energies, as `SpadeTokenizer` takes it."""
    energy = _find_transform(reference_config, "energy")
    if energy is None:
        return {"log": True, "subtract": -1.5, "multiply": 0.91}
    function = energy.get("func")
    if function is not None and str(function).split(".")[-1] not in ("log", "ln"):
        raise ValueError(f"configuration says energy.func = {function!r}, expected a natural logarithm")
    subtract, multiply = find_number(energy, "subtract_by"), find_number(energy, "multiply_by")
    return {
        "log": function is not None,
        "subtract": 0.0 if subtract is None else subtract,
        "multiply": 1.0 if multiply is None else multiply,
    }
