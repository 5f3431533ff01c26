"""The loss of microbatches formed by all pipeline stages, each on its part of the vocabulary.

The last stage sends the rows of hidden states that the loss is of; every stage then computes the same loss as it would
alone, with the ranks of all stages in the place of the tensor-parallel ones. Gradients are formed at once: of the
hidden states, which the last stage's backward pass starts from, and of each part of the output weight, which are
collected when all microbatches are done. Legend: n response tokens of a microbatch on this context-parallel rank; H
hidden, V vocabulary, TP ranks, P stages, R rows of a part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from megatron_cord.losses.autograd import apply_function
from megatron_cord.model.lalm import LALM
from megatron_cord.parallel.vocabulary_parts import collect_rows, spread_rows
from megatron_cord.trainer.step.batching.batches import Microbatch
from megatron_cord.trainer.step.streams import ContrastConfig
from megatron_cord.trainer.step.teacher import TaughtTokens

#: From a microbatch, what the teacher gives of it, the student's hidden states [n, H] and output weight [R, H] or
#: [V/TP, H], to the loss, a scalar.
LossOf = Callable[[Microbatch, TaughtTokens | None, Tensor, Tensor], Tensor]


class JointLosses:
    """The losses of one pass through the pipeline. Made by all stages together: the weights are spread.

    Args:
        model: the wrapped student.
        teachers: the models of the teachers, by name.
        contrasts: of the streams, by name.
        microbatches: of the pass; the same on all stages.
        taught: what the teacher gives of each, on the last stage; None on all stages: no teacher is used.
        loss_of: what is computed.
        train: whether gradients are formed.
    """

    def __init__(
        self,
        model: DistributedDataParallel,
        teachers: Mapping[str, LALM],
        contrasts: Mapping[str, ContrastConfig | None],
        microbatches: Sequence[Microbatch],
        taught: Sequence[TaughtTokens | None] | None,
        loss_of: LossOf,
        *,
        train: bool,
    ) -> None:
        self._wrapped, self._teachers, self._contrasts = model, teachers, contrasts
        self._microbatches, self._taught, self._loss_of, self._train = microbatches, taught, loss_of, train
        self._student: LALM = model.module
        self._layout = self._student.layout
        self._source = (self._layout.config.pp - 1) * self._layout.config.tp  # in the group: a rank of the last stage
        needed = {id(each): each for each in (self._teacher(m) for m in microbatches) if each is not None}
        self._parts = {key: self._spread(each) for key, each in {id(self._student): self._student, **needed}.items()}
        self._part = torch.nn.Parameter(self._parts[id(self._student)], requires_grad=train and self._is_trained())
        if self._part.requires_grad:  # fp32 sums, as Megatron's DDP gives a parameter (`losses` adds to them)
            self._part.main_grad = torch.zeros_like(self._part, dtype=torch.float32)  # type: ignore[attr-defined]
            self._part.grad_added_to_main_grad = False  # type: ignore[attr-defined]

    def finish(self, number: int, rows: Tensor) -> Tensor:
        """Form a microbatch's loss on the last stage.

        Args:
            number: of the microbatch.
            rows: [n, H], the student's hidden states.

        Returns:
            the loss, a scalar that passes the gradient formed on to the rows.
        """
        loss, gradient = self.form(number, rows.detach())
        if gradient is None:
            return loss
        (carried,) = apply_function(_Carried, rows, loss, gradient)
        return carried

    def join(self, number: int) -> None:
        """Take part in a microbatch's loss on another stage."""
        self.form(number, None)

    def end(self) -> None:
        """Collect the gradient of the output weight on the last stage."""
        if not self._part.requires_grad:
            return
        weight: Any = self._student.output_weight if self._layout.is_last_stage else None
        part: Any = self._part
        into = None if weight is None else weight.main_grad
        collect_rows(part.main_grad, into, _vocabulary(self._student), self._layout)
        if weight is not None and self._wrapped.ddp_config.overlap_grad_reduce:
            # No hook of its own has told DDP, which else would reduce the weight's bucket too early.
            self._wrapped.param_to_bucket_group[weight].register_grad_ready(weight)

    def form(self, number: int, rows: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return a microbatch's loss and the gradient of the student's hidden states [n, H]. Collective."""
        batch = self._microbatches[number]
        hidden = self._from_last_stage(rows, batch, self._student).requires_grad_(self._train)
        taught = self._taught_tokens(batch, None if self._taught is None else self._taught[number])
        with torch.set_grad_enabled(self._train):
            loss = self._loss_of(batch, taught, hidden, self._part)
        if not loss.requires_grad:
            return loss, None
        wanted = [hidden, self._part] if self._part.requires_grad else [hidden]
        gradient, *_ = torch.autograd.grad(loss, wanted, allow_unused=True)  # the part's is in its main_grad
        return loss.detach(), gradient

    def _taught_tokens(self, batch: Microbatch, given: TaughtTokens | None) -> TaughtTokens | None:
        """Return what the teacher gives of a microbatch, with this rank's part of its output weight."""
        teacher = self._teacher(batch)
        if teacher is None:
            return None
        hidden = None if given is None else given.hidden.to(self._layout.device, non_blocking=True)
        contrast, gate = self._contrasts.get(batch.stream), None
        if batch.contrast is not None and contrast is not None and contrast.gate is not None:
            gate = torch.empty(len(batch.target_ids), device=self._layout.device) if given is None else given.gate
            assert gate is not None
            gate = self._broadcast(gate.float())
        weight = self._part.detach() if teacher is self._student else self._parts[id(teacher)]
        return TaughtTokens(self._from_last_stage(hidden, batch, teacher), weight, gate)

    def _from_last_stage(self, hidden: Tensor | None, batch: Microbatch, model: LALM) -> Tensor:
        """Return the last stage's hidden states [n, H] of a model."""
        if hidden is None:
            size = len(batch.target_ids), model.arch.language.hidden_size
            hidden = torch.empty(*size, dtype=model.config.params_dtype, device=self._layout.device)
        return self._broadcast(hidden.contiguous())

    def _broadcast(self, tensor: Tensor) -> Tensor:
        dist.broadcast(tensor, group=self._layout.vocabulary_group, group_src=self._source)
        return tensor

    def _teacher(self, batch: Microbatch) -> LALM | None:
        """Return the model that scores a microbatch, if one does in this pass."""
        return None if batch.teacher is None or self._taught is None else self._teachers[batch.taught_by]

    def _spread(self, model: LALM) -> Tensor:
        weight = model.output_weight.detach() if self._layout.is_last_stage else None
        arch = model.arch.language
        return spread_rows(weight, _vocabulary(model), arch.hidden_size, model.config.params_dtype, self._layout)

    def _is_trained(self) -> bool:
        """Return whether the output weight is trained: as all of the language model, on all stages, beside LoRA."""
        return any(parameter.requires_grad for parameter in self._student.language_model.parameters())


class _Carried(torch.autograd.Function):
    """apply(rows [n, H], loss, gradient [n, H]) → the loss, whose gradient by the rows is what is given."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, loss: Tensor, gradient: Tensor) -> tuple[Tensor]:
        ctx.save_for_backward(gradient)
        return (loss.clone(),)

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * scale, None, None


def _vocabulary(model: LALM) -> int:
    """Return V, padded."""
    return model.arch.language.padded_vocab_size(model.layout.config.tp)
