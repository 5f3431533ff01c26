"""The report of the machine: right about what is there, and unharmed by what is broken."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_cord.verify import __main__ as verify
from megatron_cord.verify import environment
from megatron_cord.verify.environment import Package, Part, examine


def install(folder: Path, name: str, module: str, source: str) -> None:
    """Make a package with metadata and one module, as pip would leave it."""
    metadata = folder / f"{name}-1.2.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
    (folder / f"{module}.py").write_text(source)


@pytest.mark.parametrize(
    ("source", "state", "note"),
    [
        ("", "in use", "purpose"),
        ("raise RuntimeError('empty\\nmeta [pytorch]')", "broken", "meta [pytorch]; without it: missed"),
        ("import os; os._exit(3)", "broken", "ended with status 3; without it: missed"),
        ("import os; os.kill(os.getpid(), 9)", "broken", "ended with status -9; without it: missed"),
    ],
)  # fmt: skip
def test_a_half_installed_package_is_reported(
    source: str, state: str, note: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a report that ends with the package it imports (any exception, an abort), or trusts metadata alone."""
    install(tmp_path, "halfpart", "halfpart", source)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    part = examine(Package("half", ("otherpart", "halfpart"), "import halfpart", "purpose", "missed"), cuda=False)
    assert (part.version, part.state) == ("1.2", state) and part.note.endswith(note)


def test_a_package_is_in_use_only_where_it_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches CUDA parts reported as used on a machine without CUDA, and optional parts that count as failures."""
    install(tmp_path, "gpupart", "gpupart", "")
    monkeypatch.syspath_prepend(str(tmp_path))
    package = Package("gpu", ("gpupart",), "", "purpose", "missed", use="cuda")
    assert [examine(package, cuda=cuda).state for cuda in (False, True)] == ["available", "in use"]
    missing = examine(Package("none", ("no-such-part",), "import no_such_part", "purpose", "missed"), cuda=True)
    assert missing == Part("none", "", "missing", "missed") and not missing.fails
    assert Part("none", "", "missing", "missed", required=True).fails


@pytest.mark.slow
def test_the_whole_report(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a subject that is not in the table, a part left out, and a healthy machine reported as broken."""
    assert verify.SUBJECTS["environment"]([]) == 0
    printed = capsys.readouterr().out
    names = [package.name for package in environment.PACKAGES]
    for name in [*names, "Python", "SGLang", "CPU cores", "memory", "GPU"]:
        assert f"\n{name}" in printed or printed.startswith(name)


def test_a_missing_required_part_fails_the_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a report that ends with status 0, or without the command to repair it, where the project cannot run."""
    monkeypatch.setattr(
        environment, "PACKAGES", (Package("needed", ("no-such-part",), "", "purpose", "missed", required=True),)
    )
    assert verify.environment([]) == 1
    assert "error: needed: required, and missing or broken; install with: pip install -e ." in capsys.readouterr().err
