"""Saved checkpoints carry their code: they load in a process that cannot import hepzoo."""

import json

import pytest
import torch

import hepzoo
from tests.subprocesses import answer, assert_complete, checked, load_and_load_again, run_python

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
KINEMATICS = [[6.0, 30.0], [2.0, 120.0], [9.5, 90.0]]
ROW = {"P": 6.0, "Theta": 30.0, "PDG": 321, "NHits": 3}
ROW |= {"pmtID": [3, 0, 23], "pixelID": [7, 255, 0], "leadTime": [40.0, 20.5, 99.0]}

LOAD = """
import json, sys
import torch
from transformers import (
    AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForTokenClassification,
    AutoTokenizer,
)
remote = {"trust_remote_code": True}

def generate(model):
    ids = model.generate(kinematics=torch.tensor(KINEMATICS), do_sample=False, max_new_tokens=12)
    return ids.tolist()

def observe(folder):
    config = AutoConfig.from_pretrained(folder, **remote)
    tokenizer = AutoTokenizer.from_pretrained(folder, **remote)
    model = AutoModelForCausalLM.from_pretrained(folder, **remote).eval()
    inputs = dict(tokenizer(ROW, return_tensors="pt", padding=True))
    inputs.pop("class_ids")
    with torch.no_grad():
        observed = {
            "model_type": config.model_type,
            "ids": inputs["input_ids"].tolist(),
            "generated": generate(model),
            "space_logits": model(**inputs).logits[0].double().sum().item(),
            "hidden": AutoModel.from_pretrained(folder, **remote)(**inputs).last_hidden_state.double().sum().item(),
        }
        for auto in (AutoModelForSequenceClassification, AutoModelForTokenClassification):
            encoder, info = auto.from_pretrained(folder, output_loading_info=True, **remote)
            assert type(encoder).__name__ == "CMHCADirc" + auto.__name__.removeprefix("AutoModel")
            assert encoder(**inputs).logits.shape[-1] == 1
            observed[auto.__name__] = sorted(info["missing_keys"])
    columns = tokenizer.batch_decode(torch.tensor(observed["ids"]), kinematics=inputs["kinematics"])
    observed["channel"] = columns["channel"][0].tolist()
    modules = {type(thing).__module__ for thing in (config, tokenizer, model)}
    assert all(name.startswith("transformers_modules.") for name in modules), modules
    return observed, model, tokenizer
"""


def code(body: str) -> str:
    return f"KINEMATICS = {KINEMATICS!r}\nROW = {ROW!r}\n{LOAD}\n{body}"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder with the code and the weights, and what the same model does here."""
    folder = tmp_path_factory.mktemp("remote_code") / "generator"
    torch.manual_seed(11)
    model = hepzoo.CMHCADircForCausalLM(hepzoo.CMHCADircConfig(**SIZES)).eval()
    tokenizer = hepzoo.CMHCADircTokenizer()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    inputs = dict(tokenizer(ROW, return_tensors="pt", padding=True))
    inputs.pop("class_ids")
    with torch.no_grad():
        expected = {
            "model_type": "cmhca_dirc",
            "ids": inputs["input_ids"].tolist(),
            "generated": model.generate(
                kinematics=torch.tensor(KINEMATICS), do_sample=False, max_new_tokens=12
            ).tolist(),
            "space_logits": model(**inputs).logits[0].double().sum().item(),
            "hidden": model.model(**inputs).last_hidden_state.double().sum().item(),
        }
    return folder, expected


def compare(observed: dict, expected: dict):
    for name, value in expected.items():
        assert observed[name] == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value), name
    assert sorted(observed["channel"]) == sorted([3 * 256 + 7, 255, 23 * 256])
    assert observed["AutoModelForTokenClassification"] == ["classifier.bias", "classifier.weight"]
    assert observed["AutoModelForSequenceClassification"] == [
        "classifier.bias",
        "classifier.weight",
        "model.cls_token",
    ]


def test_a_saved_folder_is_complete(saved):
    folder, _ = saved
    assert_complete(folder)
    assert set(json.loads((folder / "config.json").read_text())["auto_map"]) == {
        "AutoConfig",
        "AutoModel",
        "AutoModelForCausalLM",
        "AutoModelForSequenceClassification",
        "AutoModelForTokenClassification",
    }


def test_loads_runs_saves_and_loads_again_without_hepzoo(saved, tmp_path):
    """All Auto classes; equal greedy tracks; what is saved from there is complete again."""
    folder, expected = saved
    body = """
observed, model, tokenizer = observe(sys.argv[1])
model.save_pretrained("again")
tokenizer.save_pretrained("again")
print(json.dumps(observed))
"""
    for observed in load_and_load_again(code(body), folder, tmp_path):
        compare(observed, expected)


def test_checkpoints_of_the_trainer_load_without_hepzoo(tmp_path):
    from datasets import Dataset
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

    tokenizer = hepzoo.CMHCADircTokenizer()
    features = []
    for index in range(4):
        encoded = tokenizer({**ROW, "P": 1.0 + index})
        ids = [list(map(int, pair)) for pair in encoded["input_ids"]]
        kinematics = [float(value) for value in encoded["kinematics"]]
        labels = [[-100, -100]] * tokenizer.prefix_length + ids[tokenizer.prefix_length :]
        features.append({"input_ids": ids, "kinematics": kinematics, "labels": labels})
    model = hepzoo.CMHCADircForCausalLM(hepzoo.CMHCADircConfig(**SIZES))
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=2,
        save_steps=1,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=1,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(features),
        data_collator=DataCollatorWithPadding(tokenizer, return_tensors="pt"),
        processing_class=tokenizer,
    )
    trainer.train()
    model.eval()
    with torch.no_grad():
        ids = model.generate(kinematics=torch.tensor(KINEMATICS), do_sample=False, max_new_tokens=12).tolist()
    body = "print(json.dumps(observe(sys.argv[1])[0]))"
    observed = answer(run_python(code(body), tmp_path, tmp_path / "run" / "checkpoint-2", hepzoo=False))
    assert observed["generated"] == ids


def test_hostile_folder_with_code_is_not_run_without_trust(saved, tmp_path):
    """Without `trust_remote_code` the code of the folder stays unread."""
    folder, _ = saved
    body = """
import sys
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1])
except ValueError as error:
    print("trust_remote_code" in str(error))
assert not [name for name in sys.modules if name.startswith("transformers_modules.")]
"""
    result = run_python(body, tmp_path, folder, hepzoo=False)
    assert checked(result).split()[-1] == "True"
