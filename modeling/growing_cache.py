"""A dynamic cache that does not copy everything it holds at every step."""

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer


class GrowingLayer(DynamicLayer):
    """
    `DynamicLayer` that writes new states into a buffer of doubling capacity instead of concatenating.

    Concatenation moves the whole cache once per generated position, which for a small network and a large batch costs
    more than the attention itself. `keys` and `values` are views of the buffers, so everything else works as before.
    """

    minimum_capacity = 64

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if torch.is_grad_enabled():
            # a backward pass may still need what a buffer held before
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, self._key_buffer = self._append(self.keys, self._key_buffer, key_states)
        self.values, self._value_buffer = self._append(self.values, self._value_buffer, value_states)
        return self.keys, self.values

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self._key_buffer, self._value_buffer = self.keys, self.values

    def _append(
        self, states: torch.Tensor, buffer: torch.Tensor, new_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`states` (batch, heads, length, size) followed by `new_states`, and the buffer that holds both."""
        batch_size, num_heads, new_length, head_dim = new_states.shape
        length = states.shape[2] if states.numel() > 0 else 0
        total = length + new_length
        # cropping leaves a view of the buffer; selecting or repeating rows does not
        is_view = states.data_ptr() == buffer.data_ptr() and buffer.shape[:2] == (batch_size, num_heads)
        # what was made in inference mode cannot be written to outside
        is_view = is_view and (torch.is_inference_mode_enabled() or not buffer.is_inference())
        if not is_view or buffer.shape[2] < total:
            capacity = max(self.minimum_capacity, 2 * total)
            buffer = new_states.new_empty(batch_size, num_heads, capacity, head_dim)
            if length > 0:
                buffer[:, :, :length] = states
        buffer.narrow(2, length, new_length).copy_(new_states)
        return buffer.narrow(2, 0, total), buffer


def growing_cache(cache: DynamicCache) -> DynamicCache:
    """Let an empty `DynamicCache` grow in place; other layer types (sliding windows, recurrent states) stay."""
    if cache.get_seq_length() == 0:
        cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
