"""
Options of the published OmniLearned networks that no published run has set, and the generator of single numbers per
jet: converted from random weights under the published names, and compared with the formulas written out.
"""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForSequenceClassification

from hepzoo.conversion import main as convert
from hepzoo.modeling.configuration_omnilearned import OmniLearnedConfig
from hepzoo.modeling.modeling_omnilearned import (
    OmniLearnedForJetGeneration,
    OmniLearnedForPreTraining,
    OmniLearnedForSequenceClassification,
)
from tests.golden_sets import GoldenSet

NUM_JET_FEATURES, SIZE = 4, 16


def converted(folder, state_dict: dict, options: dict, model_class):
    torch.save(state_dict, folder / "checkpoint.pt")
    (folder / "options.json").write_text(json.dumps(options))
    paths = ["--checkpoint", folder / "checkpoint.pt", "--config", folder / "options.json", "--output", folder / "out"]
    assert convert(["omnilearned", *map(str, paths)]) == 0
    return model_class.from_pretrained(folder / "out").eval()


def published(name: str) -> tuple[dict, dict, dict]:
    """Parameters, constructor arguments and inputs of a golden set."""
    golden = GoldenSet(name)
    return load_file(golden.path("state_dict.safetensors")), dict(golden.config["kwargs"]), golden.inputs


def dynamic_tanh(x, weights, name):
    return torch.tanh(weights[f"{name}.alpha"] * x) * weights[f"{name}.weight"]


def mlp(x, weights, name):
    """Linear, GELU, DynamicTanh if there is one, linear."""
    hidden = nn.functional.gelu(x @ weights[f"{name}.fc1.weight"].T + weights[f"{name}.fc1.bias"])
    if f"{name}.norm.alpha" in weights:
        hidden = dynamic_tanh(hidden, weights, f"{name}.norm")
    return hidden @ weights[f"{name}.fc2.weight"].T + weights[f"{name}.fc2.bias"]


def block(x, mask, weights, name, num_heads):
    """Pre-norm attention block on one jet (length, size) whose padding is taken away."""
    normed = dynamic_tanh(x, weights, f"{name}.norm1")
    query, key, value = (normed @ weights[f"{name}.attn.in_proj_weight"].T).chunk(3, dim=-1)
    heads = [part.unflatten(-1, (num_heads, -1)).transpose(0, 1) for part in (query, key, value)]
    scores = heads[0] @ heads[1].mT / heads[0].shape[-1] ** 0.5
    scores = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1)
    x = x + (scores @ heads[2]).transpose(0, 1).flatten(1) @ weights[f"{name}.attn.out_proj.weight"].T
    return x + mlp(dynamic_tanh(x, weights, f"{name}.norm2"), weights, f"{name}.mlp")


