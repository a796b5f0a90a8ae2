"""OmniLearned files (HDF5, arXiv 2510.24066) -> sharded Parquet.

| dataset | content |
|---|---|
| data (N, P, F), zero-padded | eta and phi to the jet axis, ln pT, ln E (GeV), the type if any, further features |
| pid (N,) or (N, T) | class of the jet; floating point: the values of a regression |
| global (N, C), optional | conditions of the jet; of generated jets the last is the number of constituents / 100 |
| data_pid (N, P), (N, P, S), optional | class of every constituent (flavour tagging), or values (segmentation) |

As published, a slot is padding where ln pT is exactly 0. Files do not hold the axis: jet_phi is 0, and jet_eta is the
condition of this name, else what makes the constituents massless (E = pT cosh eta). Four further features are the
impact parameters tanh d0, error of d0, tanh dz, error of dz in mm; of another number they become part_feature_0, ...
Constituents are sorted by falling pT.
"""

import argparse
import os
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
from datasets import Features, List, Value

from hepzoo.data_scripts.hdf5_files import opened_hdf5
from hepzoo.data_scripts.jet_files import (
    JetBlock,
    JetFile,
    add_output_options,
    hdf5_dataset,
    relative_angles,
    row_blocks,
    run_conversion,
    summed_jets,
)
from hepzoo.data_scripts.jets_schema import (
    CLASSES,
    JETS_FEATURES,
    LABEL_COLUMNS,
    PARTICLE_FLAGS,
    REQUIRED_COLUMNS,
    jet_features,
    label_values,
)

KINEMATICS = 4
IMPACT_PARAMETERS = ("part_d0val", "part_d0err", "part_dzval", "part_dzerr")
AXIS_ITERATIONS = 5
KNOWN_DATASETS = ("data", "pid", "global", "data_pid")
JET_COLUMNS = ("jet_pt", "jet_eta", "jet_phi", "jet_energy", "jet_nparticles")


class _Datasets:
    """The checked datasets of an open file, and the columns that they make.

    Raises:
        ValueError: one is missing or has another shape, or the options do not fit.
    """

    def __init__(self, file, path, particle_types: str, classes, condition_names):
        self.path = path
        self.data = hdf5_dataset(file, "data", path)
        shape = self.data.shape
        if self.data.ndim != 3 or shape[2] < KINEMATICS or self.data.dtype.kind not in "iuf":
            raise ValueError(
                f"{path}: data must be numbers (N, P, 4 or more), found {self.data.dtype} of shape {shape}"
            )
        if particle_types == "auto" and shape[2] not in (4, 5, 8, 9):
            raise ValueError(
                f"{path}: data have {shape[2]} features; with --particle_types yes or no say if the fifth is the type"
            )
        self.has_types = shape[2] in (5, 9) if particle_types == "auto" else particle_types == "yes"
        self.num_further = shape[2] - KINEMATICS - self.has_types
        if self.num_further < 0:
            raise ValueError(f"{path}: data have {shape[2]} features, expected at least 5 with --particle_types yes")

        self.labels = hdf5_dataset(file, "pid", path, rows=shape[0])
        if self.labels.dtype.kind not in "iuf" or self.labels.ndim not in (1, 2):
            found = f"{self.labels.dtype} of shape {self.labels.shape}"
            raise ValueError(f"{path}: pid must be one number per jet, or (N, T) values, found {found}")
        self.is_regression = self.labels.ndim == 2 or (self.labels.dtype.kind == "f" and classes is None)
        if self.is_regression and classes is not None:
            raise ValueError(f"{path}: pid has shape {self.labels.shape}, expected one class per jet for --classes")

        self.conditions = hdf5_dataset(file, "global", path, rows=shape[0]) if "global" in file else None
        count = 0
        if self.conditions is not None:
            if self.conditions.ndim != 2 or self.conditions.dtype.kind not in "iuf":
                found = f"{self.conditions.dtype} of shape {self.conditions.shape}"
                raise ValueError(f"{path}: global must be numbers (N, C), found {found}")
            count = self.conditions.shape[1]
        if condition_names is not None and len(condition_names) != count:
            raise ValueError(f"{path}: global has {count} conditions, --condition_names has {len(condition_names)}")
        self.condition_names = list(condition_names or (f"jet_condition_{k}" for k in range(count)))

        self.targets = None
        if "data_pid" in file:
            self.targets = hdf5_dataset(file, "data_pid", path, rows=shape[0])
            if self.targets.shape[:2] != shape[:2] or self.targets.ndim > 3 or self.targets.dtype.kind not in "iuf":
                found = f"{self.targets.dtype} of shape {self.targets.shape}"
                raise ValueError(f"{path}: data_pid must be numbers {shape[:2]} or (N, P, S), found {found}")
        self.classes = classes

    @property
    def features(self) -> Features:
        columns = [*REQUIRED_COLUMNS, "part_deta", "part_dphi", *JET_COLUMNS]
        columns += [] if self.classes is None else LABEL_COLUMNS
        columns += ["part_charge", *PARTICLE_FLAGS] if self.has_types else []
        numbers, values = Value("float32"), List(Value("float32"))
        extra = {f"jet_target_{k}": numbers for k in range(self.num_targets)} or {"jet_label": Value("int64")}
        extra["part_logenergy"] = values
        if self.num_further == len(IMPACT_PARAMETERS):
            columns += IMPACT_PARAMETERS
        else:
            extra |= {f"part_feature_{k}": values for k in range(self.num_further)}
        columns += [name for name in self.condition_names if name in JETS_FEATURES]
        extra |= {name: numbers for name in self.condition_names if name not in JETS_FEATURES}
        if self.targets is not None and self.targets.ndim == 3:
            extra |= {f"part_target_{k}": values for k in range(self.targets.shape[2])}
        elif self.targets is not None:
            extra["part_label"] = List(Value("int64"))
        return jet_features(columns, Features(extra))

    @property
    def num_targets(self) -> int:
        """Values of a regression per jet."""
        return 0 if not self.is_regression else self.labels.shape[1] if self.labels.ndim == 2 else 1

    @property
    def row_bytes(self) -> int:
        parts = [part for part in (self.data, self.labels, self.conditions, self.targets) if part is not None]
        return sum(part.dtype.itemsize * int(np.prod(part.shape[1:])) for part in parts)


