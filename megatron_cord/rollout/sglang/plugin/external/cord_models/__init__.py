"""Models for SGLang's processes (``SGLANG_EXTERNAL_MODEL_PACKAGE``), where SGLang's own differ or are missing.

SGLang looks for model classes and processors in the modules of this package. The package must not import the project,
whose packages its interpreter lacks. A family's files in ``megatron_cord/model/families`` that import nothing else of
the project are loaded by their path.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

_FAMILIES = Path(__file__).parents[5] / "model" / "families"


def load_family_file(family: str, name: str) -> ModuleType:
    """Load ``families/FAMILY/NAME.py`` as the module ``FAMILY_NAME``, where other processes find its classes, too."""
    module_name = f"{family}_{name}"
    spec = importlib.util.spec_from_file_location(module_name, _FAMILIES / family / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[module_name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# These also register the families' configurations with transformers, before SGLang reads a checkpoint's.
load_family_file("step_audio_2", "audio")
load_family_file("ultravox", "configuration")
load_family_file("qwen2_5_omni", "served_config")
