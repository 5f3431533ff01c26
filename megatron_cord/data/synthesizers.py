"""Other voices than espeak-ng's behind the interface of ``speech.SpeechSynthesizer``: Piper, and any OpenAI-compatible speech endpoint.

The endpoint is how Kokoro (the paper's synthesiser) or CosyVoice are used: both have servers that speak this protocol.
Neither backend promises equal results for equal arguments; a set that is resumed keeps the shards that are complete.
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

from megatron_cord.data.endpoint import Endpoint, RequestRefused
from megatron_cord.data.resample import resample
from megatron_cord.data.speech import SAMPLING_RATE, EspeakSynthesizer, SpeechSynthesizer, Utterance, UtteranceRefused, polish
from megatron_cord.errors import CordError


@dataclass(frozen=True)
class SynthesizerConfig:
    """Who speaks.

    Attributes:
        backend: "espeak", "piper" or "openai".
        voices: names as the backend has them; for Piper, paths of .onnx voices.
        url: of the endpoint, "http://127.0.0.1:8880/v1"; only for "openai".
        model: that the endpoint is asked for.
        api_key_variable: environment variable with the endpoint's key; unset means none.
        concurrency: requests in flight.
        timeout: seconds for one request.
        retries: of a request that fails for a passing reason, waiting longer each time.
    """

    backend: Literal["espeak", "piper", "openai"] = "espeak"
    voices: tuple[str, ...] = ()
    url: str | None = None
    model: str = "kokoro"
    api_key_variable: str = "SPEECH_API_KEY"
    concurrency: int = 4
    timeout: float = 60.0
    retries: int = 4

    def __post_init__(self) -> None:
        if self.backend == "openai" and not (self.url or "").startswith(("http://", "https://")):
            raise CordError("the backend openai needs the endpoint's address, such as http://127.0.0.1:8880/v1")
        if self.backend != "espeak" and not self.voices:
            raise CordError(f"the backend {self.backend} needs the names of its voices")
        if self.concurrency < 1 or self.timeout <= 0 or self.retries < 0:
            raise CordError("concurrency must be at least 1, timeout positive, retries not negative")


def make_synthesizer(config: SynthesizerConfig) -> SpeechSynthesizer:
    """The backend that the configuration names."""
    if config.backend == "piper":
        return PiperSynthesizer()
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
                raise CordError(f"{name}: no such voice; give the path of a Piper voice (.onnx, its .onnx.json beside it)")
            self._voices[name] = self._piper.PiperVoice.load(name)
        settings = self._piper.SynthesisConfig(length_scale=1.0 / utterance.voice.speed)
        chunks = list(self._voices[name].synthesize(utterance.text, syn_config=settings))
        if not chunks:
            raise UtteranceRefused("the voice made no sound of it")
        recording = np.concatenate([chunk.audio_float_array for chunk in chunks])
        return polish(resample(recording, chunks[0].sample_rate, SAMPLING_RATE), utterance)


class EndpointSynthesizer:
    """A server with OpenAI's `POST /audio/speech`.

    Args:
        config: address, model and patience.
    """

    def __init__(self, config: SynthesizerConfig) -> None:
        self._config = config
        assert config.url is not None  # the configuration's own check
        self._endpoint = Endpoint(config.url, key_variable=config.api_key_variable, timeout=config.timeout, retries=config.retries)

    def speak(self, utterances: Sequence[Utterance]) -> list[np.ndarray]:
        """See ``SpeechSynthesizer.speak``.

        Raises:
            UtteranceRefused: the server will not speak one of the texts.
            CordError: the server is away or answers something else than speech.
        """
        with ThreadPoolExecutor(self._config.concurrency) as pool:
            return list(pool.map(self._speak, utterances))

    def _speak(self, utterance: Utterance) -> np.ndarray:
        voice = utterance.voice
        if voice.pitch != 1.0:
            raise CordError(f"voice {voice.name}: the endpoint cannot change the pitch; leave it at 1")
        body = {"model": self._config.model, "input": utterance.text, "voice": voice.name, "speed": voice.speed, "response_format": "wav"}
        try:
            content = self._endpoint.post("audio/speech", json=body).content
        except RequestRefused as error:
            raise UtteranceRefused(str(error)) from error
        try:
            with wave.open(io.BytesIO(content)) as file:
                channels, width, rate = file.getnchannels(), file.getsampwidth(), file.getframerate()
                data = file.readframes(-1)  # streamed WAV files do not know their length
        except (wave.Error, EOFError, RuntimeError) as error:
            raise CordError(f"{self._config.url} answered something else than a WAV file ({error or 'it ends too early'})") from error
        if width != 2 or not 8000 <= rate <= 96000:
            raise CordError(f"{self._config.url} sends {8 * width}-bit audio at {rate} Hz; set it to 16-bit PCM of 8 to 96 kHz")
        recording = (
            np.frombuffer(data[: len(data) // (2 * channels) * 2 * channels], "<i2").astype(np.float32).reshape(-1, channels).mean(axis=1)
        )
        return polish(resample(recording, rate, SAMPLING_RATE), utterance)
