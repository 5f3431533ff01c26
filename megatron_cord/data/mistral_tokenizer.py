"""Mistral's tokenizers (tekken.json), as published Voxtral checkpoints have them: read by mistral-common, an extra.

There is no chat template: mistral-common writes conversations itself, straight to ids, and texts never become control
tokens. Its number of placeholders for a recording follows from the recording; here each recording has one, as from
other tokenizers, and the prompt builder says how many there are.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cord.data.audio.wav import encode_wav
from megatron_cord.errors import CordError

FILE_NAME = "tekken.json"
_CLIP = base64.b64encode(encode_wav(np.zeros(1600, np.float32))).decode()  # stands for any recording


class ChatRefusedError(Exception):
    """A conversation that the tokenizer does not write; the message says why."""


class MistralTokenizer:
    """A tokenizer of mistral-common. See `megatron_cord.data.tokenizers.Tokenizer` for what its members are.

    Args:
        directory: that holds tekken.json.

    Raises:
        CordError: mistral-common is not installed, or the file cannot be read.
    """

    def __init__(self, directory: Path) -> None:
        path = directory / FILE_NAME
        try:
            from mistral_common.exceptions import MistralCommonException
            from transformers.tokenization_mistral_common import MistralCommonBackend
        except ImportError:
            raise CordError(
                f"{path} is read by mistral-common, which is not installed: pip install 'megatron_cord[mistral]'"
            ) from None
        self._refusals = (ValueError, MistralCommonException)
        try:
            backend: Any = MistralCommonBackend.from_pretrained(str(directory))
        except (*self._refusals, LookupError, TypeError, AssertionError) as error:
            reason = " ".join(str(error).split())[:120]
            raise CordError(f"{path} is no tokenizer of mistral-common ({reason}); download it again") from None
        self._backend = backend
        self._directory = directory
        self.special_ids = frozenset(backend.all_special_ids)
        self.control_ids: frozenset[int] = frozenset()
        self.eos_id: int | None = backend.eos_token_id
        self.pad_id: int | None = backend.pad_token_id
        self.unknown_id: int | None = None  # every byte can be spelt
        self._audio_id = int(backend.convert_tokens_to_ids("[AUDIO]"))

    @property
    def has_feature_extractor(self) -> bool:
        """Whether the checkpoint says how audio becomes features."""
        return (self._directory / "preprocessor_config.json").is_file()

    def __len__(self) -> int:
        return len(self._backend)

    def render(self, turns: list[dict[str, Any]], template: str | None = None) -> str:
        """Return the conversation as text, control tokens included, which `encode` does not read back."""
        return self.decode(self.chat_ids(turns, template))

    def chat_ids(self, turns: list[dict[str, Any]], template: str | None = None) -> list[int]:
        """Return the conversation's ids.

        Raises:
            ChatRefusedError: it is refused, such as a system prompt with a recording.
        """
        if template is not None:
            raise ValueError("mistral-common takes no template")
        messages = [turn | {"content": _content(turn["content"])} for turn in turns]
        try:
            ids = self._backend.apply_chat_template(messages, tokenize=True, return_dict=False)
        except self._refusals as error:
            raise ChatRefusedError(" ".join(str(error).split())) from None
        runs = ((index, list(run)) for index, run in groupby(ids))
        return [index for key, run in runs for index in (run[:1] if key == self._audio_id else run)]

    def encode(self, text: str) -> list[int]:
        """Token ids."""
        return list(self._backend(text, add_special_tokens=False)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids."""
        return str(self._backend.decode(list(ids)))

    def vocabulary(self) -> dict[int, str]:
        """Return each id's token as the tokenizer spells it."""
        ids = list(range(len(self)))
        return dict(zip(ids, map(str, self._backend.convert_ids_to_tokens(ids)), strict=True))


def _content(content: Any) -> Any:
    if isinstance(content, str):
        return content
    return [{"type": "audio", "base64": _CLIP} if part["type"] == "audio" else part for part in content]
