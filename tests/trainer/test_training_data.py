"""Runs on several sets: exact shares, resumed on other ranks, with other weights, and with data that was damaged."""

from __future__ import annotations

import json
import logging
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megatron_cord.errors import CordError
from megatron_cord.runtime import exit_status
from tests.tiny_run import losses, make_samples, metrics, overrides, write_checkpoint, write_shards
from tests.trainer.fault_ranks import Ranks, run_forked
from tests.trainer.runs.test_train import alone, stop_after
from tests.trainer.test_settings_changes import changes, ids_of

SIZES = {"a": 10, "b": 7, "c": 8}
WEIGHTS = {"a": 3, "b": 2, "c": 1}
STEPS, BATCH = 6, 4


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sets under their names, a checkpoint, and held-out samples."""
    directory = tmp_path_factory.mktemp("inputs")
    write_checkpoint(directory / "checkpoint")
    write_shards(directory / "heldout", make_samples(4, seed=9))
    for seed, (name, size) in enumerate(SIZES.items()):
        write_shards(directory / name, make_samples(size, seed=seed))
    return directory


def settings(inputs: Path, **weights: float) -> tuple[str, ...]:
    """Return the settings of the three sets: one with an index, one as a stream, one behind an address."""
    sets: dict[str, dict[str, Any]] = {
        "a": {"path": str(inputs / "a")},
        "b": {"path": str(inputs / "b"), "stream": True},
        "c": {"path": f"file://{inputs / 'c'}"},
    }
    chosen = {name: sets[name] | {"weight": weight} for name, weight in (weights or WEIGHTS).items()}
    return (
        f"data.train={json.dumps(chosen)}",
        f"data.cache_dir={inputs / 'cache'}",
        "data.shuffle_shards=2",
        f"train.steps={STEPS}",
        f"rollout.prompts_per_step={BATCH}",
        "checkpoint.interval=1",
        "checkpoint.keep=0",
        "evaluation.samples=1",
    )


def copy_of(inputs: Path, directory: Path) -> Path:
    """Return a copy of the sets, to be damaged."""
    shutil.copytree(inputs, directory, ignore=shutil.ignore_patterns("cache"))
    return directory


@pytest.fixture(scope="module")
def whole(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a run of all steps on one rank."""
    return alone(inputs, tmp_path_factory.mktemp("whole") / "run", *settings(inputs))


def test_sets_have_their_shares(whole: Path, inputs: Path) -> None:
    """Catches shares that are drawn, samples that come twice before others came, and metrics of other sets."""
    row = ids_of(whole)
    counts = Counter(name.partition("/")[0] for name in row)
    assert counts == {"a": 12, "b": 8, "c": 4} and len(row) == STEPS * BATCH
    for name, size in SIZES.items():
        own = [sample for sample in row if sample.startswith(f"{name}/")]
        assert all(len(set(own[at : at + size])) == len(own[at : at + size]) for at in range(0, len(own), size))
    last = metrics(whole)[-1]
    assert {name: last[f"data/{name}/samples"] for name in SIZES} == counts
    assert {name: last[f"data/{name}/epoch"] for name in SIZES} == {n: counts[n] / SIZES[n] for n in SIZES}
    record = json.loads((whole / "data.json").read_text())
    assert record["samples"] == 25 and {n: s["samples"] for n, s in record["sets"].items()} == SIZES
    assert not list((inputs / "cache").glob(".*.partial")) and len(list((inputs / "cache").glob("*.tar"))) == 3


@pytest.mark.slow
def test_resumed_at_any_step_with_other_workers_and_ranks(inputs: Path, whole: Path, tmp_path: Path) -> None:
    """Catches samples that are left out or come twice after a stop, and ranks that take each other's."""
    for step, workers in ((1, 0), (4, 3)):
        run = stop_after(step, whole, tmp_path / f"after{step}")
        again = overrides(inputs, run, *settings(inputs), f"data.workers={workers}")
        status, errors = run_forked(again, tmp_path / "log")
        assert status == 0, errors
        assert ids_of(run) == ids_of(whole)
        for got, wanted in zip(losses(run), losses(whole), strict=True):
            assert got == pytest.approx(wanted, rel=1e-4)


