"""The configuration of Qwen2.5-Omni's thinker as SGLang servers read it; it imports nothing else of the project.

SGLang has no class for the model. Its Qwen2 is what the thinker computes of text and audio, with ordinary rotary
positions (`family.py` says why); the axes of images are left out of its configuration.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PretrainedConfig, Qwen2_5OmniAudioEncoderConfig, Qwen2Config

ARCHITECTURE = "CordQwen2_5OmniThinker"  #: in the place of the whole model's, which no class here is
AUDIO_TOKEN_ID = 151646  #: published
CLIP_FRAMES = 30000  #: five minutes of log-mel frames, the window of the published feature extractor
_OTHERS = ("talker_config", "token2wav_config", "enable_audio_output", "enable_talker", "architectures")


class ThinkerConfig(PretrainedConfig):  # type: ignore[misc]
    """The fields of config.json, as far as the thinker needs them without its vision tower."""

    model_type = "qwen2_5_omni"

    def __init__(self, thinker_config: dict[str, Any] | None = None, **fields: Any) -> None:
        thinker = thinker_config or {}
        text = {key: value for key, value in thinker.get("text_config", {}).items() if key != "model_type"}
        for key in ("rope_scaling", "rope_parameters"):
            if text.get(key):
                text[key] = {name: value for name, value in text[key].items() if name != "mrope_section"}
        self.audio_config = Qwen2_5OmniAudioEncoderConfig(**thinker.get("audio_config", {}))
        tied = bool(thinker.get("tie_word_embeddings", False))
        self.text_config = Qwen2Config(**(text | {"tie_word_embeddings": tied}))
        self.placeholder = int(thinker.get("audio_token_index", thinker.get("audio_token_id", AUDIO_TOKEN_ID)))
        self.clip_frames = CLIP_FRAMES
        kept = {key: value for key, value in fields.items() if key not in _OTHERS}
        super().__init__(**(kept | {"architectures": [ARCHITECTURE], "tie_word_embeddings": tied}))

    def num_tokens(self, num_frames: int) -> int:
        """Return how many tokens a clip of so many log-mel frames becomes."""
        return (num_frames + 1) // 2 // 2


# transformers' own class of this model type describes the whole model.
AutoConfig.register(ThinkerConfig.model_type, ThinkerConfig, exist_ok=True)
