"""
FM4NPP (arXiv:2508.14087): state-space stacks against a sequential loop and against transformers, forward and backward.

Called by training.py. On the same weights and points:

* Mamba-1, loop: the recurrence of the paper one position at a time in plain PyTorch, with `unbind` (indexing would make
  the backward pass quadratic in the length) and the discretisation inside, `conv1d` for the convolution;
* Mamba-1 and Mamba-2, transformers: `MambaModel` and `Mamba2Model` with the paths they take without a GPU;
* ours: the backends `torch` and, for Mamba-1, `numba`.

Slow ways are timed with fewer blocks and scaled.
"""

import argparse
import multiprocessing
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock

import torch
from torch import nn
from transformers import Mamba2Config, Mamba2Model, MambaConfig, MambaModel
from transformers.utils import logging

from hepzoo.modeling import modeling_fm4npp
from hepzoo.modeling.configuration_fm4npp import Fm4nppConfig
from hepzoo.modeling.modeling_fm4npp import Fm4nppModel
from hepzoo.modeling.state_space import resolve_backend

WIDTH = 256
LAYERS = 12
# blocks of the loop, of transformers' Mamba (quadratic in the length), and of the table of memory
LOOP_LAYERS = 2
QUADRATIC_LAYERS = 1
MEMORY_LAYERS = 2
QUADRATIC_LENGTH = 512
MEMORY_LENGTHS = (512, 1024, 2048, 4096, 8192)
# of the published model of this width, and of the Mamba-2 paper
STATE_SIZE = 16
LARGE_STATE_SIZE = 128


def loop_scan(x, delta, A, B, C, D=None, initial_state=None, backend="torch", return_state=True):
    """`selective_scan`, one position at a time."""
    state = x.new_zeros(x.shape[0], *A.shape) if initial_state is None else initial_state
    outputs = []
    for x_t, delta_t, B_t, C_t in zip(x.unbind(1), delta.unbind(1), B.unbind(1), C.unbind(1)):
        decay = torch.exp(delta_t.unsqueeze(-1) * A)
        state = torch.addcmul((delta_t * x_t).unsqueeze(-1) * B_t.unsqueeze(1), decay, state)
        outputs.append((state @ C_t.unsqueeze(-1)).squeeze(-1))
    y = torch.stack(outputs, dim=1)
    return (y if D is None else y + D * x), state


def plain_conv(x, weight, bias, initial_window=None, backend="torch"):
    """`causal_conv1d` as every implementation in PyTorch writes it."""
    width = weight.shape[1]
    y = nn.functional.conv1d(x.transpose(1, 2), weight.unsqueeze(1), bias, padding=width - 1, groups=x.shape[2])
    return nn.functional.silu(y[..., : x.shape[1]].transpose(1, 2)), x[:, 1 - width :]


class Stack:
    """One way to compute a backbone and its head of 90 outputs: `seconds`, forward and backward."""

    def __init__(self, way: str, ssm: str, num_layers: int, length: int, state_size: int = STATE_SIZE, batch: int = 1):
        torch.manual_seed(0)
        backend = "numba" if way == "numba" else "torch"
        config = Fm4nppConfig(
            ssm=ssm, hidden_size=WIDTH, num_hidden_layers=num_layers, state_size=state_size, kernel_backend=backend
        )
        self.way = way
        self.num_layers = num_layers
        self.model = Fm4nppModel(config)
        self.head = nn.Linear(WIDTH, 90)
        self.points = torch.rand(batch, length, 4)
        if way == "transformers":
            self.theirs = transformers_model(self.model, ssm)

    def hidden(self) -> torch.Tensor:
        if self.way == "transformers":
            embedded = self.model.embedder(self.points)
            return self.theirs(inputs_embeds=embedded, use_cache=False).last_hidden_state
        if self.way != "loop":
            return self.model(self.points).last_hidden_state
        with (
            mock.patch.object(modeling_fm4npp, "selective_scan", loop_scan),
            mock.patch.object(modeling_fm4npp, "causal_conv1d", plain_conv),
        ):
            return self.model(self.points).last_hidden_state

    def step(self) -> torch.Tensor:
        loss = self.head(self.hidden()).square().mean()
        loss.backward()
        return loss

    def seconds(self) -> float:
        begin = time.perf_counter()
        self.step()
        return time.perf_counter() - begin

    def check(self, other: "Stack", tolerance: float = 1e-3):
        """The same hidden states and the same gradients as another way, on short events."""
        results = []
        for stack in (self, other):
            points, stack.points = stack.points, stack.points[:, :100]
            hidden = stack.hidden()
            (hidden @ torch.linspace(-1, 1, WIDTH)).square().mean().backward()
            source = stack.theirs if stack.way == "transformers" else stack.model
            gradients = {name: parameter.grad.clone() for name, parameter in source.layers[0].named_parameters()}
            results.append({"hidden states": hidden.detach(), **gradients})
            source.zero_grad()
            stack.points = points
        ours, theirs = results
        for name, values in theirs.items():
            if (ours[name] - values).abs().max() > tolerance * values.abs().max():
                raise RuntimeError(f"{self.way} and {other.way} differ in {name}")


