"""The transfer study on tiny jets: runs, resuming, tables, fits; and what it refuses."""

import json

import numpy as np
import pytest
import torch

import hepzoo
from hepzoo.evaluation.plots_jets import TRANSFER, plot_transfer
from hepzoo.training import transfer_study
from hepzoo.training.transfer_study import FINE_TUNED, SCRATCH, fit_runs, format_fits, main, table_rows
from tests.training.jets import make_jets, write_jets

TINY = "hidden_size=16,num_hidden_layers=1,num_attention_heads=2,intermediate_size=16,embedding_initializer_range=0.1"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Several threads on tensors this small only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("transfer")
    for name, number, seed in (("a", 40, 1), ("b", 40, 2), ("validation", 10, 3), ("test", 16, 4)):
        write_jets(folder / f"{name}.parquet", make_jets(number, seed))
    config = hepzoo.OmniJetVQVAEConfig(
        codebook_size=16, latent_size=2, hidden_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    vqvae = hepzoo.OmniJetVQVAEModel(config)
    hepzoo.OmniJetTokenizer(vqvae=vqvae, model_max_length=24).save_pretrained(folder / "tokenizer")
    return folder


def arguments(folder, output, *extra: str) -> list[str]:
    flags = ["--train_file", "b", "--validation_file", "validation", "--test_file", "test"]
    flags = [flag if flag.startswith("--") else str(folder / f"{flag}.parquet") for flag in flags]
    if "--pretrained" not in extra:
        flags += ["--pretrain_file", str(folder / "a.parquet")]
    options = ["--model_type", "omnijet", "--tokenizer_name", str(folder / "tokenizer"), "--config_overrides", TINY]
    options += ["--max_steps", "3", "--per_device_train_batch_size", "8", "--learning_rate", "1e-2", "--use_cpu"]
    options += ["--dataloader_pin_memory", "false", "--cache_dir", str(folder / "cache"), "--disable_tqdm", "true"]
    return [*flags, "--jets", "10", "20", "--output", str(output), *options, *extra]


def test_study_runs_and_goes_on(files, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    trained = {}
    train = transfer_study.Study.train

    def spy(study, files, folder, *extra):
        trained[folder.name] = extra
        train(study, files, folder, *extra)

    monkeypatch.setattr(transfer_study.Study, "train", spy)
    assert main(arguments(files, tmp_path)) == 0
    assert list(trained) == ["pretrained", *(f"{m}_{n}_1" for n in (10, 20) for m in ("from_scratch", "fine-tuned"))]
    for name, extra in trained.items():
        starts = [extra[i + 1] for i, flag in enumerate(extra) if flag == "--model_name_or_path"]
        assert starts == ([str(tmp_path / "pretrained")] if name.startswith("fine-tuned") else [])
    out = capsys.readouterr().out
    assert "tokens alone" in out and "W1 ~ jets^-g" in out and (tmp_path / "transfer.png").stat().st_size > 10_000
    report = json.loads((tmp_path / "transfer.json").read_text())
    assert [(run["mode"], run["jets"]) for run in report["runs"]] == [
        (SCRATCH, 10), (FINE_TUNED, 10), (SCRATCH, 20), (FINE_TUNED, 20)
    ]  # fmt: skip
    for run in report["runs"]:
        assert set(run["distances"]) == {*TRANSFER, "mean"}
        assert run["distances"]["jet_pt"]["w1"] > 0
    # encoding and decoding keeps the number of constituents
    assert report["tokens"]["multiplicity"]["w1"] == 0
    # a second call trains what is missing only, and gives the same table
    trained.clear()
    (tmp_path / "fine-tuned_20_1" / transfer_study.RECORD).unlink()
    assert main(arguments(files, tmp_path)) == 0
    assert list(trained) == ["fine-tuned_20_1"]
    assert main(arguments(files, tmp_path, "--n_generated", "8")) == 2
    assert "holds a run with another n_generated" in capsys.readouterr().err


def test_pretrained_generator_brings_its_tokenizer(files, tmp_path, monkeypatch):
    trained = []

    def train(study, files, folder, *extra):
        trained.extend(extra)
        folder.mkdir()
        (folder / "all_results.json").write_text('{"train_samples": 10, "eval_loss": 1.0}')

    monkeypatch.setattr(transfer_study.Study, "train", train)
    monkeypatch.setattr(transfer_study.Study, "distances_of", lambda *args: {})
    flags = arguments(files, tmp_path, "--pretrained", "generator")
    place = flags.index("--tokenizer_name")
    parsed, options = transfer_study.build_parser().parse_known_args([*flags[:place], *flags[place + 2 :]])
    transfer_study.Study(parsed, options).run(SCRATCH, 10, 1)
    assert trained[trained.index("--tokenizer_name") + 1] == "generator" and "--model_name_or_path" not in trained


def made_up(exponents: dict[str, float]) -> dict:
    """A report whose distances follow power laws."""

    def part(w1: float) -> dict:
        return {name: {"w1": w1, "w1_floor": 0.01, "kl": 0.1, "kl_floor": 0.01} for name in (*TRANSFER, "mean")}

    runs = [
        {"mode": mode, "jets": jets, "seed": seed, "eval_loss": 1.0, "distances": part(3 * jets**-exponent)}
        for mode, exponent in exponents.items()
        for jets in (100, 1000, 10000)
        for seed in (1, 2)
    ]
    return {"runs": runs, "fits": fit_runs(runs), "pretrained": part(0.9), "tokens": part(0.02)}


def test_fits_and_tables():
    report = made_up({SCRATCH: 0.4, FINE_TUNED: 0.25})
    for mode, exponent in ((SCRATCH, 0.4), (FINE_TUNED, 0.25)):
        law = report["fits"][mode]["d2"]
        assert law["exponent"] == pytest.approx(exponent) and law["amplitude"] == pytest.approx(3)
        assert law["exponent_error"] == pytest.approx(0, abs=1e-6)
    rows = table_rows(report)
    assert [row["mode"] for row in rows] == ["tokens alone", "pre-trained", *[SCRATCH] * 3, *[FINE_TUNED] * 3, "floor"]
    assert rows[3]["seeds"] == 2 and rows[3]["tau21"] == pytest.approx(3 * 1000**-0.4)
    assert format_fits(report["fits"])[0]["mean"].startswith("0.40")
    one = [run for run in report["runs"] if run["jets"] == 100]
    assert fit_runs(one) == {}


def test_plot_with_and_without_fits(tmp_path):
    pytest.importorskip("matplotlib")
    report = made_up({SCRATCH: 0.4, FINE_TUNED: 0.25})
    assert plot_transfer(report, tmp_path / "a.png").stat().st_size > 10_000
    report["fits"] = {}
    figure = plot_transfer(report)
    lines = figure.axes[0].get_lines()
    assert any(np.allclose(line.get_ydata(), 0.9) for line in lines)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--jets", "0"], "--jets is 0, expected at least 1"),
        (["--seeds", "-1"], "--seeds is -1, expected at least 0"),
        (["--n_generated", "3"], "--n_generated is 3, expected at least 4"),
        (["--max_relative", "nan"], "--max_relative is nan, expected above 0"),
        (["--max_steps", "-1"], "--max_steps is not set"),
        (["--pretrained", "./no/where"], "no/where: no tokenizer that can be loaded"),
        (["--surprise", "1"], "arguments are not used"),
    ],
)
def test_hostile_options(files, tmp_path, capsys, extra, message):
    pytest.importorskip("matplotlib")
    assert main(arguments(files, tmp_path / "out", *extra)) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "out" / "transfer.json").exists()


def test_hostile_number_of_jets(files, tmp_path, monkeypatch):
    """More than there are would be reported as so many."""

    def train(study, files, folder, *extra):
        folder.mkdir()
        (folder / "all_results.json").write_text('{"train_samples": 40, "eval_loss": 1.0}')

    monkeypatch.setattr(transfer_study.Study, "train", train)
    parsed, options = transfer_study.build_parser().parse_known_args(arguments(files, tmp_path))
    with pytest.raises(ValueError, match="--jets 50: there are only 40 jets to train on"):
        transfer_study.Study(parsed, options).run(SCRATCH, 50, 1)
