"""The report of a run: one HTML page with styles, script, charts and audio inside, which loads nothing.

The page's policy (a Content-Security-Policy in its head) forbids every request and every script but the one whose hash
it names. Responses are untrusted text: the template escapes them. It simplifies: the page is drawn whole each time.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from pathlib import Path

from markupsafe import Markup

from megatron_cord.errors import CordError
from megatron_cord.report.page.examples import AUDIO_BUDGET, QUOTAS, choose_examples, load_clips, training_groups
from megatron_cord.report.page.overview import missing, overview
from megatron_cord.report.page.templates import asset, templates
from megatron_cord.report.page.writing import write_page
from megatron_cord.report.run.contents import RunContents
from megatron_cord.report.run.reading import read_run


def render(run_dir: str | Path, output: str | Path | None = None) -> Path:
    """Write the report of a run, finished or not, and return its path.

    Args:
        run_dir: the run's output directory.
        output: the page's file; ``report.html`` in the run's directory if None. It is complete or unchanged.

    Raises:
        CordError: not a run directory, a damaged file in it (named with the line), or an output that cannot be written.
    """
    run = read_run(run_dir)
    page = templates().get_template("page/page.html").render(_content(run))
    target = run.path / "report.html" if output is None else Path(output)
    return write_page(target, page)


def _content(run: RunContents) -> dict[str, object]:
    evaluations = run.evaluations
    before = evaluations[0] if len(evaluations) > 1 else None
    after = run.outcome
    examples = choose_examples(before, after) if after else []
    notices = missing(run)
    clips: Mapping[str, str] = {}
    try:
        clips = (
            load_clips(run.setting("data.evaluation"), [example.after.id for example in examples]) if examples else {}
        )
    except CordError as error:
        notices.append(f"No audio: {error}. A relative path counts from where the report is made.")
    if clips and len(clips) < len(examples):
        notices.append(
            f"Audio of {len(clips)} of {len(examples)} questions: the others are not in the shards, "
            f"or beyond {AUDIO_BUDGET / 1e6:g} MB."
        )
    script = asset("shared/script.js")
    return overview(run) | {
        "notices": notices,
        "examples": examples,
        "kinds": [
            (kind, sum(example.kind == kind for example in examples))
            for kind in QUOTAS
            if any(e.kind == kind for e in examples)
        ],
        "clips": clips,
        "groups": training_groups(run),
        "config": run.config_text,
        "style": Markup(asset("shared/style.css")),
        "script": Markup(script),
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    }
