"""Megatron's DDP and distributed optimizer around the model, with its groups of parameters and their rates."""

from __future__ import annotations

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig

from megatron_cord.errors import CordError
from megatron_cord.model.lalm import LALM
from megatron_cord.model.layers.transformer import accumulate_into_main_grad
from megatron_cord.parallel import portability
from megatron_cord.parallel.host_adam import HostAdam
from megatron_cord.parallel.muon import Muon
from megatron_cord.trainer.step.optimizer.config import OptimizerConfig
from megatron_cord.trainer.step.optimizer.groups import megatron_overrides, settings_of
from megatron_cord.trainer.step.optimizer.muon import begin_states, build_muon
from megatron_cord.trainer.step.optimizer.schedule import RateSchedule, RateScheduler
from megatron_cord.trainer.step.optimizer.states import describe_in_place


def wrap_model(config: OptimizerConfig, model: LALM) -> DistributedDataParallel:
    """Wrap the model in Megatron's DDP: gradients in fp32 buffers, summed over data-parallel ranks.

    They are not averaged: the loss is already divided by global counts.

    Raises:
        CordError: settings that a mixture of experts does not go with.
    """
    if config.overlap_communication and model.layout.experts_span_replicas:
        raise CordError(
            "optimizer.overlap_communication is not built for a parallel.ep beyond parallel.tp × parallel.cp; set it "
            "to false"
        )
    if config.kind == "muon" and model.arch.language.experts is not None:
        raise CordError("optimizer.kind=muon is not built for a mixture of experts; take adam")
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=_has_distributed_buffers(config),
        overlap_grad_reduce=config.overlap_communication,
    )
    wrapped = DistributedDataParallel(model.config, ddp_config, model, pg_collection=model.layout.groups)
    accumulate_into_main_grad(model, model.layers)
    return wrapped


def build_optimizer(
    config: OptimizerConfig, model: DistributedDataParallel, steps: int, schedule: RateSchedule | None = None
) -> tuple[MegatronOptimizer, RateScheduler]:
    """Build the optimizer of all parameters that are not frozen, and its schedule: the configuration's over `steps`.

    The model's configuration is given the functions with which Megatron's pipeline schedule finishes a step.
    """
    lalm: LALM = model.module
    dtype = lalm.config.params_dtype
    schedule = schedule or RateSchedule.of(config, steps)
    own_groups = bool(config.groups) or config.kind == "muon"
    settings = settings_of(config, schedule.factors, lalm) if own_groups else {}
    weight_decay = 1.0 if own_groups else config.weight_decay
    megatron_config = MegatronOptimizerConfig(
        optimizer="adam",
        lr=schedule.peak,
        min_lr=schedule.final,
        weight_decay=weight_decay,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        adam_eps=config.epsilon,
        clip_grad=config.clip_norm,
        bf16=dtype == torch.bfloat16,
        fp16=False,
        params_dtype=dtype,
        use_distributed_optimizer=_has_distributed_buffers(config),
    )
    optimizer: MegatronOptimizer
    if config.kind == "muon":
        optimizer = build_muon(config, megatron_config, settings, lalm)
    else:
        optimizer = get_megatron_optimizer(
            megatron_config,
            [model],
            megatron_overrides(settings) if own_groups else None,
            use_gloo_process_groups=portability.needs_gloo_groups(),
        )
    describe_in_place(optimizer)
    if config.offload:
        _move_to_host(optimizer)
    scheduler = RateScheduler(optimizer, schedule, weight_decay)
    lalm.config.grad_scale_func = optimizer.scale_loss
    lalm.config.no_sync_func = model.no_sync if config.overlap_communication else None
    # The losses carry their global denominators already, so the gradients are only summed; those of all interleaved
    # stages of a rank are in the one model.
    lalm.config.finalize_model_grads_func = lambda _stages, _tokens, **kwargs: finalize_model_grads(
        [model], None, **kwargs
    )
    return optimizer, scheduler


def _move_to_host(optimizer: MegatronOptimizer) -> None:
    """Put AdamW with moments in host memory into the place of the other inside Megatron's wrappers."""
    for wrapper in getattr(optimizer, "chained_optimizers", [optimizer]):
        if wrapper.optimizer is not None and not isinstance(wrapper.optimizer, Muon):
            wrapper.optimizer = HostAdam(wrapper.optimizer.param_groups)
            wrapper.init_state_fn = begin_states


def _has_distributed_buffers(config: OptimizerConfig) -> bool:
    return config.distributed and config.kind == "adam"


def release(model: DistributedDataParallel) -> None:
    """Release a model that is no longer used.

    Otherwise hooks inside autograd, DDP and the optimizer keep each other alive, with weights, groups and threads.
    """
    model.grad_accs.clear()
    model.module.config.grad_scale_func = None


def join_reduction(model: DistributedDataParallel) -> None:
    """Start the overlapped reductions of gradients on a rank without a microbatch, whose backward pass cannot."""
    if model.ddp_config.overlap_grad_reduce:
        for group in [*model.bucket_groups, *model.expert_parallel_bucket_groups]:
            if not group.is_first_batch:  # in the first step every rank starts them only when it finishes them
                group.start_grad_sync()


def gradients_are_finite(model: DistributedDataParallel) -> bool:
    """Return whether all gradients of this rank, already summed over data-parallel ranks, are finite.

    One value is read from the device.
    """
    sums = [buffer.grad_data.sum() for buffer in [*model.buffers, *model.expert_parallel_buffers]]
    return not sums or bool(torch.isfinite(torch.stack(sums)).all())
