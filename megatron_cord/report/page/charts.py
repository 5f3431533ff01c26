"""Line charts as inline SVG with the page's colours and font, so that one drawing serves light and dark mode.

Matplotlib draws with stand-in colours, which are then replaced by CSS variables. Every chart has a text alternative: a
sentence and a table of its numbers.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

#: Stand-in colour -> the page's variable. The order of the series colours is the order in which charts use them.
_VARIABLES = {
    "#010101": "var(--ink-soft)",
    "#020202": "var(--rule)",
    "#030301": "var(--series-1)",
    "#030302": "var(--series-2)",
    "#030303": "var(--series-3)",
    "#030304": "var(--series-4)",
}
#: The same for charts whose lines are runs.
_RUN_VARIABLES = {f"#04040{number}": f"var(--run-{number})" for number in range(1, 9)}
MOST_RUNS = len(_RUN_VARIABLES)
_INK, _RULE, *_SERIES = _VARIABLES
_RUNS = list(_RUN_VARIABLES)
_Dash = str | tuple[float, tuple[float, ...]]
_DASHES: tuple[_Dash, ...] = (
    "-",
    (0, (5, 2)),
    (0, (1.5, 1.5)),
    (0, (6, 1.5, 1.5, 1.5)),
    (0, (9, 2)),
    (0, (3, 1.5)),
    (0, (1, 2.5)),
    (0, (6, 1.5, 1.5, 1.5, 1.5, 1.5)),
)  # told apart without colours too
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "axes.formatter.limits": (-2, 4),
    "svg.hashsalt": "report",  # the same data, the same file
    "text.parse_math": False,
    "font.size": 8.5,
    "axes.edgecolor": _RULE,
    "axes.labelcolor": _INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": _RULE,
    "grid.linewidth": 0.6,
    "xtick.color": _RULE,
    "xtick.labelcolor": _INK,
    "ytick.left": False,
    "ytick.labelcolor": _INK,
    "legend.frameon": False,
    "legend.labelcolor": _INK,
    "legend.handlelength": 1.8,
}
_SMOOTH_FROM = 60  # points; shorter series are drawn as they are
_TABLE_ROWS = 12
_Show = Callable[[float], str]


@dataclass(frozen=True)
class Series:
    """One line: ``y`` over ``x``, ascending in x, with a band of ``error`` on both sides if there is one.

    ``place`` chooses colour and dashes; None takes the line's number in the chart.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    error: Sequence[float] | None = None
    place: int | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class Chart:
    """A finished chart: the drawing, its sentence, and its numbers (a header and rows of texts)."""

    title: str
    svg: Markup
    description: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def line_chart(
    key: str,
    title: str,
    x_label: str,
    y_label: str,
    series: Sequence[Series],
    *,
    wide: bool = False,
    percent: bool = False,
    from_zero: bool = False,
    markers: bool = False,
    fill_between: bool = False,
    smooth: bool = True,
    of_runs: bool = False,
) -> Chart:
    """Draw one to four series over a whole-numbered x; of runs, up to eight.

    Args:
        key: prefix of the drawing's ids, unique on the page.
        title: shown by the page, above the drawing.
        x_label: with its unit.
        y_label: with its unit.
        series: at least one, none empty.
        wide: drawn for about 520 pixels instead of 300, so that the type has one size on the page.
        percent: y holds shares in [0, 1], drawn as 0 to 100 %.
        from_zero: the y axis starts at zero.
        markers: a mark at each point.
        fill_between: shade the area between the first two series, which share their x.
        smooth: draw long series faint, with a moving average on top.
        of_runs: each series is a run, with the colour that the page's own legend gives it; of long series the moving
            average is drawn alone.
    """
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(5.0, 3.0) if wide else (3.4, 2.5), layout="constrained")
        axes = figure.add_subplot()
        colours = _RUNS if of_runs else _SERIES
        for number, line in enumerate(series):
            place = number if line.place is None else line.place
            _draw(axes, line, colours[place], _DASHES[place], "o" if markers else "", smooth, faint=not of_runs)
        if fill_between:
            axes.fill_between(series[0].x, series[0].y, series[1].y, color=_SERIES[1], alpha=0.08, linewidth=0)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.xaxis.set_major_locator(MaxNLocator(6 if wide else 5, integer=True))
        axes.margins(x=0.02)
        if len({x for line in series for x in line.x}) == 1:
            axes.set_xlim(series[0].x[0] - 0.5, series[0].x[0] + 0.5)
        if percent:
            axes.set_ylim(-0.02, 1.03)
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
        elif from_zero:
            axes.set_ylim(0.0, max(axes.get_ylim()[1], 1e-9))
        if len(series) > 1 and not of_runs:
            figure.legend(
                loc="outside upper left",
                ncols=min(len(series), 2 if len(series) > 3 else 3),
                borderaxespad=0.1,
                borderpad=0.2,
                columnspacing=1.4,
            )
        buffer = io.StringIO()
        nothing = {"Creator": None, "Date": None, "Format": None, "Type": None}
        figure.patch.set_visible(False)
        axes.patch.set_visible(False)
        FigureCanvasSVG(figure).print_svg(buffer, metadata=nothing)  # type: ignore[no-untyped-call]  # savefig would draw twice
    show = format_percent if percent else format_number
    description = f"{title}: {y_label} over {x_label}. " + " ".join(_sentence(line, show) for line in series)
    header, rows = _table(x_label, series, show)
    return Chart(title, _adapt(buffer.getvalue(), key), description, header, rows)


