"""Audio Flamingo 3 for SGLang: transformers' encoder and projector before SGLang's Qwen2.

It runs in SGLang's processes (``rollout/sglang/plugin/external``).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from cord_models.speech import ClipRules, SpeechModel, SpeechProcessor
from torch import Tensor
from transformers.models.audioflamingo3.modeling_audioflamingo3 import (
    AudioFlamingo3Encoder,
    AudioFlamingo3MultiModalProjector,
)


def num_tokens(frames: int) -> int:
    """Return how many tokens a window with so many frames of audio becomes."""
    return (frames + 1) // 2 // 2


class AudioFlamingo3ForConditionalGeneration(SpeechModel):  # type: ignore[misc]
    """The model; SGLang finds it by this name, which is the architecture's in the checkpoint."""

    def __init__(self, config: Any, quant_config: Any = None, prefix: str = "") -> None:
        super().__init__(config, quant_config, prefix)
        self.audio_tower = AudioFlamingo3Encoder(config.audio_config)
        self.multi_modal_projector = AudioFlamingo3MultiModalProjector(config)

    def encode_audio(self, items: list[Any]) -> Tensor:
        """Return audio features [tokens of all windows, H]."""
        encoded = torch.cat([self._encode(item.feature, item.num_frames) for item in items])
        projected: Tensor = self.multi_modal_projector(encoded)
        return projected

    def _encode(self, features: Tensor, num_frames: int) -> Tensor:
        window = features[None].to(self.audio_tower.conv1.weight)  # [1, mels, frames]
        is_audio = torch.arange(window.shape[-1], device=window.device)[None] < num_frames
        encoded: Tensor = self.audio_tower(window, input_features_mask=is_audio.long()).last_hidden_state
        return encoded[0, : num_tokens(num_frames)]


class AudioFlamingo3Processor(SpeechProcessor):  # type: ignore[misc]
    """Prompts with recordings; one placeholder is ``<sound>``."""

    models: ClassVar = [AudioFlamingo3ForConditionalGeneration]

    def rules(self) -> ClipRules:
        """Return what the model makes of a window of a recording."""
        audio = self.hf_config.audio_config
        window = 2 * audio.max_source_positions
        return ClipRules(
            placeholder=self.hf_config.audio_token_id,
            num_mels=audio.num_mel_bins,
            window_frames=window,
            longest_frames=window,
            tail_frames=None,
            num_tokens=num_tokens,
        )


EntryClass = AudioFlamingo3ForConditionalGeneration
