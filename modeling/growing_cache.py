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
        length, new_length = self._length, key_states.shape[2]
        total = length + new_length
        is_own = self.keys is self._views[0] and self.values is self._views[1]
        # what was made in inference mode cannot be written to outside
        is_own = is_own and (torch.is_inference_mode_enabled() or not self._buffers[0].is_inference())
        if not is_own or self._buffers[0].shape[2] < total:
            length = self.keys.shape[2] if self.keys.numel() > 0 else 0
            total = length + new_length
            self._buffers = tuple(
                self._grow(states, new_states, length, max(self.minimum_capacity, 2 * total))
                for states, new_states in ((self.keys, key_states), (self.values, value_states))
            )
        key_buffer, value_buffer = self._buffers
        key_buffer.narrow(2, length, new_length).copy_(key_states)
        value_buffer.narrow(2, length, new_length).copy_(value_states)
        self._length = total
        self._views = self.keys, self.values = key_buffer.narrow(2, 0, total), value_buffer.narrow(2, 0, total)
        return self._views

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self._length = 0
        # what `keys` and `values` were left as: whoever crops, selects or repeats rows puts other tensors there
        self._views = self._buffers = (None, None)

    @staticmethod
    def _grow(states: torch.Tensor, new_states: torch.Tensor, length: int, capacity: int) -> torch.Tensor:
        """A buffer for `capacity` positions that begins with the `length` positions of `states`."""
        batch_size, num_heads, _, head_dim = new_states.shape
        buffer = new_states.new_empty(batch_size, num_heads, capacity, head_dim)
        if length > 0:
            buffer[:, :, :length] = states
        return buffer


def growing_cache(cache: DynamicCache) -> DynamicCache:
    """Let an empty `DynamicCache` grow in place; other layer types (sliding windows, recurrent states) stay."""
    if cache.get_seq_length() == 0:
        cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
