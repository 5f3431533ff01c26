"""Per-token scalars that stand for a part of the vocabulary, for all of it, and for what a loss needs.

``PartialStats`` are eight scalars of a block of columns, of a rank's columns, or of any other part; parts merge in any
order (``shard.merge_stats``), so the whole vocabulary costs one all-gather of eight scalars per token. ``GlobalStats``
are what the whole vocabulary comes to, and all that the gradient of any block of logits needs. ``TokenStats`` are the
public part of them.

Shapes: N tokens, K parts being merged. s and t in the formulas are the student's and the teacher's logits divided by
    the temperature τ; p is the
student's softmax, q the teacher's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenStats:
    """What a loss needs of each token, [N], float32 (float64 for float64 inputs), in nats, equal on all TP ranks."""

    kl: Tensor  #: D_t: KL(student ‖ teacher), or whatever divergence was asked for; differentiable
    entropy: Tensor  #: of the student, differentiable
    student_logprob: Tensor  #: of target_ids, differentiable
    teacher_logprob: Tensor  #: of target_ids, no gradient

    def detach(self) -> TokenStats:
        """Return the same numbers without gradient."""
        kl, entropy, student, teacher = self.kl, self.entropy, self.student_logprob, self.teacher_logprob
        return TokenStats(kl.detach(), entropy.detach(), student.detach(), teacher.detach())


class PartialStats(NamedTuple):
    """Sums over a part of the vocabulary, relative to the part's own maxima; each field [N], stacked [K, N]."""

    student_max: Tensor  #: τ M_s, the largest logit; −inf for a part without mass
    student_sum: Tensor  #: L = Σ e^{s−M_s}
    entropy_sum: Tensor  #: B = Σ e^{s−M_s}(s − M_s)
    divergence_sum: Tensor  #: A; what is summed depends on the divergence
    teacher_max: Tensor  #: τ M_t
    teacher_sum: Tensor  #: T = Σ e^{t−M_t}
    student_target: Tensor  #: τ s_y, the logit; −inf where the part does not hold the target
    teacher_target: Tensor  #: τ t_y


class GlobalStats(NamedTuple):
    """What the whole vocabulary comes to; each field [N].

    A maximum and its log-sum stay apart: added up, they would lose the digits that the gradient needs when the logits
    are far from zero.
    """

    student_max: Tensor
    student_log_sum: Tensor
    teacher_max: Tensor
    teacher_log_sum: Tensor
    divergence: Tensor
    entropy: Tensor
    student_logprob: Tensor
    teacher_logprob: Tensor
    threshold: Tensor  #: the k-th largest of the teacher's logits; 0 for divergences that need none
    inner: Tensor  #: the scalar that the gradient of a two-pass divergence needs; 0 for the others

    def rows(self, rows: slice) -> GlobalStats:
        """Return those of some tokens."""
        return GlobalStats(*(field[rows] for field in self))


def empty_stats(num_tokens: int, *, dtype: torch.dtype, device: torch.device) -> PartialStats:
    """Return the statistics of no column at all: the neutral element of the merge."""
    zero = torch.zeros(num_tokens, dtype=dtype, device=device)
    none = torch.full_like(zero, -torch.inf)
    return PartialStats(none, zero, zero, zero, none, zero, none, none)


def stack_stats(parts: list[PartialStats]) -> PartialStats:
    """Stack K parts with fields [N] into one with fields [K, N]."""
    return PartialStats(*(torch.stack(field) for field in zip(*parts, strict=True)))


def join_stats(parts: list[GlobalStats]) -> GlobalStats:
    """Concatenate the statistics of successive chunks of tokens."""
    return GlobalStats(*(torch.cat(field) for field in zip(*parts, strict=True)))
