"""State-space operators: a float64 recurrence in values and gradients, in pieces and with padding; backends."""

import logging
import subprocess
import sys
import threading
import types

import pytest
import torch
from torch import nn

from hepzoo.modeling import state_space
from hepzoo.modeling.state_space import causal_conv1d, resolve_backend, selective_scan, state_space_dual

LENGTHS = (1, 2, 63, 64, 65, 1000)
CHANNELS, SIZE, HEADS, HEAD_DIM = 5, 3, 2, 4
HAS_NUMBA = state_space._numba_error() is None
needs_numba = pytest.mark.skipif(not HAS_NUMBA, reason='needs numba: pip install "hepzoo[cpu]"')
SCAN_BACKENDS = ["torch", pytest.param("numba", marks=needs_numba)]


# The recurrences, one position at a time; by index, gradients would cost time quadratic in the length


def plain_scan(x, delta, A, B, C, D, state):
    outputs = []
    for x_t, delta_t, B_t, C_t in zip(*(tensor.unbind(1) for tensor in (x, delta, B, C))):
        state = torch.exp(delta_t[..., None] * A) * state + (delta_t * x_t)[..., None] * B_t[:, None]
        outputs.append((state * C_t[:, None]).sum(-1))
    return torch.stack(outputs, dim=1) + D * x, state


def plain_dual(x, delta, A, B, C, D, state):
    outputs = []
    for x_t, delta_t, B_t, C_t in zip(*(tensor.unbind(1) for tensor in (x, delta, B, C))):
        decay = torch.exp(delta_t * A)[..., None, None]
        state = decay * state + (delta_t[..., None] * x_t)[..., None] * B_t[:, None, None]
        outputs.append((state * C_t[:, None, None]).sum(-1))
    return torch.stack(outputs, dim=1) + D[:, None] * x, state


def plain_conv(x, weight, bias, window):
    padded = torch.cat([window, x], dim=1)
    y = nn.functional.conv1d(padded.transpose(1, 2), weight.unsqueeze(1), bias, groups=x.shape[2])
    return nn.functional.silu(y).transpose(1, 2), padded[:, x.shape[1] :]


def scan_inputs(length, batch=2, channels=CHANNELS, size=SIZE, seed=0):
    """x, delta, A, B, C, D, initial state; steps and decays as of a trained model."""
    generator = torch.Generator().manual_seed(seed)
    random = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    delta = nn.functional.softplus(random(batch, length, channels) - 2)
    A = -torch.rand(channels, size, generator=generator) * 8 - 0.05
    B, C = random(batch, length, size), random(batch, length, size)
    return [random(batch, length, channels), delta, A, B, C, random(channels), random(batch, channels, size)]


def dual_inputs(length, batch=2, heads=HEADS, head_dim=HEAD_DIM, size=SIZE, seed=0):
    generator = torch.Generator().manual_seed(seed)
    random = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    delta = nn.functional.softplus(random(batch, length, heads) - 2)
    A = -torch.rand(heads, generator=generator) * 16 - 0.05
    B, C, state = random(batch, length, size), random(batch, length, size), random(batch, heads, head_dim, size)
    return [random(batch, length, heads, head_dim), delta, A, B, C, random(heads), state]


def conv_inputs(length, batch=2, channels=CHANNELS, width=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, length, channels), (channels, width), (channels,), (batch, width - 1, channels))
    return [torch.randn(*shape, generator=generator) for shape in shapes]


OPERATORS = {
    "scan": (selective_scan, plain_scan, scan_inputs, ("x", "delta", "A", "B", "C", "D", "initial_state")),
    "dual": (state_space_dual, plain_dual, dual_inputs, ("x", "delta", "A", "B", "C", "D", "initial_state")),
    "conv": (causal_conv1d, plain_conv, conv_inputs, ("x", "weight", "bias", "initial_window")),
}
CASES = [
    ("scan", "torch"),
    pytest.param("scan", "numba", marks=needs_numba),
    ("dual", "torch"),
    ("conv", "torch"),
    pytest.param("conv", "numba", marks=needs_numba),
]


