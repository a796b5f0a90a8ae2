"""Parameter names and configuration of the CMHCA-DIRC reference (arXiv:2505.08736, and its GlueX successor) to ours."""

import re
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from .configuration_cmhca_dirc import CMHCADircConfig
from .conversion_common import check_matrices, find_number, find_setting

CONDITIONING_EMBEDDINGS = ("momentum_embedding", "theta_embedding", "phi_embedding")

# name in the reference -> name here, tried in this order
KEY_PATTERNS = (
    (r"token_embedding\.weight", "model.embeddings.space.weight"),
    (r"pos_embedding\.weight", "model.embeddings.space_position.weight"),
    (r"time_embedding\.(weight|bias)", r"model.embeddings.time.\1"),
    (r"time_pos_embedding\.weight", "model.embeddings.time_position.weight"),
    *(
        (rf"{name}\.(weight|bias)", rf"model.embeddings.conditioning.{index}.\1")
        for index, name in enumerate(CONDITIONING_EMBEDDINGS)
    ),
    (r"cls_token", "model.cls_token"),
    (r"layers\.(\d+)\.(?:xN|LN1)\.(weight|bias)", r"model.layers.\1.attention_norm.\2"),
    (r"layers\.(\d+)\.tN\.(weight|bias)", r"model.layers.\1.time_norm.\2"),
    (r"layers\.(\d+)\.LN2\.(weight|bias)", r"model.layers.\1.mlp_norm.\2"),
    (r"layers\.(\d+)\.attn\.g_scale", r"model.layers.\1.attention.logit_scale"),
    (r"layers\.(\d+)\.attn\.([qkv]_proj)\.weight", r"model.layers.\1.attention.\2.weight"),
    (r"layers\.(\d+)\.c_proj\.(weight|bias)", r"model.layers.\1.attention.o_proj.\2"),
    (r"layers\.(\d+)\.FF\.nn\.0\.(weight|bias)", r"model.layers.\1.mlp.fc1.\2"),
    (r"layers\.(\d+)\.FF\.nn\.2\.(weight|bias)", r"model.layers.\1.mlp.fc2.\2"),
    (r"layers\.(\d+)\.FF\.experts\.(\d+)\.nn\.0\.(weight|bias)", r"model.layers.\1.mlp.experts.\2.fc1.\3"),
    (r"layers\.(\d+)\.FF\.experts\.(\d+)\.nn\.2\.(weight|bias)", r"model.layers.\1.mlp.experts.\2.fc2.\3"),
    (r"layers\.(\d+)\.FF\.router\.router\.(weight|bias)", r"model.layers.\1.mlp.router.\2"),
    (r"LN\.(weight|bias)", r"model.norm.\1"),
    (r"logits_head\.(weight|bias)", r"space_head.\1"),
    (r"time_head\.(weight|bias)", r"time_head.\1"),
    (r"time_head\.nn\.0\.(weight|bias)", r"time_head.input_proj.\1"),
    (r"time_head\.nn\.1\.linear1\.(weight|bias)", r"time_head.blocks.0.0.\1"),
    (r"time_head\.nn\.1\.linear2\.(weight|bias)", r"time_head.blocks.0.1.\1"),
    (r"time_head\.nn\.2\.linear1\.(weight|bias)", r"time_head.blocks.1.0.\1"),
    (r"time_head\.nn\.2\.linear2\.(weight|bias)", r"time_head.blocks.1.1.\1"),
    (r"time_head\.nn\.3\.(weight|bias)", r"time_head.output_proj.\1"),
    (r"(?:classification_head|sequence_head)(?:\.\d+)?\.(weight|bias)", r"classifier.\1"),
)


def architecture_of(state_dict: dict[str, torch.Tensor]) -> str:
    """Class that a converted state dict belongs to, told from its heads."""
    if "model.cls_token" in state_dict:
        return "CMHCADircForSequenceClassification"
    if "space_head.weight" in state_dict:
        return "CMHCADircForCausalLM"
    if "classifier.weight" in state_dict:
        return "CMHCADircForTokenClassification"
    raise ValueError("checkpoint has none of the heads logits_head, classification_head, sequence_head")


