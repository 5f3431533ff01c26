"""Ultravox for SGLang, which has no class for it: the trainer's encoder and projector, any of its decoders.

It runs in SGLang's processes (``rollout/sglang/plugin/external``).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from cord_models.speech import ClipRules, SpeechModel, SpeechProcessor
from torch import Tensor
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from ultravox_audio import Projector, encode_clip


class UltravoxModel(SpeechModel):  # type: ignore[misc]
    """The model; SGLang finds it by this name, which is the architecture's in the checkpoint."""

    def __init__(self, config: Any, quant_config: Any = None, prefix: str = "") -> None:
        super().__init__(config, quant_config, prefix)
        self.audio_tower = WhisperEncoder(config.audio_config)
        self.multi_modal_projector = Projector(config)

    def encode_audio(self, items: list[Any]) -> Tensor:
        """Return audio features [tokens of all clips, H]."""
        encoded = (encode_clip(self.audio_tower, item.feature, item.num_frames) for item in items)
        return torch.cat([self.multi_modal_projector(clip) for clip in encoded])


class UltravoxProcessor(SpeechProcessor):  # type: ignore[misc]
    """Prompts with recordings; one placeholder is ``<|audio|>`` where `cord graft` made the checkpoint."""

    models: ClassVar = [UltravoxModel]

    def rules(self) -> ClipRules:
        """Return what Ultravox makes of a recording."""
        audio, stack = self.hf_config.audio_config, self.hf_config.stack_factor
        window = 2 * audio.max_source_positions
        return ClipRules(
            placeholder=self.hf_config.audio_token_index,
            num_mels=audio.num_mel_bins,
            window_frames=window,
            longest_frames=window,
            tail_frames=0,
            num_tokens=lambda frames: ((frames + 1) // 2 + stack - 1) // stack,
        )


EntryClass = UltravoxModel
