"""Core attention on torch's scaled_dot_product_attention, for machines with and without CUDA.

Short 16-bit sequences on a CPU are `small_attention`'s.

It replaces DotProductAttention in Megatron's layer specification, which materialises the scores and supports neither
packed sequences nor context parallelism. Padded batches are [S, B, heads, D] and rely on right padding: under the
causal mask real tokens never attend to padding. Packed ones are [T, heads, D] with the sequences one after the other;
without a causal mask there is no other kind: transformer-engine, which shares this interface, leaves the rows of padded
queries uninitialised, and 0 · NaN in them would poison the gradients of the matrices around it.
Simplification: under context parallelism keys and values of all ranks are gathered before the scores are formed, and
packed sequences take one kernel call each; transformer-engine does both better.

Legend: S padded length, B sequences, T packed tokens, Q query heads, G key-value heads, D head size, CP ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_cord.model.layers.small_attention import attend, is_small
from megatron_cord.parallel.sequence_sharding import natural_order, zigzag_rows
from megatron_cord.parallel.transfers import to_device


@dataclass
class PackedSequences(PackedSeqParams):  # type: ignore[misc]
    """Megatron's description of packed sequences, with cu_seqlens as numbers: a read from the device would block."""

    cu_seqlens: tuple[int, ...] = ()  #: of the queries
    cu_seqlens_keys: tuple[int, ...] = ()  #: the same where all rows are attended to
    key_rows: Tensor | None = None  #: int64, the rows that are attended to; None for all


def packed_sequences(
    cu_seqlens: tuple[int, ...], device: torch.device, attended: Sequence[int] | None = None
) -> PackedSequences:
    """Describe the sequences [cu_seqlens[i], cu_seqlens[i+1]).

    They may include padding behind the real tokens. Under a causal mask these do not attend to it; otherwise `attended`
    says how many of a sequence's rows are attended to, and where these are not all, the attention needs
    `select_key_rows`.

    Args:
        cu_seqlens: B + 1 numbers.
        device: where the layers read them as tensors: transformer-engine's kernels do on the GPU. Megatron's unfused
            rotary embedding makes numbers of them for each layer, which on the host costs no wait.
        attended: rows of each sequence, from its first on, that are attended to; None for all of them.
    """
    lengths = [end - start for start, end in pairwise(cu_seqlens)]
    keys = lengths if attended is None else list(attended)
    cu_seqlens_keys = tuple(accumulate(keys, initial=0))
    key_rows = None
    if keys != lengths:
        rows = [row for start, count in zip(cu_seqlens, keys, strict=False) for row in range(start, start + count)]
        key_rows = to_device(torch.tensor(rows), device)
    return PackedSequences(
        qkv_format="thd",
        cu_seqlens_q=to_device(torch.tensor(cu_seqlens, dtype=torch.int32), device),
        cu_seqlens_kv=to_device(torch.tensor(cu_seqlens_keys, dtype=torch.int32), device),
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(keys),
        cu_seqlens=cu_seqlens,
        cu_seqlens_keys=cu_seqlens_keys,
        key_rows=key_rows,
    )


def select_key_rows(core_attention: torch.nn.Module) -> None:
    """Give a core attention, `SdpaAttention` or transformer-engine's, the keys and values of `key_rows` alone.

    The others then have neither scores nor gradients, whatever a kernel does with rows between sequences. To
    transformer-engine this is cross-attention: its unfused kernel would mask keys by the numbers of queries otherwise.
    """

    def select(_: torch.nn.Module, arguments: Any, named: dict[str, Any]) -> Any:
        rows = named["packed_seq_params"].key_rows
        if rows is None:
            return None
        query, key, value, *others = arguments
        return (query, key.index_select(0, rows), value.index_select(0, rows), *others), named

    core_attention.register_forward_pre_hook(select, with_kwargs=True)
    modules: Iterable[Any] = core_attention.modules()
    for module in modules:
        if hasattr(module, "attention_type"):
            module.attention_type = "cross"


