"""transformer-engine's own Python code under the model, the step and checkpoints; its kernels are stood in for.

Its compiled extension is replaced by plain torch (`extension.py`), so what its CUDA kernels compute, FP8, fused
attention and context parallelism, which only that has, are not tested. The version is the one for this environment's
Megatron-Core; `make test-te` runs both.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from tests.transformer_engine.installed import MISSING
from tests.transformer_engine.session import run_session

pytestmark = [pytest.mark.skipif(bool(MISSING), reason=MISSING), pytest.mark.slow]  # make test-te runs them

LAYOUTS = ("tp2 sp packed", "pp2, recomputed", "tp2 sp packed, lora", "tp2 sp ep2 packed, grouped experts")
MORE_LAYOUTS = (
    *("dp2 packed", "tp2, frozen encoder"),
    *("dp2, overlapped", "dp2 packed in bfloat16", "tp2 sp in bfloat16", "tp2 sp packed, recomputed selectively"),
    *("ep2, grouped experts", "pp2, grouped experts recomputed", "ep2, grouped experts in bfloat16, replayed"),
    *("pp2 packed, frozen language model", "dp2, ordinary optimizer", "torch layers, fused"),
    *("pp2, lora recomputed", "tp2 packed, lora in bfloat16", "experts", "experts packed, lora"),
)
CHECKPOINTS = ("checkpoint tp2 to pp2", "checkpoint tp2 to torch layers", "checkpoint ep2 to torch layers")


@cache
def cases() -> dict[str, Any]:
    """Run the cases in one session, as starting one takes longer than the cases."""
    alone = ("names", "clips", "lora", "accumulation", "adam", "both forms of experts")
    return run_session(2, *alone, *LAYOUTS, CHECKPOINTS[0])


@cache
def more_cases() -> dict[str, Any]:
    return run_session(2, *MORE_LAYOUTS, *CHECKPOINTS[1:])


def check(rows: list[Any]) -> None:
    assert sum(row.name.startswith("gradient") for row in rows) > 1
    assert sum(row.name.startswith("weight") for row in rows) > 20
    assert not [row for row in rows if not row.passed]


@pytest.mark.parametrize("case", LAYOUTS)
def test_layouts(case: str) -> None:
    """Catches a loss, a gradient or a weight after the step that is not float64's: fused kernels on, both towers."""
    check(cases()[case])


@pytest.mark.parametrize("case", MORE_LAYOUTS)
def test_more_layouts(case: str) -> None:
    """Catches the same for precision, recomputation, frozen parts, and Megatron's own layers with a GPU's fusions."""
    check(more_cases()[case])


def test_norms_inside_matrices() -> None:
    """Catches a norm that is lost, doubled or misnamed between model, published tensors and checkpoints."""
    found = cases()["names"]
    assert any("linear_qkv" in name for name in found["norms inside"])
    assert any("linear_fc1" in name for name in found["norms inside"])
    assert found["same tensors"] and found["difference"] < 1e-5
    plain, fused = found["keys"]
    assert plain == fused


def test_experts_in_groups() -> None:
    """Catches experts one after the other where a module computes them together, and one in another's place."""
    found = cases()["both forms of experts"]
    assert found["classes"] == ["SequentialMLP", "TEGroupedMLP", "SequentialMLP"]
    assert found["same tensors"] and found["difference"] < 1e-5
    plain, fused = found["keys"]
    assert plain == fused


def test_clips_with_frames_that_end_them() -> None:
    """Catches an attention of packed clips, Step-Audio 2's, whose queries and keys differ in number, gone wrong."""
    assert cases()["clips"] < 1e-5


def test_lora() -> None:
    """Catches LoRA that leaves a trace when it is off, takes its input before a norm, or has gradients of its own."""
    found = cases()["lora"]
    assert found["off"] and found["changed"] > 1e-2
    assert found["difference"] < 1e-4 and found["gradients"] < 1e-4
    assert found["classes"] == ["Linear", "TELayerNormColumnParallelLinear", "TERowParallelLinear"]


def test_the_layers_are_its_own() -> None:
    """Catches a session that tests Megatron's layers in the place of transformer-engine's, or without its fusions."""
    found = cases()["names"]
    assert any(kind.startswith("transformer_engine.") for kind in found["kinds"])
    assert found["config"] == {"apply_rope_fusion": True, "bias_activation_fusion": True}


def test_gradients_are_added_to_main_grad() -> None:
    """Catches products that form a gradient of their own, frozen weights that get one, and apex's extension demanded.

    Frozen are the encoder and one matrix of the language model.
    """
    found = cases()["accumulation"]
    assert found["added"] == found["trained"] and len(found["trained"]) == 2 * 4 - 1
    assert not found["zero"] and not found["left"] and found["frozen"]
    assert not found["output layer"]


def test_fused_adam() -> None:
    """Catches states or updates of transformer-engine's FusedAdam that differ from those of this project's."""
    found = cases()["adam"]
    assert found["module"].startswith("transformer_engine.")
    assert found["states"][0] == found["states"][1] == {"exp_avg", "exp_avg_sq"}
    assert found["parameters"] < 1e-6 and found["moments"] < 1e-6


def test_a_checkpoint_on_another_layout() -> None:
    """Catches weights or moments that a checkpoint of transformer-engine's layers loses on its way to other ranks."""
    assert cases()["checkpoint tp2 to pp2"] < 1e-5


@pytest.mark.parametrize("case", CHECKPOINTS[1:])
def test_a_checkpoint_for_other_layers(case: str) -> None:
    """Catches a checkpoint that only transformer-engine's layers can read, or only as many expert-parallel ranks."""
    assert more_cases()[case] < 1e-5
