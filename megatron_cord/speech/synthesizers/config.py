"""The configuration of a synthesizer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_cord.errors import CordError
from megatron_cord.runtime.openai_client import Patience


@dataclass(frozen=True)
class SynthesizerConfig:
    """Backend, voices, and for an endpoint its address and the patience with it.

    Attributes:
        backend: "espeak", "piper", "kokoro" or "openai".
        voices: names as the backend has them; for Piper, paths of .onnx voices.
        directory: of Kokoro's files: one .onnx with the model, and one .bin or .npz with the voices; only for "kokoro".
        url: of the endpoint, "http://127.0.0.1:8880/v1"; only for "openai".
        model: sent to the endpoint.
        api_key_env: environment variable with the endpoint's key; an unset one sends no key.
        concurrency: requests in flight.
        patience: with the endpoint.
        tolerated: utterances in a row at which an endpoint may fail after all tries; they are left out, and one more
            ends the work.
    """

    backend: Literal["espeak", "piper", "kokoro", "openai"] = "espeak"
    voices: tuple[str, ...] = ()
    directory: str | None = None
    url: str | None = None
    model: str = "kokoro"
    api_key_env: str = "SPEECH_API_KEY"
    concurrency: int = 4
    patience: Patience = field(default_factory=Patience)
    tolerated: int = 2

    def __post_init__(self) -> None:
        if self.backend == "kokoro" and not self.directory:
            raise CordError("the backend kokoro needs the directory of its model and voices")
        if self.backend == "openai" and not self.url:
            raise CordError("the backend openai needs the endpoint's address, such as http://127.0.0.1:8880/v1")
        for given, backend, what in ((self.directory, "kokoro", "directory"), (self.url, "openai", "url")):
            if given is not None and self.backend != backend:
                raise CordError(
                    f"the {what} {given!r} is for the backend {backend}, not {self.backend}; choose that or remove it"
                )
        if self.backend != "espeak" and not self.voices:
            raise CordError(f"the backend {self.backend} needs the names of its voices")
        if self.concurrency < 1 or self.tolerated < 0:
            raise CordError("concurrency must be at least 1, and tolerated not negative")
