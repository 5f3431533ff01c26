"""Answers to the requests of a benchmark harness: text beside recordings, through the engine of a configuration.

The weights are those that `evaluate` takes: `evaluation.checkpoint`, of a run or of a plain Hugging Face checkpoint.
The recordings come first in a prompt, the text behind them, in the checkpoint's own template.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import soxr

from megatron_cord.data.audio.wav import SAMPLING_RATE
from megatron_cord.data.prompts import PromptBuilder
from megatron_cord.data.samples import HEAR, READ, Prompt, Sample
from megatron_cord.data.turns import AudioPart, TextPart, Turn
from megatron_cord.errors import CordError
from megatron_cord.evaluate import load_evaluated
from megatron_cord.parallel.layout import finalize, initialize
from megatron_cord.rollout.engines import build_engine
from megatron_cord.rollout.types import GenerationRequest
from megatron_cord.trainer.config import RunConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Asked:
    """One request.

    Attributes:
        id: unique among the requests of a call.
        text: what stands beside the recordings.
        recordings: float32 [samples], mono, 16 kHz; none for a question in text alone.
        temperature: 0 takes the likeliest token.
        max_new_tokens: the length at which the answer is cut.
        until: texts before which it is cut.
        seed: of the draws, where the temperature is above 0.
    """

    id: str
    text: str
    recordings: tuple[np.ndarray, ...] = ()
    temperature: float = 0.0
    max_new_tokens: int = 256
    until: tuple[str, ...] = ()
    seed: int = 0


class Answerer:
    """A checkpoint with its engine, in one process.

    Args:
        config: `model`, `rollout` and `evaluation.checkpoint` of it count.

    Raises:
        CordError: no such checkpoint, servers that do not answer, or a layout of several processes.
    """

    def __init__(self, config: RunConfig) -> None:
        layout = initialize(config.parallel, config.seed)
        self._prompts = PromptBuilder(
            config.model.checkpoint, long_audio=config.data.long_audio, features=config.data.features
        )
        self._engine = build_engine(
            config.rollout, config.model.checkpoint, layout.device, config.model.torch_dtype, self._prompts
        )
        self.label, _, self.step = load_evaluated(config, layout, self._engine)

    def answer(self, asked: Sequence[Asked]) -> list[str]:
        """Return the answers in the same order; "" for a request of which no prompt can be made, which is logged."""
        prompts = [self._prompt(one) for one in asked]
        requests = [
            GenerationRequest(prompt, one.temperature, one.max_new_tokens, one.seed)
            for one, prompt in zip(asked, prompts, strict=True)
            if prompt is not None
        ]
        made = iter(self._engine.generate(requests) if requests else ())
        return [
            "" if prompt is None else _before(next(made).text, one.until)
            for one, prompt in zip(asked, prompts, strict=True)
        ]

    def _prompt(self, asked: Asked) -> Prompt | None:
        view = HEAR if asked.recordings else READ
        try:
            (prepared,) = self._prompts.prepare([sample_of(asked)], [view])
        except CordError as error:
            logger.warning("no prompt can be made of %s, its answer is empty: %s", asked.id, error)
            return None
        return prepared.prompts[view]

    def close(self) -> None:
        """Leave the engine and the process group."""
        self._engine.close()
        finalize()


def sample_of(asked: Asked) -> Sample:
    """Return the sample of which a request's prompt is made."""
    if len(asked.recordings) > 1:
        heard = tuple(AudioPart(number, "") for number in range(len(asked.recordings)))
        turns = (Turn("user", (*heard, *([TextPart(asked.text)] if asked.text.strip() else []))),)
        return Sample(asked.id, "", turns=turns).with_recordings(asked.recordings)
    if asked.recordings:
        return Sample(asked.id, "", asked.recordings[0], instruction=asked.text.strip() or None)
    return Sample(asked.id, asked.text)


def as_recording(value: Any, where: str) -> np.ndarray:
    """Return a task's audio as a recording.

    Args:
        value: {"array": [samples], [channels, samples] or [samples, channels], "sampling_rate": Hz}, or the decoder
            of the `datasets` library, which gives the same.
        where: names it in errors.

    Returns:
        float32 [samples], mono, 16 kHz.

    Raises:
        CordError: it is none, empty or not finite.
    """
    try:
        array, rate = np.asarray(value["array"], dtype=np.float32), int(value["sampling_rate"])
    except (KeyError, IndexError, TypeError, ValueError):
        kind = sorted(value) if isinstance(value, Mapping) else type(value).__name__
        raise CordError(
            f"{where}: only audio can be asked about, as 'array' with 'sampling_rate'; got {kind}"
        ) from None
    if array.ndim == 2:
        array = array.mean(axis=int(np.argmin(array.shape)))
    if array.ndim != 1 or array.size == 0 or rate <= 0 or not np.isfinite(array).all():
        raise CordError(f"{where}: its audio is empty, not finite, or of more than two dimensions")
    audio = array if rate == SAMPLING_RATE else soxr.resample(array, rate, SAMPLING_RATE)
    waveform: np.ndarray = np.clip(audio, np.float32(-1.0), np.float32(1.0))
    return waveform


def _before(text: str, until: Sequence[str]) -> str:
    for end in until:
        text = text.split(end, 1)[0] if end else text
    return text
