"""Check the commands of the pages: programs, their subcommands, options and settings.

Commands that take seconds are run as they stand, in `test_these_run`; those that take minutes, GPUs or a cluster are
parsed here, and run by other tests.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import click
import pytest

from megatron_cord.cli.main import COMMANDS, cord, invoke, load
from megatron_cord.compare.config import CompareConfig
from megatron_cord.config.loading import load_config
from megatron_cord.errors import CordError
from megatron_cord.trainer.config import RunConfig
from megatron_cord.verify.layout import VerifyLayoutConfig
from megatron_cord.verify.loss import VerifyLossConfig
from megatron_cord.verify.weight_sync import VerifyWeightSyncConfig
from megatron_cord.warmup.config import WarmupConfig
from tests.docs.pages import LINES, PROGRAMS, QUICKSTART, ROOT, SCRIPT, Program, is_required, programs
from tests.report.fixture import write_run

SETTING = re.compile(r"[a-z_]+(\.[a-z_]+)*=\S+")
EXAMPLES = {"a.b=value", "a.b=c"}  # of the form of a setting
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
    assert any(line in lines for lines in LINES.values()), "no page has this command: remove it here, or replace it"
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
