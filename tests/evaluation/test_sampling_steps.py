"""The table of solvers and steps: a flow whose solution is known, a saved model, the command and its picture."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from hepzoo import EpicFMConfig, EpicFMForGeneration
from hepzoo.evaluation import sampling_steps
from hepzoo.evaluation.jets import observe
from hepzoo.evaluation.sampling_steps import Generator, compare_settings, distances, floors
from hepzoo.tokenization.feature_extraction_epic_fm import EpicFMFeatureExtractor
from tests.evaluation.test_evaluate_sets import make_columns
from tests.evaluation.test_jets import random_jets, table

LABELS = ["label_QCD", "label_Tbqq"]
SIZES = {"hidden_size": 12, "latent_size": 4, "num_hidden_layers": 1, "num_frequencies": 4, "max_num_particles": 25}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder with a small untrained model and its feature extractor, and one with jets."""
    import pyarrow.parquet as pq

    folder = tmp_path_factory.mktemp("steps")
    columns = make_columns(60, 1)
    extractor = EpicFMFeatureExtractor(label_names=LABELS, max_num_particles=25, max_abs_etarel=5.0)
    extractor.fit(columns).save_pretrained(folder / "model")
    torch.manual_seed(0)
    model = EpicFMForGeneration(EpicFMConfig(num_classes=2, **SIZES))
    model.save_pretrained(folder / "model")
    pq.write_table(table(columns), folder / "jets.parquet")
    return folder


class Rotation:
    """In place of a model: real jets that are rotated to and fro, with an error that falls with the evaluations."""

    def __init__(self, real, calls=None):
        self.real, self.names = real, ["jet_mass", "part_etarel"]

    def generate(self, solver, setting):
        if solver == "rk4":
            raise ValueError("no solution")
        evaluations = setting * {"euler": 1, "midpoint": 2}[solver]
        error = 1 / setting ** {"euler": 1, "midpoint": 2}[solver]
        scalars = self.real.scalars | {"jet_mass": self.real.scalars["jet_mass"] * (1 + error)}
        etarel = self.real.constituents | {"part_etarel": self.real.constituents["part_etarel"] * (1 + error)}
        jets = type(self.real)(scalars, etarel, self.real.offsets, self.real.label)
        return jets, evaluations, 0.1


def test_rule_finds_the_cheapest():
    generator = Rotation(observe(random_jets(100)))
    settings = [("euler", 4), ("euler", 100), ("midpoint", 4), ("midpoint", 32), ("midpoint", 64), ("rk4", 4)]
    report = compare_settings(generator, settings, ("midpoint", 64), splits=10)
    assert len(report["rows"]) == 6 and report["rows"][0]["reference"]
    rows = {(row["solver"], row["setting"]): row for row in report["rows"]}
    assert rows["midpoint", 64]["worst_change"] == 0 and rows["midpoint", 64]["worst_name"] == "-"
    assert rows["euler", 4]["passes"] == "no" and rows["midpoint", 32]["passes"] == "yes"
    assert rows["rk4", 4]["passes"] == "no jets" and rows["rk4", 4]["error"] == "no solution"
    # every setting that is cheaper than the one that was found changes something by more than its limit
    best = report["rows"][report["cheapest"]]
    for row in report["rows"]:
        if row.get("evaluations", np.inf) < best["evaluations"]:
            assert any(row["change"][name] > limit for name, limit in report["limits"].items())
    # the change of a scale by e is e times the mean over the standard deviation
    mass = generator.real.values("jet_mass")
    reference, error = 1 + 1 / 64**2, 1 / 4 - 1 / 64**2
    assert reference > 1 and rows["euler", 4]["change"]["jet_mass"] == pytest.approx(error * mass.mean() / mass.std())
    text, markdown = sampling_steps.format_report(report), sampling_steps.format_markdown(report)
    for output in (text, markdown):
        assert "(reference)" in output and "rk4 4: no jets (no solution)" in output and "real to real" in output
    assert "Cheapest that cannot be told from midpoint with 64" in text


