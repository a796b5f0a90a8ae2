"""
Jets through their tokenizer and back: the codes, and the jets that the codes decode to, about their own axes.

What `hepzoo evaluate tokens` compares with the original jets, and what a study of tokens reads.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hepzoo.training.generation_common import check_at_least

EXAMPLES = """\
examples:
  python training/tokenize_jets.py --tokenizer runs/tokenizer --input data/test.parquet --output reconstructed.parquet
  hepzoo evaluate tokens --original data/test.parquet --reconstructed reconstructed.parquet --codebook_size 512 \\
      --max_relative 0.8 --max_constituents 128
"""


def load_jet_tokenizer(path: str) -> Any:
    """
    The tokenizer of a folder or Hub repository, with its VQ-VAE.

    Raises:
        ValueError: there is none, or it is no `OmniJetTokenizer`.
    """
    from transformers import AutoTokenizer

    import hepzoo  # noqa: F401  registers the families
    from hepzoo.tokenization.tokenization_omnijet import OmniJetTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: no tokenizer that can be loaded ({str(error).splitlines()[0]})") from None
    if not isinstance(tokenizer, OmniJetTokenizer):
        raise ValueError(f"{path}: holds a {type(tokenizer).__name__}, expected an OmniJetTokenizer")
    _ = tokenizer.vqvae  # missing weights are reported now
    return tokenizer


def read_batches(paths: list[Path], names: set[str], batch_size: int, limit: int | None) -> Iterator[tuple[str, dict]]:
    """
    Where the rows are, for error messages, and those columns of `names` that the file has, batch by batch.

    Raises:
        ValueError: a file cannot be read; names it.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    left = sys.maxsize if limit is None else limit
    for path in paths:
        start = 0
        try:
            with pq.ParquetFile(path) as file:
                columns = [name for name in file.schema_arrow.names if name in names]
                for batch in file.iter_batches(batch_size, columns=columns):
                    batch = batch.slice(0, left)
                    if not len(batch):
                        return
                    yield f"{path}: in the batch from row {start}", batch.to_pydict()
                    start, left = start + len(batch), left - len(batch)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path}: not readable as Parquet ({str(error).splitlines()[0]})") from None


def reconstruct_jets(tokenizer: Any, columns: dict[str, Any]) -> dict[str, Any]:
    """
    Columns of the decoded jets, one row per jet in the same order: those of `OmniJetTokenizer.batch_decode`, `codes`
    (lists of 0 to the codebook size - 1), and the labels of the jets. Constituents beyond the limit of the tokenizer
    are left out.

    Raises:
        ValueError: a jet is invalid, in one line that names it.
    """
    from hepzoo.tokenization.jet_features import FOUR_MOMENTUM, sum_jets

    ids = tokenizer(columns, truncation=True, return_class_ids=False)["input_ids"]
    axes = {}
    if all(name in columns for name in FOUR_MOMENTUM):
        lengths = np.array([len(values) for values in columns["part_px"]])
        momenta = np.stack([np.concatenate(columns[name]) for name in FOUR_MOMENTUM], axis=-1).astype(np.float64)
        px, py, pz, _ = sum_jets(momenta, lengths).T
        axes = {"jet_eta": np.arcsinh(pz / np.hypot(px, py)), "jet_phi": np.arctan2(py, px)}
    decoded = tokenizer.batch_decode(ids, **axes)
    del decoded["row_index"]
    decoded["codes"] = [np.asarray(row[1:-1], dtype=np.int32) - 1 for row in ids]
    return {**decoded, **{name: columns[name] for name in tokenizer.label_names if name in columns}}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tokenize_jets.py",
        description="Encode and decode jets with an OmniJet tokenizer.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tokenizer", required=True, help="folder or Hub repository of an OmniJetTokenizer")
    parser.add_argument("--input", nargs="+", required=True, help="Parquet files, folders or patterns")
    parser.add_argument("--output", type=Path, required=True, help="Parquet file")
    parser.add_argument("--max_jets", type=int, help="only the first jets")
    parser.add_argument("--batch_size", type=int, default=1000, help="jets at a time (default 1000)")
    return parser


def run(arguments: argparse.Namespace):
    check_at_least(arguments, 1, "max_jets", "batch_size")
    import pyarrow as pa
    import pyarrow.parquet as pq
    from tqdm import tqdm

    from hepzoo.evaluation.tracks_dirc import expand_paths
    from hepzoo.tokenization.jet_features import FOUR_MOMENTUM

    paths = expand_paths(arguments.input)
    tokenizer = load_jet_tokenizer(arguments.tokenizer)
    names = {*FOUR_MOMENTUM, *tokenizer.feature_names, *tokenizer.label_names}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    temporary = arguments.output.with_name(f".{arguments.output.name}.{os.getpid()}.tmp")
    writer, jets, constituents = None, 0, 0
    try:
        with tqdm(unit="jet", desc="tokenising") as bar:
            for place, columns in read_batches(paths, names, arguments.batch_size, arguments.max_jets):
                try:
                    rows = reconstruct_jets(tokenizer, columns)
                except ValueError as error:
                    raise ValueError(f"{place}: {error}") from None
                table = pa.table({name: pa.array(list(values)) for name, values in rows.items()})
                writer = writer or pq.ParquetWriter(temporary, table.schema, compression="zstd")
                writer.write_table(table)
                jets, constituents = jets + len(table), constituents + int(rows["num_constituents"].sum())
                bar.update(len(table))
        if writer is None:
            raise ValueError(f"{', '.join(arguments.input)}: no jets")
        writer.close()
        os.replace(temporary, arguments.output)
    finally:
        temporary.unlink(missing_ok=True)
    removed = ", ".join(f"{reason} x {number}" for reason, number in tokenizer.dropped.items()) or "nothing"
    print(f"{arguments.output}: {jets} jets, {constituents} constituents; left out: {removed}")


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    arguments = build_parser().parse_args(argv)
    try:
        run(arguments)
    except (ValueError, OSError) as error:
        print(f"tokenize_jets.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
