"""Network of OmniJetForPreTraining: continuous constituents in, tokens and classes out (arXiv:2512.04149)."""

import copy
from collections.abc import Sequence

import torch
from torch import nn
from transformers.cache_utils import DynamicLayer

from .configuration_omnijet import OmniJetConfig
from .modeling_omnijet_vqvae import OmniJetVQVAETransformerLayer, later_positions, masked
from .omnijet_taggers import OmniJetClassAttention, additive_mask


def resized(config: OmniJetConfig, **sizes) -> OmniJetConfig:
    """The same settings for a part of the network with other sizes."""
    config = copy.copy(config)
    for name, value in sizes.items():
        setattr(config, name, value)
    return config


class OmniJetHybridTransformer(nn.Module):
    """Gated pre-norm blocks, causal or bidirectional."""

    def __init__(self, config: OmniJetConfig):
        super().__init__()
        # the mask that is handed over says what is causal
        self.layers = nn.ModuleList(
            OmniJetVQVAETransformerLayer(config, is_causal=False) for _ in range(config.num_hidden_layers)
        )
        has_norm = config.final_norm
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if has_norm else nn.Identity()

    def forward(self, states: torch.Tensor, is_real: torch.Tensor, is_causal: bool) -> torch.Tensor:
        """`states` (batch, length, size), `is_real` (batch, length) 0 at padding."""
        attention_mask = additive_mask(is_real, states.dtype, is_causal)
        for layer in self.layers:
            states = layer(states, is_real, attention_mask)
        return self.norm(states)

    def following(self, states: torch.Tensor, past: Sequence[DynamicLayer]) -> torch.Tensor:
        """
        As the causal `forward` without padding, for positions that follow those in `past`, one entry per layer; they
        are added there.
        """
        attention_mask = later_positions(states.shape[1], states, past)
        for layer, layer_past in zip(self.layers, past, strict=True):
            states = layer(states, None, attention_mask, layer_past)
        return self.norm(states)


