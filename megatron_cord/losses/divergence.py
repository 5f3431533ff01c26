"""The divergence between student and teacher at every token, over the full vocabulary split over tensor-parallel ranks.

These are the two public functions: what they promise, and what they refuse. The mathematics is in ``statistics`` and ``kinds``, the ranks
in ``shard``, the gradients in ``autograd``.

Shapes: N tokens, V vocabulary (padded to a multiple of TP), H hidden, TP ranks. Every rank of ``tp_group`` passes the same tokens.
The shards are equal and in rank order: rank r holds the token ids [r·V/TP, (r+1)·V/TP).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_cord.errors import CordError
from megatron_cord.losses.autograd import DivergenceFromHidden, DivergenceFromLogits
from megatron_cord.losses.checks import check_distributions, check_matrix, check_targets, check_temperature, check_vocabulary
from megatron_cord.losses.kinds import kind_named
from megatron_cord.losses.shard import VocabularyShard
from megatron_cord.losses.statistics import Totals

#: Logits that exist at a time (64 MiB of float32): a chunk has as many tokens as fit.
CHUNK_ELEMENTS = 2**24

#: The ways to form the hidden states' divergence; "auto" chooses among the others.
IMPLEMENTATIONS = ("auto", "recompute")


@dataclass(frozen=True)
class TokenStats:
    """What the loss needs of each token, [N], float32 (float64 for float64 inputs), in nats, equal on all ranks of ``tp_group``."""

    kl: Tensor  #: divergence of the requested kind, differentiable
    entropy: Tensor  #: of the student, differentiable
    student_logprob: Tensor  #: of target_ids, differentiable
    teacher_logprob: Tensor  #: of target_ids, no gradient


def divergence_from_logits(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target_ids: Tensor,
    *,
    kind: str = "reverse_kl",
    temperature: float = 1.0,
    vocab_size: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    check_finite: bool = True,
) -> TokenStats:
    """Divergence, entropy and log-probabilities from logits that exist already.

    Logits rounded to bfloat16 spoil a divergence below about 1e-2; ``divergence_from_hidden`` does not have that problem.

    Args:
        student_logits: [N, V/TP], floating point. −inf is allowed (probability zero).
        teacher_logits: [N, V/TP], floating point, never gets a gradient.
        target_ids: int64 [N], the sampled tokens.
        kind: "reverse_kl", Σ p log(p/q) with p the student and q the teacher, or "forward_kl", Σ q log(q/p).
        temperature: everything is of softmax(logits / temperature).
        vocab_size: the true V; columns beyond it are padding, count for nothing and get a zero gradient. None: no padding.
        tp_group: the ranks that share the vocabulary; None means this one alone.
        check_finite: refuse NaN. With False, NaN logits make NaN statistics of that token, for a trainer that skips such a step.

    Returns:
        The divergence is +inf where the distribution that it divides by is zero and the other is not (reverse: the teacher's logit
        is −inf, the student's is not); its gradient is then undefined (NaN for reverse_kl) unless the token's weight is zero.

    Raises:
        CordError: shapes, types or devices that do not fit, a target outside the vocabulary, temperature ≤ 0, an unknown kind; and, with
            ``check_finite``, logits of a token that are NaN, +inf or all −inf. The same on every rank.
    """
    check_matrix("student_logits", student_logits, target_ids.device)
    check_matrix("teacher_logits", teacher_logits, target_ids.device)
    if student_logits.shape != teacher_logits.shape:
        raise CordError(
            f"student_logits {list(student_logits.shape)} and teacher_logits {list(teacher_logits.shape)} must have the same shape"
        )
    num_tokens, columns = student_logits.shape
    shard = _shard(kind, temperature, vocab_size, tp_group, target_ids, num_tokens, columns, {student_logits.dtype, teacher_logits.dtype})
    totals = Totals(*DivergenceFromLogits.apply(student_logits, teacher_logits.detach(), target_ids, shard))
    return _token_stats(totals, check_finite)


def divergence_from_hidden(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    target_ids: Tensor,
    *,
    kind: str = "reverse_kl",
    temperature: float = 1.0,
    vocab_size: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    implementation: str = "auto",
    chunk_tokens: int | None = None,
    check_finite: bool = True,
) -> TokenStats:
    """Divergence, entropy and log-probabilities from hidden states and output layers; logits exist for a chunk of tokens at a time.

    Gradients reach ``student_hidden`` and ``student_weight``. That of the hidden states is summed over ``tp_group``: complete and equal on
    every rank, as after Megatron's column-parallel layer. That of the weight is this rank's shard.

    Args:
        student_hidden: [N, H], float32, bfloat16, float16 or float64, equal on all ranks.
        student_weight: [V/TP, H] of the same type.
        teacher_hidden: [N, H'], never gets a gradient; its type and H' may differ from the student's.
        teacher_weight: [V/TP, H']; may be the very tensor ``student_weight``.
        target_ids, kind, temperature, vocab_size, tp_group, check_finite: as in ``divergence_from_logits``.
        implementation: "recompute" computes a chunk's logits again in the backward pass; "auto" chooses (today always that).
        chunk_tokens: tokens a chunk, equal on all ranks; None: as many as 64 MiB of logits allow. One all-gather a chunk.

    Returns, raises: as ``divergence_from_logits``.
    """
    if implementation not in IMPLEMENTATIONS:
        raise CordError(f"implementation {implementation!r} is unknown; choose one of {', '.join(IMPLEMENTATIONS)}")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise CordError(f"chunk_tokens must be at least 1, but is {chunk_tokens}")
    tensors = {
        "student_hidden": student_hidden,
        "student_weight": student_weight,
        "teacher_hidden": teacher_hidden,
        "teacher_weight": teacher_weight,
    }
    for name, tensor in tensors.items():
        check_matrix(name, tensor, target_ids.device)
    _check_layer("student", student_hidden, student_weight)
    _check_layer("teacher", teacher_hidden, teacher_weight)
    columns = student_weight.shape[0]
    if teacher_weight.shape[0] != columns:
        raise CordError(f"student_weight has {columns} rows, but teacher_weight {teacher_weight.shape[0]}; they must share one vocabulary")
    if student_hidden.shape[0] != teacher_hidden.shape[0]:
        raise CordError(f"student_hidden has {student_hidden.shape[0]} tokens, but teacher_hidden {teacher_hidden.shape[0]}")
    dtypes = {tensor.dtype for tensor in tensors.values()}
    shard = _shard(kind, temperature, vocab_size, tp_group, target_ids, student_hidden.shape[0], columns, dtypes)
    chunk = chunk_tokens if chunk_tokens is not None else max(1, CHUNK_ELEMENTS // max(1, columns))
    totals = Totals(
        *DivergenceFromHidden.apply(
            student_hidden, student_weight, teacher_hidden.detach(), teacher_weight.detach(), target_ids, shard, chunk
        )
    )
    return _token_stats(totals, check_finite)


def _check_layer(who: str, hidden: Tensor, weight: Tensor) -> None:
    if hidden.shape[1] != weight.shape[1]:
        raise CordError(f"{who}_hidden has width {hidden.shape[1]}, but {who}_weight {weight.shape[1]}; they must be equal")
    if hidden.dtype != weight.dtype:
        raise CordError(f"{who}_hidden is {hidden.dtype}, but {who}_weight {weight.dtype}; they must be of one type")


def _shard(
    kind: str,
    temperature: float,
    vocab_size: int | None,
    tp_group: dist.ProcessGroup | None,
    target_ids: Tensor,
    num_tokens: int,
    columns: int,
    dtypes: set[torch.dtype],
) -> VocabularyShard:
    """Checks what both entries share, and finds this rank's columns."""
    divergence_kind = kind_named(kind)
    check_temperature(temperature)
    rank, num_ranks = (0, 1) if tp_group is None else (dist.get_rank(tp_group), dist.get_world_size(tp_group))
    true_size = check_vocabulary(vocab_size, columns * num_ranks)
    check_targets(target_ids, num_tokens, true_size)
    return VocabularyShard(
        kind=divergence_kind,
        temperature=temperature,
        start=rank * columns,
        columns=min(max(true_size - rank * columns, 0), columns),
        dtype=torch.float64 if torch.float64 in dtypes else torch.float32,
        group=tp_group,
    )


def _token_stats(totals: Totals, check_finite: bool) -> TokenStats:
    if check_finite:
        check_distributions(totals)
    return TokenStats(totals.divergence, totals.entropy, totals.student_logprob, totals.teacher_logprob)
