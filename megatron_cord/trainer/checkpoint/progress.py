"""What a checkpoint holds beside tensors, as JSON: progress, architecture, and responses generated ahead."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_cord.config.flattening import flatten
from megatron_cord.errors import CordError
from megatron_cord.model.architecture import Architecture
from megatron_cord.rollout.types import Rollout

STATE = "state.json"
_AHEAD = "rollouts.jsonl"  # only there if something was generated ahead


@dataclass(frozen=True)
class MadeWith:
    """How the run that wrote a checkpoint was set.

    Attributes:
        settings: its configuration as plain maps, without secrets.
        schedule: its learning rates, the fields of `RateSchedule`.
        data: samples and fingerprint of what it trains on.
        model: fingerprint of the files in `model.checkpoint`.
        base: fingerprint of its weights alone, which LoRA adapters are beside.
        trained: parts of the model whose weights are not those of `model.checkpoint` any more.
        begun: the step after which the run began in its directory; not 0 for one that continues another run.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    schedule: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    model: str = ""
    base: str = ""
    trained: Sequence[str] = ()
    begun: int = 0


@dataclass(frozen=True)
class Progress:
    """What a run needs beside tensors. Data order and sampling are drawn from (seed, step), so the step is their state.

    Attributes:
        step: optimizer steps made, which is also the version of the weights.
        seconds: spent in training so far.
        skipped_in_a_row: steps without an update just before.
        seed: of the run, with which it must be resumed.
        samples: taken from the data so far: the position in it.
        spent: seconds that the run's processes have taken in all, for `train.hours`.
        longest: of them the longest step, checkpoint and evaluation.
        mixture: of the data's sets, the fields of `Phase`; empty for a run that has taken no sample.
        damaged: samples of each set that turned out to be damaged, as ranges of numbers.
        controllers: of the streams' weights, the fields of `ControllerState` by stream.
        made_with: the settings of the run.
        ahead: responses of later steps, by step and request (`Schedule.settle`), generated with weights that a resumed
            run no longer has.
    """

    step: int
    seconds: float
    skipped_in_a_row: int
    seed: int
    samples: int = 0
    spent: float = 0.0
    longest: Mapping[str, float] = field(default_factory=dict)
    mixture: Mapping[str, Any] = field(default_factory=dict)
    damaged: Mapping[str, Sequence[Sequence[int]]] = field(default_factory=dict)
    controllers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    made_with: MadeWith = field(default_factory=MadeWith)
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
    (checkpoint / STATE).write_text(json.dumps(state, indent=1))


def read_progress(checkpoint: Path, arch: Architecture | None = None) -> Progress:
    """Read a checkpoint's files.

    Args:
        checkpoint: its directory.
        arch: the architecture that it must be of; None takes any.

    Raises:
        CordError: it is missing or damaged, or the checkpoint is of another architecture.
    """
    try:
        state = json.loads((checkpoint / STATE).read_text())
        architecture = state.pop("architecture")
        made_with = MadeWith(**state.pop("made_with", {}))
        progress = Progress(**state, made_with=made_with, ahead=_read_ahead(checkpoint / _AHEAD))
    except (OSError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"{STATE}: {error}"
        raise CordError(f"{checkpoint} is not a whole checkpoint ({reason}); choose another with resume=PATH") from None
    if arch is None:
        return progress
    saved, wanted = flatten(architecture), flatten(json.loads(json.dumps(asdict(arch))))
    # What an older version did not know of an architecture, it did not have: such fields are off by default.
    differing = sorted(
        key for key in saved.keys() | wanted.keys() if (saved.get(key) or None) != (wanted.get(key) or None)
    )
    if differing:
        raise CordError(
            f"{checkpoint} holds another architecture (it differs in {', '.join(differing)}); use the "
            "model.checkpoint that it was trained from"
        )
    return progress


def _read_ahead(path: Path) -> dict[int, dict[str, Rollout]]:
    ahead: dict[int, dict[str, Rollout]] = {}
    for line in path.read_text().splitlines() if path.is_file() else ():
        plain = json.loads(line)
        ahead.setdefault(plain["step"], {})[plain["request"]] = Rollout.from_json(plain)
    return ahead
