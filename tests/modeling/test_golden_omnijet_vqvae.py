"""The VQ-VAEs of OmniJet against the references (arXiv:2403.05618, 2501.05534, 2512.04149)."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

from hepzoo.conversion import main as convert
from hepzoo.modeling.conversion_common import convert_state_dict
from hepzoo.modeling.conversion_omnijet_vqvae import KEY_PATTERNS
from hepzoo.tokenization.jet_features import inverse_transform, make_features, transform
from tests.golden_sets import GoldenSet

SETS = (
    "omnijet_vqvae_mlp",
    "omnijet_vqvae_transformer",
    "omnijet_vqvae_transformer_legacy",
    "omnijet_c/vqvae",
    "omnijet_ntp/vqvae",
)
NAMES = pytest.mark.parametrize("name", SETS)
ATTENTION = pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def converted(golden: GoldenSet, folder, attn_implementation: str = "sdpa", checkpoint: str | None = None):
    """Model of the golden checkpoint through `hepzoo convert` and `from_pretrained`, and its features."""
    checkpoint, config = checkpoint or golden.path("state_dict.safetensors"), golden.path("config.json")
    assert convert(["omnijet", "--checkpoint", checkpoint, "--config", config, "--output", str(folder)]) == 0
    model, info = AutoModel.from_pretrained(folder, attn_implementation=attn_implementation, output_loading_info=True)
    assert not any(info.values()), info
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.vqvae.config.codebook_size == tokenizer.codebook_size
    return model.eval(), make_features(tokenizer.features)


@NAMES
@ATTENTION
def test_golden_omnijet_vqvae(name, attn_implementation, tmp_path):
    with GoldenSet(name) as golden:
        model, features = converted(golden, tmp_path / "converted", attn_implementation)
        x, mask = golden.inputs["x"], golden.inputs["mask"]
        outputs = model(x, mask)
        golden.compare("z_e", outputs.latents, **TOLERANCE)
        assert torch.equal(outputs.codes, golden.expected("q"))
        assert torch.equal(model.encode(x, mask), golden.expected("q"))
        golden.compare("x_reco", outputs.reconstructed, **TOLERANCE)
        golden.compare("vq_loss", outputs.vq_loss, **TOLERANCE)
        golden.compare("reco_loss", outputs.reconstruction_loss, **TOLERANCE)
        golden.compare("loss", outputs.loss, **TOLERANCE)
        golden.compare("effective_codebook", model.quantizer.effective_codebook(), **TOLERANCE)
        if "z_q_nearest" in golden.outputs:
            golden.compare("z_q_nearest", model.quantizer.lookup(outputs.codes), **TOLERANCE)
            golden.compare("z_q_nearest", outputs.quantized, **TOLERANCE)
        if "decoded_from_codes" in golden.outputs:
            decoded = model.decode(outputs.codes, mask)
            golden.compare("decoded_from_codes", decoded, **TOLERANCE)
            physical = torch.from_numpy(inverse_transform(features, decoded.detach().double().numpy()))
            golden.compare("decoded_physical", physical * mask.unsqueeze(-1), rtol=1e-4, atol=1e-5)

        if (golden.folder / "grads.safetensors").is_file():
            outputs.loss.backward()
            gradients = {parameter: values.grad for parameter, values in model.named_parameters()}
            expected = convert_state_dict(load_file(golden.path("grads.safetensors")), KEY_PATTERNS)
            assert expected
            for parameter, gradient in expected.items():
                scale = gradient.abs().max().item()
                torch.testing.assert_close(gradients[parameter], gradient, rtol=0, atol=1e-5 * scale)


@NAMES
def test_golden_omnijet_vqvae_features(name, tmp_path):
    """The transform of the physical features is the input of the reference's network."""
    golden = GoldenSet(name)
    _, features = converted(golden, tmp_path / "converted")
    mask = golden.inputs["mask"].bool()
    physical = golden.inputs["showers" if name.startswith("omnijet_c") else "x_physical"]
    found = torch.from_numpy(transform(features, physical[mask].double().numpy())).float()
    torch.testing.assert_close(found, golden.inputs["x"][mask], **TOLERANCE)


@pytest.mark.parametrize("name", [name for name in SETS if name.startswith("omnijet_vqvae")])
def test_golden_omnijet_vqvae_has_gradients(name):
    assert GoldenSet(name).path("grads.safetensors")


def test_golden_omnijet_vqvae_from_lightning(tmp_path):
    """A Lightning checkpoint: names with `model.`, and everything else of the training run beside the weights."""
    golden = GoldenSet("omnijet_vqvae_transformer")
    state_dict = load_file(golden.path("state_dict.safetensors"))
    path = tmp_path / "model.ckpt"
    hyper_parameters = {"model_kwargs": {"alpha": 10}, "optimizer": torch.optim.AdamW}
    torch.save(
        {
            "state_dict": {f"model.{key}": value for key, value in state_dict.items()},
            "hyper_parameters": hyper_parameters,
        },
        path,
    )
    found, _ = converted(golden, tmp_path / "lightning", checkpoint=str(path))
    expected, _ = converted(golden, tmp_path / "plain")
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name
