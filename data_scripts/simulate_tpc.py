"""Simulator of proton-proton collisions at 200 GeV in a time projection chamber: Pythia 8 and helices.

A fast stand-in for the sPHENIX simulation behind TPCpp-10M, with its columns and similar statistics. Non-diffractive
minimum bias events; charged particles are helices in 1.4 T without energy loss or scattering; every crossing of one of
48 layers gives a point. Photons convert in thin cylinders, delta electrons start on tracks, and some points belong to
nothing. No pile-up, clustering, dead channels or saturation.
"""

import argparse
import sys
import textwrap
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from tqdm import tqdm

from hepzoo.data_scripts.shards import ShardWriter
from hepzoo.data_scripts.tpc_schema import NOISE_MAX_PT, POINT_COLUMNS, TPC_FEATURES, pid_class
from hepzoo.data_scripts.worker_processes import run_jobs

__all__ = ["helix_crossings", "iter_events", "simulate_tpc"]

# Part of the random-number scheme: other values give other events.
CHUNK_EVENTS = 250
BATCH_EVENTS = 50

FIELD = 1.4  # T, along +z
_CURVATURE = 0.00299792458 * FIELD  # GeV/c per cm: pT = _CURVATURE * radius
# Three modules of 16 layers: first and last radius, cm
MODULES = ((31.372, 39.92), (41.66, 56.96), (58.91, 75.385))
LAYER_RADII = np.concatenate([np.linspace(first, last, 16) for first, last in MODULES])
ROW_HEIGHTS = np.repeat([(last - first) / 15 for first, last in MODULES], 16)
OUTER_RADIUS = 78.0  # cm; what gets there is stopped
HALF_LENGTH = 105.0  # cm

EFFICIENCY = 0.97
SIGMA_R_PHI = 0.015  # cm
SIGMA_Z = (0.1, 0.05)  # cm, for the longest drift (z = 0) and at the end plates
MIN_PT = 0.01  # GeV/c
MIN_POINTS = 20  # of an event

# Largest number of turns, path length in cm and number of points: tracks, soft particles, delta electrons
_TRACK_LIMITS = (3, 900.0, 10_000)
_SOFT_LIMITS = (12, 600.0, 150)
_DELTA_LIMITS = (40, 60.0, 60)

# Photon conversion: radius in cm and thickness in radiation lengths of cylinders in front of the chamber, 8.2 % in all
_CYLINDERS = (
    (2.0, 0.002),
    (2.5, 0.004),
    (3.3, 0.004),
    (4.1, 0.004),
    (7.5, 0.012),
    (9.7, 0.012),
    (20.0, 0.014),
    (30.0, 0.030),
)
_DELTA_RATE = 0.0105  # per point of a track
_DELTA_MOMENTUM = (0.002, 0.040)  # GeV/c, dN/dp ~ p^-2
_RANDOM_POINTS = 12.0  # per event

# Ionisation: ADC counts of a minimum ionising particle per cm, largest relativistic rise, width of the fluctuations
_GAIN = 71.5
_MAX_RISE = 1.6
_FLUCTUATION = 0.85
_ADC_RANGE = (5, 6000)

_MASSES = {11: 0.000511, 13: 0.10566, 211: 0.13957, 321: 0.49368, 2212: 0.93827}  # GeV/c^2
_POSITIVE = (-11, -13, 211, 321, 2212)

_SETTINGS = ("Print:quiet = on", "Beams:eCM = 200", "SoftQCD:nonDiffractive = on", "Random:setSeed = on")


def simulate_tpc(num_events: int, seed: int = 0) -> dict[str, Any]:
    """Simulates events and returns the columns of `TPC_FEATURES`.

    Args:
        num_events: with at least 20 points each.
        seed: non-negative integer.

    Returns:
        Lists of one array per event.

    Raises:
        ValueError: an argument out of range, or Pythia is not installed.
    """
    parts = list(iter_events(num_events, seed))
    return {name: [row for part in parts for row in part[name]] for name in parts[0]}


