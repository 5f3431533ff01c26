"""Keys and values of a batch that is being answered, in buffers of the length that the longest response can reach.

transformers' own cache grows by concatenation, which copies all earlier keys and values for every token; here a token's
are written behind the earlier ones. Simplification: layers with sliding windows are not supported.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


class _Layer(DynamicLayer):  # type: ignore[misc]
    """Keys and values [B, heads, S, D] of one layer; S grows up to the capacity."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self._capacity = capacity
        self._buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append [B, heads, new, D] of each; return all of them, as views."""
        if self._buffers is None:
            self.lazy_initialization(key_states, value_states)
            batch, heads, size = key_states.shape[0], key_states.shape[1], key_states.shape[-1]
            self._buffers = (
                key_states.new_empty(batch, heads, self._capacity, size),
                value_states.new_empty(batch, heads, self._capacity, value_states.shape[-1]),
            )
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        keys, values = self._buffers
        keys[:, :, start:end] = key_states
        values[:, :, start:end] = value_states
        self.keys, self.values = keys[:, :, :end], values[:, :, :end]
        return self.keys, self.values


def key_value_cache(capacity: int) -> Cache:
    """Return a cache for transformers' models that holds `capacity` tokens of each sequence.

    Raises:
        RuntimeError: from torch, when a token more is appended.
    """
    return Cache(layer_class_to_replicate=partial(_Layer, capacity))
