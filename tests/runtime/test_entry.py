"""How entry points end: one line from one rank, the right status, nothing that hangs, and bugs that stay visible."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from megatron_cord.errors import CordError
from megatron_cord.runtime import entry, failures
from tests.forked import run_command

SCRIPT = str(Path(__file__).with_name("failing_ranks.py"))


def launched(*arguments: str) -> tuple[int, str, str]:
    """Return status, standard output and standard error of the launcher with two ranks."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "WORLD_SIZE", "RANK")
    }
    environment["PYTHONPATH"] = str(Path(entry.__file__).parents[2])
    command = ("-m", "megatron_cord.launch", "--nproc-per-node", "2", *arguments)
    done = run_command(*command, environment=environment, timeout=120)
    return done.returncode, done.stdout, done.stderr


def claims() -> set[str]:
    return {path.name for path in Path(tempfile.gettempdir()).glob("megatron_cord-error-*")}


@pytest.mark.parametrize(
    ("how", "lines"),
    [
        ("all", ["error: shard 0 is truncated", "error: shard 1 is truncated"]),
        pytest.param("slow", ["error: shard 0 is truncated", "error: shard 1 is truncated"], marks=pytest.mark.slow),
        pytest.param("one", ["error: shard 0 is truncated"], marks=pytest.mark.slow),
        ("full", ["error: a file being written: the disk is full; free some space or write to another disk"]),
    ],
)
def test_failing_ranks_report_once(how: str, lines: list[str]) -> None:
    """Catches a line from each rank, or from none, as a launcher ends the one that reports when the other has left.

    Also the traceback of a rank whose peer has left, torchrun's report, a hang, and leftover files.
    """
    before = claims()
    status, printed, errors = launched(SCRIPT, how)
    assert status == 2 and printed == "" and errors.rstrip("\n") in lines
    assert claims() <= before


def test_success_is_silent_and_single_threaded() -> None:
    """Catches torchrun's banner about OMP_NUM_THREADS, and ranks that fight over the cores."""
    assert launched(SCRIPT, "meet") == (0, "threads 1\n", "")


@pytest.mark.parametrize(
    ("how", "ended", "starts"), [("stopped", 75, 1), pytest.param("again", 3, 2, marks=pytest.mark.slow)]
)
def test_ranks_that_stopped_are_not_started_again(tmp_path: Path, how: str, ended: int, starts: int) -> None:
    """Catches a launcher that starts again what was stopped, or leaves what lost a peer."""
    count = tmp_path / "starts"
    status, _, errors = launched("--nproc-per-node", "1", "--max-restarts", "1", SCRIPT, how, str(count))
    assert (status, count.read_text()) == (ended, "start\n" * starts) and "FAILED" not in errors


def test_interrupt_prints_nothing() -> None:
    """Catches a traceback or torchrun's report after Ctrl-C, or a status that says success."""
    status, _, errors = launched(SCRIPT, "interrupt")
    assert status == 130 and "Traceback" not in errors and "FAILED" not in errors


@pytest.mark.parametrize(
    ("how", "status", "shown"),
    [("bug", 1, "KeyError: 'bug'"), pytest.param("killed", 137, "SIGKILL", marks=pytest.mark.slow)],
)
def test_real_crashes_stay_visible(how: str, status: int, shown: str) -> None:
    """Catches a launcher that hides a bug's traceback or the signal that killed a rank."""
    ended, _, errors = launched(SCRIPT, how)
    assert ended == status and shown in errors and "failing_ranks.py FAILED" in errors


def test_a_port_in_use_is_named() -> None:
    """Catches a rendezvous that hangs or ends in tracebacks because another process holds the port."""
    with socket.socket() as holder:
        holder.bind(("", 0))
        holder.listen(1)
        port = holder.getsockname()[1]
        message = (
            f"error: port {port} is in use on this machine; give another with --master-port (MASTER_PORT), "
            "or end the run that holds it\n"
        )
        assert launched("--master-port", str(port), SCRIPT, "meet") == (2, "", message)
        environment = os.environ | {
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(port),
            "RANK": "0",
            "WORLD_SIZE": "1",
        }
        environment["PYTHONPATH"] = str(Path(entry.__file__).parents[2])
        alone = subprocess.run(
            [sys.executable, SCRIPT, "meet"], capture_output=True, text=True, timeout=120, env=environment, check=False
        )
    assert (alone.returncode, alone.stderr.splitlines()[-1] + "\n") == (2, message)


