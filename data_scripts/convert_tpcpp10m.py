"""
TPCpp-10M space points (npz, Zenodo 16970029) -> sharded Parquet.

One npz shard gives one Parquet file, which appears complete or not at all; a run that was interrupted goes on with the
shards that are missing. The arrays of one npz shard are in memory at a time: compressed members of an npz archive
cannot be memory-mapped.
"""

import argparse
import os
import re
import sys
import textwrap
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from hepzoo.data_scripts.tpc_schema import (
    LABEL_COLUMNS,
    PID_CLASSES,
    POINT_COLUMNS,
    TRUTH_COLUMNS,
    pid_class,
    tpc_features,
)

# Folders of the published archive, of its older description, and names of one folder for all.
SPLIT_FOLDERS = {
    "unlabeled": ("unlabeled",),
    "train": ("labeled/train", "labeled_train", "train"),
    "validation": ("labeled/validation", "labeled/val", "labeled_validation", "labeled_val", "validation", "val"),
    "test": ("labeled/test", "labeled_test", "test"),
}
# column: (file stems, key of the array)
LABEL_FILES = {"track_id": ("track_ids",), "pid": ("pid_labels", "particle_ids"), "noise": ("noise_tags",)}
TRUTH_FILE = "truth_tracks"
ROW_GROUP_SIZE = 1000


class UnreadableShardError(ValueError):
    """A file that is truncated, damaged, or not an npz archive."""


