"""Rewards: how good a rollout is, judged from its text."""

from megatron_cord.reward.agreement import AgreementReward, RewardConfig
from megatron_cord.reward.answers import answers_agree, extract_answer

__all__ = ["AgreementReward", "RewardConfig", "answers_agree", "extract_answer"]
