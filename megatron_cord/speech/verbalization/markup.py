"""Remove what formats a text: HTML tags and entities, Markdown, typographic quotes. Refuse what is no running text."""

from __future__ import annotations

import html
import re
import unicodedata

from megatron_cord.speech.verbalization.errors import UnspeakableError

_REFUSED = (
    (re.compile(r"```|~~~|^(?: {4}|\t)\S.*[;{}()=]", re.MULTILINE), "it contains code"),
    (re.compile(r"^\s*\|.*\|.*\|\s*$", re.MULTILINE), "it contains a table"),
    (re.compile(r"!\[[^\]]*\]\("), "it contains a picture"),
    (re.compile(r"~~\S"), "it contains struck-out text"),
    (re.compile(r"\[\^\w+\]"), "it contains a footnote"),
    (re.compile(r"\\begin\b|\\\\(?![A-Za-z])"), "it contains a LaTeX environment"),
)
_ADDRESS = re.compile(r"https?:|\bwww\.\w|\b\S+@\S+\.\w|\b\w+\.(?:com|org|net|edu|gov|html?)\b")
_REFUSED_TAGS = {
    "a picture": "img svg picture canvas video audio iframe object embed map",
    "code": "code pre kbd samp script style",
    "a table": "table tr td th thead tbody",
    "struck-out text": "s del strike",
    "a form": "input form button select textarea",
    "a formula in MathML": "math",
}
_REFUSED_TAG = {tag: what for what, tags in _REFUSED_TAGS.items() for tag in tags.split()}
_INLINE_TAGS = "b i u em strong span a font small big mark sup sub q cite abbr ins center"
_BLOCK_TAGS = "p div br hr ul ol li h1 h2 h3 h4 h5 h6 blockquote section article html body head header footer"
_INLINE, _BLOCK = set(_INLINE_TAGS.split()), set(_BLOCK_TAGS.split())
_SINGLE = {"br", "hr", "p", "li"}  # often stand without an end
_TAG = re.compile(r"<(/?)([A-Za-z][A-Za-z0-9]*)((?:\s+[\w:-]+\s*=\s*(?:\"[^\"<>]*\"|'[^'<>]*'|[^\s\"'<>]+))*\s*/?)>")
_ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,30});")
_EMPHASIS = (
    re.compile(r"(?<![\w*)])\*\*(?=[^\s*])(.+?)(?<=[^\s*])\*\*(?![\w*(])", re.DOTALL),
    re.compile(r"(?<![\w*)])\*(?=[^\s*])([^*\n]+?)(?<=[^\s*])\*(?![\w*(])"),
    re.compile(r"(?<![\w_])__(?=[^\s_])([^_]+?)(?<=[^\s_])__(?![\w_])"),
    re.compile(r"(?<![\w_}\\^])_(?=[^\s_])([^_\n]+?)(?<=[^\s_])_(?![\w_{])"),
    re.compile(r"(?<!`)`([^`\n]+)`(?!`)"),
)
_LINK = re.compile(r"(?<!!)\[([^\]\[]+)\]\((?:https?:|/|#|www\.)[^()\s]*(?:\s\"[^\"]*\")?\)")
_RULE = re.compile(r"(?m)^[ \t]*(?:(?:-[ \t]*){3,}|(?:\*[ \t]*){3,}|(?:=[ \t]*){3,})$")
_HEADING = re.compile(r"(?m)^\s*#{1,6}\s+(?=\S)")
_BULLET = re.compile(r"(?m)^[ \t]*(?:[*•>-][ \t]+(?=\S)|\+[ \t]+(?=[A-Za-z]))")
_NUMBER_AFTER_MARK = re.compile(r"(?m)^[ \t]*[*>-][ \t]+([\d.$(].*)$")
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_SAME = str.maketrans(
    {
        **dict.fromkeys("“”„«»", '"'),
        **dict.fromkeys("‘’", "'"),
        **dict.fromkeys("‐‑–", "-"),
        **dict.fromkeys("\u200b\ufeff\u00ad\u2060"),
        **dict.fromkeys("\u00a0\u2009\u202f\u2002\u2003", " "),
        "∕": "/",
        "⁄": "/",
        "∗": "*",
        "⋅": "·",
        "∙": "·",
        "µ": "μ",
        "…": "...",
        "º": "°",
        "℃": "°C",
        "℉": "°F",
    }
)


