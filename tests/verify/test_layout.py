"""Layouts on real gloo ranks against one rank in float64, by the check that users run; and the check itself."""

from __future__ import annotations

import megatron_cord.parallel  # noqa: F401  # isort: skip (before megatron.core)

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from megatron.core import parallel_state

from megatron_cord.config.loading import load_config
from megatron_cord.errors import CordError
from megatron_cord.parallel import portability
from megatron_cord.parallel.layout import finalize, initialize
from megatron_cord.parallel.tf32 import tf32_in_use
from megatron_cord.trainer.checkpoint.checkpoints import _state_dict
from megatron_cord.trainer.model_setup import build_student
from megatron_cord.trainer.step.optimizer.building import build_optimizer, release, wrap_model
from megatron_cord.verify import layout as verify_layout
from megatron_cord.verify.layout import Row, VerifyLayoutConfig, compare, run_step
from megatron_cord.verify.layout_reference import Outcome, make_checkpoint
from tests.gloo import run_ranks

ROOT = Path(__file__).parents[2]
PACKED, SP = "train.packing=packed", "parallel.sequence_parallel=true"
INTERLEAVED = ["parallel.pp=2", "parallel.virtual_pp=2"]
JOINT = ["parallel.pp=2", "parallel.vocabulary_over_stages=true"]
EXPERTS = ["sizes.experts=8", "sizes.layers=2"]
REPLAY = "sizes.router_replay=true"
LORA = ["model.lora.rank=3", "model.lora.alpha=6"]
TWO_RANKS = {
    "tp2 sp": ["parallel.tp=2", SP],
    "pp2": ["parallel.pp=2"],
    "pp2 vocabulary over stages, packed, overlapped": [*JOINT, PACKED, "optimizer.overlap_communication=true"],
    "pp2 interleaved packed, overlapped": [*INTERLEAVED, PACKED, "optimizer.overlap_communication=true"],
    "cp2": ["parallel.cp=2"],
    "dp2 packed": [PACKED],
    "tp2 sp packed, frozen encoder": ["parallel.tp=2", SP, PACKED, "model.freeze=[audio_encoder]"],
    "cp2 packed, recomputed": ["parallel.cp=2", PACKED, "model.recompute=[audio_encoder, language_model]"],
    "tp2 sp, lora": [*LORA, "parallel.tp=2", SP],
    "tp2 packed, lora on some, adapter whole": [
        *LORA,
        "parallel.tp=2",
        PACKED,
        "model.lora.targets=['*.layers.1.*', q_proj, v_proj]",
        "model.lora.whole=[adapter]",
    ],
    "pp2, lora on the last layers": [*LORA, "parallel.pp=2", "model.lora.targets=['*.layers.3.*']"],
    "ep2": [*EXPERTS, "parallel.ep=2", "sizes.sequences=5"],
    "tp2 sp ep2 packed, router replay": [*EXPERTS, "parallel.tp=2", "parallel.ep=2", SP, PACKED, REPLAY],
    "tp2 sp ep2 packed, lora on experts": [*LORA, *EXPERTS, "parallel.tp=2", "parallel.ep=2", SP, PACKED],
    "pp2 interleaved, lora": [*INTERLEAVED, *LORA],
    "cp2 packed, lora recomputed": [
        *LORA,
        "parallel.cp=2",
        PACKED,
        "model.freeze=[audio_encoder, adapter]",
        "model.recompute=[audio_encoder, language_model]",
    ],
}
MORE_ON_TWO_RANKS = {
    "tp2 sp ep2 packed": [*EXPERTS, "parallel.tp=2", "parallel.ep=2", SP, PACKED],
    "tp2": ["parallel.tp=2"],
    "dp2": [],
    "dp2, ordinary optimizer": ["optimizer.distributed=false"],
    "dp2, overlapped": ["optimizer.overlap_communication=true"],
    "pp2 packed, frozen language model": ["parallel.pp=2", PACKED, "model.freeze=[language_model]"],
    "pp2 interleaved": INTERLEAVED,
    "pp2, uneven": ["parallel.pp=2", "parallel.pipeline_layers=[1, 3]"],
    "pp2 in four stages a rank, long microbatches": [
        *("parallel.pp=2", "parallel.virtual_pp=4", "sizes.layers=8"),
        *("sizes.sequences=3", "train.tokens_per_microbatch=4096", PACKED),
    ],
    "pp2 interleaved packed, recomputed": [*INTERLEAVED, PACKED, "model.recompute=[audio_encoder, language_model]"],
    "pp2 interleaved, lora on the last layers": [*INTERLEAVED, *LORA, "model.lora.targets=['*.layers.3.*']"],
    "pp2 interleaved, frozen language model": [*INTERLEAVED, "model.freeze=[language_model]"],
    "cp2, only the adapter": ["parallel.cp=2", "model.freeze=[audio_encoder, language_model]"],
    "cp2 packed, one long microbatch": ["parallel.cp=2", PACKED, "train.tokens_per_microbatch=4096"],
    "tp2, recomputed": ["parallel.tp=2", "model.recompute=[audio_encoder, language_model]"],
    "tp2, recomputed selectively": [
        "parallel.tp=2",
        "model.recompute=[audio_encoder, language_model]",
        "model.recompute_granularity=selective",
    ],
    "pp2 experts": [*EXPERTS, "parallel.pp=2"],
    "cp2 ep2": [*EXPERTS, "parallel.cp=2", "parallel.ep=2"],
    "cp2 packed experts": [*EXPERTS, "parallel.cp=2", PACKED],
    "ep2, recomputed": [*EXPERTS, "parallel.ep=2", "model.recompute=[audio_encoder, language_model]"],
    "ep2, recomputed selectively": [
        *EXPERTS,
        "parallel.ep=2",
        "model.recompute=[language_model]",
        "model.recompute_granularity=selective",
    ],
    "ep2, ordinary optimizer, only the adapter": [
        *EXPERTS,
        "parallel.ep=2",
        "optimizer.distributed=false",
        "model.freeze=[audio_encoder, language_model]",
    ],
    "ep2, router replay": [*EXPERTS, "parallel.ep=2", REPLAY],
    "cp2 ep2 packed, router replay, recomputed": [
        *(*EXPERTS, "parallel.cp=2", "parallel.ep=2", PACKED, REPLAY, "model.recompute=[audio_encoder, language_model]")
    ],
    "ep2, lora": [*LORA, *EXPERTS, "parallel.ep=2"],
    "pp2 interleaved experts": [*EXPERTS, *INTERLEAVED, "sizes.layers=4"],
    "pp2 interleaved experts packed, recomputed": [
        *(*EXPERTS, *INTERLEAVED, "sizes.layers=4", PACKED, "model.recompute=[audio_encoder, language_model]")
    ],
    "ep2, lora on some experts, recomputed": [
        *LORA,
        *EXPERTS,
        "parallel.ep=2",
        "model.lora.targets=['*.experts.1.*', '*.layers.1.mlp.experts.*.down_proj', o_proj]",
        "model.recompute=[audio_encoder, language_model]",
    ],
    "cp2 ep2 packed, lora on experts": [*LORA, *EXPERTS, "parallel.cp=2", "parallel.ep=2", PACKED],
    "cp2, lora": [*LORA, "parallel.cp=2"],
    "pp2 experts, lora": [*LORA, *EXPERTS, "parallel.pp=2"],
    "pp2 interleaved packed, lora recomputed": [
        *INTERLEAVED,
        *LORA,
        PACKED,
        "model.recompute=[audio_encoder, language_model]",
    ],
    "pp2 vocabulary over stages, tied": [*JOINT, "sizes.tied_embeddings=true"],
    "pp2, tied": ["parallel.pp=2", "sizes.tied_embeddings=true"],
    "pp2 vocabulary over stages, uneven, one long microbatch": [
        *(*JOINT, "parallel.pipeline_layers=[1, 3]", PACKED, "train.tokens_per_microbatch=4096")
    ],
    "pp2 vocabulary over stages, frozen language model, recomputed": [
        *(*JOINT, "model.freeze=[language_model]", "model.recompute=[audio_encoder, language_model]")
    ],
    "pp2 vocabulary over stages, lora": [*JOINT, *LORA],
    "pp2 vocabulary over stages, experts": [*JOINT, *EXPERTS],
    "pp2 vocabulary over stages in bfloat16": [*JOINT, "model.dtype=bfloat16"],
    "tp2 in bfloat16": ["parallel.tp=2", "model.dtype=bfloat16"],
    "dp2 in bfloat16": ["model.dtype=bfloat16"],
}
FOUR_RANKS = {
    "tp4 sp packed": ["parallel.tp=4", SP, PACKED],
    "tp4": ["parallel.tp=4"],
    "pp4": ["parallel.pp=4"],
    "pp4 packed": ["parallel.pp=4", PACKED],
    "pp4 interleaved": ["parallel.pp=4", "parallel.virtual_pp=2", "sizes.layers=8"],
    "pp2 interleaved dp2, fewer microbatches than stages": [*INTERLEAVED, "sizes.sequences=3"],
    "tp2 pp2 interleaved, sp packed, overlapped": [
        *("parallel.tp=2", *INTERLEAVED, SP, PACKED, "optimizer.overlap_communication=true")
    ],
    "pp2 interleaved dp2, uneven": [*INTERLEAVED, "parallel.pipeline_layers=[1, 2, 2, 1]", "sizes.layers=6"],
    "pp2 interleaved cp2 packed": [*INTERLEAVED, "parallel.cp=2", PACKED],
    "cp4 packed": ["parallel.cp=4", PACKED],
    "dp4, ranks without sequences": ["sizes.sequences=3"],
    "dp4, ranks without sequences, overlapped": ["sizes.sequences=3", "optimizer.overlap_communication=true"],
    "tp2 pp2": ["parallel.tp=2", "parallel.pp=2"],
    "tp2 pp2 sp packed, overlapped": [
        "parallel.tp=2",
        "parallel.pp=2",
        SP,
        PACKED,
        "optimizer.overlap_communication=true",
    ],
    "ep4, ranks without sequences": [*EXPERTS, "parallel.ep=4", "sizes.sequences=3"],
    "ep2 dp2 packed": [*EXPERTS, "parallel.ep=2", PACKED],
    "tp2 sp ep4": [*EXPERTS, "parallel.tp=2", SP, "parallel.ep=4"],
    "pp2 ep2 packed": [*EXPERTS, "parallel.pp=2", "parallel.ep=2", PACKED],
    "pp2 interleaved ep2, ranks with fewer microbatches": [
        *(*EXPERTS, *INTERLEAVED, "sizes.layers=4", "parallel.ep=2", "sizes.sequences=3")
    ],
    "pp2 interleaved tp2 sp ep2 packed": [
        *(*EXPERTS, *INTERLEAVED, "sizes.layers=4", "parallel.tp=2", SP, "parallel.ep=2", PACKED)
    ],
    "pp2 interleaved cp2 ep2 packed, lora": [
        *(*LORA, *EXPERTS, *INTERLEAVED, "sizes.layers=4", "parallel.cp=2", "parallel.ep=2", PACKED)
    ],
    "pp2 interleaved ep2, uneven": [
        *(*EXPERTS, *INTERLEAVED, "parallel.pipeline_layers=[1, 2, 2, 1]", "sizes.layers=6", "parallel.ep=2")
    ],
    "pp2 interleaved ep2, recomputed, router replay, ranks with fewer microbatches": [
        *(*EXPERTS, *INTERLEAVED, "sizes.layers=4", "parallel.ep=2", "sizes.sequences=3", REPLAY),
        "model.recompute=[audio_encoder, language_model]",
    ],
    "cp2 ep4 packed": [*EXPERTS, "parallel.cp=2", "parallel.ep=4", PACKED],
    "tp2 cp2 sp ep2 packed": [*EXPERTS, "parallel.tp=2", "parallel.cp=2", SP, PACKED, "parallel.ep=2"],
    "pp4 vocabulary over stages": ["parallel.pp=4", JOINT[1]],
    "pp4 vocabulary over stages, packed, many microbatches, overlapped": [
        *("parallel.pp=4", JOINT[1], PACKED, "seed=1", "sizes.sequences=10", "train.tokens_per_microbatch=48"),
        "optimizer.overlap_communication=true",
    ],
    "tp2 pp2 vocabulary over stages": ["parallel.tp=2", *JOINT],
    "tp2 pp2 vocabulary over stages, sp packed, overlapped, tied": [
        *("parallel.tp=2", *JOINT, SP, PACKED, "optimizer.overlap_communication=true", "sizes.tied_embeddings=true")
    ],
    "pp2 vocabulary over stages dp2": JOINT,
    "pp2 vocabulary over stages dp2, ranks without sequences": [*JOINT, "sizes.sequences=3", PACKED],
    "pp2 vocabulary over stages cp2 packed": [*JOINT, "parallel.cp=2", PACKED],
    "pp2 vocabulary over stages ep2, ranks with fewer microbatches": [
        *(*JOINT, *EXPERTS, "parallel.ep=2", "sizes.sequences=3")
    ],
    "tp2 cp2": ["parallel.tp=2", "parallel.cp=2"],
    "tp2 cp2 sp packed": ["parallel.tp=2", "parallel.cp=2", SP, PACKED],
    "pp2 cp2 packed": ["parallel.pp=2", "parallel.cp=2", PACKED],
    "cp2 dp2 packed, overlapped": ["parallel.cp=2", PACKED, "optimizer.overlap_communication=true"],
    "tp2 sp ep4, lora on experts": [*LORA, *EXPERTS, "parallel.tp=2", SP, "parallel.ep=4"],
    "pp2 ep2 packed, lora on experts": [*LORA, *EXPERTS, "parallel.pp=2", "parallel.ep=2", PACKED],
    "ep4, ranks without sequences, lora on experts": [*LORA, *EXPERTS, "parallel.ep=4", "sizes.sequences=3"],
    "tp2 pp2 interleaved, sp packed, lora": ["parallel.tp=2", *INTERLEAVED, SP, PACKED, *LORA],
    "pp2 interleaved cp2 packed, lora": [*INTERLEAVED, *LORA, "parallel.cp=2", PACKED],
    "tp2 dp2, frozen encoder": ["parallel.tp=2", "model.freeze=[audio_encoder]"],
}


