"""How long a set of shards will take and how large it will be, measured on some of its rows."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron_cord.data.question_files import WrittenQuestion
from megatron_cord.errors import CordError
from megatron_cord.runtime.stop_request import StoppedError
from megatron_cord.speech.shard_set import ShardSet
from megatron_cord.speech.spoken_set import SpokenSetConfig, make_spoken_set, written_questions


@dataclass(frozen=True)
class Estimate:
    """What was measured, and what follows for all questions, or rows of recordings.

    Attributes:
        questions: of the file.
        tried: how many of them were used for the measurement.
        workers: processes.
        rate: questions a second, rejects included, without the workers' start.
        rejects: share left out.
        seconds: needed for all, at that rate.
        audio_seconds: length of all recordings.
        bytes: of all shards.
    """

    questions: int
    tried: int
    workers: int
    rate: float
    rejects: float
    seconds: float
    audio_seconds: float
    bytes: int

    def describe(self, what: str = "questions") -> str:
        """Return one line; `what` the rows are."""
        return (
            f"{self.questions} {what} at {self.rate:.1f}/s ({self.workers} workers, measured on {self.tried}): "
            f"about {self.seconds / 3600:.1f} h, {self.audio_seconds / 3600:.0f} h of speech, "
            f"{self.bytes / 1e9:.1f} GB, {self.rejects:.1%} left out"
        )


def estimate(config: SpokenSetConfig, count: int, *, workers: int = 1) -> Estimate:
    """Make a set of `count` questions, taken evenly from the whole file, in a directory that is then removed.

    Raises:
        CordError: fewer than one question, or what `make_spoken_set` raises.
    """
    if count < 1:
        raise CordError(f"{count} questions to measure with; give at least 1")
    questions, unread = written_questions(config)
    step = max(1, len(questions) // count)
    some = questions[::step][:count]
    with tempfile.TemporaryDirectory(prefix="megatron_cord-plan-") as folder:
        path = Path(folder) / "questions.jsonl"
        path.write_text("".join(json.dumps(_row(question)) + "\n" for question in some), encoding="utf-8")
        sample_config = replace(
            config,
            questions=str(path),
            question_field="question",
            answer_field="answer",
            max_rejects=1.0,
            shard_size=min(config.shard_size, -(-len(some) // (4 * workers))),
        )
        made, rate = measure(
            lambda progress: make_spoken_set(sample_config, Path(folder) / "set", workers=workers, progress=progress),
            len(some),
        )
    return project(made, rate, tried=len(some), workers=workers, usable=len(questions), unusable=len(unread))


def measure(make: Callable[[Callable[[int, Any], None]], ShardSet], tried: int) -> tuple[ShardSet, float]:
    """Make a set and return it with its speed, in rows a second, without the workers' start.

    Args:
        make: makes it, given a function to call with (rows done since the last call, anything).
        tried: rows of it.
    """
    begun = [time.perf_counter()]
    first: list[int] = []

    def progress(done: int, total: Any) -> None:
        if len(begun) == 1 and done:  # the first shard: its worker has started by now
            begun.append(time.perf_counter())
            first.append(done)

    try:
        made = make(progress)
    except StoppedError:
        raise KeyboardInterrupt from None  # nothing is kept of a measurement
    ended = time.perf_counter()
    # With one shard alone there is nothing behind the start to measure.
    several = len(begun) > 1 and first[0] < tried
    return made, (tried - first[0]) / (ended - begun[1]) if several else tried / (ended - begun[0])


def project(made: ShardSet, rate: float, *, tried: int, workers: int, usable: int, unusable: int = 0) -> Estimate:
    """Return what follows from a set for all rows.

    Args:
        made: of some rows.
        rate: rows a second.
        tried: rows of the set.
        workers: processes.
        usable: rows to project to.
        unusable: further ones, of which it is known that they are left out.
    """
    manifest = made.manifest
    kept = manifest.samples / tried * usable
    return Estimate(
        questions=usable + unusable,
        tried=tried,
        workers=workers,
        rate=rate,
        rejects=1.0 - kept / (usable + unusable),
        seconds=usable / rate,
        audio_seconds=manifest.seconds / tried * usable,
        bytes=round(sum(shard.bytes for shard in manifest.shards) / tried * usable),
    )


def _row(question: WrittenQuestion) -> dict[str, str | None]:
    """Return the row of a question, whose text has its choices in it already."""
    return {name: value for name, value in asdict(question).items() if name in ("id", "answer", "solution")} | {
        "question": question.text
    }
