"""
From continuous hit positions, as a decoder makes them, to cells of the calorimeter with at most one hit each.

The rule of OmniJet-alpha_C (arXiv:2501.05534): positions are rounded; of hits in the same cell the one of most energy
stays and the others move along z to the nearest layer that is free. Energies, number and order of the hits are kept.
"""

from typing import NamedTuple

import numpy as np


class VoxelHits(NamedTuple):
    """
    Attributes:
        cells (`np.ndarray` of shape `(hits, 3)`): x, y, z, int64.
        moved: hits that were moved to another layer.
        clipped: hits outside the grid that were put into the outermost cell.
        left: hits that still share a cell because their column has no free layer.
    """

    cells: np.ndarray
    moved: int
    clipped: int
    left: int


def separate_duplicate_hits(
    positions: np.ndarray,
    energy: np.ndarray,
    lengths: np.ndarray,
    grid: tuple[int, int, int] = (30, 30, 30),
    published: bool = False,
) -> VoxelHits:
    """
    Args:
        positions (`np.ndarray` of shape `(hits, 3)`): x, y and z (layer) of the hits of all showers, in cells.
        energy (`np.ndarray` of shape `(hits,)`): MeV.
        lengths (`np.ndarray` of shape `(showers,)`): hits of each shower.
        grid: number of cells in x, in y, and of layers.
        published: what the reference does: only those cells are treated whose number among the sorted distinct cells
            of the shower equals the index of a hit, and then it is the cell of that hit; nothing is bounded by the
            grid. Most duplicates survive.

    Raises:
        ValueError: shapes differ or a position is not finite.
    """
    positions, energy = np.asarray(positions, dtype=np.float64), np.asarray(energy, dtype=np.float64)
    lengths = np.asarray(lengths, dtype=np.int64)
    if positions.shape != (len(energy), 3) or energy.ndim != 1 or lengths.ndim != 1 or lengths.sum() != len(energy):
        raise ValueError(
            f"expected positions (hits, 3), energy (hits,) and lengths that sum to hits, got {positions.shape}, "
            f"{energy.shape} and a sum of {lengths.sum()}"
        )
    ends = np.cumsum(lengths)
    bad = np.flatnonzero(~(np.isfinite(positions).all(axis=1) & np.isfinite(energy)))
    if len(bad):
        row = int(np.searchsorted(ends, bad[0], side="right"))
        raise ValueError(
            f"row {row}: hit {bad[0] - ends[row] + lengths[row]} is at {positions[bad[0]].tolist()} with "
            f"{energy[bad[0]]} MeV, expected finite numbers"
        )
    cells = np.round(positions).astype(np.int64)
    clipped = 0
    if not published:
        inside = np.clip(cells, 0, np.array(grid) - 1)
        clipped = int((inside != cells).any(axis=1).sum())
        cells = inside
    moved = left = 0
    for start, end in zip(ends - lengths, ends, strict=True):
        more, stuck = _separate(cells[start:end], energy[start:end], None if published else grid[2])
        moved, left = moved + more, left + stuck
    return VoxelHits(cells, moved, clipped, left)


def _separate(cells: np.ndarray, energy: np.ndarray, layers: int | None) -> tuple[int, int]:
    """Moves the hits of one shower in place; returns how many, and how many found no layer."""
    distinct, number, counts = np.unique(cells, axis=0, return_inverse=True, return_counts=True)
    number = number.reshape(-1)
    shared = np.flatnonzero(counts > 1)
    if layers is None:  # published: an index of a cell taken for one of a hit
        shared = [cell for cell in dict.fromkeys(number[shared].tolist()) if counts[cell] > 1]
    if len(shared) == 0:
        return 0, 0
    taken = set(map(tuple, distinct.tolist()))
    moved = stuck = 0
    order = np.argsort(number, kind="stable")
    starts = np.concatenate([[0], np.cumsum(counts)])
    for cell in shared:
        hits = order[starts[cell] : starts[cell + 1]]  # in the order of the shower
        x, y, z = distinct[cell].tolist()
        # the nearest layers first, the one behind before the one in front
        reach = layers if layers is not None else len(cells) + 1
        near = (z + sign * step for step in range(1, reach + 1) for sign in (1, -1))
        free = (layer for layer in near if (layers is None or 0 <= layer < layers) and (x, y, layer) not in taken)
        for hit in np.delete(hits, energy[hits].argmax()):
            layer = next(free, None)
            if layer is None:
                stuck += 1
                continue
            taken.add((x, y, layer))
            cells[hit, 2] = layer
            moved += 1
    return moved, stuck
