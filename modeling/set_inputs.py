"""
Checks of what networks of sets (jets and their particles) are given. Each raises ValueError, one line that names the
input, the jet and slot, the value and what was expected; on an accelerator a wrong index would end the process.
"""

import torch


def check_shape(name: str, values, expected: tuple):
    """`expected` sizes; a text stands for any size."""
    text = f"({', '.join(map(str, expected))}{',' * (len(expected) == 1)})"
    if not isinstance(values, torch.Tensor):
        raise ValueError(f"`{name}` is {type(values).__name__}, expected a tensor {text}")
    fits = values.ndim == len(expected) and all(
        isinstance(size, str) or size == found for size, found in zip(expected, values.shape)
    )
    if not fits:
        raise ValueError(f"`{name}` has shape {tuple(values.shape)}, expected {text}")


def check_floating(name: str, values: torch.Tensor):
    if not values.is_floating_point():
        raise ValueError(f"`{name}` is {values.dtype}, expected floating-point numbers")


def check_integers(name: str, values: torch.Tensor):
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise ValueError(f"`{name}` is {values.dtype}, expected integers")


def check_mask(attention_mask, shape: tuple[int, int]) -> torch.BoolTensor:
    """Mask of `shape` (batch, slots), of 0 and 1."""
    check_shape("attention_mask", attention_mask, shape)
    wrong = (attention_mask != 0) & (attention_mask != 1)
    if bool(wrong.any()):
        jet, slot = wrong.nonzero()[0].tolist()
        found = attention_mask[jet, slot].item()
        raise ValueError(f"`attention_mask` of jet {jet}, slot {slot} is {found}, expected 0 or 1")
    return attention_mask.bool()


def check_finite(name: str, values: torch.Tensor, is_real: torch.BoolTensor | None = None):
    """Values (batch, slots, features), by default padding too."""
    broken = ~values.isfinite().all(dim=-1)
    if is_real is not None:
        broken = broken & is_real
    if bool(broken.any()):
        jet, slot = broken.nonzero()[0].tolist()
        raise ValueError(f"`{name}` of jet {jet}, slot {slot} is {values[jet, slot].tolist()}, expected finite numbers")


def check_time(time: torch.Tensor):
    """Times of a flow, (batch,) or a scalar."""
    wrong = ~((time >= 0) & (time <= 1)).reshape(-1)
    if bool(wrong.any()):
        jet = int(wrong.nonzero()[0])
        of_jet = f" of jet {jet}" if time.ndim else ""
        raise ValueError(f"`time`{of_jet} is {time.reshape(-1)[jet].item():g}, expected 0 (data) to 1 (noise)")


def check_labels(name: str, labels, batch_size: int, num_labels: int) -> torch.LongTensor:
    """Class indices (batch,)."""
    if labels is None:
        raise ValueError(f"`{name}` is missing, expected class indices ({batch_size},)")
    check_shape(name, labels, (batch_size,))
    check_integers(name, labels)
    wrong = (labels < 0) | (labels >= num_labels)
    if bool(wrong.any()):
        jet = int(wrong.nonzero()[0])
        raise ValueError(f"`{name}` of jet {jet} is {int(labels[jet])}, expected 0 to {num_labels - 1}")
    return labels.long()
