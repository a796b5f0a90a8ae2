"""`hepzoo convert omnilearned`: checkpoints and configurations in the published layouts, and broken ones."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForPreTraining, AutoModelForSequenceClassification, AutoModelForTokenClassification

from hepzoo.conversion import main as convert
from hepzoo.modeling.configuration_omnilearned import OmniLearnedConfig
from hepzoo.modeling.modeling_omnilearned import OmniLearnedForGeneration, OmniLearnedForSequenceClassification
from tests.golden_sets import GoldenSet

PARTS = {"body": "body", "classifier": "classifier_head", "generator": "generator_head"}


def reference(name: str) -> tuple[dict, dict, GoldenSet]:
    """Parameters and constructor arguments of a published model, and its inputs and outputs."""
    from safetensors.torch import load_file

    golden = GoldenSet(name)
    return load_file(golden.path("state_dict.safetensors")), dict(golden.config["kwargs"]), golden


def run(folder, checkpoint, config: dict, auto_class=None, name="converted"):
    """Convert a file, or what is saved as one."""
    if isinstance(checkpoint, dict):
        path = folder / f"{name}.pt"
        torch.save(checkpoint, path)
        checkpoint = path
    (folder / "config.json").write_text(json.dumps(config))
    arguments = ["--checkpoint", str(checkpoint), "--config", str(folder / "config.json")]
    assert convert(["omnilearned", *arguments, "--output", str(folder / name)]) == 0
    return auto_class.from_pretrained(folder / name).eval()


def training_checkpoint(state_dict: dict) -> dict:
    """As the published training saves: a dictionary per part, averages, optimizer, schedule, epoch, loss."""
    parts: dict = {}
    for name, tensor in state_dict.items():
        part, _, rest = name.partition(".")
        parts.setdefault(PARTS[part], {})[rest] = tensor
    averages = {
        f"ema_{part}": {name: 2 * tensor for name, tensor in parts.get(key, {}).items()}
        for part, key in (("body", "body"), ("generator", "generator_head"))
    }
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones(2)
    optimizer.step()
    return {
        **parts,
        **averages,
        "optimizer": optimizer.state_dict(),
        "sched": {"last_epoch": 3},
        "epoch": 7,
        "loss": 1.5,
    }


@torch.no_grad()
def test_published_training_checkpoint(tmp_path):
    state_dict, options, golden = reference("omnilearned_pretrain")
    model = run(tmp_path, training_checkpoint(state_dict), options, AutoModelForPreTraining)
    inputs = golden.inputs
    outputs = model(
        inputs["X"],
        particle_ids=inputs["pid"],
        additional_features=inputs["add_info"],
        labels=inputs["y"],
        time=inputs["time"],
        noise=inputs["noise"],
    )
    torch.testing.assert_close(outputs.logits, golden.outputs["y_pred"], rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(outputs.loss.view(1), golden.outputs["total_plain"], rtol=1e-4, atol=2e-5)
    expected = {
        "mask_rule": "log_pt",
        "published_neighbors": True,
        "class_balancing": True,
        "loss_reduction": "jet",
        "contrastive_weighting": "batch",
        "truncate_multiplicity": True,
        "objectives": ["classification", "generation"],
    }
    assert {name: getattr(model.config, name) for name in expected} == expected

    # the averages, which hold no classifier, for generation
    del options["mode"]
    model = run(
        tmp_path, training_checkpoint(state_dict), {**options, "use_ema": True}, AutoModelForPreTraining, "averaged"
    )
    assert type(model) is OmniLearnedForGeneration
    torch.testing.assert_close(model.model.tokens, 2 * state_dict["body.token"])
    torch.testing.assert_close(model.generator.out.weight, 2 * state_dict["generator.out.weight"])


def test_hostile_wish_for_averages(tmp_path):
    state_dict, options, _ = reference("omnilearned_generator")
    with pytest.raises(ValueError, match="has no averaged weights"):
        run(tmp_path, state_dict, {**options, "use_ema": True}, AutoModelForPreTraining)


@torch.no_grad()
def test_lightning_checkpoint_of_the_study(tmp_path):
    state_dict, options, golden = reference("omnilearned_mpm")
    checkpoint = {
        "state_dict": {f"model.{name}": tensor for name, tensor in state_dict.items()},
        "hyper_parameters": {"model": options, "lr": 1e-4},
        "epoch": 3,
        "pytorch-lightning_version": "2.5",
    }
    model = run(tmp_path, checkpoint, options, AutoModelForPreTraining)
    inputs = golden.inputs
    outputs = model(
        inputs["X"],
        particle_ids=inputs["pid"],
        additional_features=inputs["add_info"],
        masked_positions=inputs["mask_before"].bool() & ~inputs["mask_after"].bool(),
    )
    torch.testing.assert_close(outputs.masked_predictions, golden.outputs["masked_pred"], rtol=1e-4, atol=2e-5)
    assert model.config.loss_reduction == "batch" and model.config.codebook_size == 0


@torch.no_grad()
def test_sizes_come_from_the_shapes(tmp_path):
    """What shapes tell needs no configuration; neighbours and coordinates do."""
    state_dict, options, golden = reference("omnilearned_classifier")
    few = {"K": options["K"], "num_coord": options["num_coord"]}
    model = run(tmp_path, state_dict, few, AutoModelForSequenceClassification)
    inputs = golden.inputs
    logits = model(
        inputs["X"], particle_ids=inputs["pid"], additional_features=inputs["add_info"], conditions=inputs["cond"]
    ).logits
    torch.testing.assert_close(logits, golden.outputs["y_pred"], rtol=1e-4, atol=2e-5)


def test_heads_of_published_widths_are_known(tmp_path):
    """Without interactions nothing tells the number of heads but the published table."""
    config = OmniLearnedConfig.from_paper_size("micro", use_interaction=False, use_local_interaction=False)
    torch.manual_seed(0)
    ours = OmniLearnedForSequenceClassification(config).state_dict()
    renamed = {}
    for name, tensor in ours.items():
        for here, there in (
            ("self_attn.qkv_proj.weight", "attn.in_proj_weight"),
            ("self_attn.o_proj", "attn.out_proj"),
            ("model.tokens", "body.token"),
            ("model.local_embedding.mlp", "body.local_physics.mlp"),
            ("model.local_embedding.layers", "body.local_physics.in_blocks"),
            ("model.embed_particles", "body.embed"),
            ("model.layers", "body.in_blocks"),
            ("model.norm", "body.norm"),
            ("classifier.layers", "classifier.in_blocks"),
            ("classifier.mlp", "classifier.fc"),
        ):
            name = name.replace(here, there)
        renamed[name] = tensor
    model = run(tmp_path, renamed, {"K": 15}, AutoModelForSequenceClassification)
    assert model.config.num_attention_heads == 4 and model.config.num_neighbors == 15
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, ours[name])


def test_regression_and_segmentation(tmp_path):
    state_dict, options, _ = reference("omnilearned_classifier")
    model = run(tmp_path, state_dict, {**options, "mode": "regression"}, AutoModelForSequenceClassification)
    assert model.config.problem_type == "regression"
    state_dict, options, _ = reference("omnilearned_ftag")
    kept = {
        name: tensor
        for name, tensor in state_dict.items()
        if not name.startswith(("classifier", "generator.pid_embed"))
    }
    # what the reference is told of classes of jets, a segmentation does not use
    options = {**options, "mode": "segmentation", "num_classes": 7}
    model = run(tmp_path, kept, options, AutoModelForTokenClassification, "segmentation")
    assert model.config.problem_type == "regression" and model.classifier is None and model.config.loss_over_padding
    assert model.generator.embed_labels is None


def test_event_classes_and_contrast(tmp_path):
    state_dict, options, _ = reference("omnilearned_pretrain")
    model = run(tmp_path, state_dict, {**options, "use_event_loss": True, "use_clip": True}, AutoModelForPreTraining)
    assert model.config.num_event_classes == options["num_classes"] - 200
    assert model.config.contrastive_loss_weight == 1.0


def test_codes_need_their_centroids(tmp_path):
    state_dict, options, golden = reference("omnilearned_mpm/tokens")
    model = run(tmp_path, state_dict, {**options, "variant": "tokens"}, AutoModelForPreTraining)
    with pytest.raises(ValueError, match="call `set_codebook`"):
        model.codes(golden.inputs["X"])
    model.set_codebook(golden.inputs["centroids"], golden.inputs["scale_factors_x"])
    model.save_pretrained(tmp_path / "with_codes")
    again = AutoModelForPreTraining.from_pretrained(tmp_path / "with_codes")
    assert torch.equal(again.codes(golden.inputs["X"]), golden.outputs["token_ids_all_slots"])


def without(name):
    return lambda state: {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize(
    "change_state, change_options, message",
    [
        (None, {"base_dim": 32}, "configuration says base_dim = 32, but the checkpoint has 16"),
        (None, {"num_heads": 8}, "configuration says num_heads = 8, but the checkpoint has 4"),
        (None, {"num_classes": 3}, "configuration says num_classes = 3"),
        (None, {"use_int": False}, "configuration says use_int = False, but the checkpoint has True"),
        (None, {"mode": "generator"}, "configuration says mode = 'generator', but the checkpoint has the heads"),
        (None, {"mode": "magic"}, "configuration says mode = 'magic'"),
        (None, {"mode": ["classifier"]}, r"configuration says mode = \['classifier'\]"),
        (None, {"num_heads": "4"}, "configuration says num_heads = '4', expected a finite number"),
        (None, {"int_type": "astro"}, "int_type = 'astro', expected 'lhc'"),
        (None, {"skip": True}, "configuration says skip = True, but the checkpoint has False"),
        (None, {"K": 0}, "K = 0, expected an integer from 1"),
        (None, {"K": "many"}, "K = 'many', expected a finite number"),
        (None, {"num_coord": 7}, "num_coordinates"),
        (without("body.token"), {}, "lacks parameters: model.tokens"),
        (without("classifier.out.weight"), {}, "lacks parameters: classifier.out.weight"),
        (without("body.in_blocks.0.norm1.alpha"), {}, "missing model.layers.0.norm1.alpha"),
        (lambda state: {**state, "body.skip_linear.weight": torch.ones(2)}, {}, "unknown parameters: body.skip_linear"),
        (lambda state: {**state, "body.norm.weight": torch.ones(3)}, {}, r"model.norm.weight has shape \(3,\)"),
        (lambda state: {**state, "body.token": torch.ones(16)}, {}, r"body.token has shape \(16,\)"),
        (lambda state: {**state, "classifier.out.weight": torch.ones(5)}, {}, "expected a matrix"),
        (
            lambda state: {
                name.replace("body.in_blocks.0", "body.in_blocks.5"): value for name, value in state.items()
            },
            {},
            r"has the blocks \[1, 5\] of model",
        ),
        (
            lambda state: {**state, "body.local_physics.mlp.fc1.weight": torch.ones(32, 6)},
            {},
            "the neighbours have 6 features, expected 4, or 3 more",
        ),
    ],
)
def test_hostile_checkpoints_and_configurations(change_state, change_options, message, tmp_path):
    state_dict, options, _ = reference("omnilearned_classifier/kin_int")
    state_dict = state_dict if change_state is None else change_state(state_dict)
    save_file(state_dict, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message) as caught:
        run(tmp_path, tmp_path / "model.safetensors", {**options, **change_options}, AutoModelForSequenceClassification)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_hostile_number_of_heads(tmp_path):
    """Without interactions and of no published width the checkpoint cannot tell."""
    state_dict, options, _ = reference("omnilearned_classifier/kin_noint")
    del options["num_heads"]
    with pytest.raises(ValueError, match="does not tell the number of heads"):
        run(tmp_path, state_dict, options, AutoModelForSequenceClassification)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"pos_encoding_type": "sinusoidal"}, "pos_encoding_type = 'sinusoidal', expected one of"),
        ({"mpm_features": "kin+vertex"}, "mpm_features = 'kin\\+vertex', expected 'kin'"),
        ({"variant": "regression"}, "have 24 predicted features, expected 4"),
        ({"variant": "words"}, "variant = 'words'"),
        (
            {"pos_encoding_type": ["sort_descending_all"]},
            r"pos_encoding_type = \['sort_descending_all'\], expected one",
        ),
    ],
)
def test_hostile_masking_options(options, message, tmp_path):
    state_dict, published, _ = reference("omnilearned_mpm/tokens")
    with pytest.raises(ValueError, match=message):
        run(tmp_path, state_dict, {**published, **options}, AutoModelForPreTraining)


class Payload:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_hostile_pickle_beside_the_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state_dict, options, _ = reference("omnilearned_pretrain")
    checkpoint = {**training_checkpoint(state_dict), "sched": Payload()}
    with pytest.raises(ValueError, match="refused"):
        run(tmp_path, checkpoint, options, AutoModelForPreTraining)
    checkpoint = {**training_checkpoint(state_dict), "body": {"token": [1.0, 2.0]}}
    with pytest.raises(ValueError, match="expected only named tensors.*body.token"):
        run(tmp_path, checkpoint, options, AutoModelForPreTraining)
    assert not (tmp_path / "executed").exists()
