"""Multiple choice by the rules of VoiceBench, MMSU and MMAR, decision for decision; what they cannot read is wrong.

Sources: `src/evaluator/mcq.py` of VoiceBench (arXiv 2410.17196), `mmsu_evaluation.py` of MMSU (arXiv 2506.04779), and
`code/evaluation.py` of MMAR (arXiv 2505.13032). They differ here in what has no answer: VoiceBench draws a letter at
random, MMSU leaves the question out of the accuracy (or takes the letter of the question before it).
"""

from __future__ import annotations

import re

from megatron_cord.evaluation.rules.rule import EachByItself, Reply, Score

_LETTERS = "abcd"
_TAGS = ("<1>", "<2>", "<3>")  # that some speech models begin with

#: VoiceBench's places of a letter, the surest first: what stands before it, and each text that may follow it. The first
#: place at which any letter stands decides, and of several letters there the first of the alphabet.
_PLACES: tuple[tuple[str, ...], ...] = (
    ("答案是", ""), ("答案是 ", ""), ("答案是选项", ""),
    ("答案应该是", ""), ("答案应该是 ", ""), ("答案就是选项", ""), ("答案是‘", ""),
    ("是", "："),
    ("答案选", ""), ("", "是正确"), ("选项", "是最合适的"), ("answer is: **", ""), ("answer is **", ""),
    ("the answer to the question is: **", ""), ("the answer to the multiple-choice question is **", ""),
    ("the answer is '", "'"), ("", " is the best answer"), ("the answer is ", ""), ("the correct answer is ", ""),
    ("would select ", ""), ("would choose ", ""), ("would select option ", ""), ("would choose option ", ""),
    ("is \"", "\"", "."), ("is: **", ")"), ("is **", ",", ":", ")"), ("is: **", ".", ":"), ("is **", "."),
    ("be **", ","), ("is: **", "**"), ("is therefore option **", ":"), ("is: \n\n**", ")"), ("as **", ":"),
    ("be **", ")", ":"), ("is: \n\n**", "**"), ("suggests **", ")"), ("be option **", ":"), ("with **", ")"),
    ("is typically \"", ")"), ("be to **", ")"), ("is: \n\n", ")"), ("is likely to be: **", "."), ("is **", " ("),
    ("is option **", "**"), ("is likely **", "**"), ("is:\n**", "."), ("is:\n\n**", "."), ("would be ", ""),
    ("would be option ", ""), ("would be (", ")"), ("would be option (", ")"), ("is ", ","),
    ("is typically ", ",", "."), ("i'd say ", "."), ("option ", ".", ":", ","), ("the answer is:\n**", ""),
    ("is ", ":", "."), ("is: ", "."), ("is (", ")"), ("is:\n**", ")"), ("is likely **", ":"), ("is the **", ")"),
    (":\n", ".", ")", ","), (": \n", "."), (":  \n", "."), (":\n\n", ".", ")"), ("is most likely **", ":"),
    (":\n\n", ","), (": \n\n", "."), ("(", ") would be"), ("is ", ")"), ("is: ", ")"), ("is:\n\n", ":"),
    ("is: **", ","), ("(option ", ")"), ("select option \"", "\""), ("is: ", ""), ("is typically **", ","),
    ("is **", "**"), ("is likely '", "'"), ("is option '", "'"), ("is:\n**", ":"), ("is \\( \\boxed{", " "),
    ("would be '", "'"), ("is the **", "** "), ("question is ", " ("), ("is:\n\n**", ")"),
    ("closest to option **", "**"), ("is most likely **", ")"), ("the answer to the question is '", "'"),
    ("known as '", "'"), ("is '", ")"), ("is typically **", ":"), ("is \\( \\boxed{\\text{", "}} \\)"),
    ("is \\( \\text{", ") }", "} \\)", ":", ")"), ("is \\(\\text{", "."), ("is:\n\n**", ""),
    ("is \\( \\text{", ".}", "."), ("is \\( \\boxed{", "}"), ("is:\n\\[ \\boxed{\\text{", "}}"),
    ("is:\n\\[ \\text{", ")"), ("is:\n\n\\[ \\text{", ")"), ("is \\( \\textbf{", ")"), ("is \\( \\text{", "}"),
    ("is: \\( \\text{", "."), ("corresponds to:\n- **", ":"), ("would be: **", "**."), ("is \\( ", " \\)"),
    ("is:\n**", " "), ("corresponds to option **", "**"), ("be **", "**"), ("be: \n\n", ")"),
    ("is:\n\\[ \\boxed{", "}"), ("is:  \n**", ":"), ("is: \\( \\text{", ")"), ("is likely: **", ","),
    ("is } \\mathbf{", "."), ("is \\( \\boxed{", ")"), ("is \\( \\textbf{", "}"), ("is \\(", "\\)"),
    ("is:\n  \n**", ":"), ("is option **", " "), ("is:\n\\( \\textbf{", "."), ("is \\( \\mathbf{", "}"),
    ("was option **", "**"), ("is likely \"", ")"), ("option **", ":"), ("is \"", ")"), ("is most likely **", ","),
    ("is often **", ":"), ("is:  \n", ")"), (" ", ".", ",", ":", ")"), ("**", ".", ")"), ("\"", ".", ",", ":"),
    ("(", ")"), ("\"", "\""),
)  # fmt: skip
_MARKS = tuple(
    (before + letter + after, letter)
    for before, *afters in _PLACES
    for after in afters
    for letter in _LETTERS
)  # fmt: skip
_FOLLOWED = ".,:)"  # a letter with one of them begins an answer


