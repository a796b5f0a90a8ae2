"""Lion (arXiv:2302.06675), which trained the published OmniLearned models, and their groups of parameters."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

# parts of the OmniLearned models that a fine-tuning trains faster: with other inputs or classes than the pre-training,
# as in the published numbers; and with kinematic inputs too, as in release 0.2.0 of the published code
NEW_LAYERS = ("classifier.out.", "generator.", "model.embed_conditions.", "model.embed_additional.")
NEW_LAYERS_AND_INPUTS = (*NEW_LAYERS, "model.local_embedding.", "model.embed_particles.", "model.interaction.")
NOT_DECAYED = ("norm", "token")


class Lion(torch.optim.Optimizer):
    """
    Steps of one size in the direction of the sign of an average of gradient and momentum, decoupled weight decay:

        p = p (1 - lr weight_decay) - lr sign(beta1 m + (1 - beta1) g);  m = beta2 m + (1 - beta2) g

    Args:
        params: parameters, or groups of them.
        lr: learning rate; about a tenth of that of Adam.
        betas: weight of the momentum in the step, and its decay.
        weight_decay: p is multiplied by 1 - lr weight_decay in every step.

    Raises:
        ValueError: naming the argument, its value and what was expected.
    """

    def __init__(
        self, params: Iterable, lr: float = 5e-5, betas: tuple[float, float] = (0.95, 0.98), weight_decay: float = 0.0
    ):
        for name, value in (("lr", lr), ("weight_decay", weight_decay)):
            if not value >= 0:
                raise ValueError(f"Lion: {name} is {value}, expected 0 or more")
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"Lion: betas are {betas}, expected two numbers from 0 and less than 1")
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns what `closure`, which computes the gradients anew, returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            for parameter in parameters:
                if not self.state[parameter]:
                    self.state[parameter]["momentum"] = torch.zeros_like(parameter)
            gradients = [parameter.grad for parameter in parameters]
            momenta = [self.state[parameter]["momentum"] for parameter in parameters]
            beta1, beta2 = group["betas"]
            directions = torch._foreach_mul(momenta, beta1)
            torch._foreach_add_(directions, gradients, alpha=1 - beta1)
            torch._foreach_sign_(directions)
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(parameters, directions, alpha=-group["lr"])
            torch._foreach_mul_(momenta, beta2)
            torch._foreach_add_(momenta, gradients, alpha=1 - beta2)
        return loss


def parameter_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float,
    new_layers: tuple[str, ...] = NEW_LAYERS,
    lr_factor: float = 1.0,
) -> list[dict[str, Any]]:
    """
    Groups of an optimizer as in the published OmniLearned trainings: norms and tokens do not decay (biases and
    embeddings do), and new layers learn at lr times `lr_factor`.

    Args:
        new_layers: what the names of their parameters begin with.

    Returns at most four groups, decayed before not decayed, old before new, with `names` of their parameters.

    Raises:
        ValueError: if `lr_factor` is not above 0.
    """
    if not lr_factor > 0:
        raise ValueError(f"lr_factor is {lr_factor}, expected above 0")
    groups: dict[tuple[bool, bool], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_new = lr_factor != 1 and name.startswith(new_layers)
            is_free = any(part in name for part in NOT_DECAYED)
            groups.setdefault((is_new, is_free), []).append((name, parameter))
    return [
        {
            "params": [parameter for _, parameter in members],
            "names": [name for name, _ in members],
            "lr": lr * (lr_factor if is_new else 1.0),
            "weight_decay": 0.0 if is_free else weight_decay,
        }
        for (is_new, is_free), members in sorted(groups.items())
    ]
