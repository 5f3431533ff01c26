"""Faults of running jobs, on real ranks: each run is disturbed, continued, and ends like an undisturbed one."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch

from megatron_cord.runtime import exit_status
from tests.tiny_run import finish, free_port, losses, overrides, small_file_system, start, write_inputs
from tests.trainer.fault_ranks import Ranks, run_forked
from tests.trainer.runs.test_train import saved

STEPS = 8
TP2 = "parallel.tp=2"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def settings(inputs: Path, output: Path, *more: str) -> list[str]:
    return overrides(inputs, output, TP2, f"train.steps={STEPS}", "evaluation.samples=1", "evaluation.scored=1", *more)


@pytest.fixture(scope="module")
def undisturbed(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the run that all others must end like."""
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    status, errors = run_forked(settings(inputs, output), output.with_name("log"))
    assert status == 0, errors
    return output


def wait_for(process: subprocess.Popen[str], happened: Callable[[], bool]) -> None:
    """Wait until something has happened; fail if the process ends before."""
    deadline = time.monotonic() + 300
    while not happened():
        assert process.poll() is None and time.monotonic() < deadline, "the run ended before it could be disturbed"
        time.sleep(0.01)


def steps_made(output: Path) -> int:
    path = output / "metrics.jsonl"
    return path.read_text().count("\n") if path.is_file() else 0


