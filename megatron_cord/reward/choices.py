"""Multiple choice: the letter that a response decides on.

A response that names no choice, or two of them, decides on none. Responses may be any text: nothing here raises, and
every length is bounded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from megatron_cord.data.choices import LETTERS
from megatron_cord.reward.agreement import same_answer
from megatron_cord.reward.finding import last_value
from megatron_cord.reward.stated import LONGEST_TEXT, first_sentence, stated_answer
from megatron_cord.reward.wording.notation import normalized

_EMPHASIS = re.compile(r"(?<![\w)*`])[*`]{1,3}(?=\S)|(?<=\S)[*`]{1,3}(?![\w(])|(?<!\w)_{1,3}(?=\w)|(?<=\w)_{1,3}(?!\w)")
_STATED = re.compile(
    r"\b(?:(?:right|correct|best|final|my)\s+(?:option|choice|one)|(?:option|choice))\s*"
    r"(?:is|would be|must be|:)\s*:?\s*(?=([^\n]*))",
    re.IGNORECASE,
)
# What may stand before a letter that is an answer, and what behind one.
_BEFORE = (
    r"\W{0,8}(?:(?i:the|my|correct|right|best|final)\s+)*"
    r"(?:(?i:option|choice|answer|letter)\s*(?i:is\b)?[\s:]*)?\W{0,8}"
)
_REASON = r"(?:because|since|as|is|for|due|being|was|would|seems|has|not|which|given)\b"
_LONE = re.compile(rf"{_BEFORE}([A-Ja-j])\W*")
_OPTION = re.compile(r"\W{0,8}(?i:(?:the\s+)?(?:option|choice))\s+\(?([A-Ja-j])\b\W*(?P<rest>.*)", re.DOTALL)
_MARKED = re.compile(
    rf"{_BEFORE}(?:([A-J])\s*(?:[).:,;\]]|[-–—=]\s|\s[-–—=])|([a-j])\s*[).:\]](?=\s)|\(([A-J])\W)\W*(?P<rest>\S.*)",
    re.DOTALL,
)
_REASONED = re.compile(rf"{_BEFORE}([A-J])\s+(?P<rest>\S.*)", re.DOTALL)
# A letter in the midst of a text; "A" and "I" are words, too, unless something marks them.
_MENTION = re.compile(
    r"\(([A-Ja-j])\)|\b(?:[Oo]ption|[Cc]hoice|[Aa]nswer)\s*:?\s*(?:is\s+)?\(?([A-J]|[a-j](?=\)))\b(?!')"
    r"|\b(?:[Oo]ption|[Cc]hoice)\s+([b-hj])\b(?!')"
    r"|(?<![\w'.])([B-HJ])(?![\w'])(?!\.\s?[A-Z]\.)"
    r"|(?<![\w'.])([AI])(?=\s*(?:[,.;:)!?*]|$|(?:and|or|nor|is|are|was|because|since|over|not|rather|instead)\b))(?!\.\s?[A-Z]\.)"
)
_MARKED_MENTION = re.compile(r"\([A-J]\)|\b(?:option|choice|answer)\b", re.IGNORECASE)
_ANOTHER = re.compile(
    r"(?:(?:or|and|nor|to|/|&|,)\W+)*(?:(?:option|choice|maybe|perhaps)\W+)*\(?(?:[A-J](?![\w'])|[a-j]\))"
)
_REJECTED = re.compile(
    r"\b(?:not|no|never|neither|nor|wrong|incorrect|false|eliminated?|exclude[sd]?|rules?|ruled|cannot|unlike|except|"
    r"instead\s+of|rather\s+than)\b|n't\b|\bover(?=\s+(?:option\s+)?\(?[b-j]\b)",
    re.IGNORECASE,
)
_DENIED = re.compile(
    r"\b(?:not|never|neither|nor|wrong|incorrect|false|cannot|(?:instead|rather)\s+(?:of|than))\b|n't\b", re.I
)
_INSTEAD = re.compile(
    r",?\s+(?:and\s+)?(?:not|rather\s+than|instead\s+of|unlike|over(?=\s+(?:option\s+)?\(?[a-j]\b))\s", re.IGNORECASE
)
_CLAUSE_END = re.compile(r"(?<=[.;!?])\s+|\n+|,?\s+(?=(?:but|so|hence|thus|therefore|while|whereas)\b)", re.IGNORECASE)
_CONCLUSION = re.compile(r"\W*(?:so|thus|hence|therefore|finally|in conclusion|final answer)\b", re.IGNORECASE)
_SYMBOLS = re.compile(r"[+=^*<>\\_]|\w-\d|\d[-/]\w")
_SEVERAL = "several"


def chosen_letter(response: str, choices: Sequence[str]) -> str | None:
    """Return the letter of the choice that a response decides on; None for none, or for several.

    In this order: what it states as its answer (a box, `<answer>`, `####`, "the answer is", "the right choice is"), as
    a letter or as a choice's text; a letter that it begins with; the letters that it names and does not reject; the
    one choice whose text it contains.

    Args:
        response: any text.
        choices: the texts behind the letters; an empty one is not known, and its letter alone counts.
    """
    response = _EMPHASIS.sub("", response[-LONGEST_TEXT:]).strip()
    for stated in _stated(response):
        if letter := _decided(stated, choices):
            return None if letter == _SEVERAL else letter
    first_line = response.split("\n", 1)[0]
    begun = first_sentence(first_line) if _MARKED.match(first_line[:40]) else first_line
    rejects = _REJECTED.search(begun) and not _accepted(_CLAUSE_END.split(begun)[0])
    if not rejects and (letter := _decided_by_name(begun, choices)) and letter != _SEVERAL:
        return letter
    named, marked = _named(response)
    decided = named[0] if len(named) == 1 and named[0] in LETTERS[: len(choices)] else None
    if named and marked:
        return decided
    return (
        _letter_by_accepted_text(response, choices) or _letter_by_value(last_value(response) or "", choices) or decided
    )


def letter_of(answer: str, choices: Sequence[str]) -> str | None:
    """Return the letter that a final answer means, given as a letter or as a choice's text; None for neither."""
    letter = _decided(_EMPHASIS.sub("", answer), choices)
    return None if letter == _SEVERAL else letter


