"""The synthesizer that a configuration names."""

from __future__ import annotations

from megatron_cord.speech.synthesizers.config import SynthesizerConfig
from megatron_cord.speech.synthesizers.endpoint import EndpointSynthesizer
from megatron_cord.speech.synthesizers.espeak import EspeakSynthesizer
from megatron_cord.speech.synthesizers.kokoro import KokoroSynthesizer
from megatron_cord.speech.synthesizers.piper import PiperSynthesizer
from megatron_cord.speech.synthesizers.protocol import SpeechSynthesizer


def build_synthesizer(config: SynthesizerConfig) -> SpeechSynthesizer:
    """Build the configured backend.

    Raises:
        CordError: its package, or one of its files, is missing.
    """
    if config.backend == "piper":
        return PiperSynthesizer()
    if config.backend == "kokoro":
        return KokoroSynthesizer(config.directory or "")
    if config.backend == "openai":
        return EndpointSynthesizer(config)
    return EspeakSynthesizer()
