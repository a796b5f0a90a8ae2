"""Plot jets, real against generated: observables, constituent spectra, jet images; residuals of reconstructed jets."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hepzoo.evaluation.evaluate_jets import add_sample_arguments, read_samples
from hepzoo.evaluation.jets import CONSTITUENTS, OBSERVABLES, read_jets

KINDS = ("overview", "observables", "image", "residuals")
FIGURES = (
    "jet_pt", "jet_mass", "multiplicity", "tau21", "tau32", "d2", "part_pt", "part_etarel", "part_phirel",
)  # fmt: skip

EXAMPLES = """examples:
  All figures of generated jets:
    hepzoo plot jets --real data/jets/val.parquet --generated generated --output plots
  Jet mass and D2 of tops as PDF, in the style of CMS:
    hepzoo plot jets --real data/jets/val --generated generated --output plots --classes Tbqq \\
        --kind observables --observables jet_mass d2 --format pdf --style CMS
  Residuals of reconstructed jets, which must be the real ones in the same order:
    hepzoo plot jets --real data/jets/val --generated reconstructed --output plots --kind residuals \\
        --max_relative 0.8 --max_constituents 128
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hepzoo plot jets",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_sample_arguments(parser)
    parser.add_argument("--output", type=Path, required=True, help="folder for the pictures")
    parser.add_argument(
        "--kind", nargs="+", choices=KINDS, default=list(KINDS[:-1]), help="what to plot (all but residuals)"
    )
    names = (*OBSERVABLES, *CONSTITUENTS)
    parser.add_argument("--observables", nargs="+", choices=names, default=list(FIGURES), metavar="NAME",
                        help=f"for the kind observables, of {', '.join(names)}")  # fmt: skip
    parser.add_argument("--format", default="png", choices=("png", "pdf", "svg"), help="picture format (png)")
    parser.add_argument("--style", help="an mplhep style, for instance CMS or ATLAS")
    return parser


def _plots(args: argparse.Namespace) -> list[Path]:
    from hepzoo.evaluation import plots_jets as plots

    written = []

    def path(name: str) -> Path:
        written.append(args.output / f"{name}.{args.format}")
        return written[-1]

    if "residuals" in args.kind:
        if args.classes:
            raise ValueError("residuals are of all jets of the files: leave --classes out")
        pair = (read_jets(files, max_jets=args.max_jets) for files in (args.real, args.generated))
        plots.plot_residuals(
            *pair,
            path("residuals"),
            style=args.style,
            max_relative=args.max_relative,
            max_constituents=args.max_constituents,
            keep_mass=args.keep_mass,
            recombination=args.axes,
            pseudorapidity=args.published_axes,
        )
    if set(args.kind) == {"residuals"}:
        return written
    real, generated = read_samples(args)
    if "overview" in args.kind:
        plots.plot_overview(real, generated, path("overview"), style=args.style)
    if "observables" in args.kind:
        for name in dict.fromkeys(args.observables):
            plots.plot_observable(real, generated, name, path(name), style=args.style)
    if "image" in args.kind:
        plots.plot_image(real, generated, path("image"), style=args.style)
    return written


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `hepzoo plot jets`; returns the exit status."""
    args = build_parser().parse_args(argv)
    try:
        written = _plots(args)
    except (ValueError, OSError, ImportError) as err:
        sys.stderr.write(f"hepzoo plot jets: {err}\n")
        return 2
    for path in written:
        sys.stdout.write(f"{path}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
