"""Answers to VoiceBench's four tasks of BIG-Bench Hard: yes or no, or which of two sentences.

VoiceBench (arXiv 2410.17196, `src/evaluator/bbh.py`) has lists of whole phrases that the models it measured wrote, and
draws at random where none fits. Here are rules for what these phrases say, in the same order: what is called the
answer, then what the last sentence says of the matter, then a yes or no at the beginning or the end. What they cannot
read is wrong.
"""

from __future__ import annotations

import re

from megatron_cord.evaluation.rules.rule import EachByItself, Reply, Score
from megatron_cord.reward import extract_answer

#: The tasks by their part of a row's id, with the words that a statement about the matter has.
TASKS: dict[str, str | None] = {
    "sports_understanding": r"plausib|implausib|possible|likely|makes? sense|accurate|realistic",
    "navigate": r"start(?:ing|ed)? (?:point|position)|where (?:you|we|i)(?: have| ve| 've|’ve)? (?:started|began)",
    "web_of_lies": r"\btruth|\blie[sd]?\b|\blying\b",
    "hyperbaton": None,
}
_STATED = re.compile(
    r"\b(?:answer|conclusion)\b(?:[\s:,\"'*$\\{}]|\b(?:is|as|to|the|a|question|directly|simply|without|any|modification"
    r"|text|boxed|final|would be|should be|must be|therefore)\b)*\b(?P<said>yes|no|true|false)\b"
)
_NEGATED = re.compile(
    r"\b(?:not|cannot|never|no|fails?)\b|n['’ ]t\b|\bimplausib|\bimpossib|\bunlikely|\bunrealistic|\binaccurate"
)
_LIE = re.compile(r"\blie[sd]?\b|\blying\b")
_SENTENCE_END = re.compile(r"[.!?\n]+")
_OPTION = re.compile(r"\b(?:option|sentence|choice|for|be|the)\s+[(\[]?(?P<one>[ab])[)\]]?(?=\W|$)")
_RIGHT = re.compile(
    r"\b(?:correct|right|proper|typical|logical|better|closest|closer|general|standard|more|grammatical)"
)
_FILLER = "(?: directly| without any modification| the| in| provided in| found in)*"
#: "the correct adjective order is (a)", "answer is without any modification b": a sentence that ends in the option.
_IS_OPTION = re.compile(
    r"\b(?:answer|order|sentence|options?|one)\b(?: of adjectives| with the (?:correct )?adjectives?(?: order)?)*"
    rf"{_FILLER}"
    rf"(?: (?:is|are|would be|should be))*{_FILLER}(?: option| sentence)? [(\[]?(?:option )?(?P<one>[ab])[)\]]?\s*$"
)


def task_of(name: str) -> str | None:
    """Return the task that a row's id names; None for none of the four."""
    return next((task for task in TASKS if task in name), None)


def yes_or_no(response: str, task: str) -> str | None:
    """Return "Yes" or "No" as a response answers a task's question; None for neither."""
    text = response.lower().replace("**", " ").replace("<|turn_end|>", " ").replace("<|user|>", " ")
    if stated := [match["said"] for match in _STATED.finditer(text)]:
        return "Yes" if stated[-1] in ("yes", "true") else "No"
    matter = re.compile(TASKS[task] or "")
    about = [sentence for sentence in _SENTENCE_END.split(text) if matter.search(sentence)]
    if about:
        negated = _NEGATED.search(about[-1]) is not None
        said = negated == (_LIE.search(about[-1]) is not None) if task == "web_of_lies" else not negated
        return "Yes" if said else "No"
    words = re.findall(r"\w+", text)
    return next((word.capitalize() for word in (*words[:1], *words[-1:]) if word in ("yes", "no")), None)


def which_sentence(response: str) -> str | None:
    """Return "A" or "B" as a response chooses between two sentences; None for neither."""
    if found := extract_answer(response, choices=("", "")):
        return found
    sentences = [sentence.strip() for sentence in _SENTENCE_END.split(response.lower().replace("**", ""))]
    for sentence in sentences:
        if match := _IS_OPTION.search(sentence):
            return match["one"].upper()
    for sentence in sentences:
        named = {match["one"] for match in _OPTION.finditer(sentence)}
        if len(named) == 1 and _RIGHT.search(sentence) and not _NEGATED.search(sentence):
            return named.pop().upper()
    return None


class BigBenchHard(EachByItself):
    """BBH of VoiceBench; a reply's group is its task, its answer the letter of ("Yes", "No") or of the sentence."""

    def score_one(self, reply: Reply) -> Score:
        """Return the score of one reply."""
        if reply.group == "hyperbaton":
            found = which_sentence(reply.response)
            return Score(found, found == reply.answer)
        said = yes_or_no(reply.response, reply.group or "")
        return Score(said, said is not None and {"Yes": "A", "No": "B"}[said] == reply.answer)
