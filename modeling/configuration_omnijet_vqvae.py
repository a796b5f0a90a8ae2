"""Configuration of the VQ-VAE that turns jets and showers into the tokens of OmniJet, arXiv:2403.05618."""

import math

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2CLS


def check_activation(name: str):
    """
    Raises:
        ValueError: transformers knows no activation of this name.
    """
    if name not in ACT2CLS:
        raise ValueError(f"`hidden_act` is {name!r}, expected an activation of transformers: {', '.join(ACT2CLS)}")


@strict
class OmniJetVQVAEConfig(PreTrainedConfig):
    r"""
    Configuration of an OmniJet VQ-VAE: constituents of a jet (or hits of a shower) to one code each and back.

    The defaults are the published tokenizer of OmniJet-alpha (arXiv:2403.05618; 833 551 parameters) with padding left
    out of the losses. OmniJet-alpha_C (showers, arXiv:2501.05534) has `num_features=4, latent_size=12,
    codebook_size=65536, kmeans_init=False, replace_freq=100, reconstruction_loss="sum_over_features"`. The causal
    tokenizer of arXiv:2512.04149 has `architecture="transformer", causal_decoder=True, latent_size=8,
    kmeans_init=False, replace_freq=500, reconstruction_loss="sum_over_features"`.

    Args:
        architecture (`"normformer"`, `"transformer"` or `"mlp"`): attention over the constituents with norms behind the
            attention (arXiv:2110.09456), pre-norm blocks with learned gates, or every constituent on its own.
        num_features (`int`): transformed features of a constituent. num_jet_features (`int`): features of the whole jet
            that both halves are told (not with `"mlp"`).
        latent_size, codebook_size (`int`): width and number of the codes.
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size (`int`): width, blocks of the encoder and
            of the decoder each, heads, width inside the MLP (default: `hidden_size`, or four times that with
            `"transformer"`).
        encoder_layer_sizes, decoder_layer_sizes (`list[int]`): widths of the hidden layers with `"mlp"`.
        hidden_act (`str`): inside the MLP of a block; default `"silu"`, or `"gelu"` with `"transformer"`.
        attention_dropout, hidden_dropout (`float`): on the attention weights, inside the MLP; default 0.1, or 0 with
            `"transformer"`.
        causal_decoder (`bool`): a constituent is decoded from its own code and those in front of it.
        residual_gate (`"local"`, `"global"` or `"constant"`): with `"transformer"`, one learned factor per component,
            one per block, or a constant factor on what a block adds. residual_gate_value (`float`): its initial value.
        beta, sync_nu, affine_lr, replace_freq, kmeans_init: see [`VectorQuantizer`].
        vq_loss_weight (`float`): loss = reconstruction loss + vq_loss_weight * quantisation loss.
        reconstruction_loss (`"mean"` or `"sum_over_features"`): squared errors averaged over constituents and features,
            or averaged over constituents and summed over features.
        exclude_padding (`bool`): padding enters neither the losses nor the counts nor the initialisation of the codes.
            `False` is the published behaviour (with `"sum_over_features"` the reconstruction loss never sees padding).
        revival_inverts_affine (`bool`): revived codes lie at latents; `False` is the published behaviour.
    """

    model_type = "omnijet_vqvae"
    keys_to_ignore_at_inference = ["latents", "quantized", "perplexity", "codebook_usage"]

    architecture: str = "normformer"
    num_features: int = 3
    num_jet_features: int = 0
    latent_size: int = 4
    codebook_size: int = 8192
    hidden_size: int = 128
    num_hidden_layers: int = 4
    num_attention_heads: int = 8
    intermediate_size: int | None = None
    encoder_layer_sizes: list[int] | tuple[int, ...] = (128, 128, 128)
    decoder_layer_sizes: list[int] | tuple[int, ...] = (128, 128, 128)
    hidden_act: str | None = None
    attention_dropout: float | int | None = None
    hidden_dropout: float | int | None = None
    layer_norm_eps: float = 1e-5
    causal_decoder: bool = False
    residual_gate: str = "local"
    residual_gate_value: float | int = 1.0
    beta: float | int = 0.9
    sync_nu: float | int = 1.0
    affine_lr: float | int = 2.0
    replace_freq: int = 10
    kmeans_init: bool = True
    vq_loss_weight: float | int = 10.0
    reconstruction_loss: str = "mean"
    exclude_padding: bool = True
    revival_inverts_affine: bool = True

    def __post_init__(self, **kwargs):
        is_transformer = self.architecture == "transformer"
        if self.intermediate_size is None:
            self.intermediate_size = self.hidden_size * (4 if is_transformer else 1)
        if self.hidden_act is None:
            self.hidden_act = "gelu" if is_transformer else "silu"
        if self.attention_dropout is None:
            self.attention_dropout = 0.0 if is_transformer else 0.1
        if self.hidden_dropout is None:
            self.hidden_dropout = 0.0 if is_transformer else 0.1
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Cross-field checks, run by `@strict` at construction and at `save_pretrained`."""
        for name, values in (
            ("architecture", ("normformer", "transformer", "mlp")),
            ("reconstruction_loss", ("mean", "sum_over_features")),
            ("residual_gate", ("local", "global", "constant")),
        ):
            if getattr(self, name) not in values:
                expected = ", ".join(map(repr, values))
                raise ValueError(f"`{name}` is {getattr(self, name)!r}, expected one of {expected}")
        check_activation(self.hidden_act)
        for name, least in (
            ("num_features", 1),
            ("num_jet_features", 0),
            ("latent_size", 1),
            ("codebook_size", 2),
            ("hidden_size", 1),
            ("num_hidden_layers", 1),
            ("num_attention_heads", 1),
            ("intermediate_size", 1),
            ("replace_freq", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` is {getattr(self, name)}, expected at least {least}")
        if self.replace_freq > 2**24:
            raise ValueError(f"`replace_freq` is {self.replace_freq}, expected at most 2^24, to which float32 counts")
        for name in ("affine_lr", "sync_nu", "vq_loss_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"`{name}` is {getattr(self, name)}, expected a finite number of at least 0")
        if not 0 < self.layer_norm_eps < math.inf:
            raise ValueError(f"`layer_norm_eps` is {self.layer_norm_eps}, expected a finite number above 0")
        if not abs(self.residual_gate_value) < 1e38:
            raise ValueError(f"`residual_gate_value` is {self.residual_gate_value}, expected a number of float32")
        if not 0 <= self.beta <= 1:
            raise ValueError(f"`beta` is {self.beta}, expected a number in 0..1")
        for name in ("attention_dropout", "hidden_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}, expected 0 or more and less than 1")
        if self.architecture == "mlp":
            for name in ("encoder_layer_sizes", "decoder_layer_sizes"):
                if any(size < 1 for size in getattr(self, name)):
                    raise ValueError(f"`{name}` is {list(getattr(self, name))}, expected widths of at least 1")
            if self.num_jet_features or self.causal_decoder:
                raise ValueError("`num_jet_features` and `causal_decoder` need another `architecture` than 'mlp'")
        elif self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`hidden_size` = {self.hidden_size} is not a multiple of `num_attention_heads` = "
                f"{self.num_attention_heads}"
            )


__all__ = ["OmniJetVQVAEConfig"]
