"""The public functions: divergence at every token over the whole vocabulary, and the loss made of it.

``distillation_loss`` is what training calls; ``divergence_from_hidden`` and ``divergence_from_logits`` return
differentiable statistics from which a caller forms a loss of its own. What they refuse is in ``checks``;
``divergences``, ``shard`` and ``implementations`` do the work.

Shapes: N tokens, V vocabulary (padded to a multiple of TP), H hidden, TP ranks. Every rank of ``tp_group`` passes the
same tokens. The shards are equal and in rank order: rank r holds the token ids [r·V/TP, (r+1)·V/TP).
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from megatron_cord.errors import CordError
from megatron_cord.losses.autograd import DivergenceFromLogits, apply_function
from megatron_cord.losses.checks import (
    check_distributions,
    check_matrix,
)
from megatron_cord.losses.divergences import NO_TEACHER, make_divergence
from megatron_cord.losses.implementations.cached_grad import CachedGrad
from megatron_cord.losses.implementations.choice import choose_implementation
from megatron_cord.losses.implementations.fused import ChunkLoss, Fused
from megatron_cord.losses.implementations.gradients import gradient_dtype
from megatron_cord.losses.implementations.inputs import Inputs, make_chunks, make_shard, prepare_inputs
from megatron_cord.losses.implementations.recompute import Recompute
from megatron_cord.losses.shard import VocabularyShard
from megatron_cord.losses.statistics import GlobalStats, TokenStats


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
    """Return divergence, entropy and log-probabilities from logits that exist already.

    Logits rounded to bfloat16 spoil a divergence below about 1e-2; ``divergence_from_hidden`` does not have that
    problem.

    Args:
        student_logits: [N, V/TP], floating point. −inf is allowed (probability zero).
        teacher_logits: [N, V/TP], floating point, never gets a gradient.
        target_ids: int64 [N], the sampled tokens.
        kind: "reverse_kl", Σ p log(p/q) with p the student and q the teacher; "forward_kl", Σ q log(q/p); "jsd", the
            generalised Jensen–Shannon divergence; "topk", the reverse KL over the teacher's k likeliest tokens and one
            bucket for the rest; "forward_topk", the forward KL over the same.
        beta: of "jsd", in [0, 1]: the teacher's share of the mixture; 0 is the forward, 1 the reverse KL, as in GKD.
        k: of "topk" and "forward_topk".
        temperature: everything is of softmax(logits / temperature).
        vocab_size: the true V; columns beyond it are padding, count for nothing and get a zero gradient. None: no
            padding.
        tp_group: the ranks that share the vocabulary; None means this one alone.
        backend: what computes: "eager", "compile", "triton" or "auto".
        check_finite: refuse NaN. With False, NaN logits make NaN statistics of that token, for a trainer that skips
            such a step.

    Returns:
        The divergence is +inf where the distribution that it divides by is zero and the other is not (reverse: the
        teacher's logit is −inf, the student's is not); its gradient is then undefined (NaN for reverse_kl) unless the
        token's weight is zero.

    Raises:
        CordError: shapes, types or devices that do not fit, a target outside the vocabulary, temperature ≤ 0, an
            unknown kind or backend; and, with ``check_finite``, logits of a token that are NaN, +inf or all −inf. The
            same on every rank.
    """
    check_matrix("student_logits", student_logits, target_ids.device)
    check_matrix("teacher_logits", teacher_logits, target_ids.device)
    if student_logits.shape != teacher_logits.shape:
        raise CordError(
            f"student_logits {list(student_logits.shape)} and teacher_logits {list(teacher_logits.shape)} "
            "must have the same shape"
        )
    shard = make_shard(
        make_divergence(kind, beta=beta, k=k),
        temperature,
        vocab_size,
        tp_group,
        target_ids,
        student_logits.shape,
        {student_logits.dtype, teacher_logits.dtype},
        backend,
    )
    stats = GlobalStats(
        *apply_function(DivergenceFromLogits, student_logits, teacher_logits.detach(), target_ids, shard)
    )
    return _token_stats(stats, check_finite)


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
    chunk_tokens: int | None = None,
    backend: str = "auto",
    check_finite: bool = True,
) -> TokenStats:
    """Return divergence, entropy and log-probabilities from hidden states and output layers.

    Logits exist for a chunk of tokens at a time.

    Gradients reach ``student_hidden`` and ``student_weight``. That of the hidden states is summed over ``tp_group``:
    complete and equal on every rank, as after Megatron's column-parallel layer. That of the weight is this rank's
    shard, summed in fp32; where Megatron's DistributedDataParallel has given the weight a ``main_grad``, it goes
    straight there.

    Args:
        student_hidden: [N, H], float32, bfloat16, float16 or float64, equal on all ranks.
        student_weight: [V/TP, H] of the same type.
        teacher_hidden: [N, H'], never gets a gradient; its type and H' may differ from the student's.
        teacher_weight: [V/TP, H']; may be the very tensor ``student_weight``, which is then read once a chunk.
        target_ids: as in ``divergence_from_logits``.
        kind: likewise.
        beta: likewise.
        k: likewise.
        temperature: likewise.
        vocab_size: likewise.
        tp_group: likewise.
        sequence_parallel: both hidden states are split over the ranks by tokens, [N/TP, H], rank r's first; the
            student's gradient leaves the same way (reduce-scattered). ``target_ids`` and the result are of all N
            tokens.
        implementation: "cached_grad" keeps one [N, V/TP] buffer in the hidden states' type; "recompute" keeps nothing;
            "auto" chooses, and logs once what. "fused" exists in ``distillation_loss`` alone, which evaluates the
            loss. See docs/loss.md.
        chunk_tokens: tokens a chunk, equal on all ranks; None: as many as 32 MiB of logits allow (512 MiB on CUDA). One
            all-gather a chunk.
        backend: as in ``divergence_from_logits``.
        check_finite: likewise.

    Returns: as ``divergence_from_logits``.

    Raises:
        CordError: as ``divergence_from_logits``.
    """
    divergence = make_divergence(kind, beta=beta, k=k)
    inputs, shard = prepare_inputs(
        (student_hidden, student_weight, teacher_hidden, teacher_weight, target_ids),
        (divergence, temperature, vocab_size, tp_group, backend),
        sequence_parallel,
    )
    chosen = _choose(implementation, inputs, shard, can_fuse=False)
    function = CachedGrad if chosen == "cached_grad" else Recompute
    stats = GlobalStats(*apply_function(function, *inputs, shard, make_chunks(inputs, shard, chunk_tokens, None)))
    return _token_stats(stats, check_finite)


def distillation_loss(
    chunk_loss: ChunkLoss,
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
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
    cu_seqlens: Tensor | None = None,
    splittable: bool = True,
    chunk_tokens: int | None = None,
    backend: str = "auto",
    check_finite: bool = True,
    check_targets: bool = True,
) -> tuple[Tensor, TokenStats]:
    """Return the loss that ``chunk_loss`` makes of all tokens, and their statistics without gradient.

    ``chunk_loss`` is called exactly once for each token: with the statistics of a chunk of tokens, and which tokens
    they are. The losses of chunks add up. "fused" calls it between the statistics and the gradient of the same logits
    and forms all gradients at once; its backward pass multiplies by one number. The other implementations call it once,
    with all tokens.

    Args:
        chunk_loss: see ``ChunkLoss``.
        student_hidden: as in ``divergence_from_hidden``, and so are all arguments that are not listed here.
        student_weight: [V/TP, H].
        teacher_hidden: [N, H'], or None: no teacher, kl is 0 and teacher_logprob the student's own.
        teacher_weight: [V/TP, H'], or None.
        target_ids: int64 [N].
        kind: the divergence.
        beta: of "jsd".
        k: of "topk" and "forward_topk".
        temperature: of both softmaxes.
        vocab_size: the true V.
        tp_group: the ranks that share the vocabulary.
        sequence_parallel: whether hidden states are split over the ranks.
        implementation: "fused", "cached_grad", "recompute" or "auto"; "fused" is impossible without a teacher, where
            recompute is taken.
        cu_seqlens: integers [B+1], best in host memory; chunks then hold whole sequences. None: a chunk ends anywhere.
        splittable: whether ``chunk_loss`` may be called for a part of the tokens. False under context parallelism,
            where a response's weights need the tokens of other ranks; "fused" is then refused.
        chunk_tokens: tokens a chunk.
        backend: what computes.
        check_finite: whether NaN is refused.
        check_targets: whether targets outside the vocabulary are refused, for which the host waits for the device;
            False for a caller that has looked at them on the host. What they lead to is undefined then.

    Raises:
        CordError: as ``divergence_from_hidden``; "fused" where it is impossible.
    """
    if teacher_hidden is None or teacher_weight is None:
        stats = token_logprobs_from_hidden(
            student_hidden,
            student_weight,
            target_ids,
            temperature=temperature,
            vocab_size=vocab_size,
            tp_group=tp_group,
            sequence_parallel=sequence_parallel,
            chunk_tokens=chunk_tokens,
            backend=backend,
            check_finite=check_finite,
            check_targets=check_targets,
        )
        return chunk_loss(stats, slice(0, len(target_ids))), stats.detach()
    divergence = make_divergence(kind, beta=beta, k=k)
    inputs, shard = prepare_inputs(
        (student_hidden, student_weight, teacher_hidden, teacher_weight, target_ids),
        (divergence, temperature, vocab_size, tp_group, backend),
        sequence_parallel,
        check_targets,
    )
    chunks = make_chunks(inputs, shard, chunk_tokens, cu_seqlens)
    chosen = _choose(implementation, inputs, shard, can_fuse=splittable)
    if chosen == "fused":
        loss, *fields = apply_function(Fused, *inputs, shard, chunks, chunk_loss)
        return loss, _token_stats(GlobalStats(*fields), check_finite)
    function = CachedGrad if chosen == "cached_grad" else Recompute
    stats = _token_stats(GlobalStats(*apply_function(function, *inputs, shard, chunks)), check_finite)
    return chunk_loss(stats, slice(0, len(target_ids))), stats.detach()


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
    check_targets: bool = True,
) -> TokenStats:
    """Return entropy and log-probabilities of the student alone: ``divergence_from_hidden`` without a teacher.

    Args:
        hidden: [N, H], the student's.
        weight: [V/TP, H].
        target_ids: as in ``divergence_from_hidden``, and so are all other arguments.
        temperature: of the softmax.
        vocab_size: the true V.
        tp_group: the ranks that share the vocabulary.
        sequence_parallel: whether hidden states are split over the ranks.
        chunk_tokens: tokens a chunk.
        backend: what computes.
        check_finite: whether NaN is refused.
        check_targets: as in ``distillation_loss``.

    Returns:
        entropy and student_logprob, differentiable; kl is 0, and teacher_logprob the student's own.

    Raises:
        CordError: as there.
    """
    inputs, shard = prepare_inputs(
        (hidden, weight, None, None, target_ids),
        (NO_TEACHER, temperature, vocab_size, tp_group, backend),
        sequence_parallel,
        check_targets,
    )
    stats = GlobalStats(*apply_function(Recompute, *inputs, shard, make_chunks(inputs, shard, chunk_tokens, None)))
    return _token_stats(stats._replace(divergence=stats.divergence.detach()), check_finite)


def _choose(implementation: str, inputs: Inputs, shard: VocabularyShard, *, can_fuse: bool) -> str:
    itemsize = gradient_dtype(inputs[0], shard.dtype).itemsize
    return choose_implementation(implementation, *inputs[:2], can_fuse=can_fuse, buffer_itemsize=itemsize)


def _token_stats(stats: GlobalStats, check_finite: bool) -> TokenStats:
    if check_finite:
        check_distributions(stats)
    return TokenStats(stats.divergence, stats.entropy, stats.student_logprob, stats.teacher_logprob)
