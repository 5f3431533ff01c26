"""Qwen2.5-Omni's thinker for SGLang, which looks for model and processor in this package."""

from __future__ import annotations

from cord_models import load_family_file

_family = load_family_file("qwen2_5_omni", "sglang_model")
EntryClass = _family.EntryClass


class Qwen2_5OmniProcessor(_family.Qwen2_5OmniProcessor):  # type: ignore[misc,name-defined]  # noqa: N801
    """The family's processor; SGLang registers only classes that are defined in the package's own modules."""
