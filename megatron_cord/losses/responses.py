"""Response tokens as whole responses in order, also where a rank holds only some of each (context parallelism).

The weight of a token depends on its response: on its position there and on the other tokens' divergences. So a rank's
tokens are first put together with those of the other context-parallel ranks, in one order that does not depend on the
layout, and each rank takes its own back.

Shapes: N tokens here, M tokens of the whole responses, B sequences, CP ranks. Simplification: every rank computes for
    all M tokens; they
are a few numbers each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_cord.errors import CordError
from megatron_cord.losses.checks import check_cu_seqlens
from megatron_cord.parallel.transfers import to_device


@dataclass(frozen=True, eq=False)
class Responses:
    """M tokens, sequence after sequence, each in order; numbers without gradient."""

    kl: Tensor  #: [M]
    entropy: Tensor | None  #: [M], of the student
    log_ratio: Tensor | None  #: [M], log of the student's probability of the token over the sampling policy's
    sequence: Tensor  #: int64 [M], which of the B sequences
    position: Tensor  #: int64 [M], from 0
    length: Tensor  #: int64 [M], of the token's sequence
    num_sequences: int  #: B
    mine: Tensor | None  #: int64 [N], where this rank's tokens are; None: all of them, in order

    def take(self, values: Tensor) -> Tensor:
        """Return this rank's part [N] of [M]."""
        return values if self.mine is None else values[self.mine]


def whole_responses(
    kl: Tensor,
    cu_seqlens: Tensor,
    *,
    entropy: Tensor | None = None,
    log_ratio: Tensor | None = None,
    positions: Tensor | None = None,
    cp_group: dist.ProcessGroup | None = None,
) -> Responses:
    """Put the responses together.

    Args:
        kl: [N].
        cu_seqlens: integers [B+1]; sequence i is the tokens [cu_seqlens[i], cu_seqlens[i+1]) of this rank. A sequence
            may be empty here. In host memory they are checked without waiting for the device.
        entropy: [N], on all ranks or on none.
        log_ratio: likewise.
        positions: int64 [N], each token's position in its whole response, from 0; needed with ``cp_group``.
        cp_group: the ranks that share the sequences; all pass the same B sequences in the same order.

    Raises:
        CordError: shapes that do not fit, or positions that are not 0 … T−1 of each response over the ranks.
    """
    if kl.dim() != 1:
        raise CordError(f"kl must have shape [tokens], but has {list(kl.shape)}")
    check_cu_seqlens(cu_seqlens, kl.shape[0])
    for name, tensor in (("entropy", entropy), ("log_ratio", log_ratio), ("positions", positions)):
        if tensor is not None and tensor.shape != kl.shape:
            raise CordError(f"{name} has shape {list(tensor.shape)}, but kl {list(kl.shape)}")
    kl = kl.detach()
    entropy, log_ratio = (None if each is None else each.detach().to(kl.dtype) for each in (entropy, log_ratio))
    cu_seqlens = to_device(cu_seqlens.long(), kl.device)
    if cp_group is None or dist.get_world_size(cp_group) == 1:
        sequence, position, length = _locate(cu_seqlens, len(kl))
        return Responses(kl, entropy, log_ratio, sequence, position, length, len(cu_seqlens) - 1, None)
    if positions is None:
        raise CordError("positions is needed with cp_group: the position of each of this rank's tokens in its response")
    return _from_all_ranks((kl, entropy, log_ratio), cu_seqlens, positions.to(kl.device), cp_group)


