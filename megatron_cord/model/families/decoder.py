"""The language model that families share, Llama's decoder and its relatives, in configurations and in checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_cord.model.architecture import ExpertsArchitecture, LanguageArchitecture, RopeScaling
from megatron_cord.model.families.parts import require
from megatron_cord.model.tensor_layouts import GateUp, Qkv, Replicated, Row, Stacked, Vocabulary
from megatron_cord.model.tensor_map import TensorRule


@dataclass(frozen=True)
class Decoder:
    """How a model type departs from Llama's decoder."""

    qkv_bias: bool = False  #: query, key and value projections have biases
    qk_norm: bool = False  #: queries and keys are normed
    experts: bool = False  #: a mixture of experts in the place of each MLP
    shared_expert: bool = False  #: beside them one that every token passes


#: The decoders, by model type.
DECODERS = {
    "llama": Decoder(),
    "mistral": Decoder(),
    "qwen2": Decoder(qkv_bias=True),
    "qwen2_moe": Decoder(qkv_bias=True, experts=True, shared_expert=True),
    "qwen3": Decoder(qk_norm=True),
    "qwen3_moe": Decoder(qk_norm=True, experts=True),
    "qwen3_omni_moe_text": Decoder(qk_norm=True, experts=True),
}
DENSE = tuple(name for name, kind in DECODERS.items() if not kind.experts)


def decoder_architecture(config: Any, where: str = "", kinds: Mapping[str, Decoder] = DECODERS) -> LanguageArchitecture:
    """Return the sizes of a decoder from its Hugging Face configuration.

    Args:
        config: of the decoder.
        where: prefix of its settings' names in errors.
        kinds: the decoders that it may be, by model type; by default, those that are text models by themselves too.

    Raises:
        CordError: another model type, or a setting under which the model would compute something else.
    """
    if config.model_type not in kinds:
        require({f"{where}model_type": (config.model_type, " or ".join(kinds))})
    require(
        {
            f"{where}hidden_act": (config.hidden_act, "silu"),
            f"{where}use_sliding_window": (getattr(config, "use_sliding_window", None) or False, False),
            f"{where}sliding_window": (getattr(config, "sliding_window", None) or None, None),
            f"{where}layer_types": (set(getattr(config, "layer_types", None) or ()) - {"full_attention"}, set()),
            f"{where}attention_bias": (getattr(config, "attention_bias", False), False),
            f"{where}mlp_bias": (getattr(config, "mlp_bias", False), False),
        }
    )
    kind = kinds[config.model_type]
    require({f"{where}qkv_bias": (getattr(config, "qkv_bias", kind.qkv_bias), kind.qkv_bias)})
    experts = _experts(config, kind, where) if kind.experts else None
    return LanguageArchitecture(
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        ffn_hidden_size=config.intermediate_size if experts is None else config.moe_intermediate_size,
        vocab_size=config.vocab_size,
        max_positions=config.max_position_embeddings,
        rope_theta=float(config.rope_parameters["rope_theta"]),
        norm_epsilon=config.rms_norm_eps,
        qkv_bias=kind.qkv_bias,
        tied_embeddings=bool(config.tie_word_embeddings),
        qk_norm=kind.qk_norm,
        rope_scaling=_rope_scaling(config.rope_parameters, config.max_position_embeddings, f"{where}rope_parameters."),
        experts=experts,
    )


def _experts(config: Any, kind: Decoder, where: str) -> ExpertsArchitecture:
    """Return the mixture of experts of a configuration; each layer must have one."""
    shared = getattr(config, "shared_expert_intermediate_size", None) or 0
    require(
        {
            f"{where}decoder_sparse_step": (config.decoder_sparse_step, 1),
            f"{where}mlp_only_layers": (list(config.mlp_only_layers), []),
        }
    )
    if not kind.shared_expert:  # transformers' class has none, whatever the configuration says
        require({f"{where}shared_expert_intermediate_size": (shared, 0)})
    return ExpertsArchitecture(config.num_experts, config.num_experts_per_tok, bool(config.norm_topk_prob), shared)


def _rope_scaling(given: Mapping[str, Any], max_positions: int, where: str) -> RopeScaling | None:
    """Return how rotary frequencies are scaled; None if they are not.

    Args:
        given: the configuration's rope_parameters, as transformers completes them.
        max_positions: of the model.
        where: prefix of their names in errors.
    """
    kind = given.get("rope_type", "default")
    require({f"{where}partial_rotary_factor": (given.get("partial_rotary_factor", 1.0), 1.0)})
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling("linear", float(given["factor"]))
    if kind == "llama3":
        return RopeScaling(
            "llama3",
            float(given["factor"]),
            given["original_max_position_embeddings"],
            low_freq_factor=float(given["low_freq_factor"]),
            high_freq_factor=float(given["high_freq_factor"]),
        )
    if kind == "yarn":
        original = given["original_max_position_embeddings"]
        factor = given["factor"] or max_positions / original
        return RopeScaling(
            "yarn",
            float(factor),
            original,
            beta_slow=float(given.get("beta_slow") or 1),
            beta_fast=float(given.get("beta_fast") or 32),
            truncate=bool(given.get("truncate", True)),
            attention_factor=_attention_factor(given, factor),
        )
    require({f"{where}rope_type": (kind, "default, linear, llama3 or yarn")})
    return None


