"""How far a warm-up is: one file with its weights, its optimizer's moments and its results; whole or absent."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from megatron_cord.errors import CordError
from megatron_cord.runtime.files import write_atomic

FILE_NAME = "state.safetensors"
_KEY = "progress"


@dataclass
class Progress:
    """How far a warm-up is.

    Attributes:
        stage: that is next, or in progress.
        step: updates that it has made.
        token_errors: rates on what is held out, by "STAGE before" and "STAGE after".
        divergences: likewise of the distillation, nats a token.
        losses: of each stage, pairs of a step and its loss.
        seconds: that each stage has taken, over all starts.
    """

    stage: str = "ctc"
    step: int = 0
    token_errors: dict[str, float] = field(default_factory=dict)
    divergences: dict[str, float] = field(default_factory=dict)
    losses: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def write_state(directory: Path, progress: Progress, tensors: Mapping[str, Tensor]) -> None:
    """Write the state in the place of the last one.

    Raises:
        CordError: the disk is full or may not be written.
    """
    content = save(
        {name: each.cpu().contiguous() for name, each in tensors.items()}, {_KEY: json.dumps(asdict(progress))}
    )
    try:
        write_atomic(directory / FILE_NAME, content, sync=True)
    except OSError as error:
        raise CordError(
            f"{directory / FILE_NAME} could not be written ({error.strerror}); free some space and start again"
        ) from None


def read_state(directory: Path) -> tuple[Progress, dict[str, Tensor]]:
    """Return the state that was written last; a new one and no tensors if there is none.

    Raises:
        CordError: it is damaged.
    """
    path = directory / FILE_NAME
    if not path.is_file():
        return Progress(), {}
    try:
        with safe_open(path, framework="pt") as file:
            progress = Progress(**json.loads((file.metadata() or {})[_KEY]))
            return progress, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no mapping)
    except (OSError, SafetensorError, ValueError, LookupError, TypeError) as error:
        raise CordError(f"{path} is damaged ({error}); remove it to begin the warm-up again") from None
