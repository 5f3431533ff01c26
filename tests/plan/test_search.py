"""Layouts that are proposed: they fit, they are the fastest, and the examples have them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_cord.config.loading import load_config
from megatron_cord.plan import GPUS, PUBLISHED, fitting, make_work, memory, published, speed, traffic
from megatron_cord.plan.parameters import rank_counts
from megatron_cord.plan.search import balanced_layers
from megatron_cord.trainer.config import RunConfig
from tests.plan.small_model import configured

ROOT = Path(__file__).parents[2]


def test_settings_for_a_run_that_does_not_fit(checkpoint: Path) -> None:
    """Catches advice that does not fit either, and a layout that fits but is called too large."""
    arch, gpu = published("qwen2_audio_7b"), GPUS["h100"]
    config = configured(checkpoint)
    assert memory(config, arch, make_work(config, arch, 8)).total > gpu.memory
    settings = fitting(config, arch, gpu, 8)
    assert settings is not None
    advised = configured(checkpoint, *settings)
    work = make_work(advised, arch, 8)
    assert memory(advised, arch, work).total <= gpu.memory
    slow, fast = speed(advised, arch, work, gpu, 8).tokens_per_second
    assert 0 < slow < fast
    assert fitting(config, arch, gpu, 1) is None


def test_layers_are_dealt_by_what_stages_compute(checkpoint: Path) -> None:
    """Catches stages that are balanced without the encoder or the loss, and advice that makes a step slower."""
    arch, gpu = published("qwen2_audio_7b"), GPUS["h100"]
    even = configured(checkpoint, "parallel.pp=4", "model.freeze=[]")
    work = make_work(even, arch, 8)
    counts = balanced_layers(even, arch, work)
    assert sum(counts) == arch.language.num_layers and counts[0] < min(counts[1:3])
    uneven = replace(even, parallel=replace(even.parallel, pipeline_layers=counts))
    assert speed(uneven, arch, work, gpu, 8).train[0] < speed(even, arch, work, gpu, 8).train[0]
    whole = [sum(rank_counts(arch, 1, 4, stage, each).total for stage in range(4)) for each in (counts, ())]
    assert whole[0] == whole[1]


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_examples_have_the_layout_that_is_chosen(name: str) -> None:
    """Catches an example with another layout or recomputation than the fastest that fits, servers on half of a node."""
    config = load_config(RunConfig, ROOT / "examples" / name / "config.yaml")
    assert fitting(config, published(name), GPUS["h100"], 4, 4) == []
    if published(name).language.experts is not None:
        assert config.parallel.ep == 4  # how large a mixture is decides, not what its ranks send
        return
    slower = replace(config, parallel=replace(config.parallel, tp=4), model=replace(config.model, recompute=()))
    sent = [
        traffic(each, published(name), make_work(each, published(name), 4), 0)
        for each in (config, replace(config, parallel=replace(config.parallel, tp=4)))
    ]
    assert sent[0].tp + sent[0].dp < 0.6 * (sent[1].tp + sent[1].dp)
    settings = fitting(slower, published(name), GPUS["h100"], 4, 4)
    assert settings is not None and "parallel.tp=2" in settings


@pytest.mark.parametrize(("gpus", "settings"), [(8, ()), (32, ("parallel.tp=4", "parallel.pp=4"))])
def test_an_example_on_more_gpus(gpus: int, settings: tuple[str, ...]) -> None:
    """Catches layouts in the words above an example's configuration that are not the fastest ones any more."""
    path = ROOT / "examples" / "qwen2_5_omni_7b" / "config.yaml"
    config = load_config(RunConfig, path, list(settings))
    assert fitting(config, published("qwen2_5_omni_7b"), GPUS["h100"], gpus, gpus) == []
    assert not settings or " ".join(settings) in path.read_text()
