"""Whole runs, end to end: what is the same on every layout and after every stop, and how runs end that cannot go on.

Runs on two ranks share one pair of processes, as starting processes costs more than training; what is killed or speaks has its own.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed import checkpoint
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_cord.config import load_config
from megatron_cord.errors import CordError
from megatron_cord.model.lalm import LALM
from megatron_cord.parallel.layout import finalize
from megatron_cord.rollout.record_file import read_rollouts, record_file
from megatron_cord.train import train
from megatron_cord.trainer.config import RunConfig
from tests.gloo import run_ranks
from tests.tiny_run import finish, losses, make_samples, metrics, overrides, start, write_checkpoint, write_inputs, write_shards

TP2, PP2 = "parallel.tp=2", "parallel.pp=2"
FROZEN = "model.freeze=[language_model]"
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
    "dp2 with one sequence": ("rollout.prompts_per_step=1", "rollout.policy_prompts_per_step=0", "objective.policy_gradient=false"),
    "pp2 with the policy gradient alone": (PP2, "objective.divergence=none"),
    "tp2 sharing a live teacher": (TP2, "rollout.share=true", "teacher.mode=live"),
}
RUNS |= {name: (None, settings) for name, settings in SPECIAL.items()}
CONTINUED = {resumed for resumed, _ in RUNS.values()}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def runs(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of all RUNS, each under its name."""
    root = tmp_path_factory.mktemp("runs")
    run_ranks(run_all, 2, str(inputs), str(root))
    return root


def run_all(rank: int, inputs: str, root: str) -> None:
    """Makes all RUNS, one after the other, on one of two ranks."""
    for number, (name, (resumed, settings)) in enumerate(RUNS.items()):
        output = Path(root) / name
        if rank == 0 and resumed is not None:
            stop_after(2, Path(root) / resumed, output)
        dist.barrier()
        dist.destroy_process_group()
        join(rank, Path(root) / f"store{number}")
        interval = 2 if name in CONTINUED else 0
        train(
            load_config(RunConfig, None, overrides(Path(inputs), output, "checkpoint.keep=0", f"checkpoint.interval={interval}", *settings))
        )
        join(rank, Path(root) / f"store{number}-after")


def join(rank: int, store: Path) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(str(store), 2), rank=rank, world_size=2, timeout=timedelta(seconds=60))


def stop_after(step: int, run: Path, copy: Path) -> Path:
    """A copy of a run as it is when it was killed long after its checkpoint of `step`, but before the next."""
    shutil.copytree(run, copy)
    for path in (copy / "checkpoints").iterdir():
        if path.name != f"step_{step:06d}":
            shutil.rmtree(path)
    return copy


def alone(inputs: Path, output: Path, *settings: str) -> Path:
    """A run on this process alone."""
    try:
        train(load_config(RunConfig, None, overrides(inputs, output, *settings)))
    finally:
        finalize()
    return output


