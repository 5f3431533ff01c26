"""The divergences, each as what it sums over the vocabulary, how the sums merge, and its gradient.

Reverse KL is what CORD trains with (D_t of the paper): Σ p log(p/q), p the student, q the teacher. Forward KL is Σ q log(q/p), the usual
distillation loss. Both fit in the eight scalars of ``statistics`` and so need one collective.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from megatron_cord.errors import CordError

if TYPE_CHECKING:
    from megatron_cord.losses.statistics import Statistics


class Kind(Protocol):
    """Shapes: block logits s, t are [N, columns], relative to their own row maxima; parts are [K, N]; totals are [N]."""

    def block_sum(self, s: Tensor, exp_s: Tensor, t: Tensor, exp_t: Tensor) -> Tensor:
        """A over the columns of a block, [N]."""
        ...

    def merged_sum(self, parts: Statistics, shift_s: Tensor, scale_s: Tensor, shift_t: Tensor, scale_t: Tensor) -> Tensor:
        """Each part's A relative to the common maxima, [K, N]; shift = m − M and scale = exp(shift)."""
        ...

    def value(self, whole: Statistics, log_sum_s: Tensor, log_sum_t: Tensor) -> Tensor:
        """The divergence, [N]."""
        ...

    def gradient(self, log_p: Tensor, p: Tensor, log_q: Tensor, divergence: Tensor, weight: Tensor) -> Tensor:
        """weight · ∂divergence/∂s, [N, columns], with s the student's logits over the temperature, p the student, q the teacher."""
        ...


class ReverseKL:
    """Σ p log(p/q) = A/L − log L + log T with A = Σ e^{s−M_s}[(s−M_s) − (t−M_t)]."""

    def block_sum(self, s: Tensor, exp_s: Tensor, t: Tensor, exp_t: Tensor) -> Tensor:
        return _weighted_difference(exp_s, s, t)

    def merged_sum(self, parts: Statistics, shift_s: Tensor, scale_s: Tensor, shift_t: Tensor, scale_t: Tensor) -> Tensor:
        merged = scale_s * (parts.divergence_sum + parts.student_sum * (shift_s - shift_t))
        return torch.where(parts.divergence_sum == torch.inf, torch.inf, merged)  # 0 · inf, when the scale underflows

    def value(self, whole: Statistics, log_sum_s: Tensor, log_sum_t: Tensor) -> Tensor:
        return whole.divergence_sum / whole.student_sum - log_sum_s + log_sum_t

    def gradient(self, log_p: Tensor, p: Tensor, log_q: Tensor, divergence: Tensor, weight: Tensor) -> Tensor:
        unused = weight == 0  # such a row must not turn an infinite divergence into NaN
        delta = (log_p - log_q).masked_fill_((log_p == -torch.inf) | unused[:, None], 0.0)
        return weight[:, None] * p * (delta - divergence.masked_fill(unused, 0.0)[:, None])


class ForwardKL:
    """Σ q log(q/p) = A/T − log T + log L with A = Σ e^{t−M_t}[(t−M_t) − (s−M_s)]."""

    def block_sum(self, s: Tensor, exp_s: Tensor, t: Tensor, exp_t: Tensor) -> Tensor:
        return _weighted_difference(exp_t, t, s)

    def merged_sum(self, parts: Statistics, shift_s: Tensor, scale_s: Tensor, shift_t: Tensor, scale_t: Tensor) -> Tensor:
        merged = scale_t * (parts.divergence_sum + parts.teacher_sum * (shift_t - shift_s))
        return torch.where(parts.divergence_sum == torch.inf, torch.inf, merged)

    def value(self, whole: Statistics, log_sum_s: Tensor, log_sum_t: Tensor) -> Tensor:
        return whole.divergence_sum / whole.teacher_sum - log_sum_t + log_sum_s

    def gradient(self, log_p: Tensor, p: Tensor, log_q: Tensor, divergence: Tensor, weight: Tensor) -> Tensor:
        return weight[:, None] * (p - log_q.exp())


#: By the name that configuration and the public functions use.
KINDS: dict[str, Kind] = {"reverse_kl": ReverseKL(), "forward_kl": ForwardKL()}


def kind_named(name: str) -> Kind:
    """The divergence of that name; CordError names the choices."""
    if name not in KINDS:
        raise CordError(f"divergence kind {name!r} is unknown; choose one of {', '.join(KINDS)}")
    return KINDS[name]


def _weighted_difference(exp_a: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Σ e^a (a − b) over columns: an entry without mass in a counts 0, one with mass in a and none in b counts +inf."""
    terms = (exp_a * (a - b)).masked_fill_(b == -torch.inf, torch.inf)
    return terms.masked_fill_(a == -torch.inf, 0.0).sum(1)
