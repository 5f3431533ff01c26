"""Losses: tensors and a process group in, tensors out."""

from megatron_cord.losses.divergence import TokenStats, divergence_from_hidden, divergence_from_logits, token_logprobs_from_hidden
from megatron_cord.losses.fused import LossWeights
from megatron_cord.losses.policy_gradient import group_advantages, has_signal, policy_gradient_loss, truncated_importance_weights
from megatron_cord.losses.token_weights import TOKEN_WEIGHTS, TokenWeightsConfig, cord_token_weights, token_weights

__all__ = [
    "TOKEN_WEIGHTS",
    "LossWeights",
    "TokenStats",
    "TokenWeightsConfig",
    "cord_token_weights",
    "divergence_from_hidden",
    "divergence_from_logits",
    "group_advantages",
    "has_signal",
    "policy_gradient_loss",
    "token_logprobs_from_hidden",
    "token_weights",
    "truncated_importance_weights",
]