def iter_events(num_events: int, seed: int = 0, processes: int = 1) -> Iterator[dict[str, list]]:
    """`simulate_tpc` as a stream of chunks of at most 250 events.

    The events depend on the seed alone, not on the number of processes; a longer run starts with the same whole chunks.

    Args:
        processes: worker processes.
        others: see `simulate_tpc`.

    Raises:
        ValueError: as `simulate_tpc`, before the first chunk.
    """
    for name, value, lowest in (("num_events", num_events, 1), ("seed", seed, 0), ("processes", processes, 1)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < lowest:
            raise ValueError(f"{name} must be an integer of at least {lowest}, got {value!r}")
    _check_packages()
    jobs = [
        (int(seed), chunk, min(CHUNK_EVENTS, num_events - start))
        for chunk, start in enumerate(range(0, num_events, CHUNK_EVENTS))
    ]
    return run_jobs(_simulate_chunk, jobs, min(processes, len(jobs)))


def _check_packages() -> None:
    try:
        import awkward  # noqa: F401
        import pythia8mc  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f'simulating collisions needs pythia8mc ({error}); install it with: pip install "hepzoo[sim]"'
        ) from None


# ---------------------------------------------------------------------------------------------------------------------
# Events
# ---------------------------------------------------------------------------------------------------------------------


def _simulate_chunk(job) -> dict[str, list]:
    """`size` events, from a Pythia and a random stream of their own."""
    from pythia8mc import Pythia

    seed, chunk, size = job
    generator_seed, detector_seed = np.random.SeedSequence(seed, spawn_key=(chunk,)).spawn(2)
    pythia = Pythia("", False)
    # Pythia takes seeds of 1..900000000.
    number = 1 + int(generator_seed.generate_state(1, np.uint64)[0] % 900_000_000)
    for setting in (*_SETTINGS, f"Random:seed = {number}"):
        if not pythia.readString(setting):
            raise ValueError(f"Pythia refuses the setting {setting!r}")
    if not pythia.init():
        raise ValueError("Pythia does not start; its message is above")
    rng = np.random.default_rng(detector_seed)
    columns: dict[str, list] = {name: [] for name in TPC_FEATURES}
    while len(columns["E"]) < size:
        batch = pythia.nextBatch(BATCH_EVENTS)
        if not len(batch):
            raise ValueError("Pythia makes no events any more")
        for name, rows in _detect(_particles(batch, rng), len(batch), rng).items():
            columns[name] += rows
    return {name: rows[:size] for name, rows in columns.items()}


