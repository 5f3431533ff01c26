"""The token error rate: wrong, missing and additional tokens per token of the transcripts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby


@dataclass(frozen=True)
class TokenErrors:
    """Errors of several transcripts.

    Attributes:
        errors: substitutions, deletions and insertions.
        tokens: of the transcripts.
    """

    errors: int = 0
    tokens: int = 0

    def __add__(self, other: TokenErrors) -> TokenErrors:
        return TokenErrors(self.errors + other.errors, self.tokens + other.tokens)

    @property
    def rate(self) -> float:
        """Errors a token; may exceed 1."""
        return self.errors / self.tokens


def collapse(classes: Sequence[int]) -> list[int]:
    """Return what CTC reads in a row of classes: each run once, without blanks (class 0)."""
    return [each for each, _ in groupby(classes) if each]


def count_errors(read: Sequence[int], transcript: Sequence[int | None]) -> TokenErrors:
    """Compare a row of classes with a transcript, whose tokens of no class are None.

    The errors are the Levenshtein distance.
    """
    row = list(range(len(transcript) + 1))
    for above, mine in enumerate(read, 1):
        diagonal, row[0] = row[0], above
        for place, wanted in enumerate(transcript, 1):
            diagonal, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, diagonal + (mine != wanted))
    return TokenErrors(row[-1], len(transcript))
