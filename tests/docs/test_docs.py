"""Check that what the pages name exists: make targets, programs with their options, keys, modules, files, extras.

Commands that take seconds are run as they stand, in `test_these_run`; those that take minutes, GPUs or a cluster are
parsed here, and run by other tests. It simplifies: only what stands as code counts, a command ends with its line, and
placeholders (CAPITALS, …) are skipped.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import re
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import click
import pytest

from megatron_cord.cli.main import COMMANDS, cord, invoke, load
from megatron_cord.compare.config import CompareConfig
from megatron_cord.config.loading import load_config
from megatron_cord.config.reference import sections
from megatron_cord.errors import CordError
from megatron_cord.rollout.rollout_file import SCHEMA
from megatron_cord.trainer.config import RunConfig
from megatron_cord.verify.layout import VerifyLayoutConfig
from megatron_cord.verify.loss import VerifyLossConfig
from megatron_cord.verify.weight_sync import VerifyWeightSyncConfig
from megatron_cord.warmup.config import WarmupConfig
from tests.report.fixture import write_run

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
OURS = "megatron_cord|examples|benchmarks|tools|tests"
SCRIPT = re.compile(rf"(?:{OURS})/[\w/]+\.py")
MODULE = re.compile(rf"(?<![\w./-])(?:{OURS})(?:\.[A-Za-z_]\w*)+")
FILE = re.compile(rf"(?<![\w./-])(?:{OURS}|docs)/[\w./-]*\w")
SETTING = re.compile(r"[a-z_]+(\.[a-z_]+)*=\S+")
EXAMPLES = {"a.b=value", "a.b=c"}  # of the form of a setting
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
#: programs that take a run's settings
TRAINING = (
    "megatron_cord.train",
    "megatron_cord.evaluate",
    "examples.quickstart.run",
    "cord train",
    "cord evaluate",
    "cord plan",
)
#: the settings of `megatron_cord.verify`, by subject
CHECKS: dict[str, type] = {
    "loss": VerifyLossConfig,
    "layout": VerifyLayoutConfig,
    "weight_sync": VerifyWeightSyncConfig,
}
#: commands with a configuration of their own
OTHERS: dict[str, type] = {
    "cord compare": CompareConfig,
    "cord warmup": WarmupConfig,
    "megatron_cord.warmup": WarmupConfig,
}
#: the keys of a run's configuration, and the sections around them; NAME is the user's choice
KEYS = {
    ".".join(parts[:depth])
    for s in sections(RunConfig)
    for key in s.keys
    for parts in [key.name.split(".")]
    for depth in range(1, len(parts) + 1)
}
KEY = re.compile("|".join(re.escape(key).replace("NAME", r"\w+") for key in KEYS))


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


LINES = [pytest.param(line, id=f"{page.name}: {line}") for page in PAGES for line in dict.fromkeys(code(page))]
PROGRAMS = list(dict.fromkeys(program for line in LINES for program in programs(str(line.values[0]))))


def loaded(name: str) -> ModuleType:
    """Return a module by its name, or by the path of its script."""
    if not SCRIPT.fullmatch(name):
        module = importlib.import_module(name)
        return importlib.import_module(f"{name}.__main__") if hasattr(module, "__path__") else module
    spec = importlib.util.spec_from_file_location(name.removesuffix(".py").replace("/", "."), ROOT / name)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pages_are_read() -> None:
    """Catches a parser that finds nothing and therefore never fails."""
    names = {program.name for program in PROGRAMS}
    assert {"megatron_cord.launch", "megatron_cord.train", "megatron_cord.verify", "cord report"} <= names
    assert "make quickstart" in {line.values[0] for line in LINES}
    assert programs("python -m megatron_cord.launch --nproc-per-node 2 tools/x.py import --tp 2 DIR") == [
        Program("megatron_cord.launch", ("--nproc-per-node", "2")),
        Program("tools/x.py", ("import", "--tp", "2", "DIR")),
    ]
    assert programs("cord report RUN_DIR") == programs("python tools/report.py RUN_DIR") != []


@pytest.mark.parametrize("line", LINES)
def test_targets_modules_and_files_exist(line: str) -> None:
    """Catches a make target or variable, a module, a member, a file, an extra or a key that does not exist."""
    check_names(line)
    check_keys(line)


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


def help_of(
    name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    module = loaded(name)
    monkeypatch.setattr(sys, "argv", [name, *arguments, "--help"])
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert not ended.value.code
    return capsys.readouterr().out


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: " ".join((program.name, *program.arguments)))
def test_programs_take_these_arguments(
    program: Program, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches an option, a subcommand or a key of the configuration that the program does not know."""
    check_program(program, monkeypatch, capsys)


