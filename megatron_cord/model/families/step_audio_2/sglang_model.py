"""Step-Audio 2 for SGLang, which has no class for it: the trainer's own encoder and adapter before SGLang's Qwen2.

Recordings are at most 25 s long. It runs in SGLang's processes (``rollout/sglang/plugin/external``).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from cord_models.speech import ClipRules, SpeechModel, SpeechProcessor
from step_audio_2_audio import TAIL_FRAMES, Adapter, Encoder
from torch import Tensor


class StepAudio2ForCausalLM(SpeechModel):  # type: ignore[misc]
    """The model; SGLang finds it by this name, which is the architecture's in the checkpoint."""

    language_prefix: ClassVar[str] = ""

    def __init__(self, config: Any, quant_config: Any = None, prefix: str = "") -> None:
        super().__init__(config, quant_config, prefix)
        self.encoder, self.adapter = Encoder(config), Adapter(config)

    def encode_audio(self, items: list[Any]) -> Tensor:
        """Return audio features [tokens of all clips, H]."""
        encoded = [self.adapter(self.encoder(item.feature, item.num_frames)) for item in items]
        counts = [self.config.num_tokens(item.num_frames) for item in items]
        return torch.cat([clip[:count] for clip, count in zip(encoded, counts, strict=True)])


class StepAudio2Processor(SpeechProcessor):  # type: ignore[misc]
    """Prompts with recordings; one placeholder is ``<audio_patch>``."""

    models: ClassVar = [StepAudio2ForCausalLM]

    def rules(self) -> ClipRules:
        """Return what Step-Audio 2 makes of a recording."""
        config = self.hf_config
        return ClipRules(
            placeholder=config.placeholder,
            num_mels=config.audio.n_mels,
            window_frames=config.window_frames,
            longest_frames=config.clip_frames,
            tail_frames=TAIL_FRAMES,
            num_tokens=config.num_tokens,
        )


EntryClass = StepAudio2ForCausalLM
