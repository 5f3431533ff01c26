"""The search for settings under which a run fits: the fastest of the layouts and savings that do, traffic counted."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, Any

from megatron_cord.errors import CordError
from megatron_cord.plan.devices import Gpu
from megatron_cord.plan.memory import memory
from megatron_cord.plan.speed import operations, speed
from megatron_cord.plan.work import Work, make_work

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
    mixture = arch.language.experts is not None
    ranks_of_experts = (1, 2, 4, 8, 16, 32, 64) if mixture else (1,)
    choices = product((1, 2, 4, 8), (1, 2, 4), ranks_of_experts, recomputed, (config.train.micro_batch_size, 2, 1))
    own = config.parallel
    for tp, pp, ep, recompute, micro in choices:
        kept = (own.virtual_pp, own.pipeline_layers) if pp == own.pp else (own.virtual_pp if pp > 1 else 1, ())
        try:
            parallel = replace(
                own,
                tp=tp,
                pp=pp,
                ep=ep,
                virtual_pp=kept[0],
                pipeline_layers=kept[1],
                vocabulary_over_stages=own.vocabulary_over_stages and pp > 1,
                sequence_parallel=(own.sequence_parallel or mixture) and tp > 1,
            )
            changed = replace(
                config,
                parallel=parallel,
                model=replace(config.model, recompute=recompute),
                train=replace(config.train, micro_batch_size=min(micro, config.train.micro_batch_size)),
            )
            work = make_work(changed, arch, gpus, **lengths)
        except CordError:
            continue
        for candidate in (changed, *_balanced(changed, arch, work), *_joint(changed, arch, work)):
            if memory(candidate, arch, work, local_engine=not rollout_gpus).total > gpu.memory:
                continue
            fast = speed(candidate, arch, work, gpu, gpus, rollout_gpus).tokens_per_second[0]
            if best is None or fast > best[0]:
                best = fast, _settings(config, candidate)
    return None if best is None else best[1]


def _balanced(config: RunConfig, arch: Architecture, work: Work) -> list[RunConfig]:
    """Return the configuration with layers dealt so that all pipeline ranks compute about as much, if that is another.

    The audio encoder and the loss count for the ranks that have them. Only where the layers are dealt evenly so far,
    without interleaved stages, and all models of the run have equally many.
    """
    parallel, layers = config.parallel, arch.language.num_layers
    others = [*filter(None, [work.teacher]), *dict(work.others).values()]
    if parallel.pp == 1 or parallel.virtual_pp > 1 or parallel.pipeline_layers or layers < parallel.pp:
        return []
    if any(other.language.num_layers != layers for other in others):
        return []
    counts = balanced_layers(config, arch, work)
    if counts == parallel.layers_per_stage(layers):
        return []
    return [replace(config, parallel=replace(parallel, pipeline_layers=counts))]


def _joint(config: RunConfig, arch: Architecture, work: Work) -> list[RunConfig]:
    """Return the configuration with the loss formed by all pipeline stages, layers dealt as they are and balanced."""
    parallel = config.parallel
    if parallel.pp == 1 or parallel.virtual_pp > 1 or parallel.vocabulary_over_stages:
        return []
    joint = replace(config, parallel=replace(parallel, vocabulary_over_stages=True))
    return [joint, *_balanced(joint, arch, work)]


def balanced_layers(config: RunConfig, arch: Architecture, work: Work) -> tuple[int, ...]:
    """Return the layers of each pipeline rank with which the busiest one computes least; at least one each."""
    done, layers = operations(config, arch, work), arch.language.num_layers
    a_layer = done.layers / layers
    counts = [1] * config.parallel.pp
    loads = [a_layer] * config.parallel.pp
    loads = [load + done.last_on(config.parallel, stage) for stage, load in enumerate(loads)]
    loads[0] += done.first
    for _ in range(layers - len(counts)):
        least = loads.index(min(loads))
        counts[least] += 1
        loads[least] += a_layer
    return tuple(counts)


def _settings(config: RunConfig, changed: RunConfig) -> list[str]:
    pairs = {
        "parallel.tp": (config.parallel.tp, changed.parallel.tp),
        "parallel.pp": (config.parallel.pp, changed.parallel.pp),
        "parallel.virtual_pp": (config.parallel.virtual_pp, changed.parallel.virtual_pp),
        "parallel.pipeline_layers": (config.parallel.pipeline_layers, changed.parallel.pipeline_layers),
        "parallel.vocabulary_over_stages": (
            config.parallel.vocabulary_over_stages,
            changed.parallel.vocabulary_over_stages,
        ),
        "parallel.ep": (config.parallel.ep, changed.parallel.ep),
        "parallel.sequence_parallel": (config.parallel.sequence_parallel, changed.parallel.sequence_parallel),
        "model.recompute": (config.model.recompute, changed.model.recompute),
        "train.micro_batch_size": (config.train.micro_batch_size, changed.train.micro_batch_size),
    }
    return [f"{name}={_yaml(new)}" for name, (old, new) in pairs.items() if old != new]


def _yaml(value: object) -> str:
    return f"[{','.join(map(str, value))}]" if isinstance(value, tuple) else str(value).lower()