def run_cases(_rank: int, cases: dict[str, list[str]]) -> dict[str, list[Row]]:
    """Return what the check finds of each case."""
    found = {}
    for name, overrides in cases.items():
        config = load_config(VerifyLayoutConfig, None, overrides)
        layout = initialize(config.parallel, config.seed)
        found[name] = compare(*run_step(config, layout), config.model.dtype)
        parallel_state.destroy_model_parallel()
    return found


def check(rows: list[Row]) -> None:
    """Every comparison passed, and there were some."""
    assert sum(row.name.startswith("gradient") for row in rows) > 1
    assert sum(row.name.startswith("weight") for row in rows) > 80
    assert not [row for row in rows if not row.passed]


@cache
def on_ranks(ranks: int, slow: bool) -> dict[str, list[Row]]:
    cases = FOUR_RANKS if ranks == 4 else MORE_ON_TWO_RANKS if slow else TWO_RANKS
    rows: dict[str, list[Row]] = run_ranks(run_cases, ranks, cases)[0]
    return rows


@pytest.mark.parametrize("case", TWO_RANKS)
def test_two_ranks(case: str) -> None:
    """Catches a loss, a gradient or a weight after the step that is another one under this layout."""
    check(on_ranks(2, slow=False)[case])


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE_ON_TWO_RANKS)
def test_more_on_two_ranks(case: str) -> None:
    """Catches the same for precision, frozen parts, recomputation and the ways to reduce gradients."""
    check(on_ranks(2, slow=True)[case])