def affirms(text: str, phrase: str) -> bool:
    """Return whether the text contains the phrase in a clause that neither denies it nor offers another beside it."""
    offered = re.compile(rf"\bor\s+(?:the\s+|an?\s+)?{re.escape(phrase)}\b|\b{re.escape(phrase)}\s+or\b", re.IGNORECASE)
    return any(
        contains_phrase(clause, phrase)
        and not offered.search(clause)
        and (not _DENIED.search(clause) or bool(_REJECTED.search(phrase)))
        for clause in _CLAUSE_END.split(text)
    )


def contains_phrase(text: str, phrase: str) -> bool:
    """Return whether the phrase's words follow each other in the text, whatever its case and punctuation.

    Of an expression every character but spaces counts: "x-1" is not in "x+1".
    """
    if _SYMBOLS.search(phrase):
        compact = re.escape("".join(phrase.casefold().split()))
        edges = r"[\w+\-−*/^=<>]"
        return bool(
            re.search(rf"(?<!{edges}){compact}(?!{edges}|\.\d)", re.sub(r"(?<=\W)\s+|\s+(?=\W)", "", text.casefold()))
        )
    words = _words(phrase)
    return bool(words) and f" {words} " in f" {_words(text)} "


def _stated(response: str) -> Iterator[str]:
    if stated := stated_answer(response):
        yield stated
    for match in reversed(list(_STATED.finditer(response))):
        yield first_sentence(match[1])


def _decided(answer: str, choices: Sequence[str]) -> str | None:
    """Return the letter that a final answer means, `_SEVERAL` for more than one, None for none."""
    if letter := _letter_alone(answer, choices):
        return letter
    written = normalized(answer).casefold()
    same = [i for i, choice in enumerate(choices) if choice and normalized(choice).casefold() == written]
    if len(same) == 1:
        return LETTERS[same[0]]
    return (
        _decided_by_name(answer, choices)
        or _letter_by_value(answer, choices)
        or _letter_by_accepted_text(answer, choices)
    )


