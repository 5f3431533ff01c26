"""Check that what the pages name exists: make targets, keys, modules, files, extras, links, functions, columns."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import re
import tomllib
from pathlib import Path

import pytest

from megatron_cord.config.loading import load_config
from megatron_cord.config.reference import sections
from megatron_cord.errors import CordError
from megatron_cord.rollout.rollout_file import SCHEMA
from megatron_cord.trainer.config import RunConfig
from tests.docs.pages import LINES, OURS, PAGES, PROGRAMS, QUICKSTART, ROOT, Program, programs

MODULE = re.compile(rf"(?<![\w./-])(?:{OURS})(?:\.[A-Za-z_]\w*)+")
FILE = re.compile(rf"(?<![\w./-])(?:{OURS}|docs)/[\w./-]*\w")
#: the keys of a run's configuration, and the sections around them; NAME is the user's choice
KEYS = {
    ".".join(parts[:depth])
    for s in sections(RunConfig)
    for key in s.keys
    for parts in [key.name.split(".")]
    for depth in range(1, len(parts) + 1)
}
KEY = re.compile("|".join(re.escape(key).replace("NAME", r"\w+") for key in KEYS))


def test_pages_are_read() -> None:
    """Catches a parser that finds nothing and therefore never fails."""
    names = {program.name for program in PROGRAMS}
    assert {"megatron_cord.launch", "megatron_cord.train", "megatron_cord.verify", "cord report"} <= names
    assert "make quickstart" in LINES["README.md"]
    assert programs("python -m megatron_cord.launch --nproc-per-node 2 tools/x.py import --tp 2 DIR") == [
        Program("megatron_cord.launch", ("--nproc-per-node", "2")),
        Program("tools/x.py", ("import", "--tp", "2", "DIR")),
    ]
    assert programs("cord report RUN_DIR") == programs("python tools/report.py RUN_DIR") != []


@pytest.mark.parametrize("page", LINES)
def test_targets_modules_and_files_exist(page: str) -> None:
    """Catches a make target or variable, a module, a member, a file, an extra or a key that does not exist."""
    wrong = []
    for line in LINES[page]:
        try:
            check_names(line)
            check_keys(line)
        except (AssertionError, ModuleNotFoundError) as error:
            wrong.append(f"{line}: {error}")
    assert not wrong, "\n".join(wrong)


def check_names(line: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    words = line.split()
    if words[:1] == ["make"]:
        targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
        assert {word for word in words[1:] if re.fullmatch(r"[a-z-]+", word)} <= targets
        for variable in re.findall(r"(?<=\s)([A-Z_]+)=", line):
            assert f"$({variable})" in makefile or f"$(or $({variable})" in makefile, variable
    if words[1:] and re.fullmatch(r"(?:\S*/)?(?:python3?|torchrun)", words[0]):
        started = words[2] if words[1] == "-m" else next((word for word in words[1:] if word.endswith(".py")), "")
        assert not started or (ROOT / started).is_file() or importlib.util.find_spec(started) is not None, started
    for extra in re.findall(r"megatron_cord\[(\w+)\]", line):
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        assert extra in project["optional-dependencies"], extra
    for word in words[1:]:
        if re.fullmatch(r"[\w-]+/[\w./-]+\.(?:ya?ml|py|sh|sbatch)", word) and not word.startswith(("runs/", "data/")):
            assert (ROOT / word).is_file(), word
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


def check_keys(line: str) -> None:
    for word in re.findall(r"(?<![\w./-])[a-z_]+(?:\.[a-z_]+)+(?![\w(/-])", line):
        section, _, rest = word.partition(".")
        # Some sections bear the names of rooms, whose modules and functions may be named without the package.
        if section in {field.name for field in dataclasses.fields(RunConfig)} and not is_member(
            f"megatron_cord.{section}", rest
        ):
            assert KEY.fullmatch(word) or word.endswith((".py", ".jsonl", ".json", ".yaml", ".md")), word


def is_member(package: str, rest: str) -> bool:
    try:
        return importlib.util.find_spec(f"{package}.{rest}") is not None
    except ModuleNotFoundError:
        module, _, member = f"{package}.{rest}".rpartition(".")
        return importlib.util.find_spec(package) is not None and has_member(module, member)


def has_member(module: str, member: str) -> bool:
    try:
        return hasattr(importlib.import_module(module), member)
    except ModuleNotFoundError:
        return False


def configurations(page: Path) -> list[str]:
    """Return a page's blocks of configuration: those that begin with one of a run's sections."""
    blocks = re.findall(r"^```(?:yaml)?\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [block for block in blocks if (begins := re.match(r"(\w+):(?=\s)", block)) and begins[1] in KEYS]


@pytest.mark.parametrize(
    "block",
    [pytest.param(block, id=f"{page.name}: {block[:20]!r}") for page in PAGES for block in configurations(page)],
)
def test_configurations_load(block: str, tmp_path: Path) -> None:
    """Catches a piece of YAML with a key or a value that a run refuses."""
    check_configuration(block, tmp_path)


def check_configuration(block: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(f"base: {QUICKSTART}\n{block}", encoding="utf-8")
    load_config(RunConfig, tmp_path / "config.yaml")


@pytest.mark.parametrize(
    "line",
    [
        "make quickstrat",
        "make sglang-env SGLANG_DEVISE=cuda",
        "python tolls/report.py RUN_DIR",
        "python tools/raport.py RUN_DIR",
        "python -m megatron_cord.trian --config CONFIG.yaml",
        "python -m megatron_cord.train --config exmaples/quickstart/quickstart.yaml",
        "python -m megatron_cord.train --config examples/quickstart/other.yaml",
        "pip install megatron_cord[wandbs]",
        "examples/qwen2_audio_7b/start.sh",
        "`megatron_cord.report.page.page.draw`",
    ],
)
def test_wrong_names_are_caught(line: str) -> None:
    """Catches checks above that let a misspelt target, variable, module, file or extra pass."""
    with pytest.raises((AssertionError, ModuleNotFoundError)):
        check_names(line)


def test_wrong_keys_are_caught(tmp_path: Path) -> None:
    """Catches checks above that let a key in a sentence or a block of YAML pass, or refuse what is right."""
    for right in (
        "train.steps",
        "metrics.wandb.mode=offline",
        "reward.terms",
        "data.loader.SampleLoader",
        "rollout.rollout_file",
    ):
        check_keys(right)
    for wrong in ("train.step", "see rollout.temprature", "alerts.windows=3"):
        with pytest.raises(AssertionError):
            check_keys(wrong)
    check_configuration("reward:\n  comparer: match\n", tmp_path)
    with pytest.raises(CordError, match=r"unknown key 'reward\.compare'"):
        check_configuration("reward:\n  compare: match\n", tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page: Path) -> None:
    """Catches a link or a picture whose file is not in the repository."""
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    missing = [
        target for target in targets if "://" not in target and not (page.parent / target.partition("#")[0]).exists()
    ]
    assert not missing


def test_walks_name_the_code() -> None:
    """Catches a hop of docs/architecture.md whose file or function is gone."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    hops = [cells[2] for line in text.splitlines() if len(cells := line.strip("| ").split(" | ")) == 3]
    named = [(match[1], match[2]) for hop in hops for match in re.finditer(r"`([\w/]+\.py)`: `([\w.]+)", hop)]
    assert len(named) > 25
    for name, member in named:
        files = [path for path in (ROOT / "megatron_cord").rglob(Path(name).name) if str(path).endswith(f"/{name}")]
        symbol = member.rpartition(".")[2]
        assert any(re.search(rf"\b(?:def|class) {symbol}\b", path.read_text(encoding="utf-8")) for path in files), name


def test_all_columns_are_described() -> None:
    """Catches a column of the rollout dump that the page lacks, or has under another name."""
    page = (ROOT / "docs" / "run-directory.md").read_text(encoding="utf-8")
    table = page.partition("| column |")[2].partition("\n\n")[0]
    described = [name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split(" | ")[0])]
    assert sorted(described) == sorted(SCHEMA.names)
