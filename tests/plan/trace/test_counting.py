"""What the counting mode counts, on operations whose cost is known."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_cord.errors import CordError
from megatron_cord.plan.trace.counting import CountingMode


def test_products_and_bytes() -> None:
    """Catches operations of the backward pass that are counted as forward, and memory that is never given back."""
    with CountingMode() as mode:
        weight = torch.empty(300, 500, requires_grad=True)
        before = mode.bytes
        with mode.phase("forward_backward"):
            out = functional.linear(torch.empty(70, 500), weight)
            torch.autograd.backward(out.sum())
        del out
        phase = mode.results()["forward_backward"]
        assert isinstance(weight, FakeTensor) and before == 4 * 300 * 500
        assert (phase.forward_flops, phase.backward_flops) == (2 * 70 * 300 * 500, 2 * 70 * 300 * 500)
        assert mode.bytes <= before + 4 * 300 * 500 + 1000  # the weight's gradient stays
        assert phase.peak >= before + 4 * (70 * 300 + 70 * 500 + 300 * 500)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_counts_what_it_looks_at(causal: bool) -> None:
    """Catches causal attention that is counted as if it saw everything, and a backward pass that is not twice that."""
    with CountingMode() as mode:
        query, key, value = (torch.empty(2, 3, 50, 16, requires_grad=True) for _ in range(3))
        out = functional.scaled_dot_product_attention(query, key, value, is_causal=causal)
        torch.autograd.backward(out.sum())
        phase = mode.results()["rest"]
    whole = 4 * 2 * 3 * 50 * 50 * 16
    assert phase.forward_flops == whole / (2 if causal else 1)
    assert phase.backward_flops == 2 * phase.forward_flops


def test_numbers_that_are_real_and_numbers_that_are_not() -> None:
    """Catches lengths that become unknown, a loss that is not finite, and rows that nobody can know."""
    with CountingMode():
        lengths, losses = torch.tensor([2, 0, 3]), torch.empty(3)
        assert lengths.cumsum(0).tolist() == [2, 2, 5] and not isinstance(lengths, FakeTensor)
        assert bool(torch.isfinite(losses).all()) and not bool(losses.isnan().any())
        assert losses[lengths > 0].shape == (2,)
        losses[losses > 0] = 0.0
        with pytest.raises(CordError, match="chooses rows by numbers"):
            losses[losses > 0]


def test_collectives_are_noted_with_what_a_ring_sends() -> None:
    """Catches messages that count an output's part as the whole, and a group without its name."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    try:
        group = dist.new_group([0, 1, 2, 3])
        with CountingMode() as mode:
            mode.expect([], [(5, 1, 7)])  # from the next rank: a gradient
            mode.groups[group.group_name] = "tp"
            part, whole = torch.empty(10), torch.empty(40)
            dist.all_gather_into_tensor(whole, part, group=group)
            dist.reduce_scatter_tensor(part, whole, group=group)
            dist.all_reduce(whole, group=group, async_op=True).wait()
            shape, flag = torch.zeros(3, dtype=torch.int64), torch.tensor(1.0)
            dist.recv(shape, 1)
            dist.all_reduce(flag)
            assert shape.tolist() == [5, 1, 7] and float(flag) == 1.0
            counted = {(c.kind, c.group): c for c in mode.results()["rest"].collectives}
    finally:
        dist.destroy_process_group()
    sent = {kind: counted[kind, "tp"].sent for kind in ("all_gather", "reduce_scatter", "all_reduce")}
    assert sent == {"all_gather": 120.0, "reduce_scatter": 120.0, "all_reduce": 240.0}
    assert counted["all_reduce", "other"].ranks == 8
