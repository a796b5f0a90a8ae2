"""
CMHCA-DIRC: a transformer over Cherenkov photons, arXiv:2505.08736.

Each hit is a pair of ids (pixel, arrival time). In the first block the queries come from the times and the keys and
values from the pixels (causal multi-head cross attention); the other blocks are ordinary self attention over the
resulting stream. Two heads predict the next pixel and the next time from the same hidden state.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import SequenceClassifierOutput, TokenClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .chunked_cross_entropy import chunked_linear_cross_entropy
from .configuration_cmhca_dirc import CMHCADircConfig
from .eager_attention import eager_attention_forward
from .generation_multistream import MultiStreamGenerationMixin

SQRT_HALF = math.sqrt(0.5)

# every class that a saved checkpoint can be opened with
AUTO_CLASSES = {
    "AutoModel": "CMHCADircModel",
    "AutoModelForCausalLM": "CMHCADircForCausalLM",
    "AutoModelForSequenceClassification": "CMHCADircForSequenceClassification",
    "AutoModelForTokenClassification": "CMHCADircForTokenClassification",
}


@dataclass
class CMHCADircModelOutput(ModelOutput):
    """
    Args:
        last_hidden_state (`(batch, length, hidden_size)`): after the final norm; one position longer if the model has a
            cls token.
        router_probs (tuple of `(batch, length, num_experts)`, one per block): only with experts.
    """

    last_hidden_state: torch.FloatTensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    router_probs: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class CMHCADircCausalLMOutput(ModelOutput):
    """
    Args:
        loss (scalar): space + time cross entropy, plus the load-balance loss in training with experts.
        logits (tuple of `(batch, length, vocab_k)`): one tensor per stream. `None` in training with labels, where the
            loss is computed without holding the logits.
        predicted_times (`(batch, length)`): next time scaled to [0, 1]; only with `time_prediction="regression"`.
        stream_losses (tuple of scalars): space loss, time loss.
        aux_loss (scalar): load-balance loss; only in training with experts.
    """

    loss: torch.FloatTensor | None = None
    logits: tuple[torch.FloatTensor, ...] | None = None
    predicted_times: torch.FloatTensor | None = None
    stream_losses: tuple[torch.FloatTensor, ...] | None = None
    aux_loss: torch.FloatTensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    router_probs: tuple[torch.FloatTensor, ...] | None = None


class CMHCADircEmbeddings(nn.Module):
    """Ids and kinematics to the space stream and the time stream that enter block 0."""

    def __init__(self, config: CMHCADircConfig):
        super().__init__()
        self.config = config
        self.num_conditioning_tokens = config.num_conditioning_tokens
        size = config.hidden_size
        self.space = nn.Embedding(config.vocab_size, size)
        self.space_position = nn.Embedding(config.max_position_embeddings, size)
        if config.time_prediction == "categorical":
            self.time = nn.Embedding(config.time_vocab_size, size)
        else:
            self.time = nn.Linear(1, size)
        self.time_position = nn.Embedding(config.max_position_embeddings, size)
        self.conditioning = nn.ModuleList(nn.Linear(1, size) for _ in config.conditioning_names)

    def forward(
        self,
        input_ids: torch.LongTensor,
        position_ids: torch.LongTensor,
        kinematics: torch.FloatTensor | None,
        times: torch.FloatTensor | None,
    ) -> tuple[torch.FloatTensor, torch.FloatTensor]:
        """Returns two tensors of shape (batch, length, hidden_size)."""
        hit_positions = (position_ids - self.num_conditioning_tokens).clamp(min=0)
        space = self.space(input_ids[..., 0]) + self.space_position(hit_positions)
        if self.config.time_prediction == "categorical":
            time = self.time(input_ids[..., 1])
        else:
            time = self.time(times.to(self.time.weight.dtype).unsqueeze(-1))
        time = time + self.time_position(hit_positions)

        if kinematics is not None:
            conditioning = self.embed_kinematics(kinematics)
            # the same vectors replace the slots of both streams
            slot = position_ids.clamp(max=self.num_conditioning_tokens - 1).expand(input_ids.shape[:2])
            conditioning = conditioning.gather(1, slot.unsqueeze(-1).expand(-1, -1, conditioning.shape[-1]))
            is_slot = (position_ids < self.num_conditioning_tokens).unsqueeze(-1)
            space = torch.where(is_slot, conditioning, space)
            time = torch.where(is_slot, conditioning, time)
        return space, time

    def embed_kinematics(self, kinematics: torch.FloatTensor) -> torch.FloatTensor:
        """Physical kinematics (batch, quantities) to vectors (batch, quantities, hidden_size)."""
        # python floats, so that nothing is left on the wrong device after loading
        scaled = [
            2 * (value - low) / (high - low) - 1
            for value, (low, high) in zip(kinematics.float().unbind(-1), self.config.conditioning_ranges)
        ]
        dtype = self.conditioning[0].weight.dtype
        return torch.stack(
            [linear(value.to(dtype).unsqueeze(-1)) for linear, value in zip(self.conditioning, scaled)], dim=1
        )


def normalize(states: torch.Tensor) -> torch.Tensor:
    """`nn.functional.normalize` over the last dimension, with fewer calls: it runs at every step of generation."""
    return states / torch.linalg.vector_norm(states, dim=-1, keepdim=True).clamp_min(1e-12)


class CMHCADircAttention(nn.Module):
    """Attention on normalised queries and keys, scores = logit_scale * q.k with one learned scale per block."""

    def __init__(self, config: CMHCADircConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        size = config.hidden_size
        self.head_dim = size // config.heads_of_layer(layer_idx)
        self.attention_dropout = config.dropout_of_layer(layer_idx)
        self.q_proj = nn.Linear(size, size, bias=False)
        self.k_proj = nn.Linear(size, size, bias=False)
        self.v_proj = nn.Linear(size, size, bias=False)
        # the published model has a bias in the cross-attention block only
        self.o_proj = nn.Linear(size, size, bias=layer_idx == 0)
        self.qk_norm = config.qk_norm
        if self.qk_norm:
            self.logit_scale = nn.Parameter(torch.tensor(math.sqrt(self.head_dim)))

    @property
    def is_causal(self) -> bool:
        return self.config.is_causal

    def forward(
        self,
        query_states: torch.Tensor,
        key_value_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        input_shape = query_states.shape[:-1]
        hidden_shape = (*input_shape, -1, self.head_dim)
        query = self.q_proj(query_states).view(hidden_shape).transpose(1, 2)
        key = self.k_proj(key_value_states).view(hidden_shape).transpose(1, 2)
        value = self.v_proj(key_value_states).view(hidden_shape).transpose(1, 2)
        scaling = self.head_dim**-0.5
        if self.qk_norm:
            query = normalize(query) * self.logit_scale
            key = normalize(key)
            scaling = 1.0

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
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=scaling,
            **kwargs,
        )
        return self.o_proj(output.reshape(*input_shape, -1)), weights


class CMHCADircMLP(nn.Module):
    def __init__(self, config: CMHCADircConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act_fn = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act_fn(self.fc1(hidden_states)))


def own_experts(class_ids: torch.LongTensor, num_experts: int, num_classes: int) -> torch.BoolTensor:
    """(batch,) class ids to (batch, num_experts): which experts serve the class."""
    expert_classes = torch.arange(num_experts, device=class_ids.device) // (num_experts // num_classes)
    return class_ids.unsqueeze(-1) == expert_classes


class CMHCADircMoE(nn.Module):
    """Mixture of experts routed by particle class: a track only sees the experts of its own class."""

    def __init__(self, config: CMHCADircConfig):
        super().__init__()
        self.num_classes = config.num_classes
        self.router = nn.Linear(config.hidden_size, config.num_experts)
        self.experts = nn.ModuleList(CMHCADircMLP(config) for _ in range(config.num_experts))

    def forward(
        self, hidden_states: torch.Tensor, class_ids: torch.LongTensor
    ) -> tuple[torch.Tensor, torch.FloatTensor]:
        own = own_experts(class_ids, len(self.experts), self.num_classes)
        router_logits = self.router(hidden_states).float()
        router_probs = router_logits.masked_fill(~own.unsqueeze(1), -torch.inf).softmax(dim=-1)
        output = torch.zeros_like(hidden_states)
        for index, expert in enumerate(self.experts):
            weight = router_probs[..., index : index + 1].to(hidden_states.dtype)
            if torch.compiler.is_compiling():
                # foreign experts have weight zero; the shapes stay static
                output = output + weight * expert(hidden_states)
            else:
                rows = own[:, index].nonzero().squeeze(-1)
                output = output.index_add(0, rows, weight[rows] * expert(hidden_states[rows]))
        return output, router_probs


class CMHCADircLayer(GradientCheckpointingLayer):
    """
    One pre-norm block. Block 0 is the cross attention: queries from the time stream, keys and values from the space
    stream, residual on the space stream. The other blocks are self attention.
    """

    def __init__(self, config: CMHCADircConfig, layer_idx: int):
        super().__init__()
        norm = {"normalized_shape": config.hidden_size, "eps": config.layer_norm_eps}
        self.attention_norm = nn.LayerNorm(**norm)
        self.time_norm = nn.LayerNorm(**norm) if layer_idx == 0 else None
        self.attention = CMHCADircAttention(config, layer_idx)
        self.mlp_norm = nn.LayerNorm(**norm)
        self.mlp = CMHCADircMoE(config) if config.num_experts > 0 else CMHCADircMLP(config)
        self.has_experts = config.num_experts > 0

    def forward(
        self,
        hidden_states: torch.Tensor,
        time_states: torch.Tensor | None = None,
        class_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the new hidden states (batch, length, hidden_size) and the router probabilities or `None`."""
        key_value_states = self.attention_norm(hidden_states)
        query_states = self.time_norm(time_states) if self.time_norm is not None else key_value_states
        attention_output, _ = self.attention(
            query_states, key_value_states, attention_mask=attention_mask, past_key_values=past_key_values, **kwargs
        )
        hidden_states = hidden_states + attention_output
        normed = self.mlp_norm(hidden_states)
        router_probs = None
        if self.has_experts:
            mlp_output, router_probs = self.mlp(normed, class_ids)
        else:
            mlp_output = self.mlp(normed)
        return hidden_states + mlp_output, router_probs