def test_statuses_of_one_process(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a wrong exit status, a message over several lines, or a bug that loses its traceback."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)

    def fails(error: BaseException) -> int:
        raise error

    for main, status in [
        (lambda: None, 0),
        (lambda: 7, 7),
        (lambda: fails(CordError("a\nb")), 2),
        (lambda: fails(KeyboardInterrupt()), 130),
    ]:  # fmt: skip
        assert entry.status_of(main) == status
    assert capsys.readouterr().err == "error: a b\n"
    with pytest.raises(KeyError):
        entry.status_of(lambda: fails(KeyError("bug")))


ENDING = """
import atexit, os, threading, time
from megatron_cord.runtime import entry

class Abort:
    def __del__(self):
        os.abort()  # as a thread of C++ does that still runs when its group is taken down

kept = Abort()
kept.itself = kept  # the interpreter takes it down last
atexit.register(print, "at exit")
threading.Thread(target=lambda: (time.sleep(0.5), print("thread"))).start()
entry.run(lambda: None)
"""


def test_a_finished_process_takes_nothing_down() -> None:
    """Catches an abort while the process ends, after its work is done.

    Also threads that are cut off, and functions registered for the exit that are not called.
    """
    environment = os.environ | {"PYTHONPATH": str(Path(entry.__file__).parents[2]), "PYTHONUNBUFFERED": ""}
    environment.pop("WORLD_SIZE", None)
    done = subprocess.run(
        [sys.executable, "-c", ENDING], capture_output=True, text=True, timeout=60, env=environment, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "thread\nat exit\n", "")


RANK = """
import os, time
from megatron_cord.runtime import entry
entry.run(lambda: print(os.getpid(), flush=True) or time.sleep(120))
"""
LAUNCHER = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]], start_new_session=True)"


def test_a_rank_ends_with_its_launcher() -> None:
    """Catches ranks that live on, and hold their GPU and the log's lock, after their launcher was killed."""
    environment = os.environ | {"PYTHONPATH": str(Path(entry.__file__).parents[2]), "TORCHELASTIC_RUN_ID": "run"}
    command = [sys.executable, "-c", LAUNCHER, RANK]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as launcher:
        assert launcher.stdout is not None
        rank = int(launcher.stdout.readline())
        launcher.kill()
        try:
            launcher.communicate(timeout=10)  # until the rank, too, has closed its end
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank, signal.SIGKILL)


def test_a_full_disk_is_found_behind_other_errors() -> None:
    """Catches a full disk that a library has wrapped in an exception of its own, and other I/O errors taken for it."""
    wrapped = RuntimeError("writing failed")
    wrapped.__cause__ = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/data/checkpoint.bin")
    assert (failures.explain(wrapped) or "").startswith("/data/checkpoint.bin: the disk is full")
    assert failures.explain(OSError(errno.EIO, "input/output error")) is None


def test_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches overrides lost on either side of --config, abbreviations, and a usage page in place of one line."""
    assert entry.parse_args("d", arguments=["a.b=1", "--config", "x.yaml", "c=[1, 2]"]) == entry.Arguments(
        Path("x.yaml"), ("a.b=1", "c=[1, 2]")
    )
    assert entry.parse_args("d", config_required=False, arguments=[]) == entry.Arguments(None, ())
    with pytest.raises(CordError, match="required: --config"):
        entry.parse_args("d", arguments=["a=1"])
    with pytest.raises(
        CordError, match=r"unrecognized arguments: --train\.steps=3; overrides are written a\.b=value, without dashes"
    ):
        entry.parse_args("d", arguments=["--config", "x", "--train.steps=3"])
    with pytest.raises(CordError):
        entry.parse_args("d", arguments=["--conf", "x"])
    with pytest.raises(CordError, match="invalid choice: 'loud'"):
        entry.parse_args("d", arguments=["--config", "x", "--log-level", "loud"])
    assert capsys.readouterr().err == ""
