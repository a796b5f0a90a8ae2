"""How many steps of which solver a flow-matching generator of jets needs: quality against evaluations of the network.

Jets of the classes, conditions and multiplicities of real ones are generated with every solver and number of steps,
always from the same noise, and compared with the real jets and with those of the reference setting (the published one).

Every distance is the Wasserstein-1 distance of an observable over the standard deviation of the real jets. Its floor
is the same between two random parts of one sample, scaled to its size. Since the noise is the same, a change against
the reference is due to the solver. The rule for "cannot be told from the reference": for every observable this change
is at most the mean floor of the reference jets plus two standard deviations of it over the splits. What passes depends
on the number of jets: more jets see smaller changes.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hepzoo.evaluation.distances import wasserstein
from hepzoo.evaluation.evaluate_showers import _markdown_table, _positive
from hepzoo.evaluation.jets import CONSTITUENTS, OBSERVABLES, JetObservables, as_jets, observe
from hepzoo.evaluation.tables import format_table, plain, write_text
from hepzoo.evaluation.tracks_dirc import expand_paths

SOLVERS = ("euler", "midpoint", "rk4", "dopri5")
STEPS = (4, 8, 16, 24, 32, 64, 100)
TOLERANCES = (1e-2, 1e-3, 1e-4)
PUBLISHED = {"epic_fm": ("midpoint", 99), "omnilearned": ("midpoint", 127)}
CALLS_PER_STEP = {"euler": 1, "midpoint": 2, "rk4": 4}
NAMES = ("jet_pt", "jet_mass", "tau21", "tau32", "d2", "part_etarel", "part_phirel", "part_ptrel")
# what some models generate besides the kinematics
FEATURES = {
    "part_d0val": ("d0", "mm"),
    "part_dzval": ("dz", "mm"),
    "part_charge": ("charge", ""),
}
TITLES = {name: title for name, (title, _) in (OBSERVABLES | CONSTITUENTS | FEATURES).items()}
SUMMARY_COLUMNS = {
    "solver": "solver",
    "setting": "steps or tolerance",
    "evaluations": "network calls",
    "seconds": "CPU s",
    "mean_w1": "mean W1/std to real",
    "worst_w1": "largest W1/floor to real",
    "worst_change": "largest change/limit",
    "worst_name": "of",
    "passes": "as the reference",
}

EXAMPLES = """examples:
  Table and picture of all solvers for a trained EPiC flow:
    hepzoo evaluate sampling-steps --model runs/epic --real data/jets/test.parquet --n_jets 1000 \\
        --output steps.md steps.json steps.png
  Only what is not dearer than the published setting, with the averaged weights:
    hepzoo evaluate sampling-steps --model runs/epic --ema --real data/jets/test.parquet --max_evaluations 200
"""


def load_generator(path: str, ema: bool = False, device: str = "cpu") -> tuple[Any, Any]:
    """
    Model in evaluation mode, and feature extractor.

    Raises:
        ValueError: the folder has no flow-matching generator.
    """
    from transformers import AutoConfig, AutoFeatureExtractor

    import hepzoo  # noqa: F401  registers the families
    from hepzoo.modeling.modeling_epic_fm import EpicFMForGeneration
    from hepzoo.modeling.modeling_omnilearned import OmniLearnedForGeneration

    classes = {"epic_fm": EpicFMForGeneration, "omnilearned": OmniLearnedForGeneration}
    folder = {"subfolder": "ema"} if ema else {}
    try:
        config = AutoConfig.from_pretrained(path, **folder)
        if config.model_type not in classes:
            expected = " or ".join(classes)
            raise ValueError(f"model type {config.model_type!r} is no generator of jet sets, expected {expected}")
        extractor = AutoFeatureExtractor.from_pretrained(path)
        model = classes[config.model_type].from_pretrained(path, **folder)
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from None
    return model.to(device).eval(), extractor


def read_rows(paths: Sequence[str], n_jets: int, seed: int) -> dict[str, list]:
    """Columns of `n_jets` random jets of Parquet files.

    Raises:
        ValueError: a file cannot be read, has other columns than the first, or there are fewer jets.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    from hepzoo.data_scripts.jets_schema import JETS_FEATURES

    tables = []
    for path in expand_paths(paths):
        try:
            table = pq.read_table(path)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]})") from None
        table = table.select([name for name in table.column_names if name in JETS_FEATURES])
        if tables and set(table.column_names) != set(tables[0].column_names):
            odd = sorted(set(table.column_names) ^ set(tables[0].column_names))[0]
            raise ValueError(f"{path}: column {odd} is not in all files")
        tables.append(table)
    table = pa.concat_tables(tables, promote_options="permissive")
    if len(table) < n_jets:
        raise ValueError(f"{len(table)} real jets, {n_jets} were asked for")
    return table.take(np.sort(np.random.default_rng(seed).permutation(len(table))[:n_jets])).to_pydict()