def ranks(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Return the ranks' processes under a launcher."""
    return [child for child in psutil.Process(process.pid).children() if "megatron_cord.train" in child.cmdline()]


def stopped_run_goes_on(inputs: Path, undisturbed: Path, output: Path, errors: str) -> None:
    """Assert that a run of which `errors` were printed saved its last step, and continue it to the same end."""
    (saved,) = (path.name for path in (output / "checkpoints").iterdir())
    step = int(saved.removeprefix("step_"))
    assert (
        step == steps_made(output) < STEPS
        and f"asked to stop after step {step}; the same command continues after step {step}" in errors
    )
    assert "Traceback" not in errors and "FAILED" not in errors
    status, errors = run_forked(settings(inputs, output), output.with_name("again.log"))
    assert status == 0 and f"resuming after step {step}" in errors
    assert losses(output) == losses(undisturbed)


@pytest.mark.slow
def test_a_request_to_stop_the_launcher(inputs: Path, undisturbed: Path, tmp_path: Path) -> None:
    """Catches a signal that kills, that one rank alone follows, a stop without a checkpoint.

    Also a restart of what shall end, and another status.
    """
    output = tmp_path / "run"
    process = start(settings(inputs, output, "checkpoint.interval=0"), launcher=["--max-restarts", "2"])
    wait_for(process, lambda: steps_made(output) >= 2)
    os.kill(process.pid, signal.SIGTERM)
    status, errors = finish(process)
    assert status == exit_status.STOPPED, errors
    stopped_run_goes_on(inputs, undisturbed, output, errors)


@pytest.mark.slow
def test_ctrl_c_saves(inputs: Path, undisturbed: Path, tmp_path: Path) -> None:
    """Catches Ctrl-C that loses steps, or that kills the ranks before they have saved."""
    output = tmp_path / "run"
    process = start(settings(inputs, output, "checkpoint.interval=0"), launcher=["--max-restarts", "2"])
    wait_for(process, lambda: steps_made(output) >= 2)
    os.kill(process.pid, signal.SIGINT)
    status, errors = finish(process)
    assert status == exit_status.STOPPED and "Ctrl-C: the ranks finish what they do and save" in errors, errors
    stopped_run_goes_on(inputs, undisturbed, output, errors)


@pytest.mark.slow
def test_a_second_ctrl_c_leaves_at_once(inputs: Path, undisturbed: Path, tmp_path: Path) -> None:
    """Catches a second Ctrl-C that waits for ranks that hang, ranks that outlive the launcher, and damage by it."""
    output = tmp_path / "left"
    process = start(settings(inputs, output, "checkpoint.interval=1"), launcher=["--max-restarts", "2"])
    wait_for(process, lambda: steps_made(output) >= 2)
    ended = ranks(process)
    for rank in ended:
        rank.suspend()  # as one that waits for a collective or a disk
    for _ in range(2):
        os.kill(process.pid, signal.SIGINT)
        time.sleep(0.3)
    status, errors = finish(process)
    assert status == exit_status.INTERRUPTED and "Traceback" not in errors, errors
    assert not psutil.wait_procs(ended, timeout=10)[1]
    status, errors = run_forked(settings(inputs, output), output.with_name("after.log"))
    assert status == 0 and losses(output) == losses(undisturbed), errors


def test_a_request_to_stop_one_rank(inputs: Path, undisturbed: Path, tmp_path: Path) -> None:
    """Catches a signal to one rank that the others do not follow, as SLURM sends it."""
    output = tmp_path / "run"
    ranks = Ranks(settings(inputs, output, "checkpoint.interval=0"), tmp_path / "log")
    assert ranks.wait_for(lambda: steps_made(output) >= 2, 300)
    os.kill(ranks.processes[1].pid or 0, signal.SIGUSR1)
    assert ranks.statuses(120) == [exit_status.STOPPED, exit_status.STOPPED]
    stopped_run_goes_on(inputs, undisturbed, output, ranks.log.read_text())


@pytest.mark.slow
def test_the_launcher_starts_a_killed_rank_again(inputs: Path, undisturbed: Path, tmp_path: Path) -> None:
    """Catches a run that ends with its rank, restarts that begin anew.

    Also a survivor that waits for ever or ends in a traceback.
    """
    output = tmp_path / "run"
    process = start(settings(inputs, output, "checkpoint.interval=1"), launcher=["--max-restarts", "1"])
    wait_for(process, lambda: (output / "checkpoints" / "step_000002").exists())
    ranks(process)[1].kill()
    status, errors = finish(process)
    assert status == 0, errors
    assert "resuming after step" in errors and "Traceback" not in errors
    assert losses(output) == losses(undisturbed)


def wait_for_a_moment(ranks: Ranks, checkpoints: Path, draw: random.Random, seconds: float) -> None:
    """Half of the times any moment, else one just after the writing of one of the next checkpoints has begun."""
    if draw.random() < 0.5:
        ranks.wait_for(lambda: False, draw.uniform(0.1, seconds))
        return
    before = set(checkpoints.glob("step_*"))
    passed = draw.randrange(3)
    ranks.wait_for(lambda: len(set(checkpoints.glob("step_*")) - before) >= passed, seconds)
    ranks.wait_for(lambda: list(checkpoints.glob(".step_*partial*")), seconds)
    time.sleep(draw.uniform(0, 0.05))


def kill_at_random(inputs: Path, undisturbed: Path, directory: Path, kills: int, seed: int) -> None:
    """Kill a rank at random moments, half of them while a checkpoint is written; each run ends like `undisturbed`."""
    draw = random.Random(seed)
    wanted = saved(undisturbed, STEPS)
    seconds, made, while_saving, early = 10.0, 0, 0, 0
    for number in itertools.count():
        output = directory / f"run{number}"
        checkpoints = output / "checkpoints"
        for attempt in itertools.count():
            ranks = Ranks(settings(inputs, output, "checkpoint.interval=1"), directory / f"run{number}-{attempt}.log")
            met = True
            if made < kills:
                wait_for_a_moment(ranks, checkpoints, draw, seconds)
                saving = bool(list(checkpoints.glob(".step_*partial*")))
                met = ranks.met
                if ranks.kill(draw.randrange(2)):
                    made += 1
                    while_saving += saving
                    if not met:
                        early += 1
                        ranks.end_as_launcher()
            statuses = ranks.statuses(120)
            # A rank may be killed before it, or any other, has opened its log.
            log = ranks.log.read_text() if ranks.log.exists() else ""
            assert None not in statuses and "Traceback" not in log, (statuses, log)
            if statuses == [0, 0]:
                seconds = min(seconds, time.monotonic() - ranks.begun)
                break
            assert set(statuses) <= {0, exit_status.PEER_GONE, -signal.SIGKILL, *([] if met else [-signal.SIGTERM])}, (
                statuses,
                log,
            )
        assert losses(output) == losses(undisturbed)
        final = saved(output, STEPS)
        assert final.keys() == wanted.keys() and all(torch.equal(final[name], wanted[name]) for name in wanted)
        assert not list(checkpoints.glob(".step_*"))
        shutil.rmtree(output)
        if made >= kills:
            break
    assert while_saving or kills < 5
    print(
        f"{made} kills, {while_saving} of them while a checkpoint was written, {early} before the ranks had met, "
        f"{number + 1} runs"
    )


@pytest.mark.slow
def test_ranks_killed_at_random(inputs: Path, undisturbed: Path, tmp_path: Path) -> None:
    """Catches whatever a kill can leave behind that a resumed run trips over or silently differs by.

    Also weights and optimizer included.
    """
    kill_at_random(inputs, undisturbed, tmp_path, kills=3, seed=0)


@pytest.mark.slow
def test_ranks_killed_at_random_twenty_times(inputs: Path, undisturbed: Path, tmp_path: Path) -> None:
    """The same, often enough to hit rare moments."""
    kill_at_random(inputs, undisturbed, tmp_path, kills=20, seed=1)


@pytest.mark.slow
def test_a_rank_that_hangs(inputs: Path, tmp_path: Path) -> None:
    """Catches ranks that wait for ever, a dump that does not name where the stuck one is.

    Also a line that does not name it.
    """
    ranks = Ranks(
        settings(inputs, tmp_path / "run", "train.watchdog_seconds=8", "parallel.timeout_minutes=2"),
        tmp_path / "log",
        stuck=1,
    )
    assert ranks.statuses(300) == [exit_status.HUNG, exit_status.HUNG]
    log = ranks.log.read_text()
    assert "error: rank 1 made no progress for" in log and "in step 1, phase rollout: it is in _never_answer" in log
    assert "error: rank 0 made no progress for" in log and "Traceback" not in log
    stacks = (tmp_path / "run" / "stacks" / "rank00001.txt").read_text()
    assert "in _never_answer" in stacks and "watchdog" in stacks
    assert "_never_answer" not in (tmp_path / "run" / "stacks" / "rank00000.txt").read_text()


@pytest.mark.slow
def test_a_rank_that_hangs_in_a_library(inputs: Path, tmp_path: Path) -> None:
    """Catches a rank that hangs for ever because its own watchdog cannot run either."""
    asked = settings(inputs, tmp_path / "run", "train.watchdog_seconds=8", "parallel.timeout_minutes=2")
    ranks = Ranks(asked, tmp_path / "log", stuck=1, where="library")
    assert ranks.statuses(300) == [exit_status.HUNG, 1]
    assert "_never_let_go" in (tmp_path / "run" / "stacks" / "rank00001.txt").read_text()


@pytest.mark.slow
def test_a_rank_that_never_comes(inputs: Path, tmp_path: Path) -> None:
    """Catches ranks that wait for ever at the start.

    Also end in a traceback that says nothing of a rank that is missing.
    """
    asked = settings(inputs, tmp_path / "run", "train.watchdog_seconds=5", "parallel.timeout_minutes=0.1")
    ranks = Ranks(asked, tmp_path / "log", stuck=1, where="start")
    ranks.processes[0].join(300)
    ranks.processes[1].kill()
    assert ranks.statuses(60) == [exit_status.PEER_GONE, -signal.SIGKILL]
    log = ranks.log.read_text()
    assert log.startswith("error: another rank is gone (timed out after") and log.count("\n") == 1


@pytest.mark.slow
def test_a_node_that_is_lost(inputs: Path, undisturbed: Path, tmp_path: Path) -> None:
    """Catches ranks that wait for a node that is gone, launcher and all.

    Also a run that cannot go on when the node is back.
    """
    output = tmp_path / "run"

    port = str(free_port())
    nodes = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", port]
    first, second = (
        start(settings(inputs, output, "checkpoint.interval=1"), launcher=[*nodes, "--node-rank", str(n)])
        for n in range(2)
    )
    wait_for(first, lambda: (output / "checkpoints" / "step_000002").exists())
    for process in [*psutil.Process(second.pid).children(recursive=True), psutil.Process(second.pid)]:
        process.kill()
    status, errors = finish(first)
    assert status == exit_status.PEER_GONE and "another rank is gone" in errors and "Traceback" not in errors
    status, errors = run_forked(settings(inputs, output, "checkpoint.interval=1"), tmp_path / "again.log")
    assert status == 0 and "resuming after step" in errors
    assert losses(output) == losses(undisturbed)


def test_a_shard_that_vanishes(inputs: Path, tmp_path: Path) -> None:
    """Catches a run that goes on with other data than it was asked to, and an error that does not name the shard."""
    data = shutil.copytree(inputs / "train", tmp_path / "train")
    output = tmp_path / "run"
    ranks = Ranks(
        settings(inputs, output, f"data.train={data}", "train.steps=500", "checkpoint.interval=0"), tmp_path / "log"
    )
    assert ranks.wait_for(lambda: steps_made(output) >= 1, 300)
    (data / "shard-000001.tar").unlink()
    assert ranks.statuses(120) == [exit_status.USER_ERROR, exit_status.USER_ERROR]
    (line,) = [line for line in ranks.log.read_text().splitlines() if line.startswith("error: ")]
    assert "shard-000001.tar: sample" in line and "cannot be read (No such file or directory)" in line


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 4 MB."""
    with small_file_system(tmp_path / "disk", "4m") as place:
        yield place


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_disk_that_fills_up(inputs: Path, undisturbed: Path, disk: Path, tmp_path: Path, asynchronous: bool) -> None:
    """Catches a run that goes on without its metrics, records or checkpoints.

    Also one that cannot go on when there is room again.
    """
    output = disk / "run"
    asked = settings(inputs, output, "checkpoint.interval=1", f"checkpoint.asynchronous={asynchronous}")
    ranks = Ranks(asked, tmp_path / "log")
    assert ranks.wait_for(lambda: list((output / "checkpoints").glob("step_000002")), 300)
    try:
        (disk / "filler").write_bytes(bytes(8 << 20))
    except OSError:
        assert (disk / "filler").exists()
    statuses = ranks.statuses(120)
    lines = [line for line in ranks.log.read_text().splitlines() if line.startswith("error: ")]
    assert exit_status.USER_ERROR in statuses and set(statuses) <= {exit_status.USER_ERROR, exit_status.PEER_GONE}, (
        ranks.log.read_text()
    )
    # Which file is the first to be refused, and in whose words, depends on the moment.
    assert len(lines) == 1 and ("the checkpoint could not be written (" in lines[0] or "the disk is full" in lines[0])
    assert "Traceback" not in ranks.log.read_text()
    (disk / "filler").unlink()
    assert Ranks(asked, tmp_path / "again").statuses(300) == [0, 0]
    assert losses(output) == losses(undisturbed)
