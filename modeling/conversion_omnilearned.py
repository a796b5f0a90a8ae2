"""
Names and configuration of the published OmniLearned checkpoints (arXiv:2510.24066) and of the pre-training study
(arXiv:2606.14870) to ours. Every published switch is set.
"""

import re
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from .configuration_omnilearned import PAPER_SIZES, OmniLearnedConfig
from .conversion_common import check_matrices, find_number, find_setting

_WB = r"\.(weight|bias)"
_BODY, _HEAD = r"(?:model\.)?body\.", r"(?:model\.)?"
_MLP = r"\.(fc1\.(?:weight|bias)|fc2\.(?:weight|bias)|norm\.(?:alpha|weight))"


def _block(prefix: str, name: str) -> tuple[tuple[str, str], ...]:
    """The parameters of an attention block; the first group of `prefix` is the index of the block."""
    return (
        (prefix + r"\.(norm[12]?)\.(alpha|weight)", name + r".\1.\2.\3"),
        (prefix + r"\.attn\.in_proj_weight", name + r".\1.self_attn.qkv_proj.weight"),
        (prefix + r"\.attn\.out_proj\.weight", name + r".\1.self_attn.o_proj.weight"),
        (prefix + r"\.mlp" + _MLP, name + r".\1.mlp.\2"),
    )


# name in the reference -> name here, tried in this order; Lightning puts `model.` before all names
KEY_PATTERNS = (
    (_BODY + "token", "model.tokens"),
    (_BODY + r"embed\.norm\.(alpha|weight)", r"model.embed_particles.norm.\1"),
    (_BODY + r"embed\.mlp" + _MLP, r"model.embed_particles.mlp.\1"),
    (_BODY + r"interaction\.mlp" + _MLP, r"model.interaction.mlp.\1"),
    (_BODY + r"local_physics\.mlp" + _MLP, r"model.local_embedding.mlp.\1"),
    *_block(_BODY + r"local_physics\.in_blocks\.(\d+)", "model.local_embedding.layers"),
    *_block(_BODY + r"in_blocks\.(\d+)", "model.layers"),
    *_block(_BODY + r"out_blocks\.(\d+)", "model.skip_layers"),
    (_BODY + r"out_blocks\.(\d+)\.skip_linear" + _WB, r"model.skip_layers.\1.skip_proj.\2"),
    (_BODY + r"cond_embed\.0" + _MLP, r"model.embed_conditions.\1"),
    (_BODY + r"MPFourier\.freqs", "model.embed_time.fc1.frequencies"),
    (_BODY + r"MPFourier\.phases", "model.embed_time.fc1.phases"),
    (_BODY + r"time_embed" + _MLP, r"model.embed_time.\1"),
    (_BODY + r"add_embed\.0" + _MLP, r"model.embed_additional.\1"),
    (_BODY + r"pid_embed\.0\.weight", "model.embed_particle_ids.weight"),
    (_BODY + r"norm\.(alpha|weight)", r"model.norm.\1"),
    *_block(_HEAD + r"classifier\.in_blocks\.(\d+)", "classifier.layers"),
    (_HEAD + r"classifier\.fc" + _MLP, r"classifier.mlp.\1"),
    (_HEAD + r"classifier\.out" + _WB, r"classifier.out.\1"),
    (_HEAD + r"generator\.pid_embed\.0\.weight", "generator.embed_labels.weight"),
    (_HEAD + r"generator\.pid_embed\.1" + _MLP, r"generator.label_mlp.\1"),
    *_block(_HEAD + r"generator\.in_blocks\.(\d+)", "generator.layers"),
    (_HEAD + r"generator\.fc\.0" + _MLP, r"generator.mlp.\1"),
    (_HEAD + r"generator\.out" + _WB, r"generator.out.\1"),
    (_HEAD + "mask_embeddings", "masked_vectors"),
    *_block(_HEAD + r"mpm_head\.blocks\.(\d+)", "masked_head.layers"),
    (_HEAD + r"mpm_head\.out_continuous" + _WB, r"masked_head.out.\1"),
    (_HEAD + r"mpm_head\.out_pid" + _WB, r"masked_head.out_types.\1"),
    # the generator of single numbers per jet
    (_HEAD + "embed" + _MLP, r"embed_jets.\1"),
    (_HEAD + "cond" + _MLP, r"embed_conditions.\1"),
    (_HEAD + r"MPFourier\.freqs", "embed_time.fc1.frequencies"),
    (_HEAD + r"MPFourier\.phases", "embed_time.fc1.phases"),
    (_HEAD + "time_embed" + _MLP, r"embed_time.\1"),
    (_HEAD + r"in_blocks\.(\d+)" + _MLP, r"layers.\1.\2"),
    (_HEAD + "out" + _WB, r"out.\1"),
)
# parts of a published training checkpoint -> what stands in front of their names in the network
CHECKPOINT_PARTS = {"body": "body.", "classifier_head": "classifier.", "generator_head": "generator.", "model": ""}
AVERAGED = "average."  # marks the averaged weights, which the published sampling uses; there are none of the classifier
AVERAGED_PARTS = {
    "ema_body": f"{AVERAGED}body.",
    "ema_generator": f"{AVERAGED}generator.",
    "ema_model": AVERAGED,
}
# modes of the reference -> heads
MODES = {
    "classifier": ("classifier",),
    "regression": ("classifier",),
    "generator": ("generator",),
    "segmentation": ("generator",),
    "ftag": ("classifier", "generator"),
    "mpm": ("masked_head",),
    "classifier+generator": ("classifier", "generator"),
    "classifier+mpm": ("classifier", "masked_head"),
    "generator+mpm": ("generator", "masked_head"),
}
OBJECTIVE_OF_HEAD = {"classifier": "classification", "generator": "generation", "masked_head": "masked"}
MASKED_POSITIONS = {
    "sort_descending_in_masked_subset": "rank_among_masked",
    "sort_descending_all": "rank",
    None: "position",
}
# noise of the generator of single numbers per jet, by how many of them: release 0.2.0, and before
JET_NOISE = {
    4: ((6.40028, 5.0057, 0.4544, 0.6861), (0.16999, 0.318289, 0.139043, 0.193016)),
    3: ((6.40028, 5.0057, 0.6861), (0.16999, 0.318289, 0.193016)),
}
PUBLISHED_STEPS = 127  # midpoint, 128 points in time
JET_CLASSES = 200  # of the published pre-training; what follows are classes of events


