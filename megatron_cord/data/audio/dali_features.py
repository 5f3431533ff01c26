"""The same features by NVIDIA DALI, a batch at a time: `data.features=dali` or `dali_gpu` (extra ``dali``).

DALI transforms and filters; scaling and the silence behind a clip are `features.normalize`'s, so that both backends
agree by construction in all but the rounding of the spectrum. What it simplifies: the waveform is decoded and
resampled before (DALI's resampler differs from others by up to 0.06 in a feature).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from megatron_cord.data.audio.features import FLOOR, MAX_FREQUENCY, FeatureConfig, Features, check_waveform, normalize
from megatron_cord.errors import CordError

_BATCH = 64  # clips of one run of the pipeline, and
_BATCH_SAMPLES = _BATCH * 480_000  # of them all, but for a longer clip: some encoders take recordings of any length
_THREADS = 2  # of DALI's own, on the CPU


class DaliFeatures:
    """A ``FeatureExtractor``. One batch at a time: threads that share it take turns.

    Args:
        config: of the checkpoint.
        device: "gpu" is the process's current CUDA device; features then lie on it.

    Raises:
        CordError: DALI is not installed, or there is no GPU for it.
    """

    def __init__(self, config: FeatureConfig, *, device: Literal["cpu", "gpu"]) -> None:
        try:
            import nvidia.dali  # noqa: F401
        except ImportError:
            raise CordError(
                "data.features=dali needs NVIDIA DALI; pip install megatron_cord[dali], or use data.features=torch"
            ) from None
        if device == "gpu" and not torch.cuda.is_available():
            raise CordError("data.features=dali_gpu needs a CUDA device; use dali or torch on this machine")
        self._config, self._device = config, device
        self._lock = threading.Lock()
        self._pipeline = self._build()

    def __call__(
        self,
        waveforms: Sequence[np.ndarray],
        names: Sequence[str],
        sampling_rates: Sequence[int],
        windows: Sequence[int] | None = None,
    ) -> list[Features]:
        """See ``FeatureExtractor``."""
        configs = self._config.padded_to(windows, len(waveforms))
        for waveform, name, rate, config in zip(waveforms, names, sampling_rates, configs, strict=True):
            check_waveform(torch.as_tensor(waveform), config, sampling_rate=rate, name=name)
        features: list[Features] = []
        clips = list(zip(waveforms, configs, strict=True))
        for start, end in pairwise(_batches([len(waveform) for waveform in waveforms])):
            batch = clips[start:end]
            with self._lock:
                spectra = self._run([self._padded(waveform, config) for waveform, config in batch])
            for (waveform, config), spectrum in zip(batch, spectra, strict=True):
                sounding = spectrum[:, : config.sounding_frames(len(waveform))]
                features.append(normalize(sounding, config, len(waveform)))
        return features

    @staticmethod
    def _padded(waveform: np.ndarray, config: FeatureConfig) -> np.ndarray:
        wanted = config.samples_behind(config.sounding_frames(len(waveform)))
        return np.pad(np.asarray(waveform, np.float32), (0, max(0, wanted - len(waveform))))

    def _run(self, waveforms: list[np.ndarray]) -> list[Tensor]:
        """Compute log10 of the mel spectra, float32 [n_mels, frames] each, copied out of DALI's buffers."""
        self._pipeline.feed_input("audio", waveforms)
        (spectra,) = self._pipeline.run()
        if self._device == "cpu":
            return [torch.from_numpy(np.array(spectra.at(i))) for i in range(len(waveforms))]
        return [torch.utils.dlpack.from_dlpack(spectra[i]).clone() for i in range(len(waveforms))]

    def _build(self) -> Any:
        from nvidia.dali import Pipeline, fn, types

        config = self._config
        window = torch.hann_window(config.n_fft).tolist()
        device_id = torch.cuda.current_device() if self._device == "gpu" else None
        pipeline = Pipeline(batch_size=_BATCH, num_threads=_THREADS, device_id=device_id, prefetch_queue_depth=1)
        with pipeline:
            audio = fn.external_source(name="audio", device="cpu", dtype=types.DALIDataType.FLOAT, ndim=1)
            spectrum = fn.spectrogram(
                audio.gpu() if self._device == "gpu" else audio,
                nfft=config.n_fft,
                window_length=config.n_fft,
                window_step=config.hop_length,
                window_fn=window,
                center_windows=True,
                reflect_padding=True,
                power=2,
            )
            mel = fn.mel_filter_bank(
                spectrum,
                nfilter=config.n_mels,
                sample_rate=float(config.sampling_rate),
                freq_low=0.0,
                freq_high=MAX_FREQUENCY,
                mel_formula="slaney",
                normalize=True,
            )
            decades = float(np.log10(FLOOR))  # with a multiplier of one, "decibels" are powers of ten
            pipeline.set_outputs(fn.to_decibels(mel, multiplier=1.0, reference=1.0, cutoff_db=decades))
        pipeline.build()
        return pipeline


def _batches(lengths: Sequence[int]) -> list[int]:
    """Return where batches of clips of so many samples begin and, at last, end: from 0 to the number of clips."""
    borders, samples = [0], 0
    for number, length in enumerate(lengths):
        if number - borders[-1] == _BATCH or (number > borders[-1] and samples + length > _BATCH_SAMPLES):
            borders.append(number)
            samples = 0
        samples += length
    return [*borders, len(lengths)] if lengths else borders
