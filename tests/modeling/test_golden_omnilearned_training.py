"""Optimizer, schedule, averaged weights and groups of parameters of the published OmniLearned trainings."""

import re

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup

from hepzoo.modeling.configuration_omnilearned import OmniLearnedConfig
from hepzoo.modeling.conversion_common import convert_key
from hepzoo.modeling.conversion_omnilearned import KEY_PATTERNS
from hepzoo.modeling.modeling_omnilearned import OmniLearnedForPreTraining
from hepzoo.training.lion import NEW_LAYERS, NEW_LAYERS_AND_INPUTS, Lion, parameter_groups
from tests.golden_sets import GoldenSet


def test_golden_omnilearned_training():
    with GoldenSet("omnilearned_training") as golden:
        config, inputs = golden.config, golden.inputs
        p, q = (torch.nn.Parameter(inputs[name].clone()) for name in ("p0", "q0"))
        decays = config["weight_decay"]
        groups = [{"params": [p], "weight_decay": decays[0]}, {"params": [q], "weight_decay": decays[1]}]
        optimizer = Lion(groups, lr=config["lr"], betas=tuple(config["betas"]))
        schedule = get_cosine_schedule_with_warmup(optimizer, config["warmup_steps"], config["total_steps"])
        average = torch.optim.swa_utils.AveragedModel(
            torch.nn.ParameterList([p]),
            multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(config["ema_decay"]),
        )
        # the average begins with the start values
        average.update_parameters(torch.nn.ParameterList([p]))
        found = {"p": [], "q": [], "ema_p": [], "lr": [], "lr_schedule": [schedule.get_last_lr()[0]]}
        for grad_p, grad_q in zip(inputs["grad_p"], inputs["grad_q"], strict=True):
            p.grad, q.grad = grad_p.clone(), grad_q.clone()
            torch.nn.utils.clip_grad_norm_([p, q], config["clip_grad_norm"])
            found["lr"].append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
            average.update_parameters(torch.nn.ParameterList([p]))
            found["lr_schedule"].append(schedule.get_last_lr()[0])
            for name, value in (("p", p), ("q", q), ("ema_p", average.module[0])):
                found[name].append(value.detach().clone())
        # beyond the last step the rate rises again
        while len(found["lr_schedule"]) < len(golden.outputs["lr_schedule"]):
            schedule.step()
            found["lr_schedule"].append(schedule.get_last_lr()[0])
        for name in ("p", "q", "ema_p"):
            golden.compare(name, torch.stack(found[name]), rtol=1e-6, atol=1e-7)
        for name in ("lr", "lr_schedule"):
            golden.compare(name, torch.tensor(found[name], dtype=torch.float64), rtol=1e-9, atol=1e-12)


def model_of(names: list[str]) -> OmniLearnedForPreTraining:
    """A network with the published parameters of these names; widths do not matter."""

    def blocks(prefix: str) -> int:
        return len({match.group(1) for name in names if (match := re.match(rf"{prefix}\.in_blocks\.(\d+)\.", name))})

    def has(prefix: str) -> bool:
        return any(name.startswith(prefix) for name in names)

    heads = {"classification": "classifier", "generation": "generator"}
    objectives = [objective for objective, head in heads.items() if has(f"{head}.")]
    config = OmniLearnedConfig(
        hidden_size=16,
        num_attention_heads=4,
        num_hidden_layers=blocks("body"),
        num_head_layers=blocks(heads[objectives[0]]),
        num_local_layers=blocks("body.local_physics"),
        use_interaction=has("body.interaction"),
        num_conditions=3 * has("body.cond_embed"),
        num_particle_types=9 * has("body.pid_embed"),
        num_additional_features=4 * has("body.add_embed"),
        num_labels=5 if "generation" not in objectives or has("generator.pid_embed") else 1,
        use_time=has("body.time_embed"),
        objectives=objectives,
    )
    return OmniLearnedForPreTraining(config)


@pytest.mark.parametrize(
    "release, new_layers", [("v0_2_0", NEW_LAYERS_AND_INPUTS), ("git_922355d", NEW_LAYERS)], ids=["0.2.0", "git"]
)
def test_golden_omnilearned_parameter_groups(release, new_layers):
    golden = GoldenSet("omnilearned_training")
    pattern = rf"param_groups_finetune_lr_factor([\d.]+)_{release}"
    (found,) = (match for name in golden.config if (match := re.fullmatch(pattern, name)))
    expected = golden.config[found.group()]
    model = model_of([name for group in expected for name in group["params"]])
    groups = parameter_groups(
        model, golden.config["lr"], golden.config["weight_decay"][0], new_layers, lr_factor=float(found.group(1))
    )
    expected = [group for group in expected if group["params"]]
    assert len(groups) == len(expected)
    for group, published in zip(groups, expected):
        assert group["lr"] == pytest.approx(published["lr"]) and group["weight_decay"] == published["weight_decay"]
        names = [convert_key(name, KEY_PATTERNS) for name in published["params"]]
        assert None not in names and set(group["names"]) == set(names)
        assert len(group["params"]) == len(group["names"]) == len(names)


def test_lion_resumes_and_leaves_alone_what_has_no_gradient(tmp_path):
    def begin():
        used, unused = (torch.nn.Parameter(torch.linspace(-1, 1, 5)) for _ in range(2))
        return used, unused, Lion([{"params": [used], "weight_decay": 0.1}, {"params": [unused]}], lr=0.1)

    def step(used, optimizer):
        optimizer.zero_grad()
        loss = (used - 0.3).square().sum()
        loss.backward()
        optimizer.step(lambda: loss)

    used, unused, optimizer = begin()
    step(used, optimizer)
    # the momentum begins at 0: the first step is the sign of the gradient
    begun = torch.linspace(-1, 1, 5)
    torch.testing.assert_close(used.detach(), begun * 0.99 - 0.1 * (begun - 0.3).sign())
    assert unused not in optimizer.state and torch.equal(unused, begun)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    again, _, resumed = begin()
    again.data.copy_(used.data)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for _ in range(5):
        step(used, optimizer)
        step(again, resumed)
    assert torch.equal(used, again)


@pytest.mark.parametrize("settings", [{"lr": -1.0}, {"betas": (0.9, 1.0)}, {"betas": (0.9,)}, {"weight_decay": -0.1}])
def test_hostile_lion_settings(settings):
    (name,) = settings
    with pytest.raises(ValueError, match=rf"^Lion: {name} .* expected"):
        Lion([torch.nn.Parameter(torch.ones(1))], **settings)


def test_hostile_lr_factor():
    with pytest.raises(ValueError, match="lr_factor is 0, expected above 0"):
        parameter_groups(torch.nn.Linear(1, 1), 1e-3, 0.1, lr_factor=0)
