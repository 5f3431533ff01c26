"""What benchmarks say of their machine, and where their figures go."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def processor() -> str:
    """Its name as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def publish(result: Mapping[str, Any], file: Path | None) -> None:
    """Prints the figures as JSON, and writes them to the file if there is one."""
    text = json.dumps(result, indent=1)
    print(text)
    if file:
        file.write_text(text + "\n")
