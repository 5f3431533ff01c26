"""Write requirements.lock, the exact versions of this environment: ``make lock``.

The lock holds what the project needs, directly or through others, with the extras that ``make setup`` installs.
``make setup`` and the Dockerfile use it as constraints. It simplifies: a requirement for another version of Python is
locked to its lower bound, the tested one.
"""

from __future__ import annotations

import importlib.metadata
import tomllib
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tools.install import EXTRAS, LOCK

HEAD = "# Exact versions that the tests ran with, as constraints for pip; made by `make lock`, not by hand.\n"


def locked(project: Path) -> list[str]:
    """Return the lines of the lock, sorted, for the pyproject.toml at `project` and the packages installed here."""
    metadata = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
    extras = metadata["optional-dependencies"]
    direct = [Requirement(text) for text in metadata["dependencies"]]
    direct += [Requirement(text) for extra in EXTRAS.split(",") for text in extras[extra]]
    lines, seen = set(), set()
    pending = [(requirement, "") for requirement in direct]
    while pending:
        requirement, extra = pending.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            if requirement in direct:
                lines.add(f"{requirement.name}=={_lower_bound(requirement)}; {requirement.marker}")
            continue
        name = canonicalize_name(requirement.name)
        marker = f"; {requirement.marker}" if requirement in direct and requirement.marker is not None else ""
        version = importlib.metadata.version(name).partition("+")[0]  # the same version of any build
        if not any(line.startswith(f"{name}==") for line in lines if not marker):
            lines.add(f"{name}=={version}{marker}")
        for wanted in {"", *requirement.extras}:
            if (name, wanted) not in seen:
                seen.add((name, wanted))
                pending += [(inner, wanted) for inner in _requirements(name)]
    return sorted(lines)


def _requirements(name: str) -> Iterable[Requirement]:
    return map(Requirement, importlib.metadata.requires(name) or ())


def _lower_bound(requirement: Requirement) -> Version:
    return min(Version(part.version) for part in requirement.specifier)


def main() -> None:
    """Entry point."""
    LOCK.write_text(HEAD + "\n".join(locked(Path("pyproject.toml"))) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
