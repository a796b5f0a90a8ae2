"""
SPADE: split-and-delay generation of calorimeter showers, arXiv:2606.11304.

A hit is (x, y, z, energy). Every axis has its own stream of ids, the energy is continuous, and the streams are delayed
against each other: position p from BOS holds z of hit p - 1, x of hit p - 2, y of hit p - 3, the energy of hit p - 4.
So one step of the decoder advances four hits, and inside a hit x sees z, y sees both, the energy sees all three. A
small network of its own decides after every hit whether the shower is complete.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from types import SimpleNamespace

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import StoppingCriteria
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .chunked_cross_entropy import chunked_linear_cross_entropy
from .configuration_spade import SpadeConfig
from .eager_attention import eager_attention_forward
from .generation_multistream import (
    NEVER,
    ForbiddenTokensLogitsProcessor,
    JointLogitsProcessor,
    MonotonicLogitsProcessor,
    MultiStreamGenerationMixin,
    StreamLogitsProcessor,
)
from .growing_cache import GrowingLayer

# every class that a saved checkpoint can be opened with
AUTO_CLASSES = {"AutoModel": "SpadeModel", "AutoModelForCausalLM": "SpadeForCausalLM"}
# settings of `generate` that the library does not know
GENERATION_DEFAULTS = {
    "energy_temperature": 1.0,
    "stop_sampling": True,
    "stop_threshold": 0.98,
    "stop_min_hits": 0,
    "stop_votes": 1,
    "stop_published": False,
    "trim_sequences": True,
    "drop_finished_rows": True,
}


@dataclass
class SpadeModelOutput(ModelOutput):
    """
    Args:
        last_hidden_state (`(batch, length, hidden_size)`): after the final norm, register slots included.
    """

    last_hidden_state: torch.FloatTensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class SpadeCausalLMOutput(ModelOutput):
    """
    Position p predicts all streams of position p + 1.

    Args:
        loss (scalar): cross entropies of the token streams + energy + stop, with their weights.
        logits (tuple of `(batch, length, vocab_k)`): one tensor per stream (x, y, z, or the cell). `None` in training
            with labels, where the loss is computed without holding the logits.
        energy_mixture (tuple of three `(batch, length, mixture_components)`): logits, means and log scales of the
            Gaussians of the next energy, transformed units.
        stream_losses (tuple of scalars): cross entropy of each stream.
        energy_loss (scalar): negative log likelihood of the energies.
        stop_loss (scalar): binary cross entropy of the stop network.
    """

    loss: torch.FloatTensor | None = None
    logits: tuple[torch.FloatTensor, ...] | None = None
    energy_mixture: tuple[torch.FloatTensor, ...] | None = None
    stream_losses: tuple[torch.FloatTensor, ...] | None = None
    energy_loss: torch.FloatTensor | None = None
    stop_loss: torch.FloatTensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


class SpadeRMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        scaled = states.float() * torch.rsqrt(states.float().square().mean(dim=-1, keepdim=True) + self.eps)
        return scaled.to(states.dtype) * self.weight


def make_norm(config: SpadeConfig) -> nn.Module:
    if config.use_rms_norm:
        return SpadeRMSNorm(config.hidden_size, config.rms_norm_eps)
    return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


class SpadeNumberEmbedding(nn.Module):
    """A number per position to a vector: (...) -> (..., out_features)."""

    def __init__(self, size: int, out_features: int):
        super().__init__()
        self.fc1 = nn.Linear(1, size)
        self.fc2 = nn.Linear(size, out_features)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return self.fc2(nn.functional.silu(self.fc1(values.to(self.fc1.weight.dtype).unsqueeze(-1))))


class SpadeEmbeddings(nn.Module):
    """Ids of all streams, hit energies and the incident energy to one vector per position; registers in their slots."""

    def __init__(self, config: SpadeConfig):
        super().__init__()
        self.config = config
        size = config.hidden_size
        if config.axis_mode == "split":
            width = config.axis_embedding_size
            self.tokens = nn.ModuleList(nn.Embedding(vocab, width) for vocab in config.stream_vocab_sizes)
            self.norms = nn.ModuleList(nn.LayerNorm(width, eps=config.layer_norm_eps) for _ in self.tokens)
        else:
            width = size
            self.tokens = nn.ModuleList([nn.Embedding(config.vocab_size, width, padding_idx=0)])
            self.norms = nn.ModuleList([nn.Identity()])
        self.hit_energy = SpadeNumberEmbedding(config.feature_size, config.feature_size)
        self.incident_energy = SpadeNumberEmbedding(config.feature_size, config.feature_size)
        self.projection = nn.Linear(config.num_streams * width + 2 * config.feature_size, size)
        self.registers = nn.Parameter(torch.zeros(config.num_registers, size))
        self.register_condition = SpadeNumberEmbedding(size, size) if config.condition_register else None

    def scale_incident_energy(self, incident_energy: torch.Tensor) -> torch.Tensor:
        """GeV to what the network sees."""
        return (incident_energy.float() - self.config.incident_energy_offset) * self.config.incident_energy_scale

    def forward(
        self,
        input_ids: torch.LongTensor,
        position_ids: torch.LongTensor,
        hit_energy: torch.FloatTensor,
        incident_energy: torch.FloatTensor,
    ) -> torch.FloatTensor:
        """Returns (batch, length, hidden_size)."""
        hit_energy = hit_energy.float()
        if self.training and self.config.energy_noise > 0:
            hit_energy = hit_energy + self.config.energy_noise * torch.randn_like(hit_energy)
        hit_energy = hit_energy.clamp(self.config.energy_min, self.config.energy_max)
        scaled = self.scale_incident_energy(incident_energy)
        features = [norm(token(input_ids[..., k])) for k, (token, norm) in enumerate(zip(self.tokens, self.norms))]
        features.append(self.hit_energy(hit_energy))
        features.append(self.incident_energy(scaled).unsqueeze(1).expand(-1, input_ids.shape[1], -1))
        embedded = self.projection(torch.cat(features, dim=-1))
        if self.config.num_registers == 0:
            return embedded
        registers = self.registers.expand(len(input_ids), -1, -1)
        if self.register_condition is not None:
            condition = self.register_condition(scaled).unsqueeze(1)
            registers = torch.cat([registers[:, :1] + condition, registers[:, 1:]], dim=1)
        slot = position_ids.clamp(max=self.config.num_registers - 1).expand(input_ids.shape[:2])
        registers = registers.gather(1, slot.unsqueeze(-1).expand(-1, -1, registers.shape[-1]))
        return torch.where((position_ids < self.config.num_registers).unsqueeze(-1), registers, embedded)


class SpadeRotaryEmbedding(nn.Module):
    """
    Factors of the rotary embedding for given positions: t -> t * cos + t[partner] * sin.

    `"half"` rotates the pairs (j, j + head_dim / 2), arXiv:2104.09864. `"published"` is what the SPADE code computes:
    factors of neighbouring pairs with partners that are not their neighbours, which is no rotation.
    """

    def __init__(self, config: SpadeConfig):
        super().__init__()
        self.config = config
        half = config.head_dim // 2
        self.is_published = config.rope_pairing == "published"
        if self.is_published:
            self.partner = [*range(1, config.head_dim, 2), *range(0, config.head_dim, 2)]
        else:
            self.partner = [*range(half, config.head_dim), *range(half)]

    def forward(self, position_ids: torch.LongTensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns cos and sin, each (batch or 1, 1, length, head_dim)."""
        head_dim = self.config.head_dim
        exponents = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=torch.float32) / head_dim
        angles = position_ids.float().unsqueeze(-1) * self.config.rope_theta**-exponents
        if self.is_published:
            angles = angles.repeat_interleave(2, dim=-1)
        else:
            angles = torch.cat([angles, angles], dim=-1)
        sign = torch.ones(head_dim, device=position_ids.device)
        sign[: head_dim // 2] = -1
        return angles.cos().to(dtype).unsqueeze(1), (angles.sin() * sign).to(dtype).unsqueeze(1)


def apply_rotary(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, partner: list[int]) -> torch.Tensor:
    return states * cos + states[..., partner] * sin


def eager_shared_key_attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args, **kwargs
) -> tuple[torch.Tensor, torch.Tensor]:
    """`eager_attention_forward` of heads that share keys and values."""
    groups = module.num_key_value_groups
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    return eager_attention_forward(module, query, key, value, *args, **kwargs)


