"""
Features of OmniLearned (arXiv:2510.24066): jets <-> particles about the jet axis, as the network reads them.

A particle is (eta - eta_jet, phi - phi_jet, ln pT/GeV, ln E/GeV), not normalised, with its type and tanh d0,
error of d0, tanh dz, error of dz (impact parameters in mm) if the network has them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers import BatchFeature

from .batching import check_integer, split_rows
from .jet_features import FOUR_MOMENTUM, four_momenta, momentum_features, sum_jets, wrap_phi
from .jet_sets import (
    LABEL_NAMES,
    MULTIPLICITY,
    Constituents,
    JetSetFeatureExtractor,
    label_columns,
    read_constituents,
)
from .records_dirc import short_repr, to_numpy

# PDG codes of the types in increasing order: the first is type 1, 0 is padding. Charged hadrons count as pions, neutral
# ones as K0L.
PDG_CODES = (-211, -13, -11, 11, 13, 22, 130, 211)
# column -> PDG code at charge -1, 0 and 1
FLAGS = {
    "part_isChargedHadron": (-211, None, 211),
    "part_isNeutralHadron": (None, 130, None),
    "part_isPhoton": (None, 22, None),
    "part_isElectron": (11, None, -11),
    "part_isMuon": (13, None, -13),
}
CHARGES = {-211: -1, -13: 1, -11: 1, 11: -1, 13: -1, 22: 0, 130: 0, 211: 1}
IMPACT_PARAMETERS = ("part_d0val", "part_d0err", "part_dzval", "part_dzerr")
# what conditions are divided by unless `fit` was called: TeV, and the published 100 particles
CONDITION_UNITS = {"jet_pt": 1000.0, "jet_energy": 1000.0, "jet_eta": 1.0, "jet_sdmass": 100.0, MULTIPLICITY: 100.0}
CLIP_RADIUS = 0.8
# tanh of float32 reaches 1 at impact parameters of about 9 mm: then this, 6.1 mm, comes back
LARGEST_TANH = 1 - 1e-5


class OmniLearnedFeatureExtractor(JetSetFeatureExtractor):
    r"""
    Jets to the inputs of the OmniLearned models, and generated particles to jets.

    Args:
        label_names: one-hot columns of the classes, in order; empty: none.
        use_particle_ids, use_additional_features: whether the network has them.
        condition_names: of `jet_pt`, `jet_energy`, `jet_eta`, `jet_sdmass`, `jet_nparticles`; the last one only at the
            end, where the network looks for it.
        condition_means, condition_stds: by default TeV, 100 GeV (soft-drop mass) and hundreds of particles; see `fit`.
        max_num_particles: the first so many constituents of a jet are read.
        clip_inputs: as the published `--clip-inputs`: leave out particles at 0.8 and more from the axis or of up to
            1 GeV of pT, and raise the energy at least to pT.

    Example:
        >>> extractor = OmniLearnedFeatureExtractor(condition_names=["jet_pt", "jet_eta", "jet_nparticles"]).fit(rows)
        >>> request = extractor.sample_conditions(class_ids=[0, 8], seed=1, return_tensors="pt")
        >>> sample = model.generate(**request)
        >>> jets = extractor.batch_decode(sample, labels=request["labels"], conditions=request["conditions"])
    """

    model_input_names = [
        "particles",
        "attention_mask",
        "particle_ids",
        "additional_features",
        "class_ids",
        "conditions",
    ]
    particle_types = {"particles": np.float32, "particle_ids": np.int64, "additional_features": np.float32}

    def __init__(
        self,
        label_names: Sequence[str] = LABEL_NAMES,
        use_particle_ids: bool = False,
        use_additional_features: bool = False,
        condition_names: Sequence[str] = (),
        condition_means: Sequence[float] | None = None,
        condition_stds: Sequence[float] | None = None,
        max_num_particles: int = 150,
        clip_inputs: bool = False,
        **kwargs,
    ):
        condition_names = list(condition_names)
        if MULTIPLICITY in condition_names[:-1]:
            raise ValueError(f"condition_names is {condition_names}, expected {MULTIPLICITY} at the end")
        units = [CONDITION_UNITS.get(name, 1.0) for name in condition_names]
        super().__init__(
            label_names=label_names,
            condition_names=condition_names,
            condition_means=[0.0] * len(condition_names) if condition_means is None else condition_means,
            condition_stds=units if condition_stds is None else condition_stds,
            max_num_particles=check_integer("max_num_particles", max_num_particles, 1),
            **kwargs,
        )
        self.use_particle_ids = bool(use_particle_ids)
        self.use_additional_features = bool(use_additional_features)
        self.clip_inputs = bool(clip_inputs)

    @classmethod
    def from_model_config(cls, config: Any, **overrides) -> "OmniLearnedFeatureExtractor":
        """
        An extractor for the inputs of a model.

        Raises:
            ValueError: the model has other features than this extractor makes.
        """
        for name, made in (
            ("num_particle_types", (0, len(PDG_CODES) + 1)),
            ("num_additional_features", (0, len(IMPACT_PARAMETERS))),
            ("num_features", (4,)),
        ):
            if getattr(config, name) not in made:
                expected = " or ".join(map(str, made))
                raise ValueError(f"`{name}` of the model is {getattr(config, name)}, the extractor makes {expected}")
        used = {
            "use_particle_ids": config.num_particle_types > 0,
            "use_additional_features": config.num_additional_features > 0,
        }
        return cls(**{**used, **overrides})

    def model_settings(self) -> dict[str, Any]:
        """Values of `OmniLearnedConfig` that follow from this extractor."""
        labels = {"id2label": dict(enumerate(self.label_names))}
        labels["label2id"] = {name: number for number, name in enumerate(self.label_names)}
        return {
            **(labels if self.label_names else {"num_labels": 1}),
            "num_particle_types": len(PDG_CODES) + 1 if self.use_particle_ids else 0,
            "num_additional_features": len(IMPACT_PARAMETERS) if self.use_additional_features else 0,
            "num_conditions": len(self.condition_names),
        }

    def fit(self, rows: Any, standardise_conditions: bool = True, **density) -> "OmniLearnedFeatureExtractor":
        """
        Take means and standard deviations of the conditions, and their density, from jets. The multiplicity stays in
        hundreds.

        Args:
            rows: of the training set, as `__call__` takes them.
            density: arguments of `JetConditionDensity.fit`.

        Raises:
            ValueError: naming row, field and value; or no jets.
        """
        jets = read_constituents(rows)
        if not jets.count:
            raise ValueError("no jets to fit to")
        _, lengths = self.kept(jets, **self._is_inside(jets))
        conditions = self.read_conditions(jets, lengths)
        if standardise_conditions:
            for k, name in enumerate(self.condition_names):
                if name != MULTIPLICITY:
                    self.condition_means[k] = float(conditions[:, k].mean())
                    self.condition_stds[k] = float(conditions[:, k].std()) or 1.0
        self.fit_density(lengths, conditions, self.read_classes(jets, None), **density)
        return self

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
            rows: jets in the columns of the jet data sets: a list of records, a dict of columns, or one record (a batch
                of one). Needed are the four-momenta, the labels, and for particle types `part_charge` and the flags
                `part_is...`, for additional features the impact parameters. Where they are missing, `jet_eta`,
                `jet_phi` and `part_dphi` follow from the sum of the constituents.
            padding: True or "longest", "max_length" (`max_num_particles`), or False for lists.
            return_tensors: None or "np" for numpy, "pt" for torch.
            return_class_ids: False leaves the labels out.

        Returns:
            `BatchFeature`: `particles` float32 (batch, slots, 4), `attention_mask` int64 (batch, slots); if used
            `particle_ids` int64 (batch, slots), `additional_features` float32 (batch, slots, 4), `conditions` float32
            (batch, conditions), `class_ids` int64 (batch,), which the models take as `labels`.

        Raises:
            ValueError: naming row, field and value: something is missing or not finite, a jet has no constituents or
                not exactly one label.
        """
        stored = [
            *(("part_charge", *FLAGS) if self.use_particle_ids else ()),
            *(IMPACT_PARAMETERS if self.use_additional_features else ()),
        ]
        jets = read_constituents(rows, stored)
        is_kept, lengths = self.kept(jets, **self._is_inside(jets))
        flat = {name: values[is_kept] for name, values in jets.flat.items()}
        owner, position = jets.owner[is_kept], jets.position[is_kept]
        energy = flat["part_energy"]
        if self.clip_inputs:
            energy = np.maximum(energy, flat["part_pt"])
        if (energy <= 0).any():
            h = int(np.argmax(energy <= 0))
            raise ValueError(f"row {owner[h]}: part_energy[{position[h]}] = {energy[h]:g}, expected a number above 0")
        kinematics = [flat["part_etarel"], flat["part_dphi"], np.log(flat["part_pt"]), np.log(energy)]
        if not all(np.isfinite(values).all() for values in kinematics):
            h = int(np.argmin(np.isfinite(kinematics).all(axis=0)))
            raise ValueError(f"row {owner[h]}: constituent {position[h]} has no direction")
        features: dict[str, Any] = {"particles": split_rows(np.stack(kinematics, axis=-1).astype(np.float32), lengths)}
        if self.use_particle_ids:
            features["particle_ids"] = split_rows(particle_types(flat, owner, position), lengths)
        if self.use_additional_features:
            d0, d0_error, dz, dz_error = (flat[name] for name in IMPACT_PARAMETERS)
            additional = np.stack([np.tanh(d0), d0_error, np.tanh(dz), dz_error], axis=-1)
            features["additional_features"] = split_rows(additional.astype(np.float32), lengths)
        classes = self.read_classes(jets, return_class_ids)
        if classes is not None:
            features["class_ids"] = classes
        if self.condition_names:
            features["conditions"] = self.standardise_conditions(self.read_conditions(jets, lengths))
        return self.pad(features, padding, return_tensors=return_tensors)

    def _is_inside(self, jets: Constituents) -> dict[str, np.ndarray]:
        if not self.clip_inputs:
            return {}
        radius = np.hypot(jets.flat["part_etarel"], jets.flat["part_dphi"])
        return {"clip_inputs": (radius < CLIP_RADIUS) & (jets.flat["part_pt"] > 1)}

    def batch_decode(
        self,
        particles: Any,
        attention_mask: Any = None,
        labels: Any = None,
        conditions: Any = None,
        particle_ids: Any = None,
        additional_features: Any = None,
        min_num_particles: int = 1,
        jet_eta: Any = 0.0,
        jet_phi: Any = 0.0,
    ) -> dict[str, Any]:
        """
        Generated particles to jets. As in the published evaluation constituents are massless: the generated energy,
        which need not fit to pT and direction, is only passed on as `part_logenergy`.

        Args:
            particles: (batch, slots, 4), or what `generate` returned. attention_mask: (batch, slots).
            labels: (batch,), conditions: (batch, conditions), particle_ids: (batch, slots), additional_features:
                (batch, slots, 4): what `generate` was given.
            min_num_particles: jets with fewer constituents are left out; `row_index` tells which stay.
            jet_eta, jet_phi: of the axis, one number or (batch,); a condition `jet_eta` goes before.

        Returns:
            Columns of the jet data sets of this package, one row per jet, constituents by falling pT: four-momenta
            [GeV], `part_deta`, `part_dphi`, `part_logenergy`, types and impact parameters if given, `jet_eta`,
            `jet_phi` of the axis, `jet_pt`, `jet_energy` of the sum, labels, `jet_nparticles`, and `row_index`.

        Raises:
            ValueError: wrong shapes, or numbers that are not finite.
        """
        if hasattr(particles, "particles"):
            particles, attention_mask = particles.particles, particles.attention_mask
        if attention_mask is None:
            raise ValueError("attention_mask is missing")
        particles, mask = to_numpy(particles).astype(np.float64), to_numpy(attention_mask).astype(bool)
        if particles.ndim != 3 or particles.shape[-1] != 4 or mask.shape != particles.shape[:2]:
            expected = "(batch, slots, 4) and (batch, slots)"
            raise ValueError(f"particles have shape {particles.shape}, mask {mask.shape}, expected {expected}")
        is_possible = (np.abs(particles[..., 0]) < 50) & (particles[..., 2] < 50)
        is_bad = mask & ~(np.isfinite(particles).all(axis=-1) & is_possible)
        if is_bad.any():
            row, slot = np.argwhere(is_bad)[0]
            found = particles[row, slot].tolist()
            raise ValueError(f"row {row}, slot {slot}: {found}, expected finite features, eta and ln pT below 50")
        count = len(mask)
        known = self.physical_conditions(conditions, count)
        axis = {"jet_eta": known.get("jet_eta", jet_eta), "jet_phi": jet_phi}
        for name, values in axis.items():
            values = to_numpy(values).astype(np.float64)
            if values.shape not in ((), (count,)) or not np.isfinite(values).all():
                raise ValueError(f"{name} must be a finite number or ({count},), got {short_repr(values.tolist())}")
            axis[name] = np.broadcast_to(values, (count,))
        check_integer("min_num_particles", min_num_particles, 0)
        row_index = np.flatnonzero(mask.sum(axis=1) >= min_num_particles)
        mask = mask[row_index]
        axis = {name: values[row_index] for name, values in axis.items()}

        owner, _ = np.nonzero(mask)
        lengths = mask.sum(axis=1)
        order = np.lexsort([-particles[row_index][mask][:, 2], owner])
        flat = particles[row_index][mask][order]
        eta, phi = flat[:, 0] + axis["jet_eta"][owner], wrap_phi(flat[:, 1] + axis["jet_phi"][owner])
        momenta = four_momenta(np.exp(flat[:, 2]), eta, phi)
        columns: dict[str, np.ndarray] = {name: momenta[:, k] for k, name in enumerate(FOUR_MOMENTUM)}
        columns["part_deta"] = flat[:, 0] * np.where(axis["jet_eta"] > 0, 1, -1)[owner]
        columns["part_dphi"] = wrap_phi(flat[:, 1])
        columns["part_logenergy"] = flat[:, 3]
        for name, values, decode in (
            ("particle_ids", particle_ids, decoded_types),
            ("additional_features", additional_features, decoded_impact_parameters),
        ):
            if values is not None:
                values = to_numpy(values)
                if values.shape[:2] != (count, mask.shape[1]):
                    raise ValueError(f"{name} have shape {values.shape}, expected ({count}, {mask.shape[1]}, ...)")
                columns.update(decode(values[row_index][mask][order]))
        result: dict[str, Any] = {
            name: split_rows(values.astype(np.int32 if name in FLAGS else np.float32), lengths)
            for name, values in columns.items()
        }
        sums = momentum_features(sum_jets(momenta, lengths))
        jets = {"jet_pt": sums["pt"], **axis, "jet_energy": sums["energy"], MULTIPLICITY: lengths}
        result.update({name: values.astype(np.float32) for name, values in jets.items()})
        if labels is not None and self.label_names:
            of_jets = label_columns(labels, self.label_names, count)
            result.update({name: column[row_index] for name, column in of_jets.items()})
        result["row_index"] = row_index
        return result


