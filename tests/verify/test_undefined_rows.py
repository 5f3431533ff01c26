"""``verify layout`` with an attention that leaves rows undefined, as transformer-engine's does: they are NaN."""

from __future__ import annotations

import megatron_cord.parallel  # noqa: F401  # isort: skip (before megatron.core)

from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_cord.config.loading import load_config
from megatron_cord.model import encoder
from megatron_cord.model.layers import attention, transformer
from megatron_cord.parallel.layout import finalize, initialize
from megatron_cord.verify.layout import Row, VerifyLayoutConfig, compare, run_step
from tests.gloo import run_ranks

SMALL = ["sizes.layers=2", "sizes.sequences=4"]
FROZEN = "model.freeze=[audio_encoder]"
TP2 = ["parallel.tp=2", "parallel.sequence_parallel=true", "train.packing=packed"]


class UndefinedRows(attention.SdpaAttention):
    """The torch attention with NaN in the rows that transformer-engine's leaves undefined.

    These are the queries that a padding mask masks, and packed ones that lie in no sequence.
    """

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, /, **named: Any) -> Tensor:
        out = super().forward(query, key, value, mask, **named)
        if mask is not None:
            out = out.masked_fill(mask[:, 0, 0].T[..., None], torch.nan)
        missing = query.shape[0] - out.shape[0]
        return torch.cat([out, out.new_full((missing, *out.shape[1:]), torch.nan)])


def without_the_last(ends: tuple[int, ...], device: torch.device, attended: list[int]) -> attention.PackedSequences:
    """Describe the sequences of the encoder but for the last, where there are several."""
    count = max(1, len(attended) - 1)
    return attention.packed_sequences(ends[: count + 1], device, attended[:count])


def run_cases(_rank: int, cases: dict[str, list[str]], *, faulty: bool = False) -> dict[str, list[Row]]:
    """Return what the check finds of each case; faulty: the last sequence is not described to the attention."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformer, "SdpaAttention", UndefinedRows)
        if faulty:
            patch.setattr(encoder, "packed_sequences", without_the_last)
        for name, overrides in cases.items():
            config = load_config(VerifyLayoutConfig, None, [*SMALL, *overrides])
            layout = initialize(config.parallel, config.seed)
            found[name] = compare(*run_step(config, layout), config.model.dtype)
            parallel_state.destroy_model_parallel()
    return found


def faulty_cases(rank: int, cases: dict[str, list[str]]) -> dict[str, list[Row]]:
    return run_cases(rank, cases, faulty=True)


@pytest.mark.parametrize("settings", [[], [FROZEN]], ids=["trained", "frozen"])
def test_one_rank(settings: list[str]) -> None:
    """Catches rows of padding that the encoder computes: 0 · NaN poisons the gradients of what is around them."""
    try:
        rows = run_cases(0, {"alone": settings})["alone"]
    finally:
        finalize()
    assert len(rows) > 60 and not [row for row in rows if not row.passed]


def test_two_ranks() -> None:
    """Catches the same for the positions that sequence parallelism adds."""
    found: dict[str, list[Row]] = run_ranks(run_cases, 2, {"trained": TP2, "frozen": [*TP2, FROZEN]})[0]
    for rows in found.values():
        assert len(rows) > 60 and not [row for row in rows if not row.passed]


def test_an_undefined_row_is_found() -> None:
    """Catches a check that cannot fail: a sequence that the attention does not know of leaves its rows undefined."""
    rows: list[Row] = run_ranks(faulty_cases, 2, {"trained": TP2})[0]["trained"]
    assert sum(not row.passed for row in rows) > len(rows) / 2
