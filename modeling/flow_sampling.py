"""
`generate` of flow-matching models of sets: noise is carried along a learned velocity field to particles.

The flow time runs from 1 (noise) to 0 (data). A model derives from `FlowMatchingGenerationMixin` and has a `velocity`;
the mixin brings the solvers, sets of variable multiplicity without padding, and classifier-free guidance.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from transformers.utils import ModelOutput

# slots of padding that are as dear as starting one more batch, by device type
BATCH_OVERHEAD = {"cpu": 128}
BATCH_OVERHEAD_ACCELERATOR = 16384
# default of the largest batch, in slots
BATCH_SLOTS = {"cpu": 4096}
BATCH_SLOTS_ACCELERATOR = 131072

Field = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class SolverError(RuntimeError):
    """The field could not be solved: it is not finite, or the tolerance is out of reach."""


@dataclass
class FlowSample(ModelOutput):
    """
    Args:
        particles (`(batch, slots, features)`): float32, as the network sees particles; 0 in empty slots.
        attention_mask (`(batch, slots)`): 1 for particles.
        num_function_evaluations (`int`): evaluations of the velocity field that one set went through, with `"dopri5"`
            those of the set with most. Guidance calls the network twice per evaluation.
    """

    particles: torch.FloatTensor | None = None
    attention_mask: torch.LongTensor | None = None
    num_function_evaluations: int | None = None


# ---------------------------------------------------------------------------------------------------------------------
# Solvers: `field(x, time)` with a scalar float32 time; `times` (steps + 1,) float32, the first and last included.
# ---------------------------------------------------------------------------------------------------------------------


def euler_step(field: Field, x: torch.Tensor, time: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    return x + size * field(x, time)


def midpoint_step(field: Field, x: torch.Tensor, time: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    half = 0.5 * size
    return x + size * field(x + half * field(x, time), time + half)


def rk4_step(field: Field, x: torch.Tensor, time: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    """The classical method of order 4."""
    half = 0.5 * size
    k1 = field(x, time)
    k2 = field(x + half * k1, time + half)
    k3 = field(x + half * k2, time + half)
    k4 = field(x + size * k3, time + size)
    return x + size / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


# name -> (step, calls of the field per step)
FIXED_STEP_SOLVERS = {"euler": (euler_step, 1), "midpoint": (midpoint_step, 2), "rk4": (rk4_step, 4)}
SOLVERS = (*FIXED_STEP_SOLVERS, "dopri5")


def solve_fixed(field: Field, x: torch.Tensor, times: torch.Tensor, solver: str) -> torch.Tensor:
    """Carry `x` from the first to the last of `times` with one step of `solver` between neighbours."""
    step, _ = FIXED_STEP_SOLVERS[solver]
    for time, size in zip(times[:-1].unbind(), times.diff().unbind()):
        x = step(field, x, time, size)
    return x


# Dormand and Prince, J. Comput. Appl. Math. 6 (1980) 19: nodes, stages, and the difference of the orders 5 and 4
DOPRI5_NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
DOPRI5_STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
DOPRI5_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
MAX_DOPRI5_STEPS = 10_000


def solve_dopri5(
    field: Field,
    x: torch.Tensor,
    start: float,
    end: float,
    rtol: float,
    atol: float,
    num_elements: int | None = None,
) -> torch.Tensor:
    """
    Carry `x` from time `start` to `end` with steps of order 5 that keep the root mean square of the estimated error,
    in units of atol + rtol |x|, below 1.

    Args:
        num_elements: of `x` that count in the mean (the others are padding, without error); by default all.

    Raises:
        SolverError: more than `MAX_DOPRI5_STEPS` steps, or a step of size 0.
    """

    def at(time: float) -> torch.Tensor:
        return torch.tensor(time, dtype=torch.float32, device=x.device)

    def combine(weights, slopes) -> torch.Tensor:
        return sum(weight * slope for weight, slope in zip(weights, slopes) if weight != 0)

    num_elements = num_elements or x.numel()
    time, size = start, (end - start) / 100
    first = field(x, at(time))
    for _ in range(MAX_DOPRI5_STEPS):
        is_last = abs(size) >= abs(end - time)
        size = end - time if is_last else size
        slopes = [first]
        for node, weights in zip(DOPRI5_NODES, DOPRI5_STAGES):
            state = x + size * combine(weights, slopes)
            slopes.append(field(state, at(end if is_last and node == 1.0 else time + node * size)))
        scale = atol + rtol * torch.maximum(x.abs(), state.abs())
        error = (size * combine(DOPRI5_ERROR, slopes) / scale).square().sum().div(num_elements).sqrt().item()
        if error <= 1:
            # the last stage is the new state, its slope the first of the next step
            x, time, first = state, time + size, slopes[-1]
            if is_last:
                return x
        # a field that is not finite ends here too
        size *= 5.0 if error == 0 else min(5.0, max(0.2, 0.9 * error**-0.2))
        if not abs(size) > 1e-9 * abs(end - start):
            raise SolverError(f"dopri5: no step is small enough for rtol {rtol}, atol {atol} at time {time:.6f}")
    raise SolverError(f"dopri5: more than {MAX_DOPRI5_STEPS} steps with rtol {rtol}, atol {atol}")


# ---------------------------------------------------------------------------------------------------------------------
# Sets of variable multiplicity
# ---------------------------------------------------------------------------------------------------------------------


def multiplicity_batches(num_particles: torch.LongTensor, max_slots: int, overhead: int) -> list[torch.LongTensor]:
    """
    Split sets into batches of similar multiplicity.

    Sorted by multiplicity, they are cut where the sum of all slots, padding included, plus `overhead` slots per batch
    is smallest; then batches of more than `max_slots` slots are cut evenly.

    Args:
        num_particles (`(sets,)`): at least 1.

    Returns:
        Indices of the sets of every batch, the largest sets first.
    """
    order = num_particles.argsort(descending=True, stable=True)
    widths, counts = torch.unique_consecutive(num_particles[order], return_counts=True)
    # best[i]: cost of the sets of the i largest multiplicities; a batch from i to j is as wide as multiplicity i
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    best = torch.zeros(len(widths) + 1, dtype=torch.float64)
    begin = [0] * (len(widths) + 1)
    for end in range(1, len(widths) + 1):
        costs = best[:end] + (starts[end] - starts[:end]) * widths[:end] + overhead
        begin[end] = int(costs.argmin())
        best[end] = costs[begin[end]]
    cuts, end = [], len(widths)
    while end > 0:
        cuts.insert(0, (int(starts[begin[end]]), int(starts[end])))
        end = begin[end]
    batches = []
    for first, last in cuts:
        width = int(num_particles[order[first]])
        sets_per_batch = max(1, max_slots // width)
        num_batches = -(-(last - first) // sets_per_batch)
        batches += order[first:last].tensor_split(num_batches)
    return batches


class FlowMatchingGenerationMixin:
    """
    `generate` for a `PreTrainedModel` with a velocity field. Put it before the model class among the bases.

    The model has

    * `velocity(x, time, attention_mask, **prepared)`: (batch, slots, features) of `x` at the scalar float32 `time`;
    * `prepare_sampling(labels=..., conditions=..., attention_mask=..., **inputs)`: a dictionary of everything that
      `velocity` needs and that does not depend on time. Label -1 stands for a label that was dropped;
    * `config.num_features`: of a particle;
    * `config.num_inference_steps` and `config.solver`: the default sampling;
    * `config.label_dropout`: how often training dropped labels; 0, or absent: no guidance;
    * `config.max_num_particles`: the largest set, if there is a limit;

    and may override `noise`, `sampling_times`, `check_sampling_inputs`, and `particle_inputs`, the names of inputs
    (batch, slots, ...) that belong to particles. The network must not depend on the order of the particles.
    """

    particle_inputs: tuple[str, ...] = ()

    @classmethod
    def can_generate(cls) -> bool:
        # `generate` of transformers, which this asks for, is that of token models
        return False

    def velocity(self, x: torch.Tensor, time: torch.Tensor, attention_mask: torch.Tensor, **prepared) -> torch.Tensor:
        raise NotImplementedError(f"{type(self).__name__} has no `velocity`")

    def prepare_sampling(
        self, labels: torch.LongTensor | None = None, conditions: torch.Tensor | None = None, **inputs
    ) -> dict[str, Any]:
        return {}

    def check_sampling_inputs(
        self,
        attention_mask: torch.BoolTensor,
        labels: torch.LongTensor | None = None,
        conditions: torch.Tensor | None = None,
        **inputs,
    ):
        """Raise ValueError, naming row and value, for what `prepare_sampling`, which sees parts, cannot take."""

    def noise(self, shape: tuple[int, ...], generator: torch.Generator | None = None) -> torch.Tensor:
        """Particles (..., features) at time 1, float32, on the device of the generator."""
        device = self.device if generator is None else generator.device
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32)

    def sampling_times(self, num_inference_steps: int) -> torch.Tensor:
        """Times from 1 to 0, (steps + 1,) float32; by default of equal distance, rounded from double precision."""
        return torch.linspace(1, 0, num_inference_steps + 1, dtype=torch.float64).float()

    @torch.no_grad()
    def generate(
        self,
        num_particles: torch.LongTensor | list[int] | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.LongTensor | list[int] | None = None,
        conditions: torch.Tensor | None = None,
        num_inference_steps: int | None = None,
        solver: str | None = None,
        generator: torch.Generator | None = None,
        guidance_scale: float | None = None,
        batch_size: int | None = None,
        progress_bar: bool = False,
        noise: torch.Tensor | None = None,
        rtol: float | None = None,
        atol: float | None = None,
        **inputs,
    ) -> FlowSample:
        r"""
        Draw sets of particles.

        Args:
            num_particles (`(batch,)`): multiplicities; or
            attention_mask (`(batch, slots)`): 1 for the slots to fill.
            labels (`(batch,)`): classes.
            conditions (`(batch, num_conditions)`): as the network takes them.
            num_inference_steps (`int`): steps of a fixed-step solver, by default those of the configuration.
            solver (`"midpoint"`, `"euler"`, `"rk4"` or `"dopri5"`): by default that of the configuration. `"dopri5"`
                chooses its steps by `rtol` and `atol` (1e-4 each).
            generator (`torch.Generator`): of the noise; the result does not depend on how sets are batched.
            guidance_scale (`float`): w of classifier-free guidance (arXiv:2207.12598), v = v(none) + w (v(label) -
                v(none)), if the model was trained with dropped labels. 1 is no guidance.
            batch_size (`int`): most sets at a time; by default as many as are fast.
            progress_bar (`bool`): over the evaluations of the field, on stderr.
            noise (`(batch, slots, features)`): instead of random numbers; what stands in empty slots is not used.
            inputs: other inputs of the network, (batch, ...).

        Raises:
            ValueError: naming the argument, its row and value, and what was expected.
            SolverError: naming the row, if a set is not finite; or `"dopri5"` cannot keep its tolerance.
        """
        config = self.config
        device = self.device
        solver = config.solver if solver is None else solver
        if solver not in SOLVERS:
            raise ValueError(f"`solver` is {solver!r}, expected one of {', '.join(SOLVERS)}")
        if solver == "dopri5":
            if num_inference_steps is not None:
                raise ValueError("`num_inference_steps` is for fixed steps; 'dopri5' chooses them by `rtol` and `atol`")
            rtol, atol = (1e-4 if value is None else value for value in (rtol, atol))
            if not (_is_number(rtol) and _is_number(atol) and atol > 0):
                raise ValueError(f"`rtol` is {rtol}, `atol` {atol}, expected finite numbers of at least 0 and above 0")
            times = None
        else:
            for name, value in (("rtol", rtol), ("atol", atol)):
                if value is not None:
                    raise ValueError(f"`{name}` is for 'dopri5'; {solver!r} takes `num_inference_steps`")
            steps = config.num_inference_steps if num_inference_steps is None else num_inference_steps
            if not _is_count(steps):
                raise ValueError(f"`num_inference_steps` is {steps!r}, expected an integer of at least 1")
            times = self.sampling_times(int(steps)).to(device)
        if batch_size is not None and not _is_count(batch_size):
            raise ValueError(f"`batch_size` is {batch_size!r}, expected an integer of at least 1")
        if not isinstance(generator, (torch.Generator, type(None))):
            raise ValueError(f"`generator` is {type(generator).__name__}, expected a torch.Generator")
        mask = self._sampling_mask(num_particles, attention_mask)
        rows = len(mask)
        per_row = {"labels": labels, "conditions": conditions, **inputs}
        per_row = {name: _tensor(name, value) for name, value in per_row.items() if value is not None}
        for name, value in per_row.items():
            shape = tuple(mask.shape) if name in self.particle_inputs else (rows,)
            if tuple(value.shape[: len(shape)]) != shape:
                raise ValueError(f"`{name}` has shape {tuple(value.shape)}, expected {shape} and what follows")
        self._check_guidance(guidance_scale, labels)
        self.check_sampling_inputs(mask, **per_row)
        filled = self._sampling_noise(mask, noise, generator)

        counts = mask.sum(dim=1)
        features = filled.shape[-1]
        offsets = counts.cumsum(0) - counts
        # particles first, in the order of their slots
        slots = mask.int().argsort(dim=1, descending=True, stable=True)
        overhead = BATCH_OVERHEAD.get(device.type, BATCH_OVERHEAD_ACCELERATOR)
        max_slots = BATCH_SLOTS.get(device.type, BATCH_SLOTS_ACCELERATOR)
        batches = multiplicity_batches(counts, max_slots, overhead)
        if batch_size is not None:
            batches = [part for batch in batches for part in batch.split(int(batch_size))]

        particles = torch.zeros(*mask.shape, features)
        evaluations = 0
        with _progress(progress_bar, len(batches), times, solver) as advance:
            for index in batches:
                width = int(counts[index].max())
                is_particle = torch.arange(width) < counts[index, None]
                source = (offsets[index, None] + torch.arange(width)).clamp(max=len(filled) - 1)
                x = (filled[source] * is_particle.unsqueeze(-1)).to(device)
                taken = slots[index, :width]
                batch_inputs = {
                    name: (value[index[:, None], taken] if name in self.particle_inputs else value[index]).to(device)
                    for name, value in per_row.items()
                }
                field = _Field(self, is_particle.to(device), batch_inputs, guidance_scale, advance)
                if times is None:
                    x = solve_dopri5(field, x, 1.0, 0.0, rtol, atol, int(is_particle.sum()) * features)
                else:
                    x = solve_fixed(field, x, times, solver)
                evaluations = max(evaluations, field.evaluations)
                rows_of, columns = is_particle.nonzero(as_tuple=True)
                particles[index[rows_of], taken[rows_of, columns]] = x.cpu()[rows_of, columns]
        is_finite = particles.isfinite().all(dim=2).all(dim=1)
        if not is_finite.all():
            row = int((~is_finite).nonzero()[0])
            raise SolverError(f"row {row}: not finite after {evaluations} evaluations of the velocity")
        return FlowSample(
            particles=particles.to(device),
            attention_mask=mask.long().to(device),
            num_function_evaluations=evaluations,
        )

    def _sampling_mask(self, num_particles, attention_mask) -> torch.Tensor:
        """Which slots to fill, (batch, slots) bool, on the CPU."""
        if (num_particles is None) == (attention_mask is None):
            raise ValueError("expected either `num_particles` or `attention_mask`")
        if attention_mask is not None:
            mask = _tensor("attention_mask", attention_mask)
            if mask.ndim != 2 or not ((mask == 0) | (mask == 1)).all():
                raise ValueError(f"`attention_mask` has shape {tuple(mask.shape)}, expected (batch, slots) of 0 and 1")
            mask = mask.bool()
            counts = mask.sum(dim=1)
        else:
            counts = _tensor("num_particles", num_particles)
            if counts.shape == (0,):
                counts = counts.long()
            if counts.ndim != 1 or counts.is_floating_point() or counts.dtype == torch.bool:
                found = f"shape {tuple(counts.shape)} and dtype {counts.dtype}"
                raise ValueError(f"`num_particles` has {found}, expected (batch,) integers")
            counts = counts.long()
        if len(counts) == 0:
            raise ValueError("no sets to generate: the batch is empty")
        limit = getattr(self.config, "max_num_particles", None)
        wrong = (counts < 1) if limit is None else (counts < 1) | (counts > limit)
        if wrong.any():
            row = int(wrong.nonzero()[0])
            expected = "at least 1" if limit is None else f"1 to {limit} (`max_num_particles`)"
            raise ValueError(f"row {row}: {int(counts[row])} particles, expected {expected}")
        if attention_mask is None:
            mask = torch.arange(int(counts.max())) < counts[:, None]
        return mask

    def _check_guidance(self, guidance_scale: float | None, labels):
        if guidance_scale is None:
            return
        if not _is_number(guidance_scale):
            raise ValueError(f"`guidance_scale` is {guidance_scale!r}, expected a finite number of at least 0")
        if not getattr(self.config, "label_dropout", 0) > 0:
            raise ValueError("`guidance_scale` needs a model that was trained with dropped labels, `label_dropout` > 0")
        if labels is None:
            raise ValueError("`guidance_scale` needs `labels`")

    def _sampling_noise(self, mask: torch.Tensor, noise: torch.Tensor | None, generator) -> torch.Tensor:
        """Noise of all particles end to end, (particles, features) on the CPU: no number is drawn for an empty slot."""
        features = self.config.num_features
        if noise is None:
            return self.noise((int(mask.sum()), features), generator).cpu()
        noise = _tensor("noise", noise)
        if tuple(noise.shape) != (*mask.shape, features):
            raise ValueError(f"`noise` has shape {tuple(noise.shape)}, expected {(*mask.shape, features)}")
        noise = noise.float()[mask]
        if not noise.isfinite().all():
            raise ValueError("`noise` is not finite at a particle")
        return noise


def _tensor(name: str, values: Any) -> torch.Tensor:
    """`values` on the CPU."""
    try:
        tensor = torch.as_tensor(values).cpu()
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"`{name}` is {type(values).__name__}, expected a tensor or lists of numbers") from None
    if tensor.is_complex():
        raise ValueError(f"`{name}` is {tensor.dtype}, expected real numbers")
    return tensor


def _is_count(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and value >= 1


def _is_number(value: Any) -> bool:
    """Finite and at least 0."""
    return isinstance(value, Real) and not isinstance(value, bool) and 0 <= value < math.inf


class _Field:
    """The velocity of one batch; counts its evaluations."""

    def __init__(self, model, is_particle: torch.Tensor, inputs: dict[str, torch.Tensor], guidance_scale, advance):
        self.model = model
        self.is_particle = is_particle
        self.slot_mask = is_particle.unsqueeze(-1)
        self.guidance_scale = None if guidance_scale == 1 else guidance_scale
        self.advance = advance
        self.evaluations = 0
        self.prepared = model.prepare_sampling(attention_mask=is_particle, **inputs)
        if self.guidance_scale is not None:
            dropped = {**inputs, "labels": torch.full_like(inputs["labels"], -1)}
            self.unlabelled = model.prepare_sampling(attention_mask=is_particle, **dropped)

    def __call__(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        velocity = self.model.velocity(x, time, self.is_particle, **self.prepared).float()
        if self.guidance_scale is not None:
            base = self.model.velocity(x, time, self.is_particle, **self.unlabelled).float()
            velocity = base + self.guidance_scale * (velocity - base)
        self.evaluations += 1
        self.advance()
        return velocity * self.slot_mask


class _progress:
    """Context of an optional progress bar; gives the function to call after every evaluation."""

    def __init__(self, is_shown: bool, num_batches: int, times: torch.Tensor | None, solver: str):
        self.bar = None
        if is_shown:
            from tqdm import tqdm

            total = None if times is None else num_batches * (len(times) - 1) * FIXED_STEP_SOLVERS[solver][1]
            self.bar = tqdm(total=total, desc="sampling", unit="call")

    def __enter__(self) -> Callable[[], Any]:
        return (lambda: None) if self.bar is None else self.bar.update

    def __exit__(self, *_):
        if self.bar is not None:
            self.bar.close()


__all__ = ["FlowMatchingGenerationMixin", "FlowSample", "SolverError"]
