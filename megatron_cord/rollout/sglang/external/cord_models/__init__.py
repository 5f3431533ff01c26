"""Models for SGLang's processes (``SGLANG_EXTERNAL_MODEL_PACKAGE``), where its own compute something else, or there are none.

This must not import the project, whose packages its interpreter lacks. One file of it that imports nothing else of it is loaded by its path.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def _load(name: str) -> ModuleType:
    """A file of ``megatron_cord/model/families`` as a module of this name, by which other processes find its classes, too."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[4] / "model" / "families" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_load("step_audio_2_hearing")  # which also tells transformers of the configuration: before SGLang reads one
