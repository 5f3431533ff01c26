"""The thinker of Qwen2.5-Omni as transformers has it, without its vision tower."""

from __future__ import annotations

from typing import Any

from transformers import Qwen2_5OmniThinkerForConditionalGeneration

from megatron_cord.model.families.plain_thinker import PlainThinker

_Thinker: Any = Qwen2_5OmniThinkerForConditionalGeneration


class Thinker(PlainThinker, _Thinker):  # type: ignore[misc]
    """transformers' class, from the directory of a whole checkpoint.

    Args:
        config: of the thinker.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        del self.audio_tower.audio_bos_eos_token  # never read; conversions carry it
