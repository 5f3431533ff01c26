"""Make spoken shards of written questions: in parallel, resumable, with a reason for everything that is left out.

Question number i always goes to shard i // shard_size, with a voice and a speed drawn from the seed. A shard is made by
one worker, and a receipt beside it lists what went into it and what was rejected. So after an interruption a second
call makes the shards without a receipt, and with a deterministic synthesizer (espeak-ng) the set is the same bit for
bit as one made in one go.

What it simplifies: one machine; progress is counted in shards' questions.
"""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.context
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cord.data.order import permutation
from megatron_cord.data.question_files import Reject, WrittenQuestion, question_files, read_questions
from megatron_cord.data.shards.manifest import MANIFEST_NAME, PLAN_NAME, Manifest, ShardEntry
from megatron_cord.data.shards.writer import disk_errors
from megatron_cord.errors import CordError
from megatron_cord.runtime.files import file_digest, fingerprint, write_atomic, write_json
from megatron_cord.speech.quality import QualityConfig
from megatron_cord.speech.shard_job import Receipt, ShardJob, make_shard
from megatron_cord.speech.synthesizers.config import SynthesizerConfig
from megatron_cord.speech.synthesizers.espeak import ESPEAK_VOICES
from megatron_cord.speech.synthesizers.protocol import Utterance, Voice

_REJECTS_NAME = "rejects.jsonl"


@dataclass(frozen=True)
class SpokenSetConfig:
    """One set of spoken shards.

    Attributes:
        questions: file of written questions, see `question_files`.
        question_field, answer_field: of its rows.
        ignore_fields: of its rows, which may be left aside; any other field that nothing uses is an error.
        seed: of voices and speeds.
        shard_size: questions a shard, rejects included.
        slowest, fastest: speeds are drawn evenly between them; 1 is a voice's normal speed.
        max_rejects: the largest share of questions that may be left out; more is an error at the end, when all shards
            are there.
        synthesizer: backend and voices.
        quality: what a recording must be like.
    """

    questions: str
    question_field: str = "question"
    answer_field: str = "answer"
    ignore_fields: tuple[str, ...] = ()
    seed: int = 0
    shard_size: int = 256
    slowest: float = 1.0
    fastest: float = 1.0
    max_rejects: float = 0.2
    synthesizer: SynthesizerConfig = field(default_factory=SynthesizerConfig)
    quality: QualityConfig = field(default_factory=QualityConfig)

    def __post_init__(self) -> None:
        if self.shard_size < 1 or self.seed < 0:
            raise CordError("shard_size must be at least 1, and seed not negative")
        if not 0.3 <= self.slowest <= self.fastest <= 3.0:
            raise CordError(
                f"speeds from {self.slowest} to {self.fastest}: write the slowest first, both between 0.3 and 3"
            )
        if not 0.0 <= self.max_rejects <= 1.0:
            raise CordError(f"max_rejects is {self.max_rejects}; it is a share between 0 and 1")


@dataclass(frozen=True)
class SpokenSet:
    """The outcome.

    Attributes:
        manifest: of the shards.
        rejects: number of questions left out, by reason, the commonest first.
    """

    manifest: Manifest
    rejects: dict[str, int]


def make_spoken_set(
    config: SpokenSetConfig, output: str | Path, *, workers: int = 1, progress: Callable[[int, int], None] | None = None
) -> SpokenSet:
    """Make the set, or what is missing of it.

    Args:
        config: questions, voices and quality.
        output: a directory; complete and half-made sets of the same configuration are taken up.
        workers: processes.
        progress: called with (questions done since the last call, questions of the set).

    Raises:
        CordError: the directory holds a set of other arguments, the questions cannot be read, the synthesizer or the
            disk fails, or too many questions were left out. Finished shards stay.
    """
    output = Path(output)
    questions, unread = written_questions(config)
    source = _source(config)
    _claim(output, source)
    jobs = _jobs(config, questions, output)
    receipts = {job.name: receipt for job in jobs if (receipt := Receipt.read(output, job.name)) is not None}
    report = progress if progress is not None else lambda done, total: None
    report(sum(len(job.questions) for job in jobs if job.name in receipts), len(questions))
    missing = [job for job in jobs if job.name not in receipts]
    if missing and workers == 1:
        for job in missing:
            receipts[job.name] = make_shard(job)
            report(len(job.questions), len(questions))
    elif missing:
        with ProcessPoolExecutor(min(workers, len(missing)), mp_context=worker_context()) as pool:
            futures = {pool.submit(make_shard, job): job for job in missing}
            try:
                for future in as_completed(futures):
                    receipts[futures[future].name] = future.result()
                    report(len(futures[future].questions), len(questions))
            finally:
                pool.shutdown(cancel_futures=True)
    return _complete(config, output, source, [receipts[job.name] for job in jobs], unread, len(questions) + len(unread))


