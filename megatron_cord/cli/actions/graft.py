"""Make a speech model of a text model and a Whisper."""

from __future__ import annotations

from pathlib import Path

import megatron_cord.parallel  # noqa: F401  # isort: skip (before megatron.core)

import torch
from rich.console import Console

from megatron_cord.convert.graft import Projector, graft
from megatron_cord.errors import CordError
from megatron_cord.runtime.quiet import no_progress_bars


def run(llm: Path, whisper: Path, target: Path, *, stack: int, hidden_size: int, seed: int, dtype: str) -> int:
    """Write the checkpoint and print what it consists of; return the exit status."""
    if hidden_size % 2:
        raise CordError(f"--hidden-size {hidden_size} is odd, and SwiGLU halves it; give an even number")
    projector = Projector(stack_factor=stack, hidden_size=hidden_size, seed=seed)
    precision = None if dtype == "auto" else getattr(torch, dtype)
    with no_progress_bars():
        made = graft(llm, whisper, target, projector, precision)
    parts = ", ".join(f"{part} {count / 1e6:.1f}M" for part, count in made.parameters.items())
    console = Console()
    console.print(
        f"{target}: {parts} parameters in {str(made.dtype).removeprefix('torch.')}, {50 / stack:g} tokens a second of "
        "audio",
        highlight=False,
        soft_wrap=True,
        markup=False,
    )
    console.print("the projector is random: warm it up (cord warmup), or train it", highlight=False, soft_wrap=True)
    return 0
