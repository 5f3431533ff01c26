"""The runner where runs fail, are stopped or are still running, with a script in the trainer's place; once for real."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_cord.compare import running
from megatron_cord.compare.config import CompareConfig
from megatron_cord.compare.plan import PlannedRun, plan_runs
from megatron_cord.compare.running import Listener, Outcome, Runner
from megatron_cord.config.loading import dump_config
from megatron_cord.errors import CordError
from megatron_cord.evaluation.files import heldout_file
from megatron_cord.runtime.exit_status import USER_ERROR
from tests.tiny_run import ROOT, overrides, write_inputs

SETTINGS = ("model.checkpoint=x", "data.train=x", "data.evaluation=x")
#: Stands for Python: each method ends in a way of its own. It counts its starts.
SCRIPT = """#!/bin/bash
for word in "$@"; do case $word in output_dir=*) directory=${word#output_dir=};; esac; done
echo start >> "$directory/starts"
case $directory in
  */grpo/*) echo "error: the disk is full"; echo later; exit 2;;
  */sampled/*) echo "Segmentation fault"; exit 139;;
  */jsd/*) trap 'exit 75' TERM; while :; do sleep 0.1; done;;
esac
for i in 1 2 3; do echo "{}" >> "$directory/metrics.jsonl"; sleep 0.15; done
echo "{}" > "$directory/summary.json"
"""


@pytest.fixture
def comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[CompareConfig, list[PlannedRun]]]:
    """Make a comparison of these methods on one seed, whose trainer is SCRIPT."""
    script = tmp_path / "python"
    script.write_text(SCRIPT)
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(script))

    def make(*methods: str, **options: object) -> tuple[CompareConfig, list[PlannedRun]]:
        given: dict[str, Any] = {"seeds": (0,), "methods": methods, "reference": methods[0], "settings": SETTINGS}
        config = CompareConfig("/dev/null", str(tmp_path / "out"), **given | options)
        runs = plan_runs(config)
        for run in runs:
            dump_config(run.config, run.directory / "config.yaml")  # as the trainer does first
        return config, runs

    return make


class Diary(Listener):
    """A listener that keeps what it is called with."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.together = self._active = self.steps = 0

    def prepares(self, seed: int) -> None:
        self.lines.append(f"prepares {seed}")

    def started(self, run: PlannedRun) -> None:
        self.lines.append(f"started {run.name}")
        self._active += 1
        self.together = max(self.together, self._active)

    def stepped(self, run: PlannedRun, steps: int) -> None:
        self.steps = max(self.steps, steps)

    def ended(self, outcome: Outcome) -> None:
        self.lines.append(f"ended {outcome.run.name}")
        self._active -= not outcome.found


def ran(config: CompareConfig, runs: list[PlannedRun], listener: Listener | None = None) -> dict[str, Outcome]:
    with Runner(config, runs, listener or Diary()) as runner:
        return {outcome.run.method: outcome for outcome in runner.run()}


def starts(run: PlannedRun) -> int:
    path = run.directory / "starts"
    return len(path.read_text().splitlines()) if path.is_file() else 0


def test_the_others_go_on_when_one_fails(comparison: Callable[..., tuple[CompareConfig, list[PlannedRun]]]) -> None:
    """Catches a comparison that a failure ends, a reason other than the trainer's, and a complete run made again."""
    config, runs = comparison("sft", "grpo", "sampled", "cord")
    outcomes = ran(config, runs)
    assert [o.failure is None for o in outcomes.values()] == [True, False, False, True]
    assert str(outcomes["grpo"].failure).startswith("the disk is full (see ")
    assert str(outcomes["sampled"].failure).startswith("it ended with status 139: Segmentation fault")
    outcomes = ran(config, runs)
    assert [outcomes[name].found for name in ("sft", "grpo", "sampled", "cord")] == [True, False, False, True]
    assert [starts(run) for run in runs] == [1, 2, 2, 1]


def test_so_many_at_a_time(comparison: Callable[..., tuple[CompareConfig, list[PlannedRun]]]) -> None:
    """Catches jobs that are ignored or exceeded, and progress that is not the run's."""
    for jobs in (1, 2):
        config, runs = comparison("sft", "off_policy_kl", "cord", jobs=jobs)
        for run in runs:
            (run.directory / "summary.json").unlink(missing_ok=True)
        diary = Diary()
        ran(config, runs, diary)
        assert diary.together == jobs and diary.steps >= 3


def test_inputs_are_made_once_a_seed(
    comparison: Callable[..., tuple[CompareConfig, list[PlannedRun]]], tmp_path: Path
) -> None:
    """Catches a warm-up for each method, one for a seed whose runs are all there, and runs without their inputs."""
    prepare = (
        "/bin/sh",
        "-c",
        f"echo {{seed}} >> {tmp_path}/made; test {{seed}} != 1 || (echo 'error: no voice'; exit 2)",
    )
    config, runs = comparison("sft", "cord", seeds=(0, 1), prepare=prepare)
    with Runner(config, runs, Diary()) as runner:
        outcomes = runner.run()
    assert (tmp_path / "made").read_text().split() == ["0", "1"]
    assert [o.failure is None for o in outcomes] == [True, True, False, False]
    assert str(outcomes[2].failure).startswith("prepare: no voice (see ") and starts(runs[2]) == 0
    (tmp_path / "made").unlink()
    ran(config, runs[:2])
    assert not (tmp_path / "made").exists()


def test_a_stop_signal_is_passed_on(comparison: Callable[..., tuple[CompareConfig, list[PlannedRun]]]) -> None:
    """Catches an orphaned run, one taken for failed because it was stopped, and runs that start afterwards."""
    config, runs = comparison("jsd", "cord")

    def stop() -> None:
        while not starts(runs[0]):
            time.sleep(0.02)
        time.sleep(0.3)  # the script's trap
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    before = signal.getsignal(signal.SIGTERM)
    with Runner(config, runs, Diary()) as runner:
        thread.start()
        assert runner.run() == [] and runner.stopped
    thread.join()
    assert signal.getsignal(signal.SIGTERM) == before and starts(runs[1]) == 0


def test_a_running_run_is_not_started_twice(
    comparison: Callable[..., tuple[CompareConfig, list[PlannedRun]]],
) -> None:
    """Catches two trainings in one directory after a comparison was killed and its run was not."""
    config, runs = comparison("cord")
    with running._locked(runs[0].directory / "log.txt") as file:
        orphan = subprocess.Popen(["sleep", "60"], stdout=file)
    try:
        with pytest.raises(CordError, match="a process of an earlier comparison is still running here"):
            ran(config, runs)
    finally:
        orphan.kill()
        orphan.wait()
    assert starts(runs[0]) == 0 and ran(config, runs)["cord"].failure is None


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.mark.slow
def test_the_command_for_real(inputs: Path, tmp_path: Path) -> None:
    """Catches a tool that fails to start, trains another method, forgets a failed run, or makes complete ones again."""
    shared = [s for s in overrides(inputs, tmp_path) if not s.startswith("output_dir=")] + ["train.steps=2"]
    spec = {
        "train": "/dev/null", "output_dir": str(tmp_path / "out"), "title": "Tiny", "methods": ["sft", "cord"],
        "seeds": [0], "jobs": 2,
        "settings": shared, "adjust": {"sft": [f"data.train={tmp_path}/later"]},
    }  # fmt: skip
    (tmp_path / "compare.yaml").write_text(json.dumps(spec))

    def call() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "tools" / "compare.py"), "--config", str(tmp_path / "compare.yaml")]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, check=False, capture_output=True, text=True, env=environment, timeout=900)

    first = call()
    assert first.returncode == USER_ERROR, first.stderr
    shown = first.stdout + first.stderr
    assert "sft, seed 0: failed: " in shown and "later" in shown and "cord, seed 0: audio accuracy" in shown
    (tmp_path / "later").symlink_to(inputs / "train")
    second = call()
    assert second.returncode == 0, second.stdout + second.stderr
    shown = second.stdout + second.stderr
    assert "cord, seed 0: audio accuracy" in shown and "was there" in shown
    result = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert {name: list(method["runs"]) for name, method in result["methods"].items()} == {"sft": ["0"], "cord": ["0"]}
    assert result["methods"]["sft"]["difference"]["n"] == 1 and result["methods"]["sft"]["questions"] is not None
    assert (tmp_path / "out" / "comparison.md").read_text() in second.stdout
    assert all((tmp_path / "out" / f"comparison.{suffix}").stat().st_size > 1000 for suffix in ("svg", "png"))
    firsts = [json.loads(heldout_file(tmp_path / "out" / name / "seed-0", 0).read_text()) for name in ("cord", "sft")]
    assert firsts[0]["seconds"] > 0 == firsts[1]["seconds"] and firsts[0]["answers"] == firsts[1]["answers"]
    losses = {
        name: json.loads((tmp_path / "out" / name / "seed-0" / "metrics.jsonl").read_text().splitlines()[0])
        for name in ("sft", "cord")
    }
    assert (
        losses["sft"]["kl"] is None
        and losses["cord"]["kl"] > 0
        and "reward" in losses["cord"]
        and "reward" not in losses["sft"]
    )
