"""`hepzoo convert`: every kind of reference checkpoint to a folder that `from_pretrained` loads."""

import json
import os
import pickle
import re

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hepzoo.conversion import main as convert
from hepzoo.modeling.configuration_cmhca_dirc import CMHCADircConfig
from hepzoo.modeling.modeling_cmhca_dirc import (
    CMHCADircForCausalLM,
    CMHCADircForSequenceClassification,
    CMHCADircForTokenClassification,
)
from hepzoo.tokenization.tokenization_cmhca_dirc import CMHCADircTokenizer
from tests.subprocesses import checked, run_python

TINY = {
    "vocab_size": 43,
    "time_vocab_size": 29,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": [4, 2, 4],
    "intermediate_size": 24,
    "max_position_embeddings": 12,
    "attention_dropout": [0.1, 0.0, 0.2],
}
GLUEX = {
    "conditioning_names": ["P", "Theta", "Phi"],
    "conditioning_ranges": [[0.95, 6.5], [0.9, 11.63], [-176.0, 175.5]],
}
KINDS = {
    "dense": (CMHCADircForCausalLM, {}),
    "experts": (CMHCADircForCausalLM, {"num_experts": 4}),
    "classifier": (CMHCADircForSequenceClassification, {}),
    "filter": (CMHCADircForTokenClassification, {}),
    "regression": (CMHCADircForCausalLM, {"time_prediction": "regression", "time_regression_size": 8}),
    "gluex": (CMHCADircForCausalLM, GLUEX),
    "gluex_classifier": (CMHCADircForSequenceClassification, GLUEX),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Several threads on tensors this small only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints of the reference, made from our models: names written down from the published models, not from our table
# ---------------------------------------------------------------------------------------------------------------------


def reference_name(name: str, kind: str) -> str:
    plain = {
        "model.embeddings.space.weight": "token_embedding.weight",
        "model.embeddings.space_position.weight": "pos_embedding.weight",
        "model.embeddings.time_position.weight": "time_pos_embedding.weight",
        "model.cls_token": "cls_token",
        "model.norm.weight": "LN.weight",
        "model.norm.bias": "LN.bias",
        "space_head.weight": "logits_head.weight",
        "space_head.bias": "logits_head.bias",
    }
    if name in plain:
        return plain[name]
    head = {"filter": "sequence_head", "gluex_classifier": "classification_head.1"}.get(kind, "classification_head")
    for ours, theirs in (
        ("model.embeddings.time.", "time_embedding."),
        ("model.embeddings.conditioning.0.", "momentum_embedding."),
        ("model.embeddings.conditioning.1.", "theta_embedding."),
        ("model.embeddings.conditioning.2.", "phi_embedding."),
        ("model.layers.0.attention_norm.", "layers.0.xN."),
        ("model.layers.", "layers."),
        (".attention_norm.", ".LN1."),
        (".time_norm.", ".tN."),
        (".mlp_norm.", ".LN2."),
        (".attention.o_proj.", ".c_proj."),
        (".attention.logit_scale", ".attn.g_scale"),
        (".attention.", ".attn."),
        (".mlp.router.", ".FF.router.router."),
        (".mlp.", ".FF."),
        (".FF.fc", ".FF.nn.fc"),
        ("classifier.", f"{head}."),
        ("time_head.input_proj.", "time_head.nn.0."),
        ("time_head.output_proj.", "time_head.nn.3."),
    ):
        name = name.replace(ours, theirs)
    name = re.sub(r"\.FF\.experts\.(\d)\.fc", r".FF.experts.\1.nn.fc", name)
    name = name.replace(".nn.fc1.", ".nn.0.").replace(".nn.fc2.", ".nn.2.")
    return re.sub(
        r"time_head\.blocks\.(\d)\.(\d)\.",
        lambda match: f"time_head.nn.{int(match[1]) + 1}.linear{int(match[2]) + 1}.",
        name,
    )


def build(kind: str, **changes):
    torch.manual_seed(sorted(KINDS).index(kind))
    model_class, settings = KINDS[kind]
    return model_class(CMHCADircConfig(**{**TINY, **settings, **changes})).eval()


def reference_state_dict(model, kind: str) -> dict[str, torch.Tensor]:
    state_dict = {reference_name(name, kind): tensor.clone() for name, tensor in model.state_dict().items()}
    assert len(state_dict) == len(model.state_dict())
    return state_dict


def reference_config(model) -> dict:
    config = model.config
    settings = {
        "space_vocab": config.vocab_size,
        "time_vocab": config.time_vocab_size,
        "seq_len": config.max_position_embeddings,
        "embed_dim": config.hidden_size,
        "attn_heads": list(config.num_attention_heads),
        "drop_rates": list(config.attention_dropout),
        "kin_size": config.num_conditioning_tokens,
    }
    if config.num_experts > 0:
        settings |= {"num_experts": config.num_experts, "num_classes": config.num_classes}
    for name, (low, high) in zip(config.conditioning_names, config.conditioning_ranges):
        settings |= {f"{name}_min": low, f"{name}_max": high}
    return settings


def training_checkpoint(state_dict: dict, key: str = "net_state_dict") -> dict:
    """What the reference's training writes: weights beside optimizer state, numpy history and counters."""
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.RAdam([parameter], lr=1e-3)
    parameter.sum().backward()
    optimizer.step()
    history = {
        "train_loss": [np.float64(3.5), np.float32(2.5)],
        "val_loss": np.array([3.25, 2.0]),
        "epoch": np.int64(2),
    }
    return {
        key: state_dict,
        "optimizer": optimizer.state_dict(),
        "epoch": 2,
        "history": history,
        "global_step": np.int64(17),
    }


def run_conversion(folder, checkpoint, config) -> str:
    """Writes the files, converts and returns the output folder. `checkpoint`: a path or a state dict."""
    if not isinstance(checkpoint, os.PathLike):
        torch.save(checkpoint, folder / "model.pth")
        checkpoint = folder / "model.pth"
    if not isinstance(config, os.PathLike):
        (folder / "CA_config.json").write_text(json.dumps(config))
        config = folder / "CA_config.json"
    output = folder / "out" / "converted"
    arguments = ["cmhca_dirc", "--checkpoint", str(checkpoint), "--config", str(config), "--output", str(output)]
    assert convert(arguments) == 0
    return output


def assert_refused(folder, checkpoint, config, *messages: str) -> str:
    """One line of `ValueError` with all messages; no output folder and nothing else left behind."""
    with pytest.raises(ValueError) as caught:
        run_conversion(folder, checkpoint, config)
    message = str(caught.value)
    assert type(caught.value).__module__ in ("builtins", "huggingface_hub.errors"), caught.value
    assert "\n" not in message, message
    for expected in messages:
        assert expected in message
    assert not list((folder / "out").glob("**/*"))
    return message


def inputs_for(model) -> dict:
    generator = torch.Generator().manual_seed(5)
    config, length = model.config, 9
    sizes = torch.tensor(config.stream_vocab_sizes) - 3
    ids = 1 + (torch.rand(4, length, config.num_streams, generator=generator) * sizes).long()
    ids[:, : config.num_conditioning_tokens + 1] = 0
    ranges = torch.tensor(config.conditioning_ranges)
    kinematics = ranges[:, 0] + torch.rand(4, len(ranges), generator=generator) * (ranges[:, 1] - ranges[:, 0])
    inputs = {"input_ids": ids, "kinematics": kinematics, "attention_mask": torch.ones(4, length, dtype=torch.long)}
    if config.num_experts > 0:
        inputs["class_ids"] = torch.tensor([0, 1, 1, 0])
    if config.time_prediction == "regression":
        inputs["times"] = torch.rand(4, length, generator=generator)
    return inputs


def assert_same_model(output, model):
    loaded, info = type(model).from_pretrained(output, output_loading_info=True)
    assert not any(info.values()), info
    inputs = inputs_for(model)
    with torch.no_grad():
        expected, actual = model(**inputs), loaded.eval()(**inputs)
    logits = [
        outputs.logits if isinstance(outputs.logits, tuple) else (outputs.logits,) for outputs in (expected, actual)
    ]
    for one, other in zip(*logits, strict=True):
        assert torch.equal(one, other)
    if model.config.time_prediction == "regression":
        assert torch.equal(expected.predicted_times, actual.predicted_times)
    stored = loaded.config
    for name in ("num_attention_heads", "attention_dropout", "conditioning_names", "conditioning_ranges"):
        assert json.dumps(getattr(stored, name)) == json.dumps(getattr(model.config, name)), name
    return loaded


# ---------------------------------------------------------------------------------------------------------------------
# What converts
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_checkpoint_converts_to_an_equal_model(kind, tmp_path):
    model = build(kind)
    checkpoint = training_checkpoint(reference_state_dict(model, kind))
    loaded = assert_same_model(run_conversion(tmp_path, checkpoint, reference_config(model)), model)
    assert loaded.config.num_experts == model.config.num_experts
    assert loaded.config.time_prediction == model.config.time_prediction
    assert os.listdir(tmp_path / "out") == ["converted"]


WRAPPINGS = ("bare", "net_state_dict", "state_dict", "model_state_dict")


@pytest.mark.parametrize(
    ("suffix", "wrapping"),
    # safetensors files hold nothing but tensors
    [(".safetensors", "bare"), *((suffix, wrapping) for suffix in (".pth", ".pt", ".ckpt") for wrapping in WRAPPINGS)],
)
def test_file_types_and_wrappings(suffix, wrapping, tmp_path):
    model = build("dense")
    weights = reference_state_dict(model, "dense")
    path = tmp_path / f"model{suffix}"
    if suffix == ".safetensors":
        save_file(weights, path)
    else:
        torch.save(weights if wrapping == "bare" else training_checkpoint(weights, wrapping), path)
    assert_same_model(run_conversion(tmp_path, path, reference_config(model)), model)


def test_checkpoint_in_the_format_before_torch_1_6(tmp_path):
    model = build("dense")
    path = tmp_path / "model.pth"
    checkpoint = training_checkpoint(reference_state_dict(model, "dense"))
    torch.save(checkpoint, path, _use_new_zipfile_serialization=False)
    assert_same_model(run_conversion(tmp_path, path, reference_config(model)), model)


def test_parameters_with_requires_grad_and_half_precision(tmp_path):
    model = build("dense").half().float()
    weights = {name: torch.nn.Parameter(tensor.half()) for name, tensor in reference_state_dict(model, "dense").items()}
    assert_same_model(run_conversion(tmp_path, weights, reference_config(model)), model)


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module."]
)
def test_prefixes_of_parallel_and_compiled_models(prefix, tmp_path):
    model = build("experts")
    weights = {prefix + name: tensor for name, tensor in reference_state_dict(model, "experts").items()}
    assert_same_model(run_conversion(tmp_path, weights, reference_config(model)), model)


