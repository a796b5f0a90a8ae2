"""`hepzoo convert fm4npp`: checkpoints of training, heads and their backbones, sizes of the paper, bad files."""

import json
import sys
import types

import pytest
import torch
import yaml
from safetensors.torch import load_file

import hepzoo
from hepzoo.cli import main as hepzoo_command
from hepzoo.conversion import main as convert
from hepzoo.modeling.conversion_fm4npp import split_heads
from tests.golden_sets import DEFAULT_FOLDER

BACKBONES = pytest.mark.parametrize("name", ["fm4npp_mamba1", "fm4npp_mamba2"])
HEADS = ("track", "joint", "pid", "noise")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Several threads on tensors this small only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def reference(name: str) -> tuple[dict[str, torch.Tensor], dict]:
    """Parameters and configuration of a reference implementation."""
    folder = DEFAULT_FOLDER / name
    return load_file(folder / "state_dict.safetensors"), json.loads((folder / "config.json").read_text())


def head_of(name: str) -> dict[str, torch.Tensor]:
    return split_heads(reference("fm4npp_tracking")[0])[name]


def run(folder, checkpoint, config: dict, *options: str):
    """Convert what `torch.save` makes of `checkpoint`; returns the folder of the model."""
    torch.save(checkpoint, folder / "model.ckpt")
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    output = folder / "converted"
    arguments = ["--checkpoint", folder / "model.ckpt", "--config", folder / "config.yaml", "--output", output]
    assert convert(["fm4npp", *map(str, arguments), *options]) == 0
    return output


def training_checkpoint(state_dict: dict) -> dict:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    return {"iters": 50_000, "epoch": 3, "model_state": state_dict, "optimizer_state_dict": optimizer.state_dict()}


def reference_names(model) -> dict[str, torch.Tensor]:
    """The state dict of a model as the reference writes it."""
    config, state_dict = model.config, {}
    for name, tensor in model.state_dict().items():
        name = name.removeprefix("model.").replace("embedder.energy_projection", "embedder.proj")
        name = name.replace("embedder.position_projection", "embedder.embed.projection")
        name = name.replace("embedder.output_projection", "embedder.proj2")
        name = name.replace("neighbor_head", "output_layer").replace("norm_f", "norm")
        for layer in range(config.num_hidden_layers):
            name = name.replace(f"layers.{layer}.mixer", f"mamba_layers.{layer}.1")
            name = name.replace(f"layers.{layer}.norm", f"mamba_layers.{layer}.0")
        if name.endswith("in_proj.weight") and config.ssm == "mamba2":
            sizes = [2 * config.inner_size, config.state_size, config.state_size, config.num_ssm_heads]
            zx, B, C, step = tensor.split(sizes)
            state_dict[name.replace("in_proj", "lin_B")] = B
            state_dict[name.replace("in_proj", "lin_C")] = C
            tensor = torch.cat([zx, step])
        state_dict[name] = tensor.clone()
    return state_dict


@BACKBONES
@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod."])
def test_checkpoints_of_training(name, prefix, tmp_path):
    """With optimizer state, from one or several GPUs, with a configuration that leaves out what the shapes tell."""
    state_dict, config = reference(name)
    checkpoint = training_checkpoint({prefix + key: tensor for key, tensor in state_dict.items()})
    folder = run(tmp_path, checkpoint, {"embed_method": "additive", "dropout": 0.1, "headdim": 32})
    model = hepzoo.Fm4nppForPreTraining.from_pretrained(folder).eval()
    for key, tensor in reference_names(model).items():
        assert torch.equal(tensor, state_dict[key]), key
    assert model.config.ssm == name.removeprefix("fm4npp_")
    assert model.config.hidden_dropout == 0.1
    assert (model.config.num_neighbors, model.config.state_size) == (config["klen"], config["d_state"])
    assert model.config.zero_initial_biases


