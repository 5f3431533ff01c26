"""The curves of several runs laid over each other: one chart a quantity, one line a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron_cord.evaluation.statistics import standard_error
from megatron_cord.report.page.charts import Chart, Series, line_chart
from megatron_cord.report.page.curves import METRICS, metric_points
from megatron_cord.report.run.contents import Evaluation, RunContents


def accuracy_charts(runs: Sequence[RunContents], names: Sequence[str]) -> list[Chart]:
    """Draw audio accuracy, text accuracy and gap by step; bands are one standard error. Empty without evaluations."""
    quantities: dict[str, Callable[[Evaluation], float]] = {
        "Hearing: audio accuracy": lambda evaluation: evaluation.audio_accuracy,
        "Reading: text accuracy": lambda evaluation: evaluation.text_accuracy,
    }
    charts = []
    for number, (title, value_of) in enumerate(quantities.items()):
        series = [
            Series(
                name,
                [evaluation.step for evaluation in run.evaluations],
                [value_of(evaluation) for evaluation in run.evaluations],
                [standard_error(value_of(evaluation), evaluation.samples) for evaluation in run.evaluations],
                place=place,
            )
            for place, (run, name) in enumerate(zip(runs, names, strict=True))
            if run.evaluations
        ]
        if series:
            charts.append(
                line_chart(
                    f"accuracy-{number}", title, "training step", "accuracy", series,
                    wide=True, percent=True, markers=True, of_runs=True,
                )
            )  # fmt: skip
    return charts


def metric_charts(runs: Sequence[RunContents], names: Sequence[str]) -> list[Chart]:
    """Draw one chart for each metric that a run measured, but for those that are one constant in all runs."""
    charts = []
    for metric in METRICS:
        for number, (label, source) in enumerate(metric.lines.items()):
            series = [
                Series(name, *zip(*points, strict=True), place=place)
                for place, (run, name) in enumerate(zip(runs, names, strict=True))
                if (points := metric_points(run.metrics, source))
            ]
            if len({y for line in series for y in line.y}) < 2:
                continue
            title = metric.title if len(metric.lines) == 1 else f"{metric.title}: {label}"
            charts.append(
                line_chart(
                    f"{metric.key}-{number}", title, "training step", metric.unit, series,
                    from_zero=metric.from_zero, smooth=metric.smooth, of_runs=True,
                )
            )  # fmt: skip
    return charts
