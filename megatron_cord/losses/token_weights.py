"""How much each response token counts in L_tok = Σ_t w_t D_t: small functions by name, and their products.

CORD's own are in ``cord``: ``cord`` is the product of ``top_k`` and ``position``. All take whole ``Responses`` and
return a weight for each of their M tokens, in float64, without gradient. A fraction is of each response, so that
weights do not depend on what else is in the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_cord.errors import CordError
from megatron_cord.losses.checks import check_weight_constants
from megatron_cord.losses.cord import combined_weights, position_weights, top_k_weights
from megatron_cord.losses.responses import Responses, rank_in_response, whole_responses


@dataclass(frozen=True)
class TokenWeightsConfig:
    """The weights w_t of L_tok: which factors are multiplied, and their constants."""

    factors: str = "cord"  #: names of losses/token_weights.py joined by *; cord is top_k*position
    top_k: int = 20  #: K of top_k: response positions of largest divergence that get alpha
    alpha: float = 2.0  #: weight of those positions
    beta: float = 2.0  #: of position: weight of the first position; it falls linearly to 1 at the last
    keep: float = 0.2  #: of top_fraction, entropy and tip: share of each response's tokens that counts at all
    gamma: float = 0.5  #: of remaining: weight of the first token above 1
    importance_cap: float = 2.0  #: of importance: the largest weight

    def __post_init__(self) -> None:
        unknown = [name for name in self.names if name not in TOKEN_WEIGHTS]
        if unknown:
            raise CordError(
                f"token weights {unknown[0]!r} are unknown; choose from {', '.join(TOKEN_WEIGHTS)}, joined by *"
            )
        check_weight_constants(self.top_k, self.alpha, self.beta)
        if not 0 < self.keep <= 1:
            raise CordError(f"keep must lie in (0, 1], but is {self.keep}")
        if not self.gamma >= 0:
            raise CordError(f"gamma must be at least 0, but is {self.gamma}")
        if not self.importance_cap > 0:
            raise CordError(f"importance_cap must be positive, but is {self.importance_cap}")

    @property
    def names(self) -> tuple[str, ...]:
        """The factors' names."""
        return tuple(name.strip() for name in self.factors.split("*"))

    @property
    def needs_ratio(self) -> bool:
        """Whether a factor needs to know how likely the responses were when they were sampled."""
        return "importance" in self.names


