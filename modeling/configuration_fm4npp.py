"""Configuration of FM4NPP, state-space models of the spacepoints of a time projection chamber (arXiv:2508.14087)."""

import math
import operator

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

# paper's name: width, size of the state; all have twelve layers
PAPER_SIZES = {"m1": (64, 4), "m2": (128, 8), "m3": (256, 16), "m4": (512, 32), "m5": (1024, 64), "m6": (1536, 96)}
PAPER_LAYERS = 12


@strict
class Fm4nppConfig(PreTrainedConfig):
    r"""
    Configuration of the FM4NPP networks: a stack of Mamba or Mamba-2 blocks over the points of an event, pre-trained to
    predict the nearest neighbours further out, and heads that read the outputs of its blocks.

    The defaults are the published m3 with Mamba-2; [`Fm4nppConfig.from_paper_size`] gives the others.

    Args:
        ssm (`"mamba1"` or `"mamba2"`): which state-space operator.
        hidden_size, num_hidden_layers (`int`): width and number of blocks.
        state_size (`int`): numbers of state per channel.
        conv_kernel (`int`): points that the causal convolution sees.
        expand (`int`): inner channels over width.
        head_dim (`int`): channels that share a decay in Mamba-2.
        time_step_rank (`int`): of the projection to the steps in Mamba-1, by default `hidden_size` / 16 rounded up.
        chunk_size (`int`): points that Mamba-2 computes at once; the result does not depend on it.
        kernel_backend (`"auto"`, `"torch"`, `"numba"` or `"mamba_ssm"`): what computes the operators; all give the
            same.
        hidden_dropout (`float`): on the output of every block.
        layer_norm_eps (`float`): of every normalisation.
        embedding_method (`"add"`, `"concat"` or `"legacy"`): how the energy joins the position; the first two are
            random projections that are never trained.
        position_encoding (`"nerf"`, `"ff"`, `"cpe"` or `"none"`): of (eta, phi, r): octaves of sines, linearly spaced
            frequencies, the sines of a transformer, or the coordinates themselves.

        num_neighbors (`int`): neighbours to predict.
        label_shift (`int`): 1 or 2 compares the prediction at a position with the targets that many positions later
            (published ablations).
        loss_scale (`float`): factor on the pre-training loss.
        loss_reweight (`bool`): weight events by their number of points instead of target numbers equally, with
            loss_bin_edges (`list`): of the numbers of points, ascending; an event outside of them has weight 0, and
            loss_bin_weights (`list`): one per bin.

        use_backbone (`bool`): a head without one reads `block_outputs` only.
        freeze_backbone (`bool`): train the head only, as published; the backbone then stays in evaluation mode.
        head_size, head_attention_heads, head_intermediate_size (`int`), head_dropout (`float`): of the heads.
        num_prototypes (`int`): most tracks that an event can have.
        num_refinement_layers (`int`): of the track-finding head.
        joint_head (`bool`): the track-finding head that also tells the particle and the parameters of every track, and
            the noise. num_pid_classes (`int`): its particles.
        num_attention_layers (`int`): of the point-classification head.
        match_class_cost, match_dice_cost, match_focal_cost (`float`): what a pair of a prototype and a track costs.
        matched_class_weight, unmatched_class_weight, dice_weight, focal_weight (`float`): of the losses.
        track_parameter_weight, pid_weight, noise_weight (`float`): of the further losses of a joint head.
        match_padding (`bool`): as published, the padding of an event is a track too, one without points.
        class_weights (`list`), focal_gamma (`float`): weight of the classes of the points, and exponent of their focal
            loss; by default the plain cross entropy.

        time_step_min, time_step_max, time_step_floor (`float`): range of the steps of a new model.
        zero_initial_biases (`bool`): as published, all biases start at 0, those of the steps included, which then are
            0.69 instead of between `time_step_min` and `time_step_max`.
        mup_initialization (`bool`): scales of B and C that go with the width (Mamba-2).
        published_attention_init (`bool`): the attention of the point-classification head starts from a narrow uniform
            distribution, its norm included.
    """

    model_type = "fm4npp"
    keys_to_ignore_at_inference = [
        "cache_params",
        "block_outputs",
        "last_hidden_state",
        "loss_per_event",
        "loss_terms",
        "joint_loss_terms",
        "auxiliary_class_logits",
        "auxiliary_mask_logits",
        "point_features",
        "prototypes",
    ]

    ssm: str = "mamba2"
    hidden_size: int = 256
    num_hidden_layers: int = 12
    state_size: int = 16
    conv_kernel: int = 4
    expand: int = 2
    head_dim: int = 64
    time_step_rank: int | None = None
    chunk_size: int = 64
    kernel_backend: str = "auto"
    hidden_dropout: float | int = 0.0
    layer_norm_eps: float = 1e-5
    embedding_method: str = "add"
    position_encoding: str = "nerf"

    num_neighbors: int = 30
    label_shift: int = 0
    loss_scale: float | int = 1.0
    loss_reweight: bool = False
    loss_bin_edges: list[int | float] | tuple[int | float, ...] | None = None
    loss_bin_weights: list[int | float] | tuple[int | float, ...] | None = None

    use_backbone: bool = True
    freeze_backbone: bool = True
    head_size: int = 256
    head_attention_heads: int = 4
    head_intermediate_size: int = 512
    head_dropout: float | int = 0.0
    num_prototypes: int = 150
    num_refinement_layers: int = 2
    joint_head: bool = False
    num_pid_classes: int = 5
    num_attention_layers: int = 1
    match_class_cost: float | int = 0.5
    match_dice_cost: float | int = 1.0
    match_focal_cost: float | int = 30.0
    matched_class_weight: float | int = 0.5
    unmatched_class_weight: float | int = 0.1
    dice_weight: float | int = 1.0
    focal_weight: float | int = 30.0
    track_parameter_weight: float | int = 1.0
    pid_weight: float | int = 1.0
    noise_weight: float | int = 1.0
    match_padding: bool = False
    class_weights: list[int | float] | tuple[int | float, ...] | None = None
    focal_gamma: float | int = 0.0

    time_step_min: float = 1e-3
    time_step_max: float | int = 0.1
    time_step_floor: float = 1e-4
    zero_initial_biases: bool = False
    mup_initialization: bool = False
    published_attention_init: bool = False
    use_cache: bool = False

    def __post_init__(self, **kwargs):
        if self.time_step_rank is None:
            self.time_step_rank = math.ceil(self.hidden_size / 16)
        super().__post_init__(**kwargs)

    @classmethod
    def from_paper_size(cls, name: str, ssm: str = "mamba2", **settings) -> "Fm4nppConfig":
        """
        One of the paper's models, `"m1"` to `"m6"`; its parameter counts are those of `ssm="mamba1"`, the released
        checkpoints are Mamba-2 (and their files have other numbers: `pp_nerf_m1` is m3, `m3` m4, `m4` m5, `m5` m6).
        """
        if name not in PAPER_SIZES:
            raise ValueError(f"paper size is {name!r}, expected one of {', '.join(PAPER_SIZES)}")
        hidden_size, state_size = PAPER_SIZES[name]
        sizes = {"hidden_size": hidden_size, "state_size": state_size, "num_hidden_layers": PAPER_LAYERS}
        return cls(**{"ssm": ssm, **sizes, **settings})

    @property
    def paper_size(self) -> str | None:
        """The paper's name for this width, depth and state, if it has one."""
        sizes = (self.hidden_size, self.state_size)
        names = [name for name, paper_sizes in PAPER_SIZES.items() if paper_sizes == sizes]
        return names[0] if names and self.num_hidden_layers == PAPER_LAYERS else None

    @property
    def inner_size(self) -> int:
        return self.expand * self.hidden_size

    @property
    def num_ssm_heads(self) -> int:
        """Heads of Mamba-2: groups of channels with a decay of their own."""
        return self.inner_size // self.head_dim

    @property
    def conv_size(self) -> int:
        """Channels of the causal convolution; in Mamba-2 B and C go through it too."""
        return self.inner_size + (2 * self.state_size if self.ssm == "mamba2" else 0)

    def validate_architecture(self):
        """Cross-field checks, run by `@strict` at construction and at `save_pretrained`."""
        for name, choices in (
            ("ssm", ("mamba1", "mamba2")),
            ("kernel_backend", ("auto", "torch", "numba", "mamba_ssm")),
            ("embedding_method", ("add", "concat", "legacy")),
            ("position_encoding", ("nerf", "ff", "cpe", "none")),
            ("label_shift", (0, 1, 2)),
        ):
            if getattr(self, name) not in choices:
                expected = ", ".join(map(str, choices))
                raise ValueError(f"`{name}` is {getattr(self, name)!r}, expected one of {expected}")
        for name in (
            "hidden_size",
            "num_hidden_layers",
            "state_size",
            "conv_kernel",
            "expand",
            "head_dim",
            "time_step_rank",
            "chunk_size",
            "num_neighbors",
            "head_size",
            "head_attention_heads",
            "head_intermediate_size",
            "num_prototypes",
            "num_pid_classes",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}, expected at least 1")
        for name in ("num_refinement_layers", "num_attention_layers"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` is {getattr(self, name)}, expected at least 0")
        for name in ("hidden_dropout", "head_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}, expected 0 <= p < 1")
        for name in (
            "layer_norm_eps",
            "loss_scale",
            "match_class_cost",
            "match_dice_cost",
            "match_focal_cost",
            "matched_class_weight",
            "unmatched_class_weight",
            "dice_weight",
            "focal_weight",
            "track_parameter_weight",
            "pid_weight",
            "noise_weight",
            "focal_gamma",
            "time_step_floor",
            "loss_bin_weights",
            "class_weights",
        ):
            value = getattr(self, name)
            values = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
            if not all(0 <= number < math.inf for number in values):
                raise ValueError(f"`{name}` is {value}, expected finite numbers of at least 0")
        if self.ssm == "mamba2" and self.inner_size % self.head_dim:
            raise ValueError(
                f"`expand` * `hidden_size` = {self.inner_size} is not a multiple of `head_dim` = {self.head_dim}"
            )
        if self.head_size % self.head_attention_heads:
            raise ValueError(
                f"`head_size` = {self.head_size} is not a multiple of `head_attention_heads` = "
                f"{self.head_attention_heads}"
            )
        if not 0 < self.time_step_min <= self.time_step_max < math.inf:
            raise ValueError(
                f"`time_step_min` is {self.time_step_min} and `time_step_max` {self.time_step_max}, expected ascending "
                f"numbers above 0"
            )
        edges, weights = self.loss_bin_edges, self.loss_bin_weights
        if (edges is None) != (weights is None) or (edges is not None and len(edges) != len(weights) + 1):
            raise ValueError(
                f"`loss_bin_edges` is {edges} and `loss_bin_weights` {weights}, expected one edge more than weights"
            )
        if edges is not None and not (all(map(math.isfinite, edges)) and all(map(operator.lt, edges[:-1], edges[1:]))):
            raise ValueError(f"`loss_bin_edges` is {edges}, expected ascending numbers")
        if self.loss_reweight and edges is None:
            raise ValueError("`loss_reweight` needs `loss_bin_edges` and `loss_bin_weights`")


__all__ = ["Fm4nppConfig"]
