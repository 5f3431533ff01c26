"""The trackers that a configuration names: checked before a run computes anything, opened when it begins."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_cord.trainer.observability.trackers import mlflow, swanlab, trackio, wandb
from megatron_cord.trainer.observability.trackers.config import MetricsConfig
from megatron_cord.trainer.observability.trackers.tensorboard import TensorBoard
from megatron_cord.trainer.observability.trackers.tracker import PatientTracker, Tracker


def check_trackers(config: MetricsConfig) -> None:
    """Refuse trackers that cannot work here.

    Raises:
        CordError: a library is not installed, or an online run has no key, token or address.
    """
    if config.wandb.mode != "off":
        wandb.check(config.wandb)
    if config.mlflow.mode != "off":
        mlflow.check(config.mlflow)
    if config.trackio.mode != "off":
        trackio.check(config.trackio)
    if config.swanlab.mode != "off":
        swanlab.check(config.swanlab)


def open_trackers(
    config: MetricsConfig, directory: Path, first_step: int, settings: Mapping[str, Any]
) -> list[PatientTracker]:
    """Open the trackers that the configuration names.

    Args:
        config: of the trackers.
        directory: of the run.
        first_step: steps already made; records of later ones are dropped where that is possible.
        settings: the run's configuration as plain maps, without secrets.

    Raises:
        CordError: one of them is not installed, has no key, or cannot be reached.
    """
    check_trackers(config)
    named: dict[str, tuple[bool, Callable[[], Tracker]]] = {
        "TensorBoard": (config.tensorboard, lambda: TensorBoard(directory, first_step)),
        "Weights & Biases": (config.wandb.mode != "off", lambda: wandb.Wandb(config.wandb, directory, settings)),
        "MLflow": (config.mlflow.mode != "off", lambda: mlflow.Mlflow(config.mlflow, directory, settings)),
        "trackio": (config.trackio.mode != "off", lambda: trackio.Trackio(config.trackio, directory, settings)),
        "SwanLab": (config.swanlab.mode != "off", lambda: swanlab.Swanlab(config.swanlab, directory, settings)),
    }
    return [PatientTracker(name, build()) for name, (wanted, build) in named.items() if wanted]
