"""Configuration of SPADE, the split-and-delay shower generator of arXiv:2606.11304."""

import math

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


@strict
class SpadeConfig(PreTrainedConfig):
    r"""
    Configuration of a SPADE model: a decoder over the hits (x, y, z, energy) of a calorimeter shower, with one stream
    of tokens per axis and one continuous stream for the energy. The streams are delayed against each other, so that
    inside a hit z is drawn first, then x given z, then y, then the energy (arXiv:2606.11304).

    A sequence is `[slot per register] [BOS] ...`; hit i of a stream with delay d stands at position `1 + d + i` from
    BOS. The slots hold MISSING ids which the model replaces by its learned registers, so that masks, caches and lengths
    count them like any other position. Ids of an axis: pad = 0, cell i = i + 1, MISSING = cells + 1.

    The defaults are the published architecture for 30 x 30 x 30 cells (3.0 million parameters) with the correct rotary
    embedding, loss masks and stop; converted checkpoints set `rope_pairing`,
    `loss_over_prefix` and the stop scales to what they were trained with.

    Args:
        nbins (`(int, int, int)`): cells in x, y and z (layers).
        axis_mode (`"split"` or `"combined"`): one vocabulary per axis, or one token per cell of the grid (the baseline
            of the paper).
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size (`int`): width, blocks, heads, width of
            the SwiGLU.
        num_key_value_heads (`int`): 1 is multi-query attention; `num_attention_heads` is ordinary attention.
        use_rms_norm (`bool`): RMS norms instead of layer norms. parallel_residual (`bool`): attention and SwiGLU read
            the same norm and are added together.
        rope_pairing (`"half"` or `"published"`): the rotation of the rotary embedding. The published code pairs the
            components in a way that is not a rotation (norms change with the position).
        axis_embedding_size, feature_size (`int`): width of one axis embedding, of the embedded energies.
        num_registers (`int`): learned positions in front of the sequence.
        condition_register (`bool`): add the incident energy to the first register.
        mixture_components, energy_head_size (`int`): Gaussians of the energy, width of its head.
        energy_noise (`float`): standard deviation of the noise on the energies that training feeds (transformed units).
        energy_min, energy_max (`float`): range of fed and sampled energies (transformed units).
        log_scale_min, log_scale_max (`float`): range of the head's log scales.
        incident_energy_offset, incident_energy_scale (`float`): the network sees (E / GeV - offset) * scale.
        energy_loss_weight (`float`): weight of the energy's negative log likelihood.
        loss_over_prefix (`bool`): as published, average the energy loss also over the positions in front of the first
            energy (target 0) and, in combined mode, train one MISSING after the last hit.
        layer_monotonic (`bool`): the logits of layers in front of the current one are removed.
        stream_delays (`list[int]`), energy_delay (`int`): delays of the token streams and of the energy; by default
            those of the paper.
        max_num_hits (`int`): longest shower.
        use_stop_head (`bool`): have the network that decides after every hit whether the shower is complete.
        stop_embedding_size, stop_hidden_size, stop_num_layers (`int`), stop_dropout (`float`): its size.
        stop_use_position, stop_use_counter (`bool`): its inputs i / (max_num_hits - 1) and i.
        stop_energy_scale, stop_counter_scale (`float`): factors on its inputs incident energy in GeV and counter i
            (1 in published checkpoints).
        stop_pos_weight (`float`): weight of the one positive of every shower in its loss; 0 takes the ratio of
            negatives to positives of the batch. stop_loss_weight (`float`): weight of its loss.
        embedding_initializer_range (`float`): standard deviation of freshly initialised embeddings and registers.
    """

    model_type = "spade"
    keys_to_ignore_at_inference = ["past_key_values", "energy_mixture", "stream_losses", "energy_loss", "stop_loss"]

    nbins: list[int] | tuple[int, ...] = (30, 30, 30)
    axis_mode: str = "split"
    hidden_size: int = 256
    num_hidden_layers: int = 3
    num_attention_heads: int = 8
    num_key_value_heads: int = 1
    intermediate_size: int = 1024
    hidden_act: str = "silu"
    use_rms_norm: bool = False
    parallel_residual: bool = False
    layer_norm_eps: float = 1e-5
    rms_norm_eps: float = 1e-6
    attention_dropout: float | int = 0.0
    hidden_dropout: float | int = 0.0
    rope_theta: float | int = 10000.0
    rope_pairing: str = "half"
    axis_embedding_size: int = 64
    feature_size: int = 16
    num_registers: int = 2
    condition_register: bool = False
    mixture_components: int = 4
    energy_head_size: int = 128
    energy_noise: float | int = 0.1
    energy_min: float | int = -20.0
    energy_max: float | int = 20.0
    log_scale_min: float | int = -4.0
    log_scale_max: float | int = 4.0
    incident_energy_offset: float | int = 50.0
    incident_energy_scale: float | int = 0.043
    energy_loss_weight: float | int = 1.0
    loss_over_prefix: bool = False
    layer_monotonic: bool = False
    stream_delays: list[int] | tuple[int, ...] | None = None
    energy_delay: int | None = None
    max_num_hits: int = 1700
    use_stop_head: bool = True
    stop_embedding_size: int = 16
    stop_hidden_size: int = 128
    stop_num_layers: int = 2
    stop_dropout: float | int = 0.2
    stop_use_position: bool = True
    stop_use_counter: bool = True
    stop_energy_scale: float | int = 0.01
    stop_counter_scale: float | int = 0.001
    stop_pos_weight: float | int = 1000.0
    stop_loss_weight: float | int = 1.0
    embedding_initializer_range: float | int = 1.0
    use_cache: bool = True
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = 0

    def __post_init__(self, **kwargs):
        if self.stream_delays is None:
            self.stream_delays = [1, 2, 0] if self.axis_mode == "split" else [0]
        if self.energy_delay is None:
            self.energy_delay = max(self.stream_delays) + 1
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Cross-field checks, run by `@strict` at construction and at `save_pretrained`."""
        if self.axis_mode not in ("split", "combined"):
            raise ValueError(f"`axis_mode` is {self.axis_mode!r}, expected 'split' or 'combined'")
        if self.rope_pairing not in ("half", "published"):
            raise ValueError(f"`rope_pairing` is {self.rope_pairing!r}, expected 'half' or 'published'")
        if len(self.nbins) != 3 or min(self.nbins) < 1:
            raise ValueError(f"`nbins` is {list(self.nbins)}, expected the number of cells in x, y and z")
        for name, least in (
            ("hidden_size", 1),
            ("num_hidden_layers", 1),
            ("num_attention_heads", 1),
            ("num_key_value_heads", 1),
            ("intermediate_size", 1),
            ("axis_embedding_size", 1),
            ("feature_size", 1),
            ("num_registers", 0),
            ("mixture_components", 1),
            ("energy_head_size", 1),
            ("energy_noise", 0),
            ("max_num_hits", 2),
            ("stop_embedding_size", 1),
            ("stop_hidden_size", 1),
            ("stop_num_layers", 1),
            ("stop_pos_weight", 0),
        ):
            if not getattr(self, name) >= least:
                raise ValueError(f"`{name}` is {getattr(self, name)}, expected at least {least}")
        for name in ("attention_dropout", "hidden_dropout", "stop_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}, expected 0 <= p < 1")
        for low, high in (("energy_min", "energy_max"), ("log_scale_min", "log_scale_max")):
            if not getattr(self, low) < getattr(self, high):
                raise ValueError(f"`{low}` = {getattr(self, low)} must be below `{high}` = {getattr(self, high)}")
        if self.hidden_size % self.num_attention_heads or self.head_dim % 2:
            raise ValueError(
                f"`hidden_size` = {self.hidden_size} must be an even multiple of `num_attention_heads` = "
                f"{self.num_attention_heads}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"`num_attention_heads` = {self.num_attention_heads} is not a multiple of `num_key_value_heads` = "
                f"{self.num_key_value_heads}"
            )
        if self.condition_register and self.num_registers == 0:
            raise ValueError("`condition_register` needs at least one register")
        if len(self.stream_delays) != self.num_streams or min(self.stream_delays) != 0:
            raise ValueError(
                f"`stream_delays` is {list(self.stream_delays)}, expected {self.num_streams} delays, the smallest 0"
            )
        if self.energy_delay < max(self.stream_delays):
            raise ValueError(f"`energy_delay` is {self.energy_delay}, expected at least {max(self.stream_delays)}")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    # What `MultiStreamGenerationMixin` and the logs of training need to know, one entry per stream.

    @property
    def num_conditioning_tokens(self) -> int:
        """Positions at the start of every sequence that hold the registers."""
        return self.num_registers

    @property
    def stream_names(self) -> tuple[str, ...]:
        return ("x", "y", "z") if self.axis_mode == "split" else ("cell",)

    @property
    def num_streams(self) -> int:
        return len(self.stream_names)

    @property
    def stream_num_cells(self) -> tuple[int, ...]:
        return tuple(self.nbins) if self.axis_mode == "split" else (math.prod(self.nbins),)

    @property
    def stream_vocab_sizes(self) -> tuple[int, ...]:
        return tuple(cells + 2 for cells in self.stream_num_cells)

    @property
    def vocab_size(self) -> int:
        return max(self.stream_vocab_sizes)

    @property
    def stream_missing_token_ids(self) -> tuple[int, ...]:
        return tuple(cells + 1 for cells in self.stream_num_cells)

    @property
    def stream_bos_token_ids(self) -> tuple[int, ...]:
        return self.stream_missing_token_ids

    @property
    def stream_eos_token_ids(self) -> tuple[int, ...]:
        """What a stream that is ahead holds after its last hit; never drawn."""
        return self.stream_missing_token_ids

    @property
    def stream_pad_token_ids(self) -> tuple[int, ...]:
        return (0,) * self.num_streams

    @property
    def max_stream_delay(self) -> int:
        return max(*self.stream_delays, self.energy_delay)


__all__ = ["SpadeConfig"]
