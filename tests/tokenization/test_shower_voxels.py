"""Hits of one cell are moved apart; the published behaviour is compared by the golden set omnijet_c/postprocess."""

import numpy as np
import pytest

from hepzoo.tokenization.shower_voxels import separate_duplicate_hits


def test_the_strongest_stays_and_the_others_move_to_the_nearest_free_layer():
    positions = np.array([[4, 4, 7], [4, 4, 8.4], [4.3, 3.9, 8], [4, 4, 7.6], [9, 9, 8]])
    found = separate_duplicate_hits(positions, np.array([1.0, 2.0, 5.0, 3.0, 1.0]), np.array([5]))
    # layer 9 is free for the first, 7 is taken, so that 10 is the nearest for the second
    assert found.cells[:, 2].tolist() == [7, 9, 8, 10, 8]
    assert (found.moved, found.clipped, found.left) == (2, 0, 0)
    assert len(np.unique(found.cells, axis=0)) == 5


def test_layers_end_at_the_grid():
    positions = np.tile([[2.0, 2.0, 29.2]], (4, 1))
    found = separate_duplicate_hits(positions, np.arange(1.0, 5.0), np.array([4]))
    assert found.cells[:, 2].tolist() == [28, 27, 26, 29]
    full = separate_duplicate_hits(np.tile([[0.0, 0.0, 1.0]], (5, 1)), np.ones(5), np.array([5]), grid=(3, 3, 3))
    assert full.left == 2 and full.moved == 2 and sorted(full.cells[:, 2].tolist()) == [0, 1, 1, 1, 2]


def test_hits_outside_the_grid_are_counted():
    found = separate_duplicate_hits(np.array([[-0.7, 30.2, 5], [3, 3, 3]]), np.ones(2), np.array([2]))
    assert found.clipped == 1 and found.cells.tolist() == [[0, 29, 5], [3, 3, 3]]


def test_showers_do_not_mix():
    rng = np.random.default_rng(0)
    lengths = np.array([200, 0, 150])
    positions, energy = rng.normal([14.5, 14.5, 10], [2, 2, 5], (350, 3)), rng.exponential(1, 350)
    together = separate_duplicate_hits(positions, energy, lengths)
    parts = [separate_duplicate_hits(positions[s], energy[s], [len(energy[s])]) for s in (slice(200), slice(200, None))]
    np.testing.assert_array_equal(together.cells, np.concatenate([p.cells for p in parts]))
    for part in parts:
        assert part.left == 0 and len(np.unique(part.cells, axis=0)) == len(part.cells)
    assert together.moved == sum(p.moved for p in parts) > 0


def test_published_behaviour_leaves_duplicates():
    positions = np.array([[1, 1, 1], [5, 5, 5], [5, 5, 5]])
    assert separate_duplicate_hits(positions, np.ones(3), [3]).moved == 1
    # the shared cell is number 1, and hit 1 is in it
    assert separate_duplicate_hits(positions, np.ones(3), [3], published=True).moved == 1
    # the shared cell is number 0, and hit 0 is alone
    later = np.array([[9, 9, 9], [5, 5, 5], [5, 5, 5]])
    assert separate_duplicate_hits(later, np.ones(3), [3], published=True).moved == 0


@pytest.mark.parametrize(
    ("positions", "energy", "lengths", "message"),
    [
        (np.zeros((3, 2)), np.ones(3), [3], r"expected positions \(hits, 3\)"),
        (np.zeros((3, 3)), np.ones(3), [2], "a sum of 2"),
        (np.array([[0.0, 0, 0], [0, np.nan, 0]]), np.ones(2), [1, 1], "row 1: hit 0 is at"),
        (np.zeros((2, 3)), np.array([1.0, np.inf]), [2], "row 0: hit 1 .* with inf MeV"),
    ],
)
def test_hostile_hits(positions, energy, lengths, message):
    with pytest.raises(ValueError, match=message):
        separate_duplicate_hits(positions, energy, lengths)
