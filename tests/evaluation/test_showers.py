"""Shower observables: hand-computed values, invariances, empty showers, and the forms and errors of the input."""

from pathlib import Path

import numpy as np
import pytest

from hepzoo.evaluation.showers import (
    CORRELATED,
    OBSERVABLES,
    ShowerObservables,
    Showers,
    as_showers,
    cell_energy_edges,
    containment_radius,
    energy_bins,
    energy_response,
    iter_showers,
    narrowest_interval,
    observe,
    observe_files,
    radial_edges,
    radial_profile,
    read_showers,
    start_layer,
)

RECORD = {
    "incident_energy": 10.0,
    "x": [14, 15, 14, 0],
    "y": [15, 15, 15, 0],
    "z": [2, 2, 5, 29],
    "energy": [1.0, 1.0, 2.0, 0.05],
}
EMPTY = {"incident_energy": 20.0, "x": [], "y": [], "z": [], "energy": []}
TWICE = {"incident_energy": 50.0, "x": [3, 3], "y": [4, 4], "z": [20, 20], "energy": [1.0, 3.0]}


def toy_showers(n: int, seed: int, response: float = 0.02, width: float = 2.0, energy=(10.0, 100.0)) -> list[dict]:
    """Showers of about E_inc / GeV + 10 hits: Gaussian in the transverse plane, around layer 14 + ln E / 2 along z."""
    rng = np.random.default_rng(seed)
    rows = []
    for incident in rng.uniform(*energy, n):
        hits = rng.poisson(incident + 10)
        share = rng.exponential(1.0, hits) + 1e-3
        total = 1000 * incident * response * rng.normal(1, 0.05)
        rows.append(
            {
                "incident_energy": incident,
                "x": np.clip(rng.normal(14.5, width, hits), 0, 29).astype(np.int16),
                "y": np.clip(rng.normal(14.5, width, hits), 0, 29).astype(np.int16),
                "z": np.clip(rng.normal(14 + np.log(incident) / 2, 4, hits), 0, 29).astype(np.int16),
                "energy": (total * share / share.sum()).astype(np.float32),
            }
        )
    return rows


def write_showers(path, rows: list[dict], **columns) -> str:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = {name: [row[name] for row in rows] for name in rows[0]} | columns
    pq.write_table(pa.table({name: pa.array(values) for name, values in table.items()}), path)
    return str(path)


def values_of(observables: ShowerObservables, row: int) -> dict[str, float]:
    return {name: float(values[row]) for name, values in observables.scalars.items()}


def test_observables_by_hand():
    found = observe([RECORD, EMPTY, TWICE])
    assert set(found.scalars) == set(OBSERVABLES)
    assert values_of(found, 0) == pytest.approx(
        {
            "visible_energy": 4.0,
            "energy_ratio": 4.0e-4,
            "num_hits": 3,
            "mean_hit_energy": 4 / 3,
            "max_fraction": 0.5,
            "cog_x": 14.25,
            "cog_y": 15.0,
            "cog_z": 3.5,
            "width_x": np.sqrt(0.1875),
            "width_y": 0.0,
            "width_z": 1.5,
            "width_r": np.sqrt(0.1875),
            "r50": 0.25,
            "r90": 0.75,
            "start_layer": 2,
            "hottest_layer": 5,
            "front_fraction": 1.0,
            "middle_fraction": 0.0,
            "back_fraction": 0.0,
            "duplicates": 0.0,
        }
    )
    twice = values_of(found, 2)
    assert twice["duplicates"] == 0.5 and twice["back_fraction"] == 1.0 and twice["start_layer"] == 20
    layers, hits = found.profiles["energy_per_layer"][0], found.profiles["hits_per_layer"][0]
    assert layers.shape == (30,) and dict(enumerate(layers[layers > 0])) == {0: 2.0, 1: 2.0}
    assert hits[2] == 2 and hits[5] == 1 and hits.sum() == 3  # the hit below the cut is in no layer
    assert found.profiles["radial_profile"][0, 0] == 4.0  # all within sqrt(0.5) cells of the centre (14.5, 14.5)
    assert found.profiles["cell_energy"].sum(axis=1).tolist() == [3, 0, 2]
    assert found.profiles["all_cell_energy"].sum(axis=1).tolist() == [4, 0, 2]


def test_empty_showers_are_kept_and_undefined():
    found = values_of(observe([RECORD, EMPTY, TWICE]), 1)
    zero = {"visible_energy", "energy_ratio", "num_hits"}
    assert all(found[name] == 0 for name in zero)
    assert all(np.isnan(value) for name, value in found.items() if name not in zero)
    last = observe([RECORD, EMPTY])  # an empty shower at the end has no first hit
    assert np.isnan(last.scalars["r50"][1]) and last.scalars["r50"][0] == 0.25
    assert len(observe([EMPTY])) == 1


