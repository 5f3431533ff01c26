"""What a step measured, over all ranks and updates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from megatron_cord.losses.policy_loss import RatioStats
from megatron_cord.parallel.layout import Layout
from megatron_cord.rollout.types import ScoredRollout
from megatron_cord.trainer.step.microbatch_loss import MicrobatchLoss
from megatron_cord.trainer.step.objective import ObjectiveConfig


def measure_step(
    losses: Sequence[MicrobatchLoss],
    rollouts: Sequence[ScoredRollout],
    updates: int,
    objective: ObjectiveConfig,
    layout: Layout,
) -> dict[str, float]:
    """Return losses, entropy, divergence and lengths. Collective over all ranks.

    Args:
        losses: of this rank's microbatches in all updates; empty but on the last pipeline stage.
        rollouts: of the step, with token results.
        updates: how many there were; the losses are their means.
        objective: its streams, and whether L_seq has ratios, which then are measured too.
        layout: this rank's place.
    """
    names = list(objective.streams)
    sums = torch.zeros(4 + len(names), dtype=torch.float64, device=layout.device)
    counted = losses if dist.get_rank(layout.tp_group) == 0 else ()
    for loss in counted:
        entropy = loss.stats.entropy
        sums[:4] += torch.stack(
            [
                loss.token.double(),
                loss.sequence.double(),
                entropy.double().sum(),
                entropy.new_full((), entropy.numel(), dtype=torch.float64),
            ]
        )
        if loss.stream:
            sums[4 + names.index(loss.stream)] += (loss.token + loss.sequence).double()
    dist.all_reduce(sums)
    token, sequence, entropy_sum, tokens, *of_streams = sums.tolist()
    token, sequence = token / updates, sequence / updates
    trained = [r for r in rollouts if r.tokens is not None]
    kl = [value for r in trained if r.tokens is not None and r.tokens.kl is not None for value in r.tokens.kl]
    own = [r for r in trained if not objective.is_given(r)]
    unknown = math.nan  # where nothing was trained on, there is no mean: a zero would look like a collapse
    metrics = _stream_metrics(dict(zip(names, of_streams, strict=True)), trained, updates, objective) | {
        "loss": token + sequence,
        "loss_token": token,
        "loss_sequence": sequence,
        "entropy": entropy_sum / tokens if tokens else unknown,
        "kl": sum(kl) / len(kl) if kl else unknown,
        "response_tokens": sum(len(r.rollout.token_ids) for r in own) / len(own) if own else unknown,
    }
    if objective.policy_gradient.enabled and objective.policy_gradient.has_ratio:
        metrics |= _ratio_metrics([loss.ratios for loss in counted if loss.ratios is not None], layout)
    return metrics


def _stream_metrics(
    losses: Mapping[str, float], rollouts: Sequence[ScoredRollout], updates: int, objective: ObjectiveConfig
) -> dict[str, float]:
    """Return each stream's weighted loss, divergence and length of responses, from the sums of its losses by name."""
    metrics: dict[str, float] = {}
    for name, loss_sum in losses.items():
        own = [r for r in rollouts if objective.stream_of(r) == name]
        kl = [value for r in own if r.tokens is not None and r.tokens.kl is not None for value in r.tokens.kl]
        tokens = sum(len(r.rollout.token_ids) for r in own)
        metrics |= {
            f"stream/{name}/loss": loss_sum / updates,
            f"stream/{name}/response_tokens": tokens / len(own) if own else math.nan,
        }
        if objective.streams[name].kind == "distillation":
            metrics[f"stream/{name}/kl"] = sum(kl) / len(kl) if kl else math.nan
    return metrics


def _ratio_metrics(ratios: Sequence[RatioStats], layout: Layout) -> dict[str, float]:
    """Return mean and largest ratio, and the shares of tokens clipped, of those with an advantage."""
    total = RatioStats.none(layout.device)
    for part in ratios:
        total = total.merged(part)
    sums, largest = total.sums.clone(), total.largest.clone()
    dist.all_reduce(sums)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    tokens, ratio, low, high = sums.tolist()
    if not tokens:
        return dict.fromkeys(("ratio", "ratio_max", "clipped_low", "clipped_high"), math.nan)
    return {
        "ratio": ratio / tokens,
        "ratio_max": float(largest),
        "clipped_low": low / tokens,
        "clipped_high": high / tokens,
    }