def transformers_model(model: Fm4nppModel, ssm: str) -> nn.Module:
    """transformers' model with the weights of ours, whose names are the same."""
    config = model.config
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": config.num_hidden_layers, "state_size": config.state_size}
    sizes |= {"vocab_size": 2, "layer_norm_epsilon": config.layer_norm_eps, "residual_in_fp32": False}
    if ssm == "mamba1":
        theirs = MambaModel(MambaConfig(**sizes))
    else:
        sizes |= {"num_heads": config.num_ssm_heads, "head_dim": config.head_dim, "n_groups": 1}
        theirs = Mamba2Model(Mamba2Config(**sizes))
    state_dict = {name: value for name, value in model.state_dict().items() if not name.startswith("embedder.")}
    missing, unexpected = theirs.load_state_dict(state_dict, strict=False)
    if unexpected or set(missing) != {"embeddings.weight"}:
        raise RuntimeError(f"weights do not fit transformers: missing {missing}, unexpected {unexpected}")
    return theirs


def alternating_medians(stacks: list[Stack], repeats: int) -> list[float]:
    """Seconds of each, for LAYERS blocks; one step more than counts, to warm up."""
    runs = [[stack.seconds() for stack in stacks] for _ in range(repeats + 1)][1:]
    return [statistics.median(column) * LAYERS / stack.num_layers for stack, column in zip(stacks, zip(*runs))]


def benchmark_training(arguments: argparse.Namespace) -> dict:
    logging.set_verbosity_error()
    length, batch = arguments.length, arguments.batch
    print(f"FM4NPP, width {WIDTH}, {LAYERS} blocks, state {STATE_SIZE}, batch {batch} x {length} points, ", end="")
    print("forward and backward")
    print(
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, median of {arguments.repeats} alternating steps"
    )
    compiled = resolve_backend("auto", "mamba1") == "numba"
    if not compiled:
        print('no compiled kernels: pip install "hepzoo[cpu]"')
    print(f"{'':<64}{'baseline s':>11}{'ours s':>8}{'ratio':>7}")
    loop = Stack("loop", "mamba1", LOOP_LAYERS, length, batch=batch)
    ours = [Stack(way, "mamba1", LAYERS, length, batch=batch) for way in ("torch", "numba")[: 1 + compiled]]
    for stack in ours:
        Stack(stack.way, "mamba1", LOOP_LAYERS, length, batch=batch).check(loop)
    slow, *fast = alternating_medians([loop, *ours], arguments.repeats)
    for stack, seconds in zip(ours, fast):
        show(f"Mamba-1, {stack.way} / sequential loop ({LOOP_LAYERS} blocks, scaled)", slow, seconds)
    result = {"speedup": slow / fast[-1], "baseline_per_s": batch / slow, "ours_per_s": batch / fast[-1]}
    result |= {"torch_speedup": slow / fast[0]}
    del loop, ours

    theirs, ours = (
        Stack(way, "mamba1", QUADRATIC_LAYERS, QUADRATIC_LENGTH, batch=batch) for way in ("transformers", "torch")
    )
    ours.check(theirs)
    # one repeat: a step of theirs takes half a minute for 12 blocks
    slow, fast = alternating_medians([theirs, ours], 1)
    show(f"Mamba-1, torch / transformers, {QUADRATIC_LENGTH} points ({QUADRATIC_LAYERS} block, scaled)", slow, fast)
    result["transformers_speedup"] = slow / fast

    for state_size in (STATE_SIZE, LARGE_STATE_SIZE):
        theirs, ours = (Stack(way, "mamba2", LAYERS, length, state_size, batch) for way in ("transformers", "torch"))
        ours.check(theirs)
        slow, fast = alternating_medians([theirs, ours], arguments.repeats)
        show(f"Mamba-2, torch / transformers, state {state_size}", slow, fast)
        result.setdefault("mamba2_speedup", slow / fast)
        result[f"mamba2_speedup_state_{state_size}"] = slow / fast
    del theirs, ours
    result |= memory(batch, compiled)
    return {"family": "fm4npp", **result, "batch": batch, "length": length}