def css_dashes() -> list[str]:
    """Return the dashes of a chart's lines as values of stroke-dasharray, for the legend of a page."""
    return ["none" if isinstance(dash, str) else " ".join(f"{2 * part:g}" for part in dash[1]) for dash in _DASHES]


def format_percent(share: float) -> str:
    """0.834 -> "83.4 %"."""
    return f"{100 * share:.1f} %"


def format_number(value: float) -> str:
    """Three significant digits, without trailing zeros."""
    return f"{value:.3g}".replace("-", "−")


def moving_average(values: Sequence[float] | np.ndarray, window: int) -> np.ndarray:
    """[N] -> [N]: the mean of up to ``window`` values around each, fewer at the ends."""
    half = window // 2
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=np.float64))])
    positions = np.arange(len(values))
    low, high = np.maximum(positions - half, 0), np.minimum(positions + half + 1, len(values))
    means: np.ndarray = (sums[high] - sums[low]) / (high - low)
    return means


def _draw(axes: Axes, line: Series, colour: str, dash: _Dash, marker: str, smooth: bool, *, faint: bool) -> None:
    x, y = np.asarray(line.x), np.asarray(line.y)
    if line.error is not None:
        axes.fill_between(
            x,
            y - np.asarray(line.error),
            y + np.asarray(line.error),
            color=colour,
            alpha=0.18 if faint else 0.09,
            linewidth=0,
        )
    if smooth and len(x) > _SMOOTH_FROM:
        if faint:
            axes.plot(x, y, color=colour, linewidth=0.7, alpha=0.3)
        y = moving_average(y, max(5, len(y) // 20))
    axes.plot(
        x,
        y,
        color=colour,
        linewidth=1.7,
        linestyle=dash,
        marker=marker or ("o" if len(x) == 1 else ""),
        markersize=3.5,
        label=line.label,
    )


def _adapt(svg: str, key: str) -> Markup:
    """Return the drawing for a page: without a file's head, with the page's colours, and with unique ids."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)  # it would style the whole page
    svg = re.sub(
        r'<svg [^>]*?viewBox="([^"]+)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true" focusable="false">', svg, count=1
    )
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{key}-", svg).replace("xlink:href", "href")
    for stand_in, variable in (_VARIABLES | _RUN_VARIABLES).items():
        svg = svg.replace(stand_in, variable)
    return Markup(svg)  # trusted: no text of the run is drawn, only labels of this package and numbers


def _sentence(line: Series, show: _Show) -> str:
    first, last = line.y[0], line.y[-1]
    return (
        f"{line.label}: {show(first)} at {line.x[0]:g}, {show(last)} at {line.x[-1]:g}, "
        f"between {show(min(line.y))} and {show(max(line.y))}."
    )


def _table(x_label: str, series: Sequence[Series], show: _Show) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """Up to twelve rows: single points, or means over equal stretches of x."""
    every_x = sorted({x for line in series for x in line.x})
    stretches = np.array_split(np.array(every_x), min(_TABLE_ROWS, len(every_x)))
    rows = []
    for stretch in stretches:
        low, high = stretch[0], stretch[-1]
        cells = [f"{low:g}" if low == high else f"{low:g}–{high:g}"]
        for line in series:
            inside = [y for x, y in zip(line.x, line.y, strict=True) if low <= x <= high]
            cells.append(show(sum(inside) / len(inside)) if inside else "–")
        rows.append(tuple(cells))
    return (x_label, *(line.label for line in series)), tuple(rows)
