"""The EPiC flow: exact time embedding, folded weights, padding, loss, sampling, saving, malformed input."""

import math

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForPreTraining, Trainer, TrainingArguments

from hepzoo import EpicFMConfig, EpicFMForGeneration, EpicFMModel

SIZES = {"hidden_size": 24, "latent_size": 6, "num_hidden_layers": 2, "num_frequencies": 4, "max_num_particles": 20}


def make(model_class=EpicFMForGeneration, seed=0, **settings):
    torch.manual_seed(seed)
    return model_class(EpicFMConfig(**{**SIZES, **settings})).eval()


def make_batch(config, counts=(5, 1, 9), slots=12, seed=1):
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.arange(slots) < torch.tensor(counts)[:, None]).long()
    batch = {
        "particles": torch.randn(len(counts), slots, config.num_features, generator=generator),
        "attention_mask": mask,
    }
    if config.num_classes:
        batch["class_ids"] = torch.arange(len(counts)) % config.num_classes
    if config.condition_names:
        batch["conditions"] = torch.randn(len(counts), len(config.condition_names), generator=generator)
    return batch


def reference_weight(linear):
    """Weight normalisation of PyTorch."""
    return torch._weight_norm(linear.direction, linear.magnitude, 0)


def test_published_size():
    with torch.device("meta"):
        model = EpicFMForGeneration(EpicFMConfig())
    assert model.num_parameters() == 8_504_698
    shapes = {
        "fc_l1": (300, 45),
        "fc_l2": (300, 332),
        "fc_g1": (300, 644),
        "fc_g2": (16, 344),
        "fc_l3": (13, 332),
        "layers.19.fc_global1": (300, 660),
        "layers.19.fc_global2": (16, 344),
        "layers.19.fc_local1": (300, 348),
        "layers.19.fc_local2": (300, 332),
    }
    for name, shape in shapes.items():
        assert tuple(model.model.get_submodule(name).direction.shape) == shape, name