@pytest.fixture(scope="module")
def one(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on one rank."""
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
        } <= line.keys()
        assert line["engine_logprob_difference_max"] < 1e-4 and not line["skipped"]
    assert any(line["loss_sequence"] != 0 for line in metrics(one)), "the test's own data must give some group a signal"
    assert sorted(path.name for path in (one / "evaluations").iterdir()) == ["step_000000.json", "step_000005.json"]
    assert sorted(path.name for path in (one / "rollouts").iterdir()) == [f"step_{step:06d}.parquet" for step in range(1, 6)]
    assert sorted(path.name for path in (one / "checkpoints").iterdir()) == ["step_000002", "step_000004", "step_000005"]
    summary = json.loads((one / "summary.json").read_text())
    assert summary["steps"] == 5 and summary["tp"] == 1 and {"text_accuracy", "gap_closed", "seconds"} <= summary.keys()
    rows = {step: read_rollouts(record_file(one / "rollouts", step)).to_pylist() for step in (1, 2, 5)}
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
    "name", [name for name, (resumed, settings) in RUNS.items() if resumed is None and FROZEN not in settings and name not in SPECIAL]
)
def test_every_layout_is_the_same_run(runs: Path, one: Path, name: str) -> None:
    """Catches gradients that are summed twice or not at all, and losses that depend on how sequences are dealt to ranks and microbatches."""
    assert losses(runs / name)[0] == pytest.approx(losses(one)[0], rel=1e-5)
    for got, wanted in zip(losses(runs / name), losses(one), strict=True):
        assert got == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("name", [name for name, (resumed, _) in RUNS.items() if resumed is not None])
def test_a_run_resumes_on_any_layout(runs: Path, name: str) -> None:
    """Catches optimizer states, schedule, data or draws that are not restored, and steps that are logged twice."""
    whole = runs / str(RUNS[name][0])
    same_layout = RUNS[name][1] == RUNS[str(RUNS[name][0])][1]
    assert [line["step"] for line in metrics(runs / name)] == [1, 2, 3, 4, 5]
    for got, wanted in zip(losses(runs / name), losses(whole), strict=True):
        assert got == (wanted if same_layout else pytest.approx(wanted, rel=1e-4))


def test_frozen_parts_stay_as_they_are(runs: Path, one: Path) -> None:
    """Catches frozen weights that move, states that are kept for them, and a frozen language model that trains on no layout or only on one."""
    for got, wanted in zip(losses(runs / "pp2 frozen"), losses(runs / "dp2 frozen"), strict=True):
        assert got == pytest.approx(wanted, rel=1e-4)
    first, last = (saved(runs / "pp2 frozen", step) for step in (2, 5))
    moved = {name for name in first if not torch.equal(first[name], last[name]) and not name.startswith("optimizer.")}
    assert {"adapter.linear.weight", "audio_encoder.conv1.weight"} <= moved
    assert all(name.startswith(("audio_encoder.", "adapter.")) for name in moved) and "audio_encoder.embed_positions" not in moved
    assert not [name for name in first if name.startswith("optimizer.") and "language_model" in name]
    assert [name for name in saved(one, 5) if name.startswith("optimizer.") and "language_model" in name]


def saved(run: Path, step: int) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint; those of the optimizer have names that begin with `optimizer.`."""
    reader = FileSystemReader(run / "checkpoints" / f"step_{step:06d}")
    stored = reader.read_metadata().state_dict_metadata
    tensors = {name: torch.empty(entry.size) for name, entry in stored.items() if isinstance(entry, TensorStorageMetadata)}
    checkpoint.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


@pytest.mark.parametrize("name", SPECIAL)
def test_other_settings_are_the_same_run_too(runs: Path, inputs: Path, tmp_path: Path, name: str) -> None:
    """Catches a data-parallel rank without a share that the others wait for, and steps without any sequence on some layout only."""
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
    """Catches a lower learning rate or more steps that a resumed run ignores, and questions of the new steps that the teacher never answered."""
    lower = alone(inputs, stop_after(2, one, tmp_path / "lower"), "optimizer.learning_rate=1e-4")
    rates = [[line["learning_rate"] for line in metrics(run)] for run in (one, lower)]
    assert rates[1][:2] == rates[0][:2] and rates[1][2:] == pytest.approx([rate / 10 for rate in rates[0][2:]])
    longer = alone(inputs, shutil.copytree(one, tmp_path / "longer"), "train.steps=7")
    assert losses(longer)[:5] == losses(one) and len(losses(longer)) == 7
    assert (longer / "evaluations" / "step_000007.json").is_file()


def test_an_evaluation_that_was_missed_is_made_up_for(inputs: Path, one: Path, tmp_path: Path) -> None:
    """Catches a run without its last evaluation and summary because it was killed between them and its last checkpoint."""
    killed = shutil.copytree(one, tmp_path / "killed")
    (killed / "summary.json").unlink()
    (killed / "evaluations" / "step_000005.json").unlink()
    alone(inputs, killed)
    for name in ("text_accuracy", "audio_accuracy_after", "gap_after", "steps"):
        assert json.loads((killed / "summary.json").read_text())[name] == json.loads((one / "summary.json").read_text())[name]


def test_a_killed_run_ends_like_one_that_was_not(inputs: Path, runs: Path, tmp_path: Path) -> None:
    """Catches checkpoints that are visible before they are whole, and anything but checkpoints that a resumed run needs."""
    output = tmp_path / "run"
    settings = overrides(inputs, output, TP2, "checkpoint.interval=1", "checkpoint.keep=3")
    process = start(settings)
    deadline = time.monotonic() + 120
    try:
        while not (output / "checkpoints" / "step_000002").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
    finish(process)
    assert process.returncode == -signal.SIGKILL, "the run ended before it could be killed"
    status, errors = finish(start(settings))
    assert status == 0 and "resuming after step" in errors
    assert losses(output) == losses(runs / "tp2")
    assert sorted(os.listdir(output / "checkpoints")) == ["step_000003", "step_000004", "step_000005"]


def broken_inputs(inputs: Path, copy: Path) -> Path:
    """Inputs whose checkpoint has one weight that is no number."""
    shutil.copytree(inputs, copy)
    path = copy / "checkpoint" / "model.safetensors"
    tensors = load_file(path)
    tensors["language_model.lm_head.weight"][3, 0] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})
    return copy


