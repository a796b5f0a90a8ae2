"""Kernel-density log-likelihood: the fast searches against the plain sum, bounds, ragged tracks, errors."""

import numpy as np
import pytest

from hepzoo.evaluation.kde import LOG_FLOOR, PhotonKDE, delta_log_likelihood, log_likelihood, photon_probabilities
from hepzoo.tokenization.geometry_dirc import DircGeometry

WIDTHS = np.array([3.3125, 3.3125, 0.1])


def photons(n: int, seed: int, pixels: bool = True) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if not pixels:
        return np.stack([rng.uniform(50, 100, n), rng.uniform(50, 100, n), rng.uniform(20, 22, n)], axis=1)
    x, y = DircGeometry().pixel_center(rng.choice([0, 1, 6], n), rng.integers(0, 256, n))
    return np.stack([x, y, rng.uniform(20, 24, n)], axis=1)


def plain(hits: np.ndarray, support: np.ndarray) -> np.ndarray:
    """The definition, one pair at a time in numpy."""
    d = (hits[:, None] - support[None]) / WIDTHS
    return np.exp(-(d**2).sum(-1)).mean(1)


@pytest.mark.parametrize("pixels", [True, False])
@pytest.mark.parametrize("method", ["auto", "pixels", "tree"])
@pytest.mark.parametrize("block_pairs", [64, 2_000_000])
def test_searches_agree_with_the_plain_sum(pixels, method, block_pairs):
    hits, support = photons(80, 1, pixels), photons(4000, 2, pixels)
    wanted = plain(hits, support)
    for cut in (2.0, 3.5, 5.0, None):
        found = photon_probabilities(hits, support, cut=cut, method=method, block_pairs=block_pairs)
        bound = 0 if cut is None else np.exp(-(cut**2))
        assert np.all(found <= wanted * (1 + 1e-12))
        np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=bound)


def test_log_of_the_sum_not_sum_of_logs():
    hits, support = photons(30, 3), photons(3000, 4)
    p = plain(hits, support)
    assert log_likelihood(hits, support, cut=None) == pytest.approx(20 * np.log(p.sum() + 1e-50), rel=1e-13)
    assert log_likelihood(hits, support, log_scale=1.0) == pytest.approx(np.log(p.sum()), abs=1e-6)


def test_bound_holds_for_tracks_far_from_the_support():
    """Distances from 0 to 40 widths: the cut alone would lose the track, the second pass keeps the stated accuracy."""
    support = photons(2000, 5)
    tracks = [photons(5, 6) + [0, 0, shift] for shift in np.linspace(0, 4.5, 40)]
    wanted = np.array([plain(t, support).sum() for t in tracks])
    for method in ("pixels", "tree"):
        for cut in (1.5, 5.0):
            kde = PhotonKDE(support, cut=cut, rtol=1e-6, method=method)
            found = kde.summed_probabilities(tracks)
            np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-60)
            np.testing.assert_allclose(kde.log_likelihood(tracks), 20 * np.log(wanted + LOG_FLOOR), rtol=0, atol=2e-5)


def test_hopeless_track_reaches_the_floor():
    support = photons(100, 7)
    assert log_likelihood(np.array([[1e4, 1e4, 500.0]]), support) == pytest.approx(20 * np.log(1e-50))


def test_float32_is_close_to_float64():
    hits, support = photons(60, 8), photons(5000, 9)
    assert photon_probabilities(hits, support, dtype=np.float32).dtype == np.float64
    np.testing.assert_allclose(
        log_likelihood(hits, support, dtype=np.float32), log_likelihood(hits, support), rtol=0, atol=1e-3
    )


def test_ragged_tracks_in_every_form():
    kaon, pion = photons(3000, 10), photons(3000, 11) + [3.3125, 0, 0]
    tracks = [photons(n, 20 + n) for n in (1, 7, 30)]
    offsets = np.array([0, 1, 8, 38])
    wanted = [log_likelihood(t, kaon) - log_likelihood(t, pion) for t in tracks]
    np.testing.assert_allclose(delta_log_likelihood(tracks, kaon, pion), wanted, atol=1e-4)
    np.testing.assert_allclose(delta_log_likelihood(iter(tracks), kaon, pion), wanted, atol=1e-4)
    np.testing.assert_allclose(
        delta_log_likelihood((np.concatenate(tracks), offsets), PhotonKDE(kaon), PhotonKDE(pion)), wanted, atol=1e-4
    )


def test_order_of_support_and_hits_does_not_matter():
    rng = np.random.default_rng(12)
    hits, support = photons(50, 13), photons(2000, 14)
    order = rng.permutation(50)
    np.testing.assert_allclose(
        photon_probabilities(hits[order], support[rng.permutation(2000)]),
        photon_probabilities(hits, support)[order],
        rtol=1e-12,
    )


@pytest.mark.parametrize(
    ("hits", "support", "options", "message"),
    [
        (np.zeros((3, 2)), np.zeros((4, 3)), {}, r"hits must have shape \(n, 3\)"),
        (np.zeros((3, 3)), np.zeros((0, 3)), {}, "support is empty"),
        (np.array([[0, np.nan, 0]]), np.zeros((4, 3)), {}, "hits: row 0 is .*finite"),
        (np.zeros((3, 3)), np.full((4, 3), np.inf), {}, "support: row 0"),
        (np.zeros((3, 3)), np.zeros((4, 3)), {"cut": -1}, "cut must be a positive"),
        (np.zeros((3, 3)), np.zeros((4, 3)), {"widths": (1, 0, 1)}, "widths must be three positive"),
        (np.zeros((3, 3)), np.zeros((4, 3)), {"method": "magic"}, "method must be"),
        (np.zeros((3, 3)), np.zeros((4, 3)), {"dtype": np.float16}, "dtype must be float64 or float32"),
        (np.zeros((3, 3)), np.zeros((4, 3)), {"rtol": 0}, "rtol must be"),
    ],
)
def test_hostile_photons(hits, support, options, message):
    with pytest.raises(ValueError, match=message):
        photon_probabilities(hits, support, **options)


def test_hostile_tracks():
    support = photons(10, 1)
    with pytest.raises(ValueError, match="track 1 has no hits"):
        delta_log_likelihood([photons(3, 1), np.zeros((0, 3))], support, support)
    with pytest.raises(ValueError, match="no tracks"):
        delta_log_likelihood([], support, support)
    with pytest.raises(ValueError, match="offsets must rise"):
        delta_log_likelihood((photons(5, 1), np.array([0, 4])), support, support)
