"""FM4NPP models: sizes, initialisation, batches and pieces, losses written out, frozen backbones, bad input."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score
from transformers import Trainer, TrainingArguments

from hepzoo.modeling import modeling_fm4npp
from hepzoo.modeling.configuration_fm4npp import Fm4nppConfig
from hepzoo.modeling.modeling_fm4npp import (
    Fm4nppCache,
    Fm4nppForPreTraining,
    Fm4nppForTokenClassification,
    Fm4nppForTrackFinding,
    Fm4nppHungarianMatcher,
    Fm4nppModel,
    Fm4nppTrackFindingOutput,
    encode_positions,
)

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "state_size": 8,
    "head_dim": 16,
    "num_neighbors": 3,
    "kernel_backend": "torch",
    "head_size": 24,
    "head_intermediate_size": 20,
    "num_prototypes": 6,
}
LENGTHS = (7, 1, 12, 4)
SSM = pytest.mark.parametrize("ssm", ["mamba1", "mamba2"])
HEADS = (Fm4nppForTrackFinding, Fm4nppForTokenClassification)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Several threads on tensors this small only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_model(model_class=Fm4nppForPreTraining, seed: int = 0, **settings):
    torch.manual_seed(seed)
    model = model_class(Fm4nppConfig(**{**TINY, **settings})).eval()
    # weights that start at 0 or 1 would hide errors
    torch.manual_seed(seed + 1)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def make_batch(lengths=LENGTHS, num_neighbors: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random events with every kind of target; what stands in the padding must not matter."""
    generator = torch.Generator().manual_seed(seed)
    size = (len(lengths), max(lengths))
    mask = (torch.arange(size[1]) < torch.tensor(lengths)[:, None]).long()
    neighbors = torch.rand(*size, 3 * num_neighbors, generator=generator)
    # fewer and fewer neighbours towards the end
    exists = (
        torch.arange(num_neighbors).repeat_interleave(3)
        < (torch.tensor(lengths)[:, None] - torch.arange(size[1]))[..., None] - 1
    )
    return {
        "points": torch.rand(*size, 4, generator=generator),
        "attention_mask": mask,
        "neighbor_labels": neighbors.masked_fill(~exists, -100.0),
        "track_labels": torch.randint(0, 4, size, generator=generator).masked_fill(mask == 0, -100),
        "labels": torch.randint(0, 2, size, generator=generator).masked_fill(mask == 0, -100),
    }


def inputs_of(batch: dict, *names: str) -> dict:
    return {name: batch[name] for name in ("points", "attention_mask", *names)}


def single_events(batch: dict, *names: str) -> list[dict]:
    """The events of a batch, each without padding."""
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    return [
        {name: batch[name][event : event + 1, :length] for name in ("points", *names)}
        for event, length in enumerate(lengths)
    ]


# Sizes and configuration


@pytest.mark.parametrize(
    ("name", "mamba1", "mamba2"),
    [
        ("m1", 343_066, 319_042),
        ("m2", 1_337_306, 1_243_178),
        ("m3", 5_279_578, 4_907_002),
        ("m4", 20_979_290, 19_496_858),
        ("m5", 83_639_386, 77_725_402),
        ("m6", 187_980_378, 174_685_722),
    ],
)
def test_paper_sizes_have_the_published_number_of_parameters(name, mamba1, mamba2):
    for ssm, expected in (("mamba1", mamba1), ("mamba2", mamba2)):
        config = Fm4nppConfig.from_paper_size(name, ssm=ssm)
        assert config.paper_size == name
        with torch.device("meta"):
            model = Fm4nppForPreTraining(config)
        assert sum(parameter.numel() for parameter in model.parameters()) == expected
        # the random projections, which are not trained
        assert sum(buffer.numel() for buffer in model.buffers()) == 64 * config.hidden_size


def test_published_heads_have_the_published_number_of_parameters():
    with torch.device("meta"):
        track = Fm4nppForTrackFinding(Fm4nppConfig()).head
        pid, noise = (Fm4nppForTokenClassification(Fm4nppConfig(num_labels=labels)).head for labels in (5, 2))
    # the published heads hold an embedder and a norm that they do not use: random projections, or learned ones
    width = 256
    random_embedder, learned_embedder = 64 * width, width // 4 + 3 * (width - width // 4) + 2 * width
    counts = [sum(parameter.numel() for parameter in head.parameters()) + width for head in (track, pid, noise)]
    assert counts[0] + random_embedder == 2_203_918
    assert [count + learned_embedder for count in counts[1:]] == [399_249, 398_478]


