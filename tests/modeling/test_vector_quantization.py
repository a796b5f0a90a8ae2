"""Vector quantisation: exact nearest codes, gradients, revival of dead codes, initialisation, memory."""

import math

import pytest
import torch

from hepzoo.modeling.vector_quantization import VectorQuantizer, kmeans, nearest_codes


def make(num_codes=16, size=3, **kwargs) -> VectorQuantizer:
    torch.manual_seed(0)
    return VectorQuantizer(num_codes, size, **{"kmeans_init": False, "replace_freq": 0, **kwargs})


def batch(shape=(4, 7, 3), num_padded=2, seed=1):
    torch.manual_seed(seed)
    mask = torch.ones(shape[:2], dtype=torch.long)
    mask[:, shape[1] - num_padded :] = 0
    return torch.randn(shape), mask


@pytest.mark.parametrize("max_scores", [1, 1000, 2**22])
@pytest.mark.parametrize("num_codes, size", [(2, 1), (37, 4), (512, 12)])
def test_nearest_codes_are_those_of_cdist(num_codes, size, max_scores):
    torch.manual_seed(num_codes)
    codebook = torch.randn(num_codes, size)
    latents = torch.randn(5, 11, size)
    expected = torch.cdist(latents.double(), codebook.double()).argmin(-1)
    assert torch.equal(nearest_codes(latents, codebook, max_scores), expected)


