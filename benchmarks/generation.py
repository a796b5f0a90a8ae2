"""
Generation speed against the way the reference computes: same weights, same machine, one run.

    python benchmarks/generation.py --family cmhca_dirc
    python benchmarks/generation.py --family spade
    python benchmarks/generation.py --family omnijet
    python benchmarks/generation.py --family omnilearned
    python benchmarks/generation.py --family epic_fm

Prints a table and, as its last line, one JSON object (see README.md).
"""

import argparse
import json
import statistics
import time

import numpy as np
import torch


def nucleus_sample_by_sorting(logits: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """The reference's draw: sort all probabilities, cut, renormalise, multinomial. (batch, vocab) -> (batch,)."""
    probs, indices = torch.sort((logits / temperature).softmax(dim=-1), descending=True)
    removed = probs.cumsum(dim=-1) - probs > top_p
    probs = probs.masked_fill(removed, 0.0)
    probs = probs / probs.sum(dim=-1, keepdim=True)
    return indices.gather(-1, torch.multinomial(probs, 1)).squeeze(-1)


class ReferenceWay:
    """
    What the reference does at a step: the whole prefix through the network without a cache, eager attention, both
    vocabulary heads at every position, a full sort of both vocabularies.
    """

    def __init__(self, model, kinematics: torch.Tensor, class_ids: torch.Tensor, temperature: float, top_p: float):
        self.model = model
        self.inputs = {"kinematics": kinematics, "class_ids": class_ids}
        self.temperature = temperature
        self.top_p = top_p

    def start(self) -> torch.Tensor:
        config = self.model.config
        return torch.zeros(len(self.inputs["kinematics"]), config.num_conditioning_tokens + 1, 2, dtype=torch.long)

    @torch.inference_mode()
    def step(self, ids: torch.Tensor) -> torch.Tensor:
        self.model.set_attn_implementation("eager")
        outputs = self.model(ids, use_cache=False, **self.inputs)
        drawn = [nucleus_sample_by_sorting(logits[:, -1], self.temperature, self.top_p) for logits in outputs.logits]
        self.model.set_attn_implementation("sdpa")
        return torch.cat([ids, torch.stack(drawn, dim=-1)[:, None]], dim=1)

    def seconds(self, num_photons: int, points: int | None) -> float:
        """Seconds for a batch of tracks. With `points`, steps are timed at that many lengths and integrated."""
        if points is None:
            ids = self.start()
            begin = time.perf_counter()
            for _ in range(num_photons):
                ids = self.step(ids)
            return time.perf_counter() - begin
        steps = np.unique(np.linspace(0, num_photons - 1, points).round().astype(int))
        seconds = []
        for step in steps:
            ids = self.start()
            filler = torch.randint(1, self.model.config.time_vocab_size - 3, (ids.shape[0], int(step), 2))
            ids = torch.cat([ids, filler], dim=1)
            begin = time.perf_counter()
            self.step(ids)
            seconds.append(time.perf_counter() - begin)
        # the cost of a step is smooth in the length: interpolate to every step and add up
        return float(np.interp(np.arange(num_photons), steps, seconds).sum())


def ours_seconds(model, kinematics, class_ids, num_photons: int, temperature: float, top_p: float, **kwargs) -> float:
    begin = time.perf_counter()
    ids = model.generate(
        kinematics=kinematics,
        class_ids=class_ids,
        do_sample=True,
        temperature=temperature,
        top_p=top_p,
        top_k=0,
        max_new_tokens=num_photons,
        **kwargs,
    )
    seconds = time.perf_counter() - begin
    expected = model.config.num_conditioning_tokens + 1 + num_photons
    if ids.shape[1] != expected:
        raise RuntimeError(f"tracks ended after {ids.shape[1]} positions, expected {expected}")
    return seconds


def benchmark_cmhca_dirc(arguments: argparse.Namespace) -> dict:
    from hepzoo import CMHCADircConfig, CMHCADircForCausalLM

    torch.manual_seed(arguments.seed)
    model = CMHCADircForCausalLM(CMHCADircConfig(num_experts=arguments.num_experts)).eval()
    with torch.no_grad():
        # no track may end: every one has exactly the same number of photons
        model.space_head.bias[model.config.stream_eos_token_ids[0]] = -1e9
        model.time_head.bias[model.config.stream_eos_token_ids[1]] = -1e9
    sampling = {"temperature": 1.05, "top_p": 0.995}
    results = {}
    print(f"CMHCA-DIRC, {model.num_parameters():,} parameters, {arguments.length} photons per track, {sampling}")
    print(
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, median of {arguments.repeats} alternating runs"
    )
    print(f"{'batch':>6} {'reference tracks/s':>19} {'ours tracks/s':>14} {'ratio':>7} {'ours ms/photon':>15}")
    for batch in arguments.batches:
        kinematics = torch.stack([torch.empty(batch).uniform_(1, 10), torch.empty(batch).uniform_(25, 160)], dim=-1)
        class_ids = torch.arange(batch) % 2
        reference = ReferenceWay(model, kinematics, class_ids, **sampling)
        points = arguments.points if batch > 4 else None
        ours_seconds(model, kinematics, class_ids, 5, **sampling)
        reference.seconds(2, None)
        baseline, ours = [], []
        for _ in range(arguments.repeats):
            baseline.append(reference.seconds(arguments.length, points))
            ours.append(ours_seconds(model, kinematics, class_ids, arguments.length, **sampling))
        slow, fast = statistics.median(baseline), statistics.median(ours)
        results[batch] = {"baseline_per_s": batch / slow, "ours_per_s": batch / fast, "speedup": slow / fast}
        note = "" if points is None else f"  (reference timed at {points} lengths and integrated)"
        print(
            f"{batch:>6} {batch / slow:>19.3f} {batch / fast:>14.2f} {slow / fast:>7.1f} "
            f"{1e3 * fast / batch / arguments.length:>15.3f}{note}"
        )
    batch = arguments.batches[-1]
    growth(model, batch, sampling, arguments)
    return {"family": "cmhca_dirc", **results[batch], "batch": batch, "length": arguments.length}


def growth(model, batch: int, sampling: dict, arguments: argparse.Namespace):
    """Cost per photon with the length of the track: flat or linear, never quadratic."""
    kinematics = torch.tensor([[6.0, 30.0]]).repeat(batch, 1)
    class_ids = torch.arange(batch) % 2
    lengths = [50, 100, 200]
    medians = [
        statistics.median(
            ours_seconds(model, kinematics, class_ids, length, **sampling) for _ in range(arguments.repeats)
        )
        for length in lengths
    ]
    print("ours, ms per photon and batch, between lengths:", end=" ")
    edges = [(0, 0.0), *zip(lengths, medians)]
    spans = [f"{a}-{b}: {1e3 * (t2 - t1) / (b - a):.2f}" for (a, t1), (b, t2) in zip(edges, edges[1:])]
    print(", ".join(spans))


def benchmark_spade(arguments: argparse.Namespace) -> dict:
    from spade import benchmark_generation

    return benchmark_generation(arguments)


def benchmark_omnijet(arguments: argparse.Namespace) -> dict:
    from omnijet import benchmark_generation

    return benchmark_generation(arguments)


def benchmark_epic_fm(arguments: argparse.Namespace) -> dict:
    from epic_fm import benchmark_generation

    return benchmark_generation(arguments)


def benchmark_omnilearned(arguments: argparse.Namespace) -> dict:
    from omnilearned import benchmark_generation

    return benchmark_generation(arguments)


BENCHMARKS = {
    "omnilearned": benchmark_omnilearned,
    "cmhca_dirc": benchmark_cmhca_dirc,
    "spade": benchmark_spade,
    "omnijet": benchmark_omnijet,
    "epic_fm": benchmark_epic_fm,
}
# batch sizes, photons of a track or hits of a shower, positions at which the reference's step is timed
DEFAULTS = {
    # jets; midpoint steps of the reference
    "omnilearned": {"batches": [16], "points": 3},
    "cmhca_dirc": {"batches": [1, 8, 64], "length": 100, "points": 9},
    "spade": {"batches": [1, 32], "length": 200, "points": 7},
    # jets of 64 constituents, then showers of 200 hits (omnijet.py)
    "omnijet": {"points": 7},
    # jets; midpoint steps of the reference
    "epic_fm": {"batches": [64], "points": 2},
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", required=True, choices=sorted(BENCHMARKS))
    parser.add_argument("--batches", type=int, nargs="+", help="the last one is reported as JSON")
    parser.add_argument("--length", type=int, help="photons per track (default 100), hits per shower (200)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--points", type=int, help="lengths at which the reference's step is timed")
    parser.add_argument("--codes", type=int, help="omnijet: only this number of codes (default 8192 and 65536)")
    parser.add_argument("--num_experts", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    for name, value in DEFAULTS[arguments.family].items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    result = BENCHMARKS[arguments.family](arguments)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