def _particles(batch, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Charged particles of Pythia events, with the electrons of converted photons.

    Returns:
        event, pdg (particles,); momentum GeV/c, position cm (particles, 3).
    """
    import awkward as ak

    record = batch.prt
    counts = ak.num(record).to_numpy()

    def flat(values):
        return ak.flatten(ak.fill_none(values, 0.0)).to_numpy().astype(np.float64)

    stable = ak.flatten(record.status).to_numpy() > 0
    event = np.repeat(np.arange(len(counts)), counts)[stable]
    pdg = ak.flatten(record.id).to_numpy()[stable]
    momentum = np.stack([flat(record.p[key])[stable] for key in ("px", "py", "pz")], axis=1)
    position = np.stack([flat(record.vProd[key])[stable] for key in ("px", "py", "pz")], axis=1) / 10  # mm -> cm
    position[:, 2] += np.clip(10 * rng.standard_normal(len(counts)), -30, 30)[event]

    photon = pdg == 22
    converted = _convert_photons(event[photon], momentum[photon], position[photon], rng)
    charged = np.isin(np.abs(pdg), list(_MASSES))
    particles = {"event": event, "pdg": pdg, "momentum": momentum, "position": position}
    return {name: np.concatenate([values[charged], converted[name]]) for name, values in particles.items()}


def _convert_photons(event, momentum, position, rng) -> dict[str, np.ndarray]:
    """Electrons and positrons from conversion in the cylinders; both go on in the direction of the photon."""
    pt = np.hypot(momentum[:, 0], momentum[:, 1])
    energy = np.sqrt((momentum**2).sum(axis=1))
    is_free = (pt > 0) & (energy > 4 * _MASSES[11])
    parts: dict[str, list[np.ndarray]] = {"event": [], "pdg": [], "momentum": [], "position": []}
    direction = np.divide(momentum, pt[:, None], out=np.zeros_like(momentum), where=pt[:, None] > 0)
    for radius, thickness in _CYLINDERS:
        # path s in the transverse plane to the cylinder: |position + s direction| = radius
        along = (position[:, :2] * direction[:, :2]).sum(axis=1)
        inside = radius**2 - (position[:, :2] ** 2).sum(axis=1)
        path = np.sqrt(np.maximum(along**2 + inside, 0)) - along
        crossing = position + path[:, None] * direction
        with np.errstate(divide="ignore", invalid="ignore"):
            probability = 1 - np.exp(-7 / 9 * thickness * energy / pt)
        hit = is_free & (inside > 0) & (np.abs(crossing[:, 2]) < HALF_LENGTH) & (rng.random(len(pt)) < probability)
        is_free &= ~hit
        share = rng.uniform(_MASSES[11] / energy[hit], 1 - _MASSES[11] / energy[hit])
        for pdg, fraction in ((11, share), (-11, 1 - share)):
            size = np.sqrt(np.maximum((fraction * energy[hit]) ** 2 - _MASSES[11] ** 2, 0))
            parts["event"].append(event[hit])
            parts["pdg"].append(np.full(hit.sum(), pdg))
            parts["momentum"].append(momentum[hit] * (size / energy[hit])[:, None])
            parts["position"].append(crossing[hit])
    return {name: np.concatenate(values) for name, values in parts.items()}


def _detect(particles: dict[str, np.ndarray], num_events: int, rng: np.random.Generator) -> dict[str, list]:
    """The columns of `TPC_FEATURES` of those events that have enough points."""
    pt = np.hypot(particles["momentum"][:, 0], particles["momentum"][:, 1])
    is_track = pt >= NOISE_MAX_PT
    groups = []
    for selected, limits in ((is_track, _TRACK_LIMITS), (~is_track & (pt > MIN_PT), _SOFT_LIMITS)):
        group = {name: values[selected] for name, values in particles.items()}
        groups.append((group, _points(group, limits, rng)))
    groups.append(_delta_electrons(groups, rng))

    parts: dict[str, list[np.ndarray]] = {name: [] for name in ("event", "E", "position", "pid", "track")}
    for number, (group, points) in enumerate(groups):
        owner = points["particle"]
        parts["event"].append(group["event"][owner])
        parts["E"].append(_charge(group, points, rng))
        parts["position"].append(_smear(points["position"], rng))
        parts["pid"].append(pid_class(group["pdg"])[owner])
        # Only the first group are tracks.
        parts["track"].append(owner if number == 0 else np.full(len(owner), -1))
    for name, values in _random_points(num_events, rng).items():
        parts[name].append(values)
    points = {name: np.concatenate(values) for name, values in parts.items()}

    enough = np.bincount(points["event"], minlength=num_events) >= MIN_POINTS
    selected = np.flatnonzero(enough[points["event"]])
    shuffled = selected[np.lexsort([rng.random(len(selected)), points["event"][selected]])]
    points = {name: values[shuffled] for name, values in points.items()}
    return _columns(points, groups[0][0], np.flatnonzero(enough))


def _columns(points: dict[str, np.ndarray], tracks: dict[str, np.ndarray], events: np.ndarray) -> dict[str, list]:
    """Columns from the points of `events`, in order, and the particles that are tracks."""
    is_track = points["track"] >= 0
    num_points = np.bincount(points["track"][is_track], minlength=len(tracks["event"]))
    # Tracks with points, numbered from 1 in each event
    order = np.argsort(tracks["event"], kind="stable")
    order = order[num_points[order] > 0]
    owner = tracks["event"][order]
    starts = np.searchsorted(owner, events)
    track_id = np.zeros(len(tracks["event"]) + 1, dtype=np.int64)  # the last one is for points without track
    track_id[order] = np.arange(len(order)) - np.searchsorted(owner, owner) + 1

    px, py, pz = tracks["momentum"][order].T
    mass = _masses(tracks["pdg"][order])
    truth = {
        "truth_track_id": track_id[order],
        "truth_pdg": tracks["pdg"][order],
        "truth_pt": np.hypot(px, py),
        "truth_eta": np.arcsinh(pz / np.hypot(px, py)),
        "truth_phi": np.arctan2(py, px),
        **dict(zip(("truth_vx", "truth_vy", "truth_vz"), tracks["position"][order].T, strict=True)),
        "truth_charge": _charges(tracks["pdg"][order]),
        "truth_energy": np.sqrt(px**2 + py**2 + pz**2 + mass**2),
        "truth_num_points": num_points[order],
    }
    flat = {"E": points["E"], **dict(zip("xyz", points["position"].T, strict=True))}
    flat |= {"track_id": track_id[points["track"]], "pid": points["pid"], "noise": ~is_track}
    # Where the rows begin
    point_starts = np.searchsorted(points["event"], events)
    columns = {}
    for name, feature in TPC_FEATURES.items():
        values, begin = (flat[name], point_starts) if name in flat else (truth[name], starts)
        columns[name] = np.split(values.astype(feature.feature.dtype), begin[1:]) if len(events) else []
    return columns


# ---------------------------------------------------------------------------------------------------------------------
# Detector
# ---------------------------------------------------------------------------------------------------------------------


def helix_crossings(
    position: np.ndarray,
    momentum: np.ndarray,
    charge: np.ndarray,
    max_turns: int,
    max_length: float,
) -> dict[str, np.ndarray]:
    """Where helices cross the layers.

    Args:
        position: start, cm, (particles, 3), inside the chamber.
        momentum: there, GeV/c, (particles, 3), with pT > 0.
        charge: +1 or -1, (particles,).
        max_turns: number of turns that are followed.
        max_length: path length that is followed, cm.

    Returns:
        Arrays of one entry per crossing, ordered by particle, then path: particle, layer; position cm (crossings, 3);
        length, the path from the start in cm; cosine, of the angle between the transverse direction and the radius.
    """
    pt = np.hypot(momentum[:, 0], momentum[:, 1])
    radius = pt / _CURVATURE
    direction = momentum[:, :2] / pt[:, None]
    # A positive charge turns clockwise: the centre of the circle lies to its right.
    centre = position[:, :2] + (charge * radius)[:, None] * np.stack([direction[:, 1], -direction[:, 0]], axis=1)
    distance = np.hypot(centre[:, 0], centre[:, 1])
    centre_angle = np.arctan2(centre[:, 1], centre[:, 0])
    start_angle = np.arctan2(position[:, 1] - centre[:, 1], position[:, 0] - centre[:, 0])

    radii = np.append(LAYER_RADII, OUTER_RADIUS)
    with np.errstate(divide="ignore", invalid="ignore"):
        cosine = (radii**2 - (distance**2 + radius**2)[:, None]) / (2 * distance * radius)[:, None]
        # angle on the circle of both crossings, NaN for none: (particles, layers + 1, 2)
        opening = np.arccos(cosine)
    angle = centre_angle[:, None, None] + np.stack([opening, -opening], axis=-1)
    turned = (charge[:, None, None] * (start_angle[:, None, None] - angle)) % (2 * np.pi)
    slope = momentum[:, 2] / pt
    stretch = np.sqrt(1 + slope**2)  # path length per transverse path
    stop = np.nanmin(np.where(np.isnan(turned[:, -1]), np.inf, turned[:, -1]), axis=-1) * radius
    limit = np.minimum(np.minimum(stop, max_length / stretch), 2 * np.pi * radius * max_turns)
    with np.errstate(divide="ignore"):
        to_end_plate = (HALF_LENGTH - np.sign(slope) * position[:, 2]) / np.abs(slope)
    limit = np.minimum(limit, to_end_plate)

    parts: list[tuple[np.ndarray, ...]] = []
    for turn in range(max_turns):
        alive = np.flatnonzero(2 * np.pi * radius * turn < limit)
        if not len(alive):
            break
        path = (turned[alive, :-1] + 2 * np.pi * turn) * radius[alive, None, None]
        # The start itself is no crossing; NaN compares as false.
        row, layer, side = np.nonzero((path > 1e-3) & (path < limit[alive, None, None]))
        particle = alive[row]
        parts.append((particle, layer, path[row, layer, side], angle[particle, layer, side]))
    if not parts:
        parts.append(tuple(np.zeros(0, dtype=kind) for kind in (np.int64, np.int64, float, float)))
    particle, layer, path, angle = (np.concatenate(values) for values in zip(*parts, strict=True))
    order = np.lexsort([path, particle])
    particle, layer, path, angle = particle[order], layer[order], path[order], angle[order]

    x = centre[particle, 0] + radius[particle] * np.cos(angle)
    y = centre[particle, 1] + radius[particle] * np.sin(angle)
    z = position[particle, 2] + slope[particle] * path
    radial = charge[particle] * (x * np.sin(angle) - y * np.cos(angle)) / LAYER_RADII[layer]
    return {
        "particle": particle,
        "layer": layer,
        "position": np.stack([x, y, z], axis=1),
        "length": path * stretch[particle],
        "cosine": radial,
    }


def _points(group: dict[str, np.ndarray], limits: tuple[int, float, int], rng) -> dict[str, np.ndarray]:
    """The crossings of a group of particles that are seen, not smeared yet."""
    max_turns, max_length, max_points = limits
    points = helix_crossings(group["position"], group["momentum"], _charges(group["pdg"]), max_turns, max_length)
    seen = rng.random(len(points["particle"])) < EFFICIENCY
    points = {name: values[seen] for name, values in points.items()}
    rank = np.arange(len(points["particle"])) - np.searchsorted(points["particle"], points["particle"])
    return {name: values[rank < max_points] for name, values in points.items()}


def _delta_electrons(groups: list, rng) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Electrons knocked out along the tracks, and their points."""
    group, points = groups[0]
    starts = rng.random(len(points["particle"])) < _DELTA_RATE
    size = int(starts.sum())
    low, high = (1 / momentum for momentum in _DELTA_MOMENTUM)
    momentum = 1 / rng.uniform(high, low, size)
    cosine = rng.uniform(-1, 1, size)
    phi = rng.uniform(-np.pi, np.pi, size)
    sine = np.sqrt(1 - cosine**2)
    electrons = {
        "event": group["event"][points["particle"][starts]],
        "pdg": np.full(size, 11),
        "momentum": momentum[:, None] * np.stack([sine * np.cos(phi), sine * np.sin(phi), cosine], axis=1),
        "position": points["position"][starts],
    }
    return electrons, _points(electrons, _DELTA_LIMITS, rng)


def _random_points(num_events: int, rng) -> dict[str, np.ndarray]:
    """Points that belong to no particle."""
    counts = rng.poisson(_RANDOM_POINTS, num_events)
    size = int(counts.sum())
    radius = rng.choice(LAYER_RADII, size)
    phi = rng.uniform(-np.pi, np.pi, size)
    z = rng.uniform(-HALF_LENGTH, HALF_LENGTH, size)
    position = np.stack([radius * np.cos(phi), radius * np.sin(phi), z], axis=1)
    return {
        "event": np.repeat(np.arange(num_events), counts),
        "E": np.clip(np.rint(rng.exponential(_GAIN, size)), *_ADC_RANGE),
        "position": _rounded(position),
        "pid": np.zeros(size, dtype=np.int8),
        "track": np.full(size, -1),
    }


def _smear(position: np.ndarray, rng) -> np.ndarray:
    """Measured positions, cm; r stays that of the layer."""
    x, y, z = position.T
    radius = np.hypot(x, y)
    phi = np.arctan2(y, x) + SIGMA_R_PHI / radius * rng.standard_normal(len(x))
    middle, end = SIGMA_Z
    z = z + (middle + (end - middle) * np.abs(z) / HALF_LENGTH) * rng.standard_normal(len(z))
    return _rounded(np.stack([radius * np.cos(phi), radius * np.sin(phi), z], axis=1))


def _rounded(position: np.ndarray) -> np.ndarray:
    """To 1 um in x and y, 10 um in z."""
    return np.column_stack([np.round(position[:, :2], 4), np.round(position[:, 2], 3)])


def _charge(group: dict[str, np.ndarray], points: dict[str, np.ndarray], rng) -> np.ndarray:
    """ADC counts of points: ionisation along the path in the pad row, with a Landau-like tail."""
    owner = points["particle"]
    momentum = group["momentum"]
    pt = np.hypot(momentum[:, 0], momentum[:, 1])
    total = np.sqrt((momentum**2).sum(axis=1))
    beta_gamma = total / _masses(group["pdg"])
    # A crossing at a grazing angle leaves the row sideways.
    path = ROW_HEIGHTS[points["layer"]] * np.minimum(1 / np.maximum(np.abs(points["cosine"]), 1e-3), 5)
    path = path * np.minimum(total / pt, 10)[owner]
    moyal = -np.log(rng.standard_normal(len(owner)) ** 2)
    counts = _GAIN * ionisation(beta_gamma)[owner] * path
    counts *= np.maximum(1 + _FLUCTUATION * moyal / np.sqrt(path), 0.15)
    return np.clip(np.rint(counts), *_ADC_RANGE)


def ionisation(beta_gamma: np.ndarray) -> np.ndarray:
    """Energy loss per length relative to its minimum: Bethe-Bloch of argon with a plateau at 1.6."""
    beta_gamma = np.maximum(beta_gamma, 0.05)
    beta2 = beta_gamma**2 / (1 + beta_gamma**2)

    def loss(squared, beta2):  # 2 m_e / I = 2 * 511 keV / 188 eV
        return (np.log(2 * 511_000 / 188 * squared) - beta2) / beta2

    minimum = 3.5
    relative = loss(beta_gamma**2, beta2) / loss(minimum**2, minimum**2 / (1 + minimum**2))
    return np.where(beta_gamma > minimum, np.minimum(relative, _MAX_RISE), np.minimum(relative, 40.0))


def _masses(pdg: np.ndarray) -> np.ndarray:
    codes = np.array(sorted(_MASSES))
    return np.array([_MASSES[code] for code in codes])[np.searchsorted(codes, np.abs(pdg))]


def _charges(pdg: np.ndarray) -> np.ndarray:
    return np.where(np.isin(pdg, _POSITIVE), 1.0, -1.0)


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="hepzoo simulate tpc",
        description="Simulate proton-proton collisions in a time projection chamber, and write sharded Parquet.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=textwrap.dedent(
            """\
            examples:
              python data_scripts/simulate_tpc.py --output data/tpc --n_events 10000 --processes 8
              python data_scripts/simulate_tpc.py --output data/tpc --n_events 400 --seed 1 --split validation
              python data_scripts/simulate_tpc.py --output data/tpc_unlabeled --n_events 3000 --seed 2 --unlabeled
            read back:
              datasets.load_dataset("parquet", data_files="data/tpc/train-*.parquet", streaming=True)
            Give every split a seed of its own.
            """
        ),
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the Parquet files")
    parser.add_argument("--n_events", type=int, default=1000, help="number of collisions (default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, help="the same seed gives the same events (default: %(default)s)"
    )
    parser.add_argument("--split", default="train", help="name of the split (default: %(default)s)")
    parser.add_argument("--unlabeled", action="store_true", help="only the columns E, x, y, z")
    parser.add_argument("--rows_per_shard", type=int, default=5000, help="events per file (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=1, help="worker processes; does not change the events")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing split")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    args = build_parser().parse_args(argv)
    features = POINT_COLUMNS if args.unlabeled else TPC_FEATURES
    points, start = 0, time.monotonic()
    try:
        chunks = iter_events(args.n_events, args.seed, args.processes)
        writer = ShardWriter(
            args.output, features, args.split, rows_per_shard=args.rows_per_shard, overwrite=args.overwrite
        )
        with writer, tqdm(total=args.n_events, unit="event", desc="simulate", file=sys.stderr) as bar:
            for columns in chunks:
                writer.write({name: columns[name] for name in features})
                points += sum(map(len, columns["E"]))
                bar.update(len(columns["E"]))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rate = args.n_events / (time.monotonic() - start)
    print(
        f"{args.n_events} events, {points / args.n_events:.1f} points per event, {len(writer.paths)} file(s) in "
        f"{args.output}, {rate:.0f} events/s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
