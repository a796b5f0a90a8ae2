"""
OmniJet (arXiv:2403.05618 jets, 2501.05534 showers): the way the reference computes, and what is measured against it.

Called by generation.py and training.py. The reference's way is written from its behaviour, on the weights of our model:

* generation: no cache; the whole prefix through the network with scores (batch, heads, length, length) held, logits of
  every position, of which the last are used; softmax and `multinomial`;
* training: the same attention with padded keys masked, padding computed, logits of every position held;
* tokens: batches padded to the published 128 constituents; the whole VQ-VAE to get codes, `cdist` in pieces of 1024
  latents; loops over jets take the padding off the codes, put it on again, and take it off the decoded features.
"""

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from hepzoo import OmniJetConfig, OmniJetForCausalLM, OmniJetTokenizer, OmniJetVQVAEConfig, OmniJetVQVAEModel
from hepzoo.modeling.chunked_cross_entropy import chunked_linear_cross_entropy
from hepzoo.modeling.vector_quantization import nearest_codes

# codes -> jets or showers of a batch, constituents or hits of each, longest sequence of the model
GENERATION_CASES = {8192: ([1, 64], 64, 128), 65536: ([1, 16], 200, 1700)}
JET_LENGTH = 128
SHOWER_LENGTH = 1700
# latents whose distances to all codes the reference holds at a time
CDIST_ROWS = 1024


def make_model(num_codes: int, max_length: int, seed: int, **settings) -> OmniJetForCausalLM:
    """Published size and ids (the start id pads), random weights."""
    torch.manual_seed(seed)
    config = OmniJetConfig(
        codebook_size=num_codes, vocab_size=num_codes + 2, max_position_embeddings=max_length, **settings
    )
    return OmniJetForCausalLM(config).eval()


def causal_buffer(length: int) -> torch.Tensor:
    return torch.ones(length, length).tril()


