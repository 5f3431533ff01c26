"""`verify weight_sync`, with real servers and two tensor-parallel ranks."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.sglang.conftest import (
    PYTHON,
    write_talking,
    write_talking_checkpoint,
    write_talking_graft,
    write_talking_qwen2_5_omni,
    write_talking_qwen3_omni,
)
from tests.tiny_run import ROOT, free_port


def write_step_audio_2(directory: Path) -> Path:
    return write_talking(directory, "step_audio_2")


MIXTURE = ("parallel.sequence_parallel=true", "parallel.ep=2")


@pytest.mark.parametrize(
    ("write", "tensors", "more"),
    [
        (write_talking_checkpoint, 63, ()),
        (write_step_audio_2, 60, ()),
        (write_talking_graft, 56, ()),
        (write_talking_qwen2_5_omni, 56, ()),
        (write_talking_qwen3_omni, 132, MIXTURE),
    ],
)
def test_all_three_transports(
    write: Callable[[Path], Path], tensors: int, more: tuple[str, ...], tmp_path: Path
) -> None:
    """Catches a transport that leaves a tensor, an audio tower's among them, or an answer other than a fresh server's.

    Also a check that ends badly.
    """
    if not PYTHON.exists():
        pytest.skip("needs SGLang's environment: make sglang-env")
    checkpoint = write(tmp_path / "checkpoint")
    command = [
        sys.executable,
        "-m",
        "megatron_cord.launch",
        "--nproc-per-node",
        "2",
        "--master-port",
        str(free_port()),
        "-m",
        "megatron_cord.verify",
        "weight_sync",
        f"checkpoint={checkpoint}",
        "parallel.tp=2",
        "dtype=float32",
        f"python={PYTHON}",
        "weight_sync.bucket_bytes=1048576",
        *more,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("passed") == 3 and done.stdout.count(f"{tensors} of {tensors}") == 3, done.stdout
