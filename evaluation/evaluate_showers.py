"""Evaluate calorimeter showers: observables of real and generated showers, their distances, the energy response.

Every distance stands beside its floor, the same distance between two random parts of the real showers scaled to the
sizes of the samples: what statistics alone gives. The incident energies of both samples should be distributed alike; a
line warns if they are not.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hepzoo.evaluation.distances import histogram_wasserstein, quantile_kl, total_variation, two_sample_auc, wasserstein
from hepzoo.evaluation.showers import (
    CORRELATED,
    CUT,
    GRID,
    OBSERVABLES,
    PROFILES,
    START_THRESHOLD,
    ShowerObservables,
    energy_bins,
    energy_response,
    observe_files,
)
from hepzoo.evaluation.tables import format_table, format_value, plain, write_table, write_text

EXAMPLES = """examples:
  Compare generated with held-out Geant4 showers, and keep the tables:
    hepzoo evaluate showers --real data/showers/val.parquet --generated generated --output table.md report.json
  Showers of 45 to 55 GeV only, hits above 0.2 MeV, energy response in wide bins:
    hepzoo evaluate showers --real val.parquet --generated gen --energy_range 45,55 --cut 0.2 --energy_bins 45,50,55
  Cells of 2.5 mm:
    hepzoo evaluate showers --real val.parquet --generated gen --grid 60,60,30
