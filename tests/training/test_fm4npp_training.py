"""The training scripts for TPC events: pre-training, track finding, particles and noise of points, predictions."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoFeatureExtractor,
    AutoModelForInstanceSegmentation,
    AutoModelForPreTraining,
    TrainerCallback,
)

import hepzoo  # noqa: F401
from hepzoo import Fm4nppConfig, Fm4nppForPreTraining
from hepzoo.evaluation import evaluate_tracking
from hepzoo.evaluation.tracking import adjusted_rand_index, contingency, read_events
from hepzoo.training import (
    find_tracks,
    run_npp_pretraining,
    run_token_classification,
    run_tracking,
    tpc_heads,
    tpc_probe,
)
from hepzoo.training.data import InputError
from tests.training_runs import history

BACKBONE = "ssm=mamba1,hidden_size=32,state_size=4,num_hidden_layers=2,num_neighbors=5,kernel_backend=torch"
HEAD = "head_size=32,head_intermediate_size=32,num_prototypes=12,num_refinement_layers=1"
FLAGS = "--use_cpu --disable_tqdm true --dataloader_pin_memory false --seed 3 --logging_steps 1 --save_strategy no"
FLAGS += " --lr_scheduler_type constant --per_device_train_batch_size 4 --per_device_eval_batch_size 4"
EXTRACTOR = ["--feature_extractor_overrides", "order=none"]


def make_events(number: int, seed: int = 0) -> dict[str, list]:
    """Straight tracks of 15 points, two or three per event in fixed directions, and five noise points."""
    rng = np.random.default_rng(seed)
    rows: dict[str, list] = {name: [] for name in ("E", "x", "y", "z", "track_id", "pid", "noise")}
    for _ in range(number):
        tracks = int(rng.integers(2, 4))
        track = np.concatenate([np.repeat(np.arange(1, tracks + 1), 15), np.zeros(5, int)])
        r = np.concatenate([np.tile(np.linspace(32, 75, 15), tracks), rng.uniform(32, 75, 5)])
        phi = np.where(track > 0, 2.1 * track + rng.normal(0, 0.03, len(track)), rng.uniform(-3, 3, len(track)))
        columns = {
            "E": rng.exponential(200 + 300 * (track == 1)),
            "x": r * np.cos(phi),
            "y": r * np.sin(phi),
            "z": r * np.where(track > 0, track - 2 + rng.normal(0, 0.05, len(track)), rng.uniform(-1, 1, len(track))),
            "track_id": track,
            "pid": track,
            "noise": (track == 0).astype(int),
        }
        order = rng.permutation(len(track))
        for name, values in columns.items():
            rows[name].append(values[order].tolist())
    return rows


def write(path: Path, rows: dict[str, list]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(rows), path)
    return str(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tpc")
    write(folder / "train.parquet", make_events(24, seed=1))
    write(folder / "validation.parquet", make_events(8, seed=2))
    unlabeled = {name: values for name, values in make_events(8, seed=3).items() if name in "Exyz"}
    write(folder / "unlabeled.parquet", unlabeled)
    return folder


def flags(data: Path, output: Path, *more: str) -> list[str]:
    files = ["--train_file", str(data / "train.parquet"), "--validation_file", str(data / "validation.parquet")]
    return [*FLAGS.split(), *files, "--cache_dir", str(data / "cache"), "--output_dir", str(output), *more]


@pytest.fixture(scope="module")
def pretrained(data, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "npp"
    train = ["--config_overrides", BACKBONE, *EXTRACTOR, "--do_train", "--do_eval", "--learning_rate", "5e-3"]
    train += ["--num_train_epochs", "8", "--train_sampling_strategy", "group_by_length"]
    files = ["--train_file", str(data / "train.parquet"), str(data / "unlabeled.parquet")]
    assert run_npp_pretraining.main([*flags(data, output), *train, *files]) == 0
    return output


def results(output: Path) -> dict[str, float]:
    return json.loads((output / "all_results.json").read_text())


# ---- pre-training


def test_pretraining_learns_and_saves_model_and_extractor(data, pretrained):
    metrics = results(pretrained)
    losses = history(pretrained)
    assert losses[max(losses)] < 0.25 * losses[1]
    assert metrics["train_samples"] == 32 and metrics["eval_mse"] < metrics["eval_mse_constant"]

    model = AutoModelForPreTraining.from_pretrained(pretrained).eval()
    extractor = AutoFeatureExtractor.from_pretrained(pretrained)
    assert extractor.order == "none" and extractor.num_neighbors == model.config.num_neighbors == 5
    rows = make_events(8, seed=2)
    batch = extractor({name: rows[name] for name in "Exyz"}, return_tensors="pt")
    with torch.no_grad():
        predictions = model(batch["points"], attention_mask=batch["attention_mask"]).predictions
    labels = batch["neighbor_labels"]
    known = labels != -100
    assert metrics["eval_mse"] == pytest.approx((predictions - labels)[known].square().mean().item(), rel=1e-4)
    copied = batch["points"][..., 1:].repeat(1, 1, 5)
    assert metrics["eval_mse_copy"] == pytest.approx((copied - labels)[known].square().mean().item(), rel=1e-4)
    nearest = known & (torch.arange(15) < 3)
    assert metrics["eval_mse_nearest"] == pytest.approx(
        (predictions - labels)[nearest].square().mean().item(), rel=1e-4
    )
    axes = [labels[..., axis::3][known[..., axis::3]].var(correction=0).item() for axis in range(3)]
    assert metrics["eval_mse_constant"] == pytest.approx(np.mean(axes), rel=1e-4)
    card = (pretrained / "README.md").read_text()
    assert "AutoFeatureExtractor.from_pretrained" in card and "AutoTokenizer" not in card


def test_output_layer_starts_at_the_least_squares_prediction(data, tmp_path):
    options = ["--config_overrides", BACKBONE, *EXTRACTOR, "--do_train", "--do_eval", "--max_steps", "1"]
    options += ["--learning_rate", "1e-9"]
    errors = []
    for number, more in enumerate(([], ["--fit_output_events", "16"])):
        output = tmp_path / str(number)
        assert run_npp_pretraining.main([*flags(data, output), *options, *more]) == 0
        errors.append(results(output)["eval_mse"])
    assert errors[1] < 0.2 * errors[0] and errors[1] < results(output)["eval_mse_constant"]

    # no other output layer does better on the events that it was made from, least squares by numpy
    extractor = AutoFeatureExtractor.from_pretrained(output)
    collator = run_npp_pretraining.TpcCollator(extractor, "neighbors")
    rows = make_events(6, seed=11)
    events = [{name: rows[name][row] for name in "Exyz"} | {"row": row} for row in range(6)]
    for shift in (0, 2):
        model = AutoModelForPreTraining.from_pretrained(output, label_shift=shift)
        run_npp_pretraining.fit_output_layer(model, collator, events, batch_size=4, ridge=1e-12)
        batch = collator(events)
        with torch.no_grad():
            states = model.model(batch["points"], attention_mask=batch["attention_mask"]).last_hidden_state
        labels = batch["neighbor_labels"][:, shift:]
        is_full = (labels != -100).all(dim=-1)
        states = states[:, : labels.shape[1]][is_full].double().numpy()
        states, labels = np.column_stack([states, np.ones(len(states))]), labels[is_full].double().numpy()
        best = states @ np.linalg.lstsq(states, labels, rcond=None)[0]
        weight = torch.cat([model.neighbor_head.weight.T, model.neighbor_head.bias[None]]).detach().double().numpy()
        assert np.mean((states @ weight - labels) ** 2) < 1.02 * np.mean((best - labels) ** 2)


def test_windows_of_long_events(data, tmp_path):
    """Published as `chunk_training`: one window per event in training, all windows but short remainders otherwise."""
    extractor = AutoFeatureExtractor.from_pretrained(
        write_extractor(tmp_path / "extractor"), num_neighbors=3, order="hilbert"
    )
    rng = np.random.default_rng(0)
    events = [{name: rng.uniform(20, 60, size) for name in "Exyz"} | {"row": size} for size in (40, 151, 230, 180)]
    whole = run_npp_pretraining.TpcCollator(extractor, "neighbors")(events)
    every = run_npp_pretraining.TpcCollator(extractor, "neighbors", window=60, all_windows=True)(events)
    spans = [(0, 0, 40), (1, 0, 60), (1, 60, 120), (2, 0, 60), (2, 60, 120), (2, 120, 180), (3, 0, 60), (3, 60, 120)]
    spans += [(3, 120, 180)]
    assert every["attention_mask"].sum(dim=1).tolist() == [stop - start for _, start, stop in spans]
    for index, (event, start, stop) in enumerate(spans):
        for name in ("points", "neighbor_labels"):
            assert torch.equal(every[name][index, : stop - start], whole[name][event, start:stop])
    collator = run_npp_pretraining.TpcCollator(extractor, "neighbors", window=60)
    starts, lengths = set(), set()
    for _ in range(200):
        batch = collator(events[:2])
        assert batch["attention_mask"][0].sum() == 40
        length = int(batch["attention_mask"][1].sum())
        (start,) = (whole["points"][1] == batch["points"][1, 0]).all(dim=1).nonzero()[:, 0].tolist()
        assert length == min(60, 151 - start)
        assert torch.equal(batch["neighbor_labels"][1, :length], whole["neighbor_labels"][1, start : start + length])
        starts.add(start)
        lengths.add(length)
    assert min(starts) < 10 and 95 < max(starts) <= 101 and min(lengths) >= 50

    options = ["--config_overrides", BACKBONE, *EXTRACTOR, "--do_train", "--do_eval", "--max_steps", "2"]
    assert run_npp_pretraining.main([*flags(data, tmp_path / "run"), *options, "--window", "50"]) == 0
    assert 0 < results(tmp_path / "run")["eval_mse"] < 10


def write_extractor(folder: Path) -> Path:
    hepzoo.Fm4nppFeatureExtractor(order="none").save_pretrained(folder)
    return folder


def test_pretraining_resumes_with_the_losses_of_an_uninterrupted_run(data, tmp_path, monkeypatch):
    train = ["--config_overrides", BACKBONE, *EXTRACTOR, "--do_train", "--max_steps", "7"]
    train += ["--save_strategy", "steps", "--save_steps", "3"]
    assert run_npp_pretraining.main([*flags(data, tmp_path / "whole"), *train]) == 0

    class Interruption(Exception):
        pass

    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                raise Interruption

    with monkeypatch.context() as patch:
        patch.setattr(run_npp_pretraining.NeighborMonitor, "on_step_end", Interrupt.on_step_end)
        with pytest.raises(Interruption):
            run_npp_pretraining.main([*flags(data, tmp_path / "broken"), *train])
    assert run_npp_pretraining.main([*flags(data, tmp_path / "broken"), *train]) == 0
    assert history(tmp_path / "broken") == history(tmp_path / "whole")


def test_pretraining_from_a_stream_with_new_bin_edges(data, tmp_path):
    rows = make_events(30, seed=4)
    # a track of points in every layer, so that the gaps of the chamber show
    files = [write(tmp_path / f"train-{i}.parquet", {n: rows[n][i::2] for n in rows}) for i in range(2)]
    train = ["--config_overrides", BACKBONE, "--bin_edges_events", "20", "--do_train", "--max_steps", "2"]
    arguments = [*flags(data, tmp_path / "run"), *train, "--streaming", "--train_file", *files]
    assert run_npp_pretraining.main([*arguments, "--drop_long_events"]) == 0
    extractor = AutoFeatureExtractor.from_pretrained(tmp_path / "run")
    assert extractor.order == "EPR" and [len(extractor.bin_edges[n]) for n in ("eta", "phi", "radius")] == [9, 9, 7]


# ---- heads


@pytest.fixture(scope="module")
def tracker(data, pretrained, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "tracking"
    train = ["--model_name_or_path", str(pretrained), "--config_overrides", HEAD, "--do_train", "--do_eval"]
    train += ["--num_train_epochs", "25", "--learning_rate", "3e-3", "--cache_block_outputs", "1"]
    assert run_tracking.main([*flags(data, output), *train]) == 0
    return output


def test_tracking_with_a_frozen_backbone(pretrained, tracker):
    metrics = results(tracker)
    losses = history(tracker)
    assert losses[max(losses)] < 0.5 * losses[1]
    assert metrics["eval_ari"] > 0.5 and metrics["eval_efficiency"] > 0.5
    before, after = (load_file(path / "model.safetensors") for path in (pretrained, tracker))
    backbone = [name for name in before if name.startswith("model.")]
    assert backbone and all(torch.equal(before[name], after[name]) for name in backbone)
    model = AutoModelForInstanceSegmentation.from_pretrained(tracker)
    assert not any(p.requires_grad for p in model.model.parameters())
    assert AutoFeatureExtractor.from_pretrained(tracker).order == "none"


def test_tracking_with_a_joint_head(data, pretrained, tmp_path):
    head = f"{HEAD},joint_head=true"
    options = ["--model_name_or_path", str(pretrained), "--config_overrides", head, "--do_train", "--do_eval"]
    options += ["--num_train_epochs", "4", "--learning_rate", "5e-3", "--cache_block_outputs", "1"]
    assert run_tracking.main([*flags(data, tmp_path / "joint"), *options]) == 0
    values = results(tmp_path / "joint")
    assert values["eval_ari"] > 0.3
    model = AutoModelForInstanceSegmentation.from_pretrained(tmp_path / "joint").eval()
    assert model.config.joint_head
    collator = tpc_heads.TpcCollator(AutoFeatureExtractor.from_pretrained(tmp_path / "joint"), "joint")
    rows = make_events(8, seed=12)
    batch = collator([{name: rows[name][row] for name in rows} | {"row": row} for row in range(8)])
    with torch.no_grad():
        terms = model(**batch).joint_loss_terms
    # the head says all there is to say, in the order of the input
    output = tmp_path / "found.parquet"
    arguments = ["--model", str(tmp_path / "joint"), "--input", write(tmp_path / "events.parquet", rows)]
    assert find_tracks.main([*arguments, "--output", str(output), "--batch_size", "3"]) == 0
    found = pq.read_table(output).to_pydict()
    with torch.no_grad():
        noise = model(batch["points"], attention_mask=batch["attention_mask"]).noise_logits.argmax(dim=-1).tolist()
    order = collator.extractor([{name: rows[name][row] for name in "Exyz"} for row in range(8)], padding=False)["order"]
    for row in range(8):
        assert np.array_equal(np.asarray(found["predicted_noise"][row])[order[row]], noise[row][: len(order[row])])
    for tracks, particles in zip(found["predicted_track_id"], found["predicted_pid"]):
        # one particle per track, none of the class of no track
        assert len({*zip(tracks, particles)}) == len(set(tracks)) and set(particles) <= set(range(5))

    # better than a guess: the logarithm of 6 for each of some three tracks, of 2 for every point
    assert terms[0] == 0 and terms[1] < 4 and terms[2] < 0.6


def test_kept_block_outputs_change_nothing(data, pretrained, tmp_path):
    train = ["--model_name_or_path", str(pretrained), "--config_overrides", HEAD, "--do_train", "--do_eval"]
    train += ["--num_train_epochs", "2", "--learning_rate", "1e-3"]
    outcomes = []
    # of 1e-5 GB: only the first event is kept
    for name, cache in (
        ("off", []),
        ("all", ["--cache_block_outputs", "1"]),
        ("one", ["--cache_block_outputs", "2e-5"]),
    ):
        assert run_tracking.main([*flags(data, tmp_path / name), *train, *cache]) == 0
        outcomes.append((history(tmp_path / name), results(tmp_path / name)["eval_loss"]))
    for losses, eval_loss in outcomes[1:]:
        assert losses == pytest.approx(outcomes[0][0], rel=1e-4)
        assert eval_loss == pytest.approx(outcomes[0][1], rel=1e-4)


def test_block_outputs_are_computed_once():
    rows = make_events(3, seed=5)

    class Backbone(torch.nn.Module):
        device, dtype = torch.device("cpu"), torch.float32

        def __init__(self):
            super().__init__()
            self.calls: list[int] = []
            self.model = self.compute

        def compute(self, points, attention_mask, use_cache):
            self.calls.append(len(points))
            return type("Outputs", (), {"block_outputs": (points, 2 * points)})

    backbone = Backbone()
    extractor = hepzoo.Fm4nppFeatureExtractor(order="none")
    collator = tpc_heads.BlockOutputCache(tpc_heads.TpcCollator(extractor, "tracks"), backbone, 1.0)
    events = [{"row": i, **{name: rows[name][i] for name in rows}} for i in range(3)]
    for chosen in ([0, 1], [1, 2], [2, 0]):
        batch = collator([events[i] for i in chosen])
        points = batch["points"] * batch["attention_mask"][..., None]
        assert torch.equal(batch["block_outputs"], torch.stack([points, 2 * points]))
    assert backbone.calls == [2, 1]


def test_free_and_random_backbones(data, pretrained, tmp_path):
    head = ["--do_train", "--max_steps", "2", "--learning_rate", "1e-3"]
    free = ["--model_name_or_path", str(pretrained), "--config_overrides", HEAD, "--no_freeze_backbone"]
    assert run_tracking.main([*flags(data, tmp_path / "free"), *head, *free]) == 0
    before, after = (load_file(path / "model.safetensors") for path in (pretrained, tmp_path / "free"))
    name = "model.layers.0.mixer.in_proj.weight"
    assert not torch.equal(before[name], after[name])
    scratch = ["--config_overrides", f"{BACKBONE},{HEAD}", "--feature_extractor_name", str(pretrained)]
    assert run_tracking.main([*flags(data, tmp_path / "random"), *head, *scratch]) == 0
    model = AutoModelForInstanceSegmentation.from_pretrained(tmp_path / "random")
    assert model.config.freeze_backbone and model.config.num_prototypes == 12


@pytest.mark.parametrize("target", ["pid", "noise"])
def test_points(data, pretrained, tmp_path, target):
    output = tmp_path / target
    train = ["--target", target, "--model_name_or_path", str(pretrained), "--freeze_backbone", "--do_train"]
    train += ["--config_overrides", "head_size=32", "--num_train_epochs", "12", "--learning_rate", "5e-3", "--do_eval"]
    assert run_token_classification.main([*flags(data, output), *train]) == 0
    metrics = results(output)
    assert metrics["eval_accuracy"] > {"pid": 0.6, "noise": 0.8}[target]
    assert history(output)[max(history(output))] < 0.7 * history(output)[1]
    before, after = (load_file(path / "model.safetensors") for path in (pretrained, output))
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("model."))
    labels = json.loads((output / "config.json").read_text())["id2label"]
    assert list(labels.values())[:2] == {"pid": ["other", "pion"], "noise": ["signal", "noise"]}[target]


# ---- predictions


def test_find_tracks_keeps_rows_and_order(data, tracker, tmp_path, capsys):
    rows = make_events(9, seed=6)
    rows = {**rows, "truth_track_id": [[1]] * 9, "truth_pt": [[0.5]] * 9, "number": list(range(9))}
    events = write(tmp_path / "events.parquet", rows)
    output = tmp_path / "out" / "predictions.parquet"
    arguments = ["--model", str(tracker), "--input", events, "--output", str(output)]
    assert find_tracks.main([*arguments, "--batch_size", "4"]) == 0
    found = pq.read_table(output).to_pydict()
    assert found["number"] == rows["number"] and found["track_id"] == rows["track_id"]
    assert [path.name for path in output.parent.iterdir()] == ["predictions.parquet"]

    model = AutoModelForInstanceSegmentation.from_pretrained(tracker).eval()
    extractor = AutoFeatureExtractor.from_pretrained(tracker)
    for row in (0, 5):
        batch = extractor([{name: rows[name][row] for name in "Exyz"}], return_tensors="pt")
        with torch.no_grad():
            outputs = model(batch["points"])
        tracks = model.assign_tracks(outputs)[0].numpy()
        assert np.array_equal(np.asarray(found["predicted_track_id"][row])[batch["order"][0].numpy()], tracks)

    events = read_events(output)
    table = contingency(events.event, events["track_id"], events["predicted_track_id"], len(events))
    assert adjusted_rand_index(table)[0].mean() > 0.5
    assert evaluate_tracking.main(["--input", str(output)]) == 0
    assert "ARI:" in capsys.readouterr().out
    assert find_tracks.main([*arguments, "--max_events", "4"]) == 0
    assert len(pq.read_table(output)) == 4


def test_find_tracks_reads_large_lists(tracker, tmp_path):
    rows = make_events(3, seed=9)
    rows["noise"] = [[bool(value) for value in values] for values in rows["noise"]]
    table = pa.table(rows)
    large = [column.cast(pa.large_list(column.type.value_type)) for column in table.columns]
    found = []
    for number, events in enumerate((table, pa.table(large, names=table.column_names))):
        path, output = tmp_path / f"{number}.parquet", tmp_path / f"found{number}.parquet"
        pq.write_table(events, path)
        assert find_tracks.main(["--model", str(tracker), "--input", str(path), "--output", str(output)]) == 0
        found.append(pq.read_table(output)["predicted_track_id"].to_pylist())
    assert found[0] == found[1]
    assert evaluate_tracking.main(["--input", str(output)]) == 0


def test_find_tracks_leaves_out_long_events(tracker, tmp_path):
    rows = make_events(3, seed=7)
    extractor = AutoFeatureExtractor.from_pretrained(tracker)
    rows = {name: [values[0], values[1] * 80, values[2]] for name, values in rows.items()}
    assert len(rows["E"][1]) > extractor.max_points
    events, output = write(tmp_path / "events.parquet", rows), tmp_path / "found.parquet"
    arguments = ["--model", str(tracker), "--input", events, "--output", str(output)]
    assert find_tracks.main(arguments) == 2 and not output.exists()
    assert find_tracks.main([*arguments, "--drop_long_events"]) == 0
    assert len(pq.read_table(output)) == 2


# ---- straight lines from the features


def test_lines_are_those_of_numpy():
    rng = np.random.default_rng(0)
    features, other = (torch.from_numpy(rng.normal(3, [1, 20, 0.1], (size, 3))).float() for size in (400, 50))
    targets = features @ torch.tensor([[1.0, 0], [0.2, 1], [-5, 2]]) + torch.from_numpy(rng.normal(size=(400, 2)))
    found = tpc_probe.fit_line(features, targets, other).numpy()
    ones = [np.column_stack([values, np.ones(len(values))]) for values in (features.double(), other.double())]
    expected = ones[1] @ np.linalg.lstsq(ones[0], targets.double().numpy(), rcond=None)[0]
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3)
    # a feature that never changes is no trouble
    assert tpc_probe.fit_line(torch.ones(9, 1), torch.ones(9, 1), torch.ones(2, 1)).isfinite().all()


def test_probe_of_features(data, pretrained, capsys):
    files = ["--train", str(data / "train.parquet"), "--test", str(data / "validation.parquet")]
    assert tpc_probe.main(["--models", str(pretrained), "--random_models", "1", *files, "--batch_size", "5"]) == 0
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    names = [(line[0].strip("| "), line[1]) for line in lines]
    sets = ["mixture", "normalized", "last", "all"]
    assert names == [(name, features) for name in (str(pretrained), "random 1") for features in sets]
    numbers = {name: [float(number.strip("| ")) for number in line[2:]] for name, line in zip(names, lines)}
    for name in (str(pretrained), "random 1"):
        all_blocks, last = numbers[name, "all"], numbers[name, "last"]
        # coordinates can be read from all blocks, and a line from more numbers fits better
        assert all_blocks[3] > 0.5 and all_blocks[3] > last[3] - 0.05
        assert 0.5 < all_blocks[0] <= 1 and 0 < all_blocks[1] <= 1


def test_hostile_probes(data, pretrained, tmp_path, capsys):
    good = ["--models", str(pretrained), "--train", str(data / "train.parquet")]
    cases = [
        ([*good, "--test", str(data / "unlabeled.parquet")], "column 'noise' is missing"),
        ([*good, "--test", str(data / "none.parquet")], "none.parquet"),
        ([*good, "--test", str(data / "train.parquet"), "--train_events", "0"], "--train_events is 0"),
        (["--models", str(tmp_path), *good[2:], "--test", str(data / "train.parquet")], "no model that can be loaded"),
    ]
    for arguments, message in cases:
        assert tpc_probe.main(arguments) == 2
        output = capsys.readouterr()
        assert message in output.err and output.err.count("\n") == 1 and not output.out


# ---- malformed input


def test_hostile_options(data, pretrained, tmp_path):
    scratch = ["--config_overrides", BACKBONE, "--do_train", "--max_steps", "1"]
    trained = ["--model_name_or_path", str(pretrained), "--do_train", "--max_steps", "1"]
    cases = [
        (run_npp_pretraining, [*scratch], "order 'EPR' needs bin_edges"),
        (run_npp_pretraining, [*scratch, "--tokenizer_name", "x"], "--tokenizer_name: these models have a feature"),
        (run_npp_pretraining, [*scratch, *EXTRACTOR, "--paper_size", "m9"], "paper size is 'm9'"),
        (run_npp_pretraining, [*trained, "--paper_size", "m1"], "--paper_size: --model_name_or_path has a size"),
        (run_npp_pretraining, [*trained, "--bin_edges_events", "5"], "--bin_edges_events: the bin edges are those of"),
        (run_npp_pretraining, ["--model_type", "spade", "--do_train"], "model type 'spade' does not read TPC events"),
        (run_npp_pretraining, ["--config_overrides", "widht=3", "--do_train"], "has no widht"),
        (
            run_npp_pretraining,
            ["--config_overrides", "num_neighbors=7", "--feature_extractor_name", str(pretrained), "--do_train"],
            "num_neighbors is 5, the model has 7",
        ),
        (run_npp_pretraining, [*scratch, "--feature_extractor_overrides", "order=zigzag"], "order must be one of"),
        (run_npp_pretraining, [*scratch, "--window", "49"], "--window: is 49, expected at least 50"),
        (run_npp_pretraining, [*trained, "--fit_output_events", "8"], "--fit_output_events: the output layer of"),
        (run_tracking, [*trained, "--no_freeze_backbone", "--cache_block_outputs", "1"], "--cache_block_outputs"),
        (run_tracking, [*trained, "--cache_block_outputs", "1", "--dataloader_num_workers", "2"], "not with --stream"),
        (run_tracking, [*trained, "--do_predict"], "training/find_tracks.py writes predictions"),
        (run_token_classification, ["--paper_size", "m1", "--do_train"], "--paper_size: only with --target"),
    ]
    for number, (script, arguments, message) in enumerate(cases):
        with pytest.raises(InputError, match=message) as error:
            script.main([*flags(data, tmp_path / str(number)), *arguments])
        assert "\n" not in str(error.value)


def test_hostile_events(data, pretrained, tracker, tmp_path, capsys):
    good = make_events(6, seed=8)

    def broken(name, **changes):
        rows = {column: [list(values) for values in good[column]] for column in good}
        for column, (row, index, value) in changes.items():
            rows[column][row][index] = value
        return write(tmp_path / f"{name}.parquet", rows)

    unlabeled = write(tmp_path / "unlabeled.parquet", {name: good[name] for name in "Exyz"})
    nan = broken("nan", x=(4, 3, float("nan")))
    axis = {name: [list(values) for values in good[name]] for name in good}
    axis["x"][2][0] = axis["y"][2][0] = 0.0
    axis = write(tmp_path / "axis.parquet", axis)
    empty = write(tmp_path / "empty.parquet", {n: [*v[:2], [], *v[3:]] for n, v in good.items()})
    long = write(tmp_path / "long.parquet", {n: [values * 100 for values in v] for n, v in good.items()})
    trained = ["--model_name_or_path", str(pretrained), "--do_train", "--num_train_epochs", "1"]
    for number, (script, train_file, arguments, message) in enumerate(
        [
            (run_tracking, unlabeled, [], "train data: column 'track_id' is missing"),
            (run_token_classification, unlabeled, ["--target", "pid"], "train data: column 'pid' is missing"),
            (run_npp_pretraining, nan, [], r"training data: row 4: x\[3\] = nan"),
            (run_npp_pretraining, axis, [], r"training data: row 2: point 0 .* expected r > 0"),
            (run_npp_pretraining, empty, [], "training data: row 2: no points"),
            (run_npp_pretraining, long, [], r"training data: row \d: \d+ points; expected at most 3200"),
            (run_npp_pretraining, long, ["--drop_long_events"], "train data: no event has at most 3200 points"),
            (
                run_npp_pretraining,
                long,
                ["--drop_long_events", "--streaming", "--max_steps", "2"],
                "no event of 6 in the stream has at most 3200 points",
            ),
        ]
    ):
        output = tmp_path / str(number)
        with pytest.raises(InputError, match=message) as error:
            script.main([*flags(data, output), *trained, "--train_file", train_file, *arguments])
        assert "\n" not in str(error.value)

    text = tmp_path / "text.parquet"
    text.write_text("no parquet")
    other = write(tmp_path / "other.parquet", {"E": [1.0], "x": [1.0], "y": [1.0], "z": [1.0]})
    nulls = write(tmp_path / "nulls.parquet", {**good, "y": [*good["y"][:3], None, *good["y"][4:]]})
    output = tmp_path / "found.parquet"
    for model, inputs, message in (
        (["--model", str(tracker)], [nan], "nan.parquet: row 4: x[3] = nan"),
        (["--model", str(tracker)], [empty], "row 2: no points"),
        (["--model", str(tracker)], [str(text)], "not a readable Parquet file"),
        (["--model", str(tracker)], [other], "column 'E' holds double, not lists"),
        (["--model", str(tracker)], [nulls], "row 3: y is null"),
        (["--model", str(tracker)], [unlabeled, nan], "has other columns than"),
        (["--model", str(tracker), "--batch_size", "0"], [unlabeled], "--batch_size is 0, expected at least 1"),
        (["--model", str(pretrained)], [unlabeled], "not a model for this"),
        (["--pid_model", str(tracker)], [unlabeled], "expected 5"),
        (["--model", str(tmp_path)], [unlabeled], "no model that can be loaded"),
        ([], [unlabeled], "set --model, --pid_model or --noise_model"),
    ):
        assert find_tracks.main([*model, "--input", *inputs, "--output", str(output)]) == 2
        err = capsys.readouterr().err.replace("\r", "\n").splitlines()[-1]
        assert err.startswith("find_tracks.py: error: ") and message in err
        assert not output.exists() and not list(tmp_path.glob(".*partial"))


# ---- scaling


def test_scaling_study_goes_on_and_fits(data, tmp_path, capsys, monkeypatch):
    from hepzoo.training import scaling_study

    options = [*FLAGS.split(), "--cache_dir", str(data / "cache"), *EXTRACTOR, "--do_train", "--do_eval"]
    options += ["--train_file", str(data / "train.parquet"), "--validation_file", str(data / "validation.parquet")]
    options += ["--config_overrides", BACKBONE.replace("hidden_size=32,", ""), "--learning_rate", "3e-3"]
    study = ["--sizes", "m1", "--output", str(tmp_path)]
    assert scaling_study.main([*study, "--steps", "4", "--config_overrides", f"{BACKBONE}", *options]) == 0
    assert "no power law" in capsys.readouterr().out
    assert scaling_study.main([*study, "--steps", "4", "12", "--config_overrides", f"{BACKBONE}", *options]) == 0
    assert "error = " in capsys.readouterr().out
    report = json.loads((tmp_path / "scaling.json").read_text())
    assert [run["steps"] for run in report["runs"]] == [4, 12]
    assert report["runs"][1]["compute"] == pytest.approx(3 * report["runs"][0]["compute"])
    assert (tmp_path / "scaling.png").stat().st_size > 10_000
    assert scaling_study.main([*study, "--steps", "4", "--config_overrides", "x=1", *options]) == 2
    assert "other options" in capsys.readouterr().err


def test_power_law():
    from hepzoo.training.scaling_study import best_runs, fit_power_law

    compute = np.geomspace(1e9, 1e12, 7)
    fit = fit_power_law(compute, 3.0 * compute**-0.12)
    assert fit == pytest.approx({"amplitude": 3.0, "exponent": 0.12, "exponent_error": 0.0}, abs=1e-6)
    noisy = fit_power_law(compute, 3.0 * compute**-0.12 * np.exp(np.random.default_rng(0).normal(0, 0.05, 7)))
    assert abs(noisy["exponent"] - 0.12) < 3 * noisy["exponent_error"] < 0.1
    runs = [{"compute": c, "error": e} for c, e in ((4, 0.5), (1, 1.0), (2, 1.2), (3, 0.7), (9, 0.6))]
    assert [run["compute"] for run in best_runs(runs)] == [1, 3, 4]
    for wrong in (([1.0, 1.0], [2.0, 1.0]), ([1.0, 2.0], [0.0, 1.0])):
        with pytest.raises(ValueError):
            fit_power_law(*wrong)


def test_neighbor_monitor_follows_the_shift_of_the_labels():
    """With `label_shift` the loss compares a point with the neighbours of a later one: so must the logged errors."""
    torch.manual_seed(0)
    config = Fm4nppConfig(hidden_size=32, num_hidden_layers=1, state_size=4, num_neighbors=2, label_shift=1)
    model = Fm4nppForPreTraining(config).eval()
    monitor = run_npp_pretraining.NeighborMonitor()
    monitor.on_init_end(None, None, None, model=model)
    labels = torch.rand(2, 6, 6)
    labels[:, -1] = -100
    output = model(points=torch.rand(2, 6, 4), neighbor_labels=labels)
    logs = {"eval_loss": 0.0}
    monitor.on_log(None, SimpleNamespace(log_history=[]), None, logs=logs)
    assert logs["eval_mse"] == pytest.approx(output.loss.item(), rel=1e-5)


def test_hostile_point_metrics_without_a_label():
    with pytest.raises(ValueError, match="no point of any event has a label"):
        tpc_heads.point_metrics(SimpleNamespace(label_ids=np.full((2, 3), -100), predictions=np.zeros((2, 3), int)))
