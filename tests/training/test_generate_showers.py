"""Shower generation by `generate_showers`: what is in the files, sampling, post-processing, restarts, processes."""

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

from hepzoo.data_scripts.showers_schema import SHOWER_FEATURES
from hepzoo.modeling.configuration_spade import SpadeConfig
from hepzoo.modeling.modeling_spade import SpadeForCausalLM
from hepzoo.tokenization.tokenization_spade import SpadeTokenizer
from hepzoo.training import generate_showers, generation_common

SCRIPT = Path(__file__).resolve().parents[2] / "training" / "generate_showers.py"
NBINS = (8, 9, 7)
MAX_HITS = 40


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build_model(end_logit: float = -2.5, **options) -> SpadeForCausalLM:
    """Random weights, but the stop network says the same after every hit, so that the numbers of hits are geometric."""
    torch.manual_seed(7)
    config = SpadeConfig(
        nbins=NBINS,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_num_hits=MAX_HITS,
        **{"stop_pos_weight": 1.0, **options},
    )
    model = SpadeForCausalLM(config).eval()
    if model.stop_head is not None:
        with torch.no_grad():
            model.stop_head.classifier[-1].weight.zero_()
            model.stop_head.classifier[-1].bias.fill_(end_logit)
    return model


def save(model, folder, **settings) -> str:
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    model.save_pretrained(folder)
    SpadeTokenizer.from_model_config(model.config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("generators")
    post_processing = {
        "energy_sum_filter": {"a": 0.5, "b": 1.0, "c": -3.0, "safety_factor": 0.8, "max_retries": 3},
        "merge_duplicates": True,
        "mip_cut": 0.2,
    }
    return {
        "split": save(build_model(), folder / "split"),
        "combined": save(build_model(axis_mode="combined"), folder / "combined"),
        "endless": save(build_model(end_logit=-100.0), folder / "endless"),
        "configured": save(build_model(), folder / "configured", **post_processing),
        "unweighted": save(build_model(stop_pos_weight=0.0), folder / "unweighted"),
    }


def run(output: Path, *flags: str) -> Path:
    assert generate_showers.main(["--cpu", "--output", str(output), *map(str, flags)]) == 0
    return output


def read(folder: Path) -> Dataset:
    return Dataset.from_parquet([str(path) for path in sorted(folder.glob("*.parquet"))])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def cells_of(row: dict) -> list[tuple]:
    return list(zip(row["x"], row["y"], row["z"]))


# ---------------------------------------------------------------------------------------------------------------------
# What is in the files
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["split", "combined"])
def test_exactly_the_showers_asked_for(models, tmp_path, kind, capsys):
    flags = ["--n_showers", "37", "--rows_per_shard", "16", "--batch_size", "7", "--energy", "20-30.5"]
    folder = run(tmp_path / "out", "--model", models[kind], *flags)
    names = [f"generated-{index:05d}-of-00003.parquet" for index in range(3)]
    assert sorted(path.name for path in folder.iterdir()) == sorted(["generation.json", *names])
    assert "37 showers in 3 files; this run:" in capsys.readouterr().out
    showers = read(folder)
    assert showers.features == SHOWER_FEATURES and showers.num_rows == 37
    energies = np.asarray(showers["incident_energy"][:])
    assert 20 <= energies.min() < energies.max() <= 30.5
    assert len(set(energies.tolist())) == 37
    hits = [len(row["x"]) for row in showers]
    assert 1 <= min(hits) < max(hits) <= MAX_HITS
    for row in showers:
        assert len(row["x"]) == len(row["y"]) == len(row["z"]) == len(row["energy"])
        assert min(row["energy"]) > 0
        assert all(0 <= index < bins for cell in cells_of(row) for index, bins in zip(cell, NBINS))
    # generated showers can be encoded again
    tokenizer = SpadeTokenizer.from_pretrained(models[kind])
    assert len(tokenizer(showers[:10])["input_ids"]) == 10


def test_number_of_hits_follows_the_stop_network(models, tmp_path):
    showers = read(run(tmp_path / "out", "--model", models["split"], "--n_showers", "400", "--batch_size", "100"))
    hits = np.array([len(row) for row in showers["x"][:]])
    probability, lengths = 1 / (1 + np.exp(2.5)), np.arange(1, MAX_HITS + 1)
    weights = (1 - probability) ** (lengths - 1) * np.where(lengths < MAX_HITS, probability, 1)
    assert abs(hits.mean() - (lengths * weights).sum()) < 4 * hits.std() / np.sqrt(len(hits))


