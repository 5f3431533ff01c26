"""Check the documentation as a site, and the configuration's reference in it."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest

from megatron_cord.config.reference import comments, sections
from megatron_cord.errors import CordError
from megatron_cord.trainer.config import RunConfig
from tools.config_reference import markdown

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the site; a warning is an error."""
    pytest.importorskip("mkdocs", reason="the extra docs is not installed")
    pytest.importorskip("material", reason="the extra docs is not installed")
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return target


def test_every_page_is_in_it(site: Path) -> None:
    """Catches a page that the navigation lacks, and a home page other than the README."""
    home = (site / "index.html").read_text(encoding="utf-8")
    assert "make quickstart" in home
    for page in set((ROOT / "docs").rglob("*.md")) - {ROOT / "docs" / "README.md"}:
        assert (site / f"{page.stem}.html").is_file() and f'href="{page.stem}.html"' in home, page.name


def test_links_lead_somewhere(site: Path) -> None:
    """Catches a link that is right in the repository and broken in the site."""
    for page in site.glob("*.html"):
        for target in re.findall(r'(?:href|src)="([^"]*)"', page.read_text(encoding="utf-8")):
            address = unescape(target).partition("#")[0].partition("?")[0]
            if address and not re.match(r"\w+:|/", address):
                assert (page.parent / address).resolve().exists(), f"{page.name}: {target}"


def test_nothing_is_loaded(site: Path) -> None:
    """Catches fonts, scripts or pictures from the network; links to read may lead there."""
    for page in site.glob("*.html"):
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r'<(?:script|link|img|iframe|source)\b[^>]*\b(?:src|href)="(https?:[^"]+|//[^"]+)"', text)
        assert not loaded, f"{page.name}: {loaded}"


def test_the_reference_is_in_the_site(site: Path) -> None:
    """Catches a page of the configuration that is built without its reference."""
    text = (site / "configuration.html").read_text(encoding="utf-8")
    for section in sections(RunConfig):
        for key in section.keys:
            assert f"<code>{key.name}</code>" in text, key.name


def test_every_key_is_explained() -> None:
    """Catches a key of the configuration without an explanation."""
    silent = [key.name for section in sections(RunConfig) for key in section.keys if not key.meaning]
    assert not silent, "write what it means beside the field, after #:"
    assert all(section.purpose for section in sections(RunConfig))


@dataclasses.dataclass(frozen=True)
class Base:
    """Inherited from.

    Attributes:
        described: in the docstring,
            on two lines.
    """

    described: int
    inherited: int = 1  #: of the base


@dataclasses.dataclass(frozen=True)
class Example(Base):
    """With comments in every place."""

    beside: int = 0  #: on its line

    #: above it,
    #: on two lines
    above: int = 0
    #: above that
    next: int = 0

    below: int = 0
    #: below it

    inside: str = "x"  #: within brackets
    silent: int = 0


def test_comments_belong_to_their_fields() -> None:
    """Catches a reference in which a text stands beside its neighbour."""
    assert comments(Example) == {
        "described": "in the docstring, on two lines.",
        "inherited": "of the base",
        "beside": "on its line",
        "above": "above it, on two lines",
        "next": "above that",
        "below": "below it",
        "inside": "within brackets",
        "silent": "",
    }


def test_types_and_defaults() -> None:
    """Catches defaults that are not the code's, and required keys that look optional."""
    text = markdown()
    assert "| `output_dir` | str | **required** |" in text
    assert "| `replay` | str or null | `null` |" in text
    assert "| `teacher.mode` | one of frozen, live, ema |" in text
    assert "| `metrics.wandb.mode` | one of off, offline, online | `off` |" in text
    assert markdown("rollout").count("## ") == 1
    with pytest.raises(CordError, match=r"there is no section rolout; choose one of model, model\.lora, data"):
        markdown("rolout")
