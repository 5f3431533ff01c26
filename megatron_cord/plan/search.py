"""The search for settings under which a run fits: the fastest of the layouts and savings that do, traffic counted."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, Any

from megatron_cord.errors import CordError
from megatron_cord.plan.devices import Gpu
from megatron_cord.plan.memory import memory
from megatron_cord.plan.speed import speed
from megatron_cord.plan.work import make_work

if TYPE_CHECKING:
    from megatron_cord.model.architecture import Architecture
    from megatron_cord.model.config import Tower
    from megatron_cord.trainer.config import RunConfig


def fitting(
    config: RunConfig, arch: Architecture, gpu: Gpu, gpus: int, rollout_gpus: int = 0, **lengths: Any
) -> list[str] | None:
    """Return the settings `a.b=value` under which the run fits and is fastest; None if none was found.

    They are those that differ from the configuration's own, so none where these are the fastest already.

    Args:
        config: of the run; only layout, recomputation and microbatch change.
        arch: of the model.
        gpu: as for `speed`.
        gpus: as for `speed`.
        rollout_gpus: as for `speed`.
        **lengths: audio_seconds, text_tokens and teacher, as for `make_work`.
    """
    best: tuple[float, list[str]] | None = None
    recomputed: tuple[tuple[Tower, ...], ...] = ((), ("language_model",), ("audio_encoder", "language_model"))
    choices = product((1, 2, 4, 8), (1, 2, 4), recomputed, (config.train.micro_batch_size, 2, 1))
    for tp, pp, recompute, micro in choices:
        parallel = replace(
            config.parallel, tp=tp, pp=pp, sequence_parallel=config.parallel.sequence_parallel and tp > 1
        )
        changed = replace(
            config,
            parallel=parallel,
            model=replace(config.model, recompute=recompute),
            train=replace(config.train, micro_batch_size=min(micro, config.train.micro_batch_size)),
        )
        try:
            work = make_work(changed, arch, gpus, **lengths)
        except CordError:
            continue
        if memory(changed, arch, work, local_engine=not rollout_gpus).total > gpu.memory:
            continue
        fast = speed(changed, arch, work, gpu, gpus, rollout_gpus).tokens_per_second[0]
        if best is None or fast > best[0]:
            best = fast, _settings(config, changed)
    return None if best is None else best[1]


def _settings(config: RunConfig, changed: RunConfig) -> list[str]:
    pairs = {
        "parallel.tp": (config.parallel.tp, changed.parallel.tp),
        "parallel.pp": (config.parallel.pp, changed.parallel.pp),
        "parallel.sequence_parallel": (config.parallel.sequence_parallel, changed.parallel.sequence_parallel),
        "model.recompute": (config.model.recompute, changed.model.recompute),
        "train.micro_batch_size": (config.train.micro_batch_size, changed.train.micro_batch_size),
    }
    return [f"{name}={_yaml(new)}" for name, (old, new) in pairs.items() if old != new]


def _yaml(value: object) -> str:
    return f"[{','.join(value)}]" if isinstance(value, tuple) else str(value).lower()
