"""requirements.lock and pyproject.toml agree."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from tools import install
from tools.lock import locked

ROOT = Path(install.__file__).parents[1]
DEBIAN = "3.11.2"  #: the Python of Debian 12


def lock_lines() -> list[Requirement]:
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if not line.startswith("#")]


def test_the_lock_holds_what_the_project_requires() -> None:
    """Catches a requirement that was added or raised in pyproject.toml without `make lock`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = project["dependencies"] + [text for extra in install.EXTRAS.split(",") for text in extras[extra]]
    for requirement in map(Requirement, wanted):
        found = [
            line
            for line in lock_lines()
            if line.name == canonicalize_name(requirement.name)
            and (requirement.marker is None or str(line.marker) == str(requirement.marker))
        ]
        assert len(found) == 1, requirement
        (version,) = found[0].specifier
        assert version.operator == "==" and requirement.specifier.contains(version.version, prereleases=True), (
            requirement
        )


def test_the_lock_is_made_from_an_environment(tmp_path: Path) -> None:
    """Catches a lock without the requirements' requirements, or one that pins for the wrong Python."""
    project = tmp_path / "pyproject.toml"
    names: dict[str, list[str]] = {extra: [] for extra in install.EXTRAS.split(",")} | {
        "dev": ['none-such>=3.1,<4; python_version < "3"']
    }
    project.write_text(f"[project]\ndependencies = ['rich>=14']\n[project.optional-dependencies]\n{toml(names)}")
    lines = locked(project)
    assert [re.split("[=;]", line)[0] for line in lines] == ["markdown-it-py", "mdurl", "none-such", "pygments", "rich"]
    assert lines[2] == 'none-such==3.1; python_version < "3"'


def test_the_lock_installs_on_the_python_of_debian() -> None:
    """Catches a version that `make lock` took from a newer Python 3.11, and pip refuses where `make setup` runs."""
    names = [line.name for line in lock_lines() if line.marker is None or line.marker.evaluate()]
    described = [importlib.metadata.metadata(name) for name in names]
    wanted = {data["Name"]: data["Requires-Python"] for data in described if "Requires-Python" in data}
    assert len(wanted) > 100
    assert {name: python for name, python in wanted.items() if not SpecifierSet(python).contains(DEBIAN)} == {}


def toml(lists: dict[str, list[str]]) -> str:
    return "\n".join(f"{name} = {[*values]}" for name, values in lists.items())


def test_pins_for_installers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an installer that finds no torch or SGLang in the files that pin them."""
    monkeypatch.chdir(ROOT)
    assert re.fullmatch(r"\d+\.\d+\.\d+", install.locked_version("torch"))
    assert install.extra_requirements("sglang")[0].startswith("sglang==")
    with pytest.raises(SystemExit, match="has no none-such"):
        install.locked_version("none-such")
