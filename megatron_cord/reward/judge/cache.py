"""The judge's answers on disk: one file of JSON lines a writer, only ever appended to.

A line that an interruption cut short is left out.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path


class JudgeCache:
    """Verdicts and ratings by key, for many threads of a process, and for other processes with other writers' numbers.

    Args:
        directory: all files in it are read once, at the start.
        writer: this process's number, whose file it writes.
    """

    def __init__(self, directory: Path, writer: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._known: dict[str, bool | int] = {}
        for file in sorted(directory.glob("*.jsonl")):
            self._read(file)
        self._lock = threading.Lock()
        self._path = directory / f"{writer}.jsonl"
        if self._path.is_file() and not self._path.read_bytes().endswith(b"\n"):
            self._append("\n")  # ends the line that was cut short

    def get(self, key: str) -> bool | None:
        """Return the verdict, or None."""
        return found if isinstance(found := self._known.get(key), bool) else None

    def rating(self, key: str) -> int | None:
        """Return the rating, or None."""
        return None if isinstance(found := self._known.get(key), bool) else found

    def put(self, key: str, answer: bool | int) -> None:
        """Append a verdict or a rating; it outlives the process as soon as this returns."""
        with self._lock:
            self._known[key] = answer
            name = "agrees" if isinstance(answer, bool) else "rating"
            self._append(json.dumps({"key": key, name: answer}) + "\n")

    def _append(self, text: str) -> None:
        with self._path.open("a") as file:
            file.write(text)

    def _read(self, file: Path) -> None:
        for line in file.read_bytes().splitlines():
            try:
                entry = json.loads(line)
                key, answer = entry["key"], entry["rating"] if "rating" in entry else entry["agrees"]
            except (ValueError, KeyError, TypeError):
                continue
            if isinstance(key, str) and type(answer) is (int if "rating" in entry else bool):
                self._known[key] = answer
