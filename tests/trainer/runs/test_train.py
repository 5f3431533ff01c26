"""Whole runs, end to end: what is the same on every layout and after every stop.

Runs on two ranks share one pair of processes, as starting processes costs more than training; what is killed or
speaks has its own.
"""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from _pytest.mark import ParameterSet
from torch.distributed import checkpoint
from torch.distributed.checkpoint import FileSystemReader  # type: ignore[attr-defined]
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_cord.errors import CordError
from megatron_cord.model.lalm import LALM
from megatron_cord.parallel.layout import finalize
from megatron_cord.rollout.rollout_file import dump_file, read_rollouts
from tests.gloo import run_ranks
from tests.selection import selected, slow_if
from tests.tiny_run import losses, make_run, metrics, overrides, write_inputs
from tests.trainer.fault_ranks import Ranks, run_forked

TP2, PP2 = "parallel.tp=2", "parallel.pp=2"
FROZEN = "model.freeze=[language_model]"
#: What tests without parameters read.
NAMED = {"tp2", "tp2 again", "pp2 frozen", "dp2 frozen"}
#: Whose checkpoints a test reads.
SAVED = {"pp2 frozen"}
#: Runs on two ranks, by name: the run that it resumes after step 2, if any, and its settings.
RUNS: dict[str, tuple[str | None, tuple[str, ...]]] = {
    "tp2": (None, (TP2,)),
    "tp2 again": (None, (TP2,)),
    "tp2 with sequence parallelism": (None, (TP2, "parallel.sequence_parallel=true")),
    "dp2": (None, ()),
    "dp2 overlapping": (None, ("optimizer.overlap_communication=true",)),
    "dp2 without the distributed optimizer": (None, ("optimizer.distributed=false",)),
    "pp2": (None, (PP2,)),
    "pp2 frozen": (None, (PP2, FROZEN)),
    "dp2 frozen": (None, (FROZEN,)),
    "tp2 from tp2": ("tp2", (TP2,)),
    "dp2 from tp2": ("tp2", ()),
    "tp2 from dp2": ("dp2", (TP2,)),
    "pp2 from pp2 frozen": ("pp2 frozen", (PP2, FROZEN)),
    "dp2 from pp2 frozen": ("pp2 frozen", (FROZEN,)),
}
#: Runs with other settings than the rest, which one rank makes too.
SPECIAL = {
    "dp2 with one sequence": (
        "rollout.prompts_per_step=1",
        "rollout.policy_prompts_per_step=0",
        "objective.policy_gradient.enabled=false",
    ),
    "pp2 with the policy gradient alone": (PP2, "objective.divergence.kind=none"),
    "tp2 sharing a live teacher": (TP2, "rollout.share=true", "teacher.mode=live"),
}
RUNS |= {name: (None, settings) for name, settings in SPECIAL.items()}
#: Runs that `make test` leaves out; each has a neighbour that crosses the same code.
SLOW = (
    *("dp2 without the distributed optimizer", "tp2 from dp2", "dp2 from pp2 frozen", "pp2 from pp2 frozen"),
    *("pp2 with the policy gradient alone", "dp2 overlapping", "tp2 with sequence parallelism"),
)


