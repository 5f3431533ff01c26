"""What each layer makes of a response: its output's mean over the response's tokens, taken while microbatches pass.

A hook on each layer of this pipeline stage pools its output and keeps [H] a response, never hidden states. The last
token of a response, which ends it, is left out, unless it is the only one.

Legend: B sequences and n response tokens of a microbatch on this context-parallel rank, N sequences, H hidden size, L
layers of this stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_cord.losses.responses import response_of_token
from megatron_cord.model.lalm import LALM
from megatron_cord.model.pipeline import padding_in_front
from megatron_cord.trainer.step.batching.batches import Microbatch


class LayerMeans:
    """A context in which the model's forward passes are pooled.

    Args:
        model: whose language model's layers are hooked.
        microbatches: those that will pass, in this order, each once.
    """

    def __init__(self, model: LALM, microbatches: Sequence[Microbatch]) -> None:
        self._model, self._microbatches = model, microbatches
        self._layers = list(model.language_model.decoder.layers)
        self._means: list[list[Tensor]] = [[] for _ in self._layers]
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._padding = len(padding_in_front(model, len(microbatches)))  # that the pipeline lets pass before them

    def __enter__(self) -> Self:
        for layer, means in zip(self._layers, self._means, strict=True):
            self._handles.append(layer.register_forward_hook(self._hook(means)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def whole(self) -> Tensor:
        """Return the means, float32 [L, N, H], of sequences in the order of their index."""
        sequences = [sequence for batch in self._microbatches for sequence in batch.sequences]
        if not sequences:
            return torch.zeros(len(self._layers), 0, self._model.config.hidden_size, device=self._model.layout.device)
        means = torch.stack([torch.cat(of_layer) for of_layer in self._means])
        order = sorted(range(len(sequences)), key=lambda place: sequences[place].index)
        return means[:, torch.tensor(order, device=means.device)]

    def _hook(self, means: list[Tensor]) -> Any:
        passed = count()

        def pool(_module: Any, _inputs: Any, output: Any) -> None:
            if next(passed) < self._padding:
                return
            hidden = output[0] if isinstance(output, tuple) else output
            means.append(self._pooled(hidden.detach(), self._microbatches[len(means)]))

        return pool

    def _pooled(self, hidden: Tensor, batch: Microbatch) -> Tensor:
        """Return float32 [B, H] of a layer's output, [S/CP, B, H], or [S/CP/TP, B, H] with sequence parallelism."""
        layout = self._model.layout
        if self._model.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=layout.tp_group
            )
        rows = hidden.reshape(-1, hidden.shape[-1]).index_select(0, batch.student_rows.rows).float()  # [n, H]
        response = response_of_token(rows[:, 0], batch.cu_seqlens)
        # A row predicts the next token: that of position t is the state of token t − 1, and that of 0 of the prompt.
        counted = (batch.positions > 0) | (batch.lengths[response] == 1)
        sums = rows.new_zeros(len(batch.sequences), rows.shape[1])
        sums = sums.index_add(0, response, rows * counted[:, None])
        if dist.get_world_size(layout.cp_group) > 1:
            dist.all_reduce(sums, group=layout.cp_group)
        return sums / (batch.lengths - 1).clamp(min=1)[:, None]
