"""Tokenizers behind one small interface: Hugging Face's, plain sentencepiece models, and Mistral's.

Each renders a conversation through the checkpoint's own chat template and turns text into ids and back. Special
tokens that stand in a text are recognised, in a user's text too (`control_ids`); none is ever added. Simplification: a
sentencepiece model's marks are its pieces of the form <…>.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from sentencepiece import SentencePieceProcessor
from transformers import AutoProcessor, AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from megatron_cord.data import mistral_tokenizer
from megatron_cord.data.mistral_tokenizer import MistralTokenizer
from megatron_cord.errors import CordError
from megatron_cord.model.checkpoint_directory import checkpoint_directory
from megatron_cord.model.families import FAMILIES, model_type_of
from megatron_cord.runtime.files import read_json_object

Turns = list[dict[str, Any]]  #: a conversation as chat templates take it


class Tokenizer(Protocol):
    """What prompts need of a tokenizer."""

    @property
    def eos_id(self) -> int | None:
        """Ends a response, unless the checkpoint's generation settings say otherwise."""
        ...

    @property
    def pad_id(self) -> int | None:
        """Fills batches; None if there is no such token."""
        ...

    @property
    def unknown_id(self) -> int | None:
        """Stands for words outside the vocabulary; None if everything can be spelt."""
        ...

    @property
    def special_ids(self) -> frozenset[int]:
        """Marks that are no text."""
        ...

    @property
    def has_feature_extractor(self) -> bool:
        """Whether the checkpoint says how audio becomes features."""
        ...

    @property
    def control_ids(self) -> frozenset[int]:
        """Marks that a text can be turned into, so that it could end a turn or stand for audio."""
        ...

    def __len__(self) -> int:
        """Return the number of tokens."""
        ...

    def render(self, turns: Turns, template: str | None = None) -> str:
        """Render the conversation as one text that ends where the answer begins.

        Args:
            turns: of the conversation.
            template: Jinja; the checkpoint's own if None.

        Raises:
            CordError: there is no template.
        """
        ...

    def chat_ids(self, turns: Turns, template: str | None = None) -> list[int]:
        """Return the ids of the conversation that `render` renders.

        Raises:
            CordError: there is no template.
        """
        ...

    def encode(self, text: str) -> list[int]:
        """Token ids."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids."""
        ...

    def vocabulary(self) -> dict[int, str]:
        """Return each id's token as the tokenizer spells it."""
        ...


