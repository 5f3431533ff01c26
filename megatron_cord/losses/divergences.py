"""The divergences: what each sums over the vocabulary, how its sums merge, and its gradient.

Reverse KL is what CORD trains with, D_t of the paper: Σ p log(p/q), p the student, q the teacher. Forward KL, Σ q
log(q/p), is the usual distillation loss. Both fit in the eight scalars of ``PartialStats`` and need one collective.
Generalised Jensen–Shannon and both KLs over the top k with a tail have normalised probabilities inside a logarithm:
their sums come in a second pass and cost a second collective.

Shapes: N tokens, K parts being merged; a block of logits s, t is [N, columns], relative to its own row maxima. δ = log
    p − log q.
To add one: a class here, its name in ``DivergenceConfig`` and ``make_divergence``, and its code in
``kernels/triton_kernels.py``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from megatron_cord.errors import CordError
from megatron_cord.losses.statistics import GlobalStats, PartialStats

#: By the name that configuration and the public functions use.
KINDS = ("reverse_kl", "forward_kl", "jsd", "topk", "forward_topk")


@dataclass(frozen=True)
class DivergenceConfig:
    """What L_tok sums at each token: D_t of the paper, or what takes its place."""

    #: reverse_kl, forward_kl, jsd, topk (a reverse KL) and forward_topk compare whole distributions; sampled is the
    #: reverse KL as a policy gradient of the sampled tokens; one_sided raises those that the teacher finds likelier
    #: (OPOD); nll is fine-tuning on the responses; none leaves L_seq alone
    kind: Literal[
        "reverse_kl", "forward_kl", "jsd", "topk", "forward_topk", "sampled", "one_sided", "nll", "none"
    ] = "reverse_kl"  # fmt: skip
    beta: float = 0.5  #: of jsd: the teacher's share of the mixture; 0 is the forward, 1 the reverse KL
    #: of topk and forward_topk: so many of the teacher's likeliest tokens are compared, and all others as one
    k: int = 64

    def __post_init__(self) -> None:
        if not 0.0 <= self.beta <= 1.0:
            raise CordError(f"beta must lie in [0, 1], but is {self.beta}")
        if self.k < 1:
            raise CordError(f"k must be at least 1, but is {self.k}")

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher's distributions are needed."""
        return self.kind not in ("nll", "none")

    @property
    def summed(self) -> str:
        """What is summed over the vocabulary, if only as a metric: one of ``KINDS`` where a teacher is compared."""
        return self.kind if self.kind in KINDS else "reverse_kl"


class Block(NamedTuple):
    """A block of columns, normalised over the whole vocabulary; each field [N, columns]."""

    log_p: Tensor  #: of the student
    p: Tensor
    log_q: Tensor  #: of the teacher
    teacher: Tensor  #: its logits as they came


