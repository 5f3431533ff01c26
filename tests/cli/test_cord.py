"""The console script: help that costs little, one-line errors, the same commands as scripts of tools/, and a wheel."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import pytest

from megatron_cord.cli import main as cli
from megatron_cord.cli.options import config_option, overrides_argument
from megatron_cord.data.audio.wav import encode_wav
from megatron_cord.errors import CordError
from megatron_cord.runtime.log import LEVEL_VARIABLE, configure_logging
from tests.tiny_run import make_samples, write_shards

ROOT = Path(cli.__file__).parents[2]
HEAVY = ("torch", "megatron.core", "wandb", "transformers", "pyarrow", "numpy", "matplotlib", "math_verify")
#: Prints the help pages of the given commands ("" is the front page) and the heavy modules that are loaded then.
HELP = """
import sys
from megatron_cord.cli.main import cord, invoke
for command in sys.argv[2:]:
    invoke(cord, [*command.split(), "--help"], "cord")
print("loaded:", *(name for name in sys.argv[1].split() if name in sys.modules))
"""
SHIMS = ("compare", "convert_hf", "plan", "report", "serve_rollout", "synthesize")


def python(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=120, env=environment, cwd=cwd, check=False
    )


def test_help_of_every_command_loads_nothing_heavy(tmp_path: Path) -> None:
    """Catches a command that imports torch, Megatron or a tracker to print its usage, or that has no help."""
    inner = ["convert import", "convert export", "convert check", "shards check", "shards info", "config check"]
    done = python("-c", HELP, " ".join(HEAVY), "", *cli.COMMANDS, *inner, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Usage: cord") == 1 + len(cli.COMMANDS) + len(inner)
    assert done.stdout.splitlines()[-1] == "loaded:"


def test_help_is_fast(tmp_path: Path) -> None:
    """Catches imports that are slow in sum; ten times what it takes on an idle core."""
    begun = time.process_time(), os.times().children_user
    assert python("-m", "megatron_cord.cli", "--help", cwd=tmp_path).returncode == 0
    assert os.times().children_user - begun[1] < 2.0


@pytest.mark.parametrize("name", SHIMS)
def test_scripts_of_tools_are_the_same_commands(name: str) -> None:
    """Catches a shim that imports something of its own, or names no command."""
    text = (ROOT / "tools" / f"{name}.py").read_text(encoding="utf-8")
    command = text.partition('shim("')[2].partition('"')[0]
    assert command in cli.COMMANDS and len(text.splitlines()) <= 22


def test_shims_run_from_anywhere(tmp_path: Path) -> None:
    """Catches a script that finds the project only in its own folder or installed, and a usage that names another."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, str(ROOT / "tools" / "plan.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.stdout.startswith("Usage: python tools/plan.py [OPTIONS]"), done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "No such command 'trian'"),
        (["train"], "Missing option '--config'"),
        (["train", "--config", "x", "--train.steps=3"], "overrides are written a.b=value, without dashes"),
        (["train", "--config", "none.yaml"], "none.yaml: there is no such configuration file"),
        (["train", "--config", "x", "--nproc-per-node", "0"], "0 is not in the range"),
        (["verify", "weights"], "'weights' is not one of 'environment', 'loss'"),
        (["convert", "imprt"], "No such command 'imprt'"),
        (["--log-level", "loud", "train"], "'loud' is not one of"),
        (["report", "none"], "none"),
        (["synthesize", "--questions", "q.jsonl"], "--output DIR is needed"),
    ],
)
def test_a_wrong_command_line_is_one_line(arguments: list[str], message: str) -> None:
    """Catches a usage page or a traceback in the place of an error, and a slip that passes."""
    with pytest.raises(CordError) as caught:
        cli.invoke(cli.cord, arguments, "cord")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_no_arguments_show_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches an error where a newcomer looks for the commands."""
    assert cli.invoke(cli.cord, [], "cord") == 0
    assert "Commands:" in capsys.readouterr().out


def test_statuses_and_overrides_reach_the_command() -> None:
    """Catches an exit status that is lost, and overrides that must stand after the options."""

    @click.command
    @config_option(required=True)
    @overrides_argument
    def command(config: Path, overrides: tuple[str, ...]) -> int:
        assert (config, overrides) == (Path("x"), ("a.b=1", "c=[1, 2]"))
        return 75

    assert cli.invoke(command, ["a.b=1", "--config", "x", "c=[1, 2]"], "x") == 75


def test_the_level_reaches_ranks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a level that ranks and servers started by the command do not get."""
    monkeypatch.setenv(LEVEL_VARIABLE, "info")
    cli.invoke(cli.cord, ["--log-level", "error", "verify", "--help"], "cord")
    assert os.environ[LEVEL_VARIABLE] == "error"
    configure_logging("info", rank=0)


