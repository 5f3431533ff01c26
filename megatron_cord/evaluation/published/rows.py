"""What an adapter makes of a row, and how a published set is described."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_cord.data.choices import Choices
from megatron_cord.data.fields import listed
from megatron_cord.data.turns import Turn
from megatron_cord.evaluation.rules.rule import Rule

Row = dict[str, Any]


class UnusableError(ValueError):
    """The reason why a row is no question."""


@dataclass(frozen=True)
class Fields:
    """The parts of a row under one set of names.

    Attributes:
        text: the question's words; None where there is nothing to read.
        audio: a path, or {"bytes": …, "path": …}.
        answer: the gold answer; "" for a question that has none, where `answered` is False.
        choices: of the question.
        instruction: text beside the recording.
        group: by which accuracies are shown apart.
        system: the system prompt.
        turns: a conversation.
        recordings: of the turns, by number.
        groups: further groups.
        answered: whether a row without an answer is unusable.
    """

    text: str | None
    audio: Any
    answer: Any
    choices: Choices | None = None
    instruction: str | None = None
    group: Any = None
    system: str | None = None
    turns: tuple[Turn, ...] = ()
    recordings: tuple[Any, ...] = ()
    groups: tuple[str, ...] = ()
    answered: bool = True


@dataclass(frozen=True)
class Published:
    """A published set.

    Attributes:
        adapter: reads a row; raises UnusableError or ChoicesError.
        used: the fields that it reads, beside "id".
        rule: of its scores; None for the rules of `scoring`.
    """

    adapter: Callable[[Row], Fields]
    used: tuple[str, ...]
    rule: Rule | None = None


def text_of(row: Row, name: str) -> str:
    """Return a text of a row. Raises UnusableError without one."""
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise UnusableError(f"it has no text in {name!r} (its fields: {listed(row)})")
    return value
