"""Trackers that cannot work are refused at the start, in one line; those that are off need nothing."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_cord.errors import CordError
from megatron_cord.trainer.observability.trackers import tracker
from megatron_cord.trainer.observability.trackers.config import MetricsConfig, MlflowConfig
from megatron_cord.trainer.observability.trackers.opening import check_trackers, open_trackers
from tests.trainer.runs.test_train import alone

ROOT = Path(__file__).parents[4]
TRACKERS = ("wandb", "mlflow", "trackio", "swanlab")
NONE = MetricsConfig(tensorboard=False)


def chosen(kind: str, mode: str, **more: Any) -> MetricsConfig:
    return replace(NONE, **{kind: replace(getattr(NONE, kind), mode=mode, **more)})


@pytest.mark.parametrize("kind", TRACKERS)
def test_without_the_package(kind: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback where the extra is missing, one noticed after the model is built, and a half-begun run."""
    real = importlib.util.find_spec
    monkeypatch.setattr(tracker, "find_spec", lambda name: None if name == kind else real(name))
    with pytest.raises(CordError) as refused:
        alone(inputs, tmp_path / "run", f"metrics.{kind}.mode=offline")
    assert str(refused.value) == (
        f"metrics.{kind}.mode needs the package {kind}; pip install megatron_cord[{kind}], "
        f"or set metrics.{kind}.mode=off"
    )
    assert not (tmp_path / "run").exists()


def test_a_client_without_its_database(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback where MLflow's client is installed without the extra, or an extra that does not exist."""
    real = importlib.util.find_spec
    monkeypatch.setattr(tracker, "find_spec", lambda name: real("json") if name == "mlflow" else None)
    with pytest.raises(CordError, match=r"needs the package sqlalchemy; pip install megatron_cord\[mlflow\]"):
        check_trackers(chosen("mlflow", "offline"))


def test_a_folder_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a folder of a library's name, such as its logs in the working directory, that is taken for it."""
    (tmp_path / "no_tracker_is_called_so").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(CordError, match="needs the package no_tracker_is_called_so"):
        tracker.require("no_tracker_is_called_so", "metrics.x.mode")


def test_what_is_off_needs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a library that is needed, or imported, where the configuration does not name it."""
    monkeypatch.setattr(tracker, "find_spec", lambda name: None)
    for opened in open_trackers(MetricsConfig(), tmp_path, 0, {}):
        opened.close(failed=False)
    assert [path.name for path in tmp_path.iterdir()] == ["tensorboard"]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("wandb", "needs a key: set WANDB_API_KEY"),
        ("mlflow", "needs metrics.mlflow.tracking_uri or MLFLOW_TRACKING_URI"),
        ("trackio", "needs metrics.trackio.space=OWNER/NAME"),
        ("swanlab", "needs a key: set SWANLAB_API_KEY"),
    ],
)
def test_online_without_a_key(tmp_path: Path, kind: str, words: str) -> None:
    """Catches a run that waits for a key to be typed, and one that goes somewhere by default."""
    pytest.importorskip(kind, reason=f"the extra {kind} is not installed")
    code = (
        "from dataclasses import replace\n"
        "from megatron_cord.trainer.observability.trackers.config import MetricsConfig\n"
        "from megatron_cord.trainer.observability.trackers.opening import check_trackers\n"
        f"plain = MetricsConfig()\ncheck_trackers(replace(plain, {kind}=replace(plain.{kind}, mode='online')))"
    )
    keys = ("WANDB", "SWANLAB", "HF_", "MLFLOW", "TRACKIO")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(keys)}
    environment |= {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "WANDB_CONFIG_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True, text=True, timeout=240, env=environment, stdin=subprocess.DEVNULL, check=False,
        cwd=tmp_path,
    )  # fmt: skip
    assert f"CordError: metrics.{kind}.mode=online {words}" in done.stderr, done.stderr


def test_a_server_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback, or minutes of trying, where the address is wrong; and a password that would be written."""
    with pytest.raises(CordError, match="tracking_uri must hold no user or password"):
        MlflowConfig(tracking_uri="https://me:secret@tracker.invalid")
    pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    config = chosen("mlflow", "online", tracking_uri="http://127.0.0.1:9")
    check_trackers(config)
    with pytest.raises(CordError, match=r"^MLflow: .*; set metrics\.mlflow\.mode=offline") as refused:
        open_trackers(config, tmp_path, 0, {})
    assert "\n" not in str(refused.value)