def test_time_embedding_is_exact_to_the_last_bit():
    model = make(num_frequencies=16, time_embedding="cosine", dtype="bfloat16")
    model.to(torch.bfloat16)
    times = torch.tensor([1.0, 0.987654, 0.5, 0.013, 1 / 3])
    embedded = model.model.time_embedding(times)
    assert embedded.shape == (5, 32) and embedded.dtype == torch.float32
    for k in range(32):
        # all roundings as in single precision, the cosine itself in double
        frequency = torch.tensor(math.exp(k), dtype=torch.float32)
        angles = times * frequency * torch.tensor(math.pi, dtype=torch.float32)
        assert (embedded[:, k].double() - angles.double().cos()).abs().max() < 1e-6, k
    # the upper half tells neighbouring numbers apart
    neighbour = torch.nextafter(times, torch.tensor(2.0))
    difference = (model.model.time_embedding(neighbour) - embedded).abs().amax(dim=0)
    assert (difference[:6] < 1e-3).all() and difference[20:].max() > 0.5
    sincos = make(num_frequencies=3).model.time_embedding(torch.tensor(0.3))
    expected = [f(math.pi * 2**j * 0.3) for f in (math.cos, math.sin) for j in range(3)]
    torch.testing.assert_close(sincos, torch.tensor(expected))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"local_conditions": True},
        {"global_conditions": False, "local_conditions": True},
        {"time_in_input": True},
        {"time_in_input": True, "time_in_local": False, "time_in_global": False},
        {"num_classes": 0, "condition_names": (), "output_activation": True},
        {"use_weight_norm": False, "hidden_act": "gelu", "num_hidden_layers": 0},
    ],
)
def test_network_is_that_of_the_paper(settings):
    """Against the formulas with everything repeated and concatenated."""
    model = make(EpicFMModel, **settings)
    config = model.config
    batch = make_batch(config)
    time = torch.tensor([0.9, 0.2, 0.5])
    x, mask = batch["particles"], batch["attention_mask"].unsqueeze(-1)
    act = {"leaky_relu": nn.functional.leaky_relu, "gelu": nn.functional.gelu}[config.hidden_act]
    slots = x.shape[1]
    t_jet = model.time_embedding(time)
    parts = [nn.functional.one_hot(batch["class_ids"], config.num_classes)] if config.num_classes else []
    parts += [batch["conditions"]] if config.condition_names else []
    c_jet = torch.cat(parts, -1).float() if parts else torch.zeros(3, 0)

    def wide(values):
        return values.unsqueeze(1).expand(-1, slots, -1)

    def apply(linear, *inputs):
        weight = linear.direction if linear.magnitude is None else reference_weight(linear)
        return nn.functional.linear(torch.cat(inputs, -1), weight, linear.bias)

    t_g = t_jet if config.time_in_global else t_jet[:, :0]
    t_l = wide(t_jet) if config.time_in_local else wide(t_jet[:, :0])
    c_g = c_jet if config.global_conditions else c_jet[:, :0]
    c_l = wide(c_jet) if config.local_conditions else wide(c_jet[:, :0])
    if config.time_in_input:
        x = torch.cat([wide(t_jet), x], -1)
    x = act(apply(model.fc_l1, t_l, x, c_l))
    x = act(apply(model.fc_l2, t_l, x, c_l) + x)
    total = (x * mask).sum(1)
    u = act(apply(model.fc_g1, t_g, total * config.sum_scale, total / mask.sum(1), c_g))
    u = act(apply(model.fc_g2, t_g, u, c_g))
    for layer in model.layers:
        total = (x * mask).sum(1)
        q = act(apply(layer.fc_global1, t_g, total / mask.sum(1), total * config.sum_scale, u, c_g))
        u = act(apply(layer.fc_global2, t_g, q, c_g) + u)
        q = act(apply(layer.fc_local1, t_l, x, wide(u), c_l))
        x = act(apply(layer.fc_local2, t_l, q, c_l) + x)
    v = apply(model.fc_l3, t_l, x, c_l)
    v = (act(v) if config.output_activation else v) * mask
    with torch.no_grad():
        outputs = model(time=time, output_hidden_states=True, **batch)
        torch.testing.assert_close(outputs.velocity, v, rtol=1e-4, atol=1e-5)
        # conditions in one piece, and one time for all
        whole = {**batch, "class_ids": None, "conditions": c_jet if config.num_conditions else None}
        torch.testing.assert_close(model(time=time, **whole).velocity, outputs.velocity)
        alone = model(**{name: values[:1] for name, values in batch.items()}, time=0.9)
        torch.testing.assert_close(alone.velocity, outputs.velocity[:1], rtol=1e-4, atol=1e-5)
    assert len(outputs.hidden_states) == len(outputs.latent_states) == config.num_hidden_layers
    assert model(**batch, time=time, return_dict=False)[0].shape == v.shape


def test_a_converted_network_has_an_output_activation():
    plain, published = make(EpicFMModel), make(EpicFMModel, output_activation=True)
    batch = make_batch(plain.config)
    with torch.no_grad():
        velocity = plain(time=0.4, **batch).velocity
        torch.testing.assert_close(
            published(time=0.4, **batch).velocity, nn.functional.leaky_relu(velocity), rtol=1e-5, atol=1e-6
        )
    assert (velocity < -0.01).any()


def test_empty_slots_and_the_order_of_constituents_do_not_matter():
    model = make()
    batch = make_batch(model.config)
    time = torch.tensor([0.9, 0.2, 0.5])
    field = model.model
    with torch.no_grad():
        velocity = field(time=time, **batch).velocity
        assert (velocity[batch["attention_mask"] == 0] == 0).all()
        other = {**batch, "particles": batch["particles"].clone()}
        other["particles"][batch["attention_mask"] == 0] = 1e3
        torch.testing.assert_close(field(time=time, **other).velocity, velocity)
        order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
        moved = {
            name: value[:, order] if value.ndim > 1 and name != "conditions" else value for name, value in batch.items()
        }
        torch.testing.assert_close(field(time=time, **moved).velocity, velocity[:, order])
        # the loss does not see the width of the batch either
        noise = torch.randn_like(batch["particles"])
        loss = model(**batch, time=time, noise=noise).loss
        wide = {**batch, "particles": torch.cat([batch["particles"], torch.ones(3, 30, 13)], 1)}
        wide["attention_mask"] = torch.cat([batch["attention_mask"], torch.zeros(3, 30).long()], 1)
        outputs = model(**wide, time=time, noise=torch.cat([noise, torch.ones(3, 30, 13)], 1))
        torch.testing.assert_close(outputs.loss, loss)
        assert outputs.velocity.shape == outputs.target.shape == (3, 42, 13)
        # holes
        outputs = model(**moved, time=time, noise=noise[:, order])
        torch.testing.assert_close(outputs.loss, loss)


