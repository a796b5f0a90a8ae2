"""What the converters of jet files share: opening, checks, the columns of a block of jets, and the writing loop."""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Features
from tqdm import tqdm

from hepzoo.data_scripts.hdf5_files import UnreadableFileError, check_values_are_here, import_h5py
from hepzoo.data_scripts.jets_schema import LABEL_COLUMNS, REQUIRED_COLUMNS
from hepzoo.data_scripts.shards import ShardWriter
from hepzoo.tokenization.jet_features import wrap_phi

BLOCK_BYTES = 32 * 2**20
MAX_ROW_BYTES = 64 * 2**20
FLOAT32_MAX = float(np.finfo(np.float32).max)


@dataclass
class JetFile:
    """What a file holds, known before its jets are read.

    Attributes:
        num_jets: jets in the file.
        features: the columns that it gives.
        ignored: contents that have no column, named in the report.
    """

    num_jets: int
    features: Features
    ignored: Sequence[str] = ()


@dataclass
class JetBlock:
    """Consecutive jets of a file.

    Attributes:
        lengths: constituents of each jet, shape (jets,).
        particles: the part_* columns of all constituents, jet after jet, shape (constituents,).
        jets: the other columns, shape (jets,).
    """

    lengths: np.ndarray
    particles: dict[str, np.ndarray]
    jets: dict[str, np.ndarray] = field(default_factory=dict)


# ---------------------------------------------------------------------------------------------------------------------
# HDF5
# ---------------------------------------------------------------------------------------------------------------------


def hdf5_dataset(group, name: str, path, columns: int | None = None, rows: int | None = None):
    """The dataset `name` of a group, checked: plain numbers that are stored in this file.

    Args:
        columns: expected size of the last axis of a table (rows, columns); None accepts any shape and type.
        rows: expected size of the first axis.

    Raises:
        ValueError: it is missing, has another shape, or is compressed in a way that h5py cannot read.
    """
    data = group.get(name)
    if not isinstance(data, import_h5py().Dataset):
        found = ", ".join(sorted(group))[:100] or "nothing"
        raise ValueError(f"{path}: dataset {name} is missing; the file holds {found}")
    if columns is not None and (data.ndim != 2 or data.shape[1] != columns or data.dtype.kind not in "iufb"):
        raise ValueError(f"{path}: {name} must be numbers (N, {columns}), found {data.dtype} of shape {data.shape}")
    if rows is not None and (not data.ndim or len(data) != rows):
        raise ValueError(f"{path}: {name} has shape {data.shape}; expected {rows} rows")
    check_values_are_here(data, name, group, path)
    return data


