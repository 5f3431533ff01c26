"""Attention of short sequences on a CPU against a slow float64 reference and torch's kernel."""

from __future__ import annotations

import megatron_cord.parallel  # noqa: F401  # isort: skip (before megatron.core)

import math

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_cord.model.layers import attention
from megatron_cord.model.layers.attention import SdpaAttention, packed_sequences
from megatron_cord.model.layers.small_attention import LONGEST, attend, is_small


def reference(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool, scale: float) -> Tensor:
    """Attend query by query in float64: [S, B, Q · D]."""
    q, k, v = (x.double() for x in (query, key, value))
    queries, size, heads, _ = q.shape
    shared = heads // k.shape[2]
    rows = []
    for i in range(queries):
        end = i + 1 if is_causal else len(k)
        row = []
        for b in range(size):
            for h in range(heads):
                weights = (scale * k[:end, b, h // shared] @ q[i, b, h]).softmax(0)
                row.append(weights @ v[:end, b, h // shared])
        rows.append(torch.stack(row).view(size, -1))
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("is_causal", "keys"), [(True, 7), (False, 5)])
@pytest.mark.parametrize("groups", [6, 2, 1])
def test_values_and_gradients_are_the_reference_s(dtype: torch.dtype, is_causal: bool, keys: int, groups: int) -> None:
    """Catches heads that meet another group's keys, a mask of the wrong rows, a scale, rounded scores."""
    torch.manual_seed(0)
    shapes = [(7, 3, 6, 8), (keys, 3, groups, 8), (keys, 3, groups, 8)]
    inputs = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
    exact = [each.detach().double().requires_grad_() for each in inputs]
    upstream = torch.randn(7, 3, 48).to(dtype)
    for scale in (None, 0.7):
        out = attend(inputs[0], inputs[1], inputs[2], is_causal=is_causal, scale=scale).flatten(2)
        wanted = reference(exact[0], exact[1], exact[2], is_causal=is_causal, scale=scale or 1 / math.sqrt(8))
        assert out.dtype == dtype
        tolerance = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2}[dtype]
        torch.testing.assert_close(out.double(), wanted, rtol=tolerance, atol=tolerance)
        found = torch.autograd.grad(out, inputs, upstream)
        gradients = torch.autograd.grad(wanted, exact, upstream.double())
        for one, other in zip(found, gradients, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=2 * tolerance)


def test_masked_keys_are_not_attended_to() -> None:
    """Catches a mask that is laid over another sequence or the wrong way round, and padding whose NaN spreads."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(5, 2, heads, 8) for heads in (4, 2, 2))
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()
    mask[1, ..., :2] = False  # two keys of padding on the left of the second sequence; their queries have no keys
    out = attend(q, k, v, mask=mask)
    assert out.isfinite().all()
    for b, first in ((0, 0), (1, 2)):
        inputs = [x[first:, b : b + 1] for x in (q, k, v)]
        alone = reference(inputs[0], inputs[1], inputs[2], is_causal=True, scale=1 / math.sqrt(8))
        torch.testing.assert_close(out[first:, b : b + 1].flatten(2).double(), alone, rtol=2e-6, atol=2e-6)


def test_only_few_tokens_of_16_bits_on_a_cpu_are_small() -> None:
    """Catches scores of a whole clip that are written down, a GPU that misses its kernel, and slower fp32."""
    one = torch.empty(1, dtype=torch.bfloat16)
    assert is_small(one, LONGEST, LONGEST)
    assert not is_small(one, LONGEST + 1, 1) and not is_small(one, 1, LONGEST + 1)
    assert not is_small(one.to("meta"), 1, 1) and not is_small(one.float(), 1, 1)


@pytest.mark.parametrize("packed", [False, True])
def test_the_layers_attention_is_that_of_the_kernel(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches another order of dimensions, and sequences of a packed microbatch that attend to each other."""
    core = SdpaAttention(
        TransformerConfig(num_layers=1, hidden_size=48, num_attention_heads=6), 1, AttnMaskType.causal, "self"
    )
    torch.manual_seed(0)
    lead, params = ((9,), packed_sequences((0, 4, 9), torch.device("cpu"))) if packed else ((9, 2), None)
    inputs = [torch.randn(*lead, heads, 8).bfloat16().requires_grad_() for heads in (6, 2, 2)]
    upstream = torch.randn(*lead, 48).bfloat16()

    def results() -> list[Tensor]:
        out = core(*inputs, None, packed_seq_params=params)
        return [out, *torch.autograd.grad(out, inputs, upstream)]

    small = results()
    monkeypatch.setattr(attention, "is_small", lambda *_: False)
    for one, other in zip(small, results(), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)
