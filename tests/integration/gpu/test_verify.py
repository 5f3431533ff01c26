"""The checks of `megatron_cord.verify` on a CUDA device, over NCCL with a world of one: float64 is the reference."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from megatron_cord.verify.layout import verify_layout
from megatron_cord.verify.loss import verify_loss
from megatron_cord.verify.weight_sync import verify_weight_sync
from tests.integration.sglang.conftest import PYTHON, write_talking_checkpoint
from tests.losses.kernels.test_backends import run_check

pytestmark = pytest.mark.gpu
SIZES = ("tokens=300", "hidden=512", "vocabulary=40000")  # many tiles, the last ones narrower


@pytest.mark.parametrize("backend", ["triton", "compile", "eager"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_loss_on_the_device(backend: str, dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a kernel that is compiled to something else than the interpreter runs: a race, a wrong mask, TF32."""
    assert verify_loss([f"backend={backend}", f"dtype={dtype}", *SIZES]) == 0, capsys.readouterr().out


def test_the_triton_kernels_field_by_field() -> None:
    """Catches −inf, an infinite divergence or another shard's target that the compiled kernel takes otherwise."""
    run_check("triton", "cuda")


@pytest.mark.parametrize(
    "settings",
    [
        ("model.layers=torch",),
        ("model.layers=torch", "train.packing=packed", "model.recompute=[language_model,audio_encoder]"),
        ("model.layers=torch", "model.dtype=bfloat16"),
        ("model.layers=transformer_engine", "model.dtype=bfloat16"),
        ("model.layers=transformer_engine", "model.dtype=bfloat16", "train.packing=packed"),
    ],
    ids=" ".join,
)
def test_a_step_of_the_trainer(settings: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    """Catches layers, attention or an optimizer whose CUDA kernels give another step than float64."""
    if "model.layers=transformer_engine" in settings and find_spec("transformer_engine") is None:
        pytest.skip("transformer-engine is not installed")
    assert verify_layout(settings) == 0, capsys.readouterr().out


def test_weights_reach_servers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches an IPC handle that a server cannot open, or weights that are read before they are written."""
    if not PYTHON.exists():
        pytest.skip("the server is not installed; make setup-cuda")
    checkpoint = write_talking_checkpoint(tmp_path / "checkpoint")
    settings = [f"checkpoint={checkpoint}", f"python={PYTHON}", "transports=[shared_memory,disk]"]
    assert verify_weight_sync(settings) == 0, capsys.readouterr().out
