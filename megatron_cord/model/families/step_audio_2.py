"""Step-Audio 2 mini (Wu et al. 2025): Qwen2-Audio's encoder at 25 Hz, a strided convolution that halves the rate with an MLP, Qwen2.5-7B.

transformers has no class for it: its code is remote code, which this project does not run. Configuration and names are those of the
published files. A clip is computed as if it were alone in its batch, whatever it is padded to; the published code lets the padding
into the last token of some lengths.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from transformers import AutoConfig, PretrainedConfig, Qwen2Config

from megatron_cord.model.architecture import AdapterArchitecture, Architecture, EncoderArchitecture
from megatron_cord.model.families.parts import decoder_architecture, decoder_rules, encoder_rules, pair
from megatron_cord.model.tensor_map import TensorMap

_AUDIO_TOKEN_ID = 151690  # <audio_patch> in the published vocabulary; the configuration has no field for it
_ADAPTER_HIDDEN_SIZE = 2048  # nor for the width of the adapter's MLP
_TAIL_FRAMES = 2  # of silence that end a clip: convolutions see them, attention does not
_CLIP_FRAMES = 2500  # the published processing cuts audio into 25 s

#: What the published processing writes for a conversation.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|BOT|>{{ 'human' if message['role'] == 'user' else message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'audio' %}<audio_start><audio_patch><audio_end>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|EOT|>{% endfor %}"
    "{% if add_generation_prompt %}<|BOT|>assistant\n{% endif %}"
)

_SPELLING = {
    "positions": "positional_embedding.weight",
    "layers": "blocks",
    "query": "attn.query",
    "key": "attn.key",
    "value": "attn.value",
    "out": "attn.out",
    "attention_norm": "attn_ln",
    "mlp_in": "mlp.0",
    "mlp_out": "mlp.2",
    "mlp_norm": "mlp_ln",
    "final_norm": "after_norm",
}


class StepAudio2Config(PretrainedConfig):
    """What config.json says, so that transformers can read it without remote code."""

    model_type = "step_audio_2"

    def __init__(
        self, audio_encoder_config: dict[str, Any] | None = None, text_config: dict[str, Any] | None = None, **fields: Any
    ) -> None:
        self.audio_encoder_config = audio_encoder_config or {}
        self.text_config = Qwen2Config(**{key: value for key, value in (text_config or {}).items() if key != "model_type"})
        super().__init__(**fields)


AutoConfig.register(StepAudio2Config.model_type, StepAudio2Config)


def architecture(config: PretrainedConfig) -> Architecture:
    """Sizes of a Step-Audio 2 checkpoint from its configuration.

    Raises:
        CordError: a setting under which the model would compute something else.
        AttributeError: a size is missing.
    """
    audio = SimpleNamespace(**config.audio_encoder_config)
    encoder = EncoderArchitecture(
        num_mels=audio.n_mels,
        hidden_size=audio.n_audio_state,
        num_layers=audio.n_audio_layer,
        num_heads=audio.n_audio_head,
        ffn_hidden_size=4 * audio.n_audio_state,
        max_positions=audio.n_audio_ctx,
        tail_frames=_TAIL_FRAMES,
        clip_frames=min(_CLIP_FRAMES, 2 * audio.n_audio_ctx - _TAIL_FRAMES),
    )
    adapter = AdapterArchitecture(
        "convolution", _ADAPTER_HIDDEN_SIZE, stride=audio.adapter_stride, kernel_size=audio.kernel_size, activation="relu"
    )
    return Architecture(
        model_type="step_audio_2",
        encoder=encoder,
        language=decoder_architecture(config.text_config, qkv_bias=True, where="text_config."),
        audio_token_id=getattr(config, "audio_token_id", _AUDIO_TOKEN_ID),
        adapter=adapter,
    )


def canonical_name(name: str) -> str:
    """The name as published; there is one spelling."""
    return name


def tensor_map(arch: Architecture) -> TensorMap:
    """Published names against Megatron names and layouts, for the whole model."""
    assert arch.encoder is not None
    adapter = [rule for part in ("conv", "linear1", "linear2") for rule in pair(f"adapter.{part}", f"adapter.{part}")]
    return TensorMap(
        [*encoder_rules(arch.encoder, "encoder", _SPELLING), *adapter, *decoder_rules(arch.language, "model", "lm_head.weight")]
    )
