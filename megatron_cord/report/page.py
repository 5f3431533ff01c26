"""Draws a run as one HTML page that needs nothing else: styles, script, charts and audio are inside, and nothing is loaded.

The page's policy (a Content-Security-Policy in its head) forbids every request and every script but the one whose hash it names. What models
answered is untrusted text: the template escapes it. It simplifies: the page is drawn whole each time.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import Markup

from megatron_cord.errors import CordError
from megatron_cord.report.charts import format_number, format_percent
from megatron_cord.report.curves import accuracy_chart, metric_charts, position_chart
from megatron_cord.report.examples import AUDIO_BUDGET, QUOTAS, choose_examples, load_clips, training_groups
from megatron_cord.report.gap import measure_gap, standard_error
from megatron_cord.report.reading import read_run
from megatron_cord.report.record import Evaluation, RunRecord
from megatron_cord.report.tokens import LEVELS, annotate

_ASSETS = Path(__file__).parent / "assets"
_PHASES = ("rollout", "teacher", "train", "exchange")  # disjoint; other times in the metrics may contain these


@dataclass(frozen=True)
class VoiceRow:
    """Accuracies of one voice, shares; the standard error is that of ``audio_after``. Without a second look, before equals after."""

    voice: str
    samples: int
    text: float
    audio_before: float
    audio_after: float
    error: float


@dataclass(frozen=True)
class Phase:
    """Where the time went: seconds, and their share of the total."""

    name: str
    seconds: float
    share: float


def render(run_dir: str | Path, output: str | Path | None = None) -> Path:
    """Writes the report of a run, finished or not, and returns where it is.

    Args:
        run_dir: the run's output directory.
        output: the page's file; ``report.html`` in the run's directory if None. It is complete or unchanged.

    Raises:
        CordError: not a run directory, a damaged file in it (named with the line), or an output that cannot be written.
    """
    record = read_run(run_dir)
    page = _template().render(_content(record))
    target = record.path / "report.html" if output is None else Path(output)
    partial = target.with_name(f".{target.name}.partial")
    try:
        partial.write_text(page, encoding="utf-8")
        os.replace(partial, target)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise CordError(f"{target}: cannot write the report: {error.strerror}; give another file with --output") from None
    return target


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_ASSETS), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": format_percent, "number": format_number, "duration": _duration}
    environment.globals |= {"annotate": annotate, "levels": LEVELS}
    return environment.get_template("page.html")


def _content(record: RunRecord) -> dict[str, object]:
    evaluations = record.evaluations
    before = evaluations[0] if len(evaluations) > 1 else None
    after = evaluations[-1] if evaluations else None
    examples = choose_examples(before, after) if after else []
    notices = _missing(record)
    clips: Mapping[str, str] = {}
    try:
        clips = load_clips(record.setting("data.evaluation"), [example.after.id for example in examples]) if examples else {}
    except CordError as error:
        notices.append(f"No audio: {error}. A relative path counts from where the report is made.")
    if clips and len(clips) < len(examples):
        notices.append(
            f"Audio of {len(clips)} of {len(examples)} questions: the others are not in the shards, or beyond {AUDIO_BUDGET / 1e6:g} MB."
        )
    script = (_ASSETS / "script.js").read_text(encoding="utf-8")
    return {
        "name": record.path.resolve().name,
        "facts": _facts(record),
        "notices": notices,
        "gap": measure_gap(before, after) if before and after else None,
        "latest": after,
        "accuracy": accuracy_chart(record),
        "metrics": metric_charts(record),
        "skipped": sum(1 for row in record.metrics if row.get("skipped")),
        "position": position_chart(record),
        "voices": _voices(before, after) if after else [],
        "phases": _phases(record),
        "examples": examples,
        "kinds": [(kind, sum(example.kind == kind for example in examples)) for kind in QUOTAS if any(e.kind == kind for e in examples)],
        "clips": clips,
        "groups": training_groups(record),
        "config": record.config_text,
        "style": Markup((_ASSETS / "style.css").read_text(encoding="utf-8")),
        "script": Markup(script),
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    }


def _missing(record: RunRecord) -> list[str]:
    """What a reader would look for in vain, and why."""
    notices = []
    if not record.summary:
        notices.append("The run has not finished (there is no summary.json): the numbers are those so far.")
    if not record.evaluations:
        notices.append("No evaluation yet: accuracies, the gap and the answers appear with the first one.")
    elif len(record.evaluations) == 1:
        notices.append("One evaluation so far: before and after can be compared when there is a second one.")
    if not record.metrics:
        notices.append("No metrics yet: the curves appear with the first training step.")
    if not record.rollout_files:
        notices.append("No rollouts were recorded: no divergence by position and no training rollouts (record.rollouts is the setting).")
    return notices


def _facts(record: RunRecord) -> list[str]:
    total = record.setting("train.steps")
    facts = [f"{record.last_step} of {total} steps" if isinstance(total, int) and total > record.last_step else f"{record.last_step} steps"]
    tp, seconds, teacher = record.setting("parallel.tp"), record.summary.get("seconds"), record.setting("teacher.mode")
    if isinstance(tp, int):
        facts.append(f"TP = {tp}")
    if isinstance(teacher, str):
        facts.append(f"{teacher} teacher")
    if record.setting("seed") is not None:
        facts.append(f"seed {record.setting('seed')}")
    if isinstance(seconds, (int, float)):
        facts.append(_duration(seconds))
    return facts


def _voices(before: Evaluation | None, after: Evaluation) -> list[VoiceRow]:
    rows = []
    for voice, accuracy in sorted(after.voices.items()):
        earlier = before.voices.get(voice) if before else None
        audio, error = accuracy.audio_accuracy, standard_error(accuracy.audio_accuracy, accuracy.samples)
        rows.append(VoiceRow(voice, accuracy.samples, accuracy.text_accuracy, earlier.audio_accuracy if earlier else audio, audio, error))
    return rows


def _phases(record: RunRecord) -> list[Phase]:
    """The steps' seconds by phase, what no phase claims, and the evaluations between the steps."""
    seconds = {name: sum(row.get(f"seconds_{name}") or 0.0 for row in record.metrics) for name in _PHASES}
    seconds["other"] = max(sum(row.get("seconds") or 0.0 for row in record.metrics) - sum(seconds.values()), 0.0)
    seconds["evaluation"] = sum(evaluation.seconds or 0.0 for evaluation in record.evaluations)
    total = sum(seconds.values())
    return [Phase(name, value, value / total) for name, value in seconds.items() if value > 0]


def _duration(seconds: float) -> str:
    """42.3 s, 3 min 20 s, 2 h 05 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
