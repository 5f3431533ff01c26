"""`verify exchange`, with real servers and two tensor-parallel ranks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.sglang.conftest import PYTHON, write_talking_checkpoint
from tests.tiny_run import ROOT, free_port


def test_all_three_ways(tmp_path: Path) -> None:
    """Catches a way that leaves a tensor, an audio tower's among them, or an answer other than a fresh server's, and a check that ends badly."""
    if not PYTHON.exists():
        pytest.skip("needs SGLang's environment: make sglang-env")
    checkpoint = write_talking_checkpoint(tmp_path / "checkpoint")
    command = [
        sys.executable, "-m", "megatron_cord.launch", "--nproc-per-node", "2", "--master-port", str(free_port()), "-m",
        "megatron_cord.verify", "exchange", f"checkpoint={checkpoint}", "parallel.tp=2", "dtype=float32", f"python={PYTHON}",
        "exchange.bucket_bytes=1048576",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("passed") == 3 and done.stdout.count("63 of 63") == 3, done.stdout
