"""Configuration of CMHCA-DIRC, the Cherenkov-hit transformer of arXiv:2505.08736."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


@strict
class CMHCADircConfig(PreTrainedConfig):
    r"""
    Configuration of a CMHCA-DIRC model: a decoder over photon hits, each hit a pair of tokens (pixel, arrival time),
    conditioned on the kinematics of the charged track (arXiv:2505.08736).

    A sequence is `[slot per conditioning quantity] [SOS] hit_1 ... hit_n [EOS]`. The slots hold SOS ids which the model
    replaces by embeddings of the kinematics, so that masks, caches and lengths count them like any other position.

    The defaults are the published hpDIRC model (7.9 million parameters).

    Args:
        vocab_size (`int`): size of the space (pixel) vocabulary: SOS = 0, pixels, EOS = `vocab_size - 2`,
            pad = `vocab_size - 1`.
        time_vocab_size (`int`): size of the time vocabulary, with its SOS, EOS and pad at the same places.
        hidden_size (`int`), num_hidden_layers (`int`), intermediate_size (`int`): width, blocks, width of the MLPs.
        num_attention_heads (`int` or one `int` per block).
        max_position_embeddings (`int`): number of positions counted from SOS; the conditioning slots have none.
        attention_dropout (`float` or one `float` per block): dropout of the attention probabilities.
        qk_norm (`bool`): normalise queries and keys and scale by one learned number per block. `False` is plain
            attention scaled by 1 / sqrt(head size).
        conditioning_names (`list[str]`), conditioning_ranges (`list` of `(min, max)`): the kinematic quantities in the
            order of the columns of `kinematics` and the physical range that is mapped to [-1, 1]
            (momentum in GeV/c and polar angle in degrees by default).
        time_prediction (`"categorical"` or `"regression"`): a time vocabulary, or one continuous time per hit,
            scaled to [0, 1]. In regression `input_ids` has one stream and the model takes and predicts `times`.
        time_regression_size (`int`): width of the regression head.
        num_experts (`int`): 0 for dense MLPs, else the number of experts of each block, a multiple of `num_classes`.
        num_classes (`int`): particle species served by the experts; expert e belongs to class
            `e // (num_experts // num_classes)`.
        router_aux_loss_coef (`float`): weight of the load-balance loss in training.
        is_causal (`bool`): `False` makes attention bidirectional (classifier and noise filter).
        use_cls_token (`bool`): put a learned token before the slots (classifier).
        classifier_dropout (`float`): dropout before the classification head (0.2 in the GlueX variant).
        focal_loss_alpha (`float`), focal_loss_gamma (`float`): focal loss of the noise filter.
        embedding_initializer_range (`float`): standard deviation of freshly initialised embedding tables.
        stream_delays (`(int, int)`): delay of the pixel and of the time stream. The published model draws both at once,
            independent of each other given the past; with (0, 1) the time of a hit is drawn after its pixel.

    `num_labels` is 1 by default: one logit, positive for kaons (classifier) or noise (filter).
    """

    model_type = "cmhca_dirc"
    keys_to_ignore_at_inference = ["past_key_values", "stream_losses", "router_probs"]

    vocab_size: int = 6147
    time_vocab_size: int = 5923
    hidden_size: int = 256
    num_hidden_layers: int = 3
    num_attention_heads: int | list[int] | tuple[int, ...] = 8
    intermediate_size: int = 512
    hidden_act: str = "gelu"
    max_position_embeddings: int = 250
    attention_dropout: float | int | list[float | int] | tuple[float | int, ...] = 0.0
    qk_norm: bool = True
    layer_norm_eps: float = 1e-5
    conditioning_names: list[str] | tuple[str, ...] = ("P", "Theta")
    conditioning_ranges: list | tuple = ((0.5, 10.0), (25.0, 160.0))
    time_prediction: str = "categorical"
    time_regression_size: int = 128
    num_experts: int = 0
    num_classes: int = 2
    router_aux_loss_coef: float | int = 1.0
    is_causal: bool = True
    use_cls_token: bool = False
    classifier_dropout: float | int = 0.0
    focal_loss_alpha: float | int = 0.75
    focal_loss_gamma: float | int = 2.0
    embedding_initializer_range: float | int = 1.0
    stream_delays: list[int] | tuple[int, ...] = (0, 0)
    use_cache: bool = True
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs):
        if self.eos_token_id is None:
            self.eos_token_id = self.vocab_size - 2
        if self.pad_token_id is None:
            self.pad_token_id = self.vocab_size - 1
        if kwargs.get("id2label") is None and self.id2label is None:
            kwargs.setdefault("num_labels", 1)
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Cross-field checks, run by `@strict` at construction and at `save_pretrained`."""
        for name, least in (
            ("vocab_size", 4),
            ("time_vocab_size", 4),
            ("hidden_size", 1),
            ("num_hidden_layers", 1),
            ("intermediate_size", 1),
            ("max_position_embeddings", 1),
            ("num_experts", 0),
            ("num_classes", 1),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` is {getattr(self, name)}, expected at least {least}")
        for name in ("num_attention_heads", "attention_dropout"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple)) and len(value) != self.num_hidden_layers:
                raise ValueError(
                    f"`{name}` has {len(value)} entries, expected one per block (`num_hidden_layers` = "
                    f"{self.num_hidden_layers})"
                )
        for layer_idx in range(self.num_hidden_layers):
            heads = self.heads_of_layer(layer_idx)
            if heads < 1:
                raise ValueError(f"`num_attention_heads` of block {layer_idx} is {heads}, expected at least 1")
            if self.hidden_size % heads != 0:
                raise ValueError(
                    f"`hidden_size` = {self.hidden_size} is not a multiple of the {heads} attention heads of block "
                    f"{layer_idx}"
                )
            dropout = self.dropout_of_layer(layer_idx)
            if not 0 <= dropout < 1:
                raise ValueError(f"`attention_dropout` of block {layer_idx} is {dropout}, expected 0 <= p < 1")
        if len(self.conditioning_names) != len(self.conditioning_ranges):
            raise ValueError(
                f"`conditioning_ranges` has {len(self.conditioning_ranges)} entries, expected one per name in "
                f"`conditioning_names` = {list(self.conditioning_names)}"
            )
        for name, limits in zip(self.conditioning_names, self.conditioning_ranges):
            if not isinstance(limits, (list, tuple)) or len(limits) != 2 or not limits[0] < limits[1]:
                raise ValueError(f"`conditioning_ranges` of {name} is {limits}, expected (min, max) with min < max")
        if len(self.stream_delays) != 2 or min(self.stream_delays) != 0:
            raise ValueError(f"`stream_delays` is {list(self.stream_delays)}, expected two delays, the smaller 0")
        if any(self.stream_delays) and self.time_prediction == "regression":
            raise ValueError("`stream_delays` need `time_prediction='categorical'`: a regressed time is no stream")
        if self.time_prediction not in ("categorical", "regression"):
            raise ValueError(f"`time_prediction` is {self.time_prediction!r}, expected 'categorical' or 'regression'")
        if self.num_experts % self.num_classes != 0:
            raise ValueError(
                f"`num_experts` = {self.num_experts} is not a multiple of `num_classes` = {self.num_classes}"
            )

    def heads_of_layer(self, layer_idx: int) -> int:
        heads = self.num_attention_heads
        return heads[layer_idx] if isinstance(heads, (list, tuple)) else heads

    def dropout_of_layer(self, layer_idx: int) -> float:
        dropout = self.attention_dropout
        return dropout[layer_idx] if isinstance(dropout, (list, tuple)) else dropout

    @property
    def num_conditioning_tokens(self) -> int:
        """Positions at the start of every sequence that carry the kinematics."""
        return len(self.conditioning_names)

    # What `MultiStreamGenerationMixin` and the logs of training need to know, one entry per stream.

    @property
    def stream_names(self) -> tuple[str, ...]:
        return ("space", "time")

    @property
    def stream_vocab_sizes(self) -> tuple[int, ...]:
        return (self.vocab_size, self.time_vocab_size)[: self.num_streams]

    @property
    def num_streams(self) -> int:
        return 2 if self.time_prediction == "categorical" else 1

    @property
    def stream_bos_token_ids(self) -> tuple[int, ...]:
        return (0,) * self.num_streams

    @property
    def stream_eos_token_ids(self) -> tuple[int, ...]:
        return tuple(size - 2 for size in self.stream_vocab_sizes)

    @property
    def stream_pad_token_ids(self) -> tuple[int, ...]:
        return tuple(size - 1 for size in self.stream_vocab_sizes)


__all__ = ["CMHCADircConfig"]
