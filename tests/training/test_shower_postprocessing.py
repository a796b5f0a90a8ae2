"""Post-processing of generated showers: duplicate cells, MIP cut, energy-sum filter."""

import numpy as np
import pytest

from hepzoo.training.shower_postprocessing import (
    EnergySumFilter,
    apply_mip_cut,
    energy_sums,
    fit_energy_sum_filter,
    merge_duplicate_cells,
    regenerate_low_showers,
)

HITS = ("x", "y", "z", "energy")


def random_showers(number: int, cells: int = 4, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 40, number)
    columns = {name: [rng.integers(0, cells, n).astype(np.int16) for n in lengths] for name in "xyz"}
    energy = [rng.exponential(1.0, n).astype(np.float32) for n in lengths]
    return {"incident_energy": rng.uniform(10, 100, number).astype(np.float32), **columns, "energy": energy}


def records(columns: dict) -> list[dict]:
    return [dict(zip(columns, values)) for values in zip(*columns.values())]


def toy_showers(number: int, seed: int = 0, spread: float = 0.05) -> dict:
    """One hit with the visible energy 20 E^0.95 + 5 MeV, smeared."""
    rng = np.random.default_rng(seed)
    incident = rng.uniform(10, 100, number)
    total = (20 * incident**0.95 + 5) * (1 + spread * rng.standard_normal(number))
    cell = [np.array([1])] * number
    return {"incident_energy": incident, "x": cell, "y": cell, "z": cell, "energy": list(total[:, None])}


# ---------------------------------------------------------------------------------------------------------------------
# Cells
# ---------------------------------------------------------------------------------------------------------------------


def test_merging_against_a_dictionary():
    columns = random_showers(200)
    merged, number = merge_duplicate_cells(columns)
    removed = 0
    for row, result in zip(records(columns), records(merged), strict=True):
        cells: dict[tuple, float] = {}
        for x, y, z, energy in zip(*(row[name].tolist() for name in HITS)):
            cells[x, y, z] = cells.get((x, y, z), 0.0) + energy
        removed += len(row["x"]) - len(cells)
        assert list(zip(*(result[name].tolist() for name in "xyz"))) == list(cells)  # in the order of the first hits
        np.testing.assert_allclose(result["energy"], list(cells.values()), rtol=1e-6)
    assert number == removed > 100
    np.testing.assert_allclose(energy_sums(merged), energy_sums(columns), rtol=1e-6)
    again, number = merge_duplicate_cells(merged)
    assert number == 0
    assert all((a == b).all() for name in HITS for a, b in zip(again[name], merged[name]))


def test_input_is_left_alone_and_types_are_those_of_the_record():
    columns = random_showers(5)
    before = {name: [np.copy(values) for values in columns[name]] for name in HITS}
    for result, _ in (merge_duplicate_cells(columns), apply_mip_cut(columns, 1.0)):
        assert result["incident_energy"].dtype == np.float32
        assert {values.dtype for name in "xyz" for values in result[name]} == {np.dtype(np.int16)}
        assert {values.dtype for values in result["energy"]} == {np.dtype(np.float32)}
    assert all((a == b).all() for name in HITS for a, b in zip(before[name], columns[name]))


def test_many_showers_on_a_large_grid_do_not_mix():
    """More showers and cells than fit into 16 bits each."""
    number = 70_000
    cell = [np.array([32766, 32766], dtype=np.int16)] * number
    rows = {"incident_energy": np.full(number, 10.0), "x": cell, "y": cell, "z": [np.zeros(2, np.int16)] * number}
    merged, removed = merge_duplicate_cells({**rows, "energy": [np.ones(2, np.float32)] * number})
    assert removed == number
    assert np.concatenate(merged["energy"]).tolist() == [2.0] * number


def test_mip_cut():
    row = {"incident_energy": 10.0, "x": [0, 1, 2], "y": [3, 4, 5], "z": [0, 0, 1], "energy": [0.1, 0.3, 0.05]}
    columns, removed = apply_mip_cut(row)
    assert removed == 2  # 0.1 is not above 0.1
    assert [columns[name][0].tolist() for name in "xyz"] == [[1], [4], [0]]
    columns, removed = apply_mip_cut(row, 5.0)
    assert removed == 3 and columns["x"][0].shape == (0,) and len(columns["incident_energy"]) == 1
    assert apply_mip_cut(row, 0)[1] == 0
    assert apply_mip_cut([], 0.1)[0]["x"] == []


# ---------------------------------------------------------------------------------------------------------------------
# Energy sum
# ---------------------------------------------------------------------------------------------------------------------


def test_envelope():
    energy_filter = EnergySumFilter(a=20.0, b=0.5, c=-10.0, safety_factor=0.5)
    np.testing.assert_allclose(energy_filter.lowest_sum([25.0, 100.0]), [45.0, 95.0])
    np.testing.assert_allclose(energy_filter.lowest_sum(1e-9), energy_filter.lowest_sum(1e-3))
    rows = {"incident_energy": [25.0, 25.0], **{name: [[0], [0]] for name in "xyz"}, "energy": [[44.9], [45.1]]}
    assert energy_filter.is_too_low(rows).tolist() == [True, False]


def test_fit_finds_the_quantile():
    energy_filter = fit_energy_sum_filter(toy_showers(20_000), quantile=0.02)
    energy = np.array([12.0, 30.0, 60.0, 95.0])
    expected = (20 * energy**0.95 + 5) * (1 - 0.05 * 2.054)
    np.testing.assert_allclose(energy_filter.lowest_sum(energy) / 0.9, expected, rtol=0.015)
    held_out = toy_showers(20_000, seed=1)
    curve = EnergySumFilter(energy_filter.a, energy_filter.b, energy_filter.c, safety_factor=1.0)
    assert 0.015 < curve.is_too_low(held_out).mean() < 0.025
    assert not energy_filter.is_too_low(held_out).mean() > 0.001


