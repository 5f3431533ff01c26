"""One finished run for all tests of the report; a test that changes it takes a copy."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.report.fixture import write_others, write_run


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a finished run, not to be changed."""
    return write_run(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="session")
def several_runs(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Write three runs to compare, not to be changed: the finished one first."""
    return [finished_run, *write_others(finished_run, tmp_path_factory.mktemp("others"))]


@pytest.fixture
def run_copy(finished_run: Path, tmp_path: Path) -> Path:
    """Copy the same run, to be changed at will."""
    return shutil.copytree(finished_run, tmp_path / "run")