def test_default_and_fixed_energy(models, tmp_path, monkeypatch):
    monkeypatch.setattr(generate_showers, "DEFAULT_NUM_SHOWERS", 9)
    showers = read(run(tmp_path / "out", "--model", models["split"], "--energy", "50"))
    assert showers["incident_energy"][:] == [50.0] * 9


def test_energies_of_another_sample(models, tmp_path):
    """In the order of the sample, although batches are sorted; in every form the option takes."""
    sample = read(run(tmp_path / "sample", "--model", models["split"], "--n_showers", "21", "--rows_per_shard", "8"))
    energies = sample["incident_energy"][:]
    flags = ["--model", models["split"], "--energies_from"]
    assert read(run(tmp_path / "all", *flags, tmp_path / "sample"))["incident_energy"][:] == energies
    file = tmp_path / "sample" / "generated-00000-of-00003.parquet"
    assert read(run(tmp_path / "file", *flags, file))["incident_energy"][:] == energies[:8]
    some = run(tmp_path / "some", *flags, tmp_path / "sample", "--n_showers", "11", "--rows_per_shard", "6")
    assert read(some)["incident_energy"][:] == energies[:11]


def test_hits_belong_to_their_energy(tmp_path, models):
    """Sorting and regeneration keep each shower with the energy it was drawn for."""
    generator = generate_showers.load_generator(arguments_of("--model", models["split"]), "cpu")
    energies = np.random.default_rng(0).uniform(10, 100, 23).astype(np.float32)

    class Echo:
        """Shower of as many hits as its energy says."""

        sequences = None

        def __init__(self, incident_energy):
            self.num_hits = incident_energy.long()

    generator.model.generate = lambda incident_energy, **_: Echo(incident_energy)
    generator.tokenizer.batch_decode = lambda output, **_: {
        name: [np.full(int(n), int(n)) for n in output.num_hits] for name in ("x", "y", "z", "energy")
    }
    updates = []
    columns, cut_off = generate_showers.draw_showers(generator, energies, 5, updates.append)
    assert [len(values) for values in columns["x"]] == energies.astype(int).tolist()
    assert (columns["incident_energy"] == energies).all()
    assert updates == [5, 5, 5, 5, 3]
    assert cut_off == (energies.astype(int) >= MAX_HITS).sum()


def arguments_of(*flags: str):
    return generate_showers.build_parser().parse_args(["--output", "unused", *flags])


@pytest.mark.parametrize("layout", ["showerdata", "padded"])
def test_hdf5(models, tmp_path, layout):
    pytest.importorskip("h5py")
    from hepzoo.data_scripts.showers_hdf5 import ReadOptions, read_showers_hdf5

    flags = ["--model", models["split"], "--n_showers", "13", "--rows_per_shard", "9", "--merge_duplicates"]
    expected = read(run(tmp_path / "parquet", *flags))
    folder = run(tmp_path / layout, *flags, "--format", layout, "--cell_size", "4")
    names = [f"generated-{index:05d}-of-00002.h5" for index in range(2)]
    assert sorted(contents(folder)) == sorted(["generation.json", *names])
    options = ReadOptions(grid=NBINS, cell_size=4.0)
    rows = []
    for name in names:
        for columns in read_showers_hdf5(folder / name, options=options):
            rows += [dict(zip(columns, values)) for values in zip(*columns.values())]
    assert len(rows) == 13
    for row, other in zip(rows, expected):
        assert row["incident_energy"] == pytest.approx(other["incident_energy"])
        assert [row[name].tolist() for name in "xyz"] == [other[name] for name in "xyz"]
        np.testing.assert_allclose(row["energy"], other["energy"], rtol=1e-5)
    run(folder, *flags, "--format", layout, "--cell_size", "4")


# ---------------------------------------------------------------------------------------------------------------------
# Sampling
# ---------------------------------------------------------------------------------------------------------------------


