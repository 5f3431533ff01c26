"""The page that compares runs: one HTML file with styles, script and charts inside, which loads nothing."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from megatron_cord.errors import CordError
from megatron_cord.report.comparison.curves import accuracy_charts, metric_charts
from megatron_cord.report.comparison.questions import DividingQuestion, dividing_questions
from megatron_cord.report.comparison.results import results, set_tables
from megatron_cord.report.comparison.runs import check_runs, labels
from megatron_cord.report.comparison.settings import differing_settings
from megatron_cord.report.page.examples import load_clips
from megatron_cord.report.page.overview import facts
from megatron_cord.report.page.templates import asset, templates
from megatron_cord.report.page.writing import write_page
from megatron_cord.report.run.contents import RunContents
from megatron_cord.report.run.reading import read_run


def render_comparison(run_dirs: Sequence[Path], output: Path | None = None) -> Path:
    """Write the page of several runs, finished or not, and return its path.

    Args:
        run_dirs: the runs' output directories, the one to compare with first.
        output: the page's file; `comparison.html` beside the first run's directory if None.

    Raises:
        CordError: not a run directory, a damaged file in one, runs that cannot be compared, or an output that cannot be
            written.
    """
    check_runs(run_dirs)
    script = asset("shared/script.js")
    runs = [read_run(directory) for directory in run_dirs]
    questions = dividing_questions(runs)
    clips, silence = _clips(runs, questions)
    content = comparison(runs, questions, clips) | {
        "silence": silence,
        "style": Markup(asset("shared/style.css")),
        "script": Markup(script),
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    }
    page = templates().get_template("comparison/page.html").render(content)
    target = run_dirs[0].resolve().parent / "comparison.html" if output is None else output
    return write_page(target, page)


def comparison(
    runs: Sequence[RunContents], questions: Sequence[DividingQuestion], clips: Mapping[str, str]
) -> dict[str, Any]:
    """Return the content of comparison/content.html, and the title and facts of the page's head.

    Args:
        runs: the one to compare with first.
        questions: of `dividing_questions`.
        clips: addresses of their recordings by id.
    """
    names = labels([run.path for run in runs])
    few = len(runs) <= 3
    return {
        "name": " · ".join(names) if few else f"{len(runs)} runs",
        "facts": [f"{len(runs)} runs"] if few else names,
        "names": names,
        "runs": [
            {"name": name, "path": run.path, "facts": facts(run), "alerts": run.alerts, "changes": run.changes}
            for name, run in zip(names, runs, strict=True)
        ],
        "results": list(zip(names, results(runs), strict=True)),
        "sets": set_tables([run.path for run in runs]),
        "settings": differing_settings(runs),
        "questions": questions,
        "clips": clips,
        "silence": "",
        "accuracy": accuracy_charts(runs, names),
        "metrics": metric_charts(runs, names),
    }


def _clips(runs: Sequence[RunContents], questions: Sequence[DividingQuestion]) -> tuple[dict[str, str], str]:
    """Return the questions' recordings by id, from the first run's data that has them, and why some are missing."""
    clips: dict[str, str] = {}
    problem = ""
    for data in dict.fromkeys(str(run.setting("data.evaluation")) for run in runs):
        wanted = [item.question.id for item in questions if item.question.id not in clips]
        if wanted:
            try:
                clips |= load_clips(data, wanted)
            except CordError as error:
                problem = f"No audio: {error}. A relative path counts from where the page is made."
    return clips, problem if len(clips) < len(questions) else ""
