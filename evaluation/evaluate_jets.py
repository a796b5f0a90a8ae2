"""Evaluate jets: observables and constituents of real and generated jets, their distances, a classifier test.

Every distance stands beside its floor, the same distance between two random parts of the real jets scaled to the sizes
of the samples: what statistics alone gives.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hepzoo.evaluation.distances import _sample, quantile_kl, two_sample_auc, wasserstein
from hepzoo.evaluation.evaluate_showers import _markdown_table, _positive
from hepzoo.evaluation.jet_substructure import RECOMBINATIONS
from hepzoo.evaluation.jets import CLASSES, CONSTITUENTS, OBSERVABLES, JetObservables, observe_files
from hepzoo.evaluation.tables import format_table, plain, write_table, write_text

EXAMPLES = """examples:
  Compare generated with held-out jets, and keep the tables:
    hepzoo evaluate jets --real data/jets/val.parquet --generated generated --output table.md report.json
  Only tops, cut as the tokenizer cuts them, with the substructure as published:
    hepzoo evaluate jets --real data/jets/val --generated generated --classes Tbqq --max_relative 0.8 \\
        --max_constituents 128 --published_axes
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
    "kl_alpha": "KL (alpha)",
    "kl_alpha_floor": "floor",
    "kl_ntp": "KL (NTP)",
    "kl_ntp_floor": "floor",
    "w1_over_floor": "W1/floor",
}
KL_DEFINITIONS = ("alpha", "ntp")
PUBLISHED_BINS = 50
_DISTANCES = ("w1", "kl", "kl_alpha", "kl_ntp")
_CLASSIFIED = ("jet_pt", "jet_mass", "multiplicity", "tau1", "tau2", "tau3", "tau21", "tau32", "d2")
_LEADING = 8  # constituents whose share of the jet pT the classifier sees


def published_quantile_kl(
    real: np.ndarray, generated: np.ndarray, bins: int = PUBLISHED_BINS, definition: str = "alpha"
) -> float:
    """The quantile-KL of two samples as two of the publications define it, in nats; KL(real || generated).

    "alpha" (arXiv:2403.05618): `bins` edges, so bins - 1 bins, at quantiles 0.001 to 0.999 of the real sample; values
    outside do not count; densities + 1e-8, normalised to a sum of 1 as if they were the probabilities of the bins, so
    that narrow bins count most and it is no KL of the distributions. Equal edges are taken once.
    "ntp" (arXiv:2501.05534, arXiv:2512.04149): `bins` bins of equal parts of the real sample, the outer ones open;
    fractions without a floor: infinite where a bin has real values and no generated ones.

    `hepzoo.evaluation.distances.quantile_kl` is finite, counts all values and is the better measure.
    """
    from scipy.stats import entropy

    if definition not in KL_DEFINITIONS:
        raise ValueError(f"unknown definition {definition!r}, expected one of {', '.join(KL_DEFINITIONS)}")
    if bins < 3:
        raise ValueError(f"bins must be at least 3, got {bins}")
    real, generated = _sample(real, "real"), _sample(generated, "generated")
    if definition == "ntp":
        edges = np.quantile(real, np.linspace(0, 1, bins + 1))
        edges[0], edges[-1] = -np.inf, np.inf
        return float(entropy(*(np.histogram(v, edges)[0] / len(v) for v in (real, generated))))
    edges = np.unique(np.quantile(real, np.linspace(0.001, 0.999, bins)))
    if len(edges) < 2:
        return float("nan")
    counts = [np.histogram(v, edges)[0] for v in (real, generated)]
    if not all(c.any() for c in counts):
        return float("inf")
    return float(entropy(*(c / (c.sum() * np.diff(edges)) + 1e-8 for c in counts)))


def histogram_kl(real: np.ndarray, generated: np.ndarray, edges: np.ndarray) -> float:
    """KL of two histograms, sum p ln(p / q) times the bin width, p and q densities + 1e-8 (arXiv:2501.05534); nats."""
    edges = np.asarray(edges, dtype=np.float64)
    if edges.ndim != 1 or len(edges) < 2 or not (np.diff(edges) > 0).all():
        raise ValueError("edges must be at least two rising numbers")
    counts = [np.histogram(_sample(v, name), edges)[0] for v, name in ((real, "real"), (generated, "generated"))]
    for count, name in zip(counts, ("real", "generated"), strict=True):
        if not count.any():
            raise ValueError(f"no value of the {name} sample is inside the edges {edges[0]:g} to {edges[-1]:g}")
    p, q = (c / (c.sum() * np.diff(edges)) + 1e-8 for c in counts)
    return float((p * np.log(p / q) * np.diff(edges)).sum())


