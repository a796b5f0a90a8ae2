import numpy as np
import pytest

from hepzoo.tokenization.geometry_dirc import DircGeometry
from hepzoo.tokenization.noise_dirc import add_dark_noise


def make_records(count, seed=0):
    rng = np.random.default_rng(seed)
    records = []
    for _ in range(count):
        n = int(rng.integers(0, 9))
        records.append(
            {
                "P": 6.0,
                "Theta": 30.0,
                "NHits": n,
                "pmtID": rng.integers(0, 24, n, dtype=np.int16),
                "pixelID": rng.integers(0, 256, n, dtype=np.int16),
                "leadTime": rng.uniform(9, 157, n).astype(np.float32),
            }
        )
    return records


def check(record, original, geometry):
    n = original["NHits"]
    total = record["NHits"]
    for name in ("pmtID", "pixelID", "leadTime"):
        np.testing.assert_array_equal(record[name][:n], original[name])
        assert record[name].dtype == original[name].dtype
    for name in ("pmtID", "pixelID", "leadTime", "channel", "x", "y", "is_noise"):
        assert record[name].shape == (total,)
    np.testing.assert_array_equal(record["is_noise"], [0] * n + [1] * (total - n))
    assert record["is_noise"].dtype == np.int8 and record["channel"].dtype == np.int32
    np.testing.assert_array_equal(record["channel"], geometry.channel(record["pmtID"], record["pixelID"]))
    x, y = geometry.pixel_center(record["pmtID"], record["pixelID"])
    np.testing.assert_array_equal(record["x"], x.astype(np.float32))
    np.testing.assert_array_equal(record["y"], y.astype(np.float32))


def test_records_keep_their_hits_and_gain_noise():
    geometry = DircGeometry()
    records = make_records(50)
    noisy = add_dark_noise(records, rng=1, scale=100.0)
    assert isinstance(noisy, list) and sum(r["NHits"] for r in noisy) > sum(r["NHits"] for r in records)
    for record, original in zip(noisy, records, strict=True):
        check(record, original, geometry)
        assert "is_noise" not in original


def test_all_forms_agree():
    records = make_records(20)
    columns = {name: [record[name] for record in records] for name in records[0]}
    noisy = add_dark_noise(records, rng=3, scale=50.0)
    as_columns = add_dark_noise(columns, rng=3, scale=50.0)
    for name, values in as_columns.items():
        for ours, record in zip(values, noisy, strict=True):
            np.testing.assert_array_equal(ours, record[name])
    single = add_dark_noise(records[0], uniform=np.random.default_rng(0).random, scale=100.0)
    check(single, records[0], DircGeometry())
    assert add_dark_noise([], rng=0) == []


def test_rates_and_distributions():
    records = make_records(1) * 4000
    noisy = add_dark_noise(records, rng=0, scale=100.0)
    dark = {
        name: np.concatenate([r[name][r["is_noise"] == 1] for r in noisy]) for name in ("pmtID", "pixelID", "leadTime")
    }
    # 24 PMTs x 28 kHz x 100 ns x 100 = 6.72 hits per track.
    expected = 6.72 * 4000
    assert abs(len(dark["pmtID"]) - expected) < 5 * np.sqrt(expected)
    counts = np.bincount(dark["pmtID"], minlength=24)
    assert np.all(np.abs(counts - expected / 24) < 5 * np.sqrt(expected / 24))
    assert dark["leadTime"].min() >= 0 and dark["leadTime"].max() < 100
    assert abs(dark["leadTime"].mean() - 50) < 1 and abs(dark["pixelID"].mean() - 127.5) < 3
    physical = add_dark_noise(records, rng=0)
    assert abs(sum(r["is_noise"].sum() for r in physical) - 0.0672 * 4000) < 5 * np.sqrt(0.0672 * 4000)


def test_more_than_one_hit_per_pmt():
    # 2.5 expected: two certain hits and one with probability 0.5.
    noisy = add_dark_noise(make_records(1) * 500, rng=0, rate_hz_per_pmt=25e6)
    per_pmt = np.stack([np.bincount(r["pmtID"][r["is_noise"] == 1], minlength=24) for r in noisy])
    assert set(np.unique(per_pmt)) == {2, 3} and abs(per_pmt.mean() - 2.5) < 0.03


def test_order_of_uniform_numbers():
    geometry = DircGeometry(1, 2)
    record = make_records(1)[0]
    record["pmtID"] = record["pmtID"] % 2
    # PMT 0 fires (accept, time, pixel), PMT 1 does not (accept only).
    draws = iter([0.1, 0.25, 0.999, 0.9])
    noisy = add_dark_noise(record, geometry, scale=100.0, uniform=lambda: next(draws))
    assert (noisy["pmtID"][-1], noisy["pixelID"][-1], noisy["leadTime"][-1]) == (0, 255, 25.0)
    assert next(draws, None) is None
    # Expected 1.4: the first iteration is the uncertain one, the second always fires.
    draws = iter([0.5, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7])
    noisy = add_dark_noise(record, geometry, rate_hz_per_pmt=14e6, uniform=lambda: next(draws))
    np.testing.assert_allclose(noisy["leadTime"][-3:], [10, 40, 60])
    np.testing.assert_array_equal(noisy["pmtID"][-3:], [0, 1, 1])


def test_inactive_pmts_windows_and_boxes():
    geometry = DircGeometry(inactive_pmts=(0, 1, 2), num_boxes=2)
    record = {"P": 1.0, "NHits": 1, "pmtID": [30], "pixelID": [3], "leadTime": [40.0]}
    noisy = add_dark_noise(record, geometry, rng=0, rate_hz_per_pmt=10e6, window_ns=130.0, window_start_ns=20.0)
    dark = noisy["is_noise"] == 1
    assert set(noisy["pmtID"][dark]) == set(range(27, 48))
    assert noisy["leadTime"][dark].min() >= 20 and noisy["leadTime"].max() < 150
    assert noisy["channel"].max() < geometry.num_channels


def test_noise_can_be_added_twice():
    once = add_dark_noise(make_records(5), rng=0, scale=100.0)
    twice = add_dark_noise(once, rng=1, scale=100.0)
    for first, second in zip(once, twice, strict=True):
        np.testing.assert_array_equal(second["is_noise"][: first["NHits"]], first["is_noise"])
        assert second["is_noise"][first["NHits"] :].all()


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({}, {"scale": -1.0}, "non-negative rate"),
        ({}, {"rate_hz_per_pmt": float("nan")}, "non-negative rate"),
        ({}, {"window_ns": 0.0}, "positive window"),
        ({}, {"rng": 0, "uniform": lambda: 0.0}, "either rng or uniform"),
        ({"leadTime": [1.0]}, {}, "row 0: leadTime has 1 entries, pmtID has 2"),
        ({"pmtID": [0, 0.5]}, {}, "row 0: pmtID has 0.5; expected integers"),
        ({"pmtID": [0, 24]}, {}, "pmtID must be in 0..23, got 24"),
        ({"pmtID": "ab"}, {}, "row 0: pmtID must be a flat list of numbers"),
    ],
)
def test_hostile_noise_input(changes, arguments, message):
    record = {"P": 1.0, "NHits": 2, "pmtID": [0, 1], "pixelID": [0, 1], "leadTime": [10.0, 11.0], **changes}
    with pytest.raises(ValueError, match=message):
        add_dark_noise(record, **arguments)
