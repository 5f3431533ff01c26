"""The page in a real browser: empty console, no request, legible plots, playable clips, keyboard enough."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_cord.report.page.page import render
from tests.integration.browser.browser import EXECUTABLE, MISSING, Browser

pytestmark = pytest.mark.skipif(EXECUTABLE is None, reason=MISSING)

# The luminance contrast (WCAG 2) of each element's text with the nearest background behind it, the lowest first.
CONTRAST = """
(() => {
  const context = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    context.clearRect(0, 0, 1, 1);
    context.fillStyle = colour;
    context.fillRect(0, 0, 1, 1);
    return [...context.getImageData(0, 0, 1, 1).data];
  };
  const luminance = ([r, g, b]) => {
    const [R, G, B] = [r, g, b].map((c) => (c / 255 <= 0.03928 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * R + 0.7152 * G + 0.0722 * B;
  };
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const colour = rgba(getComputedStyle(node).backgroundColor);
      if (colour[3] === 255) return colour;
    }
  };
  const results = [];
  const texts = "p, h1, h2, h3, th, td, dt, dd, li, a, button, summary, label span, .swatch, .mark, .kind, svg text";
  for (const node of document.querySelectorAll(texts)) {
    if (!node.textContent.trim() || !node.checkVisibility()) continue;
    const style = getComputedStyle(node);
    const [a, b] = [luminance(rgba(node.closest("svg") ? style.fill : style.color)), luminance(behind(node))];
    const name = node.tagName + "." + node.getAttribute("class") + " " + node.textContent.trim().slice(0, 40);
    results.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), name]);
  }
  return results.sort((x, y) => x[0] - y[0]).slice(0, 5);
})()
"""


@pytest.fixture(scope="module")
def page(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return render(finished_run, tmp_path_factory.mktemp("browser") / "page.html")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    assert EXECUTABLE is not None
    with Browser(EXECUTABLE) as opened:
        yield opened


def shown_kinds(browser: Browser) -> list[str]:
    kinds: list[str] = browser.evaluate(
        "[...document.querySelectorAll('.card[data-kind]')].filter(c => c.checkVisibility()).map(c => c.dataset.kind)"
    )
    return kinds


def test_silent_and_alone(browser: Browser, page: Path) -> None:
    """Catches a script error, a violation of the page's policy, a requested file, and an answer that runs as code."""
    browser.open(page)
    assert browser.evaluate("document.title") == "demo – CORD run"
    assert browser.complaints == []
    assert browser.requests[0] == page.as_uri()
    assert all(address.startswith("data:") for address in browser.requests[1:])


def test_every_clip_plays(browser: Browser, page: Path) -> None:
    """Catches audio that does not decode, and two clips that speak at once."""
    browser.open(page)
    durations = browser.evaluate("""
        Promise.all([...document.querySelectorAll("audio")].map((audio) => new Promise((resolve, reject) => {
          audio.addEventListener("canplaythrough", () => resolve(audio.duration));
          audio.addEventListener("error", () => reject(audio.error));
          audio.preload = "auto";
          audio.load();
        })))""")
    assert len(durations) >= 12 and durations == pytest.approx([1.0] * len(durations))
    playing = browser.evaluate("""
        (async () => {
          const [first, second] = document.querySelectorAll("audio");
          await first.play();
          const before = [first.paused, second.paused];
          await second.play();
          await new Promise((resolve) => (first.paused ? resolve() : first.addEventListener("pause", resolve)));
          return [before, [first.paused, second.paused]];
        })()""")
    assert playing == [[False, True], [True, False]]
    assert browser.complaints == []


def test_every_plot_is_drawn(browser: Browser, page: Path) -> None:
    """Catches a chart of no size, without lines, or whose labels fall outside it."""
    browser.open(page)
    plots: list[dict[str, Any]] = browser.evaluate("""
        [...document.querySelectorAll(".drawing svg")].map((svg) => {
          const box = svg.getBoundingClientRect();
          const inside = [...svg.querySelectorAll("text")].every((text) => {
            const b = text.getBoundingClientRect();
            return b.left >= box.left - 1 && b.right <= box.right + 1
              && b.top >= box.top - 1 && b.bottom <= box.bottom + 1;
          });
          return { area: box.width * box.height, paths: svg.querySelectorAll("path").length, inside };
        })""")
    assert len(plots) == 13
    assert all(plot["area"] > 40_000 and plot["paths"] >= 5 and plot["inside"] for plot in plots), plots


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_legible(browser: Browser, page: Path, scheme: str) -> None:
    """Catches text below the contrast of WCAG AA (4.5) in either colour scheme, and a switch without effect."""
    browser.open(page, scheme=scheme)
    lowest = browser.evaluate(CONTRAST)
    assert lowest[0][0] >= 4.5, lowest
    background = "getComputedStyle(document.body).backgroundColor"
    before = browser.evaluate(background)
    browser.evaluate("document.getElementById('theme').click()")
    assert browser.evaluate(background) != before
    lowest = browser.evaluate(CONTRAST)
    assert lowest[0][0] >= 4.5, lowest


