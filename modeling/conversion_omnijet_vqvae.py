"""
Names and configuration of the published VQ-VAEs of OmniJet (arXiv:2403.05618, 2501.05534, 2512.04149) to ours.

The affine map of the codebook is kept as it is, not folded. The counts of unused codes and the mark of an initialised
codebook are training state, which is converted too: training can go on.
"""

import re
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from .configuration_omnijet_vqvae import OmniJetVQVAEConfig
from .conversion_common import check_matrices, find_number, find_setting

_WB = r"\.(weight|bias)"
# Lightning puts `model.` before all names. The blocks are called differently in every class of the reference.
_NORMFORMER = r"(?:model\.)?(encoder|decoder)(?:_normformer)?\.blocks\.(\d+)\."
_TRANSFORMER = r"(?:model\.)?(encoder|decoder)\.blocks\.(\d+)\."
_LAYER = r"\1.layers.\2."
# name in the reference -> name here, tried in this order
KEY_PATTERNS = (
    (r"(?:model\.)?vqlayer\.codebook\.weight", "quantizer.codebook"),
    (r"(?:model\.)?vqlayer\.affine_transform\.(scale|bias)", r"quantizer.affine_\1"),
    (r"(?:model\.)?vqlayer\._counts", "quantizer.counts"),
    (r"(?:model\.)?vqlayer\.data_initialized", "quantizer.data_initialized"),
    (r"(?:model\.)?input_projection" + _WB, r"encoder.project_in.\1"),
    (r"(?:model\.)?latent_projection_in" + _WB, r"encoder.project_out.\1"),
    (r"(?:model\.)?latent_projection_out" + _WB, r"decoder.project_in.\1"),
    (r"(?:model\.)?output_projection" + _WB, r"decoder.project_out.\1"),
    (r"(?:model\.)?(encoder|decoder)\.project_(in|out)" + _WB, r"\1.project_\2.\3"),
    # NormFormer blocks
    (_NORMFORMER + r"norm1" + _WB, _LAYER + r"attention_norm.\3"),
    (_NORMFORMER + r"attn\.in_proj_(weight|bias)", _LAYER + r"self_attn.qkv_proj.\3"),
    (_NORMFORMER + r"attn\.out_proj" + _WB, _LAYER + r"self_attn.o_proj.\3"),
    (_NORMFORMER + r"norm2" + _WB, _LAYER + r"attention_output_norm.\3"),
    (_NORMFORMER + r"mlp\.0" + _WB, _LAYER + r"mlp.norm.\3"),
    (_NORMFORMER + r"mlp\.1" + _WB, _LAYER + r"mlp.fc1.\3"),
    (_NORMFORMER + r"mlp\.4" + _WB, _LAYER + r"mlp.fc2.\3"),
    # pre-norm blocks
    (_TRANSFORMER + r"attn\.gate", _LAYER + "attention_gate"),
    (_TRANSFORMER + r"attn\.module\.pre_attn_norm" + _WB, _LAYER + r"attention_norm.\3"),
    (_TRANSFORMER + r"attn\.module\.attn\.in_proj_(weight|bias)", _LAYER + r"self_attn.qkv_proj.\3"),
    (_TRANSFORMER + r"attn\.module\.attn\.out_proj" + _WB, _LAYER + r"self_attn.o_proj.\3"),
    (_TRANSFORMER + r"mlp\.gate", _LAYER + "mlp_gate"),
    (_TRANSFORMER + r"mlp\.module\.pre_mlp_norm" + _WB, _LAYER + r"mlp.norm.\3"),
    (_TRANSFORMER + r"mlp\.module\.layers\.0" + _WB, _LAYER + r"mlp.fc1.\3"),
    (_TRANSFORMER + r"mlp\.module\.layers\.3" + _WB, _LAYER + r"mlp.fc2.\3"),
    # the MLP: Linear and ReLU in turn, or one Linear
    (r"(?:model\.)?(encoder|decoder)\.(\d+)" + _WB, r"\1.layers.\2.\3"),
    (r"(?:model\.)?(encoder|decoder)" + _WB, r"\1.layers.0.\2"),
)
# functions of the reference's feature_dict, and what undoes them, to the names that OmniJetTokenizer knows
FEATURE_FUNCTIONS = {
    "log": ("exp", "log"),
    "log10": (None, "log10"),
    "log1p": ("expm1", "log1p"),
    "exp": ("log", "exp"),
    "sqrt": ("square", "sqrt"),
    "square": ("sqrt", "square"),
    "tanh": ("arctanh", "tanh"),
    "arctanh": ("tanh", "arctanh"),
    "signed_log": ("signed_exp", "signed_log"),
}
SHOWER_FEATURES = ("x", "y", "z", "energy")


