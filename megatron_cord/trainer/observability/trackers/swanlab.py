"""SwanLab: scalars and the configuration without secrets, and nothing that it would collect by default.

That is no console output, no git state, no packages, no hardware and no usage of it. Its key comes from SWANLAB_API_KEY
or `swanlab login`, never from the configuration.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from megatron_cord.errors import CordError
from megatron_cord.trainer.observability.trackers.config import SwanlabConfig
from megatron_cord.trainer.observability.trackers.tracker import kept_id, require, run_name, shortened


def check(config: SwanlabConfig) -> None:
    """Refuse what cannot work. Raises CordError: the package is missing, or the key of an online run."""
    require("swanlab", "metrics.swanlab.mode")
    if config.mode == "online":
        import swanlab

        if not swanlab.Settings().api_key:
            raise CordError(
                "metrics.swanlab.mode=online needs a key: set SWANLAB_API_KEY or call `swanlab login` before the run; "
                "offline needs none"
            )


class Swanlab:
    """A run at SwanLab, which goes on when the training run resumes."""

    def __init__(self, config: SwanlabConfig, directory: Path, settings: Mapping[str, Any]) -> None:
        import swanlab

        kind = swanlab.Settings
        nothing = ("hardware", "runtime", "requirements", "conda", "git", "monitor", "swanlab")
        private = kind(
            interactive=False,
            probe=kind.Probe(**dict.fromkeys(nothing, False)),
            terminal=kind.Terminal(proxy_type="none"),
        )
        folder = directory / "swanlab"
        try:
            with redirect_stdout(io.StringIO()):
                self._run = swanlab.init(
                    mode=config.mode,
                    project=config.project,
                    workspace=config.workspace,
                    name=run_name(config.name, directory),
                    id=kept_id(folder / "run_id"),
                    resume="allow",
                    log_dir=str(folder),
                    config=dict(settings),
                    settings=private,
                )
        except Exception as error:  # the client's errors have no common type
            raise CordError(
                f"SwanLab: {shortened(error)}; set metrics.swanlab.mode=offline to go on without it"
            ) from None

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """See `Tracker`."""
        self._run.log(dict(scalars), step=step)

    def close(self, *, failed: bool) -> None:
        """See `Tracker`."""
        with redirect_stdout(io.StringIO()):
            if failed:
                self._run.finish(state="crashed", error="the training run ended with an error")
            else:
                self._run.finish()