def cases(names: Iterable[str]) -> list[ParameterSet]:
    return [pytest.param(name, marks=slow_if(name in SLOW)) for name in names]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of the RUNS that tests compare, each under its name."""
    root = tmp_path_factory.mktemp("runs")
    run_ranks(run_all, 2, str(inputs), str(root), needed(RUNS, selected(request, "name") | NAMED))
    return root


def needed(runs: dict[str, tuple[str | None, tuple[str, ...]]], names: set[Any]) -> dict[str, Any]:
    """Return the runs of these names and those that they resume, in their order."""
    resumed = {runs[name][0] for name in names if name in runs}
    return {name: run for name, run in runs.items() if name in names | resumed}


def run_all(rank: int, inputs: str, root: str, runs: dict[str, tuple[str | None, tuple[str, ...]]]) -> None:
    """Make runs such as RUNS, one after the other, on one of two ranks."""
    continued = {resumed for resumed, _ in runs.values()}
    for number, (name, (resumed, settings)) in enumerate(runs.items()):
        output = Path(root) / name
        if rank == 0 and resumed is not None:
            stop_after(2, Path(root) / resumed, output)
        dist.barrier()
        dist.destroy_process_group()
        join(rank, Path(root) / f"store{number}")
        interval = 2 if name in continued | SAVED else 0
        make_run(overrides(Path(inputs), output, "checkpoint.keep=0", f"checkpoint.interval={interval}", *settings))
        join(rank, Path(root) / f"store{number}-after")


def join(rank: int, store: Path) -> None:
    file = dist.FileStore(str(store), 2)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=file, rank=rank, world_size=2, timeout=timedelta(seconds=60))


def stop_after(step: int, run: Path, copy: Path) -> Path:
    """Copy a run as it is when it was killed long after its checkpoint of `step`, but before the next."""
    shutil.copytree(run, copy)
    for path in (copy / "checkpoints").iterdir():
        if path.name != f"step_{step:06d}":
            shutil.rmtree(path)
    return copy


def alone(inputs: Path, output: Path, *settings: str) -> Path:
    """Make a run on this process alone."""
    try:
        make_run(overrides(inputs, output, *settings))
    finally:
        finalize()
    return output


@pytest.fixture(scope="module")
def one(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a run on one rank."""
    return alone(inputs, tmp_path_factory.mktemp("one") / "run", "checkpoint.keep=0")


def test_a_run_leaves_what_it_should(one: Path) -> None:
    """Catches a missing step, evaluation, summary or record, and files that are not named as readers expect."""
    assert [line["step"] for line in metrics(one)] == [1, 2, 3, 4, 5]
    for line in metrics(one):
        assert {
            "loss",
            "kl",
            "entropy",
            "grad_norm",
            "learning_rate",
            "reward",
            "repetition",
            "alerts",
            "seconds",
            "engine_logprob_difference",
            "seconds_teacher",
            "seconds_forward_backward",
            "seconds_optimizer",
            "tokens_per_second_generate",
            "memory_host_gb",
        } <= line.keys()
        assert 0 < line["tokens_per_second"] < line["tokens_per_second_forward_backward"]
        assert line["tokens_student"] == 1.0 * round(line["tokens_per_second"] * line["seconds"])
        assert line["engine_logprob_difference_max"] < 1e-4 and not line["skipped"]
    assert any(line["loss_sequence"] != 0 for line in metrics(one)), (
        "the test's own data must give some group different rewards"
    )
    evaluations = one / "evaluations"
    assert sorted(str(path.relative_to(evaluations)) for path in evaluations.rglob("*.*")) == [
        f"step_{step:06d}/heldout.json" for step in (0, 5)
    ]
    assert sorted(path.name for path in (one / "rollouts").iterdir()) == [
        f"step_{step:06d}.parquet" for step in range(1, 6)
    ]
    assert sorted(path.name for path in (one / "checkpoints").iterdir()) == [
        "step_000002",
        "step_000004",
        "step_000005",
    ]
    summary = json.loads((one / "summary.json").read_text())
    assert summary["steps"] == 5 and summary["tp"] == 1 and {"text_accuracy", "gap_closed", "seconds"} <= summary.keys()
    rows = {step: read_rollouts(dump_file(one / "rollouts", step)).to_pylist() for step in (1, 2, 5)}
    assert [row["versions"][0]["version"] for row in (rows[1][0], rows[2][0], rows[5][0])] == [0, 1, 4]
    for row in (row for recorded in rows.values() for row in recorded if row["role"] == "distill"):
        differences = [s - t for s, t in zip(row["student_logprobs"], row["teacher_logprobs"], strict=True)]
        assert len(differences) == len(row["token_ids"]) == len(row["token_kl"]) == len(row["token_weights"])
        assert any(differences) and max(row["teacher_logprobs"]) < 0, "the teacher's log-probabilities must be its own"
    seeds = [row["seed"] for recorded in rows.values() for row in recorded]
    assert len(set(seeds)) == len(seeds) == 3 * (4 + 2 * 3), "each response has a seed of its own"


def test_the_same_seed_and_layout_twice(runs: Path) -> None:
    """Catches anything that is drawn outside (seed, step, sample), and sums in an order that changes."""
    assert losses(runs / "tp2") == losses(runs / "tp2 again")
    assert len(losses(runs / "tp2")) == 5