def test_sampling_options(models, tmp_path):
    """One model, one seed: what every option must have in common with, or different from, another."""
    modes = {
        "default": "",
        "greedy": "--greedy",
        "top1": "--top_k 1",
        "nucleus0": "--top_p 1e-9",
        "cold": "--temperature 1e-4",
        "cold_z": "--axis_temperatures z=1e-4",
        "warm_z": "--axis_temperatures x=1,y=1,z=1",
        "energy": "--energy_temperature 0.01",
        "seed": "--seed 5",
        "energies": "--energy 50",
        "short": "--max_hits 12",
        "unique": "--no_duplicate_cells",
        "ordered": "--monotonic_layers",
    }
    common = ["--model", models["endless"], "--n_showers", "6"]
    showers = {mode: list(read(run(tmp_path / mode, *common, *flags.split()))) for mode, flags in modes.items()}
    cells = {mode: [cells_of(row) for row in rows] for mode, rows in showers.items()}
    layers = {mode: [row["z"] for row in rows] for mode, rows in showers.items()}
    energies = {mode: [row["energy"] for row in rows] for mode, rows in showers.items()}

    assert {len(row) for mode in modes for row in cells[mode]} == {MAX_HITS, 12}
    assert {len(row) for row in cells["short"]} == {12}
    for mode in ("top1", "nucleus0", "cold"):
        # the drawn energies feed back into the cells, so only the first hit is that of the greedy shower
        assert [row[0] for row in cells[mode]] == [row[0] for row in cells["greedy"]], mode
    assert showers["warm_z"] == showers["default"]
    for mode in ("greedy", "cold", "cold_z", "energy", "seed", "unique"):
        assert cells[mode] != cells["default"], mode
    assert energies["energy"] != energies["default"]
    assert [row[0] for row in layers["cold_z"]] == [row[0] for row in layers["greedy"]]
    # the incident energies come from another generator than the hits
    incident = {mode: [row["incident_energy"] for row in rows] for mode, rows in showers.items()}
    assert incident["default"] == incident["greedy"] != incident["seed"]
    assert all(len(set(row)) == len(row) for row in cells["unique"])
    assert any(len(set(row)) < len(row) for row in cells["default"])
    assert all(row == sorted(row) for row in layers["ordered"])
    assert any(row != sorted(row) for row in layers["default"])


def test_both_physics_processors_with_one_token_per_cell(models, tmp_path):
    flags = ["--n_showers", "20", "--no_duplicate_cells", "--monotonic_layers", "--axis_temperatures", "cell=1.5"]
    for row in read(run(tmp_path / "out", "--model", models["combined"], *flags)):
        assert row["z"] == sorted(row["z"]) and len(set(cells_of(row))) == len(row["x"])


def test_stop_options(models, tmp_path):
    """The network says 0.076 after every hit: below a threshold nothing ends, above it everything after one hit."""
    hits = {}
    for threshold in ("0.05", "0.5"):
        folder = run(
            tmp_path / threshold, "--model", models["split"], "--n_showers", "8", "--stop_threshold", threshold
        )
        hits[threshold] = {len(row) for row in read(folder)["x"][:]}
    assert hits == {"0.05": {1}, "0.5": {MAX_HITS}}
    drawn = read(run(tmp_path / "drawn", "--model", models["split"], "--n_showers", "8", "--stop_sampling"))
    assert len({len(row) for row in drawn["x"][:]}) > 2


# ---------------------------------------------------------------------------------------------------------------------
# Post-processing
# ---------------------------------------------------------------------------------------------------------------------


def test_merging_and_cut(models, tmp_path, capsys):
    flags = ["--model", models["endless"], "--n_showers", "10"]
    plain = read(run(tmp_path / "plain", *flags))
    capsys.readouterr()
    merged = read(run(tmp_path / "merged", *flags, "--merge_duplicates", "--mip_cut"))
    hits_merged = hits_cut = 0
    for before, after in zip(plain, merged):
        sums: dict[tuple, float] = {}
        for cell, energy in zip(cells_of(before), before["energy"]):
            sums[cell] = sums.get(cell, 0.0) + energy
        kept = {cell: energy for cell, energy in sums.items() if energy > 0.1}
        hits_merged += len(before["x"]) - len(sums)
        hits_cut += len(sums) - len(kept)
        assert cells_of(after) == list(kept)
        np.testing.assert_allclose(after["energy"], list(kept.values()), rtol=1e-5)
    assert hits_merged > 0 and hits_cut > 0
    out = capsys.readouterr().out
    assert f"10 draws cut off at {MAX_HITS} hits, 0 without a hit" in out
    assert f"{hits_merged} hits merged, {hits_cut} hits below 0.1 MeV removed" in out


