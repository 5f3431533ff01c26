"""One shard of a set of recordings: each decoded, checked and written, with a receipt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_cord.data.audio.wav import SAMPLING_RATE
from megatron_cord.data.question_files import Reject
from megatron_cord.data.shards.writer import encode_sample
from megatron_cord.data.turns import AudioPart
from megatron_cord.errors import CordError
from megatron_cord.runtime.openai_client import EndpointError
from megatron_cord.speech.quality import recording_fault
from megatron_cord.speech.receipts import Part, Receipt, make_with_receipt
from megatron_cord.speech.recordings.audio import UnreadableError
from megatron_cord.speech.recordings.config import MIN_PEAK, RecordingSetConfig
from megatron_cord.speech.recordings.language import language_fault
from megatron_cord.speech.recordings.rows import Recording
from megatron_cord.speech.transcription import Transcriber, open_transcriber, transcription_fault

_PART = 10  # rows that are in memory together, and between two writings where these cost time


@dataclass(frozen=True)
class RecordingJob:
    """One shard to make.

    Attributes:
        directory: of the set.
        name: of the shard.
        rows: usable ones, and the reasons why the others are none.
        fingerprint: of the rows.
        config: of the set.
    """

    directory: Path
    name: str
    rows: tuple[Recording | Reject, ...]
    fingerprint: str
    config: RecordingSetConfig

    @property
    def bytes(self) -> int:
        """What its recordings take in memory before they are read."""
        return sum(recorded.held for row in self.rows if isinstance(row, Recording) for recorded in row.recorded)


def make_recording_shard(job: RecordingJob) -> Receipt:
    """Make one shard.

    Raises:
        CordError: the recognizer or the disk fails; nothing of the shard is visible then.
    """
    quality = job.config.quality
    recognizer = quality.asr_url, quality.asr_model, job.config.api_key_env, job.config.patience
    try:
        with open_transcriber(*recognizer) as transcriber:
            return make_with_receipt(
                job.directory,
                job.name,
                (job.rows[start : start + _PART] for start in range(0, len(job.rows), _PART)),
                lambda rows: _make_part(rows, transcriber, job.config),
                keep_parts=transcriber is not None,
                rows=job.fingerprint,
            )
    except EndpointError as error:
        raise CordError(f"{error}; what is complete is kept: call again when the endpoint is well") from error


def _make_part(rows: Sequence[Recording | Reject], transcriber: Transcriber | None, config: RecordingSetConfig) -> Part:
    part = Part()
    for row in rows:
        if isinstance(row, Reject):
            part.rejects.append(row)
            continue
        made = _waveforms(row, transcriber, config)
        if isinstance(made, str):
            part.rejects.append(Reject(row.sample.id, made))
            continue
        part.samples.append(encode_sample(row.sample.with_recordings(made), metadata=row.notes))
        if row.sample.voice is not None:
            part.voices[row.sample.voice] += 1
        part.seconds += sum(map(len, made)) / SAMPLING_RATE
    return part


def _waveforms(row: Recording, transcriber: Transcriber | None, config: RecordingSetConfig) -> list[np.ndarray] | str:
    """Return a row's recordings, or why it is left out."""
    transcripts = _transcripts(row)
    if mute := next((text for text in transcripts if not any(map(str.isalnum, text))), None):
        return f"its transcript has no words ({mute[:60]!r})"
    if row.language is not None:
        for text in transcripts:
            if (fault := language_fault(text, row.language)) is not None:
                return fault
    waveforms = []
    for number, (recorded, text) in enumerate(zip(row.recorded, transcripts, strict=True)):
        try:
            waveform = recorded.read()
        except UnreadableError as error:
            return str(error)
        fault = recording_fault(waveform, config.quality, min_peak=MIN_PEAK)
        if fault is None and transcriber is not None:
            fault = transcription_fault(transcriber, text, waveform, config.quality.max_word_error_rate)
        if fault is not None:
            return fault if len(transcripts) == 1 else f"{fault} (recording {number})"
        waveforms.append(waveform)
    return waveforms


def _transcripts(row: Recording) -> list[str]:
    """Return what is said in each recording."""
    if not row.sample.turns:
        return [row.sample.question]
    return [part.transcript for turn in row.sample.turns for part in turn.parts if isinstance(part, AudioPart)]
