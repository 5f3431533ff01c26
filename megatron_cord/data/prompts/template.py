"""The checkpoint's chat template: conversations to tokens, and what of a conversation it cannot write.

Templates differ in whether a turn's content is a text or a list of parts, in which roles they know, and some leave out
in silence what they do not know. So the first conversation of each shape (roles, and which parts are recordings) is
written with marks for its texts, and every mark and every recording must come back.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from jinja2 import TemplateError

from megatron_cord.data.mistral_tokenizer import ChatRefusedError
from megatron_cord.data.tokenizers import Tokenizer
from megatron_cord.data.turns import AudioPart, Part, TextPart, Turn, written
from megatron_cord.errors import CordError

Chat = Sequence[Turn]
_Shape = tuple[tuple[str, tuple[bool, ...]], ...]

#: Whose turns are lists of parts where a text would do, in the order in which it is tried.
_LISTED: tuple[Collection[str], ...] = (("user",), (), ("system", "user", "assistant"))


class _UnwrittenError(Exception):
    """What the template does to a conversation; the message goes on from its name."""


class ChatTemplate:
    """Writes conversations. Threads may use it.

    Args:
        tokenizer: of the checkpoint.
        audio_token_id: the placeholder, of which a template writes one for a clip; None for a text model.
        template: Jinja, in the place of the checkpoint's own.
    """

    def __init__(self, tokenizer: Tokenizer, audio_token_id: int | None, template: str | None = None) -> None:
        self._tokenizer, self._audio_token_id, self._template = tokenizer, audio_token_id, template
        self._known: dict[_Shape, Collection[str] | str] = {}

    def tokenize(self, chat: Chat) -> list[list[int]]:
        """Return the ids of a conversation up to where the answer begins, cut at the placeholders: clips + 1 pieces.

        Args:
            chat: each recording in it one clip.

        Raises:
            CordError: as `fault`, or the checkpoint has no template.
        """
        form = self._form(chat)
        if isinstance(form, str):
            raise CordError(form)
        pieces: list[list[int]] = [[]]
        for index in self._tokenizer.chat_ids(_messages(chat, form), self._template):
            if index == self._audio_token_id:
                pieces.append([])
            else:
                pieces[-1].append(index)
        return pieces

    def fault(self, chat: Chat) -> str | None:
        """Return what of a conversation the template cannot write, as in "has a system prompt, which …"; None if all.

        Raises:
            CordError: the checkpoint has no template.
        """
        form = self._form(chat)
        return form if isinstance(form, str) else None

    def placeholders(self, clips: int) -> int:
        """Return how many placeholders it writes for a turn of so many clips.

        Raises:
            CordError: the checkpoint has no template.
            TemplateError: the template takes no recordings.
        """
        turn = Turn("user", tuple(AudioPart(i, "") for i in range(clips)))
        return self._count([turn], _LISTED[0])

    def _form(self, chat: Chat) -> Collection[str] | str:
        shape = tuple((turn.role, tuple(isinstance(part, AudioPart) for part in turn.parts)) for turn in chat)
        if shape not in self._known:
            self._known[shape] = self._find_form(chat)
        return self._known[shape]

    def _find_form(self, chat: Chat) -> Collection[str] | str:
        """Return whose turns to write as lists, or what is wrong with the conversation."""
        problems = []
        for listed in _LISTED:
            try:
                self._check(chat, listed)
            except (_UnwrittenError, ChatRefusedError, TemplateError, TypeError) as error:
                what = f"{error}" if isinstance(error, _UnwrittenError) else f"refuses ({' '.join(str(error).split())})"
                problems.append(what)
            else:
                return listed
        without = chat[1:] if chat[0].role == "system" else ()
        if without and self.fault(without) is None:
            return f"has a system prompt, which the chat template of the checkpoint {problems[0]}"
        roles = ", ".join(turn.role for turn in chat)
        return f"has a conversation ({roles}) that the chat template of the checkpoint {problems[0]}"

    def _check(self, chat: Chat, listed: Collection[str]) -> None:
        # With a line break inside, which Python writes otherwise: a list put out as it is must not pass for its text.
        marks = [[f"text\n{i}of{j};" for j in range(len(turn.parts))] for i, turn in enumerate(chat)]
        marked = [
            Turn(
                turn.role,
                tuple(
                    part if isinstance(part, AudioPart) else TextPart(mark)
                    for part, mark in zip(turn.parts, row, strict=True)
                ),
            )
            for turn, row in zip(chat, marks, strict=True)
        ]
        rendered, begin = self._tokenizer.render(_messages(marked, listed), self._template), 0
        texts = [(turn.role, part.text) for turn in marked for part in turn.parts if isinstance(part, TextPart)]
        for role, text in texts:
            if rendered.count(text) != 1 or (begin := rendered.find(text, begin)) < 0:
                raise _UnwrittenError(f"does not write as it is (the {role}'s text)")
        clips = sum(isinstance(part, AudioPart) for turn in chat for part in turn.parts)
        if clips and (found := self._count(marked, listed)) != clips:
            raise _UnwrittenError(f"writes with {found} placeholders for its {clips} clips")

    def _count(self, chat: Chat, listed: Collection[str]) -> int:
        """Return how many placeholders there are."""
        ids = self._tokenizer.chat_ids(_messages(chat, listed), self._template)
        return ids.count(-1 if self._audio_token_id is None else self._audio_token_id)


def _messages(chat: Chat, listed: Collection[str]) -> list[dict[str, Any]]:
    return [{"role": turn.role, "content": _content(turn.parts, turn.role in listed)} for turn in chat]


def _content(parts: Sequence[Part], listed: bool) -> str | list[dict[str, Any]]:
    if not listed and not any(isinstance(part, AudioPart) for part in parts):
        return written(parts)
    return [
        {"type": "text", "text": part.text} if isinstance(part, TextPart) else {"type": "audio", "audio_url": "clip"}
        for part in parts
    ]
