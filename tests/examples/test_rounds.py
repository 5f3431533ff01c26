"""Rounds on a circle: right answers of more than two hundred tokens, and voices that have names."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from examples.chains.questions import Chain
from examples.quickstart.questions import Question, number_in_words
from examples.quickstart.spoken_sums import HELD_OUT_VOICES, TRAINING_VOICES
from examples.rounds import retained, voices
from examples.rounds.questions import CIRCLE, MISTAKES, ROUNDS, STEPS, draw_questions, drills, go, solution, vocabulary
from megatron_cord.config.loading import load_config
from megatron_cord.data.samples import HEAR, Sample
from megatron_cord.errors import CordError
from megatron_cord.evaluation.config import SetConfig
from megatron_cord.evaluation.formats import load_set
from megatron_cord.reward import answers_agree, extract_answer
from megatron_cord.trainer.config import RunConfig
from tests.tiny_run import ROOT

NUMBERS = {number_in_words(n): n for n in range(CIRCLE)}


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    return draw_questions(300, 0, held_out=False)


def test_every_answer_goes_through_all_rounds(questions: list[Question]) -> None:
    """Catches a mistake without a correction, a round that is left out, a step from elsewhere, another answer."""
    mistakes = 0
    for question in questions:
        words = question.text.split()
        value, steps = NUMBERS[words[0]], [(words[i], NUMBERS[words[i + 1]]) for i in range(1, len(words), 2)]
        rounds = question.solution.split("round ")[1:]
        assert [each.split()[0] for each in rounds] == [number_in_words(n) for n in range(1, ROUNDS + 1)]
        rounds[-1], last = rounds[-1].split(" the answer is ")
        for each in rounds:
            parts = [part.strip() for part in each.split(" ", 1)[1].strip(" .").split(" . ")]
            mistakes += parts.count("no")
            following = [*parts[1:], ""]
            right = [p for p, after in zip(parts, following, strict=True) if "no" not in (p, after)]
            assert len(right) == STEPS == len(steps)
            for step, (operation, operand) in zip(right, steps, strict=True):
                left, sign, number, _, result = step.split()
                assert (NUMBERS[left], sign, NUMBERS[number]) == (value, operation, operand)
                value = go(value, operation, operand)  # type: ignore[arg-type]
                assert NUMBERS[result] == value
        answer = extract_answer(question.solution)
        assert answer is not None and answers_agree(answer, question.answer) and question.answer == str(value) == last
    assert mistakes / (ROUNDS * STEPS * len(questions)) == pytest.approx(MISTAKES, abs=0.01)


def test_a_wrong_step_is_wrong() -> None:
    """Catches a "no" after a right step: with a mistake at every chance the first five steps are wrong at first."""
    for seed in range(40):
        parts = solution(Chain(3, (("plus", 3), ("minus", 1), ("plus", 2))), np.random.default_rng(seed), 1.0).split(
            " . "
        )
        wrong = [i for i, part in enumerate(parts) if part == "no"]
        assert len(wrong) == 5
        for i in wrong:
            before, after = (parts[j].split()[-5:] for j in (i - 1, i + 1))
            assert before[:2] == after[:2] and before != after and before[2] in NUMBERS and before[4] in NUMBERS


def test_drills_are_all_steps() -> None:
    """Catches a step that the drills leave out or compute otherwise, and a word that the tokenizer lacks."""
    found = {q.text: q for q in drills()}
    assert len(found) == CIRCLE * 2 * 3
    for text, question in found.items():
        value, operation, operand = text.split()
        after = go(NUMBERS[value], operation, NUMBERS[operand])  # type: ignore[arg-type]
        assert question.solution == f"{text} is {number_in_words(after)} . the answer is {after}"
        assert question.answer == str(after) and {*question.solution.split()} <= set(vocabulary())


def test_answers_are_long_and_fit(questions: list[Question]) -> None:
    """Catches answers of fewer than two hundred tokens, or longer than the configuration lets them be."""
    lengths = [len(question.solution.split()) + 1 for question in questions]
    config = load_config(RunConfig, ROOT / "examples/rounds/rounds.yaml")
    assert min(lengths) >= 200 and max(lengths) <= config.rollout.max_new_tokens == config.evaluation.max_new_tokens


def test_the_split_and_the_vocabulary(questions: list[Question]) -> None:
    """Catches a chain in both sets, sets that do not depend on the seed, and a word that the tokenizer lacks."""
    held_out, again = (draw_questions(150, seed, held_out=True) for seed in (0, 1))
    assert not {q.text for q in questions} & {q.text for q in (*held_out, *again)} and held_out != again
    assert len({q.text for q in held_out}) == 150
    with pytest.raises(CordError, match="2000 different chains that are held out: there are 1"):
        draw_questions(2000, 0, held_out=True)
    words = {w for q in (*questions, *held_out) for w in (*q.text.split(), *q.solution.split())}
    known = [*vocabulary(), *voices.vocabulary()]
    assert words <= set(known) and len(known) == len(set(known))


def test_the_voices_are_asked_for_without_a_text(tmp_path: Path) -> None:
    """Catches an answer of another voice, a transcript that could be read instead, and a voice without a name."""
    spoken = [
        Sample(f"s{i}", "one plus two", np.full(1600, 0.1 * i, np.float32), answer="3", voice=voice)
        for i, voice in enumerate(TRAINING_VOICES)
    ]
    voices.write_evaluation_set(tmp_path / "voices.parquet", spoken)
    read = load_set(SetConfig(str(tmp_path / "voices.parquet")))
    assert not read.rejects and [q.answer for q in read.questions] == list(voices.NAMES.values())
    for question, sample in zip(read.questions, spoken, strict=True):
        assert question.views == (HEAR,) and question.instruction == voices.INSTRUCTION and question.text is None
        np.testing.assert_allclose(question.sample().waveform, sample.waveform, atol=1e-4)
    learned = voices.voice_question(spoken[1])
    assert learned.solution == "the answer is beth" and learned.question == "one plus two" and learned.id == "s1-voice"
    assert extract_answer(learned.solution) == learned.answer
    with pytest.raises(CordError, match="has no name; choose one of en-us, "):
        voices.voice_question(Sample("s", "one", voice=HELD_OUT_VOICES[0]))


def test_both_configurations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches LoRA in the configuration that trains all weights, and guards or a budget that differ."""
    monkeypatch.chdir(ROOT)
    lora, full = (load_config(RunConfig, f"examples/rounds/{name}.yaml") for name in ("rounds", "full"))
    assert lora.model.lora.enabled and not full.model.lora.enabled and full.model.trained_parts == (
        "audio_encoder", "adapter", "language_model",
    )  # fmt: skip
    assert (lora.evaluation, lora.train, lora.rollout) == (full.evaluation, full.train, full.rollout)


def test_what_was_retained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches methods that are exchanged, and differences of other runs than the tables'."""
    monkeypatch.chdir(ROOT)
    for file in retained.FILES:
        table = json.loads((ROOT / "benchmarks" / "results" / f"compare-rounds{file.stem[7:]}.json").read_text())
        found = list(retained.differences(file))
        assert len(found) == 2 * 4
        for name, first, second, mean in found:
            on, off = (table["methods"][method]["guards"][name]["accuracy"]["mean"] for method in (first, second))
            assert mean.mean == pytest.approx(on - off) and mean.low is not None and mean.low < mean.mean
