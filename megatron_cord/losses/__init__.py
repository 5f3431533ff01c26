"""Losses: tensors and a process group in, tensors out.

Start with ``cord``, the paper's equations. How a divergence is formed over a vocabulary that is split over ranks:
``divergences`` (what each sums), ``kernels.eager`` (a block of logits), ``shard`` (blocks, ranks and the collective),
``implementations`` (from hidden states to gradients). ``divergence`` has the public functions of them;
``token_weights`` and ``policy_gradient`` the variants beside the paper.
"""

from megatron_cord.losses.cord import cord_token_weights
from megatron_cord.losses.divergence import (
    distillation_loss,
    divergence_from_hidden,
    divergence_from_logits,
    token_logprobs_from_hidden,
)
from megatron_cord.losses.divergences import DivergenceConfig
from megatron_cord.losses.implementations.fused import ChunkLoss
from megatron_cord.losses.policy_gradient import (
    PolicyGradientConfig,
    group_advantages,
    has_reward_variance,
    one_sided_gap,
    sampled_reverse_kl,
    truncated_importance_weights,
)
from megatron_cord.losses.statistics import TokenStats
from megatron_cord.losses.token_weights import TOKEN_WEIGHTS, TokenWeightsConfig, token_weights

__all__ = [
    "TOKEN_WEIGHTS",
    "ChunkLoss",
    "DivergenceConfig",
    "PolicyGradientConfig",
    "TokenStats",
    "TokenWeightsConfig",
    "cord_token_weights",
    "distillation_loss",
    "divergence_from_hidden",
    "divergence_from_logits",
    "group_advantages",
    "has_reward_variance",
    "one_sided_gap",
    "sampled_reverse_kl",
    "token_logprobs_from_hidden",
    "token_weights",
    "truncated_importance_weights",
]
