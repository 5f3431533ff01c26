"""``python -m tests.losses.kernels.backend_check BACKEND``: a backend against eager torch, in its own process."""

from __future__ import annotations

import itertools
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
    *(make_divergence(name, beta=0.3, k=5) for name in ("reverse_kl", "forward_kl", "jsd", "topk")),
]


def main(name: str) -> None:
    """Raise where a field differs."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3.0 * torch.randn(2, 9, 77, generator=generator)).unbind(0)
    student[:, 40:60] = -math.inf  # whole tiles and single columns without mass
    teacher[:, 40:60] = -math.inf
    student[3, :32], teacher[4, 70] = -math.inf, -math.inf  # … and an infinite divergence each way
    student[5] += 1e4
    target = torch.randint(0, 77, (9,), generator=generator)
    target[2] = 100  # another shard's
    weights = torch.randn(3, 9, generator=generator)
    weights[0, 3:5] = 0.0  # where the divergence is infinite
    backend, eager = choose_backend(name, student.device), EagerBackend()
    if name == "triton":
        from megatron_cord.losses.kernels import triton_kernels

        triton_kernels.TILE_COLUMNS = 32  # several tiles, the last one narrower
    cases = list(itertools.product(DIVERGENCES, (1.0, 0.5), (torch.float32, torch.bfloat16)))
    terms = [(True, True, True), (True, False, False), (False, True, False), (False, False, True)]
    if name == "compile":
        torch._dynamo.config.fail_on_recompile_limit_hit = True  # else it would be eager that is compared
        cases, terms = [(divergence, 0.5, torch.bfloat16) for divergence in DIVERGENCES], [(True, True, True)]
    for divergence, temperature, dtype in cases:
        outcomes = []
        for candidate in (backend, eager):
            shard = VocabularyShard(divergence, temperature, 0, 77, torch.float32, None, candidate)
            logits = StoredLogits(student.to(dtype), teacher.T.contiguous().T)  # the teacher's rows are not contiguous
            stats = shard.stats(logits, target)
            gradients = []
            for present in terms:
                given: UpstreamGrads = tuple(
                    weight if here else None for weight, here in zip(weights, present, strict=True)
                )  # type: ignore[assignment]
                out = torch.full((9, 77), torch.nan, dtype=dtype)
                shard.gradient(logits, target, stats, given, out)
                gradients.append(out)
            outcomes.append((stats, gradients))
        rtol, atol = (1e-2, 1e-3) if dtype == torch.bfloat16 else (1e-4, 2e-5)
        for mine, other in zip(outcomes[0][0], outcomes[1][0], strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=2e-5, equal_nan=True)
        for mine, other in zip(outcomes[0][1], outcomes[1][1], strict=True):
            torch.testing.assert_close(mine, other, rtol=rtol, atol=atol, equal_nan=True)
    print(f"{name}: {len(cases)} cases equal")


if __name__ == "__main__":
    main(sys.argv[1])
