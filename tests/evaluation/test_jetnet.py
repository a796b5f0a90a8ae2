"""The JetNet metrics against direct sums, enumerated couplings and the definitions of the distances."""

import itertools
from pathlib import Path

import evaluate
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment
from scipy.stats import wasserstein_distance

import hepzoo.evaluation
from hepzoo.evaluation import jetnet
from hepzoo.evaluation.jets import as_jets
from hepzoo.evaluation.metric_jetnet import JetNetMetrics
from tests.evaluation.test_jets import random_jets

FOLDER = Path(hepzoo.evaluation.__file__).parent


@pytest.fixture(scope="module")
def samples():
    """Two samples of the same kind and one of wider jets."""
    return [as_jets(random_jets(60, seed=s, width=w)) for s, w in ((1, 0.15), (2, 0.15), (3, 0.3))]


def direct_efp(pt, eta, phi, graph) -> float:
    total = 0.0
    for particles in itertools.product(range(len(pt)), repeat=4):
        term = np.prod([pt[i] for i in particles])
        for k, l in graph:
            i, j = particles[k], particles[l]
            dphi = (phi[i] - phi[j] + np.pi) % (2 * np.pi) - np.pi
            term *= np.hypot(eta[i] - eta[j], dphi)
        total += term
    return total


def test_energy_flow_polynomials_are_direct_sums():
    rng = np.random.default_rng(0)
    # jets of 1, 2 and 3 constituents have fewer distinct ones than the graph has vertices; the last is around phi = pi
    rows = [
        {"part_pt": rng.exponential(size=n), "part_eta": rng.normal(size=n), "part_phi": shift + rng.normal(0, 0.3, n)}
        for n, shift in ((1, 0), (2, 0), (3, 0), (5, 1), (6, np.pi))
    ]
    jets = as_jets(rows)
    found = jetnet.energy_flow_polynomials(jets)
    for row, values in zip(rows, found, strict=True):
        expected = [direct_efp(*row.values(), graph) for graph in jetnet.EFP_GRAPHS.values()]
        np.testing.assert_allclose(values, expected, rtol=1e-12, atol=1e-12)
    assert (found[0] == 0).all() and (found[1, 4] == 0)  # a triangle needs three


def test_graphs_are_all_prime_multigraphs_of_degree_4():
    """Connected multigraphs of 4 vertices and 4 edges, up to names of the vertices."""
    pairs = list(itertools.combinations(range(4), 2))

    def canonical(graph):
        names = itertools.permutations(range(4))
        return min(tuple(sorted(tuple(sorted((n[a], n[b]))) for a, b in graph)) for n in names)

    def connected(graph):
        reached = {0}
        for _ in range(4):
            reached |= {v for edge in graph if reached & set(edge) for v in edge}
        return len(reached) == 4

    every = {canonical(g) for g in itertools.combinations_with_replacement(pairs, 4) if connected(g)}
    assert {canonical(graph) for graph in jetnet.EFP_GRAPHS.values()} == every and len(every) == 5


def test_relative_jets(samples):
    jets = jetnet.relative_jets(samples[0])
    pt, _, phi = jets.axes
    np.testing.assert_allclose(pt, 1, rtol=1e-9)
    np.testing.assert_allclose(phi, 0, atol=1e-9)
    # the pseudorapidity of the axis is subtracted from those of the constituents
    np.testing.assert_allclose(jets.eta + samples[0].axes[1][jets.owner], samples[0].eta, atol=1e-9)
    gev = jetnet.relative_jets(samples[0], divide_pt=False)
    np.testing.assert_allclose(jets.masses() * gev.axes[0], gev.masses(), rtol=1e-6)
    np.testing.assert_array_equal(gev.pt, samples[0].pt)


