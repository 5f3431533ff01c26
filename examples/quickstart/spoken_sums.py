"""Make a spoken set of the quickstart: `python -m examples.quickstart.spoken_sums SPLIT --count N --output DIR`.

Questions, voices and shards come from one seed. There are three splits: "train" and "warmup" speak training problems
with training voices, "heldout" speaks held-out problems with held-out voices, so that neither a problem nor a voice of
an evaluation occurs in training. A set depends on its configuration alone, bit for bit.

What it simplifies: one process; each question is spoken at its voice's normal speed and pitch unless configured
otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from examples.quickstart.questions import SUMS, Question, QuestionSource
from megatron_cord.data.ordering.order import permutation
from megatron_cord.data.samples import Sample
from megatron_cord.data.shards.manifest import MANIFEST_NAME, Manifest
from megatron_cord.data.shards.writer import ShardWriter
from megatron_cord.errors import CordError
from megatron_cord.runtime.entry import Parser, run
from megatron_cord.speech.synthesizers.espeak import EspeakSynthesizer
from megatron_cord.speech.synthesizers.protocol import SAMPLING_RATE, SpeechSynthesizer, Utterance, Voice

TRAINING_VOICES = ("en-us", "en-us+f2", "en-us+m3", "en-us+f4", "en-us+m1", "en-gb-x-rp")
#: These speak in evaluations only.
HELD_OUT_VOICES = ("en-us+f3", "en-us+m4", "en-gb-x-rp+f2", "en-us-nyc")

Split = Literal["train", "warmup", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "warmup", "heldout")
_BATCH = 50  # utterances a call of the synthesizer; part of what makes a set reproducible


@dataclass(frozen=True)
class SynthesisConfig:
    """One spoken set.

    Attributes:
        split: "train", "warmup" (fewer, other draws of the same problems and voices) or "heldout".
        count: utterances.
        seed: of the order of questions and voices.
        split_seed: of the choice of held-out problems; the same for all sets of an experiment.
        shard_size: utterances a shard.
        speed: of all voices, 1 being normal.
        pitch: of all voices, 1 being normal.
        max_seconds: a longer utterance is an error; the window of the quickstart's encoder is 2.56 s.
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
    """Write one set of shards, unless the directory holds it already.

    Args:
        config: which questions and voices.
        output: a directory; one that an interrupted call left incomplete is begun anew.
        questions: the task; sums by default.
        synthesizer: espeak-ng by default.
        progress: called with the number of utterances done since the last call.

    Raises:
        CordError: the directory holds a set of other arguments, the configuration is not possible, an utterance is too
            long, the extra ``speech`` is missing, or the disk is full.
    """
    _check(config)
    output = Path(output)
    if (output / MANIFEST_NAME).exists():
        manifest = Manifest.read(output)
        _check_same_arguments(_source(config, questions), manifest, output)
        if progress is not None:
            progress(manifest.samples)
        return manifest
    synthesizer = synthesizer if synthesizer is not None else EspeakSynthesizer()
    plan = _plan(config, questions)
    writer = ShardWriter(output, shard_size=config.shard_size, source=_source(config, questions))
    for start in range(0, len(plan), _BATCH):
        batch = plan[start : start + _BATCH]
        recordings = synthesizer.speak([utterance for _, utterance in batch])
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
    """Return everything that decides about the set's content, for its manifest."""
    return {"task": questions.name} | asdict(config)


def _plan(config: SynthesisConfig, source: QuestionSource) -> list[tuple[Question, Utterance]]:
    """Give every question a voice. Voices take turns in a new order each time, so that each speaks equally often."""
    stream = SPLITS.index(config.split)
    voices: tuple[str, ...]
    if config.split == "heldout":
        questions, voices = source.held_out(config.count, config.seed, config.split_seed), HELD_OUT_VOICES
    else:
        # Another order for each split, so that the first 500 of "train" are not "warmup".
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


def _check_same_arguments(source: dict[str, Any], manifest: Manifest, output: Path) -> None:
    for name, value in source.items():
        if manifest.source.get(name) != value:
            raise CordError(
                f"{output} holds shards made with {name} = {manifest.source.get(name)!r}, not {value!r}; "
                "delete it or choose another directory"
            )


def main() -> None:
    """Make one set from the command line."""
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("split", choices=SPLITS, help="which problems and voices")
    parser.add_argument("--count", metavar="N", type=int, required=True, help="utterances")
    parser.add_argument("--output", metavar="DIR", type=Path, required=True, help="directory of the shards")
    parser.add_argument("--seed", metavar="S", type=int, default=0, help="of voices and order")
    parser.add_argument("--split-seed", metavar="S", type=int, default=0, help="of the choice of held-out problems")
    parser.add_argument("--shard-size", metavar="K", type=int, default=SynthesisConfig.shard_size)
    arguments = parser.parse_args()
    config = SynthesisConfig(
        arguments.split, arguments.count, arguments.seed, arguments.split_seed, arguments.shard_size
    )
    manifest = synthesize(config, arguments.output)
    print(f"{arguments.output}: {manifest.samples} utterances, {manifest.seconds:.0f} s of speech")


if __name__ == "__main__":
    run(main)