def particle_types(flat: Mapping[str, np.ndarray], owner: np.ndarray, position: np.ndarray) -> np.ndarray:
    """
    Types int64 (constituents,) of charge and flags.

    Raises:
        ValueError: not exactly one flag is 1, or the charge does not go with it; names row and constituent.
    """
    flags = np.stack([flat[name] for name in FLAGS], axis=-1)
    charge = flat["part_charge"]
    is_one_hot = ((flags == 0) | (flags == 1)).all(axis=-1) & (flags.sum(axis=-1) == 1)
    if not is_one_hot.all():
        h = int(np.argmin(is_one_hot))
        raise ValueError(f"row {owner[h]}: constituent {position[h]}: not exactly one of {', '.join(FLAGS)} is 1")
    known = np.isin(charge, (-1, 0, 1))
    table = np.array([[0 if code is None else PDG_CODES.index(code) + 1 for code in codes] for codes in FLAGS.values()])
    types = table[flags.argmax(axis=-1), np.where(known, charge, 0).astype(np.int64) + 1]
    if (~known | (types == 0)).any():
        h = int(np.argmax(~known | (types == 0)))
        flag = list(FLAGS)[int(flags[h].argmax())]
        raise ValueError(f"row {owner[h]}: part_charge[{position[h]}] = {charge[h]:g} does not go with {flag}")
    return types


