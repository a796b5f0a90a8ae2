"""Golden vectors `omnijet_metrics`, `omnijet_c/metrics` and `omnijet_c/postprocess`: every output is compared."""

import numpy as np
import pytest
import torch

from hepzoo.evaluation.evaluate_jets import histogram_kl, published_quantile_kl
from hepzoo.evaluation.jet_substructure import substructure
from hepzoo.evaluation.jets import as_jets, observe
from hepzoo.evaluation.metric_tagging import percentile_rejection, tagging_metrics
from hepzoo.evaluation.showers import (
    Showers,
    center_of_gravity,
    energy_per_layer,
    radial_profile,
    visible_energy,
)
from hepzoo.modeling.conversion_omnijet_vqvae import convert_features
from hepzoo.tokenization.jet_features import make_features, transform
from hepzoo.tokenization.shower_voxels import separate_duplicate_hits
from tests.golden_sets import GoldenSet


def raw_columns(golden: GoldenSet) -> dict[str, list[np.ndarray]]:
    """The jets without padding, by column."""
    features, mask = golden.inputs["raw_features"].numpy(), golden.inputs["raw_mask"].numpy()
    order = golden.config["raw_feature_order"]
    return {name: [row[keep, i] for row, keep in zip(features, mask, strict=True)] for i, name in enumerate(order)}


def test_golden_omnijet_metrics_substructure():
    with GoldenSet("omnijet_metrics") as golden:
        columns = raw_columns(golden)
        rows = {name: columns[name] for name in ("part_pt", "part_etarel", "part_phirel")}
        jets = as_jets(rows)
        options = {"radius": golden.config["R"], "beta": golden.config["beta"], "pseudorapidity": True}
        observables = observe(jets, **options)
        for name in ("tau1", "tau2", "tau3", "tau21", "tau32", "d2"):
            golden.compare(f"sub_{name}", torch.from_numpy(observables.scalars[name]))
        # the reference subtracts float32 squares of about (500 GeV)^2: 5e-3 GeV where the mass is 10 GeV
        golden.compare("sub_jet_mass", torch.from_numpy(observables.scalars["jet_mass"]), atol=5e-3)
        golden.compare("sub_jet_n_constituents", torch.from_numpy(jets.multiplicity))
        for name, values in zip(("pt", "eta", "phi"), jets.axes, strict=True):
            golden.compare(f"sub_jet_{name}", torch.from_numpy(values))
        winner = observe(jets, recombination="WTA_pt", **options)
        for name in ("tau1", "tau2", "tau3", "tau21", "tau32"):
            golden.compare(f"wta_{name}", torch.from_numpy(winner.scalars[name]))

        reference, approximation = (golden.inputs[f"kl_{name}"].numpy() for name in ("ref", "approx"))
        for name in golden.names("kl_"):
            value = published_quantile_kl(reference, approximation, int(name.removeprefix("kl_")), "alpha")
            golden.compare(name, torch.tensor(value))

        scores, labels = golden.inputs["scores"].numpy().astype(np.float64), golden.inputs["labels"].numpy()
        for name in golden.names("rejection_"):
            percent = name.removeprefix("rejection_")
            rejection, cut = percentile_rejection(scores[labels == 1], scores[labels == 0], int(percent) / 100)
            golden.compare(name, torch.tensor(rejection))
            golden.compare(f"cut_{percent}", torch.tensor(cut))
        found = tagging_metrics(np.stack([1 - scores, scores], axis=1), labels, efficiencies=(0.3, 0.5))
        golden.compare("auc", torch.tensor(found["auc"]))
        golden.compare("accuracy", torch.tensor(found["accuracy"]))

        features = make_features(convert_features(golden.config))
        values = np.stack([np.concatenate(columns[feature.name]) for feature in features], axis=-1)
        passes = np.all([feature.passes(values[:, k]) for k, feature in enumerate(features)], axis=0)
        lengths = np.bincount(jets.owner[passes], minlength=len(jets))
        mask = np.arange(golden.config["pad_length"]) < lengths[:, None]
        preprocessed = np.zeros((*mask.shape, len(features)))
        rank = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        preprocessed[mask] = transform(features, values[passes])[rank < golden.config["pad_length"]]
        golden.compare("preprocessed_mask", torch.from_numpy(mask))
        golden.compare("preprocessed", torch.from_numpy(preprocessed))


