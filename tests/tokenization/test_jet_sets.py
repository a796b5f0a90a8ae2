"""What the feature extractors of sets share: classes, conditions and their density, folders, padding."""

import numpy as np
import pytest

from hepzoo import EpicFMFeatureExtractor, OmniLearnedFeatureExtractor
from hepzoo.tokenization.jet_sets import class_ids, label_columns
from tests.tokenization.test_feature_extraction_epic_fm import make_jets

EXTRACTORS = pytest.mark.parametrize("make", [EpicFMFeatureExtractor, OmniLearnedFeatureExtractor])


@EXTRACTORS
def test_drawn_multiplicity_is_the_condition(make):
    extractor = make(condition_names=["jet_pt", "jet_nparticles"]).fit(make_jets(40))
    request = extractor.sample_conditions([0, 8, 1, 8, 8, 0], seed=1)
    physical = extractor.physical_conditions(request["conditions"], 6)
    np.testing.assert_allclose(physical["jet_nparticles"], request["num_particles"], rtol=1e-5)
    assert ((physical["jet_pt"] > 450) & (physical["jet_pt"] < 1050)).all()


@EXTRACTORS
def test_a_folder_written_anew_has_no_old_density(make, tmp_path):
    make(condition_names=["jet_pt"]).fit(make_jets(40)).save_pretrained(tmp_path)
    assert make.from_pretrained(tmp_path).density is not None
    make(condition_names=["jet_pt", "jet_eta"]).save_pretrained(tmp_path)
    assert make.from_pretrained(tmp_path).density is None


@EXTRACTORS
def test_no_jets_are_no_error(make):
    batch = make()([], return_tensors="np")
    assert len(batch["particles"]) == len(batch["attention_mask"]) == len(batch["class_ids"]) == 0


def test_classes_that_no_jet_has_need_no_column():
    columns = {"label_QCD": [1, 0], "label_Tbl": [0, True]}
    np.testing.assert_array_equal(class_ids(columns, ["label_Hbb", "label_QCD", "label_Tbl"], 2), [1, 2])


def test_hostile_labels():
    for columns, expected in (
        ({"label_QCD": [1, 1], "label_Tbl": [0, 1]}, "row 1: not exactly one of label_QCD, label_Tbl is 1"),
        ({"label_QCD": [1, 0]}, "row 1: not exactly one of label_QCD is 1"),
        ({"label_QCD": [1, np.nan]}, "row 1: not exactly one"),
        ({"label_top": [1, 0]}, "column label_QCD is missing; expected some of label_QCD, label_Tbl"),
    ):
        with pytest.raises(ValueError, match=expected):
            class_ids(columns, ["label_QCD", "label_Tbl"], 2)
    with pytest.raises(ValueError, match="row 1: label -1, expected 0 to 1"):
        label_columns([0, -1], ["label_QCD", "label_Tbl"], 2)
    with pytest.raises(ValueError, match=r"labels have shape \(1,\), expected \(2,\)"):
        label_columns([0], ["label_QCD", "label_Tbl"], 2)


def test_hostile_directions_of_generated_particles():
    particles = np.zeros((2, 3, 4))
    particles[1, 2, 0] = 60.0
    with pytest.raises(ValueError, match="row 1, slot 2: .*expected finite features, eta and ln pT below 50"):
        OmniLearnedFeatureExtractor().batch_decode(particles, np.ones((2, 3)))
