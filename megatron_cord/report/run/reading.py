"""The reader of a run's directory: configuration, metrics, alerts, evaluations, rollouts, summary.

The run may be in progress: files that are not there yet are empty here, and a half-written last line is left out. Files
that are there must be sound: a damaged line is an error that names it. It simplifies: files are read whole, except the
rollout dump (Parquet, see ``rollout.rollout_file``), of which a reader opens only the steps it needs.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from megatron_cord.config.source import read_tree
from megatron_cord.errors import CordError
from megatron_cord.evaluation.files import heldout_files
from megatron_cord.report.run.contents import (
    Answer,
    Evaluation,
    RaisedAlert,
    RunContents,
    TrainingRollout,
    VoiceAccuracy,
)
from megatron_cord.report.run.fields import Fields
from megatron_cord.rollout import rollout_file

ROLLOUTS = "rollouts"  # the folder of the rollout dump, unless record.rollouts names another


def read_run(path: str | Path) -> RunContents:
    """Read a run's directory.

    Raises:
        CordError: it is no run's directory, or a file in it is damaged (named with the line).
    """
    directory = Path(path)
    config = directory / "config.yaml"
    if not config.is_file():
        raise CordError(f"{path} is not a run directory (it has no config.yaml); give the output_dir of a training run")
    values = read_tree(config, ()).values
    section = values.get("record")
    rollouts = section.get("rollouts", ROLLOUTS) if isinstance(section, dict) else ROLLOUTS
    summary_file, best_file = directory / "summary.json", directory / "checkpoints" / "best.json"
    summary = _read_object(summary_file) if summary_file.is_file() else {}
    return RunContents(
        path=directory,
        config=values,
        config_text=_read_text(config),
        metrics=_read_metrics(directory / "metrics.jsonl"),
        alerts=_read_alerts(directory / "alerts.jsonl"),
        evaluations=tuple(_evaluation(file) for file in heldout_files(directory).values()),
        rollout_files=rollout_file.dump_files(directory / str(rollouts)) if rollouts else {},
        summary=summary,
        changes=_read_changes(directory / "settings_changes.jsonl"),
        best=summary.get("best") or (_read_object(best_file) if best_file.is_file() else {}),
    )


def read_rollouts(path: Path) -> list[TrainingRollout]:
    """Read the rollouts of one step. Raises CordError with the file, and the damaged column or row."""
    columns = [field.name for field in dataclasses.fields(TrainingRollout)]
    return [TrainingRollout(**row) for row in rollout_file.read_rollouts(path, columns).to_pylist()]


def _read_metrics(path: Path) -> tuple[Mapping[str, float | None], ...]:
    if not path.is_file():
        return ()
    by_step: dict[int, dict[str, float | None]] = {}
    for line, values in _read_lines(path):
        step = Fields(values, f"{path}:{line}").integer("step")
        # Values that are no numbers are left out. Of a step done again after a resumption, the last line counts.
        by_step[step] = {
            key: _measured(value) for key, value in values.items() if value is None or isinstance(value, (int, float))
        }
    return tuple(by_step[step] for step in sorted(by_step))


def _read_alerts(path: Path) -> tuple[RaisedAlert, ...]:
    if not path.is_file():
        return ()
    rows = [Fields(values, f"{path}:{line}") for line, values in _read_lines(path)]
    return tuple(RaisedAlert(row.integer("step"), row.text("kind"), row.text("words")) for row in rows)


def _read_changes(path: Path) -> tuple[str, ...]:
    if not path.is_file():
        return ()
    words = []
    for line, values in _read_lines(path):
        step = Fields(values, f"{path}:{line}").integer("step")
        changed = [f"{key}: {old} → {new}" for key, (old, new) in dict(values.get("changes", {})).items()]
        words += [f"after step {step}: {text}" for text in [*changed, *values.get("notes", [])]]
    return tuple(words)


def _measured(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _evaluation(path: Path) -> Evaluation:
    stat = path.stat()
    return _read_evaluation(path, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=512)  # a live page reads the run again and again, and these files are large and written once
def _read_evaluation(path: Path, changed: int, size: int) -> Evaluation:
    fields = Fields(_read_object(path), str(path))
    answers = []
    for number, item in enumerate(fields.items("answers")):
        answer = Fields(item, f"{path}: answers[{number}]")
        answers.append(
            Answer(
                id=answer.text("id"),
                question=answer.text("question"),
                gold=answer.optional_text("answer"),
                voice=answer.optional_text("group"),
                text_response=answer.text("text_response"),
                text_correct=answer.flag("text_correct"),
                audio_response=answer.text("audio_response"),
                audio_correct=answer.flag("audio_correct"),
                tokens=answer.texts("tokens"),
                token_kl=answer.numbers("token_kl"),
            )
        )
    voices = {}
    for voice, values in fields.optional_object("groups").items():
        accuracy = Fields(values if isinstance(values, dict) else {}, f"{path}: groups[{voice!r}]")
        voices[voice] = VoiceAccuracy(
            accuracy.integer("samples"), accuracy.number("text_accuracy"), accuracy.number("audio_accuracy")
        )
    return Evaluation(
        step=fields.integer("step"),
        text_accuracy=fields.number("text_accuracy"),
        audio_accuracy=fields.number("audio_accuracy"),
        samples=fields.integer("samples"),
        seconds=fields.optional_number("seconds"),
        voices=voices,
        answers=tuple(answers),
    )


def _read_lines(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Return the objects of a JSON Lines file with their line numbers; an unfinished last line is left out."""
    whole, _, _ = _read_text(path).rpartition("\n")
    lines = []
    for number, line in enumerate(whole.split("\n"), start=1):
        if line.strip():
            lines.append((number, _parse(line, f"{path}:{number}")))
    return lines


def _read_object(path: Path) -> dict[str, Any]:
    return _parse(_read_text(path), str(path))


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CordError(f"{path}: not UTF-8 text at byte {error.start}; restore the file or remove it") from None
    except OSError as error:
        raise CordError(f"{path}: cannot be read: {error.strerror}") from None


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CordError(f"{where}: not valid JSON ({error}); restore the file or remove what is damaged") from None
    if not isinstance(values, dict):
        raise CordError(
            f"{where}: expected a JSON object, got {type(values).__name__}; restore the file or remove what is damaged"
        )
    return values
