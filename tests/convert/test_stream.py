"""Tensors into the model and out again: bit-identical in every layout, and all that does not fit listed at once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_cord.convert import export_tensors, import_tensors, read_tensors
from megatron_cord.convert.names import global_parameters, tensor_map_of
from megatron_cord.errors import CordError
from megatron_cord.model.lalm import LALM
from megatron_cord.parallel.layout import Layout, ParallelConfig, finalize, initialize
from tests.model.reference import FOUR_RANKS, build, on_four_ranks, published_tensors
from tests.model.test_architecture import ARCHITECTURE


@pytest.fixture(scope="module")
def layout() -> Iterator[Layout]:
    yield initialize(ParallelConfig(), seed=0)
    finalize()


@pytest.fixture
def model(layout: Layout) -> LALM:
    """Its weights are set to a value that no checkpoint has."""
    model = LALM(ARCHITECTURE, layout, torch.float32)
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)
    return model


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return published_tensors(build(tied=False))


def same(given: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return given.keys() == wanted.keys() and all(
        given[n].dtype == t.dtype and torch.equal(given[n], t) for n, t in wanted.items()
    )


@pytest.mark.parametrize("name", list(FOUR_RANKS))
def test_round_trip_on_four_ranks(name: str) -> None:
    """Catches a tensor that another layout, tying or a vocabulary that does not divide changes, on any rank."""
    assert [outcome.changed_by_round_trip for outcome in on_four_ranks()[name]] == [[]] * 4


def test_round_trip_alone(model: LALM, tensors: dict[str, Tensor]) -> None:
    """Catches the same on one rank, and a dependence on the order of tensors."""
    import_tensors(model, reversed(tensors.items()))
    assert same(dict(export_tensors(model)), tensors)


def test_round_trip_in_bfloat16(layout: Layout, tensors: dict[str, Tensor]) -> None:
    """Catches a detour through another precision."""
    model = LALM(ARCHITECTURE, layout, torch.bfloat16)
    rounded = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    import_tensors(model, rounded.items())
    assert same(dict(export_tensors(model)), rounded)


def test_every_parameter_has_a_rule(model: LALM) -> None:
    """Catches a parameter that neither import nor export covers."""
    assert global_parameters(model).keys() == tensor_map_of(model).by_megatron_name.keys()


def test_transformers_own_spelling(tmp_path: Path, model: LALM, tensors: dict[str, Tensor]) -> None:
    """Catches names that this transformers version writes and that differ from the published ones."""
    build(tied=False).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert {name for name, _ in read_tensors(tmp_path)} != tensors.keys()
    import_tensors(model, read_tensors(tmp_path))
    assert same(dict(export_tensors(model)), tensors)


def test_selection(model: LALM, tensors: dict[str, Tensor]) -> None:
    """Catches frozen tensors that are exchanged nevertheless, or trained ones that are not."""
    import_tensors(model, tensors.items())
    assert model.audio_encoder is not None
    model.audio_encoder.requires_grad_(False)
    exported = dict(export_tensors(model, select=lambda parameter: parameter.requires_grad))
    assert exported.keys() == {name for name in tensors if not name.startswith("audio_tower.")}


def test_all_problems_at_once(model: LALM, tensors: dict[str, Tensor]) -> None:
    """Catches an import that stops at the first problem, and a vocabulary, gate or head that is truncated to fit."""
    layer = "language_model.model.layers.1"
    head, vocabulary = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
    gate, up = f"{layer}.mlp.gate_proj.weight", f"{layer}.mlp.up_proj.weight"
    key = "audio_tower.layers.0.self_attn.k_proj.weight"
    given = dict(tensors)
    del given[f"{layer}.input_layernorm.weight"]
    given |= {head: tensors[head][:-1], vocabulary: torch.cat([tensors[vocabulary], tensors[vocabulary][:3]])}
    given |= {gate: tensors[gate][:-2], up: torch.cat([tensors[up], tensors[up][:2]])}  # as many rows together
    given |= {key: tensors[key].reshape(48, 12)}
    extra = [(f"{layer}.input_layernorm.weights", torch.zeros(48)), ("something.else", torch.zeros(1))]
    twice = [
        (f"{layer.replace('.model.', '.model.model.')}.mlp.down_proj.weight", tensors[f"{layer}.mlp.down_proj.weight"])
    ]
    with pytest.raises(CordError) as caught:
        import_tensors(model, [*given.items(), *extra, *twice])
    message = str(caught.value)
    for words in [
        "(9 problems)",
        f"missing tensor {layer}.input_layernorm.weight",
        f"unexpected tensor {layer}.input_layernorm.weights (nearest expected: {layer}.input_layernorm.weight)",
        "unexpected tensor something.else",
        f"tensor {twice[0][0]} occurs twice",
        f"tensor {head} has shape [100, 48], expected [101, 48]",
        f"tensor {vocabulary} has shape [104, 48], expected [101, 48]",
        f"tensor {gate} has shape [38, 48], expected [40, 48]",
        f"tensor {up} has shape [42, 48], expected [40, 48]",
        f"tensor {key} has shape [48, 12], expected [24, 24]",
    ]:
        assert words in message
    assert "\n" not in message


def test_names_under_another_prefix(model: LALM, tensors: dict[str, Tensor]) -> None:
    """Catches a nearest name that is another layer's or another part's where every name is wrong in the same way."""
    with pytest.raises(CordError) as caught:
        import_tensors(model, ((f"thinker.{name}", tensor) for name, tensor in tensors.items()))
    for name in tensors:
        assert f"unexpected tensor thinker.{name} (nearest expected: {name})" in str(caught.value)
        assert f"missing tensor {name}" in str(caught.value)