def test_nested_configuration(tmp_path):
    model = build("gluex")
    flat = reference_config(model)
    stats = {name: flat.pop(name) for name in list(flat) if name.endswith(("_min", "_max"))}
    network = {name: flat.pop(name) for name in ("attn_heads", "drop_rates", "embed_dim")}
    nested = {"model": {"network": network, **flat}, "data": {"stats": stats, "files": ["a", "b"]}, "seed": None}
    assert_same_model(run_conversion(tmp_path, reference_state_dict(model, "gluex"), nested), model)


@pytest.mark.parametrize("suffix", [".yaml", ".yml"])
def test_yaml_configuration(suffix, tmp_path):
    import yaml

    model = build("classifier")
    path = tmp_path / f"config{suffix}"
    path.write_text("# made by hand\n" + yaml.safe_dump({"model": reference_config(model)}))
    assert_same_model(run_conversion(tmp_path, reference_state_dict(model, "classifier"), path), model)


def test_sizes_come_from_the_shapes_if_the_configuration_is_silent(tmp_path):
    model = build("experts", num_attention_heads=8, attention_dropout=0.0)
    output = run_conversion(tmp_path, reference_state_dict(model, "experts"), {"seed": 1})
    assert_same_model(output, model)


def test_an_empty_output_folder_is_filled_and_a_full_one_kept(tmp_path):
    model = build("dense")
    output = tmp_path / "out" / "converted"
    output.mkdir(parents=True)
    assert run_conversion(tmp_path, reference_state_dict(model, "dense"), reference_config(model)) == output
    before = {path: path.read_bytes() for path in output.iterdir()}
    with pytest.raises(ValueError, match="converted: exists and is not an empty folder"):
        run_conversion(tmp_path, reference_state_dict(model, "dense"), reference_config(model))
    assert {path: path.read_bytes() for path in output.iterdir()} == before


