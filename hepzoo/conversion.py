"""
`hepzoo convert FAMILY`: published checkpoints to folders that `from_pretrained` loads.

Checkpoints come from outside: they are read without executing what a pickle asks for, and every parameter is accounted
for, key by key.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from hepzoo.checkpoints import first_line, load_checkpoint

EXAMPLES = """\
examples:
  hepzoo convert cmhca_dirc --checkpoint Pion_model.pth --config CA_config.json --output pion_generator
  hepzoo convert cmhca_dirc --checkpoint MoE_FourExperts_Weights.pth --config CA_config.json --output moe_generator
  hepzoo convert cmhca_dirc --checkpoint tests/golden/dirc_dense/state_dict.safetensors \\
      --config tests/golden/dirc_dense/config.json --output dense
  hepzoo convert spade --checkpoint model.ckpt --config config.yaml --output spade_x1
  hepzoo convert omnijet --checkpoint vqvae_8192_tokens/model_ckpt.ckpt --config vqvae_8192_tokens/config.yaml \\
      --output jet_tokenizer
"""


def load_reference_config(path: str | Path) -> dict[str, Any]:
    """The reference's JSON or YAML configuration as a dictionary."""
    import yaml

    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such configuration file")
    try:
        text = path.read_text()
        config = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (UnicodeDecodeError, json.JSONDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path}: not a JSON or YAML file ({first_line(error)})") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected a mapping of settings, found {type(config).__name__}")
    return config


def load_strictly(model, state_dict: dict[str, Any], source: str):
    """Load a converted state dict; missing, unknown or misshapen parameters are one error that lists them all."""
    expected = model.state_dict()
    problems = [f"missing {name}" for name in expected if name not in state_dict]
    problems += [f"unknown {name}" for name in state_dict if name not in expected]
    problems += [
        f"{name} has shape {tuple(state_dict[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state_dict and state_dict[name].shape != tensor.shape
    ]
    if problems:
        raise ValueError(f"{source} does not fit {type(model).__name__}: {'; '.join(problems)}")
    model.load_state_dict(state_dict)


def convert_cmhca_dirc(checkpoint: str | Path, config: str | Path) -> tuple[Any, Any]:
    """
    A reference CMHCA-DIRC checkpoint (generator, generator with experts, classifier or noise filter) to a model and its
    tokenizer; the tokenizer is `None` if the checkpoint's vocabulary is not that of the hpDIRC plane.
    """
    from hepzoo.modeling import modeling_cmhca_dirc
    from hepzoo.modeling.conversion_cmhca_dirc import KEY_PATTERNS, architecture_of, convert_config
    from hepzoo.modeling.conversion_common import convert_state_dict, find_number
    from hepzoo.tokenization.tokenization_cmhca_dirc import CMHCADircTokenizer

    reference_config = load_reference_config(config)
    try:
        state_dict = convert_state_dict(load_checkpoint(checkpoint), KEY_PATTERNS)
        model_config = convert_config(reference_config, state_dict)
        model_class = getattr(modeling_cmhca_dirc, architecture_of(state_dict))
    except ValueError as error:
        raise ValueError(str(error) if str(checkpoint) in str(error) else f"{checkpoint}: {error}") from None
    settings = {
        "time_min": find_number(reference_config, "time_min", "t_min"),
        "time_max": find_number(reference_config, "time_max", "t_max"),
        "time_resolution": find_number(reference_config, "time_res"),
    }
    settings = {name: value for name, value in settings.items() if value is not None}
    model = model_class(model_config).eval()
    load_strictly(model, state_dict, str(checkpoint))
    if model.can_generate():
        # the sampling of the published simulation script
        model.generation_config.update(temperature=1.05, top_p=0.995)

    try:
        tokenizer = CMHCADircTokenizer(
            time_vocab_size=model_config.time_vocab_size,
            conditioning_names=list(model_config.conditioning_names),
            conditioning_ranges=[list(limits) for limits in model_config.conditioning_ranges],
            time_encoding=model_config.time_prediction,
            model_max_length=model_config.max_position_embeddings,
            # decode as the published simulation did
            legacy_time_decoding=True,
            **settings,
        )
    except ValueError:
        tokenizer = None
    if tokenizer is not None and tokenizer.vocab_size != model_config.vocab_size:
        tokenizer = None
    return model, tokenizer


