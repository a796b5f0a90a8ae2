"""
State-space operators: the selective scan of Mamba (arXiv:2312.00752, Algorithm 2), the state-space dual of Mamba-2
(arXiv:2405.21060, section 6) and their causal convolution.

One function, several ways to compute it:

| backend | what | needs |
|---|---|---|
| `torch` | autograd functions with written-out backward passes, linear in length in time and memory | nothing |
| `numba` | compiled loops for Mamba-1 on CPUs (`state_space_numba.py`) | `hepzoo[cpu]` |
| `mamba_ssm` | CUDA kernels | mamba-ssm, causal-conv1d |

`resolve_backend` chooses once, when a model is built. A call takes the kernel only for tensors that it can treat and
PyTorch for all others. Whatever the precision of the inputs and whether or not autocast is on, PyTorch and numba
compute in float32 (float64 for float64 inputs). Second derivatives are not available.

Times are those after the softplus. A position with `delta` 0 leaves the state as it is (decay 1, input 0): that is how
padding is passed.

`torch.compile` leaves the operators as they are: tracing would unroll their loops over positions.
"""

import functools
import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.utils import logging

logger = logging.get_logger(__name__)

BACKENDS = ("auto", "torch", "numba", "mamba_ssm")
SSMS = ("mamba1", "mamba2")
# steps of Mamba-1 that are expanded to (steps, batch, channels, N) at a time; the backward pass starts from the states
# in between
SCAN_SEGMENT = 32
# positions of Mamba-2 whose chunks are computed together
DUAL_SEGMENT = 512
# numbers of the output that the convolution works on at a time
CONV_PIECE = 2**17


# Choice of the backend


@functools.cache
def _cuda_kernels() -> dict[str, Callable] | str:
    """The functions of mamba-ssm and causal-conv1d, or why they cannot be imported."""
    places = {
        "selective_scan_fn": "mamba_ssm.ops.selective_scan_interface",
        "mamba_chunk_scan_combined": "mamba_ssm.ops.triton.ssd_combined",
        "causal_conv1d_fn": "causal_conv1d",
    }
    try:
        return {name: getattr(importlib.import_module(place), name) for name, place in places.items()}
    # a build for another torch or GPU raises nearly anything
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]


@functools.cache
def _numba_error() -> str | None:
    """Why the numba kernels cannot be imported; None if they can."""
    try:
        from .state_space_numba import numba_selective_scan  # noqa: F401
    except ImportError as error:
        return str(error).splitlines()[0]
    return None


def resolve_backend(name: str, ssm: str) -> str:
    """
    The backend for `name` ("auto", "torch", "numba" or "mamba_ssm") and `ssm` ("mamba1" or "mamba2"), logged in a line.

    "auto" takes mamba_ssm where it can be imported and there is a GPU, else numba where it can be imported (Mamba-1
    only), else torch. A backend that is asked for by name and missing is an ImportError that says what to install.
    """
    if name not in BACKENDS:
        raise ValueError(f"state-space backend {name!r}: expected one of {', '.join(BACKENDS)}")
    if ssm not in SSMS:
        raise ValueError(f"state-space model {ssm!r}: expected one of {', '.join(SSMS)}")
    if name == "numba":
        if ssm == "mamba2":
            raise ValueError("state-space backend 'numba' has no kernels for mamba2: use 'torch', which is fast there")
        if _numba_error():
            raise ImportError(_numba_error())
    if name == "mamba_ssm" and isinstance(_cuda_kernels(), str):
        raise ImportError(
            "state-space backend 'mamba_ssm' needs mamba-ssm and causal-conv1d built for this torch: "
            f'pip install "hepzoo[mamba]" --no-build-isolation ({_cuda_kernels()})'
        )
    chosen = name
    if name == "auto":
        if torch.cuda.is_available() and isinstance(_cuda_kernels(), dict):
            chosen = "mamba_ssm"
        elif ssm == "mamba1" and _numba_error() is None:
            chosen = "numba"
        else:
            chosen = "torch"
    logger.info(f"{ssm} computes with {chosen} (asked for: {name})")
    return chosen


