"""The command of conversion: there and back on real ranks, from a training run, and every slip in one line."""

from __future__ import annotations

import megatron_cord.parallel  # noqa: F401  # isort: skip (before megatron.core)

import importlib.util
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from rich.console import Console
from transformers import AutoProcessor

from megatron_cord.convert import read_tensors
from megatron_cord.errors import CordError
from megatron_cord.parallel.layout import finalize
from tests.gloo import run_ranks
from tests.tiny_run import ROOT, finish, overrides, start, write_checkpoint, write_inputs

pytestmark = pytest.mark.filterwarnings("ignore:::megatron")

QUESTION = ["--text", "what is one plus two"]


def load_tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("convert_hf", ROOT / "tools" / "convert_hf.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_commands(_rank: int, commands: list[list[str]]) -> list[tuple[int, str]]:
    """Runs commands in turn on the ranks of the default process group; returns status and output of each."""
    tool, outcomes = load_tool(), []
    for command in commands:
        arguments = tool.parse(command)
        console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115 (closed with the process)
        status = tool.COMMANDS[arguments.command](arguments, console)
        outcomes.append((status, console.export_text()))
        parallel_state.destroy_model_parallel()
    return outcomes


def alone(*command: Any) -> tuple[int, str]:
    """One command in this process."""
    try:
        return run_commands(0, [[str(part) for part in command]])[0]
    finally:
        finalize()


def error(*command: Any) -> str:
    with pytest.raises(CordError) as caught:
        alone(*command)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def same(directory: Path, other: Path) -> bool:
    given, wanted = dict(read_tensors(directory)), dict(read_tensors(other))
    return given.keys() == wanted.keys() and all(t.dtype == given[n].dtype and torch.equal(given[n], t) for n, t in wanted.items())


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four heads on two, a vocabulary that nothing divides."""
    return write_checkpoint(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def imported(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    target = tmp_path_factory.mktemp("imported") / "checkpoint"
    alone("import", source, target)
    yield target


def test_there_and_back_on_two_ranks(source: Path, tmp_path: Path) -> None:
    """Catches a tensor that a change of layout changes, logits that differ from transformers', and files that are not carried over."""
    checkpoint, out = str(tmp_path / "checkpoint"), tmp_path / "out"
    commands = [
        ["import", str(source), checkpoint, "--tp", "2"],
        ["check", str(source), checkpoint, "--pp", "2", "--tolerance", "1e-5", *QUESTION],
        ["check", str(source), checkpoint, "--tp", "2", "--tolerance", "1e-5", *QUESTION],
        ["export", checkpoint, str(out), "--pp", "2", "--max-shard-size", "20KB"],
    ]
    outcomes = run_ranks(run_commands, 2, commands)
    assert [[status for status, _ in outcome] for outcome in outcomes] == [[0] * 4] * 2
    assert "check as audio" in outcomes[0][1][1] and "check as text" in outcomes[0][1][1]
    assert same(out, source) and len(list(out.glob("*.safetensors"))) > 2
    assert {path.name for path in source.iterdir()} - {"model.safetensors"} <= {path.name for path in out.iterdir()}
    AutoProcessor.from_pretrained(out)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint", "out"]


def test_other_weights_are_told_apart(imported: Path, tmp_path: Path) -> None:
    """Catches a comparison that compares a model with itself."""
    status, said = alone("check", write_checkpoint(tmp_path, seed=1), imported, *QUESTION)
    assert status == 1 and "ABOVE the tolerance" in said


def test_dry_run_writes_nothing(source: Path, imported: Path, tmp_path: Path) -> None:
    """Catches a dry run that leaves something behind, leaves a tensor out, or needs weights."""
    shutil.copy(source / "config.json", tmp_path)
    for command in (("import", source), ("export", imported), ("import", tmp_path)):
        status, said = alone(*command, tmp_path / "out", "--dry-run", "--tp", "2")
        assert (
            status == 0 and all(name in said for name, _ in read_tensors(source)) and f"{len(list(read_tensors(source)))} tensors" in said
        )
    assert "no weights to compare with" in said and os.listdir(tmp_path) == ["config.json"]


def test_precision_is_chosen(source: Path, tmp_path: Path) -> None:
    """Catches weights of another precision than asked for, or than config.json says."""
    alone("import", source, tmp_path / "checkpoint", "--dtype", "bfloat16")
    alone("export", tmp_path / "checkpoint", tmp_path / "out")
    given = dict(read_tensors(tmp_path / "out"))
    assert all(torch.equal(given[name], tensor.bfloat16()) for name, tensor in read_tensors(source))
    assert '"float32"' not in (tmp_path / "out" / "config.json").read_text()


def test_a_training_run_is_exported(tmp_path: Path) -> None:
    """Catches a checkpoint of the trainer that cannot leave, or that leaves without what training changed."""
    inputs = write_inputs(tmp_path)
    status, errors = finish(start(overrides(inputs, tmp_path / "run", "train.steps=1"), ranks=1))
    assert status == 0, errors
    alone("export", tmp_path / "run" / "checkpoints" / "step_000001", tmp_path / "out")
    assert {name for name, _ in read_tensors(tmp_path / "out")} == {name for name, _ in read_tensors(inputs / "checkpoint")}
    assert not same(tmp_path / "out", inputs / "checkpoint")


@pytest.mark.parametrize("command", ["import", "export"])
def test_a_full_disk_is_one_line(source: Path, imported: Path, tmp_path: Path, command: str) -> None:
    """Catches a traceback, and a target that looks whole, where the system refuses to write."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))

    begin = source if command == "import" else imported
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, str(ROOT / "tools" / "convert_hf.py"), command, str(begin), str(tmp_path / "out")]
    done = subprocess.run(arguments, env=environment, preexec_fn=limit, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert f"{tmp_path / 'out'} could not be written (" in line and "free some space" in line
    assert not (tmp_path / "out").exists()


def test_slips(source: Path, imported: Path, tmp_path: Path) -> None:
    """Catches a traceback, or a message without a cure, for what a user may get wrong."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "bert"}')
    out = tmp_path / "out"
    assert "model_type 'bert' is not supported" in error("import", tmp_path / "other", out)
    assert "does not divide the language model's attention heads (4)" in error("import", source, out, "--tp", "3", "--dry-run")
    assert "exists already and is not overwritten" in error("import", source, imported)
    assert "exists already and is not overwritten" in error("export", imported, source)
    assert "--hf HF_DIR" in error("export", tmp_path / "nowhere", out)
    assert "is not a whole checkpoint" in error("export", tmp_path / "nowhere", out, "--hf", source)
    assert "write it as 5GB" in error("export", imported, out, "--max-shard-size", "five")
    assert "cannot be read" in error("check", source, imported, *QUESTION, "--audio", tmp_path / "none.wav")
    wider = write_checkpoint(tmp_path / "wider", ffn_size=64)
    assert "holds another architecture (it differs in language.ffn_hidden_size)" in error("check", wider, imported, *QUESTION)
    assert not out.exists()
