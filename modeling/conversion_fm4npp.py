"""Parameter names and configuration of the FM4NPP reference (arXiv:2508.14087) to ours, and the card of the result."""

import re
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from .configuration_fm4npp import Fm4nppConfig
from .conversion_common import Patterns, check_matrices, convert_state_dict, find_number, find_setting, strip_prefixes

_WB = r"\.(weight|bias)"
_LAYER = r"mamba_layers\.(\d+)"

# name in the reference -> name here
BACKBONE_PATTERNS: Patterns = (
    (r"embedder\.proj", "model.embedder.energy_projection"),
    (r"embedder\.embed\.projection", "model.embedder.position_projection"),
    (r"embedder\.proj2", "model.embedder.output_projection"),
    (_LAYER + r"\.0\.weight", r"model.layers.\1.norm.weight"),
    (_LAYER + r"\.1\.(in_proj|x_proj|out_proj|norm|lin_B|lin_C)\.weight", r"model.layers.\1.mixer.\2.weight"),
    (_LAYER + r"\.1\.(conv1d|dt_proj)" + _WB, r"model.layers.\1.mixer.\2.\3"),
    (_LAYER + r"\.1\.(A_log|D|dt_bias)", r"model.layers.\1.mixer.\2"),
    (r"norm\.weight", "model.norm_f.weight"),
    (r"output_layer" + _WB, r"neighbor_head.\1"),
)


def _mlp(pattern: str, name: str) -> Patterns:
    """Norm, linear, GELU, dropout, linear, with and without a module around them."""
    parts = ((0, "norm"), (1, "fc1"), (4, "fc2"))
    return tuple((rf"{pattern}\.(?:model\.)?{index}{_WB}", rf"{name}.{part}.\1") for index, part in parts)


def _feed_forward(pattern: str, name: str, group: int) -> Patterns:
    return tuple(
        (rf"{pattern}\.{part}{_WB}", rf"{name}.{new}.\{group}")
        for part, new in ((r"norm", "norm"), (r"ffn\.0", "fc1"), (r"ffn\.2", "fc2"))
    )


def _attention(pattern: str, name: str) -> Patterns:
    """With the layer as first group; queries, keys and values are still one matrix."""
    return (
        (pattern + r"\.attn\.in_proj_(weight|bias)", name + r".qkv_proj.\2"),
        (pattern + r"\.attn\.out_proj" + _WB, name + r".o_proj.\2"),
    )


_REFINEMENT = r"refinement_layers\.(\d+)"
HEAD_PATTERNS: Patterns = (
    (r"weighted_avg_weights", "head.reader.layer_weights"),
    (r"input_proj\.0" + _WB, r"head.reader.norm.\1"),
    (r"input_proj\.1" + _WB, r"head.reader.projection.\1"),
    (r"norm\.weight", "head.norm.weight"),
    (r"prototype_embed\.weight", "head.prototypes.weight"),
    (r"pos_emb_embed\.weight", "head.positions.weight"),
    *_feed_forward(r"output_layer", "head.point_network", 1),
    *_mlp(r"output_layer", "head.point_network"),
    *_attention(_REFINEMENT + r"\.cross_attn", r"head.layers.\1.cross_attn"),
    *_attention(_REFINEMENT + r"\.self_attn", r"head.layers.\1.self_attn"),
    (_REFINEMENT + r"\.(cross|self)_attn\.norm" + _WB, r"head.layers.\1.\2_norm.\3"),
    *_feed_forward(_REFINEMENT + r"\.ffn", r"head.layers.\1.feed_forward", 2),
    *(
        pattern
        for name in ("class", "mask", "pid", "track", "noise")
        for pattern in _mlp(f"{name}_mlp", f"head.{name}_mlp")
    ),
    *_attention(r"SA_layers\.(\d+)", r"head.layers.\1.attn"),
    (r"SA_layers\.(\d+)\.norm" + _WB, r"head.layers.\1.norm.\2"),
    *_mlp(r"out_mlp", "head.mlp"),
)
# saved with every head, used by none that reads a backbone
UNUSED_IN_HEADS = re.compile(r"embedder\..+|embedder_norm\.weight")