def test_energy_sum_filter(models, tmp_path, capsys):
    flags = ["--model", models["split"], "--n_showers", "60", "--energy", "50"]
    plain = read(run(tmp_path / "plain", *flags))
    limit = float(np.median([sum(energy) for energy in plain["energy"][:]]))
    capsys.readouterr()
    flags += ["--energy_sum_filter", f"0,1,{limit}", "--safety_factor", "1"]
    once = read(run(tmp_path / "once", *flags, "--max_retries", "1"))
    words = capsys.readouterr().out
    sums = {name: np.array([sum(row) for row in data["energy"][:]]) for name, data in (("a", plain), ("b", once))}
    low = sums["a"] < limit
    assert 20 < low.sum() < 40
    np.testing.assert_allclose(sums["b"][~low], sums["a"][~low])
    assert not np.isclose(sums["b"][low], sums["a"][low]).any()
    still_low = int((sums["b"] < limit).sum())
    assert 0 < still_low < low.sum()
    assert f"{low.sum()} regenerated, {still_low} kept below the energy-sum envelope" in words
    often = read(run(tmp_path / "often", *flags, "--max_retries", "30"))
    assert min(sum(row) for row in often["energy"][:]) >= limit * (1 - 1e-6)
    assert "0 kept below the energy-sum envelope" in capsys.readouterr().out


def test_settings_of_the_model_and_flags_that_override_them(models, tmp_path):
    def stored(name: str, *flags: str) -> dict:
        folder = run(tmp_path / name, "--model", models["configured"], "--n_showers", "5", *flags)
        return json.loads((folder / "generation.json").read_text())["post_processing"]

    own = {"a": 0.5, "b": 1.0, "c": -3.0, "safety_factor": 0.8, "max_retries": 3}
    assert stored("own") == {"energy_sum_filter": own, "merge_duplicates": True, "mip_cut": 0.2}
    assert min(energy for row in read(tmp_path / "own")["energy"][:] for energy in row) > 0.2
    flags = ["--safety_factor", "0.5", "--max_retries", "0", "--no-merge_duplicates", "--mip_cut", "0"]
    changed = {**own, "safety_factor": 0.5, "max_retries": 0}
    assert stored("changed", *flags) == {"energy_sum_filter": changed, "merge_duplicates": False, "mip_cut": 0.0}
    assert stored("off", "--energy_sum_filter", "off")["energy_sum_filter"] is None
    other = {"a": 1.0, "b": 1.5, "c": 0.0, "safety_factor": 0.9, "max_retries": 2}
    assert stored("other", "--energy_sum_filter", "1,1.5,0")["energy_sum_filter"] == other


def test_fitted_energy_sum_filter(models, tmp_path):
    sample = run(tmp_path / "sample", "--model", models["endless"], "--n_showers", "400", "--batch_size", "200")
    folder = run(tmp_path / "out", "--model", models["split"], "--n_showers", "10", "--fit_energy_sum_filter", sample)
    fitted = json.loads((folder / "generation.json").read_text())["post_processing"]["energy_sum_filter"]
    assert 0.5 <= fitted["b"] <= 1.5 and fitted["max_retries"] == 2


# ---------------------------------------------------------------------------------------------------------------------
# Restarts and several processes
# ---------------------------------------------------------------------------------------------------------------------

RESTART = ["--n_showers", "50", "--rows_per_shard", "12", "--batch_size", "5", "--energy_sum_filter", "0.1,1,0"]


@pytest.fixture(scope="module")
def uninterrupted(models, tmp_path_factory) -> Path:
    return run(tmp_path_factory.mktemp("restart") / "whole", "--model", models["split"], *RESTART)


