"""Whole runs with LoRA: the same on every layout and after every stop, and what their checkpoints and engines get."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from safetensors.torch import load_file, save_file

from megatron_cord.cli.main import invoke, load
from megatron_cord.config.loading import load_config
from megatron_cord.convert import read_tensors
from megatron_cord.errors import CordError
from megatron_cord.evaluate import evaluate
from megatron_cord.parallel.layout import ParallelConfig, finalize, initialize
from megatron_cord.trainer.config import RunConfig
from tests.gloo import run_ranks
from tests.selection import selected, slow_if
from tests.tiny_run import losses, metrics, overrides, write_checkpoint
from tests.trainer.runs.test_train import alone, needed, run_all, stop_after

LORA = ("model.lora.rank=4", "model.lora.whole=[adapter]", "optimizer.learning_rate=1e-2")
TP2, PP2, SP = "parallel.tp=2", "parallel.pp=2", "parallel.sequence_parallel=true"
#: Runs on two ranks, by name: the run that it resumes after step 2, if any, and its settings.
RUNS: dict[str, tuple[str | None, tuple[str, ...]]] = {
    "tp2 sp": (None, (TP2, SP, *LORA)),
    "dp2 from tp2 sp": ("tp2 sp", LORA),
    "pp2 from tp2 sp": ("tp2 sp", (PP2, *LORA)),
}
#: What tests without parameters read.
NAMED = {"tp2 sp"}
KEPT = ("checkpoint.keep=0", "evaluation.samples=1")


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of the RUNS that tests compare, each under its name."""
    root = tmp_path_factory.mktemp("runs")
    run_ranks(run_all, 2, str(inputs), str(root), needed(RUNS, selected(request, "name") | NAMED))
    return root