PID_CLASSES = ("other", "pion", "kaon", "proton", "electron")
NOISE_CLASSES = ("signal", "noise")
# constants of the published losses and heads, which are not options here
CONSTANTS = {"dice_eps": 1e-6, "log_eps": 1e-6, "attn_mask_eps": 1e-6, "no_object_class": 0}
FOCAL_CONSTANTS = {"alpha": 0.25, "gamma": 2}
# width, layers and state of the files, whose numbers are not those of the paper
RELEASED_FILES = {"m3": "pp_nerf_m1", "m4": "pp_nerf_m3", "m5": "pp_nerf_m4", "m6": "pp_nerf_m5"}


def split_heads(state_dict: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """
    The heads in a state dict, by the prefix of their names: one with the name "" in a checkpoint of training, none in
    that of a backbone.
    """
    names = {name: strip_prefixes(name) for name in state_dict}
    suffix = "weighted_avg_weights"
    prefixes = {name.removesuffix(suffix) for name in names.values() if name.endswith(suffix)}
    if not prefixes:
        return {}
    odd = [prefix for prefix in prefixes if not re.fullmatch(r"(\w+\.)?", prefix)]
    if odd:
        raise ValueError(f"checkpoint has a head under the name {odd[0]!a}, expected one word")
    heads: dict[str, dict[str, torch.Tensor]] = {prefix.rstrip("."): {} for prefix in sorted(prefixes)}
    left, repeated = [], []
    for name, stripped in names.items():
        prefix = "" if "" in prefixes else stripped.partition(".")[0] + "."
        if prefix not in prefixes:
            left.append(name)
        elif stripped.removeprefix(prefix) in heads[prefix.rstrip(".")]:
            repeated.append(name)
        else:
            heads[prefix.rstrip(".")][stripped.removeprefix(prefix)] = state_dict[name]
    if left:
        raise ValueError(f"checkpoint has parameters that belong to no head: {', '.join(sorted(left))}")
    if repeated:
        raise ValueError(f"checkpoint has parameters twice, with and without prefix: {', '.join(sorted(repeated))}")
    return heads


def convert_parameters(state_dict: dict[str, torch.Tensor], is_head: bool) -> dict[str, torch.Tensor]:
    """
    Parameters of a backbone or a head under their names here; the inputs of Mamba-2 become one matrix, those of the
    attentions three. What heads hold without using it (`UNUSED_IN_HEADS`) is left out.
    """
    if is_head:
        state_dict = {name: value for name, value in state_dict.items() if not UNUSED_IN_HEADS.fullmatch(name)}
    converted = convert_state_dict(state_dict, HEAD_PATTERNS if is_head else BACKBONE_PATTERNS)
    for name in list(converted):
        if ".qkv_proj." in name:
            packed = converted.pop(name)
            if packed.ndim == 0 or len(packed) == 0 or len(packed) % 3:
                raise ValueError(f"{name} has shape {tuple(packed.shape)}, expected queries, keys and values")
            for part, tensor in zip("qkv", packed.chunk(3)):
                converted[name.replace("qkv_proj", f"{part}_proj")] = tensor
        elif name.endswith("mixer.lin_B.weight"):
            mixer = name.removesuffix("lin_B.weight")
            inputs = [mixer + part for part in ("in_proj.weight", "lin_B.weight", "lin_C.weight")]
            check_present(converted, *inputs, mixer + "dt_bias")
            check_matrices(converted, *inputs)
            zx_step, B, C = (converted[part] for part in inputs)
            num_heads = converted[mixer + "dt_bias"].numel()
            if not zx_step.shape[1] == B.shape[1] == C.shape[1] or len(zx_step) <= num_heads:
                shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (zx_step, B, C))
                raise ValueError(f"in_proj, lin_B and lin_C of {mixer.rstrip('.')} have the shapes {shapes}")
            # gate and x, B, C, step
            zx, step = zx_step.split([len(zx_step) - num_heads, num_heads])
            converted[inputs[0]] = torch.cat([zx, B, C, step])
            del converted[inputs[1]], converted[inputs[2]]
    return converted


