"""Tables of a comparison in Markdown: all methods, the ablation of CORD, and the budget."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from megatron_cord.compare.methods import ablation
from megatron_cord.errors import CordError


def page(result: dict[str, Any]) -> str:
    """Return the whole page of a result of ``results.gather``."""
    parts = [f"# {result['title']}", section(result)]
    parts.append(
        "Means over the seeds; in brackets 95 % intervals (Student's t over seeds). The difference is paired by seed. "
        "Of the questions of all seeds, so many were answered rightly by one of the two models alone; p is the exact "
        "sign test's."
    )
    return "\n\n".join(parts) + "\n"


def section(result: dict[str, Any]) -> str:
    """Return the budget, the tables, and the runs that failed."""
    parts = [budget(result), main_table(result)]
    if notes := result.get("notes"):  # older results have none
        parts.append("\n".join(f"- {note}" for note in notes))
    if table := divergence_table(result):
        parts.append("Reverse KL from the reading model in the heard answers, nats a token:\n\n" + table)
    if table := retention_table(result):
        parts.append("What training cost, by the runs' guards:\n\n" + table)
    if table := ablation_table(result):
        parts.append("What each part of CORD contributes:\n\n" + table)
    if failed := failures(result):
        parts.append("\n".join(failed))
    return "\n\n".join(parts)


def around(text: str, name: str) -> tuple[str, str]:
    """Return the parts of a page before and after its tables, with the marks ``<!-- name -->`` and ``<!-- /name -->``.

    Raises:
        CordError: the text does not have these marks, once and in this order.
    """
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise CordError(
            f"page: it needs the lines {begin} and {end}, once each and in this order, to put the tables between them"
        )
    return text.partition(begin)[0] + begin, end + text.partition(end)[2]


def insert(text: str, name: str, result: dict[str, Any], chart: str) -> str:
    """Return a page's text with the section of this result in its place, and the drawing under it.

    Args:
        text: of the page.
        name: of the place.
        result: of ``results.gather``.
        chart: the drawing's path as the page links it.

    Raises:
        CordError: as ``around``.
    """
    before, after = around(text, name)
    drawing = f"![{result['title']}: the share of the gap that each method closed]({chart})"
    return f"{before}\n\n{section(result)}\n\n{drawing}\n\n{after}"


def budget(result: dict[str, Any]) -> str:
    """Return the budget of every run, in a sentence."""
    given = result["budget"]
    seeds = sorted({int(seed) for method in result["methods"].values() for seed in method["runs"]})
    if not given:
        return "Nothing has run yet."
    return (
        f"{given['steps']} steps of {given['prompts']} prompts, answers of at most {given['max_new_tokens']} tokens, "
        f"{'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}, "
        f"on {machines(_machines(result))}."
    )


def machines(by_run: Mapping[str, Mapping[str, Any]]) -> str:
    """Name the machines of runs in words; with the runs of each, where there are several.

    Args:
        by_run: {processor, cores} by the run's name.
    """
    runs: dict[str, list[str]] = {}
    for name, machine in by_run.items():
        runs.setdefault(f"{machine['cores']} cores of {machine['processor']}", []).append(name)
    shown = list(runs) if len(runs) == 1 else [f"{words} ({', '.join(names)})" for words, names in runs.items()]
    return "; ".join(shown)


def _machines(result: dict[str, Any]) -> dict[str, Any]:
    """Return the machine of each run; older results have one for all."""
    return {
        f"{name} {seed}": run.get("machine", result["machine"])
        for name, method in result["methods"].items()
        for seed, run in method["runs"].items()
    }


def main_table(result: dict[str, Any]) -> str:
    """Return the table of accuracies from text and from audio, and the share of the gap closed, by method."""
    reference = result["methods"][result["reference"]]["title"]
    head = [
        "",
        "text",
        "audio",
        "by seed",
        "gap closed",
        f"{reference} minus this, points",
        f"only {reference} / only this right (p)",
    ]
    head += ["responses a step: trained (sampled)", "s"]
    before = result["before"]
    rows = [["before training", _share(before["text_accuracy"]), _share(before["audio_accuracy"]), *[""] * 6]]
    for method in result["methods"].values():
        runs = dict(sorted(method["runs"].items(), key=lambda item: int(item[0])))
        by_seed = [
            "failed" if "failure" in run else f"{100 * run['audio_accuracy_after']:.1f}" for run in runs.values()
        ]
        row = [
            method["title"],
            _share(method["text_accuracy"], interval=False),
            _share(method["audio_accuracy"]),
            ", ".join(by_seed),
            _share(method["gap_closed"], digits=0),
            _points(method.get("difference")),
            _split(method.get("questions")),
            "" if method["responses"] is None else "{trained} ({sampled})".format(**method["responses"]),
            "" if method["seconds"] is None else f"{method['seconds']['mean']:.0f}",
        ]
        rows.append(row)
    return _markdown(head, rows)


def divergence_table(result: dict[str, Any]) -> str:
    """Return the table of the heard answers' divergences before and after training; empty if no run measured them."""
    measured = {m["title"]: m for m in result["methods"].values() if m.get("divergence")}  # older results have none
    if not measured:
        return ""
    rows = []
    for title, method in measured.items():
        runs = [method["runs"][seed] for seed in sorted(method["runs"], key=int)]
        before, after = (
            [f"{run[key]:.3f}" for run in runs if run.get(key) is not None]
            for key in ("divergence_before", "divergence_after")
        )
        rows.append([title, f"{method['divergence']['mean']:.3f}", ", ".join(before), ", ".join(after)])
    return _markdown(["", "after, mean", "before, by seed", "after, by seed"], rows)