@pytest.fixture(scope="module")
def one(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a run on one rank."""
    return alone(inputs, tmp_path_factory.mktemp("one") / "run", *KEPT, *LORA)


@pytest.mark.parametrize("name", [pytest.param(name, marks=slow_if(name.startswith("pp2"))) for name in RUNS])
def test_every_layout_and_every_stop_is_the_same_run(runs: Path, one: Path, name: str) -> None:
    """Catches initial values that depend on the layout, adapters or states that a checkpoint loses, or wrong norms."""
    wanted, given = losses(one), losses(runs / name)
    assert len(given) == 5
    for ours, theirs in zip(given, wanted, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)


def test_the_run_learns_and_the_engine_follows(one: Path) -> None:
    """Catches adapters that nothing updates, and an engine that generates without them."""
    lines = metrics(one)
    assert lines[-1]["kl"] != lines[0]["kl"] and all(line["grad_norm"] > 0 for line in lines)
    assert all(line["engine_logprob_difference"] < 1e-4 for line in lines)


def test_checkpoints_hold_what_is_trained(one: Path) -> None:
    """Catches a base that is saved with every checkpoint, and optimizer states of frozen weights."""
    initialize(ParallelConfig(), seed=0)
    try:
        saved = dist_checkpointing.load_tensors_metadata(str(one / "checkpoints" / "step_000004"))
    finally:
        finalize()
    bare = {name for name in saved if "optimizer" not in name}
    assert all(name.endswith(("lora_A", "lora_B")) or name.startswith("adapter.") for name in bare)
    assert "language_model.decoder.layers.1.self_attention.linear_qkv.k_proj.lora_B" in bare
    assert "audio_encoder.block.layers.0.mlp.linear_fc2.fc2.lora_A" in bare and "adapter.linear.weight" in bare
    assert {name.split(".", 3)[-1] for name in saved if "exp_avg." in name} == bare


def test_dropout_after_a_stop(inputs: Path, tmp_path: Path) -> None:
    """Catches masks that are drawn anew after a stop, and a teacher or an evaluation that has them."""
    settings = (*KEPT, *LORA, "model.lora.dropout=0.3", "rollout.max_logprob_mismatch=null", "train.steps=3")
    whole = alone(inputs, tmp_path / "whole", *settings)
    rest = alone(inputs, stop_after(2, whole, tmp_path / "rest"), *settings)
    assert losses(rest) == losses(whole)
    assert losses(whole) != losses(alone(inputs, tmp_path / "none", *KEPT, *LORA, "train.steps=3"))
    assert all(line["engine_logprob_difference"] > 1e-3 for line in metrics(whole)[2:])


def refused(inputs: Path, output: Path, *settings: str) -> str:
    with pytest.raises(CordError) as caught:
        alone(inputs, output, *settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("settings", "wrong"),
    [
        (("model.lora.rank=4", "model.lora.targets=[q_porj]"), "nearest: .*q_proj"),
        (("model.lora.rank=4", "model.lora.targets=[audio_encoder]", "model.freeze=[audio_encoder]"), "model.freeze"),
        (("model.lora.rank=4", "teacher.mode=ema"), "no average of LoRA"),
        (("model.lora.rank=4", "optimizer.kind=muon"), "optimizer.kind=adam"),
        (("model.lora.targets=[q_proj]",), "rank is 0"),
        (
            (
                "model.lora.rank=4",
                "optimizer.groups.output.learning_rate=1",
                "optimizer.groups.output.match='*.linear_qkv.weight'",
            ),
            "model.lora leaves",
        ),
    ],
)
def test_settings_that_are_refused(inputs: Path, tmp_path: Path, settings: tuple[str, ...], wrong: str) -> None:
    """Catches a setting that cannot be meant, and trains something else."""
    assert re.search(wrong, refused(inputs, tmp_path / "run", *settings))


@pytest.mark.parametrize(
    ("settings", "wrong"),
    [
        ((*LORA, "model.lora.alpha=8"), "another model.lora.alpha"),
        ((*LORA, "model.lora.targets=[language_model]"), "another model.lora.targets .it has audio_tower"),
        ((), "LoRA adapters alone"),
    ],
)
def test_checkpoints_that_are_refused(
    inputs: Path, one: Path, tmp_path: Path, settings: tuple[str, ...], wrong: str
) -> None:
    """Catches adapters that another model takes for its own."""
    assert re.search(wrong, refused(inputs, tmp_path / "run", *settings, f"init_from={one}"))


def test_an_adapter_of_another_base(inputs: Path, one: Path, tmp_path: Path) -> None:
    """Catches adapters that go on beside weights that they were not trained with."""
    other = write_checkpoint(tmp_path / "other", seed=1)
    message = refused(inputs, tmp_path / "run", *LORA, f"init_from={one}", f"model.checkpoint={other}")
    assert "another base" in message and str(inputs / "checkpoint") in message and str(other) in message


def convert(*command: object) -> None:
    try:
        assert invoke(load("convert"), [str(part) for part in command], "cord convert") == 0
    finally:
        finalize()


def test_exports(inputs: Path, one: Path, tmp_path: Path) -> None:
    """Catches a merged export that is not what the trainer computes with, and a PEFT directory that loses something."""
    checkpoint = one / "checkpoints" / "step_000005"
    convert("export", checkpoint, tmp_path / "merged")
    convert("check", tmp_path / "merged", checkpoint, "--tolerance", "1e-4", "--text", "what is one plus two")
    base, merged = dict(read_tensors(inputs / "checkpoint")), dict(read_tensors(tmp_path / "merged"))
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert changed == {n for n in base if "proj.weight" in n or (".fc" in n and "weight" in n) or "multi_modal" in n}

    convert("export", checkpoint, tmp_path / "adapter", "--adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(name.startswith("base_model.model.") for name in tensors)
    begun = alone(inputs, tmp_path / "begun", *LORA, f"init_from={tmp_path / 'adapter'}", "train.steps=1")
    plain = alone(inputs, tmp_path / "plain", *LORA, f"init_from={one}", "train.steps=1")
    assert losses(begun) == losses(plain) != losses(one)[:1]

    name = next(name for name in tensors if "q_proj.lora_A" in name)
    save_file({n: t for n, t in tensors.items() if n != name}, tmp_path / "adapter" / "adapter_model.safetensors")
    message = refused(inputs, tmp_path / "less", *LORA, f"init_from={tmp_path / 'adapter'}")
    assert "lacks" in message and "q_proj.lora_A" in message


def test_evaluation_takes_the_run_s_own_lora(inputs: Path, one: Path) -> None:
    """Catches an evaluation of the base in place of the adapted model."""
    settings = overrides(inputs, one, "evaluation.samples=2", "evaluation.checkpoint=latest")
    result = evaluate(load_config(RunConfig, None, settings))
    assert result is not None and result["step"] == 5
