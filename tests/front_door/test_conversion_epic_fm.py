"""`hepzoo convert epic_fm`: checkpoints as Lightning writes them, safely read; wrong settings and parameters."""

import copy
import json
import re
from functools import partial

import pytest
import torch
import yaml
from safetensors.torch import save_file
from transformers import AutoFeatureExtractor

from hepzoo import EpicFMConfig, EpicFMForGeneration
from hepzoo.conversion import main as convert

SIZES = {"hidden_size": 16, "latent_size": 5, "num_hidden_layers": 2, "num_frequencies": 4, "max_num_particles": 12}
PUBLISHED = {"time_embedding": "cosine", "output_activation": True, "num_inference_steps": 99}


def build(seed=0, **settings):
    torch.manual_seed(seed)
    config = EpicFMConfig(**{**SIZES, **PUBLISHED, **settings})
    return EpicFMForGeneration(config).eval()


def reference_name(name, style):
    name = name.replace("model.layers.", "flows.0.net.nn_list.").replace("model.", "flows.0.net.")
    if style == "plain":
        return name.replace("direction", "weight")
    names = {
        "old": ("weight_g", "weight_v"),
        "new": ("parametrizations.weight.original0", "parametrizations.weight.original1"),
    }[style]
    return name.replace("magnitude", names[0]).replace("direction", names[1])


def reference_state_dict(model, style="old", duplicates=True):
    flow = {"flows.0.frequencies": torch.pi * 2.0 ** torch.arange(model.config.num_frequencies)}
    flow |= {reference_name(name, style): tensor.clone() for name, tensor in model.state_dict().items()}
    return flow | ({f"loss.{name}": tensor.clone() for name, tensor in flow.items()} if duplicates else {})


def reference_config(model):
    """In the levels of the published configuration."""
    config = model.config
    return {
        "model": {
            "features": config.num_features,
            "num_particles": config.max_num_particles,
            "frequencies": config.num_frequencies,
            "hidden_dim": config.hidden_size,
            "latent": config.latent_size,
            "layers": config.num_hidden_layers,
            "n_transforms": 1,
            "activation": config.hidden_act,
            "wrapper_func": "weight_norm" if config.use_weight_norm else "",
            "t_global_cat": config.time_in_global,
            "t_local_cat": config.time_in_local,
            "add_time_to_input": config.time_in_input,
            "t_emb": config.time_embedding,
            "dropout": 0.0,
            "sum_scale": config.sum_scale,
            "loss_type": "FM-OT",
            "criterion": "mse",
            "sigma": config.sigma_min,
            "use_normaliser": False,
            "global_cond_dim": config.num_conditions if config.global_conditions else 0,
            "local_cond_dim": config.num_conditions if config.local_conditions else 0,
        },
        "data": {"conditioning_pt": True, "conditioning_eta": True},
    }


def write(tmp_path, weights, config, suffix=".ckpt"):
    checkpoint, settings = tmp_path / f"model{suffix}", tmp_path / "config.yaml"
    if suffix == ".safetensors":
        save_file(weights, checkpoint)
    else:
        torch.save(weights, checkpoint)
    settings.write_text(yaml.safe_dump(config))
    return ["--checkpoint", str(checkpoint), "--config", str(settings), "--output", str(tmp_path / "output")]


def run(tmp_path, weights, config, **kwargs):
    assert convert(["epic_fm", *write(tmp_path, weights, config, **kwargs)]) == 0
    return EpicFMForGeneration.from_pretrained(tmp_path / "output")


def assert_same(found, expected):
    assert set(found.state_dict()) == set(expected.state_dict())
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name
    ignored = {"dtype", "transformers_version", "_name_or_path", "auto_map", "architectures"}
    a, b = ({k: v for k, v in m.config.to_dict().items() if k not in ignored} for m in (found, expected))
    assert a == b


def assert_refused(tmp_path, weights, config, *expected):
    with pytest.raises(ValueError) as error:
        convert(["epic_fm", *write(tmp_path, weights, config)])
    for text in expected:
        assert text in str(error.value), (text, str(error.value))
    assert "\n" not in str(error.value) and not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    ("settings", "style", "suffix"),
    [
        ({}, "old", ".ckpt"),
        ({}, "new", ".safetensors"),
        ({"use_weight_norm": False}, "plain", ".pt"),
        ({"local_conditions": True, "time_in_input": True, "time_in_global": False}, "old", ".ckpt"),
        ({"global_conditions": False, "local_conditions": True, "time_embedding": "sincos"}, "old", ".ckpt"),
        ({"sum_scale": 0.5, "sigma_min": 0.0, "hidden_act": "relu", "num_hidden_layers": 0}, "old", ".ckpt"),
    ],
)
def test_conversion_keeps_everything(settings, style, suffix, tmp_path):
    model = build(**settings)
    assert_same(run(tmp_path, reference_state_dict(model, style), reference_config(model), suffix=suffix), model)
    extractor = AutoFeatureExtractor.from_pretrained(tmp_path / "output")
    assert extractor.condition_names == ["jet_pt", "jet_eta"] and extractor.max_num_particles == 12
    assert extractor.condition_means == [0, 0] and len(extractor.label_names) == 10


