"""The norm of a layer that has it inside, as transformer-engine's: LoRA needs its result, which is not returned."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class FusedNorm:
    """Computes that norm once more, with the layer's own weights.

    Args:
        base: the layer.
        tower: the configuration of the part of the model that it is in.
    """

    def __init__(self, base: Any, tower: TransformerConfig) -> None:
        self._base, self._kind, self._epsilon = base, tower.normalization, tower.layernorm_epsilon

    def __call__(self, x: Tensor) -> Tensor:
        """Return the normed x, [..., in]."""
        weight: Tensor = self._base.layer_norm_weight
        shape = x.shape[-1:]
        normed: Tensor = (
            torch.nn.functional.rms_norm(x, shape, weight, self._epsilon)
            if self._kind == "RMSNorm"
            else torch.nn.functional.layer_norm(x, shape, weight, self._base.layer_norm_bias, self._epsilon)
        )
        return normed