def heads_of(state_dict: dict[str, torch.Tensor]) -> list[str]:
    return [head for head in OBJECTIVE_OF_HEAD if any(name.startswith(f"{head}.") for name in state_dict)]


def architecture_of(state_dict: dict[str, torch.Tensor]) -> str:
    """Name of the model class of a *converted* state dict."""
    if "embed_jets.fc1.weight" in state_dict:
        return "OmniLearnedForJetGeneration"
    heads = heads_of(state_dict)
    has_time = "model.embed_time.fc1.frequencies" in state_dict
    if not heads:
        return "OmniLearnedModel"
    if heads == ["classifier"]:
        return "OmniLearnedForSequenceClassification"
    if heads == ["generator"]:
        return "OmniLearnedForGeneration" if has_time else "OmniLearnedForTokenClassification"
    if "masked_head" in heads or has_time:
        return "OmniLearnedForPreTraining"
    return "OmniLearnedForTokenClassification"


def _num_blocks(state_dict: dict[str, torch.Tensor], prefix: str, name: str = "layers") -> int:
    pattern = re.compile(re.escape(prefix) + rf"\.{name}\.(\d+)\.")
    blocks = {int(match.group(1)) for name in state_dict if (match := pattern.match(name))}
    if blocks != set(range(len(blocks))):
        raise ValueError(f"checkpoint has the blocks {sorted(blocks)} of {prefix}, expected 0 to {len(blocks) - 1}")
    return len(blocks)


