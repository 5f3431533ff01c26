"""Whole runs with other optimizers than the default: the same on every layout and after every stop."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from megatron_cord.errors import CordError
from tests.gloo import run_ranks
from tests.selection import selected, slow_if
from tests.tiny_run import losses, metrics, write_inputs
from tests.trainer.runs.test_train import alone, needed, run_all, saved, stop_after

TP2, PP2 = "parallel.tp=2", "parallel.pp=2"
GROUPS = (
    "optimizer.groups.adapter.learning_rate=3e-3",
    "optimizer.groups.late={match: '*.layers.1.*', weight_decay: 0.1}",
)
#: Everything at once: groups, a schedule with two ends, a weight that moves, and matrices apart from the rest.
MUON = (
    *GROUPS,
    "optimizer.kind=muon",
    "optimizer.muon.precision=float32",
    "optimizer.schedule=wsd",
    "optimizer.warmup_steps=1",
    "optimizer.decay_steps=2",
    "objective.policy_gradient.weight_schedule={kind: linear, final: 0.5, steps: 4}",
)
OFFLOADED = (*GROUPS, "optimizer.offload=true")
#: Runs on two ranks, by name: the run that it resumes after step 2, if any, and its settings.
RUNS: dict[str, tuple[str | None, tuple[str, ...]]] = {
    "muon tp2": (None, (TP2, *MUON)),
    "muon tp2 from tp2": ("muon tp2", (TP2, *MUON)),
    "muon dp2 from tp2": ("muon tp2", MUON),
    "muon dp2": (None, MUON),
    "muon pp2 from dp2": ("muon dp2", (PP2, *MUON)),
    "muon dp2, whole states": (
        None,
        (*MUON, "optimizer.distributed=false", "optimizer.overlap_communication=true"),
    ),
    "offloaded tp2": (None, (TP2, *OFFLOADED)),
    "offloaded dp2 from tp2": ("offloaded tp2", OFFLOADED),
}
#: What `make test` makes of them.
QUICK = ("muon tp2", "muon dp2 from tp2", "offloaded tp2")
ALONE = ("checkpoint.keep=0", "evaluation.samples=1")
FEW = (*ALONE, "train.steps=4")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of the RUNS that were selected, each under its name."""
    root = tmp_path_factory.mktemp("runs")
    run_ranks(run_all, 2, str(inputs), str(root), needed(RUNS, selected(request, "name")))
    return root


