"""Evaluate jet tokens: what encoding and decoding changes, jet by jet and constituent by constituent.

The reconstructed jets must be the original ones in the same order, with the same constituents in the same order. Where
the tokenizer cut constituents away, the same cuts are applied to the original jets by --max_relative and
--max_constituents. A column `codes` of the reconstructed jets (lists of code numbers, 0 to the codebook size - 1)
gives the use of the codebook.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hepzoo.evaluation.evaluate_jets import add_jet_arguments
from hepzoo.evaluation.evaluate_showers import _markdown_table, _positive
from hepzoo.evaluation.jet_substructure import wrap_phi
from hepzoo.evaluation.jets import CLASSES, JetObservables, Jets, observe, read_jets
from hepzoo.evaluation.showers import _flat
from hepzoo.evaluation.tables import format_table, plain, write_table, write_text
from hepzoo.evaluation.tracks_dirc import expand_paths

EXAMPLES = """examples:
  Resolution of the jets of a tokenizer of 8192 codes, per class too:
    hepzoo evaluate tokens --original data/jets/val --reconstructed reconstructed --codebook_size 8192 --per_class \\
        --max_relative 0.8 --max_constituents 128 --output tokens.md tokens.json
"""

# name -> (what it is, unit); "/" is relative to the original value
RESIDUALS = {
    "jet_pt": ("jet pT", "GeV"),
    "jet_pt/": ("jet pT, relative", ""),
    "jet_mass": ("jet mass", "GeV"),
    "jet_mass/": ("jet mass, relative", ""),
    "jet_eta": ("jet eta", ""),
    "jet_phi": ("jet phi", "rad"),
    "tau1": ("tau1", ""),
    "tau2": ("tau2", ""),
    "tau3": ("tau3", ""),
    "tau21": ("tau2 / tau1", ""),
    "tau32": ("tau3 / tau2", ""),
    "d2": ("D2", ""),
    "part_pt": ("constituent pT", "GeV"),
    "part_pt/": ("constituent pT, relative", ""),
    "part_etarel": ("constituent eta - jet eta", ""),
    "part_phirel": ("constituent phi - jet phi", "rad"),
}
COLUMNS = {
    "class": "class",
    "name": "reconstructed - original",
    "unit": "unit",
    "entries": "entries",
    "original_std": "std of original",
    "median": "median",
    "iqr": "IQR",
    "mean_abs": "mean |.|",
    "q95_abs": "95 % of |.|",
    "iqr_over_std": "IQR / std",
}


def align(
    original: Jets,
    reconstructed: Jets,
    max_relative: float | None = None,
    max_constituents: int | None = None,
) -> tuple[Jets, Jets]:
    """Original and reconstructed jets with the same constituents in the same coordinates.

    If only one sample is in coordinates relative to the jet axis, the other is shifted to the sum of its constituents:
    the original one before the cuts, as tokenizers do.

    Args:
        max_relative, max_constituents (*optional*): cuts on the original jets, see `Jets.cut`.

    Raises:
        ValueError: the numbers of jets, or of constituents of a jet, differ.
    """
    if len(original) != len(reconstructed):
        raise ValueError(f"{len(original)} original and {len(reconstructed)} reconstructed jets, expected as many")
    if reconstructed.relative != original.relative:
        original, reconstructed = (jets if jets.relative else jets.centered() for jets in (original, reconstructed))
    original = original.cut(max_relative, max_constituents)
    bad = np.flatnonzero(original.multiplicity != reconstructed.multiplicity)
    if len(bad):
        a, b = original.multiplicity[bad[0]], reconstructed.multiplicity[bad[0]]
        raise ValueError(
            f"jet {bad[0]}: {a} original and {b} reconstructed constituents, expected as many; cut the original jets "
            "as the tokenizer did (--max_relative, --max_constituents)"
        )
    return original, reconstructed


def residuals(
    original: Jets, reconstructed: Jets, keep_mass: bool = False, **options: Any
) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], JetObservables]:
    """Original value and reconstructed - original, per jet or constituent.

    Args:
        original, reconstructed (`Jets`): the same jets, of `align`.
        keep_mass, options: of `hepzoo.evaluation.jets.observe`.

    Returns:
        name of `RESIDUALS` -> (original, difference) of shape `(n,)` each, or `(c,)` for constituents, NaN where
        undefined; and the observables of the original jets. Constituents are compared in the common frame, so that a
        shift of the jet axis counts.
    """
    before, after = (observe(jets, keep_mass, **options) for jets in (original, reconstructed))
    found = {}
    for name in RESIDUALS:
        key = name.rstrip("/")
        if key in before.scalars:
            a, b = before.scalars[key], after.scalars[key]
        else:
            field = {"part_pt": "pt", "part_etarel": "eta", "part_phirel": "phi"}[key]
            a, b = getattr(original, field), getattr(reconstructed, field)
        difference = wrap_phi(b - a) if key.endswith(("phi", "phirel")) else b - a
        if name.endswith("/"):
            difference = np.divide(difference, a, out=np.full(len(a), np.nan), where=a > 0)
        found[name] = a, difference
    if original.relative:
        # eta and phi of the jets about the axis of the original ones
        for name, a, b in zip(("jet_eta", "jet_phi"), original.axes[1:], reconstructed.axes[1:], strict=True):
            found[name] = a, wrap_phi(b - a)
    return found, before


def _row(name: str, original: np.ndarray, difference: np.ndarray) -> dict[str, Any]:
    known = np.isfinite(original) & np.isfinite(difference)
    title, unit = RESIDUALS[name]
    row: dict[str, Any] = {"quantity": name, "name": title, "unit": unit, "entries": int(known.sum())}
    if not known.any():
        return row | dict.fromkeys(("original_std", "median", "iqr", "mean_abs", "q95_abs", "iqr_over_std"), np.nan)
    v = difference[known]
    low, middle, high = np.quantile(v, [0.25, 0.5, 0.75])
    # a relative residual has no spread of its own to be compared with
    spread = np.nan if name.endswith("/") else float(original[known].std())
    return row | {
        "original_std": spread,
        "median": float(middle),
        "iqr": float(high - low),
        "mean_abs": float(np.abs(v).mean()),
        "q95_abs": float(np.quantile(np.abs(v), 0.95)),
        "iqr_over_std": float((high - low) / spread) if spread > 0 else np.nan,
    }


def codebook_usage(codes: np.ndarray, codebook_size: int) -> dict[str, float]:
    """How much of a codebook is used.

    Args:
        codes (`np.ndarray`): code numbers 0 to codebook_size - 1, any shape, without padding, start and stop.

    Returns:
        `codes` (number of them), `codebook_size`, `used` (distinct codes), `utilisation` (used / size), `perplexity`
        (exp of the entropy: as many codes used evenly carry as much).
    """
    codes = np.asarray(codes).ravel()
    if not len(codes):
        raise ValueError("no codes")
    bad = np.flatnonzero(~((codes >= 0) & (codes < codebook_size)) | (codes != np.floor(codes)))
    if len(bad):
        raise ValueError(f"code {bad[0]} is {codes[bad[0]]}, expected an integer in 0..{codebook_size - 1}")
    counts = np.bincount(codes.astype(np.int64), minlength=codebook_size)
    share = counts[counts > 0] / len(codes)
    used = int((counts > 0).sum())
    return {
        "codes": len(codes),
        "codebook_size": codebook_size,
        "used": used,
        "utilisation": used / codebook_size,
        "perplexity": float(np.exp(-(share * np.log(share)).sum())),
    }


def compare_tokens(
    original: Jets,
    reconstructed: Jets,
    codes: np.ndarray | None = None,
    codebook_size: int | None = None,
    per_class: bool = False,
    max_relative: float | None = None,
    max_constituents: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Resolution of jets and constituents, and the use of the codebook.

    Args:
        original, reconstructed (`Jets`): the same jets and constituents in the same order.
        max_relative, max_constituents (*optional*): see `align`.
        codes, codebook_size (*optional*): see `codebook_usage`.
        per_class (`bool`): rows of every class of the original jets too.
        options: of `hepzoo.evaluation.jets.observe`.

    Returns:
        `jets`, `constituents`, `resolution` (rows of `class`, `quantity`, `entries`, `original_std`, `median`, `iqr`,
        `mean_abs`, `q95_abs`, `iqr_over_std`), and `codebook` if there are codes.
    """
    if (codes is None) != (codebook_size is None):
        raise ValueError("codes and the codebook size are needed together")
    original, reconstructed = align(original, reconstructed, max_relative, max_constituents)
    if not len(original):
        raise ValueError("no jets")
    found, observables = residuals(original, reconstructed, **options)
    groups = {"all": np.ones(len(original), dtype=bool)}
    if per_class:
        label = observables.label
        groups |= {name: label == i for i, name in enumerate(CLASSES) if (label == i).any()}
    rows = []
    for group, inside in groups.items():
        for name, (values, difference) in found.items():
            which = inside[original.owner] if name.startswith("part_") else inside
            rows.append({"class": group} | _row(name, values[which], difference[which]))
    report = {"jets": len(original), "constituents": len(original.pt), "resolution": rows}
    if codes is not None:
        report["codebook"] = codebook_usage(codes, codebook_size)
    return report