def values_and_gradients(function, inputs, dtype, names, seed=1):
    """Output, state, and the gradients of a random combination of both, by name."""
    inputs = [tensor.to(dtype).requires_grad_() for tensor in inputs]
    y, state = function(*inputs)
    generator = torch.Generator().manual_seed(seed)
    loss = sum((out * torch.randn(out.shape, generator=generator).to(out)).sum() for out in (y, state))
    gradients = torch.autograd.grad(loss, inputs)
    return {"y": y.detach(), "state": state.detach(), **dict(zip(names, gradients))}


def assert_close(actual: dict, expected: dict, tolerance: float):
    """Relative to the largest number of each tensor."""
    for name, value in expected.items():
        assert actual[name].shape == value.shape
        difference = (actual[name].double() - value.double()).abs().max()
        assert difference <= tolerance * value.abs().max().clamp(min=1e-3), f"{name}: {difference}"


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("operator, backend", CASES)
def test_equal_to_the_recurrence(operator, backend, length):
    function, plain, make_inputs, names = OPERATORS[operator]
    inputs = make_inputs(length)
    expected = values_and_gradients(plain, inputs, torch.float64, names)
    actual = values_and_gradients(lambda *a: function(*a, backend=backend), inputs, torch.float32, names)
    assert_close(actual, expected, 3e-6)
    # kernels are float32 only: float64 goes to torch and stays float64
    exact = values_and_gradients(lambda *a: function(*a, backend=backend), inputs, torch.float64, names)
    assert exact["y"].dtype == torch.float64
    assert_close(exact, expected, 1e-11)


@pytest.mark.parametrize("operator, backend", CASES[:3])
def test_equal_to_the_recurrence_over_4096_positions(operator, backend):
    function, plain, make_inputs, names = OPERATORS[operator]
    sizes = {"scan": {"channels": 2, "size": 2}, "dual": {"heads": 1, "head_dim": 2, "size": 2}}[operator]
    inputs = make_inputs(4096, batch=1, **sizes)
    expected = values_and_gradients(plain, inputs, torch.float64, names)
    actual = values_and_gradients(lambda *a: function(*a, backend=backend), inputs, torch.float32, names)
    assert_close(actual, expected, 1e-5)


@pytest.mark.parametrize("chunk_size", [1, 7, 32, 64, 128, 600])
def test_dual_does_not_depend_on_the_chunk_size(chunk_size):
    """65 x 8 + 9 positions: whole segments, whole chunks and a rest, or one chunk that is too long."""
    _, _, make_inputs, names = OPERATORS["dual"]
    inputs = make_inputs(529, batch=1)
    expected = values_and_gradients(plain_dual, inputs, torch.float64, names)
    actual = values_and_gradients(lambda *a: state_space_dual(*a, chunk_size=chunk_size), inputs, torch.float64, names)
    assert_close(actual, expected, 1e-11)


@pytest.mark.parametrize("channels, size", [(1, 1), (63, 2), (64, 16), (65, 5), (130, 4)])
@pytest.mark.parametrize("backend", SCAN_BACKENDS)
def test_scan_of_any_number_of_channels(backend, channels, size, monkeypatch):
    """Blocks of 64 channels that are full or short; segments of the backward pass, full and short."""
    if backend == "numba":
        from hepzoo.modeling import state_space_numba

        monkeypatch.setattr(state_space_numba, "MIN_LANES", 64)
        monkeypatch.setattr(state_space_numba, "MAX_STATES", 64)
    _, _, make_inputs, names = OPERATORS["scan"]
    inputs = make_inputs(70, batch=3, channels=channels, size=size)
    expected = values_and_gradients(plain_scan, inputs, torch.float64, names)
    actual = values_and_gradients(lambda *a: selective_scan(*a, backend=backend), inputs, torch.float32, names)
    assert_close(actual, expected, 1e-5)


@pytest.mark.parametrize("piece", [1, 70, 10**6])
def test_convolution_in_pieces_of_any_size(piece, monkeypatch):
    _, plain, make_inputs, names = OPERATORS["conv"]
    monkeypatch.setattr(state_space, "CONV_PIECE", piece)
    for width in (2, 3, 4):
        inputs = make_inputs(33, width=width)
        expected = values_and_gradients(plain, inputs, torch.float64, names)
        assert_close(values_and_gradients(causal_conv1d, inputs, torch.float32, names), expected, 3e-6)