def retention_table(result: dict[str, Any]) -> str:
    """Return the table of what the runs' guards measured: before training, after it, and lost; empty without guards."""
    guarded = [method for method in result["methods"].values() if method.get("guards")]  # older results have none
    names = list(dict.fromkeys(name for method in guarded for name in method["guards"]))
    if not names:
        return ""
    head = ["", *(cell for name in names for cell in (f"{name}: before", "after", "lost, points"))]
    rows = []
    for method in guarded:
        cells = [method["title"]]
        for name in names:
            found = method["guards"].get(name, {})
            before, after = (_share(found.get(key), interval=False) for key in ("before", "accuracy"))
            cells += [before, after, _points(found.get("drop"))]
        rows.append(cells)
    return _markdown(head, rows)


def ablation_table(result: dict[str, Any]) -> str:
    """Return the table of CORD without some of its parts; empty if no part of it was run."""
    methods = result["methods"]
    names = ablation(list(methods))
    if len(names) < 2:
        return ""
    rows = [
        [
            method["ablates"],
            _share(method["audio_accuracy"]),
            _share(method["gap_closed"], digits=0),
            _points(method.get("difference")),
        ]
        for method in (methods[name] for name in names)
    ]
    head = ["trained with", "audio", "gap closed", f"{methods[result['reference']]['title']} minus this, points"]
    return _markdown(head, rows)


def failures(result: dict[str, Any]) -> list[str]:
    """Return a line for each run that has no result."""
    return [
        f"- {method['title']}, seed {seed}, failed: {run['failure']}"
        for method in result["methods"].values()
        for seed, run in method["runs"].items()
        if "failure" in run
    ]


def _share(mean: dict[str, Any] | None, *, digits: int = 1, interval: bool = True) -> str:
    """Format a share: "84.0 % (78.1 to 89.9)"."""
    if mean is None:
        return "–"
    middle = f"{100 * mean['mean']:.{digits}f} %"
    return middle if mean["low"] is None or not interval else f"{middle} ({_range(mean, digits)})"


def _points(mean: dict[str, Any] | None) -> str:
    if mean is None:
        return ""
    middle = f"{100 * mean['mean']:+.1f}"
    return middle if mean["low"] is None else f"{middle} ({_range(mean, 1)})"


def _range(mean: dict[str, Any], digits: int) -> str:
    return f"{100 * mean['low']:.{digits}f} to {100 * mean['high']:.{digits}f}"


def _split(test: dict[str, Any] | None) -> str:
    if test is None:
        return ""
    p = "p < 0.001" if test["p"] < 0.001 else f"p = {test['p']:.2g}" if test["p"] < 0.1 else f"p = {test['p']:.2f}"
    return f"{test['first']} / {test['second']} ({p})"


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(re.sub(r"  +", " ", f"| {' | '.join(cells)} |") for cells in lines)
