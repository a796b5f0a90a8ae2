"""Top-tagging reference data and JetNet (both HDF5) -> sharded Parquet.

| layout | content |
|---|---|
| toptagging | Zenodo record 2603256 (arXiv 1902.09914): pandas table of E_0, PX_0, PY_0, PZ_0, ..., is_signal_new |
| jetnet | Zenodo records 6975117, 6975118 (arXiv 2106.11535): particle_features and jet_features |

toptagging: DataFrames that pandas wrote with format="table" or format="fixed", of any number of constituents, read
without pandas; columns of plain numbers, without a multi-index. The four-momenta are massless to rounding, in GeV;
truthE, truthPX, truthPY, truthPZ become aux_genpart_*.

jetnet: particle_features (N, P, 3 or 4) = etarel, phirel, ptrel and a mask; jet_features (N, 4) = pt, eta, mass,
number of particles. Four-momenta are made with massless constituents and jet_phi = 0, which the files do not hold.
"""

import argparse
import os
import pickletools
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from datasets import Features, Value

from hepzoo.data_scripts.hdf5_files import import_h5py, opened_hdf5
from hepzoo.data_scripts.jet_files import (
    JetBlock,
    JetFile,
    add_output_options,
    cylindrical,
    hdf5_dataset,
    relative_angles,
    row_blocks,
    run_conversion,
    stored_places,
    summed_jets,
)
from hepzoo.data_scripts.jets_schema import LABEL_COLUMNS, REQUIRED_COLUMNS, jet_features, label_values

LAYOUTS = ("toptagging", "jetnet")
JETNET_CLASSES = {"g": "QCD", "q": "QCD", "t": "Tbqq", "w": "Wqq", "z": "Zqq"}
SIGNAL = "is_signal_new"
TRUTH = ("truthPX", "truthPY", "truthPZ")

_JET_COLUMNS = ("jet_pt", "jet_eta", "jet_phi", "jet_energy", "jet_nparticles")
_SHARED_COLUMNS = (*REQUIRED_COLUMNS, "part_deta", "part_dphi", *LABEL_COLUMNS, *_JET_COLUMNS)
_TRUTH_COLUMNS = ("aux_genpart_pt", "aux_genpart_eta", "aux_genpart_phi")
JETNET_FEATURES = jet_features(
    _SHARED_COLUMNS,
    Features({"jet_mass": Value("float32"), "jet_type": Value("string")}),  # GeV; g, q, t, w, z
)


def detect_layout(path: str | os.PathLike, key: str = "table") -> str:
    """The layout of a file, one of `LAYOUTS`.

    Raises:
        ValueError: it has none of them.
    """
    with opened_hdf5(path) as file:
        if "particle_features" in file:
            return "jetnet"
        if isinstance(file.get(key), import_h5py().Group):
            return "toptagging"
        found = ", ".join(sorted(file))[:100] or "nothing"
        raise ValueError(f"{path}: expected a pandas table under the key {key}, or particle_features; found {found}")


# ---------------------------------------------------------------------------------------------------------------------
# DataFrames in HDF5
# ---------------------------------------------------------------------------------------------------------------------


def _pickled_names(value, path) -> list[str]:
    """The strings of a pickled list of strings, which is how pandas keeps column names; nothing is executed."""
    names = []
    try:
        for operation, argument, _ in pickletools.genops(bytes(value)):
            if operation.name in ("GLOBAL", "STACK_GLOBAL", "REDUCE", "INST", "OBJ", "NEWOBJ", "BUILD"):
                raise ValueError(f"it holds {operation.name}")
            if isinstance(argument, str):
                names.append(argument)
    except ValueError as error:
        raise ValueError(f"{path}: column names must be a pickled list of strings ({str(error):.80})") from None
    return names