def test_cut_is_exclusive_and_can_empty_a_shower():
    assert observe([RECORD], cut=1.0).scalars["num_hits"].tolist() == [1]
    assert observe([RECORD], cut=0.0).scalars["num_hits"].tolist() == [4]
    assert observe([RECORD], cut=2.0).scalars["num_hits"].tolist() == [0]


def test_observables_do_not_depend_on_the_order_of_hits_or_showers():
    rows = toy_showers(30, 1)
    rng = np.random.default_rng(0)
    shuffled = []
    for row in rows:
        order = rng.permutation(len(row["x"]))
        shuffled.append({name: values[order] if np.ndim(values) else values for name, values in row.items()})
    turn = rng.permutation(len(rows))
    first, second = observe(rows), observe([shuffled[i] for i in turn])
    for name in first.scalars:
        np.testing.assert_allclose(second.scalars[name], first.scalars[name][turn], rtol=1e-9, err_msg=name)
    for name in first.profiles:
        np.testing.assert_allclose(second.profiles[name], first.profiles[name][turn], rtol=1e-9, atol=1e-9)


def test_totals_agree():
    found = observe(toy_showers(40, 2))
    energy = found.scalars["visible_energy"]
    np.testing.assert_allclose(found.profiles["energy_per_layer"].sum(axis=1), energy)
    np.testing.assert_allclose(found.profiles["radial_profile"].sum(axis=1), energy)
    np.testing.assert_array_equal(found.profiles["hits_per_layer"].sum(axis=1), found.scalars["num_hits"])
    np.testing.assert_allclose(
        sum(found.scalars[f"{part}_fraction"] for part in ("front", "middle", "back")), 1, rtol=1e-12
    )
    np.testing.assert_allclose(
        found.scalars["width_r"] ** 2, found.scalars["width_x"] ** 2 + found.scalars["width_y"] ** 2
    )


def test_containment_radius_against_a_loop():
    showers = as_showers([*toy_showers(20, 3), EMPTY])
    found = containment_radius(showers, (0.3, 1.0))
    for i in range(20):
        one = showers.select(np.array([i]))
        cog = [np.average(v, weights=one.energy) for v in (one.x, one.y)]
        radius = np.hypot(one.x - cog[0], one.y - cog[1])
        for column, fraction in enumerate((0.3, 1.0)):
            enough = [r for r in radius if one.energy[radius <= r].sum() >= fraction * one.energy.sum() * (1 - 1e-8)]
            assert found[i, column] == pytest.approx(min(enough))
    assert np.isnan(found[20]).all()


def test_start_layer_threshold_and_radial_center():
    showers = as_showers([RECORD])
    assert start_layer(showers, 1.9).tolist() == [2]
    assert np.isnan(start_layer(showers, 2.0)).all()
    off_axis = radial_profile(showers, center=(14.0, 12.0))[0]
    assert off_axis[3] == 4.0  # distances 3, 3.16, 3
    assert len(radial_edges()) == 25 and len(radial_edges((120, 120, 30))) == 87
    far = as_showers({"incident_energy": 1.0, "x": [119], "y": [119], "z": [0], "energy": [1.0]}, (120, 120, 30))
    assert radial_profile(far).sum() == 1.0


def test_edges_of_the_cell_energy():
    edges = cell_energy_edges()
    assert len(edges) == 71 and edges[[0, -1]] == pytest.approx([0.01, 30.0])
    longer = cell_energy_edges(100.0)
    np.testing.assert_allclose(longer[:71], edges)
    assert longer[-2] < 100 <= longer[-1]


def test_input_forms_are_equal(tmp_path):
    import datasets
    import pyarrow.parquet as pq

    rows = [RECORD, EMPTY, TWICE]
    columns = {name: [row[name] for row in rows] for name in RECORD}
    file = write_showers(tmp_path / "a.parquet", rows, impact_x_cm=[0.1, 0.2, 0.3])
    forms = [
        columns,
        {name: np.array([np.array(v) for v in values], dtype=object) for name, values in columns.items()},
        pq.read_table(file),
        datasets.Dataset.from_dict(columns),
        as_showers(rows),
    ]
    for form in forms:
        showers = as_showers(form)
        assert showers.offsets.tolist() == [0, 4, 4, 6]
        assert showers.energy.tolist() == [1.0, 1.0, 2.0, 0.05, 1.0, 3.0]
        assert showers.incident_energy.tolist() == [10.0, 20.0, 50.0]
    one = as_showers(RECORD)
    assert len(one) == 1 and one.z.tolist() == [2, 2, 5, 29]
    square = as_showers(
        {"incident_energy": np.ones((2, 1)), **{k: np.ones((2, 3), int) for k in ("x", "y", "z", "energy")}}
    )
    assert square.num_hits.tolist() == [3, 3]