class Generator:
    """Generates jets for the classes, conditions and multiplicities of real ones, and observes both.

    Args:
        rows: columns of the real jets.
        seed (`int`): of the noise, the same for every setting.
    """

    def __init__(
        self, model: Any, extractor: Any, rows: Mapping[str, list], seed: int = 0, batch_size: int | None = None
    ):
        self.model, self.extractor, self.seed, self.batch_size = model, extractor, seed, batch_size
        encoded = dict(extractor(rows, return_tensors="pt"))
        particles, mask = encoded.pop("particles"), encoded["attention_mask"]
        if "class_ids" in encoded:
            encoded["labels"] = encoded.pop("class_ids")
        self.inputs = encoded
        self.real = self.observed(particles, mask)
        self.names = [*NAMES, *(name for name in FEATURES if name in self.real.constituents)]

    def observed(self, particles: Any, attention_mask: Any) -> JetObservables:
        """Observables of particles as the network sees them; real jets go the same way, cuts included."""
        about = ("labels", "conditions", "particle_ids", "additional_features")
        given = {name: self.inputs[name] for name in about if name in self.inputs}
        columns = self.extractor.batch_decode(particles, attention_mask, **given)
        # what is copied from the real jets says nothing about the model
        own = [name for name in FEATURES if name in getattr(self.extractor, "feature_names", ()) and name in columns]
        return observe(as_jets(columns, features=own))

    def generate(self, solver: str, setting: int | float) -> tuple[JetObservables, int, float]:
        """Observables, evaluations of the network, and CPU seconds; `setting`: steps, or tolerance of "dopri5"."""
        import torch

        how = {"rtol": setting, "atol": setting} if solver == "dopri5" else {"num_inference_steps": setting}
        noise = torch.Generator().manual_seed(self.seed)
        start = time.process_time()
        sample = self.model.generate(**self.inputs, solver=solver, generator=noise, batch_size=self.batch_size, **how)
        seconds = time.process_time() - start
        observed = self.observed(sample.particles.cpu(), sample.attention_mask.cpu())
        return observed, sample.num_function_evaluations, seconds


def distances(first: JetObservables, second: JetObservables, stds: Mapping[str, float]) -> dict[str, float]:
    """Wasserstein-1 distance over `stds` for every name in it; NaN where a sample lacks the observable."""
    found = {}
    for name, std in stds.items():
        values = first.values(name), second.values(name)
        found[name] = wasserstein(*values) / std if all(map(len, values)) else float("nan")
    return found


