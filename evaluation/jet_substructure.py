"""Exclusive clustering and substructure of many jets at once, vectorised over the jets; no fastjet needed.

Constituents are taken as massless. All arrays are right-padded, shape `(jets, slots)`, with a mask of the real
constituents; `pt` in GeV, `eta` and `phi` in any common frame. Everything is computed in float64.

Sources: exclusive kT and Cambridge/Aachen clustering with nearest neighbours (hep-ph/0512210, arXiv:1111.6097),
winner-takes-all recombination (arXiv:1401.2158), N-subjettiness (arXiv:1011.2268), energy correlators and D2
(arXiv:1305.0007, arXiv:1409.6298). Those of OmniJet (arXiv:2403.05618) are with kT axes, R = 0.8, the E-scheme
and `pseudorapidity=True`.
"""

from typing import NamedTuple

import numpy as np

from hepzoo.tokenization.jet_features import wrap_phi

R = 0.8  # radius of the jets, and of the clustering
ALGORITHMS = ("kt", "ca")
RECOMBINATIONS = ("E", "WTA_pt")
_ELEMENTS = 250_000  # most entries of the distances that are held at a time: 2 MB, about a cache


class Subjets(NamedTuple):
    """Exclusive jets: what clustering leaves when it is stopped at `n` pseudojets.

    Attributes:
        pt, rapidity, phi, mass (`np.ndarray` of shape `(jets, n)`): of the pseudojets, hardest first; NaN where a jet
            has fewer. GeV; phi in (-pi, pi].
        member (`np.ndarray` of shape `(jets, slots)`): number of the pseudojet of every constituent; -1 for padding
            and for what was merged with the beam.
    """

    pt: np.ndarray
    rapidity: np.ndarray
    phi: np.ndarray
    mass: np.ndarray
    member: np.ndarray

    @property
    def pseudorapidity(self) -> np.ndarray:
        """Shape `(jets, n)`. Larger in size than the rapidity where the pseudojet has a mass."""
        transverse_mass = np.hypot(self.pt, self.mass)
        return np.arcsinh(transverse_mass * np.sinh(self.rapidity) / self.pt)


def _check(pt: np.ndarray, eta: np.ndarray, phi: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, ...]:
    arrays = [np.asarray(a, dtype=np.float64) for a in (pt, eta, phi)]
    mask = np.asarray(mask, dtype=bool)
    if mask.ndim != 2 or any(a.shape != mask.shape for a in arrays):
        shapes = ", ".join(str(a.shape) for a in (*arrays, mask))
        raise ValueError(f"pt, eta, phi and mask must have one shape (jets, slots), got {shapes}")
    for name, values, valid in zip(
        ("pt", "eta", "phi"), arrays, (arrays[0] > 0, np.ones_like(mask), np.ones_like(mask)), strict=True
    ):
        wrong = np.argwhere(mask & ~(np.isfinite(values) & valid))
        if len(wrong):
            row, slot = wrong[0]
            wanted = "a positive number of GeV" if name == "pt" else "a finite number"
            raise ValueError(f"jet {row}: {name} of constituent {slot} is {values[row, slot]}, expected {wanted}")
    return *arrays, mask