def check_present(state_dict: dict[str, torch.Tensor], *names: str):
    missing = [name for name in names if name not in state_dict]
    if missing:
        raise ValueError(f"checkpoint lacks parameters: {', '.join(missing)}")


def sizes_of(state_dict: dict[str, torch.Tensor], name: str) -> tuple[int, int]:
    """Rows and columns of a matrix that the checkpoint must have."""
    check_present(state_dict, name)
    check_matrices(state_dict, name)
    return tuple(state_dict[name].shape)


def count_layers(state_dict: dict[str, torch.Tensor], prefix: str) -> int:
    """Number of the layers `prefix.0.` to `prefix.n.`."""
    matches = (re.match(re.escape(prefix) + r"\.(\d+)\.", name) for name in state_dict)
    layers = {int(match.group(1)) for match in matches if match}
    if layers != set(range(len(layers))):
        raise ValueError(f"checkpoint has the layers {sorted(layers)} of {prefix}, expected 0 to {len(layers) - 1}")
    return len(layers)


def check_agreement(reference_config: dict[str, Any], sizes: dict[str, Any]):
    """The configuration may leave out what the checkpoint tells, but not contradict it."""
    for name, value in sizes.items():
        said = find_setting(reference_config, name)
        # a mapping is a section of that name
        if said is not None and not isinstance(said, dict) and said != value:
            raise ValueError(f"configuration says {name} = {said!r}, but the checkpoint has {value!r}")


def find_flag(reference_config: dict[str, Any], name: str) -> bool:
    """As `find_setting`, for a switch that is off by default."""
    value = find_setting(reference_config, name)
    if value not in (None, False, True):
        raise ValueError(f"configuration says {name} = {value!r}, expected true or false")
    return bool(value)


def make_config(settings: dict[str, Any]) -> Fm4nppConfig:
    try:
        return Fm4nppConfig(**{name: value for name, value in settings.items() if value is not None})
    except StrictDataclassError as error:
        raise ValueError(str(error.__cause__ or error)) from None


def convert_backbone_config(reference_config: dict[str, Any], state_dict: dict[str, torch.Tensor]) -> Fm4nppConfig:
    """
    Configuration of a *converted* pre-training checkpoint: sizes from the shapes, the rest from the reference's file.

    Raises:
        ValueError: naming the parameter that is missing, or the setting that disagrees with the checkpoint.
    """
    mixer = "model.layers.0.mixer."
    hidden_size, inner_size = sizes_of(state_dict, mixer + "out_proj.weight")
    check_present(state_dict, mixer + "conv1d.weight", mixer + "A_log")
    conv_weight, A_log = state_dict[mixer + "conv1d.weight"], state_dict[mixer + "A_log"]
    if conv_weight.ndim != 3 or A_log.numel() == 0:
        raise ValueError(
            f"conv1d.weight and A_log have the shapes {tuple(conv_weight.shape)} and {tuple(A_log.shape)}, expected "
            f"(channels, 1, d_conv) and the rates of the channels or heads"
        )
    is_mamba1 = mixer + "x_proj.weight" in state_dict
    settings: dict[str, Any] = {
        "ssm": "mamba1" if is_mamba1 else "mamba2",
        "hidden_size": hidden_size,
        "num_hidden_layers": count_layers(state_dict, "model.layers"),
        "conv_kernel": conv_weight.shape[2],
        "expand": inner_size // hidden_size,
        "num_neighbors": sizes_of(state_dict, "neighbor_head.weight")[0] // 3,
        "zero_initial_biases": True,
    }
    if is_mamba1:
        settings["state_size"] = sizes_of(state_dict, mixer + "A_log")[1]
        settings["time_step_rank"] = sizes_of(state_dict, mixer + "dt_proj.weight")[1]
    else:
        settings["state_size"] = (conv_weight.shape[0] - inner_size) // 2
        settings["head_dim"] = inner_size // A_log.numel()
    settings.update(_embedding_settings(reference_config, state_dict))
    check_agreement(
        reference_config,
        {
            "embed_dim": hidden_size,
            "num_layers": settings["num_hidden_layers"],
            "d_state": settings["state_size"],
            "d_conv": settings["conv_kernel"],
            "expand": settings["expand"],
            "klen": settings["num_neighbors"],
            "mambaversion": settings["ssm"],
        },
    )
    settings["hidden_dropout"] = find_number(reference_config, "dropout")
    settings["layer_norm_eps"] = find_number(reference_config, "rms_eps")
    settings["loss_scale"] = find_number(reference_config, "ablate_loss_scale")
    settings["loss_reweight"] = find_setting(reference_config, "loss_reweight")
    settings["loss_bin_edges"] = find_setting(reference_config, "loss_bin")
    settings["loss_bin_weights"] = find_setting(reference_config, "loss_weight")
    if find_flag(reference_config, "rep_aaai"):
        settings["label_shift"] = 2 if find_flag(reference_config, "nexttoken") else 1
    return make_config(settings)