def _attention_factor(given: Mapping[str, Any], factor: float) -> float:
    """Return YaRN's factor of rotated queries and keys: as given, or 0.1 ln(factor) + 1 (its equation 22).

    With mscale and mscale_all_dim the logarithm is multiplied by each, and the first is divided by the second.
    """
    if given.get("attention_factor") is not None:
        return float(given["attention_factor"])

    def grown(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0

    scales = given.get("mscale"), given.get("mscale_all_dim")
    return grown(scales[0]) / grown(scales[1]) if scales[0] and scales[1] else grown(1.0)


def decoder_rules(lm: LanguageArchitecture, root: str, head: str) -> list[TensorRule]:
    """Return the rules of the language model's tensors.

    Args:
        lm: its sizes.
        root: the prefix of all names but the output layer's.
        head: the output layer's name; there is none if embeddings are tied.
    """
    mega, vocabulary = "language_model", Vocabulary(lm.vocab_size)
    rules = [TensorRule(f"{mega}.embedding.word_embeddings.weight", (f"{root}.embed_tokens.weight",), vocabulary)]
    for i in range(lm.num_layers):
        hf, mg = f"{root}.layers.{i}", f"{mega}.decoder.layers.{i}"
        rules += [
            *_attention_rules(lm, hf, mg),
            TensorRule(f"{mg}.pre_mlp_layernorm.weight", (f"{hf}.post_attention_layernorm.weight",), Replicated()),
            *_mlp_rules(lm, f"{hf}.mlp", f"{mg}.mlp"),
        ]
    rules.append(TensorRule(f"{mega}.decoder.final_layernorm.weight", (f"{root}.norm.weight",), Replicated()))
    if not lm.tied_embeddings:
        rules.append(TensorRule(f"{mega}.output_layer.weight", (head,), vocabulary))
    return rules


def _mlp_rules(lm: LanguageArchitecture, hf: str, mg: str) -> list[TensorRule]:
    """Return the rules of a layer's MLP, or of its router and experts; hf and mg are its names."""

    def gate_up(name: str) -> tuple[str, str]:
        return f"{name}.gate_proj.weight", f"{name}.up_proj.weight"

    if lm.experts is None:
        return [
            TensorRule(f"{mg}.linear_fc1.weight", gate_up(hf), GateUp()),
            TensorRule(f"{mg}.linear_fc2.weight", (f"{hf}.down_proj.weight",), Row()),
        ]
    rules = [TensorRule(f"{mg}.router.weight", (f"{hf}.gate.weight",), Replicated())]
    if lm.experts.shared_ffn_hidden_size:
        expert, gate = f"{mg}.shared_experts", (f"{hf}.shared_expert_gate.weight",)
        rules += [
            TensorRule(f"{expert}.linear_fc1.weight", gate_up(f"{hf}.shared_expert"), GateUp()),
            TensorRule(f"{expert}.linear_fc2.weight", (f"{hf}.shared_expert.down_proj.weight",), Row()),
            TensorRule(f"{expert}.gate_weight", gate, Replicated()),
        ]
    for i in range(lm.experts.count):
        expert = f"{mg}.experts.{i}"
        rules += [
            TensorRule(f"{expert}.linear_fc1.weight", gate_up(f"{hf}.experts.{i}"), Stacked()),
            TensorRule(f"{expert}.linear_fc2.weight", (f"{hf}.experts.{i}.down_proj.weight",), Replicated()),
        ]
    return rules


def _attention_rules(lm: LanguageArchitecture, hf: str, mg: str) -> list[TensorRule]:
    """Return the rules of a layer's attention and the norm before it; hf and mg are the layer's names."""
    qkv, fused = Qkv(lm.num_heads, lm.num_kv_heads, lm.head_dim), f"{mg}.self_attention.linear_qkv"
    rules = [
        TensorRule(f"{mg}.input_layernorm.weight", (f"{hf}.input_layernorm.weight",), Replicated()),
        TensorRule(f"{fused}.weight", tuple(f"{hf}.self_attn.{p}_proj.weight" for p in "qkv"), qkv),
        TensorRule(f"{mg}.self_attention.linear_proj.weight", (f"{hf}.self_attn.o_proj.weight",), Row()),
    ]
    if lm.qkv_bias:
        rules.append(TensorRule(f"{fused}.bias", tuple(f"{hf}.self_attn.{p}_proj.bias" for p in "qkv"), qkv))
    if lm.qk_norm:
        rules += [
            TensorRule(f"{mg}.self_attention.{p}_layernorm.weight", (f"{hf}.self_attn.{p}_norm.weight",), Replicated())
            for p in "qk"
        ]
    return rules
