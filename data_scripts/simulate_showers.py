"""Embedded simulator of photon showers in an ILD-like silicon-tungsten electromagnetic calorimeter.

A photon converts into an electron and a positron; each makes a shower whose longitudinal and radial profiles follow
Grindhammer and Peters (hep-ex/0001020) with their fluctuations, sampled as single crossings of the silicon sheets.
Numpy and scipy only, hundreds of showers per second on one core. Real Geant4: `--engine geant4`. The physics, its
comparison with Geant4 and its limits: docs/simulate_showers.md.
"""

import argparse
import sys
import textwrap
from collections.abc import Iterator

import numpy as np
from tqdm import tqdm

from hepzoo.data_scripts.shower_profiles import (
    EcalGeometry,
    ShowerConstants,
    longitudinal_parameters,
    longitudinal_profile,
    radial_parameters,
)
from hepzoo.data_scripts.worker_processes import run_jobs

__all__ = ["EcalGeometry", "ShowerConstants", "iter_showers", "parse_grid", "parse_range", "simulate_showers"]

CHUNK_SHOWERS = 100  # part of the random-number scheme: another value gives other showers
ENGINES = ("parametrised", "geant4")
ENERGY_LIMITS = (1.0, 1000.0)  # GeV
CONVERSION_LENGTH = 9 / 7  # X0, photons at high energy
IMPACT_JITTER = 2.5  # mm
_MAX_SLANT = 4.0  # longest path through a sheet, in units of its thickness


def simulate_showers(
    num_showers: int,
    energy: "float | tuple[float, float] | np.typing.ArrayLike" = (10.0, 100.0),
    seed: int = 0,
    grid: tuple[int, int, int] = (30, 30, 30),
    cell_size: float = 5.0,
    cut: float = 0.1,
    engine: str = "parametrised",
    geometry: EcalGeometry | None = None,
    constants: ShowerConstants | None = None,
) -> dict[str, np.ndarray | list[np.ndarray]]:
    """Simulates photon showers and returns the columns of the shower record.

    The same arguments give the same showers, whatever the number of processes. Showers are made in chunks of 100, each
    with random streams of its own, so that a longer run starts with the same whole chunks.

    Args:
        num_showers: rows to return.
        energy: of the photon, GeV; a number for all, a tuple (low, high) for uniform draws, or an array per shower.
        seed: non-negative integer.
        grid: cells in x and y around the beam, and layers.
        cell_size: side of the square cells, mm.
        cut: cells are kept if their energy is above it, MeV.
        engine: "parametrised" or "geant4" (geant4_showers.py).
        geometry: default `EcalGeometry()`.
        constants: default `ShowerConstants()`; parametrised engine only.

    Returns:
        incident_energy (GeV), impact_x_cm, impact_y_cm, sum_before_cut_mev (float32), n_cells_before_cut (int32) of
        shape (num_showers,), and lists of per-shower arrays x, y, z (int16), energy (MeV, float32). Hits are ordered
        by layer, inside a layer by falling energy.

    Raises:
        ValueError: an argument out of range.
    """
    chunks = list(iter_showers(num_showers, energy, seed, grid, cell_size, cut, engine, geometry, constants))
    columns = {}
    for name in chunks[0]:
        parts = [chunk[name] for chunk in chunks]
        lists = isinstance(parts[0], list)
        columns[name] = [row for part in parts for row in part] if lists else np.concatenate(parts)
    return columns


