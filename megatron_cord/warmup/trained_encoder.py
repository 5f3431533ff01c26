"""The encoder while it is trained: fp32 weights beside the module that computes with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from megatron_cord.model.encoder import AudioEncoder, keep_key_bias


class TrainedEncoder(nn.Module):
    """Calls an encoder with weights of its own, fp32 and with gradients, in the encoder's precision.

    Args:
        encoder: its own weights are read by nobody until `store`.
        weights: float32, by the encoder's names; what has none here is not trained.
    """

    def __init__(self, encoder: AudioEncoder, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._called = (encoder,)  # in a tuple it is no submodule, whose weights would be trained and saved, too
        self.weights = nn.ParameterDict({_key(name): nn.Parameter(weight) for name, weight in weights.items()})
        for name, weight in self.named().items():
            if name.endswith("linear_qkv.bias"):
                keep_key_bias(weight, encoder.arch.hidden_size // encoder.arch.num_heads)

    def forward(self, features: Tensor | Sequence[Tensor], num_frames: Sequence[int]) -> Tensor:
        """Encode clips as the encoder does."""
        (encoder,) = self._called
        dtype = encoder.layer_norm.weight.dtype
        weights = {name: weight.to(dtype) for name, weight in self.named().items()}
        encoded: Tensor = functional_call(encoder, weights, (features, num_frames))
        return encoded

    def named(self) -> dict[str, nn.Parameter]:
        """Return the weights by the encoder's names."""
        return {key.replace("/", "."): weight for key, weight in self.weights.items()}

    @torch.no_grad()
    def store(self, stored: torch.dtype) -> None:
        """Give the weights the precision with which they are written, and the encoder these weights."""
        (encoder,) = self._called
        for name, weight in self.named().items():
            weight.copy_(weight.to(stored))
            encoder.get_parameter(name).copy_(weight)


def _key(name: str) -> str:
    """Return a key for `ParameterDict`, which takes no dots."""
    return name.replace(".", "/")
