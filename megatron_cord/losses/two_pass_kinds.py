"""The divergences that look at the vocabulary twice, generalised Jensen–Shannon and top-k with a tail, and the choice of a kind by name.

Both need normalised probabilities inside a logarithm, so their sums come after the first collective and cost a second one.
p is the student, q the teacher, δ = log p − log q. Shapes as in ``kinds``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from megatron_cord.errors import CordError
from megatron_cord.losses.kinds import Block, ForwardKL, Kind, NoTeacher, ReverseKL, exponential

if TYPE_CHECKING:
    from megatron_cord.losses.statistics import Statistics, Totals

#: By the name that configuration and the public functions use.
KINDS = ("reverse_kl", "forward_kl", "jsd", "topk")

NO_TEACHER = NoTeacher()


@dataclass(frozen=True)
class DivergenceConfig:
    """What L_tok sums at each token: D_t of the paper, or what takes its place."""

    #: the divergences of losses/kinds.py; or sampled: the reverse KL as a policy gradient of the sampled tokens;
    #: nll: fine-tuning on the responses; none: no L_tok
    kind: Literal["reverse_kl", "forward_kl", "jsd", "topk", "sampled", "nll", "none"] = "reverse_kl"
    beta: float = 0.5  #: of jsd: the teacher's share of the mixture; 0 is the forward, 1 the reverse KL
    k: int = 64  #: of topk: so many of the teacher's likeliest tokens are compared, and all others as one

    def __post_init__(self) -> None:
        if not 0.0 <= self.beta <= 1.0:
            raise CordError(f"beta must lie in [0, 1], but is {self.beta}")
        if self.k < 1:
            raise CordError(f"k must be at least 1, but is {self.k}")

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher's distributions are needed."""
        return self.kind not in ("nll", "none")


def kind_named(name: str, *, beta: float = 0.5, k: int = 64) -> Kind:
    """The divergence of that name; CordError names the choices.

    Args:
        beta: of "jsd", in [0, 1]: the teacher's share in the mixture. As in GKD its ends are the KLs: 0 forward, 1 reverse.
        k: of "topk".
    """
    if name == "reverse_kl" or (name == "jsd" and beta == 1.0):
        return ReverseKL()
    if name == "forward_kl" or (name == "jsd" and beta == 0.0):
        return ForwardKL()
    if name == "jsd":
        if not 0.0 < beta < 1.0:
            raise CordError(f"beta of the jsd must lie in [0, 1], but is {beta}")
        return JensenShannon(beta)
    if name == "topk":
        if k < 1:
            raise CordError(f"k of topk must be at least 1, but is {k}")
        return TopK(k)
    raise CordError(f"divergence kind {name!r} is unknown; choose one of {', '.join(KINDS)}")


class TwoPass:
    """What the first pass sums for these kinds: nothing but the two distributions' normalisation."""

    has_teacher = True

    def block_sum(self, s: Tensor, exp_s: Tensor, t: Tensor, exp_t: Tensor) -> Tensor:
        return torch.zeros_like(s[:, 0])

    def merged_sum(
        self, parts: Statistics, shift_s: Tensor, scale_s: Tensor, shift_t: Tensor, scale_t: Tensor
    ) -> Tensor:
        return parts.divergence_sum

    def value(self, whole: Statistics, log_sum_s: Tensor, log_sum_t: Tensor) -> Tensor:
        return whole.divergence_sum


@dataclass(frozen=True)
class JensenShannon(TwoPass):
    """β Σ q log(q/m) + (1−β) Σ p log(p/m) with m = β q + (1−β) p (GKD, arXiv 2306.13649). Finite always.

    With u = −(1−β) log(m/p) the gradient is p (u − Σ p u), as m's own derivative cancels.
    """

    beta: float
    top = 0
    num_sums = 2

    def second_sums(self, block: Block, threshold: Tensor) -> Tensor:
        share, delta = self._student_share(block)
        log_teacher = torch.logaddexp(
            delta + math.log1p(-self.beta), torch.full_like(delta, math.log(self.beta))
        )  # log(m/q)
        q = exponential(block.log_q)
        teacher_terms = (-self.beta * q * log_teacher).masked_fill(block.log_q == -torch.inf, 0.0)
        return torch.stack([(block.p * share).sum(1), teacher_terms.sum(1)])

    def second_value(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        return sums[0] + sums[1], sums[0]

    def gradient(self, block: Block, totals: Totals, weight: Tensor) -> Tensor:
        share, _ = self._student_share(block)
        return weight[:, None] * block.p * (share - totals.inner[:, None])

    def _student_share(self, block: Block) -> tuple[Tensor, Tensor]:
        """u, 0 where the student has no mass, and δ, 0 where neither has."""
        nowhere = block.log_p == -torch.inf
        delta = (block.log_p - block.log_q).masked_fill(nowhere & (block.log_q == -torch.inf), 0.0)
        u = -(1.0 - self.beta) * torch.logaddexp(
            math.log(self.beta) - delta, torch.full_like(delta, math.log1p(-self.beta))
        )
        return u.masked_fill(nowhere, 0.0), delta


@dataclass(frozen=True)
class TopK(TwoPass):
    """Reverse KL over the teacher's k most probable tokens and a bucket for all others: Σ_K p δ + r_p log(r_p/r_q) ≤ KL.

    The bucket keeps the mass that leaves the support in the loss. K holds every token whose teacher logit is at least the k-th largest, so
    ties at the border are all in, whatever the layout.
    """

    k: int
    num_sums = 3

    @property
    def top(self) -> int:
        return self.k

    def second_sums(self, block: Block, threshold: Tensor) -> Tensor:
        inside = block.teacher >= threshold[:, None]
        terms = (block.p * (block.log_p - block.log_q)).masked_fill(block.log_q == -torch.inf, torch.inf)
        terms = terms.masked_fill((block.log_p == -torch.inf) | ~inside, 0.0)
        return torch.stack(
            [
                terms.sum(1),
                block.p.masked_fill(inside, 0.0).sum(1),
                exponential(block.log_q).masked_fill(inside, 0.0).sum(1),
            ]
        )

    def second_value(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        inside, tail_p, tail_q = sums
        log_ratio = torch.where(tail_p > 0, tail_p.log() - tail_q.log(), 0.0)
        return inside + torch.where(tail_p > 0, tail_p * log_ratio, 0.0), log_ratio

    def gradient(self, block: Block, totals: Totals, weight: Tensor) -> Tensor:
        unused = (weight == 0)[:, None]  # as for the reverse KL
        inside = block.teacher >= totals.threshold[:, None]
        delta = torch.where(inside, block.log_p - block.log_q, totals.inner[:, None])
        delta = (delta - totals.divergence[:, None]).masked_fill((block.log_p == -torch.inf) | unused, 0.0)
        return weight[:, None] * block.p * delta