@pytest.mark.parametrize("width", [340, 700, 1000, 1600])
def test_fits_the_window(browser: Browser, page: Path, width: int) -> None:
    """Catches a page that must be scrolled sideways, at rest or for what is said of a token."""
    browser.open(page, width=width)
    widest = """Math.max(document.documentElement.scrollWidth,
        ...[...document.querySelectorAll(".tokens li")].map((token) => {
          token.focus();
          return document.documentElement.scrollWidth;
        }))"""
    assert browser.evaluate(widest) <= width


def test_filter_by_keyboard(browser: Browser, page: Path) -> None:
    """Catches a filter that needs a mouse, hides the wrong cards, or says a wrong number."""
    browser.open(page)
    everything = shown_kinds(browser)
    browser.evaluate("document.querySelector('[name=kind]').focus()")
    browser.press("ArrowRight", 39)
    assert shown_kinds(browser) == ["fixed"] * everything.count("fixed")
    assert browser.evaluate("document.getElementById('shown').textContent") == f"{everything.count('fixed')} shown"
    browser.press("ArrowLeft", 37)
    assert shown_kinds(browser) == everything
    browser.press("Tab", 9)
    browser.call("Input.insertText", text="x")  # a list takes no text
    browser.press("ArrowDown", 40)
    voice = browser.evaluate("document.activeElement.value")
    voices = browser.evaluate(
        "[...document.querySelectorAll('.card[data-kind]')].filter(c => c.checkVisibility()).map(c => c.dataset.voice)"
    )
    assert voice and set(voices) == {voice}
    browser.press("ArrowUp", 38)
    browser.press("Tab", 9)
    browser.call("Input.insertText", text="<SCRIPT>")
    assert len(shown_kinds(browser)) == 1
    browser.call("Input.insertText", text="nothing says this")
    assert shown_kinds(browser) == []
    assert browser.evaluate("document.getElementById('shown').textContent") == "no question matches"


def test_tokens_by_keyboard(browser: Browser, page: Path) -> None:
    """Catches divergences that only a mouse can reach, and answers that take a press of Tab for each token."""
    browser.open(page)
    focused = "[...document.activeElement.parentElement.children].indexOf(document.activeElement)"
    note = "[getComputedStyle(document.activeElement, '::after').display, document.activeElement.dataset.note]"
    browser.evaluate("document.querySelector('.tokens li').focus()")
    browser.press("ArrowRight", 39)
    browser.press("ArrowRight", 39)
    assert browser.evaluate(focused) == 2
    display, text = browser.evaluate(note)
    assert display == "block" and text.endswith(" nats")
    browser.press("End", 35)
    assert browser.evaluate(focused) == browser.evaluate("document.activeElement.parentElement.children.length - 1")
    browser.press("ArrowRight", 39)
    browser.press("Home", 36)
    assert browser.evaluate(focused) == 0
    first_list = browser.evaluate("window.first = document.activeElement.parentElement; true")
    browser.press("Tab", 9)
    assert first_list and browser.evaluate("document.activeElement.parentElement !== window.first")


def test_policy_holds(browser: Browser, page: Path) -> None:
    """Catches a page whose policy is written but not in force."""
    browser.open(page)
    directives = browser.evaluate("""
        new Promise((resolve) => {
          const seen = [];
          document.addEventListener("securitypolicyviolation", (event) => {
            seen.push(event.effectiveDirective);
            if (seen.length === 3) resolve(seen.sort());
          });
          document.body.append(Object.assign(new Image(), { src: "http://127.0.0.1:9/x.png" }));
          const textContent = "document.title = 'taken'";
          document.body.append(Object.assign(document.createElement("script"), { textContent }));
          fetch("http://127.0.0.1:9/").catch(() => {});
        })""")
    assert directives == ["connect-src", "img-src", "script-src-elem"]
    assert browser.evaluate("document.title") == "demo – CORD run"
