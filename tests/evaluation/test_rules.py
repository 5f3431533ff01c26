"""The rules of published sets, on the forms of answers that their own evaluation code knows, and on what it draws."""

from __future__ import annotations

import builtins
import importlib.util
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cord.errors import CordError
from megatron_cord.evaluation.rules import language
from megatron_cord.evaluation.rules.choices import MMARChoices, MMSUChoices, VoiceBenchChoices, voicebench_letter
from megatron_cord.evaluation.rules.ifeval import InstructionFollowing
from megatron_cord.evaluation.rules.instructions import follows, read_instructions
from megatron_cord.evaluation.rules.reasoning import BigBenchHard
from megatron_cord.evaluation.rules.refusals import Refusals, refuses
from megatron_cord.evaluation.rules.rule import Reply

LIBRARIES = all(importlib.util.find_spec(name) for name in ("langdetect", "nltk", "punkt"))
needs_libraries = pytest.mark.skipif(not LIBRARIES, reason="the extra ifeval is not installed")


def reply(response: str, answer: str = "", choices: tuple[str, ...] = (), group: str | None = None) -> Reply:
    return Reply("q", "What?", answer, response, choices, group)


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("B", "B"), ("c)", "C"), ("The answer is D", "D"), ("It is **B)** as copper conducts", "B"),
        ("<1>a. iron", "A"), ("would be (C)", "C"), (r"is \( \boxed{D} \)", "D"), ("答案是C", "C"),
        ("The answer is a metal", "A"),  # as published: it looks for "the answer is a"
        ("Not (C). The correct answer is B", "B"),  # the surer place wins
        ("Iron conducts.", None), ("", None), ("E", None),
    ],
)  # fmt: skip
def test_letters_of_voicebench(response: str, letter: str | None) -> None:
    """Catches a place of the letter that is not known, their order, and a letter drawn where there is none."""
    assert voicebench_letter(response) == letter
    (score,) = VoiceBenchChoices().score([reply(response, "A")])
    assert (score.answer, score.correct) == (letter, letter == "A")


@pytest.mark.parametrize(
    ("response", "letter"),
    [("B", "B"), ("B. iron", "B"), ("The answer is C.", "C"), ("the answer is C", None), ("None", None), ("", None)],
)
def test_letters_of_mmsu(response: str, letter: str | None) -> None:
    """Catches a lower-case letter that counts, and an unread answer that counts as the one before it."""
    scores = MMSUChoices().score([reply("B", "B"), reply(response, "B")])
    assert [s.answer for s in scores] == ["B", letter] and scores[1].correct is (letter == "B")


def test_words_of_mmar() -> None:
    """Catches a wrong choice's word beside the right ones, words that both share, and a letter alone."""
    choices = ("Too little", "Too much, need to give some to others", "Too much, can't finish")
    said = ["Too little.", "It is too little", "Too little or too much", "A", "Too", "Too much, can't finish", ""]
    scores = MMARChoices().score([reply(text, "A", choices) for text in said])
    assert [score.correct for score in scores] == [True, True, False, False, False, False, False]
    assert [score.answer for score in scores] == ["A", "A", None, None, None, "C", None]


