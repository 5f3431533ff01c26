"""The time of a run: when there is none for another step."""

from __future__ import annotations

import pytest

from megatron_cord.trainer.endings.time_budget import TimeBudget


@pytest.mark.parametrize(
    ("hours", "spent", "longest", "over"),
    [
        (0, 1e9, {"step": 1e9}, False),
        (1, 0, {}, False),
        (1, 3170, {"step": 9}, True),  # a twentieth is kept for a checkpoint and an evaluation of unknown length, each
        (1, 3150, {"step": 9}, False),
        (1, 3400, {"step": 60, "checkpoint": 50, "evaluation": 60}, False),
        (1, 3420, {"step": 60, "checkpoint": 50, "evaluation": 60}, True),
        (1, 3700, {"step": 0, "checkpoint": 0, "evaluation": 0}, True),
    ],
)
def test_a_step_is_made_only_if_the_end_fits_behind_it(
    hours: float, spent: float, longest: dict[str, float], over: bool
) -> None:
    """Catches an end that does not fit into the time any more, time kept for nothing, and 0 taken for no time."""
    assert TimeBudget(hours, spent, longest).is_over() == over


def test_the_longest_counts() -> None:
    """Catches a short step that makes a long one forgotten, and estimates that a start does not take over."""
    budget = TimeBudget(1, 3000, {"step": 10, "checkpoint": 1, "evaluation": 1})
    budget.took("step", 590)
    budget.took("step", 1)
    assert budget.longest == {"step": 590, "checkpoint": 1, "evaluation": 1}
    assert not budget.is_over()
    assert TimeBudget(1, 3010, budget.longest).is_over()