def show(name: str, slow: float, fast: float):
    print(f"{name:<64}{slow:>11.2f}{fast:>8.2f}{slow / fast:>7.2f}", flush=True)


# Memory


def memory(batch: int, compiled: bool) -> dict:
    """Growth of the peak of a process of its own, forward and backward."""
    if not Path("/proc/self/status").is_file():
        print("peak memory of a process: not measured, it needs Linux")
        return {}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hepzoo.modeling.modeling_fm4npp", "transformers.models.mamba2.modeling_mamba2"])

    def measured(*case) -> tuple[float, float]:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(measure_memory, *case).result()

    print(f"peak memory of a process above its weights, MiB, {MEMORY_LAYERS} blocks (and seconds of one step)")
    print(f"{'points':<42}" + "".join(f"{length:>14}" for length in MEMORY_LENGTHS))
    cases = [("loop", "mamba1", STATE_SIZE), ("torch", "mamba1", STATE_SIZE), ("numba", "mamba1", STATE_SIZE)]
    cases = [case for case in cases if compiled or case[0] != "numba"]
    cases += [(way, "mamba2", size) for size in (STATE_SIZE, LARGE_STATE_SIZE) for way in ("transformers", "torch")]
    growths = {}
    for way, ssm, size in cases:
        figures = [measured(way, ssm, MEMORY_LAYERS, length, size, batch) for length in MEMORY_LENGTHS]
        row = "".join(f"{megabytes:>7.0f} ({seconds:4.1f})" for megabytes, seconds in figures)
        print(f"{f'{ssm}, {way}, state {size}':<42}{row}", flush=True)
        growths[way, ssm, size] = figures[-1][0] / figures[-2][0]
    print("largest over second largest: " + ", ".join(f"{ratio:.2f}" for ratio in growths.values()))
    result = {}
    for size in (STATE_SIZE, LARGE_STATE_SIZE):
        theirs, ours = (measured(way, "mamba2", LAYERS, 2048, size, batch)[0] for way in ("transformers", "torch"))
        print(f"mamba2, state {size}, {LAYERS} blocks, 2048 points: transformers {theirs:.0f}, torch {ours:.0f} MiB")
        result.setdefault("mamba2_memory_ratio", ours / theirs)
    return result


def measure_memory(way: str, ssm: str, num_layers: int, length: int, state_size: int, batch: int):
    logging.set_verbosity_error()
    stack = Stack(way, ssm, num_layers, length, state_size, batch)
    points, stack.points = stack.points, stack.points[:, :64]
    # gradients of the weights, and kernels compiled
    stack.step()
    stack.points = points
    before = peak_resident_megabytes()
    seconds = stack.seconds()
    return peak_resident_megabytes() - before, seconds


def peak_resident_megabytes() -> float:
    """Of this process, MiB; Linux. (The figure of `getrusage` includes that of the parent process.)"""
    lines = Path(f"/proc/{os.getpid()}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
