"""Other voices than espeak-ng's behind the interface of ``speech.SpeechSynthesizer``: Piper, Kokoro, any OpenAI-compatible speech endpoint.

Kokoro is the paper's synthesiser. It runs here, on the CPU, from files of its ONNX export, or behind an endpoint: it and CosyVoice have servers
that speak this protocol. No backend here promises equal results for equal arguments; a set that is resumed keeps what is made.
"""

from __future__ import annotations

import io
import wave
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from megatron_cord.data.resample import resample
from megatron_cord.errors import CordError
from megatron_cord.speech.endpoint import Endpoint, RequestRefused
from megatron_cord.speech.synthesizer import (
    SAMPLING_RATE,
    EspeakSynthesizer,
    SpeechSynthesizer,
    Utterance,
    UtteranceRefused,
    polish,
)


@dataclass(frozen=True)
class SynthesizerConfig:
    """Who speaks.

    Attributes:
        backend: "espeak", "piper", "kokoro" or "openai".
        voices: names as the backend has them; for Piper, paths of .onnx voices.
        directory: of Kokoro's files: one .onnx with the model, and one .bin or .npz with the voices; only for "kokoro".
        url: of the endpoint, "http://127.0.0.1:8880/v1"; only for "openai".
        model: that the endpoint is asked for.
        api_key_variable: environment variable with the endpoint's key; unset means none.
        concurrency: requests in flight.
        timeout: seconds for one request.
        retries: of a request that fails for a passing reason, waiting longer each time.
        tolerated: utterances in a row that an endpoint may fail at after all retries; they are left out, and one more ends the work.
    """

    backend: Literal["espeak", "piper", "kokoro", "openai"] = "espeak"
    voices: tuple[str, ...] = ()
    directory: str | None = None
    url: str | None = None
    model: str = "kokoro"
    api_key_variable: str = "SPEECH_API_KEY"
    concurrency: int = 4
    timeout: float = 60.0
    retries: int = 4
    tolerated: int = 2

    def __post_init__(self) -> None:
        if self.backend == "kokoro" and not self.directory:
            raise CordError("the backend kokoro needs the directory of its model and voices")
        if self.backend == "openai" and not (self.url or "").startswith(("http://", "https://")):
            raise CordError("the backend openai needs the endpoint's address, such as http://127.0.0.1:8880/v1")
        if self.backend != "espeak" and not self.voices:
            raise CordError(f"the backend {self.backend} needs the names of its voices")
        if self.concurrency < 1 or self.timeout <= 0 or min(self.retries, self.tolerated) < 0:
            raise CordError("concurrency must be at least 1, timeout positive, retries and tolerated not negative")


def make_synthesizer(config: SynthesizerConfig) -> SpeechSynthesizer:
    """The backend that the configuration names."""
    if config.backend == "piper":
        return PiperSynthesizer()
    if config.backend == "kokoro":
        return KokoroSynthesizer(config.directory or "")
    if config.backend == "openai":
        return EndpointSynthesizer(config)
    return EspeakSynthesizer()


class PiperSynthesizer:
    """Piper's neural voices on the CPU, loaded once each.

    Raises:
        CordError: the package piper-tts is missing.
    """

    def __init__(self) -> None:
        try:
            import piper
        except ImportError:
            raise CordError("the backend piper needs the package piper-tts; pip install megatron_cord[piper]") from None
        self._piper = piper
        self._voices: dict[str, piper.PiperVoice] = {}

    def speak(self, utterances: Sequence[Utterance]) -> list[np.ndarray]:
        """See ``SpeechSynthesizer.speak``; a voice's pitch cannot be changed."""
        return [self._speak(utterance) for utterance in utterances]

    def _speak(self, utterance: Utterance) -> np.ndarray:
        name = utterance.voice.name
        if utterance.voice.pitch != 1.0:
            raise CordError(f"voice {name}: Piper cannot change the pitch; leave it at 1")
        if name not in self._voices:
            if not Path(name).is_file():
                raise CordError(
                    f"{name}: no such voice; give the path of a Piper voice (.onnx, its .onnx.json beside it)"
                )
            self._voices[name] = self._piper.PiperVoice.load(name)
        settings = self._piper.SynthesisConfig(length_scale=1.0 / utterance.voice.speed)
        chunks = list(self._voices[name].synthesize(utterance.text, syn_config=settings))
        if not chunks:
            raise UtteranceRefused("the voice made no sound of it")
        recording = np.concatenate([chunk.audio_float_array for chunk in chunks])
        return polish(resample(recording, chunks[0].sample_rate, SAMPLING_RATE), utterance)