def iter_showers(
    num_showers: int,
    energy: "float | tuple[float, float] | np.typing.ArrayLike" = (10.0, 100.0),
    seed: int = 0,
    grid: tuple[int, int, int] = (30, 30, 30),
    cell_size: float = 5.0,
    cut: float = 0.1,
    engine: str = "parametrised",
    geometry: EcalGeometry | None = None,
    constants: ShowerConstants | None = None,
    processes: int = 1,
) -> Iterator[dict[str, np.ndarray | list[np.ndarray]]]:
    """`simulate_showers` as a stream of chunks of at most 100 showers, with constant memory.

    Args:
        processes: worker processes; the showers do not depend on it.
        others: see `simulate_showers`.

    Raises:
        ValueError: as `simulate_showers`, before the first chunk.
    """
    geometry = EcalGeometry() if geometry is None else geometry
    constants = ShowerConstants() if constants is None else constants
    for name, value, lowest in (("num_showers", num_showers, 1), ("seed", seed, 0), ("processes", processes, 1)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < lowest:
            raise ValueError(f"{name} must be an integer of at least {lowest}, got {value!r}")
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}")
    energy = _checked_energy(energy, num_showers)
    _check_grid(grid, cell_size, geometry)
    if not 0 <= cut < np.inf:
        raise ValueError(f"cut must be an energy in MeV of at least 0, got {cut}")
    if engine == "geant4":
        from hepzoo.data_scripts.geant4_showers import check_installation

        check_installation()

    def jobs():
        for chunk, start in enumerate(range(0, num_showers, CHUNK_SHOWERS)):
            size = min(CHUNK_SHOWERS, num_showers - start)
            part = energy[start : start + size] if isinstance(energy, np.ndarray) and energy.ndim else energy
            yield int(seed), chunk, size, part, tuple(grid), float(cell_size), float(cut), engine, geometry, constants

    # Geant4 can be set up once per process only, so it always runs in processes of its own.
    workers = min(processes, -(-num_showers // CHUNK_SHOWERS))
    return run_jobs(_simulate_chunk, jobs(), workers, in_process=workers == 1 and engine == "parametrised")


def _checked_energy(energy, num_showers: int):
    """A number, a range (tuple of two) or an array (num_showers,), in GeV."""
    try:
        array = np.asarray(energy, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"energy must be numbers in GeV, got {energy!r:.80}") from None
    if isinstance(energy, tuple):
        if array.shape != (2,) or not array[0] <= array[1]:
            raise ValueError(f"energy as a tuple must be (low, high) with low <= high, got {energy!r:.80}")
    elif array.ndim > 1 or (array.ndim == 1 and len(array) != num_showers):
        raise ValueError(f"energy must be one number or {num_showers} of them, got shape {array.shape}")
    flat = np.atleast_1d(array)
    bad = np.flatnonzero(~((flat >= ENERGY_LIMITS[0]) & (flat <= ENERGY_LIMITS[1])))
    if bad.size:
        where = "energy" if isinstance(energy, tuple) or not array.ndim else f"energy of shower {bad[0]}"
        raise ValueError(f"{where} must be in {ENERGY_LIMITS[0]:g}..{ENERGY_LIMITS[1]:g} GeV, got {flat[bad[0]]:g}")
    return (float(array[0]), float(array[1])) if isinstance(energy, tuple) else array


def _check_grid(grid, cell_size: float, geometry: EcalGeometry) -> None:
    if len(grid) != 3 or not all(isinstance(n, (int, np.integer)) and not isinstance(n, bool) for n in grid):
        raise ValueError(f"grid must be three integers NX,NY,NZ, got {grid!r:.80}")
    if grid[2] != geometry.num_layers:
        raise ValueError(f"grid has {grid[2]} layers; the calorimeter has {geometry.num_layers}")
    if not 0 < cell_size < np.inf:
        raise ValueError(f"cell_size must be a positive length in mm, got {cell_size}")
    for name, cells in zip("xy", grid, strict=False):
        if cells < 1 or cells * cell_size > 2 * geometry.half_width:
            raise ValueError(
                f"grid: {cells} cells of {cell_size:g} mm in {name}; expected 1 or more cells inside the "
                f"{2 * geometry.half_width:g} mm of the sheets"
            )


def _simulate_chunk(job) -> dict:
    """One chunk: energies and impact points from one random stream, showers from another."""
    seed, chunk, size, energy, grid, cell_size, cut, engine, geometry, constants = job
    kinematics = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(1, chunk)))
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(2, chunk)))
    # All are always drawn, so that fixing the energy leaves the impact points unchanged. float32 first: what is
    # recorded is exactly what was simulated.
    drawn = kinematics.random((3, size))
    if isinstance(energy, tuple):
        energy = energy[0] + (energy[1] - energy[0]) * drawn[0]
    energy = np.broadcast_to(energy, size).astype(np.float32)
    impact = ((2 * drawn[1:] - 1) * IMPACT_JITTER).astype(np.float32)
    if engine == "geant4":
        from hepzoo.data_scripts.geant4_showers import shower_deposits

        engine_seed = rng.integers(1, 2**31 - 1)
        deposits = shower_deposits(energy, impact, engine_seed, geometry)
    else:
        deposits = _crossings(energy.astype(np.float64), impact, rng, geometry, constants)
    columns = {"incident_energy": energy}
    columns |= cell_hits(*deposits, size, grid, cell_size, cut, geometry)
    columns["impact_x_cm"], columns["impact_y_cm"] = impact / np.float32(10)
    return columns