def token_weights(
    kl: Tensor,
    cu_seqlens: Tensor,
    config: TokenWeightsConfig,
    *,
    entropy: Tensor | None = None,
    log_ratio: Tensor | None = None,
    positions: Tensor | None = None,
    cp_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Return the product of the configured factors.

    Args:
        kl: [N], divergences of packed response tokens, used as numbers. +inf and NaN count as the largest.
        cu_seqlens: integers [B+1], where sequence i is the tokens [cu_seqlens[i], cu_seqlens[i+1]).
        config: which factors.
        entropy: [N], the student's; needed by entropy and tip.
        log_ratio: [N], log p(y_t) of the student minus that of the policy that sampled y_t; needed by importance.
        positions: for context parallelism, see ``whole_responses``.
        cp_group: likewise.

    Returns:
        [N], dtype of ``kl``, no gradient.

    Raises:
        CordError: cu_seqlens that do not cover the N tokens, positions that do not make whole responses, or entropy or
            log_ratio that is missing.
    """
    responses = whole_responses(
        kl, cu_seqlens, entropy=entropy, log_ratio=log_ratio, positions=positions, cp_group=cp_group
    )
    weights = reduce(torch.mul, (TOKEN_WEIGHTS[name](responses, config) for name in config.names))
    return responses.take(weights).to(kl.dtype)


def uniform_weights(responses: Responses, config: TokenWeightsConfig) -> Tensor:
    """w_t = 1: plain on-policy distillation."""
    return torch.ones_like(responses.kl, dtype=torch.float64)


def top_fraction_weights(responses: Responses, config: TokenWeightsConfig) -> Tensor:
    """w_t = 1 for the share ``keep`` of a response's tokens with the largest divergence, 0 for the others."""
    return _kept(responses, responses.kl, config)


def entropy_weights(responses: Responses, config: TokenWeightsConfig) -> Tensor:
    """w_t = 1 for the share ``keep`` with the largest student entropy, the forking tokens, else 0 (2506.01939)."""
    return _kept(responses, _entropy(responses, "entropy"), config)


def tip_weights(responses: Responses, config: TokenWeightsConfig) -> Tensor:
    """w_t = 1 for the share ``keep`` with the largest score h + d − h·d, 0 for the others (TIP).

    h and d are student entropy and divergence, min–max normalised over the response: a token counts if either is large.
    """
    h, d = _normalised(responses, _entropy(responses, "tip")), _normalised(responses, responses.kl)
    return _kept(responses, h + d - h * d, config)


def remaining_weights(responses: Responses, config: TokenWeightsConfig) -> Tensor:
    """w_t = 1 + γ(1 − Σ_{k<t}|D_k| / Σ_k|D_k|): the remaining divergence (IW-OPD, with D_k for its advantage A_k)."""
    size = _finite(responses.kl).abs()
    before = _sum_before(responses, size)
    total = _per_sequence(responses, size, "sum")
    return 1.0 + config.gamma * (1.0 - torch.where(total > 0, before / total, 0.0))


def importance_weights(responses: Responses, config: TokenWeightsConfig) -> Tensor:
    """w_t = min(Π_{k<t} p(y_k|y_<k) / μ(y_k|y_<k), cap): the prefix's importance weight, p the student, μ the sampler.

    D_t is a sum over the vocabulary, which needs no correction for the token y_t. What another policy, such as older
    weights, has drawn is the prefix y_<t before it: E_μ[w_t D_t] = E_p[D_t] without the cap, which bounds the variance
    for a bias. A ratio that is not a number makes the weights behind it none, and the loss: such a step is skipped.
    """
    if responses.log_ratio is None:
        raise CordError(
            "token weights importance need log_ratio, of the student's to the sampling policy's probability"
        )
    before = _sum_before(responses, responses.log_ratio.double())
    return before.clamp(max=math.log(config.importance_cap)).exp()


#: By the name that configuration uses.
TOKEN_WEIGHTS: dict[str, Callable[[Responses, TokenWeightsConfig], Tensor]] = {
    "uniform": uniform_weights,
    "cord": lambda responses, config: combined_weights(responses, config.top_k, config.alpha, config.beta),
    "top_k": lambda responses, config: top_k_weights(responses, config.top_k, config.alpha),
    "position": lambda responses, config: position_weights(responses, config.beta),
    "top_fraction": top_fraction_weights,
    "entropy": entropy_weights,
    "tip": tip_weights,
    "remaining": remaining_weights,
    "importance": importance_weights,
}


def _kept(responses: Responses, score: Tensor, config: TokenWeightsConfig) -> Tensor:
    count = (responses.length * config.keep - 1e-9).ceil().clamp(min=1)
    return (rank_in_response(responses, score) < count).double()


def _entropy(responses: Responses, name: str) -> Tensor:
    if responses.entropy is None:
        raise CordError(f"token weights {name} need the student's entropy")
    return responses.entropy


def _normalised(responses: Responses, values: Tensor) -> Tensor:
    """Return (v − min)/(max − min) of each response; 0 where all are equal."""
    values = _finite(values)
    low, high = _per_sequence(responses, values, "amin"), _per_sequence(responses, values, "amax")
    return torch.where(high > low, (values - low) / (high - low), 0.0)


def _sum_before(responses: Responses, values: Tensor) -> Tensor:
    """Return the sum over the earlier tokens of the same response, [M]."""
    earlier = values.cumsum(0) - values  # of all tokens before this one, other responses' included
    return earlier - earlier[torch.arange(len(values), device=values.device) - responses.position]


def _per_sequence(responses: Responses, values: Tensor, how: str) -> Tensor:
    """Return a response's sum, amin or amax, for each of its tokens."""
    zeros = values.new_zeros(responses.num_sequences)
    total = zeros.scatter_reduce(0, responses.sequence, values, how, include_self=False)
    return total[responses.sequence]


def _finite(values: Tensor) -> Tensor:
    """Return the values in float64, NaN and +inf a very large number: they are the largest and sums stay numbers."""
    return torch.nan_to_num(values.double(), nan=1e30, posinf=1e30, neginf=-1e30)
