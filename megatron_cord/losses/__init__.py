"""Losses: tensors and a process group in, tensors out.

To follow one divergence, read ``statistics`` (scalars of a block, their merge, the gradient), ``kinds`` (what is summed), ``shard`` (blocks and the
collective), then the shortest way from hidden states to gradients, ``recompute``; ``late`` and ``fused`` differ from it in what they keep.
``backends`` and ``products`` are about speed alone, ``choice`` and ``checks`` about arguments. ``token_weights`` and ``policy_gradient`` stand by themselves.
"""

from megatron_cord.losses.divergence import (
    TokenStats,
    divergence_from_hidden,
    divergence_from_logits,
    token_logprobs_from_hidden,
)
from megatron_cord.losses.fused import LossWeights
from megatron_cord.losses.policy_gradient import (
    PolicyGradientConfig,
    group_advantages,
    has_reward_variance,
    policy_gradient_loss,
    truncated_importance_weights,
)
from megatron_cord.losses.token_weights import TOKEN_WEIGHTS, TokenWeightsConfig, cord_token_weights, token_weights
from megatron_cord.losses.two_pass_kinds import DivergenceConfig

__all__ = [
    "TOKEN_WEIGHTS",
    "DivergenceConfig",
    "LossWeights",
    "PolicyGradientConfig",
    "TokenStats",
    "TokenWeightsConfig",
    "cord_token_weights",
    "divergence_from_hidden",
    "divergence_from_logits",
    "group_advantages",
    "has_reward_variance",
    "policy_gradient_loss",
    "token_logprobs_from_hidden",
    "token_weights",
    "truncated_importance_weights",
]
