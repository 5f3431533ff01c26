"""The synthesizer that a configuration names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager

from megatron_cord.speech.synthesizers.config import SynthesizerConfig
from megatron_cord.speech.synthesizers.endpoint import EndpointSynthesizer
from megatron_cord.speech.synthesizers.espeak import EspeakSynthesizer
from megatron_cord.speech.synthesizers.kokoro import KokoroSynthesizer
from megatron_cord.speech.synthesizers.piper import PiperSynthesizer
from megatron_cord.speech.synthesizers.protocol import SpeechSynthesizer


@contextmanager
def open_synthesizer(config: SynthesizerConfig) -> Iterator[SpeechSynthesizer]:
    """Enter with the configured backend; the connections of an endpoint end with the block.

    Raises:
        CordError: its package, or one of its files, is missing.
    """
    if config.backend == "piper":
        yield PiperSynthesizer()
    elif config.backend == "kokoro":
        yield KokoroSynthesizer(config.directory or "")
    elif config.backend == "openai":
        with closing(EndpointSynthesizer(config)) as synthesizer:
            yield synthesizer
    else:
        yield EspeakSynthesizer()