def _kernel_for(backend: str, x: Tensor) -> str:
    """What computes this call: the kernel of the backend, if it can treat such a tensor, or torch."""
    if backend not in BACKENDS[1:]:
        raise ValueError(f"state-space backend {backend!r}: expected one of {', '.join(BACKENDS[1:])}")
    if backend == "mamba_ssm" and x.is_cuda and x.dtype != torch.float64:
        return "mamba_ssm"
    if backend == "numba" and x.device.type == "cpu" and x.dtype != torch.float64:
        return "numba"
    return "torch"


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _without_autocast(x: Tensor) -> AbstractContextManager:
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def _check_shapes(function: str, **expected: tuple[Tensor | None, tuple[int, ...]]) -> None:
    """A kernel would read beyond the end of a tensor that is too small."""
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{function}: {name} has shape {tuple(tensor.shape)}, expected {shape}")


def _check_dimensions(function: str, **expected: tuple[Tensor, int]) -> None:
    for name, (tensor, dimensions) in expected.items():
        if tensor.ndim != dimensions:
            raise ValueError(f"{function}: {name} has shape {tuple(tensor.shape)}, expected {dimensions} dimensions")


# Mamba-1: selective scan


@torch.compiler.disable
def selective_scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    backend: str = "torch",
    return_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """
    h_t = exp(delta_t A) h_{t-1} + delta_t x_t B_t,  y_t = h_t . C_t + D x_t.

    Args:
        x, delta (`(batch, length, channels)`)
        A (`(channels, N)`): negative.
        B, C (`(batch, length, N)`)
        D (`(channels,)`, *optional*)
        initial_state (`(batch, channels, N)`, *optional*): zeros by default.
        return_state: the CUDA kernel gives no gradient to the final state. Where gradients and the state are wanted,
            PyTorch computes; a training loop that does not use the state says so here.

    Returns:
        y (`(batch, length, channels)`, dtype of x) and the final state (`(batch, channels, N)`, float32; None without
        `return_state`). Gradients flow through both, and to the initial state.
    """
    _check_dimensions("selective_scan", x=(x, 3), A=(A, 2))
    (batch, length, channels), size = x.shape, A.shape[1]
    _check_shapes(
        "selective_scan",
        delta=(delta, (batch, length, channels)),
        A=(A, (channels, size)),
        B=(B, (batch, length, size)),
        C=(C, (batch, length, size)),
        D=(D, (channels,)),
        initial_state=(initial_state, (batch, channels, size)),
    )
    kernel = _kernel_for(backend, x)
    inputs = (x, delta, A, B, C, D, initial_state)
    if kernel == "mamba_ssm":
        needs_gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
        if initial_state is None and not (return_state and needs_gradient):
            return _cuda_selective_scan(x, delta, A, B, C, D, return_state)
    dtype = _compute_dtype(x)
    if D is None:
        D = x.new_zeros(channels, dtype=dtype)
    if initial_state is None:
        initial_state = x.new_zeros(batch, channels, size, dtype=dtype)
    scan = SelectiveScan.apply
    if kernel == "numba":
        from .state_space_numba import numba_selective_scan

        scan = numba_selective_scan
    with _without_autocast(x):
        y, state = scan(*(tensor.to(dtype) for tensor in (x, delta, A, B, C, D, initial_state)))
    return y.to(x.dtype), state if return_state else None


