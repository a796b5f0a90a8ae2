"""OmniLearned: sizes, loading, invariances, losses written out, sampling, bad input."""

import json
import math

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Trainer,
    TrainingArguments,
)

from hepzoo.modeling import modeling_omnilearned
from hepzoo.modeling.configuration_omnilearned import OmniLearnedConfig
from hepzoo.modeling.modeling_omnilearned import (
    OmniLearnedForGeneration,
    OmniLearnedForPreTraining,
    OmniLearnedForSequenceClassification,
    OmniLearnedForTokenClassification,
    OmniLearnedModel,
    class_losses,
    contrastive_loss,
    draw_masked,
    flow_loss,
    masked_ranks,
    nearest_neighbors,
    pair_features,
)
from tests.subprocesses import checked, run_python

TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_head_layers": 2,
    "num_neighbors": 4,
    "num_labels": 3,
}
FULL = {**TINY, "num_particle_types": 9, "num_additional_features": 4, "num_conditions": 2}
CLASSES = {
    "classifier": (OmniLearnedForSequenceClassification, {}),
    "generator": (OmniLearnedForGeneration, {"use_time": True}),
    "pretraining": (OmniLearnedForPreTraining, {"use_time": True}),
    "particles": (OmniLearnedForTokenClassification, {"num_particle_labels": 5}),
}
EACH_CLASS = pytest.mark.parametrize("kind", CLASSES)
COUNTS = (9, 1, 5, 3, 12)