@dataclass(frozen=True)
class Shard:
    """The files of one shard; `labels` maps columns of the schema to files."""

    points: Path
    labels: dict[str, Path]
    truth: Path | None


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def find_splits(root: str | os.PathLike) -> dict[str, Path]:
    """The splits below `root`: name of the split -> its folder.

    Args:
        root: the unpacked archive, its folder `labeled`, or the folder of one split.

    Raises:
        ValueError: there is none, or one split is there under two spellings.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder; expected the unpacked data set or the folder of one split")
    if any(root.glob("spacepoints*.npz")):
        name = root.resolve().name
        return {next((split for split, folders in SPLIT_FOLDERS.items() if name in folders), name): root}
    found = {}
    for split, folders in SPLIT_FOLDERS.items():
        present = [root / folder for folder in folders if any((root / folder).glob("spacepoints*.npz"))]
        if len(present) > 1:
            raise ValueError(f"split {split} is there twice: {present[0]} and {present[1]}")
        if present:
            found[split] = present[0]
    if not found:
        raise ValueError(f"{root}: no spacepoints*.npz here or in the folders unlabeled, labeled/train, ...")
    return found


def find_shards(folder: str | os.PathLike) -> list[Shard]:
    """The shards of one split, in the order of their numbers.

    Raises:
        ValueError: a label file of a shard is missing, or one belongs to no shard.
    """
    folder = Path(folder)
    stems = ("spacepoints", *(stem for names in LABEL_FILES.values() for stem in names), TRUTH_FILE)
    files: dict[str, dict[str, Path]] = {stem: {} for stem in stems}
    for path in sorted(folder.glob("*.npz")):
        match = re.fullmatch(rf"({'|'.join(stems)})((?:_\d+)?)\.npz", path.name)
        if match:
            files[match[1]][match[2]] = path
    points = files["spacepoints"]
    if not points:
        raise ValueError(f"{folder}: no spacepoints.npz or spacepoints_000.npz")
    for stem in stems[1:]:
        for number, path in files[stem].items():
            if number not in points:
                raise ValueError(f"{path}: there is no spacepoints{number}.npz beside it")
    labels: dict[str, dict[str, Path]] = {}
    for column, names in LABEL_FILES.items():
        present = [name for name in names if files[name]]
        if len(present) > 1:
            raise ValueError(f"{folder}: both {present[0]} and {present[1]} files; expected one spelling")
        if present:
            labels[column] = files[present[0]]
    truth = files[TRUTH_FILE]
    for what, group in [*labels.items(), *([("truth", truth)] if truth else [])]:
        missing = sorted(set(points) - set(group))
        if missing:
            example = next(iter(group.values())).name
            raise ValueError(f"{points[missing[0]]}: no {what} file for it, though there is {example}")
    numbers = sorted(points, key=lambda number: int(number[1:] or 0))
    return [
        Shard(points[number], {column: group[number] for column, group in labels.items()}, truth.get(number))
        for number in numbers
    ]


def _load(path: Path, *keys: str) -> list[np.ndarray]:
    """Arrays of an npz archive; pickled objects are refused.

    Raises:
        UnreadableShardError: the file is damaged, lacks a key, or holds a pickle.
    """
    try:
        archive = np.load(path, allow_pickle=False)
        if isinstance(archive, np.ndarray):
            raise UnreadableShardError(f"{path}: one array, not an npz archive")
        with archive:
            for key in keys:
                if key not in archive.files:
                    raise UnreadableShardError(f"{path}: no array {key!r}; there are {', '.join(archive.files)}")
            return [archive[key] for key in keys]
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, NotImplementedError) as error:
        if isinstance(error, (UnreadableShardError, FileNotFoundError, PermissionError)):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UnreadableShardError(f"{path}: damaged or not an npz archive ({reason})") from None


# ---------------------------------------------------------------------------------------------------------------------
# Content
# ---------------------------------------------------------------------------------------------------------------------


def read_shard(shard: Shard, pid_from_pdg: bool = False) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The columns of a shard, checked.

    Args:
        pid_from_pdg: the particle labels are PDG codes rather than indices in `PID_CLASSES`.

    Returns:
        (columns, sizes): the point and label columns lie end to end (points,); `sizes` (events,) int64 are the points
        per event. Truth columns (tracks,) are sorted by event, with `truth_event` (tracks,) beside them.

    Raises:
        UnreadableShardError: a file is damaged.
        ValueError: lengths that do not agree, values that are not finite or out of range.
    """
    data, sizes = _load(shard.points, "data", "size")
    if data.ndim != 2 or data.shape[1] != 4 or data.dtype.kind not in "iuf":
        raise ValueError(f"{shard.points}: data must be numbers of shape (points, 4), got {data.dtype} {data.shape}")
    if sizes.ndim != 1 or sizes.dtype.kind not in "iu" or (sizes.size and sizes.min() < 0):
        raise ValueError(f"{shard.points}: size must be non-negative integers of shape (events,)")
    # sums of larger sizes could wrap around
    large = np.flatnonzero(sizes > len(data))
    if large.size:
        size = sizes[large[0]]
        raise ValueError(f"{shard.points}: event {large[0]}: size is {size}, but data has {len(data)} points")
    sizes = sizes.astype(np.int64)
    if sizes.sum() != len(data):
        raise ValueError(f"{shard.points}: size adds up to {sizes.sum()} points, but data has {len(data)}")
    ends = np.cumsum(sizes)
    with np.errstate(over="ignore"):
        bad = ~np.isfinite(data.astype(np.float32, copy=False))
    if bad.any():
        point, column = np.argwhere(bad)[0]
        event = int(np.searchsorted(ends, point, side="right"))
        name = list(POINT_COLUMNS)[column]
        raise ValueError(
            f"{shard.points}: event {event}, point {point - ends[event] + sizes[event]}: {name} = "
            f"{data[point, column]}; expected a finite number of float32"
        )
    columns = {name: np.ascontiguousarray(data[:, k], dtype=np.float32) for k, name in enumerate(POINT_COLUMNS)}
    for column, path in shard.labels.items():
        (labels,) = _load(path, "data")
        if labels.shape != (len(data),) or labels.dtype.kind not in "iub":
            raise ValueError(
                f"{path}: data must be integers or flags of shape ({len(data)},), one per point of "
                f"{shard.points.name}, got {labels.dtype} {labels.shape}"
            )
        if column == "pid" and pid_from_pdg:
            labels = pid_class(labels)
        highest = {"pid": len(PID_CLASSES) - 1, "noise": 1}.get(column, np.iinfo(np.int64).max)
        wrong = labels > highest if column == "track_id" else (labels < 0) | (labels > highest)
        if wrong.any():
            point = int(np.argmax(wrong))
            event = int(np.searchsorted(ends, point, side="right"))
            hint = " (PDG codes: use --pid_from_pdg)" if column == "pid" else ""
            raise ValueError(
                f"{path}: event {event}, point {point - ends[event] + sizes[event]}: {column} = {labels[point]}; "
                f"expected 0..{highest}{hint}"
            )
        columns[column] = labels.astype(LABEL_COLUMNS[column].feature.dtype)
    if shard.truth is not None:
        columns |= _read_truth(shard.truth, len(sizes))
    return columns, sizes