class SdpaAttention(MegatronModule):  # type: ignore[misc]
    """softmax(Q Kᵀ / √D) V for this rank's heads, or another scale; Megatron's interface of a core attention."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config)
        self.scale = softmax_scale  # None: 1/√D
        self.is_causal = attn_mask_type == AttnMaskType.causal
        self.cp_group = pg_collection.cp if pg_collection is not None and config.context_parallel_size > 1 else None

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
        packed_seq_params: PackedSequences | None = None,
        **_: Any,
    ) -> Tensor:
        """Attend within each sequence.

        Args:
            query: [S/CP, B, Q/TP, D], or [T/CP, Q/TP, D] packed.
            key: the same with G/TP heads; packed and not causal, of the rows that are attended to.
            value: as key.
            attention_mask: of Megatron's interface; not read.
            attn_mask_type: of Megatron's interface; the type given at construction holds.
            attention_bias: of Megatron's interface; must be None.
            packed_seq_params: where the packed sequences begin and end; None for a padded batch.

        Returns:
            [S/CP, B, Q/TP · D], or [T/CP, Q/TP · D] packed.
        """
        if attention_bias is not None:
            raise ValueError("SdpaAttention takes no attention bias")
        if packed_seq_params is not None:
            query, key, value = query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)
            if self.is_causal:
                return self._causal(query, key, value, packed_seq_params.cu_seqlens).squeeze(1)
            queries = _split(query, packed_seq_params.cu_seqlens)
            keys, values = (_split(each, packed_seq_params.cu_seqlens_keys) for each in (key, value))
            pieces = [
                self._attend(q, k, v, None, is_causal=False) for q, k, v in zip(queries, keys, values, strict=True)
            ]
            return torch.cat(pieces).squeeze(1)
        if not self.is_causal:
            raise ValueError("SdpaAttention without a causal mask takes packed sequences")
        ranks = 1 if self.cp_group is None else self.cp_group.size()
        return self._causal(query, key, value, (0, query.shape[0] * ranks))

    def _causal(self, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: tuple[int, ...]) -> Tensor:
        """Return [T/CP, B, Q/TP · D] of sequences that stand one after the other along the first dimension."""
        if self.cp_group is None:
            queries, keys, values = (_split(each, cu_seqlens) for each in (query, key, value))
            pieces = [
                self._attend(q, k, v, None, is_causal=True) for q, k, v in zip(queries, keys, values, strict=True)
            ]
            return torch.cat(pieces) if len(pieces) > 1 else pieces[0]
        ranks, rank = self.cp_group.size(), self.cp_group.rank()
        size = key.shape[-1]
        both = gather_from_sequence_parallel_region(torch.cat([key, value], dim=-1), group=self.cp_group)
        both = both.index_select(0, to_device(natural_order(cu_seqlens, ranks), both.device))
        pieces = []
        for start, end in pairwise(cu_seqlens):
            mine = zigzag_rows((0, end - start), ranks, rank)
            seen = torch.arange(end - start, device=query.device)[None] <= to_device(mine, query.device)[:, None]
            here = query[start // ranks : end // ranks]
            pieces.append(
                self._attend(here, both[start:end, ..., :size], both[start:end, ..., size:], seen, is_causal=False)
            )
        return torch.cat(pieces)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, is_causal: bool) -> Tensor:
        """Return [S, B, heads · D]; mask is True where a key is attended to, broadcast to [B, heads, S, S of keys]."""
        sequence, batch, heads, _ = query.shape
        if mask is None and is_small(query, len(query), len(key)):
            return attend(query, key, value, is_causal=is_causal, scale=self.scale).reshape(sequence, batch, -1)
        repeat = heads // key.shape[2]
        if repeat > 1:
            key, value = key.repeat_interleave(repeat, dim=2), value.repeat_interleave(repeat, dim=2)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [B, heads, S, D]
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=is_causal, scale=self.scale
        )
        return out.permute(2, 0, 1, 3).reshape(sequence, batch, -1)


def _split(rows: Tensor, cu_seqlens: Sequence[int]) -> tuple[Tensor, ...]:
    """Return the sequences that stand one after the other along the first dimension; what follows them is left out.

    A split has one gradient for all parts; slices would each have one as large as the whole, and a sum of them.
    """
    return torch.split(rows[: cu_seqlens[-1]], [end - start for start, end in pairwise(cu_seqlens)])
