"""What a solution calls its final answer: a box, `<answer>`, `####`, or "the answer is"."""

from __future__ import annotations

import re

LONGEST_TEXT = 8192  #: characters, from the end, where the answer stands
LONGEST_ANSWER = 200  #: characters; what is longer is cut, and ends in "…"
_TAGGED = re.compile(r"<answer>\s*(.*?)\s*</answer>", re.IGNORECASE | re.DOTALL)
_PHRASE = re.compile(
    r"\banswer[*_]{0,3}\s*(?:is|would be|must be|should be|will be|:|=)[*_]{0,3}\s*:?\s*(?=([^\n]*))", re.IGNORECASE
)
_FILLER = re.compile(
    r"(?:(?:therefore|thus|then|simply|just|clearly|definitely|exactly|indeed|approximately|about|around|roughly)\b,?\s*)+",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"[!?;](?=\s|$)|(?P<stop>\.)[\"'”*_)]{0,3}(?=\s|$)")
# Full stops that end no sentence: those of initials from the start on ("J. K. Rowling"), of titles, of "9 a.m. or".
_INITIALS = re.compile(r"\W{0,4}(?:[A-Z]\.\s*){0,4}[A-Z]")
_TITLE = re.compile(r"\b(?:Dr|Mr|Mrs|Ms|Prof|St|Mt|Ft|vs|approx)$")
_DOTTED = re.compile(r"\b[A-Za-z]\.\s?[A-Za-z]$")
_REASON = re.compile(r"[\s,(–—-]+(?:because|since)\b|,\s+(?:as|which|so|where|that is|i\.e\.)\s", re.IGNORECASE)


def stated_answer(text: str) -> str | None:
    r"""Return the last answer in ``\boxed{…}``, else in ``<answer>``, else behind ``####`` or "the answer is".

    Of a sentence, the answer is what comes before its reason.
    """
    text = text[-LONGEST_TEXT:]
    if boxed := _last_boxed(text):
        return _cut(boxed)
    if tagged := [match[1] for match in _TAGGED.finditer(text) if match[1]]:
        return _cut(tagged[-1])
    if "####" in text and (marked := text.rsplit("####", 1)[1].strip().split("\n")[0].strip()):
        return _cut(marked)
    for match in reversed(list(_PHRASE.finditer(text))):
        if phrase := first_sentence(match[1]):
            return _cut(_without_reason(phrase))
    return None


def states_answer(text: str) -> bool:
    """Return whether a solution states which answer is its final one."""
    return stated_answer(text) is not None


def first_sentence(text: str) -> str:
    """Return what stands before the end of the first sentence, without emphasis."""
    text = text[match.end() :] if (match := _FILLER.match(text)) else text
    for match in _SENTENCE_END.finditer(text):
        if not (match["stop"] and _goes_on(text[: match.start()], text[match.end() :].lstrip())):
            return text[: match.start()].strip(" *_")
    return text.strip(" *_")


def _goes_on(before: str, after: str) -> bool:
    """Return whether a sentence goes on behind a full stop."""
    if not after:
        return False
    if _INITIALS.fullmatch(before[:20]) and len(before) <= 20:
        return True
    before = before[-8:]
    return bool(
        _TITLE.search(before)
        or (re.search(r"\bNo$", before) and after[0].isdigit())
        or (_DOTTED.search(before) and after[0].islower())
    )


def _without_reason(sentence: str) -> str:
    match = _REASON.search(sentence)
    return sentence[: match.start()].strip(" *_") or sentence if match else sentence


def _cut(answer: str) -> str:
    return answer if len(answer) <= LONGEST_ANSWER else f"{answer[: LONGEST_ANSWER - 1]}…"


def _last_boxed(text: str) -> str | None:
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for position in range(start + len("\\boxed"), len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start + len("\\boxed{") : position].strip() or None
    return None