class SelectiveScan(torch.autograd.Function):
    """
    Sequential over positions, one operation for each: on CPUs a parallel scan moves log2(length) times the memory.

    Kept for the backward pass are the inputs and the states between segments; it computes the others again.
    """

    @staticmethod
    def forward(ctx, x, delta, A, B, C, D, initial_state):
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        starts, state = [], initial_state
        for start in range(0, x.shape[1], SCAN_SEGMENT):
            span = slice(start, start + SCAN_SEGMENT)
            starts.append(state)
            _, states = expand_segment(x[:, span], delta[:, span], A, B[:, span], state)
            torch.mul(x[:, span], D, out=y[:, span])
            y[:, span] += (states @ C[:, span].transpose(0, 1).unsqueeze(-1)).squeeze(-1).transpose(0, 1)
            # a copy: the others of the segment need not stay
            state = states[-1].clone()
        ctx.save_for_backward(x, delta, A, B, C, D, *starts)
        return y, state.clone() if state is initial_state else state

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_state):
        x, delta, A, B, C, D, *starts = ctx.saved_tensors
        grad_x, grad_delta, grad_B, grad_C = (torch.empty_like(tensor) for tensor in (x, delta, B, C))
        grad_A = torch.zeros_like(A)
        with _without_autocast(x):
            for index in range(len(starts) - 1, -1, -1):
                span = slice(index * SCAN_SEGMENT, (index + 1) * SCAN_SEGMENT)
                # time first: (steps, batch, ...)
                x_t, delta_t, B_t, C_t, output = (
                    tensor[:, span].transpose(0, 1) for tensor in (x, delta, B, C, grad_y)
                )
                decays, states = expand_segment(x[:, span], delta[:, span], A, B[:, span], starts[index])
                # G_t = y_t' C_t + exp(delta_{t+1} A) G_{t+1}
                G = output.unsqueeze(-1) * C_t.unsqueeze(-2)
                steps = G.unbind(0)
                steps[-1].add_(grad_state)
                later = steps[-1]
                for step, decay in zip(steps[-2::-1], decays.unbind(0)[:0:-1]):
                    later = step.addcmul_(decay, later)
                grad_C[:, span] = (output.unsqueeze(-2) @ states).squeeze(-2).transpose(0, 1)
                grad_B[:, span] = ((delta_t * x_t).unsqueeze(-2) @ G).squeeze(-2).transpose(0, 1)
                along_B = (G @ B_t.unsqueeze(-1)).squeeze(-1)
                grad_x[:, span] = (along_B * delta_t).transpose(0, 1)
                # d(delta_t A) = G_t exp(delta_t A) h_{t-1}
                G.mul_(decays)
                grad_state = G[0].clone()
                G[1:].mul_(states[:-1])
                G[0].mul_(starts[index])
                along_A = torch.mul(G, A, out=decays).sum(dim=-1)
                grad_delta[:, span] = (along_A + along_B * x_t).transpose(0, 1)
                grad_A += G.mul_(delta_t.unsqueeze(-1)).sum(dim=(0, 1))
            grad_x.addcmul_(grad_y, D)
            grad_D = (grad_y * x).sum(dim=(0, 1))
        return grad_x, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_state


