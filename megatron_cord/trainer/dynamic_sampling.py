"""Dynamic sampling (DAPO, arXiv 2503.14476): groups whose rewards are all equal teach nothing and are replaced.

They are replaced by groups of the step's next prompts, those after ``rollout.policy_prompts_per_step``, so the data's
order, and every draw, stays a function of (seed, step, sample, number of the response). Which groups are kept is
decided over all data-parallel ranks, by position, and so is the same on every layout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from megatron_cord.data.loader import Batch
from megatron_cord.parallel.objects import all_gather_json
from megatron_cord.rollout.config import RolloutConfig
from megatron_cord.rollout.types import GenerationRequest, Rollout, ScoredRollout
from megatron_cord.trainer.collection import Collector


def replace_groups(
    config: RolloutConfig,
    collector: Collector,
    batch: Batch,
    scored: Sequence[ScoredRollout],
    generate: Callable[[Sequence[GenerationRequest]], list[Rollout]],
) -> list[ScoredRollout]:
    """Return a rank's rollouts with groups sampled in place of zero-variance ones. Collective over all ranks.

    At most ``dynamic_sampling`` rounds are made, each of as many prompts as groups are missing. Where prompts or rounds
    run out, zero-variance groups fill the step. Groups that others took the place of get the role "replaced".

    Args:
        config: how many groups a step has, and how many rounds.
        collector: makes requests and rewards.
        batch: this data-parallel rank's share of the samples.
        scored: its rollouts, the same on all ranks of its replica.
        generate: the engine; collective, each replica passes its own requests.
    """
    scored, wanted, tried = list(scored), config.policy_prompts_per_step, config.policy_prompts_per_step
    varied = _varied_groups(scored)
    for _ in range(config.dynamic_sampling):
        missing = wanted - sum(varied.values())
        candidates = range(tried, min(tried + missing, config.prompts_per_step))
        if not candidates:
            break
        own = [position for position in candidates if position in batch.positions]
        scored += collector.more_groups(batch, own, generate(collector.more_requests(batch, own)))
        tried = candidates.stop
        varied = _varied_groups(scored)
    kept = set(sorted(varied, key=lambda position: (not varied[position], position))[:wanted])
    return [replace(r, role="replaced") if r.in_group and r.position not in kept else r for r in scored]


def _varied_groups(scored: Sequence[ScoredRollout]) -> Mapping[int, bool]:
    """Return for each group of all ranks, by position, whether its rewards differ."""
    mine = [[r.position, not r.zero_variance] for r in scored if r.in_group and r.draw == 1]
    return {position: varied for share in all_gather_json(mine) for position, varied in share}