class SpadeAttention(nn.Module):
    """Causal attention whose heads share keys and values (arXiv:1911.02150)."""

    is_causal = True

    def __init__(self, config: SpadeConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        key_value_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_value_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_value_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor, list[int]],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        row_lengths: list[int] | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """With `row_lengths`, `hidden_states` (1, sum of lengths, size) are rows behind each other, each for itself."""
        input_shape = hidden_states.shape[:-1]
        query, key, value = (
            projection(hidden_states).view(*input_shape, -1, self.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = apply_rotary(query, *rotary), apply_rotary(key, *rotary)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_shared_key_attention
        )
        attend = partial(
            attention_interface,
            self,
            attention_mask=attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.head_dim**-0.5,
            **kwargs,
        )
        if row_lengths is None:
            output, weights = attend(query, key, value)
        else:
            rows = zip(*(states.split(row_lengths, dim=2) for states in (query, key, value)))
            output, weights = torch.cat([attend(*row)[0] for row in rows], dim=1), None
        return self.o_proj(output.reshape(*input_shape, -1)), weights


class SpadeMLP(nn.Module):
    """SwiGLU, arXiv:2002.05202."""

    def __init__(self, config: SpadeConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class SpadeLayer(GradientCheckpointingLayer):
    """One pre-norm block."""

    def __init__(self, config: SpadeConfig, layer_idx: int):
        super().__init__()
        self.parallel_residual = config.parallel_residual
        self.self_attn = SpadeAttention(config, layer_idx)
        self.mlp = SpadeMLP(config)
        self.attention_norm = make_norm(config)
        self.mlp_norm = make_norm(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, hidden_states: torch.Tensor, rotary, **kwargs) -> torch.Tensor:
        normed = self.attention_norm(hidden_states)
        attention_output, _ = self.self_attn(normed, rotary, **kwargs)
        if self.parallel_residual:
            return hidden_states + self.dropout(attention_output + self.mlp(normed))
        hidden_states = hidden_states + self.dropout(attention_output)
        return hidden_states + self.dropout(self.mlp(self.mlp_norm(hidden_states)))


class SpadeEnergyHead(nn.Module):
    """Hidden state to a mixture of Gaussians of the next (transformed) energy."""

    def __init__(self, config: SpadeConfig):
        super().__init__()
        self.config = config
        size = config.energy_head_size
        self.fc1 = nn.Linear(config.hidden_size, size)
        self.fc2 = nn.Linear(size, size)
        self.logits = nn.Linear(size, config.mixture_components)
        self.means = nn.Linear(size, config.mixture_components)
        self.log_scales = nn.Linear(size, config.mixture_components)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(..., hidden_size) to logits, means and log scales, each (..., mixture_components)."""
        hidden_states = torch.relu(self.fc2(torch.relu(self.fc1(hidden_states))))
        log_scales = self.log_scales(hidden_states).clamp(self.config.log_scale_min, self.config.log_scale_max)
        return self.logits(hidden_states), self.means(hidden_states), log_scales


def mixture_scales(log_scales: torch.Tensor) -> torch.Tensor:
    """Standard deviations of the Gaussians."""
    return nn.functional.softplus(log_scales) + 1e-4


def mixture_nll(mixture: tuple[torch.Tensor, ...], targets: torch.Tensor) -> torch.Tensor:
    """Negative log likelihood, (...), of `targets` (...) under the mixture of [`SpadeEnergyHead`], float32."""
    logits, means, log_scales = (values.float() for values in mixture)
    scales = mixture_scales(log_scales)
    pulls = (targets.float().unsqueeze(-1) - means) / scales
    log_densities = -0.5 * pulls.square() - scales.log() - 0.5 * math.log(2 * math.pi)
    return -torch.logsumexp(logits.log_softmax(dim=-1) + log_densities, dim=-1)


class SpadeStopHead(nn.Module):
    """
    Is the shower complete after this hit? Sees the hit, the incident energy and the number of the hit, not the decoder.
    """

    def __init__(self, config: SpadeConfig):
        super().__init__()
        self.config = config
        size = config.stop_embedding_size
        # order of the published network: z, x, y
        self.axes = (2, 0, 1)
        self.tokens = nn.ModuleList(nn.Embedding(bins + 2, size, padding_idx=0) for bins in config.nbins)
        self.hit_energy = nn.Linear(1, size)
        self.incident_energy = nn.Linear(1, size)
        self.position = nn.Linear(1, size) if config.stop_use_position else None
        self.counter = nn.Linear(1, size) if config.stop_use_counter else None
        width = size * (5 + config.stop_use_position + config.stop_use_counter)
        layers = []
        for _ in range(config.stop_num_layers):
            layers += [nn.Linear(width, config.stop_hidden_size), nn.SiLU(), nn.Dropout(config.stop_dropout)]
            width = config.stop_hidden_size
        self.classifier = nn.Sequential(*layers, nn.Linear(width, 1))

    def forward(
        self,
        cells: torch.LongTensor,
        hit_energy: torch.FloatTensor,
        incident_energy: torch.FloatTensor,
        hit_index: torch.Tensor,
    ) -> torch.FloatTensor:
        """
        Args:
            cells (`(..., 3)`): ids of x, y and z of the hit (cell + 1).
            hit_energy (`(...)`): transformed. incident_energy (`(...)`): GeV. hit_index (`(...)`): from 0.

        Returns:
            Logits, (...).
        """
        config = self.config
        dtype = self.hit_energy.weight.dtype
        counter = hit_index.to(dtype)
        features = [self.tokens[axis](cells[..., axis]) for axis in self.axes]
        features.append(self.hit_energy(hit_energy.to(dtype).unsqueeze(-1)))
        features.append(self.incident_energy((incident_energy * config.stop_energy_scale).to(dtype).unsqueeze(-1)))
        if self.position is not None:
            features.append(self.position((counter / (config.max_num_hits - 1)).unsqueeze(-1)))
        if self.counter is not None:
            features.append(self.counter((counter * config.stop_counter_scale).unsqueeze(-1)))
        return self.classifier(torch.cat(features, dim=-1)).squeeze(-1)

    def loss(self, logits: torch.Tensor, num_hits: torch.LongTensor, divisor: torch.Tensor | None = None):
        """
        Weighted binary cross entropy: 1 at the last hit of every shower, 0 before, averaged over all hits.

        Args:
            logits (`(batch, hits)`), num_hits (`(batch,)`). divisor: instead of the number of hits.
        """
        index = torch.arange(logits.shape[1], device=logits.device)
        is_hit = index < num_hits.unsqueeze(-1)
        targets = (index == num_hits.unsqueeze(-1) - 1).float()
        positives = (targets * is_hit).sum()
        pos_weight = torch.as_tensor(float(self.config.stop_pos_weight), device=logits.device)
        if self.config.stop_pos_weight == 0:
            pos_weight = (is_hit.sum() - positives) / positives.clamp(min=1)
        losses = nn.functional.binary_cross_entropy_with_logits(
            logits.float(), targets, reduction="none", pos_weight=pos_weight
        )
        return (losses * is_hit).sum() / (is_hit.sum().clamp(min=1) if divisor is None else divisor)


class SpadePreTrainedModel(PreTrainedModel):
    config: SpadeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SpadeLayer", "SpadeEmbeddings"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": SpadeLayer, "attentions": SpadeAttention}

    def save_pretrained(self, save_directory, **kwargs):
        """As `PreTrainedModel.save_pretrained`; the folder opens with every Auto class, not only that of this model."""
        module = __name__.split(".")[-1]
        self.config.auto_map = {auto_class: f"{module}.{name}" for auto_class, name in AUTO_CLASSES.items()}
        super().save_pretrained(save_directory, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """Initialisation of the published model: PyTorch's own, embeddings and registers from N(0, 1)."""
        std = self.config.embedding_initializer_range
        if isinstance(module, nn.Linear):
            bound = 1 / math.sqrt(module.in_features)
            init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=std)
            if module.padding_idx is not None:
                init.zeros_(module.weight[module.padding_idx])
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, SpadeRMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, SpadeEmbeddings):
            init.normal_(module.registers, mean=0.0, std=std)


