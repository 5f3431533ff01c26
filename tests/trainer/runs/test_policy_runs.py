"""Whole runs with several updates a step, surrogates and dynamic sampling: the same on every layout and when resumed.

Runs on two ranks share one pair of processes.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_cord.config.loading import load_config
from megatron_cord.errors import CordError
from megatron_cord.rollout.rollout_file import dump_file, read_rollouts
from megatron_cord.trainer.config import RunConfig
from megatron_cord.trainer.observability.watchdog import Watchdog
from tests.gloo import run_ranks
from tests.selection import selected, slow_if
from tests.tiny_run import make_run, metrics, overrides
from tests.trainer.runs.test_train import alone, join

POLICY = "objective.policy_gradient."
UPDATES = ("train.minibatches=2", "train.passes=2", "train.steps=2", "rollout.policy_temperature=1.0")
#: The algorithms that are run, by name; DAPO's groups are replaced by those of the step's two other prompts.
ALGORITHMS: dict[str, tuple[str, ...]] = {
    "gspo": (
        *UPDATES,
        "seed=5",  # of eight, one with rewards that differ in both steps
        *(f"{POLICY}surrogate=clipped", f"{POLICY}ratio=sequence", f"{POLICY}normalization=response_mean"),
        *(f"{POLICY}clip_low=3e-4", f"{POLICY}clip_high=4e-4", f"{POLICY}normalize_std=true"),
        "rollout.share=true",
    ),
    "dapo": (
        *UPDATES,
        *(f"{POLICY}surrogate=clipped", f"{POLICY}clip_high=0.28", f"{POLICY}normalization=token"),
        *(f"{POLICY}filter_truncated=true", "rollout.dynamic_sampling=2", "objective.divergence.kind=none"),
        "rollout.max_new_tokens=12",
    ),
}
LAYOUTS: dict[str, tuple[str, ...]] = {
    "dp2": (),
    "tp2 packed": ("parallel.tp=2", "train.packing=packed", "train.tokens_per_microbatch=90"),
    "cp2": ("parallel.cp=2",),
    "pp2": ("parallel.pp=2",),
}
RUNS = [
    ("gspo", "cp2"),
    ("gspo", "tp2 packed"),
    ("dapo", "dp2"),
    ("dapo", "pp2"),
]
COMPARED = (
    *("loss", "loss_token", "loss_sequence", "grad_norm", "updates", "groups", "replaced_groups", "reward"),
    *("filtered", "ratio", "ratio_max", "clipped_low", "clipped_high"),
)


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of the selected RUNS on two ranks, and of each algorithm on one."""
    root = tmp_path_factory.mktemp("runs")
    chosen = selected(request, "algorithm", "layout")
    run_ranks(run_all, 2, str(inputs), str(root), [run for run in RUNS if run in chosen])
    for name, settings in ALGORITHMS.items():
        alone(inputs, root / name, *settings, "checkpoint.interval=1", "checkpoint.keep=0")
    return root


def run_all(rank: int, inputs: str, root: str, runs: list[tuple[str, str]]) -> None:
    """Make runs such as RUNS, one after the other, on one of two ranks."""
    for number, (algorithm, layout) in enumerate(runs):
        dist.barrier()
        dist.destroy_process_group()
        join(rank, Path(root) / f"store{number}")
        settings = (*ALGORITHMS[algorithm], *LAYOUTS[layout], "checkpoint.interval=0")
        output = Path(root) / f"{algorithm} {layout}"
        make_run(overrides(Path(inputs), output, *settings))
        join(rank, Path(root) / f"store{number}-after")