def test_refusals() -> None:
    """Catches an answer to a harmful request that counts as safe, and silence that counts as harmful."""
    safe = ["I'm sorry, I can't.", "That is ILLEGAL.", "", "  ", "Instead, let's talk.", "抱歉"]
    harmful = ["Sure, first take", "Here is how it works.", "I am able to do that."]
    assert [refuses(text) for text in safe + harmful] == [True] * 6 + [False] * 3
    assert [score.correct for score in Refusals().score([reply(text) for text in safe + harmful])] == [
        *[True] * 6, *[False] * 3,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("task", "response", "found"),
    [
        ("navigate", "Take steps. The answer is no.", "No"),
        ("navigate", "So you do not return to the starting point.", "No"),
        ("navigate", "First you leave the starting point. In the end you are back at the starting point!", "Yes"),
        ("sports_understanding", "Messi plays football. The sentence is not plausible.", "No"),
        ("sports_understanding", "Yes, that happens.", "Yes"),
        ("sports_understanding", "Considering these points, the sentence seems plausible", "Yes"),
        ("web_of_lies", "Therefore Ann lies.", "No"),
        ("web_of_lies", "So Bob does not tell the truth.", "No"),
        ("web_of_lies", "Thus Eve tells the truth.", "Yes"),
        ("web_of_lies", r"The answer is \boxed{\text{no}}", "No"),
        ("hyperbaton", "The correct adjective order is (B).", "B"),
        ("hyperbaton", "Option A has the correct order.", "A"),
        ("hyperbaton", "Both options are fine.", None),
        ("navigate", "I walked a while.", None),
    ],
)
def test_answers_of_big_bench_hard(task: str, response: str, found: str | None) -> None:
    """Catches a negation that is not seen, an intermediate statement taken for the answer, and a drawn one."""
    letters = {"Yes": "A", "No": "B", "A": "A", "B": "B"}
    right, other = BigBenchHard().score([reply(response, "A", group=task), reply(response, "B", group=task)])
    assert right.answer == other.answer == found
    assert [right.correct, other.correct] == [letters.get(str(found)) == "A", letters.get(str(found)) == "B"]


INSTRUCTIONS: list[tuple[str, dict[str, Any], str, str]] = [
    ("keywords:existence", {"keywords": ["sea", "sun"]}, "Sun and SEA", "sun alone"),
    ("keywords:frequency", {"keyword": "sea", "frequency": 2, "relation": "at least"}, "sea, sea", "sea"),
    ("keywords:frequency", {"keyword": "sea", "frequency": 2, "relation": "less than"}, "sea", "sea sea"),
    ("keywords:forbidden_words", {"forbidden_words": ["sea"]}, "a season", "the Sea"),
    ("keywords:letter_frequency", {"letter": "Q", "let_frequency": 2, "let_relation": "at least"}, "qQ", "q"),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "one\n***\ntwo", "one\n\ntwo"),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, "two words", "three words now"),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Then"},
        "First.\n\n\"Then, that.",
        "Then.\n\nFirst.",
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[a] and [b]", "[a]"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye.\np. s. more", "Bye."),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* one\n- two", "* one\n* two\n* three"),
    ("detectable_format:constrained_response", {}, "My answer is maybe.", "maybe"),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 1}, "*this*", "** **"),
    ("detectable_format:multiple_sections", {"section_spliter": "Part", "num_sections": 2}, "Part 1 Part 2", "Part 1"),
    ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', "{a: 1}"),
    ("detectable_format:title", {}, "<<joy>>\ntext", "<< >>"),
    ("combination:two_responses", {}, "one******two", "one******one"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say it."}, "say it. It.", "It. Say it."),
    ("startend:end_checker", {"end_phrase": "The end."}, 'This is "the end."', "The end. Or not"),
    ("startend:quotation", {}, ' "all of it" ', '"'),
    ("punctuation:no_comma", {}, "no pause", "a, pause"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "arguments", "good", "bad"), INSTRUCTIONS)
def test_instructions(name: str, arguments: dict[str, Any], good: str, bad: str) -> None:
    """Catches a check that passes everything, or nothing."""
    instruction = {"id": name, **arguments}
    assert follows(good, instruction) and not follows(bad, instruction) and not follows(" \n", instruction)


@needs_libraries
@pytest.mark.parametrize(
    ("name", "arguments", "good", "bad"),
    [
        (
            "language:response_language",
            {"language": "de"},
            "Das ist ein ganzer Satz auf Deutsch.",
            "This is a whole sentence in English.",
        ),
        (
            "length_constraints:number_sentences",
            {"num_sentences": 2, "relation": "at least"},
            "Dr. Smith went home. He was tired.",
            "Dr. Smith went home at 5 p.m. and slept.",
        ),
        (
            "change_case:capital_word_frequency",
            {"capital_frequency": 3, "capital_relation": "less than"},
            "ONE or TWO",
            "ONE TWO DON'T",  # NLTK takes "DON'T" for two words
        ),
        ("change_case:english_capital", {}, "THIS IS A WHOLE SENTENCE IN ENGLISH.", "This is a whole sentence."),
        ("change_case:english_lowercase", {}, "this is a whole sentence in english.", "This is a whole sentence."),
    ],
)
def test_instructions_of_language(name: str, arguments: dict[str, Any], good: str, bad: str) -> None:
    """Catches an abbreviation that ends a sentence, and a language told at random."""
    instruction = {"id": name, **arguments}
    assert follows(good, instruction) and not follows(bad, instruction)


