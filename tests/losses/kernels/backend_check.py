"""``python -m tests.losses.kernels.backend_check BACKEND [DEVICE [some]]``: against float64, in its own process."""

from __future__ import annotations

import math
import sys

import torch

from megatron_cord.losses.divergences import NO_TEACHER, Divergence, make_divergence
from megatron_cord.losses.kernels.backend import UpstreamGrads
from megatron_cord.losses.kernels.choice import choose_backend
from megatron_cord.losses.kernels.eager import EagerBackend
from megatron_cord.losses.shard import StoredLogits, VocabularyShard

DIVERGENCES: list[Divergence] = [
    NO_TEACHER,
    *(make_divergence(name, beta=0.3, k=5) for name in ("reverse_kl", "forward_kl", "jsd", "topk", "forward_topk")),
]


def main(name: str, device: str = "cpu", share: str = "all") -> None:
    """Raise where a field differs; `some` cases are each divergence once, and each shape of a tile's end."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3.0 * torch.randn(2, 9, 77, generator=generator)).unbind(0)
    student[:5, 40:60] = -math.inf  # whole tiles and single columns without mass; the other rows are finite
    teacher[:5, 40:60] = -math.inf
    student[3, :32], teacher[4, 70] = -math.inf, -math.inf  # … and an infinite divergence each way
    student[5] += 1e4
    student[6, 70], student[7, 3] = 40.0, 50.0  # maxima far above the other tiles'
    student[8, 30] = teacher[8, 30] = torch.finfo(torch.bfloat16).min  # as some mask logits
    target = torch.randint(0, 77, (9,), generator=generator)
    target[2] = 100  # another shard's
    weights = torch.randn(3, 9, generator=generator)
    weights[0, 3:5] = 0.0  # where the divergence is infinite
    student, teacher, target, weights = (tensor.to(device) for tensor in (student, teacher, target, weights))
    backend, exact = choose_backend(name, student.device), EagerBackend()
    settings = ((1.0, torch.bfloat16, 77), (0.5, torch.float32, 77))
    cases = [(divergence, *setting) for divergence in DIVERGENCES for setting in settings]
    terms = [(True, True, True), (True, False, False), (False, True, False), (False, False, True)]
    if name == "compile":
        torch._dynamo.config.fail_on_recompile_limit_hit = True  # else it would be eager that is compared
        cases, terms = [(divergence, 0.5, torch.bfloat16, 77) for divergence in DIVERGENCES], [(True, True, True)]
    if name == "triton":
        from megatron_cord.losses.kernels import triton_kernels

        triton_kernels.TILE_COLUMNS, triton_kernels.LANES = 32, 4  # several tiles, the last one narrower
        shapes = ((torch.float16, 64), (torch.float32, 70), (torch.bfloat16, 7))  # whole tiles, a part, less than one
        # The interpreter is slow: the divergence that most use at all shapes, and each at one of them.
        cases += [(DIVERGENCES[1], 1.0, *shape) for shape in shapes]
        cases += [(divergence, 1.0, *shapes[i % 3]) for i, divergence in enumerate(DIVERGENCES)]
    if share == "some":
        cases = [case for i, case in enumerate(cases) if i % 4 == 2 or case[3] < 77]
        terms = terms[:1]
    for divergence, temperature, dtype, columns in cases:
        outcomes = []
        for candidate, precision in ((backend, torch.float32), (exact, torch.float64)):
            shard = VocabularyShard(divergence, temperature, 0, columns, precision, None, candidate)
            mine, other = student.to(dtype), teacher.T.contiguous().T  # rows need not be contiguous
            if columns < 77:
                mine, other = (aligned(block[:, 77 - columns :].to(dtype)) for block in (student, teacher))
            logits = StoredLogits(mine, other)
            stats = shard.stats(logits, target)
            gradients = []
            for present in terms if columns == 77 and dtype == torch.bfloat16 else terms[:1]:
                given: UpstreamGrads = tuple(
                    weight if here else None for weight, here in zip(weights, present, strict=True)
                )  # type: ignore[assignment]
                out = torch.full_like(mine, torch.nan, dtype=precision if candidate is exact else dtype)
                shard.gradient(logits, target, stats, given, out)
                gradients.append(out)
            outcomes.append((stats, gradients))
        rtol, atol = (1e-4, 2e-5) if dtype == torch.float32 else (1e-2, 1e-3)
        for result, expected in zip(outcomes[0][0], outcomes[1][0], strict=True):
            torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=2e-5, equal_nan=True)
        for result, expected in zip(outcomes[0][1], outcomes[1][1], strict=True):
            torch.testing.assert_close(result.double(), expected, rtol=rtol, atol=atol, equal_nan=True)
    if name == "triton" and device == "cpu":
        from megatron_cord.losses.kernels import triton_statistics

        triton_statistics._guarded_sweep = None  # the slow path, which rows of finite logits must not need
        for divergence in DIVERGENCES:
            backend.partial_stats(student[5:], teacher[5:], target[5:], divergence, 1.0, torch.float32)
    print(f"{name}: {len(cases)} cases equal")


def aligned(block: torch.Tensor) -> torch.Tensor:
    """Return the block with rows that begin at multiples of 16 elements, which are loaded several columns at a time."""
    rows = block.new_zeros(len(block), 80)[:, : block.shape[1]]
    return rows.copy_(block)


if __name__ == "__main__":
    main(*sys.argv[1:])
