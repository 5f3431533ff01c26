"""Speaks questions and writes them as webdataset shards: your own questions, or the templated ones of the quickstart.

python tools/synthesize.py --questions FILE --output DIR [--voices NAME …] [--workers N]     your own, JSONL or Parquet
python tools/synthesize.py --questions FILE --plan 500 [--workers N]                         how long that takes, and how large it gets
python tools/synthesize.py --split train|warmup|heldout --count N --output DIR               the quickstart's
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from examples.quickstart.spoken_sums import SPLITS, SynthesisConfig, synthesize
from megatron_cord.data.manifest import Manifest
from megatron_cord.errors import CordError
from megatron_cord.runtime.entry import Parser, run
from megatron_cord.speech.projection import project
from megatron_cord.speech.shard_speaker import QualityConfig
from megatron_cord.speech.spoken_set import SpokenSetConfig, speak_questions
from megatron_cord.speech.synthesizers import SynthesizerConfig


class RateColumn(ProgressColumn):
    """Utterances a second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0.0:.0f}/s")


def _parser() -> Parser:
    own, voices, quality, templated = (
        SpokenSetConfig("questions"),
        SynthesizerConfig(),
        QualityConfig(),
        SynthesisConfig("train", 1),
    )
    parser = Parser(description="Speaks questions and writes them as webdataset shards (16 kHz).", allow_abbrev=False)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--questions",
        metavar="FILE",
        help="your questions: .jsonl, .parquet, or a directory of .parquet or .arrow files",
    )
    what.add_argument("--split", choices=SPLITS, help="templated questions: which problems and voices")
    parser.add_argument("--output", metavar="DIR", type=Path, help="directory of the shards; created when missing")
    parser.add_argument("--seed", metavar="S", type=int, default=own.seed, help="of voices, speeds and order")
    parser.add_argument(
        "--shard-size",
        metavar="K",
        type=int,
        help=f"questions a shard ({own.shard_size}; templated {templated.shard_size})",
    )
    group = parser.add_argument_group("templated questions")
    group.add_argument("--count", metavar="N", type=int, help="utterances")
    group.add_argument(
        "--split-seed", metavar="S", type=int, default=templated.split_seed, help="of the choice of held-out problems"
    )
    group = parser.add_argument_group("your questions")
    group.add_argument("--question-field", metavar="NAME", default=own.question_field, help="the field that asks")
    group.add_argument(
        "--answer-field", metavar="NAME", default=own.answer_field, help="the field with the gold answer"
    )
    group.add_argument(
        "--backend", choices=("espeak", "piper", "kokoro", "openai"), default=voices.backend, help="who speaks"
    )
    group.add_argument(
        "--voices", metavar="NAME", nargs="+", default=[], help="names of the backend's; for Piper, .onnx files"
    )
    group.add_argument("--model-dir", metavar="DIR", help="Kokoro's model (.onnx) and voices (.bin)")
    group.add_argument("--url", help="the speech endpoint, up to /v1 (backend openai)")
    group.add_argument("--model", default=voices.model, help="that the endpoint is asked for")
    group.add_argument(
        "--speeds",
        metavar=("SLOWEST", "FASTEST"),
        type=float,
        nargs=2,
        default=[own.slowest, own.fastest],
        help="1 is normal",
    )
    group.add_argument("--max-seconds", type=float, default=quality.max_seconds, help="longer recordings are left out")
    group.add_argument(
        "--max-rejects",
        metavar="SHARE",
        type=float,
        default=own.max_rejects,
        help="largest share of questions left out",
    )
    group.add_argument(
        "--min-loudness", metavar="DB", type=float, default=quality.min_loudness, help="quieter recordings are left out"
    )
    group.add_argument("--asr-url", help="an endpoint that transcribes every recording for a check")
    group.add_argument("--max-word-error-rate", type=float, default=quality.max_word_error_rate, help="of that check")
    group.add_argument("--workers", metavar="N", type=int, default=1, help="processes")
    group.add_argument(
        "--plan",
        metavar="N",
        type=int,
        help="make nothing: speak N of the questions, and say what all of them will take",
    )
    return parser


def _templated(arguments: Namespace, bar: Progress) -> str:
    if arguments.count is None:
        raise CordError("--split needs --count N too")
    output = _output(arguments)
    defaults = SynthesisConfig("train", 1)
    config = SynthesisConfig(
        split=arguments.split,
        count=arguments.count,
        seed=arguments.seed,
        split_seed=arguments.split_seed,
        shard_size=arguments.shard_size or defaults.shard_size,
    )
    task = bar.add_task("speaking", total=config.count)
    return _describe(synthesize(config, output, progress=lambda done: bar.advance(task, done)))


def _own(arguments: Namespace, bar: Progress) -> str:
    if arguments.workers < 1:
        raise CordError(f"--workers is {arguments.workers}; give at least 1")
    slowest, fastest = arguments.speeds
    config = SpokenSetConfig(
        arguments.questions,
        question_field=arguments.question_field,
        answer_field=arguments.answer_field,
        seed=arguments.seed,
        shard_size=arguments.shard_size or SpokenSetConfig.shard_size,
        slowest=slowest,
        fastest=fastest,
        max_rejects=arguments.max_rejects,
        synthesizer=SynthesizerConfig(
            arguments.backend, tuple(arguments.voices), arguments.model_dir, arguments.url, arguments.model
        ),
        quality=QualityConfig(
            max_seconds=arguments.max_seconds,
            min_loudness=arguments.min_loudness,
            asr_url=arguments.asr_url,
            max_word_error_rate=arguments.max_word_error_rate,
        ),
    )
    if arguments.plan is not None:
        return project(config, arguments.plan, workers=arguments.workers).describe()
    output = _output(arguments)
    task = bar.add_task("speaking", total=None)

    def progress(done: int, total: int) -> None:
        bar.update(task, total=total, advance=done)

    result = speak_questions(config, output, workers=arguments.workers, progress=progress)
    lines = [f"{count} left out: {reason}" for reason, count in result.rejects.items()]
    return "\n".join([_describe(result.manifest), *lines])


def _output(arguments: Namespace) -> Path:
    if arguments.output is None:
        raise CordError("--output DIR is needed, for the shards")
    return arguments.output


def _describe(manifest: Manifest) -> str:
    time = f"{manifest.seconds:.0f} s" if manifest.seconds < 7200 else f"{manifest.seconds / 3600:.1f} h"
    return (
        f"{manifest.samples} utterances, {time} of speech, {len(manifest.voices)} voices, {len(manifest.shards)} shards"
    )


def main() -> None:
    arguments = _parser().parse_args()
    console = Console()
    columns = (TextColumn("speaking"), BarColumn(), MofNCompleteColumn(), RateColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        told = _own(arguments, bar) if arguments.questions else _templated(arguments, bar)
    console.print(f"{arguments.output or arguments.questions}: {told}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    run(main)
