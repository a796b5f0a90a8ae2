"""
Features of the EPiC flow (arXiv:2312.00123): jets <-> standardised constituents and conditions.

A constituent has 13 features: eta and phi relative to the jet (eta without the change of sign that JetClass' own
`part_deta` has), its share of the jet's pT, impact parameters and their errors [mm] as they are (no tanh), charge, and
five flags of the particle type. Each is standardised; the network sees `scale` = 5 times that. A jet has its class, pT
[GeV/c] and eta.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers import BatchFeature

from .batching import check_integer, split_rows
from .jet_features import FOUR_MOMENTUM, four_momenta, sum_jets, wrap_phi
from .jet_sets import (
    LABEL_NAMES,
    Constituents,
    JetSetFeatureExtractor,
    label_columns,
    numbers,
    read_constituents,
)
from .records_dirc import short_repr, to_numpy

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
DERIVED = {"part_etarel", "part_dphi", *SHARES}


class EpicFMFeatureExtractor(JetSetFeatureExtractor):
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
        condition_names = list(condition_names)
        count = len(condition_names)
        super().__init__(
            label_names=label_names,
            condition_names=condition_names,
            condition_means=[0.0] * count if condition_means is None else condition_means,
            condition_stds=[1.0] * count if condition_stds is None else condition_stds,
            max_num_particles=check_integer("max_num_particles", max_num_particles, 1),
            **kwargs,
        )
        self.feature_names = list(feature_names)
        if tuple(self.feature_names[:3]) != KINEMATICS or len(set(self.feature_names)) != len(self.feature_names):
            raise ValueError(f"feature_names is {self.feature_names}, expected {', '.join(KINEMATICS)} and others")
        if means is None or stds is None:
            without = [name for name in self.feature_names if name not in PUBLISHED_STATISTICS]
            if without:
                raise ValueError(f"means and stds are missing; there are no published ones of {without[0]}")
        published = [PUBLISHED_STATISTICS.get(name) for name in self.feature_names]
        self.means = numbers("means", [m for m, _ in published] if means is None else means, len(self.feature_names))
        self.stds = numbers("stds", [s for _, s in published] if stds is None else stds, len(self.feature_names), True)
        (self.scale,) = numbers("scale", [scale], 1, True)
        (self.max_abs_etarel,) = numbers("max_abs_etarel", [max_abs_etarel], 1, True)
        ranges = {"part_ptrel": [1e-4, 1.0]} if feature_ranges is None else feature_ranges
        self.feature_ranges = {name: numbers(f"feature_ranges.{name}", ranges[name], 2) for name in sorted(ranges)}
        for name, (low, high) in self.feature_ranges.items():
            if name not in SHARES or not low < high:
                raise ValueError(f"feature_ranges.{name} is [{low}, {high}], expected rising limits of part_ptrel")

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
        jets = self._read(rows)
        is_kept, lengths = self.kept(jets, max_abs_etarel=self._is_near(jets))
        features = self._features(jets, is_kept)
        if not jets.count:
            raise ValueError("no jets to fit to")
        stds = features.std(axis=0)
        # a type of particle that this data set does not have
        self.means, self.stds = features.mean(axis=0).tolist(), np.where(stds > 0, stds, 1.0).tolist()
        for k, name in enumerate(self.feature_names):
            if name in SHARES:
                self.feature_ranges[name] = [float(features[:, k].min()), float(features[:, k].max())]
        conditions = self.read_conditions(jets, lengths)
        if standardise_conditions and len(self.condition_names):
            widths = conditions.std(axis=0)
            self.condition_means = conditions.mean(axis=0).tolist()
            self.condition_stds = np.where(widths > 0, widths, 1.0).tolist()
        self.fit_density(lengths, conditions, self.read_classes(jets, None), **density)
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
        jets = self._read(rows)
        is_kept, lengths = self.kept(jets, max_abs_etarel=self._is_near(jets))
        flat = self.standardise(self._features(jets, is_kept)).astype(np.float32)
        features: dict[str, Any] = {"particles": split_rows(flat, lengths)}
        classes = self.read_classes(jets, return_class_ids)
        if classes is not None:
            features["class_ids"] = classes
        if self.condition_names:
            features["conditions"] = self.standardise_conditions(self.read_conditions(jets, lengths))
        return self.pad(features, padding, return_tensors=return_tensors)

    def _read(self, rows: Any) -> Constituents:
        return read_constituents(rows, [name for name in self.feature_names if name not in DERIVED])

    def _is_near(self, jets: Constituents) -> np.ndarray:
        return np.abs(jets.flat["part_etarel"]) <= self.max_abs_etarel

    def _features(self, jets: Constituents, is_kept: np.ndarray) -> np.ndarray:
        """Features (kept constituents, features), physical units, float64."""
        flat = {name: values[is_kept] for name, values in jets.flat.items()}
        owner, position = jets.owner[is_kept], jets.position[is_kept]
        flat["part_ptrel"] = flat["part_pt"] / jets.jets["jet_pt"][owner]
        flat["part_energyrel"] = flat["part_energy"] / jets.jets["jet_energy"][owner]
        features = np.stack([flat[name] for name in self.feature_names], axis=-1)
        if not np.isfinite(features).all():
            h, k = np.argwhere(~np.isfinite(features))[0]
            raise ValueError(f"row {owner[h]}: {self.feature_names[k]}[{position[h]}] does not follow from the momenta")
        return features

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
            is_far = np.abs(values["part_etarel"]) >= 50
            if is_far.any():
                h = int(np.argmax(is_far))
                found = values["part_etarel"][h]
                raise ValueError(f"row {row_index[owner[h]]}: part_etarel = {found:g}, expected below 50")
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
        if labels is not None and self.label_names:
            of_jets = label_columns(labels, self.label_names, count)
            columns.update({name: column[row_index] for name, column in of_jets.items()})
        columns["jet_nparticles"] = lengths.astype(np.float32)
        columns["row_index"] = row_index
        return columns

    def _jet_quantities(self, conditions: Any, count: int) -> dict[str, np.ndarray]:
        """Physical conditions, (batch,) each, of what the network sees."""
        width = len(self.label_names) + len(self.condition_names)
        if conditions is not None and self.condition_names:
            conditions = to_numpy(conditions)
            if conditions.ndim == 2 and conditions.shape[1] == width:
                conditions = conditions[:, len(self.label_names) :]
        return self.physical_conditions(conditions, count)


# `save_pretrained` then writes this code beside the settings, so that they load anywhere with `trust_remote_code=True`
EpicFMFeatureExtractor.register_for_auto_class("AutoFeatureExtractor")
