"""What came out of a run: the table, intervals of what changed, and where report and summary are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_cord.compare.kept import this_machine
from megatron_cord.evaluation.files import heldout_files, read_result
from megatron_cord.evaluation.results import set_result
from megatron_cord.report.page.page import render
from megatron_cord.report.terminal import evaluation_table
from megatron_cord.runtime.files import write_json

INTERVALS = "intervals.json"


def intervals(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Return accuracies with 95 % intervals before and after, and what changed, paired by question."""
    changed = set_result(after["answers"], (), before["answers"])
    return {"before": before["estimates"], "after": changed["estimates"], "change": changed["change"]}


def show(directory: Path, console: Console) -> None:
    """Print the table and the intervals of a finished run, and write its report and `intervals.json`."""
    evaluations = list(heldout_files(directory).values())
    before, after = (read_result(path) for path in (evaluations[0], evaluations[-1]))
    console.print(evaluation_table(before, after))
    found = intervals(before, after)
    write_json(directory / INTERVALS, {**found, "machine": this_machine()})
    for modality in ("text", "audio"):
        rows = ", ".join(f"{name} {_share(found[name][modality])}" for name in ("before", "after"))
        change = found["change"][modality]
        console.print(f"{modality}: {rows}; change {_share(change)}, p = {change['p']:.2g}", highlight=False)
    summary = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
    closed = summary["gap_closed"]
    share = "there was no gap to close" if closed is None else f"gap closed: [bold]{closed:.0%}[/]"
    console.print(f"{share}, in {summary['seconds']:.0f} s of training", highlight=False)
    console.print(f"report: {render(directory)}", highlight=False, soft_wrap=True)


def _share(estimate: Mapping[str, Any]) -> str:
    value, low, high = (100 * estimate[name] for name in ("value", "low", "high"))
    return f"{value:.1f} % ({low:.1f} to {high:.1f})"
