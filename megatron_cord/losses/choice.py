"""Which implementation of the hidden states' divergence serves a call best.

All of them make the same collectives in the same order, so ranks with different amounts of free memory may choose differently.
"""

from __future__ import annotations

import logging
from functools import cache

import psutil
import torch
from torch import Tensor

from megatron_cord.errors import CordError

logger = logging.getLogger(__name__)

#: The ways to form the hidden states' divergence; "auto" chooses among the others.
IMPLEMENTATIONS = ("auto", "late", "fused", "recompute")

#: Part of the free memory that "late" may take for its buffer, or "fused" for its gradients.
BUFFER_SHARE = 0.25


def chosen_implementation(
    implementation: str, student_hidden: Tensor, student_weight: Tensor, *, has_loss_weights: bool, buffer_itemsize: int
) -> str:
    """The name of an implementation, "auto" resolved.

    Without gradients, recompute: there is nothing to compute again. Else fused, if the weights are promised: it never needs more products than
    late. Else late. What they keep must fit into a part of the free memory, [V/TP, H] and [N, H] in fp32 or [N, V/TP]; if not, recompute.

    Args:
        implementation: one of ``IMPLEMENTATIONS``.
        student_hidden: [N, H].
        student_weight: [V/TP, H].
        has_loss_weights: whether the caller promised the loss's weights.
        buffer_itemsize: bytes of an element of late's buffer.

    Raises:
        CordError: an unknown name, or fused without promised weights.
    """
    if implementation not in IMPLEMENTATIONS:
        raise CordError(f"implementation {implementation!r} is unknown; choose one of {', '.join(IMPLEMENTATIONS)}")
    if implementation == "fused" and not has_loss_weights:
        raise CordError(
            "implementation fused needs loss_weights, the function that turns token scalars into the loss's weights"
        )
    needs_gradient = torch.is_grad_enabled() and (student_hidden.requires_grad or student_weight.requires_grad)
    if not needs_gradient:
        return "recompute"
    if implementation != "auto":
        return implementation
    buffer = student_hidden.shape[0] * student_weight.shape[0] * buffer_itemsize
    kept_by_fused = 4 * (student_hidden.numel() + (student_weight.numel() if student_weight.requires_grad else 0))
    fits = buffer <= BUFFER_SHARE * free_bytes(student_hidden.device)
    if has_loss_weights and kept_by_fused <= BUFFER_SHARE * free_bytes(student_hidden.device):
        _announce("fused", "the loss's weights are promised, and its gradients fit into the free memory")
        return "fused"
    if fits:
        _announce("late", "four products, and its buffer fits into the free memory")
        return "late"
    _announce("recompute", "late's buffer would take too much of the free memory")
    return "recompute"


def free_bytes(device: torch.device) -> int:
    """Memory that can still be allocated on the device: what the driver has left and what torch's allocator holds unused."""
    if device.type != "cuda":
        return psutil.virtual_memory().available
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


@cache
def _announce(choice: str, reason: str) -> None:
    """Says each choice once a process."""
    logger.info("divergence from hidden states: %s (%s)", choice, reason)