def make(kind: str, **settings):
    """A tiny model whose terms are all different from 0 and 1."""
    model_class, of_class = CLASSES[kind]
    torch.manual_seed(0)
    model = model_class(OmniLearnedConfig(**{**FULL, **of_class, **settings}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim <= 1 or name.endswith("tokens"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def batch_of(config, counts=COUNTS, slots=12, seed=1) -> dict:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(slots) < torch.tensor(counts).unsqueeze(1)
    particles = torch.randn(len(counts), slots, 4, generator=generator) * torch.tensor([0.3, 0.3, 1.0, 1.0])
    batch = {"particles": particles * mask.unsqueeze(-1), "attention_mask": mask.long()}
    if config.num_particle_types:
        batch["particle_ids"] = torch.randint(1, 9, mask.shape, generator=generator) * mask
    if config.num_additional_features:
        batch["additional_features"] = torch.randn(*mask.shape, config.num_additional_features, generator=generator)
    if config.num_conditions:
        batch["conditions"] = torch.randn(len(counts), config.num_conditions, generator=generator)
    return batch


def targets_of(kind: str, batch: dict, seed=2) -> dict:
    """Targets, and what is drawn otherwise."""
    generator = torch.Generator().manual_seed(seed)
    particles = batch["particles"]
    classes = torch.arange(len(particles)) % 3
    if kind == "classifier":
        return {"labels": classes}
    if kind == "particles":
        labels = torch.randint(0, 5, particles.shape[:2], generator=generator)
        return {"labels": labels.masked_fill(batch["attention_mask"] == 0, -1), "jet_labels": classes}
    drawn = {
        "time": torch.rand(len(particles), generator=generator),
        "noise": torch.randn(particles.shape, generator=generator),
    }
    if kind == "pretraining":
        drawn["masked_positions"] = torch.rand(particles.shape[:2], generator=generator) < 0.4
    return {"labels": classes, **drawn}


def main_output(outputs) -> torch.Tensor:
    return outputs.logits if getattr(outputs, "logits", None) is not None else outputs.velocity


# --- sizes and configuration ---------------------------------------------------------------------------------------

PRETRAINED = {"num_labels": 210, "num_particle_types": 9, "num_additional_features": 4, "use_time": True}
PRETRAINED |= {"objectives": ["classification", "generation"]}
JETNET = {"num_labels": 5, "num_conditions": 3, "use_time": True}
JETNET |= {"use_interaction": False, "use_local_interaction": False}
STUDY = {"num_labels": 10, "num_particle_types": 9, "num_additional_features": 4}


@pytest.mark.parametrize(
    "size, kind, settings, expected",
    [
        ("small", "classifier", {"num_labels": 2}, 2_708_917),
        ("medium", "classifier", {"num_labels": 2}, 51_490_377),
        ("large", "classifier", {"num_labels": 2}, 373_687_443),
        ("small", "pretraining", PRETRAINED, 3_339_793),
        ("medium", "pretraining", PRETRAINED, 59_911_461),
        ("large", "pretraining", PRETRAINED, 423_049_589),
        ("small", "generator", JETNET, 1_869_106),
        ("medium", "generator", JETNET, 38_095_934),
        ("large", "generator", JETNET, 320_129_146),
        ("micro", "classifier", STUDY, 134_795),
        ("micro", "generator", {**STUDY, "use_time": True}, 80_391),
        ("micro", "pretraining", {**STUDY, "objectives": ["masked"]}, 72_326),
        ("micro", "pretraining", {**STUDY, "use_time": True}, 186_400),
        ("small", "classifier", STUDY, 2_748_222),
        ("small", "generator", {**STUDY, "use_time": True}, 1_891_642),
        ("small", "pretraining", {**STUDY, "objectives": ["masked"]}, 1_711_929),
        ("small", "pretraining", {**STUDY, "use_time": True}, 3_495_251),
    ],
)
def test_published_sizes(size, kind, settings, expected):
    with torch.device("meta"):
        model = CLASSES[kind][0](OmniLearnedConfig.from_paper_size(size, **settings))
    assert model.num_parameters() == expected


def test_configuration_saves_what_it_declares(tmp_path):
    config = OmniLearnedConfig(**FULL, num_local_layers=1, objectives=["masked"])
    config.save_pretrained(tmp_path)
    again = OmniLearnedConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    declared = set(OmniLearnedConfig.__dataclass_fields__) | {
        "transformers_version",
        "model_type",
        "_name_or_path",
        "auto_map",
    }
    assert set(json.loads((tmp_path / "config.json").read_text())) <= declared
    assert OmniLearnedConfig(num_head_layers=3).num_local_layers == 3
    assert OmniLearnedConfig.from_paper_size("micro", num_neighbors=5).num_neighbors == 5


@pytest.mark.parametrize(
    "settings",
    [
        {"hidden_size": 30},
        {"num_neighbors": 0},
        {"num_coordinates": 5},
        {"num_features": 2},
        {"noise_std": [1.0, 1.0], "use_time": True},
        {"noise_std": [1.0, 1.0, 1.0, 0.0]},
        {"objectives": []},
        {"objectives": ["reconstruction"]},
        {"mask_fraction": 1.5},
        {"mask_rule": "zero"},
        {"masked_position": "random"},
        {"loss_reduction": "sum"},
        {"num_event_classes": 3},
        {"solver": "heun"},
        {"hidden_dropout": math.nan},
        {"attention_dropout": 1.5},
        {"feature_dropout": -0.1},
        {"label_dropout": 2.0},
        {"label_smoothing": 3.0},
        {"generation_loss_weight": -1.0},
        {"masked_loss_weight": math.nan},
        {"initializer_range": math.inf},
        {"noise_mean": [0.0, math.nan, 0.0, 0.0]},
        {"noise_std": [math.nan] * 4},
        {"noise_std": [], "use_time": True},
        {"num_labels": 0},
        {"problem_type": "multi_label_classification"},
        {"codebook_features": 5, "codebook_size": 8},
        {"num_tokens": 0},
    ],
)
def test_hostile_configurations(settings):
    (name,) = [name for name in settings if name not in ("use_time", "codebook_size")][:1]
    with pytest.raises(Exception, match=f"{name}.*expected|{name}.*multiple") as caught:
        OmniLearnedConfig(**{**TINY, **settings})
    assert "\n" not in str(caught.value.__cause__ or caught.value)


def test_hostile_size_and_time():
    with pytest.raises(ValueError, match="size is 'huge', expected one of micro"):
        OmniLearnedConfig.from_paper_size("huge")
    for model_class in (OmniLearnedForGeneration, OmniLearnedForPreTraining):
        with pytest.raises(ValueError, match="`use_time` is False, expected True"):
            model_class(OmniLearnedConfig(**TINY))


# --- loading -------------------------------------------------------------------------------------------------------


@EACH_CLASS
def test_save_and_load(kind, tmp_path):
    model = make(kind)
    batch = batch_of(model.config)
    batch |= targets_of(kind, batch)
    model.save_pretrained(tmp_path)
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        for name, value in model(**batch).items():
            torch.testing.assert_close(again.eval()(**batch)[name], value, rtol=0, atol=0)


def test_auto_classes_take_the_saved_architecture(tmp_path):
    for kind, auto in (
        ("generator", AutoModelForPreTraining),
        ("pretraining", AutoModelForPreTraining),
        ("classifier", AutoModelForSequenceClassification),
        ("particles", AutoModelForTokenClassification),
    ):
        model = make(kind)
        model.save_pretrained(tmp_path / kind)
        assert type(auto.from_pretrained(tmp_path / kind)) is type(model)


LOAD_REMOTE = """
import json, sys, torch
from transformers import AutoModel, AutoModelForPreTraining, AutoModelForSequenceClassification
batch = torch.load(sys.argv[2])
generator = AutoModelForPreTraining.from_pretrained(sys.argv[1] + "/generator", trust_remote_code=True).eval()
classifier = AutoModelForSequenceClassification.from_pretrained(sys.argv[1] + "/classifier", trust_remote_code=True)
body = AutoModel.from_pretrained(sys.argv[1] + "/classifier", trust_remote_code=True).eval()
with torch.no_grad():
    logits = classifier.eval()(**batch).logits
    states = body(**batch).last_hidden_state
    inputs = {name: batch[name] for name in ("attention_mask", "particle_ids", "additional_features", "conditions")}
    sample = generator.generate(
        labels=[0, 1, 2, 0, 1], num_inference_steps=2, generator=torch.Generator().manual_seed(3), **inputs
    )
assert type(generator).__name__ == "OmniLearnedForGeneration"
assert not [name for name in sys.modules if name.partition(".")[0] == "hepzoo" and sys.modules[name]]
print(json.dumps([float(values.double().sum()) for values in (logits, states, sample.particles)]))
"""


def test_loads_without_hepzoo(tmp_path):
    models = {kind: make(kind) for kind in ("generator", "classifier")}
    batch = batch_of(models["classifier"].config)
    for kind, model in models.items():
        model.save_pretrained(tmp_path / kind)
    torch.save(batch, tmp_path / "batch.pt")
    stdout = checked(run_python(LOAD_REMOTE, tmp_path, tmp_path, tmp_path / "batch.pt", hepzoo=False))
    inputs = {name: value for name, value in batch.items() if name != "particles"}
    with torch.no_grad():
        sample = models["generator"].generate(
            labels=[0, 1, 2, 0, 1], num_inference_steps=2, generator=torch.Generator().manual_seed(3), **inputs
        )
        expected = [
            models["classifier"](**batch).logits,
            models["classifier"].model(**batch).last_hidden_state,
            sample.particles,
        ]
    found = json.loads(stdout.splitlines()[-1])
    assert found == pytest.approx([float(values.double().sum()) for values in expected], rel=1e-5)


def test_fine_tuning_starts_from_a_pretraining(tmp_path):
    """Heads that fit are kept, the output with other classes is fresh, and what was missing is initialised."""
    pretrained = make("pretraining", objectives=["classification"])
    pretrained.save_pretrained(tmp_path)
    classifier = OmniLearnedForSequenceClassification.from_pretrained(
        tmp_path, num_labels=7, ignore_mismatched_sizes=True
    )
    assert classifier.classifier.out.weight.shape[0] == 7 and classifier.classifier.out.weight.abs().max() < 1
    assert torch.equal(classifier.classifier.mlp.fc1.weight, pretrained.classifier.mlp.fc1.weight)
    assert torch.equal(classifier.model.layers[1].mlp.fc1.weight, pretrained.model.layers[1].mlp.fc1.weight)

    make("classifier").save_pretrained(tmp_path / "without_time")
    generator, info = OmniLearnedForGeneration.from_pretrained(
        tmp_path / "without_time", use_time=True, output_loading_info=True
    )
    assert "model.embed_time.fc1.frequencies" in info["missing_keys"]
    embedding = generator.model.embed_time.fc1
    assert 1 < embedding.frequencies.std() < 15 and 0 <= embedding.phases.min() <= embedding.phases.max() <= 2 * math.pi
    assert generator.generator.layers[0].norm1.alpha.item() == 0.5


def test_fresh_weights():
    model = OmniLearnedForPreTraining(OmniLearnedConfig(**{**FULL, "hidden_size": 64}, use_time=True, codebook_size=6))
    assert model.model.embed_particle_ids.weight[0].abs().max() == 0
    assert 0.5 < model.model.embed_particle_ids.weight[1:].std() < 1.5
    assert 0.01 < model.model.tokens.std() < 0.03
    assert 0.8 < model.masked_vectors.std() < 1.2
    # Xavier: uniform with variance 2 / (rows + columns)
    weight = model.model.layers[0].self_attn.qkv_proj.weight
    assert weight.std().item() == pytest.approx(math.sqrt(2 / sum(weight.shape)), rel=0.1)
    assert all(bias.abs().max() == 0 for name, bias in model.named_parameters() if name.endswith("bias"))
    assert model.centroid_scales.abs().max() == 0  # no codes yet


# --- particles are a set -------------------------------------------------------------------------------------------


@EACH_CLASS
@torch.no_grad()
def test_order_and_padding_do_not_matter(kind):
    model = make(kind, masked_position="rank_among_masked")
    batch = batch_of(model.config)
    expected = model(**batch, **targets_of(kind, batch))
    # other slots, garbage in the empty ones
    slots = 17
    places = torch.stack([torch.randperm(slots, generator=torch.Generator().manual_seed(i)) for i in range(5)])
    targets = targets_of(kind, batch)
    moved = {}
    for name, values in {**batch, **targets}.items():
        if values.ndim == 1 or name == "conditions":
            moved[name] = values
            continue
        wide = torch.full((5, slots, *values.shape[2:]), 3, dtype=values.dtype)
        if name in ("attention_mask", "masked_positions"):
            wide.zero_()
        if values.is_floating_point():
            wide.fill_(torch.nan)
        wide[torch.arange(5)[:, None], places[:, :12]] = torch.where(
            batch["attention_mask"].view(5, 12, *[1] * (values.ndim - 2)) == 1,
            values,
            wide[torch.arange(5)[:, None], places[:, :12]],
        )
        moved[name] = wide
    found = model(**moved)
    for name, value in expected.items():
        other = found[name]
        if value.ndim > 1 and value.shape[1] == 12:
            other = other[torch.arange(5)[:, None], places[:, :12]]
            if name == "logits":
                assert (found[name].sum(-1) != 0).sum() == sum(COUNTS)
        torch.testing.assert_close(other, value, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@EACH_CLASS
@torch.no_grad()
def test_groups_and_parts_do_not_matter(kind, monkeypatch):
    """A batch that is computed in groups of jets and in parts equals its jets alone."""
    counts = (30, 4, 17, 2, 29, 1, 16, 25, 8, 3)
    for name, value in (("JETS_AT_ONCE", 2), ("PAIRS_AT_ONCE", 7), ("PARTICLES_AT_ONCE", 5)):
        monkeypatch.setattr(modeling_omnilearned, name, value)
    model = make(kind)
    batch = batch_of(model.config, counts, slots=30)
    groups = model.model._groups(batch["attention_mask"].bool())
    assert len(groups) > 3 and sorted(torch.cat([rows for rows, _ in groups]).tolist()) == list(range(10))
    drawn = {name: value for name, value in targets_of(kind, batch).items() if name != "jet_labels"}
    if kind in ("classifier", "particles"):
        drawn = {}
    together = main_output(model(**batch, **drawn))
    monkeypatch.undo()
    for jet in range(len(counts)):
        alone = model(**{name: value[jet : jet + 1] for name, value in {**batch, **drawn}.items()})
        torch.testing.assert_close(together[jet : jet + 1], main_output(alone), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_memory_bound_of_the_attention_bias(monkeypatch):
    model = make("classifier")
    batch = batch_of(model.config)
    expected = model(**batch).logits
    monkeypatch.setattr(modeling_omnilearned, "BIAS_AT_ONCE", 1)
    assert len(model.model._groups(batch["attention_mask"].bool())) == len(COUNTS)
    torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-4, atol=1e-5)


@EACH_CLASS
def test_gradients_of_checkpointed_and_recomputed_passes(kind, monkeypatch):
    model = make(kind).train()
    batch = batch_of(model.config)
    batch |= targets_of(kind, batch)

    def gradients():
        model.zero_grad()
        model(**batch).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    assert set(expected) >= {name for name, _ in model.named_parameters() if "masked_vectors" not in name}
    for name, value in (("PAIRS_RECOMPUTED", 1), ("PAIRS_AT_ONCE", 11), ("JETS_AT_ONCE", 2)):
        monkeypatch.setattr(modeling_omnilearned, name, value)
    recomputed = gradients()
    monkeypatch.undo()
    model.gradient_checkpointing_enable()
    assert model.model.layers[0].gradient_checkpointing and model.model.interaction.gradient_checkpointing
    for others in (recomputed, gradients()):
        for name, value in expected.items():
            torch.testing.assert_close(
                others[name], value, rtol=1e-3, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
            )


@EACH_CLASS
@torch.no_grad()
def test_sdpa_equals_eager(kind):
    model = make(kind)
    batch = batch_of(model.config)
    batch |= targets_of(kind, batch)
    expected = main_output(model(**batch))
    model.set_attn_implementation("eager")
    torch.testing.assert_close(main_output(model(**batch)), expected, rtol=1e-4, atol=1e-5)


@EACH_CLASS
def test_bfloat16(kind):
    model = make(kind)
    batch = batch_of(model.config)
    batch |= targets_of(kind, batch)
    with torch.no_grad():
        expected = model(**batch)
    model.bfloat16()
    outputs = model(**batch)
    outputs.loss.backward()
    assert main_output(outputs).dtype == torch.bfloat16
    torch.testing.assert_close(outputs.loss.float(), expected.loss, rtol=0.1, atol=0.05)
    model.float().zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(**batch).loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@torch.no_grad()
def test_hidden_states():
    model = make("classifier").model
    batch = batch_of(model.config)
    output = model(**batch, output_hidden_states=True)
    assert len(output.hidden_states) == 2 and output.hidden_states[0].shape == output.last_hidden_state.shape
    assert output.last_hidden_state.shape == (5, model.config.num_prefix + 12, 16)
    hidden = batch["attention_mask"] == 0
    for states in (*output.hidden_states, output.last_hidden_state):
        assert (states[:, model.config.num_prefix :][hidden] == 0).all()
    assert torch.equal(output.visible[:, model.config.num_prefix :], ~hidden)


@torch.no_grad()
def test_time_is_invisible_at_zero():
    """Clean jets of a joint model: the same as a model without time."""
    model = make("pretraining").model
    batch = batch_of(model.config)
    at_zero = model(**batch, time=torch.zeros(5))
    assert torch.equal(model(**batch).last_hidden_state, at_zero.last_hidden_state)
    assert (at_zero.last_hidden_state[:, model.config.num_tokens] == 0).all()
    without = OmniLearnedModel(OmniLearnedConfig(**FULL)).eval()
    without.load_state_dict({n: v for n, v in model.state_dict().items() if "embed_time" not in n})
    tokens = model.config.num_tokens
    others = [i for i in range(at_zero.last_hidden_state.shape[1]) if i != tokens]
    torch.testing.assert_close(without(**batch).last_hidden_state, at_zero.last_hidden_state[:, others])
    later = model(**batch, time=torch.full((5,), 0.3))
    assert later.visible[:, tokens].all() and (later.last_hidden_state != at_zero.last_hidden_state).any()


# --- neighbours, pairs, padding ------------------------------------------------------------------------------------


def test_neighbors_against_sorting():
    torch.manual_seed(0)
    coordinates = torch.randn(3, 9, 2)
    is_real = torch.arange(9) < torch.tensor([9, 4, 1]).unsqueeze(1)
    distances = torch.cdist(coordinates, coordinates)
    for published in (False, True):
        neighbors, is_neighbor = nearest_neighbors(coordinates, is_real, 5, published)
        assert neighbors.shape == (3, 9, 5) and not is_neighbor[2].any()
        for jet, count in enumerate([9, 4, 1]):
            for center in range(count):
                others = [i for i in range(count) if i != center]
                expected = sorted(others, key=lambda i: distances[jet, center, i])[:5]
                assert neighbors[jet, center][is_neighbor[jet, center]].tolist() == expected


def test_duplicates_keep_their_neighbors():
    """Particles at the same place: never itself, which the published choice takes."""
    coordinates = torch.tensor([[[0.1, 0.2]] * 3 + [[0.5, 0.5]]])
    is_real = torch.ones(1, 4, dtype=torch.bool)
    neighbors, is_neighbor = nearest_neighbors(coordinates, is_real, 3, published=False)
    assert is_neighbor.all()
    for center in range(4):
        assert sorted(neighbors[0, center].tolist()) == [i for i in range(4) if i != center]
    published, _ = nearest_neighbors(coordinates, is_real, 3, published=True)
    assert any(center in published[0, center].tolist() for center in range(4))
    model = make("classifier")
    batch = batch_of(model.config)
    batch["particles"][:, :] = batch["particles"][:, :1]
    model(**batch).logits.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_pair_features_written_out():
    first, second = torch.tensor([0.1, -0.2, 1.0, 1.5]), torch.tensor([-0.3, 0.1, 2.0, 2.2])
    pt, other = math.e, math.e**2
    angles = math.cosh(0.4) - math.cos(-0.3)
    distance = math.hypot(0.4, 0.3)
    expected = [math.log(2 * pt * other * angles), math.log(distance), math.log(pt * distance)]
    torch.testing.assert_close(pair_features(first, second), torch.tensor(expected))
    assert torch.equal(pair_features(first, second), pair_features(second, first))
    assert torch.equal(pair_features(first, first), torch.zeros(3))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.int32, torch.int8])
def test_integers_of_any_size(dtype):
    for kind in CLASSES:
        model = make(kind)
        batch = batch_of(model.config) | targets_of(kind, batch_of(model.config))
        short = {name: value.to(dtype) if value.dtype == torch.long else value for name, value in batch.items()}
        assert torch.equal(model(**short).loss, model(**batch).loss)


def test_few_particles():
    """A lone particle has no local features; fewer particles than neighbours are no error, in few slots neither."""
    model = make("classifier")
    batch = batch_of(model.config, counts=(1, 1), slots=1)
    assert model(**batch).logits.isfinite().all()
    particles = batch["particles"]
    assert (model.model.local_embedding(particles, torch.ones(2, 1, dtype=torch.bool)) == 0).all()
    padded = {name: nn.functional.pad(v, (0, 0) * (v.ndim - 2) + (0, 9)) for name, v in batch.items() if v.ndim > 1}
    padded["conditions"] = batch["conditions"]
    torch.testing.assert_close(model(**padded).logits, model(**batch).logits)


@torch.no_grad()
def test_particles_of_one_gev():
    """ln pT = 0 is a particle, unless the published rule is on."""
    model = make("classifier")
    batch = batch_of(model.config)
    batch["particles"][0, 2, 2] = 0.0
    without = {**batch, "attention_mask": batch["attention_mask"].clone()}
    without["attention_mask"][0, 2] = 0
    expected, dropped = model(**batch).logits, model(**without).logits
    assert (expected[0] - dropped[0]).abs().max() > 1e-4
    model.config.mask_rule = "log_pt"
    torch.testing.assert_close(model(**batch).logits, dropped)
    del batch["attention_mask"]
    torch.testing.assert_close(model(**batch).logits, dropped)


@torch.no_grad()
def test_empty_jet_beside_a_condition():
    model = make("classifier")
    batch = batch_of(model.config, counts=(0, 5), slots=6)
    logits = model(**batch).logits
    assert logits.isfinite().all()
    torch.testing.assert_close(logits[1:], model(**{name: value[1:] for name, value in batch.items()}).logits)


# --- losses --------------------------------------------------------------------------------------------------------


def test_class_losses_written_out():
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 5), torch.tensor([0, 0, 0, 2, 3, 4])
    weights = torch.rand(6)
    config = OmniLearnedConfig(**{**TINY, "num_labels": 5})
    entropies = nn.functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(class_losses(config, logits, labels)[0], entropies.mean())
    torch.testing.assert_close(class_losses(config, logits, labels, weights)[0], (entropies * weights).mean())
    config.class_balancing = True
    balance = torch.tensor([1 / 3] * 3 + [1.0] * 3)
    balance = balance / balance.mean()
    expected = (entropies * weights * balance).mean()
    torch.testing.assert_close(class_losses(config, logits, labels, weights)[0], expected, rtol=1e-5, atol=1e-5)
    # as means over the batch the balance cancels
    config.loss_reduction = "batch"
    torch.testing.assert_close(class_losses(config, logits, labels)[0], entropies.mean(), rtol=1e-5, atol=1e-5)

    config = OmniLearnedConfig(**{**TINY, "num_labels": 5}, num_event_classes=2)
    of_jets, of_events = class_losses(config, logits, labels)
    torch.testing.assert_close(of_jets, nn.functional.cross_entropy(logits[:4, :3], labels[:4]))
    torch.testing.assert_close(of_events, nn.functional.cross_entropy(logits[4:, 3:], labels[4:] - 3))
    # without jets of one kind its part is 0
    assert class_losses(config, logits[:4], labels[:4])[1] == 0


def test_flow_loss_written_out():
    torch.manual_seed(0)
    velocity, target = torch.randn(3, 4, 4), torch.randn(3, 4, 4)
    counts = [4, 1, 2]
    is_real = torch.arange(4) < torch.tensor(counts).unsqueeze(1)
    velocity, target = velocity * is_real.unsqueeze(-1), target * is_real.unsqueeze(-1)
    expected = sum(((velocity[i, :n] - target[i, :n]) ** 2).sum() / n for i, n in enumerate(counts)) / 3
    torch.testing.assert_close(flow_loss(OmniLearnedConfig(**TINY), velocity, target, is_real), expected)


def test_contrastive_loss_weighs_every_jet():
    torch.manual_seed(0)
    clean, noised, weights = torch.randn(4, 3, 5), torch.randn(4, 3, 5), torch.tensor([1.0, 0.0, 0.0, 0.0])
    config = OmniLearnedConfig(**TINY)
    scores = 2.74 * nn.functional.normalize(clean.flatten(1), dim=-1) @ nn.functional.normalize(noised.flatten(1)).T
    losses = -0.5 * (scores.log_softmax(1).diagonal() + scores.log_softmax(0).diagonal())
    torch.testing.assert_close(contrastive_loss(config, clean, noised, weights), losses[0] / 4)
    config.contrastive_weighting = "batch"
    torch.testing.assert_close(contrastive_loss(config, clean, noised, weights), losses.mean() / 4)


def test_contrast_is_between_slots_wherever_the_padding_is():
    model = make("pretraining", objectives=["classification", "generation"], contrastive_loss_weight=1.0)
    batch = batch_of(model.config)
    batch["attention_mask"][0, 2] = 0
    torch.manual_seed(1)
    flow = {"time": torch.rand(len(COUNTS)), "noise": torch.randn(batch["particles"].shape)}
    outputs = model(**batch, **targets_of("pretraining", batch) | flow)
    is_real = batch["attention_mask"].unsqueeze(-1)
    share = flow["time"][:, None, None]
    noise = modeling_omnilearned.scaled_noise(model.config, flow["noise"])
    noised = {**batch, "particles": ((1 - share) * batch["particles"] + share * noise) * is_real}
    states = (model.model(**batch), model.model(**noised, time=flow["time"]))
    expected = contrastive_loss(
        model.config, *(output.last_hidden_state for output in states), (1 - flow["time"]).square()
    )
    torch.testing.assert_close(outputs.contrastive_loss, expected, rtol=1e-4, atol=1e-6)


def test_parts_add_up_to_the_loss():
    model = make("pretraining", contrastive_loss_weight=0.3, masked_loss_weight=2.0, perturbed_loss_weight=0.5)
    config = model.config
    batch = batch_of(config)
    outputs = model(**batch, **targets_of("pretraining", batch))
    expected = (
        outputs.class_loss
        + outputs.generation_loss
        + 2 * outputs.masked_loss
        + 0.5 * outputs.perturbed_class_loss
        + outputs.masked_input_loss
        + 0.3 * outputs.contrastive_loss
    )
    torch.testing.assert_close(outputs.loss, expected)
    masked = outputs.masked_positions
    predictions = outputs.masked_predictions[masked]
    torch.testing.assert_close(outputs.masked_loss, (predictions - batch["particles"][masked]).abs().mean())
    model.train()
    again = model(**batch, **targets_of("pretraining", batch))
    assert again.masked_predictions is None
    torch.testing.assert_close(again.loss, outputs.loss)


@pytest.mark.parametrize(
    "objectives",
    [["classification"], ["generation"], ["masked"], ["classification", "masked"], ["generation", "masked"]],
)
def test_every_mixture_of_objectives(objectives):
    use_time = "generation" in objectives
    model = make("pretraining", objectives=objectives, use_time=use_time).train()
    batch = batch_of(model.config)
    outputs = model(**batch, labels=torch.arange(5) % 3)
    outputs.loss.backward()
    assert (outputs.class_loss is not None) == ("classification" in objectives)
    assert (outputs.generation_loss is not None) == use_time
    assert (outputs.masked_loss is not None) == ("masked" in objectives)
    without_gradient = [n for n, p in model.named_parameters() if p.grad is None]
    assert not without_gradient


def test_masked_particles_are_hidden():
    """Nothing of a masked particle but its rank reaches the prediction."""
    model = make("pretraining", objectives=["masked"], use_time=False)
    batch = batch_of(model.config)
    masked = targets_of("pretraining", batch)["masked_positions"]
    with torch.no_grad():
        expected = model(**batch, masked_positions=masked).masked_predictions
        hidden = masked & batch["attention_mask"].bool()
        assert hidden.any()
        batch["particles"][hidden] *= torch.tensor([-1.0, -1.0, 1.0, 0.5])
        batch["particle_ids"][hidden] = 1
        batch["additional_features"][hidden] += 1
        found = model(**batch, masked_positions=masked).masked_predictions
    torch.testing.assert_close(found, expected)


def test_completely_masked_jets():
    """No NaN, also where nothing of a jet is left and it has no condition."""
    model = make("pretraining", num_conditions=0).train()
    batch = batch_of(model.config)
    masked = batch["attention_mask"].bool().clone()
    masked[2:] = False
    outputs = model(**batch, labels=torch.arange(5) % 3, masked_positions=masked)
    outputs.loss.backward()
    assert outputs.loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    # everything: nothing is left to classify
    outputs = model(**batch, labels=torch.arange(5) % 3, masked_positions=torch.ones(5, 12))
    assert outputs.masked_input_loss is None and outputs.loss.isfinite()
    # nothing: nothing to predict
    outputs = model(**batch, labels=torch.arange(5) % 3, masked_positions=torch.zeros(5, 12))
    assert outputs.masked_loss is None and outputs.loss.isfinite()


def test_draw_masked_and_ranks():
    is_real = torch.arange(12) < torch.tensor(COUNTS).unsqueeze(1)
    is_masked = draw_masked(is_real, 0.4)
    assert is_masked.sum() == int(0.4 * sum(COUNTS)) and not (is_masked & ~is_real).any()
    log_pt = torch.tensor([[1.0, 4.0, 3.0, 2.0, 0.0]])
    real, masked = torch.tensor([[1, 1, 1, 1, 0]]).bool(), torch.tensor([[1, 0, 1, 1, 0]]).bool()
    slots = torch.tensor([[0, 2, 3, 5, 6]])
    ranks = [masked_ranks(log_pt, real, masked, slots, kind) for kind in ("rank_among_masked", "rank", "position")]
    assert ranks[0][masked].tolist() == [2, 0, 1]
    assert ranks[1][masked].tolist() == [3, 1, 2]
    assert ranks[2][masked].tolist() == [0, 3, 5]


def test_codes():
    model = make("pretraining", objectives=["masked"], use_time=False, codebook_size=7, label_smoothing=0.0)
    batch = batch_of(model.config)
    centroids, scales = torch.randn(7, 4), torch.tensor([0.1, 0.1, 0.5, 0.5])
    model.set_codebook(centroids, scales)
    codes = model.codes(batch["particles"])
    distances = (batch["particles"][:, :, None] / scales - centroids).square().sum(-1)
    assert torch.equal(codes, distances.argmin(-1))
    outputs = model(**batch, masked_positions=targets_of("pretraining", batch)["masked_positions"])
    masked = outputs.masked_positions
    expected = nn.functional.cross_entropy(outputs.masked_predictions[masked], codes[masked])
    torch.testing.assert_close(outputs.loss, expected)


def test_particle_classes_do_not_see_the_class_of_the_jet():
    """The published head is told the true class of the jet."""
    model = make("particles")
    batch = batch_of(model.config)
    first, second = torch.tensor([0, 1, 2, 0, 1]), torch.tensor([1, 1, 1, 1, 1])
    with torch.no_grad():
        assert model.generator.embed_labels is None
        expected = model(**batch).logits
        torch.testing.assert_close(model(**batch, jet_labels=first).logits, expected)
        model = make("particles", particle_label_token=True)
        told = [model(**batch, jet_labels=classes).logits for classes in (first, second)]
        assert (told[0] - told[1]).abs().max() > 1e-4
        # without labels the most probable class stands for them
        outputs = model(**batch)
        torch.testing.assert_close(outputs.logits, model(**batch, jet_labels=outputs.jet_logits.argmax(-1)).logits)


def test_regression_of_particles_and_jets():
    model = make("particles", problem_type="regression")
    assert model.classifier is None
    batch = batch_of(model.config)
    values = torch.randn(5, 12, 5)
    mask = batch["attention_mask"].bool()
    outputs = model(**batch, labels=values)
    torch.testing.assert_close(outputs.loss, (outputs.logits - values)[mask].square().mean())
    model.config.loss_over_padding = True
    torch.testing.assert_close(model(**batch, labels=values).loss, (outputs.logits - values).square().mean())

    model = make("classifier", problem_type="regression", num_labels=1)
    outputs = model(**batch, labels=torch.randn(5))
    assert outputs.logits.shape == (5, 1) and outputs.loss.isfinite()


def test_feature_dropout_drops_whole_jets():
    model = make("classifier", feature_dropout=1.0)
    batch = batch_of(model.config)
    model.train()
    with torch.no_grad():
        expected = model(**batch).logits
        batch["particle_ids"] = batch["particle_ids"].clamp(max=1)
        batch["additional_features"] = torch.zeros_like(batch["additional_features"])
        torch.testing.assert_close(model(**batch).logits, expected)
        model.eval()
        assert (model(**batch).logits - expected).abs().max() > 1e-4


@EACH_CLASS
def test_trainer_learns(kind, tmp_path):
    model = make(kind)
    batch = batch_of(model.config, counts=(6, 3, 8, 5) * 4, slots=8)
    rows = {**batch, **targets_of(kind, batch)}
    rows = [{name: value[i] for name, value in rows.items()} for i in range(16)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=12,
        per_device_train_batch_size=16,
        learning_rate=3e-3,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        remove_unused_columns=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows[:5])
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]
    assert math.isfinite(trainer.evaluate()["eval_loss"])