def jet_distances(real: JetObservables, generated: JetObservables) -> dict[str, dict[str, float]]:
    """Distances of two samples: name of the observable -> `w1`, `w1_raw`, `kl`, `kl_alpha`, `kl_ntp`.

    Of jets and of all their constituents: the Wasserstein-1 distance in its unit (`w1_raw`) and divided by the standard
    deviation of the real sample (`w1`), the quantile-KL in 30 bins, and as published with 50. Jets that lack an
    observable do not count in it; all are NaN where a sample has none.
    """
    found = {}
    for name in (*OBSERVABLES, *CONSTITUENTS):
        a, b = real.values(name), generated.values(name)
        found[name] = dict.fromkeys(("w1", "w1_raw", "kl", "kl_alpha", "kl_ntp"), np.nan)
        if not len(a) or not len(b):
            continue
        raw, spread = wasserstein(a, b), float(np.std(a))
        found[name] = {
            "w1": raw / spread if spread > 1e-9 * np.abs(a).max() else np.nan,
            "w1_raw": raw,
            "kl": quantile_kl(a, b),
            "kl_alpha": published_quantile_kl(a, b, definition="alpha"),
            "kl_ntp": published_quantile_kl(a, b, definition="ntp"),
        }
    return found


def classifier_features(observables: JetObservables) -> np.ndarray:
    """Features of the classifier test, shape `(n, 17)`.

    pT, mass, multiplicity, substructure, and the shares of the 8 hardest constituents in the jet pT, hardest first.
    """
    count = np.diff(observables.offsets)
    owner = np.repeat(np.arange(len(observables)), count)
    share = observables.constituents["part_ptrel"]
    order = np.lexsort((-share, owner))
    rank = np.arange(len(share)) - observables.offsets[:-1][owner]
    leading = np.zeros((len(observables), _LEADING))
    inside = rank < _LEADING
    leading[owner[inside], rank[inside]] = share[order][inside]
    return np.column_stack([*(observables.scalars[name] for name in _CLASSIFIED), leading])


def classifier_auc(
    real: JetObservables, generated: JetObservables, seed: int = 0, max_jets: int = 5000
) -> tuple[float, float]:
    """AUC of a classifier on the `classifier_features`, and its error; both samples cut to one size."""
    rng = np.random.default_rng(seed)
    size = min(len(real), len(generated), max_jets)
    chosen = [classifier_features(o.select(rng.permutation(len(o))[:size])) for o in (real, generated)]
    return two_sample_auc(*chosen, seed=seed)


