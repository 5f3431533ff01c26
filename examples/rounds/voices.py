"""The second skill of the model of the rounds: to name the voice that is heard. No training after its warm-up has it.

    <recording> who speaks  →  the answer is anna

The voices are the six of the training sets, each with a name of its own; the recordings say chains, as all others do.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import soundfile

from examples.quickstart.spoken_sums import TRAINING_VOICES
from megatron_cord.data.samples import Sample
from megatron_cord.errors import CordError
from megatron_cord.runtime.files import atomic_file

INSTRUCTION = "who speaks"
NAMES = dict(zip(TRAINING_VOICES, ("adam", "beth", "carl", "dora", "emil", "fred"), strict=True))


def voice_question(sample: Sample) -> Sample:
    """Return the question who speaks in the place of what a recording asks.

    Raises:
        CordError: the voice has no name.
    """
    if sample.voice not in NAMES:
        raise CordError(f"sample {sample.id}: the voice {sample.voice!r} has no name; choose one of {', '.join(NAMES)}")
    name = NAMES[sample.voice]
    return replace(
        sample, id=f"{sample.id}-voice", instruction=INSTRUCTION, answer=name, solution=f"the answer is {name}"
    )


def write_evaluation_set(path: Path, samples: Sequence[Sample]) -> None:
    """Write questions who speaks as a Parquet file that evaluations read (format plain), without transcripts."""
    rows = []
    for question in map(voice_question, samples):
        recording = io.BytesIO()
        soundfile.write(recording, question.waveform, question.sampling_rate, format="WAV", subtype="PCM_16")
        audio = {"bytes": recording.getvalue()}
        rows.append({"id": question.id, "audio": audio, "instruction": INSTRUCTION, "answer": question.answer})
    with atomic_file(path) as file:
        pq.write_table(pa.Table.from_pylist(rows), file)


def vocabulary() -> list[str]:
    """Return the words of these questions and answers that others lack."""
    return [*INSTRUCTION.split(), *NAMES.values()]
