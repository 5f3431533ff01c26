"""MLflow: scalars as metrics, the configuration without secrets as parameters, through its client alone.

The client sends no code, user or git state, as its fluent interface would; its own usage statistics are turned off. A
server's user, password or token come from MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD or MLFLOW_TRACKING_TOKEN,
never from the configuration. An offline run writes a database in its directory, which `mlflow ui` shows.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_cord.config.flattening import flat_texts
from megatron_cord.errors import CordError
from megatron_cord.runtime.files import write_atomic
from megatron_cord.trainer.observability.trackers.config import MlflowConfig
from megatron_cord.trainer.observability.trackers.tracker import require, run_name, shortened

_PARAMETERS = 100  # of one request
_LONGEST = 6000  # characters of a parameter
#: Set before the client is imported, unless the user has: a server that is gone must not hold a step up for minutes.
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}


def check(config: MlflowConfig) -> None:
    """Refuse what cannot work. Raises CordError: the package is missing, or the address of an online run."""
    require("mlflow", "metrics.mlflow.mode")
    if config.mode == "offline":
        for package in ("sqlalchemy", "alembic"):  # the client does not depend on its database
            require(package, "metrics.mlflow.mode", "mlflow")
    if config.mode == "online" and not (config.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")):
        raise CordError(
            "metrics.mlflow.mode=online needs metrics.mlflow.tracking_uri or MLFLOW_TRACKING_URI; offline needs none"
        )


class Mlflow:
    """A run at MLflow, which goes on when the training run resumes."""

    def __init__(self, config: MlflowConfig, directory: Path, settings: Mapping[str, Any]) -> None:
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        import mlflow

        logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)  # each table that it makes is a line
        folder = directory.resolve() / "mlflow"
        folder.mkdir(parents=True, exist_ok=True)
        uri = config.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        self._client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}" if config.mode == "offline" else uri)
        identity = folder / f"{config.mode}_run_id"
        try:
            if identity.is_file():
                self._run = identity.read_text()
                self._client.update_run(self._run, status="RUNNING")
            else:
                self._run = self._begin(config, directory, folder, settings)
                write_atomic(identity, self._run)
        except mlflow.exceptions.MlflowException as error:
            raise CordError(
                f"MLflow: {shortened(error)}; set metrics.mlflow.mode=offline to go on without the server, or remove "
                f"{identity}, if it is there, to begin another run"
            ) from None

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """See `Tracker`."""
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [Metric(allowed_name(name), value, now, step) for name, value in scalars.items()]
        self._client.log_batch(self._run, metrics=metrics)

    def close(self, *, failed: bool) -> None:
        """See `Tracker`."""
        self._client.set_terminated(self._run, status="FAILED" if failed else "FINISHED")

    def _begin(self, config: MlflowConfig, directory: Path, folder: Path, settings: Mapping[str, Any]) -> str:
        """Create the run, with the settings as its parameters, and return its id."""
        from mlflow.entities import Param

        known = self._client.get_experiment_by_name(config.experiment)
        artifacts = (folder / "artifacts").as_uri() if config.mode == "offline" else None
        experiment = known.experiment_id if known else self._client.create_experiment(config.experiment, artifacts)
        run: str = self._client.create_run(experiment, run_name=run_name(config.name, directory)).info.run_id
        parameters = [Param(allowed_name(key), value[:_LONGEST]) for key, value in flat_texts(settings).items()]
        for start in range(0, len(parameters), _PARAMETERS):
            self._client.log_batch(run, params=parameters[start : start + _PARAMETERS])
        return run


def allowed_name(name: str) -> str:
    """Return a name with _ for each character that MLflow refuses in names, such as the + in that of a set."""
    return re.sub(r"[^/\w.\- :]", "_", name)
