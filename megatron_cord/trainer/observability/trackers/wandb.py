"""Weights & Biases: scalars and the configuration without secrets, and nothing that it would collect by default.

That is no console output, no code, no git state, no command line, no usage of hardware and no reports of its own errors
(`WANDB_ERROR_REPORTING`), which even an offline run would send. Its key comes from WANDB_API_KEY or `wandb login`,
never from the configuration.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from megatron_cord.errors import CordError
from megatron_cord.trainer.observability.trackers.config import WandbConfig
from megatron_cord.trainer.observability.trackers.tracker import kept_id, require, run_name, shortened


def check(config: WandbConfig) -> None:
    """Refuse what cannot work. Raises CordError: the package is missing, or the key of an online run."""
    require("wandb", "metrics.wandb.mode")
    if config.mode == "online" and not (os.environ.get("WANDB_API_KEY") or _import().api.api_key):
        raise CordError(
            "metrics.wandb.mode=online needs a key: set WANDB_API_KEY or call `wandb login` before the run; "
            "offline needs none"
        )


class Wandb:
    """A run at Weights & Biases, which goes on when the training run resumes.

    Steps are an axis of their own (`step`), so that a resumed run may repeat some.
    """

    def __init__(self, config: WandbConfig, directory: Path, settings: Mapping[str, Any]) -> None:
        wandb = _import()
        mode: Literal["offline", "online"] = "online" if config.mode == "online" else "offline"
        private = wandb.Settings(
            silent=True,
            console="off",
            disable_code=True,
            save_code=False,
            disable_git=True,
            disable_job_creation=True,
            x_disable_meta=True,
            x_disable_machine_info=True,
            x_disable_stats=True,
            x_save_requirements=False,
        )
        try:
            self._run = wandb.init(
                project=config.project,
                entity=config.entity,
                name=run_name(config.name, directory),
                mode=mode,
                id=kept_id(directory / "wandb" / "run_id"),
                resume="allow",
                dir=str(directory),
                config=dict(settings),
                settings=private,
            )
        except wandb.errors.Error as error:
            raise CordError(
                f"Weights & Biases: {shortened(error)}; set metrics.wandb.mode=offline to go on without it"
            ) from None
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """See `Tracker`."""
        self._run.log({"step": step, **scalars})

    def close(self, *, failed: bool) -> None:
        """See `Tracker`."""
        self._run.finish(exit_code=int(failed))


def _import() -> Any:
    """Import the client, whose error reports are off unless the user turns them on."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    return wandb
