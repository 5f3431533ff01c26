"""``cord convert``: Hugging Face checkpoints to Megatron's distributed ones and back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from megatron_cord.cli.options import DIRECTORY, FILE

Function = TypeVar("Function", bound=Callable[..., Any])


@click.group
def command() -> None:
    """Convert between Hugging Face checkpoints and Megatron's distributed ones.

    One process, or several ranks: python -m megatron_cord.launch --nproc-per-node 2 -m megatron_cord.cli convert
    import --tp 2 HF_DIR CHECKPOINT_DIR.
    """


def _paths(source: str, target: str) -> Callable[[Function], Function]:
    def add(function: Function) -> Function:
        function = click.option("--pp", type=int, default=1, show_default=True, help="Pipeline parallel size.")(
            function
        )
        function = click.option("--tp", type=int, default=1, show_default=True, help="Tensor parallel size.")(function)
        function = click.argument("target", metavar=target, type=DIRECTORY)(function)
        return click.argument("source", metavar=source, type=DIRECTORY)(function)

    return add


def _precision(function: Function) -> Function:
    function = click.option(
        "--dry-run", is_flag=True, help="Print names, shapes, sizes and totals; read no weights, write nothing."
    )(function)
    return click.option(
        "--dtype",
        type=click.Choice(("auto", "float32", "bfloat16", "float16")),
        default="auto",
        show_default=True,
        help="Precision of the result; auto: the source's.",
    )(function)


@command.command("import")
@_paths("HF_DIR", "CHECKPOINT_DIR")
@_precision
def import_(**options: Any) -> int:
    """Import HF_DIR into a checkpoint that any layout loads."""
    from megatron_cord.cli.actions import convert

    return convert.run(convert.import_checkpoint, **options)


@command.command
@_paths("CHECKPOINT_DIR", "HF_DIR")
@_precision
@click.option("--max-shard-size", metavar="SIZE", default="5GB", show_default=True, help="Of one file.")
@click.option("--hf", metavar="HF_DIR", type=DIRECTORY, help="Where configuration, tokenizer and processor come from.")
@click.option(
    "--resume",
    type=click.Choice(("auto", "never")),
    default="auto",
    show_default=True,
    help="Keep what an interrupted export finished.",
)
@click.option("--adapter", is_flag=True, help="Write the LoRA of the checkpoint as a PEFT directory, unmerged.")
def export(**options: Any) -> int:
    """Export a checkpoint into a complete Hugging Face directory; LoRA is merged into the weights."""
    from megatron_cord.cli.actions import convert

    return convert.run(convert.export_checkpoint, **options)


@command.command
@_paths("HF_DIR", "CHECKPOINT_DIR")
@click.option("--text", default="What is the capital of France?", show_default=True, help="The question's text.")
@click.option("--audio", metavar="FILE", type=FILE, help="A WAV file of 16 kHz; else a tone like a voice.")
@click.option("--data", metavar="DIR", type=Path, help="Shards: their first two samples, as text and audio, instead.")
@click.option(
    "--tolerance",
    type=float,
    default=1e-3,
    show_default=True,
    help="Largest absolute difference of two logits in float32.",
)
def check(**options: Any) -> int:
    """Compare the logits of both; exit status 1 above the tolerance."""
    from megatron_cord.cli.actions import convert

    return convert.run(convert.check_checkpoint, **options)
