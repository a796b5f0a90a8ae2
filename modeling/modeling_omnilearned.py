"""
OmniLearned: the PET2 network for jets (arXiv:2510.24066) with its heads for classes of jets, flow matching, masked
particles (arXiv:2606.14870) and classes of particles.

Particles are a set: results do not depend on their order or on padding. Inside the network no padding is computed:
particles of all jets stand in one list where they are independent of each other, and in front of their row where they
attend. Time 0 of the flow is data, time 1 is noise.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput, can_return_tuple

from .configuration_omnilearned import OmniLearnedConfig
from .eager_attention import eager_attention_forward
from .flow_sampling import FlowMatchingGenerationMixin, FlowSample
from .set_inputs import (
    check_finite,
    check_floating,
    check_integers,
    check_labels,
    check_mask,
    check_shape,
    check_time,
)

# every class that a saved checkpoint can be opened with
AUTO_CLASSES = {
    "AutoModel": "OmniLearnedModel",
    "AutoModelForSequenceClassification": "OmniLearnedForSequenceClassification",
    "AutoModelForTokenClassification": "OmniLearnedForTokenClassification",
    "AutoModelForPreTraining": "OmniLearnedForPreTraining",
}
HIDDEN = -3e4  # score of padding: no weight in any precision, and no NaN where nothing else is
FAR_AWAY = 999.0  # published shift of padding before distances are computed
PAIRS_AT_ONCE = 8192  # pairs that go through the interaction network together: their hidden states fit into a cache
PAIRS_RECOMPUTED = 2**17  # with more pairs their hidden states are computed again in the backward pass
PARTICLES_AT_ONCE = 1024  # particles whose neighbours go through the local blocks together, without gradients
# jets of similar multiplicity go through the blocks together: at least so many on a CPU (elsewhere all), if the next is
# smaller than this share of the largest, and as many as keep the attention bias below this many numbers
JETS_AT_ONCE = 24
SIMILAR_WIDTH = 0.9
BIAS_AT_ONCE = 2**26


@dataclass
class OmniLearnedModelOutput(ModelOutput):
    """
    Args:
        last_hidden_state (`(batch, num_prefix + slots, hidden_size)`): tokens, time, condition, particles; 0 at padding
            and at the time of clean jets.
        visible (`(batch, num_prefix + slots)`): true where attention goes to.
        hidden_states: input of the first block and output of every block, on request.
    """

    last_hidden_state: torch.FloatTensor | None = None
    visible: torch.BoolTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class OmniLearnedGenerationOutput(ModelOutput):
    """
    Args:
        loss (scalar): flow matching; `None` for the vector field alone.
        velocity, target, noisy_particles, noise (`(batch, slots, num_features)`): prediction, noise - particles, input
            of the network, scaled noise.
        time (`(batch,)`): of every jet.
    """

    loss: torch.FloatTensor | None = None
    velocity: torch.FloatTensor | None = None
    target: torch.FloatTensor | None = None
    noisy_particles: torch.FloatTensor | None = None
    noise: torch.FloatTensor | None = None
    time: torch.FloatTensor | None = None


@dataclass
class OmniLearnedPreTrainingOutput(ModelOutput):
    """
    Args:
        loss (scalar): the weighted sum of the parts below.
        class_loss, event_loss (scalars): classes of jets; of events.
        perturbed_class_loss, perturbed_event_loss (scalars): the same from the noised jets.
        generation_loss, masked_loss, masked_type_loss, masked_input_loss, contrastive_loss (scalars): flow matching;
            features or codes of masked particles; their types; classes from the jets with masked particles; clean and
            noised states of a jet.
        logits, perturbed_logits, masked_input_logits (`(batch, num_labels)`): classes from the clean, noised and masked
            jet.
        velocity (`(batch, slots, num_features)`), time (`(batch,)`): of the flow.
        masked_predictions (`(batch, slots, num_features or codebook_size)`), masked_type_logits (`(batch, slots,
            num_particle_types)`): at all particles; `None` in training.
        masked_positions (`(batch, slots)`): true where a particle was masked.
    """

    loss: torch.FloatTensor | None = None
    class_loss: torch.FloatTensor | None = None
    event_loss: torch.FloatTensor | None = None
    perturbed_class_loss: torch.FloatTensor | None = None
    perturbed_event_loss: torch.FloatTensor | None = None
    generation_loss: torch.FloatTensor | None = None
    masked_loss: torch.FloatTensor | None = None
    masked_type_loss: torch.FloatTensor | None = None
    masked_input_loss: torch.FloatTensor | None = None
    contrastive_loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    perturbed_logits: torch.FloatTensor | None = None
    masked_input_logits: torch.FloatTensor | None = None
    velocity: torch.FloatTensor | None = None
    time: torch.FloatTensor | None = None
    masked_predictions: torch.FloatTensor | None = None
    masked_type_logits: torch.FloatTensor | None = None
    masked_positions: torch.BoolTensor | None = None


@dataclass
class OmniLearnedTokenClassifierOutput(ModelOutput):
    """
    Args:
        loss (scalar): of particles and jets.
        logits (`(batch, slots, num_particle_labels)`): classes of particles, or their values.
        jet_logits (`(batch, num_labels)`): classes of jets.
        particle_loss, jet_loss (scalars).
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    jet_logits: torch.FloatTensor | None = None
    particle_loss: torch.FloatTensor | None = None
    jet_loss: torch.FloatTensor | None = None


class PackedStates(NamedTuple):
    """
    States of jets whose particles stand in front of their rows.

    Args:
        states (`(batch, num_prefix + width, hidden_size)`): 0 where not visible.
        visible (`(batch, num_prefix + width)`): true where attention goes to.
        slots (`(batch, width)`): where the particles stand in the input.
        hidden_states: of every block, laid out as `states`; empty unless asked for.
    """

    states: torch.Tensor
    visible: torch.BoolTensor
    slots: torch.LongTensor
    hidden_states: tuple[torch.Tensor, ...] = ()


def pack_slots(is_real: torch.BoolTensor) -> tuple[torch.LongTensor, torch.BoolTensor]:
    """Slots of the particles (batch, width of the longest jet) in their order, and which of them are particles."""
    counts = is_real.sum(dim=1)
    width = max(1, int(counts.max())) if len(counts) else 1
    slots = (~is_real).to(torch.uint8).argsort(dim=1, stable=True)[:, :width]
    return slots, torch.arange(width, device=is_real.device) < counts.unsqueeze(1)


def take_slots(values: torch.Tensor | None, slots: torch.LongTensor) -> torch.Tensor | None:
    """`values` (batch, slots, ...) at the slots (batch, width)."""
    if values is None:
        return None
    return values[torch.arange(len(slots), device=slots.device).unsqueeze(1), slots]


def put_slots(values: torch.Tensor, slots: torch.LongTensor, num_slots: int) -> torch.Tensor:
    """Inverse of `take_slots`: (batch, width, ...) to (batch, num_slots, ...), 0 elsewhere."""
    output = values.new_zeros(len(values), num_slots, *values.shape[2:])
    output[torch.arange(len(slots), device=slots.device).unsqueeze(1), slots] = values
    return output


def pair_features(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """
    ln m², ln ΔR and ln kt, (..., 3), of pairs of massless particles (..., features), pT in GeV; 0 instead of ln 0.

    Δφ is a plain difference: both angles are relative to the axis of the jet. The cancellation in m² of nearly
    collinear pairs is as in the published network.
    """
    delta_eta, delta_phi = first[..., 0] - second[..., 0], first[..., 1] - second[..., 1]
    log_pt, other_log_pt = first[..., 2], second[..., 2]
    angles = torch.cosh(delta_eta) - torch.cos(delta_phi)
    log_mass = torch.where(angles > 0, 2 * angles, 1).log() + torch.where(angles > 0, log_pt + other_log_pt, 0)
    distance = delta_eta.square() + delta_phi.square()
    is_apart = distance > 0
    log_distance = 0.5 * torch.where(is_apart, distance, 1).log()
    log_kt = torch.where(is_apart, torch.minimum(log_pt, other_log_pt), 0) + log_distance
    return torch.stack([log_mass, log_distance, log_kt], dim=-1)


@torch.no_grad()
def nearest_neighbors(
    coordinates: torch.Tensor, is_real: torch.BoolTensor, num_neighbors: int, published: bool
) -> tuple[torch.LongTensor, torch.BoolTensor]:
    """
    The nearest particles of every particle, in increasing distance.

    Args:
        coordinates (`(batch, width, dimensions)`), is_real (`(batch, width)`).
        num_neighbors (`int`): at most width - 1 are returned.
        published (`bool`): take the nearest of the `num_neighbors` + 1 nearest for the particle itself.

    Returns neighbours (batch, width, neighbours) and which of them are real.
    """
    width = coordinates.shape[1]
    count = min(num_neighbors, width - 1)
    if published:
        coordinates = coordinates + FAR_AWAY * (~is_real).unsqueeze(-1)
        squares = coordinates.square().sum(dim=-1)
        distances = squares.unsqueeze(2) - 2 * coordinates @ coordinates.mT + squares.unsqueeze(1)
        neighbors = distances.topk(count + 1, dim=-1, largest=False).indices[..., 1:]
    else:
        distances = sum(
            (column.unsqueeze(2) - column.unsqueeze(1)).square() for column in coordinates.unbind(dim=-1)
        ).masked_fill(~is_real.unsqueeze(1), torch.inf)
        distances.diagonal(dim1=1, dim2=2).fill_(torch.inf)
        neighbors = distances.topk(count, dim=-1, largest=False).indices
    others = is_real.sum(dim=1)[:, None, None] - 1
    is_neighbor = (torch.arange(count, device=is_real.device) < others) & is_real.unsqueeze(-1)
    return neighbors, is_neighbor


def additive_mask(visible: torch.BoolTensor, dtype: torch.dtype) -> torch.Tensor | None:
    """Mask to add to the scores, (batch, 1, 1, length), from (batch, length); `None` if everything is visible."""
    if bool(visible.all()):
        return None
    hidden = ~visible[:, None, None, :]
    return torch.zeros_like(hidden, dtype=dtype).masked_fill(hidden, HIDDEN)


class OmniLearnedDynamicTanh(nn.Module):
    """tanh(alpha x) times a weight per component: in the place of a norm, without statistics (arXiv:2503.10622)."""

    def __init__(self, size: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.full((1,), 0.5))
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.alpha * states) * self.weight


