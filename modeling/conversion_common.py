"""What the conversions of the reference checkpoints share: renaming parameters, finding settings."""

import math
import re
from typing import Any

import torch

Patterns = tuple[tuple[str, str], ...]
PREFIXES = ("module.", "_orig_mod.")


def strip_prefixes(name: str) -> str:
    """Remove what DataParallel, DDP and `torch.compile` put before parameter names."""
    while name.startswith(PREFIXES):
        for prefix in PREFIXES:
            name = name.removeprefix(prefix)
    return name


def convert_key(name: str, patterns: Patterns) -> str | None:
    """Name of a reference parameter in the hepzoo model, `None` if the reference has no such parameter."""
    name = strip_prefixes(name)
    for pattern, replacement in patterns:
        match = re.fullmatch(pattern, name)
        if match is not None:
            return match.expand(replacement)
    return None


def convert_state_dict(state_dict: dict[str, torch.Tensor], patterns: Patterns) -> dict[str, torch.Tensor]:
    """
    Rename the parameters of a reference checkpoint.

    Args:
        patterns: (regular expression of the reference's name, name here), tried in this order.

    Raises:
        ValueError: listing the names that the reference model does not have, or that meet under one new name.
    """
    converted: dict[str, torch.Tensor] = {}
    unknown, repeated = [], []
    for name, tensor in state_dict.items():
        new_name = convert_key(name, patterns)
        if new_name is None:
            unknown.append(name)
        elif new_name in converted:
            repeated.append(name)
        else:
            converted[new_name] = tensor
    if unknown:
        raise ValueError(f"checkpoint has unknown parameters: {', '.join(sorted(unknown))}")
    if repeated:
        raise ValueError(f"checkpoint has parameters twice, with and without prefix: {', '.join(sorted(repeated))}")
    return converted


def find_setting(reference_config: dict[str, Any], *names: str) -> Any:
    """First value found under one of the names, at any depth of the reference's JSON configuration, else `None`."""
    for name in names:
        queue, seen = [reference_config], {id(reference_config)}
        while queue:
            level = queue.pop(0)
            if level.get(name) is not None:
                return level[name]
            for value in level.values():
                # aliases of YAML can repeat a level, or contain it
                if isinstance(value, dict) and id(value) not in seen:
                    seen.add(id(value))
                    queue.append(value)
    return None


def find_number(reference_config: dict[str, Any], *names: str) -> float | None:
    """As `find_setting`, for one finite number."""
    value = find_setting(reference_config, *names)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"configuration says {names[0]} = {value!r}, expected a finite number")
    return float(value)


def check_matrices(state_dict: dict[str, torch.Tensor], *names: str):
    for name in names:
        if state_dict[name].ndim != 2 or state_dict[name].numel() == 0:
            raise ValueError(f"{name} has shape {tuple(state_dict[name].shape)}, expected a matrix")
