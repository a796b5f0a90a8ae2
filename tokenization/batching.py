"""Padding, stacking and reading of batches of ragged sequences with several streams; what tokenizers share."""

from collections.abc import Mapping, Sequence
from numbers import Integral, Number
from typing import Any

import numpy as np
from transformers import BatchEncoding

from .records_dirc import short_repr, to_numpy

IGNORE_INDEX = -100
# Nothing real is near; a larger vocabulary would only fill the memory, as tokenizers list theirs.
MAX_VOCAB_SIZE = 2**24


def padding_strategy(padding: bool | str | None) -> str | None:
    """ "longest", "max_length" or None (no padding) from what transformers accepts for `padding`."""
    if padding is True or padding == "longest":
        return "longest"
    if padding == "max_length":
        return "max_length"
    if padding is False or padding is None or padding == "do_not_pad":
        return None
    raise ValueError(f"padding must be True, False, 'longest', 'max_length' or 'do_not_pad', got {padding!r}")


def check_integer(name: str, value: Any, lowest: int, highest: int | None = None) -> int:
    """`value` as int, or a ValueError that names the argument."""
    in_range = isinstance(value, Integral) and not isinstance(value, bool) and value >= lowest
    if not in_range or highest is not None and value > highest:
        expected = f"an integer of at least {lowest}" if highest is None else f"an integer in {lowest}..{highest}"
        raise ValueError(f"{name} must be {expected}, got {value!r}")
    return int(value)


def check_integers(name: str, values: Any, lowest: int, highest: int | None = None) -> list[int]:
    """`values` as a list of int, or a ValueError that names the argument."""
    if isinstance(values, (str, bytes, Mapping)) or not hasattr(values, "__iter__"):
        raise ValueError(f"{name} must be a list of integers, got {values!r}")
    return [check_integer(name, value, lowest, highest) for value in values]


def check_known(arguments: Mapping[str, Any], known: Sequence[str]):
    """Refuses keyword arguments that nothing reads; None, which transformers passes for what is not set, is none."""
    for name, value in arguments.items():
        if value is not None and name not in known:
            raise ValueError(f"unknown argument {name!r}")


# Arguments of transformers' `batch_decode` that mean nothing for physics quantities.
DECODING_SWITCHES = ("skip_special_tokens", "clean_up_tokenization_spaces")


def check_side(side: str) -> str:
    if side not in ("right", "left"):
        raise ValueError(f"padding_side must be 'right' or 'left', got {side!r}")
    return side


