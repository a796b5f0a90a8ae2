"""The comparison of pre-training objectives, tiny: runs, tables, plot, continuation, malformed options."""

import json

import numpy as np
import pytest

from hepzoo.training import compare_pretraining
from hepzoo.training.compare_pretraining import balanced_choice, mean_and_error, read_jets, split_sample
from tests.training.jets import make_jets, write_jets

TINY = "hidden_size=16,num_hidden_layers=1,num_attention_heads=2,num_head_layers=1,num_neighbors=3"
STEPS = "--pretraining_steps 3 --finetuning_steps 6 --finetuning_epochs 8 --generation_steps 3 --batch_size 32"
SIZES = "--num_validation 20 --num_test 80 --generation_jets 40 --num_generated 40 --num_inference_steps 2"


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    folder = tmp_path_factory.mktemp("comparison")
    first = write_jets(folder / "first.parquet", make_jets(96, seed=1))
    second = write_jets(folder / "second.parquet", make_jets(200, seed=2))
    files = ["--pretraining_file", first, "--finetuning_file", second, "--output", str(folder / "out")]
    flags = f"--size micro --config_overrides {TINY} --max_num_particles 16 --cpu {STEPS} {SIZES}"
    return [*files, *flags.split(), "--starts", "scratch", "flow"]


@pytest.fixture(scope="module")
def report(options):
    assert compare_pretraining.main([*options, "--labels", "20", "--seeds", "1", "2"]) == 0
    return json.loads((out_folder(options) / "results.json").read_text())


def out_folder(options):
    from pathlib import Path

    return Path(options[options.index("--output") + 1])


def test_every_run_is_there_and_sums_up(options, report):
    runs = report["runs"]
    assert len(runs) == 1 + 2 * 2 + 2 * 2
    assert "pretraining-scratch" not in runs and runs["pretraining-flow"]["parameters"] > 1000
    row = next(row for row in report["tagging"] if row["pre-training"] == "flow")
    values = [runs[f"tagging-flow-20-{seed}"]["auc"] for seed in (1, 2)]
    assert row["auc_20"] == pytest.approx([np.mean(values), np.std(values, ddof=1), 2])
    assert values[0] != values[1], "seeds draw other labels"
    row = next(row for row in report["generation"] if row["pre-training"] == "scratch")
    ratios = [runs["generation-scratch-1"][f"ratio_{name}"] for name in compare_pretraining.GENERATED]
    assert runs["generation-scratch-1"]["ratio"] == pytest.approx(np.exp(np.mean(np.log(ratios))))
    assert row["w1_jet_mass"][2] == 2
    assert (out_folder(options) / "results.png").stat().st_size > 1000
    assert not (out_folder(options) / "scratch").exists()


def test_the_study_goes_on_with_what_is_missing(options, report, monkeypatch, capsys):
    made = []

    def record(name, *args):
        made.append((name, args[-2], args[-1]))
        return {"auc": 0.5, "rejection_at_0.3": 2.0}

    monkeypatch.setattr(compare_pretraining, "run_tagging", record)
    (out_folder(options) / "runs" / "tagging-flow-20-1.json").unlink()
    more = ["--labels", "20", "60", "--seeds", "1", "2", "--skip_generation"]
    assert compare_pretraining.main([*options, *more]) == 0
    expected = {("flow", 20, 1)} | {(name, 60, seed) for name in ("scratch", "flow") for seed in (1, 2)}
    assert set(made) == expected and len(made) == len(expected)
    text = capsys.readouterr().out
    assert "scratch" in text and "60 labels" in text and "±" in text


def test_labels_are_drawn_evenly_and_parts_do_not_overlap(options):
    from hepzoo.tokenization.feature_extraction_omnilearned import OmniLearnedFeatureExtractor

    extractor = OmniLearnedFeatureExtractor(label_names=["label_QCD", "label_Tbqq"])
    sample = read_jets([options[3]], "finetuning_file", extractor, None)
    parts = split_sample(sample, [20, 80])
    assert [len(part) for part in parts] == [20, 80, 100]
    # pT of the jets tells them apart
    pt = [set(part.rows["jet_pt"]) for part in parts]
    assert not pt[0] & pt[1] and not pt[1] & pt[2] and not pt[0] & pt[2]
    chosen = balanced_choice(parts[2], 31, seed=1)
    classes = [int(jet["class_ids"]) for jet in chosen.jets]
    assert sorted((classes.count(0), classes.count(1))) == [15, 16]
    assert chosen.rows["jet_pt"] == balanced_choice(parts[2], 31, seed=1).rows["jet_pt"]
    assert chosen.rows["jet_pt"] != balanced_choice(parts[2], 31, seed=2).rows["jet_pt"]
    assert len(read_jets([options[3]], "finetuning_file", extractor, 50)) == 50


def test_mean_and_error():
    assert mean_and_error([]) is None
    assert mean_and_error([1.0, 3.0]) == pytest.approx([2.0, np.sqrt(2), 2])
    assert mean_and_error([1.0])[0] == 1.0 and np.isnan(mean_and_error([1.0])[1])


@pytest.mark.parametrize(
    "extra, expected",
    [
        (["--starts", "supervised"], "--starts: 'supervised'"),
        (["--labels", "0"], "--labels: 0"),
        (["--learning_rate", "0"], "--learning_rate is 0.0"),
        (["--classes", "label_QCD", "label_QCD"], "twice"),
        (["--batch_size", "16"], "batch_size 32 -> 16"),
        (["--size", "tiny"], "size 'micro' -> 'tiny'"),
    ],
)
def test_hostile_options(options, report, capsys, extra, expected):
    assert compare_pretraining.main([*options, *extra]) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1 and expected in error


def test_hostile_data(options, tmp_path, capsys):
    files = options[options.index("--size") :]
    rows = make_jets(30)
    rows["part_energy"][4][0] = float("inf")
    bad = write_jets(tmp_path / "bad.parquet", rows)
    (tmp_path / "text.parquet").write_text("no table")
    cases = (
        (bad, options[3], "--pretraining_file: row 4: part_energy[0] = inf"),
        (options[1], str(tmp_path / "text.parquet"), "--finetuning_file"),
        (options[1], options[1], "--finetuning_file: 96 jets, expected more than 100"),
    )
    for case, (first, second, expected) in enumerate(cases):
        where = ["--pretraining_file", first, "--finetuning_file", second, "--output", str(tmp_path / str(case))]
        assert compare_pretraining.main([*where, *files]) == 2
        assert expected in capsys.readouterr().err


def test_masked_particles_start_at_their_medians(options, tmp_path, monkeypatch):
    from hepzoo.tokenization.feature_extraction_omnilearned import OmniLearnedFeatureExtractor

    arguments = compare_pretraining.build_parser().parse_args(options)
    extractor = OmniLearnedFeatureExtractor(max_num_particles=16)
    sample = read_jets(arguments.pretraining_file, "pretraining_file", extractor, None)
    starts = []

    def untrained(model, *args, **kwargs):
        starts.append(model.masked_head.out)
        return {}

    monkeypatch.setattr(compare_pretraining, "train", untrained)
    for name in ("masked", "all"):
        compare_pretraining.run_pretraining(name, arguments, extractor, sample, tmp_path / name)
    particles = np.concatenate([jet["particles"] for jet in sample.jets])
    for layer in starts:
        assert layer.weight.abs().max() == 0
        # of an even number the lower of the middle ones
        np.testing.assert_allclose(layer.bias.detach(), np.median(particles, axis=0), atol=5e-3)
