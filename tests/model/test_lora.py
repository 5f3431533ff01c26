"""LoRA beside the layers: off it leaves no trace, its branch is its merged weight, and targets are what patterns say.

Gradients on every layout are compared in tests/verify/test_layout.py.
"""

from __future__ import annotations

import megatron_cord.parallel  # noqa: F401  # isort: skip (before megatron.core)

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from megatron_cord.convert import export_tensors, import_tensors, read_into
from megatron_cord.convert.peft.stream import export_adapters
from megatron_cord.errors import CordError
from megatron_cord.model.config import LoraConfig
from megatron_cord.model.families import load_architecture
from megatron_cord.model.lalm import LALM
from megatron_cord.model.layers import transformer
from megatron_cord.model.layers.transformer import Norm
from megatron_cord.model.lora.targets import find_targets
from megatron_cord.parallel.layout import Layout, ParallelConfig, finalize, initialize
from tests.gloo import run_ranks
from tests.model import family_reference
from tests.model.ranks import make_batches
from tests.model.reference import build, save
from tests.model.test_architecture import ARCHITECTURE

CONFIG = LoraConfig(rank=3, alpha=6.0)
LAYOUTS = (ParallelConfig(tp=2), ParallelConfig(tp=2, sequence_parallel=True))


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


def with_norms_inside(spec: ModuleSpec, norm: type) -> tuple[ModuleSpec, type]:
    """Return the specification of a layer with the norms inside, as transformer-engine's has them."""
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


@pytest.fixture
def layout() -> Iterator[Layout]:
    yield initialize(ParallelConfig(), seed=0)
    finalize()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    save(directory, build(tied=False))
    return directory


def randomize(model: LALM) -> None:
    """Give B, which is zero at first, values that do not depend on the layout."""
    assert model.lora is not None
    for name, (parameter, dim) in sorted(model.lora.factors().items()):
        if name.endswith("lora_B"):
            tp, rank = model.layout.config.tp, model.layout.tp_group.rank()
            rows = parameter.shape[0] * (tp if dim == 0 else 1)
            drawn = torch.randn(rows, parameter.shape[1], generator=torch.Generator().manual_seed(len(name)))
            parameter.data.copy_(drawn if dim is None else drawn.chunk(tp)[rank])


def outputs(checkpoint: str, parallel: ParallelConfig, family: str = "qwen2_audio") -> list[Tensor]:
    """Hidden states without LoRA, with it off, with it on, of its merged weights, and of two passes with dropout."""
    layout = initialize(parallel, seed=0)
    arch, batch = load_architecture(checkpoint), make_batches(family)[2].input
    with torch.no_grad():
        plain = LALM(arch, layout, torch.float32)
        read_into(plain, checkpoint)
        given = [plain(batch)]
        model = LALM(arch, layout, torch.float32)
        read_into(model, checkpoint)
        model.add_lora(replace(CONFIG, dropout=0.5), (), seed=0)
        assert model.lora is not None
        model.lora.eval()
        randomize(model)
        with model.lora.disabled():
            given.append(model(batch))
        given.append(model(batch))
        import_tensors(plain, [(name, tensor.clone()) for name, tensor in export_tensors(model)])
        given.append(plain(batch))
        model.lora.train()
        for step in (1, 2):
            model.lora.reseed(step, 0)
            given.append(model(batch))
    return given


def on_rank(_rank: int, checkpoint: str) -> list[list[Tensor]]:
    found = []
    for parallel in LAYOUTS:
        found.append(outputs(checkpoint, parallel))
        parallel_state.destroy_model_parallel()
    return found


