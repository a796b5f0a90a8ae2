"""
The EPiC flow (arXiv:2312.00123): the way the reference computes, and what is measured against it.

Called by generation.py. The reference's way is written from its behaviour, on the weights of our model: all jets have
128 slots whatever their multiplicity; time, latent vector and conditions are repeated for every slot and concatenated
to the inputs of the linear layers; the weights are normalised anew in every call.

The reference solves with the published 99 midpoint steps (198 calls), ours with as many, and with the default number
of a new model. The cost of a call does not depend on the step, so the reference is timed on a few calls.
"""

import argparse
import statistics
import time

import torch
from torch import nn

from hepzoo import EpicFMConfig, EpicFMForGeneration

SLOTS = 128
PUBLISHED_STEPS = 99


def make_model(seed: int) -> EpicFMForGeneration:
    """Published size, time embedding and output activation, random weights."""
    torch.manual_seed(seed)
    config = EpicFMConfig(time_embedding="cosine", output_activation=True)
    return EpicFMForGeneration(config).eval()


def jet_requests(batch: int, seed: int) -> dict[str, torch.Tensor]:
    """Classes, pT [GeV] and eta, and multiplicities like those of JetClass: 39 constituents, give or take 12."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (batch,), generator=generator)
    pt = 500 + 120 * torch.empty(batch).exponential_(generator=generator)
    eta = 0.7 * torch.randn(batch, generator=generator)
    counts = (39 + 12 * torch.randn(batch, generator=generator)).round().clamp(2, SLOTS).long()
    return {"labels": labels, "conditions": torch.stack([pt, eta], dim=-1), "num_particles": counts}


def apply(linear, *inputs: torch.Tensor) -> torch.Tensor:
    weight = torch._weight_norm(linear.direction, linear.magnitude, 0)
    return nn.functional.linear(torch.cat(inputs, dim=-1), weight, linear.bias)


def reference_velocity(
    model: EpicFMForGeneration, x: torch.Tensor, moment: torch.Tensor, mask: torch.Tensor, conditions: torch.Tensor
) -> torch.Tensor:
    """
    Args:
        x (`(batch, 128, features)`), moment (scalar), mask (`(batch, 128, 1)`), conditions (`(batch, 12)`).
    """
    net, scale = model.model, model.config.sum_scale
    act = nn.functional.leaky_relu
    times = net.time_embedding(moment.reshape(1)).expand(*x.shape[:2], -1)
    time_of_jet = times[:, 0]
    x = act(apply(net.fc_l1, times, x))
    x = act(apply(net.fc_l2, times, x) + x)

    def pools():
        total = (x * mask).sum(dim=1)
        return total * scale, total / mask.sum(dim=1)

    latent = act(apply(net.fc_g1, time_of_jet, *pools(), conditions))
    latent = act(apply(net.fc_g2, time_of_jet, latent, conditions))
    for layer in net.layers:
        total, mean = pools()
        hidden = act(apply(layer.fc_global1, time_of_jet, mean, total, latent, conditions))
        latent = act(apply(layer.fc_global2, time_of_jet, hidden, conditions) + latent)
        repeated = latent.repeat_interleave(x.shape[1], dim=0).reshape(*x.shape[:2], -1)
        hidden = act(apply(layer.fc_local1, times, x, repeated))
        x = act(apply(layer.fc_local2, times, hidden) + x)
    return act(apply(net.fc_l3, times, x)) * mask


@torch.inference_mode()
def reference_seconds(model: EpicFMForGeneration, requests: dict, num_steps: int, seed: int) -> float:
    """Seconds of a sampling, from `num_steps` of its midpoint steps."""
    mask = (torch.arange(SLOTS) < requests["num_particles"][:, None]).unsqueeze(-1).float()
    classes = nn.functional.one_hot(requests["labels"], model.config.num_classes).float()
    conditions = torch.cat([classes, requests["conditions"]], dim=-1)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*mask.shape[:2], model.config.num_features, generator=generator) * mask
    grid = torch.linspace(1, 0, PUBLISHED_STEPS + 1)
    begin = time.perf_counter()
    for start, size in zip(grid[:num_steps], grid.diff()):
        middle = x + 0.5 * size * reference_velocity(model, x, start, mask, conditions)
        x = x + size * reference_velocity(model, middle, start + 0.5 * size, mask, conditions)
    return (time.perf_counter() - begin) / num_steps * PUBLISHED_STEPS


def our_seconds(model: EpicFMForGeneration, requests: dict, seed: int, **settings) -> float:
    generator = torch.Generator().manual_seed(seed)
    begin = time.perf_counter()
    model.generate(**requests, generator=generator, **settings)
    return time.perf_counter() - begin


@torch.inference_mode()
def check_equal(model: EpicFMForGeneration, requests: dict):
    """Both ways give the same velocities."""
    mask = torch.arange(SLOTS) < requests["num_particles"][:, None]
    x = torch.randn(*mask.shape, model.config.num_features) * mask.unsqueeze(-1)
    classes = nn.functional.one_hot(requests["labels"], model.config.num_classes).float()
    conditions = torch.cat([classes, requests["conditions"]], dim=-1)
    moment = torch.tensor(0.37)
    expected = reference_velocity(model, x, moment, mask.unsqueeze(-1).float(), conditions)
    velocity = model.model(x, moment, mask, conditions=conditions).velocity
    torch.testing.assert_close(velocity, expected, rtol=1e-3, atol=1e-3)


def benchmark_generation(arguments: argparse.Namespace) -> dict:
    model = make_model(arguments.seed)
    batch = arguments.batches[-1]
    requests = jet_requests(batch, seed=1)
    check_equal(model, jet_requests(4, seed=2))
    full = {**requests, "num_particles": torch.full((batch,), SLOTS)}
    num_steps, default_steps = arguments.points, model.config.num_inference_steps
    print(f"EPiC flow, {model.num_parameters():,} parameters, {batch} jets, {PUBLISHED_STEPS} midpoint steps")
    print(
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, median of {arguments.repeats} alternating runs"
    )
    print(f"reference, and ours with {SLOTS} constituents, timed on {2 * num_steps} calls and scaled")
    print(f"{'constituents':<24}{'reference jets/s':>18}{'ours jets/s':>14}{'ratio':>8}")
    our_seconds(model, requests, seed=4, num_inference_steps=1)
    counts = requests["num_particles"]
    varied = f"{counts.min()} to {counts.max()}, mean {counts.float().mean():.0f}"
    # requests, steps of ours that are timed, steps that they stand for
    cases = {
        varied: (requests, PUBLISHED_STEPS, PUBLISHED_STEPS),
        f"ours in {default_steps} steps": (requests, default_steps, default_steps),
        f"all {SLOTS}": (full, num_steps, PUBLISHED_STEPS),
    }
    rows = []
    for name, (case, steps, scaled) in cases.items():
        slow, fast = [], []
        for _ in range(arguments.repeats):
            slow.append(reference_seconds(model, case, num_steps, seed=4))
            fast.append(our_seconds(model, case, seed=4, num_inference_steps=steps) * scaled / steps)
        slow, fast = statistics.median(slow), statistics.median(fast)
        rows.append((slow, fast))
        print(f"{name:<24}{batch / slow:>18.3f}{batch / fast:>14.3f}{slow / fast:>8.2f}")
    (slow, fast), (slow_default, fast_default), (slow_full, fast_full) = rows
    return {
        "family": "epic_fm",
        "speedup": slow / fast,
        "baseline_per_s": batch / slow,
        "ours_per_s": batch / fast,
        "batch": batch,
        "length": SLOTS,
        "default_steps": default_steps,
        "ours_per_s_default_steps": batch / fast_default,
        "speedup_default_steps": slow_default / fast_default,
        "speedup_128_constituents": slow_full / fast_full,
    }
