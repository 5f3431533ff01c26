"""Makes spoken data sets: questions, voices, and shards, from one seed.

Three splits: "train" and "warmup" speak training problems with training voices, "heldout" speaks held-out problems with held-out voices, so
that neither problem nor voice of an evaluation was ever heard in training. A set depends on its configuration alone, bit for bit.

What it simplifies: one process; each question is spoken at its voice's normal speed and pitch unless configured otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from examples.quickstart.questions import SUMS, Question, QuestionSource
from megatron_cord.data.manifest import MANIFEST_NAME, Manifest
from megatron_cord.data.order import permutation
from megatron_cord.data.samples import Sample
from megatron_cord.data.shard_writer import ShardWriter
from megatron_cord.errors import CordError
from megatron_cord.speech.synthesizer import (
    HELD_OUT_VOICES,
    SAMPLING_RATE,
    TRAINING_VOICES,
    EspeakSynthesizer,
    SpeechSynthesizer,
    Utterance,
    Voice,
)

Split = Literal["train", "warmup", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "warmup", "heldout")
_BATCH = 50  # utterances a call of the synthesiser; part of what makes a set reproducible


@dataclass(frozen=True)
class SynthesisConfig:
    """One spoken data set.

    Attributes:
        split: "train", "warmup" (fewer, other draws of the same problems and voices) or "heldout".
        count: utterances.
        seed: of the order of questions and voices.
        split_seed: of the choice of held-out problems; the same for all sets of an experiment.
        shard_size: utterances a shard.
        speed: of all voices, 1 being normal.
        pitch: of all voices, 1 being normal.
        max_seconds: an utterance that is longer is an error; the quickstart's encoder hears 2.56 s.
    """

    split: Split
    count: int
    seed: int = 0
    split_seed: int = 0
    shard_size: int = 512
    speed: float = 1.0
    pitch: float = 1.0
    max_seconds: float = 2.56


def synthesize(
    config: SynthesisConfig,
    output: str | Path,
    *,
    questions: QuestionSource = SUMS,
    synthesizer: SpeechSynthesizer | None = None,
    progress: Callable[[int], None] | None = None,
) -> Manifest:
    """Writes one set of shards, or finds it there already.

    Args:
        config: what to say.
        output: a directory; one that an interrupted call left incomplete is begun anew.
        questions: what is asked; sums when left out.
        synthesizer: who speaks; espeak-ng when left out.
        progress: called with the number of utterances done since the last call.

    Raises:
        CordError: when the directory holds a set of other arguments, the configuration is not possible, an utterance is too long, the
            extra ``speech`` is missing, or the disk is full.
    """
    _check(config)
    output = Path(output)
    if (output / MANIFEST_NAME).exists():
        manifest = Manifest.read(output)
        _same_arguments(_source(config, questions), manifest, output)
        if progress is not None:
            progress(manifest.samples)
        return manifest
    speaker = synthesizer if synthesizer is not None else EspeakSynthesizer()
    plan = _plan(config, questions)
    writer = ShardWriter(output, shard_size=config.shard_size, source=_source(config, questions))
    for start in range(0, len(plan), _BATCH):
        batch = plan[start : start + _BATCH]
        recordings = speaker.speak([utterance for _, utterance in batch])
        for number, ((question, utterance), waveform) in enumerate(zip(batch, recordings, strict=True), start):
            sample_id = f"{config.split}-{number:06d}"
            seconds = len(waveform) / SAMPLING_RATE
            if seconds > config.max_seconds:
                raise CordError(
                    f"sample {sample_id}: {utterance.voice.name} needs {seconds:.2f} s for {question.text!r}, "
                    f"max_seconds is {config.max_seconds}; increase speed or max_seconds"
                )
            writer.write(
                Sample(
                    sample_id,
                    question.text,
                    waveform,
                    SAMPLING_RATE,
                    question.answer,
                    question.solution,
                    utterance.voice.name,
                )
            )
        if progress is not None:
            progress(len(batch))
    return writer.close()


def _source(config: SynthesisConfig, questions: QuestionSource) -> dict[str, Any]:
    """What decides about the set's content, as the manifest keeps it."""
    return {"task": questions.name} | asdict(config)


def _plan(config: SynthesisConfig, source: QuestionSource) -> list[tuple[Question, Utterance]]:
    """Every question with its voice. Voices take turns in a new order each time, so that each speaks equally often."""
    stream = SPLITS.index(config.split)
    voices: tuple[str, ...]
    if config.split == "heldout":
        questions, voices = source.held_out(config.count, config.seed, config.split_seed), HELD_OUT_VOICES
    else:
        # Another order for each split, lest the first 500 of "train" be "warmup".
        questions, voices = source.training(config.count, 2 * config.seed + stream, config.split_seed), TRAINING_VOICES
    rounds = -(-config.count // len(voices))
    speakers = [voices[i] for turn in range(rounds) for i in permutation(len(voices), config.seed, stream, turn)]
    return [
        (question, Utterance(question.text, Voice(speaker, config.speed, config.pitch)))
        for question, speaker in zip(questions, speakers, strict=False)
    ]


def _check(config: SynthesisConfig) -> None:
    if config.split not in SPLITS:
        raise CordError(f"split is {config.split!r}; choose one of {', '.join(SPLITS)}")
    for name in ("count", "shard_size"):
        if getattr(config, name) < 1:
            raise CordError(f"{name} is {getattr(config, name)}; at least 1 is needed")
    for name in ("seed", "split_seed"):
        if getattr(config, name) < 0:
            raise CordError(f"{name} is {getattr(config, name)}; choose 0 or more")


def _same_arguments(source: dict[str, Any], manifest: Manifest, output: Path) -> None:
    for name, value in source.items():
        if manifest.source.get(name, "sums" if name == "task" else None) != value:  # once there were sums only
            raise CordError(
                f"{output} holds shards made with {name} = {manifest.source.get(name)!r}, not {value!r}; delete it or choose another directory"
            )
