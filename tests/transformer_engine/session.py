"""The process in which transformer-engine's Python code runs: megatron.core looks for it once, when it is imported."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tests import gloo

ROOT = Path(__file__).parents[2]
SECONDS = 500


def run_session(num_ranks: int, *cases: str) -> dict[str, Any]:
    """Run cases of `ranks.CASES` on ranks with transformer-engine; return the results of rank 0 by name.

    Raises:
        AssertionError: a case failed; the message is what the ranks printed.
    """
    with tempfile.TemporaryDirectory() as directory:
        results = Path(directory) / "results.pt"
        start = "from tests.transformer_engine.session import main; main()"
        command = [sys.executable, "-W", "ignore", "-c", start, str(results), str(num_ranks), *cases]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=SECONDS)
        assert done.returncode == 0, done.stdout + done.stderr
        # Written by this test's own ranks a moment ago, so unpickling them is safe.
        found: dict[str, Any] = torch.load(results, weights_only=False)
        return found


def main() -> None:
    """Entry point of the process: where results go, the number of ranks, names of cases."""
    results, num_ranks, *cases = sys.argv[1:]
    gloo.PRELOADED[:] = ["tests.transformer_engine.ranks"]  # imported once, before the ranks are forked
    torch.save(gloo.run_ranks(run, int(num_ranks), cases)[0], results)


def run(rank: int, cases: Sequence[str]) -> dict[str, Any]:
    """Run cases on this rank. This module stays free of megatron.core, which only ranks need."""
    from tests.transformer_engine.ranks import run_cases

    return run_cases(rank, cases)