class OmniLearnedMLP(nn.Module):
    def __init__(
        self,
        config: OmniLearnedConfig,
        input_size: int,
        hidden_size: int,
        output_size: int,
        use_norm: bool = True,
        bias: bool = True,
        dropout: float | None = None,
    ):
        super().__init__()
        self.fc1 = nn.Linear(input_size, hidden_size, bias=bias)
        self.norm = OmniLearnedDynamicTanh(hidden_size) if use_norm else nn.Identity()
        self.dropout = nn.Dropout(config.hidden_dropout if dropout is None else dropout)
        self.fc2 = nn.Linear(hidden_size, output_size, bias=bias)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        states = self.dropout(self.norm(nn.functional.gelu(self.fc1(states))))
        return self.dropout(self.fc2(states))


class OmniLearnedAttention(nn.Module):
    """Attention without biases; keys and values can come from other states than the queries."""

    is_causal = False

    def __init__(self, config: OmniLearnedConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.head_dim
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        key_value_states: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if key_value_states is None:
            query, key, value = self.qkv_proj(hidden_states).chunk(3, dim=-1)
        else:
            size = self.config.hidden_size
            query = nn.functional.linear(hidden_states, self.qkv_proj.weight[:size])
            key, value = nn.functional.linear(key_value_states, self.qkv_proj.weight[size:]).chunk(2, dim=-1)
        query, key, value = (
            states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for states in (query, key, value)
        )
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, _ = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.head_dim**-0.5,
        )
        return self.o_proj(output.flatten(2))


