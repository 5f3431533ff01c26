"""What families share beside `decoder.py`: Whisper's encoder in configurations and in checkpoints, refused settings.

A family passes the prefix under which its checkpoints keep the encoder, and its own spelling where it departs from
Hugging Face's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_cord.errors import CordError
from megatron_cord.model.architecture import EncoderArchitecture
from megatron_cord.model.tensor_layouts import Column, Qkv, Replicated, Row
from megatron_cord.model.tensor_map import TensorRule

#: The parts of an encoder as Hugging Face's Whisper-like models spell them; those of a layer after its number.
WHISPER_SPELLING = {
    "positions": "embed_positions.weight",
    "layers": "layers",
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "out": "self_attn.out_proj",
    "attention_norm": "self_attn_layer_norm",
    "mlp_in": "fc1",
    "mlp_out": "fc2",
    "mlp_norm": "final_layer_norm",
    "final_norm": "layer_norm",
}


def require(settings: Mapping[str, tuple[object, object]]) -> None:
    """Refuse settings under which the model would compute something else.

    Args:
        settings: by name, the given value and the only one that is supported.

    Raises:
        CordError: naming the first that differs.
    """
    for name, (given, supported) in settings.items():
        if given != supported:
            raise CordError(f"{name} is {given!r}, but only {supported!r} is supported; use another checkpoint")


def whisper_encoder(audio: Any, **differences: Any) -> EncoderArchitecture:
    """Return the sizes of an encoder from a configuration with Whisper's names.

    Args:
        audio: the configuration of the encoder.
        differences: other fields of `EncoderArchitecture`, where they are not its defaults.
    """
    return EncoderArchitecture(
        num_mels=audio.num_mel_bins,
        hidden_size=audio.d_model,
        num_layers=audio.encoder_layers,
        num_heads=audio.encoder_attention_heads,
        ffn_hidden_size=audio.encoder_ffn_dim,
        max_positions=audio.max_source_positions,
        **differences,
    )


def encoder_rules(enc: EncoderArchitecture, tower: str, spelling: Mapping[str, str] | None = None) -> list[TensorRule]:
    """Return the rules of the encoder's tensors.

    Args:
        enc: its sizes.
        tower: the prefix of its names.
        spelling: as `WHISPER_SPELLING`, which is the default.
    """
    mega, spelled = "audio_encoder", spelling or WHISPER_SPELLING
    qkv = Qkv(enc.num_heads, enc.num_heads, enc.hidden_size // enc.num_heads)
    if enc.chunks is not None and not enc.chunks.channels:
        rules = [rule for conv in ("conv1", "conv2") for rule in pair(f"{mega}.stem.{conv}", f"{tower}.{conv}")]
    elif enc.chunks is not None:
        rules = [rule for i in (1, 2, 3) for rule in pair(f"{mega}.stem.conv{i}", f"{tower}.conv2d{i}")]
        rules += pair(f"{mega}.stem.projection", f"{tower}.conv_out", bias=False)
    else:
        rules = [rule for conv in ("conv1", "conv2") for rule in pair(f"{mega}.{conv}", f"{tower}.{conv}")]
        rules.append(TensorRule(f"{mega}.embed_positions", (f"{tower}.{spelled['positions']}",), Replicated()))
    for i in range(enc.num_layers):
        hf, mg = f"{tower}.{spelled['layers']}.{i}", f"{mega}.block.layers.{i}"
        query, key, value, out = (f"{hf}.{spelled[part]}" for part in ("query", "key", "value", "out"))
        rules += [
            TensorRule(
                f"{mg}.self_attention.linear_qkv.weight", tuple(f"{name}.weight" for name in (query, key, value)), qkv
            ),
            # Whisper's keys have no bias; in the fused tensor it stays zero (see AudioEncoder).
            TensorRule(
                f"{mg}.self_attention.linear_qkv.bias",
                (f"{query}.bias", f"{key}.bias" if enc.key_bias else None, f"{value}.bias"),
                qkv,
            ),
            TensorRule(f"{mg}.self_attention.linear_proj.weight", (f"{out}.weight",), Row()),
            TensorRule(f"{mg}.self_attention.linear_proj.bias", (f"{out}.bias",), Replicated()),
            TensorRule(f"{mg}.mlp.linear_fc1.weight", (f"{hf}.{spelled['mlp_in']}.weight",), Column()),
            TensorRule(f"{mg}.mlp.linear_fc1.bias", (f"{hf}.{spelled['mlp_in']}.bias",), Column()),
            TensorRule(f"{mg}.mlp.linear_fc2.weight", (f"{hf}.{spelled['mlp_out']}.weight",), Row()),
            TensorRule(f"{mg}.mlp.linear_fc2.bias", (f"{hf}.{spelled['mlp_out']}.bias",), Replicated()),
            *pair(f"{mg}.input_layernorm", f"{hf}.{spelled['attention_norm']}"),
            *pair(f"{mg}.pre_mlp_layernorm", f"{hf}.{spelled['mlp_norm']}"),
        ]
    return rules + pair(f"{mega}.layer_norm", f"{tower}.{spelled['final_norm']}")


def pair(megatron: str, hf: str, *, bias: bool = True) -> list[TensorRule]:
    """Return the rules of a weight and its bias that every rank holds whole."""
    return [
        TensorRule(f"{megatron}.{part}", (f"{hf}.{part}",), Replicated())
        for part in (("weight", "bias") if bias else ("weight",))
    ]
