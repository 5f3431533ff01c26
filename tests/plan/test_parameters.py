"""Planned parameters of each rank against those of models that are built."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_cord.errors import CordError
from megatron_cord.model.architecture import AdapterArchitecture, Architecture
from megatron_cord.model.families import load_architecture
from megatron_cord.model.lalm import LALM
from megatron_cord.parallel.layout import Layout, ParallelConfig, initialize
from megatron_cord.plan import GPUS, fitting, make_work, memory, part_counts, published, traffic
from megatron_cord.plan.parameters import active_count, expert_count, rank_counts
from tests.gloo import run_ranks
from tests.plan.small_model import configured, counts_of, with_experts


def build_mixture_on_rank(rank: int, arch: Architecture) -> list[int]:
    """Count parameters by part of a rank of TP 2 × PP 2, whose tensor-parallel ranks share out experts."""
    layout = initialize(ParallelConfig(tp=2, pp=2, ep=2, sequence_parallel=True), seed=0)
    return counts_of(LALM(arch, layout, torch.float32))


def build_on_rank(rank: int, archs: list[Architecture]) -> list[list[int]]:
    """Count parameters by part of a rank of TP 2 × PP 2, for each architecture."""
    layout = initialize(ParallelConfig(tp=2, pp=2), seed=0)
    return [counts_of(LALM(arch, layout, torch.float32)) for arch in archs]


def test_parameters_of_published_models() -> None:
    """Catches a wrong size or formula: the counts of the published files, to the last parameter for Qwen2-Audio."""
    assert part_counts(published("qwen2_audio_7b")).total == 8_397_094_912
    assert part_counts(published("audio_flamingo_3")).total == 8_267_215_360
    assert part_counts(published("qwen2_5_omni_7b")).total == 8_255_256_576
    assert round(part_counts(published("step_audio2_mini")).total / 1e9, 1) == 8.3


@pytest.mark.slow
def test_parameters_of_each_rank(checkpoint: Path) -> None:
    """Catches a tensor that is counted as cut and is whole, or the other way round, and a part on the wrong stage."""
    arch = load_architecture(checkpoint)
    archs = [replace(arch, language=replace(arch.language, tied_embeddings=tied)) for tied in (False, True)]
    for rank, built in enumerate(run_ranks(build_on_rank, 4, archs)):
        for this, counts in zip(archs, built, strict=True):
            planned = rank_counts(this, 2, 2, stage=rank // 2)
            assert [planned.audio_encoder, planned.adapter, planned.language_model] == counts


@pytest.mark.slow
def test_parameters_of_each_rank_of_a_mixture(checkpoint: Path) -> None:
    """Catches experts that are counted on each rank, and a router that is counted as shared out."""
    arch = with_experts(load_architecture(checkpoint))
    for rank, built in enumerate(run_ranks(build_mixture_on_rank, 4, arch)):
        planned = rank_counts(arch, 2, 2, rank // 2, ep=2)
        assert [planned.audio_encoder, planned.adapter, planned.language_model] == built
    whole, lm = part_counts(arch), arch.language
    idle = lm.num_layers * 2 * 3 * lm.hidden_size * lm.ffn_hidden_size
    assert active_count(arch) == whole.language_model - idle


def test_a_plan_deals_experts() -> None:
    """Catches states of experts that are divided by ranks without them, and a search that leaves experts together."""
    arch = with_experts(published("step_audio2_mini"))
    two, four = (
        configured("x", "parallel.tp=2", "parallel.sequence_parallel=true", f"parallel.ep={ep}") for ep in (2, 4)
    )
    held = [memory(config, arch, make_work(config, arch, 8)) for config in (two, four)]
    experts = expert_count(arch)
    assert held[0].weights - held[1].weights == (experts // 2 - experts // 4) * 2
    assert held[0].optimizer == held[1].optimizer  # the eight ranks have all states, whoever has the weights
    sent = [traffic(config, arch, make_work(config, arch, 8), 0).ep for config in (two, four)]
    assert 0 < sent[0] < sent[1]
    settings = fitting(configured("x"), arch, GPUS["h100"], 32, 8)
    assert settings is not None and any(setting.startswith("parallel.ep=") for setting in settings)


@pytest.mark.parametrize(
    ("mixture", "settings", "message"),
    [
        (False, ("parallel.ep=2",), "deals experts, and the model has none"),
        (True, ("parallel.tp=2", "parallel.ep=2"), "needs parallel.sequence_parallel=true"),
        (True, ("parallel.ep=2", "optimizer.overlap_communication=true"), "overlap_communication is not built"),
    ],
)
def test_layouts_that_training_refuses(mixture: bool, settings: tuple[str, ...], message: str) -> None:
    """Catches a plan for a layout of experts that no run could start with."""
    arch = published("step_audio2_mini")
    with pytest.raises(CordError, match=message):
        make_work(configured("x", *settings), with_experts(arch) if mixture else arch, 8)


@pytest.mark.parametrize("kind", ["linear", "convolution", "stacking", "gated_stacking"])
def test_parameters_of_each_adapter(layout: Layout, checkpoint: Path, kind: Any) -> None:
    """Catches a formula that only knows Qwen2-Audio's projection."""
    arch = replace(
        load_architecture(checkpoint),
        adapter=AdapterArchitecture(kind, hidden_size=36, stride=2, kernel_size=3, bias=True),
    )
    assert rank_counts(arch, 1, 1, 0).adapter == counts_of(LALM(arch, layout, torch.float32))[1]