class KokoroSynthesizer:
    """Kokoro-82M on the CPU (package kokoro-onnx). Voices whose name begins with "b" speak British English, all others American.

    Args:
        directory: with one .onnx and one .bin or .npz.

    Raises:
        CordError: the package or one of the files is missing, or they are not Kokoro's.
    """

    def __init__(self, directory: str) -> None:
        try:
            from kokoro_onnx import Kokoro
        except ImportError:
            raise CordError(
                "the backend kokoro needs the package kokoro-onnx; pip install megatron_cord[kokoro]"
            ) from None
        files = list(Path(directory).glob("*")) if Path(directory).is_dir() else []
        models = [str(f) for f in files if f.suffix == ".onnx"]
        voices = [str(f) for f in files if f.suffix in {".bin", ".npz"}]
        if len(models) != 1 or len(voices) != 1:
            raise CordError(
                f"{directory}: Kokoro's directory must hold one .onnx and one .bin or .npz, not {len(models)} and {len(voices)}"
            )
        try:
            self._kokoro = Kokoro(models[0], voices[0])
        except Exception as error:  # onnxruntime raises types of its own
            raise CordError(f"{directory}: Kokoro does not start ({str(error)[:200]})") from error

    def speak(self, utterances: Sequence[Utterance]) -> list[np.ndarray]:
        """See ``SpeechSynthesizer.speak``; a voice's pitch cannot be changed."""
        return [self._speak(utterance) for utterance in utterances]

    def _speak(self, utterance: Utterance) -> np.ndarray:
        voice = utterance.voice
        if voice.pitch != 1.0:
            raise CordError(f"voice {voice.name}: Kokoro cannot change the pitch; leave it at 1")
        if not 0.5 <= voice.speed <= 2.0:
            raise CordError(f"voice {voice.name}: speed {voice.speed}; Kokoro speaks at 0.5 to 2")
        if voice.name not in (known := self._kokoro.get_voices()):
            raise CordError(f"Kokoro has no voice {voice.name!r}; it has {', '.join(known[:8])} …")
        language = "en-gb" if voice.name.startswith("b") else "en-us"
        try:
            recording, rate = self._kokoro.create(utterance.text, voice=voice.name, speed=voice.speed, lang=language)
        except ValueError as error:
            raise UtteranceRefused(str(error)[:200]) from error
        return polish(resample(recording, rate, SAMPLING_RATE), utterance)


class EndpointSynthesizer:
    """A server with OpenAI's `POST /audio/speech`.

    Args:
        config: address, model and patience.
    """

    def __init__(self, config: SynthesizerConfig) -> None:
        self._config = config
        assert config.url is not None  # the configuration's own check
        self._endpoint = Endpoint(
            config.url, key_variable=config.api_key_variable, timeout=config.timeout, retries=config.retries
        )
        self._failed = 0  # in a row; threads may miscount it by one, which only moves the end by one

    def speak(self, utterances: Sequence[Utterance]) -> list[np.ndarray]:
        """See ``SpeechSynthesizer.speak``.

        Raises:
            UtteranceRefused: the server will not speak one of the texts, or fails at it as it does at few others.
            CordError: the server is away or answers something else than speech.
        """
        with ThreadPoolExecutor(self._config.concurrency) as pool:
            return list(pool.map(self._speak, utterances))

    def _speak(self, utterance: Utterance) -> np.ndarray:
        voice = utterance.voice
        if voice.pitch != 1.0:
            raise CordError(f"voice {voice.name}: the endpoint cannot change the pitch; leave it at 1")
        body = {
            "model": self._config.model,
            "input": utterance.text,
            "voice": voice.name,
            "speed": voice.speed,
            "response_format": "wav",
        }
        try:
            content = self._endpoint.post("audio/speech", json=body).content
        except RequestRefused as error:
            raise UtteranceRefused(str(error)) from error
        except CordError as error:
            self._failed += 1
            if self._failed > self._config.tolerated:
                raise
            raise UtteranceRefused(str(error)) from error
        self._failed = 0
        try:
            with wave.open(io.BytesIO(content)) as file:
                channels, width, rate = file.getnchannels(), file.getsampwidth(), file.getframerate()
                data = file.readframes(-1)  # streamed WAV files do not know their length
        except (wave.Error, EOFError, RuntimeError) as error:
            raise CordError(
                f"{self._config.url} answered something else than a WAV file ({error or 'it ends too early'})"
            ) from error
        if width != 2 or not 8000 <= rate <= 96000:
            raise CordError(
                f"{self._config.url} sends {8 * width}-bit audio at {rate} Hz; set it to 16-bit PCM of 8 to 96 kHz"
            )
        recording = (
            np.frombuffer(data[: len(data) // (2 * channels) * 2 * channels], "<i2")
            .astype(np.float32)
            .reshape(-1, channels)
            .mean(axis=1)
        )
        return polish(resample(recording, rate, SAMPLING_RATE), utterance)
