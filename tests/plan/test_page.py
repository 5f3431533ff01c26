"""The page of estimates against the tool, and the tool's answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_cord.cli.actions.plan import gpu_counts
from megatron_cord.config.loading import load_config
from megatron_cord.errors import CordError
from megatron_cord.plan import GPUS, PUBLISHED, published
from megatron_cord.plan.page import layouts_table
from megatron_cord.trainer.config import RunConfig

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_the_page_has_the_tables_of_the_tool(name: str) -> None:
    """Catches a table that was not made again after the formulas or the examples' configuration changed."""
    config = load_config(RunConfig, ROOT / "examples" / name / "config.yaml")
    table = layouts_table(config, published(name), GPUS["h100"], {})
    assert table in (ROOT / "docs" / "plan.md").read_text(), f"make docs/plan.md's table again:\n{table}"


def test_numbers_of_gpus() -> None:
    """Catches several numbers of which all but the first are ignored, and a traceback for what is no number."""
    assert gpu_counts("8, 64", several=True) == [8, 64]
    with pytest.raises(CordError, match="several numbers are for --trace"):
        gpu_counts("8,64", several=False)
    with pytest.raises(CordError, match="--gpus 0: give a number"):
        gpu_counts("0", several=False)


def plan(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the tool on the 7B's example."""
    command = [sys.executable, "tools/plan.py", "--config", "examples/qwen2_audio_7b/config.yaml", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.slow
def test_the_tool_answers_and_refuses() -> None:
    """Catches JSON that says something else than the exit status, advice that is missing, and tracebacks."""
    done = plan("--model", "qwen2_audio_7b", "--json", "parallel.tp=1", "parallel.sequence_parallel=false")
    assert done.returncode == 1 and json.loads(done.stdout)["fits"] is False and json.loads(done.stdout)["suggestion"]
    done = plan("--model", "qwen2_audio_7b", "--gpus", "7")
    assert (
        done.returncode == 2
        and done.stderr.startswith("error: 7 GPUs cannot be laid out")
        and done.stderr.count("\n") == 1
    )