def test_nearest_codes_far_from_the_origin():
    """|c|^2 - 2 z.c alone would lose the differences in the rounding."""
    torch.manual_seed(3)
    codebook = torch.randn(100, 4) + 3000
    latents = codebook[torch.randint(0, 100, (200,))] + 0.05 * torch.randn(200, 4)
    expected = torch.cdist(latents.double(), codebook.double()).argmin(-1)
    assert torch.equal(nearest_codes(latents, codebook), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_distances_are_float32_in_half_precision(dtype):
    quantizer = make(num_codes=300, size=4).eval()
    latents = torch.randn(2, 50, 4).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = quantizer(latents)
    expected = torch.cdist(latents.double(), quantizer.effective_codebook().double()).argmin(-1)
    assert torch.equal(output.codes, expected)
    assert output.quantized.dtype == dtype and output.loss.dtype == torch.float32


def test_affine_codebook_and_lookup():
    quantizer = make(affine_lr=2.0)
    with torch.no_grad():
        quantizer.affine_scale.copy_(torch.tensor([[0.1, -0.2, 0.3]]))
        quantizer.affine_bias.copy_(torch.tensor([[1.0, 2.0, -1.0]]))
    expected = quantizer.codebook * torch.tensor([1.2, 0.6, 1.6]) + torch.tensor([2.0, 4.0, -2.0])
    torch.testing.assert_close(quantizer.effective_codebook(), expected)
    codes = torch.tensor([[3, 0], [15, 3]])
    torch.testing.assert_close(quantizer.lookup(codes), expected[codes])
    assert "affine_scale" not in make(affine_lr=0).state_dict()


@pytest.mark.parametrize("sync_nu", [0.0, 0.4, 1.0])
def test_straight_through_gradients(sync_nu):
    quantizer = make(sync_nu=sync_nu)
    latents, _ = batch()
    latents.requires_grad_()
    output = quantizer(latents)
    torch.testing.assert_close(output.quantized, quantizer.lookup(output.codes))
    weights = torch.randn_like(latents)
    (output.quantized * weights).sum().backward()
    torch.testing.assert_close(latents.grad, weights)
    received = torch.zeros_like(quantizer.codebook).index_add_(0, output.codes.flatten(), weights.flatten(0, 1))
    torch.testing.assert_close(quantizer.codebook.grad, sync_nu * received)


@pytest.mark.parametrize("exclude_padding", [True, False])
def test_loss_written_out(exclude_padding):
    quantizer = make(beta=0.9, exclude_padding=exclude_padding)
    latents, mask = batch()
    latents.requires_grad_()
    output = quantizer(latents, mask)
    counted = mask.bool() if exclude_padding else torch.ones_like(mask).bool()
    chosen = quantizer.lookup(output.codes)
    torch.testing.assert_close(output.loss, (latents - chosen)[counted].square().mean())
    output.loss.backward()
    commitment = 0.1 * 2 * (latents - chosen) / (counted.sum() * latents.shape[-1]) * counted.unsqueeze(-1)
    torch.testing.assert_close(latents.grad, commitment.detach())
    # the codes feel nine times as much
    torch.testing.assert_close(quantizer.codebook.grad.sum(0), -9 * latents.grad.sum((0, 1)))


def test_usage_and_perplexity():
    quantizer = make(num_codes=4, size=2, affine_lr=0)
    with torch.no_grad():
        quantizer.codebook.copy_(torch.tensor([[0.0, 0], [1, 0], [0, 1], [1, 1]]))
    latents = torch.tensor([[[0.0, 0], [0, 0.1], [1, 1], [1, 0]], [[0, 0], [1, 1], [1, 1], [0, 1]]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    output = quantizer(latents, mask)
    assert output.codes.tolist() == [[0, 0, 3, 1], [0, 3, 3, 2]]
    assert output.codebook_usage.item() == 0.5
    entropy = -(0.6 * math.log(0.6) + 0.4 * math.log(0.4))
    assert output.perplexity.item() == pytest.approx(math.exp(entropy))


@pytest.mark.parametrize("exclude_padding", [True, False])
def test_dead_codes_are_revived_at_latents(exclude_padding):
    quantizer = make(num_codes=6, size=2, replace_freq=3, exclude_padding=exclude_padding)
    with torch.no_grad():
        quantizer.codebook.copy_(torch.tensor([[0.0, 0], [10, 10], [500, 0], [0, 500], [-500, 0], [0, -500]]))
        quantizer.affine_scale.fill_(0.25)
        quantizer.affine_bias.fill_(0.5)
    # 1.5 * codebook + 1
    latents = torch.tensor([[[1.0, 1.0], [1.0, 1.1], [16.0, 16.0]]]).repeat(4, 1, 1)
    mask = torch.tensor([[1, 1, 0]]).repeat(4, 1)
    before = quantizer.codebook.detach().clone()
    for step in range(3):
        quantizer(latents, mask)
        assert torch.equal(quantizer.codebook, before), step
    used = [0] if exclude_padding else [0, 1]
    dead = [code for code in range(6) if code not in used]
    assert quantizer.counts.tolist() == [3.0 if code in used else 0.0 for code in range(6)]
    quantizer(latents, mask)
    assert torch.equal(quantizer.codebook[used], before[used])
    distances = torch.cdist(quantizer.effective_codebook()[dead], latents[mask.bool() | (not exclude_padding)])
    # the noise is 1 % of the length of the latent
    assert distances.min(dim=1).values.max() < 1.5
    assert (quantizer.counts[dead] >= 2).all()


def test_revival_as_published_ignores_the_affine_map():
    quantizer = make(num_codes=2, size=1, replace_freq=1, invert_affine=False)
    with torch.no_grad():
        quantizer.codebook.copy_(torch.tensor([[0.0], [100.0]]))
        quantizer.affine_scale.fill_(1.0)
    latents = torch.full((1, 3, 1), 4.0)
    for _ in range(2):
        quantizer(latents)
    torch.testing.assert_close(quantizer.codebook[1].item(), 4.0, atol=0.5, rtol=0)


def test_nothing_is_revived_in_evaluation():
    quantizer = make(num_codes=64, replace_freq=1, kmeans_init=True).eval()
    before = {name: values.clone() for name, values in quantizer.state_dict().items()}
    for seed in range(3):
        quantizer(*batch(seed=seed))
    assert all(torch.equal(values, before[name]) for name, values in quantizer.state_dict().items())


def test_revival_between_forward_and_backward_is_safe():
    quantizer = make(num_codes=64, replace_freq=1)
    latents, mask = batch()
    latents.requires_grad_()
    for _ in range(3):
        output = quantizer(latents, mask)
        (output.loss + output.quantized.square().sum()).backward()
    assert torch.isfinite(quantizer.codebook.grad).all()


@pytest.mark.parametrize("num_latents", [1, 5, 16, 40, 41, 200])
def test_kmeans_never_shrinks_the_codebook(num_latents):
    torch.manual_seed(0)
    latents = torch.randn(num_latents, 3)
    centers = kmeans(latents, 40)
    assert centers.shape == (40, 3) and torch.isfinite(centers).all()
    if num_latents <= 40:
        assert torch.cdist(centers, latents).min(dim=1).values.max() < 0.01
        assert torch.cdist(latents, centers).min(dim=1).values.max() < 0.01


def test_kmeans_finds_clusters():
    torch.manual_seed(0)
    means = 10 * torch.randn(5, 2)
    latents = (means.unsqueeze(1) + 0.1 * torch.randn(5, 60, 2)).flatten(0, 1)
    centers = kmeans(latents, 20)
    assert torch.cdist(means, centers).min(dim=1).values.max() < 0.2
    error = torch.cdist(latents, centers).min(dim=1).values.square().mean()
    start = torch.cdist(latents, latents[torch.randperm(300)[:20]]).min(dim=1).values.square().mean()
    assert error < start


def test_first_batch_of_training_sets_the_codebook_without_padding():
    quantizer = make(num_codes=32, kmeans_init=True)
    latents, mask = batch()
    latents[mask == 0] = 1000
    quantizer(latents, mask)
    assert quantizer.data_initialized.item() == 1
    assert quantizer.effective_codebook().abs().max() < 100
    initialized = quantizer.codebook.detach().clone()
    quantizer(*batch(seed=5))
    assert torch.equal(quantizer.codebook, initialized)


def test_batch_of_padding_alone():
    quantizer = make(kmeans_init=True, replace_freq=2)
    latents, mask = batch()
    before = quantizer.codebook.detach().clone()
    output = quantizer(latents, torch.zeros_like(mask))
    assert output.loss.item() == 0 and output.codebook_usage.item() == 0
    assert torch.equal(quantizer.codebook, before) and quantizer.data_initialized.item() == 0


def test_no_matrix_of_positions_times_codes(monkeypatch):
    largest = 0
    addmm = torch.addmm

    def watched(*args, **kwargs):
        nonlocal largest
        result = addmm(*args, **kwargs)
        largest = max(largest, result.numel())
        return result

    monkeypatch.setattr(torch, "addmm", watched)
    nearest_codes(torch.randn(3000, 4), torch.randn(8192, 4))
    assert 0 < largest <= 2**22 < 3000 * 8192