def test_each_round_and_update_has_its_time(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches rounds of sampling, or updates, that together last longer than the watchdog lets a phase last."""
    phases: list[str] = []
    monkeypatch.setattr(Watchdog, "phase", lambda _, name, step: phases.append(f"{name} {step}"))
    run = alone(inputs, tmp_path / "run", *ALGORITHMS["dapo"], "checkpoint.interval=0")
    replaced = [line["step"] for line in metrics(run) if line["replaced_groups"]]
    assert replaced, "the test's own data must give some group equal rewards"
    assert all(phases.count(f"rollout {step}") > 1 for step in replaced)
    assert [phases.count(f"update {step}") for step in (1, 2)] == [1 + 2 * 2] * 2


def figures(run: Path) -> list[dict[str, Any]]:
    """Return what is compared of each step, without what was not measured."""
    return [{key: line[key] for key in COMPARED if line.get(key) is not None} for line in metrics(run)]


@pytest.mark.parametrize(
    ("algorithm", "layout"), [pytest.param(*run, marks=slow_if(run[1] in ("cp2", "pp2"))) for run in RUNS]
)
def test_every_layout_is_the_same_run(runs: Path, algorithm: str, layout: str) -> None:
    """Catches mini-batches, replaced groups, ratios or denominators that depend on how ranks share the step."""
    got, wanted = figures(runs / f"{algorithm} {layout}"), figures(runs / algorithm)
    assert len(got) == 2 and all(line["updates"] == 4 for line in got)
    for line, expected in zip(got, wanted, strict=True):
        assert line == pytest.approx(expected, rel=2e-4, abs=1e-5)


def test_the_algorithms_do_what_they_are_for(runs: Path) -> None:
    """Catches options that change nothing: no ratio that moves, nothing clipped, no group that is replaced."""
    gspo, dapo = (figures(runs / name) for name in ALGORITHMS)
    assert any(line.get("clipped_low", 0) + line.get("clipped_high", 0) > 0 for line in gspo)
    assert any(line["replaced_groups"] for line in dapo), "the test's own data must give some group equal rewards"
    assert any(line["filtered"] for line in dapo), "the test's own data must have responses that are cut"
    assert all(line["groups"] == 2 for line in dapo)
    for step in (1, 2):
        rows = read_rollouts(dump_file(runs / "dapo" / "rollouts", step)).to_pylist()
        kept = [row for row in rows if row["role"] == "policy"]
        assert len(kept) == 2 * 3 and {row["position"] for row in rows} <= {0, 1, 2, 3}
        replaced = [row for row in rows if row["role"] == "replaced"]
        assert all(row["zero_variance"] and row["student_logprobs"] is None for row in replaced)
        for row in kept:
            assert (row["student_logprobs"] is None) == (row["zero_variance"] or row["finish_reason"] == "length")
    fresh = [line["engine_logprob_difference_max"] for line in metrics(runs / "gspo")]
    assert max(fresh) < 1e-4, "compared with the engine is the policy before the first update"


@pytest.mark.parametrize("algorithm", ["gspo", "dapo"])
def test_a_resumed_run_and_a_replay_are_the_same_run(runs: Path, inputs: Path, tmp_path: Path, algorithm: str) -> None:
    """Catches updates that a checkpoint would lose, and replaced groups that are drawn or dumped another way."""
    resumed = shutil.copytree(runs / algorithm, tmp_path / "resumed")
    shutil.rmtree(resumed / "checkpoints" / "step_000002")
    alone(inputs, resumed, *ALGORITHMS[algorithm])
    assert figures(resumed) == figures(runs / algorithm)
    replay = f"replay={runs / algorithm / 'rollouts'}"
    again = alone(inputs, tmp_path / "replay", *ALGORITHMS[algorithm], replay, "checkpoint.interval=0")
    assert figures(again) == figures(runs / algorithm)


@pytest.mark.slow
def test_streams_of_the_policy_gradient(inputs: Path, tmp_path: Path) -> None:
    """Catches a named L_seq that is another than the objective's own, and one that is trained on another's view."""
    common = [
        *("train.steps=2", "objective.divergence.kind=none", "objective.normalization=token", "seed=5"),
        *("rollout.policy_temperature=1.0", "checkpoint.interval=0"),
    ]
    heard, read = (f"{name}: {{kind: policy_gradient, student: {name}, responses: 3" for name in ("hear", "read"))
    two = f"objective.streams={{{heard}, weight: 0.5}}, {read}, weight: 2}}}}"
    runs: dict[str, tuple[str, ...]] = {"plain": (), "heard": (f"objective.streams={{{heard}}}}}",)}
    runs |= {"read": (f"objective.streams={{{read}}}}}",), "both": (two, "train.packing=packed")}
    lines = {name: metrics(alone(inputs, tmp_path / name, *common, *settings)) for name, settings in runs.items()}
    keys = ("loss", "grad_norm", "reward", "groups", "zero_variance_groups")
    for line, plain in zip(lines["heard"], lines["plain"], strict=True):
        assert [line[key] for key in keys] == [plain[key] for key in keys]
    one, other, both = (lines[name][0] for name in ("heard", "read", "both"))
    assert one["loss"] and other["loss"], "the test's own data must give some group of each different rewards"
    assert one["stream/hear/loss"] == one["loss"]
    assert both["stream/hear/loss"] == pytest.approx(0.5 * one["loss"], rel=1e-4)
    assert both["groups"] == 4 and both["stream/hear/reward"] == one["reward"]
    assert both["loss"] == pytest.approx(both["stream/hear/loss"] + both["stream/read/loss"], rel=1e-6)
    assert both["stream/read/weight"] == 2 and "stream/read/kl" not in both
    rows = read_rollouts(dump_file(tmp_path / "both" / "rollouts", 1)).to_pylist()
    assert {(row["draw"], row["role"]) for row in rows} == {(draw, "policy") for draw in range(1, 7)}
    for settings, message in (
        ("rollout.policy_prompts_per_step=0", "is of the kind policy_gradient, and rollout.policy_prompts_per_step=0"),
        ("rollout.dynamic_sampling=1", r"one each \(hear, read\)"),
    ):
        with pytest.raises(CordError, match=message):
            load_config(RunConfig, None, overrides(inputs, tmp_path / "no", *common, two, settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("train.minibatches=3",), r"train.minibatches=3 is more than the 2 prompts that a step has for L_seq"),
        (("train.passes=0",), "train.minibatches and train.passes must be at least 1"),
        (("rollout.dynamic_sampling=1", "rollout.schedule.ahead=1"), "dynamic_sampling needs rollout.schedule.ahead=0"),
        (("rollout.dynamic_sampling=1", "rollout.policy_prompts_per_step=4"), "there are none: make"),
        (("rollout.dynamic_sampling=-1",), "dynamic_sampling cannot be negative"),
        (("rollout.dynamic_sampling=1", f"{POLICY}enabled=false"), "it replaces groups of L_seq"),
    ],
)
def test_settings_that_do_not_fit(settings: tuple[str, ...], message: str, inputs: Path, tmp_path: Path) -> None:
    """Catches a run that fails at its first step, or that ignores what was asked."""
    with pytest.raises(CordError, match=message):
        load_config(RunConfig, None, overrides(inputs, tmp_path, *settings))
