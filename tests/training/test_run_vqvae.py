import json
import math

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

import hepzoo
from hepzoo.training.data import InputError
from hepzoo.training.run_vqvae import TokenMonitor, main
from hepzoo.training.tokenize_jets import main as tokenize_main
from tests.training.jets import make_jets, write_jets
from tests.training_runs import common_flags, history, launch

SMALL = "codebook_size=16,latent_size=2,hidden_size=16,num_hidden_layers=1,num_attention_heads=2"
FLAGS = ["--config_overrides", SMALL, "--per_device_train_batch_size", "16", "--learning_rate", "3e-3", "--do_train"]


@pytest.fixture(scope="module")
def jets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("jets")
    write_jets(folder / "train.parquet", make_jets(128, seed=1))
    write_jets(folder / "validation.parquet", make_jets(40, seed=2))
    return folder


def test_launched_training_writes_a_tokenizer_that_reconstructs(jets, tmp_path):
    output = tmp_path / "run"
    flags = [*FLAGS, *common_flags(jets, output), "--train_file", str(jets / "train.parquet"), "--max_steps", "60"]
    flags += ["--validation_file", str(jets / "validation.parquet"), "--do_eval", "--per_device_eval_batch_size", "7"]
    result = launch("run_vqvae.py", flags)
    assert result.returncode == 0, result.stderr[-3000:]
    losses = history(output, "loss_reconstruction")
    assert np.mean([losses[step] for step in range(51, 61)]) < 0.5 * losses[1]

    # the folder is the model and, with the same weights, the tokenizer
    model, tokenizer = AutoModel.from_pretrained(output), AutoTokenizer.from_pretrained(output)
    assert isinstance(tokenizer, hepzoo.OmniJetTokenizer)
    for name, weight in tokenizer.vqvae.state_dict().items():
        torch.testing.assert_close(weight, model.state_dict()[name], rtol=0, atol=0)

    # the logged measures of the validation set follow from the saved tokenizer
    metrics = json.loads((output / "all_results.json").read_text())
    codes = np.concatenate([ids[1:-1] - 1 for ids in tokenizer(make_jets(40, seed=2))["input_ids"]])
    share = np.bincount(codes, minlength=16) / len(codes)
    assert metrics["eval_codebook_usage"] == pytest.approx((share > 0).mean())
    entropy = -(share[share > 0] * np.log(share[share > 0])).sum()
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(entropy), rel=1e-4)
    assert 0 < metrics["eval_reconstruction_loss"] < metrics["eval_loss"]


def test_features_and_limits_of_the_tokenizer_reach_the_model(jets, tmp_path):
    features = {"part_pt": {"function": "log"}, "part_etarel": {}, "part_phirel": {}, "part_erel": {"function": "log"}}
    overrides = json.dumps({"features": features, "model_max_length": 32})
    flags = [*FLAGS, *common_flags(jets, tmp_path), "--train_file", str(jets / "train.parquet"), "--max_steps", "2"]
    assert main([*flags, "--tokenizer_overrides", overrides]) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.feature_names == list(features)
    assert tokenizer.model_max_length == 32
    assert tokenizer.vqvae.config.num_features == 4
    # and training goes on from the folder
    again = tmp_path / "again"
    flags = ["--model_name_or_path", str(tmp_path), "--do_train", *common_flags(jets, again), "--max_steps", "1"]
    assert main([*flags, "--train_file", str(jets / "train.parquet"), "--learning_rate", "0"]) == 0
    weights = AutoModel.from_pretrained(again).encoder.state_dict()
    for name, weight in tokenizer.vqvae.encoder.state_dict().items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=0)


def test_interrupted_run_continues(jets, tmp_path):
    """Codebook counts and k-means initialisation are part of the checkpoints."""
    flags = [*FLAGS, "--train_file", str(jets / "train.parquet")]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    schedule = ["--lr_scheduler_type", "constant"]
    saving = ["--save_strategy", "steps", "--save_steps", "4"]
    assert main([*flags, *common_flags(jets, whole), "--max_steps", "8", *schedule, *saving]) == 0
    assert main([*flags, *common_flags(jets, parts), "--max_steps", "4", *schedule, *saving]) == 0
    assert main([*flags, *common_flags(jets, parts), "--max_steps", "8", *schedule, *saving]) == 0
    assert history(parts) == pytest.approx(history(whole), rel=1e-4)


def test_token_monitor_weighs_by_constituents():
    monitor = TokenMonitor(codebook_size=4)
    model = torch.nn.Module().eval()
    for loss, mask in ((1.0, [[1, 1, 1]]), (3.0, [[1, 0, 0]])):
        output = hepzoo.modeling.modeling_omnijet_vqvae.OmniJetVQVAEOutput(
            loss=torch.tensor(loss),
            reconstruction_loss=torch.tensor(loss),
            codes=torch.tensor([[0, 1, 0]]),
        )
        monitor._after_forward(model, (), {"attention_mask": torch.tensor(mask)}, output)
    logs = {"eval_loss": 0.0}
    monitor.on_log(None, type("State", (), {"log_history": []}), None, logs)
    assert logs["eval_reconstruction_loss"] == pytest.approx((3 * 1.0 + 1 * 3.0) / 4)
    assert logs["eval_codebook_usage"] == 0.5  # codes 0 (three times) and 1
    assert logs["eval_perplexity"] == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model_type", "omnijet", "--config_overrides", "codebook_size=16"], "no VQ-VAE, expected 'omnijet_vqvae'"),
        (["--config_overrides", f"{SMALL},num_features=2"], "num_features = 2, but the tokenizer has 3"),
        (["--config_overrides", f"{SMALL},num_jet_features=2"], "num_jet_features must be 0"),
        (["--config_overrides", "codes=3"], "OmniJetVQVAEConfig has no codes"),
        (["--tokenizer_overrides", "sorting=mass"], "sorting must be None"),
        (["--tokenizer_kwargs", "max_length=4"], "training data: row 0: .* constituents; expected at most 4"),
    ],
)
def test_hostile_options(jets, tmp_path, flags, message):
    arguments = [*FLAGS, *common_flags(jets, tmp_path), "--train_file", str(jets / "train.parquet"), *flags]
    with pytest.raises(InputError, match=message) as error:
        main([*arguments, "--max_steps", "1"])
    assert "\n" not in str(error.value)


def test_hostile_jets(jets, tmp_path):
    columns = make_jets(20, seed=3)
    columns["part_px"][7][1] = float("nan")
    path = write_jets(tmp_path / "bad.parquet", columns)
    with pytest.raises(InputError, match=r"training data: row 7: part_px\[1\] = nan is not a finite number"):
        main([*FLAGS, *common_flags(jets, tmp_path / "run"), "--train_file", path, "--max_steps", "1"])


def test_hostile_tokenize_jets(jets, tmp_path, capsys):
    folder = tmp_path / "tokenizer"
    hepzoo.OmniJetTokenizer(codebook_size=16).save_pretrained(folder)
    arguments = ["--input", str(jets / "train.parquet"), "--output", str(tmp_path / "out.parquet")]
    assert tokenize_main(["--tokenizer", str(folder), *arguments]) == 2
    assert "no VQ-VAE in the folder vqvae" in capsys.readouterr().err
    assert tokenize_main(["--tokenizer", str(tmp_path), *arguments]) == 2
    assert "no tokenizer that can be loaded" in capsys.readouterr().err
    assert not (tmp_path / "out.parquet").exists()
