"""Bin edges of the FM4NPP raster scan from TPC events, saved as a feature extractor (`preprocessor_config.json`)."""

import argparse
import sys
import textwrap
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from hepzoo.data_scripts.tpc_schema import POINT_COLUMNS


def read_events(paths: Sequence[str], max_events: int) -> dict[str, list[np.ndarray]]:
    """The point columns of the first events of Parquet files, at most `max_events`.

    Raises:
        ValueError: a file cannot be read, lacks a column, or there are no events.
    """
    columns: dict[str, list[np.ndarray]] = {name: [] for name in POINT_COLUMNS}
    with tqdm(total=max_events, desc="read", unit="event", file=sys.stderr, disable=None) as bar:
        for batch in _batches(paths):
            batch = batch.slice(0, max_events - len(columns["E"]))
            for name in columns:
                lists = batch.column(name)
                columns[name] += [lists[row].values.to_numpy(zero_copy_only=False) for row in range(len(lists))]
            bar.update(batch.num_rows)
            if len(columns["E"]) == max_events:
                break
    if not columns["E"]:
        raise ValueError("the files hold no events")
    return columns


def _batches(paths: Sequence[str]) -> Iterator[pa.RecordBatch]:
    for path in paths:
        try:
            file = pq.ParquetFile(path)
        except pa.ArrowInvalid as error:
            raise ValueError(f"{path} is not a Parquet file ({str(error).splitlines()[0]})") from None
        with file:
            for name in POINT_COLUMNS:
                if name not in file.schema_arrow.names:
                    raise ValueError(
                        f"{path}: column {name} is missing; there are {', '.join(file.schema_arrow.names)}"
                    )
            yield from file.iter_batches(batch_size=100, columns=list(POINT_COLUMNS))


def parse_bins(text: str) -> list[int]:
    """`"8,8,6"` -> [8, 8, 6]."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != 3:
        raise argparse.ArgumentTypeError(f"expected three numbers such as 8,8,6, got {text!r}")
    return numbers


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="hepzoo convert-data tpc-bin-edges",
        description="Compute the bin edges of the FM4NPP raster scan and save them as a feature extractor.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=textwrap.dedent(
            """\
            examples:
              python data_scripts/tpc_bin_edges.py data/tpc/unlabeled/*.parquet --output models/extractor
              python data_scripts/tpc_bin_edges.py data/tpc/train/*.parquet --output models/extractor --n_bins 16,16,6
            then:
              Fm4nppFeatureExtractor.from_pretrained("models/extractor")
            Compute the edges once, from training data, and keep them with the model.
            """
        ),
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="Parquet file with the columns E, x, y, z")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the feature extractor")
    parser.add_argument("--n_bins", type=parse_bins, default="8,8,6", help="of eta, phi, r (default: %(default)s)")
    parser.add_argument("--max_events", type=int, default=10_000, help="events that are read (default: %(default)s)")
    parser.add_argument("--order", default="EPR", help="of the scan: EPR, RPE, REP, PER, ... (default: %(default)s)")
    parser.add_argument("--num_neighbors", type=int, default=30, help="of the targets (default: %(default)s)")
    parser.add_argument("--max_points", type=int, default=3200, help="longest event accepted (default: %(default)s)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    args = build_parser().parse_args(argv)
    # Takes torch with it, which --help does not need.
    from hepzoo.tokenization.feature_extraction_fm4npp import Fm4nppFeatureExtractor

    try:
        if args.max_events < 1:
            raise ValueError(f"--max_events must be at least 1, got {args.max_events}")
        extractor = Fm4nppFeatureExtractor(
            order=args.order, num_neighbors=args.num_neighbors, max_points=args.max_points
        )
        columns = read_events(args.files, args.max_events)
        edges = extractor.compute_bin_edges(columns, args.n_bins)
        extractor.save_pretrained(args.output)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, values in edges.items():
        print(f"{name:<6} {' '.join(f'{value:.4f}' for value in values)}")
    print(f"{len(columns['E'])} events, {sum(map(len, columns['E']))} points; saved in {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