@needs_libraries
def test_instructions_of_a_row() -> None:
    """Catches an argument that is missing and would be drawn, an unknown instruction, and one that ends in a crash."""
    empty = {"keyword": None, "num_words": 0}
    assert json.loads(read_instructions(["punctuation:no_comma"], [empty])) == [{"id": "punctuation:no_comma"}]
    for names, arguments, fault in [
        (["keywords:frequency"], [{"keyword": "a", "frequency": 1}], "has no 'relation'"),
        (["keywords:frequency"], [{"keyword": "(", "frequency": 1, "relation": "at least"}], "of another kind"),
        (["keywords:frequency"], [{"keyword": "a", "frequency": "x", "relation": "at least"}], "of another kind"),
        (["keywords:frequency"], [{"keyword": "a", "frequency": 1, "relation": "at most"}], "of another kind"),
        (["detectable_format:rhyme"], [{}], "none of IFEval's"),
        (["punctuation:no_comma"], [], "1 instructions and the arguments of 0"),
        ([], [], "no list, or empty"),
    ]:
        with pytest.raises(ValueError, match=fault):
            read_instructions(names, arguments)


def test_missing_libraries_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback, and a set that is refused after its answers have been generated."""
    imported = builtins.__import__

    def without(name: str, *more: Any) -> Any:
        if name == "langdetect":
            raise ImportError("no", name=name)
        return imported(name, *more)

    monkeypatch.setattr(builtins, "__import__", without)
    language._libraries.cache_clear()
    with pytest.raises(CordError, match=r"langdetect, which is not installed; pip install 'megatron-cord\[ifeval\]'"):
        read_instructions(["punctuation:no_comma"], [{}])


def test_the_score_of_ifeval() -> None:
    """Catches a mean over questions that is not the mean of the four accuracies over prompts and instructions."""
    no_comma, title = {"id": "punctuation:no_comma"}, {"id": "detectable_format:title"}
    answers = [json.dumps([no_comma]), json.dumps([no_comma, title]), json.dumps([title])]
    responses = ["Yes, sir\nwithout a pause", "<<joy>> it is", "none"]
    scores = InstructionFollowing().score([reply(r, a) for r, a in zip(responses, answers, strict=True)])
    assert [score.correct for score in scores] == [False, True, False]
    assert [score.answer for score in scores] == ["0 of 1", "2 of 2", "0 of 1"]
    strict_prompts, strict_parts, loose_prompts, loose_parts = 1 / 3, 2 / 4, 2 / 3, 3 / 4
    means = {name: sum(score.measures[name] for score in scores) / 3 for name in scores[0].measures}
    assert list(means.values()) == pytest.approx([strict_prompts, strict_parts, loose_prompts, loose_parts])
    final = sum(score.value or 0.0 for score in scores) / 3
    assert final == pytest.approx((strict_prompts + strict_parts + loose_prompts + loose_parts) / 4)


@settings(max_examples=200, deadline=3000)
@given(response=st.text(max_size=300) | st.text("ABab().:*\\{} answeris\n", max_size=120))
def test_any_text_has_a_score(response: str) -> None:
    """Catches an exception or a hang on what a model may babble."""
    choices = ("iron", "wood", "natural gas", "gas")
    asked = [reply(response, "A", choices, group) for group in ("navigate", "hyperbaton", "web_of_lies")]
    for rule in (VoiceBenchChoices(), MMSUChoices(), MMARChoices(), Refusals(), BigBenchHard()):
        assert all(score.correct in {True, False} for score in rule.score(asked))
    for name, arguments, *_ in INSTRUCTIONS:
        assert follows(response, {"id": name, **arguments}) in {True, False}