def test_settings_that_the_configuration_does_not_name_are_the_published_ones(tmp_path):
    model = build(num_frequencies=16, max_num_particles=128)
    assert_same(run(tmp_path, reference_state_dict(model), {}), model)


class Callback:
    """Stands for objects of a training framework in a checkpoint."""

    def __init__(self):
        self.settings = {"lr": 1e-3}


def lightning_checkpoint(model, average=None):
    weights = reference_state_dict(model)
    checkpoint = {
        "epoch": 3,
        "state_dict": weights,
        "hyper_parameters": {"optimizer": partial(torch.optim.AdamW, lr=1e-3), "net": Callback()},
        "callbacks": {"ModelCheckpoint{'monitor': 'val/loss'}": {"best_model_score": torch.tensor(0.1)}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}}],
    }
    if average is not None:
        checkpoint["callbacks"]["EMA"] = {"cur_step": 10, "ema_weights": list(reference_state_dict(average).values())}
    return checkpoint


def test_training_checkpoints_are_read_without_running_their_pickles(tmp_path, capsys):
    model = build()
    assert_same(run(tmp_path, lightning_checkpoint(model), reference_config(model)), model)
    assert "moving average" not in capsys.readouterr().out


def test_the_moving_average_is_taken(tmp_path, capsys):
    model, average = build(), build(seed=1)
    assert_same(run(tmp_path, lightning_checkpoint(model, average), reference_config(model)), average)
    assert "taking the moving average of its weights" in capsys.readouterr().out


def test_hostile_moving_averages(tmp_path):
    model, average = build(), build(seed=1)
    checkpoint = lightning_checkpoint(model, average)
    checkpoint["callbacks"]["EMA"]["ema_weights"].pop()
    assert_refused(tmp_path, checkpoint, reference_config(model), "ema_weights has 79 entries, expected 80 tensors")
    checkpoint["callbacks"]["EMA"]["ema_weights"].append("text")
    assert_refused(tmp_path, checkpoint, reference_config(model), "expected 80 tensors")
    checkpoint["callbacks"]["EMA"]["ema_weights"][-1] = torch.zeros(2)
    assert_refused(tmp_path, checkpoint, reference_config(model), "two different versions of flows.0.net")


def test_other_features_and_conditions(tmp_path, capsys):
    model = build(num_features=3, num_classes=0, condition_names=(), global_conditions=False)
    config = reference_config(model)
    config["data"] = {"feature_names": ["part_etarel", "part_dphi", "part_ptrel"]}
    # a network without conditions has none to join
    found = run(tmp_path, reference_state_dict(model), config)
    assert found.config.num_conditions == 0 and found.config.num_features == 3
    assert AutoFeatureExtractor.from_pretrained(tmp_path / "output").label_names == []


@pytest.mark.parametrize(
    ("switches", "names"),
    [
        ({"conditioning_energy": True}, ["jet_pt", "jet_energy", "jet_eta"]),
        ({"conditioning_pt": False, "conditioning_nparticles": True}, ["jet_eta", "jet_nparticles"]),
    ],
)
def test_conditions_have_the_names_of_the_configuration(switches, names, tmp_path):
    model = build(condition_names=names)
    config = reference_config(model)
    config["data"].update(switches)
    assert run(tmp_path, reference_state_dict(model), config).config.condition_names == names
    assert AutoFeatureExtractor.from_pretrained(tmp_path / "output").condition_names == names


def test_features_whose_constants_are_not_known(tmp_path, capsys):
    model = build(num_features=4, condition_names=("a", "b", "c"))
    config = reference_config(model)
    config["data"] = {}
    found = run(tmp_path, reference_state_dict(model), config)
    assert found.config.condition_names == ["condition_0", "condition_1", "condition_2"]
    assert "save an EpicFMFeatureExtractor with yours there" in capsys.readouterr().out
    assert not (tmp_path / "output" / "preprocessor_config.json").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Malformed input
# ---------------------------------------------------------------------------------------------------------------------

