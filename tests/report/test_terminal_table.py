"""The table that ends a run on the terminal."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from megatron_cord.evaluation.files import heldout_file, read_result
from megatron_cord.evaluation.statistics import why_no_gap
from megatron_cord.report.terminal import evaluation_table
from tests.report.fixture import VOICES


def printed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(evaluation_table(before, after))
    return console.export_text().splitlines()


def evaluation(text: float, audio: float, **more: Any) -> dict[str, Any]:
    return {"samples": 250, "text_accuracy": text, "audio_accuracy": audio, **more}


def test_numbers(finished_run: Path) -> None:
    """Catches columns exchanged, a voice left out, and a gap that is not to the original text accuracy."""
    lines = printed(evaluation(0.98, 0.38), evaluation(0.96, 0.83))
    row = next(line for line in lines if line.split()[:1] == ["all"])
    assert re.split(r"\s{2,}", row.strip()) == ["all", "250", "98.0 → 96.0", "38.0 → 83.0", "60.0 → 15.0", "75 %"]
    before, after = (read_result(heldout_file(finished_run, step)) for step in (0, 100))
    text = "\n".join(printed(before, after))
    assert all(f" {voice} " in text for voice in VOICES) and "Held-out questions (60)" in text


def test_no_gap() -> None:
    """Catches a division by zero where hearing was as good as reading."""
    assert any("no gap" in line for line in printed(evaluation(0.9, 0.9), evaluation(0.9, 0.8)))


def test_nothing_right_is_no_gap_that_was_closed() -> None:
    """Catches a model that answers nothing and of which the table says that hearing was as good as reading."""
    lines = printed(evaluation(0.0, 0.0), evaluation(0.0, 0.1))
    assert any("none right" in line for line in lines) and not any("no gap" in line for line in lines)


@pytest.mark.parametrize(
    ("text", "audio", "words"),
    [(0.0, 0.0, "no answer was right"), (0.9, 0.9, "as good as reading"), (0.5, 0.6, "better than reading")],
)
def test_why_there_is_no_gap(text: float, audio: float, words: str) -> None:
    """Catches one sentence for three different things."""
    assert words in why_no_gap(text, audio)
