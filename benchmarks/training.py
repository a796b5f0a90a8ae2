"""
Training step against the way the reference computes: same weights, same batch, one run.

    python benchmarks/training.py --family cmhca_dirc
    python benchmarks/training.py --family spade
    python benchmarks/training.py --family omnijet
    python benchmarks/training.py --family omnilearned
    python benchmarks/training.py --family fm4npp

Prints a table and, as its last line, one JSON object (see README.md).
"""

import argparse
import json
import statistics
import time

import torch
from torch import nn


def random_batch(config, batch_size: int, length: int, hits: torch.Tensor | None, seed: int) -> dict:
    """
    Tracks of `length` tokens from SOS. With `hits` (one number per track) the rest is padding, as in real data;
    without, every position holds a photon.
    """
    generator = torch.Generator().manual_seed(seed)
    slots = config.num_conditioning_tokens
    ids = torch.stack(
        [
            torch.randint(1, size - 3, (batch_size, slots + length), generator=generator)
            for size in config.stream_vocab_sizes
        ],
        dim=-1,
    )
    ids[:, : slots + 1] = 0
    attention_mask = torch.ones(ids.shape[:2], dtype=torch.long)
    if hits is not None:
        positions = torch.arange(slots + length)
        attention_mask = (positions < (slots + 2 + hits).unsqueeze(1)).long()
        pad = torch.tensor(config.stream_pad_token_ids)
        ids = torch.where(attention_mask.unsqueeze(-1).bool(), ids, pad)
    labels = ids.masked_fill(attention_mask.unsqueeze(-1) == 0, -100)
    labels[:, : slots + 1] = -100
    kinematics = torch.stack(
        [
            torch.empty(batch_size).uniform_(1, 10, generator=generator),
            torch.empty(batch_size).uniform_(25, 160, generator=generator),
        ],
        dim=-1,
    )
    return {"input_ids": ids, "attention_mask": attention_mask, "labels": labels, "kinematics": kinematics}


def reference_loss(model, batch: dict) -> torch.Tensor:
    """Eager attention, the logits of every position and both vocabularies in memory, two cross entropies."""
    model.set_attn_implementation("eager")
    hidden = model.model(
        batch["input_ids"], attention_mask=batch["attention_mask"], kinematics=batch["kinematics"], use_cache=False
    ).last_hidden_state
    loss = 0.0
    for stream, head in enumerate((model.space_head, model.time_head)):
        logits = head(hidden)[:, :-1]
        targets = batch["labels"][:, 1:, stream]
        loss = loss + nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
    model.set_attn_implementation("sdpa")
    return loss


def our_loss(model, batch: dict) -> torch.Tensor:
    return model(**batch, use_cache=False).loss


def step_seconds(loss_function, model, optimizer, batch: dict) -> tuple[float, float]:
    begin = time.perf_counter()
    optimizer.zero_grad()
    loss = loss_function(model, batch)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return time.perf_counter() - begin, loss.item()


def peak_megabytes(loss_function, model, batch: dict) -> float:
    """Largest amount of tensor memory allocated by forward and backward, MiB (allocations seen by the profiler)."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss_function(model, batch).backward()
    model.zero_grad()
    running = peak = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            running += event.nbytes()
            peak = max(peak, running)
    return peak / 2**20


def benchmark_cmhca_dirc(arguments: argparse.Namespace) -> dict:
    from hepzoo import CMHCADircConfig, CMHCADircForCausalLM

    torch.manual_seed(0)
    model = CMHCADircForCausalLM(CMHCADircConfig(num_experts=0)).train()
    optimizer = torch.optim.RAdam(model.parameters(), lr=1e-5)
    hits = torch.poisson(torch.full((arguments.batch,), 69.0), generator=torch.Generator().manual_seed(1)).long()
    cases = {"all positions photons": None, "69 photons on average": hits.clamp(6, arguments.length - 2)}
    print(f"CMHCA-DIRC, {model.num_parameters():,} parameters, batch {arguments.batch} x {arguments.length} tokens")
    print(
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, median of {arguments.repeats} alternating steps"
    )
    print(f"{'batch':<24}{'reference s':>12}{'ours s':>9}{'ratio':>7}{'reference MiB':>15}{'ours MiB':>10}")
    result = {}
    for name, hits_of_case in cases.items():
        batch = random_batch(model.config, arguments.batch, arguments.length, hits_of_case, seed=2)
        baseline, ours = [], []
        for repeat in range(arguments.repeats + 1):
            slow, reference_value = step_seconds(reference_loss, model, optimizer, batch)
            fast, our_value = step_seconds(our_loss, model, optimizer, batch)
            if abs(reference_value - our_value) > 1e-2 * abs(reference_value):
                raise RuntimeError(f"losses differ: {reference_value} and {our_value}")
            if repeat > 0:
                baseline.append(slow)
                ours.append(fast)
        slow, fast = statistics.median(baseline), statistics.median(ours)
        memory = [peak_megabytes(function, model, batch) for function in (reference_loss, our_loss)]
        print(f"{name:<24}{slow:>12.2f}{fast:>9.2f}{slow / fast:>7.2f}{memory[0]:>15.0f}{memory[1]:>10.0f}")
        # the first case is the reported one: padding gives no advantage there
        result = result or {"speedup": slow / fast, "baseline_per_s": 1 / slow, "ours_per_s": 1 / fast}
    return {"family": "cmhca_dirc", **result, "batch": arguments.batch, "length": arguments.length}


def benchmark_spade(arguments: argparse.Namespace) -> dict:
    from spade import benchmark_training

    return benchmark_training(arguments)


def benchmark_omnijet(arguments: argparse.Namespace) -> dict:
    from omnijet import benchmark_training

    return benchmark_training(arguments)


def benchmark_fm4npp(arguments: argparse.Namespace) -> dict:
    from fm4npp import benchmark_training

    return benchmark_training(arguments)


def benchmark_omnilearned(arguments: argparse.Namespace) -> dict:
    from omnilearned import benchmark_training

    return benchmark_training(arguments)


BENCHMARKS = {
    "omnilearned": benchmark_omnilearned,
    "cmhca_dirc": benchmark_cmhca_dirc,
    "spade": benchmark_spade,
    "omnijet": benchmark_omnijet,
    "fm4npp": benchmark_fm4npp,
}
# tracks, showers, jets or events of a batch (the first two as published)
DEFAULT_BATCH = {"omnilearned": 32, "cmhca_dirc": 64, "spade": 4, "omnijet": 64, "fm4npp": 1}
DEFAULT_LENGTH = {"cmhca_dirc": 250, "fm4npp": 2048}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", required=True, choices=sorted(BENCHMARKS))
    parser.add_argument("--batch", type=int, help="default 64 tracks, 4 showers, 64 jets (omnilearned 32), 1 event")
    parser.add_argument(
        "--length", type=int, help="cmhca_dirc: tokens counted from SOS (default 250); fm4npp: points (default 2048)"
    )
    parser.add_argument("--batches", type=int, default=4, help="spade: batches of different showers (default 4)")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args(argv)
    arguments.batch = arguments.batch or DEFAULT_BATCH[arguments.family]
    arguments.length = arguments.length or DEFAULT_LENGTH.get(arguments.family)
    result = BENCHMARKS[arguments.family](arguments)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
