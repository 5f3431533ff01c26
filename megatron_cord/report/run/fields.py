"""Fields of a JSON object with their types checked, so that a damaged file is named instead of drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NoReturn

from megatron_cord.errors import CordError


class Fields:
    """Typed access to one JSON object; each method raises CordError with the place and the field.

    Args:
        values: the object.
        where: file and line or position, for errors.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self._values = values
        self._where = where

    def text(self, name: str) -> str:
        """Return a text that must be there."""
        value = self._required(name)
        return value if isinstance(value, str) else self._refuse(name, "a text")

    def optional_text(self, name: str) -> str | None:
        """Return a text, or None where it is null or missing."""
        return None if self._values.get(name) is None else self.text(name)

    def flag(self, name: str) -> bool:
        """Return true or false, which must be there."""
        value = self._required(name)
        return value if isinstance(value, bool) else self._refuse(name, "true or false")

    def integer(self, name: str) -> int:
        """Return a whole number of at least 0 that must be there."""
        value = self._required(name)
        return (
            value
            if isinstance(value, int) and not isinstance(value, bool) and value >= 0
            else self._refuse(name, "a whole number")
        )

    def number(self, name: str) -> float:
        """Return a finite number that must be there."""
        value = self._required(name)
        return float(value) if _is_number(value) and math.isfinite(value) else self._refuse(name, "a finite number")

    def optional_number(self, name: str) -> float | None:
        """Return a finite number, or None where it is null or missing."""
        return None if self._values.get(name) is None else self.number(name)

    def numbers(self, name: str) -> tuple[float, ...] | None:
        """Return a list of numbers (NaN: not measured), or None where it is null or missing."""
        value = self._values.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or not all(item is None or _is_number(item) for item in value):
            return self._refuse(name, "a list of numbers")
        return tuple(math.nan if item is None else float(item) for item in value)

    def texts(self, name: str) -> tuple[str, ...]:
        """Return a list of texts; empty where it is null or missing."""
        value = self._values.get(name)
        if value is None:
            return ()
        return (
            tuple(value)
            if isinstance(value, list) and all(isinstance(item, str) for item in value)
            else self._refuse(name, "texts")
        )

    def items(self, name: str) -> list[dict[str, Any]]:
        """Return a list of objects that must be there."""
        value = self._required(name)
        return (
            value
            if isinstance(value, list) and all(isinstance(item, dict) for item in value)
            else self._refuse(name, "objects")
        )

    def optional_object(self, name: str) -> dict[str, Any]:
        """Return an object; empty where it is null or missing."""
        value = self._values.get(name)
        if value is None:
            return {}
        return value if isinstance(value, dict) else self._refuse(name, "an object")

    def _required(self, name: str) -> Any:
        if name not in self._values:
            raise CordError(
                f"{self._where}: {name} is missing; the file is damaged or not of this project: restore or remove it"
            )
        return self._values[name]

    def _refuse(self, name: str, expected: str) -> NoReturn:
        shown = repr(self._values[name])
        shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
        raise CordError(f"{self._where}: {name}: expected {expected}, got {shown}; restore the file or remove it")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