def test_defaults_are_the_components() -> None:
    """Catches a default in a command that drifts from the dataclass it fills."""
    from megatron_cord.plan.devices import GPUS
    from megatron_cord.rollout.sglang.server.process import ServerConfig
    from megatron_cord.rollout.sglang.server.supervisor import SupervisorConfig
    from megatron_cord.speech.quality import QualityConfig
    from megatron_cord.speech.spoken_set import SpokenSetConfig
    from megatron_cord.speech.synthesizers.config import SynthesizerConfig
    from megatron_cord.verify.__main__ import SUBJECTS

    assert tuple(sorted(GPUS)) == importlib.import_module("megatron_cord.cli.plan").GPUS
    assert tuple(SUBJECTS) == importlib.import_module("megatron_cord.cli.verify").SUBJECTS
    for name, required, classes in [
        ("serve", ["checkpoint", "--servers-file", "file"], (ServerConfig, SupervisorConfig)),
        ("synthesize", ["--questions", "file"], (SpokenSetConfig, QualityConfig, SynthesizerConfig)),
    ]:
        options = cli.load(name).make_context(name, required).params
        for cls in classes:
            for field in dataclasses.fields(cls):
                # A list of numbers is a text on the command line, and voices repeat the option.
                if field.name in options and field.name not in ("checkpoint", "questions", "gpus", "more", "voices"):
                    assert options[field.name] == field.default, (name, field.name)


def test_options_that_take_several_values() -> None:
    """Catches `--voices a b`, which scripts use, read as a voice and a stray argument."""
    command = cli.load("synthesize")
    line = ["--voices", "a", "b", "--questions", "q", "--voices", "c"]
    assert command.make_context("x", line).params["voices"] == ("a", "b", "c")
    line = ["--ignore-fields", "level", "type", "--questions", "q", "--voices", "a"]
    params = command.make_context("x", line).params
    assert params["ignore_fields"] == ("level", "type") and params["voices"] == ("a",)


def test_completion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches completion that is installed twice, or for a shell that cannot have it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SHELL", "/bin/bash")
    (tmp_path / ".bashrc").write_text("alias x=y")
    for _ in range(2):
        assert cli.invoke(cli.cord, ["--install-completion"], "cord") == 0
    assert (tmp_path / ".bashrc").read_text() == 'alias x=y\neval "$(_CORD_COMPLETE=bash_source cord)"\n'
    monkeypatch.setenv("SHELL", "/bin/tcsh")
    with pytest.raises(CordError, match=r"bash, zsh, fish, not for SHELL=tcsh"):
        cli.invoke(cli.cord, ["--install-completion"], "cord")


