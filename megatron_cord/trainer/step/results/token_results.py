"""What a step computed for each token, from the last pipeline stage to every rank."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, islice, pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_cord.parallel.layout import Layout
from megatron_cord.parallel.objects import all_gather_json
from megatron_cord.rollout.types import TokenResults
from megatron_cord.trainer.step.batching.batches import Microbatch
from megatron_cord.trainer.step.microbatch_loss import MicrobatchLoss
from megatron_cord.trainer.step.teacher import whole_tokens


def gather_token_results(
    microbatches: Sequence[Microbatch], losses: Sequence[MicrobatchLoss], layout: Layout
) -> dict[int, TokenResults]:
    """Return token results of all sequences of these microbatches, by index. Collective over all ranks.

    The student's log-probabilities are those before the step's first update: what the engine sampled from.

    Args:
        microbatches: of this rank.
        losses: of each on the last stage, none on the others.
        layout: this rank's place.
    """
    mine: list[list[Any]] = []
    if losses and dist.get_rank(layout.tp_group) == 0:
        tensors = [_fields(batch, loss, layout) for batch, loss in zip(microbatches, losses, strict=True)]
        flat = [field for fields in tensors for field in fields if field is not None]
        numbers = iter(torch.cat(flat).tolist())  # one read: each waits for the device
        for batch, fields in zip(microbatches, tensors, strict=True):
            lists = [None if field is None else list(islice(numbers, len(field))) for field in fields]
            bounds = accumulate((len(s.rollout.token_ids) for s in batch.sequences), initial=0)
            for sequence, (start, end) in zip(batch.sequences, pairwise(bounds), strict=True):
                mine.append([sequence.index, *(None if values is None else values[start:end] for values in lists)])
    if dist.get_rank(layout.cp_group) > 0:
        mine = []  # the first of them has the same
    return {index: TokenResults(*fields) for part in all_gather_json(mine) for index, *fields in part}


def _fields(batch: Microbatch, loss: MicrobatchLoss, layout: Layout) -> list[Tensor | None]:
    """Return kl, weight and both log-probabilities of a microbatch's N tokens, float32 [N]; None for what it lacks."""
    stats, taught = loss.stats, batch.teacher is not None
    kl, teacher_logprob = (stats.kl, stats.teacher_logprob) if taught else (None, None)
    student_logprob = stats.student_logprob if batch.old_logprobs is None else batch.old_logprobs
    return [
        None if values is None else whole_tokens(values, batch.student_rows, batch.num_tokens, layout.cp_group).float()
        for values in (kl, loss.weights, student_logprob, teacher_logprob)
    ]
