"""How much each response token counts in L_tok = Σ_t w_t D_t: small functions of the divergences, by name.

All take ``kl`` [N], the divergence of N packed response tokens, and ``cu_seqlens`` [B+1], where sequence i is the tokens
[cu_seqlens[i], cu_seqlens[i+1]); all return weights [N] of kl's type, without gradient. A sequence may be empty.
Simplification: every rank holds whole sequences.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_cord.errors import CordError
from megatron_cord.losses.checks import check_cu_seqlens


def cord_token_weights(kl: Tensor, cu_seqlens: Tensor, *, top_k: int = 20, alpha: float = 2.0, beta: float = 2.0) -> Tensor:
    """CORD's weights: w_t = w_t^KL · w_t^pos (arXiv 2601.16547).

    w_t^KL = α for the K response positions of largest divergence, else 1; w_t^pos = β − (β − 1)(t − 1)/(T − 1), falling from β to 1.

    Args:
        kl: [N]; used as a number, no gradient flows through the weights. +inf and NaN count as the largest.
        cu_seqlens: integers [B+1].
        top_k: K. If T ≤ K every position gets α. Of equal divergences the earlier position comes first.
        alpha: α > 0.
        beta: β > 0. A response of a single token gets β.

    Returns:
        [N], dtype of ``kl``.

    Raises:
        CordError: cu_seqlens that do not cover the N tokens, top_k < 0, or a factor that is not positive.
    """
    if top_k < 0:
        raise CordError(f"top_k must be at least 0, but is {top_k}")
    if not (alpha > 0 and beta > 0):
        raise CordError(f"alpha and beta must be positive, but are {alpha} and {beta}")
    kl = kl.detach()
    sequence, position, length = _places(kl, cu_seqlens)
    top = torch.where(_rank_in_sequence(kl, sequence, position) < top_k, alpha, 1.0)
    fraction = position.to(torch.float64) / (length - 1).clamp(min=1)
    return (top * (beta - (beta - 1.0) * fraction)).to(kl.dtype)


def uniform_token_weights(kl: Tensor, cu_seqlens: Tensor) -> Tensor:
    """w_t = 1: plain on-policy distillation."""
    _places(kl, cu_seqlens)
    return torch.ones_like(kl.detach())


#: By the name that configuration uses; keyword arguments are each function's own.
TOKEN_WEIGHTS: dict[str, Callable[..., Tensor]] = {"cord": cord_token_weights, "uniform": uniform_token_weights}


def token_weights_named(name: str) -> Callable[..., Tensor]:
    """The weighting of that name; CordError names the choices."""
    if name not in TOKEN_WEIGHTS:
        raise CordError(f"token weights {name!r} are unknown; choose one of {', '.join(TOKEN_WEIGHTS)}")
    return TOKEN_WEIGHTS[name]


def _places(kl: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each token, int64 [N]: its sequence, its position there from 0, and that sequence's length."""
    if kl.dim() != 1:
        raise CordError(f"kl must have shape [tokens], but has {list(kl.shape)}")
    check_cu_seqlens(cu_seqlens, kl.shape[0])
    starts = cu_seqlens.to(device=kl.device, dtype=torch.int64)
    lengths = starts.diff()
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device=kl.device), lengths)
    position = torch.arange(kl.shape[0], device=kl.device) - starts[sequence]
    return sequence, position, lengths[sequence]


def _rank_in_sequence(kl: Tensor, sequence: Tensor, position: Tensor) -> Tensor:
    """Of each token, how many of its sequence have a larger divergence (or an equal one, earlier); int64 [N]."""
    by_divergence = torch.sort(kl, descending=True, stable=True).indices
    order = by_divergence[torch.sort(sequence[by_divergence], stable=True).indices]
    rank = torch.empty_like(position)
    rank[order] = position  # sorted by sequence, the places within a sequence are the positions again
    return rank
