"""Effects on training audio: what they do, and that a step hears the same whatever happened before it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from megatron_cord.data.audio.augmentation import AugmentationConfig, augment
from megatron_cord.data.loader import SampleLoader
from megatron_cord.data.samples import PromptLimits, Sample
from megatron_cord.data.turns import AudioPart, Turn
from megatron_cord.errors import CordError
from tests.data.ordering.sets import row_of

RATE = 16000
TIME = np.arange(RATE) / RATE
LOW_AND_HIGH = (0.3 * np.sin(2 * np.pi * 440 * TIME) + 0.3 * np.sin(2 * np.pi * 6000 * TIME)).astype(np.float32)
ALL = AugmentationConfig(noise=0.7, speed=0.7, band=0.7)


def sample(name: str = "q", waveform: np.ndarray = LOW_AND_HIGH) -> Sample:
    return Sample(name, "what", waveform, answer="4", solution="s", voice="v")


def loudness(audio: np.ndarray, hertz: float) -> float:
    return float(np.abs(np.fft.rfft(audio))[round(hertz * len(audio) / RATE)])


def test_nothing_happens_by_default() -> None:
    """Would catch training audio that is changed without being asked to."""
    assert augment(sample(), AugmentationConfig(), seed=0, step=0) is not None
    original = sample()
    assert augment(original, AugmentationConfig(), seed=0, step=0) is original


def test_the_noise_has_its_power() -> None:
    """Would catch decibels of amplitude taken for power, and noise that is the same at every step."""
    config = AugmentationConfig(noise=1.0, noise_snr=(20.0, 20.0))
    heard = [augment(sample(), config, seed=0, step=step) for step in range(4)]
    for item in heard:
        noise = item.waveform - LOW_AND_HIGH
        ratio = 10 * np.log10(np.mean(LOW_AND_HIGH**2) / np.mean(noise**2))
        assert ratio == pytest.approx(20.0, abs=0.01) and item.waveform.dtype == np.float32
        assert (item.id, item.question, item.answer, item.solution, item.voice) == ("q", "what", "4", "s", "v")
    assert not np.array_equal(heard[0].waveform, heard[1].waveform)
    assert (
        len(
            {
                abs(loudness(h.waveform - LOW_AND_HIGH, 50) / loudness(h.waveform - LOW_AND_HIGH, 7000)) > 3
                for h in heard
            }
        )
        == 2
    ), "white and pink"


def test_the_speed_changes_length_and_pitch() -> None:
    """Would catch a faster sample that is longer, and one that exceeds the encoder's window."""
    fast = augment(sample(), AugmentationConfig(speed=1.0, speed_range=(1.25, 1.25)), seed=0, step=0).waveform
    assert len(fast) == RATE / 1.25 and loudness(fast, 550) > 100 * loudness(fast, 440)
    slow = AugmentationConfig(speed=1.0, speed_range=(0.5, 0.5))
    assert len(augment(sample(), slow, seed=0, step=0).waveform) == 2 * RATE
    assert len(augment(sample(), slow, seed=0, step=0, limits=PromptLimits(longest=30000)).waveform) == RATE


def test_the_band_ends() -> None:
    """Would catch a filter that lets the high part through, or takes the low one."""
    narrow = augment(sample(), AugmentationConfig(band=1.0, band_range=(3400.0, 3400.0)), seed=0, step=0).waveform
    assert loudness(narrow, 6000) < 1.0 and loudness(narrow, 440) == pytest.approx(
        loudness(LOW_AND_HIGH, 440), rel=1e-3
    )


def test_it_depends_on_seed_step_and_sample_alone() -> None:
    """Would catch a state that is drawn from: a resumed run, or one with more workers, would hear something else."""
    loud = [sample(f"q{i}", np.full(4000, 0.9, np.float32)) for i in range(12)]

    def batches(workers: int, steps: range) -> list[np.ndarray]:
        loader = SampleLoader(
            row_of(loud, 5), batch_size=4, workers=workers, change=lambda s, step: augment(s, ALL, seed=5, step=step)
        )
        heard = [prepared.sample.waveform for step in steps for prepared in loader.batch(step).samples]
        loader.close()
        return heard

    whole = batches(0, range(6))
    resumed = batches(3, range(3, 6))
    assert all(np.array_equal(a, b) for a, b in zip(whole[12:], resumed, strict=True))
    assert all(np.abs(audio).max() <= 1.0 for audio in whole)
    assert len({audio.tobytes() for audio in whole}) > 15
    other = augment(loud[0], ALL, seed=6, step=0).waveform
    assert not np.array_equal(other, augment(loud[0], ALL, seed=5, step=0).waveform)


def test_every_recording_is_changed_by_draws_of_its_own() -> None:
    """Catches recordings behind the first that stay as they are, or have the first one's noise again."""
    turns = (Turn("user", (AudioPart(0, "what"), AudioPart(1, "and this"))),)
    several = replace(sample(), question="", turns=turns, others=(LOW_AND_HIGH,))
    config = AugmentationConfig(noise=1.0)
    first, second = augment(several, config, seed=0, step=3).recordings
    assert np.array_equal(first, augment(sample(), config, seed=0, step=3).waveform)
    assert not np.array_equal(second, first) and not np.array_equal(second, LOW_AND_HIGH)
    assert augment(several, AugmentationConfig(), seed=0, step=3) is several


def test_silence_stays_silence() -> None:
    """Would catch a division by the power of nothing."""
    quiet = augment(
        sample(waveform=np.zeros(1000, np.float32)), AugmentationConfig(noise=1.0, band=1.0), seed=0, step=0
    )
    assert np.array_equal(quiet.waveform, np.zeros(1000, np.float32))


@pytest.mark.parametrize(
    ("name", "value"),
    [("noise", 1.5), ("noise_snr", (30.0, 10.0)), ("speed_range", (0.0, 1.0)), ("band_range", (1.0, 9e9))],
)
def test_impossible_settings_are_named(name: str, value: object) -> None:
    """Would catch a probability above one or a range the wrong way round."""
    with pytest.raises(CordError, match=rf"data\.augmentation\.{name}"):
        AugmentationConfig(**{name: value})  # type: ignore[arg-type]