def _model_settings(reference_config: dict[str, Any]) -> dict[str, Any]:
    """The part that describes the network: a training configuration has other `alpha`s and `num_heads`s too."""
    settings = find_setting(reference_config, "model_kwargs")
    return settings if isinstance(settings, dict) else reference_config


def _features(reference_config: dict[str, Any]) -> dict[str, Any] | None:
    features = find_setting(reference_config, "input_features_dict", "feature_dict")
    if features is not None and not (
        isinstance(features, dict) and all(isinstance(value, (dict, type(None))) for value in features.values())
    ):
        raise ValueError(f"configuration says feature_dict = {features!r}, expected a mapping of mappings")
    return features


def find_mapping(reference_config: dict[str, Any], name: str) -> dict[str, Any]:
    """As `find_setting`, for a mapping of settings; empty if there is none."""
    part = find_setting(reference_config, name)
    if part is None:
        return {}
    if not isinstance(part, dict):
        raise ValueError(f"configuration says {name} = {part!r}, expected a mapping")
    return part


def find_flag(reference_config: dict[str, Any], name: str) -> bool | None:
    """As `find_setting`, for true or false."""
    value = find_setting(reference_config, name)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"configuration says {name} = {value!r}, expected true or false")
    return value


def find_whole_number(reference_config: dict[str, Any], *names: str) -> int | None:
    """As `find_number`, for a whole number."""
    value = find_number(reference_config, *names)
    if value is not None and value != int(value):
        raise ValueError(f"configuration says {names[0]} = {value}, expected a whole number")
    return None if value is None else int(value)


def _num_linears(state_dict: dict[str, torch.Tensor], part: str) -> int:
    return len([name for name in state_dict if re.fullmatch(rf"{part}\.layers\.\d+\.weight", name)])


def convert_config(reference_config: dict[str, Any], state_dict: dict[str, torch.Tensor]) -> OmniJetVQVAEConfig:
    """
    Configuration of a *converted* state dict, with the published treatment of padding. Sizes come from the shapes; the
    reference's configuration adds what shapes do not tell and must not contradict them.

    Raises:
        ValueError: naming the setting that is not supported or disagrees with the checkpoint, or what is missing.
    """
    settings = _model_settings(reference_config)
    quantizer = find_mapping(settings, "vq_kwargs")
    is_mlp = not any(name.startswith("encoder.project_in.") for name in state_dict)
    first, last = ("layers.0", {}) if is_mlp else ("project_in", {"encoder": "project_out", "decoder": "project_out"})
    if is_mlp:
        # a ReLU stands between two Linears
        last = {part: f"layers.{2 * _num_linears(state_dict, part) - 2}" for part in ("encoder", "decoder")}
    needed = [f"{part}.{end}.weight" for part in ("encoder", "decoder") for end in (first, last[part])]
    needed.append("quantizer.codebook")
    if not is_mlp:
        needed += ["encoder.layers.0.self_attn.qkv_proj.weight", "encoder.layers.0.mlp.fc1.weight"]
    missing = [name for name in needed if name not in state_dict]
    if missing:
        raise ValueError(f"checkpoint lacks parameters: {', '.join(missing)}")
    check_matrices(state_dict, *needed)

    codebook_size, latent_size = state_dict["quantizer.codebook"].shape
    num_features = state_dict[f"decoder.{last['decoder']}.weight"].shape[0]
    converted: dict[str, Any] = {
        "num_features": num_features,
        "latent_size": latent_size,
        "codebook_size": codebook_size,
        "exclude_padding": False,
        "revival_inverts_affine": False,
        "kmeans_init": "quantizer.data_initialized" in state_dict,
    }
    checks = {"num_codes": codebook_size, "latent_dim": latent_size, "input_dim": num_features}
    if is_mlp:
        converted["architecture"] = "mlp"
        for part in ("encoder", "decoder"):
            names = [f"{part}.layers.{2 * index}.weight" for index in range(_num_linears(state_dict, part))]
            missing = [name for name in names if name not in state_dict]
            if missing:
                raise ValueError(f"checkpoint lacks parameters: {', '.join(missing)}")
            converted[f"{part}_layer_sizes"] = [state_dict[name].shape[0] for name in names[:-1]]
    else:
        converted.update(_transformer_settings(settings, state_dict, num_features))
        checks["hidden_dim"] = converted["hidden_size"]
        checks["num_blocks"] = converted["num_hidden_layers"]
        checks["conditional_dim"] = converted["num_jet_features"]
    for name, value in checks.items():
        said = find_setting(settings, name)
        if said is not None and said != value:
            raise ValueError(f"configuration says {name} = {said}, but the checkpoint has {value}")

    for name, supported in (("norm", (None, "none")), ("cb_norm", (None, "none")), ("groups", (None, 1))):
        if quantizer.get(name) not in supported:
            raise ValueError(f"configuration says {name} = {quantizer[name]!r}, which is not supported")
    affine_lr = find_number(quantizer, "affine_lr")
    if "quantizer.affine_scale" in state_dict:
        # the checkpoint does not hold it, and all codes depend on it
        if not affine_lr or affine_lr < 0:
            raise ValueError("the checkpoint has an affine codebook, and the configuration has no vq_kwargs.affine_lr")
        converted["affine_lr"] = affine_lr
    elif affine_lr:
        raise ValueError(f"configuration says affine_lr = {affine_lr:g}, but the checkpoint has no affine codebook")
    else:
        converted["affine_lr"] = 0.0
    replace_freq = find_whole_number(quantizer, "replace_freq") or 0
    if ("quantizer.counts" in state_dict) != (replace_freq > 0):
        raise ValueError(
            f"configuration says replace_freq = {replace_freq}, but the checkpoint has "
            f"{'counts' if replace_freq == 0 else 'no counts'} of unused codes"
        )
    converted["replace_freq"] = replace_freq
    for name, source, place in (
        ("beta", "beta", quantizer),
        ("sync_nu", "sync_nu", quantizer),
        ("vq_loss_weight", "alpha", settings),
    ):
        value = find_number(place, source)
        if value is not None:
            converted[name] = value
    features = _features(reference_config) or {}
    is_sum = converted["architecture"] == "transformer" or any(name in SHOWER_FEATURES for name in features)
    converted["reconstruction_loss"] = "sum_over_features" if is_sum else "mean"
    try:
        return OmniJetVQVAEConfig(**converted)
    except StrictDataclassError as error:
        raise ValueError(str(error.__cause__ or error)) from None