def test_a_restart_makes_only_what_is_missing(models, uninterrupted, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "out"
    shutil.copytree(uninterrupted, folder)
    for index in (1, 4):
        (folder / f"generated-{index:05d}-of-00005.parquet").unlink()
    made = []
    make_rows = generate_showers.make_rows
    monkeypatch.setattr(
        generate_showers, "make_rows", lambda index, *args: made.append(index) or make_rows(index, *args)
    )
    run(folder, "--model", models["split"], *RESTART)
    assert made == [1, 4]
    assert "3 of 5 files are there already" in capsys.readouterr().err
    assert contents(folder) == contents(uninterrupted)
    run(folder, "--model", models["split"], *RESTART)
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
        patch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(folder, "--model", models["split"], *RESTART)
    assert sorted(contents(folder)) == sorted([*written, "generation.json"])
    run(folder, "--model", models["split"], *RESTART)
    assert contents(folder) == contents(uninterrupted)


def test_two_processes_write_the_files_of_one(models, uninterrupted, tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1"]
    # on the CPU too, --multi_gpu starts several processes; port 0 is any free one
    command += ["--multi_gpu", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command += [str(SCRIPT), "--cpu", "--model", models["split"], "--output", str(tmp_path / "out"), *RESTART]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("50 showers in 5 files") == 1
    assert contents(tmp_path / "out") == contents(uninterrupted)


def test_metadata_names_every_option(models, uninterrupted):
    stored = json.loads((uninterrupted / generation_common.METADATA).read_text())
    options = {action.dest for action in generate_showers.build_parser()._actions} - {"help", "output", "cpu"}
    assert set(stored) == options | {"post_processing"}
    assert stored["model"] == models["split"] and stored["n_showers"] == 50


# ---------------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------------


def refused(capsys, output: Path, *flags: str) -> str:
    capsys.readouterr()
    assert generate_showers.main(["--cpu", "--output", str(output), *map(str, flags)]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(errors) == 1 and errors[0].startswith("hepzoo generate showers: error: ")
    return errors[0]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--seed 1", "seed"),
        ("--rows_per_shard 10", "rows_per_shard"),
        ("--temperature 1.1", "temperature"),
        ("--energy 50", "energy"),
        ("--max_retries 1", "max_retries"),
        ("--no_duplicate_cells", "no_duplicate_cells"),
    ],
)
def test_hostile_change_of_options(models, uninterrupted, capsys, flags, named):
    before = contents(uninterrupted)
    message = refused(capsys, uninterrupted, "--model", models["split"], *RESTART, *flags.split())
    assert f"({named} " in message and "choose another --output" in message
    assert contents(uninterrupted) == before


def test_hostile_change_of_the_matched_sample(models, tmp_path, capsys):
    def sample(values):
        Dataset.from_dict({"incident_energy": values}).to_parquet(str(tmp_path / "sample.parquet"))

    flags = ["--model", models["split"], "--energies_from", tmp_path / "sample.parquet"]
    sample([10.0, 20.0])
    run(tmp_path / "out", *flags)
    sample([10.0, 30.0])
    assert "energies_sha256" in refused(capsys, tmp_path / "out", *flags)


def test_hostile_folder(models, tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("do not touch")
    assert "holds no generation.json" in refused(capsys, tmp_path, "--model", models["split"], *RESTART)
    assert contents(tmp_path) == {"thesis.tex": b"do not touch"}


@pytest.mark.parametrize(
    "text", ["", "fast", "1-", "-5", "1-2-3", "10-1", "0", "0-5", "nan", "1-nan", "inf", "1e400", "1,5", "6 GeV"]
)
def test_hostile_energies(tmp_path, capsys, text):
    message = refused(capsys, tmp_path / "out", f"--energy={text}", "--model", "no_such_model")
    assert f"--energy {text!r}: expected " in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "flags",
    [
        "--n_showers 0",
        "--n_showers -5",
        "--rows_per_shard 0",
        "--batch_size 0",
        "--seed -1",
        "--temperature 0",
        "--temperature nan",
        "--temperature inf",
        "--energy_temperature -1",
        "--top_k -1",
        "--top_p 0",
        "--top_p 1.5",
        "--top_p nan",
        "--stop_threshold 0",
        "--stop_threshold 2",
        "--max_hits 0",
        "--max_hits 41",
        "--mip_cut -1",
        "--mip_cut nan",
        "--cell_size 0",
        "--safety_factor 1",
        "--max_retries 1",
        "--max_retries -1 --energy_sum_filter 1,1,1",
        "--safety_factor 0 --energy_sum_filter 1,1,1",
        "--energy_sum_filter 1,1",
        "--energy_sum_filter nan,1,1",
        "--energy_sum_filter on",
        "--fit_energy_sum_filter no_such_file.parquet",
        "--energies_from no_such_file.parquet",
        "--axis_temperatures w=1",
        "--axis_temperatures x=0",
        "--axis_temperatures x=hot",
        "--axis_temperatures x=true",
        "--axis_temperatures x",
        "--temperature 1.1 --greedy",
        "--top_k 5 --greedy",
        "--axis_temperatures x=1 --greedy",
        "--stop_sampling --greedy",
    ],
)
def test_hostile_values(models, tmp_path, capsys, flags):
    name = flags.split()[0].removeprefix("--")
    arguments = ["--model", models["split"], *([] if name == "n_showers" else ["--n_showers", "2"]), *flags.split()]
    message = refused(capsys, tmp_path / "out", *arguments)
    assert name in message or flags.split()[1] in message
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"energy": [1.0]}, "has no column incident_energy"),
        ({"incident_energy": [10.0, -3.0]}, "row 1: incident_energy is -3, expected 0.001 to 100000 GeV"),
        ({"incident_energy": [float("nan")]}, "row 0: incident_energy is nan"),
        ({"incident_energy": [10.0, None]}, "column incident_energy has missing values"),
        ({"incident_energy": ["10"]}, "incident_energy holds <U2, expected numbers in GeV"),
        ({"incident_energy": [10.0] * 3}, "has 3 showers, fewer than --n_showers 4"),
    ],
)
def test_hostile_matched_samples(models, tmp_path, capsys, columns, message):
    path = tmp_path / "sample.parquet"
    Dataset.from_dict(columns).to_parquet(str(path))
    flags = ["--model", models["split"], "--energies_from", path]
    flags += ["--n_showers", "4"] if "fewer" in message else []
    assert f"{path}: {message}" in refused(capsys, tmp_path / "out", *flags)


