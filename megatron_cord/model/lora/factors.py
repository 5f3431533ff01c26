"""A and B of one part of a matrix, and their initial values. Legend: r rank."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_cord.runtime.files import fingerprint


class Factors(torch.nn.Module):
    """A and B of one part; this rank's shards."""

    def __init__(self, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.lora_A = torch.nn.Parameter(a)
        self.lora_B = torch.nn.Parameter(b)


def draw_a(rank: int, columns: int, name: str, seed: int) -> Tensor:
    """Draw A as PEFT does (Kaiming uniform, a = √5): float32 [r, in] within ±1/√in, the same on every layout."""
    generator = torch.Generator().manual_seed(int(fingerprint([seed, name]), 16))
    return (2 * torch.rand(rank, columns, generator=generator) - 1) / math.sqrt(columns)