class _Frame:
    """A DataFrame in an HDF5 file: column names, and rows of columns.

    Raises:
        ValueError: not a DataFrame of plain numbers in the formats of pandas.
    """

    def __init__(self, file, key: str, path):
        h5py = import_h5py()
        self.path = path
        group = file.get(key)
        if not isinstance(group, h5py.Group):
            raise ValueError(f"{path}: no pandas table under the key {key}")
        # (dataset, field of a compound type or None, column names)
        self.blocks: list[tuple] = []
        if isinstance(group.get("table"), h5py.Dataset):
            table = hdf5_dataset(group, "table", path)
            for name in table.dtype.names or ():
                kind = table.attrs.get(f"{name}_kind")
                if kind is not None and name != "index":
                    self.blocks.append((table, name, _pickled_names(kind, path)))
        else:
            for number in range(int(group.attrs.get("nblocks", 0))):
                values = hdf5_dataset(group, f"block{number}_values", path)
                names = hdf5_dataset(group, f"block{number}_items", path)[...]
                names = [name.decode() if isinstance(name, bytes) else str(name) for name in names.tolist()]
                self.blocks.append((values, None, names))
        self.places: dict[str, tuple[int, int]] = {}
        self.num_rows = None
        for block, (data, name, names) in enumerate(self.blocks):
            dtype = data.dtype[name] if name else data.dtype
            base, shape = dtype.subdtype or (dtype, ())
            width = data.shape[1:] if name is None else shape or (1,)
            if tuple(width) != (len(names),) or base.kind not in "iufb" or self.num_rows not in (None, len(data)):
                raise ValueError(f"{path}: {data.name} has {dtype} of shape {data.shape} for {len(names)} columns")
            self.num_rows = len(data)
            self.places |= {column: (block, index) for index, column in enumerate(names)}
        if not self.blocks:
            raise ValueError(f"{path}: {key} is not a DataFrame that pandas wrote as table or fixed")
        self.row_bytes = sum(data.dtype.itemsize * (1 if name else data.shape[1]) for data, name, _ in self.blocks)

    def rows(self, rows: slice) -> dict[str, np.ndarray]:
        """All columns of some rows."""
        loaded, values = {}, []
        for data, name, names in self.blocks:
            if id(data) not in loaded:
                loaded[id(data)] = data[rows]
            block = loaded[id(data)] if name is None else loaded[id(data)][name]
            values.append(block.reshape(-1, len(names)))
        return {column: values[block][:, index] for column, (block, index) in self.places.items()}


def _top_columns(frame: _Frame) -> tuple[list[str], list[str]]:
    """Names of the four-momentum columns, constituent after constituent, and of the columns that are not used."""
    momenta = []
    while f"E_{len(momenta) // 4}" in frame.places:
        momenta += [f"{name}_{len(momenta) // 4}" for name in ("PX", "PY", "PZ", "E")]
    for name in (*(momenta or ["E_0"]), SIGNAL):
        if name not in frame.places:
            raise ValueError(
                f"{frame.path}: column {name} is missing; expected E_0, PX_0, PY_0, PZ_0, E_1, ..., {SIGNAL}"
            )
    used = {*momenta, SIGNAL, "ttv", "truthE", *(TRUTH if set(TRUTH) <= frame.places.keys() else ())}
    return momenta, sorted(frame.places.keys() - used)


def _describe_toptagging(path, key: str) -> JetFile:
    with opened_hdf5(path) as file:
        frame = _Frame(file, key, path)
        _, unused = _top_columns(frame)
        columns = (*_SHARED_COLUMNS, *(_TRUTH_COLUMNS if set(TRUTH) <= frame.places.keys() else ()))
        extra = Features({"ttv": Value("int32")} if "ttv" in frame.places else {})  # 0 training, 1 test, 2 validation
        return JetFile(frame.num_rows, jet_features(columns, extra), unused)