def _read_truth(path: Path, num_events: int) -> dict[str, np.ndarray]:
    event, track_id, pdg, kinematics, num_points = _load(path, "event", "track_id", "pdg", "kin", "n_points")
    tracks = event.size
    for name, array in (("event", event), ("track_id", track_id), ("pdg", pdg), ("n_points", num_points)):
        if array.shape != (tracks,) or array.dtype.kind not in "iu":
            raise ValueError(f"{path}: {name} must be integers of shape ({tracks},), got {array.dtype} {array.shape}")
    if kinematics.shape != (tracks, 8) or kinematics.dtype.kind != "f" or not np.isfinite(kinematics).all():
        raise ValueError(f"{path}: kin must be finite numbers of shape ({tracks}, 8), got {kinematics.shape}")
    if tracks and (event.min() < 0 or event.max() >= num_events):
        raise ValueError(f"{path}: event {event.min()}..{event.max()}; expected 0..{num_events - 1}")
    for name, array, column in (("pdg", pdg, "truth_pdg"), ("charge in kin", kinematics[:, 6], "truth_charge")):
        limits = np.iinfo(TRUTH_COLUMNS[column].feature.dtype)
        wrong = np.flatnonzero((array < limits.min) | (array > limits.max) | (array != np.round(array)))
        if wrong.size:
            expected = f"expected integers of {limits.min}..{limits.max}"
            raise ValueError(f"{path}: {name} of track {wrong[0]} is {array[wrong[0]]}; {expected}")
    px, py, pz, vx, vy, vz, charge, energy = kinematics.astype(np.float64).T
    pt = np.hypot(px, py)
    with np.errstate(divide="ignore", invalid="ignore"):
        eta = np.where(pt > 0, np.arcsinh(pz / pt), np.copysign(np.inf, pz))
    values = (track_id, pdg, pt, eta, np.arctan2(py, px), vx, vy, vz, charge, energy, num_points)
    order = np.argsort(event, kind="stable")
    columns = {
        name: array[order].astype(TRUTH_COLUMNS[name].feature.dtype)
        for name, array in zip(TRUTH_COLUMNS, values, strict=True)
    }
    return {"truth_event": event[order], **columns}


def iter_tables(columns: dict[str, np.ndarray], sizes: np.ndarray, keep: np.ndarray) -> Iterator[pa.Table]:
    """The events `keep` (events,) bool of a shard as tables of at most `ROW_GROUP_SIZE` rows."""
    columns = dict(columns)
    truth_event = columns.pop("truth_event", None)
    offsets = {"point": np.concatenate([[0], np.cumsum(sizes)])}
    if truth_event is not None:
        offsets["truth"] = np.searchsorted(truth_event, np.arange(len(sizes) + 1))
    schema = tpc_features(columns).arrow_schema
    for start in range(0, len(sizes), ROW_GROUP_SIZE):
        stop = min(start + ROW_GROUP_SIZE, len(sizes))
        arrays = []
        for field in schema:
            bounds = offsets["truth" if field.name in TRUTH_COLUMNS else "point"][start : stop + 1]
            if bounds[-1] - bounds[0] > np.iinfo(np.int32).max:
                raise ValueError(f"events {start}..{stop - 1}: {bounds[-1] - bounds[0]} points are too many")
            flat = pa.array(columns[field.name][bounds[0] : bounds[-1]])
            offset = pa.array(bounds - bounds[0], pa.int32())
            arrays.append(pa.ListArray.from_arrays(offset, flat, type=field.type))
        yield pa.Table.from_arrays(arrays, schema=schema).filter(pa.array(keep[start:stop]))


def convert_split(
    folder: str | os.PathLike,
    output: str | os.PathLike,
    split: str,
    pid_from_pdg: bool = False,
    drop_empty: bool = False,
    skip_corrupt: bool = False,
    overwrite: bool = False,
    report: Callable[[str], None] | None = None,
) -> list[Path]:
    """Converts the shards of one split to `<output>/<split>-00000-of-000NN.parquet`, one file per shard.

    A file that is there already is kept if it has the rows of its shard, so that an interrupted run can go on.

    Args:
        folder: with the npz files of the split.
        drop_empty: leaves out events without points, counted, instead of refusing them.
        skip_corrupt: leaves out shards that cannot be read, reported and counted; their number stays free.
        overwrite: converts again what is there.
        report: called with one line per shard; None is silent.

    Returns:
        The files of the split, in order.

    Raises:
        ValueError: a shard is not usable; the files of earlier shards stay.
    """
    if not re.fullmatch(r"\w[\w.]*", split):
        raise ValueError(f"split must be a plain name of letters, digits, '_' and '.', got {split!r}")
    report = report or (lambda line: None)
    shards = find_shards(folder)
    output = Path(output)
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file; expected a directory for the shards")
    names = [f"{split}-{index:05d}-of-{len(shards):05d}.parquet" for index in range(len(shards))]
    stale = sorted(path.name for path in output.glob(f"{split}-*-of-*.parquet") if path.name not in names)
    if stale:
        raise ValueError(f"{output} holds {stale[0]}, not one of the {len(shards)} shards of {split}; remove it first")
    output.mkdir(parents=True, exist_ok=True)
    paths, skipped = [], 0
    for shard, name in zip(tqdm(shards, desc=split, unit="shard", file=sys.stderr, disable=None), names, strict=True):
        path = output / name
        try:
            if path.exists() and not overwrite:
                report(_kept(shard, path, drop_empty))
            else:
                report(_convert_shard(shard, path, pid_from_pdg, drop_empty))
        except UnreadableShardError as error:
            if not skip_corrupt:
                raise
            skipped += 1
            report(f"skipped: {error}")
            continue
        paths.append(path)
    if skipped:
        report(f"{skipped} of {len(shards)} shards skipped")
        if not paths:
            raise ValueError(f"{folder}: none of the shards could be read")
    return paths