def test_files_in_batches_ranges_and_limits(tmp_path):
    rows = toy_showers(50, 4)
    (tmp_path / "more").mkdir()
    write_showers(tmp_path / "a.parquet", rows[:30])
    write_showers(tmp_path / "more" / "b.parquet", rows[30:])
    whole = observe(rows)
    in_batches = ShowerObservables.concatenate([observe(part) for part in iter_showers(tmp_path, batch_size=7)])
    from_files = observe_files(tmp_path)
    for found in (in_batches, from_files):
        np.testing.assert_array_equal(found.incident_energy, whole.incident_energy)
        np.testing.assert_allclose(found.scalars["width_z"], whole.scalars["width_z"])
    chosen = read_showers(str(tmp_path / "**" / "*.parquet"), energy_range=(20, 60))
    energy = np.array([row["incident_energy"] for row in rows])
    np.testing.assert_array_equal(chosen.incident_energy, energy[(energy >= 20) & (energy <= 60)])
    assert len(read_showers(tmp_path, max_showers=33)) == 33
    assert len(observe_files([tmp_path / "a.parquet"], max_showers=1)) == 1
    with pytest.raises(ValueError, match="no showers with 200 to 300 GeV"):
        observe_files(tmp_path, energy_range=(200, 300))


def test_select_and_concatenate():
    showers = as_showers([RECORD, EMPTY, TWICE])
    turned = showers.select(np.array([2, 0]))
    assert turned.energy.tolist() == [1.0, 3.0, 1.0, 1.0, 2.0, 0.05] and turned.num_hits.tolist() == [2, 4]
    assert showers.select(np.array([False, True, False])).num_hits.tolist() == [0]
    joined = Showers.concatenate([showers, turned])
    assert len(joined) == 5 and joined.owner.tolist() == [0] * 4 + [2] * 2 + [3] * 2 + [4] * 4
    with pytest.raises(ValueError, match="different grids"):
        Showers.concatenate([showers, as_showers([RECORD], (60, 60, 30))])


def test_narrowest_interval():
    # 9 of 10 values: 1..9 is narrower than what includes 100
    mean, spread = narrowest_interval(np.array([1, 2, 3, 4, 5, 6, 7, 8, 9, 100.0]))
    assert mean == 5 and spread == pytest.approx(np.std(np.arange(1, 10)))
    gauss = np.random.default_rng(0).normal(3, 2, 200_000)
    mean, spread = narrowest_interval(gauss)
    assert mean == pytest.approx(3, abs=0.1) and spread / 2 == pytest.approx(0.789, abs=0.01)


def test_energy_response_finds_response_and_resolution():
    rng = np.random.default_rng(1)
    incident = rng.uniform(10, 100, 4000)
    ratio = 0.02 * rng.normal(1, 0.05, 4000)
    observables = ShowerObservables(incident, {"energy_ratio": ratio}, {}, {})
    edges = energy_bins(incident)
    assert edges.tolist() == list(range(10, 101, 10))
    rows = energy_response(observables, edges)
    assert sum(row["showers"] for row in rows) == 4000
    for row in rows:
        assert abs(row["response"] - 0.02) < 5 * row["response_error"] and 0 < row["response_error"] < 2e-4
        assert row["resolution"] == pytest.approx(0.789 * 0.05, rel=0.2)
    few = energy_response(observables, np.array([10, 100, 200.0]))
    assert few[1]["showers"] == 0 and np.isnan(few[1]["response"])
    assert energy_bins(np.full(5, 50.0)).tolist() == [49.5, 50.5]
    assert energy_response(observables.select(incident < 10), [0, 50])[0]["showers"] == 0


def test_correlations():
    found = observe(toy_showers(300, 5))
    matrix = found.correlations()
    names = list(CORRELATED)
    table = np.stack([found.scalars["cog_z"], found.incident_energy, found.scalars["width_x"] ** 2])
    index = [names.index(name) for name in ("cog_z", "incident_energy", "moment_x")]
    np.testing.assert_allclose(matrix[np.ix_(index, index)], np.corrcoef(table))
    assert matrix[names.index("visible_energy"), names.index("incident_energy")] > 0.9
    fixed = observe(toy_showers(50, 6, energy=(50.0, 50.0))).correlations()
    assert np.isnan(fixed[names.index("incident_energy")]).all()
    assert np.isfinite(fixed[names.index("cog_x"), names.index("num_hits")])


