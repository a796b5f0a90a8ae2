"""
Comparison of pre-training objectives for jets (arXiv:2606.14870): OmniLearned is pre-trained with {classes, flow
matching, masked particles, classes + masked, classes + flow, all three} for the same number of jets, and fine-tuned

* to tell one class of jets from another, with growing numbers of labels, and
* to generate jets of these classes, given class, pT, eta and multiplicity,

beside a network from scratch. Fine-tuning is repeated with several seeds, of the labels drawn, of what starts from
scratch and of the batches. Tables go to standard output, `results.json` and a plot into the output folder.

An interrupted study goes on with the run that is missing; more seeds can be asked for later.
"""

import argparse
import json
import logging as python_logging
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hepzoo.tokenization.jet_features import FOUR_MOMENTUM
from hepzoo.training.generation_common import check_at_least, check_metadata

EXAMPLES = """\
examples:
  the micro network of the paper
  python training/compare_pretraining.py --size micro --pretraining_file data/jetclass/train \\
      --finetuning_file data/top/train --pretraining_steps 20000 --labels 1000 10000 100000 --output runs/comparison
  on a CPU in less than an hour
  python training/compare_pretraining.py --size micro --config_overrides num_hidden_layers=2,num_head_layers=1 \\
      --pretraining_file QCD_000.parquet Tbqq_000.parquet Wqq_000.parquet --max_num_particles 30 \\
      --finetuning_file QCD_001.parquet Tbqq_001.parquet --cpu --output runs/comparison
"""

# name -> objectives of `OmniLearnedForPreTraining`; nothing: from scratch
STARTS: dict[str, tuple[str, ...]] = {
    "scratch": (),
    "classifier": ("classification",),
    "flow": ("generation",),
    "masked": ("masked",),
    "classifier+masked": ("classification", "masked"),
    "classifier+flow": ("classification", "generation"),
    "all": ("classification", "generation", "masked"),
}
CONDITIONS = ["jet_pt", "jet_eta", "jet_nparticles"]
# observables of the generated jets in the table, as of the paper, and what they are divided by: see `run_generation`
GENERATED = ("jet_mass", "tau21", "tau32", "part_pt", "part_etarel")
VALIDATIONS = 5  # in a fine-tuning; the state with the least loss is kept
MEDIAN_JETS = 1000  # that the head for masked particles takes its start from
SPLIT_SEED = 0


@dataclass
class Sample:
    """Jets: `rows` as columns of the files, `jets` as the network reads them (one dictionary each)."""

    rows: dict[str, Any]
    jets: list[dict[str, Any]]

    def __len__(self) -> int:
        return len(self.jets)

    def take(self, which: np.ndarray) -> "Sample":
        rows = {name: [values[k] for k in which] for name, values in self.rows.items()}
        return Sample(rows, [self.jets[k] for k in which])


class KeepBest:
    """Trainer callback: the weights with the least validation loss, in memory."""

    def __new__(cls):
        from transformers import TrainerCallback

        class Callback(TrainerCallback):
            loss = np.inf
            weights: dict[str, Any] | None = None

            def on_evaluate(self, args, state, control, model=None, metrics=None, **kwargs):
                if metrics["eval_loss"] < self.loss:
                    self.loss = metrics["eval_loss"]
                    self.weights = {name: values.clone() for name, values in model.state_dict().items()}

        return Callback()


# ---------------------------------------------------------------------------------------------------------------------
# Jets
# ---------------------------------------------------------------------------------------------------------------------


def read_jets(patterns: Sequence[str], option: str, extractor: Any, max_jets: int | None) -> Sample:
    """
    Jets of Parquet files, as the extractor reads them; `max_jets` of them at random.

    Raises:
        ValueError: naming file, row and field.
    """
    from hepzoo.training.jet_sets import read_jet_files

    columns = read_jet_files(list(patterns), option, extractor)
    count = len(columns[FOUR_MOMENTUM[0]])
    if max_jets is not None and max_jets < count:
        chosen = np.sort(np.random.default_rng(SPLIT_SEED).permutation(count)[:max_jets])
        columns = {name: [values[k] for k in chosen] for name, values in columns.items()}
    try:
        encoded = extractor(columns, padding=False)
    except ValueError as error:
        raise ValueError(f"--{option}: {error}") from None
    names = list(encoded)
    return Sample(columns, [dict(zip(names, values)) for values in zip(*(encoded[name] for name in names))])


