"""Written questions of the user's become spoken shards: in parallel, resumable, and with a reason for everything that is left out.

Question number i always goes to shard i // shard_size, with a voice and a speed drawn from the seed. A shard is made by one worker, and beside
it lies a receipt with what went into it and what was rejected. So whatever is interrupted, a second call makes the shards without a receipt, and
with a deterministic synthesiser (espeak-ng) the set is the same bit for bit as one that was made in one go.

What it simplifies: one machine; progress is counted in shards' questions.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cord.data.manifest import MANIFEST_NAME, Manifest, ShardEntry
from megatron_cord.data.order import permutation
from megatron_cord.data.question_files import Reject, WrittenQuestion, read_questions
from megatron_cord.data.shard_writer import disk_errors
from megatron_cord.errors import CordError
from megatron_cord.speech.shard_speaker import QualityConfig, Receipt, SpeechJob, speak_shard
from megatron_cord.speech.synthesizer import ESPEAK_VOICES, Utterance, Voice
from megatron_cord.speech.synthesizers import SynthesizerConfig

_PLAN_NAME = "plan.json"
_REJECTS_NAME = "rejects.jsonl"


@dataclass(frozen=True)
class SpokenSetConfig:
    """One set of spoken shards.

    Attributes:
        questions: file of written questions, see `question_files`.
        question_field, answer_field: of its rows.
        seed: of voices and speeds.
        shard_size: questions a shard, rejects included.
        slowest, fastest: speeds are drawn evenly between them; 1 is a voice's normal speed.
        max_rejects: the largest share of questions that may be left out; more is an error at the end, when all shards are there.
        synthesizer: who speaks.
        quality: what a recording must be like.
    """

    questions: str
    question_field: str = "question"
    answer_field: str = "answer"
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
    """What came out.

    Attributes:
        manifest: of the shards.
        rejects: questions left out, by reason, the commonest first.
    """

    manifest: Manifest
    rejects: dict[str, int]


def speak_questions(
    config: SpokenSetConfig, output: str | Path, *, workers: int = 1, progress: Callable[[int, int], None] | None = None
) -> SpokenSet:
    """Makes the set, or what is missing of it.

    Args:
        config: what to say and how.
        output: a directory; complete and half-made sets of the same configuration are taken up.
        workers: processes.
        progress: called with (questions done since the last call, questions of the set).

    Raises:
        CordError: the directory holds a set of other arguments, the questions cannot be read, the synthesiser or the disk fails, or too
            many questions were left out. Finished shards stay.
    """
    output = Path(output)
    questions, unread = read_questions(config.questions, question=config.question_field, answer=config.answer_field)
    source = _source(config)
    _claim(output, source)
    jobs = _jobs(config, questions, output)
    receipts = {job.name: receipt for job in jobs if (receipt := Receipt.read(output, job.name)) is not None}
    report = progress if progress is not None else lambda done, total: None
    report(sum(len(job.questions) for job in jobs if job.name in receipts), len(questions))
    missing = [job for job in jobs if job.name not in receipts]
    if missing and workers == 1:
        for job in missing:
            receipts[job.name] = speak_shard(job)
            report(len(job.questions), len(questions))
    elif missing:
        with ProcessPoolExecutor(min(workers, len(missing)), mp_context=multiprocessing.get_context("spawn")) as pool:
            futures = {pool.submit(speak_shard, job): job for job in missing}
            try:
                for future in as_completed(futures):
                    receipts[futures[future].name] = future.result()
                    report(len(futures[future].questions), len(questions))
            finally:
                pool.shutdown(cancel_futures=True)
    return _complete(config, output, source, [receipts[job.name] for job in jobs], unread, len(questions) + len(unread))


def _source(config: SpokenSetConfig) -> dict[str, Any]:
    """What decides about the set's content, as the manifest keeps it. The file counts by its content, the endpoint not by its patience."""
    path = Path(config.questions)
    files = [path] if path.is_file() else sorted(f for f in path.glob("*") if f.is_file())
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    source = asdict(config) | {"questions": path.name, "questions_sha256": digest.hexdigest()}
    for name in ("concurrency", "timeout", "retries", "tolerated", "api_key_variable"):
        del source["synthesizer"][name]
    if config.synthesizer.directory is not None:  # wherever it lies
        files = sorted(f for f in Path(config.synthesizer.directory).glob("*") if f.is_file())
        source["synthesizer"]["directory"] = [f"{f.name}, {f.stat().st_size} bytes" for f in files]
    del source["max_rejects"]
    return json.loads(json.dumps(source))  # tuples become lists, as they come back from the file


def _claim(output: Path, source: dict[str, Any]) -> None:
    """Writes the plan, or compares it with the one that is there."""
    plan = output / _PLAN_NAME
    if not plan.is_file():
        if (output / MANIFEST_NAME).exists():
            raise CordError(
                f"{output} holds a set of shards that was made otherwise; delete it or choose another directory"
            )
        with disk_errors(output):
            output.mkdir(parents=True, exist_ok=True)
            partial = plan.with_suffix(".partial")
            partial.write_text(json.dumps(source, indent=1))
            os.replace(partial, plan)
        return
    try:
        begun = json.loads(plan.read_text())
    except ValueError as error:
        raise CordError(f"{plan} is damaged ({error}); delete {output} and begin anew") from error
    changed = sorted(name for name in begun.keys() | source.keys() if begun.get(name) != source.get(name))
    if changed:
        raise CordError(
            f"{output} was begun with other arguments ({', '.join(changed)}); delete it or choose another directory"
        )


def _jobs(config: SpokenSetConfig, questions: Sequence[WrittenQuestion], output: Path) -> list[SpeechJob]:
    """Voices take turns in a new order each time, so that each speaks equally often."""
    voices = config.synthesizer.voices or ESPEAK_VOICES
    rounds = -(-len(questions) // len(voices))
    speakers = [voices[i] for turn in range(rounds) for i in permutation(len(voices), config.seed, turn)]
    draws = np.random.PCG64(np.random.SeedSequence((config.seed, 1))).random_raw(len(questions)) / 2.0**64
    speeds = [round(config.slowest + float(d) * (config.fastest - config.slowest), 2) for d in draws]
    utterances = [Utterance(q.text, Voice(s, speed)) for q, s, speed in zip(questions, speakers, speeds, strict=False)]
    return [
        SpeechJob(
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
    # Reasons that quote the question are counted under what comes before the quotation.
    reasons = dict(Counter(reject.reason.split(" (")[0] for reject in rejects).most_common())
    with disk_errors(output):
        partial = output / f".{_REJECTS_NAME}.partial"
        partial.write_text("".join(json.dumps(asdict(r), ensure_ascii=False) + "\n" for r in rejects), encoding="utf-8")
        os.replace(partial, output / _REJECTS_NAME)
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
            f"see {output / _REJECTS_NAME}, mend the questions, or allow it with max_rejects above {config.max_rejects}"
        )
    seconds = round(sum(receipt.seconds for receipt in receipts), 3)
    manifest = Manifest(shards, dict(sorted(voices.items())), seconds, source | {"rejects": reasons})
    with disk_errors(output):
        manifest.write(output)
    return SpokenSet(manifest, reasons)