class SpadeModel(SpadePreTrainedModel):
    """The bare decoder: delayed streams of a shower to hidden states."""

    def __init__(self, config: SpadeConfig):
        super().__init__(config)
        self.embeddings = SpadeEmbeddings(config)
        self.layers = nn.ModuleList(SpadeLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers))
        self.norm = make_norm(config)
        self.rotary = SpadeRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings.tokens[0]

    def set_input_embeddings(self, value: nn.Embedding):
        self.embeddings.tokens[0] = value

    def resize_token_embeddings(self, *args, **kwargs):
        raise NotImplementedError("the vocabularies are fixed: they are the cells of the grid, `nbins`")

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor,
        hit_energy: torch.FloatTensor | None = None,
        incident_energy: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> SpadeModelOutput:
        r"""
        Args:
            input_ids (`(batch, length, streams)`): register slots, BOS, delayed ids of x, y and z (or of the cell),
                padding.
            hit_energy (`(batch, length)`): transformed energies at their delayed positions, 0 elsewhere.
            incident_energy (`(batch,)`): GeV.
            attention_mask (`(batch, length)`): 1 for real positions, slots included. Left padding needs
                `position_ids` (as `generate` provides them).
            position_ids (`(batch, length)`): positions counted from the first slot.
        """
        self._check_inputs(input_ids, hit_energy, incident_energy)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(input_ids.shape[1], device=input_ids.device) + past_length).unsqueeze(0)

        hidden_states = self.embeddings(input_ids, position_ids, hit_energy, incident_energy)
        row_lengths = is_real = None
        can_look = self.training and attention_mask is not None and not torch.compiler.is_compiling()
        if can_look and bool((attention_mask[:, 1:] <= attention_mask[:, :-1]).all()):
            # behind right padding nothing is trained: the causal mask alone is enough, and half the work
            if past_key_values is None and self._packs_rows(attention_mask, **kwargs):
                is_real = attention_mask.bool()
                row_lengths = is_real.sum(dim=-1).tolist()
                position_ids = position_ids.expand(is_real.shape)[is_real].unsqueeze(0)
                hidden_states = hidden_states[is_real].unsqueeze(0)
            attention_mask = None
        attention_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden_states,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
        )
        rotary = (*self.rotary(position_ids, hidden_states.dtype), self.rotary.partner)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                rotary,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                row_lengths=row_lengths,
                **kwargs,
            )
        hidden_states = self.norm(hidden_states)
        if row_lengths is not None:
            padded = hidden_states.new_zeros(*is_real.shape, hidden_states.shape[-1])
            hidden_states = padded.index_put((is_real,), hidden_states.squeeze(0))
        return SpadeModelOutput(last_hidden_state=hidden_states, past_key_values=past_key_values)

    def _packs_rows(self, attention_mask: torch.Tensor, **kwargs) -> bool:
        """
        Whether training puts the rows behind each other and leaves their padding out: showers differ in length by a
        factor of ten. Attention then takes row by row, which costs nothing on a CPU.
        """
        flags = ("output_hidden_states", "output_attentions")
        return (
            attention_mask.device.type == "cpu"
            and self.config._attn_implementation == "sdpa"
            and bool(attention_mask[:, 0].all())
            and not any(kwargs.get(flag, getattr(self.config, flag, False)) for flag in flags)
        )

    def _check_inputs(self, input_ids, hit_energy, incident_energy):
        if input_ids.ndim != 3 or input_ids.shape[-1] != self.config.num_streams:
            raise ValueError(
                f"`input_ids` has shape {tuple(input_ids.shape)}, expected (batch, length, {self.config.num_streams})"
            )
        batch_size, length = input_ids.shape[:2]
        for name, values, shape, meaning in (
            ("hit_energy", hit_energy, (batch_size, length), "transformed energies"),
            ("incident_energy", incident_energy, (batch_size,), "GeV"),
        ):
            if values is None:
                raise ValueError(f"`{name}` is missing: expected {shape}, {meaning}")
            if not isinstance(values, torch.Tensor):
                raise ValueError(f"`{name}` is a {type(values).__name__}, expected a tensor {shape}, {meaning}")
            if tuple(values.shape) != shape:
                raise ValueError(f"`{name}` has shape {tuple(values.shape)}, expected {shape}, {meaning}")


