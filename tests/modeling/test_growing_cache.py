"""`GrowingLayer` against the library's `DynamicLayer`."""

import copy

import pytest
import torch
from transformers import DynamicCache

from hepzoo.modeling.configuration_cmhca_dirc import CMHCADircConfig
from hepzoo.modeling.growing_cache import GrowingLayer, growing_cache

BATCH, HEADS, SIZE, LAYERS = 3, 2, 4, 2


def both_caches() -> tuple[DynamicCache, DynamicCache]:
    config = CMHCADircConfig(hidden_size=8, num_hidden_layers=LAYERS, num_attention_heads=2)
    growing = growing_cache(DynamicCache(config=config))
    assert all(type(layer) is GrowingLayer for layer in growing.layers)
    return growing, DynamicCache(config=config)


def states(length: int, generator: torch.Generator, batch: int = BATCH) -> list[torch.Tensor]:
    return [torch.randn(batch, HEADS, length, SIZE, generator=generator) for _ in range(2)]


def update(caches, length: int, generator: torch.Generator, batch: int = BATCH):
    for layer_idx in range(LAYERS):
        new = states(length, generator, batch)
        returned = [cache.update(*new, layer_idx) for cache in caches]
        for ours, theirs in zip(*returned):
            assert torch.equal(ours, theirs)


def assert_same(ours: DynamicCache, theirs: DynamicCache):
    assert ours.get_seq_length() == theirs.get_seq_length()
    assert ours.get_mask_sizes(1, 0) == theirs.get_mask_sizes(1, 0)
    for our_layer, their_layer in zip(ours.layers, theirs.layers):
        assert torch.equal(our_layer.keys, their_layer.keys)
        assert torch.equal(our_layer.values, their_layer.values)


@pytest.mark.parametrize("lengths", [[1] * 70, [5] + [1] * 130, [63, 1, 1, 1], [64, 64, 1], [200, 3, 1]])
def test_equals_concatenation(lengths):
    caches, generator = both_caches(), torch.Generator().manual_seed(0)
    for length in lengths:
        update(caches, length, generator)
        assert_same(*caches)


@torch.no_grad()
def test_appends_without_moving_what_is_held():
    cache, _ = both_caches()
    generator = torch.Generator().manual_seed(0)
    addresses = set()
    for _ in range(200):
        addresses.add(cache.update(*states(1, generator), 0)[0].data_ptr())
    # one address per doubling of the capacity
    assert len(addresses) <= 4


@pytest.mark.parametrize("removed", [1, 5])
def test_crop_then_continue(removed):
    caches, generator = both_caches(), torch.Generator().manual_seed(0)
    update(caches, 8, generator)
    for cache in caches:
        cache.crop(-removed)
    assert_same(*caches)
    for length in (1, 2, 70):
        update(caches, length, generator)
        assert_same(*caches)


@pytest.mark.parametrize(
    "reshape, batch",
    [
        (lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), 2),
        (lambda cache: cache.batch_select_indices(torch.tensor([2, 0, 1])), 3),
        (lambda cache: cache.batch_repeat_interleave(2), 2 * BATCH),
        (lambda cache: cache.reorder_cache(torch.tensor([1, 1, 0])), BATCH),
        (lambda cache: cache.reset(), BATCH),
    ],
    ids=["select", "permute", "repeat", "reorder", "reset"],
)
def test_rows_change_then_continue(reshape, batch):
    caches, generator = both_caches(), torch.Generator().manual_seed(0)
    update(caches, 6, generator)
    for cache in caches:
        reshape(cache)
    for length in (1, 1, 80):
        update(caches, length, generator, batch)
        assert_same(*caches)


def test_copies_do_not_write_into_each_other():
    """As for a prompt that is continued several times."""
    cache, reference = both_caches()
    generator = torch.Generator().manual_seed(0)
    update((cache, reference), 6, generator)
    branches = [(copy.deepcopy(cache), copy.deepcopy(reference)) for _ in range(2)]
    for branch in branches:
        update(branch, 3, generator)
    for branch in branches:
        assert_same(*branch)
    assert_same(cache, reference)


def test_gradients_flow_through_the_cache():
    cache, reference = both_caches()
    generator = torch.Generator().manual_seed(0)
    steps = [[tensor.requires_grad_() for tensor in states(length, generator)] for length in (4, 1, 1)]
    tensors = [tensor for step in steps for tensor in step]
    results = []
    for each in (cache, reference):
        loss = 0
        for step in steps:
            keys, values = each.update(*step, 0)
            loss = loss + (keys.square().sum() * values.mean()).tanh() + (keys * values).sum()
        results.append(torch.autograd.grad(loss, tensors))
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs)
    # and it goes on growing in place afterwards
    with torch.no_grad():
        for length in (1, 1):
            new = states(length, generator)
            for ours, theirs in zip(cache.update(*new, 0), reference.update(*new, 0)):
                assert torch.equal(ours, theirs)


def test_gradients_of_a_query_alone_flow_through_the_cache():
    """Keys of frozen layers need no gradient, but a backward pass still needs them as they were."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(BATCH, HEADS, 1, SIZE, generator=generator, requires_grad=True)
    steps = [states(length, generator) for length in (4, 1, 1)]
    results = []
    for cache in both_caches():
        loss = sum((query @ cache.update(*step, 0)[0].transpose(2, 3)).square().sum() for step in steps)
        results.append(torch.autograd.grad(loss, query)[0])
    torch.testing.assert_close(*results)


def test_a_cache_made_in_inference_mode_continues_outside():
    caches, generator = both_caches(), torch.Generator().manual_seed(0)
    with torch.inference_mode():
        update(caches, 4, generator)
    update(caches, 1, generator)
    assert_same(*caches)


def test_a_cache_in_use_is_left_alone():
    _, cache = both_caches()
    update((cache, copy.deepcopy(cache)), 3, torch.Generator().manual_seed(0))
    kinds = [type(layer) for layer in cache.layers]
    assert [type(layer) for layer in growing_cache(cache).layers] == kinds


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    caches = both_caches()
    generator = torch.Generator().manual_seed(0)
    for length in (3, 1, 1):
        new = [tensor.to(dtype) for tensor in states(length, generator)]
        for ours, theirs in zip(*(cache.update(*new, 0) for cache in caches)):
            assert ours.dtype == dtype and torch.equal(ours, theirs)
