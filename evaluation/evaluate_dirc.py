"""Evaluate DIRC tracks: real against generated, log-likelihood-difference PID, classifier scores.

hepzoo evaluate dirc --real ... --generated ...           distances, each with its statistical floor
hepzoo evaluate dirc --dll --real ... [--generated ...]   pion/kaon separation by kernel densities
hepzoo evaluate dirc --logits scores.parquet              pion/kaon separation of a classifier
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

from hepzoo.evaluation.distances import compare_tracks, format_report, save_report
from hepzoo.evaluation.dll_dirc import SUPPORT_TIME, fixed_point_dll, split_test_support
from hepzoo.evaluation.kde import DEFAULT_CUT
from hepzoo.evaluation.roc import accuracy, auc_score, rejection_at_efficiency, roc_scan
from hepzoo.evaluation.separation import separation_table
from hepzoo.evaluation.tables import format_table, write_table
from hepzoo.evaluation.tracks_dirc import expand_paths, read_tracks

EXAMPLES = """examples:
  Compare generated with simulated tracks, and keep the table:
    hepzoo evaluate dirc --real sim/test-*.parquet --generated gen/ --output report.json
  Pion/kaon separation of simulated tracks at fixed points, with generated photons as support:
    hepzoo evaluate dirc --dll --real sim_6GeV/ --generated gen_6GeV/ --support-photons 500000
  The same with simulated photons as support (the last 500 tracks of each point and species are the test tracks):
    hepzoo evaluate dirc --dll --support real --real sim_6GeV/ --test-tracks 500
  A classifier: a Parquet or CSV file with the columns P, Theta, PDG and logit (positive = kaon):
    hepzoo evaluate dirc --logits scores.parquet --theta-bins 25,50,75,100,125,160 --output separation.csv