def test_wasserstein_distances_are_those_of_scipy(samples):
    first, second = (jetnet.relative_jets(jets) for jets in samples[:2])
    rng = np.random.default_rng(4)
    draws = [(rng.integers(60, size=30), rng.integers(60, size=30)) for _ in range(3)]
    masses = [wasserstein_distance(first.masses()[a], second.masses()[b]) for a, b in draws]
    mean, std = jetnet.w1_mass(first, second, 30, 3, seed=4)
    assert (mean, std) == pytest.approx((np.mean(masses), np.std(masses)))

    def constituents(jets, numbers, name):
        return np.concatenate([getattr(jets, name)[jets.offsets[i] : jets.offsets[i + 1]] for i in numbers])

    means, stds = jetnet.w1_particles(first, second, 30, 3, seed=4)
    for k, name in enumerate(("eta", "phi", "pt")):
        found = [wasserstein_distance(constituents(first, a, name), constituents(second, b, name)) for a, b in draws]
        assert (means[k], stds[k]) == pytest.approx((np.mean(found), np.std(found)))
    polynomials = [jetnet.energy_flow_polynomials(jets) for jets in (first, second)]
    means, _ = jetnet.w1_efp(first, second, 30, 3, seed=4)
    found = [wasserstein_distance(polynomials[0][a, 2], polynomials[1][b, 2]) for a, b in draws]
    assert means[2] == pytest.approx(np.mean(found))


def test_energy_movers_distance():
    rng = np.random.default_rng(0)
    for size in (2, 3, 6):
        # with equal pT the best flow is an assignment
        eta, phi = rng.normal(0, 0.3, (2, 2, size))
        cost = np.hypot(eta[0][:, None] - eta[1], phi[0][:, None] - phi[1])
        best = cost[linear_sum_assignment(cost)].sum() * 2.0
        pt = np.full(size, 2.0)
        found = jetnet.energy_movers_distance((pt, eta[0], phi[0]), (pt, eta[1], phi[1]))
        assert found == pytest.approx(best, rel=1e-6)
    one, two = (np.array([3.0]), np.zeros(1), np.zeros(1)), (np.array([1.0, 1.5]), np.array([0.1, 0.2]), np.zeros(2))
    # all of the smaller jet moves, the rest is the difference of the pT
    assert jetnet.energy_movers_distance(one, two) == pytest.approx(0.1 * 1 + 0.2 * 1.5 + 0.5)
    assert jetnet.energy_movers_distance(two, one) == pytest.approx(0.1 * 1 + 0.2 * 1.5 + 0.5)
    assert jetnet.energy_movers_distance(two, two) == pytest.approx(0, abs=1e-9)
    around = tuple(np.array([v]) for v in (1.0, 0.0, 3.1)), tuple(np.array([v]) for v in (1.0, 0.0, -3.1))
    assert jetnet.energy_movers_distance(*around) == pytest.approx(2 * np.pi - 6.2)
    half, half_scaled = (jetnet.energy_movers_distance(one, two, radius=r) - 0.5 for r in (1.0, 2.0))
    assert half == pytest.approx(2 * half_scaled)


def test_transport_of_unequal_weights():
    """2 x 2: the flow has one free number, so the best is at one of its ends."""
    rng = np.random.default_rng(2)
    for _ in range(5):
        cost, a = rng.uniform(0, 1, (2, 2)), rng.dirichlet((1, 1))
        b = rng.dirichlet((1, 1))
        ends = [max(0, a[0] - b[1]), min(a[0], b[0])]
        costs = [(np.array([[f, a[0] - f], [b[0] - f, b[1] - a[0] + f]]) * cost).sum() for f in ends]
        assert jetnet._transport(cost, a, b) == pytest.approx(min(costs), abs=1e-7)


