"""Whole evaluations: results counted by hand, answers kept through kills, and comparisons with another model."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_cord.data.prompts import PromptBuilder
from megatron_cord.data.shards.reader import ShardDataset
from megatron_cord.errors import CordError
from megatron_cord.evaluation.answers import AudioResponse, Measured
from megatron_cord.evaluation.config import HELDOUT, EvaluationConfig, SetConfig
from megatron_cord.evaluation.files import (
    FOLDER,
    heldout_file,
    heldout_files,
    past_evaluations,
    read_result,
    step_label,
)
from megatron_cord.evaluation.formats import load_set, shard_questions
from megatron_cord.evaluation.runner import Evaluator
from megatron_cord.parallel.layout import Layout, ParallelConfig, finalize, initialize
from megatron_cord.rollout.types import GenerationRequest, Rollout
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
    """Return the script of a model that is right on the first so many samples."""

    def answer(request: GenerationRequest) -> str:
        index = next(i for i, s in enumerate(SAMPLES) if s.id == request.prompt.sample_id)
        right = index < (right_audio if request.prompt.clips else right_text)
        number = int(SAMPLES[index].answer or 0)
        return f"answer is {NUMBERS[number - 1 if right else number % 4]}"

    return answer


def evaluator(sets: dict[str, SetConfig], prompts: PromptBuilder, root: Path, **more: Any) -> Evaluator:
    questions = {name: load_set(config) for name, config in sets.items()}
    return Evaluator(EvaluationConfig(sets=sets, chunk=8, **more), questions, prompts, root, writes=True)


def run(
    sets: dict[str, SetConfig],
    prompts: PromptBuilder,
    root: Path,
    label: str,
    right: tuple[int, int],
    baseline: Path | None = None,
) -> dict[str, Any]:
    made = evaluator(sets, prompts, root)
    made.answer(label, label, ScriptedEngine(prompts, script(*right)))
    return made.compare(label, 5, baseline)


def test_results_and_changes_counted_by_hand(
    sets: dict[str, SetConfig], prompts: PromptBuilder, tmp_path: Path
) -> None:
    """Catches accuracies of the wrong way, a gap closed by forgetting to read, and a loss that is not noticed."""
    before = run(sets, prompts, tmp_path, "base", (36, 12))
    sums = before["sets"]["sums"]
    assert (sums["text_accuracy"], sums["audio_accuracy"], sums["gap"]) == (0.9, 0.3, pytest.approx(0.6))
    estimates = sums["estimates"]
    assert [estimates[name]["value"] for name in ("text", "audio")] == [0.9, 0.3]
    assert estimates["text"]["low"] < 0.9 < estimates["text"]["high"] and estimates["gap"]["p"] < 1e-5
    assert {group: g["samples"] for group, g in sums["groups"].items()} == {"voice0": 20, "voice1": 20}
    read = before["sets"]["read"]
    assert not {"audio_accuracy", "gap"} & read.keys() and "audio" not in read["estimates"]
    assert read["text_accuracy"] == read["estimates"]["text"]["value"] == 1.0
    assert before["overall"] == {
        "sets": ["sums"], "gap": pytest.approx(0.6), "text_accuracy": 0.9, "audio_accuracy": 0.3
    }  # fmt: skip
    after = run(sets, prompts, tmp_path, "step_000005", (4, 24), tmp_path / FOLDER / "base")
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
    checks = {(c["set"], c["modality"]): c for c in after["forgetting"]}
    assert checks.keys() == {("sums", "text"), ("read", "text")}
    assert checks["sums", "text"]["lost"] and checks["sums", "text"]["value"] == pytest.approx(-0.8)
    assert not checks["read", "text"]["lost"] and checks["read", "text"]["value"] == pytest.approx(
        -0.2
    )  # one of five: may be chance
    page = (tmp_path / FOLDER / "step_000005" / "results.html").read_text()
    assert (
        "50.0 %" in page
        and "lost" in page
        and SAMPLES[3].question in page
        and "<script" not in page
        and "://" not in page
        and page.count("<audio ") == 20  # evaluation.players of the set that is heard, none of the one that is read
    )
    table = (tmp_path / FOLDER / "step_000005" / "results.md").read_text()
    assert (
        "| sums | 40 | 10.0 % [" in table and "## Forgetting" in table and "| sums | text | 90.0 % | 10.0 % |" in table
    )
    assert json.loads((tmp_path / FOLDER / "step_000005" / "results.json").read_text()) == after


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
    made = evaluator(sets, prompts, tmp_path / "killed")
    with pytest.raises(CordError, match="the engine is away"):
        made.answer("base", "base", _Killed(prompts, script(36, 12)))
    kept = tmp_path / "killed" / FOLDER / "base" / "sums.jsonl"
    assert len(kept.read_text().splitlines()) == 1 + 16
    kept.write_bytes(kept.read_bytes()[:-30])
    engine = ScriptedEngine(prompts, script(36, 12))
    again = evaluator(sets, prompts, tmp_path / "killed")
    again.answer("base", "base", engine)
    assert len(engine.requests) == 2 * (40 - 15) + 5
    assert again.compare("base", 5, None) == expected
    assert kept.read_text() == (tmp_path / "whole" / FOLDER / "base" / "sums.jsonl").read_text()


def test_answers_of_another_model_are_not_mixed_in(
    sets: dict[str, SetConfig], prompts: PromptBuilder, tmp_path: Path
) -> None:
    """Catches results of two models, or of two question sets, under one name."""
    run(sets, prompts, tmp_path, "base", (36, 12))
    with pytest.raises(CordError, match=r"sums\.jsonl holds answers for other model;"):
        evaluator(sets, prompts, tmp_path).answer("base", "another", ScriptedEngine(prompts, script(1, 1)))
    fewer = sets | {"sums": dataclasses.replace(sets["sums"], samples=30)}
    with pytest.raises(CordError, match=r"holds answers for other questions;"):
        evaluator(fewer, prompts, tmp_path).answer("base", "base", ScriptedEngine(prompts, script(1, 1)))
    (tmp_path / FOLDER / "base" / "read.jsonl").write_text("{}\nnot json\n")
    with pytest.raises(CordError, match=r"read\.jsonl is damaged"):
        evaluator(sets, prompts, tmp_path).answer("base", "base", ScriptedEngine(prompts, script(1, 1)))
    shutil.rmtree(tmp_path / FOLDER / "base")
    with pytest.raises(CordError, match=r"evaluation\.baseline: .*base/sums\.jsonl does not exist"):
        run(sets, prompts, tmp_path, "after", (1, 1), tmp_path / FOLDER / "base")


def test_rejects_are_counted_and_bounded(sets: dict[str, SetConfig], prompts: PromptBuilder, tmp_path: Path) -> None:
    """Catches one bad recording that ends an evaluation or counts as wrong, and a mostly bad set that counts."""
    rows: list[dict[str, Any]] = [{"id": s.id, "question": s.question, "answer": s.answer} for s in SAMPLES[:8]]
    rows[0]["audio"], rows[1]["question"] = "gone.wav", "what about hippopotamuses"
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "not json\n")
    mixed = {"mixed": SetConfig(str(tmp_path / "mixed.jsonl"))}
    made = evaluator(mixed, prompts, tmp_path, max_rejects=0.4)
    made.answer("base", "base", ScriptedEngine(prompts, script(8, 8)))
    result = made.compare("base", 5, None)["sets"]["mixed"]
    assert result["samples"] == 6 and result["text_accuracy"] == 1.0 and sum(result["rejects"].values()) == 3
    rejects = (tmp_path / FOLDER / "base" / "mixed.rejects.jsonl").read_text()
    assert "gone.wav" in rejects and "hippopotamuses" in rejects and "not JSON" in rejects
    strict = evaluator(mixed, prompts, tmp_path)
    strict.answer("base", "base", ScriptedEngine(prompts, script(8, 8)))
    with pytest.raises(
        CordError,
        match=r"evaluation set mixed: 3 of 9 questions cannot be used, more than evaluation\.max_rejects=0\.02",
    ):
        strict.compare("base", 5, None)


def test_a_set_that_the_template_cannot_write_is_refused_at_once(
    sets: dict[str, SetConfig], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Catches an evaluation that answers everything else before it says that a set's system prompt has no place."""
    directory = write_checkpoint(tmp_path_factory.mktemp("other"))
    template = (directory / "chat_template.jinja").read_text(encoding="utf-8")
    refused = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    (directory / "chat_template.jinja").write_text(refused + template, encoding="utf-8")
    prompts = PromptBuilder(directory)
    evaluator(sets, prompts, tmp_path)
    sets["read"] = dataclasses.replace(sets["read"], system="Be brief.")
    with pytest.raises(CordError, match=r"set read: 5 of 5 .*: it has a system prompt, which .* \(no system role\)"):
        evaluator(sets, prompts, tmp_path)


