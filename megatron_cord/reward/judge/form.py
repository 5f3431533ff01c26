"""The form of what a judge is asked and of what it answers: JSON both ways."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

LONGEST = 8000  #: characters of a text that a judge is shown


def user_message(parts: Mapping[str, str]) -> dict[str, str]:
    """Return texts by name as a message of the user; in JSON, no text can imitate the end of its part."""
    return {"role": "user", "content": json.dumps(dict(parts), ensure_ascii=False, indent=0)}


def parse_object(content: Any, name: str) -> Any:
    """Return the value of an answer that is a JSON object with one key; None if it is another object or value.

    Raises:
        ValueError: it is not JSON.
    """
    try:
        value = json.loads(content)
    except (TypeError, ValueError, RecursionError):
        raise ValueError(f"not JSON: {str(content)[:80]!r}") from None
    return value[name] if isinstance(value, dict) and set(value) == {name} else None


def parse_yes_no(content: Any, name: str) -> bool:
    """Return the verdict of an answer whose one key is yes or no.

    Raises:
        ValueError: anything but that JSON object.
    """
    verdict = parse_object(content, name)
    if verdict not in ("yes", "no"):
        raise ValueError(f'not {{"{name}": "yes"}} or {{"{name}": "no"}}: {str(content)[:80]!r}')
    return bool(verdict == "yes")
