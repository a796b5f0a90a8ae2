"""
Transfer study of AspenOpenJets (arXiv:2412.10504): a generator that was pre-trained on jets A learns to generate jets B
from growing numbers of them, against the same network from scratch.

Every training is one of `run_clm.py`, to which options that are not listed here are passed on; the checkpoint with the
smallest validation loss is kept. The jets of every model are compared with test jets of B. The distances are fitted by
a power law of the number of jets. Beside them stand those of the pre-trained model as it is (0 jets), and of the test
jets that were only encoded and decoded, below which no generator of these tokens can come. An interrupted study goes
on with the run that is missing.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hepzoo.training.scaling_study import fit_power_law

EXAMPLES = """\
examples:
  QCD jets to tops
    python training/transfer_study.py training/configs/omnijet_small.yaml --tokenizer_name runs/tokenizer \\
        --pretrain_file QCD_train.parquet --train_file Tbqq_train.parquet --validation_file Tbqq_val.parquet \\
        --test_file Tbqq_test.parquet --jets 100 300 1000 3000 --seeds 1 2 3 --output runs/transfer
  from a generator that is there already, with fewer steps and a smaller rate than its own training
    python training/transfer_study.py training/configs/omnijet_small.yaml --pretrained runs/aspen \\
        --train_file Tbqq_train.parquet --validation_file Tbqq_val.parquet --test_file Tbqq_test.parquet \\
        --jets 100 1000 --max_steps 400 --learning_rate 1e-3 --output runs/transfer
