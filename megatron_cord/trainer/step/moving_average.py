"""Weights of a teacher that follows the student: an exponential moving average, θ̄ ← d·θ̄ + (1 − d)·θ after each update.

The averages are kept in float32, on the model's layout, and rounded to the teacher's precision for its forward pass: in
bfloat16, a change of (1 − d)·θ would be lost. A teacher of float32 is its own average. Only the language model has
averages, as the teacher's view is text alone.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from torch import Tensor

from megatron_cord.model.lalm import LALM

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
                average = own if own.dtype == torch.float32 else own.to("cpu" if offload else own.device, torch.float32)
                self._followed[name] = (average, own, parameter)

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the student's current weights."""
        for average, taught, trained in self._followed.values():
            average.lerp_(trained.to(average.device, torch.float32), 1 - self.decay)
            taught.copy_(average)

    def sharded_state_dict(self) -> dict[str, Any]:
        """Return the averages for dist_checkpointing, under names that begin with ``teacher.``."""
        whole = self.teacher.language_model.sharded_state_dict(prefix=_PREFIX)
        state = {}
        for name, (average, _, _) in self._followed.items():
            entry = whole.get(_PREFIX + name)
            if entry is not None:  # the last stage's copy of tied embeddings may be left to the first
                more = {"dtype": average.dtype} if isinstance(entry, ShardedTensor) else {}
                state[name] = replace(entry, data=average, **more)
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore averages that `sharded_state_dict` described."""
        for name, value in state.items():
            average, taught, _ = self._followed[name]
            average.copy_(value)
            taught.copy_(average)
