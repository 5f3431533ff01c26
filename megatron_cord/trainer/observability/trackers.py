"""Trackers, which take scalars beside `metrics.jsonl`: TensorBoard's event files, and Weights & Biases if configured.

Weights & Biases (extra `wandb`) is imported only when it is used. It gets the scalars and the configuration without
secrets, and nothing that it would collect by default: no console output, no code, no git state, no command line. Its
key comes from WANDB_API_KEY or `wandb login`, never from the configuration.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from megatron_cord.errors import CordError
from megatron_cord.runtime.files import write_atomic


@dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases; the key comes from WANDB_API_KEY or `wandb login`."""

    mode: Literal["off", "offline", "online"] = "off"  #: offline writes output_dir/wandb, for `wandb sync`
    project: str = "megatron_cord"  #: the project there
    entity: str | None = None  #: user or team; null is the key's own
    name: str | None = None  #: of the run; null takes the name of output_dir


@dataclass(frozen=True)
class MetricsConfig:
    """Where metrics go beside metrics.jsonl and the terminal."""

    tensorboard: bool = True  #: event files in output_dir/tensorboard
    wandb: WandbConfig = field(default_factory=WandbConfig)


class Tracker(Protocol):
    """A destination of scalars."""

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Record finite values after a step, numbered from 1 (0: before the first)."""
        ...

    def close(self) -> None:
        """Write what is pending."""
        ...


def open_trackers(
    config: MetricsConfig, directory: Path, first_step: int, settings: Mapping[str, Any]
) -> list[Tracker]:
    """Open the trackers that the configuration names.

    Args:
        config: of the trackers.
        directory: of the run.
        first_step: steps already made; records of later ones are dropped where that is possible.
        settings: the run's configuration as plain maps, without secrets.

    Raises:
        CordError: Weights & Biases is not installed, has no key, or cannot be reached.
    """
    trackers: list[Tracker] = [TensorBoard(directory, first_step)] if config.tensorboard else []
    if config.wandb.mode != "off":
        trackers.append(Wandb(config.wandb, directory, settings))
    return trackers


class TensorBoard:
    """Event files in the run's directory."""

    def __init__(self, directory: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory / "tensorboard"), purge_step=first_step + 1)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """See `Tracker`."""
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """See `Tracker`."""
        self._writer.close()


class Wandb:
    """A run at Weights & Biases, which goes on when the training run resumes.

    Steps are an axis of their own (`step`), so that a resumed run may repeat some.
    """

    def __init__(self, config: WandbConfig, directory: Path, settings: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise CordError(
                "metrics.wandb.mode needs the package wandb; pip install megatron_cord[wandb], "
                "or set metrics.wandb.mode=off"
            ) from None
        if config.mode == "online" and not _has_key(wandb):
            raise CordError(
                "metrics.wandb.mode=online needs a key: set WANDB_API_KEY or call `wandb login` before the run; "
                "offline needs none"
            )
        mode: Literal["offline", "online"] = "online" if config.mode == "online" else "offline"
        identity = directory / "wandb" / "run_id"
        if not identity.is_file():
            write_atomic(identity, secrets.token_hex(4))
        private = wandb.Settings(
            silent=True,
            console="off",
            disable_code=True,
            save_code=False,
            disable_git=True,
            disable_job_creation=True,
            x_disable_meta=True,
            x_save_requirements=False,
        )
        try:
            self._run = wandb.init(
                project=config.project,
                entity=config.entity,
                name=config.name or directory.resolve().name,
                mode=mode,
                id=identity.read_text(),
                resume="allow",
                dir=str(directory),
                config=dict(settings),
                settings=private,
            )
        except wandb.errors.Error as error:
            raise CordError(
                f"Weights & Biases: {' '.join(str(error).split())[:200]}; "
                "set metrics.wandb.mode=offline to go on without it"
            ) from None
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """See `Tracker`."""
        self._run.log({"step": step, **scalars})

    def close(self) -> None:
        """See `Tracker`."""
        self._run.finish()


def _has_key(wandb: Any) -> bool:
    """Return whether a login needs no prompt on the terminal, which may have no user."""
    return bool(os.environ.get("WANDB_API_KEY") or wandb.api.api_key)
