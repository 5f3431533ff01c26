"""Step-Audio 2 for SGLang, which looks for model and processor in this package; the code is in the family's folder."""

from __future__ import annotations

from cord_models import load_family_file

_family = load_family_file("step_audio_2", "sglang_model")
EntryClass = _family.EntryClass


class StepAudio2Processor(_family.StepAudio2Processor):  # type: ignore[misc,name-defined]
    """The family's processor; SGLang registers only classes that are defined in the package's own modules."""
