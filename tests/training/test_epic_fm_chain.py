"""The EPiC flow as users run it: batches of like multiplicity, generation with its options, wrong ones."""

from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoFeatureExtractor, AutoModelForPreTraining

from hepzoo import EpicFMForGeneration
from hepzoo.evaluation.jet_particles import TYPES, wrong_charges
from hepzoo.evaluation.jets import as_jets, observe
from hepzoo.training import jet_sets
from hepzoo.training.generate_flow_jets import main as generate_flow_jets
from hepzoo.training.jet_sets import LikeLengthSampler, NumberedRows
from hepzoo.training.run_flow_matching import main as run_flow_matching
from tests.training.jets import make_jets, write_jets
from tests.training_runs import common_flags, history

MODEL = ["--model_type", "epic_fm", "--config_overrides", "hidden_size=8,latent_size=4,num_hidden_layers=1"]
KINEMATICS = "label_names=[label_QCD,label_Tbqq],feature_names=[part_etarel,part_dphi,part_ptrel]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Jets and a generator of their kinematics, trained with batches of like multiplicity."""
    folder = tmp_path_factory.mktemp("epic")
    data = ["--train_file", write_jets(folder / "train.parquet", make_jets(100, seed=1)), "--do_train", "--do_eval"]
    data += ["--validation_file", write_jets(folder / "validation.parquet", make_jets(16, seed=2))]
    settings = ["--learning_rate", "1e-2", "--max_steps", "14", "--per_device_train_batch_size", "16"]
    settings += ["--train_sampling_strategy", "group_by_length", "--feature_extractor_overrides", KINEMATICS]
    made = []

    class Recorded(LikeLengthSampler):
        def __init__(self, *args, **kwargs):
            made.append(kwargs["lengths"])
            super().__init__(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jet_sets, "LikeLengthSampler", Recorded)
        assert run_flow_matching([*MODEL, *settings, *data, *common_flags(folder, folder / "epic")]) == 0
    assert made == [[len(values) for values in make_jets(100, seed=1)["part_px"]]]
    return folder


def test_batches_of_like_multiplicity():
    lengths = torch.randint(1, 60, (403,), generator=torch.Generator().manual_seed(0)).tolist()
    torch.manual_seed(1)
    orders = [list(LikeLengthSampler(20, lengths=lengths)) for _ in range(2)]
    assert orders[0] != orders[1]
    for order in orders:
        assert sorted(order) == list(range(403))
        batches = [[lengths[i] for i in order[start : start + 20]] for start in range(0, 400, 20)]
        # of 59 without grouping
        assert np.mean([max(batch) - min(batch) for batch in batches]) < 20
        assert abs(np.corrcoef([np.mean(batch) for batch in batches], range(20))[0, 1]) < 0.8
    assert sorted(LikeLengthSampler(20, lengths=[3, 4])) == [0, 1]


def test_multiplicities_of_selected_rows():
    rows = datasets.Dataset.from_dict(make_jets(7)).select([4, 0, 5])
    expected = [len(make_jets(7)["part_px"][row]) for row in (4, 0, 5)]
    assert NumberedRows(rows.with_format("numpy")).lengths() == expected


def test_new_models_have_the_default_number_of_steps(folder):
    model = EpicFMForGeneration.from_pretrained(folder / "epic")
    assert (model.config.solver, model.config.num_inference_steps) == ("midpoint", 24)
    losses = history(folder / "epic")
    assert losses[14] < losses[1]