@pytest.mark.parametrize("method", ["add", "concat"])
@pytest.mark.parametrize("position", ["nerf", "ff", "cpe", "none"])
def test_embeddings_are_told_by_the_shapes(method, position, tmp_path):
    settings = {"embedding_method": method, "position_encoding": position, "hidden_size": 32, "num_hidden_layers": 1}
    model = hepzoo.Fm4nppForPreTraining(hepzoo.Fm4nppConfig(**settings)).eval()
    folder = run(tmp_path, reference_names(model), {"pe_method": position})
    again = hepzoo.Fm4nppForPreTraining.from_pretrained(folder).eval()
    assert (again.config.embedding_method, again.config.position_encoding) == (method, position)
    points = torch.rand(1, 5, 4)
    torch.testing.assert_close(again(points).predictions, model(points).predictions, rtol=0, atol=0)


@pytest.mark.parametrize(("size", "file"), [("m1", None), ("m3", "pp_nerf_m1")])
def test_the_card_has_the_name_of_the_paper(size, file, tmp_path):
    """Files of the published models have other numbers."""
    model = hepzoo.Fm4nppForPreTraining(hepzoo.Fm4nppConfig.from_paper_size(size))
    folder = run(tmp_path, reference_names(model), {})
    card = (folder / "README.md").read_text()
    assert f"**{size}** of the paper" in card and f"{model.num_parameters():,}" in card and "model.ckpt" in card
    assert (f"`{file}`" in card) == (file is not None)
    config = hepzoo.Fm4nppConfig.from_pretrained(folder)
    assert (config.paper_size, config.num_neighbors) == (size, 30)


@pytest.mark.parametrize("name", HEADS)
def test_checkpoints_of_single_heads(name, tmp_path):
    """As training saves them, with settings of a package that is not here when they are read."""
    module = types.ModuleType("ruamel_gone")
    Scalar = type("ScalarFloat", (float,), {"__module__": "ruamel_gone"})
    module.ScalarFloat = Scalar
    sys.modules["ruamel_gone"] = module
    try:
        checkpoint = {"epoch": 7, "model_state_dict": head_of(name), "best_loss": 1.5, "params": {"lr": Scalar(1e-4)}}
        torch.save(checkpoint, tmp_path / "head.pth")
    finally:
        del sys.modules["ruamel_gone"]
    config = DEFAULT_FOLDER / "fm4npp_tracking" / "config.json"
    arguments = ["--checkpoint", tmp_path / "head.pth", "--config", config, "--output", tmp_path / "converted"]
    assert convert(["fm4npp", *map(str, arguments)]) == 0
    settings = json.loads((tmp_path / "converted" / "config.json").read_text())
    is_track = name in ("track", "joint")
    model_class = hepzoo.Fm4nppForTrackFinding if is_track else hepzoo.Fm4nppForTokenClassification
    assert settings["architectures"] == [model_class.__name__]
    model = model_class.from_pretrained(tmp_path / "converted")
    assert not model.config.use_backbone and model.config.joint_head == (name == "joint")
    if name == "pid":
        assert model.config.id2label == {0: "other", 1: "pion", 2: "kaon", 3: "proton", 4: "electron"}
    if name == "noise":
        assert model.config.id2label == {0: "signal", 1: "noise"}
    if is_track:
        assert model.config.match_padding
    assert "reads the block outputs of a backbone" in (tmp_path / "converted" / "README.md").read_text()


def test_heads_on_their_backbone(tmp_path):
    """Several heads of one file in sub-folders, each with the backbone: points in, tracks out."""
    folder = DEFAULT_FOLDER / "fm4npp_mamba2"
    arguments = ["--checkpoint", folder / "state_dict.safetensors", "--config", folder / "config.json"]
    assert convert(["fm4npp", *map(str, arguments), "--output", str(tmp_path / "backbone")]) == 0
    backbone = hepzoo.Fm4nppModel.from_pretrained(tmp_path / "backbone").eval()
    state_dict, config = reference("fm4npp_tracking")
    output = run(tmp_path, state_dict, config, "--backbone", str(tmp_path / "backbone"))
    assert {path.name for path in output.iterdir()} == set(HEADS)
    points = load_file(folder / "inputs.safetensors")["points"][:2, :20]
    for name in HEADS:
        architecture = json.loads((output / name / "config.json").read_text())["architectures"][0]
        model, info = getattr(hepzoo, architecture).from_pretrained(output / name, output_loading_info=True)
        assert not any(info.values()), info
        assert model.config.ssm == "mamba2" and model.config.freeze_backbone
        with torch.no_grad():
            found = model.eval()(points)
            expected = model(block_outputs=backbone(points).block_outputs)
        key = "logits" if name in ("pid", "noise") else "mask_logits"
        torch.testing.assert_close(found[key], expected[key], rtol=0, atol=0)
        if name == "track":
            assert model.assign_tracks(found).shape == (2, 20)


