"""Own recordings, from files to an exported model: `python -m examples.own_recordings.run [--root DIR] [--prepare]`.

Sixty recordings of several formats with transcripts (`recordings`) become shards, a tiny model trains on them for a few
steps, is evaluated and exported. Every step after the first is a command that is printed before it runs: with files of
rows, a checkpoint and a configuration of your own they are what you would type. Each goes on where it was stopped.

What it simplifies: the checkpoint is random, so the answers are no better than chance, before and after. With
`model.checkpoint=runs/quickstart/checkpoint`, after `make quickstart`, it is one that knows the task.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

from examples.own_recordings.recordings import write_recordings
from examples.quickstart.checkpoint import TinyModelConfig, create_checkpoint
from examples.quickstart.questions import vocabulary
from megatron_cord.config.loading import load_config
from megatron_cord.runtime import entry
from megatron_cord.trainer.config import RunConfig

CONFIG = Path(__file__).parent / "own_recordings.yaml"
SEED = 0


def prepare(root: Path) -> None:
    """Make what a lab would bring, where it is missing: recordings with their rows, and a checkpoint."""
    write_recordings(root)
    if not (root / "checkpoint" / "model.safetensors").is_file():
        create_checkpoint(root / "checkpoint", TinyModelConfig(), vocabulary(), SEED)


def shard_commands(root: Path) -> list[list[str]]:
    """Return the commands that make shards."""
    return [
        ["shards", "--from", str(root / f"{split}.jsonl"), "--output", str(root / "data" / split), "--workers", "2"]
        for split in ("train", "heldout")
    ]


def run_commands(root: Path, overrides: list[str]) -> list[list[str]]:
    """Return the commands that train, evaluate and export."""
    paths = [
        f"output_dir={root}/run",
        f"model.checkpoint={root}/checkpoint",
        f"data.train={root}/data/train",
        f"data.evaluation={root}/data/heldout",
    ]
    settings = [*paths, *overrides]
    config = load_config(RunConfig, CONFIG, settings)
    output = Path(config.output_dir)
    last = output / "checkpoints" / f"step_{config.train.steps:06d}"
    return [
        ["train", "--config", str(CONFIG), *settings],
        ["evaluate", "--config", str(output / "config.yaml"), "evaluation.baseline=base"],
        ["convert", "export", str(last), str(root / "exported")],
    ]


def main() -> int:
    """Run the example; return the exit status of the first command that fails."""
    parser = entry.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--root", metavar="DIR", type=Path, default=Path("runs/own_recordings"), help="of everything")
    parser.add_argument("--prepare", action="store_true", help="make recordings and checkpoint, and run nothing")
    parser.add_argument("overrides", metavar="a.b=value", nargs="*", help="sets one value of the configuration")
    arguments = parser.parse_intermixed_args()
    prepare(arguments.root)
    if arguments.prepare:
        return 0
    for command in [*shard_commands(arguments.root), *run_commands(arguments.root, arguments.overrides)]:
        print(f"\n$ {shlex.join(['cord', *command])}", flush=True)
        status = subprocess.run([sys.executable, "-m", "megatron_cord.cli", *command], check=False).returncode
        if status:
            return status
    print(f"\nreport: {arguments.root / 'run' / 'report.html'}")
    return 0


if __name__ == "__main__":
    entry.run(main)
