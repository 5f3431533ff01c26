"""The record of rollouts, and reading it back for a replay."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from megatron_cord.data.prompts import PromptBuilder
from megatron_cord.errors import CordError
from megatron_cord.rollout.types import Rollout, VersionSpan
from megatron_cord.trainer.collection import Collected
from megatron_cord.trainer.record import RolloutRecord, read_record
from megatron_cord.trainer.step import TokenRecord
from tests.tiny_run import make_samples

SAMPLES = make_samples(2)


def collected() -> list[Collected]:
    """One response for L_tok and one for L_seq, with awkward numbers."""
    first = Rollout(SAMPLES[0].id, (9, 10, 3), (-0.1, -1 / 3, -1e-30), "stop", (VersionSpan(0, 2, 4), VersionSpan(2, 3, 5)), "is plus")
    second = Rollout(SAMPLES[1].id, (11,), (-2.5,), "length", (VersionSpan(0, 1, 5),), "answer")
    return [Collected(SAMPLES[0], "distill", first), Collected(SAMPLES[1], "policy", second, "answer is one", 1.0, 2 / 3, True)]


def test_a_record_comes_back_as_it_was(prompts: PromptBuilder, tmp_path: Path) -> None:
    """Catches rounded log-probabilities, lost versions or roles: anything that would make a replay another run."""
    tokens = [TokenRecord(0, [0.5, 0.25, 0.0], [4.0, 3.0, 1.0], [-0.1, -0.3, -0.2])]
    RolloutRecord(tmp_path, prompts, enabled=True).write(7, collected(), tokens)
    back = read_record(tmp_path, 7, SAMPLES)
    for got, wanted in zip(back, collected(), strict=True):
        assert got.sample is wanted.sample
        assert (got.role, got.rollout, got.teacher_answer, got.reward, got.advantage, got.has_signal) == (
            wanted.role, wanted.rollout, wanted.teacher_answer, wanted.reward, wanted.advantage, wanted.has_signal
        )  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "step_000007.jsonl").read_text().splitlines()]
    assert lines[0]["token_kl"] == [0.5, 0.25, 0.0] and lines[0]["token_weights"] == [4.0, 3.0, 1.0]
    assert lines[0]["tokens"] == prompts.token_strings((9, 10, 3))
    assert lines[1]["token_kl"] is None and lines[1]["step"] == 7
    assert [path.name for path in tmp_path.iterdir()] == ["step_000007.jsonl"]


def test_numbers_that_are_none_stay_json(prompts: PromptBuilder, tmp_path: Path) -> None:
    """Catches NaN in a file that other readers take for JSON."""
    broken = Rollout(SAMPLES[0].id, (9,), (math.nan,), "stop", (), "is")
    tokens = [TokenRecord(0, [math.inf], [1.0], [math.nan])]
    RolloutRecord(tmp_path, prompts, enabled=True).write(1, [Collected(SAMPLES[0], "distill", broken)], tokens)

    def refuse(name: str) -> None:
        raise AssertionError(name)

    line = json.loads((tmp_path / "step_000001.jsonl").read_text(), parse_constant=refuse)
    assert line["token_kl"] == [None] and line["trainer_logprobs"] == [None]
    assert math.isnan(read_record(tmp_path, 1, SAMPLES)[0].rollout.logprobs[0])


def test_ranks_that_do_not_write(prompts: PromptBuilder, tmp_path: Path) -> None:
    """Catches several ranks that write one file, and a record that was not asked for."""
    RolloutRecord(tmp_path / "a", prompts, enabled=False).write(1, collected(), [])
    RolloutRecord(None, prompts, enabled=True).write(1, collected(), [])
    assert not list(tmp_path.iterdir())


def test_records_that_cannot_be_replayed(prompts: PromptBuilder, tmp_path: Path) -> None:
    """Catches tracebacks, and a replay that silently trains on other questions."""
    RolloutRecord(tmp_path, prompts, enabled=True).write(1, collected(), [])
    with pytest.raises(CordError, match=r"step_000002\.jsonl does not exist; .*lower train\.steps"):
        read_record(tmp_path, 2, SAMPLES)
    with pytest.raises(CordError, match=rf"step_000001\.jsonl:2: sample {SAMPLES[1].id} is not among the step's"):
        read_record(tmp_path, 1, SAMPLES[:1])
    path = tmp_path / "step_000001.jsonl"
    path.write_text(path.read_text()[:-40])
    with pytest.raises(CordError, match=r"step_000001\.jsonl:2 is damaged"):
        read_record(tmp_path, 1, SAMPLES)
