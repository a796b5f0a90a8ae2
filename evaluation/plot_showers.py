"""Plot calorimeter showers, real against generated: spectra, profiles, response, correlations, event displays."""

import argparse
import sys
from pathlib import Path

import numpy as np

from hepzoo.evaluation.evaluate_showers import add_sample_arguments, read_samples
from hepzoo.evaluation.showers import OBSERVABLES, PROFILES, Showers, iter_showers

KINDS = ("overview", "observables", "response", "correlations", "display")
FIGURES = (
    "visible_energy", "num_hits", "energy_ratio", "energy_per_layer", "hits_per_layer", "radial_profile",
    "cell_energy", "cog_x", "cog_y", "cog_z", "width_z", "width_r", "start_layer", "hottest_layer",
)  # fmt: skip

EXAMPLES = """examples:
  All figures:
    hepzoo plot showers --real data/showers/val.parquet --generated generated --output plots
  Visible energy and longitudinal profile of showers of 45 to 55 GeV as PDF, in the style of CMS:
    hepzoo plot showers --real val.parquet --generated generated --output plots --energy_range 45,55 \\
        --kind observables --observables visible_energy energy_per_layer --format pdf --style CMS
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hepzoo plot showers",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_sample_arguments(parser)
    parser.add_argument("--output", type=Path, required=True, help="folder for the pictures")
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=list(KINDS), help="what to plot (all)")
    names = (*OBSERVABLES, *PROFILES)
    parser.add_argument("--observables", nargs="+", choices=names, default=list(FIGURES), metavar="NAME",
                        help=f"for the kind observables, of {', '.join(names)}")  # fmt: skip
    parser.add_argument("--display_energy", type=float, help="GeV of the event displays (median of the real showers)")
    parser.add_argument("--format", default="png", choices=("png", "pdf", "svg"), help="picture format (png)")
    parser.add_argument("--style", help="an mplhep style, for instance CMS or ATLAS")
    return parser


def nearest_shower(paths: list[str], energy: float, grid: tuple[int, int, int]) -> Showers:
    """The shower of the files whose incident energy is nearest to `energy` [GeV]."""
    best: Showers | None = None
    for showers in iter_showers(paths, grid):
        one = showers.select(np.array([np.argmin(np.abs(showers.incident_energy - energy))]))
        if best is None or abs(one.incident_energy[0] - energy) < abs(best.incident_energy[0] - energy):
            best = one
    if best is None:
        raise ValueError(f"{', '.join(paths)}: no showers")
    return best


def _plots(args: argparse.Namespace) -> list[Path]:
    from hepzoo.evaluation import plots_showers as plots

    real, generated = read_samples(args)
    written = []

    def path(name: str) -> Path:
        written.append(args.output / f"{name}.{args.format}")
        return written[-1]

    if "overview" in args.kind:
        plots.plot_overview(real, generated, path("overview"), style=args.style)
    if "observables" in args.kind:
        for name in dict.fromkeys(args.observables):
            plots.plot_observable(real, generated, name, path(name), style=args.style)
    if "response" in args.kind:
        plots.plot_response(real, generated, path("response"), args.energy_bins, style=args.style)
    if "correlations" in args.kind:
        plots.plot_correlations(real, generated, path("correlations"), style=args.style)
    if "display" in args.kind:
        energy = float(np.median(real.incident_energy)) if args.display_energy is None else args.display_energy
        pair = [nearest_shower(files, energy, args.grid) for files in (args.real, args.generated)]
        plots.plot_event_display(*pair, path("display"), args.grid, args.cut, style=args.style)
    return written


def main(argv: list[str] | None = None) -> int:
    """Runs `hepzoo plot showers`; returns the exit status."""
    args = build_parser().parse_args(argv)
    try:
        written = _plots(args)
    except (ValueError, OSError, ImportError) as err:
        sys.stderr.write(f"hepzoo plot showers: {err}\n")
        return 2
    for path in written:
        sys.stdout.write(f"{path}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
