"""The divergence on one rank: exact gradients, extreme logits, small divergences, memory."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_cord.losses import (
    divergence_from_hidden,
    divergence_from_logits,
    token_logprobs_from_hidden,
)
from tests.losses.reference import (
    make_inputs,
    reference_hidden_gradients,
    reference_logits_gradient,
    relative_error,
    weighted,
    weighted_loss,
)

KINDS = ["reverse_kl", "forward_kl"]
ALL_KINDS: list[dict[str, Any]] = [{"kind": kind} for kind in KINDS] + [
    {"kind": "jsd", "beta": 0.3},
    {"kind": "topk", "k": 3},
    {"kind": "forward_topk", "k": 3},
]
IMPLEMENTATIONS = ["recompute", "cached_grad", "fused"]
INFINITY = math.inf


def check_against_reference(student: Tensor, teacher: Tensor, *, tolerance: float, **options: Any) -> None:
    """Values and gradients of logits [N, V], both relative to the largest of their kind."""
    num_tokens, columns = student.shape
    target_ids = torch.arange(num_tokens) % columns
    weights = torch.randn(3, num_tokens, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    leaf = student.clone().requires_grad_()
    stats = divergence_from_logits(leaf, teacher, target_ids, **options)
    weighted(stats, weights).backward()  # type: ignore[no-untyped-call]
    expected, gradient = reference_logits_gradient(student, teacher, target_ids, weights, **options)
    for actual, value in zip(
        (stats.kl, stats.entropy, stats.student_logprob, stats.teacher_logprob), expected, strict=True
    ):
        torch.testing.assert_close(actual.detach().double(), value, rtol=tolerance, atol=tolerance)
    assert leaf.grad is not None
    assert relative_error(leaf.grad, gradient) < tolerance


@pytest.mark.parametrize("implementation", ["recompute", "cached_grad"])
@pytest.mark.parametrize("kind", ALL_KINDS, ids=lambda kind: kind["kind"])
@pytest.mark.parametrize("vocab_size", [None, 7])
def test_gradcheck_of_all_outputs_together(kind: dict[str, Any], vocab_size: int | None, implementation: str) -> None:
    """Catches a term missing in the closed gradient formula, from logits and from hidden states."""
    inputs = make_inputs(num_tokens=5, hidden=3, columns=9, vocab_size=7, dtype=torch.float64)
    options: dict[str, Any] = {**kind, "temperature": 0.7, "vocab_size": vocab_size}

    def from_logits(student: Tensor) -> tuple[Tensor, ...]:
        stats = divergence_from_logits(student, inputs.logits()[1], inputs.target_ids, **options)
        return stats.kl, stats.entropy, stats.student_logprob

    def from_hidden(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        arguments = (hidden, weight, inputs.teacher_hidden, inputs.teacher_weight, inputs.target_ids)
        stats = divergence_from_hidden(*arguments, chunk_tokens=2, implementation=implementation, **options)
        return stats.kl, stats.entropy, stats.student_logprob

    torch.autograd.gradcheck(from_logits, inputs.logits()[0].requires_grad_())
    torch.autograd.gradcheck(
        from_hidden, (inputs.student_hidden.clone().requires_grad_(), inputs.student_weight.clone().requires_grad_())
    )


@pytest.mark.parametrize("kind", ALL_KINDS, ids=lambda kind: kind["kind"])
@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0, 4.0])
def test_temperatures(kind: dict[str, Any], temperature: float) -> None:
    """Catches a temperature that is applied twice, to one side only, or left out of the gradient."""
    inputs = make_inputs(num_tokens=6, hidden=8, columns=30, vocab_size=30, dtype=torch.float64)
    check_against_reference(*inputs.logits(), **kind, temperature=temperature, tolerance=1e-10)


@pytest.mark.parametrize("kind", ALL_KINDS, ids=lambda kind: kind["kind"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("offsets", [(1e4, -1e4), (-1e4, 1e4), (1e4, 1e4)])
def test_float32_logits_far_from_zero(offsets: tuple[float, float], temperature: float, kind: dict[str, Any]) -> None:
    """Catches a log-sum-exp folded into one number, or a temperature applied too early: both lose digits at 1e4."""
    inputs = make_inputs(num_tokens=6, hidden=8, columns=300, vocab_size=300, dtype=torch.float32)
    student, teacher = inputs.logits()
    check_against_reference(student + offsets[0], teacher + offsets[1], **kind, temperature=temperature, tolerance=1e-5)


@pytest.mark.parametrize("kind", ALL_KINDS[:3], ids=lambda kind: kind["kind"])
def test_float32_logits_of_large_scale(kind: dict[str, Any]) -> None:
    """Catches overflow: logits of scale 1e4, whose divergence is of that size too."""
    inputs = make_inputs(num_tokens=6, hidden=8, columns=300, vocab_size=300, dtype=torch.float32)
    student, teacher = inputs.logits()
    check_against_reference(student * 1e4, teacher * 1e4, **kind, tolerance=1e-5)


@pytest.mark.parametrize("kind", ALL_KINDS[:3], ids=lambda kind: kind["kind"])
@pytest.mark.parametrize("same_place", [True, False])
def test_spikes(kind: dict[str, Any], same_place: bool) -> None:
    """Catches NaN from 0 · log 0 where one token has all the probability."""
    student, teacher = torch.zeros(4, 50), torch.zeros(4, 50)
    student[:, 3] = 1e4
    teacher[:, 3 if same_place else 7] = 1e4
    check_against_reference(student, teacher, **kind, tolerance=1e-5)


def test_equal_rows() -> None:
    """Catches a wrong constant: flat logits have entropy log V, divergence 0 and log-probability −log V."""
    logits = torch.full((3, 64), 5.0)
    stats = divergence_from_logits(logits, logits - 8.0, torch.tensor([0, 5, 63]))
    torch.testing.assert_close(stats.entropy, torch.full((3,), math.log(64)))
    torch.testing.assert_close(stats.student_logprob, torch.full((3,), -math.log(64)))
    assert stats.kl.abs().max() < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_teacher_equal_to_student(kind: str) -> None:
    """Catches cancellation where distillation ends: |divergence| < 1e-6 in float32, gradient nearly 0."""
    inputs = make_inputs(num_tokens=16, hidden=8, columns=500, vocab_size=500, dtype=torch.float32)
    hidden, weight = inputs.student_hidden.clone().requires_grad_(), inputs.student_weight.clone().requires_grad_()
    stats = divergence_from_hidden(hidden, weight, hidden, weight, inputs.target_ids, kind=kind)
    stats.kl.sum().backward()  # type: ignore[no-untyped-call]
    assert stats.kl.abs().max() < 1e-6
    assert hidden.grad is not None and hidden.grad.abs().max() < 1e-6


@pytest.mark.parametrize("kind", ALL_KINDS, ids=lambda kind: kind["kind"])
def test_minus_infinity_in_both_counts_for_nothing(kind: dict[str, Any]) -> None:
    """Catches inf − inf: a token forbidden in both distributions must leave values and gradients finite and right."""
    inputs = make_inputs(num_tokens=4, hidden=8, columns=30, vocab_size=30, dtype=torch.float64)
    student, teacher = (logits.clone() for logits in inputs.logits())
    student[:, 20:25] = teacher[:, 20:25] = -INFINITY
    check_against_reference(student, teacher, **kind, tolerance=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("student_logit", [0.0, -1e5])
def test_infinite_divergence(kind: str, student_logit: float) -> None:
    """Catches a finite number where the divisor is 0 and the other is not, and a gradient that poisons its batch.

    The other may underflow. A row whose divergence is not used (weight 0) has the exact gradient of the other terms.
    """
    numerator, divisor = torch.randn(2, 40, generator=torch.Generator().manual_seed(0)), torch.zeros(2, 40)
    numerator[1, 8], divisor[1, 8] = student_logit, -INFINITY
    student, teacher = (numerator, divisor) if kind == "reverse_kl" else (divisor, numerator)
    student.requires_grad_()
    stats = divergence_from_logits(student, teacher, torch.tensor([1, 2]), kind=kind)
    assert stats.kl[0].isfinite() and stats.kl[1] == INFINITY
    weights = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    kept = torch.where(weights[0] == 0, 0.0, stats.kl)  # 0 · inf is NaN already in the loss
    (kept.sum() + (torch.stack([stats.entropy, stats.student_logprob]) * weights[1:]).sum()).backward()  # type: ignore[no-untyped-call]
    # The reference of the second row leaves the infinite term out by comparing the student with itself.
    second = reference_logits_gradient(student, student.detach(), torch.tensor([1, 2]), weights, kind=kind)[1][1]
    assert student.grad is not None and student.grad.isfinite().all()
    assert relative_error(student.grad[1], second) < 1e-5


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_small_divergence_from_bfloat16_hidden_states(implementation: str) -> None:
    """Catches logits rounded to bfloat16: at a true KL of 4e-4 they spoil the hidden gradient by tens of percent."""
    inputs = make_inputs(
        num_tokens=32, hidden=256, columns=4096, vocab_size=4096, dtype=torch.bfloat16, distance=0.0125
    )
    only_divergence = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)[:, None].expand(3, 32)
    (true_kl, *_), hidden_gradient, weight_gradient = reference_hidden_gradients(
        dataclasses.replace(inputs, weights=only_divergence), kind="reverse_kl"
    )
    assert 3e-4 < true_kl.mean() < 5e-4

    hidden, weight = inputs.student_hidden.clone().requires_grad_(), inputs.student_weight.clone().requires_grad_()
    arguments = (hidden, weight, inputs.teacher_hidden, inputs.teacher_weight, inputs.target_ids)
    loss, stats = weighted_loss(torch.ones(1, 32), *arguments, implementation=implementation)
    loss.backward()  # type: ignore[no-untyped-call]
    assert hidden.grad is not None and weight.grad is not None
    assert relative_error(stats.kl, true_kl) < 5e-3
    assert relative_error(hidden.grad, hidden_gradient) < 1e-2
    assert relative_error(weight.grad, weight_gradient) < 1e-2

    logits = (inputs.student_hidden @ inputs.student_weight.T).requires_grad_()
    divergence_from_logits(logits, inputs.logits()[1], inputs.target_ids).kl.sum().backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert (
        relative_error(logits.grad @ inputs.student_weight, hidden_gradient) > 1e-1
    )  # the test can tell the two apart


class LargestTensor(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the number of elements of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


@pytest.mark.parametrize("implementation", ["recompute", "fused"])
def test_logits_exist_for_a_chunk_at_a_time(implementation: str) -> None:
    """Catches [N, V] logits that are stored whole, forward or backward."""
    inputs = make_inputs(num_tokens=64, hidden=4, columns=100, vocab_size=100, dtype=torch.float32)
    hidden, weight = inputs.student_hidden.requires_grad_(), inputs.student_weight.requires_grad_()
    with LargestTensor() as largest:
        arguments = (hidden, weight, inputs.teacher_hidden, inputs.teacher_weight, inputs.target_ids)
        loss, _ = weighted_loss(torch.ones(1, 64), *arguments, chunk_tokens=8, implementation=implementation)
        loss.backward()  # type: ignore[no-untyped-call]
    assert largest.elements == 8 * 100


def test_chunks_and_implementations_make_no_difference() -> None:
    """Catches rows lost or counted twice where chunks meet, and an implementation that drops one of the three terms."""
    inputs = make_inputs(num_tokens=7, hidden=4, columns=20, vocab_size=20, dtype=torch.float64)
    outcomes = []
    for implementation, chunk in itertools.product(IMPLEMENTATIONS, (1, 3, 7, 100, None)):
        hidden, weight = inputs.student_hidden.clone().requires_grad_(), inputs.student_weight.clone().requires_grad_()
        loss, stats = weighted_loss(
            inputs.weights,
            hidden,
            weight,
            inputs.teacher_hidden,
            inputs.teacher_weight,
            inputs.target_ids,
            chunk_tokens=chunk,
            implementation=implementation,
        )
        (3.0 * loss).backward()  # type: ignore[no-untyped-call]
        assert hidden.grad is not None and weight.grad is not None
        outcomes.append((stats.kl, loss.detach(), hidden.grad, weight.grad))
    for outcome in outcomes[1:]:
        torch.testing.assert_close(outcome, outcomes[0], rtol=1e-12, atol=1e-12)


def test_gradient_reaches_the_student_alone() -> None:
    """Catches a teacher that learns, also where it shares the student's weight, and a gradient for a frozen layer."""
    inputs = make_inputs(num_tokens=5, hidden=4, columns=20, vocab_size=20, dtype=torch.float64)
    student, teacher = (logits.clone().requires_grad_() for logits in inputs.logits())
    stats = divergence_from_logits(student, teacher, inputs.target_ids)
    assert not stats.teacher_logprob.requires_grad
    stats.kl.sum().backward()  # type: ignore[no-untyped-call]
    assert student.grad is not None and teacher.grad is None

    hidden, teacher_hidden, weight = (
        tensor.clone() for tensor in (inputs.student_hidden, inputs.teacher_hidden, inputs.student_weight)
    )
    hidden.requires_grad_()
    teacher_hidden.requires_grad_()
    divergence_from_hidden(hidden, weight, teacher_hidden, weight, inputs.target_ids).kl.sum().backward()  # type: ignore[no-untyped-call]
    assert hidden.grad is not None and teacher_hidden.grad is None and weight.grad is None


