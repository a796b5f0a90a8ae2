"""FPND with made-up weights in the published layout: the network against explicit loops, the distance by scipy."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from hepzoo.evaluation.jetnet import relative_jets
from hepzoo.evaluation.particlenet_distance import (
    SCALES,
    SHIFTS,
    frechet_distance,
    frechet_particlenet_distance,
    load_particlenet,
    particlenet_activations,
)
from tests.evaluation.test_jets import random_jets


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """State dict in the published layout, each edge network under two names, and statistics of random jets."""
    folder = tmp_path_factory.mktemp("particlenet")
    generator = torch.Generator().manual_seed(0)
    state = {}

    def linear(name: str, size: int, next_size: int) -> None:
        state[f"{name}.weight"] = torch.randn(next_size, size, generator=generator) / size**0.5
        state[f"{name}.bias"] = 0.1 * torch.randn(next_size, generator=generator)

    widths = (3, 67, 195, 451)
    for block, channels in enumerate((64, 128, 256)):
        for name in (f"edge_nets.{block}", f"edge_convs.{block}.nn"):
            size = 2 * widths[block]
            for layer in range(3):
                linear(f"{name}.model.{3 * layer}", size, channels)
                norm = f"{name}.model.{3 * layer + 1}"
                state[f"{norm}.weight"] = 1 + 0.1 * torch.randn(channels, generator=generator)
                state[f"{norm}.bias"] = 0.1 * torch.randn(channels, generator=generator)
                state[f"{norm}.running_mean"] = 0.1 * torch.randn(channels, generator=generator)
                state[f"{norm}.running_var"] = torch.rand(channels, generator=generator) + 0.5
                state[f"{norm}.num_batches_tracked"] = torch.tensor(5)
                size = channels
    linear("fc1.0", 451, 256)
    linear("fc2", 256, 5)
    torch.save(state, folder / "pnet_state_dict.pt")
    activations = particlenet_activations(load_particlenet(folder), random_jets(50, seed=1))
    np.savetxt(folder / "t_mu.txt", activations.mean(axis=0))
    np.savetxt(folder / "t_sigma.txt", np.cov(activations, rowvar=False))
    return folder


def test_network_by_explicit_loops(folder):
    state = {k: v.double().numpy() for k, v in torch.load(folder / "pnet_state_dict.pt", weights_only=True).items()}
    rows = random_jets(2, seed=3, most=40)
    jets = relative_jets(rows)
    found = particlenet_activations(load_particlenet(folder), rows)
    for number in range(2):
        one = jets.select([number])
        order = np.argsort(-one.pt)[:30]
        x = np.zeros((30, 3))
        x[: len(order)] = np.stack([one.eta, one.phi, one.pt], axis=1)[order]
        x = x / np.array(SCALES) + np.array(SHIFTS)
        for block in range(3):
            coordinates = x[:, :2] if block == 0 else x
            updated = []
            for i in range(30):
                distance = np.linalg.norm(coordinates - coordinates[i], axis=1)
                distance[i] = np.inf
                edges = [np.r_[x[i], x[j] - x[i]] for j in np.argsort(distance, kind="stable")[:16]]
                messages = np.array(edges)
                for layer in range(3):
                    name = f"edge_nets.{block}.model.{3 * layer}"
                    messages = messages @ state[f"{name}.weight"].T + state[f"{name}.bias"]
                    name = f"edge_nets.{block}.model.{3 * layer + 1}"
                    scale = state[f"{name}.weight"] / np.sqrt(state[f"{name}.running_var"] + 1e-5)
                    messages = (messages - state[f"{name}.running_mean"]) * scale + state[f"{name}.bias"]
                    messages = np.maximum(messages, 0)
                updated.append(np.r_[messages.mean(axis=0), x[i]])
            x = np.array(updated)
        expected = x.mean(axis=0) @ state["fc1.0.weight"].T + state["fc1.0.bias"]
        np.testing.assert_allclose(found[number], expected, rtol=1e-3, atol=1e-4)


def test_distance_of_gaussians():
    rng = np.random.default_rng(0)
    samples = rng.normal(size=(300, 5)), rng.normal(0.5, 2, size=(300, 5)) @ rng.normal(size=(5, 5))
    (m1, c1), (m2, c2) = ((s.mean(axis=0), np.cov(s, rowvar=False)) for s in samples)
    expected = ((m1 - m2) ** 2).sum() + np.trace(c1 + c2 - 2 * sqrtm(c1 @ c2).real)
    assert frechet_distance(m1, c1, m2, c2) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(m1, c1, m1, c1) == pytest.approx(0, abs=1e-9)


def test_same_jets_have_no_distance(folder):
    assert frechet_particlenet_distance(random_jets(50, seed=1), "t", folder) == pytest.approx(0, abs=1e-3)
    wide = frechet_particlenet_distance(random_jets(50, seed=1, width=0.6), "t", folder)
    assert wide > 0.05


def test_hostile_files(folder, tmp_path):
    jets = random_jets(5)
    with pytest.raises(ValueError, match="unknown jet type 'W', expected one of g, q, t"):
        frechet_particlenet_distance(jets, "W", folder)
    with pytest.raises(ValueError, match=r"g_mu.txt is missing; it is in the folder fpnd_resources"):
        frechet_particlenet_distance(jets, "g", folder)
    with pytest.raises(ValueError, match="pnet_state_dict.pt is missing; it is in the folder fpnd_resources"):
        load_particlenet(tmp_path)
    (tmp_path / "pnet_state_dict.pt").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="not a file of weights|not the published ParticleNet"):
        load_particlenet(tmp_path)
    torch.save({"fc1.0.weight": torch.zeros(2, 2)}, tmp_path / "pnet_state_dict.pt")
    with pytest.raises(ValueError, match="not the published ParticleNet"):
        load_particlenet(tmp_path)
    np.savetxt(tmp_path / "g_mu.txt", np.zeros(3))
    with pytest.raises(ValueError, match=r"array of \(3,\)"):
        frechet_particlenet_distance(jets, "g", tmp_path)
