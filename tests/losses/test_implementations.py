"""What the implementations of the hidden states' divergence promise beyond equal numbers: the choice, kept promises, main_grad, infinite rows."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_cord.errors import CordError
from megatron_cord.losses import LossWeights, TokenStats, choice, divergence_from_hidden
from megatron_cord.losses.choice import chosen_implementation
from megatron_cord.losses.chunks import chunks_of
from tests.losses.reference import Inputs, make_inputs, reference_hidden_gradients, relative_error

IMPLEMENTATIONS = ["recompute", "late", "fused"]


def make(dtype: torch.dtype = torch.float32) -> Inputs:
    return make_inputs(num_tokens=7, hidden=4, columns=20, vocab_size=20, dtype=dtype)


def arguments(inputs: Inputs) -> tuple[Tensor, ...]:
    """Of ``divergence_from_hidden``, with leaves that ask for gradients."""
    hidden, weight = inputs.student_hidden.clone().requires_grad_(), inputs.student_weight.clone().requires_grad_()
    return hidden, weight, inputs.teacher_hidden, inputs.teacher_weight, inputs.target_ids


def ones(stats: TokenStats, _: slice) -> LossWeights:
    return LossWeights(torch.ones_like(stats.kl))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_main_grad_takes_the_weights_gradient(implementation: str) -> None:
    """Catches a gradient that DDP's buffer gets twice or never, in bfloat16, over two microbatches; and the tied embedding's lost."""
    inputs = make(torch.bfloat16)
    hidden, weight, *others = arguments(inputs)
    weight.main_grad = torch.ones(weight.shape)  # type: ignore[attr-defined]
    weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    for scale in (1.0, 2.0):
        stats = divergence_from_hidden(hidden, weight, *others, implementation=implementation, loss_weights=ones)
        embedded = weight[:2].float().sum()  # a second use of a tied weight
        (scale * stats.kl.sum() + embedded).backward()
    only_divergence = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)[:, None].expand(3, 7)
    one = Inputs(**{**vars(inputs), "weights": only_divergence})
    expected = reference_hidden_gradients(one, kind="reverse_kl")[2]
    assert weight.grad_added_to_main_grad  # type: ignore[attr-defined]
    assert relative_error(weight.main_grad - 1.0, 3.0 * expected) < 1e-2  # type: ignore[attr-defined]
    assert weight.grad is not None
    assert weight.grad[:2].eq(2.0).all() and weight.grad[2:].eq(0.0).all()  # the embedding's alone


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_an_unused_infinite_row_poisons_nothing(implementation: str) -> None:
    """Catches 0 · NaN: one token's divergence is infinite, its weight is zero, and the gradients are those without it."""
    weight, teacher_weight = torch.randn(2, 6, 2, generator=torch.Generator().manual_seed(0)).unbind(0)
    teacher_weight[5] = torch.tensor(
        [0.0, -math.inf]
    )  # the teacher's logit of token 5: −inf for the second row, NaN-free for the first
    teacher_hidden = torch.tensor([[1.0, 1e-30], [1.0, 1.0]])
    hidden = torch.randn(2, 2, generator=torch.Generator().manual_seed(1)).requires_grad_()
    layer = weight.clone().requires_grad_()
    used = torch.tensor([0.0, 0.0])

    def promise(stats: TokenStats, rows: slice) -> LossWeights:
        return LossWeights(used[rows], None, torch.ones_like(stats.kl))

    stats = divergence_from_hidden(
        hidden,
        layer,
        teacher_hidden,
        teacher_weight,
        torch.tensor([0, 1]),
        implementation=implementation,
        loss_weights=promise,
    )
    assert stats.kl.isinf().all()
    (torch.where(used == 0, 0.0, stats.kl).sum() + stats.student_logprob.sum()).backward()
    assert hidden.grad is not None and layer.grad is not None
    p = (hidden.detach() @ weight.T).softmax(1)
    dz = torch.nn.functional.one_hot(torch.tensor([0, 1]), 6) - p
    torch.testing.assert_close(hidden.grad, dz @ weight)
    torch.testing.assert_close(layer.grad, dz.T @ hidden.detach())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_used_infinite_row_is_not_silent(implementation: str) -> None:
    """Catches an infinite divergence whose gradient is a plausible number."""
    teacher_weight = torch.zeros(6, 1)
    teacher_weight[5] = -math.inf
    hidden = torch.ones(1, 2, requires_grad=True)
    layer = torch.ones(6, 2)
    arguments = (hidden, layer, torch.ones(1, 1), teacher_weight, torch.tensor([0]))
    stats = divergence_from_hidden(*arguments, implementation=implementation, loss_weights=ones)
    assert stats.kl.isinf().all()
    stats.kl.sum().backward()
    assert hidden.grad is not None and hidden.grad.isnan().all()