def test_adaptive_generation_with_a_tolerance(folder, tmp_path):
    arguments = ["--model", str(folder / "epic"), "--n_jets", "6", "--cpu", "--solver", "dopri5"]
    for name, tolerance in (("loose", "0.5"), ("fine", "1e-3"), ("default", None)):
        more = [] if tolerance is None else ["--tolerance", tolerance]
        assert generate_flow_jets([*arguments, *more, "--output", str(tmp_path / name)]) == 0
    loose, fine, default = (
        np.concatenate(pq.read_table(next((tmp_path / name).glob("*.parquet")))["part_px"].to_pylist())
        for name in ("loose", "fine", "default")
    )
    assert np.abs(loose - default).max() > np.abs(fine - default).max() > 0


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--num_inference_steps", "0"], "--num_inference_steps is 0"),
        (["--num_inference_steps", "9", "--solver", "dopri5"], "`num_inference_steps` is for fixed steps"),
        (["--tolerance", "1e-3"], "`rtol` is for 'dopri5'"),
        (["--tolerance", "0", "--solver", "dopri5"], "`atol` 0.0"),
        (["--tolerance", "nan", "--solver", "dopri5"], "`rtol` is nan"),
        (["--tolerance", "1e-30", "--solver", "dopri5"], "dopri5: no step is small enough"),
        (["--guidance_scale", "nan"], "`guidance_scale` is nan"),
        (["--guidance_scale", "2"], "trained with dropped labels"),
        (["--batch_size", "0"], "--batch_size is 0"),
        (["--seed", "-1"], "--seed is -1"),
        (["--classes", "label_Top"], "unknown class 'label_Top', expected some of label_QCD, label_Tbqq"),
    ],
)
def test_hostile_requests_for_jets(folder, tmp_path, capsys, options, expected):
    arguments = ["--model", str(folder / "epic"), "--cpu", "--n_jets", "4", "--output", str(tmp_path / "out")]
    assert generate_flow_jets([*arguments, *options]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("hepzoo generate flow-jets: error:") and expected in error
    assert not list(tmp_path.rglob("*.parquet"))


def test_hostile_weights_that_are_not_numbers(folder, tmp_path, capsys):
    """A training that diverged: the jets are refused, not written."""
    model = EpicFMForGeneration.from_pretrained(folder / "epic")
    model.save_pretrained(tmp_path / "broken")
    for name in ("preprocessor_config.json", "condition_density.safetensors"):
        (tmp_path / "broken" / name).write_bytes((folder / "epic" / name).read_bytes())
    weights = load_file(tmp_path / "broken" / "model.safetensors")
    weights["model.fc_l3.bias"].fill_(torch.nan)
    save_file(weights, tmp_path / "broken" / "model.safetensors", {"format": "pt"})
    arguments = ["--model", str(tmp_path / "broken"), "--cpu", "--n_jets", "4"]
    for solver, expected in (
        ("euler", "row 0: not finite after 24 evaluations"),
        ("dopri5", "no step is small enough"),
    ):
        assert generate_flow_jets([*arguments, "--solver", solver, "--output", str(tmp_path / solver)]) == 2
        assert expected in capsys.readouterr().err.strip().splitlines()[-1]
        assert not list((tmp_path / solver).glob("*.parquet"))


def test_released_model_makes_jets_as_its_card_says():
    card = Path(__file__).resolve().parents[2] / "model_cards" / "epic-fm-jets-small"
    model = AutoModelForPreTraining.from_pretrained(card).eval()
    extractor = AutoFeatureExtractor.from_pretrained(card)
    assert model.num_parameters() == 362_714 and model.config.num_inference_steps == 24
    classes = [extractor.label_names.index(name) for name in ("label_QCD", "label_Tbqq")] * 40
    request = extractor.sample_conditions(classes, seed=1, return_tensors="pt")
    sample = model.generate(**request, generator=torch.Generator().manual_seed(1))
    columns = extractor.batch_decode(sample, labels=request["labels"], conditions=request["conditions"])
    jets = as_jets(columns, features=[*TYPES, "part_charge"])
    mass = observe(jets).scalars["jet_mass"]
    is_top = jets.label == 8
    assert np.median(mass[is_top]) > 1.4 * np.median(mass[~is_top])
    # 0.51, 0.11, 0.37 of real jets; charges belong to types although nothing makes them
    shares = {name: jets.features[name].mean() for name in TYPES}
    assert shares["part_isChargedHadron"] == pytest.approx(0.51, abs=0.06)
    assert shares["part_isPhoton"] == pytest.approx(0.37, abs=0.06)
    assert wrong_charges(jets.features).mean() < 0.01
