"""Qwen3-Omni with experts (the thinker, which listens and writes): sizes and names, and the model in plain torch."""

from megatron_cord.model.families.qwen3_omni_moe.family import FAMILIES

__all__ = ["FAMILIES"]