class CMHCADircTimeRegressionHead(nn.Module):
    """Next time from the hidden state, (batch, length, hidden_size) -> (batch, length), scaled, not negative."""

    def __init__(self, config: CMHCADircConfig):
        super().__init__()
        size = config.time_regression_size
        self.input_proj = nn.Linear(config.hidden_size, size)
        self.blocks = nn.ModuleList(nn.ModuleList([nn.Linear(size, size), nn.Linear(size, size)]) for _ in range(2))
        self.output_proj = nn.Linear(size, 1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.input_proj(hidden_states)
        for first, second in self.blocks:
            hidden_states = torch.relu(second(torch.relu(first(hidden_states))) + hidden_states)
        return torch.relu(self.output_proj(hidden_states)).squeeze(-1)


class CMHCADircPreTrainedModel(PreTrainedModel):
    config: CMHCADircConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["CMHCADircLayer", "CMHCADircEmbeddings"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": CMHCADircLayer, "attentions": CMHCADircAttention}

    def save_pretrained(self, save_directory, **kwargs):
        """As `PreTrainedModel.save_pretrained`; the folder opens with every Auto class, not only that of this model."""
        module = __name__.split(".")[-1]
        self.config.auto_map = {auto_class: f"{module}.{name}" for auto_class, name in AUTO_CLASSES.items()}
        super().save_pretrained(save_directory, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """Initialisation of the published model: PyTorch's own, embeddings from N(0, 1)."""
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
        elif isinstance(module, CMHCADircAttention):
            if module.qk_norm:
                init.constant_(module.logit_scale, math.sqrt(module.head_dim))
        elif isinstance(module, CMHCADircModel) and module.cls_token is not None:
            init.normal_(module.cls_token, mean=0.0, std=self.config.embedding_initializer_range)


class CMHCADircModel(CMHCADircPreTrainedModel):
    """The bare transformer: hits and kinematics to hidden states."""

    def __init__(self, config: CMHCADircConfig):
        super().__init__(config)
        self.embeddings = CMHCADircEmbeddings(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size)) if config.use_cls_token else None
        self.layers = nn.ModuleList(CMHCADircLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings.space

    def resize_token_embeddings(self, *args, **kwargs):
        raise NotImplementedError("`vocab_size` is fixed: EOS and pad are the last two ids of each vocabulary")

    def set_input_embeddings(self, value: nn.Embedding):
        self.embeddings.space = value

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        kinematics: torch.FloatTensor | None = None,
        class_ids: torch.LongTensor | None = None,
        times: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> CMHCADircModelOutput:
        r"""
        Args:
            input_ids (`(batch, length, streams)`): conditioning slots, SOS, hits, EOS, padding; stream 0 pixels,
                stream 1 times (absent in regression).
            attention_mask (`(batch, length)`): 1 for real positions, slots included. Left padding needs
                `position_ids` (as `generate` provides them).
            position_ids (`(batch, length)`): positions counted from the first slot.
            kinematics (`(batch, quantities)`): physical units in the order of `config.conditioning_names` (momentum
                GeV/c, polar angle in degrees). May only be left out when continuing from a cache.
            class_ids (`(batch,)`): particle class, 0 pion, 1 kaon; required with experts, ignored without.
            times (`(batch, length)`): times scaled to [0, 1]; required in regression, ignored otherwise.
        """
        self._check_inputs(input_ids, kinematics, class_ids, times, past_key_values)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(input_ids.shape[1], device=input_ids.device) + past_length).unsqueeze(0)

        hidden_states, time_states = self.embeddings(input_ids, position_ids, kinematics, times)
        if self.cls_token is not None:
            cls_token = self.cls_token.expand(hidden_states.shape[0], -1, -1)
            hidden_states = torch.cat([cls_token, hidden_states], dim=1)
            time_states = torch.cat([cls_token, time_states], dim=1)
            if attention_mask is not None:
                attention_mask = nn.functional.pad(attention_mask, (1, 0), value=1)

        mask_kwargs = {"config": self.config, "inputs_embeds": hidden_states, "attention_mask": attention_mask}
        if self.config.is_causal:
            attention_mask = create_causal_mask(**mask_kwargs, past_key_values=past_key_values)
        else:
            attention_mask = create_bidirectional_mask(**mask_kwargs)

        router_probs = ()
        for layer in self.layers:
            hidden_states, layer_router_probs = layer(
                hidden_states,
                time_states,
                class_ids,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                **kwargs,
            )
            router_probs += (layer_router_probs,)
        return CMHCADircModelOutput(
            last_hidden_state=self.norm(hidden_states),
            past_key_values=past_key_values,
            router_probs=router_probs if self.config.num_experts > 0 else None,
        )

    def _check_inputs(self, input_ids, kinematics, class_ids, times, past_key_values):
        if input_ids.ndim != 3 or input_ids.shape[-1] != self.config.num_streams:
            raise ValueError(
                f"`input_ids` has shape {tuple(input_ids.shape)}, expected (batch, length, {self.config.num_streams})"
            )
        batch_size, length = input_ids.shape[:2]
        num_conditioning = self.config.num_conditioning_tokens
        if past_key_values is None:
            max_length = num_conditioning + self.config.max_position_embeddings
            if length > max_length:
                raise ValueError(
                    f"`input_ids` has length {length}, expected at most {max_length} = {num_conditioning} conditioning "
                    f"slots + `max_position_embeddings` = {self.config.max_position_embeddings}"
                )
        # values are read once, where a track starts: that makes the host wait for an accelerator
        starts = past_key_values is None
        check_conditions(self.config, kinematics, class_ids, batch_size, needs_kinematics=starts, read_values=starts)
        if self.config.time_prediction == "regression":
            if times is None:
                raise ValueError("`times` is missing: a model with `time_prediction='regression'` needs scaled times")
            if times.shape != (batch_size, length):
                raise ValueError(f"`times` has shape {tuple(times.shape)}, expected {(batch_size, length)}")


def check_conditions(
    config: CMHCADircConfig,
    kinematics: torch.Tensor | None,
    class_ids: torch.Tensor | None,
    batch_size: int,
    needs_kinematics: bool = True,
    read_values: bool = True,
):
    """
    Raises:
        ValueError: `kinematics` or, with experts, `class_ids` are missing or of the wrong shape, or name no class.
    """
    names = ", ".join(config.conditioning_names)
    shape = (batch_size, config.num_conditioning_tokens)
    if kinematics is None and needs_kinematics:
        raise ValueError(f"`kinematics` is missing: expected {shape} values of {names} in physical units")
    found = tuple(kinematics.shape) if isinstance(kinematics, torch.Tensor) else type(kinematics).__name__
    if kinematics is not None and found != shape:
        raise ValueError(f"`kinematics` is {found}, expected a tensor of shape {shape}, values of {names}")
    if config.num_experts > 0:
        if class_ids is None:
            raise ValueError("`class_ids` is missing: a model with experts needs the particle class of every track")
        if class_ids.shape != (batch_size,):
            raise ValueError(f"`class_ids` has shape {tuple(class_ids.shape)}, expected ({batch_size},)")
        if read_values and not torch.compiler.is_compiling():
            unknown = (class_ids < 0) | (class_ids >= config.num_classes)
            if unknown.any():
                raise ValueError(f"`class_ids` holds {class_ids[unknown][0]}, expected 0 to {config.num_classes - 1}")


class CMHCADircForCausalLM(CMHCADircPreTrainedModel, MultiStreamGenerationMixin):
    """
    Generator: next pixel and next arrival time, independent of each other given the past.

    `generate(kinematics=...)` starts every track from its kinematics alone. With `time_prediction="regression"` the
    generated times are in `continuous["times"]` of the output (`return_dict_in_generate=True`).
    """

    continuous_streams = ("times",)

    def __init__(self, config: CMHCADircConfig):
        super().__init__(config)
        self.model = CMHCADircModel(config)
        self.space_head = nn.Linear(config.hidden_size, config.vocab_size)
        if config.time_prediction == "categorical":
            self.time_head = nn.Linear(config.hidden_size, config.time_vocab_size)
        else:
            self.time_head = CMHCADircTimeRegressionHead(config)
        # a name that transformers does not know, so that Trainer counts all targets and not all but the last stream
        self.loss_type = "multi_stream"
        self.post_init()
        # simulation means sampling from the learned distribution; the library's default of the 50 best tokens does not
        self.generation_config._from_model_config = False
        self.generation_config.update(
            do_sample=True, top_k=0, temperature=1.0, top_p=1.0, max_new_tokens=config.max_position_embeddings
        )
        self.generation_config.drop_finished_rows = True

    def get_output_embeddings(self) -> nn.Linear:
        return self.space_head

    def resize_token_embeddings(self, *args, **kwargs):
        return self.model.resize_token_embeddings(*args, **kwargs)

    def set_output_embeddings(self, value: nn.Linear):
        self.space_head = value

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        kinematics: torch.FloatTensor | None = None,
        class_ids: torch.LongTensor | None = None,
        times: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        shift_labels: torch.LongTensor | None = None,
        **kwargs,
    ) -> CMHCADircCausalLMOutput:
        r"""
        Args:
            labels (`(batch, length, streams)`): target ids at their own position (shifted here), -100 where there is
                none (slots, SOS, padding). In regression the targets of the times are `times` where `labels` is an
                ordinary pixel.
            shift_labels (`(batch, length, streams)`): targets already shifted, used instead of `labels`.
            logits_to_keep: logits of the last so many positions only (0: all).
            num_items_in_batch: number of targets of all streams in the whole batch, for gradient accumulation.

        The other arguments are those of [`CMHCADircModel`].
        """
        outputs: CMHCADircModelOutput = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            kinematics=kinematics,
            class_ids=class_ids,
            times=times,
            use_cache=use_cache,
            # whatever `config.return_dict` says, which concerns the caller
            return_dict=True,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        has_labels = labels is not None or shift_labels is not None
        for name, targets in (("labels", labels), ("shift_labels", shift_labels)):
            if targets is not None and targets.shape != input_ids.shape:
                raise ValueError(
                    f"`{name}` has shape {tuple(targets.shape)}, expected that of `input_ids`, {tuple(input_ids.shape)}"
                )

        logits = predicted_times = loss = stream_losses = aux_loss = None
        if not (self.training and has_labels):
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits, predicted_times = self._predict(hidden_states[:, keep])
        if has_labels:
            if shift_labels is None:
                shift_labels = nn.functional.pad(labels[:, 1:], (0, 0, 0, 1), value=-100)
            next_times = nn.functional.pad(times[:, 1:], (0, 1)) if times is not None else None
            stream_losses = self._stream_losses(hidden_states, shift_labels, next_times, num_items_in_batch)
            loss = sum(stream_losses)
            if self.training and self.config.num_experts > 0:
                aux_loss = load_balance_loss(outputs.router_probs, class_ids, attention_mask, self.config.num_classes)
                if num_items_in_batch is not None:
                    # a mean over this micro-batch: its share of the whole batch
                    aux_loss = aux_loss * ((shift_labels != -100).sum() / num_items_in_batch)
                loss = loss + self.config.router_aux_loss_coef * aux_loss

        return CMHCADircCausalLMOutput(
            loss=loss,
            logits=logits,
            predicted_times=predicted_times,
            stream_losses=stream_losses,
            aux_loss=aux_loss,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_probs=outputs.router_probs,
        )

    def _predict(self, hidden_states: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None]:
        """Logits of every stream, and the next times where they are regressed."""
        if self.config.time_prediction == "categorical":
            return (self.space_head(hidden_states), self.time_head(hidden_states)), None
        return (self.space_head(hidden_states),), self.time_head(hidden_states)

    def make_decoder(self, past_key_values: Cache, **kwargs) -> "CMHCADircDecoder":
        return CMHCADircDecoder(self, past_key_values)

    def _stream_losses(
        self,
        hidden_states: torch.Tensor,
        targets: torch.LongTensor,
        next_times: torch.Tensor | None,
        num_items_in_batch: torch.Tensor | int | None,
    ) -> tuple[torch.Tensor, ...]:
        """Mean cross entropy of each stream over its targets; smooth L1 over the hits for a regressed time."""
        hidden_states = hidden_states.flatten(0, 1)
        losses = ()
        for stream in range(self.config.num_streams):
            head = self.space_head if stream == 0 else self.time_head
            stream_targets = targets[..., stream].flatten()
            if num_items_in_batch is not None:
                num_targets = num_items_in_batch / self.config.num_streams
            else:
                num_targets = (stream_targets != -100).sum().clamp(min=1)
            total = chunked_linear_cross_entropy(hidden_states, head.weight, head.bias, stream_targets)
            losses += (total / num_targets,)
        if self.config.time_prediction == "regression":
            space_targets = targets[..., 0].flatten()
            is_hit = (space_targets > 0) & (space_targets < self.config.vocab_size - 2)
            predicted = self.time_head(hidden_states[is_hit])
            total = nn.functional.smooth_l1_loss(predicted.float(), next_times.flatten()[is_hit], reduction="sum")
            # without accumulation the mean over hits; else the common divisor, which counts one EOS more per track
            divisor = num_items_in_batch if num_items_in_batch is not None else is_hit.sum().clamp(min=1)
            losses += (total / divisor,)
        return losses

    def generate(self, inputs: torch.Tensor | None = None, *args, kinematics=None, **kwargs):
        """
        The stock `generate()`. `kinematics` may also be a sequence: `(P, Theta)` of one track, or one such per track.
        """
        if kinematics is not None and not isinstance(kinematics, torch.Tensor):
            kinematics = torch.tensor(kinematics, dtype=torch.float32, device=self.device)
            kinematics = kinematics.unsqueeze(0) if kinematics.ndim == 1 else kinematics
        return super().generate(inputs, *args, kinematics=kinematics, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.LongTensor | None = None,
        is_first_iteration: bool | None = False,
        context_length: int | None = None,
        **kwargs,
    ) -> dict:
        """
        As the stock method, plus `context_length`: only the kinematics and the last so many tokens are fed, with
        positions restarting at 0 and without a cache.
        """
        if kwargs.get("use_cache") and not is_first_iteration:
            # the conditioning slots are in the cache
            kwargs["kinematics"] = None
        if context_length is not None:
            if attention_mask is not None and not (attention_mask == 1).all():
                raise ValueError("`context_length` needs prompts without padding")
            attention_mask = None
            slots = self.config.num_conditioning_tokens
            if input_ids.shape[1] - slots > context_length:
                input_ids = torch.cat([input_ids[:, :slots], input_ids[:, -context_length:]], dim=1)
                if kwargs.get("times") is not None:
                    times = kwargs["times"]
                    kwargs["times"] = torch.cat([times[:, :slots], times[:, -context_length:]], dim=1)
            kwargs["position_ids"] = None
        elif kwargs.get("times") is not None and next_sequence_length is not None:
            kwargs["times"] = kwargs["times"][:, -next_sequence_length:]
        return super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        # the last id is drawn but never fed
        longest = self.config.num_conditioning_tokens + self.config.max_position_embeddings + 1
        context_length = model_kwargs.get("context_length")
        if context_length is not None:
            if not 1 <= context_length <= self.config.max_position_embeddings:
                raise ValueError(
                    f"`context_length` is {context_length}, expected 1 to {self.config.max_position_embeddings}"
                )
            # a window whose positions restart slides over the keys, which a cache cannot follow
            generation_config.use_cache = model_kwargs["use_cache"] = False
        elif generation_config.max_length > longest:
            raise ValueError(
                f"the requested length of {generation_config.max_length} positions is beyond the model's {longest} "
                f"(conditioning slots, SOS and `max_position_embeddings` = {self.config.max_position_embeddings} "
                "photons): lower `max_new_tokens` or pass `context_length`"
            )
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)

    def _maybe_initialize_input_ids_for_generation(self, inputs, bos_token_id, model_kwargs):
        input_ids = super()._maybe_initialize_input_ids_for_generation(inputs, bos_token_id, model_kwargs)
        cache = model_kwargs.get("past_key_values")
        starts = cache is None or bool(cache.get_seq_length() == 0)
        check_conditions(
            self.config,
            model_kwargs.get("kinematics"),
            model_kwargs.get("class_ids"),
            input_ids.shape[0],
            needs_kinematics=starts,
        )
        if model_kwargs.get("kinematics") is not None:
            finite = torch.isfinite(model_kwargs["kinematics"]).all(dim=-1)
            if not finite.all():
                row = int((~finite).nonzero()[0, 0])
                raise ValueError(f"`kinematics`: row {row} is {model_kwargs['kinematics'][row].tolist()}")
        if self.config.time_prediction == "regression" and model_kwargs.get("times") is None:
            if inputs is not None and inputs.shape[1] > self.config.num_conditioning_tokens + 1:
                raise ValueError("`times` is missing: a prompt with hits needs their scaled times, (batch, length)")
            model_kwargs["times"] = torch.zeros(input_ids.shape[:2], device=self.device)
        return input_ids

    def _choose_next(self, input_ids, step_scores, logits_processor, outputs, generation_config, state):
        next_tokens, next_values = super()._choose_next(
            input_ids, step_scores, logits_processor, outputs, generation_config, state
        )
        if self.config.time_prediction == "regression":
            next_values["times"] = outputs.predicted_times[:, -1]
        return next_tokens, next_values


