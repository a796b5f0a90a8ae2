"""What tokens keep of a jet: taggers trained on original constituents, on decoded ones and on the ids themselves.

The multi-model test of arXiv:2403.05618: the same taggers, once per representation of the same jets, on the same
training and test jets. What a tagger loses against the original constituents, the tokens have lost. Deep sets
(`particle_flow`) and a NormFormer read constituents, deep sets also ids. Of several tokenizers, each is one
representation; their features must be the same.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hepzoo.evaluation.evaluate_showers import _markdown_table, _positive
from hepzoo.evaluation.metric_tagging import tagging_metrics
from hepzoo.evaluation.tables import format_table, format_value, plain, write_table, write_text
from hepzoo.evaluation.tracks_dirc import expand_paths

EXAMPLES = """examples:
  Tops against QCD, tokenizers with 512 and 8192 codes:
    python evaluation/token_information.py --train QCD_train.parquet Tbqq_train.parquet \\
        --test QCD_test.parquet Tbqq_test.parquet --tokenizers runs/tokenizer_512 runs/tokenizer_8192 \\
        --classes label_QCD label_Tbqq --seeds 3 --output information.md information.json information.png
"""

TAGGERS = ("particle_flow", "normformer")
COLUMNS = {
    "tagger": "tagger",
    "representation": "representation",
    "seed": "seed",
    "accuracy": "accuracy",
    "auc": "ROC area",
    "rejection_at_0.3": "rejection at 30 %",
    "rejection_at_0.5": "at 50 %",
    "lost_auc": "ROC area lost",
}
OUTPUTS = (".json", ".md", ".csv", ".png", ".pdf", ".svg")


def load_tokenizer(path: str) -> Any:
    """
    Raises:
        ValueError: there is no tokenizer at `path`, or it is no `OmniJetTokenizer`.
    """
    from transformers import AutoTokenizer

    import hepzoo

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: no tokenizer that can be loaded ({str(error).splitlines()[0]})") from None
    if not isinstance(tokenizer, hepzoo.OmniJetTokenizer):
        raise ValueError(f"{path}: holds a {type(tokenizer).__name__}, expected an OmniJetTokenizer")
    return tokenizer


def decode_codes(tokenizer: Any, codes: np.ndarray, mask: np.ndarray, batch_size: int = 256) -> np.ndarray:
    """
    Transformed features (jets, length, features) of numbers of codes (jets, length), 0 where `mask` (jets, length) is.
    """
    import torch

    vqvae, parts = tokenizer.vqvae, []
    with torch.inference_mode():
        for start in range(0, len(codes), batch_size):
            rows = slice(start, start + batch_size)
            inputs = (torch.from_numpy(values[rows]).to(vqvae.device) for values in (codes, mask))
            parts.append(vqvae.decode(*inputs).float().cpu().numpy())
    return np.concatenate(parts) * mask[..., None]


def read_columns(paths: Sequence[str], names: Sequence[str], max_jets: int | None = None) -> dict[str, list]:
    """
    Those of the columns that the Parquet files have, one row per jet; with `max_jets`, as many from each file.

    Raises:
        ValueError: a file cannot be read, or files have different columns; names it.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = expand_paths(paths)
    share = None if max_jets is None else -(-max_jets // len(files))
    columns: dict[str, list] = {}
    for path in files:
        try:
            with pq.ParquetFile(path) as file:
                found = [name for name in file.schema_arrow.names if name in names]
                table = file.read(found).slice(0, share)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]})") from None
        if columns and set(found) != set(columns):
            raise ValueError(
                f"{path}: has the columns {', '.join(sorted(found))}, expected {', '.join(sorted(columns))}"
            )
        for name, values in table.to_pydict().items():
            columns.setdefault(name, []).extend(values)
    return columns


def class_numbers(tokenizer: Any, class_ids: np.ndarray, classes: Sequence[str]) -> np.ndarray:
    """Place of each jet's class in `classes`."""
    names = [tokenizer.label_names[number] for number in class_ids]
    for row, name in enumerate(names):
        if name not in classes:
            raise ValueError(f"row {row}: class {name}, expected one of {', '.join(classes)}")
    return np.array([classes.index(name) for name in names])


