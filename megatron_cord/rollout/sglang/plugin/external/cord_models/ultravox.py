"""Ultravox for SGLang, which looks for model and processor in this package; the code is in the family's folder."""

from __future__ import annotations

from cord_models import load_family_file

load_family_file("ultravox", "audio")
_family = load_family_file("ultravox", "sglang_model")
EntryClass = _family.EntryClass


class UltravoxProcessor(_family.UltravoxProcessor):  # type: ignore[misc,name-defined]
    """The family's processor; SGLang registers only classes that are defined in the package's own modules."""
