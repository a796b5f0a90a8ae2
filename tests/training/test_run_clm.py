import json
import math
import shutil

import pytest
import torch

import hepzoo
from hepzoo.training.callbacks import LossMonitor
from hepzoo.training.data import InputError
from hepzoo.training.run_clm import main
from tests.training_runs import TINY, common_flags, history, launch, make_tracks, write_tracks

SMALL = ["--model_type", "cmhca_dirc", "--config_overrides", TINY, "--learning_rate", "0.01", "--do_train"]
SMALL += ["--per_device_train_batch_size", "8", "--lr_scheduler_type", "constant"]


def train(data, output, *flags: str) -> dict[int, float]:
    assert main([*SMALL, *common_flags(data, output), *flags]) == 0
    return history(output)


# small batches for the tokenizer: a stream of 96 tracks would be read ten times for the first 1000
SHORT = ["--preprocessing_batch_size", "16"]


def in_memory(data) -> list[str]:
    return ["--train_file", str(data / "train.parquet")]


def stream(data) -> list[str]:
    return ["--train_file", str(data / "shards"), "--streaming", "--shuffle_buffer_size", "20", *SHORT]


def test_accelerate_launch_trains_saves_and_loads(data, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    output = tmp_path / "run"
    flags = [*SMALL, *common_flags(data, output), *in_memory(data), "--num_train_epochs", "2"]
    flags += ["--validation_file", str(data / "validation.parquet"), "--do_eval"]
    result = launch("run_clm.py", flags)
    assert result.returncode == 0, result.stderr[-3000:]

    losses = history(output)
    assert len(losses) == 32
    assert all(math.isfinite(loss) for loss in losses.values())
    # untrained: ln 6147 + ln 5923
    assert losses[1] == pytest.approx(math.log(6147) + math.log(5923), abs=1.0)
    assert losses[32] < 0.7 * losses[1]
    space, time = history(output, "loss_space"), history(output, "loss_time")
    assert all(losses[step] == pytest.approx(space[step] + time[step], rel=1e-4) for step in losses)

    metrics = json.loads((output / "all_results.json").read_text())
    assert metrics["train_samples"] == 128
    assert metrics["eval_samples"] == 32
    assert metrics["train_tokens_per_second"] > 0
    assert metrics["eval_loss"] < 0.7 * losses[1]
    assert metrics["eval_perplexity"] == pytest.approx(
        metrics["eval_perplexity_space"] * metrics["eval_perplexity_time"], rel=1e-4
    )

    model = AutoModelForCausalLM.from_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert isinstance(model, hepzoo.CMHCADircForCausalLM)
    assert isinstance(tokenizer, hepzoo.CMHCADircTokenizer)
    assert model.generation_config.top_k == 0
    batch = tokenizer(make_tracks(32, seed=2), padding=True, return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"].unsqueeze(-1) == 0, -100)
    labels[:, : tokenizer.prefix_length] = -100
    with torch.no_grad():
        loss = model(**batch, labels=labels).loss.item()
    # Trainer averages over batches, this is the average over hits
    assert metrics["eval_loss_space"] + metrics["eval_loss_time"] == pytest.approx(loss, rel=1e-4)
    card = (output / "README.md").read_text()
    assert "library_name: transformers" in card and "run_clm.py" in card and "/tmp" not in card


def test_two_processes_equal_one_with_twice_the_batch(data, tmp_path):
    flags = [*SMALL, *in_memory(data), "--max_steps", "5", "--per_device_train_batch_size", "4"]
    flags += ["--validation_file", str(data / "validation.parquet"), "--do_eval"]
    result = launch("run_clm.py", [*flags, *common_flags(data, tmp_path / "two")], processes=2)
    assert result.returncode == 0, result.stderr[-3000:]
    one = train(data, tmp_path / "one", *flags, "--per_device_train_batch_size", "8")
    two = history(tmp_path / "two")
    assert two == pytest.approx(one, rel=1e-4)
    assert history(tmp_path / "two", "loss_time") == pytest.approx(history(tmp_path / "one", "loss_time"), rel=1e-4)
    results = [json.loads((tmp_path / name / "eval_results.json").read_text()) for name in ("one", "two")]
    assert results[0]["eval_loss_space"] == pytest.approx(results[1]["eval_loss_space"], rel=1e-4)


def test_two_processes_stream_uneven_shards_and_resume(data, tmp_path):
    flags = [*SMALL, *stream(data), "--max_steps", "24", "--save_strategy", "steps", "--save_steps", "12"]
    flags += ["--logging_steps", "1"]
    whole = tmp_path / "whole"
    result = launch("run_clm.py", [*common_flags(data, whole), *flags], processes=2)
    assert result.returncode == 0, result.stderr[-3000:]
    losses = history(whole)
    # 24 steps of 2 x 8 tracks: each rank passes several times over its shards
    assert len(losses) == 24
    assert losses[24] < 0.8 * losses[1]

    resumed = tmp_path / "resumed"
    shutil.copytree(whole / "checkpoint-12", resumed / "checkpoint-12")
    result = launch("run_clm.py", [*common_flags(data, resumed), *flags], processes=2)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "resuming from" in result.stderr
    assert history(resumed) == pytest.approx(losses, rel=1e-6)


@pytest.mark.parametrize("source", [in_memory, stream])
def test_interrupted_and_resumed_run_has_the_same_loss_curve(data, tmp_path, monkeypatch, source):
    flags = [*source(data), "--max_steps", "22", "--save_strategy", "steps", "--save_steps", "5"]
    flags += ["--optimizer", "radam", "--lr_scheduler_type", "cosine"]
    expected = train(data, tmp_path / "whole", *flags)

    class Interruption(Exception):
        pass

    def interrupt(self, args, state, control, **kwargs):
        if state.global_step == 18:
            raise Interruption

    with monkeypatch.context() as patch:
        patch.setattr(LossMonitor, "on_step_end", interrupt)
        with pytest.raises(Interruption):
            train(data, tmp_path / "broken", *flags)
    assert (tmp_path / "broken" / "checkpoint-15").is_dir()
    # 16 steps are one pass over the data in memory: the second pass is resumed too
    assert train(data, tmp_path / "broken", *flags) == expected

    weights = [
        torch.load(tmp_path / name / "checkpoint-20" / "optimizer.pt", weights_only=True)["state"][0]["exp_avg"]
        for name in ("whole", "broken")
    ]
    assert torch.equal(*weights)


def test_resume_false_starts_anew(data, tmp_path):
    flags = [*in_memory(data), "--max_steps", "2", "--save_strategy", "steps", "--save_steps", "1"]
    first = train(data, tmp_path, *flags)
    assert train(data, tmp_path, *flags, "--resume_from_checkpoint", "false") == first


def test_gradient_accumulation_equals_a_big_batch(data, tmp_path):
    flags = [*in_memory(data), "--max_steps", "5"]
    big = train(data, tmp_path / "big", *flags)
    small = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "4"]
    assert train(data, tmp_path / "accumulated", *flags, *small) == pytest.approx(big, rel=1e-5)


def test_options_from_json_and_yaml_files_and_flags_over_them(data, tmp_path):
    import yaml

    options = {
        "model_type": "cmhca_dirc",
        "config_overrides": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": [4, 2]},
        "train_file": [str(data / "train.parquet")],
        "do_train": True,
        "learning_rate": "1e-2",
        "per_device_train_batch_size": 8,
        "max_steps": 3,
        "accelerator_config": {"even_batches": True},
    }
    (tmp_path / "options.json").write_text(json.dumps(options))
    (tmp_path / "options.yaml").write_text(yaml.safe_dump(options))
    curves = []
    for name in ("options.json", "options.yaml"):
        output = tmp_path / name.replace(".", "_")
        assert main([str(tmp_path / name), *common_flags(data, output), "--max_steps", "2"]) == 0
        curves.append(history(output))
        config = json.loads((output / "config.json").read_text())
        assert config["num_attention_heads"] == [4, 2]
    assert curves[0] == curves[1]
    assert list(curves[0]) == [1, 2]


@pytest.mark.parametrize("experts", [0, 2])
def test_fine_tuning_from_a_checkpoint(data, tmp_path, experts):
    overrides = ["--config_overrides", f"{TINY},num_experts={experts}"]
    train(data, tmp_path / "first", *in_memory(data), "--num_train_epochs", "2", *overrides)
    output = tmp_path / "second"
    flags = ["--model_name_or_path", str(tmp_path / "first"), "--do_train", "--max_steps", "2", *in_memory(data)]
    assert main([*flags, *common_flags(data, output), "--learning_rate", "1e-5"]) == 0
    assert history(output)[1] == pytest.approx(history(tmp_path / "first")[32], abs=1.5)
    assert history(output)[1] < 14


def test_config_file_and_configured_tokenizer(data, tmp_path):
    """A model from scratch follows the tokenizer of another detector; a stored configuration must agree with it."""
    from transformers import AutoTokenizer

    tokenizer = hepzoo.CMHCADircTokenizer(time_min=15.0, time_max=60.0, time_resolution=0.5, time_vocab_size=93)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    flags = [*in_memory(data), "--max_steps", "1", "--tokenizer_name", str(tmp_path / "tokenizer")]
    train(data, tmp_path / "run", *flags)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["time_vocab_size"] == 93
    assert AutoTokenizer.from_pretrained(tmp_path / "run").time_resolution == 0.5

    hepzoo.CMHCADircConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4).save_pretrained(tmp_path / "c")
    flags[-2:] = ["--config_name", str(tmp_path / "c" / "config.json"), "--do_train"]
    assert main([*flags, *common_flags(data, tmp_path / "run2")]) == 0
    with pytest.raises(InputError, match="does not fit the model: time_vocab_size is 93, the model has 5923"):
        main([*flags, *common_flags(data, tmp_path / "run3"), "--tokenizer_name", str(tmp_path / "tokenizer")])


