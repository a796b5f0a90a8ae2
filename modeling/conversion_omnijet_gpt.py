"""
Parameter names and configurations of the OmniJet networks behind the tokens to ours: generators and taggers of
arXiv:2403.05618 and arXiv:2501.05534, the network with continuous inputs of arXiv:2512.04149.
"""

import re
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from .configuration_omnijet import OmniJetConfig
from .conversion_common import Patterns, check_matrices, convert_state_dict, find_number, find_setting, strip_prefixes
from .conversion_omnijet_vqvae import find_flag, find_mapping, find_whole_number

_WB = r"\.(weight|bias)"


def _attention(pattern: str, name: str) -> Patterns:
    """The packed attention of PyTorch."""
    return (
        (pattern + r"\.in_proj_(weight|bias)", name + r".qkv_proj.\2"),
        (pattern + r"\.out_proj\.(weight|bias)", name + r".o_proj.\2"),
    )


def _gated_block(pattern: str, name: str) -> Patterns:
    """One pre-norm block; the number of the block is the last group of `pattern`."""
    groups = re.compile(pattern).groups
    last = rf"\{groups + 1}"
    return (
        (pattern + r"\.attn\.gate", name + ".attention_gate"),
        (pattern + r"\.mlp\.gate", name + ".mlp_gate"),
        (pattern + r"\.attn\.module\.pre_attn_norm" + _WB, name + ".attention_norm." + last),
        (pattern + r"\.attn\.module\.attn\.in_proj_(weight|bias)", name + ".self_attn.qkv_proj." + last),
        (pattern + r"\.attn\.module\.attn\.out_proj" + _WB, name + ".self_attn.o_proj." + last),
        (pattern + r"\.mlp\.module\.pre_mlp_norm" + _WB, name + ".mlp.norm." + last),
        (pattern + r"\.mlp\.module\.layers\.0" + _WB, name + ".mlp.fc1." + last),
        (pattern + r"\.mlp\.module\.layers\.3" + _WB, name + ".mlp.fc2." + last),
    )


def _token_head(reference: str, name: str) -> Patterns:
    stack = rf"{reference}\.transformer_blocks\.(\d+)"
    return (
        *_gated_block(stack + r"\.blocks\.(\d+)", rf"{name}.transformers.\1.layers.\2"),
        (stack + r"\.final_norm" + _WB, rf"{name}.transformers.\1.norm.\2"),
        (rf"{reference}\.unembedding_matrix" + _WB, rf"{name}.output.\1"),
        (rf"{reference}\.\w*proj\w*" + _WB, rf"{name}.projection.\1"),
    )


