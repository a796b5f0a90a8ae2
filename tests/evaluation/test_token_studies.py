"""What tokens keep: taggers on their representations, and ids decoded in many contexts."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

import hepzoo
from hepzoo.evaluation import token_contexts, token_information
from hepzoo.evaluation.metric_tagging import tagging_metrics
from hepzoo.evaluation.token_contexts import decode_in_contexts, random_contexts, summarise
from hepzoo.evaluation.token_information import auc_difference, batches, mean_rows, represent, table_rows
from tests.training.jets import make_jets, write_jets

CLASSES = ["label_QCD", "label_Tbqq"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Several threads on tensors this small only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_tokenizer(codebook_size: int = 32, seed: int = 0, **settings) -> hepzoo.OmniJetTokenizer:
    torch.manual_seed(seed)
    sizes = {"latent_size": 2, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = hepzoo.OmniJetVQVAEConfig(codebook_size=codebook_size, **{**sizes, **settings})
    vqvae = hepzoo.OmniJetVQVAEModel(config)
    with torch.no_grad():
        for parameter in vqvae.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return hepzoo.OmniJetTokenizer(vqvae=vqvae.eval(), model_max_length=24)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    write_jets(folder / "train.parquet", make_jets(200, seed=1))
    write_jets(folder / "test.parquet", make_jets(100, seed=2))
    make_tokenizer().save_pretrained(folder / "small")
    make_tokenizer(64, seed=1).save_pretrained(folder / "large")
    return folder


def options(folder, *extra: str) -> list[str]:
    flags = ["--train", str(folder / "train.parquet"), "--test", str(folder / "test.parquet")]
    flags += ["--tokenizers", str(folder / "small"), str(folder / "large"), "--steps", "40", "--batch_size", "32"]
    return [*flags, "--learning_rate", "5e-3", "--hidden_size", "16", "--num_hidden_layers", "1", *extra]


def test_representations_are_the_same_jets():
    jets = make_jets(12, seed=3)
    tokenizer = make_tokenizer()
    found = represent({"a": tokenizer}, jets, CLASSES)
    assert found["labels"].tolist() == [0, 1] * 6
    plain = tokenizer(jets, return_particle_features=True)
    columns = tokenizer.batch_decode(plain["input_ids"])
    for row, ids in enumerate(plain["input_ids"]):
        count = found["mask"][row].sum()
        assert count == len(ids) - 2 and found["mask"][row, :count].all()
        np.testing.assert_array_equal(found["a ids"][row, :count], ids[1:-1])
        np.testing.assert_allclose(found["original"][row, :count], plain["particle_features"][row][1:-1], rtol=1e-6)
        assert not found["original"][row, count:].any() and not found["a"][row, count:].any()
        # published transforms: ln pt - 1.8, three times the angles
        np.testing.assert_allclose(np.exp(found["a"][row, :count, 0] + 1.8), columns["part_pt"][row], rtol=1e-4)
        np.testing.assert_allclose(found["a"][row, :count, 1] / 3, columns["part_etarel"][row], atol=1e-5)
    other = make_tokenizer()
    other = hepzoo.OmniJetTokenizer({"part_pt": {}, "part_etarel": {}, "part_phirel": {}}, vqvae=other.vqvae)
    with pytest.raises(ValueError, match="b: its features of the jets differ from those of a"):
        represent({"a": tokenizer, "b": other}, jets, CLASSES)


def test_every_jet_once_in_a_pass():
    drawn = list(batches(10, 4, 5, np.random.default_rng(0)))
    assert [len(rows) for rows in drawn] == [4] * 5
    flat = np.concatenate(drawn)
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10))


def test_taggers_of_all_representations(folder, tmp_path, capsys):
    output = [str(tmp_path / name) for name in ("report.json", "report.md", "runs.csv", "report.png")]
    assert token_information.main(options(folder, "--seeds", "2", "--output", *output)) == 0
    assert "particle_flow" in capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    expected = [("particle_flow", name) for name in ("original", "small", "small ids", "large", "large ids")]
    expected += [("normformer", name) for name in ("original", "small", "large")]
    assert [(row["tagger"], row["representation"]) for row in report["means"]] == expected
    assert report["jets"] == {"train": 200, "test": 100} and len(report["runs"]) == 16
    originals = [row for row in report["runs"] if row["representation"] == "original"]
    # one prong against three is easy
    assert min(row["auc"] for row in originals) > 0.95
    assert all(row["lost_auc"] == 0 for row in originals)
    row = report["runs"][1]
    assert row["lost_auc"] == pytest.approx(report["runs"][0]["auc"] - row["auc"])
    assert "| particle_flow | original | 2 |" in (tmp_path / "report.md").read_text()
    assert len((tmp_path / "runs.csv").read_text().splitlines()) == 17
    assert (tmp_path / "report.png").stat().st_size > 10_000


def test_picture_of_the_taggers(tmp_path):
    """A point per tokenizer and kind with the error bar of the seeds, a band of the original constituents."""
    from hepzoo.evaluation.plots_jets import plot_token_information

    runs = [
        {"tagger": tagger, "representation": name, "seed": seed, "auc": 0.8 + 0.01 * place + 0.002 * seed}
        for seed in (0, 1)
        for tagger, names in (
            ("particle_flow", ["original", "a", "a ids", "b", "b ids"]),
            ("normformer", ["original", "a", "b"]),
        )
        for place, name in enumerate(names)
    ]
    report = {"jets": {"train": 10, "test": 5}, "codebook_sizes": {"a": 64, "b": 512}, "means": mean_rows(runs)}
    (axis,) = plot_token_information(report, names=["auc"]).axes
    lines = [container.lines[0] for container in axis.containers]
    heights = [line.get_ydata().tolist() for line in lines]
    np.testing.assert_allclose(heights, [[0.811, 0.831], [0.821, 0.841], [0.811, 0.821]])
    (bar,) = axis.containers[0].lines[2]
    np.testing.assert_allclose(np.ptp(bar.get_segments()[0][:, 1]), 2 * 0.002 / np.sqrt(2), rtol=1e-6)
    assert [label.get_text() for label in axis.get_xticklabels()] == ["64 codes\na", "512 codes\nb"]


def test_means_and_errors_over_seeds():
    rows = [
        {
            "tagger": "t",
            "representation": "r",
            "seed": s,
            "auc": 0.5 + 0.1 * s,
            "lost_auc": 0.1 * s,
            "lost_auc_error": 0.2,
        }
        for s in (0, 1)
    ]
    (mean,) = mean_rows(rows)
    assert (mean["seed"], mean["auc"], mean["auc_std"]) == (2, pytest.approx(0.55), pytest.approx(0.1 / np.sqrt(2)))
    # that of the test jets does not shrink with the number of seeds
    assert mean["lost_auc_error"] == pytest.approx(np.hypot(0.2, 0.05))
    (cells,) = table_rows([mean])
    assert cells["auc"] == "0.55 ± 0.07" and cells["lost_auc"] == "0.05 ± 0.2" and cells["seed"] == 2
    (one,) = mean_rows(rows[:1])
    assert one["lost_auc_error"] == 0.2 and table_rows([one])[0]["auc"] == "0.5"


def test_difference_of_roc_areas_and_its_error():
    rng = np.random.default_rng(0)

    def draw(number):
        labels = np.arange(number) % 2
        shared = rng.normal(size=number) + labels
        return shared + 0.3 * rng.normal(size=number), shared + rng.normal(size=number), labels

    first, second, labels = draw(600)
    difference, error = auc_difference(first, second, labels)
    # rising functions of the scores have the same area, probabilities too
    areas = [
        tagging_metrics(np.stack([1 - p, p], axis=1), labels)["auc"]
        for p in (1 / (1 + np.exp(-first)), 1 / (1 + np.exp(-second)))
    ]
    assert difference == pytest.approx(areas[0] - areas[1]) and difference > 0
    assert auc_difference(first, first, labels) == (0, 0)
    # the error is the spread of the difference between samples
    differences, errors = np.array([auc_difference(*draw(600)) for _ in range(300)]).T
    assert np.std(differences) == pytest.approx(errors.mean(), rel=0.12)
    assert error == pytest.approx(errors.mean(), rel=0.2)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--train", "nothing.parquet"], "no Parquet file found at 'nothing.parquet'"),
        (["--tokenizers", "{folder}/nowhere"], "nowhere: no tokenizer that can be loaded"),
        (["--tokenizers", "{folder}/small", "{folder}/small"], "two folders are called small"),
        (["--classes", "label_QCD", "label_Hbb"], "--train: row 1: class label_Tbqq, expected one of"),
        (["--classes", "label_QCD", "top"], "unknown class 'top'"),
        (["--classes", "label_QCD"], "at least two different classes"),
        (["--test", "{folder}/bad.parquet"], "--test: row 0: part_px[0] = nan is not a finite number"),
        (["--test", "{folder}/text.parquet"], "not a readable Parquet file"),
    ],
)
def test_hostile_information_options(folder, capsys, extra, message):
    jets = make_jets(4, seed=5)
    jets["part_px"][0][0] = float("nan")
    write_jets(folder / "bad.parquet", jets)
    (folder / "text.parquet").write_text("no jets")
    assert token_information.main(options(folder, *(text.format(folder=folder) for text in extra))) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error and error.startswith("token_information.py: ")


def test_context_matters_as_much_as_the_decoder_lets_it():
    rng = np.random.default_rng(0)
    contexts = random_contexts(32, 20, 6, rng)
    assert contexts.shape == (20, 6) and contexts.max() < 32
    codes = np.array([3, 17])
    alone = make_tokenizer(architecture="mlp", decoder_layer_sizes=[8])
    values = decode_in_contexts(alone, codes, contexts)
    assert values.shape == (2, 20, 3)
    np.testing.assert_allclose(values, np.repeat(values[:, :1], 20, axis=1), rtol=1e-5)
    for settings in ({}, {"architecture": "transformer", "causal_decoder": True}):
        tokenizer = make_tokenizer(**settings)
        values = decode_in_contexts(tokenizer, codes, contexts)
        assert (values.std(axis=1) > 1e-4).all()
        ids = [0, *(contexts[5] + 1), codes[1] + 1, tokenizer.eos_token_id]
        np.testing.assert_allclose(values[1, 5, 0], tokenizer.decode(ids)["part_pt"][-1], rtol=1e-4)


def test_spreads_of_normal_clouds():
    rng = np.random.default_rng(1)
    centers = rng.normal(0, 2, (4000, 1, 1))
    values = centers + rng.normal(0, 0.5, (4000, 300, 1))
    (row,) = summarise(["x"], values)
    assert row["between"] == pytest.approx(2, rel=0.06)
    assert row["within"] == pytest.approx(0.5, rel=0.05)
    assert row["within_90"] > row["within"] and row["ratio"] == pytest.approx(0.25, rel=0.15)


def test_contexts_of_real_jets(folder, tmp_path, capsys):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"codes": [[1, 2], [2]]}), tmp_path / "codes.parquet")
    output = [str(tmp_path / name) for name in ("report.json", "report.md", "ids.csv")]
    flags = ["--tokenizer", str(folder / "small"), "--ids", "5", "--contexts", "7", "--context_length", "4"]
    assert token_contexts.main([*flags, "--jets", str(tmp_path / "codes.parquet"), "--output", *output]) == 0
    assert "within / between" in capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["contexts"] == [7, 4] and len(report["ids"]) == 5
    assert [row["name"] for row in report["features"]] == ["part_pt", "part_etarel", "part_phirel"]
    assert len((tmp_path / "ids.csv").read_text().splitlines()) == 6
    contexts = random_contexts(32, 50, 10, np.random.default_rng(0), np.array([1, 2, 2]))
    assert set(contexts.flat) == {1, 2} and 0.6 < (contexts == 2).mean() < 0.73


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--tokenizer", "{folder}/nowhere"], "nowhere: no tokenizer that can be loaded"),
        (["--jets", "{folder}/test.parquet"], "--jets: no column 'codes'"),
        (["--jets", "{folder}/codes.parquet"], "--jets: expected codes of 0 to 31"),
    ],
)
def test_hostile_context_options(folder, capsys, extra, message):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"codes": [[1, 32]]}), folder / "codes.parquet")
    flags = ["--tokenizer", str(folder / "small"), *(text.format(folder=folder) for text in extra)]
    assert token_contexts.main(flags) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("script", [token_contexts, token_information])
def test_hostile_arguments_and_help_of_the_scripts(script):
    done = subprocess.run([sys.executable, script.__file__, "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "examples:" in done.stdout
    with pytest.raises(SystemExit) as error:
        script.main(["--tokenizer", "a", "--tokenizers", "a", "--train", "b", "--test", "c", "--output", "report.txt"])
    assert error.value.code == 2
