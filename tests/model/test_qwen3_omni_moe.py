"""Qwen3-Omni's thinker in several layouts against transformers' own forward pass of each sample by itself."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch

from megatron_cord.parallel.layout import ParallelConfig
from tests.gloo import run_ranks
from tests.model.family_reference import expected, save
from tests.model.ranks import Case, Outcome, make_batches, run_cases

pytestmark = pytest.mark.filterwarnings("ignore:::megatron")  # about arguments that Megatron-Core itself leaves out

FAMILY = "qwen3_omni_moe"
QUICK = {"tp2-sp-ep2": Case(ParallelConfig(tp=2, sequence_parallel=True, ep=2), family=FAMILY)}
SLOW = {
    "dp": Case(ParallelConfig(), family=FAMILY),
    "ep4-recompute": Case(ParallelConfig(ep=4), family=FAMILY, recompute=("audio_encoder", "language_model")),
    "pp2-ep2": Case(ParallelConfig(pp=2, ep=2), family=FAMILY),
    "pp2-tp2-sp-ep2": Case(ParallelConfig(tp=2, pp=2, sequence_parallel=True, ep=2), family=FAMILY),
    "cp2": Case(ParallelConfig(cp=2), family=FAMILY),
    "cp2-ep4": Case(ParallelConfig(cp=2, ep=4), family=FAMILY),
    "cp2-pp2-ep2-tied": Case(ParallelConfig(cp=2, pp=2, ep=2), family=FAMILY, tied=True),
}
CASES = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


@cache
def _outcomes(*, slow: bool) -> dict[str, list[Outcome]]:
    """Of each of these cases on each of four ranks."""
    cases = SLOW if slow else QUICK
    with tempfile.TemporaryDirectory() as directory:
        checkpoints = {}
        for tied in {case.tied for case in cases.values()}:
            path = Path(directory) / f"tied-{tied}"
            path.mkdir()
            save(path, FAMILY, tied)
            checkpoints[FAMILY, tied] = str(path)
        by_rank = run_ranks(run_cases, 4, cases, checkpoints)
    return {name: [of_rank[name] for of_rank in by_rank] for name in cases}


def outcomes(name: str) -> list[Outcome]:
    """Return the outcome of a case on each rank."""
    return _outcomes(slow=name in SLOW)[name]


@pytest.mark.parametrize("name", CASES)
def test_a_step_equals_transformers(name: str) -> None:
    """Catches a chunk, window, bias or norm that is computed otherwise, a tensor lost in conversion or between ranks.

    Clips span several chunks and attention windows, and end within a chunk; noise follows them.
    """
    found, case = outcomes(name), (QUICK | SLOW)[name]
    wanted = expected(FAMILY, case.tied)
    assert [outcome.changed_by_round_trip for outcome in found] == [[]] * 4
    given = {index: values for outcome in found for index, values in outcome.logits.items()}
    batches = make_batches(FAMILY)
    assert sorted(given) == list(range(len(batches)))
    for index, batch in enumerate(batches):
        for row, length in enumerate(batch.lengths):
            torch.testing.assert_close(given[index][row, :length], wanted.logits[index][row, :length], rtol=0, atol=1e-5)
    # A key's bias does not change the attention: its gradient is rounding noise there, and dropped here.
    gradients = {n: tensor for n, tensor in wanted.gradients.items() if not n.endswith("k_proj.bias")}
    errors = {n: float((found[0].gradients[n] - tensor).norm() / tensor.norm()) for n, tensor in gradients.items()}
    assert max(errors.values()) < 1e-4, {n: error for n, error in errors.items() if error >= 1e-4}
    assert all(float(wanted.gradients[n].norm()) < 1e-5 for n in wanted.gradients.keys() - gradients.keys())
    assert found[0].gradient_norm == pytest.approx(wanted.gradient_norm, rel=1e-5)
    for tensor, value in wanted.updated.items():
        torch.testing.assert_close(found[0].updated[tensor], value, rtol=0, atol=2e-6)