def bad_data(folder, **changes):
    columns = make_tracks(20, seed=5)
    for name, change in changes.items():
        if change is None:
            del columns[name]
        else:
            columns[name][13] = change(columns[name][13])
    return write_tracks(folder / "bad.parquet", columns)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"leadTime": None}, r"training data: column leadTime is missing"),
        ({"P": lambda p: 40.0}, r"training data: row 13: P = 40 is outside \[0.5, 10\]"),
        ({"leadTime": lambda t: [float("nan"), *t[1:]]}, r"training data: row 13: leadTime\[0\] = nan"),
        ({"pmtID": lambda ids: [24, *ids[1:]]}, r"training data: row 13: pmtID\[0\] = 24 is not"),
        ({"PDG": lambda code: 2212}, r"training data: row 13: PDG = 2212 is not a known class"),
    ],
)
def test_hostile_records_name_the_row(data, tmp_path, changes, message):
    path = bad_data(tmp_path, **changes)
    with pytest.raises(InputError, match=message) as error:
        train(data, tmp_path / "run", "--train_file", path, "--preprocessing_batch_size", "8")
    assert "\n" not in str(error.value)


def test_hostile_records_in_a_stream(data, tmp_path):
    path = bad_data(tmp_path, P=lambda p: 40.0)
    with pytest.raises(InputError, match="training data: row 13: P = 40 is outside") as error:
        train(data, tmp_path / "run", "--train_file", path, "--streaming", "--max_steps", "9")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("where", ["here", "worker", "command"])