"""

SCRATCH, FINE_TUNED = "from scratch", "fine-tuned"
# evaluations of a training, of which the best is kept
EVALUATIONS = 6
RECORD = "transfer_study.json"


def distances(real: Any, generated: Any) -> dict[str, dict[str, float]]:
    """
    Distances of the observables of the study between two samples (`JetObservables`).

    Returns:
        name -> `w1` (Wasserstein-1 / standard deviation of the real jets), `kl` (quantile-KL, nats), and `w1_floor`,
        `kl_floor`, the same between parts of the real jets; under "mean" their means over the observables.
    """
    from hepzoo.evaluation.evaluate_jets import compare_jets
    from hepzoo.evaluation.plots_jets import TRANSFER

    rows = {row["observable"]: row for row in compare_jets(real, generated, classifier=False)["distances"]}
    found = {name: {key: rows[name][key] for key in ("w1", "w1_floor", "kl", "kl_floor")} for name in TRANSFER}
    found["mean"] = {key: float(np.mean([part[key] for part in found.values()])) for key in ("w1", "w1_floor")}
    return found


class Study:
    """
    Args:
        options: of `run_clm.py`, a configuration file first.
        arguments: of the command line.
    """

    def __init__(self, arguments: argparse.Namespace, options: list[str]):
        self.arguments = arguments
        self.options = options
        self._real: Any = None

    def train(self, files: list[str], folder: Path, *extra: str):
        """One run of `run_clm.py` on the files."""
        from hepzoo.training import run_clm

        flags = ["--train_file", *files, *extra, "--do_train", "--do_eval", "--output_dir", str(folder)]
        run_clm.main([*self.options, *flags])

    def pretrained(self) -> Path:
        """Folder of the pre-trained generator, which is trained unless it is there."""
        if self.arguments.pretrained is not None:
            return self.arguments.pretrained
        folder = self.arguments.output / "pretrained"
        if read_record(folder, self.description(seed=self.arguments.seeds[0])) is None:
            seed = str(self.arguments.seeds[0])
            self.train(self.arguments.pretrain_file, folder, "--validation_split_percentage", "5", "--seed", seed)
            write_record(folder, self.description(seed=self.arguments.seeds[0]), {})
        return folder

    def run(self, mode: str, jets: int, seed: int) -> dict[str, Any]:
        """`mode`, `jets`, `seed`, `eval_loss` and the `distances` of one model; trained unless it is there."""
        folder = self.arguments.output / f"{mode.replace(' ', '_')}_{jets}_{seed}"
        description = self.description(mode=mode, jets=jets, seed=seed)
        found = read_record(folder, description)
        if found is not None:
            return found
        steps = max(1, self.steps() // EVALUATIONS)
        flags = ["--validation_file", *self.arguments.validation_file, "--max_train_samples", str(jets)]
        flags += ["--seed", str(seed), "--data_seed", str(seed), "--load_best_model_at_end", "true"]
        flags += ["--eval_strategy", "steps", "--eval_steps", str(steps), "--save_strategy", "steps"]
        flags += ["--save_steps", str(steps), "--save_total_limit", "1", "--metric_for_best_model", "eval_loss"]
        if mode == FINE_TUNED:
            flags += ["--model_name_or_path", str(self.pretrained())]
        elif "--tokenizer_name" not in self.options:
            flags += ["--tokenizer_name", str(self.pretrained())]
        self.train(self.arguments.train_file, folder, *flags)
        results = json.loads((folder / "all_results.json").read_text())
        if results["train_samples"] != jets:
            raise ValueError(f"--jets {jets}: there are only {results['train_samples']} jets to train on")
        found = {"mode": mode, "jets": jets, "seed": seed, "eval_loss": results["eval_loss"]}
        found["distances"] = self.distances_of(folder, seed)
        write_record(folder, description, found)
        return found

    def steps(self) -> int:
        """`--max_steps` as `run_clm.py` will understand it."""
        from hepzoo.training import run_clm
        from hepzoo.training.common import parse_arguments
        from hepzoo.training.data import InputError

        *_, training_args = parse_arguments(run_clm.build_parser(), [*self.options, "--output_dir", "unused"])
        if training_args.max_steps < 1:
            raise InputError("--max_steps is not set: equal numbers of steps make the runs comparable")
        return training_args.max_steps

    def description(self, **run: Any) -> dict[str, Any]:
        """What decides about a run; a record of another one is refused."""
        names = ("pretrain_file", "train_file", "validation_file", "test_file", "n_generated", "max_relative")
        files = {name: getattr(self.arguments, name) for name in (*names, "pretrained")}
        return json.loads(json.dumps({"options": self.options, **files, **run}, default=str))

    # --- what the jets look like -------------------------------------------------------------------------------------

    def real(self, tokenizer: Any) -> Any:
        """Observables of the test jets, cut as the tokenizer cuts them."""
        from hepzoo.evaluation.jets import observe_files

        if self._real is None:
            self._real = observe_files(
                self.arguments.test_file,
                max_relative=self.arguments.max_relative,
                max_constituents=tokenizer.model_max_length,
            )
        return self._real

    def distances_of(self, folder: Path, seed: int) -> dict[str, dict[str, float]]:
        """Distances between the test jets and jets that the model of a folder generates."""
        import torch
        from transformers import AutoModelForCausalLM

        from hepzoo.evaluation.jets import observe
        from hepzoo.training.generate_jets import make_jets
        from hepzoo.training.tokenize_jets import load_jet_tokenizer

        device = "cuda" if torch.cuda.is_available() and "--use_cpu" not in self.options else "cpu"
        tokenizer = load_jet_tokenizer(str(folder))
        tokenizer.vqvae.to(device)
        model = AutoModelForCausalLM.from_pretrained(folder).to(device).eval()
        real = self.real(tokenizer)
        # none of the observables depends on the direction of the jets
        axes = np.zeros((self.arguments.n_generated or len(real), 2))
        torch.manual_seed(seed)
        columns, _ = make_jets(model, tokenizer, axes, tokenizer.model_max_length, batch_size=256)
        return distances(real, observe(columns))

    def distances_of_tokens(self, folder: Path) -> dict[str, dict[str, float]]:
        """Distances between the test jets and the same jets encoded and decoded."""
        from hepzoo.evaluation.jets import observe
        from hepzoo.evaluation.tracks_dirc import expand_paths
        from hepzoo.tokenization.jet_features import FOUR_MOMENTUM
        from hepzoo.training.tokenize_jets import load_jet_tokenizer, read_batches, reconstruct_jets

        tokenizer = load_jet_tokenizer(str(folder))
        names = {*FOUR_MOMENTUM, *tokenizer.feature_names}
        decoded: dict[str, list] = {"part_px": [], "part_py": [], "part_pz": [], "part_energy": []}
        for place, columns in read_batches(expand_paths(self.arguments.test_file), names, 1000, None):
            try:
                rows = reconstruct_jets(tokenizer, columns)
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from None
            for name, values in decoded.items():
                values.extend(rows[name])
        return distances(self.real(tokenizer), observe(decoded))


def read_record(folder: Path, description: dict[str, Any]) -> dict[str, Any] | None:
    """
    Results of a finished run, `None` if there are none.

    Raises:
        ValueError: they are those of a run with other options.
    """
    path = folder / RECORD
    if not path.is_file():
        return None
    stored = json.loads(path.read_text())
    changed = sorted(name for name in description if stored["description"].get(name) != description[name])
    if changed:
        raise ValueError(f"{folder}: holds a run with another {', '.join(changed)}; choose another --output")
    return stored["results"]


def write_record(folder: Path, description: dict[str, Any], results: dict[str, Any]):
    from hepzoo.evaluation.tables import plain, write_text

    write_text(folder / RECORD, json.dumps(plain({"description": description, "results": results}), indent=2) + "\n")


def fit_runs(runs: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """
    Power laws W1 = amplitude * jets ^ -exponent of all runs of a mode: mode -> observable -> `amplitude`, `exponent`,
    `exponent_error`. Empty with fewer than two numbers of jets.
    """
    fits: dict[str, dict[str, dict[str, float]]] = {}
    if len({run["jets"] for run in runs}) < 2:
        return fits
    for mode in (SCRATCH, FINE_TUNED):
        own = [run for run in runs if run["mode"] == mode]
        fits[mode] = {
            name: fit_power_law([run["jets"] for run in own], [run["distances"][name]["w1"] for run in own])
            for name in own[0]["distances"]
        }
    return fits


def table_rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """One line per mode and number of jets: means over the seeds, and what they are compared with."""
    groups: dict[tuple[str, int | str], list[dict]] = {("tokens alone", "-"): [{"distances": report["tokens"]}]}
    groups["pre-trained", 0] = [{"distances": report["pretrained"]}]
    for run in report["runs"]:
        groups.setdefault((run["mode"], run["jets"]), []).append(run)
    rows = []
    for (mode, jets), runs in groups.items():
        row: dict[str, Any] = {"mode": mode, "jets": jets, "seeds": len(runs) if "seed" in runs[0] else "-"}
        losses = [run["eval_loss"] for run in runs if "eval_loss" in run]
        row["eval_loss"] = float(np.mean(losses)) if losses else math.nan
        for name in report["tokens"]:
            row[name] = float(np.mean([run["distances"][name]["w1"] for run in runs]))
        rows.append(row)
    floor = {name: part["w1_floor"] for name, part in report["pretrained"].items()}
    return [*rows, {"mode": "floor", "jets": "-", "seeds": "-", "eval_loss": math.nan, **floor}]


def format_fits(fits: dict[str, dict[str, dict[str, float]]]) -> list[dict[str, str]]:
    """The exponents, one line per mode."""

    def text(law: dict[str, float]) -> str:
        error = law["exponent_error"]
        return f"{law['exponent']:.2f}" + ("" if math.isnan(error) else f" +- {error:.2f}")

    return [{"W1 ~ jets^-g": mode, **{name: text(law) for name, law in laws.items()}} for mode, laws in fits.items()]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="transfer_study.py",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--pretrain_file", nargs="+", help="jets A: files, folders or patterns")
    source.add_argument("--pretrained", type=Path, help="a generator that was pre-trained on jets A")
    parser.add_argument("--train_file", nargs="+", required=True, help="jets B to draw the training jets from")
    parser.add_argument("--validation_file", nargs="+", required=True, help="jets B that choose the checkpoints")
    parser.add_argument("--test_file", nargs="+", required=True, help="jets B to compare with (Parquet)")
    parser.add_argument("--jets", nargs="+", type=int, default=[100, 1000, 10000], help="numbers of training jets")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1], help="one run each: draws of jets, weights, order")
    parser.add_argument("--n_generated", type=int, help="jets to generate per model (default: as many as test jets)")
    parser.add_argument(
        "--max_relative", type=float, default=0.8, help="cut of the test jets about their axis, as of the tokenizer"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for runs, transfer.json and transfer.png")
    return parser


def check_arguments(arguments: argparse.Namespace):
    for name in ("jets", "seeds", "n_generated"):
        values, least = getattr(arguments, name), 0 if name == "seeds" else 4 if name == "n_generated" else 1
        for value in values if isinstance(values, list) else [] if values is None else [values]:
            if value < least:
                raise ValueError(f"--{name} is {value}, expected at least {least}")
    if not arguments.max_relative > 0:
        raise ValueError(f"--max_relative is {arguments.max_relative}, expected above 0")


def run(arguments: argparse.Namespace, options: list[str]) -> dict[str, Any]:
    """The study: `runs`, `pretrained` and `tokens` (distances), `fits`."""
    check_arguments(arguments)
    study = Study(arguments, options)
    study.steps()
    folder = study.pretrained()
    record = arguments.output / "references"
    description = study.description()
    references = read_record(record, description)
    if references is None:
        references = {"pretrained": study.distances_of(folder, seed=0), "tokens": study.distances_of_tokens(folder)}
        write_record(record, description, references)
    runs = [
        study.run(mode, jets, seed)
        for seed in arguments.seeds
        for jets in sorted(set(arguments.jets))
        for mode in (SCRATCH, FINE_TUNED)
    ]
    return {**references, "runs": runs, "fits": fit_runs(runs)}


def main(argv: list[str] | None = None) -> int:
    """Runs the study, prints and writes its tables, draws the distances; returns the exit status."""
    arguments, options = build_parser().parse_known_args(argv)
    from hepzoo.evaluation.tables import format_table, plain, write_text

    try:
        report = run(arguments, options)
        write_text(arguments.output / "transfer.json", json.dumps(plain(report), indent=2) + "\n")
        print(format_table(table_rows(report), digits=3))
        if report["fits"]:
            print()
            print(format_table(format_fits(report["fits"])))
        from hepzoo.evaluation.plots_jets import plot_transfer

        print(plot_transfer(report, arguments.output / "transfer.png"))
    except (ValueError, OSError, ImportError) as error:
        print(f"transfer_study.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
