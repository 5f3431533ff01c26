"""What a trace counts: bytes, floating-point operations and collectives of one rank, by phase of the step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

#: Phases of a step, in order; what lies between them is "rest". The loss is a phase of its own where all stages form it
#: together, and a part of forward_backward elsewhere.
PHASES = ("teacher", "forward_backward", "loss", "gradient_reduction", "optimizer", "rest")

#: Bytes that a rank of n sends for a message of one byte, by the ring algorithms of NCCL (docs of nccl-tests,
#: "Performance reported by NCCL tests"): the message of an all-gather or a reduce-scatter is the whole, gathered one.
RING: Mapping[str, Callable[[int], float]] = {
    "all_reduce": lambda n: 2 * (n - 1) / n,
    "all_gather": lambda n: (n - 1) / n,
    "reduce_scatter": lambda n: (n - 1) / n,
    "all_to_all": lambda n: (n - 1) / n,  # of what is spread evenly over the ranks
    "broadcast": lambda n: 1.0,
    "reduce": lambda n: 1.0,
    "send": lambda n: 1.0,
    "receive": lambda n: 0.0,
}


@dataclass(frozen=True)
class Collective:
    """Collectives of one kind and group of a phase.

    Attributes:
        kind: a key of ``RING``.
        group: tp, dp, pp, cp, ep, vocabulary (all stages' ranks that share it), world or other.
        ranks: of the group.
        backward: whether the backward pass makes them.
        calls: how many.
        nbytes: of their messages, all calls together.
    """

    kind: str
    group: str
    ranks: int
    backward: bool
    calls: int
    nbytes: int

    @property
    def sent(self) -> float:
        """Bytes that a rank sends."""
        return RING[self.kind](self.ranks) * self.nbytes


@dataclass(frozen=True)
class PhaseTrace:
    """One phase of one rank.

    Attributes:
        forward_flops: operations of matrix products, convolutions and attention outside of the backward pass.
        backward_flops: of the backward pass; what is computed again is among them.
        peak: bytes, the most that existed at a time during it.
        grown: bytes that it left behind, such as the moments of a first update.
        collectives: of more than one rank.
    """

    forward_flops: float
    backward_flops: float
    peak: int
    grown: int
    collectives: tuple[Collective, ...]

    @property
    def flops(self) -> float:
        """Forward and backward."""
        return self.forward_flops + self.backward_flops

    def sent(self, group: str) -> float:
        """Return the bytes that the rank sends within groups of this name."""
        return sum(c.sent for c in self.collectives if c.group == group)


@dataclass(frozen=True)
class RankTrace:
    """One rank.

    Attributes:
        stage: its pipeline stage.
        rank: its global number.
        world: how many there are.
        parameters: on this rank.
        trained: of them, those with a gradient.
        state_bytes: by purpose, as built: weights, gradients, teacher, optimizer (its fp32 weights, and after the first
            update its moments).
        sequences: that it trained on in the step, each pass counted.
        taught: of them, those that the teacher read.
        microbatches: of the student in the step.
        taught_microbatches: of the teacher.
        phases: by the names of ``PHASES``.
        seconds: that tracing took.
        experts: of the parameters, those of experts, which expert-parallel ranks share out.
        trained_experts: of them, those with a gradient.
    """

    stage: int
    rank: int
    world: int
    parameters: int
    trained: int
    state_bytes: Mapping[str, int]
    sequences: int
    taught: int
    microbatches: int
    taught_microbatches: int
    phases: Mapping[str, PhaseTrace]
    seconds: float
    experts: int = 0
    trained_experts: int = 0

    @property
    def flops(self) -> float:
        """Operations of the whole step."""
        return sum(phase.flops for phase in self.phases.values())

    @property
    def peak(self) -> int:
        """Bytes, the most that exist at a time in a later step, where the optimizer's moments are there already."""
        moments = self.phases["optimizer"].grown
        return max(p.peak + (0 if name in ("optimizer", "rest") else moments) for name, p in self.phases.items())

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        plain = asdict(self)
        for name, phase in self.phases.items():
            for entry, collective in zip(plain["phases"][name]["collectives"], phase.collectives, strict=True):
                entry["sent"] = collective.sent
        return plain | {"flops": self.flops, "peak": self.peak}
