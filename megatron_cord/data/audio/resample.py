"""Changes the sampling rate of a recording: windowed-sinc interpolation, the same result every time.

Sums are in float64: in float32 their last bits depend on how many threads a BLAS uses and for which processor it was
written, and so did one in ten thousand of the 16-bit samples that are made of them.

What it simplifies: the whole recording is in memory at once, and rates are whole numbers of Hz.
"""

from __future__ import annotations

from functools import lru_cache
from math import gcd

import numpy as np

_ZERO_CROSSINGS = 24
_ROLLOFF = 0.95
_KAISER_BETA = 9.0


def resample(waveform: np.ndarray, source_rate: int, target_rate: int) -> np.ndarray:
    """Band-limited interpolation by a polyphase filter bank (J. O. Smith, "Digital Audio Resampling").

    Content above 0.95 of the lower of the two Nyquist frequencies fades out; the pass band is flat within 0.1 dB.

    Args:
        waveform: [samples], any real dtype.
        source_rate: Hz.
        target_rate: Hz.

    Returns:
        float32 [ceil(samples · target_rate / source_rate)].
    """
    if source_rate == target_rate:
        return waveform.astype(np.float32)
    divisor = gcd(source_rate, target_rate)
    step, phases = source_rate // divisor, target_rate // divisor  # `phases` outputs for each `step` inputs
    filters, reach = _filter_bank(step, phases)
    blocks = max(1, -(-len(waveform) // step))
    padded = np.zeros(blocks * step + 2 * reach)
    padded[reach : reach + len(waveform)] = waveform
    windows = np.lib.stride_tricks.sliding_window_view(padded, step + 2 * reach)[::step]
    resampled = (windows @ filters).reshape(-1).astype(np.float32)
    whole: np.ndarray = resampled[: -(-len(waveform) * phases // step)]
    return whole


@lru_cache(maxsize=8)
def _filter_bank(step: int, phases: int) -> tuple[np.ndarray, int]:
    """One filter a column, float64 [step + 2 · reach, phases], and how many inputs each side a filter reaches."""
    cutoff = _ROLLOFF * min(1.0, phases / step)  # as a fraction of the source's Nyquist frequency
    half_width = _ZERO_CROSSINGS / cutoff
    reach = int(np.ceil(half_width))
    taps = np.arange(-reach, step + reach, dtype=np.float64)[:, None]
    distance = taps - np.arange(phases, dtype=np.float64)[None, :] * step / phases
    inside = np.clip(1.0 - (distance / half_width) ** 2, 0.0, None)
    window = np.where(inside > 0.0, np.i0(_KAISER_BETA * np.sqrt(inside)) / np.i0(_KAISER_BETA), 0.0)
    return cutoff * np.sinc(cutoff * distance) * window, reach
