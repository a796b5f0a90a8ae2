"""
Find tracks, particles and noise in TPC events with trained models.

    python training/find_tracks.py --model runs/tracking --input data/tpc/test --output predictions.parquet

The output has the columns of the input and `predicted_track_id` (number of a prototype, -1 for none), `predicted_pid`
(0 other, 1 pion, 2 kaon, 3 proton, 4 electron), `predicted_noise` (0 or 1), of the models that are given (a track
finder with a joint head gives all three), one entry per point in the order of the input. `hepzoo evaluate tracking` and
`hepzoo plot tracking` read it.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hepzoo.training.generation_common import check_at_least, load_config
from hepzoo.training.tpc_data import POINT_COLUMNS, renumber_row

EXAMPLES = """\
examples:
  python training/find_tracks.py --model runs/tracking --input data/tpc/test --output predictions.parquet
  python training/find_tracks.py --model runs/tracking --pid_model runs/pid --noise_model runs/noise \\
      --input 'data/tpc/test/*.parquet' --output predictions.parquet --batch_size 16
  hepzoo evaluate tracking --input predictions.parquet
"""

# option -> (Auto class, column that is predicted)
MODELS = {
    "model": ("AutoModelForInstanceSegmentation", "predicted_track_id"),
    "pid_model": ("AutoModelForTokenClassification", "predicted_pid"),
    "noise_model": ("AutoModelForTokenClassification", "predicted_noise"),
}
EVENTS_AT_ONCE = 200


class Predictor:
    """One trained model with its feature extractor: events to a prediction per point."""

    def __init__(self, path: str, option: str, device: str):
        import transformers

        config = load_config(path, "fm4npp")
        auto_class, self.column = MODELS[option]
        classes = {"pid_model": 5, "noise_model": 2}.get(option)
        if classes is not None and config.num_labels != classes:
            raise ValueError(f"--{option} {path}: tells {config.num_labels} classes apart, expected {classes}")
        try:
            self.extractor = transformers.AutoFeatureExtractor.from_pretrained(path)
            self.model, info = getattr(transformers, auto_class).from_pretrained(path, output_loading_info=True)
        except (ValueError, OSError, RuntimeError) as error:
            raise ValueError(f"--{option} {path}: {' '.join(str(error).split())}") from None
        if info["missing_keys"]:
            # a pre-trained backbone or another head would get fresh weights
            raise ValueError(
                f"--{option} {path}: has no weight {sorted(info['missing_keys'])[0]}, not a model for this"
            )
        self.model = self.model.to(device).eval()

    def __call__(self, columns: dict[str, list[np.ndarray]], batch_size: int) -> dict[str, list[np.ndarray]]:
        """Predicted columns of all events, one int64 array each, in the order of their points."""
        import torch

        lengths = np.array([len(values) for values in columns["E"]])
        predictions: dict[str, list[np.ndarray]] = {}
        # events of like length share a batch
        by_length = np.argsort(lengths, kind="stable")
        for start in range(0, len(by_length), batch_size):
            chosen = by_length[start : start + batch_size]
            rows = {name: [values[row] for row in chosen] for name, values in columns.items()}
            try:
                batch = self.extractor(rows, return_tensors="pt", return_neighbor_labels=False)
            except ValueError as error:
                raise ValueError(renumber_row(error, chosen)) from None
            inputs = {name: batch[name].to(self.model.device) for name in ("points", "attention_mask")}
            with torch.inference_mode():
                found = self.predict(inputs)
            for column, values in found.items():
                predicted = predictions.setdefault(column, [np.zeros(0, np.int64)] * len(lengths))
                for row, event in zip(chosen, self.extractor.restore_order(values.cpu(), batch["order"]), strict=True):
                    predicted[row] = event
        return predictions

    def predict(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Predicted columns of a batch, (batch, length) each; those of a joint head are three."""
        outputs = self.model(**inputs)
        if not hasattr(self.model, "assign_tracks"):
            return {self.column: outputs.logits.argmax(dim=-1)}
        tracks = self.model.assign_tracks(outputs, inputs["attention_mask"])
        if not self.model.config.joint_head:
            return {self.column: tracks}
        # the last class is that of no track; a point without a track is of the other particles
        particles = outputs.pid_logits[..., :-1].argmax(dim=-1).gather(1, tracks.clamp(min=0))
        return {
            self.column: tracks,
            "predicted_pid": particles.masked_fill(tracks < 0, 0),
            "predicted_noise": outputs.noise_logits.argmax(dim=-1),
        }


