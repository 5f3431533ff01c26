"""Noise in spoken sets: which recordings get it, and how loud it is, drawn from the set's seed and the question's id.

So a question's noise depends neither on the others of its set nor on its voice.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from megatron_cord.data.audio.augmentation import add_noise


@dataclass(frozen=True)
class Noise:
    """Pink noise under one recording.

    Attributes:
        snr: power of the speech over that of the noise, dB.
        draw: stands for the noise: equal draws make equal noise.
    """

    snr: float
    draw: str

    def under(self, recording: np.ndarray) -> np.ndarray:
        """Return a recording, float32 [samples], with the noise, in [-1, 1]."""
        return add_noise(recording, self.snr, self.draw, pink=True)


def draw_noise(share: float, snr: tuple[float, float], draw: str) -> Noise | None:
    """Return the noise of one recording; None if it gets none.

    Args:
        share: of the recordings that get noise.
        snr: between which it is drawn evenly, dB, to a tenth.
        draw: stands for the recording.
    """
    digest = hashlib.sha256(f"noise\x1f{draw}".encode()).digest()
    happens, strength = (int.from_bytes(digest[i : i + 8], "big") / 2.0**64 for i in (0, 8))
    return Noise(round(snr[0] + strength * (snr[1] - snr[0]), 1), draw) if happens < share else None
