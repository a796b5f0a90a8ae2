"""Published calorimeter shower files (HDF5) -> sharded Parquet.

The layouts are described in showers_hdf5.py. Memory stays constant, whatever the size of the files.
"""

import argparse
import os
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from hepzoo.data_scripts.hdf5_files import UnreadableFileError
from hepzoo.data_scripts.shards import ShardWriter
from hepzoo.data_scripts.showers_hdf5 import (
    LAYOUTS,
    ReadOptions,
    count_showers,
    detect_layout,
    read_showers_hdf5,
)
from hepzoo.data_scripts.showers_schema import SHOWER_FEATURES
from hepzoo.data_scripts.simulate_showers import parse_grid


def convert_files(
    paths: Sequence[str | os.PathLike],
    output: str | os.PathLike,
    layout: str = "auto",
    options: ReadOptions | None = None,
    split: str = "train",
    rows_per_shard: int = 5000,
    skip_corrupt: bool = False,
    overwrite: bool = False,
    report: Callable[[str], None] | None = None,
) -> list[Path]:
    """Converts HDF5 files to the shards of one split.

    Args:
        paths: HDF5 files, each of any layout.
        output: directory of the shards.
        layout: "auto" or one of `showers_hdf5.LAYOUTS`, of all files.
        options: how the content is understood; default `ReadOptions()`.
        skip_corrupt: leaves out files that are not readable as HDF5 (truncated, damaged), reported and counted. Of a
            file that turns out to be damaged in the middle, the showers in front of the damage are kept. Files with
            impossible values are an error nevertheless.
        report: called with one line per file; None is silent.

    Returns:
        The written files.

    Raises:
        ValueError: a file or a shower is not usable; nothing is written then.
    """
    report = report or (lambda line: None)
    skipped = 0
    with ShardWriter(output, SHOWER_FEATURES, split, rows_per_shard, overwrite=overwrite) as writer:
        for path in paths:
            counts: Counter = Counter()
            try:
                found = detect_layout(path) if layout == "auto" else layout
                bar = tqdm(
                    total=count_showers(path, found),
                    desc=Path(path).name,
                    unit="shower",
                    file=sys.stderr,
                    disable=None,
                )
                with bar:
                    for columns in read_showers_hdf5(path, found, options, counts):
                        bar.update(writer.write(columns))
            except UnreadableFileError as error:
                if not skip_corrupt:
                    raise
                skipped += 1
                report(f"skipped: {error}; {counts['showers']} showers in front of the damage were kept")
                continue
            report(f"{path}: {_summary(found, counts, options or ReadOptions())}")
        if skipped:
            report(f"{skipped} of {len(paths)} files skipped")
            if skipped == len(paths):
                raise ValueError("none of the files could be read")
    return writer.paths


def _summary(layout: str, counts: Counter, options: ReadOptions) -> str:
    line = f"layout {layout}, {counts['showers']} showers, {counts['hits']} hits"
    if counts["empty"]:
        line += f", {counts['empty']} showers without a hit"
    if counts["below_cut"]:
        line += f", {counts['below_cut']} hits below the cut left out"
    if counts["outside"]:
        line += f", {counts['outside']} hits outside the grid left out"
    if counts["duplicates"]:
        what = "merged with" if options.merge_duplicates else "kept beside"
        line += f", {counts['duplicates']} hits {what} an earlier hit of the same cell"
    return line


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="hepzoo convert-data showers",
        description="Convert published calorimeter shower files (HDF5) to sharded Parquet.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=textwrap.dedent(
            """\
            examples:
              python data_scripts/convert_showers.py gamma-fullG4.hdf5 --output data/getting_high --cut 0.1
              python data_scripts/convert_showers.py photons_10_100GeV_*train*.h5 --output data/photons --split train
              python data_scripts/convert_showers.py allshowers.h5 --output data/ild --drop_outside --merge_duplicates
              python data_scripts/convert_showers.py omnijet.h5 --output data/fixed --incident_energy 50

            layouts, found from the content:
              getting_high  group with energy [N,1] (GeV) and dense layers [N, layer, x, y] (MeV)
              padded        showers [N, P, 4] (x, y, z, energy) with incident_energies or genE
              showerdata    files of the package showerdata: x, y in mm, layer, energy in GeV
              events        events [N, 5, P] (x, layer, y, energy, unused), n_points, energy
              arrays        x, y, z, energy [N, P] with incident_energy or genE
            """
        ),
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="HDF5 file")
    parser.add_argument("--output", required=True, metavar="DIR", help="directory of the Parquet shards")
    parser.add_argument("--layout", choices=("auto", *LAYOUTS), default="auto", help="default: %(default)s")
    parser.add_argument("--split", default="train", help="split name, first part of the file names (default: train)")
    parser.add_argument("--cut", type=float, help="keep hits above it, MeV (default: 0.1 for getting_high, else 0)")
    parser.add_argument(
        "--grid",
        type=parse_grid,
        default="30,30,30",
        help="cells NX,NY,NZ (default: %(default)s; not for getting_high)",
    )
    parser.add_argument(
        "--coordinates", choices=("cells", "mm"), help="unit of x and y (default: mm for showerdata, else cells)"
    )
    parser.add_argument("--cell_size", type=float, default=5.0, help="mm, for coordinates in mm (default: %(default)s)")
    parser.add_argument(
        "--origin",
        type=int,
        nargs=2,
        metavar=("X", "Y"),
        help="cells whose lower edges are at 0 mm (default: half the grid): cell = floor(mm / cell_size) + origin",
    )
    parser.add_argument(
        "--energy_unit", choices=("MeV", "GeV"), help="unit of the hits (default: GeV for showerdata, else MeV)"
    )
    parser.add_argument(
        "--incident_energy", type=float, metavar="GEV", help="for files that hold no incident energies, such as OmniJet"
    )
    parser.add_argument("--merge_duplicates", action="store_true", help="add up hits of the same cell")
    parser.add_argument("--drop_outside", action="store_true", help="leave out hits outside the grid, counted")
    parser.add_argument("--skip_corrupt", action="store_true", help="leave out truncated or damaged files")
    parser.add_argument("--rows_per_shard", type=int, default=5000, metavar="N", help="default: %(default)s")
    parser.add_argument("--overwrite", action="store_true", help="replace shards of the same split")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    args = build_parser().parse_args(argv)
    try:
        options = ReadOptions(
            grid=args.grid,
            cut=args.cut,
            coordinates=args.coordinates,
            cell_size=args.cell_size,
            origin=tuple(args.origin) if args.origin else None,
            energy_unit=args.energy_unit,
            incident_energy=args.incident_energy,
            merge_duplicates=args.merge_duplicates,
            drop_outside=args.drop_outside,
        )
        paths = convert_files(
            args.files,
            args.output,
            layout=args.layout,
            options=options,
            split=args.split,
            rows_per_shard=args.rows_per_shard,
            skip_corrupt=args.skip_corrupt,
            overwrite=args.overwrite,
            report=print,
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(paths)} file(s) in {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