def split_sample(sample: Sample, sizes: Sequence[int]) -> list[Sample]:
    """Parts of the given sizes, drawn once and for all, and the rest."""
    order = np.random.default_rng(SPLIT_SEED).permutation(len(sample))
    if sum(sizes) >= len(sample):
        raise ValueError(f"--finetuning_file: {len(sample)} jets, expected more than {sum(sizes)}")
    return [sample.take(part) for part in np.split(order, np.cumsum(sizes))]


def balanced_choice(sample: Sample, size: int, seed: int) -> Sample:
    """`size` jets, as many of every class, drawn by `seed`."""
    classes = np.array([jet["class_ids"] for jet in sample.jets])
    rng = np.random.default_rng([SPLIT_SEED, seed, size])
    known = np.unique(classes)
    chosen = []
    for index, class_id in enumerate(known):
        share = (size + index) // len(known)
        members = np.flatnonzero(classes == class_id)
        if share > len(members):
            raise ValueError(f"{size} jets need {share} of class {class_id}, there are {len(members)} to train with")
        chosen.append(rng.permutation(members)[:share])
    return sample.take(rng.permutation(np.concatenate(chosen)))


# ---------------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------------


def train(
    model: Any, extractor: Any, sample: Sample, arguments: argparse.Namespace, folder: Path, **options: Any
) -> dict[str, Any]:
    """
    Train in place by `Trainer`; with a `validation` sample the weights of the least validation loss stay.

    Args:
        options: `steps`, `learning_rate`, `seed`; optionally `validation`, `new_layers`, `lr_factor`, `batch_size`.

    Returns:
        `seconds`, `train_loss` (of the last tenth), and with a validation sample `validation_loss`.
    """
    from transformers import PrinterCallback, TrainingArguments

    from hepzoo.training.jet_sets import JetSetTrainer, renamed

    steps, validation = options["steps"], options.get("validation")
    batch_size = min(options.get("batch_size", arguments.batch_size), len(sample))
    evaluation = {"eval_strategy": "steps", "eval_steps": max(1, steps // VALIDATIONS)} if validation else {}
    best = KeepBest()
    trainer = JetSetTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            per_device_eval_batch_size=256,
            learning_rate=options["learning_rate"],
            weight_decay=arguments.weight_decay,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,
            seed=options["seed"],
            logging_steps=max(1, steps // 10),
            save_strategy="no",
            remove_unused_columns=False,
            label_names=[],
            prediction_loss_only=True,
            use_cpu=arguments.cpu,
            dataloader_pin_memory=not arguments.cpu,
            disable_tqdm=True,
            **evaluation,
        ),
        train_dataset=sample.jets,
        eval_dataset=None if validation is None else validation.jets,
        data_collator=lambda jets: renamed(extractor.pad(jets, return_tensors="pt"), extractor),
        callbacks=[best],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.can_return_loss = True
    trainer.lion = {"betas": (0.95, 0.98)}
    trainer.new_layers = tuple(options.get("new_layers", ()))
    trainer.head_lr_factor = options.get("lr_factor", 1.0)
    start = time.perf_counter()
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    result = {"seconds": time.perf_counter() - start, "train_loss": losses[-1]}
    if best.weights is not None:
        model.load_state_dict(best.weights)
        result["validation_loss"] = best.loss
    return result


def make_config(arguments: argparse.Namespace, extractor: Any, **settings: Any) -> Any:
    """Configuration of the size, for the inputs of the extractor."""
    from hepzoo.modeling.configuration_omnilearned import OmniLearnedConfig
    from hepzoo.training.data import parse_assignments

    overrides = parse_assignments(arguments.config_overrides, "config_overrides")
    return OmniLearnedConfig.from_paper_size(arguments.size, **{**extractor.model_settings(), **overrides, **settings})


def run_pretraining(name: str, arguments: argparse.Namespace, extractor: Any, sample: Sample, folder: Path) -> dict:
    """Pre-train with the objectives of `STARTS[name]`; the model is saved in `folder`."""
    from transformers import set_seed

    from hepzoo.modeling.modeling_omnilearned import OmniLearnedForPreTraining

    set_seed(arguments.pretraining_seed)
    config = make_config(arguments, extractor, objectives=list(STARTS[name]), use_time="generation" in STARTS[name])
    model = OmniLearnedForPreTraining(config)
    if "masked" in config.objectives and not config.codebook_size:
        chosen = np.random.default_rng(SPLIT_SEED).permutation(len(sample))[:MEDIAN_JETS]
        jets = extractor.pad([sample.jets[k] for k in chosen], return_tensors="pt")
        model.start_at_medians(jets["particles"], jets["attention_mask"])
    result = train(
        model,
        extractor,
        sample,
        arguments,
        folder,
        steps=arguments.pretraining_steps,
        learning_rate=arguments.learning_rate,
        seed=arguments.pretraining_seed,
    )
    model.save_pretrained(folder)
    return {**result, "parameters": model.num_parameters()}


def start_model(
    model_class: type, name: str, arguments: argparse.Namespace, extractor: Any, folder: Path, new_layers, **settings
) -> tuple[Any, float]:
    """The model to fine-tune, and the learning rate: pre-trained networks take a part of that from scratch."""
    from hepzoo.training.common import ModelArguments
    from hepzoo.training.jet_sets import load_set_model

    config = make_config(arguments, extractor, **settings)
    if not STARTS[name]:
        return load_set_model(model_class, ModelArguments(), config), arguments.learning_rate
    checkpoint = ModelArguments(model_name_or_path=str(folder / "pretrained" / name))
    model = load_set_model(model_class, checkpoint, config, new_layers)
    return model, arguments.learning_rate * arguments.finetuning_lr_factor


def run_tagging(
    name: str, arguments: argparse.Namespace, extractor: Any, parts: Mapping[str, Sample], folder: Path, labels, seed
) -> dict:
    """Fine-tune with `labels` jets and measure on the test jets: `auc`, `accuracy`, `rejection_at_...`."""
    import torch
    from scipy.special import softmax
    from transformers import set_seed

    from hepzoo.evaluation.metric_tagging import tagging_metrics
    from hepzoo.modeling.modeling_omnilearned import OmniLearnedForSequenceClassification
    from hepzoo.training.jet_sets import renamed

    set_seed(seed)
    model, rate = start_model(
        OmniLearnedForSequenceClassification, name, arguments, extractor, folder, ("classifier.out.",)
    )
    steps = min(arguments.finetuning_steps, max(1, labels * arguments.finetuning_epochs // arguments.batch_size))
    result = train(
        model,
        extractor,
        balanced_choice(parts["train"], labels, seed),
        arguments,
        folder / "scratch",
        steps=steps,
        learning_rate=rate,
        seed=seed,
        validation=parts["validation"],
        new_layers=getattr(model, "new_weights", ()),
        lr_factor=arguments.head_lr_factor if STARTS[name] else 1.0,
        # several steps per pass over few labels
        batch_size=max(1, min(arguments.batch_size, labels // 4)),
    )
    model.eval()
    logits = []
    test = parts["test"]
    with torch.no_grad():
        for begin in range(0, len(test), 256):
            batch = renamed(extractor.pad(test.jets[begin : begin + 256], return_tensors="pt"), extractor)
            batch = {key: values.to(model.device) for key, values in batch.items()}
            logits.append(model(**batch).logits.float().cpu().numpy())
    classes = np.array([jet["class_ids"] for jet in test.jets])
    found = tagging_metrics(softmax(np.concatenate(logits), axis=1), classes)
    # where no background jet passes, what one would give
    most = float((classes == 0).sum())
    found = {key: min(value, most) if key.startswith("rejection") else value for key, value in found.items()}
    return {**result, "steps": steps, **found}


def run_generation(
    name: str, arguments: argparse.Namespace, extractor: Any, parts: Mapping[str, Sample], folder: Path, seed: int
) -> dict:
    """
    Fine-tune for generation, draw jets for the classes and conditions of test jets, and compare with these.

    Returns:
        `w1_<observable>` in its unit, `ratio_<observable>` over the distance of two halves of the test jets scaled to
        the sample sizes, and `ratio`, the geometric mean of these.
    """
    import torch
    from transformers import set_seed

    from hepzoo.evaluation.evaluate_jets import compare_jets
    from hepzoo.evaluation.jets import observe
    from hepzoo.modeling.modeling_omnilearned import OmniLearnedForGeneration

    set_seed(seed)
    model, rate = start_model(
        OmniLearnedForGeneration, name, arguments, extractor, folder, ("generator.out.",), use_time=True
    )
    result = train(
        model,
        extractor,
        balanced_choice(parts["train"], arguments.generation_jets, seed),
        arguments,
        folder / "scratch",
        steps=arguments.generation_steps,
        learning_rate=rate,
        seed=seed,
        validation=parts["validation"],
        new_layers=getattr(model, "new_weights", ()),
        lr_factor=arguments.head_lr_factor if STARTS[name] else 1.0,
    )
    test = parts["test"].take(np.arange(min(arguments.num_generated, len(parts["test"]))))
    batch = extractor.pad(test.jets, return_tensors="pt")
    sample = model.eval().generate(
        attention_mask=batch["attention_mask"],
        labels=batch["class_ids"],
        conditions=batch["conditions"],
        num_inference_steps=arguments.num_inference_steps,
        generator=torch.Generator().manual_seed(seed),
    )
    about = {"labels": batch["class_ids"], "conditions": batch["conditions"]}
    generated = extractor.batch_decode(sample, **about)
    # the real jets as the network sees them: cut to the hardest particles
    real = extractor.batch_decode(batch["particles"], batch["attention_mask"], **about)
    report = compare_jets(observe(real), observe(generated), classifier=False)
    rows = {row["observable"]: row for row in report["distances"]}
    found = {f"w1_{key}": rows[key]["w1_raw"] for key in GENERATED}
    found |= {f"ratio_{key}": rows[key]["w1_over_floor"] for key in GENERATED}
    ratio = float(np.exp(np.mean([np.log(rows[key]["w1_over_floor"]) for key in GENERATED])))
    return {**result, **found, "ratio": ratio}


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------


def summarise(runs: Mapping[str, dict], arguments: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Means and sample standard deviations over the seeds: one row per start, in `tagging` and `generation`."""
    tagging, generation = [], []
    for name in arguments.starts:
        row: dict[str, Any] = {"pre-training": name}
        for labels in arguments.labels:
            found = [runs[key] for seed in arguments.seeds if (key := f"tagging-{name}-{labels}-{seed}") in runs]
            for measure in ("auc", "rejection_at_0.3"):
                row[f"{measure}_{labels}"] = mean_and_error([run[measure] for run in found])
        tagging.append(row)
        found = [runs[key] for seed in arguments.seeds if (key := f"generation-{name}-{seed}") in runs]
        measures = ["validation_loss", *(f"w1_{key}" for key in GENERATED), "ratio"]
        generation.append({"pre-training": name, **{m: mean_and_error([run[m] for run in found]) for m in measures}})
    return {"tagging": tagging, "generation": generation}


def mean_and_error(values: Sequence[float]) -> list[float] | None:
    """Mean, sample standard deviation (NaN of one value) and number; `None` of none."""
    if not len(values):
        return None
    return [float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else float("nan"), len(values)]


def format_cell(cell: Any) -> Any:
    if not isinstance(cell, list):
        return cell
    mean, error, _ = cell
    return f"{mean:.3g}" if not np.isfinite(error) else f"{mean:.3g} ± {error:.1g}"


def format_results(tables: Mapping[str, list[dict[str, Any]]], arguments: argparse.Namespace) -> str:
    from hepzoo.evaluation.tables import format_table

    def table(rows, columns):
        return format_table([{key: format_cell(row[key]) for key in columns} for row in rows], columns)

    parts = []
    for measure, title in (("auc", "area under the curve"), ("rejection_at_0.3", "background rejection at 30 %")):
        columns = {"pre-training": "pre-training", **{f"{measure}_{n}": f"{n} labels" for n in arguments.labels}}
        parts += [f"{' against '.join(arguments.classes[::-1])}: {title}", table(tables["tagging"], columns), ""]
    columns = {"pre-training": "pre-training", "validation_loss": "flow loss"}
    columns |= {f"w1_{key}": f"W1 {key}" for key in GENERATED} | {"ratio": "W1 / floor"}
    parts += ["conditional generation", table(tables["generation"], columns)]
    return "\n".join(parts)


def plot_results(tables: Mapping[str, list[dict[str, Any]]], arguments: argparse.Namespace, path: Path):
    """Area under the curve against labels, and validation loss of generation; error bars over the seeds."""
    from hepzoo.evaluation.figures import subplots

    figure, axes = subplots(1, 2, figsize=(11, 4.2))
    left, right = axes[0]
    for place, row in enumerate(tables["tagging"]):
        cells = [row[f"auc_{n}"] for n in arguments.labels]
        known = [(n, 1 - cell[0], cell[1]) for n, cell in zip(arguments.labels, cells) if cell is not None]
        if known:
            labels, values, errors = np.array(known).T
            # side by side, so that the error bars can be seen
            labels = labels * 1.04 ** (place - len(tables["tagging"]) / 2)
            left.errorbar(labels, values, np.nan_to_num(errors), marker="o", capsize=3, label=row["pre-training"])
    left.set(xscale="log", yscale="log", xlabel="labels", ylabel="1 - AUC")
    left.legend(fontsize="small", title="pre-training", ncols=2, loc="upper right")
    rows = [row for row in tables["generation"] if row["validation_loss"] is not None]
    for place, row in enumerate(rows):
        mean, error, _ = row["validation_loss"]
        right.errorbar([mean], [place], xerr=[[np.nan_to_num(error)]] * 2, marker="o", capsize=3)
    right.set(yticks=range(len(rows)), yticklabels=[row["pre-training"] for row in rows])
    right.set_xlabel("flow-matching loss of the fine-tuned generator")
    right.invert_yaxis()
    figure.savefig(path)


# ---------------------------------------------------------------------------------------------------------------------
# Command
# ---------------------------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    from hepzoo.tokenization.jet_sets import LABEL_NAMES

    parser = argparse.ArgumentParser(
        description="Compare pre-training objectives of OmniLearned on jets: tagging and conditional generation.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    data = parser.add_argument_group("data")
    data.add_argument("--pretraining_file", nargs="+", required=True, help="labelled jets: Parquet files or folders")
    data.add_argument("--finetuning_file", nargs="+", required=True, help="other jets, of --classes, for both tasks")
    data.add_argument("--output", required=True, help="folder for models, runs, tables and plot")
    data.add_argument("--label_names", nargs="+", default=list(LABEL_NAMES), help="classes of the pre-training")
    data.add_argument(
        "--classes", nargs=2, default=["label_QCD", "label_Tbqq"], help="background and signal (default QCD, Tbqq)"
    )
    data.add_argument("--max_pretraining_jets", type=int, help="of the pre-training files, at random (default all)")
    data.add_argument("--max_num_particles", type=int, default=60, help="hardest particles of a jet (default 60)")
    data.add_argument("--num_validation", type=int, default=1000, help="jets to choose weights by (default 1000)")
    data.add_argument("--num_test", type=int, default=2000, help="jets of the results (default 2000)")

    model = parser.add_argument_group("model")
    model.add_argument("--size", default="micro", help="micro (default), small, medium or large")
    model.add_argument("--config_overrides", help="changes to the configuration, name=value,...")
    model.add_argument("--starts", nargs="+", default=list(STARTS), help=f"some of {', '.join(STARTS)} (default all)")

    training = parser.add_argument_group("training")
    training.add_argument("--pretraining_steps", type=int, default=1000, help="batches (default 1000)")
    training.add_argument("--pretraining_seed", type=int, default=1, help="default 1")
    training.add_argument("--batch_size", type=int, default=64, help="jets per batch (default 64)")
    training.add_argument("--learning_rate", type=float, default=1e-3, help="of Lion, from scratch (default 0.001)")
    training.add_argument("--weight_decay", type=float, default=0.01, help="default 0.01")
    training.add_argument(
        "--finetuning_lr_factor", type=float, default=0.5, help="pre-trained over from scratch (default 0.5)"
    )
    training.add_argument(
        "--head_lr_factor", type=float, default=2.0, help="new layers over pre-trained ones (default 2, published 5)"
    )
    training.add_argument("--labels", type=int, nargs="+", default=[100, 1000, 4000], help="numbers of labelled jets")
    training.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of the fine-tuning (default 1 2 3)")
    training.add_argument("--finetuning_steps", type=int, default=400, help="most batches of tagging (default 400)")
    training.add_argument("--finetuning_epochs", type=int, default=40, help="most passes over few labels (default 40)")
    training.add_argument("--generation_jets", type=int, default=4000, help="to learn generation from (default 4000)")
    training.add_argument("--generation_steps", type=int, default=400, help="batches of generation (default 400)")
    training.add_argument("--num_generated", type=int, default=1000, help="generated jets (default 1000)")
    training.add_argument("--num_inference_steps", type=int, default=32, help="midpoint steps (default 32)")
    training.add_argument("--skip_generation", action="store_true", help="tagging only")
    training.add_argument("--cpu", action="store_true", help="do not use a GPU")
    return parser


def check_arguments(arguments: argparse.Namespace):
    counts = [name for name, value in vars(arguments).items() if isinstance(value, int) and value is not True]
    check_at_least(arguments, 1, *(name for name in counts if name not in ("skip_generation", "cpu")))
    for name in arguments.starts:
        if name not in STARTS:
            raise ValueError(f"--starts: {name!r}, expected some of {', '.join(STARTS)}")
    for name in ("labels", "seeds"):
        if min(getattr(arguments, name)) < 1:
            raise ValueError(f"--{name}: {min(getattr(arguments, name))}, expected numbers of at least 1")
    for name in ("learning_rate", "finetuning_lr_factor", "head_lr_factor"):
        if not 0 < getattr(arguments, name) < float("inf"):
            raise ValueError(f"--{name} is {getattr(arguments, name)}, expected a finite number above 0")
    if arguments.classes[0] == arguments.classes[1]:
        raise ValueError(f"--classes: {arguments.classes[0]} twice")


def run(arguments: argparse.Namespace):
    from transformers.utils import logging

    from hepzoo.tokenization.feature_extraction_omnilearned import OmniLearnedFeatureExtractor

    check_arguments(arguments)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # what starts from scratch is the subject here
    python_logging.getLogger("hepzoo").setLevel(python_logging.ERROR)
    folder = Path(arguments.output)
    folder.mkdir(parents=True, exist_ok=True)
    # what may change between two calls
    free = ("output", "cpu", "starts", "labels", "seeds", "skip_generation")
    check_metadata(folder, {name: value for name, value in vars(arguments).items() if name not in free}, "runs")

    size = {"max_num_particles": arguments.max_num_particles}
    extractor = OmniLearnedFeatureExtractor(label_names=arguments.label_names, **size)
    sample = read_jets(arguments.pretraining_file, "pretraining_file", extractor, arguments.max_pretraining_jets)
    tagger = OmniLearnedFeatureExtractor(label_names=arguments.classes, **size)
    generator = OmniLearnedFeatureExtractor(label_names=arguments.classes, condition_names=CONDITIONS, **size)
    names = ("validation", "test", "train")
    parts = {}
    for which in (tagger, generator):
        jets = read_jets(arguments.finetuning_file, "finetuning_file", which, None)
        split = split_sample(jets, [arguments.num_validation, arguments.num_test])
        parts[which] = dict(zip(names, split))
    generator.fit(parts[generator]["train"].rows)

    # by kind of run: the whole comparison with one seed before the next seed
    jobs: list[tuple[str, Any]] = []
    for name in arguments.starts:
        if STARTS[name]:
            path = folder / "pretrained" / name
            jobs.append(
                (f"pretraining-{name}", lambda n=name, p=path: run_pretraining(n, arguments, extractor, sample, p))
            )
    for seed in arguments.seeds:
        for labels in arguments.labels:
            for name in arguments.starts:
                options = (arguments, tagger, parts[tagger], folder, labels, seed)
                jobs.append((f"tagging-{name}-{labels}-{seed}", lambda n=name, o=options: run_tagging(n, *o)))
        if not arguments.skip_generation:
            for name in arguments.starts:
                options = (arguments, generator, parts[generator], folder, seed)
                jobs.append((f"generation-{name}-{seed}", lambda n=name, o=options: run_generation(n, *o)))

    from tqdm import tqdm

    from hepzoo.evaluation.tables import write_table

    runs: dict[str, dict] = {}
    for key, job in tqdm(jobs, desc="runs", unit="run", file=sys.stderr):
        path = folder / "runs" / f"{key}.json"
        if not path.is_file():
            write_table(path, [], job())
        runs[key] = json.loads(path.read_text())
        tables = summarise(runs, arguments)
        write_table(folder / "results.json", [], {"options": vars(arguments), "runs": runs, **tables})
    shutil.rmtree(folder / "scratch", ignore_errors=True)
    print(format_results(tables, arguments))
    try:
        plot_results(tables, arguments, folder / "results.png")
    except ImportError as error:
        print(f"no plot: {error}", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    arguments = build_parser().parse_args(argv)
    try:
        run(arguments)
    except (ValueError, OSError) as error:
        print(f"compare_pretraining.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
