"""Step-Audio 2 mini (Wu et al. 2025): Qwen2-Audio's encoder at 25 Hz, strided convolution and MLP, Qwen2.5-7B.

transformers has no class for it: its code is remote code, which this project does not run. Configuration and names are
those of the published files. A clip is computed as if it were alone in its batch, whatever it is padded to; the
published code lets the padding into the last token of some lengths.
"""

from __future__ import annotations

import math

from transformers import PretrainedConfig

from megatron_cord.model.architecture import AdapterArchitecture, Architecture, EncoderArchitecture
from megatron_cord.model.families.base import Family
from megatron_cord.model.families.decoder import decoder_architecture, decoder_rules
from megatron_cord.model.families.parts import encoder_rules, pair
from megatron_cord.model.families.step_audio_2.audio import ADAPTER_HIDDEN_SIZE, TAIL_FRAMES
from megatron_cord.model.tensor_map import TensorMap

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


def architecture(config: PretrainedConfig) -> Architecture:
    """Return the sizes of a Step-Audio 2 checkpoint from its configuration."""
    audio = config.audio
    encoder = EncoderArchitecture(
        num_mels=audio.n_mels,
        hidden_size=audio.n_audio_state,
        num_layers=audio.n_audio_layer,
        num_heads=audio.n_audio_head,
        ffn_hidden_size=4 * audio.n_audio_state,
        max_positions=audio.n_audio_ctx,
        tail_frames=TAIL_FRAMES,
        clip_frames=config.clip_frames,
    )
    adapter = AdapterArchitecture(
        "convolution",
        ADAPTER_HIDDEN_SIZE,
        stride=audio.adapter_stride,
        kernel_size=audio.kernel_size,
        activation="relu",
    )
    return Architecture(
        model_type="step_audio_2",
        encoder=encoder,
        language=decoder_architecture(config.text_config, where="text_config."),
        audio_token_id=config.placeholder,
        adapter=adapter,
    )


def tensor_map(arch: Architecture) -> TensorMap:
    """Return published names against Megatron names and layouts, for the whole model."""
    assert arch.encoder is not None
    adapter = [rule for part in ("conv", "linear1", "linear2") for rule in pair(f"adapter.{part}", f"adapter.{part}")]
    return TensorMap(
        [
            *encoder_rules(arch.encoder, "encoder", _SPELLING),
            *adapter,
            *decoder_rules(arch.language, "model", "lm_head.weight"),
        ]
    )


FAMILIES = (
    Family(
        "step_audio_2",
        architecture,
        tensor_map,
        plain_class="megatron_cord.model.families.step_audio_2.plain_model.StepAudio2",
        chat_template=CHAT_TEMPLATE,
        sglang_max_clips=math.inf,
        sglang_takes_ids=True,
    ),
)
