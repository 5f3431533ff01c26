"""Every parser of a user's files on files that are broken at random: no crash, no hang, and one line for the user."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import subprocess
import sys
import tarfile
import wave
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import TARGETS, attempt

ROOT = Path(__file__).resolve().parents[2]


def _wav() -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(bytes(40))
    return buffer.getvalue()


def _recording(kind: str, encoding: str) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.linspace(-0.5, 0.5, 800).reshape(-1, 2), 44100, format=kind, subtype=encoding)
    return buffer.getvalue()


def _tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in (("a.json", b'{"question": "what", "choices": ["x", "y"]}'), ("a.wav", _wav())):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


ROW = {
    "id": "q",
    "question": r"What is $\frac{1}{2}$ of 10?",
    "choices": ["5", "6"],
    "answer": "A",
    "audio_id": "x.wav",
    "task": "sound",
}
#: A good input of each target, from which the broken ones are made.
SEEDS: dict[str, bytes] = {
    "shard": _tar(),
    "manifest": json.dumps(
        {
            "format": 1,
            "shards": [{"name": "x.tar", "samples": 1, "bytes": 2, "sha256": "00" * 32}],
            "voices": {},
            "seconds": 1.0,
            "source": {},
        }
    ).encode(),
    "recording": _wav(),
    "flac": _recording("FLAC", "PCM_16"),
    "float_wav": _recording("WAVEX", "FLOAT"),
    "jsonl": (json.dumps({name: ROW[name] for name in ("question", "choices", "answer")}) + "\n").encode() * 2,
    "json_array": json.dumps([ROW, ROW]).encode(),
    "config": (
        b"output_dir: o\nmodel: {checkpoint: c, freeze: [adapter]}\n"
        b"evaluation:\n  sets:\n    x: {path: p, samples: 3}\n"
    ),
    "override": b"evaluation.sets.x.path=p",
    "text": rb"Let $x^2 = \sqrt[3]{8} \cdot 1/2$, at 3:30 for $5.20 (about 1,000 %).",
    "answers": rb"So \boxed{\frac{1}{2}} #### 12 the answer is (B)|12",
}
PIECES = st.binary(max_size=6) | st.sampled_from(
    [b"\0", b"{", b"[", b'"', b"\n", b"\\", b"${a.b}", b"&a *a", b"!!python/object:os.system", b"1e999", b"\xff"]
)


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    edits=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 8), PIECES), max_size=6),
    end=st.floats(0, 1),
    whole=st.booleans(),
)
def test_broken_files(name: str, edits: list[tuple[float, int, bytes]], end: float, whole: bool) -> None:
    """Catches any exception but CordError, and a message of several lines, on files changed or cut at random."""
    content = bytearray(SEEDS[name])
    for place, removed, piece in edits:
        start = round(place * len(content))
        content[start : start + removed] = piece
    attempt(name, bytes(content if whole else content[: round(end * len(content))]))


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=25, deadline=None)
@given(content=st.binary(max_size=200))
def test_any_bytes(name: str, content: bytes) -> None:
    """Catches the same on files that are something else altogether."""
    attempt(name, content)


@pytest.mark.parametrize("name", TARGETS)
def test_good_files_pass(name: str) -> None:
    """Catches seeds that are refused at once, so that nothing behind the first check is ever fuzzed."""
    TARGETS[name](SEEDS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_guided_by_coverage(name: str, tmp_path: Path) -> None:
    """Catches what random edits do not find. Needs atheris, which make setup does not install."""
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("atheris is not installed")
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "seed").write_bytes(SEEDS[name])
    command = [
        sys.executable,
        "tests/fuzz/guided.py",
        name,
        "20",
        f"-artifact_prefix={tmp_path}/",
        str(tmp_path / "corpus"),
    ]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
