"""Intervals and tests against known values."""

from __future__ import annotations

import pytest

from megatron_cord.compare.statistics import Mean, SignTest, mean_of, paired_difference, sign_test, student_quantile


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
    """Catches differences of means over different seeds: only seeds 1 and 2 are shared, and differ by 1 each, whatever their level."""
    got = paired_difference({0: 100.0, 1: 6.0, 2: 3.0}, {1: 5.0, 2: 2.0, 4: 0.0})
    assert got == Mean(1.0, 1.0, 1.0, 2)
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


def test_sign_test() -> None:
    """Catches a one-sided p, and agreement that counts: 8 against 1 of 9 is 2 · 10 / 512, a tie is 1."""
    pairs = [(True, False)] * 8 + [(False, True)] + [(True, True)] * 50 + [(False, False)] * 3
    assert sign_test(pairs) == SignTest(8, 1, pytest.approx(20 / 512))  # type: ignore[arg-type]
    assert sign_test([(True, False), (False, True)]).p == 1.0 and sign_test([]) == SignTest(0, 0, 1.0)