def convert_config(reference_config: dict[str, Any], state_dict: dict[str, torch.Tensor]) -> OmniLearnedConfig:
    """
    Configuration of a *converted* state dict. Sizes come from the shapes; the reference's configuration adds what
    shapes do not tell (heads without interactions, neighbours, coordinates) and must not contradict them.

    Raises:
        ValueError: naming the setting that is not supported or disagrees with the checkpoint, or what is missing.
    """
    if architecture_of(state_dict) == "OmniLearnedForJetGeneration":
        return _jet_generator_config(reference_config, state_dict)
    options = find_setting(reference_config, "kwargs")
    options = options if isinstance(options, dict) else reference_config

    def find(name: str) -> Any:
        return find_setting(reference_config, name)

    if find("int_type") not in (None, "lhc"):
        raise ValueError(f"configuration says int_type = {find('int_type')!r}, expected 'lhc'")
    heads = heads_of(state_dict)
    outputs = {head: f"{head}.out.weight" for head in heads}
    needed = ["model.embed_particles.mlp.fc1.weight", "model.local_embedding.mlp.fc1.weight", *outputs.values()]
    needed += ["masked_vectors"] if "masked_head" in heads else []
    missing = [
        name for name in ("model.tokens", "model.embed_particles.norm.weight", *needed) if name not in state_dict
    ]
    if missing:
        raise ValueError(f"checkpoint lacks parameters: {', '.join(missing)}")
    optional = (
        "model.interaction.mlp.fc2.weight",
        "model.embed_particle_ids.weight",
        "model.embed_additional.fc1.weight",
        "model.embed_conditions.fc1.weight",
        "generator.embed_labels.weight",
    )
    check_matrices(state_dict, *needed, *(name for name in optional if name in state_dict))
    if state_dict["model.tokens"].ndim != 3 or state_dict["model.tokens"].numel() == 0:
        raise ValueError(f"body.token has shape {tuple(state_dict['model.tokens'].shape)}, expected (1, tokens, width)")

    def size(name: str, dimension: int) -> int:
        return state_dict[name].shape[dimension] if name in state_dict else 0

    hidden_size = size("model.tokens", 2)
    num_features = size("model.embed_particles.norm.weight", 0)
    local_features = size("model.local_embedding.mlp.fc1.weight", 1)
    if local_features not in (num_features, num_features + 3):
        raise ValueError(
            f"the neighbours have {local_features} features, expected {num_features}, or 3 more with pair features"
        )
    use_interaction = "model.interaction.mlp.fc2.weight" in state_dict
    known = [sizes["num_attention_heads"] for sizes in PAPER_SIZES.values() if sizes["hidden_size"] == hidden_size]
    given_heads = _integer(reference_config, "num_heads", 1)
    num_heads = size("model.interaction.mlp.fc2.weight", 0) or given_heads or next(iter(known), None)
    if num_heads is None:
        raise ValueError("the checkpoint does not tell the number of heads, and the configuration has no num_heads")
    head_layers = {_num_blocks(state_dict, head) for head in heads}
    if len(head_layers) > 1:
        raise ValueError(f"the heads have {sorted(head_layers)} blocks, expected as many in each")

    num_skips = _num_blocks(state_dict, "model", "skip_layers")
    if num_skips not in (0, _num_blocks(state_dict, "model")):
        raise ValueError(
            f"checkpoint has {_num_blocks(state_dict, 'model')} in_blocks and {num_skips} out_blocks, expected as many"
        )

    has_time = "model.embed_time.fc1.frequencies" in state_dict
    architecture = architecture_of(state_dict)
    mode = find("mode")
    if mode is not None:
        expected = ("classifier", "generator") if mode == "pretrain" else MODES.get(str(mode))
        # the study's joint mode has the head for masked particles too
        if expected is None or not (set(heads) == set(expected) or (mode == "pretrain" and len(heads) == 3)):
            raise ValueError(f"configuration says mode = {mode!r}, but the checkpoint has the heads {', '.join(heads)}")
    of_particles = architecture == "OmniLearnedForTokenClassification"
    num_classes = size("classifier.out.weight", 0) or size("generator.embed_labels.weight", 0)
    if not num_classes:
        num_classes = 1 if "generator" in heads else _integer(reference_config, "num_classes", 1) or 1
    is_study = "masked_head" in heads or "pos_encoding_type" in options or bool(find("mpm_features"))
    checks = {
        "base_dim": hidden_size,
        "input_dim": num_features,
        "num_tokens": size("model.tokens", 1),
        "num_heads": num_heads,
        "num_transformers": _num_blocks(state_dict, "model") + num_skips,
        "skip": num_skips > 0,
        "num_transformers_head": next(iter(head_layers), None),
        # nothing of a segmentation depends on it
        "num_classes": None if mode == "segmentation" else num_classes,
        "use_int": use_interaction,
        "local_int": local_features > num_features,
    }
    for name, value in checks.items():
        if find(name) is not None and value is not None and find(name) != value:
            raise ValueError(f"configuration says {name} = {find(name)!r}, but the checkpoint has {value}")

    num_coordinates = _integer(reference_config, "num_coord", 1)
    if num_coordinates is None and "kwargs" in reference_config and not is_study:
        num_coordinates = 3  # default of the constructor since release 0.2.0; that of the command line is 2, as before
    settings: dict[str, Any] = {
        "hidden_size": hidden_size,
        "num_hidden_layers": checks["num_transformers"],
        "num_attention_heads": num_heads,
        "num_head_layers": checks["num_transformers_head"],
        "num_local_layers": _num_blocks(state_dict, "model.local_embedding"),
        "num_tokens": checks["num_tokens"],
        "mlp_ratio": size("model.embed_particles.mlp.fc1.weight", 0) // hidden_size,
        "num_features": num_features,
        "num_neighbors": _integer(reference_config, "K", 1),
        "num_coordinates": num_coordinates,
        "use_interaction": use_interaction,
        "use_local_interaction": checks["local_int"],
        "num_particle_types": size("model.embed_particle_ids.weight", 0),
        "num_additional_features": size("model.embed_additional.fc1.weight", 1),
        "num_conditions": size("model.embed_conditions.fc1.weight", 1),
        "use_time": has_time,
        "use_long_skips": num_skips > 0,
        "num_labels": num_classes,
        "mask_rule": "log_pt",
        "published_neighbors": True,
        "class_balancing": True,
        "contrastive_weighting": "batch",
        "contrastive_loss_weight": 1.0 if find("use_clip") else 0.0,
        "masked_head_sees_time": True,
        "loss_over_padding": True,
        "truncate_multiplicity": True,
        "num_inference_steps": PUBLISHED_STEPS,
        "loss_reduction": "batch" if is_study else "jet",
    }
    if mode == "regression" or (of_particles and "classifier" not in heads):
        settings["problem_type"] = "regression"
    if of_particles:
        settings["num_particle_labels"] = size("generator.out.weight", 0)
        settings["particle_label_token"] = "generator.embed_labels.weight" in state_dict
    if find("use_event_loss"):
        settings["num_event_classes"] = num_classes - JET_CLASSES
    if architecture == "OmniLearnedForPreTraining":
        settings["objectives"] = [OBJECTIVE_OF_HEAD[head] for head in heads]
    if is_study:
        uses_perturbed = 1.0 if find("use_perturbed_loss_terms") else 0.0
        settings["perturbed_loss_weight"] = settings["masked_input_loss_weight"] = uses_perturbed
    if "masked_head" in heads:
        settings.update(_masked_settings(reference_config, options, state_dict, num_features))
    for name, source in {
        "hidden_dropout": "mlp_drop",
        "attention_dropout": "attn_drop",
        "feature_dropout": "feature_drop",
    }.items():
        settings[name] = find_number(reference_config, source)
    try:
        return OmniLearnedConfig(**{name: value for name, value in settings.items() if value is not None})
    except StrictDataclassError as error:
        raise ValueError(str(error.__cause__ or error)) from None