# ---------------------------------------------------------------------------------------------------------------------
# What is written beside the weights
# ---------------------------------------------------------------------------------------------------------------------


def published_size(**changes):
    sizes = {"vocab_size": 6147, "time_vocab_size": 5923, "hidden_size": 8, "max_position_embeddings": 250}
    return build("dense", **{**sizes, "num_attention_heads": [2, 2, 2], **changes})


def test_a_tokenizer_is_saved_for_the_published_vocabularies(tmp_path):
    from transformers import AutoTokenizer

    model = published_size()
    output = run_conversion(tmp_path, reference_state_dict(model, "dense"), reference_config(model))
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert type(tokenizer) is CMHCADircTokenizer
    assert (tokenizer.vocab_size, tokenizer.time_vocab_size, tokenizer.model_max_length) == (6147, 5923, 250)
    assert tokenizer.legacy_time_decoding
    assert np.asarray(tokenizer.conditioning_ranges).tolist() == [[0.5, 10.0], [25.0, 160.0]]
    row = {"P": 6.0, "Theta": 30.0, "pmtID": [0, 23], "pixelID": [1, 255], "leadTime": [20.0, 30.0], "NHits": 2}
    ids = tokenizer(row, return_tensors="np", padding=True)["input_ids"]
    assert ids.max() == 6145 and ids[0, 0].tolist() == [0, 0]


