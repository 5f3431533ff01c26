"""Draws the sweep of ``benchmarks.loss``: time and peak memory against V and against N."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot


def plot(points: list[dict[str, Any]], path: Path) -> None:
    """Write an SVG with four panels, all axes logarithmic."""
    matplotlib.rcParams["svg.hashsalt"] = "loss"  # the same numbers make the same file
    figure, panels = pyplot.subplots(2, 2, figsize=(10, 7), sharey="row", layout="constrained")
    names = list(dict.fromkeys(point["name"] for point in points))
    for column, (axis, position) in enumerate((("V", 1), ("N", 0))):
        for row, (key, scale, label) in enumerate(
            (("seconds", 1e3, "forward and backward, ms"), ("peak_bytes", 2.0**-20, "peak memory, MiB"))
        ):
            panel = panels[row][column]
            for name in names:
                mine = [point for point in points if point["name"] == name and point["axis"] == axis]
                style = (
                    {"marker": "o", "linewidth": 2.5}
                    if name.startswith("ours")
                    else {"marker": "s", "linewidth": 1, "linestyle": "--"}
                )
                panel.plot(
                    [point["sizes"][position] for point in mine],
                    [point[key] * scale for point in mine],
                    label=name,
                    **style,
                )
            panel.set(xscale="log", yscale="log", xlabel=axis, ylabel=label if column == 0 else "")
            ticks = sorted({point["sizes"][position] for point in points if point["axis"] == axis})
            panel.set_xticks(ticks, [str(tick) for tick in ticks])
            panel.minorticks_off()
            panel.grid(alpha=0.3)
    first = points[0]["sizes"], next(point["sizes"] for point in points if point["axis"] == "N")
    panels[0][0].set_title(f"N = {first[0][0]}, H = {first[0][2]}")
    panels[0][1].set_title(f"V = {first[1][1]}, H = {first[1][2]}")
    panels[0][0].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