def test_configuration_round_trip(tmp_path):
    config = Fm4nppConfig.from_paper_size(
        "m2", ssm="mamba1", num_prototypes=40, loss_bin_edges=[0, 5], loss_bin_weights=[1]
    )
    config.save_pretrained(tmp_path)
    again = Fm4nppConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert (again.hidden_size, again.state_size, again.time_step_rank, again.paper_size) == (128, 8, 8, "m2")
    assert Fm4nppConfig(num_hidden_layers=3).paper_size is None
    fields = set(Fm4nppConfig().to_dict()) - set(json.loads((tmp_path / "config.json").read_text()))
    assert not fields & set(TINY)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ssm": "mamba3"}, "`ssm` is 'mamba3', expected one of mamba1, mamba2"),
        ({"kernel_backend": "cuda"}, "`kernel_backend` is 'cuda'"),
        ({"embedding_method": "additive"}, "`embedding_method` is 'additive', expected one of add, concat, legacy"),
        ({"position_encoding": "fourier"}, "`position_encoding` is 'fourier'"),
        ({"hidden_size": 0}, "`hidden_size` is 0, expected at least 1"),
        ({"num_refinement_layers": -1}, "`num_refinement_layers` is -1"),
        ({"ssm": "mamba2", "hidden_size": 40, "head_dim": 64}, "= 80 is not a multiple of `head_dim` = 64"),
        ({"head_size": 30}, "`head_size` = 30 is not a multiple"),
        ({"time_step_min": 0.2}, "`time_step_min` is 0.2"),
        ({"label_shift": 3}, "`label_shift` is 3"),
        ({"loss_reweight": True}, "`loss_reweight` needs `loss_bin_edges`"),
        ({"loss_bin_edges": [0, 1], "loss_bin_weights": [1, 2]}, "one edge more than weights"),
        ({"loss_bin_edges": [0, 2, 1], "loss_bin_weights": [1, 2]}, "expected ascending numbers"),
        ({"loss_bin_edges": [0, float("nan")], "loss_bin_weights": [1]}, "expected ascending numbers"),
        ({"loss_bin_edges": [0, 1], "loss_bin_weights": [-1]}, "`loss_bin_weights` is .-1., expected finite numbers"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"hidden_dropout": float("nan")}, "`hidden_dropout` is nan, expected 0 <= p < 1"),
        ({"head_dropout": 1}, "`head_dropout` is 1, expected 0 <= p < 1"),
        ({"layer_norm_eps": float("inf")}, "`layer_norm_eps` is inf, expected finite numbers"),
        ({"focal_weight": float("nan")}, "`focal_weight` is nan, expected finite numbers"),
        ({"match_dice_cost": -1}, "`match_dice_cost` is -1, expected finite numbers of at least 0"),
        ({"time_step_max": float("inf")}, "`time_step_max` inf"),
        ({"class_weights": [1.0, float("nan")]}, "`class_weights` is .1.0, nan., expected finite numbers"),
    ],
)
def test_hostile_configuration(settings, message):
    with pytest.raises(Exception, match="(?s)" + message.replace("(", r"\(")) as error:
        Fm4nppConfig(**{**TINY, **settings})
    assert isinstance(error.value, ValueError) or "Validation" in type(error.value).__name__


def test_hostile_paper_size():
    with pytest.raises(ValueError, match="paper size is 'm7', expected one of m1, m2"):
        Fm4nppConfig.from_paper_size("m7")


# Embedding


@pytest.mark.parametrize(("method", "size"), [("nerf", 63), ("ff", 75), ("cpe", 32), ("none", 3)])
def test_position_encodings(method, size):
    coordinates = torch.rand(2, 5, 3)
    encoded = encode_positions(coordinates, method, 32)
    assert encoded.shape == (2, 5, size)
    if method != "cpe":
        assert torch.equal(encoded[..., :3], coordinates)
    eta, phi, r = coordinates[0, 0].tolist()
    if method == "nerf":
        # octave 3 of phi
        assert encoded[0, 0, 3 + 6 * 3 + 1] == pytest.approx(math.sin(8 * phi), abs=1e-5)
        assert encoded[0, 0, 3 + 6 * 3 + 4] == pytest.approx(math.cos(8 * phi), abs=1e-5)
    if method == "ff":
        assert encoded[0, 0, 3 + 12 + 11] == pytest.approx(math.sin(math.pi * 10 * phi), abs=1e-4)
        assert encoded[0, 0, 3 + 36 + 24] == pytest.approx(math.cos(math.pi * r), abs=1e-4)
    if method == "cpe":
        assert encoded[0, 0, 2] == pytest.approx(math.sin(2 * math.pi * eta / 10000**0.2), abs=1e-5)
        assert encoded[0, 0, 10 + 1] == pytest.approx(math.cos(2 * math.pi * phi), abs=1e-5)
        assert encoded[..., 30:].abs().max() == 0


@pytest.mark.parametrize("position", ["nerf", "ff", "cpe", "none"])
@pytest.mark.parametrize("method", ["add", "concat", "legacy"])
def test_embeddings_survive_saving_and_only_the_legacy_one_is_trained(method, position, tmp_path):
    model = make_model(embedding_method=method, position_encoding=position)
    model.save_pretrained(tmp_path)
    again = Fm4nppForPreTraining.from_pretrained(tmp_path).eval()
    batch = inputs_of(make_batch(), "neighbor_labels")
    outputs = model(**batch)
    torch.testing.assert_close(again(**batch).predictions, outputs.predictions, rtol=0, atol=0)
    assert any(True for _ in model.model.embedder.parameters()) == (method == "legacy")
    outputs.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_high_octaves_survive_half_precision():
    """Coordinates are encoded before anything is rounded: 2^9 c has no digits left in bfloat16."""
    model = make_model(Fm4nppModel)
    points = torch.rand(1, 50, 4)
    expected = model.embedder(points)
    rounded = copy.deepcopy(model.embedder).to(torch.bfloat16)(points)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - expected).abs().max() < 0.03 * expected.abs().max()


@pytest.mark.parametrize("method", ["add", "concat", "legacy"])
def test_points_stay_where_they_are_under_autocast(method):
    """In bfloat16 a point of 60 cm radius would move by up to 7 mm in phi."""
    model = make_model(Fm4nppModel, embedding_method=method)
    points = torch.rand(1, 50, 4)
    expected = model.embedder(points)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(model.embedder(points), expected, rtol=0, atol=0)


def test_points_of_half_precision_are_warned_about(caplog, monkeypatch):
    monkeypatch.setattr(modeling_fm4npp.logger, "propagate", True)
    modeling_fm4npp.logger.warning_once.cache_clear()
    model = make_model(Fm4nppModel)
    model(torch.rand(1, 5, 4))
    assert not caplog.records
    model(torch.rand(1, 5, 4).bfloat16())
    assert "`points` are torch.bfloat16" in caplog.records[0].getMessage()


