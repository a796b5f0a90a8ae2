"""
OmniJet backbones: the GPT over the VQ-VAE codes of jets (OmniJet-α, arXiv:2403.05618) and of calorimeter showers (α_C,
arXiv:2501.05534), its classifiers, and the network with continuous inputs that predicts next tokens, masked tokens and
classes (arXiv:2512.04149).

The GPT has no positions: the order of the constituents enters through the causal mask alone.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin, LogitsProcessor, LogitsProcessorList
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .chunked_cross_entropy import chunked_linear_cross_entropy
from .configuration_omnijet import OmniJetConfig
from .eager_attention import eager_attention_forward
from .generation_multistream import ForbiddenTokensLogitsProcessor, _keeps_rows, sample_from_scores
from .growing_cache import GrowingLayer, growing_cache
from .modeling_omnijet_vqvae import (
    OmniJetVQVAEAttention,
    OmniJetVQVAECoder,
    OmniJetVQVAEModel,
    OmniJetVQVAENormFormerLayer,
    OmniJetVQVAETransformerLayer,
)
from .omnijet_hybrid import (
    OmniJetHybridBackbone,
    OmniJetHybridClassHead,
    OmniJetTokenHead,
    draw_masked,
    masked_ranks,
)
from .omnijet_taggers import (
    OmniJetClassAttention,
    OmniJetClassAttentionBlock,
    OmniJetClassAttentionHead,
    OmniJetNormFormerTagger,
    OmniJetParticleFlow,
    OmniJetSummationHead,
)

# every class that a saved checkpoint can be opened with
AUTO_CLASSES = {
    "AutoModel": "OmniJetModel",
    "AutoModelForCausalLM": "OmniJetForCausalLM",
    "AutoModelForSequenceClassification": "OmniJetForSequenceClassification",
    "AutoModelForPreTraining": "OmniJetForPreTraining",
}
# settings of `generate` that the library does not know
GENERATION_DEFAULTS = {"stop_token_threshold": 0.0, "drop_finished_rows": True}


@dataclass
class OmniJetPreTrainingOutput(ModelOutput):
    """
    Args:
        loss (scalar): the three losses with their weights.
        generation_loss, masked_loss, class_loss (scalars).
        generation_logits (`(batch, length, vocab_size, num_predictions)`): next tokens. `None` in training, as
            `masked_logits`: their losses are computed without holding the logits.
        masked_logits (`(batch, length, vocab_size)`): tokens at the positions themselves.
        logits (`(batch, num_labels)`): classes. `None` in training without `labels`.
        backbone_states (`(batch, length, hidden_size)`): before vectors are put in at the masked positions.
    """

    loss: torch.FloatTensor | None = None
    generation_loss: torch.FloatTensor | None = None
    masked_loss: torch.FloatTensor | None = None
    class_loss: torch.FloatTensor | None = None
    generation_logits: torch.FloatTensor | None = None
    masked_logits: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    backbone_states: torch.FloatTensor | None = None


class OmniJetAttention(nn.Module):
    def __init__(self, config: OmniJetConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = config.is_causal
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        query_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        input_shape = hidden_states.shape[:-1]
        query, key, value = (
            projection(hidden_states).view(*input_shape, -1, self.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if query_mask is not None:
            # equal scores for every key, which is what a large negative number on a whole row does
            query = query * query_mask[:, None, :, None].to(query.dtype)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.head_dim**-0.5,
            **kwargs,
        )
        return self.o_proj(output.reshape(*input_shape, -1)), weights


class OmniJetMLP(nn.Module):
    def __init__(self, config: OmniJetConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act_fn(self.fc1(hidden_states)))


class OmniJetLayer(GradientCheckpointingLayer):
    """One post-norm block."""

    def __init__(self, config: OmniJetConfig, layer_idx: int):
        super().__init__()
        self.self_attn = OmniJetAttention(config, layer_idx)
        self.post_attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = OmniJetMLP(config)
        self.post_mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        attention_output, _ = self.self_attn(hidden_states, **kwargs)
        hidden_states = self.post_attention_norm(hidden_states + attention_output)
        return self.post_mlp_norm(hidden_states + self.mlp(hidden_states))


class OmniJetPreTrainedModel(PreTrainedModel):
    config: OmniJetConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["OmniJetLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": OmniJetLayer, "attentions": OmniJetAttention}

    def save_pretrained(self, save_directory, **kwargs):
        """As `PreTrainedModel.save_pretrained`; the folder opens with every Auto class, not only that of this model."""
        module = __name__.split(".")[-1]
        self.config.auto_map = {auto_class: f"{module}.{name}" for auto_class, name in AUTO_CLASSES.items()}
        super().save_pretrained(save_directory, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """Initialisation of the published models: PyTorch's own, embeddings from N(0, 1)."""
        if isinstance(module, nn.Linear):
            bound = 1 / math.sqrt(module.in_features)
            init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=self.config.embedding_initializer_range)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        # these come after the modules inside them
        elif isinstance(module, (OmniJetVQVAEAttention, OmniJetClassAttention)):
            init.xavier_uniform_(module.qkv_proj.weight)
            init.zeros_(module.qkv_proj.bias)
            init.zeros_(module.o_proj.bias)
        elif isinstance(module, OmniJetVQVAENormFormerLayer):
            init.zeros_(module.attention_norm.weight)
            init.zeros_(module.mlp.fc2.weight)
            init.zeros_(module.mlp.fc2.bias)
        elif isinstance(module, OmniJetVQVAETransformerLayer):
            if self.config.residual_gate != "constant":
                init.constant_(module.attention_gate, self.config.residual_gate_value)
                init.constant_(module.mlp_gate, self.config.residual_gate_value)
        elif isinstance(module, OmniJetClassAttentionBlock):
            init.zeros_(module.norm.weight)
        elif isinstance(module, (OmniJetClassAttentionHead, OmniJetHybridClassHead)):
            init.normal_(module.token)
        elif isinstance(module, OmniJetHybridBackbone):
            if module.registers is not None:
                init.normal_(module.registers)
        elif isinstance(module, OmniJetForPreTraining):
            init.normal_(module.masked_vectors)
            if module.start_features is not None:
                init.zeros_(module.start_features)


