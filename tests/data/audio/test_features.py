"""Features against transformers' WhisperFeatureExtractor, for Whisper's configuration and the quickstart's."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import WhisperFeatureExtractor
from transformers.audio_utils import mel_filter_bank

from megatron_cord.data.audio.features import FeatureConfig, log_mel, mel_filters
from megatron_cord.data.prompts.clips import ClipMaker, FeatureBackend
from megatron_cord.data.samples import Sample
from megatron_cord.data.turns import AudioPart, Turn
from megatron_cord.errors import CordError
from megatron_cord.plan.published import published

BACKENDS: tuple[FeatureBackend, ...] = ("torch", "dali")

CONFIGS = {
    "whisper": FeatureConfig(),
    "qwen2-audio": FeatureConfig(n_mels=128),
    "quickstart": FeatureConfig(n_mels=64, hop_length=320, n_fft=400, n_samples=40960),
    "window not a multiple of the hop": FeatureConfig(n_mels=40, hop_length=300, n_fft=512, n_samples=16000),
}


def extractor(config: FeatureConfig) -> WhisperFeatureExtractor:
    reference = WhisperFeatureExtractor(
        feature_size=config.n_mels,
        hop_length=config.hop_length,
        n_fft=config.n_fft,
        sampling_rate=config.sampling_rate,
        chunk_length=30,
    )
    reference.n_samples = config.n_samples
    reference.nb_max_frames = config.max_frames
    return reference


def recording(samples: int) -> np.ndarray:
    generator = np.random.default_rng(samples)
    tone = np.sin(np.arange(samples) * 0.05) * np.linspace(0.0, 0.7, samples)
    waveform: np.ndarray = (tone + 0.05 * generator.standard_normal(samples)).astype(np.float32)
    return waveform


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("samples", [1, 159, 160, 161, 319, 320, 321, 15999, 16000, 40960])
def test_equal_to_transformers(config: FeatureConfig, samples: int) -> None:
    """Would catch any difference in window, padding, mel scale, floor, scaling, and in the number of valid frames."""
    samples = min(samples, config.n_samples)
    waveform = recording(samples)
    expected = extractor(config)(waveform, sampling_rate=16000, return_attention_mask=True, return_tensors="pt")
    features = log_mel(waveform, config, sampling_rate=16000)
    assert features.log_mel.shape == expected["input_features"][0].shape == (config.n_mels, config.max_frames)
    assert features.log_mel.dtype == torch.float32
    assert (features.log_mel - expected["input_features"][0]).abs().max() < 1e-4
    assert features.num_frames == int(expected["attention_mask"].sum())


@pytest.mark.parametrize(("n_mels", "n_fft"), [(80, 400), (128, 400), (64, 512)])
def test_mel_filters(n_mels: int, n_fft: int) -> None:
    """Would catch HTK's scale in place of Slaney's, and a missing normalisation."""
    expected = mel_filter_bank(1 + n_fft // 2, n_mels, 0.0, 8000.0, 16000, norm="slaney", mel_scale="slaney").T
    assert np.abs(mel_filters(n_mels, n_fft, 16000).numpy() - expected).max() < 1e-7


@pytest.mark.parametrize("name", ["whisper", "qwen2-audio", "quickstart"])
def test_configuration_is_read_from_a_checkpoint(name: str, tmp_path: Path) -> None:
    """Would catch a key that transformers writes under another name."""
    extractor(CONFIGS[name]).save_pretrained(tmp_path)
    assert FeatureConfig.from_checkpoint(tmp_path) == CONFIGS[name]


def test_fractional_chunk_length_and_processor_config(tmp_path: Path) -> None:
    """Would catch a window of 2 s for 2.56 s, and checkpoints of newer transformers.

    Also which have one file for the processor.
    """
    content = {"feature_extractor": {"feature_size": 64, "hop_length": 320, "chunk_length": 2.56}}
    (tmp_path / "processor_config.json").write_text(json.dumps(content))
    assert FeatureConfig.from_checkpoint(tmp_path) == CONFIGS["quickstart"]


@pytest.mark.parametrize(
    ("waveform", "rate", "message"),
    [
        (np.zeros(40961, np.float32), 16000, "sample q7: 2.56 s of audio.*window is 2.56 s"),
        (np.zeros(64000, np.float32), 16000, "4.00 s of audio.*2.56 s"),
        (np.zeros(100, np.float32), 8000, "sample q7: audio at 8000 Hz.*16000"),
        (np.zeros(0, np.float32), 16000, "no samples"),
        (np.zeros((100, 2), np.float32), 16000, "not mono"),
        (np.array([0.0, np.nan], np.float32), 16000, "NaN"),
        (np.array([0.0, np.inf], np.float32), 16000, "NaN or infinite"),
        (np.zeros(100, np.int16), 16000, "int16"),
    ],
)
def test_bad_audio_is_named(waveform: np.ndarray, rate: int, message: str) -> None:
    """Would catch silent truncation, NaN features, and errors that do not say which sample."""
    with pytest.raises(CordError, match=message) as caught:
        log_mel(waveform, CONFIGS["quickstart"], sampling_rate=rate, name="q7")
    assert "sample q7" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not readable JSON"),
        ("[]", "no JSON object"),
        ('{"hop_length": 0}', "hop_length is 0"),
        ('{"hop_length": "160"}', "hop_length is '160'"),
        ('{"dither": 0.1}', "dither is 0.1"),
        ('{"n_samples": 100}', "shorter than one frame"),
        ('{"chunk_length": null}', "chunk_length is None"),
    ],
)
def test_bad_configuration_is_named(text: str, message: str, tmp_path: Path) -> None:
    """Would catch features that differ from the checkpoint's in silence."""
    (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises(CordError, match=message) as caught:
        FeatureConfig.from_checkpoint(tmp_path)
    assert "preprocessor_config.json" in str(caught.value)


def test_missing_configuration_is_named(tmp_path: Path) -> None:
    """Would catch a fall-back to defaults that do not fit the model."""
    with pytest.raises(CordError, match=r"no preprocessor_config\.json"):
        FeatureConfig.from_checkpoint(tmp_path)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_silence(config: FeatureConfig) -> None:
    """Would catch a floor under silence that is another than under padding."""
    waveform = np.zeros(5000, np.float32)
    expected = extractor(config)(waveform, sampling_rate=16000, return_tensors="pt")["input_features"][0]
    assert torch.equal(log_mel(waveform, config, sampling_rate=16000).log_mel, expected)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_dali_on_the_cpu_is_equal_too(config: FeatureConfig) -> None:
    """Would catch another window, mel scale or normalisation in DALI's pipeline, a buffer that is used again.

    Also clips in another order.

    Needs NVIDIA DALI (extra dali), which make setup does not install.
    """
    pytest.importorskip("nvidia.dali")
    from megatron_cord.data.audio.dali_features import DaliFeatures

    extract = DaliFeatures(config, device="cpu")
    lengths = [min(n, config.n_samples) for n in (1, 161, 3000, 16000, 40960, 480000, 15999)]
    waveforms = [recording(n) for n in lengths] + [np.zeros(900, np.float32)] * 60
    found = extract(waveforms, [str(i) for i in range(len(waveforms))], [16000] * len(waveforms))
    for waveform, features in zip(waveforms, found, strict=True):
        expected = extractor(config)(waveform, sampling_rate=16000, return_attention_mask=True, return_tensors="pt")
        assert (features.log_mel - expected["input_features"][0]).abs().max() < 1e-4
        assert features.num_frames == int(expected["attention_mask"].sum())
    with pytest.raises(CordError, match="sample q7: audio at 8000 Hz"):
        extract([waveforms[0]], ["q7"], [8000])


@pytest.mark.parametrize("model", ["qwen2_5_omni_7b", "qwen3_omni_30b_a3b"])
def test_dali_with_windows_of_clips(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches clips that DALI pads to the feature extractor's window where the encoder has none, and batches mixed up.

    Also reflections of what follows a clip that is the longest of its prompt.
    """
    pytest.importorskip("nvidia.dali")
    from megatron_cord.data.audio import dali_features

    monkeypatch.setattr(dali_features, "_BATCH_SAMPLES", 40_000)
    parts = tuple(AudioPart(number, "") for number in range(4))
    lengths = [(16001, 4800, 52345, 15999), (1700, 1760, 4799, 480001), (30000, 9000, 2000, 1601)]
    chats = [
        Sample("spoken", "", turns=(Turn("user", parts),)).with_recordings(list(map(recording, n))) for n in lengths
    ]
    features = FeatureConfig(n_mels=128, n_samples=4_800_000)
    of_torch, of_dali = (ClipMaker(published(model), features, backend, "error").make(chats) for backend in BACKENDS)
    for wanted, given in zip(chain(*chain(*of_torch)), chain(*chain(*of_dali)), strict=True):
        assert given.features.shape == wanted.features.shape and given.num_frames == wanted.num_frames
        assert (given.features - wanted.features).abs().max() < 1e-4


def test_dali_on_the_gpu_is_equal_too() -> None:
    """Would catch features that stay in DALI's buffers, or differ on the GPU. Needs NVIDIA DALI and a CUDA device."""
    pytest.importorskip("nvidia.dali")
    from megatron_cord.data.audio.dali_features import DaliFeatures

    if not torch.cuda.is_available():
        with pytest.raises(CordError, match="dali_gpu needs a CUDA device"):
            DaliFeatures(CONFIGS["whisper"], device="gpu")
        pytest.skip("no CUDA device")
    waveforms = [recording(n) for n in (5000, 90000)]
    for waveform, features in zip(
        waveforms, DaliFeatures(CONFIGS["whisper"], device="gpu")(waveforms, ["a", "b"], [16000] * 2), strict=True
    ):
        assert features.log_mel.is_cuda
        assert (
            features.log_mel.cpu() - log_mel(waveform, CONFIGS["whisper"], sampling_rate=16000).log_mel
        ).abs().max() < 1e-4
