"""The VQ-VAE of OmniJet: shapes, padding, losses, initialisation, loading, training, bad input."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, Trainer, TrainingArguments

from hepzoo.modeling.configuration_omnijet_vqvae import OmniJetVQVAEConfig
from hepzoo.modeling.conversion_common import convert_state_dict
from hepzoo.modeling.conversion_omnijet_vqvae import KEY_PATTERNS, convert_config, convert_features
from hepzoo.modeling.modeling_omnijet_vqvae import OmniJetVQVAEModel

AutoConfig.register("omnijet_vqvae", OmniJetVQVAEConfig, exist_ok=True)
AutoModel.register(OmniJetVQVAEConfig, OmniJetVQVAEModel, exist_ok=True)

TINY = {
    "codebook_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "encoder_layer_sizes": (16, 12),
    "decoder_layer_sizes": (10,),
}
VARIANTS = {
    "normformer": {},
    "transformer": {"architecture": "transformer"},
    "causal": {"architecture": "transformer", "causal_decoder": True, "residual_gate": "global"},
    "constant": {"architecture": "transformer", "residual_gate": "constant", "residual_gate_value": 0.5},
    "mlp": {"architecture": "mlp"},
    "shower": {"num_features": 4, "latent_size": 12, "reconstruction_loss": "sum_over_features", "kmeans_init": False},
}
EVERY = pytest.mark.parametrize("variant", VARIANTS)


def make(variant="normformer", **kwargs) -> OmniJetVQVAEModel:
    torch.manual_seed(0)
    model = OmniJetVQVAEModel(OmniJetVQVAEConfig(**{**TINY, **VARIANTS[variant], **kwargs})).eval()
    # away from the initialisation, where blocks do nothing
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("quantizer"):
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def batch(model, lengths=(6, 3, 1), width=6, seed=1):
    torch.manual_seed(seed)
    mask = (torch.arange(width) < torch.tensor(lengths).unsqueeze(-1)).long()
    features = torch.randn(len(lengths), width, model.config.num_features) * mask.unsqueeze(-1)
    return features, mask


@EVERY
def test_forward_is_encode_and_decode(variant):
    model = make(variant)
    features, mask = batch(model)
    output = model(features, mask)
    codes = model.encode(features, mask)
    assert codes.dtype == torch.int64 and torch.equal(codes, output.codes)
    assert codes.min() >= 0 and codes.max() < model.config.codebook_size
    torch.testing.assert_close(model.decode(codes, mask), output.reconstructed)
    assert not output.reconstructed[mask == 0].any()
    torch.testing.assert_close(output.loss, output.reconstruction_loss + model.config.vq_loss_weight * output.vq_loss)
    assert model(features, mask, return_loss=False).loss is None


@EVERY
def test_losses_written_out(variant):
    for exclude_padding in (True, False):
        model = make(variant, exclude_padding=exclude_padding)
        features, mask = batch(model)
        features = features + 5 * (1 - mask).unsqueeze(-1)
        output = model(features, mask)
        errors = (output.reconstructed - features).square()
        if variant == "shower":
            expected = errors[mask.bool()].sum(-1).mean()
        else:
            expected = errors[mask.bool()].mean() if exclude_padding else errors.mean()
        torch.testing.assert_close(output.reconstruction_loss, expected)


@EVERY
def test_padding_changes_nothing(variant):
    model = make(variant)
    features, mask = batch(model)
    expected = model(features, mask)
    filled = features + 7.0 * (1 - mask).unsqueeze(-1)
    wide = torch.cat([filled, torch.full_like(filled[:, :2], -3.0)], dim=1)
    wide_mask = torch.cat([mask, torch.zeros_like(mask[:, :2])], dim=1)
    found = model(wide, wide_mask)
    real = mask.bool()
    assert torch.equal(found.codes[:, :6][real], expected.codes[real])
    for name in ("loss", "perplexity", "codebook_usage"):
        torch.testing.assert_close(found[name], expected[name])
    torch.testing.assert_close(found.reconstructed[:, :6][real], expected.reconstructed[real])
    alone = model(features[1:2, :3])
    torch.testing.assert_close(alone.reconstructed, expected.reconstructed[1:2, :3], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", ["normformer", "transformer", "mlp"])
def test_order_of_constituents_does_not_matter(variant):
    model = make(variant)
    features, _ = batch(model, lengths=(6, 6))
    order = torch.randperm(6)
    torch.testing.assert_close(model(features[:, order]).reconstructed, model(features).reconstructed[:, order])


def test_causal_decoder_only_looks_back():
    model = make("causal")
    codes = torch.randint(0, 50, (2, 8))
    expected = model.decode(codes)
    changed = codes.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 50
    torch.testing.assert_close(model.decode(changed)[:, :5], expected[:, :5])
    assert not torch.allclose(model.decode(changed)[:, 5:], expected[:, 5:])
    torch.testing.assert_close(model.decode(codes[:, :5]), expected[:, :5])


@pytest.mark.parametrize("variant", ["normformer", "transformer"])
def test_jet_features_condition_both_halves(variant):
    model = make(variant, num_jet_features=2)
    features, mask = batch(model)
    jets = torch.randn(3, 2)
    output = model(features, mask, jet_features=jets)
    assert not torch.allclose(model(features, mask, jet_features=jets + 1).latents, output.latents)
    assert not torch.allclose(model.decode(output.codes, mask, jets + 1), output.reconstructed)
    torch.testing.assert_close(model.decode(output.codes, mask, jets), output.reconstructed)


@EVERY
def test_eager_equals_sdpa_and_empty_rows_stay_finite(variant):
    sdpa, eager = make(variant), make(variant)
    eager.set_attn_implementation("eager")
    features, mask = batch(sdpa, lengths=(6, 2, 0))
    expected, found = sdpa(features, mask), eager(features, mask)
    for name in ("loss", "latents", "reconstructed"):
        assert torch.isfinite(expected[name]).all()
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)


@EVERY
def test_save_and_load(variant, tmp_path):
    model = make(variant)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is OmniJetVQVAEModel and not any(info.values())
    features, mask = batch(model)
    torch.testing.assert_close(loaded(features, mask).loss, model(features, mask).loss)
    assert (tmp_path / "modeling_omnijet_vqvae.py").is_file() and (tmp_path / "vector_quantization.py").is_file()


def test_half_precision_keeps_the_codebook(tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    half = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.quantizer.codebook.dtype == torch.float32 and half.encoder.project_in.weight.dtype == torch.bfloat16
    features, mask = batch(model)
    output = half(features, mask)
    assert torch.isfinite(output.loss) and output.reconstructed.dtype == torch.bfloat16
    torch.testing.assert_close(half.decode(output.codes, mask), output.reconstructed, rtol=0.05, atol=0.05)


def test_published_sizes_and_initialization():
    model = OmniJetVQVAEModel(OmniJetVQVAEConfig())
    assert model.num_parameters() == 833_551
    assert OmniJetVQVAEModel(OmniJetVQVAEConfig(codebook_size=512)).num_parameters() == 802_831
    shower = OmniJetVQVAEConfig(num_features=4, latent_size=12, codebook_size=65_536)
    assert OmniJetVQVAEModel(shower).num_parameters() == 1_589_544
    layer = model.encoder.layers[0]
    for parameter in (layer.attention_norm.weight, layer.mlp.fc2.weight, layer.mlp.fc2.bias):
        assert not parameter.any()
    for parameter in (layer.self_attn.qkv_proj.bias, layer.self_attn.o_proj.bias, layer.mlp.norm.bias):
        assert not parameter.any()
    assert (layer.attention_output_norm.weight == 1).all()
    bound = (6 / (4 * 128)) ** 0.5
    assert 0.95 * bound < layer.self_attn.qkv_proj.weight.abs().max() <= bound
    assert 0.95 < model.quantizer.codebook.std() < 1.05
    # a block starts as the identity
    states = torch.randn(2, 5, 128)
    torch.testing.assert_close(layer.eval()(states, None, None), states)


def test_missing_weights_are_initialized(tmp_path):
    """Loading goes through the meta device: what the file does not hold is initialised, buffers too."""
    make("transformer", kmeans_init=False, replace_freq=0).save_pretrained(tmp_path)
    loaded, info = AutoModel.from_pretrained(
        tmp_path, kmeans_init=True, replace_freq=7, output_loading_info=True, trust_remote_code=False
    )
    assert set(info["missing_keys"]) == {"quantizer.counts", "quantizer.data_initialized"}
    assert (loaded.quantizer.counts == 7).all() and loaded.quantizer.data_initialized.item() == 0


@EVERY
def test_gradient_checkpointing_gives_the_same_gradients(variant):
    gradients = []
    for checkpointing in (False, True):
        model = make(variant, attention_dropout=0.0, hidden_dropout=0.0).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(4)
        model(*batch(model)).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(gradient is not None for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


class Jets(torch.utils.data.Dataset):
    def __init__(self):
        torch.manual_seed(2)
        self.rows = [
            {"particle_features": torch.randn(8, 3), "attention_mask": torch.ones(8).long()} for _ in range(64)
        ]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def test_trainer_trains_and_evaluates(tmp_path):
    torch.manual_seed(0)
    model = OmniJetVQVAEModel(OmniJetVQVAEConfig(**TINY))
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=30, per_device_train_batch_size=32, learning_rate=1e-2, report_to=[],
        save_strategy="no", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=Jets(), eval_dataset=Jets())
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert after < 0.9 * before
    assert model.quantizer.data_initialized.item() == 1


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"architecture": "cnn"}, "`architecture` is 'cnn'"),
        ({"reconstruction_loss": "max"}, "`reconstruction_loss` is 'max'"),
        ({"hidden_size": 30}, "`hidden_size` = 30 is not a multiple of `num_attention_heads` = 4"),
        ({"codebook_size": 1}, "`codebook_size` is 1, expected at least 2"),
        ({"beta": 1.5}, "`beta` is 1.5, expected a number in 0..1"),
        ({"architecture": "mlp", "num_jet_features": 2}, "'mlp'"),
        ({"architecture": "mlp", "encoder_layer_sizes": [4, 0]}, "`encoder_layer_sizes` is [4, 0]"),
    ],
)
def test_hostile_configurations(settings, message):
    with pytest.raises(Exception) as error:
        OmniJetVQVAEConfig(**{**TINY, **settings})
    assert message in str(error.value.__cause__ or error.value)


def test_hostile_inputs():
    model = make()
    features, mask = batch(model)
    for arguments, message in (
        ((features[..., :2], mask), "particle_features has shape (3, 6, 2), expected (batch, length, 3)"),
        ((features, mask[:, :4]), "attention_mask has shape (3, 4), expected (3, 6)"),
        ((features, mask, torch.zeros(3, 1)), "num_jet_features = 0"),
        ((features[:0], mask[:0]), "the input has shape (0, 6, 3), expected at least one jet and one constituent"),
    ):
        with pytest.raises(ValueError) as error:
            model(*arguments)
        assert message in str(error.value)
    with pytest.raises(ValueError, match="jet_features has shape None, expected \\(3, 2\\)"):
        make(num_jet_features=2)(features, mask)


def reference_checkpoint():
    """A checkpoint in the names of the reference, with its configuration."""
    block = {
        "norm1.weight": (8,), "norm1.bias": (8,), "norm2.weight": (8,), "norm2.bias": (8,),
        "attn.in_proj_weight": (24, 8), "attn.in_proj_bias": (24,),
        "attn.out_proj.weight": (8, 8), "attn.out_proj.bias": (8,),
        "mlp.0.weight": (8,), "mlp.0.bias": (8,), "mlp.1.weight": (8, 8), "mlp.1.bias": (8,),
        "mlp.4.weight": (8, 8), "mlp.4.bias": (8,),
    }  # fmt: skip
    shapes = {
        "input_projection.weight": (8, 3), "input_projection.bias": (8,),
        "latent_projection_in.weight": (2, 8), "latent_projection_in.bias": (2,),
        "latent_projection_out.weight": (8, 2), "latent_projection_out.bias": (8,),
        "output_projection.weight": (3, 8), "output_projection.bias": (3,),
        "vqlayer.codebook.weight": (5, 2), "vqlayer._counts": (5,),
        "vqlayer.affine_transform.scale": (1, 2), "vqlayer.affine_transform.bias": (1, 2),
    }  # fmt: skip
    for part in ("encoder", "decoder"):
        shapes.update({f"{part}_normformer.blocks.0.{name}": shape for name, shape in block.items()})
    config = {
        "model": {
            "optimizer": {"alpha": 0.5},
            "model_kwargs": {
                "num_heads": 2, "hidden_dim": 8, "alpha": 7,
                "vq_kwargs": {"num_codes": 5, "affine_lr": 2, "beta": 0.8, "replace_freq": 10},
            },
        },
        "feature_dict": {"part_pt": {"func": "np.log", "inv_func": "np.exp"}},
    }  # fmt: skip
    return {f"model.{name}": torch.randn(shape) for name, shape in shapes.items()}, config


def test_conversion_of_a_training_configuration():
    state_dict, config = reference_checkpoint()
    found = convert_config(config, convert_state_dict(state_dict, KEY_PATTERNS))
    assert (found.vq_loss_weight, found.beta, found.affine_lr, found.num_attention_heads) == (7, 0.8, 2, 2)
    assert (found.hidden_size, found.codebook_size, found.latent_size, found.replace_freq) == (8, 5, 2, 10)
    assert not found.kmeans_init and not found.exclude_padding and found.reconstruction_loss == "mean"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"affine_lr": None}, "no vq_kwargs.affine_lr"),
        ({"replace_freq": 0}, "replace_freq = 0, but the checkpoint has counts"),
        ({"num_codes": 9}, "num_codes = 9, but the checkpoint has 5"),
        ({"norm": "l2"}, "norm = 'l2', which is not supported"),
        ({"beta": "nan"}, "beta = 'nan', expected a finite number"),
        ({"replace_freq": 2.5}, "replace_freq = 2.5, expected a whole number"),
    ],
)
def test_hostile_reference_configurations(change, message):
    state_dict, config = reference_checkpoint()
    config["model"]["model_kwargs"]["vq_kwargs"].update(change)
    with pytest.raises(ValueError) as error:
        convert_config(config, convert_state_dict(state_dict, KEY_PATTERNS))
    assert message in str(error.value)


def test_hostile_checkpoints():
    state_dict, config = reference_checkpoint()
    with pytest.raises(ValueError, match="unknown parameters: model.extra"):
        convert_state_dict({**state_dict, "model.extra": torch.ones(1)}, KEY_PATTERNS)
    for name, message in (
        ("model.output_projection.weight", "checkpoint lacks parameters: decoder.project_out.weight"),
        ("model.vqlayer.codebook.weight", "checkpoint lacks parameters: quantizer.codebook"),
    ):
        rest = {key: value for key, value in state_dict.items() if key != name}
        with pytest.raises(ValueError, match=message):
            convert_config(config, convert_state_dict(rest, KEY_PATTERNS))
    with pytest.raises(ValueError, match="checkpoint lacks parameters"):
        convert_config({}, {})
    vector = {**convert_state_dict(state_dict, KEY_PATTERNS), "quantizer.codebook": torch.ones(3)}
    with pytest.raises(ValueError, match="quantizer.codebook has shape"):
        convert_config(config, vector)


def test_conversion_of_features():
    found = convert_features(
        {
            "feature_dict": {
                "part_pt": {"func": "np.log", "inv_func": "np.exp", "subtract_by": 2, "multiply_by": -3, "clip_min": 1},
                "part_etarel": {"larger_than": -0.8, "binning": [-1, 1, 5]},
                "part_phirel": None,
            }
        }
    )
    assert found == {
        # in front of the shift and the factor: (1 - 2) * -3 = 3 is the largest value
        "part_pt": {"function": "log", "subtract": 2.0, "multiply": -3.0, "clip_output": [None, 3.0]},
        "part_etarel": {"larger_than": -0.8, "binning": [-1, 1, 5], "subtract": 0.0, "multiply": 1.0},
        "part_phirel": {"subtract": 0.0, "multiply": 1.0},
    }
    newer = {"part_mass": {"clip_min_input_space": 0, "clip_max": 4, "multiply_by": 2}}
    found = convert_features({"input_features_dict": newer})["part_mass"]
    assert found["clip_input"] == [0.0, None] and found["clip_output"] == [None, 4.0]
    assert convert_features({"other": 1}) is None


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"func": "__import__('os').system('true')"}, "expected one of log"),
        ({"func": "np.load", "inv_func": "np.save"}, "func = 'load', expected one of"),
        ({"func": "np.log", "inv_func": "np.tanh"}, "inv_func = 'tanh', expected 'exp'"),
        ({"inv_func": "np.exp"}, "without func"),
        ({"func": ["np.log"], "inv_func": "np.exp"}, "expected one of log"),
        ({"binning": 5}, "binning = 5, expected (first edge, last edge, number of edges)"),
        ({1: 2, "surprise": 3}, "1, surprise, which is not supported"),
        ({"multiply_by": "3"}, "multiply_by = '3', expected a finite number"),
        ({"surprise": 1}, "surprise, which is not supported"),
    ],
)
def test_hostile_feature_dicts(settings, message):
    with pytest.raises(ValueError) as error:
        convert_features({"feature_dict": {"part_pt": settings}})
    assert message in str(error.value)


def test_all_parameters_are_reached_by_init_weights():
    """Nothing keeps what torch.empty happens to hold when a model is built on the meta device."""
    for variant in VARIANTS:
        config = OmniJetVQVAEConfig(**{**TINY, **VARIANTS[variant]})
        with torch.device("meta"):
            model = OmniJetVQVAEModel(config)
        model.to_empty(device="cpu")
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.fill_(float("nan"))
        for module in model.modules():
            if isinstance(module, nn.Module):
                module._is_hf_initialized = False
        model.init_weights()
        for name, tensor in model.state_dict().items():
            assert torch.isfinite(tensor).all(), (variant, name)