def compare_jets(
    real: JetObservables, generated: JetObservables, splits: int = 5, classifier: bool = True, seed: int = 0
) -> dict[str, Any]:
    """Real against generated jets, with the statistical floor of every distance.

    Args:
        real, generated (`JetObservables`): of `observe` or `observe_files`, with the same options.
        splits (`int`): random splits of the real jets that the floors are averaged over. The parts are smaller than the
            samples n and m, so W1 is scaled by sqrt(1/n + 1/m), the KL by its square. Whole jets are split.
        classifier (`bool`): train the real-or-generated classifier (twice: once for its floor).
        seed (`int`): of the splits and the classifier.

    Returns:
        `real`, `generated` (sizes, undefined observables), `distances` (one row per observable), `classifier` (`auc`,
        `error`, `floor`, `floor_error`), `splits`, `seed`.

    Raises:
        ValueError: fewer than 4 jets (with the classifier 40 real, 20 generated), or no constituents at all.
    """
    if splits < 1:
        raise ValueError(f"splits must be at least 1, got {splits}")
    for sample, name in ((real, "real"), (generated, "generated")):
        if len(sample) < 4:
            raise ValueError(f"{len(sample)} {name} jets, at least 4 are needed")
        if not sample.offsets[-1]:
            raise ValueError(f"no {name} jet has a constituent")
    if classifier and (len(real) < 40 or len(generated) < 20):
        raise ValueError(
            f"the classifier needs at least 40 real and 20 generated jets, got {len(real)} and {len(generated)}; leave "
            "it out by --no_classifier (classifier=False)"
        )
    rng = np.random.default_rng(seed)
    values = jet_distances(real, generated)
    floors = []
    for number in range(splits):
        order, half = rng.permutation(len(real)), len(real) // 2
        first, second = real.select(order[half:]), real.select(order[: min(half, len(generated))])
        shrink = np.sqrt((1 / len(real) + 1 / len(generated)) / (1 / len(first) + 1 / len(second)))
        floors.append(
            {
                name: {key: value * (shrink if key.startswith("w1") else shrink**2) for key, value in part.items()}
                for name, part in jet_distances(first, second).items()
            }
        )
        if classifier and number == 0:  # one is enough: it takes most of the time
            halves = first, second
    report = {
        "splits": splits,
        "seed": seed,
        "real": _summary(real),
        "generated": _summary(generated),
        "distances": [_distance_row(name, real, generated, values[name], [f[name] for f in floors]) for name in values],
    }
    if classifier:
        (auc, error), (floor, floor_error) = classifier_auc(real, generated, seed), classifier_auc(*halves, seed)
        report["classifier"] = {"auc": auc, "error": error, "floor": floor, "floor_error": floor_error}
    return report


def _summary(observables: JetObservables) -> dict[str, Any]:
    undefined = {name: int(np.isnan(values).sum()) for name, values in observables.scalars.items()}
    counts = np.bincount(observables.label[observables.label >= 0], minlength=len(CLASSES))
    return {
        "jets": len(observables),
        "constituents": int(observables.offsets[-1]),
        "empty": int((np.diff(observables.offsets) == 0).sum()),
        "classes": {name: int(n) for name, n in zip(CLASSES, counts, strict=True) if n},
        "undefined": {name: number for name, number in undefined.items() if number},
    }


def _distance_row(name, real, generated, values: dict[str, float], floors: list[dict[str, float]]) -> dict[str, Any]:
    title, unit = OBSERVABLES.get(name) or CONSTITUENTS[name]
    row: dict[str, Any] = {"observable": name, "name": title, "unit": unit}
    for which, sample in (("real", real), ("generated", generated)):
        v = sample.values(name)
        row[f"{which}_mean"], row[f"{which}_std"] = (float(v.mean()), float(v.std())) if len(v) else (np.nan, np.nan)
    row["w1_raw"] = values["w1_raw"]
    for key in _DISTANCES:
        known = np.array([f[key] for f in floors if np.isfinite(f[key])])
        row[key] = values[key]
        row[f"{key}_floor"] = float(known.mean()) if len(known) else float("nan")
        row[f"{key}_floor_spread"] = float(known.std()) if len(known) > 1 else float("nan")
    row["w1_over_floor"] = row["w1"] / row["w1_floor"] if row["w1_floor"] > 0 else float("nan")
    return row


def _heads(report: dict[str, Any]) -> list[str]:
    lines = []
    for name in ("real", "generated"):
        s = report[name]
        classes = ", ".join(f"{key} {number}" for key, number in s["classes"].items())
        empty = f", {s['empty']} of them empty" if s["empty"] else ""
        lines.append(
            f"{name}: {s['jets']} jets{f' ({classes})' if classes else ''}{empty}, {s['constituents']} constituents"
        )
    return lines


def _notes(report: dict[str, Any]) -> list[str]:
    """How to read the tables, and what else was measured."""
    notes = [
        "W1/std: Wasserstein-1 / std of the real jets; KL: in 30 quantile bins of the real jets; KL (alpha) and (NTP): "
        f"as arXiv:2403.05618 and arXiv:2512.04149 define it, {PUBLISHED_BINS} edges or bins. floor: the same between "
        f"two disjoint parts of the real jets, scaled to the sizes of the samples (mean of {report['splits']} random "
        "splits); at its floor a distance cannot be told from statistics."
    ]
    infinite = [row["name"] for row in report["distances"] if row["kl_ntp"] == np.inf]
    if infinite:
        notes.append(
            f"KL (NTP) is infinite by its definition where a bin has no generated value ({', '.join(infinite)}); KL "
            "adds half an entry to every bin, KL (alpha) 1e-8 to every density."
        )
    if "classifier" in report:
        c = report["classifier"]
        notes.append(
            f"Classifier on observables and the hardest constituents: AUC {c['auc']:.3f} +- {c['error']:.3f}, floor "
            f"{c['floor']:.3f} +- {c['floor_error']:.3f} (0.5: cannot be told apart)."
        )
    for name in ("real", "generated"):
        s = report[name]
        if s["undefined"]:
            which = ", ".join(f"{key} {number}" for key, number in s["undefined"].items())
            notes.append(f"{name.capitalize()} jets left out where the observable is undefined: {which}.")
    return notes


