"""Servers and questions for trying an exchange: used by ``verify exchange`` and by benchmarks, not by training."""

from __future__ import annotations

import base64
import io
import os
import shlex
import signal
import socket
import subprocess
import time
import wave
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from megatron_cord.errors import CordError
from megatron_cord.model.families import load_architecture
from megatron_cord.rollout.exchange.endpoint import Endpoint

_SETTLE_SECONDS = 15.0  #: from the polite signal to the other one

#: for each question: the ids, and their log-probabilities rounded to 1e-5
Outputs = list[tuple[list[int], list[float]]]


class StartedServer:
    """A server in a process group of its own, ended on exit.

    Args:
        command: with {checkpoint}, {port} and {dtype} in it.
        checkpoint: that it serves.
        dtype: that it serves it in.
        log: a file for what it prints.
    """

    def __init__(self, command: str, checkpoint: Path, dtype: str, log: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.endpoint = Endpoint(f"http://127.0.0.1:{port}")
        self._log = log
        try:
            arguments = shlex.split(command.format(checkpoint=shlex.quote(str(checkpoint.resolve())), port=port, dtype=dtype))
        except (LookupError, ValueError) as error:
            raise CordError(f"command {command!r} cannot be filled in ({error}); only {{checkpoint}}, {{port}} and {{dtype}} are") from None
        # torchrun's variables would make the server take itself for a rank of the trainer
        torchrun = ("RANK", "WORLD_SIZE", "MASTER_", "LOCAL_", "GROUP_", "ROLE_", "TORCHELASTIC_", "PYTHONPATH")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(torchrun)}
        try:
            with log.open("wb") as output:
                self.process = subprocess.Popen(arguments, stdout=output, stderr=output, start_new_session=True, env=environment)
        except OSError as error:
            raise CordError(f"cannot start {arguments[0]}: {error.strerror}; set command=… to what starts SGLang here") from None

    def wait(self, seconds: float) -> Endpoint:
        """Its address, once it answers.

        Raises:
            CordError: it ended, or takes too long.
        """
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise CordError(f"the server ended with status {self.process.returncode}: {self._last_words()}")
            if self.endpoint.is_healthy(5.0):
                return self.endpoint
            time.sleep(1.0)
        raise CordError(f"the server does not answer after {seconds:g} s: {self._last_words()}")

    def kill(self) -> None:
        """kill -9 for all of its processes."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, number)
                self.process.wait(_SETTLE_SECONDS)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue

    def _last_words(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return " | ".join(lines[-3:]) or "it printed nothing"


def outputs_of(server: Endpoint, checkpoint: str | Path, timeout: float) -> Outputs:
    """Greedy answers to a few fixed prompts: some of plain ids, and for Qwen2-Audio a second of sound."""
    bodies: list[dict[str, Any]] = [{"input_ids": list(range(first, first + 6))} for first in (1, 4, 7)]
    if load_architecture(checkpoint).model_type == "qwen2_audio":
        bodies.append({"text": "<|audio_bos|><|AUDIO|><|audio_eos|>", "audio_data": _sound()})
    return [_greedy(server, body, timeout) for body in bodies]


def _greedy(server: Endpoint, body: dict[str, Any], timeout: float) -> tuple[list[int], list[float]]:
    sampling = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
    reply = server.post("/generate", body | {"sampling_params": sampling, "return_logprob": True}, timeout)
    pairs: Sequence[Sequence[Any]] = reply["meta_info"]["output_token_logprobs"]
    return [int(pair[1]) for pair in pairs], [round(float(pair[0]), 5) for pair in pairs]


def _sound() -> str:
    """A second of two tones at 16 kHz, as a data address."""
    t = np.arange(16000) / 16000
    samples = 8000 * np.sin(2 * np.pi * 440 * t) + 4000 * np.sin(2 * np.pi * (200 + 600 * t) * t)
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(16000)
        sound.writeframes(samples.astype("<i2").tobytes())
    return "data:audio/wav;base64," + base64.b64encode(file.getvalue()).decode()
