"""Evaluate generators of jets as sets, as OmniLearned and EPiC were: distances with errors, JetNet metrics, particles.

Wasserstein-1 distances and divergences of observables and of every generated feature of the constituents, as means and
standard deviations over random draws; W1-M, W1-P, W1-EFP, coverage and MMD of JetNet; shares of particle types and
impact parameters; a classifier test, generated against real. For all jets and for every class. The floor of a distance
is the same between halves of the real jets.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hepzoo.evaluation.distances import two_sample_auc
from hepzoo.evaluation.evaluate_jets import add_sample_arguments, classifier_features
from hepzoo.evaluation.evaluate_showers import _markdown_table, _positive
from hepzoo.evaluation.jet_particles import (
    IMPACT_PARAMETERS,
    TRACKS,
    by_class,
    impact_parameters,
    known_columns,
    particle_features,
    read_particle_jets,
    type_shares,
)
from hepzoo.evaluation.jetnet import PUBLISHED_JETS, jetnet_metrics
from hepzoo.evaluation.jets import CONSTITUENTS, OBSERVABLES, JetObservables, Jets, observe
from hepzoo.evaluation.particlenet_distance import TYPES as JETNET_TYPES
from hepzoo.evaluation.particlenet_distance import frechet_particlenet_distance
from hepzoo.evaluation.resampled import resampled_distances, split_reversed_kl
from hepzoo.evaluation.tables import format_table, plain, write_text

EXAMPLES = """examples:
  Generated against held-out jets, all classes and each:
    hepzoo evaluate sets --real data/jets/test.parquet --generated generated --output sets.md sets.json
  As published for the EPiC flow (substructure with WTA axes), with pictures, coverage and MMD:
    hepzoo evaluate sets --real data/jets/test --generated generated --axes WTA_pt --draw_jets 50000 \\
        --emd_jets 100 --plots plots
  Top jets of JetNet, with FPND:
    hepzoo evaluate sets --real tops --generated generated --fpnd t --fpnd_files fpnd_resources/jetnet/30_particles
