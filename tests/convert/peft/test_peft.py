"""PEFT directories against peft itself, where it is installed: what it reads, computes with, and writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration

from megatron_cord.cli.main import invoke, load
from megatron_cord.convert.peft.directory import read_adapter
from megatron_cord.errors import CordError
from megatron_cord.model.families import load_architecture
from megatron_cord.parallel.layout import finalize
from tests.tiny_run import losses, write_inputs
from tests.trainer.runs.test_train import alone

LORA = ("model.lora.rank=4", "model.lora.alpha=8", "model.lora.whole=[adapter]", "optimizer.learning_rate=3e-2")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def exports(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with a short run, and its weights both as `adapter` and `merged`."""
    root = tmp_path_factory.mktemp("exports")
    alone(inputs, root / "run", *LORA, "train.steps=3", "evaluation.samples=1")
    for name, more in (("adapter", ["--adapter"]), ("merged", [])):
        source = root / "run" / "checkpoints" / "step_000003"
        try:
            assert invoke(load("convert"), ["export", str(source), str(root / name), *more], "cord convert") == 0
        finally:
            finalize()
    return root


def answers(model: Any, checkpoint: Path) -> tuple[torch.Tensor, list[int]]:
    """Return the logits of a spoken question, and what is generated."""
    processor = AutoProcessor.from_pretrained(checkpoint)
    clip = torch.sin(torch.arange(16000) / 20).numpy()
    given = processor(
        text="<|audio_bos|><|AUDIO|><|audio_eos|> what is one plus two", audio=[clip], sampling_rate=16000,
        return_tensors="pt",
    )  # fmt: skip
    with torch.no_grad():
        made = model.generate(**given, max_new_tokens=8, do_sample=False)
        return model(**given).logits, made[0].tolist()


def test_peft_computes_and_generates_the_same(inputs: Path, exports: Path) -> None:
    """Catches a name that peft passes over, a part of a fused matrix in another's place, and another scale."""
    peft = pytest.importorskip("peft")
    base = Qwen2AudioForConditionalGeneration.from_pretrained(inputs / "checkpoint").eval()
    plain, _ = answers(base, inputs / "checkpoint")
    model = peft.PeftModel.from_pretrained(base, exports / "adapter").eval()
    logits, made = answers(model, inputs / "checkpoint")
    merged = Qwen2AudioForConditionalGeneration.from_pretrained(exports / "merged").eval()
    wanted, expected = answers(merged, exports / "merged")
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
    assert made == expected and not torch.allclose(plain, wanted, atol=1e-2)


def test_what_peft_writes_begins_a_run(inputs: Path, exports: Path, tmp_path: Path) -> None:
    """Catches an adapter of peft's own spelling that is not taken, or is taken for something else."""
    peft = pytest.importorskip("peft")
    base = Qwen2AudioForConditionalGeneration.from_pretrained(inputs / "checkpoint")
    peft.PeftModel.from_pretrained(base, exports / "adapter").save_pretrained(tmp_path / "adapter")
    arch = load_architecture(inputs / "checkpoint")
    ours, theirs = read_adapter(exports / "adapter", arch), read_adapter(tmp_path / "adapter", arch)
    for given, wanted in ((theirs.factors, ours.factors), (theirs.whole, ours.whole)):
        assert given.keys() == wanted.keys() and all(torch.equal(given[name], wanted[name]) for name in wanted)
    begun = [
        alone(inputs, tmp_path / name, *LORA, f"init_from={directory}", "train.steps=1", "evaluation.samples=1")
        for name, directory in (("peft", tmp_path / "adapter"), ("run", exports / "run"))
    ]
    assert losses(begun[0]) == losses(begun[1])


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({"use_dora": True}, "use_dora is True"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"r": "four"}, "no whole PEFT adapter"),
    ],
)
def test_adapters_of_another_kind(
    inputs: Path, exports: Path, tmp_path: Path, changes: dict[str, Any], wrong: str
) -> None:
    """Catches an adapter that is another function than the one that would be trained."""
    settings = json.loads((exports / "adapter" / "adapter_config.json").read_text()) | changes
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    (tmp_path / "adapter_model.safetensors").write_bytes(
        (exports / "adapter" / "adapter_model.safetensors").read_bytes()
    )
    with pytest.raises(CordError, match=wrong):
        read_adapter(tmp_path, load_architecture(inputs / "checkpoint"))
