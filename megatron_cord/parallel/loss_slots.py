"""The schedule of a pipeline whose stages all take part in the loss of each microbatch.

Stage s has d = P − 1 − s stages behind it, F_j and B_j are its forward and backward pass of microbatch j, and L_i is
the loss of microbatch i, which all stages form at the same time. In 1F1B a stage runs d forward passes before the first
backward pass, and between two losses a gradient would have to pass all stages, one after the other. Here a stage runs
2 d of them first, its order being F_j, L_{j−d}, B_{j−2d}, F_{j+1}, …: between L_i and L_{i+1} it runs B_{i−d} and
F_{i+1+d}. The stage before it (d + 1) made the input of F_{i+1+d}, and the stage behind it (d − 1) the gradient for
B_{i−d}, between L_{i−1} and L_i; on the last stage B_i follows L_i. So no pass waits for one between the same two
losses, all stages work at once, and the pipeline's bubble is that of 1F1B. In return 2 d + 1 microbatches are in flight
on a stage instead of d + 1.

No deadlock: give F_{i+1+d}, B_{i−d} and L_i the number i. A rank goes through its passes with numbers that never fall,
and L_i comes first of those with the number i. It sends without waiting, and waits for passes of its neighbours, whose
numbers are lower by one, and for L_i, which all ranks reach when all that has lower numbers is done: on the last stage
that includes F_i. So the operations with the lowest number that is not finished can always go on. Where forward or
backward passes run out, the losses that are left come before the gradients that need them.

The order is that of Megatron's own 1F1B in a pipeline of 2 P − 1 stages, of which only every second one computes
(`_Stretched`), with the losses where messages are exchanged.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist
from megatron.core.model_parallel_config import ModelParallelConfig

from megatron_cord.parallel.stage_messages import Channels, StageCommunicator


class _Stretched:
    """The pipeline's ranks with a place between each two that nobody has, as far as Megatron's schedule looks."""

    def __init__(self, pp_group: dist.ProcessGroup) -> None:
        self._group = pp_group

    def rank(self) -> int:
        """Return 2 s."""
        return 2 * self._group.rank()

    def size(self) -> int:
        """Return 2 P − 1."""
        return 2 * self._group.size() - 1


class LossSlots(StageCommunicator):
    """A communicator that has this stage take part in the losses; on the last stage the schedule's loss does so.

    Args:
        pp_group: as for `StageCommunicator`.
        channels: likewise.
        config: likewise.
        join: called once for each microbatch, in order, with its number; not on the last stage.
        microbatches: how many.
    """

    def __init__(
        self,
        pp_group: dist.ProcessGroup,
        channels: Channels,
        config: ModelParallelConfig,
        join: Callable[[int], None],
        microbatches: int,
    ) -> None:
        super().__init__(pp_group, channels, config)
        self._behind = pp_group.size() - pp_group.rank() - 1
        self._join, self._microbatches = join, microbatches if self._behind else 0
        self._joined = self._forward = self._backward = 0  # losses, activations sent, gradients awaited so far
        self.pp_group = _Stretched(pp_group)

    def _between(self, sends_activation: bool, awaits_gradient: bool) -> None:
        """Form the losses that are due."""
        if sends_activation:
            self._forward += 1
            self._join_before(self._forward - self._behind)
        if awaits_gradient:
            self._backward += 1
            self._join_before(self._backward + self._behind)

    def finish(self) -> None:
        """Form the losses that are left, of a pass without gradients, and wait for what is still under way."""
        self._join_before(self._microbatches)
        super().finish()

    def _join_before(self, number: int) -> None:
        """Take part in all losses of microbatches before this one that have not been."""
        while self._joined < min(number, self._microbatches):
            self._join(self._joined)
            self._joined += 1