HOSTILE_SETTINGS = [
    ("model/n_transforms", 2, "n_transforms = 2, which is not supported"),
    ("model/use_normaliser", True, "use_normaliser = True"),
    ("model/loss_type", "diffusion", "loss_type = 'diffusion'"),
    ("model/wrapper_func", "spectral_norm", "wrapper_func = 'spectral_norm', expected one of"),
    ("model/t_emb", "gaussian", "t_emb = 'gaussian', expected one of"),
    ("model/activation", "maxout", "activation = 'maxout'"),
    ("model/activation", ["relu"], "activation = ['relu']"),
    ("model/hidden_dim", 10**9, "hidden_dim = 1000000000, but the checkpoint has 16"),
    ("model/latent", 16, "latent = 16, but the checkpoint has 5"),
    ("model/layers", 20, "layers = 20, but the checkpoint has 2"),
    ("model/features", 3, "features = 3, but the checkpoint has 13"),
    ("model/features", "thirteen", "features = 'thirteen', expected a finite number"),
    ("model/frequencies", 16, "frequencies = 16, but flows.0.frequencies has shape (4,)"),
    ("model/frequencies", 2.5, "frequencies = 2.5, expected an integer"),
    ("model/num_particles", 0, "num_particles = 0, expected an integer from 1"),
    ("model/t_local_cat", False, "has shape"),
    ("model/add_time_to_input", "yes", "add_time_to_input = 'yes', expected true or false"),
    ("model/global_cond_dim", 13, "but global_cond_dim = 13"),
    ("model/global_cond_dim", -1, "global_cond_dim = -1"),
    ("model/local_cond_dim", 5, "global_cond_dim = 12, local_cond_dim = 5; expected equal or 0"),
    ("model/local_cond_dim", 12, "has shape"),
    ("model/sum_scale", "small", "sum_scale = 'small'"),
    ("model/sigma", 2.0, "`sigma_min` is 2.0"),
    ("model/dropout", -0.1, "`dropout` is -0.1"),
    ("data/conditioning_sdmass", True, "['jet_pt', 'jet_eta', 'jet_sdmass'] as conditions, but global_cond_dim = 12"),
    ("data/feature_names", ["part_etarel"], "expected 13 names"),
    ("data/feature_names", "all", "feature_names = 'all'"),
]


@pytest.mark.parametrize(("path", "value", "expected"), HOSTILE_SETTINGS)
def test_hostile_values_in_the_configuration(path, value, expected, tmp_path):
    model = build()
    config = copy.deepcopy(reference_config(model))
    level, name = path.split("/")
    config[level][name] = value
    assert_refused(tmp_path, reference_state_dict(model), config, expected)


def test_hostile_parameters(tmp_path):
    model = build()
    config, weights = reference_config(model), reference_state_dict(model)
    for name in ("flows.0.net.fc_l1.weight_v", "flows.0.net.nn_list.1.fc_local2.bias", "flows.0.net.fc_g1.weight_g"):
        rest = {key: value for key, value in weights.items() if key.removeprefix("loss.") != name}
        here = name.replace("flows.0.net.nn_list", "layers").replace("flows.0.net.", "")
        here = re.sub("weight_g", "magnitude", re.sub("weight_v", "direction", here))
        assert_refused(tmp_path, rest, config, here)
        for shape in ((2,), (3, 3), (1, 1, 1), (0,)):
            assert_refused(tmp_path, {**rest, name: torch.zeros(shape)}, config, here)
    assert_refused(tmp_path, weights | {"flows.1.net.fc_l1.bias": torch.zeros(16)}, config, "flows.1.net.fc_l1.bias")
    assert_refused(
        tmp_path, weights | {"flows.0.net.nn_list.900000000.fc_local1.bias": torch.ones(1)}, config, "layers"
    )
    assert_refused(
        tmp_path, weights | {"loss.flows.0.net.fc_l1.bias": torch.ones(16)}, config, "two different versions"
    )
    assert_refused(tmp_path, weights | {"loss.other": torch.ones(16)}, config, "loss.other, but not other")
    twice = weights | {"flows.0.net.fc_l1.weight": weights["flows.0.net.fc_l1.weight_v"]}
    assert_refused(tmp_path, twice, config, "flows.0.net.fc_l1.weight")
    weights = reference_state_dict(model, duplicates=False) | {"flows.0.frequencies": torch.ones(4)}
    config["model"]["t_emb"] = "sincos"
    assert_refused(tmp_path, weights, config, "expected pi 2^j")


def test_golden_config_file_is_a_reference_configuration(tmp_path):
    """JSON, with the settings one level down."""
    model = build()
    arguments = write(tmp_path, reference_state_dict(model), {})
    (tmp_path / "config.json").write_text(json.dumps({"hparams": reference_config(model)["model"]}))
    arguments[3] = str(tmp_path / "config.json")
    assert convert(["epic_fm", *arguments]) == 0
    assert_same(EpicFMForGeneration.from_pretrained(tmp_path / "output"), model)