# name in the reference -> name here, tried in this order
KEY_PATTERNS = (
    # generator
    (r"embedding_table\.weight", "model.embed_tokens.weight"),
    (r"GPT_blocks\.(\d+)\.mha_block\.query\.weight", r"model.layers.\1.self_attn.q_proj.weight"),
    (r"GPT_blocks\.(\d+)\.mha_block\.key\.weight", r"model.layers.\1.self_attn.k_proj.weight"),
    (r"GPT_blocks\.(\d+)\.mha_block\.value\.weight", r"model.layers.\1.self_attn.v_proj.weight"),
    (r"GPT_blocks\.(\d+)\.mha_block\.proj" + _WB, r"model.layers.\1.self_attn.o_proj.\2"),
    (r"GPT_blocks\.(\d+)\.layernorm_1" + _WB, r"model.layers.\1.post_attention_norm.\2"),
    (r"GPT_blocks\.(\d+)\.layernorm_2" + _WB, r"model.layers.\1.post_mlp_norm.\2"),
    (r"GPT_blocks\.(\d+)\.ff_block\.net\.0" + _WB, r"model.layers.\1.mlp.fc1.\2"),
    (r"GPT_blocks\.(\d+)\.ff_block\.net\.2" + _WB, r"model.layers.\1.mlp.fc2.\2"),
    (r"head\.fc1" + _WB, r"lm_head.\1"),
    # heads of its classifiers
    (r"head\.classification_head_linear_embed" + _WB, r"head.embed.\1"),
    (r"head\.classification_head_linear_class" + _WB, r"head.classifier.\1"),
    (r"head\.class_token", "head.token"),
    (r"head\.class_attention_blocks\.(\d+)\.norm1" + _WB, r"head.blocks.\1.norm.\2"),
    *_attention(r"head\.class_attention_blocks\.(\d+)\.attn", r"head.blocks.\1.attn"),
    (r"head\.final_mlp\.(\d+)" + _WB, r"head.mlp.\1.\2"),
    # stand-alone taggers
    (r"embedding\.weight", "tagger.embed_tokens.weight"),
    *((rf"phi_{i + 1}" + _WB, rf"tagger.particle.{i}.\1") for i in range(3)),
    *((rf"F_{i + 1}" + _WB, rf"tagger.jet.{i}.\1") for i in range(3)),
    (r"output_layer" + _WB, r"tagger.classifier.\1"),
    (r"input_projection" + _WB, r"tagger.input_projection.\1"),
    (r"encoder_normformer\.blocks\.(\d+)\.norm1" + _WB, r"tagger.layers.\1.attention_norm.\2"),
    (r"encoder_normformer\.blocks\.(\d+)\.norm2" + _WB, r"tagger.layers.\1.attention_output_norm.\2"),
    *_attention(r"encoder_normformer\.blocks\.(\d+)\.attn", r"tagger.layers.\1.self_attn"),
    (r"encoder_normformer\.blocks\.(\d+)\.mlp\.0" + _WB, r"tagger.layers.\1.mlp.norm.\2"),
    (r"encoder_normformer\.blocks\.(\d+)\.mlp\.1" + _WB, r"tagger.layers.\1.mlp.fc1.\2"),
    (r"encoder_normformer\.blocks\.(\d+)\.mlp\.4" + _WB, r"tagger.layers.\1.mlp.fc2.\2"),
    (r"class_token", "tagger.head.token"),
    (r"class_attention_blocks\.(\d+)\.norm1" + _WB, r"tagger.head.blocks.\1.norm.\2"),
    *_attention(r"class_attention_blocks\.(\d+)\.attn", r"tagger.head.blocks.\1.attn"),
    (r"classification_head\.(\d+)" + _WB, r"tagger.head.mlp.\1.\2"),
    # continuous inputs
    (r"start_token_continuous", "start_features"),
    (r"masked_feature_vector", "masked_vectors"),
    (r"backbone\.input_projection\.embed_part" + _WB, r"backbone.embed_particles.\1"),
    (r"backbone\.input_projection\.embed_jet\.weight", "backbone.embed_jets.weight"),
    (r"backbone\.registers", "backbone.registers"),
    *_gated_block(r"backbone\.transformer\.blocks\.(\d+)", r"backbone.transformer.layers.\1"),
    (r"backbone\.transformer\.final_norm" + _WB, r"backbone.transformer.norm.\1"),
    *_token_head("head_gen", "generation_head"),
    *_token_head("head_mpm", "masked_head"),
    (r"head_class\.input_projection" + _WB, r"class_head.projection.\1"),
    (r"head_class\.class_token", "class_head.token"),
    (r"head_class\.class_attention_blocks\.(\d+)\.pre_attn_norm" + _WB, r"class_head.blocks.\1.attention_norm.\2"),
    (
        r"head_class\.class_attention_blocks\.(\d+)\.post_attn_norm" + _WB,
        r"class_head.blocks.\1.attention_output_norm.\2",
    ),
    *_attention(r"head_class\.class_attention_blocks\.(\d+)\.attn", r"class_head.blocks.\1.attn"),
    (r"head_class\.class_attention_blocks\.(\d+)\.mlp\.pre_mlp_norm" + _WB, r"class_head.blocks.\1.mlp_norm.\2"),
    (r"head_class\.class_attention_blocks\.(\d+)\.mlp\.layers\.0" + _WB, r"class_head.blocks.\1.fc1.\2"),
    (r"head_class\.class_attention_blocks\.(\d+)\.mlp\.norm_between" + _WB, r"class_head.blocks.\1.mlp_inner_norm.\2"),
    (r"head_class\.class_attention_blocks\.(\d+)\.mlp\.layers\.4" + _WB, r"class_head.blocks.\1.fc2.\2"),
    (r"head_class\.final_mlp" + _WB, r"class_head.classifier.\1"),
)

