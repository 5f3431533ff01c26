"""What a run has gained and lost, beside the limits of its guards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_cord.errors import CordError
from megatron_cord.report.live.live import LiveRun
from megatron_cord.report.page.overview import facts
from megatron_cord.report.page.page import render
from megatron_cord.report.run.reading import read_run
from megatron_cord.report.run.retention import read_changes

GUARDS = {
    "text": {"set": "heldout", "max_drop": 0.05},
    "speaker": {"set": "speaker", "view": "hear", "max_drop": 0.25},
    "own": {"set": "speaker", "view": "hear", "max_drop": 0.25, "baseline": "elsewhere.json"},
}


def write_set(run: Path, step: int, right: int) -> None:
    rows: list[dict[str, Any]] = [{"id": f"q{i}", "audio_correct": i < right} for i in range(40)]
    result = {"step": step, "samples": 40, "audio_accuracy": right / 40, "answers": rows}
    (run / f"evaluations/step_{step:06d}/speaker.json").write_text(json.dumps(result))


def test_gained_and_lost(run_copy: Path, tmp_path: Path) -> None:
    """Catches a loss that is shown as a gain, another step than the one that the run has, a guard at another set.

    Also a page and a live page without the table.
    """
    for step, right in ((0, 40), (75, 38), (100, 12)):
        write_set(run_copy, step, right)
    heard, read, speaker = read_changes(run_copy, 0, 100, GUARDS)
    assert (heard.set, heard.view, heard.verdict, heard.limits) == ("heldout", "hear", "gained", ())
    value, low, high = heard.interval
    assert 0 < low < value < high and value == pytest.approx(heard.drop.accuracy - heard.drop.before)
    assert (read.view, read.verdict, read.interval) == ("read", "no difference shown", (0.0, 0.0, 0.0))
    assert [(limit.name, limit.held) for limit in read.limits] == [("text", True)]
    assert (speaker.view, speaker.verdict, speaker.interval[0]) == ("hear", "lost", -0.7)
    assert [(limit.name, limit.held) for limit in speaker.limits] == [("speaker", False), ("own", None)]
    assert read_changes(run_copy, 0, 75, None)[2].interval[0] == pytest.approx(-0.05)
    assert read_changes(run_copy, 0, 0, GUARDS) == ()

    (run_copy / "config.yaml").open("a").write(f"evaluation: {json.dumps({'guards': GUARDS})}\n")
    summary = json.loads((run_copy / "summary.json").read_text())
    guard = {"name": "speaker", "step": 100, "restored": 75}
    (run_copy / "summary.json").write_text(json.dumps(summary | {"ended_by": "guard", "guard": guard}))
    run = read_run(run_copy)
    assert run.outcome is not None and run.outcome.step == 75
    assert facts(run)[-1] == "ended by the guard speaker after step 100, back at step 75"
    for page in (render(run_copy, tmp_path / "page.html").read_text(), LiveRun(run_copy).overview()):
        assert "Gained and lost" in page and '<td class="figure">-5.0</td>' in page
        assert "speaker: at most −25.0, held; own: at most −25.0<" in page


def test_damaged_results_are_named(run_copy: Path) -> None:
    """Catches a traceback in place of the file, and of the guard."""
    for step in (0, 100):
        write_set(run_copy, step, 40)
    with pytest.raises(CordError, match=r"config\.yaml: evaluation\.guards\.text is damaged"):
        read_changes(run_copy, 0, 100, {"text": {"set": "heldout", "view": "read", "max_fall": 1}})
    (run_copy / "evaluations/step_000100/speaker.json").write_text('{"answers": [{"audio_correct": true}]}')
    with pytest.raises(CordError, match=r"step_000100/speaker\.json: its answers are damaged"):
        read_changes(run_copy, 0, 100, None)