def decoded_types(types: np.ndarray) -> dict[str, np.ndarray]:
    """Charge and flags (constituents,) of types (constituents,); ValueError for one that is none."""
    if not ((types >= 1) & (types <= len(PDG_CODES))).all():
        raise ValueError(f"particle_ids has {types.min()} to {types.max()}, expected 1 to {len(PDG_CODES)}")
    codes = np.asarray(PDG_CODES)[types - 1]
    columns = {name: np.isin(codes, [code for code in of_flag if code is not None]) for name, of_flag in FLAGS.items()}
    columns["part_charge"] = np.array([CHARGES[code] for code in PDG_CODES])[types - 1]
    return columns


def decoded_impact_parameters(values: np.ndarray) -> dict[str, np.ndarray]:
    """Impact parameters and errors in mm, (constituents,), of additional features (constituents, 4)."""
    values = values.astype(np.float64)
    for column in (0, 2):
        values[:, column] = np.arctanh(np.clip(values[:, column], -LARGEST_TANH, LARGEST_TANH))
    return {name: values[:, k] for k, name in enumerate(IMPACT_PARAMETERS)}


# `save_pretrained` then writes this code beside the settings, so that they load anywhere with `trust_remote_code=True`
OmniLearnedFeatureExtractor.register_for_auto_class("AutoFeatureExtractor")
