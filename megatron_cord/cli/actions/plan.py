"""Print whether a run fits and how fast it will be."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_cord.config.loading import load_config
from megatron_cord.errors import CordError
from megatron_cord.model.architecture import Architecture
from megatron_cord.model.families import load_architecture
from megatron_cord.plan import GPUS, PUBLISHED, fitting, make_work, memory, part_counts, published, speed
from megatron_cord.plan.lora import sync_bytes
from megatron_cord.plan.page import layouts_table
from megatron_cord.plan.report import Report
from megatron_cord.trainer.config import RunConfig

_WITHOUT = f"or name a published model, which needs no checkpoint, with --model {'|'.join(sorted(PUBLISHED))}"


def plan(
    config_file: Path,
    overrides: Sequence[str],
    *,
    gpus: str,
    rollout_gpus: int,
    gpu: str,
    model: str | None,
    audio_seconds: float,
    text_tokens: int,
    layouts: bool,
    trace: bool,
    as_json: bool,
) -> int:
    """Print the estimate of a configuration; return 1 if the run does not fit, else 0."""
    counts = gpu_counts(gpus, several=trace)
    first = counts[0]
    if rollout_gpus < 0:
        raise CordError("--rollout-gpus cannot be negative")
    if trace and layouts:
        raise CordError(
            "--trace runs the layout of the configuration, and --layouts prints a table of others; give one"
        )
    if model is not None and model not in PUBLISHED:
        raise CordError(f"--model {model}: choose one of {', '.join(sorted(PUBLISHED))}")
    # A published model's sizes are known; what the configuration calls its checkpoint does not matter then.
    config = _load(config_file, [*overrides, f"model.checkpoint={model}"] if model else overrides)
    arch = published(model) if model else _architecture(config.model.checkpoint)
    teacher = None if config.teacher.checkpoint is None else _architecture(config.teacher.checkpoint)
    named = {name: each.checkpoint for name, each in config.teachers.items() if each.checkpoint is not None}
    others = tuple((name, _architecture(checkpoint)) for name, checkpoint in named.items())
    lengths: dict[str, Any] = {"audio_seconds": audio_seconds, "text_tokens": text_tokens, "teacher": teacher}
    lengths["others"] = others
    device = GPUS[gpu]
    if layouts:
        print(layouts_table(config, arch, device, lengths))
        return 0
    work = make_work(config, arch, first, **lengths)
    if trace:
        from megatron_cord.cli.actions.plan_trace import Request, print_trace

        print_trace(Request(config, arch, device, counts, rollout_gpus, lengths), as_json=as_json)
        return 0 if memory(config, arch, work, local_engine=not rollout_gpus).total <= device.memory else 1
    report = Report(
        gpu=device,
        gpus=first,
        parameters=part_counts(arch),
        work=work,
        memory=memory(config, arch, work, local_engine=not rollout_gpus),
        speed=speed(config, arch, work, device, first, rollout_gpus),
        weight_sync=sync_bytes(config.model, arch),
    )
    suggestion = fitting(config, arch, device, first, rollout_gpus, **lengths)
    if as_json:
        print(json.dumps(report.to_json() | {"suggestion": suggestion}, indent=1))
    else:
        _print(report, suggestion)
    return 0 if report.fits else 1


def gpu_counts(given: str, *, several: bool) -> list[int]:
    """Return the numbers of GPUs."""
    parts = [part.strip() for part in given.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise CordError(
            f"--gpus {given}: give a number of at least 1, or with --trace several with commas, as 8,64,512"
        )
    if len(parts) > 1 and not several:
        raise CordError(f"--gpus {given}: several numbers are for --trace; give one")
    return [int(part) for part in parts]


def _load(config_file: Path, overrides: Sequence[str]) -> RunConfig:
    try:
        return load_config(RunConfig, config_file, overrides)
    except CordError as error:
        if not str(error).startswith("model.checkpoint is required"):
            raise
        raise CordError(f"{error}, {_WITHOUT}") from None


def _architecture(checkpoint: str) -> Architecture:
    try:
        return load_architecture(checkpoint)
    except CordError as error:
        raise CordError(f"{error}, {_WITHOUT}") from None


def _print(report: Report, suggestion: list[str] | None) -> None:
    console = Console()
    table = Table("what", "GB a GPU", title=f"{report.gpus} × {report.gpu.name}, fullest stage: {report.memory.stage}")
    table.columns[1].justify = "right"
    for name, value in report.memory.parts().items():
        table.add_row(name.replace("_", " "), f"{value / 1e9:.1f}")
    table.add_row("sum", f"{report.memory.total / 1e9:.1f}")
    console.print(table)
    counts = report.parameters
    console.print(
        f"parameters: {counts.total:,} (audio encoder {counts.audio_encoder:,}, adapter {counts.adapter:,}, "
        f"language model {counts.language_model:,})\n{report.speed_text()}\n{report.weight_sync_text()}",
        highlight=False,
    )
    used = f"{report.memory.total / 1e9:.1f} of {report.gpu.memory / 1e9:.0f} GB"
    verdict = f"{'fits' if report.fits else 'does not fit'}: {used}"
    if not report.fits:
        advice = "no layout of these GPUs was found that does; use more or larger ones, or rollout servers of their own"
        verdict += f"; {advice if suggestion is None else 'set ' + ' '.join(suggestion)}"
    elif suggestion:
        verdict += f"; the fastest that fits, with what ranks send each other counted: {' '.join(suggestion)}"
    console.print(verdict, highlight=False, soft_wrap=True)
