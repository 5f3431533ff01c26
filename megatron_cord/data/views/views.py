"""Views: chats made of a sample's parts, each a way in which a model meets the sample.

`hear` and `read` are built in, and evaluations use these alone. Others are configured under `views`:

    views:
      informed: {user: [text, "The answer is {answer}.", "instruction?"]}
      noisy: {user: ["audio|noise(10)", "instruction?"]}

An entry of ``user`` is a part, or a text with parts in braces ({{ and }} are braces). Parts are `audio` and `text`
(what the user's last turn has, with its recordings or with their transcripts), `instruction`, `system`, `choices`
(lettered), `answer`, `solution`, `voice`, and `metadata.KEY`, a text or number of the sample's notes. With a ``?``
behind it a part is left out for samples that lack it; without, such samples are refused. Filters of `audio` are
`noise(SNR)`, dB, and `band(HIGHEST)`, Hz, in the order in which they stand.

A view that has no `audio` has transcripts in the earlier turns, too, and each turn as one text, as `read` has.
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

#: What only a teacher may be given: a student that reads it has nothing left to answer.
_PRIVILEGED = ("answer", "solution")
_NAME = re.compile(r"[A-Za-z0-9_+-]{1,60}")


@dataclass(frozen=True)
class ViewConfig:
    """A view under a name: views: {NAME: {user: [audio, "The answer is {answer}."]}}."""

    user: tuple[str, ...]  #: what the user's last turn is made of: parts, and texts with parts in braces
    system: str | None = "system?"  #: a part, or a text with parts in braces, as the system prompt; null for none

    def __post_init__(self) -> None:
        _parse("", self)


@dataclass(frozen=True)
class PlainView:
    """`HEAR` or `READ`."""

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
    """A view that is configured.

    Attributes:
        name: of the view.
        user: entries of the user's last turn.
        system: of the system prompt; None for none.
        filters: of the recordings; None for a view without recordings.
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
        """Return the conversation of a sample without `fault`, the system prompt included."""
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
        """Return all texts of the prompt, those that touch each other joined, with the name of the view."""
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
            return f"has turns, and view {self.name} neither audio nor text, so that nothing of them would be left"
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
        configs: of views beside `HEAR` and `READ`.

    Raises:
        CordError: a name that is taken or odd, or a view that cannot be understood.
    """

    def __init__(self, configs: Mapping[ViewName, ViewConfig]) -> None:
        for name in configs:
            if name in (HEAR, READ):
                raise CordError(f"views.{name}: {name} is built in, for evaluations use it; choose another name")
            if not _NAME.fullmatch(name):
                raise CordError(f"views: the name {name!r} has other characters than letters, digits, '_', '+' and '-'")
        self._views: dict[ViewName, View] = {name: PlainView(name) for name in (HEAR, READ)}
        self._views |= {name: _parse(name, config) for name, config in configs.items()}

    def named(self, name: ViewName, key: str) -> View:
        """Return a view.

        Args:
            name: of the view.
            key: which names it, for the message.

        Raises:
            CordError: there is none.
        """
        if name not in self._views:
            raise CordError(f"{key}={name} is no view; there are {', '.join(self._views)}, others are made under views")
        return self._views[name]

    def of(self, sample: Sample, name: ViewName) -> View:
        """Return the view that stands for a name where a sample's set chooses others."""
        return self._views[sample.view_names.get(name, name)]


def check_student(view: View, key: str) -> None:
    """Refuse a student's view that holds what a student is to find out, or no question.

    Raises:
        CordError: it has the answer or its solution, or neither audio nor text.
    """
    if not {"audio", "text"} & view.parts:
        raise CordError(f"{key}={view.name} has neither audio nor text: the student would not see the question")
    if given := [part for part in _PRIVILEGED if part in view.parts]:
        raise CordError(
            f"{key}={view.name} gives the student the {given[0]}, of which nothing may reach rollouts or evaluations; "
            "only a teacher's view may have it"
        )


def filtered(sample: Sample, filters: Sequence[Filter], draw: str) -> Sample:
    """Return a sample with its recordings as a view gives them.

    Args:
        sample: its recordings are not changed in place.
        filters: in their order.
        draw: stands for all that is drawn, together with the sample, the recording and the filter.
    """
    recordings, rate = list(sample.recordings), sample.sampling_rate
    for number, each in enumerate(filters):
        recordings = [
            each.apply(waveform, rate, f"{draw}\x1f{sample.id}\x1f{i}\x1f{number}\x1f{each.kind}")
            for i, waveform in enumerate(recordings)
        ]
    return sample.with_recordings(recordings) if filters else sample


def _parse(name: ViewName, config: ViewConfig) -> ComposedView:
    """Make a view of its configuration. Raises CordError."""
    if not config.user:
        raise CordError("user is empty; name the parts of the user's turn, such as [audio]")
    made = [read_entry(text) for text in config.user]
    system = None if config.system is None else read_entry(config.system)
    if system is not None and (system[0].is_audio or "text" in system[0].parts):
        raise CordError(f"system is {config.system!r}; the question belongs into user")
    filters = [found for entry, found in made if entry.is_audio]
    if len(filters) > 1:
        raise CordError("user has audio twice; a view has a recording once")
    entries = tuple(entry for entry, _ in made)
    return ComposedView(name, entries, None if system is None else system[0], filters[0] if filters else None)
