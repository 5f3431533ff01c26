"""Qwen2.5-Omni's thinker: audio and text in, text out."""

from megatron_cord.model.families.qwen2_5_omni.family import FAMILIES

__all__ = ["FAMILIES"]
