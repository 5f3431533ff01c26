"""The overview of a run: facts, what is missing, the result, voices, and time by phase."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_cord.evaluation.statistics import standard_error
from megatron_cord.report.page.curves import accuracy_chart, gap_chart, metric_charts, position_chart
from megatron_cord.report.run.contents import Evaluation, RunContents
from megatron_cord.report.run.gap import measure_gap
from megatron_cord.report.run.retention import read_changes

_PHASES = ("rollout", "teacher", "train", "weight_sync")  # disjoint; other times in the metrics may contain these


@dataclass(frozen=True)
class VoiceRow:
    """Accuracies of one voice, shares; the error is of ``audio_after``. With one evaluation, before equals after."""

    voice: str
    samples: int
    text: float
    audio_before: float
    audio_after: float
    error: float


@dataclass(frozen=True)
class Phase:
    """Seconds of one phase, and their share of the total."""

    name: str
    seconds: float
    share: float


def overview(run: RunContents) -> dict[str, object]:
    """Return the content of hero.html, voices.html and training.html, and of the heads of the pages."""
    evaluations = run.evaluations
    before = evaluations[0] if len(evaluations) > 1 else None
    after = run.outcome
    return {
        "name": run.path.resolve().name,
        "facts": facts(run),
        "alerts": run.alerts,
        "gap": measure_gap(before, after) if before and after else None,
        "latest": after,
        "accuracy": accuracy_chart(run),
        "gap_curve": gap_chart(run),
        "metrics": metric_charts(run),
        "skipped": sum(1 for row in run.metrics if row.get("skipped")),
        "changes": read_changes(run.path, before.step, after.step, run.setting("evaluation.guards"))
        if before and after
        else (),
        "position": position_chart(run),
        "voices": _voices(before, after) if after else [],
        "phases": _phases(run),
    }


def missing(run: RunContents) -> list[str]:
    """Return which parts of the page are missing, and why, and what changed in the middle of the run."""
    notices = []
    if not run.summary:
        notices.append("The run has not finished (there is no summary.json): the numbers are those so far.")
    if not run.evaluations:
        notices.append("No evaluation yet: accuracies, the gap and the answers appear with the first one.")
    elif len(run.evaluations) == 1:
        notices.append("One evaluation so far: before and after can be compared when there is a second one.")
    if not run.metrics:
        notices.append("No metrics yet: the curves appear with the first training step.")
    if not run.rollout_files:
        notices.append(
            "No rollouts were recorded: no divergence by position and no training rollouts (record.rollouts is the "
            "setting)."
        )
    notices += [f"The settings changed {change}." for change in run.changes]
    return notices


def facts(run: RunContents) -> list[str]:
    """Return steps, layout, teacher, seed, time, what ended the run early, and its best evaluation in words."""
    total = run.setting("train.steps")
    known = [
        f"{run.last_step} of {total} steps"
        if isinstance(total, int) and total > run.last_step
        else f"{run.last_step} steps"
    ]
    tp, seconds, teacher = run.setting("parallel.tp"), run.summary.get("seconds"), run.setting("teacher.mode")
    if isinstance(tp, int):
        known.append(f"TP = {tp}")
    if isinstance(teacher, str):
        known.append(f"{teacher} teacher")
    if run.setting("seed") is not None:
        known.append(f"seed {run.setting('seed')}")
    if isinstance(seconds, (int, float)):
        known.append(format_duration(seconds))
    endings = {"hours": "ended by train.hours", "early_stopping": "ended by early stopping"}
    if (ending := endings.get(str(run.summary.get("ended_by")))) is not None:
        known.append(ending)
    if guard := run.guard:
        back = "" if guard["restored"] is None else f", back at step {guard['restored']}"
        known.append(f"ended by the guard {guard['name']} after step {guard['step']}{back}")
    best = run.best
    if isinstance(best.get("step"), int) and isinstance(best.get("value"), (int, float)):
        metric = str(best.get("metric")).replace("_", " ")
        known.append(f"best after step {best['step']} ({metric} {best['value']:.1%} on {best.get('set')})")
    return known


def _voices(before: Evaluation | None, after: Evaluation) -> list[VoiceRow]:
    rows = []
    for voice, accuracy in sorted(after.voices.items()):
        earlier = before.voices.get(voice) if before else None
        audio, error = accuracy.audio_accuracy, standard_error(accuracy.audio_accuracy, accuracy.samples)
        rows.append(
            VoiceRow(
                voice,
                accuracy.samples,
                accuracy.text_accuracy,
                earlier.audio_accuracy if earlier else audio,
                audio,
                error,
            )
        )
    return rows


def _phases(run: RunContents) -> list[Phase]:
    """Return the seconds of the steps by phase, the rest of them, and those of the evaluations."""
    seconds = {name: sum(row.get(f"seconds_{name}") or 0.0 for row in run.metrics) for name in _PHASES}
    seconds["other"] = max(sum(row.get("seconds") or 0.0 for row in run.metrics) - sum(seconds.values()), 0.0)
    seconds["evaluation"] = sum(evaluation.seconds or 0.0 for evaluation in run.evaluations)
    total = sum(seconds.values())
    return [Phase(name, value, value / total) for name, value in seconds.items() if value > 0]


def format_duration(seconds: float) -> str:
    """Format seconds: 42.3 s, 3 min 20 s, 2 h 05 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