# Bad input


def changed(state_dict: dict, key: str, value) -> dict:
    """Without `key` if the value is `None`."""
    return {name: tensor for name, tensor in {**state_dict, key: value}.items() if tensor is not None}


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        ("fm4npp_mamba1", "longformer.weight", torch.ones(2), "unknown parameters: longformer.weight"),
        ("fm4npp_mamba1", "module.norm.weight", torch.ones(32), "twice, with and without prefix"),
        ("fm4npp_mamba1", "norm.weight", None, "missing model.norm_f.weight"),
        ("fm4npp_mamba1", "embedder.proj", None, "missing model.embedder.energy_projection"),
        ("fm4npp_mamba1", "output_layer.weight", None, "lacks parameters: neighbor_head.weight"),
        ("fm4npp_mamba1", "mamba_layers.0.1.out_proj.weight", None, "lacks parameters: model.layers.0.mixer.out_proj"),
        ("fm4npp_mamba1", "mamba_layers.0.1.A_log", torch.ones(64), "A_log has shape (64,), expected a matrix"),
        ("fm4npp_mamba1", "mamba_layers.0.1.conv1d.weight", torch.ones(64), "conv1d.weight and A_log have the shapes"),
        ("fm4npp_mamba1", "mamba_layers.1.1.D", torch.ones(3), "mixer.D has shape (3,), expected (64,)"),
        ("fm4npp_mamba1", "mamba_layers.7.0.weight", torch.ones(32), "layers [0, 1, 2, 7] of model.layers"),
        ("fm4npp_mamba1", "embedder.embed.projection", torch.ones(64, 32), "has 64 rows, expected 63 (nerf)"),
        ("fm4npp_mamba1", "embedder.embed.projection", torch.tensor(1.0), "expected a matrix"),
        ("fm4npp_mamba2", "mamba_layers.1.1.lin_C.weight", None, "lacks parameters: model.layers.1.mixer.lin_C.weight"),
        ("fm4npp_mamba2", "mamba_layers.0.1.lin_B.weight", torch.ones(16, 3), "lin_B and lin_C of model.layers.0"),
        ("fm4npp_mamba2", "mamba_layers.0.1.lin_B.weight", torch.tensor(1.0), "expected a matrix"),
        ("fm4npp_mamba2", "mamba_layers.0.1.dt_bias", torch.ones(999), "in_proj, lin_B and lin_C"),
        ("fm4npp_mamba2", "mamba_layers.0.1.A_log", torch.ones(0), "A_log have the shapes"),
        ("fm4npp_tracking", "track.refinement_layers.0.cross_attn.attn.in_proj_weight", torch.ones(32, 32), "expected"),
        ("fm4npp_tracking", "track.prototype_embed.weight", torch.tensor(1.0), "expected a matrix"),
        ("fm4npp_tracking", "track.prototype_embed.weight", None, "lacks parameters: head.prototypes.weight"),
        ("fm4npp_tracking", "track.refinement_layers.1.ffn.ffn.0.bias", None, "missing head.layers.1.feed_forward.fc1"),
        ("fm4npp_tracking", "pid.weighted_avg_weights", None, "belong to no head: pid.SA_layers"),
        ("fm4npp_tracking", "pid.mamba_layers.0.0.weight", torch.ones(3), "unknown parameters: mamba_layers"),
        ("fm4npp_tracking", "../../x.weighted_avg_weights", torch.ones(2), "head under the name '../../x.'"),
        ("fm4npp_tracking", "weighted_avg_weights", torch.ones(2), "unknown parameters"),
        ("fm4npp_mamba1", "norm.weight", torch.full((32,), torch.nan), "not finite numbers: model.norm_f.weight"),
        (
            "fm4npp_tracking",
            "pid.weighted_avg_weights",
            torch.tensor([1.0, -torch.inf]),
            "not finite numbers: head.reader.layer_weights",
        ),
    ],
)
def test_hostile_checkpoints(name, key, value, message, tmp_path):
    state_dict, config = reference(name)
    with pytest.raises(ValueError) as error:
        run(tmp_path, changed(state_dict, key, value), config)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert str(tmp_path / "model.ckpt") in str(error.value)
    assert {path.name for path in tmp_path.iterdir()} == {"model.ckpt", "config.yaml"}


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("fm4npp_mamba1", {"embed_dim": 64}, "says embed_dim = 64, but the checkpoint has 32"),
        ("fm4npp_mamba1", {"num_layers": 12}, "says num_layers = 12"),
        ("fm4npp_mamba1", {"klen": 30}, "says klen = 30"),
        ("fm4npp_mamba1", {"embed_method": "concat"}, "says embed_method = 'concat'"),
        ("fm4npp_mamba1", {"pe_method": "ff"}, "says pe_method = 'ff'"),
        ("fm4npp_mamba1", {"mambaversion": "mamba2"}, "says mambaversion = 'mamba2'"),
        ("fm4npp_mamba1", {"dropout": "much"}, "says dropout = 'much', expected a finite number"),
        ("fm4npp_mamba1", {"loss_bin": None, "loss_weight": None, "loss_reweight": True}, "needs `loss_bin_edges`"),
        ("fm4npp_mamba1", {"loss_bin": [1]}, "one edge more than weights"),
        ("fm4npp_mamba1", {"loss_reweight": "yes"}, "loss_reweight"),
        ("fm4npp_mamba1", {"rep_aaai": "false"}, "says rep_aaai = 'false', expected true or false"),
        ("fm4npp_mamba2", {"rep_aaai": True, "nexttoken": [1]}, "says nexttoken = [1], expected true or false"),
        ("fm4npp_tracking", {"rms_eps": 0.001}, "says layer_norm_eps = 1e-05 and rms_eps = 0.001, expected one"),
        ("fm4npp_tracking", {"n_proto": 150}, "says n_proto = 150, but the checkpoint has 12"),
        ("fm4npp_tracking", {"heads": 5}, "not a multiple"),
        ("fm4npp_tracking", {"heads": 2.5}, "says heads = 2.5, expected an integer"),
        ("fm4npp_tracking", {"focal": {"gamma": 3}}, "says gamma = 3, but the checkpoint has 2"),
        ("fm4npp_tracking", {"no_object_class": 1}, "says no_object_class = 1"),
    ],
)
def test_hostile_reference_configurations(name, settings, message, tmp_path):
    state_dict, config = reference(name)
    with pytest.raises(ValueError) as error:
        run(tmp_path, state_dict, {**config, **settings})
    assert message in str(error.value)
    assert not (tmp_path / "converted").exists()


