"""Guards from evaluation to evaluation: what triggers, what held, and what a run that goes on knows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_cord.errors import CordError
from megatron_cord.evaluation.config import EvaluationConfig, GuardConfig
from megatron_cord.evaluation.questions import Question
from megatron_cord.parallel.layout import ParallelConfig, initialize
from megatron_cord.trainer.endings.guards import Guards
from tests.gloo import run_ranks

QUESTIONS = [Question(f"q{i}", str(i), f"what is {i}") for i in range(40)]


def write(run: Path, step: int, right: int, name: str = "heldout") -> Path:
    """Write the result of a step in which the first questions are right, read and heard."""
    rows = [
        {"id": q.id, "question": q.asked, "answer": q.answer, "text_correct": i < right, "audio_correct": i < right}
        for i, q in enumerate(QUESTIONS)
    ]
    directory = run / "evaluations" / f"step_{step:06d}"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{name}.json").write_text(json.dumps({"answers": rows}))
    return directory / f"{name}.json"


def guard(config: dict[str, Any]) -> GuardConfig:
    settings: dict[str, Any] = {"set": "heldout", "max_drop": 0.1} | config
    return GuardConfig(**settings)


def guards(run: Path, last: int | None = None, ended: Any = None, settings: str = "s", **config: Any) -> Guards:
    """Return one guard of a run that began with step 2."""
    chosen = {"text": guard({"action": "stop"} | config)}
    evaluation = EvaluationConfig(guards=chosen)
    return Guards(evaluation, {"heldout": QUESTIONS}, run, 2, last, settings=settings, ended=ended)


@pytest.mark.usefixtures("layout")
@pytest.mark.parametrize(
    ("config", "right", "held", "triggers"),
    [
        ({}, [40, 36, 34, 20], [4, 6, 8], 10),  # 34 of 40: six lost, whose interval begins below a tenth
        ({"decides": "drop"}, [40, 36, 34, 20], [4, 6], 8),
        ({"decides": "high"}, [40, 36, 34, 20], [4], 6),
        ({"patience": 2}, [20, 40, 20, 20], [6], 10),
        ({"patience": 2}, [20, 40, 20, 40], [6, 10], None),
        ({"action": "warn"}, [20, 20, 20, 20], [4, 6, 8, 10], None),
        ({"action": "restore"}, [40, 20, 40, 40], [4, 8, 10], 6),
    ],
)
def test_what_triggers(
    tmp_path: Path, config: dict[str, Any], right: list[int], held: list[int], triggers: int | None
) -> None:
    """Catches patience that is not counted in a row, a warning that ends a run, and steps that are said to have held.

    Also a state that a run which goes on does not come to.
    """
    write(tmp_path, 2, 40)
    write(tmp_path, 12, 0)  # of steps that are made again
    followed, triggered = guards(tmp_path, **config), []
    followed.check(2)
    for step, count in zip((4, 6, 8, 10), right, strict=True):
        write(tmp_path, step, count)
        drop = followed.check(step)["text"]
        assert (drop.accuracy, drop.before) == (count / 40, 1.0)
        assert (followed.warning("text", drop) is not None) == drop.exceeds(guard(config))
        triggered.append(step if followed.triggered else None)
        again = guards(tmp_path, step, **config)
        assert again.held_steps == [each for each in followed.held_steps if each > 2]
        assert (again.triggered, again.drops[step]) == (followed.triggered, followed.drops[step])
    assert [step for step in followed.held_steps if step > 2] == held
    assert next((step for step in triggered if step), None) == triggers


@pytest.mark.usefixtures("layout")
def test_an_ending_is_remembered(tmp_path: Path) -> None:
    """Catches a run that went back and trains on with the same settings, and one that cannot go on with others."""
    write(tmp_path, 2, 40)
    for step, right in ((4, 40), (6, 10)):
        write(tmp_path, step, right)
    ending = guards(tmp_path, 6, action="restore")
    record = ending.record(6, 4)
    assert (record["name"], record["restored"], record["drop"], record["held"]) == ("text", 4, 0.75, False)
    record = json.loads(json.dumps(record))
    assert guards(tmp_path, 4, record, action="restore").ended == record
    assert guards(tmp_path, 4, record, action="restore").ends
    assert not guards(tmp_path, 4, record, "other", action="restore").ends
    assert not guards(tmp_path, 4, record | {"restored": None}, action="restore").ends
    assert ending.results(4)["text"]["held"] and not ending.results(6)["text"]["held"]


@pytest.mark.usefixtures("layout")
def test_guards_without_a_baseline(tmp_path: Path) -> None:
    """Catches a guard that is added to a run whose beginning was not measured, or to a set without its view."""
    write(tmp_path, 4, 40)
    with pytest.raises(CordError, match=r"guards\.text: the run's first evaluation, after step 2, has no result on"):
        guards(tmp_path, 4)
    elsewhere = write(tmp_path / "base", 0, 40)
    assert guards(tmp_path, 4, baseline=str(elsewhere)).held_steps == [4]
    with pytest.raises(CordError, match=r"guards\.text: the set heldout has no question with the view hear"):
        guards(tmp_path, 4, view="hear", baseline=str(elsewhere))
    begun = guards(tmp_path, baseline=str(elsewhere))
    write(tmp_path, 2, 10)
    with pytest.raises(CordError, match=r"the run begins with has already dropped by 75\.0 points"):
        begun.check(2)
    write(tmp_path, 2, 0)
    with pytest.raises(CordError, match=r"guards\.text: .*accuracy is 0\.0% on 40 questions, so that no drop could"):
        guards(tmp_path).check(2)


def follow_on_ranks(rank: int, root: str) -> list[Any]:
    """Return what this rank knows of a run whose files the second rank cannot see."""
    layout = initialize(ParallelConfig(), 0)
    run = Path(root) / ("run" if layout.is_main else "elsewhere")
    begun = guards(run, action="restore")
    known: list[Any] = [begun.check(step)["text"] for step in (2, 4, 6)]
    again = guards(run, 6, begun.record(6, 4) if layout.is_main else None, action="restore")
    went_back = guards(run, 4, begun.record(6, 4) if layout.is_main else None, action="restore")
    with pytest.raises(CordError, match=r"guards\.text: .*no drop could") as refused:
        guards(Path(f"{run}-wrong"), 4, action="restore")
    known += [begun.held_steps, begun.triggered, begun.ends, begun.results(6), str(refused.value)]
    return [*known, again.held_steps, again.triggered, again.ended, went_back.ended]


def test_ranks_know_the_same(tmp_path: Path) -> None:
    """Catches a rank that trains on while another goes back, and one that reads results which it cannot see.

    Also a refusal that one rank alone hears of, so that the others wait for it.
    """
    for step, right in ((2, 40), (4, 36), (6, 10)):
        write(tmp_path / "run", step, right)
    for step in (2, 4):
        write(tmp_path / "run-wrong", step, 0)
    first, second = run_ranks(follow_on_ranks, 2, str(tmp_path))
    assert first == second
    assert first[3:6] == [[2, 4], "text", True] and first[-1]["restored"] == 4 and first[-2] is None