def test_no_tokenizer_is_saved_for_another_vocabulary(tmp_path, capsys):
    model = build("gluex")
    output = run_conversion(tmp_path, reference_state_dict(model, "gluex"), reference_config(model))
    assert not list(output.glob("token*"))
    assert "no tokenizer written" in capsys.readouterr().out


def test_generators_sample_as_the_published_simulation(tmp_path):
    model = build("dense")
    output = run_conversion(tmp_path, reference_state_dict(model, "dense"), reference_config(model))
    stored = json.loads((output / "generation_config.json").read_text())
    assert (stored["top_k"], stored["temperature"], stored["top_p"]) == (0, 1.05, 0.995)
    assert stored["do_sample"] is True
    loaded = CMHCADircForCausalLM.from_pretrained(output).generation_config
    assert (loaded.top_k, loaded.temperature, loaded.top_p) == (0, 1.05, 0.995)


@pytest.mark.parametrize("kind", ["classifier", "filter"])
def test_classifiers_have_no_generation_config(kind, tmp_path):
    model = build(kind)
    output = run_conversion(tmp_path, reference_state_dict(model, kind), reference_config(model))
    assert not (output / "generation_config.json").exists()
    assert json.loads((output / "config.json").read_text())["architectures"] == [type(model).__name__]


# ---------------------------------------------------------------------------------------------------------------------
# What does not fit: one line with all problems
# ---------------------------------------------------------------------------------------------------------------------


