"""Each adapter against its formula in float64, with as many tokens as the architecture says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_cord.model.adapters import build_adapter
from megatron_cord.model.architecture import AdapterArchitecture, EncoderArchitecture
from megatron_cord.model.config import LayerConfig
from megatron_cord.model.layers.transformer import encoder_config
from megatron_cord.parallel.layout import ParallelConfig

AUDIO, OUT = 6, 5
ADAPTERS = {
    "linear": AdapterArchitecture("linear"),
    "linear without bias": AdapterArchitecture("linear", bias=False),
    "convolution": AdapterArchitecture("convolution", 7, stride=2, kernel_size=3, activation="relu"),
    "wide convolution": AdapterArchitecture("convolution", 7, stride=4, kernel_size=7),
    "stacking": AdapterArchitecture("stacking", 7, stride=4, bias=False),
    "gated stacking": AdapterArchitecture("gated_stacking", 7, stride=4, bias=False),
    "stacking of three": AdapterArchitecture("stacking", 7, stride=3, activation="relu"),
}


def by_hand(arch: AdapterArchitecture, weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """X [T, H_audio] to [tokens, H], token by token."""

    def linear(name: str, v: Tensor) -> Tensor:
        return weights[f"{name}.weight"] @ v + weights.get(f"{name}.bias", torch.zeros(1, dtype=v.dtype))

    if arch.kind == "linear":
        return torch.stack([linear("linear", v) for v in x])
    if arch.kind == "gated_stacking":
        stacks = torch.nn.functional.pad(x, (0, 0, 0, -len(x) % arch.stride)).reshape(-1, arch.stride * AUDIO)
        return torch.stack([gated(weights, stack) for stack in stacks])
    activation = torch.relu if arch.activation == "relu" else torch.nn.functional.gelu
    rows = []
    if arch.kind == "stacking":
        rows = [
            torch.cat([*x[start : start + arch.stride]]) for start in range(0, len(x) - arch.stride + 1, arch.stride)
        ]
    else:
        padded = torch.nn.functional.pad(x, (0, 0, 1, 1))
        for start in range(0, len(padded) - arch.kernel_size + 1, arch.stride):
            seen = padded[start : start + arch.kernel_size]  # [kernel, H_audio]
            rows.append(torch.nn.functional.gelu((weights["conv.weight"] * seen.T).sum((1, 2)) + weights["conv.bias"]))
    return torch.stack([linear("linear2", activation(linear("linear1", row))) for row in rows])


def gated(weights: dict[str, Tensor], stack: Tensor) -> Tensor:
    """Return one token of Ultravox's projector."""

    def norm(name: str, v: Tensor) -> Tensor:
        return weights[f"{name}.weight"] * v / ((v * v).mean() + 1e-6).sqrt()

    both = weights["linear1.weight"] @ norm("norm_in", stack)
    value, gate = both[: len(both) // 2], both[len(both) // 2 :]
    return weights["linear2.weight"] @ norm("norm_mid", value * gate / (1 + (-gate).exp()))


@pytest.mark.parametrize("name", list(ADAPTERS))
@pytest.mark.parametrize("features", [8, 9, 10, 11, 25])
def test_adapters(name: str, features: int) -> None:
    """Catches a wrong stride, padding, order within a stack or activation, a wrong count of tokens, and mixed clips."""
    arch = ADAPTERS[name]
    config = encoder_config(EncoderArchitecture(8, AUDIO, 1, 1, 4, 8), ParallelConfig(), torch.float64, LayerConfig())
    torch.manual_seed(0)
    adapter = build_adapter(arch, (AUDIO, OUT), config, torch.device("cpu"))
    clips = [torch.randn(count, AUDIO, dtype=torch.float64) for count in (features, 12)]
    counts = [len(clip) for clip in clips]
    with torch.no_grad():
        given = adapter(torch.cat(clips), counts, [arch.num_tokens(count) for count in counts])
        wanted = torch.cat([by_hand(arch, dict(adapter.named_parameters()), clip) for clip in clips])
    torch.testing.assert_close(given, wanted, rtol=0, atol=1e-12)
    assert given.shape == (sum(arch.num_tokens(count) for count in counts), OUT)