def test_hostile_stream_without_a_usable_row(tmp_path, where):
    """It would be read forever: the second pass ends it, with what was wrong in the first, in one line."""
    columns = make_tracks(20, seed=5)
    columns["P"][:12] = [40.0] * 12
    columns["Theta"][12:] = [5.0] * 8
    path = write_tracks(tmp_path / "bad.parquet", columns)
    flags = [*SMALL, *common_flags(tmp_path, tmp_path / "run"), "--train_file", path, "--streaming", *SHORT]
    flags += ["--max_steps", "9", "--tokenizer_kwargs", "on_invalid=drop_tracks"]
    line = (
        "training data: all 20 rows of a pass over the stream were dropped as invalid (track:P x 12, track:Theta x 8)"
    )
    if where == "command":
        result = launch("run_clm.py", [*flags, "--dataloader_num_workers", "1"])
        assert result.returncode != 0
        assert f"run_clm.py: error: {line}" in result.stderr.splitlines()
    else:
        with pytest.raises(InputError) as error:
            main([*flags, "--dataloader_num_workers", str(int(where == "worker"))])
        # a worker process puts its traceback in front
        assert str(error.value).splitlines()[-1].endswith(line)
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_stream_of_mostly_invalid_records(tmp_path):
    """Rows that are dropped are no reason to stop as long as there are others; passes of the same rows go on."""
    columns = make_tracks(40, seed=5)
    columns["P"] = [value if row == 33 else 40.0 for row, value in enumerate(columns["P"])]
    path = write_tracks(tmp_path / "bad.parquet", columns)
    flags = ["--train_file", path, "--streaming", "--shuffle_buffer_size", "4", "--preprocessing_batch_size", "7"]
    losses = train(
        tmp_path, tmp_path / "run", *flags, "--max_steps", "3", "--tokenizer_kwargs", "on_invalid=drop_tracks"
    )
    assert len(losses) == 3 and all(math.isfinite(loss) for loss in losses.values())