# --- sampling ------------------------------------------------------------------------------------------------------


def sampled(model, counts=(5, 2, 9, 2), **settings):
    config = model.config
    batch = batch_of(config, counts=counts, slots=max(counts))
    inputs = {name: batch[name] for name in batch if name not in ("particles", "attention_mask")}
    settings = {"labels": [0, 1, 2, 0], "num_inference_steps": 3, **inputs, **settings}
    if "num_particles" not in settings and "attention_mask" not in settings:
        settings["num_particles"] = list(counts)
    return model.generate(generator=torch.Generator().manual_seed(5), **settings)


def test_generate():
    model = make("generator")
    sample = sampled(model)
    assert sample.particles.shape == (4, 9, 4) and sample.attention_mask.sum(1).tolist() == [5, 2, 9, 2]
    assert sample.num_function_evaluations == 6
    assert (sample.particles[sample.attention_mask == 0] == 0).all() and sample.particles.isfinite().all()
    # batches do not matter
    torch.testing.assert_close(sampled(model, batch_size=1).particles, sample.particles, rtol=1e-4, atol=1e-5)
    assert sampled(model, num_inference_steps=None, counts=(2, 2, 2, 2)).num_function_evaluations == 32
    others = sampled(model, labels=[1, 1, 1, 1])
    assert (others.particles - sample.particles).abs().max() > 1e-4
    # with at most five particles neighbours do not change on the way, and the field is smooth
    few = {"counts": (5, 2, 4, 2)}
    precise = sampled(model, **few, num_inference_steps=30, solver="rk4").particles
    adaptive = sampled(model, **few, num_inference_steps=None, solver="dopri5", rtol=1e-6, atol=1e-6).particles
    torch.testing.assert_close(adaptive, precise, rtol=1e-3, atol=1e-3)