def test_unknown_parameters_are_listed(tmp_path):
    model = build("dense")
    weights = reference_state_dict(model, "dense")
    weights |= {"layers.1.attn.rope": torch.zeros(1), "module.extra_head.weight": torch.zeros(2, 2)}
    assert_refused(
        tmp_path, weights, reference_config(model), "layers.1.attn.rope", "extra_head.weight", "unknown", "model.pth"
    )


def test_missing_parameters_are_listed(tmp_path):
    model = build("experts")
    weights = reference_state_dict(model, "experts")
    for name in ("layers.1.LN2.bias", "layers.2.FF.experts.3.nn.2.weight", "time_head.bias"):
        del weights[name]
    assert_refused(
        tmp_path,
        weights,
        reference_config(model),
        "missing model.layers.1.mlp_norm.bias",
        "missing model.layers.2.mlp.experts.3.fc2.weight",
        "missing time_head.bias",
    )


@pytest.mark.parametrize(
    "name", ["token_embedding.weight", "pos_embedding.weight", "time_embedding.weight", "layers.0.FF.nn.0.weight"]
)
def test_a_missing_parameter_that_gives_a_size(name, tmp_path):
    model = build("dense")
    weights = reference_state_dict(model, "dense")
    del weights[name]
    assert_refused(tmp_path, weights, reference_config(model), "lacks parameters", "model.pth")


def test_a_checkpoint_without_head(tmp_path):
    model = build("dense")
    weights = {n: t for n, t in reference_state_dict(model, "dense").items() if "head" not in n}
    assert_refused(tmp_path, weights, reference_config(model), "none of the heads", "logits_head")


def test_wrong_shapes_are_listed_with_both_shapes(tmp_path):
    model = build("dense")
    weights = reference_state_dict(model, "dense")
    weights["LN.weight"] = torch.zeros(17)
    weights["layers.2.attn.k_proj.weight"] = torch.zeros(16, 8)
    weights["layers.0.attn.g_scale"] = torch.zeros(1)
    assert_refused(
        tmp_path,
        weights,
        reference_config(model),
        "model.norm.weight has shape (17,), expected (16,)",
        "model.layers.2.attention.k_proj.weight has shape (16, 8), expected (16, 16)",
        "model.layers.0.attention.logit_scale has shape (1,), expected ()",
    )


def test_parameters_with_and_without_prefix(tmp_path):
    model = build("dense")
    weights = reference_state_dict(model, "dense")
    weights["module.LN.weight"] = weights["LN.weight"]
    assert_refused(tmp_path, weights, reference_config(model), "module.LN.weight", "twice")


@pytest.mark.parametrize(
    ("setting", "value", "expected"),
    [
        ("space_vocab", 44, "vocab_size = 44, but the checkpoint has 43"),
        ("time_vocab", 30, "time_vocab_size = 30, but the checkpoint has 29"),
        ("embed_dim", 32, "hidden_size = 32, but the checkpoint has 16"),
        ("seq_len", 250, "max_position_embeddings = 250, but the checkpoint has 12"),
        ("attn_heads", [4, 4], "num_hidden_layers = 2, but the checkpoint has 3"),
        ("attn_heads", [], "num_hidden_layers = 0, but the checkpoint has 3"),
        ("num_experts", 2, "num_experts = 2, but the checkpoint has 4"),
        ("attn_heads", [4, 3, 4], "attention heads of block 1"),
        ("num_classes", 3, "num_classes"),
        ("drop_rates", [0.0], "attention_dropout"),
        ("P_min", 20.0, "P"),
    ],
)
def test_a_contradicting_configuration(setting, value, expected, tmp_path):
    model = build("experts")
    weights = reference_state_dict(model, "experts")
    assert_refused(tmp_path, weights, {**reference_config(model), setting: value}, expected)


# ---------------------------------------------------------------------------------------------------------------------
# Hostile input
# ---------------------------------------------------------------------------------------------------------------------


