"""Hits, delayed streams, masks and decoded showers equal the SPADE reference (arXiv 2606.11304)."""

import numpy as np
import pytest
import torch

from hepzoo.tokenization.records_spade import shower_columns
from hepzoo.tokenization.tokenization_spade import SpadeTokenizer
from tests.golden_sets import GoldenSet

# Outputs of the network: tests/modeling compares them.
NETWORK_OUTPUTS = ("decoder_", "out_", "loss_", "stop_", "gen_")


def make_tokenizer(config, **overrides):
    dataset, energy = config["dataset"], config["features"]["energy"]
    assert energy["func"] == "np.log" and energy["inv_func"] == "np.exp"
    arguments = {
        "nbins": [dataset[f"nbins_{axis}"] for axis in "xyz"],
        "axis_mode": dataset["axis_mode"],
        "num_registers": config["kwargs"]["n_registers"],
        "energy_transform": {"log": True, "subtract": energy["subtract_by"], "multiply": energy["multiply_by"]},
        "energy_threshold": dataset["energy_threshold"],
        "model_max_length": dataset["pad_length"],
        "legacy_pad_length": dataset["pad_length"],
    }
    return SpadeTokenizer(**{**arguments, **overrides})


def affine(values, feature):
    assert feature["func"] is None
    return (np.asarray(values, dtype=np.float64) - feature["subtract_by"]) * feature["multiply_by"]


def padded(arrays, width):
    """(rows, width) of ragged rows, 0 behind them."""
    result = np.zeros((len(arrays), width), dtype=np.asarray(arrays[0]).dtype)
    for row, values in zip(result, arrays, strict=True):
        row[: len(values)] = values
    return result


@pytest.mark.parametrize("mode", ["split", "combined"])
@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_golden_spade_tokenizer(mode, padding_side):
    with GoldenSet(f"spade/{mode}") as golden:
        config = golden.config
        golden.compared.update(name for name in golden.outputs if name.startswith(NETWORK_OUTPUTS))
        tokenizer = make_tokenizer(config, padding_side=padding_side)
        slots, width = tokenizer.num_conditioning_tokens, config["dataset"]["pad_length"]
        incident = golden.inputs["incident_energy_gev"]
        rows = {"showers": golden.inputs["raw_showers"], "incident_energy": incident}
        batch = tokenizer(rows, padding="max_length", return_tensors="pt")
        assert batch["input_ids"].shape == (len(incident), slots + width, tokenizer.num_streams)

        # 1. delayed streams; on the left, padding comes first
        ids, mask, energy = batch["input_ids"], batch["attention_mask"].bool(), batch["hit_energy"]
        if padding_side == "left":
            shift = [-int((~row).sum()) for row in mask]
            ids, mask, energy = (
                torch.stack([torch.roll(row, n, 0) for row, n in zip(values, shift, strict=True)])
                for values in (ids, mask, energy)
            )
        assert mask[:, :slots].all() and not energy[:, :slots].any()
        assert (ids[:, :slots] == torch.tensor(tokenizer.missing_token_ids)).all()
        ids, mask, energy = ids[:, slots:], mask[:, slots:], energy[:, slots:]
        golden.compare("attention_mask", mask)
        golden.compare("energy", energy)
        for stream, name in enumerate(tokenizer.stream_names):
            golden.compare("token_ids" if mode == "combined" else f"{name}_token", ids[..., stream])
        for stream, name in enumerate(tokenizer.stream_names):
            cell = (ids[..., stream] > 0) & (ids[..., stream] < tokenizer.missing_token_ids[stream])
            golden.compare("valid_mask_token_ids" if mode == "combined" else f"valid_mask_{name}", cell)
        place = torch.arange(width) - 1 - tokenizer.energy_delay
        golden.compare("valid_mask_energy", mask & (place >= 0) & (place < golden.outputs["n_hits"][:, None]))

        # 2. hits in sorting order, before the delay
        columns, count, _ = shower_columns(rows)
        showers = tokenizer._read_showers(columns, count, "error", width, truncate=True)
        lengths = showers["lengths"]
        hits = np.concatenate([showers["cells"], tokenizer.transform_energy(showers["energy"])[:, None]], axis=-1)
        features = np.stack([padded(np.split(hits[:, k], np.cumsum(lengths)[:-1]), width) for k in range(4)], axis=-1)
        real = np.arange(width) < lengths[:, None]
        golden.compare("hit_features", torch.from_numpy(features))
        golden.compare("hit_mask", torch.from_numpy(real))
        golden.compare("n_hits", torch.from_numpy(lengths))
        golden.compare(
            "incident_energy_cond", torch.from_numpy(affine(incident, config["features"]["incident_energy"]))
        )
        golden.compare("n_hits_cond", torch.from_numpy(affine(lengths, config["features"]["n_hits"])))
        golden.compare("physical_energy", torch.from_numpy(features[..., 3]))
        for k, axis in enumerate("xyz"):
            # Padding rows of the reference's copies name the first cell.
            golden.compare(f"physical_{axis}_token", torch.from_numpy(features[..., k].astype(np.int64) + 1))

        # 3. back to showers
        decoded = tokenizer.batch_decode(batch["input_ids"], batch["hit_energy"], incident_energy=incident)
        golden.compare("roundtrip_hit_mask", torch.from_numpy(np.arange(width) < decoded["num_hits"][:, None]))
        roundtrip = np.stack([padded(decoded[name], width) for name in ("x", "y", "z", "energy")], axis=-1)
        golden.compare("roundtrip_hit_features", torch.from_numpy(roundtrip))
        np.testing.assert_array_equal(decoded["incident_energy"], incident.numpy())


@pytest.mark.parametrize("mode", ["split", "combined"])
def test_golden_spade_generated_showers(mode):
    """The reference's generated streams decode to the hits that it decoded."""
    with GoldenSet(f"spade/{mode}") as golden:
        tokenizer = make_tokenizer(golden.config)
        slots = tokenizer.num_conditioning_tokens
        for prefix in ("gen_physics_stop", "gen_twovotes", "gen_force", "gen_nhitsstop", "gen_nolimit"):
            names = ["token_ids"] if mode == "combined" else [f"{name}_token" for name in tokenizer.stream_names]
            ids = torch.stack([golden.expected(f"{prefix}_{name}") for name in names], dim=-1)
            energy = golden.expected(f"{prefix}_energy")[..., 0]
            hit_mask, filled = golden.expected(f"{prefix}_hit_mask"), (ids > 0).any(-1).sum(-1)
            missing = torch.tensor(tokenizer.missing_token_ids).expand(len(ids), slots, -1)
            sequences = torch.cat([missing, ids], dim=1)
            energies = torch.cat([torch.zeros(len(ids), slots), energy], dim=1)
            decoded = tokenizer.batch_decode(sequences, energies, num_hits=hit_mask.sum(-1))
            features = golden.expected(f"{prefix}_hit_features")
            for row, (expected, keep) in enumerate(zip(features, hit_mask, strict=True)):
                number = int(decoded["num_hits"][row])
                # The reference gives hits a default energy where generation ended before it.
                assert number == min(int(keep.sum()), int(filled[row]) - 1 - tokenizer.energy_delay)
                for k, name in enumerate(("x", "y", "z", "energy")):
                    np.testing.assert_allclose(decoded[name][row], expected[:number, k], rtol=1e-5, err_msg=name)
        golden.compared.update(golden.outputs)
