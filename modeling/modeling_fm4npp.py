"""
FM4NPP: state-space models of the spacepoints of a time projection chamber (arXiv:2508.14087).

A stack of Mamba (arXiv:2312.00752) or Mamba-2 (arXiv:2405.21060) blocks reads the points of an event in a fixed order
and learns to predict, for every point, where the nearest points further out are. Heads for track finding and for the
classification of points read a learned mixture of what its blocks put out.

Points are (E, eta, phi, r), normalised and ordered by `Fm4nppFeatureExtractor`; padding is at the end of a row.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import TokenClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput, can_return_tuple, logging

from .configuration_fm4npp import Fm4nppConfig
from .eager_attention import eager_attention_forward
from .state_space import causal_conv1d, resolve_backend, selective_scan, state_space_dual

logger = logging.get_logger(__name__)

# every class that a saved checkpoint can be opened with
AUTO_CLASSES = {
    "AutoModel": "Fm4nppModel",
    "AutoModelForPreTraining": "Fm4nppForPreTraining",
    "AutoModelForInstanceSegmentation": "Fm4nppForTrackFinding",
    "AutoModelForTokenClassification": "Fm4nppForTokenClassification",
}
NUM_FEATURES = 4  # E, eta, phi, r
NO_OBJECT, TRACK = 0, 1  # classes of a prototype
LOG_EPS = 1e-6
FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2


class Fm4nppCache:
    """
    What is left of the points so far, for processing a long event in pieces. A model leaves the cache that it gets as
    it is and returns another one, so that an event can go on from the same place several times.

    Attributes:
        conv_windows: per block, the last inputs of its convolution, (batch, conv_kernel - 1, conv_size).
        states: per block, its state, (batch, inner_size, state_size) or (batch, heads, head_dim, state_size).
    """

    def __init__(self, num_layers: int):
        self.conv_windows: list[torch.Tensor | None] = [None] * num_layers
        self.states: list[torch.Tensor | None] = [None] * num_layers

    def copy(self) -> "Fm4nppCache":
        """Another cache of the same tensors, which are never changed."""
        cache = Fm4nppCache(0)
        cache.conv_windows, cache.states = list(self.conv_windows), list(self.states)
        return cache

    def update(self, layer_idx: int, conv_window: torch.Tensor, state: torch.Tensor):
        self.conv_windows[layer_idx] = conv_window
        self.states[layer_idx] = state


@dataclass
class Fm4nppModelOutput(ModelOutput):
    """
    Args:
        last_hidden_state (`(batch, length, hidden_size)`): normalised.
        block_outputs: per block, what it adds to the residual stream, (batch, length, hidden_size); the features that
            heads read.
        hidden_states: the residual stream in front of every block and behind the last, if asked for.
        cache_params: for the next piece of the same events, with `use_cache`.
    """

    last_hidden_state: torch.FloatTensor | None = None
    block_outputs: tuple[torch.FloatTensor, ...] | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    cache_params: Fm4nppCache | None = None


@dataclass
class Fm4nppPreTrainingOutput(ModelOutput):
    """
    Args:
        loss (scalar), loss_per_event (`(batch,)`): squared error of the neighbours that exist.
        predictions (`(batch, length, 3 num_neighbors)`): (eta, phi, r) of the nearest point further out, of the second
            nearest, and so on.
        hidden_states: as of [`Fm4nppModel`].
        cache_params: for the next piece of the same events, with `use_cache`.
    """

    loss: torch.FloatTensor | None = None
    predictions: torch.FloatTensor | None = None
    loss_per_event: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    cache_params: Fm4nppCache | None = None


@dataclass
class Fm4nppTrackFindingOutput(ModelOutput):
    """
    Args:
        loss (scalar): of the final and the auxiliary predictions.
        class_logits (`(batch, num_prototypes, 2)`): no object, track.
        mask_logits (`(batch, length, num_prototypes)`): whether a point belongs to a prototype.
        auxiliary_class_logits, auxiliary_mask_logits: the same of the prototypes in front of every refinement layer.
        loss_terms (`(predictions, 5)`): rows final prediction, auxiliary predictions; columns class of the matched and
            of the unmatched prototypes, dice, focal, weighted sum.
        joint_loss_terms (`(3,)`): track parameters, particles and noise, of a joint head; not weighted.
        prototypes (`(batch, num_prototypes, head_size)`), point_features (`(batch, length, head_size)`): what the
            predictions are made of.
        pid_logits (`(batch, num_prototypes, num_pid_classes + 1)`), track_parameters (`(batch, num_prototypes, 4)`):
            particle, and (q / (pT + 1), theta, sin phi, cos phi), of a joint head.
        noise_logits (`(batch, length, 2)`): of a joint head.
    """

    loss: torch.FloatTensor | None = None
    class_logits: torch.FloatTensor | None = None
    mask_logits: torch.FloatTensor | None = None
    auxiliary_class_logits: tuple[torch.FloatTensor, ...] | None = None
    auxiliary_mask_logits: tuple[torch.FloatTensor, ...] | None = None
    loss_terms: torch.FloatTensor | None = None
    joint_loss_terms: torch.FloatTensor | None = None
    prototypes: torch.FloatTensor | None = None
    point_features: torch.FloatTensor | None = None
    pid_logits: torch.FloatTensor | None = None
    track_parameters: torch.FloatTensor | None = None
    noise_logits: torch.FloatTensor | None = None


class Fm4nppRMSNorm(nn.RMSNorm):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        # one dtype, also under autocast, where the fused operator would refuse
        weight = self.weight.to(hidden_states.dtype)
        return nn.functional.rms_norm(hidden_states, self.normalized_shape, weight, self.eps)


# Embedding


def encode_positions(coordinates: torch.Tensor, method: str, size: int) -> torch.Tensor:
    """
    Fixed encoding of coordinates (..., 3), in float32.

    Args:
        method: `"nerf"` (63 numbers: c, sin 2^i c and cos 2^i c for i < 10), `"ff"` (75: c, sines, cosines of 12
            frequencies from 1 to 10 times pi), `"cpe"` (the sines of a transformer for each coordinate, filled up with
            zeros to `size`) or `"none"` (c).
    """
    coordinates = coordinates.float()
    if method == "nerf":
        angles = [coordinates * 2**octave for octave in range(10)]
        return torch.cat([coordinates, *(wave for angle in angles for wave in (angle.sin(), angle.cos()))], dim=-1)
    if method == "ff":
        frequencies = torch.linspace(1, 10, 12, device=coordinates.device)
        angles = (torch.pi * coordinates.unsqueeze(-1) * frequencies).flatten(-2)
        return torch.cat([coordinates, angles.sin(), angles.cos()], dim=-1)
    if method == "cpe":
        per_coordinate = size // 3 // 2 * 2
        exponents = torch.arange(0, per_coordinate, 2, device=coordinates.device) / max(per_coordinate, 1)
        angles = 2 * torch.pi * coordinates.unsqueeze(-1) / 10000**exponents
        waves = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-3)
        return nn.functional.pad(waves, (0, size - waves.shape[-1]))
    return coordinates


class Fm4nppEmbedder(nn.Module):
    """
    (E, eta, phi, r) to hidden states: a random projection that is drawn once, saved and never trained (`"legacy"`: two
    that are).
    """

    def __init__(self, config: Fm4nppConfig):
        super().__init__()
        self.config = config
        size = config.hidden_size
        if config.embedding_method == "legacy":
            self.energy_projection = nn.Parameter(torch.zeros(1, size // 4))
            self.position_projection = nn.Parameter(torch.zeros(3, size - size // 4))
            self.dropout = nn.Dropout(0.2)
            self.norm = nn.LayerNorm(size, eps=config.layer_norm_eps)
            return
        encoded_size = {"nerf": 63, "ff": 75, "none": 3}.get(config.position_encoding)
        energy_size = size if config.embedding_method == "add" else size // 4
        self.register_buffer("energy_projection", torch.zeros(1, energy_size))
        if encoded_size is not None:
            self.register_buffer("position_projection", torch.zeros(encoded_size, size))
        if config.embedding_method == "concat":
            self.register_buffer("output_projection", torch.zeros(energy_size + size, size))

    def forward(self, points: torch.Tensor) -> torch.Tensor:
        """(batch, length, 4) to (batch, length, hidden_size), in the dtype of the module."""
        config, dtype = self.config, self.energy_projection.dtype
        # in float32 also under autocast: a point would not be where it is with the three digits of bfloat16
        with torch.autocast(points.device.type, enabled=False):
            energy = points[..., :1].float() * self.energy_projection.float()
            if config.embedding_method == "legacy":
                position = points[..., 1:].float() @ self.position_projection.float()
                return self.norm(self.dropout(torch.cat([energy, position], dim=-1).to(dtype)))
            position = encode_positions(points[..., 1:], config.position_encoding, config.hidden_size)
            if config.position_encoding != "cpe":
                position = position @ self.position_projection.float()
            if config.embedding_method == "concat":
                return (torch.cat([energy, position], dim=-1) @ self.output_projection.float()).to(dtype)
            return (energy + position).to(dtype)


# Blocks


class Fm4nppMixer(nn.Module):
    """What the mixers of Mamba and Mamba-2 share: the causal convolution and its window."""

    def __init__(self, config: Fm4nppConfig, layer_idx: int, backend: str):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.backend = backend
        channels, kernel = config.conv_size, config.conv_kernel
        self.conv1d = nn.Conv1d(channels, channels, kernel, groups=channels, padding=kernel - 1)
        self.out_proj = nn.Linear(config.inner_size, config.hidden_size, bias=False)

    def convolve(
        self, inputs: torch.Tensor, attention_mask: torch.Tensor | None, cache: Fm4nppCache | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Convolution and SiLU of (batch, length, conv_size), and the window that the next piece begins with."""
        before = None if cache is None else cache.conv_windows[self.layer_idx]
        weight = self.conv1d.weight.squeeze(1)
        outputs, window = causal_conv1d(inputs, weight, self.conv1d.bias, initial_window=before, backend=self.backend)
        if cache is not None and attention_mask is not None:
            # the last inputs that are points, which come before the padding
            width = weight.shape[1] - 1
            if before is None:
                before = inputs.new_zeros(len(inputs), width, inputs.shape[2])
            index = attention_mask.sum(dim=1)[:, None] + torch.arange(width, device=inputs.device)
            window = torch.cat([before, inputs], dim=1).take_along_dim(index.unsqueeze(-1), dim=1)
        return outputs, window

    def initial_state(self, cache: Fm4nppCache | None) -> torch.Tensor | None:
        return None if cache is None else cache.states[self.layer_idx]