def open_parquet(path: Path) -> Any:
    """A `pyarrow.parquet.ParquetFile`.

    Raises:
        ValueError: `path` is none.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path}: not a readable Parquet file ({line})") from None


def read_tables(
    paths: list[Path], max_points: int | None, max_events: int | None
) -> Iterator[tuple[str, np.ndarray, Any]]:
    """
    Tables of at most `EVENTS_AT_ONCE` events with all columns of the files: file, numbers of its events, table.

    Args:
        max_points: leave out events with more points.
        max_events: stop after so many events.

    Raises:
        ValueError: a file cannot be read, lacks a column, has a missing value, or has other columns than the first.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    schema, left = None, max_events
    for path in paths:
        file = open_parquet(path)
        for name in POINT_COLUMNS:
            if name not in file.schema_arrow.names:
                raise ValueError(f"{path}: column {name!r} is missing (found: {', '.join(file.schema_arrow.names)})")
            kind = file.schema_arrow.field(name).type
            if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
                raise ValueError(f"{path}: column {name!r} holds {kind}, not lists")
        schema = file.schema_arrow if schema is None else schema
        if not file.schema_arrow.equals(schema):
            raise ValueError(f"{path}: has other columns than {paths[0]}, expected files of one kind")
        row = 0
        try:
            for batch in file.iter_batches(EVENTS_AT_ONCE):
                table = pa.Table.from_batches([batch])
                rows = row + np.arange(len(table))
                row += len(table)
                for name in POINT_COLUMNS:
                    if table[name].null_count:
                        missing = rows[np.argmax(table[name].is_null().to_numpy())]
                        raise ValueError(f"{path}: row {missing}: {name} is null, expected a list of numbers")
                if max_points is not None:
                    keep = pc.less_equal(pc.list_value_length(table["E"]), max_points)
                    table, rows = table.filter(keep), rows[keep.to_numpy()]
                table, rows = table[:left], rows[:left]
                left = None if left is None else left - len(table)
                if len(table):
                    yield str(path), rows, table
                if left == 0:
                    return
        except (pa.ArrowException, OSError) as error:
            line = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"{path}: cannot be read ({line})") from None


def find_tracks(arguments: argparse.Namespace) -> int:
    """Writes the predictions, whole or not at all; returns the number of events."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch
    from tqdm import tqdm

    from hepzoo.evaluation.tracks_dirc import expand_paths

    check_at_least(arguments, 1, "batch_size", "max_events")
    chosen = [option for option in MODELS if getattr(arguments, option) is not None]
    if not chosen:
        raise ValueError("set --model, --pid_model or --noise_model")
    paths = expand_paths(arguments.input)
    if arguments.output.suffix != ".parquet":
        raise ValueError(f"--output {arguments.output}: expected a name that ends in .parquet")
    device = "cuda" if torch.cuda.is_available() and not arguments.cpu else "cpu"
    predictors = [Predictor(getattr(arguments, option), option, device) for option in chosen]
    max_points = None
    if arguments.drop_long_events:
        max_points = min(predictor.extractor.max_points for predictor in predictors)
    total = sum(open_parquet(path).metadata.num_rows for path in paths)
    total = total if arguments.max_events is None else min(total, arguments.max_events)

    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    partial = arguments.output.with_name(f".{arguments.output.name}.partial")
    writer, events = None, 0
    try:
        with tqdm(total=total, unit=" events", desc="finding tracks") as bar:
            for path, rows, table in read_tables(paths, max_points, arguments.max_events):
                columns = {
                    name: [np.asarray(values.as_py(), np.float32) for values in table[name]] for name in POINT_COLUMNS
                }
                predictions = {}
                for predictor in predictors:
                    try:
                        predictions |= predictor(columns, arguments.batch_size)
                    except ValueError as error:
                        raise ValueError(f"{path}: {renumber_row(error, rows)}") from None
                for column, found in predictions.items():
                    if column in table.column_names:
                        table = table.drop_columns([column])
                    table = table.append_column(column, pa.array(found, pa.list_(pa.int32())))
                writer = pq.ParquetWriter(partial, table.schema) if writer is None else writer
                writer.write_table(table)
                events += len(table)
                bar.update(len(table))
        if writer is None:
            raise ValueError(f"{', '.join(map(str, arguments.input))}: no events")
        writer.close()
        partial.replace(arguments.output)
    finally:
        if writer is not None:
            writer.close()
        partial.unlink(missing_ok=True)
    return events


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="track finder: folder or Hub name (of run_tracking.py)")
    parser.add_argument("--pid_model", help="particle identification (of run_token_classification.py --target pid)")
    parser.add_argument("--noise_model", help="noise tagging (of run_token_classification.py --target noise)")
    parser.add_argument("--input", nargs="+", required=True, metavar="FILES", help="Parquet files, folders or patterns")
    parser.add_argument("--output", type=Path, required=True, help="Parquet file to write")
    parser.add_argument("--batch_size", type=int, default=8, help="events at a time (8)")
    parser.add_argument("--max_events", type=int, help="stop after so many events")
    parser.add_argument(
        "--drop_long_events", action="store_true", help="leave out events that are longer than the model takes"
    )
    parser.add_argument("--cpu", action="store_true", help="do not use a GPU")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Finds tracks; returns the exit status."""
    arguments = build_parser().parse_args(argv)
    try:
        events = find_tracks(arguments)
    except (ValueError, OSError) as error:
        print(f"find_tracks.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"{events} events in {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
