"""Heads and taggers of OmniJetForSequenceClassification: arXiv:2403.05618 and what it compares with."""

import torch
from torch import nn

from .configuration_omnijet import OmniJetConfig
from .modeling_omnijet_vqvae import OmniJetVQVAENormFormerLayer, masked


def additive_mask(is_real: torch.Tensor, dtype: torch.dtype, is_causal: bool = False) -> torch.Tensor:
    """
    Mask to add to the scores, (batch, 1, length or 1, length), from one, (batch, length), that is 0 at padding.

    A query that may see nothing attends uniformly, so that no NaN comes from it.
    """
    is_hidden = (is_real == 0)[:, None, None, :]
    if is_causal:
        length = is_real.shape[1]
        is_hidden = is_hidden | torch.ones(length, length, dtype=torch.bool, device=is_real.device).triu(1)
    return torch.zeros_like(is_hidden, dtype=dtype).masked_fill(is_hidden, torch.finfo(dtype).min)


class OmniJetClassAttention(nn.Module):
    """The attention of a class token: (batch, 1, size) to (batch, length, size)."""

    def __init__(self, size: int, num_heads: int, dropout: float):
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.qkv_proj = nn.Linear(size, 3 * size)
        self.o_proj = nn.Linear(size, size)

    def forward(self, token: torch.Tensor, states: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        size = token.shape[-1]
        weights, bias = self.qkv_proj.weight, self.qkv_proj.bias
        query = nn.functional.linear(token, weights[:size], bias[:size])
        key, value = nn.functional.linear(states, weights[size:], bias[size:]).chunk(2, dim=-1)
        query, key, value = (
            states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for states in (query, key, value)
        )
        output = nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, dropout_p=self.dropout if self.training else 0.0
        )
        return self.o_proj(output.transpose(1, 2).flatten(2))


class OmniJetClassAttentionBlock(nn.Module):
    """A class token reads normed states; what it held before is replaced (the published block has no residual)."""

    def __init__(self, config: OmniJetConfig):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = OmniJetClassAttention(config.hidden_size, config.class_attention_heads, config.classifier_dropout)

    def forward(self, token: torch.Tensor, states: torch.Tensor, is_real: torch.Tensor) -> torch.Tensor:
        """`token` (batch, 1, size), `states` (batch, length, size), `is_real` (batch, length); returns the token."""
        is_real = nn.functional.pad(is_real, (1, 0), value=1)
        states = self.norm(masked(torch.cat([token, states], dim=1), is_real))
        return self.attn(token, states, additive_mask(is_real, states.dtype))


class OmniJetClassAttentionHead(nn.Module):
    """A learned class token attends to the states, then an MLP."""

    def __init__(self, config: OmniJetConfig, act_first: bool):
        super().__init__()
        size = config.hidden_size
        self.token = nn.Parameter(torch.zeros(1, 1, size))
        self.blocks = nn.ModuleList(OmniJetClassAttentionBlock(config) for _ in range(config.class_attention_layers))
        layers = []
        for width in config.classifier_sizes:
            dropout = nn.Dropout(config.classifier_dropout)
            layers += [nn.Linear(size, width), *([nn.SiLU(), dropout] if act_first else [dropout, nn.ReLU()])]
            size = width
        self.mlp = nn.Sequential(*layers, nn.Linear(size, config.num_labels))

    def forward(self, states: torch.Tensor, is_real: torch.Tensor) -> torch.Tensor:
        """(batch, length, hidden_size) to logits, (batch, num_labels)."""
        token = self.token.expand(len(states), -1, -1)
        for block in self.blocks:
            token = block(token, states, is_real)
        return self.mlp(token.squeeze(1))


class OmniJetSummationHead(nn.Module):
    """Sum over the real positions of an embedding of each; the published choice."""

    def __init__(self, config: OmniJetConfig):
        super().__init__()
        self.embed = nn.Linear(config.hidden_size, config.hidden_size)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, states: torch.Tensor, is_real: torch.Tensor) -> torch.Tensor:
        """(batch, length, hidden_size) to logits, (batch, num_labels)."""
        return self.classifier(masked(torch.relu(self.embed(states)), is_real).sum(dim=1))


class OmniJetParticleFlow(nn.Module):
    """Deep sets (arXiv:1810.05165) over continuous features or ids, sizes of arXiv:2403.05618."""

    def __init__(self, config: OmniJetConfig):
        super().__init__()
        size = config.num_features
        self.embed_tokens = None
        if size == 0:
            size = config.token_embedding_size
            self.embed_tokens = nn.Embedding(config.vocab_size, size)
        self.particle = nn.ModuleList([nn.Linear(size, 100), nn.Linear(100, 100), nn.Linear(100, 256)])
        self.jet = nn.ModuleList([nn.Linear(256, 100), nn.Linear(100, 100), nn.Linear(100, 100)])
        self.classifier = nn.Linear(100, config.num_labels)

    def forward(self, inputs: torch.Tensor, is_real: torch.Tensor) -> torch.Tensor:
        """Features (batch, length, num_features) or ids (batch, length) to logits, (batch, num_labels)."""
        states = inputs if self.embed_tokens is None else self.embed_tokens(inputs)
        for layer in self.particle:
            states = torch.relu(layer(states))
        states = masked(states, is_real).sum(dim=1)
        for layer in self.jet:
            states = torch.relu(layer(states))
        return self.classifier(states)


class OmniJetNormFormerTagger(nn.Module):
    """NormFormer blocks over continuous features and a class-attention head."""

    def __init__(self, config: OmniJetConfig):
        super().__init__()
        self.input_projection = nn.Linear(config.num_features, config.hidden_size)
        self.layers = nn.ModuleList(
            OmniJetVQVAENormFormerLayer(config, is_causal=False) for _ in range(config.num_hidden_layers)
        )
        self.head = OmniJetClassAttentionHead(config, act_first=False)

    def forward(self, inputs: torch.Tensor, is_real: torch.Tensor) -> torch.Tensor:
        """Features (batch, length, num_features) to logits, (batch, num_labels)."""
        states = self.input_projection(inputs)
        attention_mask = additive_mask(is_real, states.dtype)
        for layer in self.layers:
            states = layer(states, is_real, attention_mask)
        return self.head(masked(states, is_real), is_real)