def row_blocks(num_rows: int, row_bytes: int, path) -> Iterator[slice]:
    """Slices of at most 32 MiB that cover `num_rows` rows.

    Raises:
        ValueError: one row is larger than 64 MiB.
    """
    if row_bytes > MAX_ROW_BYTES:
        raise ValueError(f"{path}: one jet takes {row_bytes / 2**20:.0f} MiB; expected at most 64 MiB")
    step = max(1, BLOCK_BYTES // max(row_bytes, 1024))
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


# ---------------------------------------------------------------------------------------------------------------------
# Kinematics
# ---------------------------------------------------------------------------------------------------------------------


def stored_places(momenta: np.ndarray, first: int, path) -> tuple[np.ndarray, np.ndarray]:
    """Jet and place of the constituents of zero-padded four-momenta: where the energy is not zero.

    Args:
        momenta: px, py, pz, energy, shape (jets, places, 4).
        first: number of the first jet, for the message.

    Raises:
        ValueError: an entry has a momentum but no energy.
    """
    stored = momenta[..., 3] != 0
    jet, place = np.nonzero(~stored & np.any(momenta[..., :3] != 0, axis=-1))
    if jet.size:
        raise ValueError(
            f"{path}: jet {first + jet[0]}, place {place[0]}: energy = 0 with momentum "
            f"{momenta[jet[0], place[0], :3].tolist()}, expected zeros in padding"
        )
    return np.nonzero(stored)


def cylindrical(px, py, pz) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """pT (GeV), eta and phi of momenta in GeV; eta is 0 where the momentum is."""
    px, py, pz = (np.asarray(values, dtype=np.float64) for values in (px, py, pz))
    pt = np.hypot(px, py)
    return pt, np.arcsinh(pz / np.maximum(pt, 1e-9)), np.arctan2(py, px)


def summed_jets(block: JetBlock) -> dict[str, np.ndarray]:
    """jet_pt, jet_eta, jet_phi, jet_energy, jet_nparticles of the sum of the constituents."""
    size = len(block.lengths)
    jet = np.repeat(np.arange(size), block.lengths)
    px, py, pz, energy = (
        np.bincount(jet, block.particles[name].astype(np.float64), minlength=size) for name in REQUIRED_COLUMNS
    )
    values = (*cylindrical(px, py, pz), energy, block.lengths)
    return dict(zip(("jet_pt", "jet_eta", "jet_phi", "jet_energy", "jet_nparticles"), values, strict=True))


def relative_angles(block: JetBlock) -> dict[str, np.ndarray]:
    """part_deta and part_dphi of the constituents, relative to jet_eta and jet_phi of the block."""
    jet = np.repeat(np.arange(len(block.lengths)), block.lengths)
    _, eta, phi = cylindrical(*(block.particles[name] for name in REQUIRED_COLUMNS[:3]))
    jet_eta, jet_phi = (block.jets[name].astype(np.float64) for name in ("jet_eta", "jet_phi"))
    sign = np.where(jet_eta > 0, 1, -1)
    return {"part_deta": (sign[jet] * (eta - jet_eta[jet])), "part_dphi": wrap_phi(phi - jet_phi[jet])}


# ---------------------------------------------------------------------------------------------------------------------
# Conversion
# ---------------------------------------------------------------------------------------------------------------------


def _checked_columns(block: JetBlock, features: Features, first: int, path, counts: Counter) -> dict[str, Any]:
    """The columns of a block, checked and in their types; `first` is the number of its first jet."""
    size = len(block.lengths)
    starts = np.concatenate([[0], np.cumsum(block.lengths)])
    for name in REQUIRED_COLUMNS:
        values = block.particles[name]
        good = np.abs(values) <= FLOAT32_MAX
        if name == "part_energy":
            good &= values >= 0
        if not good.all():
            bad = int(np.argmin(good))
            jet = int(np.searchsorted(starts, bad, side="right")) - 1
            expected = "an energy of at least 0 GeV" if name == "part_energy" else "a finite momentum in GeV"
            raise ValueError(
                f"{path}: jet {first + jet}, constituent {bad - starts[jet]}: {name} = {values[bad]:g}, "
                f"expected {expected}"
            )
    if set(LABEL_COLUMNS) <= block.jets.keys():
        labels = np.stack([block.jets[name] for name in LABEL_COLUMNS], axis=1)
        good = np.all((labels == 0) | (labels == 1), axis=1) & (labels.sum(axis=1) == 1)
        if not good.all():
            bad = int(np.argmin(good))
            raise ValueError(
                f"{path}: jet {first + bad}: labels {labels[bad].astype(float).tolist()}, expected one 1 and nine 0"
            )

    columns: dict[str, Any] = {}
    for name, feature in features.items():
        if name in block.particles:
            values = block.particles[name]
            counts["not_finite"] += _not_finite(values)
            values = values.astype(np.float32) if feature.feature.dtype == "float32" else values
            columns[name] = np.split(values, starts[1:-1]) if size else []
        else:
            values = block.jets[name]
            counts["not_finite"] += _not_finite(values)
            columns[name] = values.astype(feature.dtype) if feature.dtype in ("float32", "bool") else values
    counts["jets"] += size
    counts["constituents"] += int(starts[-1])
    counts["empty"] += int((block.lengths == 0).sum())
    return columns


def _not_finite(values: np.ndarray) -> int:
    return int((~np.isfinite(values)).sum()) if values.dtype.kind == "f" else 0


def convert_files(
    paths: Sequence[str | os.PathLike],
    output: str | os.PathLike,
    describe: Callable[[Any], JetFile],
    read: Callable[[Any, Counter], Iterator[JetBlock]],
    split: str = "train",
    rows_per_shard: int = 5000,
    skip_corrupt: bool = False,
    overwrite: bool = False,
    report: Callable[[str], None] | None = None,
) -> list[Path]:
    """Converts jet files to the shards of one split, with memory for a few thousand jets.

    Args:
        paths: input files.
        output: directory of the shards.
        describe: gives the content of a file; called for all files first, so that a wrong one shows early.
        read: gives the jets of a file; it may increase counters named as they shall be reported ("jets with ...").
        skip_corrupt: leaves out files that are not readable (truncated, damaged), reported and counted. Of a file
            that turns out to be damaged in the middle, the jets in front of the damage are kept. Files with impossible
            values are an error nevertheless.
        report: called with one line per file; None is silent.

    Returns:
        The written files.

    Raises:
        ValueError: a file or a jet is not usable; nothing is written then.
    """
    report = report or (lambda line: None)
    described: list[tuple[Any, JetFile]] = []
    skipped = 0
    for path in paths:
        try:
            described.append((path, describe(path)))
        except UnreadableFileError as error:
            if not skip_corrupt:
                raise
            skipped += 1
            report(f"skipped: {error}")
    if not described:
        raise ValueError("none of the files could be read")
    features = described[0][1].features
    for path, content in described:
        different = sorted(features.keys() ^ content.features.keys())
        if different:
            has = "has" if different[0] in content.features else "lacks"
            raise ValueError(
                f"{path}: {has} column {different[0]}, unlike {described[0][0]}; expected files of equal columns"
            )

    with ShardWriter(output, features, split, rows_per_shard, overwrite=overwrite) as writer:
        for path, content in described:
            counts: Counter = Counter()
            try:
                with tqdm(
                    total=content.num_jets, desc=Path(path).name, unit="jet", file=sys.stderr, disable=None
                ) as bar:
                    for block in read(path, counts):
                        columns = _checked_columns(block, features, counts["jets"], path, counts)
                        try:
                            bar.update(writer.write(columns))
                        except ValueError as error:
                            raise ValueError(f"{path}: {error}") from None
            except UnreadableFileError as error:
                if not skip_corrupt:
                    raise
                skipped += 1
                report(f"skipped: {error}; {counts['jets']} jets in front of the damage were kept")
                continue
            report(f"{path}: {_summary(counts, content)}")
        if skipped:
            report(f"{skipped} of {len(paths)} files skipped")
        if not writer.num_rows and skipped == len(paths):
            raise ValueError("none of the files could be read")
    return writer.paths


def _summary(counts: Counter, content: JetFile) -> str:
    line = f"{counts['jets']} jets, {counts['constituents']} constituents"
    if counts["empty"]:
        line += f", {counts['empty']} jets without a constituent"
    if counts["not_finite"]:
        line += f", {counts['not_finite']} values that are not finite, kept"
    for name in sorted(counts.keys() - {"jets", "constituents", "empty", "not_finite"}):
        if counts[name]:
            line += f", {counts[name]} {name}"
    if content.ignored:
        line += f"; not converted: {', '.join(content.ignored)}"
    return line


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """The options that all converters of jets share."""
    parser.add_argument("files", nargs="+", metavar="FILE", help="input file")
    parser.add_argument("--output", required=True, metavar="DIR", help="directory of the Parquet shards")
    parser.add_argument("--split", default="train", help="split name, first part of the file names (default: train)")
    parser.add_argument("--skip_corrupt", action="store_true", help="leave out truncated or damaged files")
    parser.add_argument("--rows_per_shard", type=int, default=5000, metavar="N", help="default: %(default)s")
    parser.add_argument("--overwrite", action="store_true", help="replace shards of the same split")


def run_conversion(args: argparse.Namespace, describe, read) -> int:
    """Runs `convert_files` with the options of `add_output_options`; returns the exit status."""
    try:
        paths = convert_files(
            args.files,
            args.output,
            describe,
            read,
            split=args.split,
            rows_per_shard=args.rows_per_shard,
            skip_corrupt=args.skip_corrupt,
            overwrite=args.overwrite,
            report=print,
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(paths)} file(s) in {args.output}")
    return 0
