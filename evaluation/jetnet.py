"""The metrics of JetNet for generated jets: W1-M, W1-P, W1-EFP, coverage and minimum matching distance, FPND.

Definitions of arXiv:2106.11535 and arXiv:2211.10295. Jets are sets of massless constituents relative to the jet axis;
their pT is that of the constituent over that of the jet, as in the JetNet data, or in GeV. The axis is the sum of the
constituents unless the coordinates are relative already.

The Wasserstein distances are means over random draws of jets, with replacement, and the standard deviation over the
draws. The `jetnet` package computes the same numbers; this needs numpy and scipy only.
"""

from functools import lru_cache
from typing import Any

import numpy as np
from scipy.stats import wasserstein_distance

from hepzoo.evaluation.jet_substructure import _batches, wrap_phi
from hepzoo.evaluation.jets import Jets, as_jets

# connected multigraphs of 4 vertices and 4 edges, in the order of `energy_flow_polynomials`
EFP_GRAPHS = {
    "path, end doubled": ((0, 1), (0, 1), (1, 2), (2, 3)),
    "path, middle doubled": ((0, 1), (1, 2), (1, 2), (2, 3)),
    "star, one doubled": ((0, 1), (0, 1), (0, 2), (0, 3)),
    "cycle": ((0, 1), (1, 2), (2, 3), (3, 0)),
    "triangle with a tail": ((0, 1), (1, 2), (2, 0), (0, 3)),
}
PUBLISHED_JETS = 50_000  # of a draw
FEATURES = ("eta", "phi", "pt")


def relative_jets(rows: Any, divide_pt: bool = True) -> Jets:
    """Massless constituents relative to the axes of their jets.

    Args:
        rows: as `hepzoo.evaluation.jets.as_jets` takes them.
        divide_pt (`bool`): by the pT of the jet; otherwise GeV.
    """
    jets = as_jets(rows)
    jets = (jets if jets.relative else jets.centered()).massless()
    if not divide_pt:
        return jets
    return Jets(
        jets.offsets, jets.pt / jets.axes[0][jets.owner], jets.eta, jets.phi, jets.mass, jets.label, relative=True
    )


def energy_flow_polynomials(jets: Jets) -> np.ndarray:
    """The five prime energy flow polynomials of 4 vertices and degree 4 (arXiv:1712.07124), shape `(jets, 5)`.

    EFP_G = sum over i1..i4 of pT_i1 pT_i2 pT_i3 pT_i4 times the product over the edges (k, l) of the graph of the
    distance of i_k and i_l in (eta, phi), to the power 1; the graphs are `EFP_GRAPHS`. All are sums over products of
    matrices: the cost is that of one matrix product per jet.
    """
    found = np.zeros((len(jets), len(EFP_GRAPHS)))
    for rows in _batches(jets.multiplicity, 2):
        pt, eta, phi, _ = jets.select(rows).padded()
        distance = np.hypot(eta[:, :, None] - eta[:, None, :], wrap_phi(phi[:, :, None] - phi[:, None, :]))
        weighted = distance * pt[:, None, :]
        one = weighted.sum(axis=2)  # of every constituent: an edge to any other
        two = (weighted * distance).sum(axis=2)  # a doubled edge
        square = weighted @ distance
        triangle = (square * weighted).sum(axis=2)
        found[rows] = np.stack(
            [
                (pt * two * np.einsum("jab,jb->ja", weighted, one)).sum(axis=1),
                (pt * one * np.einsum("jab,jb->ja", weighted * distance, one)).sum(axis=1),
                (pt * two * one**2).sum(axis=1),
                (pt * np.einsum("jab,jb->ja", square**2, pt)).sum(axis=1),
                (pt * one * triangle).sum(axis=1),
            ],
            axis=1,
        )
    return found


def _draws(real: Jets, generated: Jets, num_jets: int | None, draws: int, seed: int):
    """Numbers of the jets of every draw: (of the real, of the generated sample)."""
    for sample, name in ((real, "real"), (generated, "generated")):
        if not len(sample) or not sample.offsets[-1]:
            raise ValueError(f"the {name} sample has no jet with a constituent")
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")
    num_jets = min(PUBLISHED_JETS, len(real), len(generated)) if num_jets is None else num_jets
    if num_jets < 1:
        raise ValueError(f"num_jets must be at least 1, got {num_jets}")
    rng = np.random.default_rng(seed)
    for _ in range(draws):
        yield rng.integers(len(real), size=num_jets), rng.integers(len(generated), size=num_jets)