# Initialisation


@SSM
def test_initial_steps_and_rates(ssm):
    torch.manual_seed(0)
    config = Fm4nppConfig(**{**TINY, "hidden_size": 128}, ssm=ssm)
    mixer = Fm4nppForPreTraining(config).model.layers[0].mixer
    bias = mixer.dt_proj.bias if ssm == "mamba1" else mixer.dt_bias
    steps = torch.nn.functional.softplus(bias)
    assert 1e-3 * 0.999 <= steps.min() < 1e-2 < steps.max() <= 0.1 * 1.001
    rates = mixer.A_log.exp()
    if ssm == "mamba1":
        torch.testing.assert_close(rates[7], torch.arange(1.0, 9.0))
    else:
        assert 1 <= rates.min() < 6 < 10 < rates.max() <= 16
    assert torch.equal(mixer.D, torch.ones_like(mixer.D))
    assert mixer.conv1d.bias.abs().max() > 0

    model = Fm4nppForPreTraining(Fm4nppConfig(**TINY, ssm=ssm, zero_initial_biases=True))
    biases = [parameter for name, parameter in model.named_parameters() if "bias" in name]
    assert len(biases) == 2 * 2 + 1 and all(bias.abs().max() == 0 for bias in biases)


def test_mup_initialization():
    torch.manual_seed(0)
    settings = {"hidden_size": 256, "state_size": 64, "num_hidden_layers": 1, "mup_initialization": True}
    weight = Fm4nppModel(Fm4nppConfig(**settings)).layers[0].mixer.in_proj.weight.detach()
    B, C = weight[1024:1088], weight[1088:1152]
    assert B.std().item() == pytest.approx(math.sqrt(64 / 256), rel=0.03)
    assert C.std().item() == pytest.approx(math.sqrt(1 / (64 * 256)), rel=0.03)
    assert weight[:1024].abs().max() <= 1 / 16


@pytest.mark.parametrize("model_class", HEADS)
def test_heads_on_a_pretrained_backbone_are_initialised(model_class, tmp_path, caplog):
    """Every parameter that the checkpoint lacks is as in a new model; loading goes through the meta device."""
    pretrained = make_model()
    pretrained.save_pretrained(tmp_path)
    torch.manual_seed(3)
    model, info = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert {name.split(".")[0] for name in info["missing_keys"]} == {"head"}
    assert set(info["unexpected_keys"]) == {"neighbor_head.weight", "neighbor_head.bias"}
    for name, tensor in pretrained.model.state_dict().items():
        assert torch.equal(model.model.state_dict()[name], tensor), name
    torch.manual_seed(4)
    fresh = model_class(Fm4nppConfig(**TINY))
    for name, expected in fresh.head.state_dict().items():
        found = model.head.state_dict()[name]
        if expected.numel() < 100 or expected.std() == 0:
            bound = 1 if "norm" in name or "layer_weights" in name else expected.abs().max() * 1.5 + 1e-9
            assert found.abs().max() <= bound, name
            assert expected.std() != 0 or torch.equal(found, expected), name
        else:
            assert found.std() == pytest.approx(expected.std().item(), rel=0.25), name


def test_published_attention_init():
    models = [
        Fm4nppForTokenClassification(Fm4nppConfig(**TINY, published_attention_init=narrow)) for narrow in (False, True)
    ]
    sound, narrow = (model.head.layers[0] for model in models)
    assert sound.attn.q_proj.weight.abs().max() > 0.1 and sound.attn.q_proj.bias.abs().max() == 0
    for name, parameter in narrow.named_parameters():
        assert 0 < parameter.abs().max() <= 0.1 / 3, name
    assert torch.equal(sound.norm.weight, torch.ones_like(sound.norm.weight))


# Batches, pieces, precision


@SSM
def test_a_batch_gives_what_single_events_give(ssm):
    model = make_model(ssm=ssm)
    batch = make_batch()
    with torch.no_grad():
        outputs = model(**inputs_of(batch, "neighbor_labels"), output_hidden_states=True)
        features = model.model(**inputs_of(batch)).block_outputs
        for event, single in enumerate(single_events(batch, "neighbor_labels")):
            length = single["points"].shape[1]
            alone = model(**single, output_hidden_states=True)
            close = {"rtol": 1e-4, "atol": 1e-5}
            torch.testing.assert_close(outputs.predictions[event : event + 1, :length], alone.predictions, **close)
            torch.testing.assert_close(outputs.loss_per_event[event], alone.loss, **close)
            for found, expected in zip(outputs.hidden_states, alone.hidden_states):
                torch.testing.assert_close(found[event : event + 1, :length], expected, **close)
            for found, expected in zip(features, model.model(single["points"]).block_outputs):
                torch.testing.assert_close(found[event : event + 1, :length], expected, **close)


@SSM
@pytest.mark.parametrize("model_class", HEADS)
def test_a_batch_of_a_head_gives_what_single_events_give(model_class, ssm):
    model = make_model(model_class, ssm=ssm)
    name = "track_labels" if model_class is Fm4nppForTrackFinding else "labels"
    batch = make_batch()
    with torch.no_grad():
        outputs = model(**inputs_of(batch, name))
        alone = [model(**single) for single in single_events(batch, name)]
    losses = torch.stack([output.loss for output in alone])
    if model_class is Fm4nppForTrackFinding:
        torch.testing.assert_close(outputs.loss, losses.mean(), rtol=1e-4, atol=1e-5)
    else:
        lengths = batch["attention_mask"].sum(dim=1)
        torch.testing.assert_close(outputs.loss, (losses * lengths).sum() / lengths.sum(), rtol=1e-4, atol=1e-5)
    for event, (length, output) in enumerate(zip(LENGTHS, alone)):
        for key in ("class_logits", "mask_logits", "logits"):
            if key in output:
                found = outputs[key][event : event + 1]
                found = found if key == "class_logits" else found[:, :length]
                torch.testing.assert_close(found, output[key], rtol=1e-4, atol=1e-5)
        if model_class is Fm4nppForTrackFinding:
            found = model.assign_tracks(outputs, batch["attention_mask"])[event]
            assert torch.equal(found[:length], model.assign_tracks(output)[0])
            assert (found[length:] == -1).all()


