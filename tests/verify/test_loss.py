"""``python -m megatron_cord.verify loss`` as a user starts it."""

from __future__ import annotations

import pytest

from megatron_cord.verify import loss as verify_loss
from tests.forked import run_command


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_pass(ranks: int) -> None:
    """Catches a check that cannot pass where the tests do: bfloat16, several ranks, a vocabulary that needs padding."""
    options = (f"tp={ranks}", "dtype=bfloat16", "tokens=24")
    launched = ("-m", "megatron_cord.launch", "--nproc-per-node", str(ranks), "-m", "megatron_cord.verify", "loss")
    done = run_command(*launched, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"bfloat16, TP={ranks}" in done.stdout and "all 20 checks passed" in done.stdout


def test_ranks_that_do_not_fit_are_refused() -> None:
    """Catches a layout of ranks that were not started, and limits so wide that nothing could fail."""
    done = run_command("-m", "megatron_cord.verify", "loss", "tp=2")
    assert done.returncode == 2 and "1 ranks cannot be laid out" in done.stderr
    for value, gradient in verify_loss.TOLERANCES.values():
        assert 0 < value < 1e-2 and 0 < gradient <= 1e-2


#: The command, with hidden gradients of one kind that are two percent too large.
WRONG = """
import sys
from megatron_cord.runtime import entry
from megatron_cord.verify import __main__ as program
from megatron_cord.verify import loss as verify_loss
right = verify_loss.distillation_loss
def wrong(chunk_loss, hidden, *arguments, **options):
    if options["kind"] == "forward_kl":
        hidden.register_hook(lambda gradient: 1.02 * gradient)
    return right(chunk_loss, hidden, *arguments, **options)
verify_loss.distillation_loss = wrong
sys.argv[0] = "verify"
entry.run(program.main)
"""


def test_a_wrong_loss_fails() -> None:
    """Catches a check that passes whatever it sees: a wrong gradient must be found, printed, and make the status 1."""
    options = ("tokens=8", "hidden=32", "vocabulary=300", "dtype=float64")
    done = run_command("-c", WRONG, "loss", *options)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "3 of 20 checks failed" in done.stdout
    failed = [line.split(",")[0] for line in done.stdout.splitlines() if "FAIL" in line]
    assert failed == ["forward_kl"] * 3