def test_logits_that_are_views() -> None:
    """Catches an assumption that inputs are contiguous or do not overlap: transposed student, expanded teacher."""
    student = torch.randn(20, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).T
    check_against_reference(
        student, torch.arange(20.0, dtype=torch.float64).expand(5, 20), kind="reverse_kl", tolerance=1e-10
    )


def test_logits_of_different_types() -> None:
    """Catches statistics in a lower type than float32, and a gradient in another type than its logits."""
    student = torch.randn(4, 20, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16).requires_grad_()
    teacher = torch.zeros(4, 20, dtype=torch.float16)
    stats = divergence_from_logits(student, teacher, torch.arange(4))
    stats.kl.sum().backward()  # type: ignore[no-untyped-call]
    expected = reference_logits_gradient(student, teacher, torch.arange(4), torch.zeros(3, 4), kind="reverse_kl")[0][0]
    assert stats.kl.dtype == torch.float32
    torch.testing.assert_close(stats.kl.detach().double(), expected, rtol=1e-5, atol=1e-5)
    assert student.grad is not None and student.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("vocab_size", [None, 17])
def test_logprobs_without_a_teacher(vocab_size: int | None) -> None:
    """Catches an entropy that needs a teacher, a product with one, and a gradient that misses a term."""
    inputs = make_inputs(num_tokens=7, hidden=4, columns=20, vocab_size=17, dtype=torch.float64)
    weights = inputs.weights * torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)[:, None]
    options: dict[str, Any] = {"temperature": 0.7, "vocab_size": vocab_size}
    expected, *gradients = reference_hidden_gradients(
        dataclasses.replace(inputs, weights=weights), kind="reverse_kl", **options
    )
    hidden, weight = inputs.student_hidden.clone().requires_grad_(), inputs.student_weight.clone().requires_grad_()
    with Products() as products:
        stats = token_logprobs_from_hidden(hidden, weight, inputs.target_ids, chunk_tokens=100, **options)
    assert products.count == 1
    assert not stats.kl.requires_grad and stats.kl.count_nonzero() == 0
    torch.testing.assert_close((stats.entropy.detach(), stats.student_logprob.detach()), expected[1:3])
    assert torch.equal(stats.teacher_logprob, stats.student_logprob)
    (stats.entropy * weights[1] + stats.student_logprob * weights[2]).sum().backward()  # type: ignore[no-untyped-call]
    assert hidden.grad is not None and weight.grad is not None
    torch.testing.assert_close([hidden.grad, weight.grad], gradients)


class Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("implementation", "only_kl", "tied", "products"),
    [
        ("recompute", True, False, 6),
        ("recompute", True, True, 4),  # one product serves both models, forward and again backward
        ("cached_grad", True, False, 4),
        ("cached_grad", True, True, 3),
        ("cached_grad", False, False, 5),
        ("fused", False, False, 4),
        ("fused", False, True, 3),
    ],
)
def test_products(implementation: str, only_kl: bool, tied: bool, products: int) -> None:
    """Catches logits that are formed once too often: the implementations are told apart by their number of GEMMs."""
    inputs = make_inputs(num_tokens=7, hidden=4, columns=20, vocab_size=20, dtype=torch.float64)
    hidden, weight = inputs.student_hidden.clone().requires_grad_(), inputs.student_weight.clone().requires_grad_()
    teacher_weight = weight if tied else inputs.teacher_weight
    weights = inputs.weights[:1] if only_kl else inputs.weights
    with Products() as counted:
        loss, _ = weighted_loss(
            weights,
            hidden,
            weight,
            inputs.teacher_hidden,
            teacher_weight,
            inputs.target_ids,
            implementation=implementation,
        )
        loss.backward()  # type: ignore[no-untyped-call]
    assert counted.count == products
