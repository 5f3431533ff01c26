"""What ``benchmarks.loss`` compares: ours, plain and compiled torch, Liger, and two losses for split vocabularies.

Every candidate takes the same inputs and leaves gradients. All but Liger's also give what training needs besides:
each token's divergence, the student's entropy and both log-probabilities, and take a weight for each token.

Legend: N tokens, V vocabulary, H hidden, TP ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as differentiable
import torch.nn.functional as functional
from torch import Tensor

from megatron_cord.losses import distillation_loss, divergence_from_logits


@dataclass(eq=False)
class Inputs:
    """bfloat16 hidden states and output weights, of which the student's are leaves, or logits made from them."""

    hidden: Tensor  #: [N, H]
    weight: Tensor  #: [V/TP, H]
    teacher_hidden: Tensor  #: [N, H]
    teacher_weight: Tensor  #: [V/TP, H]
    target_ids: Tensor  #: [N]
    token_weights: Tensor  #: [N]
    logits: Tensor | None = None  #: [N, V], a leaf
    teacher_logits: Tensor | None = None

    def clear(self) -> None:
        """Drop the gradients."""
        for leaf in (self.hidden, self.weight, self.logits):
            if leaf is not None:
                leaf.grad = None


Candidate = Callable[[Inputs], None]


def make_inputs(
    num_tokens: int,
    vocabulary: int,
    hidden: int,
    device: torch.device,
    *,
    with_logits: bool,
    ranks: int = 1,
    rank: int = 0,
) -> Inputs:
    """Random inputs; with ``ranks`` this rank's shard of the weights."""
    generator = torch.Generator().manual_seed(0)

    def normal(rows: int, scale: float) -> Tensor:
        return (torch.randn(rows, hidden, generator=generator) * scale).to(device, torch.bfloat16)

    student_hidden = normal(num_tokens, 1.0)
    teacher_hidden = student_hidden + normal(num_tokens, 0.1)
    shard = slice(rank * vocabulary // ranks, (rank + 1) * vocabulary // ranks)
    weight = normal(vocabulary, 2.0 / hidden**0.5)
    teacher_weight = (weight + normal(vocabulary, 0.2 / hidden**0.5))[shard].contiguous()
    weight = weight[shard].contiguous()
    target = torch.randint(0, vocabulary, (num_tokens,), generator=generator).to(device)
    weights = (1.0 + torch.rand(num_tokens, generator=generator)).to(device)
    inputs = Inputs(
        student_hidden.requires_grad_(), weight.requires_grad_(), teacher_hidden, teacher_weight, target, weights
    )
    if with_logits:
        inputs.logits = (inputs.hidden.detach() @ inputs.weight.detach().T).requires_grad_()
        inputs.teacher_logits = teacher_hidden @ teacher_weight.T
    return inputs


def ours_from_logits(backend: str) -> Candidate:
    """Return ``divergence_from_logits``, weighted."""

    def run(inputs: Inputs) -> None:
        assert inputs.logits is not None
        assert inputs.teacher_logits is not None
        stats = divergence_from_logits(inputs.logits, inputs.teacher_logits, inputs.target_ids, backend=backend)
        (stats.kl * inputs.token_weights).sum().backward()  # type: ignore[no-untyped-call]

    return run


def ours(implementation: str, backend: str, group: dist.ProcessGroup | None = None) -> Candidate:
    """Return ``distillation_loss``, weighted."""

    def run(inputs: Inputs) -> None:
        loss, _ = distillation_loss(
            lambda stats, rows: (stats.kl * inputs.token_weights[rows]).sum(),
            inputs.hidden,
            inputs.weight,
            inputs.teacher_hidden,
            inputs.teacher_weight,
            inputs.target_ids,
            tp_group=group,
            implementation=implementation,
            backend=backend,
        )
        loss.backward()  # type: ignore[no-untyped-call]

    return run


def plain_loss(logits: Tensor, teacher_logits: Tensor, target_ids: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
    """log_softmax and kl_div in fp32, with metrics."""
    log_p, log_q = functional.log_softmax(logits.float(), -1), functional.log_softmax(teacher_logits.float(), -1)
    divergence = functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    with torch.no_grad():
        entropy = -(log_p.exp() * log_p).sum(-1)
        target = target_ids[:, None]
        metrics = (entropy, log_p.gather(1, target), log_q.gather(1, target))
    return (divergence * weights).sum(), divergence.detach(), *metrics


def plain_loss_from_hidden(
    hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, target_ids: Tensor, weights: Tensor
) -> tuple[Tensor, ...]:
    """Return the same with both products, their results rounded to bfloat16 as a linear layer's are."""
    with torch.no_grad():
        teacher_logits = teacher_hidden @ teacher_weight.T
    return plain_loss(hidden @ weight.T, teacher_logits, target_ids, weights)


def exact_loss_from_hidden(
    hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, target_ids: Tensor, weights: Tensor
) -> tuple[Tensor, ...]:
    """Return the same from logits that are not rounded: as exact as ours."""
    with torch.no_grad():
        teacher_logits = teacher_hidden.float() @ teacher_weight.float().T
    return plain_loss(hidden.float() @ weight.float().T, teacher_logits, target_ids, weights)


def plain_from_logits(function: Callable[..., tuple[Tensor, ...]]) -> Candidate:
    """``plain_loss``, or that compiled."""

    def run(inputs: Inputs) -> None:
        loss, *_ = function(inputs.logits, inputs.teacher_logits, inputs.target_ids, inputs.token_weights)
        loss.backward()  # type: ignore[no-untyped-call]

    return run


def plain(function: Callable[..., tuple[Tensor, ...]]) -> Candidate:
    """``plain_loss_from_hidden``, or that compiled."""

    def run(inputs: Inputs) -> None:
        arguments = (inputs.hidden, inputs.weight, inputs.teacher_hidden, inputs.teacher_weight, inputs.target_ids)
        loss, *_ = function(*arguments, inputs.token_weights)
        loss.backward()  # type: ignore[no-untyped-call]

    return run


def liger_chunked(chunk_size: int = 1024, *, exact: bool = False) -> Candidate | None:
    """Return Liger's chunked JSD at β = 1, the reverse KL, compiled; None where it is not installed.

    It has no token weights and no metrics. Its logits have the hidden states' type; ``exact`` gives it hidden states
    and weights in fp32, so that its logits are as exact as ours.
    """
    try:
        from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDFunction
    except ImportError:
        return None

    def run(inputs: Inputs) -> None:
        tensors: list[Any] = [inputs.hidden, inputs.weight, inputs.teacher_hidden, inputs.teacher_weight]
        if exact:
            tensors = [tensor.float() for tensor in tensors]
        # No biases, no hard loss, soft loss only, β = 1, no ignored target, temperature 1, compiled.
        options = (None, None, 0.0, 1.0, 1.0, -100, 1.0, True, chunk_size)
        LigerFusedLinearJSDFunction.apply(*tensors, inputs.target_ids, *options).backward()

    return run


def liger_fused() -> Candidate | None:
    """Liger's fused_linear_jsd, whose kernels need CUDA; None where they cannot run."""
    if not torch.cuda.is_available():
        return None
    try:
        from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD
    except ImportError:
        return None
    loss = LigerFusedLinearJSD(jsd_beta=1.0)
    return lambda inputs: loss(inputs.hidden, inputs.weight, inputs.teacher_hidden, inputs.teacher_weight).backward()


class _GatherColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, ctx.columns = group, part.shape[1]
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, part.contiguous(), group=group)
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        first = dist.get_rank(ctx.group) * ctx.columns
        return gradient[:, first : first + ctx.columns], None


def gathered(group: dist.ProcessGroup) -> Candidate:
    """Gathers both models' logits over the ranks, and goes on as on one."""

    def run(inputs: Inputs) -> None:
        logits = _GatherColumns.apply(inputs.hidden @ inputs.weight.T, group)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            teacher_logits = _GatherColumns.apply(inputs.teacher_hidden @ inputs.teacher_weight.T, group)  # type: ignore[no-untyped-call]
        plain_loss(logits, teacher_logits, inputs.target_ids, inputs.token_weights)[0].backward()  # type: ignore[no-untyped-call]
        _sum_hidden_gradient(inputs, group)

    return run


def all_reduced(group: dist.ProcessGroup) -> Candidate:
    """Return the plain vocabulary-parallel loss: a differentiable all-reduce for every sum over the vocabulary."""

    def log_softmax(logits: Tensor) -> Tensor:
        maximum = logits.detach().amax(1)
        dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=group)
        shifted = logits - maximum[:, None]
        total: Tensor = differentiable.all_reduce(shifted.exp().sum(1), group=group)  # type: ignore[no-untyped-call]
        return shifted - total.log()[:, None]

    def run(inputs: Inputs) -> None:
        log_p = log_softmax((inputs.hidden @ inputs.weight.T).float())
        with torch.no_grad():
            log_q = log_softmax((inputs.teacher_hidden @ inputs.teacher_weight.T).float())
        p = log_p.exp()
        divergence = differentiable.all_reduce((p * (log_p - log_q)).sum(1), group=group)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            entropy = -(p * log_p).sum(1)
            dist.all_reduce(entropy, group=group)
        # Every rank's copy of the loss sends gradient through the all-reduces, TP times too much.
        ((divergence * inputs.token_weights).sum() / dist.get_world_size(group)).backward()
        _sum_hidden_gradient(inputs, group)

    return run


def _sum_hidden_gradient(inputs: Inputs, group: dist.ProcessGroup) -> None:
    assert inputs.hidden.grad is not None
    dist.all_reduce(inputs.hidden.grad, group=group)
