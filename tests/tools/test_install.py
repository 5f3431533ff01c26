"""What is installed for CUDA, and whether the files that name its versions agree; nothing is downloaded."""

from __future__ import annotations

import hashlib
import os
import re
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tools import install, install_transformer_engine, resolve

ROOT = Path(install.__file__).parents[1]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """Return the list of pip's arguments, filled as the installer calls it, on a machine with a toolkit in tmp_path."""
    made: list[list[str]] = []
    monkeypatch.setattr(install, "pip", lambda arguments: made.append(arguments) or True)  # type: ignore[func-returns-value]
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch()
    monkeypatch.setattr(os, "environ", os.environ | {"CUDA_HOME": str(tmp_path)})
    monkeypatch.setattr(sys, "argv", ["install.py", "--device", "cuda", "--pip-args=--no-index"])
    monkeypatch.chdir(ROOT)
    return made


def test_cuda_is_installed_in_order(calls: list[list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Catches a CPU build taken for CUDA, transformer-engine built apart from its torch, and missing tests."""
    found = iter([False, True])
    monkeypatch.setattr(install, "torch_has_cuda", lambda: next(found))
    install.main()
    assert all(call[0] == "--no-index" for call in calls)
    _, torch, tools, engine, project = (call[1:] for call in calls)
    assert torch == [f"torch==={install.locked_version('torch')}"]
    assert {"pybind11", "ninja"} <= set(tools)
    assert "--no-build-isolation" in engine and set(install.extra_requirements("gpu")) <= set(engine)
    assert project[-1] == f".[{install.EXTRAS},gpu]" and "dev" in install.EXTRAS.split(",")
    assert os.environ["NVTE_FRAMEWORK"] == "pytorch" and os.environ["CUDA_HOME"] == str(tmp_path)


def test_what_cannot_become_a_cuda_environment(calls: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches gigabytes that are downloaded before the missing toolkit is seen, and a CPU torch that passes."""
    monkeypatch.setattr(install, "torch_has_cuda", lambda: False)
    with pytest.raises(SystemExit, match="build without CUDA; set TORCH"):
        install.main()
    calls.clear()
    monkeypatch.setattr(install, "cuda_toolkit", lambda: sys.exit("error: no CUDA toolkit"))
    with pytest.raises(SystemExit, match="no CUDA toolkit"):
        install.main()
    assert len(calls) == 1  # pip itself


def test_the_dockerfile_follows_the_pins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a version or an extra raised in pyproject.toml and not in the Dockerfile or the dry run."""
    monkeypatch.chdir(ROOT)
    text = Path("Dockerfile").read_text(encoding="utf-8")
    (old, new), (sglang,) = map(Requirement, install.extra_requirements("gpu")), install.extra_requirements("sglang")
    assert f"transformer-engine[core_cu13,pytorch]{new.specifier}" in text and f"pip install {sglang} " in text
    for name in ("torch", "numpy", "packaging"):
        assert f"{name}=={install.locked_version(name)} " in text
    tests = text[text.index(" AS tests") :]
    assert f'".[{install.EXTRAS}]"' in tests
    assert tests.rindex("\nFROM base\n") > 0  # the image without tests is the default
    versions = {version for name, version in resolve.NO_WHEEL if name == "transformer_engine_torch"}
    assert {f"=={version}" for version in versions} == {str(old.specifier), str(new.specifier)}
    tested = install_transformer_engine.VERSIONS
    assert [f"=={tested[line][0]}" for line in ("0.16", "0.19")] == [str(old.specifier), str(new.specifier)]


def test_the_dry_run_resolves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a dry run that passes whatever pip says, and stand-ins that pip does not read; without a network."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    alone = ["--no-index"]
    assert resolve.resolve(["cuda_tile==1.6.0rc5"], alone) == {"cuda-tile": "1.6.0rc5"}
    assert resolve.resolve(["cuda_tile==1.6.0rc5", "cuda_tile<1"], alone) is None
    requirements, constraints = resolve.environments()[".venv"]
    assert set(install.extra_requirements("gpu")) < set(requirements) and constraints == ["-c", "requirements.lock"]
    triton = install.locked_version("triton")
    good = {"torch": "2.13.0", "triton": triton, "nvidia-cublas": "13.1"}
    assert resolve.objection(good) == ""
    assert "no CUDA libraries" in resolve.objection({"torch": "2.13.0+cpu", "triton": triton})
    assert re.search(rf"runs Triton 9.9, but .* names {triton}", resolve.objection(good | {"triton": "9.9"}))


def test_other_files_than_those_of_the_hash_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches another transformer-engine than the one that was looked at, and half of one taken for it."""
    version = install_transformer_engine.version_for_megatron()
    wheel = tmp_path / f"transformer_engine-{version}-py3-none-any.whl"
    metadata = f"transformer_engine-{version}.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(
            f"{metadata}/METADATA", f"Metadata-Version: 2.1\nName: transformer-engine\nVersion: {version}\n"
        )
        archive.writestr(f"{metadata}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{metadata}/RECORD", "")
    monkeypatch.setattr(install_transformer_engine, "folder", lambda: tmp_path / "share" / version)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    options = ["--no-index", "--find-links", str(tmp_path)]
    assert not install_transformer_engine.install(options)
    assert not install_transformer_engine.folder().exists()
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setattr(install_transformer_engine, "_wanted", lambda: (version, digest))
    assert install_transformer_engine.install(options) and install_transformer_engine.folder().is_dir()
