"""Training audio made harder: noise, another speed, a narrower band.

Each effect is drawn from (seed, step, sample) alone.

So neither the number of ranks or workers nor a restart changes the audio of a step, and a sample sounds otherwise each
time it comes. Everything is off by default; evaluation and the teacher's text are never augmented.

What it simplifies: noise is white or pink, not recorded; the speed changes the pitch with it, as a tape's does; the
band has no slope but that of a Fourier transform's edge, smoothed.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from megatron_cord.data.audio.resample import resample
from megatron_cord.data.samples import PromptLimits, Sample
from megatron_cord.errors import CordError

_SPEED_GRID = 100  # speeds are hundredths, so that resampling has few filters
_EDGE = 100.0  # Hz over which a band fades out


@dataclass(frozen=True)
class AugmentationConfig:
    """Each effect's probability, and the range in which its strength is drawn evenly."""

    noise: float = 0.0  #: probability of added noise
    noise_snr: tuple[float, float] = (10.0, 30.0)  #: power of the speech over that of the noise, dB
    speed: float = 0.0  #: probability of another speed
    speed_range: tuple[float, float] = (0.9, 1.1)  #: 1 is the recording's own
    band: float = 0.0  #: probability of a narrower band
    band_range: tuple[float, float] = (3000.0, 7000.0)  #: its upper end, Hz; a telephone's is 3400

    def __post_init__(self) -> None:
        for name in ("noise", "speed", "band"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise CordError(f"data.augmentation.{name} is a probability between 0 and 1, not {getattr(self, name)}")
        limits = {"noise_snr": (-10.0, 100.0), "speed_range": (0.5, 2.0), "band_range": (500.0, 8000.0)}
        for name, (least, most) in limits.items():
            low, high = getattr(self, name)
            if not least <= low <= high <= most:
                raise CordError(
                    f"data.augmentation.{name} is {low} to {high}; write the smaller one first, both from {least:g} "
                    f"to {most:g}"
                )

    @property
    def changes(self) -> bool:
        """Whether any effect can occur."""
        return max(self.noise, self.speed, self.band) > 0.0


def augment(
    sample: Sample,
    config: AugmentationConfig,
    *,
    seed: int,
    step: int,
    limits: PromptLimits = PromptLimits(),  # noqa: B008  (it is immutable)
) -> Sample:
    """Return the sample as it sounds at one step; each of its recordings has draws of its own.

    Args:
        sample: its recordings are float32 [samples], not changed in place.
        config: what may happen to it.
        seed: of the run.
        step: counted from 0.
        limits: of a clip's length; a speed that would leave them is left out.

    Returns:
        The same sample with float32 [samples] in [-1, 1]; the very same object if nothing happens to it.
    """
    if not config.changes:
        return sample
    recordings, changed = sample.recordings, []
    for number, waveform in enumerate(recordings):
        draw = f"{seed}\x1f{step}\x1f{sample.id}" + (f"\x1f{number}" if number else "")
        changed.append(_augment(waveform, sample.sampling_rate, config, draw, limits))
    same = all(new is old for new, old in zip(changed, recordings, strict=True))
    return sample if same else sample.with_recordings(changed)


def add_noise(waveform: np.ndarray, snr: float, draw: str, *, pink: bool | None = None) -> np.ndarray:
    """Return a recording, float32 [samples] in [-1, 1], with white or pink noise.

    Args:
        waveform: not changed in place.
        snr: power of the speech over that of the noise, dB.
        draw: stands for the noise: equal draws make equal noise.
        pink: whether it is pink or white; None leaves that to the draw.
    """
    return _within_one(_noisy(waveform, snr, _draws(draw), pink))


def limit_band(waveform: np.ndarray, highest: float, rate: int) -> np.ndarray:
    """Return a recording, float32 [samples] in [-1, 1], without what lies above a frequency, Hz."""
    return _within_one(_band_limited(waveform, highest, rate))


def _augment(
    waveform: np.ndarray, rate: int, config: AugmentationConfig, draw: str, limits: PromptLimits
) -> np.ndarray:
    """Return one recording as it sounds; the very same array if nothing happens to it."""
    draws = _draws(draw)
    happens, strength = draws.random_raw(6).reshape(2, 3) / 2.0**64
    audio = waveform
    if happens[0] < config.speed:
        audio = _at_speed(audio, _between(config.speed_range, strength[0]), limits)
    if happens[1] < config.band:
        audio = _band_limited(audio, _between(config.band_range, strength[1]), rate)
    if happens[2] < config.noise:
        audio = _noisy(audio, _between(config.noise_snr, strength[2]), draws)
    return waveform if audio is waveform else _within_one(audio)


def _draws(draw: str) -> np.random.PCG64:
    digest = hashlib.sha256(draw.encode()).digest()
    return np.random.PCG64(np.random.SeedSequence(list(digest)))  # its raw stream never changes with numpy's version


def _within_one(audio: np.ndarray) -> np.ndarray:
    peak = float(np.abs(audio).max(initial=0.0))
    scaled: np.ndarray = (audio if peak <= 1.0 else audio / peak).astype(np.float32)
    return scaled


def _between(bounds: tuple[float, float], draw: float) -> float:
    return bounds[0] + draw * (bounds[1] - bounds[0])


def _at_speed(audio: np.ndarray, speed: float, limits: PromptLimits) -> np.ndarray:
    hundredths = round(speed * _SPEED_GRID)
    changed = resample(audio, hundredths, _SPEED_GRID)  # fewer samples at the same rate: faster
    too_long = limits.longest is not None and len(changed) > max(limits.longest, len(audio))
    return audio if too_long or len(changed) < limits.shortest else changed


def _band_limited(audio: np.ndarray, highest: float, rate: int) -> np.ndarray:
    spectrum = np.fft.rfft(audio.astype(np.float64))
    frequencies = np.fft.rfftfreq(len(audio), 1.0 / rate)
    return np.fft.irfft(spectrum * np.clip((highest - frequencies) / _EDGE + 1.0, 0.0, 1.0), n=len(audio))


def _noisy(audio: np.ndarray, snr: float, draws: np.random.PCG64, pink: bool | None = None) -> np.ndarray:
    """White or pink noise of the given power below the speech's."""
    raw = draws.random_raw(2 * len(audio) + 1) / 2.0**64
    uniform = raw[1:].reshape(2, -1)
    noise = np.sqrt(-2.0 * np.log1p(-uniform[0])) * np.cos(
        2.0 * np.pi * uniform[1]
    )  # Box and Muller: normal, from the raw stream
    if raw[0] < 0.5 if pink is None else pink:
        spectrum = np.fft.rfft(noise)
        noise = np.fft.irfft(spectrum / np.sqrt(np.maximum(np.arange(len(spectrum)), 1.0)), n=len(noise))
    power, noise_power = float(np.mean(np.square(audio, dtype=np.float64))), float(np.mean(noise**2))
    if noise_power == 0.0:
        return audio
    noisy: np.ndarray = audio + noise * np.sqrt(power / noise_power / 10.0 ** (snr / 10.0))
    return noisy