@pytest.mark.slow
@pytest.mark.parametrize("case", FOUR_RANKS)
def test_four_ranks(case: str) -> None:
    """Catches the same where two kinds of parallelism meet, and on ranks that have nothing to train on."""
    check(on_ranks(4, slow=True)[case])


def test_as_a_user_starts_it() -> None:
    """Catches a command that does not start, or checks another layout than the one asked for."""
    arguments = ["-m", "megatron_cord.launch", "--nproc-per-node", "2", "-m", "megatron_cord.verify", "layout"]
    command = [sys.executable, *arguments, "parallel.tp=2", "sizes.layers=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "TP=2 PP=1 CP=1 DP=1" in done.stdout and "agree with one rank in float64" in done.stdout


def test_a_wrong_gradient_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a check that always passes: half of a gradient, and a step that is left out, must each give status 1."""
    small = ["sizes.layers=1", "sizes.encoder_layers=1", "sizes.sequences=3"]
    whole = verify_layout.whole_gradients
    monkeypatch.setattr(
        verify_layout,
        "whole_gradients",
        lambda model: {n: g * (0.5 if "conv1" in n else 1.0) for n, g in whole(model).items()},
    )
    assert verify_layout.verify_layout(small) == 1
    printed = capsys.readouterr().out
    assert "2 of" in printed and "FAIL" in printed and "gradient of audio_tower.conv1.weight" in printed
    monkeypatch.undo()
    monkeypatch.setattr(
        "megatron_cord.trainer.step.step.gradients_are_finite", lambda _model: False
    )  # the update is skipped
    assert verify_layout.verify_layout(small) == 1
    assert "weight of" in capsys.readouterr().out


@pytest.fixture
def products_in_tf32() -> Iterator[None]:
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("wrong", [False, True])
def test_the_check_is_without_tf32(wrong: bool, products_in_tf32: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a float32 check that fails on a GPU by TF32, torch's default in convolutions, and one that changes it.

    Also when the check ends in an error.
    """
    during: list[tuple[bool, bool]] = []

    def step(*_: object) -> tuple[Outcome, Outcome]:
        during.append((torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))
        if wrong:
            raise CordError("stopped")
        outcome = Outcome(1.0, {}, {"weight": torch.ones(1)})
        return outcome, outcome

    monkeypatch.setattr(verify_layout, "run_step", step)
    said = tf32_in_use()
    assert said == "convolutions TF32, matrix products TF32"
    if wrong:
        with pytest.raises(CordError, match="stopped"):
            verify_layout.verify_layout([])
    else:
        verify_layout.verify_layout([])
    assert during == [(False, False)] and tf32_in_use() == said


def test_no_gloo_groups_on_cuda(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Catches gloo groups beside NCCL's, and an optimizer or its checkpoint that needs them."""
    monkeypatch.setattr(portability, "needs_gloo_groups", lambda: False)
    config = load_config(VerifyLayoutConfig, None, ["sizes.layers=1", "sizes.encoder_layers=1", "sizes.sequences=3"])
    layout = initialize(config.parallel, config.seed)
    try:
        with pytest.raises(AssertionError):
            parallel_state.get_data_parallel_group_gloo()
        make_checkpoint(tmp_path, config.sizes, config.seed)
        wrapped = wrap_model(config.optimizer, build_student(replace(config.model, checkpoint=str(tmp_path)), layout))
        optimizer, _ = build_optimizer(config.optimizer, wrapped, steps=2)
        assert {"model", "optimizer"} <= _state_dict(wrapped, optimizer, None, is_loading=True).keys()
        release(wrapped)
    finally:
        finalize()
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not portability.needs_gloo_groups()


@pytest.mark.parametrize(
    ("overrides", "wrong"),
    [
        (["parallel.virtual_pp=2"], "needs parallel.pp > 1"),
        (["parallel.cp=0"], "at least 1"),
        (["parallel.vocabulary_over_stages=true"], "is for a pipeline without interleaved stages"),
        ([*INTERLEAVED, "parallel.vocabulary_over_stages=true"], "parallel.pp=2, parallel.virtual_pp=2"),
        (["model.checkpoint=x"], "its own small model"),
    ],
)
def test_refusals(overrides: list[str], wrong: str) -> None:
    """Catches a setting that is not built, or makes no sense, and is silently dropped."""
    with pytest.raises(CordError, match=wrong):
        load_config(VerifyLayoutConfig, None, overrides)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_frozen_parts_cost_nothing(dtype: str, tmp_path: Path) -> None:
    """Catches a frozen tensor with gradient or optimizer state, and gradients that are summed in less than fp32."""
    config = load_config(VerifyLayoutConfig, None, [f"model.dtype={dtype}", "model.freeze=[audio_encoder]"])
    layout = initialize(config.parallel, config.seed)
    try:
        make_checkpoint(tmp_path, config.sizes, config.seed)
        model = build_student(replace(config.model, checkpoint=str(tmp_path)), layout)
        wrapped = wrap_model(config.optimizer, model)
        optimizer, _ = build_optimizer(config.optimizer, wrapped, steps=2)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        reduced = [p for buffer in wrapped.buffers for p in buffer.params]
        assert 0 < trained < sum(p.numel() for p in model.parameters())
        assert sum(p.numel() for p in reduced) == trained and all(p.requires_grad for p in reduced)
        assert {buffer.grad_data.dtype for buffer in wrapped.buffers} == {torch.float32}
        updated = [p for group in optimizer.param_groups for p in group["params"]]
        assert sum(p.numel() for p in updated) == trained and {p.dtype for p in updated} == {torch.float32}
        release(wrapped)
    finally:
        finalize()
