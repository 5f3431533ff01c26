"""Step-Audio 2 for SGLang, which looks for model and processor in this package; the code is in the family's folder."""

from __future__ import annotations

from cord_models import load_family_file

_module = load_family_file("step_audio_2", "sglang_model")
EntryClass = _module.EntryClass
StepAudio2Processor = _module.StepAudio2Processor
