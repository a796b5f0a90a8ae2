"""Jets to tokens, a generator, generated jets, and a tagger, through the scripts that users run."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

import hepzoo
from hepzoo.evaluation.evaluate_jets import main as evaluate_jets
from hepzoo.evaluation.token_quality import main as evaluate_tokens
from hepzoo.training.data import InputError
from hepzoo.training.generate_jets import main as generate_jets
from hepzoo.training.generate_jets import read_axes
from hepzoo.training.run_classification import main as run_classification
from hepzoo.training.run_clm import main as run_clm
from hepzoo.training.run_hybrid import HybridCollator
from hepzoo.training.run_hybrid import main as run_hybrid
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
    sequences = draw_jets(model, tokenizer, 30, 8, batch_size=11)
    torch.manual_seed(1)
    columns, counts = make_jets(model, tokenizer, np.zeros((30, 2)), 8, batch_size=11)
    expected = []
    for ids in sequences:
        is_stop = ids == tokenizer.eos_token_id
        expected.append(min(int(np.argmax(is_stop)) - 1 if is_stop.any() else 8, 8))
    assert columns["num_constituents"].tolist() == expected
    assert counts["cut_off"] == sum(not (ids == tokenizer.eos_token_id).any() for ids in sequences) > 0


def save_hybrid(chain, folder, **settings) -> str:
    """A hybrid with random weights and the tokenizer of the chain."""
    tokenizer = AutoTokenizer.from_pretrained(chain / "vq")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_registers": 2}
    sizes |= {"token_head_size": 16, "token_head_layers": 1, "token_head_heads": 2, "class_head_size": 16}
    torch.manual_seed(5)
    config = hepzoo.OmniJetConfig(
        architecture="hybrid", codebook_size=32, max_position_embeddings=20, **{**sizes, **settings}
    )
    hepzoo.OmniJetForPreTraining(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("jet_features", [[], [0.5, -1.0]])
def test_hybrid_generates_on_the_command_line(chain, tmp_path, jet_features):
    """The files of the other generator, with the jets that `OmniJetForPreTraining.generate` draws."""
    folder, out = save_hybrid(chain, tmp_path / "hybrid", num_jet_features=len(jet_features)), tmp_path / "out"
    options = ["--jet_features", *map(str, jet_features)] if jet_features else []
    arguments = ["--cpu", "--n_jets", "25", "--rows_per_shard", "20", "--batch_size", "20", "--eta", "0.3"]
    assert generate_jets(["--model", folder, "--output", str(out), *arguments, *options]) == 0
    files = sorted(out.glob("*.parquet"))
    assert [pq.read_metadata(file).num_rows for file in files] == [20, 5]
    assert generate_jets(["--model", str(chain / "gpt"), "--output", str(tmp_path / "gpt"), *arguments]) == 0
    assert pq.read_schema(files[0]) == pq.read_schema(next((tmp_path / "gpt").glob("*.parquet")))

    model = AutoModelForPreTraining.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(int(np.random.default_rng([44, 0]).integers(2**63)))
    features = torch.tensor([jet_features] * 20) if jet_features else None
    # no longer than the jets of the training, which `max_position_embeddings` limits here
    ids = model.generate(tokenizer.vqvae, torch.zeros(20, 1, dtype=torch.long), features, max_new_tokens=21)
    expected = tokenizer.batch_decode(ids[:, :21], 0.3, 0.0)
    table = pq.read_table(files[0]).to_pydict()
    assert table["num_constituents"] == expected["num_constituents"].tolist()
    assert max(table["num_constituents"]) <= 20
    for found, values in zip(table["part_pt"], expected["part_pt"], strict=True):
        np.testing.assert_allclose(found, values, rtol=1e-5)


@pytest.mark.parametrize("decode", [True, False])
def test_batches_of_the_hybrid(chain, decode):
    """Start and constituents as positions, ids of each and of what follows as targets, also of jets that are cut."""
    tokenizer = AutoTokenizer.from_pretrained(chain / "vq")
    rows = tokenizer(make_jets(6, seed=8), return_particle_features=True)
    encoded = [dict(zip(rows, values)) for values in zip(*rows.values())]
    collator = HybridCollator(tokenizer, rename={"class_ids": "labels"}, max_positions=15, decode=decode)
    batch = collator(encoded)
    assert batch["particle_features"].shape == (6, 15, 3) and batch["labels"].tolist() == [0, 8] * 3
    lengths = [len(ids) - 2 for ids in rows["input_ids"]]
    assert min(lengths) < 14 < max(lengths)
    for row, (ids, length) in enumerate(zip(rows["input_ids"], lengths, strict=True)):
        kept = min(length, 14)
        assert batch["attention_mask"][row].tolist() == [1] * (kept + 1) + [0] * (14 - kept)
        for name, start in (("masked_labels", 0), ("generation_labels", 1)):
            expected = [*ids[start : start + kept + 1], *[-100] * (14 - kept)]
            assert batch[name][row].tolist() == expected
        if decode:
            codes = torch.tensor(ids[None, 1 : kept + 1]) - 1
            expected = tokenizer.vqvae.decode(codes)[0].detach().numpy()
        else:
            expected = rows["particle_features"][row][1 : kept + 1]
        found = batch["particle_features"][row].numpy()
        np.testing.assert_allclose(found[1 : kept + 1], expected, atol=1e-5)
        assert not found[0].any() and not found[kept + 1 :].any()


def test_hybrid_is_trained_and_generates(chain, tmp_path):
    output = tmp_path / "hybrid"
    sizes = "hidden_size=32,num_hidden_layers=1,num_attention_heads=2,token_head_size=32,token_head_layers=1,"
    sizes += "token_head_heads=2,class_head_size=32,class_head_heads=2,attention_dropout=0,hidden_dropout=0"
    flags = ["--tokenizer_name", str(chain / "vq"), "--config_overrides", sizes, "--do_train", "--do_eval"]
    flags += ["--per_device_train_batch_size", "32", "--learning_rate", "5e-3", "--max_steps", "60"]
    files = ["--train_file", str(chain / "train.parquet"), "--validation_file", str(chain / "test.parquet")]
    assert run_hybrid([*flags, *files, *common_flags(chain, output)]) == 0
    parts = {name: history(output, f"loss_{name}") for name in ("generation", "masked", "class")}
    for name, losses in parts.items():
        assert np.mean([losses[step] for step in range(51, 61)]) < 0.9 * losses[1], name
    assert history(output)[1] == pytest.approx(sum(losses[1] for losses in parts.values()), rel=1e-3)
    metrics = json.loads((output / "all_results.json").read_text())
    total = sum(metrics[f"eval_loss_{name}"] for name in parts)
    assert metrics["eval_loss"] == pytest.approx(total, rel=0.02)
    model = AutoModelForPreTraining.from_pretrained(output).eval()
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert model.config.id2label[8] == "label_Tbqq" and model.config.codebook_size == 32
    batch = HybridCollator(tokenizer)(
        [
            dict(zip(rows, values))
            for rows in [tokenizer(make_jets(60, seed=2), return_particle_features=True, return_class_ids=False)]
            for values in zip(*rows.values())
        ]
    )
    predicted = model(batch["particle_features"], batch["attention_mask"]).logits.argmax(dim=-1)
    assert (predicted == torch.tensor([0, 8] * 30)).float().mean() > 0.9
    assert generate_jets(["--model", str(output), "--output", str(tmp_path / "out"), "--cpu", "--n_jets", "10"]) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--model_name_or_path", "GPT"],
            "the model is an omnijet of architecture 'gpt', expected omnijet of architecture",
        ),
        (["--model_type", "spade"], "the model is an spade of architecture"),
        (["--tokenizer_name", "VQ", "--config_overrides", "num_jet_features=2"], "num_jet_features must be 0"),
        ([], "--train_file|needs|tokenizer"),
    ],
)
def test_hostile_options_of_the_hybrid(chain, tmp_path, flags, message):
    places = {"GPT": str(chain / "gpt"), "VQ": str(chain / "vq")}
    flags = [places.get(flag, flag) for flag in flags]
    files = ["--train_file", str(chain / "train.parquet"), "--do_train", "--max_steps", "1"]
    with pytest.raises(InputError, match=message) as error:
        run_hybrid([*flags, *files, *common_flags(chain, tmp_path)])
    assert "\n" not in str(error.value)


def test_hostile_hybrids_on_the_command_line(chain, tmp_path, capsys):
    folder = save_hybrid(chain, tmp_path / "hybrid", num_jet_features=2)
    tagger = hepzoo.OmniJetForSequenceClassification(
        hepzoo.OmniJetConfig(architecture="particle_flow", codebook_size=32, num_features=3)
    )
    tagger.save_pretrained(tmp_path / "tagger")
    for model, options, message in (
        (folder, [], "--jet_features has 0 numbers, expected the 2 that"),
        (folder, ["--jet_features", "1"], "--jet_features has 1 numbers, expected the 2 that"),
        (folder, ["--jet_features", "1", "nan"], "--jet_features has nan, expected finite numbers"),
        (chain / "gpt", ["--jet_features", "1"], "--jet_features has 1 numbers, expected the 0 that"),
        (tmp_path / "tagger", [], "architecture 'particle_flow' cannot generate, expected 'gpt' or 'hybrid'"),
    ):
        assert generate_jets(["--model", str(model), "--output", str(tmp_path / "out"), "--cpu", *options]) == 2
        assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


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