def without_markup(text: str) -> str:
    """Return the text without formatting; powers and indices become ``^(…)`` and ``_(…)``.

    Raises:
        UnspeakableError: something in it is no running text, or may or may not be markup.
    """
    if re.search(r"[\ue000-\uf8ff]", text):
        raise UnspeakableError("it contains characters for private use")
    text = unicodedata.normalize("NFC", text).translate(_SAME)
    for pattern, reason in _REFUSED:
        if pattern.search(text):
            raise UnspeakableError(reason)
    text = _LINK.sub(r"\1", _ENTITY.sub(_character, _without_tags(text)))
    if _ADDRESS.search(text):
        raise UnspeakableError("it contains an address")
    text = re.sub(r"°\s(?=[CF]\b)", "°", text)
    text = re.sub(r"[¼-¾⅐-⅞]", lambda m: f" {unicodedata.normalize('NFKC', m[0]).replace('⁄', '/')}", text)
    text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+", lambda m: f"^({m[0].translate(_SUPERSCRIPTS)})", text)
    text = re.sub(r"(?<![A-Z])[₀-₉]+", lambda m: f"_({m[0].translate(_SUBSCRIPTS)})", text).translate(_SUBSCRIPTS)
    text = _without_quotes(_without_markdown(text))
    return re.sub(r"\s+", lambda m: "\n" if "\n" in m[0] else " ", text)


def _without_tags(text: str) -> str:
    text = re.sub(r"<!--.*?-->", " ", text, flags=re.DOTALL)
    opened: list[str] = []

    def remove(match: re.Match[str]) -> str:
        end, name = match[1], match[2].lower()
        if name in _REFUSED_TAG:
            raise UnspeakableError(f"it contains {_REFUSED_TAG[name]}")
        if name not in _INLINE | _BLOCK:
            raise UnspeakableError(f"it contains the tag <{name}>")
        if name in _SINGLE or match[3].rstrip().endswith("/"):
            return "\n"
        if not end:
            opened.append(name)
        elif not opened or opened.pop() != name:
            raise UnspeakableError(f"its tag <{name}> may or may not be markup: it does not open and close in order")
        if name in {"sup", "sub"}:
            return ")" if end else "^(" if name == "sup" else "_("
        return "\n" if name in _BLOCK else ""

    text = _TAG.sub(remove, text)
    if opened:
        raise UnspeakableError(f"its tag <{opened[-1]}> may or may not be markup: it is not closed")
    return text


def _character(match: re.Match[str]) -> str:
    character = html.unescape(match[0])
    if character == match[0]:
        raise UnspeakableError(f"it contains the unknown entity {match[0]}")
    return character.translate(_SAME)


def _without_markdown(text: str) -> str:
    text = _HEADING.sub("", _RULE.sub("", text))
    marked = _NUMBER_AFTER_MARK.findall(text)
    if len(marked) == 1 or any(not re.search(r"[A-Za-z]{3,}", line) for line in marked):
        raise UnspeakableError("its line begins with a mark before a number, which may be a list or a sign")
    text = _BULLET.sub("", text)
    for _ in range(3):  # bold within italics within bold
        for pattern in _EMPHASIS:
            text = pattern.sub(r"\1", text)
    return re.sub(r"_{2,}|[□▢☐]|(?<![\w)}_])_(?![\w({_])", " blank ", text)


def _without_quotes(text: str) -> str:
    """Remove quotation marks; apostrophes stay. Refuse marks of feet, inches, minutes, seconds and derivatives."""
    text = re.sub(r"(?<!\w)'(?=\S)([^'\n]*)(?<=\S)'(?!\w)", r" \1 ", text)
    if re.search(r"[0-9]\s?['′]\s?[0-9]|[′″]|[0-9]'(?!\w)", text) or (
        text.count('"') % 2 and re.search(r'[0-9]\s?"', text)
    ):
        raise UnspeakableError("it contains a mark that may be feet, inches, minutes or seconds")
    if re.search(r"(?<![A-Za-z])[A-Za-z]'(?![A-Za-z])", text):
        raise UnspeakableError("it contains a mark that may be a derivative")
    text = re.sub(r"(?<!\w)'(?=\w)(?![0-9]0s)|(?<=[^\Ws])'(?!\w)", " ", text)
    if re.search(r"[0-9)]\s?—\s?[0-9(]", text):
        raise UnspeakableError("it contains a dash between values, which may be a minus or a range")
    return text.replace('"', " ").replace("`", " ").replace("—", ", ")
