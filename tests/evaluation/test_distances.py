"""Distances: hand-made values, the statistical floor, and the report."""

import csv
import json

import numpy as np
import pytest

from hepzoo.evaluation.distances import (
    chi2_per_bin,
    compare_tracks,
    format_report,
    pixel_counts,
    ratio_rms,
    save_report,
    summary_features,
    table_rows,
    total_variation,
    wasserstein,
)
from hepzoo.evaluation.tracks_dirc import as_tracks


def test_distances_by_hand():
    assert wasserstein([0.0, 1.0], [2.0, 3.0]) == 2
    assert total_variation([1, 1, 0], [0, 0, 5]) == 1
    assert total_variation([2, 2], [10, 10]) == 0
    assert total_variation([3, 1], [1, 3]) == 0.5
    # r = (0.5, 1.5), weights (0.5, 0.5): sqrt(0.25) / sqrt(2)
    assert ratio_rms([1, 1], [1, 3]) == pytest.approx(0.5 / np.sqrt(2))
    assert ratio_rms([1, 1, 0], [1, 3, 0]) == pytest.approx(0.5 / np.sqrt(2))  # empty real bins do not count
    # equal totals: sum (n - m)^2 / (n + m) = 2 * 4 / 4, one degree of freedom
    assert chi2_per_bin([3, 1], [1, 3]) == pytest.approx(2.0)


def test_chi2_is_one_for_equal_parents():
    rng = np.random.default_rng(0)
    parent = rng.dirichlet(np.ones(400))
    values = [chi2_per_bin(rng.multinomial(20_000, parent), rng.multinomial(50_000, parent)) for _ in range(10)]
    assert np.mean(values) == pytest.approx(1, abs=0.06)


def test_pixel_counts_are_channels(columns):
    made = columns(10, 0)
    np.testing.assert_array_equal(
        pixel_counts(as_tracks(made)), np.bincount(np.concatenate(made["channel"]), minlength=6144)
    )


def test_summary_features(columns):
    tracks = as_tracks(columns(5, 1))
    features = summary_features(tracks)
    one = tracks.select(np.array([3]))
    wanted = [one.momentum[0], one.theta[0], one.num_hits[0]]
    for values in (one.time, one.x, one.y):
        wanted += [values.mean(), values.std()]
    wanted += [one.time.min(), one.time.max(), len(set(zip(one.pmt.tolist(), one.pixel.tolist(), strict=True)))]
    np.testing.assert_allclose(features[3], wanted)


def rows_of(report, species="kaon"):
    return {(r["quantity"], r["distance"], r["unit"]): r for r in report["species"][species]["distances"]}


def test_equal_parents_are_at_the_floor_and_others_above(columns):
    real = columns(600, 2, 321, 6.0, 30.0)
    same = rows_of(compare_tracks(real, columns(600, 3, 321, 6.0, 30.0)))
    other = columns(600, 4, 321, 6.0, 30.0, shift=6.0)
    moved = rows_of(compare_tracks(real, other))
    for key in (("y", "Wasserstein-1", "mm"), ("hit pattern", "total variation", "0..1"), ("y", "ratio RMS", "1")):
        assert same[key]["over_floor"] < 2.5
        assert moved[key]["over_floor"] > 1.5 * same[key]["over_floor"]
    assert moved["y", "Wasserstein-1", "mm"]["value"] == wasserstein(as_tracks(real).y, as_tracks(other).y) > 2
    y = as_tracks(real).y
    assert moved["y", "Wasserstein-1", "rel. to std"]["value"] == pytest.approx(
        moved["y", "Wasserstein-1", "mm"]["value"] / y.std()
    )
    assert ("momentum", "Wasserstein-1", "rel. to std") not in same  # fixed momentum: no spread to divide by


def test_report_per_species_text_and_files(columns, tmp_path):
    report = compare_tracks(columns(80, 5), columns(60, 6), splits=2)
    assert list(report["species"]) == ["pion", "kaon"]
    text = format_report(report)
    assert "pions, real: 40 tracks" in text and "value/floor" in text
    lines = text.split("\n\n")[1].splitlines()
    assert len(lines) == 2 + len(table_rows(report))
    saved = json.loads(save_report(report, tmp_path / "a" / "report.json").read_text())
    assert saved["species"]["kaon"]["generated"]["tracks"] == 30
    with open(save_report(report, tmp_path / "report.csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    assert [r["species"] for r in rows] == [r["species"] for r in table_rows(report)]
    assert float(rows[0]["value"]) == pytest.approx(table_rows(report)[0]["value"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "report.csv"]  # nothing temporary is left
    with pytest.raises(ValueError, match="written as .json or .csv"):
        save_report(report, tmp_path / "report.txt")


def test_same_seed_same_report(columns):
    real, generated = columns(60, 7), columns(60, 8)
    assert format_report(compare_tracks(real, generated, seed=4)) == format_report(
        compare_tracks(real, generated, seed=4)
    )


def test_classifier_sees_a_difference(columns):
    real = columns(150, 9, 211, 6.0, 30.0)
    key = ("tracks", "classifier AUC", "0.5..1")
    same = rows_of(compare_tracks(real, columns(150, 10, 211, 6.0, 30.0), splits=1, classifier=True), "pion")[key]
    moved = rows_of(compare_tracks(real, columns(150, 11, 211, 6.0, 30.0, 10.0), splits=1, classifier=True), "pion")[
        key
    ]
    assert 0.35 < same["value"] < 0.65
    assert moved["value"] > 0.9


def test_rows_without_pdg_are_compared_together(columns):
    made = [{k: v for k, v in columns(40, seed).items() if k != "PDG"} for seed in (1, 2)]
    assert list(compare_tracks(*made)["species"]) == ["all"]


def test_hostile_comparisons(columns):
    kaons, pions = columns(20, 1, 321), columns(20, 2, 211)
    with pytest.raises(ValueError, match="are in the (real|generated) tracks only"):
        compare_tracks(kaons, pions)
    with pytest.raises(ValueError, match="kaon: 2 generated tracks"):
        compare_tracks(kaons, columns(2, 3, 321))
    with pytest.raises(ValueError, match="PDG code 11"):
        compare_tracks(columns(20, 1, 11), columns(20, 1, 11))
    with pytest.raises(ValueError, match="generated sample: value 1 is nan"):
        wasserstein([1.0], [0.0, np.nan])
    with pytest.raises(ValueError, match="real histogram is empty"):
        total_variation([0, 0], [1, 0])
    with pytest.raises(ValueError, match="differ in length"):
        ratio_rms([1], [1, 2])
