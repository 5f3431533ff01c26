"""What Megatron's optimizer and gradient reduction read on A and B: which are shards, and which ranks sum them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from megatron_cord.model.lora.factors import Factors


def mark_shards(factors: Factors, shard_dim: int, sequence_parallel: bool) -> None:
    """Mark A and B beside a matrix that is split over the tensor-parallel ranks.

    Args:
        factors: of one of its parts.
        shard_dim: 0 for a column-parallel matrix, 1 for a row-parallel one.
        sequence_parallel: whether ranks have tokens of their own, so that they must sum the whole factor's gradient.
    """
    whole, sharded = (factors.lora_A, factors.lora_B) if shard_dim == 0 else (factors.lora_B, factors.lora_A)
    whole.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]
    _mark_shard(sharded, shard_dim)


def mark_expert(factors: Factors, weight: Tensor) -> None:
    """Mark A and B beside a matrix of an expert, which other ranks have not, or have as this rank has it.

    Their gradients are summed over the ranks that have the expert, as those of its weight are; and each counts in the
    gradient's norm, on whatever tensor-parallel rank it is.
    """
    for factor in (factors.lora_A, factors.lora_B):
        factor.allreduce = getattr(weight, "allreduce", True)  # type: ignore[attr-defined]
        _mark_shard(factor, 0)


def _mark_shard(factor: Any, dim: int) -> None:
    factor.tensor_model_parallel = True
    factor.partition_dim = dim
    factor.partition_stride = 1
