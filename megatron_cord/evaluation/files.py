"""Where evaluations lie in a run's directory, and how they are written and read again.

    evaluations/LABEL/SET.json                  result of one set with all answers; LABEL: step_000050, or base
    evaluations/LABEL/SET.jsonl                 answers as they came (`evaluate`); a killed evaluation continues there
    evaluations/LABEL/SET.rejects.jsonl         questions of which no prompt could be made
    evaluations/LABEL/results.{json,md,html}    all sets of `evaluate` with their comparison

SET.json: {"set", "model": LABEL, "step", "seconds", fields of `results.set_result`, "answers": rows of
`scoring.score_set`}.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_cord.errors import CordError
from megatron_cord.evaluation.config import HELDOUT
from megatron_cord.runtime.files import write_atomic

FOLDER = "evaluations"


def step_label(step: int) -> str:
    """Return the name of the evaluation after a step."""
    return f"step_{step:06d}"


def heldout_file(run: Path, step: int) -> Path:
    """Return where the result on data.evaluation after a step stands in a run's directory."""
    return run / FOLDER / step_label(step) / f"{HELDOUT}.json"


def heldout_files(run: Path) -> dict[int, Path]:
    """Return the results on data.evaluation by step, ascending."""
    return set_files(run, HELDOUT)


def set_files(run: Path, name: str) -> dict[int, Path]:
    """Return the results on a set by step, ascending."""
    steps = {}
    for path in (run / FOLDER).glob(f"step_*/{name}.json"):
        number = path.parent.name.removeprefix("step_")
        if number.isascii() and number.isdigit():
            steps[int(number)] = path
    return dict(sorted(steps.items()))


def read_result(path: Path) -> dict[str, Any]:
    """Read one set's result.

    Raises:
        CordError: the file is missing or no JSON object.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CordError(f"{path} cannot be read ({error}); evaluate again") from None
    if not isinstance(result, dict):
        raise CordError(f"{path} holds no evaluation; remove it and evaluate again")
    return result


def past_evaluations(run: Path, last_step: int) -> list[dict[str, Any]]:
    """Return step, samples and accuracies on data.evaluation up to a step; an unreadable result is left out."""
    past = []
    for path in heldout_files(run).values():
        try:
            result = read_result(path)
            row = {name: result[name] for name in ("step", "samples", "text_accuracy", "audio_accuracy")}
            if row["step"] <= last_step:
                past.append(row)
        except (CordError, KeyError, TypeError):
            continue
    return past


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write JSON Lines, complete or not at all."""
    write_atomic(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