def test_hostile_records_dropped_on_request(data, tmp_path):
    path = bad_data(tmp_path, P=lambda p: 40.0)
    flags = ["--train_file", path, "--max_steps", "1", "--tokenizer_kwargs", "on_invalid=drop_tracks"]
    train(data, tmp_path / "run", *flags)
    assert json.loads((tmp_path / "run" / "train_results.json").read_text())["train_samples"] == 19


def test_hostile_options(data, tmp_path):
    (tmp_path / "text.txt").write_text("no data")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 but no more")
    (tmp_path / "list.json").write_text("[1, 2]")
    (tmp_path / "unknown.yaml").write_text("learning_speed: 1")
    (tmp_path / "empty").mkdir()
    file = in_memory(data)
    cases = [
        (["--train_file", str(tmp_path / "absent.parquet")], r"--train_file: no file .*absent.parquet"),
        (["--train_file", str(tmp_path / "*.arrow")], r"--train_file: no file"),
        (["--train_file", str(tmp_path / "empty")], r"--train_file: folder .* has no .parquet"),
        (["--train_file", str(tmp_path / "text.txt")], r"text.txt: expected files of one format"),
        (["--train_file", str(tmp_path / "broken.parquet")], r"--train_file: cannot read the train data"),
        ([], r"--do_train: no training data"),
        ([*file, "--streaming"], r"--streaming: a stream has no end, set --max_steps"),
        ([*stream(data), "--max_steps", "1", "--do_eval"], r"--do_eval: a stream is not split, set --validation_file"),
        ([*file, "--do_eval", "--validation_split_percentage", "0.1"], r"--validation_split_percentage: 0.1 %"),
        ([*file, "--config_overrides", "hidden_sise=3"], r"has no hidden_sise"),
        ([*file, "--config_overrides", "hidden_size"], r"--config_overrides: expected name=value"),
        ([*file, "--config_overrides", "hidden_size=30,num_attention_heads=4"], r"not a multiple of the 4"),
        ([*file, "--config_overrides", "vocab_size=100"], r"the tokenizer does not fit|space_vocab_size"),
        ([*file, "--model_type", "no_such_family"], r"--model_type no_such_family: "),
        ([*file, "--tokenizer_name", str(tmp_path)], r"--tokenizer_name .*: no tokenizer"),
        (
            [*file, "--tokenizer_overrides", "time_max=3"],
            r"cannot build the default tokenizer of .*: time range",
        ),
        ([*file, "--tokenizer_kwargs", "on_invalid=maybe"], r"training data: on_invalid must be"),
        ([*file, "--dtype", "float31"], r"--dtype float31: expected"),
        ([*file, "--resume_from_checkpoint", str(tmp_path)], r"--resume_from_checkpoint: .* is not a checkpoint"),
        ([*file, "--max_train_samples", "0"], r"max samples of the train data is 0"),
    ]
    for index, (flags, message) in enumerate(cases):
        with pytest.raises(InputError, match=message) as error:
            train(data, tmp_path / f"run{index}", *flags)
        assert "\n" not in str(error.value), flags
    for name, message in [
        ("list.json", "expected a mapping"),
        ("unknown.yaml", "unknown option learning_speed"),
        ("absent.json", "No such file"),
    ]:
        with pytest.raises(InputError, match=message):
            main([str(tmp_path / name)])
    with pytest.raises(InputError, match="set --model_name_or_path"):
        main([*common_flags(data, tmp_path / "x"), *file, "--do_train"])


def test_hostile_input_ends_the_launched_script_with_one_line(data, tmp_path):
    flags = [*SMALL, *common_flags(data, tmp_path / "run"), "--train_file", str(tmp_path / "absent.parquet")]
    result = launch("run_clm.py", flags)
    assert result.returncode != 0
    lines = [line for line in result.stderr.splitlines() if line.startswith("run_clm.py: error:")]
    assert lines == [f"run_clm.py: error: --train_file: no file {tmp_path / 'absent.parquet'}"]
    assert not (tmp_path / "run").exists()