def _embedding_settings(reference_config: dict[str, Any], state_dict: dict[str, torch.Tensor]) -> dict[str, str]:
    """How energy and position are embedded: told by the projections, except that `cpe` has none."""
    method = "concat" if "model.embedder.output_projection" in state_dict else "add"
    projection = state_dict.get("model.embedder.position_projection")
    rows = 0 if projection is None else sizes_of(state_dict, "model.embedder.position_projection")[0]
    encodings = {63: "nerf", 75: "ff", 3: "none", 0: "cpe"}
    if rows not in encodings:
        raise ValueError(f"embedder.embed.projection has {rows} rows, expected 63 (nerf), 75 (ff) or 3 (none)")
    said = find_setting(reference_config, "embed_method")
    if said not in (None, method) and (said, method) != ("additive", "add"):
        raise ValueError(f"configuration says embed_method = {said!r}, but the checkpoint has {method!r}")
    check_agreement(reference_config, {"pe_method": encodings[rows]})
    return {"embedding_method": method, "position_encoding": encodings[rows]}


def architecture_of(state_dict: dict[str, torch.Tensor]) -> str:
    """Class that a *converted* state dict belongs to."""
    if any(name.startswith(("head.prototypes.", "head.mask_mlp.")) for name in state_dict):
        return "Fm4nppForTrackFinding"
    return "Fm4nppForTokenClassification" if "head.mlp.fc2.weight" in state_dict else "Fm4nppForPreTraining"