def _crossings(energy, impact, rng, geometry: EcalGeometry, constants: ShowerConstants):
    """Crossings of the silicon sheets: (shower, layer, x, y, deposit), each of shape (crossings,), in mm and MeV.

    Args:
        energy: photons, GeV, shape (showers,).
        impact: x and y, mm, shape (2, showers).
    """
    size = len(energy)
    conversion = rng.exponential(CONVERSION_LENGTH, size)
    share = _electron_share(size, rng)
    electrons = energy[:, None] * np.stack([share, 1 - share], axis=1)  # (showers, 2)
    alpha, maximum = longitudinal_parameters(electrons, constants, rng)

    # Expected crossings, shape (showers, 2, layers): from the front, and from the plate behind the sheet.
    depth = geometry.exit_depth - conversion[:, None, None]
    behind = depth + rng.exponential(constants.backscatter_depth, depth.shape)
    front_share = 1 / (1 + constants.backscatter)
    rate = constants.crossing_rate * electrons[..., None]
    shape = alpha[..., None], maximum[..., None]
    front = rate * longitudinal_profile(depth, *shape) * front_share
    front += np.where(depth > 0, np.exp(-np.maximum(depth, 0) / (constants.primary_fade * maximum[..., None])), 0.0)
    back = rate * longitudinal_profile(behind, *shape) * (1 - front_share)
    back[..., -1] = 0.0
    expected = np.stack([front, back])  # (2 directions, showers, 2 electrons, layers)
    counts = rng.poisson(expected)
    # The sheet itself is a target too, so even the first may be crossed.
    source = np.repeat(np.arange(counts.size), counts.ravel())
    direction, shower, _, layer = np.unravel_index(source, counts.shape)

    core, tail, weight = radial_parameters(electrons[..., None], np.maximum(depth, 0.0) / maximum[..., None], constants)
    place = source % core.size  # (shower, electron, layer)
    total = len(source)
    uniform = rng.random((3, total), dtype=np.float32)
    scale = np.where(uniform[0] < weight.ravel()[place], core.ravel()[place], tail.ravel()[place])
    # Inverse of the integral of 2 r R^2 / (r^2 + R^2)^2.
    radius = scale * np.sqrt(uniform[1] / (1 - uniform[1]))
    azimuth = 2 * np.pi * uniform[2]
    x = impact[0][shower] + radius * np.cos(azimuth)
    y = impact[1][shower] + radius * np.sin(azimuth)

    # Minus the logarithm of a squared normal number has the standard Moyal distribution.
    normal = np.maximum(np.abs(rng.standard_normal(total, dtype=np.float32)), 1e-12)
    deposit = constants.mip_mode - 2 * constants.mip_width * np.log(normal)
    soft = np.flatnonzero(rng.random(total, dtype=np.float32) < constants.soft_fraction)
    deposit[soft] = rng.exponential(constants.soft_mean, len(soft))
    _displace(x, y, soft, rng.exponential(constants.soft_radius, len(soft)), rng)

    # Particles from behind drift through the gap at large angles, and cross the sheet on a long way.
    back = np.flatnonzero(direction == 1)
    cosine = (1 - rng.random(len(back))) ** constants.backscatter_spread
    run = geometry.gap_behind[layer[back]]
    _displace(x, y, back, run * np.sqrt(1 / cosine**2 - 1), rng)
    deposit[back] *= np.minimum(1 / cosine, _MAX_SLANT)
    return shower, layer, x, y, np.maximum(deposit, 0)