def _transformer_settings(
    settings: dict[str, Any], state_dict: dict[str, torch.Tensor], num_features: int
) -> dict[str, Any]:
    hidden_size, in_features = state_dict["encoder.project_in.weight"].shape
    layers = {
        part: {int(match[1]) for name in state_dict if (match := re.match(rf"{part}\.layers\.(\d+)\.", name))}
        for part in ("encoder", "decoder")
    }
    num_layers = len(layers["encoder"])
    for part, found in layers.items():
        if found != set(range(num_layers)):
            raise ValueError(f"checkpoint has the {part} blocks {sorted(found)}, expected 0 to {num_layers - 1}")
    num_heads = find_number(settings, "num_heads")
    if num_heads is None:
        num_heads = OmniJetVQVAEConfig().num_attention_heads
    if num_heads < 1 or num_heads % 1 or hidden_size % num_heads:
        raise ValueError(
            f"configuration says num_heads = {num_heads:g}, but the checkpoint has a width of {hidden_size}"
        )
    converted: dict[str, Any] = {
        "architecture": "normformer",
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": int(num_heads),
        "intermediate_size": state_dict["encoder.layers.0.mlp.fc1.weight"].shape[0],
        "num_jet_features": in_features - num_features,
    }
    if "encoder.layers.0.attention_output_norm.weight" in state_dict:
        return converted
    converted["architecture"] = "transformer"
    converted["causal_decoder"] = find_flag(settings, "causal_decoder") is True
    gate = state_dict.get("encoder.layers.0.attention_gate")
    if gate is None:
        converted["residual_gate"] = "constant"
    else:
        converted["residual_gate"] = "local" if gate.ndim == 1 else "global"
    value = find_number(find_mapping(settings, "residual_cfg"), "init_value")
    if value is not None:
        converted["residual_gate_value"] = value
    attention, mlp = find_mapping(settings, "attn_cfg"), find_mapping(settings, "mlp_cfg")
    for block, block_settings in (("attn_cfg", attention), ("mlp_cfg", mlp)):
        for name, supported in (("norm_before", True), ("norm_after", False), ("norm_between", False)):
            said = block_settings.get(name)
            if said is not None and said != supported:
                raise ValueError(f"configuration says {block}.{name} = {said!r}, which is not supported")
    for name, block_settings in (("attention_dropout", attention), ("hidden_dropout", mlp)):
        value = find_number(block_settings, "dropout_rate")
        if value is not None:
            converted[name] = value
    activation = mlp.get("activation")
    if activation is not None:
        converted["hidden_act"] = str(activation).lower()
        if converted["hidden_act"] not in ("gelu", "relu", "silu"):
            raise ValueError(f"configuration says mlp_cfg.activation = {activation!r}, expected GELU, ReLU or SiLU")
    return converted