@SSM
def test_values_in_the_padding_do_not_matter(ssm):
    """Not even to the gradient; the published -100 and zeros are the same."""
    model = make_model(ssm=ssm)
    batch = inputs_of(make_batch(), "neighbor_labels")
    gradients = []
    for value in (0.0, -100.0):
        points = batch["points"].masked_fill(batch["attention_mask"].unsqueeze(-1) == 0, value).requires_grad_()
        model.zero_grad()
        model(**{**batch, "points": points}).loss.backward()
        assert points.grad[batch["attention_mask"] == 0].abs().max() == 0
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for first, second in zip(*gradients):
        torch.testing.assert_close(first, second, rtol=0, atol=0)


@SSM
def test_the_future_is_not_seen(ssm):
    model = make_model(ssm=ssm)
    points = torch.rand(1, 90, 4)
    changed = points.clone()
    changed[:, 70:] += 1
    with torch.no_grad():
        before, after = model(points).predictions, model(changed).predictions
    torch.testing.assert_close(before[:, :70], after[:, :70], rtol=1e-5, atol=1e-6)
    assert (before[:, 70:] - after[:, 70:]).abs().max() > 1e-2


@SSM
@pytest.mark.parametrize("pieces", [(12,), (5, 7), (1, 1, 2, 8), (4, 3, 5)])
def test_pieces_equal_one_pass(ssm, pieces):
    """Events of different lengths in pieces, some of which are past the end of an event; states and gradients too."""
    model = make_model(ssm=ssm)
    batch = inputs_of(make_batch())
    is_real = batch["attention_mask"].bool()
    whole = model(**batch, use_cache=True)
    cache, predictions, begin = Fm4nppCache(2), [], 0
    for length in pieces:
        part = {name: tensor[:, begin : begin + length] for name, tensor in batch.items()}
        # the cache is not changed: the same piece can be tried again
        model(**part, cache_params=cache)
        outputs = model(**part, cache_params=cache)
        predictions.append(outputs.predictions)
        cache, begin = outputs.cache_params, begin + length
    predictions = torch.cat(predictions, dim=1)
    torch.testing.assert_close(predictions[is_real], whole.predictions[is_real], rtol=1e-4, atol=1e-5)
    for name in ("states", "conv_windows"):
        for found, expected in zip(getattr(cache, name), getattr(whole.cache_params, name)):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

    gradients = []
    for outputs in (whole.predictions, predictions):
        model.zero_grad()
        outputs[is_real].square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


@SSM
def test_a_kernel_of_one_position_and_a_short_event(ssm):
    model = make_model(ssm=ssm, conv_kernel=1)
    outputs = model(**inputs_of(make_batch()), use_cache=True)
    assert outputs.predictions.isfinite().all()
    assert outputs.cache_params.conv_windows[0].shape[1] == 0


@SSM
def test_gradient_checkpointing_gives_the_same_gradients(ssm):
    model = make_model(ssm=ssm).train()
    batch = inputs_of(make_batch(), "neighbor_labels")
    gradients = []
    for checkpointing in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        if checkpointing:
            model.gradient_checkpointing_enable(checkpointing)
        model.zero_grad()
        model(**batch).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for others in gradients[1:]:
        for first, second in zip(gradients[0], others, strict=True):
            torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="cannot be used with gradient checkpointing"):
        model(**batch, use_cache=True)


@SSM
@pytest.mark.parametrize("model_class", [Fm4nppForPreTraining, *HEADS])
def test_bfloat16_is_close(model_class, ssm, tmp_path):
    model = make_model(model_class, ssm=ssm)
    model.save_pretrained(tmp_path)
    half = model_class.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    names = {str(parameter.dtype) for name, parameter in half.named_parameters() if "A_log" in name}
    assert names == {"torch.float32"}
    batch = make_batch()
    with torch.no_grad():
        expected, found = model(**inputs_of(batch)), half(**inputs_of(batch))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = model(**inputs_of(batch))
    key = next(name for name in ("predictions", "class_logits", "logits") if name in expected)
    for outputs in (found, mixed):
        assert outputs[key].dtype == torch.bfloat16
        difference = (outputs[key].float() - expected[key]).abs().max()
        assert difference < 0.1 * expected[key].abs().max(), difference


@pytest.mark.parametrize("model_class", HEADS)
def test_eager_equals_sdpa(model_class):
    model = make_model(model_class)
    batch = inputs_of(make_batch(), "track_labels" if model_class is Fm4nppForTrackFinding else "labels")
    gradients, losses = [], []
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append([parameter.grad.clone() for parameter in model.head.parameters()])
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
    for first, second in zip(*gradients):
        torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-5)


# Backbones under heads


