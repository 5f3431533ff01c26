"""Prompts: a sample's conversation as a token sequence for each view, with the checkpoint's own template."""

from megatron_cord.data.prompts.builder import PromptBuilder
from megatron_cord.data.prompts.clips import FeatureBackend, LongAudio

__all__ = ["FeatureBackend", "LongAudio", "PromptBuilder"]
