"""Intervals and p-values against plain computations."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest

from megatron_cord.evaluation.statistics import gap_closed_draws, mcnemar, paired_draws


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