@pytest.fixture(scope="module")
def one(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return runs of one rank by kind."""
    root = tmp_path_factory.mktemp("one")
    return {
        "muon": alone(inputs, root / "muon", *ALONE, *MUON),
        "offloaded": alone(inputs, root / "offloaded", *ALONE, *OFFLOADED),
        "adam": alone(inputs, root / "adam", *ALONE, *GROUPS),
    }


@pytest.mark.parametrize("name", [pytest.param(name, marks=slow_if(name not in QUICK)) for name in RUNS])
def test_every_layout_and_every_stop_is_the_same_run(runs: Path, one: dict[str, Path], name: str) -> None:
    """Catches shards that are orthogonalized by themselves, states that a layout loses, tensors that no rank updates.

    Also groups that a pipeline stage numbers by itself, and a schedule or a weight that begins anew.
    """
    wanted = one[name.split()[0]]
    for got, loss_and_norm in zip(losses(runs / name), losses(wanted), strict=True):
        assert got == pytest.approx(loss_and_norm, rel=1e-5)
    for key in ("learning_rate", "learning_rate_adapter"):
        assert [line[key] for line in metrics(runs / name)] == [line[key] for line in metrics(wanted)]
    if name == "muon tp2 from tp2":
        assert losses(runs / name) == losses(runs / "muon tp2")


def test_metrics_say_what_was_used(one: dict[str, Path]) -> None:
    """Catches rates and weights that are not those of the step."""
    lines = metrics(one["muon"])
    assert [line["learning_rate"] for line in lines] == pytest.approx([5e-4, 1e-3, 1e-3, 1e-3, 5.5e-4])
    assert [line["learning_rate_adapter"] / line["learning_rate"] for line in lines] == pytest.approx([3.0] * 5)
    assert [line["policy_weight"] for line in lines] == pytest.approx([1.0, 0.875, 0.75, 0.625, 0.5])
    assert "policy_weight" not in metrics(one["adam"])[0]


def test_host_memory_is_the_same_run(one: dict[str, Path]) -> None:
    """Catches another rule, another count of steps, or other settings of groups where the moments lie on the host."""
    for got, wanted in zip(losses(one["offloaded"]), losses(one["adam"]), strict=True):
        assert got == pytest.approx(wanted, rel=1e-5)


def test_groups_have_rates_and_decays_of_their_own(inputs: Path, one: dict[str, Path], tmp_path: Path) -> None:
    """Catches a group that trains at the default rate, and one that takes others along."""
    still = alone(inputs, tmp_path / "run", *ALONE, "optimizer.groups.adapter.learning_rate=1e-12", "train.steps=2")
    first, last = (saved(run, 2) for run in (still, one["adam"]))
    begun = alone(inputs, tmp_path / "begun", *ALONE, "train.steps=1", "optimizer.learning_rate=1e-12")
    start = saved(begun, 1)
    moved = {
        name for name in start if not name.startswith("optimizer.") and (first[name] - start[name]).abs().max() > 1e-6
    }
    assert not any(name.startswith("adapter.") for name in moved) and len(moved) > 10
    assert (last["adapter.linear.weight"] - start["adapter.linear.weight"]).abs().max() > 1e-3
    decayed = alone(
        inputs, tmp_path / "decayed", *ALONE, "train.steps=1", "optimizer.learning_rate=1e-12",
        "optimizer.groups.adapter={learning_rate: 1e-12, weight_decay: 1.0e+11}",
    )  # fmt: skip
    weight = "adapter.linear.weight"
    torch.testing.assert_close(saved(decayed, 1)[weight], 0.9 * start[weight], rtol=1e-4, atol=1e-6)
    other = "language_model.output_layer.weight"
    torch.testing.assert_close(saved(decayed, 1)[other], start[other], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [("optimizer.kind=muon",), ("optimizer.kind=muon", "optimizer.offload=true"), ("optimizer.offload=true",)],
)
def test_sixteen_bit_weights_resume_to_the_same_run(inputs: Path, tmp_path: Path, settings: tuple[str, ...]) -> None:
    """Catches fp32 weights or momentum that a checkpoint loses, and fp32 copies of fused matrices taken for whole."""
    bfloat = (*FEW, "model.dtype=bfloat16", *settings)
    whole = alone(inputs, tmp_path / "whole", *bfloat)
    assert losses(alone(inputs, stop_after(2, whole, tmp_path / "resumed"), *bfloat)) == losses(whole)
    kind = "momentum_buffer" if "optimizer.kind=muon" in settings else "exp_avg"
    assert any(name.endswith("linear_qkv.weight") and f".{kind}." in name for name in saved(whole, 4))


def test_a_run_goes_on_with_other_groups_and_another_optimizer(
    inputs: Path, one: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches moments that are lost with a group, a change that is not said, and states of another kind."""
    with caplog.at_level(logging.INFO):
        plain = alone(inputs, stop_after(2, one["adam"], tmp_path / "plain"), *ALONE)
    assert "changed after step 2: optimizer.groups.adapter.learning_rate: 0.003 → null" in caplog.messages
    rates = [line["learning_rate"] for line in metrics(plain)]
    assert rates == [line["learning_rate"] for line in metrics(one["adam"])]
    moments = "optimizer.state.exp_avg.adapter.linear.weight"
    kept, fresh = saved(plain, 4)[moments], saved(one["adam"], 2)[moments]
    assert (kept - 0.81 * fresh).norm() < (kept - 0.0 * fresh).norm(), "the moments went on from those of step 2"
    caplog.clear()
    with caplog.at_level(logging.INFO):
        faster = "optimizer.groups.adapter.learning_rate=1e-2"
        alone(inputs, stop_after(2, one["adam"], tmp_path / "muon"), *ALONE, *GROUPS, "optimizer.kind=muon", faster)
    said = "language_model has matrices of another kind of optimizer than before: their states begin at zero"
    assert said in caplog.messages
    assert any("the learning rate of group adapter in step 3 is" in message for message in caplog.messages)
    assert not any(
        "is trained from now on" in message or "not trained any more" in message for message in caplog.messages
    )


def test_a_pattern_without_parameters_stops_the_run(inputs: Path, tmp_path: Path) -> None:
    """Catches a typo that is found after hours, or never."""
    with pytest.raises(
        CordError, match=r"optimizer\.groups\.adaptor: 'adaptor' matches no parameter; nearest: adapter"
    ):
        alone(inputs, tmp_path / "run", "optimizer.groups.adaptor.learning_rate=1")