class CMHCADircDecoder:
    """
    `CMHCADircForCausalLM.forward` for one more position of an unpadded batch with a cache, written out.

    A step of this network is less work than the calls that make it up. So projections that share an input are one
    here, residuals and scales are left to the matrix products, functions are called instead of modules, and masks and
    attention interfaces are left out. Lives for one call of `generate()`, so the merged weights never age.
    """

    def __init__(self, model: CMHCADircForCausalLM, past_key_values: Cache):
        self.model = model
        self.cache = past_key_values
        config, base = model.config, model.model
        self.norm_shape = (config.hidden_size,)
        # the looking up of a module is slower than a small operation
        self.embeddings = base.embeddings
        self.num_conditioning_tokens = config.num_conditioning_tokens
        self.space_weight = base.embeddings.space.weight
        self.space_position = base.embeddings.space_position.weight
        self.time_position = base.embeddings.time_position.weight
        self.time_weight = base.embeddings.time.weight if config.time_prediction == "categorical" else None
        self.final_norm = self.norm_parameters(base.norm)
        heads = [model.space_head]
        if config.time_prediction == "categorical":
            self.time_head = None
            heads.append(model.time_head)
        else:
            self.time_head = model.time_head
        self.heads = [(head.bias, head.weight.t()) for head in heads]
        self.layers = [CMHCADircDecoderLayer(self, index, layer) for index, layer in enumerate(base.layers)]

    def __call__(
        self,
        input_ids: torch.LongTensor,
        class_ids: torch.LongTensor | None = None,
        times: torch.FloatTensor | None = None,
        **kwargs,
    ) -> SimpleNamespace:
        """Takes the last ids of every row, (batch, 1, streams); the kinematics are in the cache already."""
        position = self.cache.get_seq_length() - self.num_conditioning_tokens
        hidden_states = torch.embedding(self.space_weight, input_ids[:, 0, 0]) + self.space_position[position]
        if self.time_weight is not None:
            time_states = torch.embedding(self.time_weight, input_ids[:, 0, 1])
        else:
            time_states = self.embeddings.time(times[:, -1:].to(hidden_states.dtype))
        time_states = time_states + self.time_position[position]
        for layer in self.layers:
            hidden_states = layer(hidden_states, time_states, class_ids)
        hidden_states = torch.layer_norm(hidden_states, *self.final_norm)
        logits = tuple(torch.addmm(bias, hidden_states, weight) for bias, weight in self.heads)
        predicted_times = None if self.time_head is None else self.time_head(hidden_states.unsqueeze(1))
        # an output of the library takes as long to make as a small matrix product
        return SimpleNamespace(logits=logits, predicted_times=predicted_times)

    def norm_parameters(self, norm: nn.LayerNorm) -> tuple:
        """What `torch.layer_norm` takes after its input."""
        return self.norm_shape, norm.weight, norm.bias, norm.eps