"""

TABLE = {
    "momentum": "P [GeV/c]",
    "theta": "theta [deg]",
    "kaons": "kaons",
    "pions": "pions",
    "separation": "separation",
    "error": "+-",
    "moments": "from moments",
    "auc": "AUC",
    "accuracy": "accuracy",
    "note": "note",
}


def _edges(text: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected comma-separated numbers, got {text!r}") from None
    if len(values) < 2 or any(b <= a for a, b in zip(values, values[1:], strict=False)):
        raise argparse.ArgumentTypeError(f"expected at least two rising numbers, got {text!r}")
    return values


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return value


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hepzoo evaluate dirc",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    files = parser.add_argument_group("files (Parquet files, folders or patterns)")
    files.add_argument("--real", nargs="+", metavar="FILES", help="simulated or measured tracks")
    files.add_argument("--generated", nargs="+", metavar="FILES", help="tracks of a model")
    files.add_argument("--output", type=Path, help="write the report to this .json or .csv file")
    files.add_argument("--max-tracks", type=_positive, help="read at most this many tracks of every file")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--dll", action="store_true", help="log-likelihood difference of the real tracks at fixed points")
    mode.add_argument("--logits", metavar="FILE", help="classifier scores with the columns P, Theta, PDG and logit")
    distances = parser.add_argument_group("distances")
    distances.add_argument("--splits", type=_positive, default=3, help="splits of the real tracks for the floor (3)")
    distances.add_argument("--classifier", action="store_true", help="add the AUC of a real-or-generated classifier")
    distances.add_argument("--seed", type=int, default=0, help="of the splits and the classifier (0)")
    dll = parser.add_argument_group("log-likelihood difference")
    dll.add_argument("--support", choices=("generated", "real"), help="where the support photons come from "
                     "(default: generated when given, else real)")  # fmt: skip
    dll.add_argument("--support-photons", type=_positive, default=500_000, help="per species and point (500000)")
    dll.add_argument("--test-tracks", type=_positive, default=500,
                     help="test tracks per species and point (500): with --support real the last ones of each, "
                     "the rest is support; otherwise the first ones")  # fmt: skip
    dll.add_argument("--cut", type=float, default=DEFAULT_CUT,
                     help=f"kernel cut in widths ({DEFAULT_CUT:g}); 0 sums every pair")  # fmt: skip
    dll.add_argument("--scores-output", type=Path, help="write P, Theta, PDG and dll of every test track (.csv, .json)")
    bins = parser.add_argument_group("separation tables")
    bins.add_argument("--momentum-bins", type=_edges, metavar="A,B,..", help="edges in GeV/c (default: fixed points)")
    bins.add_argument("--theta-bins", type=_edges, metavar="A,B,..", help="edges in deg (default: fixed points)")
    bins.add_argument("--histogram", choices=("auto", "published"), default="auto",
                      help="histogram edges of the Gaussian fits: chosen from the scores, or those of the published "
                      "analysis (by momentum for --dll, [-20, 20] for --logits)")  # fmt: skip
    bins.add_argument("--min-tracks", type=_positive, default=50, help="fewest tracks per species and bin (50)")
    return parser


def _say(text: str = "") -> None:
    sys.stdout.write(text + "\n")


def _distances(args: argparse.Namespace) -> None:
    real = read_tracks(args.real, max_tracks=args.max_tracks)
    generated = read_tracks(args.generated, max_tracks=args.max_tracks)
    report = compare_tracks(real, generated, splits=args.splits, classifier=args.classifier, seed=args.seed)
    _say(format_report(report))
    if args.output:
        _say(f"report written to {save_report(report, args.output)}")


def _first_tracks(tracks, number: int):
    """The first `number` tracks of every species and kinematic point, in their order."""
    key = np.stack([np.round(tracks.momentum, 3), np.round(tracks.theta, 3), np.abs(tracks.pdg)], axis=1)
    _, group = np.unique(key, axis=0, return_inverse=True)
    group = group.ravel()
    order = np.argsort(group, kind="stable")
    first = np.searchsorted(group[order], np.arange(group.max() + 1))
    rank = np.empty(len(tracks), np.int64)
    rank[order] = np.arange(len(tracks)) - first[group[order]]
    return tracks.select(rank < number)


def _dll(args: argparse.Namespace) -> None:
    source = args.support or ("generated" if args.generated else "real")
    real = read_tracks(args.real, max_tracks=args.max_tracks)
    if source == "generated":
        test, support = _first_tracks(real, args.test_tracks), read_tracks(args.generated, max_tracks=args.max_tracks)
    else:
        test, support = split_test_support(real, args.test_tracks)
    result = fixed_point_dll(
        test, support, support_photons=args.support_photons, cut=args.cut or None, progress=sys.stderr.isatty()
    )
    edges = "momentum" if args.histogram == "published" else "auto"
    table = separation_table(
        result.tracks, result.scores, args.momentum_bins, args.theta_bins, edges, min_tracks=args.min_tracks
    )
    _say(f"DLL of {len(result.tracks)} real tracks; support: {source} photons, {SUPPORT_TIME[0]:g} < t < "
         f"{SUPPORT_TIME[1]:g} ns, {min(min(p['support_kaon'], p['support_pion']) for p in result.points)} or more "
         "per species and point")  # fmt: skip
    for reason, number in result.left_out.items():
        if number:
            _say(f"left out: {number} tracks with a {reason}")
    _report_separation(table, args)
    if args.scores_output:
        tracks = result.tracks
        rows = [
            {"P": p, "Theta": theta, "PDG": pdg, "dll": dll}
            for p, theta, pdg, dll in zip(
                tracks.momentum.tolist(),
                tracks.theta.tolist(),
                tracks.pdg.tolist(),
                result.scores.tolist(),
                strict=True,
            )
        ]
        _say(f"scores written to {write_table(args.scores_output, rows)}")
    if args.output:
        report = {"support": source, "points": result.points, "left_out": result.left_out, "separation": table}
        _say(f"report written to {write_table(args.output, table, report)}")


def read_scores(path: str) -> dict[str, np.ndarray]:
    """Columns P, Theta, PDG and logit (or dll) of a Parquet or CSV file of classifier scores."""
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet as pq

    (file,) = [Path(path)] if Path(path).suffix == ".csv" and Path(path).is_file() else expand_paths(path)[:1]
    try:
        table = pa.csv.read_csv(file) if file.suffix == ".csv" else pq.read_table(file)
    except (pa.ArrowException, OSError) as err:
        raise ValueError(f"{file}: not readable ({str(err).splitlines()[0]})") from None
    names = table.column_names
    columns = {}
    for name, choices in {
        "P": ("P",),
        "Theta": ("Theta",),
        "PDG": ("PDG", "PID"),
        "logit": ("logit", "logits", "dll"),
    }.items():
        found = [choice for choice in choices if choice in names]
        if not found:
            raise ValueError(f"{file}: column {' or '.join(map(repr, choices))} is missing (found: {', '.join(names)})")
        try:
            columns[name] = np.asarray(table.column(found[0]).to_pylist(), dtype=np.float64)
        except (TypeError, ValueError):
            raise ValueError(f"{file}: column {found[0]!r} must hold one number per row") from None
        bad = np.flatnonzero(np.isnan(columns[name]))
        if len(bad):
            raise ValueError(f"{file}: row {bad[0]}: {found[0]} is not a number")
    return columns


def _logits(args: argparse.Namespace) -> None:
    columns = read_scores(args.logits)
    edges = "classifier" if args.histogram == "published" else "auto"
    table = separation_table(
        columns, columns["logit"], args.momentum_bins, args.theta_bins, edges, min_tracks=args.min_tracks
    )
    code = np.abs(columns["PDG"])
    kaon, pion = columns["logit"][code == 321], columns["logit"][code == 211]
    report: dict[str, Any] = {"kaons": len(kaon), "pions": len(pion), "separation": table}
    _say(f"{len(kaon)} kaons, {len(pion)} pions")
    if len(kaon) and len(pion):
        report |= {
            "accuracy": accuracy(kaon, pion),
            "auc": auc_score(kaon, pion),
            "auc_20000_thresholds": roc_scan(kaon, pion).auc,
            "rejection": {f"{e:g}": rejection_at_efficiency(kaon, pion, e) for e in (0.5, 0.8, 0.9, 0.95)},
        }
        _say(f"accuracy {report['accuracy']:.4f} (score > 0), AUC {report['auc']:.4f}")
        for name, row in report["rejection"].items():
            value = f"{row['rejection']:.4g} +- {row['rejection_error']:.2g}"
            if not row["passing"]:
                value = f"above {len(pion)} (no pion passes)"
            _say(f"pion rejection at {100 * float(name):g} % kaon efficiency: {value}")
    _report_separation(table, args)
    if args.output:
        _say(f"report written to {write_table(args.output, table, report)}")


def _report_separation(table: list[dict[str, Any]], args: argparse.Namespace) -> None:
    columns = {key: head for key, head in TABLE.items() if key != "note" or any(row["note"] for row in table)}
    _say()
    _say(format_table(table, columns))
    _say("\nseparation in standard deviations (Gaussian fits); accuracy: score > 0 means kaon")


def main(argv: list[str] | None = None) -> int:
    """Runs `hepzoo evaluate dirc`; returns the exit status."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.output and args.output.suffix not in (".json", ".csv"):
        parser.error(f"--output must end in .json or .csv, got {args.output}")
    if args.scores_output and args.scores_output.suffix not in (".json", ".csv"):
        parser.error(f"--scores-output must end in .json or .csv, got {args.scores_output}")
    if args.cut < 0:
        parser.error(f"--cut must not be negative, got {args.cut}")
    if not args.logits and not args.real:
        parser.error("--real is needed (or --logits)")
    if not args.logits and not args.dll and not args.generated:
        parser.error("--generated is needed to compare with (or --dll, or --logits)")
    if args.dll and args.support == "generated" and not args.generated:
        parser.error("--support generated needs --generated")
    try:
        (_logits if args.logits else _dll if args.dll else _distances)(args)
    except (ValueError, OSError) as err:
        sys.stderr.write(f"hepzoo evaluate dirc: {err}\n")
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
