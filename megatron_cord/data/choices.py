"""Multiple choice: the letters of the choices, and how choices are written and read out."""

from __future__ import annotations

from collections.abc import Sequence

LETTERS = "ABCDEFGHIJ"


def lettered(choices: Sequence[str]) -> str:
    """Return the choices as they are read out: "A. iron. B. wood."."""
    return " ".join(
        f"{letter}. {choice.strip().rstrip('.')}." for letter, choice in zip(LETTERS, choices, strict=False)
    )
