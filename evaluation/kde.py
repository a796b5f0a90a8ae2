"""Kernel-density log-likelihood of a track's photons against support photons (the PID of arXiv 2505.08736).

With hits h_i and support photons s_j, coordinates (x [mm], y [mm], t [ns]) and kernel widths (3.3125 mm, 3.3125 mm,
0.1 ns, that is one pixel and the time resolution):

    P_i = mean_j exp(-[(dx/w_x)^2 + (dy/w_y)^2 + (dt/w_t)^2])     (no factor 1/2, no normalisation)
    LL  = 20 ln( sum_i P_i + 1e-50 )                                (logarithm of the sum over the hits)
    DLL = LL_kaon - LL_pion

Summing all pairs costs `hits x support`. Here only pairs closer than `cut` kernel widths are summed, which leaves out
less than exp(-cut^2) per hit. Whenever that could change the sum of a track by more than `rtol`, the track is summed
again with radii that follow from the distance of its nearest support photon, so that the bound on the relative
error of sum_i P_i holds for every track: |error of LL| <= 20 rtol. `cut=None` sums every pair.

Pixel detectors allow a second saving: x and y take only pixel-centre values, so the kernel of the pixel distance is
computed once per pair of pixels, and the support photons near one pixel, sorted in time, serve all hits of that pixel.

Measured on one core, 500 tracks of 105 photons at 6 GeV/c and 30 degrees, both species' densities with 104 000 support
photons each: 4.5 ms per track by pixels, 31 ms by the k-d tree, 440 ms for all pairs (20 ms by pixels with 519 000),
all three DLL equal within 1e-9.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from scipy.spatial import cKDTree

KERNEL_WIDTHS = (3.3125, 3.3125, 0.1)
LOG_SCALE = 20.0
LOG_FLOOR = 1e-50
DEFAULT_CUT = 5.0
# Pairs evaluated at once; a block needs about 50 bytes per pair, so memory stays below about 100 MB.
BLOCK_PAIRS = 2_000_000
# exp(-150) = 7e-66: hits farther than that from all support are far below LOG_FLOOR.
_NEGLIGIBLE = 150.0


def _check_photons(photons: np.ndarray, name: str) -> np.ndarray:
    photons = np.asarray(photons, dtype=np.float64)
    if photons.ndim != 2 or photons.shape[1] != 3:
        raise ValueError(f"{name} must have shape (n, 3) with columns x, y [mm], time [ns]; got {photons.shape}")
    bad = np.flatnonzero(~np.isfinite(photons).all(axis=1))
    if len(bad):
        raise ValueError(f"{name}: row {bad[0]} is {photons[bad[0]].tolist()}, expected finite numbers")
    return photons


def _ragged(tracks) -> tuple[np.ndarray, np.ndarray]:
    """Flat hits `(h, 3)` and offsets `(n + 1,)` of `(hits, offsets)`, an object that has both, or a list of arrays."""
    if hasattr(tracks, "hits") and hasattr(tracks, "offsets"):
        tracks = (tracks.hits, tracks.offsets)
    if isinstance(tracks, tuple) and len(tracks) == 2 and np.ndim(tracks[1]) == 1:
        hits, offsets = _check_photons(tracks[0], "hits"), np.asarray(tracks[1], dtype=np.int64)
        if len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != len(hits) or (np.diff(offsets) < 0).any():
            raise ValueError(f"offsets must rise from 0 to the number of hits, {len(hits)}; got {offsets[:8]}")
    else:
        parts = [
            _check_photons(part, f"track {i}") if np.size(part) else np.zeros((0, 3)) for i, part in enumerate(tracks)
        ]
        if not parts:
            raise ValueError("no tracks: the list is empty")
        hits, offsets = np.concatenate(parts), np.concatenate([[0], np.cumsum([len(p) for p in parts])])
    empty = np.flatnonzero(np.diff(offsets) == 0)
    if len(empty):
        raise ValueError(f"track {empty[0]} has no hits: its likelihood is undefined ({len(empty)} such tracks)")
    return hits, offsets


def _blocks(counts: np.ndarray, budget: int) -> list[slice]:
    """Cuts a sequence into slices whose counts add up to at most `budget` (single items may exceed it)."""
    slices, start = [], 0
    total = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    while start < len(counts):
        stop = max(int(np.searchsorted(total, total[start] + budget, side="right")) - 1, start + 1)
        slices.append(slice(start, stop))
        start = stop
    return slices


def _expand(first: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Concatenated `arange(first_i, first_i + counts_i)`."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(first - (ends - counts), counts)


def _segment_sums(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Sums of consecutive segments of the given lengths (zero for empty ones), in float64."""
    sums = np.zeros(len(counts))
    filled = counts > 0
    if filled.any():
        starts = (np.cumsum(counts) - counts)[filled]
        sums[filled] = np.add.reduceat(values, starts, dtype=np.float64)
    return sums


