"""The agreement reward."""

from __future__ import annotations

import threading

import pytest

from megatron_cord.reward import AgreementReward, RewardConfig


def test_agreement_is_with_the_teacher() -> None:
    """Catches a reward from position or wording instead of the final answer, and one for two texts without any answer."""
    reward = AgreementReward(RewardConfig())
    said = ["five plus seven is twelve . the answer is 12", "the answer is 11", "hm", "hm", "so it is twelve"]
    wanted = ["seven plus five is twelve . the answer is 12", "the answer is 12", "hm", "the answer is 12", "the answer is 12"]
    assert reward.score(said, wanted) == [1.0, 0.0, 0.0, 0.0, 1.0]
    assert reward.score([], []) == []


def test_every_rollout_needs_its_reference() -> None:
    """Catches rewards silently paired with another question's answer."""
    with pytest.raises(ValueError, match="shorter"):
        AgreementReward().score(["1", "2"], ["1"])


def test_works_outside_the_main_thread() -> None:
    """Catches a judge that rests on signals, which a worker thread may not set."""
    rewards: list[float] = []
    thread = threading.Thread(target=lambda: rewards.extend(AgreementReward().score([r"\boxed{x+1}"], [r"\boxed{1+x}"])))
    thread.start()
    thread.join()
    assert rewards == [1.0]
