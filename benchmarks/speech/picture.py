"""Draws what `make speech` came to: of each seed the held-out questions answered when heard, before and after.

    python -m benchmarks.speech.picture      # docs/images/speech.svg and .png, of benchmarks/results/speech

The results are the `intervals.json` of `make speech`, one file a seed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from megatron_cord.compare.chart import SETTINGS
from megatron_cord.runtime.entry import Parser, run

BENCHMARKS = Path(__file__).parents[1]
RESULTS = BENCHMARKS / "results" / "speech"
IMAGES = BENCHMARKS.parent / "docs" / "images"
_READ, _BEFORE, _AFTER = "#444444", "#8a8a8a", "#b3402a"


def kept_results() -> dict[str, Any]:
    """Return the results by the name of their seed."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("seed-*.json"))}


def draw(results: dict[str, Any], paths: list[Path]) -> None:
    """Draw results by the name of their seed, one row each; a path's suffix gives the format.

    Before and after stand one above the other in a row, each with its 95 % interval; the upright line is what is
    answered when read.
    """
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(6.4, 1.2 + 0.5 * len(results)), layout="constrained")
        axes = figure.add_subplot()
        for row, result in enumerate(results.values()):
            before, after = result["before"]["audio"], result["after"]["audio"]
            read, first = result["after"]["text"]["value"], row == 0
            for place, heard, colour, name in (
                (row - 0.14, before, _BEFORE, "heard, after the warm-up"),
                (row + 0.14, after, _AFTER, "heard, after the distillation"),
            ):
                interval = [heard["low"], heard["high"]]
                axes.plot(interval, [place] * 2, color=colour, linewidth=5, alpha=0.25, solid_capstyle="butt")
                axes.plot(heard["value"], place, "o", color=colour, markersize=6, label=name if first else None)
            axes.plot([read] * 2, [row - 0.3, row + 0.3], color=_READ, linewidth=2.5, label="read" if first else None)
            closed = result["change"]["gap_closed"]["value"]
            axes.annotate(f"{closed:.0%} of the gap", (read, row), (6, 0), textcoords="offset points", va="center")
        lowest = min(result["before"]["audio"]["low"] for result in results.values())
        axes.set_xlim(lowest - 0.05, max(result["after"]["text"]["value"] for result in results.values()) + 0.15)
        axes.set_ylim(len(results) - 0.5, -0.5)
        axes.set_yticks(range(len(results)), [name.replace("-", " ") for name in results])
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        questions = next(iter(results.values()))["after"]["audio"]["samples"]
        axes.set_xlabel(f"of {questions} held-out questions answered, in voices that were not trained on")
        figure.legend(loc="outside upper left", ncols=3, frameon=False, handletextpad=0.3, columnspacing=1.4)
        for path in paths:
            figure.savefig(path, dpi=160, metadata={"Date": None} if path.suffix == ".svg" else {"Software": None})


def main() -> None:
    """Draw the results that are kept."""
    Parser(description="Draws what make speech came to, by seed.").parse_args()
    draw(kept_results(), [IMAGES / "speech.svg", IMAGES / "speech.png"])


if __name__ == "__main__":
    run(main)