class PhotonKDE:
    """Kernel density of support photons, prepared once and asked for many tracks.

    Args:
        support (`np.ndarray` of shape `(m, 3)`): support photons, x and y in mm, time in ns.
        widths (`tuple` of three floats): kernel widths in mm, mm, ns.
        cut (`float` or `None`): pairs farther apart than this many widths are left out; `None` sums all pairs.
        rtol (`float`): bound on the relative error of the sum over the hits of a track that the cut may cause.
        method (`str`): `"pixels"` (groups hits and support by their exact (x, y)), `"tree"` (k-d tree; needs no
            pixels) or `"auto"`: pixels when the support has at most 20 000 different (x, y).
        dtype: arithmetic of the kernel, float64 or float32; sums and logarithms are float64.
        block_pairs (`int`): pairs evaluated at once, which bounds the memory.
    """

    def __init__(
        self,
        support: np.ndarray,
        widths: Sequence[float] = KERNEL_WIDTHS,
        cut: float | None = DEFAULT_CUT,
        rtol: float = 1e-6,
        method: str = "auto",
        dtype=np.float64,
        block_pairs: int = BLOCK_PAIRS,
    ):
        support = _check_photons(support, "support")
        if not len(support):
            raise ValueError("support is empty: the kernel density needs at least one photon")
        self.widths = np.asarray(widths, dtype=np.float64)
        if self.widths.shape != (3,) or not (self.widths > 0).all():
            raise ValueError(f"widths must be three positive numbers (mm, mm, ns), got {widths}")
        if cut is not None and not cut > 0:
            raise ValueError(f"cut must be a positive number of kernel widths or None, got {cut}")
        if not 0 < rtol < 1:
            raise ValueError(f"rtol must be between 0 and 1, got {rtol}")
        if method not in ("auto", "pixels", "tree"):
            raise ValueError(f"method must be 'auto', 'pixels' or 'tree', got {method!r}")
        self.dtype = np.dtype(dtype)
        if self.dtype not in (np.dtype(np.float64), np.dtype(np.float32)):
            raise ValueError(f"dtype must be float64 or float32, got {self.dtype}")
        if block_pairs < 1:
            raise ValueError(f"block_pairs must be positive, got {block_pairs}")
        self.cut, self.rtol, self.block_pairs = cut, rtol, int(block_pairs)
        self.support = support / self.widths
        self._tree: cKDTree | None = None
        self._pixels = None
        if method != "tree" and cut is not None:
            positions, inverse = np.unique(self.support[:, :2], axis=0, return_inverse=True)
            if method == "pixels" or len(positions) <= 20_000:
                inverse = inverse.ravel()
                order = np.lexsort((self.support[:, 2], inverse))
                starts = np.searchsorted(inverse[order], np.arange(len(positions) + 1))
                self._pixels = (positions, self.support[order, 2], starts)

    def __len__(self) -> int:
        return len(self.support)

    @property
    def tree(self) -> cKDTree:
        if self._tree is None:
            self._tree = cKDTree(self.support)
        return self._tree

    def probabilities(self, hits: np.ndarray) -> np.ndarray:
        """P_i of every hit.

        Args:
            hits (`np.ndarray` of shape `(n, 3)`): x, y [mm], time [ns].

        Returns:
            `np.ndarray` of shape `(n,)`: mean kernel over the support, in [0, 1]; the cut leaves out less than
            exp(-cut^2) of each.
        """
        hits = _check_photons(hits, "hits") / self.widths
        if self.cut is None:
            sums = self._sum_all(hits)
        elif self._pixels is not None:
            sums = self._sum_pixels(hits)
        else:
            sums = self._sum_tree(hits, np.full(len(hits), self.cut))
        return sums / len(self.support)

    def summed_probabilities(self, tracks) -> np.ndarray:
        """sum_i P_i of every track, shape `(n_tracks,)`, to the relative accuracy `rtol`.

        Args:
            tracks: list of arrays `(n_i, 3)`, the pair `(hits (h, 3), offsets (n_tracks + 1,))`, or an object that has
                both as attributes.
        """
        hits, offsets = _ragged(tracks)
        summed = np.add.reduceat(self.probabilities(hits), offsets[:-1])
        if self.cut is None:
            return summed
        counts = np.diff(offsets)
        # Left out by the cut: less than exp(-cut^2) per hit.
        doubtful = np.flatnonzero(counts * np.exp(-(self.cut**2)) > self.rtol * summed)
        if len(doubtful):
            summed[doubtful] = self._sum_adaptive(hits, offsets, doubtful)
        return summed

    def log_likelihood(self, tracks, log_scale: float = LOG_SCALE, floor: float = LOG_FLOOR) -> np.ndarray:
        """LL of every track, shape `(n_tracks,)`; see `summed_probabilities` for the kinds of `tracks`."""
        return log_scale * np.log(self.summed_probabilities(tracks) + floor)

    def _sum_adaptive(self, hits: np.ndarray, offsets: np.ndarray, which: np.ndarray) -> np.ndarray:
        # With d the distance of the nearest pair of the track, sum_i P_i >= exp(-d^2) / m, while pairs beyond
        # r^2 = d^2 + ln(n m / rtol) add at most n exp(-r^2) = rtol exp(-d^2) / m.
        counts = np.diff(offsets)[which]
        rows = _expand(offsets[which], counts)
        scaled = hits[rows] / self.widths
        nearest, _ = self.tree.query(scaled)
        first = np.cumsum(counts) - counts
        closest2 = np.minimum.reduceat(nearest, first) ** 2
        reach2 = closest2 + np.log(counts * (len(self.support) / self.rtol))
        near = np.repeat(closest2 < _NEGLIGIBLE, counts) & (nearest**2 <= np.repeat(reach2, counts))
        sums = np.zeros(len(rows))
        if near.any():
            sums[near] = self._sum_tree(scaled[near], np.sqrt(np.repeat(reach2, counts)[near]))
        return np.add.reduceat(sums, first) / len(self.support)

    def _sum_all(self, hits: np.ndarray) -> np.ndarray:
        support = self.support.astype(self.dtype)
        hits = hits.astype(self.dtype)
        sums = np.zeros(len(hits))
        width = min(len(support), self.block_pairs)
        height = max(self.block_pairs // width, 1)
        for i in range(0, len(hits), height):
            for j in range(0, len(support), width):
                squared = np.zeros((len(hits[i : i + height]), len(support[j : j + width])), self.dtype)
                for axis in range(3):
                    squared += (hits[i : i + height, axis, None] - support[None, j : j + width, axis]) ** 2
                sums[i : i + height] += np.exp(-squared).sum(axis=1, dtype=np.float64)
        return sums

    def _sum_tree(self, hits: np.ndarray, radii: np.ndarray) -> np.ndarray:
        counts = self.tree.query_ball_point(hits, radii, return_length=True)
        sums = np.zeros(len(hits))
        for block in _blocks(counts, self.block_pairs):
            number = counts[block]
            if not number.any():
                continue
            found = self.tree.query_ball_point(hits[block], radii[block], return_sorted=False)
            near = np.concatenate([np.asarray(index, dtype=np.int64) for index in found])
            apart = (self.support[near] - np.repeat(hits[block], number, axis=0)).astype(self.dtype)
            sums[block] = _segment_sums(np.exp(-(apart * apart).sum(axis=1)), number)
        return sums

    def _sum_pixels(self, hits: np.ndarray) -> np.ndarray:
        positions, times, starts = self._pixels
        unique, inverse = np.unique(hits[:, :2], axis=0, return_inverse=True)
        inverse = inverse.ravel()
        order = np.argsort(inverse, kind="stable")
        bounds = np.searchsorted(inverse[order], np.arange(len(unique) + 1))
        neighbours = cKDTree(positions).query_ball_point(unique, self.cut)
        sums = np.zeros(len(hits))
        for number, (here, pixels) in enumerate(zip(unique, neighbours, strict=True)):
            if not pixels:
                continue
            pixels = np.asarray(pixels)
            counts = starts[pixels + 1] - starts[pixels]
            weight = np.repeat(np.exp(-((positions[pixels] - here) ** 2).sum(axis=1)), counts)
            near = times[_expand(starts[pixels], counts)]
            by_time = np.argsort(near, kind="stable")  # a merge of sorted runs
            near, weight = near[by_time], weight[by_time].astype(self.dtype)
            mine = order[bounds[number] : bounds[number + 1]]
            when = hits[mine, 2]
            low, high = np.searchsorted(near, when - self.cut), np.searchsorted(near, when + self.cut, side="right")
            for block in _blocks(high - low, self.block_pairs):
                pairs = (high - low)[block]
                index = _expand(low[block], pairs)
                apart = (near[index] - np.repeat(when[block], pairs)).astype(self.dtype)
                sums[mine[block]] = _segment_sums(np.exp(-(apart * apart)) * weight[index], pairs)
        return sums


def photon_probabilities(hits: np.ndarray, support: np.ndarray, **options) -> np.ndarray:
    """P_i, shape `(n,)`, of hits `(n, 3)` against support photons `(m, 3)`. Options: those of `PhotonKDE`."""
    return PhotonKDE(support, **options).probabilities(hits)


def log_likelihood(
    hits: np.ndarray, support: np.ndarray, log_scale: float = LOG_SCALE, floor: float = LOG_FLOOR, **options
) -> float:
    """LL = `log_scale` ln(sum_i P_i + `floor`) of one track, hits `(n, 3)`. Options: those of `PhotonKDE`."""
    return float(PhotonKDE(support, **options).log_likelihood([hits], log_scale, floor)[0])


def delta_log_likelihood(
    tracks: Iterable[np.ndarray] | tuple[np.ndarray, np.ndarray],
    support_kaon: np.ndarray | PhotonKDE,
    support_pion: np.ndarray | PhotonKDE,
    log_scale: float = LOG_SCALE,
    floor: float = LOG_FLOOR,
    **options,
) -> np.ndarray:
    """LL_kaon - LL_pion of many tracks.

    Args:
        tracks: list of arrays `(n_i, 3)`, the pair `(hits (h, 3), offsets (n_tracks + 1,))`, or `DircTracks`.
        support_kaon, support_pion: support photons `(m, 3)`, or a prepared `PhotonKDE` each.
        options: those of `PhotonKDE`, used where the support is an array.

    Returns:
        `np.ndarray` of shape `(n_tracks,)`: positive = kaon-like.
    """
    tracks = _ragged(list(tracks) if not hasattr(tracks, "hits") and not isinstance(tracks, tuple) else tracks)
    kaon, pion = (
        (s if isinstance(s, PhotonKDE) else PhotonKDE(s, **options)).log_likelihood(tracks, log_scale, floor)
        for s in (support_kaon, support_pion)
    )
    return kaon - pion
