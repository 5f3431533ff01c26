"""The study of stale rollouts: its cells, and the tables of what is complete."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from examples.chains.staleness import Cell, cells, gather, study, tables, write
from megatron_cord.compare.config import CompareConfig
from megatron_cord.compare.kept import keep
from megatron_cord.compare.plan import PlannedRun, plan_runs
from megatron_cord.config.loading import dump_config, load_config
from megatron_cord.evaluation.files import heldout_file
from megatron_cord.runtime.files import write_json
from tests.tiny_run import ROOT


def write_finished(run: PlannedRun, audio: float) -> None:
    """Write what a complete run leaves."""
    run.directory.mkdir(parents=True)
    dump_config(run.config, run.directory / "config.yaml")
    drift = "stale_logprob_difference" if run.config.rollout.schedule.ahead else "engine_logprob_difference"
    rows = [{"kl": 0.2 if step > 10 else 9.0, "staleness": 1.0, drift: 0.05} for step in range(1, 31)]
    (run.directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = {"audio_accuracy_before": 0.5, "audio_accuracy_after": audio, "text_accuracy_after": 1.0, "seconds": 9}
    summary["steps"] = 30
    write_json(heldout_file(run.directory, 30), {"answers": []})
    (run.directory / "summary.json").write_text(json.dumps(summary))


def test_cells_are_runs_that_differ_in_what_is_studied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a cell that is missing or twice, L_seq that stays on, weights or staleness that a run does not get."""
    monkeypatch.chdir(ROOT)
    config = load_config(CompareConfig, "examples/chains/staleness.yaml", [f"output_dir={tmp_path}", "seeds=[0]"])
    runs = plan_runs(study(config, cells()))
    assert len(runs) == 21 == len({run.name for run in runs})
    for run, cell in zip(runs, cells(), strict=True):
        objective = run.config.objective
        assert run.method == cell.name and not objective.policy_gradient.enabled and run.ranks == 1
        assert (objective.divergence.kind, run.config.rollout.schedule.ahead) == (cell.divergence, cell.staleness)
        assert objective.token_weights.needs_ratio == cell.weighted
        assert run.config.rollout.schedule.on_weight_sync == "finish"


def test_tables_of_complete_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run in another's place, one that is not complete, the first steps' divergence, a page overwritten."""
    monkeypatch.chdir(ROOT)
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- staleness -->\nold\n<!-- /staleness -->\nafter\n")
    paths = [
        f"output_dir={tmp_path / 'runs'}",
        f"kept={tmp_path / 'kept'}",
        f"results={tmp_path}/staleness",
        f"chart={tmp_path}/drawn",
    ]
    given = load_config(CompareConfig, "examples/chains/staleness.yaml", [*paths, f"page={page}", "seeds=[0,1]"])
    config = study(given, cells())
    runs = plan_runs(config)
    for run in runs:
        if run.config.rollout.schedule.ahead in (0, 4):
            write_finished(run, 0.8 if run.method == "jsd-4-weighted" else 0.6)
            keep(run)
            shutil.rmtree(run.directory)  # as if it was made on another machine
    result = gather(config, runs)
    assert set(result["cells"]) == {cell.name for cell in cells() if cell.staleness in (0, 4)}
    cell = result["cells"][Cell("jsd", 4, True).name]
    assert (cell["audio"]["mean"], cell["kl"]["mean"], cell["drift"]["mean"]) == pytest.approx((0.8, 0.2, 0.05))
    shown = tables(result)
    assert result["runs"] == {"complete": 18, "planned": 42} and shown.startswith(
        "18 of 42 runs were made; seeds 0, 1;"
    )
    assert "| JSD | on | 60.0 (60.0 to 60.0) |  |  | 80.0 (80.0 to 80.0) |" in shown
    assert "| reverse KL | off | 60.0 (60.0 to 60.0) |  |  | 60.0 (60.0 to 60.0) |" in shown
    assert "| JSD | on |  |  |  | 20.0 (20.0 to 20.0) |" in shown
    write(result, config)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text and "drawn.png" in text
    assert (tmp_path / "drawn.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "staleness.json").read_text()) == json.loads(json.dumps(result))
