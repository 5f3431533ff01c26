"""What the implementations have beside equal numbers: the choice, the calls of the loss, main_grad, infinite rows."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_cord.errors import CordError
from megatron_cord.losses import TokenStats, distillation_loss, divergence_from_hidden
from megatron_cord.losses.implementations import choice
from megatron_cord.losses.implementations.choice import choose_implementation
from tests.losses.reference import (
    Inputs,
    make_inputs,
    reference_hidden_gradients,
    relative_error,
    weighted_loss,
)

IMPLEMENTATIONS = ["recompute", "cached_grad", "fused"]


def make(dtype: torch.dtype = torch.float32) -> Inputs:
    return make_inputs(num_tokens=7, hidden=4, columns=20, vocab_size=20, dtype=dtype)


def arguments(inputs: Inputs) -> tuple[Tensor, ...]:
    """Of ``divergence_from_hidden``, with leaves that need gradients."""
    hidden, weight = inputs.student_hidden.clone().requires_grad_(), inputs.student_weight.clone().requires_grad_()
    return hidden, weight, inputs.teacher_hidden, inputs.teacher_weight, inputs.target_ids


#: [1, N], of the divergence alone
ONES = torch.ones(1, 7)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_main_grad_takes_the_weights_gradient(implementation: str) -> None:
    """Catches a gradient that DDP's buffer gets twice or never, over two microbatches; a tied embedding's lost."""
    inputs = make(torch.bfloat16)
    hidden, weight, *others = arguments(inputs)
    weight.main_grad = torch.ones(weight.shape)  # type: ignore[attr-defined]
    weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    for scale in (1.0, 2.0):
        loss, _ = weighted_loss(ONES, hidden, weight, *others, implementation=implementation)
        embedded = weight[:2].float().sum()  # a second use of a tied weight
        (scale * loss + embedded).backward()  # type: ignore[no-untyped-call]
    only_divergence = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)[:, None].expand(3, 7)
    one = Inputs(**{**vars(inputs), "weights": only_divergence})
    expected = reference_hidden_gradients(one, kind="reverse_kl")[2]
    assert weight.grad_added_to_main_grad  # type: ignore[attr-defined]
    assert relative_error(weight.main_grad - 1.0, 3.0 * expected) < 1e-2  # type: ignore[attr-defined]
    assert weight.grad is not None
    assert weight.grad[:2].eq(2.0).all() and weight.grad[2:].eq(0.0).all()  # the embedding's alone


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_main_grad_costs_no_second_gradient(implementation: str) -> None:
    """Catches a gradient of the weight's size that autograd makes beside DDP's buffer, only to be thrown away."""
    hidden, weight, *others = arguments(make(torch.bfloat16))
    weight.main_grad = torch.zeros(weight.shape)  # type: ignore[attr-defined]
    weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    loss, _ = weighted_loss(ONES, hidden, weight, *others, implementation=implementation)
    loss.backward()  # type: ignore[no-untyped-call]
    gradient = weight.grad
    assert gradient is not None and gradient.shape == weight.shape  # DDP's hooks refuse None when they overlap
    parts = [gradient._indices(), gradient._values()] if gradient.is_sparse else [gradient]
    assert sum(part.untyped_storage().nbytes() for part in parts) == 0
    weight.main_grad.add_(gradient)  # type: ignore[attr-defined]  # as DDP's hook does for a tied weight
    assert weight.main_grad.any()  # type: ignore[attr-defined]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_an_unused_infinite_row_poisons_nothing(implementation: str) -> None:
    """Catches 0 · NaN: with an infinite divergence of weight zero, the gradients must be those without it."""
    weight, teacher_weight = torch.randn(2, 6, 2, generator=torch.Generator().manual_seed(0)).unbind(0)
    teacher_weight[5] = torch.tensor(
        [0.0, -math.inf]
    )  # the teacher's logit of token 5: −inf for the second row, NaN-free for the first
    teacher_hidden = torch.tensor([[1.0, 1e-30], [1.0, 1.0]])
    hidden = torch.randn(2, 2, generator=torch.Generator().manual_seed(1)).requires_grad_()
    layer = weight.clone().requires_grad_()
    used = torch.tensor([0.0, 0.0])

    def chunk_loss(stats: TokenStats, rows: slice) -> Tensor:
        return torch.where(used[rows] == 0, 0.0, stats.kl).sum() + stats.student_logprob.sum()

    loss, stats = distillation_loss(
        chunk_loss,
        hidden,
        layer,
        teacher_hidden,
        teacher_weight,
        torch.tensor([0, 1]),
        implementation=implementation,
    )
    assert stats.kl.isinf().all()
    loss.backward()  # type: ignore[no-untyped-call]
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
    loss, stats = weighted_loss(ONES[:, :1], *arguments, implementation=implementation)
    assert stats.kl.isinf().all()
    loss.backward()  # type: ignore[no-untyped-call]
    assert hidden.grad is not None and hidden.grad.isnan().all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_loss_is_evaluated_once_for_each_token(implementation: str) -> None:
    """Catches chunks that cut a response, whose token weights would be wrong, and a loss that is evaluated again."""
    seen = []

    def chunk_loss(stats: TokenStats, rows: slice) -> Tensor:
        seen.append((rows.start, rows.stop))
        assert stats.kl.shape == stats.teacher_logprob.shape == (rows.stop - rows.start,)
        return stats.kl.sum()

    hidden, *others = arguments(make())
    cu_seqlens = torch.tensor([0, 2, 3, 3, 6, 7])
    loss, stats = distillation_loss(
        chunk_loss, hidden, *others, implementation=implementation, chunk_tokens=3, cu_seqlens=cu_seqlens
    )
    loss.backward()  # type: ignore[no-untyped-call]
    assert seen == ([(0, 3), (3, 6), (6, 7)] if implementation == "fused" else [(0, 7)])
    torch.testing.assert_close(loss.detach(), stats.kl.sum())
    assert hidden.grad is not None and not any(field.requires_grad for field in vars(stats).values())


def test_a_loss_without_gradient() -> None:
    """Catches a chunk whose loss is a constant and stops the fused pass, and gradients that are not zero then."""
    hidden, *others = arguments(make())
    loss, _ = distillation_loss(
        lambda stats, rows: stats.kl.sum() if rows.start else stats.kl.new_zeros(()),
        hidden,
        *others,
        implementation="fused",
        chunk_tokens=3,
    )
    loss.backward()  # type: ignore[no-untyped-call]
    assert hidden.grad is not None and hidden.grad[:3].count_nonzero() == 0 and hidden.grad[3:].count_nonzero() > 0


def test_fused_is_refused_where_it_is_impossible() -> None:
    """Catches another implementation taken silently, where the loss is not known or needs tokens of other ranks."""
    with pytest.raises(CordError, match="implementation fused needs the loss of a chunk"):
        divergence_from_hidden(*arguments(make()), implementation="fused")
    with pytest.raises(CordError, match="implementation fused needs the loss of a chunk"):
        distillation_loss(lambda stats, _: stats.kl.sum(), *arguments(make()), implementation="fused", splittable=False)


def test_auto_chooses_by_what_is_kept(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a buffer larger than the memory, gradients formed in vain, a choice not logged, or at every call."""
    choice._log_once.cache_clear()
    hidden, weight = torch.zeros(100, 4), torch.zeros(50, 4)

    def chosen(can_fuse: bool, free: int) -> str:
        monkeypatch.setattr(choice, "free_bytes", lambda device: free)
        options: dict[str, Any] = {"can_fuse": can_fuse, "buffer_itemsize": 2}
        return choose_implementation("auto", hidden, weight, **options)

    with caplog.at_level(logging.INFO, logger=choice.__name__):
        assert chosen(False, 10**9) == "recompute"  # nothing needs a gradient
        assert not caplog.records
        weight.requires_grad_()
        assert [chosen(False, 10**9), chosen(False, 10**9)] == ["cached_grad", "cached_grad"]
        assert chosen(False, 4 * 100 * 50 * 2 - 1) == "recompute"
        assert chosen(True, 10**9) == "fused"  # (100 + 50) · 4 · 4 bytes against 100 · 50 · 2
        assert chosen(True, 4 * (100 + 50) * 4 * 4 - 1) == "recompute"
        hidden = torch.zeros(5, 4)
        assert chosen(True, 4 * (5 + 50) * 4 * 4 - 1) == "cached_grad"  # 5 · 50 · 2 bytes fit
    assert [record.getMessage().split(" (")[0] for record in caplog.records] == [
        f"divergence from hidden states: {name}" for name in ("cached_grad", "recompute", "fused")
    ]
