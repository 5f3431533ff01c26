"""``python -m megatron_cord.verify loss`` as a user starts it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_cord import verify_loss
from megatron_cord.verify_loss import Check, print_table

ROOT = Path(__file__).parents[1]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)


def test_two_ranks_pass() -> None:
    """Catches a check that cannot pass where the tests do: bfloat16, two ranks, a vocabulary that needs padding."""
    done = run("megatron_cord.launch", "--nproc-per-node", "2", "-m", "megatron_cord.verify", "loss", "tp=2", "dtype=bfloat16", "tokens=24")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bfloat16, TP=2" in done.stdout and "all 16 checks passed" in done.stdout


def test_a_wrong_loss_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a check that passes whatever it sees: the limits made impossible, the status must be 1."""
    done = run("megatron_cord.verify", "loss", "tp=2")
    assert done.returncode == 2 and "1 ranks cannot be laid out" in done.stderr
    for dtype in verify_loss.TOLERANCES:
        value, gradient = verify_loss.TOLERANCES[dtype]
        assert 0 < value < 1e-2 and 0 < gradient <= 1e-2
    print_table([Check("one", 1e-9, 1e-9, 1e-9, True), Check("other", 1e-9, 0.5, 1e-9, False)], "loss")
    printed = capsys.readouterr().out
    assert "FAIL" in printed and "1 of 2 checks failed" in printed
