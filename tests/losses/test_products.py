"""Products whose results are not rounded, each way on its own: how exact it is, wherever it is the fast one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_cord.losses import products
from megatron_cord.losses.gradients import fresh_gradient_dtype, gradient_dtype
from megatron_cord.losses.products import add_product, operand_dtype, product, split_product

CPU = torch.device("cpu")


def operands(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[33, 200] and [70, 200]: no multiple of a vector's width."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(33, 200, generator=generator).to(dtype), torch.randn(70, 200, generator=generator).to(dtype)


def error(actual: Tensor, left: Tensor, right: Tensor) -> float:
    """The largest error relative to the largest element."""
    exact = left.double() @ right.double().T
    return float((actual.double() - exact).abs().max() / exact.abs().max())


def test_two_bfloat16_products_are_nearly_fp32() -> None:
    """Catches a residual that is rounded before it is subtracted: the error would be that of bfloat16, 3e-3."""
    left, right = operands(torch.bfloat16)
    assert error(split_product(left, right, torch.empty(33, 70)), left, right) < 1.5e-5
    assert error(left @ right.T, left, right) > 1e-3  # what one product loses


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_products_are_not_rounded(dtype: torch.dtype, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a type that takes a way which rounds, on a processor with bfloat16 in hardware and on one without."""
    monkeypatch.setattr(products, "multiplies_bfloat16", lambda: native)
    left, right = operands(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    result = product(left, right, wide)
    assert result.dtype == wide
    split = dtype == torch.bfloat16 and native
    assert error(result, left, right) < (1e-14 if dtype == torch.float64 else 1.5e-5 if split else 1e-6)
    assert product(left, right, wide, out=result) is result


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize(
    ("gradient", "hidden"), [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float16), (torch.float32, torch.float32)]
)
def test_gradients_are_added_in_the_sums_type(
    gradient: torch.dtype, hidden: torch.dtype, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a sum that is overwritten, or kept in bfloat16, where adding 1e-3 to 2 changes nothing."""
    monkeypatch.setattr(products, "multiplies_bfloat16", lambda: native)
    left, right = torch.full((2, 10), 1e-2, dtype=gradient), torch.full((10, 3), 1e-2, dtype=hidden)
    total = torch.full((2, 3), 2.0)
    add_product(total, left, right)
    torch.testing.assert_close(total - 2.0, torch.full((2, 3), 1e-3), rtol=1e-2, atol=1e-6)


def test_types_of_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches float16 gradients of logits, which underflow, and a rounding to 16 bits that buys no faster product."""
    for native, fresh in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(products, "multiplies_bfloat16", lambda native=native: native)
        for dtype in (torch.bfloat16, torch.float16):
            hidden = torch.empty(0, dtype=dtype)
            assert gradient_dtype(hidden, torch.float32) == torch.bfloat16
            assert gradient_dtype(hidden, torch.float64) == torch.float64
            assert fresh_gradient_dtype(hidden, torch.float32) == fresh
    assert operand_dtype(torch.float32, CPU) == torch.float32
    assert operand_dtype(torch.bfloat16, torch.device("cuda")) == torch.bfloat16
