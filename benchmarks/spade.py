"""
SPADE (arXiv:2606.11304): the way the reference computes, and what is measured against it.

Called by generation.py and training.py. The reference's way is written from its behaviour, on the weights of our model:

* generation: a cache of keys and values, and only the last position goes through the decoder; but every step embeds the
  whole buffer of `max_len` positions of all streams to use one of them. Its published setting is a buffer of 1700; the
  best it can do for showers of known length is a buffer that just holds them.
* training: showers padded to 1700 hits, a dense mask (batch, 1, length, length) on top of causal attention, logits and
  energy mixtures of every position, the stop network on every row of the padding.

Hit counts are forced on both sides (random weights have no idea where a shower ends), so no stop network runs in
generation.
"""

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import nn

from hepzoo import SpadeConfig, SpadeForCausalLM, SpadeTokenizer
from hepzoo.data_scripts.simulate_showers import simulate_showers
from hepzoo.modeling.modeling_spade import apply_rotary, mixture_nll, mixture_scales

PUBLISHED_LENGTH = 1700


def make_model(seed: int, **settings) -> SpadeForCausalLM:
    """Published size and rotary pairing, random weights."""
    torch.manual_seed(seed)
    return SpadeForCausalLM(SpadeConfig(rope_pairing="published", **settings)).eval()


def incident_energies(batch: int) -> torch.Tensor:
    return torch.linspace(10, 100, batch)


def embed(embeddings, ids: torch.Tensor, energy: torch.Tensor, incident_energy: torch.Tensor) -> torch.Tensor:
    """Ids (batch, length, streams) and energies (batch, length) of hits, without registers: (batch, length, size)."""
    features = [norm(token(ids[..., k])) for k, (token, norm) in enumerate(zip(embeddings.tokens, embeddings.norms))]
    features.append(embeddings.hit_energy(energy))
    condition = embeddings.incident_energy(embeddings.scale_incident_energy(incident_energy))
    features.append(condition.unsqueeze(1).expand(-1, ids.shape[1], -1))
    return embeddings.projection(torch.cat(features, dim=-1))


