"""Jets to a pre-trained OmniLearned, a tagger, a generator and generated jets, and the EPiC flow, as users run them."""

import json
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoFeatureExtractor, AutoModelForPreTraining, AutoModelForSequenceClassification

import hepzoo
from hepzoo.evaluation.jets import read_jets
from hepzoo.training.data import InputError
from hepzoo.training.generate_flow_jets import main as generate_flow_jets
from hepzoo.training.run_classification import main as run_classification
from hepzoo.training.run_flow_matching import main as run_flow_matching
from hepzoo.training.run_pretraining import main as run_pretraining
from tests.training.jets import make_jets, write_jets
from tests.training_runs import common_flags, history

TINY = "hidden_size=16,num_hidden_layers=1,num_attention_heads=2,num_head_layers=1,num_neighbors=4"
KINEMATICS = "use_particle_ids=false,use_additional_features=false,max_num_particles=20"
LEARN = ["--do_train", "--per_device_train_batch_size", "32", "--optimizer", "lion", "--learning_rate", "2e-3"]
CLASSES = ["--classes", "label_QCD", "label_Tbqq"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with jets, a pre-trained model, a tagger and a generator."""
    folder = tmp_path_factory.mktemp("omnilearned")
    train = ["--train_file", write_jets(folder / "train.parquet", make_jets(192, seed=1))]
    validation = ["--validation_file", write_jets(folder / "validation.parquet", make_jets(32, seed=2)), "--do_eval"]
    flags = [*LEARN, *train, *validation]
    model = ["--model_type", "omnilearned", "--config_overrides", TINY, "--feature_extractor_overrides", KINEMATICS]
    more = ["--objectives", "classification", "generation", "masked", "--objective_weights", "1", "0.5", "2"]
    more += ["--max_steps", "12", "--ema_decay", "0.8"]
    assert run_pretraining([*model, *flags, *more, *common_flags(folder, folder / "pretrained")]) == 0
    start = ["--model_name_or_path", str(folder / "pretrained"), *flags, "--max_steps", "12", "--head_lr_factor", "2"]
    test = ["--do_predict", "--test_file", str(folder / "validation.parquet")]
    assert run_classification([*start, *CLASSES, *test, *common_flags(folder, folder / "tagger")]) == 0
    assert run_flow_matching([*start, "--ema_decay", "0.8", *common_flags(folder, folder / "generator")]) == 0
    return folder


def results(path) -> dict[str, float]:
    return json.loads((path / "all_results.json").read_text())


def test_pretraining_sums_the_parts_of_the_loss(folder):
    found = results(folder / "pretrained")
    parts = {name.removeprefix("eval_loss_"): value for name, value in found.items() if name.startswith("eval_loss_")}
    total = parts["class"] + parts["perturbed_class"] + parts["masked_input"]
    total += 0.5 * parts["generation"] + 2 * parts["masked"]
    assert found["eval_loss"] == pytest.approx(total, rel=1e-4)
    losses = history(folder / "pretrained")
    assert losses[12] < 0.9 * losses[1]
    model = AutoModelForPreTraining.from_pretrained(folder / "pretrained")
    assert type(model) is hepzoo.OmniLearnedForPreTraining and model.config.masked_loss_weight == 2
    averaged = AutoModelForPreTraining.from_pretrained(folder / "pretrained", subfolder="ema")
    assert not torch.equal(averaged.model.norm.weight, model.model.norm.weight)
    assert "AutoFeatureExtractor" in (folder / "pretrained" / "README.md").read_text()


def test_validation_has_the_same_noise_every_time(folder, tmp_path):
    data = ["--validation_file", str(folder / "validation.parquet"), "--do_eval"]
    for seed, name in ((3, "a"), (4, "b")):
        flags = [*common_flags(folder, tmp_path / name), "--seed", str(seed)]
        assert run_pretraining(["--model_name_or_path", str(folder / "pretrained"), *data, *flags]) == 0
    assert results(tmp_path / "a")["eval_loss"] == results(tmp_path / "b")["eval_loss"]


@pytest.mark.parametrize("source", [[], ["--streaming", "true", "--fit_jets", "64"]])
def test_masked_head_starts_at_the_medians_of_the_data(folder, tmp_path, source):
    data = ["--train_file", str(folder / "train.parquet"), "--do_train", "--per_device_train_batch_size", "16", *source]
    model = ["--model_type", "omnilearned", "--config_overrides", TINY, "--feature_extractor_overrides", KINEMATICS]
    more = ["--objectives", "masked", "--max_steps", "1", "--learning_rate", "1e-7"]
    for name, option in (("medians", []), ("published", ["--start_at_medians", "false"])):
        assert run_pretraining([*model, *data, *more, *option, *common_flags(folder, tmp_path / name)]) == 0
    biases = [
        AutoModelForPreTraining.from_pretrained(tmp_path / name).masked_head.out.bias.detach()
        for name in ("medians", "published")
    ]
    extractor = AutoFeatureExtractor.from_pretrained(tmp_path / "medians")
    jets = extractor(make_jets(192, seed=1), return_tensors="pt")
    medians = jets["particles"][jets["attention_mask"].bool()].median(dim=0).values
    # a stream may repeat the jets
    torch.testing.assert_close(biases[0], medians, rtol=0, atol=0.05 if source else 1e-5)
    assert biases[1].abs().max() < 1e-5 < 0.5 < medians.abs().max()


def test_tagger_starts_from_the_pretrained_body(folder):
    model = AutoModelForSequenceClassification.from_pretrained(folder / "tagger").eval()
    assert model.config.id2label == {0: "label_QCD", 1: "label_Tbqq"} and not model.config.use_time
    before, after = (load_file(folder / name / "model.safetensors") for name in ("pretrained", "tagger"))
    body = [name for name in after if name.startswith("model.layers") and name.endswith("fc1.weight")]
    for name in body:
        moved = (after[name] - before[name]).abs().max()
        assert 0 < moved < 12 * 2e-3 * 1.1, "Lion takes steps of the learning rate"
    assert results(folder / "tagger")["eval_auc"] > 0.9

    extractor = AutoFeatureExtractor.from_pretrained(folder / "tagger")
    table = pq.read_table(folder / "tagger" / "predictions.parquet").to_pydict()
    batch = extractor(make_jets(32, seed=2), return_tensors="pt")
    labels = batch.pop("class_ids")
    with torch.no_grad():
        logits = model(**batch).logits
    np.testing.assert_allclose(table["logit"], logits[:, 1] - logits[:, 0], atol=1e-4)
    assert table["label"] == labels.tolist() and table["row_index"] == list(range(32))


def test_a_tagger_goes_on_with_its_last_layer(folder, tmp_path):
    data = ["--validation_file", str(folder / "validation.parquet"), "--do_eval"]
    flags = ["--model_name_or_path", str(folder / "tagger"), *data, *common_flags(folder, tmp_path)]
    assert run_classification(flags) == 0
    assert results(tmp_path)["eval_loss"] == pytest.approx(results(folder / "tagger")["eval_loss"], rel=1e-5)


def test_generator_makes_rows_for_the_evaluation(folder, tmp_path, capsys):
    model = AutoModelForPreTraining.from_pretrained(folder / "generator")
    assert type(model) is hepzoo.OmniLearnedForGeneration and model.config.num_conditions == 3
    sampling = ["--model", str(folder / "generator"), "--num_inference_steps", "2", "--cpu", "--n_jets", "30"]
    arguments = [*sampling, "--rows_per_shard", "20", "--output", str(tmp_path / "jets")]
    assert generate_flow_jets(arguments) == 0
    files = sorted((tmp_path / "jets").glob("*.parquet"))
    assert [pq.read_metadata(path).num_rows for path in files] == [20, 10]
    jets = read_jets([str(path) for path in files])
    assert len(jets) == 30 and set(jets.label.tolist()) == {0, 8}
    # tops are made with more constituents, as they are in the training set
    assert jets.multiplicity[jets.label == 8].min() >= 12 > jets.multiplicity[jets.label == 0].max()
    # a restart makes the same file
    before = files[1].read_bytes()
    files[1].unlink()
    assert generate_flow_jets(arguments) == 0
    assert files[1].read_bytes() == before
    assert generate_flow_jets([*arguments, "--seed", "1"]) == 2
    assert "seed 44 -> 1" in capsys.readouterr().err

    # averaged weights; tops only, under the conditions of real ones
    real = ["--conditions_from", str(folder / "validation.parquet"), "--classes", "label_Tbqq", "--ema"]
    assert generate_flow_jets([*sampling, *real, "--output", str(tmp_path / "tops")]) == 0
    tops = read_jets(str(tmp_path / "tops"))
    assert set(tops.label.tolist()) == {8}
    sizes = {len(values) for values in make_jets(32, seed=2)["part_px"]}
    assert set(tops.multiplicity.tolist()) <= sizes


def test_released_generator_makes_jets_as_its_card_says():
    path = Path(__file__).resolve().parents[2] / "model_cards" / "omnilearned-jets-small"
    model = AutoModelForPreTraining.from_pretrained(path).eval()
    extractor = AutoFeatureExtractor.from_pretrained(path)
    request = extractor.sample_conditions(class_ids=[0] * 50 + [1] * 50, seed=1, return_tensors="pt")
    sample = model.generate(**request, generator=torch.Generator().manual_seed(1))
    assert sample.num_function_evaluations == 32
    jets = extractor.batch_decode(sample, labels=request["labels"], conditions=request["conditions"])
    asked = request["conditions"][:, 0].numpy() * extractor.condition_stds[0] + extractor.condition_means[0]
    ratio = jets["jet_pt"] / asked[jets["row_index"]]
    # 0.93 and 0.14 for 200 jets
    assert np.mean(ratio) == pytest.approx(0.93, abs=0.06)
    assert np.std(ratio) == pytest.approx(0.14, abs=0.06)


def test_epic_flow_is_trained_and_generates(folder, tmp_path):
    rows = make_jets(96, seed=5)
    sizes = [len(values) for values in rows["part_px"]]
    rng = np.random.default_rng(0)
    for name in ("part_d0val", "part_d0err", "part_dzval", "part_dzerr"):
        rows[name] = [rng.normal(0, 1, size).tolist() for size in sizes]
    rows["part_charge"] = [rng.choice([-1.0, 1.0], size).tolist() for size in sizes]
    for name in ("part_isChargedHadron", "part_isNeutralHadron", "part_isPhoton", "part_isElectron", "part_isMuon"):
        rows[name] = [[int(name == "part_isChargedHadron")] * size for size in sizes]
    path = write_jets(tmp_path / "train.parquet", rows)
    model = ["--model_type", "epic_fm", "--config_overrides", "hidden_size=16,latent_size=4,num_hidden_layers=1"]
    model += ["--feature_extractor_overrides", '{"label_names": ["label_QCD", "label_Tbqq"]}']
    train = ["--do_train", "--learning_rate", "1e-2", "--max_steps", "15", "--per_device_train_batch_size", "32"]
    train += ["--do_eval", "--validation_file", path, "--train_file", path, "--ema_decay", "0.7"]
    assert run_flow_matching([*model, *train, *common_flags(folder, tmp_path / "epic")]) == 0
    losses = history(tmp_path / "epic")
    assert losses[15] < 0.9 * losses[1]
    arguments = ["--model", str(tmp_path / "epic"), "--ema", "--n_jets", "10", "--cpu", "--solver", "euler"]
    arguments += ["--num_inference_steps", "3", "--output", str(tmp_path / "jets"), "--min_num_particles", "3"]
    assert generate_flow_jets(arguments) == 0
    (path,) = (tmp_path / "jets").glob("*.parquet")
    columns = pq.read_table(path).to_pydict()
    assert {charge for jet in columns["part_charge"] for charge in jet} <= {-1.0, 0.0, 1.0}
    assert all(set(jet) <= {0, 1} for jet in columns["part_isMuon"]) and "jet_eta" in columns


def test_pretraining_resumes_with_losses_and_averages_of_an_uninterrupted_run(folder, tmp_path):
    data = ["--train_file", str(folder / "train.parquet"), "--model_name_or_path", str(folder / "pretrained")]
    flags = [*data, *LEARN, "--ema_decay", "0.5", "--lr_scheduler_type", "constant"]
    steps = ["--save_strategy", "steps", "--save_steps", "2"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for output, last in ((whole, "4"), (broken, "2"), (broken, "4")):
        assert run_pretraining([*flags, *common_flags(folder, output), *steps, "--max_steps", last]) == 0
    assert history(whole) == history(broken)
    first, second = (load_file(path / "ema" / "model.safetensors") for path in (whole, broken))
    assert all(torch.equal(values, second[name]) for name, values in first.items())


@pytest.mark.parametrize(
    "script, options, expected",
    [
        (run_pretraining, ["--objectives", "flow"], "--objectives: 'flow', expected different ones of"),
        (run_pretraining, ["--objectives", "masked", "--objective_weights", "1", "2"], "expected 1 numbers"),
        (run_pretraining, ["--objective_weights", "1"], "needs --objectives"),
        (run_pretraining, ["--model_type", "spade"], "'spade' cannot be trained here"),
        (run_pretraining, ["--model_type", "epic_fm"], "use run_flow_matching.py"),
        (run_pretraining, ["--paper_size", "huge"], "size is 'huge'"),
        (run_pretraining, ["--config_overrides", "depth=3"], "has no depth"),
        (run_pretraining, ["--feature_extractor_overrides", "depth=3"], "depth"),
        (run_pretraining, [], "column part_d0val is missing"),
        (run_pretraining, ["--ema_decay", "2", "--feature_extractor_overrides", KINEMATICS], "--ema_decay: decay"),
        (run_flow_matching, ["--tokenizer_name", "x"], "--tokenizer_name: these models have a feature extractor"),
        (run_classification, ["--model_type", "omnilearned", "--classes", "label_QCD"], "at least two"),
        (run_classification, ["--model_type", "omnilearned", "--tokenizer_kwargs", "a=1"], "--tokenizer_kwargs"),
        (run_classification, ["--model_type", "omnijet", "--ema_decay", "0.9"], "--ema_decay: only for models of sets"),
    ],
)
def test_hostile_options(folder, tmp_path, script, options, expected):
    data = ["--train_file", str(folder / "train.parquet"), "--do_train", "--max_steps", "1"]
    with pytest.raises(InputError, match=re.escape(expected)):
        script([*options, *data, *common_flags(folder, tmp_path)])


def test_hostile_jets_are_named_by_their_row(folder, tmp_path):
    rows = make_jets(40)
    rows["part_px"][17][1] = float("nan")
    path = write_jets(tmp_path / "bad.parquet", rows)
    flags = ["--train_file", path, "--do_train", "--max_steps", "2", "--fit_jets", "0"]
    flags += ["--config_overrides", TINY, "--feature_extractor_overrides", KINEMATICS]
    with pytest.raises(InputError, match=r"training data: row 17: part_px\[1\] = nan"):
        run_pretraining([*flags, "--per_device_train_batch_size", "40", *common_flags(folder, tmp_path / "run")])


@pytest.mark.parametrize(
    "options, expected",
    [
        (["--model", "pretrained"], "OmniLearnedForPreTraining is no generator"),
        (["--model", "nowhere"], "nowhere"),
        (["--model", "generator", "--classes", "label_Top"], "unknown class 'label_Top'"),
        (["--model", "generator", "--classes", "label_Hbb"], "class 1 is not in the density"),
        (["--model", "generator", "--n_jets", "0"], "--n_jets is 0"),
        (["--model", "generator", "--guidance_scale", "2"], "label_dropout"),
        (["--model", "generator", "--no_postprocess"], "--no_postprocess: only for the EPiC flow"),
        (["--model", "generator", "--conditions_from", "nowhere.parquet"], "--conditions_from"),
    ],
)
def test_hostile_requests_for_jets(folder, tmp_path, capsys, options, expected):
    options[1] = str(folder / options[1])
    assert generate_flow_jets([*options, "--cpu", "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("hepzoo generate flow-jets: error:") and expected in error
    assert not list(tmp_path.rglob("*.parquet"))