class HuggingFaceTokenizer:
    """A tokenizer of transformers, with the processor that holds it if there is one.

    Args:
        processor: a processor or a tokenizer alone.
        directory: for errors.
        has_feature_extractor: whether the checkpoint says how audio becomes features; None: as the processor does.
    """

    def __init__(self, processor: Any, directory: Path, has_feature_extractor: bool | None = None) -> None:
        self._processor, self._directory = processor, directory
        self.has_feature_extractor = (
            hasattr(processor, "feature_extractor") if has_feature_extractor is None else has_feature_extractor
        )
        self._tokenizer = getattr(processor, "tokenizer", processor)
        tokens = self._tokenizer.added_tokens_decoder
        added = {index for index, token in tokens.items() if token.special}
        self.special_ids = frozenset({*self._tokenizer.all_special_ids, *added})
        # Chat formats have marks that are not declared special, such as <tool_call>.
        marks = {index for index, token in tokens.items() if token.content[:1] + token.content[-1:] in ("<>", "[]")}
        self.control_ids = self.special_ids | marks
        self.eos_id: int | None = self._tokenizer.eos_token_id
        self.pad_id: int | None = self._tokenizer.pad_token_id
        self.unknown_id: int | None = self._tokenizer.unk_token_id
        self._length = len(self._tokenizer)  # transformers copies the vocabulary for it: 19 ms for 49,152 tokens

    def __len__(self) -> int:
        return self._length

    def render(self, turns: Turns, template: str | None = None) -> str:
        """See `Tokenizer`."""
        if template is not None:
            return str(
                self._tokenizer.apply_chat_template(
                    turns, chat_template=template, add_generation_prompt=True, tokenize=False
                )
            )
        # Some processors, such as Voxtral's, do not see the template that their tokenizer has.
        owner = next((part for part in (self._processor, self._tokenizer) if part.chat_template), None)
        if owner is None:
            raise _no_template(self._directory)
        return str(owner.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))

    def chat_ids(self, turns: Turns, template: str | None = None) -> list[int]:
        """See `Tokenizer`."""
        return self.encode(self.render(turns, template))

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer`."""
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        """See `Tokenizer`."""
        return str(self._tokenizer.decode(list(ids)))

    def vocabulary(self) -> dict[int, str]:
        """See `Tokenizer`."""
        return {index: token for token, index in self._tokenizer.get_vocab().items()}


class SentencePieceTokenizer:
    """A sentencepiece model, tokenizer.model, with the chat template beside it, chat_template.jinja.

    Args:
        directory: that holds both.

    Raises:
        CordError: the model cannot be read.
    """

    def __init__(self, directory: Path) -> None:
        path, template = directory / "tokenizer.model", directory / "chat_template.jinja"
        self._directory = directory
        self._template = template.read_text(encoding="utf-8") if template.is_file() else None
        self._model: Any = SentencePieceProcessor()
        try:
            self._model.Load(str(path))
        except (OSError, RuntimeError) as error:
            raise CordError(
                f"{path} is not a sentencepiece model ({' '.join(str(error).split())}); download it again"
            ) from None
        self.special_ids = frozenset(index for index in range(len(self)) if self._is_mark(index))
        self.control_ids = self.special_ids
        self.eos_id = _present(self._model.eos_id())
        self.pad_id = _present(self._model.pad_id())
        self.unknown_id = _present(self._model.unk_id())

    @property
    def has_feature_extractor(self) -> bool:
        """See `Tokenizer`: Whisper's sizes are the model's own."""
        return False

    def _is_mark(self, index: int) -> bool:
        if self._model.IsControl(index) or self._model.IsUnknown(index):
            return True
        piece = self._model.IdToPiece(index)
        # Bytes are spelt <0x0A>, but they are text.
        return len(piece) > 2 and piece[0] == "<" and piece[-1] == ">" and not self._model.IsByte(index)

    def __len__(self) -> int:
        return int(self._model.GetPieceSize())

    def render(self, turns: Turns, template: str | None = None) -> str:
        """See `Tokenizer`."""
        template = template or self._template
        if template is None:
            raise _no_template(self._directory)
        rendered: Any = render_jinja_template(conversations=[turns], chat_template=template, add_generation_prompt=True)
        return str(rendered[0][0])  # of one conversation; beside it stand the assistant's places in the text

    def chat_ids(self, turns: Turns, template: str | None = None) -> list[int]:
        """See `Tokenizer`."""
        return self.encode(self.render(turns, template))

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer`."""
        return list(self._model.EncodeAsIds(text))

    def decode(self, ids: Sequence[int]) -> str:
        """See `Tokenizer`."""
        return str(self._model.DecodeIds(list(ids)))

    def vocabulary(self) -> dict[int, str]:
        """See `Tokenizer`."""
        return {index: str(self._model.IdToPiece(index)) for index in range(len(self))}


def load_tokenizer(directory: str | Path) -> HuggingFaceTokenizer | SentencePieceTokenizer | MistralTokenizer:
    """Load the checkpoint's tokenizer: Hugging Face's, or the sentencepiece model or Mistral's where it is alone.

    Raises:
        CordError: there is none, or it cannot be read.
    """
    path = checkpoint_directory(directory)
    if (path / mistral_tokenizer.FILE_NAME).is_file() and not (path / "tokenizer.json").is_file():
        return MistralTokenizer(path)
    others = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "processor_config.json")
    if (path / "tokenizer.model").is_file() and not any((path / name).is_file() for name in others):
        return SentencePieceTokenizer(path)
    family = FAMILIES.get(model_type_of(path) or "")
    try:
        if family is not None and family.sees:
            return _without_eyes(path)
        return HuggingFaceTokenizer(AutoProcessor.from_pretrained(path, local_files_only=True), path)
    except (OSError, ValueError) as error:
        first_line = str(error).splitlines()[0]
        raise CordError(
            f"{path}: no processor or configuration to load ({first_line}); give a checkpoint directory"
        ) from error


def _without_eyes(directory: Path) -> HuggingFaceTokenizer:
    """Load the tokenizer of a checkpoint whose processor needs more, with the chat template of the processor."""
    tokenizer: Any = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    template = directory / "chat_template.json"  # the tokenizer reads chat_template.jinja itself
    if template.is_file():
        tokenizer.chat_template = read_json_object(template, "copy it from the original checkpoint").get(
            "chat_template"
        )
    says = any((directory / name).is_file() for name in ("preprocessor_config.json", "processor_config.json"))
    return HuggingFaceTokenizer(tokenizer, directory, says)


def vocabulary_difference(one: Tokenizer, other: Tokenizer) -> str | None:
    """Return in words where two vocabularies differ, the first id and how many; None if all ids mean the same."""
    ours, theirs = one.vocabulary(), other.vocabulary()
    differing = sorted(index for index in ours.keys() | theirs.keys() if ours.get(index) != theirs.get(index))
    if not differing:
        return None
    shown = [repr(words[differing[0]]) if differing[0] in words else "no token" for words in (ours, theirs)]
    return (
        f"{len(differing)} of {max(len(ours), len(theirs))} token ids mean something else, the first is "
        f"{differing[0]}: {shown[0]} there and {shown[1]} here"
    )


def _present(index: int) -> int | None:
    """Sentencepiece says -1 for a token that the model lacks."""
    return None if index < 0 else index


def _no_template(directory: Path) -> CordError:
    return CordError(f"{directory} has no chat template; put the original checkpoint's chat_template.jinja there")