def with_long_skips(state_dict: dict) -> dict:
    """The second half of the blocks as out_blocks, with random linear layers for what they skip."""
    count = 1 + max(int(name.split(".")[2]) for name in state_dict if name.startswith("body.in_blocks."))
    assert count % 2 == 0
    size = state_dict["body.norm.weight"].shape[0]
    torch.manual_seed(3)
    changed = {}
    for name, tensor in state_dict.items():
        if name.startswith("body.in_blocks.") and (number := int(name.split(".")[2])) >= count // 2:
            name = name.replace(f"in_blocks.{number}.", f"out_blocks.{number - count // 2}.")
        changed[name] = tensor
    for number in range(count // 2):
        changed[f"body.out_blocks.{number}.skip_linear.weight"] = torch.randn(size, 2 * size) / size**0.5
        changed[f"body.out_blocks.{number}.skip_linear.bias"] = torch.randn(size)
    return changed


@torch.no_grad()
def test_long_skips(tmp_path):
    state_dict, options, inputs = published("omnilearned_classifier/kin_noint")
    weights = with_long_skips(state_dict)
    model = converted(tmp_path, weights, {**options, "skip": True}, AutoModelForSequenceClassification)
    assert model.config.use_long_skips and len(model.model.skip_layers) == len(model.model.layers)
    particles = inputs["X"]
    outputs = model.model(particles, output_hidden_states=True, attention_mask=particles[..., 2] != 0)
    for jet in range(len(particles)):
        mask = outputs.visible[jet]
        x, skips = outputs.hidden_states[0][jet], []
        for number in range(len(model.model.layers)):
            x = block(x, mask, weights, f"body.in_blocks.{number}", model.config.num_attention_heads)
            skips.append(x)
        for number in range(len(model.model.layers)):
            name = f"body.out_blocks.{number}"
            x = torch.cat([x, skips[-1 - number]], dim=-1) @ weights[f"{name}.skip_linear.weight"].T
            x = block(x + weights[f"{name}.skip_linear.bias"], mask, weights, name, model.config.num_attention_heads)
        expected = dynamic_tanh(x, weights, "body.norm")[mask]
        torch.testing.assert_close(outputs.last_hidden_state[jet][mask], expected, rtol=1e-4, atol=2e-5)
    # jets that are computed together, and with gradient checkpointing
    alone = model(particles[:1], attention_mask=particles[:1, :, 2] != 0).logits
    torch.testing.assert_close(alone, model(particles, attention_mask=particles[..., 2] != 0).logits[:1])


def test_long_skips_with_gradient_checkpointing():
    torch.manual_seed(0)
    config = OmniLearnedConfig(hidden_size=16, num_hidden_layers=4, num_head_layers=1, use_long_skips=True)
    model = OmniLearnedForSequenceClassification(config).train()
    particles, labels = torch.randn(3, 8, 4), torch.tensor([0, 1, 1])
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model(particles, labels=labels).loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
        model.gradient_checkpointing_enable()
    torch.testing.assert_close(gradients[0], gradients[1])
    assert all(gradient.abs().max() > 0 for name, gradient in gradients[0].items() if "skip_proj" in name)


def jet_generator(num_features=NUM_JET_FEATURES, num_layers=3) -> dict:
    """Random weights under the published names."""
    torch.manual_seed(0)
    shapes = {"embed": (num_features, SIZE // 2), "cond": (1, SIZE // 2), "time_embed": (SIZE, SIZE // 2)}
    shapes |= {f"in_blocks.{number}": (SIZE, SIZE) for number in range(num_layers)}
    weights = {}
    for name, (inputs, outputs) in shapes.items():
        weights[f"{name}.fc1.weight"] = torch.randn(2 * SIZE, inputs) / inputs**0.5
        weights[f"{name}.fc1.bias"] = torch.randn(2 * SIZE)
        weights[f"{name}.fc2.weight"] = torch.randn(outputs, 2 * SIZE) / (2 * SIZE) ** 0.5
        weights[f"{name}.fc2.bias"] = torch.randn(outputs)
        if name != "time_embed":
            weights[f"{name}.norm.alpha"] = torch.rand(1)
            weights[f"{name}.norm.weight"] = torch.randn(2 * SIZE)
    weights |= {"MPFourier.freqs": 6 * torch.randn(SIZE), "MPFourier.phases": 6 * torch.rand(SIZE)}
    return weights | {"out.weight": torch.randn(num_features, SIZE), "out.bias": torch.randn(num_features)}


def jet_velocity(x, time, condition, weights):
    z = mlp(x, weights, "embed") + mlp(condition, weights, "cond")
    waves = time * 2**0.5 * torch.cos(time * weights["MPFourier.freqs"] + weights["MPFourier.phases"])
    z = torch.cat([mlp(waves, weights, "time_embed"), z], dim=-1)
    for number in range(3):
        z = mlp(z, weights, f"in_blocks.{number}")
    return z @ weights["out.weight"].T + weights["out.bias"]


@torch.no_grad()
def test_jet_generator(tmp_path):
    weights = jet_generator()
    checkpoint = {"model": weights, "ema_model": {k: 2 * v for k, v in weights.items()}, "epoch": 3, "loss": 0.1}
    options = {"input_dim": 4, "base_dim": SIZE, "conditional": True, "cond_dim": 1}
    model = converted(tmp_path, checkpoint, options, OmniLearnedForJetGeneration)
    mean = torch.tensor([6.40028, 5.0057, 0.4544, 0.6861])
    std = torch.tensor([0.16999, 0.318289, 0.139043, 0.193016])
    jets, condition, time, noise = torch.randn(5, 4), torch.randn(5, 1), torch.rand(5), torch.randn(5, 4)
    outputs = model(jets, condition, time=time, noise=noise)
    scaled = mean + std * noise
    noisy = (1 - time)[:, None] * jets + time[:, None] * scaled
    expected = jet_velocity(noisy, time[:, None], condition, weights)
    torch.testing.assert_close(outputs.noisy_particles, noisy)
    torch.testing.assert_close(outputs.velocity, expected, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(outputs.loss, (expected - (scaled - jets)).square().mean(), rtol=1e-4, atol=2e-5)

    # midpoint steps from noise to jets
    assert model.config.num_inference_steps == 511
    sample = model.generate(condition, num_inference_steps=3, noise=scaled.unsqueeze(1))
    x = scaled
    for step in range(3):
        start, size = 1 - step / 3, -1 / 3
        middle = x + size / 2 * jet_velocity(x, torch.full((5, 1), start), condition, weights)
        x = x + size * jet_velocity(middle, torch.full((5, 1), start + size / 2), condition, weights)
    torch.testing.assert_close(sample.particles.squeeze(1), x, rtol=1e-3, atol=1e-4)
    drawn = [model.generate(condition, num_inference_steps=2, generator=torch.Generator().manual_seed(1)) for _ in "ab"]
    assert torch.equal(drawn[0].particles, drawn[1].particles) and drawn[0].particles.shape == (5, 1, 4)


def test_averages_and_sizes_of_the_jet_generator(tmp_path):
    weights = jet_generator(num_features=3)
    checkpoint = {"model": weights, "ema_model": {k: 2 * v for k, v in weights.items()}}
    model = converted(tmp_path, checkpoint, {"use_ema": True}, OmniLearnedForJetGeneration)
    assert torch.equal(model.out.bias, 2 * weights["out.bias"])
    assert list(model.config.noise_mean) == [6.40028, 5.0057, 0.6861]
    # the published width and depth
    model = OmniLearnedForJetGeneration(
        OmniLearnedConfig(hidden_size=256, num_hidden_layers=3, use_time=True, num_conditions=1)
    )
    assert model.num_parameters() == 1_124_489
    model(torch.randn(3, 4), torch.randn(3, 1)).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_saved_jet_generator_names_its_class(tmp_path):
    config = OmniLearnedConfig(hidden_size=16, num_hidden_layers=1, use_time=True, num_conditions=1)
    model = OmniLearnedForJetGeneration(config).eval()
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["auto_map"]["AutoModelForPreTraining"] == "modeling_omnilearned.OmniLearnedForJetGeneration"
    loaded = OmniLearnedForJetGeneration.from_pretrained(tmp_path).eval()
    jets, conditions, time = torch.randn(3, 4), torch.randn(3, 1), torch.rand(3)
    noise = torch.randn(3, 4)
    with torch.no_grad():
        expected = model(jets, conditions, time=time, noise=noise).velocity
        assert torch.equal(loaded(jets, conditions, time=time, noise=noise).velocity, expected)
        halved = loaded.bfloat16()(jets, conditions, time=time, noise=noise).velocity
    torch.testing.assert_close(halved.float(), expected, rtol=0.1, atol=0.1)


def test_types_of_masked_particles(tmp_path):
    state_dict, options, inputs = published("omnilearned_mpm")
    num_types, size = state_dict["body.pid_embed.0.weight"].shape
    torch.manual_seed(1)
    weight, bias = torch.randn(num_types, size), torch.randn(num_types)
    state_dict |= {"mpm_head.out_pid.weight": weight, "mpm_head.out_pid.bias": bias}
    model = converted(tmp_path, state_dict, options, OmniLearnedForPreTraining)
    assert model.config.mask_particle_types
    seen = []
    model.masked_head.out.register_forward_hook(lambda module, arguments, output: seen.append(arguments[0]))
    masked = torch.rand(inputs["X"].shape[:2]) < 0.4
    extra = {"additional_features": inputs["add_info"]} if "add_info" in inputs else {}
    outputs = model(
        inputs["X"],
        attention_mask=inputs["X"][..., 2] != 0,
        particle_ids=inputs["pid"],
        masked_positions=masked,
        **extra,
    )
    masked = outputs.masked_positions
    logits = outputs.masked_type_logits[masked]
    # states at the masked particles, in the same order
    torch.testing.assert_close(logits, seen[-1] @ weight.T + bias, rtol=1e-4, atol=2e-5)
    expected = nn.functional.cross_entropy(logits, inputs["pid"][masked].long())
    torch.testing.assert_close(outputs.masked_type_loss, expected)
    torch.testing.assert_close(outputs.loss, outputs.masked_loss + expected)


def test_weights_of_codes():
    config = OmniLearnedConfig(
        hidden_size=16, num_hidden_layers=1, num_head_layers=1, objectives=["masked"], codebook_size=3
    )
    torch.manual_seed(0)
    model = OmniLearnedForPreTraining(config).eval()
    centroids, weights = torch.randn(3, 4), torch.tensor([0.5, 2.0, 1.0])
    model.set_codebook(centroids, torch.ones(4), weights)
    particles = torch.randn(4, 7, 4)
    outputs = model(particles, masked_positions=torch.ones(4, 7))
    codes = (particles.unsqueeze(2) - centroids).square().sum(-1).argmin(-1)
    logs = outputs.masked_predictions.log_softmax(-1)
    picked = 0.9 * logs.gather(-1, codes.unsqueeze(-1)).squeeze(-1) * weights[codes]
    smooth = 0.1 / 3 * (logs * weights).sum(-1)
    torch.testing.assert_close(outputs.masked_loss, -(picked + smooth).sum() / weights[codes].sum())


def test_masked_head_starts_at_medians():
    torch.manual_seed(0)
    config = OmniLearnedConfig(hidden_size=16, num_hidden_layers=1, num_head_layers=1, objectives=["masked"])
    model = OmniLearnedForPreTraining(config)
    particles = torch.randn(50, 9, 4) + torch.tensor([0.0, 0.0, 2.0, 3.0])
    mask = torch.rand(50, 9) < 0.7
    mask[:, 0] = True
    model.start_at_medians(particles.masked_fill(~mask.unsqueeze(-1), 0), mask)
    outputs = model.eval()(particles, attention_mask=mask)
    medians = particles[mask].median(dim=0).values
    torch.testing.assert_close(outputs.masked_predictions[mask], medians.expand(int(mask.sum()), 4))
    # and learns from there
    outputs.loss.backward()
    assert model.masked_head.out.weight.grad.abs().max() > 0


def test_hostile_medians_and_types():
    config = OmniLearnedConfig(
        hidden_size=16, num_hidden_layers=1, num_head_layers=1, objectives=["masked"], codebook_size=3
    )
    particles, mask = torch.randn(2, 5, 4), torch.ones(2, 5)
    with pytest.raises(ValueError, match="no medians to start at"):
        OmniLearnedForPreTraining(config).start_at_medians(particles, mask)
    config.codebook_size = 0
    model = OmniLearnedForPreTraining(config)
    with pytest.raises(ValueError, match="has no particles"):
        model.start_at_medians(particles, torch.zeros(2, 5))
    with pytest.raises(ValueError, match="`particles` has shape"):
        model.start_at_medians(particles[..., :3], mask)
    for settings, message in (
        ({"mask_particle_types": True}, "`num_particle_types` is 0"),
        ({"use_long_skips": True, "num_hidden_layers": 3}, "expected an even number"),
    ):
        with pytest.raises(Exception, match=message):
            OmniLearnedConfig(**settings)


def test_hostile_jets():
    config = OmniLearnedConfig(hidden_size=16, num_hidden_layers=1, use_time=True, num_conditions=2)
    model = OmniLearnedForJetGeneration(config)
    jets, conditions = torch.randn(3, 4), torch.randn(3, 2)
    for arguments, message in (
        ((jets[:, :3], conditions), "`jets` has shape"),
        ((jets.index_fill(0, torch.tensor([1]), torch.nan), conditions), "`jets` of jet 1"),
        ((jets, conditions[:2]), "`conditions` has shape"),
        ((jets, conditions.index_fill(0, torch.tensor([2]), torch.inf)), "`conditions` of jet 2"),
        ((jets, None), "`conditions` is missing"),
        ((jets, conditions, torch.full((3,), 2.0)), "`time` of jet 0"),
        ((jets, conditions, None, jets[:, :2]), "`noise` has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            model(*arguments)
    with pytest.raises(ValueError, match="unknown input 'labels'"):
        model.generate(conditions, labels=[0, 1, 0])
    for settings in ({"use_time": False}, {"num_conditions": 0}, {"hidden_size": 15, "num_attention_heads": 1}):
        with pytest.raises(ValueError, match="expected"):
            OmniLearnedForJetGeneration(OmniLearnedConfig(**{**config.to_dict(), **settings}))


@pytest.mark.parametrize(
    "change, options, message",
    [
        ({}, {"base_dim": 32}, "configuration says base_dim = 32, but the checkpoint has 16"),
        ({}, {"num_layers": 2}, "configuration says num_layers = 2"),
        ({"in_blocks.1.fc1.bias": None}, {}, "missing layers.1.fc1.bias"),
        ({"out.weight": None}, {}, "checkpoint lacks parameters: out.weight"),
        ({"out.weight": torch.zeros(5, SIZE)}, {}, "makes 5 numbers per jet"),
        ({"extra": torch.zeros(1)}, {}, "extra"),
    ],
)
def test_hostile_jet_generators(tmp_path, change, options, message):
    weights = {name: tensor for name, tensor in (jet_generator() | change).items() if tensor is not None}
    with pytest.raises(ValueError, match=message):
        converted(tmp_path, {"model": weights}, options, OmniLearnedForJetGeneration)
    assert not (tmp_path / "out").exists()


def test_hostile_long_skips(tmp_path):
    state_dict, options, _ = published("omnilearned_classifier/kin_noint")
    weights = with_long_skips(state_dict)
    with pytest.raises(ValueError, match="configuration says skip = False, but the checkpoint has True"):
        converted(tmp_path, weights, {**options, "skip": False}, AutoModelForSequenceClassification)
    fewer = {name: tensor for name, tensor in weights.items() if not name.startswith("body.in_blocks.0.")}
    with pytest.raises(ValueError, match="blocks"):
        converted(tmp_path, fewer, options, AutoModelForSequenceClassification)
