"""Tokens, sequences, dark noise and decoded tracks equal the FM4DIRC reference (arXiv 2505.08736)."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from hepzoo.tokenization.noise_dirc import add_dark_noise
from hepzoo.tokenization.records_dirc import fiducial_cut
from hepzoo.tokenization.tokenization_cmhca_dirc import CMHCADircTokenizer

DEFAULT = Path(__file__).resolve().parents[1] / "golden"
SET = "dirc_tokenizer"


@pytest.fixture(scope="module")
def golden():
    root = os.environ.get("HEPZOO_GOLDEN_DIR")
    folder = Path(root or DEFAULT) / SET
    if not folder.exists():
        if root:
            pytest.skip(f"{SET} is not in HEPZOO_GOLDEN_DIR")
        pytest.fail(f"{folder} is missing")
    config = json.loads((folder / "config.json").read_text())
    return config, load_file(folder / "inputs.safetensors"), load_file(folder / "outputs.safetensors")


class Outputs(dict):
    """The reference outputs; remembers which were compared."""

    def __init__(self, values):
        super().__init__(values)
        self.compared = set()

    def check(self, name, ours, atol=0.0, rtol=0.0):
        expected = self[name]
        ours = np.asarray(ours)
        assert ours.shape == expected.shape, f"{name}: shape {ours.shape}, expected {expected.shape}"
        if expected.dtype.kind in "iu":
            assert ours.dtype.kind in "iu", f"{name}: dtype {ours.dtype}"
            np.testing.assert_array_equal(ours, expected, err_msg=name)
        else:
            np.testing.assert_allclose(ours, expected, atol=atol, rtol=rtol, err_msg=name)
        self.compared.add(name)


def make_tokenizer(config, **overrides):
    stats = config["stats"]
    columns = 6
    side = math.isqrt(config["npix"])
    assert side * side == config["npix"] and config["npmt"] % columns == 0
    arguments = {
        "geometry": {
            "pmt_rows": config["npmt"] // columns,
            "pmt_columns": columns,
            "pixel_rows": side,
            "pixel_columns": side,
        },
        "time_min": config["t_min"],
        "time_max": config["t_max"],
        "time_resolution": config["time_res"],
        "space_vocab_size": config["vocab_size"],
        "time_vocab_size": config["time_vocab"],
        "conditioning_ranges": (
            (stats["P_min"], stats["P_max"]),
            (stats["theta_min"], stats["theta_max"]),
        ),
        "model_max_length": config["max_seq_length"],
    }
    return CMHCADircTokenizer(**{**arguments, **overrides})


def read_tracks(inputs):
    offsets = inputs["track_offsets"]
    rows = []
    for i in range(len(offsets) - 1):
        part = slice(offsets[i], offsets[i + 1])
        rows.append(
            {
                "P": float(inputs["track_P"][i]),
                "Theta": float(inputs["track_Theta"][i]),
                "Phi": 0.0,
                "PDG": int(inputs["track_PDG"][i]),
                "NHits": int(inputs["track_NHits"][i]),
                "pmtID": inputs["track_pmtID"][part],
                "pixelID": inputs["track_pixelID"][part],
                "leadTime": inputs["track_leadTime"][part],
            }
        )
    return rows


def without_slots(encoding, tokenizer, name="input_ids"):
    return encoding[name][:, tokenizer.num_conditioning_tokens :]


def test_golden_dirc_tokenizer(golden):
    config, inputs, reference = golden
    outputs = Outputs(reference)
    tokenizer = make_tokenizer(config)
    stats = config["stats"]

    # 1. times, element by element
    outputs.check("bin_edges", tokenizer.time_edges)
    outputs.check("time_tokens", tokenizer.times_to_tokens(inputs["times"]))
    outputs.check("time_tokens_f32", tokenizer.times_to_tokens(inputs["times_f32"]))
    for name, jitter in (("detok_centre", 0.0), ("detok_low", -0.5), ("detok_high", 0.5)):
        outputs.check(name, tokenizer.tokens_to_times(inputs["detok_tokens"], jitter, legacy=True), rtol=1e-13)
    # The default inverse is one whole bin earlier, where the token came from.
    bins = np.arange(1, tokenizer.num_time_bins + 1)
    np.testing.assert_array_equal(tokenizer.times_to_tokens(tokenizer.tokens_to_times(bins)), bins)

    # 2. pixels
    pmt, pixel = inputs["pixmap_pmtID"], inputs["pixmap_pixelID"]
    outputs.check("pixmap_token", tokenizer.pixels_to_tokens(pmt, pixel))
    x, y = tokenizer.detector.pixel_center(pmt, pixel)
    outputs.check("pixmap_x_mm", x, rtol=1e-13)
    outputs.check("pixmap_y_mm", y, rtol=1e-13)
    np.testing.assert_array_equal(np.stack(tokenizer.detector.find_pixel(x, y)), np.stack([pmt, pixel]))

    # 3. tracks
    tracks = read_tracks(inputs)
    keep = fiducial_cut(
        tracks,
        p_range=(stats["P_min"], stats["P_max"]),
        theta_range=(stats["theta_min"], stats["theta_max"]),
        hits_range=(5, 250),
        time_range=(stats["time_min"], stats["time_max"]),
    )
    outputs.check("kept_track_index", np.flatnonzero(keep))
    kept = [tracks[i] for i in np.flatnonzero(keep)]
    encoding = tokenizer(kept, padding="max_length", truncation=True, check_nhits=False)
    sequences = without_slots(encoding, tokenizer)
    outputs.check("space_tokens", sequences[..., 0])
    outputs.check("time_tokens_seq", sequences[..., 1])
    assert not encoding["input_ids"][:, : tokenizer.num_conditioning_tokens].any()
    outputs.check("class_label", encoding["class_ids"])
    outputs.check("kinematics_unscaled", encoding["kinematics"], rtol=1e-7)
    unscaled = np.stack([[track["P"], track["Theta"]] for track in kept])
    outputs.check("kinematics_scaled", tokenizer.scale_kinematics(unscaled), atol=1e-14)

    short = reference["space_tokens_len32"].shape[1]
    encoding = tokenizer(kept, padding="max_length", truncation=True, max_length=short, check_nhits=False)
    sequences = without_slots(encoding, tokenizer)
    outputs.check(f"space_tokens_len{short}", sequences[..., 0])
    outputs.check(f"time_tokens_seq_len{short}", sequences[..., 1])

    regression = make_tokenizer(config, time_encoding="regression", legacy_time_sentinels=True)
    encoding = regression(kept, padding="max_length", truncation=True, check_nhits=False)
    outputs.check("time_regression_seq", without_slots(encoding, regression, "times"), rtol=1e-7, atol=1e-8)
    np.testing.assert_array_equal(without_slots(encoding, regression)[..., 0], reference["space_tokens"])

    # 4. dark noise, replaying the reference's uniform numbers
    index = reference["noise_track_index"]
    noisy = []
    for i, draws in zip(index, inputs["noise_uniform_draws"], strict=True):
        draws = iter(draws[~np.isnan(draws)].tolist())
        noisy.append(
            add_dark_noise(tracks[i], tokenizer.detector, scale=100.0, uniform=lambda draws=draws: next(draws))
        )
        assert next(draws, None) is None, "not every uniform number was consumed"
    # Which tracks had noise added is the reference's choice: the ones its cut kept, in order.
    outputs.check("noise_track_index", np.flatnonzero(keep)[: len(index)])
    encoding = tokenizer(
        noisy, padding="max_length", truncation=True, on_invalid="drop_hits", return_hit_labels=True, check_nhits=False
    )
    sequences = without_slots(encoding, tokenizer)
    outputs.check("noise_space_tokens", sequences[..., 0])
    outputs.check("noise_time_tokens", sequences[..., 1])
    labels = without_slots(encoding, tokenizer, "labels")
    space = sequences[..., 0]
    assert (labels[space == 0] == -100).all() and (labels[space >= tokenizer.space_eos_token_id] == -100).all()
    # The reference labels special positions by their own token id.
    special = (space == 0) | (space >= tokenizer.space_eos_token_id)
    outputs.check("noise_hit_labels", np.where(special, space, labels))

    # 5. post-processing of generated sequences
    ids = np.stack([inputs["gen_space_tokens"], inputs["gen_time_tokens"]], axis=-1)
    columns = tokenizer.batch_decode(
        ids, kinematics=inputs["gen_kinematics_unscaled"], min_hits=5, max_hits=250, legacy=True
    )
    outputs.check("gen_track_offsets", np.concatenate([[0], np.cumsum(columns["NHits"], dtype=np.int64)]))
    for name in ("x", "y", "leadTime"):
        outputs.check(f"gen_{name}", np.concatenate(columns[name]), rtol=1e-7)
    for name in ("pmtID", "pixelID", "channel"):
        outputs.check(f"gen_{name}", np.concatenate(columns[name]))
    for name in ("P", "Theta"):
        outputs.check(f"gen_{name}", columns[name], rtol=1e-7)
        np.testing.assert_allclose(
            columns[name],
            inputs["gen_kinematics_unscaled"][columns["row_index"], ("P", "Theta").index(name)],
            rtol=1e-7,
        )

    missed = set(reference) - outputs.compared
    assert not missed, f"reference outputs that nothing compares: {sorted(missed)}"


def test_golden_dirc_tokenizer_left_padding(golden):
    config, inputs, reference = golden
    tokenizer = make_tokenizer(config, padding_side="left")
    kept = [read_tracks(inputs)[i] for i in reference["kept_track_index"]]
    ids = tokenizer(kept, padding="max_length", truncation=True, check_nhits=False)
    slots = tokenizer.num_conditioning_tokens
    for row, mask, space in zip(ids["input_ids"], ids["attention_mask"], reference["space_tokens"], strict=True):
        real = row[mask.astype(bool)][slots:, 0]
        np.testing.assert_array_equal(real, space[space != tokenizer.space_pad_token_id])
