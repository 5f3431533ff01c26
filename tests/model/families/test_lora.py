"""LoRA of the families whose encoder has no window: beside both towers, on one rank and on two."""

from __future__ import annotations

import megatron_cord.parallel  # noqa: F401  # isort: skip (before megatron.core)

from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_cord.model.families import load_architecture
from megatron_cord.model.lora.targets import find_targets
from megatron_cord.parallel.layout import ParallelConfig, finalize, initialize
from tests.gloo import run_ranks
from tests.model import family_reference
from tests.model.test_lora import CONFIG, check_outputs, outputs

pytestmark = pytest.mark.slow
#: matrices with LoRA, by part: an encoder's layer has q, k, v, out and two of its MLP, a decoder's four and its MLP's
MATRICES = {
    "qwen2_5_omni": {"audio_encoder": 2 * 4, "adapter": 1, "language_model": 2 * 4},
    "qwen3_omni_moe": {"audio_encoder": 2 * 4, "adapter": 2, "language_model": 2 * (2 + 4 * 2)},
}
SHARED_OUT = {
    "qwen2_5_omni": ParallelConfig(tp=2, sequence_parallel=True),
    "qwen3_omni_moe": ParallelConfig(tp=2, sequence_parallel=True, ep=2),
}


def on_rank(_rank: int, checkpoint: str, family: str) -> list[Tensor]:
    return outputs(checkpoint, SHARED_OUT[family], family)


@pytest.mark.parametrize("family", MATRICES)
def test_both_towers(family: str, tmp_path: Path) -> None:
    """Catches a tower that is left out, chunks or experts whose branch is another weight's, and shards of another."""
    family_reference.save(tmp_path, family, tied=False)
    found = [target.module.partition(".")[0] for target in find_targets(load_architecture(tmp_path), CONFIG, ())]
    assert {part: found.count(part) for part in dict.fromkeys(found)} == MATRICES[family]
    layout = initialize(ParallelConfig(), seed=0)
    alone = outputs(str(tmp_path), layout.config, family)
    finalize()
    check_outputs(alone)
    for given in run_ranks(on_rank, 2, str(tmp_path), family):
        check_outputs(given)
        for ours, theirs in zip(given[:4], alone[:4], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
