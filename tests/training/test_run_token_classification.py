import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import EvalPrediction

import hepzoo
from hepzoo.training.callbacks import SetCollatorEpoch
from hepzoo.training.data import DarkNoise, DarkNoiseCollator, InputError
from hepzoo.training.run_token_classification import filter_metrics, main
from tests.training_runs import TINY, common_flags, history, make_tracks, write_tracks

SCRATCH = ["--model_type", "cmhca_dirc", "--config_overrides", f"{TINY},embedding_initializer_range=0.1"]
FLAGS = ["--do_train", "--per_device_train_batch_size", "16", "--learning_rate", "3e-3"]
FLAGS += SCRATCH


def records(number: int, seed: int = 0) -> list[dict]:
    columns = make_tracks(number, seed)
    return [{"row": row, **{name: values[row] for name, values in columns.items()}} for row in range(number)]


def test_filter_finds_noise_and_predicts(data, tmp_path):
    from transformers import AutoModelForTokenClassification, AutoTokenizer

    tracks = make_tracks(30, seed=7)
    test_file = write_tracks(tmp_path / "test.parquet", tracks)
    output = tmp_path / "run"
    flags = [*FLAGS, *common_flags(data, output), "--train_file", str(data / "train.parquet")]
    flags += ["--num_train_epochs", "12", "--validation_file", str(data / "validation.parquet"), "--do_eval"]
    flags += ["--test_file", test_file, "--do_predict", "--per_device_eval_batch_size", "7"]
    assert main(flags) == 0

    metrics = json.loads((output / "all_results.json").read_text())
    assert metrics["eval_auc"] > 0.85
    assert metrics["eval_average_precision"] > metrics["eval_noise_fraction"] + 0.1
    assert 0.3 < metrics["eval_noise_fraction"] < 0.6  # about 6 in 9 to 7 photons

    table = pq.read_table(output / "predictions.parquet").to_pydict()
    assert len(table["noise_logit"]) == 30
    for row in range(30):
        is_noise = np.asarray(table["is_noise"][row])
        # the track's own photons in their order, then the noise
        assert table["pmtID"][row][: (is_noise == 0).sum()] == tracks["pmtID"][row]
        assert len(table["noise_logit"][row]) == table["NHits"][row] == len(is_noise)
    model = AutoModelForTokenClassification.from_pretrained(output).eval()
    tokenizer = AutoTokenizer.from_pretrained(output)
    row = 11
    record = {name: table[name][row] for name in ("P", "Theta", "pmtID", "pixelID", "leadTime")}
    with torch.no_grad():
        logits = model(**tokenizer([record], padding=True, return_tensors="pt")).logits[0, :, 0].numpy()
    in_time_order = np.asarray(table["noise_logit"][row])[np.argsort(table["leadTime"][row], kind="stable")]
    np.testing.assert_allclose(logits[tokenizer.prefix_length : -1], in_time_order, atol=1e-4)


def test_noise_is_new_in_every_pass_and_the_same_after_a_resume(data, tmp_path, monkeypatch):
    flags = [*FLAGS, "--train_file", str(data / "train.parquet"), "--max_steps", "14"]
    flags += ["--save_strategy", "steps", "--save_steps", "4"]
    assert main([*flags, *common_flags(data, tmp_path / "whole")]) == 0
    expected = history(tmp_path / "whole")

    class Interruption(Exception):
        pass

    def interrupt(self, args, state, control, **kwargs):
        if state.global_step == 11:
            raise Interruption

    with monkeypatch.context() as patch:
        patch.setattr(SetCollatorEpoch, "on_step_end", interrupt)
        with pytest.raises(Interruption):
            main([*flags, *common_flags(data, tmp_path / "broken")])
    # 8 steps are one pass: the resumed run is in the second
    assert main([*flags, *common_flags(data, tmp_path / "broken")]) == 0
    assert history(tmp_path / "broken") == expected


def test_collator_draws_by_seed_pass_and_row():
    tokenizer = hepzoo.CMHCADircTokenizer()
    collator = DarkNoiseCollator(tokenizer, DarkNoise(tokenizer, seed=1))
    first = collator(records(64))
    again = collator(records(64))
    assert all(torch.equal(first[name], again[name]) for name in first)
    collator.set_epoch(1)
    assert not torch.equal(collator(records(64))["labels"][:, :12], first["labels"][:, :12])

    labels, ids = first["labels"], first["input_ids"]
    hits = (ids[..., 0] > 0) & (ids[..., 0] < tokenizer.space_eos_token_id)
    assert torch.equal(labels != -100, hits)
    assert (labels == 0).sum() == sum(record["NHits"] for record in records(64))
    # 24 PMTs x 28 kHz x 100 x 91 ns
    assert (labels == 1).sum() / 64 == pytest.approx(6.12, abs=1.0)
    times = tokenizer.tokens_to_times(ids[..., 1][labels == 1].numpy())
    assert times.min() >= 9 and times.max() < 100 and times.max() > 80


def test_labels_from_the_records(data, tmp_path):
    columns = make_tracks(32, seed=3)
    columns["is_noise"] = [[int(pixel % 2) for pixel in pixels] for pixels in columns["pixelID"]]
    path = write_tracks(tmp_path / "labelled.parquet", columns)
    flags = ["--validation_file", path, "--do_eval", *SCRATCH, *common_flags(data, tmp_path / "run")]
    assert main(flags) == 0
    metrics = json.loads((tmp_path / "run" / "eval_results.json").read_text())
    fraction = np.mean(np.concatenate([np.asarray(noise) for noise in columns["is_noise"]]))
    assert metrics["eval_noise_fraction"] == pytest.approx(fraction)


def test_metrics_against_direct_counting():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, (40, 9))
    scores = rng.normal(labels * 2.0 - 1.0, 1.0)
    padded = np.where(rng.random((40, 9)) < 0.2, -100, labels)
    metrics = filter_metrics(EvalPrediction(scores[..., None], padded))
    noise, photon = scores[padded == 1], scores[padded == 0]
    assert metrics["auc"] == pytest.approx((noise[:, None] > photon[None, :]).mean())
    assert metrics["recall"] == pytest.approx((noise > 0).mean())
    assert metrics["signal_retention"] == pytest.approx((photon <= 0).mean())
    assert metrics["precision"] == pytest.approx((noise > 0).sum() / ((noise > 0).sum() + (photon > 0).sum()))
    assert "auc" not in filter_metrics(EvalPrediction(scores[..., None], np.zeros_like(labels)))


def test_hostile_noise_options_and_records(data, tmp_path):
    train = ["--train_file", str(data / "train.parquet"), "--max_steps", "1"]
    cases = [
        ([*train, "--noise_window", "200", "300"], "the noise window 200 to 300 ns is outside"),
        ([*train, "--noise_window", "3"], "--noise_window: expected 2 times, got 1"),
        ([*train, "--noise_scale", "-1"], "the noise scale is -1.0"),
        ([*train, "--tokenizer_kwargs", "on_invalid=drop_hits"], "every hit has a label"),
    ]
    columns = make_tracks(8, seed=1)
    columns["leadTime"][5][0] = 500.0
    bad = write_tracks(tmp_path / "bad.parquet", columns)
    cases.append((["--train_file", bad, "--max_steps", "1"], r"training data: row 5: leadTime\[0\] = 500"))
    for index, (flags, message) in enumerate(cases):
        with pytest.raises(InputError, match=message) as error:
            main([*FLAGS, *common_flags(data, tmp_path / str(index)), *flags])
        assert "\n" not in str(error.value)