@needs_numba
@pytest.mark.parametrize("threads", [2, 3, 7])
def test_numba_with_several_threads(threads, monkeypatch):
    from hepzoo.modeling import state_space_numba

    _, _, make_inputs, names = OPERATORS["scan"]
    inputs = make_inputs(70, batch=3, channels=130)
    one = values_and_gradients(lambda *a: selective_scan(*a, backend="numba"), inputs, torch.float32, names)
    monkeypatch.setattr(state_space_numba, "MIN_UPDATES_PER_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    several = values_and_gradients(lambda *a: selective_scan(*a, backend="numba"), inputs, torch.float32, names)
    for name in ("y", "state", "x", "delta", "initial_state"):
        assert torch.equal(one[name], several[name]), name
    # summed in another order
    assert_close(several, one, 1e-6)


@needs_numba
def test_numba_called_from_several_threads_at_once():
    inputs = scan_inputs(300, channels=64)
    expected = selective_scan(*inputs, backend="numba")[0]
    results = [None] * 4

    def work(index):
        results[index] = selective_scan(*inputs, backend="numba")[0]

    workers = [threading.Thread(target=work, args=(index,)) for index in range(len(results))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(result, expected) for result in results)


@pytest.mark.parametrize("pieces", [(1, 99), (64, 36), (33, 1, 65, 1), (100, 0)])
@pytest.mark.parametrize("operator, backend", CASES)
def test_pieces_equal_one_pass(operator, backend, pieces):
    """State or window handed on; also the gradients, which flow through them."""
    function, _, make_inputs, names = OPERATORS[operator]
    inputs = make_inputs(sum(pieces))
    # delta, B and C come in pieces like x; weights and the first state do not
    split = {"scan": (0, 1, 3, 4), "dual": (0, 1, 3, 4), "conv": (0,)}[operator]

    def in_pieces(*tensors):
        state, outputs = tensors[-1], []
        for index in range(len(pieces)):
            piece = [t.split(pieces, dim=1)[index] if i in split else t for i, t in enumerate(tensors[:-1])]
            y, state = function(*piece, state, backend=backend)
            outputs.append(y)
        return torch.cat(outputs, dim=1), state

    whole = values_and_gradients(lambda *a: function(*a, backend=backend), inputs, torch.float32, names)
    assert_close(values_and_gradients(in_pieces, inputs, torch.float32, names), whole, 2e-6)


@pytest.mark.parametrize("operator, backend", CASES[:3])
def test_ragged_batch_equals_single_events(operator, backend):
    """Steps of 0 at the end: outputs of real positions and the states after them are those of each event alone."""
    function, _, make_inputs, names = OPERATORS[operator]
    lengths = (100, 1, 64, 33)
    x, delta, A, B, C, D, state = make_inputs(max(lengths), batch=len(lengths))
    for row, length in enumerate(lengths):
        delta[row, length:] = 0
    batch_inputs = [t.requires_grad_() for t in (x, delta, A, B, C, D, state)]
    y, final = function(*batch_inputs, backend=backend)
    real = torch.stack([torch.arange(max(lengths)) < length for length in lengths])
    loss = (y.flatten(2).sum(-1) * real).square().sum() + final.square().sum()
    gradients = torch.autograd.grad(loss, batch_inputs)
    total_A = torch.zeros_like(A)
    for row, length in enumerate(lengths):
        one = [t.detach()[row : row + 1, :length].requires_grad_() for t in (x, delta, B, C)]
        single = [*one[:2], A, *one[2:], D, state[row : row + 1]]
        y_one, final_one = function(*single, backend=backend)
        torch.testing.assert_close(y[row : row + 1, :length], y_one, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(final[row : row + 1], final_one, rtol=1e-5, atol=1e-5)
        loss = y_one.flatten(2).sum(-1).square().sum() + final_one.square().sum()
        grad_x, grad_delta, grad_B, grad_C, grad_A = torch.autograd.grad(loss, [*one, A])
        for whole, part in ((0, grad_x), (1, grad_delta), (3, grad_B), (4, grad_C)):
            scale = gradients[whole].abs().max().item()
            torch.testing.assert_close(gradients[whole][row : row + 1, :length], part, rtol=0, atol=1e-5 * scale)
        # what comes after the end receives nothing; its step does (it would add to the state)
        assert not gradients[0][row, length:].any() and not gradients[3][row, length:].any()
        total_A += grad_A
    torch.testing.assert_close(gradients[2], total_A, rtol=0, atol=1e-5 * total_A.abs().max().item())


@pytest.mark.parametrize("operator, backend", CASES[:3])
def test_steps_of_any_size(operator, backend):
    """Decays far below the smallest float32, steps far above 1, and small ones after a large one: no NaN, no loss."""
    function, plain, make_inputs, names = OPERATORS[operator]
    inputs = make_inputs(200)
    inputs[1][:, ::7] = 3e3
    inputs[1][:, 100:] *= 1e-3
    inputs[1][:, 150:160] = 0
    expected = values_and_gradients(plain, inputs, torch.float64, names)
    actual = values_and_gradients(lambda *a: function(*a, backend=backend), inputs, torch.float32, names)
    assert all(value.isfinite().all() for value in actual.values())
    assert_close(actual, expected, 1e-5)


def test_small_steps_after_a_large_one():
    """In float32, s_i - s_j of sums near 6e5 would know steps only to 0.06."""
    x, delta, A, B, C, D, state = dual_inputs(64, batch=1)
    delta[:] = 0.01
    delta[:, 0] = 1e5
    A[:] = -6.0
    y, _ = state_space_dual(x, delta, A, B, C, D, state)
    inputs = [tensor.double() for tensor in (x, delta, A, B, C, D, state)]
    expected, _ = plain_dual(*inputs)
    torch.testing.assert_close(y[:, 1:].double(), expected[:, 1:], rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    # close to the end only the last 63 positions count
    inputs[1][:, 0] = 1e4
    later, _ = plain_dual(*inputs)
    torch.testing.assert_close(y[:, -1].double(), expected[:, -1], rtol=1e-5, atol=1e-2)
    assert not torch.equal(later, expected)


@pytest.mark.parametrize("backend", SCAN_BACKENDS)
def test_nan_comes_out(backend):
    x, *others = scan_inputs(40)
    x[0, 10, 1] = torch.nan
    y, state = selective_scan(x, *others, backend=backend)
    assert y[0, 10:, 1].isnan().all() and y[0, :10].isfinite().all() and y[1].isfinite().all()
    assert state[0, 1].isnan().all()
    delta = others[0].clone()
    delta[1, 5, 0] = torch.nan
    y, _ = selective_scan(scan_inputs(40)[0], delta, *others[1:], backend=backend)
    assert y[1, 5:, 0].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("operator, backend", CASES)
def test_half_precision_computes_in_float32(operator, backend, dtype):
    function, _, make_inputs, names = OPERATORS[operator]
    rounded = [tensor.to(dtype) for tensor in make_inputs(100)]
    expected = values_and_gradients(lambda *a: function(*a, backend=backend), rounded, torch.float32, names)
    actual = values_and_gradients(lambda *a: function(*a, backend=backend), rounded, dtype, names)
    assert actual["y"].dtype == dtype and actual["x"].dtype == dtype
    if operator != "conv":
        # a state in half precision would forget small inputs
        assert actual["state"].dtype == torch.float32
        assert torch.equal(actual["state"], expected["state"])
    assert torch.equal(actual["y"], expected["y"].to(dtype))
    # the random combination that is differentiated is rounded too
    assert_close(actual, expected, 0.03)


@pytest.mark.parametrize("operator, backend", CASES)
def test_autocast_changes_nothing(operator, backend):
    function, _, make_inputs, names = OPERATORS[operator]
    inputs = make_inputs(100)
    expected = values_and_gradients(lambda *a: function(*a, backend=backend), inputs, torch.float32, names)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = values_and_gradients(lambda *a: function(*a, backend=backend), inputs, torch.float32, names)
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def test_gradcheck():
    scan = scan_inputs(35, batch=1, channels=2, size=2)
    dual = dual_inputs(9, batch=1, heads=2, head_dim=2, size=2)
    conv = conv_inputs(5, batch=1, channels=2, width=3)
    for function, inputs in (
        (selective_scan, scan),
        (lambda *a: state_space_dual(*a, chunk_size=4), dual),
        (causal_conv1d, conv),
    ):
        assert torch.autograd.gradcheck(
            function, [tensor.double().requires_grad_() for tensor in inputs], fast_mode=True
        )


@pytest.mark.parametrize("operator, backend", CASES)
def test_optional_inputs_and_views(operator, backend):
    """Without D and state: zeros. Inputs that are slices of something larger, as mixers make them."""
    function, _, make_inputs, _ = OPERATORS[operator]
    inputs = make_inputs(70)
    views = [torch.cat([t, t], dim=-1)[..., : t.shape[-1]] for t in inputs]
    for actual, expected in zip(function(*views, backend=backend), function(*inputs, backend=backend)):
        torch.testing.assert_close(actual, expected)
    if operator == "conv":
        y, _ = function(*inputs[:3], backend=backend)
        expected, _ = function(*inputs[:3], torch.zeros_like(inputs[3]), backend=backend)
    else:
        y, _ = function(*inputs[:5], backend=backend)
        zeros = [torch.zeros_like(tensor) for tensor in inputs[5:]]
        expected, _ = function(*inputs[:5], *zeros, backend=backend)
        assert function(*inputs, backend=backend, return_state=False)[1] is None
    assert torch.equal(y, expected)


def test_window_does_not_hold_the_inputs():
    x, weight, bias, _ = conv_inputs(1000)
    window = causal_conv1d(x, weight, bias)[1]
    assert window.untyped_storage().nbytes() == window.numel() * window.element_size()
    state = selective_scan(*scan_inputs(1000))[1]
    assert state.untyped_storage().nbytes() == state.numel() * state.element_size()


def test_not_an_exponential_moving_average():
    """
    The pure-PyTorch fallback published with FM4NPP is an average of x with the decays that ignores B and C. An operator
    that does that must not pass for this one.
    """
    x, delta, A, B, C, D, state = dual_inputs(200)
    y, _ = state_space_dual(x, delta, A, B, C, D, state)
    average, averages = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        decay = torch.exp(delta[:, t] * A)[..., None]
        average = decay * average + (1 - decay) * x[:, t]
        averages.append(average)
    average = torch.stack(averages, dim=1) + D[:, None] * x
    assert (y - average).abs().max() > 0.3 * y.abs().max()
    # and B and C do matter
    for other in ((torch.roll(B, 1, dims=1), C), (B, torch.roll(C, 1, dims=1))):
        assert (state_space_dual(x, delta, A, *other, D, state)[0] - y).abs().max() > 0.1 * y.abs().max()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("operator", ["scan", "dual", "conv"])
@pytest.mark.parametrize("backend", ["torch", "mamba_ssm"])
def test_cuda_equals_the_recurrence(operator, backend):
    if backend == "mamba_ssm" and isinstance(state_space._cuda_kernels(), str):
        pytest.skip(f"needs mamba-ssm and causal-conv1d: {state_space._cuda_kernels()}")
    function, plain, make_inputs, names = OPERATORS[operator]
    sizes = {"scan": {"channels": 16, "size": 8}, "dual": {"head_dim": 16, "size": 16}, "conv": {"channels": 16}}
    # the Triton kernels multiply in TF32
    tolerance = 5e-3 if (operator, backend) == ("dual", "mamba_ssm") else 1e-5
    for length in (1, 64, 200):
        inputs = make_inputs(length, **sizes[operator])
        expected = values_and_gradients(plain, inputs, torch.float64, names)
        inputs = [tensor.cuda() for tensor in inputs]
        actual = values_and_gradients(lambda *a: function(*a, backend=backend), inputs, torch.float32, names)
        assert_close({name: value.cpu() for name, value in actual.items()}, expected, tolerance)
        if operator == "scan":
            # without initial state and final state the kernel computes, gradients included
            def output(x, delta, A, B, C, D, state):
                y, _ = selective_scan(x, delta, A, B, C, D, backend=backend, return_state=False)
                return y, state

            def plain_output(x, delta, A, B, C, D, state):
                return plain_scan(x, delta, A, B, C, D, torch.zeros_like(state))[0], state

            expected = values_and_gradients(plain_output, [t.cpu() for t in inputs], torch.float64, names)
            actual = values_and_gradients(output, inputs, torch.float32, names)
            assert_close({name: value.cpu() for name, value in actual.items()}, expected, 1e-5)


@pytest.fixture
def stand_in_kernels(monkeypatch):
    """
    Modules in the places of mamba-ssm 2.3 and causal-conv1d 1.7 whose functions have the arguments and the conditions
    of the kernels, and compute by the plain recurrences. Yields the names of what was called.
    """
    called = []

    def selective_scan_fn(
        u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False
    ):
        (batch, channels, length), size = u.shape, A.shape[1]
        assert delta.shape == u.shape and A.shape == (channels, size) and B.shape == C.shape == (batch, size, length)
        assert {tensor.dtype for tensor in (u, delta, A, B, C, D)} == {torch.float32}
        assert all(tensor.stride(-1) == 1 for tensor in (u, delta, B, C))
        assert z is None and delta_bias is None and not delta_softplus
        called.append("selective_scan_fn")
        inputs = [tensor.transpose(1, 2) for tensor in (u, delta, B, C)]
        y, state = plain_scan(*inputs[:2], A, *inputs[2:], D, u.new_zeros(batch, channels, size))
        # the kernel gives no gradient to the final state
        return (y.transpose(1, 2), state.detach()) if return_last_state else y.transpose(1, 2)

    def mamba_chunk_scan_combined(
        x,
        dt,
        A,
        B,
        C,
        chunk_size,
        D=None,
        z=None,
        dt_bias=None,
        initial_states=None,
        seq_idx=None,
        cu_seqlens=None,
        dt_softplus=False,
        dt_limit=(0.0, float("inf")),
        return_final_states=False,
        return_varlen_states=False,
    ):
        (batch, length, heads, head_dim), size = x.shape, B.shape[-1]
        assert dt.shape == (batch, length, heads) and A.shape == D.shape == (heads,)
        assert B.shape == C.shape == (batch, length, 1, size) and B.dtype == C.dtype == x.dtype
        assert dt.dtype == A.dtype == torch.float32 and isinstance(chunk_size, int) and chunk_size >= 1
        assert all(tensor.stride(-1) == 1 for tensor in (x, B, C))
        assert initial_states is None or initial_states.shape == (batch, heads, head_dim, size)
        assert z is None and dt_bias is None and seq_idx is None and cu_seqlens is None
        assert not dt_softplus and not return_varlen_states
        called.append("mamba_chunk_scan_combined")
        state = x.new_zeros(batch, heads, head_dim, size) if initial_states is None else initial_states
        y, state = plain_dual(x.float(), dt, A, B[:, :, 0].float(), C[:, :, 0].float(), D, state.float())
        return (y.to(x.dtype), state) if return_final_states else y.to(x.dtype)

    def causal_conv1d_fn(
        x,
        weight,
        bias=None,
        seq_idx=None,
        initial_states=None,
        return_final_states=False,
        final_states_out=None,
        activation=None,
    ):
        batch, channels, length = x.shape
        assert activation == "silu" and x.stride(1) == 1 and channels % 8 == 0
        assert weight.shape == (channels, weight.shape[1]) and 2 <= weight.shape[1] <= 4 and bias.shape == (channels,)
        assert weight.dtype == bias.dtype == x.dtype and weight.is_contiguous()
        assert seq_idx is None and initial_states is None and not return_final_states and final_states_out is None
        called.append("causal_conv1d_fn")
        inputs, window = x.transpose(1, 2), x.new_zeros(batch, weight.shape[1] - 1, channels)
        return plain_conv(inputs, weight, bias, window)[0].transpose(1, 2)

    for name, function in (
        ("mamba_ssm.ops.selective_scan_interface", selective_scan_fn),
        ("mamba_ssm.ops.triton.ssd_combined", mamba_chunk_scan_combined),
        ("causal_conv1d", causal_conv1d_fn),
    ):
        module = types.ModuleType(name)
        setattr(module, function.__name__, function)
        for depth in range(1, name.count(".") + 1):
            package = ".".join(name.split(".")[:depth])
            monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
        monkeypatch.setitem(sys.modules, name, module)
    state_space._cuda_kernels.cache_clear()
    # tensors of the CPU stand for those of a GPU
    monkeypatch.setattr(state_space, "_kernel_for", lambda backend, x: backend)
    yield called
    state_space._cuda_kernels.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("operator", ["scan", "dual", "conv"])
def test_kernels_get_the_arguments_that_they_expect(operator, dtype, stand_in_kernels):
    function, _, make_inputs, names = OPERATORS[operator]
    inputs = make_inputs(21, **({} if operator == "dual" else {"channels": 16}))
    inputs[0] = inputs[0].to(dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    name = {"scan": "selective_scan_fn", "dual": "mamba_chunk_scan_combined", "conv": "causal_conv1d_fn"}[operator]

    def compare(given, **options):
        results = []
        for backend in ("torch", "mamba_ssm"):

            def run(*tensors, backend=backend):
                y, state = function(*tensors, backend=backend, **options)
                return y, given[0] if state is None else state

            results.append(values_and_gradients(run, given, dtype, names[: len(given)]))
        assert_close(results[1], results[0], tolerance)

    # with the initial state, which the kernel of Mamba-1 does not take, and without
    compare(inputs)
    compare(inputs[:-1])
    assert stand_in_kernels == ([] if operator == "scan" else [name] * 2)
    del stand_in_kernels[:]
    if operator != "conv":
        compare(inputs[:-1], return_state=False)
        assert stand_in_kernels == [name]
    with torch.no_grad():
        expected, found = (function(*inputs[:-1], backend=backend) for backend in ("torch", "mamba_ssm"))
    assert found[0].dtype == dtype and stand_in_kernels[-1] == name
    assert_close(dict(zip("ys", found)), dict(zip("ys", expected)), tolerance)


@pytest.mark.parametrize("ssm", ["mamba1", "mamba2"])
def test_models_compute_the_same_with_the_kernels(ssm, stand_in_kernels):
    from hepzoo.modeling.configuration_fm4npp import Fm4nppConfig
    from hepzoo.modeling.modeling_fm4npp import Fm4nppForPreTraining

    settings = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "head_dim": 16, "num_neighbors": 2}
    points, mask = torch.rand(2, 12, 4), torch.ones(2, 12)
    mask[1, 7:] = 0
    labels = torch.rand(2, 12, 6).masked_fill(mask[..., None] == 0, -100)
    results = []
    for backend in ("torch", "mamba_ssm"):
        torch.manual_seed(0)
        model = Fm4nppForPreTraining(Fm4nppConfig(ssm=ssm, kernel_backend=backend, **settings))
        outputs = model(points, attention_mask=mask, neighbor_labels=labels)
        outputs.loss.backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        with torch.no_grad():
            first = model(points[:, :5], use_cache=True)
            second = model(points[:, 5:], attention_mask=mask[:, 5:], cache_params=first.cache_params)
        pieces = torch.cat([first.predictions, second.predictions], dim=1)
        results.append({"y": outputs.predictions.detach(), "pieces": pieces, **gradients})
    assert_close(results[1], results[0], 1e-4)
    scan = "selective_scan_fn" if ssm == "mamba1" else "mamba_chunk_scan_combined"
    assert set(stand_in_kernels) == {scan, "causal_conv1d_fn"}


# Choice of the backend


class FakeKernels(dict):
    """Kernels of mamba-ssm that must not be called."""

    def __missing__(self, name):
        raise AssertionError(f"{name} was called with tensors that it cannot treat")


@pytest.fixture
def mamba_ssm_is_there(monkeypatch):
    monkeypatch.setattr(state_space, "_cuda_kernels", FakeKernels)


@pytest.mark.parametrize("operator", ["scan", "dual", "conv"])
def test_cuda_kernels_never_see_tensors_of_the_cpu(operator, mamba_ssm_is_there):
    function, _, make_inputs, _ = OPERATORS[operator]
    inputs = make_inputs(70)
    assert torch.equal(function(*inputs, backend="mamba_ssm")[0], function(*inputs, backend="torch")[0])


def test_auto(monkeypatch, caplog):
    monkeypatch.setattr(state_space.logger, "propagate", True)
    monkeypatch.setattr(state_space, "_cuda_kernels", lambda: "ImportError: no module")
    monkeypatch.setattr(state_space, "_numba_error", lambda: None)
    with caplog.at_level(logging.INFO, logger=state_space.logger.name):
        assert resolve_backend("auto", "mamba1") == "numba"
        assert resolve_backend("auto", "mamba2") == "torch"
    assert [record.getMessage() for record in caplog.records] == [
        "mamba1 computes with numba (asked for: auto)",
        "mamba2 computes with torch (asked for: auto)",
    ]
    monkeypatch.setattr(state_space, "_numba_error", lambda: "no numba")
    assert resolve_backend("auto", "mamba1") == "torch"
    # kernels, but no GPU
    monkeypatch.setattr(state_space, "_cuda_kernels", FakeKernels)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_backend("auto", "mamba1") == "torch"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_backend("auto", "mamba1") == resolve_backend("auto", "mamba2") == "mamba_ssm"
    assert resolve_backend("torch", "mamba1") == "torch"


def test_hostile_backends(monkeypatch):
    monkeypatch.setattr(state_space, "_cuda_kernels", lambda: "ImportError: no module named mamba_ssm")
    monkeypatch.setattr(state_space, "_numba_error", lambda: 'kernels need numba: pip install "hepzoo[cpu]"')
    with pytest.raises(ImportError, match=r'mamba-ssm and causal-conv1d.*"hepzoo\[mamba\]".*no module named mamba_ssm'):
        resolve_backend("mamba_ssm", "mamba2")
    with pytest.raises(ImportError, match=r'"hepzoo\[cpu\]"'):
        resolve_backend("numba", "mamba1")
    with pytest.raises(ValueError, match="'numba' has no kernels for mamba2"):
        resolve_backend("numba", "mamba2")
    with pytest.raises(ValueError, match="backend 'cuda': expected one of auto, torch, numba, mamba_ssm"):
        resolve_backend("cuda", "mamba1")
    with pytest.raises(ValueError, match="'mamba3': expected one of mamba1, mamba2"):
        resolve_backend("auto", "mamba3")
    with pytest.raises(ValueError, match="backend 'auto': expected one of torch, numba, mamba_ssm"):
        selective_scan(*scan_inputs(3), backend="auto")


@pytest.mark.parametrize("operator, backend", CASES)
def test_hostile_shapes(operator, backend):
    """One position, channel or number of state too few or too many, in each input."""
    function, _, make_inputs, names = OPERATORS[operator]
    inputs = make_inputs(6)
    for position, (name, tensor) in enumerate(zip(names, inputs)):
        # a convolution has no other input of that length
        for dim in set(range(tensor.ndim)) - ({1} if (operator, name) == ("conv", "x") else set()):
            for wrong in (tensor.narrow(dim, 0, tensor.shape[dim] - 1), torch.cat([tensor, tensor], dim=dim)):
                arguments = [*inputs[:position], wrong, *inputs[position + 1 :]]
                with pytest.raises(ValueError, match=r"has shape \(.*\), expected"):
                    function(*arguments, backend=backend)
        with pytest.raises(ValueError, match=f"{name} has shape" if position else "x has shape"):
            function(*inputs[:position], tensor.unsqueeze(0), *inputs[position + 1 :], backend=backend)


def test_hostile_chunk_size():
    with pytest.raises(ValueError, match="chunk_size 0, expected at least 1"):
        state_space_dual(*dual_inputs(5), chunk_size=0)


@pytest.mark.parametrize("operator, backend", CASES)
def test_no_positions_and_second_derivatives(operator, backend):
    function, _, make_inputs, _ = OPERATORS[operator]
    inputs = make_inputs(0)
    y, state = function(*inputs, backend=backend)
    assert y.shape == inputs[0].shape
    torch.testing.assert_close(state, inputs[-1])
    inputs = [tensor.requires_grad_() for tensor in make_inputs(4)]
    (gradient,) = torch.autograd.grad(function(*inputs, backend=backend)[0].sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable|does not require grad"):
        gradient.sum().backward()


def test_import_needs_no_kernel_package():
    """Neither `import hepzoo` nor the operators import numba or mamba-ssm; without numba the file says what to do."""
    code = """
import sys
import hepzoo, hepzoo.modeling.state_space as state_space
assert not {"numba", "mamba_ssm", "causal_conv1d"} & set(sys.modules)
sys.modules["numba"] = None
print(state_space.resolve_backend("auto", "mamba1"))
try:
    state_space.resolve_backend("numba", "mamba1")
except ImportError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == ["torch", 'the compiled CPU kernels need numba: pip install "hepzoo[cpu]"']


@needs_numba
def test_numba_without_a_folder_for_its_cache(monkeypatch):
    """A read-only installation and no home: compiled again in every process, but it works."""
    from hepzoo.modeling import state_space_numba

    compiler, asked = state_space_numba.njit, []

    def njit(cache=False, **options):
        asked.append(cache)
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return compiler(**options)

    monkeypatch.setattr(state_space_numba, "njit", njit)
    assert state_space_numba.kernel(lambda value: value + 1)(2) == 3
    assert asked == [True, False]
