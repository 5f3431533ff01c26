"""Weights of a teacher that follows the student: an exponential moving average, θ̄ ← d·θ̄ + (1 − d)·θ after each update.

The averages are kept in float32, on the model's layout, and rounded to the teacher's precision for its forward pass: in
bfloat16, a change of (1 − d)·θ would be lost. A teacher of float32 is its own average. Only the language model has
averages, as the teacher's view is text alone.

Averages in host memory are pinned. An update queues their way to the device, the sum and the way back on a stream of
its own, tensor by tensor, and the host goes on: weight sync and the next rollouts run meanwhile, and the teacher's next
forward pass is queued behind it. On the device that takes one tensor's float32 copies at a time.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from torch import Tensor

from megatron_cord.model.lalm import LALM
from megatron_cord.parallel.transfers import to_host

_PREFIX = "teacher.language_model."


class MovingAverage:
    """The averages of one rank's part.

    Args:
        decay: d, between 0 and 1.
        student: its trained parameters are averaged, from their present values on.
        teacher: is given the averages.
        offload: keep averages that are not the teacher's own tensors in host memory.
    """

    def __init__(self, decay: float, student: LALM, teacher: LALM, *, offload: bool) -> None:
        self.decay, self.teacher = decay, teacher
        taught = dict(teacher.language_model.named_parameters())
        # (average, teacher's, student's) by name
        self._followed: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        for name, parameter in student.language_model.named_parameters():
            if parameter.requires_grad:
                own = taught[name].data.copy_(parameter.data)
                average = own if own.dtype == torch.float32 else own.float()
                if offload and average is not own:
                    average = to_host(average)
                self._followed[name] = (average, own, parameter)
        self._stream: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._updated = torch.cuda.current_stream().record_event()  #: behind the last copy to the averages

    @torch.no_grad()
    def update(self) -> None:
        """Queue a move of the averages towards the student's current weights; `wait` before they are read."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for average, taught, trained in self._followed.values():
                moved = average.to(taught.device, non_blocking=True)  # the average itself where it lies there
                moved.lerp_(trained.float(), 1 - self.decay)
                taught.copy_(moved)
                if moved is not average:
                    average.copy_(moved, non_blocking=True)
            self._updated = self._stream.record_event()

    def wait(self) -> None:
        """Queue what follows on the present stream behind the last update."""
        torch.cuda.current_stream().wait_event(self._updated)

    def sharded_state_dict(self) -> dict[str, Any]:
        """Return the averages for dist_checkpointing, under names that begin with ``teacher.``.

        Of those in pinned memory copies: a forked process would see later updates in it.
        """
        self._updated.synchronize()
        whole = self.teacher.language_model.sharded_state_dict(prefix=_PREFIX)
        state = {}
        for name, (average, _, _) in self._followed.items():
            entry = whole.get(_PREFIX + name)
            if entry is not None:  # the last stage's copy of tied embeddings may be left to the first
                more = {"dtype": average.dtype} if isinstance(entry, ShardedTensor) else {}
                data = average.clone() if average.is_pinned() else average
                state[name] = replace(entry, data=data, **more)
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore averages that `sharded_state_dict` described."""
        self._updated.synchronize()
        for name, value in state.items():
            average, taught, _ = self._followed[name]
            average.copy_(value)
            taught.copy_(average)
