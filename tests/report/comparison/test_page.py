"""The page of several runs as a text: what it compares, that it is complete and escaped, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
from html import unescape
from pathlib import Path

import pytest
import yaml

from megatron_cord.cli.main import cord, invoke
from megatron_cord.errors import CordError
from megatron_cord.evaluation.files import heldout_file
from megatron_cord.report.comparison.page import render_comparison
from megatron_cord.report.comparison.questions import MOST, dividing_questions
from megatron_cord.report.comparison.results import results
from megatron_cord.report.comparison.runs import labels
from megatron_cord.report.comparison.settings import differing_settings
from megatron_cord.report.page.charts import MOST_RUNS
from megatron_cord.report.run.reading import read_run
from tests.report.fixture import HOSTILE, STEPS


@pytest.fixture(scope="module")
def page(several_runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    return render_comparison(several_runs, tmp_path_factory.mktemp("comparison") / "page.html").read_text()


def test_everything_is_there(page: str) -> None:
    """Catches a table or a chart left out, a run without its line, and charts with ids of another."""
    titles = ("Runs", "Held-out questions", "Question sets", "Settings that differ", "Curves", "Loss: token term")
    for title in (*titles, "Hearing: audio accuracy", "Reading: text accuracy", "Divergence", "Gradient norm"):
        assert f">{title}</" in page, title
    charts = re.findall(r'<div class="drawing"[^>]*aria-label="([^"]*)">(.*?)</div>', page, flags=re.DOTALL)
    assert len(charts) >= 15
    for description, drawing in charts:
        assert [f"var(--run-{place})" in drawing for place in (1, 2, 3, 4)] == [True] * 3 + [False], description
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert re.search(r"Time of a step: teacher", page) is None, "a curve that is the same constant in all runs"


def test_settings(several_runs: list[Path]) -> None:
    """Catches a setting that differs and is not shown, one that does not, and a missing one shown as a value."""
    found = {row.key: row.values for row in differing_settings([read_run(run) for run in several_runs])}
    evaluation = tuple(yaml.safe_load((run / "config.yaml").read_text())["data"]["evaluation"] for run in several_runs)
    assert found == {
        "seed": ("0", "0", "1"),
        "data.evaluation": evaluation,
        "parallel.tp": ("2", "1", "2"),
        "optimizer.learning_rate": ("–", "0.0005", "–"),
        "optimizer.groups": ("–", "{}", "–"),
    }


def test_results(several_runs: list[Path]) -> None:
    """Catches accuracies of another evaluation, and a difference of another sign or on other questions."""
    first, stopped, other = results([read_run(run) for run in several_runs])
    at_75, at_100 = (json.loads(heldout_file(several_runs[0], step).read_text()) for step in (75, STEPS))
    assert (first.step, stopped.step) == (STEPS, 75)
    assert first.audio is not None and first.audio.value == at_100["audio_accuracy"]
    assert stopped.audio is not None and stopped.audio.value == at_75["audio_accuracy"]
    assert first.difference is None and other.difference is None  # the other's questions are others
    assert stopped.difference is not None
    expected = at_75["audio_accuracy"] - at_100["audio_accuracy"]
    assert stopped.difference.estimate.value == pytest.approx(expected) and 0 < stopped.difference.p <= 1
    low, high = stopped.difference.estimate.low, stopped.difference.estimate.high
    assert low is not None and high is not None and low <= expected <= high


def test_questions_that_divide(several_runs: list[Path], page: str) -> None:
    """Catches a question that all runs heard alike, an answer of another run or step, and a missing recording."""
    runs = [read_run(run) for run in several_runs]
    questions = dividing_questions(runs)
    assert 0 < len(questions) <= MOST
    for item in questions:
        given = [answer.audio_correct for answer in item.answers if answer is not None]
        assert True in given and False in given
        for run, answer in zip(runs, item.answers, strict=True):
            assert answer is None or answer in run.evaluations[-1].answers
            assert (answer is None) == all(a.id != item.question.id for a in run.evaluations[-1].answers)
    assert page.count("<audio ") == page.count("data:audio/wav;base64,") == len(questions)
    assert dividing_questions(runs[:1]) == [] and dividing_questions([runs[0], runs[0]]) == []


def test_without_the_recordings(several_runs: list[Path], tmp_path: Path) -> None:
    """Catches a page that fails, or is silent without a word, where the shards are elsewhere."""
    moved = [shutil.copytree(run, tmp_path / run.name) for run in several_runs[:2]]
    for run in moved:
        text = (run / "config.yaml").read_text()
        (run / "config.yaml").write_text(re.sub(r"evaluation: .*", f"evaluation: {tmp_path / 'nowhere'}", text))
    page = render_comparison(moved, tmp_path / "page.html").read_text()
    assert "<audio" not in page and "No audio: " in page and "Questions that divide the runs" in page


def test_question_sets(page: str) -> None:
    """Catches a set's result that is missing or without its interval, and one invented for a run without it."""
    text = re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]+>", " ", page[page.index('id="sets-title"') :])))
    assert re.search(
        r"sums \S+/demo not evaluated \S+/stopped 75 40 90\.0 \[80\.0, 97\.5\] – other/demo not evaluated", text
    )