class Payload:
    """Unpickling it would create `path`."""

    def __init__(self, how: str, path):
        code = f"open({str(path)!r}, 'w').close()"
        self.reduced = {
            "os.system": (os.system, (f"touch {path}",)),
            "eval": (eval, (code,)),
            "exec": (exec, (code,)),
            "getattr": (getattr, (os, "system")),
            "builtins.open": (open, (str(path), "w")),
        }[how]

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("how", ["os.system", "eval", "exec", "getattr", "builtins.open"])
@pytest.mark.parametrize("container", ["torch", "torch_legacy", "plain_pickle"])
def test_hostile_pickles_are_not_executed(how, container, tmp_path):
    model = build("dense")
    victim = tmp_path / "executed"
    checkpoint = training_checkpoint(reference_state_dict(model, "dense"))
    checkpoint["history"]["callback"] = Payload(how, victim)
    suffixes = {"torch": ".pth", "torch_legacy": ".pt", "plain_pickle": ".ckpt"}
    path = tmp_path / f"model{suffixes[container]}"
    if how == "getattr":  # functions themselves are pickled by name
        checkpoint["history"]["callback"] = os.system
    if container == "plain_pickle":
        path.write_bytes(pickle.dumps({"epoch": 2, "x": checkpoint["history"]["callback"]}))
    else:
        torch.save(checkpoint, path, _use_new_zipfile_serialization=container == "torch")
    assert_refused(tmp_path, path, reference_config(model), path.name)
    assert not victim.exists()


def test_hostile_pickle_under_the_name_of_another_format(tmp_path):
    model = build("dense")
    victim = tmp_path / "executed"
    for suffix in (".safetensors", ".npz", ""):
        path = tmp_path / f"model{suffix}"
        torch.save({"LN.weight": Payload("os.system", victim)}, path)
        assert_refused(tmp_path, path, reference_config(model), path.name)
        assert not victim.exists()


def test_hostile_pickle_of_a_whole_model(tmp_path):
    model = build("dense")
    path = tmp_path / "model.pth"
    torch.save(torch.nn.Linear(2, 2), path)
    assert_refused(tmp_path, path, reference_config(model), "model.pth", "refused", "Linear")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("kept", [0, 1, 10, 100, 0.5, 0.99])
def test_hostile_truncated_file(kept, legacy, tmp_path):
    model = build("dense")
    path = tmp_path / "model.pth"
    torch.save(reference_state_dict(model, "dense"), path, _use_new_zipfile_serialization=not legacy)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    assert_refused(tmp_path, path, reference_config(model), "model.pth")


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".ckpt", ".safetensors"])
@pytest.mark.parametrize(
    "content",
    [
        b"this is a text file\nwith two lines\n",
        b"\x00" * 64,
        b"PK\x03\x04" + b"\xff" * 200,
        b"\xff" * 8 + b"{}",
        b'\x02\x00\x00\x00\x00\x00\x00\x00{}\n{"not": "tensors"}',
        b"\x80\x02" + b"(" * 5000,
        "λ".encode() * 100,
    ],
    ids=["text", "zeros", "broken_zip", "huge_header", "surplus", "deep_pickle", "unicode"],
)
def test_hostile_file_that_is_no_checkpoint(suffix, content, tmp_path):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    assert_refused(tmp_path, path, {"seed": 1}, path.name)


def test_hostile_safetensors_header(tmp_path):
    model = build("dense")
    path = tmp_path / "model.safetensors"
    save_file(reference_state_dict(model, "dense"), path)
    content = bytearray(path.read_bytes())
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["LN.weight"]["data_offsets"] = [0, 10**15]
    broken = json.dumps(header).encode()
    path.write_bytes(len(broken).to_bytes(8, "little") + broken + content[8 + size :])
    assert_refused(tmp_path, path, reference_config(model), "model.safetensors", "not a safetensors file")


