"""Recordings to the clips that an encoder takes: cut where they are too long, with their features."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import Literal

import numpy as np

from megatron_cord.data.audio.features import FeatureConfig, FeatureExtractor, TorchFeatures
from megatron_cord.data.samples import AudioClip, Sample
from megatron_cord.errors import CordError
from megatron_cord.model.architecture import Architecture
from megatron_cord.model.families import family_of

_FEWEST_TOKENS = 2  # transformers takes a lone placeholder for one that is still to be expanded

LongAudio = Literal["error", "cut", "skip"]
FeatureBackend = Literal["torch", "dali", "dali_gpu"]


class ClipMaker:
    """Makes clips for one model. Threads may use it.

    Args:
        architecture: with an encoder.
        features: of the checkpoint.
        backend: what computes features.
        long_audio: what to do with a recording beyond the encoder's window; only "cut" takes it.

    Attributes:
        longest: samples of audio that the encoder takes at once.
        longest_cut: of a recording that is cut; None for any number.
        shortest: below which a clip is too short for it.
    """

    def __init__(
        self, architecture: Architecture, features: FeatureConfig, backend: FeatureBackend, long_audio: LongAudio
    ) -> None:
        assert architecture.encoder is not None
        self._arch, self._features, self._long_audio = architecture, features, long_audio
        self._has_window = architecture.encoder.chunks is None
        self._extract = _make_extractor(backend, features)
        family = family_of(architecture)
        self._pads_to_longest, self._joins_windows = family.pads_to_longest, family.joins_windows
        self._fewest_frames = next(n for n in count(1) if architecture.num_audio_tokens(n) >= _FEWEST_TOKENS)
        self.longest = architecture.encoder.max_clip_frames * features.hop_length
        if not self._pads_to_longest:
            self.longest = min(self.longest, features.n_samples)  # a processor without padding cuts nothing off
        seconds = family.longest_seconds
        self.longest_cut = None if seconds is None else seconds * features.sampling_rate
        # Behind the longest clip of a prompt there is no silence that would fill its last frame.
        self.shortest = self._fewest_frames * features.hop_length
        if not self._pads_to_longest:
            self.shortest -= features.hop_length - 1

    def num_frames(self, samples: int) -> int:
        """Return how many log-mel frames a clip of so many samples of audio fills, by itself in its prompt."""
        return samples // self._features.hop_length if self._pads_to_longest else self._features.num_frames(samples)

    def make(self, samples: Sequence[Sample]) -> list[list[list[AudioClip]]]:
        """Return each sample's clips, by recording; the features of all are made together.

        Raises:
            CordError: audio that ``log_mel`` refuses (another rate …), longer than the encoder's window unless it may
                be cut, or too short for the encoder.
        """
        windows = [
            (i, j, window)
            for i, sample in enumerate(samples)
            for j, waveform in enumerate(sample.recordings)
            for window in self._windows(waveform, sample.sampling_rate, _name(sample, j))
        ]
        features = self._extract(
            [window for *_, window in windows],
            [_name(samples[i], j) for i, j, _ in windows],
            [samples[i].sampling_rate for i, *_ in windows],
            self._lengths([(i, window.shape[0]) for i, _, window in windows]),
        )
        clips: list[list[list[AudioClip]]] = [[[] for _ in sample.recordings] for sample in samples]
        for (i, j, window), made in zip(windows, features, strict=True):
            tokens = self._arch.num_audio_tokens(made.num_frames)
            is_part = self._joins_windows and len(samples[i].recordings[j]) > self.longest
            if tokens < _FEWEST_TOKENS and not is_part:
                seconds = len(window) / samples[i].sampling_rate
                raise CordError(
                    f"sample {_name(samples[i], j)}: audio of {seconds:.2f} s is too short for the encoder; drop the "
                    "sample"
                )
            # What follows a clip is read by encoders with a window alone.
            log_mel = made.log_mel if self._has_window else made.log_mel[:, : made.num_frames].clone()
            clips[i][j].append(AudioClip(window, log_mel, made.num_frames, tokens))
        return clips

    def _lengths(self, clips: Sequence[tuple[int, int]]) -> list[int] | None:
        """Return to how many samples each clip is padded; None for all to the encoder's window.

        At least the width of one frame; so short a clip is refused once its frames are counted.

        Args:
            clips: sample's number and length of each.
        """
        if self._has_window:
            return None
        if not self._pads_to_longest:
            # As in a window of any length: behind its last frame's reach there is nothing to compute.
            hop, behind, window = self._features.hop_length, self._features.n_fft, self._features.n_samples
            return [min(-(-(length + behind) // hop) * hop, window) for _, length in clips]
        longest: dict[int, int] = {}
        for sample, length in clips:
            longest[sample] = max(length, longest.get(sample, self._features.n_fft))
        return [longest[sample] for sample, _ in clips]

    def _windows(self, audio: np.ndarray, rate: int, name: str) -> list[np.ndarray]:
        """Cut the recording into clips that the encoder can take, whole if it is short enough.

        Nothing is left out, but for a rest of joined windows that makes no token.
        """
        # What is no mono recording at the right rate gets log_mel's error.
        if rate != self._features.sampling_rate or audio.ndim != 1 or len(audio) <= self.longest:
            return [audio]
        if self._long_audio != "cut":
            seconds, window = (samples / rate for samples in (len(audio), self.longest))
            raise CordError(
                f"sample {name}: {seconds:.2f} s of audio, the encoder's window is {window:.2f} s; shorten it, or set "
                "data.long_audio to cut or skip"
            )
        if self.longest_cut is not None and len(audio) > self.longest_cut:
            seconds, longest = (samples / rate for samples in (len(audio), self.longest_cut))
            raise CordError(
                f"sample {name}: {seconds:.2f} s of audio, {self._arch.model_type} takes at most {longest:.2f} s; "
                "shorten it"
            )
        starts = list(range(0, len(audio), self.longest))
        if self._joins_windows:  # as their processors cut it
            rest = audio[starts[-1] :]
            if not self._arch.num_audio_tokens(self._features.num_frames(len(rest))):
                audio = audio[: starts.pop()]
        else:  # a rest too short for the encoder takes from its neighbour
            starts[-1] = min(starts[-1], len(audio) - self._fewest_frames * self._features.hop_length)
        return [audio[start:end] for start, end in zip(starts, [*starts[1:], len(audio)], strict=True)]


def _name(sample: Sample, recording: int) -> str:
    return sample.id if len(sample.recordings) == 1 else f"{sample.id}, recording {recording}"


def _make_extractor(backend: FeatureBackend, config: FeatureConfig) -> FeatureExtractor:
    if backend == "torch":
        return TorchFeatures(config)
    from megatron_cord.data.audio.dali_features import DaliFeatures  # an extra, which takes seconds to import

    return DaliFeatures(config, device="gpu" if backend == "dali_gpu" else "cpu")