def test_other_weights_go_on_behind_what_was_taken(
    inputs: Path, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches shares that make up for the past, sets that begin again, and a change that nobody is told of.

    Also a set that is left out for a while and comes back with other content.
    """
    run = stop_after(3, whole, tmp_path / "run")
    with caplog.at_level(logging.INFO):
        alone(inputs, run, *settings(inputs, a=1, b=1), "train.steps=9")
    before, after = ids_of(run)[: 3 * BATCH], ids_of(run)[3 * BATCH :]
    assert before == ids_of(whole)[: 3 * BATCH]
    assert Counter(name.partition("/")[0] for name in after) == {"a": 12, "b": 12}
    assert changes(run)["changes"]["data.train.a.weight"] == [3.0, 1.0]
    taken = [sample for sample in before + after if sample.startswith("a/")]
    assert all(len(set(taken[at : at + 10])) == len(taken[at : at + 10]) for at in range(0, len(taken), 10))
    assert any("each set goes on after what was taken of it: a 6, b 4, c 2" in line for line in caplog.messages)
    with pytest.raises(CordError, match=r"data\.train is one set without a name, but the run began with the sets a, b"):
        alone(inputs, run, *settings(inputs), f"data.train={inputs / 'a'}", "train.steps=9")
    other = copy_of(inputs, tmp_path / "other")
    shutil.rmtree(other / "c")
    write_shards(other / "c", make_samples(8, seed=6))
    with pytest.raises(CordError, match=r"data\.train\.c has other text, audio, answers or order"):
        alone(other, run, *settings(other), "train.steps=10")
    shutil.rmtree(other / "b")
    write_shards(other / "b", make_samples(7, seed=5))
    with pytest.raises(CordError, match=r"data\.train\.b has other text, audio, answers or order"):
        alone(other, run, *settings(other, a=1, b=1), "train.steps=9")
    with pytest.raises(CordError, match=r"data\.train\.b is read as a stream, with data\.shuffle_shards=3, but"):
        alone(inputs, run, *settings(inputs, a=1, b=1), "train.steps=9", "data.shuffle_shards=3")


def test_damage_is_the_same_on_all_ranks_and_after_a_stop(inputs: Path, whole: Path, tmp_path: Path) -> None:
    """Catches ranks whose samples differ once a shard is gone, and a row that depends on ranks or on when it came back.

    Also damage that is not counted, and a sample in the place of another that the teacher has not answered.
    """
    data = copy_of(inputs, tmp_path / "data")
    lost = {name: (data / name / "shard-000001.tar").read_bytes() for name in ("a", "b", "c")}
    row = ids_of(whole)
    allowed = (*settings(data), "data.max_skipped=0.6", f"data.cache_dir={tmp_path / 'cache'}")
    runs = [stop_after(2, whole, tmp_path / name) for name in ("one", "two")]
    for name in ("b", "c"):
        (data / name / "shard-000001.tar").unlink()
    alone(data, runs[0], *allowed, "train.steps=5", "data.workers=0")
    status, errors = run_forked(overrides(data, runs[1], *allowed, "train.steps=5"), tmp_path / "log")
    assert status == 0, errors
    taken = ids_of(runs[0])
    assert taken == ids_of(runs[1]) and taken[: 2 * BATCH] == row[: 2 * BATCH]
    gone = {f"b/s1-{number}" for number in (3, 4, 5)} | {f"c/s2-{number}" for number in (3, 4, 5)}
    replaced = [at for at in range(2 * BATCH, 5 * BATCH) if row[at] in gone]
    assert replaced and all((taken[at] != row[at]) == (at in replaced) for at in range(5 * BATCH))
    assert all(taken[at].partition("/")[0] == row[at].partition("/")[0] for at in replaced)
    for run in runs:
        record = json.loads((run / "data.json").read_text())
        assert record["damaged_during_the_run"] == {"b": 3, "c": 3}
        assert metrics(run)[-1]["damaged_samples"] == 6.0 and metrics(run)[1].get("damaged_samples") is None
    for name, content in lost.items():
        (data / name / "shard-000001.tar").write_bytes(content)
    alone(data, runs[0], *allowed, "train.steps=8")
    assert not gone & set(ids_of(runs[0])[5 * BATCH :])
    assert json.loads((runs[0] / "data.json").read_text())["found"][0]["message"].count("shard-000001.tar")


def test_too_much_damage_saves_first_and_ends_all_ranks(inputs: Path, whole: Path, tmp_path: Path) -> None:
    """Catches a rank that waits for another, steps that are lost, and a run that cannot go on once data is back."""
    data = copy_of(inputs, tmp_path / "data")
    shard = data / "b" / "shard-000001.tar"
    content = shard.read_bytes()
    run = stop_after(2, whole, tmp_path / "run")
    shard.unlink()
    rare = (*settings(data), "checkpoint.interval=0", f"data.cache_dir={tmp_path / 'cache'}", "data.workers=0")
    ranks = Ranks(overrides(data, run, *rare), tmp_path / "log")
    assert ranks.statuses(120) == [exit_status.USER_ERROR] * 2
    (line,) = [line for line in ranks.log.read_text().splitlines() if line.startswith("error: ")]
    assert "shard-000001.tar" in line and "is missing" in line
    steps = len(metrics(run))
    assert (run / "checkpoints" / f"step_{steps:06d}").is_dir() and 2 <= steps < STEPS
    shard.write_bytes(content)
    alone(data, run, *rare)
    assert ids_of(run) == ids_of(whole)
