"""
EPiC flow matching: the continuous normalising flow of jets of arXiv:2312.00123.

A jet is a set of constituents. Every layer pools them (mean and sum) into a latent vector of the jet, which goes back
to every constituent, so the cost is linear in their number. The network is the velocity that carries Gaussian noise
(time 1) to constituents (time 0).

What is the same for all constituents of a jet (time, latent vector, conditions) is multiplied with its columns of a
weight matrix once per jet and added, instead of being repeated for every constituent.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput, can_return_tuple

from .configuration_epic_fm import EpicFMConfig
from .flow_sampling import FlowMatchingGenerationMixin
from .set_inputs import check_finite, check_floating, check_integers, check_mask, check_shape, check_time

# every class that a saved checkpoint can be opened with
AUTO_CLASSES = {"AutoModel": "EpicFMModel", "AutoModelForPreTraining": "EpicFMForGeneration"}
# in place where the gradient does not need the input
ACTIVATIONS = {
    "leaky_relu": partial(nn.functional.leaky_relu, inplace=True),
    "relu": partial(nn.functional.relu, inplace=True),
    "elu": nn.functional.elu,
    "gelu": nn.functional.gelu,
    "silu": nn.functional.silu,
    "tanh": torch.tanh,
}


@dataclass
class EpicFMModelOutput(ModelOutput):
    """
    Args:
        velocity (`(batch, slots, num_features)`): 0 in empty slots.
        hidden_states (tuple of `(batch, slots, hidden_size)`): constituents after every EPiC layer.
        latent_states (tuple of `(batch, latent_size)`): latent vector of the jet after every EPiC layer.
    """

    velocity: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    latent_states: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class EpicFMGenerationOutput(ModelOutput):
    """
    Args:
        loss (scalar): squared error of the velocity, summed over the features, mean over all constituents of the batch.
        velocity (`(batch, slots, num_features)`): of the network, 0 in empty slots.
        target (`(batch, slots, num_features)`): what it was compared with.
    """

    loss: torch.FloatTensor | None = None
    velocity: torch.FloatTensor | None = None
    target: torch.FloatTensor | None = None


class Parts(NamedTuple):
    """Columns of a weight matrix, by what they multiply, and the bias with the conditions in it."""

    inputs: torch.Tensor  # (out, inputs)
    time: torch.Tensor | None  # (out, time)
    latent: torch.Tensor | None  # (out, latent)
    bias: torch.Tensor  # (out,) or (batch, out)


class EpicFMLinear(nn.Module):
    """
    A linear map of [time, inputs, latent, conditions], of which only the inputs differ between the constituents.

    Args:
        in_features: width of the inputs. time_features, latent_features, condition_features: of the others, or 0.
    """

    def __init__(
        self,
        config: EpicFMConfig,
        in_features: int,
        out_features: int,
        time_features: int = 0,
        latent_features: int = 0,
        condition_features: int = 0,
    ):
        super().__init__()
        self.widths = (time_features, in_features, latent_features, condition_features)
        self.direction = nn.Parameter(torch.empty(out_features, sum(self.widths)))
        # a network without weight normalisation has the direction for its weight
        self.magnitude = nn.Parameter(torch.empty(out_features, 1)) if config.use_weight_norm else None
        self.bias = nn.Parameter(torch.empty(out_features))
        # columns of time that stand in front: those of the input layer can be there twice
        self.time_size = config.time_size

    @property
    def weight(self) -> torch.Tensor:
        """(out, all columns)"""
        if self.magnitude is None:
            return self.direction
        dtype = self.direction.dtype
        at_least_single = torch.promote_types(torch.float32, dtype)
        norm = torch.linalg.vector_norm(self.direction, dim=1, keepdim=True, dtype=at_least_single)
        return self.direction * (self.magnitude / norm).to(dtype)

    def prepare(self, conditions: torch.Tensor | None) -> Parts:
        """What does not depend on time and constituents; `conditions` is (batch, conditions)."""
        time, inputs, latent, condition = self.weight.split(self.widths, dim=1)
        if time.shape[1] > self.time_size:
            time = time.unflatten(1, (-1, self.time_size)).sum(dim=1)
        return Parts(
            inputs=inputs,
            time=time if time.shape[1] else None,
            latent=latent if latent.shape[1] else None,
            bias=torch.addmm(self.bias, conditions, condition.T) if condition.shape[1] else self.bias,
        )


def linear(
    parts: Parts, inputs: torch.Tensor, time_embedding: torch.Tensor, latent: torch.Tensor | None = None
) -> torch.Tensor:
    """
    (batch, out) of `inputs` (batch, in), or (batch, slots, out) of (batch, slots, in).

    Args:
        time_embedding: (time,) or (batch, time). latent: (batch, latent).
    """
    shared = parts.bias
    if parts.time is not None:
        shared = shared + nn.functional.linear(time_embedding, parts.time)
    if parts.latent is not None:
        shared = shared + nn.functional.linear(latent, parts.latent)
    if shared.ndim == 1:
        return nn.functional.linear(inputs, parts.inputs, shared)
    return nn.functional.linear(inputs, parts.inputs).add_(shared.unsqueeze(1) if inputs.ndim == 3 else shared)


class EpicFMTimeEmbedding(nn.Module):
    """
    Flow times (...) to (..., time_size), float32 whatever the precision of the network.

    The frequencies are e^k rounded to float32, whatever the `exp` of the machine makes of them: at k = 31 the last bit
    of a frequency decides about the result. (No buffer: it would follow the network to other precisions.)
    """

    def __init__(self, config: EpicFMConfig):
        super().__init__()
        self.is_cosine = config.time_embedding == "cosine"
        if self.is_cosine:
            self.frequencies = [math.exp(k) for k in range(config.time_size)]
        else:
            self.frequencies = [math.pi * 2.0**j for j in range(config.num_frequencies)]

    def forward(self, time: torch.Tensor) -> torch.Tensor:
        frequencies = torch.tensor(self.frequencies, dtype=torch.float32, device=time.device)
        angles = time.float().unsqueeze(-1) * frequencies
        if self.is_cosine:
            return (angles * math.pi).cos()
        return torch.cat([angles.cos(), angles.sin()], dim=-1)


def pool(
    particles: torch.Tensor, weights: torch.Tensor, inverse_counts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Sum and mean, (batch, size) each, of the constituents (batch, slots, size).

    Args:
        weights (`(batch, 1, slots)`): 1 for constituents. inverse_counts (`(batch, 1)`): of them.
    """
    total = torch.bmm(weights, particles).squeeze(1)
    return total, total * inverse_counts


