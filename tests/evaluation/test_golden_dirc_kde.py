"""Golden vectors `dirc_kde`: every output tensor is compared; see the README of the set for its tolerances."""

import copy
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from hepzoo.evaluation.kde import DEFAULT_CUT, log_likelihood, photon_probabilities
from hepzoo.evaluation.roc import filter_metrics, filter_scan, precision_recall_curve, roc_scan
from hepzoo.evaluation.separation import separation_power

SETS = Path(os.environ.get("HEPZOO_GOLDEN_DIR") or Path(__file__).parents[1] / "golden")
FIT_RTOL = 1e-4  # the set's README: scipy curve_fit
# The reference's float16 values are not the target (the float64 ones are): the float64 formula is applied to inputs
# rounded to float16, which is the larger part of the difference (times above 32 ns move by up to 0.016 ns, that is
# 0.16 kernel widths). What remains is float16 arithmetic: 11 bits, results below 6e-8 lost, LL in steps of 1/16.
F16_TPROB_RTOL, F16_TPROB_ATOL = 0.01, 2e-6
F16_LOGLIK_ATOL = 0.125


class Golden:
    """The set, and the record of which outputs were compared."""

    def __init__(self, folder: Path):
        self.config = json.loads((folder / "config.json").read_text())
        self.inputs = load_file(folder / "inputs.safetensors")
        self.outputs = load_file(folder / "outputs.safetensors")

    @property
    def kernel(self) -> dict:
        return {"widths": tuple(self.config[f"sigma_{axis}"] for axis in "xyt")}


@pytest.fixture(scope="module")
def golden() -> Golden:
    folder = SETS / "dirc_kde"
    if not folder.is_dir():
        if os.environ.get("HEPZOO_GOLDEN_DIR"):
            pytest.skip(f"{folder} is absent")
        pytest.fail(f"{folder} is absent")
    return Golden(folder)


# One rule per kind of output: (pattern, function of (golden, match) -> value, tolerances of assert_allclose).
def _probabilities(golden: Golden, match: re.Match) -> np.ndarray:
    return photon_probabilities(
        golden.inputs["hits"], golden.inputs[f"support_{match['species']}"], cut=None, **golden.kernel
    )


def _loglik(golden: Golden, match: re.Match) -> float:
    return log_likelihood(
        golden.inputs["hits"],
        golden.inputs[f"support_{match['species']}"],
        log_scale=golden.config["log_mult"],
        cut=None,
        **golden.kernel,
    )


def _rounded(golden: Golden) -> Golden:
    other = copy.copy(golden)
    other.inputs = {name: value.astype(np.float16).astype(np.float64) for name, value in golden.inputs.items()}
    return other


def _probabilities_f16(golden: Golden, match: re.Match) -> np.ndarray:
    return _probabilities(_rounded(golden), match)


def _loglik_f16(golden: Golden, match: re.Match) -> float:
    return _loglik(_rounded(golden), match)


def _kde_fit(golden: Golden, match: re.Match) -> np.ndarray:
    p = match["momentum"]
    kaon, pion = golden.inputs[f"dll_kaon_{p}"], golden.inputs[f"dll_pion_{p}"]
    return separation_power(kaon, pion, edges=float(p)).as_array()


def _classifier_fit(golden: Golden, match: re.Match) -> np.ndarray:
    p = match["momentum"]
    kaon, pion = golden.inputs[f"dll_kaon_{p}"], golden.inputs[f"dll_pion_{p}"]
    return separation_power(kaon, pion, edges="classifier", signed=True).as_array()


def _auc(golden: Golden, match: re.Match) -> float:
    # "first 500 kaons and 500 pions at 6.0": half of the number in the key, at 6 GeV/c or the momentum nearest to it.
    momenta = [key.removeprefix("dll_kaon_") for key in golden.inputs if key.startswith("dll_kaon_")]
    p = min(momenta, key=lambda text: abs(float(text) - 6))
    n = int(match["number"]) // 2
    return roc_scan(golden.inputs[f"dll_kaon_{p}"][:n], golden.inputs[f"dll_pion_{p}"][:n]).auc


