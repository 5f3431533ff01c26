"""The live page of several runs: their comparison, drawn again when one of them has changed, and a page for each."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from megatron_cord.report.comparison.page import comparison
from megatron_cord.report.comparison.questions import DividingQuestion, dividing_questions
from megatron_cord.report.comparison.runs import check_runs
from megatron_cord.report.live.live import LiveRun
from megatron_cord.report.page.templates import templates
from megatron_cord.runtime.files import fingerprint


class LiveRuns:
    """The comparison of several runs, polled for changes. Its methods may be called from several threads.

    Args:
        directories: of the runs, the one to compare with first.

    Raises:
        CordError: one of them is no run's, or they cannot be compared.
    """

    def __init__(self, directories: Sequence[Path]) -> None:
        check_runs(directories)
        self._lock = threading.RLock()
        self.runs = [LiveRun(directory, self._lock, among=True) for directory in directories]
        self._drawn, self._page = "", ""

    def version(self) -> str:
        """Return a fingerprint of all runs' files, which changes with them."""
        return fingerprint([run.version() for run in self.runs])

    def views(self, values: Mapping[str, str]) -> Mapping[str, Callable[[], str]]:
        """Return what draws each page, by its path."""
        return {"/": self.overview}

    def overview(self) -> str:
        """Return the page of the comparison. Raises CordError for a damaged file in a run."""
        with self._lock:
            version = self.version()
            if version != self._drawn:
                runs = [run.contents() for run in self.runs]
                questions = dividing_questions(runs)
                content = comparison(runs, questions, {item.question.id: _address(item) for item in questions})
                heads = {"version": version, "view": "overview", "links": [], "linked": True}
                self._page = templates().get_template("live/runs.html").render(content | heads)
                self._drawn = version
            return self._page

    def clip(self, name: str, sample_id: str) -> None:
        """Return None: recordings are those of one run."""

    def failed(self, message: str) -> str:
        """Return the page of an error."""
        return templates().get_template("live/error.html").render(name="Runs", message=message, view="", links=[])


def _address(item: DividingQuestion) -> str:
    """Return where the recording of a question is served: by the first run that was asked it."""
    place = next(number for number, answer in enumerate(item.answers, start=1) if answer is not None)
    return f"{place}/audio?set=evaluation&id={quote(item.question.id, safe='')}"
