"""Feature extractor of FM4NPP: targets, orders, padding, inverse, bin edges, saved code, malformed input."""

import json
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DataCollatorWithPadding

from hepzoo.tokenization.feature_extraction_fm4npp import ORDERS, Fm4nppFeatureExtractor, neighbor_targets
from hepzoo.tokenization.space_filling_curves import hilbert_codes, z_order_codes
from tests.subprocesses import checked, run_python

EDGES = {"eta": [0.0, 0.3, 0.5, 1.0], "phi": [0.0, 0.25, 0.5, 0.75, 1.0], "radius": [0.0, 0.3, 1.0]}


def events(sizes=(40, 7, 1, 90), seed=0, labels=True) -> list[dict]:
    rng = np.random.default_rng(seed)
    rows = []
    for size in sizes:
        r, phi = rng.uniform(31.5, 75, size), rng.uniform(-np.pi, np.pi, size)
        row = {"E": rng.integers(5, 2000, size), "x": r * np.cos(phi), "y": r * np.sin(phi)}
        row["z"] = rng.uniform(-100, 100, size)
        row = {name: values.astype(np.float32) for name, values in row.items()}
        if labels:
            row |= {"track_id": rng.integers(0, 9, size), "pid": rng.integers(0, 5, size)}
            row["noise"] = rng.integers(0, 2, size).astype(bool)
        rows.append(row)
    return rows


def plain(rows: list[dict]) -> list[dict]:
    """As `datasets` hands them out."""
    return [{name: values.tolist() for name, values in row.items()} for row in rows]


@pytest.fixture
def extractor() -> Fm4nppFeatureExtractor:
    return Fm4nppFeatureExtractor(bin_edges=EDGES, num_neighbors=4)


# --- targets ---------------------------------------------------------------------------------------------------------


def slow_targets(coordinates: np.ndarray, k: int) -> np.ndarray:
    """The definition, point by point, in the arithmetic of float32."""
    targets = np.full((len(coordinates), k, 3), -100.0, dtype=np.float32)
    for i, point in enumerate(coordinates):
        later = coordinates[i + 1 :]
        squared = np.zeros(len(later), dtype=np.float32)
        for axis in range(3):
            squared += (point[axis] - later[:, axis]) ** 2
        nearest = np.argsort(squared, kind="stable")[:k]
        targets[i, : len(nearest)] = later[nearest]
    return targets.reshape(len(coordinates), 3 * k)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(1, 40), st.integers(0, 2**32 - 1), st.booleans())
def test_targets_follow_the_definition(size, k, seed, ties):
    rng = np.random.default_rng(seed)
    coordinates = rng.integers(0, 4, (size, 3)) / 4 if ties else rng.random((size, 3))
    coordinates = coordinates[np.argsort(coordinates[:, 2], kind="stable")].astype(np.float32)
    assert np.array_equal(neighbor_targets(coordinates, k), slow_targets(coordinates, k))