def _electron_share(size: int, rng) -> np.ndarray:
    """Share u of the electron in the photon's energy: 1 - 4/3 u (1 - u), complete screening (Particle Data Group)."""
    share = rng.random((8, size))
    keep = rng.random((8, size)) < 1 - 4 / 3 * share * (1 - share)
    # The acceptance is at least 2/3; of eight draws, one practically always passes (otherwise the first is taken).
    return share[np.argmax(keep, axis=0), np.arange(size)]


def _displace(x, y, which, distance, rng) -> None:
    azimuth = 2 * np.pi * rng.random(len(which))
    x[which] += distance * np.cos(azimuth)
    y[which] += distance * np.sin(azimuth)


def cell_hits(shower, layer, x, y, deposit, size: int, grid, cell_size: float, cut: float, geometry: EcalGeometry):
    """Sums deposits in cells.

    Args:
        shower, layer: index of each deposit.
        x, y: place relative to the centre of the grid, mm.
        deposit: MeV.
        size: number of showers.
        others: see `simulate_showers`.

    Returns:
        The columns x, y, z, energy (lists of arrays), sum_before_cut_mev and n_cells_before_cut.
    """
    inside = (np.abs(x) < geometry.half_width) & (np.abs(y) < geometry.half_width)
    shower, layer, x, y, deposit = (values[inside] for values in (shower, layer, x, y, deposit))
    # Cells are counted over the whole sheet first: energy beside the grid belongs to the sum before the cut.
    cell_x = np.floor(x / cell_size + grid[0] / 2).astype(np.int64)
    cell_y = np.floor(y / cell_size + grid[1] / 2).astype(np.int64)
    width = int(2 * geometry.half_width / cell_size) + 2
    shift_x, shift_y = (width - grid[0]) // 2 + 1, (width - grid[1]) // 2 + 1
    width += 2
    key = ((shower * geometry.num_layers + layer) * width + cell_x + shift_x) * width + cell_y + shift_y
    key, inverse = np.unique(key, return_inverse=True)
    energy = np.bincount(inverse, deposit, minlength=len(key)).astype(np.float32)
    key, cell_y = np.divmod(key, width)
    key, cell_x = np.divmod(key, width)
    shower, layer = np.divmod(key, geometry.num_layers)
    cell_x, cell_y = cell_x - shift_x, cell_y - shift_y

    columns = {
        "sum_before_cut_mev": np.bincount(shower, energy, minlength=size).astype(np.float32),
        "n_cells_before_cut": np.bincount(shower[energy > 0], minlength=size).astype(np.int32),
    }
    # As float32, the precision in which energies are stored: the cut then holds for what is written.
    keep = (energy > np.float32(cut)) & (cell_x >= 0) & (cell_x < grid[0]) & (cell_y >= 0) & (cell_y < grid[1])
    shower, layer, cell_x, cell_y, energy = (values[keep] for values in (shower, layer, cell_x, cell_y, energy))
    order = np.lexsort((-energy, layer, shower))
    ends = np.cumsum(np.bincount(shower, minlength=size))[:-1]
    hits = {
        "x": cell_x.astype(np.int16),
        "y": cell_y.astype(np.int16),
        "z": layer.astype(np.int16),
        "energy": energy,
    }
    return {name: np.split(values[order], ends) for name, values in hits.items()} | columns


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def parse_range(text: str) -> float | tuple[float, float]:
    """`"50"` -> 50.0, `"10-100"` -> (10.0, 100.0)."""
    try:
        numbers = tuple(float(part) for part in text.split("-"))
    except ValueError:
        numbers = ()
    if len(numbers) not in (1, 2):
        raise argparse.ArgumentTypeError(f"expected a number or LOW-HIGH in GeV, got {text!r}")
    return numbers[0] if len(numbers) == 1 else numbers