def format_report(report: dict[str, Any]) -> str:
    """The report as text."""
    return "\n\n".join(
        ["\n".join(_heads(report)), format_table(report["distances"], DISTANCE_COLUMNS), "\n".join(_notes(report))]
    )


def format_markdown(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    parts = [
        "# Real and generated jets",
        "\n".join(f"- {line}" for line in _heads(report)),
        _markdown_table(report["distances"], DISTANCE_COLUMNS),
        *_notes(report),
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


def _length(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < np.inf:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return value


def add_jet_arguments(parser: argparse.ArgumentParser) -> None:
    """Options on observables that the commands on jets share."""
    parser.add_argument("--max_jets", type=_positive, help="use at most so many jets of each sample")
    parser.add_argument(
        "--max_relative", type=_length, help="drop constituents farther than this from the axis in eta or phi (off)"
    )
    parser.add_argument("--max_constituents", type=_positive, help="keep the first ones of every jet (all)")
    parser.add_argument("--keep_mass", action="store_true", help="jets of constituents with their masses (massless)")
    parser.add_argument("--axes", choices=RECOMBINATIONS, default="E", help="recombination of the tau axes (E)")
    parser.add_argument(
        "--published_axes", action="store_true", help="tau with the pseudorapidity of the axes (their rapidity)"
    )


def add_sample_arguments(parser: argparse.ArgumentParser) -> None:
    """Options on samples that `evaluate` and `plot` share."""
    parser.add_argument("--real", nargs="+", required=True, metavar="FILES", help="Parquet files, folders or patterns")
    parser.add_argument("--generated", nargs="+", required=True, metavar="FILES", help="the same, jets of a model")
    parser.add_argument(
        "--classes", nargs="+", choices=CLASSES, metavar="CLASS", help="only real jets of these classes (all)"
    )
    add_jet_arguments(parser)
    parser.add_argument("--seed", type=int, default=0, help="of splits and classifier (0)")


def read_samples(args: argparse.Namespace) -> tuple[JetObservables, JetObservables]:
    """Observables of the two samples that the options of `add_sample_arguments` name."""
    options = {
        "max_jets": args.max_jets,
        "max_relative": args.max_relative,
        "max_constituents": args.max_constituents,
        "keep_mass": args.keep_mass,
        "recombination": args.axes,
        "pseudorapidity": args.published_axes,
    }
    return observe_files(args.real, args.classes, **options), observe_files(args.generated, **options)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hepzoo evaluate jets",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_sample_arguments(parser)
    parser.add_argument("--output", type=Path, nargs="+", default=[], metavar="FILE", help="write .json, .md or .csv")
    parser.add_argument("--splits", type=_positive, default=5, help="splits of the real jets for the floors (5)")
    parser.add_argument("--no_classifier", action="store_true", help="leave out the real-or-generated classifier")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `hepzoo evaluate jets`; returns the exit status."""
    parser = build_parser()
    args = parser.parse_args(argv)
    for path in args.output:
        if path.suffix not in (".json", ".md", ".csv"):
            parser.error(f"--output must end in .json, .md or .csv, got {path}")
    try:
        real, generated = read_samples(args)
        report = compare_jets(real, generated, args.splits, not args.no_classifier, args.seed)
        sys.stdout.write(format_report(report) + "\n")
        for path in args.output:
            sys.stdout.write(f"report written to {save_report(report, path)}\n")
    except (ValueError, OSError) as err:
        sys.stderr.write(f"hepzoo evaluate jets: {err}\n")
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
