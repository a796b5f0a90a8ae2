"""Jets as sets of particles with classes and conditions: what feature extractors of flow models share."""

from collections import Counter
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import BatchFeature, FeatureExtractionMixin
from transformers.utils import cached_file

from .batching import pad_rows, padding_strategy
from .condition_density import JetConditionDensity
from .jet_features import FOUR_MOMENTUM, jet_columns, momentum_features, sum_jets, wrap_phi
from .records_dirc import list_column, scalar_column, short_repr, to_numpy

# the classes of JetClass (arXiv:2202.03772) in their order
LABEL_NAMES = tuple(
    f"label_{name}" for name in ("QCD", "Hbb", "Hcc", "Hgg", "H4q", "Hqql", "Zqq", "Wqq", "Tbqq", "Tbl")
)
CONDITIONS = ("jet_pt", "jet_energy", "jet_eta", "jet_sdmass", "jet_nparticles")
MULTIPLICITY = "jet_nparticles"
DENSITY_FILE = "condition_density.safetensors"


class Constituents(NamedTuple):
    """
    Constituents of jets, end to end; float64, GeV and rad.

    Args:
        flat: columns that were read, and part_pt, part_etarel (without change of sign), part_dphi; (constituents,).
        owner, position: jet and place in it of every constituent, (constituents,).
        jets: jet_pt, jet_eta, jet_phi, jet_energy: of the file, else of the sum of the constituents; (jets,).
        columns: all that the rows have. count: number of jets.
    """

    flat: dict[str, np.ndarray]
    owner: np.ndarray
    position: np.ndarray
    jets: dict[str, np.ndarray]
    columns: Mapping[str, Sequence]
    count: int


