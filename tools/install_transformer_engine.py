"""Bring transformer-engine's Python code, without its compiled parts, for the tests that run it on a CPU.

``python -m tools.install_transformer_engine [--pip-args OPTIONS]`` puts its wheel (pure Python, a megabyte, compared
with a hash) into a folder of the environment that no interpreter searches: without its libraries it cannot be imported
as it is. The version is the one that pyproject.toml pairs with the installed Megatron-Core. This file needs the
standard library alone.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

#: For each line of Megatron-Core: the version in pyproject.toml's extra gpu, and the SHA-256 of its wheel on PyPI.
VERSIONS = {
    "0.16": ("2.11.0", "7ee1eae8fa6b0cb471c6066aa3555304fda8537174e5019929dc0c8655071df3"),
    "0.19": ("2.20.2", "7dcfad943a1a55b2612db9a0e43697fe98c70f4c42ec391ba3a0f872f6ce2094"),
}


def main() -> None:
    """Install it, or say in one line that it could not be had, which skips the tests of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pip-args", default="", help="options for pip install, in one text")
    options = shlex.split(parser.parse_args().pip_args)
    if not folder().is_dir() and not install(options):
        print("note: transformer-engine's wheel cannot be had; tests of its layers will be skipped", file=sys.stderr)


def version_for_megatron() -> str:
    """Return the version of transformer-engine for the installed Megatron-Core."""
    return _wanted()[0]


def folder() -> Path:
    """Return where the package lies once it is installed."""
    return Path(sys.prefix) / "share" / "transformer-engine" / version_for_megatron()


def install(options: list[str]) -> bool:
    """Install the wheel of that hash; return whether pip succeeded."""
    version, digest = _wanted()
    target = folder()
    with tempfile.TemporaryDirectory() as directory:
        requirements = Path(directory) / "requirements.txt"
        requirements.write_text(f"transformer-engine=={version} --hash=sha256:{digest}\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "install", "-qq", "--disable-pip-version-check", *options]
        command += ["--no-deps", "--only-binary", ":all:", "--require-hashes", "-r", str(requirements)]
        partial = target.with_name(f"{target.name}.partial")  # an interrupted copy must not pass for a whole one
        if subprocess.run([*command, "--upgrade", "--target", str(partial)], check=False).returncode:
            return False
        partial.rename(target)
    return True


def _wanted() -> tuple[str, str]:
    line = ".".join(importlib.metadata.version("megatron-core").split(".")[:2])
    return VERSIONS[line]


if __name__ == "__main__":
    main()
