"""LoRA of omni families on its way out and back: what peft computes with it, merged exports, and what begins a run."""

from __future__ import annotations

import megatron_cord.parallel  # noqa: F401  # isort: skip (before megatron.core)

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen3OmniMoeThinkerForConditionalGeneration,
)

from megatron_cord.convert import read_tensors
from megatron_cord.convert.peft.directory import CONFIG, read_adapter
from megatron_cord.data.prompts import PromptBuilder
from megatron_cord.model.families import load_architecture
from tests.cli.test_convert import alone as convert
from tests.model.family_reference import save_whole
from tests.tiny_run import WORDS, losses, make_samples, overrides, write_shards
from tests.trainer.fault_ranks import run_forked
from tests.trainer.runs.test_train import alone

pytestmark = pytest.mark.slow
LORA = (
    "model.lora.rank=4", "model.lora.alpha=8", "model.lora.whole=[adapter]", "optimizer.learning_rate=3e-2",
    "data.long_audio=cut", "train.packing=packed", "evaluation.samples=1",
)  # fmt: skip
CLASSES: dict[str, Any] = {
    "qwen2_5_omni": Qwen2_5OmniThinkerForConditionalGeneration,
    "qwen3_omni_moe": Qwen3OmniMoeThinkerForConditionalGeneration,
}
RANKS = {
    "qwen2_5_omni": ("parallel.tp=2",),
    "qwen3_omni_moe": ("parallel.tp=2", "parallel.sequence_parallel=true", "parallel.ep=2"),
}
WHOLE = {"qwen2_5_omni": ["audio_tower.proj"], "qwen3_omni_moe": ["audio_tower.proj1", "audio_tower.proj2"]}


@pytest.fixture(scope="module", params=CLASSES)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Train LoRA beside both towers on two ranks; return the family and the directory with the run and its exports."""
    family, root = request.param, tmp_path_factory.mktemp(request.param)
    save_whole(root / "checkpoint", family, WORDS)
    write_shards(root / "train", make_samples(6, seed=1))
    write_shards(root / "heldout", make_samples(3, seed=2))
    run = overrides(root, root / "run", *LORA, *RANKS[family], "train.steps=2", "rollout.max_logprob_mismatch=1e-3")
    status, said = run_forked(run, root / "log")
    assert status == 0, said
    for name, more in (("adapter", ["--adapter"]), ("merged", [])):
        status, said = convert("export", root / "run" / "checkpoints" / "step_000002", root / name, *more)
        assert status == 0, said
    return family, root


def logits(model: Any, checkpoint: Path) -> Tensor:
    """Return logits [S, V] of a spoken question in one clip."""
    prompt = PromptBuilder(checkpoint, long_audio="cut").audio_prompt(make_samples(1, seed=5)[0])
    longest = max(clip.num_frames for clip in prompt.clips)
    features = torch.stack(
        [torch.nn.functional.pad(clip.features, (0, longest - clip.features.shape[1])) for clip in prompt.clips]
    )
    frames = torch.tensor([clip.num_frames for clip in prompt.clips])
    ids = torch.tensor([prompt.token_ids])
    with torch.no_grad():
        return torch.as_tensor(
            model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                input_features=features,
                feature_attention_mask=(torch.arange(longest) < frames[:, None]).long(),
            ).logits[0]
        )


def test_peft_computes_with_the_thinker(trained: tuple[str, Path], tmp_path: Path) -> None:
    """Catches names that peft passes over, a tower wrapped whole for its projection, and adapters that do not return.

    Also a merged export of other weights.
    """
    peft = pytest.importorskip("peft")
    family, root = trained
    base = CLASSES[family].from_pretrained(root / "checkpoint", dtype=torch.float32).eval()
    plain = logits(base, root / "checkpoint")
    merged = CLASSES[family].from_pretrained(root / "merged", dtype=torch.float32).eval()
    wanted = logits(merged, root / "merged")
    model = peft.PeftModel.from_pretrained(base, root / "adapter").eval()
    torch.testing.assert_close(logits(model, root / "checkpoint"), wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(plain, wanted, atol=1e-2)
    assert json.loads((root / "adapter" / CONFIG).read_text())["modules_to_save"] == WHOLE[family]
    model.save_pretrained(tmp_path / "back")
    arch = load_architecture(root / "checkpoint")
    ours, theirs = read_adapter(root / "adapter", arch), read_adapter(tmp_path / "back", arch)
    for given, sent in ((theirs.factors, ours.factors), (theirs.whole, ours.whole)):
        assert given.keys() == sent.keys() and all(torch.equal(given[name], sent[name]) for name in sent)


def test_both_towers_are_merged(trained: tuple[str, Path]) -> None:
    """Catches a tower without its adapters, and tensors that change though nothing is beside them."""
    _, root = trained
    base, merged = dict(read_tensors(root / "checkpoint")), dict(read_tensors(root / "merged"))
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    arch = load_architecture(root / "checkpoint")
    adapter = read_adapter(root / "adapter", arch)
    beside = {name.rsplit(".", 2)[0] + ".weight" for name in adapter.factors}
    assert base.keys() == merged.keys() and beside | set(adapter.whole) == changed
    assert any("audio_tower.layers" in name for name in beside) and any("thinker.model" in name for name in beside)
    checkpoint = root / "run" / "checkpoints" / "step_000002"
    status, said = convert("check", root / "merged", checkpoint, "--tolerance", "1e-4", "--text", "what is one plus")
    assert status == 0 and "check as audio" in said


def test_an_adapter_begins_a_run(trained: tuple[str, Path], tmp_path: Path) -> None:
    """Catches adapters of a tower or an expert that init_from leaves out: the run's own checkpoint begins the same."""
    _, root = trained
    begun = [
        alone(root, tmp_path / name, *LORA, f"init_from={source}", "train.steps=1")
        for name, source in (("adapter", root / "adapter"), ("run", root / "run"))
    ]
    assert losses(begun[0]) == losses(begun[1]) != losses(root / "run")[:1]
