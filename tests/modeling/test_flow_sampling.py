"""The shared sampler of flow-matching models: solvers, sets of variable multiplicity, guidance, malformed input."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from hepzoo.modeling import flow_sampling
from hepzoo.modeling.flow_sampling import (
    FIXED_STEP_SOLVERS,
    FlowMatchingGenerationMixin,
    SolverError,
    multiplicity_batches,
    solve_dopri5,
    solve_fixed,
)


class ToyFlow(FlowMatchingGenerationMixin, nn.Module):
    """dx/dt = (1 + label) (x - mean of the set) + tag of the particle: a set network with known solution."""

    particle_inputs = ("tags",)

    def __init__(self, **settings):
        super().__init__()
        defaults = {"num_features": 2, "num_inference_steps": 5, "solver": "midpoint", "max_num_particles": 40}
        self.config = SimpleNamespace(**{**defaults, **settings})
        self.device = torch.device("cpu")
        self.widths, self.times, self.preparations = [], [], 0

    def prepare_sampling(self, labels=None, conditions=None, attention_mask=None, tags=None):
        self.preparations += 1
        rate = torch.ones(len(attention_mask)) if labels is None else 1.0 + labels
        return {"rate": rate[:, None, None], "tags": 0.0 if tags is None else tags}

    def velocity(self, x, time, attention_mask, rate, tags):
        self.widths.append(tuple(x.shape[:2]))
        self.times.append(time)
        assert (x[~attention_mask] == 0).all()
        mean = (x * attention_mask.unsqueeze(-1)).sum(1, keepdim=True) / attention_mask.sum(1)[:, None, None]
        return rate * (x - mean) + tags + 1.0


def test_solvers_have_their_order_of_convergence():
    # x' = x cos 2t + t, against a fine solution
    def field(x, time):
        return x * torch.cos(2 * time) + time

    start = torch.tensor([1.0, -2.0], dtype=torch.float64)
    exact = solve_fixed(field, start, torch.linspace(1, 0, 257), "rk4")
    for solver, order in (("euler", 1), ("midpoint", 2), ("rk4", 4)):
        errors = [
            (solve_fixed(field, start, torch.linspace(1, 0, steps + 1), solver) - exact).abs().max().item()
            for steps in (4, 8, 16)
        ]
        # the times are single precision: nothing below 1e-7
        measured = np.log2(errors[0] / errors[1]), np.log2(errors[1] / errors[2])
        assert measured[0] == pytest.approx(order, abs=0.35), (solver, errors)
        assert measured[1] == pytest.approx(order, abs=0.35), (solver, errors)


def test_dopri5_keeps_its_tolerance_with_few_steps():
    calls = []

    def field(x, time):
        calls.append(float(time))
        return x * torch.cos(2 * time) + time

    start = torch.tensor([1.0, -2.0], dtype=torch.float64)
    exact = solve_fixed(field, start, torch.linspace(1, 0, 257), "rk4")
    errors, numbers = [], []
    for tolerance in (1e-2, 1e-4, 1e-6):
        calls.clear()
        result = solve_dopri5(field, start, 1.0, 0.0, tolerance, tolerance)
        errors.append((result - exact).abs().max().item())
        numbers.append(len(calls))
        assert calls[0] == 1.0 and calls[-1] == 0.0 and min(calls) >= 0.0
        assert errors[-1] < 10 * tolerance
    assert numbers[0] <= numbers[1] < numbers[2] < 100
    # padding that has no error must not dilute the mean
    padded = torch.cat([start, torch.zeros(98, dtype=torch.float64)])
    calls.clear()
    solve_dopri5(lambda x, time: field(x, time) * (padded != 0), padded, 1.0, 0.0, 1e-6, 1e-6, num_elements=2)
    assert len(calls) == numbers[2]


def test_dopri5_local_error_is_of_order_five():
    """One step of half the size has an error 2^6 times smaller."""
    errors = []
    for size in (0.8, 0.4):
        x = torch.ones(1, dtype=torch.float64)
        # a first step of the whole interval: start + 100 * (end - start) / 100
        loose = solve_dopri5(lambda x, time: x, x, 0.0, size, 1e9, 1e9)
        errors.append(abs(loose.item() - np.exp(size)))
    # 0 -> size takes the steps 0.01, 0.05 and the rest: dominated by the last
    assert errors[0] / errors[1] > 2**4.5


def test_hostile_dopri5_field_that_is_not_finite():
    with pytest.raises(SolverError, match="dopri5: no step is small enough"):
        solve_dopri5(lambda x, time: x * torch.nan, torch.ones(2), 1.0, 0.0, 1e-4, 1e-4)
    with pytest.raises(SolverError, match="dopri5"):
        solve_dopri5(lambda x, time: x / 0, torch.ones(2), 1.0, 0.0, 1e-4, 1e-4)


def test_batches_hold_every_set_once_and_have_little_padding():
    generator = torch.Generator().manual_seed(1)
    counts = torch.randint(1, 40, (300,), generator=generator)
    for max_slots, overhead in ((64, 0), (1000, 50), (10**9, 10**9), (1, 0)):
        batches = multiplicity_batches(counts, max_slots, overhead)
        assert torch.equal(torch.cat(batches).sort().values, torch.arange(300))
        for batch in batches:
            assert len(batch) * counts[batch].max() <= max(max_slots, int(counts[batch].max()))
    # without a price for batches there is no padding; with an endless price one batch
    assert all(len(set(counts[batch].tolist())) == 1 for batch in multiplicity_batches(counts, 10**9, 0))
    assert len(multiplicity_batches(counts, 10**9, 10**9)) == 1
    # the price of the cuts is the least of all ways to cut (few different multiplicities: try all)
    few = torch.tensor([1, 1, 2, 5, 5, 5, 9])
    widths = [9, 5, 2, 1]
    best = min(
        sum(int(((few <= group[0]) & (few >= group[-1])).sum()) * group[0] + 7 for group in cut_at(widths, pattern))
        for pattern in range(8)
    )
    batches = multiplicity_batches(few, 10**9, 7)
    assert sum(len(batch) * int(few[batch].max()) + 7 for batch in batches) == best


def cut_at(values, pattern):
    groups = [[values[0]]]
    for index, value in enumerate(values[1:]):
        if pattern >> index & 1:
            groups.append([])
        groups[-1].append(value)
    return groups


@pytest.mark.parametrize("solver", [*FIXED_STEP_SOLVERS, "dopri5"])
def test_results_do_not_depend_on_the_batches(solver, monkeypatch):
    counts = [3, 17, 1, 40, 17, 2, 9]
    request = {"num_particles": counts, "labels": torch.tensor([0, 1, 0, 1, 1, 0, 0]), "solver": solver}
    results = []
    for overhead, batch_size in ((0, None), (10**9, None), (50, 2), (0, 1)):
        monkeypatch.setitem(flow_sampling.BATCH_OVERHEAD, "cpu", overhead)
        model = ToyFlow()
        sample = model.generate(**request, generator=torch.Generator().manual_seed(3), batch_size=batch_size)
        results.append(sample.particles)
        assert tuple(sample.particles.shape) == (7, 40, 2)
        assert sample.attention_mask.sum(1).tolist() == counts
        assert (sample.particles[sample.attention_mask == 0] == 0).all()
        assert (sample.particles[sample.attention_mask == 1] != 0).all()
        per_step = {"euler": 1, "midpoint": 2, "rk4": 4}.get(solver)
        if per_step:
            assert sample.num_function_evaluations == 5 * per_step
            assert len(model.widths) == 5 * per_step * model.preparations
    for other in results[1:]:
        # dopri5 chooses other steps for other batches
        tolerance = 3e-3 if solver == "dopri5" else 1e-5
        torch.testing.assert_close(other, results[0], rtol=tolerance, atol=tolerance)
    again = ToyFlow().generate(**request, generator=torch.Generator().manual_seed(3), batch_size=1)
    assert torch.equal(again.particles, results[-1])


def test_no_padding_where_multiplicities_repeat(monkeypatch):
    monkeypatch.setitem(flow_sampling.BATCH_OVERHEAD, "cpu", 0)
    model = ToyFlow()
    model.generate([5, 8, 5, 8, 8], num_inference_steps=1, solver="euler")
    assert sorted(model.widths) == [(2, 5), (3, 8)]


def test_masks_with_holes_and_inputs_of_particles():
    """Slots may be filled in any order; inputs of particles follow them."""
    mask = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 1, 0, 0], [1, 1, 1, 1, 1]])
    tags = torch.arange(15.0).reshape(3, 5, 1)
    noise = torch.randn(3, 5, 2, generator=torch.Generator().manual_seed(0))
    noise[mask == 0] = torch.nan  # not looked at
    sample = ToyFlow().generate(attention_mask=mask, noise=noise, tags=tags)
    assert torch.equal(sample.attention_mask, mask)
    for row in range(3):
        filled = mask[row].bool()
        alone = ToyFlow().generate(
            num_particles=[int(filled.sum())], noise=noise[row : row + 1, filled], tags=tags[row : row + 1, filled]
        )
        torch.testing.assert_close(sample.particles[row, filled], alone.particles[0])
        assert (sample.particles[row, ~filled] == 0).all()


def test_noise_is_drawn_for_particles_only(monkeypatch):
    shapes = []
    monkeypatch.setattr(ToyFlow, "noise", lambda self, shape, generator: shapes.append(shape) or torch.ones(shape))
    ToyFlow().generate([3, 4, 40])
    assert shapes == [(47, 2)]


def test_guidance_extrapolates_between_no_label_and_label():
    request = {"num_particles": [4, 6], "labels": torch.tensor([1, 2]), "solver": "euler", "num_inference_steps": 3}
    noise = torch.randn(2, 6, 2, generator=torch.Generator().manual_seed(2))
    model = ToyFlow(label_dropout=0.1)
    guided = model.generate(**request, noise=noise, guidance_scale=2.0)
    # rate 0 without label (1 + -1), 1 + label with it
    doubled = ToyFlow().generate(**{**request, "labels": torch.tensor([3, 5])}, noise=noise)
    torch.testing.assert_close(guided.particles, doubled.particles)
    assert guided.num_function_evaluations == 3
    plain = ToyFlow().generate(**request, noise=noise)
    one = ToyFlow(label_dropout=0.1).generate(**request, noise=noise, guidance_scale=1.0)
    assert torch.equal(one.particles, plain.particles)


def test_default_settings_and_times():
    model = ToyFlow(num_inference_steps=127)
    sample = model.generate([2], solver="midpoint")
    assert sample.num_function_evaluations == 254
    # numpy's double precision grid rounded to single precision, as torchdiffeq is given it
    grid = torch.from_numpy(np.linspace(1, 0, 128)).float()
    assert torch.equal(model.sampling_times(127), grid)
    assert torch.equal(torch.stack(model.times[::2]), grid[:-1])
    assert torch.equal(torch.stack(model.times[1::2]), grid[:-1] + 0.5 * grid.diff())
    assert not model.can_generate()


def test_progress_bar(capsys):
    ToyFlow().generate([2, 30], progress_bar=True)
    assert "sampling: 100%" in capsys.readouterr().err


HOSTILE = [
    ({"num_particles": None}, "either `num_particles` or `attention_mask`"),
    ({"attention_mask": torch.ones(2, 3)}, "either `num_particles` or `attention_mask`"),
    ({"num_particles": [3, 0]}, "row 1: 0 particles, expected 1 to 40"),
    ({"num_particles": [3, 41]}, "row 1: 41 particles, expected 1 to 40"),
    ({"num_particles": [-2, 3]}, "row 0: -2 particles"),
    ({"num_particles": [3.0, 2.0]}, "`num_particles` has shape (2,) and dtype torch.float32"),
    ({"num_particles": [[3], [2]]}, "`num_particles` has shape (2, 1)"),
    ({"num_particles": torch.zeros(0, dtype=torch.long)}, "the batch is empty"),
    ({"num_particles": None, "attention_mask": torch.tensor([[1, 1], [0, 0]])}, "row 1: 0 particles"),
    ({"num_particles": None, "attention_mask": torch.tensor([[1, 2]])}, "expected (batch, slots) of 0 and 1"),
    ({"num_particles": None, "attention_mask": torch.ones(3)}, "expected (batch, slots) of 0 and 1"),
    ({"labels": [1]}, "`labels` has shape (1,), expected (2,)"),
    ({"tags": torch.zeros(2, 7, 1)}, "`tags` has shape (2, 7, 1), expected (2, 3)"),
    ({"solver": "heun"}, "`solver` is 'heun', expected one of euler, midpoint, rk4, dopri5"),
    ({"num_inference_steps": 0}, "`num_inference_steps` is 0"),
    ({"num_inference_steps": 2.5}, "`num_inference_steps` is 2.5"),
    ({"num_inference_steps": 10, "solver": "dopri5"}, "is for fixed steps"),
    ({"solver": "dopri5", "atol": 0.0}, "`atol` 0.0"),
    ({"solver": "dopri5", "rtol": float("inf")}, "`rtol` is inf"),
    ({"solver": "dopri5", "rtol": "small"}, "`rtol` is small"),
    ({"solver": "dopri5", "atol": float("nan")}, "`atol` nan"),
    ({"rtol": 1e-3}, "`rtol` is for 'dopri5'; 'midpoint' takes `num_inference_steps`"),
    ({"solver": "euler", "atol": 1e-3}, "`atol` is for 'dopri5'"),
    ({"num_inference_steps": True}, "`num_inference_steps` is True"),
    ({"num_inference_steps": "9"}, "`num_inference_steps` is '9'"),
    ({"batch_size": 0}, "`batch_size` is 0"),
    ({"batch_size": True}, "`batch_size` is True"),
    ({"generator": 3}, "`generator` is int, expected a torch.Generator"),
    ({"num_particles": "many"}, "`num_particles` is str, expected a tensor or lists of numbers"),
    ({"labels": ["top", "QCD"]}, "`labels` is list, expected a tensor or lists of numbers"),
    ({"noise": [[1.0], [2.0, 3.0]]}, "`noise` is list, expected a tensor or lists of numbers"),
    ({"guidance_scale": 2.0, "labels": [0, 1]}, "needs a model that was trained with dropped labels"),
    ({"guidance_scale": -1.0}, "`guidance_scale` is -1.0"),
    ({"guidance_scale": float("nan")}, "`guidance_scale` is nan"),
    ({"guidance_scale": float("inf")}, "`guidance_scale` is inf"),
    ({"num_particles": []}, "the batch is empty"),
    ({"noise": torch.zeros(2, 3, 2, dtype=torch.complex64)}, "`noise` is torch.complex64, expected real numbers"),
    ({"noise": torch.zeros(2, 3, 5)}, "`noise` has shape (2, 3, 5), expected (2, 3, 2)"),
    ({"noise": torch.full((2, 3, 2), torch.nan)}, "`noise` is not finite"),
]


@pytest.mark.parametrize(("settings", "expected"), HOSTILE)
def test_hostile_arguments_of_generate(settings, expected):
    with pytest.raises(ValueError) as error:
        ToyFlow().generate(**{"num_particles": [3, 2], **settings})
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_hostile_field_that_is_not_finite():
    """A set that the network drove to infinity is not handed out in silence."""

    class Broken(ToyFlow):
        def velocity(self, x, time, attention_mask, rate, tags):
            return super().velocity(x, time, attention_mask, rate, tags) / (rate - 3)

    with pytest.raises(SolverError, match="row 1: not finite after 10 evaluations"):
        Broken().generate([3, 4, 2], labels=[0, 2, 1])
    assert Broken().generate([3, 4, 2], labels=[0, 3, 1]).particles.isfinite().all()


def test_numbers_of_numpy_are_numbers():
    settings = {"num_inference_steps": np.int64(3), "batch_size": np.int32(1), "solver": "euler"}
    assert ToyFlow().generate([3, 2], **settings).num_function_evaluations == 3


def test_hostile_guidance_without_labels():
    with pytest.raises(ValueError, match="`guidance_scale` needs `labels`"):
        ToyFlow(label_dropout=0.1).generate([3], guidance_scale=2.0)
