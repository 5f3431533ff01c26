"""The seconds of a step's phases over many GPUs, from counts of a trace and from rates.

A replica's stages run Megatron's schedules, 1F1B or interleaved, or one in which they form the loss together
(`parallel.loss_slots`). Replicas wait for each other where gradients are summed, servers and trainers where responses
are handed over. Each GPU has a speed of its own, drawn from the rates' spread, so the slowest one sets the time of all
that wait for it.

Simplifications: a collective takes the time of its bytes by a ring and a latency, and nothing else uses the link then;
tensor-parallel collectives do not overlap with products, the reduction of gradients does with
`optimizer.overlap_communication`; all responses are as long as allowed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING

from megatron_cord.plan.devices import NODE, Gpu
from megatron_cord.plan.simulation.pipeline import run_joint_pipeline, run_pipeline
from megatron_cord.plan.simulation.rates import End, Rates
from megatron_cord.plan.speed import SERVER_GPUS, bytes_of_passes, speed
from megatron_cord.plan.work import Work

if TYPE_CHECKING:
    from megatron_cord.model.architecture import Architecture
    from megatron_cord.plan.trace.records import RankTrace
    from megatron_cord.trainer.config import RunConfig

#: Bytes that the optimizer moves for each parameter of its share: norm and clipping of the gradient 12, AdamW's reads
#: and writes 28, the new 16-bit weight 6; and for each parameter of the rank: a check of the gradient and its zeroing.
_SHARE_BYTES, _RANK_BYTES = 46, 8
_SEED = 0


@dataclass(frozen=True)
class SimulatedStep:
    """One end of the estimate.

    Attributes:
        seconds: by phase; their sum is the step, but with `rollout.schedule.ahead` the rollout runs beside the others.
        total: seconds of the step.
        bubble: seconds, among those of teacher and forward_backward, that the busiest pipeline stage waits.
        stragglers: seconds that would be gone if all GPUs were alike.
        collectives: seconds, among those of the phases, of collectives that nothing hides.
    """

    seconds: dict[str, float]
    total: float
    bubble: float
    stragglers: float
    collectives: float


def simulate(
    config: RunConfig,
    arch: Architecture,
    traces: Sequence[RankTrace],
    work: Work,
    gpu: Gpu,
    gpus: int,
    rollout_gpus: int,
    end: End,
) -> SimulatedStep:
    """Return the step at one end of the rates.

    Args:
        config: of the run.
        arch: of the student.
        traces: of each pipeline stage, of the same layout and microbatch; the number of replicas may differ.
        work: of a step on these GPUs.
        gpu: all of the same kind.
        gpus: that train.
        rollout_gpus: of servers; 0: the local engine on the trainer's.
        end: slow or fast.
    """
    step = _Step(config, traces, work, Rates.of(gpu), end)
    slow, fast = speed(config, arch, work, gpu, gpus, rollout_gpus).rollout
    rollout = slow if end == "slow" else fast
    engines = (rollout_gpus or gpus) // (SERVER_GPUS if rollout_gpus else 1)
    alike, apart = step.train([1.0] * gpus), step.train(step.speeds(gpus))
    slowest = max(step.speeds(engines))
    seconds = {
        "rollout": rollout * slowest,
        "teacher": alike.teacher,
        "forward_backward": alike.forward_backward,
        "stragglers": apart.total - alike.total,
        "gradient_reduction": step.reduction(alike.last_backward),
        "optimizer": step.optimizer(),
        "weight_sync": step.weight_sync(rollout_gpus),
    }
    total = sum(seconds.values())
    if config.rollout.schedule.ahead:
        total = max(seconds["rollout"], total - seconds["rollout"])
    seconds["checkpoint"] = step.checkpoint(gpus, total)
    return SimulatedStep(
        seconds=seconds,
        total=total + seconds["checkpoint"],
        bubble=alike.bubble,
        stragglers=seconds["stragglers"] + rollout * (slowest - 1),
        collectives=alike.collectives + seconds["gradient_reduction"] + step.gather_weights(),
    )


@dataclass(frozen=True)
class _Trained:
    """Seconds of the passes of a step on the slowest replica."""

    teacher: float
    forward_backward: float
    bubble: float
    collectives: float
    last_backward: float  #: of a microbatch

    @property
    def total(self) -> float:
        return self.teacher + self.forward_backward


class _Step:
    """What the phases share."""

    def __init__(self, config: RunConfig, traces: Sequence[RankTrace], work: Work, rates: Rates, end: End) -> None:
        self.config, self.traces, self.work, self.rates, self.end = config, traces, work, rates, end
        self.parallel, self.updates = config.parallel, work.minibatches * work.passes
        self.item = config.model.torch_dtype.itemsize
        self.replica = self.parallel.tp * self.parallel.cp
        self.copies = max(1, work.dp * self.replica // self.parallel.ep)  # of an expert
        self.operations = rates.peak.at(end) * rates.products.at(end)
        self.bandwidth = rates.memory.at(end) * rates.memory_share.at(end)

    def speeds(self, count: int) -> list[float]:
        """Return how many times longer than planned each of so many GPUs takes."""
        draws = random.Random(_SEED)
        return [1 + abs(draws.gauss(0.0, self.rates.spread.at(self.end))) for _ in range(count)]

    def train(self, speeds: Sequence[float]) -> _Trained:
        """Return the passes on the slowest replica, GPUs numbered as Megatron does: tp, cp, dp, pp."""
        work = self.work
        share = ceil(work.sequences / work.dp) * work.passes
        taught = ceil(work.scored / work.dp) * work.passes if self.traces[0].taught else 0
        batches = work.microbatches * self.updates
        taught_batches = ceil(taught / work.micro_batch)
        forward = [self._pass(t, "forward_backward", False, share, batches) for t in self.traces]
        backward = [self._pass(t, "forward_backward", True, share, batches) for t in self.traces]
        teacher = [self._pass(t, "teacher", False, taught, taught_batches) for t in self.traces]
        losses = [self._pass(t, "loss", False, share, batches) for t in self.traces]  # with vocabulary_over_stages
        runs = []
        for factors in self._replicas(speeds):
            timed = [[(a + b) * f for (a, b), f in zip(part, factors, strict=True)] for part in (forward, backward)]
            if self.parallel.vocabulary_over_stages:
                loss = max((a + b) * f for (a, b), f in zip(losses, factors, strict=True))
                student = run_joint_pipeline(timed[0], timed[1], loss, work.microbatches, self._send())
            else:
                student = run_pipeline(timed[0], timed[1], work.microbatches, self._send(), self.parallel.virtual_pp)
            read = run_pipeline(
                [(a + b) * f for (a, b), f in zip(teacher, factors, strict=True)],
                None,
                taught_batches,
                self._send(),
                self.parallel.virtual_pp,
            )
            runs.append(
                _Trained(
                    teacher=read.seconds,
                    forward_backward=student.seconds * self.updates,
                    bubble=student.idle * self.updates + read.idle,
                    collectives=max(b + d + e for (_, b), (_, d), (_, e) in zip(forward, backward, losses, strict=True))
                    * batches
                    + max(b for _, b in teacher) * taught_batches,
                    last_backward=min(timed[1]),
                )
            )
        return max(runs, key=lambda run: run.total)

    def reduction(self, last_backward: float) -> float:
        """Return the seconds of summing gradients that the last backward pass does not hide, over the updates."""
        reach = self.replica * self.work.dp
        each = max(self._ring(trace) * trace.state_bytes["gradients"] / max(1, trace.trained) for trace in self.traces)
        nbytes = each * (1 if self.config.optimizer.distributed else 2)
        takes = nbytes / self.rates.wire(reach, self.end) + self.rates.wait(reach, self.end) if nbytes else 0.0
        hidden = last_backward if self.config.optimizer.overlap_communication else 0.0
        return max(0.0, takes - hidden) * self.updates

    def gather_weights(self) -> float:
        """Return the seconds of gathering the new weights of the distributed optimizer, over the updates."""
        reach = self.replica * self.work.dp
        nbytes = max(map(self._ring, self.traces)) * self.item
        if not nbytes or not self.config.optimizer.distributed:
            return 0.0
        return (nbytes / self.rates.wire(reach, self.end) + self.rates.wait(reach, self.end)) * self.updates

    def optimizer(self) -> float:
        """Return the seconds of the updates, with the new weights everywhere."""
        trained = max(trace.trained for trace in self.traces)
        share = max(map(self._share, self.traces)) if self.config.optimizer.distributed else trained
        moved = (_SHARE_BYTES * share + _RANK_BYTES * trained) / self.bandwidth
        if self.config.optimizer.offload:  # gradients to the host and weights back
            moved += 8 * share / (self.rates.host.at(self.end) * self.rates.transport.at(self.end))
        return moved * self.updates + self.gather_weights()

    def weight_sync(self, rollout_gpus: int) -> float:
        """Return the seconds until the engines have the trained tensors."""
        transport, sync = self.rates.transport.at(self.end), self.config.rollout.weight_sync
        nbytes = sum(self._whole(trace.trained, trace.trained_experts) for trace in self.traces) * self.item
        reach = self.replica * self.parallel.pp
        gathered = nbytes * (1 - 1 / reach) / self.rates.wire(reach, self.end)
        if not rollout_gpus:
            return gathered + 2 * nbytes / self.bandwidth  # read and written
        if sync.transport == "disk":
            return gathered + 2 * nbytes / self.rates.storage.at(self.end)
        wire = (self.rates.host if sync.transport == "shared_memory" else self.rates.network).at(self.end) * transport
        return max(gathered, nbytes / wire) + self.rates.wait(rollout_gpus, self.end)

    def checkpoint(self, gpus: int, step: float) -> float:
        """Return a step's part of the seconds that saving keeps training waiting."""
        settings = self.config.checkpoint
        if not settings.interval:
            return 0.0
        states = sum(
            self._whole(t.parameters, t.experts) * self.item + self._whole(t.trained, t.trained_experts) * 12
            for t in self.traces
        )
        fullest = max(t.parameters * self.item + self._share(t) * 12 for t in self.traces)
        staging = fullest / (self.rates.host.at(self.end) * self.rates.transport.at(self.end))
        writing = states / (self.rates.storage.at(self.end) * ceil(gpus / NODE))
        waits = max(0.0, writing - settings.interval * step) if settings.asynchronous else writing
        return (staging + waits) / settings.interval

    def _whole(self, parameters: int, experts: int) -> int:
        """Return the parameters of all ranks of a stage's replica, of a rank's and of the experts among them."""
        return (parameters - experts) * self.parallel.tp + experts * self.parallel.ep

    def _share(self, trace: RankTrace) -> float:
        """Return the parameters that a rank updates where the ranks with the same ones share them out."""
        return (trace.trained - trace.trained_experts) / self.work.dp + trace.trained_experts / self.copies

    def _ring(self, trace: RankTrace) -> float:
        """Return the parameters that a rank sends where these ranks gather them, or sum their gradients."""
        return trace.trained - self._share(trace)

    def _pass(self, trace: RankTrace, phase: str, backward: bool, sequences: int, batches: int) -> tuple[float, float]:
        """Return the seconds of one microbatch's pass on a stage: products and memory; collectives within layers."""
        if not batches or phase not in trace.phases:
            return 0.0, 0.0
        counted = trace.phases[phase]
        seen, calls = (
            (trace.taught, trace.taught_microbatches) if phase == "teacher" else (trace.sequences, trace.microbatches)
        )
        scale = sequences / batches / seen
        flops = counted.backward_flops if backward else counted.forward_flops
        within = [
            c for c in counted.collectives if c.backward == backward and c.group in ("tp", "cp", "ep", "vocabulary")
        ]
        taken = 0.0
        for c in within:
            reach = {
                "ep": max(self.replica, self.parallel.ep),
                "vocabulary": self.replica * self.work.dp * self.parallel.pp,
            }.get(c.group, self.replica)
            taken += c.sent * scale / self.rates.wire(reach, self.end) + c.calls / calls * self.rates.wait(
                reach, self.end
            )
        moved = 0.0 if phase == "loss" else bytes_of_passes(trace.parameters, trace.trained, self.item)[backward]
        return flops * scale / self.operations + moved / self.bandwidth, taken

    def _replicas(self, speeds: Sequence[float]) -> Iterator[list[float]]:
        """Yield the factors of each replica's stages; those of a replica whose GPUs are alike once."""
        size, stages = self.replica, self.parallel.pp
        seen = set()
        for number in range(self.work.dp):
            factors = tuple(max(speeds[(stage * self.work.dp + number) * size :][:size]) for stage in range(stages))
            if factors not in seen:
                seen.add(factors)
                yield list(factors)

    def _send(self) -> float:
        """Return the seconds from a stage to the next, of a microbatch's hidden states."""
        if self.parallel.pp == 1:
            return 0.0
        counted = self.traces[0].phases["forward_backward"].collectives
        sends = [c for c in counted if c.kind == "send" and c.group == "pp" and c.nbytes]
        calls = sum(c.calls for c in sends)
        # A message of its shape goes before each tensor.
        nbytes = 2 * sum(c.nbytes for c in sends) / calls if calls else 0.0
        reach = self.replica * self.work.dp * self.parallel.pp
        return nbytes / self.rates.wire(reach, self.end) + 2 * self.rates.wait(reach, self.end)
