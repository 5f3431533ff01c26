"""What a checkpoint holds beside tensors, as JSON: progress, architecture, and responses generated ahead."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_cord.errors import CordError
from megatron_cord.model.architecture import Architecture
from megatron_cord.rollout.types import Rollout

_STATE = "state.json"
_AHEAD = "rollouts.jsonl"  # only there if something was generated ahead


@dataclass(frozen=True)
class Progress:
    """What a run needs beside tensors. Data order and sampling are drawn from (seed, step), so the step is their state.

    Attributes:
        step: optimizer steps made, which is also the position in the data and the version of the weights.
        seconds: spent in training so far.
        skipped_in_a_row: steps without an update just before.
        seed: of the run, with which it must be resumed.
        ahead: responses of later steps, by step and request (`Schedule.settle`), generated with weights that a resumed
            run no longer has.
    """

    step: int
    seconds: float
    skipped_in_a_row: int
    seed: int
    ahead: Mapping[int, Mapping[str, Rollout]] = field(default_factory=dict)


def write_progress(checkpoint: Path, progress: Progress, arch: Architecture) -> None:
    """Write a checkpoint's files."""
    if progress.ahead:
        lines = [
            json.dumps({"step": step, "request": key} | asdict(rollout)) + "\n"
            for step, rollouts in progress.ahead.items()
            for key, rollout in rollouts.items()
        ]
        (checkpoint / _AHEAD).write_text("".join(lines))
    state = asdict(replace(progress, ahead={})) | {"architecture": asdict(arch)}
    del state["ahead"]
    (checkpoint / _STATE).write_text(json.dumps(state, indent=1))


def read_progress(checkpoint: Path, arch: Architecture) -> Progress:
    """Read a checkpoint's files.

    Raises:
        CordError: it is missing or damaged, or the checkpoint is of another architecture.
    """
    try:
        state = json.loads((checkpoint / _STATE).read_text())
        architecture = state.pop("architecture")
        progress = Progress(**state, ahead=_read_ahead(checkpoint / _AHEAD))
    except (OSError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"{_STATE}: {error}"
        raise CordError(f"{checkpoint} is not a whole checkpoint ({reason}); choose another with resume=PATH") from None
    saved, wanted = _flat(architecture), _flat(json.loads(json.dumps(asdict(arch))))
    differing = sorted(key for key in saved.keys() | wanted.keys() if saved.get(key) != wanted.get(key))
    if differing:
        raise CordError(
            f"{checkpoint} holds another architecture (it differs in {', '.join(differing)}); resume with the run's "
            "own "
            "model.checkpoint"
        )
    return progress


def _read_ahead(path: Path) -> dict[int, dict[str, Rollout]]:
    ahead: dict[int, dict[str, Rollout]] = {}
    for line in path.read_text().splitlines() if path.is_file() else ():
        plain = json.loads(line)
        ahead.setdefault(plain["step"], {})[plain["request"]] = Rollout.from_json(plain)
    return ahead


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested maps into one with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
