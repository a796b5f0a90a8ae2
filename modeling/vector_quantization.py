"""
Vector quantisation as in vqtorch (github.com/minyoungg/vqtorch, arXiv:2305.08842): straight-through estimator with a
synchronised codebook, affine codebook, revival of dead codes, k-means initialisation.

Distances are float32 whatever the precision of the model, and no (positions x codes) matrix is held.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from transformers import initialization as init
from transformers.utils import ModelOutput

# scores held at a time by `nearest_codes`: 16 MB
MAX_SCORES = 2**22
KMEANS_STEPS = 10


@dataclass
class VectorQuantizerOutput(ModelOutput):
    """
    Args:
        quantized (`(batch, length, latent_size)`): the chosen code vectors, with the straight-through gradient.
        codes (`(batch, length)`): index of the nearest code, at padding too.
        loss (scalar): commitment and codebook loss.
        perplexity (scalar): exp of the entropy of the codes of this batch, padding left out.
        codebook_usage (scalar): fraction of the codebook that occurs in this batch, padding left out.
    """

    quantized: torch.FloatTensor | None = None
    codes: torch.LongTensor | None = None
    loss: torch.FloatTensor | None = None
    perplexity: torch.FloatTensor | None = None
    codebook_usage: torch.FloatTensor | None = None


@contextmanager
def float32_matmul(device: torch.device) -> Iterator[None]:
    """Products of float32 matrices in float32: neither autocast nor TF32, whose 10 bits choose other codes."""
    with torch.autocast(device.type, enabled=False):
        if device.type != "cuda":
            yield
            return
        settings = torch.backends.cuda.matmul
        name, exact = ("fp32_precision", "ieee") if hasattr(settings, "fp32_precision") else ("allow_tf32", False)
        before = getattr(settings, name)
        setattr(settings, name, exact)
        try:
            yield
        finally:
            setattr(settings, name, before)


@torch.no_grad()
def nearest_codes(latents: torch.Tensor, codebook: torch.Tensor, max_scores: int = MAX_SCORES) -> torch.LongTensor:
    """
    Index of the nearest row of `codebook` (codes, size) for every latent (..., size).

    |z - c|^2 = |z|^2 - 2 z.c + |c|^2 is compared without |z|^2, in float32, for at most `max_scores` pairs at a time.
    """
    rows = latents.detach().reshape(-1, latents.shape[-1]).float()
    codebook = codebook.detach().float()
    # distances do not change, but their rounding errors grow with the distance from the origin
    center = codebook.mean(dim=0)
    rows, codebook = rows - center, codebook - center
    squares, transposed = codebook.square().sum(dim=-1), codebook.t().contiguous()
    chunk_size = max(1, max_scores // len(codebook))
    with float32_matmul(latents.device):
        # min and not argmin, which is several times slower on CPUs
        chunks = [torch.addmm(squares, chunk, transposed, alpha=-2).min(dim=-1)[1] for chunk in rows.split(chunk_size)]
    return torch.cat(chunks).view(latents.shape[:-1])


@torch.no_grad()
def kmeans(latents: torch.Tensor, num_codes: int, num_steps: int = KMEANS_STEPS) -> torch.Tensor:
    """
    Centres (num_codes, size) of the latents (n, size), float32.

    With more latents than codes: Lloyd's algorithm from randomly chosen latents; a centre without latents stays where
    it is. Otherwise the latents are repeated, with a little noise, until there is one for each code.
    """
    latents = latents.float()
    if len(latents) <= num_codes:
        repeated = latents.repeat(-(-num_codes // len(latents)), 1)[:num_codes]
        return repeated + 1e-3 * torch.randn_like(repeated)
    centers = latents[torch.randperm(len(latents), device=latents.device)[:num_codes]]
    for _ in range(num_steps):
        nearest = nearest_codes(latents, centers)
        members = torch.bincount(nearest, minlength=num_codes).unsqueeze(-1)
        sums = torch.zeros_like(centers).index_add_(0, nearest, latents)
        centers = torch.where(members > 0, sums / members.clamp(min=1), centers)
    return centers


class VectorQuantizer(nn.Module):
    """
    Replaces vectors by their nearest code.

    Args:
        codebook_size, latent_size (`int`): number and width of the codes.
        beta (`float`): weight of the loss that moves the codes to the latents; the commitment of the latents to the
            codes has weight 1 - beta.
        sync_nu (`float`): share of the decoder's gradient that the codes receive.
        affine_lr (`float`): the codes in use are (1 + affine_lr * scale) * codebook + affine_lr * bias with a learned
            scale and bias; 0 leaves them out.
        replace_freq (`int`): in training, codes that the last so many batches did not use are replaced by latents; 0
            never.
        kmeans_init (`bool`): the first batch of training sets the codebook.
        exclude_padding (`bool`): padding enters neither losses nor counts nor initialisation; `False` is the published
            behaviour.
        invert_affine (`bool`): revived codes lie at the latents that they are made of; `False` is the published
            behaviour, where the affine map moves them away.
    """

    def __init__(
        self,
        codebook_size: int,
        latent_size: int,
        beta: float = 0.9,
        sync_nu: float = 1.0,
        affine_lr: float = 2.0,
        replace_freq: int = 10,
        kmeans_init: bool = True,
        exclude_padding: bool = True,
        invert_affine: bool = True,
    ):
        super().__init__()
        self.beta = beta
        self.sync_nu = sync_nu
        self.affine_lr = affine_lr
        self.replace_freq = replace_freq
        self.exclude_padding = exclude_padding
        self.invert_affine = invert_affine
        self.codebook = nn.Parameter(torch.randn(codebook_size, latent_size))
        if affine_lr > 0:
            self.affine_scale = nn.Parameter(torch.zeros(1, latent_size))
            self.affine_bias = nn.Parameter(torch.zeros(1, latent_size))
        # batches that each code may still be unused
        self.register_buffer("counts", torch.full((codebook_size,), float(replace_freq)) if replace_freq > 0 else None)
        self.register_buffer("data_initialized", torch.zeros(1) if kmeans_init else None)

    @torch.no_grad()
    def reset_parameters(self):
        """Fresh codes from N(0, 1) and no affine map; called by `_init_weights` of the models."""
        init.normal_(self.codebook, mean=0.0, std=1.0)
        if self.affine_lr > 0:
            init.zeros_(self.affine_scale)
            init.zeros_(self.affine_bias)
        if self.counts is not None:
            init.constant_(self.counts, float(self.replace_freq))
        if self.data_initialized is not None:
            init.zeros_(self.data_initialized)

    def effective_codebook(self) -> torch.Tensor:
        """The codes in use, (codebook_size, latent_size), float32."""
        codebook = self.codebook.float()
        if self.affine_lr == 0:
            return codebook
        return (1 + self.affine_lr * self.affine_scale.float()) * codebook + self.affine_lr * self.affine_bias.float()

    def lookup(self, codes: torch.LongTensor) -> torch.Tensor:
        """Vectors (..., latent_size) of code indices (...), float32."""
        return nn.functional.embedding(codes, self.effective_codebook())

    def forward(self, latents: torch.Tensor, attention_mask: torch.Tensor | None = None) -> VectorQuantizerOutput:
        """
        Args:
            latents (`(batch, length, latent_size)`).
            attention_mask (`(batch, length)`): 1 for real positions, 0 for padding.
        """
        dtype, latents = latents.dtype, latents.float()
        is_real = torch.ones(latents.shape[:-1], dtype=torch.bool, device=latents.device)
        if attention_mask is not None:
            is_real = attention_mask.bool()
        is_counted = is_real if self.exclude_padding else torch.ones_like(is_real)
        with torch.autocast(latents.device.type, enabled=False):
            if self.training:
                self._prepare_codebook(latents.detach()[is_counted])
            codebook = self.effective_codebook()
            codes = nearest_codes(latents, codebook)
            chosen = nn.functional.embedding(codes, codebook)
            if self.training and self.counts is not None:
                self._count(codes[is_counted])

            commitment = (latents - chosen.detach()).square().mean(dim=-1)
            alignment = (latents.detach() - chosen).square().mean(dim=-1)
            losses = (1 - self.beta) * commitment + self.beta * alignment
            loss = (losses * is_counted).sum() / is_counted.sum().clamp(min=1)

            # the value is `chosen`; gradient 1 to the latents, sync_nu to the codes
            synchronized = self.sync_nu * (chosen - chosen.detach())
            quantized = latents + (chosen - latents).detach() + synchronized

        frequencies = torch.bincount(codes[is_real], minlength=len(self.codebook)).float()
        frequencies = frequencies / frequencies.sum().clamp(min=1)
        return VectorQuantizerOutput(
            quantized=quantized.to(dtype),
            codes=codes,
            loss=loss,
            perplexity=torch.special.entr(frequencies).sum().exp(),
            codebook_usage=(frequencies > 0).float().mean(),
        )

    @torch.no_grad()
    def _prepare_codebook(self, latents: torch.Tensor):
        """
        k-means initialisation and revival, from the latents (n, latent_size) of a batch that is about to be quantised.
        Before the codes are used, because what autograd has stored must not change.
        """
        if not len(latents):
            return
        if self.data_initialized is not None and not self.data_initialized.item():
            self.codebook.copy_(self._from_first_rank(self._inverse_affine(kmeans(latents, len(self.codebook)))))
            self.data_initialized.fill_(1)
        if self.counts is None:
            return
        dead = (self.counts <= 0).nonzero().squeeze(-1)
        if not len(dead):
            return
        order = torch.randperm(len(latents), device=latents.device)
        revived = latents[order.repeat(math.ceil(len(dead) / len(latents)))[: len(dead)]]
        revived = revived + 0.01 * revived.norm(dim=-1, keepdim=True) * torch.randn_like(revived)
        if self.invert_affine:
            revived = self._inverse_affine(revived)
        self.codebook[dead] = self._from_first_rank(revived).to(self.codebook.dtype)
        self.counts[dead] = float(self.replace_freq)

    def _inverse_affine(self, codes: torch.Tensor) -> torch.Tensor:
        """Rows of the codebook that the affine map turns into `codes`."""
        if self.affine_lr == 0:
            return codes
        factor = 1 + self.affine_lr * self.affine_scale.float()
        # a component that the map has all but removed cannot be restored
        factor = torch.where(factor.abs() < 1e-2, torch.ones_like(factor), factor)
        return (codes - self.affine_lr * self.affine_bias.float()) / factor

    @torch.no_grad()
    def _count(self, codes: torch.LongTensor):
        used = torch.zeros_like(self.counts)
        used[codes] = 1
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(used, op=dist.ReduceOp.MAX)
        self.counts.copy_(torch.where(used > 0, torch.full_like(self.counts, self.replace_freq), self.counts - 1))

    def _from_first_rank(self, values: torch.Tensor) -> torch.Tensor:
        """The same codes on all processes of a distributed training, whose batches differ."""
        if dist.is_available() and dist.is_initialized():
            values = values.contiguous()
            dist.broadcast(values, src=0)
        return values


__all__ = ["VectorQuantizer", "VectorQuantizerOutput", "kmeans", "nearest_codes"]
