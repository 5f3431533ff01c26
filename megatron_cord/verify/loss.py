"""``verify loss``: the divergence and its gradients on this device, type and layout, against float64 on one rank.

Every rank draws the same inputs, computes its shard through the public functions, and compares with softmaxes over
the whole vocabulary in float64. The divergence is small (4e-4 nats for the reverse KL), as it is late in
distillation: the case that rounded logits spoil.

Legend: N tokens, V vocabulary, H hidden, TP ranks.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor

from megatron_cord.config.loading import load_config
from megatron_cord.errors import CordError
from megatron_cord.losses import TokenStats, distillation_loss, divergence_from_logits
from megatron_cord.parallel.layout import ParallelConfig, finalize, initialize
from megatron_cord.parallel.portability import device_name
from megatron_cord.parallel.tf32 import full_float32

#: Largest relative error ‖a − b‖ / ‖b‖ of values and of gradients. A divergence of 4e-4 is a difference of logits a
#: hundred times larger than it, so the 1e-7 of fp32 logits shows a hundredfold in the gradient, and more in the
#: divergence itself.
TOLERANCES = {"float64": (1e-10, 1e-10), "float32": (5e-3, 5e-5), "bfloat16": (5e-3, 1e-2)}


@dataclass(frozen=True)
class VerifyLossConfig:
    """What is checked; the sizes are small enough for any machine."""

    tp: int | None = None  #: ranks that share the vocabulary; unset: all that were started
    dtype: Literal["float64", "float32", "bfloat16"] = "float32"  #: of hidden states and weights
    tokens: int = 48  #: N
    hidden: int = 256  #: H
    vocabulary: int = 8000  #: V, before padding to a multiple of 128 · TP
    temperature: float = 1.0  #: of both softmaxes
    backend: Literal["auto", "eager", "compile", "triton"] = "auto"  #: what computes
    seed: int = 0  #: of the inputs

    def __post_init__(self) -> None:
        if min(self.tokens, self.hidden) < 1 or self.vocabulary < 2:
            raise CordError("tokens and hidden must be at least 1, vocabulary at least 2")


@dataclass(frozen=True)
class Check:
    """One row of the table: the largest errors over all ranks."""

    name: str
    value_error: float  #: of divergence, entropy and log-probabilities
    hidden_error: float  #: of ∂student_hidden (∂logits where logits go in)
    weight_error: float  #: of ∂student_weight; 0 where logits go in
    passed: bool


@dataclass(frozen=True, eq=False)
class _Problem:
    """Inputs that are equal on all ranks; the reference's gradients."""

    student_hidden: Tensor
    student_weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    target_ids: Tensor
    weights: Tensor  #: [3, N], of divergence, entropy and log-probability in the loss


def verify_loss(overrides: Sequence[str]) -> int:
    """Print the table on the first rank; return 1 if a check failed on any, else 0. All ranks call it."""
    config = load_config(VerifyLossConfig, None, overrides)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    layout = initialize(ParallelConfig(tp=config.tp or world), config.seed)
    try:
        with full_float32():
            checks = run_checks(config, layout.tp_group, layout.device)
        if dist.get_rank() == 0:
            print_table(
                checks,
                f"loss on {device_name()}: {config.dtype}, TP={dist.get_world_size(layout.tp_group)}, "
                f"backend {config.backend}",
            )
        return 0 if all(check.passed for check in checks) else 1
    finally:
        finalize()


def run_checks(config: VerifyLossConfig, tp_group: dist.ProcessGroup, device: torch.device) -> list[Check]:
    """Check every divergence and every implementation; the same list on every rank."""
    rank, size = dist.get_rank(tp_group), dist.get_world_size(tp_group)
    columns = math.ceil(config.vocabulary / (128 * size)) * 128
    problem = _make_problem(config, columns * size, device)
    mine = slice(rank * columns, (rank + 1) * columns)
    options: dict[str, Any] = {"temperature": config.temperature, "vocab_size": config.vocabulary, "tp_group": tp_group}
    options["backend"] = config.backend
    checks = []
    for kind in (
        {"kind": "reverse_kl"},
        {"kind": "forward_kl"},
        {"kind": "jsd", "beta": 0.3},
        {"kind": "topk", "k": 20},
        {"kind": "forward_topk", "k": 20},
    ):
        expected = _reference(problem, config, kind)
        for implementation in ("logits", "cached_grad", "fused", "recompute"):
            errors = _errors(problem, expected, mine, implementation, {**options, **kind})
            dist.all_reduce(errors, op=dist.ReduceOp.MAX)
            value, hidden, weight = errors.tolist()
            value_limit, gradient_limit = TOLERANCES[config.dtype]
            if implementation == "logits" and config.dtype == "bfloat16":
                gradient_limit = 2e-2  # against logits of the same rounding: only the gradient's own rounding is left
            passed = value <= value_limit and max(hidden, weight) <= gradient_limit
            checks.append(Check(f"{kind['kind']}, {implementation}", value, hidden, weight, passed))
    return checks


def print_table(checks: list[Check], title: str) -> None:
    """Print one row a check."""
    table = Table(
        "divergence", "values", "∂hidden", "∂weight", "", title=title, box=None, header_style="bold", pad_edge=False
    )
    for check in checks:
        numbers = (f"{error:.1e}" for error in (check.value_error, check.hidden_error, check.weight_error))
        table.add_row(check.name, *numbers, "[green]pass[/]" if check.passed else "[red]FAIL[/]")
    Console().print(table)
    failed = sum(not check.passed for check in checks)
    print(
        f"{failed} of {len(checks)} checks failed"
        if failed
        else f"all {len(checks)} checks passed (relative errors against float64)"
    )


