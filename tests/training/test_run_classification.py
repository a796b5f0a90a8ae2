import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from transformers import EvalPrediction

import hepzoo
from hepzoo.training.data import InputError
from hepzoo.training.run_classification import classification_metrics, main, rejection_at_efficiency
from tests.training_runs import TINY, common_flags, history, launch, make_tracks, write_tracks

FLAGS = ["--do_train", "--per_device_train_batch_size", "16", "--learning_rate", "3e-3"]
SCRATCH = ["--model_type", "cmhca_dirc", "--config_overrides", f"{TINY},embedding_initializer_range=0.1"]


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    """An untrained generator with experts, and its tokenizer."""
    folder = tmp_path_factory.mktemp("generator")
    config = hepzoo.CMHCADircConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_experts=4)
    hepzoo.CMHCADircForCausalLM(config).save_pretrained(folder)
    hepzoo.CMHCADircTokenizer().save_pretrained(folder)
    return folder


def test_launched_classifier_separates_and_predicts(data, tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tracks = make_tracks(40, seed=7)
    test_file = write_tracks(tmp_path / "test.parquet", tracks)
    output = tmp_path / "run"
    flags = [*SCRATCH, *FLAGS, *common_flags(data, output), "--train_file", str(data / "train.parquet")]
    flags += ["--num_train_epochs", "8", "--validation_file", str(data / "validation.parquet"), "--do_eval"]
    flags += ["--test_file", test_file, "--do_predict", "--per_device_eval_batch_size", "7"]
    result = launch("run_classification.py", flags, processes=2)
    assert result.returncode == 0, result.stderr[-3000:]

    metrics = json.loads((output / "all_results.json").read_text())
    assert metrics["eval_accuracy"] > 0.9
    assert metrics["eval_auc"] > 0.95
    assert metrics["eval_rejection_at_30"] >= metrics["eval_rejection_at_90"] > 0.8

    table = pq.read_table(output / "predictions.parquet").to_pydict()
    assert table["row_index"] == list(range(40))
    for name in ("P", "Theta", "PDG"):
        assert table[name] == tracks[name]
    assert table["label"] == [int(code == 321) for code in tracks["PDG"]]
    model = AutoModelForSequenceClassification.from_pretrained(output).eval()
    batch = AutoTokenizer.from_pretrained(output)(tracks, padding=True, return_tensors="pt", return_class_ids=False)
    np.testing.assert_allclose(table["logit"], model(**batch).logits[:, 0].detach().numpy(), atol=1e-4)


def test_fine_tuning_averages_experts_and_freezes_the_backbone(data, tmp_path, generator):
    flags = [*FLAGS, "--train_file", str(data / "train.parquet"), "--max_steps", "3", "--model_name_or_path"]
    flags += [str(generator), "--config_overrides", "classifier_dropout=0.1"]
    assert main([*flags, *common_flags(data, tmp_path), "--freeze_backbone"]) == 0
    before = hepzoo.CMHCADircForCausalLM.from_pretrained(generator)
    after = hepzoo.CMHCADircForSequenceClassification.from_pretrained(tmp_path)
    assert after.config.num_experts == 0
    assert after.config.classifier_dropout == 0.1
    mlp = before.model.layers[0].mlp
    mean = sum(expert.fc1.weight for expert in mlp.experts) / 4
    np.testing.assert_allclose(after.model.layers[0].mlp.fc1.weight.detach(), mean.detach(), atol=1e-6)
    frozen, old = after.model.state_dict(), before.model.state_dict()
    for name in ("embeddings.space.weight", "layers.1.attention.q_proj.weight", "norm.weight"):
        np.testing.assert_array_equal(frozen[name], old[name])
    assert len(history(tmp_path)) == 3


def test_gradient_accumulation_equals_a_big_batch(data, tmp_path):
    flags = [*SCRATCH, *FLAGS, "--train_file", str(data / "train.parquet"), "--max_steps", "3"]
    small = ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "4"]
    assert main([*flags, *common_flags(data, tmp_path / "big")]) == 0
    assert main([*flags, *common_flags(data, tmp_path / "small"), *small]) == 0
    assert history(tmp_path / "small") == pytest.approx(history(tmp_path / "big"), rel=1e-5)


def test_metrics_against_direct_counting():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 500)
    scores = rng.normal(labels * 1.5, 1.0)
    metrics = classification_metrics(EvalPrediction(scores[:, None], labels))
    pairs = scores[labels == 1][:, None] > scores[labels == 0][None, :]
    assert metrics["auc"] == pytest.approx(pairs.mean())
    assert metrics["accuracy"] == pytest.approx(np.mean((scores > 0) == labels))
    two = np.stack([np.zeros(500), scores], axis=1)
    assert classification_metrics(EvalPrediction(two, labels)) == metrics
    for efficiency in (0.3, 0.5, 0.9):
        cut = np.quantile(scores[labels == 1], 1 - efficiency, method="higher")
        rejection = rejection_at_efficiency(scores, labels, efficiency)
        assert rejection == pytest.approx(np.mean(scores[labels == 0] < cut), abs=0.01)
    assert rejection_at_efficiency(np.array([0.0, 1.0]), np.array([0, 1]), 1.0) == 1.0
    assert set(classification_metrics(EvalPrediction(scores[:, None], np.ones(500)))) == {"accuracy"}


def test_hostile_data_without_labels(data, tmp_path):
    columns = make_tracks(8)
    del columns["PDG"]
    path = write_tracks(tmp_path / "unlabelled.parquet", columns)
    flags = [*SCRATCH, *common_flags(data, tmp_path / "run")]
    with pytest.raises(InputError, match="training data: column PDG is missing"):
        main([*flags, *FLAGS, "--train_file", path, "--max_steps", "1"])
    with pytest.raises(InputError, match="--freeze_backbone: fresh weights"):
        main([*flags, *FLAGS, "--train_file", str(data / "train.parquet"), "--freeze_backbone"])
    # predictions need no labels
    assert main([*flags, "--test_file", path, "--do_predict"]) == 0
    table = pq.read_table(tmp_path / "run" / "predictions.parquet")
    assert table.num_rows == 8
    assert "label" not in table.column_names