def written_questions(config: SpokenSetConfig) -> tuple[list[WrittenQuestion], list[Reject]]:
    """Read the questions of a set, and what is wrong with the others."""
    return read_questions(
        config.questions, question=config.question_field, answer=config.answer_field, ignored=config.ignore_fields
    )


def worker_context() -> multiprocessing.context.ForkServerContext:
    """Return the context of worker processes: forks of one process, which alone takes seconds to import all."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["megatron_cord.speech.shard_job"])
    return context


def _source(config: SpokenSetConfig) -> dict[str, Any]:
    """Return what decides about the set's content, for its manifest.

    The questions count by their content; concurrency and patience with an endpoint do not count.
    """
    path = Path(config.questions)
    files = question_files(path)
    source = asdict(config) | {"questions": path.name, "questions_fingerprint": fingerprint(map(file_digest, files))}
    for name in ("concurrency", "patience", "tolerated", "api_key_env"):
        del source["synthesizer"][name]
    if config.synthesizer.directory is not None:  # wherever it lies
        files = sorted(f for f in Path(config.synthesizer.directory).glob("*") if f.is_file())
        source["synthesizer"]["directory"] = [f"{f.name}, {f.stat().st_size} bytes" for f in files]
    del source["max_rejects"]
    if not config.ignore_fields:
        del source["ignore_fields"]
    plain: dict[str, Any] = json.loads(json.dumps(source))  # tuples become lists, as they come back from the file
    return plain


def _claim(output: Path, source: dict[str, Any]) -> None:
    """Write the plan, or compare it with the one that is there."""
    plan = output / PLAN_NAME
    if not plan.is_file():
        if (output / MANIFEST_NAME).exists():
            raise CordError(
                f"{output} holds a set of shards that was made otherwise; delete it or choose another directory"
            )
        with disk_errors(output):
            write_json(plan, source)
        return
    try:
        begun = json.loads(plan.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CordError(f"{plan} is damaged ({error}); delete {output} and begin anew") from error
    changed = sorted(name for name in begun.keys() | source.keys() if begun.get(name) != source.get(name))
    if changed:
        raise CordError(
            f"{output} was begun with other arguments ({', '.join(changed)}); delete it or choose another directory"
        )


def _jobs(config: SpokenSetConfig, questions: Sequence[WrittenQuestion], output: Path) -> list[ShardJob]:
    """Divide the questions. Voices take turns in a new order each time, so that each speaks equally often."""
    voices = config.synthesizer.voices or ESPEAK_VOICES
    rounds = -(-len(questions) // len(voices))
    speakers = [voices[i] for turn in range(rounds) for i in permutation(len(voices), config.seed, turn)]
    draws = np.random.PCG64(np.random.SeedSequence((config.seed, 1))).random_raw(len(questions)) / 2.0**64
    speeds = [round(config.slowest + float(d) * (config.fastest - config.slowest), 2) for d in draws]
    utterances = [Utterance(q.text, Voice(s, speed)) for q, s, speed in zip(questions, speakers, speeds, strict=False)]
    return [
        ShardJob(
            output,
            f"shard-{number:06d}",
            tuple(questions[a:b]),
            tuple(utterances[a:b]),
            config.synthesizer,
            config.quality,
        )
        for number, a in enumerate(range(0, len(questions), config.shard_size))
        for b in [a + config.shard_size]
    ]


def _complete(
    config: SpokenSetConfig,
    output: Path,
    source: dict[str, Any],
    receipts: list[Receipt],
    unread: list[Reject],
    total: int,
) -> SpokenSet:
    rejects = unread + [reject for receipt in receipts for reject in receipt.rejects]
    # Reasons that quote the question are counted by what comes before the quotation.
    reasons = dict(Counter(reject.reason.split(" (")[0] for reject in rejects).most_common())
    with disk_errors(output):
        lines = "".join(json.dumps(asdict(reject), ensure_ascii=False) + "\n" for reject in rejects)
        # A lone surrogate, which JSON may hold and UTF-8 may not, keeps its escape.
        write_atomic(output / _REJECTS_NAME, lines.encode("utf-8", "backslashreplace"))
        for orphan in [*output.glob(".*.partial"), *output.glob(".shard-*.part-*")]:
            orphan.unlink(missing_ok=True)
    voices: Counter[str] = Counter()
    for receipt in receipts:
        voices.update(receipt.voices)
    shards: tuple[ShardEntry, ...] = tuple(r.shard for r in receipts if r.shard is not None)
    if not shards or len(rejects) > config.max_rejects * total:
        common = next(iter(reasons.items()))
        raise CordError(
            f"{len(rejects)} of {total} questions were left out, most often because {common[0]} ({common[1]} times); "
            f"see {output / _REJECTS_NAME}, correct the questions, or allow it with a larger max_rejects"
        )
    seconds = round(sum(receipt.seconds for receipt in receipts), 3)
    manifest = Manifest(shards, dict(sorted(voices.items())), seconds, source | {"rejects": reasons})
    with disk_errors(output):
        manifest.write(output)
    return SpokenSet(manifest, reasons)
