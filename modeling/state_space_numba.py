"""
CPU kernels of `state_space.py` for Mamba-1, compiled by numba at first use (its wheel brings the compiler).

Arrays are C-contiguous float32, `(batch, length, channels)`. Every kernel does the work items `first` to `last`: there
are batch x blocks of `lanes` channels, and the threads of one call take disjoint ranges. Within an item time is the
outer loop; the innermost runs over the channels of the block, which the compiler turns into vector instructions.
"""

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch.autograd.function import once_differentiable

try:
    from numba import njit
except ImportError as error:
    raise ImportError('the compiled CPU kernels need numba: pip install "hepzoo[cpu]"') from error

# channels of a work item: as many as have MAX_STATES numbers of state, as the innermost loops should be long and what
# the backward pass holds of an item, 8 SEGMENT bytes for each number, should stay in the cache
MIN_LANES = 128
MAX_STATES = 8192
# steps between saved states; the backward pass computes those between again
SEGMENT = 16
# smaller inputs are not worth a second thread (state updates)
MIN_UPDATES_PER_THREAD = 2**18
# Taylor coefficients of 2^f for |f| <= 1/2: relative error 5e-9
EXP2 = tuple(np.float32(math.log(2) ** k / math.factorial(k)) for k in range(8))
LOG2_E = np.float32(1 / math.log(2))
ONE, HALF, ZERO = np.float32(1), np.float32(0.5), np.float32(0)
# no nnan, no ninf: NaN of the input must come out
FASTMATH = {"contract", "reassoc", "nsz"}


def kernel(function):
    """`njit` that releases the interpreter lock and keeps the machine code on disk where a folder can be written."""
    try:
        return njit(cache=True, nogil=True, fastmath=FASTMATH, error_model="numpy")(function)
    except RuntimeError:
        return njit(nogil=True, fastmath=FASTMATH, error_model="numpy")(function)


@kernel
def exp2(value):
    """2^value in float32, 0 from 2^-127 downwards, at most 2^127."""
    value = np.float32(-127) if value < np.float32(-127) else value
    value = np.float32(127) if value > np.float32(127) else value
    whole = np.floor(value + HALF)
    f = value - whole
    power = EXP2[7]
    power = power * f + EXP2[6]
    power = power * f + EXP2[5]
    power = power * f + EXP2[4]
    power = power * f + EXP2[3]
    power = power * f + EXP2[2]
    power = power * f + EXP2[1]
    power = power * f + ONE
    return power * np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)).view(np.float32)


