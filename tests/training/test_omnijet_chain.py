"""Jets to tokens, a generator, generated jets, and a tagger, through the scripts that users run."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import hepzoo
from hepzoo.evaluation.evaluate_jets import main as evaluate_jets
from hepzoo.evaluation.token_quality import main as evaluate_tokens
from hepzoo.training.data import InputError
from hepzoo.training.generate_jets import main as generate_jets
from hepzoo.training.generate_jets import read_axes
from hepzoo.training.run_classification import main as run_classification
from hepzoo.training.run_clm import main as run_clm
from hepzoo.training.run_vqvae import main as run_vqvae
from hepzoo.training.tokenize_jets import main as tokenize_jets
from tests.training.jets import make_jets, write_jets
from tests.training_runs import ROOT, common_flags, history

TINY = "hidden_size=32,num_hidden_layers=2,num_attention_heads=4,intermediate_size=64,embedding_initializer_range=0.1"
CLASSES = ["--classes", "label_QCD", "label_Tbqq"]
CLASSIFY = ["--do_train", "--per_device_train_batch_size", "16", "--learning_rate", "3e-3"]


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """A folder with jets (train, test), a trained tokenizer and a trained generator."""
    folder = tmp_path_factory.mktemp("chain")
    train = write_jets(folder / "train.parquet", make_jets(256, seed=1))
    write_jets(folder / "test.parquet", make_jets(60, seed=2))
    small = "codebook_size=32,latent_size=2,hidden_size=16,num_hidden_layers=1,num_attention_heads=2"
    flags = ["--do_train", "--per_device_train_batch_size", "32", "--learning_rate", "5e-3", "--train_file", train]
    flags += ["--tokenizer_overrides", "model_max_length=24"]
    assert (
        run_vqvae([*flags, "--config_overrides", small, "--max_steps", "60", *common_flags(folder, folder / "vq")]) == 0
    )
    flags = ["--model_type", "omnijet", "--tokenizer_name", str(folder / "vq"), "--config_overrides", TINY, *flags[:-2]]
    assert run_clm([*flags, "--max_steps", "80", *common_flags(folder, folder / "gpt")]) == 0
    return folder


def test_generator_has_learned_the_tokens(chain):
    losses = history(chain / "gpt")
    assert losses[80] < 0.85 * losses[1]
    config = AutoModelForCausalLM.from_pretrained(chain / "gpt").config
    tokenizer = AutoTokenizer.from_pretrained(chain / "gpt")
    assert (config.codebook_size, config.vocab_size, config.pad_token_id) == (32, 35, tokenizer.pad_token_id)


def test_tokens_are_evaluated(chain, tmp_path, capsys):
    out, report = tmp_path / "reconstructed.parquet", tmp_path / "tokens.json"
    test = str(chain / "test.parquet")
    assert (
        tokenize_jets(["--tokenizer", str(chain / "vq"), "--input", test, "--output", str(out), "--batch_size", "7"])
        == 0
    )
    table = pq.read_table(out).to_pydict()
    tokenizer = AutoTokenizer.from_pretrained(chain / "vq")
    for codes, ids in zip(table["codes"], tokenizer(make_jets(60, seed=2))["input_ids"], strict=True):
        np.testing.assert_array_equal(np.asarray(codes) + 1, ids[1:-1])
    assert table["label_Tbqq"] == make_jets(60, seed=2)["label_Tbqq"]

    arguments = ["--original", test, "--reconstructed", str(out), "--codebook_size", "32", "--max_relative", "0.8"]
    assert evaluate_tokens([*arguments, "--output", str(report)]) == 0
    rows = {row["quantity"]: row for row in json.loads(report.read_text())["resolution"]}
    # about their own axes, jets come back near where they were
    assert rows["jet_eta"]["mean_abs"] < 0.1
    assert rows["jet_phi"]["mean_abs"] < 0.1
    assert abs(rows["jet_pt/"]["median"]) < 0.2


def test_generated_jets_follow_model_axes_and_seed(chain, tmp_path, capsys):
    out = tmp_path / "generated"
    arguments = [
        "--model",
        str(chain / "gpt"),
        "--cpu",
        "--n_jets",
        "50",
        "--rows_per_shard",
        "20",
        "--batch_size",
        "16",
    ]
    arguments += ["--axes_from", str(chain / "test.parquet"), "--output", str(out)]
    assert generate_jets(arguments) == 0
    files = sorted(out.glob("*.parquet"))
    assert [pq.read_metadata(file).num_rows for file in files] == [20, 20, 10]
    table = pq.ParquetDataset(files).read().to_pydict()
    assert table["num_constituents"] == [len(values) for values in table["part_px"]]
    axes = read_axes(str(chain / "test.parquet"))
    jets = np.stack([table["jet_eta"], table["jet_phi"]], axis=-1)
    distance = np.abs(jets[:, None] - axes[None]).max(axis=-1).min(axis=1)
    assert np.median(distance) < 0.3

    # a restarted run makes the missing file, and the same
    content = files[1].read_bytes()
    files[1].unlink()
    before = files[0].stat().st_mtime_ns
    assert generate_jets(arguments) == 0
    assert files[1].read_bytes() == content
    assert files[0].stat().st_mtime_ns == before
    assert generate_jets([*arguments, "--seed", "5"]) == 2
    assert "made with other options (seed 44 -> 5)" in capsys.readouterr().err

    report = tmp_path / "report.json"
    real = ["--real", str(chain / "test.parquet"), "--generated", str(out), "--output", str(report)]
    assert evaluate_jets([*real, "--no_classifier"]) == 0
    assert json.loads(report.read_text())["generated"]["jets"] == 50


def test_jets_end_where_the_stop_id_says(chain):
    from hepzoo.training.generate_jets import draw_jets, make_jets

    model = AutoModelForCausalLM.from_pretrained(chain / "gpt").eval()
    tokenizer = AutoTokenizer.from_pretrained(chain / "gpt")
    torch.manual_seed(1)
    sequences = draw_jets(model, 30, 8, batch_size=11)
    torch.manual_seed(1)
    columns, counts = make_jets(model, tokenizer, np.zeros((30, 2)), 8, batch_size=11)
    expected = []
    for ids in sequences:
        is_stop = ids == tokenizer.eos_token_id
        expected.append(min(int(np.argmax(is_stop)) - 1 if is_stop.any() else 8, 8))
    assert columns["num_constituents"].tolist() == expected
    assert counts["cut_off"] == sum(not (ids == tokenizer.eos_token_id).any() for ids in sequences) > 0


def test_tagger_from_the_generator(chain, tmp_path):
    output = tmp_path / "run"
    files = ["--train_file", str(chain / "train.parquet"), "--test_file", str(chain / "test.parquet"), "--do_predict"]
    flags = ["--model_name_or_path", str(chain / "gpt"), *CLASSES, *CLASSIFY, "--num_train_epochs", "3"]
    assert run_classification([*flags, *files, *common_flags(chain, output)]) == 0
    metrics = json.loads((output / "all_results.json").read_text())
    assert metrics["test_accuracy"] > 0.9
    table = pq.read_table(output / "predictions.parquet").to_pydict()
    # class 8 of the tokenizer is output 1
    assert table["label"] == table["label_Tbqq"]
    model = AutoModelForSequenceClassification.from_pretrained(output).eval()
    assert model.config.id2label == {0: "label_QCD", 1: "label_Tbqq"}
    batch = AutoTokenizer.from_pretrained(output)(
        make_jets(60, seed=2), padding=True, return_tensors="pt", return_class_ids=False
    )
    logits = model(**batch).logits.detach().numpy()
    np.testing.assert_allclose(table["logit"], logits[:, 1] - logits[:, 0], atol=1e-4)


def test_frozen_backbone_and_all_classes(chain, tmp_path):
    """Without --classes there is one output per class that the tokenizer knows."""
    flags = ["--model_name_or_path", str(chain / "gpt"), *CLASSIFY, "--freeze_backbone", "--max_steps", "3"]
    assert (
        run_classification([*flags, "--train_file", str(chain / "train.parquet"), *common_flags(chain, tmp_path)]) == 0
    )
    model = hepzoo.OmniJetForSequenceClassification.from_pretrained(tmp_path)
    assert list(model.config.id2label.values()) == AutoTokenizer.from_pretrained(tmp_path).label_names
    assert model.num_labels == 10
    old = AutoModelForCausalLM.from_pretrained(chain / "gpt").model.state_dict()
    for name, weight in model.model.state_dict().items():
        torch.testing.assert_close(weight, old[name], rtol=0, atol=0)
    # the classes of a checkpoint stay those of the run that continues it
    tagger, again = tmp_path / "tagger", tmp_path / "again"
    flags = [*CLASSIFY, "--train_file", str(chain / "train.parquet"), "--max_steps", "1"]
    start = ["--model_name_or_path", str(chain / "gpt"), *CLASSES]
    assert run_classification([*flags, *start, *common_flags(chain, tagger)]) == 0
    assert run_classification([*flags, "--model_name_or_path", str(tagger), *common_flags(chain, again)]) == 0
    assert hepzoo.OmniJetForSequenceClassification.from_pretrained(again).num_labels == 2


def test_another_network_in_the_same_folder_is_not_served_from_the_cache(chain, tmp_path):
    """Cached token ids belong to the weights of the VQ-VAE, not to the name of its folder."""
    from hepzoo.training.data import DataTrainingArguments, Encoder, encode_dataset

    datasets = pytest.importorskip("datasets")
    from transformers import TrainingArguments

    rows = datasets.load_dataset("parquet", data_files=str(chain / "test.parquet"), cache_dir=str(tmp_path / "cache"))
    settings = TrainingArguments(output_dir=str(tmp_path / "run"), use_cpu=True)
    tokenizer = AutoTokenizer.from_pretrained(chain / "vq")
    found = []
    for scale in (1.0, -1.0):
        tokenizer.vqvae.quantizer.codebook.data *= scale
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        encoder = Encoder(AutoTokenizer.from_pretrained(tmp_path / "tokenizer"), "data")
        found.append(encode_dataset(rows["train"], encoder, DataTrainingArguments(), settings)["input_ids"])
    assert found[0] != found[1]


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (["label_QCD", "top"], "--classes: unknown class 'top'"),
        (["label_QCD"], "at least two different classes"),
        (["label_QCD", "label_QCD"], "at least two different classes"),
        (["label_QCD", "label_Hbb"], "training data: row 1: class label_Tbqq, expected one of label_QCD, label_Hbb"),
    ],
)
def test_hostile_classes(chain, tmp_path, classes, message):
    flags = ["--model_name_or_path", str(chain / "gpt"), *CLASSIFY, "--train_file", str(chain / "train.parquet")]
    with pytest.raises(InputError, match=message):
        run_classification([*flags, "--classes", *classes, "--max_steps", "1", *common_flags(chain, tmp_path)])


def test_hostile_test_set_that_is_dropped_as_a_whole(chain, tmp_path):
    """One line, and before anything is trained."""
    columns = make_jets(20, seed=5)
    columns["part_px"] = [[float("nan")] * len(values) for values in columns["part_px"]]
    bad = write_jets(tmp_path / "bad.parquet", columns)
    flags = ["--model_name_or_path", str(chain / "gpt"), *CLASSIFY, *CLASSES, "--max_steps", "1"]
    flags += ["--train_file", str(chain / "train.parquet"), "--test_file", bad, "--do_predict"]
    flags += ["--tokenizer_kwargs", "on_invalid=drop_jets", *common_flags(chain, tmp_path / "run")]
    with pytest.raises(InputError, match="test data: all 20 rows were dropped as invalid"):
        run_classification(flags)
    assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--n_jets", "0"], "--n_jets is 0, expected at least 1"),
        (["--top_p", "1.5"], "expected 0 < top_p <= 1"),
        (["--eta", "nan"], "--eta is nan"),
        (["--axes_from", "AXES", "--eta", "1"], "pass neither --eta nor --phi"),
        (["--axes_from", "missing.parquet"], "no Parquet file found at 'missing.parquet'"),
        (["--greedy", "--top_k", "3"], "--top_k has no effect with --greedy"),
        (["--model", "VQ"], "model type 'omnijet_vqvae' cannot be generated here"),
        (["--tokenizer", "OTHER"], "they do not belong together"),
    ],
)
def test_hostile_generation_options(chain, tmp_path, capsys, flags, message):
    vqvae = hepzoo.OmniJetVQVAEModel(hepzoo.OmniJetVQVAEConfig(codebook_size=8, hidden_size=16))
    hepzoo.OmniJetTokenizer(vqvae=vqvae).save_pretrained(tmp_path / "other")
    places = {"AXES": chain / "test.parquet", "VQ": chain / "vq", "OTHER": tmp_path / "other"}
    flags = [str(places.get(flag, flag)) for flag in flags]
    arguments = ["--model", str(chain / "gpt"), "--output", str(tmp_path / "out"), "--cpu", *flags]
    assert generate_jets(arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error
    assert not (tmp_path / "out").exists()


def test_hostile_axes(tmp_path):
    columns = make_jets(5, seed=4)
    for name in ("part_px", "part_py"):
        columns[name][3] = [0.0] * len(columns[name][3])
    with pytest.raises(ValueError, match="row 3: the jet has no finite direction"):
        read_axes(write_jets(tmp_path / "axes.parquet", columns))


def test_released_checkpoint_draws_jets_as_its_card_says():
    folder = ROOT / "model_cards" / "omnijet-jets-small"
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    jets = tokenizer.batch_decode(model.generate(num_return_sequences=200))
    # 46.7 and 616 GeV with spreads of 17 and 120
    assert jets["num_constituents"].mean() == pytest.approx(46.7, abs=5)
    assert jets["jet_pt"].mean() == pytest.approx(616, abs=35)
