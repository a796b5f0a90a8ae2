"""
Features of the EPiC flow (arXiv:2312.00123): jets <-> standardised constituents and conditions.

A constituent has 13 features: eta and phi relative to the jet (eta without the change of sign that JetClass' own
`part_deta` has), its share of the jet's pT, impact parameters and their errors [mm] as they are (no tanh), charge, and
five flags of the particle type. Each is standardised; the network sees `scale` = 5 times that. A jet has its class, pT
[GeV/c] and eta.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
from transformers import BatchFeature, FeatureExtractionMixin
from transformers.utils import cached_file

from .batching import check_integer, pad_rows, padding_strategy, split_rows
from .condition_density import JetConditionDensity
from .jet_features import (
    FOUR_MOMENTUM,
    four_momenta,
    jet_columns,
    momentum_features,
    sum_jets,
    wrap_phi,
)
from .records_dirc import list_column, scalar_column, short_repr, to_numpy

# mean and standard deviation over the constituents of the published training set
PUBLISHED_STATISTICS = {
    "part_etarel": (6.802867574151605e-06, 0.19917935132980347),
    "part_dphi": (-1.3360358934733085e-05, 0.20452968776226044),
    "part_ptrel": (0.02573751099407673, 0.05200949311256409),
    "part_d0val": (0.0020165301393717527, 12.310165405273438),
    "part_d0err": (0.014327672310173512, 0.024629898369312286),
    "part_dzval": (-0.0009656535694375634, 6.573566913604736),
    "part_dzerr": (0.03714070841670036, 0.08826372027396156),
    "part_charge": (0.0013234640937298536, 0.6963559985160828),
    "part_isChargedHadron": (0.469936728477478, 0.4990956485271454),
    "part_isNeutralHadron": (0.10660245269536972, 0.3086077570915222),
    "part_isPhoton": (0.40848085284233093, 0.4915523827075958),
    "part_isElectron": (0.009049789980053902, 0.09469881653785706),
    "part_isMuon": (0.005930596962571144, 0.07678196579217911),
}
KINEMATICS = ("part_etarel", "part_dphi", "part_ptrel")
FLAGS = tuple(name for name in PUBLISHED_STATISTICS if name.startswith("part_is"))
SHARES = ("part_ptrel", "part_energyrel")
# the classes of JetClass (arXiv:2202.03772) in the order of the published model
LABEL_NAMES = tuple(
    f"label_{name}" for name in ("QCD", "Hbb", "Hcc", "Hgg", "H4q", "Hqql", "Zqq", "Wqq", "Tbqq", "Tbl")
)
CONDITIONS = ("jet_pt", "jet_energy", "jet_eta", "jet_sdmass", "jet_nparticles")
DENSITY_FILE = "condition_density.safetensors"


class EpicFMFeatureExtractor(FeatureExtractionMixin):
    r"""
    Jets to the inputs of `EpicFMForGeneration`, and generated particles to jets.

    The defaults are the constants of the published model; `fit` takes those of another training set, with standardised
    conditions (the published network sees raw GeV) and the density that `sample_conditions` draws from.

    Args:
        feature_names: of a constituent, beginning with `part_etarel`, `part_dphi`, `part_ptrel`.
        means, stds: of each feature, by default the published ones.
        scale: factor on standardised features.
        label_names: one-hot columns of the classes, in order; empty: none.
        condition_names: of `jet_pt`, `jet_energy`, `jet_eta`, `jet_sdmass`, `jet_nparticles`.
        condition_means, condition_stds: by default 0 and 1, as published.
        max_num_particles: the first so many constituents of a jet are read.
        max_abs_etarel: constituents farther away in eta are left out.
        feature_ranges: {name: [least, largest]} of the training set, to which `batch_decode` clips `part_ptrel` (and
            `part_energyrel`).

    Example:
        >>> extractor = EpicFMFeatureExtractor().fit(rows)
        >>> request = extractor.sample_conditions(class_ids=[0, 8], seed=1, return_tensors="pt")
        >>> sample = model.generate(**request)
        >>> jets = extractor.batch_decode(sample, labels=request["labels"], conditions=request["conditions"])
    """

    model_input_names = ["particles", "attention_mask", "class_ids", "conditions"]

    def __init__(
        self,
        feature_names: Sequence[str] = tuple(PUBLISHED_STATISTICS),
        means: Sequence[float] | None = None,
        stds: Sequence[float] | None = None,
        scale: float = 5.0,
        label_names: Sequence[str] = LABEL_NAMES,
        condition_names: Sequence[str] = ("jet_pt", "jet_eta"),
        condition_means: Sequence[float] | None = None,
        condition_stds: Sequence[float] | None = None,
        max_num_particles: int = 128,
        max_abs_etarel: float = 1.0,
        feature_ranges: Mapping[str, Sequence[float]] | None = None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.feature_names = list(feature_names)
        self.label_names = list(label_names)
        self.condition_names = list(condition_names)
        if tuple(self.feature_names[:3]) != KINEMATICS or len(set(self.feature_names)) != len(self.feature_names):
            raise ValueError(f"feature_names is {self.feature_names}, expected {', '.join(KINEMATICS)} and others")
        unknown = [name for name in self.condition_names if name not in CONDITIONS]
        if unknown:
            raise ValueError(f"condition_names has {unknown[0]!r}, expected of {', '.join(CONDITIONS)}")
        if means is None or stds is None:
            without = [name for name in self.feature_names if name not in PUBLISHED_STATISTICS]
            if without:
                raise ValueError(f"means and stds are missing; there are no published ones of {without[0]}")
        published = [PUBLISHED_STATISTICS.get(name) for name in self.feature_names]
        self.means = _numbers("means", [m for m, _ in published] if means is None else means, len(self.feature_names))
        self.stds = _numbers("stds", [s for _, s in published] if stds is None else stds, len(self.feature_names), True)
        count = len(self.condition_names)
        self.condition_means = _numbers("condition_means", condition_means or [0.0] * count, count)
        self.condition_stds = _numbers("condition_stds", condition_stds or [1.0] * count, count, True)
        (self.scale,) = _numbers("scale", [scale], 1, True)
        self.max_num_particles = check_integer("max_num_particles", max_num_particles, 1)
        (self.max_abs_etarel,) = _numbers("max_abs_etarel", [max_abs_etarel], 1, True)
        ranges = {"part_ptrel": [1e-4, 1.0]} if feature_ranges is None else feature_ranges
        self.feature_ranges = {name: _numbers(f"feature_ranges.{name}", ranges[name], 2) for name in sorted(ranges)}
        for name, (low, high) in self.feature_ranges.items():
            if name not in SHARES or not low < high:
                raise ValueError(f"feature_ranges.{name} is [{low}, {high}], expected rising limits of part_ptrel")
        self._density: JetConditionDensity | None = None
        self._dropped: Counter = Counter()

    # --- settings and density ----------------------------------------------------------------------------------------

    @property
    def density(self) -> JetConditionDensity | None:
        """Multiplicity and conditions per class, saved beside the settings; `None` without a fit."""
        return self._density

    @density.setter
    def density(self, density: JetConditionDensity | None):
        if density is not None:
            sizes = (density.num_classes, density.num_conditions)
            expected = (max(1, len(self.label_names)), len(self.condition_names))
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
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs) -> "EpicFMFeatureExtractor":
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

    def fit(self, rows: Any, standardise_conditions: bool = True, **density) -> "EpicFMFeatureExtractor":
        """
        Take means, standard deviations (of the population), ranges and the density of conditions from jets.

        Args:
            rows: of the training set, as `__call__` takes them.
            standardise_conditions: the network sees standardised conditions; otherwise raw ones, as published.
            density: arguments of `JetConditionDensity.fit`.

        Returns:
            This extractor.

        Raises:
            ValueError: naming row, field and value; or no jets.
        """
        jets = self._read(rows, None)
        features, conditions = jets["features"], jets["conditions"]
        if not len(features):
            raise ValueError("no jets to fit to")
        stds = features.std(axis=0)
        # a type of particle that this data set does not have
        self.means, self.stds = features.mean(axis=0).tolist(), np.where(stds > 0, stds, 1.0).tolist()
        for k, name in enumerate(self.feature_names):
            if name in SHARES:
                self.feature_ranges[name] = [float(features[:, k].min()), float(features[:, k].max())]
        if standardise_conditions and len(self.condition_names):
            widths = conditions.std(axis=0)
            self.condition_means = conditions.mean(axis=0).tolist()
            self.condition_stds = np.where(widths > 0, widths, 1.0).tolist()
        self.density = JetConditionDensity.fit(
            jets["lengths"], conditions, jets["class_ids"], max(1, len(self.label_names)), **density
        )
        return self

    # --- jets to tensors ---------------------------------------------------------------------------------------------

    def __call__(
        self,
        rows: Any,
        padding: bool | str | None = True,
        return_tensors: str | None = None,
        return_class_ids: bool | None = None,
        **kwargs,
    ) -> BatchFeature:
        """
        Args:
            rows: jets in the columns of JetClass: a list of records, a dict of columns, or one record (a batch of one).
                Needed are the four-momenta, the features that do not follow from them, and the labels. Where they are
                missing, `jet_pt`, `jet_eta`, `jet_phi`, `jet_energy` and `part_dphi` follow from the sum of the
                constituents.
            padding: True or "longest", "max_length" (`max_num_particles`), or False for lists.
            return_tensors: None or "np" for numpy, "pt" for torch.
            return_class_ids: False leaves the labels out.

        Returns:
            `BatchFeature`: `particles` float32 (batch, slots, features), `attention_mask` int64 (batch, slots),
            `class_ids` int64 (batch,), `conditions` float32 (batch, conditions).

        Raises:
            ValueError: naming row, field and value: something is missing or not finite, a jet has no constituents or
                not exactly one label.
        """
        jets = self._read(rows, return_class_ids)
        flat = self.standardise(jets["features"]).astype(np.float32)
        features: dict[str, Any] = {"particles": split_rows(flat, jets["lengths"])}
        if jets["class_ids"] is not None:
            features["class_ids"] = jets["class_ids"]
        if self.condition_names:
            features["conditions"] = self._standardise_conditions(jets["conditions"])
        return self._padded(features, padding, return_tensors)

    def pad(
        self,
        features: Sequence[Mapping[str, Any]] | Mapping[str, Any],
        padding: bool | str | None = True,
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
        return self._padded(columns, padding, return_tensors)

    def _padded(self, features: dict[str, Any], padding, return_tensors: str | None) -> BatchFeature:
        strategy = padding_strategy(padding)
        particles = [to_numpy(jet).astype(np.float32, copy=False) for jet in features.pop("particles")]
        dtypes = {"class_ids": np.int64}
        others = {
            name: np.asarray([to_numpy(value) for value in values], dtype=dtypes.get(name, np.float32))
            for name, values in features.items()
        }
        if strategy is None:
            return BatchFeature({"particles": particles, **others}, tensor_type=return_tensors)
        lengths = np.array([len(jet) for jet in particles], dtype=np.int64)
        width = self.max_num_particles if strategy == "max_length" else int(lengths.max(initial=0))
        if len(lengths) and lengths.max() > width:
            row = int(np.argmax(lengths))
            raise ValueError(f"row {row}: {lengths[row]} constituents, expected at most {width}")
        size = len(self.feature_names)
        flat = np.concatenate(particles) if particles else np.zeros((0, size), dtype=np.float32)
        data = {
            "particles": pad_rows(flat, lengths, width, "right", 0.0),
            "attention_mask": (np.arange(width) < lengths[:, None]).astype(np.int64),
            **others,
        }
        return BatchFeature(data, tensor_type=return_tensors)

    def _read(self, rows: Any, return_class_ids: bool | None) -> dict[str, Any]:
        """Features (constituents, features), lengths, conditions and classes of jets, physical units, float64."""
        derived = {"part_etarel", "part_dphi", *SHARES}
        stored = [name for name in self.feature_names if name not in derived]
        columns, count, _ = jet_columns(rows, [*FOUR_MOMENTUM, *stored])
        names = [*FOUR_MOMENTUM, *stored]
        if "part_dphi" in columns:
            names.append("part_dphi")
        flat, lengths = {}, None
        for name in names:
            values, sizes = list_column(columns, name, count)
            if lengths is None:
                lengths = sizes
            if not np.array_equal(sizes, lengths):
                row = int(np.argmax(sizes != lengths))
                raise ValueError(f"row {row}: {name} has {sizes[row]} constituents, part_px has {lengths[row]}")
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
            jets[column] = self._jet_column(columns, column, count) if column in columns else sums[name]
        parts = momentum_features(momenta)
        for name in ("jet_pt", "jet_energy"):
            bad = (jets[name] <= 0) & (lengths > 0)
            if bad.any():
                row = int(np.argmax(bad))
                raise ValueError(f"row {row}: {name} = {jets[name][row]:g}, expected a number above 0")
        of_jet = {name: values[owner] for name, values in jets.items()}
        with np.errstate(divide="ignore", invalid="ignore"):
            flat["part_etarel"] = parts["eta"] - of_jet["jet_eta"]
            flat["part_ptrel"] = parts["pt"] / of_jet["jet_pt"]
            flat["part_energyrel"] = parts["energy"] / of_jet["jet_energy"]
        if "part_dphi" not in flat:
            flat["part_dphi"] = wrap_phi(parts["phi"] - of_jet["jet_phi"])
        features = np.stack([flat[name] for name in self.feature_names], axis=-1)

        # in the published order: the first constituents, then those that are real and close enough
        is_first = position < self.max_num_particles
        is_real = parts["pt"] != 0
        is_near = np.abs(flat["part_etarel"]) <= self.max_abs_etarel
        self._dropped["max_num_particles"] += int((~is_first).sum())
        self._dropped["zero_pt"] += int((is_first & ~is_real).sum())
        self._dropped["max_abs_etarel"] += int((is_first & is_real & ~is_near).sum())
        is_kept = is_first & is_real & is_near
        kept = np.bincount(owner[is_kept], minlength=count)
        if (kept == 0).any():
            row = int(np.argmin(kept))
            raise ValueError(f"row {row}: none of {lengths[row]} constituents is left, expected at least 1")
        if not np.isfinite(features[is_kept]).all():
            h, k = np.argwhere(~np.isfinite(features) & is_kept[:, None])[0]
            raise ValueError(f"row {owner[h]}: {self.feature_names[k]}[{position[h]}] does not follow from the momenta")

        jets["jet_nparticles"] = kept.astype(np.float64)
        if "jet_sdmass" in self.condition_names:
            jets["jet_sdmass"] = self._jet_column(columns, "jet_sdmass", count)
        conditions = np.array([jets[name] for name in self.condition_names]).reshape(len(self.condition_names), count).T
        return {
            "features": features[is_kept],
            "lengths": kept,
            "conditions": conditions,
            "class_ids": self._class_ids(columns, count, return_class_ids),
        }

    @staticmethod
    def _jet_column(columns, name: str, count: int) -> np.ndarray:
        values = scalar_column(columns, name, count)
        if not np.isfinite(values).all():
            row = int(np.argmin(np.isfinite(values)))
            raise ValueError(f"row {row}: {name} = {values[row]} is not a finite number")
        return values

    def _class_ids(self, columns, count: int, wanted: bool | None) -> np.ndarray | None:
        if wanted is False or not self.label_names:
            return None
        missing = [name for name in self.label_names if name not in columns and count > 0]
        if missing:
            raise ValueError(f"column {missing[0]} is missing; expected {', '.join(self.label_names)}")
        labels = np.zeros((count, len(self.label_names)))
        for k, name in enumerate(self.label_names if count else ()):
            flags = [float(value) if isinstance(value, (bool, np.bool_)) else value for value in columns[name]]
            labels[:, k] = scalar_column({name: flags}, name, count)
        is_one_hot = ((labels == 0) | (labels == 1)).all(axis=1) & (labels.sum(axis=1) == 1)
        if not is_one_hot.all():
            row = int(np.argmin(is_one_hot))
            raise ValueError(f"row {row}: not exactly one of {', '.join(self.label_names)} is 1")
        return labels.argmax(axis=1)

    # --- what the network sees ---------------------------------------------------------------------------------------

    def standardise(self, features: np.ndarray) -> np.ndarray:
        """Physical features (..., features) to what the network sees: scale (x - mean) / std."""
        return (features - np.asarray(self.means)) * (self.scale / np.asarray(self.stds))

    def denormalise(self, particles: Any, attention_mask: Any) -> np.ndarray:
        """Physical features float32 (batch, slots, features) of what the network made; 0 in empty slots."""
        particles, mask = self._checked(particles, attention_mask)
        physical = particles.astype(np.float32) * (np.asarray(self.stds) / self.scale).astype(np.float32)
        physical = physical + np.asarray(self.means, dtype=np.float32)
        return np.where(mask[..., None], physical, np.float32(0))

    def postprocess(self, features: Any, attention_mask: Any) -> np.ndarray:
        """
        The published treatment of generated features (batch, slots, features), physical units: clip the shares to
        `feature_ranges`, one flag of the particle type (the largest) instead of five numbers, an integer charge.
        """
        features, mask = self._checked(features, attention_mask)
        features = np.array(features)
        for name, (low, high) in self.feature_ranges.items():
            if name in self.feature_names:
                k = self.feature_names.index(name)
                features[..., k] = features[..., k].clip(low, high)
        flags = [self.feature_names.index(name) for name in FLAGS if name in self.feature_names]
        if flags:
            features[..., flags] = np.eye(len(flags), dtype=features.dtype)[features[..., flags].argmax(axis=-1)]
        if "part_charge" in self.feature_names:
            k = self.feature_names.index("part_charge")
            features[..., k] = np.rint(features[..., k])
        return np.where(mask[..., None], features, features.dtype.type(0))

    def _checked(self, particles: Any, attention_mask: Any) -> tuple[np.ndarray, np.ndarray]:
        particles, mask = to_numpy(particles), to_numpy(attention_mask).astype(bool)
        size = len(self.feature_names)
        if particles.ndim != 3 or particles.shape[-1] != size or mask.shape != particles.shape[:2]:
            expected = f"(batch, slots, {size}) and (batch, slots)"
            raise ValueError(f"particles have shape {particles.shape}, mask {mask.shape}, expected {expected}")
        is_bad = mask & ~np.isfinite(particles).all(axis=-1)
        if is_bad.any():
            row, slot = np.argwhere(is_bad)[0]
            raise ValueError(f"row {row}, slot {slot}: {particles[row, slot].tolist()}, expected finite features")
        return particles, mask

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
        return self._standardise_conditions(values)

    def _standardise_conditions(self, conditions: np.ndarray) -> np.ndarray:
        scaled = (conditions - np.asarray(self.condition_means)) / np.asarray(self.condition_stds)
        return scaled.astype(np.float32)

    def sample_conditions(
        self, class_ids: Any, seed: int | np.random.Generator | None = None, return_tensors: str | None = None
    ) -> BatchFeature:
        """
        Draw multiplicity and conditions of jets of `class_ids` (batch,) from the density.

        Returns:
            `num_particles` int64 (batch,), `labels` int64 (batch,) and `conditions` float32 (batch, conditions) for
            `EpicFMForGeneration.generate`. Without classes, or without conditions, these are left out.

        Raises:
            ValueError: no density, or a class that it does not have.
        """
        if self._density is None:
            raise ValueError("the feature extractor has no density of conditions; `fit` it to a training set")
        class_ids = to_numpy(class_ids)
        if class_ids.ndim != 1 or class_ids.dtype.kind not in "iu":
            raise ValueError(f"class_ids must be integers (batch,), got {short_repr(class_ids.tolist())}")
        num_particles, conditions = self._density.sample(class_ids, np.random.default_rng(seed))
        data: dict[str, Any] = {"num_particles": np.clip(num_particles, 1, self.max_num_particles)}
        if self.label_names:
            data["labels"] = class_ids.astype(np.int64)
        if self.condition_names:
            data["conditions"] = self._standardise_conditions(conditions)
        return BatchFeature(data, tensor_type=return_tensors)

    # --- particles to jets -------------------------------------------------------------------------------------------

    def batch_decode(
        self,
        particles: Any,
        attention_mask: Any = None,
        labels: Any = None,
        conditions: Any = None,
        postprocess: bool = True,
        min_num_particles: int = 1,
        jet_phi: Any = 0.0,
    ) -> dict[str, Any]:
        """
        Generated particles to jets.

        Args:
            particles: (batch, slots, features), or what `generate` returned. attention_mask: (batch, slots).
            labels: (batch,), conditions: (batch, conditions): what `generate` was given.
            postprocess: clip shares, one-hot flags, integer charge (see `postprocess`). Otherwise all stays as it came.
            min_num_particles: jets with fewer constituents are left out (3 as published); `row_index` tells which stay.
            jet_phi: of the axis, one number or (batch,).

        Returns:
            Columns of the jet data sets of this package, one row per jet, constituents by falling pT: the features as
            lists of float32 arrays; with `jet_pt` and `jet_eta` among the conditions the massless constituents
            `part_px`, `part_py`, `part_pz`, `part_energy` [GeV] and `part_deta` (with the sign of the JetClass files);
            `jet_pt`, `jet_eta`, `jet_phi`, ..., labels, `jet_nparticles`, and `row_index`.

        Raises:
            ValueError: wrong shapes, or numbers that are not finite.
        """
        if hasattr(particles, "particles"):
            particles, attention_mask = particles.particles, particles.attention_mask
        if attention_mask is None:
            raise ValueError("attention_mask is missing")
        features = self.denormalise(particles, attention_mask)
        mask = to_numpy(attention_mask).astype(bool)
        if postprocess:
            features = self.postprocess(features, mask)
        count = len(mask)
        jets = self._jet_quantities(conditions, count)
        check_integer("min_num_particles", min_num_particles, 0)
        row_index = np.flatnonzero(mask.sum(axis=1) >= min_num_particles)
        features, mask = features[row_index], mask[row_index]
        jets = {name: values[row_index] for name, values in jets.items()}

        owner, _ = np.nonzero(mask)
        lengths = mask.sum(axis=1)
        flat = features[mask]
        flat = flat[np.lexsort([-flat[:, self.feature_names.index("part_ptrel")], owner])]
        columns: dict[str, Any] = {}
        values = {name: flat[:, k] for k, name in enumerate(self.feature_names)}
        if {"jet_pt", "jet_eta"} <= set(jets):
            phi = np.broadcast_to(to_numpy(jet_phi).astype(np.float64), (count,))[row_index]
            if not np.isfinite(phi).all():
                raise ValueError(f"jet_phi must be finite, got {short_repr(jet_phi)}")
            momenta = four_momenta(
                values["part_ptrel"] * jets["jet_pt"][owner],
                values["part_etarel"] + jets["jet_eta"][owner],
                wrap_phi(values["part_dphi"] + phi[owner]),
            )
            for k, name in enumerate(FOUR_MOMENTUM):
                columns[name] = split_rows(momenta[:, k].astype(np.float32), lengths)
            sign = np.where(jets["jet_eta"] > 0, 1, -1)[owner]
            columns["part_deta"] = split_rows((values["part_etarel"] * sign).astype(np.float32), lengths)
            jets["jet_phi"] = phi
            if "jet_energy" not in jets:
                jets["jet_energy"] = sum_jets(momenta, lengths)[:, 3]
        for name, column in values.items():
            column = column.astype(np.int32) if postprocess and name in FLAGS else column
            columns[name] = split_rows(column, lengths)
        columns.update({name: column.astype(np.float32) for name, column in jets.items()})
        if labels is not None:
            labels = to_numpy(labels)
            if labels.shape != (count,):
                raise ValueError(f"labels have shape {labels.shape}, expected ({count},)")
            for class_id, name in enumerate(self.label_names):
                columns[name] = (labels[row_index] == class_id).astype(np.int32)
        columns["jet_nparticles"] = lengths.astype(np.float32)
        columns["row_index"] = row_index
        return columns

    def _jet_quantities(self, conditions: Any, count: int) -> dict[str, np.ndarray]:
        """Physical conditions, (batch,) each, of what the network sees."""
        if conditions is None or not self.condition_names:
            return {}
        conditions = to_numpy(conditions).astype(np.float64)
        if conditions.ndim == 2 and conditions.shape[1] == len(self.label_names) + len(self.condition_names):
            conditions = conditions[:, len(self.label_names) :]
        if conditions.shape != (count, len(self.condition_names)):
            raise ValueError(f"conditions have shape {conditions.shape}, expected {(count, len(self.condition_names))}")
        physical = conditions * np.asarray(self.condition_stds) + np.asarray(self.condition_means)
        return {name: physical[:, k] for k, name in enumerate(self.condition_names)}


def _numbers(name: str, values: Any, count: int, above_zero: bool = False) -> list[float]:
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


# `save_pretrained` then writes this code beside the settings, so that they load anywhere with `trust_remote_code=True`
EpicFMFeatureExtractor.register_for_auto_class("AutoFeatureExtractor")
