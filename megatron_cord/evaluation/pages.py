"""Results for people: Markdown for a note or a pull request, and one HTML file, which loads nothing and runs no script, with the answers side by side."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from megatron_cord.evaluation.results import WAYS, Row

_ASSETS = Path(__file__).parent / "assets"
_EXAMPLES = 60  # questions a set on the page


def write_pages(directory: Path, result: Mapping[str, Any], rows: Mapping[str, Sequence[Row]]) -> list[Path]:
    """Writes `results.json`, `results.md` and `results.html`, each complete or absent.

    Args:
        directory: of the evaluation.
        result: JSON values: model, sets, overall, forgetting.
        rows: of each set, for the examples.
    """
    contents = {
        "results.json": json.dumps(result, indent=1, ensure_ascii=False) + "\n",
        "results.md": markdown(result),
        "results.html": html(result, rows),
    }
    paths = []
    for name, content in contents.items():
        path = directory / name
        partial = path.with_suffix(".partial")
        partial.write_text(content, encoding="utf-8")
        os.replace(partial, path)
        paths.append(path)
    return paths


def tables(result: Mapping[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, head and lines of each table that the result has something for."""
    sets = result["sets"]
    made = [
        ("Accuracy", ["set", "questions", "text", "audio", "gap", "p"], [_accuracy_line(n, r) for n, r in sets.items()])
    ]
    total = result["overall"]
    if len(total.get("sets", ())) > 1:
        made[0][2].append(["mean", "", percent(total["text"]), percent(total["audio"]), points(total["gap"]), ""])
    changes = {name: r["change"] for name, r in sets.items() if "gap_before" in r.get("change", {})}
    if changes:
        lines = [_gap_line(name, change) for name, change in changes.items()]
        if len(changes) > 1 and "change" in total:
            lines.append(_gap_line("mean", total["change"]))
        head = [
            "set",
            "gap before",
            "gap after",
            "gap closed",
            "audio: right now, not before",
            "audio: right before, not now",
            "p",
        ]
        made.append((f"The gap since {result['baseline']}, to its text accuracy", head, lines))
    if result["forgetting"]:
        lines = [
            [
                c["set"],
                c["way"],
                percent(c["before"]),
                percent(c["after"]),
                interval(c, points),
                p_value(c["p"]),
                "lost" if c["lost"] else "kept",
            ]
            for c in result["forgetting"]
        ]
        made.append(("Forgetting", ["set", "asked by", "before", "after", "change", "p", ""], lines))
    rejected = [[name, reason, str(count)] for name, r in sets.items() for reason, count in r["rejects"].items()]
    if rejected:
        made.append(("Not asked", ["set", "reason", "questions"], rejected))
    return made


def markdown(result: Mapping[str, Any]) -> str:
    """All tables."""
    parts = [f"# Evaluation of {result['model']}", ""]
    for title, head, lines in tables(result):
        parts += [f"## {title}", "", _row(head), _row(["---"] * len(head)), *map(_row, lines), ""]
    return "\n".join(
        [*parts, "Intervals: 95 %, paired bootstrap over questions. p: McNemar's exact test, two-sided.", ""]
    )


def html(result: Mapping[str, Any], rows: Mapping[str, Sequence[Row]]) -> str:
    """The page. What models said is untrusted text: the template escapes it."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_ASSETS), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    examples = {name: _examples(some) for name, some in rows.items()}
    return environment.get_template("results.html").render(
        result=result, tables=tables(result), examples=examples, ways=WAYS
    )


def percent(value: float) -> str:
    """A share: "72.4 %"."""
    return f"{100 * value:.1f} %"


def points(value: float) -> str:
    """A difference of shares, in percentage points: "+3.0"."""
    return f"{100 * value:+.1f}"


def p_value(value: float) -> str:
    """ "0.031", or "< 0.001"."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def interval(estimate: Mapping[str, Any] | None, show: Any = percent) -> str:
    """A value with its interval."""
    if estimate is None:
        return "–"
    if estimate.get("low") is None:
        return show(estimate["value"])
    low, high = (show(estimate[end]).removesuffix(" %") for end in ("low", "high"))
    return f"{show(estimate['value'])} [{low}, {high}]"


def _accuracy_line(name: str, result: Mapping[str, Any]) -> list[str]:
    gap = result.get("gap")
    return [
        name,
        str(result["samples"]),
        *(interval(result.get(way)) for way in WAYS),
        interval(gap, points),
        p_value(gap["p"]) if gap else "–",
    ]


def _gap_line(name: str, change: Mapping[str, Any]) -> list[str]:
    audio = change.get("audio")
    gaps = [
        interval(change["gap_before"], points),
        interval(change["gap_after"], points),
        interval(change["gap_closed"]),
    ]
    return [
        name,
        *gaps,
        *([str(audio["gained"]), str(audio["lost_answers"]), p_value(audio["p"])] if audio else ["", "", ""]),
    ]


def _examples(rows: Sequence[Row]) -> list[Row]:
    """The most telling first: right when read and wrong when heard, then other mistakes."""

    def rank(row: Row) -> int:
        text, audio = row.get("text_correct"), row.get("audio_correct")
        return 0 if text and audio is False else 1 if False in (text, audio) else 2

    return sorted(rows, key=rank)[:_EXAMPLES]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
