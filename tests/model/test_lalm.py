"""The model in every layout against transformers': logits, gradients, their norm, and the weights after a step."""

from __future__ import annotations

import pytest
from torch import Tensor

from megatron_cord.parallel.layout import ParallelConfig, finalize
from tests.model.ranks import Case, Outcome, make_batches, run_case
from tests.model.reference import FOUR_RANKS, build, expected, on_four_ranks, save

CASES = {
    **FOUR_RANKS,
    "alone": Case(ParallelConfig()),
    "alone-tied": Case(ParallelConfig(), tied=True),
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Outcome]]:
    """Run the cases of one rank in this process."""
    outcomes = {}
    for name in ("alone", "alone-tied"):
        directory = tmp_path_factory.mktemp(name)
        save(directory, build(CASES[name].tied))
        outcomes[name] = [run_case(CASES[name], str(directory))]
        finalize()
    return outcomes


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest, alone: dict[str, list[Outcome]]) -> tuple[Case, list[Outcome]]:
    outcomes = alone if request.param in alone else on_four_ranks()
    return CASES[request.param], outcomes[request.param]


def largest_difference(outcomes: list[dict[int, Tensor]], wanted: list[Tensor]) -> float:
    """Over the tokens of all batches, padding left out."""
    batches = make_batches()
    given = {index: values for outcome in outcomes for index, values in outcome.items()}
    assert sorted(given) == list(range(len(batches)))
    return max(
        float((given[index][row, :length] - wanted[index][row, :length]).abs().max())
        for index, batch in enumerate(batches)
        for row, length in enumerate(batch.lengths)
    )


def relative_errors(given: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    return {name: float((given[name] - tensor).norm() / tensor.norm()) for name, tensor in wanted.items()}


def test_logits_equal_transformers(case: tuple[Case, list[Outcome]]) -> None:
    """Catches a wrong mask, rotary base, epsilon, head size, clip order or padding, and a loss between ranks."""
    setup, outcomes = case
    assert largest_difference([outcome.logits for outcome in outcomes], expected(setup.tied).logits) < 1e-5


@pytest.mark.parametrize(
    "case", [name for name, case in CASES.items() if not case.distributed_optimizer], indirect=True
)
def test_gradients_equal_transformers(case: tuple[Case, list[Outcome]]) -> None:
    """Catches a gradient that is not summed over tensor, sequence, pipeline or data-parallel ranks, or is summed twice.

    The distributed optimizer splits gradients over ranks: there the norm and the updated weights are compared.
    """
    setup, outcomes = case
    errors = relative_errors(outcomes[0].gradients, expected(setup.tied).gradients)
    assert max(errors.values()) < 1e-4, {name: error for name, error in errors.items() if error >= 1e-4}


def test_gradient_norm_is_the_whole_models(case: tuple[Case, list[Outcome]]) -> None:
    """Catches shards that are taken for copies, copies that are counted twice, and ranks that clip differently."""
    setup, outcomes = case
    assert len({outcome.gradient_norm for outcome in outcomes}) == 1
    assert outcomes[0].gradient_norm == pytest.approx(expected(setup.tied).gradient_norm, rel=1e-5)


def test_a_step_equals_adamw(case: tuple[Case, list[Outcome]]) -> None:
    """Catches weights that the optimizer skips, and copies of a tied embedding that drift apart."""
    setup, outcomes = case
    wanted = expected(setup.tied)
    differences = {
        name: float((outcomes[0].updated[name] - tensor).abs().max()) for name, tensor in wanted.updated.items()
    }
    assert max(differences.values()) < 2e-6, {name: value for name, value in differences.items() if value >= 2e-6}
    assert largest_difference([outcome.updated_logits for outcome in outcomes], wanted.updated_logits) < 1e-4


def test_key_bias_stays_zero(case: tuple[Case, list[Outcome]]) -> None:
    """Catches a fused projection that learns the key bias that Whisper does not have, which an export would lose."""
    assert all(outcome.key_bias == 0.0 for outcome in case[1])
