"""The language model of one pipeline rank in chunks, which interleaved stages run one at a time.

The rank has one module with all of its layers, so names, checkpoints, export, LoRA and the optimizer do not know of
chunks. A chunk is a view of it: another module object with some of the same layers.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset


class NumberedBlock(TransformerBlock):  # type: ignore[misc]
    """Megatron's block of layers, whose layers need not be neighbours in the whole model.

    Megatron takes a layer's place in the block for its number less the number of the pipeline rank's first layer.
    """

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Any = None
    ) -> dict[str, Any]:
        """Describe the layers for dist_checkpointing: keys by their places here, entries by their numbers."""
        first = get_transformer_layer_offset(self.config, self.vp_stage, self.pg_collection.pp.rank())
        root = f"{prefix}layers."
        places = {f"{layer.layer_number - 1 - first}": place for place, layer in enumerate(self.layers)}

        def named(key: str) -> str:
            number, dot, rest = key.removeprefix(root).partition(".")
            return f"{root}{places[number]}{dot}{rest}" if key.startswith(root) else key

        entries: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return {named(key): entry for key, entry in entries.items()}


def number_layers(model: GPTModel, chunks: Sequence[range]) -> None:
    """Tell each layer its place in the whole model, and the block to keep to it; Megatron counts from 1.

    Args:
        model: of one rank.
        chunks: the rank's layers, from 0.
    """
    model.decoder.__class__ = NumberedBlock
    numbers = [number for chunk in chunks for number in chunk]
    for layer, number in zip(model.decoder.layers, numbers, strict=True):
        for module in layer.modules():
            if isinstance(getattr(module, "layer_number", None), int):
                module.layer_number = number + 1


def split_in_chunks(model: GPTModel, chunks: Sequence[range]) -> tuple[GPTModel, ...]:
    """Return views of a rank's language model, one a chunk, in order; the model itself where there is one chunk.

    Word embeddings go with the first of them, the final norm and the output layer with the last one, where the rank has
    these. Parameters, hooks and submodules are the model's own.
    """
    if len(chunks) == 1:
        return (model,)
    views, start = [], 0
    for number, chunk in enumerate(chunks):
        ends = (model.pre_process and number == 0, model.post_process and number == len(chunks) - 1)
        block = _view(model.decoder, ends)
        block._modules["layers"] = torch.nn.ModuleList(list(model.decoder.layers)[start : start + len(chunk)])
        block.num_layers_per_pipeline_rank = len(chunk)
        if not ends[1]:
            block._modules["final_layernorm"] = None
        view = _view(model, ends)
        view._modules["decoder"] = block
        views.append(view)
        start += len(chunk)
    return tuple(views)


def _view(module: Any, ends: tuple[bool, bool]) -> Any:
    """Return another object of the same parameters and hooks, whose table of submodules can be changed."""
    view = copy.copy(module)
    view.__dict__["_modules"] = dict(module._modules)
    view.pre_process, view.post_process = ends
    return cast(Any, view)
