"""How runs end that cannot go on: one line, a status that tells whether to try again, and nothing lost."""

from __future__ import annotations

import dataclasses
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_cord.errors import CordError
from tests.tiny_run import (
    finish,
    losses,
    make_samples,
    metrics,
    overrides,
    small_file_system,
    start,
    write_checkpoint,
    write_inputs,
    write_shards,
)
from tests.trainer.fault_ranks import run_forked
from tests.trainer.runs.test_train import TP2, alone, stop_after


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def one(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a run on one rank that ends well."""
    return alone(inputs, tmp_path_factory.mktemp("one") / "run", "checkpoint.keep=0")


def broken_inputs(inputs: Path, copy: Path) -> Path:
    """Make inputs whose checkpoint has one weight that is no number."""
    shutil.copytree(inputs, copy)
    path = copy / "checkpoint" / "model.safetensors"
    tensors = load_file(path)
    tensors["language_model.lm_head.weight"][3, 0] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})
    return copy


def test_losses_that_are_no_numbers_stop_the_run(
    inputs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Catches an update by NaN, a run that goes on without learning, one that stops at once.

    Also an evaluation that fails before it.
    """
    with pytest.raises(CordError, match=r"2 steps in a row had no finite loss .*look at the rollouts of step 1"):
        alone(broken_inputs(inputs, tmp_path / "inputs"), tmp_path / "run", "train.max_skipped_in_a_row=2")
    assert "step 2: the loss or a gradient is not finite; the update is skipped (2 in a row)" in capfd.readouterr().err
    assert [(line["loss"], line["grad_norm"], line["skipped"]) for line in metrics(tmp_path / "run")] == [
        (None, None, True)
    ] * 2
    assert (tmp_path / "run" / "rollouts" / "step_000002.parquet").is_file()


def test_an_update_that_is_too_large_is_survived(inputs: Path, tmp_path: Path) -> None:
    """Catches checkpoints of weights without a finite loss that push out the last good one."""
    good = alone(inputs, tmp_path / "run", "train.steps=2", "checkpoint.interval=1")
    with pytest.raises(CordError, match="3 steps in a row"):
        alone(
            inputs,
            good,
            "train.steps=20",
            "checkpoint.interval=1",
            "checkpoint.keep=3",
            "optimizer.learning_rate=1e30",
            "optimizer.clip_norm=0",
            "train.max_skipped_in_a_row=3",
        )
    assert sorted(path.name for path in (good / "checkpoints").iterdir()) == [
        "step_000001",
        "step_000002",
        "step_000003",
    ]
    shutil.rmtree(good / "checkpoints" / "step_000003")
    alone(inputs, good, "train.steps=4")
    assert [line["skipped"] for line in metrics(good)] == [False] * 4


def test_two_ranks_stop_with_one_line(inputs: Path, tmp_path: Path) -> None:
    """Catches a line from each rank, a traceback, another status than 2.

    Also a rank that waits for one that has left.
    """
    settings = overrides(
        broken_inputs(inputs, tmp_path / "inputs"), tmp_path / "run", TP2, "train.max_skipped_in_a_row=1"
    )
    status, errors = run_forked(settings, tmp_path / "log")
    assert status == 2 and "Traceback" not in errors
    (line,) = spoken(errors)
    assert "1 steps in a row had no finite loss" in line


def spoken(errors: str) -> list[str]:
    """Return the lines that name an error."""
    return [line for line in errors.splitlines() if line.startswith("error: ")]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system with room for one checkpoint of a tiny run and a half."""
    with small_file_system(tmp_path / "disk", "1200k") as disk:  # the limit on file sizes is tested without root, too
        yield disk


def test_a_full_disk_leaves_the_checkpoint_before(inputs: Path, small_disk: Path, tmp_path: Path) -> None:
    """Catches half a checkpoint under a whole one's name, one deleted to make room.

    Also leftovers that keep the disk full, and tracebacks.
    """
    output = small_disk / "run"
    settings = overrides(inputs, output, TP2, "checkpoint.interval=1", "checkpoint.asynchronous=false")
    status, errors = run_forked(settings, tmp_path / "log")
    assert status == 2 and "Traceback" not in errors and "FAILED" not in errors
    (line,) = spoken(errors)
    assert line.startswith(f"error: {output}/checkpoints/step_000002: the checkpoint could not be written (")
    assert (
        "(No space left on device)" in line or "(a file could not be written)" in line
    )  # Megatron-Core 0.19 says no more
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["step_000001"]
    elsewhere = small_disk.parent / "run"
    shutil.copytree(output, elsewhere)
    assert len(losses(alone(inputs, elsewhere))) == 5


@pytest.mark.slow
def test_a_file_that_may_not_grow_leaves_the_checkpoint_before(inputs: Path, one: Path, tmp_path: Path) -> None:
    """Catches the same where the system refuses to write for another reason than space."""
    output = stop_after(2, one, tmp_path / "run")

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    status, errors = finish(start(overrides(inputs, output), ranks=1, preexec_fn=limit))
    assert status == 2 and "Traceback" not in errors
    (line,) = spoken(errors)
    assert "step_000004: the checkpoint could not be written" in line and "earlier ones are whole" in line
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["step_000002"]
    assert losses(alone(inputs, output)) == losses(one)


def test_runs_that_do_not_fit_their_directory(inputs: Path, one: Path, tmp_path: Path) -> None:
    """Catches another run's checkpoints that are continued or overwritten.

    Also tracebacks of damaged ones; nothing of them may change.
    """
    before = {path: path.stat().st_mtime_ns for path in sorted((one / "checkpoints").rglob("*"))}
    other = shutil.copytree(inputs, tmp_path / "other")
    shutil.rmtree(other / "checkpoint")
    write_checkpoint(other / "checkpoint", ffn_size=64)
    cases: list[tuple[Path, tuple[str, ...], str]] = [
        (
            inputs,
            ("seed=1",),
            "step_000005 belongs to a run with seed=0; resume with that seed or choose another output_dir",
        ),
        (inputs, ("resume=never",), "step_000005 exists and resume=never was given; choose another output_dir"),
        (other, (), r"step_000005 holds another architecture \(it differs in language.ffn_hidden_size\)"),
        (inputs, (TP2,), r"1 ranks cannot be laid out with parallel.tp=2"),
    ]
    for where, settings, message in cases:
        with pytest.raises(CordError, match=message):
            alone(where, one, *settings)
    assert {path: path.stat().st_mtime_ns for path in sorted((one / "checkpoints").rglob("*"))} == before
    for number, (name, content, message) in enumerate(
        [
            (
                "__0_0.distcp",
                b"",
                r"step_000002 is damaged \(__0_0.distcp has 0 of \d+ bytes\), and no earlier checkpoint is whole",
            ),
            ("state.json", b"{", "step_000002 is damaged .state.json has 1 of"),
            ("manifest.json", b"{}", "step_000002 is damaged .manifest.json cannot be read"),
        ]
    ):
        damaged = stop_after(2, one, tmp_path / f"damaged{number}")
        (damaged / "checkpoints" / "step_000002" / name).write_bytes(content)
        with pytest.raises(CordError, match=message):
            alone(inputs, damaged)


def test_data_that_cannot_be_trained_on(inputs: Path, tmp_path: Path) -> None:
    """Catches a run that starts on data that it cannot use, and a message that does not name the file or the sample."""
    cases = {
        "gone": "shard-000001.tar is missing",
        "short": "shard-000001.tar has .* truncated",
        "none": "has no manifest.json",
    }
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
    """Catches a configuration error of the entry point that is no single line on standard error.

    Also another status than 2.
    """
    status, errors = finish(start(overrides(inputs, tmp_path / "run", "optimizer.learning_rat=1"), ranks=1))
    assert status == 2 and errors.startswith("error: unknown key 'optimizer.learning_rat'") and errors.count("\n") == 1


def test_a_layout_that_does_not_divide_the_model(inputs: Path, tmp_path: Path) -> None:
    """Catches a shape error of some matrix in place of the heads that two ranks cannot share."""
    shutil.copytree(inputs, tmp_path / "inputs")
    shutil.rmtree(tmp_path / "inputs" / "checkpoint")
    write_checkpoint(tmp_path / "inputs" / "checkpoint", heads=3, kv_heads=3, hidden_size=48)
    status, errors = run_forked(overrides(tmp_path / "inputs", tmp_path / "run", TP2), tmp_path / "log")
    assert (status, len(spoken(errors))) == (2, 1) and "Traceback" not in errors
    assert "parallel.tp=2 does not divide the language model's attention heads (3)" in errors
