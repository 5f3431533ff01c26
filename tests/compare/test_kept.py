"""Runs that outlive their directories: what comes back, and what is refused."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_cord.compare import kept, tables
from megatron_cord.compare.config import CompareConfig
from megatron_cord.compare.kept import is_complete, keep, read_finished
from megatron_cord.compare.plan import PlannedRun, plan_runs
from megatron_cord.compare.results import gather
from megatron_cord.compare.running import Listener, Outcome, Runner
from megatron_cord.config.loading import dump_config
from megatron_cord.errors import CordError
from megatron_cord.evaluation.files import heldout_file
from megatron_cord.runtime.files import write_json
from megatron_cord.trainer.evaluation import summarize

SETS = "evaluation.sets={speaker: {path: questions.jsonl}}"
SETTINGS = ("model.checkpoint=x", "data.train=x", "data.evaluation=x", "train.steps=30", SETS)


@pytest.fixture
def comparison(tmp_path: Path) -> Callable[..., tuple[CompareConfig, list[PlannedRun]]]:
    """Plan a comparison of two methods, whose runs are kept."""

    def make(*more: str, output: str = "out") -> tuple[CompareConfig, list[PlannedRun]]:
        config = CompareConfig(
            "/dev/null", str(tmp_path / output), methods=("sft", "cord"), seeds=(0,), kept=str(tmp_path / "kept"),
            settings=(*SETTINGS, *more),
        )  # fmt: skip
        return config, plan_runs(config)

    return make


def write_run(run: PlannedRun, right: int) -> None:
    """Write what a finished run leaves, with so many of ten questions right after training."""
    before, after = ({"text_accuracy": 1.0, "audio_accuracy": share, "samples": 10} for share in (0.2, right / 10))
    drop = {"before": 0.9, "accuracy": 0.7, "drop": 0.2, "low": 0.1, "high": 0.3, "samples": 10, "held": False}
    dump_config(run.config, run.directory / "config.yaml")
    summary = summarize(before, after, seconds=30.0, tp=1, steps=30) | {"guards": {"speaker": drop}, "guard": None}
    write_json(run.directory / "summary.json", summary)
    rows: list[dict[str, Any]] = [{"id": f"q{i}", "audio_correct": i < right, "text_correct": True} for i in range(10)]
    last = heldout_file(run.directory, 30)
    for path, divergence in ((heldout_file(run.directory, 0), 0.75), (last, right / 10)):
        rows[0]["token_kl"], rows[1]["token_kl"] = [divergence, None], [divergence, divergence + 0.3]
        write_json(path, {"answers": rows})
    write_json(last.with_name("speaker.json"), {"answers": [{"id": "s0", "audio_correct": True}]})
    metrics: list[dict[str, Any]] = [{"step": n, "kl": 1.0 if n <= 10 else 0.25, "why": None} for n in range(1, 31)]
    metrics[0]["reward"] = 0.5
    (run.directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))


def test_what_comes_back_is_what_was_there(comparison: Callable[..., tuple[CompareConfig, list[PlannedRun]]]) -> None:
    """Catches a value that is lost or another run's, the first steps' divergence, and a table that is another then."""
    config, runs = comparison()
    for run, right in zip(runs, (8, 6), strict=True):
        write_run(run, right)
    before = [read_finished(run) for run in runs]
    page = tables.page(gather(config, [Outcome(run) for run in runs]))
    for run in runs:
        keep(run)
        shutil.rmtree(run.directory)
    assert [is_complete(run) for run in runs] == [True, True] and [read_finished(run) for run in runs] == before
    assert tables.page(gather(config, [Outcome(run) for run in runs])) == page
    assert before[0].outcomes["heldout"]["audio"] == {f"q{i}": float(i < 8) for i in range(10)}
    assert before[0].outcomes["speaker"] == {"audio": {"s0": 1.0}}
    assert before[0].metrics["kl"] == {"steps": 30, "mean": pytest.approx(0.5), "last": 0.25}
    assert before[0].divergence == {"before": pytest.approx(0.85), "after": pytest.approx(0.9)}
    assert before[0].metrics["reward"] == {"steps": 1, "mean": 0.5} and "why" not in before[0].metrics
    assert "| CORD | 0.700 | 0.850 | 0.700 |" in page
    # What the guards measured is in the table of what training cost.
    assert (
        "| CORD | 90.0 % | 70.0 % | +20.0 |" in page and "2 / 0 (p = 0.50)" not in page and "0 / 2 (p = 0.50)" in page
    )


def test_the_place_of_a_run_does_not_matter_and_its_settings_do(
    comparison: Callable[..., tuple[CompareConfig, list[PlannedRun]]],
) -> None:
    """Catches a kept run made again elsewhere, and one of other settings or a damaged one taken for this."""
    (run, _) = comparison()[1]
    write_run(run, 8)
    keep(run)
    (elsewhere, _) = comparison(output="elsewhere")[1]
    assert is_complete(elsewhere) and not elsewhere.directory.exists()
    for output in ("out", "elsewhere"):
        with pytest.raises(CordError, match=r"sft-seed-0\.json\.gz is of a run with other settings; remove it"):
            is_complete(comparison("optimizer.learning_rate=1e-3", output=output)[1][0])
    assert elsewhere.kept is not None
    content = json.loads(gzip.decompress(elsewhere.kept.read_bytes()))
    del content["settings"]["train"]["watchdog_seconds"]  # as if it came with a later release
    elsewhere.kept.write_bytes(gzip.compress(json.dumps(content).encode()))
    assert is_complete(elsewhere)
    elsewhere.kept.write_bytes(b"{}")
    with pytest.raises(CordError, match=r"sft-seed-0\.json\.gz is no kept run \(.*remove it"):
        is_complete(elsewhere)


def test_machines_may_have_settings_of_their_own(
    comparison: Callable[..., tuple[CompareConfig, list[PlannedRun]]],
) -> None:
    """Catches a study over machines that makes runs again, takes those of any settings, or hides the difference."""
    config, _ = comparison()
    halves, wholes = (
        replace(config, machine_settings=(f"model.dtype={dtype}", f"alerts={{window: {window}}}"))
        for dtype, window in (("bfloat16", 20), ("float32", 30))
    )
    there, here = plan_runs(halves), plan_runs(wholes)
    write_run(there[0], 6)
    keep(there[0])
    write_run(here[1], 6)  # in the directory alone
    assert there[0].config != here[0].config and all(map(is_complete, (*there, *here)))
    notes = gather(wholes, [Outcome(run) for run in here])["notes"]
    assert notes == [
        "model.dtype was not the same: bfloat16 in sft 0; float32 in cord 0.",
        "alerts.window was not the same: 20 in sft 0; 30 in cord 0.",
    ]
    with pytest.raises(CordError, match="seed-0 holds a run with other settings"):
        is_complete(plan_runs(config)[1])
    other = replace(wholes, settings=(*wholes.settings, "optimizer.learning_rate=1e-3"))
    with pytest.raises(CordError, match="of a run with other settings"):
        is_complete(plan_runs(other)[0])
    for common in ("train.steps=1", "seed=1", "objective.policy_gradient.enabled=true", "train={steps: 1}"):
        with pytest.raises(CordError, match=r"machine_settings has .*, which the comparison sets itself"):
            replace(config, machine_settings=(common,))


def test_complete_runs_are_kept_and_not_made_again(
    comparison: Callable[..., tuple[CompareConfig, list[PlannedRun]]],
) -> None:
    """Catches a run that is found and not kept, one that is kept and started, and a file that changes on each call."""
    config, runs = comparison()
    for run in runs:
        write_run(run, 6)
    with Runner(config, runs, Listener()) as runner:
        assert all(outcome.found for outcome in runner.run())
    files = [run.kept for run in runs if run.kept is not None and run.kept.is_file()]
    assert len(files) == 2
    contents = [path.read_bytes() for path in files]
    shutil.rmtree(config.output_dir)
    with Runner(config, runs, Listener()) as runner:  # its trainer would fail: there is no checkpoint x
        assert all(outcome.found for outcome in runner.run())
    assert [path.read_bytes() for path in files] == contents and not Path(config.output_dir).exists()


def test_each_machine_is_named(
    comparison: Callable[..., tuple[CompareConfig, list[PlannedRun]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches figures of one machine shown as those of another."""
    config, runs = comparison()
    for run, name in zip(runs, ("Old", "New"), strict=True):
        write_run(run, 6)
        machine = {"processor": name, "cores": 2, "torch": "2", "python": "3"}
        monkeypatch.setattr(kept, "this_machine", machine.copy)
        keep(run)
    result = gather(config, [Outcome(run) for run in runs])
    assert tables.budget(result).endswith("on 2 cores of Old (sft 0); 2 cores of New (cord 0).")
    one = {name: read_finished(runs[0]).machine for name in "ab"}
    assert tables.machines(one) == "2 cores of Old"
