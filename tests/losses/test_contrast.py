"""The contrastive teacher against softmaxes written out in float64."""

from __future__ import annotations

import pytest
import torch

from megatron_cord.losses import divergence_from_hidden
from megatron_cord.losses.contrast import contrast_gate, contrasted_hidden
from tests.losses.reference import make_inputs, reference_stats


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 3.0])
def test_its_distribution_is_the_normalised_mixture(alpha: float) -> None:
    """Catches a mixture of probabilities, of logits with another constant, or with the sign of α turned."""
    inputs = make_inputs(num_tokens=7, hidden=6, columns=24, vocab_size=21, dtype=torch.float64)
    other = torch.randn_like(inputs.teacher_hidden)
    log_a, log_b = (
        (hidden @ inputs.teacher_weight.T)[:, :21].log_softmax(1) for hidden in (inputs.teacher_hidden, other)
    )
    expected = reference_stats(
        inputs.logits()[0], log_a + alpha * (log_a - log_b), inputs.target_ids, kind="reverse_kl", vocab_size=21
    )
    stats = divergence_from_hidden(
        inputs.student_hidden,
        inputs.student_weight,
        contrasted_hidden(inputs.teacher_hidden, other, alpha),
        inputs.teacher_weight,
        inputs.target_ids,
        vocab_size=21,
    )
    torch.testing.assert_close(stats.kl, expected[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(stats.teacher_logprob, expected[3], rtol=1e-10, atol=1e-12)


def test_equal_views_leave_the_teacher_as_it_is() -> None:
    """Catches a mixture that is rounded before it is summed."""
    hidden = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(contrasted_hidden(hidden, hidden, 0.7), hidden)
    mixed = contrasted_hidden(hidden, torch.zeros_like(hidden), 1.0)
    assert mixed.dtype == torch.bfloat16 and torch.equal(mixed, 2 * hidden)


def test_the_gate_is_of_tokens_that_the_views_disagree_on() -> None:
    """Catches a gate of one direction, and a NaN that is left out in silence."""
    logprobs = torch.tensor([-1.0, -1.0, -3.0, torch.nan])
    assert contrast_gate(logprobs, torch.tensor([-1.05, -2.0, -1.0, -1.0]), 0.1).tolist() == [0.0, 1.0, 1.0, 1.0]
