"""Rewards: how good a rollout is, judged from its text."""

from megatron_cord.reward.answers import answers_agree, extract_answer, states_answer
from megatron_cord.reward.comparison import AnswerMatcher, Comparison, Verdict
from megatron_cord.reward.judge.judge import Judge, JudgeConfig
from megatron_cord.reward.rewards import Answered, CollectiveRewards, RewardConfig, Rewards, Score, build_rewards

__all__ = [
    "AnswerMatcher",
    "Answered",
    "CollectiveRewards",
    "Comparison",
    "Judge",
    "JudgeConfig",
    "RewardConfig",
    "Rewards",
    "Score",
    "Verdict",
    "answers_agree",
    "build_rewards",
    "extract_answer",
    "states_answer",
]
