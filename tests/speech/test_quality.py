"""Recordings that are not fit for training."""

from __future__ import annotations

import numpy as np

from megatron_cord.speech.quality import QualityConfig, recording_fault


def test_bad_recordings_are_found() -> None:
    """Would catch silence, clipping and odd lengths that end up in training."""
    time_axis = np.arange(16000) / 16000
    good = (0.5 * np.sin(2 * np.pi * 220 * time_axis)).astype(np.float32)
    quality = QualityConfig(max_seconds=2.0)
    assert recording_fault(good, quality) is None
    silent = good.copy()
    silent[3000:] = 0
    for bad, fault in [
        (good[:1000], "short"),
        (np.tile(good, 3), "long"),
        (silent, "silent"),
        (0 * good, "silent"),
        (np.clip(good, -0.2, 0.2), "clipped"),
        (good * np.nan, "finite"),
        (np.concatenate([[0.9], 0.012 * good / 0.5]).astype(np.float32), "too quiet"),
    ]:
        assert fault in (recording_fault(bad, quality) or "")
