"""Speak written questions and write them as webdataset shards.

python tools/synthesize.py --questions FILE --output DIR [--voices NAME …] [--workers N]
python tools/synthesize.py --questions FILE --plan 500 [--workers N]        how long that takes, and how large it gets
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from megatron_cord.data.manifest import Manifest
from megatron_cord.errors import CordError
from megatron_cord.runtime.entry import Parser, run
from megatron_cord.speech.estimate import estimate
from megatron_cord.speech.quality import QualityConfig
from megatron_cord.speech.spoken_set import SpokenSetConfig, make_spoken_set
from megatron_cord.speech.synthesizers.config import SynthesizerConfig


class RateColumn(ProgressColumn):
    """Utterances a second."""

    def render(self, task: Task) -> Text:
        """Return the rate of a task."""
        return Text(f"{task.speed or 0.0:.0f}/s")


def _parser() -> Parser:
    defaults, voices, quality = SpokenSetConfig("questions"), SynthesizerConfig(), QualityConfig()
    parser = Parser(description="Speak written questions and write them as shards (16 kHz).", allow_abbrev=False)
    parser.add_argument(
        "--questions",
        metavar="FILE",
        required=True,
        help="questions: .jsonl, .parquet, or a directory of .parquet or .arrow files",
    )
    parser.add_argument("--output", metavar="DIR", type=Path, help="directory of the shards; created when missing")
    parser.add_argument("--seed", metavar="S", type=int, default=defaults.seed, help="of voices and speeds")
    parser.add_argument(
        "--shard-size", metavar="K", type=int, default=defaults.shard_size, help="questions a shard (%(default)s)"
    )
    parser.add_argument("--question-field", metavar="NAME", default=defaults.question_field, help="the field that asks")
    parser.add_argument(
        "--answer-field", metavar="NAME", default=defaults.answer_field, help="the field with the gold answer"
    )
    parser.add_argument(
        "--backend", choices=("espeak", "piper", "kokoro", "openai"), default=voices.backend, help="who speaks"
    )
    parser.add_argument(
        "--voices", metavar="NAME", nargs="+", default=[], help="names of the backend's; for Piper, .onnx files"
    )
    parser.add_argument("--model-dir", metavar="DIR", help="Kokoro's model (.onnx) and voices (.bin)")
    parser.add_argument("--url", help="the speech endpoint, up to /v1 (backend openai)")
    parser.add_argument("--model", default=voices.model, help="that the endpoint is asked for")
    parser.add_argument(
        "--speeds",
        metavar=("SLOWEST", "FASTEST"),
        type=float,
        nargs=2,
        default=[defaults.slowest, defaults.fastest],
        help="1 is normal",
    )
    parser.add_argument("--max-seconds", type=float, default=quality.max_seconds, help="longer recordings are left out")
    parser.add_argument(
        "--max-rejects",
        metavar="SHARE",
        type=float,
        default=defaults.max_rejects,
        help="largest share of questions left out",
    )
    parser.add_argument(
        "--min-loudness", metavar="DB", type=float, default=quality.min_loudness, help="quieter recordings are left out"
    )
    parser.add_argument("--asr-url", help="an endpoint that transcribes every recording for a check")
    parser.add_argument("--max-word-error-rate", type=float, default=quality.max_word_error_rate, help="of that check")
    parser.add_argument("--workers", metavar="N", type=int, default=1, help="processes")
    parser.add_argument(
        "--plan",
        metavar="N",
        type=int,
        help="make nothing: speak N of the questions, and say what all of them will take",
    )
    return parser


def _run(arguments: Namespace, bar: Progress) -> str:
    if arguments.workers < 1:
        raise CordError(f"--workers is {arguments.workers}; give at least 1")
    slowest, fastest = arguments.speeds
    config = SpokenSetConfig(
        arguments.questions,
        question_field=arguments.question_field,
        answer_field=arguments.answer_field,
        seed=arguments.seed,
        shard_size=arguments.shard_size,
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
        return estimate(config, arguments.plan, workers=arguments.workers).describe()
    output = _output(arguments)
    task = bar.add_task("speaking", total=None)

    def progress(done: int, total: int) -> None:
        bar.update(task, total=total, advance=done)

    result = make_spoken_set(config, output, workers=arguments.workers, progress=progress)
    lines = [f"{count} left out: {reason}" for reason, count in result.rejects.items()]
    return "\n".join([_describe(result.manifest), *lines])


def _output(arguments: Namespace) -> Path:
    if arguments.output is None:
        raise CordError("--output DIR is needed, for the shards")
    return Path(arguments.output)


def _describe(manifest: Manifest) -> str:
    time = f"{manifest.seconds:.0f} s" if manifest.seconds < 7200 else f"{manifest.seconds / 3600:.1f} h"
    return (
        f"{manifest.samples} utterances, {time} of speech, {len(manifest.voices)} voices, {len(manifest.shards)} shards"
    )


def main() -> None:
    """Make the set, or the plan, of the command line."""
    arguments = _parser().parse_args()
    console = Console()
    columns = (TextColumn("speaking"), BarColumn(), MofNCompleteColumn(), RateColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        told = _run(arguments, bar)
    console.print(f"{arguments.output or arguments.questions}: {told}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    run(main)