class SpadeForCausalLM(SpadePreTrainedModel, MultiStreamGenerationMixin):
    """
    Shower generator. `generate(incident_energy=[10.0, 50.0])` (GeV) draws one shower per incident energy and returns
    `sequences`, `continuous["hit_energy"]` and `num_hits`; `SpadeTokenizer.batch_decode` turns them into hits.

    Settings of `generate` of its own (kept in `generation_config`):

    * `energy_temperature`: divides the logits of the energy's mixture;
    * `stop_min_hits`: the stop network is asked from this hit index on;
    * `stop_sampling`: draw whether the shower ends, with the network's probability after the weight of the positives in
      training is taken out of it (when sampling), instead of comparing its output with `stop_threshold`;
    * `stop_votes`: so many hits in a row must say that it ends;
    * `stop_published`: stop as the published code does: it asks one position later, gives the number of the position
      for that of the hit, and keeps all hits that have been begun by then;
    * `trim_sequences`: take hits that were begun but do not belong to the shower out of the returned sequences.
    """

    continuous_streams = ("hit_energy",)
    stopping_inputs = ("hit_energy", "incident_energy")

    def __init__(self, config: SpadeConfig):
        super().__init__(config)
        self.model = SpadeModel(config)
        self.token_heads = nn.ModuleList(nn.Linear(config.hidden_size, vocab) for vocab in config.stream_vocab_sizes)
        self.energy_head = SpadeEnergyHead(config)
        self.stop_head = SpadeStopHead(config) if config.use_stop_head else None
        # a name that transformers does not know, so that Trainer counts all targets and not all but the last stream
        self.loss_type = "multi_stream"
        self.post_init()
        self.generation_config._from_model_config = False
        self.generation_config.update(
            do_sample=True,
            top_k=0,
            temperature=1.0,
            top_p=1.0,
            max_new_tokens=config.max_num_hits + config.max_stream_delay,
            return_dict_in_generate=True,
        )
        for name, value in GENERATION_DEFAULTS.items():
            setattr(self.generation_config, name, value)

    def get_output_embeddings(self) -> nn.Linear:
        return self.token_heads[0]

    def set_output_embeddings(self, value: nn.Linear):
        self.token_heads[0] = value

    def resize_token_embeddings(self, *args, **kwargs):
        return self.model.resize_token_embeddings(*args, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor,
        hit_energy: torch.FloatTensor | None = None,
        incident_energy: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> SpadeCausalLMOutput:
        r"""
        Args:
            labels (`(batch, length, streams)`): target ids at their own position (shifted here), -100 where there is
                none. The energies and the stop targets come from the inputs themselves. Batches with labels must not be
                padded on the left.
            logits_to_keep: predictions of the last so many positions only (0: all).
            num_items_in_batch: number of targets of all streams in the whole batch, for gradient accumulation.

        The other arguments are those of [`SpadeModel`].
        """
        outputs: SpadeModelOutput = self.model(
            input_ids,
            hit_energy=hit_energy,
            incident_energy=incident_energy,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            # whatever `config.return_dict` says, which concerns the caller
            return_dict=True,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        logits = energy_mixture = None
        if not (self.training and labels is not None):
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits, energy_mixture = self._predict(hidden_states[:, keep], input_ids[:, keep])

        loss = stream_losses = energy_loss = stop_loss = None
        if labels is not None:
            if labels.shape != input_ids.shape:
                raise ValueError(
                    f"`labels` has shape {tuple(labels.shape)}, expected that of `input_ids`, {tuple(input_ids.shape)}"
                )
            if attention_mask is None:
                attention_mask = torch.ones_like(input_ids[..., 0])
            elif not torch.compiler.is_compiling() and not attention_mask[:, 0].all():
                raise ValueError("`attention_mask` begins with padding: batches with `labels` are padded on the right")
            divisor = None if num_items_in_batch is None else num_items_in_batch / self.config.num_streams
            token_mask, energy_mask = self.loss_masks(input_ids, attention_mask)
            stream_losses = self._stream_losses(hidden_states, input_ids, labels, token_mask, divisor)
            energy_loss = self._energy_loss(hidden_states, hit_energy, energy_mask, divisor)
            loss = sum(stream_losses) + self.config.energy_loss_weight * energy_loss
            if self.stop_head is not None:
                cells, energies, num_hits = self.undelay(input_ids, hit_energy, attention_mask)
                hit_index = torch.arange(cells.shape[1], device=cells.device).expand(cells.shape[:2])
                stop_logits = self.stop_head(
                    cells, energies, incident_energy.unsqueeze(-1).expand(cells.shape[:2]), hit_index
                )
                stop_loss = self.stop_head.loss(stop_logits, num_hits, divisor)
                loss = loss + self.config.stop_loss_weight * stop_loss
        return SpadeCausalLMOutput(
            loss=loss,
            logits=logits,
            energy_mixture=energy_mixture,
            stream_losses=stream_losses,
            energy_loss=energy_loss,
            stop_loss=stop_loss,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _predict(self, hidden_states: torch.Tensor, input_ids: torch.LongTensor):
        """Logits of every stream and the mixture of the next energy."""
        logits = tuple(head(hidden_states) for head in self.token_heads)
        return self._mask_layers(logits, input_ids), self.energy_head(hidden_states)

    def _mask_layers(self, logits: tuple[torch.Tensor, ...], input_ids: torch.LongTensor) -> tuple[torch.Tensor, ...]:
        if not self.config.layer_monotonic:
            return logits
        return tuple(
            mask_earlier_layers(values, input_ids[..., stream], self.config, stream)
            for stream, values in enumerate(logits)
        )

    def loss_masks(
        self, input_ids: torch.LongTensor, attention_mask: torch.Tensor
    ) -> tuple[torch.BoolTensor, torch.BoolTensor]:
        """
        Where there are targets: (batch, length, streams) for the ids, (batch, length) for the energies.
        """
        config = self.config
        valid = attention_mask.bool()
        position = torch.arange(input_ids.shape[1], device=input_ids.device) - config.num_registers
        ordinary = input_ids != torch.tensor(config.stream_missing_token_ids, device=input_ids.device)
        token_mask = ordinary & (input_ids != 0) & (position > 0).unsqueeze(-1) & valid.unsqueeze(-1)
        if config.loss_over_prefix and config.axis_mode == "combined":
            token_mask = ((position > 0) & valid).unsqueeze(-1)
        first_energy = 1 if config.loss_over_prefix else 1 + config.energy_delay
        return token_mask, (position >= first_energy) & valid

    def undelay(
        self, input_ids: torch.LongTensor, hit_energy: torch.Tensor, attention_mask: torch.Tensor
    ) -> tuple[torch.LongTensor, torch.Tensor, torch.LongTensor]:
        """The hits themselves: ids of x, y and z (batch, hits, 3), energies (batch, hits), number of hits (batch,)."""
        config = self.config
        begin = config.num_registers + 1
        # a batch shorter than the delays has no complete hit
        width = max(input_ids.shape[1] - begin - config.max_stream_delay, 0)
        cells = torch.stack(
            [input_ids[:, begin + delay :][:, :width, k] for k, delay in enumerate(config.stream_delays)], dim=-1
        )
        if config.axis_mode == "combined":
            cells = self.split_cells(cells[..., 0])
        # behind the last hit there are MISSING ids, which the stop network knows
        energies = hit_energy[:, begin + config.energy_delay :][:, :width]
        num_hits = attention_mask.sum(dim=-1) - begin - config.max_stream_delay
        return cells, energies, num_hits.clamp(min=0)

    def split_cells(self, ids: torch.LongTensor) -> torch.LongTensor:
        """Ids of the combined vocabulary, (...), to ids of x, y and z, (..., 3); pad and MISSING to pad."""
        nx, ny, nz = self.config.nbins
        cell = ids - 1
        is_cell = (cell >= 0) & (cell < nx * ny * nz)
        axes = torch.stack([cell % nx, cell // nx % ny, cell // (nx * ny)], dim=-1) + 1
        return torch.where(is_cell.unsqueeze(-1), axes, 0)

    def _stream_losses(self, hidden_states, input_ids, labels, mask, divisor) -> tuple[torch.Tensor, ...]:
        """Mean cross entropy of each stream over its targets."""
        if self.config.loss_over_prefix and self.config.axis_mode == "combined":
            # the MISSING that the published baseline trains is no target of anyone else
            labels = torch.where(mask & (labels == -100), input_ids, labels)
        labels = labels.masked_fill(~mask, -100)
        losses = ()
        for stream, head in enumerate(self.token_heads):
            targets = labels[:, 1:, stream]
            if self.config.layer_monotonic:
                logits = mask_earlier_layers(
                    head(hidden_states[:, :-1]), input_ids[:, :-1, stream], self.config, stream
                )
                total = nn.functional.cross_entropy(
                    logits.flatten(0, 1).float(), targets.flatten(), reduction="sum", ignore_index=-100
                )
            else:
                total = chunked_linear_cross_entropy(
                    hidden_states[:, :-1].flatten(0, 1), head.weight, head.bias, targets.flatten()
                )
            losses += (total / ((targets != -100).sum().clamp(min=1) if divisor is None else divisor),)
        return losses

    def _energy_loss(self, hidden_states, hit_energy, mask, divisor) -> torch.Tensor:
        mask = mask[:, 1:]
        losses = mixture_nll(self.energy_head(hidden_states[:, :-1][mask]), hit_energy[:, 1:][mask])
        return losses.sum() / (mask.sum().clamp(min=1) if divisor is None else divisor)

    # Generation

    def generate(self, inputs: torch.Tensor | None = None, *args, incident_energy=None, num_hits=None, **kwargs):
        """
        The stock `generate()`.

        Args:
            incident_energy: GeV; a number, a sequence or a tensor (batch,).
            num_hits: exact number of hits of every shower; a number, a sequence or a tensor (batch,).
        """
        if incident_energy is None:
            raise ValueError("`incident_energy` is missing: expected the energy of every shower in GeV, (batch,)")
        incident_energy = torch.as_tensor(incident_energy, dtype=torch.float32, device=self.device).reshape(-1)
        if len(incident_energy) == 0:
            raise ValueError("`incident_energy` is empty: expected the energy of every shower in GeV, (batch,)")
        wrong = ~(torch.isfinite(incident_energy) & (incident_energy > 0))
        if wrong.any():
            row = int(wrong.nonzero()[0, 0])
            raise ValueError(f"`incident_energy`: row {row} is {incident_energy[row].item()}, expected GeV, above 0")
        if num_hits is not None:
            num_hits = torch.as_tensor(num_hits, device=self.device).reshape(-1)
            if len(num_hits) not in (1, len(incident_energy)):
                raise ValueError(f"`num_hits` has {len(num_hits)} entries, expected 1 or {len(incident_energy)}")
            num_hits = num_hits.expand(len(incident_energy))
            is_integer = not num_hits.is_floating_point() and num_hits.dtype != torch.bool
            if not is_integer or (num_hits < 1).any() or (num_hits > self.config.max_num_hits).any():
                raise ValueError(
                    f"`num_hits` is {num_hits.tolist()}, expected integers from 1 to {self.config.max_num_hits}"
                )
            kwargs["num_hits"] = num_hits
        return super().generate(inputs, *args, incident_energy=incident_energy, **kwargs)

    def _maybe_initialize_input_ids_for_generation(self, inputs, bos_token_id, model_kwargs):
        input_ids = super()._maybe_initialize_input_ids_for_generation(inputs, bos_token_id, model_kwargs)
        if model_kwargs.get("hit_energy") is None:
            if inputs is not None and inputs.shape[1] > self.config.num_registers + 1:
                raise ValueError("`hit_energy` is missing: a prompt with hits needs their energies, (batch, length)")
            model_kwargs["hit_energy"] = torch.zeros(input_ids.shape[:2], device=self.device)
        return input_ids

    def prepare_inputs_for_generation(self, input_ids, next_sequence_length=None, num_hits=None, **kwargs) -> dict:
        if next_sequence_length is not None and kwargs.get("hit_energy") is not None:
            kwargs["hit_energy"] = kwargs["hit_energy"][:, -next_sequence_length:]
        return super().prepare_inputs_for_generation(input_ids, next_sequence_length=next_sequence_length, **kwargs)

    def _get_logits_processor(self, generation_config, logits_processor=None, **kwargs):
        special = [
            StreamLogitsProcessor(stream, ForbiddenTokensLogitsProcessor([0, missing]))
            for stream, missing in enumerate(self.config.stream_missing_token_ids)
        ]
        return super()._get_logits_processor(
            generation_config, logits_processor=[*special, *(logits_processor or [])], **kwargs
        )

    def _get_stopping_criteria(self, generation_config, stopping_criteria=None, **kwargs):
        criteria = super()._get_stopping_criteria(generation_config, stopping_criteria, **kwargs)
        if self.stop_head is not None:
            criteria.append(PhysicsStopCriteria(self, generation_config))
        is_published = setting(generation_config, "stop_published")
        criteria.append(LastHitCriteria(3 if is_published else self.config.max_stream_delay))
        return criteria

    def _choose_next(self, input_ids, step_scores, logits_processor, outputs, generation_config, state):
        next_tokens, next_values = super()._choose_next(
            input_ids, step_scores, logits_processor, outputs, generation_config, state
        )
        # (batch, length, components), or (batch, components) of a decoder
        mixture = tuple(values[:, -1] if values.ndim == 3 else values for values in outputs.energy_mixture)
        energy = self._choose_energy(tuple(values.float() for values in mixture), generation_config)
        length = input_ids.shape[1]
        if length < state.first_full_length:
            energy = torch.where(state.first_hit(length) < self.config.energy_delay, 0.0, energy)
        next_values["hit_energy"] = energy
        return next_tokens, next_values

    def _choose_energy(self, mixture: tuple[torch.Tensor, ...], generation_config) -> torch.Tensor:
        """Next energies, (batch,): a draw, or in greedy search the mean of the most probable Gaussian."""
        logits, means, log_scales = mixture
        if generation_config.do_sample:
            temperature = setting(generation_config, "energy_temperature")
            if not temperature > 0:
                raise ValueError(f"`energy_temperature` is {temperature}, expected a number above 0")
            logits = logits if temperature == 1 else logits / temperature
            probabilities = logits.softmax(dim=-1)
            # `torch.multinomial` and `torch.normal` without their checks: of exponential waiting times, each divided
            # by its probability, the first
            component = (probabilities / torch.empty_like(probabilities).exponential_()).argmax(dim=-1, keepdim=True)
            means, log_scales = means.gather(-1, component), log_scales.gather(-1, component)
            energy = torch.addcmul(means, mixture_scales(log_scales), torch.randn_like(means))
        else:
            energy = means.gather(-1, logits.argmax(dim=-1, keepdim=True))
        return energy.squeeze(-1).clamp(self.config.energy_min, self.config.energy_max)

    def make_decoder(self, past_key_values: Cache, incident_energy: torch.Tensor, **kwargs) -> "SpadeDecoder":
        return SpadeDecoder(self, past_key_values, incident_energy)

    def _finish_sequences(self, sequences, continuous, generation_config, state):
        length = sequences.shape[1]
        end = state.end
        if setting(generation_config, "stop_published"):
            # of the hits that were begun when the shower stopped, the published code keeps all but the last
            end = end - state.is_stopped.long()
        num_hits = torch.minimum(state.num_hits(length), end)
        if not setting(generation_config, "trim_sequences"):
            return sequences, continuous, num_hits
        # behind the last hit as the tokenizer writes it: MISSING as long as another stream goes on, then padding
        hit = torch.arange(length, device=sequences.device) - state.pads[:, None] - self.config.num_registers - 1
        behind = hit - self.config.max_stream_delay >= end[:, None]
        no_hit = hit.unsqueeze(-1) - state.delays >= end[:, None, None]
        sequences = torch.where(no_hit, state.end_ids, sequences)
        sequences = torch.where(behind.unsqueeze(-1), torch.zeros_like(sequences), sequences)
        no_energy = hit - self.config.energy_delay >= end[:, None]
        continuous["hit_energy"] = continuous["hit_energy"].masked_fill(no_energy, 0.0)
        return sequences, continuous, num_hits


def setting(generation_config, name: str):
    """A setting of our own, which a `GenerationConfig` made by hand need not have."""
    return getattr(generation_config, name, GENERATION_DEFAULTS[name])


class LastHitCriteria(StoppingCriteria):
    """
    A row is finished when all streams have reached the last hit.

    Args:
        max_delay (`int`): delay of the slowest stream.
    """

    def __init__(self, max_delay: int):
        self.max_delay = max_delay

    def __call__(self, input_ids: torch.LongTensor, scores, state=None, **kwargs) -> torch.BoolTensor:
        return state.first_hit(input_ids.shape[1] - 1) >= state.end + (self.max_delay - 1)


class PhysicsStopCriteria(StoppingCriteria):
    """
    Asks the stop network of a SPADE model about every hit that has become complete, and writes the end of the shower
    into `state.end`; it finishes no row itself, because streams that are behind still have to reach the last hit.
    """

    def __init__(self, model: SpadeForCausalLM, generation_config):
        self.model = model
        # without a fixed weight of the positives there is no probability to draw with
        can_draw = generation_config.do_sample and model.config.stop_pos_weight > 0
        self.draws = can_draw and setting(generation_config, "stop_sampling")
        self.threshold = setting(generation_config, "stop_threshold")
        self.min_hits = setting(generation_config, "stop_min_hits")
        self.votes = setting(generation_config, "stop_votes")
        self.is_published = setting(generation_config, "stop_published")

    def __call__(
        self, input_ids: torch.LongTensor, scores, state=None, hit_energy=None, incident_energy=None, **kwargs
    ) -> torch.BoolTensor | None:
        if state.has_given_ends:
            return None
        config = self.model.config
        undecided = state.end == NEVER
        length = input_ids.shape[1]
        hit = state.first_hit(length - 1) - (config.energy_delay + int(self.is_published))
        may_stop = undecided & (hit >= max(self.min_hits, 0))
        if bool(may_stop.any()):
            # positions of the streams of that hit
            begin = (state.pads + config.num_registers + 1 + hit).clamp(min=0).unsqueeze(-1)
            cells = input_ids.gather(1, (begin + state.delays).unsqueeze(1)).squeeze(1)
            cells = self.model.split_cells(cells[:, 0]) if config.axis_mode == "combined" else cells
            energy = hit_energy.gather(1, begin + config.energy_delay).squeeze(-1)
            index = hit + config.energy_delay + 1 if self.is_published else hit
            logits = self.model.stop_head(cells, energy, incident_energy, index).float()
            says_stop = may_stop & self.decide(logits)
            state.votes = torch.where(says_stop, state.votes + 1, 0)
            stops = says_stop & (state.votes >= self.votes)
            # published: of what has been begun, one more hit than is kept
            state.end = torch.where(stops, hit + (config.energy_delay + 3 if self.is_published else 1), state.end)
            state.is_stopped = state.is_stopped | stops
        return torch.zeros_like(undecided)

    def decide(self, logits: torch.Tensor) -> torch.BoolTensor:
        if not self.draws:
            return logits.sigmoid() >= self.threshold
        # the weight of the positives in training shifts the logits by its logarithm
        return torch.rand_like(logits) < (logits - math.log(self.model.config.stop_pos_weight)).sigmoid()


class OccupiedCellLogitsProcessor(JointLogitsProcessor):
    """
    A cell of a shower is hit once: removes cells that are hit already.

    The axis that is drawn last is restricted to the free cells of its row, the others to where there are any.

    Args:
        config (`SpadeConfig`): of the model.
    """

    def __init__(self, config: SpadeConfig):
        if len(set(config.stream_delays)) < config.num_streams:
            raise ValueError(
                f"`stream_delays` is {list(config.stream_delays)}: axes that are drawn in one step cannot avoid a cell"
            )
        self.config = config
        # in the order in which the axes of a hit are drawn
        self.order = sorted(range(config.num_streams), key=lambda stream: config.stream_delays[stream])

    def __call__(self, input_ids: torch.LongTensor, scores: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        config = self.config
        begin = config.num_registers + 1
        position = input_ids.shape[1]
        scores = list(scores)
        for rank, stream in enumerate(self.order):
            # the hits in front of this one; the axes that are drawn later may still be open for the last of them,
            # but each will take a cell
            num_hits = position - begin - config.stream_delays[stream]
            if num_hits < 1:
                continue
            axes = self.order[: rank + 1]
            hits = {k: input_ids[:, begin + config.stream_delays[k] :, k][:, : num_hits + 1] for k in axes}
            same = torch.ones_like(hits[stream][:, :num_hits], dtype=torch.bool)
            for k in axes:
                past = hits[k][:, :num_hits]
                same = same & (past >= 1) & (past <= config.stream_num_cells[k])
                if k != stream:
                    # in the same place as this hit in the axes that are drawn already
                    same = same & (past == hits[k][:, num_hits:])
            count = torch.zeros_like(scores[stream])
            count.scatter_add_(1, hits[stream][:, :num_hits], same.to(count.dtype))
            cells = math.prod(config.stream_num_cells[later] for later in self.order[rank + 1 :])
            scores[stream] = scores[stream].masked_fill(count >= cells, -torch.inf)
        return tuple(scores)


def layer_monotonic_processor(config: SpadeConfig) -> StreamLogitsProcessor:
    """Processor for `generate()` with which a shower never goes back to an earlier layer."""
    nx, ny, nz = config.nbins
    if config.axis_mode == "split":
        return StreamLogitsProcessor(2, MonotonicLogitsProcessor(1, nz))
    return StreamLogitsProcessor(0, MonotonicLogitsProcessor(1, nx * ny * nz, group_size=nx * ny))


def mask_earlier_layers(
    logits: torch.Tensor, current: torch.LongTensor, config: SpadeConfig, stream: int
) -> torch.Tensor:
    """
    Logits of the next layer without the layers in front of the current one.

    Args:
        logits (`(..., vocab)`), current (`(...)`): ids of the same stream at the same positions.
    """
    if config.axis_mode == "split" and stream != 2:
        return logits
    cells_per_layer = 1 if config.axis_mode == "split" else config.nbins[0] * config.nbins[1]
    first = current - (current - 1) % cells_per_layer
    is_cell = (current >= 1) & (current <= config.stream_num_cells[stream])
    ids = torch.arange(logits.shape[-1], device=logits.device)
    # float16 ends before the published value
    lowest = max(-1e9, torch.finfo(logits.dtype).min)
    return logits.masked_fill(is_cell.unsqueeze(-1) & (ids < first.unsqueeze(-1)), lowest)


class SpadeDecoder:
    """
    `SpadeForCausalLM.forward` for one more position of an unpadded batch with a cache, written out.

    A step of this network is less work than the calls that make it up. So whatever depends on single ids or on the
    shower alone is computed once, projections that share an input are one, and masks and attention interfaces are left
    out. Lives for one call of `generate()`, so the merged weights never age.
    """

    def __init__(self, model: SpadeForCausalLM, past_key_values: Cache, incident_energy: torch.Tensor):
        self.model = model
        # a config is read once here, because that costs as much as a small operation
        config = model.config
        self.is_split = config.axis_mode == "split"
        self.is_layer_monotonic = config.layer_monotonic
        self.mixture_sizes = [config.mixture_components] * 3
        self.energy_limits = config.energy_min, config.energy_max
        self.log_scale_limits = config.log_scale_min, config.log_scale_max
        self.cache = past_key_values
        embeddings = model.model.embeddings
        widths = [token.embedding_dim for token in embeddings.tokens] + [config.feature_size, config.feature_size]
        *token_weights, energy_weight, incident_weight = embeddings.projection.weight.split(widths, dim=1)
        heads = [model.energy_head.fc1]
        if self.is_split:
            # few ids: their part of the projection once for all, the tables of all streams below each other
            tables = [
                nn.functional.linear(norm(token.weight), weight)
                for token, norm, weight in zip(embeddings.tokens, embeddings.norms, token_weights)
            ]
            self.table = torch.cat(tables)
            offsets = [0, *accumulate(config.stream_vocab_sizes)][:-1]
            self.offsets = torch.tensor(offsets, device=incident_energy.device)
            heads = [*model.token_heads, *heads]
        self.token_weight = token_weights[0].t()
        incident = embeddings.incident_energy(embeddings.scale_incident_energy(incident_energy))
        energy = embeddings.hit_energy
        self.energy_fc1 = energy.fc1.bias, energy.fc1.weight.t()
        self.energy_weight = (energy_weight @ energy.fc2.weight).t()
        self.constant = (
            nn.functional.linear(incident, incident_weight)
            + embeddings.projection.bias
            + nn.functional.linear(energy.fc2.bias, energy_weight)
        )
        self.layers = [
            SpadeDecoderLayer(layer, past_key_values.layers[index], config.hidden_act)
            for index, layer in enumerate(model.model.layers)
        ]
        self.final_norm = norm_function(model.model.norm)
        self.head_sizes = [head.out_features for head in heads]
        self.heads = merge_linears(heads)
        self.energy_head = model.energy_head.fc2.bias, model.energy_head.fc2.weight.t()
        self.mixture = merge_linears([model.energy_head.logits, model.energy_head.means, model.energy_head.log_scales])
        self.partner = torch.tensor(model.model.rotary.partner, device=incident_energy.device)
        self.rotary_table = (torch.empty(0), torch.empty(0))

    def rotary(self, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of one position, each (head_dim,)."""
        if position >= len(self.rotary_table[0]):
            positions = torch.arange(2 * position + 64, device=self.constant.device)
            tables = self.model.model.rotary(positions.unsqueeze(0), self.constant.dtype)
            self.rotary_table = tuple(table[0, 0] for table in tables)
        return self.rotary_table[0][position], self.rotary_table[1][position]

    def __call__(self, input_ids: torch.LongTensor, hit_energy: torch.Tensor, **kwargs) -> SimpleNamespace:
        """Takes the last ids of every row, (batch, 1, streams), and all energies, (batch, length)."""
        hidden_states = self.embed(input_ids[:, 0], hit_energy[:, -1:])
        cos, sin = self.rotary(self.cache.get_seq_length())
        for layer in self.layers:
            hidden_states = layer(hidden_states, cos, sin, self.partner)
        logits, energy_mixture = self.predict(self.final_norm(hidden_states), input_ids)
        # an output of the library takes as long to make as a small matrix product
        return SimpleNamespace(logits=logits, energy_mixture=energy_mixture)

    def embed(self, input_ids: torch.LongTensor, last_energy: torch.Tensor) -> torch.Tensor:
        """Ids (batch, streams) and energies (batch, 1) to (batch, hidden_size)."""
        last_energy = last_energy.to(self.constant.dtype).clamp(*self.energy_limits)
        bias, weight = self.energy_fc1
        features = nn.functional.silu(torch.addmm(bias, last_energy, weight))
        hidden_states = torch.addmm(self.constant, features, self.energy_weight)
        if self.is_split:
            return hidden_states + torch.embedding(self.table, input_ids + self.offsets).sum(dim=1)
        embedded = torch.embedding(self.model.model.embeddings.tokens[0].weight, input_ids[:, 0])
        return torch.addmm(hidden_states, embedded, self.token_weight)

    def predict(self, hidden_states: torch.Tensor, input_ids: torch.LongTensor):
        """As `SpadeForCausalLM._predict` for hidden states (batch, hidden_size)."""
        weight, bias = self.heads
        *logits, features = torch.addmm(bias, hidden_states, weight).split_with_sizes(self.head_sizes, dim=-1)
        if not self.is_split:
            logits = [self.model.token_heads[0](hidden_states)]
        fc2_bias, fc2_weight = self.energy_head
        features = torch.relu(torch.addmm(fc2_bias, torch.relu(features), fc2_weight))
        weight, bias = self.mixture
        mixture = torch.addmm(bias, features, weight)
        weights, means, log_scales = mixture.split_with_sizes(self.mixture_sizes, dim=-1)
        log_scales = log_scales.clamp(*self.log_scale_limits)
        if self.is_layer_monotonic:
            logits = self.model._mask_layers(tuple(logits), input_ids[:, 0])
        return tuple(logits), (weights, means, log_scales)


class SpadeDecoderLayer:
    """[`SpadeLayer`] of a [`SpadeDecoder`]."""

    def __init__(self, layer: SpadeLayer, cache_layer: GrowingLayer, hidden_act: str):
        self.cache = cache_layer
        attention, mlp = layer.self_attn, layer.mlp
        self.head_dim = attention.head_dim
        num_heads = attention.q_proj.out_features // self.head_dim
        self.num_keys = attention.k_proj.out_features // self.head_dim
        # (`split_with_sizes` is called as it is, `split` through Python)
        self.head_counts = [num_heads, self.num_keys]
        self.rotated_sizes = [num_heads + self.num_keys, self.num_keys]
        # the scale of the scores is in the queries
        query_weight = attention.q_proj.weight * self.head_dim**-0.5
        weights = [query_weight, attention.k_proj.weight, attention.v_proj.weight]
        self.qkv_weight = torch.cat(weights).t()
        self.out_weight = attention.o_proj.weight.t()
        self.gate_up_weight, self.gate_up_bias = merge_linears([mlp.gate_proj, mlp.up_proj])
        self.down_weight, self.down_bias = mlp.down_proj.weight.t(), mlp.down_proj.bias
        self.gate_up_sizes = [mlp.gate_proj.out_features, mlp.up_proj.out_features]
        # the call of a module costs more than this function
        self.activation = nn.functional.silu if hidden_act == "silu" else mlp.act_fn
        self.attention_norm = norm_function(layer.attention_norm)
        self.mlp_norm = None if layer.parallel_residual else norm_function(layer.mlp_norm)

    def __call__(
        self, hidden_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, partner: torch.LongTensor
    ) -> torch.Tensor:
        """(batch, hidden_size); cos and sin of the position, (head_dim,)."""
        normed = self.attention_norm(hidden_states)
        hidden_states = torch.addmm(hidden_states, self.attend(normed, cos, sin, partner), self.out_weight)
        if self.mlp_norm is not None:
            normed = self.mlp_norm(hidden_states)
        gate_up = torch.addmm(self.gate_up_bias, normed, self.gate_up_weight)
        gate, up = gate_up.split_with_sizes(self.gate_up_sizes, dim=-1)
        return torch.addmm(hidden_states + self.down_bias, self.activation(gate) * up, self.down_weight)

    def attend(self, normed: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, partner: torch.LongTensor):
        # query, key and value heads: (batch, heads + 2 * key heads, head_dim)
        states = torch.mm(normed, self.qkv_weight).view(len(normed), -1, self.head_dim)
        rotated, value = states.split_with_sizes(self.rotated_sizes, dim=1)
        rotated = torch.addcmul(rotated * cos, rotated.index_select(-1, partner), sin)
        query, key = rotated.split_with_sizes(self.head_counts, dim=1)
        keys, values = self.cache.update(key.unsqueeze(2), value.unsqueeze(2))
        # the heads that share a key are the rows of one product: nothing is repeated, and for so few rows two small
        # products are faster than the fused kernel
        query = query.reshape(len(normed) * self.num_keys, -1, self.head_dim)
        keys, values = keys.flatten(0, 1), values.flatten(0, 1)
        scores = torch.bmm(query, keys.transpose(1, 2))
        return torch.bmm(scores.softmax(dim=-1), values).view(normed.shape)


def norm_function(norm: nn.Module) -> Callable:
    """A layer norm as a function, which costs less than the call of a module; another norm as it is."""
    if not isinstance(norm, nn.LayerNorm):
        return norm
    arguments = (norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    return lambda states: torch.layer_norm(states, *arguments)


def merge_linears(layers: list[nn.Linear]) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight (in_features, sum of out_features) and bias of layers with the same input."""
    return torch.cat([layer.weight for layer in layers]).t(), torch.cat([layer.bias for layer in layers])


__all__ = ["SpadePreTrainedModel", "SpadeModel", "SpadeForCausalLM", "OccupiedCellLogitsProcessor"]

# `save_pretrained` then writes this code beside the weights, so that they load anywhere with `trust_remote_code=True`
SpadeConfig.register_for_auto_class()
for _auto_class, _model_class in AUTO_CLASSES.items():
    globals()[_model_class].register_for_auto_class(_auto_class)