# in the checkpoints, but not parameters of the network: buffers, and layers that the forward pass never uses
UNUSED = (
    r"GPT_blocks\.\d+\.mha_block\.tril",
    r"criterion\.weight",
    r"head\.input_projection\.(weight|bias)",
    r"(head\.)?class_attention_blocks\.\d+\.(norm2|mlp\.\d+)\.(weight|bias)",
)


def convert_parameters(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Rename the parameters of a reference checkpoint. What `UNUSED` lists is left out, as are empty embeddings and
    registers, and the second name of a tensor that is stored twice.

    Raises:
        ValueError: listing the names that the reference does not have, or a tensor that differs from its second copy.
    """
    kept = {}
    for name, tensor in state_dict.items():
        plain = strip_prefixes(name)
        if any(re.fullmatch(pattern, plain) for pattern in UNUSED):
            continue
        if plain in ("backbone.input_projection.embed_jet.weight", "backbone.registers") and tensor.numel() == 0:
            continue
        if re.fullmatch(r"head_class\.class_attention_blocks\.\d+\.mlp\.layers\.2\.(weight|bias)", plain):
            twin = name.replace(".layers.2.", ".norm_between.")
            if twin not in state_dict or not torch.equal(tensor, state_dict[twin]):
                raise ValueError(f"{name} differs from {twin}, expected the same tensor")
            continue
        if plain.endswith(".gate") and tensor.numel() == 1:
            tensor = tensor.reshape(())
        kept[name] = tensor
    return convert_state_dict(kept, KEY_PATTERNS)


def architecture_of(state_dict: dict[str, torch.Tensor]) -> str:
    """Model class of a *converted* state dict."""
    if "masked_vectors" in state_dict:
        return "OmniJetForPreTraining"
    if "lm_head.weight" in state_dict:
        return "OmniJetForCausalLM"
    if any(name.startswith(("head.", "tagger.")) for name in state_dict):
        return "OmniJetForSequenceClassification"
    raise ValueError("checkpoint has neither the head of a generator nor that of a classifier")


def convert_config(
    reference_config: dict[str, Any],
    state_dict: dict[str, torch.Tensor],
    class_weights: torch.Tensor | None = None,
) -> OmniJetConfig:
    """
    Configuration of a *converted* state dict, with the published ids and losses. Sizes come from the shapes; the
    reference's configuration adds what shapes do not tell (heads, dropout, losses) and must not contradict them.

    Args:
        class_weights (`(vocab_size,)`): the buffer `criterion.weight` of the checkpoint, if it has one.

    Raises:
        ValueError: naming the setting that is not supported or disagrees with the checkpoint, or the parameter that is
            missing.
    """
    if "masked_vectors" in state_dict:
        settings = _hybrid_settings(reference_config, state_dict)
    elif "tagger.particle.0.weight" in state_dict:
        settings = _particle_flow_settings(reference_config, state_dict)
    elif "tagger.input_projection.weight" in state_dict:
        settings = _normformer_settings(reference_config, state_dict)
    else:
        settings = _gpt_settings(reference_config, state_dict, class_weights)
    settings.update(bos_token_id=0, pad_token_id=0)
    try:
        return OmniJetConfig(**{name: value for name, value in settings.items() if value is not None})
    except StrictDataclassError as error:
        raise ValueError(str(error.__cause__ or error)) from None


def convert_generation_settings(reference_config: dict[str, Any]) -> dict[str, Any]:
    """Sampling of the reference's configuration as settings of `generation_config`."""
    settings = {name: find_number(reference_config, name) for name in ("temperature", "stop_token_threshold")}
    return {name: value for name, value in settings.items() if value is not None}


def _shapes(state_dict: dict[str, torch.Tensor], *needed: str):
    missing = [name for name in needed if name not in state_dict]
    if missing:
        raise ValueError(f"checkpoint lacks parameters: {', '.join(missing)}")
    check_matrices(state_dict, *needed)
    return [tuple(state_dict[name].shape) for name in needed]


def _count(state_dict: dict[str, torch.Tensor], prefix: str) -> int:
    """Number of numbered parts behind `prefix`, which must be complete."""
    pattern = re.escape(prefix) + r"\.(\d+)\."
    parts = {int(match.group(1)) for name in state_dict if (match := re.match(pattern, name))}
    if not parts or parts != set(range(len(parts))):
        last = max(len(parts), 1) - 1
        raise ValueError(f"checkpoint has the parts {sorted(parts)} of {prefix}, expected 0 to {last}")
    return len(parts)


def _agree(reference_config: dict[str, Any], **sizes: int):
    for name, size in sizes.items():
        value = find_setting(reference_config, name)
        if value is not None and value != size:
            raise ValueError(f"configuration says {name} = {value}, but the checkpoint has {size}")


def _gpt_settings(reference_config, state_dict, class_weights) -> dict[str, Any]:
    embedding, first = "model.embed_tokens.weight", "model.layers.0.mlp.fc1.weight"
    (vocab_size, hidden_size), (intermediate_size, _) = _shapes(state_dict, embedding, first)
    num_layers = _count(state_dict, "model.layers")
    codebook_size = vocab_size - 2
    _agree(
        reference_config,
        vocab_size=vocab_size,
        embedding_dim=hidden_size,
        n_GPT_blocks=num_layers,
        num_codes=codebook_size,
        start_token_id=0,
        stop_token_id=vocab_size - 1,
    )
    # OmniJet-alpha_C has these options, OmniJet-alpha has not
    excludes_padding = find_flag(reference_config, "exclude_padded_values_from_loss")
    is_causal = find_flag(reference_config, "apply_causal_mask")
    stop_weight = find_number(reference_config, "stop_token_weight")
    is_shower = class_weights is not None or any(
        value is not None for value in (excludes_padding, is_causal, stop_weight)
    )
    if class_weights is not None:
        if class_weights.shape != (vocab_size,) or not bool((class_weights[:-1] == 1).all()):
            raise ValueError("criterion.weight: expected one weight per id, 1 for every id but the stop")
        stored = float(class_weights[-1])
        if stop_weight is not None and abs(stop_weight - stored) > 1e-6 * abs(stored):
            raise ValueError(f"configuration says stop_token_weight = {stop_weight}, but the checkpoint has {stored}")
        stop_weight = stored
    settings = {
        "codebook_size": codebook_size,
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": find_whole_number(reference_config, "n_heads"),
        "intermediate_size": intermediate_size,
        "attention_dropout": find_number(reference_config, "attention_dropout"),
        "max_position_embeddings": find_whole_number(reference_config, "max_sequence_len"),
        "is_causal": is_causal is not False,
        "mask_padded_queries": is_shower,
        "padding_loss": "counted" if is_shower and excludes_padding is not False else "trained",
        "stop_token_weight": stop_weight,
    }
    if "head.classifier.weight" in state_dict:
        settings["num_labels"] = state_dict["head.classifier.weight"].shape[0]
    elif "head.token" in state_dict:
        settings["classifier_head"] = "class_attention"
        settings["class_attention_heads"] = find_whole_number(
            find_mapping(reference_config, "class_attention_head"), "num_heads"
        )
        settings["classifier_dropout"] = find_number(reference_config, "dropout_rate")
        settings.update(_class_attention_sizes(state_dict, "head"))
    return settings


def _class_attention_sizes(state_dict, head: str) -> dict[str, Any]:
    layers = sorted(
        int(match.group(1))
        for name in state_dict
        if (match := re.fullmatch(re.escape(head) + r"\.mlp\.(\d+)\.weight", name))
    )
    sizes = [state_dict[f"{head}.mlp.{layer}.weight"].shape[0] for layer in layers]
    if not sizes:
        raise ValueError(f"checkpoint lacks parameters: {head}.mlp.0.weight")
    return {
        "class_attention_layers": _count(state_dict, f"{head}.blocks"),
        "classifier_sizes": sizes[:-1],
        "num_labels": sizes[-1],
    }


def _particle_flow_settings(reference_config, state_dict) -> dict[str, Any]:
    (_, num_features), (num_labels, _) = _shapes(state_dict, "tagger.particle.0.weight", "tagger.classifier.weight")
    _agree(reference_config, n_out_nodes=num_labels)
    settings = {"architecture": "particle_flow", "num_features": num_features, "num_labels": num_labels}
    if "tagger.embed_tokens.weight" in state_dict:
        ((vocab_size, size),) = _shapes(state_dict, "tagger.embed_tokens.weight")
        settings.update(codebook_size=vocab_size - 2, vocab_size=vocab_size, num_features=0, token_embedding_size=size)
    return settings


def _normformer_settings(reference_config, state_dict) -> dict[str, Any]:
    ((hidden_size, num_features),) = _shapes(state_dict, "tagger.input_projection.weight")
    settings = {
        "architecture": "normformer",
        "num_features": num_features,
        "hidden_size": hidden_size,
        "num_hidden_layers": _count(state_dict, "tagger.layers"),
        "num_attention_heads": find_whole_number(reference_config, "num_heads", "n_heads", "nh"),
        **_class_attention_sizes(state_dict, "tagger.head"),
    }
    _agree(reference_config, n_out_nodes=settings["num_labels"])
    return settings


# published names to ours
_MASKED_INPUT = {"exclude": "exclude", "keep": "keep", "zero_pad": "zero"}
_MASKED_POSITION = {
    "sort_by_first_feature_descending_in_masked_subset": "rank_among_masked",
    "sort_by_first_feature_descending": "rank",
    "absolute": "position",
    "index": "position",
    None: "position",
}


def _one_of(name: str, value: Any, choices: dict) -> str:
    if not isinstance(value, (str, type(None))) or value not in choices:
        raise ValueError(f"configuration says {name} = {value!r}, expected one of {', '.join(map(str, choices))}")
    return choices[value]


def _hybrid_settings(reference_config, state_dict) -> dict[str, Any]:
    shapes = _shapes(
        state_dict,
        "backbone.embed_particles.weight",
        "masked_vectors",
        "backbone.transformer.layers.0.mlp.fc1.weight",
        "generation_head.output.weight",
        "generation_head.transformers.0.layers.0.mlp.fc1.weight",
        "class_head.projection.weight",
        "class_head.blocks.0.fc1.weight",
        "class_head.classifier.weight",
    )
    (hidden_size, num_features), (length, _), (intermediate_size, _), (vocab_size, head_size) = shapes[:4]
    (head_intermediate_size, _), (class_size, _), (class_intermediate_size, _), (num_labels, _) = shapes[4:]
    backbone = find_mapping(reference_config, "backbone_cfg")
    heads = {"gen_head_cfg": True, "mpm_head_cfg": False}
    for name, is_causal in heads.items():
        part = find_mapping(reference_config, name)
        if part.get("apply_causal_mask") not in (None, is_causal):
            raise ValueError(f"configuration says {name}.apply_causal_mask = {not is_causal}, which is not supported")
        if part.get("unembedding_mlp_cfg") is not None:
            raise ValueError(f"configuration says {name}.unembedding_mlp_cfg, which is not supported")
    for part in (backbone, *(find_mapping(reference_config, name) for name in heads)):
        transformer = find_mapping(part, "transformer_cfg")
        for name, expected in (
            ("interaction_cfg", None),
            ("post_blocks_point_drop_cfg", None),
            ("attn_point_drop_cfg", None),
            ("norm_after", False),
            ("norm_before", True),
            ("activation", "GELU"),
        ):
            value = find_setting(transformer if name != "interaction_cfg" else part, name)
            if value not in (None, expected):
                raise ValueError(f"configuration says {name} = {value!r}, which is not supported")
    embedding = find_setting(find_mapping(backbone, "embed_cfg"), "type")
    if embedding not in (None, "continuous_project_add"):
        raise ValueError(f"configuration says embed_cfg.type = {embedding!r}, which is not supported")
    positions = (("gen_head_cfg", "all"), ("mpm_head_cfg", "only_masked"))
    for name, expected in positions:
        value = find_mapping(reference_config, name).get("positions_to_include_in_loss")
        if value not in (None, expected):
            raise ValueError(f"configuration says {name}.positions_to_include_in_loss = {value!r}, not supported")
    _agree(backbone, embedding_dim=hidden_size, vocab_size=vocab_size, max_sequence_len=length)

    registers = state_dict.get("backbone.registers")
    jets = state_dict.get("backbone.embed_jets.weight")
    gate = state_dict.get("backbone.transformer.layers.0.attention_gate")
    num_heads = find_whole_number(find_mapping(backbone, "attn_cfg"), "num_heads")
    class_head = find_mapping(reference_config, "class_head_cfg")
    weights = find_mapping(reference_config, "loss_term_weights")
    residual = find_mapping(backbone, "residual_cfg")
    excludes_padding = find_flag(reference_config, "exclude_padded_values_from_loss")
    masked_input = find_setting(reference_config, "masked_input_treatment") or "exclude"
    dropout = find_number(find_mapping(backbone, "attn_cfg"), "dropout_rate")
    return {
        "architecture": "hybrid",
        "codebook_size": vocab_size - 2,
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": _count(state_dict, "backbone.transformer.layers"),
        "num_attention_heads": num_heads,
        "intermediate_size": intermediate_size,
        "attention_dropout": dropout,
        "hidden_dropout": find_number(find_mapping(backbone, "mlp_cfg"), "dropout_rate"),
        "max_position_embeddings": length,
        "is_causal": find_flag(backbone, "apply_causal_mask") is not False,
        "padding_loss": "trained" if excludes_padding is False else "counted",
        "num_features": num_features,
        "num_jet_features": 0 if jets is None else jets.shape[1],
        "num_registers": 0 if registers is None else registers.shape[1],
        "residual_gate": "constant" if gate is None else "local" if gate.ndim == 1 else "global",
        "residual_gate_value": find_number(residual, "init_value"),
        "final_norm": "backbone.transformer.norm.weight" in state_dict,
        "trainable_start": "start_features" in state_dict,
        "use_hybrid_passes": find_flag(reference_config, "causal_bidirectional_hybrid") is not False,
        "mask_fraction": find_number(reference_config, "mask_fraction"),
        "masked_input": _one_of("masked_input_treatment", masked_input, _MASKED_INPUT),
        "masked_position": _one_of(
            "pos_encoding_type", find_setting(reference_config, "pos_encoding_type"), _MASKED_POSITION
        ),
        "token_head_size": head_size,
        "token_head_layers": _count(state_dict, "generation_head.transformers.0.layers"),
        "token_head_heads": find_whole_number(
            find_mapping(find_mapping(reference_config, "gen_head_cfg"), "attn_cfg"), "num_heads"
        ),
        "token_head_intermediate_size": head_intermediate_size,
        "num_predictions": _count(state_dict, "generation_head.transformers"),
        "class_head_size": class_size,
        # the published head always has 128 components and 8 heads
        "class_head_heads": find_whole_number(class_head, "num_heads") or (8 if class_size == 128 else num_heads),
        "class_head_intermediate_size": class_intermediate_size,
        "class_attention_layers": _count(state_dict, "class_head.blocks"),
        "num_labels": num_labels,
        "generation_loss_weight": find_number(weights, "gen"),
        "masked_loss_weight": find_number(weights, "mpm"),
        "class_loss_weight": find_number(weights, "class"),
    }
