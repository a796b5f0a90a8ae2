"""Embedded simulator of a high-performance DIRC: charged pions and kaons -> detected Cherenkov photons.

A track crosses one fused-silica bar; its Cherenkov light travels by total internal reflection to the end of the bar,
through a focusing lens and a prism, onto a plane of multi-anode PMTs. Geometry is solved in closed form (method of
images), so thousands of tracks per second run on one core. No trained network and no external data enter. The physics,
its constants and limits: docs/simulate_dirc.md.
"""

import argparse
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
from tqdm import tqdm

from hepzoo.data_scripts.dirc_optics import (
    ELECTRON_MASS,
    FINE_STRUCTURE,
    PARTICLE_MASSES,
    SPEED_OF_LIGHT,
    DircDetector,
    cherenkov_angle,
    expected_photon_yield,
    focus,
    frank_tamm_yield,
    group_index,
    refractive_index,
    threshold_momentum,
    trace_bar,
    trace_prism,
    velocity,
)
from hepzoo.data_scripts.worker_processes import run_jobs

__all__ = [
    "DircDetector",
    "SimulationStats",
    "cherenkov_angle",
    "expected_photon_yield",
    "frank_tamm_yield",
    "group_index",
    "iter_tracks",
    "refractive_index",
    "simulate_tracks",
    "species_codes",
    "threshold_momentum",
    "velocity",
]

CHUNK_TRACKS = 500  # part of the random-number scheme: another value gives other tracks
METHODS = ("Pion", "Kaon", "MixPiK")
_SCATTERING_STEPS = 8
_MAX_REDRAWS = 200
_MIN_DELTA_ENERGY = 0.25e-3  # GeV; knock-on electrons radiate above 0.19 MeV
_DELTA_SCATTERING = 0.5  # rad per projection; electrons of about 1 MeV lose their direction within a millimetre
_SILICA_DENSITY = 2.2  # g/cm3


@dataclass
class SimulationStats:
    """Fate of the photons, counted. `emitted` are those that the sensors would count if all of them arrived.

    `emitted` = `not_reflected` + `absorbed` + `outside_lens` + `missed` + `outside_window` + `detected`.
    """

    tracks: int = 0
    redrawn: int = 0  # tracks without a single hit, whose photons were drawn again
    emitted: int = 0
    not_reflected: int = 0  # beyond total internal reflection, in the bar or the prism
    absorbed: int = 0  # bulk, surfaces and mirror
    outside_lens: int = 0  # left through the sides of the lens
    missed: int = 0  # gaps between PMTs and outside the plane
    outside_window: int = 0  # arrival time
    detected: int = 0

    def add(self, other: "SimulationStats") -> None:
        """Adds the counts of another run."""
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)