def check_program(program: Program, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if program.name.startswith("cord "):
        known = options_of(program)
    else:
        said = help_of(program.name, [], monkeypatch, capsys)
        choices = re.search(r"^positional arguments:\n  \{?(\w+(?:[,|]\w+)+)", said, re.MULTILINE)
        if choices and program.arguments:
            assert program.arguments[0] in re.split("[,|]", choices[1])
        known = set(re.findall(r"(?<![\w-])--?[\w-]+", said))
    options = {word.partition("=")[0] for word in program.arguments if word.startswith("-")}
    assert options - {"--help"} <= known
    settings = [word for word in program.arguments if SETTING.fullmatch(word) and word not in EXAMPLES]
    other: type | None = OTHERS.get(program.name)
    if program.name in ("megatron_cord.verify", "cord verify") and program.arguments:
        other = CHECKS.get(program.arguments[0])
    if program.name in TRAINING:
        load_config(RunConfig, QUICKSTART, settings)
    elif other is not None:
        needed = [f"{field.name}=x" for field in dataclasses.fields(other) if is_required(field)]
        load_config(other, None, [*needed, *(["train=x", "output_dir=x"] if other is CompareConfig else []), *settings])


def options_of(program: Program) -> set[str]:
    """Return the options of a command of `cord`, or of its subcommand, which must exist."""
    name, rest = program.name.removeprefix("cord "), list(program.arguments)
    if name.startswith("-"):
        command: click.Command | None = cord
        rest = [name]
    else:
        assert name in (*COMMANDS, "COMMAND"), name
        command = load(name) if name in COMMANDS else click.Command(name)
    if isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        with click.Context(command) as context:
            try:
                _, command, rest = command.resolve_command(context, rest)
            except click.UsageError as error:
                raise AssertionError(error.format_message()) from None
    assert command is not None
    return {text for parameter in command.params for text in (*parameter.opts, *parameter.secondary_opts)}


def check_programs(found: list[Program], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for program in found:
        check_program(program, monkeypatch, capsys)


def is_required(field: dataclasses.Field[object]) -> bool:
    return field.default is field.default_factory is dataclasses.MISSING


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


@pytest.mark.parametrize(
    "line",
    [
        "python tools/report.py --serv RUN_DIR",
        "python tools/convert_hf.py imprt HF_DIR CHECKPOINT_DIR",
        "python -m megatron_cord.train --config CONFIG.yaml train.step=4",
        "python -m megatron_cord.train --config CONFIG.yaml seeds=1",
        "python -m megatron_cord.evaluate --config CONFIG.yaml model.freeze=[encoder]",
        "python tools/plan.py --config CONFIG.yaml [paralel.tp=2]",
        "python -m megatron_cord.launch --nproc-per-nod 2 -m megatron_cord.verify loss",
        "python -m megatron_cord.verify layout train.pack=packed",
        "python -m megatron_cord.verify layouts",
        "python tools/compare.py train=CONFIG.yaml job=2",
        "cord reports RUN_DIR",
        "cord convert imprt HF_DIR CHECKPOINT_DIR",
        "cord report --serv RUN_DIR",
        "cord train --config CONFIG.yaml train.step=4",
    ],
)
def test_wrong_arguments_are_caught(
    line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches checks above that let a misspelt option, subcommand, key or value pass."""
    with pytest.raises((AssertionError, CordError)):
        check_programs(programs(line), monkeypatch, capsys)


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


@pytest.mark.parametrize(
    "line",
    [
        "python tools/config_reference.py rollout",
        "cord plan --config examples/qwen2_audio_7b/config.yaml --model qwen2_audio_7b --gpus 4 --rollout-gpus 4",
        "cord synthesize --questions questions.jsonl --output data/spoken",
        "cord report RUN_DIR",
        "cord config optimizer",
    ],
)
def test_these_run(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a command that is spelt rightly and fails all the same."""
    assert line in {str(known.values[0]) for known in LINES}, "no page has this command: remove it here, or replace it"
    (program,) = programs(line)
    (tmp_path / "questions.jsonl").write_text(
        '{"id": "q1", "question": "What is two plus two?", "answer": "4"}\n', encoding="utf-8"
    )
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    run = write_run(tmp_path) if "RUN_DIR" in line else tmp_path
    arguments = [word.replace("RUN_DIR", str(run)) for word in program.arguments]
    monkeypatch.chdir(tmp_path)
    if program.name.startswith("cord "):
        status = invoke(load(program.name.removeprefix("cord ")), arguments, program.name)
    else:
        monkeypatch.setattr(sys, "argv", [program.name, *arguments])
        status = loaded(program.name).main()
    assert not status, capsys.readouterr()
    assert capsys.readouterr().out.strip()


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
