"""The plain model's attention on few tokens: what it gives is transformers' own, with padding and a cache."""

from __future__ import annotations

import megatron_cord.parallel  # noqa: F401  # isort: skip (before megatron.core)

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from megatron_cord.convert.plain import attention
from megatron_cord.convert.plain.model import PlainModel
from megatron_cord.model.layers.small_attention import attend
from tests.convert.graft.test_graft import write_llm


def passes(hidden: Any, ids: torch.Tensor, pads: torch.Tensor) -> list[torch.Tensor]:
    """Return hidden states of a left-padded prompt and of two tokens behind it, one by one."""
    cache, mask = DynamicCache(), torch.arange(ids.shape[1])[None] >= pads[:, None]
    found = []
    for start, end in ((0, 6), (6, 7), (7, 8)):
        positions = (torch.arange(start, end)[None] - pads[:, None]).clamp(min=0)
        output = hidden(
            ids[:, start:end],
            attention_mask=mask[:, :end].long(),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        found.append(output.last_hidden_state.float() * mask[:, start:end, None])
    return found


def test_few_tokens_have_the_hidden_states_of_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches padding that is attended to, a mask of the wrong keys, and layers that do not take this attention."""
    directory = write_llm(tmp_path / "llm")
    calls: list[tuple[int, int]] = []

    def counted(query: Any, key: Any, value: Any, **options: Any) -> Any:
        calls.append((len(query), len(key)))
        return attend(query, key, value, **options)

    monkeypatch.setattr(attention, "attend", counted)
    ids, pads = torch.randint(3, 10, (3, 8), generator=torch.Generator().manual_seed(0)), torch.tensor([0, 2, 5])
    model = PlainModel(directory)
    with torch.no_grad():
        found = passes(lambda x, **settings: model.hidden(x, None, None, **settings), ids, pads)
        assert calls == [(6, 6)] * 2 + [(1, 7)] * 2 + [(1, 8)] * 2  # two layers
        exact: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        wanted = passes(exact.model, ids, pads)
        calls.clear()
        passes(lambda x, **settings: PlainModel(directory, torch.float32).hidden(x, None, None, **settings), ids, pads)
    assert not calls  # torch's kernel is as fast in fp32
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.05)
