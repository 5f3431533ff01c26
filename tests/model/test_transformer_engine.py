"""The choice of transformer-engine's layers and what they are given; `tests/transformer_engine/` runs its own code."""

from __future__ import annotations

import megatron_cord.parallel  # noqa: F401  # isort: skip (before megatron.core)

from collections.abc import Iterator

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType

from megatron_cord.errors import CordError
from megatron_cord.model.config import LayerConfig
from megatron_cord.model.lalm import LALM
from megatron_cord.model.layers.fusions import Fusions
from megatron_cord.model.layers.transformer import choose_fusions, uses_transformer_engine
from megatron_cord.parallel import portability
from megatron_cord.parallel.layout import Layout, ParallelConfig, finalize, initialize
from tests.model.test_architecture import ARCHITECTURE


@pytest.fixture(scope="module")
def layout() -> Iterator[Layout]:
    yield initialize(ParallelConfig(), seed=0)
    finalize()


def test_masks(layout: Layout) -> None:
    """Catches another type than padding for the encoder's packed clips, which transformer-engine refuses."""
    model = LALM(ARCHITECTURE, layout, torch.float32)
    assert model.audio_encoder is not None
    assert model.audio_encoder.block.layers[0].self_attention.attn_mask_type == AttnMaskType.padding
    assert model.language_model.decoder.layers[0].self_attention.attn_mask_type == AttnMaskType.causal


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without CUDA")
def test_it_is_refused_where_it_is_not() -> None:
    """Catches a run that silently trains with other layers than it was told to."""
    with pytest.raises(CordError, match="transformer_engine: it is not installed here"):
        uses_transformer_engine(LayerConfig("transformer_engine"))
    assert not uses_transformer_engine(LayerConfig("auto"))


@pytest.mark.parametrize(
    ("cuda", "engine", "layers", "fused"),
    [
        (False, False, "auto", "nothing"),
        (True, False, "auto", "SwiGLU, bias and residual"),
        (True, True, "torch", "SwiGLU, bias and residual"),
        (True, True, "auto", "SwiGLU, bias and residual, rotary embedding, gradient accumulation"),
    ],
)
def test_fusions_follow_device_and_layers(
    cuda: bool, engine: bool, layers: str, fused: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches kernels that stay unfused on a GPU, or that are chosen where nothing has them."""
    monkeypatch.setattr(portability, "has_cuda", lambda: cuda)
    monkeypatch.setattr(portability, "has_transformer_engine", lambda: engine)
    chosen = choose_fusions(LayerConfig(layers))  # type: ignore[arg-type]
    assert isinstance(chosen, Fusions) and str(chosen) == fused
