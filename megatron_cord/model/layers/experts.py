"""What the routers of a mixture of experts choose in training: counted, and balanced by a loss.

The layers are Megatron's. Its own auxiliary loss is a mean over a microbatch, padding included; here it is one over
sequences (DeepSeek-V3, arXiv 2412.19437, equations 17 to 20), which depends on neither microbatches nor the layout:
E Σ_e f_e P_e for each layer and sequence, f_e the share of its choices that fall on expert e, P_e the mean probability
of e over its tokens. Legend: E experts, k chosen for a token, B sequences of a microbatch, T of its rows on this rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megatron_cord.model.architecture import ExpertsArchitecture


@dataclass(frozen=True, eq=False)
class RoutedRows:
    """The rows of a microbatch that this rank routes.

    Attributes:
        sequence: int64 [T], the sequence of each row; B for padding.
        lengths: float32 [B], the tokens of each sequence on all ranks.
    """

    sequence: Tensor
    lengths: Tensor


class RoutingRecord:
    """Choices of all routers of this rank's layers in training passes.

    Args:
        experts: of the model.
        num_layers: of the whole model.
        group: the tensor- and context-parallel ranks, which share the sequences.
        device: where it counts.

    Attributes:
        active: whether passes are training's; others are neither counted nor balanced.
        weight: of the balancing loss of one sequence and layer.
    """

    def __init__(
        self, experts: ExpertsArchitecture, num_layers: int, group: dist.ProcessGroup, device: torch.device
    ) -> None:
        self.experts, self.group = experts, group
        self.active, self.weight = False, 0.0
        self._rows: RoutedRows | None = None
        self._counts = torch.zeros(num_layers, experts.count, dtype=torch.float64, device=device)
        self._loss = torch.zeros((), dtype=torch.float64, device=device)

    @contextmanager
    def routing(self, rows: RoutedRows | None) -> Iterator[None]:
        """Count what is chosen for these rows; None: nothing is."""
        self._rows = rows
        try:
            yield
        finally:
            self._rows = None  # a recomputed layer routes again, in the backward pass

    def observe(self, layer: int, logits: Tensor, probs: Tensor, chosen: Tensor) -> Tensor:
        """Count a layer's choices; return probs, with the balancing loss behind them.

        Args:
            layer: of the whole model, from 0.
            logits: [T, E], of the router.
            probs: [T, E], of those chosen, else 0.
            chosen: bool [T, E].
        """
        if self._rows is None:
            return probs
        rows, size = self._rows, len(self._rows.lengths)
        own = chosen.new_zeros(size + 1, chosen.shape[1], dtype=torch.float32)
        own.index_add_(0, rows.sequence, chosen.float())
        self._counts[layer] += own[:size].sum(0)
        if not self.weight or not torch.is_grad_enabled():
            return probs
        dist.all_reduce(own, group=self.group)
        share = own[:size] / (self.experts.per_token * rows.lengths[:, None])  # f_e, [B, E]
        scores = logits.float().softmax(-1)
        means = scores.new_zeros(size + 1, scores.shape[1]).index_add(0, rows.sequence, scores)[:size]
        loss = chosen.shape[1] * (share * means / rows.lengths[:, None]).sum()  # this rank's part of it
        self._loss += self.weight * loss.detach()
        balanced: Tensor = _WithLoss.apply(probs, self.weight * loss)  # type: ignore[no-untyped-call]
        return balanced

    def take(self, updates: int) -> dict[str, float]:
        """Return metrics of what was counted since the last call, in so many updates. Collective over all ranks."""
        both = torch.cat([self._counts.flatten(), self._loss[None]])
        dist.all_reduce(both)
        self._counts.zero_()
        self._loss.zero_()
        counts = both[:-1].view_as(self._counts)
        share = counts / counts.mean(1, keepdim=True).clamp(min=1e-9)  # 1: as many as if all were chosen equally often
        figures = torch.stack([share.amax(1).mean(), share.amin(1).mean(), (counts == 0).double().mean(), both[-1]])
        largest, smallest, idle, loss = figures.tolist()
        metrics = {"experts/load_max": largest, "experts/load_min": smallest, "experts/idle": idle}
        return metrics | ({"experts/balance_loss": loss / updates} if self.weight else {})


class _WithLoss(torch.autograd.Function):
    """The activation, unchanged; a loss that it carries gets the gradient 1 when it gets its own."""

    @staticmethod
    def forward(ctx: Any, activation: Tensor, loss: Tensor) -> Tensor:
        """Return the activation."""
        ctx.save_for_backward(loss)
        return activation.view_as(activation)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Return the activation's gradient and the loss's."""
        return gradient, torch.ones_like(ctx.saved_tensors[0])


class _RecordedRouter(TopKRouter):  # type: ignore[misc]
    """Megatron's router, which tells a record what it chooses."""

    record: RoutingRecord
    layer: int  #: of the whole model, from 0

    def routing(self, logits: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """Choose experts for logits [S, B, E]; return probabilities and choices, each [T, E]."""
        probs, chosen = super().routing(logits, *arguments, **options)
        return self.record.observe(self.layer, logits.view(-1, logits.shape[-1]), probs, chosen), chosen


def record_routing(layers: Iterable[Any], record: RoutingRecord) -> None:
    """Let the routers of Megatron's layers, which are numbered over all stages, use the record."""
    for layer in layers:
        for module in layer.modules():
            if isinstance(module, TopKRouter):
                module.__class__ = _RecordedRouter
                module.record, module.layer = record, layer.layer_number - 1
