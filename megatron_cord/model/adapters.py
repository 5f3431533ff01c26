"""Adapters: from the audio encoder's features to the language model's width. The architecture says which of them.

They are small beside both towers, so every tensor-parallel rank holds all of them. Clips stand one after the other:
clip i has counts[i] of the F features, and becomes tokens[i] of the N tokens.
Legend: C clips, H_audio and H the widths of encoder and language model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_cord.model.architecture import AdapterArchitecture
from megatron_cord.model.layers.packed_rows import first_rows

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

    def forward(self, features: Tensor, counts: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """Map [F, H_audio] to [N, H]."""
        projected: Tensor = self.linear(first_rows(features, counts, tokens))
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

    def forward(self, features: Tensor, counts: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """Map [F, H_audio] to [N, H]; a clip is followed by zeros in the convolution."""
        apart = list(torch.split(features, list(counts)))
        clips = torch.nn.utils.rnn.pad_sequence(apart, batch_first=True)  # [C, longest, H_audio]
        x = torch.nn.functional.gelu(self.conv(clips.transpose(1, 2))).transpose(1, 2)
        x = torch.cat([clip[:count] for clip, count in zip(x, tokens, strict=True)])
        mapped: Tensor = self.linear2(self.activation(self.linear1(x)))
        return mapped


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

    def forward(self, features: Tensor, counts: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """Map [F, H_audio] to [N, H]."""
        whole = first_rows(features, counts, [count * self.stride for count in tokens])
        stacks = whole.reshape(-1, self.stride * whole.shape[1])
        mapped: Tensor = self.linear2(self.activation(self.linear1(stacks)))
        return mapped


class GatedStackingAdapter(MegatronModule):  # type: ignore[misc]
    """Neighbouring features side by side, then SwiGLU between two RMSNorms (Ultravox); no layer has a bias.

    A clip's last stack is filled with zeros.
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

    def forward(self, features: Tensor, counts: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """Map [F, H_audio] to [N, H]."""
        clips = zip(torch.split(features, list(counts)), tokens, strict=True)
        whole = [torch.nn.functional.pad(clip, (0, 0, 0, count * self.stride - len(clip))) for clip, count in clips]
        stacks = torch.cat(whole).reshape(-1, self.linear1.in_features)
        values, gate = self.linear1(self.norm_in(stacks)).chunk(2, dim=-1)
        mapped: Tensor = self.linear2(self.norm_mid(torch.nn.functional.silu(gate) * values))
        return mapped


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
