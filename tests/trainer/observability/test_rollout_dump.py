"""The rollout dump: what a step leaves, reading it back, and what a resumed run finds."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from megatron_cord.data.prompts import PromptBuilder
from megatron_cord.errors import CordError
from megatron_cord.losses import PolicyGradientConfig
from megatron_cord.reward import Score
from megatron_cord.rollout.rollout_file import SCHEMA, dump_files, read_rollouts
from megatron_cord.rollout.types import Rollout, ScoredRollout, TokenResults, VersionSpan
from megatron_cord.trainer.observability.rollout_dump import RolloutDump, read_dump, recorded_streams
from megatron_cord.trainer.step.objective import ObjectiveConfig
from megatron_cord.trainer.step.streams import StreamConfig

IDS = ["s0", "s1"]


def rollouts() -> list[ScoredRollout]:
    """One response for L_tok and one for L_seq, with awkward numbers; the second is not trained on."""
    spans = (VersionSpan(0, 2, 4), VersionSpan(2, 3, 5))
    first = Rollout(IDS[0], (9, 10, 3), (-0.1, -1 / 3, -1e-30), "stop", spans, "is plus")
    second = Rollout(IDS[1], (11,), (-2.5,), "length", (VersionSpan(0, 1, 5),), "answer")
    tokens = TokenResults([0.5, 0.25, 0.0], [4.0, 3.0, 1.0], [-0.125, -0.5, -0.25], [-0.5, -0.25, -4.0])
    return [
        ScoredRollout(first, "distill", "what is one", "voice0", position=0, seed=2**48 - 1, tokens=tokens),
        ScoredRollout(
            second, "policy", "what is two", position=1, draw=3, seed=0, reference_answer="answer is one", reward=1.0,
            score=Score(1.0, {"agreement": 1.0}), advantage=2 / 3, zero_variance=True,
        ),
    ]  # fmt: skip


def test_a_dump_comes_back_as_it_was(prompts: PromptBuilder, tmp_path: Path) -> None:
    """Catches rounded log-probabilities, lost versions.

    Also roles or seeds: anything that would make a replay another run.
    """
    RolloutDump(tmp_path, prompts, enabled=True).write(7, rollouts())
    assert read_dump(tmp_path, 7, IDS) == rollouts()
    assert [path.name for path in tmp_path.iterdir()] == ["step_000007.parquet"]
    rows = pq.read_table(tmp_path / "step_000007.parquet").to_pylist()  # as any reader of Parquet sees it
    assert list(rows[0]) == SCHEMA.names
    assert rows[0]["token_kl"] == [0.5, 0.25, 0.0] and rows[0]["token_weights"] == [4.0, 3.0, 1.0]
    assert rows[0]["student_logprobs"] == [-0.125, -0.5, -0.25]
    assert rows[0]["teacher_logprobs"] == [-0.5, -0.25, -4.0]
    assert rows[0]["tokens"] == prompts.token_strings((9, 10, 3)) and rows[0]["reward_terms"] is None
    assert rows[1]["token_kl"] is None and rows[1]["step"] == 7 and rows[1]["reward_terms"] == [("agreement", 1.0)]


def test_what_was_not_measured_and_what_is_no_text(prompts: PromptBuilder, tmp_path: Path) -> None:
    """Catches a step that cannot be written because of NaN, of no tokens at all.

    Also of half a surrogate pair in a question.
    """
    broken = Rollout(IDS[0], (9,), (math.nan,), "stop", (), "is")
    empty = Rollout(IDS[1], (), (), "length", (), "")
    tokens = TokenResults([math.inf], [1.0], [math.nan], [math.nan])
    RolloutDump(tmp_path, prompts, enabled=True).write(
        1,
        [
            ScoredRollout(broken, "distill", "what is \ud83d plus", tokens=tokens),
            ScoredRollout(empty, "distill", position=1),
        ],
    )
    first, second = pq.read_table(tmp_path / "step_000001.parquet").to_pylist()
    assert first["token_kl"] == [math.inf] and math.isnan(first["student_logprobs"][0])
    assert first["question"] == "what is \\ud83d plus"
    assert second["token_ids"] == [] and second["token_kl"] is None
    back = read_dump(tmp_path, 1, IDS)
    assert math.isnan(back[0].rollout.logprobs[0]) and back[1].rollout == empty


def test_streams_that_are_dealt_otherwise(prompts: PromptBuilder, tmp_path: Path) -> None:
    """Catches a replay whose streams have as many responses in all as the recorded ones, which are dealt otherwise.

    Also a dump without the streams, of an earlier revision, that cannot be read.
    """

    def made(**responses: int) -> ObjectiveConfig:
        grouped = PolicyGradientConfig(enabled="c" in responses)
        streams = {
            name: StreamConfig("policy_gradient" if name in "cd" else "distillation", responses=count)
            for name, count in responses.items()
        }
        return ObjectiveConfig(streams=streams, policy_gradient=grouped)

    plain = ObjectiveConfig()
    recorded = made(a=2, b=1, c=2, d=3)
    alone, grouped = ((0, -1, -2), (1, 2, 3, 4, 5))
    some = [replace(rollouts()[0], draw=draw) for draw in alone]
    some += [replace(rollouts()[1], draw=draw) for draw in grouped]
    RolloutDump(tmp_path, prompts, stream_of=recorded.stream_of, enabled=True).write(1, some)
    streams = recorded_streams(tmp_path, 1)
    assert streams == dict(zip((*alone, *grouped), "aabccddd", strict=True))
    recorded.check_recorded(streams, 5, "dump")
    for other, message in (
        (made(a=1, b=2, c=2, d=3), "stream a would be trained on as those of b"),
        (made(b=2, a=1, c=2, d=3), "stream a would be trained on as those of b"),
        (made(a=2, b=1, c=3, d=2), "stream d would be trained on as those of c"),
        (made(a=3, c=2, d=3), "stream b would be trained on as those of a"),
        (made(a=2, b=1, c=2, d=2), "are not those of objective.streams"),
        (plain, "are not those of objective.streams"),
    ):
        with pytest.raises(CordError, match=message):
            other.check_recorded(streams, 5, "dump")
    plain.check_recorded({0: "a", 1: "", 2: ""}, 2, "dump")
    made(a=1).check_recorded({0: ""}, 2, "dump")
    with pytest.raises(CordError, match="the stream without a name would be trained on as those of c"):
        made(a=1, c=2, d=2).check_recorded({0: "", 1: "", 2: "", 3: "", 4: ""}, 4, "dump")
    made(a=1, c=2, d=2).check_recorded(dict.fromkeys(range(5)), 4, "dump")

    path = tmp_path / "step_000001.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["stream"]), path)
    assert set(recorded_streams(tmp_path, 1).values()) == {None} and len(read_rollouts(path)) == 8


def test_ranks_that_do_not_write(prompts: PromptBuilder, tmp_path: Path) -> None:
    """Catches several ranks that write one file, and a record that was not asked for."""
    RolloutDump(tmp_path / "a", prompts, enabled=False).write(1, rollouts())
    RolloutDump(None, prompts, enabled=True).write(1, rollouts())
    assert not list(tmp_path.iterdir())


def test_a_resumed_run_drops_what_it_makes_again(prompts: PromptBuilder, tmp_path: Path) -> None:
    """Catches rollouts of steps that the run has not made (a reader would take them for the newest).

    Also half-written files that stay for ever, and files of others that vanish.
    """
    dump = RolloutDump(tmp_path, prompts, enabled=True)
    for step in range(1, 5):
        dump.write(step, rollouts())
    (tmp_path / ".step_000005.parquet.1-0.partial").write_bytes(b"PAR1")
    (tmp_path / "notes.txt").write_text("mine")
    RolloutDump(tmp_path, prompts, first_step=2, enabled=False)
    assert list(dump_files(tmp_path)) == [1, 2, 3, 4]
    RolloutDump(tmp_path, prompts, first_step=2, enabled=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "notes.txt",
        "step_000001.parquet",
        "step_000002.parquet",
    ]


def test_a_file_is_whole_or_not_there(prompts: PromptBuilder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a reader that meets half a file while the run goes on.

    Also a step made again that damages the file before it is done.
    """
    dump = RolloutDump(tmp_path, prompts, enabled=True)
    dump.write(1, rollouts()[:1])

    def killed(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    for step in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            dump.write(step, rollouts())
    assert list(dump_files(tmp_path)) == [1]
    assert len(read_dump(tmp_path, 1, IDS)) == 1


def test_records_that_cannot_be_replayed(prompts: PromptBuilder, tmp_path: Path) -> None:
    """Catches tracebacks, and a replay that silently trains on other questions."""
    RolloutDump(tmp_path, prompts, enabled=True).write(1, rollouts())
    with pytest.raises(CordError, match=r"step_000002\.parquet does not exist; .*lower train\.steps"):
        read_dump(tmp_path, 2, IDS)
    with pytest.raises(CordError, match=rf"step_000001\.parquet: row 2: sample {IDS[1]} is not number 1 of the step's"):
        read_dump(tmp_path, 1, IDS[:1])
    path = tmp_path / "step_000001.parquet"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(CordError, match=r"step_000001\.parquet is damaged"):
        read_dump(tmp_path, 1, IDS)
