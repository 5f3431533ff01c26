"""Views: conversations composed of a sample's parts; the prompt of a sample differs from view to view.

`hear` and `read` are built in, and evaluations use only these. Others are configured under `views`:

    views:
      informed: {user: [text, "The answer is {answer}.", "instruction?"]}
      noisy: {user: ["audio|noise(10)", "instruction?"]}

An entry of ``user`` is a part, or a text with parts in braces ({{ and }} are braces). Parts are `audio` and `text`
(the user's last turn, with its recordings or with their transcripts), `instruction`, `system`, `choices` (lettered),
`answer`, `solution`, `voice`, and `metadata.KEY`, a text or number of the sample's metadata. A part with a ``?`` behind
it is optional: samples without it are used without it. Samples that lack any other part are refused. Filters of `audio`
are `noise(SNR)`, dB, and `band(HIGHEST)`, Hz; they are applied in the order in which they are written.

A view without `audio` has transcripts in the earlier turns, too, and each turn as one text, like `read`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from megatron_cord.data.samples import HEAR, READ, Sample, ViewName
from megatron_cord.data.turns import Part, TextPart, Turn, written
from megatron_cord.data.views.entries import Entry, Filter, read_entry
from megatron_cord.errors import CordError

#: Parts that only a teacher's view may have: in a student's prompt they would give the answer away.
_PRIVILEGED = ("answer", "solution")
_NAME = re.compile(r"[A-Za-z0-9_+-]{1,60}")


@dataclass(frozen=True)
class ViewConfig:
    """The configuration of a view: views: {NAME: {user: [audio, "The answer is {answer}."]}}."""

    user: tuple[str, ...]  #: the user's last turn: parts, and texts with parts in braces
    system: str | None = "system?"  #: the system prompt: a part, or a text with parts in braces; null: none

    def __post_init__(self) -> None:
        _parse("", self)


@dataclass(frozen=True)
class PlainView:
    """A built-in view, `HEAR` or `READ`."""

    name: ViewName

    @property
    def filters(self) -> tuple[Filter, ...] | None:
        """Those of the recordings; None for a view without recordings."""
        return () if self.name == HEAR else None

    @property
    def parts(self) -> frozenset[str]:
        """The names of the parts that it may have."""
        return frozenset({"audio" if self.name == HEAR else "text", "instruction", "system"})

    def chat(self, sample: Sample) -> tuple[Turn, ...]:
        """Return the conversation, the system prompt included."""
        return sample.chat(self.name)

    def texts(self, sample: Sample) -> list[tuple[str, str]]:
        """Return all texts of the prompt, with the names of the parts they are in."""
        return sample.texts(self.name)

    def fault(self, sample: Sample) -> str | None:
        """Return what of a sample the view cannot be made of, as in "has no …"; None if it can."""
        return None


@dataclass(frozen=True)
class ComposedView:
    """A configured view.

    Attributes:
        name: its key under `views`.
        user: entries of the user's last turn.
        system: entry of the system prompt; None: no system prompt.
        filters: filters of the recordings; None for a view without recordings.
    """

    name: ViewName
    user: tuple[Entry, ...]
    system: Entry | None
    filters: tuple[Filter, ...] | None

    @property
    def parts(self) -> frozenset[str]:
        """The names of the parts that it may have."""
        return frozenset(part for entry in self._entries for part in entry.parts)

    def chat(self, sample: Sample) -> tuple[Turn, ...]:
        """Return the conversation, the system prompt included, of a sample in which `fault` finds nothing."""
        *earlier, last = sample.spoken
        parts: list[Part] = []
        for entry in self.user:
            text = entry.text(sample)
            new: Sequence[Part] = last.parts if entry.is_audio else (TextPart(text),) if text else ()
            if parts and new and isinstance(parts[-1], TextPart) and isinstance(new[0], TextPart):
                apart = parts[-1].text[-1:].isspace() or new[0].text[:1].isspace()
                new = new if apart else (TextPart(f"\n{new[0].text}"), *new[1:])
            parts += new
        turns = (*earlier, Turn("user", tuple(parts)))
        if self.filters is None:
            turns = tuple(Turn(turn.role, (TextPart(written(turn.parts)),)) for turn in turns)
        system = "" if self.system is None else self.system.text(sample)
        return (*((Turn("system", (TextPart(system),)),) if system else ()), *turns)

    def texts(self, sample: Sample) -> list[tuple[str, str]]:
        """Return the texts of the prompt with the name of the view; adjacent texts are joined."""
        found = []
        for turn in self.chat(sample):
            runs = groupby(turn.parts, key=lambda part: isinstance(part, TextPart))
            found += [(f"view {self.name}", written(tuple(run))) for is_text, run in runs if is_text]
        return found

    def fault(self, sample: Sample) -> str | None:
        """Return what of a sample the view cannot be made of, as in "has no …"; None if it can."""
        for entry in self._entries:
            if not entry.optional and (part := entry.missing(sample)) is not None:
                return (
                    f"has no {part}, which view {self.name} is made of; add it to the sample, write it as an optional "
                    f'part ("{part}?"), or give the set another view (data.train.NAME.views)'
                )
        if self.filters is None and sample.turns and "text" not in self.parts:
            return f"has turns, and view {self.name} has neither audio nor text: it would contain none of them"
        if self.filters is None and all(entry.missing(sample) is not None for entry in self.user):
            return f"has none of the parts of view {self.name}"
        return None

    @property
    def _entries(self) -> tuple[Entry, ...]:
        return self.user if self.system is None else (self.system, *self.user)


View = PlainView | ComposedView


class Views:
    """All views of a run by name.

    Args:
        configs: the configured views; `HEAR` and `READ` are added.

    Raises:
        CordError: a name is built in or has other characters, or a view cannot be parsed.
    """

    def __init__(self, configs: Mapping[ViewName, ViewConfig]) -> None:
        for name in configs:
            if name in (HEAR, READ):
                raise CordError(f"views.{name}: {name} is built in, as evaluations use it; choose another name")
            if not _NAME.fullmatch(name):
                raise CordError(f"views: the name {name!r} has other characters than letters, digits, '_', '+' and '-'")
        self._views: dict[ViewName, View] = {name: PlainView(name) for name in (HEAR, READ)}
        self._views |= {name: _parse(name, config) for name, config in configs.items()}

    def named(self, name: ViewName, key: str) -> View:
        """Return the view of a name.

        Args:
            name: the view's.
            key: the configuration key that names it, for the message.

        Raises:
            CordError: there is no such view.
        """
        if name not in self._views:
            raise CordError(
                f"{key}={name} is no view; use one of {', '.join(self._views)}, or configure it under views"
            )
        return self._views[name]

    def of(self, sample: Sample, name: ViewName) -> View:
        """Return the view of a name, or the one by which the sample's set replaces it (`Sample.view_names`)."""
        return self._views[sample.view_names.get(name, name)]


