"""Products whose results are not rounded: how exact each method is, wherever it is the fast one."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

from megatron_cord.losses.implementations.gradients import fresh_gradient_dtype, gradient_dtype
from megatron_cord.losses.kernels import cpu_matmul, matmul
from megatron_cord.losses.kernels.matmul import add_product, operand_dtype, product, write_product

CPU = torch.device("cpu")


def operands(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[33, 200] and [70, 200]: no multiple of a vector's width."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(33, 200, generator=generator).to(dtype), torch.randn(70, 200, generator=generator).to(dtype)


def error(actual: Tensor, left: Tensor, right: Tensor) -> float:
    """Return the largest error relative to the largest element."""
    exact = left.double() @ right.double().T
    return float((actual.double() - exact).abs().max() / exact.abs().max())


@pytest.mark.skipif(not matmul.multiplies_bfloat16(), reason="this processor does not multiply bfloat16")
@pytest.mark.parametrize(("rows", "columns", "hidden"), [(1, 1, 2), (33, 70, 200), (64, 64, 64), (130, 129, 514)])
def test_bfloat16_products_with_fp32_results(rows: int, columns: int, hidden: int) -> None:
    """Catches a wrong stride, a lost last panel, and a result that is rounded: one of torch's own loses 3e-3."""
    brgemm = cpu_matmul.bfloat16_product()
    assert brgemm is not None, "it can be compiled where a compiler is"
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(rows, 2 * hidden, generator=generator).bfloat16()[
        :, :hidden
    ]  # rows that do not follow each other
    right = torch.randn(2 * columns, hidden, generator=generator).bfloat16()[::2]
    out = torch.full((rows, columns + 3), 7.0)
    brgemm(left, right, out[:, :columns])
    assert error(out[:, :columns], left, right) < 1e-6
    assert out[:, columns:].eq(7.0).all()
    if rows > 1:
        assert error(left @ right.T, left, right) > 1e-3


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_products_without_a_compiler(
    compiler: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a machine without a working compiler where the loss cannot be computed, or not exactly."""
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setattr(
        matmul, "bfloat16_product", cpu_matmul.bfloat16_product.__wrapped__
    )  # not what the process compiled before
    monkeypatch.setattr(matmul, "multiplies_bfloat16", lambda: True)
    left, right = operands(torch.bfloat16)
    with caplog.at_level(logging.INFO, logger=cpu_matmul.__name__):
        assert error(product(left, right, torch.float32), left, right) < 1e-6
    assert "cannot be compiled, they are formed in fp32" in caplog.text


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_products_are_not_rounded(dtype: torch.dtype, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a type that takes a method which rounds, on a processor with bfloat16 in hardware and on one without."""
    monkeypatch.setattr(matmul, "multiplies_bfloat16", lambda: native)
    left, right = operands(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    result = product(left, right, wide)
    assert result.dtype == wide
    assert error(result, left, right) < (1e-14 if dtype == torch.float64 else 1e-6)
    assert product(left, right, wide, out=result) is result


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize(
    ("gradient", "hidden"),
    [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float16), (torch.float32, torch.float32)],
)
def test_gradients_are_added_in_the_sums_type(
    gradient: torch.dtype, hidden: torch.dtype, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a sum that is overwritten, or kept in bfloat16, where adding 1e-3 to 2 changes nothing."""
    monkeypatch.setattr(matmul, "multiplies_bfloat16", lambda: native)
    left, right = torch.full((2, 10), 1e-2, dtype=gradient), torch.full((10, 3), 1e-2, dtype=hidden)
    total = torch.full((2, 3), 2.0)
    add_product(total, left, right)
    torch.testing.assert_close(total - 2.0, torch.full((2, 3), 1e-3), rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products_are_written_in_the_results_type(
    dtype: torch.dtype, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a sum in the result's type: adding 1e-3 to 8 changes nothing in 16 bits, however often."""
    monkeypatch.setattr(matmul, "multiplies_bfloat16", lambda: native)
    left, right = torch.full((2, 4001), 1e-3, dtype=torch.bfloat16), torch.ones(4001, 3, dtype=dtype)
    left[:, 0] = 8.0
    out = torch.empty(2, 3, dtype=dtype)
    write_product(out, left, right)
    torch.testing.assert_close(out.float(), torch.full((2, 3), 12.0), rtol=1e-2, atol=0)


def test_types_of_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches float16 gradients of logits, which underflow, and a rounding to 16 bits that buys no faster product."""
    for native, fresh in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(matmul, "multiplies_bfloat16", lambda native=native: native)
        for dtype in (torch.bfloat16, torch.float16):
            hidden = torch.empty(0, dtype=dtype)
            assert gradient_dtype(hidden, torch.float32) == torch.bfloat16
            assert gradient_dtype(hidden, torch.float64) == torch.float64
            assert fresh_gradient_dtype(hidden, torch.float32) == fresh
    assert operand_dtype(torch.float32, CPU) == torch.float32
    assert operand_dtype(torch.bfloat16, torch.device("cuda")) == torch.bfloat16
