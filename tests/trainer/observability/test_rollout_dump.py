"""The record of rollouts: what a step leaves, reading it back for a replay, and what a resumed run finds."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from megatron_cord.data.prompts import PromptBuilder
from megatron_cord.errors import CordError
from megatron_cord.reward.rewards import Score
from megatron_cord.rollout.rollout_file import SCHEMA, record_files
from megatron_cord.rollout.types import Rollout, VersionSpan
from megatron_cord.trainer.collection import Collected
from megatron_cord.trainer.observability.rollout_dump import RolloutRecord, read_record
from megatron_cord.trainer.step.step import TokenRecord
from tests.tiny_run import make_samples

SAMPLES = make_samples(2)


def collected() -> list[Collected]:
    """One response for L_tok and one for L_seq, with awkward numbers."""
    first = Rollout(
        SAMPLES[0].id,
        (9, 10, 3),
        (-0.1, -1 / 3, -1e-30),
        "stop",
        (VersionSpan(0, 2, 4), VersionSpan(2, 3, 5)),
        "is plus",
    )
    second = Rollout(SAMPLES[1].id, (11,), (-2.5,), "length", (VersionSpan(0, 1, 5),), "answer")
    score = Score(1.0, {"agreement": 1.0})
    return [
        Collected(SAMPLES[0], "distill", first, seed=2**48 - 1),
        Collected(SAMPLES[1], "policy", second, "answer is one", 1.0, 2 / 3, True, score, seed=0),
    ]


def test_a_record_comes_back_as_it_was(prompts: PromptBuilder, tmp_path: Path) -> None:
    """Catches rounded log-probabilities, lost versions, roles or seeds: anything that would make a replay another run."""
    tokens = [TokenRecord(0, [0.5, 0.25, 0.0], [4.0, 3.0, 1.0], [-0.1, -0.3, -0.2], [-0.5, -0.25, -4.0])]
    RolloutRecord(tmp_path, prompts, enabled=True).write(7, collected(), tokens)
    for got, wanted in zip(read_record(tmp_path, 7, SAMPLES), collected(), strict=True):
        assert got.sample is wanted.sample and got.score is None
        for name in ("role", "rollout", "teacher_answer", "reward", "advantage", "has_reward_variance", "seed"):
            assert getattr(got, name) == getattr(wanted, name), name
    assert [path.name for path in tmp_path.iterdir()] == ["step_000007.parquet"]
    rows = pq.read_table(tmp_path / "step_000007.parquet").to_pylist()  # as any reader of Parquet sees it
    assert list(rows[0]) == SCHEMA.names
    assert rows[0]["token_kl"] == [0.5, 0.25, 0.0] and rows[0]["token_weights"] == [4.0, 3.0, 1.0]
    assert rows[0]["student_logprobs"] == pytest.approx([-0.1, -0.3, -0.2]) and rows[0]["teacher_logprobs"] == [
        -0.5,
        -0.25,
        -4.0,
    ]
    assert rows[0]["tokens"] == prompts.token_strings((9, 10, 3)) and rows[0]["reward_terms"] is None
    assert rows[1]["token_kl"] is None and rows[1]["step"] == 7 and rows[1]["reward_terms"] == [("agreement", 1.0)]


def test_what_was_not_measured_and_what_is_no_text(prompts: PromptBuilder, tmp_path: Path) -> None:
    """Catches a step that cannot be recorded because of NaN, of no tokens at all, or of half a surrogate pair in a question."""
    broken = Rollout(SAMPLES[0].id, (9,), (math.nan,), "stop", (), "is")
    empty = Rollout(SAMPLES[1].id, (), (), "length", (), "")
    sample = replace(SAMPLES[0], question="what is \ud83d plus")
    tokens = [TokenRecord(0, [math.inf], [1.0], [math.nan], [math.nan])]
    RolloutRecord(tmp_path, prompts, enabled=True).write(
        1, [Collected(sample, "distill", broken), Collected(SAMPLES[1], "distill", empty)], tokens
    )
    first, second = pq.read_table(tmp_path / "step_000001.parquet").to_pylist()
    assert (
        first["token_kl"] == [math.inf]
        and math.isnan(first["student_logprobs"][0])
        and first["question"] == "what is \\ud83d plus"
    )
    assert second["token_ids"] == [] and second["token_kl"] is None
    back = read_record(tmp_path, 1, SAMPLES)
    assert math.isnan(back[0].rollout.logprobs[0]) and back[1].rollout == empty


def test_ranks_that_do_not_write(prompts: PromptBuilder, tmp_path: Path) -> None:
    """Catches several ranks that write one file, and a record that was not asked for."""
    RolloutRecord(tmp_path / "a", prompts, enabled=False).write(1, collected(), [])
    RolloutRecord(None, prompts, enabled=True).write(1, collected(), [])
    assert not list(tmp_path.iterdir())


def test_a_resumed_run_drops_what_it_makes_again(prompts: PromptBuilder, tmp_path: Path) -> None:
    """Catches rollouts of steps that the run has not made (a reader would take them for the newest), half-written files that stay for ever,
    and files of others that vanish.
    """
    record = RolloutRecord(tmp_path, prompts, enabled=True)
    for step in range(1, 5):
        record.write(step, collected(), [])
    (tmp_path / "step_000005.partial").write_bytes(b"PAR1")
    (tmp_path / "notes.txt").write_text("mine")
    RolloutRecord(tmp_path, prompts, first_step=2, enabled=False)
    assert list(record_files(tmp_path)) == [1, 2, 3, 4]
    RolloutRecord(tmp_path, prompts, first_step=2, enabled=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "notes.txt",
        "step_000001.parquet",
        "step_000002.parquet",
    ]


def test_a_file_is_whole_or_not_there(prompts: PromptBuilder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a reader that meets half a file while the run goes on, and a step made again that damages the file before it is done."""
    record = RolloutRecord(tmp_path, prompts, enabled=True)
    record.write(1, collected()[:1], [])

    def killed(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    for step in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            record.write(step, collected(), [])
    assert list(record_files(tmp_path)) == [1]
    assert len(read_record(tmp_path, 1, SAMPLES)) == 1


def test_records_that_cannot_be_replayed(prompts: PromptBuilder, tmp_path: Path) -> None:
    """Catches tracebacks, and a replay that silently trains on other questions."""
    RolloutRecord(tmp_path, prompts, enabled=True).write(1, collected(), [])
    with pytest.raises(CordError, match=r"step_000002\.parquet does not exist; .*lower train\.steps"):
        read_record(tmp_path, 2, SAMPLES)
    with pytest.raises(
        CordError, match=rf"step_000001\.parquet: row 2: sample {SAMPLES[1].id} is not among the step's"
    ):
        read_record(tmp_path, 1, SAMPLES[:1])
    path = tmp_path / "step_000001.parquet"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(CordError, match=r"step_000001\.parquet is damaged"):
        read_record(tmp_path, 1, SAMPLES)