"""

DISTANCE_COLUMNS = {
    "name": "observable",
    "unit": "unit",
    "real_mean": "real mean",
    "real_std": "std",
    "generated_mean": "gen. mean",
    "generated_std": "std",
    "w1": "W1/std",
    "w1_floor": "floor",
    "kl": "KL",
    "kl_floor": "floor",
    "tv": "TV",
    "tv_floor": "floor",
    "w1_over_floor": "W1/floor",
}
RESPONSE_COLUMNS = {
    "bin": "E_inc [GeV]",
    "real_showers": "real",
    "generated_showers": "gen.",
    "real_response": "response real [%]",
    "real_response_error": "+-",
    "generated_response": "gen. [%]",
    "generated_response_error": "+-",
    "response_ratio": "gen./real",
    "real_resolution": "resolution real [%]",
    "real_resolution_error": "+-",
    "generated_resolution": "gen. [%]",
    "generated_resolution_error": "+-",
}
HISTOGRAM_BINS = 50
_DISTANCES = ("w1", "kl", "tv")


def shower_distances(real: ShowerObservables, generated: ShowerObservables) -> dict[str, dict[str, float]]:
    """Distances of two samples: name of the observable or profile -> `w1`, `w1_raw`, `kl`, `tv`.

    For every observable (incident energy included) the Wasserstein-1 distance in its unit (`w1_raw`) and divided by
    the standard deviation of the real sample (`w1`), the quantile-KL in 30 bins, and the total variation of
    histograms of 50 bins over the central 99.8 % of the real sample with open outer bins. For the profiles `w1`,
    `w1_raw` and `tv` of the mean profile normalised to 1 (its size is that of visible energy and hits), the cell
    energy over log10(E/MeV). Showers that lack an observable do not count in it.
    """
    found = {}
    for name in ("incident_energy", *real.scalars):
        a, b = _values(real, name), _values(generated, name)
        found[name] = dict.fromkeys(("w1", "w1_raw", "kl", "tv"), np.nan)
        if not len(a) or not len(b):
            continue
        raw, spread = wasserstein(a, b), float(np.std(a))
        low, high = np.quantile(a, [0.001, 0.999])
        edges = np.linspace(low, high + 1e-9 * max(abs(high), 1), HISTOGRAM_BINS + 1)[1:-1]
        counts = [np.bincount(np.searchsorted(edges, v, side="right"), minlength=HISTOGRAM_BINS) for v in (a, b)]
        found[name] = {
            "w1": raw / spread if spread > 1e-9 * max(abs(high), 1) else np.nan,
            "w1_raw": raw,
            "kl": quantile_kl(a, b),
            "tv": total_variation(*counts),
        }
    for name in PROFILES:
        edges = profile_edges(real, name)
        a, b = (o.profiles[name].sum(axis=0) for o in (real, generated))
        found[name] = dict.fromkeys(("w1", "w1_raw", "kl", "tv"), np.nan)
        if not a.any() or not b.any():
            continue
        raw = histogram_wasserstein(a, b, edges)
        spread = _profile_moments(a, edges)[1]
        found[name] |= {"w1_raw": raw, "w1": raw / spread if spread > 0 else np.nan, "tv": total_variation(a, b)}
    return found


def _values(observables: ShowerObservables, name: str) -> np.ndarray:
    values = observables.incident_energy if name == "incident_energy" else observables.scalars[name]
    return values[np.isfinite(values)]


def profile_edges(observables: ShowerObservables, name: str) -> np.ndarray:
    """Bin edges of a profile in the unit of its distances (`PROFILES`)."""
    edges = observables.edges[name]
    return np.log10(edges) if name == "cell_energy" else edges


def _profile_moments(counts: np.ndarray, edges: np.ndarray) -> tuple[float, float]:
    if not counts.any():
        return float("nan"), float("nan")
    centers = (edges[:-1] + edges[1:]) / 2
    mean = np.average(centers, weights=counts)
    return float(mean), float(np.sqrt(np.average((centers - mean) ** 2, weights=counts)))


def classifier_features(observables: ShowerObservables) -> np.ndarray:
    """Features of the classifier test, shape `(n, 1 + observables + layers)`.

    Incident energy, all observables, and the share of every layer in the visible energy.
    """
    layers = observables.profiles["energy_per_layer"]
    total = observables.scalars["visible_energy"][:, None]
    shares = np.divide(layers, total, out=np.zeros_like(layers), where=total > 0)
    return np.column_stack([observables.incident_energy, *observables.scalars.values(), shares])


def classifier_auc(
    real: ShowerObservables, generated: ShowerObservables, seed: int = 0, max_showers: int = 5000
) -> tuple[float, float]:
    """AUC of a classifier on the `classifier_features`, and its error; both samples cut to one size."""
    rng = np.random.default_rng(seed)
    size = min(len(real), len(generated), max_showers)
    chosen = [classifier_features(o.select(rng.permutation(len(o))[:size])) for o in (real, generated)]
    return two_sample_auc(*chosen, seed=seed)


def compare_showers(
    real: ShowerObservables,
    generated: ShowerObservables,
    splits: int = 5,
    classifier: bool = True,
    response_edges: Sequence[float] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Real against generated showers, with the statistical floor of every distance.

    Args:
        real, generated (`ShowerObservables`): of `observe` or `observe_files`, with the same cut and grid.
        splits (`int`): random splits of the real showers that the floors are averaged over. The parts are smaller than
            the samples n and m, so W1, TV and correlations are scaled by sqrt(1/n + 1/m), KL by its square.
        classifier (`bool`): train the real-or-generated classifier (twice: once for its floor).
        response_edges (*optional*): bins of incident energy, GeV; default `energy_bins` of the real showers.
        seed (`int`): of the splits, the classifier and the bootstrap errors.

    Returns:
        `real`, `generated` (sizes, undefined observables), `incident_energy` (Kolmogorov-Smirnov `statistic`,
        `p_value`), `distances` (one row per observable and profile), `response` (one row per energy bin),
        `correlations`, `classifier` (`auc`, `error`, `floor`, `floor_error`), `cut`, `splits`, `seed`.

    Raises:
        ValueError: fewer than 4 showers (with the classifier 40 real, 20 generated), or different cuts or grids.
    """
    from scipy.stats import ks_2samp

    if splits < 1:
        raise ValueError(f"splits must be at least 1, got {splits}")
    for sample, name in ((real, "real"), (generated, "generated")):
        if len(sample) < 4:
            raise ValueError(f"{len(sample)} {name} showers, at least 4 are needed")
        if not np.any(sample.scalars["num_hits"]):
            raise ValueError(f"no {name} shower has a hit above {sample.cut:g} MeV")
    if classifier and (len(real) < 40 or len(generated) < 20):
        raise ValueError(
            f"the classifier needs at least 40 real and 20 generated showers, got {len(real)} and {len(generated)}; "
            "leave it out by --no_classifier (classifier=False)"
        )
    if real.cut != generated.cut:
        raise ValueError(f"the samples have different cuts: {real.cut:g} and {generated.cut:g} MeV")
    if any(len(real.edges[name]) != len(generated.edges[name]) for name in real.edges):
        raise ValueError("the samples have different grids")
    rng = np.random.default_rng(seed)
    values = shower_distances(real, generated)
    matrix = real.correlations()
    floors, correlation_floors = [], []
    for number in range(splits):
        order, half = rng.permutation(len(real)), len(real) // 2
        first, second = real.select(order[half:]), real.select(order[: min(half, len(generated))])
        shrink = np.sqrt((1 / len(real) + 1 / len(generated)) / (1 / len(first) + 1 / len(second)))
        floors.append(
            {
                name: {key: value * (shrink**2 if key == "kl" else shrink) for key, value in part.items()}
                for name, part in shower_distances(first, second).items()
            }
        )
        correlation_floors.append(shrink * _correlation_distance(first.correlations(), second.correlations()))
        if classifier and number == 0:  # one is enough: it takes most of the time
            halves = first, second
    tested = ks_2samp(real.incident_energy, generated.incident_energy)
    report = {
        "cut": real.cut,
        "splits": splits,
        "seed": seed,
        "real": _summary(real),
        "generated": _summary(generated),
        "incident_energy": {"statistic": float(tested.statistic), "p_value": float(tested.pvalue)},
        "distances": [_distance_row(name, real, generated, values[name], [f[name] for f in floors]) for name in values],
        "response": _response_rows(real, generated, response_edges, seed),
        "correlations": {
            "names": list(CORRELATED),
            "real": matrix,
            "generated": generated.correlations(),
            "mean_difference": _correlation_distance(matrix, generated.correlations()),
            "floor": float(np.mean(correlation_floors)),
        },
    }
    if classifier:
        (auc, error), (floor, floor_error) = classifier_auc(real, generated, seed), classifier_auc(*halves, seed)
        report["classifier"] = {"auc": auc, "error": error, "floor": floor, "floor_error": floor_error}
    return report


