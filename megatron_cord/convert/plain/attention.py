"""The attention of plain models: transformers' own, but for few tokens on a CPU.

A token that is generated has one query; beside its products, torch's kernel takes most of that layer's time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from megatron_cord.model.layers.small_attention import attend, is_small

_NAME = "megatron_cord"
_REPLACED = "sdpa"


def use_small_attention(model: torch.nn.Module) -> None:
    """Let the layers of a model that keep keys and values, and use torch's kernel, take this attention."""
    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if getattr(module, "layer_idx", None) is not None and config._attn_implementation == _REPLACED:
            config._attn_implementation = _NAME


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """Return [B, S, Q, D] of query [B, Q, S, D], and key and value [B, G, K, D], in transformers' interface."""
    queries, keys = query.shape[2], key.shape[2]
    is_mask = attention_mask is None or attention_mask.dtype == torch.bool
    if not is_mask or dropout or not is_small(query, queries, keys):
        found: tuple[Tensor, Tensor | None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **others
        )
        return found
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    q, k, v = (x.permute(2, 0, 1, 3) for x in (query, key, value))
    out = attend(
        q,
        k,
        v,
        is_causal=bool(causal) and queries > 1 and attention_mask is None,
        mask=None if attention_mask is None else attention_mask[..., :keys],
        scale=scaling,
    )
    return out.transpose(0, 1), None