def _from_all_ranks(
    values: tuple[Tensor, Tensor | None, Tensor | None],
    cu_seqlens: Tensor,
    positions: Tensor,
    group: dist.ProcessGroup,
) -> Responses:
    kl = values[0]
    ranks, me = dist.get_world_size(group), dist.get_rank(group)
    all_cu_seqlens = _gather(cu_seqlens, ranks, group)  # [CP, B + 1]
    counts = all_cu_seqlens[:, -1].tolist()
    columns = [positions.double(), *(each.double() for each in values if each is not None)]
    padded = kl.new_zeros(len(columns), max(counts), dtype=torch.float64)
    padded[:, : kl.shape[0]] = torch.stack(columns)
    gathered = _gather(padded, ranks, group)  # [CP, columns, most]
    numbers = torch.cat([gathered[rank, :, :count] for rank, count in enumerate(counts)], dim=1)  # [columns, M]
    sequences = torch.cat([_locate(one, count)[0] for one, count in zip(all_cu_seqlens, counts, strict=True)])
    by_position = torch.argsort(numbers[0], stable=True)
    order = by_position[torch.argsort(sequences[by_position], stable=True)]
    numbers = numbers[:, order]
    lengths = all_cu_seqlens.diff(dim=1).sum(0)
    sequence, position, length = _locate(torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]), sum(counts))
    wrong = numbers[0] != position
    if wrong.any():
        raise CordError(
            f"positions of sequence {int(sequence[wrong][0])} are not 0 … {int(length[wrong][0]) - 1} "
            "over the context-parallel ranks"
        )
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    first = sum(counts[:me])
    rows = iter(numbers[1:].to(kl.dtype))
    whole, entropy, log_ratio = (None if each is None else next(rows) for each in values)
    assert whole is not None, "there are always divergences"
    return Responses(
        whole,
        entropy,
        log_ratio,
        sequence,
        position,
        length,
        len(lengths),
        place[first : first + counts[me]],
    )


def response_of_token(tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return of each of the tokens [N] the index of its response; int64 [N]."""
    check_cu_seqlens(cu_seqlens, tokens.shape[0])
    return _sequence_of_token(to_device(cu_seqlens, tokens.device).diff(), len(tokens))


def response_means(
    values: Tensor, cu_seqlens: Tensor, lengths: Tensor, *, cp_group: dist.ProcessGroup | None = None
) -> Tensor:
    """Return of each token the mean of its whole response's values, [N], without gradient.

    Args:
        values: [N], used as numbers.
        cu_seqlens: integers [B+1], of this rank's tokens; a response may be empty here.
        lengths: [B], tokens of the whole responses, over all ranks.
        cp_group: the ranks that share the responses, which pass the same B of them; collective over them.
    """
    response = response_of_token(values, cu_seqlens)
    sums = values.new_zeros(len(lengths), dtype=torch.float64).index_add(0, response, values.detach().double())
    if cp_group is not None and dist.get_world_size(cp_group) > 1:
        dist.all_reduce(sums, group=cp_group)
    return (sums / lengths.clamp(min=1))[response].to(values.dtype)


def rank_in_response(responses: Responses, score: Tensor) -> Tensor:
    """Return of each token how many of its response have a larger score (or an equal one, earlier); int64 [M]."""
    by_score = torch.sort(score, descending=True, stable=True).indices
    order = by_score[torch.sort(responses.sequence[by_score], stable=True).indices]
    rank = torch.empty_like(responses.position)
    rank[order] = responses.position  # sorted by sequence, the places within a sequence are the positions again
    return rank


def _locate(cu_seqlens: Tensor, num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return of each token, int64 [N]: its sequence, its position there from 0, and that sequence's length."""
    lengths = cu_seqlens.diff()
    sequence = _sequence_of_token(lengths, num_tokens)
    position = torch.arange(num_tokens, device=cu_seqlens.device) - cu_seqlens[sequence]
    return sequence, position, lengths[sequence]


def _sequence_of_token(lengths: Tensor, num_tokens: int) -> Tensor:
    """Return int64 [N] from [B]; the number of tokens, known on the host, would have to be read from the device."""
    numbers = torch.arange(len(lengths), device=lengths.device)
    return torch.repeat_interleave(numbers, lengths, output_size=num_tokens)


def _gather(mine: Tensor, ranks: int, group: dist.ProcessGroup) -> Tensor:
    """Return [CP, …]."""
    gathered = [torch.empty_like(mine) for _ in range(ranks)]
    dist.all_gather(gathered, mine.contiguous(), group=group)
    return torch.stack(gathered)
