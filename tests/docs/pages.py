"""The documentation's pages: their lines of code, and the project's programs that these start.

It simplifies: only what stands as code counts, a command ends with its line, and placeholders (CAPITALS, …) are
skipped.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
OURS = "megatron_cord|examples|benchmarks|tools|tests"
SCRIPT = re.compile(rf"(?:{OURS})/[\w/]+\.py")
QUICKSTART = ROOT / "examples" / "quickstart" / "quickstart.yaml"
#: scripts that are shims of `cord`'s commands
SHIMS = {
    "tools/compare.py": "compare",
    "tools/convert_hf.py": "convert",
    "tools/plan.py": "plan",
    "tools/report.py": "report",
    "tools/serve_rollout.py": "serve",
    "tools/synthesize.py": "synthesize",
}


@dataclass(frozen=True)
class Program:
    """One program of a command; a launcher and what it launches are two."""

    name: str  #: a module's name, a script's path, or `cord` with a command's name
    arguments: tuple[str, ...]


def code(page: Path) -> Iterator[str]:
    """Yield the lines of code blocks, fenced or indented, and the spans within the text; skip comments and diagrams."""
    fence, after_blank = "", True
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.lstrip().startswith("```"):
            fence = "" if fence else line.strip()
        elif fence or (after_blank and line.startswith("    ")):
            if fence != "```mermaid":
                yield re.sub(r"(^|\s)#.*", "", line).strip()
            continue
        else:
            yield from re.findall(r"`([^`]+)`", line)
        after_blank = not line.strip()


def programs(line: str) -> list[Program]:
    """Return the project's programs that a line of code starts with Python, in their order."""
    words = re.sub(r"(?<!\S)\[([^\]]*)\](?!\S)", r"\1", line).split()  # [what may be left out]
    found: list[list[str]] = []
    if words[:1] == ["cord"] and words[1:]:
        return [Program(f"cord {words[1]}", tuple(words[2:]))]
    if not words or not re.fullmatch(r"(?:\S*/)?(?:python3?|torchrun)", words[0]) or words[1:3] == ["-m", "pytest"]:
        return []  # pytest's arguments are files, whose names are checked like others
    for before, word in pairwise(words):
        if before == "-m" or SCRIPT.fullmatch(word):
            found.append([word])
        elif found and word != "-m":
            found[-1].append(word)
    named = [(f"cord {SHIMS[name]}" if name in SHIMS else name, arguments) for name, *arguments in found]
    return [Program(name, tuple(arguments)) for name, arguments in named if re.match(rf"cord |(?:{OURS})[./]", name)]


#: each page's lines of code, by the page's path
LINES = {str(page.relative_to(ROOT)): list(dict.fromkeys(code(page))) for page in PAGES}
PROGRAMS = list(dict.fromkeys(program for lines in LINES.values() for line in lines for program in programs(line)))


def is_required(field: dataclasses.Field[object]) -> bool:
    return field.default is field.default_factory is dataclasses.MISSING
