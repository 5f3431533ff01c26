"""Intervals and p-values against plain computations."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest

from megatron_cord.evaluation.statistics import (
    Mean,
    SignTest,
    gap_closed_draws,
    mcnemar,
    mean_of,
    paired_difference,
    paired_draws,
    sign_test,
    student_quantile,
)


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (1, 0), (5, 1), (10, 10), (30, 12), (400, 330)])
def test_mcnemar_is_a_binomial_test(gained: int, lost: int) -> None:
    """Catches one side for two, questions that both answer alike counted in, and an overflow with many questions."""
    first = np.array([False] * gained + [True] * lost + [True, False] * 20)
    second = np.array([True] * gained + [False] * lost + [True, False] * 20)
    n, k = gained + lost, min(gained, lost)
    exact = min(1.0, 2 * sum(comb(n, i) for i in range(k + 1)) / 2**n) if n else 1.0
    assert mcnemar(first, second) == pytest.approx(exact, rel=1e-9) and mcnemar(second, first) == pytest.approx(
        exact, rel=1e-9
    )


def test_draws_keep_pairs_together() -> None:
    """Catches columns that are drawn apart: the difference of two equal ones would vary."""
    right = np.random.default_rng(0).random(100) < 0.6
    draws = paired_draws(np.stack([right, right, ~right], axis=1))
    assert np.allclose(draws[:, 0], draws[:, 1]) and np.allclose(draws[:, 0] + draws[:, 2], 1.0)
    assert draws[:, 0].std() == pytest.approx(np.sqrt(right.mean() * (1 - right.mean()) / 100), rel=0.05)
    assert not np.array_equal(draws, paired_draws(np.stack([right, right, ~right], axis=1), seed=1))


def test_no_ratio_to_a_gap_that_may_not_exist() -> None:
    """Catches an interval of pure noise."""
    draws = np.random.default_rng(0).normal(0.8, 0.05, size=(1000, 2))
    assert gap_closed_draws(draws[:, 0], draws[:, 1], draws[:, 1]) is None
    closed = gap_closed_draws(draws[:, 0], draws[:, 1] - 0.5, draws[:, 0])
    assert closed is not None and np.allclose(closed, 1.0)


@pytest.mark.parametrize(
    ("degrees", "quantile"),
    [(1, 12.706), (2, 4.303), (9, 2.262), (10, 2.228), (15, 2.131), (30, 2.042), (120, 1.980), (10**6, 1.960)],
)
def test_students_quantiles(degrees: int, quantile: float) -> None:
    """Catches a table shifted by one, and an expansion with a wrong term (values of printed tables)."""
    assert student_quantile(degrees) == pytest.approx(quantile, abs=6e-4)


def test_a_mean_and_its_interval() -> None:
    """Catches the population's deviation in the sample's place: 1, 2, 3 have mean 2 ± 4.303 · 1 / √3."""
    got = mean_of([1.0, 2.0, 3.0])
    assert (
        (got.mean, got.n) == (2.0, 3)
        and got.low == pytest.approx(2 - 2.4841, abs=1e-3)
        and got.high == pytest.approx(2 + 2.4841, abs=1e-3)
    )
    assert mean_of([0.5]) == Mean(0.5, None, None, 1)
    with pytest.raises(ValueError, match="no values"):
        mean_of([])


def test_differences_are_paired_by_seed() -> None:
    """Catches differences of means over different seeds: seeds 1 and 2 alone are shared, and differ by 1 each."""
    got = paired_difference({0: 100.0, 1: 6.0, 2: 3.0}, {1: 5.0, 2: 2.0, 4: 0.0})
    assert got == Mean(1.0, 1.0, 1.0, 2)
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


def test_sign_test() -> None:
    """Catches a one-sided p, and agreement that counts: 8 against 1 of 9 is 2 · 10 / 512, a tie is 1."""
    pairs = [(True, False)] * 8 + [(False, True)] + [(True, True)] * 50 + [(False, False)] * 3
    assert sign_test(pairs) == SignTest(8, 1, pytest.approx(20 / 512))  # type: ignore[arg-type]
    assert sign_test([(True, False), (False, True)]).p == 1.0 and sign_test([]) == SignTest(0, 0, 1.0)
