"""`cord convert` on whole omni checkpoints as published: what is trained, what is carried, and every tensor counted."""

from __future__ import annotations

import megatron_cord.parallel  # noqa: F401  # isort: skip (before megatron.core)

from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5OmniConfig, Qwen2_5OmniForConditionalGeneration

from megatron_cord.convert import read_tensors
from megatron_cord.model.families import load_architecture
from megatron_cord.plan.parameters import part_counts
from tests.cli.test_carried import bits
from tests.cli.test_convert import alone
from tests.model.family_reference import qwen2_5_omni_config, save_whole
from tests.model.full_size import full_size_shapes, write_full_size
from tests.tiny_run import WORDS, finish, make_samples, overrides, start, write_shards

_Omni: Any = Qwen2_5OmniForConditionalGeneration
VOICES = {"nobody": {"cond": torch.zeros(1, 4), "ref_mel": torch.zeros(1, 2, 4), "bos_token": 3}}


def write_whole(directory: Path) -> Path:
    """Write a small random Qwen2.5-Omni with its talker, its vocoder in float32, and its voices."""
    save_whole(directory, "qwen2_5_omni", WORDS)
    torch.manual_seed(3)
    model = _Omni(Qwen2_5OmniConfig(**qwen2_5_omni_config(tied=False)))
    others = {
        name: torch.randn(tensor.shape).to(torch.float32 if name.startswith("token2wav.") else torch.bfloat16)
        for name, tensor in model.state_dict().items()
    }
    save_file(others | load_file(directory / "model.safetensors"), directory / "model.safetensors", {"format": "pt"})
    torch.save(VOICES, directory / "spk_dict.pt")
    return directory


def test_a_whole_model_comes_back(tmp_path: Path) -> None:
    """Catches a part that is lost, rounded or renamed between a published layout and the exported one."""
    source = write_whole(tmp_path / "source")
    before = dict(read_tensors(source))
    status, imported = alone("import", source, tmp_path / "checkpoint")
    assert status == 0
    status, checked = alone(
        "check", source, tmp_path / "checkpoint", "--tolerance", "1e-5", "--text", " ".join(WORDS[:4])
    )
    assert status == 0 and "check as audio" in checked
    status, exported = alone("export", tmp_path / "checkpoint", tmp_path / "out", "--max-shard-size", "50KB")
    assert status == 0
    after = dict(read_tensors(tmp_path / "out"))
    assert after.keys() == before.keys() and all(bits(after[name]) == bits(before[name]) for name in before)
    parts = {
        part: sum(name.startswith(f"{part}.") for name in before)
        for part in ("talker", "token2wav", "thinker.visual", "thinker.audio_tower.audio_bos_eos_token")
    }
    counted = ", ".join(f"{part} {count}" for part, count in parts.items())
    said = (
        f"{len(before) - sum(parts.values())} tensors in float32, {sum(parts.values())} carried unchanged ({counted})"
    )
    assert min(parts.values()) > 0 and said in imported and said in exported
    assert (tmp_path / "out" / "spk_dict.pt").read_bytes() == (source / "spk_dict.pt").read_bytes()
    model = _Omni.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert set(model.speaker_map) == set(VOICES)
    loaded = model.state_dict()
    assert loaded.keys() == after.keys() and all(torch.equal(loaded[name], after[name].float()) for name in after)


@pytest.mark.slow
def test_a_trained_thinker_is_exported_into_the_whole(tmp_path: Path) -> None:
    """Catches a run's checkpoint that leaves without what was carried beside its weights."""
    source = write_whole(tmp_path / "checkpoint")
    write_shards(tmp_path / "train", make_samples(6, seed=1))
    write_shards(tmp_path / "heldout", make_samples(3, seed=2))
    run = tmp_path / "run"
    status, errors = finish(start(overrides(tmp_path, run, "train.steps=1", "data.long_audio=cut"), ranks=1))
    assert status == 0, errors
    status, output = alone("export", run / "checkpoints" / "step_000001", tmp_path / "out")
    assert status == 0 and "carried unchanged" in output
    before, after = dict(read_tensors(source)), dict(read_tensors(tmp_path / "out"))
    trained = {"thinker.model", "thinker.lm_head", "thinker.audio_tower"}
    changed = {name for name in before if bits(before[name]) != bits(after[name])}
    assert after.keys() == before.keys() and changed
    assert all(".".join(name.split(".")[:2]) in trained and "audio_bos_eos" not in name for name in changed)


#: Of the thinker without its vision tower, and of the whole in billions, for which only 11B and 6B are published.
COUNTS = {"qwen2_5_omni": (8_255_256_576, "10.7"), "qwen2_5_omni_3b": (4_034_776_064, "5.5")}


@pytest.mark.parametrize("family", COUNTS)
def test_dry_run_of_a_full_size_checkpoint(family: str, tmp_path: Path) -> None:
    """Catches a tensor of the published model that is neither trained nor carried, and memory taken for its weights."""
    shapes = write_full_size(tmp_path, family, 5 * 10**9)
    status, output = alone("import", tmp_path, tmp_path / "out", "--dry-run")
    assert status == 0 and "the weights' headers fit" in output
    rows = [line.split("\t") for line in output.splitlines() if "\t" in line][1:]
    assert {row[0]: tuple(map(int, row[1].split("x"))) for row in rows} == shapes == full_size_shapes(family)
    trained, whole = COUNTS[family]
    carried = {name for name, _, _, _, layout in rows if layout == "Carried"}
    assert f"total: {trained:,} parameters" in output and f"{len(carried)} carried unchanged" in output
    assert sum(prod(shape) for name, shape in shapes.items() if name not in carried) == trained
    assert part_counts(load_architecture(tmp_path)).total == trained
    assert f"{sum(map(prod, shapes.values())) / 1e9:.1f}" == whole
