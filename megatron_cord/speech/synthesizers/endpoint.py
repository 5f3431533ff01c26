"""A server with OpenAI's `POST /audio/speech`: Kokoro's, CosyVoice's and others have one."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from megatron_cord.data.audio.decode import decode_recording
from megatron_cord.data.audio.resample import resample
from megatron_cord.errors import CordError
from megatron_cord.runtime.openai_client import EndpointError, OpenAIClient, RequestRefusedError
from megatron_cord.speech.synthesizers.config import SynthesizerConfig
from megatron_cord.speech.synthesizers.protocol import SAMPLING_RATE, Utterance, UtteranceRefusedError, polish


class EndpointSynthesizer:
    """Equal arguments need not give equal recordings.

    Args:
        config: address, model and patience.
    """

    def __init__(self, config: SynthesizerConfig) -> None:
        self._config = config
        assert config.url is not None  # the configuration's own check
        self._client = OpenAIClient(config.url, api_key_env=config.api_key_env, patience=config.patience)
        self._failed = 0  # in a row; threads may miscount it by one, which only moves the end by one

    def speak(self, utterances: Sequence[Utterance]) -> list[np.ndarray]:
        """Implement ``SpeechSynthesizer.speak``.

        Raises:
            UtteranceRefusedError: the server does not speak one of the texts, or fails at it as it does at few others.
            CordError: the server is away or answers something else than speech.
        """
        with ThreadPoolExecutor(self._config.concurrency) as pool:
            return list(pool.map(self._speak, utterances))

    def close(self) -> None:
        """End the connections."""
        self._client.close()

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
            content = self._client.post("audio/speech", parse=bytes, json=body)
        except RequestRefusedError as error:
            raise UtteranceRefusedError(str(error)) from error
        except EndpointError as error:
            self._failed += 1
            if self._failed > self._config.tolerated:
                raise
            raise UtteranceRefusedError(str(error)) from error
        self._failed = 0
        recording, rate = decode_recording(content, f"{self._config.url} answered something else than speech")
        return polish(resample(recording, rate, SAMPLING_RATE), utterance)
