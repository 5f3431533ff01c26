"""Finished runs of a comparison: in their directories, or in the small files that outlive these.

    FOLDER/METHOD-seed-S.json.gz, FOLDER being `kept` of the comparison:
    {"settings": of the run, without its place, "machine": {processor, cores, torch, python}, "summary": the run's,
     "outcomes": {SET: {"text" or "audio": {ID: what the last answer counts, 0 to 1}}},
     "divergence": {"before", "after": of the heard answers that were scored, nats a token; absent where none was},
     "metrics": {NAME: {"steps": how many have it, "mean": over these, "last": over those of the last 20 steps}}}

A study is spread over sittings and machines by them: a run that is kept is not made again, with or without its
directory. What it simplifies: responses and checkpoints are not kept, so such a run cannot go on.
"""

from __future__ import annotations

import gzip
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from megatron_cord.compare.finished import read_summary
from megatron_cord.compare.plan import PlannedRun
from megatron_cord.config.loading import from_dict, load_config, to_dict
from megatron_cord.errors import CordError
from megatron_cord.evaluation.config import HELDOUT
from megatron_cord.evaluation.files import heldout_file, read_result
from megatron_cord.evaluation.results import MODALITIES, outcomes_of
from megatron_cord.runtime.files import write_atomic
from megatron_cord.trainer.config import RunConfig

LAST_STEPS = 20  #: whose mean a metric has beside that of all steps


@dataclass(frozen=True)
class FinishedRun:
    """What a finished run came to; the fields are those at the top of this file."""

    settings: dict[str, Any]
    machine: dict[str, Any]
    summary: dict[str, Any]
    outcomes: dict[str, dict[str, dict[str, float]]]
    metrics: dict[str, dict[str, float]]
    divergence: dict[str, float] = field(default_factory=dict)  # older files have none


def is_complete(run: PlannedRun) -> bool:
    """Return whether the run is complete, with these settings but for those that are free: in its directory, or kept.

    Raises:
        CordError: the directory holds, or the kept file is of, a run with others.
    """
    kept = _read(run) is not None  # first, as it refuses other settings
    written = run.directory / "config.yaml"
    if written.is_file():
        try:
            # Settings that did not exist when the run was made have their defaults.
            found: RunConfig | None = load_config(RunConfig, written)
        except CordError:
            found = None
        if found is None or not run.has_settings_of(found):
            raise CordError(f"{run.directory} holds a run with other settings; remove it or choose another output_dir")
        return kept or (run.directory / "summary.json").is_file()
    return kept


def read_finished(run: PlannedRun) -> FinishedRun:
    """Return what a complete run came to, from its kept file, else from its directory.

    Raises:
        CordError: it is in neither, or damaged.
    """
    return _read(run) or _from_directory(run)


def keep(run: PlannedRun) -> None:
    """Write what a complete run came to into its kept file, if the comparison has a folder for these."""
    if run.kept is not None:
        text = json.dumps(asdict(_from_directory(run)), ensure_ascii=False, separators=(",", ":"))
        write_atomic(run.kept, gzip.compress(text.encode("utf-8"), mtime=0))  # the same run, the same file


def this_machine() -> dict[str, Any]:
    """Return what figures of this machine are to be shown with."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def processor() -> str:
    """Return the processor's name, if the system has it."""
    try:
        with Path("/proc/cpuinfo").open() as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _from_directory(run: PlannedRun) -> FinishedRun:
    summary = read_summary(run.directory)
    last = heldout_file(run.directory, summary["steps"])
    outcomes = {name: _outcomes(last.with_name(f"{name}.json")) for name in (HELDOUT, *run.config.evaluation.sets)}
    settings = _settings(load_config(RunConfig, run.directory / "config.yaml"))
    evaluations = {"before": heldout_file(run.directory, summary.get("begun_after_step", 0)), "after": last}
    divergence = {name: found for name, path in evaluations.items() if (found := _divergence(path)) is not None}
    metrics = _metrics(run.directory / "metrics.jsonl")
    return FinishedRun(settings, this_machine(), summary, outcomes, metrics, divergence)


def _read(run: PlannedRun) -> FinishedRun | None:
    """Return a kept run; None where there is none."""
    if run.kept is None or not run.kept.is_file():
        return None
    try:
        content = json.loads(gzip.decompress(run.kept.read_bytes()))
        kept = FinishedRun(**content)
        settings = dict(kept.settings)
    except (OSError, EOFError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise CordError(f"{run.kept} is no kept run ({error}); remove it, and the run is made again") from None
    try:
        found: RunConfig | None = from_dict(RunConfig, settings | {"output_dir": run.config.output_dir}, str(run.kept))
    except CordError:  # a setting that is not known any more
        found = None
    if found is None or not run.has_settings_of(found):
        raise CordError(f"{run.kept} is of a run with other settings; remove it, and the run is made again")
    return kept


def _settings(config: RunConfig) -> dict[str, Any]:
    return {name: value for name, value in to_dict(config).items() if name != "output_dir"}


def _outcomes(path: Path) -> dict[str, dict[str, float]]:
    rows = read_result(path)["answers"]
    return {modality: found for modality in MODALITIES if (found := outcomes_of(rows, modality))}


def _divergence(path: Path) -> float | None:
    """Return the mean over the tokens of the answers that an evaluation scored; None where it is absent or has none."""
    if not path.is_file():
        return None
    values = [v for row in read_result(path)["answers"] for v in row.get("token_kl") or () if v is not None]
    return fmean(values) if values else None


def _metrics(path: Path) -> dict[str, dict[str, float]]:
    """Return the means of all numbers in a run's metrics; steps without one do not count."""
    rows: list[Mapping[str, Any]] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    means: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values, last = (
            [row[name] for row in chosen if isinstance(row.get(name), int | float)]
            for chosen in (rows, rows[-LAST_STEPS:])
        )
        if values:
            means[name] = {"steps": len(values), "mean": fmean(values)} | ({"last": fmean(last)} if last else {})
    return means
