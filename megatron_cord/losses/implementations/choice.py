"""Which implementation serves a call best: ``objective.implementation``, ``implementation=`` of the public functions.

All of them make the same collectives in the same order, so ranks with different amounts of free memory may choose
differently.
"""

from __future__ import annotations

import logging
from functools import cache

import psutil
import torch
from torch import Tensor

from megatron_cord.errors import CordError

logger = logging.getLogger(__name__)

#: The ways to form the divergence of hidden states; "auto" chooses among the others.
IMPLEMENTATIONS = ("auto", "cached_grad", "fused", "recompute")

#: Share of the free memory that "cached_grad" may take for its buffer, or "fused" for its gradients.
BUFFER_SHARE = 0.25


def choose_implementation(
    implementation: str, student_hidden: Tensor, student_weight: Tensor, *, can_fuse: bool, buffer_itemsize: int
) -> str:
    """Return the name of an implementation, "auto" resolved.

    Without gradients, recompute: there is nothing to compute again. Else fused, where the loss function is known: it
    never needs more products than cached_grad. Else cached_grad. What they keep must fit into a share of the free
    memory, [V/TP, H] and [N, H] in fp32 or [N, V/TP]; if not, recompute.

    Args:
        implementation: one of ``IMPLEMENTATIONS``.
        student_hidden: [N, H].
        student_weight: [V/TP, H].
        can_fuse: whether the loss of a chunk of tokens can be computed in the forward pass.
        buffer_itemsize: bytes of an element of cached_grad's buffer.

    Raises:
        CordError: an unknown name, or fused where it is impossible.
    """
    if implementation not in IMPLEMENTATIONS:
        raise CordError(f"implementation {implementation!r} is unknown; choose one of {', '.join(IMPLEMENTATIONS)}")
    if implementation == "fused" and not can_fuse:
        raise CordError(
            "implementation fused needs the loss of a chunk of whole responses in the forward pass: call "
            "distillation_loss, without context parallelism, or choose cached_grad or recompute"
        )
    needs_gradient = torch.is_grad_enabled() and (student_hidden.requires_grad or student_weight.requires_grad)
    if not needs_gradient:
        return "recompute"
    if implementation != "auto":
        return implementation
    buffer = student_hidden.shape[0] * student_weight.shape[0] * buffer_itemsize
    kept_by_fused = 4 * (student_hidden.numel() + (student_weight.numel() if student_weight.requires_grad else 0))
    limit = BUFFER_SHARE * free_bytes(student_hidden.device)
    if can_fuse and kept_by_fused <= limit:
        _log_once("fused", "the loss is known in the forward pass, and its gradients fit into the free memory")
        return "fused"
    if buffer <= limit:
        _log_once("cached_grad", "four products, and its buffer fits into the free memory")
        return "cached_grad"
    _log_once("recompute", "the buffer of cached_grad would take too much of the free memory")
    return "recompute"


def free_bytes(device: torch.device) -> int:
    """Return the memory that the device has left and what torch's allocator holds unused."""
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


@cache
def _log_once(choice: str, reason: str) -> None:
    """Log each choice once a process."""
    logger.info("divergence from hidden states: %s (%s)", choice, reason)
