"""The settings in which runs differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_cord.config.flattening import flat_texts
from megatron_cord.report.run.contents import RunContents

#: Settings that name a run and say nothing of its training.
_NAMES = ("output_dir", "metrics.wandb.name", "metrics.mlflow.name", "metrics.trackio.name", "metrics.swanlab.name")
_ABSENT = "–"


@dataclass(frozen=True)
class DifferingSetting:
    """One setting and its value in each run, as text; a dash where a run has none."""

    key: str
    values: tuple[str, ...]


def differing_settings(runs: Sequence[RunContents]) -> list[DifferingSetting]:
    """Return the settings that are not the same in all runs, in the order of the configuration."""
    flat = [flat_texts(run.config) for run in runs]
    keys = dict.fromkeys(key for settings in flat for key in settings if key not in _NAMES)
    rows = [DifferingSetting(key, tuple(settings.get(key, _ABSENT) for settings in flat)) for key in keys]
    return [row for row in rows if len(set(row.values)) > 1]
