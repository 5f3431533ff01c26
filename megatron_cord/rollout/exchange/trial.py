"""Questions for trying an exchange: used by ``verify exchange``, not by training."""

from __future__ import annotations

import base64
import io
import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cord.model.families import load_architecture
from megatron_cord.rollout.exchange.endpoint import Endpoint

#: for each question: the ids, and their log-probabilities rounded to 1e-5
Outputs = list[tuple[list[int], list[float]]]


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
