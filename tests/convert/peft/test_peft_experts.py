"""LoRA beside experts, of which PEFT and transformers have other tensors: what they compute with, what comes back."""

from __future__ import annotations

import megatron_cord.parallel  # noqa: F401  # isort: skip (before megatron.core)

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_cord.convert import export_tensors, import_tensors, read_into
from megatron_cord.convert.peft.directory import WEIGHTS, Adapter, read_adapter, write_adapter
from megatron_cord.convert.peft.stream import export_adapters, import_adapters
from megatron_cord.convert.plain.model import PlainModel
from megatron_cord.errors import CordError
from megatron_cord.model.config import LoraConfig
from megatron_cord.model.families import load_architecture
from megatron_cord.model.lalm import LALM
from megatron_cord.parallel.layout import Layout, ParallelConfig, finalize, initialize
from tests.gloo import run_ranks
from tests.model.family_reference import save

CONFIG = LoraConfig(rank=3, alpha=6.0)
FAMILY, EXPERTS = "qwen3_moe", 4
IDS = torch.tensor([[1, 5, 7, 9, 11, 3]])


@pytest.fixture
def layout() -> Iterator[Layout]:
    yield initialize(ParallelConfig(), seed=0)
    finalize()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("mixture")
    save(directory, FAMILY, tied=False)
    return directory


def with_lora(checkpoint: str | Path, layout: Layout, seed: int = 0) -> LALM:
    """Build the model with LoRA that depends on a matrix's name alone, none of it zero."""
    model = LALM(load_architecture(checkpoint), layout, torch.float32)
    read_into(model, checkpoint)
    model.add_lora(CONFIG, (), seed=seed)
    factors = {}
    for number, (name, tensor) in enumerate(export_adapters(model)):
        generator = torch.Generator().manual_seed(seed + number)
        factors[name] = 0.2 * torch.randn(tensor.shape, generator=generator)
    import_adapters(model, factors, "the test")
    return model


@pytest.fixture
def adapter(checkpoint: Path, layout: Layout, tmp_path: Path) -> tuple[Path, dict[str, Tensor], dict[str, Tensor]]:
    """Write an adapter's directory; return it with A and B, and the merged weights."""
    model = with_lora(checkpoint, layout)
    factors = {name: tensor.clone() for name, tensor in export_adapters(model)}
    merged = {name: tensor.clone() for name, tensor in export_tensors(model)}
    kept = Adapter(factors, {}, CONFIG.rank, CONFIG.alpha, base_name=str(checkpoint))
    write_adapter(tmp_path / "adapter", kept, model.arch)
    return tmp_path / "adapter", factors, merged


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return torch.as_tensor(model(input_ids=IDS).logits)


def test_names_are_of_each_expert(adapter: tuple[Path, dict[str, Tensor], dict[str, Tensor]]) -> None:
    """Catches experts without LoRA, a router with it, and names that are not those of PEFT's linear layers."""
    names = load_file(adapter[0] / WEIGHTS).keys()
    expert = "base_model.model.model.layers.1.mlp.experts.3."
    found = {name.removeprefix(expert) for name in names if name.startswith(expert)}
    assert found == {f"{p}_proj.lora_{f}.weight" for p in ("gate", "up", "down") for f in "AB"}
    assert len(names) == 2 * (4 + 3 * EXPERTS) * 2 and not any(".gate.lora" in name for name in names)


def test_peft_computes_the_same(checkpoint: Path, adapter: tuple[Path, dict[str, Tensor], dict[str, Tensor]]) -> None:
    """Catches an expert's A or B in another's place, gate and up exchanged, and another scale."""
    peft = pytest.importorskip("peft")
    base = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    plain, merged = logits(base), PlainModel(checkpoint)
    for name, tensor in adapter[2].items():
        merged.parameters[name].copy_(tensor)
    wanted = logits(merged._model)
    model = peft.PeftModel.from_pretrained(base, adapter[0]).eval()
    torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(plain, wanted, atol=0.1)


def test_what_peft_writes_comes_back(
    checkpoint: Path, adapter: tuple[Path, dict[str, Tensor], dict[str, Tensor]], tmp_path: Path
) -> None:
    """Catches adapters of fused experts that are taken for others, or refused though they are ours."""
    peft = pytest.importorskip("peft")
    base = AutoModelForCausalLM.from_pretrained(checkpoint)
    peft.PeftModel.from_pretrained(base, adapter[0]).save_pretrained(tmp_path / "back")
    assert any(".experts.base_layer.lora_A" in name for name in load_file(tmp_path / "back" / WEIGHTS))
    back = read_adapter(tmp_path / "back", load_architecture(checkpoint)).factors
    assert back.keys() == adapter[1].keys()
    assert all(torch.equal(back[name], adapter[1][name]) for name in back)