class CMHCADircDecoderLayer:
    """[`CMHCADircLayer`] of a [`CMHCADircDecoder`]."""

    def __init__(self, decoder: CMHCADircDecoder, index: int, layer: CMHCADircLayer):
        self.cache = decoder.cache.layers[index]
        attention = layer.attention
        self.head_dim = attention.head_dim
        self.attention_norm = decoder.norm_parameters(layer.attention_norm)
        # in block 0 the query comes from the time stream
        self.time_norm = None if layer.time_norm is None else decoder.norm_parameters(layer.time_norm)
        self.query_weight = attention.q_proj.weight.t()
        query = () if self.time_norm is not None else (attention.q_proj.weight,)
        self.projection = torch.cat([*query, attention.k_proj.weight, attention.v_proj.weight]).t()
        self.qk_norm = attention.qk_norm
        self.scale = float(attention.logit_scale) if attention.qk_norm else attention.head_dim**-0.5
        # in front of a matrix product that does not look at it
        self.nothing = self.query_weight.new_zeros(())
        self.out_weight, self.out_bias = attention.o_proj.weight.t(), attention.o_proj.bias
        self.mlp_norm = decoder.norm_parameters(layer.mlp_norm)
        self.experts = layer.mlp if layer.has_experts else None
        if self.experts is None:
            fc1, fc2 = layer.mlp.fc1, layer.mlp.fc2
            self.fc1_weight, self.fc1_bias = fc1.weight.t(), fc1.bias
            self.fc2_weight, self.fc2_bias = fc2.weight.t(), fc2.bias
            self.activation = layer.mlp.act_fn
            # written out, the rounding of half precision would spoil the tail
            self.has_gelu = decoder.model.config.hidden_act == "gelu" and fc1.weight.dtype == torch.float32

    def __call__(self, hidden_states: torch.Tensor, time_states: torch.Tensor, class_ids: torch.LongTensor | None):
        hidden_states = self.attend(hidden_states, time_states)
        normed = torch.layer_norm(hidden_states, *self.mlp_norm)
        if self.experts is not None:
            return hidden_states + self.experts(normed.unsqueeze(1), class_ids)[0].squeeze(1)
        hidden_states = hidden_states + self.fc2_bias
        if not self.has_gelu:
            activated = self.activation(torch.addmm(self.fc1_bias, normed, self.fc1_weight))
            return torch.addmm(hidden_states, activated, self.fc2_weight)
        # gelu(x) = (u + u erf(u)) / sqrt(2) with u = x / sqrt(2), the roots in the products: a third of gelu's time
        scaled = torch.addmm(self.fc1_bias, normed, self.fc1_weight, beta=SQRT_HALF, alpha=SQRT_HALF)
        activated = torch.addcmul(scaled, scaled, torch.erf(scaled))
        return torch.addmm(hidden_states, activated, self.fc2_weight, alpha=SQRT_HALF)

    def attend(self, hidden_states: torch.Tensor, time_states: torch.Tensor) -> torch.Tensor:
        """The residual stream, (batch, hidden_size), after the attention of the block."""
        # (query), key and value of all heads: (batch, 2 or 3, heads, head_dim)
        states = torch.mm(torch.layer_norm(hidden_states, *self.attention_norm), self.projection)
        if self.time_norm is not None:
            query = torch.mm(torch.layer_norm(time_states, *self.time_norm), self.query_weight)
            states = torch.cat([query, states], dim=1)
        query_key, value = states.view(len(states), 3, -1, self.head_dim).split_with_sizes((2, 1), dim=1)
        if self.qk_norm:
            query_key = normalize(query_key)
        query, key = query_key.unbind(1)
        keys, values = self.cache.update(key.unsqueeze(2), value.transpose(1, 2))
        # for one query two small products are faster than the fused kernel
        query = query.reshape(-1, 1, self.head_dim)
        scores = torch.baddbmm(self.nothing, query, keys.flatten(0, 1).transpose(1, 2), beta=0, alpha=self.scale)
        output = torch.bmm(scores.softmax(dim=-1), values.flatten(0, 1)).view(hidden_states.shape)
        if self.out_bias is not None:
            hidden_states = hidden_states + self.out_bias
        return torch.addmm(hidden_states, output, self.out_weight)


