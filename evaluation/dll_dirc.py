"""Log-likelihood difference of test tracks at fixed kinematics, against support photons at the same kinematics.

The published procedure (arXiv 2505.08736): for every (momentum, theta), support photons of both species with
10 < t < 100 ns; test tracks with 5 < NHits < 250 and no cut on their times; DLL = LL_kaon - LL_pion.
"""

from typing import Any, NamedTuple

import numpy as np

from hepzoo.evaluation.kde import PhotonKDE
from hepzoo.evaluation.tracks_dirc import DircTracks, as_tracks

SUPPORT_TIME = (10.0, 100.0)
HITS_RANGE = (5, 250)


class DllResult(NamedTuple):
    """Scores of the test tracks that were evaluated.

    Attributes:
        tracks: those tracks, in the order of the scores.
        scores (`np.ndarray` of shape `(n,)`): DLL, positive = kaon-like.
        points: one dict per (momentum, theta): tracks and support photons used.
        left_out: reason -> number of test tracks without a score.
    """

    tracks: DircTracks
    scores: np.ndarray
    points: list[dict[str, Any]]
    left_out: dict[str, int]


def split_test_support(tracks: DircTracks, test_tracks: int) -> tuple[DircTracks, DircTracks]:
    """Splits tracks into (test, support): the last `test_tracks` of every species and kinematic point are the test.

    Raises:
        ValueError: a species at a point has no more than `test_tracks` tracks, so that no support would be left.
    """
    test = np.zeros(len(tracks), bool)
    key = np.stack([np.round(tracks.momentum, 3), np.round(tracks.theta, 3), np.abs(tracks.pdg)], axis=1)
    values, group = np.unique(key, axis=0, return_inverse=True)
    group = group.ravel()
    for number, value in enumerate(values):
        index = np.flatnonzero(group == number)
        if len(index) <= test_tracks:
            raise ValueError(
                f"{len(index)} tracks of PDG +-{value[2]:g} at {value[0]:g} GeV/c, {value[1]:g} deg cannot be split "
                f"into {test_tracks} test tracks and support: give fixed-point files, or fewer test tracks"
            )
        test[index[-test_tracks:]] = True
    return tracks.select(test), tracks.select(~test)


def fixed_point_dll(
    test: Any,
    support: Any,
    support_photons: int | None = 500_000,
    support_time: tuple[float, float] | None = SUPPORT_TIME,
    hits_range: tuple[int, int] | None = HITS_RANGE,
    momentum_window: float = 0.01,
    theta_window: float = 0.05,
    progress: bool = False,
    **kde_options,
) -> DllResult:
    """DLL of every test track, against the support at its momentum and angle.

    Args:
        test, support: rows or `DircTracks`. Both need true species; the test may hold any number of points.
        support_photons (`int` or `None`): photons per species and point; the first ones are taken, `None` = all.
        support_time (`tuple` or `None`): open interval of support times in ns that is kept.
        hits_range (`tuple` or `None`): open interval of the yield of test tracks.
        momentum_window [GeV/c], theta_window [deg]: how near (half width) a support track must be.
        progress (`bool`): a bar on stderr.
        kde_options: those of `hepzoo.evaluation.kde.PhotonKDE`.

    Raises:
        ValueError: no test track is left, or a point has no support for a species.
    """
    from tqdm import tqdm

    test, support = as_tracks(test), as_tracks(support)
    for tracks, name in ((test, "test"), (support, "support")):
        bad = np.flatnonzero(~np.isin(np.abs(tracks.pdg), (211, 321)))
        if len(bad):
            raise ValueError(f"{name} row {bad[0]}: PDG is {tracks.pdg[bad[0]]}, expected +-211 or +-321")
    left_out = {}
    if hits_range is not None:
        inside = (test.num_hits > hits_range[0]) & (test.num_hits < hits_range[1])
        left_out[f"yield not in {hits_range[0]} < NHits < {hits_range[1]}"] = int((~inside).sum())
        test = test.select(inside)
    if not len(test):
        raise ValueError("no test track is left after the cut on the yield")
    key = np.stack([np.round(test.momentum, 3), np.round(test.theta, 3)], axis=1)
    values, group = np.unique(key, axis=0, return_inverse=True)
    group = group.ravel()
    if len(values) > 2000:
        raise ValueError(
            f"the test tracks have {len(values)} different (momentum, theta): the likelihood needs fixed points "
            "(make tracks at fixed momentum and theta)"
        )
    scores, points = np.full(len(test), np.nan), []
    for number, (momentum, theta) in enumerate(tqdm(values, desc="DLL", unit="point", disable=not progress)):
        near = support.at(
            (momentum - momentum_window, momentum + momentum_window), (theta - theta_window, theta + theta_window)
        )
        densities = {}
        for species in ("kaon", "pion"):
            photons = near.species(species).hits
            if support_time is not None:
                photons = photons[(photons[:, 2] > support_time[0]) & (photons[:, 2] < support_time[1])]
            if not len(photons):
                raise ValueError(
                    f"no {species} support photon within {momentum_window:g} GeV/c and {theta_window:g} deg of "
                    f"{momentum:g} GeV/c, {theta:g} deg"
                )
            densities[species] = PhotonKDE(photons[:support_photons], **kde_options)
        index = np.flatnonzero(group == number)
        here = test.select(index)
        scores[index] = densities["kaon"].log_likelihood(here) - densities["pion"].log_likelihood(here)
        points.append(
            {
                "momentum": float(momentum),
                "theta": float(theta),
                "test_tracks": len(index),
                "support_kaon": len(densities["kaon"]),
                "support_pion": len(densities["pion"]),
            }
        )
    return DllResult(test, scores, points, left_out)
