"""The divergence between student and teacher at every token, over the full vocabulary split over tensor-parallel ranks.

These are the public functions: what they promise, and what they refuse. The mathematics is in ``statistics`` and ``kinds``, the ranks
in ``shard``, the gradients in ``autograd``, ``late``, ``fused`` and ``recompute``.

Shapes: N tokens, V vocabulary (padded to a multiple of TP), H hidden, TP ranks. Every rank of ``tp_group`` passes the same tokens.
The shards are equal and in rank order: rank r holds the token ids [r·V/TP, (r+1)·V/TP).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_cord.errors import CordError
from megatron_cord.losses.autograd import DivergenceFromLogits
from megatron_cord.losses.backends import backend_named
from megatron_cord.losses.checks import (
    check_cu_seqlens,
    check_distributions,
    check_matrix,
    check_targets,
    check_temperature,
    check_vocabulary,
)
from megatron_cord.losses.choice import chosen_implementation
from megatron_cord.losses.chunks import chunks_of, chunks_under_way
from megatron_cord.losses.fused import Fused, LossWeights
from megatron_cord.losses.gradients import gradient_dtype
from megatron_cord.losses.kinds import Kind
from megatron_cord.losses.late import Late
from megatron_cord.losses.recompute import Recompute
from megatron_cord.losses.sequence_parallel import gather_tokens
from megatron_cord.losses.shard import VocabularyShard
from megatron_cord.losses.statistics import Totals
from megatron_cord.losses.two_pass_kinds import NO_TEACHER, kind_named

#: Logits of the chunks under way (32 MiB of float32 on a CPU, 512 MiB on CUDA, where a GEMM of few rows is slow): as many tokens as fit.
CHUNK_ELEMENTS = {"cpu": 2**23, "cuda": 2**27}


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
    beta: float = 0.5,
    k: int = 64,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    backend: str = "auto",
    check_finite: bool = True,
) -> TokenStats:
    """Divergence, entropy and log-probabilities from logits that exist already.

    Logits rounded to bfloat16 spoil a divergence below about 1e-2; ``divergence_from_hidden`` does not have that problem.

    Args:
        student_logits: [N, V/TP], floating point. −inf is allowed (probability zero).
        teacher_logits: [N, V/TP], floating point, never gets a gradient.
        target_ids: int64 [N], the sampled tokens.
        kind: "reverse_kl", Σ p log(p/q) with p the student and q the teacher; "forward_kl", Σ q log(q/p); "jsd", the generalised
            Jensen–Shannon divergence; "topk", the reverse KL over the teacher's k likeliest tokens and one bucket for the rest.
        beta: of "jsd", in [0, 1]: the teacher's share of the mixture; 0 is the forward, 1 the reverse KL, as in GKD.
        k: of "topk".
        temperature: everything is of softmax(logits / temperature).
        vocab_size: the true V; columns beyond it are padding, count for nothing and get a zero gradient. None: no padding.
        tp_group: the ranks that share the vocabulary; None means this one alone.
        backend: who computes: "eager", "compile", "triton" or "auto".
        check_finite: refuse NaN. With False, NaN logits make NaN statistics of that token, for a trainer that skips such a step.

    Returns:
        The divergence is +inf where the distribution that it divides by is zero and the other is not (reverse: the teacher's logit
        is −inf, the student's is not); its gradient is then undefined (NaN for reverse_kl) unless the token's weight is zero.

    Raises:
        CordError: shapes, types or devices that do not fit, a target outside the vocabulary, temperature ≤ 0, an unknown kind or backend;
            and, with ``check_finite``, logits of a token that are NaN, +inf or all −inf. The same on every rank.
    """
    check_matrix("student_logits", student_logits, target_ids.device)
    check_matrix("teacher_logits", teacher_logits, target_ids.device)
    if student_logits.shape != teacher_logits.shape:
        raise CordError(
            f"student_logits {list(student_logits.shape)} and teacher_logits {list(teacher_logits.shape)} must have the same shape"
        )
    rule, dtypes = kind_named(kind, beta=beta, k=k), {student_logits.dtype, teacher_logits.dtype}
    num_tokens, columns = student_logits.shape
    shard = _shard(rule, temperature, vocab_size, tp_group, target_ids, num_tokens, columns, dtypes, backend)
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
    beta: float = 0.5,
    k: int = 64,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    implementation: str = "auto",
    loss_weights: Callable[[TokenStats, slice], LossWeights] | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_tokens: int | None = None,
    backend: str = "auto",
    check_finite: bool = True,
) -> TokenStats:
    """Divergence, entropy and log-probabilities from hidden states and output layers; logits exist for a chunk of tokens at a time.

    Gradients reach ``student_hidden`` and ``student_weight``. That of the hidden states is summed over ``tp_group``: complete and equal on
    every rank, as after Megatron's column-parallel layer. That of the weight is this rank's shard, summed in fp32; where Megatron's
    DistributedDataParallel has given the weight a ``main_grad``, it goes straight there.

    Args:
        student_hidden: [N, H], float32, bfloat16, float16 or float64, equal on all ranks.
        student_weight: [V/TP, H] of the same type.
        teacher_hidden: [N, H'], never gets a gradient; its type and H' may differ from the student's.
        teacher_weight: [V/TP, H']; may be the very tensor ``student_weight``, which is then read once a chunk.
        target_ids, kind, beta, k, temperature, vocab_size, tp_group, backend, check_finite: as in ``divergence_from_logits``.
        sequence_parallel: both hidden states arrive cut over the ranks by tokens, [N/TP, H], rank r's first; the student's gradient leaves
            the same way (reduce-scattered). ``target_ids`` and the result are of all N tokens.
        implementation: "late" keeps one [N, V/TP] buffer in the hidden states' type; "fused" needs ``loss_weights`` and keeps the two
            gradients; "recompute" keeps nothing; "auto" chooses, and logs once what. Docs: docs/loss.md.
        loss_weights: promises the loss: called with the stats of a chunk's tokens and which tokens they are, it returns their weights in the
            loss, which must come true up to a common factor. It may be called for any implementation's sake and not be used.
        cu_seqlens: integers [B+1]; chunks then hold whole sequences, so that ``loss_weights`` sees each in one piece.
        chunk_tokens: tokens a chunk, equal on all ranks; None: as many as 32 MiB of logits allow (512 MiB on CUDA). One all-gather a chunk.

    Returns: as ``divergence_from_logits``.

    Raises:
        CordError: as ``divergence_from_logits``; and in the backward pass, if a promise of ``loss_weights`` is broken.
    """
    _check_layer("student", student_hidden, student_weight, target_ids.device)
    _check_layer("teacher", teacher_hidden, teacher_weight, target_ids.device)
    if teacher_weight.shape[0] != student_weight.shape[0]:
        raise CordError(
            f"student_weight has {student_weight.shape[0]} rows, but teacher_weight {teacher_weight.shape[0]}; they must share one vocabulary"
        )
    if student_hidden.shape[0] != teacher_hidden.shape[0]:
        raise CordError(
            f"student_hidden has {student_hidden.shape[0]} tokens, but teacher_hidden {teacher_hidden.shape[0]}"
        )
    if sequence_parallel:
        student_hidden = gather_tokens(student_hidden, tp_group)
        teacher_hidden = gather_tokens(teacher_hidden.detach(), tp_group)
    rule, dtypes = kind_named(kind, beta=beta, k=k), {student_hidden.dtype, teacher_hidden.dtype}
    num_tokens, columns = student_hidden.shape[0], student_weight.shape[0]
    shard = _shard(
        rule, temperature, vocab_size, tp_group, target_ids, num_tokens, columns, dtypes, backend, sequence_parallel
    )
    chunks = _chunks(target_ids, student_weight, chunk_tokens, cu_seqlens, shard.num_ranks)
    chosen = chosen_implementation(
        implementation,
        student_hidden,
        student_weight,
        has_loss_weights=loss_weights is not None,
        buffer_itemsize=gradient_dtype(student_hidden, shard.dtype).itemsize,
    )
    arguments = (
        student_hidden,
        student_weight,
        teacher_hidden.detach(),
        teacher_weight.detach(),
        target_ids,
        shard,
        chunks,
    )
    if chosen == "fused" and loss_weights is not None:
        promise = loss_weights
        outputs = Fused.apply(*arguments, lambda totals, rows: promise(_token_stats(totals, check_finite), rows))
    else:
        outputs = (Late if chosen == "late" else Recompute).apply(*arguments)
    return _token_stats(Totals(*outputs), check_finite)


def token_logprobs_from_hidden(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    chunk_tokens: int | None = None,
    backend: str = "auto",
    check_finite: bool = True,
) -> TokenStats:
    """Entropy and log-probabilities of the student alone: ``divergence_from_hidden`` without a teacher, and without his products.

    Args: as there, with hidden [N, H] and weight [V/TP, H] the student's.

    Returns:
        entropy and student_logprob, differentiable; kl is 0 and teacher_logprob the student's own, as if he were his teacher.

    Raises:
        CordError: as there.
    """
    _check_layer("student", hidden, weight, target_ids.device)
    if sequence_parallel:
        hidden = gather_tokens(hidden, tp_group)
    num_tokens, columns = hidden.shape[0], weight.shape[0]
    shard = _shard(
        NO_TEACHER,
        temperature,
        vocab_size,
        tp_group,
        target_ids,
        num_tokens,
        columns,
        {hidden.dtype},
        backend,
        sequence_parallel,
    )
    chunks = _chunks(target_ids, weight, chunk_tokens, None, shard.num_ranks)
    totals = Totals(*Recompute.apply(hidden, weight, None, None, target_ids, shard, chunks))
    return _token_stats(totals._replace(divergence=totals.divergence.detach()), check_finite)


def _check_layer(who: str, hidden: Tensor, weight: Tensor, device: torch.device) -> None:
    check_matrix(f"{who}_hidden", hidden, device)
    check_matrix(f"{who}_weight", weight, device)
    if hidden.shape[1] != weight.shape[1]:
        raise CordError(
            f"{who}_hidden has width {hidden.shape[1]}, but {who}_weight {weight.shape[1]}; they must be equal"
        )
    if hidden.dtype != weight.dtype:
        raise CordError(f"{who}_hidden is {hidden.dtype}, but {who}_weight {weight.dtype}; they must be of one type")


def _chunks(
    target_ids: Tensor, weight: Tensor, chunk_tokens: int | None, cu_seqlens: Tensor | None, num_ranks: int
) -> list[slice]:
    if chunk_tokens is not None and chunk_tokens < 1:
        raise CordError(f"chunk_tokens must be at least 1, but is {chunk_tokens}")
    num_tokens = target_ids.shape[0]
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, num_tokens)
    elements = CHUNK_ELEMENTS.get(weight.device.type, CHUNK_ELEMENTS["cpu"]) // chunks_under_way(num_ranks)
    chunk = chunk_tokens if chunk_tokens is not None else max(1, elements // max(1, weight.shape[0]))
    return chunks_of(num_tokens, chunk, None if cu_seqlens is None else cu_seqlens.tolist())


def _shard(
    kind: Kind,
    temperature: float,
    vocab_size: int | None,
    tp_group: dist.ProcessGroup | None,
    target_ids: Tensor,
    num_tokens: int,
    columns: int,
    dtypes: set[torch.dtype],
    backend: str,
    sequence_parallel: bool = False,
) -> VocabularyShard:
    """Checks what all entries share, and finds this rank's columns."""
    check_temperature(temperature)
    rank, num_ranks = (0, 1) if tp_group is None else (dist.get_rank(tp_group), dist.get_world_size(tp_group))
    true_size = check_vocabulary(vocab_size, columns * num_ranks)
    check_targets(target_ids, num_tokens, true_size)
    return VocabularyShard(
        kind=kind,
        temperature=temperature,
        start=rank * columns,
        columns=min(max(true_size - rank * columns, 0), columns),
        dtype=torch.float64 if torch.float64 in dtypes else torch.float32,
        group=tp_group,
        backend=backend_named(backend, target_ids.device, num_tokens * columns),
        sequence_parallel=sequence_parallel,
    )


def _token_stats(totals: Totals, check_finite: bool) -> TokenStats:
    if check_finite:
        check_distributions(totals)
    return TokenStats(totals.divergence, totals.entropy, totals.student_logprob, totals.teacher_logprob)
