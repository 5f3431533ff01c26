"""One shard of a spoken set: text verbalized, spoken, checked and written, with a receipt."""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cord.data.question_files import Reject, WrittenQuestion
from megatron_cord.data.samples import Sample
from megatron_cord.data.shards.manifest import ShardEntry
from megatron_cord.data.shards.writer import disk_errors, encode_sample, write_shard
from megatron_cord.errors import CordError
from megatron_cord.runtime.files import write_atomic
from megatron_cord.runtime.openai_client import EndpointError, OpenAIClient
from megatron_cord.speech.quality import QualityConfig, recording_fault
from megatron_cord.speech.synthesizers.build import build_synthesizer
from megatron_cord.speech.synthesizers.config import SynthesizerConfig
from megatron_cord.speech.synthesizers.protocol import (
    SAMPLING_RATE,
    SpeechSynthesizer,
    Utterance,
    UtteranceRefusedError,
)
from megatron_cord.speech.transcription import Transcriber, word_error_rate
from megatron_cord.speech.verbalization import UnspeakableError, verbalize

_BATCH = 50  # utterances a call of the synthesizer; part of what makes a set reproducible
_PART = 10  # utterances between two writings where they cost time or money


@dataclass(frozen=True)
class ShardJob:
    """One shard to make. ``utterances[i]`` is ``questions[i]`` in the voice drawn for it, not verbalized yet."""

    directory: Path
    name: str
    questions: tuple[WrittenQuestion, ...]
    utterances: tuple[Utterance, ...]
    synthesizer: SynthesizerConfig
    quality: QualityConfig

    @property
    def is_costly(self) -> bool:
        """Whether recordings take so long to make, or cost so much, that parts of a shard are worth keeping."""
        return self.synthesizer.backend != "espeak" or self.quality.asr_url is not None


@dataclass(frozen=True)
class Receipt:
    """What became of a shard's questions. Written after the shard, so that a shard with a receipt is whole.

    Attributes:
        shard: None when every question was rejected.
        voices: samples by voice.
        seconds: of audio.
        rejects: in the questions' order.
    """

    shard: ShardEntry | None
    voices: dict[str, int]
    seconds: float
    rejects: list[Reject]

    @classmethod
    def read(cls, directory: Path, name: str) -> Receipt | None:
        """Read the receipt of a finished shard.

        Returns:
            None if the shard is to be made, or made again because its file is gone or of another size.
        """
        try:
            content = json.loads(_receipt_file(directory, name).read_text(encoding="utf-8"))
            shard = None if content["shard"] is None else ShardEntry(**content["shard"])
            receipt = cls(
                shard, dict(content["voices"]), float(content["seconds"]), [Reject(**r) for r in content["rejects"]]
            )
            if shard is not None and (directory / shard.name).stat().st_size != shard.bytes:
                return None
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return receipt

    def write(self, directory: Path, name: str) -> None:
        """Write it for `read`."""
        with disk_errors(directory):
            write_atomic(_receipt_file(directory, name), json.dumps(asdict(self)))


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
    synthesizer = build_synthesizer(job.synthesizer)
    transcriber = None
    if job.quality.asr_url is not None:
        client = OpenAIClient(
            job.quality.asr_url, api_key_env=job.synthesizer.api_key_env, patience=job.synthesizer.patience
        )
        transcriber = Transcriber(client, job.quality.asr_model)
    rejects: list[Reject] = []
    speakable: list[tuple[WrittenQuestion, Utterance]] = []
    for question, utterance in zip(job.questions, job.utterances, strict=True):
        try:
            text = verbalize(utterance.text, max_characters=job.quality.max_characters)
        except UnspeakableError as error:
            rejects.append(Reject(question.id, str(error)))
        else:
            speakable.append((question, Utterance(text, utterance.voice)))
    size = _PART if job.is_costly else _BATCH
    parts = []
    for number, start in enumerate(range(0, len(speakable), size)):
        part = _read_part(job, number) if job.is_costly else None
        if part is None:
            part = _make_part(speakable[start : start + size], synthesizer, transcriber, job.quality)
            if job.is_costly:
                _write_part(job, number, part)
        parts.append(part)
    encoded = [sample for part in parts for sample in part.samples]
    voices: Counter[str] = Counter()
    for part in parts:
        voices.update(part.voices)
    rejects += [reject for part in parts for reject in part.rejects]
    shard = write_shard(job.directory / f"{job.name}.tar", encoded) if encoded else None
    receipt = Receipt(shard, dict(voices), sum(part.seconds for part in parts), rejects)
    receipt.write(job.directory, job.name)
    for path in job.directory.glob(f".{job.name}.part-*"):
        path.unlink()
    return receipt


@dataclass
class _Part:
    """Some utterances of a shard: encoded samples, and the entries of a receipt."""

    samples: list[dict[str, Any]]
    voices: dict[str, int]
    seconds: float
    rejects: list[Reject]


def _make_part(
    batch: Sequence[tuple[WrittenQuestion, Utterance]],
    synthesizer: SpeechSynthesizer,
    transcriber: Transcriber | None,
    quality: QualityConfig,
) -> _Part:
    part = _Part([], {}, 0.0, [])
    recordings = _speak(synthesizer, [utterance for _, utterance in batch])
    for (question, utterance), recording in zip(batch, recordings, strict=True):
        if isinstance(recording, str):
            part.rejects.append(Reject(question.id, recording))
            continue
        fault = recording_fault(recording, quality)
        if fault is None and transcriber is not None:
            fault = _round_trip_fault(transcriber, utterance.text, recording, quality)
        if fault is not None:
            part.rejects.append(Reject(question.id, fault))
            continue
        voice = utterance.voice.name
        sample = Sample(
            question.id,
            question.text,
            recording,
            SAMPLING_RATE,
            question.answer,
            question.solution,
            voice,
            question.choices,
        )
        part.samples.append(encode_sample(sample))
        part.voices[voice] = part.voices.get(voice, 0) + 1
        part.seconds += len(recording) / SAMPLING_RATE
    return part


def _write_part(job: ShardJob, number: int, part: _Part) -> None:
    """Write a small shard with a receipt, as the whole one will be: an endpoint that fails later costs nothing."""
    name = f".{job.name}.part-{number:03d}"
    shard = write_shard(job.directory / f"{name}.tar", part.samples) if part.samples else None
    Receipt(shard, part.voices, part.seconds, part.rejects).write(job.directory, name)


def _read_part(job: ShardJob, number: int) -> _Part | None:
    name = f".{job.name}.part-{number:03d}"
    receipt = Receipt.read(job.directory, name)
    if receipt is None:
        return None
    samples: dict[str, dict[str, Any]] = {}
    if receipt.shard is not None:
        with tarfile.open(job.directory / receipt.shard.name) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                content = tar.extractfile(member)
                assert content is not None  # write_shard writes files alone
                samples.setdefault(key, {"__key__": key})[extension] = content.read()
    return _Part(list(samples.values()), receipt.voices, receipt.seconds, receipt.rejects)


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


def _round_trip_fault(transcriber: Transcriber, text: str, recording: np.ndarray, quality: QualityConfig) -> str | None:
    transcript = transcriber.transcribe(recording)
    rate = word_error_rate(text, transcript)
    if rate <= quality.max_word_error_rate:
        return None
    return f"it is misheard ({rate:.0%} of the words wrong: {transcript[:80]!r})"


def _receipt_file(directory: Path, name: str) -> Path:
    return directory / f"{name}.receipt.json"