class OmniJetModel(OmniJetPreTrainedModel):
    """The bare GPT: ids of a jet or a shower to hidden states."""

    def __init__(self, config: OmniJetConfig):
        check_architecture(config, type(self).__name__, "gpt")
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(OmniJetLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers))
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        r"""
        Args:
            input_ids (`(batch, length)`): start, code ids, stop, padding.
            attention_mask (`(batch, length)`): 1 for real positions.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected either `input_ids` or `inputs_embeds`")
        if input_ids is not None:
            check_inputs(input_ids, "input_ids", None)
            inputs_embeds = self.embed_tokens(input_ids)
        if not self.config.is_causal:
            if past_key_values is not None:
                raise ValueError("`past_key_values` needs `is_causal`: earlier positions would have to see later ones")
            use_cache = False
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)

        query_mask = None
        # `generate` with a static cache has made the whole mask already, (batch, 1, queries, keys)
        if attention_mask is not None and attention_mask.ndim == 2:
            if self.config.mask_padded_queries:
                query_mask = attention_mask[:, -inputs_embeds.shape[1] :]
                # no published prompt has padding in front: there it is not attended to, as in every other model
                attention_mask = attention_mask.cummax(dim=-1).values if self.config.is_causal else None
            if self._needs_no_mask(attention_mask, inputs_embeds):
                attention_mask = None
        create_mask = create_causal_mask if self.config.is_causal else create_bidirectional_mask
        attention_mask = create_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
        )
        hidden_states = inputs_embeds
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                attention_mask=attention_mask,
                query_mask=query_mask,
                past_key_values=past_key_values,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, past_key_values=past_key_values)

    def _needs_no_mask(self, attention_mask: torch.Tensor | None, inputs_embeds: torch.Tensor) -> bool:
        """
        Behind right padding nothing real follows, so that the causal mask alone is enough, and no length x length mask
        is made. Only a loss over padding notices the difference.
        """
        if attention_mask is None or not self.config.is_causal or self.config.padding_loss == "trained":
            return False
        if attention_mask.shape[1] != inputs_embeds.shape[1] or torch.compiler.is_compiling():
            return False
        return bool((attention_mask[:, 1:] <= attention_mask[:, :-1]).all())


class OmniJetGenerationMixin(GenerationMixin):
    """What generators of jets have in common, whatever they read."""

    def _set_generation_defaults(self):
        config = self.config
        self.generation_config._from_model_config = False
        self.generation_config.update(
            do_sample=True,
            top_k=0,
            temperature=1.0,
            top_p=1.0,
            max_new_tokens=config.max_position_embeddings,
            # the hybrid has a causal pass of its own
            use_cache=config.use_cache and (config.is_causal or config.architecture == "hybrid"),
        )
        for name, value in GENERATION_DEFAULTS.items():
            setattr(self.generation_config, name, value)

    def _get_logits_processor(self, generation_config, *args, logits_processor=None, **kwargs):
        special = ForbiddenTokensLogitsProcessor([self.config.bos_token_id, self.config.pad_token_id])
        processors = super()._get_logits_processor(
            generation_config, *args, logits_processor=[special, *(logits_processor or [])], **kwargs
        )
        threshold = setting(generation_config, "stop_token_threshold")
        if threshold:
            # behind temperature and everything else that changes the probability
            processors.append(StopThresholdLogitsProcessor(self.config.eos_token_id, threshold))
        return processors


class OmniJetForCausalLM(OmniJetPreTrainedModel, OmniJetGenerationMixin):
    """
    Generator of jets or showers: the stock `generate()`. Without a prompt it begins with the start id
    (`num_return_sequences` jets); `OmniJetTokenizer.batch_decode` turns the ids into constituents.

    A setting of `generate` of its own (kept in `generation_config`): `stop_token_threshold`, the probability below
    which the stop id is never drawn (α_C).
    """

    def __init__(self, config: OmniJetConfig):
        super().__init__(config)
        self.model = OmniJetModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()
        self._set_generation_defaults()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        past_key_values: Cache | None = None,
        labels: torch.LongTensor | None = None,
        shift_labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        r"""
        Args:
            labels (`(batch, length)`): target ids at their own position (shifted here), -100 for padding.
            shift_labels (`(batch, length)`): instead, target ids at the position that predicts them.
            logits_to_keep: predictions of the last so many positions only (0: all).
            num_items_in_batch: number of targets in the whole batch, for gradient accumulation.

        Returns `logits` of shape (batch, length, vocab_size); `None` in training with labels, where the loss is
        computed without holding the logits. The other arguments are those of [`OmniJetModel`].
        """
        outputs: BaseModelOutputWithPast = self.model(
            input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            use_cache=use_cache,
            # whatever `config.return_dict` says, which concerns the caller
            return_dict=True,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        has_labels = labels is not None or shift_labels is not None
        logits = loss = None
        if not (self.training and has_labels):
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden_states[:, keep])
        if has_labels:
            predicting = hidden_states
            if shift_labels is None:
                predicting, shift_labels = hidden_states[:, :-1], labels[:, 1:]
            if shift_labels.shape != predicting.shape[:2]:
                raise ValueError(
                    f"labels have shape {tuple(shift_labels.shape)} where predictions have "
                    f"{tuple(predicting.shape[:2])}"
                )
            loss = self._token_loss(predicting, shift_labels, num_items_in_batch)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _token_loss(self, hidden_states, targets, num_items_in_batch) -> torch.Tensor:
        """Mean cross entropy, with the stop weight and the treatment of padding of the configuration."""
        config = self.config
        stop_weight = config.stop_token_weight
        num_items = (targets != -100).sum()
        if config.padding_loss == "trained":
            targets = targets.masked_fill(targets == -100, config.pad_token_id)
        flat_states, flat_targets = hidden_states.flatten(0, 1), targets.flatten()
        is_stop = flat_targets == config.eos_token_id
        total = chunked_linear_cross_entropy(flat_states, self.lm_head.weight, self.lm_head.bias, flat_targets)
        if stop_weight != 1:
            stop_targets = flat_targets.masked_fill(~is_stop, -100)
            total = total + (stop_weight - 1) * chunked_linear_cross_entropy(
                flat_states, self.lm_head.weight, self.lm_head.bias, stop_targets
            )
        counted = num_items if config.padding_loss == "ignored" else targets.numel()
        mean = total / (counted + (stop_weight - 1) * is_stop.sum()).clamp(min=1)
        return mean if num_items_in_batch is None else mean * num_items / num_items_in_batch

    # Generation

    def generate(self, inputs: torch.Tensor | None = None, *args, attention_mask=None, **kwargs):
        """The stock `generate()`; prompts that are padded on the left with the start id need no `attention_mask`."""
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        if input_ids is None and kwargs.get("inputs_embeds") is None:
            input_ids = torch.tensor([[self.config.bos_token_id]], device=self.device)
        if input_ids is not None:
            check_prompt(input_ids, self.config.vocab_size)
        if attention_mask is None and input_ids is not None and self.config.pad_token_id == self.config.bos_token_id:
            # the last of the leading ids that are padding and start at once is the start
            has_begun = (input_ids != self.config.pad_token_id).cummax(dim=-1).values
            attention_mask = (has_begun | nn.functional.pad(has_begun[:, 1:], (0, 1), value=True)).long()
        return super().generate(input_ids, *args, attention_mask=attention_mask, **kwargs)

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if type(model_kwargs.get("past_key_values")) is DynamicCache:
            growing_cache(model_kwargs["past_key_values"])

    def _sample(self, input_ids, logits_processor, stopping_criteria, generation_config, *args, **kwargs):
        """
        The library's loop for greedy search and sampling or, where only the ids are asked for, a shorter one: it draws
        with one random number per row instead of one per code, and leaves out rows that have finished.
        """
        model_kwargs = {name: value for name, value in kwargs.items() if name not in ("synced_gpus", "streamer")}
        is_plain = not args and not kwargs.get("synced_gpus") and kwargs.get("streamer") is None
        if not is_plain or not self._decodes_directly(input_ids, generation_config, model_kwargs):
            return super()._sample(input_ids, logits_processor, stopping_criteria, generation_config, *args, **kwargs)
        may_drop = setting(generation_config, "drop_finished_rows") and not any(
            _keeps_rows(part) for part in [*logits_processor, *stopping_criteria]
        )
        cache = model_kwargs["past_key_values"]
        pad = generation_config.pad_token_id if generation_config.pad_token_id is not None else self.config.pad_token_id
        logits = self._prefill(input_ids, generation_config, model_kwargs).logits[:, -1]
        num_rows = len(input_ids)
        rows = torch.arange(num_rows, device=input_ids.device)
        parts = []  # (rows, ids) of the rows that were left out
        unfinished = torch.ones_like(rows, dtype=torch.bool)
        # the bookkeeping of autograd is a part of a step, even under `no_grad`
        with torch.inference_mode():
            decoder = OmniJetDecoder(self, cache)
            processors = later_processors = logits_processor
            if logits_processor and type(logits_processor[0]) is ForbiddenTokensLogitsProcessor:
                # the decoder forbids them itself, without a copy of all scores
                decoder.forbid(logits_processor[0].token_ids)
                later_processors = LogitsProcessorList(logits_processor[1:])
            while True:
                scores = processors(input_ids, logits.float())
                next_ids = sample_from_scores(scores) if generation_config.do_sample else scores.argmax(dim=-1)
                input_ids = torch.cat([input_ids, torch.where(unfinished, next_ids, pad)[:, None]], dim=1)
                unfinished = unfinished & ~stopping_criteria(input_ids, None)
                num_unfinished = int(unfinished.sum())
                if num_unfinished == 0:
                    break
                # every time the batch shrinks by a quarter: the copies then cost less than the rows would
                if may_drop and num_unfinished <= 0.75 * len(rows):
                    parts.append((rows[~unfinished], input_ids[~unfinished]))
                    cache.batch_select_indices(unfinished.nonzero().squeeze(-1))
                    rows, input_ids = rows[unfinished], input_ids[unfinished]
                    unfinished = unfinished[unfinished]
                logits = decoder(input_ids[:, -1])
                processors = later_processors
        parts.append((rows, input_ids))
        # made here, because what was made in inference mode cannot be used in training
        sequences = torch.full((num_rows, input_ids.shape[1]), pad, device=input_ids.device)
        for part_rows, part_ids in parts:
            sequences[part_rows.clone(), : part_ids.shape[1]] = part_ids.clone()
        return sequences

    def _merged_projections(self) -> list[nn.Module]:
        """The layers of which `OmniJetDecoder` takes the weights instead of calling them."""
        attentions = [layer.self_attn for layer in self.model.layers]
        projections = [
            part for attention in attentions for part in (attention.q_proj, attention.k_proj, attention.v_proj)
        ]
        return [*projections, self.lm_head]

    def _decodes_directly(self, input_ids: torch.LongTensor, generation_config, model_kwargs: dict) -> bool:
        """
        Whether `OmniJetDecoder` can stand in for `forward`: no padding, a plain growing cache of our own, nothing
        recorded, returned or hooked, no adapter or quantised weight.
        """
        cache = model_kwargs.get("past_key_values")
        attention_mask = model_kwargs.get("attention_mask")
        return (
            self.config._attn_implementation == "sdpa"
            and not generation_config.return_dict_in_generate
            and generation_config.prefill_chunk_size is None
            and model_kwargs.get("inputs_embeds") is None
            and type(cache) is DynamicCache
            and cache.get_seq_length() == 0
            and all(type(layer) is GrowingLayer for layer in cache.layers)
            and (attention_mask is None or bool((attention_mask == 1).all()))
            and not hasattr(self, "hf_device_map")
            and not any(module._forward_hooks or module._forward_pre_hooks for module in self.modules())
            and all(map(_is_plain, self._merged_projections()))
        )


class OmniJetDecoder:
    """
    `OmniJetForCausalLM.forward` for one more position of an unpadded batch with a cache, written out.

    A step of this network is less work than the calls that make it up. So projections that share an input are one, and
    masks and attention interfaces are left out. The output layer, which for showers is bound by reading its weights,
    has them in the order of reading. Lives for one call of `generate()`, so the merged weights never age.
    """

    def __init__(self, model: OmniJetForCausalLM, past_key_values: Cache):
        self.model = model
        self.cache = past_key_values
        self.qkv_weights = []
        for layer in model.model.layers:
            attention = layer.self_attn
            # the scale of the scores is that of the queries
            query_weight = attention.q_proj.weight * attention.head_dim**-0.5
            weights = torch.cat([query_weight, attention.k_proj.weight, attention.v_proj.weight])
            self.qkv_weights.append(weights.t().contiguous())
        weight = model.lm_head.weight.t()
        # rows that begin at multiples of 64 numbers are read faster
        rows = weight.new_empty(weight.shape[0], -(-weight.shape[1] // 64) * 64)
        self.output_weight = rows[:, : weight.shape[1]].copy_(weight)
        self.output_bias = model.lm_head.bias

    def forbid(self, token_ids: torch.LongTensor):
        """Gives these ids the logit -inf from now on."""
        self.output_bias = self.output_bias.index_fill(0, token_ids.to(self.output_bias.device), -torch.inf)

    def __call__(self, input_ids: torch.LongTensor) -> torch.FloatTensor:
        """Takes the last id of every row, (batch,), returns logits, (batch, vocab)."""
        base = self.model.model
        hidden_states = base.embed_tokens(input_ids)
        for index, layer in enumerate(base.layers):
            hidden_states = layer.post_attention_norm(hidden_states + self.attend(index, layer, hidden_states))
            hidden_states = layer.post_mlp_norm(hidden_states + layer.mlp(hidden_states))
        return torch.addmm(self.output_bias, hidden_states, self.output_weight)

    def attend(self, index: int, layer: OmniJetLayer, hidden_states: torch.Tensor) -> torch.Tensor:
        batch_size, size = hidden_states.shape
        head_dim = layer.self_attn.head_dim
        states = torch.mm(hidden_states, self.qkv_weights[index]).view(batch_size, 3, -1, 1, head_dim)
        query, key, value = states.unbind(dim=1)
        keys, values = self.cache.layers[index].update(key, value)
        weights = torch.bmm(query.reshape(-1, 1, head_dim), keys.flatten(0, 1).transpose(1, 2)).softmax(dim=-1)
        output = torch.bmm(weights, values.flatten(0, 1)).view(batch_size, size)
        return layer.self_attn.o_proj(output)


def _is_plain(projection: nn.Module) -> bool:
    """Neither wrapped by an adapter, whose weight is that of the wrapped layer, nor quantised."""
    return type(projection) is nn.Linear and type(projection.weight) is nn.Parameter


def setting(generation_config, name: str):
    """A setting of our own, which a `GenerationConfig` made by hand need not have."""
    return getattr(generation_config, name, GENERATION_DEFAULTS[name])


class StopThresholdLogitsProcessor(LogitsProcessor):
    """
    Removes the stop id where its probability is below `threshold` (arXiv:2501.05534).

    Args:
        stop_token_id (`int`), threshold (`float`): from 0 to 1.
    """

    def __init__(self, stop_token_id: int, threshold: float):
        if not 0 <= threshold <= 1:
            raise ValueError(f"`stop_token_threshold` is {threshold}, expected from 0 to 1")
        self.stop_token_id = stop_token_id
        self.threshold = threshold

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        stop = scores[:, self.stop_token_id]
        is_rare = (stop - scores.logsumexp(dim=-1)).exp() < self.threshold
        scores = scores.clone()
        scores[:, self.stop_token_id] = stop.masked_fill(is_rare, -torch.inf)
        return scores


class OmniJetForSequenceClassification(OmniJetPreTrainedModel):
    """
    Jet tagger: a head on the GPT, whose weights may come from a generator (`from_pretrained` of its folder), or one of
    the stand-alone taggers (`config.architecture`).
    """

    def __init__(self, config: OmniJetConfig):
        check_architecture(config, type(self).__name__, "gpt", "particle_flow", "normformer")
        super().__init__(config)
        self.num_labels = config.num_labels
        if config.architecture == "gpt":
            self.model = OmniJetModel(config)
            is_sum = config.classifier_head == "summation"
            self.head = OmniJetSummationHead(config) if is_sum else OmniJetClassAttentionHead(config, act_first=True)
        elif config.architecture == "particle_flow":
            self.tagger = OmniJetParticleFlow(config)
        else:
            self.tagger = OmniJetNormFormerTagger(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        particle_features: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> SequenceClassifierOutput:
        r"""
        Args:
            input_ids (`(batch, length)`): start, code ids, stop, padding.
            attention_mask (`(batch, length)`): 1 for real positions.
            particle_features (`(batch, length, num_features)`): transformed features, for the taggers that read them.
            labels (`(batch,)`): class index; or (batch, num_labels), the probability of each class.

        Returns `logits` of shape (batch, num_labels).
        """
        reads_features = self.config.architecture != "gpt" and self.config.num_features > 0
        inputs, name = (particle_features, "particle_features") if reads_features else (input_ids, "input_ids")
        check_inputs(inputs, name, self.config.num_features if reads_features else None)
        is_real = torch.ones(inputs.shape[:2], device=inputs.device) if attention_mask is None else attention_mask
        hidden_states = attentions = None
        if self.config.architecture == "gpt":
            outputs = self.model(inputs, attention_mask=attention_mask, use_cache=False, return_dict=True, **kwargs)
            logits = self.head(outputs.last_hidden_state, is_real)
            hidden_states, attentions = outputs.hidden_states, outputs.attentions
        else:
            logits = self.tagger(inputs, is_real)
        loss = None if labels is None else class_loss(logits, labels, num_items_in_batch)
        return SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=hidden_states, attentions=attentions)


class OmniJetForPreTraining(OmniJetPreTrainedModel, OmniJetGenerationMixin):
    """
    Continuous constituents to next tokens, masked tokens and a class (arXiv:2512.04149): the tokens are targets only.

    Position 0 is the start, whose features the model puts in itself, so that the constituents begin at position 1.
    """

    main_input_name = "particle_features"

    def __init__(self, config: OmniJetConfig):
        check_architecture(config, type(self).__name__, "hybrid")
        if config.padding_loss == "trained":
            raise ValueError(f"{type(self).__name__}: `padding_loss` is 'trained', expected ignored or counted")
        super().__init__(config)
        self.num_labels = config.num_labels
        self.start_features = nn.Parameter(torch.zeros(config.num_features)) if config.trainable_start else None
        self.backbone = OmniJetHybridBackbone(config)
        self.masked_vectors = nn.Parameter(torch.zeros(config.max_position_embeddings, config.hidden_size))
        self.generation_head = OmniJetTokenHead(config, config.num_predictions)
        self.masked_head = OmniJetTokenHead(config, 1)
        self.class_head = OmniJetHybridClassHead(config)
        self.post_init()
        self._set_generation_defaults()

    @can_return_tuple
    def forward(
        self,
        particle_features: torch.FloatTensor,
        attention_mask: torch.Tensor | None = None,
        jet_features: torch.FloatTensor | None = None,
        masked_positions: torch.BoolTensor | None = None,
        generation_labels: torch.LongTensor | None = None,
        masked_labels: torch.LongTensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> OmniJetPreTrainingOutput:
        r"""
        Args:
            particle_features (`(batch, length, num_features)`): transformed features; those at position 0 are ignored.
            attention_mask (`(batch, length)`): 1 for real positions, the start included.
            jet_features (`(batch, num_jet_features)`): of the whole jet, if the configuration has them.
            masked_positions (`(batch, length)`): true where the constituent is hidden; by default drawn, the share
                `config.mask_fraction` of the real positions of the batch (none if `masked_labels` is missing).
            generation_labels (`(batch, length)`): id of the next constituent, or stop; -100 for padding.
            masked_labels (`(batch, length)`): id of the constituent at its own position; -100 for padding.
            labels (`(batch,)`): class index.
            num_items_in_batch: number of jets in the whole batch, for gradient accumulation.
        """
        config = self.config
        check_inputs(particle_features, "particle_features", config.num_features)
        batch_size, length = particle_features.shape[:2]
        if length > config.max_position_embeddings:
            raise ValueError(
                f"`particle_features` has {length} positions, expected at most {config.max_position_embeddings}"
            )
        check_jet_features(jet_features, batch_size, config.num_jet_features)
        if attention_mask is None:
            attention_mask = torch.ones(batch_size, length, dtype=torch.bool, device=particle_features.device)
        for name, values in (
            ("attention_mask", attention_mask),
            ("masked_positions", masked_positions),
            ("generation_labels", generation_labels),
            ("masked_labels", masked_labels),
        ):
            if values is not None and tuple(values.shape) != (batch_size, length):
                raise ValueError(f"`{name}` has shape {tuple(values.shape)}, expected {(batch_size, length)}")
        is_real = attention_mask.bool()
        if masked_positions is not None:
            is_masked = masked_positions.bool() & is_real
        elif masked_labels is not None:
            is_masked = draw_masked(is_real, config.mask_fraction)
        else:
            is_masked = torch.zeros_like(is_real)

        features = self.with_start(particle_features)
        hidden_features = features
        if config.masked_input == "zero":
            hidden_features = features.masked_fill(is_masked.unsqueeze(-1), 0.0)
        visible = is_real & ~is_masked if config.masked_input == "exclude" else is_real
        is_causal = config.is_causal and not config.use_hybrid_passes
        states = self.backbone(hidden_features, visible, is_causal, jet_features)
        ranks = masked_ranks(hidden_features[..., 0], is_real, is_masked, config.masked_position)
        filled = torch.where(is_masked.unsqueeze(-1), self.masked_vectors[ranks].to(states.dtype), states)

        # in training nothing is computed that no target asks for
        generation_logits = masked_logits = generation_states = None
        generation_loss = masked_loss = loss_of_class = None
        if generation_labels is not None or not self.training:
            generation_states = filled
            if config.use_hybrid_passes:
                generation_states = self.backbone(features, is_real, True, jet_features)
            predictions = self.generation_head(generation_states, is_real, True)
            if not self.training:
                generation_logits = torch.stack([self.generation_head.output(states) for states in predictions], dim=-1)
            if generation_labels is not None:
                generation_loss = sum(
                    self._token_loss(self.generation_head, prediction, generation_labels, offset)
                    for offset, prediction in enumerate(predictions)
                ) / len(predictions)
        if masked_labels is not None or not self.training:
            (prediction,) = self.masked_head(filled, is_real, False)
            if not self.training:
                masked_logits = self.masked_head.output(prediction)
            if masked_labels is not None:
                targets = masked_labels.masked_fill(~is_masked, -100)
                masked_loss = self._token_loss(self.masked_head, prediction, targets)
        logits = self.class_head(filled, is_real) if labels is not None or not self.training else None
        if labels is not None:
            loss_of_class = class_loss(logits, labels)
        terms = (
            (config.generation_loss_weight, generation_loss),
            (config.masked_loss_weight, masked_loss),
            (config.class_loss_weight, loss_of_class),
        )
        present = [weight * term for weight, term in terms if term is not None]
        loss = sum(present) if present else None
        if loss is not None and num_items_in_batch is not None:
            loss = loss * (batch_size / num_items_in_batch)
        return OmniJetPreTrainingOutput(
            loss=loss,
            generation_loss=generation_loss,
            masked_loss=masked_loss,
            class_loss=loss_of_class,
            generation_logits=generation_logits,
            masked_logits=masked_logits,
            logits=logits,
            backbone_states=states,
        )

    def with_start(self, particle_features: torch.Tensor) -> torch.Tensor:
        """The features (batch, length, num_features) with those of the start at position 0."""
        if self.start_features is None:
            start = torch.zeros_like(particle_features[:, :1])
        else:
            start = self.start_features.to(particle_features.dtype).expand(len(particle_features), 1, -1)
        return torch.cat([start, particle_features[:, 1:]], dim=1)

    def generate(
        self,
        vqvae: OmniJetVQVAEModel,
        input_ids: torch.LongTensor | None = None,
        jet_features: torch.FloatTensor | None = None,
        **kwargs,
    ):
        """
        Ids of jets, (batch, length), as those of [`OmniJetForCausalLM`]: start, codes, stop, padding.

        As published, the codes so far are decoded after every step and the features of the last constituent become the
        next input. With a causal decoder these are the features of the whole jet, and one position is computed per
        step; another decoder gives features that change as the jet grows.

        Args:
            vqvae: of the tokenizer (`tokenizer.vqvae`); its features are those that this model reads.
            input_ids (`(batch, length)`): beginnings of jets without padding; by default the start id.
            jet_features (`(batch, num_jet_features)`): of the whole jets, if the configuration has them.
            kwargs: of the stock `generate()`: `num_return_sequences`, `temperature`, `logits_processor` ...
        """
        config = self.config
        if not (config.use_hybrid_passes or config.is_causal):
            raise ValueError("`is_causal` or `use_hybrid_passes` is needed to generate: constituents see later ones")
        for name in ("num_features", "codebook_size"):
            if getattr(vqvae.config, name) != getattr(config, name):
                raise ValueError(
                    f"the VQ-VAE has `{name}` = {getattr(vqvae.config, name)}, expected that of the model, "
                    f"{getattr(config, name)}"
                )
        if vqvae.config.num_jet_features:
            raise ValueError("the VQ-VAE has `num_jet_features`, expected one that decodes codes alone")
        if input_ids is None:
            num_rows = 1 if jet_features is None else len(jet_features)
            input_ids = torch.full((num_rows, 1), config.bos_token_id, device=self.device)
        check_prompt(input_ids, config.vocab_size)
        is_code = (input_ids > 0) & (input_ids <= config.codebook_size)
        if not bool((input_ids[:, 0] == config.bos_token_id).all() and is_code[:, 1:].all()):
            raise ValueError("`input_ids` must be the start id and codes, without padding")
        check_jet_features(jet_features, len(input_ids), config.num_jet_features)
        generator = OmniJetHybridGenerator(self, vqvae)
        return generator.generate(
            input_ids, attention_mask=torch.ones_like(input_ids), jet_features=jet_features, **kwargs
        )

    def _token_loss(self, head: OmniJetTokenHead, hidden, targets, offset: int = 0) -> torch.Tensor:
        """Mean cross entropy against the targets (batch, length) `offset` positions further on."""
        targets = nn.functional.pad(targets[:, offset:], (0, offset), value=-100)
        total = chunked_linear_cross_entropy(
            hidden.flatten(0, 1), head.output.weight, head.output.bias, targets.flatten()
        )
        if self.config.padding_loss == "counted":
            return total / (targets.shape[0] * (targets.shape[1] - offset))
        return total / (targets != -100).sum().clamp(min=1)


class OmniJetHybridGenerator(OmniJetPreTrainedModel, OmniJetGenerationMixin):
    """
    [`OmniJetForPreTraining`] and the decoder of its tokens as a causal model of ids, for the stock `generate()`. Lives
    for one call; the weights are those of the two models.
    """

    def __init__(self, model: OmniJetForPreTraining, vqvae: OmniJetVQVAEModel):
        super().__init__(model.config)
        self.model = model
        self.vqvae = vqvae
        self.generation_config = model.generation_config
        # in the order of the cache: the head has seen as many positions as there are ids
        parts = [model.generation_head.transformers[0].layers, model.backbone.transformer.layers]
        decoder = vqvae.decoder
        if isinstance(decoder, OmniJetVQVAECoder) and decoder.is_causal:
            parts.append(decoder.layers)
        self.num_layers = [len(layers) for layers in parts]

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, jet_features=None, **kwargs):
        # all ids: a decoder that is not causal looks at all codes
        return {"input_ids": input_ids, "past_key_values": past_key_values, "jet_features": jet_features}

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        if model_kwargs.get("past_key_values") is not None or generation_config.cache_implementation is not None:
            raise ValueError(
                "`past_key_values` and `cache_implementation` cannot be chosen: there are several networks"
            )
        if generation_config.use_cache:
            model_kwargs["past_key_values"] = self._new_cache()

    def _new_cache(self) -> DynamicCache:
        cache = DynamicCache()
        cache.layers = [GrowingLayer() for _ in range(sum(self.num_layers))]
        return cache

    def forward(
        self,
        input_ids: torch.LongTensor,
        past_key_values: Cache | None = None,
        jet_features: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Ids (batch, length) from the first on; logits of the positions that are not in `past_key_values`."""
        cache = self._new_cache() if past_key_values is None else past_key_values
        head_past, backbone_past, *decoder_past = self._split(cache)
        seen = head_past[0].get_seq_length()
        # stop and padding are no codes, and what stands behind them does not matter
        codes = (input_ids[:, 1:] - 1).clamp(0, self.config.codebook_size - 1)
        features = self._decode(codes, max(seen - 1, 0), *decoder_past)
        if seen == 0:
            features = self.model.with_start(nn.functional.pad(features, (0, 0, 1, 0)))
        states = self.model.backbone.following(features, backbone_past, jet_features)
        logits = self.model.generation_head.following(states, head_past)
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)

    def _split(self, cache: DynamicCache) -> list[list]:
        """The layers of the cache by network."""
        ends = list(itertools.accumulate(self.num_layers))
        return [cache.layers[end - size : end] for end, size in zip(ends, self.num_layers)]

    def _decode(self, codes: torch.LongTensor, start: int, past: list | None = None) -> torch.Tensor:
        """
        Features (batch, length - start, num_features) of the codes from `start` on, each decoded from itself and those
        in front of it. `past`: of the decoder, if it is causal.
        """
        dtype = self.model.dtype
        if codes.shape[1] == start:
            return torch.zeros(len(codes), 0, self.config.num_features, dtype=dtype, device=codes.device)
        if past is not None:
            vectors = self.vqvae.quantizer.lookup(codes[:, start:]).to(self.vqvae.dtype)
            return self.vqvae.decoder.following(vectors, past).to(dtype)
        ends = range(start + 1, codes.shape[1] + 1)
        return torch.stack([self.vqvae.decode(codes[:, :end])[:, -1] for end in ends], dim=1).to(dtype)


