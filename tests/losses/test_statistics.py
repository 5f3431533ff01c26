"""The eight scalars: whatever way the vocabulary is cut and merged, they come to the same."""

from __future__ import annotations

import itertools

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from megatron_cord.losses.divergences import make_divergence
from megatron_cord.losses.kernels.eager import block_gradient, block_stats
from megatron_cord.losses.shard import global_stats, merge_stats
from megatron_cord.losses.statistics import GlobalStats, PartialStats, empty_stats, stack_stats
from tests.losses.reference import reference_stats

#: Those whose divergence the eight scalars hold.
KINDS = ("reverse_kl", "forward_kl")
LOGIT = st.floats(-50.0, 50.0) | st.just(-float("inf"))


@st.composite
def two_rows(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Student's and teacher's logits [1, V], V in 1…12; −inf where it happens, but never everywhere."""
    columns = draw(st.integers(1, 12))
    rows = [draw(st.lists(LOGIT, min_size=columns, max_size=columns)) for _ in range(2)]
    for row in rows:
        row[draw(st.integers(0, columns - 1))] = draw(st.floats(-50.0, 50.0))
    return torch.tensor(rows[:1], dtype=torch.float64), torch.tensor(rows[1:], dtype=torch.float64)


@st.composite
def cuts(draw: st.DrawFn, columns: int) -> list[slice]:
    """Blocks that cover the columns, in any order."""
    edges = sorted({0, columns, *draw(st.lists(st.integers(0, columns), max_size=4))})
    return draw(st.permutations([slice(first, last) for first, last in itertools.pairwise(edges)]))


def merged_stats(
    student: Tensor, teacher: Tensor, target: int, kind: str, temperature: float, blocks: list[slice]
) -> GlobalStats:
    """Merge one block after another, beginning with nothing."""
    rule = make_divergence(kind)
    whole = empty_stats(1, dtype=torch.float64, device=student.device)
    for span in blocks:
        part = block_stats(student[:, span], teacher[:, span], torch.tensor([target - span.start]), rule, temperature)
        whole = merge_stats(stack_stats([whole, part]), rule, temperature)
    return global_stats(whole, rule, temperature)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data(), rows=two_rows(), temperature=st.sampled_from([0.1, 0.5, 1.0, 4.0]))
def test_any_cut_in_any_order_gives_the_reference(
    kind: str, data: st.DataObject, rows: tuple[Tensor, Tensor], temperature: float
) -> None:
    """Catches a merge that depends on the order, a massless block that poisons the rest, and −inf left out once."""
    columns = rows[0].shape[1]
    target = data.draw(st.integers(0, columns - 1))
    stats = merged_stats(*rows, target, kind, temperature, data.draw(cuts(columns)))
    expected = reference_stats(*rows, torch.tensor([target]), kind=kind, temperature=temperature)
    actual = (stats.divergence, stats.entropy, stats.student_logprob, stats.teacher_logprob)
    for value, reference in zip(actual, expected, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data(), rows=two_rows())
def test_the_gradient_sums_to_zero_over_the_vocabulary(
    kind: str, data: st.DataObject, rows: tuple[Tensor, Tensor]
) -> None:
    """Catches a term that changes with a constant added to all logits, whatever blocks the gradient is formed in."""
    student, teacher = rows
    teacher = torch.where(
        student == -torch.inf, -torch.inf, teacher.masked_fill(teacher == -torch.inf, 0.0)
    )  # finite divergence
    columns = student.shape[1]
    target = data.draw(st.sampled_from([i for i in range(columns) if student[0, i] > -torch.inf]))
    blocks = data.draw(cuts(columns))
    stats = merged_stats(student, teacher, target, kind, 0.5, blocks)
    weights = tuple(torch.tensor([data.draw(st.floats(-2.0, 2.0))], dtype=torch.float64) for _ in range(3))
    gradient = sum(
        block_gradient(
            student[:, span],
            teacher[:, span],
            torch.tensor([target - span.start]),
            stats,
            make_divergence(kind),
            0.5,
            *weights,
        ).sum()
        for span in blocks
    )
    assert abs(float(gradient)) < 1e-9


@given(rows=two_rows())
def test_divergences_are_not_negative(rows: tuple[Tensor, Tensor]) -> None:
    """Catches a swapped sign, and reverse and forward that are not each other's mirror."""
    student, teacher = rows
    blocks = [slice(0, student.shape[1])]
    reverse = merged_stats(student, teacher, 0, "reverse_kl", 1.0, blocks).divergence
    forward = merged_stats(teacher, student, 0, "forward_kl", 1.0, blocks).divergence
    assert reverse > -1e-10
    torch.testing.assert_close(reverse, forward, rtol=1e-10, atol=1e-10)


def test_the_empty_part_is_neutral() -> None:
    """Catches a rank that is all padding and changes the others' sums."""
    part = PartialStats(*torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    empty = empty_stats(3, dtype=torch.float64, device=part.student_max.device)
    for rule in map(make_divergence, KINDS):
        for order in ([part, empty], [empty, part], [empty, part, empty]):
            torch.testing.assert_close(tuple(merge_stats(stack_stats(order), rule, 1.0)), tuple(part), rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_an_infinite_part_stays_infinite(kind: str) -> None:
    """Catches 0 · inf in the merge: the infinite part lies so far below the maximum that its scale underflows."""
    numerator, divisor = torch.tensor([[0.0, -1e5]]), torch.tensor([[0.0, -torch.inf]])
    student, teacher = (numerator, divisor) if kind == "reverse_kl" else (divisor, numerator)
    for blocks in ([slice(0, 2)], [slice(0, 1), slice(1, 2)], [slice(1, 2), slice(0, 1)]):
        stats = merged_stats(student.double(), teacher.double(), 0, kind, 1.0, blocks)
        assert stats.divergence.item() == float("inf")
