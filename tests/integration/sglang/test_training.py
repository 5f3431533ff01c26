"""Training from real servers, one of which is killed on the way."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from megatron_cord.rollout.rollout_file import dump_file, read_rollouts
from tests.integration.sglang.conftest import Servers
from tests.tiny_run import finish, make_samples, metrics, overrides, start, write_shards

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("ahead", [0, 1])
def test_training_goes_on_without_a_server(ahead: int, servers: Servers, tmp_path: Path) -> None:
    """Catches a run that stops with one of its servers, rollouts of other weights than allowed.

    Also trainer and servers that disagree, and ranks that generate each other's share or lose their own.
    """
    write_shards(tmp_path / "train", make_samples(10, seed=1))
    write_shards(tmp_path / "heldout", make_samples(4, seed=2))
    servers.wait_until_ready()
    output = tmp_path / "run"
    process = start(
        overrides(
            tmp_path,
            output,
            f"model.checkpoint={servers.checkpoint}",
            "rollout.engine=sglang",
            f"rollout.sglang.servers_file={servers.file}",
            "rollout.sglang.min_servers=2",
            "rollout.weight_sync.bucket_bytes=1048576",
            "rollout.weight_sync.timeout_seconds=120",
            f"rollout.schedule.ahead={ahead}",
            "rollout.max_logprob_mismatch=0.001",
            "record.rollouts=rollouts",
            "train.steps=6",
            "parallel.tp=2",
            "optimizer.learning_rate=1e-4",
        )
    )
    deadline = time.monotonic() + 300
    while len(metrics(output) if (output / "metrics.jsonl").exists() else []) < 2 and process.poll() is None:
        assert time.monotonic() < deadline, "no step is done"
        time.sleep(0.05)
    os.killpg(servers.supervisor.pids[0] or 0, signal.SIGKILL)
    status, errors = finish(process)
    assert status == 0, errors
    lines = metrics(output)
    assert [line["step"] for line in lines] == list(range(1, 7))
    assert all(line["engine_logprob_difference"] < 1e-3 for line in lines if "engine_logprob_difference" in line)
    assert lines[0]["engine_logprob_difference"] < 1e-3
    assert servers.supervisor.urls[0] in errors, "the loss of a server must be said"
    assert all(line["staleness_max"] <= ahead for line in lines)
    for step in range(1, 7):
        made = read_rollouts(dump_file(output / "rollouts", step), ("role", "token_ids", "engine_logprobs")).to_pylist()
        assert Counter(row["role"] for row in made) == {"distill": 4, "policy": 6}, "each response once"
        assert all(1 <= len(row["token_ids"]) == len(row["engine_logprobs"]) <= 6 for row in made)
