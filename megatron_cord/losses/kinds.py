"""The divergences, each as what it sums over the vocabulary, how the sums merge, and its gradient.

Reverse KL is what CORD trains with (D_t of the paper): Σ p log(p/q), p the student, q the teacher. Forward KL is Σ q log(q/p), the usual
distillation loss. Both fit in the eight scalars of ``statistics`` and so need one collective; the kinds of ``two_pass_kinds`` need two.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from megatron_cord.losses.statistics import Statistics, Totals


class Block(NamedTuple):
    """A block of columns when the whole vocabulary's sums are known; every field is [N, columns]."""

    log_p: Tensor  #: of the student
    p: Tensor
    log_q: Tensor  #: of the teacher
    teacher: Tensor  #: its logits as they came


class Kind(Protocol):
    """Shapes: block logits s, t are [N, columns], relative to their own row maxima; parts are [K, N]; totals are [N]."""

    @property
    def has_teacher(self) -> bool:
        """Whether a teacher is compared; if not, the student's own logits stand in for the teacher's."""
        ...

    @property
    def top(self) -> int:
        """How many of the teacher's largest logits must be known."""
        ...

    @property
    def num_sums(self) -> int:
        """How many scalars a second pass sums up, when both distributions are normalised; 0 if the first pass is enough."""
        ...

    def block_sum(self, s: Tensor, exp_s: Tensor, t: Tensor, exp_t: Tensor) -> Tensor:
        """A over the columns of a block, [N]."""
        ...

    def merged_sum(
        self, parts: Statistics, shift_s: Tensor, scale_s: Tensor, shift_t: Tensor, scale_t: Tensor
    ) -> Tensor:
        """Each part's A relative to the common maxima, [K, N]; shift = m − M and scale = exp(shift)."""
        ...

    def value(self, whole: Statistics, log_sum_s: Tensor, log_sum_t: Tensor) -> Tensor:
        """The divergence, [N]."""
        ...

    def second_sums(self, block: Block, threshold: Tensor) -> Tensor:
        """What the second pass sums up over the columns of a block, [sums, N]."""
        ...

    def second_value(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        """The divergence and the scalar that the gradient needs besides, each [N], from the sums over the vocabulary."""
        ...

    def gradient(self, block: Block, totals: Totals, weight: Tensor) -> Tensor:
        """Weight · ∂divergence/∂s, [N, columns], with s the student's logits over the temperature."""
        ...


class OnePass:
    """What the kinds that need a single pass have in common."""

    has_teacher = True
    top = 0
    num_sums = 0

    def second_sums(self, block: Block, threshold: Tensor) -> Tensor:
        return block.p.new_zeros(0, block.p.shape[0])

    def second_value(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("a single pass knows the divergence")


class ReverseKL(OnePass):
    """Σ p log(p/q) = A/L − log L + log T with A = Σ e^{s−M_s}[(s−M_s) − (t−M_t)]."""

    def block_sum(self, s: Tensor, exp_s: Tensor, t: Tensor, exp_t: Tensor) -> Tensor:
        return _weighted_difference(exp_s, s, t)

    def merged_sum(
        self, parts: Statistics, shift_s: Tensor, scale_s: Tensor, shift_t: Tensor, scale_t: Tensor
    ) -> Tensor:
        merged = scale_s * (parts.divergence_sum + parts.student_sum * (shift_s - shift_t))
        return torch.where(parts.divergence_sum == torch.inf, torch.inf, merged)  # 0 · inf, when the scale underflows

    def value(self, whole: Statistics, log_sum_s: Tensor, log_sum_t: Tensor) -> Tensor:
        return whole.divergence_sum / whole.student_sum - log_sum_s + log_sum_t

    def gradient(self, block: Block, totals: Totals, weight: Tensor) -> Tensor:
        unused = weight == 0  # such a row must not turn an infinite divergence into NaN
        delta = (block.log_p - block.log_q).masked_fill((block.log_p == -torch.inf) | unused[:, None], 0.0)
        return weight[:, None] * block.p * (delta - totals.divergence.masked_fill(unused, 0.0)[:, None])


class ForwardKL(OnePass):
    """Σ q log(q/p) = A/T − log T + log L with A = Σ e^{t−M_t}[(t−M_t) − (s−M_s)]."""

    def block_sum(self, s: Tensor, exp_s: Tensor, t: Tensor, exp_t: Tensor) -> Tensor:
        return _weighted_difference(exp_t, t, s)

    def merged_sum(
        self, parts: Statistics, shift_s: Tensor, scale_s: Tensor, shift_t: Tensor, scale_t: Tensor
    ) -> Tensor:
        merged = scale_t * (parts.divergence_sum + parts.teacher_sum * (shift_t - shift_s))
        return torch.where(parts.divergence_sum == torch.inf, torch.inf, merged)

    def value(self, whole: Statistics, log_sum_s: Tensor, log_sum_t: Tensor) -> Tensor:
        return whole.divergence_sum / whole.teacher_sum - log_sum_t + log_sum_s

    def gradient(self, block: Block, totals: Totals, weight: Tensor) -> Tensor:
        return weight[:, None] * (block.p - exponential(block.log_q))


class NoTeacher(OnePass):
    """No divergence at all: entropy and log-probability of the student alone."""

    has_teacher = False

    def block_sum(self, s: Tensor, exp_s: Tensor, t: Tensor, exp_t: Tensor) -> Tensor:
        return torch.zeros_like(s[:, 0])

    def merged_sum(
        self, parts: Statistics, shift_s: Tensor, scale_s: Tensor, shift_t: Tensor, scale_t: Tensor
    ) -> Tensor:
        return parts.divergence_sum

    def value(self, whole: Statistics, log_sum_s: Tensor, log_sum_t: Tensor) -> Tensor:
        return whole.divergence_sum

    def gradient(self, block: Block, totals: Totals, weight: Tensor) -> Tensor:
        return torch.zeros_like(block.p)


def exponential(values: Tensor) -> Tensor:
    """e^values of whole blocks. Compiled it is a power of two: inductor writes an ``exp`` with several uses to memory on a CPU, an ``exp2`` not."""
    # log2(e) as a literal: torch.compile would pass a computed one in at every call and convert it at every step.
    return (values * 1.4426950408889634).exp2() if torch.compiler.is_compiling() else values.exp()


def _weighted_difference(exp_a: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Σ e^a (a − b) over columns: an entry without mass in a counts 0, one with mass in a and none in b counts +inf."""
    terms = (exp_a * (a - b)).masked_fill(b == -torch.inf, torch.inf)
    return terms.masked_fill(a == -torch.inf, 0.0).sum(1)
