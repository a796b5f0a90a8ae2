"""Configuration of OmniLearned: the PET2 network (arXiv:2510.24066) and its pre-training objectives (2606.14870)."""

import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

# published sizes; micro only in arXiv:2606.14870
PAPER_SIZES: dict[str, dict[str, int]] = {
    "micro": {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_head_layers": 2,
        "num_neighbors": 15,
    },
    "small": {"hidden_size": 128, "num_hidden_layers": 8, "num_attention_heads": 8, "num_head_layers": 2},
    "medium": {"hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 16, "num_head_layers": 2},
    "large": {"hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 32, "num_head_layers": 4},
}
OBJECTIVES = ("classification", "generation", "masked")
SOLVERS = ("euler", "midpoint", "rk4", "dopri5")


@strict
class OmniLearnedConfig(PreTrainedConfig):
    r"""
    Configuration of PET2, a transformer over the particles of a jet: learned tokens, an optional time and an optional
    condition in front of them, an embedding of the nearest neighbours, and attention biases from pairs of particles.

    Particles are (eta - eta_jet, phi - phi_jet, ln pT/GeV, ln E/GeV), not normalised. The defaults are the published
    "small" network with both interactions; [`OmniLearnedConfig.from_paper_size`] gives the others. Converted
    checkpoints set the switches of the last group to what they were trained with.

    Args:
        hidden_size, num_hidden_layers, num_attention_heads (`int`): width, blocks, heads.
        num_head_layers (`int`): blocks of every head.
        num_local_layers (`int`): blocks over the neighbours of a particle, by default `num_head_layers`.
        num_tokens (`int`): learned tokens in front of the particles.
        mlp_ratio (`int`): hidden width of the MLPs over `hidden_size` (always 2 among the neighbours).
        num_features (`int`): continuous features of a particle, the above first; at least three.
        num_neighbors (`int`), num_coordinates (`int`): neighbours of a particle, and how many of the first features
            their distance counts.
        use_interaction, use_local_interaction (`bool`): bias of the attention, and features of the neighbours, from
            ln m², ln ΔR and ln kt of pairs.
        num_particle_types (`int`): size of the table of `particle_ids`, padding (0) included; 0 without. Published 9.
        num_additional_features (`int`): further features of a particle (impact parameters); 0 without. Published 4.
        num_conditions (`int`): conditions of a jet; 0 without.
        use_time (`bool`): a position for the time of the flow, which generation needs.
        use_long_skips (`bool`): the second half of the blocks also reads the outputs of the first half, last first. An
            option of the published network that no published run has set.
        num_particle_labels (`int`): classes of a particle, of `OmniLearnedForTokenClassification`.
        num_event_classes (`int`): the last so many of `num_labels` are classes of events, of their own cross entropy.
        hidden_dropout, attention_dropout, feature_dropout (`float`): in the MLPs, on the attention weights, and the
            probability that a jet is seen without `particle_ids` (or without `additional_features`).

        objectives (`list[str]`): of `OmniLearnedForPreTraining`: some of classification, generation, masked.
        classification_loss_weight, generation_loss_weight, masked_loss_weight (`float`): of the three losses.
        perturbed_loss_weight (`float`): of the class of the noised jet, with (1 - time)² per jet.
        masked_input_loss_weight (`float`): of the class of the jet with masked particles.
        contrastive_loss_weight (`float`): of the contrast between clean and noised states of the same jet.
        mask_fraction (`float`): of the particles of the batch.
        masked_position (`"rank_among_masked"`, `"rank"` or `"position"`): which learned vector stands for a masked
            particle: by the rank of its pT, descending, among the masked or among all particles, or by its slot.
        max_position_embeddings (`int`): number of these vectors.
        codebook_size (`int`): number of codes of a masked particle; 0 to predict its features.
        codebook_features (`int`): features that the codes describe: those of the particle, then additional ones.
        label_smoothing (`float`): of the cross entropy over the codes.
        mask_particle_types (`bool`): predict `particle_ids` of masked particles too.
        masked_type_loss_weight (`float`): of that.

        noise_mean, noise_std (`list[float]`): of the noise of the flow, per feature.
        num_inference_steps (`int`): steps of the sampler. Published are 127 (128 points in time), which converted
            checkpoints keep; the jets of a small trained network cannot be told from those after 16 midpoint steps
            (`evaluation/results_sets.md`). `hepzoo evaluate sampling-steps` measures any other.
        solver (`str`): published "midpoint".
        label_dropout (`float`): probability that a jet is generated without its class in training, for guidance.

        initializer_range (`float`): standard deviation of fresh tokens.
        mask_rule (`"given"` or `"log_pt"`): padding is what `attention_mask` says, or, as published, also every slot
            with ln pT exactly 0, which a particle of 1 GeV has too.
        published_neighbors (`bool`): the nearest of the `num_neighbors` + 1 nearest is taken for the particle itself,
            by distances that rounding makes inexact; with duplicates a neighbour is lost.
        class_balancing (`bool`): as published, jets weigh by the inverse number of their class in the batch.
        loss_reduction (`"jet"` or `"batch"`): weights of jets enter per jet, or, as in arXiv:2606.14870, as their means
            over the batch, which cancels the balance of classes.
        contrastive_weighting (`"jet"` or `"batch"`): (1 - time)² of each jet, or, as published, the mean of it.
        masked_head_sees_time (`bool`): as published, the head for masked particles attends to the empty time position.
        particle_label_token (`bool`): as published, the head for classes of particles is given the class of the jet.
        loss_over_padding (`bool`): as published, the regression per particle counts padding in its mean.
        truncate_multiplicity (`bool`): as published, the number of particles is 100 times the last condition rounded
            *down*, which loses one particle of 53, 59, 105, 106, 117 and 118.
    """

    model_type = "omnilearned"
    keys_to_ignore_at_inference = [
        "hidden_states",
        "visible",
        "target",
        "noisy_particles",
        "noise",
        "time",
        "class_loss",
        "event_loss",
        "perturbed_class_loss",
        "perturbed_event_loss",
        "generation_loss",
        "masked_loss",
        "masked_type_loss",
        "masked_input_loss",
        "contrastive_loss",
        "particle_loss",
        "jet_loss",
    ]

    hidden_size: int = 128
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_head_layers: int = 2
    num_local_layers: int | None = None
    num_tokens: int = 4
    mlp_ratio: int = 2
    num_features: int = 4
    num_neighbors: int = 10
    num_coordinates: int = 2
    use_interaction: bool = True
    use_local_interaction: bool = True
    num_particle_types: int = 0
    num_additional_features: int = 0
    num_conditions: int = 0
    use_time: bool = False
    use_long_skips: bool = False
    num_particle_labels: int = 8
    num_event_classes: int = 0
    hidden_dropout: float | int = 0.0
    attention_dropout: float | int = 0.0
    feature_dropout: float | int = 0.0

    objectives: list[str] | tuple[str, ...] = OBJECTIVES
    classification_loss_weight: float | int = 1.0
    generation_loss_weight: float | int = 1.0
    masked_loss_weight: float | int = 1.0
    perturbed_loss_weight: float | int = 1.0
    masked_input_loss_weight: float | int = 1.0
    contrastive_loss_weight: float | int = 0.0
    mask_fraction: float | int = 0.4
    masked_position: str = "rank_among_masked"
    max_position_embeddings: int = 150
    codebook_size: int = 0
    codebook_features: int = 4
    label_smoothing: float | int = 0.1
    mask_particle_types: bool = False
    masked_type_loss_weight: float | int = 1.0

    noise_mean: list[float] | tuple[float, ...] = (0.0, 0.0, 1.11398, 1.43384)
    noise_std: list[float] | tuple[float, ...] = (0.270949, 0.27426, 1.30273, 1.33559)
    num_inference_steps: int = 16
    solver: str = "midpoint"
    label_dropout: float | int = 0.0

    initializer_range: float | int = 0.02
    mask_rule: str = "given"
    published_neighbors: bool = False
    class_balancing: bool = False
    loss_reduction: str = "jet"
    contrastive_weighting: str = "jet"
    masked_head_sees_time: bool = False
    particle_label_token: bool = False
    loss_over_padding: bool = False
    truncate_multiplicity: bool = False

    @classmethod
    def from_paper_size(cls, size: str, **kwargs: Any) -> "OmniLearnedConfig":
        """
        A published size: "micro", "small", "medium" or "large".

        Args:
            kwargs: further settings, which win over those of the size.
        """
        if size not in PAPER_SIZES:
            raise ValueError(f"size is {size!r}, expected one of {', '.join(PAPER_SIZES)}")
        return cls(**{**PAPER_SIZES[size], **kwargs})

    def __post_init__(self, **kwargs):
        if self.num_local_layers is None:
            self.num_local_layers = self.num_head_layers
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Cross-field checks, run by `@strict` at construction and at `save_pretrained`."""
        for name, choices in (
            ("masked_position", ("rank_among_masked", "rank", "position")),
            ("mask_rule", ("given", "log_pt")),
            ("loss_reduction", ("jet", "batch")),
            ("contrastive_weighting", ("jet", "batch")),
            ("solver", SOLVERS),
            ("problem_type", (None, "regression", "single_label_classification")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}, expected one of {', '.join(map(str, choices))}")
        for name, least in (
            ("num_labels", 1),
            ("hidden_size", 1),
            ("num_hidden_layers", 1),
            ("num_attention_heads", 1),
            ("num_head_layers", 1),
            ("num_local_layers", 0),
            ("num_tokens", 1),
            ("mlp_ratio", 1),
            ("num_features", 3),
            ("num_neighbors", 1),
            ("num_coordinates", 1),
            ("num_particle_types", 0),
            ("num_additional_features", 0),
            ("num_conditions", 0),
            ("num_particle_labels", 1),
            ("num_event_classes", 0),
            ("max_position_embeddings", 1),
            ("codebook_size", 0),
            ("codebook_features", 1),
            ("num_inference_steps", 1),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` is {getattr(self, name)}, expected at least {least}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`hidden_size` = {self.hidden_size} is not a multiple of `num_attention_heads` = "
                f"{self.num_attention_heads}"
            )
        if self.use_long_skips and self.num_hidden_layers % 2:
            raise ValueError(f"`num_hidden_layers` is {self.num_hidden_layers}, expected an even number: long skips")
        if self.mask_particle_types and self.num_particle_types == 0:
            raise ValueError("`mask_particle_types` is True, but `num_particle_types` is 0: there are no types")
        for name, most in (
            ("num_coordinates", self.num_features),
            ("codebook_features", self.num_features + self.num_additional_features),
        ):
            if getattr(self, name) > most and (name != "codebook_features" or self.codebook_size > 0):
                raise ValueError(f"`{name}` is {getattr(self, name)}, expected at most the {most} features")
        for name in ("hidden_dropout", "attention_dropout", "feature_dropout", "label_dropout", "label_smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}, expected 0 to 1")
        weights = [name for name in self.__dataclass_fields__ if name.endswith("_loss_weight")]
        for name in (*weights, "initializer_range"):
            if not (getattr(self, name) >= 0 and math.isfinite(getattr(self, name))):
                raise ValueError(f"`{name}` is {getattr(self, name)}, expected a finite number of at least 0")
        for name, least in (("noise_mean", -math.inf), ("noise_std", 0)):
            values = getattr(self, name)
            if self.use_time and len(values) != self.num_features:
                raise ValueError(f"`{name}` has {len(values)} values, expected {self.num_features}")
            if not all(math.isfinite(value) and value > least for value in values):
                above = f" above {least}" if least == 0 else ""
                raise ValueError(f"`{name}` is {list(values)}, expected finite numbers{above}")
        if not self.objectives or not set(self.objectives) <= set(OBJECTIVES):
            raise ValueError(f"`objectives` is {list(self.objectives)}, expected some of {', '.join(OBJECTIVES)}")
        if not 0 <= self.mask_fraction <= 1:
            raise ValueError(f"`mask_fraction` is {self.mask_fraction}, expected 0 to 1")
        if self.num_event_classes and self.num_event_classes >= self.num_labels:
            raise ValueError(
                f"`num_event_classes` is {self.num_event_classes}, expected less than `num_labels` = {self.num_labels}"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def num_prefix(self) -> int:
        """Positions in front of the particles: tokens, time, condition."""
        return self.num_tokens + self.use_time + (self.num_conditions > 0)


__all__ = ["OmniLearnedConfig"]
