"""The pages of several runs and of an evaluation in a real browser: silent, legible, of any width, and playable."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_cord.evaluation.pages import html
from megatron_cord.report.comparison.page import render_comparison
from megatron_cord.report.live.server import make_server
from tests.evaluation.test_pages import RESULT, heard, row
from tests.integration.browser.browser import EXECUTABLE, MISSING, Browser
from tests.integration.browser.test_report import CONTRAST

pytestmark = pytest.mark.skipif(EXECUTABLE is None, reason=MISSING)


@pytest.fixture(scope="module")
def page(several_runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return render_comparison(several_runs, tmp_path_factory.mktemp("browser") / "page.html")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    assert EXECUTABLE is not None
    with Browser(EXECUTABLE) as opened:
        yield opened


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_silent_and_legible(browser: Browser, page: Path, scheme: str) -> None:
    """Catches a script error, a request, text below WCAG AA's contrast, and lines that cannot be told from the sheet.

    Also a legend of other colours or dashes than the lines have.
    """
    browser.open(page, scheme=scheme)
    assert browser.complaints == []
    assert all(address.startswith("data:") for address in browser.requests[1:])
    lowest = browser.evaluate(CONTRAST)
    assert lowest[0][0] >= 4.5, lowest
    keys, lines = browser.evaluate("""
        (() => {
          const style = (path) => [getComputedStyle(path).stroke, getComputedStyle(path).strokeDasharray === "none"];
          const keys = [...document.querySelectorAll(".run-legend path")].map(style);
          const chart = document.querySelector("#metrics .drawing svg");
          const strokes = keys.map(([stroke]) => stroke);
          const lines = [...chart.querySelectorAll("path")].map(style).filter(([stroke]) => strokes.includes(stroke));
          return [keys, lines];
        })()""")
    assert len(keys) == 3 and len({stroke for stroke, _ in keys}) == 3 and lines == keys


@pytest.mark.parametrize("width", [340, 1000])
def test_fits_the_window(browser: Browser, page: Path, width: int) -> None:
    """Catches a page that must be scrolled sideways because of its tables, and labels outside their chart."""
    browser.open(page, width=width)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    outside = browser.evaluate("""
        [...document.querySelectorAll(".drawing svg")].filter((svg) => {
          const box = svg.getBoundingClientRect();
          return [...svg.querySelectorAll("text")].some((text) => {
            const b = text.getBoundingClientRect();
            return b.left < box.left - 1 || b.right > box.right + 1;
          });
        }).length""")
    assert outside == 0


def test_live(browser: Browser, several_runs: list[Path]) -> None:
    """Catches a live comparison without style or script, and links to a run and back that lead nowhere."""
    with make_server(several_runs, 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            browser.open(f"http://127.0.0.1:{server.server_address[1]}/")
            assert browser.evaluate("document.querySelectorAll('.drawing svg').length") >= 15
            browser.follow("document.querySelector('#runs a[href=\"2/\"]').click()")
            assert browser.evaluate("document.querySelector('h1').textContent") == "stopped"
            browser.follow("document.querySelector('nav a').click()")
            assert browser.evaluate("document.querySelectorAll('#runs tbody tr').length") == 3
            assert browser.complaints == []
        finally:
            server.shutdown()
            thread.join()


def test_an_evaluation_plays(browser: Browser, tmp_path: Path) -> None:
    """Catches recordings that a browser cannot play, or that the page's policy forbids, opened from a file."""
    file = tmp_path / "results.html"
    rows = {"set": [row(f"q{number}") for number in range(4)]}
    file.write_text(html(RESULT, rows, {"set": [heard(number) for number in range(4)]}, 3), encoding="utf-8")
    browser.open(file)
    durations = browser.evaluate("""
        Promise.all([...document.querySelectorAll("audio")].map((audio) => new Promise((resolve, reject) => {
          audio.addEventListener("canplaythrough", () => resolve(audio.duration));
          audio.addEventListener("error", () => reject(audio.error));
          audio.preload = "auto";
          audio.load();
        })))""")
    assert durations == pytest.approx([0.5] * 3) and browser.complaints == []
    assert all(address.startswith("data:") for address in browser.requests[1:])
