"""A run that goes on with other settings: what is said and kept, what is refused, and what the numbers show."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_cord.data.shards.reader import ShardDataset
from megatron_cord.errors import CordError
from megatron_cord.report.page.overview import missing
from megatron_cord.report.run.reading import read_run
from megatron_cord.rollout.rollout_file import dump_files, read_rollouts
from megatron_cord.trainer.checkpoint.progress import MadeWith, Progress
from megatron_cord.trainer.settings_changes import schedule_of
from megatron_cord.trainer.start import Start
from megatron_cord.trainer.step.optimizer.config import OptimizerConfig, ParameterGroup
from megatron_cord.trainer.step.optimizer.schedule import RateSchedule
from tests.tiny_run import losses, make_samples, metrics, overrides, write_inputs, write_shards
from tests.trainer.fault_ranks import run_forked
from tests.trainer.runs.test_train import alone, saved, stop_after

LM, BFLOAT, PLAIN = "model.freeze=[language_model]", "model.dtype=bfloat16", "optimizer.distributed=false"
FEW = ("train.steps=4", "checkpoint.keep=0", "evaluation.samples=1", "optimizer.clip_norm=0")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def whole(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a run whose settings never change."""
    return alone(inputs, tmp_path_factory.mktemp("whole") / "run", *FEW)


def changes(run: Path) -> dict[str, Any]:
    """Return the last line of the run's changes."""
    line: dict[str, Any] = json.loads((run / "settings_changes.jsonl").read_text().splitlines()[-1])
    return line


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param((), (PLAIN,), marks=pytest.mark.slow),
        pytest.param((PLAIN,), (), marks=pytest.mark.slow),
        ((BFLOAT,), (BFLOAT, PLAIN)),
        pytest.param((BFLOAT, PLAIN), (BFLOAT,), marks=pytest.mark.slow),
        pytest.param((PLAIN,), (PLAIN,), marks=pytest.mark.slow),
    ],
)
def test_another_optimizer_goes_on_with_the_same_states(
    inputs: Path, tmp_path: Path, before: Sequence[str], after: Sequence[str]
) -> None:
    """Catches a good checkpoint that is called damaged, and moments or fp32 weights that are lost on the way."""
    run = alone(inputs, tmp_path / "run", *FEW, *before)
    changed = alone(inputs, stop_after(2, run, tmp_path / "changed"), *FEW, *after)
    for got, wanted in zip(losses(changed), losses(run), strict=True):
        assert got == pytest.approx(wanted, rel=1e-6)