def explicit_attention(attention, states: torch.Tensor, tril: torch.Tensor, is_real: torch.Tensor | None):
    """Scores (batch, heads, length, length), padded keys and later positions set to -inf, softmax."""
    batch, length, size = states.shape
    query, key, value = (
        projection(states).view(batch, length, -1, attention.head_dim).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    scores = query @ key.transpose(-2, -1) / attention.head_dim**0.5
    if is_real is not None:
        scores = scores.masked_fill(~is_real[:, None, None].expand_as(scores), -torch.inf)
    scores = scores.masked_fill(tril[:length, :length] == 0, -torch.inf)
    output = scores.softmax(dim=-1) @ value
    return attention.o_proj(output.transpose(1, 2).reshape(batch, length, size))


def reference_logits(model: OmniJetForCausalLM, ids, tril, is_real=None) -> torch.Tensor:
    """Logits of every position, (batch, length, vocab), of ids (batch, length)."""
    states = model.model.embed_tokens(ids)
    for layer in model.model.layers:
        states = layer.post_attention_norm(explicit_attention(layer.self_attn, states, tril, is_real) + states)
        states = layer.post_mlp_norm(layer.mlp(states) + states)
    return model.lm_head(states)


# Generation


class ReferenceGeneration:
    def __init__(self, model: OmniJetForCausalLM, batch: int, length: int):
        self.model = model
        self.batch = batch
        self.length = length
        self.tril = causal_buffer(model.config.max_position_embeddings)

    @torch.no_grad()
    def step(self, ids: torch.Tensor) -> torch.Tensor:
        logits = reference_logits(self.model, ids, self.tril)
        # id 0, which starts and pads, is never drawn
        drawn = torch.multinomial(logits[:, -1, 1:].softmax(dim=-1), 1) + 1
        return torch.cat([ids, drawn], dim=1)

    def seconds(self, points: int | None) -> float:
        """Seconds for a batch. With `points`, steps are timed at that many lengths and integrated."""
        ids = torch.zeros(self.batch, 1, dtype=torch.long)
        if points is None:
            begin = time.perf_counter()
            for _ in range(self.length):
                ids = self.step(ids)
            return time.perf_counter() - begin
        filler = torch.randint(1, self.model.config.codebook_size + 1, (self.batch, self.length))
        ids = torch.cat([ids, filler], dim=1)
        lengths = np.unique(np.linspace(1, self.length, points).round().astype(int))
        timed = []
        for length in lengths:
            begin = time.perf_counter()
            self.step(ids[:, :length])
            timed.append(time.perf_counter() - begin)
        # the cost of a step is smooth in the length: interpolate to every step and add up
        return float(np.interp(np.arange(1, self.length + 1), lengths, timed).sum())

    @torch.no_grad()
    def check(self, length: int = 12, tolerance: float = 1e-4):
        """The same logits as `forward` of our model."""
        ids = torch.randint(1, self.model.config.codebook_size + 1, (2, length))
        ids[:, 0] = self.model.config.bos_token_id
        ours = self.model(ids, use_cache=False).logits
        difference = (ours - reference_logits(self.model, ids, self.tril)).abs().max().item()
        if difference > tolerance:
            raise RuntimeError(f"the two ways give logits that differ by {difference}")


def our_seconds(model: OmniJetForCausalLM, batch: int, length: int) -> float:
    begin = time.perf_counter()
    # default sampling
    ids = model.generate(num_return_sequences=batch, max_new_tokens=length)
    seconds = time.perf_counter() - begin
    if tuple(ids.shape) != (batch, length + 1):
        raise RuntimeError(f"generate gave ids of shape {tuple(ids.shape)}, expected {(batch, length + 1)}")
    return seconds


def benchmark_generation(arguments: argparse.Namespace) -> dict:
    cases = [arguments.codes] if arguments.codes else list(GENERATION_CASES)
    results = [generation_case(num_codes, arguments) for num_codes in cases]
    result = {"family": "omnijet", **results[0]}
    for showers in results[1:]:
        result.update({f"showers_{name}": value for name, value in showers.items()})
    return result


def generation_case(num_codes: int, arguments: argparse.Namespace) -> dict:
    # other numbers of codes are measured on jets
    batches, length, max_length = GENERATION_CASES.get(num_codes, GENERATION_CASES[8192])
    if arguments.codes:
        batches, length = arguments.batches or batches, arguments.length or length
    model = make_model(num_codes, max(max_length, length + 1), arguments.seed)
    with torch.no_grad():
        # none may end: all have exactly the same number of constituents
        model.lm_head.bias[model.config.eos_token_id] = -1e9
    ReferenceGeneration(model, 2, length).check()
    print(f"OmniJet, {num_codes} codes, {model.num_parameters():,} parameters, {length} codes each, default sampling")
    print(
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, median of {arguments.repeats} alternating runs"
    )
    print(f"{'batch':>6} {'reference 1/s':>14} {'ours 1/s':>10} {'ratio':>7} {'ours ms/code':>13}")
    for batch in batches:
        reference = ReferenceGeneration(model, batch, length)
        points = arguments.points if batch > 1 else None
        our_seconds(model, batch, 3)
        slow, fast = alternating_medians(
            [partial(reference.seconds, points), partial(our_seconds, model, batch, length)], arguments.repeats
        )
        result = {"speedup": slow / fast, "baseline_per_s": batch / slow, "ours_per_s": batch / fast}
        note = "" if points is None else f"  (reference timed at {points} lengths and integrated)"
        print(
            f"{batch:>6} {batch / slow:>14.3f} {batch / fast:>10.2f} {slow / fast:>7.1f} "
            f"{1e3 * fast / batch / length:>13.3f}{note}"
        )
    return {**result, "batch": batch, "length": length, "codes": num_codes}


def alternating_medians(runs: list[Callable[[], float]], repeats: int) -> list[float]:
    seconds = [[run() for run in runs] for _ in range(repeats)]
    return [statistics.median(values) for values in zip(*seconds)]


# Training


def jet_lengths(batch: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """Between a quarter and four fifths of `length`, about the spread of constituents of large-radius jets."""
    return torch.randint(length // 4, 4 * length // 5, (batch,), generator=generator)


def random_batch(config: OmniJetConfig, batch: int, length: int, is_padded: bool, seed: int) -> dict:
    """Start, codes and stop of jets; with `is_padded` of different lengths, else `length` ids each."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, config.codebook_size + 1, (batch, length), generator=generator)
    ids[:, 0] = config.bos_token_id
    lengths = jet_lengths(batch, length, generator) if is_padded else torch.full((batch,), length)
    ids[torch.arange(batch), lengths - 1] = config.eos_token_id
    attention_mask = (torch.arange(length) < lengths.unsqueeze(-1)).long()
    ids = ids.masked_fill(attention_mask == 0, config.pad_token_id)
    labels = ids.masked_fill(attention_mask == 0, -100)
    return {"input_ids": ids, "attention_mask": attention_mask, "labels": labels}


def reference_loss(model: OmniJetForCausalLM, batch: dict) -> torch.Tensor:
    """Scores and logits of every position in memory, one cross entropy; of padding too where the model trains it."""
    ids = batch["input_ids"]
    tril = model.causal_buffer
    logits = reference_logits(model, ids, tril, batch["attention_mask"].bool())[:, :-1]
    trains_padding = model.config.padding_loss == "trained"
    targets = (ids if trains_padding else batch["labels"])[:, 1:]
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def our_loss(model: OmniJetForCausalLM, batch: dict) -> torch.Tensor:
    return model(**batch, use_cache=False).loss


def benchmark_training(arguments: argparse.Namespace) -> dict:
    batch, length = arguments.batch, JET_LENGTH
    model = make_model(8192, length, 0).train()
    model.causal_buffer = causal_buffer(length)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    cases = {
        "no padding": (False, "ignored"),
        "padding ignored": (True, "ignored"),
        "padding trained (published)": (True, "trained"),
    }
    print(f"OmniJet, {model.num_parameters():,} parameters, batch {batch} x {length} ids, AdamW")
    print(
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, median of {arguments.repeats} alternating steps"
    )
    print(f"{'batch':<28}{'reference s':>12}{'ours s':>9}{'ratio':>7}{'reference MiB':>15}{'ours MiB':>10}")
    results = {}
    for name, (is_padded, padding_loss) in cases.items():
        model.config.padding_loss = padding_loss
        inputs = random_batch(model.config, batch, length, is_padded, seed=2)
        losses = {reference_loss: [], our_loss: []}

        def step(loss_function, inputs=inputs, losses=losses) -> float:
            begin = time.perf_counter()
            optimizer.zero_grad()
            loss = loss_function(model, inputs)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            losses[loss_function].append(loss.item())
            return time.perf_counter() - begin

        step(reference_loss), step(our_loss)  # to warm up
        slow, fast = alternating_medians([lambda: step(reference_loss), lambda: step(our_loss)], arguments.repeats)
        for expected, value in zip(*losses.values()):
            if abs(expected - value) > 1e-2 * abs(expected):
                raise RuntimeError(f"{name}: losses differ: {expected} and {value}")
        memory = [
            peak_megabytes(lambda f=loss_function, x=inputs: f(model, x).backward())
            for loss_function in (reference_loss, our_loss)
        ]
        print(f"{name:<28}{slow:>12.2f}{fast:>9.2f}{slow / fast:>7.2f}{memory[0]:>15.0f}{memory[1]:>10.0f}")
        results[name] = {"speedup": slow / fast, "baseline_per_s": 1 / slow, "ours_per_s": 1 / fast}
    vqvae = benchmark_vqvae(arguments.repeats)
    memory = benchmark_memory()
    return {
        "family": "omnijet",
        # padding gives no advantage there
        **results["no padding"],
        "batch": batch,
        "length": length,
        "speedup_padding_ignored": results["padding ignored"]["speedup"],
        "speedup_padding_trained": results["padding trained (published)"]["speedup"],
        **vqvae,
        **memory,
    }


# Tokens


def cdist_codes(latents: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Nearest codes of latents (n, size): all distances to pieces of the latents, the smallest by `topk`."""
    pieces = [
        torch.cdist(piece, codebook).topk(1, dim=-1, largest=False)[1].squeeze(-1)
        for piece in latents.split(CDIST_ROWS)
    ]
    return torch.cat(pieces)


@torch.no_grad()
def reference_tokens_and_back(model: OmniJetVQVAEModel, jets: list[torch.Tensor], batch: int):
    """Codes and decoded features of jets (constituents, features), as in the reference."""
    codes, decoded = [], []
    for start in range(0, len(jets), batch):
        part = jets[start : start + batch]
        features = torch.zeros(len(part), JET_LENGTH, model.config.num_features)
        is_real = torch.zeros(len(part), JET_LENGTH, dtype=torch.long)
        for row, jet in enumerate(part):
            features[row, : len(jet)] = jet
            is_real[row, : len(jet)] = 1
        # the whole network, of which the codes are kept
        latents = model.encoder(features, is_real)
        codebook = model.quantizer.effective_codebook()
        padded = cdist_codes(latents.flatten(0, 1), codebook).view(is_real.shape)
        model.decoder(codebook[padded], is_real)
        codes_of_part = [padded[row, : len(jet)] for row, jet in enumerate(part)]

        again = torch.zeros(len(part), JET_LENGTH, dtype=torch.long)
        for row, codes_of_jet in enumerate(codes_of_part):
            again[row, : len(codes_of_jet)] = codes_of_jet
        output = model.decoder(model.quantizer.effective_codebook()[again], is_real)
        codes += codes_of_part
        decoded += [output[row, : len(jet)] for row, jet in enumerate(part)]
    return codes, decoded


@torch.no_grad()
def jet_by_jet_tokens_and_back(model: OmniJetVQVAEModel, jets: list[torch.Tensor], batch: int):
    """The same one jet at a time, without any padding, decoder only where it is needed."""
    codes, decoded = [], []
    for jet in jets:
        is_real = torch.ones(1, len(jet), dtype=torch.long)
        codebook = model.quantizer.effective_codebook()
        codes.append(cdist_codes(model.encoder(jet.unsqueeze(0), is_real)[0], codebook))
        decoded.append(model.decoder(codebook[codes[-1]].unsqueeze(0), is_real)[0])
    return codes, decoded


def our_tokens_and_back(tokenizer: OmniJetTokenizer, jets: list[torch.Tensor]):
    """As the tokenizer does it: jets of similar length together, the encoder for codes, the decoder for features."""
    lengths = np.array([len(jet) for jet in jets])
    codes = tokenizer._run_vqvae("encode", torch.cat(jets).numpy(), lengths)
    decoded = tokenizer._run_vqvae("decode", codes, lengths)
    return [torch.from_numpy(values).split(lengths.tolist()) for values in (codes, decoded)]


def benchmark_vqvae(repeats: int, num_jets: int = 512, batch: int = 128) -> dict:
    torch.manual_seed(0)
    model = OmniJetVQVAEModel(OmniJetVQVAEConfig()).eval()
    lengths = jet_lengths(num_jets, JET_LENGTH, torch.Generator().manual_seed(1)).tolist()
    jets = [torch.randn(length, model.config.num_features) for length in lengths]
    ways = {
        "cdist + loops, padded to 128": reference_tokens_and_back,
        "cdist, one jet at a time": jet_by_jet_tokens_and_back,
    }
    tokenizer = OmniJetTokenizer(vqvae=model)
    codes, decoded = our_tokens_and_back(tokenizer, jets)
    for name, way in ways.items():
        other_codes, other_decoded = way(model, jets, batch)
        # where two codes are as near as rounding can tell, either is right, and the rest of the jet decodes otherwise
        differ = [not torch.equal(a, b) for a, b in zip(codes, other_codes, strict=True)]
        difference = max(
            (a - b).abs().max().item() for a, b, skip in zip(decoded, other_decoded, differ, strict=True) if not skip
        )
        if sum(differ) > 0.01 * num_jets or difference > 1e-4:
            raise RuntimeError(f"{name}: codes of {sum(differ)} jets differ, features by {difference}")

    def seconds(run: Callable[[], object]) -> float:
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin

    runs = {name: partial(way, model, jets, batch) for name, way in ways.items()}
    runs["ours"] = partial(our_tokens_and_back, tokenizer, jets)
    timed = alternating_medians([partial(seconds, run) for run in runs.values()], repeats)
    padded, one_by_one, ours = timed
    print(f"VQ-VAE, {model.num_parameters():,} parameters, 8192 codes: {num_jets} jets of {min(lengths)} to", end=" ")
    print(f"{max(lengths)} constituents to codes and back, the reference's in batches of {batch}")
    for name, value in zip(runs, timed):
        print(f"{name:<32}{value:>7.2f} s {num_jets / value:>9.0f} jets/s {value / ours:>7.2f}")
    return {
        "vqvae_speedup": padded / ours,
        "vqvae_speedup_jet_by_jet": one_by_one / ours,
        "vqvae_jets_per_s": num_jets / ours,
    }


# Memory


def peak_megabytes(run: Callable[[], object]) -> float:
    """Largest amount of tensor memory that a run allocates, MiB (allocations seen by the profiler)."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    running = peak = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            running += event.nbytes()
            peak = max(peak, running)
    return peak / 2**20


def peak_resident_megabytes() -> float:
    """Of this process, MiB; Linux. (The figure of `getrusage` includes that of the parent process.)"""
    lines = Path(f"/proc/{os.getpid()}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def shower_loss(is_chunked: bool) -> tuple[float, float]:
    """Of one shower of 1700 hits with 65 538 ids, forward and backward: peak above the weights, MiB, and seconds."""
    torch.manual_seed(0)
    head = nn.Linear(256, 65538)
    hidden = torch.randn(SHOWER_LENGTH, 256, requires_grad=True)
    targets = torch.randint(0, 65538, (SHOWER_LENGTH,))
    before = peak_resident_megabytes()
    begin = time.perf_counter()
    if is_chunked:
        loss = chunked_linear_cross_entropy(hidden, head.weight, head.bias, targets)
    else:
        loss = nn.functional.cross_entropy(head(hidden), targets, reduction="sum")
    loss.backward()
    return peak_resident_megabytes() - before, time.perf_counter() - begin


def quantization(positions: int, is_plain: bool = False) -> tuple[float, float]:
    """Of the nearest of 8192 codes of so many latents: peak above the latents, MiB, and seconds."""
    torch.manual_seed(0)
    latents, codebook = torch.randn(positions, 4), torch.randn(8192, 4)
    before = peak_resident_megabytes()
    begin = time.perf_counter()
    if is_plain:
        torch.cdist(latents, codebook).argmin(dim=-1)
    else:
        nearest_codes(latents, codebook)
    return peak_resident_megabytes() - before, time.perf_counter() - begin


def in_a_process_of_its_own(function: Callable, *arguments):
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def benchmark_memory() -> dict:
    if not Path("/proc/self/status").is_file():
        print("peak memory of a process: not measured, it needs Linux")
        return {}
    (plain, plain_seconds), (chunked, chunked_seconds) = (
        in_a_process_of_its_own(shower_loss, is_chunked) for is_chunked in (False, True)
    )
    print(
        f"loss of {SHOWER_LENGTH} x 65538 logits, forward and backward, peak memory of a process above its weights: "
        f"{plain:.0f} MiB plain ({plain_seconds:.2f} s), {chunked:.0f} MiB in chunks ({chunked_seconds:.2f} s)"
    )
    sizes = (2**12, 2**15, 2**18)
    ours = [in_a_process_of_its_own(quantization, positions)[0] for positions in sizes]
    held = in_a_process_of_its_own(quantization, sizes[1], True)[0]
    parts = [f"{value:.0f} MiB for {positions} latents" for positions, value in zip(sizes, ours)]
    print(
        f"nearest of 8192 codes, peak memory above the latents: {', '.join(parts)}; "
        f"{held:.0f} MiB with all distances of {sizes[1]}"
    )
    return {
        "loss_peak_mib": chunked,
        "loss_peak_mib_plain": plain,
        "nearest_codes_peak_mib": dict(zip(map(str, sizes), ours)),
    }
