"""Charts: what is drawn, what is said of it, and that drawings do not disturb each other on one page."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from megatron_cord.report.page.charts import Series, format_number, line_chart, moving_average
from megatron_cord.report.page.curves import accuracy_chart, metric_charts, position_chart
from megatron_cord.report.run.reading import read_rollouts, read_run
from tests.report.fixture import rewrite, write_lines


def test_moving_average() -> None:
    """Catches a window that shifts the curve or counts zeros beyond its ends."""
    values = np.random.default_rng(0).normal(size=23)
    slow = [values[max(i - 3, 0) : i + 4].mean() for i in range(23)]
    assert moving_average(values, 7) == pytest.approx(np.array(slow))


def test_drawing_belongs_to_the_page() -> None:
    """Catches ids that two drawings share, fixed colours, styles that leak, and invalid HTML."""
    series = [Series("one", [1, 2, 3], [0.1, 0.5, 0.2], [0.1, 0.1, 0.1]), Series("two", [1, 2, 3], [1.0, 2.0, 3.0])]
    charts = [line_chart(key, key, "step", "nats", series, markers=True) for key in ("a", "b")]
    ids = [name for chart in charts for name in re.findall(r'\bid="([^"]+)"', chart.svg)]
    assert len(ids) == len(set(ids)) > 0
    for chart in charts:
        used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', chart.svg))
        assert used and used <= set(ids)
        assert not re.search(r"<style|<\?xml|<!DOCTYPE|<metadata|xlink", chart.svg)
        assert set(re.findall(r"#[0-9a-f]{6}\b", chart.svg)) == set()
        for variable in ("--ink-soft", "--series-1", "--series-2"):
            assert f"var({variable})" in chart.svg
        for text in ("step", "nats", "one", "two"):
            assert f">{text}</text>" in chart.svg
        HTMLParser().feed(chart.svg)


def test_same_data_same_drawing() -> None:
    """Catches dates and random names, which make every report differ."""
    series = [Series("one", list(range(100)), [float(x % 7) for x in range(100)])]
    assert line_chart("a", "t", "x", "y", series) == line_chart("a", "t", "x", "y", series)


def test_text_alternative() -> None:
    """Catches a chart that only eyes can read, and a table whose means are taken over the wrong stretch."""
    chart = line_chart(
        "a", "Reward", "training step", "share", [Series("mean", list(range(1, 121)), [x / 50 for x in range(1, 121)])]
    )
    assert chart.description == "Reward: share over training step. mean: 0.02 at 1, 2.4 at 120, between 0.02 and 2.4."
    assert chart.header == ("training step", "mean")
    assert len(chart.rows) == 12 and chart.rows[0] == ("1–10", "0.11") and chart.rows[-1] == ("111–120", "2.31")
    assert format_number(-0.123456) == "−0.123"


@pytest.mark.parametrize("points", [1, 2, 500])
@pytest.mark.filterwarnings("error")
def test_any_number_of_points(points: int) -> None:
    """Catches a drawing that fails or warns for the first step, for constant values, or for a long run."""
    x = list(range(points))
    assert "<path" in line_chart("a", "t", "x", "y", [Series("zero", x, [0.0] * points)], from_zero=True).svg


def test_metrics_that_are_missing_have_no_chart(run_copy: Path) -> None:
    """Catches an empty chart, or one that fails, where a run did not measure something."""
    assert [chart.title for chart in metric_charts(read_run(run_copy))][:3] == ["Divergence", "Reward", "Loss"]
    write_lines(
        run_copy / "metrics.jsonl", [{"step": 1, "loss": 2.0, "groups": 0, "zero_variance_groups": 0, "kl": None}]
    )
    charts = metric_charts(read_run(run_copy))
    assert [chart.title for chart in charts] == ["Loss"] and charts[0].header == ("training step", "total")


def test_accuracy_chart(finished_run: Path) -> None:
    """Catches text and audio exchanged."""
    run = read_run(finished_run)
    chart = accuracy_chart(run)
    first = run.evaluations[0]
    assert chart is not None
    assert chart.rows[0] == ("0", f"{100 * first.text_accuracy:.1f} %", f"{100 * first.audio_accuracy:.1f} %")


def test_divergence_by_position(run_copy: Path) -> None:
    """Catches early and late steps exchanged, positions counted from zero, and means of a few long responses."""
    run = read_run(run_copy)
    early = [r.token_kl for step in range(1, 11) for r in read_rollouts(run.rollout_files[step]) if r.token_kl]
    chart = position_chart(run)
    assert chart is not None and chart.header == ("token of the response", "steps 1 to 10", "steps 91 to 100")
    assert chart.rows[0] == ("1", format_number(sum(row[0] for row in early) / len(early)), chart.rows[0][2])
    assert float(chart.rows[0][2]) < float(chart.rows[0][1])
    path = run.rollout_files[1]
    for other in list(run.rollout_files.values())[1:]:
        other.unlink()
    rewrite(path, [{"token_kl": [1.0, math.nan] + [9.0] * (k == 0)} for k in range(6)])
    chart = position_chart(read_run(run_copy))
    assert chart is not None and chart.rows == (("1", "1"),) and chart.header[1] == "step 1"
    rewrite(path, [{"token_kl": None}])
    assert position_chart(read_run(run_copy)) is None
