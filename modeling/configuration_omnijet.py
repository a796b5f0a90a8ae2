"""Configuration of the OmniJet backbones: OmniJet-α (arXiv:2403.05618), α_C (2501.05534), NTP hybrid (2512.04149)."""

import math

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .configuration_omnijet_vqvae import check_activation


@strict
class OmniJetConfig(PreTrainedConfig):
    r"""
    Configuration of the networks behind the OmniJet tokens: the GPT over the codes of a jet or a shower, its
    classifiers, the stand-alone taggers, and the network with continuous inputs that learns next tokens, masked tokens
    and classes together.

    Ids: 0 = start, code c = c + 1, `codebook_size` + 1 = stop, and by default one more for padding. In published
    checkpoints the start id also pads; their configurations keep that.

    The defaults are the published OmniJet-α: 128 constituents, 8192 codes, three blocks. OmniJet-α_C (showers) is
    `codebook_size=65536, max_position_embeddings=1700`. Converted checkpoints set the switches of the second group to
    what they were trained with.

    Args:
        codebook_size (`int`): number of codes of the VQ-VAE.
        vocab_size (`int`): by default `codebook_size` + 3; `codebook_size` + 2 without an id of its own for padding.
        hidden_size, num_hidden_layers, num_attention_heads (`int`): width, blocks, heads.
        intermediate_size (`int`): width of the MLPs, by default 4 `hidden_size` (NormFormer: `hidden_size`).
        hidden_act (`str`): of the MLPs, by default that of the architecture (ReLU, GELU, SiLU).
        attention_dropout (`float`): on the attention weights, by default 0 in the GPT, which has no other, and 0.1
            elsewhere.
        max_position_embeddings (`int`): longest sequence that `generate` draws; there are no positions to embed. The
            network with continuous inputs has one vector per position of a masked constituent.
        is_causal (`bool`): attend only to earlier positions.

        padding_loss (`"ignored"`, `"counted"` or `"trained"`): the loss is the mean over all targets; or padding costs
            nothing but counts in the mean (published α_C and NTP); or the pad id is a target as any other (published
            α).
        stop_token_weight (`float`): weight of the stop id in the cross entropy (α_C).
        mask_padded_queries (`bool`): as published for α_C, padded *queries* attend uniformly and padded keys are not
            masked. Without `is_causal` padding then leaks into real positions.

        architecture (`"gpt"`, `"hybrid"`, `"particle_flow"` or `"normformer"`): the GPT; the pre-norm network of
            [`OmniJetForPreTraining`]; or, for [`OmniJetForSequenceClassification`], one of the stand-alone taggers.
        classifier_head (`"summation"` or `"class_attention"`): head on the GPT.
        classifier_sizes (`list[int]`): widths of the hidden layers behind the class token.
        classifier_dropout (`float`): of the class-attention heads.
        class_attention_layers, class_attention_heads (`int`): blocks in which the class token attends, their heads.
        num_features (`int`): continuous features per constituent; 0 where a tagger reads ids.
        token_embedding_size (`int`): width of the embedded ids of the particle-flow tagger.
        hidden_dropout (`float`): in the MLPs of the NormFormer tagger and of the hybrid.

        num_jet_features (`int`), num_registers (`int`): inputs per jet, learned positions in front of the constituents.
        residual_gate (`"local"`, `"global"` or `"constant"`), residual_gate_value (`float`): learned factor on what a
            block adds: per component, one number, or not learned; what it begins with.
        final_norm (`bool`): norm behind the last block.
        trainable_start (`bool`): the features of the start position are learned, not 0.
        use_hybrid_passes (`bool`): one causal pass over all constituents for the next tokens and one bidirectional pass
            over those that are not masked for the rest; otherwise a single pass, causal if `is_causal`.
        mask_fraction (`float`): of the real positions of the batch.
        masked_input (`"exclude"`, `"zero"` or `"keep"`): masked positions are not attended to, have features 0, or
            stay.
        masked_position (`"rank_among_masked"`, `"rank"` or `"position"`): which learned vector stands for a masked
            position: by the rank of its first feature (pT, descending) among the masked or among all positions, or by
            its place in the sequence.
        token_head_size, token_head_layers, token_head_heads, token_head_intermediate_size (`int`): of the two token
            heads.
        num_predictions (`int`): next tokens that the generation head predicts at every position.
        class_head_size, class_head_heads, class_head_intermediate_size (`int`): of the class head.
        generation_loss_weight, masked_loss_weight, class_loss_weight (`float`): of the three losses.

        embedding_initializer_range (`float`): standard deviation of freshly initialised embeddings.
    """

    model_type = "omnijet"
    keys_to_ignore_at_inference = ["past_key_values", "backbone_states"]

    codebook_size: int = 8192
    vocab_size: int | None = None
    hidden_size: int = 256
    num_hidden_layers: int = 3
    num_attention_heads: int = 8
    intermediate_size: int | None = None
    hidden_act: str | None = None
    attention_dropout: float | int | None = None
    layer_norm_eps: float = 1e-5
    max_position_embeddings: int = 128
    is_causal: bool = True

    padding_loss: str = "ignored"
    stop_token_weight: float | int = 1.0
    mask_padded_queries: bool = False

    architecture: str = "gpt"
    classifier_head: str = "summation"
    classifier_sizes: list[int] | tuple[int, ...] | None = None
    classifier_dropout: float | int = 0.1
    class_attention_layers: int | None = None
    class_attention_heads: int | None = None
    num_features: int = 3
    token_embedding_size: int = 16
    hidden_dropout: float | int = 0.1

    num_jet_features: int = 0
    num_registers: int = 8
    residual_gate: str = "local"
    residual_gate_value: float | int = 1.0
    final_norm: bool = True
    trainable_start: bool = True
    use_hybrid_passes: bool = True
    mask_fraction: float | int = 0.4
    masked_input: str = "exclude"
    masked_position: str = "rank_among_masked"
    token_head_size: int = 128
    token_head_layers: int = 2
    token_head_heads: int = 8
    token_head_intermediate_size: int = 256
    num_predictions: int = 1
    class_head_size: int = 128
    class_head_heads: int = 8
    class_head_intermediate_size: int = 512
    generation_loss_weight: float | int = 1.0
    masked_loss_weight: float | int = 1.0
    class_loss_weight: float | int = 1.0

    embedding_initializer_range: float | int = 1.0
    use_cache: bool = True
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 0
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs):
        if self.vocab_size is None:
            self.vocab_size = self.codebook_size + 3
        if self.eos_token_id is None:
            self.eos_token_id = self.codebook_size + 1
        if self.pad_token_id is None:
            has_own_pad = self.vocab_size == self.codebook_size + 3
            self.pad_token_id = self.codebook_size + 2 if has_own_pad else 0
        if self.intermediate_size is None:
            self.intermediate_size = self.hidden_size * (1 if self.architecture == "normformer" else 4)
        if self.hidden_act is None:
            self.hidden_act = {"hybrid": "gelu", "normformer": "silu"}.get(self.architecture, "relu")
        if self.attention_dropout is None:
            self.attention_dropout = 0.0 if self.architecture == "gpt" else 0.1
        if self.class_attention_layers is None:
            self.class_attention_layers = 3 if self.architecture == "gpt" else 2
        if self.class_attention_heads is None:
            self.class_attention_heads = 2 if self.architecture == "gpt" else self.num_attention_heads
        if self.classifier_sizes is None:
            self.classifier_sizes = [self.hidden_size] * 2 if self.architecture == "gpt" else [128, 100]
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Cross-field checks, run by `@strict` at construction and at `save_pretrained`."""
        for name, choices in (
            ("padding_loss", ("ignored", "counted", "trained")),
            ("architecture", ("gpt", "hybrid", "particle_flow", "normformer")),
            ("classifier_head", ("summation", "class_attention")),
            ("residual_gate", ("local", "global", "constant")),
            ("masked_input", ("exclude", "zero", "keep")),
            ("masked_position", ("rank_among_masked", "rank", "position")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}, expected one of {', '.join(choices)}")
        check_activation(self.hidden_act)
        for name, least in (
            ("codebook_size", 1),
            ("hidden_size", 1),
            ("num_hidden_layers", 1),
            ("num_attention_heads", 1),
            ("intermediate_size", 1),
            ("max_position_embeddings", 2),
            ("class_attention_layers", 1),
            ("class_attention_heads", 1),
            ("num_features", 0),
            ("token_embedding_size", 1),
            ("num_jet_features", 0),
            ("num_registers", 0),
            ("token_head_layers", 1),
            ("token_head_intermediate_size", 1),
            ("num_predictions", 1),
            ("class_head_intermediate_size", 1),
            ("num_labels", 1),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` is {getattr(self, name)}, expected at least {least}")
        if any(size < 1 for size in self.classifier_sizes):
            raise ValueError(f"`classifier_sizes` is {list(self.classifier_sizes)}, expected widths of at least 1")
        if self.vocab_size not in (self.codebook_size + 2, self.codebook_size + 3):
            raise ValueError(
                f"`vocab_size` is {self.vocab_size}, expected `codebook_size` + 3 = {self.codebook_size + 3} (start, "
                f"codes, stop, pad), or one less with the start id as pad"
            )
        special = [0, *range(self.codebook_size + 1, self.vocab_size)]
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if getattr(self, name) not in special:
                expected = ", ".join(map(str, special))
                raise ValueError(
                    f"`{name}` is {getattr(self, name)}, expected an id that is no code: one of {expected}"
                )
        if self.eos_token_id in (self.bos_token_id, self.pad_token_id):
            raise ValueError(f"`eos_token_id` is {self.eos_token_id}, expected another id than those of start and pad")
        for size, heads in (
            ("hidden_size", "num_attention_heads"),
            ("hidden_size", "class_attention_heads"),
            ("token_head_size", "token_head_heads"),
            ("class_head_size", "class_head_heads"),
        ):
            if min(getattr(self, size), getattr(self, heads)) < 1 or getattr(self, size) % getattr(self, heads):
                raise ValueError(
                    f"`{size}` = {getattr(self, size)} is not a multiple of `{heads}` = {getattr(self, heads)}"
                )
        for name in ("attention_dropout", "hidden_dropout", "classifier_dropout", "mask_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}, expected 0 or more and less than 1")
        for name in ("stop_token_weight", "layer_norm_eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"`{name}` is {getattr(self, name)}, expected a finite number above 0")
        for name in (
            "generation_loss_weight",
            "masked_loss_weight",
            "class_loss_weight",
            "embedding_initializer_range",
        ):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"`{name}` is {getattr(self, name)}, expected a finite number of at least 0")
        if not abs(self.residual_gate_value) < 1e38:
            raise ValueError(f"`residual_gate_value` is {self.residual_gate_value}, expected a number of float32")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


__all__ = ["OmniJetConfig"]