def test_gradients_with_checkpointing_and_as_of_weight_normalisation():
    batch = make_batch(make().config)
    time, noise = torch.tensor([0.9, 0.2, 0.5]), torch.randn(3, 12, 13, generator=torch.Generator().manual_seed(0))
    gradients = []
    for checkpointing in (False, True):
        model = make().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**batch, time=time, noise=noise).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    # a weight does not change along itself
    linear = model.model.fc_l2
    expected = torch.autograd.grad(reference_weight(linear).square().sum() ** 2, linear.direction)[0]
    found = torch.autograd.grad(linear.weight.square().sum() ** 2, linear.direction)[0]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_training_after_sampling_uses_the_new_weights():
    """Nothing that was folded for sampling is kept."""
    model = make()
    request = {"num_particles": [4, 7], "labels": [1, 2], "conditions": torch.zeros(2, 2), "num_inference_steps": 3}

    def sample():
        return model.generate(**request, generator=torch.Generator().manual_seed(0)).particles

    first = sample()
    assert torch.equal(sample(), first)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(**make_batch(model.config)).loss.backward()
    optimizer.step()
    assert not torch.allclose(sample(), first)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data.zero_()
    model.model.fc_l2.direction.data.fill_(1.0)
    for module in model.modules():
        if hasattr(module, "direction"):
            module.direction.data.fill_(1.0)
    # velocity 0: what came is the noise
    noise = torch.randn(11, 13, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.cat([sample()[0, :4], sample()[1]]), noise)


def test_generate_is_the_midpoint_rule_on_the_velocity():
    model = make(output_activation=True, time_embedding="cosine")
    mask = torch.arange(9) < torch.tensor([4, 9, 1])[:, None]
    noise = torch.randn(3, 9, 13, generator=torch.Generator().manual_seed(4))
    labels, conditions = torch.tensor([0, 9, 3]), torch.randn(3, 2)
    request = {"labels": labels, "conditions": conditions, "noise": noise}
    sample = model.generate(num_particles=[4, 9, 1], num_inference_steps=6, batch_size=1, **request)

    def velocity(x, time):
        with torch.no_grad():
            return model.model(x, time, mask, class_ids=labels, conditions=conditions).velocity

    x, grid = noise * mask.unsqueeze(-1), torch.linspace(1, 0, 7)
    for time, size in zip(grid[:-1], grid.diff()):
        x = x + size * velocity(x + size / 2 * velocity(x, time), time + size / 2)
    torch.testing.assert_close(sample.particles, x, rtol=1e-4, atol=1e-5)
    default = model.generate(num_particles=[4, 9, 1], **request)
    assert default.num_function_evaluations == 48
    # finer steps come closer to the adaptive solution; the other embedding is smooth in time
    smooth = make()
    exact = smooth.generate(num_particles=[4, 9, 1], solver="dopri5", rtol=1e-5, atol=1e-5, **request).particles
    errors = [
        (smooth.generate(num_particles=[4, 9, 1], num_inference_steps=n, **request).particles - exact).abs().max()
        for n in (4, 16, 64)
    ]
    assert errors[0] > errors[1] > errors[2] and errors[2] < errors[0] / 4


