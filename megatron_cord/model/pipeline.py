"""Microbatches through the stages of the model: Megatron's schedules, 1F1B or interleaved.

Where all stages form the loss together, 1F1B is stretched (`parallel.loss_slots`).

Interleaved stages need at least as many microbatches as there are pipeline ranks, and ranks that share out the experts
of a mixture, which exchange tokens in each layer, equally many, though each may have sequences of its own. What is
missing is filled up in front by a few tokens of padding without a part in the loss.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.schedules import (
    forward_backward_pipelining_with_interleaving,
    forward_backward_pipelining_without_interleaving,
)
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_cord.model.lalm import LALM, ModelInput
from megatron_cord.parallel.loss_slots import LossSlots
from megatron_cord.parallel.stage_messages import StageCommunicator
from megatron_cord.parallel.stages import group_size
from megatron_cord.parallel.transfers import to_device


@dataclass(frozen=True)
class JointLoss:
    """How the stages before the last one take part in the loss of each microbatch."""

    join: Callable[[int], None]  #: called with a microbatch's number while the last stage calls ``finish`` with it
    #: called on all stages after the last backward pass, before gradients are reduced over data-parallel ranks
    end: Callable[[], None]


def run_pipeline(
    model: LALM,
    inputs: Sequence[ModelInput],
    finish: Callable[[int, Tensor], Tensor],
    *,
    train: bool,
    wrapped: torch.nn.Module | None = None,
    joint: JointLoss | None = None,
) -> bool:
    """Run the forward passes of microbatches, and where it trains the backward passes. Collective over the pipeline.

    With `Layout.experts_span_replicas` also over the expert-parallel ranks. Return whether there were any passes.

    Args:
        model: this rank's part.
        inputs: of the microbatches; every stage has the same.
        finish: called on the last stage with a microbatch's number and its hidden states [S/CP, B, H], in order; it
            returns the loss, a scalar.
        train: whether there are backward passes.
        wrapped: the model in DDP, where gradients are reduced.
        joint: what the other stages do for the loss, with `parallel.vocabulary_over_stages`; None: nothing.
    """
    filler = padding_in_front(model, len(inputs))
    given = [*filler, *inputs]
    if not given:
        return False

    def forward_step(numbers: Iterator[int], module: Any) -> Any:
        number = next(numbers)

        def loss_func(hidden: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            real = number >= len(filler)
            loss = finish(number - len(filler), hidden) if real else hidden.sum() * 0.0
            return loss, torch.ones((), dtype=torch.int64, device=hidden.device), {}

        return module(given[number]), loss_func

    common = {
        "forward_step_func": forward_step,
        "num_microbatches": len(given),
        "seq_length": max(each.token_ids.shape[1] for each in given),
        "micro_batch_size": max(len(each.sample_ids) for each in given),
        "forward_only": not train,
    }
    if joint is not None:
        _run_jointly(model, joint, len(filler), common)
        return True
    if len(model.chunks) == 1:
        module = model if wrapped is None else wrapped
        get_forward_backward_func()(data_iterator=iter(range(len(given))), model=[module], **common)
        return True
    config = copy.copy(model.config)  # with what the optimizer has set by now
    config.virtual_pipeline_model_parallel_size = len(model.chunks)
    config.microbatch_group_size_per_vp_stage = group_size(len(given), model.layout.config.pp)
    assert model.layout.channels is not None
    communicator = StageCommunicator(model.layout.pp_group, model.layout.channels, config)
    forward_backward_pipelining_with_interleaving(
        data_iterator=[iter(range(len(given))) for _ in model.chunks],
        model=[_Stage(model, config, number) for number in range(len(model.chunks))],
        p2p_communicator=communicator,
        pg_collection=model.layout.groups,
        **common,
    )
    communicator.finish()
    return True


def _run_jointly(model: LALM, joint: JointLoss, fillers: int, common: dict[str, Any]) -> None:
    """Run 1F1B with losses that all stages form together; microbatches of padding, in front, have none."""
    config, count = copy.copy(model.config), common["num_microbatches"]
    reduce = config.finalize_model_grads_func

    def end_and_reduce(*arguments: Any, **options: Any) -> None:
        joint.end()
        reduce(*arguments, **options)

    def join(number: int) -> None:
        if number >= fillers:
            joint.join(number - fillers)

    if reduce is not None:
        config.finalize_model_grads_func = end_and_reduce
    assert model.layout.channels is not None
    communicator = LossSlots(model.layout.pp_group, model.layout.channels, config, join, count)
    forward_backward_pipelining_without_interleaving(
        data_iterator=iter(range(count)),
        model=[_Stage(model, config, 0)],
        p2p_communicator=communicator,
        pg_collection=model.layout.groups,
        **common,
    )
    communicator.finish()


class _Stage(MegatronModule):  # type: ignore[misc]
    """One of a rank's stages, as Megatron's schedule calls it."""

    def __init__(self, model: LALM, config: Any, number: int) -> None:
        super().__init__(config)
        self.model, self.number, self.model_type = model, number, model.model_type

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Take the previous stage's activations."""
        self.model.chunks[self.number].set_input_tensor(input_tensor)

    def forward(self, given: ModelInput) -> Tensor:
        """Run the stage. DDP's hooks are at the parameters, so its forward pass can be left out."""
        hidden: Tensor = self.model(given, self.number)
        return hidden


def padding_in_front(model: LALM, microbatches: int) -> list[ModelInput]:
    """Return the microbatches of padding that a step of so many others needs, as short as the layout allows.

    With `Layout.experts_span_replicas` collective over the expert-parallel ranks.
    """
    most = microbatches
    if model.layout.experts_span_replicas:
        numbers = torch.full((), microbatches, device=model.layout.device)
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX, group=model.layout.ep_group)
        most = int(numbers)
    if most and len(model.chunks) > 1:
        most = max(most, model.layout.config.pp)
    count = most - microbatches
    token = 0 if model.arch.audio_token_id != 0 else 1
    ids = torch.full((1, model.layout.sequence_sharding.multiple_of), token)
    return [ModelInput(to_device(ids, model.layout.device), None, None, ("padding",), None, ids) for _ in range(count)]
