"""Log-mel features as Whisper's encoders take them, equal to transformers' WhisperFeatureExtractor.

The short-time Fourier transform runs on the device of the waveform, and only over the frames that audio reaches: what
pads a clip to the encoder's window is silence, whose features are known. The configuration is read from a
checkpoint's ``preprocessor_config.json``, so that training gets exactly the features of every other user of
the checkpoint.

What it simplifies: one clip a transform; dithering and waveform normalisation are refused, as no supported model uses
them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from megatron_cord.errors import CordError
from megatron_cord.runtime.files import read_json_object

MAX_FREQUENCY = 8000.0  #: Hz; WhisperFeatureExtractor does not make it configurable
FLOOR = 1e-10  #: of the mel spectrum
_DYNAMIC_RANGE = 8.0  # in powers of ten
_TILE_FRAMES = 512  # that are worked on at a time: in a CPU's cache, and in memory that is used again and again
_BAND_MELS = 32  # that share their columns of the filters' matrix


@dataclass(frozen=True)
class FeatureConfig:
    """What a ``preprocessor_config.json`` contains.

    The defaults are Whisper's and Qwen2-Audio's, but for the 128 mels of the latter.

    Attributes:
        n_mels: mel bands ("feature_size").
        hop_length: samples from frame to frame.
        n_fft: samples a frame looks at.
        n_samples: the encoder's window, to which every clip is padded.
        sampling_rate: Hz.
    """

    n_mels: int = 80
    hop_length: int = 160
    n_fft: int = 400
    n_samples: int = 480000
    sampling_rate: int = 16000

    @property
    def max_frames(self) -> int:
        """Frames in the window."""
        return self.n_samples // self.hop_length

    @property
    def max_seconds(self) -> float:
        """Length of the window."""
        return self.n_samples / self.sampling_rate

    def num_frames(self, samples: int) -> int:
        """Return how many frames a clip of ``samples`` fills: the sum of the extractor's attention mask."""
        return min(math.ceil(samples / self.hop_length), self.max_frames)

    def sounding_frames(self, samples: int) -> int:
        """Return how many frames a clip of ``samples`` reaches; later ones see silence alone."""
        return min((samples + self.n_fft // 2) // self.hop_length + 1, self.max_frames)

    def samples_behind(self, frames: int) -> int:
        """Return how many samples the first ``frames`` frames see, and as many as a reflection of the end."""
        return min(frames * self.hop_length + self.n_fft, self.n_samples)

    def padded_to(self, windows: Sequence[int] | None, clips: int) -> list[FeatureConfig]:
        """Return the configuration of each of so many clips: with its window in samples, or with this one's if None."""
        return [self] * clips if windows is None else [replace(self, n_samples=window) for window in windows]

    @classmethod
    def from_checkpoint(cls, directory: str | Path) -> FeatureConfig:
        """Read ``preprocessor_config.json`` (or the feature extractor's part of ``processor_config.json``).

        Raises:
            CordError: when there is no such file, when it is not JSON, and for values that are not supported.
        """
        for name in ("preprocessor_config.json", "processor_config.json"):
            path = Path(directory) / name
            if path.is_file():
                return cls._from_file(path)
        raise CordError(f"{directory} has no preprocessor_config.json; copy it from the original checkpoint")

    @classmethod
    def _from_file(cls, path: Path) -> FeatureConfig:
        content = read_json_object(path, "copy it from the original checkpoint")
        content = content.get("feature_extractor", content)
        if not isinstance(content, dict):
            raise CordError(f"{path} holds no JSON object; copy it from the original checkpoint")
        for key in ("dither", "do_normalize", "padding_value"):
            if content.get(key):
                raise CordError(f"{path}: {key} is {content[key]!r}, which is not supported; only 0 or false is")
        rate = _positive_integer(content, "sampling_rate", 16000, path)
        chunk_length = content.get("chunk_length", 30)
        if not isinstance(chunk_length, (int, float)):
            raise CordError(f"{path}: chunk_length is {chunk_length!r}; write the window's seconds as a number")
        config = cls(
            n_mels=_positive_integer(content, "feature_size", 80, path),
            hop_length=_positive_integer(content, "hop_length", 160, path),
            n_fft=_positive_integer(content, "n_fft", 400, path),
            n_samples=_positive_integer(content, "n_samples", round(chunk_length * rate), path),
            sampling_rate=rate,
        )
        if config.n_samples < max(config.hop_length, config.n_fft):
            raise CordError(
                f"{path}: the window of {config.n_samples} samples is shorter than one frame; increase n_samples"
            )
        return config


@dataclass(frozen=True, eq=False)
class Features:
    """One clip's features.

    Attributes:
        log_mel: float32 [n_mels, max_frames], on the waveform's device.
        num_frames: how many of the frames are audio, the rest being padding.
    """

    log_mel: Tensor
    num_frames: int


def log_mel(
    waveform: np.ndarray | Tensor, config: FeatureConfig, *, sampling_rate: int, name: str = "audio"
) -> Features:
    """Whisper's log-mel spectrogram of one clip, padded with silence to the encoder's window.

    Args:
        waveform: real [samples], mono, in [-1, 1].
        config: of the checkpoint.
        sampling_rate: of the waveform, in Hz.
        name: the sample's id, for errors.

    Returns:
        Features within 1e-4 of ``WhisperFeatureExtractor(waveform, return_attention_mask=True)``.

    Raises:
        CordError: for another rate, more than one channel, no samples, NaN or infinite samples, and clips longer than
            the window.
    """
    audio = torch.as_tensor(waveform)
    check_waveform(audio, config, sampling_rate=sampling_rate, name=name)
    audio = audio.to(torch.float32)
    frames = config.sounding_frames(len(audio))
    silence, reach = max(0, config.samples_behind(frames) - len(audio)), config.n_fft // 2
    padded = torch.nn.functional.pad(audio[None], (0, silence))
    padded = torch.nn.functional.pad(padded, (reach, reach), mode="reflect")[0]
    # The last frame is centred on the window's end, or on silence; Whisper leaves it out.
    frames_in = padded.unfold(0, config.n_fft, config.hop_length)[:frames]
    mel = audio.new_empty(config.n_mels, frames)
    for start in range(0, frames, _TILE_FRAMES):
        tile = slice(start, start + _TILE_FRAMES)
        spectrum = torch.fft.rfft(frames_in[tile] * _window(config.n_fft, audio.device))
        power = (spectrum.real.square() + spectrum.imag.square()).T
        for band in _bands(config.n_mels, config.n_fft, config.sampling_rate, audio.device):
            mel[band.mels, tile] = band.filters @ power[band.bins]
    return normalize(mel.clamp_(min=FLOOR).log10_(), config, len(audio))


def check_waveform(audio: Tensor, config: FeatureConfig, *, sampling_rate: int, name: str) -> None:
    """Refuse a waveform that cannot be featurised."""
    if sampling_rate != config.sampling_rate:
        raise CordError(
            f"sample {name}: audio at {sampling_rate} Hz, the encoder takes {config.sampling_rate} Hz; resample it"
        )
    if audio.ndim != 1:
        raise CordError(
            f"sample {name}: audio of shape {tuple(audio.shape)} is not mono; mix its channels down to [samples]"
        )
    if len(audio) == 0:
        raise CordError(f"sample {name}: audio has no samples; remove it or record it again")
    if len(audio) > config.n_samples:
        seconds = len(audio) / config.sampling_rate
        raise CordError(
            f"sample {name}: {seconds:.2f} s of audio, the encoder's window is {config.max_seconds:.2f} s; shorten "
            "or split it"
        )
    if not audio.is_floating_point():
        raise CordError(f"sample {name}: audio is {audio.dtype}; convert it to float32 in [-1, 1]")
    # The sum of all shows at once whether to look closer: it is not finite either, but may also overflow.
    if not bool(audio.sum().isfinite()) and not bool(audio.isfinite().all()):
        raise CordError(f"sample {name}: audio holds NaN or infinite samples; remove it or record it again")


def normalize(sounding: Tensor, config: FeatureConfig, samples: int) -> Features:
    """Apply Whisper's scaling, and add silence behind the clip.

    Args:
        sounding: log10 of the mel spectrum, at least `FLOOR`, float32 [n_mels, sounding frames]: those that a clip of
            ``samples`` reaches.
        config: of the checkpoint.
        samples: of the clip.
    """
    loudest = sounding.max()
    features = sounding.new_empty(config.n_mels, config.max_frames)
    torch.maximum(sounding, loudest - _DYNAMIC_RANGE, out=features[:, : sounding.shape[1]])
    features[:, sounding.shape[1] :] = (loudest - _DYNAMIC_RANGE).clamp(min=math.log10(FLOOR))
    return Features(features.add_(4.0).div_(4.0), config.num_frames(samples))


def stack_features(clips: Sequence[Tensor]) -> Tensor:
    """Return clips' features [n_mels, frames] as [C, n_mels, frames], with zeros behind the shorter ones."""
    longest = max(clip.shape[1] for clip in clips)
    return torch.stack([torch.nn.functional.pad(clip, (0, longest - clip.shape[1])) for clip in clips])


class FeatureExtractor(Protocol):
    """Makes features of several clips at once; threads may share it."""

    def __call__(
        self,
        waveforms: Sequence[np.ndarray],
        names: Sequence[str],
        sampling_rates: Sequence[int],
        windows: Sequence[int] | None = None,
    ) -> list[Features]:
        """One clip's features each, as `log_mel` makes them, in the same order.

        Args:
            waveforms: of the clips.
            names: of their samples, for errors.
            sampling_rates: of the waveforms.
            windows: samples to which each is padded; None: the configuration's window, for all.
        """
        ...


class TorchFeatures:
    """`log_mel`, clip by clip, on the CPU.

    Args:
        config: of the checkpoint.
    """

    def __init__(self, config: FeatureConfig) -> None:
        self._config = config

    def __call__(
        self,
        waveforms: Sequence[np.ndarray],
        names: Sequence[str],
        sampling_rates: Sequence[int],
        windows: Sequence[int] | None = None,
    ) -> list[Features]:
        """See ``FeatureExtractor``."""
        clips = zip(waveforms, names, sampling_rates, self._config.padded_to(windows, len(waveforms)), strict=True)
        return [log_mel(waveform, config, sampling_rate=rate, name=name) for waveform, name, rate, config in clips]


@lru_cache(maxsize=8)
def _window(n_fft: int, device: torch.device) -> Tensor:
    return torch.hann_window(n_fft, device=device)


class _Band(NamedTuple):
    """Neighbouring mels, and the part of the spectrum that they weigh: filters [mels, bins]."""

    mels: slice
    bins: slice
    filters: Tensor


@lru_cache(maxsize=8)
def _bands(n_mels: int, n_fft: int, sampling_rate: int, device: torch.device) -> list[_Band]:
    """Return the filters without most of their zeros: a band spans 200 Hz at the bottom and 1000 Hz at the top."""
    filters, bands = mel_filters(n_mels, n_fft, sampling_rate), []
    for mels in (slice(first, first + _BAND_MELS) for first in range(0, n_mels, _BAND_MELS)):
        used = filters[mels].any(0).nonzero()
        bins = slice(int(used.min()), int(used.max()) + 1) if len(used) else slice(0, 1)
        bands.append(_Band(mels, bins, filters[mels, bins].contiguous().to(device)))
    return bands


@lru_cache(maxsize=8)
def mel_filters(n_mels: int, n_fft: int, sampling_rate: int) -> Tensor:
    """Slaney's triangular filters on Slaney's mel scale, each of unit area (Auditory Toolbox, 1998).

    Returns:
        float32 [n_mels, n_fft // 2 + 1].
    """
    frequencies = np.linspace(0.0, sampling_rate // 2, 1 + n_fft // 2)
    corners = _mel_to_hertz(np.linspace(0.0, _hertz_to_mel(MAX_FREQUENCY), n_mels + 2))
    lower, centre, upper = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    rising = (frequencies - lower) / (centre - lower)
    falling = (upper - frequencies) / (upper - centre)
    triangles = np.clip(np.minimum(rising, falling), 0.0, None)
    return torch.from_numpy((triangles * (2.0 / (upper - lower))).astype(np.float32))


# Slaney's scale is linear up to 1 kHz (mel 15) and logarithmic above it: 27 mels for a factor of 6.4.
_LINEAR_HERTZ = 200.0 / 3.0
_BREAK_HERTZ, _BREAK_MEL = 1000.0, 15.0
_LOG_STEP = math.log(6.4) / 27.0


def _hertz_to_mel(hertz: float) -> float:
    if hertz < _BREAK_HERTZ:
        return hertz / _LINEAR_HERTZ
    return _BREAK_MEL + math.log(hertz / _BREAK_HERTZ) / _LOG_STEP


def _mel_to_hertz(mel: np.ndarray) -> np.ndarray:
    return np.where(mel < _BREAK_MEL, mel * _LINEAR_HERTZ, _BREAK_HERTZ * np.exp(_LOG_STEP * (mel - _BREAK_MEL)))


def _positive_integer(content: dict[str, Any], key: str, default: int, path: Path) -> int:
    value = content.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != int(value) or value <= 0:
        raise CordError(f"{path}: {key} is {value!r}; write a positive whole number")
    return int(value)