def without(name: str) -> dict:
    return {key: value for key, value in RECORD.items() if key != name}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([RECORD, without("energy")], "row 1: column 'energy' is missing"),
        (without("z") | {"incident_energy": [10.0]}, "column 'z' is missing; a shower needs"),
        (
            [RECORD, RECORD | {"energy": [1.0, np.nan, 1.0, 1.0]}],
            r"row 1: energy\[1\] is nan, expected a number of MeV",
        ),
        ([RECORD | {"energy": [1.0, 1.0, -2.0, 1.0]}], r"row 0: energy\[2\] is -2.0, expected a number of MeV"),
        ([RECORD | {"energy": [1.0, 1.0, np.inf, 1.0]}], r"row 0: energy\[2\] is inf"),
        ([RECORD, RECORD | {"energy": [1.0]}], "row 1: energy has 1 hits, x has 4: expected equal lengths"),
        ([RECORD | {"x": [1, 2, 30, 4]}], r"row 0: x\[2\] is 30, expected an integer in 0..29"),
        ([RECORD | {"z": [1, -1, 3, 4]}], r"row 0: z\[1\] is -1"),
        ([RECORD | {"y": [1, 2.5, 3, 4]}], r"row 0: y\[1\] is 2.5, expected an integer"),
        ([RECORD | {"y": [1, np.nan, 3, 4]}], r"row 0: y\[1\] is nan"),
        ([RECORD | {"incident_energy": 0.0}], "row 0: incident_energy is 0.0, expected a positive number of GeV"),
        ([RECORD, RECORD | {"incident_energy": None}], "row 1: incident_energy is nan"),
        ([RECORD | {"incident_energy": "much"}], "'incident_energy': expected one number per row"),
        ([RECORD | {"x": ["a", "b", "c", "d"]}], "row 0: x must be a list of numbers"),
        ([RECORD | {"x": [[1], [2, 3], [4], [5]]}], "row 0: x must be a list of numbers"),
        ([RECORD | {"x": 3}], "row 0: x must be a list of numbers"),
        ([3], "row 0: expected a record, got int"),
        ("photons.parquet", "got str"),
    ],
)
def test_hostile_rows(rows, message):
    with pytest.raises(ValueError, match=message) as error:
        as_showers(rows)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"energy": [[1.0, 1.0], [2.0, None]]}, r"row 1: energy\[1\] is nan"),
        ({"energy": [[1.0, 1.0], [2.0, -1.0]]}, r"row 1: energy\[1\] is -1.0"),
        ({"energy": [[1.0, 1.0], [2.0]]}, "row 1: energy has 1 hits, x has 2"),
        ({"energy": [[1.0, 1.0], None]}, "row 1: energy is null"),
        ({"x": [1, 2]}, "column 'x' holds int64, expected a list of numbers"),
        ({"x": [["a", "b"], ["c", "d"]]}, "column 'x' holds object, expected numbers"),
        ({"x": [[0, 1], [2, 99]]}, r"row 1: x\[1\] is 99, expected an integer in 0..29"),
        ({"incident_energy": [[1.0], [2.0]]}, "incident_energy"),
        ({"incident_energy": [1.0, None]}, "row 1: incident_energy is nan"),
    ],
)
def test_hostile_files(change, message, tmp_path):
    rows = [{"incident_energy": 10.0, "x": [1, 2], "y": [1, 2], "z": [1, 2], "energy": [1.0, 2.0]}] * 2
    file = write_showers(tmp_path / "bad.parquet", rows, **change)
    with pytest.raises(ValueError, match=message) as error:
        read_showers(file)
    assert str(error.value).startswith(file) and len(str(error.value).splitlines()) == 1


def test_hostile_files_that_are_not_parquet(tmp_path):
    (tmp_path / "text.parquet").write_text("no parquet")
    whole = Path(write_showers(tmp_path / "good.parquet", [RECORD])).read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    for name in ("text", "cut"):
        with pytest.raises(ValueError, match=f"{name}.parquet: not a readable Parquet file"):
            read_showers(tmp_path / f"{name}.parquet")
    with pytest.raises(ValueError, match="no Parquet file found"):
        read_showers(tmp_path / "nothing*")
    write_showers(tmp_path / "none.parquet", [without("x")])
    with pytest.raises(ValueError, match="none.parquet: column 'x' is missing"):
        observe_files(tmp_path / "none.parquet")
    with pytest.raises(ValueError, match="not finite|all finite"):
        narrowest_interval([1.0, np.nan])
