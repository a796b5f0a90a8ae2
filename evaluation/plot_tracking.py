"""Plot track finding in a TPC: event displays of true and found tracks, efficiency and purity against pT."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hepzoo.evaluation.evaluate_tracking import add_input_arguments
from hepzoo.evaluation.tracking import TpcEvents, read_events, track_finding

KINDS = ("event", "efficiency", "spectrum")

EXAMPLES = """examples:
  Event displays of the first three events, efficiency and spectrum:
    hepzoo plot tracking --input predictions.parquet --events 0 1 2 --output plots
  Efficiency of two models:
    hepzoo plot tracking --input pretrained.parquet random.parquet --labels pretrained random \\
        --kind efficiency --output plots --format pdf
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hepzoo plot tracking",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_input_arguments(parser, several=True)
    parser.add_argument("--output", type=Path, required=True, help="folder for the pictures")
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=list(KINDS), help="what to plot (all)")
    parser.add_argument("--events", nargs="+", type=int, default=[0], metavar="N", help="events to display (0)")
    parser.add_argument("--labels", nargs="+", metavar="NAME", help="names of the samples (those of the files)")
    parser.add_argument("--format", default="png", choices=("png", "pdf", "svg"), help="picture format (png)")
    parser.add_argument("--style", help="an mplhep style, for instance CMS or ATLAS")
    return parser


def _plots(args: argparse.Namespace) -> list[Path]:
    from hepzoo.evaluation import plots_tracking as plots

    labels = args.labels or [Path(name).stem for name in args.input]
    if len(labels) != len(args.input) or len(set(labels)) < len(labels):
        raise ValueError(f"--labels: expected {len(args.input)} different names, got {' '.join(labels)}")
    samples: dict[str, TpcEvents] = {
        label: read_events(files, args.max_events) for label, files in zip(labels, args.input, strict=True)
    }
    written = []

    def path(name: str, label: str | None = None) -> Path:
        ending = f"_{label}" if label is not None and len(samples) > 1 else ""
        written.append(args.output / f"{name}{ending}.{args.format}")
        return written[-1]

    if "event" in args.kind:
        for label, events in samples.items():
            for number in args.events:
                plots.plot_event(
                    events, number, path(f"event_{number}", label), noise_id=args.noise_id, style=args.style
                )
    if "efficiency" in args.kind:
        tables = {}
        for label, events in samples.items():
            tables[label] = track_finding(events, args.pt_bins, args.noise_id, args.published)["by_pt"]
            if not tables[label]:
                raise ValueError(f"{label}: no efficiency against pT: the rows have no truth_track_id and truth_pt")
        plots.plot_efficiency(tables, path("efficiency"), style=args.style)
    if "spectrum" in args.kind:
        for label, events in samples.items():
            plots.plot_pt_spectrum(events, path("spectrum", label), noise_id=args.noise_id, style=args.style)
    return written


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `hepzoo plot tracking`; returns the exit status."""
    args = build_parser().parse_args(argv)
    try:
        written = _plots(args)
    except (ValueError, OSError, ImportError) as err:
        sys.stderr.write(f"hepzoo plot tracking: {err}\n")
        return 2
    for path in written:
        sys.stdout.write(f"{path}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
