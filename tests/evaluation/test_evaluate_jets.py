"""Distances of jets, token quality, the metrics, the commands and the pictures."""

import json
from pathlib import Path

import evaluate
import numpy as np
import pyarrow.parquet as pq
import pytest
from matplotlib.image import imread

import hepzoo.evaluation
from hepzoo.evaluation import evaluate_jets, plot_jets, plots_jets, token_quality
from hepzoo.evaluation.evaluate_jets import compare_jets, histogram_kl, jet_distances, published_quantile_kl
from hepzoo.evaluation.jets import CONSTITUENTS, OBSERVABLES, as_jets, observe
from hepzoo.evaluation.metric_quantile_kl import QuantileKL
from hepzoo.evaluation.metric_tagging import Tagging, percentile_rejection, tagging_metrics
from hepzoo.evaluation.roc import auc_score, rejection_at_efficiency
from hepzoo.evaluation.token_quality import codebook_usage, compare_tokens
from tests.evaluation.test_jets import cartesian, random_jets, table

FOLDER = Path(hepzoo.evaluation.__file__).parent


@pytest.fixture(scope="module")
def samples():
    """Two samples of the same kind and one of wider jets."""
    return [observe(random_jets(150, seed=s, width=w)) for s, w in ((1, 0.15), (2, 0.15), (3, 0.3))]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Real jets with labels, and the same reconstructed: cut, in relative coordinates, smeared, with codes."""
    folder = tmp_path_factory.mktemp("jets")
    columns = cartesian(random_jets(80, seed=4))
    label = np.arange(80) % 2
    pq.write_table(table(columns | {"label_QCD": 1 - label, "label_Tbqq": label}), folder / "real.parquet")
    jets = as_jets(columns).centered().cut(0.8, 40)
    rng = np.random.default_rng(0)
    smeared = {
        "part_pt": jets.pt * np.exp(rng.normal(0, 0.05, len(jets.pt))),
        "part_etarel": jets.eta + rng.normal(0, 0.01, len(jets.pt)),
        "part_phirel": jets.phi,
        "codes": rng.integers(0, 32, len(jets.pt)),
    }
    rows = {name: np.split(values, jets.offsets[1:-1]) for name, values in smeared.items()}
    pq.write_table(table(rows), folder / "reconstructed.parquet")
    return folder


# ---- distances


def test_published_divergences():
    rng = np.random.default_rng(0)
    real, same, other = rng.normal(0, 1, 20_000), rng.normal(0, 1, 20_000), rng.normal(1, 1, 20_000)
    edges = np.linspace(-4, 5, 60)
    functions = {
        "alpha": lambda a, b: published_quantile_kl(a, b, 50, "alpha"),
        "ntp": lambda a, b: published_quantile_kl(a, b, 50, "ntp"),
        "histogram": lambda a, b: histogram_kl(a, b, edges),
    }
    for name, function in functions.items():
        assert function(real, real) == pytest.approx(0, abs=1e-9)
        assert 0 < function(real, same) < 0.01
        # two unit Gaussians one apart have 0.5; "alpha" takes densities for probabilities
        assert function(real, other) == pytest.approx(0.25 if name == "alpha" else 0.5, abs=0.08)
    assert published_quantile_kl(real, real[real > 0], 50, "ntp") == np.inf
    counts = rng.poisson(20, 5000)
    assert np.isfinite(published_quantile_kl(counts, rng.poisson(20, 5000), 50, "alpha"))


def test_hostile_divergences():
    with pytest.raises(ValueError, match="unknown definition 'beta'"):
        published_quantile_kl([1.0], [1.0], definition="beta")
    with pytest.raises(ValueError, match="bins must be at least 3"):
        published_quantile_kl([1.0], [1.0], 2)
    with pytest.raises(ValueError, match="the generated sample: value 1 is nan"):
        published_quantile_kl([1.0, 2.0], [1.0, np.nan])
    with pytest.raises(ValueError, match="two rising numbers"):
        histogram_kl([1.0], [1.0], [2, 1])
    with pytest.raises(ValueError, match="no value of the generated sample is inside"):
        histogram_kl([1.0], [5.0], [0, 2])


def test_distances_see_the_width(samples):
    same, wide = (jet_distances(samples[0], o) for o in samples[1:])
    assert set(same) == {*OBSERVABLES, *CONSTITUENTS}
    for name in ("jet_mass", "tau3", "part_etarel"):
        assert wide[name]["w1"] > 2 * same[name]["w1"], name
        assert wide[name]["kl"] > same[name]["kl"], name
    assert wide["part_pt"]["w1"] < 0.3


def test_comparison_with_floors(samples):
    near, far = (compare_jets(samples[0], o, splits=4) for o in samples[1:])
    rows = [{row["observable"]: row for row in report["distances"]} for report in (near, far)]
    assert rows[0]["tau3"]["w1_over_floor"] < 3 < rows[1]["tau3"]["w1_over_floor"]
    assert abs(near["classifier"]["auc"] - 0.5) < 0.12 and far["classifier"]["auc"] > 0.75
    assert abs(far["classifier"]["floor"] - 0.5) < 0.15
    assert rows[0]["tau1"]["real_mean"] == pytest.approx(np.nanmean(samples[0].scalars["tau1"]))
    assert near["real"]["undefined"]["tau21"] == int(np.isnan(samples[0].scalars["tau21"]).sum())
    again = compare_jets(samples[0], samples[1], splits=4)
    assert evaluate_jets.format_report(again) == evaluate_jets.format_report(near)
    for text in (evaluate_jets.format_report(near), evaluate_jets.format_markdown(near)):
        assert "jet mass" in text and "AUC" in text and "150 jets" in text


def test_infinite_divergences_are_explained(samples):
    """12 jets leave bins of 50 empty."""
    few = compare_jets(samples[0], samples[1].select(np.arange(12)), splits=1, classifier=False)
    mass = next(row for row in few["distances"] if row["observable"] == "jet_mass")
    assert mass["kl_ntp"] == np.inf and np.isfinite([mass["kl"], mass["kl_alpha"]]).all()
    (note,) = (
        line for line in evaluate_jets.format_report(few).splitlines() if line.startswith("KL (NTP) is infinite")
    )
    assert "jet mass" in note and "half an entry" in note


def test_relative_coordinates_have_no_axis(samples):
    relative = observe(as_jets(random_jets(60, seed=9)).centered())
    found = jet_distances(samples[0], relative)
    assert np.isnan(found["jet_eta"]["w1"]) and np.isfinite(found["jet_mass"]["w1"])
    report = compare_jets(samples[0], relative, classifier=False)
    assert report["generated"]["undefined"]["jet_eta"] == 60


def test_hostile_comparisons(samples):
    few = samples[0].select(np.arange(3))
    with pytest.raises(ValueError, match="3 generated jets, at least 4"):
        compare_jets(samples[0], few)
    with pytest.raises(ValueError, match="splits must be at least 1"):
        compare_jets(samples[0], samples[1], splits=0)
    with pytest.raises(ValueError, match="leave it out by --no_classifier"):
        compare_jets(samples[0], samples[1].select(np.arange(10)))
    empty = observe([{"part_pt": [], "part_eta": [], "part_phi": []}] * 5)
    with pytest.raises(ValueError, match="no generated jet has a constituent"):
        compare_jets(samples[0], empty)


# ---- tokens


def test_perfect_tokens_change_nothing():
    jets = as_jets(random_jets(30))
    report = compare_tokens(jets, jets)
    for row in report["resolution"]:
        assert row["entries"] > 0 and row["mean_abs"] == 0 and row["median"] == 0
    assert "codebook" not in report


def test_residuals_measure_the_smearing():
    jets = as_jets(random_jets(100, seed=3))
    rng = np.random.default_rng(1)
    smeared = as_jets(
        {
            name: np.split(values, jets.offsets[1:-1])
            for name, values in (
                ("part_pt", jets.pt * 1.02),
                ("part_eta", jets.eta + rng.normal(0, 0.01, len(jets.eta))),
                ("part_phi", jets.phi),
            )
        }
    )
    rows = {row["quantity"]: row for row in compare_tokens(jets, smeared)["resolution"]}
    assert rows["part_pt/"]["median"] == pytest.approx(0.02) and rows["part_pt/"]["iqr"] == pytest.approx(0, abs=1e-9)
    assert rows["part_etarel"]["iqr"] == pytest.approx(1.349 * 0.01, rel=0.1)
    assert rows["part_phirel"]["mean_abs"] == pytest.approx(0, abs=1e-12)
    assert rows["jet_pt/"]["median"] == pytest.approx(0.02, abs=1e-3)
    assert 0 < rows["jet_mass/"]["mean_abs"] < 0.1


def test_codebook_usage():
    even = codebook_usage(np.repeat(np.arange(8), 10), 16)
    assert even["used"] == 8 and even["utilisation"] == 0.5 and even["perplexity"] == pytest.approx(8)
    assert codebook_usage([3, 3, 3], 4)["perplexity"] == pytest.approx(1)


def test_hostile_tokens():
    jets = as_jets(random_jets(10))
    with pytest.raises(ValueError, match="10 original and 9 reconstructed jets"):
        compare_tokens(jets, jets.select(np.arange(9)))
    with pytest.raises(ValueError, match=r"jet \d+: \d+ original and \d+ reconstructed constituents"):
        compare_tokens(jets, jets.cut(max_constituents=5))
    with pytest.raises(ValueError, match="needed together"):
        compare_tokens(jets, jets, codes=np.zeros(3))
    with pytest.raises(ValueError, match="code 1 is 16, expected an integer in 0..15"):
        codebook_usage([0, 16], 16)
    with pytest.raises(ValueError, match="no codes"):
        codebook_usage([], 16)


# ---- metrics


def load(name: str, folder: Path):
    return evaluate.load(str(FOLDER / f"metric_{name}.py"), cache_dir=str(folder))


@pytest.mark.parametrize("by", ["class", "file"])
def test_quantile_kl_metric(by, tmp_path):
    metric = QuantileKL() if by == "class" else load("quantile_kl", tmp_path)
    rng = np.random.default_rng(0)
    real, generated = rng.normal(0, 1, 3000), rng.normal(0.2, 1, 2000)
    found = metric.compute(predictions=np.r_[real, generated], references=np.r_[np.ones(3000), np.zeros(2000)], bins=30)
    assert found["quantile_kl_alpha"] == pytest.approx(published_quantile_kl(real, generated, 30, "alpha"))
    assert found["quantile_kl_ntp"] == pytest.approx(published_quantile_kl(real, generated, 30, "ntp"))
    assert 0 < found["quantile_kl"] < 0.1


@pytest.mark.parametrize("by", ["class", "file"])
def test_tagging_metric(by, tmp_path):
    metric = Tagging() if by == "class" else load("tagging", tmp_path)
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 3000)
    logits = rng.normal(0, 1, (3000, 3)) + 2 * np.eye(3)[labels]
    found = metric.compute(predictions=logits, references=labels, logits=True, names=["QCD", "Hbb", "Tbqq"])
    assert found["accuracy"] == pytest.approx(np.mean(logits.argmax(axis=1) == labels))
    score = logits[:, 2] - logits[:, 0]  # rises with p_s / (p_s + p_QCD)
    signal, background = score[labels == 2], score[labels == 0]
    assert found["auc_Tbqq"] == pytest.approx(auc_score(signal, background))
    published, near = found["rejection_at_0.5_Tbqq"], rejection_at_efficiency(signal, background, 0.5)["rejection"]
    assert published == pytest.approx(near, rel=0.05)
    assert set(found) == {"accuracy"} | {
        f"{figure}_{name}" for figure in ("auc", "rejection_at_0.3", "rejection_at_0.5") for name in ("Hbb", "Tbqq")
    }


def test_two_classes_and_certain_jets():
    found = tagging_metrics([[1, 0], [0.9, 0.1], [0, 1], [0.2, 0.8]], [0, 0, 1, 1])
    assert found == {"accuracy": 1, "auc": 1, "rejection_at_0.3": np.inf, "rejection_at_0.5": np.inf}
    assert percentile_rejection(np.array([0.0, 1.0]), np.array([0.2, 0.6]), 0.5) == (2.0, 0.5)


@pytest.mark.parametrize(
    ("probabilities", "labels", "message"),
    [
        ([[0.5, np.nan], [1, 0]], [0, 1], "jet 0: probability of class 1 is nan"),
        ([[0.5, 0.5], [-1, 2]], [0, 1], "jet 1: probability of class 0 is -1"),
        ([[0.5, 0.5], [1, 0]], [0, 2], "jet 1: label 2, expected a class of 0..1"),
        ([[0.5, 0.5], [1, 0]], [1, 1], "expected background and signal"),
        ([0.5, 0.5], [1, 0], r"expected probabilities \(jets, classes\)"),
    ],
)
def test_hostile_tagging(probabilities, labels, message):
    with pytest.raises(ValueError, match=message):
        tagging_metrics(probabilities, labels)


# ---- commands and pictures


def test_evaluate_jets_command(files, tmp_path, capsys):
    arguments = ["--real", str(files / "real.parquet"), "--generated", str(files / "reconstructed.parquet")]
    outputs = [str(tmp_path / f"report.{ending}") for ending in ("json", "md", "csv")]
    assert evaluate_jets.main([*arguments, "--max_relative", "0.8", "--splits", "2", "--output", *outputs]) == 0
    assert "jet mass" in capsys.readouterr().out
    report = json.loads(Path(outputs[0]).read_text())
    assert report["real"]["classes"] == {"QCD": 40, "Tbqq": 40} and len(report["distances"]) == 15
    assert Path(outputs[1]).read_text().startswith("# Real and generated jets")
    assert len(Path(outputs[2]).read_text().splitlines()) == 16
    chosen = [*arguments, "--classes", "Tbqq", "--no_classifier", "--axes", "WTA_pt", "--published_axes"]
    assert evaluate_jets.main(chosen) == 0
    assert "real: 40 jets (Tbqq 40)" in capsys.readouterr().out


def test_evaluate_tokens_command(files, tmp_path, capsys):
    arguments = ["--original", str(files / "real.parquet"), "--reconstructed", str(files / "reconstructed.parquet")]
    cuts = ["--max_relative", "0.8", "--max_constituents", "40"]
    output = tmp_path / "tokens.json"
    size = ["--codebook_size", "64"]
    assert token_quality.main([*arguments, *cuts, *size, "--per_class", "--output", str(output)]) == 0
    report = json.loads(output.read_text())
    assert {row["class"] for row in report["resolution"]} == {"all", "QCD", "Tbqq"}
    assert report["codebook"]["used"] == 32 and report["codebook"]["utilisation"] == 0.5
    rows = {row["quantity"]: row for row in report["resolution"] if row["class"] == "all"}
    assert rows["part_pt/"]["iqr"] == pytest.approx(1.349 * 0.05, rel=0.1)
    assert rows["part_phirel"]["mean_abs"] < 1e-9
    capsys.readouterr()
    assert token_quality.main([*arguments, *cuts]) == 2
    assert "give --codebook_size" in capsys.readouterr().err
    assert token_quality.main([*arguments, *size]) == 2
    assert "cut the original jets as the tokenizer did" in capsys.readouterr().err


def test_plot_command(files, tmp_path, capsys):
    arguments = ["--real", str(files / "real.parquet"), "--generated", str(files / "reconstructed.parquet")]
    arguments += ["--max_relative", "0.8", "--max_constituents", "40", "--output", str(tmp_path)]
    kinds = ["overview", "observables", "image", "residuals"]
    assert plot_jets.main([*arguments, "--kind", *kinds, "--observables", "jet_mass", "part_pt"]) == 0
    names = {path.stem for path in tmp_path.iterdir()}
    assert names == {"overview", "jet_mass", "part_pt", "image", "residuals"}
    for path in tmp_path.iterdir():
        picture = imread(path)
        assert picture.shape[0] > 300 and picture[..., :3].std() > 0.02, path
    assert plot_jets.main([*arguments, "--kind", "observables", "--observables", "jet_eta"]) == 2
    assert "no generated jet has this observable" in capsys.readouterr().err
    assert plot_jets.main([*arguments, "--kind", "residuals", "--classes", "QCD"]) == 2
    assert "leave --classes out" in capsys.readouterr().err


def test_jet_image_holds_the_momentum(samples):
    image = plots_jets.jet_image(samples[0], cells=20, reach=3.0)
    shares = samples[0].constituents["part_ptrel"].sum() / len(samples[0])
    assert image.sum() == pytest.approx(shares)


@pytest.mark.parametrize("main", [evaluate_jets.main, token_quality.main])
def test_hostile_command_lines(main, tmp_path, capsys):
    names = ("--original", "--reconstructed") if main is token_quality.main else ("--real", "--generated")
    arguments = [names[0], str(tmp_path / "a.parquet"), names[1], str(tmp_path / "b.parquet")]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "no Parquet file found" in error and error.count("\n") == 1
    for wrong in (["--output", "table.txt"], ["--max_jets", "0"], ["--max_relative", "-1"]):
        with pytest.raises(SystemExit) as stop:
            main([*arguments, *wrong])
        assert stop.value.code == 2
