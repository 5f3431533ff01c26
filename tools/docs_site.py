"""Hooks of mkdocs (see mkdocs.yml) that let the same Markdown files read well in the repository and as a site.

- The home page is README.md.
- A link to a file outside docs/ leads to a copy of it in the site, so that the site needs nothing else.
- `docs/configuration.md` gets the reference of all keys, made from the dataclasses.
- Pages that mkdocs.yml's navigation names but that do not exist are left out; those it does not name stand under its last heading.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from tools.config_reference import markdown as configuration

ROOT = Path(__file__).parents[1]
REFERENCE = "<!-- reference -->"  # where configuration.md gets it
_LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")
_DIAGRAM = re.compile(r"^```mermaid\n.*?^```\n", re.MULTILINE | re.DOTALL)


def on_config(config: Any) -> Any:
    """Fits the navigation to the pages that are there."""
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} | {"index.md"}
    named: set[str] = set()
    for group in config.nav:
        if isinstance(group, dict):
            for title, names in group.items():
                group[title] = [name for name in names if name in pages]
                named |= set(group[title])
        else:
            named.add(group)
    last = next(reversed(config.nav))
    next(iter(last.values())).extend(sorted(pages - named))
    return config


def on_files(files: Files, config: Any) -> Files:
    """Adds the home page, and copies of the files outside docs/ that pages link to."""
    home, linked = _adapt((ROOT / "README.md").read_text(encoding="utf-8"), ROOT)
    files.append(File.generated(config, "index.md", content=_DIAGRAM.sub("", home)))
    for path in (ROOT / "docs").glob("*.md"):
        linked |= _adapt(path.read_text(encoding="utf-8"), path.parent)[1]
    for path in sorted(linked):
        files.append(File.generated(config, _copy(path), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Redirects links, and fills in the reference."""
    if page.file.src_uri == "index.md":
        return markdown
    if page.file.src_uri == "configuration.md":
        markdown = markdown.replace(REFERENCE, configuration())
    return _adapt(markdown, ROOT / "docs")[0]


def _adapt(text: str, folder: Path) -> tuple[str, set[Path]]:
    """A page's text with links as the site has them, and the files outside docs/ among them; ``folder`` is where the page lies."""
    linked: set[Path] = set()

    def redirect(match: re.Match[str]) -> str:
        target, anchor = (folder / match[1]).resolve(), match[2] or ""
        if target == ROOT / "README.md":
            return f"](index.md{anchor})"
        if target.is_relative_to(ROOT / "docs"):
            return f"]({target.relative_to(ROOT / 'docs')}{anchor})"
        if not target.is_file() or not target.is_relative_to(ROOT):
            return match[0]  # mkdocs says that it leads nowhere
        linked.add(target)
        return f"]({_copy(target)})"

    return _LINK.sub(redirect, text), linked


def _copy(path: Path) -> str:
    """Where the site has a file of the repository."""
    return f"source/{path.relative_to(ROOT)}"
