"""The simulated step on more and more GPUs, with the configured batch or with one that grows with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from megatron_cord.plan.devices import Gpu
from megatron_cord.plan.simulation.step import SimulatedStep, simulate
from megatron_cord.plan.speed import train_flops
from megatron_cord.plan.work import make_work

if TYPE_CHECKING:
    from megatron_cord.model.architecture import Architecture
    from megatron_cord.plan.trace.records import RankTrace
    from megatron_cord.trainer.config import RunConfig


@dataclass(frozen=True)
class Scaled:
    """A step on so many GPUs.

    Attributes:
        gpus: that train.
        rollout_gpus: of servers.
        sequences: of the step.
        slow: at the slow end of the rates.
        fast: at the fast end.
        tokens_per_second: student's tokens, slow and fast.
        mfu: operations of training, without what is computed again, over what the GPUs could do meanwhile.
    """

    gpus: int
    rollout_gpus: int
    sequences: int
    slow: SimulatedStep
    fast: SimulatedStep
    tokens_per_second: tuple[float, float]
    mfu: tuple[float, float]


def scale(
    config: RunConfig,
    arch: Architecture,
    traces: Sequence[RankTrace],
    gpu: Gpu,
    gpus: Sequence[int],
    rollout_gpus: int,
    **lengths: Any,
) -> list[Scaled]:
    """Return the step on each number of GPUs; prompts of a step and servers grow with them.

    A batch that stays as it is would leave most replicas of a large machine without a sequence.

    Args:
        config: of the run on the first number of GPUs.
        arch: of the student.
        traces: of its stages there.
        gpu: all of the same kind.
        gpus: that train.
        rollout_gpus: of servers beside the first number.
        **lengths: as for `make_work`.
    """
    return [_scaled(config, arch, traces, gpu, count, gpus[0], rollout_gpus, lengths) for count in gpus]


def _scaled(
    config: RunConfig,
    arch: Architecture,
    traces: Sequence[RankTrace],
    gpu: Gpu,
    gpus: int,
    first: int,
    rollout_gpus: int,
    lengths: dict[str, Any],
) -> Scaled:
    rollout = config.rollout
    grown = replace(
        config,
        rollout=replace(
            rollout,
            prompts_per_step=max(1, rollout.prompts_per_step * gpus // first),
            policy_prompts_per_step=rollout.policy_prompts_per_step * gpus // first,
        ),
    )
    servers = rollout_gpus * gpus // first
    work = make_work(grown, arch, gpus, **lengths)
    slow, fast = (simulate(grown, arch, traces, work, gpu, gpus, servers, end) for end in ("slow", "fast"))
    useful, _ = train_flops(grown, arch, work)
    training = ("teacher", "forward_backward", "stragglers", "gradient_reduction", "optimizer")
    busy = [gpus * gpu.peak * sum(step.seconds[name] for name in training) for step in (slow, fast)]
    return Scaled(
        gpus=gpus,
        rollout_gpus=servers,
        sequences=work.sequences,
        slow=slow,
        fast=fast,
        tokens_per_second=(
            work.sequences * work.student_tokens / slow.total,
            work.sequences * work.student_tokens / fast.total,
        ),
        mfu=(useful / busy[0], useful / busy[1]),
    )