def check_options(particle_types: str, classes: Sequence[str] | None, condition_names: Sequence[str] | None):
    """Raises ValueError for options that no file fits."""
    if particle_types not in ("auto", "yes", "no"):
        raise ValueError(f"particle_types must be auto, yes or no, got {particle_types!r}")
    for name in classes or ():
        label_values(name)
    for name in condition_names or ():
        if condition_names.count(name) > 1 or not name.startswith("jet_"):
            raise ValueError(f"condition {name!r}: expected different names that begin with jet_")
        if name in JET_COLUMNS and name != "jet_eta":
            raise ValueError(f"condition {name!r} follows from the constituents; expected another name")


def describe_omnilearned(
    path: str | os.PathLike,
    particle_types: str = "auto",
    classes: Sequence[str] | None = None,
    condition_names: Sequence[str] | None = None,
) -> JetFile:
    """The jets and columns of an OmniLearned file; the options are those of `read_omnilearned`.

    Raises:
        UnreadableFileError: not HDF5, or damaged.
        ValueError: a dataset is missing or has another shape, or the options do not fit.
    """
    check_options(particle_types, classes, condition_names)
    with opened_hdf5(path) as file:
        found = _Datasets(file, path, particle_types, classes, condition_names)
        return JetFile(len(found.data), found.features, sorted(file.keys() - set(KNOWN_DATASETS)))


def read_omnilearned(
    path: str | os.PathLike,
    counts: Counter | None = None,
    particle_types: str = "auto",
    classes: Sequence[str] | None = None,
    condition_names: Sequence[str] | None = None,
    label_shift: int = 0,
) -> Iterator[JetBlock]:
    """Reads an OmniLearned file in blocks.

    Args:
        counts: increased for slots that ln pT = 0 makes padding although they hold something, and for impact
            parameters whose hyperbolic tangent is 1 in single precision.
        particle_types: whether the fifth feature is the type of the constituent: "yes", "no", or "auto", yes with 5 or
            9 features and no with 4 or 8.
        classes: names of the classes 0, 1, ..., such as "QCD"; a name may come twice. None: no one-hot labels.
        condition_names: of the conditions, in the units of the file; by default jet_condition_0, ...
        label_shift: subtracted from the stored classes.

    Raises:
        UnreadableFileError: the file is truncated or damaged.
        ValueError: an impossible value, naming jet and place.
    """
    check_options(particle_types, classes, condition_names)
    counts = Counter() if counts is None else counts
    with opened_hdf5(path) as file:
        found = _Datasets(file, path, particle_types, classes, condition_names)
        for rows in row_blocks(len(found.data), found.row_bytes, path):
            yield _read_block(found, rows, label_shift, counts)