class OmniLearnedLayer(GradientCheckpointingLayer):
    """One pre-norm block; with `takes_skip` it also reads the output of an earlier one."""

    def __init__(self, config: OmniLearnedConfig, mlp_ratio: int | None = None, takes_skip: bool = False):
        super().__init__()
        size = config.hidden_size
        self.skip_proj = nn.Linear(2 * size, size) if takes_skip else None
        self.norm1 = OmniLearnedDynamicTanh(size)
        self.self_attn = OmniLearnedAttention(config)
        self.norm2 = OmniLearnedDynamicTanh(size)
        self.mlp = OmniLearnedMLP(config, size, (mlp_ratio or config.mlp_ratio) * size, size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        skip: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if self.skip_proj is not None:
            hidden_states = self.skip_proj(torch.cat([hidden_states, skip], dim=-1))
        hidden_states = hidden_states + self.self_attn(self.norm1(hidden_states), attention_mask)
        return hidden_states + self.mlp(self.norm2(hidden_states))


class OmniLearnedClassLayer(GradientCheckpointingLayer):
    """The tokens read the other states, which stay as they are; there is no norm in front of the attention."""

    def __init__(self, config: OmniLearnedConfig):
        super().__init__()
        size = config.hidden_size
        self.self_attn = OmniLearnedAttention(config)
        self.norm = OmniLearnedDynamicTanh(size)
        self.mlp = OmniLearnedMLP(config, size, config.mlp_ratio * size, size)

    def forward(
        self, tokens: torch.Tensor, states: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        tokens = tokens + self.self_attn(tokens, attention_mask, states)
        return tokens + self.mlp(self.norm(tokens))


class OmniLearnedParticleEmbedding(nn.Module):
    def __init__(self, config: OmniLearnedConfig):
        super().__init__()
        size = config.hidden_size
        self.norm = OmniLearnedDynamicTanh(config.num_features)
        self.mlp = OmniLearnedMLP(config, config.num_features, config.mlp_ratio * size, size)

    def forward(self, particles: torch.Tensor) -> torch.Tensor:
        """Features (particles, num_features) to states (particles, hidden_size)."""
        return self.mlp(self.norm(particles.to(self.norm.weight.dtype)))


class OmniLearnedInteraction(nn.Module):
    """Attention bias of every head from the features of pairs of particles."""

    def __init__(self, config: OmniLearnedConfig):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.mlp = OmniLearnedMLP(
            config, 3, 2 * config.hidden_size, config.num_attention_heads, use_norm=False, dropout=0.0
        )
        self.gradient_checkpointing = False

    def forward(self, particles: torch.Tensor, is_real: torch.BoolTensor) -> torch.Tensor:
        """
        (batch, width, num_features) to (batch, heads, width, width), 0 at padding. The features are the same for both
        orders of a pair, and 0 for a particle with itself.
        """
        batch_size, width = is_real.shape
        first, second = torch.triu_indices(width, width, 1, device=particles.device)
        rows, pairs = (is_real[:, first] & is_real[:, second]).nonzero(as_tuple=True)
        first, second = first[pairs], second[pairs]
        recompute = torch.is_grad_enabled() and (self.gradient_checkpointing or len(rows) > PAIRS_RECOMPUTED)
        parts = [
            self._of_pairs(particles, *indices, recompute)
            for indices in zip(*(index.split(PAIRS_AT_ONCE) for index in (rows, first, second)))
        ]
        of_itself = self.mlp(self.mlp.fc1.weight.new_zeros(3))
        bias = of_itself.new_zeros(batch_size, width, width, self.num_heads)
        if parts:
            values = torch.cat(parts)
            bias[rows, first, second] = values
            bias[rows, second, first] = values
        jets, places = is_real.nonzero(as_tuple=True)
        bias[jets, places, places] = of_itself
        return bias.permute(0, 3, 1, 2).contiguous()

    def _of_pairs(self, particles, rows, first, second, recompute: bool) -> torch.Tensor:
        features = pair_features(particles[rows, first], particles[rows, second]).to(self.mlp.fc1.weight.dtype)
        if recompute:
            return checkpoint(self.mlp, features, use_reentrant=False)
        return self.mlp(features)


class OmniLearnedLocalEmbedding(nn.Module):
    """Mean over the nearest neighbours of a small transformer over them; 0 for a lone particle."""

    def __init__(self, config: OmniLearnedConfig):
        super().__init__()
        self.config = config
        size = config.hidden_size
        num_features = config.num_features + (3 if config.use_local_interaction else 0)
        self.mlp = OmniLearnedMLP(config, num_features, config.mlp_ratio * size, size)
        # the ratio is not an option in the published network
        self.layers = nn.ModuleList(OmniLearnedLayer(config, mlp_ratio=2) for _ in range(config.num_local_layers))

    def forward(self, particles: torch.Tensor, is_real: torch.BoolTensor) -> torch.Tensor:
        """(batch, width, num_features) to (particles of all jets, hidden_size)."""
        neighbors, is_neighbor = nearest_neighbors(
            particles[..., : self.config.num_coordinates],
            is_real,
            self.config.num_neighbors,
            self.config.published_neighbors,
        )
        rows, centers = is_real.nonzero(as_tuple=True)
        neighbors, is_neighbor = neighbors[rows, centers], is_neighbor[rows, centers]
        if neighbors.shape[1] == 0:
            return self.mlp.fc1.weight.new_zeros(len(rows), self.config.hidden_size)
        at_once = len(rows) if torch.is_grad_enabled() else PARTICLES_AT_ONCE
        parts = [
            self._of_neighbors(particles[rows, centers].unsqueeze(1), particles[rows.unsqueeze(1), neighbors], known)
            for rows, centers, neighbors, known in zip(
                *(values.split(max(1, at_once)) for values in (rows, centers, neighbors, is_neighbor))
            )
        ]
        return torch.cat(parts)

    def _of_neighbors(self, center: torch.Tensor, others: torch.Tensor, is_neighbor: torch.BoolTensor) -> torch.Tensor:
        """`center` (particles, 1, features), `others` (particles, neighbours, features)."""
        features = center - others
        if self.config.use_local_interaction:
            features = torch.cat([features, pair_features(center, others)], dim=-1)
        states = self.mlp(features.to(self.mlp.fc1.weight.dtype))
        attention_mask = additive_mask(is_neighbor, states.dtype)
        for layer in self.layers:
            states = layer(states, attention_mask)
        states = states.masked_fill(~is_neighbor.unsqueeze(-1), 0.0)
        return states.sum(dim=1) / is_neighbor.sum(dim=1, keepdim=True).clamp(min=1)


class OmniLearnedTimeProjection(nn.Linear):
    """Linear layer on random Fourier features of the time; without a bias exactly 0 at time 0."""

    def __init__(self, num_waves: int, output_size: int, bias: bool = False):
        super().__init__(num_waves, output_size, bias=bias)
        # beside a weight, because transformers initialises no module without a missing parameter
        self.register_buffer("frequencies", 2 * torch.pi * torch.randn(num_waves))
        self.register_buffer("phases", 2 * torch.pi * torch.rand(num_waves))

    def forward(self, time: torch.Tensor) -> torch.Tensor:
        """(batch,) to (batch, output_size)."""
        time = time.float().unsqueeze(-1)
        waves = time * 2**0.5 * torch.cos(time * self.frequencies.float() + self.phases.float())
        return super().forward(waves.to(self.weight.dtype))


class OmniLearnedTimeEmbedding(OmniLearnedMLP):
    def __init__(self, config: OmniLearnedConfig, output_size: int, use_norm: bool = True, bias: bool = False):
        size = config.hidden_size
        super().__init__(config, size, config.mlp_ratio * size, output_size, use_norm=use_norm, bias=bias)
        self.fc1 = OmniLearnedTimeProjection(size, config.mlp_ratio * size, bias)


class OmniLearnedClassHead(nn.Module):
    """Classes (or values) of a jet from its tokens."""

    def __init__(self, config: OmniLearnedConfig):
        super().__init__()
        self.num_tokens = config.num_tokens
        size = config.num_tokens * config.hidden_size
        self.layers = nn.ModuleList(OmniLearnedClassLayer(config) for _ in range(config.num_head_layers))
        self.mlp = OmniLearnedMLP(config, size, config.mlp_ratio * size, size)
        self.out = nn.Linear(size, config.num_labels)

    def forward(self, states: torch.Tensor, visible: torch.BoolTensor) -> torch.Tensor:
        """States (batch, num_prefix + width, hidden_size) to logits (batch, num_labels)."""
        tokens, states = states.split([self.num_tokens, states.shape[1] - self.num_tokens], dim=1)
        attention_mask = additive_mask(visible[:, self.num_tokens :], states.dtype)
        for layer in self.layers:
            tokens = layer(tokens, states, attention_mask)
        return self.out(self.mlp(tokens.flatten(1)))


class OmniLearnedParticleHead(nn.Module):
    """Values of every particle, by blocks behind which an MLP stands; the class of the jet can be given."""

    def __init__(self, config: OmniLearnedConfig, output_size: int, num_labels: int):
        super().__init__()
        size = config.hidden_size
        width = config.mlp_ratio * size
        self.num_prefix = config.num_prefix
        self.embed_labels = self.label_mlp = None
        if num_labels > 0:
            self.embed_labels = nn.Embedding(num_labels, size)
            self.label_mlp = OmniLearnedMLP(config, size, width, size, use_norm=False)
        self.layers = nn.ModuleList(OmniLearnedLayer(config) for _ in range(config.num_head_layers))
        self.mlp = OmniLearnedMLP(config, size, width, size, use_norm=False)
        self.out = nn.Linear(size, output_size)

    def forward(
        self, states: torch.Tensor, visible: torch.BoolTensor, labels: torch.LongTensor | None = None
    ) -> torch.Tensor:
        """
        States (batch, num_prefix + width, hidden_size) to (batch, width, output_size), 0 at padding. A label of -1 says
        nothing.
        """
        num_prefix = self.num_prefix
        is_real = visible[:, num_prefix:]
        if self.embed_labels is not None:
            label = self.label_mlp(self.embed_labels(labels.clamp(min=0))).unsqueeze(1)
            states = torch.cat([label, states], dim=1)
            visible = torch.cat([(labels >= 0).unsqueeze(1), visible], dim=1)
            num_prefix += 1
        attention_mask = additive_mask(visible, states.dtype)
        for layer in self.layers:
            states = layer(states, attention_mask)
        values = self.out(self.mlp(states[:, num_prefix:]))
        return values.masked_fill(~is_real.unsqueeze(-1), 0.0)


class OmniLearnedMaskedHead(nn.Module):
    """Features or codes of particles whose states were replaced by learned vectors."""

    def __init__(self, config: OmniLearnedConfig):
        super().__init__()
        self.num_prefix = config.num_prefix
        self.layers = nn.ModuleList(OmniLearnedLayer(config) for _ in range(config.num_head_layers))
        self.out = nn.Linear(config.hidden_size, config.codebook_size or config.num_features)
        self.out_types = (
            nn.Linear(config.hidden_size, config.num_particle_types) if config.mask_particle_types else None
        )

    def forward(self, states: torch.Tensor, visible: torch.BoolTensor) -> torch.Tensor:
        """States (batch, num_prefix + width, hidden_size) to what `out` reads, (batch, width, hidden_size)."""
        attention_mask = additive_mask(visible, states.dtype)
        for layer in self.layers:
            states = layer(states, attention_mask)
        return states[:, self.num_prefix :]


class OmniLearnedPreTrainedModel(PreTrainedModel):
    config: OmniLearnedConfig
    base_model_prefix = "model"
    main_input_name = "particles"
    supports_gradient_checkpointing = True
    # every loss is a mean over the batch at hand
    accepts_loss_kwargs = False
    _no_split_modules = ["OmniLearnedLayer", "OmniLearnedClassLayer"]
    _supports_sdpa = True
    _supports_attention_backend = True

    def save_pretrained(self, save_directory, **kwargs):
        """As `PreTrainedModel.save_pretrained`; the folder opens with every Auto class, not only that of this model."""
        module = __name__.split(".")[-1]
        self.config.auto_map = {auto_class: f"{module}.{name}" for auto_class, name in AUTO_CLASSES.items()}
        super().save_pretrained(save_directory, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """Initialisation of the published network."""
        if isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
            if isinstance(module, OmniLearnedTimeProjection):
                init.normal_(module.frequencies, std=2 * torch.pi)
                init.uniform_(module.phases, 0.0, 2 * torch.pi)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight)
            if module.padding_idx is not None and not getattr(module.weight, "_is_hf_initialized", False):
                init.zeros_(module.weight[module.padding_idx])
        elif isinstance(module, OmniLearnedDynamicTanh):
            init.constant_(module.alpha, 0.5)
            init.ones_(module.weight)
        elif isinstance(module, OmniLearnedModel):
            init.trunc_normal_(module.tokens, std=self.config.initializer_range)
        elif isinstance(module, OmniLearnedForPreTraining):
            if module.masked_vectors is not None:
                init.normal_(module.masked_vectors)
            if module.centroids is not None:
                init.zeros_(module.centroids)
                init.zeros_(module.centroid_scales)
                init.ones_(module.code_weights)


class OmniLearnedModel(OmniLearnedPreTrainedModel):
    """The bare network: particles of a jet to states of tokens and particles."""

    def __init__(self, config: OmniLearnedConfig):
        super().__init__(config)
        size = config.hidden_size
        self.tokens = nn.Parameter(torch.zeros(1, config.num_tokens, size))
        self.embed_particles = OmniLearnedParticleEmbedding(config)
        self.local_embedding = OmniLearnedLocalEmbedding(config)
        self.interaction = OmniLearnedInteraction(config) if config.use_interaction else None
        self.embed_particle_ids = self.embed_additional = self.embed_conditions = self.embed_time = None
        if config.num_particle_types > 0:
            self.embed_particle_ids = nn.Embedding(config.num_particle_types, size, padding_idx=0)
        if config.num_additional_features > 0:
            self.embed_additional = OmniLearnedMLP(
                config, config.num_additional_features, config.mlp_ratio * size, size, bias=False
            )
        if config.num_conditions > 0:
            self.embed_conditions = OmniLearnedMLP(config, config.num_conditions, size, size)
        if config.use_time:
            self.embed_time = OmniLearnedTimeEmbedding(config, size)
        num_skips = config.num_hidden_layers // 2 if config.use_long_skips else 0
        self.layers = nn.ModuleList(OmniLearnedLayer(config) for _ in range(config.num_hidden_layers - num_skips))
        self.skip_layers = nn.ModuleList(OmniLearnedLayer(config, takes_skip=True) for _ in range(num_skips))
        self.norm = OmniLearnedDynamicTanh(size)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        particles: torch.FloatTensor,
        attention_mask: torch.Tensor | None = None,
        particle_ids: torch.LongTensor | None = None,
        additional_features: torch.FloatTensor | None = None,
        conditions: torch.FloatTensor | None = None,
        time: torch.FloatTensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> OmniLearnedModelOutput:
        r"""
        Args:
            particles (`(batch, slots, num_features)`): eta and phi relative to the jet axis, ln pT, ln E (GeV).
            attention_mask (`(batch, slots)`): 1 for particles, 0 for padding, anywhere; by default all are particles
                (`config.mask_rule`).
            particle_ids (`(batch, slots)`): type of the particle, 1 to `num_particle_types` - 1; if the configuration
                has them, as the next two.
            additional_features (`(batch, slots, num_additional_features)`): tanh d0, error of d0, tanh dz, error of dz.
            conditions (`(batch, num_conditions)`): of the jet; the last is multiplicity / 100 where jets are generated.
            time (`(batch,)`): of the flow; by default 0, clean jets.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        is_real = self.check_jets(particles, attention_mask, particle_ids, additional_features, conditions, time)
        packed = self.encode(
            particles, is_real, particle_ids, additional_features, conditions, time, bool(output_hidden_states)
        )
        num_slots = particles.shape[1]
        return OmniLearnedModelOutput(
            last_hidden_state=self.unpack(packed.states, packed.slots, num_slots),
            visible=torch.cat([packed.visible[:, : self.config.num_prefix], is_real], dim=1),
            hidden_states=tuple(self.unpack(states, packed.slots, num_slots) for states in packed.hidden_states)
            or None,
        )

    def check_jets(
        self, particles, attention_mask=None, particle_ids=None, additional_features=None, conditions=None, time=None
    ) -> torch.BoolTensor:
        """
        Which slots are particles, (batch, slots).

        Raises:
            ValueError: naming the input, and the jet and slot, that cannot be right.
        """
        config = self.config
        check_shape("particles", particles, ("batch", "slots", config.num_features))
        check_floating("particles", particles)
        batch_size, num_slots = particles.shape[:2]
        if num_slots == 0 or batch_size == 0:
            raise ValueError(f"`particles` has shape {tuple(particles.shape)}, expected at least one jet and one slot")
        expected = {
            "particle_ids": (particle_ids, (batch_size, num_slots), config.num_particle_types),
            "additional_features": (
                additional_features,
                (batch_size, num_slots, config.num_additional_features),
                config.num_additional_features,
            ),
            "conditions": (conditions, (batch_size, config.num_conditions), config.num_conditions),
        }
        for name, (values, shape, is_used) in expected.items():
            if is_used and values is None:
                raise ValueError(f"`{name}` is missing, expected shape {shape}")
            if not is_used and values is not None:
                raise ValueError(f"`{name}` is given, but the configuration has none")
            if is_used:
                check_shape(name, values, shape)
        if time is not None:
            if not config.use_time:
                raise ValueError("`time` is given, but the configuration says `use_time` = False")
            check_shape("time", time, (batch_size,))
            check_time(time)
        no_pt = particles[..., 2] == 0
        if attention_mask is None:
            is_real = ~no_pt if config.mask_rule == "log_pt" else torch.ones_like(no_pt)
            empty = is_real & (particles == 0).all(dim=-1)
            if bool(empty.any()):
                jet, slot = empty.nonzero()[0].tolist()
                raise ValueError(
                    f"`particles` of jet {jet} is 0 in slot {slot}: padding? then `attention_mask` has to say so"
                )
        else:
            is_real = check_mask(attention_mask, (batch_size, num_slots))
            if config.mask_rule == "log_pt":
                is_real = is_real & ~no_pt
        # a condition gives the tokens something to attend to
        if config.num_conditions == 0:
            check_not_empty(is_real)
        check_finite("particles", particles, is_real)
        self.check_particle_inputs(is_real, particle_ids, additional_features)
        if conditions is not None:
            check_conditions(conditions)
        return is_real

    def check_particle_inputs(self, is_real: torch.BoolTensor, particle_ids=None, additional_features=None):
        """Values of the further inputs (batch, slots, ...) where there are particles."""
        if additional_features is not None:
            check_finite("additional_features", additional_features, is_real)
        if particle_ids is not None:
            check_integers("particle_ids", particle_ids)
            wrong = ((particle_ids < 0) | (particle_ids >= self.config.num_particle_types)) & is_real
            if bool(wrong.any()):
                jet, slot = wrong.nonzero()[0].tolist()
                raise ValueError(
                    f"`particle_ids` of jet {jet}, slot {slot} is {int(particle_ids[jet, slot])}, expected 0 to "
                    f"{self.config.num_particle_types - 1}"
                )

    def unpack(self, states: torch.Tensor, slots: torch.LongTensor, num_slots: int) -> torch.Tensor:
        """Packed states to (batch, num_prefix + num_slots, hidden_size), particles in their slots."""
        num_prefix = self.config.num_prefix
        return torch.cat([states[:, :num_prefix], put_slots(states[:, num_prefix:], slots, num_slots)], dim=1)

    def encode(
        self,
        particles: torch.Tensor,
        is_real: torch.BoolTensor,
        particle_ids: torch.LongTensor | None = None,
        additional_features: torch.Tensor | None = None,
        conditions: torch.Tensor | None = None,
        time: torch.Tensor | None = None,
        output_hidden_states: bool = False,
    ) -> PackedStates:
        """The network on checked inputs, with the particles of every jet in front."""
        slots, is_particle = pack_slots(is_real)
        # whatever stands in the padding must not reach the neighbours of short jets
        particles = take_slots(particles, slots).masked_fill(~is_particle.unsqueeze(-1), 0.0)
        inputs = [particles, take_slots(particle_ids, slots), take_slots(additional_features, slots)]
        per_jet = [conditions, time]
        groups = self._groups(is_particle)
        if len(groups) == 1:
            outputs, visible = self._encode_group(is_particle, *inputs, *per_jet, output_hidden_states)
            return PackedStates(outputs[-1], visible, slots, tuple(outputs[:-1]))
        parts = []
        for rows, width in groups:
            of_particles = [None if values is None else values[rows, :width] for values in (is_particle, *inputs)]
            of_jets = [None if values is None else values[rows] for values in per_jet]
            outputs, visible = self._encode_group(*of_particles, *of_jets, output_hidden_states)
            missing = slots.shape[1] - width
            outputs = [nn.functional.pad(states, (0, 0, 0, missing)) for states in outputs]
            parts.append((*outputs, nn.functional.pad(visible, (0, missing))))
        back = torch.cat([rows for rows, _ in groups]).argsort()
        *hidden_states, states, visible = (torch.cat(values)[back] for values in zip(*parts))
        return PackedStates(states, visible, slots, tuple(hidden_states))

    def _groups(self, is_particle: torch.BoolTensor) -> list[tuple[torch.LongTensor, int]]:
        """Jets that are computed together: their rows, and the width of the largest."""
        counts, order = is_particle.sum(dim=1).sort(descending=True, stable=True)
        widths = counts.clamp(min=1).tolist()
        at_least = JETS_AT_ONCE if is_particle.device.type == "cpu" else len(widths)
        begins = []
        for jet, width in enumerate(widths):
            if begins:
                size, largest = jet - begins[-1], widths[begins[-1]]
                bias = self.config.num_attention_heads * (largest + self.config.num_prefix) ** 2
                if (size < at_least or width >= SIMILAR_WIDTH * largest) and (size + 1) * bias <= BIAS_AT_ONCE:
                    continue
            begins.append(jet)
        return [(order[begin:end], widths[begin]) for begin, end in zip(begins, [*begins[1:], len(widths)])]

    def _encode_group(
        self, is_real, particles, particle_ids, additional_features, conditions, time, output_hidden_states
    ) -> tuple[list[torch.Tensor], torch.BoolTensor]:
        """Jets of one width; states of every block (on request) and the last, and what is visible."""
        batch_size, width = is_real.shape
        states, visible = self._prefix(batch_size, conditions, time)
        rows, places = is_real.nonzero(as_tuple=True)
        embedded = self.embed_particles(particles[rows, places]) + self.local_embedding(particles.float(), is_real)
        if self.embed_particle_ids is not None:
            embedded = embedded + self._per_jet_dropout(
                self.embed_particle_ids(particle_ids[rows, places].long()), rows, batch_size
            )
        if self.embed_additional is not None:
            additional = additional_features[rows, places].to(embedded.dtype)
            embedded = embedded + self._per_jet_dropout(self.embed_additional(additional), rows, batch_size)
        of_particles = embedded.new_zeros(batch_size, width, self.config.hidden_size)
        of_particles[rows, places] = embedded
        states = torch.cat([states, of_particles], dim=1)
        visible = torch.cat([visible, is_real], dim=1)

        attention_mask = additive_mask(visible, states.dtype)
        if self.interaction is not None:
            num_prefix = self.config.num_prefix
            bias = self.interaction(particles.float(), is_real)
            bias = nn.functional.pad(bias, (num_prefix, 0, num_prefix, 0))
            attention_mask = bias if attention_mask is None else bias + attention_mask
        outputs, skips = [], []
        for layer in (*self.layers, *self.skip_layers):
            if output_hidden_states:
                outputs.append(states.masked_fill(~visible.unsqueeze(-1), 0.0))
            if layer.skip_proj is not None:
                states = layer(states, attention_mask, skips.pop())
                continue
            states = layer(states, attention_mask)
            if self.config.use_long_skips:
                skips.append(states)
        outputs.append(self.norm(states).masked_fill(~visible.unsqueeze(-1), 0.0))
        return outputs, visible

    def _prefix(self, batch_size: int, conditions, time) -> tuple[torch.Tensor, torch.BoolTensor]:
        """Tokens, time and condition: states (batch, num_prefix, hidden_size) and what is visible of them."""
        parts = [self.tokens.expand(batch_size, -1, -1)]
        visible = torch.ones(batch_size, self.config.num_prefix, dtype=torch.bool, device=self.tokens.device)
        if self.embed_time is not None:
            if time is None:
                time = torch.zeros(batch_size, device=self.tokens.device)
            parts.append(self.embed_time(time).unsqueeze(1))
            # published: the state is exactly 0 there, which means padding
            visible[:, self.config.num_tokens] = time != 0
        if self.embed_conditions is not None:
            parts.append(self.embed_conditions(conditions.to(self.tokens.dtype)).unsqueeze(1))
        return torch.cat(parts, dim=1), visible

    def _per_jet_dropout(self, values: torch.Tensor, rows: torch.LongTensor, batch_size: int) -> torch.Tensor:
        """All `values` (particles, hidden_size) of a jet or none, without scaling the rest."""
        if not self.training or self.config.feature_dropout == 0:
            return values
        keep = torch.rand(batch_size, device=values.device) >= self.config.feature_dropout
        return values * keep[rows].unsqueeze(-1)


class OmniLearnedForSequenceClassification(OmniLearnedPreTrainedModel):
    """Classes of jets, or values of jets with `problem_type="regression"`."""

    def __init__(self, config: OmniLearnedConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = OmniLearnedModel(config)
        self.classifier = OmniLearnedClassHead(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        particles: torch.FloatTensor,
        attention_mask: torch.Tensor | None = None,
        particle_ids: torch.LongTensor | None = None,
        additional_features: torch.FloatTensor | None = None,
        conditions: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs,
    ) -> SequenceClassifierOutput:
        r"""
        Args:
            labels (`(batch,)`): class index; in a regression values, `(batch,)` or `(batch, num_labels)`.

        The others are those of [`OmniLearnedModel`].
        """
        is_real = self.model.check_jets(particles, attention_mask, particle_ids, additional_features, conditions)
        packed = self.model.encode(particles, is_real, particle_ids, additional_features, conditions)
        logits = self.classifier(packed.states, packed.visible)
        loss = None
        if labels is not None:
            loss = self._loss(logits.float(), labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if self.config.problem_type == "regression":
            if labels.numel() != logits.numel():
                raise ValueError(f"`labels` has shape {tuple(labels.shape)}, expected {tuple(logits.shape)}")
            return nn.functional.mse_loss(logits, labels.view_as(logits).to(logits.dtype))
        labels = check_labels("labels", labels, len(logits), self.config.num_labels)
        return sum(class_losses(self.config, logits, labels))


class OmniLearnedForGeneration(FlowMatchingGenerationMixin, OmniLearnedPreTrainedModel):
    """
    Flow matching: the vector field that turns noise into the particles of a jet. `generate` draws jets; types and
    additional features of the particles are conditions, which are given and not generated.
    """

    particle_inputs = ("particle_ids", "additional_features")

    def __init__(self, config: OmniLearnedConfig):
        check_uses_time(config, type(self).__name__)
        super().__init__(config)
        self.model = OmniLearnedModel(config)
        self.generator = OmniLearnedParticleHead(config, config.num_features, num_jet_classes(config))
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        particles: torch.FloatTensor,
        attention_mask: torch.Tensor | None = None,
        particle_ids: torch.LongTensor | None = None,
        additional_features: torch.FloatTensor | None = None,
        conditions: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        time: torch.FloatTensor | None = None,
        noise: torch.FloatTensor | None = None,
        **kwargs,
    ) -> OmniLearnedGenerationOutput:
        r"""
        Args:
            particles (`(batch, slots, num_features)`): clean jets.
            labels (`(batch,)`): class of the jet, a condition; not needed with one class.
            time (`(batch,)`): by default drawn uniformly from 0 to 1.
            noise (`(batch, slots, num_features)`): standard normal numbers; drawn by default.

        The others are those of [`OmniLearnedModel`].
        """
        is_real = self.model.check_jets(particles, attention_mask, particle_ids, additional_features, conditions, time)
        check_not_empty(is_real)
        if num_jet_classes(self.config):
            labels = check_labels("labels", labels, len(particles), self.config.num_labels)
        if num_jet_classes(self.config) and self.training and self.config.label_dropout > 0:
            is_dropped = torch.rand(len(labels), device=labels.device) < self.config.label_dropout
            labels = labels.masked_fill(is_dropped, -1)
        flow = noised_jets(self.config, particles, is_real, time, noise)
        packed = self.model.encode(flow.particles, is_real, particle_ids, additional_features, conditions, flow.time)
        velocity = self.generator(packed.states, packed.visible, labels)
        velocity = put_slots(velocity, packed.slots, particles.shape[1])
        return OmniLearnedGenerationOutput(
            loss=flow_loss(self.config, velocity.float(), flow.target, is_real),
            velocity=velocity,
            target=flow.target,
            noisy_particles=flow.particles,
            noise=flow.noise,
            time=flow.time,
        )

    def velocity(self, x: torch.Tensor, time: torch.Tensor, attention_mask: torch.Tensor, **prepared) -> torch.Tensor:
        """Direction at the particles `x` (batch, slots, num_features) and the scalar `time`, the same shape."""
        is_real = attention_mask.bool()
        if self.config.mask_rule == "log_pt":
            is_real = is_real & (x[..., 2] != 0)
        labels = prepared.pop("labels", None)
        packed = self.model.encode(x, is_real, time=time.expand(len(x)), **prepared)
        return put_slots(self.generator(packed.states, packed.visible, labels), packed.slots, x.shape[1])

    def prepare_sampling(self, labels=None, conditions=None, attention_mask=None, **inputs) -> dict:
        return {"labels": None if labels is None else labels.long(), "conditions": conditions, **inputs}

    def check_sampling_inputs(self, attention_mask, labels=None, conditions=None, **inputs):
        config = self.config
        batch_size, num_slots = attention_mask.shape
        if num_jet_classes(config):
            check_labels("labels", labels, batch_size, config.num_labels)
        unknown = sorted(set(inputs) - set(self.particle_inputs))
        if unknown:
            expected = ", ".join(("labels", "conditions", *self.particle_inputs))
            raise ValueError(f"unknown input {unknown[0]!r}, expected {expected}")
        wanted = {
            "conditions": (config.num_conditions, (batch_size, config.num_conditions)),
            "particle_ids": (config.num_particle_types, (batch_size, num_slots)),
            "additional_features": (
                config.num_additional_features,
                (batch_size, num_slots, config.num_additional_features),
            ),
        }
        for name, (size, shape) in wanted.items():
            values = conditions if name == "conditions" else inputs.get(name)
            if (size > 0) != (values is not None):
                raise ValueError(f"`{name}` is {'missing' if size else 'given'}, expected {size or 'none'} per row")
            if size > 0:
                check_shape(name, values, shape)
        if conditions is not None:
            check_conditions(conditions)
        self.model.check_particle_inputs(attention_mask, **inputs)

    def noise(self, shape: tuple[int, ...], generator: torch.Generator | None = None) -> torch.Tensor:
        return scaled_noise(self.config, super().noise(shape, generator))

    def multiplicity(self, conditions: torch.Tensor) -> torch.LongTensor:
        """Number of particles that the last of the conditions (batch, num_conditions) says, (batch,)."""
        count = 100 * conditions[:, -1]
        return (count if self.config.truncate_multiplicity else count.round()).long()

    def generate(self, num_particles=None, attention_mask=None, conditions=None, **kwargs) -> FlowSample:
        """
        As `FlowMatchingGenerationMixin.generate`; without multiplicities, 100 times the last condition is the number
        of particles.
        """
        if num_particles is None and attention_mask is None and conditions is not None:
            conditions = torch.as_tensor(conditions)
            num_particles = self.multiplicity(conditions)
        return super().generate(num_particles, attention_mask, conditions=conditions, **kwargs)


class OmniLearnedForJetGeneration(FlowMatchingGenerationMixin, OmniLearnedPreTrainedModel):
    """
    Flow matching for a few numbers per jet (logarithms of pT and mass, multiplicity / 100 ...) instead of particles,
    given others: the published network in front of the generator in searches for anomalies. A jet is a set of one.

    Of the configuration it reads `hidden_size` (published 256), `num_hidden_layers` (3), `mlp_ratio`, `num_features`,
    `num_conditions`, `noise_mean`, `noise_std`, `num_inference_steps` (511) and `solver`.
    """

    main_input_name = "jets"

    def __init__(self, config: OmniLearnedConfig):
        check_uses_time(config, type(self).__name__)
        if config.num_conditions == 0 or config.hidden_size % 2:
            raise ValueError(
                f"{type(self).__name__}: `num_conditions` is {config.num_conditions}, `hidden_size` "
                f"{config.hidden_size}, expected at least 1, and an even number"
            )
        super().__init__(config)
        size = config.hidden_size
        width = config.mlp_ratio * size
        self.embed_jets = OmniLearnedMLP(config, config.num_features, width, size // 2)
        self.embed_conditions = OmniLearnedMLP(config, config.num_conditions, width, size // 2)
        self.embed_time = OmniLearnedTimeEmbedding(config, size // 2, use_norm=False, bias=True)
        self.layers = nn.ModuleList(OmniLearnedMLP(config, size, width, size) for _ in range(config.num_hidden_layers))
        self.out = nn.Linear(size, config.num_features)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        jets: torch.FloatTensor,
        conditions: torch.FloatTensor,
        time: torch.FloatTensor | None = None,
        noise: torch.FloatTensor | None = None,
        **kwargs,
    ) -> OmniLearnedGenerationOutput:
        r"""
        Args:
            jets (`(batch, num_features)`), conditions (`(batch, num_conditions)`).
            time (`(batch,)`): by default drawn uniformly from 0 to 1.
            noise (`(batch, num_features)`): standard normal numbers; drawn by default.

        The tensors of the output have the shape of `jets`; the loss is the mean squared error.
        """
        check_shape("jets", jets, ("batch", self.config.num_features))
        check_floating("jets", jets)
        is_real = torch.ones_like(jets[:, :1], dtype=torch.bool)
        check_finite("jets", jets.unsqueeze(1), is_real)
        self._check_conditions(conditions, len(jets))
        if time is not None:
            check_shape("time", time, (len(jets),))
            check_time(time)
        if noise is not None:
            check_shape("noise", noise, tuple(jets.shape))
            noise = noise.unsqueeze(1)
        flow = noised_jets(self.config, jets.unsqueeze(1), is_real, time, noise)
        target, noisy, noise = (values.squeeze(1) for values in (flow.target, flow.particles, flow.noise))
        velocity = self._velocity(noisy, flow.time, conditions)
        return OmniLearnedGenerationOutput(
            loss=nn.functional.mse_loss(velocity.float(), target),
            velocity=velocity,
            target=target,
            noisy_particles=noisy,
            noise=noise,
            time=flow.time,
        )

    def _velocity(self, jets: torch.Tensor, time: torch.Tensor, conditions: torch.Tensor) -> torch.Tensor:
        dtype = self.out.weight.dtype
        embedded = self.embed_jets(jets.to(dtype)) + self.embed_conditions(conditions.to(dtype))
        states = torch.cat([self.embed_time(time), embedded], dim=-1)
        for layer in self.layers:
            states = layer(states)
        return self.out(states)

    def _check_conditions(self, conditions: torch.Tensor | None, batch_size: int):
        if conditions is None:
            raise ValueError(f"`conditions` is missing, expected shape ({batch_size}, {self.config.num_conditions})")
        check_shape("conditions", conditions, (batch_size, self.config.num_conditions))
        check_conditions(conditions)

    def velocity(self, x: torch.Tensor, time: torch.Tensor, attention_mask: torch.Tensor, conditions) -> torch.Tensor:
        """Direction at the jets `x` (batch, 1, num_features) and the scalar `time`, the same shape."""
        return self._velocity(x.squeeze(1), time.expand(len(x)), conditions).unsqueeze(1)

    def prepare_sampling(self, labels=None, conditions=None, attention_mask=None) -> dict:
        return {"conditions": conditions}

    def check_sampling_inputs(self, attention_mask, labels=None, conditions=None, **inputs):
        unknown = [*inputs, *([] if labels is None else ["labels"])]
        if unknown:
            raise ValueError(f"unknown input {unknown[0]!r}, expected conditions")
        self._check_conditions(conditions, len(attention_mask))

    def noise(self, shape: tuple[int, ...], generator: torch.Generator | None = None) -> torch.Tensor:
        return scaled_noise(self.config, super().noise(shape, generator))

    def generate(self, conditions: torch.FloatTensor, **kwargs) -> FlowSample:
        """
        As `FlowMatchingGenerationMixin.generate`, one jet for each of the conditions (batch, num_conditions); in
        `particles` of the result (batch, 1, num_features).
        """
        conditions = torch.as_tensor(conditions)
        return super().generate(torch.ones(len(conditions), dtype=torch.long), conditions=conditions, **kwargs)


class OmniLearnedForPreTraining(OmniLearnedPreTrainedModel):
    """
    Any weighted sum of classification, flow matching and masked particles, with classes of the noised and of the masked
    jets (arXiv:2510.24066, 2606.14870).
    """

    def __init__(self, config: OmniLearnedConfig):
        if "generation" in config.objectives:
            check_uses_time(config, type(self).__name__)
        super().__init__(config)
        self.model = OmniLearnedModel(config)
        self.classifier = self.generator = self.masked_head = self.masked_vectors = None
        if "classification" in config.objectives:
            self.classifier = OmniLearnedClassHead(config)
        if "generation" in config.objectives:
            self.generator = OmniLearnedParticleHead(config, config.num_features, num_jet_classes(config))
        if "masked" in config.objectives:
            self.masked_vectors = nn.Parameter(torch.zeros(config.max_position_embeddings, config.hidden_size))
            self.masked_head = OmniLearnedMaskedHead(config)
        centroids = scales = weights = None
        if self.masked_head is not None and config.codebook_size > 0:
            # scales of 0 say that there are no codes yet
            centroids = torch.zeros(config.codebook_size, config.codebook_features)
            scales = torch.zeros(config.codebook_features)
            weights = torch.ones(config.codebook_size)
        self.register_buffer("centroids", centroids)
        self.register_buffer("centroid_scales", scales)
        self.register_buffer("code_weights", weights)
        self.post_init()

    def set_codebook(self, centroids: torch.Tensor, scales: torch.Tensor, weights: torch.Tensor | None = None):
        """
        The codes of masked particles.

        Args:
            centroids (`(codebook_size, codebook_features)`): of the features divided by `scales`.
            scales (`(codebook_features,)`).
            weights (`(codebook_size,)`): of the codes in the cross entropy, for example their inverse frequencies; by
                default 1.
        """
        if self.centroids is None:
            raise ValueError("the configuration has no codes: `codebook_size` is 0, or masked is no objective")
        check_shape("centroids", centroids, tuple(self.centroids.shape))
        check_shape("scales", scales, tuple(self.centroid_scales.shape))
        weights = torch.ones_like(self.code_weights) if weights is None else weights
        check_shape("weights", weights, tuple(self.code_weights.shape))
        with torch.no_grad():
            self.centroids.copy_(centroids)
            self.centroid_scales.copy_(scales)
            self.code_weights.copy_(weights)

    @torch.no_grad()
    def start_at_medians(self, particles: torch.FloatTensor, attention_mask: torch.Tensor):
        """
        Let a fresh head for masked particles predict the medians of their features, the constants of least loss.

        As published, it starts from random weights and no bias, far from ln pT and ln E. Optimizers whose steps have
        one size (Lion, nearly Adam) then drive all weights the same way for as long as the bias takes to get there,
        learning rate by learning rate, and a short training leaves the whole network saturated.

        Args:
            particles (`(batch, slots, num_features)`), attention_mask (`(batch, slots)`): of the training data.
        """
        if self.masked_head is None or self.config.codebook_size > 0:
            raise ValueError("there are no medians to start at: this model does not predict features of particles")
        check_shape("particles", particles, ("batch", "slots", self.config.num_features))
        is_real = check_mask(attention_mask, tuple(particles.shape[:2]))
        if not bool(is_real.any()):
            raise ValueError("`attention_mask` has no particles to take the medians of")
        check_finite("particles", particles, is_real)
        self.masked_head.out.weight.zero_()
        self.masked_head.out.bias.copy_(particles[is_real].median(dim=0).values)

    def codes(self, features: torch.Tensor) -> torch.LongTensor:
        """Code of the nearest centroid: features (..., codebook_features) to (...)."""
        if self.centroids is None or bool((self.centroid_scales == 0).any()):
            raise ValueError("there are no codes: call `set_codebook` with the centroids")
        scaled = (features.float() / self.centroid_scales.float()).flatten(0, -2)
        return nearest_centroids(scaled, self.centroids.float()).view(features.shape[:-1])

    @can_return_tuple
    def forward(
        self,
        particles: torch.FloatTensor,
        attention_mask: torch.Tensor | None = None,
        particle_ids: torch.LongTensor | None = None,
        additional_features: torch.FloatTensor | None = None,
        conditions: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        time: torch.FloatTensor | None = None,
        noise: torch.FloatTensor | None = None,
        masked_positions: torch.BoolTensor | None = None,
        **kwargs,
    ) -> OmniLearnedPreTrainingOutput:
        r"""
        Args:
            labels (`(batch,)`): class of the jet, target and condition.
            time (`(batch,)`), noise (`(batch, slots, num_features)`): of the flow; drawn by default.
            masked_positions (`(batch, slots)`): true where a particle is masked; by default drawn, the share
                `config.mask_fraction` of the particles of the batch.

        The others are those of [`OmniLearnedModel`].
        """
        config = self.config
        is_real = self.model.check_jets(particles, attention_mask, particle_ids, additional_features, conditions, time)
        check_not_empty(is_real)
        if self.classifier is not None or (self.generator is not None and num_jet_classes(config)):
            labels = check_labels("labels", labels, len(particles), config.num_labels)
        inputs = (particle_ids, additional_features, conditions)
        num_slots = particles.shape[1]
        output = OmniLearnedPreTrainingOutput()
        terms = []
        clean = None
        if self.classifier is not None:
            clean = self.model.encode(particles, is_real, *inputs)
            output.logits = self.classifier(clean.states, clean.visible)
            output.class_loss, output.event_loss = class_losses(config, output.logits.float(), labels)
            terms.append((config.classification_loss_weight, output.class_loss + output.event_loss))
        if self.generator is not None:
            flow = noised_jets(config, particles, is_real, time, noise)
            noised = self.model.encode(flow.particles, is_real, *inputs, flow.time)
            velocity = self.generator(noised.states, noised.visible, labels)
            output.velocity = put_slots(velocity, noised.slots, num_slots)
            output.time = flow.time
            output.generation_loss = flow_loss(config, output.velocity.float(), flow.target, is_real)
            terms.append((config.generation_loss_weight, output.generation_loss))
            certainty = (1 - flow.time).square()
            if self.classifier is not None and config.perturbed_loss_weight:
                output.perturbed_logits = self.classifier(noised.states, noised.visible)
                output.perturbed_class_loss, output.perturbed_event_loss = class_losses(
                    config, output.perturbed_logits.float(), labels, certainty
                )
                terms.append((config.perturbed_loss_weight, output.perturbed_class_loss + output.perturbed_event_loss))
            if clean is not None and config.contrastive_loss_weight:
                # by slots: other jets are compared slot by slot, holes of the mask included
                states = [self.model.unpack(packed.states, packed.slots, num_slots) for packed in (clean, noised)]
                output.contrastive_loss = contrastive_loss(config, *states, certainty)
                terms.append((config.contrastive_loss_weight, output.contrastive_loss))
        if self.masked_head is not None:
            if masked_positions is None:
                is_masked = draw_masked(is_real, config.mask_fraction)
            else:
                check_shape("masked_positions", masked_positions, tuple(is_real.shape))
                is_masked = masked_positions.bool() & is_real
            output.masked_positions = is_masked
            terms += self._masked_terms(output, particles, is_real, is_masked, inputs, labels)
        output.loss = sum(weight * term for weight, term in terms)
        return output

    def _masked_terms(self, output, particles, is_real, is_masked, inputs, labels) -> list[tuple[float, torch.Tensor]]:
        """Fills the part of the output about masked particles; returns weights and losses."""
        config = self.config
        num_slots = particles.shape[1]
        # the particles in front, so that padding is not computed
        slots, is_particle = pack_slots(is_real)
        is_masked = take_slots(is_masked, slots) & is_particle
        particle_ids, additional_features, conditions = inputs
        particles, particle_ids, additional_features = (
            take_slots(values, slots) for values in (particles, particle_ids, additional_features)
        )
        packed = self.model.encode(particles, is_particle & ~is_masked, particle_ids, additional_features, conditions)
        terms = []
        if self.classifier is not None and config.masked_input_loss_weight:
            output.masked_input_logits = self.classifier(packed.states, packed.visible)
            # of a jet that is masked completely nothing can be said
            is_seen = packed.visible[:, config.num_tokens :].any(dim=1)
            if bool(is_seen.any()):
                losses = nn.functional.cross_entropy(output.masked_input_logits.float()[is_seen], labels[is_seen])
                output.masked_input_loss = (1 - config.mask_fraction + 1e-6) * losses
                terms.append((config.masked_input_loss_weight, output.masked_input_loss))

        states, visible = self.masked_head_input(packed, particles[..., 2], is_particle, is_masked, slots)
        states = self.masked_head(states, visible)
        if not self.training:
            predictions = self.masked_head.out(states).masked_fill(~is_particle.unsqueeze(-1), 0.0)
            output.masked_predictions = put_slots(predictions, slots, num_slots)
            if config.mask_particle_types:
                type_logits = self.masked_head.out_types(states).masked_fill(~is_particle.unsqueeze(-1), 0.0)
                output.masked_type_logits = put_slots(type_logits, slots, num_slots)
        if bool(is_masked.any()):
            predictions = self.masked_head.out(states[is_masked]).float()
            targets = particles[is_masked].float()
            if config.codebook_size > 0:
                if config.codebook_features > config.num_features:
                    targets = torch.cat([targets, additional_features[is_masked].float()], dim=-1)
                codes = self.codes(targets[:, : config.codebook_features])
                output.masked_loss = nn.functional.cross_entropy(
                    predictions, codes, weight=self.code_weights.float(), label_smoothing=config.label_smoothing
                )
            else:
                output.masked_loss = (predictions - targets).abs().mean()
            terms.append((config.masked_loss_weight, output.masked_loss))
            if config.mask_particle_types:
                type_logits = self.masked_head.out_types(states[is_masked]).float()
                output.masked_type_loss = nn.functional.cross_entropy(type_logits, particle_ids[is_masked].long())
                terms.append((config.masked_type_loss_weight, output.masked_type_loss))
        return terms

    def masked_head_input(self, packed: PackedStates, log_pt, is_real, is_masked, slots):
        """
        States (batch, num_prefix + width, hidden_size) with learned vectors at the masked particles, and what is
        visible; `log_pt`, `is_real`, `is_masked`, `slots` (batch, width).
        """
        config = self.config
        ranks = masked_ranks(log_pt, is_real, is_masked, slots, config.masked_position)
        most = int(ranks.masked_fill(~is_masked, 0).max())
        if most >= config.max_position_embeddings:
            raise ValueError(
                f"a masked particle has position {most}, expected less than `max_position_embeddings` = "
                f"{config.max_position_embeddings}"
            )
        states = self.model.unpack(packed.states, packed.slots, is_real.shape[1])
        prefix, of_particles = states.split([config.num_prefix, is_real.shape[1]], dim=1)
        vectors = self.masked_vectors[ranks.masked_fill(~is_masked, 0)].to(states.dtype)
        of_particles = torch.where(is_masked.unsqueeze(-1), vectors, of_particles)
        visible = packed.visible[:, : config.num_prefix]
        if config.masked_head_sees_time:
            visible = torch.ones_like(visible)
        return torch.cat([prefix, of_particles], dim=1), torch.cat([visible, is_real], dim=1)


class OmniLearnedForTokenClassification(OmniLearnedPreTrainedModel):
    """
    Classes of particles with classes of their jets (flavour tagging: origins of tracks), or with
    `problem_type="regression"` values of particles alone (segmentation).
    """

    def __init__(self, config: OmniLearnedConfig):
        super().__init__(config)
        self.num_labels = config.num_particle_labels
        self.model = OmniLearnedModel(config)
        is_regression = config.problem_type == "regression"
        self.classifier = None if is_regression else OmniLearnedClassHead(config)
        num_labels = num_jet_classes(config) if config.particle_label_token and not is_regression else 0
        self.generator = OmniLearnedParticleHead(config, config.num_particle_labels, num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        particles: torch.FloatTensor,
        attention_mask: torch.Tensor | None = None,
        particle_ids: torch.LongTensor | None = None,
        additional_features: torch.FloatTensor | None = None,
        conditions: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        jet_labels: torch.LongTensor | None = None,
        **kwargs,
    ) -> OmniLearnedTokenClassifierOutput:
        r"""
        Args:
            labels (`(batch, slots)`): class of every particle, negative where there is none; in a regression values,
                `(batch, slots, num_particle_labels)`.
            jet_labels (`(batch,)`): class of the jet. With `config.particle_label_token` the head for particles reads
                it; where it is missing, the most probable class stands for it.

        The others are those of [`OmniLearnedModel`].
        """
        config = self.config
        is_real = self.model.check_jets(particles, attention_mask, particle_ids, additional_features, conditions)
        if self.classifier is None and jet_labels is not None:
            raise ValueError("`jet_labels` are given, but a regression per particle has no classes of jets")
        if jet_labels is not None:
            jet_labels = check_labels("jet_labels", jet_labels, len(particles), config.num_labels)
        packed = self.model.encode(particles, is_real, particle_ids, additional_features, conditions)
        jet_logits = classes = None
        if self.classifier is not None:
            jet_logits = self.classifier(packed.states, packed.visible)
            classes = jet_logits.argmax(dim=-1) if jet_labels is None else jet_labels
        logits = put_slots(self.generator(packed.states, packed.visible, classes), packed.slots, particles.shape[1])
        particle_loss = jet_loss = None
        if labels is not None:
            particle_loss = self._particle_loss(logits.float(), labels, is_real)
        if jet_labels is not None:
            jet_loss = sum(class_losses(config, jet_logits.float(), jet_labels))
        losses = [loss for loss in (particle_loss, jet_loss) if loss is not None]
        return OmniLearnedTokenClassifierOutput(
            loss=sum(losses) if losses else None,
            logits=logits,
            jet_logits=jet_logits,
            particle_loss=particle_loss,
            jet_loss=jet_loss,
        )

    def _particle_loss(self, logits: torch.Tensor, labels: torch.Tensor, is_real: torch.BoolTensor) -> torch.Tensor:
        if self.config.problem_type == "regression":
            check_shape("labels", labels, tuple(logits.shape))
            squares = (logits - labels).square()
            return squares.mean() if self.config.loss_over_padding else squares[is_real].mean()
        check_shape("labels", labels, tuple(is_real.shape))
        check_integers("labels", labels)
        wrong = labels >= self.config.num_particle_labels
        if bool(wrong.any()):
            jet, slot = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"`labels` of jet {jet}, slot {slot} is {int(labels[jet, slot])}, expected less than "
                f"{self.config.num_particle_labels}"
            )
        is_target = (labels >= 0) & is_real
        losses = nn.functional.cross_entropy(logits[is_target], labels[is_target].long(), reduction="sum")
        return losses / is_target.sum().clamp(min=1)


class Flow(NamedTuple):
    """Noised jets: `particles`, `target` (noise - clean), scaled `noise` (batch, slots, features); `time` (batch,)."""

    particles: torch.Tensor
    target: torch.Tensor
    noise: torch.Tensor
    time: torch.Tensor


def scaled_noise(config: OmniLearnedConfig, noise: torch.Tensor) -> torch.Tensor:
    """Standard normal numbers (..., num_features) to the noise of the flow."""
    return noise * noise.new_tensor(config.noise_std) + noise.new_tensor(config.noise_mean)


def noised_jets(config: OmniLearnedConfig, particles, is_real, time=None, noise=None) -> Flow:
    """Straight paths from data (time 0) to noise (time 1); what is not given is drawn."""
    particles = particles.float().masked_fill(~is_real.unsqueeze(-1), 0.0)
    if time is None:
        time = torch.rand(len(particles), device=particles.device)
    if noise is None:
        noise = torch.randn_like(particles)
    check_shape("noise", noise, tuple(particles.shape))
    check_finite("noise", noise, is_real)
    noise = scaled_noise(config, noise.float()).masked_fill(~is_real.unsqueeze(-1), 0.0)
    share = time.float()[:, None, None]
    return Flow((1 - share) * particles + share * noise, noise - particles, noise, time)


def flow_loss(config: OmniLearnedConfig, velocity, target, is_real: torch.BoolTensor) -> torch.Tensor:
    """Squared errors summed over features, mean over the particles of a jet, mean over jets."""
    errors = (velocity - target).square().sum(dim=(1, 2))
    counts = is_real.sum(dim=1)
    if config.loss_reduction == "batch":
        return errors.mean() * (1 / counts).mean()
    return (errors / counts).mean()


def class_losses(
    config: OmniLearnedConfig, logits: torch.Tensor, labels: torch.LongTensor, weights: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Cross entropies of jets and of events, each the mean over its own jets, 0 without any.

    Args:
        logits (`(batch, num_labels)`), labels (`(batch,)`).
        weights (`(batch,)`): of the jets, besides those of `config.class_balancing`.
    """
    balance = torch.ones_like(logits[:, 0])
    if config.class_balancing:
        balance = 1 / ((labels.unsqueeze(0) == labels.unsqueeze(1)).sum(dim=1) + 1e-6)
        balance = balance / balance.mean()
    weights = balance if weights is None else balance * weights
    split = config.num_labels - config.num_event_classes
    losses = []
    for chosen, begin, end in ((labels < split, 0, split), (labels >= split, split, config.num_labels)):
        if begin == end or not bool(chosen.any()):
            losses.append(logits.sum() * 0.0)
            continue
        entropies = nn.functional.cross_entropy(logits[chosen, begin:end], labels[chosen] - begin, reduction="none")
        if config.loss_reduction == "batch":
            losses.append(entropies.mean() * weights.mean())
        else:
            losses.append((entropies * weights[chosen]).mean())
    return losses[0], losses[1]


def contrastive_loss(config: OmniLearnedConfig, clean, noised, weights: torch.Tensor) -> torch.Tensor:
    """Clean and noised states (batch, length, hidden_size) of the same jet against those of the others."""
    clean, noised = (nn.functional.normalize(states.float().flatten(1), dim=-1, eps=1e-3) for states in (clean, noised))
    scores = 2.74 * clean @ noised.mT
    targets = torch.arange(len(scores), device=scores.device)
    losses = 0.5 * (
        nn.functional.cross_entropy(scores, targets, reduction="none")
        + nn.functional.cross_entropy(scores.mT, targets, reduction="none")
    )
    if config.contrastive_weighting == "batch":
        return weights.mean() * losses.mean()
    return (weights * losses).mean()


def draw_masked(is_real: torch.BoolTensor, fraction: float) -> torch.BoolTensor:
    """int(fraction * number of particles) of the batch, drawn at random; (batch, slots), true where masked."""
    real = is_real.flatten().nonzero().squeeze(-1)
    chosen = real[torch.randperm(len(real), device=real.device)[: int(fraction * len(real))]]
    is_masked = torch.zeros_like(is_real).flatten()
    is_masked[chosen] = True
    return is_masked.view_as(is_real)


def masked_ranks(log_pt, is_real, is_masked, slots, kind: str) -> torch.LongTensor:
    """Which learned vector stands for each particle, (batch, width): `kind` as `masked_position`."""
    if kind == "position":
        return slots
    counts = is_masked if kind == "rank_among_masked" else is_real
    descending = log_pt.masked_fill(~counts, -torch.inf).argsort(dim=1, descending=True, stable=True)
    return descending.argsort(dim=1)


def nearest_centroids(points: torch.Tensor, centroids: torch.Tensor) -> torch.LongTensor:
    """Index of the nearest of the centroids (codes, dimensions) for points (points, dimensions), in parts."""
    at_once = max(1, 2**24 // len(centroids))
    return torch.cat([torch.cdist(part, centroids).argmin(dim=-1) for part in points.split(at_once)])


def num_jet_classes(config: OmniLearnedConfig) -> int:
    """Number of classes of jets that a head is told of."""
    return config.num_labels if config.num_labels > 1 else 0


def check_conditions(conditions: torch.Tensor):
    broken = ~conditions.isfinite().all(dim=-1)
    if bool(broken.any()):
        jet = int(broken.nonzero()[0])
        raise ValueError(f"`conditions` of jet {jet} are {conditions[jet].tolist()}, expected finite numbers")


def check_not_empty(is_real: torch.BoolTensor):
    counts = is_real.sum(dim=1)
    if bool((counts == 0).any()):
        raise ValueError(f"jet {int(counts.argmin())} of the batch has no particles, expected at least one")


def check_uses_time(config: OmniLearnedConfig, class_name: str):
    if not config.use_time:
        raise ValueError(f"{class_name}: `use_time` is False, expected True: generation needs the time")


__all__ = [
    "OmniLearnedPreTrainedModel",
    "OmniLearnedModel",
    "OmniLearnedForSequenceClassification",
    "OmniLearnedForGeneration",
    "OmniLearnedForJetGeneration",
    "OmniLearnedForPreTraining",
    "OmniLearnedForTokenClassification",
]

# `save_pretrained` then writes this code beside the weights, so that they load anywhere with `trust_remote_code=True`
OmniLearnedConfig.register_for_auto_class()
OmniLearnedForGeneration.register_for_auto_class("AutoModelForPreTraining")
OmniLearnedForJetGeneration.register_for_auto_class("AutoModelForPreTraining")
for _auto_class, _model_class in AUTO_CLASSES.items():
    globals()[_model_class].register_for_auto_class(_auto_class)
