"""Rows of recordings, checked: which fields they have, and which recordings they refer to; nothing is decoded here."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_cord.data.choices import ChoicesError, read_choices
from megatron_cord.data.fields import NOTES, find_surrogate, find_unused, listed
from megatron_cord.data.question_files import Reject
from megatron_cord.data.samples import Sample
from megatron_cord.data.turns import TurnsError, read_turns, turns_json
from megatron_cord.errors import CordError
from megatron_cord.runtime.files import fingerprint
from megatron_cord.speech.recordings.audio import Recorded, RecordedAddress, RecordedBytes, RecordedFile
from megatron_cord.speech.recordings.config import FIELDS, RecordingSetConfig
from megatron_cord.speech.recordings.seen_ids import SeenIds
from megatron_cord.speech.recordings.sources.source import Source

_TEXTS = ("answer", "solution", "voice", "system", "instruction", "language")
_LONGEST_ID = 120
_SHOWN = 60  # characters of what is refused


@dataclass(frozen=True)
class Recording:
    """One usable row.

    Attributes:
        sample: without its audio.
        recorded: its recordings, by number.
        language: of its transcript, as stated; None if unknown.
        notes: for the sample's "metadata".
    """

    sample: Sample
    recorded: tuple[Recorded, ...]
    language: str | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def texts(self) -> list[Any]:
        """What stands in the row beside recordings and notes, as JSON values."""
        sample = self.sample
        texts = [sample.id, sample.question, sample.answer, sample.solution, sample.voice, list(sample.choices)]
        prompt = [sample.instruction, sample.system, turns_json(sample.turns), self.language]
        return [*texts, *prompt]

    @property
    def identity(self) -> str:
        """Stands for everything that decides about the sample."""
        audio = [recorded.identity for recorded in self.recorded]
        return json.dumps([*self.texts, audio, dict(self.notes)], default=str)


class _UnusableError(ValueError):
    """The reason why a row is left out."""


def checked_rows(source: Source, config: RecordingSetConfig, seen: SeenIds) -> Iterator[Recording | Reject]:
    """Read the rows of a source, each a usable one or the reason why it is none.

    Args:
        source: of the rows.
        config: names of fields, and the language.
        seen: ids of the rows before; those that are read are added.

    Raises:
        CordError: a row has a field that nothing uses, or the source is damaged as a whole.
    """
    ours = {config.fields.get(name, name): name for name in FIELDS}
    for place, row in source.rows():
        if isinstance(row, Reject):
            yield row
            continue
        if (unused := find_unused(row, ours, ignored=config.ignore_fields, how="--ignore-fields")) is not None:
            raise CordError(f"{source.name}, {place}: {unused}; what is complete is kept")
        named = {ours[name]: value for name, value in row.items() if name in ours}
        name = place.replace(" ", "-") if named.get("id") is None else str(named["id"])
        if not seen.add(safe_id(name)):
            yield Reject(name[:_LONGEST_ID], "its id comes twice")
            continue
        try:
            yield _recording(name, named, row.get(NOTES), source.root, config.language)
        except (_UnusableError, ChoicesError, TurnsError) as error:
            yield Reject(name[:_LONGEST_ID], str(error))


def safe_id(name: str) -> str:
    """Return an id with an underscore for each character that a sample's file name cannot have."""
    return re.sub(r"[^A-Za-z0-9_+-]", "_", name)[:_LONGEST_ID]


def rows_fingerprint(rows: tuple[Recording | Reject, ...]) -> str:
    """Return what stands for some rows in a receipt."""
    return fingerprint(r.identity if isinstance(r, Recording) else f"{r.id}\0{r.reason}" for r in rows)