def _make_problem(config: VerifyLossConfig, padded: int, device: torch.device) -> _Problem:
    generator = torch.Generator().manual_seed(config.seed)
    dtype: torch.dtype = getattr(torch, config.dtype)
    shapes = [(config.tokens, config.hidden), (padded, config.hidden)] * 2
    hidden, weight, other_hidden, other_weight = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes
    )
    scale, distance = 2.0 / config.hidden**0.5, 0.0125
    tensors = (
        hidden,
        weight * scale,
        hidden + distance * other_hidden,
        (weight * 2.0 + distance * other_weight) / config.hidden**0.5,
    )
    targets = torch.linspace(0, config.vocabulary - 1, config.tokens).long().to(device)
    weights = torch.stack(
        [torch.ones(config.tokens), torch.full((config.tokens,), 0.01), torch.full((config.tokens,), -0.01)]
    )
    student_hidden, student_weight, teacher_hidden, teacher_weight = (tensor.to(device, dtype) for tensor in tensors)
    return _Problem(
        student_hidden, student_weight, teacher_hidden, teacher_weight, targets, weights.to(device, torch.float64)
    )


def _reference(
    problem: _Problem, config: VerifyLossConfig, kind: dict[str, Any]
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return a function of logits [N, V'] that returns the values [4, N] and ∂loss/∂student logits."""

    def compute(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        student = student.detach().double().clone().requires_grad_()
        log_p = (student[:, : config.vocabulary] / config.temperature).log_softmax(1)
        log_q = (teacher.double()[:, : config.vocabulary] / config.temperature).log_softmax(1)
        target = problem.target_ids[:, None]
        entropy = -(log_p.exp() * log_p).sum(1)
        values = torch.stack(
            [_divergence(log_p, log_q, **kind), entropy, log_p.gather(1, target)[:, 0], log_q.gather(1, target)[:, 0]]
        )
        (gradient,) = torch.autograd.grad((values[:3] * problem.weights).sum(), student)
        return values.detach(), gradient

    return compute


def _divergence(log_p: Tensor, log_q: Tensor, kind: str, beta: float = 0.5, k: int = 1) -> Tensor:
    p, q = log_p.exp(), log_q.exp()
    if kind == "reverse_kl":
        return (p * (log_p - log_q)).sum(1)
    if kind == "forward_kl":
        return (q * (log_q - log_p)).sum(1)
    if kind == "jsd":
        log_m = (beta * q + (1 - beta) * p).log()
        return (beta * q * (log_q - log_m) + (1 - beta) * p * (log_p - log_m)).sum(1)
    inside = log_q >= log_q.topk(min(k, log_q.shape[1]), dim=1).values[:, -1:]
    tail_p, tail_q = (p * ~inside).sum(1), (q * ~inside).sum(1)
    if kind == "forward_topk":
        return (q * (log_q - log_p) * inside).sum(1) + tail_q * (tail_q / tail_p).log()
    return (p * (log_p - log_q) * inside).sum(1) + tail_p * (tail_p / tail_q).log()


def _errors(
    problem: _Problem,
    expected: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    mine: slice,
    implementation: str,
    options: dict[str, Any],
) -> Tensor:
    """Return this rank's errors: [values, ∂hidden or ∂logits, ∂weight]."""
    hidden, weight = problem.student_hidden.double(), problem.student_weight.double()
    student, teacher = hidden @ weight.T, problem.teacher_hidden.double() @ problem.teacher_weight.double().T
    if implementation == "logits":
        dtype = problem.student_hidden.dtype
        student, teacher = student.to(dtype), teacher.to(dtype)
        values, gradient = expected(student, teacher)
        leaf = student[:, mine].clone().requires_grad_()
        stats = divergence_from_logits(leaf, teacher[:, mine].clone(), problem.target_ids, **options)
        _loss(stats, problem.weights).backward()  # type: ignore[no-untyped-call]
        return torch.stack([_value_error(stats, values), _relative(leaf.grad, gradient[:, mine]), hidden.new_zeros(())])
    values, gradient = expected(student, teacher)
    leaves = problem.student_hidden.clone().requires_grad_(), problem.student_weight[mine].clone().requires_grad_()
    loss, stats = distillation_loss(
        lambda stats, rows: _loss(stats, problem.weights[:, rows]),
        *leaves,
        problem.teacher_hidden,
        problem.teacher_weight[mine],
        problem.target_ids,
        implementation=implementation,
        chunk_tokens=20,  # several chunks, the last one shorter
        **options,
    )
    loss.backward()  # type: ignore[no-untyped-call]
    return torch.stack(
        [
            _value_error(stats, values),
            _relative(leaves[0].grad, gradient @ weight),
            _relative(leaves[1].grad, gradient[:, mine].T @ hidden),
        ]
    )


def _loss(stats: TokenStats, weights: Tensor) -> Tensor:
    return (torch.stack([stats.kl, stats.entropy, stats.student_logprob]) * weights).sum()


def _value_error(stats: TokenStats, expected: Tensor) -> Tensor:
    actual = (stats.kl, stats.entropy, stats.student_logprob, stats.teacher_logprob)
    return torch.stack(
        [_relative(value.detach(), reference) for value, reference in zip(actual, expected, strict=True)]
    ).max()


def _relative(actual: Tensor | None, expected: Tensor) -> Tensor:
    """Return ‖a − b‖ / ‖b‖; NaN counts as infinite. A shard that is all padding has b = 0, and so must a be."""
    assert actual is not None
    size = expected.norm()
    error = (actual.double() - expected).norm() / torch.where(size > 0, size, 1.0)
    return torch.nan_to_num(error, nan=math.inf, posinf=math.inf)