class _Clustering:
    """State of a batch of jets: their pseudojets in slots, `(jets, slots)`, each with its nearest neighbour.

    No matrix of distances is kept: what is needed of it is computed again, which is faster than its memory.
    """

    def __init__(self, pt, eta, phi, mask, radius: float, algorithm: str, recombination: str):
        self.radius2, self.algorithm, self.recombination = radius**2, algorithm, recombination
        jets, slots = mask.shape
        self.alive = mask.copy()
        self.pt, self.phi = pt.copy(), wrap_phi(phi)
        # an infinite rapidity keeps the empty slots out of reach
        self.rapidity = np.where(mask, eta, np.inf)  # massless: rapidity = eta
        self.mass = np.zeros_like(pt)
        self.p4 = np.stack([pt * np.cos(phi), pt * np.sin(phi), pt * np.sinh(eta), pt * np.cosh(eta)])
        self.label = np.tile(np.arange(slots), (jets, 1))
        # what a constituent was merged into; the extra slot is the beam
        self.parent = np.tile(np.arange(slots + 1), (jets, 1))
        self.neighbour = np.full(mask.shape, -1)
        self.nearest = np.full(mask.shape, np.inf)
        self.find_neighbours(*np.nonzero(mask))

    def distances2(self, jet: np.ndarray, slot: np.ndarray) -> np.ndarray:
        """Squared distances of a pseudojet of every `jet` to all others, shape `(len(jet), slots)`."""
        number = np.arange(len(jet))
        rapidity, phi = self.rapidity[jet], self.phi[jet]
        distance = rapidity - rapidity[number, slot][:, None]
        distance *= distance
        phi -= phi[number, slot][:, None]
        np.abs(phi, out=phi)
        np.minimum(phi, 2 * np.pi - phi, out=phi)
        phi *= phi
        distance += phi
        distance[number, slot] = np.inf
        return distance

    def find_neighbours(self, jet: np.ndarray, slot: np.ndarray) -> None:
        """Sets the nearest neighbour within the radius; -1 = none, which leaves the beam at that distance."""
        step = max(_ELEMENTS // max(self.alive.shape[1], 1), 1)
        for start in range(0, len(jet), step):
            j, s = jet[start : start + step], slot[start : start + step]
            distance = self.distances2(j, s)
            found = distance.argmin(axis=1)
            value = distance[np.arange(len(j)), found]
            self.neighbour[j, s] = np.where(value < self.radius2, found, -1)
            self.nearest[j, s] = np.minimum(value, self.radius2)

    def step(self, jets: int) -> None:
        """Merges the one pair, or pseudojet and beam, of least min(kt_i^2, kt_j^2) dR_ij^2 in the first `jets` jets."""
        jet, near, nearest = np.arange(jets), self.neighbour[:jets], self.nearest[:jets]
        # the smaller kt of the closest pair belongs to the one whose nearest neighbour is the other
        first = (self.pt[:jets] ** 2 * nearest if self.algorithm == "kt" else nearest).argmin(axis=1)
        second = near[jet, first]
        pair = second >= 0
        gone = np.where(pair, second, first)
        beam = self.parent.shape[1] - 1
        self.parent[jet, self.label[jet, gone]] = np.where(pair, self.label[jet, first], beam)
        merged, slot = jet[pair], first[pair]
        self.merge(merged, slot, second[pair])
        self.alive[jet, gone] = False
        self.rapidity[jet, gone] = np.inf
        nearest[jet, gone] = np.inf
        # whose neighbour is no more looks for a new one, and so does the merged pseudojet
        search = (near == gone[:, None]) | (near == np.where(pair, first, gone)[:, None])
        search[merged, slot] = True
        search &= self.alive[:jets]
        # the others may have the merged one as a closer neighbour
        distance = self.distances2(merged, slot)
        row, column = np.nonzero(distance < nearest[merged])
        nearest[merged[row], column] = distance[row, column]
        near[merged[row], column] = slot[row]
        self.find_neighbours(*np.nonzero(search))

    def merge(self, jet: np.ndarray, into: np.ndarray, gone: np.ndarray) -> None:
        """Adds the pseudojets `gone` to those in `into`."""
        if self.recombination == "WTA_pt":
            first, second = self.pt[jet, into], self.pt[jet, gone]
            winner = np.where(second > first, gone, into)
            self.rapidity[jet, into] = self.rapidity[jet, winner]
            self.phi[jet, into] = self.phi[jet, winner]
            self.pt[jet, into] = first + second
            return
        px, py, pz, energy = p4 = self.p4[:, jet, into] + self.p4[:, jet, gone]
        self.p4[:, jet, into] = p4
        pt2 = px * px + py * py
        mass2 = np.maximum((energy + pz) * (energy - pz) - pt2, 0.0)
        # of the large light-cone component, so that nothing cancels
        rapidity = 0.5 * np.log((energy + np.abs(pz)) ** 2 / (pt2 + mass2))
        self.pt[jet, into] = np.sqrt(pt2)
        self.phi[jet, into] = np.arctan2(py, px)
        self.rapidity[jet, into] = np.where(pz < 0, -rapidity, rapidity)
        self.mass[jet, into] = np.sqrt(mass2)

    def compact(self, slots: int) -> None:
        """Moves the pseudojets into the first `slots` slots."""
        order = np.argsort(~self.alive, axis=1, kind="stable")
        place = np.argsort(order, axis=1)
        order = order[:, :slots]
        neighbour = np.take_along_axis(place, np.maximum(self.neighbour, 0), axis=1)
        self.neighbour = np.where(self.neighbour < 0, -1, neighbour)
        for name in ("alive", "pt", "rapidity", "phi", "mass", "label", "neighbour", "nearest"):
            setattr(self, name, np.take_along_axis(getattr(self, name), order, axis=1))
        self.p4 = np.take_along_axis(self.p4, order[None], axis=2)

    def subjets(self, rows: np.ndarray, n: int) -> Subjets:
        """The pseudojets of some jets, at most `n` in each."""
        jets, slots = len(rows), self.parent.shape[1] - 1
        slot = np.argsort(np.where(self.alive[rows], -self.pt[rows], np.inf), axis=1, kind="stable")[:, :n]
        real = np.take_along_axis(self.alive[rows], slot, axis=1)
        found = np.full((4, jets, n), np.nan)
        for target, values in zip(found, (self.pt, self.rapidity, self.phi, self.mass), strict=True):
            target[:, : slot.shape[1]] = np.where(real, np.take_along_axis(values[rows], slot, axis=1), np.nan)
        root = self.parent[rows]
        for _ in range(slots.bit_length()):  # every pass doubles the length of the followed chain
            root = np.take_along_axis(root, root, axis=1)
        number = np.full((jets, slots + 1), -1)
        label = np.take_along_axis(self.label[rows], slot, axis=1)
        np.put_along_axis(number, np.where(real, label, slots), np.arange(slot.shape[1])[None], axis=1)
        number[:, slots] = -1
        return Subjets(*found, np.take_along_axis(number, root[:, :slots], axis=1))


def _cluster(pt, eta, phi, mask, numbers, *options) -> dict[int, Subjets]:
    """Subjets of jets that have their constituents in the first slots, and those with the most come first."""
    jets, slots = mask.shape
    count = mask.sum(axis=1)
    found = {n: Subjets(*np.full((4, jets, n), np.nan), np.full((jets, slots), -1)) for n in numbers}
    state = _Clustering(pt, eta, phi, mask, *options)

    def record(rows: np.ndarray, n: int) -> None:
        for target, values in zip(found[n], state.subjets(rows, n), strict=True):
            target[rows] = values

    for n in numbers:
        record(np.flatnonzero(count <= n), n)
    for left in range(slots - 1, min(numbers) - 1, -1):
        # every jet that has more than `left` pseudojets loses one
        active = int(np.searchsorted(-count, -left, side="left"))
        if active:
            state.step(active)
            if left in found:
                record(np.arange(active), left)
            if left <= 0.75 * state.alive.shape[1]:
                state.compact(left)
    return found


def _batches(count: np.ndarray, power: int) -> list[np.ndarray]:
    """Jet numbers, most constituents first, in batches of at most `_ELEMENTS` entries, constituents^power per jet."""
    order = np.argsort(-count, kind="stable")
    parts, start = [], 0
    while start < len(order):
        size = max(_ELEMENTS // max(int(count[order[start]]), 1) ** power, 1)
        parts.append(order[start : start + size])
        start += len(parts[-1])
    return parts


def _packed(mask: np.ndarray, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    """Mask, arrays and original slots with the real constituents moved to the front."""
    order = np.argsort(~mask, axis=1, kind="stable")
    return tuple(np.take_along_axis(a, order, axis=1) for a in (mask, *arrays)) + (order,)


def exclusive_jets(
    pt: np.ndarray,
    eta: np.ndarray,
    phi: np.ndarray,
    mask: np.ndarray,
    numbers: int | tuple[int, ...] = (1, 2, 3),
    radius: float = R,
    algorithm: str = "kt",
    recombination: str = "E",
) -> dict[int, Subjets]:
    """Clusters the constituents of every jet until the given numbers of pseudojets are left.

    Args:
        pt, eta, phi, mask (`np.ndarray` of shape `(jets, slots)`): constituents; see the module.
        numbers: of pseudojets, each at least 1. Jets with fewer constituents keep them as they are.
        radius (`float`): a pseudojet farther than this from all others is merged with the beam.
        algorithm (`str`): "kt" or "ca" (Cambridge/Aachen). With "ca" all distances to the beam are equal; of several
            pseudojets farther than the radius from all others, which one goes first is not defined.
        recombination (`str`): "E" adds four-momenta; "WTA_pt" adds the pT and keeps the direction of the harder.

    Returns:
        number -> `Subjets`.

    Raises:
        ValueError: shapes differ, a constituent is not finite or has no pT, or an unknown option.
    """
    numbers = (numbers,) if isinstance(numbers, int) else tuple(numbers)
    if not numbers or min(numbers) < 1:
        raise ValueError(f"numbers of exclusive jets must be at least 1, got {numbers}")
    if not 0 < radius < np.inf:
        raise ValueError(f"radius is {radius}, expected a positive number")
    for name, value, known in (
        ("algorithm", algorithm, ALGORITHMS),
        ("recombination", recombination, RECOMBINATIONS),
    ):
        if value not in known:
            raise ValueError(f"unknown {name} {value!r}, expected one of {', '.join(known)}")
    pt, eta, phi, mask = _check(pt, eta, phi, mask)
    jets, slots = mask.shape
    count = mask.sum(axis=1)
    found = {n: Subjets(*np.full((4, jets, n), np.nan), np.full((jets, slots), -1)) for n in numbers}
    packed_mask, *packed, original = _packed(mask, pt, eta, phi)
    for rows in _batches(count, 1):
        width = int(count[rows[0]])
        # padding gets harmless values: pt 1 at the origin, never alive
        valid = packed_mask[rows, :width]
        parts = [np.where(valid, a[rows, :width], fill) for a, fill in zip(packed, (1.0, 0.0, 0.0), strict=True)]
        for n, subjets in _cluster(*parts, valid, numbers, radius, algorithm, recombination).items():
            for target, values in zip(found[n][:4], subjets[:4], strict=True):
                target[rows] = values
            found[n].member[rows[:, None], original[rows, :width]] = subjets.member
    return found


def n_subjettiness(
    pt: np.ndarray,
    eta: np.ndarray,
    phi: np.ndarray,
    mask: np.ndarray,
    subjets: Subjets,
    radius: float = R,
    beta: float = 1.0,
    pseudorapidity: bool = False,
) -> np.ndarray:
    """tau_N = sum pT min_axes dR^beta / sum pT radius^beta, with the pseudojets as axes, shape `(jets,)`.

    Args:
        pseudorapidity (`bool`): distances to the pseudorapidity of the axes, as published. It is not invariant under
            boosts where axes have a mass; the default is their rapidity, as of fastjet-contrib.
    """
    pt, eta, phi, mask = _check(pt, eta, phi, mask)
    along = subjets.pseudorapidity if pseudorapidity else subjets.rapidity
    nearest = np.full(mask.shape, np.inf)
    for axis in range(along.shape[1]):  # one at a time keeps the memory small; fmin skips missing axes
        dphi = wrap_phi(phi - subjets.phi[:, axis, None])
        nearest = np.fmin(nearest, np.hypot(eta - along[:, axis, None], dphi))
    weight = np.where(mask, pt, 0.0)
    total = weight.sum(axis=1)
    # the inner where: an empty jet has no axis, and 0 * inf is not a number
    summed = (weight * np.where(mask, nearest, 0.0) ** beta).sum(axis=1)
    return np.divide(summed, total * radius**beta, out=np.full(len(total), np.nan), where=total > 0)


def energy_correlators(
    pt: np.ndarray, eta: np.ndarray, phi: np.ndarray, mask: np.ndarray, beta: float = 1.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ECF(1), ECF(2), ECF(3) of pT [GeV, GeV^2, GeV^3] and pairwise distances to the power beta, shape `(jets,)` each.

    ECF(3) = sum_{i<j<k} pT_i pT_j pT_k (R_ij R_ik R_jk)^beta is a trace of a cube of a matrix over 6.
    """
    pt, eta, phi, mask = _check(pt, eta, phi, mask)
    count = mask.sum(axis=1)
    found = np.zeros((3, len(count)))
    valid, pt, eta, phi, _ = _packed(mask, pt, eta, phi)
    for rows in _batches(count, 2):
        width = int(count[rows[0]])
        z = np.where(valid[rows, :width], pt[rows, :width], 0.0)
        e, p = (np.where(valid[rows, :width], a[rows, :width], 0.0) for a in (eta, phi))
        matrix = (e[:, :, None] - e[:, None, :]) ** 2 + wrap_phi(p[:, :, None] - p[:, None, :]) ** 2
        matrix = np.sqrt(matrix) if beta == 1 else matrix ** (beta / 2)
        # 0^0 = 1 would let a constituent pair with itself
        matrix[:, np.arange(width), np.arange(width)] = 0.0
        matrix *= z[:, :, None]
        square = matrix @ matrix
        found[0, rows] = z.sum(axis=1)
        found[1, rows] = (matrix * z[:, None, :]).sum(axis=(1, 2)) / 2
        found[2, rows] = (square * matrix.transpose(0, 2, 1)).sum(axis=(1, 2)) / 6
    return found[0], found[1], found[2]


def d2(
    pt: np.ndarray,
    eta: np.ndarray,
    phi: np.ndarray,
    mask: np.ndarray,
    beta: float = 1.0,
    member: np.ndarray | None = None,
) -> np.ndarray:
    """D2 = ECF(3) ECF(1)^3 / ECF(2)^3, shape `(jets,)`; NaN where ECF(2) is 0.

    Args:
        member (`np.ndarray` of shape `(jets, slots)`, *optional*): `Subjets.member` of the exclusive 1-jet, to leave
            out what was merged with the beam.
    """
    mask = np.asarray(mask, dtype=bool) if member is None else np.asarray(mask, dtype=bool) & (member == 0)
    one, two, three = energy_correlators(pt, eta, phi, mask, beta)
    return np.divide(three * one**3, two**3, out=np.full(len(two), np.nan), where=two > 0)


def substructure(
    pt: np.ndarray,
    eta: np.ndarray,
    phi: np.ndarray,
    mask: np.ndarray,
    radius: float = R,
    beta: float = 1.0,
    recombination: str = "E",
    pseudorapidity: bool = False,
) -> dict[str, np.ndarray]:
    """tau1, tau2, tau3 with exclusive kT axes, tau21, tau32 and D2 of every jet, shape `(jets,)` each.

    tau_N is 0 for jets of at most N constituents; a ratio or D2 is NaN where its denominator is 0, and all are NaN for
    jets without constituents. Arguments as those of `exclusive_jets` and `n_subjettiness`; `beta` is also that of D2.
    """
    pt, eta, phi, mask = _check(pt, eta, phi, mask)
    found = {name: np.full(len(pt), np.nan) for name in ("tau1", "tau2", "tau3", "tau21", "tau32", "d2")}
    axes = exclusive_jets(pt, eta, phi, mask, (1, 2, 3), radius, recombination=recombination)
    for n in (1, 2, 3):
        found[f"tau{n}"] = n_subjettiness(pt, eta, phi, mask, axes[n], radius, beta, pseudorapidity)
    # a constituent that is its own axis has a distance of rounding errors only
    count = mask.sum(axis=1)
    for n in (1, 2, 3):
        found[f"tau{n}"][(count > 0) & (count <= n)] = 0.0
    for name, above, below in (("tau21", "tau2", "tau1"), ("tau32", "tau3", "tau2")):
        np.divide(found[above], found[below], out=found[name], where=found[below] > 0)
    found["d2"] = d2(pt, eta, phi, mask, beta, axes[1].member)
    return found