def test_coverage_and_mmd_by_brute_force(samples):
    real, generated = (jetnet.relative_jets(jets).cut(max_constituents=6) for jets in (samples[0], samples[2]))
    found = jetnet.coverage_and_mmd(real, generated, num_jets=4, draws=2, seed=7)
    rng, coverages, distances = np.random.default_rng(7), [], []
    for _ in range(2):
        a, b = rng.integers(60, size=4), rng.integers(60, size=4)
        matrix = [
            [
                jetnet.energy_movers_distance(
                    *(
                        tuple(getattr(j.select([i]), n) for n in ("pt", "eta", "phi"))
                        for j, i in ((real, r), (generated, g))
                    )
                )
                for r in a
            ]
            for g in b
        ]
        closest = {min(range(4), key=lambda r, row=row: row[r]) for row in matrix}
        coverages.append(len(closest) / 4)
        distances.append(np.mean([min(matrix[g][r] for g in range(4)) for r in range(4)]))
    assert found["coverage"] == pytest.approx(np.mean(coverages)) and found["mmd"] == pytest.approx(np.mean(distances))
    same = jetnet.coverage_and_mmd(real.select([0, 1]), real.select([0, 1]), num_jets=10, draws=1, seed=1)
    assert same["mmd"] == pytest.approx(0, abs=1e-7) and same["coverage"] <= 2 / 10


def test_metrics_see_the_width(samples):
    same, wide = (jetnet.jetnet_metrics(samples[0], o) for o in samples[1:])
    assert set(same) == {
        f"{name}{end}" for name in ("w1m", "w1p", "w1p_eta", "w1p_phi", "w1p_pt", "w1efp") for end in ("", "_std")
    }
    assert wide["w1m"] > 2 * same["w1m"] and wide["w1p_eta"] > 2 * same["w1p_eta"] and wide["w1efp"] > same["w1efp"]
    assert same["w1p"] == pytest.approx(np.mean([same[f"w1p_{name}"] for name in ("eta", "phi", "pt")]))
    gev = jetnet.jetnet_metrics(samples[0], samples[1], divide_pt=False)
    assert gev["w1p_pt"] > 10 * same["w1p_pt"]


@pytest.mark.parametrize("by", ["class", "file"])
def test_metric(by, samples, tmp_path):
    metric = JetNetMetrics() if by == "class" else evaluate.load(
        str(FOLDER / "metric_jetnet.py"), cache_dir=str(tmp_path)
    )  # fmt: skip
    jets = [jetnet.relative_jets(o).select(np.arange(20)) for o in samples[:2]]
    predictions = [
        np.stack([getattr(o, name)[o.offsets[i] : o.offsets[i + 1]] for name in ("eta", "phi", "pt")], axis=1).tolist()
        for o in jets
        for i in range(20)
    ]
    found = metric.compute(predictions=predictions, references=[1] * 20 + [0] * 20, emd_jets=2, emd_draws=1)
    expected = jetnet.jetnet_metrics(*jets, emd_jets=2, emd_draws=1)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-6, abs=1e-9), name


def test_hostile_metrics(samples):
    jets = jetnet.relative_jets(samples[0])
    with pytest.raises(ValueError, match="draws must be at least 1"):
        jetnet.w1_mass(jets, jets, draws=0)
    with pytest.raises(ValueError, match="num_jets must be at least 1"):
        jetnet.w1_efp(jets, jets, num_jets=0)
    with pytest.raises(ValueError, match="the generated sample has no jet with a constituent"):
        jetnet.w1_mass(jets, jets.select([]))
    metric = JetNetMetrics()
    with pytest.raises(ValueError, match="reference 1 is 2"):
        metric.compute(predictions=[[[0.1, 0.1, 1.0]]] * 2, references=[1, 2])
    with pytest.raises(ValueError, match="jet 1: expected constituents of 3 numbers"):
        metric.compute(predictions=[[[0.1, 0.1, 1.0]], [[0.1, 0.2]]], references=[1, 0])
    with pytest.raises(ValueError, match="part_pt"):
        metric.compute(predictions=[[[0.1, 0.1, 1.0]], [[0.1, 0.2, 0.0]]], references=[1, 0])