class Fm4nppMamba1Mixer(Fm4nppMixer):
    """Selective state space with a step and a decay per channel (Mamba, arXiv:2312.00752)."""

    def __init__(self, config: Fm4nppConfig, layer_idx: int, backend: str):
        super().__init__(config, layer_idx, backend)
        inner_size, rank = config.inner_size, config.time_step_rank
        self.in_proj = nn.Linear(config.hidden_size, 2 * inner_size, bias=False)  # x, z
        self.x_proj = nn.Linear(inner_size, rank + 2 * config.state_size, bias=False)  # step, B, C
        self.dt_proj = nn.Linear(rank, inner_size)
        self.A_log = nn.Parameter(torch.zeros(inner_size, config.state_size))
        self.D = nn.Parameter(torch.ones(inner_size))

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache_params: Fm4nppCache | None = None,
    ) -> torch.Tensor:
        x, gate = self.in_proj(hidden_states).chunk(2, dim=-1)
        x, window = self.convolve(x, attention_mask, cache_params)
        sizes = [self.config.time_step_rank, self.config.state_size, self.config.state_size]
        step, B, C = self.x_proj(x).split(sizes, dim=-1)
        delta = nn.functional.softplus(self.dt_proj(step).float())
        if attention_mask is not None:
            # a step of 0 leaves the state as it is
            delta = delta * attention_mask.unsqueeze(-1)
        A = -torch.exp(self.A_log.float())
        y, state = selective_scan(
            x,
            delta,
            A,
            B,
            C,
            self.D,
            initial_state=self.initial_state(cache_params),
            backend=self.backend,
            return_state=cache_params is not None,
        )
        if cache_params is not None:
            cache_params.update(self.layer_idx, window, state)
        return self.out_proj(y * nn.functional.silu(gate))


