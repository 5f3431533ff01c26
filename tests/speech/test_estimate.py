"""The estimate of time and size."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_cord.errors import CordError
from megatron_cord.speech.estimate import estimate
from megatron_cord.speech.spoken_set import SpokenSetConfig, make_spoken_set
from tests.speech.questions import write_questions


def test_a_plan_measures_and_makes_nothing(tmp_path: Path) -> None:
    """Would catch a projection from the wrong number of questions, and files that stay behind."""
    questions = write_questions(tmp_path / "q.jsonl", 200)
    with questions.open("a") as file:
        file.write('{"question": "see http://example.org"}\n' * 50)
    plan = estimate(SpokenSetConfig(str(questions)), 40)
    whole = make_spoken_set(SpokenSetConfig(str(questions)), tmp_path / "set")
    assert (
        (plan.questions, plan.tried, plan.workers) == (250, 40, 1)
        and plan.rate > 0
        and plan.seconds == pytest.approx(250 / plan.rate)
    )
    assert plan.audio_seconds == pytest.approx(whole.manifest.seconds, rel=0.1) and plan.rejects == pytest.approx(
        0.2, abs=0.06
    )
    assert plan.bytes == pytest.approx(sum(shard.bytes for shard in whole.manifest.shards), rel=0.15)
    assert "250 questions at" in plan.describe()
    with pytest.raises(CordError, match="give at least 1"):
        estimate(SpokenSetConfig(str(questions)), 0)
