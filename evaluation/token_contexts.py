"""How much a token says on its own: one id decoded among many different other ids.

A tokenizer whose decoder sees all constituents turns an id into a cloud of constituents, depending on the other ids.
As in arXiv:2403.05618, every id is decoded in random contexts of other ids; or, with --jets, among the ids of real
jets. The id stands last, where a causal decoder sees its context.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hepzoo.evaluation.evaluate_showers import _markdown_table, _positive
from hepzoo.evaluation.tables import format_table, plain, write_table, write_text
from hepzoo.evaluation.token_information import decode_codes, load_tokenizer
from hepzoo.evaluation.token_quality import read_codes

EXAMPLES = """examples:
  500 random contexts of 50 ids, as published:
    python evaluation/token_contexts.py --tokenizer runs/tokenizer --output contexts.md contexts.json
  contexts out of real jets (the column `codes` of training/tokenize_jets.py):
    python evaluation/token_contexts.py --tokenizer runs/tokenizer --jets reconstructed.parquet
"""

COLUMNS = {
    "name": "feature",
    "between": "spread between ids",
    "within": "spread within an id (median)",
    "within_90": "90 % of the ids below",
    "ratio": "within / between",
}


def decode_in_contexts(tokenizer: Any, codes: np.ndarray, contexts: np.ndarray) -> np.ndarray:
    """
    What codes become behind contexts.

    Args:
        codes (`np.ndarray` of shape `(c,)`), contexts (`np.ndarray` of shape `(n, length)`): numbers of codes from 0.

    Returns:
        Features in their units, `(c, n, features)`: of the code, not of the context.
    """
    from hepzoo.tokenization.jet_features import inverse_transform, make_features

    found = []
    for code in codes:
        sequences = np.concatenate([contexts, np.full((len(contexts), 1), code)], axis=1)
        found.append(decode_codes(tokenizer, sequences, np.ones(sequences.shape, dtype=bool))[:, -1])
    return inverse_transform(make_features(tokenizer.features), np.stack(found))


def random_contexts(
    size: int, count: int, length: int, rng: np.random.Generator, codes: np.ndarray | None = None
) -> np.ndarray:
    """Contexts (count, length) of codes 0 to size - 1, all with the same probability, or as often as in `codes`."""
    return rng.integers(size, size=(count, length)) if codes is None else rng.choice(codes, size=(count, length))


def summarise(names: Sequence[str], values: np.ndarray) -> list[dict[str, Any]]:
    """
    One row per feature: half the central 68 % of the means of the ids (`between`), and of the values of an id within
    its contexts (`within`: the median id, `within_90`).

    Args:
        values (`np.ndarray` of shape `(ids, contexts, features)`).
    """

    def width(v: np.ndarray, axis: int) -> np.ndarray:
        low, high = np.quantile(v, [0.16, 0.84], axis=axis)
        return (high - low) / 2

    rows = []
    for name, v in zip(names, np.moveaxis(values, -1, 0), strict=True):
        between, within = float(width(v.mean(axis=1), 0)), width(v, 1)
        row = {"name": name, "between": between, "within": float(np.median(within))}
        row["within_90"] = float(np.quantile(within, 0.9))
        rows.append(row | {"ratio": row["within"] / between if between > 0 else float("nan")})
    return rows


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The study that the options describe: `features` (rows of `summarise`), `ids` (mean and spread of each)."""
    tokenizer = load_tokenizer(args.tokenizer)
    size = tokenizer.codebook_size
    codes = None
    if args.jets is not None:
        codes = read_codes(args.jets)
        if codes is None:
            raise ValueError("--jets: no column 'codes', which training/tokenize_jets.py writes")
        if len(codes) == 0 or codes.min() < 0 or codes.max() >= size:
            raise ValueError(f"--jets: expected codes of 0 to {size - 1}")
    rng = np.random.default_rng(args.seed)
    contexts = random_contexts(size, args.contexts, args.context_length, rng, codes)
    studied = np.sort(rng.permutation(size)[: args.ids])
    values = decode_in_contexts(tokenizer, studied, contexts)
    each = [
        {"code": int(code)}
        | {f"{name}_mean": float(v[:, k].mean()) for k, name in enumerate(tokenizer.feature_names)}
        | {f"{name}_std": float(v[:, k].std()) for k, name in enumerate(tokenizer.feature_names)}
        for code, v in zip(studied, values, strict=True)
    ]
    return {"features": summarise(tokenizer.feature_names, values), "ids": each, "contexts": list(contexts.shape)}


def save_report(report: dict[str, Any], path: Path) -> Path:
    """By file ending: `.json` all of it, `.md` the table, `.csv` the ids."""
    if path.suffix == ".md":
        return write_text(path, f"# Tokens in contexts\n\n{_markdown_table(report['features'], COLUMNS)}\n")
    if path.suffix == ".json":
        return write_text(path, json.dumps(plain(report), indent=2) + "\n")
    return write_table(path, report["ids"])


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="token_contexts.py",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tokenizer", required=True, help="folder or Hub repository of an OmniJetTokenizer")
    parser.add_argument("--jets", nargs="+", metavar="FILES", help="draw the contexts from the codes of these jets")
    parser.add_argument("--ids", type=_positive, default=100, help="how many ids, drawn at random (100)")
    parser.add_argument("--contexts", type=_positive, default=500, help="contexts of every id (500)")
    parser.add_argument("--context_length", type=_positive, default=50, help="other ids of a context (50)")
    parser.add_argument("--seed", type=int, default=0, help="of ids and contexts (0)")
    parser.add_argument("--output", type=Path, nargs="+", default=[], metavar="FILE", help="write .json, .md or .csv")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the study; returns the exit status."""
    parser = build_parser()
    args = parser.parse_args(argv)
    for path in args.output:
        if path.suffix not in (".json", ".md", ".csv"):
            parser.error(f"--output must end in .json, .md or .csv, got {path}")
    if args.seed < 0:
        parser.error(f"--seed is {args.seed}, expected at least 0")
    try:
        report = run(args)
        sys.stdout.write(format_table(report["features"], COLUMNS) + "\n")
        for path in args.output:
            sys.stdout.write(f"report written to {save_report(report, path)}\n")
    except (ValueError, OSError) as err:
        sys.stderr.write(f"token_contexts.py: {' '.join(str(err).split())}\n")
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
