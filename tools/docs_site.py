"""Hooks of mkdocs (see mkdocs.yml) that let the same Markdown files read well in the repository and as a site.

- The home page is README.md; CONTRIBUTING, CHANGELOG and SECURITY are pages too.
- A link to a file outside docs/ leads to a copy of it in the site, so that the site needs nothing else.
- `docs/configuration.md` gets the reference of all keys, made from the dataclasses.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from tools.config_reference import markdown as configuration

ROOT = Path(__file__).parents[1]
#: pages of the repository's root, by their names in the site
ROOT_PAGES = {
    "index.md": ROOT / "README.md",
    "contributing.md": ROOT / "CONTRIBUTING.md",
    "changelog.md": ROOT / "CHANGELOG.md",
    "security.md": ROOT / "SECURITY.md",
}
REFERENCE = "<!-- reference -->"  # where configuration.md gets it
_LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of the repository's root, and copies of the other files outside docs/ that pages link to."""
    linked: set[Path] = set()
    for name, path in ROOT_PAGES.items():
        content, more = _adapt(path.read_text(encoding="utf-8"), ROOT)
        files.append(File.generated(config, name, content=content))
        linked |= more
    for path in (ROOT / "docs").rglob("*.md"):
        linked |= _adapt(path.read_text(encoding="utf-8"), path.parent)[1]
    for path in sorted(linked):
        files.append(File.generated(config, _copy(path), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Redirect links, and fill in the configuration's reference."""
    if page.file.src_uri in ROOT_PAGES:
        return markdown  # as `on_files` made it
    if page.file.src_uri == "configuration.md":
        markdown = markdown.replace(REFERENCE, configuration())
    return _adapt(markdown, ROOT / "docs")[0]


def _adapt(text: str, folder: Path) -> tuple[str, set[Path]]:
    """Return the text of a page in ``folder`` with the site's links, and the files outside docs/ that it links to."""
    linked: set[Path] = set()

    def redirect(match: re.Match[str]) -> str:
        target, anchor = (folder / match[1]).resolve(), match[2] or ""
        if target == ROOT / "docs" / "README.md":
            return f"](index.md{anchor})"
        for name, page in ROOT_PAGES.items():
            if target == page:
                return f"]({name}{anchor})"
        if target.is_relative_to(ROOT / "docs"):
            return f"]({target.relative_to(ROOT / 'docs')}{anchor})"
        if not target.is_file() or not target.is_relative_to(ROOT):
            return match[0]  # a broken link, which mkdocs reports
        linked.add(target)
        return f"]({_copy(target)})"

    return _LINK.sub(redirect, text), linked


def _copy(path: Path) -> str:
    """Return the site's path of a file of the repository."""
    return f"source/{path.relative_to(ROOT)}"