@pytest.mark.parametrize("size", [700, 3200])
def test_targets_of_long_events_come_in_blocks(size):
    """More distances than one block holds; a few points are compared."""
    rng = np.random.default_rng(size)
    coordinates = rng.random((size, 3)).astype(np.float32)
    coordinates = coordinates[np.argsort(coordinates[:, 2], kind="stable")]
    targets = neighbor_targets(coordinates, 30)
    for i in (0, 1, size // 2, size - 31, size - 30, size - 2):
        assert np.array_equal(targets[i], slow_targets(coordinates[i:], 30)[0])
    assert (targets[-1] == -100).all() and (targets[:-30] != -100).all()
    assert (targets[-11, 3 * 10 :] == -100).all() and (targets[-11, : 3 * 10] != -100).all()


def test_targets_belong_to_their_points_after_ordering(extractor):
    """Whatever the order of the sequence, a point keeps its targets."""
    rows = events((50,), labels=False)
    by_radius = Fm4nppFeatureExtractor(order="none", num_neighbors=4)(rows)
    ordered = extractor(rows)
    (expected,) = extractor.restore_order(by_radius["neighbor_labels"], by_radius["order"])
    (found,) = extractor.restore_order(ordered["neighbor_labels"], ordered["order"])
    assert np.array_equal(found, expected)
    assert not np.array_equal(ordered["order"], by_radius["order"])


# --- orders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
def test_every_order_is_a_permutation_that_can_be_undone(order):
    extractor = Fm4nppFeatureExtractor(bin_edges=EDGES, order=order, num_neighbors=2)
    rows = events()
    batch = extractor(rows)
    for row, places, mask in zip(rows, batch["order"], batch["attention_mask"], strict=True):
        assert sorted(places[mask == 1]) == list(range(len(row["E"])))
    for name, values in (("track_id", batch["track_labels"]), ("noise", batch["noise_labels"])):
        for row, restored in zip(rows, extractor.restore_order(values, batch["order"]), strict=True):
            assert np.array_equal(restored, row[name].astype(np.int64))


@pytest.mark.parametrize(
    ("order", "weights"),
    [("EPR", (1, 3, 12)), ("RPE", (8, 2, 1)), ("REP", (2, 6, 1)), ("PER", (4, 1, 12))],
)
def test_cells_count_from_the_fastest_letter(order, weights):
    """Bins: 3 in eta, 4 in phi, 2 in r. Values on an edge belong to the lower bin; outside, to the outer bins."""
    extractor = Fm4nppFeatureExtractor(bin_edges=EDGES, order=order)
    points = np.array([[0, 0.4, 0.6, 0.9], [0, 0.3, 0.25, 0.3], [0, -5, 7, 0.0], [0, 0.0, 0.0, 2.0]], dtype=np.float32)
    buckets = extractor.buckets(points)
    assert buckets.tolist() == [[2, 3, 2], [1, 1, 1], [0, 5, 0], [0, 0, 3]]
    inner = np.array([[1, 2, 1], [0, 0, 0], [0, 3, 0], [0, 0, 1]])
    assert extractor.cells(points).tolist() == (inner @ weights).tolist()


def test_raster_scan_keeps_ascending_radius_inside_a_cell(extractor):
    batch = extractor(events((300,)))
    points = batch["points"][0]
    cells = extractor.cells(points)
    assert (np.diff(cells) >= 0).all() and len(set(cells.tolist())) > 10
    assert all((np.diff(points[cells == cell, 3]) >= 0).all() for cell in set(cells.tolist()))


@pytest.mark.parametrize("codes", [z_order_codes, hilbert_codes])
def test_curves_pass_every_cell_once(codes):
    bits = 3
    lattice = np.stack(np.meshgrid(*[np.arange(2**bits)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    places = codes(lattice, bits)
    assert sorted(places.tolist()) == list(range(8**bits))
    steps = np.abs(np.diff(lattice[np.argsort(places)], axis=0)).sum(axis=1)
    if codes is hilbert_codes:
        assert (steps == 1).all()  # a Hilbert curve never jumps
    else:
        assert z_order_codes(np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [2, 0, 0]]), bits).tolist() == [4, 2, 1, 32]


def test_hostile_lattice_coordinates_are_named():
    with pytest.raises(ValueError, match=r"point 1, axis 2: coordinate 8 is outside 0\.\.7"):
        hilbert_codes(np.array([[0, 0, 0], [1, 1, 8]]), 3)
    with pytest.raises(ValueError, match="must be integers of shape"):
        z_order_codes(np.zeros((3, 3)), 3)


# --- batches ---------------------------------------------------------------------------------------------------------


def test_a_batch_gives_what_single_events_give(extractor):
    rows = events()
    batch = extractor(rows)
    for index, row in enumerate(rows):
        single = extractor(row)
        length = len(row["E"])
        for name, values in single.items():
            assert np.array_equal(batch[name][index, :length], values), name
        assert (batch["points"][index, length:] == 0).all() and (batch["attention_mask"][index, length:] == 0).all()
        for name in ("neighbor_labels", "track_labels", "pid_labels", "noise_labels", "order"):
            assert (batch[name][index, length:] == -100).all()


def test_all_forms_of_rows_agree(extractor):
    rows = events()
    expected = extractor(rows)
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    as_tensors = {name: [torch.as_tensor(values) for values in column] for name, column in columns.items()}
    for form in (plain(rows), columns, as_tensors, {**columns, "truth_pt": [[1.0]] * 4}):
        found = extractor(form)
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_tensors_have_the_types_of_the_models(extractor):
    batch = extractor(plain(events()), return_tensors="pt", pad_to_multiple_of=64)
    assert batch["points"].shape == (4, 128, 4) and batch["points"].dtype == torch.float32
    assert batch["neighbor_labels"].shape == (4, 128, 12) and batch["neighbor_labels"].dtype == torch.float32
    for name in ("attention_mask", "track_labels", "pid_labels", "noise_labels", "order"):
        assert batch[name].shape == (4, 128) and batch[name].dtype == torch.int64
    assert set(extractor(events(labels=False), return_neighbor_labels=False)) == {"points", "attention_mask", "order"}
    one = extractor(events((5,))[0], return_tensors="pt")
    assert one["points"].shape == (1, 5, 4)


def test_stock_collator_pads_encoded_events(extractor):
    rows = events()
    encoded = [dict(extractor(row)) for row in rows]
    batch = DataCollatorWithPadding(extractor)(encoded)
    expected = extractor(rows, return_tensors="pt")
    assert batch.keys() == expected.keys()
    assert all(torch.equal(batch[name], expected[name]) for name in expected)
    ragged = extractor(rows, padding=False)
    assert [len(points) for points in ragged["points"]] == [40, 7, 1, 90]
    padded = extractor.pad(ragged, padding="max_length")
    assert padded["points"].shape == (4, 3200, 4)


def test_normalisation_has_the_published_constants():
    extractor = Fm4nppFeatureExtractor(order="none")
    r = 50.0
    phi, eta = 2.0, -0.7
    row = {"E": [253.0982 + 268.7093], "x": [r * np.cos(phi)], "y": [r * np.sin(phi)], "z": [r * np.sinh(eta)]}
    expected = [1.0, (eta + 2) / 4, (phi + np.pi) / (2 * np.pi), (r - 31.371997833251953) / 44.01293563842774]
    np.testing.assert_allclose(extractor(row)["points"][0], expected, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 50))
def test_inverse_gives_back_the_points(seed, size):
    extractor = Fm4nppFeatureExtractor(bin_edges=EDGES, num_neighbors=1)
    rows = events((size, 3), seed, labels=False)
    batch = extractor(rows, return_tensors="pt")
    columns = extractor.inverse_transform(batch["points"], batch["attention_mask"], batch["order"])
    for index, row in enumerate(rows):
        for name in "Exyz":
            assert columns[name][index].dtype == np.float32
            np.testing.assert_allclose(columns[name][index], row[name], rtol=2e-5, atol=2e-3)
    again = extractor(columns, return_tensors="pt")
    torch.testing.assert_close(again["points"].sum(), batch["points"].sum(), rtol=1e-4, atol=1e-2)


# --- settings --------------------------------------------------------------------------------------------------------


def test_settings_survive_saving(tmp_path):
    extractor = Fm4nppFeatureExtractor(
        bin_edges=EDGES, order="REP", num_neighbors=3, padding_value=-100, eta_limits=(-1, 1), energy_mean=1.5
    )
    pickled = pickle.dumps(extractor)
    extractor(events((4000, 5)), on_invalid="drop_long")
    assert pickle.dumps(extractor) == pickled  # datasets.map takes it for the same function
    extractor.save_pretrained(tmp_path)
    loaded = Fm4nppFeatureExtractor.from_pretrained(tmp_path)
    assert loaded.to_dict() == extractor.to_dict()
    rows = events()
    assert all(np.array_equal(loaded(rows)[name], values) for name, values in extractor(rows).items())
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["bin_edges"] == EDGES and "dropped" not in saved


def test_saved_extractor_loads_without_hepzoo(extractor, tmp_path):
    extractor.save_pretrained(tmp_path / "saved")
    code = """
import json, sys
try:
    import hepzoo
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("hepzoo can be imported: this is no test")
from transformers import AutoFeatureExtractor
extractor = AutoFeatureExtractor.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(extractor).__module__.startswith("transformers_modules.")
print(json.dumps({name: values.tolist() for name, values in extractor(json.loads(sys.argv[2])).items()}))
"""
    rows = plain(events((20, 3)))
    output = checked(run_python(code, tmp_path, tmp_path / "saved", json.dumps(rows), hepzoo=False))
    found = json.loads(output.splitlines()[-1])
    assert found == {name: values.tolist() for name, values in extractor(rows).items()}


def test_bin_edges_from_data():
    """Bins of equal counts; r has three modules, cut in the middle of the gaps."""
    rng = np.random.default_rng(1)
    modules = ((31.372, 39.92), (41.66, 56.96), (58.91, 75.385))
    layers = np.concatenate([np.linspace(first, last, 16) for first, last in modules])
    rows = []
    for _ in range(30):
        r, phi = rng.choice(layers, 400), rng.uniform(-np.pi, np.pi, 400)
        z = r * np.sinh(rng.normal(0, 0.6, 400))
        rows.append({"E": np.full(400, 9.0), "x": r * np.cos(phi), "y": r * np.sin(phi), "z": z})
    extractor = Fm4nppFeatureExtractor(num_neighbors=1)
    edges = extractor.compute_bin_edges(rows)
    assert extractor.bin_edges is edges
    assert [len(edges[name]) for name in ("eta", "phi", "radius")] == [9, 9, 7]
    for name in ("eta", "phi"):
        assert edges[name][0] == 0 and edges[name][-1] == 1
    low, high = extractor.radius_limits
    boundaries = [edges["radius"][k] * (high - low) + low for k in (2, 4)]
    np.testing.assert_allclose(boundaries, [(39.92 + 41.66) / 2, (56.96 + 58.91) / 2], atol=1e-3)
    points = np.concatenate(extractor(rows, padding=False)["points"])
    buckets = extractor.buckets(points)
    counts = np.stack([np.bincount(buckets[:, k], minlength=10)[1:9] for k in (0, 1)])
    np.testing.assert_allclose(counts, len(points) / 8, rtol=0.01)
    per_module = np.bincount(buckets[:, 2], minlength=8)[1:7].reshape(3, 2)
    # counts agree up to one layer, where many points have one radius
    assert (np.abs(np.diff(per_module)) < 2.1 * len(points) / 48).all()


def test_reference_names_of_bin_edges_and_files(tmp_path):
    capital = {"Eta": EDGES["eta"], "Phi": EDGES["phi"], "Radius": EDGES["radius"]}
    (tmp_path / "edges.json").write_text(json.dumps(capital))
    assert Fm4nppFeatureExtractor(bin_edges=tmp_path / "edges.json").bin_edges == EDGES
    assert Fm4nppFeatureExtractor(bin_edges=capital).bin_edges == EDGES


def test_missing_bin_edges_say_how_to_compute_them():
    with pytest.raises(ValueError, match="hepzoo convert-data tpc-bin-edges"):
        Fm4nppFeatureExtractor()(events())


# --- malformed input -------------------------------------------------------------------------------------------------


def changed(name, value, row=1, point=3):
    rows = events()
    rows[row][name] = rows[row][name].copy()
    rows[row][name][point] = value
    return rows


BAD_ROWS = {
    "nan": (changed("z", np.nan), r"row 1: z\[3\] = nan; expected a finite number"),
    "infinite": (changed("E", np.inf), r"row 1: E\[3\] = inf; expected a finite number"),
    "null": ([{**plain(events())[0], "x": [None] * 40}], r"row 0: x\[0\] = nan"),
    "on_the_axis": (
        [{"E": [1.0, 1.0], "x": [40.0, 0.0], "y": [0.0, 0.0], "z": [1.0, 5.0]}],
        r"row 0: point 1 \(x 0, y 0, z 5 cm\) has no finite \(E, eta, phi, r\); expected r > 0",
    ),
    "origin": ([{"E": [1.0], "x": [0.0], "y": [0.0], "z": [0.0]}], "row 0: point 0"),
    "no_points": ([*events((3,), labels=False), dict.fromkeys("Exyz", [])], "row 1: no points; expected at least 1"),
    "empty_record": (dict.fromkeys("Exyz", []), "E is empty"),
    "too_long": (events((5, 3201)), "row 1: 3201 points; expected at most 3200"),
    "short_coordinate": ([{**events((4,))[0], "y": np.ones(3)}], "row 0: y has 3 points, but E has 4"),
    "short_labels": ([*events(), {**events((4,))[0], "pid": np.zeros(3, int)}], "row 4: pid has 3 labels, but E has 4"),
    "float_labels": ([{**events((2,))[0], "track_id": [0.5, 1.5]}], "row 0: track_id must be integers"),
    "large_labels": (
        [{**events((2,))[0], "track_id": np.array([1, 2**64 - 1], dtype=np.uint64)}],
        "row 0: track_id has 18446744073709551615; expected integers of at most 64 bits with sign",
    ),
    "padding_as_track": (changed("track_id", -100), r"row 1: track_id of point 3 is -100, which marks padding"),
    "labels_of_some": ([events()[0], events(labels=False)[1]], r"row 1: field track_id is missing \(row 0 has it\)"),
    "missing_field": ([{"E": [1.0], "x": [1.0], "y": [1.0]}], "field z is missing; row 0 has E, x, y"),
    "text": ([{**events((2,))[0], "x": ["1", "2"]}], "row 0: x"),
    "nested": ([{**events((2,))[0], "x": [[1.0], [2.0]]}], "row 0: x"),
    "columns_of_different_length": (
        {"E": [[1.0]], "x": [[40.0], [1.0]], "y": [[1.0]], "z": [[1.0]]},
        "columns differ in length: E has 1 rows, x has 2 rows",
    ),
    "no_rows": (7, "expected a record dict, a list of records or a dict of columns, got int"),
    "no_records": ([1, 2], "row 0: expected a record dict, got int"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_hostile_rows_give_one_line_that_names_the_place(extractor, name):
    rows, message = BAD_ROWS[name]
    with pytest.raises(ValueError, match=message) as caught:
        extractor(rows)
    assert "\n" not in str(caught.value)


def test_hostile_events_are_dropped_on_request_and_counted(extractor):
    rows = events((5, 3201, 6), labels=False)
    batch = extractor(rows, on_invalid="drop_long", return_row_index=True)
    assert batch["row_index"].tolist() == [0, 2] and dict(extractor.dropped) == {"too_many_points": 1}
    rows += changed("x", np.nan, row=0)[:1] + [dict.fromkeys("Exyz", [])]
    rows = [{name: row[name] for name in "Exyz"} for row in rows]
    with pytest.raises(ValueError, match="row 3: x"):
        extractor([row for row in rows if len(row["E"])], on_invalid="drop_long")
    batch = extractor(rows, on_invalid="drop_events", return_row_index=True)
    assert batch["row_index"].tolist() == [0, 2]
    assert dict(extractor.dropped) == {"too_many_points": 2, "not_finite": 1, "empty": 1}
    assert extractor(rows[1:2], on_invalid="drop_long")["points"].shape == (0, 0, 4)


BAD_SETTINGS = {
    "order": ({"order": "EPE"}, "order must be one of EPR"),
    "neighbors": ({"num_neighbors": 0}, "num_neighbors must be an integer of at least 1"),
    "padding": ({"padding_value": float("nan")}, "padding_value must be a finite number"),
    "std": ({"energy_std": 0.0}, "energy_std must be positive"),
    "limits": ({"radius_limits": (75, 31)}, "radius_limits must ascend"),
    "one_limit": ({"eta_limits": (1,)}, "eta_limits must be two numbers"),
    "edges_names": ({"bin_edges": {"eta": [0, 1]}}, "bin_edges must map eta, phi, radius to edges"),
    "edges_order": ({"bin_edges": {**EDGES, "phi": [0.0, 1.0, 0.5]}}, "must ascend in float32"),
    "edges_equal": ({"bin_edges": {**EDGES, "phi": [0.5, 0.5 + 1e-12]}}, "must ascend in float32"),
    "edges_nan": ({"bin_edges": {**EDGES, "eta": [0.0, float("nan")]}}, "at least 2 finite numbers"),
    "edges_text": ({"bin_edges": {**EDGES, "eta": "abc"}}, "at least 2 finite numbers"),
    "edges_file": ({"bin_edges": "missing.json"}, "missing.json is not a readable JSON file"),
}


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_hostile_settings_are_named(name):
    arguments, message = BAD_SETTINGS[name]
    with pytest.raises(ValueError, match=message):
        Fm4nppFeatureExtractor(**arguments)


def test_hostile_saved_bin_edges_are_no_file_name(extractor, tmp_path):
    """A saved extractor could name any file; only who loads it can."""
    (tmp_path / "edges.json").write_text(json.dumps(EDGES))
    settings = {**extractor.to_dict(), "bin_edges": str(tmp_path / "edges.json")}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="saved feature extractor: bin_edges is '.*edges.json', expected the edges"):
        Fm4nppFeatureExtractor.from_pretrained(tmp_path)
    loaded = Fm4nppFeatureExtractor.from_pretrained(tmp_path, bin_edges=str(tmp_path / "edges.json"))
    assert loaded.bin_edges == EDGES
    # also where the file has none
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"order": "EPR", "num_neighbors": 4}))
    assert Fm4nppFeatureExtractor.from_pretrained(tmp_path, bin_edges=EDGES).bin_edges == EDGES


