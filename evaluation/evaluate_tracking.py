"""Evaluate track finding, particle identification and noise tagging of the points of TPC events.

The rows have the truth (`track_id`, `pid`, `noise`) and predictions (`predicted_track_id`, `predicted_pid`,
`predicted_noise`) of every point; what has no prediction is left out. Efficiency and purity in bins of pT need the
columns `truth_track_id` and `truth_pt`.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hepzoo.evaluation.tables import format_table, format_value, plain, write_table, write_text
from hepzoo.evaluation.tracking import (
    MIN_SHARED,
    MIN_TRUE,
    NOISE_ID,
    NOISE_NAMES,
    PID_NAMES,
    PT_EDGES,
    TpcEvents,
    confusion_matrix,
    point_classification,
    read_events,
    track_finding,
)

EXAMPLES = """examples:
  Tables of predictions, and keep them:
    hepzoo evaluate tracking --input predictions.parquet --output tracking.md tracking.json
  Only 500 events, wide bins of pT:
    hepzoo evaluate tracking --input predictions --max_events 500 --pt_bins 0,0.5,1,2,5
  Counted as the published evaluation does, every track id being a track:
    hepzoo evaluate tracking --input predictions.parquet --published --noise_id none
"""

PT_COLUMNS = {
    "bin": "pT [GeV/c]",
    "true_tracks": "true tracks",
    "efficiency": "efficiency",
    "efficiency_error": "+-",
    "found_tracks": "found tracks",
    "purity": "purity",
    "purity_error": "+-",
    "fake_rate": "fake rate",
    "fake_rate_error": "+-",
}
CLASS_COLUMNS = {
    "class": "class",
    "points": "points",
    "predicted": "predicted",
    "precision": "precision",
    "recall": "recall",
}
TASKS = {"pid": ("Particle identification", PID_NAMES), "noise": ("Noise", NOISE_NAMES)}


def evaluate_tracking(
    events: TpcEvents,
    edges: Sequence[float] = PT_EDGES,
    noise_id: int | None = NOISE_ID,
    published: bool = False,
) -> dict[str, Any]:
    """Everything that the predictions of the events allow.

    Args:
        events (`TpcEvents`): of `read_events`.
        edges, noise_id, published: of `track_finding`.

    Returns:
        `tracks` (of `track_finding`), `pid` and `noise` (of `point_classification`, with the `confusion` matrix): those
        that have predictions; `events`, `points`, `published`, `noise_id`.

    Raises:
        ValueError: there are no predictions, or the truth of one is missing.
    """
    predicted = [name for name in ("track_id", "pid", "noise") if f"predicted_{name}" in events]
    if not predicted:
        raise ValueError(
            "no predictions: expected predicted_track_id, predicted_pid or predicted_noise "
            f"(found: {', '.join(events.points)})"
        )
    report: dict[str, Any] = {"events": len(events), "points": int(events.offsets[-1])}
    report |= {"published": published, "noise_id": noise_id}
    if "track_id" in predicted:
        report["tracks"] = track_finding(events, edges, noise_id, published)
    for name, (_, classes) in TASKS.items():
        if name in predicted:
            matrix = confusion_matrix(events[name], events[f"predicted_{name}"], len(classes))
            report[name] = {**point_classification(matrix, classes), "confusion": matrix}
    return report


def _with_error(values: dict[str, Any], name: str) -> str:
    return f"{values[name]:.4f} +- {values[f'{name}_error']:.4f}"


def _track_lines(tracks: dict[str, Any]) -> list[str]:
    lines = [f"ARI: {_with_error(tracks, 'ari')} (mean over events), {tracks['ari_pooled']:.4f} (pooled)"]
    if "ari_tracks" in tracks:
        lines.append(
            f"ARI of points of tracks only: {_with_error(tracks, 'ari_tracks')} (mean over events), "
            f"{tracks['ari_tracks_pooled']:.4f} (pooled)"
        )
    lines.append(f"efficiency: {_with_error(tracks, 'efficiency')} of {tracks['true_tracks']} true tracks")
    lines.append(
        f"purity: {_with_error(tracks, 'purity')}, fake rate: {_with_error(tracks, 'fake_rate')} of "
        f"{tracks['found_tracks']} found tracks"
    )
    if tracks["noise_tracks"]:
        lines.append(
            f"without the {tracks['noise_tracks']} found tracks mostly of noise: purity "
            f"{format_value(tracks['purity_without_noise'])}, fake rate "
            f"{format_value(tracks['fake_rate_without_noise'])}"
        )
    lines.append(f"points given to no track: {100 * tracks['unassigned']:.2f} %")
    if "mean_efficiency" in tracks:
        lines.append(
            f"means over the bins of pT: efficiency {format_value(tracks['mean_efficiency'])}, purity "
            f"{format_value(tracks['mean_purity'])}"
        )
    return lines


def _pt_rows(tracks: dict[str, Any]) -> list[dict[str, Any]]:
    def name(low: float, high: float) -> str:
        return f"{low:g} and more" if np.isinf(high) else f"{low:g} to {high:g}"

    return [{"bin": name(row["low"], row["high"]), **row} for row in tracks["by_pt"]]


def _rules(tracks: dict[str, Any]) -> str:
    text = (
        f"A true track (of at least {MIN_TRUE} points) is found if a found track shares at least {MIN_SHARED} points, "
        "more than half of the true and more than half of the found track. Purity: share of points from the true track "
        f"that most come from; fake rate: found tracks (with {MIN_SHARED} points from there) that find none."
    )
    if not tracks["by_pt"]:
        return text + " No bins of pT: the rows have no truth_track_id and truth_pt."
    if tracks["without_pt"]:
        text += f" {tracks['without_pt']} true tracks are not in the truth table and in no bin of pT."
    return text


def _sections(report: dict[str, Any], table) -> list[str]:
    """The report in paragraphs; `table` draws rows and columns."""
    parts = [f"{report['events']} events, {report['points']} points"]
    if "tracks" in report:
        parts.append("\n".join(_track_lines(report["tracks"])))
        if report["tracks"]["by_pt"]:
            parts.append(table(_pt_rows(report["tracks"]), PT_COLUMNS))
        parts.append(_rules(report["tracks"]))
    for name, (title, _) in TASKS.items():
        if name in report:
            found = report[name]
            parts.append(
                f"{title}: accuracy {found['accuracy']:.4f}, macro precision {found['macro_precision']:.4f}, "
                f"macro recall {found['macro_recall']:.4f}"
            )
            parts.append(table(found["classes"], CLASS_COLUMNS))
    return parts


def format_report(report: dict[str, Any]) -> str:
    """The report as text."""
    return "\n\n".join(_sections(report, format_table))


def _markdown_table(rows: Sequence[dict[str, Any]], columns: dict[str, str]) -> str:
    lines = [list(columns.values()), ["---" if isinstance(rows[0][key], str) else "---:" for key in columns]]
    lines += [[format_value(row[key]) for key in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def format_markdown(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    parts = [part.replace("\n", "\n\n") if "|" not in part else part for part in _sections(report, _markdown_table)]
    return "# TPC events\n\n" + "\n\n".join(parts) + "\n"


def save_report(report: dict[str, Any], path: str | Path) -> Path:
    """Saves a report by file ending: `.json` all of it, `.md` the tables, `.csv` efficiency and purity against pT."""
    path = Path(path)
    if path.suffix == ".md":
        return write_text(path, format_markdown(report))
    if path.suffix == ".json":
        return write_text(path, json.dumps(plain(report), indent=2) + "\n")
    if path.suffix == ".csv":
        rows = report.get("tracks", {}).get("by_pt")
        if not rows:
            raise ValueError(f"{path}: no figures against pT to write; they need predicted_track_id and truth_pt")
        return write_table(path, rows)
    raise ValueError(f"{path}: the report is written as .json, .md or .csv, got {path.suffix or 'no ending'!r}")


def _edges(text: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if len(values) < 2 or not all(b > a for a, b in zip(values, values[1:], strict=False)):
        raise argparse.ArgumentTypeError(f"expected rising numbers with commas such as 0,0.5,1,3, got {text!r}")
    return values


def _track_id(text: str) -> int | None:
    if text.lower() == "none":
        return None
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected an integer or none, got {text!r}") from None


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def add_input_arguments(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """Options on events and counting that `evaluate` and `plot` share."""
    what = "Parquet files, folders or patterns with predictions"
    parser.add_argument("--input", nargs="+", required=True, metavar="FILES",
                        help=what + (", each one a sample" if several else ""))  # fmt: skip
    parser.add_argument("--max_events", type=_positive, help="use at most so many events")
    parser.add_argument("--pt_bins", type=_edges, default=list(PT_EDGES), metavar="A,B,..",
                        help="bins of pT, GeV/c; inf is a number (0 to 3 by 0.2, and above)")  # fmt: skip
    parser.add_argument("--noise_id", type=_track_id, default=NOISE_ID, metavar="ID",
                        help=f"true id of points that belong to no track, or none ({NOISE_ID})")  # fmt: skip
    parser.add_argument("--published", action="store_true", help="count as the published evaluation: points of no "
                        "track are a found track, whose pT is that of the smallest id in it")  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hepzoo evaluate tracking",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_input_arguments(parser)
    parser.add_argument("--output", type=Path, nargs="+", default=[], metavar="FILE", help="write .json, .md or .csv")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs `hepzoo evaluate tracking`; returns the exit status."""
    parser = build_parser()
    args = parser.parse_args(argv)
    for path in args.output:
        if path.suffix not in (".json", ".md", ".csv"):
            parser.error(f"--output must end in .json, .md or .csv, got {path}")
    try:
        events = read_events(args.input, args.max_events)
        report = evaluate_tracking(events, args.pt_bins, args.noise_id, args.published)
        sys.stdout.write(format_report(report) + "\n")
        for path in args.output:
            sys.stdout.write(f"report written to {save_report(report, path)}\n")
    except (ValueError, OSError) as err:
        sys.stderr.write(f"hepzoo evaluate tracking: {err}\n")
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
