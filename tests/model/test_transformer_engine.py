"""Layers of transformer-engine's shape, with plain classes in the place of its own; its kernels are not tested.

The tests cover the choice of the layer, the masks that the attention is given, and that a norm inside a matrix
has its published name.
"""

from __future__ import annotations

import megatron_cord.parallel  # noqa: F401  # isort: skip (before megatron.core)

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from megatron_cord.convert import export_tensors, import_tensors
from megatron_cord.errors import CordError
from megatron_cord.model import transformer
from megatron_cord.model.config import LayerConfig
from megatron_cord.model.lalm import LALM
from megatron_cord.model.transformer import Norm, uses_transformer_engine
from megatron_cord.parallel import portability
from megatron_cord.parallel.layout import Layout, ParallelConfig, finalize, initialize
from tests.model.ranks import make_batches
from tests.model.test_architecture import ARCHITECTURE

pytestmark = pytest.mark.filterwarnings("ignore:::megatron")


class NormAndColumn(ColumnParallelLinear):  # type: ignore[misc]
    """A column-parallel matrix with the norm before it inside, under transformer-engine's names."""

    def __init__(self, input_size: int, output_size: int, *, config: Any, **options: Any) -> None:
        super().__init__(input_size, output_size, config=config, **options)
        norm: Any = Norm(config, input_size, config.layernorm_epsilon)
        self.layer_norm_weight = norm.weight
        self.layer_norm_bias = getattr(norm, "bias", None)
        self.kind, self.epsilon = type(norm), config.layernorm_epsilon

    def forward(self, input_: Tensor, *arguments: Any, **options: Any) -> Any:
        shape = (input_.shape[-1],)
        if self.kind is torch.nn.RMSNorm:
            normed = torch.nn.functional.rms_norm(input_, shape, self.layer_norm_weight, self.epsilon)
        else:
            normed = torch.nn.functional.layer_norm(
                input_, shape, self.layer_norm_weight, self.layer_norm_bias, self.epsilon
            )
        return super().forward(normed, *arguments, **options)


def fused_layer() -> tuple[ModuleSpec, type]:
    """As `_transformer_engine_layer` gives it, of plain parts."""
    spec, norm = transformer._torch_layer(ARCHITECTURE_CONFIG)
    inner = spec.submodules
    attention = replace(
        inner.self_attention, submodules=replace(inner.self_attention.submodules, linear_qkv=NormAndColumn)
    )
    if isinstance(inner.mlp, partial):  # Megatron-Core 0.19
        mlp: Any = partial(inner.mlp, submodules=replace(inner.mlp.keywords["submodules"], linear_fc1=NormAndColumn))
    else:
        mlp = replace(inner.mlp, submodules=replace(inner.mlp.submodules, linear_fc1=NormAndColumn))
    submodules = replace(
        inner, self_attention=attention, mlp=mlp, input_layernorm=IdentityOp, pre_mlp_layernorm=IdentityOp
    )
    return replace(spec, submodules=replace(submodules, sharded_state_dict_keys_map={})), norm


ARCHITECTURE_CONFIG: Any = type("Config", (), {"normalization": "RMSNorm"})()


@pytest.fixture(scope="module")
def layout() -> Iterator[Layout]:
    yield initialize(ParallelConfig(), seed=0)
    finalize()


def test_norms_inside_matrices(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a norm that is lost, doubled or misnamed between model and published tensors.

    It also catches checkpoints of another shape, and a choice that is not followed.
    """
    plain = LALM(ARCHITECTURE, layout, torch.float32, LayerConfig("torch"))
    generator = torch.Generator().manual_seed(0)
    for parameter in plain.parameters():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    tensors = {name: tensor.clone() for name, tensor in export_tensors(plain)}
    import_tensors(plain, tensors.items())  # zeros where a family has nothing
    monkeypatch.setattr(portability, "has_transformer_engine", lambda: True)
    monkeypatch.setattr(transformer, "_transformer_engine_layer", fused_layer)
    fused = LALM(ARCHITECTURE, layout, torch.float32)
    assert any(name.endswith("linear_qkv.layer_norm_weight") for name, _ in fused.named_parameters())
    import_tensors(fused, tensors.items())
    exported = dict(export_tensors(fused))
    assert exported.keys() == tensors.keys() and all(torch.equal(exported[name], tensors[name]) for name in tensors)
    batch = make_batches()[1].input
    assert torch.allclose(fused(batch), plain(batch), atol=1e-6)

    def keys(model: LALM) -> set[str]:
        return {
            getattr(value, "key", name)
            for name, value in model.sharded_state_dict().items()
            if not name.endswith("_extra_state")
        }

    assert keys(fused) == keys(plain)


def test_masks(layout: Layout) -> None:
    """Catches an attention of type padding without a padding mask: transformer-engine refuses that."""
    model = LALM(ARCHITECTURE, layout, torch.float32)
    assert model.audio_encoder is not None
    assert model.audio_encoder.block.layers[0].self_attention.attn_mask_type == AttnMaskType.padding
    assert model.language_model.decoder.layers[0].self_attention.attn_mask_type == AttnMaskType.causal
    assert ARCHITECTURE.encoder is not None
    silent = LALM(
        replace(ARCHITECTURE, encoder=replace(ARCHITECTURE.encoder, encodes_padding=True)), layout, torch.float32
    )
    assert silent.audio_encoder is not None
    assert silent.audio_encoder.block.layers[0].self_attention.attn_mask_type == AttnMaskType.no_mask


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without CUDA")
def test_it_is_refused_where_it_is_not() -> None:
    """Catches a run that silently trains with other layers than it was told to."""
    with pytest.raises(CordError, match="transformer_engine: it is not installed here"):
        uses_transformer_engine(LayerConfig("transformer_engine"))
    assert not uses_transformer_engine(LayerConfig("auto"))
