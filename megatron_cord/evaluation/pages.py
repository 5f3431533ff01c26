"""Pages of results: Markdown, and one HTML file with the answers side by side.

The HTML page loads nothing and runs no script; recordings are inside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from megatron_cord.evaluation.questions import Question
from megatron_cord.evaluation.recordings import load_recordings
from megatron_cord.evaluation.results import MODALITIES, Row
from megatron_cord.runtime.files import write_atomic, write_json

_ASSETS = Path(__file__).parent / "assets"
_EXAMPLES = 60  # questions a set on the page
_GAP_HEAD = [
    "set",
    "gap before",
    "gap after",
    "gap closed",
    "audio: right now, not before",
    "audio: right before, not now",
    "p",
]

Table = tuple[str, list[str], list[list[str]]]  #: title, head, lines


def write_pages(
    directory: Path,
    result: Mapping[str, Any],
    rows: Mapping[str, Sequence[Row]],
    questions: Mapping[str, Sequence[Question]],
    players: int,
) -> None:
    """Write `results.json`, `results.md` and `results.html`, each complete or not at all.

    Args:
        directory: of the evaluation.
        result: JSON values: model, step, baseline, sets, overall, forgetting.
        rows: of each set, for the examples.
        questions: of each set, for their recordings.
        players: questions of each set that the page can play, at most.
    """
    write_json(directory / "results.json", result)
    write_atomic(directory / "results.md", markdown(result))
    write_atomic(directory / "results.html", html(result, rows, questions, players))


def tables(result: Mapping[str, Any]) -> list[Table]:
    """Return title, head and lines of each table that the result has something for."""
    sets, total = result["sets"], result["overall"]
    lines = [_accuracy_line(name, found) for name, found in sets.items()]
    if len(total.get("sets", ())) > 1:
        lines.append(["mean", "", *_shares(total), ""])
    made: list[Table] = [("Accuracy", ["set", "questions", "text", "audio", "gap", "p"], lines)]
    groups = [
        [name, group, str(found["samples"]), *_shares(found)]
        for name, result_of_set in sets.items()
        for group, found in result_of_set["groups"].items()
    ]
    if groups:
        made.append(("Groups", ["set", "group", "questions", "text", "audio", "gap"], groups))
    measures = [
        [name, measure, *(f"{by[modality]:.3f}" if modality in by else "–" for modality in MODALITIES)]
        for name, result_of_set in sets.items()
        for measure, by in result_of_set.get("measures", {}).items()
    ]
    if measures:
        made.append(("Measures of the sets' own rules", ["set", "mean of", "text", "audio"], measures))
    changes = {name: found["change"] for name, found in sets.items() if "gap_before" in found.get("change", {})}
    if changes:
        lines = [_gap_line(name, change) for name, change in changes.items()]
        if len(changes) > 1 and "change" in total:
            lines.append(_gap_line("mean", total["change"]))
        made.append((f"The gap since {result['baseline']}, to its text accuracy", _GAP_HEAD, lines))
    if result["forgetting"]:
        head = ["set", "asked as", "before", "after", "change", "p", ""]
        made.append(("Forgetting", head, [_forgetting_line(check) for check in result["forgetting"]]))
    if guards := result.get("guards"):
        head = ["guard", "set", "view", "before", "now", "dropped by", "limit", "decides", ""]
        made.append(("Guards", head, [_guard_line(name, guard) for name, guard in guards.items()]))
    rejected = [[name, why, str(count)] for name, found in sets.items() for why, count in found["rejects"].items()]
    if rejected:
        made.append(("Left out", ["set", "reason", "questions"], rejected))
    return made


def markdown(result: Mapping[str, Any]) -> str:
    """Return all tables in Markdown."""
    parts = [f"# Evaluation of {result['model']}", ""]
    for title, head, lines in tables(result):
        parts += [f"## {title}", "", _row(head), _row(["---"] * len(head)), *map(_row, lines), ""]
    return "\n".join(
        [*parts, "Intervals: 95 %, paired bootstrap over questions. p: McNemar's exact test, two-sided.", ""]
    )


def html(
    result: Mapping[str, Any],
    rows: Mapping[str, Sequence[Row]],
    questions: Mapping[str, Sequence[Question]],
    players: int,
) -> str:
    """Return the page, for arguments see `write_pages`. Responses are untrusted text: the template escapes them."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_ASSETS), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    examples = {name: _examples(some) for name, some in rows.items()}
    return environment.get_template("results.html").render(
        result=result,
        tables=tables(result),
        examples=examples,
        modalities=MODALITIES,
        recordings=load_recordings(examples, questions, players),
    )


def percent(value: float) -> str:
    """Format a share: "72.4 %"."""
    return f"{100 * value:.1f} %"


def points(value: float) -> str:
    """Format a difference of shares in percentage points: "+3.0"."""
    return f"{100 * value:+.1f}"


def p_value(value: float) -> str:
    """Format a p-value: "0.031", or "< 0.001"."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def interval(estimate: Mapping[str, Any] | None, show: Callable[[float], str] = percent) -> str:
    """Format a value with its interval."""
    if estimate is None:
        return "–"
    if estimate.get("low") is None:
        return show(estimate["value"])
    low, high = (show(estimate[end]).removesuffix(" %") for end in ("low", "high"))
    return f"{show(estimate['value'])} [{low}, {high}]"


def _shares(found: Mapping[str, Any]) -> list[str]:
    """Return text accuracy, audio accuracy and gap of a group or a mean."""
    formats = {"text_accuracy": percent, "audio_accuracy": percent, "gap": points}
    return [show(found[key]) if key in found else "–" for key, show in formats.items()]


def _accuracy_line(name: str, result: Mapping[str, Any]) -> list[str]:
    estimates = result["estimates"]
    gap = estimates.get("gap")
    accuracies = (interval(estimates.get(modality)) for modality in MODALITIES)
    return [name, str(result["samples"]), *accuracies, interval(gap, points), p_value(gap["p"]) if gap else "–"]


def _gap_line(name: str, change: Mapping[str, Any]) -> list[str]:
    audio = change.get("audio")
    gaps = [interval(change[key], points) for key in ("gap_before", "gap_after")] + [interval(change["gap_closed"])]
    questions = [str(audio["gained"]), str(audio["lost_answers"]), p_value(audio["p"])] if audio else ["", "", ""]
    return [name, *gaps, *questions]


def _forgetting_line(check: Mapping[str, Any]) -> list[str]:
    shares = [percent(check["before"]), percent(check["after"]), interval(check, points), p_value(check["p"])]
    return [check["set"], check["modality"], *shares, "lost" if check["lost"] else "kept"]


def _guard_line(name: str, guard: Mapping[str, Any]) -> list[str]:
    place = [name, guard["set"], guard["view"]]
    if guard["held"] is None:
        return [*place, "–", "–", "–", "–", "–", "not checked"]
    drop = interval({"value": guard["drop"], "low": guard["low"], "high": guard["high"]}, points)
    measured = [percent(guard["before"]), percent(guard["accuracy"]), drop, points(guard["max_drop"])]
    return [*place, *measured, guard["decides"], "held" if guard["held"] else "beyond the limit"]


def _examples(rows: Sequence[Row]) -> list[Row]:
    """Return the most telling questions first: right from the text and wrong from the audio, then other mistakes."""

    def rank(row: Row) -> int:
        text, audio = row.get("text_correct"), row.get("audio_correct")
        return 0 if text and audio is False else 1 if False in (text, audio) else 2

    return sorted(rows, key=rank)[:_EXAMPLES]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