def _decided_by_name(answer: str, choices: Sequence[str]) -> str | None:
    """Return the letter that an answer begins with, whatever follows it: "option B", "B - wood", "B because …"."""
    if letter := _letter_alone(answer, choices):
        return letter
    answer = normalized(answer)
    for pattern in (_OPTION, _MARKED, _REASONED):
        if match := pattern.fullmatch(answer):
            letter, rest = next(group for group in match.groups() if group).upper(), match["rest"]
            if _continues(answer[: match.start("rest")], rest):
                return _SEVERAL
            article = pattern is _REASONED and letter in "AI"
            if letter in LETTERS[: len(choices)] and (
                not article or re.match(_REASON, rest) or _begins(rest, choices, letter)
            ):
                return letter
    return None


def _letter_alone(answer: str, choices: Sequence[str]) -> str | None:
    match = _LONE.fullmatch(normalized(answer))
    letter = match[1].upper() if match else ""
    return letter if letter and letter in LETTERS[: len(choices)] else None


def _continues(front: str, rest: str) -> bool:
    """Return whether another letter is named beside the first: "C or D", "B, C"."""
    joint = re.search(r"[,/&]\W*$", front) or re.match(r"(?:or|and|nor|to)\b|[/&,]", rest)
    return joint is not None and _ANOTHER.match(rest) is not None


def _begins(rest: str, choices: Sequence[str], letter: str) -> bool:
    words = _words(choices[LETTERS.index(letter)])
    return bool(words) and f"{_words(rest)} ".startswith(f"{words} ")


def _named(response: str) -> tuple[list[str], bool]:
    """Return the letters that a response names without rejecting them, and whether they decide.

    Of several clauses the last one that concludes ("So D.") counts alone, else the last with a letter marked as a
    choice ("(B)"); these decide.
    """
    found: list[tuple[list[str], bool, bool]] = []
    for clause in _CLAUSE_END.split(response):
        mentions = _accepted(clause)
        named = list(dict.fromkeys(next(group for group in match.groups() if group).upper() for match in mentions))
        if named:
            marked = any(_MARKED_MENTION.match(match[0]) for match in mentions)
            found.append((named, marked, bool(_CONCLUSION.match(clause))))
    for kind in (2, 1):
        if of_kind := [entry for entry in found if entry[kind]]:
            return of_kind[-1][0], True
    return list(dict.fromkeys(letter for named, *_ in found for letter in named)), False


def _accepted(clause: str) -> list[re.Match[str]]:
    """Return the mentions of a clause that rejects nothing, or those before what it rejects ("B, not C")."""
    mentions = list(_MENTION.finditer(clause))
    if not mentions or clause.rstrip().endswith("?"):
        return []
    rejected = list(_REJECTED.finditer(clause))
    if not rejected:
        return mentions
    instead = _INSTEAD.search(clause)
    if instead is None or rejected[0].start() < instead.start() or rejected[-1].end() > instead.end():
        return []
    return [match for match in mentions if match.end() <= instead.start()]


def _letter_by_value(answer: str, choices: Sequence[str]) -> str | None:
    """Return the letter of the only choice that means the same as a free answer: "0.5" for "1/2"."""
    same = [i for i, choice in enumerate(choices) if choice and same_answer(answer, choice)]
    return LETTERS[same[0]] if len(same) == 1 else None


def _letter_by_accepted_text(text: str, choices: Sequence[str]) -> str | None:
    """Return the letter of the only choice in the clauses that deny nothing: "It is not wood" names none.

    A choice that denies something itself ("No", "not valid") may be anywhere.
    """
    clauses = [clause for clause in _CLAUSE_END.split(text) if not _DENIED.search(clause)]
    if letter := _letter_by_text("\n".join(clauses), choices):
        return letter
    letter = _letter_by_text(text, choices)
    return letter if letter and _REJECTED.search(choices[LETTERS.index(letter)]) else None


def _letter_by_text(text: str, choices: Sequence[str]) -> str | None:
    """Return the letter of the only choice whose text is in the response.

    Of two where one holds the other ("gas", "natural gas"), the longer counts.
    """
    found = [i for i, choice in enumerate(choices) if choice and contains_phrase(text, choice)]
    longest = [i for i in found if not any(i != k and contains_phrase(choices[k], choices[i]) for k in found)]
    return LETTERS[longest[0]] if len(longest) == 1 else None


def _words(text: str) -> str:
    """Return words and whole numbers: "1.5" holds no "5", and "-5" is not "5"."""
    return " ".join(re.findall(r"(?:(?<!\w)[-−])?\d+(?:[.,:/]\d+)*|\w+", text.casefold())).replace("−", "-")