def _recording(name: str, row: Mapping[str, Any], notes: Any, root: Path | str, language: str | None) -> Recording:
    metadata = _metadata(notes)
    if not 0 < len(name) <= _LONGEST_ID:
        raise _UnusableError(f"its id has other than 1 to {_LONGEST_ID} characters ({len(name)})")
    if (safe := safe_id(name)) != name:
        metadata["id"] = name
    texts = {field_name: _text(row, field_name) for field_name in _TEXTS}
    stated = texts.pop("language") or language
    choices: tuple[str, ...] = ()
    if row.get("choices") is not None:
        read = read_choices(row["choices"])
        choices = read.texts
        texts["answer"] = None if row.get("answer") is None else read.letter_of(row["answer"])
    if stated is not None:
        metadata["language"] = stated
    if row.get("turns") is not None:
        sample, recorded = _conversation(safe, row, root, texts, choices)
    else:
        question = row.get("question")
        if not isinstance(question, str) or not question.strip():
            raise _UnusableError(f"it has no transcript, its 'question' (its fields: {listed(row)})")
        if row.get("audio") is None:
            raise _UnusableError(f"it has no recording, its 'audio' (its fields: {listed(row)})")
        sample = Sample(id=safe, question=question.strip(), choices=choices, **texts)  # type: ignore[arg-type]
        recorded = (_recorded(row["audio"], root, "its 'audio'"),)
    made = Recording(sample, recorded, stated, metadata)
    # Names in a tar may have bytes that are no UTF-8, and not all readers refuse such texts.
    if (fault := find_surrogate([*made.texts, metadata])) is not None:
        raise _UnusableError(fault)
    return made


def _text(row: Mapping[str, Any], name: str) -> str | None:
    """Return a text without white space around it; None for one that is empty or not there."""
    value = row.get(name)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and name in ("answer", "voice"):
        return str(value)
    if value is not None and not isinstance(value, str):
        raise _UnusableError(f"its {name!r} is no text but {_shown(value)}")
    return (value or "").strip() or None


def _conversation(
    name: str, row: Mapping[str, Any], root: Path | str, texts: Mapping[str, str | None], choices: tuple[str, ...]
) -> tuple[Sample, tuple[Recorded, ...]]:
    """Return a sample of turns and its recordings, numbered as they come."""
    if both := [field_name for field_name in ("question", "instruction", "audio") if row.get(field_name) is not None]:
        raise _UnusableError(f"it has turns and {both[0]!r}; write everything into the turns")
    recorded: list[Recorded] = []

    def number(reference: Any) -> int:
        recorded.append(_recorded(reference, root, '"audio"'))
        return len(recorded) - 1

    turns = read_turns(row["turns"], number)
    given = {field_name: text for field_name, text in texts.items() if field_name != "instruction"}
    return Sample(id=name, question="", choices=choices, turns=turns, **given), tuple(recorded)  # type: ignore[arg-type]


def _recorded(value: Any, root: Path | str, what: str) -> Recorded:
    if isinstance(value, Recorded):
        return value
    if isinstance(value, Mapping):  # as the `datasets` library stores a column of type Audio
        if isinstance(value.get("bytes"), bytes):
            return RecordedBytes(value["bytes"], str(value.get("path") or "bytes of the row"))
        value = value.get("path")
    if not isinstance(value, str) or not value or "\0" in value:
        raise TurnsError(f"{what} is {_shown(value)}, neither a path nor bytes")
    if isinstance(root, Path):
        return RecordedFile(root / value, value)
    address = value if "://" in value else f"{root}/{value}"
    *members, archive = address.split("::")  # "zip://a.wav::hf://…" is a member of an archive
    inside = archive.removeprefix(f"{root}/")
    if inside == archive or not {"", ".", ".."}.isdisjoint(inside.split("/")) or not all(map(_is_zipped, members)):
        raise TurnsError(f"{what} is {_shown(value)}, which lies outside of the set")
    return RecordedAddress(address)


def _is_zipped(address: str) -> bool:
    return address.startswith("zip://")


def _metadata(notes: Any) -> dict[str, Any]:
    """Return a row's notes as they can be kept: what JSON has no form for is written as text."""
    if notes is None:
        return {}
    kept = json.loads(json.dumps(notes, default=str))
    return kept if isinstance(kept, dict) else {NOTES: kept}


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}…"