class OmniJetHybridBackbone(nn.Module):
    """Features of the constituents, registers in front of them, to one state per constituent."""

    def __init__(self, config: OmniJetConfig):
        super().__init__()
        self.embed_particles = nn.Linear(config.num_features, config.hidden_size)
        self.embed_jets = None
        if config.num_jet_features > 0:
            self.embed_jets = nn.Linear(config.num_jet_features, config.hidden_size, bias=False)
        self.registers = None
        if config.num_registers > 0:
            self.registers = nn.Parameter(torch.zeros(1, config.num_registers, config.hidden_size))
        self.transformer = OmniJetHybridTransformer(config)

    def forward(
        self,
        particle_features: torch.Tensor,
        is_real: torch.Tensor,
        is_causal: bool,
        jet_features: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Args:
            particle_features (`(batch, length, num_features)`), is_real (`(batch, length)`), jet_features (`(batch,
                num_jet_features)`).

        Returns (batch, length, hidden_size), 0 where `is_real` is.
        """
        states = self._embed(particle_features, jet_features)
        num_registers = states.shape[1] - is_real.shape[1]
        states = self.transformer(states, nn.functional.pad(is_real, (num_registers, 0), value=1), is_causal)
        return masked(states[:, num_registers:], is_real)

    def following(
        self, particle_features: torch.Tensor, past: Sequence[DynamicLayer], jet_features: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        As the causal `forward` without padding, for constituents that follow those in `past`, one entry per layer; they
        are added there.
        """
        states = self._embed(particle_features, jet_features, with_registers=past[0].get_seq_length() == 0)
        return self.transformer.following(states, past)[:, -particle_features.shape[1] :]

    def _embed(self, particle_features, jet_features, with_registers: bool = True) -> torch.Tensor:
        states = self.embed_particles(particle_features)
        if self.embed_jets is not None:
            states = states + self.embed_jets(jet_features).unsqueeze(1)
        if self.registers is None or not with_registers:
            return states
        return torch.cat([self.registers.expand(len(states), -1, -1).to(states.dtype), states], dim=1)


class OmniJetTokenHead(nn.Module):
    """One stack of blocks per predicted token, one output layer for all of them."""

    def __init__(self, config: OmniJetConfig, num_predictions: int):
        super().__init__()
        size = config.token_head_size
        sizes = resized(
            config,
            hidden_size=size,
            num_hidden_layers=config.token_head_layers,
            num_attention_heads=config.token_head_heads,
            intermediate_size=config.token_head_intermediate_size,
        )
        needs_projection = size != config.hidden_size
        self.projection = nn.Linear(config.hidden_size, size) if needs_projection else nn.Identity()
        self.transformers = nn.ModuleList(OmniJetHybridTransformer(sizes) for _ in range(num_predictions))
        self.output = nn.Linear(size, config.vocab_size)

    def forward(self, states: torch.Tensor, is_real: torch.Tensor, is_causal: bool) -> list[torch.Tensor]:
        """(batch, length, hidden_size) to what `output` reads, one (batch, length, token_head_size) per prediction."""
        states = self.projection(states)
        return [transformer(states, is_real, is_causal) for transformer in self.transformers]

    def following(self, states: torch.Tensor, past: Sequence[DynamicLayer]) -> torch.Tensor:
        """Logits (batch, length, vocab) of the next token alone, for positions that follow those in `past`."""
        return self.output(self.transformers[0].following(self.projection(states), past))


class OmniJetHybridClassBlock(nn.Module):
    """A class token reads the states, with residuals."""

    def __init__(self, config: OmniJetConfig):
        super().__init__()
        size, width = config.class_head_size, config.class_head_intermediate_size
        self.attention_norm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.attn = OmniJetClassAttention(size, config.class_head_heads, config.classifier_dropout)
        self.attention_output_norm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.mlp_norm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(size, width)
        self.mlp_inner_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.fc2 = nn.Linear(width, size)

    def forward(self, token: torch.Tensor, states: torch.Tensor, is_real: torch.Tensor) -> torch.Tensor:
        is_real = nn.functional.pad(is_real, (1, 0), value=1)
        states = self.attention_norm(masked(torch.cat([token, states], dim=1), is_real))
        attended = self.attn(token, states, additive_mask(is_real, states.dtype))
        token = token + self.attention_output_norm(attended)
        hidden = self.mlp_inner_norm(nn.functional.gelu(self.fc1(self.mlp_norm(token))))
        return token + self.fc2(self.dropout(hidden))


class OmniJetHybridClassHead(nn.Module):
    def __init__(self, config: OmniJetConfig):
        super().__init__()
        size = config.class_head_size
        self.projection = nn.Linear(config.hidden_size, size)
        self.token = nn.Parameter(torch.zeros(1, 1, size))
        self.blocks = nn.ModuleList(OmniJetHybridClassBlock(config) for _ in range(config.class_attention_layers))
        self.classifier = nn.Linear(size, config.num_labels)

    def forward(self, states: torch.Tensor, is_real: torch.Tensor) -> torch.Tensor:
        """(batch, length, hidden_size) to logits, (batch, num_labels)."""
        states = self.projection(states)
        token = self.token.expand(len(states), -1, -1)
        for block in self.blocks:
            token = block(token, states, is_real)
        return self.classifier(token.squeeze(1))


def masked_ranks(
    first_feature: torch.Tensor, is_real: torch.BoolTensor, is_masked: torch.BoolTensor, kind: str
) -> torch.LongTensor:
    """
    Which vector stands for each masked position, (batch, length): `kind` as `masked_position` of the configuration.
    Positions that do not count are ranked last.
    """
    if kind == "position":
        return torch.arange(first_feature.shape[1], device=first_feature.device).expand(first_feature.shape)
    counts = is_masked if kind == "rank_among_masked" else is_real
    descending = first_feature.masked_fill(~counts, -torch.inf).argsort(dim=1, descending=True, stable=True)
    return descending.argsort(dim=1)


def draw_masked(is_real: torch.BoolTensor, fraction: float) -> torch.BoolTensor:
    """int(fraction * number of real positions) of the batch, drawn at random; (batch, length), true where masked."""
    real = is_real.flatten().nonzero().squeeze(-1)
    chosen = real[torch.randperm(len(real), device=real.device)[: int(fraction * len(real))]]
    is_masked = torch.zeros_like(is_real).flatten()
    is_masked[chosen] = True
    return is_masked.view_as(is_real)
