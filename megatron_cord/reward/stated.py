"""What a solution calls its final answer: a box, `####`, or "the answer is"."""

from __future__ import annotations

import re

LONGEST_TEXT = 8192  #: characters, from the end, where the answer stands
LONGEST_ANSWER = 200
_PHRASE = re.compile(r"\banswer\s*(?:is|:|=)\s*:?\s*(?=([^\n]*))", re.IGNORECASE)
_SENTENCE_END = re.compile(r"\s*[.!?;](?:\s|$)")


def stated_answer(text: str) -> str | None:
    r"""Return the answer behind ``\boxed{…}``, else ``####``, else "the answer is"; the last of its kind."""
    text = text[-LONGEST_TEXT:]
    if boxed := _last_boxed(text):
        return boxed
    if "####" in text and (marked := text.rsplit("####", 1)[1].strip().split("\n")[0].strip()):
        return marked[:LONGEST_ANSWER]
    phrases = [
        phrase
        for match in _PHRASE.finditer(text)
        if (phrase := _SENTENCE_END.split(match[1], maxsplit=1)[0].strip(" *"))
    ]
    return phrases[-1][:LONGEST_ANSWER] if phrases else None


def states_answer(text: str) -> bool:
    """Return whether a solution states which answer is its final one."""
    return stated_answer(text) is not None


def _last_boxed(text: str) -> str | None:
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for position in range(start + len("\\boxed"), len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start + len("\\boxed{") : position].strip()[:LONGEST_ANSWER] or None
    return None