@dataclass(frozen=True)
class Divergence:
    """What all divergences have, with the defaults of those that need a single pass over the vocabulary.

    ``shift`` = m − M is the distance of a part's maximum from the common one, ``scale`` = exp(shift), both [K, N].
    """

    @property
    def has_teacher(self) -> bool:
        """Whether a teacher is compared; if not, the student's own logits stand in for the teacher's."""
        return True

    @property
    def top(self) -> int:
        """How many of the teacher's largest logits must be known."""
        return 0

    @property
    def num_sums(self) -> int:
        """How many scalars a second pass sums up; 0 if the first pass is enough."""
        return 0

    def block_sum(self, s: Tensor, exp_s: Tensor, t: Tensor, exp_t: Tensor) -> Tensor:
        """Return A over the columns of a block, [N]; here: nothing is summed in the first pass."""
        return torch.zeros_like(s[:, 0])

    def merged_sum(
        self, parts: PartialStats, shift_s: Tensor, scale_s: Tensor, shift_t: Tensor, scale_t: Tensor
    ) -> Tensor:
        """Return each part's A relative to the common maxima, [K, N]."""
        return parts.divergence_sum

    def value(self, whole: PartialStats, log_sum_s: Tensor, log_sum_t: Tensor) -> Tensor:
        """Return the divergence, [N]; of a two-pass divergence a placeholder of zeros."""
        return whole.divergence_sum

    def second_sums(self, block: Block, threshold: Tensor) -> Tensor:
        """Return what the second pass sums up over the columns of a block, [num_sums, N]."""
        return block.p.new_zeros(0, block.p.shape[0])

    def second_value(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        """Return the divergence and the scalar that its gradient needs, each [N], from sums over the vocabulary."""
        raise NotImplementedError("the first pass gives this divergence")

    def gradient(self, block: Block, stats: GlobalStats, weight: Tensor) -> Tensor:
        """Return weight · ∂divergence/∂s, [N, columns], with s the student's logits over the temperature."""
        raise NotImplementedError


class ReverseKL(Divergence):
    """Σ p log(p/q) = A/L − log L + log T with A = Σ e^{s−M_s}[(s−M_s) − (t−M_t)]; its gradient is p (δ − KL)."""

    def block_sum(self, s: Tensor, exp_s: Tensor, t: Tensor, exp_t: Tensor) -> Tensor:
        """Return Σ e^s (s − t)."""
        return _weighted_difference(exp_s, s, t)

    def merged_sum(
        self, parts: PartialStats, shift_s: Tensor, scale_s: Tensor, shift_t: Tensor, scale_t: Tensor
    ) -> Tensor:
        """Return e^{d_s} (a + l (d_s − d_t))."""
        merged = scale_s * (parts.divergence_sum + parts.student_sum * (shift_s - shift_t))
        return torch.where(parts.divergence_sum == torch.inf, torch.inf, merged)  # 0 · inf, when the scale underflows

    def value(self, whole: PartialStats, log_sum_s: Tensor, log_sum_t: Tensor) -> Tensor:
        """Return A/L − log L + log T."""
        return whole.divergence_sum / whole.student_sum - log_sum_s + log_sum_t

    def gradient(self, block: Block, stats: GlobalStats, weight: Tensor) -> Tensor:
        """Return weight · p (δ − KL)."""
        unused = weight == 0  # such a row must not turn an infinite divergence into NaN
        delta = (block.log_p - block.log_q).masked_fill((block.log_p == -torch.inf) | unused[:, None], 0.0)
        return weight[:, None] * block.p * (delta - stats.divergence.masked_fill(unused, 0.0)[:, None])


class ForwardKL(Divergence):
    """Σ q log(q/p) = A/T − log T + log L with A = Σ e^{t−M_t}[(t−M_t) − (s−M_s)]; its gradient is p − q."""

    def block_sum(self, s: Tensor, exp_s: Tensor, t: Tensor, exp_t: Tensor) -> Tensor:
        """Return Σ e^t (t − s)."""
        return _weighted_difference(exp_t, t, s)

    def merged_sum(
        self, parts: PartialStats, shift_s: Tensor, scale_s: Tensor, shift_t: Tensor, scale_t: Tensor
    ) -> Tensor:
        """Return e^{d_t} (a + l (d_t − d_s))."""
        merged = scale_t * (parts.divergence_sum + parts.teacher_sum * (shift_t - shift_s))
        return torch.where(parts.divergence_sum == torch.inf, torch.inf, merged)

    def value(self, whole: PartialStats, log_sum_s: Tensor, log_sum_t: Tensor) -> Tensor:
        """Return A/T − log T + log L."""
        return whole.divergence_sum / whole.teacher_sum - log_sum_t + log_sum_s

    def gradient(self, block: Block, stats: GlobalStats, weight: Tensor) -> Tensor:
        """Return weight · (p − q)."""
        return weight[:, None] * (block.p - exponential(block.log_q))


class NoTeacher(Divergence):
    """No divergence at all: entropy and log-probability of the student alone."""

    @property
    def has_teacher(self) -> bool:
        """Whether a teacher is compared."""
        return False

    def gradient(self, block: Block, stats: GlobalStats, weight: Tensor) -> Tensor:
        """Return zeros."""
        return torch.zeros_like(block.p)


@dataclass(frozen=True)
class JensenShannon(Divergence):
    """β Σ q log(q/m) + (1−β) Σ p log(p/m) with m = β q + (1−β) p (GKD, arXiv 2306.13649). Finite always.

    With u = −(1−β) log(m/p) the gradient is p (u − Σ p u), as m's own derivative cancels.
    """

    beta: float

    @property
    def num_sums(self) -> int:
        """Σ p u, and the teacher's term."""
        return 2

    def second_sums(self, block: Block, threshold: Tensor) -> Tensor:
        """Return Σ p u and β Σ q log(q/m)."""
        share, delta = self._student_share(block)
        log_teacher = torch.logaddexp(
            delta + math.log1p(-self.beta), torch.full_like(delta, math.log(self.beta))
        )  # log(m/q)
        q = exponential(block.log_q)
        teacher_terms = (-self.beta * q * log_teacher).masked_fill(block.log_q == -torch.inf, 0.0)
        return torch.stack([(block.p * share).sum(1), teacher_terms.sum(1)])

    def second_value(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sum of both terms, and Σ p u."""
        return sums[0] + sums[1], sums[0]

    def gradient(self, block: Block, stats: GlobalStats, weight: Tensor) -> Tensor:
        """Return weight · p (u − Σ p u)."""
        share, _ = self._student_share(block)
        return weight[:, None] * block.p * (share - stats.inner[:, None])

    def _student_share(self, block: Block) -> tuple[Tensor, Tensor]:
        """Return u, 0 where the student has no mass, and δ, 0 where neither has."""
        nowhere = block.log_p == -torch.inf
        delta = (block.log_p - block.log_q).masked_fill(nowhere & (block.log_q == -torch.inf), 0.0)
        u = -(1.0 - self.beta) * torch.logaddexp(
            math.log(self.beta) - delta, torch.full_like(delta, math.log1p(-self.beta))
        )
        return u.masked_fill(nowhere, 0.0), delta


@dataclass(frozen=True)
class TopK(Divergence):
    """Reverse KL over the teacher's k likeliest tokens and a bucket for all others: Σ_K p δ + r_p log(r_p/r_q) ≤ KL.

    The bucket keeps the mass that leaves the support in the loss. K holds every token whose teacher logit is at least
    the k-th largest, so ties at the limit are all in, whatever the layout.
    """

    k: int

    @property
    def top(self) -> int:
        """The k-th largest logit is the threshold."""
        return self.k

    @property
    def num_sums(self) -> int:
        """Σ_K p δ, r_p and r_q."""
        return 3

    def second_sums(self, block: Block, threshold: Tensor) -> Tensor:
        """Return Σ_K p δ, and the student's and the teacher's mass outside K."""
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
        """Return Σ_K p δ + r_p log(r_p/r_q), and log(r_p/r_q)."""
        inside, tail_p, tail_q = sums
        log_ratio = torch.where(tail_p > 0, tail_p.log() - tail_q.log(), 0.0)
        return inside + torch.where(tail_p > 0, tail_p * log_ratio, 0.0), log_ratio

    def gradient(self, block: Block, stats: GlobalStats, weight: Tensor) -> Tensor:
        """Return weight · p (δ − L) inside K, weight · p (log(r_p/r_q) − L) outside."""
        unused = (weight == 0)[:, None]  # as for the reverse KL
        inside = block.teacher >= stats.threshold[:, None]
        delta = torch.where(inside, block.log_p - block.log_q, stats.inner[:, None])
        delta = (delta - stats.divergence[:, None]).masked_fill((block.log_p == -torch.inf) | unused, 0.0)
        return weight[:, None] * block.p * delta


@dataclass(frozen=True)
class ForwardTopK(TopK):
    """Forward KL over the same tokens and bucket: Σ_K q log(q/p) + r_q log(r_q/r_p) ≤ KL(q‖p)."""

    def second_sums(self, block: Block, threshold: Tensor) -> Tensor:
        """Return Σ_K q log(q/p), and the student's and the teacher's mass outside K."""
        inside, q = block.teacher >= threshold[:, None], exponential(block.log_q)
        terms = (q * (block.log_q - block.log_p)).masked_fill(block.log_p == -torch.inf, torch.inf)
        terms = terms.masked_fill((block.log_q == -torch.inf) | ~inside, 0.0)
        return torch.stack([terms.sum(1), block.p.masked_fill(inside, 0.0).sum(1), q.masked_fill(inside, 0.0).sum(1)])

    def second_value(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        """Return Σ_K q log(q/p) + r_q log(r_q/r_p), and 1 − r_q/r_p."""
        inside, tail_p, tail_q = sums
        tail = torch.where(tail_q > 0, tail_q * (tail_q.log() - tail_p.log()), 0.0)
        return inside + tail, torch.where(tail_p > 0, 1.0 - tail_q / tail_p, 0.0)

    def gradient(self, block: Block, stats: GlobalStats, weight: Tensor) -> Tensor:
        """Return weight · (p − q) inside K, weight · p (1 − r_q/r_p) outside."""
        inside = block.teacher >= stats.threshold[:, None]
        outer = block.p * stats.inner[:, None]
        return weight[:, None] * torch.where(inside, block.p - exponential(block.log_q), outer)


NO_TEACHER = NoTeacher()


def make_divergence(kind: str, *, beta: float = 0.5, k: int = 64) -> Divergence:
    """Return the divergence of that name; CordError names the choices.

    Args:
        kind: one of ``KINDS``.
        beta: of "jsd", in [0, 1]: the teacher's share in the mixture. As in GKD its ends are the KLs: 0 forward, 1
            reverse.
        k: of "topk" and "forward_topk".
    """
    if kind == "reverse_kl" or (kind == "jsd" and beta == 1.0):
        return ReverseKL()
    if kind == "forward_kl" or (kind == "jsd" and beta == 0.0):
        return ForwardKL()
    if kind == "jsd":
        if not 0.0 < beta < 1.0:
            raise CordError(f"beta of the jsd must lie in [0, 1], but is {beta}")
        return JensenShannon(beta)
    if kind in ("topk", "forward_topk"):
        if k < 1:
            raise CordError(f"k of {kind} must be at least 1, but is {k}")
        return TopK(k) if kind == "topk" else ForwardTopK(k)
    raise CordError(f"divergence kind {kind!r} is unknown; choose one of {', '.join(KINDS)}")


def exponential(values: Tensor) -> Tensor:
    """Return e^values of whole blocks.

    Compiled it is a power of two: inductor writes an ``exp`` with several uses to memory on a CPU, an ``exp2`` not.
    """
    # log2(e) as a literal: torch.compile would pass a computed one in at every call and convert it at every step.
    return (values * 1.4426950408889634).exp2() if torch.compiler.is_compiling() else values.exp()


def _weighted_difference(exp_a: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return Σ e^a (a − b) over columns: 0 where a has no mass, +inf where a has mass and b has none."""
    terms = (exp_a * (a - b)).masked_fill(b == -torch.inf, torch.inf)
    return terms.masked_fill(a == -torch.inf, 0.0).sum(1)