def species_codes(num_tracks: int, method: str, seed: int = 0) -> np.ndarray:
    """PDG codes of a sample, int32: all 211, all 321, or exact halves in random order.

    Args:
        num_tracks: how many.
        method: "Pion", "Kaon" or "MixPiK"; an odd mixture has one pion more.
        seed: of the order.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    codes = np.full(num_tracks, 321 if method == "Kaon" else 211, dtype=np.int32)
    if method == "MixPiK":
        codes[: num_tracks // 2] = 321
        np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(0,))).shuffle(codes)
    return codes


def simulate_tracks(
    num_tracks: int,
    pdg: "int | np.typing.ArrayLike" = 211,
    momentum: "float | tuple[float, float] | np.typing.ArrayLike" = (1.0, 10.0),
    theta: "float | tuple[float, float] | np.typing.ArrayLike" = (25.0, 160.0),
    seed: int = 0,
    detector: DircDetector | None = None,
    stats: SimulationStats | None = None,
) -> dict[str, np.ndarray | list[np.ndarray]]:
    """Simulates tracks and returns the columns of the DIRC record.

    The same arguments give the same tracks, whatever the number of processes. Tracks are made in chunks of 500, each
    with random streams of its own, so that a longer run starts with the same whole chunks. Photons of a track without
    any hit are drawn again for the same kinematics (counted in `stats.redrawn`), so every row has hits.

    Args:
        num_tracks: rows to return.
        pdg: +-211 or +-321, one for all or one per track.
        momentum: GeV/c; a number for all, a tuple (low, high) for uniform draws, or a list or array per track.
        theta: polar angle, degrees, likewise.
        seed: non-negative integer.
        detector: constants; default `DircDetector()`.
        stats: counters to be increased.

    Returns:
        P, Theta, Phi (float32), PDG, NHits (int32), shape (num_tracks,), and lists of per-track arrays pmtID, pixelID
        (int16), channel (int32), leadTime (ns), x, y (mm, pixel centres; float32). Hits are not ordered in time.

    Raises:
        ValueError: an argument out of range, or tracks that give no light (below the Cherenkov threshold).
    """
    chunks = list(iter_tracks(num_tracks, pdg, momentum, theta, seed, detector, stats))
    columns = {}
    for name in chunks[0]:
        parts = [chunk[name] for chunk in chunks]
        lists = isinstance(parts[0], list)
        columns[name] = [row for part in parts for row in part] if lists else np.concatenate(parts)
    return columns


def iter_tracks(
    num_tracks: int,
    pdg: "int | np.typing.ArrayLike" = 211,
    momentum: "float | tuple[float, float] | np.typing.ArrayLike" = (1.0, 10.0),
    theta: "float | tuple[float, float] | np.typing.ArrayLike" = (25.0, 160.0),
    seed: int = 0,
    detector: DircDetector | None = None,
    stats: SimulationStats | None = None,
    processes: int = 1,
) -> Iterator[dict[str, np.ndarray | list[np.ndarray]]]:
    """`simulate_tracks` as a stream of chunks of at most 500 tracks, with constant memory.

    Args:
        processes: worker processes; the tracks do not depend on it.
        others: see `simulate_tracks`.

    Raises:
        ValueError: as `simulate_tracks`, before the first chunk where possible; a worker process died.
    """
    detector = DircDetector() if detector is None else detector
    for name, value, lowest in (("num_tracks", num_tracks, 1), ("seed", seed, 0), ("processes", processes, 1)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < lowest:
            raise ValueError(f"{name} must be an integer of at least {lowest}, got {value!r}")
    codes = _checked_column("pdg", pdg, num_tracks)
    bad = np.flatnonzero(~np.isin(np.abs(codes), list(PARTICLE_MASSES)))
    if bad.size:
        raise ValueError(
            f"pdg of track {bad[0]} must be one of +-211, +-321, got {np.broadcast_to(codes, num_tracks)[bad[0]]:g}"
        )
    momentum = _checked_quantity("momentum", momentum, num_tracks, (0.0, 1000.0), "GeV/c")
    theta = _checked_quantity("theta", theta, num_tracks, detector.theta_range_deg, "deg")

    def jobs():
        for chunk, start in enumerate(range(0, num_tracks, CHUNK_TRACKS)):
            rows = slice(start, min(start + CHUNK_TRACKS, num_tracks))
            size = rows.stop - rows.start
            parts = [
                part if isinstance(part, tuple) or part.ndim == 0 else part[rows] for part in (codes, momentum, theta)
            ]
            yield int(seed), chunk, size, *parts, detector

    # A generator of its own, so that the checks above run at the call and not at the first chunk.
    return _counted(run_jobs(_simulate_chunk, jobs(), min(processes, -(-num_tracks // CHUNK_TRACKS))), stats)


def _counted(results, stats: SimulationStats | None):
    for columns, counts in results:
        if stats is not None:
            stats.add(counts)
        yield columns


def _checked_column(name: str, values, num_tracks: int) -> np.ndarray:
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be numbers, got {values!r:.80}") from None
    if array.ndim > 1 or (array.ndim == 1 and len(array) != num_tracks):
        raise ValueError(f"{name} must be one number or {num_tracks} of them, got shape {array.shape}")
    return array


def _checked_quantity(name: str, values, num_tracks: int, limits: tuple[float, float], unit: str):
    """A scalar, a range (tuple of two) or a column, inside `limits` (the lower one excluded when it is 0)."""
    if isinstance(values, tuple):
        if len(values) != 2:
            raise ValueError(f"{name} as a tuple must be (low, high), got {values!r:.80}")
        ends = _checked_column(name, values, 2)
        if not ends[0] <= ends[1]:
            raise ValueError(f"{name} must be (low, high) with low <= high, got {values!r:.80}")
        array, place = ends, "{name}"
    else:
        array = _checked_column(name, values, num_tracks)
        place = "{name} of track {row}" if array.ndim else "{name}"
    flat = np.atleast_1d(array)
    bad = np.flatnonzero(~((flat >= limits[0]) & (flat <= limits[1]) & (flat > 0)))
    if bad.size:
        where = place.format(name=name, row=bad[0])
        raise ValueError(f"{where} must be in {limits[0]:g}..{limits[1]:g} {unit}, got {flat[bad[0]]:g}")
    return (float(array[0]), float(array[1])) if isinstance(values, tuple) else array


def _simulate_chunk(job) -> tuple[dict, SimulationStats]:
    """One chunk: kinematics from one random stream, photons from another."""
    seed, chunk, size, codes, momentum, theta, detector = job
    kinematics = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(1, chunk)))
    photons = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(2, chunk)))
    # Both are always drawn, so that fixing one quantity leaves the other unchanged. float32 first: what is recorded
    # is exactly what was simulated.
    drawn = kinematics.random((2, size))
    P, Theta = (
        (
            values[0] + (values[1] - values[0]) * u if isinstance(values, tuple) else np.broadcast_to(values, size)
        ).astype(np.float32)
        for values, u in zip((momentum, theta), drawn, strict=True)
    )
    PDG = np.broadcast_to(codes, size).astype(np.int32)

    stats = SimulationStats(tracks=size)
    pending = np.arange(size)
    found = []
    for _ in range(_MAX_REDRAWS):
        track, *hits = _detected_photons(P[pending], Theta[pending], PDG[pending], photons, detector, stats)
        found.append((pending[track], *hits))
        pending = np.setdiff1d(pending, pending[track])
        if not pending.size:
            break
        stats.redrawn += len(pending)
    else:
        row = pending[0]
        raise ValueError(
            f"track {chunk * CHUNK_TRACKS + row} gives no detected photon in {_MAX_REDRAWS} attempts "
            f"(PDG {PDG[row]}, momentum {P[row]:g} GeV/c, theta {Theta[row]:g} deg): "
            "too close to the Cherenkov threshold"
        )
    track, pmt, pixel, time = (np.concatenate(parts) for parts in zip(*found, strict=True))
    order = np.argsort(track, kind="stable")
    counts = np.bincount(track, minlength=size)
    x, y = detector.geometry.pixel_center(pmt, pixel)
    hits = {
        "pmtID": pmt.astype(np.int16),
        "pixelID": pixel.astype(np.int16),
        "channel": detector.geometry.channel(pmt, pixel).astype(np.int32),
        "leadTime": time.astype(np.float32),
        "x": x.astype(np.float32),
        "y": y.astype(np.float32),
    }
    columns = {"P": P, "Theta": Theta, "Phi": np.zeros(size, np.float32), "PDG": PDG, "NHits": counts.astype(np.int32)}
    ends = np.cumsum(counts)[:-1]
    columns |= {name: np.split(values[order], ends) for name, values in hits.items()}
    return columns, stats


def _detected_photons(P, Theta, PDG, rng, detector: DircDetector, stats: SimulationStats):
    """Hits of the given tracks: (track, pmt, pixel, time), each of shape (hits,)."""
    segments = _track_segments(P.astype(np.float64), np.radians(Theta.astype(np.float64)), PDG, rng, detector)
    segment, wavelength, index, cos_cherenkov = _emitted_photons(segments, rng, detector)
    stats.emitted += len(segment)
    point, direction, time = _emission_geometry(segments, segment, cos_cherenkov, rng)
    track = segments["track"][segment]
    # Knock-on electrons near a face would leave the bar; their light is kept and emitted at the face.
    half = detector.bar_thickness / 2
    point[:, 1] = np.clip(point[:, 1], -half, half)
    point[:, 0] = np.clip(point[:, 0], -detector.bar_width / 2, detector.bar_width / 2)
    point[:, 2] = np.clip(point[:, 2], detector.mirror_z, detector.readout_z)

    # Total internal reflection on all four faces: the angles to them never change along the bar.
    critical = np.sqrt(np.maximum(1 - (detector.outside_index / index) ** 2, 0))
    keep = (np.abs(direction[:, 0]) < critical) & (np.abs(direction[:, 1]) < critical)
    stats.not_reflected += int((~keep).sum())
    track, wavelength, index, time, point, direction = (
        values[keep] for values in (track, wavelength, index, time, point, direction)
    )

    x, y, out, path, bounces_x, bounces_y = trace_bar(*point.T, direction, detector)
    attenuation = path / (detector.attenuation_length * (wavelength / detector.attenuation_wavelength) ** 4)
    roughness = (4 * np.pi * detector.surface_roughness * index / wavelength) ** 2
    attenuation += roughness * (bounces_x * direction[:, 0] ** 2 + bounces_y * direction[:, 1] ** 2)
    survival = np.exp(-attenuation) * np.where(direction[:, 2] > 0, 1, detector.mirror_reflectivity)
    keep = rng.random(len(track)) < survival
    stats.absorbed += int((~keep).sum())
    track, wavelength, index, time, x, y, out, path = (
        values[keep] for values in (track, wavelength, index, time, x, y, out, path)
    )

    slope_x, slope_y, keep = focus(x, y, out, detector)
    stats.outside_lens += int((~keep).sum())
    track, wavelength, index, time, x, y, out, path, slope_x, slope_y = (
        values[keep] for values in (track, wavelength, index, time, x, y, out, path, slope_x, slope_y)
    )
    tan_squared = (1 - out[:, 2] ** 2) / out[:, 2] ** 2
    # Very steep rays are far outside the paraxial picture; the blur is limited to that of a 45 degree ray.
    blur = np.hypot(detector.lens_blur, detector.lens_field_blur * np.minimum(tan_squared, 1)) / detector.focal_length
    slope_x = slope_x + blur * rng.standard_normal(len(track))
    slope_y = slope_y + blur * rng.standard_normal(len(track))
    path = path + detector.lens_thickness / out[:, 2]
    x, y, prism_path, total = trace_prism(x, y, slope_x, slope_y, index, detector)
    time = time + (path + prism_path) * group_index(wavelength) / SPEED_OF_LIGHT
    time = time + detector.time_resolution * rng.standard_normal(len(track))

    pmt, pixel = detector.geometry.find_pixel(x, y)
    on_pixel = total & (pmt >= 0)
    # As float32, the precision in which times are stored: the window then holds for what is written.
    time = time.astype(np.float32)
    inside = (time > detector.time_window[0]) & (time < detector.time_window[1])
    stats.not_reflected += int((~total).sum())
    stats.missed += int((total & (pmt < 0)).sum())
    stats.outside_window += int((on_pixel & ~inside).sum())
    keep = on_pixel & inside
    stats.detected += int(keep.sum())
    return track[keep], pmt[keep], pixel[keep], time[keep]


def _track_segments(P, theta, PDG, rng, detector: DircDetector) -> dict[str, np.ndarray]:
    """Straight radiating paths: one per track, then one per knock-on electron.

    Returns:
        track (index), beta, length (mm), start (n, 3), axis (n, 3), time (ns, at the start), scattering (n, steps, 2):
        angles of the axis along the path in two projections, rad.
    """
    size = len(P)
    mass = np.where(np.abs(PDG) == 321, PARTICLE_MASSES[321], PARTICLE_MASSES[211])
    beta = velocity(P, mass)
    tilt = detector.angular_resolution * rng.standard_normal((2, size))
    polar = theta + tilt[0]
    axis = np.stack([np.sin(polar) * np.sin(tilt[1]), np.sin(polar) * np.cos(tilt[1]), np.cos(polar)], axis=1)
    length = detector.bar_thickness / axis[:, 1]
    start = np.empty((size, 3))
    start[:, 0] = detector.track_x + detector.track_x_spread * (rng.random(size) - 0.5)
    start[:, 1] = -detector.bar_thickness / 2
    # Tracks that would pass beside an end of the bar are moved along it until they cross it.
    run = axis[:, 2] * length
    start[:, 2] = np.clip(
        detector.bar_radius / np.tan(theta),
        detector.mirror_z - np.minimum(run, 0),
        detector.readout_z - np.maximum(run, 0),
    )
    scattering = np.zeros((size, _SCATTERING_STEPS, 2))
    if detector.multiple_scattering:
        depth = length / detector.radiation_length
        # Highland's width for the whole path, spread over the steps as a random walk.
        width = 13.6e-3 / (beta * P) * np.sqrt(depth) * (1 + 0.038 * np.log(depth))
        steps = rng.standard_normal(scattering.shape) * (width / np.sqrt(_SCATTERING_STEPS))[:, None, None]
        scattering = np.cumsum(steps, axis=1) - steps / 2
    segments = {
        "track": np.arange(size),
        "beta": beta,
        "length": length,
        "start": start,
        "axis": axis,
        "time": np.zeros(size),
        "scattering": scattering,
    }
    if not detector.delta_rays:
        return segments
    electrons = _delta_rays(segments, P, mass, rng)
    return {name: np.concatenate([values, electrons[name]]) for name, values in segments.items()}


def _delta_rays(segments: dict[str, np.ndarray], P, mass, rng) -> dict[str, np.ndarray]:
    """Knock-on electrons above the Cherenkov threshold, spectrum (1 - beta^2 T/Tmax) / T^2 (Rossi; PDG review,
    passage of particles through matter), ranges of Katz and Penfold, and half of the energy for their velocity."""
    beta, length = segments["beta"], segments["length"]
    gamma = 1 / np.sqrt(1 - beta**2)
    ratio = ELECTRON_MASS / mass
    maximum = 2 * ELECTRON_MASS * (beta * gamma) ** 2 / (1 + 2 * gamma * ratio + ratio**2)
    maximum = np.maximum(maximum, _MIN_DELTA_ENERGY)
    # 0.1535 MeV cm2/g times Z/A = 1/2 and the density, in GeV/mm.
    strength = 0.1535e-3 * 0.5 * _SILICA_DENSITY / 10
    mean = strength * length / beta**2 * (1 / _MIN_DELTA_ENERGY - 1 / maximum)
    parent = np.repeat(np.arange(len(beta)), rng.poisson(mean))
    count = len(parent)
    top = maximum[parent]
    energy = 1 / (1 / _MIN_DELTA_ENERGY - rng.random(count) * (1 / _MIN_DELTA_ENERGY - 1 / top))
    keep = rng.random(count) < 1 - beta[parent] ** 2 * energy / top
    parent, energy, top = parent[keep], energy[keep], top[keep]
    count = len(parent)

    cos_angle = np.sqrt(energy * (top + 2 * ELECTRON_MASS) / (top * (energy + 2 * ELECTRON_MASS)))
    azimuth = 2 * np.pi * rng.random(count)
    first, second = _transverse(segments["axis"][parent])
    sin_angle = np.sqrt(np.maximum(1 - cos_angle**2, 0))
    axis = cos_angle[:, None] * segments["axis"][parent]
    axis += sin_angle[:, None] * (np.cos(azimuth)[:, None] * first + np.sin(azimuth)[:, None] * second)
    mega = energy * 1e3
    # Katz and Penfold, in g/cm2 with T in MeV, up to 2.5 MeV; linear above.
    low = 0.412 * mega ** (1.265 - 0.0954 * np.log(np.minimum(mega, 2.5)))
    reach = np.where(mega < 2.5, low, 0.530 * mega - 0.106) / _SILICA_DENSITY * 10
    origin = rng.random(count) * length[parent]
    # Above the threshold only: the last 0.19 MeV of range are dark. Never longer than what is left of the bar.
    bright = np.minimum(np.maximum(reach - 0.2, 0.05), np.maximum(length[parent] - origin, 0.05))
    total = energy / 2 + ELECTRON_MASS
    energetic = np.maximum(total, 0.19e-3 + ELECTRON_MASS)
    scattering = rng.standard_normal((count, _SCATTERING_STEPS, 2))
    # The direction of an energetic electron survives longer: the angle falls with its momentum.
    width = np.minimum(_DELTA_SCATTERING, _DELTA_SCATTERING * 2e-3 / energy)
    return {
        "track": parent,
        "beta": np.sqrt(1 - (ELECTRON_MASS / energetic) ** 2),
        "length": bright,
        "start": segments["start"][parent] + segments["axis"][parent] * origin[:, None],
        "axis": axis,
        "time": origin / (beta[parent] * SPEED_OF_LIGHT),
        "scattering": scattering * width[:, None, None],
    }


def _emitted_photons(segments, rng, detector: DircDetector):
    """Draws photons by the Frank-Tamm formula, thinned by the detection efficiency before anything is traced.

    Returns:
        segment, wavelength (nm), index and cos(theta_C), each of shape (photons,).
    """
    cumulative, integral = detector.wavelength_sampling
    beta = segments["beta"]
    # An upper bound of sin^2 over the band (n falls with the wavelength), corrected photon by photon.
    bound = np.maximum(1 - 1 / (beta * refractive_index(detector.wavelength_range[0])) ** 2, 0)
    mean = 2 * np.pi * FINE_STRUCTURE * integral * segments["length"] * bound
    segment = np.repeat(np.arange(len(beta)), rng.poisson(mean))
    wavelength = np.interp(rng.random(len(segment)), cumulative, detector.wavelengths)
    index = refractive_index(wavelength)
    cos_cherenkov = 1 / (beta[segment] * index)
    keep = rng.random(len(segment)) * bound[segment] < 1 - cos_cherenkov**2
    return segment[keep], wavelength[keep], index[keep], cos_cherenkov[keep]


def _emission_geometry(segments, segment, cos_cherenkov, rng):
    """Emission points (n, 3), directions (n, 3) and times (n,) of photons on the cone of their segment."""
    count = len(segment)
    fraction = rng.random(count)
    run = fraction * segments["length"][segment]
    axis = segments["axis"][segment]
    point = segments["start"][segment] + axis * run[:, None]
    time = segments["time"][segment] + run / (segments["beta"][segment] * SPEED_OF_LIGHT)
    bend = segments["scattering"][segment, (fraction * _SCATTERING_STEPS).astype(np.int64)]
    first, second = _transverse(axis)
    axis = axis + bend[:, :1] * first + bend[:, 1:] * second
    axis /= np.linalg.norm(axis, axis=1, keepdims=True)
    first, second = _transverse(axis)
    azimuth = 2 * np.pi * rng.random(count)
    sin_cherenkov = np.sqrt(np.maximum(1 - cos_cherenkov**2, 0))
    direction = cos_cherenkov[:, None] * axis
    direction += (sin_cherenkov * np.cos(azimuth))[:, None] * first
    direction += (sin_cherenkov * np.sin(azimuth))[:, None] * second
    return point, direction, time


def _transverse(axis: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two unit vectors perpendicular to each unit vector of `axis` (n, 3) and to each other."""
    # The helper axis is x unless the vector is close to it, then z.
    helper = np.where(np.abs(axis[:, :1]) < 0.9, np.array([[1.0, 0.0, 0.0]]), np.array([[0.0, 0.0, 1.0]]))
    first = helper - (helper * axis).sum(axis=1, keepdims=True) * axis
    first /= np.linalg.norm(first, axis=1, keepdims=True)
    return first, np.cross(axis, first)


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def parse_range(text: str) -> float | tuple[float, float]:
    """`"6"` -> 6.0, `"1-10"` -> (1.0, 10.0)."""
    parts = text.split("-")
    try:
        numbers = tuple(float(part) for part in parts)
    except ValueError:
        numbers = ()
    if len(numbers) not in (1, 2):
        raise argparse.ArgumentTypeError(f"expected a number or LOW-HIGH, got {text!r}")
    return numbers[0] if len(numbers) == 1 else numbers


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="hepzoo simulate dirc",
        description="Simulate pions and kaons in a high-performance DIRC and write sharded Parquet.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=textwrap.dedent(
            """\
            examples:
              python data_scripts/simulate_dirc.py --output data/dirc --n_tracks 10000 --method MixPiK
              python data_scripts/simulate_dirc.py --output data/fixed --n_tracks 2000 --method Kaon \\
                  --momentum 6 --theta 30 --seed 7 --split test
            read back:
              datasets.load_dataset("parquet", data_files="data/dirc/train-*.parquet", streaming=True)
            """
        ),
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the Parquet files")
    parser.add_argument("--n_tracks", type=int, default=10000, help="tracks to write (default: %(default)s)")
    parser.add_argument("--method", choices=METHODS, default="MixPiK", help="species; MixPiK is exact halves, shuffled")
    parser.add_argument("--momentum", type=parse_range, default="1-10", help='GeV/c, "6" or "1-10" (uniform)')
    parser.add_argument("--theta", type=parse_range, default="25-160", help='polar angle, degrees, "30" or "25-160"')
    parser.add_argument(
        "--seed", type=int, default=0, help="the same seed gives the same tracks (default: %(default)s)"
    )
    parser.add_argument("--split", default="train", help="name of the split (default: %(default)s)")
    parser.add_argument("--rows_per_shard", type=int, default=5000, help="tracks per file (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=1, help="worker processes; does not change the tracks")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing split")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    args = build_parser().parse_args(argv)
    # Here, so that the worker processes start without the data-set libraries.
    from hepzoo.data_scripts.dirc_schema import DIRC_FEATURES
    from hepzoo.data_scripts.shards import ShardWriter

    stats = SimulationStats()
    try:
        if args.seed < 0 or args.n_tracks < 1:
            name, value = ("seed", args.seed) if args.seed < 0 else ("n_tracks", args.n_tracks)
            raise ValueError(f"{name} must be at least {0 if name == 'seed' else 1}, got {value}")
        codes = species_codes(args.n_tracks, args.method, args.seed)
        chunks = iter_tracks(
            args.n_tracks, codes, args.momentum, args.theta, args.seed, stats=stats, processes=args.processes
        )
        writer = ShardWriter(
            args.output, DIRC_FEATURES, args.split, rows_per_shard=args.rows_per_shard, overwrite=args.overwrite
        )
        with writer, tqdm(total=args.n_tracks, unit="track", desc="simulate") as bar:
            for columns in chunks:
                writer.write(columns)
                bar.update(len(columns["P"]))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        f"{stats.tracks} tracks, {stats.detected / stats.tracks:.1f} hits per track, {len(writer.paths)} file(s) in "
        f"{args.output}; {stats.outside_window} hits outside the time window dropped, {stats.redrawn} empty redraws"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