def _read_toptagging(path, key: str) -> Iterator[JetBlock]:
    with opened_hdf5(path) as file:
        frame = _Frame(file, key, path)
        names, _ = _top_columns(frame)
        for rows in row_blocks(frame.num_rows, frame.row_bytes, path):
            columns = frame.rows(rows)
            padded = np.stack([columns[name] for name in names], axis=1).reshape(-1, len(names) // 4, 4)
            jet, place = stored_places(padded, rows.start, path)
            flat = padded[jet, place]
            signal = columns[SIGNAL]
            bad = np.flatnonzero((signal != 0) & (signal != 1))
            if bad.size:
                raise ValueError(f"{path}: jet {rows.start + bad[0]}: {SIGNAL} = {signal[bad[0]]}, expected 0 or 1")
            block = JetBlock(np.bincount(jet, minlength=len(padded)), dict(zip(REQUIRED_COLUMNS, flat.T, strict=True)))
            top, background = label_values("Tbqq"), label_values("QCD")
            block.jets |= {name: np.where(signal == 1, top[name], background[name]) for name in LABEL_COLUMNS}
            block.jets |= summed_jets(block)
            block.particles |= relative_angles(block)
            if set(TRUTH) <= columns.keys():
                block.jets |= dict(zip(_TRUTH_COLUMNS, cylindrical(*(columns[name] for name in TRUTH)), strict=True))
            if "ttv" in columns:
                block.jets["ttv"] = columns["ttv"]
            yield block


# ---------------------------------------------------------------------------------------------------------------------
# JetNet
# ---------------------------------------------------------------------------------------------------------------------


def jetnet_type(path: str | os.PathLike) -> str:
    """The jet type of a file named as published: g.hdf5, t150.hdf5.

    Raises:
        ValueError: the name says nothing.
    """
    stem = Path(path).name.split(".")[0].lower()
    if stem[:1] not in JETNET_CLASSES or not (stem[1:].isdigit() or len(stem) == 1):
        raise ValueError(f"{path}: the name tells no jet type (g, q, t, w, z); give it with --jet_type")
    return stem[0]


def _jetnet_datasets(file, path):
    jets = hdf5_dataset(file, "jet_features", path, columns=4)
    particles = hdf5_dataset(file, "particle_features", path, rows=len(jets))
    if particles.ndim != 3 or particles.shape[2] not in (3, 4) or particles.dtype.kind not in "iuf":
        raise ValueError(
            f"{path}: particle_features must be numbers (N, P, 3 or 4), found {particles.dtype} of shape "
            f"{particles.shape}"
        )
    return particles, jets


def _describe_jetnet(path, jet_type: str | None) -> JetFile:
    if jet_type is None:
        jetnet_type(path)
    with opened_hdf5(path) as file:
        particles, _ = _jetnet_datasets(file, path)
        return JetFile(len(particles), JETNET_FEATURES, sorted(file.keys() - {"particle_features", "jet_features"}))


def _read_jetnet(path, jet_type: str | None, counts: Counter) -> Iterator[JetBlock]:
    jet_type = jet_type or jetnet_type(path)
    with opened_hdf5(path) as file:
        particles, jets = _jetnet_datasets(file, path)
        for rows in row_blocks(len(jets), particles.dtype.itemsize * int(np.prod(particles.shape[1:])), path):
            padded = particles[rows].astype(np.float64)
            jet_pt, jet_eta, jet_mass, number = jets[rows].T.astype(np.float64)
            for name, values in (("pt", jet_pt), ("eta", jet_eta), ("mass", jet_mass)):
                bad = np.flatnonzero(~np.isfinite(values) | ((values < 0) & (name != "eta")))
                if bad.size:
                    raise ValueError(
                        f"{path}: jet {rows.start + bad[0]}: {name} = {values[bad[0]]:g}, expected a finite number"
                        f"{'' if name == 'eta' else ' of at least 0 GeV'}"
                    )
            mask = padded[..., 3] if padded.shape[2] == 4 else (padded[..., 2] != 0).astype(float)
            jet, place = np.nonzero((mask != 0) & (mask != 1))
            if jet.size:
                raise ValueError(
                    f"{path}: jet {rows.start + jet[0]}, place {place[0]}: mask = {mask[jet[0], place[0]]:g}, "
                    "expected 0 or 1"
                )
            jet, place = np.nonzero(mask)
            etarel, phirel, ptrel = padded[jet, place, :3].T
            bad = np.flatnonzero(~(ptrel >= 0))
            if bad.size:
                raise ValueError(
                    f"{path}: jet {rows.start + jet[bad[0]]}, place {place[bad[0]]}: ptrel = {ptrel[bad[0]]:g}, "
                    "expected at least 0"
                )
            pt, eta = ptrel * jet_pt[jet], etarel + jet_eta[jet]
            momenta = (pt * np.cos(phirel), pt * np.sin(phirel), pt * np.sinh(eta), pt * np.cosh(eta))
            size = len(padded)
            block = JetBlock(np.bincount(jet, minlength=size), dict(zip(REQUIRED_COLUMNS, momenta, strict=True)))
            counts["jets with another number of particles than stored"] += int((number != block.lengths).sum())
            energy = np.hypot(jet_pt * np.cosh(jet_eta), jet_mass)
            values = (jet_pt, jet_eta, np.zeros(size), energy, number)
            block.jets |= dict(zip(_JET_COLUMNS, values, strict=True))
            block.jets |= {name: np.full(size, v) for name, v in label_values(JETNET_CLASSES[jet_type]).items()}
            block.jets |= {"jet_mass": jet_mass, "jet_type": np.full(size, jet_type)}
            block.particles |= relative_angles(block)
            yield block


# ---------------------------------------------------------------------------------------------------------------------
# Both
# ---------------------------------------------------------------------------------------------------------------------


def _checked(path, layout: str, key: str, jet_type: str | None) -> str:
    if layout not in ("auto", *LAYOUTS):
        raise ValueError(f"layout must be auto or one of {', '.join(LAYOUTS)}, got {layout!r}")
    if jet_type not in (None, *JETNET_CLASSES):
        raise ValueError(f"jet_type must be one of {', '.join(JETNET_CLASSES)}, got {jet_type!r}")
    return detect_layout(path, key) if layout == "auto" else layout


def describe_jets(
    path: str | os.PathLike, layout: str = "auto", key: str = "table", jet_type: str | None = None
) -> JetFile:
    """The jets and columns of a file.

    Raises:
        UnreadableFileError: not HDF5, or damaged.
        ValueError: the content is of no known layout.
    """
    if _checked(path, layout, key, jet_type) == "jetnet":
        return _describe_jetnet(path, jet_type)
    return _describe_toptagging(path, key)


def read_jets(
    path: str | os.PathLike,
    counts: Counter | None = None,
    layout: str = "auto",
    key: str = "table",
    jet_type: str | None = None,
) -> Iterator[JetBlock]:
    """Reads a file in blocks.

    Args:
        counts: increased for JetNet jets whose number of particles differs from the mask.
        layout: "auto" or one of `LAYOUTS`.
        key: of the DataFrame, toptagging only.
        jet_type: g, q, t, w or z, jetnet only; default from the file name.

    Raises:
        UnreadableFileError: the file is truncated or damaged.
        ValueError: an impossible value.
    """
    if _checked(path, layout, key, jet_type) == "jetnet":
        return _read_jetnet(path, jet_type, Counter() if counts is None else counts)
    return _read_toptagging(path, key)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="hepzoo convert-data toptagging",
        description="Convert top-tagging reference data or JetNet (HDF5) to sharded Parquet.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=textwrap.dedent(
            """\
            examples:
              python data_scripts/convert_toptagging.py train.h5 --output data/toptagging
              python data_scripts/convert_toptagging.py val.h5 --output data/toptagging --split validation
              python data_scripts/convert_toptagging.py g.hdf5 q.hdf5 t.hdf5 --output data/jetnet
              python data_scripts/convert_toptagging.py my_tops.hdf5 --output data/jetnet --jet_type t
            labels: is_signal_new -> Tbqq or QCD; JetNet g and q -> QCD, t -> Tbqq, w -> Wqq, z -> Zqq
            """
        ),
    )
    add_output_options(parser)
    parser.add_argument("--layout", choices=("auto", *LAYOUTS), default="auto", help="default: %(default)s")
    parser.add_argument("--key", default="table", help="of the DataFrame in the file (default: %(default)s)")
    parser.add_argument("--jet_type", choices=tuple(JETNET_CLASSES), help="of JetNet files (default: from their name)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    args = build_parser().parse_args(argv)
    options = {"layout": args.layout, "key": args.key, "jet_type": args.jet_type}
    return run_conversion(args, partial(describe_jets, **options), partial(read_jets, **options))


if __name__ == "__main__":
    sys.exit(main())
