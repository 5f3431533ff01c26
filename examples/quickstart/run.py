"""The quickstart, from nothing to a report: `make quickstart`, or `python -m examples.quickstart.run [--seed S] [a.b=value …]`.

1. Templated sums are spoken by espeak-ng: 3,000 to train on (their answers are never shown), 250 held out, with other problems and voices.
2. A 0.9M-parameter Qwen2-Audio is made, and warmed up until it reads sums well and hears them badly. A lab would bring its own checkpoint.
3. CORD trains encoder and adapter on two tensor-parallel ranks: `megatron_cord.train` with `quickstart.yaml`.
4. A table on the terminal, `report.html` and `summary.json` in the run's directory.

Each part is skipped if it is there already, and training resumes where it was stopped. `a.b=value` overrides reach the training.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from examples.quickstart.checkpoint import TinyModelConfig, create_checkpoint
from examples.quickstart.warmup import WarmUpConfig, warm_up
from megatron_cord import cli
from megatron_cord.config import load_config
from megatron_cord.data.questions import all_problems, questions_about, vocabulary
from megatron_cord.data.shards import ShardDataset
from megatron_cord.data.synthesis import Split, SynthesisConfig, synthesize
from megatron_cord.report.page import render
from megatron_cord.report.terminal import evaluation_table
from megatron_cord.trainer.config import RunConfig

CONFIG = Path(__file__).parent / "quickstart.yaml"
UTTERANCES: dict[Split, int] = {"train": 3000, "warmup": 500, "heldout": 250}


def prepare(root: Path, config: RunConfig, console: Console) -> None:
    """Makes the spoken data and the warmed-up checkpoint that the configuration names, where they are not there yet."""
    columns = (TextColumn("speaking {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    data = {"train": Path(config.data.train), "heldout": Path(config.data.evaluation), "warmup": root / "data" / "warmup"}
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        for split, count in UTTERANCES.items():
            task = bar.add_task(split, total=count)
            synthesize(SynthesisConfig(split=split, count=count, seed=config.seed), data[split], progress=partial(bar.advance, task))
    untaught = root / "untaught"
    if not (untaught / "model.safetensors").is_file():
        create_checkpoint(untaught, TinyModelConfig(), vocabulary(), config.seed)
    spoken = ShardDataset(data["warmup"])
    warm_up(
        untaught,
        config.model.checkpoint,
        WarmUpConfig(seed=config.seed),
        questions_about(all_problems()),
        [spoken[i] for i in range(len(spoken))],
    )


def train(overrides: list[str], config: RunConfig) -> int:
    """Runs the trainer on as many local ranks as the layout needs; returns its exit status."""
    ranks = config.parallel.tp * config.parallel.pp
    command = [sys.executable, "-m", "megatron_cord.launch", "--standalone", "--nproc-per-node", str(ranks), "-m", "megatron_cord.train"]
    return subprocess.run([*command, "--config", str(CONFIG), *overrides], check=False).returncode


def finish(directory: Path, console: Console) -> None:
    """Prints the table and writes the report."""
    evaluations = sorted((directory / "evaluations").glob("step_*.json"))
    before, after = (json.loads(path.read_text()) for path in (evaluations[0], evaluations[-1]))
    console.print(evaluation_table(before, after))
    summary = json.loads((directory / "summary.json").read_text())
    closed = summary["gap_closed"]
    console.print("there was no gap to close" if closed is None else f"gap closed: [bold]{closed:.0%}[/] in {summary['seconds']:.0f} s of training",
                  highlight=False)  # fmt: skip
    console.print(f"report: {render(directory)}", highlight=False, soft_wrap=True)


def main() -> int:
    """Entry point."""
    parser = cli.Parser(description=__doc__.splitlines()[0], formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument(
        "--seed", type=int, default=0, help="of data, weights and sampling; other seeds than 0 get directories of their own"
    )
    parser.add_argument("overrides", metavar="a.b=value", nargs="*", help="sets one value of the training's configuration")
    arguments = parser.parse_intermixed_args()
    root = Path("runs/quickstart" if arguments.seed == 0 else f"runs/quickstart-seed{arguments.seed}")
    overrides = [f"seed={arguments.seed}", f"output_dir={root}", f"model.checkpoint={root}/checkpoint", f"data.train={root}/data/train",
                 f"data.evaluation={root}/data/heldout", *arguments.overrides]  # fmt: skip
    config = load_config(RunConfig, CONFIG, overrides)
    console = Console()
    begun = time.perf_counter()
    console.print("[bold]1. data and checkpoint[/]")
    prepare(root, config, console)
    console.print(f"[bold]2. training[/], {config.train.steps} steps on {config.parallel.tp} tensor-parallel ranks")
    status = train(overrides, config)
    if status:
        return status
    console.print("[bold]3. result[/] on held-out problems and voices")
    finish(Path(config.output_dir), console)
    console.print(f"{time.perf_counter() - begun:.0f} s in all", highlight=False)
    return 0


if __name__ == "__main__":
    cli.run(main)