@pytest.mark.parametrize("model_class", HEADS)
def test_a_frozen_backbone_is_not_trained(model_class, tmp_path):
    make_model(hidden_dropout=0.5).save_pretrained(tmp_path)
    name = "track_labels" if model_class is Fm4nppForTrackFinding else "labels"
    batch = inputs_of(make_batch(), name)
    model = model_class.from_pretrained(tmp_path).train()
    assert model.head.training and not model.model.training
    trainable = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {"head"}
    loss = model(**batch).loss
    loss.backward()
    assert all(parameter.grad is None for parameter in model.model.parameters())
    assert all(parameter.grad is not None for parameter in model.head.parameters())
    # no dropout in it
    torch.testing.assert_close(model(**batch).loss, loss)

    model = model_class.from_pretrained(tmp_path, freeze_backbone=False).train()
    assert model.model.training
    model(**batch).loss.backward()
    # the norm behind the last block is not what heads read; all that is trained has a gradient, as DDP expects
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"model.norm_f.weight"}
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_compiled_gives_the_same():
    """Tracing leaves the operators out, whose loops over positions it would unroll."""
    model = make_model(Fm4nppModel, ssm="mamba1", num_hidden_layers=1)
    points = torch.rand(2, 7, 4)
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager")(points).last_hidden_state
        torch.testing.assert_close(compiled, model(points).last_hidden_state)


@pytest.mark.parametrize("model_class", [Fm4nppForPreTraining, *HEADS])
def test_tuples_have_the_values_of_the_outputs(model_class):
    model, batch = make_model(model_class), inputs_of(make_batch())
    with torch.no_grad():
        expected = model(**batch).to_tuple()
        as_argument = model(**batch, return_dict=False)
        model.config.return_dict = False
        for found in (as_argument, model(**batch)):
            assert isinstance(found, tuple)
            torch.testing.assert_close(found[0], expected[0])


@pytest.mark.parametrize("model_class", HEADS)
def test_features_computed_before_are_the_same(model_class):
    model = make_model(model_class)
    batch = inputs_of(make_batch(), "track_labels" if model_class is Fm4nppForTrackFinding else "labels")
    with torch.no_grad():
        expected = model(**batch).loss
        features = model.model(**inputs_of(batch)).block_outputs
        batch.pop("points")
        torch.testing.assert_close(model(**batch, block_outputs=features).loss, expected)
        torch.testing.assert_close(model(**batch, block_outputs=torch.stack(features)).loss, expected)

        alone = model_class(Fm4nppConfig(**TINY, use_backbone=False)).eval()
        alone.head.load_state_dict(model.head.state_dict())
        assert all(name.startswith("head.") for name in alone.state_dict())
        torch.testing.assert_close(alone(**batch, block_outputs=features).loss, expected)
        with pytest.raises(ValueError, match="no backbone .*expected `block_outputs`"):
            alone(torch.rand(1, 3, 4))
        with pytest.raises(ValueError, match="either `points` or `block_outputs`"):
            model()
        with pytest.raises(ValueError, match=r"`block_outputs` has shape \(1, 4, 12, 32\), expected \(2, batch"):
            model(block_outputs=features[:1])
        with pytest.raises(ValueError, match=r"has the shapes \(4, 12, 32\), \(4, 11, 32\), expected one for all"):
            model(block_outputs=(features[0], features[1][:, :-1]))
        for empty in ((), torch.rand(2, 0, 12, 32), torch.rand(2, 4, 0, 32)):
            with pytest.raises(ValueError, match="`block_outputs` has shape"):
                model(block_outputs=empty)


# Losses


def test_neighbor_loss_written_out():
    model = make_model()
    batch = inputs_of(make_batch(), "neighbor_labels")
    with torch.no_grad():
        outputs = model(**batch)
        predictions, targets = outputs.predictions.double(), batch["neighbor_labels"].double()
        for shift in (0, 1, 2):
            model.config.label_shift = shift
            errors, counts = torch.zeros(len(LENGTHS)), torch.zeros(len(LENGTHS))
            for event, position, number in np.ndindex(*targets.shape):
                if position >= shift and targets[event, position, number] != -100:
                    difference = predictions[event, position - shift, number] - targets[event, position, number]
                    errors[event] += difference**2
                    counts[event] += 1
            found = model(**batch)
            torch.testing.assert_close(found.loss, errors.sum() / counts.sum())
            torch.testing.assert_close(found.loss_per_event, errors / counts.clamp(min=1))
        # an event of one point has no neighbour, and no part in anything
        assert found.loss_per_event[1] == 0
        model.config.label_shift = 0

        model.config.loss_bin_edges, model.config.loss_bin_weights = [2, 5, 12], [3.0, 0.5]
        assert model.event_weights(torch.tensor([1, 2, 4, 5, 11, 12])).tolist() == [0, 3, 3, 0.5, 0.5, 0]
        model.config.loss_reweight, model.config.loss_scale = True, 2.0
        weighted = outputs.loss_per_event * torch.tensor([0.5, 0.0, 0.0, 3.0])
        torch.testing.assert_close(model(**batch).loss, 2 * weighted.mean())


def test_no_neighbors_at_all_give_no_loss():
    model = make_model()
    outputs = model(torch.rand(2, 1, 4), neighbor_labels=torch.full((2, 1, 9), -100.0))
    outputs.loss.backward()
    assert outputs.loss == 0 and all(parameter.grad.isfinite().all() for parameter in model.parameters())