def parse_grid(text: str) -> tuple[int, int, int]:
    """`"30,30,30"` -> (30, 30, 30)."""
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) != 3:
        raise argparse.ArgumentTypeError(f"expected NX,NY,NZ, got {text!r}")
    return numbers


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="hepzoo simulate showers",
        description="Simulate photon showers in a silicon-tungsten calorimeter and write sharded Parquet.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=textwrap.dedent(
            """\
            examples:
              python data_scripts/simulate_showers.py --output data/showers --n_showers 20000
              python data_scripts/simulate_showers.py --output data/fixed --n_showers 2000 --energy 50 --split test
              python data_scripts/simulate_showers.py --output data/fine --grid 60,60,30 --cell_size 2.5
              python data_scripts/simulate_showers.py --output data/geant4 --n_showers 999 --engine geant4 --processes 8
            read back:
              datasets.load_dataset("parquet", data_files="data/showers/train-*.parquet", streaming=True)
            """
        ),
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the Parquet files")
    parser.add_argument("--n_showers", type=int, default=10000, help="showers to write (default: %(default)s)")
    parser.add_argument(
        "--energy", type=parse_range, default="10-100", help='photon energy in GeV, "50" or "10-100" (uniform; default)'
    )
    parser.add_argument("--grid", type=parse_grid, default="30,30,30", help="cells NX,NY,NZ (default: %(default)s)")
    parser.add_argument("--cell_size", type=float, default=5.0, help="side of a cell, mm (default: %(default)s)")
    parser.add_argument("--cut", type=float, default=0.1, help="cells above it are kept, MeV (default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, help="the same seed gives the same showers (default: %(default)s)"
    )
    parser.add_argument("--split", default="train", help="name of the split (default: %(default)s)")
    parser.add_argument("--engine", choices=ENGINES, default=ENGINES[0], help="default: %(default)s")
    parser.add_argument("--rows_per_shard", type=int, default=5000, help="showers per file (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=1, help="worker processes; does not change the showers")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing split")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    args = build_parser().parse_args(argv)
    # Here, so that the worker processes start without the data-set libraries.
    from hepzoo.data_scripts.shards import ShardWriter
    from hepzoo.data_scripts.showers_schema import SIMULATION_COLUMNS, shower_features

    hits = empty = 0
    try:
        chunks = iter_showers(
            args.n_showers,
            args.energy,
            args.seed,
            args.grid,
            args.cell_size,
            args.cut,
            args.engine,
            processes=args.processes,
        )
        writer = ShardWriter(
            args.output,
            shower_features(SIMULATION_COLUMNS),
            args.split,
            rows_per_shard=args.rows_per_shard,
            overwrite=args.overwrite,
        )
        with writer, tqdm(total=args.n_showers, unit="shower", desc="simulate", file=sys.stderr) as bar:
            for columns in chunks:
                writer.write(columns)
                lengths = [len(row) for row in columns["energy"]]
                hits += sum(lengths)
                empty += lengths.count(0)
                bar.update(len(lengths))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        f"{args.n_showers} showers, {hits / args.n_showers:.1f} hits per shower, {empty} without a hit, "
        f"{len(writer.paths)} file(s) in {args.output}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