def read_constituents(rows: Any, stored: Sequence[str] = ()) -> Constituents:
    """
    Jets in the columns of the jet data sets: a list of records, a dict of columns, or one record.

    Args:
        stored: constituent columns to read besides the four-momenta.

    Raises:
        ValueError: naming row, field and value: something is missing, of another length, or not finite.
    """
    columns, count, _ = jet_columns(rows, [*FOUR_MOMENTUM, *stored])
    names = [*FOUR_MOMENTUM, *stored]
    if "part_dphi" in columns and "part_dphi" not in names:
        names.append("part_dphi")
    flat: dict[str, np.ndarray] = {}
    lengths = np.zeros(count, dtype=np.int64)
    for name in names:
        values, sizes = list_column(columns, name, count)
        if not flat:
            lengths = sizes
        if not np.array_equal(sizes, lengths):
            row = int(np.argmax(sizes != lengths))
            raise ValueError(f"row {row}: {name} has {sizes[row]} constituents, {names[0]} has {lengths[row]}")
        flat[name] = values
    owner = np.repeat(np.arange(count), lengths)
    position = np.arange(len(owner)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    for name, values in flat.items():
        if not np.isfinite(values).all():
            h = int(np.argmin(np.isfinite(values)))
            raise ValueError(f"row {owner[h]}: {name}[{position[h]}] = {values[h]} is not a finite number")

    momenta = np.stack([flat[name] for name in FOUR_MOMENTUM], axis=-1)
    sums = momentum_features(sum_jets(momenta, lengths))
    jets = {}
    for name in ("pt", "eta", "phi", "energy"):
        column = f"jet_{name}"
        jets[column] = jet_column(columns, column, count) if column in columns else sums[name]
    for name in ("jet_pt", "jet_energy"):
        bad = (jets[name] <= 0) & (lengths > 0)
        if bad.any():
            row = int(np.argmax(bad))
            raise ValueError(f"row {row}: {name} = {jets[name][row]:g}, expected a number above 0")
    parts = momentum_features(momenta)
    flat["part_pt"] = parts["pt"]
    flat["part_etarel"] = parts["eta"] - jets["jet_eta"][owner]
    if "part_dphi" not in flat:
        flat["part_dphi"] = wrap_phi(parts["phi"] - jets["jet_phi"][owner])
    return Constituents(flat, owner, position, jets, columns, count)


def jet_column(columns: Mapping[str, Sequence], name: str, count: int) -> np.ndarray:
    """One finite number per jet, float64 (count,)."""
    values = scalar_column(columns, name, count)
    if not np.isfinite(values).all():
        row = int(np.argmin(np.isfinite(values)))
        raise ValueError(f"row {row}: {name} = {values[row]} is not a finite number")
    return values


def class_ids(columns: Mapping[str, Sequence], label_names: Sequence[str], count: int) -> np.ndarray:
    """
    Number of the one-hot column that is 1, int64 (count,). Classes that no jet of a data set has need no column.

    Raises:
        ValueError: there is none of the columns, or a row has not exactly one 1.
    """
    known = [name for name in label_names if name in columns]
    if not known and count > 0:
        raise ValueError(f"column {label_names[0]} is missing; expected some of {', '.join(label_names)}")
    labels = np.zeros((count, len(label_names)))
    for name in known:
        flags = [float(value) if isinstance(value, (bool, np.bool_)) else value for value in columns[name]]
        labels[:, label_names.index(name)] = scalar_column({name: flags}, name, count)
    is_one_hot = ((labels == 0) | (labels == 1)).all(axis=1) & (labels.sum(axis=1) == 1)
    if not is_one_hot.all():
        row = int(np.argmin(is_one_hot))
        raise ValueError(f"row {row}: not exactly one of {', '.join(known)} is 1")
    return labels.argmax(axis=1)


def label_columns(labels: Any, label_names: Sequence[str], count: int) -> dict[str, np.ndarray]:
    """
    One-hot columns int32 (count,) of class ids (count,).

    Raises:
        ValueError: another shape, or a class that there is not; names the row.
    """
    labels = to_numpy(labels)
    if labels.shape != (count,):
        raise ValueError(f"labels have shape {labels.shape}, expected ({count},)")
    is_known = np.isin(labels, np.arange(len(label_names)))
    if not is_known.all():
        row = int(np.argmin(is_known))
        raise ValueError(f"row {row}: label {labels[row]}, expected 0 to {len(label_names) - 1}")
    return {name: (labels == class_id).astype(np.int32) for class_id, name in enumerate(label_names)}


class JetSetFeatureExtractor(FeatureExtractionMixin):
    """
    Classes and conditions of jets, the density that they are drawn from, and padding of sets.

    Args:
        label_names: one-hot columns of the classes, in order; empty: none.
        condition_names: of `CONDITIONS`.
        condition_means, condition_stds: the network sees (x - mean) / std.
        max_num_particles: the first so many constituents of a jet are read.
    """

    # features of particles, (slots, ...) per jet -> type
    particle_types: dict[str, type] = {"particles": np.float32}

    def __init__(
        self,
        label_names: Sequence[str],
        condition_names: Sequence[str],
        condition_means: Sequence[float],
        condition_stds: Sequence[float],
        max_num_particles: int,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.label_names = list(label_names)
        self.condition_names = list(condition_names)
        for k, name in enumerate(self.condition_names):
            if name not in CONDITIONS or name in self.condition_names[:k]:
                raise ValueError(f"condition_names has {name!r}, expected different ones of {', '.join(CONDITIONS)}")
        count = len(self.condition_names)
        self.condition_means = numbers("condition_means", condition_means, count)
        self.condition_stds = numbers("condition_stds", condition_stds, count, above_zero=True)
        self.max_num_particles = max_num_particles
        self._density: JetConditionDensity | None = None
        self._dropped: Counter = Counter()

    # --- settings and density ----------------------------------------------------------------------------------------

    @property
    def density_names(self) -> list[str]:
        """Conditions in the density; the multiplicity, which it always has, is not among them."""
        return [name for name in self.condition_names if name != MULTIPLICITY]

    @property
    def density(self) -> JetConditionDensity | None:
        """Multiplicity and conditions per class, saved beside the settings; `None` without a fit."""
        return self._density

    @density.setter
    def density(self, density: JetConditionDensity | None):
        if density is not None:
            sizes = (density.num_classes, density.num_conditions)
            expected = (max(1, len(self.label_names)), len(self.density_names))
            if sizes != expected:
                raise ValueError(f"density is of {sizes} classes and conditions, expected {expected}")
        self._density = density

    @property
    def dropped(self) -> Counter:
        """Constituents that were left out so far, by reason."""
        return self._dropped

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in super().to_dict().items() if name not in ("_density", "_dropped")}

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs):
        """Settings and, if there is one, the density, into a folder."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        density = Path(save_directory) / DENSITY_FILE
        if self._density is not None:
            self._density.save(density)
        else:
            # one of other settings
            density.unlink(missing_ok=True)
        return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs) -> "JetSetFeatureExtractor":
        extractor = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        options = ("subfolder", "revision", "cache_dir", "token", "local_files_only")
        path = cached_file(
            str(pretrained_model_name_or_path),
            DENSITY_FILE,
            _raise_exceptions_for_missing_entries=False,
            **{name: kwargs[name] for name in options if kwargs.get(name) is not None},
        )
        if path is not None:
            extractor.density = JetConditionDensity.load(path)
        return extractor

    def fit_density(self, lengths: np.ndarray, conditions: np.ndarray, classes: np.ndarray | None, **kwargs):
        """
        The density of jets (jets,) with their `conditions` (jets, conditions), physical units.

        Args:
            kwargs: arguments of `JetConditionDensity.fit`.
        """
        columns = [self.condition_names.index(name) for name in self.density_names]
        self.density = JetConditionDensity.fit(
            lengths, conditions[:, columns], classes, max(1, len(self.label_names)), **kwargs
        )

    # --- reading -----------------------------------------------------------------------------------------------------

    def kept(self, jets: Constituents, **is_good: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """
        Which constituents the network sees, (constituents,), and how many of each jet, (jets,): the first ones, with
        some pT, for which all of `is_good` (constituents,) are true. The others are counted in `dropped`.

        Raises:
            ValueError: a jet has none.
        """
        is_kept = np.ones(len(jets.owner), dtype=bool)
        reasons = {
            "max_num_particles": jets.position < self.max_num_particles,
            "zero_pt": jets.flat["part_pt"] != 0,
            **is_good,
        }
        for reason, passes in reasons.items():
            self._dropped[reason] += int((is_kept & ~passes).sum())
            is_kept &= passes
        lengths = np.bincount(jets.owner[is_kept], minlength=jets.count)
        if (lengths == 0).any():
            row = int(np.argmin(lengths))
            found = (jets.owner == row).sum()
            raise ValueError(f"row {row}: none of {found} constituents is left, expected at least 1")
        return is_kept, lengths

    def read_conditions(self, jets: Constituents, lengths: np.ndarray) -> np.ndarray:
        """(jets, conditions), physical units; `lengths` (jets,) are the multiplicities."""
        found = {**jets.jets, MULTIPLICITY: lengths.astype(np.float64)}
        if "jet_sdmass" in self.condition_names:
            found["jet_sdmass"] = jet_column(jets.columns, "jet_sdmass", jets.count)
        return np.array([found[name] for name in self.condition_names]).reshape(len(self.condition_names), jets.count).T

    def read_classes(self, jets: Constituents, wanted: bool | None) -> np.ndarray | None:
        """Class ids (jets,), or `None` if they are not wanted or there are no classes."""
        if wanted is False or not self.label_names:
            return None
        return class_ids(jets.columns, self.label_names, jets.count)

    # --- padding -----------------------------------------------------------------------------------------------------

    def pad(
        self,
        features: Sequence[Mapping[str, Any]] | Mapping[str, Any],
        padding: bool | str | None = True,
        pad_to_multiple_of: int | None = None,
        return_tensors: str | None = None,
        **kwargs,
    ) -> BatchFeature:
        """Pad and stack jets that `__call__(..., padding=False)` made: one dictionary per jet, or of lists."""
        if isinstance(features, Mapping):
            columns = {name: list(values) for name, values in features.items()}
        else:
            columns = {name: [jet[name] for jet in features] for name in (features[0] if features else ())}
        if "particles" not in columns:
            raise ValueError(f"pad: particles is missing; the features have {', '.join(columns) or 'none'}")
        columns.pop("attention_mask", None)
        of_particles = [name for name in columns if name in self.particle_types]
        stacked = {
            name: [to_numpy(jet).astype(self.particle_types[name], copy=False) for jet in columns.pop(name)]
            for name in of_particles
        }
        for name, values in columns.items():
            array = np.asarray([to_numpy(value) for value in values])
            columns[name] = array.astype(np.float32 if array.dtype.kind == "f" else np.int64, copy=False)
        strategy = padding_strategy(padding)
        if strategy is None:
            return BatchFeature({**stacked, **columns}, tensor_type=return_tensors)
        lengths = np.array([len(jet) for jet in stacked["particles"]], dtype=np.int64)
        width = self.max_num_particles if strategy == "max_length" else int(lengths.max(initial=0))
        if len(lengths) and lengths.max() > width:
            row = int(np.argmax(lengths))
            raise ValueError(f"row {row}: {lengths[row]} constituents, expected at most {width}")
        if pad_to_multiple_of:
            width = -(-width // pad_to_multiple_of) * pad_to_multiple_of
        data: dict[str, Any] = {}
        for name, jets in stacked.items():
            flat = np.concatenate(jets) if jets else np.zeros((0, 1), dtype=self.particle_types[name])
            data[name] = pad_rows(flat, lengths, width, "right", 0)
            if name == "particles":
                data["attention_mask"] = (np.arange(width) < lengths[:, None]).astype(np.int64)
        return BatchFeature({**data, **columns}, tensor_type=return_tensors)

    # --- conditions --------------------------------------------------------------------------------------------------

    def encode_conditions(self, **quantities) -> np.ndarray:
        """
        Conditions float32 (batch, conditions) as the network sees them, of one array (batch,) per condition name:
        `encode_conditions(jet_pt=[620.0], jet_eta=[0.1])`; GeV.
        """
        wrong = sorted(set(quantities) ^ set(self.condition_names))
        if wrong:
            raise ValueError(f"condition {wrong[0]} is missing or unknown, expected {', '.join(self.condition_names)}")
        values = np.column_stack([to_numpy(quantities[name]).astype(np.float64) for name in self.condition_names])
        if not np.isfinite(values).all():
            row, k = np.argwhere(~np.isfinite(values))[0]
            raise ValueError(f"row {row}: {self.condition_names[k]} = {values[row, k]}, expected a finite number")
        return self.standardise_conditions(values)

    def standardise_conditions(self, conditions: np.ndarray) -> np.ndarray:
        """Physical conditions (jets, conditions) to what the network sees, float32."""
        scaled = (conditions - np.asarray(self.condition_means)) / np.asarray(self.condition_stds)
        return scaled.astype(np.float32)

    def physical_conditions(self, conditions: Any, count: int) -> dict[str, np.ndarray]:
        """Physical conditions, (count,) each by name, of what the network sees, (count, conditions); {} of `None`."""
        if conditions is None or not self.condition_names:
            return {}
        conditions = to_numpy(conditions).astype(np.float64)
        if conditions.shape != (count, len(self.condition_names)):
            raise ValueError(f"conditions have shape {conditions.shape}, expected {(count, len(self.condition_names))}")
        physical = conditions * np.asarray(self.condition_stds) + np.asarray(self.condition_means)
        return {name: physical[:, k] for k, name in enumerate(self.condition_names)}

    def sample_conditions(
        self, class_ids: Any, seed: int | np.random.Generator | None = None, return_tensors: str | None = None
    ) -> BatchFeature:
        """
        Draw multiplicity and conditions of jets of `class_ids` (batch,) from the density.

        Returns:
            `num_particles` int64 (batch,), `labels` int64 (batch,) and `conditions` float32 (batch, conditions) for
            `generate`. Without classes, or without conditions, these are left out.

        Raises:
            ValueError: no density, or a class that it does not have.
        """
        if self._density is None:
            raise ValueError("the feature extractor has no density of conditions; `fit` it to a training set")
        class_ids = to_numpy(class_ids)
        if class_ids.ndim != 1 or class_ids.dtype.kind not in "iu":
            raise ValueError(f"class_ids must be integers (batch,), got {short_repr(class_ids.tolist())}")
        num_particles, drawn = self._density.sample(class_ids, np.random.default_rng(seed))
        num_particles = np.clip(num_particles, 1, self.max_num_particles)
        data: dict[str, Any] = {"num_particles": num_particles}
        if self.label_names:
            data["labels"] = class_ids.astype(np.int64)
        if self.condition_names:
            found = dict(zip(self.density_names, drawn.T))
            found[MULTIPLICITY] = num_particles
            data["conditions"] = self.standardise_conditions(
                np.column_stack([found[name] for name in self.condition_names]).astype(np.float64)
            )
        return BatchFeature(data, tensor_type=return_tensors)


def numbers(name: str, values: Any, count: int, above_zero: bool = False) -> list[float]:
    """`values` as a list of `count` finite floats."""
    expected = f"{count} finite numbers{' above 0' if above_zero else ''}"
    if not isinstance(values, Sequence) and not hasattr(values, "tolist"):
        raise ValueError(f"{name} is {short_repr(values)}, expected {expected}")
    values = values.tolist() if hasattr(values, "tolist") else list(values)
    is_good = len(values) == count and all(
        isinstance(value, Real) and not isinstance(value, bool) and np.isfinite(value) for value in values
    )
    if not is_good or above_zero and min(values, default=1) <= 0:
        raise ValueError(f"{name} is {short_repr(values)}, expected {expected}")
    return [float(value) for value in values]
