"""Runs with LoRA beside experts: the same wherever these are, after a stop on other ranks, and from their exports."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_cord.cli.main import invoke, load
from megatron_cord.convert import read_tensors
from megatron_cord.parallel.layout import finalize
from tests.gloo import run_ranks
from tests.selection import selected
from tests.tiny_run import losses, metrics, write_checkpoint
from tests.trainer.runs.test_train import alone, needed, run_all

LORA = ("model.lora.rank=4", "model.lora.whole=[adapter]", "optimizer.learning_rate=1e-2")
KEPT = ("checkpoint.keep=0", "evaluation.samples=1")
SHARED_OUT = ("parallel.tp=2", "parallel.sequence_parallel=true", "parallel.ep=2")


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Write a checkpoint with experts; return the setting that names it."""
    directory = write_checkpoint(tmp_path_factory.mktemp("mixture") / "checkpoint", experts=4)
    return f"model.checkpoint={directory}"


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, inputs: Path, mixture: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a run whose experts are on two ranks, and one that goes on from it on data-parallel ranks."""
    root = tmp_path_factory.mktemp("runs")
    settings = (mixture, *LORA)
    cases = {"shared out": (None, (*settings, *SHARED_OUT)), "continued": ("shared out", settings)}
    run_ranks(run_all, 2, str(inputs), str(root), needed(cases, selected(request, "name") | {"shared out"}))
    return root


@pytest.fixture(scope="module")
def one(inputs: Path, mixture: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return alone(inputs, tmp_path_factory.mktemp("one") / "run", mixture, *KEPT, *LORA)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shared out", "continued"])
def test_every_layout_is_the_same_run(runs: Path, one: Path, name: str) -> None:
    """Catches experts' adapters that other ranks lack, that a checkpoint loses, or a norm without the other ranks'."""
    wanted, given = losses(one), losses(runs / name)
    assert len(given) == 5
    for ours, theirs in zip(given, wanted, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    assert all(line["engine_logprob_difference"] < 1e-4 for line in metrics(runs / name))


def convert(*command: object) -> None:
    try:
        assert invoke(load("convert"), [str(part) for part in command], "cord convert") == 0
    finally:
        finalize()


@pytest.mark.slow
def test_exports(inputs: Path, mixture: str, runs: Path, tmp_path: Path) -> None:
    """Catches experts that are merged with others' adapters, a router that changes, and adapters that do not return."""
    checkpoint = runs / "shared out" / "checkpoints" / "step_000005"
    convert("export", checkpoint, tmp_path / "merged")
    convert("check", tmp_path / "merged", checkpoint, "--tolerance", "1e-4", "--text", "what is one plus two")
    base = dict(read_tensors(mixture.partition("=")[2]))
    merged = dict(read_tensors(tmp_path / "merged"))
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert {name for name in base if ".experts." in name} < changed
    assert not any(name.endswith("mlp.gate.weight") or "norm" in name for name in changed)

    convert("export", checkpoint, tmp_path / "adapter", "--adapter")
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()
    assert sum(".experts." in name for name in names) == 2 * 4 * 3 * 2
    begun = [
        alone(inputs, tmp_path / name, mixture, *LORA, f"init_from={source}", "train.steps=1", "evaluation.samples=1")
        for name, source in (("begun", tmp_path / "adapter"), ("plain", runs / "shared out"))
    ]
    assert losses(begun[0]) == losses(begun[1]) != losses(runs / "shared out")[:1]