@pytest.mark.parametrize(
    "name",
    cases(
        name
        for name, (resumed, settings) in RUNS.items()
        if resumed is None and FROZEN not in settings and name not in SPECIAL
    ),
)
def test_every_layout_is_the_same_run(runs: Path, one: Path, name: str) -> None:
    """Catches gradients that are summed twice or not at all.

    Also losses that depend on how sequences are dealt to ranks and microbatches.
    """
    assert losses(runs / name)[0] == pytest.approx(losses(one)[0], rel=1e-5)
    for got, wanted in zip(losses(runs / name), losses(one), strict=True):
        assert got == pytest.approx(wanted, rel=1e-4)
    counts = ("tokens_generated", "tokens_teacher", "tokens_student")
    for line, other in zip(metrics(runs / name), metrics(one), strict=True):
        assert [line[count] for count in counts] == [other[count] for count in counts]


@pytest.mark.parametrize("name", cases(name for name, (resumed, _) in RUNS.items() if resumed is not None))
def test_a_run_resumes_on_any_layout(runs: Path, name: str) -> None:
    """Catches optimizer states, schedule, data or draws that are not restored, and steps that are logged twice."""
    whole = runs / str(RUNS[name][0])
    same_layout = RUNS[name][1] == RUNS[str(RUNS[name][0])][1]
    assert [line["step"] for line in metrics(runs / name)] == [1, 2, 3, 4, 5]
    for got, wanted in zip(losses(runs / name), losses(whole), strict=True):
        assert got == (wanted if same_layout else pytest.approx(wanted, rel=1e-4))


def test_frozen_parts_stay_as_they_are(runs: Path, one: Path) -> None:
    """Catches frozen weights that move, states that are kept for them.

    Also a frozen language model that trains on no layout or only on one.
    """
    for got, wanted in zip(losses(runs / "pp2 frozen"), losses(runs / "dp2 frozen"), strict=True):
        assert got == pytest.approx(wanted, rel=1e-4)
    first, last = (saved(runs / "pp2 frozen", step) for step in (2, 5))
    moved = {name for name in first if not torch.equal(first[name], last[name]) and not name.startswith("optimizer.")}
    assert {"adapter.linear.weight", "audio_encoder.conv1.weight"} <= moved
    assert (
        all(name.startswith(("audio_encoder.", "adapter.")) for name in moved)
        and "audio_encoder.embed_positions" not in moved
    )
    assert not [name for name in first if name.startswith("optimizer.") and "language_model" in name]
    assert [name for name in saved(one, 5) if name.startswith("optimizer.") and "language_model" in name]


