"""Speak written questions as webdataset shards, or project what that would take."""

from __future__ import annotations

from pathlib import Path

from megatron_cord.cli.actions.shard_sets import check_arguments, describe_set, show
from megatron_cord.speech.estimate import estimate
from megatron_cord.speech.spoken_set import SpokenSetConfig, make_spoken_set


def synthesize(config: SpokenSetConfig, output: Path | None, *, workers: int, planned: int | None) -> None:
    """Speak the questions into `output`, or `planned` of them for a projection, and print the outcome."""
    check_arguments(output, workers, planned)
    if planned is not None:
        show("speaking", output or config.questions, lambda _: estimate(config, planned, workers=workers).describe())
        return
    assert output is not None
    show(
        "speaking",
        output,
        lambda progress: describe_set(
            make_spoken_set(config, output, workers=workers, progress=progress), "utterances"
        ),
    )
