"""The table of layouts in docs/plan.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from megatron_cord.plan.devices import Gpu
from megatron_cord.plan.memory import memory
from megatron_cord.plan.speed import speed
from megatron_cord.plan.work import make_work

if TYPE_CHECKING:
    from megatron_cord.model.architecture import Architecture
    from megatron_cord.model.config import Tower
    from megatron_cord.trainer.config import RunConfig

#: training GPUs, tp, pp, recomputed towers, GPUs of rollout servers (0: local engine)
LAYOUTS: tuple[tuple[int, int, int, tuple[Tower, ...], int], ...] = (
    (4, 2, 1, (), 4),
    (4, 2, 1, ("language_model",), 4),
    (4, 4, 1, (), 4),
    (8, 1, 1, ("language_model",), 0),
    (8, 2, 1, ("language_model",), 0),
    (8, 4, 1, (), 0),
    (8, 4, 1, ("language_model",), 0),
    (8, 2, 2, ("language_model",), 0),
    (8, 4, 2, ("language_model",), 0),
    (32, 2, 1, (), 16),
    (32, 2, 1, ("language_model",), 16),
    (32, 4, 1, (), 16),
    (32, 4, 1, ("language_model",), 16),
    (32, 2, 2, ("language_model",), 16),
)
HEADER = (
    "| GPUs | rollout GPUs | tp | pp | dp | recomputed | weights, gradients | optimizer | teacher | engine | "
    "activations, loss | sum | fits | tokens/s |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|"
)


def layouts_table(config: RunConfig, arch: Architecture, gpu: Gpu, lengths: Mapping[str, Any]) -> str:
    """Return Markdown: GB a GPU and tokens a second of the configuration under common layouts."""
    return "\n".join([HEADER, *(_row(config, arch, gpu, lengths, *layout) for layout in LAYOUTS)])


def _row(
    config: RunConfig,
    arch: Architecture,
    gpu: Gpu,
    lengths: Mapping[str, Any],
    gpus: int,
    tp: int,
    pp: int,
    recompute: tuple[Tower, ...],
    rollout_gpus: int,
) -> str:
    changed = replace(
        config,
        parallel=replace(config.parallel, tp=tp, pp=pp, sequence_parallel=tp > 1),
        model=replace(config.model, recompute=recompute),
    )
    work = make_work(changed, arch, gpus, **lengths)
    used, fast = (
        memory(changed, arch, work, local_engine=not rollout_gpus),
        speed(changed, arch, work, gpu, gpus, rollout_gpus),
    )
    cells = [
        *(gpus, rollout_gpus or "–", tp, pp, work.dp, "language model" if recompute else "–"),
        *(f"{value / 1e9:.1f}" for value in (used.weights + used.gradients, used.optimizer, used.teacher, used.engine)),
        *(f"{value / 1e9:.1f}" for value in (used.activations + used.loss + used.teacher_hidden, used.total)),
        "yes" if used.total <= gpu.memory else "**no**",
        f"{fast.tokens_per_second[0]:,.0f}–{fast.tokens_per_second[1]:,.0f}",
    ]
    return f"| {' | '.join(map(str, cells))} |"
