"""Frequencies of rotary positions, scaled as checkpoints name it.

Formulas: linear, Chen et al. 2023 (arXiv 2306.15595); llama3, as published with Llama 3.1; YaRN, Peng et al. 2023
(arXiv 2309.00071). Megatron's own classes have one of llama3's five numbers and truncate where YaRN's checkpoints may
not, so the frequencies are set here. Legend: D head size, L positions of pre-training, θ base.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_cord.model.architecture import LanguageArchitecture, RopeScaling


def inverse_frequencies(arch: LanguageArchitecture) -> Tensor:
    """Return the angle by which each pair of dimensions turns from one position to the next, float32 [D/2]."""
    exponents = torch.arange(0, arch.head_dim, 2, dtype=torch.float32) / arch.head_dim
    plain = 1.0 / arch.rope_theta**exponents
    scaling = arch.rope_scaling
    if scaling is None:
        return plain
    if scaling.kind == "linear":
        return plain / scaling.factor
    kept = _llama3(plain, scaling) if scaling.kind == "llama3" else _yarn(arch, scaling)
    return plain / scaling.factor * (1 - kept) + plain * kept


def softmax_scale(arch: LanguageArchitecture) -> float | None:
    """Return the number by which scores are multiplied; None for 1/√D.

    YaRN multiplies rotated queries and keys by one factor each, which is its square on their products.
    """
    if arch.rope_scaling is None or arch.rope_scaling.attention_factor == 1:
        return None
    return arch.rope_scaling.attention_factor**2 / math.sqrt(arch.head_dim)


def _llama3(plain: Tensor, scaling: RopeScaling) -> Tensor:
    """Return the share [D/2] of each frequency that is kept, by its periods over L positions."""
    periods = scaling.original_max_positions * plain / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    return ((periods - low) / (high - low)).clamp(0, 1)


def _yarn(arch: LanguageArchitecture, scaling: RopeScaling) -> Tensor:
    """Return the same: a ramp over the dimensions between those that make beta_fast and beta_slow turns."""
    length, base = scaling.original_max_positions, math.log(arch.rope_theta)
    first, last = (
        arch.head_dim * math.log(length / (turns * 2 * math.pi)) / (2 * base)
        for turns in (scaling.beta_fast, scaling.beta_slow)
    )
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, arch.head_dim - 1)
    width = last - first or 0.001  # where both are one dimension: a step
    return 1 - ((torch.arange(arch.head_dim // 2, dtype=torch.float32) - first) / width).clamp(0, 1)
