"""Planned parameters of LoRA against those of models that are built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_cord.model.architecture import AdapterArchitecture, Architecture, ExpertsArchitecture
from megatron_cord.model.config import LoraConfig, ModelConfig
from megatron_cord.model.families import load_architecture
from megatron_cord.model.lalm import LALM
from megatron_cord.parallel.layout import Layout, ParallelConfig, initialize
from megatron_cord.plan import make_work, memory, published
from megatron_cord.plan.lora import lora_count, merged_count, trained_expert_count
from megatron_cord.plan.speed import train_flops
from tests.gloo import run_ranks
from tests.plan.small_model import configured, with_experts


def lora_on_rank(_rank: int, arch: Architecture, settings: Sequence[ModelConfig]) -> list[int]:
    """Build this rank's part of two stages on two tensor-parallel ranks; return the parameters of each LoRA."""
    layout = initialize(ParallelConfig(tp=2, pp=2), seed=0)
    counts = []
    for config in settings:
        model = LALM(arch, layout, torch.float32)
        model.add_lora(config.lora, config.freeze, seed=0)
        assert model.lora is not None
        counts.append(sum(parameter.numel() for parameter in model.lora.parameters()))
    return counts


LORA = [
    ModelConfig("", lora=LoraConfig(rank=3)),
    ModelConfig(
        "", lora=LoraConfig(rank=5, targets=("q_proj", "down_proj", "*.layers.2.*")), freeze=("audio_encoder",)
    ),
]


@pytest.mark.slow
def test_lora_of_each_rank(checkpoint: Path) -> None:
    """Catches a factor that is counted as cut and is whole, or the other way round, and one on the wrong stage."""
    arch = load_architecture(checkpoint)
    for rank, built in enumerate(run_ranks(lora_on_rank, 4, arch, LORA)):
        assert [lora_count(config, arch, 2, 2, rank // 2) for config in LORA] == built


def lora_beside_experts(_rank: int, arch: Architecture, settings: Sequence[ModelConfig]) -> list[tuple[int, int]]:
    """Return the parameters of LoRA on this of two ranks that share out experts, and those of them beside experts."""
    layout = initialize(ParallelConfig(ep=2), seed=0)
    counts = []
    for config in settings:
        model = LALM(arch, layout, torch.float32)
        model.add_lora(config.lora, config.freeze, seed=0)
        assert model.lora is not None
        factors = {name: factor.numel() for name, (factor, _) in model.lora.factors().items()}
        counts.append((sum(factors.values()), sum(size for name, size in factors.items() if ".experts." in name)))
    return counts


def test_lora_of_experts(checkpoint: Path) -> None:
    """Catches LoRA of experts that is counted on each rank, as cut over tensor-parallel ranks, or not at all.

    Also that of a shared expert, which has another width.
    """
    arch = with_experts(load_architecture(checkpoint))
    mixture = ExpertsArchitecture(4, 2, normalized=True, shared_ffn_hidden_size=24)
    arch = replace(arch, language=replace(arch.language, experts=mixture))
    for built in run_ranks(lora_beside_experts, 2, arch, LORA[:1]):
        config = LORA[0]
        assert built == [(lora_count(config, arch, ep=2), trained_expert_count(config, arch, 1, 0, ep=2))]
        assert built[0][1] > 0 and trained_expert_count(config, arch, 1, 0) == 2 * built[0][1]
        assert lora_count(config, arch) == built[0][0] + built[0][1]


@pytest.mark.parametrize("kind", ["linear", "convolution", "stacking", "gated_stacking"])
def test_lora_of_each_adapter(layout: Layout, checkpoint: Path, kind: Any) -> None:
    """Catches a size of LoRA, and of the matrices that are merged with it, that is only Qwen2-Audio's."""
    arch = load_architecture(checkpoint)
    adapter = AdapterArchitecture(kind, hidden_size=36, stride=2, kernel_size=3, bias=True)
    kinds = {
        "linear": "qwen2_audio",
        "convolution": "step_audio_2",
        "stacking": "voxtral",
        "gated_stacking": "ultravox",
    }
    arch = replace(arch, adapter=adapter, model_type=kinds[kind])
    for config in LORA:
        model = LALM(arch, layout, torch.float32)
        model.add_lora(config.lora, config.freeze, seed=0)
        assert model.lora is not None
        assert lora_count(config, arch) == sum(parameter.numel() for parameter in model.lora.parameters())
        assert merged_count(config, arch) == sum(weight.numel() for weight in model.lora.weights())


def test_lora_in_a_plan() -> None:
    """Catches base weights that are counted with gradients, states or a teacher's copy beside LoRA."""
    arch = published("qwen2_audio_7b")
    plain = configured("qwen2_audio_7b", "parallel.tp=2", "model.recompute=[language_model]")
    lora = replace(plain, model=replace(plain.model, lora=LoraConfig(rank=16)))
    before, after = (memory(config, arch, make_work(config, arch, 8)) for config in (plain, lora))
    assert after.teacher == 0 and after.gradients < before.gradients / 50 and after.optimizer < before.optimizer / 50
    assert after.weights - before.weights == lora_count(lora.model, arch, 2) * 2
    assert (
        train_flops(lora, arch, make_work(lora, arch, 8))[0]
        < 0.8 * train_flops(plain, arch, make_work(plain, arch, 8))[0]
    )
