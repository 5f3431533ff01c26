"""The weights of a checkpoint that holds adapters alone: of the adapters, and merged with the base's, block by block.

Neither a model nor a whole tensor of the base is in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from torch import Tensor

from megatron_cord.convert.hf.spelling import published_tensors
from megatron_cord.convert.inventory import common_dtype
from megatron_cord.convert.megatron.reader import BLOCK, SavedWeights
from megatron_cord.model.lalm import LALM
from megatron_cord.model.lora.targets import LoraTarget


def read_factors(checkpoint: Path, targets: list[LoraTarget]) -> dict[str, Tensor]:
    """Return A [r, in] and B [out, r] of a checkpoint, by published name: MODULE.lora_A.weight.

    A process group must be initialised. Raises whatever dist_checkpointing raises for damaged files.
    """
    names = {published: name for target in targets for published, name in target.names().items()}
    saved = dist_checkpointing.load_tensors_metadata(str(checkpoint))
    asked = {published: saved[name] for published, name in names.items()}
    state: dict[str, Tensor] = dist_checkpointing.load(asked, str(checkpoint), validate_access_integrity=False)
    return {published: state[published] for published in names}


class MergedWeights:
    """The whole weights: W + scale · B A where there is LoRA, the checkpoint's own where a part is trained whole.

    All else is the base's. The interface is that of `SavedWeights`.

    Args:
        checkpoint: that holds the adapters.
        base: the Hugging Face directory beside which they were trained.
        model: the whole model of fake tensors, on one rank.
        factors: A and B, by published name.
        scale: alpha / rank.

    Attributes:
        factors: A and B, by published name.
        shapes: of the Hugging Face tensors, by name, in the order of export.
        whole: names of those that the checkpoint holds itself.

    Raises:
        CordError: checkpoint or base cannot be read.
    """

    def __init__(self, checkpoint: Path, base: str, model: LALM, factors: Mapping[str, Tensor], scale: float) -> None:
        self._saved = SavedWeights(checkpoint, model, partial=True)
        self._base = dict(published_tensors(base, model.arch))
        self.factors, self._scale = factors, scale
        self.shapes, self.whole = self._saved.shapes, self._saved.present

    def common_dtype(self) -> torch.dtype:
        """Return the precision that all tensors of the base have. Raises CordError if they have several."""
        return common_dtype(list(self._base.values()))

    def blocks(self, name: str) -> Iterator[Tensor]:
        """Yield the tensor of this name in portions of some rows each, in their order; merged ones in float32.

        Raises:
            CordError: a file is missing, or ends too early.
        """
        if name in self.whole:
            yield from self._saved.blocks(name)
            return
        stored, module = self._base[name], name.removesuffix(".weight")
        a, b = (self.factors.get(f"{module}.{factor}.weight") for factor in ("lora_A", "lora_B"))
        step = max(1, BLOCK // max(1, prod(stored.shape[1:]) * 4))
        for start in range(0, stored.shape[0], step):
            block = torch.empty(min(step, stored.shape[0] - start), *stored.shape[1:], dtype=stored.dtype)
            stored.read_block(start, 0, block)
            if a is not None and b is not None:
                block = block.float() + self._scale * (b[start : start + len(block)].float() @ a.float())
            yield block
