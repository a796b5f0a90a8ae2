"""Z-order (Morton) and Hilbert curves through a three-dimensional lattice, vectorised."""

import numpy as np


def z_order_codes(coordinates: np.ndarray, bits: int = 16) -> np.ndarray:
    """Positions on the z-order curve.

    Args:
        coordinates: integers in 0..2**bits - 1, shape (points, axes); bits * axes at most 63.
        bits: per axis.

    Returns:
        int64 (points,): the bits of the axes interleaved, those of the first axis highest.

    Raises:
        ValueError: a wrong shape, or a coordinate out of range.
    """
    return _interleave(_checked(coordinates, bits), bits)


def hilbert_codes(coordinates: np.ndarray, bits: int = 16) -> np.ndarray:
    """Positions on the Hilbert curve, where neighbours in position are neighbours in the lattice.

    The transform between axes and the transposed index is that of J. Skilling, AIP Conf. Proc. 707, 381 (2004).

    Args, returns, raises: as `z_order_codes`.
    """
    axes = _checked(coordinates, bits).T.copy()
    # From the highest bit down: undo the excess work, that is reflect and swap lower bits with those of the first axis.
    for shift in range(bits - 1, 0, -1):
        high = np.int64(1) << shift
        low = high - 1
        for axis in axes:
            is_set = (axis & high) != 0
            exchanged = np.where(is_set, 0, (axes[0] ^ axis) & low)
            axes[0] ^= np.where(is_set, low, exchanged)
            axis ^= exchanged
    # Gray encoding
    for previous, axis in zip(axes[:-1], axes[1:], strict=True):
        axis ^= previous
    flips = np.zeros_like(axes[0])
    for shift in range(bits - 1, 0, -1):
        high = np.int64(1) << shift
        flips ^= np.where((axes[-1] & high) != 0, high - 1, 0)
    return _interleave((axes ^ flips).T, bits)


def _interleave(coordinates: np.ndarray, bits: int) -> np.ndarray:
    codes = np.zeros(len(coordinates), dtype=np.int64)
    for shift in range(bits - 1, -1, -1):
        for axis in coordinates.T:
            codes = (codes << 1) | ((axis >> shift) & 1)
    return codes


def _checked(coordinates: np.ndarray, bits: int) -> np.ndarray:
    coordinates = np.asarray(coordinates)
    if coordinates.ndim != 2 or coordinates.dtype.kind not in "iu" or not 1 <= bits * coordinates.shape[1] <= 63:
        raise ValueError(
            f"coordinates must be integers of shape (points, axes) with bits * axes at most 63, got "
            f"{coordinates.dtype} {coordinates.shape} and bits {bits}"
        )
    bad = (coordinates < 0) | (coordinates >= 2**bits)
    if bad.any():
        point, axis = np.argwhere(bad)[0]
        raise ValueError(
            f"point {point}, axis {axis}: coordinate {coordinates[point, axis]} is outside 0..{2**bits - 1}"
        )
    return coordinates.astype(np.int64)
