"""Audio Flamingo 3: recordings in windows, an MLP, Qwen2."""

from megatron_cord.model.families.audioflamingo3.family import FAMILIES

__all__ = ["FAMILIES"]
