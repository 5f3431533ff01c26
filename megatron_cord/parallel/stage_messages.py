"""Messages between pipeline stages that are interleaved, or that form the loss together (`loss_slots`).

An interleaved rank sends activations to the next rank and gradients to the previous one, the last rank to the first and
back. Megatron-Core exchanges both kinds in one batch, their shapes before. Backends match messages between two ranks by
their order, so with two ranks one rank's gradient is received into the other's buffer for an activation: gradients are
wrong without an error. And a rank that waits for a gradient's shape does not send the activation that its peer needs to
compute that gradient.

Here each kind, and with two ranks each direction, has a process group of its own: messages in a group are of one kind,
from one rank to one other, in the order of the schedule. A call starts all its sends before it waits, and waits only
for what it receives. So a call depends only on earlier calls of the schedule.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor

from megatron_cord.errors import CordError
from megatron_cord.parallel import portability

Channels = tuple[tuple[dist.ProcessGroup, ...], tuple[dist.ProcessGroup, ...]]
"""Groups of a pipeline's ranks: of activations and of gradients; with two ranks by sender, else one."""


class StageCommunicator(P2PCommunicator):  # type: ignore[misc]
    """Megatron's communicator, with messages in channels.

    Args:
        pp_group: the pipeline's ranks.
        channels: as `connect_stages` returns them.
        config: of the model; stages exchange shapes before tensors.
    """

    def __init__(self, pp_group: dist.ProcessGroup, channels: Channels, config: ModelParallelConfig) -> None:
        super().__init__(pp_group, config)
        if not config.variable_seq_lengths or config.overlap_p2p_comm:
            raise CordError("StageCommunicator is for stages that exchange shapes and wait for their messages")
        self._channels, self._rank, self._size = channels, pp_group.rank(), pp_group.size()
        self._under_way: list[tuple[Any, Tensor]] = []  # what is sent must exist until it is

    def _communicate(
        self,
        *,
        tensor_send_next: Tensor | None,
        tensor_send_prev: Tensor | None,
        recv_prev: bool,
        recv_next: bool,
        tensor_shape: Any,
        wait_on_reqs: bool = True,
    ) -> tuple[Tensor | None, Tensor | None, None]:
        """Send what is given and return what is received; all arguments and results are Megatron's."""
        self._post(tensor_send_next, tensor_send_prev)
        self._between(tensor_send_next is not None, recv_next)
        return self._take(recv_prev, recv_next)

    def _between(self, sends_activation: bool, awaits_gradient: bool) -> None:
        """Do what is due between sending and waiting: here nothing."""

    def _post(self, tensor_send_next: Tensor | None, tensor_send_prev: Tensor | None) -> None:
        """Send what is given, without waiting."""
        self._under_way = [each for each in self._under_way if not each[0].is_completed()]
        device = portability.device()
        for gradient, given in enumerate((tensor_send_next, tensor_send_prev)):
            if given is not None:
                message = given.detach().contiguous()
                self._send(gradient, torch.tensor(message.shape, device=device))
                self._send(gradient, message)

    def _take(self, recv_prev: bool, recv_next: bool) -> tuple[Tensor | None, Tensor | None, None]:
        """Wait for what is to be received."""
        device = portability.device()
        shapes = [
            self._receive(gradient, torch.empty(3, dtype=torch.int64, device=device)) if awaited else None
            for gradient, awaited in enumerate((recv_prev, recv_next))
        ]
        received: list[tuple[Any, Tensor] | None] = []
        for gradient, shape in enumerate(shapes):
            if shape is None:
                received.append(None)
                continue
            shape[0].wait()
            into = torch.empty(shape[1].tolist(), dtype=self.config.pipeline_dtype, device=device)
            received.append(self._receive(gradient, into))
        for each in received:
            if each is not None:
                each[0].wait()
                each[1].requires_grad_(True)
        activation, gradients = (None if each is None else each[1] for each in received)
        return activation, gradients, None

    def finish(self) -> None:
        """Wait for what is still in flight at the end of a pass."""
        for request, _ in self._under_way:
            request.wait()
        self._under_way.clear()

    def _send(self, gradient: int, tensor: Tensor) -> None:
        target = self.prev_rank if gradient else self.next_rank
        group = _channel(self._channels, gradient, self._rank)
        self._under_way.append((dist.isend(tensor, target, group=group), tensor))

    def _receive(self, gradient: int, into: Tensor) -> tuple[Any, Tensor]:
        source, step = (self.next_rank, 1) if gradient else (self.prev_rank, -1)
        group = _channel(self._channels, gradient, (self._rank + step) % self._size)
        return dist.irecv(into, source, group=group), into


def connect_stages(pipelines: Sequence[Sequence[int]], rank: int, timeout: timedelta | None = None) -> Channels:
    """Make the channels of all pipelines and return those of this rank. Collective over all ranks.

    A message is sent through each, so that later ones find connections.

    Args:
        pipelines: global ranks of each pipeline, in order; the same on all ranks.
        rank: this one's global number.
        timeout: of a message; None is the backend's.
    """
    mine: list[tuple[dist.ProcessGroup, ...]] = []
    for _ in range(2):
        for ranks in pipelines:
            made = tuple(dist.new_group(list(ranks), timeout=timeout) for _ in range(2 if len(ranks) == 2 else 1))
            if rank in ranks:
                mine.append(made)
    activations, gradients = mine
    (own,) = (list(ranks) for ranks in pipelines if rank in ranks)
    place, size = own.index(rank), len(own)
    channels = activations, gradients
    for gradient, step in ((0, 1), (1, -1)):
        target, source = (place + step) % size, (place - step) % size
        given, taken = (torch.zeros(1, device=portability.device()) for _ in range(2))

        def send(gradient: int = gradient, target: int = target, given: Tensor = given) -> Any:
            return dist.isend(given, own[target], group=_channel(channels, gradient, place))

        def receive(gradient: int = gradient, source: int = source, taken: Tensor = taken) -> Any:
            return dist.irecv(taken, own[source], group=_channel(channels, gradient, source))

        # Connections are made one after the other; a ring of ranks that all receive first would deadlock.
        requests = [post() for post in ((send, receive) if place % 2 == 0 else (receive, send))]
        for request in requests:
            request.wait()
    return activations, gradients


def _channel(channels: Channels, gradient: int, sender: int) -> dist.ProcessGroup:
    """Return the group in which a pipeline rank sends one kind of message."""
    groups = channels[gradient]
    return groups[sender % len(groups)]
