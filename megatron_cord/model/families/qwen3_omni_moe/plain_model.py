"""The thinker of Qwen3-Omni as transformers has it, without its vision tower."""

from __future__ import annotations

from typing import Any

from transformers import Qwen3OmniMoeThinkerForConditionalGeneration

from megatron_cord.model.families.plain_thinker import PlainThinker

_Thinker: Any = Qwen3OmniMoeThinkerForConditionalGeneration


class Thinker(PlainThinker, _Thinker):  # type: ignore[misc]
    """transformers' class, from the directory of a whole checkpoint."""
