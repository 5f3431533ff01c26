"""How long a spoken set will take and how large it will be, measured on some of its questions."""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from megatron_cord.data.question_files import WrittenQuestion
from megatron_cord.errors import CordError
from megatron_cord.speech.spoken_set import SpokenSetConfig, make_spoken_set, written_questions


@dataclass(frozen=True)
class Estimate:
    """What was measured, and what follows for all questions.

    Attributes:
        questions: of the file.
        tried: how many of them were spoken for the measurement.
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

    def describe(self) -> str:
        """Return one line."""
        return (
            f"{self.questions} questions at {self.rate:.1f}/s ({self.workers} workers, measured on {self.tried}): "
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
        begun = [time.perf_counter()]

        def progress(done: int, total: int) -> None:
            if len(begun) == 1 and done:  # the first shard: its worker has started by now
                begun.append(time.perf_counter())
                first.append(done)

        first: list[int] = []
        made = make_spoken_set(sample_config, Path(folder) / "set", workers=workers, progress=progress)
        ended = time.perf_counter()
        # With one shard alone there is nothing behind the start to measure.
        several = len(begun) > 1 and first[0] < len(some)
        rate = (len(some) - first[0]) / (ended - begun[1]) if several else len(some) / (ended - begun[0])
        manifest = made.manifest
        usable = manifest.samples / len(some) * len(questions)
        return Estimate(
            questions=len(questions) + len(unread),
            tried=len(some),
            workers=workers,
            rate=rate,
            rejects=1.0 - usable / (len(questions) + len(unread)),
            seconds=len(questions) / rate,
            audio_seconds=manifest.seconds / len(some) * len(questions),
            bytes=round(sum(shard.bytes for shard in manifest.shards) / len(some) * len(questions)),
        )


def _row(question: WrittenQuestion) -> dict[str, str | None]:
    """Return the row of a question, whose text has its choices in it already."""
    return {name: value for name, value in asdict(question).items() if name in ("id", "answer", "solution")} | {
        "question": question.text
    }
