"""Distances of shower samples, their floors, the report, the `evaluate` metrics and `hepzoo evaluate showers`."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import hepzoo.evaluation
from hepzoo.evaluation import evaluate_showers
from hepzoo.evaluation.distances import histogram_wasserstein, quantile_kl, two_sample_auc, wasserstein
from hepzoo.evaluation.evaluate_showers import compare_showers, format_markdown, format_report, save_report
from hepzoo.evaluation.metric_classifier_auc import ClassifierAUC
from hepzoo.evaluation.metric_sample_distances import SampleDistances
from hepzoo.evaluation.showers import OBSERVABLES, PROFILES, observe
from tests.evaluation.test_showers import EMPTY, RECORD, toy_showers, write_showers

ROOM = Path(hepzoo.evaluation.__file__).parent


@pytest.fixture(scope="module")
def real():
    return observe(toy_showers(400, 1))


def rows_of(report) -> dict[str, dict]:
    return {row["observable"]: row for row in report["distances"]}


def test_distances_by_hand():
    # half of the entries move by 2 bins of width 0.5
    assert histogram_wasserstein([2, 0, 0], [4, 0, 4], [0, 0.5, 1.0, 1.5]) == 0.5
    assert histogram_wasserstein([1, 2, 1], [2, 4, 2], [0, 1, 2, 3]) == 0
    values = np.arange(1000.0)
    assert quantile_kl(values, values, bins=10) == 0
    # all generated values are in the lower half; both halves of both samples begin with half an entry
    p, q = np.array([0.5, 0.5]), np.array([1000.5, 0.5]) / 1001
    assert quantile_kl(values, np.full(1000, 3.0), bins=2) == pytest.approx((p * np.log(p / q)).sum())
    assert quantile_kl(np.zeros(10), np.zeros(7)) == 0  # no spread at all: one bin


def test_quantile_kl_of_equal_parents_is_what_statistics_give():
    rng = np.random.default_rng(0)
    found = [quantile_kl(rng.normal(size=3000), rng.normal(size=2000)) for _ in range(20)]
    assert np.mean(found) == pytest.approx(29 / 2 * (1 / 3000 + 1 / 2000), rel=0.2)


def test_quantile_kl_does_not_depend_on_the_scale():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=500), rng.normal(0.3, 1, size=700)
    assert quantile_kl(np.exp(a), np.exp(b)) == pytest.approx(quantile_kl(a, b), abs=0.02)


def test_equal_parents_are_at_the_floor_and_others_above(real):
    same = rows_of(compare_showers(real, observe(toy_showers(400, 2)), classifier=False))
    other = rows_of(compare_showers(real, observe(toy_showers(400, 3, 0.021, 2.2)), classifier=False))
    assert set(same) == {"incident_energy", *OBSERVABLES, *PROFILES}
    for name in ("energy_ratio", "width_r", "r90", "radial_profile"):
        assert same[name]["w1_over_floor"] < 2.5, name
        assert other[name]["w1_over_floor"] > 2.5, name
        assert other[name]["tv"] > other[name]["tv_floor"], name
    assert other["width_r"]["kl"] > 2 * other["width_r"]["kl_floor"] > 0
    assert other["start_layer"]["w1_over_floor"] < 3 and other["cog_z"]["w1_over_floor"] < 3


def test_floors_are_scaled_to_the_sizes_of_the_samples():
    ratios = []
    for seed in range(20, 26):
        rows = rows_of(
            compare_showers(observe(toy_showers(200, seed)), observe(toy_showers(60, seed + 50)), classifier=False)
        )
        ratios.append(
            [rows[name][key] / rows[name][f"{key}_floor"] for name in ("cog_x", "r50") for key in ("w1", "kl", "tv")]
        )
    # equal parents: 1 on average
    assert np.mean(ratios, axis=0) == pytest.approx(np.ones(6), abs=0.35)


def test_rows_hold_means_and_distances(real):
    generated = observe(toy_showers(100, 3, 0.021))
    row = rows_of(compare_showers(real, generated, classifier=False))["visible_energy"]
    a, b = real.scalars["visible_energy"], generated.scalars["visible_energy"]
    assert [row[k] for k in ("real_mean", "real_std", "generated_mean", "generated_std")] == pytest.approx(
        [a.mean(), a.std(), b.mean(), b.std()]
    )
    assert row["w1_raw"] == wasserstein(a, b) and row["w1"] == pytest.approx(row["w1_raw"] / a.std())
    assert row["kl"] == quantile_kl(a, b)


def test_response_and_correlations_of_a_wrong_response(real):
    report = compare_showers(real, observe(toy_showers(400, 4, 0.022)), classifier=False, response_edges=[10, 55, 100])
    assert [row["bin"] for row in report["response"]] == ["10 to 55", "55 to 100"]
    for row in report["response"]:
        assert row["response_ratio"] == pytest.approx(1.1, abs=0.02)
        assert row["real_response"] == pytest.approx(2.0, abs=0.05)
    assert report["correlations"]["mean_difference"] < 3 * report["correlations"]["floor"]


def test_classifier(real):
    same, floor_error = evaluate_showers.classifier_auc(real, observe(toy_showers(300, 5)))
    other, _ = evaluate_showers.classifier_auc(real, observe(toy_showers(300, 6, 0.025, 2.5)))
    assert abs(same - 0.5) < 0.12 and 0 < floor_error < 0.1
    assert other > 0.95


def test_report_text_and_files(real, tmp_path):
    generated = observe([*toy_showers(60, 7), EMPTY])
    report = compare_showers(real, generated, splits=2)
    text = format_report(report)
    assert "generated: 61 showers, 1 of them without a hit" in text and "W1/floor" in text and "AUC 0." in text
    assert "Generated showers left out where the observable is undefined: mean_hit_energy 1" in text
    markdown = format_markdown(report)
    tables = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len(tables) == 2 + len(report["distances"]) + 2 + len(report["response"])
    assert len({line.count("|") for line in tables[: 2 + len(report["distances"])]}) == 1
    saved = json.loads(save_report(report, tmp_path / "deep" / "report.json").read_text())
    assert len(saved["correlations"]["real"]) == 12 and saved["classifier"]["auc"] > 0.3
    assert saved["generated"]["undefined"]["cog_z"] == 1
    with open(save_report(report, tmp_path / "report.csv"), newline="") as file:
        assert [row["observable"] for row in csv.DictReader(file)] == list(rows_of(report))
    assert save_report(report, tmp_path / "report.md").read_text() == markdown
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep", "report.csv", "report.md"]
    with pytest.raises(ValueError, match="written as .json, .md or .csv"):
        save_report(report, tmp_path / "report.txt")


def test_same_seed_same_report(real):
    generated = observe(toy_showers(50, 8))
    texts = [format_report(compare_showers(real, generated, splits=2, seed=s)) for s in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]


def test_incident_energies_that_differ_are_told(real):
    alike = compare_showers(real, observe(toy_showers(100, 9)), splits=1, classifier=False)
    assert evaluate_showers.incident_energy_warning(alike) is None
    report = compare_showers(real, observe(toy_showers(100, 9, energy=(50, 100))), splits=1, classifier=False)
    line = evaluate_showers.incident_energy_warning(report)
    assert "incident energies of real and generated showers differ" in line and "\n" not in line
    assert line in format_markdown(report)


def test_constant_and_missing_observables_do_not_break_the_report():
    rows = [RECORD] * 10
    report = compare_showers(observe(rows), observe(rows), splits=1, classifier=False)
    row = rows_of(report)["cog_z"]
    assert row["w1_raw"] == 0 and np.isnan(row["w1"]) and row["tv"] == 0
    high = compare_showers(observe(rows, start_threshold=9.0), observe(rows), splits=1, classifier=False)
    assert np.isnan(rows_of(high)["start_layer"]["w1"])
    assert "start_layer 10" in format_report(high)


def sample():
    rng = np.random.default_rng(0)
    labels = np.repeat([1, 0], [300, 200])
    return rng.normal(1.0 - labels, 1.0), labels


@pytest.mark.parametrize("by", ["class", "file"])
def test_metrics(by, tmp_path):
    import evaluate

    def load(kind, name):
        if by == "class":
            return kind()
        return evaluate.load(str(ROOM / f"metric_{name}.py"), cache_dir=str(tmp_path), experiment_id=name)

    values, labels = sample()
    found = load(SampleDistances, "sample_distances").compute(predictions=values, references=labels)
    a, b = values[labels == 1], values[labels == 0]
    assert found["wasserstein"] == pytest.approx(wasserstein(a, b))
    assert found["wasserstein_standardised"] == pytest.approx(wasserstein(a, b) / a.std())
    assert found["quantile_kl"] == pytest.approx(quantile_kl(a, b))
    features = np.stack([values, np.where(values > 2, np.nan, values**2)], axis=1)
    found = load(ClassifierAUC, "classifier_auc").compute(predictions=features, references=labels)
    wanted = two_sample_auc(features[labels == 1], features[labels == 0])
    assert (found["auc"], found["auc_error"]) == pytest.approx(wanted) and 0.65 < found["auc"] < 0.85


def test_hostile_metric_input():
    values, labels = sample()
    for metric, predictions in ((SampleDistances(), values), (ClassifierAUC(), values[:, None])):
        with pytest.raises(ValueError, match="reference 0 is 2, expected 1 .real. or 0"):
            metric.compute(predictions=predictions, references=np.full(500, 2))
    with pytest.raises(ValueError, match="the generated sample is empty"):
        SampleDistances().compute(predictions=values, references=np.ones(500, int))
    with pytest.raises(ValueError, match="at least 20 rows of each sample, got 5 and 495"):
        ClassifierAUC().compute(predictions=values[:, None], references=np.arange(500) < 5)
    with pytest.raises(ValueError, match="prediction 1 has 1 features, expected 2"):
        ClassifierAUC().compute(predictions=[[1.0, 2.0], [1.0]], references=[0, 1])
    with pytest.raises(ValueError, match="4 edges for 2 bins"):
        histogram_wasserstein([1, 2], [1, 2], [0, 1, 2, 3])
    with pytest.raises(ValueError, match="bins must be at least 2"):
        quantile_kl(values, values, bins=1)


def test_hostile_comparisons(real):
    with pytest.raises(ValueError, match="2 generated showers, at least 4"):
        compare_showers(real, observe(toy_showers(2, 1)))
    with pytest.raises(ValueError, match="no generated shower has a hit above 0.1 MeV"):
        compare_showers(real, observe([EMPTY] * 5))
    with pytest.raises(ValueError, match="different cuts: 0.1 and 0.3 MeV"):
        compare_showers(real, observe(toy_showers(30, 1), cut=0.3))
    with pytest.raises(ValueError, match="different grids"):
        compare_showers(real, observe(toy_showers(30, 1), grid=(30, 30, 40)))
    with pytest.raises(ValueError, match="splits must be at least 1"):
        compare_showers(real, real, splits=0)


def test_command_line(tmp_path, capsys):
    first = write_showers(tmp_path / "real.parquet", toy_showers(80, 10))
    (tmp_path / "gen").mkdir()
    write_showers(tmp_path / "gen" / "part.parquet", toy_showers(60, 11, 0.021))
    outputs = [str(tmp_path / "out" / name) for name in ("table.md", "report.json")]
    code = evaluate_showers.main(
        ["--real", first, "--generated", str(tmp_path / "gen"), "--energy_range", "20-90", "--cut", "0.15",
         "--energy_bins", "20,55,90", "--splits", "2", "--output", *outputs]
    )  # fmt: skip
    captured = capsys.readouterr()
    assert code == 0 and "visible / incident energy" in captured.out and "20 to 55" in captured.out
    assert all(f"report written to {path}" in captured.out for path in outputs)
    report = json.loads(Path(outputs[1]).read_text())
    assert report["cut"] == 0.15 and 0.4 < report["classifier"]["auc"] <= 1
    assert report["real"]["incident_energy_range"][0] >= 20 and report["real"]["showers"] < 80
    assert Path(outputs[0]).read_text().startswith("# Real and generated showers")


def test_command_line_warns_of_other_incident_energies(tmp_path, capsys):
    first = write_showers(tmp_path / "a.parquet", toy_showers(60, 12))
    second = write_showers(tmp_path / "b.parquet", toy_showers(60, 13, energy=(70, 100)))
    assert evaluate_showers.main(["--real", first, "--generated", second, "--no_classifier"]) == 0
    captured = capsys.readouterr()
    assert captured.err.count("warning: the incident energies") == 1 and "AUC" not in captured.out


def test_runs_as_a_file_and_shows_examples():
    for script in ("evaluate_showers", "plot_showers"):
        done = subprocess.run(
            [sys.executable, str(ROOM / f"{script}.py"), "--help"], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0 and "examples:" in done.stdout


def test_hostile_files(tmp_path, capsys):
    good = write_showers(tmp_path / "good.parquet", toy_showers(10, 1))
    bad = write_showers(tmp_path / "bad.parquet", [RECORD | {"energy": [1.0, -1.0, 1.0, 1.0]}])
    for arguments, message in (
        (["--real", good, "--generated", bad], "bad.parquet: row 0: energy[1] is -1.0"),
        (
            ["--real", good, "--generated", good],
            "at least 40 real and 20 generated showers, got 10 and 10; leave it out",
        ),
        (["--real", "nothing*", "--generated", good], "no Parquet file found at 'nothing*'"),
        (["--real", good, "--generated", good, "--energy_range", "200,300"], "no showers with 200 to 300 GeV"),
        (["--real", good, "--generated", good, "--grid", "10,30,30"], "expected an integer in 0..9"),
    ):
        output = tmp_path / "report.json"
        assert evaluate_showers.main([*arguments, "--output", str(output)]) == 2
        captured = capsys.readouterr()
        assert message in captured.err and len(captured.err.splitlines()) == 1
        assert not output.exists()


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--real", "a"],
        ["--real", "a", "--generated", "b", "--output", "table.txt"],
        ["--real", "a", "--generated", "b", "--energy_range", "50"],
        ["--real", "a", "--generated", "b", "--energy_range", "50,20"],
        ["--real", "a", "--generated", "b", "--cut", "-1"],
        ["--real", "a", "--generated", "b", "--cut", "nan"],
        ["--real", "a", "--generated", "b", "--grid", "30,30"],
        ["--real", "a", "--generated", "b", "--energy_bins", "1,x"],
        ["--real", "a", "--generated", "b", "--max_showers", "0"],
    ],
)
def test_hostile_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        evaluate_showers.main(arguments)
    assert error.value.code == 2
