"""Saved FM4NPP folders open with every Auto class, and carry the code that they need."""

import inspect

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForInstanceSegmentation,
    AutoModelForPreTraining,
    AutoModelForTokenClassification,
)

import hepzoo
from tests.subprocesses import answer, assert_complete, run_python

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "head_dim": 16, "num_neighbors": 3}
SIZES |= {"head_size": 24, "head_intermediate_size": 20, "num_prototypes": 6}
AUTO_CLASSES = {
    "AutoModel": (AutoModel, "Fm4nppModel"),
    "AutoModelForPreTraining": (AutoModelForPreTraining, "Fm4nppForPreTraining"),
    "AutoModelForInstanceSegmentation": (AutoModelForInstanceSegmentation, "Fm4nppForTrackFinding"),
    "AutoModelForTokenClassification": (AutoModelForTokenClassification, "Fm4nppForTokenClassification"),
}


def summary(model) -> float:
    """What must be equal here and there; its source runs there."""
    inputs = {"points": torch.rand(2, 9, 4, generator=torch.Generator().manual_seed(2))}
    inputs["attention_mask"] = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    with torch.no_grad():
        outputs = model.eval()(**inputs)
    keys = ("last_hidden_state", "predictions", "mask_logits", "logits")
    key = next(key for key in keys if key in outputs)
    return outputs[key][inputs["attention_mask"].bool()].double().abs().sum().item()


def test_saved_models_open_with_every_auto_class_with_and_without_hepzoo(tmp_path):
    expected = {}
    operators = dict.fromkeys(AUTO_CLASSES, "mamba1") | {"AutoModelForPreTraining": "mamba2"}
    for name, (auto_class, model_class) in AUTO_CLASSES.items():
        folder = tmp_path / name
        torch.manual_seed(1)
        model = getattr(hepzoo, model_class)(hepzoo.Fm4nppConfig(**SIZES, ssm=operators[name]))
        model.save_pretrained(folder)
        expected[name] = summary(model)
        opened = auto_class.from_pretrained(folder)
        assert type(opened) is type(model)
        assert summary(opened) == expected[name]
        # the folder of a head is a backbone too
        assert type(AutoModel.from_pretrained(folder)) is hepzoo.Fm4nppModel
        assert_complete(folder)
    code = f"""
import json, sys
import torch, transformers
{inspect.getsource(summary)}
found = {{}}
for name in {list(expected)}:
    model = getattr(transformers, name).from_pretrained(f"{{sys.argv[1]}}/{{name}}", trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules.")
    found[name] = summary(model)
model.save_pretrained("again")
print(json.dumps(found))
"""
    observed = answer(run_python(code, tmp_path, tmp_path, hepzoo=False))
    assert observed == {name: pytest.approx(value, rel=1e-5) for name, value in expected.items()}
    again = {path.name for path in (tmp_path / "again").iterdir()}
    assert again == {path.name for path in (tmp_path / name).iterdir()}
