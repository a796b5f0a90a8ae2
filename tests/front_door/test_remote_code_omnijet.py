"""Saved OmniJet folders carry their code: VQ-VAE, tokenizer, generator, taggers and hybrid work without hepzoo."""

import inspect
import json

import pytest
import torch

import hepzoo
from tests.subprocesses import answer, assert_complete, load_and_load_again, run_python

CODES = 20
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
VQVAE = {**SIZES, "codebook_size": CODES, "latent_size": 3, "intermediate_size": 16}
GPT = {**SIZES, "codebook_size": CODES, "max_position_embeddings": 12}
HYBRID = {**GPT, "architecture": "hybrid", "num_registers": 2, "num_labels": 3}
HYBRID |= {"token_head_size": 16, "token_head_heads": 2, "token_head_intermediate_size": 16}
HYBRID |= {"class_head_size": 16, "class_head_heads": 2, "class_head_intermediate_size": 16}
JETS = {
    "part_pt": [[60.0, 20.0, 5.0], [90.0]],
    "part_etarel": [[0.1, -0.2, 0.05], [0.0]],
    "part_phirel": [[-0.1, 0.3, 0.0], [0.01]],
}

LOAD = """
import json, sys
import torch
from transformers import (
    AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForPreTraining, AutoModelForSequenceClassification,
    AutoTokenizer,
)
remote = {"trust_remote_code": True}

def load(folder):
    return {
        "vqvae": AutoModel.from_pretrained(f"{folder}/vqvae", **remote),
        "tokenizer": AutoTokenizer.from_pretrained(f"{folder}/generator", **remote),
        "generator": AutoModelForCausalLM.from_pretrained(f"{folder}/generator", **remote),
        "backbone": AutoModel.from_pretrained(f"{folder}/generator", **remote),
        "classifier": AutoModelForSequenceClassification.from_pretrained(f"{folder}/classifier", **remote),
        "hybrid": AutoModelForPreTraining.from_pretrained(f"{folder}/hybrid", **remote),
    }

parts = load(sys.argv[1])
observed = summary(**parts)
names = {type(part).__module__ for part in parts.values()} | {type(parts["tokenizer"].vqvae).__module__}
assert all(name.startswith("transformers_modules.") for name in names), names
"""


def summary(vqvae, tokenizer, generator, backbone, classifier, hybrid) -> dict:
    """What must be equal here and there; its source runs there."""
    for model in (vqvae, generator, backbone, classifier, hybrid):
        model.eval()
    inputs = tokenizer(JETS, return_tensors="pt", padding=True)
    features = tokenizer(JETS, return_tensors="pt", padding=True, return_input_ids=False)
    with torch.no_grad():
        reconstructed = vqvae(**features)
        outputs = generator(**inputs, labels=inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100))
        hidden = backbone(**inputs).last_hidden_state
        logits = classifier(**inputs).logits
        heads = hybrid(**features)
        greedy = generator.generate(do_sample=False)
        torch.manual_seed(7)
        sampled = generator.generate(num_return_sequences=4)
    decoded = tokenizer.batch_decode(sampled)
    return {
        "model_types": [model.config.model_type for model in (vqvae, generator, classifier, hybrid)],
        "ids": inputs["input_ids"].tolist(),
        "codes": reconstructed.codes.tolist(),
        "reconstructed": reconstructed.reconstructed.double().abs().sum().item(),
        "loss": outputs.loss.item(),
        "hidden": hidden.double().abs().sum().item(),
        "classes": logits.double().abs().sum().item(),
        "hybrid": heads.generation_logits.double().abs().sum().item() + heads.logits.double().abs().sum().item(),
        "greedy": greedy.tolist(),
        "sampled": sampled.tolist(),
        "num_constituents": decoded["num_constituents"].tolist(),
        "jet_pt": float(decoded["jet_pt"].sum()),
    }


def randomised(model):
    """Norms and gates that begin at 0 or 1 would hide errors."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders with the code and the weights, and what the same models do here."""
    folder = tmp_path_factory.mktemp("remote_code")
    torch.manual_seed(11)
    vqvae = randomised(hepzoo.OmniJetVQVAEModel(hepzoo.OmniJetVQVAEConfig(**VQVAE)))
    tokenizer = hepzoo.OmniJetTokenizer(vqvae=vqvae, model_max_length=12)
    generator = randomised(hepzoo.OmniJetForCausalLM(hepzoo.OmniJetConfig(**GPT)))
    classifier = randomised(hepzoo.OmniJetForSequenceClassification(hepzoo.OmniJetConfig(**GPT, num_labels=3)))
    hybrid = randomised(hepzoo.OmniJetForPreTraining(hepzoo.OmniJetConfig(**HYBRID)))
    vqvae.save_pretrained(folder / "vqvae")
    tokenizer.save_pretrained(folder / "generator")
    for name, model in (("generator", generator), ("classifier", classifier), ("hybrid", hybrid)):
        model.save_pretrained(folder / name)
    return folder, summary(vqvae, tokenizer, generator, generator.model, classifier, hybrid)


def compare(observed: dict, expected: dict):
    for name, value in expected.items():
        assert observed[name] == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value), name


def test_omnijet_loads_generates_saves_and_loads_again_without_hepzoo(saved, tmp_path):
    """What is saved from there is complete again, and loads in a process that has not the first folder's cache."""
    folder, expected = saved
    begin = f"JETS = {JETS!r}\n{inspect.getsource(summary)}\n{LOAD}\n"
    body = """
for name in ("vqvae", "generator", "classifier", "hybrid"):
    parts[name].save_pretrained(f"again/{name}")
parts["tokenizer"].save_pretrained("again/generator")
print(json.dumps(observed))
"""
    for observed in load_and_load_again(begin + body, folder, tmp_path):
        compare(observed, expected)
    assert max(expected["num_constituents"]) > 0


