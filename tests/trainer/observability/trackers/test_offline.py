"""Each tracker by its real library, offline: it gets numbers and settings, no secret, and asks no other machine.

A run logs in a process of its own, twice, as libraries start threads and services and read their environment once.
"""

from __future__ import annotations

import json
import os
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[4]
KEY = "0123456789abcdef0123456789abcdef01234567"
#: A run that logs to one tracker, and names each machine that anything in its process asks for.
LOG = """
import dataclasses, socket, sys
from pathlib import Path

def guard(real):
    def guarded(address, *arguments, **options):
        host = address[0] if isinstance(address, tuple) else address
        if host not in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "", None) and not str(host).startswith("/"):
            print("ASKED", host, file=sys.stderr)
            raise OSError("no network")
        return real(address, *arguments, **options)
    return guarded

socket.getaddrinfo = guard(socket.getaddrinfo)

from megatron_cord.trainer.observability.metrics import MetricsLog
from megatron_cord.trainer.observability.trackers.config import MetricsConfig
kind, directory, first, last = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
plain = MetricsConfig(tensorboard=False)
chosen = dataclasses.replace(getattr(plain, kind), mode="offline")
config = dataclasses.replace(plain, **{kind: chosen})
settings = {"seed": 7, "token": "***", "model": {"path": "m", "freeze": ["a", "b"], "empty": {}, "none": None}}
with MetricsLog(directory, 10, first, config, settings=settings, enabled=True) as log:
    for step in range(first + 1, last + 1):
        log.step(step, {"loss": 1.0 / step, "seconds": 0.5, "kl": float("nan"), "skipped": False})
    if first:
        log.evaluation({"step": last, "samples": 4, "text_accuracy": 1.0, "audio_accuracy": 0.5})
    print("something on the console", file=sys.stderr)
"""


class Found(NamedTuple):
    """What a tracker has: (step, tag, value), its runs' ids, and the seed among their settings, as text."""

    scalars: list[tuple[int, str, float]]
    runs: set[str]
    seeds: set[str]


def wandb_records(file: Path) -> Iterator[bytes]:
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


def read_wandb(run: Path) -> Found:
    from wandb.proto import wandb_internal_pb2

    scalars, runs, seeds = [], set(), set()
    for file in sorted((run / "wandb").glob("offline-run-*/run-*.wandb")):
        for data in wandb_records(file):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.HasField("history"):
                items = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
                step = items.pop("step")
                scalars += [(step, name, value) for name, value in items.items() if not name.startswith("_")]
            elif record.HasField("run"):
                runs.add(record.run.run_id)
                assert (record.run.display_name, record.run.project) == ("run", "megatron_cord")
                seeds |= {item.value_json for item in record.run.config.update if item.key == "seed"}
    return Found(scalars, runs, seeds)


def read_mlflow(run: Path) -> Found:
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{run / 'mlflow' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("megatron_cord")
    found = client.search_runs([experiment.experiment_id])
    assert [(r.info.run_name, r.info.status, r.info.user_id) for r in found] == [("run", "FINISHED", "unknown")]
    scalars = [
        (point.step, tag, point.value)
        for r in found
        for tag in r.data.metrics
        for point in client.get_metric_history(r.info.run_id, tag)
    ]
    assert found[0].data.params["model.freeze"] == '["a", "b"]'
    return Found(scalars, {r.info.run_id for r in found}, {r.data.params["seed"] for r in found})


def read_trackio(run: Path) -> Found:
    with sqlite3.connect(run / "trackio" / "megatron_cord.db") as database:
        rows = database.execute("select run_id, run_name, step, metrics from metrics order by step").fetchall()
        settings = [json.loads(row[0]) for row in database.execute("select config from configs")]
    assert all(name == f"run-{(run / 'trackio' / 'run_id').read_text()}" for _, name, _, _ in rows)
    scalars = [(step, tag, value) for _, _, step, data in rows for tag, value in json.loads(data).items()]
    return Found(scalars, {row[0] for row in rows}, {json.dumps(values["seed"]) for values in settings})


def read_swanlab(run: Path) -> Found:
    import yaml
    from swanlab.proto.swanlab.record.v1 import record_pb2
    from swanlab.sdk.internal.core_python.store import DataStoreReader

    scalars, runs, seeds = [], set(), set()
    for file in sorted((run / "swanlab").glob("run-*/run-*.swanlab")):
        reader = DataStoreReader()
        reader.open(file)
        for data in reader:
            record = record_pb2.Record()
            record.ParseFromString(data)
            if record.HasField("scalar"):
                scalars.append((record.scalar.step, record.scalar.key, record.scalar.value.number))
            elif record.HasField("start"):
                runs.add(record.start.id)
                assert (record.start.name, record.start.project) == ("run", "megatron_cord")
        reader.close()
        seeds.add(json.dumps(yaml.safe_load((file.parent / "files/config.yaml").read_text())["seed"]["value"]))
    return Found(scalars, runs, seeds)


@pytest.mark.parametrize(
    ("package", "read"),
    [("wandb", read_wandb), ("mlflow", read_mlflow), ("trackio", read_trackio), ("swanlab", read_swanlab)],
)
def test_offline(tmp_path: Path, package: str, read: Callable[[Path], Found]) -> None:
    """Catches lost metrics, a resumed run that becomes another, a secret or the command line in a file, and a request.

    Also a client that writes to the terminal, and settings that are not there.
    """
    pytest.importorskip(package, reason=f"the extra {package} is not installed")
    run = tmp_path / "run"
    run.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW", "TRACKIO"))}
    environment |= {
        "WANDB_API_KEY": KEY,
        "SWANLAB_API_KEY": KEY,
        "HF_TOKEN": KEY,
        "MLFLOW_TRACKING_TOKEN": KEY,
        "MLFLOW_TRACKING_URI": "https://tracker.invalid",
        "TRACKIO_SPACE_ID": "someone/space",
        "PYTHONPATH": str(ROOT),
        "HOME": str(tmp_path / "home"),
        "SECRET_IN_ENVIRONMENT": "do-not-tell",
    }
    for first, last in ((0, 2), (2, 3)):
        command = [sys.executable, "-W", "ignore", "-c", LOG, package, str(run), str(first), str(last)]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=240, env=environment, check=False, cwd=tmp_path
        )
        said = done.stdout + done.stderr
        assert done.returncode == 0, said
        assert "ASKED" not in said, said
        assert package not in said.lower() and "fails (" not in said, f"the client writes to the terminal: {said}"
    found = read(run)
    assert [s[::2] for s in found.scalars if s[1] == "loss/loss"] == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]
    assert [step for step, tag, _ in found.scalars if tag == "time/seconds"] == [1, 2, 3]
    assert (3, "evaluation/audio_accuracy", 0.5) in found.scalars
    assert {tag for _, tag, _ in found.scalars} == {
        "loss/loss", "time/seconds", "run/alerts", "evaluation/text_accuracy", "evaluation/audio_accuracy",
    }  # fmt: skip
    assert len(found.runs) == 1 and found.seeds == {"7"}
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "home") == ["run"]
    for path in run.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        for secret in (KEY, "do-not-tell", "something on the console"):
            assert secret.encode() not in content, f"{path} holds a secret"