def test_losses_that_are_no_numbers_stop_the_run(inputs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Catches an update by NaN, a run that goes on without learning, one that stops at once, and an evaluation that fails before it."""
    with pytest.raises(CordError, match="2 steps in a row had no finite loss .*look at the rollouts of step 1"):
        alone(broken_inputs(inputs, tmp_path / "inputs"), tmp_path / "run", "train.max_skipped_in_a_row=2")
    assert "step 2: the loss or a gradient is not finite; the update is skipped (2 in a row)" in capfd.readouterr().err
    assert [(line["loss"], line["grad_norm"], line["skipped"]) for line in metrics(tmp_path / "run")] == [(None, None, True)] * 2
    assert (tmp_path / "run" / "rollouts" / "step_000002.parquet").is_file()


def test_a_step_that_trains_on_nothing_measures_nothing(inputs: Path, tmp_path: Path) -> None:
    """Catches an entropy or a length of zero, which would look like a collapse, where no group had a signal."""
    run = alone(inputs, tmp_path / "run", "objective.divergence=none", "reward.terms.agreement=0", "reward.terms.format=1", "train.steps=1")
    (line,) = metrics(run)
    assert line["groups_without_signal"] == line["groups"], "the test's own data must give no group a signal"
    assert line["entropy"] is line["kl"] is line["response_tokens"] is None and line["repetition"] == 0 and not line["skipped"]


def test_an_update_that_is_too_large_is_survived(inputs: Path, tmp_path: Path) -> None:
    """Catches checkpoints of weights without a finite loss that push out the last good one."""
    good = alone(inputs, tmp_path / "run", "train.steps=2", "checkpoint.interval=1")
    with pytest.raises(CordError, match="3 steps in a row"):
        alone(inputs, good, "train.steps=20", "checkpoint.interval=1", "checkpoint.keep=3", "optimizer.learning_rate=1e30",
              "optimizer.clip_norm=0", "train.max_skipped_in_a_row=3")  # fmt: skip
    assert sorted(os.listdir(good / "checkpoints")) == ["step_000001", "step_000002", "step_000003"]
    shutil.rmtree(good / "checkpoints" / "step_000003")
    alone(inputs, good, "train.steps=4")
    assert [line["skipped"] for line in metrics(good)] == [False] * 4


def test_two_ranks_stop_with_one_line(inputs: Path, tmp_path: Path) -> None:
    """Catches a line from each rank, a traceback, another status than 2, and a rank that waits for one that has left."""
    settings = overrides(broken_inputs(inputs, tmp_path / "inputs"), tmp_path / "run", TP2, "train.max_skipped_in_a_row=1")
    status, errors = finish(start(settings))
    assert status == 2 and "Traceback" not in errors
    (line,) = spoken(errors)
    assert "1 steps in a row had no finite loss" in line


def spoken(errors: str) -> list[str]:
    """The lines that name an error."""
    return [line for line in errors.splitlines() if line.startswith("error: ")]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for one checkpoint of a tiny run and a half."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1200k", "tmpfs", str(disk)], capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip("mounting a small file system needs root; the limit on file sizes is tested everywhere")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_leaves_the_checkpoint_before(inputs: Path, small_disk: Path) -> None:
    """Catches half a checkpoint under a whole one's name, one deleted to make room, leftovers that keep the disk full, and tracebacks."""
    output = small_disk / "run"
    status, errors = finish(start(overrides(inputs, output, TP2, "checkpoint.interval=1", "checkpoint.asynchronous=false")))
    assert status == 2 and "Traceback" not in errors and "FAILED" not in errors
    (line,) = spoken(errors)
    assert line.startswith(f"error: {output}/checkpoints/step_000002: the checkpoint could not be written (")
    assert "(No space left on device)" in line or "(a file could not be written)" in line  # Megatron-Core 0.19 says no more
    assert os.listdir(output / "checkpoints") == ["step_000001"]
    elsewhere = small_disk.parent / "run"
    shutil.copytree(output, elsewhere)
    assert len(losses(alone(inputs, elsewhere))) == 5


def test_a_file_that_may_not_grow_leaves_the_checkpoint_before(inputs: Path, one: Path, tmp_path: Path) -> None:
    """Catches the same where the system refuses to write for another reason than space."""
    output = stop_after(2, one, tmp_path / "run")

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    status, errors = finish(start(overrides(inputs, output), ranks=1, preexec_fn=limit))
    assert status == 2 and "Traceback" not in errors
    (line,) = spoken(errors)
    assert "step_000004: the checkpoint could not be written" in line and "earlier ones are whole" in line
    assert os.listdir(output / "checkpoints") == ["step_000002"]
    assert losses(alone(inputs, output)) == losses(one)


def test_runs_that_do_not_fit_their_directory(inputs: Path, one: Path, tmp_path: Path) -> None:
    """Catches another run's checkpoints that are continued or overwritten, and tracebacks of damaged ones; nothing of them may change."""
    before = {path: path.stat().st_mtime_ns for path in sorted((one / "checkpoints").rglob("*"))}
    other = shutil.copytree(inputs, tmp_path / "other")
    shutil.rmtree(other / "checkpoint")
    write_checkpoint(other / "checkpoint", ffn_size=64)
    cases: list[tuple[Path, tuple[str, ...], str]] = [
        (inputs, ("seed=1",), "step_000005 belongs to a run with seed=0; resume with that seed or choose another output_dir"),
        (inputs, ("resume=never",), "step_000005 exists and resume=never was given; choose another output_dir"),
        (inputs, (f"resume={tmp_path}",), "is not a whole checkpoint .*choose another with resume=PATH"),
        (other, (), r"step_000005 holds another architecture \(it differs in language.ffn_hidden_size\)"),
        (inputs, (TP2,), r"1 ranks cannot be laid out with parallel.tp=2"),
    ]
    for where, settings, message in cases:
        with pytest.raises(CordError, match=message):
            alone(where, one, *settings)
    assert {path: path.stat().st_mtime_ns for path in sorted((one / "checkpoints").rglob("*"))} == before
    for number, (name, content, message) in enumerate([
        ("__0_0.distcp", b"", r"step_000002 is damaged \(__0_0.distcp has 0 of \d+ bytes\), and no earlier checkpoint is whole"),
        ("state.json", b"{", "step_000002 is damaged .state.json has 1 of"),
        ("manifest.json", b"{}", "step_000002 is damaged .manifest.json cannot be read"),
    ]):  # fmt: skip
        damaged = stop_after(2, one, tmp_path / f"damaged{number}")
        (damaged / "checkpoints" / "step_000002" / name).write_bytes(content)
        with pytest.raises(CordError, match=message):
            alone(inputs, damaged)


def test_data_that_cannot_be_trained_on(inputs: Path, tmp_path: Path) -> None:
    """Catches a run that starts on data that it cannot use, and a message that does not name the file or the sample."""
    cases = {"gone": "shard-000001.tar is missing", "short": "shard-000001.tar has .* truncated", "none": "has no manifest.json"}
    for name in cases:
        shutil.copytree(inputs / "train", tmp_path / name)
    (tmp_path / "gone" / "shard-000001.tar").unlink()
    shard = tmp_path / "short" / "shard-000001.tar"
    shard.write_bytes(shard.read_bytes()[:-700])
    (tmp_path / "none" / "manifest.json").unlink()
    long, wordy = make_samples(1)[0], make_samples(1)[0]
    write_shards(tmp_path / "long", [dataclasses.replace(long, waveform=np.zeros(16001, dtype=np.float32))])
    write_shards(tmp_path / "wordy", [dataclasses.replace(wordy, question="how are you")])
    cases |= {"long": "s0-0.*1.00 s", "wordy": "sample s0-0: words outside the model's vocabulary: how, are, you"}
    for name, message in cases.items():
        with pytest.raises(CordError, match=message):
            alone(inputs, tmp_path / "run", f"data.train={tmp_path / name}")
    with pytest.raises(CordError, match="no such directory or shard"):
        alone(inputs, tmp_path / "run", "data.evaluation=/nonexistent")


def test_one_process_stops_with_one_line(inputs: Path, tmp_path: Path) -> None:
    """Catches a configuration error of the entry point that is no single line on standard error, or another status than 2."""
    status, errors = finish(start(overrides(inputs, tmp_path / "run", "optimizer.learning_rat=1"), ranks=1))
    assert status == 2 and errors.startswith("error: unknown key 'optimizer.learning_rat'") and errors.count("\n") == 1


def test_a_layout_that_does_not_divide_the_model(inputs: Path, tmp_path: Path) -> None:
    """Catches a shape error of some matrix in place of the heads that two ranks cannot share."""
    shutil.copytree(inputs, tmp_path / "inputs")
    shutil.rmtree(tmp_path / "inputs" / "checkpoint")
    write_checkpoint(tmp_path / "inputs" / "checkpoint", heads=3, kv_heads=3, hidden_size=48)
    status, errors = finish(start(overrides(tmp_path / "inputs", tmp_path / "run", TP2)))
    assert (status, len(spoken(errors))) == (2, 1) and "Traceback" not in errors
    assert "parallel.tp=2 does not divide the language model's attention heads (3)" in errors
