"""Finished runs in a comparison: what their directories say, and which of them are seeds of the same thing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_cord.compare.plan import PlannedRun
from megatron_cord.config.loading import load_config
from megatron_cord.errors import CordError
from megatron_cord.trainer.config import RunConfig


def finished_runs(runs: Mapping[str, Sequence[str]]) -> list[PlannedRun]:
    """Return finished runs as those of a comparison, by the name under which their seeds are put together.

    Args:
        runs: directories by name.

    Raises:
        CordError: a directory holds no finished run, or two of one name have the same seed.
    """
    found: list[PlannedRun] = []
    for name, directories in runs.items():
        by_seed: dict[int, str] = {}
        for directory in directories:
            config = _settings(Path(directory))
            if config.seed in by_seed:
                raise CordError(
                    f"runs.{name}: {by_seed[config.seed]} and {directory} both have seed={config.seed}; give them "
                    "different names"
                )
            by_seed[config.seed] = directory
            found.append(PlannedRun(name, config.seed, Path(directory), (), config, ranks=0))
    return found


def group_runs(directories: Sequence[Path]) -> dict[str, tuple[str, ...]]:
    """Put runs together that differ in their seed alone, under the name of their directory or of that above.

    Raises:
        CordError: a directory holds no finished run.
    """
    groups: list[tuple[RunConfig, dict[int, Path]]] = []
    for directory in directories:
        config = _settings(directory)
        same = next((g for g in groups if g[0] == _without_seed(config) and config.seed not in g[1]), None)
        if same is None:
            groups.append((_without_seed(config), {config.seed: directory}))
        else:
            same[1][config.seed] = directory
    named: dict[str, tuple[str, ...]] = {}
    for _, members in groups:
        paths = list(members.values())
        above = {path.resolve().parent for path in paths}
        together = len(paths) > 1 and len(above) == 1
        short = min(above).name if together else paths[0].resolve().name
        name = short if short not in named else str(paths[0])
        named[name] = tuple(map(str, paths))
    return named


def read_summary(directory: Path) -> dict[str, Any]:
    """Return the summary of a finished run.

    Raises:
        CordError: there is none.
    """
    try:
        summary: dict[str, Any] = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CordError(
            f"{directory} holds no finished run (it has no summary.json); wait for its end, or start its command again"
        ) from None
    except (OSError, ValueError) as error:
        raise CordError(
            f"{directory / 'summary.json'} cannot be read ({error}); start the run's command again"
        ) from None
    return summary


def _settings(directory: Path) -> RunConfig:
    read_summary(directory)
    try:
        return load_config(RunConfig, directory / "config.yaml")
    except CordError as error:
        raise CordError(f"{directory}: its settings cannot be read ({error})") from None


def _without_seed(config: RunConfig) -> RunConfig:
    """Leave out what differs between seeds of the same thing: the seed, and where it lies or began."""
    return replace(config, seed=0, output_dir="", resume="auto", init_from=None, init_optimizer=False)
