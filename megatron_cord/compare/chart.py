"""The drawing of a comparison: the share of the gap that each method closed; seeds are dots, intervals bars."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

#: How drawings of results look: bars and dots on rows, one a method or a seed.
SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "compare",  # the same data, the same file
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "x",
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "ytick.left": False,
}
_REFERENCE, _BASELINE, _SEED = "#b3402a", "#33567f", "#8a8a8a"


def draw(result: dict[str, Any], paths: list[Path]) -> None:
    """Draw a result of ``results.gather``; a path's suffix gives the format.

    Methods without a result are left out. The axis holds all seeds; intervals are cut at its border.
    """
    drawn = [(name, method) for name, method in result["methods"].items() if method["gap_closed"] is not None]
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(6.4, 0.9 + 0.34 * max(len(drawn), 1)), layout="constrained")
        axes = figure.add_subplot()
        for row, (name, method) in enumerate(drawn):
            colour, mean = _REFERENCE if name == result["reference"] else _BASELINE, method["gap_closed"]
            if mean["low"] is not None:
                axes.plot(
                    [mean["low"], mean["high"]],
                    [row, row],
                    color=colour,
                    linewidth=5,
                    alpha=0.25,
                    solid_capstyle="butt",
                )
            seeds = [run["gap_closed"] for run in method["runs"].values() if run.get("gap_closed") is not None]
            axes.plot(seeds, [row] * len(seeds), "o", color=_SEED, markersize=3.5)
            axes.plot(mean["mean"], row, "|", color=colour, markersize=14, markeredgewidth=2.5)
        values = [
            run["gap_closed"] for _, m in drawn for run in m["runs"].values() if run.get("gap_closed") is not None
        ]
        axes.set_xlim(min([0.0, *values]) - 0.08, max([1.0, *values]) + 0.02)
        axes.set_yticks(range(len(drawn)), [method["title"] for _, method in drawn])
        # The first on top, and room for the bars of the first and the last.
        axes.set_ylim(max(len(drawn), 1) - 0.5, -0.5)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xlabel("share of the gap between reading and hearing that was closed")
        axes.set_title(result["title"], loc="left", fontsize=10)
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=160, metadata={"Date": None} if path.suffix == ".svg" else {"Software": None})