def _mean_and_std(values: list) -> tuple[np.ndarray, np.ndarray]:
    return np.mean(values, axis=0), np.std(values, axis=0)


def w1_mass(
    real: Jets, generated: Jets, num_jets: int | None = None, draws: int = 5, seed: int = 0
) -> tuple[float, float]:
    """W1-M: Wasserstein-1 distance of the jet masses, mean and standard deviation over the draws.

    Args:
        real, generated (`Jets`): of `relative_jets`. An empty jet has mass 0.
        num_jets (`int`, *optional*): of every draw; default the smaller sample, at most 50 000 (published).
    """
    masses = [np.nan_to_num(jets.masses()) for jets in (real, generated)]
    found = [
        wasserstein_distance(masses[0][a], masses[1][b]) for a, b in _draws(real, generated, num_jets, draws, seed)
    ]
    mean, std = _mean_and_std(found)
    return float(mean), float(std)


def w1_particles(
    real: Jets, generated: Jets, num_jets: int | None = None, draws: int = 5, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """W1-P: Wasserstein-1 distances of eta, phi and pT of the constituents, mean and std, shape `(3,)` each.

    Arguments as those of `w1_mass`; jets are drawn, not constituents.
    """
    found = []
    for a, b in _draws(real, generated, num_jets, draws, seed):
        samples = real.select(a), generated.select(b)
        found.append([wasserstein_distance(*(getattr(jets, name) for jets in samples)) for name in FEATURES])
    return _mean_and_std(found)


def w1_efp(
    real: Jets, generated: Jets, num_jets: int | None = None, draws: int = 5, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """W1-EFP: Wasserstein-1 distances of the `energy_flow_polynomials`, mean and std, shape `(5,)` each.

    Arguments as those of `w1_mass`.
    """
    first, second = energy_flow_polynomials(real), energy_flow_polynomials(generated)
    found = [
        [wasserstein_distance(x, y) for x, y in zip(first[a].T, second[b].T, strict=True)]
        for a, b in _draws(real, generated, num_jets, draws, seed)
    ]
    return _mean_and_std(found)


# ---- matching by the energy mover's distance


@lru_cache(maxsize=512)
def _marginals(rows: int, columns: int):
    """Sums over rows and columns of a flattened matrix; the last one follows from the others."""
    from scipy import sparse

    sums = [
        sparse.kron(sparse.eye(rows), np.ones((1, columns))),
        sparse.kron(np.ones((1, rows)), sparse.eye(columns)),
    ]
    return sparse.vstack(sums, format="csr")[:-1]


def _transport(cost: np.ndarray, supply: np.ndarray, demand: np.ndarray) -> float:
    """Least cost to carry `supply` to `demand`, which have one sum."""
    try:
        import ot
    except ImportError:
        from scipy.optimize import linprog

        wanted = np.concatenate([supply, demand])[:-1]
        return linprog(cost.ravel(), A_eq=_marginals(*cost.shape), b_eq=wanted, method="highs-ds").fun
    total = supply.sum()
    # the network simplex wants contiguous arrays that sum to the same number in floating point
    demand = demand * (total / demand.sum())
    return total * ot.emd2(np.ascontiguousarray(supply / total), np.ascontiguousarray(demand / total), cost)


def energy_movers_distance(
    first: tuple[np.ndarray, np.ndarray, np.ndarray],
    second: tuple[np.ndarray, np.ndarray, np.ndarray],
    radius: float = 1.0,
) -> float:
    """Energy mover's distance of two jets (arXiv:1902.02346), in the unit of the pT.

    min over flows f of sum f_ij dR_ij / radius, plus the difference of the summed pT. Exact: by POT if it is installed
    (`pip install pot`), else by linear programming of scipy, which takes about 100 times as long.

    Args:
        first, second: pT, eta, phi of the constituents, shape `(constituents,)` each.
        radius (`float`): published 1.
    """
    (pt, eta, phi), (other_pt, other_eta, other_phi) = first, second
    excess = pt.sum() - other_pt.sum()
    cost = np.hypot(eta[:, None] - other_eta, wrap_phi(phi[:, None] - other_phi)) / radius
    # what is left over goes to a place of its own, at cost 1
    if excess > 0:
        other_pt, cost = np.append(other_pt, excess), np.pad(cost, ((0, 0), (0, 1)), constant_values=1.0)
    elif excess < 0:
        pt, cost = np.append(pt, -excess), np.pad(cost, ((0, 1), (0, 0)), constant_values=1.0)
    if min(cost.shape) == 1:  # one end: all goes there
        return float((cost * np.maximum(pt[:, None] if cost.shape[1] == 1 else other_pt, 0)).sum())
    return float(_transport(cost, pt, other_pt))


def coverage_and_mmd(
    real: Jets, generated: Jets, num_jets: int = 100, draws: int = 10, seed: int = 0, progress: bool = False
) -> dict[str, float]:
    """Coverage and minimum matching distance by the energy mover's distance, means and std over the draws.

    Coverage: share of the real jets of a draw that are the closest one of some generated jet. MMD: mean over the real
    jets of the distance to the closest generated one.

    Args:
        real, generated (`Jets`): of `relative_jets`.
        num_jets, draws (`int`): num_jets^2 distances in every draw (published 100 and 10).

    Returns:
        `coverage`, `coverage_std`, `mmd`, `mmd_std`.
    """
    from tqdm import tqdm

    found = []
    with tqdm(total=draws * num_jets, unit=" jets", disable=not progress, leave=False) as bar:
        for chosen in _draws(real, generated, num_jets, draws, seed):
            samples = [
                [
                    tuple(getattr(jets, name)[slice(*jets.offsets[[i, i + 1]])] for name in ("pt", "eta", "phi"))
                    for i in numbers
                ]
                for jets, numbers in zip((real, generated), chosen, strict=True)
            ]
            distances = np.empty((num_jets, num_jets))  # generated, real
            for row, jet in enumerate(samples[1]):
                distances[row] = [energy_movers_distance(jet, other) for other in samples[0]]
                bar.update()
            found.append((len(np.unique(distances.argmin(axis=1))) / num_jets, distances.min(axis=0).mean()))
    mean, std = _mean_and_std(found)
    return {"coverage": mean[0], "coverage_std": std[0], "mmd": mean[1], "mmd_std": std[1]}


def jetnet_metrics(
    real: Any,
    generated: Any,
    divide_pt: bool = True,
    num_jets: int | None = None,
    draws: int = 5,
    emd_jets: int = 0,
    emd_draws: int = 10,
    seed: int = 0,
) -> dict[str, float]:
    """All metrics of this module but FPND.

    Args:
        real, generated: rows as `hepzoo.evaluation.jets.as_jets` takes them.
        divide_pt (`bool`): pT of constituents over that of their jet, as in JetNet; otherwise GeV.
        num_jets, draws: of the Wasserstein distances, see `w1_mass`.
        emd_jets, emd_draws: of `coverage_and_mmd`; 0 jets: without.

    Returns:
        `w1m`, `w1p` (mean of `w1p_eta`, `w1p_phi`, `w1p_pt`), `w1efp` (mean of the five), each with `_std`, and
        `coverage`, `mmd` with theirs.
    """
    real, generated = relative_jets(real, divide_pt), relative_jets(generated, divide_pt)
    found = dict(zip(("w1m", "w1m_std"), w1_mass(real, generated, num_jets, draws, seed), strict=True))
    means, stds = w1_particles(real, generated, num_jets, draws, seed)
    found |= {"w1p": float(means.mean()), "w1p_std": float(stds.mean())}
    for name, mean, std in zip(FEATURES, means, stds, strict=True):
        found |= {f"w1p_{name}": float(mean), f"w1p_{name}_std": float(std)}
    means, stds = w1_efp(real, generated, num_jets, draws, seed)
    found |= {"w1efp": float(means.mean()), "w1efp_std": float(stds.mean())}
    if emd_jets:
        found |= coverage_and_mmd(real, generated, emd_jets, emd_draws, seed)
    return {name: float(value) for name, value in found.items()}