def _jet_generator_config(reference_config: dict[str, Any], state_dict: dict[str, torch.Tensor]) -> OmniLearnedConfig:
    """Configuration of a *converted* generator of single numbers per jet."""
    needed = ["embed_jets.fc1.weight", "embed_conditions.fc1.weight", "out.weight"]
    missing = [name for name in needed if name not in state_dict]
    if missing:
        raise ValueError(f"checkpoint lacks parameters: {', '.join(missing)}")
    check_matrices(state_dict, *needed)
    num_features, hidden_size = state_dict["out.weight"].shape
    checks = {
        "input_dim": num_features,
        "base_dim": hidden_size,
        "hidden_size": hidden_size,
        "cond_dim": state_dict["embed_conditions.fc1.weight"].shape[1],
        "num_layers": len({name.split(".")[1] for name in state_dict if name.startswith("layers.")}),
    }
    for name, value in checks.items():
        if find_setting(reference_config, name) not in (None, value):
            found = find_setting(reference_config, name)
            raise ValueError(f"configuration says {name} = {found!r}, but the checkpoint has {value}")
    if num_features not in JET_NOISE:
        raise ValueError(f"the generator makes {num_features} numbers per jet, expected 3 or 4 with published noise")
    mean, std = JET_NOISE[num_features]
    return OmniLearnedConfig(
        hidden_size=hidden_size,
        num_hidden_layers=checks["num_layers"],
        num_attention_heads=1,
        mlp_ratio=state_dict["embed_jets.fc1.weight"].shape[0] // hidden_size,
        num_features=num_features,
        num_conditions=checks["cond_dim"],
        hidden_dropout=find_number(reference_config, "mlp_drop") or 0.0,
        use_time=True,
        noise_mean=mean,
        noise_std=std,
        num_inference_steps=511,  # 512 points in time
    )


