"""What README.md and docs/ name exists: make targets, programs with their options and settings, modules, files.

It simplifies: only what stands as code counts, a command ends with its line, and placeholders (CAPITALS, …) are not looked at.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest

from megatron_cord.config import load_config
from megatron_cord.trainer.config import RunConfig

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OURS = "megatron_cord|examples|benchmarks|tools|tests"
SCRIPT = re.compile(rf"(?:{OURS})/[\w/]+\.py")
MODULE = re.compile(rf"(?<![\w./-])(?:{OURS})(?:\.[A-Za-z_]\w*)+")
FILE = re.compile(rf"(?<![\w./-])(?:{OURS}|docs)/[\w./-]*\w")
SETTING = re.compile(r"[a-z_]+(\.[a-z_]+)+=[\w./-]+")
#: programs whose settings are a run's
TRAINING = ("megatron_cord.train", "megatron_cord.evaluate", "examples.quickstart.run")


@dataclass(frozen=True)
class Program:
    """One program of a command; a launcher and what it launches are two."""

    name: str  #: of a module, or the path of a script
    arguments: tuple[str, ...]


def code(page: Path) -> Iterator[str]:
    """Lines of code blocks, fenced or indented, and spans within the text; comments and diagrams left out."""
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
    """The project's programs that a line of code starts with Python, in their order."""
    words = line.replace("[", " ").replace("]", " ").split()
    found: list[list[str]] = []
    if not words or not re.fullmatch(r"(?:\S*/)?(?:python3?|torchrun)", words[0]):
        return []
    for before, word in pairwise(words):
        if before == "-m" or SCRIPT.fullmatch(word):
            found.append([word])
        elif found and word != "-m":
            found[-1].append(word)
    return [Program(name, tuple(arguments)) for name, *arguments in found if re.match(rf"(?:{OURS})[./]", name)]


LINES = [pytest.param(line, id=f"{page.name}: {line}") for page in PAGES for line in dict.fromkeys(code(page))]
PROGRAMS = list(dict.fromkeys(program for line in LINES for program in programs(str(line.values[0]))))


def loaded(name: str) -> ModuleType:
    """A module by its name, or by the path of its script."""
    if not SCRIPT.fullmatch(name):
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(name.removesuffix(".py").replace("/", "."), ROOT / name)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pages_are_read() -> None:
    """Catches a parser that finds nothing and therefore never fails."""
    names = {program.name for program in PROGRAMS}
    assert {"megatron_cord.launch", "megatron_cord.train", "megatron_cord.verify", "tools/report.py"} <= names
    assert "make quickstart" in {line.values[0] for line in LINES}
    assert programs("python -m megatron_cord.launch --nproc-per-node 2 tools/x.py import --tp 2 DIR") == [
        Program("megatron_cord.launch", ("--nproc-per-node", "2")),
        Program("tools/x.py", ("import", "--tp", "2", "DIR")),
    ]


@pytest.mark.parametrize("line", LINES)
def test_targets_modules_and_files_exist(line: str) -> None:
    """Catches a make target, a module or one of its members, or a file that was renamed or never built."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    if line.startswith("make "):
        assert {word for word in line.split()[1:] if re.fullmatch(r"[a-z-]+", word)} <= targets
    for path in FILE.findall(line):
        assert (ROOT / path).exists(), path
    for name in MODULE.findall(line):
        if (ROOT / name).exists():
            continue
        module, members = name, list[str]()
        while importlib.util.find_spec(module) is None:
            module, _, member = module.rpartition(".")
            members.insert(0, member)
            assert "." in module, name
        found: object = importlib.import_module(module) if members else None
        for member in members:
            assert hasattr(found, member), name
            found = getattr(found, member)


def help_of(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    module = loaded(name)
    monkeypatch.setattr(sys, "argv", [name, *arguments, "--help"])
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert not ended.value.code
    return capsys.readouterr().out


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: " ".join((program.name, *program.arguments)))
def test_programs_take_these_arguments(program: Program, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches an option, a subcommand or a key of the configuration that the program does not know."""
    said = help_of(program.name, [], monkeypatch, capsys)
    choices = re.search(r"^positional arguments:\n  \{?(\w+(?:[,|]\w+)+)", said, re.MULTILINE)
    if choices and program.arguments:
        assert program.arguments[0] in re.split("[,|]", choices[1])
        said += help_of(program.name, [program.arguments[0]], monkeypatch, capsys)
    options = {word.partition("=")[0] for word in program.arguments if word.startswith("-")}
    assert options <= set(re.findall(r"(?<![\w-])--?[\w-]+", said))
    if program.name in TRAINING:
        settings = [word for word in program.arguments if SETTING.fullmatch(word) and word != "a.b=value"]
        load_config(RunConfig, ROOT / "examples" / "quickstart" / "quickstart.yaml", settings)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page: Path) -> None:
    """Catches a link or a picture whose file is not in the repository."""
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    missing = [target for target in targets if "://" not in target and not (page.parent / target.partition("#")[0]).exists()]
    assert not missing
