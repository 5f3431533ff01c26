"""Where chunks end, and the order in which they are formed and waited for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_cord.losses.divergences import make_divergence
from megatron_cord.losses.implementations.output_layer import OutputLayers, iter_chunks, split_chunks


class Recorder:
    """Stands in for a shard: notes when a chunk is begun, and when its collective is waited for."""

    divergence = make_divergence("reverse_kl")

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self.events: list[str] = []

    def begin_stats(self, logits: Any, target_ids: torch.Tensor) -> Any:
        self.events.append(f"begin {int(target_ids[0])}")
        recorder, first = self, int(target_ids[0])

        class Pending:
            def wait(self) -> None:
                recorder.events.append(f"wait {first}")

        return Pending()


@pytest.mark.parametrize(
    ("num_ranks", "expected"),
    [
        (1, ["begin 0", "wait 0", "use 0", "begin 2", "wait 2", "use 2", "begin 4", "wait 4", "use 4"]),
        (2, ["begin 0", "begin 2", "wait 0", "use 0", "begin 4", "wait 2", "use 2", "wait 4", "use 4"]),
    ],
)
def test_a_collective_runs_during_the_next_chunk(num_ranks: int, expected: list[str]) -> None:
    """Catches an all-gather awaited at once, a lost chunk, and two chunks' logits alive without communication."""
    recorder, hidden = Recorder(num_ranks), torch.zeros(5, 2)
    layers = OutputLayers(hidden, torch.zeros(3, 2), None, None, torch.float32)
    chunks = [slice(0, 2), slice(2, 4), slice(4, 5)]
    for rows, _, _ in iter_chunks(recorder, layers, torch.arange(5), chunks, keep=True):  # type: ignore[arg-type]
        recorder.events.append(f"use {rows.start}")
    assert recorder.events == expected


@pytest.mark.parametrize(
    ("num_tokens", "chunk", "cu_seqlens", "expected"),
    [
        (0, 4, None, [(0, 0)]),
        (9, 4, None, [(0, 4), (4, 8), (8, 9)]),
        (0, 4, [0], [(0, 0)]),
        (0, 4, [0, 0, 0], [(0, 0)]),
        (9, 4, [0, 6, 6, 8, 9], [(0, 6), (6, 9)]),
        (9, 20, [0, 6, 6, 8, 9, 9], [(0, 9)]),
        (9, 2, [0, 0, 9, 9], [(0, 9)]),
    ],
)
def test_chunks(num_tokens: int, chunk: int, cu_seqlens: list[int] | None, expected: list[tuple[int, int]]) -> None:
    """Catches tokens lost at a seam, and an empty sequence that ends a chunk."""
    assert [(rows.start, rows.stop) for rows in split_chunks(num_tokens, chunk, cu_seqlens)] == expected
