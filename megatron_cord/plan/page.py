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
    from megatron_cord.plan.work import Work
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
#: training GPUs, tp, pp, ep, whether whole weights are trained, GPUs of rollout servers
MIXTURE_LAYOUTS = (
    (4, 1, 1, 4, False, 4),
    (4, 2, 1, 4, False, 4),
    (4, 1, 1, 4, True, 4),
    (8, 1, 1, 8, False, 8),
    (8, 2, 1, 8, False, 8),
    (8, 2, 1, 8, True, 8),
    (32, 1, 1, 8, False, 32),
    (32, 2, 1, 8, True, 32),
    (32, 2, 2, 8, True, 32),
    (32, 2, 4, 8, True, 32),
    (32, 4, 2, 8, True, 32),
)
_COSTS = "weights, gradients | optimizer | teacher | engine | activations, loss | sum | fits | tokens/s |\n"
HEADER = f"| GPUs | rollout GPUs | tp | pp | dp | recomputed | {_COSTS}|{'---|' * 14}"
MIXTURE_HEADER = f"| GPUs | rollout GPUs | tp | pp | ep | dp | trained | {_COSTS}|{'---|' * 15}"


def layouts_table(config: RunConfig, arch: Architecture, gpu: Gpu, lengths: Mapping[str, Any]) -> str:
    """Return Markdown: GB a GPU and tokens a second of the configuration under common layouts.

    Those of a mixture of experts, which is larger than what a token needs of it, are with the configuration's LoRA and
    without; nothing is recomputed.
    """
    parallel, model = config.parallel, config.model
    rows = []
    if arch.language.experts is not None:
        for gpus, tp, pp, ep, whole, rollout_gpus in MIXTURE_LAYOUTS:
            layout = replace(parallel, tp=tp, pp=pp, ep=ep, sequence_parallel=tp > 1)
            lora = replace(model.lora, rank=0, targets=(), whole=(), dropout=0.0) if whole else model.lora
            changed = replace(config, parallel=layout, model=replace(model, recompute=(), lora=lora))
            work = make_work(changed, arch, gpus, **lengths)
            trained = "LoRA" if lora.enabled else "all weights"
            mixed = (gpus, rollout_gpus, tp, pp, ep, work.dp, trained)
            rows.append(_row(mixed, changed, arch, gpu, work, rollout_gpus))
        return "\n".join([MIXTURE_HEADER, *rows])
    for gpus, tp, pp, recompute, rollout_gpus in LAYOUTS:
        layout = replace(parallel, tp=tp, pp=pp, sequence_parallel=tp > 1)
        changed = replace(config, parallel=layout, model=replace(model, recompute=recompute))
        work = make_work(changed, arch, gpus, **lengths)
        named = (gpus, rollout_gpus or "–", tp, pp, work.dp, "language model" if recompute else "–")
        rows.append(_row(named, changed, arch, gpu, work, rollout_gpus))
    return "\n".join([HEADER, *rows])


def _row(
    named: tuple[object, ...], config: RunConfig, arch: Architecture, gpu: Gpu, work: Work, rollout_gpus: int
) -> str:
    """Return a row: what names the layout, and what it costs."""
    gpus = work.dp * config.parallel.tp * config.parallel.pp * config.parallel.cp
    used, fast = (
        memory(config, arch, work, local_engine=not rollout_gpus),
        speed(config, arch, work, gpu, gpus, rollout_gpus),
    )
    cells = [
        *named,
        *(f"{value / 1e9:.1f}" for value in (used.weights + used.gradients, used.optimizer, used.teacher, used.engine)),
        *(f"{value / 1e9:.1f}" for value in (used.activations + used.loss + used.teacher_hidden, used.total)),
        "yes" if used.total <= gpu.memory else "**no**",
        f"{fast.tokens_per_second[0]:,.0f}–{fast.tokens_per_second[1]:,.0f}",
    ]
    return f"| {' | '.join(map(str, cells))} |"
