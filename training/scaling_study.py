"""
Scaling study of FM4NPP (arXiv:2508.14087): pre-trains models of several sizes for several numbers of steps, and fits a
power law to the validation error against compute.

Every run is one of `run_npp_pretraining.py`, with a schedule that ends at its own last step. Options that are not
listed here are passed on to it. Compute is 6 x parameters x points, the operations of forward and backward in the
matrices. The law is fitted to the runs that no other run beats with less compute. An interrupted study goes on with the
run that is missing.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

EXAMPLES = """\
examples:
  python training/scaling_study.py training/configs/fm4npp_small.yaml --sizes m1 m2 --steps 50 100 200 400 \\
      --train_file data/tpc/unlabeled --validation_file data/tpc/validation --bin_edges_events 500 --output runs/scaling
  more points on the same curve:
  python training/scaling_study.py training/configs/fm4npp_small.yaml --sizes m1 m2 m3 --steps 50 100 200 400 800 \\
      --train_file data/tpc/unlabeled --validation_file data/tpc/validation --bin_edges_events 500 --output runs/scaling
"""


def fit_power_law(compute: Sequence[float], error: Sequence[float]) -> dict[str, float]:
    """
    Least squares in logarithms of error = amplitude * compute ^ -exponent.

    Returns:
        `amplitude`, `exponent`, `exponent_error` (from the scatter about the line; NaN for two points).

    Raises:
        ValueError: fewer than two different computes, or a number that is not positive.
    """
    x, y = np.asarray(compute, np.float64), np.asarray(error, np.float64)
    for name, values in (("compute", x), ("error", y)):
        wrong = np.flatnonzero(~(np.isfinite(values) & (values > 0)))
        if len(wrong):
            raise ValueError(f"{name} {wrong[0]} is {values[wrong[0]]}, expected a positive number")
    if len(np.unique(x)) < 2:
        raise ValueError(f"a power law needs two different computes, got {len(np.unique(x))}")
    x, y = np.log(x), np.log(y)
    centered = x - x.mean()
    slope = float(centered @ y / (centered @ centered))
    offset = float(y.mean() - slope * x.mean())
    scatter = np.square(y - offset - slope * x).sum() / (len(x) - 2) if len(x) > 2 else np.nan
    return {
        "amplitude": float(np.exp(offset)),
        "exponent": -slope,
        "exponent_error": float(np.sqrt(scatter / (centered @ centered))),
    }


def best_runs(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs that no other run beats with less or the same compute, by ascending compute."""
    best: list[dict[str, Any]] = []
    for run in sorted(runs, key=lambda run: (run["compute"], run["error"])):
        if not best or run["error"] < best[-1]["error"]:
            best.append(run)
    return best


def run_one(size: str, steps: int, folder: Path, options: list[str]) -> dict[str, Any]:
    """
    Pre-trains one model unless it is there already.

    Returns:
        `size`, `steps`, `parameters`, `points`, `compute`, `error` (validation squared error per number), `copy_error`
        (of the trivial prediction), `seconds` of training.

    Raises:
        ValueError: the folder holds a run with other options.
    """
    from hepzoo.training import run_npp_pretraining

    output = folder / f"{size}_{steps}"
    arguments = [*options, "--paper_size", size, "--max_steps", str(steps), "--output_dir", str(output)]
    stored = output / "scaling_study.json"
    if stored.is_file():
        found = json.loads(stored.read_text())
        if found["options"] != options:
            raise ValueError(f"{output}: holds a run with other options, choose another --output")
        return found["run"]
    run_npp_pretraining.main(arguments)
    results = json.loads((output / "all_results.json").read_text())
    # the embedding is never trained and not multiplied
    from transformers import AutoModelForPreTraining

    parameters = AutoModelForPreTraining.from_pretrained(output).num_parameters(only_trainable=True)
    points = results["epoch"] * results["train_points"]
    run = {
        "size": size,
        "steps": steps,
        "parameters": parameters,
        "points": points,
        "compute": 6.0 * parameters * points,
        "error": results["eval_mse"],
        "copy_error": results["eval_mse_copy"],
        "seconds": results["train_runtime"],
    }
    partial = stored.with_name(stored.name + ".partial")
    partial.write_text(json.dumps({"options": options, "run": run}, indent=2) + "\n")
    partial.replace(stored)
    return run


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--sizes", nargs="+", default=["m1", "m2"], help="sizes by the paper's names (m1 m2)")
    parser.add_argument("--steps", nargs="+", type=int, default=[50, 100, 200, 400], help="steps of the runs")
    parser.add_argument("--output", type=Path, required=True, help="folder for the runs, scaling.json and scaling.png")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the study, prints its table; returns the exit status."""
    from hepzoo.evaluation.tables import format_table, plain, write_text

    arguments, options = build_parser().parse_known_args(argv)
    runs = []
    try:
        if min(arguments.steps) < 1:
            raise ValueError(f"--steps is {min(arguments.steps)}, expected at least 1")
        if not any(option == "--do_eval" or option.endswith((".yaml", ".yml", ".json")) for option in options):
            options.append("--do_eval")
        for size in arguments.sizes:
            for steps in sorted(arguments.steps):
                runs.append(run_one(size, steps, arguments.output, options))
        best = best_runs(runs)
        fit = fit_power_law(*([run[name] for run in best] for name in ("compute", "error"))) if len(best) > 1 else None
        report = {"runs": runs, "best": [[run["size"], run["steps"]] for run in best], "fit": fit}
        write_text(arguments.output / "scaling.json", json.dumps(plain(report), indent=2) + "\n")
        print(format_table(runs))
        if fit is None:
            print("no power law: one run is better than all that take more compute")
        else:
            print(f"error = {fit['amplitude']:.4g} * C^-({fit['exponent']:.4f} +- {fit['exponent_error']:.4f})")
        from hepzoo.evaluation.plots_tracking import plot_scaling

        plot_scaling(runs, fit, arguments.output / "scaling.png")
    except (ValueError, OSError, ImportError) as error:
        print(f"scaling_study.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