def check_student(view: View, key: str) -> None:
    """Refuse a student's view that contains the answer, or no question.

    Raises:
        CordError: it has the answer or the solution, or neither audio nor text.
    """
    if not {"audio", "text"} & view.parts:
        raise CordError(
            f"{key}={view.name} has neither audio nor text: the question would not be in the student's prompt"
        )
    if given := [part for part in _PRIVILEGED if part in view.parts]:
        raise CordError(
            f"{key}={view.name} gives the student the {given[0]}, which must not reach rollouts or evaluations; only a "
            "teacher's view may have it"
        )


def filtered(sample: Sample, filters: Sequence[Filter], draw: str) -> Sample:
    """Return a sample with a view's filters applied to its recordings, which are not changed in place.

    Args:
        sample: the sample.
        filters: applied in this order.
        draw: seed of all random numbers, together with the sample's id, the recording and the filter.
    """
    recordings, rate = list(sample.recordings), sample.sampling_rate
    for number, each in enumerate(filters):
        recordings = [
            each.apply(waveform, rate, f"{draw}\x1f{sample.id}\x1f{i}\x1f{number}\x1f{each.kind}")
            for i, waveform in enumerate(recordings)
        ]
    return sample.with_recordings(recordings) if filters else sample


def _parse(name: ViewName, config: ViewConfig) -> ComposedView:
    """Return the view that a configuration describes. Raises CordError."""
    if not config.user:
        raise CordError("user is empty; list the parts of the user's turn, such as [audio]")
    made = [read_entry(text) for text in config.user]
    system = None if config.system is None else read_entry(config.system)
    if system is not None and (system[0].is_audio or "text" in system[0].parts):
        raise CordError(f"system is {config.system!r}; audio and text belong in user")
    filters = [found for entry, found in made if entry.is_audio]
    if len(filters) > 1:
        raise CordError("user has audio twice; write it once")
    entries = tuple(entry for entry, _ in made)
    return ComposedView(name, entries, None if system is None else system[0], filters[0] if filters else None)
