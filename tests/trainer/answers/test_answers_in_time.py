"""Reference answers that are made a stretch of steps at a time: the same as those that are made at the start."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_cord.data.loader import SampleLoader
from megatron_cord.data.ordering.damage import DamageLimitError
from megatron_cord.data.prompts import PromptBuilder
from megatron_cord.parallel.layout import Layout
from megatron_cord.rollout.collective import CollectiveEngine
from megatron_cord.trainer.answers.answers_in_time import AnswersInTime
from megatron_cord.trainer.answers.reference_answers import ReferenceAnswers
from megatron_cord.trainer.building import rollout as building
from tests.data.ordering.sets import Listed, row_of
from tests.tiny_run import losses, make_samples, metrics, overrides
from tests.trainer.fault_ranks import run_forked
from tests.trainer.runs.test_train import alone, stop_after
from tests.trainer.scripted_engine import ScriptedEngine

FROZEN = ("model.freeze=[language_model]", "optimizer.learning_rate=3e-2", "checkpoint.keep=0")
ANSWERS = "reference_answers.jsonl"


def answers(run: Path) -> dict[str, dict[str, Any]]:
    """Return the kept answers by their key, each of which is there once."""
    lines = [json.loads(line) for line in (run / ANSWERS).read_text().splitlines()]
    assert len({line["key"] for line in lines}) == len(lines)
    return {line.pop("key"): line for line in lines}


def same(left: Path, right: Path) -> bool:
    """Whether two runs have the same answers, but for rounding, and the same losses."""
    ours, theirs = answers(left), answers(right)
    for key in ours.keys() | theirs.keys():
        assert ours[key].pop("logprobs") == pytest.approx(theirs[key].pop("logprobs"), abs=1e-5)
    return ours == theirs and losses(left) == [pytest.approx(pair, rel=1e-4) for pair in losses(right)]


def all_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def built(answers: Any, loader: Any, per_step: int, steps: int, at_a_time: int | None) -> AnswersInTime:
        return AnswersInTime(answers, loader, per_step, steps, None)

    monkeypatch.setattr(building, "AnswersInTime", built)


@pytest.fixture
def at_the_start(inputs: Path, tmp_path: Path) -> Path:
    """Make a run whose answers are all made before its first step."""
    with pytest.MonkeyPatch.context() as patch:
        all_at_the_start(patch)
        return alone(inputs, tmp_path / "at-the-start", *FROZEN)


def test_answers_made_while_training_are_those_of_the_start(
    inputs: Path, at_the_start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches answers by trained weights or to audio, answers of the wrong step, and a first step that waits for all.

    Also two callers of one engine, with steps ahead; another stretch on two ranks; answers that a resumed run makes
    again.
    """
    monkeypatch.setattr(building, "_BATCH", 3)
    with caplog.at_level("INFO"):
        run = alone(inputs, tmp_path / "run", *FROZEN)
    assert same(run, at_the_start)
    said = [message for message in caplog.messages if message.startswith("the teacher answers ")]
    counts = [int(message.split()[3]) for message in said if message.endswith(" questions")]
    assert counts[0] == 4 and len(counts) > 1 and sum(counts) == len(answers(run))
    ahead = alone(inputs, tmp_path / "ahead", *FROZEN, "rollout.schedule.ahead=1")
    assert answers(ahead).keys() == answers(run).keys()
    assert {key: line["token_ids"] for key, line in answers(ahead).items()} == {
        key: line["token_ids"] for key, line in answers(run).items()
    }
    resumed = stop_after(2, run, tmp_path / "resumed")
    kept = (resumed / ANSWERS).read_bytes()
    alone(inputs, resumed, *FROZEN)
    assert (resumed / ANSWERS).read_bytes() == kept and same(resumed, run)


