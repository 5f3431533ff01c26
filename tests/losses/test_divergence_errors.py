"""What the divergence refuses, and in which words."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from megatron_cord.errors import CordError
from megatron_cord.losses import divergence_from_hidden, divergence_from_logits


def arguments() -> dict[str, Any]:
    """Return valid arguments of ``divergence_from_hidden``, for 3 tokens."""
    return {
        "student_hidden": torch.ones(3, 4),
        "student_weight": torch.ones(8, 4),
        "teacher_hidden": torch.ones(3, 2),
        "teacher_weight": torch.ones(8, 2),
        "target_ids": torch.tensor([0, 1, 2]),
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student_hidden": torch.ones(3, 1, 4)}, r"student_hidden must have 2 dimensions, but has shape \[3, 1, 4\]"),
        ({"teacher_hidden": torch.ones(4, 2)}, "student_hidden has 3 tokens, but teacher_hidden 4"),
        ({"teacher_weight": torch.ones(9, 2)}, "student_weight has 8 rows, but teacher_weight 9"),
        ({"student_weight": torch.ones(8, 5)}, "student_hidden has width 4, but student_weight 5"),
        (
            {"teacher_weight": torch.ones(8, 2).bfloat16()},
            "teacher_hidden is torch.float32, but teacher_weight torch.bfloat16",
        ),
        ({"student_weight": torch.ones(8, 4).int()}, "student_weight must be floating point, but is torch.int32"),
        ({"teacher_hidden": torch.ones(3, 2, device="meta")}, "teacher_hidden is on meta, but target_ids is on cpu"),
        ({"target_ids": torch.tensor([0, 1])}, r"target_ids must have shape \[3\].* has \[2\]"),
        ({"target_ids": torch.tensor([0, 1, 2]).int()}, "target_ids must be int64, but is torch.int32"),
        ({"target_ids": torch.tensor([0, 8, 9])}, r"target_ids\[1\] is 8, outside the vocabulary \[0, 8\)"),
        ({"target_ids": torch.tensor([0, 0, -100])}, r"target_ids\[2\] is -100"),
        ({"vocab_size": 2}, r"target_ids\[2\] is 2, outside the vocabulary \[0, 2\)"),
        ({"vocab_size": 9}, r"vocab_size must lie in \[1, 8\].* is 9"),
        ({"temperature": 0.0}, "temperature must be positive and finite, but is 0.0"),
        ({"temperature": math.nan}, "temperature must be positive and finite, but is nan"),
        (
            {"kind": "reverse"},
            "kind 'reverse' is unknown; choose one of reverse_kl, forward_kl, jsd, topk, forward_topk",
        ),
        (
            {"implementation": "fast"},
            "implementation 'fast' is unknown; choose one of auto, cached_grad, fused, recompute",
        ),
        ({"chunk_tokens": 0}, "chunk_tokens must be at least 1"),
        (
            {"student_hidden": torch.tensor([[1.0] * 4, [1.0] * 4, [math.nan] * 4])},
            "the student's logits of token 2 are NaN or",
        ),
        (
            {"teacher_hidden": torch.tensor([[1.0] * 2, [math.inf] * 2, [1.0] * 2])},
            "the teacher's logits of token 1 are NaN or",
        ),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    """Catches a silent wrong number, or a torch error that does not say which argument or token is at fault."""
    divergence_from_hidden(**arguments())
    with pytest.raises(CordError, match=message):
        divergence_from_hidden(**{**arguments(), **change})


def test_bad_logits_are_named() -> None:
    """Catches logits of two shapes, and a row that is no distribution."""
    logits = torch.zeros(2, 6)
    with pytest.raises(
        CordError, match=r"student_logits \[2, 6\] and teacher_logits \[2, 5\] must have the same shape"
    ):
        divergence_from_logits(logits, logits[:, :5], torch.tensor([0, 1]))
    empty = logits.clone()
    empty[1] = -math.inf
    with pytest.raises(CordError, match="the teacher's logits of token 1 are −inf everywhere"):
        divergence_from_logits(logits, empty, torch.tensor([0, 1]))


def test_nan_can_be_let_through() -> None:
    """Catches NaN that leaks into other tokens, or is hidden as a number, where the caller wants to skip the step."""
    student = torch.zeros(3, 6)
    student[1, 2] = math.nan
    stats = divergence_from_logits(student, torch.zeros(3, 6), torch.tensor([0, 1, 2]), check_finite=False)
    for stat in (stats.kl, stats.entropy, stats.student_logprob):
        assert stat.isnan().tolist() == [False, True, False]
