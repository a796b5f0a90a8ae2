import json

import numpy as np
import pytest

from hepzoo.tokenization.geometry_dirc import DircGeometry


def test_default_is_the_hpdirc():
    geometry = DircGeometry()
    assert (geometry.num_pmts, geometry.pixels_per_pmt, geometry.num_channels) == (24, 256, 6144)
    pmt, pixel = geometry.pmt_pixel(np.arange(6144))
    x, y = geometry.pixel_center(pmt, pixel)
    assert len(np.unique(x.round(6))) == 96 and len(np.unique(y.round(6))) == 64
    np.testing.assert_allclose([x.min(), x.max()], [3.65625, 347.80455557], atol=1e-8)
    np.testing.assert_allclose([y.min(), y.max()], [3.65625, 228.41517857], atol=1e-8)
    assert geometry.pixel_center(7, 18) == (
        pytest.approx(2 + 18 * 3.3125 + 5.89216111455965 + 1.65625),
        pytest.approx(2 + 17 * 3.3125 + 5.357142857142857 + 1.65625),
    )


def test_histogram_edges_hold_one_pixel_per_bin():
    geometry = DircGeometry()
    assert len(geometry.x_edges) == 104 and len(geometry.y_edges) == 70
    assert geometry.x_edges[0] == geometry.y_edges[0] == 0
    x, y = geometry.pixel_center(*geometry.pmt_pixel(np.arange(6144)))
    assert geometry.x_edges[-1] == pytest.approx(x.max() + 3.3125 / 2 + 2)
    counts, _, _ = np.histogram2d(x, y, bins=(geometry.x_edges, geometry.y_edges))
    assert counts.max() == 1 and counts.sum() == 6144
    # Borders and gaps are bins of their own, always empty.
    assert (counts.sum(axis=1) == 0).sum() == 7 and (counts.sum(axis=0) == 0).sum() == 5


@pytest.mark.parametrize(
    "geometry", [DircGeometry(), DircGeometry(2, 3, 4, 5, 1.0, 2.5, 0.0, 0.7, 0.0), DircGeometry(gap_x=0, gap_y=0)]
)
def test_ids_positions_and_channels_invert_each_other(geometry):
    channel = np.arange(geometry.num_channels)
    pmt, pixel = geometry.pmt_pixel(channel)
    np.testing.assert_array_equal(geometry.channel(pmt, pixel), channel)
    x, y = geometry.pixel_center(pmt, pixel)
    rng = np.random.default_rng(0)
    dx, dy = rng.uniform(-0.499, 0.499, (2, len(x)))
    found = geometry.find_pixel(x + dx * geometry.pixel_width, y + dy * geometry.pixel_height)
    np.testing.assert_array_equal(found, [pmt, pixel])


def test_find_pixel_outside_and_in_gaps():
    geometry = DircGeometry(inactive_pmts=(23,))
    edge = 2 + 16 * 3.3125
    x = np.array([1.9, 2.0, edge - 1e-6, edge, edge + 5.8, edge + 5.9, 1e9, -1e9, np.nan, np.inf, 340.0])
    y = np.full(len(x), 3.0)
    y[-1] = 220.0
    pmt, pixel = geometry.find_pixel(x, y)
    np.testing.assert_array_equal(pmt, [-1, 0, 0, -1, -1, 1, -1, -1, -1, -1, -1])
    np.testing.assert_array_equal(pixel, [-1, 0, 15, -1, -1, 0, -1, -1, -1, -1, -1])
    assert [v.shape for v in geometry.find_pixel(np.zeros((2, 1)), np.zeros(3))] == [(2, 3), (2, 3)]


def test_dict_round_trip():
    geometry = DircGeometry(6, 18, 8, 8, num_boxes=2, inactive_pmts=[96, 0, 5, 5])
    assert geometry.inactive_pmts == (0, 5, 96)
    again = DircGeometry.from_dict(json.loads(json.dumps(geometry.to_dict())))
    assert again == geometry and hash(again) == hash(geometry)
    assert DircGeometry.from_dict(None) == DircGeometry.from_dict({}) == DircGeometry()
    assert len(geometry.active_pmts) == 105 and len(geometry.active_channels) == 105 * 64


def test_second_box_is_folded():
    geometry = DircGeometry(num_boxes=2)
    np.testing.assert_array_equal(geometry.channel([0, 24, 47], [1, 1, 1]), [1, 1, 23 * 256 + 1])
    np.testing.assert_array_equal(geometry.pixel_center(25, 3), geometry.pixel_center(1, 3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda g: g.channel(24, 0), r"pmtID must be in 0..23, got 24"),
        (lambda g: g.channel([0, -1], [0, 0]), r"pmtID must be in 0..23, got -1"),
        (lambda g: g.pixel_center(0, 256), r"pixelID must be in 0..255, got 256"),
        (lambda g: g.pixel_center(0.5, 0), r"pmtID must be integers"),
        (lambda g: g.pixel_center(float("nan"), 0), r"pmtID must be integers"),
        (lambda g: g.pmt_pixel(6144), r"channel must be in 0..6143, got 6144"),
        (lambda g: DircGeometry(pmt_rows=0), "`pmt_rows` must be a positive integer, got 0"),
        (lambda g: DircGeometry(pixel_rows=2.5), "`pixel_rows` must be a positive integer"),
        (lambda g: DircGeometry(pixel_width=0), "`pixel_width` must be a positive length in mm"),
        (lambda g: DircGeometry(gap_x=float("nan")), "`gap_x` must be a non-negative length"),
        (lambda g: DircGeometry(border="2"), "`border` must be"),
        (lambda g: DircGeometry(inactive_pmts=(24,)), "`inactive_pmts` must be in 0..23, got 24"),
        (lambda g: DircGeometry(inactive_pmts=3), "`inactive_pmts` must be a list"),
        (lambda g: DircGeometry(inactive_pmts=range(24)), "leaves no active PMT"),
        (lambda g: DircGeometry(pmt_rows=10**9), "geometry: 1,536,000,000,000 pixels, expected at most"),
        (lambda g: DircGeometry.from_dict("wide"), "geometry must be a dict of its fields, got 'wide'"),
        (lambda g: DircGeometry.from_dict({"rows": 3}), "unknown field 'rows'; known fields: pmt_rows"),
    ],
)
def test_hostile_geometry_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call(DircGeometry())
