"""Messages between pipeline stages where one neighbour is both the previous and the next one.

With two ranks and interleaved stages a rank sends its peer activations and gradients in one batch. Backends match
messages between two ranks by their order, and Megatron-Core posts them in an order in which one rank's gradients meet
the other's buffer for activations, shapes included. Here gradients have a process group of their own, so each group
carries one kind, whose order is the same on both ranks. With more ranks the two kinds never share a pair of ranks in
one direction, and Megatron's own messages are right.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor

from megatron_cord.errors import CordError


class PairCommunicator(P2PCommunicator):  # type: ignore[misc]
    """Megatron's communicator for two ranks that are each other's previous and next stage.

    Args:
        pp_group: the two ranks; activations travel in it.
        gradients: another group of the same ranks, for gradients.
        config: of the model; stages exchange shapes before tensors.
    """

    def __init__(self, pp_group: dist.ProcessGroup, gradients: dist.ProcessGroup, config: ModelParallelConfig) -> None:
        super().__init__(pp_group, config)
        if pp_group.size() != 2 or not config.variable_seq_lengths or config.overlap_p2p_comm:
            raise CordError(
                "PairCommunicator is for two pipeline ranks that exchange shapes and wait for their messages"
            )
        self._gradients = gradients

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
        """Send and receive at once, shapes first; all arguments and results are Megatron's. Returns when it is done."""
        sent = [None if each is None else each.detach().contiguous() for each in (tensor_send_next, tensor_send_prev)]
        device = torch.cuda.current_device()
        shapes = [None if each is None else torch.tensor(each.shape, device=device) for each in sent]
        awaited = [torch.empty(3, dtype=torch.int64, device=device) if w else None for w in (recv_prev, recv_next)]
        self._exchange(shapes, awaited)
        received = [
            None
            if shape is None
            else torch.empty(shape.tolist(), dtype=self.config.pipeline_dtype, device=device, requires_grad=True)
            for shape in awaited
        ]
        self._exchange(sent, received)
        return received[0], received[1], None

    def _exchange(self, sent: list[Tensor | None], received: list[Tensor | None]) -> None:
        """Send to and receive from the peer: activations first, then gradients, each in their group; then wait."""
        requests = []
        for group, given, taken in zip((self.pp_group, self._gradients), sent, received, strict=True):
            operations = [
                dist.P2POp(operation, tensor, self.next_rank, group)
                for operation, tensor in ((dist.isend, given), (dist.irecv, taken))
                if tensor is not None
            ]
            if operations:
                requests += dist.batch_isend_irecv(operations)
        for request in requests:
            request.wait()
