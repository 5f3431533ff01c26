"""The reference of a run's configuration, kept between calls, as making it imports every component."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from pathlib import Path

import megatron_cord
from megatron_cord.config.reference import Key, Section, sections
from megatron_cord.runtime.files import fingerprint, write_json


def run_sections() -> list[Section]:
    """Return the sections of a run's configuration, from the user's cache if the package has not changed since."""
    package = Path(megatron_cord.__file__).parent
    stats = {str(path): path.stat() for path in sorted(package.rglob("*.py"))}
    state = fingerprint(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats.items())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron_cord" / "reference.json"
    try:
        content = json.loads(cache.read_text(encoding="utf-8"))
        if content["state"] == state:
            return [Section(**found | {"keys": [Key(**key) for key in found["keys"]]}) for found in content["sections"]]
    except (OSError, ValueError, LookupError, TypeError):
        pass  # none, or one of another version
    from megatron_cord.trainer.config import RunConfig

    made = list(sections(RunConfig))
    with contextlib.suppress(OSError):
        write_json(cache, {"state": state, "sections": [dataclasses.asdict(section) for section in made]})
    return made
