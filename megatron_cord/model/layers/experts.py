"""What the routers of a mixture of experts choose in training: counted, balanced by a loss, or given by the engine.

The layers are Megatron's. Its own auxiliary loss is a mean over a microbatch, padding included; here it is one over
sequences (DeepSeek-V3, arXiv 2412.19437, equations 17 to 20), which depends on neither microbatches nor the layout:
E Σ_e f_e P_e for each layer and sequence, f_e the share of its choices that fall on expert e, P_e the mean probability
of e over its tokens.

An engine's choice is followed through the hook that Megatron has for it: the router's probabilities, of the choice that
is given, keep their gradients.

Layers that are computed again route again, outside of the forward pass. The backward pass takes a layer's microbatches
in the order of its forward pass, in either schedule, so that a queue a layer tells which rows these are.
Legend: E experts, k chosen for a token, B sequences of a microbatch, T of its rows on this rank, L layers.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megatron_cord.model.architecture import ExpertsArchitecture
from megatron_cord.model.layers.routed_rows import RoutedRows
from megatron_cord.runtime.autograd import in_backward_pass


class RoutingRecord:
    """Choices of all routers of this rank's layers.

    Args:
        experts: of the model.
        num_layers: of the whole model.
        group: the tensor- and context-parallel ranks, which share the sequences.
        device: where it counts.

    Attributes:
        weight: of the balancing loss of one sequence and layer, float32 [] on the device; None: there is no such loss.
    """

    def __init__(
        self, experts: ExpertsArchitecture, num_layers: int, group: dist.ProcessGroup, device: torch.device
    ) -> None:
        self.experts, self.group = experts, group
        self.weight: Tensor | None = None
        self._active = False
        self._rows: RoutedRows | None = None
        self._again: defaultdict[int, deque[RoutedRows | None]] = defaultdict(deque)
        self._counts = torch.zeros(num_layers, experts.count, dtype=torch.float64, device=device)
        #: the balancing loss; choices that were given; of them, those that a router would not have made
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)

    @property
    def active(self) -> bool:
        """Whether passes are training's; others are neither counted nor balanced."""
        return self._active

    @active.setter
    def active(self, active: bool) -> None:
        self._active = active
        self._again.clear()

    @contextmanager
    def routing(self, rows: RoutedRows) -> Iterator[None]:
        """Route these rows."""
        self._rows = rows
        try:
            yield
        finally:
            self._rows = None

    def rows(self, layer: int) -> RoutedRows | None:
        """Return the rows that a layer routes now, if they are known; to be called once each time that it routes."""
        if in_backward_pass():
            return self._again[layer].popleft() if self._again[layer] else None
        if self._active and not torch.is_grad_enabled():
            self._again[layer].append(self._rows)  # a training pass without a graph is one of a layer to compute again
        return self._rows

    def choose(self, layer: int, rows: RoutedRows, own: Tensor) -> Tensor:
        """Return the experts [T, k] of a layer: those that are given, else its own.

        Args:
            layer: of the whole model, from 0.
            rows: that it routes.
            own: int64 [T, k], what the router chooses.
        """
        if rows.given is None:
            return own
        given = rows.given[:, layer].long()
        is_given = given >= 0
        if self._active and not in_backward_pass():
            differs = is_given & (given[:, :, None] != own[:, None, :]).all(-1)
            self._sums[1:] += torch.stack([is_given.sum(), differs.sum()])
        return torch.where(is_given, given, own)

    def observe(self, layer: int, rows: RoutedRows | None, logits: Tensor, probs: Tensor, chosen: Tensor) -> Tensor:
        """Count a layer's choices in a training pass; return probs, with the balancing loss behind them.

        Args:
            layer: of the whole model, from 0.
            rows: that it routes; None if they are not known.
            logits: [T, E], of the router.
            probs: [T, E], of those chosen, else 0.
            chosen: bool [T, E].
        """
        if rows is None or not self._active:
            return probs
        weight = self.weight if torch.is_grad_enabled() else None
        first = not in_backward_pass()  # else it was counted
        if weight is None and not first:
            return probs
        size = len(rows.lengths)
        own = chosen.new_zeros(size + 1, chosen.shape[1], dtype=torch.float32)
        own.index_add_(0, rows.sequence, chosen.float())
        if first:
            self._counts[layer] += own[:size].sum(0)
        if weight is None:
            return probs
        dist.all_reduce(own, group=self.group)
        share = own[:size] / (self.experts.per_token * rows.lengths[:, None])  # f_e, [B, E]
        scores = logits.float().softmax(-1)
        means = scores.new_zeros(size + 1, scores.shape[1]).index_add(0, rows.sequence, scores)[:size]
        loss = chosen.shape[1] * (share * means / rows.lengths[:, None]).sum()  # this rank's part of it
        self._sums[0] += weight * loss.detach()
        balanced: Tensor = _WithLoss.apply(probs, weight * loss)  # type: ignore[no-untyped-call]
        return balanced

    def take(self, updates: int) -> dict[str, float]:
        """Return metrics of what was counted since the last call, in so many updates. Collective over all ranks."""
        both = torch.cat([self._counts.flatten(), self._sums])
        dist.all_reduce(both)
        self._counts.zero_()
        self._sums.zero_()
        counts, sums = both[:-3].view_as(self._counts), both[-3:]
        share = counts / counts.mean(1, keepdim=True).clamp(min=1e-9)  # 1: as many as if all were chosen equally often
        idle_share = (counts == 0).double().mean()
        figures = torch.stack([share.amax(1).mean(), share.amin(1).mean(), idle_share, counts.sum(), *sums])
        largest, smallest, idle, chosen, loss, given, differs = figures.tolist()
        metrics = {"experts/load_max": largest, "experts/load_min": smallest, "experts/idle": idle}
        if given:
            metrics |= {"experts/replayed": given / chosen, "experts/rerouted": differs / given}
        return metrics | ({"experts/balance_loss": loss / updates} if self.weight is not None else {})


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


class _GivenChoice:
    """Megatron's hook for a router's choice (its RouterReplay), for one layer."""

    def __init__(self, record: RoutingRecord, layer: int) -> None:
        self.record, self.layer = record, layer
        self.rows: RoutedRows | None = None

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Callable[..., tuple[Tensor, Tensor]] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return scores and experts of a choice, both [T, k]; scores [T, E] are what Megatron chooses by."""
        assert default_compute_topk is not None
        values, own = default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
        if self.rows is None or self.rows.given is None:
            return values, own
        chosen = self.record.choose(self.layer, self.rows, own)
        return scores.gather(1, chosen), chosen


class RecordedRouter(TopKRouter):  # type: ignore[misc]
    """Megatron's router; it records the experts it chooses, or takes given ones."""

    record: RoutingRecord
    layer: int  #: of the whole model, from 0

    def routing(self, logits: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """Choose experts for logits [S, B, E]; return probabilities and choices, each [T, E]."""
        self.router_replay.rows = rows = self.record.rows(self.layer)
        probs, chosen = super().routing(logits, *arguments, **options)
        return self.record.observe(self.layer, rows, logits.view(-1, logits.shape[-1]), probs, chosen), chosen


def record_routing(layers: Iterable[Any], record: RoutingRecord) -> None:
    """Let the routers of Megatron's layers, which are numbered over all stages, use the record."""
    for layer in layers:
        for module in layer.modules():
            if isinstance(module, TopKRouter):
                module.__class__ = RecordedRouter
                module.record, module.layer = record, layer.layer_number - 1
                module.router_replay = _GivenChoice(record, module.layer)
