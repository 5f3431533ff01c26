"""Weights & Biases: the real client, offline, gets numbers and settings, and not the key or what it collects itself."""

from __future__ import annotations

import builtins
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_cord.errors import CordError
from megatron_cord.trainer.observability.trackers import MetricsConfig, WandbConfig, open_trackers

ROOT = Path(__file__).parents[3]
KEY = "0123456789abcdef0123456789abcdef01234567"
#: A run with the client, in a process of its own: the client starts a service, and reads its environment once.
LOG = """
import sys
from pathlib import Path
from megatron_cord.trainer.observability.metrics import MetricsLog
from megatron_cord.trainer.observability.trackers import MetricsConfig, WandbConfig
directory, first, last = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
config = MetricsConfig(tensorboard=False, wandb=WandbConfig(mode="offline", project="cord"))
with MetricsLog(directory, 10, first, config, settings={"seed": 7, "token": "***"}, enabled=True) as log:
    for step in range(first + 1, last + 1):
        log.step(step, {"loss": 1.0 / step, "kl": 0.5, "skipped": False})
    print("something on the console", file=sys.stderr)
"""


def records(file: Path) -> Iterator[bytes]:
    """Yield the records of an offline run: LevelDB's log after a header of seven bytes, in blocks of 32 KiB."""
    data, position, whole = file.read_bytes(), 7, b""
    while position < len(data):
        if (rest := -position % 32768) < 7 and rest:
            position += rest
            continue
        length, kind = struct.unpack("<4xHB", data[position : position + 7])
        whole += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            yield whole
            whole = b""


def test_offline(tmp_path: Path) -> None:
    """Catches lost metrics, a resumed run that becomes another, and the key or the command line in any file."""
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    from wandb.proto import wandb_internal_pb2

    (tmp_path / "run").mkdir()
    environment = os.environ | {
        "WANDB_API_KEY": KEY,
        "PYTHONPATH": str(ROOT),
        "HOME": str(tmp_path / "home"),
        "SECRET_IN_ENVIRONMENT": "do-not-tell",
    }
    for first, last in ((0, 2), (2, 3)):
        command = [sys.executable, "-W", "ignore", "-c", LOG, str(tmp_path / "run"), str(first), str(last)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        assert "wandb" not in done.stdout + done.stderr, "the client writes to the terminal"
    scalars: list[dict[str, Any]] = []
    names: set[tuple[str, str, str]] = set()
    settings: dict[str, str] = {}
    for file in sorted((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")):
        for data in records(file):
            record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
            record.ParseFromString(data)
            if record.HasField("history"):
                row = {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
                }
                scalars.append({name: value for name, value in row.items() if not name.startswith("_")})
            elif record.HasField("run"):
                names.add((record.run.run_id, record.run.display_name, record.run.project))
                settings |= {item.key: item.value_json for item in record.run.config.update}
    assert [(row["step"], row["loss"]) for row in scalars] == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]
    assert len(names) == 1 and {name[1:] for name in names} == {("run", "cord")}
    assert json.loads(settings["seed"]) == 7
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    for path in written:
        content = path.read_bytes()
        for secret in (KEY, "do-not-tell", "something on the console"):
            assert secret.encode() not in content, f"{path} holds a secret"


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback where the extra is missing, and an import where the configuration does not name it."""
    real = builtins.__import__

    def refuse(name: str, *arguments: Any, **options: Any) -> Any:
        if name.split(".")[0] == "wandb":
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(builtins, "__import__", refuse)
    for tracker in open_trackers(MetricsConfig(), tmp_path, 0, {}):
        tracker.close()
    with pytest.raises(CordError, match=r"needs the package wandb; pip install megatron_cord\[wandb\]"):
        open_trackers(MetricsConfig(tensorboard=False, wandb=WandbConfig(mode="offline")), tmp_path, 0, {})


def test_online_without_a_key(tmp_path: Path) -> None:
    """Catches a run that waits for a key to be typed."""
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    code = (
        "import sys; from pathlib import Path; from megatron_cord.trainer.observability.trackers import *\n"
        "open_trackers(MetricsConfig(False, WandbConfig('online')), Path(sys.argv[1]), 0, {})"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    environment |= {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "WANDB_CONFIG_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "run")],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert "CordError: metrics.wandb.mode=online needs a key: set WANDB_API_KEY" in done.stderr