def track_loss_by_hand(class_logits, mask_logits, labels, is_real, match_padding=False) -> list[float]:
    """The four losses of a batch, event by event and pair by pair, in float64."""
    totals = np.zeros(4)
    for event in range(len(labels)):
        real = is_real[event]
        probability = 1 / (1 + np.exp(-mask_logits[event])) * real[:, None]
        exponentials = np.exp(class_logits[event] - class_logits[event].max(axis=1, keepdims=True))
        classes = exponentials / exponentials.sum(axis=1, keepdims=True)
        ids = sorted(set(labels[event]) if match_padding else set(labels[event][real]) - {-100})
        targets = [(labels[event] == track) & real for track in ids]
        num_prototypes = probability.shape[1]
        parts = np.zeros((2, num_prototypes, len(ids)))
        for prototype, track in np.ndindex(num_prototypes, len(ids)):
            target, p = targets[track], probability[:, prototype]
            parts[0, prototype, track] = 1 - (2 * (p * target).sum() + 1e-6) / (p.sum() + target.sum() + 1e-6)
            belongs, other = p[real & target], p[real & ~target]
            focal = 0.25 * ((1 - belongs) ** 2 * -np.log(belongs)).sum() + 0.75 * (other**2 * -np.log(1 - other)).sum()
            parts[1, prototype, track] = focal / real.sum()
        costs = -0.5 * classes[:, 1:] + parts[0] + 30 * parts[1]
        rows, columns = linear_sum_assignment(costs)
        unmatched = np.setdiff1d(np.arange(num_prototypes), rows)
        totals += [
            -np.log(classes[rows, 1] + 1e-6).sum(),
            -np.log(classes[unmatched, 0] + 1e-6).sum(),
            parts[0, rows, columns].sum(),
            parts[1, rows, columns].sum(),
        ]
    return (totals / len(labels)).tolist()


@pytest.mark.parametrize("match_padding", [False, True])
@pytest.mark.parametrize("num_prototypes", [2, 6])
def test_track_loss_written_out(num_prototypes, match_padding):
    """More prototypes than tracks and fewer; points without a track; an event without any."""
    model = make_model(Fm4nppForTrackFinding, num_prototypes=num_prototypes, match_padding=match_padding)
    batch = inputs_of(make_batch(), "track_labels")
    batch["track_labels"][0, 2:4] = -100
    batch["track_labels"][3] = -100
    with torch.no_grad():
        outputs = model(**batch)
    predictions = [(outputs.class_logits, outputs.mask_logits)]
    predictions += zip(outputs.auxiliary_class_logits, outputs.auxiliary_mask_logits)
    assert len(predictions) == 3
    labels, is_real = batch["track_labels"].numpy(), batch["attention_mask"].bool().numpy()
    rows = []
    for logits in predictions:
        terms = track_loss_by_hand(*(tensor.double().numpy() for tensor in logits), labels, is_real, match_padding)
        rows.append([*terms, np.dot(terms, [0.5, 0.1, 1, 30])])
    torch.testing.assert_close(outputs.loss_terms.double(), torch.tensor(rows), rtol=1e-4, atol=1e-5)
    assert outputs.loss.item() == pytest.approx(np.sum(rows, axis=0)[-1], rel=1e-4)


def joint_labels(batch: dict, seed: int = 4) -> dict[str, torch.Tensor]:
    """Particles with votes that differ within a track, noise, and one set of parameters per track; some without."""
    generator = torch.Generator().manual_seed(seed)
    shape = batch["track_labels"].shape
    pid = torch.randint(0, 3, shape, generator=generator)
    noise = torch.randint(0, 2, shape, generator=generator)
    parameters = torch.rand(4, 4, generator=generator)[batch["track_labels"].clamp(min=0)]
    pid[1], noise[0, 1], parameters[0, 1], parameters[3] = -100, -100, -100.0, -100.0
    return {"true_pid": pid, "true_noise": noise, "true_track_parameters": parameters}


def test_joint_losses_written_out():
    settings = {"joint_head": True, "track_parameter_weight": 3.0, "pid_weight": 0.5, "noise_weight": 2.0}
    model = make_model(Fm4nppForTrackFinding, num_pid_classes=3, **settings)
    batch = inputs_of(make_batch(), "track_labels")
    labels = joint_labels(batch)
    plain, outputs = model(**batch), model(**batch, **labels)
    is_real = batch["attention_mask"].bool()
    pairs = Fm4nppHungarianMatcher(model.config)(
        outputs.class_logits, outputs.mask_logits, batch["track_labels"], is_real
    )
    distance, particle = 0.0, 0.0
    for event, prototype, track in zip(*(values.tolist() for values in pairs)):
        points = [p for p in range(12) if is_real[event, p] and batch["track_labels"][event, p] == track]
        found = outputs.track_parameters[event, prototype].tolist()
        true = [labels["true_track_parameters"][event, p].tolist() for p in points]
        true = [values for values in true if -100 not in values]
        if true:
            assert all(values == true[0] for values in true)
            distance += sum(abs(a - b) for a, b in zip(found, true[0])) / 4
        votes = [labels["true_pid"][event, p].item() for p in points]
        votes = [vote for vote in votes if vote != -100]
        if votes:
            most = max(sorted(set(votes)), key=votes.count)
            particle -= math.log(outputs.pid_logits[event, prototype].softmax(dim=0)[most].item() + 1e-6)
    noise = [
        -outputs.noise_logits[event, point].log_softmax(dim=0)[labels["true_noise"][event, point]].item()
        for event, point in is_real.nonzero().tolist()
        if labels["true_noise"][event, point] != -100
    ]
    expected = torch.tensor([distance / 4, particle / 4, sum(noise) / len(noise)])
    torch.testing.assert_close(outputs.joint_loss_terms, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs.loss_terms, plain.loss_terms)
    assert outputs.loss.item() == pytest.approx((plain.loss + expected @ torch.tensor([3, 0.5, 2])).item(), rel=1e-4)
    # all parts of the head learn
    model.train()
    model(**batch, **labels).loss.backward()
    assert all(parameter.grad is not None for parameter in model.head.parameters())


def test_joint_losses_of_some_labels_only():
    model = make_model(Fm4nppForTrackFinding, joint_head=True, num_pid_classes=3)
    batch = inputs_of(make_batch(), "track_labels")
    labels = joint_labels(batch)
    terms = model(**batch, **labels).joint_loss_terms
    order = ("true_track_parameters", "true_pid", "true_noise")
    for index, name in enumerate(order):
        alone = model(**batch, **{name: labels[name]}).joint_loss_terms
        torch.testing.assert_close(alone[index], terms[index])
        assert alone.count_nonzero() == 1
    nothing = {name: torch.full_like(labels[name], -100) for name in order}
    assert model(**batch, **nothing).joint_loss_terms.count_nonzero() == 0