def test_answers_with_lora_off(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches answers of a language model with LoRA on, and an engine that goes on without it, or without its rest."""
    lora = ("model.lora.rank=4", "model.lora.whole=[adapter]", "optimizer.learning_rate=3e-2", "checkpoint.keep=0")
    with pytest.MonkeyPatch.context() as patch:
        all_at_the_start(patch)
        wanted = alone(inputs, tmp_path / "at-the-start", *lora)
    monkeypatch.setattr(building, "_BATCH", 3)
    with caplog.at_level("INFO"):
        run = alone(inputs, tmp_path / "run", *lora)
    assert same(run, wanted)
    said = [message for message in caplog.messages if message.startswith("the teacher answers ")]
    assert len([message for message in said if message.endswith(" questions")]) > 1
    assert all(line["engine_logprob_difference"] < 1e-4 for line in metrics(run))
    resumed = alone(inputs, stop_after(2, run, tmp_path / "resumed"), *lora)
    assert same(resumed, run)


@pytest.mark.slow
def test_two_ranks_have_the_answers_of_one(inputs: Path, at_the_start: Path, tmp_path: Path) -> None:
    """Catches ranks that disagree on when answers are made, which would wait for each other for ever."""
    settings = overrides(inputs, tmp_path / "two", *FROZEN, "rollout.schedule.ahead=0")
    status, errors = run_forked(settings, tmp_path / "log")
    assert status == 0, errors
    assert same(tmp_path / "two", at_the_start)


def test_weights_that_change_what_is_read_have_all_answers_made_first(
    inputs: Path, at_the_start: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches answers of a trained language model: one that trains, and one that a run begins with and freezes."""
    for number, settings in enumerate(([], [*FROZEN, f"init_from={at_the_start}"])):
        caplog.clear()
        with caplog.at_level("INFO"):
            alone(inputs, tmp_path / str(number), *settings, "train.steps=3")
        assert not [message for message in caplog.messages if "questions at a time" in message]
        assert "the teacher answers 6 questions" in caplog.messages


def test_a_limit_of_damage_found_by_answers_loses_no_step(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches steps that are trained and not saved when questions read ahead show more damage than may be left out."""
    monkeypatch.setattr(building, "_BATCH", 3)
    read = SampleLoader.texts

    def texts(loader: SampleLoader, steps: range, first: int) -> Any:
        if steps.start:
            raise DamageLimitError("too many samples are damaged")
        return read(loader, steps, first)

    monkeypatch.setattr(SampleLoader, "texts", texts)
    with pytest.raises(DamageLimitError):
        alone(inputs, tmp_path / "run", *FROZEN, "checkpoint.interval=0")
    made = [line["step"] for line in metrics(tmp_path / "run")]
    assert made and (tmp_path / "run" / "checkpoints" / f"step_{made[-1]:06d}").is_dir()


def test_a_sample_that_stands_in_for_a_damaged_one_is_answered(
    prompts: PromptBuilder, layout: Layout, tmp_path: Path
) -> None:
    """Catches a run that stops, as one must whose answers were all made before the damage was found."""
    samples = make_samples(40)
    listed = Listed([replace(sample, waveform=np.zeros(0, np.float32)) for sample in samples])
    loader = SampleLoader(
        row_of(listed, max_skipped=0.5), batch_size=2, prepare=lambda given, _: prompts.prepare(given, ["read"])
    )
    engine = ScriptedEngine(prompts, lambda request: "answer is one")
    made = ReferenceAnswers(
        "frozen", lambda: nullcontext(CollectiveEngine(engine)), prompts, 8, tmp_path / "answers.jsonl"
    )
    in_time = AnswersInTime(made, loader, per_step=2, steps=4, at_a_time=4)
    in_time.begin(0, lambda: None, lambda: False)
    assert not engine.requests and in_time.lacks(0)
    in_time.make(0)
    assert len(engine.requests) == 4 and not in_time.lacks(0) and not in_time.lacks(1) and in_time.lacks(2)
    # The sample of the step before would stand in, and is answered; with that one damaged, it is the next step's.
    listed.broken = {loader.addresses(step)[0].number for step in (0, 1)}
    batch = loader.batch(1)
    assert in_time.lacks(1)
    in_time.make(1)
    assert [answer.text for answer in made.rollouts(batch.samples, ())] == ["answer is one"] * 2
    asked = [request.prompt.sample_id for request in engine.requests]
    assert len(asked) == len(set(asked)) and not in_time.lacks(2)
