"""What replaces torch's kernels on a CPU, beside them: attention of few bfloat16 tokens, and AdamW.

    python -m benchmarks.cpu_kernels [--turns 9] [--output benchmarks/results/cpu_kernels.json]

Attention has SmolLM2-135M's nine heads and three key–value groups of 64: the training layer's forward and backward
pass on 16 sequences of 61 tokens, and one token of 16 and of 64 sequences behind 56 others with padding, as the local
engine generates it. The baseline is scaled_dot_product_attention with keys and values repeated for every head. AdamW
updates 34 million fp32 parameters; its baseline is torch's foreach kernel. One thread, its seconds on the processor,
medians of turns of both; the largest difference of the results is given.
"""

from __future__ import annotations

import megatron_cord.parallel  # noqa: F401  # isort: skip (before megatron.core)

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.figures import processor, publish
from megatron_cord.model.layers.small_attention import attend
from megatron_cord.parallel.fused_adam import update
from megatron_cord.runtime.entry import Parser, run

_HEADS, _GROUPS, _WIDTH = 9, 3, 64


def compare(ours: Callable[[], Any], theirs: Callable[[], Any], turns: int) -> dict[str, float]:
    """Return the medians in milliseconds of both, in turn, after a turn that is left out, and their ratio."""
    seconds: dict[str, list[float]] = {"ours": [], "torch": []}
    for turn in range(turns + 1):
        for name, work in (("ours", ours), ("torch", theirs)):
            started = time.process_time()
            work()
            if turn:
                seconds[name].append(time.process_time() - started)
    medians = {name: 1000 * statistics.median(times) for name, times in seconds.items()}
    return {**{name: round(value, 3) for name, value in medians.items()}, "ratio": medians["torch"] / medians["ours"]}


def kernel(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Return [S, B, Q, D] by torch's kernel; causal without a mask."""
    k, v = (x.repeat_interleave(_HEADS // _GROUPS, dim=2).permute(1, 2, 0, 3) for x in (key, value))
    out = scaled_dot_product_attention(query.permute(1, 2, 0, 3), k, v, attn_mask=mask, is_causal=mask is None)
    return out.permute(2, 0, 1, 3)


def inputs(queries: int, keys: int, size: int, *, train: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return query [S, B, Q, D], key and value [K, B, G, D] in bfloat16."""
    q, k, v = (
        torch.randn(tokens, size, heads, _WIDTH, dtype=torch.bfloat16, requires_grad=train)
        for tokens, heads in ((queries, _HEADS), (keys, _GROUPS), (keys, _GROUPS))
    )
    return q, k, v


def training(turns: int) -> dict[str, float]:
    """Compare forward and backward pass."""
    q, k, v = inputs(61, 61, 16, train=True)
    upstream = torch.randn_like(q)

    def ours() -> list[Tensor]:
        out = attend(q, k, v, is_causal=True)
        return [out, *torch.autograd.grad(out, (q, k, v), upstream)]

    def theirs() -> list[Tensor]:
        out = kernel(q, k, v, None)
        return [out, *torch.autograd.grad(out, (q, k, v), upstream)]

    differences = [float((a - b).abs().max()) for a, b in zip(ours(), theirs(), strict=True)]
    return {**compare(ours, theirs, turns), "largest_difference": max(differences)}


@torch.inference_mode()
def generation(size: int, turns: int) -> dict[str, float]:
    """Compare one token's pass."""
    q, k, v = inputs(1, 57, size, train=False)
    mask = (torch.arange(57) >= torch.arange(size)[:, None] % 16)[:, None, None]  # [B, 1, 1, K]
    difference = float((attend(q, k, v, mask=mask) - kernel(q, k, v, mask)).abs().max())
    figures = compare(lambda: attend(q, k, v, mask=mask), lambda: kernel(q, k, v, mask), turns)
    return {**figures, "largest_difference": difference}


def adamw(turns: int) -> dict[str, float]:
    """Compare updates."""
    group = {"step": 1, "betas": (0.9, 0.95), "lr": 1e-4, "weight_decay": 0.1, "eps": 1e-8}
    gradient, start = torch.randn(34_000_000), torch.randn(34_000_000)
    weights = {name: start.clone() for name in ("ours", "torch")}
    states = {name: {key: torch.zeros_like(start) for key in ("exp_avg", "exp_avg_sq")} for name in weights}

    def step(name: str) -> None:
        update(group, [weights[name]], [gradient], [states[name]], fused=name == "ours", foreach=name == "torch")

    figures = compare(lambda: step("ours"), lambda: step("torch"), turns)
    return {**figures, "largest_difference": float((weights["ours"] - weights["torch"]).abs().max())}


def main() -> None:
    """Measure and publish."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=9, help="of each side (default: 9)")
    parser.add_argument("--output", metavar="FILE", type=Path, help="where the figures go, as JSON")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    measured = {
        "attention_training": training(given.turns),
        "attention_generation_16": generation(16, given.turns),
        "attention_generation_64": generation(64, given.turns),
        "adamw": adamw(given.turns),
    }
    publish(
        {"milliseconds": measured, "processor": processor(), "torch": torch.__version__, "threads": 1}, given.output
    )


if __name__ == "__main__":
    run(main)