def test_hostile_joint_labels():
    batch = inputs_of(make_batch(), "track_labels")
    labels = joint_labels(batch)
    with pytest.raises(ValueError, match="`true_pid` needs a head with `joint_head`"):
        make_model(Fm4nppForTrackFinding)(**batch, true_pid=labels["true_pid"])
    model = make_model(Fm4nppForTrackFinding, joint_head=True, num_pid_classes=2)
    with pytest.raises(ValueError, match="`true_noise` needs .* `track_labels`"):
        model(**inputs_of(batch), true_noise=labels["true_noise"])
    with pytest.raises(ValueError, match="`true_pid` of event 0, point . is 2, expected 0 to 1"):
        model(**batch, true_pid=labels["true_pid"])
    with pytest.raises(ValueError, match=r"`true_track_parameters` has shape \(4, 12, 3\), expected \(4, 12, 4\)"):
        model(**batch, true_track_parameters=labels["true_track_parameters"][..., :3])


def test_certain_predictions_have_finite_losses_and_gradients():
    """1 - p is 0 in float32 long before the loss saturates."""
    model = make_model(Fm4nppForTrackFinding)
    labels, is_real = torch.tensor([[3, 3, 5, 5]]), torch.ones(1, 4, dtype=torch.bool)
    mask_logits = torch.full((1, 4, 6), 60.0, requires_grad=True)
    class_logits = torch.full((1, 6, 2), 50.0, requires_grad=True)
    losses = model._track_losses(class_logits, mask_logits, labels, is_real)
    losses[-1].backward()
    assert losses.isfinite().all() and mask_logits.grad.isfinite().all() and mask_logits.grad.abs().max() > 0


def test_matching_is_the_best_there_is():
    matcher = Fm4nppHungarianMatcher(Fm4nppConfig(**TINY))
    generator = torch.Generator().manual_seed(5)
    labels = torch.tensor([[7, 7, -2, -2, 40, 40, 40]])
    is_real = torch.ones_like(labels, dtype=torch.bool)
    (tracks,) = matcher.tracks(labels, is_real)
    assert tracks.tolist() == [-2, 7, 40]
    # prototypes 4, 0 and 2 claim one track each
    mask_logits = torch.randn(1, 7, 6, generator=generator)
    for prototype, track in ((4, 7), (0, -2), (2, 40)):
        mask_logits[0, :, prototype] = torch.where(labels[0] == track, 4.0, -4.0)
    events, prototypes, ids = matcher(torch.zeros(1, 6, 2), mask_logits, labels, is_real)
    assert events.tolist() == [0, 0, 0]
    assert dict(zip(prototypes.tolist(), ids.tolist())) == {4: 7, 0: -2, 2: 40}


def test_assignment_of_points():
    model = make_model(Fm4nppForTrackFinding)
    # prototype 1 is no track; the first is likelier a track than the last
    class_logits = torch.tensor([[[0.0, 2.0], [3.0, 0.0], [0.0, 0.5]]])
    mask_logits = torch.tensor([[[1.0, 5.0, -2.0], [-3.0, 5.0, 2.0], [0.1, -9.0, 0.2], [0.0, 0.0, 9.0]]])
    outputs = Fm4nppTrackFindingOutput(class_logits=class_logits, mask_logits=mask_logits)
    mask = torch.tensor([[1, 1, 1, 0]])
    assert model.assign_tracks(outputs, mask).tolist() == [[0, 2, 0, -1]]
    assert model.assign_tracks(outputs).tolist() == [[0, 2, 0, 2]]
    assert model.assign_tracks(outputs, mask, use_classes=False).tolist() == [[1, 1, 2, -1]]
    outputs.class_logits = torch.tensor([[[1.0, 0.0]] * 3])
    assert model.assign_tracks(outputs, mask).tolist() == [[-1] * 4]


def test_point_losses_written_out():
    model = make_model(Fm4nppForTokenClassification, num_labels=2)
    batch = inputs_of(make_batch(), "labels")
    # a class in the padding does not count either
    padded = {**batch, "labels": batch["labels"].masked_fill(batch["attention_mask"] == 0, 1)}
    is_real = batch["attention_mask"].bool()
    with torch.no_grad():
        outputs = model(**padded)
        probabilities = outputs.logits.softmax(-1)[is_real].gather(1, batch["labels"][is_real][:, None])[:, 0]
        torch.testing.assert_close(outputs.loss, -probabilities.log().mean())
        model.config.class_weights, model.config.focal_gamma = [0.25, 0.75], 2.0
        weights = torch.tensor([0.25, 0.75])[batch["labels"][is_real]]
        expected = -(weights * (1 - probabilities) ** 2 * probabilities.log()).mean()
        torch.testing.assert_close(model(**batch).loss, expected)


def test_accumulated_gradients_are_those_of_the_whole_batch():
    model = make_model(Fm4nppForTokenClassification)
    batch = inputs_of(make_batch(), "labels")
    num_items = (batch["labels"] != -100).sum()
    model(**batch).loss.backward()
    expected = [parameter.grad.clone() for parameter in model.head.parameters()]
    model.zero_grad()
    for rows in (slice(0, 1), slice(1, 4)):
        part = {name: tensor[rows] for name, tensor in batch.items()}
        model(**part, num_items_in_batch=num_items).loss.backward()
    for parameter, gradient in zip(model.head.parameters(), expected):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


# Training


