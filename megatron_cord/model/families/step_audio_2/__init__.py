"""Step-Audio 2: names and architecture, its audio modules, a plain model, and the class that SGLang loads."""

from megatron_cord.model.families.step_audio_2.family import FAMILIES

__all__ = ["FAMILIES"]