def test_hostile_file_of_energies(models, tmp_path, capsys):
    (tmp_path / "sample.parquet").write_bytes(b"PAR1 no, it is not")
    message = refused(capsys, tmp_path / "out", "--model", models["split"], "--energies_from", tmp_path)
    assert "sample.parquet: not readable as Parquet" in message


def test_hostile_models(models, tmp_path, capsys):
    flags = ["--n_showers", "2", "--model"]
    assert "no model that can be loaded" in refused(capsys, tmp_path / "a", *flags, tmp_path / "nothing")
    headless = save(build_model(use_stop_head=False), tmp_path / "headless")
    assert "no stop network" in refused(capsys, tmp_path / "b", *flags, headless)
    message = refused(capsys, tmp_path / "c", *flags, models["unweighted"], "--stop_sampling")
    assert "--stop_sampling" in message and "pass --stop_threshold" in message
    other = tmp_path / "other"
    shutil.copytree(models["split"], other)
    SpadeTokenizer(nbins=(30, 30, 30)).save_pretrained(other)
    assert "nbins of the tokenizer is [30, 30, 30]" in refused(capsys, tmp_path / "d", *flags, other)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "config.json").write_text('{"model_type": "gpt2"}')
    assert "model type 'gpt2'" in refused(capsys, tmp_path / "e", *flags, foreign)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"energy_sum_filter": {"a": 1.0}}, "energy_sum_filter is {'a': 1.0}, expected a dict of a, b, c"),
        ({"merge_duplicates": "yes"}, "merge_duplicates is 'yes', expected true or false"),
        ({"mip_cut": -1.0}, "mip_cut is -1.0, expected an energy in MeV"),
    ],
)
def test_hostile_settings_of_a_model(tmp_path, capsys, settings, message):
    model = save(build_model(), tmp_path / "model", **settings)
    assert message in refused(capsys, tmp_path / "out", "--model", model, "--n_showers", "2")


def test_hostile_absence_of_h5py(models, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(generate_showers, "find_spec", lambda name: None)
    flags = ["--model", models["split"], "--n_showers", "2", "--format", "padded"]
    assert 'pip install "hepzoo[data]"' in refused(capsys, tmp_path / "out", *flags)
