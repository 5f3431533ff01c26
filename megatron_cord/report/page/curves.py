"""The charts of a run: accuracy by evaluation, metrics by step, divergence by position in the response.

A metric that the run lacks gets no chart. Divergence by position compares the first tenth of the recorded steps with
the last.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_cord.evaluation.statistics import standard_error
from megatron_cord.report.page.charts import Chart, Series, line_chart
from megatron_cord.report.run.contents import RunContents
from megatron_cord.report.run.reading import read_rollouts

Row = Mapping[str, float | None]

_MOST_FILES = 20  # on each side: enough for a mean, and bounded for long runs
_FEWEST_ROLLOUTS = 5  # at a position, for its mean to be drawn


@dataclass(frozen=True)
class Metric:
    """One chart over the steps: label -> the metric's key, or a function of the row."""

    key: str
    title: str
    unit: str
    lines: Mapping[str, str | Callable[[Row], float | None]]
    from_zero: bool = True
    smooth: bool = True


def _zero_variance_share(row: Row) -> float | None:
    groups, zero_variance = row.get("groups"), row.get("zero_variance_groups")
    return None if not groups or zero_variance is None else zero_variance / groups


METRICS = (
    Metric("kl", "Divergence", "nats a token", {"student from teacher": "kl"}),
    Metric("reward", "Reward", "share", {"mean reward": "reward", "zero-variance groups": _zero_variance_share}),
    Metric(
        "loss",
        "Loss",
        "loss",
        {"total": "loss", "token term": "loss_token", "sequence term": "loss_sequence"},
        from_zero=False,
    ),
    Metric("grad", "Gradient norm", "norm", {"before clipping": "grad_norm"}),
    Metric("length", "Response length", "tokens", {"mean": "response_tokens"}),
    Metric("endings", "Responses", "share", {"cut at the limit": "truncated", "repeated phrases": "repetition"}),
    Metric("entropy", "Entropy of the student", "nats a token", {"mean": "entropy"}),
    Metric(
        "engine",
        "Log-probs, engine against trainer",
        "nats a token",
        {
            "mean difference": "engine_logprob_difference",
            "largest": "engine_logprob_difference_max",
            "KL divergence": "engine_kl",
            "mean, older weights": "stale_logprob_difference",
        },
    ),
    Metric(
        "staleness",
        "Age of the weights that sampled",
        "steps",
        {"mean": "staleness", "largest": "staleness_max"},
        smooth=False,
    ),
    Metric(
        "judge", "Judge", "share", {"disagrees with matching": "judge_disagreement", "no answer": "judge_fallbacks"}
    ),
    Metric(
        "seconds",
        "Time of a step",
        "seconds",
        {
            "rollout": "seconds_rollout",
            "teacher": "seconds_teacher",
            "train": "seconds_train",
            "weight_sync": "seconds_weight_sync",
        },
    ),
    Metric(
        "speed",
        "Speed",
        "tokens a second",
        {
            "whole step": "tokens_per_second",
            "generation": "tokens_per_second_generate",
            "teacher": "tokens_per_second_teacher",
            "forward and backward": "tokens_per_second_forward_backward",
        },
    ),
    Metric("utilisation", "Model FLOP utilisation", "share of the peak", {"update": "model_flop_utilisation"}),
    Metric(
        "memory",
        "Peak memory, fullest rank",
        "GB",
        {"device, tensors": "memory_peak_gb", "device, reserved": "memory_reserved_gb", "host": "memory_host_gb"},
        smooth=False,
    ),
    Metric("rate", "Learning rate", "rate", {"learning rate": "learning_rate"}, smooth=False),
)


def accuracy_chart(run: RunContents) -> Chart | None:
    """Draw text and audio accuracy by step, the gap shaded; bands are one standard error. None without evaluations."""
    if not run.evaluations:
        return None
    steps = [evaluation.step for evaluation in run.evaluations]
    series = []
    for label, attribute in (("reading (text)", "text_accuracy"), ("hearing (audio)", "audio_accuracy")):
        values = [getattr(evaluation, attribute) for evaluation in run.evaluations]
        errors = [
            standard_error(value, evaluation.samples) for value, evaluation in zip(values, run.evaluations, strict=True)
        ]
        series.append(Series(label, steps, values, errors))
    return line_chart(
        "accuracy",
        "Accuracy",
        "training step",
        "accuracy",
        series,
        wide=True,
        percent=True,
        markers=True,
        fill_between=True,
    )


def gap_chart(run: RunContents) -> Chart | None:
    """Draw text accuracy before training minus audio accuracy by step; None before the second evaluation."""
    if len(run.evaluations) < 2:
        return None
    text = run.evaluations[0].text_accuracy
    values = [text - evaluation.audio_accuracy for evaluation in run.evaluations]
    errors = [standard_error(evaluation.audio_accuracy, evaluation.samples) for evaluation in run.evaluations]
    steps = [evaluation.step for evaluation in run.evaluations]
    series = [Series("text before training − audio", steps, [100 * v for v in values], [100 * e for e in errors])]
    return line_chart(
        "gap",
        "Gap",
        "training step",
        "points",
        series,
        wide=True,
        from_zero=min(values) >= 0,
        markers=True,
        smooth=False,
    )


def metric_charts(run: RunContents) -> list[Chart]:
    """Draw one chart for each metric that was measured."""
    charts = []
    for metric in METRICS:
        lines = [(label, metric_points(run.metrics, source)) for label, source in metric.lines.items()]
        series = [Series(label, *zip(*points, strict=True)) for label, points in lines if points]
        if series:
            options = {"from_zero": metric.from_zero, "smooth": metric.smooth}
            charts.append(line_chart(metric.key, metric.title, "training step", metric.unit, series, **options))
    return charts


def position_chart(run: RunContents) -> Chart | None:
    """Draw the mean divergence at each position, early against late steps; None without recorded divergences."""
    files = list(run.rollout_files.items())
    tenth = min(max(len(files) // 10, 1), _MOST_FILES)
    parts = [files[:tenth]] if len(files) < 2 else [files[:tenth], files[-tenth:]]
    series = [line for part in parts if (line := _by_position(part)) is not None]
    if not series:
        return None
    return line_chart(
        "position", "Divergence by position", "token of the response", "nats", series, wide=True, from_zero=True
    )


def _by_position(files: Sequence[tuple[int, Path]]) -> Series | None:
    if not files:
        return None
    rows = [rollout.token_kl for _, path in files for rollout in read_rollouts(path) if rollout.token_kl]
    columns = [
        [row[position] for row in rows if position < len(row)] for position in range(max(map(len, rows), default=0))
    ]
    measured = [np.array([value for value in column if math.isfinite(value)]) for column in columns]
    # Few responses are long: without a floor, the curve would end in the noise of one or two of them.
    floor = min(_FEWEST_ROLLOUTS, len(rows))
    kept = [(position, values) for position, values in enumerate(measured, start=1) if len(values) >= max(floor, 1)]
    if not kept:
        return None
    first, last = files[0][0], files[-1][0]
    return Series(
        f"step {first}" if first == last else f"steps {first} to {last}",
        [position for position, _ in kept],
        [float(values.mean()) for _, values in kept],
        [float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0 for _, values in kept],
    )


def metric_points(rows: Sequence[Row], source: str | Callable[[Row], float | None]) -> list[tuple[float, float]]:
    """Return (step, value) where the metric was measured."""
    points = []
    for row in rows:
        value = row.get(source) if isinstance(source, str) else source(row)
        step = row["step"]
        if value is not None and step is not None:
            points.append((step, value))
    return points