def _read_block(found: _Datasets, rows: slice, label_shift: int, counts: Counter) -> JetBlock:
    # imports torch, which `--help` can do without
    from hepzoo.tokenization.feature_extraction_omnilearned import (
        LARGEST_TANH,
        PDG_CODES,
        decoded_impact_parameters,
        decoded_types,
    )

    path, padded = found.path, found.data[rows].astype(np.float64)
    is_real = padded[..., 2] != 0
    counts["slots with ln pT = 0 that hold something, taken for padding"] += int(
        (~is_real & (padded != 0).any(axis=-1)).sum()
    )
    jet, place = np.nonzero(is_real)
    order = np.lexsort([-padded[jet, place, 2], jet])
    jet, place = jet[order], place[order]
    flat = padded[jet, place]
    good = np.isfinite(flat)
    if not good.all():
        bad, column = np.argwhere(~good)[0]
        raise ValueError(
            f"{path}: jet {rows.start + jet[bad]}, place {place[bad]}: column {column} of data = "
            f"{flat[bad, column]}, expected a finite number"
        )
    lengths = np.bincount(jet, minlength=len(padded))
    conditions = {}
    if found.conditions is not None:
        conditions = dict(zip(found.condition_names, found.conditions[rows].T.astype(np.float64), strict=True))
    pt, energy = np.exp(flat[:, 2]), np.exp(flat[:, 3])
    jet_eta = conditions.get("jet_eta")
    if jet_eta is None:
        jet_eta = massless_axis(flat[:, 0], pt, energy, jet, len(padded))
    eta, phi = flat[:, 0] + jet_eta[jet], flat[:, 1]
    momenta = (pt * np.cos(phi), pt * np.sin(phi), pt * np.sinh(eta), energy)
    block = JetBlock(lengths, dict(zip(REQUIRED_COLUMNS, momenta, strict=True)))
    # the axis is that of the file, not that of the sum
    block.jets = {**summed_jets(block), **conditions, "jet_eta": jet_eta, "jet_phi": np.zeros(len(padded))}
    block.particles |= {**relative_angles(block), "part_logenergy": flat[:, 3]}
    if found.has_types:
        types = flat[:, KINEMATICS]
        bad = np.flatnonzero(~np.isin(types, np.arange(1, len(PDG_CODES) + 1)))
        if bad.size:
            raise ValueError(
                f"{path}: jet {rows.start + jet[bad[0]]}, place {place[bad[0]]}: type = {types[bad[0]]:g}, "
                f"expected 1 to {len(PDG_CODES)}"
            )
        block.particles |= decoded_types(types.astype(np.int64))
    further = flat[:, KINEMATICS + found.has_types :]
    if found.num_further == len(IMPACT_PARAMETERS):
        beyond = np.abs(further[:, [0, 2]]) > LARGEST_TANH
        counts["impact parameters beyond the range of tanh, cut"] += int(beyond.sum())
        block.particles |= decoded_impact_parameters(further)
    else:
        block.particles |= {f"part_feature_{k}": column for k, column in enumerate(further.T)}
    if found.targets is not None:
        targets = found.targets[rows][jet, place]
        named = {"part_label": targets} if targets.ndim == 1 else {}
        block.particles |= named or {f"part_target_{k}": column for k, column in enumerate(targets.T)}
    block.jets |= _labels(found, rows, label_shift)
    return block