def load_balance_loss(
    router_probs: tuple[torch.Tensor, ...],
    class_ids: torch.LongTensor,
    attention_mask: torch.Tensor | None,
    num_classes: int,
) -> torch.Tensor:
    """
    Squared distance of the routing weights from an even use of the class's own experts: summed over experts and blocks,
    averaged over the positions that are not padding (arXiv:2505.08736).

    Args:
        router_probs: one (batch, length, num_experts) tensor per block.
        class_ids: (batch,). attention_mask: (batch, length) or `None`.
    """
    batch_size, length, num_experts = router_probs[0].shape
    own = own_experts(class_ids, num_experts, num_classes)
    target = own.float().div(num_experts // num_classes).unsqueeze(1)
    valid = torch.ones(batch_size, length, device=class_ids.device) if attention_mask is None else attention_mask
    valid = valid.to(target.dtype)
    return sum(((target - probs).square().sum(-1) * valid).sum() for probs in router_probs) / valid.sum()


class CMHCADircEncoder(CMHCADircPreTrainedModel):
    """
    What the classifier and the noise filter share: bidirectional attention, dense MLPs, a linear head, and
    `from_pretrained` of a generator.

    A generator with experts is turned into a dense model by averaging all its experts (arXiv:2505.08736).
    """

    use_cls_token: bool

    def __init__(self, config: CMHCADircConfig):
        config = copy.deepcopy(config)
        config.use_cls_token = self.use_cls_token
        config.is_causal = False
        config.use_cache = False
        check_dense(config, type(self).__name__)
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = CMHCADircModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, config=None, state_dict=None, **kwargs):
        if state_dict is None and pretrained_model_name_or_path is not None:
            hub_kwargs = {
                key: kwargs[key]
                for key in ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
                if key in kwargs
            }
            stored = cls.config_class.from_pretrained(pretrained_model_name_or_path, **hub_kwargs)
            if stored.num_experts > 0:
                generator = CMHCADircForCausalLM.from_pretrained(
                    pretrained_model_name_or_path, config=stored, **hub_kwargs
                )
                state_dict = average_experts(generator.state_dict())
                config = copy.deepcopy(generator.config if config is None else config)
                config.num_experts = 0
                for name in [name for name in kwargs if hasattr(config, name)]:
                    setattr(config, name, kwargs.pop(name))
                return super().from_pretrained(None, *args, config=config, state_dict=state_dict, **kwargs)
        return super().from_pretrained(
            pretrained_model_name_or_path, *args, config=config, state_dict=state_dict, **kwargs
        )