@pytest.fixture
def heldout(prompts: PromptBuilder, tmp_path: Path) -> Evaluator:
    """Return the evaluator of a training run on four of the samples, two of whose answers are measured."""
    questions = shard_questions(ShardDataset(write_shards(tmp_path / "shards", SAMPLES)), 4)
    made = Evaluator(EvaluationConfig(scored=2), {HELDOUT: questions}, prompts, tmp_path / "run", writes=True)
    made.prepare()
    return made


def test_evaluations_of_a_training_run(heldout: Evaluator, prompts: PromptBuilder, tmp_path: Path) -> None:
    """Catches text taken for audio, accuracies over another group's samples, sampled answers, and stray files."""
    engine = ScriptedEngine(prompts, script(4, 1))
    assert heldout.answer_anew(engine) == {}
    result = heldout.score(step_label(7), 7)[HELDOUT]
    assert (result["samples"], result["text_accuracy"], result["audio_accuracy"], result["gap"]) == (4, 1.0, 0.25, 0.75)
    assert result["groups"] == {
        "voice0": {"samples": 2, "text_accuracy": 1.0, "audio_accuracy": 0.5, "gap": 0.5},
        "voice1": {"samples": 2, "text_accuracy": 1.0, "audio_accuracy": 0.0, "gap": 1.0},
    }
    assert len(engine.requests) == 8 and all(request.temperature == 0 for request in engine.requests)
    run = tmp_path / "run"
    assert [path for path in run.rglob("*") if path.is_file()] == [heldout_file(run, 7)]
    written = read_result(heldout_file(run, 7))
    assert {name: written[name] for name in result} == result
    assert (written["set"], written["model"], written["step"]) == (HELDOUT, "step_000007", 7) and written["seconds"] > 0
    assert [answer["id"] for answer in written["answers"]] == [sample.id for sample in SAMPLES[:4]]
    assert [answer["audio_correct"] for answer in written["answers"]] == [True, False, False, False]
    assert all(answer["text_correct"] and answer["token_kl"] is None for answer in written["answers"])


