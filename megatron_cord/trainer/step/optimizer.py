"""Megatron's DDP and distributed optimizer around the model, with a warm-up and cosine schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_cord.errors import CordError
from megatron_cord.model.lalm import LALM


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule."""

    learning_rate: float = 3e-5  #: at the end of the warm-up; the paper's value
    final_learning_rate_fraction: float = 0.1  #: of learning_rate, reached at the last step by a cosine
    warmup_steps: int = 0  #: linear from zero
    weight_decay: float = 0.0  #: decoupled; never on biases and norms
    beta1: float = 0.9  #: decay of the first moment
    beta2: float = 0.95  #: decay of the second moment
    epsilon: float = 1e-8  #: in Adam's denominator
    clip_norm: float = 1.0  #: global gradient norm; 0 turns clipping off
    distributed: bool = True  #: Megatron's distributed optimizer: states are split over data-parallel ranks
    overlap_communication: bool = False  #: reduce gradients while the backward pass runs
    #: a resumed run keeps the learning rates of its checkpoint, whatever learning_rate, warmup_steps,
    #: final_learning_rate_fraction and train.steps are now; after their last step the final rate stays
    keep_schedule: bool = False

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise CordError(f"optimizer.learning_rate must be positive, got {self.learning_rate}")
        if self.warmup_steps < 0:
            raise CordError(f"optimizer.warmup_steps cannot be negative, got {self.warmup_steps}")


@dataclass(frozen=True)
class RateSchedule:
    """The learning rates of a run: a linear warm-up and a cosine, as Megatron's scheduler computes them.

    Attributes:
        peak: at the end of the warm-up.
        final: at the last step, and after it.
        warmup: steps of the warm-up.
        steps: of the whole schedule.
    """

    peak: float
    final: float
    warmup: int
    steps: int

    @classmethod
    def of(cls, config: OptimizerConfig, steps: int) -> RateSchedule:
        """Return the schedule of a configuration, over so many steps."""
        rate = config.learning_rate
        return cls(rate, rate * config.final_learning_rate_fraction, min(config.warmup_steps, steps - 1), steps)

    @property
    def initial(self) -> float:
        """The rate of the first step: not zero, which would waste it."""
        return self.peak / (self.warmup + 1)

    def rate(self, step: int) -> float:
        """Return the learning rate of the update after so many steps."""
        if self.warmup and step <= self.warmup:
            return self.initial + (self.peak - self.initial) * step / self.warmup
        share = min(1.0, (step - self.warmup) / (self.steps - self.warmup))
        return self.final + (self.peak - self.final) * 0.5 * (1.0 + math.cos(math.pi * share))


def wrap_model(config: OptimizerConfig, model: LALM) -> DistributedDataParallel:
    """Wrap the model in Megatron's DDP: gradients in fp32 buffers, summed over data-parallel ranks.

    They are not averaged: the loss is already divided by global counts.
    """
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=config.distributed,
        overlap_grad_reduce=config.overlap_communication,
    )
    return DistributedDataParallel(model.config, ddp_config, model, pg_collection=model.layout.groups)


def build_optimizer(
    config: OptimizerConfig, model: DistributedDataParallel, steps: int, schedule: RateSchedule | None = None
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """Build the optimizer of all parameters that are not frozen, and its schedule: the configuration's over `steps`.

    The model's configuration is given the functions with which Megatron's pipeline schedule finishes a step.
    """
    lalm: LALM = model.module
    dtype = lalm.config.params_dtype
    schedule = schedule or RateSchedule.of(config, steps)
    optimizer = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=schedule.peak,
            min_lr=schedule.final,
            weight_decay=config.weight_decay,
            adam_beta1=config.beta1,
            adam_beta2=config.beta2,
            adam_eps=config.epsilon,
            clip_grad=config.clip_norm,
            bf16=dtype == torch.bfloat16,
            fp16=False,
            params_dtype=dtype,
            use_distributed_optimizer=config.distributed,
        ),
        [model],
    )
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=schedule.initial,
        max_lr=schedule.peak,
        min_lr=schedule.final,
        lr_warmup_steps=schedule.warmup,
        lr_decay_steps=schedule.steps,
        lr_decay_style="cosine",
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
    lalm.config.grad_scale_func = optimizer.scale_loss
    lalm.config.no_sync_func = model.no_sync if config.overlap_communication else None
    # The losses carry their global denominators already, so the gradients are only summed.
    lalm.config.finalize_model_grads_func = lambda models, _tokens, **kwargs: finalize_model_grads(
        models, None, **kwargs
    )
    return optimizer, scheduler


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