def test_fit_withstands_a_bad_bin():
    rows = toy_showers(20_000)
    spoilt = (rows["incident_energy"] > 50) & (rows["incident_energy"] < 53)
    rows["energy"] = [values * (0.2 if bad else 1) for values, bad in zip(rows["energy"], spoilt)]
    clean, fitted = fit_energy_sum_filter(toy_showers(20_000)), fit_energy_sum_filter(rows)
    energy = np.array([12.0, 30.0, 60.0, 95.0])
    np.testing.assert_allclose(fitted.lowest_sum(energy), clean.lowest_sum(energy), rtol=0.01)


def test_regeneration():
    """Showers of index i get visible energies from a list; the envelope is at 10 MeV."""
    rows = {
        "incident_energy": np.arange(1, 6, dtype=np.float32),
        **{name: [[0]] * 5 for name in "xyz"},
        "energy": [[20.0], [1.0], [20.0], [2.0], [3.0]],
    }
    asked = []
    answers = [[30.0, 4.0, 5.0], [6.0, 40.0]]

    def generate(energies):
        asked.append(energies.tolist())
        energy = [[value] for value in answers[len(asked) - 1]]
        return {"incident_energy": energies, **{name: [[7]] * len(energies) for name in "xyz"}, "energy": energy}

    energy_filter = EnergySumFilter(a=0.0, b=1.0, c=10.0, safety_factor=1.0, max_retries=2)
    columns, retried, low = regenerate_low_showers(rows, energy_filter, generate)
    assert asked == [[2.0, 4.0, 5.0], [4.0, 5.0]]
    assert energy_sums(columns).tolist() == [20.0, 30.0, 20.0, 6.0, 40.0]
    assert [values[0] for values in columns["x"]] == [0, 7, 0, 7, 7]
    assert (retried, low) == (5, 1)
    assert columns["incident_energy"].tolist() == [1, 2, 3, 4, 5]
    never = EnergySumFilter(0.0, 1.0, 10.0, 1.0, max_retries=0)
    assert regenerate_low_showers(rows, never, generate)[1:] == (0, 3)
    assert regenerate_low_showers(rows, EnergySumFilter(0.0, 1.0, 0.0), generate)[1:] == (0, 0)
    assert len(asked) == 2


# ---------------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (None, "expected a dict"),
        ([1, 2, 3], "expected a dict"),
        ({"a": 1.0, "b": 1.0}, "expected a dict"),
        ({"a": 1.0, "b": 1.0, "c": 0.0, "power": 2}, "expected a dict"),
        ({"a": "1", "b": 1.0, "c": 0.0}, "a is '1'"),
        ({"a": 1.0, "b": float("nan"), "c": 0.0}, "b is nan"),
        ({"a": 1.0, "b": 1.0, "c": True}, "c is True"),
        ({"a": 1.0, "b": 1.0, "c": 0.0, "safety_factor": 0}, "safety_factor is 0"),
        ({"a": 1.0, "b": 1.0, "c": 0.0, "max_retries": -1}, "max_retries is -1"),
        ({"a": 1.0, "b": 1.0, "c": 0.0, "max_retries": 1.5}, "max_retries is 1.5"),
    ],
)
def test_hostile_filter_settings(settings, named):
    with pytest.raises(ValueError, match="energy_sum_filter") as caught:
        EnergySumFilter.from_settings(settings)
    assert named in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("cut", [-0.1, float("nan"), float("inf"), "0.1", True, None])
def test_hostile_cut(cut):
    with pytest.raises(ValueError, match="mip_cut is .*, expected an energy in MeV"):
        apply_mip_cut(random_showers(2), cut)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"energy": [[1.0], [1.0, 2.0]]}, "row 1: energy has 2 hits, x has 1"),
        ({"x": [[0], [40000]]}, "row 1: x = 40000, expected a cell index"),
        ({"y": [[-1], [0]]}, "row 0: y = -1, expected a cell index"),
        ({"z": [[0], [0.5]]}, "row 1: z = 0.5, expected a cell index"),
        ({"incident_energy": [1.0]}, "columns differ in length"),
    ],
)
def test_hostile_rows(change, message):
    rows = {"incident_energy": [1.0, 2.0], **{name: [[0], [0]] for name in "xyz"}, "energy": [[1.0], [1.0]]}
    with pytest.raises(ValueError, match=message):
        merge_duplicate_cells({**rows, **change})
    with pytest.raises(ValueError, match="field energy is missing"):
        merge_duplicate_cells({name: values for name, values in rows.items() if name != "energy"})


def test_hostile_samples_for_the_fit():
    with pytest.raises(ValueError, match="299 showers, expected at least 300"):
        fit_energy_sum_filter(toy_showers(299))
    fixed = {**toy_showers(500), "incident_energy": np.full(500, 50.0)}
    with pytest.raises(ValueError, match="from 50 to 50 GeV, expected a wider range"):
        fit_energy_sum_filter(fixed)
    empty = {**toy_showers(500), "energy": [np.zeros(1)] * 500}
    with pytest.raises(ValueError, match="are empty, expected visible energy"):
        fit_energy_sum_filter(empty)
    rows = toy_showers(500)
    rows["energy"][7] = np.array([np.nan])
    with pytest.raises(ValueError, match="row 7: .* nan MeV in all hits"):
        fit_energy_sum_filter(rows)
    with pytest.raises(ValueError, match="quantile is 1"):
        fit_energy_sum_filter(toy_showers(500), quantile=1)
