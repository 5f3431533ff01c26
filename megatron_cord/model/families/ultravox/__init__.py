"""Ultravox's layout: any Whisper, a projector over stacked frames, any supported text model."""

from megatron_cord.model.families.ultravox.family import FAMILIES

__all__ = ["FAMILIES"]
