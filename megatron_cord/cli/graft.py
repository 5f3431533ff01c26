"""``cord graft``: a speech model of a text model and a Whisper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from megatron_cord.cli.options import DIRECTORY


@click.command
@click.argument("llm", metavar="LLM_DIR", type=DIRECTORY)
@click.argument("whisper", metavar="WHISPER_DIR", type=DIRECTORY)
@click.argument("target", metavar="OUT", type=DIRECTORY)
@click.option(
    "--stack",
    metavar="N",
    type=click.IntRange(min=1),
    default=4,
    show_default=True,
    help="Encoder frames of 20 ms that become one token of audio.",
)
@click.option(
    "--hidden-size",
    metavar="N",
    type=click.IntRange(min=2),
    default=4096,
    show_default=True,
    help="Rows of the projector's first layer; an even number.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the projector's random weights.")
@click.option(
    "--dtype",
    type=click.Choice(("auto", "float32", "bfloat16", "float16")),
    default="auto",
    show_default=True,
    help="Precision of the result; auto: the text model's, and bfloat16 of a GGUF file.",
)
def command(llm: Path, whisper: Path, target: Path, **options: Any) -> int:
    """Make a speech model of the text model LLM_DIR and the encoder of the Whisper WHISPER_DIR.

    LLM_DIR may be a GGUF file, too, which is dequantised. OUT is a Hugging Face directory of the Ultravox family. Its
    projector is random: the model reads as before, and has to be trained before it understands speech.
    """
    from megatron_cord.cli.actions.graft import run

    return run(llm, whisper, target, **options)
