"""Make shards of recordings, or project what that would take."""

from __future__ import annotations

from pathlib import Path

from megatron_cord.cli.actions.shard_sets import check_arguments, describe_set, show
from megatron_cord.speech.recordings.config import RecordingSetConfig
from megatron_cord.speech.recordings.plan import plan_recording_set
from megatron_cord.speech.recordings.recording_set import make_recording_set


def make_shards(config: RecordingSetConfig, output: Path | None, *, workers: int, planned: int | None) -> None:
    """Make shards in `output`, or of `planned` rows for a projection, and print the outcome."""
    check_arguments(output, workers, planned)
    if planned is not None:
        show(
            "measuring",
            output or config.source,
            lambda _: plan_recording_set(config, planned, workers=workers).describe("rows"),
        )
        return
    assert output is not None
    show(
        "recordings",
        output,
        lambda report: describe_set(make_recording_set(config, output, workers=workers, progress=report), "samples"),
    )