def test_multiplicity_from_the_conditions():
    model = make("generator", num_conditions=1)
    every = torch.arange(1, 151).unsqueeze(1) / 100
    assert torch.equal(model.multiplicity(every), torch.arange(1, 151))
    model.config.truncate_multiplicity = True
    lost = (model.multiplicity(every) != torch.arange(1, 151)).nonzero().squeeze(1) + 1
    assert lost.tolist() == [53, 59, 105, 106, 117, 118]
    model = make("generator", num_conditions=1, num_particle_types=0, num_additional_features=0)
    sample = model.generate(conditions=torch.tensor([[0.03], [0.07]]), labels=[0, 1], num_inference_steps=1)
    assert sample.attention_mask.sum(1).tolist() == [3, 7]


def test_guidance_needs_dropped_labels():
    model = make("generator", label_dropout=0.5)
    plain, guided = (sampled(model, guidance_scale=scale).particles for scale in (1.0, 3.0))
    assert (plain - guided).abs().max() > 1e-4
    batch = batch_of(model.config)
    targets = targets_of("generator", batch)
    model.config.label_dropout = 1.0
    with torch.no_grad():
        dropped = [model.train()(**batch, **{**targets, "labels": torch.full((5,), c)}).velocity for c in (0, 2)]
    torch.testing.assert_close(*dropped)
    with pytest.raises(ValueError, match="label_dropout"):
        sampled(make("generator"), guidance_scale=2.0)


