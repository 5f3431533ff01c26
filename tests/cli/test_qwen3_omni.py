"""`cord convert` on whole Qwen3-Omni checkpoints: what listens and writes is converted, the rest is carried."""

from __future__ import annotations

import megatron_cord.parallel  # noqa: F401  # isort: skip (before megatron.core)

import json
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import Qwen3OmniMoeConfig, Qwen3OmniMoeForConditionalGeneration

from megatron_cord.convert import read_tensors
from megatron_cord.convert.hf.writer import plan_shards
from megatron_cord.convert.plain.fused_experts import published_parts
from megatron_cord.model.families import load_architecture
from megatron_cord.plan.parameters import part_counts
from megatron_cord.plan.published import published
from tests.cli.test_convert import alone
from tests.model.family_reference import qwen3_omni_config

#: Qwen3-Omni-30B-A3B-Instruct, without the settings that are transformers' defaults.
FULL_SIZE: dict[str, Any] = {
    "thinker_config": {
        "audio_config": {
            "downsample_hidden_size": 480, "n_window": 50, "n_window_infer": 800, "output_dim": 2048,
        },
        "text_config": {
            "vocab_size": 152064, "hidden_size": 2048, "intermediate_size": 768, "num_hidden_layers": 48,
            "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
            "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True,
            "max_position_embeddings": 65536, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": False,
            "shared_expert_intermediate_size": 0,
            "rope_scaling": {
                "interleaved": True, "mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default",
            },
        },
        "vision_config": {"out_hidden_size": 2048},
        "audio_token_id": 151675, "image_token_id": 151655, "video_token_id": 151656,
        "vision_start_token_id": 151652,
    },
    "talker_config": {
        "text_config": {
            "vocab_size": 3072, "hidden_size": 1024, "num_hidden_layers": 20, "num_attention_heads": 16,
            "num_key_value_heads": 2, "head_dim": 128, "moe_intermediate_size": 384, "num_experts": 128,
            "num_experts_per_tok": 6, "shared_expert_intermediate_size": 768,
        },
        "code_predictor_config": {"num_code_groups": 16},
        "thinker_hidden_size": 2048, "num_code_groups": 16, "spatial_merge_size": 2,
    },
}  # fmt: skip


def write_whole(directory: Path, settings: dict[str, Any], *, sparse: bool = False) -> dict[str, tuple[int, ...]]:
    """Write a checkpoint with all parts, in published names and bfloat16; sparse: without its bytes.

    Return the shapes.
    """
    config = Qwen3OmniMoeConfig(**settings)
    make: Any = Qwen3OmniMoeForConditionalGeneration
    torch.manual_seed(0)
    with torch.device("meta" if sparse else "cpu"):
        model = make(config).bfloat16()
    named = ((name, parameter.detach()) for name, parameter in model.named_parameters())
    tensors = {name: part for whole in named for name, part in published_parts(*whole)}
    shapes = {name: tuple(part.shape) for name, part in tensors.items()}
    config.save_pretrained(directory)
    if not sparse:
        save_file({name: part.clone() for name, part in tensors.items()}, directory / "model.safetensors")
        return shapes
    for shard in plan_shards(shapes, torch.bfloat16, 5 * 10**9):  # as published; each is mapped as a whole
        header = shard.header(torch.bfloat16)
        with (directory / shard.file).open("wb") as file:
            file.write(header)
            file.truncate(len(header) + shard.nbytes(torch.bfloat16))
    return shapes


def trained(name: str) -> bool:
    """Return whether a tensor belongs to what listens and writes."""
    return name.startswith("thinker.") and not name.startswith("thinker.visual.")


def test_a_whole_checkpoint_comes_back(tmp_path: Path) -> None:
    """Catches a part that is dropped, changed, or counted as trained."""
    shapes = write_whole(tmp_path / "source", qwen3_omni_config(tied=False))
    carried = [name for name in shapes if not trained(name)]
    status, output = alone("import", tmp_path / "source", tmp_path / "checkpoint")
    assert status == 0 and f"{len(carried)} carried unchanged" in output
    assert f"{len(shapes) - len(carried)} tensors" in output
    status, output = alone("export", tmp_path / "checkpoint", tmp_path / "out")
    assert status == 0 and f"{len(carried)} carried unchanged" in output
    given, wanted = dict(read_tensors(tmp_path / "out")), dict(read_tensors(tmp_path / "source"))
    assert given.keys() == wanted.keys() == shapes.keys()
    for name, tensor in wanted.items():
        # Their bytes: transformers leaves a talker's experts as memory had them, which may be NaN.
        assert given[name].dtype == tensor.dtype, name
        assert torch.equal(given[name].view(torch.uint8), tensor.view(torch.uint8)), name
    config, begun = (json.loads((tmp_path / path / "config.json").read_text()) for path in ("out", "source"))
    assert config == begun


@pytest.mark.slow
def test_dry_run_of_a_full_size_checkpoint(tmp_path: Path) -> None:
    """Catches a tensor of the full-size model that is not accounted for, and a plan for another model."""
    shapes = write_whole(tmp_path, FULL_SIZE, sparse=True)
    status, output = alone("import", tmp_path, tmp_path / "out", "--dry-run")
    assert status == 0 and "the weights' headers fit" in output
    listed = {line.split("\t")[0] for line in output.splitlines() if "\t" in line} - {"name"}
    assert listed == shapes.keys()
    count = sum(prod(shape) for name, shape in shapes.items() if trained(name))
    assert f"total: {count:,} parameters" in output
    arch = load_architecture(tmp_path)
    assert arch == published("qwen3_omni_30b_a3b") and part_counts(arch).total == count
    # Its text model is Qwen3-30B-A3B's with 128 words more, in the embedding and in the output layer.
    assert part_counts(arch).language_model == 30_532_122_624 + 2 * 128 * 2048
