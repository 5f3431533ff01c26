"""Megatron's transformer configuration and layer specification for both towers, from an architecture and a layout."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_cord.errors import CordError
from megatron_cord.model.architecture import EncoderArchitecture, LanguageArchitecture
from megatron_cord.model.config import LayerConfig
from megatron_cord.model.layers.attention import SdpaAttention
from megatron_cord.model.layers.fusions import Fusions
from megatron_cord.model.layers.rotary import softmax_scale
from megatron_cord.parallel import portability
from megatron_cord.parallel.layout import ParallelConfig


def uses_transformer_engine(layers: LayerConfig) -> bool:
    """Return whether the layers are transformer-engine's.

    Raises:
        CordError: the configuration demands them and they cannot be used here.
    """
    present = portability.has_transformer_engine()
    if layers.implementation == "transformer_engine" and not present:
        raise CordError(
            "model.layers=transformer_engine: it is not installed here, or there is no GPU; "
            "install the extra 'gpu', or set auto or torch"
        )
    return present and layers.implementation != "torch"


def choose_fusions(layers: LayerConfig) -> Fusions:
    """Return the fused kernels of layers on this process's device. Raises as ``uses_transformer_engine``."""
    return Fusions(portability.has_cuda(), uses_transformer_engine(layers))


def accumulate_into_main_grad(model: torch.nn.Module, layers: LayerConfig) -> None:
    """Let transformer-engine's matrices add their gradients to the ``main_grad`` that DDP has given their weights.

    Their backward pass then marks a weight by ``grad_added_to_main_grad``, as the loss does for the output weight.
    Without DDP they would fail, so they are not built with it; and Megatron's configuration keeps the fusion off,
    because its output layer would demand apex's extension for a product that the loss makes here. Frozen weights, which
    have no ``main_grad``, get no gradient.
    """
    if choose_fusions(layers).gradient_accumulation:
        modules: Iterable[Any] = model.modules()
        for module in modules:
            if hasattr(module, "fuse_wgrad_accumulation"):
                module.fuse_wgrad_accumulation = True


def _common(parallel: ParallelConfig, dtype: torch.dtype, fusions: Fusions) -> dict[str, object]:
    """Return the settings that both towers share."""
    return {
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
        "use_cpu_initialization": not portability.has_cuda(),
        "masked_softmax_fusion": False,
        "bias_dropout_fusion": fusions.bias_residual,
        "gradient_accumulation_fusion": False,  # see accumulate_into_main_grad
    }


def encoder_config(
    arch: EncoderArchitecture, parallel: ParallelConfig, dtype: torch.dtype, layers: LayerConfig
) -> TransformerConfig:
    """Configure Whisper's layers: pre-LayerNorm, biases, exact GELU; split neither over stages nor sequences."""
    return TransformerConfig(
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        num_attention_heads=arch.num_heads,
        ffn_hidden_size=arch.ffn_hidden_size,
        normalization="LayerNorm",
        layernorm_epsilon=1e-5,
        activation_func=torch.nn.functional.gelu,
        add_bias_linear=True,
        bias_activation_fusion=False,
        **layers.recomputation("audio_encoder"),
        **_common(parallel, dtype, choose_fusions(layers)),
    )


def language_config(
    arch: LanguageArchitecture, parallel: ParallelConfig, dtype: torch.dtype, layers: LayerConfig
) -> TransformerConfig:
    """Configure a Llama-like decoder: RMSNorm, SwiGLU, grouped-query attention; biases on the fused qkv, or QK norm."""
    fusions = choose_fusions(layers)
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
        qk_layernorm=arch.qk_norm,
        softmax_scale=softmax_scale(arch),
        pipeline_model_parallel_size=parallel.pp,
        context_parallel_size=parallel.cp,
        # Batches differ in length, so stages exchange shapes; Megatron ties that to this dispatcher, experts or not.
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        **_experts_config(arch, parallel, grouped=fusions.grouped_experts and layers.grouped_experts),
        calculate_per_token_loss=True,  # the loss is already normalised by global counts and not divided again
        bias_activation_fusion=fusions.swiglu,
        apply_rope_fusion=fusions.rope,
        **layers.recomputation("language_model", experts=arch.experts is not None),
        **_common(parallel, dtype, fusions),
    )


