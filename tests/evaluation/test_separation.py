"""Separation power: known Gaussians, published edges, tables, and samples on which a fit must fail clearly."""

import numpy as np
import pytest

from hepzoo.evaluation.separation import (
    auto_edges,
    classifier_edges,
    fit_gaussian,
    kde_edges,
    separation_from_moments,
    separation_power,
    separation_table,
)


def gaussians(separation: float, sigma: float = 1.0, n: int = 20_000, seed: int = 0):
    rng = np.random.default_rng(seed)
    half = separation * sigma / 2
    return rng.normal(half, sigma, n), rng.normal(-half, sigma, n)


@pytest.mark.parametrize("separation", [0.5, 1.6, 3.0, 5.0])
@pytest.mark.parametrize("sigma", [0.3, 1.0, 4.0])
def test_recovers_known_separation(separation, sigma):
    kaon, pion = gaussians(separation, sigma)
    result = separation_power(kaon, pion)
    assert abs(result.separation - separation) < 5 * result.error + 0.02
    assert result.moments == pytest.approx(separation, abs=0.05)
    assert result.kaon.mean == pytest.approx(separation * sigma / 2, abs=0.05 * sigma)
    assert result.kaon.sigma == pytest.approx(sigma, rel=0.05)
    assert result.outside < 1e-3
    assert result.as_array()[[6, 7]].tolist() == [result.separation, result.error]


def test_error_is_the_spread_of_repeated_experiments_within_a_factor():
    results = [separation_power(*gaussians(3.0, n=1000, seed=seed)) for seed in range(25)]
    spread = np.std([r.separation for r in results])
    assert 0.3 < np.mean([r.error for r in results]) / spread < 3


def test_sign_is_kept_on_request_only():
    kaon, pion = gaussians(2.0)
    assert separation_power(pion, kaon, signed=True).separation < 0
    assert separation_power(pion, kaon).separation > 0


def test_published_edges():
    assert len(kde_edges(6.0)) == 200 and kde_edges(6.0)[[0, -1]].tolist() == [-10, 10]
    assert len(kde_edges(9.2)) == 200 and kde_edges(9.2)[-1] == 5
    assert len(kde_edges(3.0)) == 400 and kde_edges(1.0)[-1] == 50
    assert len(classifier_edges()) == 400 and classifier_edges()[0] == -20


def test_outliers_do_not_hide_the_peak():
    kaon, pion = gaussians(3.0, n=5000)
    kaon = np.concatenate([kaon, np.full(20, 1e4), [np.inf, -np.inf]])
    result = separation_power(kaon, pion)
    assert result.separation == pytest.approx(3.0, abs=0.2)
    assert 0 < result.outside < 0.01


def test_auto_edges_follow_the_sample_size():
    assert len(auto_edges(*gaussians(3, n=50))) < len(auto_edges(*gaussians(3, n=5000)))


@pytest.mark.parametrize(
    ("kaon", "pion", "edges", "message"),
    [
        ([], [1.0] * 20, "auto", "kaon scores is empty"),
        ([1.0] * 3, [1.0] * 20, "auto", "3 finite scores"),
        ([1.0] * 20 + [np.nan], [0.0] * 20, "auto", "kaon scores: score 20 is NaN"),
        (np.linspace(90, 91, 50), np.linspace(-1, 1, 50), 6.0, "kaon scores: no score inside the histogram range"),
        (np.linspace(-1, 1, 50), np.linspace(-1, 1, 50), "nonsense", "edges must be"),
        (np.linspace(-1, 1, 50), np.linspace(-1, 1, 50), np.array([1.0, 0.0]), "at least 5 rising"),
    ],
)
def test_hostile_scores(kaon, pion, edges, message):
    with pytest.raises(ValueError, match=message):
        separation_power(np.asarray(kaon), np.asarray(pion), edges=edges)


def test_hostile_constant_scores():
    with pytest.raises(ValueError, match="undefined"):
        separation_from_moments(np.ones(20), np.zeros(20))
    with pytest.raises(ValueError, match="kaon scores: the Gaussian fit"):
        separation_power(np.ones(20), np.zeros(20))
    with pytest.raises(ValueError, match="the Gaussian fit"):
        fit_gaussian(np.full(50, 0.5), np.linspace(0, 1, 11))


def table_input(seed: int = 0):
    rng = np.random.default_rng(seed)
    n = 6000
    theta = rng.choice([30.0, 60.0, 90.0], n)
    pdg = rng.choice([211, -211, 321, -321], n)
    mean = np.where(np.abs(pdg) == 321, 1, -1) * np.where(theta == 30, 1.5, 0.5)
    return {"P": np.full(n, 6.0), "Theta": theta, "PDG": pdg}, rng.normal(mean, 1.0)


def test_table_by_points_and_by_bins():
    rows, scores = table_input()
    table = separation_table(rows, scores)
    assert [row["theta"] for row in table] == [30.0, 60.0, 90.0]
    assert sum(row["kaons"] + row["pions"] for row in table) == 6000
    assert table[0]["separation"] == pytest.approx(3.0, abs=0.3)
    assert table[1]["separation"] == pytest.approx(1.0, abs=0.2)
    assert table[0]["auc"] > 0.97 > table[1]["auc"] > 0.7
    assert table[0]["accuracy"] == pytest.approx(0.933, abs=0.02)
    binned = separation_table(rows, scores, momentum_bins=[1, 5, 10], theta_bins=[25, 60, 90])
    assert [(row["theta_low"], row["theta_high"]) for row in binned] == [(25, 60), (60, 90)]
    assert sum(row["kaons"] + row["pions"] for row in binned) == 6000  # the last bin is closed


def test_table_says_why_a_figure_is_missing():
    rows, scores = table_input()
    table = separation_table(rows, scores, min_tracks=10_000)
    assert all(np.isnan(row["separation"]) and "fewer than 10000" in row["note"] for row in table)
    table = separation_table(rows, scores + 100, edges=6.0)
    assert all(np.isnan(row["separation"]) and "no score inside" in row["note"] for row in table)
    assert all(row["moments"] > 0.5 for row in table)


def test_table_of_records(columns):
    rows = columns(120, 5, momentum=6.0, theta=30.0)
    scores = np.where(rows["PDG"] == 321, 1.0, -1.0) + np.random.default_rng(1).normal(0, 0.5, 120)
    (row,) = separation_table(rows, scores)
    assert (row["kaons"], row["pions"]) == (60, 60)


def test_hostile_table():
    rows, scores = table_input()
    with pytest.raises(ValueError, match="one number per row"):
        separation_table(rows, scores[:-1])
    scores[7] = np.nan
    with pytest.raises(ValueError, match="row 7: the score is NaN"):
        separation_table(rows, scores)
    rows["PDG"][3] = 11
    with pytest.raises(ValueError, match="row 3: PDG is 11"):
        separation_table(rows, np.zeros(6000))
    with pytest.raises(ValueError, match="'Theta' is missing"):
        separation_table({"P": [1.0], "PDG": [211]}, [0.0])
