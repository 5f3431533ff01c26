"""Names of a rank's parameters in the whole model, and the Hugging Face tensors behind them."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_cord.model.families import family_of
from megatron_cord.model.lalm import LALM
from megatron_cord.model.tensor_map import TensorMap, TensorRule
from megatron_cord.parallel.layout import Layout

#: A norm that is part of the matrix behind it, as in transformer-engine's layers, and the norm of its own in the
#: tables.
_FUSED_NORMS = {
    ".self_attention.linear_qkv.layer_norm_": ".input_layernorm.",
    ".mlp.linear_fc1.layer_norm_": ".pre_mlp_layernorm.",
}


def tensor_map_of(model: LALM) -> TensorMap:
    """Return all tensors of the model's architecture, over all pipeline stages."""
    return family_of(model.arch).tensor_map(model.arch)


def global_parameters(model: LALM) -> dict[str, torch.nn.Parameter]:
    """Return this rank's parameters under their names in the whole model: layers are numbered over all stages.

    With tied embeddings, the last stage's copy has the name of the first stage's original. LoRA is left out.
    """
    added = {id(parameter) for parameter in model.lora.parameters()} if model.lora is not None else set()
    return {
        rename_to_global(model, name): parameter
        for name, parameter in model.named_parameters()
        if id(parameter) not in added
    }


def rename_to_global(model: LALM, name: str) -> str:
    """Return the name in the whole model of one of this rank's parameters."""
    for fused, separate in _FUSED_NORMS.items():
        name = name.replace(fused, separate)
    if model.share_embeddings_and_output_weights and name == "language_model.output_layer.weight":
        return "language_model.embedding.word_embeddings.weight"
    return model.global_name(name)


def hf_shapes(parameter: Tensor, rule: TensorRule, layout: Layout) -> dict[str, torch.Size]:
    """Return the shapes of the Hugging Face tensors that make this rank's shard."""
    shape = list(parameter.shape)
    if rule.layout.shard_dim is not None:
        shape[rule.layout.shard_dim] *= layout.config.tp
    parts = rule.layout.split(torch.empty(shape, device="meta"), layout.config.tp)
    return {name: part.shape for name, part in zip(rule.hf, parts, strict=True) if name is not None}
