"""Reference answers: generated once, kept, and taken up again."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_cord.data.prompts import PromptBuilder
from megatron_cord.data.samples import PreparedSample, Sample
from megatron_cord.errors import CordError
from megatron_cord.parallel.layout import Layout
from megatron_cord.rollout.collective import CollectiveEngine
from megatron_cord.runtime.stop_request import StoppedError
from megatron_cord.trainer.answers import reference_answers
from megatron_cord.trainer.answers.reference_answers import ReferenceAnswers
from tests.tiny_run import make_samples
from tests.trainer.scripted_engine import ScriptedEngine

SAMPLES = make_samples(3)


class Texts:
    """The samples without their audio, one of them perhaps with another question."""

    def __init__(self, question: str = SAMPLES[1].question, **more: Any) -> None:
        self.samples = [SAMPLES[0], replace(SAMPLES[1], question=question, **more), SAMPLES[2]]

    def take(self, numbers: Iterable[int]) -> list[Sample]:
        return [replace(self.samples[number], waveform=np.zeros(0, np.float32)) for number in numbers]


def prepared(prompts: PromptBuilder, count: int = 3) -> list[PreparedSample]:
    return prompts.prepare(SAMPLES[:count], ["read"])


def make_answers(
    prompts: PromptBuilder, path: Path, word: str, mode: str = "frozen"
) -> tuple[ReferenceAnswers, ScriptedEngine]:
    engine = ScriptedEngine(prompts, lambda request: f"answer is {word}")
    return ReferenceAnswers(mode, lambda: nullcontext(CollectiveEngine(engine)), prompts, 8, path), engine  # type: ignore[arg-type]


def test_a_frozen_teacher_answers_once(
    prompts: PromptBuilder, layout: Layout, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches sampled answers, answers to the audio, and a sample that is answered again by a later step."""
    answers, engine = make_answers(prompts, tmp_path / "answers.jsonl", "one")
    texts = Texts()
    with caplog.at_level("INFO"):
        answers.prepare(texts.take([0, 1, 0]))
    assert "the teacher answers 2 questions" in caplog.messages
    assert [(r.prompt.sample_id, r.temperature, r.prompt.clips) for r in engine.requests] == [
        (s.id, 0.0, ()) for s in SAMPLES[:2]
    ]
    for _ in range(2):
        assert [r.text for r in answers.rollouts(prepared(prompts, 2), ())] == ["answer is one"] * 2
    assert len(engine.requests) == 2


def test_a_resumed_run_has_the_same_answers(prompts: PromptBuilder, layout: Layout, tmp_path: Path) -> None:
    """Catches kept answers that change on their way through the file, are asked again.

    Also new questions that are not asked.
    """
    path = tmp_path / "answers.jsonl"
    first, _ = make_answers(prompts, path, "one")
    first.prepare(Texts().take([0, 1]))
    second, engine = make_answers(prompts, path, "two")
    second.prepare(Texts().take(range(3)))
    assert second.rollouts(prepared(prompts, 2), ()) == first.rollouts(prepared(prompts, 2), ())
    assert [r.prompt.sample_id for r in engine.requests] == [SAMPLES[2].id]
    third, engine = make_answers(prompts, path, "three")
    third.prepare(Texts().take(range(3)))
    assert not engine.requests and third.rollouts(prepared(prompts), ()) == second.rollouts(prepared(prompts), ())


def test_kept_answers_do_not_outlive_what_they_answer(prompts: PromptBuilder, layout: Layout, tmp_path: Path) -> None:
    """Catches answers to an earlier question of the same id, of another teacher, or cut at another length.

    Also to the same question without an instruction that it has now.
    """
    path = tmp_path / "answers.jsonl"
    make_answers(prompts, path, "one")[0].prepare(Texts().take(range(3)))
    kept = path.read_bytes()
    for texts in (Texts("what is three plus one"), Texts(instruction="answer is one")):
        path.write_bytes(kept)
        other, engine = make_answers(prompts, path, "two")
        other.prepare(texts.take(range(3)))
        assert [request.prompt.sample_id for request in engine.requests] == [SAMPLES[1].id]
        asked = prompts.prepare([texts.samples[1]], ["read"])
        assert other.rollouts(asked, ())[0].text == "answer is two"
    for settings in ({"teacher": "other"}, {"max_new_tokens": 9}):
        engine = ScriptedEngine(prompts, lambda request: "answer is three")
        given: dict[str, Any] = {"max_new_tokens": 8, "path": path} | settings
        collective = CollectiveEngine(engine)
        made = ReferenceAnswers("frozen", lambda kept=collective: nullcontext(kept), prompts, **given)  # type: ignore[misc]
        made.prepare(Texts().take(range(3)))
        assert len(engine.requests) == 3


def test_another_model_is_asked_anew(prompts: PromptBuilder, layout: Layout, tmp_path: Path) -> None:
    """Catches answers of another model, left by a run that never saved a checkpoint."""
    for word in ("one", "two"):
        answers, _ = make_answers(prompts, tmp_path / "answers.jsonl", word)
        answers.teacher = word
        answers.prepare(Texts().take(range(3)))
        assert answers.rollouts(prepared(prompts), ())[0].text == f"answer is {word}"


def test_a_stop_keeps_what_is_answered(
    prompts: PromptBuilder, layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches hours of answers that are lost with the last one, and questions that are asked twice.

    Also a file that is written anew with each portion, in time that grows with the square of the questions.
    """
    monkeypatch.setattr(reference_answers, "_PORTION", 2)
    path = tmp_path / "answers.jsonl"
    answers, engine = make_answers(prompts, path, "one")
    with pytest.raises(StoppedError, match="2 of the teacher's 3 answers are kept"):
        answers.prepare(Texts().take(range(3)), lambda: True)
    first = path.stat().st_ino
    again, later = make_answers(prompts, path, "one")
    again.prepare(Texts().take(range(3)))
    assert path.stat().st_ino == first and len(path.read_text().splitlines()) == 3
    assert [r.prompt.sample_id for r in (*engine.requests, *later.requests)] == [s.id for s in SAMPLES]
    assert len(again.rollouts(prepared(prompts), ())) == 3


def test_a_line_that_a_kill_cut_is_asked_again(prompts: PromptBuilder, layout: Layout, tmp_path: Path) -> None:
    """Catches a run that cannot go on after a kill while answers were written, and a next line behind half a one."""
    path = tmp_path / "answers.jsonl"
    make_answers(prompts, path, "one")[0].prepare(Texts().take(range(2)))
    path.write_bytes(path.read_bytes()[:-9])
    again, engine = make_answers(prompts, path, "one")
    again.prepare(Texts().take(range(3)))
    assert [r.prompt.sample_id for r in engine.requests] == [s.id for s in SAMPLES[1:]]
    after, engine = make_answers(prompts, path, "one")
    after.prepare(Texts().take(range(3)))
    assert not engine.requests and after.rollouts(prepared(prompts), ()) == again.rollouts(prepared(prompts), ())


def test_an_answer_that_cannot_be_made_now_names_the_way_out(
    prompts: PromptBuilder, layout: Layout, tmp_path: Path
) -> None:
    """Catches a traceback, and advice that leads to the same stop again where no checkpoint knows of the damage."""
    answers, _ = make_answers(prompts, tmp_path / "answers.jsonl", "one")
    answers.prepare(Texts().take([0, 1]))
    with pytest.raises(
        CordError, match=rf"sample {SAMPLES[2].id} stands in .* restore what the run's data\.json lists"
    ):
        answers.rollouts(prepared(prompts), ())


def test_lost_answers_are_asked_again(prompts: PromptBuilder, layout: Layout, tmp_path: Path) -> None:
    """Catches a run that cannot go on because a file, which its initial weights can make again, was lost."""
    answers, engine = make_answers(prompts, tmp_path / "answers.jsonl", "one")
    answers.prepare(Texts().take(range(3)))
    assert len(engine.requests) == len(answers.rollouts(prepared(prompts), ())) == 3


@pytest.mark.parametrize("line", ['{"sample": "s0-0", "tok', "[]", '{"sample": "s0-0"}'])
def test_a_damaged_file_is_named(prompts: PromptBuilder, layout: Layout, tmp_path: Path, line: str) -> None:
    """Catches a traceback, and answers that are silently left out."""
    path = tmp_path / "answers.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(CordError, match=r"answers\.jsonl:1 is damaged .*; delete the file"):
        make_answers(prompts, path, "one")[0].prepare(Texts().take(range(3)))


def test_a_live_teacher_answers_each_time(prompts: PromptBuilder, layout: Layout, tmp_path: Path) -> None:
    """Catches a live teacher's answers that are kept beyond the weights they came from."""
    answers, engine = make_answers(prompts, tmp_path / "answers.jsonl", "one", mode="live")
    answers.prepare(Texts().take(range(3)))
    assert not engine.requests and not list(tmp_path.iterdir())
    for _ in range(2):
        asked = answers.requests(prepared(prompts))
        assert [(r.prompt.sample_id, r.temperature, r.prompt.clips) for r in asked] == [
            (s.id, 0.0, ()) for s in SAMPLES
        ]
        assert [r.prompt_id for r in answers.rollouts(prepared(prompts), engine.generate(asked))] == [
            s.id for s in SAMPLES
        ]
