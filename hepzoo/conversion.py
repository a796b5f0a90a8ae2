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

from hepzoo.checkpoints import first_line, load_averaged_weights, load_checkpoint

EXAMPLES = """\
examples:
  hepzoo convert cmhca_dirc --checkpoint Pion_model.pth --config CA_config.json --output pion_generator
  hepzoo convert cmhca_dirc --checkpoint MoE_FourExperts_Weights.pth --config CA_config.json --output moe_generator
  hepzoo convert cmhca_dirc --checkpoint tests/golden/dirc_dense/state_dict.safetensors \\
      --config tests/golden/dirc_dense/config.json --output dense
  hepzoo convert spade --checkpoint model.ckpt --config config.yaml --output spade_x1
  hepzoo convert omnijet --checkpoint vqvae_8192_tokens/model_ckpt.ckpt --config vqvae_8192_tokens/config.yaml \\
      --output jet_tokenizer
  hepzoo convert fm4npp --checkpoint pp_nerf_m1_k30.ckpt --config mamba_m1.yaml --output fm4npp_m3
  hepzoo convert fm4npp --checkpoint track_finding.pth --config tracking.yaml --backbone fm4npp_m3 --output track_finder
  hepzoo convert omnilearned --checkpoint best_model_pretrain_s.pt --config omnilearned.json --output omnilearned_small
  hepzoo convert epic_fm --checkpoint epicfm_baseline.ckpt --config jetclass_cond.yaml --output epic_fm
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
    """
    Load a converted state dict; missing, unknown or misshapen parameters are one error that lists them all, and so are
    those that hold NaN or infinity.
    """
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
    broken = [name for name, tensor in state_dict.items() if not bool(tensor.isfinite().all())]
    if broken:
        raise ValueError(f"{source} has weights that are not finite numbers: {', '.join(broken)}")
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


def convert_omnilearned(checkpoint: str | Path, config: str | Path) -> tuple[Any, Any]:
    """
    A published OmniLearned checkpoint (classifier, generator, flavour tagger, or several objectives, also of the
    pre-training study) to a model. The averaged weights are taken where the configuration says `use_ema`.
    """
    from hepzoo.modeling import modeling_omnilearned
    from hepzoo.modeling.conversion_common import convert_state_dict
    from hepzoo.modeling.conversion_omnilearned import (
        AVERAGED,
        AVERAGED_PARTS,
        CHECKPOINT_PARTS,
        KEY_PATTERNS,
        add_codebook,
        architecture_of,
        convert_config,
    )

    reference_config = load_reference_config(config)
    use_ema = bool(reference_config.get("use_ema"))
    reference = load_checkpoint(checkpoint, AVERAGED_PARTS if use_ema else CHECKPOINT_PARTS)
    if use_ema:
        if not all(name.startswith(AVERAGED) for name in reference):
            raise ValueError(f"{checkpoint}: configuration says use_ema, but the checkpoint has no averaged weights")
        reference = {name.removeprefix(AVERAGED): tensor for name, tensor in reference.items()}
    try:
        state_dict = convert_state_dict(reference, KEY_PATTERNS)
        model_config = convert_config(reference_config, state_dict)
        add_codebook(model_config, state_dict)
        model = getattr(modeling_omnilearned, architecture_of(state_dict))(model_config).eval()
        load_strictly(model, state_dict, str(checkpoint))
    except ValueError as error:
        raise ValueError(str(error) if str(checkpoint) in str(error) else f"{checkpoint}: {error}") from None
    return model, None


def convert_fm4npp(checkpoint: str | Path, config: str | Path, backbone: str | Path | None = None) -> tuple[Any, None]:
    """
    A reference FM4NPP checkpoint: a pre-trained backbone, or a head. Heads that share a checkpoint, each under a
    prefix, become a dictionary of models.

    Args:
        backbone: folder of the converted backbone to put under the heads; otherwise they read block outputs only.
    """
    from hepzoo.modeling import modeling_fm4npp
    from hepzoo.modeling.conversion_fm4npp import (
        architecture_of,
        convert_backbone_config,
        convert_head_config,
        convert_parameters,
        split_heads,
    )

    reference_config = load_reference_config(config)
    reference = load_checkpoint(checkpoint)
    base = None
    if backbone is not None:
        settings = load_reference_config(Path(backbone) / "config.json")
        if settings.get("model_type") != "fm4npp" or settings.get("use_backbone") is False:
            raise ValueError(f"{backbone}: is not the folder of a converted FM4NPP backbone")
        base = modeling_fm4npp.Fm4nppModel.from_pretrained(backbone)
    models = {}
    try:
        heads = split_heads(reference)
        if not heads and base is not None:
            raise ValueError("is a backbone itself, `--backbone` is for heads")
        for name, parameters in heads.items() or [("", reference)]:
            state_dict = convert_parameters(parameters, is_head=bool(heads))
            if heads:
                model_config = convert_head_config(reference_config, state_dict, base and base.config)
            else:
                model_config = convert_backbone_config(reference_config, state_dict)
            if base is not None:
                state_dict |= {f"model.{parameter}": tensor for parameter, tensor in base.state_dict().items()}
            models[name] = getattr(modeling_fm4npp, architecture_of(state_dict))(model_config).eval()
            load_strictly(models[name], state_dict, str(checkpoint))
    except ValueError as error:
        raise ValueError(str(error) if str(checkpoint) in str(error) else f"{checkpoint}: {error}") from None
    return models.get("", models), None


def convert_epic_fm(checkpoint: str | Path, config: str | Path) -> tuple[Any, Any]:
    """
    A published EPiC flow to a model and its feature extractor. Of a training checkpoint that holds a moving average of
    the weights, that is taken, as the published evaluation does.
    """
    from hepzoo.modeling.conversion_epic_fm import FREQUENCIES, convert_config, convert_features, convert_parameters
    from hepzoo.modeling.modeling_epic_fm import EpicFMForGeneration
    from hepzoo.tokenization.feature_extraction_epic_fm import EpicFMFeatureExtractor

    reference_config = load_reference_config(config)
    reference = load_checkpoint(checkpoint)
    averaged = load_averaged_weights(checkpoint)
    if averaged is not None:
        print(f"{checkpoint}: taking the moving average of its weights")
        reference = averaged
    try:
        state_dict = convert_parameters(reference)
        model_config = convert_config(reference_config, state_dict, reference.get(FREQUENCIES))
        features = convert_features(reference_config, model_config)
        model = EpicFMForGeneration(model_config).eval()
        load_strictly(model, state_dict, str(checkpoint))
    except ValueError as error:
        raise ValueError(str(error) if str(checkpoint) in str(error) else f"{checkpoint}: {error}") from None
    try:
        extractor = EpicFMFeatureExtractor(
            feature_names=features,
            label_names=EpicFMFeatureExtractor().label_names if model_config.num_classes else [],
            condition_names=model_config.condition_names,
            max_num_particles=model_config.max_num_particles,
        )
    except (TypeError, ValueError):
        # features or conditions whose constants are not published
        extractor = None
    return model, extractor


FAMILIES = {
    "epic_fm": convert_epic_fm,
    "fm4npp": convert_fm4npp,
    "omnilearned": convert_omnilearned,
    "cmhca_dirc": convert_cmhca_dirc,
    "spade": convert_spade,
    "omnijet": convert_omnijet,
}
# what to do where a checkpoint does not bring its tokenizer or feature extractor
WITHOUT_TOKENIZER = {
    "epic_fm": "no feature extractor written, the constants of its features are not known; save an "
    "EpicFMFeatureExtractor with yours there",
    "omnilearned": "no feature extractor written, it depends on your data; save an OmniLearnedFeatureExtractor there",
    "cmhca_dirc": "no tokenizer written, its vocabulary is not that of the hpDIRC plane; save a CMHCADircTokenizer "
    "with your geometry there",
    "omnijet": "no tokenizer written, it belongs to the tokenizer network; convert that, and save its "
    "OmniJetTokenizer there too",
    "fm4npp": "no feature extractor written, its bin edges are not in the checkpoint; `hepzoo convert-data "
    "tpc-bin-edges` writes one there with those of your events",
}


def write_card(model, checkpoint: str | Path, folder: Path):
    """A card that says what the model is, and what the paper calls its size: the published files have other names."""
    from hepzoo.modeling.conversion_fm4npp import model_card

    (folder / "README.md").write_text(model_card(model, Path(checkpoint).name), encoding="utf-8")


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
    parser.add_argument(
        "--output",
        required=True,
        help="folder to write; must not exist or be empty. Several heads in one checkpoint become sub-folders of it",
    )
    parser.add_argument(
        "--backbone", help="fm4npp heads: converted backbone to put under them (default: none, they read block outputs)"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """
    Converts; returns the exit status. Wrong input is a `ValueError` or `OSError`, of which the `hepzoo` command makes
    one line and the exit status 2.
    """
    arguments = build_parser().parse_args(argv)
    output = Path(arguments.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output}: exists and is not an empty folder")
    options = {}
    if arguments.backbone is not None:
        if arguments.family != "fm4npp":
            raise ValueError(f"--backbone is for the heads of fm4npp, not for {arguments.family}")
        options["backbone"] = arguments.backbone
    converted, tokenizer = FAMILIES[arguments.family](arguments.checkpoint, arguments.config, **options)
    models = converted if isinstance(converted, dict) else {"": converted}
    output.parent.mkdir(parents=True, exist_ok=True)
    # written beside the target and renamed, so that a failure leaves nothing behind
    with tempfile.TemporaryDirectory(dir=output.parent) as temporary:
        staging = Path(temporary) / output.name
        for name, model in models.items():
            model.save_pretrained(staging / name)
            if arguments.family == "fm4npp":
                write_card(model, arguments.checkpoint, staging / name)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
        if output.exists():
            output.rmdir()
        shutil.move(staging, output)
    for name, model in models.items():
        print(f"{output / name}: {type(model).__name__}, {model.num_parameters():,} parameters")
    if tokenizer is None:
        print(f"{output}: {WITHOUT_TOKENIZER[arguments.family]}")
    return 0
