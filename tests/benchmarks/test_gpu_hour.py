"""`benchmarks/gpu_hour.sh`: its limits, failures and skips with a pretended interpreter, and its parts for real."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
PARTS = [
    "environment", "loss-float32", "loss-bfloat16", "layout-torch", "layout-te", "inputs", "train", "server",
    "weight-sync", "loss-time", "loss-memory",
]  # fmt: skip
#: An interpreter: the real one for the script's own modules; a part ends well, ends badly, or does not end.
PRETENDER = """#!/usr/bin/env bash
case "$*" in
    *gpu_hour.machine*) echo '{"device": "a GPU", "versions": {"torch": "9"}}' > "$3"; echo "$HAS" ;;
    *gpu_hour.summary*) exec PYTHON "$@" ;;
    *"loss dtype=float32"*) echo noise; exit 1 ;;
    *"loss dtype=bfloat16"*) sleep 60 ;;
    *) echo "$*"; echo "all is | well" ;;
esac
"""


def run(output: Path, *options: str, **environment: str) -> tuple[int, str, dict[str, Any] | None]:
    """Run the script; return its status, its last line and its summary."""
    done = subprocess.run(
        [str(ROOT / "benchmarks" / "gpu_hour.sh"), "--output", str(output), *options],
        env=os.environ | {"PYTHON": sys.executable, "SGLANG_PYTHON": str(output / "none")} | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    summary = output / "summary.json"
    lines = (done.stdout + done.stderr).splitlines()
    return done.returncode, lines[-1], json.loads(summary.read_text()) if summary.exists() else None


@pytest.fixture
def pretender(tmp_path: Path) -> str:
    """Write the interpreter."""
    path = tmp_path / "python"
    path.write_text(PRETENDER.replace("PYTHON", sys.executable))
    path.chmod(0o755)
    return str(path)


def test_every_part_is_run_whatever_fails(pretender: str, tmp_path: Path) -> None:
    """Catches a script that ends with its first failure, a status that hides one, a part skipped silently."""
    output = tmp_path / "out"
    options = ("--parts", ",".join(part for part in PARTS if part != "loss-bfloat16"))
    status, line, summary = run(output, *options, PYTHON=pretender, HAS="cuda")
    assert summary is not None and status == 1 and line.startswith("6 passed, 1 failed, 3 skipped")
    results = {part["part"]: (part["status"], part["says"]) for part in summary["parts"]}
    assert list(results) == [part for part in PARTS if part != "loss-bfloat16"]
    assert results["loss-float32"] == ("FAIL", f"status 1; see {output}/loss-float32.log")
    assert results["layout-te"] == ("skip", "transformer-engine is not installed")
    assert results["server"][0] == "skip" and "does not exist (make sglang-env)" in results["server"][1]
    assert results["train"] == ("pass", "all is | well")
    assert "model.freeze=[]" in (output / "train.log").read_text()
    assert "| train | pass |" in (output / "summary.md").read_text()


def test_a_part_that_does_not_end_is_ended(pretender: str, tmp_path: Path) -> None:
    """Catches a machine that is paid for while it hangs, and parts that begin when no time is left."""
    options = ("--seconds", "1", "--parts", "loss-bfloat16,layout-torch")
    status, _, summary = run(tmp_path / "out", *options, PYTHON=pretender, HAS="")
    assert summary is not None and status == 1
    first, second = summary["parts"]
    assert (first["status"], second["status"]) == ("FAIL", "skip")
    assert first["says"].startswith("not done after 1 s") and second["says"] == "no time is left of 1 s"
    assert first["seconds"] <= 3


def test_figures_of_an_earlier_run_are_gone(pretender: str, tmp_path: Path) -> None:
    """Catches a summary whose figures are of another run."""
    output = tmp_path / "out"
    output.mkdir()
    (output / "metrics.jsonl").write_text('{"step": 3, "loss": 1.5}\n')
    (output / "loss.json").write_text('{"layer": {"candidates": {"ours": {"seconds": 1.0}}}}')
    status, line, summary = run(output, "--parts", "environment", PYTHON=pretender, HAS="")
    assert summary is not None and status == 0 and summary["figures"] == {} and line.startswith("1 passed, 0 failed")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--parts", "loss"), "error: --parts loss: choose from environment loss-float32"),
        (("--size", "huge"), "error: --size is full or tiny, got 'huge'"),
        (("--seconds", "ten"), "error: --seconds is a number above 0, got 'ten'"),
        (("--fast", "1"), "error: --fast is no option"),
        (("--size",), "error: an option lacks its value"),
    ],
)
def test_what_is_not_understood_is_refused(
    options: tuple[str, ...], words: str, pretender: str, tmp_path: Path
) -> None:
    """Catches ten minutes that are spent on something else than was meant."""
    status, line, _ = run(tmp_path / "out", *options, PYTHON=pretender, HAS="")
    assert status == 2 and line.startswith(words)


def test_without_an_environment_it_does_not_begin(tmp_path: Path) -> None:
    """Catches eleven parts that all fail for one reason."""
    status, line, summary = run(tmp_path / "out", PYTHON="/nowhere/python")
    assert status == 2 and summary is None and "/nowhere/python cannot start the checks" in line


@pytest.mark.slow
def test_all_parts_on_this_machine(tmp_path: Path) -> None:
    """Catches a part whose command is refused, and a summary without its figures; what needs a GPU is skipped."""
    if torch.cuda.is_available():
        pytest.skip("make gpu-hour runs it in full")
    status, _, summary = run(tmp_path / "out", "--size", "tiny")
    assert summary is not None and status == 0, summary
    results = {part["part"]: part["status"] for part in summary["parts"]}
    assert list(results) == PARTS
    assert {name for name, result in results.items() if result == "skip"} == {"layout-te", "server", "weight-sync"}
    figures = summary["figures"]
    assert figures["training"]["tokens_per_second_forward_backward"] > 0
    assert {"ours, cached_grad", "torch, compiled"} <= figures["loss_seconds"].keys() & figures[
        "loss_peak_bytes"
    ].keys()
    assert (tmp_path / "out" / "profile" / "step000003-rank00000.pt.trace.json.gz").exists()
