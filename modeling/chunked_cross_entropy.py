"""Cross entropy of a large vocabulary without the logits of all positions in memory."""

import torch
from torch import nn

# Bytes of logits held at once. Of the order of the last-level cache: on a CPU the loss is bound by memory traffic.
CHUNK_BYTES = 8 * 2**20


class _ChunkedLinearCrossEntropy(torch.autograd.Function):
    """Computes the gradients in the forward pass, chunk by chunk, so that no logits are kept or computed twice."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, chunk_size):
        needs_grad = any(ctx.needs_input_grad[:3])
        dtype = torch.promote_types(weight.dtype, torch.float32)
        loss = hidden.new_zeros((), dtype=dtype)
        grad_hidden = torch.empty_like(hidden) if needs_grad else None
        grad_weight = torch.zeros_like(weight) if needs_grad else None
        grad_bias = torch.zeros_like(bias) if needs_grad and bias is not None else None
        for start in range(0, hidden.shape[0], chunk_size):
            rows = slice(start, start + chunk_size)
            log_probs = nn.functional.linear(hidden[rows], weight, bias).log_softmax(dim=-1, dtype=dtype)
            index = targets[rows, None]
            loss -= log_probs.gather(-1, index).sum()
            if needs_grad:
                # d loss / d logits = softmax - one-hot, written over the log probabilities
                grad_logits = log_probs.exp_()
                grad_logits.scatter_add_(-1, index, torch.full_like(index, -1, dtype=grad_logits.dtype))
                grad_logits = grad_logits.to(weight.dtype)
                torch.mm(grad_logits, weight, out=grad_hidden[rows])
                grad_weight.addmm_(grad_logits.t(), hidden[rows])
                if grad_bias is not None:
                    grad_bias += grad_logits.sum(0)
        ctx.save_for_backward(*(g for g in (grad_hidden, grad_weight, grad_bias) if g is not None))
        ctx.has_bias = bias is not None
        return loss

    @staticmethod
    def backward(ctx, grad_output):
        grads = [grad * grad_output.to(grad.dtype) for grad in ctx.saved_tensors]
        grad_hidden, grad_weight, *rest = grads
        return grad_hidden, grad_weight, rest[0] if ctx.has_bias else None, None, None


def chunked_linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    ignore_index: int = -100,
    chunk_size: int | None = None,
) -> torch.Tensor:
    """
    Sum over positions of the cross entropy of `linear(hidden, weight, bias)` against `targets`.

    Equal to `cross_entropy(linear(hidden, weight, bias), targets, reduction="sum")` in value and gradients; positions
    with `ignore_index` cost nothing, and at most `chunk_size` rows of logits exist at a time.

    Args:
        hidden (`(positions, hidden_size)`), weight (`(vocab_size, hidden_size)`), bias (`(vocab_size,)` or `None`),
        targets (`(positions,)` integer).
        chunk_size: rows of logits per chunk; by default as many as fit into 8 MiB.

    Returns:
        scalar tensor, float32 (float64 for float64 weights).
    """
    keep = targets != ignore_index
    hidden, targets = hidden[keep], targets[keep]
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = bias.to(dtype) if bias is not None else None
    if chunk_size is None:
        chunk_size = max(1, CHUNK_BYTES // (4 * weight.shape[0]))
    with torch.autocast(hidden.device.type, enabled=False):
        return _ChunkedLinearCrossEntropy.apply(hidden, weight, bias, targets, chunk_size)