def test_default_steps_are_told_apart_by_the_embedding():
    """At the times of powers of two most of the embedding is the same throughout; not at those of the default."""
    model = make(num_frequencies=16)

    def same_throughout(steps):
        grid = model.sampling_times(steps)
        times = torch.cat([grid[1:-1], grid[:-1] + 0.5 * grid.diff()])
        return int((model.model.time_embedding(times).std(dim=0) < 0.05).sum())

    assert same_throughout(16) > 16 and same_throughout(32) > 16
    assert same_throughout(model.config.num_inference_steps) == 0 == same_throughout(99)


def test_guidance_needs_training_with_dropped_labels():
    model = make(label_dropout=0.5)
    batch = make_batch(model.config, counts=(3,) * 64, slots=3)
    seen = []
    encode = model.model.encode_conditions
    model.model.encode_conditions = lambda n, ids, *others: seen.append(ids) or encode(n, ids, *others)
    model.train()(**batch)
    model.eval()(**batch)
    dropped = (seen[0] == -1).float().mean()
    assert 0.2 < dropped < 0.8
    assert ((seen[0] == batch["class_ids"]) | (seen[0] == -1)).all()
    assert torch.equal(seen[1], batch["class_ids"])
    del model.model.encode_conditions
    request = {"num_particles": [4], "labels": [3], "conditions": torch.zeros(1, 2), "num_inference_steps": 2}
    noise = torch.randn(1, 4, 13)
    results = [model.generate(**request, noise=noise, guidance_scale=w).particles for w in (0.0, 1.0, 3.0)]
    none = model.generate(**{**request, "labels": [-1]}, noise=noise).particles
    torch.testing.assert_close(results[0], none)
    assert not torch.allclose(results[1], results[2])
    with pytest.raises(ValueError, match="label_dropout"):
        make().generate(**request, guidance_scale=2.0)


def test_bfloat16_and_autocast():
    model = make()
    batch = make_batch(model.config)
    time, noise = torch.tensor([0.9, 0.2, 0.5]), torch.randn(3, 12, 13, generator=torch.Generator().manual_seed(0))
    expected = model(**batch, time=time, noise=noise).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch, time=time, noise=noise).loss
    loss.backward()
    assert loss.dtype == torch.float32 and abs(loss / expected - 1) < 0.02
    model = model.to(torch.bfloat16)
    outputs = model(**batch, time=time, noise=noise)
    assert abs(outputs.loss / expected - 1) < 0.02
    request = {"num_particles": [4, 9], "labels": [3, 1], "conditions": torch.zeros(2, 2)}
    sample = model.generate(**request, num_inference_steps=3)
    assert sample.particles.dtype == torch.float32 and sample.particles.isfinite().all()


def test_double_precision():
    model, double = make(), make().double()
    batch = make_batch(model.config)
    torch.testing.assert_close(
        double.model(**batch, time=0.3).velocity.float(), model.model(**batch, time=0.3).velocity
    )


def test_fresh_weights_have_the_published_initialisation():
    model = make(hidden_size=64)
    for module in model.modules():
        if not hasattr(module, "direction"):
            continue
        bound = 1 / math.sqrt(module.direction.shape[1])
        assert module.direction.abs().max() <= bound and module.bias.abs().max() <= bound
        assert module.direction.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.2)
        torch.testing.assert_close(module.magnitude.data, module.direction.data.norm(dim=1, keepdim=True))
        torch.testing.assert_close(module.weight.data, module.direction.data)


@pytest.mark.parametrize("settings", [{}, {"use_weight_norm": False, "num_classes": 0, "condition_names": ("jet_pt",)}])
def test_saved_models_are_equal(settings, tmp_path):
    model = make(**settings)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {
        "config.json",
        "model.safetensors",
        "modeling_epic_fm.py",
        "configuration_epic_fm.py",
        "flow_sampling.py",
    }
    batch = make_batch(model.config)
    time, noise = torch.tensor([0.9, 0.2, 0.5]), torch.randn(3, 12, 13)
    loaded, info = AutoModelForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert isinstance(loaded, EpicFMForGeneration) and loaded.config.to_diff_dict() == model.config.to_diff_dict()
    assert torch.equal(loaded(**batch, time=time, noise=noise).loss, model(**batch, time=time, noise=noise).loss)
    base, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(base(time=time, **batch).velocity, model.model(time=time, **batch).velocity)


def test_trainer_trains_and_evaluates(tmp_path):
    model = make()
    rows = make_batch(model.config, counts=(5, 1, 9, 12) * 4)
    # far from the noise, and the same for all jets
    rows["particles"] = 0.1 * rows["particles"] + 3.0
    data = [{name: values[index] for name, values in rows.items()} for index in range(16)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=30,
        per_device_train_batch_size=8,
        learning_rate=3e-2,
        logging_steps=10,
        eval_strategy="no",
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.8 * before


def test_config_has_the_declared_fields_only():
    declared = set(EpicFMConfig.__annotations__) - {"model_type"}
    assert set(EpicFMConfig(**SIZES).to_diff_dict()) <= declared | {"model_type", "transformers_version"}


HOSTILE_CONFIGS = [
    ({"hidden_size": 0}, "`hidden_size` is 0"),
    ({"num_frequencies": 45}, "`num_frequencies` is 45, expected at most 44"),
    ({"time_embedding": "gaussian"}, "`time_embedding` is 'gaussian'"),
    ({"hidden_act": "maxout"}, "`hidden_act` is 'maxout'"),
    ({"solver": "heun"}, "`solver` is 'heun'"),
    ({"dropout": 1.0}, "`dropout` is 1.0"),
    ({"label_dropout": 0.1, "num_classes": 0}, "`label_dropout` needs `num_classes`"),
    ({"num_inference_steps": 0}, "`num_inference_steps` is 0"),
    ({"sum_scale": math.nan}, "`sum_scale` is nan"),
    ({"sigma_min": math.nan}, "`sigma_min` is nan"),
    ({"condition_names": ["jet_pt", "jet_pt"]}, "`condition_names` is ['jet_pt', 'jet_pt']"),
]


@pytest.mark.parametrize(("settings", "expected"), HOSTILE_CONFIGS)
def test_hostile_configurations(settings, expected):
    with pytest.raises(Exception, match="validate_architecture") as error:
        EpicFMConfig(**settings)
    assert expected in str(error.value.__cause__ or error.value)


def changed(batch, name, value):
    batch = dict(batch)
    batch[name] = value(batch[name].clone()) if name in batch and callable(value) else value
    return batch


def put(index, value):
    def change(tensor):
        tensor[index] = value
        return tensor

    return change


HOSTILE_BATCHES = [
    ("particles", lambda x: x[..., :12], "`particles` has shape (3, 12, 12), expected (batch, slots, 13)"),
    ("particles", lambda x: x[0], "`particles` has shape (12, 13)"),
    ("particles", put((2, 8, 3), math.nan), "`particles` of jet 2, slot 8 is ["),
    ("particles", put((0, 0, 0), math.inf), "`particles` of jet 0, slot 0 is [inf"),
    ("particles", lambda x: x.int(), "`particles` is torch.int32, expected floating-point numbers"),
    ("attention_mask", put(1, 0), "row 1: no constituents, expected at least 1"),
    ("attention_mask", put((2, 4), 2), "`attention_mask` of jet 2, slot 4 is 2, expected 0 or 1"),
    ("attention_mask", lambda x: x.float().log(), "`attention_mask` of jet 0, slot 5 is -inf, expected 0 or 1"),
    ("attention_mask", lambda x: x.tolist(), "`attention_mask` is list, expected a tensor (3, 12)"),
    ("attention_mask", lambda x: x[:, :5], "`attention_mask` has shape (3, 5), expected (3, 12)"),
    ("class_ids", put(1, 10), "row 1: 10, expected class -1 (none) or 0 to 9"),
    ("class_ids", put(0, -2), "row 0: -2, expected class"),
    ("class_ids", lambda x: x + 0.5, "`class_ids` is torch.float32, expected integers"),
    ("class_ids", lambda x: x > 0, "`class_ids` is torch.bool, expected integers"),
    ("class_ids", lambda x: x[:2], "`class_ids` has shape (2,), expected (3,)"),
    ("class_ids", None, "`conditions` without `class_ids` has shape (3, 2), expected (3, 12)"),
    ("conditions", put((1, 0), math.nan), "row 1: [nan"),
    ("conditions", lambda x: x[:, :1], "`conditions` has shape (3, 1), expected (3, 2)"),
    ("conditions", None, "the model needs `class_ids` and `conditions`: 10 classes"),
    ("time", torch.zeros(2), "`time` has shape (2,), expected a scalar or (3,)"),
    ("time", torch.tensor([0.0, math.nan, 1.0]), "`time` of jet 1 is nan, expected 0 (data) to 1 (noise)"),
    ("time", torch.tensor(1.5), "`time` is 1.5, expected 0 (data) to 1 (noise)"),
]


@pytest.mark.parametrize(("name", "value", "expected"), HOSTILE_BATCHES)
def test_hostile_batches(name, value, expected):
    model = make()
    batch = changed(make_batch(model.config), name, value)
    time = {} if "time" in batch else {"time": 0.5}
    with pytest.raises(ValueError) as error:
        model.model(**batch, **time)
    assert expected in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError):
        model(**batch)


