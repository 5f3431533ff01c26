"""Recomputation of layers by configuration; test_lalm and test_families show that gradients are the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import torch

from megatron_cord.model.config import LayerConfig, Tower
from megatron_cord.model.lalm import LALM
from megatron_cord.parallel.layout import Layout, ParallelConfig, finalize, initialize
from tests.model.ranks import make_batches
from tests.model.test_architecture import ARCHITECTURE


@pytest.fixture(scope="module")
def layout() -> Iterator[Layout]:
    yield initialize(ParallelConfig(), seed=0)
    finalize()


@pytest.mark.parametrize("towers", [(), ("audio_encoder",), ("language_model",), ("audio_encoder", "language_model")])
def test_chosen_towers_are_computed_twice(layout: Layout, towers: tuple[Tower, ...]) -> None:
    """Catches a setting that is dropped on its way to Megatron, or that reaches the other tower."""
    model = LALM(ARCHITECTURE, layout, torch.float32, LayerConfig(recompute=towers))
    assert calls_of(model, "mlp") == {name: 1 + (name in towers) for name in ("audio_encoder", "language_model")}


def test_selective_recomputation(layout: Layout) -> None:
    """Catches selective recomputation of whole layers, or of nothing: core attention and MLP are, projections are not.

    It also catches a backward pass that never ends in the encoder, whose MLPs end with a bias.
    """
    towers: tuple[Tower, ...] = ("audio_encoder", "language_model")
    for chosen in towers:
        model = LALM(ARCHITECTURE, layout, torch.float32, LayerConfig(recompute=(chosen,), granularity="selective"))
        for part, times in (("self_attention.core_attention", 2), ("mlp", 2), ("self_attention.linear_qkv", 1)):
            assert calls_of(model, part) == {tower: times if tower == chosen else 1 for tower in towers}


def calls_of(model: LALM, part: str) -> Counter[str]:
    """How often the first layer's part is called in one pass forward and backward, by tower."""
    calls: Counter[str] = Counter()
    assert model.audio_encoder is not None
    towers = {"audio_encoder": model.audio_encoder.block, "language_model": model.language_model.decoder}
    for name, block in towers.items():
        block.layers[0].get_submodule(part).register_forward_hook(lambda *_, name=name: calls.update([name]))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model(make_batches()[1].input).sum().backward()
    assert all(parameter.grad is not None for parameter in model.audio_encoder.block.parameters())
    return calls
