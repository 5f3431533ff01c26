"""The live page in a real browser: every view opened, searched, played and used by keyboard; no error, no request."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.browser.browser import EXECUTABLE, MISSING, Browser
from tests.integration.browser.test_report import CONTRAST, browser
from tests.report.fixture import write_lines
from tests.report.live.test_live import serving

__all__ = ["browser"]
pytestmark = pytest.mark.skipif(EXECUTABLE is None, reason=MISSING)

VIEWS = ("", "rollouts", "compare")


@pytest.fixture(scope="module")
def live(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy a run that these tests may change, whose training questions can be played too."""
    run = shutil.copytree(finished_run, tmp_path_factory.mktemp("live") / "run")
    config = (run / "config.yaml").read_text()
    heldout = config.partition("evaluation: ")[2].partition("\n")[0]
    (run / "config.yaml").write_text(config.replace("data:\n", f"data:\n  train: {heldout}\n"))
    (run / "summary.json").unlink()
    return run


@pytest.fixture(scope="module")
def address(live: Path) -> Iterator[str]:
    with serving(live) as port:
        yield f"http://127.0.0.1:{port}/"


def is_quiet(browser: Browser, address: str) -> bool:
    """Return whether the console is empty and no request left; the browser's own pictures are data: addresses."""
    return browser.complaints == [] and all(request.startswith((address, "data:")) for request in browser.requests)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_view(browser: Browser, address: str, view: str, scheme: str) -> None:
    """Catches script errors, violations of the policy, requests to others, faint text, and sideways scrolling."""
    browser.open(address + view, scheme=scheme)
    assert browser.evaluate("document.querySelector('nav [aria-current]').textContent") in (
        "Overview",
        "Rollouts",
        "Compare",
    )
    lowest = browser.evaluate(CONTRAST)
    assert lowest[0][0] >= 4.5, lowest
    for width in (340, 700, 1600):
        browser.open(address + view, width=width, scheme=scheme)
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert is_quiet(browser, address)


def test_search_by_keyboard(browser: Browser, address: str) -> None:
    """Catches a form that needs a mouse, and one that forgets what was asked."""
    browser.open(address + "rollouts")
    browser.evaluate("document.querySelector('[name=text]').focus()")
    browser.call("Input.insertText", text="what is")
    browser.press("Tab", 9)
    browser.press("Tab", 9)
    assert browser.evaluate("document.activeElement.name") == "reward_from"
    browser.call("Input.insertText", text="1")
    browser.follow("document.querySelector('.search').requestSubmit()")
    assert "reward_from=1" in browser.evaluate("location.search")
    assert browser.evaluate("document.querySelector('[name=text]').value") == "what is"
    titles = browser.evaluate("[...document.querySelectorAll('.card h3')].map((title) => title.textContent)")
    assert titles and all("what is" in title for title in titles)
    rewards = browser.evaluate(
        "[...document.querySelectorAll('.figures b')].map((b) => b.parentElement.textContent)"
        ".filter((t) => t.startsWith('reward'))"
    )
    assert set(rewards) == {"reward 1"} and len(rewards) == len(titles)
    first = browser.evaluate(
        "document.querySelector('.card code').textContent + document.querySelector('.who').textContent"
    )
    browser.follow("document.querySelector('.further a').click()")
    assert (
        browser.evaluate(
            "document.querySelector('.card code').textContent + document.querySelector('.who').textContent"
        )
        != first
    )
    assert is_quiet(browser, address)


def test_colours(browser: Browser, address: str) -> None:
    """Catches a choice between divergence and weight that changes nothing, or not the legend."""
    browser.open(address + "rollouts?role=distill")
    colours = "[...document.querySelectorAll('.tokens li')].map((token) => getComputedStyle(token).backgroundColor)"
    legends = (
        "[...document.querySelectorAll('.legend')].filter((legend) => legend.checkVisibility())"
        ".map((legend) => legend.className)"
    )
    before = browser.evaluate(colours)
    assert browser.evaluate(legends) == ["legend by-kl"]
    browser.evaluate("document.querySelector('[name=colour]').focus()")
    browser.press("ArrowRight", 39)
    assert browser.evaluate(colours) != before and browser.evaluate(legends) == ["legend by-weight"]
    heavy = "[...document.querySelectorAll('.tokens .w5')].map((token) => token.dataset.note)"
    assert all(float(note.rpartition("weight ")[2]) >= 3 for note in browser.evaluate(heavy))
    lowest = browser.evaluate(CONTRAST)
    assert lowest[0][0] >= 4.5, lowest