def test_floors_are_those_of_samples_of_full_size():
    sample, other = observe(random_jets(300, seed=1)), observe(random_jets(300, seed=2))
    stds = {name: sample.values(name).std() for name in ("jet_pt", "jet_mass", "multiplicity")}
    found = floors(sample, stds, 10, np.random.default_rng(0))
    real = distances(sample, other, stds)
    for name, (mean, std) in found.items():
        assert 0 < std < mean and mean / 4 < real[name] < mean + 6 * std, name


def test_real_jets_go_the_way_of_generated_ones(saved):
    model, extractor = sampling_steps.load_generator(str(saved / "model"))
    rows = sampling_steps.read_rows([str(saved / "jets.parquet")], 40, seed=0)
    generator = Generator(model, extractor, rows)
    assert len(generator.real) == 40 and {"part_d0val", "part_charge"} <= set(generator.names)
    kept = extractor(rows)["attention_mask"].sum(axis=1)
    np.testing.assert_array_equal(generator.real.scalars["multiplicity"], kept)
    first, calls, seconds = generator.generate("midpoint", 3)
    again, _, _ = generator.generate("midpoint", 3)
    assert calls == 6 and seconds >= 0
    np.testing.assert_array_equal(first.scalars["multiplicity"], generator.real.scalars["multiplicity"])
    np.testing.assert_array_equal(first.scalars["jet_mass"], again.scalars["jet_mass"])
    # more steps come closer to the solution
    exact, _, _ = generator.generate("rk4", 30)
    errors = [
        np.abs(generator.generate(*setting)[0].constituents["part_etarel"] - exact.constituents["part_etarel"]).mean()
        for setting in (("euler", 3), ("midpoint", 3), ("midpoint", 12), ("dopri5", 1e-5))
    ]
    assert errors[0] > errors[1] > errors[2] > errors[3]


def test_command(saved, tmp_path, capsys):
    outputs = [str(tmp_path / f"steps.{ending}") for ending in ("json", "md", "png")]
    arguments = ["--model", str(saved / "model"), "--real", str(saved / "jets.parquet"), "--n_jets", "30"]
    few = ["--steps", "2", "8", "--tolerances", "0.01", "--reference", "midpoint:8", "--max_evaluations", "16"]
    assert sampling_steps.main([*arguments, *few, "--splits", "4", "--output", *outputs]) == 0
    assert "network calls" in capsys.readouterr().out
    report = json.loads(Path(outputs[0]).read_text())
    settings = {(row["solver"], row["setting"]) for row in report["rows"]}
    # rk4 with 8 steps would take 32 calls
    assert settings == {
        ("euler", 2), ("euler", 8), ("midpoint", 2), ("midpoint", 8), ("rk4", 2), ("dopri5", 0.01),
    }  # fmt: skip
    assert Path(outputs[1]).read_text().startswith("# Steps of the solver")
    assert imread(outputs[2])[..., :3].std() > 0.02


def test_hostile_command(saved, tmp_path, capsys):
    arguments = ["--model", str(saved / "model"), "--real", str(saved / "jets.parquet")]
    assert sampling_steps.main(arguments) == 2
    assert "60 real jets, 1000 were asked for" in capsys.readouterr().err
    assert sampling_steps.main([*arguments, "--n_jets", "10"]) == 2
    assert "at least 20 and 2 are needed" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert sampling_steps.main(["--model", str(tmp_path / "empty"), *arguments[2:]]) == 2
    error = capsys.readouterr().err
    assert str(tmp_path / "empty") in error and error.count("\n") == 1
    for wrong in (
        ["--reference", "midpoint"],
        ["--reference", "heun:3"],
        ["--reference", "euler:0"],
        ["--tolerances", "0"],
        ["--steps", "-1"],
        ["--output", "steps.txt"],
    ):
        with pytest.raises(SystemExit) as stop:
            sampling_steps.main([*arguments, *wrong])
        assert stop.value.code == 2


def test_hostile_settings():
    with pytest.raises(ValueError, match="reference rk4 4: no solution"):
        compare_settings(Rotation(observe(random_jets(30))), [], ("rk4", 4))
    with pytest.raises(ValueError, match="1 splits, at least 20 and 2"):
        compare_settings(Rotation(observe(random_jets(30))), [], ("euler", 4), splits=1)
