"""Which kernels of the layers are fused, by the device and by what is installed. This module does not import torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fusions:
    """The fused kernels of both towers; results are the same up to rounding.

    Whisper's GELU is exact and Megatron's fused one an approximation (tanh), so the encoder's activation is not fused.
    """

    #: the layers are computed on a GPU, where torch.compile makes Megatron's fused functions one kernel each
    cuda: bool
    transformer_engine: bool  #: they are transformer-engine's

    @property
    def swiglu(self) -> bool:
        """Whether the language model's gate, SiLU and product are one kernel, which keeps its input alone."""
        return self.cuda

    @property
    def bias_residual(self) -> bool:
        """Whether a bias and the residual are added by one kernel."""
        return self.cuda

    @property
    def rope(self) -> bool:
        """Whether rotary embeddings are one kernel; packed sequences then need no numbers from the device."""
        return self.transformer_engine

    @property
    def gradient_accumulation(self) -> bool:
        """Whether a matrix's gradient is added to DDP's fp32 buffer by the product that forms it."""
        return self.transformer_engine

    @property
    def grouped_experts(self) -> bool:
        """Whether the products of a rank's experts are one call, which begins them together."""
        return self.transformer_engine

    def __str__(self) -> str:
        """Name what is fused."""
        names = {
            "SwiGLU": self.swiglu,
            "bias and residual": self.bias_residual,
            "rotary embedding": self.rope,
            "gradient accumulation": self.gradient_accumulation,
        }
        return ", ".join(name for name, is_fused in names.items() if is_fused) or "nothing"
