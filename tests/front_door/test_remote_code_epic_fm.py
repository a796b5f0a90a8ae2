"""Saved EPiC flows carry their code: they load and generate in a process that cannot import hepzoo."""

import inspect
import json

import numpy as np
import pytest
import torch

import hepzoo
from hepzoo.tokenization.condition_density import JetConditionDensity
from tests.subprocesses import assert_complete, load_and_load_again

SIZES = {"hidden_size": 16, "latent_size": 5, "num_hidden_layers": 2, "num_frequencies": 4, "num_inference_steps": 3}

LOAD = """
import json, sys
import torch
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForPreTraining
remote = {"trust_remote_code": True}

def observe(folder):
    config = AutoConfig.from_pretrained(folder, **remote)
    extractor = AutoFeatureExtractor.from_pretrained(folder, **remote)
    model = AutoModelForPreTraining.from_pretrained(folder, **remote).eval()
    base = AutoModel.from_pretrained(folder, **remote).eval()
    modules = {type(thing).__module__ for thing in (config, extractor, model, base)}
    assert all(name.startswith("transformers_modules.") for name in modules), modules
    return summary(extractor, model, base), model, extractor
"""


def summary(extractor, model, base) -> dict:
    """What must be equal here and there; its source runs there."""
    request = extractor.sample_conditions([0, 8, 8], seed=1, return_tensors="pt")
    sample = model.generate(**request, generator=torch.Generator().manual_seed(2))
    jets = extractor.batch_decode(sample, labels=request["labels"], conditions=request["conditions"])
    inputs = {"class_ids": request["labels"], "conditions": request["conditions"]}
    velocity = base(sample.particles, 0.3, sample.attention_mask, **inputs).velocity
    return {
        "num_particles": request["num_particles"].tolist(),
        "particles": sample.particles.double().abs().sum().item(),
        "velocity": velocity.double().abs().sum().item(),
        "energy": [float(sum(jet)) for jet in jets["part_energy"]],
        "columns": sorted(jets),
    }


def compare(observed: dict, expected: dict):
    for name, value in expected.items():
        assert observed[name] == (value if name in ("num_particles", "columns") else pytest.approx(value, rel=1e-3)), (
            name
        )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("remote_code") / "epic_fm"
    torch.manual_seed(3)
    model = hepzoo.EpicFMForGeneration(hepzoo.EpicFMConfig(**SIZES)).eval()
    extractor = hepzoo.EpicFMFeatureExtractor()
    rng = np.random.default_rng(0)
    conditions = np.stack([rng.uniform(500, 1000, 60), rng.normal(0, 0.5, 60)], axis=-1)
    extractor.density = JetConditionDensity.fit(
        rng.integers(5, 40, 60), conditions, np.repeat([0, 8], 30), num_classes=10
    )
    model.save_pretrained(folder)
    extractor.save_pretrained(folder)
    return folder, summary(extractor, model, model.model)


def test_epic_fm_loads_generates_saves_and_loads_again_without_hepzoo(saved, tmp_path):
    folder, expected = saved
    body = """
observed, model, extractor = observe(sys.argv[1])
model.save_pretrained("again")
extractor.save_pretrained("again")
print(json.dumps(observed))
"""
    for observed in load_and_load_again(f"{inspect.getsource(summary)}\n{LOAD}\n{body}", folder, tmp_path):
        compare(observed, expected)


def test_a_saved_epic_fm_folder_is_complete(saved):
    folder, _ = saved
    assert_complete(folder)
    config = json.loads((folder / "config.json").read_text())
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForPreTraining"}
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    assert set(settings["auto_map"]) == {"AutoFeatureExtractor"}
    assert {"condition_density.safetensors", "condition_density.py"} <= {path.name for path in folder.iterdir()}
