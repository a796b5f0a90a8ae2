"""Attention written out, for `attn_implementation="eager"`."""

import torch
from torch import nn


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Args:
        query, key, value (`(batch, heads, length, head_dim)`).
        attention_mask: added to the scores, (batch or 1, heads or 1, queries, keys).

    Returns:
        output (`(batch, queries, heads, head_dim)`), weights (`(batch, heads, queries, keys)`), in the dtype of
        `query`; the softmax is float32.
    """
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights
