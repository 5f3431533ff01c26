"""The teacher's answers: asked once, kept, and taken up again."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_cord.data.prompts import PromptBuilder
from megatron_cord.errors import CordError
from megatron_cord.parallel.layout import Layout
from megatron_cord.trainer.reference_answers import TeacherAnswers
from tests.tiny_run import make_samples
from tests.trainer.scripted_engine import ScriptedEngine

SAMPLES = make_samples(3)


def make_answers(
    prompts: PromptBuilder, path: Path, word: str, mode: str = "frozen"
) -> tuple[TeacherAnswers, ScriptedEngine]:
    engine = ScriptedEngine(prompts, lambda request: f"answer is {word}")
    return TeacherAnswers(mode, engine, prompts, 8, path), engine  # type: ignore[arg-type]


def test_a_frozen_teacher_is_asked_once(prompts: PromptBuilder, layout: Layout, tmp_path: Path) -> None:
    """Catches sampled or heard questions, and a question that is asked again by a later step."""
    answers, engine = make_answers(prompts, tmp_path / "answers.jsonl", "one")
    heard: list[str] = []
    answers.prepare([*SAMPLES[:2], SAMPLES[0]], resumed=False, say=heard.append)
    assert heard == ["the teacher answers 2 questions"]
    assert [(r.prompt.sample_id, r.temperature, r.prompt.clips) for r in engine.requests] == [
        (s.id, 0.0, ()) for s in SAMPLES[:2]
    ]
    for _ in range(2):
        assert [r.text for r in answers.rollouts(SAMPLES[:2], ())] == ["answer is one"] * 2
    assert len(engine.requests) == 2


def test_a_resumed_run_has_the_same_answers(prompts: PromptBuilder, layout: Layout, tmp_path: Path) -> None:
    """Catches kept answers that change on their way through the file, are asked again, or new questions that are not asked."""
    path = tmp_path / "answers.jsonl"
    first, _ = make_answers(prompts, path, "one")
    first.prepare(SAMPLES[:2], resumed=False)
    second, engine = make_answers(prompts, path, "two")
    second.prepare(SAMPLES, resumed=True)
    assert second.rollouts(SAMPLES[:2], ()) == first.rollouts(SAMPLES[:2], ())
    assert [r.prompt.sample_id for r in engine.requests] == [SAMPLES[2].id]
    third, engine = make_answers(prompts, path, "three")
    third.prepare(SAMPLES, resumed=True)
    assert not engine.requests and third.rollouts(SAMPLES, ()) == second.rollouts(SAMPLES, ())


def test_a_new_run_asks_anew(prompts: PromptBuilder, layout: Layout, tmp_path: Path) -> None:
    """Catches answers of another model, left by a run that never saved a checkpoint."""
    for word in ("one", "two"):
        answers, _ = make_answers(prompts, tmp_path / "answers.jsonl", word)
        answers.prepare(SAMPLES, resumed=False)
        assert answers.rollouts(SAMPLES, ())[0].text == f"answer is {word}"


def test_lost_answers_are_asked_again(prompts: PromptBuilder, layout: Layout, tmp_path: Path) -> None:
    """Catches a run that cannot go on because a file, which its initial weights can make again, was lost."""
    answers, engine = make_answers(prompts, tmp_path / "answers.jsonl", "one")
    answers.prepare(SAMPLES, resumed=True)
    assert len(engine.requests) == len(answers.rollouts(SAMPLES, ())) == 3


@pytest.mark.parametrize("line", ['{"sample": "s0-0", "tok', "[]", '{"sample": "s0-0"}'])
def test_a_damaged_file_is_named(prompts: PromptBuilder, layout: Layout, tmp_path: Path, line: str) -> None:
    """Catches a traceback, and answers that are silently left out."""
    path = tmp_path / "answers.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(CordError, match=r"answers\.jsonl:1 is damaged .*; delete the file"):
        make_answers(prompts, path, "one")[0].prepare(SAMPLES, resumed=True)


def test_a_live_teacher_answers_each_time(prompts: PromptBuilder, layout: Layout, tmp_path: Path) -> None:
    """Catches a live teacher's answers that are kept beyond the weights they came from."""
    answers, engine = make_answers(prompts, tmp_path / "answers.jsonl", "one", mode="live")
    answers.prepare(SAMPLES, resumed=False)
    assert not engine.requests and not list(tmp_path.iterdir())
    for _ in range(2):
        asked = answers.requests(SAMPLES)
        assert [(r.prompt.sample_id, r.temperature, r.prompt.clips) for r in asked] == [
            (s.id, 0.0, ()) for s in SAMPLES
        ]
        assert [r.prompt_id for r in answers.rollouts(SAMPLES, engine.generate(asked))] == [s.id for s in SAMPLES]
