"""The machine and the figures of a benchmark."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_cord.runtime.files import write_json


def processor() -> str:
    """Return the name of the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def publish(result: Mapping[str, Any], file: Path | None) -> None:
    """Print the figures as JSON, and write them to the file if there is one."""
    print(json.dumps(result, indent=1))
    if file:
        write_json(file, result)
