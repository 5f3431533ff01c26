"""The result of a run as a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from megatron_cord.report.gap import gap_closed, standard_error


def evaluation_table(before: Mapping[str, Any], after: Mapping[str, Any]) -> Table:
    """Accuracy reading and hearing, the gap, and how much of it was closed, over all held-out questions and for each voice.

    Args:
        before: the evaluation before training, as in ``evaluations/step_000000.json``; of it ``samples``, ``text_accuracy``,
            ``audio_accuracy`` and ``voices`` are read.
        after: the evaluation after training, of the same questions.
    """
    samples = after["samples"]
    error = max(standard_error(row["audio_accuracy"], samples) for row in (before, after))
    table = Table(
        title=f"Held-out questions ({samples})",
        caption=f"Standard error of the audio accuracy: up to {100 * error:.1f} points. Gaps are to the text accuracy before training.",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("")
    for name in ("questions", "text before", "after", "audio before", "after", "gap before", "after", "gap closed"):
        table.add_column(name, justify="right")
    voices = [voice for voice in before.get("voices") or {} if voice in (after.get("voices") or {})]
    table.add_row("all", *_cells(before, after), style="bold", end_section=bool(voices))
    for voice in voices:
        table.add_row(voice, *_cells(before["voices"][voice], after["voices"][voice]))
    return table


def _cells(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[str, ...]:
    text = before["text_accuracy"]
    accuracies = (text, after["text_accuracy"], before["audio_accuracy"], after["audio_accuracy"])
    gaps = (text - before["audio_accuracy"], text - after["audio_accuracy"])
    closed = gap_closed(text, before["audio_accuracy"], after["audio_accuracy"])
    return (
        str(after["samples"]),
        *(f"{100 * accuracy:.1f} %" for accuracy in accuracies),
        *(f"{100 * gap:.1f}" for gap in gaps),
        "no gap" if closed is None else f"{100 * closed:.0f} %",
    )