def _correlation_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Mean absolute difference of the correlations of different quantities, NaN entries left out."""
    difference = np.abs(a - b)[np.triu_indices(len(a), 1)]
    difference = difference[np.isfinite(difference)]
    return float(difference.mean()) if len(difference) else float("nan")


def _summary(observables: ShowerObservables) -> dict[str, Any]:
    energy = observables.incident_energy
    undefined = {name: int(np.isnan(values).sum()) for name, values in observables.scalars.items()}
    return {
        "showers": len(observables),
        "hits": int(observables.scalars["num_hits"].sum()),
        "empty": int((observables.scalars["num_hits"] == 0).sum()),
        "incident_energy_range": [float(energy.min()), float(energy.max())],
        "undefined": {name: number for name, number in undefined.items() if number},
    }


def _distance_row(name, real, generated, values: dict[str, float], floors: list[dict[str, float]]) -> dict[str, Any]:
    if name in PROFILES:
        title, unit = PROFILES[name]
        moments = [_profile_moments(o.profiles[name].sum(axis=0), profile_edges(o, name)) for o in (real, generated)]
    else:
        title, unit = OBSERVABLES.get(name, ("incident energy", "GeV"))
        samples = [_values(o, name) for o in (real, generated)]
        moments = [(float(v.mean()), float(v.std())) if len(v) else (np.nan, np.nan) for v in samples]
    row: dict[str, Any] = {"observable": name, "name": title, "unit": unit}
    row |= {"real_mean": moments[0][0], "real_std": moments[0][1]}
    row |= {"generated_mean": moments[1][0], "generated_std": moments[1][1]}
    row["w1_raw"] = values["w1_raw"]
    for key in _DISTANCES:
        known = np.array([f[key] for f in floors if np.isfinite(f[key])])
        row[key] = values[key]
        row[f"{key}_floor"] = float(known.mean()) if len(known) else float("nan")
        row[f"{key}_floor_spread"] = float(known.std()) if len(known) > 1 else float("nan")
    row["w1_over_floor"] = row["w1"] / row["w1_floor"] if row["w1_floor"] > 0 else float("nan")
    return row


def _response_rows(real, generated, edges: Sequence[float] | None, seed: int) -> list[dict[str, Any]]:
    edges = energy_bins(real.incident_energy) if edges is None else np.asarray(edges, dtype=np.float64)
    rows = []
    for a, b in zip(*(energy_response(o, edges, seed=seed) for o in (real, generated)), strict=True):
        row: dict[str, Any] = {"low": a["low"], "high": a["high"], "bin": f"{a['low']:g} to {a['high']:g}"}
        for name, part in (("real", a), ("generated", b)):
            row |= {f"{name}_showers": part["showers"], f"{name}_energy": part["energy"]}
            for key in ("response", "response_error", "resolution", "resolution_error"):
                row[f"{name}_{key}"] = 100 * part[key]
        row["response_ratio"] = b["response"] / a["response"]
        rows.append(row)
    return rows


def _notes(report: dict[str, Any]) -> list[str]:
    """How to read the tables, and what else was measured."""
    notes = [
        f"W1/std: Wasserstein-1 / std of the real showers; KL: in 30 quantile bins of the real showers; TV: total "
        f"variation of histograms. floor: the same between two disjoint parts of the real showers, scaled to "
        f"the sizes of the samples (mean of {report['splits']} random splits); at its floor a distance cannot be "
        "told from statistics."
    ]
    matrix = report["correlations"]
    notes.append(
        f"Correlations of {len(matrix['names'])} quantities: mean absolute difference "
        f"{format_value(matrix['mean_difference'], 3)}, floor {format_value(matrix['floor'], 3)}."
    )
    if "classifier" in report:
        c = report["classifier"]
        notes.append(
            f"Classifier on observables and layer energies: AUC {c['auc']:.3f} +- {c['error']:.3f}, floor "
            f"{c['floor']:.3f} +- {c['floor_error']:.3f} (0.5: cannot be told apart)."
        )
    for name in ("real", "generated"):
        s = report[name]
        if s["undefined"]:
            which = ", ".join(f"{key} {number}" for key, number in s["undefined"].items())
            notes.append(f"{name.capitalize()} showers left out where the observable is undefined: {which}.")
    return notes


def incident_energy_warning(report: dict[str, Any]) -> str | None:
    """One line if the incident energies of the samples are not distributed alike (p < 0.01), else `None`."""
    test = report["incident_energy"]
    if test["p_value"] >= 0.01:
        return None
    return (
        f"warning: the incident energies of real and generated showers differ (Kolmogorov-Smirnov D = "
        f"{test['statistic']:.3f}, p = {test['p_value']:.1e}): distances of energies and hits include that"
    )


def _heads(report: dict[str, Any]) -> list[str]:
    lines = []
    for name in ("real", "generated"):
        s = report[name]
        low, high = s["incident_energy_range"]
        empty = f", {s['empty']} of them without a hit" if s["empty"] else ""
        lines.append(
            f"{name}: {s['showers']} showers{empty}, {s['hits']} hits above {report['cut']:g} MeV, "
            f"{low:.4g} to {high:.4g} GeV"
        )
    return lines


RESPONSE_TITLE = (
    "Energy response: mean and rms/mean of the narrowest 90 % of visible / incident energy (for a Gaussian 0.79 of its "
    "width)"
)


def format_report(report: dict[str, Any]) -> str:
    """The report as text."""
    tables = [
        format_table(report["distances"], DISTANCE_COLUMNS),
        RESPONSE_TITLE + "\n" + format_table(report["response"], RESPONSE_COLUMNS),
    ]
    return "\n\n".join(["\n".join(_heads(report)), *tables, "\n".join(_notes(report))])


def _markdown_table(rows: Sequence[dict[str, Any]], columns: dict[str, str]) -> str:
    lines = [list(columns.values()), ["---" if isinstance(rows[0][key], str) else "---:" for key in columns]]
    lines += [[format_value(row[key]) for key in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def format_markdown(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    warning = incident_energy_warning(report)
    parts = [
        "# Real and generated showers",
        "\n".join(f"- {line}" for line in [*_heads(report), *([warning] if warning else [])]),
        _markdown_table(report["distances"], DISTANCE_COLUMNS),
        *_notes(report),
        RESPONSE_TITLE + ":",
        _markdown_table(report["response"], RESPONSE_COLUMNS),
    ]
    return "\n\n".join(parts) + "\n"


def save_report(report: dict[str, Any], path: str | Path) -> Path:
    """Saves a report by file ending: `.json` all of it, `.md` the tables, `.csv` the distances."""
    path = Path(path)
    if path.suffix == ".md":
        return write_text(path, format_markdown(report))
    if path.suffix == ".json":
        return write_text(path, json.dumps(plain(report), indent=2) + "\n")
    if path.suffix == ".csv":
        return write_table(path, report["distances"])
    raise ValueError(f"{path}: the report is written as .json, .md or .csv, got {path.suffix or 'no ending'!r}")


def _numbers(text: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if len(values) < 2 or not all(b > a for a, b in zip(values, values[1:], strict=False)):
        raise argparse.ArgumentTypeError(f"expected rising numbers with commas such as 10,50,100, got {text!r}")
    return values


def _pair(text: str) -> tuple[float, float]:
    values = _numbers(text.replace("-", ",", 1) if "," not in text else text)
    if len(values) != 2:
        raise argparse.ArgumentTypeError(f"expected two numbers such as 45,55, got {text!r}")
    return values[0], values[1]


def _grid(text: str) -> tuple[int, int, int]:
    parts = text.lower().replace("x", ",").split(",")
    if len(parts) != 3 or not all(p.strip().isdigit() and int(p) > 0 for p in parts):
        raise argparse.ArgumentTypeError(f"expected three positive integers such as 30,30,30, got {text!r}")
    x, y, z = map(int, parts)
    return x, y, z


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def _energy(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < np.inf:
        raise argparse.ArgumentTypeError(f"expected a number of MeV that is not negative, got {text!r}")
    return value


def add_sample_arguments(parser: argparse.ArgumentParser) -> None:
    """Options on samples and observables that `evaluate` and `plot` share."""
    parser.add_argument("--real", nargs="+", required=True, metavar="FILES", help="Parquet files, folders or patterns")
    parser.add_argument("--generated", nargs="+", required=True, metavar="FILES", help="the same, showers of a model")
    parser.add_argument("--energy_range", type=_pair, metavar="A,B", help="incident energy, GeV (default: all)")
    parser.add_argument("--max_showers", type=_positive, help="use at most so many showers of each sample")
    parser.add_argument("--grid", type=_grid, default=GRID, metavar="X,Y,Z", help="cells in x and y, layers (30,30,30)")
    parser.add_argument("--cut", type=_energy, default=CUT, help=f"MeV; only hits above it count ({CUT:g}, half a MIP)")
    parser.add_argument(
        "--start_threshold",
        type=_energy,
        default=START_THRESHOLD,
        help=f"MeV; the start layer is the first with more ({START_THRESHOLD:g}, two MIPs)",
    )
    parser.add_argument("--energy_bins", type=_numbers, metavar="A,B,..", help="bins of the energy response, GeV")
    parser.add_argument("--seed", type=int, default=0, help="of splits, classifier and errors (0)")


def read_samples(args: argparse.Namespace) -> tuple[ShowerObservables, ShowerObservables]:
    """Observables of the two samples that the options of `add_sample_arguments` name."""
    keys = ("cut", "start_threshold", "grid", "energy_range", "max_showers")
    options = {key: getattr(args, key) for key in keys}
    return observe_files(args.real, **options), observe_files(args.generated, **options)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hepzoo evaluate showers",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_sample_arguments(parser)
    parser.add_argument("--output", type=Path, nargs="+", default=[], metavar="FILE", help="write .json, .md or .csv")
    parser.add_argument("--splits", type=_positive, default=5, help="splits of the real showers for the floors (5)")
    parser.add_argument("--no_classifier", action="store_true", help="leave out the real-or-generated classifier")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs `hepzoo evaluate showers`; returns the exit status."""
    parser = build_parser()
    args = parser.parse_args(argv)
    for path in args.output:
        if path.suffix not in (".json", ".md", ".csv"):
            parser.error(f"--output must end in .json, .md or .csv, got {path}")
    try:
        real, generated = read_samples(args)
        report = compare_showers(
            real, generated, args.splits, not args.no_classifier, response_edges=args.energy_bins, seed=args.seed
        )
        sys.stdout.write(format_report(report) + "\n")
        warning = incident_energy_warning(report)
        if warning:
            sys.stderr.write(f"hepzoo evaluate showers: {warning}\n")
        for path in args.output:
            sys.stdout.write(f"report written to {save_report(report, path)}\n")
    except (ValueError, OSError) as err:
        sys.stderr.write(f"hepzoo evaluate showers: {err}\n")
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
