"""Audio Flamingo 3 for SGLang, which looks for model and processor here; the code is in the family's folder."""

from __future__ import annotations

from cord_models import load_family_file

_family = load_family_file("audioflamingo3", "sglang_model")
EntryClass = _family.EntryClass


class AudioFlamingo3Processor(_family.AudioFlamingo3Processor):  # type: ignore[misc,name-defined]
    """The family's processor; SGLang registers only classes that are defined in the package's own modules."""
