"""The quickstart, from nothing to a report: `make quickstart`, or this module with `[--seed S] [a.b=value …]`.

1. espeak-ng speaks templated sums: 3,000 to train on (without their answers), 250 held out, with other problems and
   voices.
2. A Qwen2-Audio of 0.9M parameters is made, and warmed up until it answers written sums well and spoken ones badly. A
   lab would bring its own checkpoint.
3. CORD trains encoder and adapter on two tensor-parallel ranks: `megatron_cord.train` with `quickstart.yaml`.
4. A table on the terminal, `report.html` and `summary.json` in the run's directory.

Each part is skipped if it is there already, and training resumes where it was stopped. `a.b=value` overrides reach the
training. Another example of the same kind is an `Example` of its own (examples/chains).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from examples.quickstart.checkpoint import TinyModelConfig, create_checkpoint
from examples.quickstart.omni_checkpoint import TinyOmniConfig, create_omni_checkpoint
from examples.quickstart.questions import SUMS, Question, QuestionSource, all_problems, questions_about, vocabulary
from examples.quickstart.spoken_sums import Split, SynthesisConfig, synthesize
from examples.quickstart.warmup import WarmUpConfig, warm_up
from megatron_cord.config.loading import load_config
from megatron_cord.data.samples import Sample
from megatron_cord.data.shards.reader import ShardDataset
from megatron_cord.evaluation.files import heldout_files, read_result
from megatron_cord.report.page.page import render
from megatron_cord.report.terminal import evaluation_table
from megatron_cord.runtime import entry
from megatron_cord.trainer.config import RunConfig


def _no_other_skills(root: Path, seed: int) -> Sequence[Sample]:
    return ()


@dataclass(frozen=True)
class Example:
    """A task, a model that answers it well in text and badly in speech, and the training that closes the gap.

    Attributes:
        name: of its directory, runs/NAME for seed 0 and runs/NAME-seedS for others, unless another one is given.
        config: of the training.
        questions: source of the spoken questions.
        written: the written questions of the warm-up, by seed.
        vocabulary: all words of both.
        utterances: number of spoken questions by split.
        max_seconds: of an utterance; longer ones are an error.
        model: sizes, and by their kind the family.
        warm_up: the recipe; the seed is replaced.
        drills: a recipe, without mixed steps, and written questions of a warm-up before it; None for none.
        other_skills: makes, by root and seed, when the spoken questions are there, what else the example needs, and
            returns more spoken samples of the warm-up.
    """

    name: str
    config: Path
    questions: QuestionSource
    written: Callable[[int], Sequence[Question]]
    vocabulary: Callable[[], Sequence[str]]
    utterances: dict[Split, int]
    max_seconds: float = SynthesisConfig.max_seconds
    model: TinyModelConfig | TinyOmniConfig = field(default_factory=TinyModelConfig)
    warm_up: WarmUpConfig = field(default_factory=WarmUpConfig)
    drills: tuple[WarmUpConfig, Sequence[Question]] | None = None
    other_skills: Callable[[Path, int], Sequence[Sample]] = _no_other_skills

    def root(self, seed: int) -> Path:
        """Return the default directory of data, checkpoint and run."""
        return Path("runs") / (self.name if seed == 0 else f"{self.name}-seed{seed}")


QUICKSTART = Example(
    name="quickstart",
    config=Path(__file__).parent / "quickstart.yaml",
    questions=SUMS,
    written=lambda seed: questions_about(all_problems()),
    vocabulary=vocabulary,
    utterances={"train": 3000, "warmup": 500, "heldout": 250},
)


def prepare(example: Example, root: Path, config: RunConfig, console: Console) -> None:
    """Make the spoken data and the warmed-up checkpoint that the configuration names, where they are missing."""
    columns = (TextColumn("speaking {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    assert isinstance(config.data.train, str), "an example trains on the one set that it makes"
    data = {
        "train": Path(config.data.train),
        "heldout": Path(config.data.evaluation),
        "warmup": root / "data" / "warmup",
    }
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        for split, count in example.utterances.items():
            task = bar.add_task(split, total=count)
            spoken_set = SynthesisConfig(split=split, count=count, seed=config.seed, max_seconds=example.max_seconds)
            synthesize(spoken_set, data[split], questions=example.questions, progress=partial(bar.advance, task))
    initial = root / "initial_checkpoint"
    if not (initial / "model.safetensors").is_file():
        if isinstance(example.model, TinyOmniConfig):
            create_omni_checkpoint(initial, example.model, example.vocabulary(), config.seed)
        else:
            create_checkpoint(initial, example.model, example.vocabulary(), config.seed)
    learned = ShardDataset(data["warmup"])
    spoken = [*(learned[i] for i in range(len(learned))), *example.other_skills(root, config.seed)]
    if example.drills is not None:
        recipe, drills = example.drills
        # Its steps are on written questions alone, and prompts of many recordings take long.
        warm_up(initial, root / "drilled_checkpoint", replace(recipe, seed=config.seed), drills, spoken[:1])
        initial = root / "drilled_checkpoint"
    recipe = replace(example.warm_up, seed=config.seed)
    warm_up(initial, config.model.checkpoint, recipe, example.written(config.seed), spoken)


def train(example: Example, overrides: list[str], config: RunConfig) -> int:
    """Run the trainer on as many local ranks as the layout needs; return its exit status."""
    ranks = config.parallel.tp * config.parallel.pp
    command = [
        sys.executable,
        "-m",
        "megatron_cord.launch",
        "--standalone",
        "--nproc-per-node",
        str(ranks),
        "-m",
        "megatron_cord.train",
    ]
    return subprocess.run([*command, "--config", str(example.config), *overrides], check=False).returncode


def finish(directory: Path, console: Console) -> None:
    """Print the table and write the report."""
    evaluations = list(heldout_files(directory).values())
    before, after = (read_result(path) for path in (evaluations[0], evaluations[-1]))
    console.print(evaluation_table(before, after))
    summary = json.loads((directory / "summary.json").read_text())
    closed = summary["gap_closed"]
    outcome = (
        "there was no gap to close"
        if closed is None
        else f"gap closed: [bold]{closed:.0%}[/] in {summary['seconds']:.0f} s of training"
    )
    console.print(outcome, highlight=False)
    console.print(f"report: {render(directory)}", highlight=False, soft_wrap=True)


def run(example: Example, description: str) -> int:
    """Run an example with the arguments of the command line; return the exit status."""
    parser = entry.Parser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of data, weights and sampling; other seeds than 0 get directories of their own",
    )
    parser.add_argument(
        "--root", metavar="DIR", type=Path, help="of data, checkpoint and run (default: runs/NAME, with the seed)"
    )
    parser.add_argument("--prepare", action="store_true", help="make data and checkpoint, and train nothing")
    parser.add_argument(
        "overrides", metavar="a.b=value", nargs="*", help="sets one value of the training's configuration"
    )
    arguments = parser.parse_intermixed_args()
    root = arguments.root or example.root(arguments.seed)
    overrides = [
        f"seed={arguments.seed}",
        f"output_dir={root}",
        f"model.checkpoint={root}/checkpoint",
        f"data.train={root}/data/train",
        f"data.evaluation={root}/data/heldout",
        *arguments.overrides,
    ]
    config = load_config(RunConfig, example.config, overrides)
    console = Console()
    started = time.perf_counter()
    console.print("[bold]1. data and checkpoint[/]")
    prepare(example, root, config, console)
    if arguments.prepare:
        return 0
    console.print(f"[bold]2. training[/], {config.train.steps} steps on {config.parallel.tp} tensor-parallel ranks")
    status = train(example, overrides, config)
    if status:
        return status
    console.print("[bold]3. result[/] on held-out problems and voices")
    finish(Path(config.output_dir), console)
    console.print(f"{time.perf_counter() - started:.0f} s in all", highlight=False)
    return 0


def main() -> int:
    """Run the quickstart."""
    return run(QUICKSTART, __doc__.splitlines()[0])


if __name__ == "__main__":
    entry.run(main)