def check_outputs(given: list[Tensor]) -> None:
    base, off, on, merged, first, second = given
    assert torch.equal(base, off)
    assert not torch.allclose(on, base, atol=1e-2)
    torch.testing.assert_close(on, merged, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(first, on, atol=1e-2) and not torch.allclose(first, second, atol=1e-2)


def test_off_is_the_base_and_on_is_the_merged_weight(checkpoint: Path, layout: Layout) -> None:
    """Catches a trace of adapters that are off, a part of a fused matrix in another's place, and wrong dropout."""
    check_outputs(outputs(str(checkpoint), layout.config))


def test_the_same_on_two_ranks(checkpoint: Path) -> None:
    """Catches the same under tensor and sequence parallelism, and ranks whose masks of one input differ."""
    ranks = run_ranks(on_rank, 2, str(checkpoint))
    for given in zip(*ranks, strict=True):
        for outcome in given:
            check_outputs(outcome)
        for ours, theirs in zip(*given, strict=True):
            torch.testing.assert_close(ours, theirs)


MIXTURE = "qwen2_moe"  # with a shared expert in each layer


def mixture_on_rank(_rank: int, checkpoint: str) -> list[Tensor]:
    """Compute with experts that two tensor-parallel ranks share out, and a shared one that they split."""
    return outputs(checkpoint, ParallelConfig(tp=2, sequence_parallel=True, ep=2), MIXTURE)


def test_experts(tmp_path: Path, layout: Layout) -> None:
    """Catches the same of experts, each with tokens of its own, some with none, and of one that all tokens pass."""
    family_reference.save(tmp_path, MIXTURE, tied=False)
    alone = outputs(str(tmp_path), layout.config, MIXTURE)
    check_outputs(alone)
    targets = {target.module for target in find_targets(load_architecture(tmp_path), CONFIG, ())}
    layer = "language_model.decoder.layers.1.mlp."
    assert {f"{layer}{name}.linear_fc2" for name in ("experts.0", "experts.3", "shared_experts")} < targets
    assert not any("router" in name or "gate" in name for name in targets)
    for given in run_ranks(mixture_on_rank, 2, str(tmp_path)):
        check_outputs(given)
        for ours, theirs in zip(given[:4], alone[:4], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


class Grouped(torch.nn.Module):
    """Experts whose matrices are one tensor."""


def test_experts_that_cannot_have_it(tmp_path: Path, layout: Layout) -> None:
    """Catches experts that are silently left without LoRA."""
    family_reference.save(tmp_path, MIXTURE, tied=False)
    model = LALM(load_architecture(tmp_path), layout, torch.float32)
    model.language_model.decoder.layers[1].mlp.experts = Grouped()
    with pytest.raises(CordError, match=r"layers.1.mlp.experts is a Grouped, .* model.lora.targets without experts"):
        model.add_lora(CONFIG, (), seed=0)
    model.add_lora(replace(CONFIG, targets=("q_proj",)), (), seed=0)


def test_a_norm_inside_the_matrix(checkpoint: Path, layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches LoRA of transformer-engine's fused layers that takes its input before the norm."""
    batch, found, plain = make_batches()[1].input, [], transformer._torch_layer
    for fused in (False, True):
        if fused:
            monkeypatch.setattr(transformer, "_torch_layer", lambda config: with_norms_inside(*plain(config)))
        model = LALM(load_architecture(checkpoint), layout, torch.float32)
        read_into(model, checkpoint)
        model.add_lora(CONFIG, (), seed=0)
        randomize(model)
        assert any("layer_norm_weight" in name for name, _ in model.named_parameters()) == fused
        found.append(model(batch))
    torch.testing.assert_close(found[0], found[1])


def chosen(config: LoraConfig, *freeze: str) -> set[str]:
    return {part for target in find_targets(ARCHITECTURE, config, freeze) for part in target.parts if part}


def test_targets() -> None:
    """Catches a pattern that takes more or less than it says: whole names, ends, parts of fused matrices, and all."""
    everything = chosen(CONFIG)
    layer, tower = "language_model.model.layers.1.", "audio_tower.layers.0."
    assert {f"{layer}mlp.gate_proj", f"{tower}self_attn.k_proj", "multi_modal_projector.linear"} <= everything
    assert not any("conv" in name or "embed" in name or "head" in name or "norm" in name for name in everything)
    queries = chosen(replace(CONFIG, targets=("q_proj",)))
    assert queries == {name for name in everything if name.endswith("q_proj")}
    assert chosen(replace(CONFIG, targets=("q_proj",)), "audio_encoder") == {n for n in queries if "audio" not in n}
    fused = chosen(replace(CONFIG, targets=("linear_qkv",)))
    assert fused == {name for name in everything if name.endswith(("q_proj", "k_proj", "v_proj"))}
    of_layer = chosen(replace(CONFIG, targets=("*decoder.layers.1.*",)))
    assert of_layer == {name for name in everything if name.startswith(layer)}
    assert chosen(replace(CONFIG, targets=("adapter",))) == {"multi_modal_projector.linear"}
    assert chosen(replace(CONFIG, whole=("language_model", "adapter"))) == {n for n in everything if "audio" in n}


@pytest.mark.parametrize(
    ("config", "freeze", "wrong"),
    [
        (LoraConfig(rank=2, targets=("q_porj",)), (), "'q_porj' matches no matrix .*nearest: .*q_proj"),
        (LoraConfig(rank=2, targets=("embed_tokens",)), (), "matches no matrix that can have LoRA"),
        (LoraConfig(rank=2, targets=("q_proj", "audio_encoder")), ("audio_encoder",), "which model.freeze names"),
        (LoraConfig(rank=2, targets=("adapter",), whole=("adapter",)), (), "which model.lora.whole names"),
        (LoraConfig(rank=2, whole=("language_model",)), ("audio_encoder", "adapter"), "no matrix is left"),
    ],
)
def test_targets_that_are_nothing(config: LoraConfig, freeze: tuple[str, ...], wrong: str) -> None:
    """Catches a pattern that is silently of no use."""
    with pytest.raises(CordError, match=wrong):
        find_targets(ARCHITECTURE, config, freeze)


def test_only_what_is_named_is_trained(checkpoint: Path, layout: Layout) -> None:
    """Catches base weights with gradients, sinusoids of a part trained whole, and wrong initial values."""
    model = LALM(load_architecture(checkpoint), layout, torch.float32)
    model.add_lora(replace(CONFIG, whole=("audio_encoder",)), ("adapter",), seed=0)
    trained = {model.global_name(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(name.startswith("audio_encoder.") or "lora_" in name for name in trained)
    assert "audio_encoder.embed_positions" not in trained and not any(name.startswith("adapter") for name in trained)
    for name, tensor in export_adapters(model):
        a = "lora_A" in name
        assert float(tensor.abs().max()) <= tensor.shape[1] ** -0.5 if a else not tensor.any()
        assert not a or float(tensor.std()) == pytest.approx((3 * tensor.shape[1]) ** -0.5, rel=0.5)