def convert_config(reference_config: dict[str, Any], state_dict: dict[str, torch.Tensor]) -> CMHCADircConfig:
    """
    Configuration of a *converted* state dict. Sizes come from the shapes; the JSON adds what shapes do not tell (heads,
    dropout, classes, physical ranges) and must not contradict them.

    Raises:
        ValueError: naming the setting that disagrees with the checkpoint, or the parameter that is missing.
    """
    needed = (
        "model.embeddings.space.weight",
        "model.embeddings.space_position.weight",
        "model.embeddings.time.weight",
    )
    missing = [name for name in needed if name not in state_dict]
    if missing:
        raise ValueError(f"checkpoint lacks parameters: {', '.join(missing)}")
    check_matrices(state_dict, *needed)
    vocab_size, hidden_size = state_dict["model.embeddings.space.weight"].shape
    layers = {int(match.group(1)) for name in state_dict if (match := re.match(r"model\.layers\.(\d+)\.", name))}
    num_layers = len(layers)
    if layers != set(range(num_layers)):
        raise ValueError(f"checkpoint has the blocks {sorted(layers)}, expected 0 to {num_layers - 1}")
    num_conditioning = len({name.split(".")[3] for name in state_dict if ".conditioning." in name})
    experts = {name.split(".")[5] for name in state_dict if ".mlp.experts." in name}
    first_linear = "model.layers.0.mlp.experts.0.fc1.weight" if experts else "model.layers.0.mlp.fc1.weight"
    if first_linear not in state_dict:
        raise ValueError(f"checkpoint lacks parameters: {first_linear}")
    check_matrices(state_dict, first_linear)
    regression = state_dict["model.embeddings.time.weight"].shape[1] == 1
    sizes = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "intermediate_size": state_dict[first_linear].shape[0],
        "max_position_embeddings": state_dict["model.embeddings.space_position.weight"].shape[0],
        "num_experts": len(experts),
        "qk_norm": "model.layers.0.attention.logit_scale" in state_dict,
        "time_prediction": "regression" if regression else "categorical",
    }
    if regression:
        sizes["time_vocab_size"] = find_setting(reference_config, "time_vocab") or CMHCADircConfig().time_vocab_size
        if "time_head.input_proj.weight" in state_dict:
            sizes["time_regression_size"] = state_dict["time_head.input_proj.weight"].shape[0]
    else:
        sizes["time_vocab_size"] = state_dict["model.embeddings.time.weight"].shape[0]

    heads = find_setting(reference_config, "attn_heads", "num_heads", "heads")
    checks = {
        "vocab_size": find_setting(reference_config, "space_vocab", "vocab_size"),
        "time_vocab_size": find_setting(reference_config, "time_vocab"),
        "hidden_size": find_setting(reference_config, "embed_dim"),
        "max_position_embeddings": find_setting(reference_config, "seq_len", "max_seq_length"),
        "num_hidden_layers": len(heads) if isinstance(heads, list) else None,
    }
    if experts:
        checks["num_experts"] = find_setting(reference_config, "num_experts")
    for name, value in checks.items():
        if value is not None and value != sizes[name]:
            raise ValueError(f"configuration says {name} = {value}, but the checkpoint has {sizes[name]}")

    ranges = conditioning_ranges(reference_config, num_conditioning)
    settings: dict[str, Any] = {**sizes, **ranges}
    settings["num_attention_heads"] = 8 if heads is None else heads
    dropout = find_setting(reference_config, "drop_rates")
    if dropout is not None:
        settings["attention_dropout"] = dropout
    if experts:
        num_classes = find_setting(reference_config, "num_classes")
        settings["num_classes"] = 2 if num_classes is None else num_classes
    for name in ("num_attention_heads", "attention_dropout"):
        value = settings.get(name)
        if isinstance(value, list) and len(set(value)) == 1 and len(value) == num_layers:
            settings[name] = value[0]
    try:
        return CMHCADircConfig(**settings)
    except StrictDataclassError as error:
        raise ValueError(str(error.__cause__ or error)) from None


def conditioning_ranges(reference_config: dict[str, Any], num_conditioning: int) -> dict[str, Any]:
    """Names and ranges of the kinematic quantities: the reference's "stats", else the published hpDIRC ranges."""
    names = ("P", "Theta", "Phi")[:num_conditioning]
    ranges = []
    for name, default in zip(names, (*CMHCADircConfig().conditioning_ranges, (-180.0, 180.0))):
        low, high = (
            find_number(reference_config, *(f"{alias}_{end}" for alias in (name, name.lower())))
            for end in ("min", "max")
        )
        ranges.append((default[0] if low is None else low, default[1] if high is None else high))
    return {"conditioning_names": names, "conditioning_ranges": tuple(ranges)}