def write_samples(directory: Path, *, broken: bool = False) -> Path:
    """Two samples in one shard; of the second one's audio half is missing if `broken`."""
    import io
    import tarfile

    import numpy as np

    directory.mkdir()
    with tarfile.open(directory / "a.tar", "w") as tar:
        for name in ("one", "two"):
            wav = encode_wav(np.zeros(16000, np.float32))
            text = json.dumps({"question": f"what is {name}", "answer": "1"}).encode()
            for suffix, content in (("json", text), ("wav", wav[: 1000 if broken and name == "two" else None])):
                info = tarfile.TarInfo(f"{name}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return directory / "a.tar"


def test_shards_are_checked_and_described(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a damaged sample that passes, and counts that are not those of the files."""
    good, bad = write_samples(tmp_path / "good"), write_samples(tmp_path / "bad", broken=True)
    assert cli.invoke(cli.cord, ["shards", "check", str(good)], "cord") == 0
    assert "2 samples, 0 problems" in capsys.readouterr().out
    assert cli.invoke(cli.cord, ["shards", "check", str(bad)], "cord") == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and "sample two" in lines[0] and lines[1].endswith("1 samples, 1 problems")
    assert cli.invoke(cli.cord, ["shards", "info", str(good)], "cord") == 0
    output = capsys.readouterr().out
    assert "shortest 1.0, median 1.0, longest 1.0" in output and "2" in output


def test_several_sets_and_addresses_are_checked_and_described(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a set that is left out, damage behind an address that passes, and a status of the last set alone.

    Also a check that removes the copies of a run from its cache, or leaves its own behind.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    for name, count in (("a", 4), ("b", 5)):
        write_shards(tmp_path / name, make_samples(count))
    address = f"file://{tmp_path}/b"
    assert cli.invoke(cli.cord, ["shards", "info", str(tmp_path / "a"), address], "cord") == 0
    output = capsys.readouterr().out
    assert output.count("samples") == 2 and address in output and "voice0 3, voice1 2" in output
    assert cli.invoke(cli.cord, ["shards", "check", str(tmp_path / "a"), address], "cord") == 0
    (tmp_path / "b" / "shard-000001.tar").unlink()
    assert not (tmp_path / "cache").exists() and not list((tmp_path / "temporary").iterdir())
    assert cli.invoke(cli.cord, ["shards", "check", address, str(tmp_path / "a")], "cord") == 1
    lines = capsys.readouterr().out.splitlines()
    assert "shard-000001.tar: it is not there" in lines[-3] and "5 samples, 1 problems" in lines[-2]
    assert "a: 4 samples, 0 problems" in lines[-1]


@pytest.mark.slow
def test_a_wheel_works_outside_the_repository(tmp_path: Path) -> None:
    """Catches a module, a page or an asset that the wheel lacks, and a command that needs the repository."""
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    copy = tmp_path / "source"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(copy)], check=True)
    subprocess.run([*pip, str(copy)], check=True, capture_output=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    interpreter = tmp_path / "venv" / "bin" / "python"
    (wheel,) = tmp_path.glob("*.whl")
    install = [sys.executable, "-m", "pip", "--python", str(interpreter), "install", "-q", "--no-deps", str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    borrow = [str(interpreter), str(ROOT / "tools" / "borrow_packages.py"), sys.executable]
    subprocess.run(borrow, check=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def cord(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(tmp_path / "venv" / "bin" / "cord"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)

    where = "import megatron_cord.cli.main as m; print(m.__file__)"
    query = [str(interpreter), "-c", where]
    found = subprocess.run(query, capture_output=True, text=True, env=environment, cwd=tmp_path, check=True)
    assert str(tmp_path) in found.stdout
    assert "Commands:" in cord("--help").stdout
    assert "optimizer.learning_rate" in cord("config", "optimizer.learning_rate").stdout
    config = tmp_path / "run.yaml"
    config.write_text("output_dir: out\nmodel: {checkpoint: none}\n")
    planned = cord("plan", "--config", str(config), "--model", "qwen2_audio_7b", "--gpus", "8", "--json")
    assert planned.returncode in (0, 1) and "fits" in json.loads(planned.stdout), planned.stderr
    checked = cord("convert", "check", "none", "none")
    assert checked.returncode == 2 and checked.stderr.startswith("error: none"), checked.stderr
    reported = cord("report", "none")
    assert reported.returncode == 2 and reported.stderr.count("\n") == 1, reported.stderr