def test_hostile_arguments_are_named(extractor):
    with pytest.raises(ValueError, match="on_invalid must be"):
        extractor(events(), on_invalid="ignore")
    with pytest.raises(ValueError, match="rows differ in length"):
        extractor(events(), padding=False, return_tensors="pt")
    with pytest.raises(ValueError, match="points is missing"):
        extractor.pad([{"order": [1]}])
    with pytest.raises(ValueError, match="feature 1: key order is not in all features"):
        extractor.pad([{"points": np.zeros((1, 4)), "order": [0]}, {"points": np.zeros((1, 4))}])
    with pytest.raises(ValueError, match="row 0: order is no permutation"):
        extractor.restore_order(np.zeros((1, 2)), np.array([[1, 1]]))
    with pytest.raises(ValueError, match="row 0: points must be floats"):
        extractor.inverse_transform(np.zeros((1, 2, 3)))
    with pytest.raises(ValueError, match="row 0: points has a value that is not finite"):
        extractor.inverse_transform(np.full((1, 2, 4), np.nan))
    with pytest.raises(ValueError, match="no points near r = 40 cm"):
        extractor.compute_bin_edges({"E": [1.0], "x": [70.0], "y": [0.0], "z": [0.0]})
    with pytest.raises(ValueError, match="a multiple of 3"):
        extractor.compute_bin_edges(events(), (8, 8, 5))
