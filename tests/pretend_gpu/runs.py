"""The settings of runs on pretended GPUs."""

from __future__ import annotations

from pathlib import Path

from tests.tiny_run import overrides

#: Triton compiles for real GPUs alone, so eager torch computes the loss.
ON_PRETENDED_GPU = ("objective.backend=eager", "train.steps=2", "checkpoint.interval=1")


def settings(inputs: Path, output: Path, *more: str) -> list[str]:
    """Return those of a short run on the inputs of `tiny_run.write_inputs`; later ones win."""
    return overrides(inputs, output, *ON_PRETENDED_GPU, *more)