def represent(tokenizers: Mapping[str, Any], columns: Mapping[str, list], classes: Sequence[str]) -> dict[str, Any]:
    """
    The same jets in every representation.

    Args:
        tokenizers: name -> `OmniJetTokenizer`. columns: of the jets, with their labels.

    Returns:
        `labels` (jets,), `mask` (jets, length), `original` (jets, length, features), and for every tokenizer `<name>`
        the decoded features and `<name> ids` (jets, length), start and stop left out.
    """
    found: dict[str, Any] = {}
    for name, tokenizer in tokenizers.items():
        batch = tokenizer(
            dict(columns), padding=True, truncation=True, return_particle_features=True, return_class_ids=True
        )
        lengths = batch["attention_mask"].sum(axis=1) - 2
        mask = np.arange(batch["attention_mask"].shape[1] - 2) < lengths[:, None]
        features = batch["particle_features"][:, 1:-1] * mask[..., None]
        if found and not (np.array_equal(mask, found["mask"]) and np.allclose(features, found["original"])):
            raise ValueError(f"{name}: its features of the jets differ from those of {next(iter(tokenizers))}")
        codes = np.where(mask, batch["input_ids"][:, 1:-1] - 1, 0)
        labels = class_numbers(tokenizer, batch["class_ids"], classes)
        found |= {"labels": labels, "mask": mask, "original": features, f"{name} ids": codes + 1}
        found[name] = decode_codes(tokenizer, codes, mask)
    return found