def floors(
    sample: JetObservables, stds: Mapping[str, float], splits: int, rng: np.random.Generator
) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation over random splits of the distance of two independent samples of this size."""
    half, found = len(sample) // 2, []
    for _ in range(splits):
        order = rng.permutation(len(sample))
        found.append(distances(sample.select(order[:half]), sample.select(order[half:]), stds))
    # halves are smaller than the sample
    scale = np.sqrt((2 / len(sample)) / (1 / half + 1 / (len(sample) - half)))
    values = {name: scale * np.array([f[name] for f in found]) for name in stds}
    return {name: (float(v.mean()), float(v.std())) for name, v in values.items()}


def _ratio(value: float, limit: float) -> float:
    """Infinite where an observable is missing, or differs although it has no spread."""
    if value == 0:
        return 0.0
    return value / limit if limit > 0 and np.isfinite(value) else float("inf")


def compare_settings(
    generator: Generator,
    settings: Sequence[tuple[str, int | float]],
    reference: tuple[str, int | float],
    splits: int = 20,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, Any]:
    """The table of the module.

    Args:
        settings: (solver, steps or tolerance).
        reference: the published setting.
        splits (`int`): of the floors, at least 2.

    Returns:
        `rows` (one per setting: `solver`, `setting`, `evaluations`, `seconds`, `w1` and `change` by observable, the
        summaries of `SUMMARY_COLUMNS`, `error` if no jets came out), `floors` of the real and `limits` of the reference
        jets by observable, `cheapest` (row number) and sizes.

    Raises:
        ValueError: fewer than 20 jets or 2 splits, or the reference cannot be generated.
    """
    from tqdm import tqdm

    real = generator.real
    if len(real) < 20 or splits < 2:
        raise ValueError(f"{len(real)} jets and {splits} splits, at least 20 and 2 are needed")
    stds = {name: float(real.values(name).std()) for name in generator.names if len(real.values(name))}
    stds = {name: std for name, std in stds.items() if std > 0}
    rng = np.random.default_rng(seed)
    real_floors = floors(real, stds, splits, rng)
    settings = list(dict.fromkeys([reference, *settings]))
    rows, limits = [], {}
    expected: JetObservables | None = None
    for solver, setting in tqdm(settings, unit=" settings", disable=not progress, leave=False):
        row: dict[str, Any] = {"solver": solver, "setting": setting, "reference": expected is None}
        try:
            jets, row["evaluations"], row["seconds"] = generator.generate(solver, setting)
        except (ValueError, RuntimeError) as error:
            if expected is None:
                raise ValueError(f"reference {solver} {setting}: {error}") from None
            rows.append(row | {"error": " ".join(str(error).split()), "passes": "no jets"})
            continue
        if expected is None:
            expected = jets
            limits = {name: mean + 2 * std for name, (mean, std) in floors(jets, stds, splits, rng).items()}
        row["w1"], row["change"] = distances(real, jets, stds), distances(expected, jets, stds)
        row["mean_w1"] = float(np.mean(list(row["w1"].values())))
        row["worst_w1"] = max(_ratio(value, real_floors[name][0]) for name, value in row["w1"].items())
        ratios = {name: _ratio(value, limits[name]) for name, value in row["change"].items()}
        worst = max(ratios, key=ratios.__getitem__)
        row["worst_change"], row["worst_name"] = ratios[worst], TITLES[worst] if ratios[worst] > 0 else "-"
        row["passes"] = "yes" if row["worst_change"] <= 1 else "no"
        rows.append(row)
    passing = [number for number, row in enumerate(rows) if row["passes"] == "yes"]
    return {
        "jets": len(real),
        "splits": splits,
        "seed": seed,
        "observables": {name: TITLES[name] for name in stds},
        "floors": {name: {"mean": mean, "std": std} for name, (mean, std) in real_floors.items()},
        "limits": limits,
        "rows": rows,
        "cheapest": min(passing, key=lambda number: (rows[number]["evaluations"], rows[number]["worst_change"])),
    }


def _cells(report: Mapping[str, Any]) -> tuple[list[dict], list[dict], dict[str, str]]:
    """Rows of the summary and of the distances, sorted by solver and cost, and the columns of the latter."""
    order = sorted(
        report["rows"], key=lambda row: (SOLVERS.index(row["solver"]), row.get("evaluations", 0), -row["setting"])
    )
    summary, table = [], []
    for row in order:
        setting = f"{row['setting']:g}" + (" (reference)" if row["reference"] else "")
        named = {"solver": row["solver"], "setting": setting}
        summary.append({key: row.get(key) for key in SUMMARY_COLUMNS} | named)
        table.append(named | {name: row.get("w1", {}).get(name) for name in report["observables"]})
    floor = {name: values["mean"] for name, values in report["floors"].items()}
    table.append({"solver": "floor", "setting": "real to real"} | floor)
    return summary, table, {"solver": "solver", "setting": "steps or tolerance", **report["observables"]}


def _notes(report: Mapping[str, Any]) -> list[str]:
    best = report["rows"][report["cheapest"]]
    reference = next(row for row in report["rows"] if row["reference"])
    what = "tolerance" if best["solver"] == "dopri5" else "steps"
    notes = [
        f"{report['jets']} jets of the classes, conditions and multiplicities of as many real ones, all settings from "
        "one noise. W1/std: Wasserstein-1 over the standard deviation of the real jets; floor: the same between two "
        f"independent real samples of this size (mean of {report['splits']} splits). change: W1/std between a setting "
        "and the reference; its limit: mean floor of the reference jets plus two standard deviations. A setting cannot "
        "be told from the reference if no observable changes by more than its limit.",
        f"Cheapest that cannot be told from {reference['solver']} with {reference['setting']:g} "
        f"({reference['evaluations']} network calls): {best['solver']}, {what} {best['setting']:g}, "
        f"{best['evaluations']} network calls.",
    ]
    notes += [
        f"{row['solver']} {row['setting']:g}: no jets ({row['error']})." for row in report["rows"] if "error" in row
    ]
    return notes


def format_report(report: Mapping[str, Any]) -> str:
    """The report as text."""
    summary, table, columns = _cells(report)
    parts = [format_table(summary, SUMMARY_COLUMNS, 3), format_table(table, columns, 3), *_notes(report)]
    return "\n\n".join(parts)


def format_markdown(report: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    summary, table, columns = _cells(report)
    parts = [
        "# Steps of the solver",
        _markdown_table(summary, SUMMARY_COLUMNS),
        "W1/std to the real jets:",
        _markdown_table(table, columns),
        *_notes(report),
    ]
    return "\n\n".join(parts) + "\n"


def save_report(report: Mapping[str, Any], path: str | Path) -> Path:
    """Saves a report by file ending: `.json` all of it, `.md` the tables, else a picture."""
    path = Path(path)
    if path.suffix == ".json":
        return write_text(path, json.dumps(plain(report), indent=2) + "\n")
    if path.suffix == ".md":
        return write_text(path, format_markdown(report))
    from hepzoo.evaluation.plots_sets import plot_sampling_steps

    return plot_sampling_steps(report, path)


def _setting(text: str) -> tuple[str, int | float]:
    """`midpoint:99` or `dopri5:1e-4`."""
    solver, _, value = text.partition(":")
    try:
        number = float(value) if solver == "dopri5" else int(value)
    except ValueError:
        number = 0
    if solver not in SOLVERS or not number > 0:
        raise argparse.ArgumentTypeError(f"expected a setting such as midpoint:99 or dopri5:1e-4, got {text!r}")
    return solver, number


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hepzoo evaluate sampling-steps",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="folder or Hub repository of a flow-matching generator of jets")
    parser.add_argument("--ema", action="store_true", help="use its averaged weights (sub-folder ema)")
    parser.add_argument("--real", nargs="+", required=True, metavar="FILES", help="Parquet files, folders or patterns")
    parser.add_argument("--n_jets", type=_positive, default=1000, help="random jets of the real ones (1000)")
    parser.add_argument("--solvers", nargs="+", choices=SOLVERS, default=list(SOLVERS), help="default: all")
    parser.add_argument(
        "--steps",
        nargs="+",
        type=_positive,
        default=list(STEPS),
        help="of the fixed-step solvers (4 8 16 24 32 64 100)",
    )
    parser.add_argument(
        "--tolerances", nargs="+", type=float, default=list(TOLERANCES), help="of dopri5 (0.01 0.001 0.0001)"
    )
    parser.add_argument("--reference", type=_setting, help="solver:steps (default: published for the family)")
    parser.add_argument("--max_evaluations", type=_positive, help="leave out fixed steps with more network calls")
    parser.add_argument("--splits", type=_positive, default=20, help="splits of a sample for its floors (20)")
    parser.add_argument("--batch_size", type=_positive, help="most jets at a time (default: as many as are fast)")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of jets, the noise and the splits (0)")
    parser.add_argument(
        "--output", type=Path, nargs="+", default=[], metavar="FILE", help="write .json, .md, or a .png, .pdf or .svg"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `hepzoo evaluate sampling-steps`; returns the exit status."""
    parser = build_parser()
    args = parser.parse_args(argv)
    for path in args.output:
        if path.suffix not in (".json", ".md", ".png", ".pdf", ".svg"):
            parser.error(f"--output must end in .json, .md, .png, .pdf or .svg, got {path}")
    if not all(0 < tolerance < 1 for tolerance in args.tolerances):
        parser.error(f"--tolerances must be between 0 and 1, got {args.tolerances}")
    try:
        model, extractor = load_generator(args.model, args.ema, args.device)
        rows = read_rows(args.real, args.n_jets, args.seed)
        generator = Generator(model, extractor, rows, args.seed, args.batch_size)
        settings = [
            (solver, steps)
            for solver in args.solvers
            if solver != "dopri5"
            for steps in args.steps
            if args.max_evaluations is None or steps * CALLS_PER_STEP[solver] <= args.max_evaluations
        ]
        if "dopri5" in args.solvers:
            settings += [("dopri5", tolerance) for tolerance in args.tolerances]
        reference = args.reference or PUBLISHED[model.config.model_type]
        report = compare_settings(generator, settings, reference, args.splits, args.seed, sys.stderr.isatty())
        report["model"] = {"path": str(args.model), "type": model.config.model_type}
        sys.stdout.write(format_report(report) + "\n")
        for path in args.output:
            sys.stdout.write(f"report written to {save_report(report, path)}\n")
    except (ValueError, OSError, ImportError) as error:
        sys.stderr.write(f"hepzoo evaluate sampling-steps: {' '.join(str(error).split())}\n")
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
