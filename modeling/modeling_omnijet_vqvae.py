"""
The VQ-VAE of OmniJet: constituents of a jet to tokens and back, arXiv:2403.05618.

An encoder looks at all constituents together (without positions: their order does not matter) and gives each a small
latent vector, which is replaced by the nearest vector of a codebook; a decoder of the same kind turns the codes into
constituents again. The same network serves calorimeter showers (arXiv:2501.05534) and, with pre-norm blocks and a
causal decoder, arXiv:2512.04149; an MLP that sees every constituent on its own is the simplest variant.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput, can_return_tuple

from .configuration_omnijet_vqvae import OmniJetVQVAEConfig
from .eager_attention import eager_attention_forward
from .vector_quantization import VectorQuantizer

# every class that a saved checkpoint can be opened with
AUTO_CLASSES = {"AutoModel": "OmniJetVQVAEModel"}


@dataclass
class OmniJetVQVAEOutput(ModelOutput):
    """
    Args:
        loss (scalar): reconstruction_loss + vq_loss_weight * vq_loss.
        reconstruction_loss (scalar): squared error of the transformed features.
        vq_loss (scalar): commitment and codebook loss.
        reconstructed (`(batch, length, num_features)`): decoded features, transformed units; 0 at padding.
        codes (`(batch, length)`): code indices from 0; without meaning at padding.
        latents (`(batch, length, latent_size)`): before the quantisation.
        quantized (`(batch, length, latent_size)`): the chosen code vectors.
        perplexity, codebook_usage (scalars): see [`VectorQuantizerOutput`].
    """

    loss: torch.FloatTensor | None = None
    reconstruction_loss: torch.FloatTensor | None = None
    vq_loss: torch.FloatTensor | None = None
    reconstructed: torch.FloatTensor | None = None
    codes: torch.LongTensor | None = None
    latents: torch.FloatTensor | None = None
    quantized: torch.FloatTensor | None = None
    perplexity: torch.FloatTensor | None = None
    codebook_usage: torch.FloatTensor | None = None


def masked(states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """`states` (batch, length, size) with zeros at padding."""
    return states if attention_mask is None else states * attention_mask.unsqueeze(-1).to(states.dtype)


def later_positions(num_new: int, states: torch.Tensor, past: Sequence[DynamicLayer]) -> torch.Tensor | None:
    """
    Mask to add to the scores, (1, 1, num_new, positions), that hides later positions: `num_new` ones behind those whose
    keys are in `past`. `None` for one, which may see all. `states` gives type and device.
    """
    if num_new == 1:
        return None
    seen = past[0].get_seq_length()
    is_hidden = torch.ones(num_new, seen + num_new, dtype=torch.bool, device=states.device).triu(seen + 1)
    mask = torch.zeros_like(is_hidden, dtype=states.dtype).masked_fill(is_hidden, torch.finfo(states.dtype).min)
    return mask[None, None]


class OmniJetVQVAEAttention(nn.Module):
    def __init__(self, config: OmniJetVQVAEConfig, is_causal: bool):
        super().__init__()
        self.config = config
        self.is_causal = is_causal
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.qkv_proj.initialization = "xavier"
        self.o_proj.initialization = "zero_bias"

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, past: DynamicLayer | None = None
    ) -> torch.Tensor:
        batch_size, length, size = hidden_states.shape
        states = self.qkv_proj(hidden_states).view(batch_size, length, 3, -1, self.head_dim)
        query, key, value = states.permute(2, 0, 3, 1, 4)
        if past is not None:
            key, value = past.update(key, value)
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, _ = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.head_dim**-0.5,
            is_causal=self.is_causal,
        )
        return self.o_proj(output.reshape(batch_size, length, size))


class OmniJetVQVAEFeedForward(nn.Module):
    def __init__(self, config: OmniJetVQVAEConfig):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act_fn = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.dropout(self.act_fn(self.fc1(self.norm(hidden_states)))))


class OmniJetVQVAENormFormerLayer(GradientCheckpointingLayer):
    """Norms in front of and behind the attention, arXiv:2110.09456; starts as the identity on every constituent."""

    def __init__(self, config: OmniJetVQVAEConfig, is_causal: bool):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = OmniJetVQVAEAttention(config, is_causal)
        self.attention_output_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = OmniJetVQVAEFeedForward(config)
        self.attention_norm.initialization = "zeros"
        self.mlp.fc2.initialization = "zeros"

    def forward(
        self,
        hidden_states: torch.Tensor,
        is_real: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        past: DynamicLayer | None = None,
    ):
        """
        Args:
            hidden_states (`(batch, length, hidden_size)`). is_real (`(batch, length)`): 0 at padding.
            attention_mask: of the attention, (batch, 1, length, length) or `None`.
            past: keys and values of the positions in front of these, to which these are added.
        """
        hidden_states = masked(hidden_states, is_real)
        attended = self.self_attn(self.attention_norm(hidden_states), attention_mask, past)
        hidden_states = hidden_states + self.attention_output_norm(attended)
        return hidden_states + self.mlp(hidden_states)


class OmniJetVQVAETransformerLayer(GradientCheckpointingLayer):
    """Pre-norm block; what it adds is multiplied by a gate."""

    def __init__(self, config: OmniJetVQVAEConfig, is_causal: bool):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = OmniJetVQVAEAttention(config, is_causal)
        self.mlp = OmniJetVQVAEFeedForward(config)
        if config.residual_gate == "constant":
            self.attention_gate = self.mlp_gate = config.residual_gate_value
        else:
            shape = (config.hidden_size,) if config.residual_gate == "local" else ()
            self.attention_gate = nn.Parameter(torch.full(shape, float(config.residual_gate_value)))
            self.mlp_gate = nn.Parameter(torch.full(shape, float(config.residual_gate_value)))

    def forward(
        self,
        hidden_states: torch.Tensor,
        is_real: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        past: DynamicLayer | None = None,
    ):
        """Arguments as of [`OmniJetVQVAENormFormerLayer`]."""
        hidden_states = masked(hidden_states, is_real)
        attended = masked(self.self_attn(self.attention_norm(hidden_states), attention_mask, past), is_real)
        hidden_states = hidden_states + attended * self.attention_gate
        hidden_states = hidden_states + self.mlp(hidden_states) * self.mlp_gate
        return masked(hidden_states, is_real)


class OmniJetVQVAECoder(nn.Module):
    """Encoder or decoder: (batch, length, in_features) to (batch, length, out_features), 0 at padding."""

    def __init__(self, config: OmniJetVQVAEConfig, in_features: int, out_features: int, is_causal: bool = False):
        super().__init__()
        self.config = config
        self.is_causal = is_causal
        layer_class = {
            "normformer": OmniJetVQVAENormFormerLayer,
            "transformer": OmniJetVQVAETransformerLayer,
        }[config.architecture]
        self.project_in = nn.Linear(in_features, config.hidden_size)
        self.layers = nn.ModuleList(layer_class(config, is_causal) for _ in range(config.num_hidden_layers))
        self.project_out = nn.Linear(config.hidden_size, out_features)

    def forward(self, states: torch.Tensor, is_real: torch.Tensor | None) -> torch.Tensor:
        hidden_states = self.project_in(states)
        mask_kwargs = {"config": self.config, "inputs_embeds": hidden_states, "attention_mask": is_real}
        if self.is_causal:
            attention_mask = create_causal_mask(**mask_kwargs, past_key_values=None)
        else:
            attention_mask = create_bidirectional_mask(**mask_kwargs)
        for layer in self.layers:
            hidden_states = layer(hidden_states, is_real, attention_mask)
        return masked(self.project_out(masked(hidden_states, is_real)), is_real)

    def following(self, states: torch.Tensor, past: Sequence[DynamicLayer]) -> torch.Tensor:
        """
        As `forward` of a causal coder without padding, for positions that follow those in `past`, one entry per layer;
        they are added there.
        """
        hidden_states = self.project_in(states)
        attention_mask = later_positions(states.shape[1], hidden_states, past)
        for layer, layer_past in zip(self.layers, past, strict=True):
            hidden_states = layer(hidden_states, None, attention_mask, layer_past)
        return self.project_out(hidden_states)


class OmniJetVQVAEMLPCoder(nn.Module):
    """Encoder or decoder that sees every constituent on its own. Padding is treated like any other constituent."""

    def __init__(self, in_features: int, out_features: int, layer_sizes: list[int] | tuple[int, ...]):
        super().__init__()
        sizes = [in_features, *layer_sizes]
        hidden = [module for a, b in zip(sizes[:-1], sizes[1:]) for module in (nn.Linear(a, b), nn.ReLU())]
        self.layers = nn.Sequential(*hidden, nn.Linear(sizes[-1], out_features))

    def forward(self, states: torch.Tensor, is_real: torch.Tensor | None) -> torch.Tensor:
        return self.layers(states)


class OmniJetVQVAEPreTrainedModel(PreTrainedModel):
    config: OmniJetVQVAEConfig
    base_model_prefix = "model"
    main_input_name = "particle_features"
    supports_gradient_checkpointing = True
    _no_split_modules = ["OmniJetVQVAENormFormerLayer", "OmniJetVQVAETransformerLayer"]
    # neighbouring codes are closer than the rounding of bfloat16
    _keep_in_fp32_modules_strict = ["quantizer"]
    _supports_sdpa = True
    _supports_attention_backend = True

    def save_pretrained(self, save_directory, **kwargs):
        """As `PreTrainedModel.save_pretrained`; the folder opens with every Auto class."""
        module = __name__.split(".")[-1]
        self.config.auto_map = {auto_class: f"{module}.{name}" for auto_class, name in AUTO_CLASSES.items()}
        super().save_pretrained(save_directory, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """
        Initialisation of the published models: PyTorch's own; NormFormer blocks start as the identity.

        Modules that start differently carry the mark `initialization`: transformers does not call this for modules
        whose parameters all belong to modules inside them, such as a block.
        """
        kind = getattr(module, "initialization", None)
        if isinstance(module, nn.Linear):
            bound = 1 / math.sqrt(module.in_features)
            if kind == "zeros":
                init.zeros_(module.weight)
            elif kind == "xavier":
                init.xavier_uniform_(module.weight)
            else:
                init.uniform_(module.weight, -bound, bound)
            if kind is None:
                init.uniform_(module.bias, -bound, bound)
            else:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.constant_(module.weight, 0.0 if kind == "zeros" else 1.0)
            init.zeros_(module.bias)
        elif isinstance(module, VectorQuantizer):
            module.reset_parameters()
        elif isinstance(module, OmniJetVQVAETransformerLayer) and self.config.residual_gate != "constant":
            init.constant_(module.attention_gate, self.config.residual_gate_value)
            init.constant_(module.mlp_gate, self.config.residual_gate_value)


class OmniJetVQVAEModel(OmniJetVQVAEPreTrainedModel):
    """Features of constituents to codes ([`encode`]) and back ([`decode`]); `forward` does both and gives the loss."""

    def __init__(self, config: OmniJetVQVAEConfig):
        super().__init__(config)
        features, latent_size = config.num_features, config.latent_size
        if config.architecture == "mlp":
            self.encoder = OmniJetVQVAEMLPCoder(features, latent_size, config.encoder_layer_sizes)
            self.decoder = OmniJetVQVAEMLPCoder(latent_size, features, config.decoder_layer_sizes)
        else:
            self.encoder = OmniJetVQVAECoder(config, features + config.num_jet_features, latent_size)
            self.decoder = OmniJetVQVAECoder(
                config, latent_size + config.num_jet_features, features, is_causal=config.causal_decoder
            )
        self.quantizer = VectorQuantizer(
            codebook_size=config.codebook_size,
            latent_size=latent_size,
            beta=config.beta,
            sync_nu=config.sync_nu,
            affine_lr=config.affine_lr,
            replace_freq=config.replace_freq,
            kmeans_init=config.kmeans_init,
            exclude_padding=config.exclude_padding,
            invert_affine=config.revival_inverts_affine,
        )
        self.gradient_checkpointing = False
        self.post_init()

    def encode(
        self,
        particle_features: torch.FloatTensor,
        attention_mask: torch.Tensor | None = None,
        jet_features: torch.FloatTensor | None = None,
    ) -> torch.LongTensor:
        """
        Code indices, (batch, length), in 0..codebook_size - 1; without meaning at padding. Arguments as of `forward`.
        """
        latents = self._encode_latents(particle_features, attention_mask, jet_features)
        return self.quantizer(latents, attention_mask).codes

    def decode(
        self,
        codes: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        jet_features: torch.FloatTensor | None = None,
    ) -> torch.FloatTensor:
        """
        Transformed features, (batch, length, num_features), of code indices (batch, length); any index may stand at
        padding. Other arguments as of `forward`.
        """
        return self._decode_vectors(self.quantizer.lookup(codes), attention_mask, jet_features)

    @can_return_tuple
    def forward(
        self,
        particle_features: torch.FloatTensor,
        attention_mask: torch.Tensor | None = None,
        jet_features: torch.FloatTensor | None = None,
        return_loss: bool = True,
        **kwargs,
    ) -> OmniJetVQVAEOutput:
        r"""
        Args:
            particle_features (`(batch, length, num_features)`): transformed features of the constituents.
            attention_mask (`(batch, length)`): 1 for constituents, 0 for padding, which may be on any side.
            jet_features (`(batch, num_jet_features)`): of the whole jet, if the configuration has them.
            return_loss (`bool`): the losses; the targets are the features themselves.
        """
        latents = self._encode_latents(particle_features, attention_mask, jet_features)
        quantization = self.quantizer(latents, attention_mask)
        reconstructed = self._decode_vectors(quantization.quantized, attention_mask, jet_features)
        loss = reconstruction_loss = None
        if return_loss:
            reconstruction_loss = self._reconstruction_loss(reconstructed, particle_features, attention_mask)
            loss = reconstruction_loss + self.config.vq_loss_weight * quantization.loss
        return OmniJetVQVAEOutput(
            loss=loss,
            reconstruction_loss=reconstruction_loss,
            vq_loss=quantization.loss if return_loss else None,
            reconstructed=reconstructed,
            codes=quantization.codes,
            latents=latents,
            quantized=quantization.quantized,
            perplexity=quantization.perplexity,
            codebook_usage=quantization.codebook_usage,
        )

    def _encode_latents(self, particle_features, attention_mask, jet_features) -> torch.FloatTensor:
        if particle_features.ndim != 3 or particle_features.shape[-1] != self.config.num_features:
            raise ValueError(
                f"particle_features has shape {tuple(particle_features.shape)}, expected (batch, length, "
                f"{self.config.num_features})"
            )
        return self._run(self.encoder, particle_features, attention_mask, jet_features)

    def _decode_vectors(self, vectors, attention_mask, jet_features) -> torch.FloatTensor:
        reconstructed = self._run(self.decoder, vectors, attention_mask, jet_features)
        # the published MLP decodes padding too, and its loss sees it
        return masked(reconstructed, attention_mask) if self.config.exclude_padding else reconstructed

    def _run(self, coder, states, attention_mask, jet_features) -> torch.FloatTensor:
        if 0 in states.shape:
            raise ValueError(
                f"the input has shape {tuple(states.shape)}, expected at least one jet and one constituent"
            )
        if attention_mask is not None and attention_mask.shape != states.shape[:2]:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}, expected {tuple(states.shape[:2])}"
            )
        states = states.to(self.dtype)
        if self.config.num_jet_features > 0:
            expected = (len(states), self.config.num_jet_features)
            if jet_features is None or tuple(jet_features.shape) != expected:
                found = None if jet_features is None else tuple(jet_features.shape)
                raise ValueError(f"jet_features has shape {found}, expected {expected}")
            jet_features = jet_features.to(states.dtype).unsqueeze(1).expand(-1, states.shape[1], -1)
            states = torch.cat([states, jet_features], dim=-1)
        elif jet_features is not None:
            raise ValueError("jet_features was given, but the configuration has num_jet_features = 0")
        return coder(states, attention_mask)

    def _reconstruction_loss(self, reconstructed, particle_features, attention_mask) -> torch.FloatTensor:
        errors = (reconstructed.float() - particle_features.float()).square()
        is_sum = self.config.reconstruction_loss == "sum_over_features"
        errors = errors.sum(dim=-1) if is_sum else errors.mean(dim=-1)
        if attention_mask is None or not (is_sum or self.config.exclude_padding):
            return errors.mean()
        return errors.masked_fill(attention_mask == 0, 0).sum() / attention_mask.sum().clamp(min=1)


__all__ = ["OmniJetVQVAEModel", "OmniJetVQVAEPreTrainedModel"]

# `save_pretrained` then writes this code beside the weights, so that they load anywhere with `trust_remote_code=True`
OmniJetVQVAEConfig.register_for_auto_class()
for _auto_class, _model_class in AUTO_CLASSES.items():
    globals()[_model_class].register_for_auto_class(_auto_class)