def test_a_part_may_be_frozen_and_trained_again(
    inputs: Path, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a refusal, a frozen part that moves, one that never moves again, and a teacher that changes with it."""
    run = stop_after(2, whole, tmp_path / "run")
    with caplog.at_level(logging.INFO):
        alone(inputs, run, *FEW, LM)
    assert "language_model is not trained any more: its optimizer states are dropped" in caplog.messages
    assert 'changed after step 2: model.freeze: [] → ["language_model"]' in caplog.messages
    assert changes(run)["changes"] == {"model.freeze": [[], ["language_model"]]} and changes(run)["step"] == 2
    weight = "language_model.output_layer.weight"
    at = {step: saved(run, step)[weight] for step in (2, 4)}
    assert torch.equal(at[2], at[4]) and metrics(run)[2]["kl"] == metrics(whole)[2]["kl"]
    with caplog.at_level(logging.INFO):
        alone(inputs, run, *FEW, "train.steps=6")
    assert "language_model is trained from now on: its optimizer states begin at zero" in caplog.messages
    assert not torch.equal(saved(run, 6)[weight], at[4]) and not any(line["skipped"] for line in metrics(run))


@pytest.mark.slow
def test_parts_are_frozen_and_trained_again_on_two_stages(inputs: Path, whole: Path, tmp_path: Path) -> None:
    """Catches ranks that disagree about what is read, such as a stage with nothing left to train."""
    run = stop_after(2, whole, tmp_path / "run")
    for number, more in enumerate([(LM, "train.steps=3"), ("train.steps=4",)]):
        settings = overrides(inputs, run, *FEW, "parallel.pp=2", *more)
        status, errors = run_forked(settings, tmp_path / f"log{number}")
        assert status == 0, errors
    assert len(losses(run)) == 4


def test_averages_begin_where_a_frozen_model_ends(inputs: Path, tmp_path: Path) -> None:
    """Catches a moving average that is refused, or empty, because the language model had none while it was frozen."""
    ema = ("teacher.mode=ema", "teacher.ema_decay=0.5")
    run = alone(inputs, tmp_path / "run", *FEW, *ema, LM, "train.steps=2")
    alone(inputs, run, *FEW, *ema)
    kept = saved(run, 4)
    name = "language_model.decoder.layers.self_attention.linear_proj.weight"
    assert 0 < (kept[f"teacher.{name}"] - kept[name]).abs().max() < 0.1


def test_damage_is_told_from_difference(inputs: Path, whole: Path, tmp_path: Path) -> None:
    """Catches advice to delete a whole checkpoint, and damage that is taken for another setting."""
    run = stop_after(2, whole, tmp_path / "run")
    with pytest.raises(CordError, match=r"holds no moving average; resume with the run's own teacher\.mode"):
        alone(inputs, run, *FEW, "teacher.mode=ema")
    part = run / "checkpoints" / "step_000002" / "__0_0.distcp"
    part.write_bytes(part.read_bytes()[:-9])
    with pytest.raises(CordError, match=r"step_000002 is damaged \(__0_0\.distcp has"):
        alone(inputs, run, *FEW, PLAIN)


@pytest.mark.slow
def test_a_jump_of_the_learning_rate_is_said_and_can_be_avoided(
    inputs: Path, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a jump without a line, and rates that are not those of the checkpoint where they shall be kept.

    Also a stop in between after which they are others.
    """
    longer = ("train.steps=8", "optimizer.learning_rate=1e-2")
    with caplog.at_level(logging.INFO):
        jumped = alone(inputs, stop_after(2, whole, tmp_path / "jumped"), *FEW, *longer)
    lines = [line for line in caplog.messages if line.startswith("changed after step 2: ")]
    assert [line.removeprefix("changed after step 2: ").split(" (")[0] for line in lines[:2]] == [
        "optimizer.learning_rate: 0.001 → 0.01",
        "train.steps: 4 → 8",
    ]
    rates = [line["learning_rate"] for line in metrics(jumped)]
    assert f"the learning rate of step 3 is {rates[2]:.4g}, not {metrics(whole)[2]['learning_rate']:.4g}" in lines[-1]
    assert "The settings changed after step 2: train.steps: 4 → 8." in missing(read_run(jumped))
    kept = alone(inputs, stop_after(2, whole, tmp_path / "kept"), *FEW, *longer, "optimizer.keep_schedule=true")
    assert losses(kept)[:4] == losses(whole)
    assert [line["learning_rate"] for line in metrics(kept)][4:] == pytest.approx([1e-4] * 4)
    again = alone(inputs, stop_after(6, kept, tmp_path / "again"), *FEW, *longer, "optimizer.keep_schedule=true")
    assert losses(again) == losses(kept)
    assert changes(kept)["notes"][-1] == "the learning rate stays at 0.0001 after step 4"


def test_rates_are_kept_by_group() -> None:
    """Catches a group whose rate is that of the configuration where the checkpoint's rates shall be kept.

    Also a new group with another peak than it is given, and one that has no rate of its own beside the kept ones.
    """
    adapter = ParameterGroup(learning_rate=4e-3)
    before = RateSchedule.of(OptimizerConfig(learning_rate=1e-3, schedule="wsd", groups={"adapter": adapter}), 10)
    undecayed = ParameterGroup(weight_decay=0.0)
    groups = {"adapter": adapter, "new": ParameterGroup(learning_rate=5e-2), "undecayed": undecayed}
    now = RateSchedule.of(OptimizerConfig(learning_rate=1e-2, groups=groups), 20)
    written = json.loads(json.dumps(asdict(before)))
    start = Start(Progress(3, 0.0, 0, 0, made_with=MadeWith(schedule=written)))
    kept = schedule_of(start, now, keep=True, own=["adapter", "new"])
    for step in (3, 9):
        assert kept.rate(step) == before.rate(step) and kept.rate(step, "adapter") == before.rate(step, "adapter")
    assert kept.rate(3, "new") == pytest.approx(5e-2) and kept.rate(3, "undecayed") == before.rate(3)
    assert schedule_of(start, now, keep=False, own=["adapter", "new"]) is now


def test_the_schedule_is_megatrons(inputs: Path, tmp_path: Path) -> None:
    """Catches a rate in a message that training does not use."""
    warm = ("optimizer.warmup_steps=2", "optimizer.final_learning_rate_fraction=0.2", "train.steps=5")
    run = alone(inputs, tmp_path / "run", *FEW, *warm)
    config = OptimizerConfig(learning_rate=1e-3, warmup_steps=2, final_learning_rate_fraction=0.2)
    schedule = RateSchedule.of(config, 5)
    wanted = [schedule.rate(step) for step in range(5)]
    assert [line["learning_rate"] for line in metrics(run)] == pytest.approx(wanted, rel=1e-6)


def ids_of(run: Path) -> list[str]:
    """Return the samples of the run's steps, in their order."""
    ids = []
    for path in dump_files(run / "rollouts").values():
        rows = read_rollouts(path, ["id", "position"]).to_pylist()
        ids += [row_id for _, row_id in sorted({(row["position"], row["id"]) for row in rows})]
    return ids


def test_another_batch_size_leaves_no_sample_out(
    inputs: Path, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches samples that are never trained on or come twice, also after the second change and a second stop."""
    with caplog.at_level(logging.INFO):
        run = alone(inputs, stop_after(2, whole, tmp_path / "run"), *FEW, "rollout.prompts_per_step=2")
    assert any("the data goes on after sample 8" in line for line in caplog.messages)
    alone(inputs, run, *FEW, "rollout.prompts_per_step=3", "train.steps=6")
    row = ids_of(alone(inputs, tmp_path / "one", *FEW, "train.steps=6"))
    assert ids_of(run) == row[: 4 + 4 + 2 + 2 + 3 + 3]


@pytest.mark.parametrize("what", ["question", "audio", "answer"])
def test_other_data_under_the_same_ids_is_refused(inputs: Path, whole: Path, tmp_path: Path, what: str) -> None:
    """Catches a run that goes on with other text, audio or answers, with a manifest and without."""
    data = tmp_path / "train"
    samples = make_samples(10, seed=1)
    if what == "audio":
        samples[3].waveform[:] *= -1
    else:
        object.__setattr__(samples[3], what, "what is four" if what == "question" else "4")
    write_shards(data, samples)
    run = stop_after(2, whole, tmp_path / "run")
    message = r"data\.train has other text, audio, answers or order .* but the run began with 10 usable samples"
    with pytest.raises(CordError, match=message):
        alone(inputs, run, *FEW, f"data.train={data}")
    assert alone(inputs, run, *FEW, f"data.train={shutil.copytree(inputs / 'train', tmp_path / 'same')}")
    first, second = (ShardDataset(f"{place}/*.tar").fingerprint for place in (data, inputs / "train"))
    assert first != second