def check_jet_features(jet_features: torch.Tensor | None, num_jets: int, num_features: int):
    """(num_jets, num_features), or none."""
    shape = None if jet_features is None else tuple(jet_features.shape)
    if shape != (None if num_features == 0 else (num_jets, num_features)):
        expected = f"{(num_jets, num_features)}" if num_features > 0 else "none: `num_jet_features` is 0"
        raise ValueError(f"`jet_features` has shape {shape}, expected {expected}")


def class_loss(logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch=None) -> torch.Tensor:
    """Cross entropy against class indices (batch,) or class probabilities (batch, num_labels)."""
    labels = labels.float() if labels.ndim == 2 else labels
    losses = nn.functional.cross_entropy(logits.float(), labels, reduction="none")
    return losses.mean() if num_items_in_batch is None else losses.sum() / num_items_in_batch


def check_inputs(inputs: torch.Tensor | None, name: str, num_features: int | None):
    """Ids (batch, length), or features (batch, length, num_features)."""
    if inputs is None:
        raise ValueError(f"`{name}` is missing")
    expected = "(batch, length)" if num_features is None else f"(batch, length, {num_features})"
    is_right = inputs.ndim == 2 if num_features is None else inputs.ndim == 3 and inputs.shape[-1] == num_features
    if not is_right:
        raise ValueError(f"`{name}` has shape {tuple(inputs.shape)}, expected {expected}")
    if 0 in inputs.shape:
        raise ValueError(f"`{name}` has shape {tuple(inputs.shape)}, expected at least one jet and one position")


