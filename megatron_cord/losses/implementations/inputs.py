"""The inputs of the implementations: checked, gathered under sequence parallelism, and cut into chunks.

Shapes as in ``divergence``: N tokens, V vocabulary, H hidden, TP ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_cord.errors import CordError
from megatron_cord.losses.checks import (
    check_cu_seqlens,
    check_matrix,
    check_targets,
    check_temperature,
    check_vocabulary,
)
from megatron_cord.losses.divergences import Divergence
from megatron_cord.losses.implementations.gradients import gather_tokens
from megatron_cord.losses.implementations.output_layer import split_chunks, tokens_per_chunk
from megatron_cord.losses.kernels.choice import choose_backend
from megatron_cord.losses.shard import VocabularyShard

#: student_hidden, student_weight, teacher_hidden, teacher_weight, target_ids: the first arguments of implementations
Inputs = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor]
#: divergence, temperature, vocab_size, tp_group, backend: how the divergence is defined and computed.
Definition = tuple[Divergence, float, int | None, dist.ProcessGroup | None, str]


def prepare_inputs(
    inputs: Inputs, definition: Definition, sequence_parallel: bool, check_values: bool = True
) -> tuple[Inputs, VocabularyShard]:
    """Check hidden states and weights, gather them under sequence parallelism, and describe this rank's columns.

    Raises:
        CordError: they do not fit together; see ``divergence_from_hidden``.
    """
    student_hidden, student_weight, teacher_hidden, teacher_weight, target_ids = inputs
    divergence, temperature, vocab_size, tp_group, backend = definition
    _check_layer("student", student_hidden, student_weight, target_ids.device)
    dtypes = {student_hidden.dtype}
    if teacher_hidden is not None and teacher_weight is not None:
        _check_layer("teacher", teacher_hidden, teacher_weight, target_ids.device)
        if teacher_weight.shape[0] != student_weight.shape[0]:
            raise CordError(
                f"student_weight has {student_weight.shape[0]} rows, but teacher_weight {teacher_weight.shape[0]}; "
                "they must share one vocabulary"
            )
        if student_hidden.shape[0] != teacher_hidden.shape[0]:
            raise CordError(
                f"student_hidden has {student_hidden.shape[0]} tokens, but teacher_hidden {teacher_hidden.shape[0]}"
            )
        dtypes.add(teacher_hidden.dtype)
        teacher_hidden, teacher_weight = teacher_hidden.detach(), teacher_weight.detach()
    if sequence_parallel:
        student_hidden = gather_tokens(student_hidden, tp_group)
        teacher_hidden = None if teacher_hidden is None else gather_tokens(teacher_hidden, tp_group)
    shape = (student_hidden.shape[0], student_weight.shape[0])
    shard = make_shard(
        divergence,
        temperature,
        vocab_size,
        tp_group,
        target_ids,
        shape,
        dtypes,
        backend,
        sequence_parallel,
        check_values,
    )
    return (student_hidden, student_weight, teacher_hidden, teacher_weight, target_ids), shard


def _check_layer(model: str, hidden: Tensor, weight: Tensor, device: torch.device) -> None:
    check_matrix(f"{model}_hidden", hidden, device)
    check_matrix(f"{model}_weight", weight, device)
    if hidden.shape[1] != weight.shape[1]:
        raise CordError(
            f"{model}_hidden has width {hidden.shape[1]}, but {model}_weight {weight.shape[1]}; they must be equal"
        )
    if hidden.dtype != weight.dtype:
        raise CordError(
            f"{model}_hidden is {hidden.dtype}, but {model}_weight {weight.dtype}; they must be of one type"
        )


def make_chunks(
    inputs: Inputs, shard: VocabularyShard, chunk_tokens: int | None, cu_seqlens: Tensor | None
) -> list[slice]:
    """Return the tokens of each chunk. Raises CordError."""
    if chunk_tokens is not None and chunk_tokens < 1:
        raise CordError(f"chunk_tokens must be at least 1, but is {chunk_tokens}")
    num_tokens = len(inputs[4])
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, num_tokens)
    chunk = chunk_tokens if chunk_tokens is not None else tokens_per_chunk(inputs[1], shard.num_ranks)
    return split_chunks(num_tokens, chunk, None if cu_seqlens is None else cu_seqlens.tolist())


def make_shard(
    divergence: Divergence,
    temperature: float,
    vocab_size: int | None,
    tp_group: dist.ProcessGroup | None,
    target_ids: Tensor,
    shape: Sequence[int],
    dtypes: set[torch.dtype],
    backend: str,
    sequence_parallel: bool = False,
    check_values: bool = True,
) -> VocabularyShard:
    """Check what all public functions share, and describe this rank's columns; ``shape`` is [N, V/TP].

    Raises:
        CordError: a temperature, vocabulary, target or backend that does not fit.
    """
    check_temperature(temperature)
    num_tokens, columns = shape
    rank, num_ranks = (0, 1) if tp_group is None else (dist.get_rank(tp_group), dist.get_world_size(tp_group))
    true_size = check_vocabulary(vocab_size, columns * num_ranks)
    check_targets(target_ids, num_tokens, true_size, values=check_values)
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    return VocabularyShard(
        divergence=divergence,
        temperature=temperature,
        start=rank * columns,
        columns=min(max(true_size - rank * columns, 0), columns),
        dtype=dtype,
        group=tp_group,
        backend=choose_backend(backend, target_ids.device, num_tokens * columns, dtype),
        sequence_parallel=sequence_parallel,
    )