"""

NAMES = ("jet_pt", "jet_mass", "multiplicity", "tau21", "tau32", "d2", *CONSTITUENTS)
EXTRA = {**{name: (name.removeprefix("part_"), "mm") for name in TRACKS}, "part_charge": ("charge", "")}
EXTRA |= IMPACT_PARAMETERS
DISTANCE_COLUMNS = {
    "class": "class",
    "name": "observable",
    "unit": "unit",
    "w1": "W1",
    "w1_std": "+-",
    "w1_floor": "floor",
    "kl": "KL",
    "kl_std": "+-",
    "kl_floor": "floor",
    "reversed_kl": "KL(gen., real)",
    "reversed_kl_std": "+-",
}
JETNET = {
    "w1m": "W1-M",
    "w1p": "W1-P",
    "w1p_eta": "W1-P eta",
    "w1p_phi": "W1-P phi",
    "w1p_pt": "W1-P pT",
    "w1efp": "W1-EFP",
    "coverage": "coverage",
    "mmd": "MMD",
}
JETNET_GEV = {"w1m": "W1-M [GeV]", "w1p": "W1-P, pT in GeV", "w1p_pt": "W1-P pT [GeV]", "w1efp": "W1-EFP [GeV^4]"}
JETNET_COLUMNS = {"class": "class", "name": "metric", "value": "value", "std": "+-", "floor": "floor"}
CLASSIFIER_COLUMNS = {"class": "class", "features": "features", "jets": "jets of each", "auc": "AUC", "error": "+-"}
CLASSIFIED_JETS = 5000  # most jets of each sample
TYPE_COLUMNS = {
    "class": "class",
    "what": "share of constituents",
    "real": "real",
    "real_error": "+-",
    "generated": "generated",
    "generated_error": "+-",
    "pull": "difference / error",
}
IMPACT_COLUMNS = {
    "class": "class",
    "what": "charged constituents",
    "unit": "unit",
    "real": "real",
    "generated": "generated",
    "w1": "W1",
}


def compare_sets(
    real: Jets,
    generated: Jets,
    draws: int = 10,
    draw_jets: int | None = None,
    emd_jets: int = 0,
    emd_draws: int = 10,
    per_class: bool = True,
    classifier: bool = True,
    seed: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """All tables of the module.

    Args:
        real, generated (`Jets`): of `read_particle_jets`.
        draws (`int`): of `resampled_distances`; also splits of the reversed KL.
        draw_jets (`int`, *optional*): of a draw; default the smaller sample, at most 50 000.
        emd_jets, emd_draws (`int`): of coverage and MMD; 0 jets: without.
        per_class (`bool`): also every class that both samples have.
        classifier (`bool`): train the real-or-generated classifiers.
        options: of `observe`.

    Returns:
        `distances`, `jetnet`, `classifier`, `types`, `impact_parameters`: lists of rows; `real`, `generated`: numbers
        of jets.

    Raises:
        ValueError: a sample, or a class of it, has fewer than 20 jets.
    """
    samples = by_class(real, generated)
    samples = samples if per_class else {"all": samples["all"]}
    report: dict[str, Any] = {"real": len(real), "generated": len(generated), "draws": draws, "seed": seed}
    report |= {"distances": [], "jetnet": [], "classifier": []}
    rng = np.random.default_rng(seed)
    for name, pair in samples.items():
        for jets, which in zip(pair, ("real", "generated"), strict=True):
            if len(jets) < 20:
                raise ValueError(f"class {name}: {len(jets)} {which} jets, at least 20 are needed")
        order = rng.permutation(len(pair[0]))
        halves = [np.sort(part) for part in np.array_split(order, 2)]
        num_jets = draw_jets or min(PUBLISHED_JETS, *map(len, pair))
        observed = [observe(jets, **options) for jets in pair]
        report["distances"] += _distance_rows(name, observed, halves, draws, num_jets, seed)
        report["jetnet"] += _jetnet_rows(name, pair, halves, num_jets, emd_jets, emd_draws, seed)
        if classifier:
            report["classifier"] += _classifier_rows(name, pair, observed, seed)
    report["types"] = type_shares(samples)
    report["impact_parameters"] = impact_parameters(samples)
    return report


def _shrink(pair: Sequence, halves: list, num_jets: int) -> float:
    """Statistical error of the distance of a pair over that of the halves of its first, both from draws of a size."""
    first, second = ([1 / len(sample) + 1 / num_jets for sample in samples] for samples in (pair, halves))
    return float(np.sqrt(sum(first) / sum(second)))


def _distance_rows(class_name, observed, halves, draws, num_jets, seed) -> list[dict[str, Any]]:
    names = [*NAMES, *(name for name in EXTRA if all(name in o.constituents for o in observed))]
    values = resampled_distances(*observed, names, num_jets, draws, seed)
    floor = resampled_distances(*(observed[0].select(half) for half in halves), names, num_jets, draws, seed)
    shrink = _shrink(observed, halves, num_jets)
    # with clipped values all are in some bin: whether they are renormalised makes no difference
    variants = {
        "reversed_kl": {},
        "reversed_kl_clipped": {"clip": True},
        "reversed_kl_not_renormalised": {"renormalise": False},
    }
    divergences = {key: split_reversed_kl(*observed, names, draws, **chosen) for key, chosen in variants.items()}
    rows = []
    for name in names:
        title, unit = (OBSERVABLES | CONSTITUENTS | EXTRA)[name]
        row = {"class": class_name, "observable": name, "name": title, "unit": unit, **values[name]}
        row |= {"w1_floor": floor[name]["w1"] * shrink, "kl_floor": floor[name]["kl"] * shrink**2}
        for key, found in divergences.items():
            row[key], row[f"{key}_std"] = found[name]
        rows.append(row)
    return rows


def _jetnet_rows(class_name, pair, halves, num_jets, emd_jets, emd_draws, seed) -> list[dict[str, Any]]:
    rows = []
    shrink = _shrink(pair, halves, num_jets)
    for divide, titles in ((True, JETNET), (False, JETNET_GEV)):
        chosen = {"divide_pt": divide, "num_jets": num_jets, "seed": seed}
        if divide:
            chosen |= {"emd_jets": emd_jets, "emd_draws": emd_draws}
        values = jetnet_metrics(*pair, **chosen)
        floor = jetnet_metrics(*(pair[0].select(half) for half in halves), **chosen)
        rows += [
            {
                "class": class_name,
                "metric": key + ("" if divide else "_gev"),
                "name": title,
                "value": values[key],
                "std": values[f"{key}_std"],
                # draws of coverage and MMD are small: their size alone counts
                "floor": floor[key] * (shrink if key.startswith("w1") else 1),
            }
            for key, title in titles.items()
            if key in values
        ]
    return rows


def _classifier_rows(
    class_name: str, pair: tuple[Jets, Jets], observed: Sequence[JetObservables], seed: int
) -> list[dict[str, Any]]:
    """AUC on the kinematics, and on the kinematics with what the constituents are."""
    rng = np.random.default_rng(seed)
    size = min(*map(len, pair), CLASSIFIED_JETS)
    chosen = [rng.permutation(len(jets))[:size] for jets in pair]
    kinematics = [classifier_features(o.select(which)) for o, which in zip(observed, chosen, strict=True)]
    particles = [particle_features(jets.select(which)) for jets, which in zip(pair, chosen, strict=True)]
    features = {"kinematics": kinematics}
    if particles[0].shape[1]:
        both = zip(kinematics, particles, strict=True)
        features["kinematics, types, impact parameters"] = [np.hstack(arrays) for arrays in both]
    rows = []
    for title, (real, generated) in features.items():
        auc, error = two_sample_auc(real, generated, seed=seed)
        rows.append({"class": class_name, "features": title, "jets": size, "auc": auc, "error": error})
    return rows


def _notes(report: dict[str, Any]) -> list[str]:
    notes = [
        f"{report['real']} real and {report['generated']} generated jets. W1, KL (30 bins of equal parts of the real "
        f"sample): means and standard deviations over {report['draws']} draws of jets with replacement. floor: the "
        "same between halves of the real jets, scaled to the sizes of the samples. KL(gen., real): 100 bins of the "
        "real sample, values outside dropped and the rest normalised, as many disjoint splits as draws; its variants "
        "are in the JSON. JetNet metrics: pT of constituents over that of the jet unless in GeV."
    ]
    if report["classifier"]:
        notes.append(
            "Classifier test: boosted trees on features of the jets, five-fold cross-validated; 0.5: cannot be told "
            "apart. Networks that see the constituents, as published, find more."
        )
    if "fpnd" in report:
        found = report["fpnd"]
        notes.append(f"FPND to the {found['type']} jets of JetNet: {found['value']:.4g} ({found['jets']} jets).")
    return notes


def _tables(report: dict[str, Any]) -> list[tuple[str, list[dict[str, Any]], dict[str, str]]]:
    tables = [
        ("Observables and features", report["distances"], DISTANCE_COLUMNS),
        ("JetNet metrics", report["jetnet"], JETNET_COLUMNS),
        ("Classifier test", report["classifier"], CLASSIFIER_COLUMNS),
        ("Particle types", report["types"], TYPE_COLUMNS),
        ("Impact parameters", report["impact_parameters"], IMPACT_COLUMNS),
    ]
    return [table for table in tables if table[1]]


def format_report(report: dict[str, Any]) -> str:
    """The report as text."""
    parts = [f"{title}\n{format_table(rows, columns, 3)}" for title, rows, columns in _tables(report)]
    return "\n\n".join([*parts, *_notes(report)])


def format_markdown(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    parts = ["# Real and generated sets", *_notes(report)]
    for title, rows, columns in _tables(report):
        parts += [f"## {title}", _markdown_table(rows, columns)]
    return "\n\n".join(parts) + "\n"


def save_report(report: dict[str, Any], path: str | Path) -> Path:
    """Saves a report by file ending: `.json` all of it, `.md` the tables."""
    path = Path(path)
    if path.suffix == ".json":
        return write_text(path, json.dumps(plain(report), indent=2) + "\n")
    if path.suffix == ".md":
        return write_text(path, format_markdown(report))
    raise ValueError(f"{path}: the report is written as .json or .md, got {path.suffix or 'no ending'!r}")


def draw_plots(
    report: dict[str, Any],
    real: Jets,
    generated: Jets,
    folder: Path,
    ending: str = "png",
    per_class: bool = True,
    **options: Any,
) -> list[Path]:
    """Pictures of a report of `compare_sets`: observables of all jets and of every class, types, impact parameters."""
    from hepzoo.evaluation.plots_jets import plot_overview
    from hepzoo.evaluation.plots_sets import plot_impact_parameters, plot_particle_types

    samples = by_class(real, generated)
    samples = samples if per_class else {"all": samples["all"]}
    paths = []
    for name, pair in samples.items():
        title = f"{name}: {len(pair[0]):,} real, {len(pair[1]):,} generated jets"
        observed = [observe(jets, **options) for jets in pair]
        paths.append(plot_overview(*observed, folder / f"observables_{name}.{ending}", title=title))
    if report["types"]:
        paths.append(plot_particle_types(report, folder / f"particle_types.{ending}"))
    if report["impact_parameters"]:
        paths.append(plot_impact_parameters(samples, folder / f"impact_parameters.{ending}"))
    return paths


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hepzoo evaluate sets",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_sample_arguments(parser)
    parser.add_argument("--draws", type=_positive, default=10, help="random draws, and splits of the reversed KL (10)")
    parser.add_argument("--draw_jets", type=_positive, help="jets of a draw (the smaller sample, at most 50000)")
    parser.add_argument("--emd_jets", type=int, default=0, help="jets of a draw for coverage and MMD (0: without)")
    parser.add_argument("--emd_draws", type=_positive, default=10, help="draws for coverage and MMD (10)")
    parser.add_argument("--no_classes", action="store_true", help="only all jets together")
    parser.add_argument("--no_classifier", action="store_true", help="leave out the real-or-generated classifiers")
    parser.add_argument("--fpnd", choices=JETNET_TYPES, help="FPND to these jets of JetNet; needs --fpnd_files")
    parser.add_argument(
        "--fpnd_files",
        type=Path,
        metavar="FOLDER",
        help="network and statistics that the jetnet package brings in fpnd_resources/jetnet/30_particles",
    )
    parser.add_argument("--output", type=Path, nargs="+", default=[], metavar="FILE", help="write .json or .md")
    parser.add_argument(
        "--plots", type=Path, metavar="FOLDER", help="draw observables, particle types and impact parameters"
    )
    parser.add_argument("--format", default="png", choices=("png", "pdf", "svg"), help="of the pictures (png)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `hepzoo evaluate sets`; returns the exit status."""
    parser = build_parser()
    args = parser.parse_args(argv)
    for path in args.output:
        if path.suffix not in (".json", ".md"):
            parser.error(f"--output must end in .json or .md, got {path}")
    if args.emd_jets < 0:
        parser.error(f"--emd_jets must be at least 0, got {args.emd_jets}")
    if (args.fpnd is None) != (args.fpnd_files is None):
        parser.error("--fpnd and --fpnd_files belong together: a type of JetNet jets, and the folder of its network")
    options = {"keep_mass": args.keep_mass, "recombination": args.axes, "pseudorapidity": args.published_axes}
    try:
        columns = known_columns(args.real, args.generated)
        real, generated = (
            read_particle_jets(files, columns, classes, args.max_jets).cut(args.max_relative, args.max_constituents)
            for files, classes in ((args.real, args.classes), (args.generated, None))
        )
        fpnd = {}
        if args.fpnd is not None:
            distance = frechet_particlenet_distance(generated, args.fpnd, args.fpnd_files)
            fpnd = {"fpnd": {"type": args.fpnd, "value": distance, "jets": len(generated)}}
        report = compare_sets(
            real,
            generated,
            args.draws,
            args.draw_jets,
            args.emd_jets,
            args.emd_draws,
            not args.no_classes,
            not args.no_classifier,
            args.seed,
            **options,
        )
        report |= fpnd
        sys.stdout.write(format_report(report) + "\n")
        for path in args.output:
            sys.stdout.write(f"report written to {save_report(report, path)}\n")
        if args.plots is not None:
            for path in draw_plots(report, real, generated, args.plots, args.format, not args.no_classes, **options):
                sys.stdout.write(f"{path}\n")
    except (ValueError, OSError, ImportError) as err:
        sys.stderr.write(f"hepzoo evaluate sets: {' '.join(str(err).split())}\n")
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
