"""Written questions for spoken sets."""

from __future__ import annotations

import json
from pathlib import Path


def write_questions(path: Path, count: int) -> Path:
    path.write_text(
        "".join(
            json.dumps({"id": f"q{i}", "question": f"What is {i} plus 2?", "answer": i + 2}) + "\n"
            for i in range(count)
        )
    )
    return path