@pytest.mark.parametrize(
    "checkpoint",
    [
        [torch.zeros(2)],
        torch.zeros(3),
        {},
        None,
        7,
        "weights",
        {"net_state_dict": {}},
        {"net_state_dict": [1, 2]},
        {"LN.weight": 3.0},
        {"LN.weight": [torch.zeros(2)]},
        {1: torch.zeros(2)},
        {("LN", "weight"): torch.zeros(2)},
        {None: torch.zeros(2)},
    ],
    ids=lambda value: re.sub(r"\W+", "_", str(value)).strip("_"),
)
def test_hostile_content_that_is_no_state_dict(checkpoint, tmp_path):
    assert_refused(tmp_path, checkpoint, {"seed": 1}, "model.pth")


def test_hostile_folders_and_missing_files(tmp_path):
    model = build("dense")
    weights, config = reference_state_dict(model, "dense"), reference_config(model)
    (tmp_path / "folder.pth").mkdir()
    (tmp_path / "folder.json").mkdir()
    assert_refused(tmp_path, tmp_path / "folder.pth", config, "folder.pth", "no such checkpoint file")
    assert_refused(tmp_path, tmp_path / "missing.pth", config, "missing.pth", "no such checkpoint file")
    assert_refused(tmp_path, weights, tmp_path / "folder.json", "folder.json", "no such configuration file")
    assert_refused(tmp_path, weights, tmp_path / "missing.json", "missing.json", "no such configuration file")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b"embed_dim: 16\n"),
        ("config.json", b"{"),
        ("config.json", b""),
        ("config.json", b"[1, 2]"),
        ("config.json", b"7"),
        ("config.json", b"null"),
        ("config.json", b"\xff\xfe\x00"),
        ("config.json", b"[" * 100_000),
        ("config.yaml", b"a: [1, 2\nb: }"),
        ("config.yaml", b"just text"),
        ("config.yaml", b"- 1\n- 2\n"),
        ("config.yaml", b""),
        ("config.yaml", b"\x00\x01"),
        ("config.yaml", b"a: !!python/object/apply:os.system ['touch executed']\n"),
        ("config.yaml", b"a: !!python/name:os.system\n"),
        ("config", b"\xff\xd8\xff\xe0 a picture"),
    ],
    ids=lambda value: re.sub(r"\W+", "_", value.decode("latin1"))[:25] if isinstance(value, bytes) else value,
)
def test_hostile_configuration_that_is_no_mapping(name, content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(content)
    assert_refused(tmp_path, reference_state_dict(build("dense"), "dense"), tmp_path / name, name)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("attn_heads", "many"),
        ("attn_heads", [4, "four", 4]),
        ("attn_heads", 0),
        ("attn_heads", [4, 0, 4]),
        ("attn_heads", -4),
        ("attn_heads", [4, 4.5, 4]),
        ("drop_rates", "none"),
        ("drop_rates", [0.0, 0.0, -1.0]),
        ("drop_rates", 1.5),
        ("num_classes", 0),
        ("num_classes", -2),
        ("num_classes", "two"),
        ("num_experts", "four"),
        ("space_vocab", "43"),
        ("P_min", "low"),
        ("P_min", float("nan")),
        ("P_max", float("inf")),
        ("P_min", [1, 2]),
        ("time_min", "early"),
        ("time_res", [0.025]),
    ],
)
def test_hostile_values_in_the_configuration(setting, value, tmp_path):
    model = build("experts")
    config = {**reference_config(model), setting: value}
    message = assert_refused(tmp_path, reference_state_dict(model, "experts"), config)
    ours = {"attn_heads": "heads", "drop_rates": "dropout", "space_vocab": "vocab_size", "time_res": "time_res"}
    assert ours.get(setting, setting.removesuffix("_min").removesuffix("_max")) in message


