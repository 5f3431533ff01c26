"""Chunks of tokens: where they are cut, and their totals one after the other, so that communication goes on during the next one's products.

Shapes: N tokens.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator

from torch import Tensor

from megatron_cord.losses.output_layer import KeptLogits, OutputLayers
from megatron_cord.losses.shard import Logits, PendingTotals, VocabularyShard
from megatron_cord.losses.statistics import Totals


def totals_in_turn(
    shard: VocabularyShard, layers: OutputLayers, target_ids: Tensor, chunks: list[slice], *, keep: bool
) -> Iterator[tuple[slice, Logits, Totals]]:
    """Each chunk's tokens, logits and totals. A chunk's all-gather runs while the next chunk's products are formed.

    All implementations go through here, so ranks that choose differently make the same collectives in the same order.

    Args:
        target_ids: [N].
        keep: whether the logits shall still exist when they are handed out, until the next chunk is asked for.
    """
    under_way = chunks_under_way(shard.num_ranks)
    waiting = deque[tuple[slice, Logits, PendingTotals]]()
    for number, rows in enumerate(chunks):
        logits: Logits = layers.chunk(rows)
        if keep or shard.kind.num_sums:
            logits = KeptLogits(layers.chunk(rows), place=number % under_way)
        waiting.append((rows, logits, shard.begin_totals(logits, target_ids[rows])))
        if len(waiting) == under_way:
            rows, logits, pending = waiting.popleft()
            yield rows, logits, pending.wait()
    for rows, logits, pending in waiting:
        yield rows, logits, pending.wait()


def chunks_under_way(num_ranks: int) -> int:
    """How many chunks' logits may exist at a time: two where there is communication to wait for."""
    return 2 if num_ranks > 1 else 1


def chunks_of(num_tokens: int, chunk: int, cu_seqlens: list[int] | None = None) -> list[slice]:
    """Slices of at most ``chunk`` tokens; one empty slice if there are no tokens.

    Args:
        cu_seqlens: cut only between these sequences, where a single one may be longer than ``chunk``.
    """
    if cu_seqlens is None:
        borders = [*range(0, max(num_tokens, 1), chunk), num_tokens]
    else:
        borders = [0]
        for end, following in itertools.pairwise([*cu_seqlens[1:], None]):
            if end is not None and end > borders[-1] and (following is None or following - borders[-1] > chunk):
                borders.append(end)
        if len(borders) == 1:
            borders.append(num_tokens)
    return [slice(first, last) for first, last in itertools.pairwise(borders)]