def convert_spade(checkpoint: str | Path, config: str | Path) -> tuple[Any, Any]:
    """A reference SPADE checkpoint (split or combined) with its YAML configuration to a model and its tokenizer."""
    from hepzoo.modeling.conversion_common import convert_state_dict, find_number
    from hepzoo.modeling.conversion_spade import (
        KEY_PATTERNS,
        convert_config,
        convert_energy_transform,
        convert_generation_settings,
    )
    from hepzoo.modeling.modeling_spade import SpadeForCausalLM
    from hepzoo.tokenization.tokenization_spade import SpadeTokenizer

    reference_config = load_reference_config(config)
    try:
        state_dict = convert_state_dict(load_checkpoint(checkpoint), KEY_PATTERNS)
        model_config = convert_config(reference_config, state_dict)
        generation_settings = convert_generation_settings(reference_config, model_config)
        tokenizer = SpadeTokenizer.from_model_config(
            model_config,
            energy_transform=convert_energy_transform(reference_config),
            energy_threshold=find_number(reference_config, "energy_threshold") or 0.0,
            legacy_pad_length=model_config.max_num_hits,
        )
    except ValueError as error:
        raise ValueError(str(error) if str(checkpoint) in str(error) else f"{checkpoint}: {error}") from None
    model = SpadeForCausalLM(model_config).eval()
    load_strictly(model, state_dict, str(checkpoint))
    for name, value in generation_settings.items():
        setattr(model.generation_config, name, value)
    return model, tokenizer


def convert_omnijet(checkpoint: str | Path, config: str | Path) -> tuple[Any, Any]:
    """
    A reference checkpoint of the OmniJet lineage: a tokenizer network (with the tokenizer built on it), or a generator,
    classifier, stand-alone tagger or hybrid, whose tokenizer is that of its tokenizer network.
    """
    from hepzoo.modeling import conversion_omnijet_gpt, conversion_omnijet_vqvae, modeling_omnijet
    from hepzoo.modeling.conversion_common import convert_state_dict
    from hepzoo.modeling.modeling_omnijet_vqvae import OmniJetVQVAEModel
    from hepzoo.tokenization.tokenization_omnijet import OmniJetTokenizer

    reference_config = load_reference_config(config)
    reference = load_checkpoint(checkpoint)
    is_vqvae = any(name.endswith("vqlayer.codebook.weight") for name in reference)
    tokenizer = None
    try:
        if is_vqvae:
            state_dict = convert_state_dict(reference, conversion_omnijet_vqvae.KEY_PATTERNS)
            model = OmniJetVQVAEModel(conversion_omnijet_vqvae.convert_config(reference_config, state_dict)).eval()
        else:
            state_dict = conversion_omnijet_gpt.convert_parameters(reference)
            model_config = conversion_omnijet_gpt.convert_config(
                reference_config, state_dict, reference.get("criterion.weight")
            )
            model_class = getattr(modeling_omnijet, conversion_omnijet_gpt.architecture_of(state_dict))
            model = model_class(model_config).eval()
        load_strictly(model, state_dict, str(checkpoint))
        features = conversion_omnijet_vqvae.convert_features(reference_config) if is_vqvae else None
        if features is not None:
            is_shower = "z" in features
            tokenizer = OmniJetTokenizer(
                features,
                vqvae=model,
                separate_pad_id=False,
                **({"sorting": "energy", "model_max_length": 1700} if is_shower else {}),
            )
    except ValueError as error:
        raise ValueError(str(error) if str(checkpoint) in str(error) else f"{checkpoint}: {error}") from None
    if model.can_generate():
        for name, value in conversion_omnijet_gpt.convert_generation_settings(reference_config).items():
            setattr(model.generation_config, name, value)
    return model, tokenizer


FAMILIES = {"cmhca_dirc": convert_cmhca_dirc, "spade": convert_spade, "omnijet": convert_omnijet}
# what to do where a checkpoint does not bring its tokenizer
WITHOUT_TOKENIZER = {
    "cmhca_dirc": "its vocabulary is not that of the hpDIRC plane; save a CMHCADircTokenizer with your geometry there",
    "omnijet": "it belongs to the tokenizer network; convert that, and save its OmniJetTokenizer there too",
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hepzoo convert",
        description="Convert a published checkpoint into a folder that from_pretrained loads.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("family", choices=sorted(FAMILIES), help="model family")
    parser.add_argument("--checkpoint", required=True, help=".pth, .pt, .ckpt or .safetensors file")
    parser.add_argument("--config", required=True, help="the reference's JSON or YAML configuration")
    parser.add_argument("--output", required=True, help="folder to write; must not exist or be empty")
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    output = Path(arguments.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output}: exists and is not an empty folder")
    model, tokenizer = FAMILIES[arguments.family](arguments.checkpoint, arguments.config)
    output.parent.mkdir(parents=True, exist_ok=True)
    # written beside the target and renamed, so that a failure leaves nothing behind
    with tempfile.TemporaryDirectory(dir=output.parent) as temporary:
        staging = Path(temporary) / output.name
        model.save_pretrained(staging)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
        if output.exists():
            output.rmdir()
        shutil.move(staging, output)
    print(f"{output}: {type(model).__name__}, {model.num_parameters():,} parameters")
    if tokenizer is None:
        print(f"{output}: no tokenizer written, {WITHOUT_TOKENIZER[arguments.family]}")
    return 0
