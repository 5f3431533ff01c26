"""Files that are whole or absent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_cord.runtime.files import atomic_file, file_digest, fingerprint, write_atomic, write_json


def fail_halfway(path: Path) -> None:
    with atomic_file(path) as file:
        file.write(b"half")
        raise OSError("halfway")


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    """Catches half a file under the final name, and a leftover beside it."""
    path = tmp_path / "new" / "file.json"
    write_json(path, {"a": "é"}, sync=True)
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "é"}
    with pytest.raises(OSError, match="halfway"):
        fail_halfway(path)
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "é"}
    write_atomic(path, b"\x00")
    assert path.read_bytes() == b"\x00"
    assert [p.name for p in path.parent.iterdir()] == ["file.json"]


def test_digests(tmp_path: Path) -> None:
    """Catches a fingerprint that does not see where one part ends and the next begins."""
    write_atomic(tmp_path / "x", "abc")
    assert file_digest(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert fingerprint(["ab", "c"]) != fingerprint(["a", "bc"]) and len(fingerprint([])) == 16
