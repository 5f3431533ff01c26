"""The entries of a view: parts of a sample, texts with parts in braces, and filters of recordings."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from string import Formatter

import numpy as np

from megatron_cord.data.audio.augmentation import add_noise, limit_band
from megatron_cord.data.choices import lettered
from megatron_cord.data.samples import Sample
from megatron_cord.errors import CordError

_TEXTS: Mapping[str, Callable[[Sample], str | None]] = {
    "text": lambda sample: sample.question,
    "instruction": lambda sample: sample.instruction,
    "system": lambda sample: sample.system,
    "choices": lambda sample: lettered(sample.choices),
    "answer": lambda sample: sample.answer,
    "solution": lambda sample: sample.solution,
    "voice": lambda sample: sample.voice,
}
_NOTES = "metadata."
_ENTRY = re.compile(r"(?P<part>[a-z]+(?:\.[^\s|?{}]+)?)(?P<optional>\?)?(?P<filters>(?:\s*\|[^|]*)*)")
_FILTER = re.compile(r"\s*\|\s*([a-z]+)\(\s*(-?[0-9.]+)\s*\)\s*")
_BOUNDS = {"noise": (-10.0, 100.0), "band": (500.0, 8000.0)}


@dataclass(frozen=True)
class Filter:
    """A change of recordings: `noise` with a signal-to-noise ratio in dB, or `band` with its upper end in Hz."""

    kind: str
    amount: float

    def apply(self, waveform: np.ndarray, rate: int, draw: str) -> np.ndarray:
        """Return a recording, float32 [samples], after the filter."""
        return (
            add_noise(waveform, self.amount, draw) if self.kind == "noise" else limit_band(waveform, self.amount, rate)
        )


@dataclass(frozen=True)
class Entry:
    """One entry of a turn.

    Attributes:
        pieces: literal texts, each with the part behind it; None for no part.
        optional: whether it is left out where a part lacks.
        is_audio: whether it stands for the turn with its recordings; it then has no pieces.
    """

    pieces: tuple[tuple[str, str | None], ...] = ()
    optional: bool = False
    is_audio: bool = False

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of its parts."""
        return ("audio",) if self.is_audio else tuple(part for _, part in self.pieces if part is not None)

    def missing(self, sample: Sample) -> str | None:
        """Return the first part that a sample lacks; None if it has all."""
        texts = () if self.is_audio else self.parts
        return next((part for part in texts if not (_text_of(sample, part) or "").strip()), None)

    def text(self, sample: Sample) -> str:
        """Return its text; "" where it is left out."""
        if self.missing(sample) is not None:
            return ""
        return "".join(
            literal + ("" if part is None else _text_of(sample, part) or "") for literal, part in self.pieces
        )


def read_entry(text: str) -> tuple[Entry, tuple[Filter, ...]]:
    """Read an entry as it is configured, with the filters of a recording.

    Raises:
        CordError: it cannot be understood.
    """
    match = _ENTRY.fullmatch(text.strip())
    if match is None:
        return Entry(_pieces(text)), ()
    filters = _filters(text, match["filters"])
    if match["part"] == "audio":
        if match["optional"]:
            raise CordError(f"{text!r}: every sample has audio; leave the ? out")
        return Entry(is_audio=True), filters
    if filters:
        raise CordError(f"{text!r}: filters are for audio")
    _check_part(match["part"], text)
    return Entry((("", match["part"]),), optional=match["optional"] is not None), ()


def _filters(text: str, written_filters: str) -> tuple[Filter, ...]:
    found = []
    for each in re.findall(r"\s*\|[^|]*", written_filters):
        match = _FILTER.fullmatch(each)
        kind = match[1] if match else ""
        if match is None or kind not in _BOUNDS:
            raise CordError(f"{text!r}: {each.strip(' |')!r} is no filter; there are noise(SNR) and band(HIGHEST)")
        least, most = _BOUNDS[kind]
        try:
            amount = float(match[2])
        except ValueError:
            raise CordError(f"{text!r}: {match[2]!r} is no number") from None
        if not least <= amount <= most:
            raise CordError(f"{text!r}: {kind} takes {least:g} to {most:g}")
        found.append(Filter(kind, amount))
    return tuple(found)


def _pieces(text: str) -> tuple[tuple[str, str | None], ...]:
    if not text.strip():
        raise CordError("a text of a view is empty; leave it out")
    try:
        parsed = list(Formatter().parse(text))
    except ValueError as error:
        raise CordError(f"{text!r}: {error}; write {{{{ and }}}} for braces") from None
    for _, part, form, conversion in parsed:
        if part is not None and (form or conversion):
            raise CordError(f"{text!r}: write a part alone into braces, such as {{answer}}")
        if part is not None:
            _check_part(part, text)
    return tuple((literal, part) for literal, part, _, _ in parsed)


def _check_part(part: str, text: str) -> None:
    if part == "audio":
        raise CordError(f"{text!r}: a recording cannot be in a text; make audio an entry of its own")
    if part not in _TEXTS and not (part.startswith(_NOTES) and len(part) > len(_NOTES)):
        known = ", ".join(["audio", *_TEXTS, f"{_NOTES}KEY"])
        raise CordError(
            f"{text!r}: {part!r} is no part of a sample; there are {known} (a text needs a space or a stop)"
        )


def _text_of(sample: Sample, part: str) -> str | None:
    if not part.startswith(_NOTES):
        return _TEXTS[part](sample)
    value = sample.metadata.get(part.removeprefix(_NOTES))
    return str(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else None
