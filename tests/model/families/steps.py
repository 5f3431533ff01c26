"""One training step of a family on four ranks in several layouts, checked against the same step of its reference."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from tests.gloo import run_ranks
from tests.model.family_reference import expected, save
from tests.model.ranks import Case, Outcome, make_batches, run_cases


def on_four_ranks(cases: Mapping[str, Case]) -> dict[str, list[Outcome]]:
    """Return the outcome of each case on each of four ranks."""
    with tempfile.TemporaryDirectory() as directory:
        checkpoints = {}
        for family, tied in {(case.family, case.tied) for case in cases.values()}:
            path = Path(directory) / f"{family}-{tied}"
            path.mkdir()
            save(path, family, tied)
            checkpoints[family, tied] = str(path)
        by_rank = run_ranks(run_cases, 4, dict(cases), checkpoints)
    return {name: [of_rank[name] for of_rank in by_rank] for name in cases}


def check_tensors(found: list[Outcome]) -> None:
    """Check that import and export give back the same bits."""
    assert [outcome.changed_by_round_trip for outcome in found] == [[]] * 4


def check_logits(found: list[Outcome], case: Case) -> None:
    """Check logits, those of padding left out."""
    wanted = expected(case.family, case.tied).logits
    given = {index: values for outcome in found for index, values in outcome.logits.items()}
    batches = make_batches(case.family)
    assert sorted(given) == list(range(len(batches)))
    for index, batch in enumerate(batches):
        for row, length in enumerate(batch.lengths):
            torch.testing.assert_close(given[index][row, :length], wanted[index][row, :length], rtol=0, atol=1e-5)


def check_gradients(found: list[Outcome], case: Case, noise: str | None = None) -> None:
    """Check each gradient, and the norm of all.

    Args:
        found: on each rank.
        case: that ran.
        noise: ending of the names of tensors whose gradient is rounding noise; None: no tensor's is.
    """
    wanted = expected(case.family, case.tied)
    gradients = {n: tensor for n, tensor in wanted.gradients.items() if noise is None or not n.endswith(noise)}
    errors = {n: float((found[0].gradients[n] - tensor).norm() / tensor.norm()) for n, tensor in gradients.items()}
    assert max(errors.values()) < 1e-4, {n: error for n, error in errors.items() if error >= 1e-4}
    left_out = wanted.gradients.keys() - gradients.keys()
    assert bool(left_out) == (noise is not None)
    assert all(float(wanted.gradients[n].norm()) < 1e-6 * wanted.gradient_norm for n in left_out)
    assert found[0].gradient_norm == pytest.approx(wanted.gradient_norm, rel=1e-5)


def check_update(found: list[Outcome], case: Case) -> None:
    """Check each tensor after a step of AdamW, and that what stands for an absent key bias is not learned."""
    for tensor, value in expected(case.family, case.tied).updated.items():
        torch.testing.assert_close(found[0].updated[tensor], value, rtol=0, atol=2e-6)
    assert all(outcome.key_bias == 0.0 for outcome in found)