def _masked_settings(reference_config, options, state_dict, num_features: int) -> dict[str, Any]:
    position = options.get("pos_encoding_type", "sort_descending_in_masked_subset")
    if not isinstance(position, (str, type(None))) or position not in MASKED_POSITIONS:
        expected = ", ".join(str(name) for name in MASKED_POSITIONS)
        raise ValueError(f"configuration says pos_encoding_type = {position!r}, expected one of {expected}")
    features = find_setting(reference_config, "mpm_features")
    if features not in (None, "kin"):
        raise ValueError(f"configuration says mpm_features = {features!r}, expected 'kin'")
    num_outputs = state_dict["masked_head.out.weight"].shape[0]
    variant = find_setting(reference_config, "variant")
    if variant not in (None, "regression", "tokens"):
        raise ValueError(f"configuration says variant = {variant!r}, expected 'regression' or 'tokens'")
    is_regression = variant == "regression" or (variant is None and num_outputs == num_features)
    if is_regression and num_outputs != num_features:
        raise ValueError(f"masked particles have {num_outputs} predicted features, expected {num_features}")
    return {
        "masked_position": MASKED_POSITIONS[position],
        "max_position_embeddings": state_dict["masked_vectors"].shape[0],
        "codebook_size": 0 if is_regression else num_outputs,
        "mask_particle_types": "masked_head.out_types.weight" in state_dict,
        "mask_fraction": find_number(reference_config, "masking_fraction"),
        "label_smoothing": find_number(reference_config, "label_smoothing"),
    }


def add_codebook(config: OmniLearnedConfig, state_dict: dict[str, torch.Tensor]):
    """
    Room for the codes of masked particles, which published checkpoints do not hold: `set_codebook` of the model has to
    follow.
    """
    if config.codebook_size > 0:
        state_dict["centroids"] = torch.zeros(config.codebook_size, config.codebook_features)
        state_dict["centroid_scales"] = torch.zeros(config.codebook_features)
        state_dict["code_weights"] = torch.ones(config.codebook_size)


def _integer(reference_config: dict[str, Any], name: str, least: int) -> int | None:
    value = find_number(reference_config, name)
    if value is not None and (value != int(value) or value < least):
        raise ValueError(f"configuration says {name} = {value:g}, expected an integer from {least}")
    return None if value is None else int(value)
