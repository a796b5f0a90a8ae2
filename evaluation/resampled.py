"""Distances of observables with the published errors: random draws with replacement, and disjoint splits.

W1 and the quantile-KL are means and standard deviations over draws of jets (arXiv:2606.14870, arXiv:2312.00123); the
"reversed" KL of the EPiC flow (arXiv:2312.00123) is KL(generated || real), over disjoint splits. Whole jets are drawn.
"""

from collections.abc import Sequence

import numpy as np
from scipy.stats import wasserstein_distance

from hepzoo.evaluation.distances import _sample, quantile_kl
from hepzoo.evaluation.jets import JetObservables


def reversed_kl(
    real: np.ndarray, generated: np.ndarray, bins: int = 100, clip: bool = False, renormalise: bool = True
) -> float:
    """KL(generated || real) in nats, in bins of equal parts of the real sample, from its least to its largest value.

    A bin that is empty in one of the samples contributes 0, as published: the divergence is finite and may even be
    negative. Equal edges are taken once.

    Args:
        bins (`int`): published 100.
        clip (`bool`): move generated values into the range of the real ones; otherwise those outside are in no bin.
        renormalise (`bool`): the generated histogram sums to 1 whatever is outside.
    """
    if bins < 2:
        raise ValueError(f"bins must be at least 2, got {bins}")
    real, generated = _sample(real, "real"), _sample(generated, "generated")
    if clip:
        generated = np.clip(generated, real.min(), real.max())
    edges = np.unique(np.quantile(real, np.linspace(0, 1, bins + 1)))
    if len(edges) < 2:
        return float("nan")
    p = np.histogram(real, edges)[0] / len(real)
    counts = np.histogram(generated, edges)[0]
    q = counts / max(counts.sum() if renormalise else len(generated), 1)
    filled = (p > 0) & (q > 0)
    return float((q[filled] * np.log(q[filled] / p[filled])).sum())


def resampled_distances(
    real: JetObservables,
    generated: JetObservables,
    names: Sequence[str],
    num_jets: int | None = None,
    draws: int = 10,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """`w1` (in units), `kl` (30 quantile bins) and their `_std` over random draws with replacement, by observable.

    Args:
        names: of observables of jets or of constituents.
        num_jets (`int`, *optional*): of a draw; default the smaller sample, at most 50 000. Published: 50 000 (EPiC),
            10 000 (OmniLearned).
        draws (`int`): published 10.

    Returns:
        NaN where a sample lacks the observable.
    """
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")
    num_jets = min(50_000, len(real), len(generated)) if num_jets is None else num_jets
    if num_jets < 1 or not len(real) or not len(generated):
        raise ValueError(f"{len(real)} real, {len(generated)} generated jets, {num_jets} in a draw: at least 1 needed")
    rng = np.random.default_rng(seed)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for _ in range(draws):
        samples = [o.select(rng.integers(len(o), size=num_jets)) for o in (real, generated)]
        for name in names:
            values = [sample.values(name) for sample in samples]
            known = all(map(len, values))
            found[name].append((wasserstein_distance(*values), quantile_kl(*values)) if known else (np.nan, np.nan))
    rows = {}
    for name, pairs in found.items():
        (w1, kl), (w1_std, kl_std) = np.mean(pairs, axis=0), np.std(pairs, axis=0)
        rows[name] = {"w1": float(w1), "w1_std": float(w1_std), "kl": float(kl), "kl_std": float(kl_std)}
    return rows


def split_reversed_kl(
    real: JetObservables, generated: JetObservables, names: Sequence[str], splits: int = 10, **options
) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation of the `reversed_kl` over disjoint splits of both samples, by observable.

    Args:
        splits (`int`): published 10, of 100 000 jets; parts without the observable do not count.
        options: of `reversed_kl`.
    """
    if not 1 <= splits <= min(len(real), len(generated)):
        raise ValueError(f"{splits} splits of {len(real)} real and {len(generated)} generated jets")
    values: dict[str, list[float]] = {name: [] for name in names}
    pairs = (np.array_split(np.arange(len(o)), splits) for o in (real, generated))
    for first, second in zip(*pairs, strict=True):
        samples = real.select(first), generated.select(second)
        for name in names:
            parts = [sample.values(name) for sample in samples]
            if all(map(len, parts)):
                values[name].append(reversed_kl(*parts, **options))
    unknown = (float("nan"), float("nan"))
    return {name: (float(np.mean(v)), float(np.std(v))) if v else unknown for name, v in values.items()}
