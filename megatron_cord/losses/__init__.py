"""Losses: tensors and a process group in, tensors out."""

from megatron_cord.losses.divergence import TokenStats, divergence_from_hidden, divergence_from_logits
from megatron_cord.losses.policy_gradient import group_advantages, has_signal, policy_gradient_loss, truncated_importance_weights
from megatron_cord.losses.token_weights import TOKEN_WEIGHTS, cord_token_weights, token_weights_named, uniform_token_weights

__all__ = [
    "TOKEN_WEIGHTS",
    "TokenStats",
    "cord_token_weights",
    "divergence_from_hidden",
    "divergence_from_logits",
    "group_advantages",
    "has_signal",
    "policy_gradient_loss",
    "token_weights_named",
    "truncated_importance_weights",
    "uniform_token_weights",
]