def convert_head_config(
    reference_config: dict[str, Any], state_dict: dict[str, torch.Tensor], backbone: Fm4nppConfig | None = None
) -> Fm4nppConfig:
    """
    Configuration of a *converted* head, with the published matching and initialisation.

    Args:
        backbone: configuration of the backbone that the head belongs to, by default none.

    Raises:
        ValueError: naming the parameter that is missing, or the setting that disagrees with the checkpoint or backbone.
    """
    is_track = architecture_of(state_dict) == "Fm4nppForTrackFinding"
    check_present(state_dict, "head.reader.layer_weights")
    head_size, hidden_size = sizes_of(state_dict, "head.reader.projection.weight")
    num_layers = state_dict["head.reader.layer_weights"].numel()
    num_head_layers = count_layers(state_dict, "head.layers")
    epsilons = [find_number(reference_config, name) for name in ("layer_norm_eps", "rms_eps")]
    if None not in epsilons and epsilons[0] != epsilons[1]:
        raise ValueError(f"configuration says layer_norm_eps = {epsilons[0]} and rms_eps = {epsilons[1]}, expected one")
    heads = find_number(reference_config, "heads", "num_heads", "n_heads")
    if heads is not None and heads != int(heads):
        raise ValueError(f"configuration says heads = {heads:g}, expected an integer")
    settings: dict[str, Any] = {
        "head_size": head_size,
        "head_attention_heads": 4 if heads is None else int(heads),
        "zero_initial_biases": True,
        "layer_norm_eps": epsilons[1] if epsilons[0] is None else epsilons[0],
    }
    checks = {"input_dim": hidden_size, "num_feature_layers": num_layers}
    if is_track:
        settings["num_prototypes"] = sizes_of(state_dict, "head.prototypes.weight")[0]
        settings["num_refinement_layers"] = num_head_layers
        settings["joint_head"] = "head.pid_mlp.fc2.weight" in state_dict
        settings["match_padding"] = True
        feed_forwards = [f"head.layers.{layer}.feed_forward.fc1.weight" for layer in range(num_head_layers)]
        if settings["joint_head"]:
            settings["num_pid_classes"] = sizes_of(state_dict, "head.pid_mlp.fc2.weight")[0] - 1
        else:
            feed_forwards.append("head.point_network.fc1.weight")
        if feed_forwards:
            settings["head_intermediate_size"] = checks["ffn"] = sizes_of(state_dict, feed_forwards[0])[0]
        checks |= {"n_proto": settings["num_prototypes"], "n_ref": num_head_layers}
        for name, source in {
            "match_class_cost": "cost_class",
            "match_dice_cost": "cost_dice",
            "match_focal_cost": "cost_focal",
            "matched_class_weight": "loss_matched_ce",
            "unmatched_class_weight": "loss_unmatched_ce",
            "dice_weight": "loss_dice",
            "focal_weight": "loss_focal",
        }.items():
            settings[name] = find_number(reference_config, source)
    else:
        num_labels = sizes_of(state_dict, "head.mlp.fc2.weight")[0]
        names = {len(classes): classes for classes in (PID_CLASSES, NOISE_CLASSES)}.get(num_labels)
        labels = names or [f"LABEL_{index}" for index in range(num_labels)]
        settings["id2label"] = dict(enumerate(labels))
        settings["label2id"] = {label: index for index, label in enumerate(labels)}
        settings["num_attention_layers"] = num_head_layers
        settings["published_attention_init"] = True
    check_agreement(reference_config, {**checks, **CONSTANTS})
    focal = find_setting(reference_config, "focal")
    check_agreement(focal if isinstance(focal, dict) else {}, FOCAL_CONSTANTS)
    if backbone is None:
        # of the operator nothing is known, and nothing is made; Mamba-1 takes any width
        settings |= {"use_backbone": False, "ssm": "mamba1"}
        settings |= {"hidden_size": hidden_size, "num_hidden_layers": num_layers}
        return make_config(settings)
    if (hidden_size, num_layers) != (backbone.hidden_size, backbone.num_hidden_layers):
        raise ValueError(
            f"the head reads {num_layers} blocks of width {hidden_size}, but the backbone has "
            f"{backbone.num_hidden_layers} of width {backbone.hidden_size}"
        )
    kept = {name: value for name, value in backbone.to_diff_dict().items() if name not in ("architectures", "auto_map")}
    return make_config({**kept, **settings})


def model_card(model, checkpoint: str) -> str:
    """
    Text of the `README.md` of a converted model: what it is, and what the paper calls its size.

    Args:
        checkpoint: name of the file that it was converted from.
    """
    config = model.config
    lines = ["---", "library_name: transformers", "tags:", "- physics", "- state-space model", "---", ""]
    lines += [f"# FM4NPP, {type(model).__name__}", "", f"Converted from `{checkpoint}` of arXiv:2508.14087.", ""]
    lines += [f"- parameters that are trained: {model.num_parameters():,}"]
    if config.use_backbone:
        size = (
            f"{config.num_hidden_layers} {config.ssm} blocks of width {config.hidden_size}, state {config.state_size}"
        )
        lines.append(f"- size: {size}" + (f", **{config.paper_size}** of the paper" if config.paper_size else ""))
        if config.paper_size in RELEASED_FILES:
            lines.append(
                f"- the file of this size is called `{RELEASED_FILES[config.paper_size]}`: not the paper's number"
            )
    else:
        lines.append("- reads the block outputs of a backbone, which is not part of it")
    lines += [
        "- points: (E, eta, phi, r) as `Fm4nppFeatureExtractor` makes them; its bin edges are not in the checkpoint",
        "- runs without mamba-ssm and causal-conv1d, and computes the same with them",
        "",
    ]
    return "\n".join(lines)