def saved(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Return the tensors of a checkpoint; those of the optimizer have names that begin with `optimizer.`."""
    reader = FileSystemReader(run / "checkpoints" / f"step_{step:06d}")
    stored = reader.read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size) for name, entry in stored.items() if isinstance(entry, TensorStorageMetadata)
    }
    checkpoint.load(tensors, storage_reader=reader, no_dist=True)  # type: ignore[attr-defined]
    return tensors


@pytest.mark.parametrize("name", cases(SPECIAL))
def test_other_settings_are_the_same_run_too(runs: Path, inputs: Path, tmp_path: Path, name: str) -> None:
    """Catches a data-parallel rank without a share that the others wait for.

    Also steps without any sequence on some layout only.
    """
    settings = [setting for setting in SPECIAL[name] if not setting.startswith("parallel.")]
    wanted = losses(alone(inputs, tmp_path / "run", "checkpoint.interval=0", *settings))
    assert len(losses(runs / name)) == 5 and any(loss != 0 for loss, _ in wanted)
    for got, loss_and_norm in zip(losses(runs / name), wanted, strict=True):
        assert got == pytest.approx(loss_and_norm, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("size", [1, 64])
def test_microbatches_are_the_same_run(inputs: Path, one: Path, tmp_path: Path, size: int) -> None:
    """Catches losses that are divided by what a microbatch holds, and gradients that are averaged over microbatches."""
    cut = alone(inputs, tmp_path / "run", f"train.micro_batch_size={size}", "checkpoint.interval=0")
    assert losses(cut)[0] == pytest.approx(losses(one)[0], rel=1e-5)
    for got, wanted in zip(losses(cut), losses(one), strict=True):
        assert got == pytest.approx(wanted, rel=1e-4)


def test_a_replay_is_the_same_run(inputs: Path, one: Path, tmp_path: Path) -> None:
    """Catches a record that leaves something out, and a replay that asks an engine for rollouts."""
    replay = alone(inputs, tmp_path / "run", f"replay={one / 'rollouts'}", "record.rollouts=null")
    assert losses(replay) == losses(one)
    with pytest.raises(CordError, match=r"step_000001\.parquet does not exist"):
        alone(inputs, tmp_path / "none", f"replay={tmp_path}")


def test_a_run_that_has_ended_frees_its_model(inputs: Path, tmp_path: Path) -> None:
    """Catches a process that keeps the weights, the optimizer and some fifty threads of each run that it made."""
    counts = []
    for name in ("first", "second"):
        alone(inputs, tmp_path / name, "checkpoint.interval=0", "train.steps=1")
        gc.collect()
        counts.append(sum(type(kept) is LALM for kept in gc.get_objects()))
    assert counts[0] == counts[1]


def test_the_configuration_wins_over_the_checkpoint(inputs: Path, one: Path, tmp_path: Path) -> None:
    """Catches a lower learning rate or more steps that a resumed run ignores.

    Also questions of the new steps that the teacher never answered.
    """
    lower = alone(inputs, stop_after(2, one, tmp_path / "lower"), "optimizer.learning_rate=1e-4")
    rates = [[line["learning_rate"] for line in metrics(run)] for run in (one, lower)]
    assert rates[1][:2] == rates[0][:2] and rates[1][2:] == pytest.approx([rate / 10 for rate in rates[0][2:]])
    longer = alone(inputs, shutil.copytree(one, tmp_path / "longer"), "train.steps=7")
    assert losses(longer)[:5] == losses(one) and len(losses(longer)) == 7
    assert (longer / "evaluations" / "step_000007" / "heldout.json").is_file()


def test_an_evaluation_that_was_missed_is_made_up_for(inputs: Path, one: Path, tmp_path: Path) -> None:
    """Catches a run without its last evaluation and summary, killed between them and its last checkpoint."""
    killed = shutil.copytree(one, tmp_path / "killed")
    (killed / "summary.json").unlink()
    (killed / "evaluations" / "step_000005" / "heldout.json").unlink()
    alone(inputs, killed)
    for name in ("text_accuracy", "audio_accuracy_after", "gap_after", "steps"):
        assert (
            json.loads((killed / "summary.json").read_text())[name]
            == json.loads((one / "summary.json").read_text())[name]
        )


def test_a_killed_run_ends_like_one_that_was_not(inputs: Path, runs: Path, tmp_path: Path) -> None:
    """Catches checkpoints that are visible before they are whole.

    Also anything but checkpoints that a resumed run needs.
    """
    output = tmp_path / "run"
    settings = overrides(inputs, output, TP2, "checkpoint.interval=1", "checkpoint.keep=3")
    ranks = Ranks(settings, tmp_path / "killed.log", halt=5)
    assert ranks.wait_for((output / "checkpoints" / "step_000002").exists, 120)
    assert [ranks.kill(rank) for rank in range(2)] == [True, True]
    status, errors = run_forked(settings, tmp_path / "log")
    assert status == 0 and "resuming after step" in errors
    assert losses(output) == losses(runs / "tp2")
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == [
        "step_000003",
        "step_000004",
        "step_000005",
    ]


def test_a_step_that_trains_on_nothing_measures_nothing(inputs: Path, tmp_path: Path) -> None:
    """Catches an entropy or a length of zero, which would look like a collapse, where every group had zero variance."""
    run = alone(
        inputs,
        tmp_path / "run",
        "objective.divergence.kind=none",
        "reward.terms.agreement=0",
        "reward.terms.format=1",
        "train.steps=1",
    )
    (line,) = metrics(run)
    assert line["zero_variance_groups"] == line["groups"], "the test's own data must give each group equal rewards"
    assert (
        line["entropy"] is line["kl"] is line["response_tokens"] is None
        and line["repetition"] == 0
        and not line["skipped"]
    )