def test_labels(tmp_path: Path) -> None:
    """Catches two runs under one name."""
    paths = [tmp_path / "a" / "run", tmp_path / "b" / "run", tmp_path / "c"]
    assert labels(paths[1:]) == ["run", "c"]
    assert labels(paths) == ["a/run", "b/run", f"{tmp_path.name}/c"]


def test_a_name_is_text(several_runs: list[Path], tmp_path: Path) -> None:
    """Catches a directory's name or a setting that becomes markup, also inside a drawing."""
    hostile = tmp_path / "<b onclick=x> & 'run'"
    shutil.copytree(several_runs[1], hostile)
    with (hostile / "config.yaml").open("a") as file:
        file.write(f"note: {json.dumps(HOSTILE)}\n")
    page = render_comparison([several_runs[0], hostile], tmp_path / "page.html").read_text()
    assert "<b onclick" not in page and "&lt;b onclick=x&gt; &amp;" in page
    assert HOSTILE not in page and page.count("<script>") == 1


def test_runs_that_have_only_begun(several_runs: list[Path], tmp_path: Path) -> None:
    """Catches a page that needs an evaluation or a metric."""
    begun = tmp_path / "begun"
    begun.mkdir()
    shutil.copy(several_runs[0] / "config.yaml", begun)
    page = render_comparison([begun, several_runs[0]], tmp_path / "page.html").read_text()
    assert "no evaluation yet" in page and "Divergence" in page
    again = shutil.copytree(begun, tmp_path / "again")
    assert "No metrics yet" in render_comparison([begun, again], tmp_path / "page.html").read_text()


def test_refusals(several_runs: list[Path], tmp_path: Path) -> None:
    """Catches a run compared with itself, more lines than can be told apart, and a directory that is no run."""
    first = several_runs[0]
    with pytest.raises(CordError, match="are the same run"):
        render_comparison([first, first.parent / "." / first.name], tmp_path / "page.html")
    many = [tmp_path / str(number) for number in range(MOST_RUNS + 1)]
    with pytest.raises(CordError, match="give 8 at most"):
        render_comparison(many, tmp_path / "page.html")
    with pytest.raises(CordError, match="is not a run directory"):
        render_comparison([first, tmp_path], tmp_path / "page.html")


def test_command(several_runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a command that takes one run alone, and a page that replaces a run's own report."""
    runs = [shutil.copytree(run, tmp_path / name) for run, name in zip(several_runs, ("a", "b"), strict=False)]
    assert invoke(cord, ["report", *map(str, runs)], "cord") == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "comparison.html")
    assert not any((run / "report.html").exists() for run in runs)