def _experts_config(arch: LanguageArchitecture, parallel: ParallelConfig, *, grouped: bool) -> dict[str, object]:
    """Return the settings of a mixture of experts. Routers compute in fp32.

    Whole experts are dealt to ranks; one that is shared by all tokens is cut as an MLP.
    """
    if arch.experts is None:
        return {}
    return {
        "num_moe_experts": arch.experts.count,
        "moe_ffn_hidden_size": arch.ffn_hidden_size,
        "moe_router_topk": arch.experts.per_token,
        "moe_router_pre_softmax": not arch.experts.normalized,  # softmax over all, else over those that are chosen
        "moe_router_dtype": "fp32",
        "moe_grouped_gemm": grouped,
        "moe_router_load_balancing_type": "none",  # the loss that balances is `experts.py`'s
        "expert_model_parallel_size": parallel.ep,
        "expert_tensor_parallel_size": 1,
        "moe_shared_expert_intermediate_size": arch.experts.shared_ffn_hidden_size or None,
        "moe_shared_expert_gate": arch.experts.shared_ffn_hidden_size > 0,
    }


class Norm:
    """torch's own RMSNorm or LayerNorm under the arguments that Megatron gives to a norm.

    Under sequence parallelism each rank's norm gets a slice of the tokens; its parameters are marked, so that Megatron
    sums their gradients over the tensor-parallel ranks.
    """

    def __new__(  # type: ignore[misc]
        cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any
    ) -> torch.nn.Module:
        """Build the norm that the configuration names."""
        kind = torch.nn.RMSNorm if config.normalization == "RMSNorm" else torch.nn.LayerNorm
        norm = kind(hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm


def block_spec(
    config: TransformerConfig, mask: AttnMaskType, layers: LayerConfig, num_layers: int
) -> TransformerBlockSubmodules:
    """Specify this rank's layers: Megatron's tensor-parallel ones with torch's attention, or transformer-engine's.

    Args:
        config: of the tower.
        mask: causal; or padding, for packed sequences without a mask.
        layers: the implementation.
        num_layers: of this rank.
    """
    make_layer = _transformer_engine_layer if uses_transformer_engine(layers) else _torch_layer
    layer, norm = make_layer(config)
    attention = replace(layer.submodules.self_attention, params={"attn_mask_type": mask})
    layer = replace(layer, submodules=replace(layer.submodules, self_attention=attention))
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=norm)


def _torch_layer(config: TransformerConfig) -> tuple[ModuleSpec, type]:
    """Return the specification of a layer and the norm after the last one; norms are modules of their own."""
    spec = get_gpt_layer_local_spec(
        normalization=config.normalization, qk_layernorm=config.qk_layernorm, num_experts=config.num_moe_experts
    )
    attention = spec.submodules.self_attention
    parts = replace(attention.submodules, core_attention=SdpaAttention)
    if config.qk_layernorm:
        parts = replace(parts, q_layernorm=Norm, k_layernorm=Norm)
    attention = replace(attention, submodules=parts)
    names = dict(spec.submodules.sharded_state_dict_keys_map)
    if config.num_moe_experts:  # transformer-engine has no norm inside experts, so the one before them keeps its name
        names.pop("pre_mlp_layernorm.", None)
    return replace(
        spec,
        submodules=replace(
            spec.submodules,
            self_attention=attention,
            input_layernorm=Norm,
            pre_mlp_layernorm=Norm,
            sharded_state_dict_keys_map=names,
        ),
    ), Norm


def _transformer_engine_layer(config: TransformerConfig) -> tuple[ModuleSpec, type]:
    """Return the same of transformer-engine.

    A norm before a column-parallel matrix is part of that matrix, under names that `megatron_cord.convert` maps back.
    """
    from megatron.core.extensions.transformer_engine import TENorm

    spec = get_gpt_layer_with_transformer_engine_spec(
        qk_layernorm=config.qk_layernorm,
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=config.moe_grouped_gemm,
    )
    return spec, TENorm
