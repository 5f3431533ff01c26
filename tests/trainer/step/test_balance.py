"""Settings that a mixture of experts does not go with, refused by name; layouts are in tests/verify/test_layout.py."""

from __future__ import annotations

import megatron_cord.parallel  # noqa: F401  # isort: skip (before megatron.core)

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_cord.errors import CordError
from megatron_cord.model.architecture import ExpertsArchitecture
from megatron_cord.model.lalm import LALM
from megatron_cord.parallel.layout import Layout, ParallelConfig, finalize, initialize
from megatron_cord.trainer.step.balance import check_balancing
from megatron_cord.trainer.step.objective import ObjectiveConfig
from megatron_cord.trainer.step.optimizer.building import wrap_model
from megatron_cord.trainer.step.optimizer.config import OptimizerConfig
from tests.model.test_architecture import ARCHITECTURE, LANGUAGE

MIXTURE = replace(ARCHITECTURE, language=replace(LANGUAGE, experts=ExpertsArchitecture(4, 2, normalized=True)))


@pytest.fixture(scope="module")
def layout() -> Iterator[Layout]:
    yield initialize(ParallelConfig(), seed=0)
    finalize()


def test_a_balancing_loss_that_would_not_be_there(layout: Layout) -> None:
    """Catches a coefficient without effect."""
    objective = ObjectiveConfig(router_aux_loss=0.01)
    with pytest.raises(CordError, match=r"objective.router_aux_loss balances experts, and the model has none"):
        check_balancing(objective, LALM(ARCHITECTURE, layout, torch.float32))
    with pytest.raises(CordError, match=r"router_aux_loss cannot be negative"):
        ObjectiveConfig(router_aux_loss=-1.0)
    check_balancing(objective, LALM(MIXTURE, layout, torch.float32))


def test_layouts_and_optimizers(layout: Layout) -> None:
    """Catches experts whose gradients would be lost between tensor-parallel ranks, or updated by another rule."""
    with pytest.raises(CordError, match=r"optimizer.kind=muon is not built for a mixture of experts"):
        wrap_model(OptimizerConfig(kind="muon"), LALM(MIXTURE, layout, torch.float32))
    apart: Any = replace(layout, config=ParallelConfig(tp=2, ep=2))
    with pytest.raises(CordError, match=r"parallel.tp=2 with a mixture of experts needs parallel.sequence_parallel"):
        LALM(MIXTURE, apart, torch.float32)
    with pytest.raises(CordError, match=r"parallel.ep=3 and parallel.tp=2 × parallel.cp=1: one must divide the other"):
        ParallelConfig(tp=2, ep=3)