def read_codes(paths: str | Path | Iterable[str | Path], max_jets: int | None = None) -> np.ndarray | None:
    """All codes of Parquet files, folders or patterns, shape `(c,)`; None if no file has a column `codes`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    parts, left, without = [], max_jets, []
    for path in expand_paths(paths):
        try:
            file = pq.ParquetFile(path)
            if "codes" not in file.schema_arrow.names:
                without.append(path)
                continue
            table = file.read(["codes"])
            table = table if left is None else table.slice(0, left)
            left = None if left is None else left - len(table)
            parts.append(_flat(table.column("codes"), "codes", 0)[0])
        except (pa.ArrowException, OSError) as err:
            raise ValueError(f"{path}: not a readable Parquet file ({(str(err).splitlines() or [err])[0]})") from None
        except ValueError as err:
            raise ValueError(f"{path}: {err}") from None
    if parts and without:
        raise ValueError(f"{without[0]}: no column 'codes', which other files have")
    return np.concatenate(parts) if parts else None


def _heads(report: dict[str, Any]) -> list[str]:
    lines = [f"{report['jets']} jets, {report['constituents']} constituents"]
    if "codebook" in report:
        c = report["codebook"]
        lines.append(
            f"codebook: {c['used']} of {c['codebook_size']} codes used ({100 * c['utilisation']:.1f} %) by "
            f"{c['codes']} constituents, perplexity {c['perplexity']:.1f}"
        )
    return lines


def _columns(report: dict[str, Any]) -> dict[str, str]:
    several = any(row["class"] != "all" for row in report["resolution"])
    return COLUMNS if several else {key: head for key, head in COLUMNS.items() if key != "class"}


def format_report(report: dict[str, Any]) -> str:
    """The report as text."""
    return "\n\n".join(["\n".join(_heads(report)), format_table(report["resolution"], _columns(report))])


def save_report(report: dict[str, Any], path: str | Path) -> Path:
    """Saves a report by file ending: `.json` all of it, `.md` the table, `.csv` the resolutions."""
    path = Path(path)
    if path.suffix == ".md":
        heads = "\n".join(f"- {line}" for line in _heads(report))
        table = _markdown_table(report["resolution"], _columns(report))
        return write_text(path, "\n\n".join(["# Original and reconstructed jets", heads, table]) + "\n")
    if path.suffix == ".json":
        return write_text(path, json.dumps(plain(report), indent=2) + "\n")
    if path.suffix == ".csv":
        return write_table(path, report["resolution"])
    raise ValueError(f"{path}: the report is written as .json, .md or .csv, got {path.suffix or 'no ending'!r}")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hepzoo evaluate tokens",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--original", nargs="+", required=True, metavar="FILES", help="Parquet files or folders")
    parser.add_argument("--reconstructed", nargs="+", required=True, metavar="FILES", help="the same jets, decoded")
    parser.add_argument("--codebook_size", type=_positive, help="needed with a column `codes`")
    parser.add_argument("--per_class", action="store_true", help="a table of every class too")
    add_jet_arguments(parser)
    parser.add_argument("--output", type=Path, nargs="+", default=[], metavar="FILE", help="write .json, .md or .csv")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `hepzoo evaluate tokens`; returns the exit status."""
    parser = build_parser()
    args = parser.parse_args(argv)
    for path in args.output:
        if path.suffix not in (".json", ".md", ".csv"):
            parser.error(f"--output must end in .json, .md or .csv, got {path}")
    try:
        original, reconstructed = (read_jets(p, max_jets=args.max_jets) for p in (args.original, args.reconstructed))
        codes = read_codes(args.reconstructed, args.max_jets)
        if codes is not None and args.codebook_size is None:
            raise ValueError("the reconstructed jets have codes: give --codebook_size")
        if codes is None and args.codebook_size is not None:
            raise ValueError("--codebook_size is given, but the reconstructed jets have no column 'codes'")
        report = compare_tokens(
            original,
            reconstructed,
            codes,
            args.codebook_size,
            args.per_class,
            args.max_relative,
            args.max_constituents,
            keep_mass=args.keep_mass,
            recombination=args.axes,
            pseudorapidity=args.published_axes,
        )
        sys.stdout.write(format_report(report) + "\n")
        for path in args.output:
            sys.stdout.write(f"report written to {save_report(report, path)}\n")
    except (ValueError, OSError) as err:
        sys.stderr.write(f"hepzoo evaluate tokens: {err}\n")
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
