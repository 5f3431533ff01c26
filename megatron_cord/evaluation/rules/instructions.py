"""Instructions that a program can check: the 25 kinds of IFEval (arXiv 2311.07911), as VoiceBench uses them.

A row of the set names its instructions and their arguments; here they travel as the question's answer, in JSON.
Where IFEval draws an argument at random that a row leaves out, the row is refused. Sentences are counted by NLTK's
Punkt model, words in capitals by NLTK's tokenizer, and languages told by langdetect with a fixed seed; the three come
with the extra "ifeval".
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron_cord.evaluation.rules.language import capital_words, count_sentences, language_of, require_libraries

Arguments = Mapping[str, Any]
_FIXED_ANSWERS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


def _compares(count: int, relation: str, bound: int) -> bool:
    return count < bound if relation == "less than" else count >= bound


def _has_keywords(text: str, a: Arguments) -> bool:
    return all(re.search(word, text, re.IGNORECASE) for word in a["keywords"])


def _has_keyword_often(text: str, a: Arguments) -> bool:
    return _compares(len(re.findall(a["keyword"].strip(), text, re.IGNORECASE)), a["relation"], a["frequency"])


def _lacks_words(text: str, a: Arguments) -> bool:
    return not any(re.search(rf"\b{word}\b", text, re.IGNORECASE) for word in a["forbidden_words"])


def _has_letter_often(text: str, a: Arguments) -> bool:
    return _compares(text.lower().count(a["letter"].strip().lower()), a["let_relation"], a["let_frequency"])


def _has_paragraphs(text: str, a: Arguments) -> bool:
    parts = [bool(part.strip()) for part in re.split(r"\s?\*\*\*\s?", text)]
    return all(parts[1:-1]) and sum(parts) == int(a["num_paragraphs"])


def _paragraph_begins(text: str, a: Arguments) -> bool:
    parts = text.split("\n\n")
    count, number = sum(bool(part.strip()) for part in parts), a["nth_paragraph"]
    words = parts[number - 1].split() if number <= count else []
    first = re.match(r"[^.,?!'\"]*", words[0].lstrip("'").lstrip('"')) if words else None
    return first is not None and count == int(a["num_paragraphs"]) and first[0].lower() == str(a["first_word"]).lower()


def _has_postscript(text: str, a: Arguments) -> bool:
    marker = a["postscript_marker"].strip()
    known = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    return re.search(known.get(marker, marker.lower()), text.lower()) is not None


def _has_bullets(text: str, a: Arguments) -> bool:
    stars = re.findall(r"^\s*\*[^*].*$", text, re.MULTILINE)
    return len(stars) + len(re.findall(r"^\s*-.*$", text, re.MULTILINE)) == int(a["num_bullets"])


def _has_highlights(text: str, a: Arguments) -> bool:
    once = [part.strip("*") for part in re.findall(r"\*[^\n*]*\*", text)]
    twice = [part[2:-2] for part in re.findall(r"\*\*[^\n*]*\*\*", text)]
    return sum(bool(part.strip()) for part in once + twice) >= int(a["num_highlights"])


def _has_sections(text: str, a: Arguments) -> bool:
    return len(re.findall(rf"\s?{a['section_spliter'].strip()}\s?\d+\s?", text)) >= int(a["num_sections"])


def _is_json(text: str, a: Arguments) -> bool:
    text = text.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def _has_title(text: str, a: Arguments) -> bool:
    return any(title.lstrip("<").rstrip(">").strip() for title in re.findall(r"<<[^\n]+>>", text))


def _has_two_responses(text: str, a: Arguments) -> bool:
    parts = [part.strip() for part in text.split("******")]
    given = [part for part in parts if part]
    return all(parts[1:-1]) and len(given) == 2 and given[0] != given[1]


def _in_case(text: str, fits: bool) -> bool:
    return fits and language_of(text) in ("en", None)


#: By the names that rows use: the check, and the arguments that it needs.
_CHECKS: dict[str, tuple[Callable[[str, Arguments], bool], tuple[str, ...]]] = {
    "keywords:existence": (_has_keywords, ("keywords",)),
    "keywords:frequency": (_has_keyword_often, ("keyword", "frequency", "relation")),
    "keywords:forbidden_words": (_lacks_words, ("forbidden_words",)),
    "keywords:letter_frequency": (_has_letter_often, ("letter", "let_frequency", "let_relation")),
    "language:response_language": (lambda text, a: language_of(text) in (a["language"], None), ("language",)),
    "length_constraints:number_sentences": (
        lambda text, a: _compares(count_sentences(text), a["relation"], a["num_sentences"]),
        ("num_sentences", "relation"),
    ),
    "length_constraints:number_paragraphs": (_has_paragraphs, ("num_paragraphs",)),
    "length_constraints:number_words": (
        lambda text, a: _compares(len(re.findall(r"\w+", text)), a["relation"], a["num_words"]),
        ("num_words", "relation"),
    ),
    "length_constraints:nth_paragraph_first_word": (
        _paragraph_begins,
        ("num_paragraphs", "nth_paragraph", "first_word"),
    ),
    "detectable_content:number_placeholders": (
        lambda text, a: len(re.findall(r"\[.*?\]", text)) >= a["num_placeholders"],
        ("num_placeholders",),
    ),
    "detectable_content:postscript": (_has_postscript, ("postscript_marker",)),
    "detectable_format:number_bullet_lists": (_has_bullets, ("num_bullets",)),
    "detectable_format:constrained_response": (lambda text, a: any(given in text for given in _FIXED_ANSWERS), ()),
    "detectable_format:number_highlighted_sections": (_has_highlights, ("num_highlights",)),
    "detectable_format:multiple_sections": (_has_sections, ("section_spliter", "num_sections")),
    "detectable_format:json_format": (_is_json, ()),
    "detectable_format:title": (_has_title, ()),
    "combination:two_responses": (_has_two_responses, ()),
    "combination:repeat_prompt": (
        lambda text, a: text.strip().lower().startswith(a["prompt_to_repeat"].strip().lower()),
        ("prompt_to_repeat",),
    ),
    "startend:end_checker": (
        lambda text, a: text.strip().strip('"').lower().endswith(a["end_phrase"].strip().lower()),
        ("end_phrase",),
    ),
    "startend:quotation": (
        lambda text, a: len(text.strip()) > 1 and text.strip()[0] == text.strip()[-1] == '"',
        (),
    ),
    "change_case:capital_word_frequency": (
        lambda text, a: _compares(capital_words(text), a["capital_relation"], a["capital_frequency"]),
        ("capital_frequency", "capital_relation"),
    ),
    "change_case:english_capital": (lambda text, a: _in_case(text, text.isupper()), ()),
    "change_case:english_lowercase": (lambda text, a: _in_case(text, text.islower()), ()),
    "punctuation:no_comma": (lambda text, a: "," not in text, ()),
}


def read_instructions(names: Any, arguments: Any) -> str:
    """Return the instructions of a row as JSON: a list of {"id", its arguments}.

    Args:
        names: its `instruction_id_list`.
        arguments: its `kwargs`: a mapping for each; one without a value (null, 0, "") counts as not written, as in
            the published check.

    Raises:
        ValueError: what is wrong with them.
        CordError: the extra "ifeval" is not installed.
    """
    require_libraries()
    if not isinstance(names, (list, tuple)) or not names or not isinstance(arguments, (list, tuple)):
        raise ValueError("its 'instruction_id_list' or its 'kwargs' is no list, or empty")
    if len(names) != len(arguments):
        raise ValueError(f"it has {len(names)} instructions and the arguments of {len(arguments)}")
    instructions = []
    for name, given in zip(names, arguments, strict=True):
        if name not in _CHECKS:
            raise ValueError(f"its instruction {str(name)[:60]!r} is none of IFEval's")
        given = {key: value for key, value in given.items() if value} if isinstance(given, Mapping) else {}
        if missing := [needed for needed in _CHECKS[name][1] if needed not in given]:
            raise ValueError(f"its instruction {name} has no {missing[0]!r}")
        instruction = {"id": name} | {key: given[key] for key in _CHECKS[name][1]}
        if not _usable(instruction):
            raise ValueError(f"its instruction {name} has arguments of another kind: {str(given)[:80]}")
        instructions.append(instruction)
    return json.dumps(instructions, ensure_ascii=False)


def _usable(instruction: Arguments) -> bool:
    """Return whether an instruction can be checked: its arguments are of the kinds that the check takes."""
    relations = ("relation", "let_relation", "capital_relation")
    if any(instruction[key] not in ("less than", "at least") for key in relations if key in instruction):
        return False
    try:
        follows("A text.", instruction)
    except (TypeError, ValueError, AttributeError, IndexError, re.error):
        return False
    return True


def follows(text: str, instruction: Arguments) -> bool:
    """Return whether a text that is not empty follows one instruction.

    Raises:
        CordError: the extra "ifeval" is not installed.
    """
    return bool(text.strip()) and _CHECKS[instruction["id"]][0](text, instruction)


def variants(response: str) -> Sequence[str]:
    """Return the texts of which IFEval's loose score takes the best: with and without marks, first and last line."""
    lines = response.split("\n")
    cut = ["\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1])]
    return tuple(dict.fromkeys(text for part in (response, *cut) for text in (part, part.replace("*", ""))))