def batches(count: int, size: int, steps: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Numbers of the jets of every step, all jets in a new order in every pass."""
    order = np.empty(0, dtype=np.int64)
    for _ in range(steps):
        if len(order) < size:
            order = np.concatenate([order, rng.permutation(count)])
        yield order[:size]
        order = order[size:]


def train_and_score(
    config: Any,
    train: Mapping[str, np.ndarray],
    test: Mapping[str, np.ndarray],
    settings: argparse.Namespace,
    seed: int,
) -> np.ndarray:
    """
    Probabilities (test jets, classes) of a tagger that was trained from scratch: AdamW, one cycle of the rate.

    Args:
        config: `OmniJetConfig` of a stand-alone tagger. train, test: `inputs`, `mask`, `labels`.
        settings: `steps`, `batch_size`, `learning_rate`.
    """
    import torch

    from hepzoo import OmniJetForSequenceClassification

    torch.manual_seed(seed)
    model = OmniJetForSequenceClassification(config).train()
    name = "particle_features" if config.num_features else "input_ids"

    def forward(data: Mapping[str, np.ndarray], rows: np.ndarray, **labels):
        # no longer than the longest jet of the batch
        width = int(data["mask"][rows].sum(axis=1).max())
        inputs = {name: data["inputs"][rows, :width], "attention_mask": data["mask"][rows, :width].astype(np.int64)}
        return model(**{key: torch.from_numpy(value) for key, value in inputs.items()}, **labels)

    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.learning_rate, total_steps=settings.steps)
    rng = np.random.default_rng(seed)
    for rows in batches(len(train["labels"]), settings.batch_size, settings.steps, rng):
        optimizer.zero_grad()
        forward(train, rows, labels=torch.from_numpy(train["labels"][rows])).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.inference_mode():
        parts = np.array_split(np.arange(len(test["labels"])), max(1, len(test["labels"]) // 500))
        return np.concatenate([forward(test, rows).logits.softmax(dim=-1).numpy() for rows in parts])


def tagger_config(tagger: str, num_features: int, num_codes: int, num_labels: int, settings: argparse.Namespace) -> Any:
    """Published sizes, but for what the settings change."""
    from hepzoo import OmniJetConfig

    sizes: dict[str, Any] = {"codebook_size": num_codes, "num_features": num_features, "num_labels": num_labels}
    if tagger == "normformer":
        heads = 8 if settings.hidden_size % 8 == 0 else 1
        sizes |= {"hidden_size": settings.hidden_size, "num_attention_heads": heads}
        sizes["num_hidden_layers"] = settings.num_hidden_layers
    return OmniJetConfig(architecture=tagger, **sizes)


def auc_difference(first: np.ndarray, second: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """
    ROC area of one score minus that of another on the same jets, and its statistical error (DeLong et al., Biometrics
    44 (1988) 837: the spread of each jet's share in the difference).

    Args:
        first, second (`np.ndarray` of shape `(jets,)`): scores. labels (`(jets,)`): 1 signal, 0 background.
    """
    from scipy.stats import rankdata

    shares = []
    for scores in (first, second):
        signal, background = scores[labels == 1], scores[labels == 0]
        ranks = rankdata(np.concatenate([signal, background]))
        # of every jet: the share of the other class that it is on the right side of
        above = (ranks[: len(signal)] - rankdata(signal)) / len(background)
        below = 1 - (ranks[len(signal) :] - rankdata(background)) / len(signal)
        shares.append((above, below))
    differences = [one - other for one, other in zip(*shares, strict=True)]
    error = np.sqrt(sum(np.var(values, ddof=1) / len(values) for values in differences))
    return float(differences[0].mean()), float(error)


def compare_representations(
    train: Mapping[str, Any], test: Mapping[str, Any], codebook_sizes: Mapping[str, int], settings: argparse.Namespace
) -> list[dict[str, Any]]:
    """
    One row per tagger, representation and seed: `tagging_metrics`, and of two classes `lost_auc`, the ROC area of the
    original constituents (same tagger and seed) minus that of the row, with its statistical error `lost_auc_error`.

    Args:
        train, test: of `represent`. codebook_sizes: of every tokenizer.
        settings: `taggers`, `seeds`, `classes`, and those of `train_and_score` and `tagger_config`.
    """
    from tqdm import tqdm

    runs = [("original", None)]
    for name, size in codebook_sizes.items():
        runs += [(name, None), (f"{name} ids", size)]
    jobs = [
        (tagger, representation, size, seed)
        for seed in range(settings.seeds)
        for tagger in settings.taggers
        for representation, size in runs
        if size is None or tagger == "particle_flow"
    ]
    rows: list[dict[str, Any]] = []
    best: dict[tuple[str, int], np.ndarray] = {}
    for tagger, representation, size, seed in tqdm(jobs, unit="tagger", disable=not sys.stderr.isatty()):
        num_features = 0 if size else train["original"].shape[-1]
        config = tagger_config(tagger, num_features, size or 2, len(settings.classes), settings)
        pair = ({"inputs": d[representation], "mask": d["mask"], "labels": d["labels"]} for d in (train, test))
        probabilities = train_and_score(config, *pair, settings, seed)
        metrics = tagging_metrics(probabilities, test["labels"])
        rows.append({"tagger": tagger, "representation": representation, "seed": seed, **metrics})
        if len(settings.classes) == 2:
            # the first run of every tagger and seed reads the original constituents
            original = best.setdefault((tagger, seed), probabilities[:, 1])
            lost, error = auc_difference(original, probabilities[:, 1], test["labels"])
            rows[-1] |= {"lost_auc": lost, "lost_auc_error": error}
        # for who does not wait for the last of them
        found = ", ".join(f"{name} {format_value(value)}" for name, value in metrics.items())
        tqdm.write(f"{tagger}, {representation}, seed {seed}: {found}", file=sys.stderr)
    return rows


def mean_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """
    Means over the seeds, with the number of seeds under `seed` and sample standard deviations under `<name>_std` (NaN
    of one seed, or of infinite values). `lost_auc_error` is the error of the mean: of the test jets, which all seeds
    share, and of the seeds.
    """
    groups: dict[tuple[str, str], list] = {}
    for row in rows:
        groups.setdefault((row["tagger"], row["representation"]), []).append(row)
    means = []
    for (tagger, representation), part in groups.items():
        mean: dict[str, Any] = {"tagger": tagger, "representation": representation, "seed": len(part)}
        for name in (name for name, value in part[0].items() if isinstance(value, float)):
            values = np.array([row[name] for row in part])
            mean[name] = float(values.mean())
            # a rejection may be infinite, which has no spread
            finite = len(part) > 1 and np.isfinite(values).all()
            mean[f"{name}_std"] = float(values.std(ddof=1)) if finite else float("nan")
        if "lost_auc_error" in mean:
            mean["lost_auc_error"] = float(
                np.hypot(mean["lost_auc_error"], np.nan_to_num(mean["lost_auc_std"]) / np.sqrt(len(part)))
            )
        means.append(mean)
    return means


def table_rows(means: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of `mean_rows` as text: means with their standard deviations, the lost area with its error."""

    def cell(mean: float, error: float) -> str:
        return format_value(mean) if np.isnan(error) else f"{format_value(mean)} ± {format_value(error, 1)}"

    errors = {name: "lost_auc_error" if name == "lost_auc" else f"{name}_std" for name in COLUMNS}
    return [
        {name: cell(row[name], row[errors[name]]) if errors[name] in row else row.get(name) for name in COLUMNS}
        for row in means
    ]


def save_report(report: Mapping[str, Any], path: Path) -> Path:
    """By file ending: `.json` all of it, `.md` the means, `.csv` every run, `.png`, `.pdf` or `.svg` a picture."""
    if path.suffix in (".png", ".pdf", ".svg"):
        from hepzoo.evaluation.plots_jets import plot_token_information

        return plot_token_information(report, path)
    if path.suffix == ".md":
        table = _markdown_table(table_rows(report["means"]), {**COLUMNS, "seed": "seeds"})
        return write_text(path, f"# Taggers of tokens\n\n{table}\n")
    if path.suffix == ".json":
        return write_text(path, json.dumps(plain(report), indent=2) + "\n")
    return write_table(path, report["runs"])


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The study that the options describe."""
    from hepzoo.tokenization.jet_features import FOUR_MOMENTUM

    tokenizers: dict[str, Any] = {}
    for path in args.tokenizers:
        tokenizer = load_tokenizer(path)
        name = Path(path).name
        if name in tokenizers:
            raise ValueError(f"--tokenizers: two folders are called {name}")
        tokenizers[name] = tokenizer
        unknown = [label for label in args.classes if label not in tokenizer.label_names]
        if unknown:
            raise ValueError(f"--classes: unknown class {unknown[0]!r}, expected some of {tokenizer.label_names}")
    if len(set(args.classes)) < 2:
        raise ValueError("--classes: expected at least two different classes")
    first = next(iter(tokenizers.values()))
    names = {*FOUR_MOMENTUM, *first.feature_names, *first.label_names}
    data = []
    for option, paths, limit in (("train", args.train, args.train_jets), ("test", args.test, args.test_jets)):
        try:
            data.append(represent(tokenizers, read_columns(paths, names, limit), args.classes))
        except ValueError as error:
            raise ValueError(f"--{option}: {error}") from None
    sizes = {name: tokenizer.codebook_size for name, tokenizer in tokenizers.items()}
    rows = compare_representations(*data, sizes, args)
    jets = {name: len(part["labels"]) for name, part in zip(("train", "test"), data, strict=True)}
    return {"jets": jets, "codebook_sizes": sizes, "runs": rows, "means": mean_rows(rows)}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="token_information.py",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--train", nargs="+", required=True, metavar="FILES", help="labelled jets, Parquet")
    parser.add_argument("--test", nargs="+", required=True, metavar="FILES", help="other labelled jets")
    parser.add_argument("--tokenizers", nargs="+", required=True, help="folders of OmniJetTokenizers")
    parser.add_argument(
        "--classes", nargs="+", default=["label_QCD", "label_Tbqq"], help="label columns, the background first"
    )
    parser.add_argument("--taggers", nargs="+", choices=TAGGERS, default=list(TAGGERS), help="which (both)")
    parser.add_argument("--train_jets", type=_positive, help="use only so many, as many from each file")
    parser.add_argument("--test_jets", type=_positive, help="use only so many, as many from each file")
    parser.add_argument("--seeds", type=_positive, default=1, help="trainings of every tagger (1)")
    parser.add_argument("--steps", type=_positive, default=1000, help="of a training (1000)")
    parser.add_argument("--batch_size", type=_positive, default=128, help="jets of a step (128)")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="largest of the cycle (1e-3)")
    parser.add_argument("--hidden_size", type=_positive, default=128, help="of the NormFormer (128)")
    parser.add_argument("--num_hidden_layers", type=_positive, default=5, help="of the NormFormer (5)")
    parser.add_argument(
        "--output", type=Path, nargs="+", default=[], metavar="FILE", help="write .json, .md, .csv, .png, .pdf or .svg"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the study; returns the exit status."""
    parser = build_parser()
    args = parser.parse_args(argv)
    for path in args.output:
        if path.suffix not in OUTPUTS:
            parser.error(f"--output must end in one of {', '.join(OUTPUTS)}, got {path}")
        if path.suffix not in (".json", ".md", ".csv") and len(args.classes) > 2:
            parser.error(f"--output {path}: the picture is of two classes, got {len(args.classes)}")
    if not 0 < args.learning_rate < 1:
        parser.error(f"--learning_rate is {args.learning_rate}, expected a number above 0 and below 1")
    try:
        report = run(args)
        sys.stdout.write(format_table(table_rows(report["means"]), {**COLUMNS, "seed": "seeds"}) + "\n")
        for path in args.output:
            sys.stdout.write(f"report written to {save_report(report, path)}\n")
    except (ValueError, OSError) as err:
        sys.stderr.write(f"token_information.py: {' '.join(str(err).split())}\n")
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
