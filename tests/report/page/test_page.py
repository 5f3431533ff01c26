"""The page as a text: complete, escaped, closed to the network, and drawn from runs that are not finished."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megatron_cord.errors import CordError
from megatron_cord.evaluation.files import step_label
from megatron_cord.report.page.overview import facts
from megatron_cord.report.page.page import render
from megatron_cord.report.run.reading import read_run
from tests.report.fixture import HOSTILE

TOOL = Path(__file__).parents[3] / "tools" / "report.py"


class Elements(HTMLParser):
    """Every element of a page with its attributes, and the texts of its scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self._in_script = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self._in_script = tag == "script"

    def handle_data(self, data: str) -> None:
        if self._in_script:
            self.scripts.append(data)
            self._in_script = False

    def values(self, name: str) -> list[str]:
        return [value for _, attributes in self.found if (value := attributes.get(name)) is not None]


@pytest.fixture(scope="module")
def page(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return render(finished_run, tmp_path_factory.mktemp("page") / "page.html").read_text()


def test_everything_is_there(page: str) -> None:
    """Catches a section, a chart or the audio left out."""
    titles = (
        "Accuracy", "Voices", "Questions to hear", "Training", "Divergence by position", "Divergence", "Reward", "Loss",
        "Gradient norm", "Response length", "Time", "What it was trained on", "Configuration",
    )  # fmt: skip
    for title in titles:
        assert f">{title}</" in page, title
    elements = Elements(page)
    assert sum(tag == "audio" for tag, _ in elements.found) >= 12
    assert "of the gap between reading and hearing is closed" in page and "95 % interval" in page and "n = 60" in page
    assert "reward 1" in page and "weight 4" in page and "1 step was skipped" in page
    for tag, attributes in elements.found:
        if tag == "audio" or attributes.get("role") == "img":
            assert attributes.get("aria-label")
    ids = elements.values("id")
    assert len(ids) == len(set(ids))


def test_nothing_is_loaded_and_nothing_else_runs(page: str) -> None:
    """Catches an address outside the page, a handler or a second script, and a policy that would let one through."""
    elements = Elements(page)
    assert all(value.startswith(("data:", "#")) for name in ("src", "href") for value in elements.values(name))
    assert not re.search(r"@import|url\((?!#)", page)
    assert not [name for _, attributes in elements.found for name in attributes if name.startswith("on")]
    (script,) = elements.scripts
    policy = next(
        a["content"] for tag, a in elements.found if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; media-src data:; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def test_time_adds_up(page: str) -> None:
    """Catches a phase that is counted twice, and time that no phase claims left out."""
    rows = re.findall(r'<th scope="row">(\w+)</th><td class="bar">.*?<td class="figure">([\d.]+) s</td>', page)
    assert [name for name, _ in rows] == ["rollout", "teacher", "train", "weight_sync", "other", "evaluation"]
    assert sum(float(seconds) for _, seconds in rows) == pytest.approx(100 * 0.25 + 5 * 3.1, abs=0.5)


def test_answers_are_text(page: str) -> None:
    """Catches a model's answer that becomes part of the page."""
    assert "<script>document.title" not in page and "<img" not in page
    assert HOSTILE.lower() in unescape(page).lower()


def test_size_and_repetition(finished_run: Path, page: str, tmp_path: Path) -> None:
    """Catches a page too large to send, and one that differs each time it is drawn."""
    assert len(page) < 10_000_000
    assert render(finished_run, tmp_path / "again.html").read_text() == page


@pytest.mark.parametrize(
    ("missing", "notice", "absent"),
    [
        (["summary.json"], "The run has not finished", None),
        (["evaluations"], "No evaluation yet", "Questions to hear"),
        (["rollouts"], "No rollouts were recorded", "Divergence by position"),
        (["metrics.jsonl"], "No metrics yet", ">Loss<"),
        ([f"evaluations/{step_label(step)}" for step in (25, 50, 75, 100)], "One evaluation so far", "is closed"),
        (["summary.json", "evaluations", "rollouts", "metrics.jsonl"], "No metrics yet", "Training"),
    ],
)
def test_unfinished_runs(run_copy: Path, missing: list[str], notice: str, absent: str | None) -> None:
    """Catches a report that fails, or stays silent, about what is not there yet."""
    for name in missing:
        path = run_copy / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    text = render(run_copy).read_text()
    assert notice in text and (absent is None or absent not in text)
    assert "<h1>run</h1>" in text


def test_audio_that_is_gone(run_copy: Path) -> None:
    """Catches a report that cannot be drawn on a machine without the shards."""
    (run_copy / "config.yaml").write_text("data:\n  evaluation: gone\n")
    text = render(run_copy).read_text()
    assert "No audio: gone: no such directory" in text and "<audio" not in text and "Questions to hear" in text


def test_output_that_cannot_be_written(finished_run: Path, tmp_path: Path) -> None:
    """Catches a traceback, and a half-written page left behind."""
    with pytest.raises(
        CordError, match=r"cannot write the report: No such file or directory; give another file with --output"
    ):
        render(finished_run, tmp_path / "no" / "page.html")
    (tmp_path / "folder").mkdir()
    with pytest.raises(CordError, match="cannot write the report"):
        render(finished_run, tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_tool(run_copy: Path, tmp_path: Path) -> None:
    """Catches a command line that does not name the page, and errors of more than one line."""

    def call(*arguments: str) -> tuple[int, str, str]:
        environment = {"PYTHONPATH": str(TOOL.parents[1]), "PATH": ""}
        done = subprocess.run(
            [sys.executable, str(TOOL), *arguments],
            capture_output=True,
            text=True,
            timeout=120,
            env=environment,
            check=False,
        )
        return done.returncode, done.stdout, done.stderr

    page = tmp_path / "page.html"
    assert call(str(run_copy), "--output", str(page)) == (0, f"{page}\n", "")
    assert page.is_file()
    status, printed, errors = call(str(tmp_path))
    assert (
        status == 2
        and printed == ""
        and errors.startswith("error: ")
        and errors.count("\n") == 1
        and "not a run directory" in errors
    )


def test_the_best_evaluation_and_the_end_are_named(run_copy: Path) -> None:
    """Catches a reader who has to look for the best step, in a finished run and in one that goes on."""
    summary = json.loads((run_copy / "summary.json").read_text())
    best = {"step": 60, "set": "heldout", "metric": "audio_accuracy", "value": 0.75}
    (run_copy / "summary.json").write_text(json.dumps(summary | {"ended_by": "hours", "best": best}))
    shown = ["ended by train.hours", "best after step 60 (audio accuracy 75.0% on heldout)"]
    assert facts(read_run(run_copy))[-2:] == shown
    (run_copy / "summary.json").unlink()
    (run_copy / "checkpoints").mkdir(exist_ok=True)
    (run_copy / "checkpoints" / "best.json").write_text(json.dumps(best | {"step": 40}))
    assert facts(read_run(run_copy))[-1] == "best after step 40 (audio accuracy 75.0% on heldout)"