def expand_segment(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """exp(delta_t A) and h_t for each step of a segment, both (steps, batch, channels, N)."""
    delta_t = delta.transpose(0, 1)
    decays = (delta_t.unsqueeze(-1) * A).exp_()
    states = (delta_t * x.transpose(0, 1)).unsqueeze(-1) * B.transpose(0, 1).unsqueeze(-2)
    # unbind: indexing would cost a second view for each step
    for decay, next_state in zip(decays.unbind(0), states.unbind(0)):
        state = next_state.addcmul_(decay, state)
    return decays, states


def _cuda_selective_scan(x, delta, A, B, C, D, return_state):
    dtype = torch.float32
    # (batch, channels, length)
    x_t, delta_t, B_t, C_t = (tensor.to(dtype).transpose(1, 2).contiguous() for tensor in (x, delta, B, C))
    D = None if D is None else D.to(dtype)
    result = _cuda_kernels()["selective_scan_fn"](
        x_t, delta_t, A.to(dtype), B_t, C_t, D=D, return_last_state=return_state
    )
    y, state = result if return_state else (result, None)
    return y.transpose(1, 2).to(x.dtype), state


# Mamba-2: state-space dual


@torch.compiler.disable
def state_space_dual(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    chunk_size: int = 64,
    backend: str = "torch",
    return_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """
    For every head S_t = exp(delta_t A) S_{t-1} + delta_t x_t (outer) B_t,  y_t = S_t C_t + D x_t.

    Args:
        x (`(batch, length, heads, head_dim)`)
        delta (`(batch, length, heads)`)
        A (`(heads,)`): negative.
        B, C (`(batch, length, N)`): one group, shared by the heads.
        D (`(heads,)`, *optional*)
        initial_state (`(batch, heads, head_dim, N)`, *optional*): zeros by default.
        chunk_size: positions that are related by matrices; the result depends on it only by rounding.

    Returns:
        y (like x) and the final state (`(batch, heads, head_dim, N)`, float32; None without `return_state`). Gradients
        flow through both, and to the initial state.
    """
    _check_dimensions("state_space_dual", x=(x, 4), B=(B, 3))
    (batch, length, heads, head_dim), size = x.shape, B.shape[2]
    _check_shapes(
        "state_space_dual",
        delta=(delta, (batch, length, heads)),
        A=(A, (heads,)),
        B=(B, (batch, length, size)),
        C=(C, (batch, length, size)),
        D=(D, (heads,)),
        initial_state=(initial_state, (batch, heads, head_dim, size)),
    )
    if chunk_size < 1:
        raise ValueError(f"state_space_dual: chunk_size {chunk_size}, expected at least 1")
    if _kernel_for(backend, x) == "mamba_ssm":
        return _cuda_state_space_dual(x, delta, A, B, C, D, initial_state, chunk_size, return_state)
    dtype = _compute_dtype(x)
    if D is None:
        D = x.new_zeros(heads, dtype=dtype)
    if initial_state is None:
        initial_state = x.new_zeros(batch, heads, head_dim, size, dtype=dtype)
    inputs = (tensor.to(dtype) for tensor in (x, delta, A, B, C, D, initial_state))
    with _without_autocast(x):
        y, state = StateSpaceDual.apply(*inputs, chunk_size)
    return y.to(x.dtype), state if return_state else None


class StateSpaceDual(torch.autograd.Function):
    """
    Within chunks a masked product of matrices, between chunks a recurrence; some chunks together in a segment.

    Kept for the backward pass are the inputs and the states between segments; it computes the rest again.
    """

    @staticmethod
    def forward(ctx, x, delta, A, B, C, D, initial_state, chunk_size):
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        starts, state = [], initial_state
        for span, size in dual_segments(x.shape[1], chunk_size):
            starts.append(state)
            segment = DualSegment(x[:, span], delta[:, span], A, B[:, span], C[:, span], state, size)
            y[:, span] = segment.output(D)
            state = segment.states[:, -1].unflatten(1, x.shape[2:]).clone()
        ctx.save_for_backward(x, delta, A, B, C, D, *starts)
        ctx.chunk_size = chunk_size
        return y, state.clone() if state is initial_state else state

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_state):
        x, delta, A, B, C, D, *starts = ctx.saved_tensors
        grad_x, grad_delta, grad_B, grad_C = (torch.empty_like(tensor) for tensor in (x, delta, B, C))
        grad_A = torch.zeros_like(A)
        with _without_autocast(x):
            for (span, size), start in zip(reversed(dual_segments(x.shape[1], ctx.chunk_size)), reversed(starts)):
                segment = DualSegment(x[:, span], delta[:, span], A, B[:, span], C[:, span], start, size)
                grads = segment.gradients(grad_y[:, span], grad_state)
                grad_x[:, span], grad_delta[:, span], grad_B[:, span], grad_C[:, span] = grads[:4]
                grad_A += grads[4]
                grad_state = grads[5]
            grad_x.addcmul_(grad_y, D.unsqueeze(-1))
            grad_D = (grad_y * x).sum(dim=(0, 1, 3))
        return grad_x, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_state, None


def dual_segments(length: int, chunk_size: int) -> list[tuple[slice, int]]:
    """Spans of whole chunks, and what remains as one shorter chunk: (span, size of its chunks)."""
    whole = length - length % chunk_size
    step = max(DUAL_SEGMENT // chunk_size, 1) * chunk_size
    spans = [(slice(start, min(start + step, whole)), chunk_size) for start in range(0, whole, step)]
    return spans if whole == length else [*spans, (slice(whole, length), length - whole)]


class DualSegment:
    """
    Some chunks of `StateSpaceDual`, (batch, chunks, size, ...).

    With s_i = sum of delta A up to position i of a chunk, u = delta x and H the state before the chunk:
    y_i = sum_{j <= i} exp(s_i - s_j) (C_i . B_j) u_j + exp(s_i) H C_i.
    """

    def __init__(self, x, delta, A, B, C, state, size):
        self.x, self.delta, self.B, self.C = (tensor.unflatten(1, (-1, size)) for tensor in (x, delta, B, C))
        self.A = A
        # sums in float64: differences of large ones would lose the small steps between them
        self.exact = torch.float32 if x.device.type == "mps" else torch.float64
        sums = (self.delta.to(self.exact) * A.to(self.exact)).cumsum(dim=2)
        by_head = sums.transpose(2, 3)
        # (batch, chunks, heads, size, size); what lies above the diagonal may overflow before it is cut
        self.decays = (by_head.unsqueeze(-1) - by_head.unsqueeze(-2)).to(x.dtype).exp_().tril_()
        self.from_start = sums.exp().to(x.dtype).unsqueeze(-1)
        self.to_end = (sums[:, :, -1:] - sums).exp().to(x.dtype).unsqueeze(-1)
        # (batch, chunks, heads, 1, 1)
        self.chunk_decays = self.from_start[:, :, -1].unsqueeze(-1)
        self.u = self.delta.unsqueeze(-1) * self.x
        self.u_to_end = (self.u * self.to_end).flatten(3)
        self.CB = self.C @ self.B.transpose(-1, -2)
        self.mixing = self.decays * self.CB.unsqueeze(2)
        # states between chunks, (batch, chunks + 1, heads x head_dim, N)
        added = self.u_to_end.transpose(-1, -2) @ self.B
        self.states = torch.cat([state.flatten(1, 2).unsqueeze(1), added], dim=1)
        heads = self.states.unflatten(2, x.shape[2:]).unbind(1)
        for index, decay in enumerate(self.chunk_decays.unbind(1)):
            heads[index + 1].addcmul_(decay, heads[index])

    def output(self, D: Tensor) -> Tensor:
        """y, (batch, length, heads, head_dim)."""
        y = self.x * D.unsqueeze(-1)
        y += (self.mixing @ self.u.transpose(2, 3)).transpose(2, 3)
        y.addcmul_((self.C @ self.states[:, :-1].transpose(-1, -2)).view_as(y), self.from_start)
        return y.flatten(1, 2)

    def gradients(self, grad_y: Tensor, grad_state: Tensor) -> tuple[Tensor, ...]:
        """Of x (without D), delta, B, C, A and the initial state."""
        shape = self.x.shape
        grad_y = grad_y.unflatten(1, shape[1:3])
        grad_y_heads, u_heads = grad_y.transpose(2, 3).contiguous(), self.u.transpose(2, 3)
        grad_y_start = (grad_y * self.from_start).flatten(3)
        # gradients of the states between chunks, as `states`
        received = grad_y_start.transpose(-1, -2) @ self.C
        grad_states = torch.cat([received, grad_state.flatten(1, 2).unsqueeze(1)], dim=1)
        heads = grad_states.unflatten(2, shape[3:]).unbind(1)
        chunk_decays = self.chunk_decays.unbind(1)
        for index in range(len(chunk_decays) - 1, -1, -1):
            heads[index].addcmul_(chunk_decays[index], heads[index + 1])
        before, after = self.states[:, :-1], grad_states[:, 1:]

        # d mixing / d CB, summed over the heads
        weighted = (grad_y_heads @ u_heads.transpose(-1, -2)).mul_(self.decays)
        grad_CB = weighted.sum(dim=2)
        grad_C = grad_CB @ self.B + grad_y_start @ before
        grad_B = grad_CB.transpose(-1, -2) @ self.C + self.u_to_end @ after
        added = (self.B @ after.transpose(-1, -2)).view(shape)
        grad_u = (self.mixing.transpose(-1, -2) @ grad_y_heads).transpose(2, 3).addcmul(added, self.to_end)

        # of the sums s: from exp(s_i - s_j), exp(s_i), exp(s_end - s_j) and exp(s_end). Most of it cancels in what a
        # step receives, hence float64
        weighted.mul_(self.CB.unsqueeze(2))
        rows, columns = (weighted.sum(dim=dim, dtype=self.exact).transpose(2, 3) for dim in (-1, -2))
        from_start = (grad_y_start * (self.C @ before.transpose(-1, -2))).view(shape).sum(dim=-1)
        to_end = (self.u_to_end.view(shape) * added).sum(dim=-1).to(self.exact)
        kept = (before * after).unflatten(2, shape[3:]).sum(dim=(-1, -2)) * self.chunk_decays.flatten(2)
        grad_sums = rows - columns + from_start - to_end
        grad_sums[:, :, -1] += to_end.sum(dim=2) + kept
        # s_i holds all steps up to i
        grad_steps = grad_sums.flip(2).cumsum(dim=2).flip(2).to(self.x.dtype)

        grad_delta = grad_steps * self.A + (grad_u * self.x).sum(dim=-1)
        grad_A = (grad_steps * self.delta).sum(dim=(0, 1, 2))
        grad_x = grad_u * self.delta.unsqueeze(-1)
        grads = (grad_x, grad_delta, grad_B, grad_C)
        return *(grad.flatten(1, 2) for grad in grads), grad_A, grad_states[:, 0].unflatten(1, shape[3:])


def _cuda_state_space_dual(x, delta, A, B, C, D, initial_state, chunk_size, return_state):
    result = _cuda_kernels()["mamba_chunk_scan_combined"](
        x.contiguous(),
        delta.float().contiguous(),
        A.float(),
        B.to(x.dtype).unsqueeze(2).contiguous(),
        C.to(x.dtype).unsqueeze(2).contiguous(),
        chunk_size,
        D=None if D is None else D.float(),
        initial_states=initial_state,
        return_final_states=return_state,
    )
    return result if return_state else (result, None)


# Causal convolution of both


@torch.compiler.disable
def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor, initial_window: Tensor | None = None, backend: str = "torch"
) -> tuple[Tensor, Tensor]:
    """
    SiLU of the depthwise convolution with the last K inputs.

    Args:
        x (`(batch, length, channels)`)
        weight (`(channels, K)`): the last column belongs to the position itself.
        bias (`(channels,)`)
        initial_window (`(batch, K - 1, channels)`, *optional*): inputs before the first, zeros by default.

    Returns:
        y (`(batch, length, channels)`) and the last K - 1 inputs, for the next piece.
    """
    _check_dimensions("causal_conv1d", x=(x, 3), weight=(weight, 2))
    (batch, length, channels), width = x.shape, weight.shape[1]
    _check_shapes(
        "causal_conv1d",
        weight=(weight, (channels, width)),
        bias=(bias, (channels,)),
        initial_window=(initial_window, (batch, width - 1, channels)),
    )
    kernel = _kernel_for(backend, x)
    if initial_window is None:
        initial_window = x.new_zeros(batch, width - 1, channels)
    padded = torch.cat([initial_window.to(x.dtype), x], dim=1)
    # a copy: a cache would hold all of the inputs otherwise
    window = padded[:, length:].clone()
    # the sizes that the kernel takes
    if kernel == "mamba_ssm" and 2 <= width <= 4 and channels % 8 == 0:
        # the first outputs are those of the window
        y = _cuda_kernels()["causal_conv1d_fn"](
            padded.transpose(1, 2), weight.to(x.dtype).contiguous(), bias.to(x.dtype), activation="silu"
        )
        return y.transpose(1, 2)[:, width - 1 :], window
    dtype = _compute_dtype(x)
    y = CausalConv1d.apply(padded.to(dtype), weight.to(dtype), bias.to(dtype))
    return y.to(x.dtype), window


class CausalConv1d(torch.autograd.Function):
    """
    Of padded inputs (batch, K - 1 + length, channels). K passes over the inputs as they lie, for so few positions at a
    time that they stay in the cache: on CPUs several times faster than `conv1d`.
    """

    @staticmethod
    def forward(ctx, padded, weight, bias):
        ctx.save_for_backward(padded, weight, bias)
        columns = weight.t().contiguous()
        y = torch.empty_like(padded[:, len(columns) - 1 :], memory_format=torch.contiguous_format)
        for span in conv_spans(y):
            nn.functional.silu(convolve(padded, columns, bias, span, out=y[:, span]), inplace=True)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        padded, weight, bias = ctx.saved_tensors
        columns = weight.t().contiguous()
        grad_padded, grad_columns, grad_bias = (torch.zeros_like(tensor) for tensor in (padded, columns, bias))
        for span in conv_spans(grad_y):
            grad_sum = torch.ops.aten.silu_backward(grad_y[:, span], convolve(padded, columns, bias, span))
            grad_bias += grad_sum.sum(dim=(0, 1))
            for k, column in enumerate(columns):
                inputs = slice(span.start + k, span.stop + k)
                grad_padded[:, inputs].addcmul_(grad_sum, column)
                grad_columns[k] += (grad_sum * padded[:, inputs]).sum(dim=(0, 1))
        return grad_padded, grad_columns.t(), grad_bias


def conv_spans(y: Tensor) -> list[slice]:
    """Pieces of CONV_PIECE numbers of y (batch, length, channels)."""
    batch, length, channels = y.shape
    step = max(CONV_PIECE // max(batch * channels, 1), 1)
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def convolve(padded: Tensor, columns: Tensor, bias: Tensor, span: slice, out: Tensor | None = None) -> Tensor:
    """bias + sum_k columns_k padded_{t + k} for t in `span`, (batch, span, channels); columns (K, channels)."""
    y = torch.addcmul(bias, padded[:, span], columns[0], out=out)
    for k in range(1, len(columns)):
        y.addcmul_(padded[:, span.start + k : span.stop + k], columns[k])
    return y