@pytest.mark.parametrize(
    "name",
    [
        "token_embedding.weight",
        "pos_embedding.weight",
        "time_embedding.weight",
        "layers.0.FF.nn.0.weight",
        "momentum_embedding.weight",
        "logits_head.weight",
    ],
)
@pytest.mark.parametrize("shape", [(), (16,), (2, 3, 4), (0,), (0, 0)])
def test_hostile_number_of_dimensions(name, shape, tmp_path):
    model = build("dense")
    weights = reference_state_dict(model, "dense")
    weights[name] = torch.zeros(shape)
    assert_refused(tmp_path, weights, reference_config(model), "model.pth")


# What may not take long or much memory is tried where it can be stopped: one child per case, forked after the imports.
BOUNDED = """
import os, resource, sys, traceback
from hepzoo.cli import main
import hepzoo.conversion, hepzoo.modeling.modeling_cmhca_dirc, yaml

for case in sys.argv[1:]:
    if os.fork() == 0:
        for stream, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(os.path.join(case, name), os.O_WRONLY | os.O_CREAT), stream)
        resource.setrlimit(resource.RLIMIT_AS, (6 * 2**30, 6 * 2**30))
        resource.setrlimit(resource.RLIMIT_CPU, (10, 10))
        options = {"checkpoint": "model.pth", "config": "config.yaml", "output": "out"}
        arguments = [part for name, file in options.items() for part in (f"--{name}", os.path.join(case, file))]
        try:
            code = main(["convert", "cmhca_dirc", *arguments])
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stderr.flush()
        os._exit(code)
    status = os.waitstatus_to_exitcode(os.wait()[1])
    with open(os.path.join(case, "status"), "w") as file:
        file.write(str(status))
"""
SIZE_CASES = ("layer_number", "expanded_tensor", "recursive_configuration", "exponential_configuration")


def hostile_sizes(case: str, weights: dict, config: str) -> tuple[dict, str]:
    if case == "layer_number":
        weights["layers.100000000.LN1.weight"] = torch.zeros(16)
    elif case == "expanded_tensor":  # a few bytes in the file, gigabytes as a model
        weights["token_embedding.weight"] = torch.zeros(1).expand(10**8, 16)
        weights["logits_head.weight"] = torch.zeros(1).expand(10**8, 16)
        weights["logits_head.bias"] = torch.zeros(1).expand(10**8)
    elif case == "recursive_configuration":
        config = "a: &anchor\n  b: *anchor\n"
    elif case == "exponential_configuration":
        levels = [f"l{i}: &l{i} {{a: *l{i - 1}, b: *l{i - 1}, c: *l{i - 1}}}" for i in range(1, 40)]
        config = "\n".join(["l0: &l0 {x: 1}", *levels])
    return weights, config


@pytest.fixture(scope="module")
def hostile_size_folder(tmp_path_factory):
    import yaml

    folder = tmp_path_factory.mktemp("sizes")
    model = build("dense")
    config = reference_config(model)
    for name in ("space_vocab", "seq_len", "attn_heads", "drop_rates"):
        del config[name]
    for case in SIZE_CASES:
        weights, text = hostile_sizes(case, reference_state_dict(model, "dense"), yaml.safe_dump(config))
        (folder / case).mkdir()
        torch.save(weights, folder / case / "model.pth")
        (folder / case / "config.yaml").write_text(text)
    checked(run_python(BOUNDED, folder, *(folder / case for case in SIZE_CASES)))
    return folder


@pytest.mark.parametrize("case", SIZE_CASES)
def test_hostile_sizes_take_neither_time_nor_memory(case, hostile_size_folder):
    """Refused in one line, or converted where the surplus does not matter; never a traceback or a killed process."""
    folder = hostile_size_folder / case
    status, error = (folder / "status").read_text(), (folder / "stderr").read_text()
    if case.endswith("configuration") and status == "0":
        return
    assert status == "2", error[-1500:]
    assert error.startswith("hepzoo: error: ") and error.count("\n") == 1, error[-1500:]
    assert not (folder / "out").exists()
