"""The fields of an Ultravox config.json under their published names, so that transformers needs no remote code."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PretrainedConfig, WhisperConfig


class UltravoxConfig(PretrainedConfig):  # type: ignore[misc]
    """The sizes of encoder, projector and language model.

    Args:
        audio_config: of Whisper.
        text_config: of the language model, its model_type included.
        stack_factor: encoder frames that become one token.
        hidden_size: rows of the projector's first layer, of which its SwiGLU makes half as many.
        projector_act: of the projector.
        projector_ln_mid: whether its second norm stands before the second layer (from version 0.5 on) or behind it.
        audio_token_index: the placeholder of one token of audio.
        fields: all others.
    """

    model_type = "ultravox"

    def __init__(
        self,
        audio_config: dict[str, Any] | None = None,
        text_config: dict[str, Any] | None = None,
        stack_factor: int = 8,
        hidden_size: int = 4096,
        projector_act: str = "swiglu",
        projector_ln_mid: bool = False,
        audio_token_index: int = 32000,
        **fields: Any,
    ) -> None:
        self.audio_config = WhisperConfig(**_without_type(audio_config))
        self.text_config = AutoConfig.for_model(
            (text_config or {}).get("model_type", "llama"), **_without_type(text_config)
        )
        self.stack_factor, self.hidden_size = stack_factor, hidden_size
        self.projector_act, self.projector_ln_mid = projector_act, projector_ln_mid
        self.audio_token_index = audio_token_index
        super().__init__(**fields)


def _without_type(config: dict[str, Any] | None) -> dict[str, Any]:
    return {key: value for key, value in (config or {}).items() if key != "model_type"}


AutoConfig.register(UltravoxConfig.model_type, UltravoxConfig)
