"""Qwen2-Audio (Chu et al. 2024): Whisper's encoder, average pooling by two, one linear projection, a Qwen2 language model."""

from __future__ import annotations

from transformers import PretrainedConfig

from megatron_cord.errors import CordError
from megatron_cord.model.architecture import Architecture, EncoderArchitecture, LanguageArchitecture
from megatron_cord.model.layouts import Column, GateUp, Qkv, Replicated, Row, Vocabulary
from megatron_cord.model.tensor_map import TensorMap, TensorRule


def architecture(config: PretrainedConfig) -> Architecture:
    """Sizes of a Qwen2-Audio checkpoint from its Hugging Face configuration.

    Raises:
        CordError: a setting under which the model would compute something else.
    """
    audio, text = config.audio_config, config.text_config
    _check_supported(audio, text)
    heads = text.num_attention_heads
    return Architecture(
        model_type="qwen2_audio",
        encoder=EncoderArchitecture(
            num_mels=audio.num_mel_bins,
            hidden_size=audio.d_model,
            num_layers=audio.encoder_layers,
            num_heads=audio.encoder_attention_heads,
            ffn_hidden_size=audio.encoder_ffn_dim,
            max_positions=audio.max_source_positions,
        ),
        language=LanguageArchitecture(
            hidden_size=text.hidden_size,
            num_layers=text.num_hidden_layers,
            num_heads=heads,
            num_kv_heads=text.num_key_value_heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
            ffn_hidden_size=text.intermediate_size,
            vocab_size=text.vocab_size,
            max_positions=text.max_position_embeddings,
            rope_theta=float(text.rope_parameters["rope_theta"]),
            norm_epsilon=text.rms_norm_eps,
            qkv_bias=True,
            tied_embeddings=bool(text.tie_word_embeddings),
        ),
        audio_token_id=config.audio_token_id,
    )


def _check_supported(audio: PretrainedConfig, text: PretrainedConfig) -> None:
    settings: dict[str, tuple[object, object]] = {"text_config.model_type": (text.model_type, "qwen2")}
    if text.model_type == "qwen2":  # others may lack the fields
        settings |= {
            "text_config.hidden_act": (text.hidden_act, "silu"),
            "text_config.use_sliding_window": (text.use_sliding_window, False),
            "text_config.rope_parameters.rope_type": (text.rope_parameters.get("rope_type", "default"), "default"),
            "audio_config.activation_function": (audio.activation_function, "gelu"),
        }
    for name, (given, supported) in settings.items():
        if given != supported:
            raise CordError(f"{name} is {given!r}, but only {supported!r} is supported; use another checkpoint")


def canonical_name(name: str) -> str:
    """The name as published; transformers 5 writes the language model one level deeper."""
    return name.replace("language_model.model.model.", "language_model.model.", 1)


def tensor_map(arch: Architecture) -> TensorMap:
    """Hugging Face names against Megatron names and layouts, for the whole model."""
    assert arch.encoder is not None
    return TensorMap([*_encoder_rules(arch.encoder), *_language_rules(arch.language)])