class Fm4nppMamba2Mixer(Fm4nppMixer):
    """State-space dual with a step and a decay per head and B and C shared by the heads (Mamba-2, arXiv:2405.21060)."""

    def __init__(self, config: Fm4nppConfig, layer_idx: int, backend: str):
        super().__init__(config, layer_idx, backend)
        inner_size, num_heads = config.inner_size, config.num_ssm_heads
        # gate; x, B and C, which are convolved; step
        self.in_proj = nn.Linear(config.hidden_size, inner_size + config.conv_size + num_heads, bias=False)
        self.dt_bias = nn.Parameter(torch.zeros(num_heads))
        self.A_log = nn.Parameter(torch.zeros(num_heads))
        self.D = nn.Parameter(torch.ones(num_heads))
        self.norm = Fm4nppRMSNorm(inner_size, eps=config.layer_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache_params: Fm4nppCache | None = None,
    ) -> torch.Tensor:
        config = self.config
        sizes = [config.inner_size, config.conv_size, config.num_ssm_heads]
        gate, xBC, step = self.in_proj(hidden_states).split(sizes, dim=-1)
        xBC, window = self.convolve(xBC, attention_mask, cache_params)
        x, B, C = xBC.split([config.inner_size, config.state_size, config.state_size], dim=-1)
        delta = nn.functional.softplus(step.float() + self.dt_bias.float())
        if attention_mask is not None:
            # a step of 0 leaves the state as it is
            delta = delta * attention_mask.unsqueeze(-1)
        y, state = state_space_dual(
            x.unflatten(-1, (config.num_ssm_heads, config.head_dim)),
            delta,
            -torch.exp(self.A_log.float()),
            B,
            C,
            self.D,
            initial_state=self.initial_state(cache_params),
            chunk_size=config.chunk_size,
            backend=self.backend,
            return_state=cache_params is not None,
        )
        if cache_params is not None:
            cache_params.update(self.layer_idx, window, state)
        return self.out_proj(self.norm(y.flatten(2) * nn.functional.silu(gate)))


class Fm4nppBlock(GradientCheckpointingLayer):
    """Norm and mixer; the model adds the residual, because heads read what a block puts out without it."""

    def __init__(self, config: Fm4nppConfig, layer_idx: int, backend: str):
        super().__init__()
        mixer_class = Fm4nppMamba1Mixer if config.ssm == "mamba1" else Fm4nppMamba2Mixer
        self.norm = Fm4nppRMSNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mixer = mixer_class(config, layer_idx, backend)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        return self.dropout(self.mixer(self.norm(hidden_states), **kwargs))


# Parts of the heads


class Fm4nppAttentionInput(nn.Linear):
    """Projection to queries, keys or values, which starts as a part of one matrix for the three."""


class Fm4nppAttentionOutput(nn.Linear):
    """Projection of what the heads have read."""


