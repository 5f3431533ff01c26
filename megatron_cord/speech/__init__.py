"""Spoken question sets: text verbalized, synthesizers, recordings to shards. Training never imports this package."""

from megatron_cord.speech.verbalization import UnspeakableError, verbalize

__all__ = ["UnspeakableError", "verbalize"]
