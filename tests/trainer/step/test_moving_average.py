"""The teacher that follows the student: its averages against float64, and through a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_cord.errors import CordError
from megatron_cord.model.families import load_architecture
from megatron_cord.model.lalm import LALM
from megatron_cord.parallel.layout import Layout
from megatron_cord.trainer.step.moving_average import MovingAverage
from tests.tiny_run import losses, overrides
from tests.trainer.checkpoint.test_checkpoints import alone
from tests.trainer.fault_ranks import Ranks
from tests.trainer.runs.test_train import saved, stop_after

EMA = ("teacher.mode=ema", "teacher.ema_decay=0.9", "checkpoint.keep=0", "optimizer.learning_rate=3e-3")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_averages_against_float64(inputs: Path, layout: Layout, dtype: torch.dtype) -> None:
    """Catches a decay the wrong way round, small changes lost in bfloat16, frozen weights that move.

    Also an encoder that is followed.
    """
    arch = load_architecture(str(inputs / "checkpoint"))
    student, teacher = (LALM(arch, layout, dtype) for _ in range(2))
    parameters = dict(student.named_parameters())
    generator = torch.Generator().manual_seed(0)
    for parameter in parameters.values():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    teacher.load_state_dict(student.state_dict())
    frozen = parameters["language_model.embedding.word_embeddings.weight"].requires_grad_(False)
    average = MovingAverage(0.999, student, teacher, offload=True)
    wanted = {name: parameter.detach().double() for name, parameter in teacher.named_parameters()}
    for _ in range(30):
        with torch.no_grad():
            for name, parameter in parameters.items():
                if parameter is not frozen:
                    parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator).to(dtype))
                if name.startswith("language_model.") and parameter is not frozen:
                    wanted[name] = 0.999 * wanted[name] + 0.001 * parameter.double()
        average.update()
    for name, parameter in teacher.named_parameters():
        torch.testing.assert_close(
            parameter.double(), wanted[name], rtol=2.0**-8 if dtype == torch.bfloat16 else 1e-5, atol=1e-6
        )
    kept = average.sharded_state_dict()
    assert kept and all(entry.data.dtype == torch.float32 for entry in kept.values())
    assert not any("word_embeddings" in name for name in kept)
    for name, entry in kept.items():
        torch.testing.assert_close(entry.data.double(), wanted[f"language_model.{name}"], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_run_with_a_moving_average(inputs: Path, tmp_path: Path) -> None:
    """Catches averages that are missing from checkpoints, not restored, or never used; and a resume without them."""
    whole = alone(inputs, tmp_path / "whole", *EMA)
    frozen = alone(inputs, tmp_path / "frozen", *EMA, "teacher.mode=frozen", "train.steps=3")
    assert losses(whole)[0] == losses(frozen)[0] and losses(whole)[2] != losses(frozen)[2]
    averages = {name for name in saved(whole, 2) if name.startswith("teacher.")}
    assert averages and not any("audio" in name or "adapter" in name for name in averages)
    assert losses(alone(inputs, stop_after(3, whole, tmp_path / "resumed"), *EMA)) == losses(whole)
    with pytest.raises(CordError, match=r"step_000003 holds no moving average; resume with the run's own teacher.mode"):
        alone(inputs, frozen, *EMA)


@pytest.mark.slow
def test_averages_go_on_on_another_layout(inputs: Path, tmp_path: Path) -> None:
    """Catches averages that are not restored where the ranks' shards are others."""
    whole = alone(inputs, tmp_path / "whole", *EMA)
    ranks = Ranks(overrides(inputs, stop_after(3, whole, tmp_path / "on two"), *EMA, "parallel.tp=2"), tmp_path / "log")
    assert ranks.statuses(300) == [0, 0], ranks.log.read_text()
    for got, wanted in zip(losses(tmp_path / "on two"), losses(whole), strict=True):
        assert got == pytest.approx(wanted, rel=1e-4)