def average_experts(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """State dict of a model with experts to that of a dense model: unweighted mean over all experts, no router."""
    experts: dict[str, list[torch.Tensor]] = {}
    dense = {}
    for name, tensor in state_dict.items():
        if ".mlp.experts." in name:
            block, parameter = name.split(".mlp.experts.")
            experts.setdefault(f"{block}.mlp.{parameter.split('.', 1)[1]}", []).append(tensor)
        elif ".mlp.router." not in name:
            dense[name] = tensor
    dense.update({name: torch.stack(tensors).mean(dim=0) for name, tensors in experts.items()})
    return dense


class CMHCADircForSequenceClassification(CMHCADircEncoder):
    """Particle identification: one logit per track, positive for kaons, read from the cls token."""

    use_cls_token = True

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        kinematics: torch.FloatTensor | None = None,
        times: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> SequenceClassifierOutput:
        r"""
        Args:
            labels (`(batch,)`): particle class, 0 pion, 1 kaon (binary cross entropy of the one logit); class index if
                `config.num_labels > 1` (cross entropy).

        Returns `logits` of shape (batch, num_labels). The other arguments are those of [`CMHCADircModel`].
        """
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            kinematics=kinematics,
            times=times,
            return_dict=True,
            **kwargs,
        )
        logits = self.classifier(self.dropout(outputs.last_hidden_state[:, 0]))
        loss = None
        if labels is not None:
            if self.num_labels == 1:
                losses = nn.functional.binary_cross_entropy_with_logits(
                    logits.squeeze(-1).float(), labels.float(), reduction="none"
                )
            else:
                losses = nn.functional.cross_entropy(logits.float(), labels, reduction="none")
            loss = losses.mean() if num_items_in_batch is None else losses.sum() / num_items_in_batch
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class CMHCADircForTokenClassification(CMHCADircEncoder):
    """Noise filter: one logit per hit, positive for dark noise."""

    use_cls_token = False

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        kinematics: torch.FloatTensor | None = None,
        times: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> TokenClassifierOutput:
        r"""
        Args:
            labels (`(batch, length)`): 0 photon, 1 noise, -100 for everything that is not a hit. The loss is the focal
                loss of `config.focal_loss_alpha` and `config.focal_loss_gamma`, averaged over hits.

        Returns `logits` of shape (batch, length, num_labels), slots and SOS included. The other arguments are those of
        [`CMHCADircModel`].
        """
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            kinematics=kinematics,
            times=times,
            return_dict=True,
            **kwargs,
        )
        logits = self.classifier(self.dropout(outputs.last_hidden_state))
        loss = None
        if labels is not None:
            is_hit = labels != -100
            if self.num_labels == 1:
                losses = focal_loss(
                    logits[is_hit].squeeze(-1).float(),
                    labels[is_hit].float(),
                    self.config.focal_loss_alpha,
                    self.config.focal_loss_gamma,
                )
            else:
                losses = nn.functional.cross_entropy(logits[is_hit].float(), labels[is_hit], reduction="none")
            num_hits = is_hit.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
            loss = losses.sum() / num_hits
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


