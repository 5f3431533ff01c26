"""Sixty recordings as a lab may have them: telephone and stereo, lossless and lossy, names with spaces and accents.

espeak-ng speaks the quickstart's sums; what a lab would bring are these files and the two lists of rows beside them:

    ROOT/train.jsonl  ROOT/heldout.jsonl      {"id": …, "audio": "recordings/…", "question": …, "answer": …, …}
    ROOT/recordings/                          the files, in folders by device
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr

from examples.quickstart.questions import SUMS
from examples.quickstart.spoken_sums import HELD_OUT_VOICES, TRAINING_VOICES
from megatron_cord.runtime.files import write_atomic
from megatron_cord.speech.synthesizers.espeak import EspeakSynthesizer
from megatron_cord.speech.synthesizers.protocol import SAMPLING_RATE, Utterance, Voice

COUNTS = {"train": 48, "heldout": 12}


@dataclass(frozen=True)
class Device:
    """What a recording was made with.

    Attributes:
        name: of the file, with the recording's number; a folder before it.
        rate: Hz.
        channels: 2 has the speech a little later and softer on the right.
        subtype: libsndfile's name of the encoding.
    """

    name: str
    rate: int
    channels: int
    subtype: str


DEVICES = (
    Device("telephone/call {:02}.wav", 8000, 1, "ULAW"),
    Device("Aufnahmegerät/Zoë und José {:02}.wav", 44100, 2, "PCM_16"),
    Device("studio/prise nº{:02}.flac", 48000, 1, "PCM_24"),
    Device("téléphone portable/mémo vocal {:02}.ogg", 22050, 1, "VORBIS"),
    Device("web/Upload {:02}.mp3", 32000, 2, "MPEG_LAYER_III"),
)


def write_recordings(root: Path) -> list[Path]:
    """Write the recordings and their rows, where they are missing; return the files of rows, one for each split."""
    files = []
    for split, count in COUNTS.items():
        rows_file = root / f"{split}.jsonl"
        files.append(rows_file)
        if not rows_file.is_file():
            rows = _record(root, split, count)
            write_atomic(rows_file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return files


def _record(root: Path, split: str, count: int) -> list[dict[str, str]]:
    """Speak the questions of a split into files; return their rows."""
    draw, voices = (SUMS.training, TRAINING_VOICES) if split == "train" else (SUMS.held_out, HELD_OUT_VOICES)
    questions = draw(count, 0, 0)
    speakers = [voices[number % len(voices)] for number in range(count)]
    spoken = EspeakSynthesizer().speak(
        [Utterance(question.text, Voice(speaker)) for question, speaker in zip(questions, speakers, strict=True)]
    )
    rows = []
    for number, (question, speaker, speech) in enumerate(zip(questions, speakers, spoken, strict=True)):
        device = DEVICES[number % len(DEVICES)]
        path = Path("recordings") / split / device.name.format(number)
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(root / path, _played(speech, device), device.rate, subtype=device.subtype)
        rows.append(
            {
                "id": f"{split}-{number:02}",
                "audio": str(path),
                "question": question.text,
                "answer": question.answer,
                "voice": speaker,
                "language": "en",
            }
        )
    return rows


def _played(speech: np.ndarray, device: Device) -> np.ndarray:
    """Return speech, float32 [samples] at 16 kHz, as the device records it: float32 [samples, channels]."""
    left: np.ndarray = soxr.resample(speech, SAMPLING_RATE, device.rate)
    if device.channels == 1:
        return left[:, None]
    late = device.rate // 2000  # half a millisecond
    right = 0.8 * np.concatenate([np.zeros(late, np.float32), left[: len(left) - late]])
    return np.stack([left, right.astype(np.float32)], axis=1)
