"""Qwen2.5-Omni's thinker for SGLang, which has no class for it: transformers' audio encoder before SGLang's Qwen2.

Images and videos are refused, and the speech generator is not loaded. It runs in SGLang's processes
(``rollout/sglang/plugin/external``).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np
import torch
from cord_models.speech import HOP, RATE, ClipRules, SpeechModel, SpeechProcessor
from torch import Tensor
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniAudioEncoder

_THINKER = "thinker."
_OTHERS = ("talker.", "token2wav.", "thinker.visual.", "thinker.audio_tower.audio_bos_eos_token.")


class CordQwen2_5OmniThinker(SpeechModel):  # type: ignore[misc]  # noqa: N801
    """The model; SGLang finds it by this name, which `served_config.py` gives as the architecture's."""

    language_prefix: ClassVar[str] = ""

    def __init__(self, config: Any, quant_config: Any = None, prefix: str = "") -> None:
        super().__init__(config, quant_config, prefix)
        self.audio_tower = Qwen2_5OmniAudioEncoder(config.audio_config)
        del self.audio_tower.audio_bos_eos_token  # never read

    def encode_audio(self, items: list[Any]) -> Tensor:
        """Return audio features [tokens of all clips, H], each clip encoded by itself."""
        return torch.cat([self._encode(item.feature, item.num_frames) for item in items])

    def _encode(self, features: Tensor, num_frames: int) -> Tensor:
        clip = features[:, :num_frames].to(self.audio_tower.conv1.weight)
        frames = torch.tensor([num_frames], device=clip.device)
        encoded: Tensor = self.audio_tower(clip, feature_lens=frames).last_hidden_state
        return encoded

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Take the thinker's tensors under the published names, each as it comes, and leave out what is not served.

        Raises:
            KeyError: the encoder has no such tensor.
        """
        kept = ((name, tensor) for name, tensor in weights if not name.startswith(_OTHERS))
        super().load_weights((name.removeprefix(_THINKER), tensor) for name, tensor in kept)


class Qwen2_5OmniProcessor(SpeechProcessor):  # type: ignore[misc]  # noqa: N801
    """Prompts with recordings; one placeholder is ``<|AUDIO|>``."""

    models: ClassVar = [CordQwen2_5OmniThinker]

    def rules(self) -> ClipRules:
        """Return what the thinker makes of a recording."""
        config = self.hf_config
        return ClipRules(
            placeholder=config.placeholder,
            num_mels=config.audio_config.num_mel_bins,
            window_frames=config.clip_frames,
            longest_frames=config.clip_frames,
            tail_frames=0,
            num_tokens=config.num_tokens,
        )

    def feature(self, waveform: np.ndarray, frames: int) -> Tensor:
        """Return features [mels, frames], those of the recording in a window of any length."""
        length = -(-(len(waveform) + self._extractor.n_fft) // HOP) * HOP
        made = self._extractor(
            waveform,
            sampling_rate=RATE,
            return_tensors="pt",
            padding="max_length",
            max_length=length,
            truncation=False,
        )
        features: Tensor = made["input_features"][0, :, :frames].contiguous()
        return features


EntryClass = CordQwen2_5OmniThinker
