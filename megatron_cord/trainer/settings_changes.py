"""What changed between the run that wrote a checkpoint and the one that goes on from it: printed, and kept as a file.

`settings_changes.jsonl` in the run's directory has a line for each start with other settings:

    {"time", "step", "checkpoint", "changes": {"optimizer.learning_rate": [old, new]}, "notes": ["…"]}
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_cord.config.flattening import flatten
from megatron_cord.data.ordering.row import Phase
from megatron_cord.runtime.files import fingerprint
from megatron_cord.trainer.start import Start
from megatron_cord.trainer.step.optimizer.schedule import RateSchedule

logger = logging.getLogger(__name__)
FILE_NAME = "settings_changes.jsonl"
#: Settings that say where a run begins and lies, not what it does.
_PLACE = ("output_dir", "resume", "init_from", "init_optimizer", "evaluation.first_from")


@dataclass(frozen=True)
class Changes:
    """What is different.

    Attributes:
        settings: old and new value by dotted key.
        notes: consequences in words.
    """

    settings: Mapping[str, tuple[Any, Any]]
    notes: tuple[str, ...]

    def lines(self) -> list[str]:
        """Return a line for each change."""
        return [f"{key}: {_shown(old)} → {_shown(new)}" for key, (old, new) in self.settings.items()] + [*self.notes]


def find_changes(start: Start, settings: Mapping[str, Any], schedule: RateSchedule, model: str) -> Changes:
    """Compare the settings of a run that goes on with those of its checkpoint.

    Args:
        start: where it goes on.
        settings: the configuration now, as plain maps.
        schedule: the learning rates now.
        model: the fingerprint of `model.checkpoint` now.
    """
    before = start.progress.made_with
    if start.checkpoint is None:
        return Changes({}, ())
    flat = (flatten(before.settings), flatten(json.loads(json.dumps(dict(settings)))))
    old, new = ({key: value for key, value in each.items() if value != {}} for each in flat)  # keys below say it
    keys = [key for key in [*old, *(key for key in new if key not in old)] if key not in _PLACE]
    changed = {key: (old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)}
    return Changes(changed, tuple(_notes(start, settings, changed, schedule, model)))


def _notes(
    start: Start, settings: Mapping[str, Any], changed: Mapping[str, Any], schedule: RateSchedule, model: str
) -> list[str]:
    progress, notes = start.progress, []
    before = progress.made_with
    was, now = str(before.settings.get("output_dir", "")), str(settings["output_dir"])
    if not start.forked and Path(was).resolve() != Path(now).resolve():
        notes.append(f"the run was moved or copied: it began in {was} and goes on in {now}")
    if before.model != model:
        notes.append("model.checkpoint holds other files than before: a frozen teacher has other weights from now on")
    if "model.dtype" in changed:
        notes.append("the weights are rounded to, or come from, another precision: losses will differ")
    if progress.mixture and any(key.startswith("data.train.") for key in changed):
        taken = Phase(**progress.mixture).taken(progress.samples)
        shown = ", ".join(f"{name} {count}" for name, count in taken.items())
        notes.append(f"each set goes on after what was taken of it: {shown}")
    if "rollout.prompts_per_step" in changed:
        notes.append(f"the data goes on after sample {progress.samples}; none is left out or comes twice")
    kept = RateSchedule(**before.schedule)
    jumped = False
    for group in (None, *(name for name in schedule.factors if name in kept.factors)):
        rate, other = schedule.rate(progress.step, group), kept.rate(progress.step, group)
        if abs(rate - other) > 1e-6 * other:
            jumped = True
            notes.append(
                f"the learning rate of {f'group {group} in ' if group else ''}step {progress.step + 1} is {rate:.4g}, "
                f"not {other:.4g} as planned before; optimizer.keep_schedule=true keeps the rates of the checkpoint"
            )
    if not jumped and schedule == kept and settings["train"]["steps"] > kept.steps:
        notes.append(f"the learning rate stays at {kept.final:.4g} after step {kept.steps}")
    return notes


def record_changes(directory: Path, start: Start, changes: Changes) -> None:
    """Print the changes and append them to the run's file, on rank 0 alone; nothing if there are none."""
    lines = changes.lines()
    if not lines and not start.forked:
        return
    for line in lines:
        logger.info("changed after step %d: %s", start.progress.step, line)
    entry = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "step": start.progress.step,
        "checkpoint": str(start.checkpoint),
    }
    with (directory / FILE_NAME).open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry | {"changes": changes.settings, "notes": changes.notes}, ensure_ascii=False) + "\n")


def settings_fingerprint(settings: Mapping[str, Any]) -> str:
    """Return what stands for a configuration, as plain maps, without where the run lies and begins."""
    return fingerprint([json.dumps({key: value for key, value in settings.items() if key not in _PLACE})])


def schedule_of(start: Start, now: RateSchedule, *, keep: bool, own: Collection[str]) -> RateSchedule:
    """Return the learning rates that apply: those of the checkpoint where they are to be kept.

    A group that the checkpoint lacks gets the peak that the configuration gives it.

    Args:
        start: where the run goes on.
        now: the learning rates of the configuration.
        keep: whether the checkpoint's are to be kept.
        own: the groups to which the configuration gives a learning rate; others have that of the schedule.
    """
    before = start.progress.made_with.schedule
    if not keep or not before:
        return now
    kept = RateSchedule(**before)
    new = {name: factor * now.peak / kept.peak if name in own else 1.0 for name, factor in now.factors.items()}
    factors = {name: kept.factors.get(name, factor) for name, factor in new.items()}
    return replace(kept, factors=factors)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
