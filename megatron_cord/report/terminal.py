"""The result of a run as a table for the terminal, 80 characters wide at most unless a voice has a long name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from megatron_cord.evaluation.statistics import gap_closed, standard_error


def evaluation_table(before: Mapping[str, Any], after: Mapping[str, Any]) -> Table:
    """Return a table of text and audio accuracy, the gap, and the share closed, over all questions and by voice.

    Args:
        before: the evaluation before training, as in ``evaluations/step_000000/heldout.json``; of it ``samples``,
            ``text_accuracy``, ``audio_accuracy`` and ``groups`` (voices) are read.
        after: the evaluation after training, of the same questions.
    """
    samples = after["samples"]
    error = max(standard_error(row["audio_accuracy"], samples) for row in (before, after))
    table = Table(
        title=f"Held-out questions ({samples})",
        caption=f"Standard error of the audio accuracy: up to {100 * error:.1f} points.\n"
        "Gaps are to the text accuracy before training.",
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE,
    )
    table.add_column("voice")
    for name in ("n", "reading, %", "hearing, %", "gap, points", "gap closed"):
        table.add_column(name, justify="right", no_wrap=True)
    voices = [voice for voice in before.get("groups") or {} if voice in (after.get("groups") or {})]
    table.add_row("all", *_cells(before, after), style="bold", end_section=bool(voices))
    for voice in voices:
        table.add_row(escape(voice), *_cells(before["groups"][voice], after["groups"][voice]))
    return table


def _cells(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[str, ...]:
    text = before["text_accuracy"]
    no_gap = "no gap" if max(text, before["audio_accuracy"]) else "none right"
    closed = gap_closed(text, before["audio_accuracy"], after["audio_accuracy"])
    return (
        str(after["samples"]),
        _change(text, after["text_accuracy"]),
        _change(before["audio_accuracy"], after["audio_accuracy"]),
        _change(text - before["audio_accuracy"], text - after["audio_accuracy"]),
        no_gap if closed is None else f"{100 * closed:.0f} %",
    )


def _change(before: float, after: float) -> str:
    return f"{100 * before:.1f} → {100 * after:.1f}"
