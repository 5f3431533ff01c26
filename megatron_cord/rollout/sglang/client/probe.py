"""Greedy answers to fixed prompts, by which ``verify weight_sync`` compares servers; training does not use it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cord.data.prompts import PromptBuilder
from megatron_cord.data.samples import Sample
from megatron_cord.rollout.sglang.client.endpoint import Endpoint
from megatron_cord.rollout.sglang.client.protocol import PromptEncoder
from megatron_cord.rollout.sglang.models import served_model

#: For each prompt: the ids, and their log-probabilities rounded to 1e-5.
Outputs = list[tuple[list[int], list[float]]]


def outputs_of(server: Endpoint, checkpoint: str | Path, timeout: float) -> Outputs:
    """Return greedy answers to fixed prompts: some of plain ids and, where the model takes audio, a second of sound.

    Raises:
        CordError: as ``PromptBuilder``, ``served_model`` and ``PromptEncoder.encode``.
        ServerError: the server does not answer.
    """
    bodies: list[dict[str, Any]] = [{"input_ids": list(range(first, first + 6))} for first in (1, 4, 7)]
    model = served_model(checkpoint)
    if model.max_clips:
        prompts = PromptBuilder(checkpoint)
        sound = Sample("two tones", "", _tones()[: prompts.longest_clip])
        bodies.append(PromptEncoder(prompts, 0, model).encode(prompts.audio_prompt(sound)))
    return [_greedy(server, body, timeout) for body in bodies]


def _greedy(server: Endpoint, body: dict[str, Any], timeout: float) -> tuple[list[int], list[float]]:
    sampling = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
    reply = server.post("/generate", body | {"sampling_params": sampling, "return_logprob": True}, timeout)
    pairs: Sequence[Sequence[Any]] = reply["meta_info"]["output_token_logprobs"]
    return [int(pair[1]) for pair in pairs], [round(float(pair[0]), 5) for pair in pairs]


def _tones() -> np.ndarray:
    """Return a second of two tones at 16 kHz, one of which rises."""
    t = np.arange(16000) / 16000
    return (0.25 * np.sin(2 * np.pi * 440 * t) + 0.12 * np.sin(2 * np.pi * (200 + 600 * t) * t)).astype(np.float32)
