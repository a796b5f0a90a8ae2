"""The chunked cross entropy against `torch.nn.functional.cross_entropy` on the logits of all positions."""

import pytest
import torch
from torch import nn

from hepzoo.modeling import chunked_cross_entropy as module
from hepzoo.modeling.chunked_cross_entropy import chunked_linear_cross_entropy

POSITIONS, HIDDEN, VOCAB = 23, 16, 131


def inputs(dtype=torch.float32, bias=True, ignored=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(POSITIONS, HIDDEN, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, HIDDEN, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    offset = torch.randn(VOCAB, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() if bias else None
    targets = torch.randint(0, VOCAB, (POSITIONS,), generator=generator)
    targets[torch.rand(POSITIONS, generator=generator) < ignored] = -100
    return hidden, weight, offset, targets


def reference(hidden, weight, bias, targets, **kwargs):
    return nn.functional.cross_entropy(nn.functional.linear(hidden, weight, bias), targets, reduction="sum", **kwargs)


def gradients(loss, *tensors):
    return torch.autograd.grad(loss, [tensor for tensor in tensors if tensor is not None])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("chunk_size", [1, 4, 16, 1000, None])
def test_value_and_gradients_equal_torch(chunk_size, bias):
    *tensors, targets = inputs(bias=bias)
    ours = chunked_linear_cross_entropy(*tensors, targets, chunk_size=chunk_size)
    theirs = reference(*tensors, targets)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-5)
    # an upstream factor, as the mean over targets makes one
    for actual, expected in zip(gradients(ours / 7, *tensors), gradients(theirs / 7, *tensors)):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_default_chunk_covers_a_published_vocabulary(monkeypatch):
    # several chunks of the default choice, the last one not full
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * VOCAB * 5)
    *tensors, targets = inputs(ignored=0.0)
    ours, theirs = chunked_linear_cross_entropy(*tensors, targets), reference(*tensors, targets)
    for actual, expected in zip(gradients(ours, *tensors), gradients(theirs, *tensors)):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_float64_is_computed_in_float64():
    *tensors, targets = inputs(dtype=torch.float64)
    ours, theirs = chunked_linear_cross_entropy(*tensors, targets, chunk_size=4), reference(*tensors, targets)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-12, atol=1e-12)
    for actual, expected in zip(gradients(ours, *tensors), gradients(theirs, *tensors)):
        assert actual.dtype == torch.float64
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16_is_as_close_to_float32_as_torch_is(autocast):
    """Value and every gradient: not further from the float32 ones than twice what plain torch is."""
    *exact, targets = inputs()
    expected = gradients(reference(*exact, targets), *exact)
    rounded = exact if autocast else [tensor.detach().bfloat16().requires_grad_() for tensor in exact]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        ours = chunked_linear_cross_entropy(*rounded, targets, chunk_size=3)
        theirs = reference(*rounded, targets)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, reference(*exact, targets), rtol=1e-2, atol=0)
    for actual, plain, true, tensor in zip(gradients(ours, *rounded), gradients(theirs, *rounded), expected, rounded):
        assert actual.dtype == tensor.dtype
        assert (actual.float() - true).norm() <= 2 * (plain.float() - true).norm() + 1e-3 * true.norm()


def test_all_positions_ignored_cost_nothing():
    *tensors, targets = inputs(ignored=1.1)
    loss = chunked_linear_cross_entropy(*tensors, targets)
    assert loss.item() == 0
    for gradient, tensor in zip(gradients(loss, *tensors), tensors):
        assert gradient.shape == tensor.shape and not gradient.any()


def test_ignored_positions_do_not_count_and_may_hold_anything():
    hidden, weight, bias, targets = inputs()
    polluted = hidden.detach().clone()
    polluted[targets == -100] = torch.nan
    polluted.requires_grad_()
    loss = chunked_linear_cross_entropy(polluted, weight, bias, targets)
    torch.testing.assert_close(loss, reference(hidden, weight, bias, targets))
    (gradient,) = gradients(loss, polluted)
    assert not gradient[targets == -100].any() and gradient.isfinite().all()


def test_other_ignore_index():
    *tensors, targets = inputs(ignored=0.0)
    targets[::2] = 5
    ours = chunked_linear_cross_entropy(*tensors, targets, ignore_index=5, chunk_size=4)
    torch.testing.assert_close(ours, reference(*tensors, targets, ignore_index=5))


@pytest.mark.parametrize("trainable", [(True, False, False), (False, True, False), (False, False, True)])
def test_frozen_inputs_get_no_gradient(trainable):
    *tensors, targets = inputs()
    for tensor, wanted in zip(tensors, trainable):
        tensor.requires_grad_(wanted)
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    (actual,) = gradients(chunked_linear_cross_entropy(*tensors, targets, chunk_size=4), *wanted)
    (expected,) = gradients(reference(*tensors, targets), *wanted)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_no_gradients_are_computed_when_none_are_wanted():
    *tensors, targets = inputs()
    with torch.no_grad():
        loss = chunked_linear_cross_entropy(*tensors, targets)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, reference(*tensors, targets).detach())


def test_inputs_are_left_alone_and_backward_repeats():
    *tensors, targets = inputs()
    copies = [tensor.detach().clone() for tensor in tensors]
    loss = chunked_linear_cross_entropy(*tensors, targets, chunk_size=4)
    first = torch.autograd.grad(loss, tensors, retain_graph=True)
    second = torch.autograd.grad(loss, tensors)
    for one, two in zip(first, second):
        assert torch.equal(one, two)
    for tensor, copy in zip(tensors, copies):
        assert torch.equal(tensor, copy)


def test_large_logits_do_not_overflow():
    hidden, weight, bias, targets = inputs()
    with torch.no_grad():
        hidden *= 1e3
    ours, theirs = (f(hidden, weight, bias, targets) for f in (chunked_linear_cross_entropy, reference))
    assert ours.isfinite()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)


def test_hostile_second_derivatives_are_refused_not_wrong():
    """Gradients made in the forward pass are constants to autograd: a second derivative would be silently zero."""
    hidden, weight, bias, targets = inputs()
    loss = chunked_linear_cross_entropy(hidden, weight, bias, targets)
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(gradient.square().sum(), hidden)


@pytest.mark.parametrize("target", [VOCAB, -1])
def test_hostile_target_outside_the_vocabulary(target):
    hidden, weight, bias, targets = inputs()
    targets[3] = target
    with pytest.raises((ValueError, IndexError, RuntimeError), match=str(target)):
        chunked_linear_cross_entropy(hidden, weight, bias, targets)
