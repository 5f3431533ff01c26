"""One shard of spoken questions: text made speakable, spoken, checked, written, and a receipt for it."""

from __future__ import annotations

import json
import os
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cord.data.manifest import ShardEntry
from megatron_cord.data.question_files import Reject, WrittenQuestion
from megatron_cord.data.samples import Sample
from megatron_cord.data.shard_writer import disk_errors, encode_sample, write_shard
from megatron_cord.errors import CordError
from megatron_cord.speech.endpoint import Endpoint
from megatron_cord.speech.spoken_text import Unspeakable, spoken
from megatron_cord.speech.synthesizer import SAMPLING_RATE, SpeechSynthesizer, Utterance, UtteranceRefused
from megatron_cord.speech.synthesizers import SynthesizerConfig, make_synthesizer
from megatron_cord.speech.transcription import Transcriber, word_error_rate

_BATCH = 50  # utterances a call of the synthesiser; part of what makes a set reproducible
_PART = 10  # utterances between two writings where they cost time or money
_SILENT = 0.01  # amplitude
_FRAME = 400  # samples: 25 ms


@dataclass(frozen=True)
class QualityConfig:
    """What a recording must be like; others are left out.

    Attributes:
        max_characters: of a question.
        min_seconds, max_seconds: of a recording; Whisper's window is 30 s.
        max_silence: largest share of silent 25 ms frames.
        max_clipping: largest share of samples at the peak.
        min_loudness: mean power of its sounding frames, dB below a full-scale square wave; a click over a whisper has less.
        asr_url: an OpenAI-compatible endpoint that writes down what it hears; None leaves the round trip out.
        asr_model: that it is asked for.
        max_word_error_rate: of the round trip.
    """

    max_characters: int = 2000
    min_seconds: float = 0.2
    max_seconds: float = 30.0
    max_silence: float = 0.7
    max_clipping: float = 0.05  # a pure tone has 0.03
    min_loudness: float = -35.0
    asr_url: str | None = None
    asr_model: str = "whisper-1"
    max_word_error_rate: float = 0.2

    def __post_init__(self) -> None:
        if not 0.0 <= self.min_seconds < self.max_seconds:
            raise CordError(
                f"recordings from {self.min_seconds} to {self.max_seconds} s: min_seconds must be the smaller one"
            )
        if self.max_characters < 1 or self.max_word_error_rate < 0:
            raise CordError("max_characters must be at least 1, and max_word_error_rate not negative")


@dataclass(frozen=True)
class SpeechJob:
    """One shard to make. ``utterances[i]`` asks ``questions[i]`` in the voice that was drawn for it; its text is not speakable yet."""

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
        """The receipt of a finished shard; None if it is to be made, or made again because its file is gone or of another size."""
        try:
            content = json.loads(_receipt_file(directory, name).read_text())
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
        """Complete or invisible."""
        path = _receipt_file(directory, name)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        with disk_errors(directory):
            partial.write_text(json.dumps(asdict(self)))
            os.replace(partial, path)


def speak_shard(job: SpeechJob) -> Receipt:
    """Makes one shard.

    Raises:
        CordError: the synthesiser, the recogniser or the disk fails; nothing of the shard is visible then.
    """
    synthesizer = make_synthesizer(job.synthesizer)
    transcriber = None
    if job.quality.asr_url is not None:
        patience = job.synthesizer
        endpoint = Endpoint(
            job.quality.asr_url,
            key_variable=patience.api_key_variable,
            timeout=patience.timeout,
            retries=patience.retries,
        )
        transcriber = Transcriber(endpoint, job.quality.asr_model)
    rejects: list[Reject] = []
    speakable: list[tuple[WrittenQuestion, Utterance]] = []
    for question, utterance in zip(job.questions, job.utterances, strict=True):
        try:
            text = spoken(utterance.text, max_characters=job.quality.max_characters)
        except Unspeakable as error:
            rejects.append(Reject(question.id, str(error)))
        else:
            speakable.append((question, Utterance(text, utterance.voice)))
    size = _PART if job.is_costly else _BATCH
    parts = []
    for number, start in enumerate(range(0, len(speakable), size)):
        part = _kept_part(job, number) if job.is_costly else None
        if part is None:
            part = _speak_part(speakable[start : start + size], synthesizer, transcriber, job.quality)
            if job.is_costly:
                _keep_part(job, number, part)
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
    """Some utterances of a shard, spoken: encoded samples, and what a receipt says."""

    samples: list[dict[str, Any]]
    voices: dict[str, int]
    seconds: float
    rejects: list[Reject]


def _speak_part(
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
            fault = _misheard(transcriber, utterance.text, recording, quality)
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


def _keep_part(job: SpeechJob, number: int, part: _Part) -> None:
    """A small shard with a receipt, as the whole one will be: an endpoint that fails later takes nothing with it."""
    name = f".{job.name}.part-{number:03d}"
    shard = write_shard(job.directory / f"{name}.tar", part.samples) if part.samples else None
    Receipt(shard, part.voices, part.seconds, part.rejects).write(job.directory, name)


def _kept_part(job: SpeechJob, number: int) -> _Part | None:
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
                assert content is not None  # a shard of ours holds files alone
                samples.setdefault(key, {"__key__": key})[extension] = content.read()
    return _Part(list(samples.values()), receipt.voices, receipt.seconds, receipt.rejects)


def recording_fault(waveform: np.ndarray, quality: QualityConfig) -> str | None:
    """What is wrong with a recording, float32 [samples] at 16 kHz, or None."""
    seconds = len(waveform) / SAMPLING_RATE
    if not np.isfinite(waveform).all():
        return "its recording is not finite"
    if seconds < quality.min_seconds:
        return f"its recording is too short ({seconds:.2f} s)"
    if seconds > quality.max_seconds:
        return f"its recording is too long ({seconds:.2f} s)"
    size = np.abs(waveform)
    peak = float(size.max())
    frames = size[: len(size) // _FRAME * _FRAME].reshape(-1, _FRAME)
    if peak < _SILENT or float((frames.max(axis=1, initial=0.0) < _SILENT * peak).mean()) > quality.max_silence:
        return "its recording is mostly silent"
    if float((size > 0.999 * peak).mean()) > quality.max_clipping:
        return "its recording is clipped"
    sounding = frames.max(axis=1, initial=0.0) >= _SILENT * peak
    power = float(np.mean(np.square(waveform[: len(frames) * _FRAME].reshape(-1, _FRAME)[sounding], dtype=np.float64)))
    if (loudness := 10.0 * np.log10(max(power, 1e-12))) < quality.min_loudness:
        return f"its recording is too quiet ({loudness:.0f} dB)"
    return None


def _speak(synthesizer: SpeechSynthesizer, utterances: Sequence[Utterance]) -> list[np.ndarray | str]:
    """Recordings, or the reason for those that are refused: a batch with one of them is spoken one by one."""
    try:
        return list(synthesizer.speak(utterances))
    except UtteranceRefused:
        results: list[np.ndarray | str] = []
        for utterance in utterances:
            try:
                results += synthesizer.speak([utterance])
            except UtteranceRefused as error:
                results.append(f"the synthesiser refused it ({error})")
        return results


def _misheard(transcriber: Transcriber, said: str, recording: np.ndarray, quality: QualityConfig) -> str | None:
    heard = transcriber.transcribe(recording)
    rate = word_error_rate(said, heard)
    return (
        f"it is misheard ({rate:.0%} of the words wrong: {heard[:80]!r})"
        if rate > quality.max_word_error_rate
        else None
    )


def _receipt_file(directory: Path, name: str) -> Path:
    return directory / f"{name}.receipt.json"
