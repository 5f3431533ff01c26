"""Resampling against sines that are known in closed form."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_cord.data.audio import resample as module
from megatron_cord.data.audio.resample import resample

#: Prints a digest of noise at another rate, in 16 bits.
DIGEST = """
import hashlib, numpy as np
from megatron_cord.data.audio.resample import resample
noise = [0.1 * np.random.default_rng(i).normal(size=20000 + 1000 * i).astype(np.float32) for i in range(20)]
made = [resample(audio, 22050, 16000) for audio in noise]
print(hashlib.sha256((np.concatenate(made) * 32767).round().astype("<i2").tobytes()).hexdigest())
"""


@pytest.mark.parametrize(("source", "target"), [(22050, 16000), (16000, 22050), (48000, 16000), (8000, 16000)])
def test_a_sine_stays_that_sine(source: int, target: int) -> None:
    """Would catch a wrong phase, a shift by one sample, a wrong gain, and a wrong length."""
    frequency = 1000.0
    waveform = np.sin(2 * np.pi * frequency * np.arange(source) / source)
    resampled = resample(waveform, source, target)
    expected = np.sin(2 * np.pi * frequency * np.arange(target) / target)
    inner = slice(target // 10, -target // 10)
    assert resampled.shape == (target,) and resampled.dtype == np.float32
    assert np.abs(resampled[inner] - expected[inner]).max() < 2e-4


def test_what_the_target_cannot_hold_is_removed() -> None:
    """Would catch aliasing: 10 kHz must not come back as 6 kHz at a rate of 16 kHz."""
    waveform = np.sin(2 * np.pi * 10000.0 * np.arange(22050) / 22050)
    assert np.abs(resample(waveform, 22050, 16000)[1600:-1600]).max() < 1e-3


def test_short_and_equal_rates() -> None:
    """Would catch a crash on recordings shorter than the filter, and a changed waveform where nothing is to be done."""
    assert len(resample(np.ones(3), 22050, 16000)) == 3
    waveform = np.array([0.5, -0.25], dtype=np.float32)
    assert np.array_equal(resample(waveform, 16000, 16000), waveform)
    assert resample(np.zeros(0), 22050, 16000).shape == (0,)


def test_samples_do_not_depend_on_threads_and_processor() -> None:
    """Catches speech whose last bits, and with them a data set's checksums, differ from machine to machine.

    (Other BLAS than OpenBLAS have one kernel.)
    """
    made = set()
    for kernel, threads in [("Haswell", "1"), ("Haswell", "2"), ("Sandybridge", "1")]:
        environment = os.environ | {
            "OPENBLAS_CORETYPE": kernel,
            "OPENBLAS_NUM_THREADS": threads,
            "PYTHONPATH": str(Path(module.__file__).parents[3]),
        }
        made.add(
            subprocess.run(
                [sys.executable, "-c", DIGEST], env=environment, capture_output=True, text=True, check=True
            ).stdout
        )
    assert len(made) == 1 and made != {""}
