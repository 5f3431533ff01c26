"""trackio: scalars and the configuration without secrets, in a local database or a Space at Hugging Face.

Nothing else is collected: no usage of CPU or GPU. A Space's token comes from HF_TOKEN or `hf auth login`, never from
the configuration. trackio finds a run by its name alone, so the name ends with an id that the run's directory keeps.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from megatron_cord.errors import CordError
from megatron_cord.trainer.observability.trackers.config import TrackioConfig
from megatron_cord.trainer.observability.trackers.tracker import kept_id, require, run_name, shortened


def check(config: TrackioConfig) -> None:
    """Refuse what cannot work. Raises CordError: the package is missing, or the Space or the token of an online run."""
    require("trackio", "metrics.trackio.mode")
    if config.mode != "online":
        return
    from huggingface_hub import get_token

    if config.space is None or not re.fullmatch(r"[\w.-]+/[\w.-]+", config.space):
        raise CordError("metrics.trackio.mode=online needs metrics.trackio.space=OWNER/NAME; offline needs none")
    if get_token() is None:
        raise CordError(
            "metrics.trackio.mode=online needs a token: set HF_TOKEN or call `hf auth login` before the run; "
            "offline needs none"
        )


class Trackio:
    """A run in trackio, which goes on when the training run resumes."""

    def __init__(self, config: TrackioConfig, directory: Path, settings: Mapping[str, Any]) -> None:
        folder = directory.resolve() / "trackio"
        os.environ.setdefault("TRACKIO_DIR", str(folder))  # read when trackio is imported
        import trackio

        name = f"{run_name(config.name, directory)}-{kept_id(folder / 'run_id')}"
        online = config.mode == "online"
        try:
            with redirect_stdout(io.StringIO()), _reaching_out(allowed=online):
                self._run = trackio.init(
                    project=config.project,
                    name=name,
                    space_id=config.space if online else None,
                    private=True if online else None,
                    config=dict(settings),
                    resume="allow",
                    embed=False,
                    auto_log_gpu=False,
                    auto_log_cpu=False,
                )
        except Exception as error:  # of the hub's client, of trackio's, and ValueError
            raise CordError(
                f"trackio: {shortened(error)}; set metrics.trackio.mode=offline to go on without the Space"
            ) from None

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """See `Tracker`."""
        self._run.log(dict(scalars), step=step)

    def close(self, *, failed: bool) -> None:
        """See `Tracker`. trackio has no state of a run that failed."""
        import trackio

        with redirect_stdout(io.StringIO()):
            trackio.finish()  # the run alone would be finished once more, in words, when the process ends


@contextmanager
def _reaching_out(*, allowed: bool) -> Iterator[None]:
    """Keep an offline run from the hub: trackio would ask there for the user's name, or follow its own variables."""
    if allowed:
        yield
        return
    from huggingface_hub import constants

    kept = {name: os.environ.pop(name, None) for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")}
    offline, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline
        os.environ.update({name: value for name, value in kept.items() if value is not None})