@pytest.mark.parametrize("view", ["rollouts", "compare"])
def test_recordings_play(browser: Browser, address: str, view: str) -> None:
    """Catches audio that the policy, the server or the decoder refuses, and a clip in which one cannot go back."""
    browser.open(address + view)
    played = browser.evaluate("""
        (async () => {
          const audio = document.querySelector("audio");
          await audio.play();
          await new Promise((resolve) => audio.addEventListener("ended", resolve));
          audio.currentTime = 0.5;
          await new Promise((resolve) => (audio.seeking ? audio.addEventListener("seeked", resolve) : resolve()));
          return [audio.duration, audio.currentTime];
        })()""")
    assert played == pytest.approx([1.0, 0.5], abs=0.05)
    assert is_quiet(browser, address)


def test_two_checkpoints(browser: Browser, address: str) -> None:
    """Catches sides that are exchanged, and a choice that is not kept."""
    browser.open(address + "compare?a=25&b=100&kind=broken")
    assert browser.evaluate("[document.querySelector('[name=a]').value, document.querySelector('[name=b]').value]") == [
        "25",
        "100",
    ]
    sides = browser.evaluate(
        "[...document.querySelectorAll('.sides h4')].map((title) => title.textContent.replace(/\\\\s+/g, ' ').trim())"
    )
    assert (
        sides and set(sides[::2]) == {"Hearing, step 25 ✓ right"} and set(sides[1::2]) == {"Hearing, step 100 ✗ wrong"}
    )
    browser.evaluate("document.querySelector('.sides .tokens li').focus()")
    browser.press("ArrowRight", 39)
    assert browser.evaluate("document.activeElement.dataset.note").endswith(" nats")


def test_news(browser: Browser, address: str, live: Path) -> None:
    """Catches a page that misses a run's progress, closes opened details, or moves the scrolled position."""
    look = "look().then(() => document.getElementById('facts').textContent)"
    browser.open(address)
    browser.evaluate("document.querySelector('#curves details').open = true")
    assert browser.evaluate(look).startswith("100 steps")
    with (live / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 101, "loss": 1.0, "kl": 0.1}) + "\n")
    write_lines(live / "alerts.jsonl", [{"step": 101, "kind": "length explosion", "words": "responses have 99 tokens"}])
    news = (
        "new Promise((resolve) => { const again = () => "
        f"{look}.then((text) => text.startsWith('101') ? resolve(text) : setTimeout(again, 300)); again(); }})"
    )
    assert browser.evaluate(news).startswith("101 steps")
    assert browser.evaluate("document.querySelector('#curves details').open")
    assert "responses have 99 tokens" in browser.evaluate("document.querySelector('.alerts').textContent")
    assert "Brought up to date at" in browser.evaluate("document.getElementById('news').textContent")
    browser.open(address + "rollouts")
    cards = browser.evaluate("document.querySelector('.cards').innerHTML")
    with (live / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 102, "loss": 1.0, "kl": 0.1}) + "\n")
    assert browser.evaluate(news.replace("'101'", "'102'")).startswith("102 steps")
    assert "The run has gone on" in browser.evaluate("document.getElementById('news').textContent")
    assert browser.evaluate("document.querySelector('.cards').innerHTML") == cards
    assert is_quiet(browser, address)


def test_policy_holds(browser: Browser, address: str) -> None:
    """Catches a policy that is sent but lets a request or a script through."""
    browser.open(address)
    directives = browser.evaluate("""
        new Promise((resolve) => {
          const seen = [];
          document.addEventListener("securitypolicyviolation", (event) => {
            seen.push(event.effectiveDirective);
            if (seen.length === 4) resolve(seen.sort());
          });
          document.body.append(Object.assign(new Image(), { src: "http://127.0.0.1:9/x.png" }));
          const inline = { script: "document.title = 'taken'", style: "body { display: none }" };
          for (const [tag, textContent] of Object.entries(inline))
            document.body.append(Object.assign(document.createElement(tag), { textContent }));
          fetch("http://127.0.0.1:9/").catch(() => {});
        })""")
    assert directives == ["connect-src", "img-src", "script-src-elem", "style-src-elem"]
    assert browser.evaluate("document.title") == "run – live"
