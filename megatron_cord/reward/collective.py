"""Rewards across ranks: each rank scores its share of the responses, and all get every score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist

from megatron_cord.parallel.objects import all_gather_json
from megatron_cord.reward.comparison import AnswerMatcher
from megatron_cord.reward.judge.judge import Judge
from megatron_cord.reward.rewards import Answered, RewardConfig, Rewards, Score, Scorer, TermWeights


class CollectiveRewards:
    """Rewards whose calls are collective: a judge gets each comparison once, and all ranks get the same scores.

    Args:
        rewards: this rank's own.
        group: the ranks that pass the same responses; None for all ranks.
    """

    def __init__(self, rewards: Scorer, group: dist.ProcessGroup | None = None) -> None:
        self._rewards, self._group = rewards, group

    def score(self, answered: Sequence[Answered], terms: TermWeights | None = None) -> list[Score]:
        """Return one score each, in the same order. All ranks of the group pass the same and get the same."""
        rank, world = dist.get_rank(self._group), dist.get_world_size(self._group)
        shares = all_gather_json(
            [asdict(score) for score in self._rewards.score(answered[rank::world], terms)], self._group
        )
        return [Score(**shares[i % world][i // world]) for i in range(len(answered))]


def build_rewards(
    config: RewardConfig, directory: Path, group: dist.ProcessGroup | None = None, *, verifies: bool = False
) -> CollectiveRewards:
    """Build the configured rewards of a group of ranks; a judge keeps its answers in the run's directory.

    Args:
        config: of the rewards.
        directory: of the run.
        group: the ranks that pass the same responses; None for all ranks.
        verifies: whether any reward has the term reasoning.
    """
    compares = config.comparer == "judge"
    judge = Judge(config.judge, directory / "judge_cache", writer=dist.get_rank()) if compares or verifies else None
    comparer = judge if compares else AnswerMatcher()
    return CollectiveRewards(Rewards(config.terms, comparer, judge if verifies else None), group)