def straight_tracks(num_events: int, num_tracks: int = 4, num_points: int = 8, seed: int = 0) -> list[dict]:
    """Events of tracks that go outwards in separate directions, points in the order of the radius."""
    generator = np.random.default_rng(seed)
    events = []
    for _ in range(num_events):
        phi = (np.arange(num_tracks) + generator.uniform(-0.2, 0.2, num_tracks)) / num_tracks
        r, track = np.meshgrid(np.linspace(0, 1, num_points), np.arange(num_tracks), indexing="ij")
        points = np.stack([0 * r, 0.5 + 0 * r, phi[track], r], axis=-1).reshape(-1, 4)
        points = torch.tensor(points + generator.normal(0, 0.01, points.shape), dtype=torch.float32)
        events.append({"points": points, "track_labels": torch.tensor(track.reshape(-1))})
    return events


def test_track_finder_learns_through_the_trainer(tmp_path):
    """Loss of evaluation is reported (its label argument is recognised), and straight tracks are found."""
    torch.manual_seed(0)
    config = Fm4nppConfig(**{**TINY, "num_prototypes": 8}, ssm="mamba1", freeze_backbone=False)
    model = Fm4nppForTrackFinding(config)
    training, held_out = straight_tracks(64), straight_tracks(8, seed=1)

    def collate(events):
        return {name: torch.stack([event[name] for event in events]) for name in events[0]}

    arguments = TrainingArguments(
        tmp_path, max_steps=100, per_device_train_batch_size=8, learning_rate=5e-3, use_cpu=True, disable_tqdm=True
    )
    trainer = Trainer(model, arguments, data_collator=collate, train_dataset=training, eval_dataset=held_out)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.5 * before
    batch = collate(held_out)
    model.eval()
    found = model.assign_tracks(model(batch["points"]))
    scores = [adjusted_rand_score(labels, tracks) for labels, tracks in zip(batch["track_labels"], found)]
    assert np.mean(scores) > 0.9, scores


# Bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"points": torch.rand(4, 12, 3)}, r"`points` has shape \(4, 12, 3\), expected \(batch, length, 4\)"),
        ({"points": torch.rand(4, 0, 4)}, r"`points` has shape \(4, 0, 4\)"),
        ({"points": torch.rand(12, 4)}, r"`points` has shape \(12, 4\)"),
        ({"attention_mask": torch.ones(4, 11)}, r"`attention_mask` has shape \(4, 11\), expected \(4, 12\)"),
        ({"attention_mask": torch.ones(4, 1)}, r"`attention_mask` has shape \(4, 1\)"),
        ({"attention_mask": torch.zeros(4, 12)}, "`attention_mask` of event 0 has no point"),
        ({"attention_mask": torch.ones(4, 12).tril(-1)}, "`attention_mask` of event 0 has no point"),
        ({"attention_mask": torch.ones(4, 12).triu()}, "of event 1: expected ones for its points, then zeros"),
        ({"attention_mask": torch.full((4, 12), 2)}, "of event 0: expected ones for its points, then zeros"),
        ({"attention_mask": torch.full((4, 12), 0.5)}, "of event 0: expected ones for its points, then zeros"),
        ({"attention_mask": torch.full((4, 12), torch.nan)}, "of event 0: expected ones for its points, then zeros"),
    ],
)
@pytest.mark.parametrize("model_class", [Fm4nppModel, Fm4nppForPreTraining, *HEADS])
def test_hostile_points_and_masks(model_class, change, message):
    model = make_model(model_class)
    with pytest.raises(ValueError, match=message):
        model(**{**inputs_of(make_batch()), **change})


def test_hostile_labels():
    batch = make_batch()
    with pytest.raises(ValueError, match=r"`neighbor_labels` has shape \(4, 12, 6\), expected \(4, 12, 9\)"):
        make_model()(**inputs_of(batch), neighbor_labels=torch.rand(4, 12, 6))
    with pytest.raises(ValueError, match=r"`track_labels` has shape \(4, 1\), expected \(4, 12\)"):
        make_model(Fm4nppForTrackFinding)(**inputs_of(batch), track_labels=torch.zeros(4, 1, dtype=torch.long))
    with pytest.raises(ValueError, match=r"`labels` has shape \(4,\), expected \(4, 12\)"):
        make_model(Fm4nppForTokenClassification)(**inputs_of(batch), labels=torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match="`track_labels` has dtype torch.float32, expected integers"):
        make_model(Fm4nppForTrackFinding)(**inputs_of(batch), track_labels=batch["track_labels"].float())
    classifier, labels = make_model(Fm4nppForTokenClassification), torch.zeros(4, 12, dtype=torch.long)
    for value in (2, -1, 10**12):
        labels[2, 3] = value
        with pytest.raises(ValueError, match=f"`labels` of event 2, point 3 is {value}, expected 0 to 1, or -100"):
            classifier(**inputs_of(batch), labels=labels)
    # what stands at the padding does not count, and any integers will do
    labels[2, 3] = 1
    expected = classifier(**inputs_of(batch), labels=labels).loss
    padding = (batch["attention_mask"] == 0).long()
    assert torch.equal(classifier(**inputs_of(batch), labels=(labels + 9 * padding).int()).loss, expected)
    assert torch.equal(classifier(**inputs_of(batch), labels=labels.bool()).loss, expected)
    points = batch["points"].clone()
    points[2, 3] = torch.nan
    with pytest.raises(ValueError, match="event 2: predictions are not finite"):
        make_model(Fm4nppForTrackFinding)(**{**inputs_of(batch, "track_labels"), "points": points})
    with pytest.raises(ValueError, match="`class_weights` has 3 numbers, expected `num_labels` = 2"):
        make_model(Fm4nppForTokenClassification, class_weights=[1, 2, 3])
