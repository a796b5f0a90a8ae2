"""Saved SPADE checkpoints carry their code: they load and generate in a process that cannot import hepzoo."""

import inspect
import json

import pytest
import torch

import hepzoo
from tests.subprocesses import answer, assert_complete, load_and_load_again, run_python

SHOWER_SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
SHOWER_SIZES |= {"nbins": [5, 4, 6], "max_num_hits": 12, "stop_hidden_size": 8}
SHOWER = {"incident_energy": 30.0, "x": [4, 0, 2], "y": [0, 3, 1], "z": [5, 0, 2], "energy": [0.5, 2.0, 8.0]}

SPADE_LOAD = """
import json, sys
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
remote = {"trust_remote_code": True}

def observe(folder):
    config = AutoConfig.from_pretrained(folder, **remote)
    tokenizer = AutoTokenizer.from_pretrained(folder, **remote)
    model = AutoModelForCausalLM.from_pretrained(folder, **remote).eval()
    inputs = tokenizer(SHOWER, return_tensors="pt", padding=True)
    with torch.no_grad():
        outputs = model(**inputs, labels=inputs["input_ids"])
        hidden = AutoModel.from_pretrained(folder, **remote)(**inputs).last_hidden_state
        generated = model.generate(incident_energy=[20.0, 70.0], do_sample=False)
        torch.manual_seed(7)
        sampled = model.generate(incident_energy=[20.0, 70.0], num_hits=[3, 9])
    modules = {type(thing).__module__ for thing in (config, tokenizer, model)}
    assert all(name.startswith("transformers_modules.") for name in modules), modules
    observed = summary(config, tokenizer, inputs, outputs, hidden, generated, sampled)
    return observed, model, tokenizer
"""


def summary(config, tokenizer, inputs, outputs, hidden, generated, sampled) -> dict:
    """What must be equal here and there; its source runs there."""
    decoded = tokenizer.batch_decode(
        sampled.sequences,
        hit_energy=sampled.continuous["hit_energy"],
        num_hits=sampled.num_hits,
        incident_energy=[20.0, 70.0],
    )
    return {
        "model_type": config.model_type,
        "ids": inputs["input_ids"].tolist(),
        "hit_energy": inputs["hit_energy"].sum().item(),
        "loss": outputs.loss.item(),
        "hidden": hidden.double().sum().item(),
        "greedy": generated.sequences.tolist(),
        "greedy_num_hits": generated.num_hits.tolist(),
        "sampled": sampled.sequences.tolist(),
        "rows": {name: [list(map(float, row)) for row in decoded[name]] for name in ("x", "y", "z")},
    }


@pytest.fixture(scope="module")
def saved_spade(tmp_path_factory):
    """Folder with the code and the weights, and what the same model does here."""
    folder = tmp_path_factory.mktemp("remote_code") / "spade"
    torch.manual_seed(11)
    model = hepzoo.SpadeForCausalLM(hepzoo.SpadeConfig(**SHOWER_SIZES)).eval()
    tokenizer = hepzoo.SpadeTokenizer.from_model_config(model.config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    inputs = tokenizer(SHOWER, return_tensors="pt", padding=True)
    with torch.no_grad():
        outputs = model(**inputs, labels=inputs["input_ids"])
        hidden = model.model(**inputs).last_hidden_state
        generated = model.generate(incident_energy=[20.0, 70.0], do_sample=False)
        torch.manual_seed(7)
        sampled = model.generate(incident_energy=[20.0, 70.0], num_hits=[3, 9])
    return folder, summary(model.config, tokenizer, inputs, outputs, hidden, generated, sampled)


def compare_spade(observed: dict, expected: dict):
    for name, value in expected.items():
        assert observed[name] == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value), name


def test_spade_loads_generates_saves_and_loads_again_without_hepzoo(saved_spade, tmp_path):
    """What is saved from there is complete again, and loads in a process that has not the first one's cache."""
    folder, expected = saved_spade
    begin = f"SHOWER = {SHOWER!r}\n{inspect.getsource(summary)}\n{SPADE_LOAD}\n"
    body = """
observed, model, tokenizer = observe(sys.argv[1])
model.save_pretrained("again")
tokenizer.save_pretrained("again")
print(json.dumps(observed))
"""
    for observed in load_and_load_again(begin + body, folder, tmp_path):
        compare_spade(observed, expected)
    assert [len(row) for row in expected["rows"]["x"]] == [3, 9]


def test_a_saved_spade_folder_is_complete(saved_spade):
    folder, _ = saved_spade
    assert_complete(folder)
    config = json.loads((folder / "config.json").read_text())
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}


def test_converted_spade_loads_and_generates_without_hepzoo(tmp_path):
    """A golden folder of the other mode through `hepzoo convert`, with its published settings of generation."""
    from hepzoo.conversion import main as convert
    from tests.golden_sets import DEFAULT_FOLDER

    golden = DEFAULT_FOLDER / "spade" / "combined"
    arguments = ["--checkpoint", str(golden / "state_dict.safetensors"), "--config", str(golden / "config.json")]
    assert convert(["spade", *arguments, "--output", str(tmp_path / "converted")]) == 0
    code = """
import json, sys
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
generated = model.generate(incident_energy=[15.0, 42.0, 97.5], do_sample=False)
assert type(model).__module__.startswith("transformers_modules.")
print(json.dumps([generated.sequences.tolist(), generated.num_hits.tolist(), model.generation_config.stop_published]))
"""
    result = run_python(code, tmp_path, tmp_path / "converted", hepzoo=False)
    observed = answer(result)
    model = hepzoo.SpadeForCausalLM.from_pretrained(tmp_path / "converted").eval()
    with torch.no_grad():
        expected = model.generate(incident_energy=[15.0, 42.0, 97.5], do_sample=False)
    assert observed == [expected.sequences.tolist(), expected.num_hits.tolist(), True]