def test_a_broken_promise_is_refused() -> None:
    """Catches gradients of another loss than the caller formed."""
    hidden, weight, *others = arguments(make())
    stats = divergence_from_hidden(hidden, weight, *others, implementation="fused", loss_weights=ones)
    factor = torch.ones(7)
    factor[3] = 1.5
    with pytest.raises(CordError, match=r"the loss weighs token 3 by \[1.5, 0.0, 0.0\].*promised"):
        (stats.kl * factor).sum().backward()


def test_a_promise_of_the_wrong_shape_is_refused() -> None:
    """Catches weights of all tokens given for one chunk."""
    with pytest.raises(CordError, match=r"loss_weights gave kl weights of shape \[7\] for 3 tokens"):
        divergence_from_hidden(
            *arguments(make()),
            implementation="fused",
            chunk_tokens=3,
            loss_weights=lambda *_: LossWeights(torch.ones(7)),
        )
    with pytest.raises(CordError, match="implementation fused needs loss_weights"):
        divergence_from_hidden(*arguments(make()), implementation="fused")


def test_a_promise_sees_whole_sequences() -> None:
    """Catches chunks that cut a sequence, whose token weights would then be wrong."""
    seen = []

    def promise(stats: TokenStats, rows: slice) -> LossWeights:
        seen.append((rows.start, rows.stop))
        return ones(stats, rows)

    borders = torch.tensor([0, 2, 3, 3, 6, 7])
    divergence_from_hidden(
        *arguments(make()), implementation="fused", chunk_tokens=3, cu_seqlens=borders, loss_weights=promise
    )
    assert seen == [(0, 3), (3, 6), (6, 7)]


@pytest.mark.parametrize(
    ("num_tokens", "chunk", "borders", "expected"),
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
def test_chunks(num_tokens: int, chunk: int, borders: list[int] | None, expected: list[tuple[int, int]]) -> None:
    """Catches tokens lost at a seam, and an empty sequence that ends a chunk."""
    assert [(rows.start, rows.stop) for rows in chunks_of(num_tokens, chunk, borders)] == expected


def test_auto_chooses_by_what_is_kept(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a buffer larger than the memory, gradients formed for nobody, and a choice that is not told, or told at every call."""
    choice._announce.cache_clear()
    hidden, weight = torch.zeros(100, 4), torch.zeros(50, 4)

    def chosen(promised: bool, free: int) -> str:
        monkeypatch.setattr(choice, "free_bytes", lambda device: free)
        options: dict[str, Any] = {"has_loss_weights": promised, "buffer_itemsize": 2}
        return chosen_implementation("auto", hidden, weight, **options)

    with caplog.at_level(logging.INFO, logger=choice.__name__):
        assert chosen(False, 10**9) == "recompute"  # nothing asks for a gradient
        assert not caplog.records
        weight.requires_grad_()
        assert [chosen(False, 10**9), chosen(False, 10**9)] == ["late", "late"]
        assert chosen(False, 4 * 100 * 50 * 2 - 1) == "recompute"
        assert chosen(True, 10**9) == "fused"  # (100 + 50) · 4 · 4 bytes against 100 · 50 · 2
        assert chosen(True, 4 * (100 + 50) * 4 * 4 - 1) == "recompute"
        hidden = torch.zeros(5, 4)
        assert chosen(True, 4 * (5 + 50) * 4 * 4 - 1) == "late"  # 5 · 50 · 2 bytes fit
    assert [record.getMessage().split(" (")[0] for record in caplog.records] == [
        f"divergence from hidden states: {name}" for name in ("late", "recompute", "fused")
    ]