def massless_axis(delta_eta, pt, energy, jet, num_jets: int) -> np.ndarray:
    """
    Pseudorapidity of the axes, (num_jets,), that makes the constituents massless: E / pT = cosh(axis + delta_eta), by
    least squares with weights pT^2 (GeV^2), so that the masses of soft constituents hardly count.

    Args:
        delta_eta, pt, energy, jet: of the constituents, `jet` their jet.
    """
    ratio = energy / pt

    def weighted_sum(values):
        return np.bincount(jet, pt**2 * values, minlength=num_jets)

    def quotient(values, divisor):
        return np.divide(values, divisor, out=np.zeros(num_jets), where=divisor > 0)

    # E / pT grows along delta_eta if the axis is at positive eta; the size of eta is that of the mean of E / pT
    total = weighted_sum(np.ones_like(pt))
    mean, mean_ratio = quotient(weighted_sum(delta_eta), total), quotient(weighted_sum(ratio), total)
    slope = weighted_sum((delta_eta - mean[jet]) * ratio)
    axis = np.where(slope < 0, -1, 1) * np.arccosh(np.maximum(mean_ratio, 1)) - mean
    for _ in range(AXIS_ITERATIONS):
        eta = axis[jet] + delta_eta
        step = quotient(weighted_sum((ratio - np.cosh(eta)) * np.sinh(eta)), weighted_sum(np.sinh(eta) ** 2))
        axis = axis + np.clip(step, -1, 1)
    return axis


def _labels(found: _Datasets, rows: slice, label_shift: int) -> dict[str, np.ndarray]:
    """Columns of `pid`: targets, or label and one-hot classes."""
    stored = found.labels[rows]
    if found.is_regression:
        return {f"jet_target_{k}": column for k, column in enumerate(stored.reshape(len(stored), -1).T)}
    whole = np.isfinite(stored) & (stored == np.floor(stored))
    labels = np.where(whole, stored, -1).astype(np.int64) - label_shift
    most = np.inf if found.classes is None else len(found.classes)
    bad = np.flatnonzero(~whole | (labels < 0) | (labels >= most))
    if bad.size:
        expected = "an integer" if most == np.inf else f"up to {len(found.classes) - 1 + label_shift}"
        raise ValueError(
            f"{found.path}: jet {rows.start + bad[0]}: pid = {stored[bad[0]]:g}, expected {expected}, at least "
            f"{label_shift}"
        )
    columns = {"jet_label": labels}
    if found.classes is not None:
        of_class = [label_values(name) for name in found.classes]
        table = {name: np.array([values[name] for values in of_class]) for name in LABEL_COLUMNS}
        columns |= {name: values[labels] for name, values in table.items()}
    return columns


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="hepzoo convert-data omnilearned",
        description="Convert HDF5 files of OmniLearned, training data or generated jets, to sharded Parquet.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=textwrap.dedent(
            """\
            examples:
              python data_scripts/convert_omnilearned.py top/train/*.h5 --output data/top --classes QCD Tbqq
              python data_scripts/convert_omnilearned.py top/val/*.h5 --output data/top --split validation \\
                  --classes QCD Tbqq
              python data_scripts/convert_omnilearned.py jetnet150/train/*.h5 --output data/jetnet \\
                  --classes QCD QCD Tbqq Wqq Zqq
              python data_scripts/convert_omnilearned.py jetclass/train/*.h5 --output data/jetclass --label_shift 2
              python data_scripts/convert_omnilearned.py atlas_flav/train/*.h5 --output data/flavour --particle_types no
              python data_scripts/convert_omnilearned.py generated_*.h5 --output generated --label_shift 1
            label shifts: jetclass 2, jetclass2 12, aspen 200, cms_qcd 201, cms_bsm 202; generated jets have label + 1
            """
        ),
    )
    add_output_options(parser)
    parser.add_argument(
        "--classes",
        nargs="+",
        metavar="NAME",
        help=f"of the labels 0, 1, ...: {', '.join(CLASSES)}; may repeat (default: no one-hot labels)",
    )
    parser.add_argument(
        "--label_shift", type=int, default=0, metavar="N", help="subtracted from stored labels (default: %(default)s)"
    )
    parser.add_argument(
        "--condition_names",
        nargs="+",
        metavar="NAME",
        help="columns of `global`, in the units of the file; jet_eta becomes the axis (default: jet_condition_0, ...)",
    )
    parser.add_argument(
        "--particle_types",
        choices=("auto", "yes", "no"),
        default="auto",
        help="whether the fifth feature is the type (default: with 5 or 9 features)",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    args = build_parser().parse_args(argv)
    options = {name: getattr(args, name) for name in ("particle_types", "classes", "condition_names")}
    return run_conversion(
        args,
        partial(describe_omnilearned, **options),
        partial(read_omnilearned, **options, label_shift=args.label_shift),
    )


if __name__ == "__main__":
    sys.exit(main())
