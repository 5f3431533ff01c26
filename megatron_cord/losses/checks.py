"""Refusals of impossible arguments, each one line that names the argument and what to do.

The checks look only at what is equal on all tensor-parallel ranks, so all ranks refuse together and none is left
waiting in a collective.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_cord.errors import CordError
from megatron_cord.losses.statistics import GlobalStats


def check_matrix(name: str, tensor: Tensor, device: torch.device) -> None:
    """Refuse all but a two-dimensional floating-point tensor on the device."""
    if tensor.dim() != 2:
        raise CordError(f"{name} must have 2 dimensions, but has shape {list(tensor.shape)}")
    if not tensor.is_floating_point():
        raise CordError(f"{name} must be floating point, but is {tensor.dtype}")
    if tensor.device != device:
        raise CordError(f"{name} is on {tensor.device}, but target_ids is on {device}; move them together")


def check_targets(target_ids: Tensor, num_tokens: int, vocab_size: int, *, values: bool = True) -> None:
    """Refuse all but int64 [N], each in [0, vocab_size); without ``values`` look at type and shape alone."""
    if target_ids.dtype != torch.int64:
        raise CordError(f"target_ids must be int64, but is {target_ids.dtype}")
    if tuple(target_ids.shape) != (num_tokens,):
        raise CordError(
            f"target_ids must have shape [{num_tokens}], one for each token, but has {list(target_ids.shape)}"
        )
    if not values:
        return
    outside = (target_ids < 0) | (target_ids >= vocab_size)
    if outside.any():
        index = first_index(outside)
        raise CordError(f"target_ids[{index}] is {int(target_ids[index])}, outside the vocabulary [0, {vocab_size})")


def check_vocabulary(vocab_size: int | None, padded_size: int) -> int:
    """Return the true vocabulary size: ``vocab_size``, or all columns if it is None."""
    if vocab_size is None:
        return padded_size
    if not 1 <= vocab_size <= padded_size:
        raise CordError(f"vocab_size must lie in [1, {padded_size}], the columns over all ranks, but is {vocab_size}")
    return vocab_size


def check_temperature(temperature: float) -> None:
    """Refuse a temperature that is not positive and finite."""
    if not 0.0 < temperature < float("inf"):
        raise CordError(f"temperature must be positive and finite, but is {temperature}")


def check_distributions(stats: GlobalStats) -> None:
    """Refuse logits that are no distribution: NaN, +inf, or −inf everywhere; the message names the first such token."""
    for model, maximum, log_sum in (
        ("student", stats.student_max, stats.student_log_sum),
        ("teacher", stats.teacher_max, stats.teacher_log_sum),
    ):
        broken = ~(maximum.isfinite() & log_sum.isfinite())
        if broken.any():
            index = first_index(broken)
            problem = "−inf everywhere" if maximum[index] == -torch.inf else "NaN or +inf"
            raise CordError(
                f"the {model}'s logits of token {index} are {problem}; look at its hidden states and output weights"
            )


def check_weight_constants(top_k: int, alpha: float, beta: float) -> None:
    """Refuse constants of CORD's token weights that make no sense."""
    if top_k < 0:
        raise CordError(f"top_k must be at least 0, but is {top_k}")
    if not (alpha > 0 and beta > 0):
        raise CordError(f"alpha and beta must be positive, but are {alpha} and {beta}")


def check_cu_seqlens(cu_seqlens: Tensor, num_tokens: int) -> None:
    """Refuse all but integers [B+1] that start at 0, never fall, and end at N."""
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() == 0 or cu_seqlens.is_floating_point():
        raise CordError(
            "cu_seqlens must be integers of shape [sequences + 1], "
            f"but is {cu_seqlens.dtype} of shape {list(cu_seqlens.shape)}"
        )
    if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != num_tokens or bool((cu_seqlens.diff() < 0).any()):
        raise CordError(
            f"cu_seqlens must rise from 0 to {num_tokens}, the number of tokens, but is {cu_seqlens.tolist()[:20]}"
        )


def first_index(mask: Tensor) -> int:
    """Return the index of the first True of a mask [N]."""
    return int(mask.nonzero()[0])