class Payload:
    def __reduce__(self):
        return eval, ("open('executed', 'w').close()",)


def test_hostile_pickles_are_not_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = {"model_state": reference("fm4npp_mamba1")[0], "params": Payload()}
    with pytest.raises(ValueError, match="refused, it holds more than tensors"):
        run(tmp_path, checkpoint, {})
    assert not (tmp_path / "executed").exists()


def test_hostile_backbones(tmp_path, capsys):
    state_dict, config = reference("fm4npp_tracking")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "omnijet"}')
    for folder, message in ((tmp_path / "absent", "no such"), (tmp_path / "other", "is not the folder of a converted")):
        with pytest.raises(ValueError, match=message):
            run(tmp_path, state_dict, config, "--backbone", str(folder))
    small = hepzoo.Fm4nppForPreTraining(hepzoo.Fm4nppConfig(hidden_size=32, num_hidden_layers=2, state_size=4))
    small.save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match="reads 2 blocks of width 64, but the backbone has 2 of width 32"):
        run(tmp_path, state_dict, config, "--backbone", str(tmp_path / "small"))
    with pytest.raises(ValueError, match="is a backbone itself"):
        run(tmp_path, *reference("fm4npp_mamba1"), "--backbone", str(tmp_path / "small"))
    arguments = ["spade", "--checkpoint", "x", "--config", "y", "--output", str(tmp_path / "z"), "--backbone", "b"]
    assert hepzoo_command(["convert", *arguments]) == 2
    assert (
        capsys.readouterr().err.splitlines()[-1]
        == "hepzoo: error: --backbone is for the heads of fm4npp, not for spade"
    )
