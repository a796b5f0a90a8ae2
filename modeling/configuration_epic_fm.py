"""Configuration of the EPiC flow, the generator of jets of arXiv:2312.00123."""

import math

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

TIME_EMBEDDINGS = ("sincos", "cosine")
ACTIVATIONS = ("leaky_relu", "relu", "elu", "gelu", "silu", "tanh")


@strict
class EpicFMConfig(PreTrainedConfig):
    r"""
    Configuration of a flow-matching generator of jets with equivariant point cloud (EPiC) layers (arXiv:2312.00123,
    layers of arXiv:2301.08128): the constituents of a jet exchange information through their mean and sum and a latent
    vector of the jet.

    The defaults have the sizes of the published JetClass model (8,504,698 parameters). Three things are different, and
    converted checkpoints set them to what was published: the published network has `output_activation` (a leaky ReLU on
    the velocity, which must reach both signs) and the `"cosine"` embedding of time, and its jets are made in 99
    midpoint steps (those of fewer steps cannot be told from them, see `evaluation/results_sets.md`).

    Args:
        num_features (`int`): of a constituent.
        hidden_size, latent_size (`int`): width of the constituents' and of the jet's vectors.
        num_hidden_layers (`int`): EPiC layers.
        hidden_act (`str`): `"leaky_relu"` (slope 0.01), `"relu"`, `"elu"`, `"gelu"`, `"silu"` or `"tanh"`.
        output_activation (`bool`): as published, apply it to the velocity too.
        use_weight_norm (`bool`): weights are g v / |v| per output (arXiv:1602.07868).
        sum_scale (`float`): factor on the sum over the constituents.
        dropout (`float`): after every residual sum.
        num_frequencies (`int`): half the width of the time embedding.
        time_embedding (`"sincos"` or `"cosine"`): cos and sin of pi 2^j t, j < `num_frequencies`; or the published
            cos(pi e^k t), k < 2 `num_frequencies`, whose upper half is noise: there the last bit of t matters.
        time_in_input, time_in_local, time_in_global (`bool`): join the time embedding to the constituents once, and to
            the inputs of every layer of the constituents, of the jet.
        num_classes (`int`): jet classes, one-hot in front of the other conditions.
        condition_names (`list[str]`): the other conditions.
        local_conditions, global_conditions (`bool`): join the conditions to the inputs of the layers of the
            constituents, of the jet.
        label_dropout (`float`): share of the training jets without their class, for classifier-free guidance.
        sigma_min (`float`): width of the path at the data, x_t = (1 - t) x + (sigma_min + (1 - sigma_min) t) z.
        max_num_particles (`int`): most constituents of a generated jet.
        num_inference_steps (`int`), solver (`str`): of `generate`. With `"sincos"` no power of two: at its steps
            more than half of the embedding is the same at all times, as it never is in training.
    """

    model_type = "epic_fm"

    num_features: int = 13
    hidden_size: int = 300
    latent_size: int = 16
    num_hidden_layers: int = 20
    hidden_act: str = "leaky_relu"
    output_activation: bool = False
    use_weight_norm: bool = True
    sum_scale: float | int = 0.01
    dropout: float | int = 0.0
    num_frequencies: int = 16
    time_embedding: str = "sincos"
    time_in_input: bool = False
    time_in_local: bool = True
    time_in_global: bool = True
    num_classes: int = 10
    condition_names: list[str] | tuple[str, ...] = ("jet_pt", "jet_eta")
    local_conditions: bool = False
    global_conditions: bool = True
    label_dropout: float | int = 0.0
    sigma_min: float | int = 1e-4
    max_num_particles: int = 128
    num_inference_steps: int = 24
    solver: str = "midpoint"

    def validate_architecture(self):
        """Cross-field checks, run by `@strict` at construction and at `save_pretrained`."""
        for name, least in (
            ("num_features", 1),
            ("hidden_size", 1),
            ("latent_size", 1),
            ("num_hidden_layers", 0),
            ("num_frequencies", 1),
            ("num_classes", 0),
            ("max_num_particles", 1),
            ("num_inference_steps", 1),
        ):
            if not getattr(self, name) >= least:
                raise ValueError(f"`{name}` is {getattr(self, name)}, expected at least {least}")
        for name, choices in (
            ("time_embedding", TIME_EMBEDDINGS),
            ("hidden_act", ACTIVATIONS),
            ("solver", ("euler", "midpoint", "rk4", "dopri5")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}, expected one of {', '.join(choices)}")
        for name in ("dropout", "label_dropout", "sigma_min"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}, expected 0 <= value < 1")
        if not math.isfinite(self.sum_scale):
            raise ValueError(f"`sum_scale` is {self.sum_scale}, expected a finite number")
        if len(set(self.condition_names)) != len(self.condition_names):
            raise ValueError(f"`condition_names` is {list(self.condition_names)}, expected different names")
        if self.num_frequencies > 44:
            raise ValueError(f"`num_frequencies` is {self.num_frequencies}, expected at most 44: e^88 is the largest")
        if self.label_dropout > 0 and self.num_classes == 0:
            raise ValueError("`label_dropout` needs `num_classes` > 0")

    @property
    def num_conditions(self) -> int:
        """Width of the network's condition: one-hot class and the other conditions."""
        return self.num_classes + len(self.condition_names)

    @property
    def time_size(self) -> int:
        return 2 * self.num_frequencies


__all__ = ["EpicFMConfig"]