def convert_features(reference_config: dict[str, Any]) -> dict[str, dict[str, Any]] | None:
    """
    The reference's feature_dict as `OmniJetTokenizer(features=...)` takes it; `None` if the configuration has none.

    Raises:
        ValueError: naming a function that is not known or a setting that is not supported.
    """
    features = _features(reference_config)
    if features is None:
        return None
    is_newer = find_setting(reference_config, "input_features_dict") is not None
    converted = {}
    for feature, said in features.items():
        settings = dict(said or {})
        where = f"configuration says feature_dict.{feature}"
        result: dict[str, Any] = {}
        function, inverse = settings.pop("func", None), settings.pop("inv_func", None)
        if function is not None:
            function = str(function).removeprefix("np.").removeprefix("numpy.")
            if function not in FEATURE_FUNCTIONS:
                raise ValueError(f"{where}.func = {function!r}, expected one of {', '.join(FEATURE_FUNCTIONS)}")
            expected, name = FEATURE_FUNCTIONS[function]
            inverse = str(inverse).removeprefix("np.").removeprefix("numpy.")
            if expected is not None and inverse != expected:
                raise ValueError(f"{where}.inv_func = {inverse!r}, expected {expected!r}, which undoes {function!r}")
            result["function"] = name
        elif inverse is not None:
            raise ValueError(f"{where}.inv_func = {inverse!r} without func")
        binning = settings.pop("binning", None)
        if binning is not None:
            if not isinstance(binning, (list, tuple)):
                raise ValueError(f"{where}.binning = {binning!r}, expected (first edge, last edge, number of edges)")
            result["binning"] = list(binning)
        for name in ("larger_than", "smaller_than"):
            value = find_number(settings, name)
            settings.pop(name, None)
            if value is not None:
                result[name] = value
        shift, factor = find_number(settings, "subtract_by"), find_number(settings, "multiply_by")
        result["subtract"] = 0.0 if shift is None else shift
        result["multiply"] = 1.0 if factor is None else factor
        for name in ("subtract_by", "multiply_by"):
            settings.pop(name, None)
        result.update(_clips(settings, result, is_newer))
        unknown = sorted(str(name) for name, value in settings.items() if value is not None)
        if unknown:
            raise ValueError(f"{where}.{', '.join(unknown)}, which is not supported")
        converted[feature] = result
    threshold = find_number(reference_config, "energy_threshold")
    if threshold is not None and "energy" in converted:
        converted["energy"]["larger_than"] = max(threshold, converted["energy"].get("larger_than", threshold))
    return converted


def _clips(settings: dict[str, Any], result: dict[str, Any], is_newer: bool) -> dict[str, list]:
    """
    Limits of the value and of the transformed value. OmniJet-alpha's `clip_min`, `clip_max` act before the shift and
    the factor, the same names of arXiv:2512.04149 after them.
    """
    clips: dict[str, list] = {}
    low, high = (find_number(settings, f"clip_{side}_input_space") for side in ("min", "max"))
    if low is not None or high is not None:
        clips["clip_input"] = [low, high]
    low, high = (find_number(settings, f"clip_{side}_preproc_space", f"clip_{side}") for side in ("min", "max"))
    is_older = not is_newer and not any(f"clip_{side}_preproc_space" in settings for side in ("min", "max"))
    if is_older:
        low, high = (
            None if value is None else (value - result["subtract"]) * result["multiply"] for value in (low, high)
        )
        if result["multiply"] < 0:
            low, high = high, low
    if low is not None or high is not None:
        clips["clip_output"] = [low, high]
    for side in ("min", "max"):
        for name in (f"clip_{side}", f"clip_{side}_input_space", f"clip_{side}_preproc_space"):
            settings.pop(name, None)
    return clips
