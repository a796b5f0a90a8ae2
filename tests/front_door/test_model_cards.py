"""Released checkpoints do what their cards say; every card has the metadata that the Hub reads."""

from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoFeatureExtractor, AutoModelForPreTraining

import hepzoo  # noqa: F401
from hepzoo.data_scripts.simulate_tpc import simulate_tpc

CARDS = Path(__file__).resolve().parents[2] / "model_cards"


@pytest.mark.parametrize("folder", sorted(path.name for path in CARDS.iterdir()))
def test_every_card_has_metadata_and_a_small_folder(folder):
    _, metadata, text = (CARDS / folder / "README.md").read_text().split("---\n", 2)
    metadata = yaml.safe_load(metadata)
    assert (metadata["library_name"], metadata["license"]) == ("transformers", "apache-2.0")
    assert metadata["model_name"] == folder and "hepzoo" in metadata["tags"]
    for section in ("## Data", "## Results", "## Limits", "arXiv"):
        assert section in text
    assert sum(path.stat().st_size for path in (CARDS / folder).rglob("*")) < 10e6


def test_fm4npp_beats_the_trivial_prediction_as_its_card_says():
    folder = CARDS / "fm4npp-m1-tpc"
    model = AutoModelForPreTraining.from_pretrained(folder).eval()
    extractor = AutoFeatureExtractor.from_pretrained(folder)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 343_066
    events = simulate_tpc(12, seed=5)
    batch = extractor({name: events[name] for name in ("E", "x", "y", "z")}, return_tensors="pt")
    targets = batch["neighbor_labels"]
    is_target = targets != -100
    with torch.inference_mode():
        predictions = model(points=batch["points"], attention_mask=batch["attention_mask"]).predictions

    def error(values):
        return (values - targets)[is_target].square().mean().item()

    copies = batch["points"][..., 1:].repeat(1, 1, extractor.num_neighbors)
    # 0.0071 and 0.0112 for 100 events
    assert error(predictions) == pytest.approx(0.0071, rel=0.3)
    assert error(predictions) < 0.8 * error(copies)
