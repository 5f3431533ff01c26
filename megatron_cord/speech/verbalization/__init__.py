"""Written questions as words for a voice: markup removed, mathematics and ordinary text read, doubt refused."""

from megatron_cord.speech.verbalization.errors import UnspeakableError
from megatron_cord.speech.verbalization.verbalize import verbalize

__all__ = ["UnspeakableError", "verbalize"]