@kernel
def scan_forward(first, last, lanes, x, delta, A, B, C, D, initial_state, y, saved, final_state):
    """
    A (N, channels) times log2(e), states (batch, N, channels), saved (batch, segments, N, channels).
    """
    length, channels = x.shape[1:]
    size = A.shape[0]
    blocks = (channels + lanes - 1) // lanes
    decay_rate = np.zeros((size, lanes), np.float32)
    state = np.zeros((size, lanes), np.float32)
    step = np.zeros(lanes, np.float32)
    source = np.zeros(lanes, np.float32)
    total = np.zeros(lanes, np.float32)
    for item in range(first, last):
        b = item // blocks
        c = (item % blocks) * lanes
        width = min(lanes, channels - c)
        for n in range(size):
            for j in range(width):
                decay_rate[n, j] = A[n, c + j]
                state[n, j] = initial_state[b, n, c + j]
        for t in range(length):
            if t % SEGMENT == 0:
                for n in range(size):
                    for j in range(width):
                        saved[b, t // SEGMENT, n, c + j] = state[n, j]
            for j in range(width):
                step[j] = delta[b, t, c + j]
                source[j] = delta[b, t, c + j] * x[b, t, c + j]
                total[j] = D[c + j] * x[b, t, c + j]
            for n in range(size):
                B_n = B[b, t, n]
                C_n = C[b, t, n]
                for j in range(width):
                    new = exp2(step[j] * decay_rate[n, j]) * state[n, j] + source[j] * B_n
                    state[n, j] = new
                    total[j] += new * C_n
            for j in range(width):
                y[b, t, c + j] = total[j]
        for n in range(size):
            for j in range(width):
                final_state[b, n, c + j] = state[n, j]


@kernel
def scan_backward(
    first,
    last,
    lanes,
    x,
    delta,
    A,
    B,
    C,
    D,
    saved,
    grad_y,
    grad_state,
    grad_x,
    grad_delta,
    grad_B,
    grad_C,
    grad_A,
    grad_D,
):
    """
    Gradients of `scan_forward`. `grad_state` (batch, N, channels) holds the gradient of the final state and becomes
    that of the initial one; grad_B and grad_C (blocks, batch, length, N) are those of each block of channels; grad_A
    (N, channels) and grad_D are those of the items done here, added to what they hold. A as there, grad_A with respect
    to A itself.
    """
    length, channels = x.shape[1:]
    size = A.shape[0]
    blocks = (channels + lanes - 1) // lanes
    decay_rate = np.zeros((size, lanes), np.float32)
    # G_t exp(delta_t A): what the state before t receives
    grad = np.zeros((size, lanes), np.float32)
    sum_A = np.zeros((size, lanes), np.float32)
    sum_D = np.zeros(lanes, np.float32)
    decays = np.zeros((SEGMENT, size, lanes), np.float32)
    states = np.zeros((SEGMENT + 1, size, lanes), np.float32)
    step = np.zeros(lanes, np.float32)
    source = np.zeros(lanes, np.float32)
    output = np.zeros(lanes, np.float32)
    along_B = np.zeros(lanes, np.float32)
    along_A = np.zeros(lanes, np.float32)
    for item in range(first, last):
        b = item // blocks
        c = (item % blocks) * lanes
        width = min(lanes, channels - c)
        sum_A[:] = ZERO
        sum_D[:] = ZERO
        for n in range(size):
            for j in range(width):
                decay_rate[n, j] = A[n, c + j]
                grad[n, j] = grad_state[b, n, c + j]
        for segment in range((length - 1) // SEGMENT, -1, -1):
            start = segment * SEGMENT
            steps = min(SEGMENT, length - start)
            for n in range(size):
                for j in range(width):
                    states[0, n, j] = saved[b, segment, n, c + j]
            for i in range(steps):
                for j in range(width):
                    step[j] = delta[b, start + i, c + j]
                    source[j] = delta[b, start + i, c + j] * x[b, start + i, c + j]
                for n in range(size):
                    B_n = B[b, start + i, n]
                    for j in range(width):
                        decay = exp2(step[j] * decay_rate[n, j])
                        decays[i, n, j] = decay
                        states[i + 1, n, j] = decay * states[i, n, j] + source[j] * B_n
            for i in range(steps - 1, -1, -1):
                t = start + i
                for j in range(width):
                    step[j] = delta[b, t, c + j]
                    source[j] = delta[b, t, c + j] * x[b, t, c + j]
                    output[j] = grad_y[b, t, c + j]
                along_B[:] = ZERO
                along_A[:] = ZERO
                for n in range(size):
                    B_n = B[b, t, n]
                    C_n = C[b, t, n]
                    sum_B = ZERO
                    sum_C = ZERO
                    for j in range(width):
                        G = grad[n, j] + output[j] * C_n
                        sum_C += output[j] * states[i + 1, n, j]
                        sum_B += G * source[j]
                        along_B[j] += G * B_n
                        G = G * decays[i, n, j]
                        grad[n, j] = G
                        G = G * states[i, n, j]
                        along_A[j] += G * decay_rate[n, j]
                        sum_A[n, j] += G * step[j]
                    grad_B[item % blocks, b, t, n] = sum_B
                    grad_C[item % blocks, b, t, n] = sum_C
                for j in range(width):
                    grad_x[b, t, c + j] = along_B[j] * step[j] + D[c + j] * output[j]
                    grad_delta[b, t, c + j] = along_A[j] / LOG2_E + along_B[j] * x[b, t, c + j]
                    sum_D[j] += output[j] * x[b, t, c + j]
        for n in range(size):
            for j in range(width):
                grad_state[b, n, c + j] = grad[n, j]
                grad_A[n, c + j] += sum_A[n, j]
        for j in range(width):
            grad_D[c + j] += sum_D[j]


def plan(shape: tuple[int, int, int], size: int) -> tuple[int, int, int]:
    """Threads, lanes and blocks for inputs of `shape` (batch, length, channels), `size` numbers of state a channel."""
    batch, length, channels = shape
    threads = max(1, min(torch.get_num_threads(), batch * length * channels * size // MIN_UPDATES_PER_THREAD))
    # a row of the batch is divided only if there are more threads than rows
    shares = -(-threads // max(batch, 1))
    lanes = max(MIN_LANES, min(MAX_STATES // size, -(-channels // shares)))
    # whole vector registers
    lanes = -(-lanes // 64) * 64
    blocks = -(-channels // lanes)
    return max(1, min(threads, batch * blocks)), lanes, blocks


def run(function, threads: int, lanes: int, items: int, arguments: tuple, partial_shapes: tuple = ()) -> list:
    """
    `function` over all items. Arrays of `partial_shapes` are zeros for each thread, summed at the end.

    Threads of Python, as the kernels release the interpreter lock: unlike those of numba they bear forks and calls from
    several threads.
    """
    bounds = [items * index // threads for index in range(threads + 1)]
    partials = [np.zeros((threads, *shape), np.float32) for shape in partial_shapes]

    def work(index: int) -> None:
        function(bounds[index], bounds[index + 1], lanes, *arguments, *(partial[index] for partial in partials))

    if threads == 1:
        work(0)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, range(threads)))
    return [torch.from_numpy(partial[0] if threads == 1 else partial.sum(axis=0)) for partial in partials]


def arrays(*tensors: torch.Tensor) -> tuple[np.ndarray, ...]:
    return tuple(tensor.detach().contiguous().numpy() for tensor in tensors)


class NumbaSelectiveScan(torch.autograd.Function):
    """`SelectiveScan` of `state_space.py`, for float32 tensors on the CPU."""

    @staticmethod
    def forward(ctx, x, delta, A, B, C, D, initial_state):
        x, delta, B, C, D = (tensor.contiguous() for tensor in (x, delta, B, C, D))
        rates = (A.t() * LOG2_E.item()).contiguous()
        state = initial_state.transpose(1, 2).contiguous()
        y, final_state = torch.empty_like(x), torch.empty_like(state)
        saved = x.new_empty(len(x), -(-x.shape[1] // SEGMENT), *rates.shape)
        outputs = y, saved, final_state
        threads, lanes, blocks = plan(x.shape, len(rates))
        run(scan_forward, threads, lanes, len(x) * blocks, arrays(x, delta, rates, B, C, D, state, *outputs))
        ctx.save_for_backward(x, delta, rates, B, C, D, saved)
        return y, final_state.transpose(1, 2).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_state):
        x, delta, rates, B, C, D, saved = ctx.saved_tensors
        grad_state = grad_state.transpose(1, 2).clone(memory_format=torch.contiguous_format)
        grad_x, grad_delta = torch.empty_like(x), torch.empty_like(x)
        threads, lanes, blocks = plan(x.shape, len(rates))
        grad_B, grad_C = B.new_empty(blocks, *B.shape), C.new_empty(blocks, *C.shape)
        inputs = arrays(x, delta, rates, B, C, D, saved, grad_y, grad_state, grad_x, grad_delta, grad_B, grad_C)
        grad_A, grad_D = run(scan_backward, threads, lanes, len(x) * blocks, inputs, (rates.shape, D.shape))
        grad_B, grad_C = (grad[0] if blocks == 1 else grad.sum(dim=0) for grad in (grad_B, grad_C))
        return grad_x, grad_delta, grad_A.t(), grad_B, grad_C, grad_D, grad_state.transpose(1, 2)


numba_selective_scan = NumbaSelectiveScan.apply