def _encoder_rules(enc: EncoderArchitecture) -> list[TensorRule]:
    tower, mega = "audio_tower", "audio_encoder"
    qkv = Qkv(enc.num_heads, enc.num_heads, enc.hidden_size // enc.num_heads)
    rules = []
    for conv in ("conv1", "conv2"):
        for part in ("weight", "bias"):
            rules.append(TensorRule(f"{mega}.{conv}.{part}", (f"{tower}.{conv}.{part}",), Replicated()))
    rules.append(TensorRule(f"{mega}.embed_positions", (f"{tower}.embed_positions.weight",), Replicated()))
    for i in range(enc.num_layers):
        hf, mg = f"{tower}.layers.{i}", f"{mega}.block.layers.{i}"
        attention = f"{hf}.self_attn"
        rules += [
            TensorRule(f"{mg}.self_attention.linear_qkv.weight", tuple(f"{attention}.{p}_proj.weight" for p in "qkv"), qkv),
            # Whisper's keys have no bias; in the fused tensor it stays zero (see AudioEncoder).
            TensorRule(f"{mg}.self_attention.linear_qkv.bias", (f"{attention}.q_proj.bias", None, f"{attention}.v_proj.bias"), qkv),
            TensorRule(f"{mg}.self_attention.linear_proj.weight", (f"{attention}.out_proj.weight",), Row()),
            TensorRule(f"{mg}.self_attention.linear_proj.bias", (f"{attention}.out_proj.bias",), Replicated()),
            TensorRule(f"{mg}.mlp.linear_fc1.weight", (f"{hf}.fc1.weight",), Column()),
            TensorRule(f"{mg}.mlp.linear_fc1.bias", (f"{hf}.fc1.bias",), Column()),
            TensorRule(f"{mg}.mlp.linear_fc2.weight", (f"{hf}.fc2.weight",), Row()),
            TensorRule(f"{mg}.mlp.linear_fc2.bias", (f"{hf}.fc2.bias",), Replicated()),
        ]
        for part in ("weight", "bias"):
            rules.append(TensorRule(f"{mg}.input_layernorm.{part}", (f"{hf}.self_attn_layer_norm.{part}",), Replicated()))
            rules.append(TensorRule(f"{mg}.pre_mlp_layernorm.{part}", (f"{hf}.final_layer_norm.{part}",), Replicated()))
    for part in ("weight", "bias"):
        rules.append(TensorRule(f"{mega}.layer_norm.{part}", (f"{tower}.layer_norm.{part}",), Replicated()))
        rules.append(TensorRule(f"adapter.linear.{part}", (f"multi_modal_projector.linear.{part}",), Replicated()))
    return rules


def _language_rules(lm: LanguageArchitecture) -> list[TensorRule]:
    hf_root, mega = "language_model.model", "language_model"
    qkv = Qkv(lm.num_heads, lm.num_kv_heads, lm.head_dim)
    rules = [TensorRule(f"{mega}.embedding.word_embeddings.weight", (f"{hf_root}.embed_tokens.weight",), Vocabulary(lm.vocab_size))]
    for i in range(lm.num_layers):
        hf, mg = f"{hf_root}.layers.{i}", f"{mega}.decoder.layers.{i}"
        rules += [
            TensorRule(f"{mg}.input_layernorm.weight", (f"{hf}.input_layernorm.weight",), Replicated()),
            TensorRule(f"{mg}.self_attention.linear_qkv.weight", tuple(f"{hf}.self_attn.{p}_proj.weight" for p in "qkv"), qkv),
            TensorRule(f"{mg}.self_attention.linear_proj.weight", (f"{hf}.self_attn.o_proj.weight",), Row()),
            TensorRule(f"{mg}.pre_mlp_layernorm.weight", (f"{hf}.post_attention_layernorm.weight",), Replicated()),
            TensorRule(f"{mg}.mlp.linear_fc1.weight", (f"{hf}.mlp.gate_proj.weight", f"{hf}.mlp.up_proj.weight"), GateUp()),
            TensorRule(f"{mg}.mlp.linear_fc2.weight", (f"{hf}.mlp.down_proj.weight",), Row()),
        ]
        if lm.qkv_bias:
            rules.append(TensorRule(f"{mg}.self_attention.linear_qkv.bias", tuple(f"{hf}.self_attn.{p}_proj.bias" for p in "qkv"), qkv))
    rules.append(TensorRule(f"{mega}.decoder.final_layernorm.weight", (f"{hf_root}.norm.weight",), Replicated()))
    if not lm.tied_embeddings:
        rules.append(TensorRule(f"{mega}.output_layer.weight", ("language_model.lm_head.weight",), Vocabulary(lm.vocab_size)))
    return rules
