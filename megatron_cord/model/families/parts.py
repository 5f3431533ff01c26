"""Parts that families share: Whisper's encoder and a Llama-like decoder, in configurations and in checkpoints.

A family passes the prefixes under which its checkpoints keep these parts, and its own spelling where it departs from
Hugging Face's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_cord.errors import CordError
from megatron_cord.model.architecture import EncoderArchitecture, LanguageArchitecture
from megatron_cord.model.tensor_layouts import Column, GateUp, Qkv, Replicated, Row, Vocabulary
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


def decoder_architecture(config: Any, *, qkv_bias: bool, where: str = "") -> LanguageArchitecture:
    """Return the sizes of a Qwen2 or Llama decoder from its Hugging Face configuration.

    Args:
        config: of the decoder.
        qkv_bias: whether its query, key and value projections have biases.
        where: prefix of its settings' names in errors.

    Raises:
        CordError: a setting under which the model would compute something else.
    """
    require(
        {
            f"{where}hidden_act": (config.hidden_act, "silu"),
            f"{where}use_sliding_window": (getattr(config, "use_sliding_window", None) or False, False),
            f"{where}rope_parameters.rope_type": (config.rope_parameters.get("rope_type", "default"), "default"),
            f"{where}attention_bias": (getattr(config, "attention_bias", False), False),
            f"{where}mlp_bias": (getattr(config, "mlp_bias", False), False),
        }
    )
    return LanguageArchitecture(
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        ffn_hidden_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        max_positions=config.max_position_embeddings,
        rope_theta=float(config.rope_parameters["rope_theta"]),
        norm_epsilon=config.rms_norm_eps,
        qkv_bias=qkv_bias,
        tied_embeddings=bool(config.tie_word_embeddings),
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
            TensorRule(f"{mg}.self_attention.linear_qkv.bias", (f"{query}.bias", None, f"{value}.bias"), qkv),
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


def decoder_rules(lm: LanguageArchitecture, root: str, head: str) -> list[TensorRule]:
    """Return the rules of the language model's tensors.

    Args:
        lm: its sizes.
        root: the prefix of all names but the output layer's.
        head: the output layer's name; there is none if embeddings are tied.
    """
    mega, vocabulary = "language_model", Vocabulary(lm.vocab_size)
    qkv = Qkv(lm.num_heads, lm.num_kv_heads, lm.head_dim)
    rules = [TensorRule(f"{mega}.embedding.word_embeddings.weight", (f"{root}.embed_tokens.weight",), vocabulary)]
    for i in range(lm.num_layers):
        hf, mg = f"{root}.layers.{i}", f"{mega}.decoder.layers.{i}"
        rules += [
            TensorRule(f"{mg}.input_layernorm.weight", (f"{hf}.input_layernorm.weight",), Replicated()),
            TensorRule(
                f"{mg}.self_attention.linear_qkv.weight", tuple(f"{hf}.self_attn.{p}_proj.weight" for p in "qkv"), qkv
            ),
            TensorRule(f"{mg}.self_attention.linear_proj.weight", (f"{hf}.self_attn.o_proj.weight",), Row()),
            TensorRule(f"{mg}.pre_mlp_layernorm.weight", (f"{hf}.post_attention_layernorm.weight",), Replicated()),
            TensorRule(
                f"{mg}.mlp.linear_fc1.weight", (f"{hf}.mlp.gate_proj.weight", f"{hf}.mlp.up_proj.weight"), GateUp()
            ),
            TensorRule(f"{mg}.mlp.linear_fc2.weight", (f"{hf}.mlp.down_proj.weight",), Row()),
        ]
        if lm.qkv_bias:
            rules.append(
                TensorRule(
                    f"{mg}.self_attention.linear_qkv.bias", tuple(f"{hf}.self_attn.{p}_proj.bias" for p in "qkv"), qkv
                )
            )
    rules.append(TensorRule(f"{mega}.decoder.final_layernorm.weight", (f"{root}.norm.weight",), Replicated()))
    if not lm.tied_embeddings:
        rules.append(TensorRule(f"{mega}.output_layer.weight", (head,), vocabulary))
    return rules
