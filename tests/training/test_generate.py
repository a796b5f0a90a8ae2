"""Fast simulation by `hepzoo generate`: what is in the files, sampling, restarts, several processes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset

import hepzoo
from hepzoo.data_scripts.convert_fm4dirc import load_fm4dirc
from hepzoo.data_scripts.dirc_schema import DIRC_FEATURES, DIRC_NOISE_FEATURES
from hepzoo.training import generate

SCRIPT = Path(__file__).resolve().parents[2] / "training" / "generate.py"
PUSH = 100.0  # the size of a bias that outweighs everything in the residual stream
MAX_PHOTONS = 30


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build_model(num_experts: int = 0, end_probability: float = 1 / 13, sharpness: float = 1.0):
    """
    Random weights, but: the pion's expert puts photons into channels 0..3071, the kaon's into 3072..6143; a track ends
    with `end_probability` after each photon (0: it is cut at MAX_PHOTONS).
    """
    torch.manual_seed(7)
    config = hepzoo.CMHCADircConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=MAX_PHOTONS,
        num_experts=num_experts,
    )
    model = hepzoo.CMHCADircForCausalLM(config).eval()
    side = torch.ones(config.vocab_size)
    side[1 + 3072 :] = -1
    with torch.no_grad():
        mlp = model.model.layers[-1].mlp
        for index, expert in enumerate(mlp.experts if num_experts else [mlp]):
            expert.fc2.bias[0] = PUSH if index < max(num_experts, 1) / 2 else -PUSH
        hidden = model.model.norm(PUSH * torch.eye(16)[:1])[0, 0]  # of the first component, close to sqrt(15)
        for head in (model.space_head, model.time_head):
            head.weight.mul_(sharpness)
            head.weight[:, 0] = 0
            head.bias.zero_()
            head.weight[-2] = 0
            head.bias[-2] = -1000.0
        model.space_head.weight[:, 0] = side * 10 / hidden
        model.space_head.weight[-2] = 0
        if end_probability > 0:
            probability = torch.tensor(end_probability)
            model.space_head.bias[-2] = 10 + torch.log(3072 * probability / (1 - probability))
    return model


def save(model, folder) -> str:
    model.save_pretrained(folder)
    hepzoo.CMHCADircTokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("generators")
    return {
        "experts": save(build_model(num_experts=2), folder / "experts"),
        "dense": save(build_model(), folder / "dense"),
        "endless": save(build_model(end_probability=0, sharpness=8.0), folder / "endless"),
    }


def run(output: Path, *flags: str) -> Path:
    assert generate.main(["--cpu", "--output", str(output), *map(str, flags)]) == 0
    return output


def read(folder: Path) -> Dataset:
    return Dataset.from_parquet([str(path) for path in sorted(folder.glob("*.parquet"))])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# ---------------------------------------------------------------------------------------------------------------------
# What is in the files
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "pions"), [("MixPiK", 19), ("Pion", 37), ("Kaon", 0)])
def test_exactly_the_tracks_asked_for(models, tmp_path, method, pions):
    flags = ["--n_tracks", "37", "--n_dump", "16", "--batch_size", "7", "--momentum", "2-3.5", "--theta", "40-50"]
    folder = run(tmp_path / "out", "--model", models["experts"], "--method", method, *flags)
    names = [path.name for path in sorted(folder.glob("*.parquet"))]
    assert names == [f"generated-{index:05d}-of-00003.parquet" for index in range(3)]
    assert sorted(path.name for path in folder.iterdir()) == sorted(["generation.json", *names])
    tracks = read(folder)
    assert tracks.features == DIRC_FEATURES
    assert tracks.num_rows == 37
    tracks = tracks.with_format("numpy")
    assert (tracks["PDG"][:] == 211).sum() == pions and (tracks["PDG"][:] == 321).sum() == 37 - pions
    momentum, theta = tracks["P"][:], tracks["Theta"][:]
    assert 2 <= momentum.min() < momentum.max() <= 3.5 and 40 <= theta.min() < theta.max() <= 50
    assert len(set(momentum.tolist())) == 37  # drawn for every track
    assert not tracks["Phi"][:].any()
    for track in tracks:
        assert 5 <= track["NHits"] <= MAX_PHOTONS
        for name in ("pmtID", "pixelID", "channel", "leadTime", "x", "y"):
            assert len(track[name]) == track["NHits"]
        assert (track["channel"] == track["pmtID"] * 256 + track["pixelID"]).all()
        assert ((track["channel"] < 3072) == (track["PDG"] == 211)).all()  # the expert of the species
        assert (track["leadTime"] >= 9).all() and (track["leadTime"] < 157).all()
    detector = hepzoo.CMHCADircTokenizer().detector
    x, y = detector.pixel_center(track["pmtID"], track["pixelID"])
    np.testing.assert_allclose(track["x"], x, rtol=1e-6)
    np.testing.assert_allclose(track["y"], y, rtol=1e-6)
    # generated tracks can be encoded again
    assert len(hepzoo.CMHCADircTokenizer()(tracks[:10])["input_ids"]) == 10


def test_yield_follows_the_end_probability(models, tmp_path):
    folder = run(
        tmp_path / "out",
        *["--model", models["dense"], "--method", "Pion", "--n_tracks", "200", "--min_hits", "1"],
        # the end has the probability of the model at temperature 1 only
        *["--temperature", "1"],
    )
    hits = np.asarray(read(folder)["NHits"][:])
    probability, lengths = 1 / 13, np.arange(1, MAX_PHOTONS + 1)
    weights = (1 - probability) ** lengths * np.where(lengths < MAX_PHOTONS, probability, 1)
    expected = (lengths * weights).sum() / weights.sum()
    assert abs(hits.mean() - expected) < 4 * hits.std() / np.sqrt(len(hits))


def test_fixed_kinematics(models, tmp_path):
    flags = ["--method", "Pion", "--n_tracks", "5", "--momentum", "6", "--theta", "30.5"]
    tracks = read(run(tmp_path / "out", "--model", models["dense"], *flags))
    assert set(tracks["P"][:]) == {6.0} and set(tracks["Theta"][:]) == {30.5}


def test_two_dense_models_serve_the_mixture(models, tmp_path):
    flags = ["--pion_model", models["dense"], "--kaon_model", models["endless"], "--n_tracks", "12"]
    tracks = read(run(tmp_path / "out", *flags)).with_format("numpy")
    assert sorted(tracks["PDG"][:].tolist()) == [211] * 6 + [321] * 6
    assert (tracks["NHits"][:][tracks["PDG"][:] == 321] == MAX_PHOTONS).all()


def test_limits_of_the_photon_yield(models, tmp_path):
    flags = ["--method", "Pion", "--n_tracks", "40", "--min_hits", "8", "--max_hits", "12"]
    hits = np.asarray(read(run(tmp_path / "out", "--model", models["dense"], *flags))["NHits"][:])
    assert len(hits) == 40 and hits.min() >= 8 and hits.max() <= 12


def test_dark_noise(models, tmp_path):
    flags = ["--method", "Pion", "--n_tracks", "90", "--batch_size", "90"]
    quiet = read(run(tmp_path / "quiet", "--model", models["dense"], *flags)).with_format("numpy")
    noisy = read(run(tmp_path / "noisy", "--model", models["dense"], "--dark_noise", *flags))
    assert noisy.features == DIRC_NOISE_FEATURES
    noisy = noisy.with_format("numpy")
    noise_hits = 0
    for before, after in zip(quiet, noisy):
        noise = after["is_noise"] == 1
        noise_hits += noise.sum()
        assert (after["channel"] == after["pmtID"] * 256 + after["pixelID"]).all()
        assert after["NHits"] == len(after["channel"]) == before["NHits"] + noise.sum()
        assert (after["channel"][~noise] == before["channel"]).all()
        assert (after["leadTime"][noise] < 100).all()
    # 24 photosensors of 28 kHz in 100 ns: 6.05 are expected
    assert 1 <= noise_hits <= 20


# ---------------------------------------------------------------------------------------------------------------------
# Sampling
# ---------------------------------------------------------------------------------------------------------------------


def sampled(models, folder: Path, *flags: str) -> Dataset:
    common = ["--model", models["endless"], *["--method", "Pion", "--n_tracks", "8", "--theta", "90", "--bin_centres"]]
    return read(run(folder, *common, *flags))


def test_sampling_modes(models, tmp_path):
    """One model, one seed: what every mode must have in common with, or different from, another."""
    modes = {
        "greedy": "--sampling Greedy",
        "top1": "--sampling TopK --topK 1",
        "nucleus0": "--sampling Nucleus --nucleus_p 1e-9",
        "top5": "--sampling TopK --topK 5",
        "minp": "--sampling MinP",
        "nucleus": "--sampling Nucleus --nucleus_p 0.5",
        "default": "--sampling Default",
        "nucleus1": "--sampling Nucleus --nucleus_p 1.0",
        "cold": "--sampling Default --temperature 0.01",
        "dynamic": "--sampling Default --dynamic_temperature",
        "seed": "--sampling Default --seed 5",
        "ordered": "--sampling Default --time_ordered",
    }
    tracks = {mode: sampled(models, tmp_path / mode, *flags.split()) for mode, flags in modes.items()}
    channels = {mode: dataset["channel"][:] for mode, dataset in tracks.items()}
    times = {mode: dataset["leadTime"][:] for mode, dataset in tracks.items()}
    assert {hits for dataset in tracks.values() for hits in dataset["NHits"]} == {MAX_PHOTONS}
    for mode in ("top1", "nucleus0"):
        assert (channels[mode], times[mode]) == (channels["greedy"], times["greedy"]), mode
    assert channels["nucleus1"] == channels["default"]
    for mode in ("top5", "minp", "nucleus", "default", "dynamic", "seed"):
        assert channels[mode] != channels["greedy"], mode
    for mode in ("dynamic", "seed", "nucleus", "top5"):
        assert channels[mode] != channels["default"], mode
    different = {mode: len({c for track in values for c in track}) for mode, values in channels.items()}
    assert different["top5"] < different["minp"] < different["default"]
    assert different["nucleus"] < different["default"]
    assert different["cold"] < different["default"] / 2
    # the kinematics come from another generator than the photons
    assert tracks["default"]["P"][:] == tracks["greedy"]["P"][:] != tracks["seed"]["P"][:]
    assert all(track == sorted(track) for track in times["ordered"])
    assert any(track != sorted(track) for track in times["default"])


def test_dead_channels_and_times_inside_the_bin(models, tmp_path):
    flags = ["--method", "Pion", "--n_tracks", "6", "--sampling", "Greedy"]
    before = read(run(tmp_path / "before", "--model", models["endless"], *flags))
    dead = sorted({channel for track in before["channel"] for channel in track})
    after = read(run(tmp_path / "after", "--model", models["endless"], *flags, "--dead_channels", *map(str, dead)))
    assert not set(dead) & {channel for track in after["channel"] for channel in track}
    flags += ["--bin_centres"]
    centres = read(run(tmp_path / "centres", "--model", models["endless"], *flags))
    late = read(run(tmp_path / "late", "--model", models["endless"], *flags, "--legacy_times"))
    # the shuffle inside a dump takes its random numbers after the times: compare as sets
    flat = {
        name: np.sort(np.concatenate(data["leadTime"][:]))
        for name, data in {"spread": before, "centres": centres, "late": late}.items()
    }
    bins = (flat["centres"] - 9) / 0.025
    np.testing.assert_allclose(bins - np.floor(bins), 0.5, atol=2e-2)
    np.testing.assert_allclose(flat["late"] - flat["centres"], 0.025, atol=2e-4)
    assert 0 < np.abs(flat["spread"] - flat["centres"]).max() < 0.0126


# ---------------------------------------------------------------------------------------------------------------------
# Restarts and several processes
# ---------------------------------------------------------------------------------------------------------------------

RESTART = ["--n_tracks", "50", "--n_dump", "12", "--batch_size", "5", "--dark_noise", "--theta", "30"]


@pytest.fixture(scope="module")
def uninterrupted(models, tmp_path_factory) -> Path:
    return run(tmp_path_factory.mktemp("restart") / "whole", "--model", models["experts"], *RESTART)


def test_a_restart_makes_only_what_is_missing(models, uninterrupted, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "out"
    shutil.copytree(uninterrupted, folder)
    removed = ["generated-00001-of-00005.parquet", "generated-00004-of-00005.parquet"]
    for name in removed:
        (folder / name).unlink()
    made = []
    make_dump = generate.make_dump
    monkeypatch.setattr(generate, "make_dump", lambda index, *args: made.append(index) or make_dump(index, *args))
    run(folder, "--model", models["experts"], *RESTART)
    assert made == [1, 4]
    assert "3 of 5 dumps are there already" in capsys.readouterr().err
    assert contents(folder) == contents(uninterrupted)
    run(folder, "--model", models["experts"], *RESTART)
    assert made == [1, 4]


def test_an_interrupted_run_leaves_whole_files_only(models, uninterrupted, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    replace, written = os.replace, []

    def interrupted(source, target):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(Path(target).name)
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(generate.os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(folder, "--model", models["experts"], *RESTART)
    assert sorted(contents(folder)) == sorted([*written, "generation.json"])
    run(folder, "--model", models["experts"], *RESTART)
    assert contents(folder) == contents(uninterrupted)


@pytest.mark.parametrize(
    "changed",
    [
        "--seed 1",
        "--n_dump 10",
        "--n_tracks 60",
        "--temperature 1.0",
        "--momentum 6",
        "--method Pion",
        "--sampling TopK",
    ],
)
def test_changed_options_are_refused(models, uninterrupted, changed):
    before = contents(uninterrupted)
    name = changed.split()[0].removeprefix("--")
    with pytest.raises(ValueError, match=rf"other options \({name} .* -> .*\); choose another --output"):
        run(uninterrupted, "--model", models["experts"], *RESTART, *changed.split())
    assert contents(uninterrupted) == before


def test_a_foreign_folder_is_refused(models, tmp_path):
    (tmp_path / "thesis.tex").write_text("do not touch")
    with pytest.raises(ValueError, match="is not empty and holds no generation.json"):
        run(tmp_path, "--model", models["experts"], *RESTART)
    assert contents(tmp_path) == {"thesis.tex": b"do not touch"}


def test_two_processes_write_the_files_of_one(models, uninterrupted, tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1"]
    # on the CPU too, --multi_gpu starts several processes; port 0 is any free one
    command += ["--multi_gpu", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command += [str(SCRIPT), "--cpu", "--model", models["experts"], "--output", str(tmp_path / "out"), *RESTART]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "50 tracks in 5 files" in result.stdout and result.stdout.count("tracks in") == 1
    assert contents(tmp_path / "out") == contents(uninterrupted)


def test_pickles_of_the_published_layout(models, tmp_path):
    flags = ["--n_tracks", "14", "--n_dump", "10", "--momentum", "6", "--theta", "30-90", "--format", "pickle"]
    flags += ["--sampling", "TopK", "--topK", "3000"]
    folder = run(tmp_path / "pickle", "--model", models["experts"], *flags)
    names = [f"TopK_p_6_theta_30-90_PID_MixPiK_ntracks_14_{index}.pkl" for index in range(2)]
    assert sorted(contents(folder)) == sorted([*names, "generation.json"])
    records = [record for name in names for record in load_fm4dirc(folder / name)]
    flags = [flag for flag in flags if flag not in ("--format", "pickle")]
    tracks = read(run(tmp_path / "parquet", "--model", models["experts"], *flags))
    assert len(records) == len(tracks) == 14
    for record, track in zip(records, tracks):
        assert record["PDG" if "PDG" in record else "PID"] == track["PDG"]
        assert record["NHits"] == track["NHits"]
        assert record["P"] == pytest.approx(track["P"])
        for name in ("pmtID", "pixelID", "leadTime"):
            np.testing.assert_allclose(record[name], track[name], rtol=1e-6)
    run(folder, "--model", models["experts"], *flags, "--format", "pickle")


# ---------------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------------


def assert_refused(output: Path, *flags: str) -> str:
    with pytest.raises(ValueError) as caught:
        run(output, *flags)
    assert "\n" not in str(caught.value)
    assert not output.exists() or not list(output.iterdir())
    return str(caught.value)


def test_one_dense_model_cannot_make_both_species(models, tmp_path):
    message = assert_refused(tmp_path / "out", "--model", models["dense"], "--method", "MixPiK")
    assert models["dense"] in message and "--pion_model and --kaon_model" in message


def test_a_missing_model_is_named(models, tmp_path):
    assert "pass --model or --kaon_model" in assert_refused(tmp_path / "out", "--pion_model", models["dense"])


@pytest.mark.parametrize("option", ["momentum", "theta"])
@pytest.mark.parametrize(
    "text",
    ["", " ", "fast", "1-", "-5", "1-2-3", "10-1", "0-5", "1-500", "nan", "nan-nan", "1-nan", "inf", "1e400", "1,5",
     "6 GeV", "0x6", "1--2", "1e-1", "__import__('os')", "6\n7"],
)  # fmt: skip
def test_hostile_ranges(tmp_path, option, text):
    message = assert_refused(tmp_path / "out", f"--{option}={text}", "--model", "no_such_model")
    assert message.startswith(f"--{option} {text!r}: expected ")


@pytest.mark.parametrize(
    "flags",
    [
        "--n_tracks 0",
        "--n_tracks -5",
        "--n_dump 0",
        "--batch_size 0",
        "--topK 0",
        "--nucleus_p 0",
        "--nucleus_p 1.5",
        "--nucleus_p nan",
        "--temperature 0",
        "--temperature -1",
        "--temperature nan",
        "--temperature inf",
        "--min_hits 0",
        "--min_hits 20 --max_hits 10",
        "--seed -1",
        "--dead_channels 6144",
        "--dead_channels -1",
        "--dead_channels 5 1000000",
    ],
)
def test_hostile_values(models, tmp_path, flags):
    name = flags.split()[0]
    arguments = ["--model", models["dense"], "--method", "Pion", "--n_tracks", "2", *flags.split()]
    assert name.removeprefix("--") in assert_refused(tmp_path / "out", *arguments)


@pytest.mark.parametrize(
    "settings, name",
    [
        ({"time_vocab_size": 5924}, "time_vocab_size"),
        ({"conditioning_ranges": [[0, 10], [20, 160]]}, "conditioning_ranges"),
        ({"stream_delays": [0, 1]}, "stream_delays"),
    ],
)
def test_hostile_tokenizer_of_another_detector(models, tmp_path, settings, name):
    shutil.copytree(models["dense"], tmp_path / "model")
    hepzoo.CMHCADircTokenizer(**settings).save_pretrained(tmp_path / "model")
    arguments = ["--model", str(tmp_path / "model"), "--method", "Pion", "--n_tracks", "2"]
    assert name in assert_refused(tmp_path / "out", *arguments)


def test_hostile_classifier_instead_of_a_generator(models, tmp_path):
    classifier = hepzoo.CMHCADircForSequenceClassification.from_pretrained(models["dense"])
    path = save(classifier, tmp_path / "classifier")
    message = assert_refused(tmp_path / "out", "--model", path, "--method", "Pion", "--n_tracks", "2")
    assert "CMHCADircForSequenceClassification" in message and path in message


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"null", b"\xff\xfe", b'"text"'])
def test_hostile_options_file_of_an_earlier_run(models, tmp_path, content):
    (tmp_path / "generation.json").write_bytes(content)
    with pytest.raises(ValueError) as caught:
        run(tmp_path, "--model", models["dense"], "--method", "Pion", "--n_tracks", "2")
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    assert contents(tmp_path) == {"generation.json": content}


def test_hostile_model_that_makes_no_valid_track(models, tmp_path, capsys):
    """50 fruitless draws are one line, not a traceback, and leave no dump behind."""
    from hepzoo.cli import main

    save(build_model(end_probability=0.9999999), tmp_path / "empty")
    output = tmp_path / "out"
    arguments = ["--model", str(tmp_path / "empty"), "--output", str(output), "--method", "Pion", "--n_tracks", "2"]
    assert main(["generate", *arguments, "--cpu"]) != 0
    errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(errors) == 1 and "50 draws" in errors[0]
    assert not list(output.glob("*.parquet")) and not list(output.glob("*.tmp"))


def test_metadata_names_every_option(models, uninterrupted):
    stored = json.loads((uninterrupted / "generation.json").read_text())
    options = {action.dest for action in generate.build_parser()._actions} - {"help", "output", "cpu"}
    assert set(stored) == options
    assert stored["model"] == models["experts"] and stored["n_tracks"] == 50