def _letter(reply: Reply, found: str | None) -> Score:
    return Score(found, found == reply.answer)


def voicebench_letter(response: str) -> str | None:
    """Return the letter that VoiceBench reads in a response; None where it would draw one."""
    text = response.lower()
    if text.startswith(_TAGS):
        text = text[3:].strip()
    for mark, letter in _MARKS:
        if mark in text:
            return letter.upper()
    for letter in _LETTERS:
        if text == letter or (text[:1] == letter and text[1:2] in tuple(_FOLLOWED)):
            return letter.upper()
    return None


def mmsu_letter(response: str) -> str | None:
    """Return the letter that MMSU reads: a capital at the beginning, else in the last place but one; None for none."""
    text = response.strip().replace("\n", "")
    if text == "None":
        return None
    return next((letter for letter in (text[:1], text[-2:-1]) if letter and letter in "ABCD"), None)


def mmar_matches(response: str, right: str, choices: tuple[str, ...]) -> bool:
    """Return whether a response has all words of the right choice, and none that wrong choices alone have."""
    said, expected = _words(response), _words(right)
    others = set().union(*(_words(choice) - expected for choice in choices if _words(choice) != expected))
    return bool(said) and expected <= said and said.isdisjoint(others)


def _words(text: str) -> set[str]:
    return set(re.findall(r"\b\w+\b", text.lower()))


class VoiceBenchChoices(EachByItself):
    """OpenBookQA and MMSU of VoiceBench."""

    def score_one(self, reply: Reply) -> Score:
        """Return the score of one reply."""
        return _letter(reply, voicebench_letter(reply.response))


class MMSUChoices(EachByItself):
    """MMSU."""

    def score_one(self, reply: Reply) -> Score:
        """Return the score of one reply."""
        return _letter(reply, mmsu_letter(reply.response))


class MMARChoices(EachByItself):
    """MMAR. The answer found is the one choice that the response matches."""

    def score_one(self, reply: Reply) -> Score:
        """Return the score of one reply."""
        matched = [
            letter
            for letter, choice in zip("ABCDEFGHIJ", reply.choices, strict=False)
            if mmar_matches(reply.response, choice, reply.choices)
        ]
        return Score(matched[0] if matched else None, reply.answer in matched)