class Fm4nppAttention(nn.Module):
    def __init__(self, config: Fm4nppConfig):
        super().__init__()
        self.config = config
        self.is_causal = False
        self.head_dim = config.head_size // config.head_attention_heads
        self.q_proj = Fm4nppAttentionInput(config.head_size, config.head_size)
        self.k_proj = Fm4nppAttentionInput(config.head_size, config.head_size)
        self.v_proj = Fm4nppAttentionInput(config.head_size, config.head_size)
        self.o_proj = Fm4nppAttentionOutput(config.head_size, config.head_size)

    def forward(
        self, states: torch.Tensor, others: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`states` (batch, queries, size) attend to `others` (batch, keys, size); the mask is added to the scores."""
        query, key, value = (
            projection(inputs).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection, inputs in ((self.q_proj, states), (self.k_proj, others), (self.v_proj, others))
        )
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, _ = attention_interface(self, query, key, value, attention_mask, scaling=self.head_dim**-0.5)
        return self.o_proj(output.flatten(2))


class Fm4nppMLP(nn.Module):
    """Norm, linear, GELU, dropout, linear."""

    def __init__(self, config: Fm4nppConfig, output_size: int):
        super().__init__()
        self.norm = nn.LayerNorm(config.head_size, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(config.head_size, config.head_size)
        self.dropout = nn.Dropout(config.head_dropout)
        self.fc2 = nn.Linear(config.head_size, output_size)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.dropout(nn.functional.gelu(self.fc1(self.norm(states)))))


class Fm4nppFeedForward(nn.Module):
    """Feed-forward network on normed states, to be added to them."""

    def __init__(self, config: Fm4nppConfig):
        super().__init__()
        self.norm = nn.LayerNorm(config.head_size, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(config.head_size, config.head_intermediate_size)
        self.fc2 = nn.Linear(config.head_intermediate_size, config.head_size)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(self.norm(states))))


class Fm4nppFeatureReader(nn.Module):
    """Learned mixture of the block outputs, normed and projected to the width of a head."""

    def __init__(self, config: Fm4nppConfig):
        super().__init__()
        self.layer_weights = nn.Parameter(torch.ones(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.projection = nn.Linear(config.hidden_size, config.head_size)

    def forward(self, block_outputs) -> torch.Tensor:
        """(batch, length, hidden_size) of every block to (batch, length, head_size)."""
        weights = self.layer_weights.softmax(dim=0).unbind()
        mixed = sum(weight * output for weight, output in zip(weights, block_outputs))
        return self.projection(self.norm(mixed))


class Fm4nppRefinementLayer(nn.Module):
    """Prototypes read the points that they have claimed so far, then each other."""

    def __init__(self, config: Fm4nppConfig):
        super().__init__()
        self.cross_norm = nn.LayerNorm(config.head_size, eps=config.layer_norm_eps)
        self.cross_attn = Fm4nppAttention(config)
        self.self_norm = nn.LayerNorm(config.head_size, eps=config.layer_norm_eps)
        self.self_attn = Fm4nppAttention(config)
        self.feed_forward = Fm4nppFeedForward(config)

    def forward(
        self, prototypes: torch.Tensor, positions: torch.Tensor, points: torch.Tensor, attention_mask: torch.Tensor
    ) -> torch.Tensor:
        """`prototypes` (batch, prototypes, size), `points` (batch, length, size); returns the prototypes."""
        prototypes = prototypes + positions
        prototypes = prototypes + self.cross_attn(self.cross_norm(prototypes), points, attention_mask)
        normed = self.self_norm(prototypes)
        prototypes = prototypes + self.self_attn(normed, normed)
        return prototypes + self.feed_forward(prototypes)


class Fm4nppPointNorm(nn.LayerNorm):
    """Norm in front of the attention of points."""


class Fm4nppPointAttention(nn.Module):
    """Points attend to the points of their event."""

    def __init__(self, config: Fm4nppConfig):
        super().__init__()
        self.norm = Fm4nppPointNorm(config.head_size, eps=config.layer_norm_eps)
        self.attn = Fm4nppAttention(config)

    def forward(self, states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        normed = self.norm(states)
        return states + self.attn(normed, normed, attention_mask)


class Fm4nppTrackHead(nn.Module):
    """
    Learned prototypes that become tracks: each says whether it is one, and which points are its own.

    The prediction of a layer decides what the next one attends to (as in Mask2Former, arXiv:2112.01527).
    """

    def __init__(self, config: Fm4nppConfig):
        super().__init__()
        size = config.head_size
        self.reader = Fm4nppFeatureReader(config)
        self.norm = Fm4nppRMSNorm(size, eps=config.layer_norm_eps)
        self.is_joint = config.joint_head
        self.point_network = Fm4nppMLP(config, size) if self.is_joint else Fm4nppFeedForward(config)
        self.prototypes = nn.Embedding(config.num_prototypes, size)
        self.positions = nn.Embedding(config.num_prototypes, size)
        self.layers = nn.ModuleList(Fm4nppRefinementLayer(config) for _ in range(config.num_refinement_layers))
        self.class_mlp = Fm4nppMLP(config, 2)
        self.mask_mlp = Fm4nppMLP(config, size)
        if self.is_joint:
            self.pid_mlp = Fm4nppMLP(config, config.num_pid_classes + 1)
            self.track_mlp = Fm4nppMLP(config, 4)
            self.noise_mlp = Fm4nppMLP(config, 2)

    def forward(self, block_outputs, is_real: torch.Tensor) -> Fm4nppTrackFindingOutput:
        """Outputs without loss. `is_real` (batch, length): false at padding."""
        inputs = self.norm(self.reader(block_outputs))
        points = self.point_network(inputs) if self.is_joint else inputs + self.point_network(inputs)
        positions = self.positions.weight
        prototypes = self.prototypes.weight.expand(len(points), -1, -1)
        predictions = [self.predict(prototypes, points)]
        for layer in self.layers:
            _, mask_logits = predictions[-1]
            bias = torch.log(mask_logits.float().sigmoid() + LOG_EPS).transpose(1, 2).to(points.dtype)
            bias = bias.masked_fill(~is_real.unsqueeze(1), torch.finfo(points.dtype).min)
            prototypes = layer(prototypes, positions, points, bias.unsqueeze(1))
            predictions.append(self.predict(prototypes, points))
        class_logits, mask_logits = zip(*predictions)
        return Fm4nppTrackFindingOutput(
            class_logits=class_logits[-1],
            mask_logits=mask_logits[-1],
            auxiliary_class_logits=class_logits[:-1],
            auxiliary_mask_logits=mask_logits[:-1],
            prototypes=prototypes,
            point_features=points,
            pid_logits=self.pid_mlp(prototypes) if self.is_joint else None,
            track_parameters=self.track_mlp(prototypes) if self.is_joint else None,
            noise_logits=self.noise_mlp(inputs) if self.is_joint else None,
        )

    def predict(self, prototypes: torch.Tensor, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of the classes, (batch, prototypes, 2), and of the masks, (batch, length, prototypes)."""
        return self.class_mlp(prototypes), points @ self.mask_mlp(prototypes).transpose(1, 2)


class Fm4nppPointHead(nn.Module):
    """Attention among the points, then an MLP for each."""

    def __init__(self, config: Fm4nppConfig):
        super().__init__()
        self.reader = Fm4nppFeatureReader(config)
        self.layers = nn.ModuleList(Fm4nppPointAttention(config) for _ in range(config.num_attention_layers))
        self.norm = Fm4nppRMSNorm(config.head_size, eps=config.layer_norm_eps)
        self.mlp = Fm4nppMLP(config, config.num_labels)

    def forward(self, block_outputs, is_real: torch.Tensor) -> torch.Tensor:
        """Logits (batch, length, num_labels). `is_real` (batch, length): false at padding."""
        states = self.reader(block_outputs)
        attention_mask = None
        if not bool(is_real.all()):
            attention_mask = torch.zeros_like(is_real, dtype=states.dtype)
            attention_mask = attention_mask.masked_fill(~is_real, torch.finfo(states.dtype).min)[:, None, None, :]
        for layer in self.layers:
            states = layer(states, attention_mask)
        return self.mlp(self.norm(states))


# Losses


def mask_losses(
    logits: torch.Tensor, targets: torch.Tensor, is_real: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Dice and focal loss of masks (masks, length) against points that belong to them (masks, length), 0 or 1. Padding
    counts nowhere.
    """
    is_real = is_real.to(logits.dtype)
    probabilities, targets = logits.sigmoid() * is_real, targets * is_real
    overlap, total = (probabilities * targets).sum(dim=-1), (probabilities + targets).sum(dim=-1)
    dice = 1 - (2 * overlap + LOG_EPS) / (total + LOG_EPS)
    missed, claimed = focal_costs(logits, probabilities)
    focal = (missed * targets + claimed * (1 - targets)).sum(dim=-1) / is_real.sum(dim=-1)
    return dice, focal


def focal_costs(logits: torch.Tensor, probabilities: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Focal loss (arXiv:1708.02002) of points that belong to a mask and of points that do not, elementwise."""
    # from the logits, because 1 - p is 0 long before its logarithm ends
    missed = FOCAL_ALPHA * (1 - probabilities) ** FOCAL_GAMMA * nn.functional.softplus(-logits).clamp(max=100)
    claimed = (1 - FOCAL_ALPHA) * probabilities**FOCAL_GAMMA * nn.functional.softplus(logits).clamp(max=100)
    return missed, claimed


class Fm4nppHungarianMatcher:
    """
    Assigns every track of an event to one prototype such that the sum of their costs is least.

    Args:
        config: costs of class, dice and focal loss; and whether padding is a track without points (as published).
    """

    def __init__(self, config: Fm4nppConfig):
        self.class_cost = config.match_class_cost
        self.dice_cost = config.match_dice_cost
        self.focal_cost = config.match_focal_cost
        self.match_padding = config.match_padding

    def tracks(self, track_labels: torch.Tensor, is_real: torch.Tensor) -> list[torch.Tensor]:
        """The distinct ids of every event of (batch, length), ascending; -100 is none, except for matched padding."""
        counted = torch.ones_like(is_real) if self.match_padding else is_real & (track_labels != -100)
        return [labels[is_counted].unique() for labels, is_counted in zip(track_labels, counted)]

    def costs(
        self,
        class_logits: torch.Tensor,
        mask_logits: torch.Tensor,
        track_labels: torch.Tensor,
        is_real: torch.Tensor,
        tracks: torch.Tensor,
    ) -> torch.Tensor:
        """Cost of every pair of one event, (num_prototypes, tracks): logits without batch axis, ids (length,)."""
        belongs = ((track_labels == tracks.unsqueeze(-1)) & is_real).to(mask_logits.dtype).t()  # (length, tracks)
        is_real = is_real.to(mask_logits.dtype).unsqueeze(-1)
        logits, probabilities = mask_logits.t(), (mask_logits.sigmoid() * is_real).t()  # (prototypes, length)
        total = probabilities.sum(dim=1, keepdim=True) + belongs.sum(dim=0)
        dice = 1 - (2 * (probabilities @ belongs) + LOG_EPS) / (total + LOG_EPS)
        missed, claimed = focal_costs(logits, probabilities)
        focal = (missed @ belongs + claimed @ (1 - belongs)) / is_real.sum()
        is_track = class_logits.softmax(dim=-1)[:, TRACK, None]
        return self.class_cost * -is_track + self.dice_cost * dice + self.focal_cost * focal

    @torch.no_grad()
    def __call__(
        self, class_logits: torch.Tensor, mask_logits: torch.Tensor, track_labels: torch.Tensor, is_real: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Matched pairs of a batch, `min(num_prototypes, tracks)` for every event.

        Args:
            class_logits (`(batch, num_prototypes, 2)`), mask_logits (`(batch, length, num_prototypes)`)
            track_labels, is_real (`(batch, length)`)

        Returns:
            Index of the event, index of the prototype, and id of the track, of every pair.
        """
        pairs = []
        for event, tracks in enumerate(self.tracks(track_labels, is_real)):
            inputs = (values[event].float() for values in (class_logits, mask_logits))
            costs = self.costs(*inputs, track_labels[event], is_real[event], tracks)
            if not bool(costs.isfinite().all()):
                raise ValueError(f"event {event}: predictions are not finite, no track can be matched")
            prototypes, columns = (torch.from_numpy(index) for index in linear_sum_assignment(costs.cpu().numpy()))
            pairs.append((torch.full_like(prototypes, event), prototypes, tracks.cpu()[columns]))
        return tuple(torch.cat(values).to(track_labels.device) for values in zip(*pairs))


# Models


class Fm4nppPreTrainedModel(PreTrainedModel):
    config: Fm4nppConfig
    base_model_prefix = "model"
    main_input_name = "points"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Fm4nppBlock"]
    _skip_keys_device_placement = ["cache_params"]
    _supports_sdpa = True
    _supports_attention_backend = True
    # decays and steps are exponentials of these
    _keep_in_fp32_modules_strict = ["A_log", "dt_bias"]

    def save_pretrained(self, save_directory, **kwargs):
        """As `PreTrainedModel.save_pretrained`; the folder opens with every Auto class, not only that of this model."""
        module = __name__.split(".")[-1]
        self.config.auto_map = {auto_class: f"{module}.{name}" for auto_class, name in AUTO_CLASSES.items()}
        super().save_pretrained(save_directory, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """Linear layers as PyTorch starts them, operators as Mamba does; see the switches of the configuration."""
        config = self.config
        # the published initialisation of the operators' A caught every name with a capital A, such as `SA_layers`
        is_narrow = config.published_attention_init and isinstance(self, Fm4nppForTokenClassification)
        if is_narrow and isinstance(module, (Fm4nppAttentionInput, Fm4nppAttentionOutput, Fm4nppPointNorm)):
            init.uniform_(module.weight, -0.1 / 3, 0.1 / 3)
            init.uniform_(module.bias, -0.1 / 3, 0.1 / 3)
        elif isinstance(module, (Fm4nppAttentionInput, Fm4nppAttentionOutput)):
            # as parts of a matrix (3 size, size); outputs with the gain of the published heads
            size, gain = module.in_features, 1 / math.sqrt(3)
            is_output = isinstance(module, Fm4nppAttentionOutput)
            bound = gain * math.sqrt(6 / (2 * size)) if is_output else math.sqrt(6 / (4 * size))
            init.uniform_(module.weight, -bound, bound)
            init.zeros_(module.bias)
        elif isinstance(module, (nn.Linear, nn.Conv1d)):
            bound = 1 / math.sqrt(module.weight[0].numel())
            init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                bound = 0.0 if config.zero_initial_biases else bound
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight)
        elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            init.ones_(module.weight)
            if isinstance(module, nn.LayerNorm):
                init.zeros_(module.bias)
        elif isinstance(module, Fm4nppFeatureReader):
            init.ones_(module.layer_weights)
        elif isinstance(module, Fm4nppEmbedder):
            std = 0.02 if config.embedding_method == "legacy" else 1.0
            for name in ("energy_projection", "position_projection", "output_projection"):
                if hasattr(module, name):
                    init.normal_(getattr(module, name), std=std)
        # these come after the modules inside them
        elif isinstance(module, Fm4nppMamba1Mixer):
            init.copy_(module.A_log, torch.arange(1, config.state_size + 1).log().expand(config.inner_size, -1))
            init.ones_(module.D)
            bound = config.time_step_rank**-0.5
            init.uniform_(module.dt_proj.weight, -bound, bound)
            init.copy_(module.dt_proj.bias, self._initial_steps(config.inner_size))
        elif isinstance(module, Fm4nppMamba2Mixer):
            init.copy_(module.A_log, torch.empty(config.num_ssm_heads).uniform_(1, 16).log())
            init.ones_(module.D)
            init.copy_(module.dt_bias, self._initial_steps(config.num_ssm_heads))
            if config.mup_initialization:
                width, state_size = config.hidden_size, config.state_size
                begin = 2 * config.inner_size
                B, C = module.in_proj.weight[begin:].split([state_size, state_size, config.num_ssm_heads])[:2]
                init.normal_(B, std=math.sqrt(state_size / width))
                init.normal_(C, std=math.sqrt(1 / (width * state_size)))

    def _initial_steps(self, size: int) -> torch.Tensor:
        """What softplus turns into steps spread evenly in the logarithm."""
        config = self.config
        if config.zero_initial_biases:
            return torch.zeros(size)
        low, high = math.log(config.time_step_min), math.log(config.time_step_max)
        steps = torch.empty(size).uniform_(low, high).exp().clamp(min=config.time_step_floor)
        return steps + torch.log(-torch.expm1(-steps))


class Fm4nppModel(Fm4nppPreTrainedModel):
    """The bare backbone: points of an event to hidden states and block outputs."""

    def __init__(self, config: Fm4nppConfig):
        super().__init__(config)
        # one choice for all blocks, logged
        self.backend = resolve_backend(config.kernel_backend, config.ssm)
        self.embedder = Fm4nppEmbedder(config)
        self.layers = nn.ModuleList(
            Fm4nppBlock(config, index, self.backend) for index in range(config.num_hidden_layers)
        )
        self.norm_f = Fm4nppRMSNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        points: torch.FloatTensor,
        attention_mask: torch.Tensor | None = None,
        cache_params: Fm4nppCache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> Fm4nppModelOutput:
        r"""
        Args:
            points (`(batch, length, 4)`): normalised (E, eta, phi, r) in the order of the feature extractor; float32
                for a model of any dtype.
            attention_mask (`(batch, length)`): 1 for points, 0 for the padding behind them, whose values do not matter.
            cache_params: of the points before, where events come in pieces; it is not changed.
            use_cache (`bool`): return `cache_params` (also if some were given).
            output_hidden_states (`bool`): return the residual stream.
        """
        check_points(points)
        attention_mask = check_mask(attention_mask, points, may_be_empty=cache_params is not None)
        if attention_mask is not None:
            points = points.masked_fill(attention_mask.unsqueeze(-1) == 0, 0.0)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if (use_cache or cache_params is not None) and self.gradient_checkpointing and self.training:
            raise ValueError("`cache_params` cannot be used with gradient checkpointing, which runs blocks twice")
        if cache_params is not None:
            cache_params = cache_params.copy()
        elif use_cache:
            cache_params = Fm4nppCache(self.config.num_hidden_layers)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states

        hidden_states = self.embedder(points)
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            # the embedder is not trained, and a reentrant checkpoint of inputs without gradient would have none at all
            hidden_states.requires_grad_()
        block_outputs, all_hidden_states = [], [hidden_states]
        for layer in self.layers:
            output = layer(hidden_states, attention_mask=attention_mask, cache_params=cache_params)
            hidden_states = hidden_states + output
            block_outputs.append(output)
            if output_hidden_states:
                all_hidden_states.append(hidden_states)
        return Fm4nppModelOutput(
            last_hidden_state=self.norm_f(hidden_states),
            block_outputs=tuple(block_outputs),
            hidden_states=tuple(all_hidden_states) if output_hidden_states else None,
            cache_params=cache_params,
        )


class Fm4nppForPreTraining(Fm4nppPreTrainedModel):
    """
    The backbone and a linear layer that predicts, for every point, the coordinates of the nearest of the points with a
    larger radius.
    """

    def __init__(self, config: Fm4nppConfig):
        super().__init__(config)
        self.model = Fm4nppModel(config)
        self.neighbor_head = nn.Linear(config.hidden_size, 3 * config.num_neighbors)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        points: torch.FloatTensor,
        attention_mask: torch.Tensor | None = None,
        neighbor_labels: torch.FloatTensor | None = None,
        cache_params: Fm4nppCache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> Fm4nppPreTrainingOutput:
        r"""
        Args:
            neighbor_labels (`(batch, length, 3 num_neighbors)`): normalised (eta, phi, r) of the nearest point with a
                larger radius, of the second nearest, and so on; -100 where there is none and at padding.

        The other arguments are those of [`Fm4nppModel`].
        """
        outputs: Fm4nppModelOutput = self.model(
            points,
            attention_mask=attention_mask,
            cache_params=cache_params,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        predictions = self.neighbor_head(outputs.last_hidden_state)
        loss = loss_per_event = None
        if neighbor_labels is not None:
            if neighbor_labels.shape != predictions.shape:
                raise ValueError(
                    f"`neighbor_labels` has shape {tuple(neighbor_labels.shape)}, expected {tuple(predictions.shape)}"
                )
            loss, loss_per_event = self._neighbor_loss(predictions, neighbor_labels, attention_mask)
        return Fm4nppPreTrainingOutput(
            loss=loss,
            predictions=predictions,
            loss_per_event=loss_per_event,
            hidden_states=outputs.hidden_states,
            cache_params=outputs.cache_params,
        )

    def _neighbor_loss(self, predictions, targets, attention_mask) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean squared error over all target numbers of the batch, or the weighted mean of that of the events."""
        config = self.config
        batch_size, length = predictions.shape[:2]
        if attention_mask is None:
            num_points = torch.full((batch_size,), length, device=predictions.device)
        else:
            num_points = attention_mask.sum(dim=1)
        predictions, targets = predictions[:, : length - config.label_shift], targets[:, config.label_shift :]
        is_target = targets != -100
        errors = (predictions.float() - targets.float()).square().masked_fill(~is_target, 0.0).sum(dim=(1, 2))
        counts = is_target.sum(dim=(1, 2))
        # an event without any neighbour has no error
        loss_per_event = errors / counts.clamp(min=1)
        if config.loss_reweight:
            loss = (loss_per_event * self.event_weights(num_points)).mean()
        else:
            loss = errors.sum() / counts.sum().clamp(min=1)
        return config.loss_scale * loss, loss_per_event

    def event_weights(self, num_points: torch.Tensor) -> torch.Tensor:
        """Weight of events with these numbers of points: that of the bin [low, high), 0 outside of all bins."""
        edges = torch.tensor(self.config.loss_bin_edges, dtype=torch.float32, device=num_points.device)
        weights = torch.tensor([0.0, *self.config.loss_bin_weights, 0.0], device=num_points.device)
        return weights[torch.bucketize(num_points.float(), edges, right=True)]


class Fm4nppHeadModel(Fm4nppPreTrainedModel):
    """What the models with a head share: the backbone, which may be frozen, or what it put out earlier."""

    def __init__(self, config: Fm4nppConfig):
        super().__init__(config)
        self.model = Fm4nppModel(config) if config.use_backbone else None
        self.train(self.training)

    def train(self, mode: bool = True):
        """As of any module; a frozen backbone stays in evaluation mode, and the norm that no head reads is frozen."""
        super().train(mode)
        # also after loading, which makes new parameters
        if self.model is not None and self.config.freeze_backbone:
            self.model.eval().requires_grad_(False)
        elif self.model is not None:
            self.model.norm_f.requires_grad_(False)
        return self

    def backbone_features(self, points, attention_mask, block_outputs):
        """Block outputs, computed or given, and (batch, length) that is true at points."""
        config = self.config
        if block_outputs is None:
            if self.model is None:
                raise ValueError("this head has no backbone (`use_backbone`), expected `block_outputs`")
            if points is None:
                raise ValueError("expected either `points` or `block_outputs`")
            with torch.set_grad_enabled(torch.is_grad_enabled() and not config.freeze_backbone):
                outputs = self.model(points, attention_mask=attention_mask, use_cache=False, return_dict=True)
                block_outputs = outputs.block_outputs
        else:
            shapes = [tuple(output.shape) for output in block_outputs]
            if len(set(shapes)) > 1:
                raise ValueError(f"`block_outputs` has the shapes {', '.join(map(str, shapes))}, expected one for all")
            shape = (len(shapes), *(shapes[0] if shapes else ()))
            if len(shape) != 4 or 0 in shape or shape[::3] != (config.num_hidden_layers, config.hidden_size):
                raise ValueError(
                    f"`block_outputs` has shape {shape}, expected ({config.num_hidden_layers}, batch, length, "
                    f"{config.hidden_size})"
                )
        first = block_outputs[0]
        attention_mask = check_mask(attention_mask, first)
        is_real = torch.ones(first.shape[:2], dtype=torch.bool, device=first.device)
        return block_outputs, is_real if attention_mask is None else attention_mask.bool()


class Fm4nppForTrackFinding(Fm4nppHeadModel):
    """
    Track finding as instance segmentation of the points: prototypes with a class and a mask, matched with the tracks.

    `from_pretrained` of a pre-trained checkpoint initialises the backbone; `freeze_backbone` trains the head only.
    """

    def __init__(self, config: Fm4nppConfig):
        super().__init__(config)
        self.head = Fm4nppTrackHead(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        points: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        track_labels: torch.LongTensor | None = None,
        block_outputs: torch.FloatTensor | tuple[torch.FloatTensor, ...] | None = None,
        true_pid: torch.LongTensor | None = None,
        true_noise: torch.LongTensor | None = None,
        true_track_parameters: torch.FloatTensor | None = None,
    ) -> Fm4nppTrackFindingOutput:
        r"""
        Args:
            points, attention_mask: as of [`Fm4nppModel`].
            track_labels (`(batch, length)`): id of the track of every point, any integers; -100 for points without one
                and padding.
            block_outputs (`(layers, batch, length, hidden_size)`): of the backbone, instead of `points`.
            true_pid (`(batch, length)`): particle of every point, for a joint head; a track is what most of its
                points are. -100 for points without one and padding.
            true_noise (`(batch, length)`): 1 for noise, 0 for signal, for a joint head; -100 for neither.
            true_track_parameters (`(batch, length, 4)`): of the track of every point, for a joint head; -100 for
                points without.
        """
        # not called labels: `Trainer` would expect those of every argument of such a name
        joint_labels = {
            "true_pid": true_pid,
            "true_noise": true_noise,
            "true_track_parameters": true_track_parameters,
        }
        joint_labels = {name: labels for name, labels in joint_labels.items() if labels is not None}
        if joint_labels and not (self.config.joint_head and track_labels is not None):
            raise ValueError(f"`{next(iter(joint_labels))}` needs a head with `joint_head`, and `track_labels`")
        block_outputs, is_real = self.backbone_features(points, attention_mask, block_outputs)
        outputs: Fm4nppTrackFindingOutput = self.head(block_outputs, is_real)
        if track_labels is not None:
            check_labels("track_labels", track_labels, is_real)
            class_logits = (outputs.class_logits, *outputs.auxiliary_class_logits)
            mask_logits = (outputs.mask_logits, *outputs.auxiliary_mask_logits)
            terms = [self._track_losses(*logits, track_labels, is_real) for logits in zip(class_logits, mask_logits)]
            outputs.loss_terms = torch.stack(terms)
            outputs.loss = outputs.loss_terms[:, -1].sum()
        if joint_labels:
            outputs.joint_loss_terms = self._joint_losses(outputs, track_labels, is_real, **joint_labels)
            weights = [self.config.track_parameter_weight, self.config.pid_weight, self.config.noise_weight]
            outputs.loss = outputs.loss + outputs.joint_loss_terms @ outputs.loss.new_tensor(weights)
        return outputs

    def _track_losses(self, class_logits, mask_logits, track_labels, is_real) -> torch.Tensor:
        """The four losses of one prediction, summed over its prototypes and divided by the batch, and their sum."""
        config = self.config
        with torch.autocast(class_logits.device.type, enabled=False):
            class_logits, mask_logits = class_logits.float(), mask_logits.float()
            matcher = Fm4nppHungarianMatcher(config)
            events, prototypes, tracks = matcher(class_logits, mask_logits, track_labels, is_real)
            log_classes = torch.log(class_logits.softmax(dim=-1) + LOG_EPS)
            is_matched = torch.zeros_like(class_logits[..., 0], dtype=torch.bool)
            is_matched[events, prototypes] = True
            belongs = (track_labels[events] == tracks.unsqueeze(-1)).to(mask_logits.dtype)
            dice, focal = mask_losses(mask_logits[events, :, prototypes], belongs, is_real[events])
            losses = torch.stack(
                [
                    -log_classes[..., TRACK].masked_fill(~is_matched, 0.0).sum(),
                    -log_classes[..., NO_OBJECT].masked_fill(is_matched, 0.0).sum(),
                    dice.sum(),
                    focal.sum(),
                ]
            ) / len(class_logits)
            weights = losses.new_tensor(
                [config.matched_class_weight, config.unmatched_class_weight, config.dice_weight, config.focal_weight]
            )
            return torch.cat([losses, (losses @ weights).unsqueeze(0)])

    def _joint_losses(
        self, outputs, track_labels, is_real, true_pid=None, true_noise=None, true_track_parameters=None
    ) -> torch.Tensor:
        """
        Of the final prediction: distance of the track parameters and negative logarithm of the particle's probability,
        of the matched prototypes, summed and divided by the batch; cross entropy of the noise. 0 without labels.
        """
        num_classes = self.config.num_pid_classes
        with torch.autocast(outputs.class_logits.device.type, enabled=False):
            class_logits, mask_logits = outputs.class_logits.float(), outputs.mask_logits.float()
            matcher = Fm4nppHungarianMatcher(self.config)
            events, prototypes, tracks = matcher(class_logits, mask_logits, track_labels, is_real)
            belongs = (track_labels[events] == tracks.unsqueeze(-1)) & is_real[events]  # (pairs, length)
            parameter_loss = particle_loss = noise_loss = class_logits.new_zeros(())
            if true_track_parameters is not None:
                if true_track_parameters.shape != (*is_real.shape, 4):
                    raise ValueError(
                        f"`true_track_parameters` has shape {tuple(true_track_parameters.shape)}, expected "
                        f"{(*is_real.shape, 4)}"
                    )
                has_labels = belongs & (true_track_parameters[events] != -100).all(dim=-1)
                counts = has_labels.sum(dim=1, keepdim=True)
                # all points of a track have the same ones
                sums = true_track_parameters[events].float().masked_fill(~has_labels.unsqueeze(-1), 0.0).sum(dim=1)
                distances = (outputs.track_parameters[events, prototypes].float() - sums / counts.clamp(min=1)).abs()
                parameter_loss = distances.mean(dim=1).masked_fill(counts[:, 0] == 0, 0.0).sum() / len(is_real)
            if true_pid is not None:
                check_labels("true_pid", true_pid, is_real, num_classes)
                has_labels = belongs & (true_pid[events] != -100)
                votes = nn.functional.one_hot(true_pid.long().clamp(0, num_classes - 1), num_classes)[events]
                votes = votes.masked_fill(~has_labels.unsqueeze(-1), 0).sum(dim=1)
                probabilities = outputs.pid_logits[events, prototypes].float().softmax(dim=-1)
                chosen = probabilities.gather(1, votes.argmax(dim=1, keepdim=True))[:, 0]
                particle_loss = -torch.log(chosen + LOG_EPS).masked_fill(votes.sum(dim=1) == 0, 0.0)
                particle_loss = particle_loss.sum() / len(is_real)
            if true_noise is not None:
                check_labels("true_noise", true_noise, is_real, 2)
                labels = true_noise.long().masked_fill(~is_real, -100)
                losses = nn.functional.cross_entropy(
                    outputs.noise_logits.float().transpose(1, 2), labels, reduction="none"
                )
                noise_loss = losses.sum() / (labels != -100).sum().clamp(min=1)
            return torch.stack([parameter_loss, particle_loss, noise_loss])

    @torch.no_grad()
    def assign_tracks(
        self, outputs: Fm4nppTrackFindingOutput, attention_mask: torch.Tensor | None = None, use_classes: bool = True
    ) -> torch.LongTensor:
        """
        Index of the prototype that a point belongs to, (batch, length); -1 for none and padding.

        Args:
            use_classes: choose by the product of the probabilities of mask and class among the prototypes that are
                tracks (published "option 2"); otherwise by the mask alone, where every point belongs somewhere.
        """
        scores = outputs.mask_logits.float().sigmoid()
        if use_classes:
            class_probabilities, classes = outputs.class_logits.float().softmax(dim=-1).max(dim=-1)
            scores = scores * torch.where(classes == NO_OBJECT, -1.0, class_probabilities).unsqueeze(1)
        best, prototypes = scores.max(dim=-1)
        is_assigned = best > 0
        if attention_mask is not None:
            is_assigned = is_assigned & attention_mask.bool()
        return prototypes.masked_fill(~is_assigned, -1)


class Fm4nppForTokenClassification(Fm4nppHeadModel):
    """Classes of points: particles (other, pion, kaon, proton, electron) or signal and noise (`num_labels`)."""

    def __init__(self, config: Fm4nppConfig):
        if config.class_weights is not None and len(config.class_weights) != config.num_labels:
            raise ValueError(
                f"`class_weights` has {len(config.class_weights)} numbers, expected `num_labels` = {config.num_labels}"
            )
        super().__init__(config)
        self.num_labels = config.num_labels
        self.head = Fm4nppPointHead(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        points: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        block_outputs: torch.FloatTensor | tuple[torch.FloatTensor, ...] | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> TokenClassifierOutput:
        r"""
        Args:
            points, attention_mask: as of [`Fm4nppModel`].
            labels (`(batch, length)`): class of every point, -100 for padding and points that do not count.
            block_outputs (`(layers, batch, length, hidden_size)`): of the backbone, instead of `points`.
            num_items_in_batch: number of labels in the whole batch, for gradient accumulation.
        """
        block_outputs, is_real = self.backbone_features(points, attention_mask, block_outputs)
        logits = self.head(block_outputs, is_real)
        loss = None
        if labels is not None:
            check_labels("labels", labels, is_real, self.num_labels)
            loss = self._point_loss(logits, labels.long().masked_fill(~is_real, -100), num_items_in_batch)
        return TokenClassifierOutput(loss=loss, logits=logits)

    def _point_loss(self, logits, labels, num_items_in_batch) -> torch.Tensor:
        """Cross entropy, or focal loss, of the labelled points."""
        weights = self.config.class_weights
        weights = None if weights is None else torch.tensor(weights, dtype=torch.float32, device=logits.device)
        logits, labels = logits.flatten(0, 1).float(), labels.flatten()
        losses = nn.functional.cross_entropy(logits, labels, reduction="none")
        if self.config.focal_gamma:
            losses = losses * (1 - torch.exp(-losses)) ** self.config.focal_gamma
        if weights is not None:
            losses = losses * weights[labels.clamp(min=0)]
        num_items = (labels != -100).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return losses.sum() / num_items


# Checks


def check_points(points: torch.Tensor):
    if points.ndim != 3 or points.shape[2] != NUM_FEATURES or 0 in points.shape:
        raise ValueError(f"`points` has shape {tuple(points.shape)}, expected (batch, length, {NUM_FEATURES})")
    if points.dtype in (torch.bfloat16, torch.float16):
        logger.warning_once(
            f"`points` are {points.dtype}, which moves them (bfloat16: by up to 7 mm in phi at a radius of 60 cm); "
            "keep them in float32, also for models of half precision"
        )


def check_mask(
    attention_mask: torch.Tensor | None, inputs: torch.Tensor, may_be_empty: bool = False
) -> torch.Tensor | None:
    """A mask (batch, length) with all its zeros at the ends of the rows; `None` if it has none."""
    if attention_mask is None:
        return None
    if attention_mask.shape != inputs.shape[:2]:
        raise ValueError(
            f"`attention_mask` has shape {tuple(attention_mask.shape)}, expected {tuple(inputs.shape[:2])}"
        )
    if bool((attention_mask == 1).all()):
        return None
    is_wrong = ((attention_mask != 0) & (attention_mask != 1)).any(dim=1)
    attention_mask = attention_mask.long()
    is_wrong |= (attention_mask[:, 1:] > attention_mask[:, :-1]).any(dim=1)
    if bool(is_wrong.any()):
        event = int(is_wrong.nonzero()[0])
        raise ValueError(f"`attention_mask` of event {event}: expected ones for its points, then zeros for the padding")
    if not may_be_empty and not bool(attention_mask[:, 0].all()):
        event = int((attention_mask[:, 0] == 0).nonzero()[0])
        raise ValueError(f"`attention_mask` of event {event} has no point, expected events with at least one")
    return attention_mask


def check_labels(name: str, labels: torch.Tensor, is_real: torch.Tensor, num_classes: int | None = None):
    """Integers of the shape of `is_real`; of real points -100 or below `num_classes`, if there are classes."""
    if labels.shape != is_real.shape:
        raise ValueError(f"`{name}` has shape {tuple(labels.shape)}, expected {tuple(is_real.shape)}")
    if labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"`{name}` has dtype {labels.dtype}, expected integers")
    if num_classes is not None:
        # kernels would read beyond the end of the logits
        is_wrong = is_real & (labels != -100) & ((labels < 0) | (labels >= num_classes))
        if bool(is_wrong.any()):
            event, point = is_wrong.nonzero()[0].tolist()
            raise ValueError(
                f"`{name}` of event {event}, point {point} is {int(labels[event, point])}, expected 0 to "
                f"{num_classes - 1}, or -100"
            )


__all__ = [
    "Fm4nppCache",
    "Fm4nppPreTrainedModel",
    "Fm4nppModel",
    "Fm4nppForPreTraining",
    "Fm4nppForTrackFinding",
    "Fm4nppForTokenClassification",
    "Fm4nppHungarianMatcher",
    "encode_positions",
]

# `save_pretrained` then writes this code beside the weights, so that they load anywhere with `trust_remote_code=True`
Fm4nppConfig.register_for_auto_class()
for _auto_class, _model_class in AUTO_CLASSES.items():
    globals()[_model_class].register_for_auto_class(_auto_class)
