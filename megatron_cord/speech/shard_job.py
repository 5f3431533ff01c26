"""One shard of a spoken set: text verbalized, spoken, checked and written, with a receipt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_cord.data.question_files import Reject, WrittenQuestion
from megatron_cord.data.samples import Sample
from megatron_cord.data.shards.writer import encode_sample
from megatron_cord.errors import CordError
from megatron_cord.runtime.openai_client import EndpointError
from megatron_cord.speech.noise import Noise
from megatron_cord.speech.quality import QualityConfig, recording_fault
from megatron_cord.speech.receipts import Part, Receipt, make_with_receipt
from megatron_cord.speech.synthesizers.build import open_synthesizer
from megatron_cord.speech.synthesizers.config import SynthesizerConfig
from megatron_cord.speech.synthesizers.piper import voice_label
from megatron_cord.speech.synthesizers.protocol import (
    SAMPLING_RATE,
    SpeechSynthesizer,
    Utterance,
    UtteranceRefusedError,
)
from megatron_cord.speech.transcription import Transcriber, open_transcriber, transcription_fault
from megatron_cord.speech.verbalization import UnspeakableError, verbalize

_BATCH = 50  # utterances a call of the synthesizer; part of what makes a set reproducible
_PART = 10  # utterances between two writings where they cost time or money
_Spoken = tuple[WrittenQuestion, Utterance, Noise | None]


@dataclass(frozen=True)
class ShardJob:
    """One shard to make.

    ``utterances[i]`` is ``questions[i]`` in the voice drawn for it, not verbalized yet; ``noises[i]`` is the noise
    under its recording.
    """

    directory: Path
    name: str
    questions: tuple[WrittenQuestion, ...]
    utterances: tuple[Utterance, ...]
    noises: tuple[Noise | None, ...]
    synthesizer: SynthesizerConfig
    quality: QualityConfig

    @property
    def is_costly(self) -> bool:
        """Whether recordings take so long to make, or cost so much, that parts of a shard are worth keeping."""
        return self.synthesizer.backend != "espeak" or self.quality.asr_url is not None


def make_shard(job: ShardJob) -> Receipt:
    """Make one shard.

    Raises:
        CordError: the synthesizer, the recognizer or the disk fails; nothing of the shard is visible then.
    """
    try:
        return _make_shard(job)
    except EndpointError as error:
        raise CordError(f"{error}; what is complete is kept: call again when the endpoint is well") from error


def _make_shard(job: ShardJob) -> Receipt:
    rejects: list[Reject] = []
    speakable: list[_Spoken] = []
    for question, utterance, noise in zip(job.questions, job.utterances, job.noises, strict=True):
        try:
            text = verbalize(utterance.text, max_characters=job.quality.max_characters)
        except UnspeakableError as error:
            rejects.append(Reject(question.id, str(error)))
        else:
            speakable.append((question, Utterance(text, utterance.voice), noise))
    size = _PART if job.is_costly else _BATCH
    recognizer = job.quality.asr_url, job.quality.asr_model, job.synthesizer.api_key_env, job.synthesizer.patience
    with open_synthesizer(job.synthesizer) as synthesizer, open_transcriber(*recognizer) as transcriber:
        return make_with_receipt(
            job.directory,
            job.name,
            (speakable[start : start + size] for start in range(0, len(speakable), size)),
            lambda batch: _make_part(batch, synthesizer, transcriber, job),
            keep_parts=job.is_costly,
            rejects=rejects,
        )


def _make_part(
    batch: Sequence[_Spoken],
    synthesizer: SpeechSynthesizer,
    transcriber: Transcriber | None,
    job: ShardJob,
) -> Part:
    part, quality = Part(), job.quality
    recordings = _speak(synthesizer, [utterance for _, utterance, _ in batch])
    for (question, utterance, noise), recording in zip(batch, recordings, strict=True):
        if isinstance(recording, str):
            part.rejects.append(Reject(question.id, recording))
            continue
        fault = recording_fault(recording, quality)
        if fault is None and transcriber is not None:
            fault = transcription_fault(transcriber, utterance.text, recording, quality.max_word_error_rate)
        if fault is not None:
            part.rejects.append(Reject(question.id, fault))
            continue
        name = utterance.voice.name
        voice = voice_label(name) if job.synthesizer.backend == "piper" else name
        sample = Sample(
            question.id,
            question.text,
            recording if noise is None else noise.under(recording),
            SAMPLING_RATE,
            question.answer,
            question.solution,
            voice,
            question.choices,
            question.instruction,
            question.system,
        )
        part.samples.append(encode_sample(sample, metadata=None if noise is None else {"noise_snr": noise.snr}))
        part.voices[voice] += 1
        part.seconds += len(recording) / SAMPLING_RATE
    return part


def _speak(synthesizer: SpeechSynthesizer, utterances: Sequence[Utterance]) -> list[np.ndarray | str]:
    """Return recordings, or reasons for refusals: a batch with a refused utterance is spoken one by one."""
    try:
        return list(synthesizer.speak(utterances))
    except UtteranceRefusedError:
        results: list[np.ndarray | str] = []
        for utterance in utterances:
            try:
                results += synthesizer.speak([utterance])
            except UtteranceRefusedError as error:
                results.append(f"the synthesizer refused it ({error})")
        return results