def test_golden_omnijet_metrics_features():
    """The derived features of the inputs, from the four-momenta as stored."""
    golden = GoldenSet("omnijet_metrics")
    columns = raw_columns(golden)
    jets = as_jets({name: columns[name] for name in ("part_px", "part_py", "part_pz", "part_energy")})
    centered = jets.centered()
    total = jets.momentum[jets.owner]
    found = {
        "part_pt": jets.pt,
        "part_etarel": centered.eta,
        "part_phirel": centered.phi,
        "part_ptrel": jets.pt / jets.axes[0][jets.owner],
        "part_erel": np.concatenate(columns["part_energy"]) / total[:, 3],
        "part_deltaR": np.hypot(centered.eta, centered.phi),
    }
    for name, values in found.items():
        np.testing.assert_allclose(values, np.concatenate(columns[name]), rtol=1e-5, atol=2e-6, err_msg=name)


def test_golden_omnijet_c_metrics():
    with GoldenSet("omnijet_c/metrics") as golden:
        reference, approximation = golden.inputs["ref"].numpy(), golden.inputs["approx"].numpy()
        for bins in golden.config["n_bins"]:
            value = published_quantile_kl(reference, approximation, bins, "ntp")
            golden.compare(f"quantiled_kl_{bins}", torch.tensor(value))
        for name in golden.names("kl_hist_"):
            edges = np.linspace(-3, 3, int(name.removeprefix("kl_hist_")) + 1)  # range: README of the set
            golden.compare(name, torch.tensor(histogram_kl(reference, approximation, edges)))


def test_golden_omnijet_c_postprocess():
    with GoldenSet("omnijet_c/postprocess") as golden:
        hits, counts = golden.inputs["hits"].numpy(), golden.inputs["counts"].numpy()
        separated = separate_duplicate_hits(hits[:, :3], hits[:, 3], counts, published=True)
        merged = np.column_stack([separated.cells, hits[:, 3]])
        golden.compare("merged_hits", torch.from_numpy(merged))
        golden.compare("merged_counts", torch.from_numpy(counts))

        # the observables of the set are those of the continuous positions
        x, y, z, energy = hits.T.astype(np.float64)
        showers = Showers(np.ones(len(counts)), np.concatenate([[0], np.cumsum(counts)]), x, y, z, energy)
        shown = showers.above(golden.config["mip_cut_MeV"])
        cog = center_of_gravity(shown)
        golden.compare("cog_x", torch.from_numpy(cog[:, 0]))
        golden.compare("cog_z", torch.from_numpy(cog[:, 2]))
        golden.compare("n_hits", torch.from_numpy(shown.num_hits))
        golden.compare("e_sum", torch.from_numpy(visible_energy(shown)))
        golden.compare("radial_distance", torch.from_numpy(np.hypot(x - 14.5, y - 14.5)))
        rings = golden.outputs["e_per_radius"].shape[1]
        golden.compare("e_per_radius", torch.from_numpy(radial_profile(shown, center=(14.5, 14.5))[:, :rings]))
        layers = golden.outputs["e_per_layer"].shape[1]
        inside = Showers(
            shown.incident_energy, shown.offsets, shown.x, shown.y, np.floor(shown.z).astype(int), shown.energy
        )
        golden.compare("e_per_layer", torch.from_numpy(energy_per_layer(inside)[:, :layers]))


@pytest.mark.parametrize("recombination", ["E", "WTA_pt"])
def test_axes_by_rapidity_hardly_differ(recombination):
    golden = GoldenSet("omnijet_metrics")
    columns = raw_columns(golden)
    jets = as_jets({name: columns[name] for name in ("part_pt", "part_etarel", "part_phirel")})
    by_rapidity, published = (
        substructure(*jets.padded(), recombination=recombination, pseudorapidity=p) for p in (False, True)
    )
    for name in ("tau1", "tau2", "tau3"):
        np.testing.assert_allclose(by_rapidity[name], published[name], atol=2e-3)
        assert recombination == "E" or np.allclose(by_rapidity[name], published[name], atol=1e-12)
