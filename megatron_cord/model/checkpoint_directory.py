"""Where a checkpoint's files lie: a local directory, or one that the Hugging Face Hub sends because a user named it."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from megatron_cord.errors import CordError

#: A path keeps one of the two slashes.
_HUB = re.compile(r"hf:/{1,2}(?P<name>[^@]+)(?:@(?P<revision>.+))?")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
#: The last is no weights of what is trained: an omni model's voices, passed on unread (`Family.carries_files`).
_PATTERNS = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "spk_dict.pt")


def checkpoint_directory(given: str | Path) -> Path:
    """Return the directory of a checkpoint. Only ``hf://OWNER/NAME[@REVISION]`` is looked up on a hub.

    Raises:
        CordError: there is no such directory, or the hub does not give it.
    """
    path, text = Path(given), str(given)
    if path.is_dir():
        return path
    if (named := _HUB.fullmatch(text)) is not None:
        return _download(named["name"], named["revision"])
    if path.is_file():
        raise CordError(f"{path} is a file; give the Hugging Face checkpoint directory that holds it")
    hub = f", or hf://{text} to take it from the Hugging Face Hub" if _HUB_NAME.fullmatch(text) else ""
    raise CordError(f"{path} does not exist; give a Hugging Face checkpoint directory{hub}")


@cache
def _download(name: str, revision: str | None) -> Path:
    """Return the local copy, completed first; once a process, so that all its parts read the same files."""
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(_PATTERNS)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        why = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        at = f"@{revision}" if revision else ""
        raise CordError(
            f"hf://{name}{at}: the hub does not give it ({why}); check the name, or give a directory"
        ) from None
