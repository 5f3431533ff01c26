"""Rewards: how good a response is, judged from its text. `collective` has them across ranks, and needs torch."""

from megatron_cord.reward.answers import answers_agree, extract_answer
from megatron_cord.reward.comparison import AnswerMatcher, Comparison, Verdict
from megatron_cord.reward.judge.judge import Judge, JudgeConfig
from megatron_cord.reward.judge.rating import OpenAnswer
from megatron_cord.reward.rewards import Answered, RewardConfig, Rewards, Score
from megatron_cord.reward.stated import states_answer

__all__ = [
    "AnswerMatcher",
    "Answered",
    "Comparison",
    "Judge",
    "JudgeConfig",
    "OpenAnswer",
    "RewardConfig",
    "Rewards",
    "Score",
    "Verdict",
    "answers_agree",
    "extract_answer",
    "states_answer",
]
