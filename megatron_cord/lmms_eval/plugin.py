"""What lmms-eval finds by the entry point "lmms_eval.models" of the installed package."""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """Return the description of the model, as lmms-eval's registry takes it."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("megatron_cord", simple_class_path="megatron_cord.lmms_eval.model.CordModel")