# --- malformed input -----------------------------------------------------------------------------------------------


def put(batch: dict, name: str, place: tuple, value) -> dict:
    batch[name] = batch[name].clone()
    batch[name][place] = value
    return batch


@pytest.mark.parametrize(
    "break_it, message",
    [
        (
            lambda b: {**b, "particles": b["particles"][..., :3]},
            r"`particles` has shape \(5, 12, 3\), expected \(batch",
        ),
        (lambda b: {**b, "particles": b["particles"][0]}, "`particles` has shape"),
        (lambda b: {**b, "particles": b["particles"][:, :0]}, "at least one jet and one slot"),
        (
            lambda b: put(b, "particles", (3, 1, 2), torch.nan),
            r"`particles` of jet 3, slot 1 is .*nan.*expected finite",
        ),
        (lambda b: put(b, "particles", (0, 0, 0), torch.inf), "`particles` of jet 0, slot 0 is .*inf"),
        (lambda b: put(b, "attention_mask", (2,), 0), "jet 2 of the batch has no particles, expected at least one"),
        (lambda b: {**b, "attention_mask": b["attention_mask"][:, :5]}, r"`attention_mask` has shape \(5, 5\)"),
        (lambda b: {k: v for k, v in b.items() if k != "attention_mask"}, "of jet 0 is 0 in slot 9: padding"),
        (lambda b: {k: v for k, v in b.items() if k != "particle_ids"}, "`particle_ids` is missing"),
        (lambda b: put(b, "particle_ids", (1, 0), 9), "`particle_ids` of jet 1, slot 0 is 9, expected 0 to 8"),
        (lambda b: put(b, "particle_ids", (1, 0), -1), "`particle_ids` of jet 1, slot 0 is -1"),
        (lambda b: {k: v for k, v in b.items() if k != "additional_features"}, "`additional_features` is missing"),
        (lambda b: {**b, "additional_features": b["additional_features"][..., :2]}, r"expected \(5, 12, 4\)"),
        (lambda b: put(b, "additional_features", (4, 3, 1), torch.nan), "`additional_features` of jet 4, slot 3"),
        (lambda b: {**b, "conditions": torch.zeros(5, 2)}, "`conditions` is given, but the configuration has none"),
        (lambda b: {**b, "labels": torch.tensor([0, 1, 2, 3, 0])}, "`labels` of jet 3 is 3, expected 0 to 2"),
        (lambda b: {**b, "labels": torch.tensor([0, 1, -100, 2, 0])}, "`labels` of jet 2 is -100, expected 0 to 2"),
        (lambda b: {**b, "labels": torch.zeros(4, dtype=torch.long)}, r"`labels` has shape \(4,\), expected \(5,\)"),
        (lambda b: {**b, "labels": torch.zeros(5)}, "`labels` is torch.float32, expected integers"),
        (lambda b: {**b, "labels": torch.ones(5) > 0}, "`labels` is torch.bool, expected integers"),
        (lambda b: {**b, "particles": b["particles"].int()}, "`particles` is torch.int32, expected floating-point"),
        (lambda b: {**b, "particle_ids": b["particle_ids"].float()}, "`particle_ids` is torch.float32, expected int"),
        (lambda b: put(b, "attention_mask", (3, 1), 2), "`attention_mask` of jet 3, slot 1 is 2, expected 0 or 1"),
        (
            lambda b: {**b, "attention_mask": b["attention_mask"].float().log()},
            "`attention_mask` of jet 0, slot 9 is -inf, expected 0 or 1",
        ),
        (lambda b: {**b, "labels": [0, 1, 2, 0, 1]}, "`labels` is list, expected a tensor"),
    ],
)
@pytest.mark.parametrize("kind", ["classifier", "pretraining"])
def test_hostile_inputs(kind, break_it, message):
    model = make(kind, num_conditions=0)
    batch = {**batch_of(model.config), "labels": torch.arange(5) % 3}
    with pytest.raises(ValueError, match=message) as caught:
        model(**break_it(batch))
    assert "\n" not in str(caught.value)