def round_up(width: int, multiple: int | None) -> int:
    """`width`, or the next multiple of `multiple`."""
    if multiple is None:
        return width
    multiple = check_integer("pad_to_multiple_of", multiple, 1)
    return -(-width // multiple) * multiple


def split_rows(flat: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    """Views of the rows that lie end to end in `flat`."""
    ends = np.cumsum(lengths)
    return [flat[a:b] for a, b in zip((ends - lengths).tolist(), ends.tolist(), strict=True)]


def pad_rows(flat: np.ndarray, lengths: np.ndarray, width: int, side: str, fill: Any) -> np.ndarray:
    """Rows that lie end to end in `flat` (sum of lengths, ...), padded by `fill` to (rows, width, ...)."""
    result = np.empty((len(lengths), width, *flat.shape[1:]), dtype=flat.dtype)
    result[...] = fill
    for row, values in zip(result, split_rows(flat, lengths), strict=True):
        row[width - len(values) if side == "left" else 0 :][: len(values)] = values
    return result


def _stack_padded(values, lengths, width, side, fill, dtype, name) -> np.ndarray:
    """Stacks per-position arrays of the given lengths; trailing axes as in the first one."""
    arrays = [to_numpy(value) for value in values]
    tail = arrays[0].shape[1:] if arrays else ()
    result = np.empty((len(arrays), width, *tail), dtype=dtype)
    result[...] = fill
    for index, (array, length) in enumerate(zip(arrays, lengths, strict=True)):
        if array.shape != (length, *tail):
            raise ValueError(
                f"feature {index}: {name} has shape {array.shape}, expected {(length, *tail)} as input_ids"
            )
        if side == "left":
            result[index, width - length :] = array
        else:
            result[index, :length] = array
    return result


def _stack(values: Sequence, name: str) -> Any:
    """Stacks one value per row: numbers become int64 or float32, anything else stays a list."""
    if not values or isinstance(values[0], (str, bytes)) or values[0] is None:
        return list(values)
    arrays = [to_numpy(value) for value in values]
    for index, array in enumerate(arrays):
        if array.shape != arrays[0].shape:
            raise ValueError(
                f"feature {index}: {name} has shape {array.shape}, expected {arrays[0].shape} as the first"
            )
    stacked = np.stack(arrays)
    if stacked.dtype.kind == "f":
        return stacked.astype(np.float32, copy=False)
    return stacked.astype(np.int64, copy=False) if stacked.dtype.kind in "iu" else stacked


def pad_features(
    encoded_inputs: Any,
    pad_ids: Sequence[int],
    float_fills: Mapping[str, float],
    strategy: str | None,
    max_positions: int,
    side: str,
    multiple: int | None,
    return_attention_mask: bool | None,
    return_tensors: str | None,
) -> BatchEncoding:
    """Pads encoded rows to one length and stacks them: the work of a tokenizer's `pad`.

    Args:
        encoded_inputs: list of feature dicts, or a dict of lists. `input_ids` is (length, streams) per row.
        pad_ids: pad id of each stream.
        float_fills: padding value of the float features that have one entry per position.
        strategy: of `padding_strategy`.
        max_positions: array length of "max_length".
        side: "right" or "left".
        multiple: rounds the array length up; unused where `strategy` is None.
        return_attention_mask: False leaves it out.
        return_tensors: None or "np" for numpy, "pt" for torch.

    Returns:
        `BatchEncoding`: `input_ids` int64 (batch, length, streams), `attention_mask`, the features of `float_fills`
        float32 (batch, length), `labels` padded by -100 if they have one entry per position, all else stacked.

    Raises:
        ValueError: a feature is missing, of the wrong shape, or longer than `max_positions`.
    """
    if isinstance(encoded_inputs, Mapping):
        names = list(encoded_inputs)
        batch = {name: list(encoded_inputs[name]) for name in names}
    else:
        features = list(encoded_inputs)
        names = list(features[0]) if features else []
        for index, feature in enumerate(features):
            if set(feature) != set(names):
                odd = sorted(map(str, set(feature) ^ set(names)))[0]
                raise ValueError(f"feature {index}: key {odd} is not in all features of the batch")
        batch = {name: [feature[name] for feature in features] for name in names}
    if "input_ids" not in batch:
        raise ValueError(f"pad: input_ids is missing; the features have {', '.join(map(str, names)) or 'none'}")
    check_side(side)

    num_streams = len(pad_ids)
    ids = []
    for index, value in enumerate(batch["input_ids"]):
        array = to_numpy(value)
        if array.ndim == 1 and num_streams == 1:
            array = array[:, None]
        if array.ndim != 2 or array.shape[1] != num_streams or array.dtype.kind not in "iu":
            raise ValueError(
                f"feature {index}: input_ids must be integers of shape (length, {num_streams}), "
                f"got {array.dtype} {array.shape}"
            )
        ids.append(array)
    lengths = [len(array) for array in ids]
    width = max(lengths, default=0)
    if strategy == "max_length":
        if width > max_positions:
            index = int(np.argmax(np.asarray(lengths) > max_positions))
            raise ValueError(
                f"feature {index}: {lengths[index]} positions, slots included; expected at most {max_positions}"
            )
        width = max_positions
    elif strategy is None and len(set(lengths)) > 1:
        raise ValueError(f"padding=False needs equal lengths, got {min(lengths)} to {max(lengths)}")
    width = round_up(width, multiple if strategy else None)

    data = {"input_ids": _stack_padded(ids, lengths, width, side, pad_ids, np.int64, "input_ids")}
    if return_attention_mask is not False:
        masks = batch.get("attention_mask") or [array[:, 0] != pad_ids[0] for array in ids]
        data["attention_mask"] = _stack_padded(masks, lengths, width, side, 0, np.int64, "attention_mask")
    for name in names:
        if name in ("input_ids", "attention_mask"):
            continue
        values = batch[name]
        if name in float_fills:
            data[name] = _stack_padded(values, lengths, width, side, float_fills[name], np.float32, name)
        elif name == "labels" and values and np.ndim(values[0]) > 0:
            data[name] = _stack_padded(values, lengths, width, side, IGNORE_INDEX, np.int64, name)
        else:
            data[name] = _stack(values, name)
    return as_tensors(data, return_tensors) if return_tensors is not None else BatchEncoding(data)


def as_tensors(data: Mapping[str, Any], return_tensors: Any) -> BatchEncoding:
    """The features as numpy arrays ("np") or torch tensors ("pt").

    Raises:
        ValueError: another kind, or rows that differ in length.
    """
    kind = str(getattr(return_tensors, "value", return_tensors))
    if kind not in ("np", "pt"):
        raise ValueError(f"return_tensors must be 'np' or 'pt', got {return_tensors!r}")
    result = {}
    for name, values in data.items():
        if isinstance(values, list):
            if values and not isinstance(values[0], (np.ndarray, Number)):
                raise ValueError(f"{name} cannot become a tensor, got {short_repr(values[0])}")
            if len({np.shape(value) for value in values}) > 1:
                raise ValueError(f"{name}: rows differ in length; set padding=True to get tensors")
            values = np.stack(values) if values else np.zeros(0, dtype=np.int64)
        if kind == "pt":
            import torch

            values = torch.from_numpy(np.ascontiguousarray(values))
        result[name] = values
    return BatchEncoding(result)


def flatten_ids(sequences: Any, vocab_sizes: Sequence[int], names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Sequences of ids end to end.

    Args:
        sequences: (batch, length, streams) tensor or array, or a list of (length, streams). One stream may come without
            the last axis.
        vocab_sizes, names: of each stream. -100, which marks ignored positions of labels, is accepted too.

    Returns:
        (ids int64 (sum of lengths, streams), lengths int64 (batch,)).

    Raises:
        ValueError: a wrong shape or dtype, or an id outside its vocabulary.
    """
    num_streams = len(vocab_sizes)
    if hasattr(sequences, "detach") or isinstance(sequences, np.ndarray) and sequences.dtype != object:
        sequences = to_numpy(sequences)
        if sequences.ndim == 2 and num_streams == 1:
            sequences = sequences[..., None]
        if sequences.ndim != 3:
            raise ValueError(f"ids must have shape (batch, length, {num_streams}), got {tuple(sequences.shape)}")
    arrays = []
    for index, row in enumerate(sequences):
        array = to_numpy(row)
        if array.ndim == 1 and num_streams == 1:
            array = array[:, None]
        if array.size == 0:
            array = np.zeros((0, num_streams), dtype=np.int64)
        if array.ndim != 2 or array.shape[1] != num_streams or array.dtype.kind not in "iu":
            raise ValueError(
                f"row {index}: ids must be integers of shape (length, {num_streams}), got {array.dtype} {array.shape}"
            )
        arrays.append(array)
    lengths = np.fromiter(map(len, arrays), dtype=np.int64, count=len(arrays))
    flat = np.concatenate(arrays) if arrays else np.zeros((0, num_streams), dtype=np.int64)
    flat = flat.astype(np.int64, copy=False)
    bad = ((flat < 0) | (flat >= np.asarray(vocab_sizes))) & (flat != IGNORE_INDEX)
    if bad.any():
        where, stream = np.argwhere(bad)[0]
        row = int(np.searchsorted(np.cumsum(lengths), where, side="right"))
        raise ValueError(f"row {row}: {names[stream]} id {flat[where, stream]} is outside 0..{vocab_sizes[stream] - 1}")
    return flat, lengths


def flatten_floats(values: Any, lengths: np.ndarray, name: str) -> np.ndarray:
    """One float per position of sequences with the given lengths: float64 (sum of lengths,).

    Raises:
        ValueError: number or lengths of the rows differ from those of the ids.
    """
    arrays = [to_numpy(value).astype(np.float64) for value in values]
    if len(arrays) != len(lengths) or any(array.ndim != 1 for array in arrays):
        raise ValueError(f"{name} must have shape (batch, length) with batch {len(lengths)}")
    if [len(array) for array in arrays] != list(lengths):
        raise ValueError(f"{name} and ids differ in length; expected one per position")
    return np.concatenate(arrays) if arrays else np.empty(0)
