"""Speaks templated questions with several voices and writes them as webdataset shards.

python tools/synthesize.py --output DIR --split train|warmup|heldout --count N [--seed S] [--shard-size K]
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from megatron_cord.cli import Parser, run
from megatron_cord.data.synthesis import SPLITS, SynthesisConfig, synthesize


class RateColumn(ProgressColumn):
    """Utterances a second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0.0:.0f}/s")


def main() -> None:
    defaults = SynthesisConfig(split="train", count=1)
    parser = Parser(description="Speaks templated questions and writes them as webdataset shards (16 kHz).", allow_abbrev=False)
    parser.add_argument("--output", metavar="DIR", type=Path, required=True, help="directory of the shards; created when missing")
    parser.add_argument("--split", choices=SPLITS, required=True, help="which problems and voices")
    parser.add_argument("--count", metavar="N", type=int, required=True, help="utterances")
    parser.add_argument("--seed", metavar="S", type=int, default=defaults.seed, help="of the order of questions and voices")
    parser.add_argument("--split-seed", metavar="S", type=int, default=defaults.split_seed, help="of the choice of held-out problems")
    parser.add_argument("--shard-size", metavar="K", type=int, default=defaults.shard_size, help="utterances a shard")
    arguments = parser.parse_args()
    config = SynthesisConfig(
        split=arguments.split,
        count=arguments.count,
        seed=arguments.seed,
        split_seed=arguments.split_seed,
        shard_size=arguments.shard_size,
    )
    console = Console()
    columns = (TextColumn("speaking"), BarColumn(), MofNCompleteColumn(), RateColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("speaking", total=config.count)
        manifest = synthesize(config, arguments.output, progress=lambda done: bar.advance(task, done))
    console.print(
        f"{arguments.output}: {manifest.samples} utterances, {manifest.seconds:.0f} s of speech, "
        f"{len(manifest.voices)} voices, {len(manifest.shards)} shards",
        highlight=False,
    )


if __name__ == "__main__":
    run(main)
