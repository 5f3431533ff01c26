"""The targets of fuzzing: each takes bytes as of a user's file, and may raise nothing but CordError."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np

from megatron_cord.config.loading import load_config
from megatron_cord.data.audio.decode import count_samples, decode_audio
from megatron_cord.data.question_files import read_questions
from megatron_cord.data.shards.manifest import Manifest
from megatron_cord.data.shards.reader import ShardDataset
from megatron_cord.errors import CordError
from megatron_cord.evaluation.config import SetConfig
from megatron_cord.evaluation.formats import load_set
from megatron_cord.evaluation.scoring import is_correct
from megatron_cord.reward import answers_agree, extract_answer
from megatron_cord.speech import UnspeakableError, verbalize
from megatron_cord.trainer.config import RunConfig


@cache
def _folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="megatron_cord-fuzz-"))


def _file(name: str, content: bytes) -> Path:
    path = _folder() / name
    path.write_bytes(content)
    return path


def shard(content: bytes) -> None:
    """Read a tar as a shard."""
    dataset = ShardDataset(_file("x.tar", content), max_skipped=0.99)
    for index in range(len(dataset)):
        dataset[index]


def manifest(content: bytes) -> None:
    """Read a directory's manifest."""
    _file("manifest.json", content)
    Manifest.read(_folder())


def recording(content: bytes) -> None:
    """Decode a recording of any format: what is counted when a set is opened is what is decoded later."""
    count = count_samples(io.BytesIO(content), len(content), "x")
    waveform = decode_audio(content, "x")
    assert waveform.dtype == np.float32 and waveform.shape == (count,) and np.abs(waveform).max() <= 1.0


def jsonl(content: bytes) -> None:
    """Read written questions."""
    read_questions(_file("x.jsonl", content))


def json_array(content: bytes) -> None:
    """Read a benchmark's rows in one array."""
    load_set(SetConfig(str(_file("x.json", content)), "mmau"))


def config(content: bytes) -> None:
    """Load a run's configuration."""
    load_config(RunConfig, _file("x.yaml", content))


def override(content: bytes) -> None:
    """Apply a setting of the command line."""
    load_config(
        RunConfig, None, ["output_dir=o", "model.checkpoint=c", content.decode("utf-8", errors="surrogateescape")]
    )


def text(content: bytes) -> None:
    """Verbalize a question."""
    try:
        words = verbalize(content.decode("utf-8", errors="replace"))
    except UnspeakableError:
        return
    assert not any(character.isdigit() for character in words if character.isascii()), words


def answers(content: bytes) -> None:
    """Compare a response with a reference."""
    first, _, second = content.decode("utf-8", errors="replace").partition("|")
    extract_answer(first)
    extract_answer(first, choices=("iron", "wood", second))
    answers_agree(first, second, choices=("iron", "wood", second))
    is_correct(second or "x", (), first)
    answers_agree(first[:100], second[:100])


TARGETS: dict[str, Callable[[bytes], None]] = {
    "shard": shard,
    "manifest": manifest,
    "recording": recording,
    "flac": recording,
    "float_wav": recording,
    "jsonl": jsonl,
    "json_array": json_array,
    "config": config,
    "override": override,
    "text": text,
    "answers": answers,
}


def attempt(name: str, content: bytes) -> None:
    """Run a target, which may raise a CordError of one line."""
    message = "nothing was raised"
    try:
        TARGETS[name](content)
    except CordError as error:
        message = str(error).strip()
    # A setting's own name may have lines in it.
    assert message and (name == "override" or "\n" not in message), f"{message!r} is no single line"