@pytest.mark.parametrize("name", ["vqvae", "generator", "generator/vqvae", "classifier", "hybrid"])
def test_saved_omnijet_folders_are_complete(saved, name):
    folder = saved[0] / name
    assert_complete(folder)
    assert {"AutoConfig", "AutoModel"} <= set(json.loads((folder / "config.json").read_text())["auto_map"])


def test_converted_omnijet_works_without_hepzoo(tmp_path):
    """Golden VQ-VAE and generator through `hepzoo convert`; the tokenizer of one serves the other."""
    from hepzoo.conversion import main as convert
    from tests.golden_sets import DEFAULT_FOLDER

    for golden, name in (("omnijet_vqvae_transformer", "jet_tokenizer"), ("omnijet_gpt", "generator")):
        golden = DEFAULT_FOLDER / golden
        arguments = ["--checkpoint", str(golden / "state_dict.safetensors"), "--config", str(golden / "config.json")]
        assert convert(["omnijet", *arguments, "--output", str(tmp_path / name)]) == 0
    code = f"""
import json, sys
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
remote = {{"trust_remote_code": True}}
tokenizer = AutoTokenizer.from_pretrained(f"{{sys.argv[1]}}/jet_tokenizer", **remote)
vqvae = AutoModel.from_pretrained(f"{{sys.argv[1]}}/jet_tokenizer", **remote)
generator = AutoModelForCausalLM.from_pretrained(f"{{sys.argv[1]}}/generator", **remote).eval()
jets = {JETS!r}
ids = tokenizer(jets, padding=True)["input_ids"]
decoded = tokenizer.batch_decode(ids)
assert type(tokenizer.vqvae).__name__ == type(vqvae).__name__ == "OmniJetVQVAEModel"
greedy = generator.generate(do_sample=False, max_new_tokens=8)
print(json.dumps([ids.tolist(), [row.tolist() for row in decoded["part_pt"]], greedy.tolist()]))
"""
    result = run_python(code, tmp_path, tmp_path, hepzoo=False)
    ids, part_pt, greedy = answer(result)
    tokenizer = hepzoo.OmniJetTokenizer.from_pretrained(tmp_path / "jet_tokenizer")
    expected = tokenizer(JETS, padding=True)["input_ids"]
    assert ids == expected.tolist()
    for found, row in zip(part_pt, tokenizer.batch_decode(expected)["part_pt"], strict=True):
        assert found == pytest.approx(row.tolist(), rel=1e-4)
    generator = hepzoo.OmniJetForCausalLM.from_pretrained(tmp_path / "generator").eval()
    assert greedy == generator.generate(do_sample=False, max_new_tokens=8).tolist()


def test_the_vqvae_comes_from_where_the_tokenizer_came_from(saved, tmp_path, monkeypatch):
    """A subfolder, also if the folder above has another VQ-VAE, and a relative folder that is left in the meantime."""
    folder, expected = saved
    other = hepzoo.OmniJetVQVAEModel(hepzoo.OmniJetVQVAEConfig(**{**VQVAE, "codebook_size": 7}))
    hepzoo.OmniJetTokenizer(vqvae=other).save_pretrained(tmp_path)
    ours = hepzoo.OmniJetTokenizer.from_pretrained(folder / "generator")
    ours.save_pretrained(tmp_path / "jets")
    monkeypatch.chdir(tmp_path)
    below = hepzoo.OmniJetTokenizer.from_pretrained(tmp_path, subfolder="jets")
    relative = hepzoo.OmniJetTokenizer.from_pretrained("jets")
    monkeypatch.chdir(folder)
    for tokenizer in (below, relative):
        assert tokenizer(JETS, padding=True)["input_ids"].tolist() == expected["ids"]


def test_hostile_folder_without_vqvae(tmp_path, monkeypatch):
    """It saves and loads; where the VQ-VAE is needed, nobody else's `jets/vqvae` is looked for on the Hub."""
    import huggingface_hub
    import huggingface_hub.file_download

    def no_network(*args, **kwargs):
        raise AssertionError("the Hub was asked")

    hepzoo.OmniJetTokenizer().save_pretrained(tmp_path / "jets")
    monkeypatch.chdir(tmp_path)
    tokenizer = hepzoo.OmniJetTokenizer.from_pretrained("jets")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_network)
    monkeypatch.setattr(huggingface_hub.file_download, "http_get", no_network)
    tokenizer.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again" / "vqvae").exists()
    assert tokenizer(JETS, return_input_ids=False)["particle_features"][1].shape == (1, 3)
    with pytest.raises(ValueError, match=r"^jets: no VQ-VAE in the folder vqvae$"):
        tokenizer(JETS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vqvae": "jets/vqvae"}, "vqvae must be an OmniJetVQVAEModel, got 'jets/vqvae'"),
        ({"label_names": "label_QCD"}, "label_names must be a list of names, got 'label_QCD'"),
        ({"label_names": 3}, "label_names must be a list of names, got 3"),
        ({"separate_pad_id": "no"}, "separate_pad_id must be True or False, got 'no'"),
    ],
)
def test_hostile_tokenizer_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        hepzoo.OmniJetTokenizer(**arguments)


@pytest.mark.parametrize("function", ["decode", "batch_decode"])
@pytest.mark.parametrize("ids", [None, 3, torch.tensor(3)])
def test_hostile_ids(function, ids):
    with pytest.raises(ValueError, match="must be ids of shape"):
        getattr(hepzoo.OmniJetTokenizer(), function)(ids)