@pytest.mark.parametrize("targets", [["down_proj"], ["gate_up_proj"], ["gate_up_proj", "down_proj"]])
def test_peft_s_own_adapters(checkpoint: Path, layout: Layout, tmp_path: Path, targets: list[str]) -> None:
    """Catches an adapter that was trained with PEFT beside fused experts, where gate and up share A."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj"], target_parameters=targets)
    trained = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(checkpoint), config).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in trained.named_parameters():
        if "lora_" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    wanted = logits(trained)
    trained.save_pretrained(tmp_path / "trained")
    model = LALM(load_architecture(checkpoint), layout, torch.float32)
    read_into(model, checkpoint)
    parts = {"down_proj": ("down_proj",), "gate_up_proj": ("gate_proj", "up_proj")}
    patterns = tuple(part for target in targets for part in parts[target])
    model.add_lora(LoraConfig(rank=3, alpha=6.0, targets=("q_proj", *patterns)), (), seed=0)
    import_adapters(model, read_adapter(tmp_path / "trained", model.arch).factors, "the adapter")
    plain = PlainModel(checkpoint)
    for name, tensor in export_tensors(model):
        plain.parameters[name].copy_(tensor)
    torch.testing.assert_close(logits(plain._model), wanted, rtol=1e-4, atol=1e-4)


def test_adapters_that_are_not_each_expert_s(
    checkpoint: Path, adapter: tuple[Path, dict[str, Tensor], dict[str, Tensor]], tmp_path: Path
) -> None:
    """Catches a rank that gate and up share and is cut in two, sizes of other experts, and other tensors with LoRA."""
    peft = pytest.importorskip("peft")
    base, arch = AutoModelForCausalLM.from_pretrained(checkpoint), load_architecture(checkpoint)
    peft.PeftModel.from_pretrained(base, adapter[0]).save_pretrained(tmp_path / "back")
    tensors = load_file(tmp_path / "back" / WEIGHTS)
    first = next(name for name in tensors if ".experts.base_layer.lora_B" in name)
    for number, (changed, wrong) in enumerate(
        (({first: tensors[first] + 1}, "gate and up share"), ({first: tensors[first][:, 1:]}, "is not of 4 experts"))
    ):
        other = shutil.copytree(tmp_path / "back", tmp_path / str(number))
        save_file(tensors | {name: t.contiguous() for name, t in changed.items()}, other / WEIGHTS)
        with pytest.raises(CordError, match=wrong):
            read_adapter(other, arch)
    config = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    others: list[dict[str, Any]] = [
        {"target_parameters": ["gate.weight"]},
        {"rank_pattern": {r".*\.gate_up_proj": 7}},
        {"alpha_pattern": {}},
    ]
    for changes in others:
        (other / "adapter_config.json").write_text(json.dumps(config | changes))
        with pytest.raises(CordError, match=r"(target_parameters|rank_pattern) is"):
            read_adapter(other, arch)


def test_a_shared_expert(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches an adapter that peft would load without a word, and without its shared expert's part."""
    (tmp_path / "checkpoint").mkdir()
    save(tmp_path / "checkpoint", "qwen2_moe", tied=False)
    arch = load_architecture(tmp_path / "checkpoint")
    for kind, count in (("experts.0", 0), ("shared_expert", 1)):
        caplog.clear()
        factors = {f"model.layers.0.mlp.{kind}.up_proj.lora_{f}.weight": torch.ones(2, 2) for f in "AB"}
        write_adapter(tmp_path / kind, Adapter(factors, {}, 2, 2.0), arch)
        assert len([message for message in caplog.messages if "shared_expert.up_proj" in message]) == count


def exported(_rank: int, checkpoint: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return A and B, and merged weights, of a model whose experts are on two ranks; imported and exported again."""
    model = with_lora(checkpoint, initialize(ParallelConfig(ep=2), seed=0))
    merged = {name: tensor.clone() for name, tensor in export_tensors(model)}
    factors = {name: tensor.clone() for name, tensor in export_adapters(model)}
    other = LALM(model.arch, model.layout, torch.float32)
    import_tensors(other, merged.items())
    assert all(torch.equal(tensor, merged[name]) for name, tensor in export_tensors(other))
    return factors, merged


def test_experts_on_two_ranks(checkpoint: Path, adapter: tuple[Path, dict[str, Tensor], dict[str, Tensor]]) -> None:
    """Catches experts of the other rank that are left out, named by their place on a rank, or merged with another's."""
    for factors, merged in run_ranks(exported, 2, str(checkpoint)):
        for given, wanted in ((factors, adapter[1]), (merged, adapter[2])):
            assert list(given) == list(wanted)
            assert all(torch.equal(given[name], wanted[name]) for name in wanted)
