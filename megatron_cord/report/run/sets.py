"""The results on question sets of a run, `evaluations/LABEL/SET.json`: accuracies with their intervals, no answers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_cord.evaluation.files import FOLDER, read_result
from megatron_cord.evaluation.statistics import Estimate
from megatron_cord.report.run.fields import Fields


@dataclass(frozen=True)
class SetResult:
    """One set's result: accuracies are shares of ``samples`` questions; None where the set has no such prompts."""

    step: int
    samples: int
    text: Estimate | None
    audio: Estimate | None


def read_set_results(run: Path) -> dict[str, SetResult]:
    """Return the newest result on each set by the set's name. Raises CordError for a damaged file, with its name."""
    newest: dict[str, tuple[int, Path]] = {}
    for path in sorted((run / FOLDER).glob("step_*/*.json")):
        number = path.parent.name.removeprefix("step_")
        if path.stem != "results" and number.isascii() and number.isdigit():
            newest[path.stem] = max(newest.get(path.stem, (-1, path)), (int(number), path))
    return {name: _read(path) for name, (_, path) in sorted(newest.items())}


def _read(path: Path) -> SetResult:
    values = read_result(path)
    fields = Fields(values, str(path))
    estimates = fields.optional_object("estimates")
    text, audio = (_estimate(values.get(f"{m}_accuracy"), estimates.get(m), path) for m in ("text", "audio"))
    return SetResult(fields.integer("step"), fields.integer("samples"), text, audio)


def _estimate(accuracy: Any, found: Any, path: Path) -> Estimate | None:
    """Return an accuracy with its interval; files of earlier revisions have none."""
    if accuracy is None:
        return None
    fields = Fields({"accuracy": accuracy} | (found if isinstance(found, dict) else {}), str(path))
    return Estimate(
        fields.number("accuracy"),
        *(fields.optional_number(name) for name in ("error", "low", "high")),
    )