def test_hostile_conditions_time_and_noise():
    model = make("generator")
    batch = batch_of(model.config)
    batch |= targets_of("generator", batch)
    for changes, message in (
        ({"conditions": None}, r"`conditions` is missing, expected shape \(5, 2\)"),
        ({"conditions": torch.zeros(5, 3)}, r"`conditions` has shape \(5, 3\), expected \(5, 2\)"),
        ({"conditions": torch.full((5, 2), torch.nan)}, "`conditions` of jet 0 are .*nan"),
        ({"time": torch.zeros(5, 1)}, r"`time` has shape \(5, 1\), expected \(5,\)"),
        ({"time": torch.tensor([0.0, 0.5, torch.nan, 1.0, 1.0])}, "`time` of jet 2 is nan, expected 0 .* to 1"),
        ({"time": torch.full((5,), 1.1)}, "`time` of jet 0 is 1.1, expected 0 .* to 1"),
        ({"noise": torch.zeros(5, 12, 3)}, "`noise` has shape"),
        ({"noise": torch.full((5, 12, 4), torch.nan)}, "`noise` of jet 0, slot 0 is .*nan"),
        ({"labels": None}, "`labels` is missing"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**{**batch, **changes})
    # an empty jet has no mean over its particles, whatever its condition
    with pytest.raises(ValueError, match="jet 1 of the batch has no particles"):
        model(**put(batch, "attention_mask", (1,), 0))
    with pytest.raises(ValueError, match="`time` is given, but"):
        classifier = make("classifier").model
        classifier(**batch_of(classifier.config), time=torch.zeros(5))


def test_hostile_particle_labels():
    model = make("particles")
    batch = batch_of(model.config)
    targets = targets_of("particles", batch)
    for changes, message in (
        ({"labels": targets["labels"][:, :4]}, r"`labels` has shape \(5, 4\), expected \(5, 12\)"),
        ({"labels": targets["labels"].float()}, "`labels` is torch.float32, expected integers"),
        ({"labels": targets["labels"].clone().fill_(5)}, "`labels` of jet 0, slot 0 is 5, expected less than 5"),
        ({"jet_labels": torch.full((5,), 3)}, "`jet_labels` of jet 0 is 3, expected 0 to 2"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**batch, **{**targets, **changes})
    with pytest.raises(ValueError, match="`jet_labels` are given"):
        make("particles", problem_type="regression")(**batch, jet_labels=targets["jet_labels"])


def test_hostile_codes_and_positions():
    model = make("pretraining", objectives=["masked"], use_time=False, codebook_size=3)
    batch = batch_of(model.config)
    masked = torch.ones(5, 12)
    with pytest.raises(ValueError, match="call `set_codebook`"):
        model(**batch, masked_positions=masked)
    with pytest.raises(ValueError, match=r"`centroids` has shape \(2, 4\), expected \(3, 4\)"):
        model.set_codebook(torch.zeros(2, 4), torch.ones(4))
    with pytest.raises(ValueError, match="has no codes"):
        make("pretraining").set_codebook(torch.zeros(2, 4), torch.ones(4))
    model = make("pretraining", max_position_embeddings=11)
    with pytest.raises(ValueError, match="position 11, expected less than `max_position_embeddings` = 11"):
        model(**batch, labels=torch.arange(5) % 3, masked_positions=masked)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_particles": [5, 0, 9, 2]}, "row 1: 0 particles"),
        ({"labels": [0, 1, 2, 3]}, "`labels` of jet 3 is 3, expected 0 to 2"),
        ({"labels": None}, "`labels` is missing"),
        ({"conditions": None}, "`conditions` is missing"),
        ({"conditions": torch.full((4, 2), torch.inf)}, "`conditions` of jet 0 are .*inf"),
        ({"additional_features": torch.full((4, 9, 4), torch.nan)}, "`additional_features` of jet 0, slot 0"),
        ({"additional_features": torch.zeros(4, 9, 3)}, "`additional_features` has shape"),
        ({"particle_ids": torch.full((4, 9), 9)}, "`particle_ids` of jet 0, slot 0 is 9"),
        # the jet of the request, wherever the sampler sorts it
        ({"particle_ids": torch.tensor([[1] * 9, [1] * 9, [1] * 8 + [-1], [1, 10] + [1] * 7])}, "jet 2, slot 8 is -1"),
        ({"particle_ids": torch.ones(4, 9)}, "`particle_ids` is torch.float32, expected integers"),
        ({"particle_ids": torch.ones(4, 9, 1, dtype=torch.long)}, "`particle_ids` has shape"),
        ({"conditions": torch.zeros(4, 1, 2)}, r"`conditions` has shape \(4, 1, 2\), expected \(4, 2\)"),
        ({"tags": torch.zeros(4)}, "unknown input 'tags', expected labels, conditions, particle_ids"),
        ({"solver": "heun"}, "`solver` is 'heun'"),
        ({"num_inference_steps": 0}, "`num_inference_steps` is 0"),
    ],
)
def test_hostile_sampling(changes, message):
    with pytest.raises(ValueError, match=message):
        sampled(make("generator"), **changes)