def attend(attention, normed: torch.Tensor, rotary: tuple, mask: torch.Tensor, cache: list | None) -> torch.Tensor:
    """Attention of the reference: one key and value head, repeated for every query head; cache by concatenation."""
    batch, length, size = normed.shape
    query, key, value = (
        projection(normed).view(batch, length, -1, attention.head_dim).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    query, key = apply_rotary(query, *rotary), apply_rotary(key, *rotary)
    if cache is not None:
        cache[0] = key = torch.cat([cache[0], key], dim=2)
        cache[1] = value = torch.cat([cache[1], value], dim=2)
    key = key.repeat_interleave(attention.num_key_value_groups, dim=1)
    value = value.repeat_interleave(attention.num_key_value_groups, dim=1)
    output = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return attention.o_proj(output.transpose(1, 2).reshape(batch, length, size))


def decode_layers(base, states: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor, caches=None) -> torch.Tensor:
    rotary = (*base.rotary(positions, states.dtype), base.rotary.partner)
    for index, layer in enumerate(base.layers):
        cache = None if caches is None else caches[index]
        states = states + attend(layer.self_attn, layer.attention_norm(states), rotary, mask, cache)
        states = states + layer.mlp(layer.mlp_norm(states))
    return base.norm(states)


# Generation


class ReferenceGeneration:
    """
    Args:
        max_len: positions of the buffers, BOS included, registers not.
    """

    def __init__(self, model: SpadeForCausalLM, incident_energy: torch.Tensor, num_hits: int, max_len: int):
        self.model, self.config = model, model.config
        self.incident_energy = incident_energy
        self.num_hits = num_hits
        # position p is drawn from the output at p - 1, BOS is there from the start
        self.num_steps = num_hits + self.config.max_stream_delay
        if max_len < self.num_steps + 1:
            raise ValueError(f"a buffer of {max_len} does not hold {num_hits} hits")
        batch = len(incident_energy)
        self.missing = torch.tensor(self.config.stream_missing_token_ids)
        self.delays = torch.tensor(self.config.stream_delays)
        self.ids = torch.zeros(batch, max_len, self.config.num_streams, dtype=torch.long)
        for stream, delay in enumerate(self.config.stream_delays):
            self.ids[:, : delay + 1, stream] = self.missing[stream]
        self.energy = torch.zeros(batch, max_len)
        self.is_real = torch.zeros(batch, max_len, dtype=torch.bool)
        self.caches = [[None, None] for _ in model.model.layers]

    def start(self, step: int = 0):
        """Buffers and caches as they are before a step; beyond step 0 they hold random hits, which cost the same."""
        config = self.config
        batch = len(self.ids)
        for stream, cells in enumerate(config.stream_num_cells):
            first = config.stream_delays[stream] + 1
            self.ids[:, first : step + 1, stream] = torch.randint(1, cells + 1, (batch, max(step + 1 - first, 0)))
        self.is_real[:, :step] = True
        width = 0 if step == 0 else config.num_registers + step
        for cache in self.caches:
            cache[:] = torch.randn(2, batch, config.num_key_value_heads, width, config.head_dim).unbind()

    @torch.no_grad()
    def step(self, step: int) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """Draws position `step` + 1; returns the logits and the energy mixture it was drawn from."""
        config, base = self.config, self.model.model
        batch, slots = len(self.ids), config.num_registers
        self.is_real[:, step] = True
        # the whole buffer, of which one position is used
        embedded = embed(base.embeddings, self.ids, self.energy, self.incident_energy)[:, step : step + 1]
        first = slots + step
        if step == 0:
            embedded = torch.cat([base.embeddings.registers.expand(batch, -1, -1), embedded], dim=1)
            first = 0
        positions = torch.arange(first, slots + step + 1)
        keys = torch.arange(slots + step + 1)
        is_real = torch.cat([torch.ones(batch, slots, dtype=torch.bool), self.is_real[:, : step + 1]], dim=1)
        mask = (keys <= positions.unsqueeze(-1)) & is_real[:, None, None]
        hidden = decode_layers(base, embedded, positions.unsqueeze(0), mask, self.caches)[:, -1]
        logits = tuple(head(hidden) for head in self.model.token_heads)
        mixture = self.model.energy_head(hidden)
        self.draw(step + 1, logits, mixture)
        return logits, mixture

    def draw(self, position: int, logits: tuple[torch.Tensor, ...], mixture: tuple[torch.Tensor, ...]):
        weights, means, log_scales = mixture
        component = torch.multinomial(weights.softmax(dim=-1), 1)
        energy = torch.normal(means.gather(-1, component), mixture_scales(log_scales).gather(-1, component))
        energy = energy.squeeze(-1).nan_to_num().clamp(self.config.energy_min, self.config.energy_max)
        self.energy[:, position] = energy if position > self.config.energy_delay else 0.0
        for stream, values in enumerate(logits):
            if position <= self.config.stream_delays[stream]:
                continue
            values = values.clone()
            values[:, [0, self.config.stream_missing_token_ids[stream]]] = -torch.inf
            self.ids[:, position, stream] = torch.multinomial(values.softmax(dim=-1), 1).squeeze(-1)

    def decode(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Cells (batch, hits, streams), energies in MeV (batch, hits) and where there is a hit, of the whole buffer."""
        width = self.ids.shape[1] - 1 - self.config.max_stream_delay
        shifted = [self.ids[:, 1 + delay :][:, :width, k] for k, delay in enumerate(self.config.stream_delays)]
        cells = torch.stack(shifted, dim=-1)
        is_hit = ((cells > 0) & (cells < self.missing)).all(dim=-1) & (torch.arange(width) < self.num_hits)
        energy = (self.energy[:, 1 + self.config.energy_delay :][:, :width] / 0.91 - 1.5).exp()
        return (cells - 1).masked_fill(~is_hit.unsqueeze(-1), 0), energy.masked_fill(~is_hit, 0.0), is_hit

    def seconds(self, points: int | None) -> float:
        """Seconds for a batch of showers. With `points`, steps are timed at that many positions and integrated."""
        if points is None:
            self.start()
            begin = time.perf_counter()
            for step in range(self.num_steps):
                self.step(step)
            is_hit = self.decode()[-1]
            seconds = time.perf_counter() - begin
            if not (is_hit.sum(dim=1) == self.num_hits).all():
                raise RuntimeError(f"the reference's way made {is_hit.sum(dim=1).tolist()} hits")
            return seconds
        steps = np.unique(np.linspace(1, self.num_steps - 1, points).round().astype(int))
        timed = []
        for step in steps:
            self.start(int(step))
            begin = time.perf_counter()
            self.step(int(step))
            timed.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        self.decode()
        decoding = time.perf_counter() - begin
        # the cost of a step is smooth in the position: interpolate to every step and add up
        return float(np.interp(np.arange(self.num_steps), steps, timed).sum()) + decoding

    @torch.no_grad()
    def check(self, num_steps: int = 12, tolerance: float = 1e-4):
        """The same logits and mixtures as `forward` of our model for what was drawn."""
        self.start()
        for step in range(num_steps):
            logits, mixture = self.step(step)
        slots = self.missing.expand(len(self.ids), self.config.num_registers, -1)
        expected = self.model(
            torch.cat([slots, self.ids[:, :num_steps]], dim=1),
            hit_energy=nn.functional.pad(self.energy[:, :num_steps], (self.config.num_registers, 0)),
            incident_energy=self.incident_energy,
            use_cache=False,
        )
        for ours, reference in zip((*expected.logits, *expected.energy_mixture), (*logits, *mixture), strict=True):
            difference = (ours[:, -1] - reference).abs().max().item()
            if difference > tolerance:
                raise RuntimeError(f"the two ways give outputs that differ by {difference}")


def our_showers(model, tokenizer, incident_energy: torch.Tensor, num_hits, **kwargs) -> dict:
    """Default sampling at temperature 1, decoded to hits."""
    output = model.generate(incident_energy=incident_energy, num_hits=num_hits, **kwargs)
    return tokenizer.batch_decode(output, incident_energy=incident_energy)


def our_seconds(model, tokenizer, incident_energy: torch.Tensor, num_hits, **kwargs) -> float:
    begin = time.perf_counter()
    with torch.no_grad():
        showers = our_showers(model, tokenizer, incident_energy, num_hits, **kwargs)
    seconds = time.perf_counter() - begin
    if not np.array_equal(showers["num_hits"], np.broadcast_to(num_hits, len(incident_energy))):
        raise RuntimeError(f"showers have {showers['num_hits'].tolist()} hits, expected {num_hits}")
    return seconds


class StepClock:
    """A streamer that only notes when each position came."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, ids: torch.Tensor):
        self.times.append(time.perf_counter())

    def end(self):
        pass


def benchmark_generation(arguments: argparse.Namespace) -> dict:
    model = make_model(arguments.seed)
    tokenizer = SpadeTokenizer.from_model_config(model.config)
    num_hits = arguments.length
    # the shortest buffer that the published code takes for so many hits
    shortest = num_hits + 6
    ReferenceGeneration(model, incident_energies(3), num_hits, shortest).check()
    print(f"SPADE, {model.num_parameters():,} parameters, {num_hits} hits per shower, temperature 1, decoding included")
    print(
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, median of {arguments.repeats} alternating runs"
    )
    print(f"{'':>14}{'showers per second':^24}{'':>7}{'ms per hit':^20}")
    print(f"{'batch':>6}{'buffer':>8}{'reference':>14}{'ours':>10}{'ratio':>7}{'reference':>12}{'ours':>8}")
    speedups, rates = {}, {}
    for batch in arguments.batches:
        energies = incident_energies(batch)
        points = arguments.points if batch > 4 else None
        our_seconds(model, tokenizer, energies, 5)
        references = {
            max_len: ReferenceGeneration(model, energies, num_hits, max_len) for max_len in (PUBLISHED_LENGTH, shortest)
        }
        slow, ours = {max_len: [] for max_len in references}, []
        for _ in range(arguments.repeats):
            for max_len, reference in references.items():
                slow[max_len].append(reference.seconds(points))
            ours.append(our_seconds(model, tokenizer, energies, num_hits))
        fast = statistics.median(ours)
        note = "" if points is None else f"  (reference timed at {points} positions and integrated)"
        for max_len, seconds in slow.items():
            seconds = statistics.median(seconds)
            speedups[batch, max_len] = seconds / fast
            rates[batch, max_len] = batch / seconds, batch / fast
            print(
                f"{batch:>6}{max_len:>8}{batch / seconds:>14.3f}{batch / fast:>10.2f}{seconds / fast:>7.1f}"
                f"{1e3 * seconds / batch / num_hits:>12.3f}{1e3 * fast / batch / num_hits:>8.3f}{note}"
            )
    batch = arguments.batches[-1]
    cost_of_the_limit(model, tokenizer, batch, arguments)
    cost_of_a_step(model, batch)
    cost_of_finished_rows(model, tokenizer, batch, arguments)
    memory(model.config, arguments.seed)
    baseline, ours = rates[batch, PUBLISHED_LENGTH]
    return {
        "family": "spade",
        "speedup": speedups[batch, PUBLISHED_LENGTH],
        "baseline_per_s": baseline,
        "ours_per_s": ours,
        "batch": batch,
        "length": num_hits,
        "speedup_best_case": speedups[batch, shortest],
        **{f"speedup_batch{other}": speedups[other, PUBLISHED_LENGTH] for other in arguments.batches[:-1]},
    }


def alternating_medians(functions: list[Callable[[], float]], repeats: int) -> list[float]:
    runs = [[function() for function in functions] for _ in range(repeats)]
    return [statistics.median(column) for column in zip(*runs)]


def cost_of_the_limit(model, tokenizer, batch: int, arguments: argparse.Namespace):
    """The longest shower that would be allowed must not matter."""
    short = make_model(arguments.seed, max_num_hits=arguments.length + 100)
    seconds = alternating_medians(
        [
            lambda limited=limited: our_seconds(limited, tokenizer, incident_energies(batch), arguments.length)
            for limited in (model, short)
        ],
        arguments.repeats,
    )
    parts = [
        f"{1e3 * value / batch / arguments.length:.3f} with max_num_hits {limited.config.max_num_hits}"
        for limited, value in zip((model, short), seconds)
    ]
    print(f"ours, batch {batch}, ms per hit: {', '.join(parts)}")


def cost_of_a_step(model, batch: int):
    clock = StepClock()
    with torch.no_grad():
        model.generate(incident_energy=incident_energies(batch), num_hits=800, streamer=clock)
    milliseconds = 1e3 * np.diff(clock.times)
    spans = [(1, 100), (100, 400), (400, 800)]
    parts = [f"{a}-{b}: {np.median(milliseconds[a:b]):.2f}" for a, b in spans]
    print(f"ours, batch {batch}, ms per step between positions: {', '.join(parts)}")


def cost_of_finished_rows(model, tokenizer, batch: int, arguments: argparse.Namespace):
    """Rows that stop at different lengths: the spread of simulated showers of 10 to 100 GeV, a quarter as many hits."""
    showers = simulate_showers(batch, seed=arguments.seed)
    energies = torch.from_numpy(showers["incident_energy"])
    num_hits = np.array([max(len(energy) // 4, 1) for energy in showers["energy"]])
    dropped, kept = alternating_medians(
        [
            lambda drop=drop: our_seconds(model, tokenizer, energies, num_hits, drop_finished_rows=drop)
            for drop in (True, False)
        ],
        arguments.repeats,
    )
    print(
        f"ours, batch {batch}, {num_hits.min()} to {num_hits.max()} hits, mean {num_hits.mean():.0f}: {dropped:.2f} s "
        f"if rows that have finished leave the batch, {kept:.2f} s if they stay"
    )


def memory(config: SpadeConfig, seed: int, batch: int = 64):
    """Of the longest showers, measured in a process of its own."""
    length = config.num_registers + 1 + config.max_num_hits + config.max_stream_delay
    cache = 2 * config.num_hidden_layers * batch * config.num_key_value_heads * length * config.head_dim * 4
    streams = batch * length * (8 * config.num_streams + 4)
    line = f"{config.max_num_hits} hits at batch {batch}: keys and values {cache / 2**20:.0f} MiB, ids and energies "
    line += f"{streams / 2**20:.0f} MiB"
    if Path("/proc/self/status").is_file():
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            before, after, seconds = pool.submit(measure_memory, seed, batch, config.max_num_hits).result()
        line += f"; peak memory of a process {after:.0f} MiB, {after - before:.0f} MiB above that for showers of 2 hits"
        line += f" ({batch / seconds:.2f} showers/s)"
    print(line)


def measure_memory(seed: int, batch: int, num_hits: int) -> tuple[float, float, float]:
    model = make_model(seed)
    with torch.no_grad():
        model.generate(incident_energy=incident_energies(batch), num_hits=2)
        before = peak_resident_megabytes()
        begin = time.perf_counter()
        model.generate(incident_energy=incident_energies(batch), num_hits=num_hits)
    return before, peak_resident_megabytes(), time.perf_counter() - begin


def peak_resident_megabytes() -> float:
    """Of this process, MiB; Linux. (The figure of `getrusage` includes that of the parent process.)"""
    lines = Path(f"/proc/{os.getpid()}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


# Training


def training_batches(tokenizer: SpadeTokenizer, batch: int, num_batches: int, max_num_hits: int | None, seed: int):
    """Batches of simulated showers of 10 to 100 GeV, padded to `max_num_hits`, by default to their own longest."""
    showers = simulate_showers(batch * num_batches, seed=seed)
    names = ("incident_energy", "x", "y", "z", "energy")
    padding = {"padding": True} if max_num_hits is None else {"padding": "max_length", "max_length": max_num_hits}
    batches = []
    for start in range(0, batch * num_batches, batch):
        rows = {name: showers[name][start : start + batch] for name in names}
        batches.append(dict(tokenizer(rows, return_tensors="pt", **padding)))
    return batches


def reference_loss(model: SpadeForCausalLM, batch: dict) -> torch.Tensor:
    """The published loss at every position, padding included; what does not count is masked at the end."""
    config, base = model.config, model.model
    ids, energy, incident_energy = batch["input_ids"], batch["hit_energy"], batch["incident_energy"]
    is_real = batch["attention_mask"].bool()
    length = ids.shape[1]
    positions = torch.arange(length)
    allowed = (positions <= positions.unsqueeze(-1)) & is_real[:, None, None]
    mask = torch.zeros(allowed.shape).masked_fill(~allowed, -torch.inf)
    slots = config.num_registers
    embedded = embed(base.embeddings, ids[:, slots:], energy[:, slots:], incident_energy)
    embedded = torch.cat([base.embeddings.registers.expand(len(ids), -1, -1), embedded], dim=1)
    hidden = decode_layers(base, embedded, positions.unsqueeze(0), mask)
    all_logits = [head(hidden) for head in model.token_heads]
    mixture = model.energy_head(hidden)

    token_mask, energy_mask = model.loss_masks(ids, batch["attention_mask"])
    loss = 0.0
    for stream, logits in enumerate(all_logits):
        losses = nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), ids[:, 1:, stream].flatten(), reduction="none"
        )
        counts = token_mask[:, 1:, stream].flatten()
        loss = loss + (losses * counts).sum() / counts.sum()
    losses = mixture_nll(tuple(values[:, :-1] for values in mixture), energy[:, 1:])
    loss = loss + config.energy_loss_weight * (losses * energy_mask[:, 1:]).sum() / energy_mask[:, 1:].sum()

    cells, energies, num_hits = model.undelay(ids, energy, batch["attention_mask"])
    index = torch.arange(cells.shape[1]).expand(cells.shape[:2])
    stop_logits = model.stop_head(cells, energies, incident_energy.unsqueeze(-1).expand(cells.shape[:2]), index)
    return loss + config.stop_loss_weight * model.stop_head.loss(stop_logits, num_hits)


def our_loss(model: SpadeForCausalLM, batch: dict) -> torch.Tensor:
    return model(**batch, labels=batch["input_ids"], use_cache=False).loss


def step_seconds(loss_function, model, optimizer, batch: dict) -> tuple[float, float, float]:
    """Seconds of forward, loss and backward; of the whole step; and the loss."""
    begin = time.perf_counter()
    optimizer.zero_grad()
    loss = loss_function(model, batch)
    loss.backward()
    backward = time.perf_counter() - begin
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return backward, time.perf_counter() - begin, loss.item()


def benchmark_training(arguments: argparse.Namespace) -> dict:
    # without its random parts both ways must give the same loss
    model = make_model(0, loss_over_prefix=True, energy_noise=0.0, stop_dropout=0.0).train()
    tokenizer = SpadeTokenizer.from_model_config(model.config)
    optimizer = torch.optim.RAdam(model.parameters(), lr=1e-5)
    batches = {
        max_num_hits: training_batches(tokenizer, arguments.batch, arguments.batches, max_num_hits, seed=1)
        for max_num_hits in (PUBLISHED_LENGTH, None)
    }
    slots = tokenizer.num_positions(0)
    hits = torch.cat([batch["attention_mask"].sum(dim=1) for batch in batches[None]]) - slots
    widths = [batch["input_ids"].shape[1] - slots for batch in batches[None]]
    print(f"SPADE, {model.num_parameters():,} parameters, {arguments.batches} batches of {arguments.batch} showers")
    print(f"{hits.min()} to {hits.max()} hits, mean {hits.float().mean():.0f}; longest of a batch: {widths}")
    print(
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, mean over the batches of the median of "
        f"{arguments.repeats} alternating steps"
    )
    print(f"{'reference padded to':<24}{'':<20}{'reference s':>12}{'ours s':>9}{'ratio':>7}")
    speedups, rates = {}, {}
    for max_num_hits, padded in batches.items():
        # (ways, batches, repeats, [backward, step])
        timed = np.zeros((2, arguments.batches, arguments.repeats, 2))
        # one step more than counts, to warm up
        step_seconds(reference_loss, model, optimizer, padded[0])
        step_seconds(our_loss, model, optimizer, batches[None][0])
        for repeat in range(arguments.repeats):
            for index in range(arguments.batches):
                *seconds, expected = step_seconds(reference_loss, model, optimizer, padded[index])
                timed[0, index, repeat] = seconds
                *seconds, value = step_seconds(our_loss, model, optimizer, batches[None][index])
                timed[1, index, repeat] = seconds
                if abs(expected - value) > 1e-2 * abs(expected):
                    raise RuntimeError(f"losses differ: {expected} and {value}")
        slow, fast = np.median(timed, axis=2).mean(axis=1)
        name = "the longest of a batch" if max_num_hits is None else f"{max_num_hits} hits (published)"
        for part, label in enumerate(("forward + backward", "whole step")):
            print(f"{name:<24}{label:<20}{slow[part]:>12.2f}{fast[part]:>9.2f}{slow[part] / fast[part]:>7.2f}")
        speedups[max_num_hits] = slow[1] / fast[1]
        rates[max_num_hits] = 1 / slow[1], 1 / fast[1]
    baseline, ours = rates[PUBLISHED_LENGTH]
    return {
        "family": "spade",
        "speedup": speedups[PUBLISHED_LENGTH],
        "baseline_per_s": baseline,
        "ours_per_s": ours,
        "batch": arguments.batch,
        "length": PUBLISHED_LENGTH,
        "speedup_equal_padding": speedups[None],
    }