def _filter(golden: Golden, match: re.Match) -> np.ndarray | float:
    probability, label = golden.inputs["filter_prob"], golden.inputs["filter_label"]
    what = match["what"]
    if what == "prf_at_half":
        found = filter_metrics(probability, label)
        return np.array([found["precision"], found["recall"], found["f1"]])
    if what in ("precision", "recall"):
        return precision_recall_curve(probability, label, golden.outputs[match[0]].size)[what]
    if what == "auc":
        return filter_scan(probability, label, golden.outputs["filter_signal_retention"].size)["area"]
    return filter_scan(probability, label, golden.outputs[match[0]].size)[what]


RULES = [
    (r"tprob_f64_(?P<species>kaon|pion)", _probabilities, {"rtol": 1e-9, "atol": 1e-30}),
    (r"loglik_f64_(?P<species>kaon|pion)", _loglik, {"rtol": 1e-10, "atol": 1e-9}),
    (r"tprob_f16_(?P<species>kaon|pion)", _probabilities_f16, {"rtol": F16_TPROB_RTOL, "atol": F16_TPROB_ATOL}),
    (r"loglik_f16_(?P<species>kaon|pion)", _loglik_f16, {"rtol": 0, "atol": F16_LOGLIK_ATOL}),
    (r"kde_fit_(?P<momentum>[\d.]+)", _kde_fit, {"rtol": FIT_RTOL, "atol": 0}),
    (r"classifier_fit_(?P<momentum>[\d.]+)", _classifier_fit, {"rtol": FIT_RTOL, "atol": 0}),
    (r"auc_(?P<number>\d+)", _auc, {"rtol": 1e-9, "atol": 0}),
    (
        r"filter_(?P<what>precision|recall|signal_retention|noise_rejection|auc|prf_at_half)",
        _filter,
        {"rtol": 1e-6, "atol": 1e-9},
    ),
]


def _rule(name: str):
    for pattern, compute, tolerance in RULES:
        match = re.fullmatch(pattern, name)
        if match:
            return match, compute, tolerance
    return None


def _names() -> list[str]:
    file = SETS / "dirc_kde" / "outputs.safetensors"
    return sorted(load_file(file)) if file.is_file() else ["set"]


@pytest.mark.parametrize("name", _names())
def test_golden_dirc_kde_output(golden, name):
    rule = _rule(name)
    assert rule is not None, f"nothing compares the output {name!r}"
    match, compute, tolerance = rule
    np.testing.assert_allclose(compute(golden, match), golden.outputs[name], **tolerance)


def test_golden_dirc_kde_is_complete(golden):
    """No kind of output that the README names is missing, and none is unknown."""
    missing = [p for p, _, _ in RULES if not any(re.fullmatch(p, name) for name in golden.outputs)]
    assert not missing, f"the set holds no output for {missing}"
    unknown = [name for name in golden.outputs if _rule(name) is None]
    assert not unknown, f"nothing compares {unknown}"
    for species in ("kaon", "pion"):
        for kind in ("tprob_f64", "loglik_f64", "tprob_f16", "loglik_f16"):
            assert f"{kind}_{species}" in golden.outputs
    momenta = {key.removeprefix("dll_kaon_") for key in golden.inputs if key.startswith("dll_kaon_")}
    assert momenta == {key.removeprefix("kde_fit_") for key in golden.outputs if key.startswith("kde_fit_")}
    for what in ("precision", "recall", "signal_retention", "noise_rejection", "auc", "prf_at_half"):
        assert f"filter_{what}" in golden.outputs


@pytest.mark.parametrize("species", ["kaon", "pion"])
@pytest.mark.parametrize(
    "options",
    [{}, {"method": "tree"}, {"method": "pixels"}, {"cut": 3.0}, {"dtype": np.float32}, {"block_pairs": 100}],
    ids=str,
)
def test_golden_dirc_kde_fast_paths(golden, species, options):
    """The default cut-off, both searches, a tight memory block and float32 against the reference's float64 formula."""
    hits, support = golden.inputs["hits"], golden.inputs[f"support_{species}"]
    single = options.get("dtype") == np.float32
    cut = options.get("cut", DEFAULT_CUT)
    found = photon_probabilities(hits, support, **golden.kernel, **options)
    wanted = golden.outputs[f"tprob_f64_{species}"]
    np.testing.assert_allclose(
        found, wanted, rtol=1e-5 if single else 1e-12, atol=1e-9 if single else np.exp(-(cut**2))
    )
    total = log_likelihood(hits, support, log_scale=golden.config["log_mult"], **golden.kernel, **options)
    np.testing.assert_allclose(total, golden.outputs[f"loglik_f64_{species}"], rtol=0, atol=1e-4 if single else 2e-5)
