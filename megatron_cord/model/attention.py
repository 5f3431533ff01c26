"""Core attention on torch's scaled_dot_product_attention, for machines with and without CUDA.

It stands where Megatron's layer specification puts DotProductAttention, which materialises the scores. Simplification: padded batches
only, [S, B, heads, D]; causal attention relies on right padding, so that real tokens never see padding.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class SdpaAttention(MegatronModule):
    """softmax(Q Kᵀ / √D) V for this rank's heads; Megatron's interface of a core attention."""

    def __init__(self, config: TransformerConfig, layer_number: int, attn_mask_type: AttnMaskType, attention_type: str, **_: Any) -> None:
        super().__init__(config)
        self.is_causal = attn_mask_type == AttnMaskType.causal

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        /,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any | None = None,
    ) -> Tensor:
        """Attends within each sequence.

        Args:
            query: [S, B, Q/TP, D].
            key, value: [S, B, G/TP, D].
            attention_mask: bool [B, 1, 1, S], True where a key is padding; only read by non-causal attention.

        Returns:
            [S, B, Q/TP · D].
        """
        if attention_bias is not None or packed_seq_params is not None:
            raise ValueError("SdpaAttention takes padded batches without attention bias")
        sequence, batch, heads, _ = query.shape
        repeat = heads // key.shape[2]
        if repeat > 1:
            key, value = key.repeat_interleave(repeat, dim=2), value.repeat_interleave(repeat, dim=2)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [B, Q/TP, S, D]
        mask = None if self.is_causal or attention_mask is None else ~attention_mask
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.is_causal)
        return out.permute(2, 0, 1, 3).reshape(sequence, batch, -1)