def test_hostile_paths_and_padding():
    model = make()
    batch = make_batch(model.config)
    for change, expected in (
        ({"time": torch.zeros(2)}, "`time` has shape (2,), expected (3,)"),
        ({"time": torch.tensor(0.5)}, "`time` has shape (), expected (3,)"),
        ({"noise": torch.zeros(3, 12, 12)}, "`noise` has shape (3, 12, 12), expected (3, 12, 13)"),
        ({"noise": torch.full((3, 12, 13), math.nan)}, "`noise` of jet 0, slot 0 is [nan"),
        ({"time": torch.tensor([0.0, 1.0, -0.1])}, "`time` of jet 2 is -0.1, expected 0 (data) to 1 (noise)"),
        ({name: values[:0] for name, values in batch.items()}, "expected at least one jet and one slot"),
        # 0 times NaN is not 0
        ({"particles": put((0, 11, 0), math.nan)(batch["particles"].clone())}, "`particles` of jet 0, slot 11 is [nan"),
    ):
        with pytest.raises(ValueError) as error:
            model(**{**batch, **change})
        assert expected in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match="`label_dropout` needs `class_ids`"):
        make(label_dropout=0.1).train()(**{**batch, "class_ids": None, "conditions": torch.zeros(3, 12)})


def test_hostile_requests_name_the_row_of_the_request():
    model = make()
    request = {"num_particles": [5, 3, 9], "labels": [0, 1, 2], "conditions": torch.zeros(3, 2)}
    for change, expected in (
        ({"labels": [0, 11, 2]}, "row 1: 11, expected class"),
        ({"labels": [0.5, 1.0, 2.0]}, "`labels` is torch.float32, expected integers"),
        ({"labels": [[0], [1], [2]]}, "`labels` has shape (3, 1), expected (3,)"),
        ({"conditions": torch.tensor([[0, 0], [0, 0], [0, math.nan]])}, "row 2: [0.0, nan]"),
        ({"labels": None}, "`conditions` without `labels` has shape (3, 2), expected (3, 12)"),
        ({"conditions": None}, "the model needs `labels` and `conditions`: 10 classes"),
        ({"conditions": torch.zeros(3, 2, dtype=torch.complex64)}, "`conditions` is torch.complex64"),
        ({"num_particles": [5, 3, 21]}, "row 2: 21 particles, expected 1 to 20"),
        ({"particle_ids": torch.zeros(3, 9)}, "unknown input 'particle_ids'"),
    ):
        with pytest.raises(ValueError) as error:
            model.generate(**{**request, **change})
        assert expected in str(error.value) and "\n" not in str(error.value)
    unconditional = make(num_classes=0, condition_names=())
    with pytest.raises(ValueError, match="the model has no conditions"):
        unconditional.generate(num_particles=[2], labels=[0])
    assert unconditional.generate(num_particles=[2], num_inference_steps=1).particles.shape == (1, 2, 13)
