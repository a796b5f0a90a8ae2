"""Saved OmniLearned models of every class carry their code: they open in a process that cannot import hepzoo."""

import inspect
import json

import numpy as np
import pytest
import torch

import hepzoo
from tests.subprocesses import answer, assert_complete, run_python

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_head_layers": 1, "num_neighbors": 3}
SIZES |= {"num_labels": 2, "num_particle_types": 9, "num_additional_features": 4, "use_time": True}
AUTO_CLASSES = {
    "OmniLearnedForSequenceClassification": "AutoModelForSequenceClassification",
    "OmniLearnedForTokenClassification": "AutoModelForTokenClassification",
    "OmniLearnedForPreTraining": "AutoModelForPreTraining",
    "OmniLearnedForGeneration": "AutoModelForPreTraining",
}


def jets() -> dict[str, list]:
    """Three jets in the columns that the feature extractor needs."""
    random = np.random.default_rng(1)
    columns: dict[str, list] = {}
    for count in (9, 4, 1):
        px, py, pz = random.normal((50.0, 0.0, 20.0), 5.0, (count, 3)).T
        values = {"part_px": px, "part_py": py, "part_pz": pz, "part_energy": np.sqrt(px**2 + py**2 + pz**2)}
        values |= {f"part_{name}": random.normal(0, 0.1, count) for name in ("d0val", "dzval")}
        values |= {f"part_{name}": random.uniform(0.01, 0.1, count) for name in ("d0err", "dzerr")}
        values |= {"part_charge": np.ones(count)}
        kinds = ("ChargedHadron", "NeutralHadron", "Photon", "Electron", "Muon")
        values |= {f"part_is{kind}": np.full(count, kind == "ChargedHadron") for kind in kinds}
        for name, value in values.items():
            columns.setdefault(name, []).append([float(number) for number in value])
    return columns


def summary(extractor, model, rows: dict) -> float:
    """What must be equal here and there; its source runs there."""
    batch = extractor(rows, return_tensors="pt", return_class_ids=False)
    names = ("particles", "attention_mask", "particle_ids", "additional_features")
    with torch.no_grad():
        output = model.eval().model(**{name: batch[name] for name in names})
    states = output.last_hidden_state
    return states.double().abs().sum().item() + sum(p.double().abs().sum().item() for p in model.parameters())


LOAD = """
import json, sys
import torch, transformers
rows, auto_classes = json.loads(sys.argv[2]), json.loads(sys.argv[3])
found = {}
for name, auto_class in auto_classes.items():
    folder = f"{sys.argv[1]}/{name}"
    extractor = transformers.AutoFeatureExtractor.from_pretrained(folder, trust_remote_code=True)
    model = getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=True)
    body = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert (type(model).__name__, type(body).__name__) == (name, "OmniLearnedModel")
    assert all(type(thing).__module__.startswith("transformers_modules.") for thing in (extractor, model, body))
    found[name] = summary(extractor, model, rows)
    model.save_pretrained("again/" + name)
    extractor.save_pretrained("again/" + name)
print(json.dumps(found))
"""


def test_omnilearned_of_every_class_loads_and_saves_again_without_hepzoo(tmp_path):
    rows, expected = jets(), {}
    for name in AUTO_CLASSES:
        torch.manual_seed(1)
        extractor = hepzoo.OmniLearnedFeatureExtractor(use_particle_ids=True, use_additional_features=True)
        model = getattr(hepzoo, name)(hepzoo.OmniLearnedConfig(**SIZES))
        model.save_pretrained(tmp_path / name)
        extractor.save_pretrained(tmp_path / name)
        expected[name] = summary(extractor, model, rows)
    code = f"import torch\n{inspect.getsource(summary)}\n{LOAD}"
    arguments = (tmp_path, json.dumps(rows), json.dumps(AUTO_CLASSES))
    observed = answer(run_python(code, tmp_path, *arguments, hepzoo=False))
    assert observed == {name: pytest.approx(value, rel=1e-5) for name, value in expected.items()}
    for name in AUTO_CLASSES:
        saved = {path.name for path in (tmp_path / name).iterdir()}
        assert {path.name for path in (tmp_path / "again" / name).iterdir()} == saved
        assert_complete(tmp_path / name)