def _kept(shard: Shard, path: Path, drop_empty: bool) -> str:
    (sizes,) = _load(shard.points, "size")
    expected = np.count_nonzero(sizes) if drop_empty else len(sizes)
    try:
        rows = pq.read_metadata(path).num_rows
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} cannot be read ({str(error).splitlines()[0]}); convert it again: overwrite") from None
    if rows != expected:
        raise ValueError(f"{path} has {rows} events, but {shard.points} has {expected}; convert it again: overwrite")
    return f"{path.name}: kept, {rows} events"


def _convert_shard(shard: Shard, path: Path, pid_from_pdg: bool, drop_empty: bool) -> str:
    columns, sizes = read_shard(shard, pid_from_pdg)
    keep = sizes > 0
    if not keep.all() and not drop_empty:
        raise ValueError(
            f"{shard.points}: event {int(np.argmin(keep))} has no points; expected at least 1 (--drop_empty leaves "
            "such events out)"
        )
    schema = tpc_features(name for name in columns if name != "truth_event").arrow_schema
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
            for table in iter_tables(columns, sizes, keep):
                writer.write_table(table)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    counts = Counter({"events": int(keep.sum()), "points": int(sizes.sum()), "dropped": int((~keep).sum())})
    line = f"{path.name}: {counts['events']} events, {counts['points']} points"
    return line + (f", {counts['dropped']} events without points left out" if counts["dropped"] else "")


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="hepzoo convert-data tpcpp10m",
        description="Convert TPCpp-10M space points (npz) to sharded Parquet, one folder per split.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=textwrap.dedent(
            """\
            examples:
              python data_scripts/convert_tpcpp10m.py TPCpp-10M --output data/tpc
              python data_scripts/convert_tpcpp10m.py TPCpp-10M --output data/tpc --split train --split validation
              python data_scripts/convert_tpcpp10m.py my_events/labeled_val --output data/tpc
            writes data/tpc/unlabeled/unlabeled-00000-of-00100.parquet, data/tpc/train/train-00000-of-00007.parquet, ...
            read back:
              datasets.load_dataset("parquet", data_files="data/tpc/train/*.parquet", streaming=True)

            layout, per split: spacepoints.npz (data, size), track_ids.npz, pid_labels.npz or particle_ids.npz,
            noise_tags.npz (data), and truth_tracks.npz where there is one; or numbered shards spacepoints_000.npz, ...
            Run the same command again after an interruption: finished shards are kept.
            """
        ),
    )
    parser.add_argument("folder", metavar="FOLDER", help="the unpacked data set, or the folder of one split")
    parser.add_argument("--output", required=True, metavar="DIR", help="each split becomes a folder in it")
    parser.add_argument(
        "--split",
        action="append",
        metavar="NAME",
        help="only this split; can be given several times (default: all). Of the folder of one split: its name",
    )
    parser.add_argument("--pid_from_pdg", action="store_true", help="the particle labels are PDG codes")
    parser.add_argument("--drop_empty", action="store_true", help="leave out events without points, counted")
    parser.add_argument("--skip_corrupt", action="store_true", help="leave out truncated or damaged shards")
    parser.add_argument("--overwrite", action="store_true", help="convert again what is there")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    args = build_parser().parse_args(argv)
    options: dict[str, Any] = {
        name: getattr(args, name) for name in ("pid_from_pdg", "drop_empty", "skip_corrupt", "overwrite")
    }
    try:
        splits = find_splits(args.folder)
        if list(splits.values()) == [Path(args.folder)] and len(args.split or ()) == 1:
            splits = {args.split[0]: Path(args.folder)}  # the folder of one split, under the name that was asked for
        for name in args.split or ():
            if name not in splits:
                raise ValueError(f"{args.folder}: no split {name!r}; there are {', '.join(splits)}")
        for split in args.split or splits:
            paths = convert_split(splits[split], Path(args.output) / split, split, report=print, **options)
            print(f"{split}: {len(paths)} file(s) in {Path(args.output) / split}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
