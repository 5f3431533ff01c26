"""A text model's tokenizer and chat template with a placeholder for audio; text is written as before."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from jinja2 import TemplateError
from tokenizers import AddedToken
from transformers import AutoTokenizer

from megatron_cord.errors import CordError

AUDIO = "<|audio|>"  #: Ultravox's placeholder
#: Stands before a template that takes texts: makes one text of each turn that is a list of parts.
_FLATTEN = (
    "{% set flat = namespace(turns=[]) %}"
    "{% for message in messages %}"
    "{% if message['content'] is string %}{% set flat.turns = flat.turns + [message] %}"
    "{% else %}{% set turn = namespace(text='') %}"
    "{% for part in message['content'] %}"
    "{% set turn.text = turn.text + ('" + AUDIO + "' if part['type'] == 'audio' else part['text']) %}"
    "{% endfor %}{% set flat.turns = flat.turns + [dict(message, content=turn.text)] %}"
    "{% endif %}{% endfor %}"
    "{% set messages = flat.turns %}"
)


def with_placeholder(directory: Path, rows: int) -> tuple[dict[str, bytes], int]:
    """Return the files of a tokenizer that has a placeholder for audio, and the placeholder's id.

    Args:
        directory: of the text model.
        rows: of its word embedding.

    Raises:
        CordError: no tokenizer, no chat template, one that cannot write a recording, or tokens without a row.
    """
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CordError(f"{directory}: the tokenizer cannot be read ({why}); download the checkpoint again") from None
    last = max(tokenizer.get_vocab().values(), default=-1)
    if last >= rows:
        raise CordError(
            f"{directory}: the tokenizer has a token {last}, but the word embedding has {rows} rows; take both from "
            "the same checkpoint"
        )
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        raise CordError(
            f"{directory} has no chat template; give an instruction-tuned model, or put its chat_template.jinja there"
        )
    question = [{"role": "user", "content": "one"}]
    recording = [{"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": "one"}]}]
    before = _render(tokenizer, question, template, directory)
    tokenizer.add_tokens([AddedToken(AUDIO, special=True, normalized=False)], special_tokens=True)
    placeholder = int(tokenizer.convert_tokens_to_ids(AUDIO))
    tokenizer.chat_template = _FLATTEN + template
    spoken = _render(tokenizer, recording, tokenizer.chat_template, directory)
    if _render(tokenizer, question, tokenizer.chat_template, directory) != before or spoken.count(AUDIO) != 1:
        raise CordError(
            f"{directory}: the chat template cannot be given recordings (it writes {spoken!r} for one); put a "
            "chat_template.jinja there that writes a user's text as it is"
        )
    with TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        files = {path.name: path.read_bytes() for path in sorted(Path(scratch).iterdir()) if path.is_file()}
    return files, placeholder


def _render(tokenizer: Any, turns: list[dict[str, Any]], template: str, directory: Path) -> str:
    try:
        return str(
            tokenizer.apply_chat_template(turns, chat_template=template, add_generation_prompt=True, tokenize=False)
        )
    except (TemplateError, TypeError, ValueError) as error:
        why = " ".join(str(error).split())
        raise CordError(f"{directory}: the chat template fails ({why}); take the original checkpoint's") from None
