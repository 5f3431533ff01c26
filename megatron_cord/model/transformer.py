"""Megatron's transformer configuration and layer specification for our two towers, from an architecture and a layout."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_cord.model.architecture import EncoderArchitecture, LanguageArchitecture
from megatron_cord.model.attention import SdpaAttention
from megatron_cord.parallel import portability
from megatron_cord.parallel.layout import ParallelConfig


def _common(parallel: ParallelConfig, dtype: torch.dtype, recompute: bool) -> dict[str, object]:
    """What both towers share; fusions that need CUDA kernels follow the device."""
    cuda = portability.has_cuda()
    every_layer = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return {
        **(every_layer if recompute else {}),
        "tensor_model_parallel_size": parallel.tp,
        "sequence_parallel": parallel.sequence_parallel,
        "params_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "pipeline_dtype": dtype,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "attention_softmax_in_fp32": True,
        # Every weight comes from a checkpoint; initialising them first would cost time and random numbers.
        "perform_initialization": False,
        "use_cpu_initialization": not cuda,
        "masked_softmax_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        # Fused weight-gradient accumulation is an apex kernel that writes into main_grad.
        "gradient_accumulation_fusion": False,
    }


def encoder_config(
    arch: EncoderArchitecture, parallel: ParallelConfig, dtype: torch.dtype, *, recompute: bool = False
) -> TransformerConfig:
    """Whisper's layers: pre-LayerNorm, biases, exact GELU; never cut over stages or context-parallel ranks."""
    return TransformerConfig(
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        num_attention_heads=arch.num_heads,
        ffn_hidden_size=arch.ffn_hidden_size,
        normalization="LayerNorm",
        layernorm_epsilon=1e-5,
        activation_func=torch.nn.functional.gelu,
        add_bias_linear=True,
        **_common(parallel, dtype, recompute),  # type: ignore[arg-type]
    )


def language_config(
    arch: LanguageArchitecture, parallel: ParallelConfig, dtype: torch.dtype, *, recompute: bool = False
) -> TransformerConfig:
    """A Llama-like decoder: RMSNorm, SwiGLU, grouped-query attention, optional biases on the fused qkv."""
    return TransformerConfig(
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        num_attention_heads=arch.num_heads,
        num_query_groups=arch.num_kv_heads,
        kv_channels=arch.head_dim,
        ffn_hidden_size=arch.ffn_hidden_size,
        normalization="RMSNorm",
        layernorm_epsilon=arch.norm_epsilon,
        activation_func=torch.nn.functional.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        add_qkv_bias=arch.qkv_bias,
        pipeline_model_parallel_size=parallel.pp,
        context_parallel_size=parallel.cp,
        # Batches differ in length, so stages tell each other the shape; Megatron ties that to this dispatcher even without experts.
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        calculate_per_token_loss=True,  # the loss arrives normalised by global counts; nobody divides it again
        **_common(parallel, dtype, recompute),  # type: ignore[arg-type]
    )


class Norm:
    """torch's own RMSNorm or LayerNorm under the arguments that Megatron gives to a norm.

    Under sequence parallelism each rank's norm sees a slice of the tokens; its parameters are marked, so that Megatron sums their
    gradients over the tensor-parallel ranks.
    """

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> torch.nn.Module:  # type: ignore[misc]
        kind = torch.nn.RMSNorm if config.normalization == "RMSNorm" else torch.nn.LayerNorm
        norm = kind(hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm


def block_spec(config: TransformerConfig, *, causal: bool, pp_rank: int = 0) -> TransformerBlockSubmodules:
    """This stage's layers: Megatron's own tensor-parallel ones, with our core attention and norm."""
    spec = get_gpt_layer_local_spec(normalization=config.normalization)
    attention = spec.submodules.self_attention
    attention = replace(
        attention,
        params={"attn_mask_type": AttnMaskType.causal if causal else AttnMaskType.padding},
        submodules=replace(attention.submodules, core_attention=SdpaAttention),
    )
    layer = replace(spec, submodules=replace(spec.submodules, self_attention=attention, input_layernorm=Norm, pre_mlp_layernorm=Norm))
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config, pp_rank=pp_rank), layer_norm=Norm)
