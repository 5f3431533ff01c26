"""Runs a command as a user types it, in a process that starts at once: forked from one that has imported everything.

For tests of what a command does; that it starts from nothing is tested once for each entry point, by `subprocess`.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tests.gloo import PRELOADED

ROOT = Path(__file__).parents[1]


def run_command(
    *arguments: str, environment: Mapping[str, str] = os.environ, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run ``python ARGUMENTS``, which begin with ``-m MODULE`` or ``-c CODE``, from the project's root.

    Args:
        arguments: of the interpreter.
        environment: all variables of the process.
        timeout: seconds, after which it is killed.

    Raises:
        subprocess.TimeoutExpired: it took longer.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as directory:
        said = [str(Path(directory) / name) for name in ("stdout", "stderr")]
        process = context.Process(target=_become, args=(arguments, dict(environment), said))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(arguments, timeout)
        return subprocess.CompletedProcess(arguments, process.exitcode, *(Path(path).read_text() for path in said))


def _become(arguments: tuple[str, ...], environment: dict[str, str], said: list[str]) -> None:
    """Be the command from here on."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    for number, path in enumerate(said, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    how, *rest = arguments
    if how == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = rest
        sys.modules.pop(rest[0], None)  # imported already, of which runpy would warn
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