def focal_loss(logits: torch.Tensor, targets: torch.Tensor, alpha: float, gamma: float) -> torch.Tensor:
    """
    Sigmoid focal loss, arXiv:1708.02002 eq. 5, per element: `alpha` weighs targets 1, `1 - alpha` targets 0.

    Args:
        logits, targets: same shape, targets 0 or 1 (float).
    """
    cross_entropy = nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    probability = torch.sigmoid(logits)
    probability_of_target = probability * targets + (1 - probability) * (1 - targets)
    weight = alpha * targets + (1 - alpha) * (1 - targets)
    return weight * (1 - probability_of_target) ** gamma * cross_entropy


def check_dense(config: CMHCADircConfig, class_name: str):
    if config.num_experts > 0:
        raise ValueError(
            f"`num_experts` = {config.num_experts}, but {class_name} has dense MLPs: load a generator with experts by "
            f"`{class_name}.from_pretrained`, which averages them"
        )


__all__ = [
    "CMHCADircPreTrainedModel",
    "CMHCADircModel",
    "CMHCADircForCausalLM",
    "CMHCADircForSequenceClassification",
    "CMHCADircForTokenClassification",
]

# `save_pretrained` then writes this code beside the weights, so that they load anywhere with `trust_remote_code=True`
CMHCADircConfig.register_for_auto_class()
for _auto_class, _model_class in AUTO_CLASSES.items():
    globals()[_model_class].register_for_auto_class(_auto_class)