def test_some_answers_are_measured(heldout: Evaluator, prompts: PromptBuilder, tmp_path: Path) -> None:
    """Catches divergences beside another question's answer, another prompt's, and scalars that are lost."""
    seen: list[AudioResponse] = []

    def measure(responses: Sequence[AudioResponse]) -> Measured:
        seen.extend(responses)
        return Measured([[0.0, None], [1.0, None]], {"engine_logprob_difference": 0.25})

    metrics = heldout.answer_anew(ScriptedEngine(prompts, script(4, 1)), measure)
    result = heldout.score(step_label(0), 0)[HELDOUT]
    assert metrics == {"engine_logprob_difference": 0.25} and result["engine_logprob_difference"] == 0.25
    answers = read_result(heldout_file(tmp_path / "run", 0))["answers"]
    assert [answer["token_kl"] for answer in answers] == [[0.0, None], [1.0, None], None, None]
    for response, sample in zip(seen, SAMPLES[:2], strict=True):
        assert response.audio_prompt.clips and not response.text_prompt.clips
        assert response.rollout.prompt_id == response.audio_prompt.sample_id == sample.id


def test_past_evaluations(heldout: Evaluator, prompts: PromptBuilder, tmp_path: Path) -> None:
    """Catches steps after the one that a run resumes from, and a damaged result that ends the run."""
    for step in (5, 10, 15):
        heldout.answer_anew(ScriptedEngine(prompts, script(4, step // 5)))
        heldout.score(step_label(step), step)
    run = tmp_path / "run"
    heldout_file(run, 5).write_text("{")
    assert list(heldout_files(run)) == [5, 10, 15]
    assert past_evaluations(run, 10) == [{"step": 10, "samples": 4, "text_accuracy": 1.0, "audio_accuracy": 0.5}]


def test_samples_without_a_gold_answer(prompts: PromptBuilder, tmp_path: Path) -> None:
    """Catches an evaluation that counts them as wrong, and one that finds them after hours of training."""
    unknown = dataclasses.replace(SAMPLES[1], answer=None)
    questions = shard_questions(ShardDataset(write_shards(tmp_path / "shards", [SAMPLES[0], unknown])), 0)
    made = Evaluator(EvaluationConfig(), {HELDOUT: questions}, prompts, tmp_path, writes=True)
    with pytest.raises(CordError, match=rf"heldout: 1 of 2 .* the first, {unknown.id}: it has no answer"):
        made.prepare()