def check_prompt(input_ids: torch.Tensor, vocab_size: int):
    """Ids (batch, length) of the vocabulary; on an accelerator any other id would end the process."""
    if not isinstance(input_ids, torch.Tensor) or input_ids.ndim != 2:
        found = tuple(input_ids.shape) if isinstance(input_ids, torch.Tensor) else type(input_ids).__name__
        raise ValueError(f"`input_ids` is {found}, expected a tensor (batch, length)")
    if input_ids.numel() > 0 and not 0 <= int(input_ids.min()) <= int(input_ids.max()) < vocab_size:
        raise ValueError(
            f"`input_ids` has ids from {int(input_ids.min())} to {int(input_ids.max())}, expected 0 to {vocab_size - 1}"
        )


def check_architecture(config: OmniJetConfig, class_name: str, *architectures: str):
    if config.architecture not in architectures:
        expected = " or ".join(architectures)
        raise ValueError(f"{class_name}: `architecture` is {config.architecture!r}, expected {expected}")


__all__ = [
    "OmniJetPreTrainedModel",
    "OmniJetModel",
    "OmniJetForCausalLM",
    "OmniJetForSequenceClassification",
    "OmniJetForPreTraining",
    "StopThresholdLogitsProcessor",
]

# `save_pretrained` then writes this code beside the weights, so that they load anywhere with `trust_remote_code=True`
OmniJetConfig.register_for_auto_class()
for _auto_class, _model_class in AUTO_CLASSES.items():
    globals()[_model_class].register_for_auto_class(_auto_class)
