"""Whole evaluations: answers that are kept through kills, results counted by hand, and comparisons with another model."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_cord.data.prompts import PromptBuilder
from megatron_cord.errors import CordError
from megatron_cord.evaluation.formats import SetConfig
from megatron_cord.evaluation.suite import Suite
from megatron_cord.parallel.layout import Layout, ParallelConfig, finalize, initialize
from megatron_cord.rollout.types import GenerationRequest, Rollout
from megatron_cord.trainer.evaluation import EvaluationConfig
from tests.tiny_run import NUMBERS, make_samples, write_checkpoint, write_shards
from tests.trainer.scripted_engine import ScriptedEngine

SAMPLES = make_samples(40)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> PromptBuilder:
    return PromptBuilder(write_checkpoint(tmp_path_factory.mktemp("model")))


@pytest.fixture(autouse=True)
def layout() -> Iterator[Layout]:
    yield initialize(ParallelConfig(), seed=0)
    finalize()


@pytest.fixture
def sets(tmp_path: Path) -> dict[str, SetConfig]:
    """Forty spoken sums, and five that are only read."""
    write_shards(tmp_path / "sums", SAMPLES)
    lines = [{"id": s.id, "question": s.question, "answer": s.answer} for s in SAMPLES[:5]]
    (tmp_path / "read.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {"sums": SetConfig(str(tmp_path / "sums"), "shards"), "read": SetConfig(str(tmp_path / "read.jsonl"))}


def script(right_text: int, right_audio: int) -> Callable[[GenerationRequest], str]:
    """A model that is right on the first so many samples."""

    def answer(request: GenerationRequest) -> str:
        index = next(i for i, s in enumerate(SAMPLES) if s.id == request.prompt.sample_id)
        right = index < (right_audio if request.prompt.clips else right_text)
        number = int(SAMPLES[index].answer or 0)
        return f"answer is {NUMBERS[number - 1 if right else number % 4]}"

    return answer


def suite(sets: dict[str, SetConfig], prompts: PromptBuilder, root: Path, **more: Any) -> Suite:
    return Suite(EvaluationConfig(sets=sets, chunk=8, **more), prompts, root, comparer=None, writes=True)


def nothing(name: str, done: int, total: int) -> None:
    """No progress is shown."""


def run(
    sets: dict[str, SetConfig],
    prompts: PromptBuilder,
    root: Path,
    label: str,
    right: tuple[int, int],
    baseline: Path | None = None,
) -> dict[str, Any]:
    made = suite(sets, prompts, root)
    made.answer(label, label, ScriptedEngine(prompts, script(*right)), nothing)
    return made.finish(label, baseline)


def test_results_and_changes_counted_by_hand(
    sets: dict[str, SetConfig], prompts: PromptBuilder, tmp_path: Path
) -> None:
    """Catches accuracies of the wrong way, a gap closed by forgetting to read, and a loss that is not noticed."""
    before = run(sets, prompts, tmp_path, "base", (36, 12))
    sums = before["sets"]["sums"]
    assert (sums["text"]["value"], sums["audio"]["value"], sums["gap"]["value"]) == (0.9, 0.3, pytest.approx(0.6))
    assert sums["text"]["low"] < 0.9 < sums["text"]["high"] and sums["gap"]["p"] < 1e-5
    assert {group: g["samples"] for group, g in sums["groups"].items()} == {"voice0": 20, "voice1": 20}
    assert "audio" not in before["sets"]["read"] and before["sets"]["read"]["text"]["value"] == 1.0
    assert before["overall"] == {"sets": ["sums"], "gap": pytest.approx(0.6), "text": 0.9, "audio": 0.3}
    after = run(sets, prompts, tmp_path, "step_000005", (4, 24), tmp_path / "base")
    change = after["sets"]["sums"]["change"]
    assert (change["gap_before"]["value"], change["gap_after"]["value"]) == (pytest.approx(0.6), pytest.approx(0.3))
    assert (
        change["gap_closed"]["value"] == pytest.approx(0.5)
        and change["gap_closed"]["low"] < 0.5 < change["gap_closed"]["high"]
    )
    assert (change["audio"]["gained"], change["audio"]["lost_answers"], change["audio"]["p"]) == (
        12,
        0,
        pytest.approx(2 / 2**12),
    )
    checks = {(c["set"], c["way"]): c for c in after["forgetting"]}
    assert checks.keys() == {("sums", "text"), ("read", "text")}
    assert checks["sums", "text"]["lost"] and checks["sums", "text"]["value"] == pytest.approx(-0.8)
    assert not checks["read", "text"]["lost"] and checks["read", "text"]["value"] == pytest.approx(
        -0.2
    )  # one of five: may be chance
    page = (tmp_path / "step_000005" / "results.html").read_text()
    assert (
        "50.0 %" in page
        and "lost" in page
        and SAMPLES[3].question in page
        and "<script" not in page
        and "://" not in page
    )
    table = (tmp_path / "step_000005" / "results.md").read_text()
    assert (
        "| sums | 40 | 10.0 % [" in table and "## Forgetting" in table and "| sums | text | 90.0 % | 10.0 % |" in table
    )
    assert json.loads((tmp_path / "step_000005" / "results.json").read_text()) == after


class _Killed(ScriptedEngine):
    """Dies at its third call."""

    calls = 0

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Rollout]:
        self.calls += 1
        if self.calls == 3:
            raise CordError("the engine is away")
        return super().generate(requests)


def test_a_killed_evaluation_goes_on(sets: dict[str, SetConfig], prompts: PromptBuilder, tmp_path: Path) -> None:
    """Catches answers that are asked again or lost, a torn line, and results that depend on the kill."""
    expected = run(sets, prompts, tmp_path / "whole", "base", (36, 12))
    made = suite(sets, prompts, tmp_path / "killed")
    with pytest.raises(CordError, match="the engine is away"):
        made.answer("base", "base", _Killed(prompts, script(36, 12)), nothing)
    kept = tmp_path / "killed" / "base" / "sums.jsonl"
    assert len(kept.read_text().splitlines()) == 1 + 16
    kept.write_bytes(kept.read_bytes()[:-30])
    engine = ScriptedEngine(prompts, script(36, 12))
    again = suite(sets, prompts, tmp_path / "killed")
    again.answer("base", "base", engine, nothing)
    assert len(engine.requests) == 2 * (40 - 15) + 5
    assert again.finish("base", None) == expected
    assert kept.read_text() == (tmp_path / "whole" / "base" / "sums.jsonl").read_text()


def test_answers_of_another_model_are_not_mixed_in(
    sets: dict[str, SetConfig], prompts: PromptBuilder, tmp_path: Path
) -> None:
    """Catches results of two models, or of two question sets, under one name."""
    run(sets, prompts, tmp_path, "base", (36, 12))
    with pytest.raises(CordError, match=r"sums\.jsonl holds answers for other model;"):
        suite(sets, prompts, tmp_path).answer("base", "another", ScriptedEngine(prompts, script(1, 1)), nothing)
    fewer = sets | {"sums": dataclasses.replace(sets["sums"], samples=30)}
    with pytest.raises(CordError, match=r"holds answers for other questions;"):
        suite(fewer, prompts, tmp_path).answer("base", "base", ScriptedEngine(prompts, script(1, 1)), nothing)
    (tmp_path / "base" / "read.jsonl").write_text("{}\nnot json\n")
    with pytest.raises(CordError, match=r"read\.jsonl is damaged"):
        suite(sets, prompts, tmp_path).answer("base", "base", ScriptedEngine(prompts, script(1, 1)), nothing)
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(CordError, match=r"evaluation\.baseline: .*base/sums\.jsonl does not exist"):
        run(sets, prompts, tmp_path, "after", (1, 1), tmp_path / "base")


def test_what_cannot_be_asked_is_counted_and_bounded(
    sets: dict[str, SetConfig], prompts: PromptBuilder, tmp_path: Path
) -> None:
    """Catches one bad recording that ends an evaluation, or that counts as a wrong answer, and a set that is mostly bad and counts all the same."""
    rows: list[dict[str, Any]] = [{"id": s.id, "question": s.question, "answer": s.answer} for s in SAMPLES[:8]]
    rows[0]["audio"], rows[1]["question"] = "gone.wav", "what about hippopotamuses"
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "not json\n")
    mixed = {"mixed": SetConfig(str(tmp_path / "mixed.jsonl"))}
    made = suite(mixed, prompts, tmp_path, max_rejects=0.4)
    made.answer("base", "base", ScriptedEngine(prompts, script(8, 8)), nothing)
    result = made.finish("base", None)["sets"]["mixed"]
    assert result["samples"] == 6 and result["text"]["value"] == 1.0 and sum(result["rejects"].values()) == 3
    rejects = (tmp_path / "base" / "mixed.rejects.jsonl").read_text()
    assert "gone.wav" in rejects and "hippopotamuses" in rejects and "not JSON" in rejects
    strict = suite(mixed, prompts, tmp_path)
    strict.answer("base", "base", ScriptedEngine(prompts, script(8, 8)), nothing)
    with pytest.raises(
        CordError,
        match=r"evaluation set mixed: 3 of 9 questions cannot be asked, more than evaluation\.max_rejects=0\.02",
    ):
        strict.finish("base", None)
