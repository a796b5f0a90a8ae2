"""
Ranger: rectified Adam (arXiv:1908.03265) inside Lookahead (arXiv:1907.08610), which trained the published OmniJet and
SPADE models.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim.radam import radam


class Ranger(torch.optim.Optimizer):
    """
    RAdam with decoupled weight decay; every `k` steps parameters and slow weights meet at slow + alpha (fast - slow).

    `state_dict` holds the slow weights too, so that a resumed run goes on as if it had not stopped. The published
    implementations lose them; states without them load, and the slow weights then begin at the parameters.

    Args:
        params: parameters, or groups of them.
        lr: learning rate.
        betas: decay of the means of the gradient and of its square, from 0 and less than 1.
        eps: added to the root of the mean square.
        weight_decay: p is multiplied by 1 - lr weight_decay in every step.
        alpha: share of the way from the slow to the fast weights, above 0 and at most 1.
        k: steps between two meetings.

    Raises:
        ValueError: naming the argument, its value and what was expected.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.95, 0.999),
        eps: float = 1e-5,
        weight_decay: float = 0.0,
        alpha: float = 0.5,
        k: int = 6,
    ):
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not value >= 0:
                raise ValueError(f"Ranger: {name} is {value}, expected 0 or more")
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"Ranger: betas are {betas}, expected two numbers from 0 and less than 1")
        check_lookahead(alpha, k)
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "alpha": alpha, "k": k}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns what `closure`, which computes the gradients anew, returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in parameters:
                state = self.state[parameter]
                if "step" not in state:
                    state["step"] = torch.tensor(0.0)
                    state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                    state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                if "slow" not in state:
                    state["slow"] = parameter.detach().clone(memory_format=torch.preserve_format)
            states = [self.state[parameter] for parameter in parameters]
            radam(
                parameters,
                [parameter.grad for parameter in parameters],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [state["step"] for state in states],
                decoupled_weight_decay=True,
                has_complex=any(map(torch.is_complex, parameters)),
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
            )
            for parameter, state in zip(parameters, states, strict=True):
                if int(state["step"]) % group["k"] == 0:
                    state["slow"].lerp_(parameter, group["alpha"])
                    parameter.copy_(state["slow"])
        return loss


def check_lookahead(alpha: float = 0.5, k: int = 6) -> None:
    """
    Raises:
        ValueError: a setting of Lookahead is out of its range.
    """
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha <= 1:
        raise ValueError(f"Ranger: alpha is {alpha!r}, expected a number above 0 and at most 1")
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"Ranger: k is {k!r}, expected a whole number from 1")
