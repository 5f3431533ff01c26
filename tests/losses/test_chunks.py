"""The order in which chunks are formed and waited for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_cord.losses.chunks import totals_in_turn
from megatron_cord.losses.output_layer import OutputLayers
from megatron_cord.losses.two_pass_kinds import kind_named


class Recorder:
    """Stands in for a shard: notes when a chunk is begun, and when its collective is waited for."""

    kind = kind_named("reverse_kl")

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self.events: list[str] = []

    def begin_totals(self, logits: Any, target_ids: torch.Tensor) -> Any:
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
    """Catches an all-gather that is waited for at once, a chunk that is lost, and two chunks' logits alive where nothing is waited for."""
    recorder, hidden = Recorder(num_ranks), torch.zeros(5, 2)
    layers = OutputLayers(hidden, torch.zeros(3, 2), None, None, torch.float32)
    chunks = [slice(0, 2), slice(2, 4), slice(4, 5)]
    for rows, _, _ in totals_in_turn(recorder, layers, torch.arange(5), chunks, keep=True):  # type: ignore[arg-type]
        recorder.events.append(f"use {rows.start}")
    assert recorder.events == expected