class EpicFMLayer(GradientCheckpointingLayer):
    """One EPiC layer, arXiv:2301.08128."""

    def __init__(self, config: EpicFMConfig):
        super().__init__()
        size, latent_size = config.hidden_size, config.latent_size
        self.sum_scale = config.sum_scale
        self.activation = ACTIVATIONS[config.hidden_act]
        self.dropout = nn.Dropout(config.dropout)
        of_jet, of_particles = layer_inputs(config)
        self.fc_global1 = EpicFMLinear(config, 2 * size + latent_size, size, **of_jet)
        self.fc_global2 = EpicFMLinear(config, size, latent_size, **of_jet)
        self.fc_local1 = EpicFMLinear(config, size, size, latent_features=latent_size, **of_particles)
        self.fc_local2 = EpicFMLinear(config, size, size, **of_particles)

    def prepare(self, conditions: torch.Tensor | None) -> tuple[Parts, Parts, Parts, Parts]:
        linears = (self.fc_global1, self.fc_global2, self.fc_local1, self.fc_local2)
        return tuple(linear.prepare(conditions) for linear in linears)

    def forward(
        self,
        particles: torch.Tensor,
        latent: torch.Tensor,
        time_embedding: torch.Tensor,
        conditions: torch.Tensor | None,
        weights: torch.Tensor,
        inverse_counts: torch.Tensor,
        prepared: tuple[Parts, Parts, Parts, Parts] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        global1, global2, local1, local2 = self.prepare(conditions) if prepared is None else prepared
        total, mean = pool(particles, weights, inverse_counts)
        pooled = torch.cat([mean, total * self.sum_scale, latent], dim=-1)
        hidden = self.activation(linear(global1, pooled, time_embedding))
        latent = self.dropout(self.activation(linear(global2, hidden, time_embedding) + latent))
        hidden = self.activation(linear(local1, particles, time_embedding, latent))
        particles = self.dropout(self.activation(linear(local2, hidden, time_embedding).add_(particles)))
        return particles, latent


def layer_inputs(config: EpicFMConfig) -> tuple[dict[str, int], dict[str, int]]:
    """Widths of time and conditions in the inputs of the layers of the jet, and of the constituents."""
    of_jet = {
        "time_features": config.time_size if config.time_in_global else 0,
        "condition_features": config.num_conditions if config.global_conditions else 0,
    }
    of_particles = {
        "time_features": config.time_size if config.time_in_local else 0,
        "condition_features": config.num_conditions if config.local_conditions else 0,
    }
    return of_jet, of_particles


class EpicFMPreTrainedModel(PreTrainedModel):
    config: EpicFMConfig
    base_model_prefix = "model"
    main_input_name = "particles"
    supports_gradient_checkpointing = True
    _no_split_modules = ["EpicFMLayer"]

    def save_pretrained(self, save_directory, **kwargs):
        """As `PreTrainedModel.save_pretrained`; the folder opens with every Auto class, not only that of this model."""
        module = __name__.split(".")[-1]
        self.config.auto_map = {auto_class: f"{module}.{name}" for auto_class, name in AUTO_CLASSES.items()}
        super().save_pretrained(save_directory, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """That of the published model: PyTorch's own for linear layers, and the norms of their rows."""
        if isinstance(module, EpicFMLinear):
            bound = 1 / math.sqrt(module.direction.shape[1])
            init.uniform_(module.direction, -bound, bound)
            init.uniform_(module.bias, -bound, bound)
            if module.magnitude is not None:
                init.copy_(module.magnitude, torch.linalg.vector_norm(module.direction, dim=1, keepdim=True))


class EpicFMModel(EpicFMPreTrainedModel):
    """The velocity field: constituents on their way, time and conditions to velocities."""

    def __init__(self, config: EpicFMConfig):
        super().__init__(config)
        size, latent_size = config.hidden_size, config.latent_size
        of_jet, of_particles = layer_inputs(config)
        self.time_embedding = EpicFMTimeEmbedding(config)
        input_time = config.time_size * (config.time_in_input + config.time_in_local)
        self.fc_l1 = EpicFMLinear(config, config.num_features, size, **{**of_particles, "time_features": input_time})
        self.fc_l2 = EpicFMLinear(config, size, size, **of_particles)
        self.fc_g1 = EpicFMLinear(config, 2 * size, size, **of_jet)
        self.fc_g2 = EpicFMLinear(config, size, latent_size, **of_jet)
        self.layers = nn.ModuleList(EpicFMLayer(config) for _ in range(config.num_hidden_layers))
        self.fc_l3 = EpicFMLinear(config, size, config.num_features, **of_particles)
        self.activation = ACTIVATIONS[config.hidden_act]
        self.gradient_checkpointing = False
        self.post_init()

    def encode_conditions(
        self,
        batch_size: int,
        class_ids: torch.LongTensor | None,
        conditions: torch.Tensor | None,
        name: str = "class_ids",
    ) -> torch.Tensor | None:
        """
        What the network sees, (batch, num_conditions), or `None` if it has no conditions.

        Args:
            class_ids (`(batch,)`): -1 for no class. conditions (`(batch, ...)`): those of `condition_names`; without
                `class_ids` the one-hot classes in front of them. name: of `class_ids` in errors.

        Raises:
            ValueError: naming the row and the value.
        """
        config = self.config
        num_others = len(config.condition_names)
        if config.num_conditions == 0:
            for given, values in ((name, class_ids), ("conditions", conditions)):
                if values is not None:
                    raise ValueError(f"`{given}` were given, but the model has no conditions")
            return None
        width = config.num_conditions if class_ids is None else num_others
        if conditions is None and width > 0:
            needed = " and ".join([f"`{name}`"] * (config.num_classes > 0) + ["`conditions`"] * (num_others > 0))
            raise ValueError(f"the model needs {needed}: {config.num_classes} classes, {list(config.condition_names)}")
        parts = []
        if class_ids is not None:
            if config.num_classes == 0:
                raise ValueError(f"`{name}` were given, but the model has no classes")
            check_shape(name, class_ids, (batch_size,))
            check_integers(name, class_ids)
            self._check_rows(
                (class_ids >= -1) & (class_ids < config.num_classes),
                class_ids,
                f"class -1 (none) or 0 to {config.num_classes - 1}",
            )
            classes = torch.arange(config.num_classes, device=class_ids.device)
            parts.append((class_ids.unsqueeze(-1) == classes).to(self.dtype))
        if width > 0:
            without = "" if class_ids is not None or config.num_classes == 0 else f"` without `{name}"
            check_shape(f"conditions{without}", conditions, (batch_size, width))
            self._check_rows(conditions.isfinite().all(dim=-1), conditions, "finite conditions")
            parts.append(conditions.to(self.dtype))
        return torch.cat(parts, dim=-1)

    @staticmethod
    def _check_rows(is_good: torch.Tensor, values: torch.Tensor, expected: str):
        if torch.compiler.is_compiling() or is_good.all():
            return
        row = int((~is_good).nonzero()[0, 0])
        raise ValueError(f"row {row}: {values[row].tolist()}, expected {expected}")

    def check_particles(self, particles: torch.Tensor, attention_mask: torch.Tensor):
        """Raise ValueError for a wrong shape, numbers that are not finite, and jets without constituents."""
        check_shape("particles", particles, ("batch", "slots", self.config.num_features))
        check_floating("particles", particles)
        check_shape("attention_mask", attention_mask, tuple(particles.shape[:2]))
        if 0 in particles.shape:
            raise ValueError(f"`particles` has shape {tuple(particles.shape)}, expected at least one jet and one slot")
        if torch.compiler.is_compiling():
            return
        is_filled = check_mask(attention_mask, tuple(particles.shape[:2])).any(dim=1)
        if not is_filled.all():
            raise ValueError(f"row {int((~is_filled).nonzero()[0])}: no constituents, expected at least 1")
        # in the empty slots too: 0 times NaN is not 0
        check_finite("particles", particles)

    def prepare(self, conditions: torch.Tensor | None, with_layers: bool = True) -> dict[str, Any]:
        """
        Folded weights with the conditions (batch, num_conditions) in them: what does not depend on time. Without those
        of the layers, these fold theirs themselves (in training, where nothing is called twice).
        """
        names = ("fc_l1", "fc_l2", "fc_g1", "fc_g2", "fc_l3")
        prepared: dict[str, Any] = {name: getattr(self, name).prepare(conditions) for name in names}
        prepared["layers"] = [layer.prepare(conditions) if with_layers else None for layer in self.layers]
        return prepared

    def velocity(
        self,
        particles: torch.Tensor,
        time: torch.Tensor,
        attention_mask: torch.Tensor,
        conditions: torch.Tensor | None = None,
        prepared: dict[str, Any] | None = None,
        output_hidden_states: bool = False,
    ) -> EpicFMModelOutput:
        """
        `forward` without checks. With `prepared`, of `prepare`, the conditions are not looked at.

        Args:
            time: scalar or (batch,), float32.
        """
        embedding = self.time_embedding(time).to(self.dtype)
        particles = particles.to(self.dtype)
        weights = attention_mask.to(self.dtype).unsqueeze(1)
        inverse_counts = weights.sum(dim=2, dtype=torch.float32).reciprocal().to(self.dtype)
        prepared = self.prepare(conditions, with_layers=False) if prepared is None else prepared

        particles = self.activation(linear(prepared["fc_l1"], particles, embedding))
        particles = self.activation(linear(prepared["fc_l2"], particles, embedding).add_(particles))
        total, mean = pool(particles, weights, inverse_counts)
        pooled = torch.cat([total * self.config.sum_scale, mean], dim=-1)
        latent = self.activation(linear(prepared["fc_g1"], pooled, embedding))
        latent = self.activation(linear(prepared["fc_g2"], latent, embedding))
        hidden_states, latent_states = [], []
        for layer, parts in zip(self.layers, prepared["layers"]):
            particles, latent = layer(particles, latent, embedding, conditions, weights, inverse_counts, parts)
            hidden_states.append(particles)
            latent_states.append(latent)
        velocity = linear(prepared["fc_l3"], particles, embedding)
        if self.config.output_activation:
            velocity = self.activation(velocity)
        return EpicFMModelOutput(
            velocity=velocity * weights.transpose(1, 2),
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            latent_states=tuple(latent_states) if output_hidden_states else None,
        )

    @can_return_tuple
    def forward(
        self,
        particles: torch.Tensor,
        time: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        class_ids: torch.LongTensor | None = None,
        conditions: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> EpicFMModelOutput:
        r"""
        Args:
            particles (`(batch, slots, num_features)`): on their way from noise to data.
            time (scalar or `(batch,)`): 1 noise, 0 data.
            attention_mask (`(batch, slots)`): 1 for constituents, in any slots; by default all. What stands in the
                other slots goes through the network and reaches nothing else.
            class_ids (`(batch,)`): classes of the jets; -1 for none.
            conditions (`(batch, len(condition_names))`): without `class_ids`, the one-hot classes in front of them,
                (batch, num_conditions).
        """
        if attention_mask is None:
            attention_mask = particles.new_ones(particles.shape[:-1])
        self.check_particles(particles, attention_mask)
        time = torch.as_tensor(time, dtype=torch.float32, device=particles.device)
        if time.ndim > 1 or time.ndim == 1 and len(time) != len(particles):
            raise ValueError(f"`time` has shape {tuple(time.shape)}, expected a scalar or ({len(particles)},)")
        if not torch.compiler.is_compiling():
            check_time(time)
        conditions = self.encode_conditions(len(particles), class_ids, conditions)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        return self.velocity(particles, time, attention_mask, conditions, output_hidden_states=output_hidden_states)


class EpicFMForGeneration(FlowMatchingGenerationMixin, EpicFMPreTrainedModel):
    """
    Jet generator: the loss of flow matching, and `generate`.

    `generate(num_particles=[40, 35], labels=[0, 8], conditions=[[620.0, 0.3], [710.0, -1.1]])` draws one jet per row;
    `EpicFMFeatureExtractor.batch_decode` turns its `particles` into constituents.
    """

    # the loss is a mean over the constituents of the batch, which Trainer cannot count
    accepts_loss_kwargs = False

    def __init__(self, config: EpicFMConfig):
        super().__init__(config)
        self.model = EpicFMModel(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        particles: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        class_ids: torch.LongTensor | None = None,
        conditions: torch.Tensor | None = None,
        time: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        return_loss: bool = True,
        **kwargs,
    ) -> EpicFMGenerationOutput:
        r"""
        Args:
            particles (`(batch, slots, num_features)`): data, as the feature extractor makes them.
            attention_mask (`(batch, slots)`): 1 for constituents; by default all.
            class_ids, conditions: as those of `EpicFMModel`.
            time (`(batch,)`): flow times of the jets; by default uniform in [0, 1).
            noise (`(batch, slots, num_features)`): by default standard normal.
        """
        config = self.config
        if attention_mask is None:
            attention_mask = particles.new_ones(particles.shape[:-1])
        self.model.check_particles(particles, attention_mask)
        batch_size, slots = particles.shape[:2]
        if time is not None:
            check_shape("time", time, (batch_size,))
        if noise is not None:
            check_shape("noise", noise, tuple(particles.shape))
        if not torch.compiler.is_compiling():
            if time is not None:
                check_time(time)
            if noise is not None:
                check_finite("noise", noise)
            # behind the last constituent of the batch nothing is trained
            width = int(attention_mask.bool().any(dim=0).nonzero().max()) + 1
            particles, attention_mask = particles[:, :width], attention_mask[:, :width]
            noise = noise if noise is None else noise[:, :width]
        if time is None:
            time = torch.rand(batch_size, device=particles.device)
        if noise is None:
            noise = torch.randn(particles.shape, device=particles.device)
        if self.training and config.label_dropout > 0:
            if class_ids is None:
                raise ValueError("`label_dropout` needs `class_ids`")
            is_dropped = torch.rand(batch_size, device=particles.device) < config.label_dropout
            class_ids = class_ids.masked_fill(is_dropped, -1)

        particles, noise = particles.float(), noise.float()
        on_the_way, target = self.flow_path(particles, time, noise, attention_mask)
        encoded = self.model.encode_conditions(batch_size, class_ids, conditions)
        velocity = self.model.velocity(on_the_way, time, attention_mask, encoded).velocity.float()
        loss = None
        if return_loss:
            loss = (velocity - target).square().sum() / attention_mask.sum()
        padding = (0, 0, 0, slots - velocity.shape[1])
        return EpicFMGenerationOutput(
            loss=loss, velocity=nn.functional.pad(velocity, padding), target=nn.functional.pad(target, padding)
        )

    def flow_path(
        self, particles: torch.Tensor, time: torch.Tensor, noise: torch.Tensor, attention_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Point and velocity at `time` (batch,) of the straight path from `particles` (time 0) to `noise` (time 1):
        (batch, slots, num_features) each. The point is not masked: empty slots hold noise.
        """
        sigma = self.config.sigma_min
        time = time.float()[:, None, None]
        point = (1 - time) * particles + (sigma + (1 - sigma) * time) * noise
        return point, ((1 - sigma) * noise - particles) * attention_mask.unsqueeze(-1)

    # What `generate` needs.

    def sampling_times(self, num_inference_steps: int) -> torch.Tensor:
        """As published: rounded like float32 numbers of equal distance, which the `"cosine"` embedding can tell."""
        return torch.linspace(1, 0, num_inference_steps + 1)

    def check_sampling_inputs(self, attention_mask, labels=None, conditions=None, **inputs):
        if inputs:
            raise ValueError(f"unknown input {next(iter(inputs))!r}, expected `labels` and `conditions`")
        self.model.encode_conditions(len(attention_mask), labels, conditions, "labels")

    def prepare_sampling(self, labels=None, conditions=None, attention_mask=None) -> dict[str, Any]:
        encoded = self.model.encode_conditions(len(attention_mask), labels, conditions)
        return {"prepared": self.model.prepare(encoded)}

    def velocity(self, x, time, attention_mask, prepared) -> torch.Tensor:
        return self.model.velocity(x, time, attention_mask, prepared=prepared).velocity


__all__ = ["EpicFMPreTrainedModel", "EpicFMModel", "EpicFMForGeneration"]

# `save_pretrained` then writes this code beside the weights, so that they load anywhere with `trust_remote_code=True`
EpicFMConfig.register_for_auto_class()
for _auto_class, _model_class in AUTO_CLASSES.items():
    globals()[_model_class].register_for_auto_class(_auto_class)
