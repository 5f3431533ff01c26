"""Adapters: from the audio encoder's features to the language model's width. The architecture says which of them.

They are small beside both towers, so every tensor-parallel rank holds all of them.
Legend: C clips, T features a clip, H_audio and H the widths of encoder and language model.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_cord.model.architecture import AdapterArchitecture

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.nn.functional.relu,
    "gelu": torch.nn.functional.gelu,
}
_EPSILON = 1e-6  # of Ultravox's norms; no configuration has it


class LinearAdapter(MegatronModule):  # type: ignore[misc]
    """One projection (Qwen2-Audio)."""

    def __init__(
        self, arch: AdapterArchitecture, sizes: tuple[int, int], config: TransformerConfig, device: torch.device
    ) -> None:
        super().__init__(config)
        self.linear = torch.nn.Linear(*sizes, bias=arch.bias, dtype=config.params_dtype, device=device)

    def forward(self, features: Tensor) -> Tensor:
        """Map [C, T, H_audio] to [C, T, H]."""
        projected: Tensor = self.linear(features)
        return projected


class ConvolutionAdapter(MegatronModule):  # type: ignore[misc]
    """A strided convolution with GELU, then an MLP (Step-Audio 2)."""

    def __init__(
        self, arch: AdapterArchitecture, sizes: tuple[int, int], config: TransformerConfig, device: torch.device
    ) -> None:
        super().__init__(config)
        audio, out = sizes
        kind = {"dtype": config.params_dtype, "device": device}
        self.conv = torch.nn.Conv1d(audio, audio, arch.kernel_size, arch.stride, padding=1, **kind)
        self.linear1 = torch.nn.Linear(audio, arch.hidden_size, bias=arch.bias, **kind)
        self.linear2 = torch.nn.Linear(arch.hidden_size, out, bias=arch.bias, **kind)
        self.activation = _ACTIVATIONS[arch.activation]

    def forward(self, features: Tensor) -> Tensor:
        """Map [C, T, H_audio] to [C, tokens, H]."""
        x = torch.nn.functional.gelu(self.conv(features.transpose(1, 2))).transpose(1, 2)
        tokens: Tensor = self.linear2(self.activation(self.linear1(x)))
        return tokens


class StackingAdapter(MegatronModule):  # type: ignore[misc]
    """Neighbouring features side by side, then an MLP (Voxtral). Features that do not fill a stack are left out."""

    def __init__(
        self, arch: AdapterArchitecture, sizes: tuple[int, int], config: TransformerConfig, device: torch.device
    ) -> None:
        super().__init__(config)
        audio, out = sizes
        self.stride = arch.stride
        self.linear1 = torch.nn.Linear(
            audio * arch.stride, arch.hidden_size, bias=arch.bias, dtype=config.params_dtype, device=device
        )
        self.linear2 = torch.nn.Linear(arch.hidden_size, out, bias=arch.bias, dtype=config.params_dtype, device=device)
        self.activation = _ACTIVATIONS[arch.activation]

    def forward(self, features: Tensor) -> Tensor:
        """Map [C, T, H_audio] to [C, T / stride, H]."""
        clips, count, _ = features.shape
        whole = features[:, : count // self.stride * self.stride].reshape(clips, count // self.stride, -1)
        tokens: Tensor = self.linear2(self.activation(self.linear1(whole)))
        return tokens


class GatedStackingAdapter(MegatronModule):  # type: ignore[misc]
    """Neighbouring features side by side, then SwiGLU between two RMSNorms (Ultravox); no layer has a bias.

    A clip's last stack is filled with zeros, which the encoder puts behind a clip's features (`tail_frames`).
    """

    def __init__(
        self, arch: AdapterArchitecture, sizes: tuple[int, int], config: TransformerConfig, device: torch.device
    ) -> None:
        super().__init__(config)
        audio, out = sizes
        self.stride = arch.stride
        kind = {"dtype": config.params_dtype, "device": device}
        self.norm_in = torch.nn.RMSNorm(audio * arch.stride, eps=_EPSILON, **kind)
        self.linear1 = torch.nn.Linear(audio * arch.stride, arch.mlp_rows, bias=False, **kind)
        self.norm_mid = torch.nn.RMSNorm(arch.hidden_size, eps=_EPSILON, **kind)
        self.linear2 = torch.nn.Linear(arch.hidden_size, out, bias=False, **kind)

    def forward(self, features: Tensor) -> Tensor:
        """Map [C, T, H_audio] to [C, T / stride, H], rounded up."""
        whole = torch.nn.functional.pad(features, (0, 0, 0, -features.shape[1] % self.stride))
        stacks = whole.reshape(len(whole), -1, self.linear1.in_features)
        values, gate = self.linear1(self.norm_in(stacks)).chunk(2, dim=-1)
        tokens: Tensor = self.linear2(self.norm_mid(torch.nn.functional.silu(gate) * values))
        return tokens


Adapter = LinearAdapter | ConvolutionAdapter | StackingAdapter | GatedStackingAdapter
_KINDS: dict[str, type[Adapter]] = {
    "linear": LinearAdapter,
    "convolution": ConvolutionAdapter,
    "stacking": StackingAdapter,
    "gated_stacking": GatedStackingAdapter,
}


def build_adapter(
    arch: AdapterArchitecture, sizes: tuple[int, int], config: TransformerConfig, device: torch.device
) -> Adapter:
    """Build the adapter of an architecture.

    Args:
        arch: kind and sizes of the adapter.
        sizes: (H_audio, H).
        config: for the precision.
        device: where its parameters are.
    """
    return _KINDS[arch.kind](arch, sizes, config, device)
