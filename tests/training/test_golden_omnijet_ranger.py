"""Ranger against the optimizer of the published trainings, its state, and `--optimizer ranger`."""

import copy

import pytest
import torch
from transformers import TrainingArguments

from hepzoo.training.common import ModelArguments, optimizer_arguments
from hepzoo.training.data import InputError
from hepzoo.training.ranger import Ranger
from tests.golden_sets import GoldenSet

SETTINGS = ("lr", "betas", "eps", "weight_decay", "alpha", "k")


def steps(golden: GoldenSet, parameters, optimizer, first: int, last: int):
    """w, b after each step and the loss before it, and where the parameters and the optimizer are in the end."""
    w, b = parameters
    found = {"w": [], "b": [], "loss": []}
    for _ in range(first, last):
        optimizer.zero_grad()
        loss = (torch.tanh(golden.inputs["x"] @ w + b) - golden.inputs["y"]).square().mean()
        loss.backward()
        optimizer.step()
        for name, tensor in (("w", w), ("b", b), ("loss", loss)):
            found[name].append(tensor.detach().clone())
    return {name: torch.stack(tensors) for name, tensors in found.items()}


def begin(golden: GoldenSet):
    parameters = [torch.nn.Parameter(golden.inputs[name].clone()) for name in ("w0", "b0")]
    return parameters, Ranger(parameters, **{name: golden.config[name] for name in SETTINGS})


def test_golden_omnijet_ranger():
    with GoldenSet("omnijet_c/ranger") as golden:
        parameters, optimizer = begin(golden)
        for name, tensor in steps(golden, parameters, optimizer, 0, golden.config["steps"]).items():
            golden.compare(name, tensor, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("stop", [1, 5, 6, 8, 20])
def test_golden_omnijet_ranger_resumes(stop, tmp_path):
    """Saved and loaded between two meetings with the slow weights, which a published checkpoint loses."""
    with GoldenSet("omnijet_c/ranger") as golden:
        (w, b), optimizer = begin(golden)
        before = steps(golden, (w, b), optimizer, 0, stop)
        torch.save({"optimizer": optimizer.state_dict(), "w": w.data, "b": b.data}, tmp_path / "state.pt")

        parameters, optimizer = begin(golden)
        state = torch.load(tmp_path / "state.pt", weights_only=True)
        for name, parameter in zip("wb", parameters, strict=True):
            parameter.data.copy_(state[name])
        optimizer.load_state_dict(state["optimizer"])
        after = steps(golden, parameters, optimizer, stop, golden.config["steps"])
        for name in golden.outputs:
            golden.compare(name, torch.cat([before[name], after[name]]), rtol=1e-6, atol=1e-7)


def test_published_states_without_slow_weights_load():
    golden = GoldenSet("omnijet_c/ranger")
    parameters, optimizer = begin(golden)
    steps(golden, parameters, optimizer, 0, 8)
    state = copy.deepcopy(optimizer.state_dict())
    for entry in state["state"].values():
        del entry["slow"]
    optimizer.load_state_dict(state)
    here = [parameter.detach().clone() for parameter in parameters]
    steps(golden, parameters, optimizer, 8, 9)
    assert all(torch.equal(optimizer.state[p]["slow"], begun) for p, begun in zip(parameters, here, strict=True))


def test_parameters_without_gradient_and_closures():
    """Two steps by hand; what has no gradient is left alone."""
    used, unused = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = Ranger([{"params": [used], "k": 2}, {"params": [unused]}], lr=0.1, weight_decay=0.5)

    def closure():
        optimizer.zero_grad()
        loss = used.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3
    # m / (1 - beta1) is the gradient, 2; the decay comes first
    torch.testing.assert_close(used.detach(), torch.full((3,), 0.95 - 0.1 * 2))
    assert torch.equal(unused, torch.ones(3)) and unused not in optimizer.state
    optimizer.step(closure)
    mean = (0.95 * 0.05 * 2 + 0.05 * 1.5) / (1 - 0.95**2)
    fast = 0.75 * 0.95 - 0.1 * mean
    torch.testing.assert_close(used.detach(), torch.full((3,), (1 + fast) / 2))
    assert torch.equal(used, optimizer.state[used]["slow"])


def test_optimizer_ranger_of_the_scripts(tmp_path):
    flags = {"learning_rate": 3e-4, "adam_beta1": 0.95, "adam_epsilon": 1e-5, "optim_args": "alpha=0.25,k=16"}
    training_args = TrainingArguments(output_dir=str(tmp_path), report_to="none", **flags)
    kind, kwargs = optimizer_arguments(ModelArguments(optimizer="ranger"), training_args)
    optimizer = kind([torch.nn.Parameter(torch.ones(1))], **kwargs)
    assert type(optimizer) is Ranger
    expected = {"lr": 3e-4, "betas": (0.95, 0.999), "eps": 1e-5, "alpha": 0.25, "k": 16}
    assert {name: optimizer.param_groups[0][name] for name in expected} == expected
    # the slow weights belong to Ranger alone
    assert set(optimizer_arguments(ModelArguments(optimizer="radam"), training_args)[1]) == {"lr", "betas", "eps"}


@pytest.mark.parametrize("text", ["momentum=0.9", "alpha=0.25,nesterov=true", "alpha=x", "k=0", "k=2.5", "alpha=0"])
def test_hostile_optimizer_arguments(text, tmp_path):
    training_args = TrainingArguments(output_dir=str(tmp_path), report_to="none", optim_args=text)
    with pytest.raises(InputError) as caught:
        optimizer_arguments(ModelArguments(optimizer="ranger"), training_args)
    assert "\n" not in str(caught.value) and "optim_args" in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"lr": -1.0},
        {"lr": float("nan")},
        {"betas": (0.9, 1.0)},
        {"betas": (0.9,)},
        {"eps": -1e-8},
        {"weight_decay": -0.1},
        {"alpha": 0.0},
        {"alpha": 1.5},
        {"k": 0},
        {"k": 6.0},
    ],
)
def test_hostile_settings(settings):
    (name,) = settings
    with pytest.raises(ValueError, match=rf"^Ranger: {name} .* expected"):
        Ranger([torch.nn.Parameter(torch.ones(1))], **settings)
