"""Make spoken shards of written questions: in parallel, resumable, with a reason for everything that is left out.

Question number i always goes to shard i // shard_size, with a voice, a speed and noise drawn from the seed. So with a
deterministic synthesizer (espeak-ng) a set that was interrupted is the same bit for bit as one made in one go.

What it simplifies: progress is counted in shards' questions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cord.data.ordering.order import permutation
from megatron_cord.data.question_files import Reject, WrittenQuestion, question_files, read_questions
from megatron_cord.errors import CordError
from megatron_cord.runtime.files import file_digest, fingerprint
from megatron_cord.speech.noise import Noise, draw_noise
from megatron_cord.speech.quality import QualityConfig
from megatron_cord.speech.receipts import Receipt
from megatron_cord.speech.shard_job import ShardJob, make_shard
from megatron_cord.speech.shard_set import ShardSet, claim, complete, make_all
from megatron_cord.speech.synthesizers.config import SynthesizerConfig
from megatron_cord.speech.synthesizers.espeak import ESPEAK_VOICES
from megatron_cord.speech.synthesizers.protocol import Utterance, Voice


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
        noise: share of the recordings that get pink noise, drawn from the seed and the question's id.
        noise_snr: power of the speech over that of the noise, dB; drawn evenly between the two.
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
    noise: float = 0.0
    noise_snr: tuple[float, float] = (10.0, 20.0)
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
        if not 0.0 <= self.noise <= 1.0:
            raise CordError(f"noise is {self.noise:g}; it is a share of the recordings between 0 and 1")
        if not -10.0 <= self.noise_snr[0] <= self.noise_snr[1] <= 100.0:
            raise CordError(
                f"noise_snr from {self.noise_snr[0]:g} to {self.noise_snr[1]:g} dB: write the smaller one first, both "
                "from -10 to 100"
            )
        if not 0.0 <= self.max_rejects <= 1.0:
            raise CordError(f"max_rejects is {self.max_rejects}; it is a share between 0 and 1")


def make_spoken_set(
    config: SpokenSetConfig, output: str | Path, *, workers: int = 1, progress: Callable[[int, int], None] | None = None
) -> ShardSet:
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
    claim(output, source)
    jobs = _jobs(config, questions, output)
    receipts = {job.name: receipt for job in jobs if (receipt := Receipt.read(output, job.name)) is not None}
    report = progress if progress is not None else lambda done, total: None
    report(sum(len(job.questions) for job in jobs if job.name in receipts), len(questions))
    missing = [job for job in jobs if job.name not in receipts]
    for job, receipt in make_all(missing, make_shard, min(workers, max(1, len(missing)))):
        receipts[job.name] = receipt
        report(len(job.questions), len(questions))
    unusable = Receipt(None, {}, 0.0, unread)
    ordered = [unusable, *(receipts[job.name] for job in jobs)]
    return complete(output, source, ordered, max_rejects=config.max_rejects, what="questions")


def written_questions(config: SpokenSetConfig) -> tuple[list[WrittenQuestion], list[Reject]]:
    """Read the questions of a set, and what is wrong with the others."""
    return read_questions(
        config.questions, question=config.question_field, answer=config.answer_field, ignored=config.ignore_fields
    )


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
    if not config.noise:
        del source["noise"], source["noise_snr"]
    plain: dict[str, Any] = json.loads(json.dumps(source))  # tuples become lists, as they come back from the file
    return plain


def _jobs(config: SpokenSetConfig, questions: Sequence[WrittenQuestion], output: Path) -> list[ShardJob]:
    """Divide the questions. Voices take turns in a new order each time, so that each speaks equally often."""
    voices = config.synthesizer.voices or ESPEAK_VOICES
    rounds = -(-len(questions) // len(voices))
    speakers = [voices[i] for turn in range(rounds) for i in permutation(len(voices), config.seed, turn)]
    draws = np.random.PCG64(np.random.SeedSequence((config.seed, 1))).random_raw(len(questions)) / 2.0**64
    speeds = [round(config.slowest + float(d) * (config.fastest - config.slowest), 2) for d in draws]
    utterances = [Utterance(q.text, Voice(s, speed)) for q, s, speed in zip(questions, speakers, speeds, strict=False)]

    def noise(question: WrittenQuestion) -> Noise | None:
        return draw_noise(config.noise, config.noise_snr, f"{config.seed}\x1f{question.id}")

    return [
        ShardJob(
            output,
            f"shard-{number:06d}",
            tuple(questions[a:b]),
            tuple(utterances[a:b]),
            tuple(map(noise, questions[a:b])),
            config.synthesizer,
            config.quality,
        )
        for number, a in enumerate(range(0, len(questions), config.shard_size))
        for b in [a + config.shard_size]
    ]
